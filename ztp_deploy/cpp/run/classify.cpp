#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "commands.h"
#include "images.h"
#include "report.h"

namespace ztp::run {
namespace {

/// The most probable classes by softmax; equals come in the order of their numbers.
std::vector<Guess> best(const float* logits, std::size_t classes, std::size_t top) {
  const double largest = static_cast<double>(*std::max_element(logits, logits + classes));
  std::vector<double> shares(classes);
  for (std::size_t i = 0; i < classes; ++i) shares[i] = std::exp(static_cast<double>(logits[i]) - largest);
  const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
  std::vector<std::size_t> order(classes);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return shares[a] > shares[b]; });
  std::vector<Guess> guesses;
  for (std::size_t i = 0; i < std::min(top, classes); ++i) guesses.push_back({order[i], shares[order[i]] / sum});
  return guesses;
}

}  // namespace

void classify(const Session& session, const Options& options) {
  const Manifest& manifest = session.manifest();
  const Images images = load_images(manifest, options.images);
  std::vector<Classified> found;
  for (std::size_t first = 0; first < images.names.size(); first += manifest.batch.max) {
    const std::size_t count = std::min(manifest.batch.max, images.names.size() - first);
    const Outputs outputs = run_images(session, images, first, count);
    for (std::size_t i = 0; i < count; ++i) {
      const float* logits = outputs.logits.data() + i * outputs.classes;
      found.push_back({images.names[first + i], best(logits, outputs.classes, options.top)});
    }
  }
  print_classified(manifest, found, options);
}

}  // namespace ztp::run
