/// OpenVINO: `model.xml` and `model.bin`, compiled with the very properties they were checked with.
#include <algorithm>
#include <cctype>
#include <openvino/openvino.hpp>
#include <set>

#include "pool.h"
#include "processor.h"
#include "runner.h"

namespace ztp {
namespace {

/// The library's name of what a processor computes in: BF16 for bf16.
std::string capability(std::string precision) {
  std::transform(precision.begin(), precision.end(), precision.begin(),
                 [](unsigned char letter) { return static_cast<char>(std::toupper(letter)); });
  return precision;
}

class OpenVinoRunner final : public Runner {
 public:
  explicit OpenVinoRunner(const EngineFolder& folder)
      : folder_(folder),
        compiled_(compile(folder)),
        requests_([this] { return std::make_unique<ov::InferRequest>(compiled_.create_infer_request()); }) {}

  Outputs run(const void* images, std::size_t batch) const override {
    const std::size_t side = folder_.manifest.size;
    const auto type = folder_.manifest.dtype == "uint8" ? ov::element::u8 : ov::element::f32;
    // The library reads inputs only; its tensors merely have no const form.
    const ov::Tensor input(type, ov::Shape{batch, 3, side, side}, const_cast<void*>(images));
    return requests_.with([&](ov::InferRequest& request) {
      request.set_tensor(folder_.input, input);
      request.infer();
      std::vector<OutputView> views;
      std::vector<ov::Tensor> held;
      for (const std::string& name : folder_.outputs) {
        const ov::Tensor& tensor = held.emplace_back(request.get_tensor(name));
        const ov::Shape& shape = tensor.get_shape();
        views.push_back({tensor.data(),
                         {shape.begin(), shape.end()},
                         tensor.get_element_type() == ov::element::f32,
                         tensor.get_element_type() == ov::element::i32});
      }
      return collect(folder_, batch, views);
    });
  }

  /// Without the build number, as Python names it.
  std::string version() const override {
    const std::string built = ov::get_openvino_version().buildNumber;
    return built.substr(0, built.find('-'));
  }

 private:
  static ov::CompiledModel compile(const EngineFolder& folder) {
    const std::string graph = folder.file("model.xml").string();
    const std::string weights = folder.file("model.bin").string();
    const std::string& device = folder.manifest.provider;
    ov::Core core;
    const std::vector<std::string> devices = core.get_available_devices();
    const std::string family = device.substr(0, device.find('.'));
    const auto fits = [&](const std::string& name) { return name.substr(0, name.find('.')) == family; };
    if (std::none_of(devices.begin(), devices.end(), fits)) {
      throw MissingSoftware("This engine was built for OpenVINO's device " + device + ", which was not found.",
                            "Build it again with device=cpu.");
    }
    check_processor(folder, core);
    require_instructions(folder.cpu_flags);
    const ov::AnyMap properties(folder.properties.begin(), folder.properties.end());
    if (folder.files.count("stage.so") != 0) add_stages(folder, core);
    try {
      return core.compile_model(core.read_model(graph, weights), device, properties);
    } catch (const std::exception& error) {
      throw DamagedFiles("OpenVINO cannot open " + graph + ": " + innermost_reason_in(error.what()) + ".", "Build it again.");
    }
  }

  /// Stages that the build compiled: code, which the manifest vouches for.
  static void add_stages(const EngineFolder& folder, ov::Core& core) {
    const std::string library = folder.file("stage.so").string();
    try {
      core.add_extension(library);
    } catch (const std::exception&) {
      throw MissingSoftware("The stages in " + folder.directory.string() + " were compiled for OpenVINO " +
                                folder.manifest.backend_version + ", and this one does not take them.",
                            "Build the engine again.");
    }
  }

  /// On a processor without bf16 the library would quietly compute in fp32.
  static void check_processor(const EngineFolder& folder, ov::Core& core) {
    const std::string& precision = folder.manifest.precision;
    const std::vector<std::string> known = core.get_property(folder.manifest.provider, ov::device::capabilities);
    std::string listed;
    for (const std::string& name : known) listed += (listed.empty() ? "" : ", ") + name;
    const std::string& elsewhere = precision == "int8" ? folder.float_precision : precision;
    for (const std::string& name : std::set<std::string>{precision, elsewhere}) {
      if (std::find(known.begin(), known.end(), capability(name)) != known.end()) continue;
      throw MissingSoftware(name + " was asked for, and this processor has no instructions for it (OpenVINO lists " +
                                listed + ").",
                            "Use precision fp32, or a processor that has it (bf16: AVX512-BF16 or AMX).");
    }
  }

  const EngineFolder& folder_;
  ov::CompiledModel compiled_;
  mutable Pool<ov::InferRequest> requests_;
};

}  // namespace

std::unique_ptr<Runner> open_openvino(const EngineFolder& folder) { return std::make_unique<OpenVinoRunner>(folder); }

}  // namespace ztp
