/// Triton's model configuration, completed from an engine and held against it.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tensors.h"

namespace ztp::triton {

/// What the parameter `self_test` of a configuration asks for.
enum class SelfTestWish { if_recorded, required, off };

/// Throws BadRequest for another word.
SelfTestWish self_test_wish(const nlohmann::json& configuration);

/// Fills in what a configuration leaves open: batch size with dynamic batching, input, outputs, instances.
nlohmann::json completed(nlohmann::json configuration, const Manifest& manifest, const std::vector<Rows>& outputs);

/// Throws BadRequest where a configuration promises what the engine does not do.
void check(const nlohmann::json& configuration, const Manifest& manifest, const std::vector<Rows>& outputs);

}  // namespace ztp::triton
