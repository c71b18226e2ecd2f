/// The one reader of JSON: manifests and evidence come from elsewhere, so nothing in them may end the process.
#pragma once

#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

namespace ztp {

/// Why a text is no JSON that is read here, without a full stop.
class JsonError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The whole text as JSON. Throws JsonError.
nlohmann::json parse_json(const std::string& text);

}  // namespace ztp
