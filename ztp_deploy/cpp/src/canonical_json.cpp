#include "canonical_json.h"

#include <array>
#include <charconv>
#include <cstdlib>

namespace ztp {
namespace {

/// A float as Python's repr: the shortest digits that read back equal, with an exponent below 1e-4 and from 1e16 on.
std::string python_float(double value) {
  std::array<char, 40> buffer{};
  const auto end =
      std::to_chars(buffer.data(), buffer.data() + buffer.size(), value, std::chars_format::scientific).ptr;
  const std::string scientific(buffer.data(), end);
  const std::size_t mark = scientific.find('e');
  if (mark == std::string::npos) return scientific;
  const int exponent = std::atoi(scientific.c_str() + mark + 1);
  if (exponent < -4 || exponent >= 16) return scientific;
  const auto fixed = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value, std::chars_format::fixed).ptr;
  const std::string text(buffer.data(), fixed);
  return text.find('.') == std::string::npos ? text + ".0" : text;
}

std::string quoted(const std::string& text) { return nlohmann::json(text).dump(-1, ' ', true); }

}  // namespace

std::string canonical_json(const nlohmann::json& value) {
  if (value.is_number_float()) return python_float(value.get<double>());
  if (!value.is_structured()) return value.dump(-1, ' ', true);
  std::string text;
  // nlohmann's objects are ordered by their keys' bytes, which in UTF-8 is Python's order of code points.
  for (const auto& [key, entry] : value.items()) {
    if (!text.empty()) text += ", ";
    if (value.is_object()) text += quoted(key) + ": ";
    text += canonical_json(entry);
  }
  return value.is_object() ? "{" + text + "}" : "[" + text + "]";
}

}  // namespace ztp
