#include "picture.h"

#include <filesystem>
#include <memory>

#include "ztp/session.h"

// stb is compiled here, within one file, as its authors mean it to be used.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#define STB_IMAGE_STATIC
#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#define STBI_ONLY_BMP
#define STBI_ONLY_PNM
#include <stb_image.h>
#pragma GCC diagnostic pop

namespace ztp::run {

Picture read_picture(const std::string& path) {
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(path, ignored)) {
    throw BadRequest("There is no file " + path + ".", "Check the path.");
  }
  int width = 0;
  int height = 0;
  int channels = 0;
  const std::unique_ptr<stbi_uc, decltype(&stbi_image_free)> loaded(
      stbi_load(path.c_str(), &width, &height, &channels, 3), &stbi_image_free);
  if (loaded == nullptr) {
    throw BadRequest(path + " is no image ztp-run can read: " + stbi_failure_reason() + ".",
                     "Take it out, or convert it to PNG or JPEG.");
  }
  Picture picture;
  picture.width = static_cast<std::size_t>(width);
  picture.height = static_cast<std::size_t>(height);
  picture.pixels.assign(loaded.get(), loaded.get() + picture.width * picture.height * 3);
  return picture;
}

}  // namespace ztp::run
