#include <cstdint>

namespace fused_resnet::engine {
namespace {
constexpr int64_t kWidth = 16, kVectors = 2;
constexpr int kMr = 14;
}  // namespace
}  // namespace fused_resnet::engine

#include "table.h"

FUSED_RESNET_KERNELS(kernels_avx512, "avx512")
