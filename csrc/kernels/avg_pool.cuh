// The mean of each channel over whole maps.

#pragma once

#include <cstdint>

#include "../conv/sm80_ptx.cuh"

namespace fused_resnet {

constexpr int kPoolWarps = 8;

template <class T>
struct alignas(2 * sizeof(T)) PoolPair {
  T low, high;
};

// y [N, C] from x [N, positions, C], C even. A block has 64 channels of an image: two a lane, and every eighth position
// a warp; the warps' sums are added in their order.
template <class T>
__global__ void __launch_bounds__(32 * kPoolWarps) avg_pool_kernel(const T* x, T* y, int positions, int channels) {
  __shared__ float2 sums[kPoolWarps][32];
  ptx::launch_dependents();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int pairs = channels / 2, pair = blockIdx.x * 32 + lane;
  float2 sum = {0.0f, 0.0f};
  ptx::wait_for_kernels();
  if (pair < pairs) {
    const PoolPair<T>* const of_image =
        reinterpret_cast<const PoolPair<T>*>(x) + int64_t{blockIdx.y} * positions * pairs + pair;
#pragma unroll 4
    for (int i = warp; i < positions; i += kPoolWarps) {
      const PoolPair<T> v = of_image[int64_t{i} * pairs];
      sum = {sum.x + static_cast<float>(v.low), sum.y + static_cast<float>(v.high)};
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || pair >= pairs) return;
#pragma unroll
  for (int i = 1; i < kPoolWarps; ++i) sum = {sum.x + sums[i][lane].x, sum.y + sums[i][lane].y};
  const float count = static_cast<float>(positions);
  reinterpret_cast<PoolPair<T>*>(y)[int64_t{blockIdx.y} * pairs + pair] = {static_cast<T>(sum.x / count),
                                                                          static_cast<T>(sum.y / count)};
}

}  // namespace fused_resnet
