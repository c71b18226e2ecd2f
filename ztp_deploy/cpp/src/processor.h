/// This machine's processor, as Python's `ztp_deploy.environment` tells it.
#pragma once

#include <set>
#include <string>

namespace ztp {

/// The instruction sets of this processor; empty where the system does not tell.
std::set<std::string> processor_flags();

/// The model's name, with family and model number where the name alone is vague, and what oneDNN is held to.
std::string processor_name();

}  // namespace ztp
