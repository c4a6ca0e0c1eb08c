// Registers the launchers of csrc/*.cu, compiled against the stand-in runtime beside this file, for CPU tensors.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "bn_act.h"

extern "C" {

// The compiler renames the shim's functions to these.
AOTITorchError emulated_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}

AOTITorchError emulated_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

__attribute__((visibility("default"))) void emulate(int multiprocessors, bool reversed) {
  emulation::multiprocessors = multiprocessors;
  emulation::reversed = reversed;
}
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cuda, CPU, m) {
  m.impl("bn_stats", TORCH_BOX(&fused_resnet::bn_stats));
  m.impl("bn_act", TORCH_BOX(&fused_resnet::bn_act));
  m.impl("bn_act_bwd", TORCH_BOX(&fused_resnet::bn_act_bwd));
  m.impl("relu_bwd_sum", TORCH_BOX(&fused_resnet::relu_bwd_sum));
}
