// One instance; setup.py compiles this file once for each, with the macros of its table.

#include "chain_lines_sm90.cuh"
#include "chain_sm90.cuh"

namespace fused_resnet::conv {

extern const ChainInstance FUSED_RESNET_SYMBOL;
using Kernel = FUSED_RESNET_KERNEL<FUSED_RESNET_ELEMENT, FUSED_RESNET_FOLLOWING, FUSED_RESNET_SEGMENT>;
const ChainInstance FUSED_RESNET_SYMBOL = Kernel::instance(FUSED_RESNET_NAME);

}  // namespace fused_resnet::conv
