#include "options.h"

#include <cmath>
#include <cstdlib>

#include "ztp/session.h"

namespace ztp::run {
namespace {

constexpr const char* kSeeHelp = "See `ztp-run --help`.";

double number(const std::string& option, const std::string& text, double least) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !std::isfinite(value) || value < least || value > 1e6) {
    throw BadRequest(option + " " + text + " is not a usable number.", kSeeHelp);
  }
  return value;
}

std::size_t whole(const std::string& option, const std::string& text) {
  const double value = number(option, text, 1);
  if (value != std::floor(value)) throw BadRequest(option + " " + text + " is not a whole number.", kSeeHelp);
  return static_cast<std::size_t>(value);
}

void check(const Options& options) {
  if (options.engine.empty()) throw BadRequest("No engine was given.", kSeeHelp);
  const bool alone = options.latency || options.selftest;
  if (options.latency && options.selftest) throw BadRequest("--latency and --selftest exclude each other.", kSeeHelp);
  if (alone && !options.images.empty()) {
    throw BadRequest("Images were given, which --latency and --selftest do not read.", kSeeHelp);
  }
  if (!alone && options.images.empty()) {
    throw BadRequest("No image was given.", "Give at least one, or --latency or --selftest.");
  }
  if (options.batch && !options.latency) throw BadRequest("--batch makes sense with --latency only.", kSeeHelp);
}

}  // namespace

const char* const kUsage =
    "Usage: ztp-run ENGINE IMAGE… [--top 5] [--json]\n"
    "       ztp-run ENGINE --latency [--batch N] [--seconds 10] [--json]\n"
    "       ztp-run ENGINE --selftest [--json]\n"
    "\n"
    "Runs an engine folder that `ztp engine` or `ztp build` made, without Python.\n"
    "\n"
    "  IMAGE       PNG, JPEG, BMP or 8-bit PNM; or raw tensors [count, 3, size, size], little-endian: .f32 "
    "(normalised), .u8\n"
    "  --top N     how many classes to show\n"
    "  --latency   time runs on noise: median, 90th percentile, images a second\n"
    "  --batch N   batch to time; the engine's optimal one by default\n"
    "  --seconds S how long to time\n"
    "  --selftest  repeat the run recorded in the engine folder, on this machine\n"
    "  --json      print one JSON object and nothing else\n"
    "\n"
    "Exit codes: 0 what was asked holds, 1 the self-test failed, 2 bad request or damaged files, 3 missing software.\n";

Options parse_options(const std::vector<std::string>& arguments) {
  Options options;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string& word = arguments[i];
    const auto value = [&]() -> const std::string& {
      if (i + 1 == arguments.size() || arguments[i + 1].rfind("--", 0) == 0)
        throw BadRequest(word + " needs a value.", kSeeHelp);
      return arguments[++i];
    };
    if (word == "--help" || word == "-h") {
      options.help = true;
      return options;
    }
    if (word == "--json") {
      options.json = true;
    } else if (word == "--latency") {
      options.latency = true;
    } else if (word == "--selftest") {
      options.selftest = true;
    } else if (word == "--top") {
      options.top = whole("--top", value());
    } else if (word == "--batch") {
      options.batch = whole("--batch", value());
    } else if (word == "--seconds") {
      options.seconds = number("--seconds", value(), 0.01);
    } else if (word.rfind("--", 0) == 0) {
      throw BadRequest("There is no option " + word + ".", kSeeHelp);
    } else if (options.engine.empty()) {
      options.engine = word;
    } else {
      options.images.push_back(word);
    }
  }
  check(options);
  return options;
}

}  // namespace ztp::run
