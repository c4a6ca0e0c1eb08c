// What kernels by lines are made of. Their tiles are lines of outputs of a 3x3, of at most 56: a line of the input lies
// in shared memory once, its columns are rows of 128 bytes, and the left operands of all taps come from there to
// registers by ldmatrix, which begins at any row.
//
// Nothing else passes through shared memory but the weights, which stay there. For that, output channels are in an
// order in which a thread's values are whole chunks of memory: what is added, multiplied again or stored is 16 bytes
// each, and goes from memory to registers and back. Weights are put in that order where they lie in shared memory,
// once.

#pragma once

#include <cstdint>

#include "geometry.h"
#include "ring.h"
#include "sm90_ptx.cuh"

namespace fused_resnet::conv {

constexpr int kMostOfLine = 56;  // outputs: with a neighbour at either end they are 58 of a tile's 64 rows

// Registers of a thread that fetches and of one that multiplies, three warp groups together: setmaxnreg gives no more
// than the block was launched with, and waits for it.
template <int Fetch, int Compute>
struct LinesRegisters {
  static constexpr int kFetch = Fetch, kCompute = Compute;
  static_assert(Fetch + 2 * Compute <= 3 * (65536 / 384 / 8 * 8));
};

// Where a channel of 64 is among the columns of a tile of sums: those that a thread has of a row (8j + 2 * (lane % 4)
// and the next, j below 8) become channels 8 * (lane % 4) to + 7 of the first 32 and of the last 32.
FUSED_RESNET_HD constexpr int channel_order(int channel) {
  const int chunk = channel / 8 % 4, word = channel / 2 % 4;
  return channel / 32 * 32 + 8 * word + 2 * chunk + channel % 2;
}

// A thread of a warp group, and what it has of a tile.
template <class T>
struct LinesThread {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = threadIdx.x % 32;
  const int row = warp * 16 + lane / 4;  // the first of its two, the other is eight further
  const int pair = lane % 4 * 2;         // its columns of eight
  const int chunk = lane % 4 * 8;        // its channels of 32, in channel order
  // Of a line, for the first tap of a row of the filter, the row that the lane gives to ldmatrix. Past the line's end
  // are rows that no output needs.
  const int given = min(warp * 16 + lane % 16, 61);

  // The left operand of the taps in column s of the filter, of a line.
  __device__ void load_operand(uint32_t (&a)[4][4], uint32_t line, int s) const {
    int r = given + s;
    ptx::opaque(r);  // reckoned anew: twelve addresses would be as many registers
    const uint32_t at = line + r * 128 + (lane / 16 ^ (r & 7)) * 16;  // a line begins at a multiple of 1024 bytes
#pragma unroll
    for (int part = 0; part < 4; ++part) ptx::load_matrices(a[part], at ^ part << 5);
  }

  // By all threads of a group, with a barrier of its own: the rows of a tile of weights in channel order, and, where
  // values that are so are multiplied, also its columns. wgmma reads them after a fence and another barrier.
  __device__ void reorder(unsigned char* weight, bool columns, int barrier) const {
    const int from = thread / 2, half = thread % 2 * 4, to = channel_order(from);
    uint32_t words[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 read = *reinterpret_cast<const uint4*>(weight + from * 128 + ((half + i) ^ (from & 7)) * 16);
      words[i][0] = read.x, words[i][1] = read.y, words[i][2] = read.z, words[i][3] = read.w;
    }
    ptx::barrier_of(barrier, 128);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      *reinterpret_cast<uint4*>(weight + to * 128 + ((half + i) ^ (to & 7)) * 16) =
          columns ? uint4{words[0][i], words[1][i], words[2][i], words[3][i]}
                  : uint4{words[i][0], words[i][1], words[i][2], words[i][3]};
  }

  // 64 channels of the two rows, from where they are or zeros: an operand, or a tile as pack() makes it.
  __device__ void load(uint32_t (&a)[4][4], const T* const (&from)[2], int channel) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 read = ptx::load_16_bytes(from[i] + channel + 32 * half + chunk, from[i] != nullptr);
        a[2 * half][i] = read.x, a[2 * half][2 + i] = read.y;
        a[2 * half + 1][i] = read.z, a[2 * half + 1][2 + i] = read.w;
      }
    }
  }

  __device__ void store(T* const (&to)[2], int channel, const uint32_t (&a)[4][4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (to[i] == nullptr) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        ptx::store_16_bytes(to[i] + channel + 32 * half + chunk,
                            {a[2 * half][i], a[2 * half][2 + i], a[2 * half + 1][i], a[2 * half + 1][2 + i]});
    }
  }

  // Between that order and the natural one, in which columns are channels: words go round among the four lanes of a
  // row.
  __device__ void turn(uint32_t (&a)[4][4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto word = [&](int w) -> uint32_t& { return a[2 * half + w / 2][w % 2 * 2 + i]; };
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2) {
          const bool upper = lane & distance;
#pragma unroll
          for (int w = 0; w < 4; ++w) {
            if (w & distance) continue;
            uint32_t &low = word(w), &high = word(w + distance);
            const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? low : high, distance);
            upper ? low = got : high = got;
          }
        }
      }
    }
  }

  // Of a vector of 64 channels, what belongs to the columns j.
  __device__ float2 of_vector(const float* vector, int j) const {
    return *reinterpret_cast<const float2*>(vector + j / 4 * 32 + chunk + j % 4 * 2);
  }

  // A tile of sums, of the two columns j of row i what `finished` makes of them, but at least floor.
  template <class F>
  __device__ static void pack(uint32_t (&a)[4][4], const float (&sum)[32], float floor, const F& finished) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 value = finished(float2{sum[4 * j + 2 * i], sum[4 * j + 2 * i + 1]}, j, i);
        a[j / 2][j % 2 * 2 + i] = ptx::pack(ptx::at_least(value.x, floor), ptx::at_least(value.y, floor), T{});
      }
    }
  }

  // What a packed tile has where pack() puts the columns j of row i.
  __device__ static float2 unpack(const uint32_t (&a)[4][4], int j, int i) {
    return ptx::unpack(a[j / 2][j % 2 * 2 + i], T{});
  }
};

__device__ inline float2 operator+(const float2& a, const float2& b) { return {a.x + b.x, a.y + b.y}; }

}  // namespace fused_resnet::conv
