#include "ztp/session.h"

#include <algorithm>
#include <cmath>
#include <thread>

#include "folder.h"
#include "gpu.h"
#include "runner.h"
#include "selftest.h"
#include "turns.h"
#include "warnings.h"

namespace ztp {
namespace {

struct BackEnd {
  const char* name;
  std::unique_ptr<Runner> (*open)(const EngineFolder&);  // null where it is not compiled in
  const char* option;
};

constexpr BackEnd kBackEnds[] = {
#ifdef ZTP_AOTINDUCTOR
    {"aotinductor", open_aotinductor, "ZTP_WITH_AOTINDUCTOR"},
#else
    {"aotinductor", nullptr, "ZTP_WITH_AOTINDUCTOR"},
#endif
#ifdef ZTP_ONNXRUNTIME
    {"onnxruntime", open_onnxruntime, "ZTP_WITH_ONNXRUNTIME"},
#else
    {"onnxruntime", nullptr, "ZTP_WITH_ONNXRUNTIME"},
#endif
#ifdef ZTP_OPENVINO
    {"openvino", open_openvino, "ZTP_WITH_OPENVINO"},
#else
    {"openvino", nullptr, "ZTP_WITH_OPENVINO"},
#endif
#ifdef ZTP_TENSORRT
    {"tensorrt", open_tensorrt, "ZTP_WITH_TENSORRT"},
#else
    {"tensorrt", nullptr, "ZTP_WITH_TENSORRT"},
#endif
#ifdef ZTP_TENSORRT_RTX
    {"tensorrt_rtx", open_tensorrt, "ZTP_WITH_TENSORRT_RTX"},
#else
    {"tensorrt_rtx", nullptr, "ZTP_WITH_TENSORRT_RTX"},
#endif
};

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text.empty() ? "none" : text;
}

void require_gpu(const EngineFolder& folder) {
  const Manifest& manifest = folder.manifest;
  // TensorRT's libraries know no other device, and crash without one.
  const bool needed = manifest.device == "cuda" || manifest.backend.rfind("tensorrt", 0) == 0;
  if (!needed || !gpus().empty()) return;
  throw MissingSoftware(folder.directory.string() + " runs on " + manifest.device + ", but no NVIDIA GPU was found.",
                        "Open it on a machine that has one, or build for this one (`ztp doctor`).");
}

std::unique_ptr<Runner> open_runner(const EngineFolder& folder) {
  const std::string& wanted = folder.manifest.backend;
  for (const BackEnd& back_end : kBackEnds) {
    if (back_end.name != wanted) continue;
    if (back_end.open != nullptr) {
      require_gpu(folder);
      return back_end.open(folder);
    }
    throw MissingSoftware(
        "This is an engine for " + wanted + "; this build of the runtime opens: " + joined(backends()) + ".",
        std::string("Configure it with -D") + back_end.option + "=ON.");
  }
  throw BadRequest(
      "The C++ runtime opens no " + wanted + " engines.",
      "Use ztp_deploy from Python, or build for openvino, onnxruntime, tensorrt, tensorrt_rtx or aotinductor.");
}

/// Does `work` of `who` on an engine folder, and makes the runtime's own error of whatever a library throws.
template <class Work>
auto own_errors(const std::string& who, const std::filesystem::path& directory, Work work) {
  try {
    return work();
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    throw BadRequest(who + " failed on " + directory.string() + ": " + reason_in(error.what()) + ".",
                     "Check that its library is whole and memory is free, or build the engine again.");
  }
}

void check_batch(const Manifest& manifest, std::size_t batch) {
  const BatchRange& span = manifest.batch;
  if (batch >= span.min && batch <= span.max) return;
  if (batch == 0) throw BadRequest("A batch holds at least one image; got none.", "Give at least one.");
  const std::string least = std::to_string(std::min(span.min, batch));
  const std::string most = std::to_string(std::max(span.max, batch));
  throw BadRequest("A batch of " + std::to_string(batch) + " is outside this engine's range " +
                       std::to_string(span.min) + " to " + std::to_string(span.max) + ".",
                   "Split it, or build with --batch " + least + ":" + std::to_string(span.opt) + ":" + most + ".");
}

void check_dtype(const Manifest& manifest, const std::string& given) {
  if (manifest.dtype == given) return;
  const std::string side = std::to_string(manifest.size);
  throw BadRequest(
      "This engine takes " + manifest.dtype + " arrays [B, 3, " + side + ", " + side + "]; got " + given + ".",
      "Convert them, or build with --input " + given + ".");
}

void check_finite(const float* images, std::size_t values) {
  const auto strange = std::count_if(images, images + values, [](float value) { return !std::isfinite(value); });
  if (strange == 0) return;
  throw BadRequest(std::to_string(strange) + " of the pixels are NaN or infinite.",
                   "Check where the images come from.");
}

std::size_t runs_at_once(const Options& options) {
  if (options.concurrent_runs > 0) return options.concurrent_runs;
  return std::max(std::thread::hardware_concurrency(), 1U);  // 0 where that is not known
}

}  // namespace

class Session::Implementation {
 public:
  Implementation(const std::string& directory, const Options& options)
      : folder_(own_errors("Reading", directory, [&] { return open_folder(directory); })),
        turns_(runs_at_once(options)) {
    own_errors(folder_.manifest.backend, folder_.directory, [&] {
      runner_ = open_runner(folder_);
      warnings_ = warnings_of(folder_, runner_->version());
    });
  }

  const EngineFolder& folder() const noexcept { return folder_; }
  const std::vector<Warning>& warnings() const noexcept { return warnings_; }

  Outputs run(const void* images, std::size_t batch) const {
    return own_errors(folder_.manifest.backend, folder_.directory, [&] {
      const Turns::Turn turn(turns_);
      return runner_->run(images, batch);
    });
  }

 private:
  EngineFolder folder_;
  std::unique_ptr<Runner> runner_;  // after the folder it refers to
  std::vector<Warning> warnings_;
  mutable Turns turns_;
};

Session::Session(const std::string& directory, const Options& options)
    : implementation_(std::make_unique<Implementation>(directory, options)) {}
Session::~Session() = default;
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;

const Manifest& Session::manifest() const noexcept { return implementation_->folder().manifest; }

const std::vector<Warning>& Session::warnings() const noexcept { return implementation_->warnings(); }

Outputs Session::run(const float* images, std::size_t batch) const {
  check_dtype(manifest(), "float32");
  check_batch(manifest(), batch);
  check_finite(images, batch * 3 * manifest().size * manifest().size);
  return implementation_->run(images, batch);
}

Outputs Session::run(const std::uint8_t* images, std::size_t batch) const {
  check_dtype(manifest(), "uint8");
  check_batch(manifest(), batch);
  return implementation_->run(images, batch);
}

SelfTest Session::self_test() const {
  const std::filesystem::path& directory = implementation_->folder().directory;
  return own_errors("The self-test", directory, [&] { return repeat_recorded_run(*this, directory); });
}

std::vector<std::string> backends() {
  std::vector<std::string> names;
  for (const BackEnd& back_end : kBackEnds) {
    if (back_end.open != nullptr) names.emplace_back(back_end.name);
  }
  return names;
}

}  // namespace ztp
