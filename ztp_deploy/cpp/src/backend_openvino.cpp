/// OpenVINO: `model.xml` and `model.bin`, compiled with the very properties they were checked with.
#include <algorithm>
#include <openvino/openvino.hpp>

#include "pool.h"
#include "runner.h"

namespace ztp {
namespace {

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
    const ov::AnyMap properties(folder.properties.begin(), folder.properties.end());
    ov::CompiledModel compiled;
    try {
      compiled = core.compile_model(core.read_model(graph, weights), device, properties);
    } catch (const std::exception& error) {
      throw DamagedFiles("OpenVINO cannot open " + graph + ": " + first_line(error.what()) + ".", "Build it again.");
    }
    check_precision(folder, compiled);
    return compiled;
  }

  /// On a processor without bf16 the library would quietly compute in fp32.
  static void check_precision(const EngineFolder& folder, const ov::CompiledModel& compiled) {
    const auto asked = folder.properties.find("INFERENCE_PRECISION_HINT");
    if (asked == folder.properties.end()) return;
    const std::string found = compiled.get_property(ov::hint::inference_precision).get_type_name();
    if (found != asked->second) {
      throw MissingSoftware("This engine computes in " + asked->second + ", and this processor only in " + found + ".",
                            "Build it again with precision=fp32, or run it on a processor that has " + asked->second + ".");
    }
  }

  const EngineFolder& folder_;
  ov::CompiledModel compiled_;
  mutable Pool<ov::InferRequest> requests_;
};

}  // namespace

std::unique_ptr<Runner> open_openvino(const EngineFolder& folder) { return std::make_unique<OpenVinoRunner>(folder); }

}  // namespace ztp
