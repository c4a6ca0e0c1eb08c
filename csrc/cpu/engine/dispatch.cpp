#include "steps.h"

namespace fused_resnet::engine {

const Kernels* kernels_of(int64_t isa) {
  switch (isa) {
    case 0:
      return &kernels_base;
#if defined(__x86_64__)
    case 1:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kernels_avx2 : nullptr;
    case 2:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vl")
                 ? &kernels_avx512
                 : nullptr;
#endif
    default:
      return nullptr;
  }
}

int64_t best_isa() {
  int64_t isa = 2;
  while (!kernels_of(isa)) --isa;
  return isa;
}

}  // namespace fused_resnet::engine
