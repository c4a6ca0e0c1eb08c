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

#define FUSED_RESNET_EMULATED_INSTANCE(symbol, element, dtype, ...) \
  extern const Instance symbol;                                     \
  const Instance symbol = Sm80<element, __VA_ARGS__>::instance(#symbol, Dtype::dtype);

FUSED_RESNET_EMULATED_INSTANCE(kHalf64x64, __half, half, 64, 64, 2, 2, 4)
FUSED_RESNET_EMULATED_INSTANCE(kBfloat64x64, __nv_bfloat16, bfloat16, 64, 64, 2, 2, 4)
FUSED_RESNET_EMULATED_INSTANCE(kHalf128x64, __half, half, 128, 64, 2, 2, 4)
FUSED_RESNET_EMULATED_INSTANCE(kHalf128x128, __half, half, 128, 128, 2, 2, 4)
FUSED_RESNET_EMULATED_INSTANCE(kHalf256x128, __half, half, 256, 128, 4, 2, 3)

#define FUSED_RESNET_EMULATED_SPLIT(symbol, element, splits) \
  extern const Instance symbol;                              \
  const Instance symbol = SplitSm90<element, splits>::instance(#symbol);

FUSED_RESNET_EMULATED_SPLIT(kHalf1, __half, 1)
FUSED_RESNET_EMULATED_SPLIT(kHalf2, __half, 2)
FUSED_RESNET_EMULATED_SPLIT(kHalf4, __half, 4)
FUSED_RESNET_EMULATED_SPLIT(kHalf8, __half, 8)
FUSED_RESNET_EMULATED_SPLIT(kBfloat1, __nv_bfloat16, 1)
FUSED_RESNET_EMULATED_SPLIT(kBfloat4, __nv_bfloat16, 4)

extern const Instance kHalfLines, kBfloatLines;
const Instance kHalfLines = LinesSm90<__half>::instance("kHalfLines");
const Instance kBfloatLines = LinesSm90<__nv_bfloat16>::instance("kBfloatLines");

}  // namespace fused_resnet::conv

const bool is_hopper = (emulation::capability = 9);

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cuda, CPU, m) {
  m.impl("conv_bias_act", TORCH_BOX(&fused_resnet::conv_bias_act));
  m.impl("conv_bias_act_out", TORCH_BOX(&fused_resnet::conv_bias_act_out));
  m.impl("conv_bn_act", TORCH_BOX(&fused_resnet::conv_bn_act));
}
