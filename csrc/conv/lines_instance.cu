// One instance; setup.py compiles this file once for each, with the macros of its table.

#include "lines_sm90.cuh"

namespace fused_resnet::conv {

extern const Instance FUSED_RESNET_SYMBOL;
const Instance FUSED_RESNET_SYMBOL = LinesSm90<FUSED_RESNET_ELEMENT>::instance(FUSED_RESNET_NAME);

}  // namespace fused_resnet::conv
