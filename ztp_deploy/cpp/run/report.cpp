#include "report.h"

#include <iomanip>
#include <iostream>
#include <nlohmann/json.hpp>

namespace ztp::run {
namespace {

using nlohmann::json;

void print(const json& value) {
  // Paths need not be UTF-8; JSON must be.
  std::cout << value.dump(2, ' ', false, json::error_handler_t::replace) << '\n';
}

json as_json(const Classified& entry, const std::vector<std::string>& labels) {
  json top = json::array();
  for (const Guess& guess : entry.top) {
    const json name = guess.index < labels.size() ? json(labels[guess.index]) : json();
    top.push_back({{"class", guess.index}, {"name", name}, {"probability", guess.probability}});
  }
  return {{"image", entry.image}, {"top", top}};
}

void show(const Classified& entry, const std::vector<std::string>& labels) {
  std::cout << entry.image << '\n' << std::fixed << std::setprecision(2);
  for (const Guess& guess : entry.top) {
    const bool named = guess.index < labels.size();
    std::cout << std::setw(7) << guess.probability * 100 << " %  "
              << (named ? labels[guess.index] : "class " + std::to_string(guess.index)) << '\n';
  }
}

}  // namespace

void print_classified(const Manifest& manifest, const std::vector<Classified>& found, const Options& options) {
  if (options.json) {
    json images = json::array();
    for (const Classified& entry : found) images.push_back(as_json(entry, manifest.labels));
    print({{"engine", options.engine}, {"random_weights", manifest.random_weights}, {"images", images}});
    return;
  }
  if (manifest.random_weights) std::cerr << "This engine has random weights: the names below mean nothing.\n";
  for (const Classified& entry : found) show(entry, manifest.labels);
}

void print_latency(const Latency& latency, const Options& options) {
  const double rate = 1000 * static_cast<double>(latency.batch) / latency.median;
  if (options.json) {
    print({{"engine", options.engine},
           {"batch", latency.batch},
           {"runs", latency.runs},
           {"median_ms", latency.median},
           {"p90_ms", latency.p90},
           {"images_per_second", rate}});
    return;
  }
  std::cout << std::fixed << std::setprecision(3) << "batch " << latency.batch << ": median " << latency.median
            << " ms, p90 " << latency.p90 << " ms, " << std::setprecision(1) << rate << " images/s (" << latency.runs
            << " runs)\n";
}

void print_self_test(const SelfTest& found, const Options& options) {
  if (options.json) {
    print({{"engine", options.engine}, {"images", found.images}, {"worst_logit", found.worst_logit}});
    return;
  }
  std::cout << "Self-test holds: " << found.images << " images, the same tokens kept, logits within "
            << std::setprecision(2) << found.worst_logit << " σ.\n";
}

void print_warnings(const Session& session) {
  for (const Warning& warning : session.warnings()) std::cerr << "note: " << warning.text << '\n';
}

void print_refusal(const std::string& problem, const std::string& fix, int exit_code, bool as_json) {
  if (as_json) {
    print({{"error", {{"problem", problem}, {"fix", fix}, {"exit_code", exit_code}}}});
  } else {
    std::cerr << "error: " << problem << (fix.empty() ? "" : " ") << fix << '\n';
  }
}

}  // namespace ztp::run
