// TensorRT-RTX 1.7.1.116, the CUDA runtime and its driver on the CPU, with FAKE_GPUS devices of compute capability 9.0;
// FAKE_MAJOR and FAKE_CAPABILITY change the first number of either. With FAKE_LOST no output comes back.
// The plan `toy TYPE SIZE LARGEST` is tests/cpp/toys.py's toy. What is put into a stream happens when it is synchronised
// and not before, so that whoever does not wait reads nothing. As with the real ones, every thread starts on device 0,
// what was made on one device does not work on another, and the first logger of a process is the only one.
// fake_contexts() counts the contexts that were ever made.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "NvInfer.h"

namespace {

thread_local int current = 0;

int devices() {
  const char* text = std::getenv("FAKE_GPUS");
  return text == nullptr ? 0 : std::atoi(text);
}

/// What remembers the device it was made on, and ends the process where it is used on another.
struct Placed {
  int device = current;

  void here(const char* what) const {
    if (device == current) return;
    std::fprintf(stderr, "%s of device %d is used on device %d\n", what, device, current);
    std::abort();
  }
};

/// Before what cudaMalloc gives, as wide as any alignment asks for.
struct alignas(64) Block : Placed {};

Block* block_of(void* address) { return static_cast<Block*>(address) - 1; }

}  // namespace

struct CUstream_st : Placed {
  std::vector<std::function<void()>> queue;
};

extern "C" {

int cuInit(unsigned) { return devices() == 0 ? cudaErrorNoDevice : 0; }

int cuDeviceGetCount(int* count) {
  *count = devices();
  return 0;
}

int cuDeviceGetName(char* name, int size, int device) {
  std::snprintf(name, static_cast<std::size_t>(size), "Stand-in %d", device);
  return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
  const char* major = std::getenv("FAKE_CAPABILITY");
  *value = attribute == 75 ? (major == nullptr ? 9 : std::atoi(major)) : 0;
  return 0;
}

std::int32_t getInferLibMajorVersion() noexcept {
  const char* major = std::getenv("FAKE_MAJOR");
  return major == nullptr ? 1 : std::atoi(major);
}
std::int32_t getInferLibMinorVersion() noexcept { return 7; }
std::int32_t getInferLibPatchVersion() noexcept { return 1; }
std::int32_t getInferLibBuildVersion() noexcept { return 116; }

}  // extern "C"

const char* cudaGetErrorString(cudaError_t) { return "no device"; }

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return devices() == 0 ? cudaErrorNoDevice : cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= devices()) return cudaErrorInvalidDevice;
  current = device;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** address, std::size_t bytes) {
  *address = new (std::aligned_alloc(alignof(Block), (bytes / alignof(Block) + 2) * alignof(Block))) Block + 1;
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  if (address == nullptr) return cudaSuccess;
  block_of(address)->here("Memory");
  std::free(block_of(address));
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  stream->here("A stream");
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  if (kind == cudaMemcpyDeviceToHost && std::getenv("FAKE_LOST") != nullptr) return cudaErrorNoDevice;
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

std::atomic<int> made{0};

struct Toy {
  std::string type;
  std::int64_t size = 0;
  std::int64_t largest = 0;
};

class Context final : public IExecutionContext, Placed {
 public:
  explicit Context(const Toy& toy) : toy_(toy) { ++made; }
  ~Context() override {
    here("A context");
    if (stream_ == nullptr || stream_->queue.empty()) return;
    std::fprintf(stderr, "A context is destroyed while it runs\n");
    std::abort();
  }

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
    here("A context");
    stream->here("A stream");
    for (const auto& [name, address] : addresses_) block_of(address)->here("Memory");
    stream_ = stream;
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
  cudaStream_t stream_ = nullptr;
  std::map<std::string, void*> addresses_;
};

class Engine final : public ICudaEngine, Placed {
 public:
  explicit Engine(Toy toy) : toy_(std::move(toy)) {}
  ~Engine() override { here("An engine"); }
  IExecutionContext* createExecutionContext() noexcept override {
    here("An engine");
    return new Context(toy_);
  }
  std::int32_t getNbIOTensors() const noexcept override { return 3; }
  DataType getTensorDataType(const char* name) const noexcept override {
    if (std::string(name) == "images") return toy_.type == "uint8" ? DataType::kUINT8 : DataType::kFLOAT;
    return std::string(name) == "kept_1" ? DataType::kINT32 : DataType::kFLOAT;
  }

 private:
  Toy toy_;
};

ILogger* first_logger = nullptr;
bool first_logger_lives = false;

class Runtime final : public IRuntime {
 public:
  void setEngineHostCodeAllowed(bool) noexcept override {}

  ICudaEngine* deserializeCudaEngine(const void* plan, std::size_t bytes) noexcept override {
    if (devices() == 0) std::abort();  // as the real ones do
    if (!first_logger_lives) {
      std::fprintf(stderr, "The process's logger was destroyed\n");
      std::abort();
    }
    std::istringstream words(std::string(static_cast<const char*>(plan), bytes));
    std::string kind;
    Toy toy;
    if (words >> kind >> toy.type >> toy.size >> toy.largest && kind == "toy") {
      first_logger->log(ILogger::Severity::kWARNING, "a toy");
      first_logger->log(ILogger::Severity::kINFO, "three tensors");
      return new Engine(toy);
    }
    first_logger->log(ILogger::Severity::kERROR, "no such plan");
    return nullptr;
  }
};

}  // namespace

ILogger::~ILogger() {
  if (this == first_logger) first_logger_lives = false;
}

IRuntime* createInferRuntime(ILogger& logger) noexcept {
  if (first_logger == nullptr) {
    first_logger = &logger;
    first_logger_lives = true;
  }
  return new Runtime;
}

}  // namespace nvinfer1

extern "C" int fake_contexts() { return nvinfer1::made; }
