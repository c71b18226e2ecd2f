/// The functions that Triton Inference Server looks up in libtriton_ztp.so.
#include <memory>
#include <string>

#include "answer.h"
#include "model.h"
#include "requests.h"
#include "triton/core/tritonbackend.h"

#define ZTP_ENTRY __attribute__((visibility("default"))) TRITONSERVER_Error*

using ztp::triton::answer;
using ztp::triton::Model;
using ztp::triton::require;

namespace {

Model& model_of(TRITONBACKEND_ModelInstance* instance) {
  TRITONBACKEND_Model* model = nullptr;
  void* state = nullptr;
  require(TRITONBACKEND_ModelInstanceModel(instance, &model));
  require(TRITONBACKEND_ModelState(model, &state));
  return *static_cast<Model*>(state);
}

}  // namespace

extern "C" {

ZTP_ENTRY TRITONBACKEND_Initialize(TRITONBACKEND_Backend*) {
  return answer([] {
    std::uint32_t major = 0;
    std::uint32_t minor = 0;
    require(TRITONBACKEND_ApiVersion(&major, &minor));
    if (major == TRITONBACKEND_API_VERSION_MAJOR) {
      ztp::set_log([](ztp::Severity severity, const std::string& message) {
        const bool error = severity == ztp::Severity::error;
        ztp::triton::log(error ? TRITONSERVER_LOG_ERROR : TRITONSERVER_LOG_WARN, message);
      });
      return;
    }
    throw ztp::MissingSoftware("This server's back-end interface has version " + std::to_string(major) + "." +
                                   std::to_string(minor) + "; libtriton_ztp.so was built for " +
                                   std::to_string(TRITONBACKEND_API_VERSION_MAJOR) + ".x.",
                               "Build it again with this server's headers (TRITON_ROOT).");
  });
}

ZTP_ENTRY TRITONBACKEND_Finalize(TRITONBACKEND_Backend*) {
  return answer([] { ztp::set_log({}); });
}

ZTP_ENTRY TRITONBACKEND_ModelInitialize(TRITONBACKEND_Model* model) {
  return answer([&] {
    auto opened = std::make_unique<Model>(model);
    require(TRITONBACKEND_ModelSetState(model, opened.get()));
    static_cast<void>(opened.release());  // Triton's until TRITONBACKEND_ModelFinalize
  });
}

ZTP_ENTRY TRITONBACKEND_ModelFinalize(TRITONBACKEND_Model* model) {
  return answer([&] {
    void* state = nullptr;
    require(TRITONBACKEND_ModelState(model, &state));
    const std::unique_ptr<Model> closed(static_cast<Model*>(state));
  });
}

ZTP_ENTRY TRITONBACKEND_ModelInstanceInitialize(TRITONBACKEND_ModelInstance* instance) {
  return answer([&] { model_of(instance).check_place(instance); });
}

ZTP_ENTRY TRITONBACKEND_ModelInstanceExecute(TRITONBACKEND_ModelInstance* instance, TRITONBACKEND_Request** requests,
                                             const std::uint32_t count) {
  return answer([&] { ztp::triton::answer_requests(model_of(instance), instance, requests, count); });
}

}  // extern "C"
