#include "model.h"

#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>

#include "answer.h"
#include "configuration.h"
#include "tensors.h"

namespace ztp::triton {
namespace {

using nlohmann::json;
using Message = std::unique_ptr<TRITONSERVER_Message, void (*)(TRITONSERVER_Message*)>;

constexpr std::uint32_t kConfigVersion = 1;

Message owned(TRITONSERVER_Message* message) {
  return {message, [](TRITONSERVER_Message* done) { TRITONSERVER_ErrorDelete(TRITONSERVER_MessageDelete(done)); }};
}

std::string engine_folder(TRITONBACKEND_Model* model) {
  TRITONBACKEND_ArtifactType kind{};
  const char* place = nullptr;
  std::uint64_t version = 0;
  require(TRITONBACKEND_ModelRepository(model, &kind, &place));
  require(TRITONBACKEND_ModelVersion(model, &version));
  return (std::filesystem::path(place) / std::to_string(version)).string();
}

json configuration_of(TRITONBACKEND_Model* model) {
  TRITONSERVER_Message* message = nullptr;
  require(TRITONBACKEND_ModelConfig(model, kConfigVersion, &message));
  const Message keep = owned(message);
  const char* text = nullptr;
  std::size_t bytes = 0;
  require(TRITONSERVER_MessageSerializeToJson(message, &text, &bytes));
  return json::parse(text, text + bytes);
}

void set_configuration(TRITONBACKEND_Model* model, const json& configuration) {
  const std::string text = configuration.dump();
  TRITONSERVER_Message* message = nullptr;
  require(TRITONSERVER_MessageNewFromSerializedJson(&message, text.data(), text.size()));
  const Message keep = owned(message);
  require(TRITONBACKEND_ModelSetConfig(model, kConfigVersion, message));
}

/// A run of black images: it tells the outputs' shapes, and the first client does not wait for what a library puts off.
Outputs first_run(const Session& session) {
  const Manifest& manifest = session.manifest();
  const std::vector<std::uint8_t> black(manifest.batch.opt * image_bytes(manifest));
  return run(session, black.data(), manifest.batch.opt);
}

/// What was proved, in a sentence.
std::string repeated_run(const Session& session, const std::string& folder, SelfTestWish wish) {
  const bool recorded = std::filesystem::exists(std::filesystem::path(folder) / "evidence" / "selftest.safetensors");
  if (wish == SelfTestWish::off) return "its self-test is switched off";
  if (wish == SelfTestWish::if_recorded && !recorded) return "no self-test was recorded with it";
  const SelfTest done = session.self_test();
  char worst[16];
  std::snprintf(worst, sizeof worst, "%.1e", done.worst_logit);
  return "its self-test of " + std::to_string(done.images) + " images holds here: the same tokens, logits within " +
         worst + " of an image's logit σ";
}

}  // namespace

Model::Model(TRITONBACKEND_Model* model) : session_(engine_folder(model)) {
  const Manifest& manifest = session_.manifest();
  const std::string folder = engine_folder(model);
  // First: what is said here may be why the rest does not hold.
  for (const Warning& warning : session_.warnings()) log(TRITONSERVER_LOG_WARN, warning.text);
  json configuration = configuration_of(model);
  const std::string proof = repeated_run(session_, folder, self_test_wish(configuration));
  const Outputs outputs = first_run(session_);
  const std::vector<Rows> rows = rows_of(outputs);
  bool open = false;
  require(TRITONBACKEND_ModelAutoCompleteConfig(model, &open));
  if (open) configuration = completed(std::move(configuration), manifest, rows);
  check(configuration, manifest, rows);
  if (open) set_configuration(model, configuration);
  log(TRITONSERVER_LOG_INFO, folder + ": " + manifest.model + " for " + manifest.backend + " " +
                                 manifest.backend_version + " in " + manifest.precision +
                                 ", every file as its manifest records; " + proof + ".");
  if (manifest.random_weights) {
    log(TRITONSERVER_LOG_WARN, folder + ": built from random weights; its predictions mean nothing.");
  }
}

void Model::check_place(TRITONBACKEND_ModelInstance* instance) const {
  TRITONSERVER_InstanceGroupKind kind{};
  std::int32_t device = 0;
  require(TRITONBACKEND_ModelInstanceKind(instance, &kind));
  require(TRITONBACKEND_ModelInstanceDeviceId(instance, &device));
  if (session_.manifest().device != "cuda" || kind != TRITONSERVER_INSTANCEGROUPKIND_GPU || device == 0) return;
  throw BadRequest("config.pbtxt asks for an instance on GPU " + std::to_string(device) +
                       "; this back end serves an engine on GPU 0 alone.",
                   "Write instance_group [{ kind: KIND_GPU gpus: [0] }], and serve with a server for every GPU.");
}

}  // namespace ztp::triton
