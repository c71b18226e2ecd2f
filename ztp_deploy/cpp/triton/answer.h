/// The two ways across Triton's C interface: its errors as exceptions, exceptions as its errors.
#pragma once

#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#include "triton/core/tritonbackend.h"
#include "ztp/session.h"

namespace ztp::triton {

/// Triton's own refusal of a call.
class TritonError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Throws TritonError where Triton's function failed.
inline void require(TRITONSERVER_Error* error) {
  if (error == nullptr) return;
  const std::unique_ptr<TRITONSERVER_Error, decltype(&TRITONSERVER_ErrorDelete)> owned(error, TRITONSERVER_ErrorDelete);
  throw TritonError(TRITONSERVER_ErrorMessage(error));
}

/// Triton's error for the exception that is being handled; a client sees its sentences, and 400, 503 or 500 over HTTP.
inline TRITONSERVER_Error* error_in_flight() noexcept {
  try {
    throw;
  } catch (const BadRequest& error) {
    return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_INVALID_ARG, error.what());
  } catch (const MissingSoftware& error) {
    return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_UNAVAILABLE, error.what());
  } catch (const std::exception& error) {
    return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_INTERNAL, error.what());
  }
}

/// Does `work`; null where it succeeded, as Triton expects of a back end's functions.
template <class Work>
TRITONSERVER_Error* answer(Work work) noexcept {
  try {
    work();
    return nullptr;
  } catch (...) {
    return error_in_flight();
  }
}

inline void log(TRITONSERVER_LogLevel level, const std::string& sentence) noexcept {
  TRITONSERVER_ErrorDelete(TRITONSERVER_LogMessage(level, "ztp", 0, sentence.c_str()));
}

}  // namespace ztp::triton
