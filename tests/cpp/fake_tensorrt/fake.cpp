// TensorRT-RTX and the CUDA runtime on the CPU, with FAKE_GPUS devices. The plan `toy TYPE SIZE LARGEST` is
// tests/cpp/toys.py's toy. What is put into a stream happens when it is synchronised and not before, so that
// whoever does not wait reads nothing.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "NvInfer.h"

struct CUstream_st {
  std::vector<std::function<void()>> queue;
};

const char* cudaGetErrorString(cudaError_t) { return "no device"; }

cudaError_t cudaGetDeviceCount(int* count) {
  const char* devices = std::getenv("FAKE_GPUS");
  *count = devices == nullptr ? 0 : std::atoi(devices);
  return *count == 0 ? cudaErrorNoDevice : cudaSuccess;
}

cudaError_t cudaMalloc(void** address, std::size_t bytes) {
  *address = std::malloc(bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  std::free(address);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  stream->queue.push_back([=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  for (const auto& work : stream->queue) work();
  stream->queue.clear();
  return cudaSuccess;
}

namespace nvinfer1 {
namespace {

struct Toy {
  std::string type;
  std::int64_t size = 0;
  std::int64_t largest = 0;
};

class Context final : public IExecutionContext {
 public:
  explicit Context(const Toy& toy) : toy_(toy) {}

  bool setInputShape(const char* name, const Dims& shape) noexcept override {
    batch_ = shape.d[0];
    return std::string(name) == "images" && batch_ <= toy_.largest && shape.d[1] == 3 && shape.d[2] == toy_.size;
  }

  bool setTensorAddress(const char* name, void* address) noexcept override {
    addresses_[name] = address;
    return true;
  }

  Dims getTensorShape(const char* name) const noexcept override {
    const std::map<std::string, Dims> shapes{
        {"images", Dims4(batch_, 3, toy_.size, toy_.size)}, {"logits", {2, {batch_, 3}}}, {"kept_1", {2, {batch_, 2}}}};
    const auto found = shapes.find(name);
    return found == shapes.end() ? Dims{-1, {}} : found->second;
  }

  bool enqueueV3(cudaStream_t stream) noexcept override {
    stream->queue.push_back([this, batch = batch_] {
      for (std::int64_t image = 0; image < batch; ++image) run(image);
    });
    return addresses_.size() == 3;
  }

 private:
  void run(std::int64_t image) {
    float* logits = static_cast<float*>(addresses_["logits"]) + image * 3;
    const std::int64_t pixels = toy_.size * toy_.size;
    for (std::int64_t channel = 0; channel < 3; ++channel) {
      const std::int64_t first = (image * 3 + channel) * pixels;
      double sum = 0;
      for (std::int64_t i = first; i < first + pixels; ++i) {
        sum += toy_.type == "uint8" ? static_cast<double>(static_cast<const std::uint8_t*>(addresses_["images"])[i])
                                    : static_cast<double>(static_cast<const float*>(addresses_["images"])[i]);
      }
      logits[channel] = static_cast<float>(sum / static_cast<double>(pixels));
    }
    std::int32_t order[] = {0, 1, 2};
    std::sort(order, order + 3, [&](std::int32_t a, std::int32_t b) { return logits[a] > logits[b]; });
    std::copy(order, order + 2, static_cast<std::int32_t*>(addresses_["kept_1"]) + image * 2);
  }

  Toy toy_;
  std::int64_t batch_ = 0;
  std::map<std::string, void*> addresses_;
};

class Engine final : public ICudaEngine {
 public:
  explicit Engine(Toy toy) : toy_(std::move(toy)) {}
  IExecutionContext* createExecutionContext() noexcept override { return new Context(toy_); }
  std::int32_t getNbIOTensors() const noexcept override { return 3; }
  DataType getTensorDataType(const char* name) const noexcept override {
    if (std::string(name) == "images") return toy_.type == "uint8" ? DataType::kUINT8 : DataType::kFLOAT;
    return std::string(name) == "kept_1" ? DataType::kINT32 : DataType::kFLOAT;
  }

 private:
  Toy toy_;
};

class Runtime final : public IRuntime {
 public:
  explicit Runtime(ILogger& logger) : logger_(logger) {}
  void setEngineHostCodeAllowed(bool) noexcept override {}

  ICudaEngine* deserializeCudaEngine(const void* plan, std::size_t bytes) noexcept override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess) std::abort();  // as the real ones do
    std::istringstream words(std::string(static_cast<const char*>(plan), bytes));
    std::string kind;
    Toy toy;
    if (words >> kind >> toy.type >> toy.size >> toy.largest && kind == "toy") return new Engine(toy);
    logger_.log(ILogger::Severity::kERROR, "no such plan");
    return nullptr;
  }

 private:
  ILogger& logger_;
};

}  // namespace

IRuntime* createInferRuntime(ILogger& logger) noexcept { return new Runtime(logger); }

}  // namespace nvinfer1
