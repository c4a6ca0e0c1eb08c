// One kernel in each dtype; setup.py compiles this file once for each, with the macros of its table.

#include "sm90.cuh"

namespace fused_resnet::conv {

template <class Element>
using Kernel = Sm90<Element, FUSED_RESNET_TILE_M, FUSED_RESNET_TILE_N, FUSED_RESNET_CLUSTER_M, FUSED_RESNET_CLUSTER_N,
                    Schedule::FUSED_RESNET_SCHEDULE>;
FUSED_RESNET_DEFINE(Instance, Kernel, cutlass::half_t, cutlass::bfloat16_t)

}  // namespace fused_resnet::conv
