#include "pnm.h"

#include "ztp/session.h"

namespace ztp::run {
namespace {

constexpr std::size_t kLargest = std::size_t{1} << 24U;  // a side's; stb's own limit
constexpr std::size_t kDepth = 255;

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw BadRequest(path + " is not an image that ztp-run can read: " + what + ".", "Take it out, or convert it to PNG or JPEG.");
}

bool is_space(char letter) { return std::string(" \t\n\v\f\r").find(letter) != std::string::npos; }

/// The numbers of a header, one after the other.
class Header {
 public:
  Header(const std::string& bytes, const std::string& path) : bytes_(bytes), path_(path) {}

  std::size_t number() {
    skip_spaces();
    const std::size_t first = at_;
    std::size_t value = 0;
    for (; at_ < bytes_.size() && bytes_[at_] >= '0' && bytes_[at_] <= '9'; ++at_) {
      value = 10 * value + static_cast<std::size_t>(bytes_[at_] - '0');
      if (value > kLargest) refuse(path_, "its header has a number above " + std::to_string(kLargest));
    }
    if (at_ == first) refuse(path_, "its header is damaged");
    return value;
  }

  /// Where the pixels begin: one space after the last number.
  std::size_t end() const {
    if (at_ >= bytes_.size() || !is_space(bytes_[at_])) refuse(path_, "its header is damaged");
    return at_ + 1;
  }

 private:
  /// Spaces, and comments to the ends of their lines.
  void skip_spaces() {
    for (bool comment = false; at_ < bytes_.size(); ++at_) {
      if (bytes_[at_] == '#') comment = true;
      if (!comment && !is_space(bytes_[at_])) return;
      if (bytes_[at_] == '\n' || bytes_[at_] == '\r') comment = false;
    }
  }

  const std::string& bytes_;
  const std::string& path_;
  std::size_t at_ = 2;
};

}  // namespace

bool is_pnm(const std::string& bytes) {
  return bytes.size() > 2 && bytes[0] == 'P' && (bytes[1] == '5' || bytes[1] == '6');
}

Picture read_pnm(const std::string& bytes, const std::string& path) {
  const std::size_t channels = bytes[1] == '5' ? 1 : 3;
  Header header(bytes, path);
  Picture picture;
  picture.width = header.number();
  picture.height = header.number();
  const std::size_t depth = header.number();
  if (depth != kDepth) {
    refuse(path, "its largest value is " + std::to_string(depth) + ", where " + std::to_string(kDepth) + " is read");
  }
  const std::size_t pixels = picture.width * picture.height;
  if (pixels == 0) refuse(path, "it has no pixels");
  const std::size_t start = header.end();
  if (bytes.size() - start < pixels * channels) refuse(path, "it is cut off");
  picture.pixels.reserve(pixels * 3);
  for (std::size_t i = 0; i < pixels * 3; ++i) {
    picture.pixels.push_back(static_cast<std::uint8_t>(bytes[start + i * channels / 3]));
  }
  return picture;
}

}  // namespace ztp::run
