/// Runs the engine folders that ztp_deploy builds: open, run images, ask which tokens were kept.
///
///     ztp::Session session("engines/…");
///     ztp::Outputs outputs = session.run(images.data(), batch);
///
/// No engine library shows in this header; which of them a build of the runtime can open was chosen
/// when it was configured, and backends() says it. What holds for all of it:
///
/// - Ownership: a session owns its engine, and outputs and warnings own what they hold: outputs outlive the session.
///   References that a session hands out (manifest(), warnings()) live as long as it, also where it is moved. Images are
///   the caller's: they are read during run() only, where they lie; for the CPU they are handed to libraries uncopied.
/// - Threads: every const member may be called from several threads at once, on one session or several. At most
///   Options::concurrent_runs runs of a session are under way; later ones wait, first come first served. A session is
///   moved, assigned to and destroyed by one thread, with no call to it under way.
/// - Errors: what is thrown is an Error, one of four kinds; a run that threw leaves the session as it was, and its place
///   to the next. Only where memory runs out before there is an Error to tell of it, std::bad_alloc comes.
/// - Processes: engine libraries have threads, and none is known to survive fork(): open sessions after it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define ZTP_API __attribute__((visibility("default")))

namespace ztp {

/// A refusal: `problem` says what was asked and what was found, `fix` what to do next; whole sentences.
///
/// `exit_code` is what `ztp` and `ztp-run` return: 1 a check failed, 2 bad request or damaged files,
/// 3 missing software or device.
class ZTP_API Error : public std::runtime_error {
 public:
  const std::string& problem() const noexcept { return problem_; }
  const std::string& fix() const noexcept { return fix_; }
  int exit_code() const noexcept { return exit_code_; }

 protected:
  Error(const std::string& problem, const std::string& fix, int exit_code)
      : std::runtime_error(fix.empty() ? problem : problem + " " + fix),
        problem_(problem),
        fix_(fix),
        exit_code_(exit_code) {}

 private:
  std::string problem_;
  std::string fix_;
  int exit_code_;
};

/// What was asked cannot be done: a wrong folder, batch, type or pixel.
class ZTP_API BadRequest : public Error {
 public:
  explicit BadRequest(const std::string& problem, const std::string& fix = "") : Error(problem, fix, 2) {}
};

/// An engine folder is incomplete or differs from what its manifest records.
class ZTP_API DamagedFiles : public Error {
 public:
  explicit DamagedFiles(const std::string& problem, const std::string& fix = "") : Error(problem, fix, 2) {}
};

/// A library or device that the engine needs is not there.
class ZTP_API MissingSoftware : public Error {
 public:
  explicit MissingSoftware(const std::string& problem, const std::string& fix = "") : Error(problem, fix, 3) {}
};

/// A check ran and what it checks does not hold.
class ZTP_API GateFailed : public Error {
 public:
  explicit GateFailed(const std::string& problem, const std::string& fix = "") : Error(problem, fix, 1) {}
};

/// Smallest, optimal and largest batch of an engine.
struct BatchRange {
  std::size_t min = 1;
  std::size_t opt = 1;
  std::size_t max = 1;
};

/// How a picture becomes the model's input, in timm's terms; mean and standard deviation by channel.
struct Preprocessing {
  std::array<float, 3> mean{};
  std::array<float, 3> std{};
  double crop_pct = 1.0;
  std::string interpolation;
  std::string crop_mode;
};

/// What `manifest.json` says of an engine.
struct Manifest {
  std::string model;
  std::string precision;
  std::string backend;
  std::string backend_version;  ///< the library version the engine was built and checked with
  std::string device;           ///< cpu or cuda
  std::string provider;         ///< the library's own word for it
  BatchRange batch;
  std::string dtype;            ///< of the pixels: float32 (normalised) or uint8
  std::size_t size = 0;         ///< images are [batch, 3, size, size]
  std::size_t patches = 0;      ///< tokens of an image before any is dropped, special ones not counted
  std::size_t stages = 0;       ///< how many times tokens are dropped or merged
  bool random_weights = false;  ///< predictions mean nothing
  Preprocessing preprocessing;
  std::vector<std::string> labels;  ///< class names; empty where the model has none
  std::string sha256;               ///< of manifest.json, as evidence files quote it
};

/// How an engine is opened.
struct Options {
  /// How many runs of one session may be under way at once. Each has an infer request or an execution context to itself,
  /// whose memory, on a GPU that of the largest batch, is kept for later runs. 0: as many as this machine has processors.
  std::size_t concurrent_runs = 0;
};

/// What an engine that was opened gives reason to say; `text` is whole sentences, Python's where Python warns too.
struct Warning {
  enum class Kind {
    version,     ///< the library is another release than the one that the engine was built and checked with
    parity,      ///< the engine failed its last parity check (`evidence/parity.json`): its answers are not the model's
    cuda_graph,  ///< built with `cuda_graph`, which only Python honours
  };
  Kind kind;
  std::string text;
};

/// What one run gives; everything is the caller's own. Tokens are told by stage.
struct Outputs {
  std::size_t batch = 0;
  std::size_t classes = 0;
  std::vector<float> logits;  ///< [batch, classes]
  /// Patch positions [batch, k], ascending for each image; -1: a masked slot, from the patch count on: made anew.
  std::vector<std::vector<std::int32_t>> kept;
  /// For every patch of the image [batch, patches] the index in that image's `kept` of the token that carries it,
  /// alone or merged with others; -1: dropped.
  std::vector<std::vector<std::int32_t>> assignment;
};

/// What Session::self_test found: how many images, and the largest logit difference in units of an image's logit σ.
struct SelfTest {
  std::size_t images = 0;
  double worst_logit = 0.0;
};

/// An open engine. Moving is cheap, copying is not offered; a moved-from session may only be destroyed or assigned to.
///
/// How far runs in several threads overlap is the back end's affair.
class ZTP_API Session {
 public:
  /// Opens an engine folder after its manifest and the sha256 of every file were verified.
  ///
  /// Throws BadRequest (no engine folder, or the library failed in an unknown way), DamagedFiles (edited, truncated,
  /// missing) and MissingSoftware (back end not compiled in, library or device not here), and nothing else. AOTInductor
  /// and TensorRT engines are code: open only what you built. TensorRT's run on the CUDA device that is current here.
  explicit Session(const std::string& directory, const Options& options = {});
  ~Session();
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  const Manifest& manifest() const noexcept;

  /// What was found when the engine was opened, in the order of Warning::Kind; empty where there is nothing to say.
  ///
  /// Nothing is printed: whoever must not serve an engine that failed its check looks for Warning::Kind::parity.
  const std::vector<Warning>& warnings() const noexcept;

  /// Runs batch × 3 × size × size values, channels before rows; they are read during the call only.
  ///
  /// Throws BadRequest for a batch outside the range, for pixels that are not finite, and where the engine
  /// takes the other type, and where the library failed; DamagedFiles for outputs unlike the manifest; MissingSoftware
  /// where the device failed; GateFailed where the engine reports tokens that cannot be; and nothing else.
  Outputs run(const float* images, std::size_t batch) const;
  Outputs run(const std::uint8_t* images, std::size_t batch) const;

  /// Repeats the run that Python recorded in `evidence/selftest.safetensors` and compares.
  ///
  /// Throws GateFailed where tokens, their merges or logits differ, BadRequest where nothing was recorded or for
  /// another manifest, DamagedFiles where the record cannot be read.
  SelfTest self_test() const;

 private:
  class Implementation;
  std::unique_ptr<Implementation> implementation_;
};

/// Weight of a library's message.
enum class Severity { error, warning };

/// Takes a message of an engine library: one that begins with the library's name, without a line's end.
using Log = std::function<void(Severity severity, const std::string& message)>;

/// Sends the messages of engine libraries to `log`, for the whole process: TensorRT and ONNX Runtime know one log each.
///
/// Without one, or with an empty one, errors go to stderr and warnings nowhere. A log is called from any thread, from
/// several at once; it must not call ztp, and what it throws is dropped. When this returns, the log before is not in use
/// any more: set an empty one before what it refers to goes. OpenVINO and libtorch have logs of their own, which stay the
/// program's; so has ONNX Runtime, where the program itself made its environment first.
ZTP_API void set_log(Log log);

/// The back ends this build can open, by their names in manifests.
ZTP_API std::vector<std::string> backends();

}  // namespace ztp
