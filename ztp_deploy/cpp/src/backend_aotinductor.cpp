/// AOTInductor: `model.pt2`, compiled code that libtorch loads. Needs C++20, which libtorch's headers use.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/api/include/torch/version.h>

#include "processor.h"
#include "runner.h"

namespace ztp {
namespace {

bool on_cuda(const EngineFolder& folder) { return folder.manifest.provider.rfind("cuda", 0) == 0; }

/// A package's code names libtorch.so, which nothing here needs by itself; loaded from where torch was found.
void load_torch() {
  if (dlopen("libtorch.so", RTLD_NOW | RTLD_GLOBAL) != nullptr) return;
  throw MissingSoftware(std::string("torch cannot be loaded: ") + reason_in(dlerror()) + ".", "Install torch again.");
}

void prepare_gpu() {
  if (!at::hasCUDA()) {
    throw MissingSoftware("This engine was built for a GPU and torch sees none.", "Build it again with device=cpu.");
  }
  // TF32 is not the float32 that was checked: convolutions default to it, products may have been set to it. Holds for
  // the process.
  at::globalContext().setAllowTF32CuDNN(false);
  at::globalContext().setFloat32MatmulPrecision("highest");
}

class AotInductorRunner final : public Runner {
 public:
  explicit AotInductorRunner(const EngineFolder& folder) : folder_(folder) {
    const std::string package = folder.file("model.pt2").string();
    require_instructions(folder.cpu_flags);
    load_torch();
    if (on_cuda(folder)) prepare_gpu();
    if (folder.threads > 0) at::set_num_threads(folder.threads);  // holds for the process, as in Python
    try {
      // Without an index it takes whichever GPU is the thread's own, and images go to the provider's.
      const c10::DeviceIndex device = on_cuda(folder) ? at::Device(folder.manifest.provider).index() : c10::DeviceIndex{-1};
      loader_ = std::make_unique<torch::inductor::AOTIModelPackageLoader>(package, "model", false, 1, device);
    } catch (const std::exception& error) {
      throw DamagedFiles("torch cannot open " + package + ": " + reason_in(error.what()) + ".",
                         "Build the engine again.");
    }
  }

  Outputs run(const void* images, std::size_t batch) const override {
    const c10::InferenceMode guard;
    const auto side = static_cast<std::int64_t>(folder_.manifest.size);
    const auto type = folder_.manifest.dtype == "uint8" ? at::kByte : at::kFloat;
    // The engine reads inputs only; tensors merely have no const form.
    at::Tensor input =
        at::from_blob(const_cast<void*>(images), {static_cast<std::int64_t>(batch), 3, side, side}, type);
    if (on_cuda(folder_)) input = input.to(at::Device(folder_.manifest.provider));
    // The loader lends its runners under its own lock: it may be called from several threads.
    std::vector<at::Tensor> tensors = loader_->run({input});
    std::vector<OutputView> views;
    for (std::size_t i = 0; i < tensors.size() && i < folder_.outputs.size(); ++i) {
      at::Tensor& tensor = tensors[i];
      tensor = tensor.cpu().contiguous();
      views.push_back({tensor.const_data_ptr(), tensor.sizes().vec(), tensor.scalar_type() == at::kFloat,
                       tensor.scalar_type() == at::kInt});
    }
    return collect(folder_, batch, views);
  }

  /// That of the headers: the library says none.
  std::string version() const override { return TORCH_VERSION; }

 private:
  const EngineFolder& folder_;
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader_;
};

}  // namespace

std::unique_ptr<Runner> open_aotinductor(const EngineFolder& folder) {
  return std::make_unique<AotInductorRunner>(folder);
}

}  // namespace ztp
