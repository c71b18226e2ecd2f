/// TensorRT 10.12 and newer, or TensorRT-RTX: `model.plan`, on the CUDA device that is current when it is opened.
///
/// Both libraries have this interface, down to the names of their entry points, so a build opens the plans of one.
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include "log.h"
#include "pool.h"
#include "runner.h"
#include "tensorrt_home.h"

#if defined(ZTP_TENSORRT_RTX) != defined(TRT_MAJOR_RTX)
#error "NvInfer.h belongs to the other of TensorRT and TensorRT-RTX: see TENSORRT_ROOT and TENSORRT_RTX_ROOT."
#endif

namespace ztp {
namespace {

#ifdef ZTP_TENSORRT_RTX
const std::string kTitle = "TensorRT-RTX";
#else
const std::string kTitle = "TensorRT";
#endif

void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw MissingSoftware(std::string("CUDA failed to ") + what + ": " + cudaGetErrorString(status) + ".",
                        "Check the GPU and its memory (nvidia-smi).");
}

std::string library_version() {
  std::string text;
  for (const std::int32_t part : {getInferLibMajorVersion(), getInferLibMinorVersion(), getInferLibPatchVersion(),
                                  getInferLibBuildVersion()}) {
    text += (text.empty() ? "" : ".") + std::to_string(part);
  }
  return text;
}

int current_device() {
  int device = 0;
  require(cudaGetDevice(&device), "name the current device");
  return device;
}

/// Makes a device the thread's current one, and afterwards the one that was.
class OnDevice {
 public:
  explicit OnDevice(int device) : before_(device) {
    cudaGetDevice(&before_);
    status_ = cudaSetDevice(device);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() { cudaSetDevice(before_); }

  cudaError_t status() const { return status_; }

 private:
  int before_;
  cudaError_t status_;
};

class Logger final : public nvinfer1::ILogger {
 public:
  Logger() { stay_loaded(); }

  void log(Severity severity, const char* message) noexcept override {
    if (severity > Severity::kWARNING) return;
    tell(severity == Severity::kWARNING ? ztp::Severity::warning : ztp::Severity::error, kTitle, message);
  }
};

/// The process's one: the libraries keep the first that they are given for good.
Logger& logger() {
  static auto* const kept = new Logger;
  return *kept;
}

class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) { require(cudaMalloc(&address_, bytes), "reserve memory"); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() { cudaFree(address_); }

  void* get() const { return address_; }

 private:
  void* address_ = nullptr;
};

class Stream {
 public:
  Stream() { require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "make a stream"); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(stream_); }

  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

/// Waits for what is under way in a stream, however its scope is left.
class Settled {
 public:
  explicit Settled(cudaStream_t stream) : stream_(stream) {}
  Settled(const Settled&) = delete;
  Settled& operator=(const Settled&) = delete;
  ~Settled() { cudaStreamSynchronize(stream_); }

 private:
  cudaStream_t stream_;
};

std::size_t width(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
    case nvinfer1::DataType::kINT32:
      return 4;
    case nvinfer1::DataType::kUINT8:
      return 1;
    default:
      throw DamagedFiles("The engine has an input or output that is neither float32, int32 nor uint8.",
                         "Build it again.");
  }
}

/// One thread's execution context with a stream and device buffers, which last from run to run.
class Context {
 public:
  Context(nvinfer1::ICudaEngine& engine, const EngineFolder& folder)
      : engine_(engine), folder_(folder), context_(engine.createExecutionContext()) {
    if (context_ == nullptr)
      throw MissingSoftware(kTitle + " could not make a context.", "Free GPU memory (nvidia-smi).");
    // Batches up to the largest share the buffers.
    set_batch(folder.manifest.batch.max);
    bind(folder.input);
    for (const std::string& name : folder.outputs) bind(name);
  }

  Outputs run(const void* images, std::size_t batch) {
    set_batch(batch);
    std::vector<OutputView> views;
    std::vector<std::vector<char>> copies;
    const Settled settled(stream_.get());  // before the copies go, and the context with its buffers
    const std::size_t input = bytes(folder_.input);
    require(cudaMemcpyAsync(buffers_[0]->get(), images, input, cudaMemcpyHostToDevice, stream_.get()), "copy images");
    if (!context_->enqueueV3(stream_.get())) {
      throw BadRequest(kTitle + " could not run the engine.", "See its message above.");
    }
    for (std::size_t i = 0; i < folder_.outputs.size(); ++i) {
      const std::string& name = folder_.outputs[i];
      std::vector<char>& copy = copies.emplace_back(bytes(name));
      require(cudaMemcpyAsync(copy.data(), buffers_[i + 1]->get(), copy.size(), cudaMemcpyDeviceToHost, stream_.get()),
              "copy outputs");
      const nvinfer1::Dims shape = context_->getTensorShape(name.c_str());
      const nvinfer1::DataType type = engine_.getTensorDataType(name.c_str());
      views.push_back({copy.data(),
                       {shape.d, shape.d + shape.nbDims},
                       type == nvinfer1::DataType::kFLOAT,
                       type == nvinfer1::DataType::kINT32});
    }
    require(cudaStreamSynchronize(stream_.get()), "finish the run");
    return collect(folder_, batch, views);
  }

 private:
  void set_batch(std::size_t batch) {
    const auto side = static_cast<std::int64_t>(folder_.manifest.size);
    const nvinfer1::Dims4 shape{static_cast<std::int64_t>(batch), 3, side, side};
    if (!context_->setInputShape(folder_.input.c_str(), shape)) {
      throw DamagedFiles(kTitle + "'s engine takes no batch of " + std::to_string(batch) + ", unlike its manifest.",
                         "Build it again.");
    }
  }

  std::size_t bytes(const std::string& name) const {
    const nvinfer1::Dims shape = context_->getTensorShape(name.c_str());
    std::size_t values = width(engine_.getTensorDataType(name.c_str()));
    for (int i = 0; i < shape.nbDims; ++i) {
      if (shape.d[i] < 0) throw DamagedFiles("The engine's tensor " + name + " has no fixed shape.", "Build it again.");
      values *= static_cast<std::size_t>(shape.d[i]);
    }
    return values;
  }

  void bind(const std::string& name) {
    buffers_.push_back(std::make_unique<DeviceMemory>(bytes(name)));
    if (!context_->setTensorAddress(name.c_str(), buffers_.back()->get())) {
      throw DamagedFiles(kTitle + "'s engine has no tensor " + name + ", unlike its manifest.", "Build it again.");
    }
  }

  nvinfer1::ICudaEngine& engine_;
  const EngineFolder& folder_;
  Stream stream_;
  std::vector<std::unique_ptr<DeviceMemory>> buffers_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

class TensorRtRunner final : public Runner {
 public:
  explicit TensorRtRunner(const EngineFolder& folder)
      : folder_(folder),
        device_(current_device()),
        contexts_([this] { return std::make_unique<Context>(*engine_, folder_); }) {
    const std::filesystem::path path = folder.file("model.plan");
    if (folder.strip_plan) {
      throw BadRequest("This engine's plan was stripped of its weights, which only the Python runtime puts back.",
                       "Build it again without strip_plan.");
    }
    check_home(folder, gpus().at(static_cast<std::size_t>(device_)), kTitle, library_version());
    const std::string plan = read_file(path);
    runtime_.reset(nvinfer1::createInferRuntime(logger()));
    if (runtime_ == nullptr) throw MissingSoftware(kTitle + " did not start.", "See its message above.");
    // Plans for later releases carry code for the processor, which the library runs only when told to.
    runtime_->setEngineHostCodeAllowed(folder.version_compatible);
    engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    if (engine_ == nullptr) {
      throw DamagedFiles(kTitle + " cannot open " + path.string() + ": see its message above.",
                         "A plan fits the GPU and the version it was built with; build it again on this machine.");
    }
    check_tensors();
  }

  ~TensorRtRunner() override {
    const OnDevice guard(device_);
    contexts_.clear();
    engine_.reset();
    runtime_.reset();
  }

  Outputs run(const void* images, std::size_t batch) const override {
    const OnDevice guard(device_);
    require(guard.status(), "return to the engine's device");
    return contexts_.with([&](Context& context) { return context.run(images, batch); });
  }

  std::string version() const override { return library_version(); }

 private:
  /// Every tensor needs an address before a run, so there must be none but the manifest's.
  void check_tensors() const {
    const auto count = static_cast<std::size_t>(engine_->getNbIOTensors());
    if (count != folder_.outputs.size() + 1) {
      throw DamagedFiles(kTitle + "'s engine has " + std::to_string(count) + " inputs and outputs, the manifest " +
                             std::to_string(folder_.outputs.size() + 1) + ".",
                         "Build it again.");
    }
    const auto wanted = folder_.manifest.dtype == "uint8" ? nvinfer1::DataType::kUINT8 : nvinfer1::DataType::kFLOAT;
    if (engine_->getTensorDataType(folder_.input.c_str()) != wanted) {
      throw DamagedFiles(kTitle + "'s engine takes no " + folder_.manifest.dtype + " images, unlike its manifest.",
                         "Build it again.");
    }
  }

  const EngineFolder& folder_;
  int device_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  mutable Pool<Context> contexts_;
};

}  // namespace

std::unique_ptr<Runner> open_tensorrt(const EngineFolder& folder) { return std::make_unique<TensorRtRunner>(folder); }

}  // namespace ztp
