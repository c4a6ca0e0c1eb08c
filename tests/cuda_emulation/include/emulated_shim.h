// What stands for torch's functions of a device in a library of emulated ops, and what sets its machine up.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

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

__attribute__((visibility("default"))) void emulate(int multiprocessors, bool reversed, bool late_products) {
  emulation::multiprocessors = multiprocessors;
  emulation::reversed = emulation::loads_at_once = reversed;
  emulation::products_at_once = reversed && !late_products;
}
}
