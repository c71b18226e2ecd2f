/// Netpbm's grey (P5) and colour (P6) pictures of 8 bits, which stb reads past their ends.
#pragma once

#include <string>

#include "picture.h"

namespace ztp::run {

/// Whether a file's bytes say that they are P5 or P6.
bool is_pnm(const std::string& bytes);

/// The picture; what follows it is left alone. Throws BadRequest, naming `path`, for another depth or too few bytes.
Picture read_pnm(const std::string& bytes, const std::string& path);

}  // namespace ztp::run
