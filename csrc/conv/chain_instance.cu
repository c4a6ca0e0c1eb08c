// One kernel in each dtype; setup.py compiles this file once for each, with the macros of its table.

#include "chain_lines_sm90.cuh"
#include "chain_sm90.cuh"

namespace fused_resnet::conv {

template <class Element>
using Kernel = FUSED_RESNET_KERNEL<Element, FUSED_RESNET_FOLLOWING, FUSED_RESNET_SEGMENT>;
FUSED_RESNET_DEFINE(ChainInstance, Kernel, __half, __nv_bfloat16)

}  // namespace fused_resnet::conv
