/// The command line of ztp-run.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

namespace ztp::run {

extern const char* const kUsage;

struct Options {
  std::string engine;
  std::vector<std::string> images;
  std::size_t top = 5;
  std::optional<std::size_t> batch;
  double seconds = 10;
  bool latency = false;
  bool selftest = false;
  bool json = false;
  bool help = false;
};

/// Throws BadRequest for what cannot be meant.
Options parse_options(const std::vector<std::string>& arguments);

}  // namespace ztp::run
