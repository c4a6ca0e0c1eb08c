// One kernel in each dtype; setup.py compiles this file once for each, with the macros of its table.

#include "sm80.cuh"

namespace fused_resnet::conv {

template <class Element>
using Kernel = Sm80<Element, FUSED_RESNET_TILE_M, FUSED_RESNET_TILE_N, FUSED_RESNET_WARPS_M, FUSED_RESNET_WARPS_N,
                    FUSED_RESNET_STAGES>;
FUSED_RESNET_DEFINE(Instance, Kernel, __half, __nv_bfloat16)

}  // namespace fused_resnet::conv
