// Registers the launcher of csrc/chain.cu, compiled against the stand-ins beside this file, for CPU tensors.

#include <torch/csrc/stable/library.h>

#include "emulated_shim.h"
#include "emulated_sm90.h"
//
#include "chain.h"
#include "conv/chain_lines_sm90.cuh"
#include "conv/chain_sm90.cuh"
#include "conv/chain_stream_sm90.cuh"

namespace fused_resnet::conv {

#define FUSED_RESNET_EMULATED_CHAIN(symbol, ...) \
  extern const ChainInstance symbol;             \
  const ChainInstance symbol = __VA_ARGS__::instance(#symbol);

FUSED_RESNET_EMULATED_CHAIN(kHalfChain64, ChainSm90<__half, 1, false>)
FUSED_RESNET_EMULATED_CHAIN(kHalfChain128, ChainSm90<__half, 2, false>)
FUSED_RESNET_EMULATED_CHAIN(kHalfChainSegment, ChainSm90<__half, 1, true>)
FUSED_RESNET_EMULATED_CHAIN(kBfloatChain64, ChainSm90<__nv_bfloat16, 1, false>)
FUSED_RESNET_EMULATED_CHAIN(kHalfLines64, ChainLinesSm90<__half, 1, false>)
FUSED_RESNET_EMULATED_CHAIN(kHalfLines128, ChainLinesSm90<__half, 2, false>)
FUSED_RESNET_EMULATED_CHAIN(kHalfLinesSegment, ChainLinesSm90<__half, 1, true>)
FUSED_RESNET_EMULATED_CHAIN(kBfloatLines64, ChainLinesSm90<__nv_bfloat16, 1, false>)
FUSED_RESNET_EMULATED_CHAIN(kHalfStream, ChainStreamSm90<__half>)
FUSED_RESNET_EMULATED_CHAIN(kBfloatStream, ChainStreamSm90<__nv_bfloat16>)

}  // namespace fused_resnet::conv

const bool is_hopper = (emulation::capability = 9);

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cuda, CPU, m) { m.impl("chain_out", TORCH_BOX(&fused_resnet::chain_out)); }
