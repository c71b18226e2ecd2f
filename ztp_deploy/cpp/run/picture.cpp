#include "picture.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <memory>

#include "files.h"
#include "pnm.h"
#include "ztp/session.h"

// stb is compiled here, within one file, as its authors mean it to be used.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#define STB_IMAGE_STATIC
#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#define STBI_ONLY_BMP
#include <stb_image.h>
#pragma GCC diagnostic pop

namespace ztp::run {
namespace {

/// A file as stb asks for it, which takes bytes past the end for zeros: that it asked for some is noted.
struct Source {
  const std::string& bytes;
  std::size_t at = 0;
  bool cut_off = false;

  static int read(void* user, char* to, int wanted) {
    Source& source = *static_cast<Source*>(user);
    const std::size_t count = std::min(static_cast<std::size_t>(wanted), source.bytes.size() - source.at);
    std::memcpy(to, source.bytes.data() + source.at, count);
    source.at += count;
    source.cut_off = source.cut_off || count == 0;
    return static_cast<int>(count);
  }

  static void skip(void* user, int count) {
    Source& source = *static_cast<Source*>(user);
    const auto target = static_cast<std::int64_t>(source.at) + count;
    source.at = std::min(static_cast<std::size_t>(std::max<std::int64_t>(target, 0)), source.bytes.size());
  }

  static int at_end(void* user) {
    const Source& source = *static_cast<Source*>(user);
    return source.at == source.bytes.size() ? 1 : 0;
  }
};

/// Whether a JPEG has a Huffman table of more than 256 codes, which stb before 2.28 writes past its own memory.
///
/// Every DHT marker counts, wherever it stands: stb finds markers in ways of its own where a file is damaged.
bool has_overfull_table(const std::string& bytes) {
  if (bytes.empty() || bytes[0] != '\xFF') return false;
  const auto byte = [&](std::size_t at) -> std::size_t {
    return at < bytes.size() ? static_cast<unsigned char>(bytes[at]) : 0;
  };
  for (std::size_t at = bytes.find("\xFF\xC4"); at != std::string::npos; at = bytes.find("\xFF\xC4", at + 1)) {
    const std::size_t end = at + 2 + (byte(at + 2) << 8U | byte(at + 3));
    for (std::size_t table = at + 4; table < end && byte(table) >> 4U <= 1 && (byte(table) & 15U) <= 3;) {
      std::size_t codes = 0;
      for (std::size_t length = 1; length <= 16; ++length) codes += byte(table + length);
      if (codes > 256) return true;
      table += 17 + codes;
    }
  }
  return false;
}

Picture decode(const std::string& bytes, const std::string& path) {
  const auto refuse = [&](const std::string& reason) {
    throw BadRequest(path + " is not an image that ztp-run can read: " + reason + ".",
                     "Take it out, or convert it to PNG or JPEG.");
  };
  if (has_overfull_table(bytes)) refuse("it has a Huffman table of more than 256 codes");
  Source source{bytes};
  const stbi_io_callbacks calls{Source::read, Source::skip, Source::at_end};
  int width = 0;
  int height = 0;
  int channels = 0;
  const std::unique_ptr<stbi_uc, decltype(&stbi_image_free)> loaded(
      stbi_load_from_callbacks(&calls, &source, &width, &height, &channels, 3), &stbi_image_free);
  if (loaded == nullptr || source.cut_off) refuse(source.cut_off ? "it is cut off" : stbi_failure_reason());
  Picture picture;
  picture.width = static_cast<std::size_t>(width);
  picture.height = static_cast<std::size_t>(height);
  picture.pixels.assign(loaded.get(), loaded.get() + picture.width * picture.height * 3);
  return picture;
}

}  // namespace

Picture read_picture(const std::string& path) {
  std::ifstream stream = open_file(path);
  const std::string bytes{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  return is_pnm(bytes) ? read_pnm(bytes, path) : decode(bytes, path);
}

}  // namespace ztp::run
