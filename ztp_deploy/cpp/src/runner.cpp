#include "runner.h"

#include <cstring>
#include <sstream>

#include "tokens.h"

namespace ztp {
namespace {

[[noreturn]] void unlike_manifest(const std::string& name, const std::string& found) {
  throw DamagedFiles("The engine's output " + name + " is " + found + ", unlike its manifest.", "Build it again.");
}

std::string readable(const std::vector<std::int64_t>& shape) {
  std::string text;
  for (const std::int64_t side : shape) text += (text.empty() ? "" : ", ") + std::to_string(side);
  return "[" + text + "]";
}

template <class T>
std::vector<T> copy(const OutputView& view, std::size_t batch) {
  std::vector<T> values(batch * static_cast<std::size_t>(view.shape[1]));
  if (!values.empty()) std::memcpy(values.data(), view.data, values.size() * sizeof(T));
  return values;
}

}  // namespace

Outputs collect(const EngineFolder& folder, std::size_t batch, const std::vector<OutputView>& views) {
  if (views.size() != folder.outputs.size()) {
    unlike_manifest("list", std::to_string(views.size()) + " entries long");
  }
  for (std::size_t i = 0; i < views.size(); ++i) {
    const OutputView& view = views[i];
    const bool fits = view.shape.size() == 2 && view.shape[0] == static_cast<std::int64_t>(batch) && view.shape[1] > 0;
    if (!fits) unlike_manifest(folder.outputs[i], readable(view.shape));
    if (i == 0 ? !view.is_float32 : !view.is_int32) unlike_manifest(folder.outputs[i], "of another type");
  }
  Outputs outputs;
  outputs.batch = batch;
  outputs.classes = static_cast<std::size_t>(views[0].shape[1]);
  outputs.logits = copy<float>(views[0], batch);
  Slots slots;
  for (std::size_t i = 1; i < views.size(); ++i) {
    (i <= folder.manifest.stages ? slots.kept : slots.merged).push_back(copy<std::int32_t>(views[i], batch));
  }
  report_tokens(folder, slots, outputs);
  return outputs;
}

namespace {

/// The lines of a message, trimmed and without full stops; those that only name a source file if there are no others.
std::vector<std::string> telling_lines(const std::string& message) {
  std::istringstream lines(message);
  std::vector<std::string> told;
  std::vector<std::string> places;
  for (std::string line; std::getline(lines, line);) {
    const std::size_t end = line.find_last_not_of(" \t\r.!");
    if (end == std::string::npos) continue;
    line.resize(end + 1);
    line.erase(0, line.find_first_not_of(" \t"));
    (line.rfind("Exception from", 0) == 0 ? places : told).push_back(line);
  }
  return told.empty() ? places : told;
}

}  // namespace

std::string reason_in(const std::string& message) {
  const std::vector<std::string> lines = telling_lines(message);
  return lines.empty() ? "no reason was given" : lines.front();
}

std::string innermost_reason_in(const std::string& message) {
  const std::vector<std::string> lines = telling_lines(message);
  return lines.empty() ? "no reason was given" : lines.back();
}

}  // namespace ztp
