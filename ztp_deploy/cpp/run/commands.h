/// What ztp-run can be asked for; each prints its result.
#pragma once

#include "options.h"
#include "ztp/session.h"

namespace ztp::run {

void classify(const Session& session, const Options& options);
void measure_latency(const Session& session, const Options& options);

}  // namespace ztp::run
