#include "json.h"

namespace ztp {
namespace {

using nlohmann::json;

constexpr int kDeepest = 64;  // nothing that is written nests deeper; what is crafted must not exhaust the stack

}  // namespace

json parse_json(const std::string& text) {
  if (text.rfind("\xEF\xBB\xBF", 0) == 0) throw JsonError("Invalid JSON at byte 1");
  // The parser would take a zero byte for the end, whatever comes after it.
  const std::size_t zero = text.find('\0');
  if (zero != std::string::npos) throw JsonError("Invalid JSON at byte " + std::to_string(zero + 1));
  try {
    return json::parse(text, [](int depth, json::parse_event_t, json&) {
      if (depth > kDeepest) throw JsonError("It is nested too deeply");
      return true;
    });
  } catch (const json::parse_error& error) {
    throw JsonError("Invalid JSON at byte " + std::to_string(error.byte));
  } catch (const json::exception&) {
    throw JsonError("Invalid JSON: a number is too large");
  }
}

}  // namespace ztp
