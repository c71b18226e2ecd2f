/// What ztp-run prints: lines to read, or one JSON object with --json.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "options.h"
#include "ztp/session.h"

namespace ztp::run {

/// A class and its share of the softmax.
struct Guess {
  std::size_t index;
  double probability;
};

/// An image and its best classes, best first.
struct Classified {
  std::string image;
  std::vector<Guess> top;
};

/// Wall times of `runs` runs, in milliseconds a batch.
struct Latency {
  std::size_t batch;
  std::size_t runs;
  double median;
  double p90;
};

/// The JSON is that of `ztp classify --json`.
void print_classified(const Manifest& manifest, const std::vector<Classified>& found, const Options& options);
void print_latency(const Latency& latency, const Options& options);
void print_self_test(const SelfTest& found, const Options& options);

/// To stderr, as `ztp` does with and without --json.
void print_warnings(const Session& session);

/// To stderr; as JSON to stdout, in the form of `ztp --json`.
void print_refusal(const std::string& problem, const std::string& fix, int exit_code, bool as_json);

}  // namespace ztp::run
