#include "safetensors.h"

#include <limits>

#include "folder.h"
#include "json.h"

namespace ztp {
namespace {

using nlohmann::json;

constexpr std::size_t kPrefix = 8;

std::size_t width(const std::string& dtype) {
  if (dtype == "F32" || dtype == "I32") return 4;
  if (dtype == "U8") return 1;
  throw std::invalid_argument("unknown type " + dtype);
}

StoredTensor read_tensor(const json& entry, const std::string& data) {
  StoredTensor tensor;
  tensor.dtype = entry.at("dtype").get<std::string>();
  std::size_t bytes = width(tensor.dtype);
  for (const json& side : entry.at("shape")) {
    const auto length = side.get<std::size_t>();
    if (length != 0 && bytes > std::numeric_limits<std::size_t>::max() / length)
      throw std::invalid_argument("huge shape");
    bytes *= length;
    tensor.shape.push_back(length);
  }
  const auto begin = entry.at("data_offsets").at(0).get<std::size_t>();
  const auto end = entry.at("data_offsets").at(1).get<std::size_t>();
  if (begin > end || end > data.size() || end - begin != bytes) throw std::invalid_argument("offsets outside the file");
  tensor.bytes = data.substr(begin, bytes);
  return tensor;
}

StoredTensors parse(const std::string& text) {
  if (text.size() < kPrefix) throw std::invalid_argument("shorter than its prefix");
  std::size_t length = 0;
  for (std::size_t i = kPrefix; i > 0; --i) length = (length << 8U) | static_cast<unsigned char>(text[i - 1]);
  if (length > text.size() - kPrefix) throw std::invalid_argument("shorter than its header");
  const json header = parse_json(text.substr(kPrefix, length));
  const std::string data = text.substr(kPrefix + length);
  StoredTensors stored;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") {
      stored.metadata = entry.get<std::map<std::string, std::string>>();
    } else {
      stored.tensors[name] = read_tensor(entry, data);
    }
  }
  return stored;
}

}  // namespace

StoredTensors read_safetensors(const std::filesystem::path& path) {
  const std::string text = read_file(path);
  try {
    return parse(text);
  } catch (const std::exception&) {  // the reader's, nlohmann's and ours alike
    throw DamagedFiles(path.string() + " is not a whole safetensors file.", "Write it again with `ztp check`.");
  }
}

}  // namespace ztp
