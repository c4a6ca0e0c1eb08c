// An implicit GEMM for the tensor cores of sm_80 and its kin: y[M, K] in tiles, both operands copied to shared memory
// several steps ahead (cp.async), read from there without bank conflicts (ldmatrix on swizzled rows of 64 bytes), one
// sixteenth of the reduction ahead of the multiplication. The projection's segment is the end of the same reduction.
// The epilogue works in shared memory, where the residual comes in and y leaves in whole lines.

#pragma once

#include <cstdint>
#include <limits>

#include "geometry.h"
#include "sm80_ptx.cuh"

namespace fused_resnet::conv {

struct Sm80Params {
  Reduction reduction;
  Window window, second_window;
  int64_t m;
  int h, w, c, h2, w2, k;
  int dilation_h, dilation_w;
  int tiles_n;
  float floor;  // of y: 0 after a ReLU, else -inf
  const void *x, *weight, *x2, *weight2, *residual;
  const float *scale, *bias;  // begin at a multiple of 8 bytes
  void* y;
};

template <class T, int TileM, int TileN, int WarpsM, int WarpsN, int Stages>
struct Sm80Tile {
  static constexpr int kTileK = 32;
  static constexpr int kThreads = 32 * WarpsM * WarpsN;
  static constexpr int kChunk = 8;                  // values in 16 bytes
  static constexpr int kChunks = kTileK / kChunk;   // of a row
  static constexpr int kPass = kThreads / kChunks;  // rows that the threads copy at a time
  static constexpr int kRowsX = TileM / kPass, kRowsW = TileN / kPass;
  static constexpr int kWarpM = TileM / WarpsM, kWarpN = TileN / WarpsN;
  static constexpr int kM = kWarpM / 16, kN = kWarpN / 8;  // matrix instructions of a warp and a sixteenth
  static constexpr int kStage = (TileM + TileN) * kTileK;  // values
  static constexpr int kPitch = TileN + kChunk;            // of a row of y: shifted by 16 bytes, no two meet in a bank
  static constexpr int kShared = (Stages * kStage > TileM * kPitch ? Stages * kStage : TileM * kPitch) * 2;
  static_assert(sizeof(T) == 2 && kPass % 8 == 0 && TileM % kPass == 0 && TileN % kPass == 0 && kWarpM % 16 == 0 &&
                kWarpN % 16 == 0);
  static_assert(Stages >= 3);

  // Where a chunk of a row lies in a tile of rows of 64 bytes, in bytes. Eight rows further it is 512 bytes further,
  // and flipping bits of the chunk flips those of the place.
  __device__ static uint32_t swizzled(int row, int chunk) { return row * 64 + ((chunk ^ (row >> 1 & 3)) * 16); }
};

template <class T, int TileM, int TileN, int WarpsM, int WarpsN, int Stages>
__global__ void __launch_bounds__(32 * WarpsM * WarpsN, WarpsM* WarpsN > 4 ? 1 : 2)
    conv_sm80_kernel(const Sm80Params p) {
  using Tile = Sm80Tile<T, TileM, TileN, WarpsM, WarpsN, Stages>;
  unsigned char* const memory = ptx::shared_memory();
  const uint32_t shared = ptx::shared_address(memory);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  // Neighbours share the positions: what they read of x comes from L2 all but once.
  const int tile_n = blockIdx.x % p.tiles_n * TileN;
  const int64_t tile_m = int64_t{TileM} * (blockIdx.x / p.tiles_n);

  // What this thread copies: a chunk of some rows.
  const int chunk = thread % Tile::kChunks, first_row = thread / Tile::kChunks;
  const T* x = static_cast<const T*>(p.x);
  int offset[Tile::kRowsX];       // of the window's first value, from the tile's first image; the padding before it too
  uint32_t inside[Tile::kRowsX];  // bit r * columns + s: the tap reads the map
  Part at;

  const auto seek = [&](const Window& window, int h, int w, int c, int rows, int columns, int dilation_h,
                        int dilation_w, const void* map) {
    const int image = window.at(tile_m).n;
    x = static_cast<const T*>(map) + int64_t{image} * h * w * c;
#pragma unroll
    for (int i = 0; i < Tile::kRowsX; ++i) {
      const int64_t row = tile_m + first_row + i * Tile::kPass;
      const Pixel pixel = window.at(row);
      offset[i] = (((pixel.n - image) * h + pixel.h) * w + pixel.w) * c + chunk * Tile::kChunk;
      inside[i] = 0;
      if (row >= p.m) continue;
      uint32_t in_row = 0;
      for (int s = 0; s < columns; ++s) {
        const int column = pixel.w + s * dilation_w;
        in_row |= static_cast<uint32_t>(column >= 0 && column < w) << s;
      }
      for (int r = 0; r < rows; ++r) {
        const int line = pixel.h + r * dilation_h;
        if (line >= 0 && line < h) inside[i] |= in_row << r * columns;
      }
    }
  };
  seek(p.window, p.h, p.w, p.c, p.reduction.rows, p.reduction.columns, p.dilation_h, p.dilation_w, p.x);

  int row_size = p.reduction.rows * p.reduction.columns * p.c;  // of weight
  const auto first_weight = [&](const void* of) {
    return static_cast<const T*>(of) + int64_t{tile_n + first_row} * row_size + chunk * Tile::kChunk;
  };
  const T* weight = first_weight(p.weight);
  const uint32_t place = shared + Tile::swizzled(first_row, chunk);
  const auto copy_step = [&](int stage) {
    const uint32_t to_x = place + stage * (Tile::kStage * 2), to_weight = to_x + TileM * Tile::kTileK * 2;
    const int channels = at.second ? p.reduction.c2 : p.c;
    const bool some = at.c + chunk * Tile::kChunk < channels;
    const int tap = at.r * p.reduction.columns + at.s;
    const int shift = (at.r * p.dilation_h * p.w + at.s * p.dilation_w) * channels + at.c;
#pragma unroll
    for (int i = 0; i < Tile::kRowsX; ++i) {
      const bool exists = some && (inside[i] >> tap & 1);
      ptx::copy_async(to_x + i * Tile::kPass * 64, exists ? x + (offset[i] + shift) : x, exists);
    }
    const T* const from = weight + (tap * channels + at.c);
#pragma unroll
    for (int i = 0; i < Tile::kRowsW; ++i) {
      const bool exists = some && tile_n + first_row + i * Tile::kPass < p.k;
      ptx::copy_async(to_weight + i * Tile::kPass * 64, exists ? from + i * Tile::kPass * row_size : x, exists);
    }
    const bool was_first = !at.second;
    p.reduction.advance(at);
    if (was_first && at.second && p.reduction.c2) {
      row_size = p.reduction.c2;
      weight = first_weight(p.weight2);
      seek(p.second_window, p.h2, p.w2, p.reduction.c2, 1, 1, 1, 1, p.x2);
    }
  };

  const int steps = p.reduction.steps();
#pragma unroll 1
  for (int stage = 0; stage < Stages - 1; ++stage) {
    if (stage < steps) copy_step(stage);
    ptx::commit_copies();
  }

  const int warp_m = warp / WarpsN * Tile::kWarpM, warp_n = warp % WarpsN * Tile::kWarpN;
  float sum[Tile::kM][Tile::kN][4] = {};
  uint32_t a[2][Tile::kM][4], b[2][Tile::kN / 2][4];
  const uint32_t from_x = shared + Tile::swizzled(warp_m + lane % 16, lane / 16);
  const uint32_t from_weight =
      shared + TileM * Tile::kTileK * 2 + Tile::swizzled(warp_n + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const auto load_part = [&](int stage, int part) {
    const uint32_t base = stage * (Tile::kStage * 2);
#pragma unroll
    for (int i = 0; i < Tile::kM; ++i) ptx::load_matrices(a[part][i], ((from_x + base) ^ part * 32) + i * 16 * 64);
#pragma unroll
    for (int j = 0; j < Tile::kN / 2; ++j)
      ptx::load_matrices(b[part][j], ((from_weight + base) ^ part * 32) + j * 16 * 64);
  };
  const auto multiply = [&](int part) {
#pragma unroll
    for (int j = 0; j < Tile::kN; ++j)
#pragma unroll
      for (int i = 0; i < Tile::kM; ++i)
        ptx::multiply_add<T>(sum[i][j], a[part][i], b[part][j / 2][j % 2 * 2], b[part][j / 2][j % 2 * 2 + 1]);
  };

  ptx::wait_for_copies<Stages - 2>();
  __syncthreads();
  load_part(0, 0);
  int read = 0, write = Stages - 1;
  for (int step = 0; step < steps; ++step) {
    load_part(read, 1);
    // The stage that all have read before the last barrier.
    if (step + Stages - 1 < steps) copy_step(write);
    ptx::commit_copies();
    write = write + 1 == Stages ? 0 : write + 1;
    multiply(0);
    read = read + 1 == Stages ? 0 : read + 1;
    ptx::wait_for_copies<Stages - 2>();
    __syncthreads();
    if (step + 1 < steps) load_part(read, 0);
    multiply(1);
  }
  ptx::wait_for_copies<0>();
  __syncthreads();

  // The epilogue's copies: 16 bytes of a row of y, neighbours side by side.
  constexpr int kChunksOfRow = TileN / Tile::kChunk, kPassOfRows = Tile::kThreads / kChunksOfRow;
  static_assert(Tile::kThreads % kChunksOfRow == 0 && TileM % kPassOfRows == 0);
  const int column = thread % kChunksOfRow * Tile::kChunk, row0 = thread / kChunksOfRow;
  const bool has_column = tile_n + column < p.k;
  if (p.residual != nullptr) {
    const T* const residual = static_cast<const T*>(p.residual);
#pragma unroll
    for (int i = 0; i < TileM / kPassOfRows; ++i) {
      const int row = row0 + i * kPassOfRows;
      const bool exists = has_column && tile_m + row < p.m;
      ptx::copy_async(shared + (row * Tile::kPitch + column) * 2,
                      exists ? residual + (tile_m + row) * p.k + tile_n + column : residual, exists);
    }
    ptx::commit_copies();
    ptx::wait_for_copies<0>();
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < Tile::kN; ++j) {
    const int n = warp_n + j * 8 + lane % 4 * 2;
    float2 scale = {1.0f, 1.0f}, bias = {0.0f, 0.0f};
    if (tile_n + n < p.k) {
      if (p.bias != nullptr) bias = *reinterpret_cast<const float2*>(p.bias + tile_n + n);
      if (p.scale != nullptr) scale = *reinterpret_cast<const float2*>(p.scale + tile_n + n);
    }
#pragma unroll
    for (int i = 0; i < Tile::kM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_m + i * 16 + half * 8 + lane / 4;
        uint32_t* const place = reinterpret_cast<uint32_t*>(memory + (row * Tile::kPitch + n) * 2);
        float low = sum[i][j][2 * half] * scale.x + bias.x, high = sum[i][j][2 * half + 1] * scale.y + bias.y;
        if (p.residual != nullptr) {
          const float2 more = ptx::unpack(*place, T{});
          low += more.x;
          high += more.y;
        }
        *place = ptx::pack(ptx::at_least(low, p.floor), ptx::at_least(high, p.floor), T{});
      }
    }
  }
  __syncthreads();
  if (!has_column) return;
  T* const y = static_cast<T*>(p.y);
#pragma unroll
  for (int i = 0; i < TileM / kPassOfRows; ++i) {
    const int row = row0 + i * kPassOfRows;
    if (tile_m + row < p.m)
      *reinterpret_cast<uint4*>(y + (tile_m + row) * p.k + tile_n + column) =
          *reinterpret_cast<const uint4*>(memory + (row * Tile::kPitch + column) * 2);
  }
}

}  // namespace fused_resnet::conv
