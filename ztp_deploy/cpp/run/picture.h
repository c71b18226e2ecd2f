/// Pictures in memory: 8-bit RGB, interleaved, rows from the top.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ztp::run {

struct Picture {
  std::size_t width = 0;
  std::size_t height = 0;
  std::vector<std::uint8_t> pixels;  // [height, width, 3]
};

/// Reads PNG, JPEG, BMP, or PNM of 8 bits (P5, P6). As in Python, EXIF rotation is not applied and transparency is dropped.
/// Throws BadRequest for what is not a readable picture, or a part of one.
Picture read_picture(const std::string& path);

}  // namespace ztp::run
