#include "tensorrt_home.h"

#include <charconv>
#include <sstream>

namespace ztp {
namespace {

using Numbers = std::vector<int>;

const Numbers kAmpere{8, 0};
const Numbers kFp8Capability{8, 9};

/// Those of the parts between dots that are numbers.
Numbers numbers(const std::string& version) {
  Numbers found;
  std::istringstream parts(version);
  for (std::string part; std::getline(parts, part, '.');) {
    int number = 0;
    const char* end = part.data() + part.size();
    if (std::from_chars(part.data(), end, number).ptr == end && !part.empty()) found.push_back(number);
  }
  return found;
}

/// Whether a plan opens in this release: the very one, or where built for it a later one, 11 also after 10.
///
/// What Python's wheels add to a version (`.post1`) is not part of it.
bool opens(const std::string& built, const std::string& here, bool version_compatible) {
  Numbers one = numbers(built);
  Numbers other = numbers(here);
  if (!version_compatible) return one == other;
  one.resize(2);
  other.resize(2);
  return one <= other && (one[0] == other[0] || (one[0] == 10 && other[0] == 11));
}

}  // namespace

void check_home(const EngineFolder& folder, const Gpu& here, const std::string& title, const std::string& version) {
  const std::string& capability = here.compute_capability;
  if (folder.manifest.precision == "fp8" && numbers(capability) < kFp8Capability) {
    throw MissingSoftware("fp8 needs a GPU of compute capability 8.9 or newer; this is " + here.name + " (" +
                              capability + ").",
                          "Use int8 or fp16.");
  }
  const std::string& built = folder.manifest.backend_version;
  if (!opens(built, version, folder.version_compatible)) {
    const bool known = folder.version_compatible || folder.manifest.backend == "tensorrt_rtx";
    throw MissingSoftware(
        folder.directory.string() + " was built with " + title + " " + built + "; this is " + version + ".",
        known ? "Build it again with this release." : "Build it again, or build with version_compatible.");
  }
  if (folder.hardware_compatible == "ampere_plus" && numbers(capability) < kAmpere) {
    throw MissingSoftware(folder.directory.string() +
                              " was built for GPUs of compute capability 8.0 or newer; this is " + here.name + " (" +
                              capability + ").",
                          "Build it again on this GPU.");
  }
  const Gpu& home = folder.home;
  if (home.name.empty() || folder.hardware_compatible == "ampere_plus") return;
  const bool very_gpu = folder.hardware_compatible == "none";
  if (capability == home.compute_capability && (!very_gpu || here.name == home.name)) return;
  throw MissingSoftware(folder.directory.string() + " was built for " + home.name + " (compute capability " +
                            home.compute_capability + "); this is " + here.name + " (" + capability + ").",
                        "Build it again on this GPU, or build with hardware_compatible.");
}

}  // namespace ztp
