#include "log.h"

#include <dlfcn.h>

#include <iostream>
#include <mutex>
#include <shared_mutex>

namespace ztp {
namespace {

struct Shared {
  std::shared_mutex mutex;  // held by whoever is telling, so that a log that was replaced is not in use any more
  Log log;
};

/// Never destroyed: libraries' threads may still tell something when the process ends.
Shared& shared() {
  static auto* const kept = new Shared;
  return *kept;
}

}  // namespace

void set_log(Log log) {
  Shared& kept = shared();
  const std::unique_lock<std::shared_mutex> lock(kept.mutex);
  kept.log.swap(log);
}

void tell(Severity severity, const std::string& library, const char* message) noexcept {
  try {
    const std::string sentence = library + ": " + message;
    Shared& kept = shared();
    const std::shared_lock<std::shared_mutex> lock(kept.mutex);
    if (kept.log) {
      kept.log(severity, sentence);
    } else if (severity == Severity::error) {
      std::cerr << sentence + "\n";
    }
  } catch (...) {  // a log that fails must not end a library's thread, and with it the process
  }
}

void stay_loaded() noexcept {
  Dl_info here{};
  if (dladdr(reinterpret_cast<const void*>(&stay_loaded), &here) == 0) return;
  dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);  // of the program itself nothing comes, nor is needed
}

}  // namespace ztp
