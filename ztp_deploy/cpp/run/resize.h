/// Resizing as Pillow does it, on which the models' own preprocessing rests.
#pragma once

#include <string>

#include "picture.h"

namespace ztp::run {

/// Resamples with antialiasing: a separable filter ("bilinear", "bicubic" or "lanczos") whose support grows with
/// the reduction, rows first, each pass rounded to 8 bits. Throws BadRequest for another filter.
Picture resize(const Picture& picture, std::size_t width, std::size_t height, const std::string& filter);

/// The middle of a picture that is at least as large; odd borders are split as Python's round does it.
Picture centre_crop(const Picture& picture, std::size_t width, std::size_t height);

}  // namespace ztp::run
