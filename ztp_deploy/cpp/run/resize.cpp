#include "resize.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "ztp/session.h"

namespace ztp::run {
namespace {

constexpr double kPi = 3.14159265358979323846;
// Weights are whole multiples of 2^-22: 8 bits of pixel and a sum a little over 1 leave room in 32 bits.
constexpr int kFraction = 22;

/// A reconstruction filter: weight by distance, zero from `support` on.
struct Filter {
  double support;
  std::function<double(double)> weight;
};

/// Keys' cubic convolution with a = −1/2, the choice that reproduces parabolas.
double cubic(double distance) {
  const double x = std::abs(distance);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  if (x < 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
  return 0;
}

double sinc(double x) { return x == 0 ? 1 : std::sin(kPi * x) / (kPi * x); }

Filter filter_named(const std::string& name) {
  if (name == "bilinear") return {1, [](double x) { return std::max(0.0, 1 - std::abs(x)); }};
  if (name == "bicubic") return {2, cubic};
  if (name == "lanczos") return {3, [](double x) { return std::abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0; }};
  throw BadRequest("The engine's pictures are resized with '" + name + "', which ztp-run does not know.",
                   "Prepare them in Python and give raw tensors (.f32).");
}

/// What one output position reads: weights of `first`, `first` + 1, …
struct Taps {
  std::size_t first = 0;
  std::vector<std::int32_t> weights;
};

std::vector<Taps> taps_for(std::size_t input, std::size_t output, const Filter& filter) {
  const double ratio = static_cast<double>(input) / static_cast<double>(output);
  const double stretch = std::max(ratio, 1.0);
  const double reach = filter.support * stretch;
  std::vector<Taps> all(output);
  for (std::size_t position = 0; position < output; ++position) {
    const double centre = (static_cast<double>(position) + 0.5) * ratio;
    const auto first = static_cast<std::size_t>(std::max(0.0, std::floor(centre - reach + 0.5)));
    const auto last = std::min(input, static_cast<std::size_t>(centre + reach + 0.5));
    std::vector<double> weights;
    double sum = 0;
    for (std::size_t i = first; i < last; ++i) {
      weights.push_back(filter.weight((static_cast<double>(i) + 0.5 - centre) / stretch));
      sum += weights.back();
    }
    all[position].first = first;
    for (const double weight : weights) {
      all[position].weights.push_back(static_cast<std::int32_t>(std::lround(std::ldexp(weight / sum, kFraction))));
    }
  }
  return all;
}

std::uint8_t rounded(std::int32_t sum) {
  return static_cast<std::uint8_t>(std::clamp((sum + (1 << (kFraction - 1))) >> kFraction, 0, 255));
}

/// Filters along one axis: `lines` runs side by side, whose values lie `step` apart.
struct Axis {
  std::size_t step;  // between neighbours along the axis
  std::size_t lines;
  std::size_t input_jump;   // between lines of the source
  std::size_t output_jump;  // between lines of the result
};

void filter_lines(const std::uint8_t* source, std::uint8_t* result, const std::vector<Taps>& taps, const Axis& axis) {
  for (std::size_t line = 0; line < axis.lines; ++line) {
    for (std::size_t position = 0; position < taps.size(); ++position) {
      const Taps& tap = taps[position];
      const std::uint8_t* next = source + line * axis.input_jump + tap.first * axis.step;
      std::uint8_t* out = result + line * axis.output_jump + position * axis.step;
      for (std::size_t channel = 0; channel < 3; ++channel) {
        std::int32_t sum = 0;
        for (std::size_t i = 0; i < tap.weights.size(); ++i) sum += tap.weights[i] * next[i * axis.step + channel];
        out[channel] = rounded(sum);
      }
    }
  }
}

Picture resize_rows(const Picture& picture, std::size_t width, const Filter& filter) {
  if (width == picture.width) return picture;
  Picture result{width, picture.height, std::vector<std::uint8_t>(width * picture.height * 3)};
  const Axis axis{3, picture.height, picture.width * 3, width * 3};
  filter_lines(picture.pixels.data(), result.pixels.data(), taps_for(picture.width, width, filter), axis);
  return result;
}

Picture resize_columns(const Picture& picture, std::size_t height, const Filter& filter) {
  if (height == picture.height) return picture;
  Picture result{picture.width, height, std::vector<std::uint8_t>(picture.width * height * 3)};
  const Axis axis{picture.width * 3, picture.width, 3, 3};
  filter_lines(picture.pixels.data(), result.pixels.data(), taps_for(picture.height, height, filter), axis);
  return result;
}

/// Half of a border, a half pixel going to the even side.
std::size_t half(std::size_t border) {
  return static_cast<std::size_t>(std::nearbyint(static_cast<double>(border) / 2));
}

}  // namespace

Picture resize(const Picture& picture, std::size_t width, std::size_t height, const std::string& filter) {
  const Filter chosen = filter_named(filter);
  return resize_columns(resize_rows(picture, width, chosen), height, chosen);
}

Picture centre_crop(const Picture& picture, std::size_t width, std::size_t height) {
  const std::size_t left = half(picture.width - width);
  const std::size_t top = half(picture.height - height);
  Picture result{width, height, {}};
  result.pixels.reserve(width * height * 3);
  for (std::size_t row = top; row < top + height; ++row) {
    const auto begin = picture.pixels.begin() + static_cast<std::ptrdiff_t>((row * picture.width + left) * 3);
    result.pixels.insert(result.pixels.end(), begin, begin + static_cast<std::ptrdiff_t>(width * 3));
  }
  return result;
}

}  // namespace ztp::run
