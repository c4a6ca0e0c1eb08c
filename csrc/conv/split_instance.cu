// One kernel in each dtype; setup.py compiles this file once for each, with the macros of its table.

#include "split_sm90.cuh"

namespace fused_resnet::conv {

template <class Element>
using Kernel = SplitSm90<Element, FUSED_RESNET_SPLITS>;
FUSED_RESNET_DEFINE(Instance, Kernel, __half, __nv_bfloat16)

}  // namespace fused_resnet::conv
