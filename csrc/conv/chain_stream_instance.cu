// One instance; setup.py compiles this file once for each, with the macros of its table.

#include "chain_stream_sm90.cuh"

namespace fused_resnet::conv {

extern const ChainInstance FUSED_RESNET_SYMBOL;
const ChainInstance FUSED_RESNET_SYMBOL = ChainStreamSm90<FUSED_RESNET_ELEMENT>::instance(FUSED_RESNET_NAME);

}  // namespace fused_resnet::conv
