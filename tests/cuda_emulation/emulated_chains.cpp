// Registers the launcher of csrc/chain.cu, compiled against the stand-ins beside this file, for CPU tensors.

#include <torch/csrc/stable/library.h>

#include "emulated_shim.h"
#include "emulated_sm90.h"
//
#include "chain.h"
#include "conv/chain_sm90.cuh"

namespace fused_resnet::conv {

#define FUSED_RESNET_EMULATED_CHAIN(symbol, ...) \
  extern const ChainInstance symbol;             \
  const ChainInstance symbol = ChainSm90<__VA_ARGS__>::instance(#symbol);

FUSED_RESNET_EMULATED_CHAIN(kHalfChain64, __half, 1, false)
FUSED_RESNET_EMULATED_CHAIN(kHalfChain128, __half, 2, false)
FUSED_RESNET_EMULATED_CHAIN(kHalfChainSegment, __half, 1, true)
FUSED_RESNET_EMULATED_CHAIN(kBfloatChain64, __nv_bfloat16, 1, false)

}  // namespace fused_resnet::conv

const bool is_hopper = (emulation::capability = 9);

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cuda, CPU, m) { m.impl("chain_out", TORCH_BOX(&fused_resnet::chain_out)); }
