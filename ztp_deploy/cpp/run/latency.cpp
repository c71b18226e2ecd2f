#include <algorithm>
#include <chrono>
#include <random>
#include <string>
#include <vector>

#include "commands.h"
#include "images.h"
#include "report.h"

namespace ztp::run {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kWarmUpSeconds = 0.4;
constexpr std::size_t kFewestRuns = 5;

/// Noise, the same on every machine: latency does not depend on what is seen.
Images noise(const Manifest& manifest, std::size_t batch) {
  std::mt19937 generator(0);
  Images images;
  images.names.assign(batch, "noise");
  const std::size_t values = batch * 3 * manifest.size * manifest.size;
  for (std::size_t i = 0; i < values; ++i) {
    const auto byte = static_cast<std::uint8_t>(generator() >> 24U);
    if (manifest.dtype == "uint8") {
      images.pixels.push_back(byte);
    } else {
      images.normalised.push_back((static_cast<float>(byte) - 127.5F) / 64.0F);
    }
  }
  return images;
}

/// Wall times of single runs in milliseconds, for about `seconds`.
std::vector<double> time_runs(const Session& session, const Images& images, double seconds) {
  std::vector<double> milliseconds;
  const auto start = Clock::now();
  while (true) {
    const auto before = Clock::now();
    run_images(session, images, 0, images.names.size());
    const auto after = Clock::now();
    milliseconds.push_back(std::chrono::duration<double, std::milli>(after - before).count());
    if (std::chrono::duration<double>(after - start).count() >= seconds && milliseconds.size() >= kFewestRuns) break;
  }
  return milliseconds;
}

/// A percentile by linear interpolation between sorted values.
double percentile(const std::vector<double>& sorted, double share) {
  const double place = share * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (place - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

}  // namespace

void measure_latency(const Session& session, const Options& options) {
  const std::size_t batch = options.batch.value_or(session.manifest().batch.opt);
  if (batch < session.manifest().batch.min || batch > session.manifest().batch.max) {
    const std::string span =
        std::to_string(session.manifest().batch.min) + " to " + std::to_string(session.manifest().batch.max);
    throw BadRequest("A batch of " + std::to_string(batch) + " is outside this engine's range " + span + ".",
                     "Measure another batch, or build with a wider range.");
  }
  const Images images = noise(session.manifest(), batch);
  time_runs(session, images, kWarmUpSeconds);
  std::vector<double> times = time_runs(session, images, options.seconds);
  std::sort(times.begin(), times.end());
  print_latency({batch, times.size(), percentile(times, 0.5), percentile(times, 0.9)}, options);
}

}  // namespace ztp::run
