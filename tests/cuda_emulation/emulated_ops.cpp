// Registers the launchers of csrc/*.cu, compiled against the stand-in runtime beside this file, for CPU tensors.

#include <torch/csrc/stable/library.h>

#include "emulated_shim.h"
//
#include "bn_act.h"
#include "emulated_ptx.h"
#include "pool.h"

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cuda, CPU, m) {
  m.impl("bn_stats", TORCH_BOX(&fused_resnet::bn_stats));
  m.impl("bn_act", TORCH_BOX(&fused_resnet::bn_act));
  m.impl("bn_act_bwd", TORCH_BOX(&fused_resnet::bn_act_bwd));
  m.impl("bn_relu_bwd", TORCH_BOX(&fused_resnet::bn_relu_bwd));
  m.impl("bn_act_bwd_input", TORCH_BOX(&fused_resnet::bn_act_bwd_input));
  m.impl("relu_bwd_sum", TORCH_BOX(&fused_resnet::relu_bwd_sum));
  m.impl("bn_act_pool", TORCH_BOX(&fused_resnet::bn_act_pool));
  m.impl("bn_act_pool_bwd", TORCH_BOX(&fused_resnet::bn_act_pool_bwd));
  m.impl("avg_pool_out", TORCH_BOX(&fused_resnet::avg_pool_out));
}
