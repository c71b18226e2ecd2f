#include "gpu.h"

#include <dlfcn.h>

#include <array>

namespace ztp {
namespace {

// Of the driver's C interface, which is stable; its header is in the CUDA toolkit alone.
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;

template <class... Arguments>
using Call = int (*)(Arguments...);  // returns 0 where it succeeds

/// A function of the driver; null where it has none of that name.
template <class Function>
Function function(void* driver, const char* name) {
  return reinterpret_cast<Function>(dlsym(driver, name));
}

Gpu describe(void* driver, int device) {
  const auto name = function<Call<char*, int, int>>(driver, "cuDeviceGetName");
  const auto attribute = function<Call<int*, int, int>>(driver, "cuDeviceGetAttribute");
  std::array<char, 256> text{};
  if (name != nullptr) name(text.data(), static_cast<int>(text.size() - 1), device);
  int major = 0;
  int minor = 0;
  if (attribute != nullptr) {
    attribute(&major, kComputeCapabilityMajor, device);
    attribute(&minor, kComputeCapabilityMinor, device);
  }
  return {text.data(), std::to_string(major) + "." + std::to_string(minor)};
}

}  // namespace

std::vector<Gpu> gpus() {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);  // stays loaded: engines need it next
  if (driver == nullptr) return {};
  const auto start = function<Call<unsigned>>(driver, "cuInit");
  const auto count = function<Call<int*>>(driver, "cuDeviceGetCount");
  int devices = 0;
  if (start == nullptr || count == nullptr || start(0) != 0 || count(&devices) != 0) return {};
  std::vector<Gpu> found;
  for (int device = 0; device < devices; ++device) found.push_back(describe(driver, device));
  return found;
}

}  // namespace ztp
