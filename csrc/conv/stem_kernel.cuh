// The stem for the tensor cores of sm_80 and what came after: convolution 7x7 stride 2 padding 3, bias, ReLU, max-pool
// 3x3 stride 2 padding 1; or, for training, the convolution alone.
//
// Three channels do not fill a tensor core. The reduction is 7 filter rows of 8 columns (the filter's seven behind one
// of zeros, so that what they read begins at an even column of x) of 4 channels (three and a zero). A chunk is two
// neighbouring pixels: 16 bytes. Column c of the convolution reads the chunks c - 2 to c + 1 of each row. In shared
// memory a row is two planes, of the even chunks and of the odd ones: neighbours of a plane are columns two apart, and
// eight of them 128 bytes.
//
// Of the 16 rows of a matrix instruction eight are even columns, 2t, and eight the odd ones behind them, 2t + 1. A
// thread has both of a pooled column t, and column 2t - 1 comes from the lanes of t - 1; the first t of a warp is there
// for its neighbour only.
//
// A block walks down pooled rows p, and the rows of x that the next one needs come meanwhile, through registers to a
// ring. The convolution's rows 2p and 2p + 1 are computed at once, of row 2p - 1 the maxima are kept. Maxima are taken
// after bias and rounding, which keep the order, and before the ReLU: each window has a position inside the map, so
// that -inf outside never comes out.
//
// The convolution alone is computed by the same pairs of rows and columns, and each thread stores its own four.

#pragma once

#include <cstdint>

#include "sm80_ptx.cuh"

namespace fused_resnet::conv {

// Where x and the convolution's map are, and what of them a block has.
struct StemPlaces {
  const void* x;
  int64_t image, row, pixel, plane;  // bytes between images, rows and pixel pairs of x, and between the three words of
                                     // a pair, which are its channels, in channels_last its six values
  int h, pairs;                      // rows of x, pixel pairs of a row
  int p1, q1, k;                     // the convolution's map and channels
  int p, q;                          // pairs of its rows and of its columns: the pooled map
  int rows;                          // of p, of a block
  int parts, tiles, groups;          // blocks along the rows, columns and channels
  bool nchw;
};

struct StemParams : StemPlaces {
  const void* weight;
  const float* bias;
  void* y;
  int64_t advance, row_of_y;  // bytes of four rows of x, of a row of y
  uint32_t ones;  // all bits: what is masked with it is a value of its own, in registers that the compiler may choose
};

struct Stem {
  static constexpr int kThreads = 256, kWarps = 8;
  static constexpr int kChannels = 64;           // of a block
  static constexpr int kRing = 16;               // rows: 9 that are read, 5 that come
  static constexpr int kFetch = 4;               // rows of x at a time: one pair of the convolution's rows further
  static constexpr int kSize = 7 * 8 * 4;        // values of a filter
  static constexpr int kPitch = 2 * kSize + 16;  // bytes of a filter in shared memory: no two rows meet in a bank
};

// Along the columns t, and in shared memory: with the pool behind the convolution, or without.
template <bool Pools>
struct StemTile : Stem {
  static constexpr int kBefore = Pools ? 1 : 0;  // columns of a warp that are there for its neighbour only
  static constexpr int kColumns = 8 - kBefore;   // of a warp
  // Of a block. A thread fetches two chunks of a row, which are too few for all that eight times eight columns read:
  // the last warp does without its last two.
  static constexpr int kTile = Pools ? kWarps * kColumns : 62;
  static constexpr int kChunks = 2 * (kTile + kBefore) + 3;  // of a row, from column 4 * (t0 - kBefore) - 4 of x on
  static constexpr int kPlane = (Pools ? 60 : 68) * 16;  // bytes; not a multiple of 128: stores meet in no bank
  static constexpr int kRow = 2 * kPlane;
  static constexpr int kWeights = kRing * kRow;  // where they are
  static constexpr int kBias = kWeights + kChannels * kPitch;
  static constexpr int kAbove = kBias + kChannels * 4;  // 32 bytes a thread: registers are short
  static constexpr int kShared = Pools ? kAbove + kThreads * 32 : kBias;
  static_assert(kChunks <= 128 && kPlane / 16 >= (kWarps - 1) * kColumns + 10 && kPlane % 128 == 64);
};

// The chunk of a pair of pixels, from its three words in memory.
__device__ __forceinline__ uint4 stem_chunk(const uint32_t (&words)[3], bool nchw) {
  const uint32_t a = words[0], b = words[1], c = words[2];
  if (nchw) return {(a & 0xffff) | b << 16, c & 0xffff, a >> 16 | (b & 0xffff0000), c >> 16};
  return {a, b & 0xffff, b >> 16 | c << 16, c >> 16};
}

// Sums of rows 0 to Rows - 1 of the convolution; those of row i begin at row `first` + 2i of the ring, of Row bytes
// each. x: the lane's place in its row 0, weight: in the filters. drop: the lane has the pixel before the filter, which
// may be a NaN.
template <class T, int Rows, int Row>
__device__ __forceinline__ void stem_multiply(float (&sum)[Rows][8][4], uint32_t x, uint32_t weight, int first,
                                              bool drop, uint32_t ones) {
  // Every second filter row, then the others: the second row of the convolution reads what the first reads next.
  constexpr int order[7] = {0, 2, 4, 6, 1, 3, 5};
  uint32_t a[2][2][4], b[2][4];
  const auto load_x = [&](uint32_t (&to)[2][4], int row, int half) {  // half of a row's reduction
    ptx::load_matrices(to[half], x + ((first + row) & (Stem::kRing - 1)) * Row + half * 16);
    if (half == 0) {
      if (drop) to[0][0] = to[0][1] = 0;
      to[0][2] &= ones;
      to[0][3] &= ones;
    }
  };
  const auto load_weight = [&](int step) {  // of 16 channels, for half a row
    const int column = 2 * order[step / 8] + step / 4 % 2;
    ptx::load_matrices(b[step % 2], weight + step % 4 * 16 * Stem::kPitch + column * 32);
  };
  // Of the filter's i-th row: what it reads for the convolution's first row goes to a[i % 2], for the second, two rows
  // on, to the other, where the next one finds it.
  const auto load_rows = [&](int i, int half) {
    if (Rows == 1 || i == 0 || i == 4) load_x(a[i % 2], order[i], half);
    if (Rows == 2) load_x(a[(i + 1) % 2], order[i] + 2, half);
  };
  load_weight(0);
  load_rows(0, 0);
#pragma unroll
  for (int step = 0; step < 56; ++step) {
    const int i = step / 8, half = step / 4 % 2;
    if (step % 4 == 0 && step) __syncwarp();  // or the compiler loads too far ahead, and spills
    if (step + 1 < 56) load_weight(step + 1);
    if (step % 8 == 0) load_rows(i, 1);
    if (step % 8 == 4 && i + 1 < 7) load_rows(i + 1, 0);
#pragma unroll
    for (int row = 0; row < Rows; ++row)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        ptx::multiply_add<T>(sum[row][step % 4 * 2 + j], a[(i + row) % 2][half], b[step % 2][2 * j],
                             b[step % 2][2 * j + 1]);
  }
}

// Maxima of columns 2t - 1, 2t and 2t + 1 of a row of the convolution, rounded, two channels a word.
template <class T>
__device__ __forceinline__ void stem_columns(uint32_t (&to)[8], const float (&sum)[8][4], const float* bias,
                                             bool has_odd) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 b = *reinterpret_cast<const float2*>(bias + j / 4 * 32 + j % 4 * 2);
    const uint32_t even = ptx::pack(sum[j][0] + b.x, sum[j][1] + b.y, T{});
    const uint32_t odd = has_odd ? ptx::pack(sum[j][2] + b.x, sum[j][3] + b.y, T{}) : ptx::lowest(T{});
    to[j] = ptx::larger(ptx::larger(even, odd, T{}), __shfl_up_sync(0xffffffffu, odd, 4), T{});
  }
}

// The sums of a thread's even or odd column: 64 bytes lie between its two groups of eight channels.
template <class T, int Odd>
__device__ __forceinline__ void stem_store(unsigned char* to, const float (&sum)[8][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = ptx::pack(sum[4 * i + j][2 * Odd], sum[4 * i + j][2 * Odd + 1], T{});
    ptx::store_16_bytes(to + 64 * i, {words[0], words[1], words[2], words[3]});
  }
}

template <class T, bool Pools>
__global__ void __launch_bounds__(Stem::kThreads, 2) stem_kernel(const StemParams p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  using Tile = StemTile<Pools>;
  ptx::launch_dependents();
  unsigned char* const memory = ptx::shared_memory();
  const uint32_t shared = ptx::shared_address(memory);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  // Neighbours are groups of filters: they read the same of x.
  int block = blockIdx.x;
  const int group = block % p.groups * Stem::kChannels;
  block /= p.groups;
  const int t0 = block % p.tiles * Tile::kTile;
  block /= p.tiles;
  const int p0 = block % p.parts * p.rows, n = block / p.parts;
  const int end = p0 + p.rows < p.p ? p0 + p.rows : p.p;

  for (int i = thread; i < Stem::kChannels * Stem::kSize / 8; i += Stem::kThreads) {
    const int row = i / (Stem::kSize / 8), chunk = i % (Stem::kSize / 8);
    ptx::copy_async(
        shared + Tile::kWeights + row * Stem::kPitch + chunk * 16,
        static_cast<const unsigned char*>(p.weight) + (int64_t{group} + row) * (2 * Stem::kSize) + chunk * 16, true);
  }
  ptx::commit_copies();
  float* const all_bias = reinterpret_cast<float*>(memory + Tile::kBias);
  if (Pools && thread < Stem::kChannels) all_bias[thread] = p.bias[group + thread];

  const int quarter = lane % 4, t = t0 + warp * Tile::kColumns - Tile::kBefore + lane / 4;
  const int chunk = thread % 64, pair = 2 * (t0 - Tile::kBefore) - 2 + chunk;
  // What a thread knows of its place in one register, lest the compiler keep what it follows from.
  enum { kActive = 1, kStores = 2, kOdd = 4, kDrop = 8, kSecond = 16, kHasFirst = 32, kHasSecond = 64 };
  uint32_t is = 0;
  if (t0 + warp * Tile::kColumns < p.q) is |= kActive;
  if (lane >= 4 * Tile::kBefore && t < p.q && t < t0 + Tile::kTile) is |= kStores;
  if (t >= 0 && 2 * t + 1 < p.q1) is |= kOdd;
  if (quarter < 2) is |= kDrop;
  if (chunk + 64 < Tile::kChunks) is |= kSecond;
  if (pair >= 0 && pair < p.pairs) is |= kHasFirst;
  if (pair + 64 >= 0 && pair + 64 < p.pairs && is & kSecond) is |= kHasSecond;
  ptx::opaque(is);

  // A quarter of the threads a row, two chunks a thread. The convolution's row 2 * p0 - 1 begins with row 4 * p0 - 5.
  unsigned char* const place = memory + chunk % 2 * Tile::kPlane + chunk / 2 * 16;
  int h = 4 * p0 - 5 + thread / 64;
  const unsigned char* from = static_cast<const unsigned char*>(p.x) + n * p.image + h * p.row + pair * p.pixel;
  const auto fetch = [&](uint32_t (&to)[2][3]) {
    const bool in_map = h >= 0 && h < p.h, has[2] = {in_map && is & kHasFirst, in_map && is & kHasSecond};
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int c = 0; c < 3; ++c)
        to[i][c] = has[i] ? *reinterpret_cast<const uint32_t*>(from + i * 64 * p.pixel + c * p.plane) : 0;
  };
  const auto put = [&](const uint32_t (&words)[2][3]) {
    unsigned char* const to = place + ((h + 5) & (Stem::kRing - 1)) * Tile::kRow;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 both = stem_chunk(words[i], p.nchw);
      if (i == 0 || is & kSecond) *reinterpret_cast<uint4*>(to + i * 512) = both;
    }
    h += Stem::kFetch;
    from += p.advance;
  };
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    uint32_t words[2][3];
    fetch(words);
    put(words);
  }
  ptx::wait_for_copies<0>();
  __syncthreads();

  // The matrices of a sixteenth: even columns' first chunk, odd ones', even columns' second, odd ones'.
  const uint32_t x =
      shared + ((lane / 8 + 1) / 2 % 2) * Tile::kPlane + (warp * Tile::kColumns + lane % 8 + lane / 24) * 16;
  const uint32_t weight = shared + Tile::kWeights + (lane / 16 * 8 + lane % 8) * Stem::kPitch + lane / 8 % 2 * 16;
  const float* const bias = all_bias + 8 * quarter;
  const int64_t first_row = Pools ? int64_t{n} * p.p + p0 : int64_t{n} * p.p1 + 2 * p0;
  unsigned char* y = static_cast<unsigned char*>(p.y) + first_row * p.row_of_y +
                     (int64_t{Pools ? t : 2 * t} * p.k + group + 8 * quarter) * 2;
  uint4* const above = reinterpret_cast<uint4*>(memory + Tile::kAbove) + thread;
  const auto keep_above = [&](const uint32_t (&words)[8]) {
    above[0] = {words[0], words[1], words[2], words[3]};
    above[Stem::kThreads] = {words[4], words[5], words[6], words[7]};
  };
  if constexpr (Pools) {
    if (p0 == 0) {
      constexpr uint32_t none = ptx::lowest(T{});
      keep_above({none, none, none, none, none, none, none, none});
    } else if (is & kActive) {
      float sum[1][8][4] = {};
      uint32_t words[8];
      stem_multiply<T, 1, Tile::kRow>(sum, x, weight, 4 * p0, is & kDrop, p.ones);
      stem_columns<T>(words, sum[0], bias, is & kOdd);
      keep_above(words);
    }
  }
#pragma unroll 1
  for (int row = p0; row < end; ++row) {
    const bool more = row + 1 < end;
    uint32_t ahead[2][3];
    if (more) fetch(ahead);
    if (is & kActive) {
      float sum[2][8][4] = {};
      stem_multiply<T, 2, Tile::kRow>(sum, x, weight, 4 * row + 2, is & kDrop, p.ones);
      const bool has_below = 2 * row + 1 < p.p1;
      if constexpr (Pools) {
        uint32_t words[8], below[8];
        stem_columns<T>(words, sum[0], bias, is & kOdd);
        stem_columns<T>(below, sum[1], bias, is & kOdd);
        const uint4 kept[2] = {above[0], above[Stem::kThreads]};
        const uint32_t before[8] = {kept[0].x, kept[0].y, kept[0].z, kept[0].w,
                                    kept[1].x, kept[1].y, kept[1].z, kept[1].w};
        keep_above(below);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          words[j] = ptx::larger(words[j], before[j], T{});
          if (has_below) words[j] = ptx::larger(words[j], below[j], T{});
          words[j] = ptx::larger(words[j], 0, T{});
        }
        if (is & kStores) {
          ptx::store_16_bytes(y, {words[0], words[1], words[2], words[3]});
          ptx::store_16_bytes(y + 64, {words[4], words[5], words[6], words[7]});
        }
        y += p.row_of_y;
      } else {
        if (is & kStores) {
          stem_store<T, 0>(y, sum[0]);
          if (is & kOdd) stem_store<T, 1>(y + 2 * p.k, sum[0]);
          if (has_below) {
            stem_store<T, 0>(y + p.row_of_y, sum[1]);
            if (is & kOdd) stem_store<T, 1>(y + p.row_of_y + 2 * p.k, sum[1]);
          }
        }
        y += 2 * p.row_of_y;
      }
    }
    if (more) {
      put(ahead);
      __syncthreads();
    }
  }
#endif
}

}  // namespace fused_resnet::conv
