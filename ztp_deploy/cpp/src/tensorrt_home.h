/// Where a TensorRT plan may be opened: the GPU and the release that it was built for.
#pragma once

#include <string>

#include "folder.h"
#include "gpu.h"

namespace ztp {

/// Throws MissingSoftware, in Python's words, for a plan of another GPU or version than are here: the library
/// would say it worse, or crash. `title` is the library's name, `version` the one that is loaded.
void check_home(const EngineFolder& folder, const Gpu& here, const std::string& title, const std::string& version);

}  // namespace ztp
