#include "processor.h"

#include <fstream>
#include <iterator>
#include <set>
#include <sstream>

#include "ztp/session.h"

namespace ztp {
namespace {

/// The instruction sets of this processor; empty where the system does not tell.
std::set<std::string> processor_flags() {
  std::ifstream stream("/proc/cpuinfo");
  for (std::string line; std::getline(stream, line);) {
    std::istringstream words(line);
    std::string name;
    std::string colon;
    words >> name >> colon;
    if (colon != ":" || (name != "flags" && name != "Features")) continue;
    return {std::istream_iterator<std::string>(words), std::istream_iterator<std::string>()};
  }
  return {};
}

}  // namespace

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

}  // namespace ztp
