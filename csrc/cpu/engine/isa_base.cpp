#include <cstdint>

namespace fused_resnet::engine {
namespace {
constexpr int64_t kWidth = 4, kVectors = 2;
constexpr int kMr = 6;
}  // namespace
}  // namespace fused_resnet::engine

#include "table.h"

FUSED_RESNET_KERNELS(kernels_base, "base")
