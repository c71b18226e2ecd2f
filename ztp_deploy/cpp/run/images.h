/// Files as the input an engine takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "picture.h"
#include "ztp/session.h"

namespace ztp::run {

/// Images of one engine's type and size, one after the other; a raw file may hold several.
struct Images {
  std::vector<std::string> names;
  std::vector<float> normalised;     // [count, 3, size, size] for float32 engines, else empty
  std::vector<std::uint8_t> pixels;  // the same for uint8 engines
};

/// Pictures are resized, cropped and normalised as the manifest says; raw tensors are taken as they are:
/// `.f32` normalised float32, `.u8` pixels of the engine's size, both little-endian [count, 3, size, size].
/// Throws BadRequest for what can be neither.
Images load_images(const Manifest& manifest, const std::vector<std::string>& paths);

/// A picture cut to size: [3, size, size], what a uint8 engine takes. Throws BadRequest.
std::vector<std::uint8_t> prepare(const Picture& picture, const Manifest& manifest);

/// Runs images [first, first + count), repeating the last one where the engine's smallest batch is larger.
Outputs run_images(const Session& session, const Images& images, std::size_t first, std::size_t count);

}  // namespace ztp::run
