#include <cstdint>

namespace fused_resnet::engine {
namespace {
constexpr int64_t kWidth = 8, kVectors = 2;
constexpr int kMr = 6;
}  // namespace
}  // namespace fused_resnet::engine

#include "table.h"

FUSED_RESNET_KERNELS(kernels_avx2, "avx2")
