// A convolution of few output positions on Hopper, where one waits for memory, other blocks and the kernel before, and
// hardly for tensor cores. Tiles of 64x64; the blocks of a cluster share the reduction of one tile. Each finishes a few
// rows: what the others have of these they push into its shared memory, and it adds up all parts in the order of the
// blocks. The next kernel may start while this one runs, and fetch its first weights: it waits for this one before it
// reads or writes anything else (programmatic dependent launch).
//
// Warps 0 to 3 are the group that multiplies, warp 4 fetches.

#pragma once

#include <cstdint>

#include "geometry.h"
#include "sm90_ptx.cuh"

namespace fused_resnet::conv {

struct SplitParams {
  CUtensorMap x, weight, x2, weight2;
  Reduction reduction;
  Window window, second_window;
  int64_t m;
  int k, tiles_n;
  int dilation_h, dilation_w;
  float floor;        // of y: 0 after a ReLU, else -inf
  bool early;         // weights may be read while the kernel before runs
  const void* residual;
  const float *scale, *bias;
  void* y;
};

struct SplitLayout {
  static constexpr int kTile = 64;
  static constexpr int kStages = 5;  // of x and weight
  static constexpr int kThreads = 160;
  static constexpr int kPitch = kTile + 8;  // of a row of sums: a warp's pairs meet in no bank
  static constexpr int kSums = kStages * 2 * ptx::kTileBytes;
  static constexpr int kBarriers = kSums + kTile * kPitch * 4;
  static constexpr int kShared = kBarriers + (2 * kStages + 1) * 8;
  static_assert(2 * (kShared + 1024) <= 228 * 1024, "two blocks a multiprocessor, of this kernel and of the next");
};

template <class T, int Splits>
__global__ void __launch_bounds__(SplitLayout::kThreads, 2) conv_split_kernel(const __grid_constant__ SplitParams p) {
  using Layout = SplitLayout;
  constexpr int kTile = Layout::kTile, kStages = Layout::kStages;
  ptx::launch_dependents();
  unsigned char* const memory = ptx::shared_memory();
  const uint32_t shared = ptx::shared_address(memory);
  const auto x_at = [&](int stage) { return shared + stage * 2 * ptx::kTileBytes; };
  const auto weight_at = [&](int stage) { return x_at(stage) + ptx::kTileBytes; };
  const auto full = [&](int stage) { return shared + Layout::kBarriers + 8 * stage; };
  const auto empty = [&](int stage) { return full(kStages + stage); };
  const uint32_t pushed = full(2 * kStages);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int split = blockIdx.x % Splits, tile = blockIdx.x / Splits;
  const int tile_n = tile % p.tiles_n * kTile;
  const int64_t tile_m = int64_t{kTile} * (tile / p.tiles_n);
  const int steps = p.reduction.steps();  // of 64 values each: the product does not overflow
  const int first = steps * split / Splits, count = steps * (split + 1) / Splits - first;

  if (warp == 4 && lane == 0) {
    ptx::prefetch_map(&p.weight);
    ptx::prefetch_map(&p.x);
    if (p.reduction.c2) {
      ptx::prefetch_map(&p.weight2);
      ptx::prefetch_map(&p.x2);
    }
    for (int i = 0; i < kStages; ++i) {
      ptx::init_barrier(full(i), 1);
      ptx::init_barrier(empty(i), 4);
    }
    ptx::init_barrier(pushed, 1);
    ptx::publish_barriers();
    if (Splits > 1) ptx::arrive_and_expect(pushed, kTile * kTile * 4);
  }
  __syncthreads();
  if (Splits > 1) ptx::arrive_at_cluster();

  constexpr int kRows = kTile / Splits;  // of the tile, that the block finishes
  // Where a block's part of a row is, in the shared memory of the one that finishes it.
  const auto sums_at = [&](int row, int column) {
    return shared + Layout::kSums + (row * Layout::kPitch + column) * 4;
  };
  // What a thread finishes: four channels of some of the block's rows.
  constexpr int kPass = 8, kPasses = kRows / kPass;
  static_assert(kRows % kPass == 0);
  const int column = thread % 16 * 4, row0 = thread / 16;
  const bool takes = tile_n + column < p.k;
  const auto place = [&](int i) { return (tile_m + split * kRows + row0 + i * kPass) * p.k + tile_n + column; };
  const auto exists = [&](int i) { return takes && tile_m + split * kRows + row0 + i * kPass < p.m; };
  float4 scale = {1.0f, 1.0f, 1.0f, 1.0f}, bias = {0.0f, 0.0f, 0.0f, 0.0f};
  uint2 more[kPasses];
  float sum[32];
  if (warp == 4) {
    if (lane == 0) {
      const auto tap_of = [&](const Part& at) { return at.r * p.reduction.columns + at.s; };
      const auto load_weight = [&](const Part& at, int stage) {
        ptx::load_tiled(at.second ? &p.weight2 : &p.weight, weight_at(stage), full(stage), at.c, tap_of(at), tile_n);
      };
      Pixel from = p.window.at(tile_m), second_from = p.second_window.at(tile_m);
      const auto load_x = [&](const Part& at, int stage) {
        const Pixel& pixel = at.second ? second_from : from;
        ptx::load_im2col(at.second ? &p.x2 : &p.x, x_at(stage), full(stage), at.c, pixel.w, pixel.h, pixel.n,
                         at.s * p.dilation_w, at.r * p.dilation_h);
      };
      const int ahead = count < kStages ? count : kStages;
      Part start = p.reduction.at(first), at = start;
      for (int i = 0; i < ahead; ++i, p.reduction.advance(at)) {
        ptx::arrive_and_expect(full(i), 2 * ptx::kTileBytes);
        if (p.early) load_weight(at, i);
      }
      if (p.early)  // the others at least into L2
        for (int i = ahead; i < count; ++i, p.reduction.advance(at))
          ptx::prefetch_tiled(at.second ? &p.weight2 : &p.weight, at.c, tap_of(at), tile_n);
      // What takes divisions is ready before the kernel before has ended, and not reckoned again.
      int second = start.second;
      for (int* known : {&from.n, &from.h, &from.w, &second_from.n, &second_from.h, &second_from.w, &start.c, &start.r,
                         &start.s, &second})
        ptx::opaque(*known);
      ptx::wait_for_kernels();
      at = {start.c, start.r, start.s, second != 0};
      for (int i = 0; i < ahead; ++i, p.reduction.advance(at)) {
        if (!p.early) load_weight(at, i);
        load_x(at, i);
      }
      int stage = 0;
      uint32_t phase = 0;
      for (int i = ahead; i < count; ++i, p.reduction.advance(at)) {
        ptx::wait(empty(stage), phase);
        ptx::arrive_and_expect(full(stage), 2 * ptx::kTileBytes);
        load_weight(at, stage);
        load_x(at, stage);
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
    }
    __syncwarp();
  } else {
    const auto load_vectors = [&] {
      if (takes && p.scale != nullptr) scale = *reinterpret_cast<const float4*>(p.scale + tile_n + column);
      if (takes && p.bias != nullptr) bias = *reinterpret_cast<const float4*>(p.bias + tile_n + column);
    };
    if (p.early) load_vectors();
    ptx::wait_for_kernels();
    if (!p.early) load_vectors();
#pragma unroll
    for (int i = 0; i < kPasses; ++i)
      more[i] = p.residual != nullptr && exists(i)
                    ? *reinterpret_cast<const uint2*>(static_cast<const T*>(p.residual) + place(i))
                    : uint2{0, 0};
    int stage = 0, before = 0;
    uint32_t phase = 0;
    for (int i = 0; i < count; ++i) {
      ptx::wait(full(stage), phase);
      ptx::pin(sum);
      ptx::begin_products();
#pragma unroll
      for (int part = 0; part < 4; ++part)
        ptx::multiply<T>(sum, ptx::operand(x_at(stage), part), ptx::operand(weight_at(stage), part), i > 0 || part > 0);
      ptx::commit_products();
      if (i > 0) {  // one step stays in flight: the tiles of the one before are free
        ptx::wait_for_products<1>();
        __syncwarp();
        if (lane == 0) ptx::arrive(empty(before));
      }
      before = stage;
      if (++stage == kStages) stage = 0, phase ^= 1;
    }
    ptx::wait_for_products<0>();
    ptx::pin(sum);
    if (Splits > 1) ptx::wait_for_cluster();  // its blocks have begun
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + lane / 4 + 8 * half, owner = row / kRows;
      const uint32_t to = sums_at(split * kRows + row % kRows, lane % 4 * 2);
      if constexpr (Splits > 1) {
        const uint32_t there = ptx::address_in_block(to, owner), barrier = ptx::address_in_block(pushed, owner);
#pragma unroll
        for (int j = 0; j < 8; ++j)
          ptx::push(there + 8 * j * 4, sum[4 * j + 2 * half], sum[4 * j + 2 * half + 1], barrier);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j)
          *reinterpret_cast<float2*>(memory + (to - shared) + 8 * j * 4) = {sum[4 * j + 2 * half],
                                                                            sum[4 * j + 2 * half + 1]};
      }
    }
  }
  if (warp == 4) {
    if (Splits > 1) ptx::wait_for_cluster();
    return;
  }

  if constexpr (Splits > 1)
    ptx::wait_for_pushes(pushed, 0);
  else
    ptx::barrier_of(1, 128);
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int block = 0; block < Splits; ++block) {
      const uint32_t from = sums_at(block * kRows + row0 + i * kPass, column);
      const float4 part = *reinterpret_cast<const float4*>(memory + (from - shared));
      v = {v.x + part.x, v.y + part.y, v.z + part.z, v.w + part.w};
    }
    const float2 low = ptx::unpack(more[i].x, T{}), high = ptx::unpack(more[i].y, T{});
    const auto finished = [&](float value, float scale, float bias, float more) {
      return ptx::at_least(value * scale + bias + more, p.floor);
    };
    const uint2 y = {ptx::pack(finished(v.x, scale.x, bias.x, low.x), finished(v.y, scale.y, bias.y, low.y), T{}),
                     ptx::pack(finished(v.z, scale.z, bias.z, high.x), finished(v.w, scale.w, bias.w, high.y), T{})};
    if (exists(i)) *reinterpret_cast<uint2*>(static_cast<T*>(p.y) + place(i)) = y;
  }
}

}  // namespace fused_resnet::conv
