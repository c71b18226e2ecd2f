#include "processor.h"

#include <sys/utsname.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>

#include "ztp/session.h"

namespace ztp {
namespace {

std::string stripped(const std::string& text) {
  const std::size_t first = text.find_first_not_of(" \t");
  return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

/// What the system says of the first processor.
std::map<std::string, std::string> fields() {
  std::map<std::string, std::string> found;
  std::ifstream stream("/proc/cpuinfo");
  for (std::string line; std::getline(stream, line);) {
    const std::size_t colon = line.find(':');
    if (colon != std::string::npos) found.emplace(stripped(line.substr(0, colon)), stripped(line.substr(colon + 1)));
  }
  return found;
}

std::string machine() {
  utsname names{};
  return uname(&names) == 0 ? names.machine : "";
}

/// What the variable says; empty where it does not limit.
std::string instruction_limit() {
  const char* text = nullptr;
  for (const char* name : {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"}) {
    if (text == nullptr || *text == '\0') text = std::getenv(name);
  }
  std::string limit = text == nullptr ? "" : text;
  std::transform(limit.begin(), limit.end(), limit.begin(),
                 [](unsigned char letter) { return static_cast<char>(std::toupper(letter)); });
  return limit == "ALL" || limit == "DEFAULT" ? "" : limit;
}

}  // namespace

std::set<std::string> processor_flags() {
  const std::map<std::string, std::string> known = fields();
  for (const char* name : {"flags", "Features"}) {
    const auto found = known.find(name);
    if (found == known.end()) continue;
    std::istringstream words(found->second);
    return {std::istream_iterator<std::string>(words), std::istream_iterator<std::string>()};
  }
  return {};
}

void require_instructions(const std::vector<std::string>& flags) {
  const std::set<std::string> known = processor_flags();
  std::string lacking;
  for (const std::string& flag : flags) {
    if (known.count(flag) == 0) lacking += (lacking.empty() ? "" : ", ") + flag;
  }
  if (lacking.empty()) return;
  throw MissingSoftware("This engine was compiled for a CPU with " + lacking + ", which this one lacks.",
                        "Build it again on this machine.");
}

std::string processor_name() {
  std::map<std::string, std::string> known = fields();
  std::string name = known["model name"].empty() ? machine() : known["model name"];
  if (known.count("cpu family") != 0) {
    const std::string model = known.count("model") != 0 ? known["model"] : "?";
    name += " (family " + known["cpu family"] + ", model " + model + ")";
  }
  const std::string limit = instruction_limit();
  return limit.empty() ? name : name + ", oneDNN held to " + limit;
}

}  // namespace ztp
