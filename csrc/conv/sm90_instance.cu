// One instance; setup.py compiles this file once for each, with the macros of its table.

#include "sm90.cuh"

namespace fused_resnet::conv {

extern const Instance FUSED_RESNET_SYMBOL;
const Instance FUSED_RESNET_SYMBOL =
    Sm90<cutlass::FUSED_RESNET_ELEMENT, FUSED_RESNET_TILE_M, FUSED_RESNET_TILE_N, FUSED_RESNET_CLUSTER,
         Schedule::FUSED_RESNET_SCHEDULE>::instance(FUSED_RESNET_NAME);

}  // namespace fused_resnet::conv
