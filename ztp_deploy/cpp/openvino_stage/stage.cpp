/// Zero-TPrune's stage as one operator of OpenVINO on the CPU: attention and keys in, kept slots and scores out.
///
/// The stage I′ → S → I of `methods/zero_tprune.py` in float32, in the names used there. Inputs are attention
/// [B, H, N, M ≥ N] and keys [B, N, D], both float32 or both bf16, with axes of 1 before those where the graph has use
/// for them. Attention comes as probabilities whose rows sum to 1, or as exponentials E (`backends/openvino/attention.py`).
/// Outputs are row sums [B, H, N, 1] and a report [B, R, 1]: the audit scores pre_spread and spread, the kept slots, best
/// first, pre_score, similarity and score; without an S-stage no pre_spread, pre_score and similarity. The CPU plugin calls `evaluate` from
/// several threads at once, in the arena of the stream that it runs.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/core/parallel.hpp>
#include <openvino/op/op.hpp>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// --- vectors -----------------------------------------------------------------------------------

#ifdef __AVX512F__
constexpr std::size_t kLanes = 16;
constexpr std::size_t kColumns = 4;
#else
constexpr std::size_t kLanes = 8;
constexpr std::size_t kColumns = 2;  // with kRows as many sums as fit into 16 registers beside what they are made of
#endif
constexpr std::size_t kRows = 4;
constexpr std::size_t kBlocks = 4;
using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));
using Words = std::uint32_t __attribute__((vector_size(kLanes * sizeof(float))));
using Halves = std::uint16_t __attribute__((vector_size(kLanes * sizeof(std::uint16_t))));

struct Bf16 {
  std::uint16_t bits;
};

std::size_t padded(std::size_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

template <class To, class From>
To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

Lanes load(const float* from) {
  Lanes values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

Lanes load(const Bf16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return same_bits<Lanes>(__builtin_convertvector(halves, Words) << 16);
}

void store(float* to, const Lanes& values) { std::memcpy(to, &values, sizeof values); }

/// The lanes of two vectors whose numbers are in `from`, the second's being counted on from the first's.
template <class Vector>
Vector pick(const Vector& first, const Vector& second, const Words& from) {
#ifdef __clang__
  // It has no shuffle by a vector; where the loop is unrolled it makes one of this.
  Vector picked;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    picked[lane] = from[lane] < kLanes ? first[from[lane]] : second[from[lane] - kLanes];
  }
  return picked;
#else
  return __builtin_shuffle(first, second, from);
#endif
}

/// Every lane plus the one whose number differs in one bit: `first`'s where that bit is clear, `second`'s where it is set.
template <std::size_t bit>
Lanes fold(const Lanes& first, const Lanes& second) {
  Words own, other;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    const std::size_t from = lane & bit ? kLanes : 0;
    own[lane] = static_cast<std::uint32_t>(from + lane);
    other[lane] = static_cast<std::uint32_t>(from + (lane ^ bit));
  }
  return pick(first, second, own) + pick(first, second, other);
}

/// Sums of kLanes vectors' lanes, each in the lane of its vector's number; overwrites them.
template <std::size_t bit = 1>
Lanes sums(Lanes* vectors) {
  for (std::size_t pair = 0; pair < kLanes / (2 * bit); ++pair) {
    vectors[pair] = fold<bit>(vectors[2 * pair], vectors[2 * pair + 1]);
  }
  if constexpr (2 * bit < kLanes) {
    return sums<2 * bit>(vectors);
  } else {
    return vectors[0];
  }
}

template <std::size_t bit = kLanes / 2>
float sum(const Lanes& values) {
  const Lanes folded = fold<bit>(values, values);
  if constexpr (bit > 1) {
    return sum<bit / 2>(folded);
  } else {
    return folded[0];
  }
}

/// 2 kLanes elements of a row in the order in which they are cheapest to have: bf16 as its even ones, then its odd ones.
struct Pair {
  Lanes first, second;
};

Pair load_pair(const float* from) { return {load(from), load(from + kLanes)}; }

Pair load_pair(const Bf16* from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  return {same_bits<Lanes>(words << 16), same_bits<Lanes>(words & 0xFFFF0000U)};
}

/// The place in a row's 2 kLanes elements of what `load_pair` has in a lane.
constexpr std::size_t place(const float*, std::size_t half, std::size_t lane) { return half * kLanes + lane; }
constexpr std::size_t place(const Bf16*, std::size_t half, std::size_t lane) { return 2 * lane + half; }

/// The first `count` lanes of a row's end, 0 beyond; reads no further than the memory's `end`.
template <class T>
Lanes load_some(const T* from, std::size_t count, const T* end) {
  if (from + kLanes <= end) {
    Words mask;
    for (std::size_t lane = 0; lane < kLanes; ++lane) mask[lane] = lane < count ? ~0U : 0U;
    return same_bits<Lanes>(same_bits<Words>(load(from)) & mask);
  }
  T rest[kLanes] = {};
  for (std::size_t lane = 0; lane < count; ++lane) rest[lane] = from[lane];
  return load(rest);
}

// --- AMX ---------------------------------------------------------------------------------------

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define ZTP_AMX

/// Whether the system lets this process use tiles.
bool may_use_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool may = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return may;
}

float largest(const Lanes& values) {
  float most = values[0];
  for (std::size_t lane = 1; lane < kLanes; ++lane) most = values[lane] > most ? values[lane] : most;
  return most;
}

/// Eight tiles of 16 rows of 64 bytes, while it lives; then those of before, which the library may count on.
class Tiles {
 public:
  Tiles() {
    const Shapes shapes;
    order();
    _tile_storeconfig(&before_);
    order();
    _tile_loadconfig(&shapes);
  }
  ~Tiles() {
    order();
    // Where there were none, what was stored is not a configuration to load.
    if (before_.palette == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(&before_);
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  /// Some releases of GCC do not know what memory these instructions read and write: nothing is moved across this.
  static void order() { asm volatile("" ::: "memory"); }

 private:
  struct alignas(64) Shapes {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  Shapes before_;
};

/// One step of turning a square of words: swaps what lies across a diagonal of blocks.
template <std::size_t size>
void swap_blocks(Words* rows) {
  Words low, high;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    const bool upper = (lane & size) != 0;
    low[lane] = static_cast<std::uint32_t>(upper ? kLanes + (lane ^ size) : lane);
    high[lane] = static_cast<std::uint32_t>(upper ? kLanes + lane : lane ^ size);
  }
  for (std::size_t row = 0; row < kLanes; ++row) {
    if (row & size) continue;
    const Words first = rows[row], second = rows[row + size];
    rows[row] = pick(first, second, low);
    rows[row + size] = pick(first, second, high);
  }
}

/// Rows become columns.
void turn(Words* rows) {
  swap_blocks<1>(rows);
  swap_blocks<2>(rows);
  swap_blocks<4>(rows);
  swap_blocks<8>(rows);
}
#endif

// --- one image ---------------------------------------------------------------------------------

/// A stage's fixed numbers; `boosted` is the class token's slot, -1 where it starts as the others do.
struct Numbers {
  std::int64_t kept = 1, similar = 0, rounds = 1, special = 0, boosted = -1;
  bool renormalise = false, mean = false, cosine = true, bounded = true, exponentials = false;
  float low = 0, high = 0;
};

struct Sizes {
  std::size_t batch, heads, tokens, row, width;
};

/// Where one image's results go.
struct Results {
  float *sums, *kept, *pre_score, *pre_spread, *similarity, *score, *spread;
};

/// Memory that one image needs, used again by the next.
struct Scratch {
  std::vector<float> received, sums, weights, start, start_of_survivors, mask, dropped, features, inverse, best, combined,
      inverse_of_columns;
  std::vector<std::int32_t> order, going;
  std::vector<std::uint32_t> tiles;
};

class Pool {
 public:
  std::unique_ptr<Scratch> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return std::make_unique<Scratch>();
    auto taken = std::move(free_.back());
    free_.pop_back();
    return taken;
  }
  void give(std::unique_ptr<Scratch> scratch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(scratch));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Scratch>> free_;
};

/// Slots of the `count` largest scores, best first, ties to the lower index: a score's place is how many are ahead.
template <class Slot>
void top_k(const float* scores, std::size_t tokens, std::size_t count, Slot* slots) {
  std::fill_n(slots, count, Slot{});  // NaN has no place
  for (std::size_t token = 0; token < tokens; ++token) {
    const float own = scores[token];
    std::int32_t ahead = 0;
    for (std::size_t other = 0; other < token; ++other) ahead += scores[other] >= own ? 1 : 0;
    for (std::size_t other = token + 1; other < tokens; ++other) ahead += scores[other] > own ? 1 : 0;
    if (static_cast<std::size_t>(ahead) < count) slots[ahead] = static_cast<Slot>(token);
  }
}

/// Start vector of a vote, mean 1 over `participants`: √participants times the others for the class token.
void start_scores(std::vector<float>& start, std::size_t tokens, std::size_t participants, std::int64_t boosted) {
  double total = static_cast<double>(participants);
  const double boost = std::sqrt(total);
  if (boosted >= 0) total += boost - 1;
  const auto scale = static_cast<float>(static_cast<double>(participants) / total);
  start.assign(tokens, scale);
  if (boosted >= 0) start[static_cast<std::size_t>(boosted)] = static_cast<float>(boost) * scale;
}

template <class T>
class Image {
 public:
  Image(const Numbers& numbers, const Sizes& sizes, const T* attention, const T* keys, const T* end_of_attention,
        const T* end_of_keys, const Results& results, Scratch& scratch, bool parallel)
      : numbers_(numbers),
        sizes_(sizes),
        attention_(attention),
        keys_(keys),
        end_of_attention_(end_of_attention),
        end_of_keys_(end_of_keys),
        results_(results),
        scratch_(scratch),
        parallel_(parallel),
        tokens_(sizes.tokens),
        patches_(sizes.tokens - special()),
        padded_((sizes.tokens + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes)) {
    for (std::size_t half = 0; half < 2; ++half) {
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        last_[half][lane] = place(attention, half, lane) < tokens_ % (2 * kLanes) ? ~0U : 0U;
      }
    }
  }

  void select() {
    const auto similar = static_cast<std::size_t>(numbers_.similar);
    scratch_.received.resize(sizes_.heads * padded_);
    scratch_.weights.resize(sizes_.heads * padded_);
    scratch_.sums.resize(sizes_.heads * padded_);
    scratch_.combined.resize(padded_);
    scratch_.mask.assign(padded_, 1.0F);
    std::fill(scratch_.mask.begin() + static_cast<std::ptrdiff_t>(tokens_), scratch_.mask.end(), 0.0F);
    scratch_.dropped.assign(padded_, 0.0F);
    start_scores(scratch_.start_of_survivors, tokens_, tokens_ - similar, numbers_.boosted);
    if (similar == 0) {
      importance(static_cast<std::size_t>(numbers_.rounds), scratch_.start_of_survivors, false, results_.spread);
    } else {
      start_scores(scratch_.start, tokens_, tokens_, numbers_.boosted);
      importance(1, scratch_.start, false, results_.pre_spread);
      const float* pre_score = scratch_.combined.data() + special();
      std::copy_n(pre_score, patches_, results_.pre_score);
      scratch_.order.resize(patches_);
      top_k(pre_score, patches_, patches_, scratch_.order.data());
      drop(similar);
      importance(static_cast<std::size_t>(numbers_.rounds), scratch_.start_of_survivors, true, results_.spread);
      // Dropped ones rank below a survivor's 0.
      for (std::size_t token = 0; token < tokens_; ++token) scratch_.combined[token] -= scratch_.dropped[token];
    }
    std::copy_n(scratch_.combined.data() + special(), patches_, results_.score);
    top_k(results_.score, patches_, static_cast<std::size_t>(numbers_.kept), results_.kept);
  }

 private:
  std::size_t special() const { return static_cast<std::size_t>(numbers_.special); }

  template <class Work>
  void each(std::size_t count, const Work& work) const {
    const int threads = parallel_ ? static_cast<int>(std::min<std::size_t>(count, parallel_get_max_threads())) : 1;
    ov::parallel_nt_static(threads, [&](int thread, int of) {
      const std::size_t first = count * static_cast<std::size_t>(thread) / static_cast<std::size_t>(of);
      const std::size_t last = count * static_cast<std::size_t>(thread + 1) / static_cast<std::size_t>(of);
      for (std::size_t number = first; number < last; ++number) work(number);
    });
  }

  const T* row(std::size_t head, std::size_t token) const {
    return attention_ + (head * tokens_ + token) * sizes_.row;
  }

  /// Sums of a row's elements, each times its mask.
  float row_sum(const T* from, const float* mask) const {
    Lanes total{};
    std::size_t token = 0;
    for (; token + kLanes <= tokens_; token += kLanes) total += load(from + token) * load(mask + token);
    if (token < tokens_) total += load_some(from + token, tokens_ - token, end_of_attention_) * load(mask + token);
    return sum(total);
  }

  /// A row's last elements, 0 beyond.
  Pair last(const T* from) const {
    const std::size_t count = tokens_ % (2 * kLanes);
    T rest[2 * kLanes] = {};
    if (from + 2 * kLanes > end_of_attention_) {
      for (std::size_t number = 0; number < count; ++number) rest[number] = from[number];
      from = rest;
    }
    const Pair pair = load_pair(from);
    return {same_bits<Lanes>(same_bits<Words>(pair.first) & last_[0]),
            same_bits<Lanes>(same_bits<Words>(pair.second) & last_[1])};
  }

  float row_sum(const T* from) const {
    Lanes first{}, second{};
    std::size_t token = 0;
    for (; token + 2 * kLanes <= tokens_; token += 2 * kLanes) {
      const Pair pair = load_pair(from + token);
      first += pair.first;
      second += pair.second;
    }
    if (token < tokens_) {
      const Pair pair = last(from + token);
      first += pair.first;
      second += pair.second;
    }
    return sum(first + second);
  }

  /// Adds `count` rows, each times its weight, to what the tokens receive, in the order of pairs.
  template <std::size_t count>
  void add(const T* const* rows, const float* weights, float* received) const {
    const auto one = [&](std::size_t token, const auto& element) {
      Lanes first = load(received + token), second = load(received + token + kLanes);
      for (std::size_t number = 0; number < count; ++number) {
        const Pair pair = element(rows[number] + token);
        first += weights[number] * pair.first;
        second += weights[number] * pair.second;
      }
      store(received + token, first);
      store(received + token + kLanes, second);
    };
    std::size_t token = 0;
    for (; token + 2 * kLanes <= tokens_; token += 2 * kLanes) one(token, [](const T* from) { return load_pair(from); });
    if (token < tokens_) one(token, [&](const T* from) { return last(from); });
  }

  /// From the order of pairs to that of the tokens.
  void in_order(float* received) const {
    for (std::size_t begin = 0; begin < padded_; begin += 2 * kLanes) {
      float ordered[2 * kLanes];
      for (std::size_t half = 0; half < 2; ++half) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
          ordered[place(attention_, half, lane)] = received[begin + half * kLanes + lane];
        }
      }
      std::copy_n(ordered, 2 * kLanes, received + begin);
    }
  }

  /// One round: what each token receives of votes that go along the rows of attention.
  void receive(std::size_t head, const float* votes, float* received) const {
    std::fill_n(received, padded_, 0.0F);
    const T* rows[kRows];
    float weights[kRows];
    std::size_t waiting = 0;
    for (std::size_t token = 0; token < tokens_; ++token) {
      if (votes[token] == 0) continue;
      rows[waiting] = row(head, token);
      weights[waiting] = votes[token];
      if (++waiting == kRows) {
        add<kRows>(rows, weights, received);
        waiting = 0;
      }
    }
    for (std::size_t number = 0; number < waiting; ++number) add<1>(rows + number, weights + number, received);
    in_order(received);
  }

  /// The first vote, with the row sums on the way, so that attention comes from memory once.
  void receive_and_sum(std::size_t head, const float* start, float* sums, float* received) const {
    std::fill_n(received, padded_, 0.0F);
    const T* rows[kRows];
    float weights[kRows];
    for (std::size_t first = 0; first < tokens_; first += kRows) {
      const std::size_t count = std::min(kRows, tokens_ - first);
      for (std::size_t number = 0; number < count; ++number) {
        const std::size_t token = first + number;
        rows[number] = row(head, token);
        sums[token] = row_sum(rows[number]);
        weights[number] = start[token] / sums[token];
      }
      if (count == kRows) {
        add<kRows>(rows, weights, received);
      } else {
        for (std::size_t number = 0; number < count; ++number) add<1>(rows + number, weights + number, received);
      }
    }
    in_order(received);
  }

  /// WPR of one head: its scores, 0 outside the survivors.
  void vote(std::size_t head, std::size_t rounds, const std::vector<float>& start, bool survivors) {
    float* received = scratch_.received.data() + head * padded_;
    float* votes = scratch_.weights.data() + head * padded_;
    float* sums = scratch_.sums.data() + head * padded_;
    const float* mask = scratch_.mask.data();
    std::size_t done = 0;
    if (!survivors) {
      if (numbers_.exponentials) {
        receive_and_sum(head, start.data(), sums, received);
        std::copy_n(sums, tokens_, results_.sums + head * tokens_);
        done = 1;
      } else {
        std::fill_n(sums, tokens_, 1.0F);
        std::copy_n(sums, tokens_, results_.sums + head * tokens_);
      }
    }
    for (; done < rounds; ++done) {
      const float* score = done ? received : start.data();
      for (std::size_t token = 0; token < tokens_; ++token) {
        float given = score[token] / sums[token];
        if (survivors) given *= mask[token];
        votes[token] = given;
      }
      if (survivors && numbers_.renormalise) {
        for (std::size_t token = 0; token < tokens_; ++token) {
          if (votes[token] == 0) continue;
          // A row whose whole attention went to dropped tokens underflows to 0 and must not turn into NaN.
          votes[token] /= std::max(row_sum(row(head, token), mask) / sums[token], 1e-30F);
        }
      }
      receive(head, votes, received);
      if (survivors && !numbers_.renormalise) {
        float total = 0;
        for (std::size_t token = 0; token < tokens_; ++token) total += received[token] *= mask[token];
        const float mean = std::max(total / static_cast<float>(tokens_ - static_cast<std::size_t>(numbers_.similar)),
                                    1e-30F);
        for (std::size_t token = 0; token < tokens_; ++token) received[token] /= mean;
      }
    }
    if (survivors && numbers_.renormalise) {
      for (std::size_t token = 0; token < tokens_; ++token) received[token] *= mask[token];
    }
  }

  /// WPR, VHF and EIR in one: scores of all tokens and the heads' spreads.
  void importance(std::size_t rounds, const std::vector<float>& start, bool survivors, float* spread) {
    each(sizes_.heads, [&](std::size_t head) {
      vote(head, rounds, start, survivors);
      const float* received = scratch_.received.data() + head * padded_;
      const float* mask = scratch_.mask.data();
      Lanes squares{};
      for (std::size_t token = 0; token < padded_; token += kLanes) {
        const Lanes deviation = load(received + token) - load(mask + token);
        squares += deviation * deviation;
      }
      spread[head] = std::sqrt(sum(squares));
    });
    float* combined = scratch_.combined.data();
    std::fill_n(combined, padded_, 0.0F);
    for (std::size_t head = 0; head < sizes_.heads; ++head) {
      const float* received = scratch_.received.data() + head * padded_;
      const float* bounds = survivors || numbers_.similar == 0 ? bounds_ + 2 : bounds_;
      const bool within = !numbers_.bounded || (spread[head] >= bounds[0] && spread[head] <= bounds[1]);
      const float weight = within ? 1.0F : 1e-12F;
      for (std::size_t token = 0; token < padded_; ++token) {
        const float weighted = received[token] * weight;
        combined[token] += numbers_.mean ? weighted : weighted * weighted;
      }
    }
    if (!numbers_.mean) {
      for (std::size_t token = 0; token < padded_; ++token) combined[token] = std::sqrt(combined[token]);
    }
  }

  /// S: drops the `similar` tokens of the less important half that resemble one of the more important half most.
  void drop(std::size_t similar) {
    const std::size_t less = patches_ / 2, more = patches_ - less;
    scratch_.inverse.resize(patches_);
    scratch_.best.resize(less);
    scratch_.going.resize(similar);
#ifdef ZTP_AMX
    if (std::is_same_v<T, Bf16> && may_use_tiles()) {
      match_in_tiles(less, more);
    } else {
      match(less, more);
    }
#else
    match(less, more);
#endif
    std::copy_n(scratch_.best.data(), less, results_.similarity);
    top_k(scratch_.best.data(), less, similar, scratch_.going.data());
    for (std::size_t number = 0; number < similar; ++number) {
      const std::size_t token =
          special() + static_cast<std::size_t>(scratch_.order[more + static_cast<std::size_t>(scratch_.going[number])]);
      scratch_.dropped[token] = 1;
      scratch_.mask[token] = 0;
    }
  }

  /// The best likeness of each token of the less important half.
  void match(std::size_t less, std::size_t more) {
    const std::size_t width = padded(sizes_.width);
    const std::int32_t* order = scratch_.order.data();
    scratch_.features.resize(patches_ * width);
    each(patches_, [&](std::size_t place) {
      const T* key = keys_ + (special() + static_cast<std::size_t>(order[place])) * sizes_.width;
      float* feature = scratch_.features.data() + place * width;
      Lanes squares{};
      std::size_t at = 0;
      for (; at + kLanes <= sizes_.width; at += kLanes) {
        const Lanes part = load(key + at);
        store(feature + at, part);
        squares += part * part;
      }
      if (at < sizes_.width) {
        const Lanes part = load_some(key + at, sizes_.width - at, end_of_keys_);
        store(feature + at, part);
        squares += part * part;
      }
      scratch_.inverse[place] = numbers_.cosine ? 1 / std::max(std::sqrt(sum(squares)), 1e-12F) : 1.0F;
    });
    // A few blocks of rows at a time stay in the nearest cache while the columns pass by.
    const std::size_t blocks = (less + kRows - 1) / kRows, groups = (blocks + kBlocks - 1) / kBlocks;
    each(groups, [&](std::size_t group) {
      const std::size_t begin = group * kBlocks, count = std::min(kBlocks, blocks - begin);
      Lanes best[kBlocks];
      for (Lanes& block : best) block = Lanes{} - INFINITY;
      for (std::size_t column = 0; column < more; column += kColumns) {
        for (std::size_t block = 0; block < count; ++block) {
          const Lanes likeness = compare((begin + block) * kRows, column, width);
          best[block] = likeness > best[block] ? likeness : best[block];
        }
      }
      for (std::size_t row = 0; row < count * kRows && begin * kRows + row < less; ++row) {
        const std::size_t first = row % kRows * kColumns;
        float most = best[row / kRows][first];
        for (std::size_t column = 1; column < kColumns; ++column) most = std::max(most, best[row / kRows][first + column]);
        const std::size_t place = begin * kRows + row;
        scratch_.best[place] = most * scratch_.inverse[more + place];
      }
    });
  }

#ifdef ZTP_AMX
  /// The same on AMX: tiles of 16 tokens by 32 elements, two by two.
  void match_in_tiles(std::size_t less, std::size_t more) {
    const std::size_t steps = (sizes_.width + 31) / 32, rows = (less + 31) / 32 * 32, columns = (more + 31) / 32 * 32;
    // Tiles one after the other, 256 words each; those of the better half turned, pairs of elements first.
    scratch_.tiles.resize((rows + columns) * steps * 16);
    scratch_.inverse_of_columns.resize(columns);
    std::uint32_t* ones = scratch_.tiles.data();
    std::uint32_t* others = ones + rows * steps * 16;
    const auto prepare = [&](std::size_t tile, std::size_t begin, std::size_t count, std::uint32_t* to, bool turned) {
      // The last token again where there is none.
      const Bf16* keys[16];
      Lanes squares[16] = {};
      for (std::size_t row = 0; row < 16; ++row) {
        const std::size_t place = begin + std::min(tile * 16 + row, count - 1);
        const std::size_t token = special() + static_cast<std::size_t>(scratch_.order[place]);
        keys[row] = reinterpret_cast<const Bf16*>(keys_) + token * sizes_.width;
      }
      for (std::size_t step = 0; step < steps; ++step) {
        const std::size_t left = std::min<std::size_t>(32, sizes_.width - step * 32);
        const __mmask32 there = left == 32 ? ~0U : (1U << left) - 1;
        Words words[16];
        for (std::size_t row = 0; row < 16; ++row) {
          const __m512i part = _mm512_maskz_loadu_epi16(there, keys[row] + step * 32);
          words[row] = same_bits<Words>(part);
          const auto pairs = same_bits<__m512bh>(part);
          squares[row] = same_bits<Lanes>(_mm512_dpbf16_ps(same_bits<__m512>(squares[row]), pairs, pairs));
        }
        if (turned) turn(words);
        std::memcpy(to + (tile * steps + step) * 256, words, sizeof words);
      }
      const Lanes lengths = sums(squares);
      float inverse[16];
      for (std::size_t row = 0; row < 16; ++row) {
        inverse[row] = numbers_.cosine ? 1 / std::max(std::sqrt(lengths[row]), 1e-12F) : 1.0F;
      }
      if (turned) {
        std::copy_n(inverse, 16, scratch_.inverse_of_columns.data() + tile * 16);
      } else {
        std::copy_n(inverse, std::min<std::size_t>(16, count - std::min(count, tile * 16)),
                    scratch_.inverse.data() + begin + tile * 16);
      }
    };
    for (std::size_t tile = 0; tile < rows / 16; ++tile) prepare(tile, more, less, ones, false);
    for (std::size_t tile = 0; tile < columns / 16; ++tile) prepare(tile, 0, more, others, true);
    const Tiles tiles;
    Tiles::order();
    for (std::size_t row = 0; row < rows; row += 32) {
      Lanes best[32];
      for (Lanes& each_row : best) each_row = Lanes{} - INFINITY;
      for (std::size_t column = 0; column < columns; column += 32) {
        const std::uint32_t* left = ones + row * steps * 16;
        const std::uint32_t* right = others + column * steps * 16;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (std::size_t step = 0; step < steps; ++step) {
          _tile_loadd(4, left + step * 256, 64);
          _tile_loadd(5, left + (steps + step) * 256, 64);
          _tile_loadd(6, right + step * 256, 64);
          _tile_loadd(7, right + (steps + step) * 256, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        float products[4][16][16];
        _tile_stored(0, products[0], 64);
        _tile_stored(1, products[1], 64);
        _tile_stored(2, products[2], 64);
        _tile_stored(3, products[3], 64);
        Tiles::order();
        for (std::size_t tile = 0; tile < 4; ++tile) {
          const Lanes inverse = load(scratch_.inverse_of_columns.data() + column + tile % 2 * 16);
          for (std::size_t number = 0; number < 16; ++number) {
            Lanes& most = best[tile / 2 * 16 + number];
            const Lanes likeness = load(products[tile][number]) * inverse;
            most = likeness > most ? likeness : most;
          }
        }
      }
      for (std::size_t number = 0; number < 32 && row + number < less; ++number) {
        scratch_.best[row + number] = largest(best[number]) * scratch_.inverse[more + row + number];
      }
    }
  }
#endif

  /// Likeness of kRows tokens of the less important half to kColumns of the other, row by row.
  Lanes compare(std::size_t row, std::size_t column, std::size_t width) const {
    const std::size_t less = patches_ / 2, more = patches_ - less;
    const float* ones[kRows];
    const float* others[kColumns];
    Lanes inverse;
    // The last one again where there is none.
    for (std::size_t number = 0; number < kRows; ++number) {
      ones[number] = scratch_.features.data() + (more + std::min(row + number, less - 1)) * width;
    }
    for (std::size_t number = 0; number < kColumns; ++number) {
      const std::size_t other = std::min(column + number, more - 1);
      others[number] = scratch_.features.data() + other * width;
      for (std::size_t one = 0; one < kRows; ++one) inverse[one * kColumns + number] = scratch_.inverse[other];
    }
    Lanes products[kRows * kColumns] = {};
    for (std::size_t at = 0; at < width; at += kLanes) {
      Lanes right[kColumns];
      for (std::size_t number = 0; number < kColumns; ++number) right[number] = load(others[number] + at);
      for (std::size_t one = 0; one < kRows; ++one) {
        const Lanes left = load(ones[one] + at);
        for (std::size_t number = 0; number < kColumns; ++number) {
          products[one * kColumns + number] += left * right[number];
        }
      }
    }
    static_assert(kRows * kColumns == kLanes);
    return sums(products) * inverse;
  }

  static float bound(float variance, std::size_t participants) {
    return static_cast<float>(std::sqrt(static_cast<double>(participants) * static_cast<double>(variance)));
  }

  const Numbers& numbers_;
  const Sizes& sizes_;
  const T* attention_;
  const T* keys_;
  const T* end_of_attention_;
  const T* end_of_keys_;
  const Results& results_;
  Scratch& scratch_;
  bool parallel_;
  std::size_t tokens_, patches_, padded_;
  Words last_[2];
  /// VHF's bounds of the spread among all tokens, then among the survivors.
  float bounds_[4] = {bound(numbers_.low, tokens_), bound(numbers_.high, tokens_),
                      bound(numbers_.low, tokens_ - static_cast<std::size_t>(numbers_.similar)),
                      bound(numbers_.high, tokens_ - static_cast<std::size_t>(numbers_.similar))};
};

// --- the operator ------------------------------------------------------------------------------

class ZeroTPruneStage : public ov::op::Op {
 public:
  OPENVINO_OP("ZeroTPruneStage", "ztp_deploy");

  ZeroTPruneStage() = default;
  ZeroTPruneStage(const ov::OutputVector& arguments, const Numbers& numbers) : Op(arguments), numbers_(numbers) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    const ov::PartialShape shape = get_input_partial_shape(0);
    const ov::element::Type type = get_input_element_type(0);
    NODE_VALIDATION_CHECK(this, type == ov::element::f32 || type == ov::element::bf16, "takes f32 or bf16");
    NODE_VALIDATION_CHECK(this, type == get_input_element_type(1), "takes attention and keys of one type");
    NODE_VALIDATION_CHECK(this, shape.rank().is_static() && shape.size() >= 4, "takes attention [B, H, N, M]");
    const std::size_t first = shape.size() - 4;
    const ov::Dimension batch = shape[first], heads = shape[first + 1], tokens = shape[first + 2];
    const bool known = heads.is_static() && tokens.is_static();
    set_output_type(0, ov::element::f32, {batch, heads, tokens, 1});
    set_output_type(1, ov::element::f32,
                    {batch, known ? ov::Dimension(report(heads.get_length(), tokens.get_length())) : ov::Dimension(), 1});
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& arguments) const override {
    return std::make_shared<ZeroTPruneStage>(arguments, numbers_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("kept", numbers_.kept);
    visitor.on_attribute("similar", numbers_.similar);
    visitor.on_attribute("rounds", numbers_.rounds);
    visitor.on_attribute("special", numbers_.special);
    visitor.on_attribute("boosted", numbers_.boosted);
    visitor.on_attribute("renormalise", numbers_.renormalise);
    visitor.on_attribute("mean", numbers_.mean);
    visitor.on_attribute("cosine", numbers_.cosine);
    visitor.on_attribute("bounded", numbers_.bounded);
    visitor.on_attribute("exponentials", numbers_.exponentials);
    visitor.on_attribute("low", numbers_.low);
    visitor.on_attribute("high", numbers_.high);
    return true;
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    ov::Shape attention = inputs[0].get_shape();
    attention.erase(attention.begin(), attention.end() - 4);
    const Sizes sizes{attention[0], attention[1], attention[2], attention[3], inputs[1].get_shape().back()};
    if (inputs[0].get_element_type() == ov::element::bf16) {
      run(outputs, sizes, static_cast<const Bf16*>(inputs[0].data()), static_cast<const Bf16*>(inputs[1].data()));
    } else {
      run(outputs, sizes, static_cast<const float*>(inputs[0].data()), static_cast<const float*>(inputs[1].data()));
    }
    return true;
  }

 private:
  template <class T>
  void run(ov::TensorVector& outputs, const Sizes& sizes, const T* attention, const T* keys) const {
    const std::size_t kept = static_cast<std::size_t>(numbers_.kept), pre = numbers_.similar > 0 ? 1 : 0;
    const std::size_t patches = sizes.tokens - static_cast<std::size_t>(numbers_.special);
    const auto length =
        static_cast<std::size_t>(report(static_cast<std::int64_t>(sizes.heads), static_cast<std::int64_t>(sizes.tokens)));
    outputs[0].set_shape({sizes.batch, sizes.heads, sizes.tokens, 1});
    outputs[1].set_shape({sizes.batch, length, 1});
    auto* sums = static_cast<float*>(outputs[0].data());
    auto* reports = static_cast<float*>(outputs[1].data());
    const std::size_t per_attention = sizes.heads * sizes.tokens * sizes.row, per_keys = sizes.tokens * sizes.width;
    const T* end_of_attention = attention + sizes.batch * per_attention;
    const T* end_of_keys = keys + sizes.batch * per_keys;
    const auto threads = static_cast<std::size_t>(parallel_get_max_threads());
    const bool within = sizes.batch < threads;
    const auto one = [&](std::size_t image) {
      Results results{};
      results.sums = sums + image * sizes.heads * sizes.tokens;
      results.pre_spread = reports + image * length;
      results.spread = results.pre_spread + pre * sizes.heads;
      results.kept = results.spread + sizes.heads;
      results.pre_score = results.kept + kept;
      results.similarity = results.pre_score + pre * patches;
      results.score = results.similarity + pre * (patches / 2);
      auto scratch = pool().take();
      Image<T>(numbers_, sizes, attention + image * per_attention, keys + image * per_keys, end_of_attention,
               end_of_keys, results, *scratch, within)
          .select();
      pool().give(std::move(scratch));
    };
    const int workers = static_cast<int>(std::min(sizes.batch, threads));
    ov::parallel_nt_static(workers, [&](int thread, int count) {
      const std::size_t first = sizes.batch * static_cast<std::size_t>(thread) / static_cast<std::size_t>(count);
      const std::size_t last = sizes.batch * static_cast<std::size_t>(thread + 1) / static_cast<std::size_t>(count);
      for (std::size_t image = first; image < last; ++image) one(image);
    });
  }

  /// Length of the report.
  std::int64_t report(std::int64_t heads, std::int64_t tokens) const {
    const std::int64_t patches = tokens - numbers_.special;
    return numbers_.kept + patches + heads + (numbers_.similar > 0 ? patches + heads + patches / 2 : 0);
  }

  static Pool& pool() {
    static Pool pool;
    return pool;
  }

  Numbers numbers_;
};

}  // namespace

OPENVINO_CREATE_EXTENSIONS(
    std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<ZeroTPruneStage>>()}));
