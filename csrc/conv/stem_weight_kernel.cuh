// The weight's gradient of the stem's convolution for the tensor cores of sm_80 and what came after: products of its
// output's gradient g and of the windows of x, summed over images and positions.
//
// A filter is 7 rows of 4 chunks of x, as in stem_kernel.cuh: of a row of positions the chunks c + j are a matrix whose
// columns are eight of the filter's values, and so come to the tensor cores transposed, as g does. Column c of the
// convolution reads the chunks c to c + 3 of a row in shared memory.
//
// A block has 64 channels of g and walks down pairs of its rows; rows of x and of g that the next pair needs come
// meanwhile. Two rows of g share five of the nine rows of x that they read. A warp has 32 channels and one of the four
// chunks; its sums stay in registers to the end, and go to memory as this block's share.

#pragma once

#include "stem_kernel.cuh"

namespace fused_resnet::conv {

struct StemWeightParams : StemPlaces {
  const void* g;
  float* shares;  // [images, parts, tiles, k, 224]
};

struct StemWeight : Stem {
  static constexpr int kTile = 112;          // columns of g of a block: all of an ImageNet map's
  static constexpr int kStep = 16;           // of them, in a matrix instruction
  static constexpr int kChunks = kTile + 3;  // of a row of x
  static constexpr int kRow = (kChunks + 1) * 16;
  static constexpr int kRowOfG = kTile * 2 * kChannels;
  static constexpr int kG = (kRing * kRow + 1023) / 1024 * 1024;  // where two pairs of rows are
  static constexpr int kShared = kG + 4 * kRowOfG;
  static constexpr int kCopies = 2 * kTile * 8 / kThreads;  // of 16 bytes of g, for a thread and a pair of rows
  static_assert(kShared <= 85 << 10);  // backends/stem_conv.py counts blocks by it
  static_assert(kChunks <= 128 && kTile % kStep == 0 && 2 * kTile * 8 % kThreads == 0);
};

// Which of two 16-bit values are among the first n.
__device__ __forceinline__ uint32_t first_of_two(int n) { return n >= 2 ? 0xffffffffu : n == 1 ? 0xffffu : 0; }

// Adds the products of 16 positions of two rows. x: the lane's place in row 0 of the ring, whose row `first` is the
// first that is read; g: its place in the first row of g. Edge: only `left` positions of the 16 are in the map, and the
// second row only if has_below: what x holds there may be a NaN.
template <class T, bool Edge>
__device__ __forceinline__ void stem_weight_multiply(float (&sum)[7][2][4], uint32_t x, uint32_t g, int first, int left,
                                                     bool has_below) {
  const int lane = threadIdx.x % 32;
  uint32_t a[2][2][4], b[2][4];
  const auto load_x = [&](int row) {  // and the next
    uint32_t(&to)[4] = b[row / 2 % 2];
    ptx::load_transposed(to, x + ((first + row + lane / 16) & (Stem::kRing - 1)) * StemWeight::kRow);
    if (Edge) {
      const uint32_t low = first_of_two(left - lane % 4 * 2), high = first_of_two(left - 8 - lane % 4 * 2);
      to[0] &= low, to[1] &= high, to[2] &= low, to[3] &= high;
    }
  };
  load_x(0);
#pragma unroll
  for (int row = 0; row < 2; ++row)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      ptx::load_transposed(a[row][half], (g + row * StemWeight::kRowOfG) ^ half * 32);
#pragma unroll
  for (int row = 0; row < 9; ++row) {
    if (row % 2 == 0 && row + 2 < 9) load_x(row + 2);
    const uint32_t b0 = b[row / 2 % 2][row % 2 * 2], b1 = b[row / 2 % 2][row % 2 * 2 + 1];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row < 7) ptx::multiply_add<T>(sum[row][half], a[0][half], b0, b1);
      if (row >= 2 && (!Edge || has_below)) ptx::multiply_add<T>(sum[row - 2][half], a[1][half], b0, b1);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(Stem::kThreads, 2) stem_weight_kernel(const StemWeightParams p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  using Tile = StemWeight;
  unsigned char* const memory = ptx::shared_memory();
  const uint32_t shared = ptx::shared_address(memory);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  // Neighbours are groups of channels: they read the same of x.
  const int group = static_cast<int>(blockIdx.x) % p.groups * Stem::kChannels;
  const int share = static_cast<int>(blockIdx.x) / p.groups;
  const int q0 = share % p.tiles * Tile::kTile;
  const int p0 = share / p.tiles % p.parts * p.rows, n = share / p.tiles / p.parts;
  const int end = p0 + p.rows < p.p ? p0 + p.rows : p.p;

  // A quarter of the threads a row of x, two chunks a thread, which begins at pair q0 - 2 and row 4 * p0 - 3.
  const int chunk = thread % 64, pair = q0 - 2 + chunk;
  // What a thread knows of its place in one register, lest the compiler keep what it follows from.
  enum { kFits = 1, kHasFirst = 2, kHasSecond = 4 };
  uint32_t is = chunk + 64 < Tile::kChunks ? kFits : 0;
  if (pair >= 0 && pair < p.pairs) is |= kHasFirst;
  if (pair + 64 >= 0 && pair + 64 < p.pairs && is & kFits) is |= kHasSecond;
  ptx::opaque(is);
  const unsigned char* const at_pair = static_cast<const unsigned char*>(p.x) + n * p.image + pair * p.pixel;
  const auto fetch = [&](uint32_t (&to)[2][3], int row) {  // of four rows from 4 * row - 3 on
    const int h = 4 * row - 3 + thread / 64;
    const unsigned char* const from = at_pair + h * p.row;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int c = 0; c < 3; ++c)
        to[i][c] = h >= 0 && h < p.h && is & (i ? kHasSecond : kHasFirst)
                       ? *reinterpret_cast<const uint32_t*>(from + i * 64 * p.pixel + c * p.plane)
                       : 0;
  };
  const auto put = [&](const uint32_t (&words)[2][3], int row) {
    unsigned char* const to = memory + ((4 * row + thread / 64) & (Stem::kRing - 1)) * Tile::kRow + chunk * 16;
    *reinterpret_cast<uint4*>(to) = stem_chunk(words[0], p.nchw);
    if (is & kFits) *reinterpret_cast<uint4*>(to + 1024) = stem_chunk(words[1], p.nchw);
  };

  // Eight threads a position, 16 bytes each; those of neighbouring positions are exchanged, so that eight meet in no
  // bank.
  const int unit = thread % 8, position = thread / 8;
  const uint32_t g_to = shared + Tile::kG + position * 128 + (unit ^ position % 8) * 16;
  const auto copy_g = [&](int row) {  // 2 * row and the one below
    int first = position;
    ptx::opaque(first);  // or the compiler keeps what follows from it for every copy, and spills
#pragma unroll
    for (int i = 0; i < Tile::kCopies; ++i) {
      const int at = first + i * (Stem::kThreads / 8), below = at >= Tile::kTile, q = q0 + at - below * Tile::kTile;
      const bool exists = q < p.q1 && 2 * row + below < p.p1;
      const int64_t row_of_g = int64_t{n} * p.p1 + 2 * row + below;
      const int64_t value = (row_of_g * p.q1 + q) * p.k + group + 8 * unit;
      ptx::copy_async(g_to + (row & 1) * 2 * Tile::kRowOfG + i * (Stem::kThreads / 8) * 128,
                      static_cast<const unsigned char*>(p.g) + (exists ? 2 * value : 0), exists);
    }
    ptx::commit_copies();
  };

  copy_g(p0);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    uint32_t words[2][3];
    fetch(words, p0 + i);
    put(words, p0 + i);
  }
  ptx::wait_for_copies<0>();
  __syncthreads();

  const uint32_t x = shared + (lane % 16 + warp % 4) * 16;
  const uint32_t g = shared + Tile::kG + (lane / 16 * 8 + lane % 8) * 128 +
                     ((warp / 4 * 4 + lane / 8 % 2) ^ lane % 8) * 16;
  float sum[7][2][4] = {};
#pragma unroll 1
  for (int row = p0; row < end; ++row) {
    const bool more = row + 1 < end, has_below = 2 * row + 1 < p.p1;
    uint32_t ahead[2][3];
    if (more) {
      copy_g(row + 1);
      fetch(ahead, row + 3);
    }
    const uint32_t g_row = g + (row & 1) * 2 * Tile::kRowOfG;
    const int columns = p.q1 - q0 < Tile::kTile ? p.q1 - q0 : Tile::kTile;
    int step = 0;
    if (has_below) {
#pragma unroll 1
      for (; step + Tile::kStep <= columns; step += Tile::kStep)
        stem_weight_multiply<T, false>(sum, x + step * 16, g_row + step * 128, 4 * row, 0, true);
    }
#pragma unroll 1
    for (; step < columns; step += Tile::kStep)
      stem_weight_multiply<T, true>(sum, x + step * 16, g_row + step * 128, 4 * row, columns - step, has_below);
    if (more) {
      put(ahead, row + 3);
      ptx::wait_for_copies<0>();
      __syncthreads();
    }
  }

  // Values 2 * (lane % 4) and the next of chunk j, of channels lane / 4 and lane / 4 + 8.
  float* const to = p.shares + (int64_t{share} * p.k + group + warp / 4 * 32 + lane / 4) * Stem::kSize +
                    warp % 4 * 8 + lane % 4 * 2;
#pragma unroll
  for (int row = 0; row < 7; ++row)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        *reinterpret_cast<float2*>(to + (half * 16 + i * 8) * Stem::kSize + row * 32) = {sum[row][half][2 * i],
                                                                                        sum[row][half][2 * i + 1]};
#endif
}

}  // namespace fused_resnet::conv
