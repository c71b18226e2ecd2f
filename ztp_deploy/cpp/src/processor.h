/// What this machine's processor can do.
#pragma once

#include <string>
#include <vector>

namespace ztp {

/// Throws MissingSoftware where this processor lacks instruction sets that an engine was compiled for: the process would
/// be killed by the first instruction that is not there.
void require_instructions(const std::vector<std::string>& flags);

}  // namespace ztp
