// One instance; setup.py compiles this file once for each, with the macros of its table.

#include "sm80.cuh"

namespace fused_resnet::conv {

extern const Instance FUSED_RESNET_SYMBOL;
const Instance FUSED_RESNET_SYMBOL =
    Sm80<FUSED_RESNET_ELEMENT, FUSED_RESNET_TILE_M, FUSED_RESNET_TILE_N, FUSED_RESNET_WARPS_M, FUSED_RESNET_WARPS_N,
         FUSED_RESNET_STAGES>::instance(FUSED_RESNET_NAME, Dtype::FUSED_RESNET_DTYPE);

}  // namespace fused_resnet::conv
