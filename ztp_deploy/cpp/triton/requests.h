/// Requests that Triton hands over together, answered from as few runs as may be.
#pragma once

#include <cstdint>

#include "model.h"
#include "triton/core/tritonbackend.h"

namespace ztp::triton {

/// Runs the images of all requests as one batch, answers each request and releases it; nothing is thrown.
///
/// Where the batch is refused, say for one client's pixels that are not finite, every request is run alone, so that
/// it fails for none but that client.
void answer_requests(const Model& model, TRITONBACKEND_ModelInstance* instance, TRITONBACKEND_Request** requests,
                     std::uint32_t count) noexcept;

}  // namespace ztp::triton
