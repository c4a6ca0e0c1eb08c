// A bottleneck of 64 middle channels and, at once, the next one's reduce, on Hopper: conv 3x3 -> 1x1 to 256 channels ->
// shortcut -> ReLU -> (y) -> 1x1 to 64 or 128 channels -> ReLU -> (z). What makes it more than its parts: all weights
// stay in shared memory (a persistent block reads them once, not once a tile), the 3x3's tile and y's go from one
// product to the next in registers, and two warp groups work on tiles of their own, so that one multiplies while the
// other stores.
//
// 64 output positions a tile. Warps 0 and 1 fetch the windows of x for the two groups, warps 2 and 3 the residual, each
// into a ring of tiles; y and z leave through the residual's ring.

#pragma once

#include <cstdint>

#include "geometry.h"
#include "ring.h"
#include "sm90_ptx.cuh"

namespace fused_resnet::conv {

struct ChainParams {
  CUtensorMap x, weight1, weight2, residual, x2, projection, weight3;
  Window window, second_window;
  int64_t m;  // output positions
  int tiles;  // of 64
  int p, q;
  float floor;  // of y: 0 after a ReLU, else -inf
  bool has_residual, quarter;
  bool early;  // weights may be read while the kernel before runs
  const float *bias1, *bias2, *bias3;
  void *y, *z;
};

// Following: tiles of 64 channels that the next convolution has. Segment: a projection of 64 channels in the residual's
// place.
template <int Following, bool Segment>
struct ChainLayout {
  static constexpr int kTaps = 9, kOut = 4;  // tiles of the 3x3's weight, of y's channels
  static constexpr int kWeight2 = kTaps, kProjection = kWeight2 + kOut;
  static constexpr int kWeight3 = kProjection + (Segment ? kOut : 0);
  static constexpr int kWeights = kWeight3 + Following * kOut;
  static constexpr int kMost = (227 * 1024 - 1024) / ptx::kTileBytes;
  static constexpr int kRings = (kMost - kWeights) / 2;  // tiles that are left for each group
  static constexpr int kY = kRings >= 5 ? 2 : 1, kX = kRings - kY;
  static constexpr int kFirstX = kWeights, kFirstY = kFirstX + 2 * kX, kTiles = kFirstY + 2 * kY;
  // Barriers: the 3x3's weight, the other weights, then for each group full and empty ones of both rings.
  static constexpr int kBarriers = 2 + 2 * 2 * (kX + kY);
  static constexpr int kShared = kTiles * ptx::kTileBytes + kBarriers * 8;
  static constexpr int kThreads = 384;
  static_assert(kX >= 2 && kShared <= 227 * 1024);
};

template <class T, int Following, bool Segment>
__global__ void __launch_bounds__(384, 1) chain_sm90_kernel(const __grid_constant__ ChainParams p) {
  using Layout = ChainLayout<Following, Segment>;
  constexpr int kX = Layout::kX, kY = Layout::kY;
  ptx::launch_dependents();
  unsigned char* const memory = ptx::shared_memory();
  const uint32_t shared = ptx::shared_address(memory);
  const auto tile_at = [&](int i) { return shared + i * ptx::kTileBytes; };
  const uint32_t barriers = tile_at(Layout::kTiles);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = warp < 4 ? warp % 2 : warp / 4 - 1;
  const uint32_t full_x = barriers + 16 + group * 16 * (kX + kY), empty_x = full_x + 8 * kX;
  const uint32_t full_y = empty_x + 8 * kX, empty_y = full_y + 8 * kY;
  const int ring_x = Layout::kFirstX + group * kX, ring_y = Layout::kFirstY + group * kY;

  if (threadIdx.x == 0) {
    ptx::init_barrier(barriers, 1);
    ptx::init_barrier(barriers + 8, 1);
    for (int i = 0; i < 2; ++i) {
      const uint32_t first = barriers + 16 + i * 16 * (kX + kY);
      for (int j = 0; j < 2 * (kX + kY); ++j) {
        const bool fills = j < kX || (j >= 2 * kX && j < 2 * kX + kY);
        ptx::init_barrier(first + 8 * j, fills ? 1 : 4);  // a producer's thread, or a group's four warps
      }
    }
    ptx::publish_barriers();
  }
  __syncthreads();
  const int first_tile = 2 * blockIdx.x + group, step = 2 * gridDim.x;

  if (warp < 4) {
    ptx::keep_registers<40>();
    if (lane != 0) return;
    if (!p.early) ptx::wait_for_kernels();
    if (warp == 0) {
      ptx::arrive_and_expect(barriers, Layout::kTaps * ptx::kTileBytes);
      for (int i = 0; i < Layout::kTaps; ++i) ptx::load_tiled(&p.weight1, tile_at(i), barriers, 0, i, 0);
    } else if (warp == 2) {
      const uint32_t others = barriers + 8;
      ptx::arrive_and_expect(others, (Layout::kWeights - Layout::kTaps) * ptx::kTileBytes);
      for (int i = 0; i < Layout::kOut; ++i) {
        ptx::load_tiled(&p.weight2, tile_at(Layout::kWeight2 + i), others, 0, 0, 64 * i);
        if (Segment) ptx::load_tiled(&p.projection, tile_at(Layout::kProjection + i), others, 0, 0, 64 * i);
        for (int f = 0; f < Following; ++f)
          ptx::load_tiled(&p.weight3, tile_at(Layout::kWeight3 + f * Layout::kOut + i), others, 64 * i, 0, 64 * f);
      }
    }
    if (p.early) ptx::wait_for_kernels();  // those that multiply wait for what is fetched from here on
    if (warp < 2) {
      Ring<kX> ring;
      const auto next = [&](const CUtensorMap* map, const Pixel& from, int r, int s) {
        ptx::wait(empty_x + 8 * ring.at, ring.phase ^ 1);
        ptx::arrive_and_expect(full_x + 8 * ring.at, ptx::kTileBytes);
        ptx::load_im2col(map, tile_at(ring_x + ring.at), full_x + 8 * ring.at, 0, from.w, from.h, from.n, s, r);
        ring.advance();
      };
      for (int tile = first_tile; tile < p.tiles; tile += step) {
        const Pixel from = p.window.at(int64_t{64} * tile);
        for (int r = 0; r < 3; ++r)
          for (int s = 0; s < 3; ++s) next(&p.x, from, r, s);
        if (Segment) next(&p.x2, p.second_window.at(int64_t{64} * tile), 0, 0);
      }
    } else {
      Ring<kY> ring;
      for (int tile = first_tile; tile < p.tiles; tile += step) {
        // With one place, a load begins when the one before has been used: at least from L2.
        if (kY == 1 && p.has_residual)
          for (int i = 0; i < Layout::kOut; ++i) ptx::prefetch_tiled(&p.residual, 64 * i, 0, 64 * tile);
        for (int i = 0; i < Layout::kOut + Following; ++i, ring.advance()) {
          ptx::wait(empty_y + 8 * ring.at, ring.phase ^ 1);
          const uint32_t full = full_y + 8 * ring.at;
          if (!p.has_residual || i >= Layout::kOut) {
            ptx::arrive(full);  // a place for what is computed, and nothing in it
            continue;
          }
          ptx::arrive_and_expect(full, ptx::kTileBytes);
          ptx::load_tiled(&p.residual, tile_at(ring_y + ring.at), full, 64 * i, 0, 64 * tile);
        }
      }
    }
    return;
  }

  // A warp group.
  ptx::take_registers<232>();
  const int thread = threadIdx.x % 128;
  const int pair = lane % 4 * 2, row = warp % 4 * 16 + lane / 4;  // of a thread's values: column in eight, first row
  const int chunk = thread % 8, copied_row = thread / 8;          // of what it stores: 16 bytes of every 16th row
  Ring<kX> from_x;
  Ring<kY> from_y;
  const auto release = [&](uint32_t empty) {
    __syncwarp();
    if (lane == 0) ptx::arrive(empty);
  };

  ptx::wait(barriers, 0);
  for (int tile = first_tile; tile < p.tiles; tile += step) {
    int64_t to[4];  // rows of y, or -1
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t m = int64_t{64} * tile + copied_row + 16 * i;
      to[i] = m < p.m ? m : -1;
      if (p.quarter && to[i] >= 0) {
        const Pixel at = Window{p.p, p.q, 1, 1, 0, 0}.at(m);
        const int64_t kept = (int64_t{at.n} * ((p.p + 1) / 2) + at.h / 2) * ((p.q + 1) / 2) + at.w / 2;
        to[i] = at.h % 2 || at.w % 2 ? -1 : kept;
      }
    }

    float sum[32];
    uint32_t h[4][4];
    for (int tap = 0; tap < Layout::kTaps; ++tap) {
      ptx::wait(full_x + 8 * from_x.at, from_x.phase);
      ptx::pin(sum);
      ptx::begin_products();
#pragma unroll
      for (int part = 0; part < 4; ++part)
        ptx::multiply<T>(sum, ptx::operand(tile_at(ring_x + from_x.at), part), ptx::operand(tile_at(tap), part),
                         tap > 0 || part > 0);
      ptx::commit_products();
      // One tap stays in flight: the tile of the one before is free.
      if (tap > 0) {
        ptx::wait_for_products<1>();
        release(empty_x + 8 * (from_x.at == 0 ? kX - 1 : from_x.at - 1));
      }
      from_x.advance();
    }
    ptx::wait_for_products<0>();
    ptx::pin(sum);
    release(empty_x + 8 * (from_x.at == 0 ? kX - 1 : from_x.at - 1));

    // 64 columns of sums as the left operand of the next product.
    const auto activated = [&](const float (&values)[32], int j, int half, const float2& bias, float floor) {
      return ptx::pack(ptx::at_least(values[4 * j + 2 * half] + bias.x, floor),
                       ptx::at_least(values[4 * j + 2 * half + 1] + bias.y, floor), T{});
    };
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 bias = *reinterpret_cast<const float2*>(p.bias1 + 8 * j + pair);
#pragma unroll
      for (int half = 0; half < 2; ++half) h[j / 2][j % 2 * 2 + half] = activated(sum, j, half, bias, 0.0f);
    }

    float reduced[Following > 0 ? Following : 1][32];
    if (Segment) ptx::wait(full_x + 8 * from_x.at, from_x.phase);
    const auto place_of = [&](unsigned char* y, int j, int half) {
      const int r = row + 8 * half;
      return reinterpret_cast<uint32_t*>(y + r * 128 + ((j ^ (r & 7)) * 16) + pair * 2);
    };
    // From the ring to rows of y or z. The place is free as soon as it is in registers.
    const auto store = [&](const unsigned char* from, void* map, int channels, int first, bool all) {
      ptx::barrier_of(1 + group, 128);
      uint4 lines[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = copied_row + 16 * i;
        lines[i] = *reinterpret_cast<const uint4*>(from + r * 128 + ((chunk ^ (r & 7)) * 16));
      }
      if (!Segment && p.has_residual) ptx::fence_shared_writes();
      release(empty_y + 8 * from_y.at);
      from_y.advance();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t m = all ? int64_t{64} * tile + copied_row + 16 * i : to[i];
        if (all ? m < p.m : m >= 0)
          ptx::store_16_bytes(static_cast<T*>(map) + m * channels + first + 8 * chunk, lines[i]);
      }
    };

    ptx::wait(barriers + 8, 0);
#pragma unroll 1
    for (int out = 0; out < Layout::kOut; ++out) {
      ptx::pin(h);
      ptx::pin(sum);
      ptx::begin_products();
#pragma unroll
      for (int part = 0; part < 4; ++part)
        ptx::multiply<T>(sum, h[part], ptx::operand(tile_at(Layout::kWeight2 + out), part), part > 0);
      if (Segment) {
#pragma unroll
        for (int part = 0; part < 4; ++part)
          ptx::multiply<T>(sum, ptx::operand(tile_at(ring_x + from_x.at), part),
                           ptx::operand(tile_at(Layout::kProjection + out), part), true);
      }
      ptx::commit_products();
      float2 bias[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) bias[j] = *reinterpret_cast<const float2*>(p.bias2 + 64 * out + 8 * j + pair);
      ptx::wait(full_y + 8 * from_y.at, from_y.phase);
      unsigned char* const y = memory + (ring_y + from_y.at) * ptx::kTileBytes;
      uint32_t values[4][4];  // of the shortcut, all of them before the first is overwritten; then of y
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          values[j / 2][j % 2 * 2 + half] = !Segment && p.has_residual ? *place_of(y, j, half) : 0u;
      ptx::wait_for_products<0>();
      ptx::pin(sum);

#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t& value = values[j / 2][j % 2 * 2 + half];
          float2 more = bias[j];
          if (!Segment) {
            const float2 shortcut = ptx::unpack(value, T{});
            more = {more.x + shortcut.x, more.y + shortcut.y};
          }
          *place_of(y, j, half) = value = activated(sum, j, half, more, p.floor);
        }
      }
      if constexpr (Following > 0) {
        ptx::pin(values);
#pragma unroll
        for (int f = 0; f < Following; ++f) ptx::pin(reduced[f]);
        ptx::begin_products();
#pragma unroll
        for (int f = 0; f < Following; ++f)
#pragma unroll
          for (int part = 0; part < 4; ++part)
            ptx::multiply<T>(reduced[f], values[part],
                             ptx::operand(tile_at(Layout::kWeight3 + f * Layout::kOut + out), part),
                             out > 0 || part > 0);
        ptx::commit_products();
      }
      store(y, p.y, 64 * Layout::kOut, 64 * out, false);
      if constexpr (Following > 0) {
        ptx::wait_for_products<0>();
        ptx::pin(values);
#pragma unroll
        for (int f = 0; f < Following; ++f) ptx::pin(reduced[f]);
      }
    }
    if (Segment) {
      release(empty_x + 8 * from_x.at);
      from_x.advance();
    }

#pragma unroll
    for (int f = 0; f < Following; ++f) {
      ptx::wait(full_y + 8 * from_y.at, from_y.phase);
      unsigned char* const z = memory + (ring_y + from_y.at) * ptx::kTileBytes;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 bias = *reinterpret_cast<const float2*>(p.bias3 + 64 * f + 8 * j + pair);
#pragma unroll
        for (int half = 0; half < 2; ++half) *place_of(z, j, half) = activated(reduced[f], j, half, bias, 0.0f);
      }
      store(z, p.z, 64 * Following, 64 * f, true);
    }
  }
}

}  // namespace fused_resnet::conv
