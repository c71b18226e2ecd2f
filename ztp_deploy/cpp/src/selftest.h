/// The recorded run that travels with an engine, repeated.
#pragma once

#include <filesystem>

#include "ztp/session.h"

namespace ztp {

/// Runs the recorded images and holds logits and kept tokens against the record; see Session::self_test.
SelfTest repeat_recorded_run(const Session& session, const std::filesystem::path& directory);

}  // namespace ztp
