#include "configuration.h"

#include <algorithm>

namespace ztp::triton {
namespace {

using nlohmann::json;

json tensor(const std::string& name, TRITONSERVER_DataType type, const std::vector<std::size_t>& dims) {
  const char* word = type == TRITONSERVER_TYPE_FP32    ? "TYPE_FP32"
                     : type == TRITONSERVER_TYPE_INT32 ? "TYPE_INT32"
                                                       : "TYPE_UINT8";
  return {{"name", name}, {"data_type", word}, {"dims", dims}};
}

json input_of(const Manifest& manifest) {
  return json::array({tensor(kInput, pixel_type(manifest), {3, manifest.size, manifest.size})});
}

json outputs_of(const std::vector<Rows>& outputs) {
  json tensors = json::array();
  for (const Rows& rows : outputs) tensors.push_back(tensor(rows.name, rows.type, {rows.columns}));
  return tensors;
}

bool empty(const json& configuration, const char* key) {
  return !configuration.contains(key) || configuration.at(key).empty();
}

/// Triton writes integers of 64 bits as numbers or, as protobuf does, as text.
std::int64_t integer(const json& value) {
  return value.is_string() ? std::stoll(value.get<std::string>()) : value.get<std::int64_t>();
}

std::int64_t max_batch_size(const json& configuration) {
  return configuration.contains("max_batch_size") ? integer(configuration.at("max_batch_size")) : 0;
}

/// "images TYPE_FP32 [3, 224, 224]"
std::string shown(const json& entry) {
  std::string dims;
  for (const json& dim : entry.at("dims")) dims += (dims.empty() ? "" : ", ") + std::to_string(integer(dim));
  return entry.at("name").get<std::string>() + " " + entry.at("data_type").get<std::string>() + " [" + dims + "]";
}

/// Every entry given must be one of the engine's; -1 stands for any size.
void check_tensors(const json& given, const json& known, const char* kind) {
  for (const json& entry : given) {
    const bool right = std::any_of(known.begin(), known.end(), [&](const json& ours) {
      const json& dims = entry.at("dims");
      return entry.at("name") == ours.at("name") && entry.at("data_type") == ours.at("data_type") &&
             std::equal(dims.begin(), dims.end(), ours.at("dims").begin(), ours.at("dims").end(),
                        [](const json& a, const json& b) { return integer(a) == -1 || integer(a) == integer(b); });
    });
    if (right) continue;
    std::string names;
    for (const json& ours : known) names += (names.empty() ? "" : ", ") + shown(ours);
    throw BadRequest("config.pbtxt names the " + std::string(kind) + " " + shown(entry) + "; this engine has " + names +
                         ".",
                     "Leave inputs and outputs out: they are filled in from the engine.");
  }
}

}  // namespace

SelfTestWish self_test_wish(const json& configuration) {
  if (empty(configuration, "parameters") || !configuration.at("parameters").contains("self_test")) {
    return SelfTestWish::if_recorded;
  }
  const auto word = configuration.at("parameters").at("self_test").at("string_value").get<std::string>();
  if (word == "if_recorded") return SelfTestWish::if_recorded;
  if (word == "required") return SelfTestWish::required;
  if (word == "off") return SelfTestWish::off;
  throw BadRequest("The parameter self_test in config.pbtxt is \"" + word + "\".",
                   "Choose if_recorded, which is the default, required or off.");
}

json completed(json configuration, const Manifest& manifest, const std::vector<Rows>& outputs) {
  if (max_batch_size(configuration) == 0) {
    configuration["max_batch_size"] = manifest.batch.max;
    const bool chosen = configuration.contains("dynamic_batching") || configuration.contains("sequence_batching");
    if (manifest.batch.max > 1 && !chosen) configuration["dynamic_batching"] = json::object();
  }
  if (empty(configuration, "input")) configuration["input"] = input_of(manifest);
  if (empty(configuration, "output")) configuration["output"] = outputs_of(outputs);
  if (empty(configuration, "instance_group")) {
    json group = {{"count", 1}, {"kind", manifest.device == "cuda" ? "KIND_GPU" : "KIND_CPU"}};
    if (manifest.device == "cuda") group["gpus"] = {0};
    configuration["instance_group"] = json::array({group});
  }
  return configuration;
}

void check(const json& configuration, const Manifest& manifest, const std::vector<Rows>& outputs) {
  const std::int64_t largest = max_batch_size(configuration);
  const auto most = static_cast<std::int64_t>(manifest.batch.max);
  if (largest < 1 || largest > most) {
    throw BadRequest("max_batch_size in config.pbtxt is " + std::to_string(largest) +
                         "; this engine takes batches of " + std::to_string(manifest.batch.min) + " to " +
                         std::to_string(most) + ".",
                     "Leave it out, or write " + std::to_string(most) + " or less.");
  }
  check_tensors(configuration.at("input"), input_of(manifest), "input");
  check_tensors(configuration.at("output"), outputs_of(outputs), "output");
}

}  // namespace ztp::triton
