/// ONNX Runtime: `model.onnx` on the CPU or with CUDA.
///
/// Only its C header is needed to build. The library is opened at run time, because the one inside the pip
/// package carries a file name that no linker's record would find again.
#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <array>

#include "log.h"
#include "runner.h"

namespace ztp {
namespace {

constexpr const char* kCpu = "CPUExecutionProvider";
constexpr const char* kCuda = "CUDAExecutionProvider";

/// The library's table of functions, and the one environment a process has.
class Library {
 public:
  static const Library& get() {
    static const Library library;
    return library;
  }

  const OrtApi* operator->() const { return api_; }
  OrtEnv* environment() const { return environment_; }
  OrtMemoryInfo* memory() const { return memory_; }
  const char* version() const { return version_; }

  /// The message of a failed call, empty where it succeeded; frees the status.
  std::string failure(OrtStatus* status) const {
    if (status == nullptr) return "";
    std::string message = reason_in(api_->GetErrorMessage(status));
    api_->ReleaseStatus(status);
    return message;
  }

  void require(OrtStatus* status) const {
    const std::string message = failure(status);
    if (!message.empty())
      throw BadRequest("ONNX Runtime failed: " + message + ".", "Run the self-test of this engine.");
  }

 private:
  Library() {
    void* handle = open_library();
    const auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(handle, "OrtGetApiBase"));
    api_ = base == nullptr ? nullptr : base()->GetApi(ORT_API_VERSION);
    if (api_ == nullptr) {
      throw MissingSoftware(std::string("ONNX Runtime ") + (base == nullptr ? "" : base()->GetVersionString()) +
                                " is older than the headers this was built with.",
                            "Install version 1." + std::to_string(ORT_API_VERSION) + " or newer.");
    }
    version_ = base()->GetVersionString();
    stay_loaded();  // for told()
    require(api_->CreateEnvWithCustomLogger(told, nullptr, ORT_LOGGING_LEVEL_WARNING, "ztp", &environment_));
    require(api_->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory_));
  }

  static void ORT_API_CALL told(void*, OrtLoggingLevel severity, const char*, const char*, const char*,
                                const char* message) {
    tell(severity < ORT_LOGGING_LEVEL_ERROR ? Severity::warning : Severity::error, "ONNX Runtime", message);
  }

  static void* open_library() {
    // The place found when this was configured, else the system's.
    const std::array<const char*, 2> names{ZTP_ONNXRUNTIME_LIBRARY, "libonnxruntime.so.1"};
    for (const char* name : names) {
      if (void* handle = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return handle;
    }
    throw MissingSoftware(std::string("The ONNX Runtime library was not found: ") + reason_in(dlerror()) + ".",
                          "Put libonnxruntime.so.1 where the loader looks (LD_LIBRARY_PATH).");
  }

  const OrtApi* api_ = nullptr;
  const char* version_ = "";
  // Never released: other threads may still run when the process ends.
  OrtEnv* environment_ = nullptr;
  OrtMemoryInfo* memory_ = nullptr;
};

/// Owns one of the library's objects; `release` is the member of OrtApi that frees it.
template <class T>
class Owned {
 public:
  explicit Owned(void (ORT_API_CALL* OrtApi::*release)(T*)) : release_(release) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() {
    if (value_ != nullptr) (Library::get().operator->()->*release_)(value_);
  }

  T* get() const { return value_; }
  T** address() { return &value_; }

 private:
  void (ORT_API_CALL* OrtApi::*release_)(T*);
  T* value_ = nullptr;
};

void use_cuda(OrtSessionOptions* options) {
  const Library& library = Library::get();
  Owned<OrtCUDAProviderOptionsV2> cuda(&OrtApi::ReleaseCUDAProviderOptions);
  // Left to itself, CUDA computes float32 matrix products in TF32, which is not what was checked.
  const std::array<const char*, 1> names{"use_tf32"};
  const std::array<const char*, 1> values{"0"};
  std::string failure = library.failure(library->CreateCUDAProviderOptions(cuda.address()));
  if (failure.empty())
    failure = library.failure(library->UpdateCUDAProviderOptions(cuda.get(), names.data(), values.data(), 1));
  if (failure.empty())
    failure = library.failure(library->SessionOptionsAppendExecutionProvider_CUDA_V2(options, cuda.get()));
  if (failure.empty()) return;
  throw MissingSoftware("This engine was built for a GPU, and ONNX Runtime cannot use one here: " + failure + ".",
                        "Check driver and CUDA libraries, or build it again with device=cpu.");
}

class OnnxRuntimeRunner final : public Runner {
 public:
  explicit OnnxRuntimeRunner(const EngineFolder& folder) : folder_(folder) {
    const Library& library = Library::get();
    Owned<OrtSessionOptions> options(&OrtApi::ReleaseSessionOptions);
    library.require(library->CreateSessionOptions(options.address()));
    configure(options.get());
    const std::string graph = folder.file("model.onnx").string();
    const std::string failure = library.failure(
        library->CreateSession(library.environment(), graph.c_str(), options.get(), session_.address()));
    if (!failure.empty()) {
      throw DamagedFiles("ONNX Runtime cannot open " + graph + ": " + failure + ".", "Build it again.");
    }
    for (const std::string& name : folder.outputs) names_.push_back(name.c_str());
  }

  Outputs run(const void* images, std::size_t batch) const override {
    const Library& library = Library::get();
    const std::size_t side = folder_.manifest.size;
    const bool pixels = folder_.manifest.dtype == "uint8";
    const std::size_t bytes = batch * 3 * side * side * (pixels ? sizeof(std::uint8_t) : sizeof(float));
    const std::array<std::int64_t, 4> shape{static_cast<std::int64_t>(batch), 3, static_cast<std::int64_t>(side),
                                            static_cast<std::int64_t>(side)};
    const auto type = pixels ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    Owned<OrtValue> input(&OrtApi::ReleaseValue);
    // The library reads inputs only; its values merely have no const form.
    library.require(library->CreateTensorWithDataAsOrtValue(library.memory(), const_cast<void*>(images), bytes,
                                                            shape.data(), shape.size(), type, input.address()));
    std::vector<std::unique_ptr<Owned<OrtValue>>> owned;
    std::vector<OrtValue*> values(names_.size(), nullptr);
    const char* name = folder_.input.c_str();
    const OrtValue* given = input.get();
    const std::string failure = library.failure(
        library->Run(session_.get(), nullptr, &name, &given, 1, names_.data(), names_.size(), values.data()));
    for (OrtValue* value : values) *owned.emplace_back(make_owned())->address() = value;
    if (!failure.empty())
      throw BadRequest("ONNX Runtime failed: " + failure + ".", "Run the self-test of this engine.");
    std::vector<OutputView> views;
    for (OrtValue* value : values) views.push_back(view(value));
    return collect(folder_, batch, views);
  }

  std::string version() const override { return Library::get().version(); }

 private:
  static std::unique_ptr<Owned<OrtValue>> make_owned() {
    return std::make_unique<Owned<OrtValue>>(&OrtApi::ReleaseValue);
  }

  void configure(OrtSessionOptions* options) const {
    const Library& library = Library::get();
    library.require(library->SetIntraOpNumThreads(options, folder_.threads));
    if (!folder_.spin_between_runs) {
      library.require(library->AddSessionConfigEntry(options, "session.force_spinning_stop", "1"));
    }
    const std::string& provider = folder_.manifest.provider;
    if (provider == kCuda) {
      use_cuda(options);
    } else if (provider != kCpu) {
      throw BadRequest("This engine was built for ONNX Runtime's " + provider + "; the C++ runtime uses " + kCpu +
                           " or " + kCuda + ".",
                       "Build it again with device=cpu or device=cuda.");
    }
  }

  static OutputView view(const OrtValue* value) {
    const Library& library = Library::get();
    Owned<OrtTensorTypeAndShapeInfo> info(&OrtApi::ReleaseTensorTypeAndShapeInfo);
    library.require(library->GetTensorTypeAndShape(value, info.address()));
    OutputView view;
    std::size_t dimensions = 0;
    library.require(library->GetDimensionsCount(info.get(), &dimensions));
    view.shape.resize(dimensions);
    library.require(library->GetDimensions(info.get(), view.shape.data(), dimensions));
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    library.require(library->GetTensorElementType(info.get(), &type));
    view.is_float32 = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    view.is_int32 = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    void* data = nullptr;
    library.require(library->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    view.data = data;
    return view;
  }

  const EngineFolder& folder_;
  std::vector<const char*> names_;
  Owned<OrtSession> session_{&OrtApi::ReleaseSession};
};

}  // namespace

std::unique_ptr<Runner> open_onnxruntime(const EngineFolder& folder) {
  return std::make_unique<OnnxRuntimeRunner>(folder);
}

}  // namespace ztp
