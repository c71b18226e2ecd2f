/// What an engine gives reason to say though it opens: Python's warnings in Python's words, and the C++ runtime's own.
#pragma once

#include <string>
#include <vector>

#include "folder.h"

namespace ztp {

/// `version` is that of the library that opened it; empty where it does not say one.
std::vector<Warning> warnings_of(const EngineFolder& folder, const std::string& version);

}  // namespace ztp
