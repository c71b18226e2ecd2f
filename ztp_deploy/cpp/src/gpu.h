/// NVIDIA GPUs, asked of the driver itself: no back end's library need be there.
#pragma once

#include <string>
#include <vector>

namespace ztp {

/// One CUDA device as the driver names it.
struct Gpu {
  std::string name;
  std::string compute_capability;  ///< such as 9.0
};

/// In the order of CUDA's device numbers; empty without driver or device.
std::vector<Gpu> gpus();

}  // namespace ztp
