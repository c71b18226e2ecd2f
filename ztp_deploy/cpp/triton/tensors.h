/// A session's input and outputs as Triton's tensors.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "triton/core/tritonbackend.h"
#include "ztp/session.h"

namespace ztp::triton {

inline constexpr const char* kInput = "images";  ///< [batch, 3, size, size]

/// One output of a run: `batch` rows of `columns` values of four bytes each.
struct Rows {
  std::string name;
  TRITONSERVER_DataType type;
  const void* data;
  std::size_t columns;
};

inline constexpr std::size_t kValueBytes = 4;  ///< of float32 and of int32, which is all that outputs are made of

/// `logits`, then `kept_1`, `kept_2` …, then `assignment_1` …; views into `outputs`, in the header's words.
std::vector<Rows> rows_of(const Outputs& outputs);

/// Type of the pixels an engine takes.
TRITONSERVER_DataType pixel_type(const Manifest& manifest);

/// Bytes of one image.
std::size_t image_bytes(const Manifest& manifest);

/// Runs images of whatever type the engine takes.
Outputs run(const Session& session, const void* images, std::size_t batch);

}  // namespace ztp::triton
