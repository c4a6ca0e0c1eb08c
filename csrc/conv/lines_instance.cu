// One kernel in each dtype; setup.py compiles this file once for each, with the macros of its table.

#include "lines_sm90.cuh"

namespace fused_resnet::conv {

template <class Element>
using Kernel = LinesSm90<Element>;
FUSED_RESNET_DEFINE(Instance, Kernel, __half, __nv_bfloat16)

}  // namespace fused_resnet::conv
