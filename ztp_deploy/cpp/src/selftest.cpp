#include "selftest.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <locale>
#include <sstream>
#include <system_error>

#include "safetensors.h"

namespace ztp {
namespace {

namespace fs = std::filesystem;

constexpr const char* kDoNotShip = "Do not use this engine here: build it again on this machine, and run `ztp check`.";

/// The record's path, so that every refusal names it.
class Record {
 public:
  explicit Record(fs::path path) : path_(std::move(path)), stored_(read_safetensors(path_)) {}

  [[noreturn]] void damaged(const std::string& what) const {
    throw DamagedFiles(path_.string() + " " + what + ".", "Write it again with `ztp check`.");
  }

  const std::string& text(const std::string& name) const {
    const auto found = stored_.metadata.find(name);
    if (found == stored_.metadata.end()) damaged("does not say " + name);
    return found->second;
  }

  const StoredTensor& tensor(const std::string& name, const std::string& dtype, std::size_t dimensions) const {
    const auto found = stored_.tensors.find(name);
    if (found == stored_.tensors.end()) damaged("holds no " + name);
    const StoredTensor& tensor = found->second;
    if (tensor.dtype != dtype || tensor.shape.size() != dimensions) damaged("holds " + name + " of another kind");
    return tensor;
  }

  double tolerance() const {
    // Not a stream: it would read the number as the process's locale writes numbers.
    const std::string& written = text("tolerance");
    const char* end = written.data() + written.size();
    double value = 0;
    const std::from_chars_result read = std::from_chars(written.data(), end, value);
    const bool usable = read.ec == std::errc() && read.ptr == end && std::isfinite(value) && value > 0;
    if (!usable) damaged("gives no tolerance above zero");
    return value;
  }

  void check_manifest(const std::string& sha256) const {
    if (text("manifest_sha256") == sha256) return;
    throw BadRequest(path_.string() + " belongs to another manifest than this engine's.",
                     "Record it again with `ztp check`.");
  }

 private:
  fs::path path_;
  StoredTensors stored_;
};

/// Largest |difference| of an image's logits in units of the recorded ones' standard deviation; NaN counts as infinite.
double distance(const float* recorded, const float* found, std::size_t classes) {
  double mean = 0;
  for (std::size_t i = 0; i < classes; ++i) mean += static_cast<double>(recorded[i]) / static_cast<double>(classes);
  double variance = 0;
  double largest = 0;
  for (std::size_t i = 0; i < classes; ++i) {
    const double centred = static_cast<double>(recorded[i]) - mean;
    variance += centred * centred / static_cast<double>(classes);
    const double difference = std::abs(static_cast<double>(recorded[i]) - static_cast<double>(found[i]));
    largest = difference <= largest ? largest : difference;
    if (std::isnan(difference)) return INFINITY;
  }
  return largest == 0 ? 0 : largest / std::sqrt(variance);
}

/// Holds what every stage said against the recorded tensors `name`1, `name`2 …; `does` says what a difference means.
void compare_tokens(const Record& record, const std::string& name, const std::vector<std::vector<std::int32_t>>& found,
                    std::size_t batch, const std::string& does) {
  for (std::size_t stage = 0; stage < found.size(); ++stage) {
    const StoredTensor& stored = record.tensor(name + std::to_string(stage + 1), "I32", 2);
    const std::vector<std::int32_t> recorded = stored.values<std::int32_t>();
    const std::vector<std::int32_t>& tokens = found[stage];
    if (recorded.size() != tokens.size()) record.damaged("holds another number of tokens than the engine gives");
    const auto [ours, theirs] = std::mismatch(tokens.begin(), tokens.end(), recorded.begin());
    if (ours == tokens.end()) continue;
    const auto image = static_cast<std::size_t>(ours - tokens.begin()) / (tokens.size() / batch);
    throw GateFailed("Self-test fails: stage " + std::to_string(stage + 1) + " " + does + " on image " +
                         std::to_string(image) + " than when the engine was checked.",
                     kDoNotShip);
  }
}

double compare_logits(const Record& record, const Outputs& found) {
  const double tolerance = record.tolerance();
  const StoredTensor& stored = record.tensor("logits", "F32", 2);
  const std::vector<float> recorded = stored.values<float>();
  if (recorded.size() != found.logits.size()) record.damaged("holds another number of logits than the engine gives");
  double worst = 0;
  for (std::size_t image = 0; image < found.batch; ++image) {
    const std::size_t start = image * found.classes;
    const double apart = distance(recorded.data() + start, found.logits.data() + start, found.classes);
    worst = std::max(worst, apart);
    if (apart <= tolerance) continue;
    std::ostringstream sentence;
    sentence.imbue(std::locale::classic());
    sentence.precision(2);
    sentence << "Self-test fails: the same tokens are kept but logits differ by " << apart << " σ (at most "
             << tolerance << ") on image " << image << ".";
    throw GateFailed(sentence.str(), kDoNotShip);
  }
  return worst;
}

Outputs run(const Session& session, const Record& record) {
  const bool pixels = session.manifest().dtype == "uint8";
  const StoredTensor& images = record.tensor("images", pixels ? "U8" : "F32", 4);
  const std::size_t side = session.manifest().size;
  if (images.shape != std::vector<std::size_t>{images.shape[0], 3, side, side}) {
    record.damaged("holds images of another size than the engine takes");
  }
  if (pixels) return session.run(images.values<std::uint8_t>().data(), images.shape[0]);
  return session.run(images.values<float>().data(), images.shape[0]);
}

}  // namespace

SelfTest repeat_recorded_run(const Session& session, const fs::path& directory) {
  const fs::path path = directory / "evidence" / "selftest.safetensors";
  std::error_code ignored;
  if (!fs::is_regular_file(path, ignored)) {
    throw BadRequest(directory.string() + " carries no self-test: it has no evidence/selftest.safetensors.",
                     "Record one with `ztp check`.");
  }
  const Record record(path);
  record.check_manifest(session.manifest().sha256);
  const Outputs found = run(session, record);
  compare_tokens(record, "kept_", found.kept, found.batch, "keeps other tokens");
  compare_tokens(record, "assignment_", found.assignment, found.batch, "carries patches in other tokens");
  return {found.batch, compare_logits(record, found)};
}

}  // namespace ztp
