#include "images.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

#include "files.h"
#include "resize.h"

namespace ztp::run {
namespace {

constexpr int kMostPixels = 1 << 28;  // of a resized picture: nearly a gigabyte

std::size_t values_of(const Manifest& manifest) { return 3 * manifest.size * manifest.size; }

/// uint8 [3, size, size] → what the model was trained on: (x / 255 − mean) / std.
void append_normalised(const std::uint8_t* pixels, const Manifest& manifest, std::vector<float>& to) {
  const std::size_t plane = manifest.size * manifest.size;
  for (std::size_t channel = 0; channel < 3; ++channel) {
    const float mean = manifest.preprocessing.mean[channel];
    const float deviation = manifest.preprocessing.std[channel];
    for (std::size_t i = 0; i < plane; ++i) {
      to.push_back((static_cast<float>(pixels[channel * plane + i]) / 255.0F - mean) / deviation);
    }
  }
}

void append(const std::vector<std::uint8_t>& pixels, const Manifest& manifest, Images& images) {
  if (manifest.dtype == "uint8") {
    images.pixels.insert(images.pixels.end(), pixels.begin(), pixels.end());
    return;
  }
  for (std::size_t i = 0; i < pixels.size(); i += values_of(manifest)) {
    append_normalised(pixels.data() + i, manifest, images.normalised);
  }
}

/// A raw file's bytes, how many images they are being checked.
std::vector<std::uint8_t> read_raw(const std::string& path, std::size_t image_bytes, std::size_t& count) {
  std::ifstream stream = open_file(path);
  std::vector<std::uint8_t> bytes{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  count = bytes.size() / image_bytes;
  if (bytes.empty() || bytes.size() % image_bytes != 0) {
    throw BadRequest(path + " has " + std::to_string(bytes.size()) + " bytes, an image of this engine " +
                         std::to_string(image_bytes) + ".",
                     "Give whole tensors [count, 3, size, size].");
  }
  return bytes;
}

void load_floats(const std::string& path, const Manifest& manifest, Images& images, std::size_t& count) {
  if (manifest.dtype != "float32") {
    throw BadRequest("This engine takes " + manifest.dtype + " images; " + path + " holds float32.",
                     "Give pictures, or raw pixels (.u8).");
  }
  const std::vector<std::uint8_t> bytes = read_raw(path, values_of(manifest) * sizeof(float), count);
  const std::size_t before = images.normalised.size();
  images.normalised.resize(before + bytes.size() / sizeof(float));
  std::memcpy(images.normalised.data() + before, bytes.data(), bytes.size());
}

template <class T>
Outputs run_padded(const Session& session, const std::vector<T>& values, std::size_t first, std::size_t count) {
  const std::size_t image = values_of(session.manifest());
  const std::size_t batch = std::max(count, session.manifest().batch.min);
  if (batch == count) return session.run(values.data() + first * image, count);
  const auto begin = values.begin() + static_cast<std::ptrdiff_t>(first * image);
  std::vector<T> padded(begin, begin + static_cast<std::ptrdiff_t>(count * image));
  const std::vector<T> last(padded.end() - static_cast<std::ptrdiff_t>(image), padded.end());
  while (padded.size() < batch * image) padded.insert(padded.end(), last.begin(), last.end());
  return session.run(padded.data(), batch);
}

}  // namespace

Images load_images(const Manifest& manifest, const std::vector<std::string>& paths) {
  Images images;
  for (const std::string& path : paths) {
    const std::string kind = std::filesystem::path(path).extension().string();
    std::size_t count = 1;
    if (kind == ".f32") {
      load_floats(path, manifest, images, count);
    } else if (kind == ".u8") {
      append(read_raw(path, values_of(manifest), count), manifest, images);
    } else {
      append(prepare(read_picture(path), manifest), manifest, images);
    }
    for (std::size_t i = 0; i < count; ++i) {
      images.names.push_back(count == 1 ? path : path + "[" + std::to_string(i) + "]");
    }
  }
  return images;
}

std::vector<std::uint8_t> prepare(const Picture& picture, const Manifest& manifest) {
  const Preprocessing& wanted = manifest.preprocessing;
  const bool squash = wanted.crop_mode == "squash";
  const bool known = wanted.crop_mode == "center" || squash;
  if (!known || !(wanted.crop_pct > 0) || wanted.crop_pct > 1) {
    const std::string how = known ? "to another share of their sides than 0 to 1" : "by '" + wanted.crop_mode + "'";
    throw BadRequest("The engine's pictures are cropped " + how + ", which ztp-run does not know.",
                     "Prepare them in Python and give raw tensors (.f32).");
  }
  const double exact = std::floor(static_cast<double>(manifest.size) / wanted.crop_pct);
  const auto [least, most] = std::minmax(picture.width, picture.height);
  const double stretch = squash ? 1 : static_cast<double>(most) / static_cast<double>(least);
  if (exact * exact * stretch > kMostPixels) {
    throw BadRequest("A picture of " + std::to_string(picture.width) + " × " + std::to_string(picture.height) +
                         " pixels would be resized to more than " + std::to_string(kMostPixels) + ".",
                     "Cut it closer to a square.");
  }
  const auto side = static_cast<std::size_t>(exact);
  const std::size_t shorter = squash ? 1 : least;
  const std::size_t width = squash ? side : side * picture.width / shorter;
  const std::size_t height = squash ? side : side * picture.height / shorter;
  const Picture cut = centre_crop(resize(picture, width, height, wanted.interpolation), manifest.size, manifest.size);
  std::vector<std::uint8_t> planes(cut.pixels.size());
  const std::size_t plane = manifest.size * manifest.size;
  for (std::size_t i = 0; i < plane; ++i) {
    for (std::size_t channel = 0; channel < 3; ++channel) planes[channel * plane + i] = cut.pixels[3 * i + channel];
  }
  return planes;
}

Outputs run_images(const Session& session, const Images& images, std::size_t first, std::size_t count) {
  if (session.manifest().dtype == "uint8") return run_padded(session, images.pixels, first, count);
  return run_padded(session, images.normalised, first, count);
}

}  // namespace ztp::run
