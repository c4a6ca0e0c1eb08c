// One kernel in each dtype; setup.py compiles this file once for each, with the macros of its table.

#include "chain_stream_sm90.cuh"

namespace fused_resnet::conv {

template <class Element>
using Kernel = ChainStreamSm90<Element>;
FUSED_RESNET_DEFINE(ChainInstance, Kernel, __half, __nv_bfloat16)

}  // namespace fused_resnet::conv
