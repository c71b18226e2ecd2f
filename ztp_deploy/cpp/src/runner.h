/// What a back end supplies behind Session: an engine opened by its library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "folder.h"

namespace ztp {

/// One output of an engine as its library shows it; `data` lives until the library runs again.
struct OutputView {
  const void* data = nullptr;
  std::vector<std::int64_t> shape;
  bool is_float32 = false;
  bool is_int32 = false;
};

/// An engine opened by its library. run() is called from several threads at once, as many as Options allow.
class Runner {
 public:
  Runner() = default;
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;
  virtual ~Runner() = default;

  /// Runs pixels [batch, 3, size, size] of the manifest's type; shapes and types were checked, pixels are finite.
  virtual Outputs run(const void* images, std::size_t batch) const = 0;

  /// The version of the library that opened the engine.
  virtual std::string version() const = 0;
};

/// Copies an engine's outputs, in the manifest's order, after checking that they are what the manifest promises.
Outputs collect(const EngineFolder& folder, std::size_t batch, const std::vector<OutputView>& views);

/// The first line that says something of a library's message, which may hold pages of its sources' names; no full stop.
std::string reason_in(const std::string& message);

/// The last such line, for nested messages as OpenVINO's: those before it name the checks that failed on the way.
std::string innermost_reason_in(const std::string& message);

// One a back end; each exists where that back end is compiled in. They throw DamagedFiles and MissingSoftware.
std::unique_ptr<Runner> open_aotinductor(const EngineFolder& folder);
std::unique_ptr<Runner> open_onnxruntime(const EngineFolder& folder);
std::unique_ptr<Runner> open_openvino(const EngineFolder& folder);
std::unique_ptr<Runner> open_tensorrt(const EngineFolder& folder);  // TensorRT or TensorRT-RTX

}  // namespace ztp
