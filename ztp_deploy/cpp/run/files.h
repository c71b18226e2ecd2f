/// Files that were given.
#pragma once

#include <filesystem>
#include <fstream>
#include <string>

#include "ztp/session.h"

namespace ztp::run {

/// A file that was given, open. Throws BadRequest for a folder and for what is not there.
inline std::ifstream open_file(const std::string& path) {
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) {
    throw BadRequest(path + " is a folder, not a file.", "Give the images in it, such as " + path + "/*.jpg.");
  }
  std::ifstream stream(path, std::ios::binary);
  if (!std::filesystem::is_regular_file(path, ignored) || !stream) {
    throw BadRequest("There is no file " + path + ".", "Check the path.");
  }
  return stream;
}

}  // namespace ztp::run
