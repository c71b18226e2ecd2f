/// Where libraries' messages go: the embedding program's log, see set_log.
#pragma once

#include <string>

#include "ztp/session.h"

namespace ztp {

/// Hands a message of `library` to the log. Nothing is thrown: libraries call it from their own threads.
void tell(Severity severity, const std::string& library, const char* message) noexcept;

/// Keeps the code that calls this in memory until the process ends, though what carries it (a plug-in) be unloaded.
///
/// For back ends whose library holds a function or an object of theirs for good.
void stay_loaded() noexcept;

}  // namespace ztp
