/// ztp-run: an engine folder on the command line, without Python.
#include <algorithm>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include "commands.h"
#include "options.h"
#include "report.h"
#include "ztp/session.h"

namespace {

using ztp::run::Options;

void run(const std::vector<std::string>& arguments) {
  const Options options = ztp::run::parse_options(arguments);
  if (options.help) {
    std::cout << ztp::run::kUsage;
    return;
  }
  const ztp::Session session(options.engine);
  ztp::run::print_warnings(session);
  if (options.selftest) {
    ztp::run::print_self_test(session.self_test(), options);
  } else if (options.latency) {
    ztp::run::measure_latency(session, options);
  } else {
    ztp::run::classify(session, options);
  }
}

void require_written() {
  if (std::cout.flush()) return;
  throw ztp::BadRequest("What was found could not be written to the standard output.", "Check where it goes.");
}

}  // namespace

int main(int count, char** words) {
  const std::vector<std::string> arguments(words + 1, words + count);
  const bool as_json = std::find(arguments.begin(), arguments.end(), "--json") != arguments.end();
  try {
    run(arguments);
    require_written();
    return 0;
  } catch (const ztp::Error& error) {
    ztp::run::print_refusal(error.problem(), error.fix(), error.exit_code(), as_json);
    return error.exit_code();
  } catch (const std::exception& error) {
    ztp::run::print_refusal(std::string("ztp-run failed: ") + error.what() + ".", "", 2, as_json);
    return 2;
  }
}
