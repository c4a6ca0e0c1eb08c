// Places in shared memory that are filled and emptied in turn.

#pragma once

#include <cstdint>

#include "geometry.h"

namespace fused_resnet::conv {

// A ring's next place and the parity of its phase.
template <int Size>
struct Ring {
  int at = 0;
  uint32_t phase = 0;

  FUSED_RESNET_HD constexpr void advance() {
    if (++at == Size) at = 0, phase ^= 1;
  }
};

}  // namespace fused_resnet::conv
