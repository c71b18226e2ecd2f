#include "tensors.h"

namespace ztp::triton {
namespace {

void add_stages(std::vector<Rows>& rows, const std::string& kind, const std::vector<std::vector<std::int32_t>>& stages,
                std::size_t batch) {
  for (std::size_t i = 0; i < stages.size(); ++i) {
    const std::string name = kind + "_" + std::to_string(i + 1);
    rows.push_back({name, TRITONSERVER_TYPE_INT32, stages[i].data(), stages[i].size() / batch});
  }
}

}  // namespace

std::vector<Rows> rows_of(const Outputs& outputs) {
  std::vector<Rows> rows{{"logits", TRITONSERVER_TYPE_FP32, outputs.logits.data(), outputs.classes}};
  add_stages(rows, "kept", outputs.kept, outputs.batch);
  add_stages(rows, "assignment", outputs.assignment, outputs.batch);
  return rows;
}

TRITONSERVER_DataType pixel_type(const Manifest& manifest) {
  return manifest.dtype == "uint8" ? TRITONSERVER_TYPE_UINT8 : TRITONSERVER_TYPE_FP32;
}

std::size_t image_bytes(const Manifest& manifest) {
  return 3 * manifest.size * manifest.size * (manifest.dtype == "uint8" ? sizeof(std::uint8_t) : sizeof(float));
}

Outputs run(const Session& session, const void* images, std::size_t batch) {
  if (session.manifest().dtype == "uint8") return session.run(static_cast<const std::uint8_t*>(images), batch);
  return session.run(static_cast<const float*>(images), batch);
}

}  // namespace ztp::triton
