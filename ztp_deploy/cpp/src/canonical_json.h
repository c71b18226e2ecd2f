/// JSON as Python's `json.dumps(value, sort_keys=True)` writes it, letter by letter: what seals are made over.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace ztp {

std::string canonical_json(const nlohmann::json& value);

}  // namespace ztp
