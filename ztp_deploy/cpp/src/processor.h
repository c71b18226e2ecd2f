/// This machine's processor, as Python's `ztp_deploy.environment` tells it.
#pragma once

#include <set>
#include <string>
#include <vector>

namespace ztp {

/// The instruction sets of this processor; empty where the system does not tell.
std::set<std::string> processor_flags();

/// Throws MissingSoftware where this processor lacks instruction sets that an engine was compiled for: the process would
/// be killed by the first instruction that is not there.
void require_instructions(const std::vector<std::string>& flags);

/// The model's name, with family and model number where the name alone is vague, and what oneDNN is held to.
std::string processor_name();

}  // namespace ztp
