#include "tokens.h"

#include <algorithm>
#include <numeric>

namespace ztp {
namespace {

using Numbers = std::vector<std::int32_t>;

/// One image's part of a tensor [batch, n].
class Row {
 public:
  Row(const Numbers& values, std::size_t image, std::size_t batch)
      : size_(values.size() / batch), begin_(values.data() + image * size_) {}

  std::size_t size() const { return size_; }
  const std::int32_t* begin() const { return begin_; }
  const std::int32_t* end() const { return begin_ + size_; }
  std::int32_t operator[](std::size_t i) const { return begin_[i]; }

 private:
  std::size_t size_;
  const std::int32_t* begin_;
};

[[noreturn]] void broken(const EngineFolder& folder, const std::string& problem) {
  throw GateFailed("The engine says that " + problem + ".",
                   "It is broken: `ztp check --engine " + folder.directory.string() + "` shows where.");
}

/// Sends the slot of every patch (-1: dropped) on through a stage that merges.
void follow(const EngineFolder& folder, const Row& merged, std::size_t slots, Numbers& slot_of) {
  for (std::int32_t& slot : slot_of) {
    if (slot < 0) continue;
    const auto entering = static_cast<std::size_t>(slot);
    slot = entering < merged.size() ? merged[entering] : static_cast<std::int32_t>(slots);
    if (slot >= static_cast<std::int32_t>(slots)) broken(folder, "tokens merged into others that are not there");
  }
}

/// The slot of every patch after a stage that only drops.
void locate(const EngineFolder& folder, const Row& kept, std::size_t stage, Numbers& slot_of) {
  std::fill(slot_of.begin(), slot_of.end(), -1);
  for (std::size_t slot = 0; slot < kept.size(); ++slot) {
    if (kept[slot] < 0) continue;
    const auto patch = static_cast<std::size_t>(kept[slot]);
    if (patch >= slot_of.size()) {
      broken(folder, "stage " + std::to_string(stage + 1) + " kept position " + std::to_string(patch) + ", of " +
                         std::to_string(slot_of.size()) + " patches");
    }
    slot_of[patch] = static_cast<std::int32_t>(slot);
  }
}

/// Where each slot comes when positions are put in ascending order; equals stay in slot order.
Numbers ranks(const Row& kept) {
  std::vector<std::size_t> order(kept.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return kept[a] < kept[b]; });
  Numbers rank(kept.size());
  for (std::size_t i = 0; i < order.size(); ++i) rank[order[i]] = static_cast<std::int32_t>(i);
  return rank;
}

}  // namespace

void report_tokens(const EngineFolder& folder, const Slots& slots, Outputs& outputs) {
  const std::size_t batch = outputs.batch;
  outputs.kept.resize(slots.kept.size());
  outputs.assignment.resize(slots.kept.size());
  Numbers slot_of(folder.manifest.patches);
  for (std::size_t image = 0; image < batch; ++image) {
    std::iota(slot_of.begin(), slot_of.end(), 0);
    for (std::size_t stage = 0; stage < slots.kept.size(); ++stage) {
      const Row kept(slots.kept[stage], image, batch);
      if (slots.merged.empty()) {
        locate(folder, kept, stage, slot_of);
      } else {
        follow(folder, Row(slots.merged[stage], image, batch), kept.size(), slot_of);
      }
      const Numbers rank = ranks(kept);
      for (const std::int32_t slot : slot_of) {
        outputs.assignment[stage].push_back(slot < 0 ? -1 : rank[static_cast<std::size_t>(slot)]);
      }
      Numbers& sorted = outputs.kept[stage];
      const auto start = sorted.insert(sorted.end(), kept.begin(), kept.end());
      std::sort(start, sorted.end());
    }
  }
}

}  // namespace ztp
