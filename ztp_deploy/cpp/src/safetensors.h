/// Reads small safetensors files: a length, a JSON header, then the tensors' bytes, little-endian.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace ztp {

/// One tensor's type in the format's words (F32, I32, U8), shape and bytes.
struct StoredTensor {
  std::string dtype;
  std::vector<std::size_t> shape;
  std::string bytes;

  /// The values, copied so that they are aligned; the caller has checked dtype.
  template <class T>
  std::vector<T> values() const;
};

/// Tensors and metadata by name.
struct StoredTensors {
  std::map<std::string, StoredTensor> tensors;
  std::map<std::string, std::string> metadata;
};

/// Throws DamagedFiles for anything that is not a whole safetensors file.
StoredTensors read_safetensors(const std::filesystem::path& path);

}  // namespace ztp

#include <cstring>

template <class T>
std::vector<T> ztp::StoredTensor::values() const {
  std::vector<T> copied(bytes.size() / sizeof(T));
  if (!copied.empty()) std::memcpy(copied.data(), bytes.data(), copied.size() * sizeof(T));
  return copied;
}
