// Registers the launchers of csrc/stem.cu, compiled against the stand-ins beside this file, for CPU tensors.

#include <torch/csrc/stable/library.h>

#include "emulated_shim.h"
//
#include "stem.h"

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cuda, CPU, m) {
  m.impl("stem_out", TORCH_BOX(&fused_resnet::stem_out));
  m.impl("stem_conv", TORCH_BOX(&fused_resnet::stem_conv));
  m.impl("stem_conv_weight_shares", TORCH_BOX(&fused_resnet::stem_conv_weight_shares));
}
