/// From what an engine says of its slots to what Outputs says of patches.
#pragma once

#include <cstddef>

#include "folder.h"

namespace ztp {

/// Tokens of every stage, for a batch, in the engine's slot order.
struct Slots {
  std::vector<std::vector<std::int32_t>> kept;    ///< [batch, k] positions, -1 masked
  std::vector<std::vector<std::int32_t>> merged;  ///< [batch, n] slots that entering ones went into; empty: none did
};

/// Fills `kept` and `assignment` of outputs whose `batch` is set. Throws GateFailed where tokens cannot be.
void report_tokens(const EngineFolder& folder, const Slots& slots, Outputs& outputs);

}  // namespace ztp
