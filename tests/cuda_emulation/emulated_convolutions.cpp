// Registers the launchers of csrc/conv_bn_act.cu, compiled against the stand-in runtime beside this file, for CPU
// tensors; with a few of setup.py's convolutions for sm_80, and those of few positions and by lines for sm_90.

#include <torch/csrc/stable/library.h>

#include "emulated_shim.h"
//
#include "emulated_sm90.h"
//
#include "conv/lines_sm90.cuh"
#include "conv/sm80.cuh"
#include "conv/split_sm90.cuh"
#include "conv_bn_act.h"

namespace fused_resnet::conv {

#define FUSED_RESNET_EMULATED_INSTANCE(symbol, ...) \
  extern const Instance symbol;                     \
  const Instance symbol = __VA_ARGS__::instance(#symbol);

FUSED_RESNET_EMULATED_INSTANCE(kHalf64x64, Sm80<__half, 64, 64, 2, 2, 4>)
FUSED_RESNET_EMULATED_INSTANCE(kBfloat64x64, Sm80<__nv_bfloat16, 64, 64, 2, 2, 4>)
FUSED_RESNET_EMULATED_INSTANCE(kHalf128x64, Sm80<__half, 128, 64, 2, 2, 4>)
FUSED_RESNET_EMULATED_INSTANCE(kHalf128x128, Sm80<__half, 128, 128, 2, 2, 4>)
FUSED_RESNET_EMULATED_INSTANCE(kHalf256x128, Sm80<__half, 256, 128, 4, 2, 3>)
FUSED_RESNET_EMULATED_INSTANCE(kHalf1, SplitSm90<__half, 1>)
FUSED_RESNET_EMULATED_INSTANCE(kHalf2, SplitSm90<__half, 2>)
FUSED_RESNET_EMULATED_INSTANCE(kHalf4, SplitSm90<__half, 4>)
FUSED_RESNET_EMULATED_INSTANCE(kHalf8, SplitSm90<__half, 8>)
FUSED_RESNET_EMULATED_INSTANCE(kBfloat1, SplitSm90<__nv_bfloat16, 1>)
FUSED_RESNET_EMULATED_INSTANCE(kBfloat4, SplitSm90<__nv_bfloat16, 4>)
FUSED_RESNET_EMULATED_INSTANCE(kHalfLines, LinesSm90<__half>)
FUSED_RESNET_EMULATED_INSTANCE(kBfloatLines, LinesSm90<__nv_bfloat16>)

}  // namespace fused_resnet::conv

const bool is_hopper = (emulation::capability = 9);

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cuda, CPU, m) {
  m.impl("conv_bias_act", TORCH_BOX(&fused_resnet::conv_bias_act));
  m.impl("conv_bias_act_out", TORCH_BOX(&fused_resnet::conv_bias_act_out));
  m.impl("conv_bn_act", TORCH_BOX(&fused_resnet::conv_bn_act));
}
