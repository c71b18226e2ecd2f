/// SHA-256 of files (FIPS 180-4), so that the runtime needs no cryptography library.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace ztp {

/// A running hash: update() any number of times, then hex() once.
class Sha256 {
 public:
  void update(const void* data, std::size_t bytes);

  /// The digest as 64 lower-case hexadecimal digits; ends the hash.
  std::string hex();

 private:
  void compress(const std::uint8_t* block);

  std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::uint8_t, 64> pending_{};
  std::size_t filled_ = 0;
  std::uint64_t bytes_ = 0;
};

/// The digest of a text.
std::string sha256_of_text(const std::string& text);

}  // namespace ztp
