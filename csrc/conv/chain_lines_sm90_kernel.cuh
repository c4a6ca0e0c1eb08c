// The chained bottleneck of chain_sm90_kernel.cuh by lines: see lines_sm90_parts.cuh. x comes to shared memory once,
// not nine times; the residual, x2, y and z never do.
//
// Two warp groups work on two neighbouring lines, then on the two below. Warp 0 fetches: lines of x for both groups
// into one ring, and what is soon to be read of the residual into L2.

#pragma once

#include <cstdint>

#include "lines_sm90_parts.cuh"

namespace fused_resnet::conv {

struct ChainLinesParams {
  CUtensorMap x, weight1, weight2, projection, weight3;
  Strips strips;
  int64_t pairs;  // of lines, in all strips of all images
  int p, q, h2, w2, stride2;
  float floor;  // of y: 0 after a ReLU, else -inf
  bool quarter;
  bool early;  // weights may be read while the kernel before runs
  const float *bias1, *bias2, *bias3;
  const void *residual, *x2;
  void *y, *z;
};

// Following: tiles of 64 channels that the next convolution has. Segment: a projection of 64 channels in the residual's
// place.
template <int Following, bool Segment>
struct ChainLinesLayout {
  static constexpr int kTaps = 9, kOut = 4, kFollowing = Following * kOut;
  static constexpr int kWeight2 = kTaps, kProjection = kWeight2 + kOut;
  static constexpr int kWeight3 = kProjection + (Segment ? kOut : 0);
  static constexpr int kWeights = kWeight3 + kFollowing;
  static constexpr int kLines = 6;  // four that a pair reads, two for the next
  static constexpr int kTiles = kWeights + kLines;
  static constexpr int kBarriers = 2 + 2 * kLines;  // the 3x3's weight, the others, full and empty lines
  static constexpr int kShared = kTiles * ptx::kTileBytes + kBarriers * 8;
  static constexpr int kThreads = 384;
  using Registers = LinesRegisters<40, 232>;
  static_assert(kShared <= 227 * 1024);
};

template <class T, int Following, bool Segment>
__global__ void __launch_bounds__(384, 1) chain_lines_kernel(const __grid_constant__ ChainLinesParams p) {
  using Layout = ChainLinesLayout<Following, Segment>;
  constexpr int kTaps = Layout::kTaps, kOut = Layout::kOut, kLines = Layout::kLines;
  ptx::launch_dependents();
  unsigned char* const memory = ptx::shared_memory();
  const uint32_t shared = ptx::shared_address(memory);
  const auto tile_at = [&](int i) { return shared + i * ptx::kTileBytes; };
  const auto line_at = [&](int i) { return tile_at(Layout::kWeights + i); };
  const uint32_t barriers = tile_at(Layout::kTiles);
  const auto full = [&](int i) { return barriers + 16 + 8 * i; };
  const auto empty = [&](int i) { return barriers + 16 + 8 * (kLines + i); };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    ptx::init_barrier(barriers, 1);
    ptx::init_barrier(barriers + 8, 1);
    for (int i = 0; i < kLines; ++i) {
      ptx::init_barrier(full(i), 1);
      ptx::init_barrier(empty(i), 8);  // the warps that multiply
    }
    ptx::publish_barriers();
  }
  __syncthreads();
  const int first = static_cast<int>(blockIdx.x * p.pairs / gridDim.x);
  const int last = static_cast<int>((blockIdx.x + 1) * p.pairs / gridDim.x);
  Strips::At at = p.strips.at(first);

  if (warp < 4) {
    ptx::keep_registers<Layout::Registers::kFetch>();
    if (threadIdx.x != 0) return;
    if (!p.early) ptx::wait_for_kernels();
    ptx::arrive_and_expect(barriers, kTaps * ptx::kTileBytes);
    for (int i = 0; i < kTaps; ++i) ptx::load_tiled(&p.weight1, tile_at(i), barriers, 0, i, 0);
    ptx::prefetch_map(&p.x);
    if (p.early) ptx::wait_for_kernels();
    const auto load_others = [&] {
      const uint32_t others = barriers + 8;
      ptx::arrive_and_expect(others, (Layout::kWeights - kTaps) * ptx::kTileBytes);
      for (int i = 0; i < kOut; ++i) {
        ptx::load_tiled(&p.weight2, tile_at(Layout::kWeight2 + i), others, 0, 0, 64 * i);
        if (Segment) ptx::load_tiled(&p.projection, tile_at(Layout::kProjection + i), others, 0, 0, 64 * i);
        for (int f = 0; f < Following; ++f)
          ptx::load_tiled(&p.weight3, tile_at(Layout::kWeight3 + f * kOut + i), others, 64 * i, 0, 64 * f);
      }
    };
    const auto prefetch_residual = [&](const Strips::At& at) {
      const int width = min(p.strips.width, p.q - at.column);
      for (int line = at.line; line < min(at.line + 2, p.p); ++line)
        ptx::prefetch_dense(
            static_cast<const T*>(p.residual) + ((int64_t{at.n} * p.p + line) * p.q + at.column) * 64 * kOut,
            width * 64 * kOut * sizeof(T));
    };

    Ring<kLines> ring;
    for (int pair = first; pair < last; ++pair, p.strips.advance(at)) {
      // Of the four lines, two are there from the pair above; three are enough for a last one without its second.
      int line = pair == first || at.line == 0 ? at.line - 1 : at.line + 1;
      for (; line <= min(at.line + 2, p.p); ++line) {
        ptx::wait(empty(ring.at), ring.phase ^ 1);
        ptx::arrive_and_expect(full(ring.at), (p.strips.width + 2) * 64 * sizeof(T));
        ptx::load_line(&p.x, line_at(ring.at), full(ring.at), 0, at.column - 1, line, at.n);
        ring.advance();
      }
      if (pair == first) load_others();
      // These lines found room when the 3x3 of the pair before the last was done. What the last will add is read next,
      // and comes to L2 meanwhile; earlier it might be gone again when it is read.
      if (!Segment && p.residual != nullptr && pair - 1 > first) prefetch_residual(p.strips.at(pair - 1));
    }
    if (!Segment && p.residual != nullptr && last - 1 > first) prefetch_residual(p.strips.at(last - 1));
    return;
  }

  // A warp group.
  ptx::take_registers<Layout::Registers::kCompute>();
  const int group = warp / 4 - 1;
  const LinesThread<T> me;

  // The residual is loaded so many tiles of 64 channels ahead, as registers allow.
  constexpr int kAhead = Following > 1 ? 3 : kOut;
  uint32_t values[kAhead][4][4];  // of the residual, then of y
  uint32_t second[4][4];          // of x2
  Ring<kLines> ring;              // at the first of four lines
  bool ready = false;
  ptx::wait_for_kernels();
  ptx::wait(barriers, 0);
  for (int i = first; i < last; ++i) {
    const int line = at.line + group;
    const bool mine = line < p.p;
    const T* residual[2] = {};
    const T* x2[2] = {};
    T *y[2] = {}, *z[2] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = at.column + me.row + 8 * j;
      if (!mine || me.row + 8 * j >= p.strips.width || column >= p.q) continue;
      const int64_t m = (int64_t{at.n} * p.p + line) * p.q + column;
      if (Segment)
        x2[j] = static_cast<const T*>(p.x2) +
                ((int64_t{at.n} * p.h2 + line * p.stride2) * p.w2 + column * p.stride2) * 64;
      else if (p.residual != nullptr)
        residual[j] = static_cast<const T*>(p.residual) + m * 64 * kOut;
      z[j] = static_cast<T*>(p.z) + m * 64 * Following;
      if (!p.quarter)
        y[j] = static_cast<T*>(p.y) + m * 64 * kOut;
      else if (line % 2 == 0 && column % 2 == 0)
        y[j] = static_cast<T*>(p.y) +
               ((int64_t{at.n} * ((p.p + 1) / 2) + line / 2) * ((p.q + 1) / 2) + column / 2) * 64 * kOut;
    }
    p.strips.advance(at);

    float sum[32];
    if (mine) {
      if (Segment) {
        me.load(second, x2, 0);
      } else {
#pragma unroll
        for (int out = 0; out < kAhead; ++out) me.load(values[out], residual, 64 * out);
      }
      Ring<kLines> from = ring;
      if (group == 1) from.advance();
      uint32_t a[2][4][4];
      ptx::wait(full(from.at), from.phase);
      me.load_operand(a[0], line_at(from.at), 0);
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        ptx::pin(sum);
        ptx::pin(a[tap % 2]);
        ptx::begin_products();
#pragma unroll
        for (int part = 0; part < 4; ++part)
          ptx::multiply<T>(sum, a[tap % 2][part], ptx::operand(tile_at(tap), part), tap > 0 || part > 0);
        ptx::commit_products();
        if (tap + 1 == kTaps) break;
        if (tap > 0) {  // its operand's registers are the next one's
          ptx::wait_for_products<1>();
          ptx::pin(a[(tap + 1) % 2]);
        }
        if (tap % 3 == 2) {
          from.advance();
          ptx::wait(full(from.at), from.phase);
        }
        me.load_operand(a[(tap + 1) % 2], line_at(from.at), (tap + 1) % 3);
      }
      ptx::wait_for_products<0>();
      ptx::pin(sum);
      ptx::pin(a[0]);
      ptx::pin(a[1]);
    }
    // Two lines are done with, or at the end of a strip all of them. Also what this group did not read has to be there
    // before it is given back: twice in one phase would free what the other group reads.
    __syncwarp();
    for (int done = at.line > 0 ? 2 : line - group + 1 < p.p ? 4 : 3; done > 0; --done, ring.advance()) {
      if (lane != 0) continue;
      ptx::wait(full(ring.at), ring.phase);
      ptx::arrive(empty(ring.at));
    }
    __syncwarp();

    if (!ready) {
      ptx::wait(barriers + 8, 0);
      for (int j = group; j < Layout::kWeights - Layout::kWeight2; j += 2)
        me.reorder(memory + (Layout::kWeight2 + j) * ptx::kTileBytes, j >= kOut, 1 + group);
      ptx::fence_shared_writes();
      ptx::barrier_of(3, 256);
      ready = true;
    }
    if (!mine) continue;

    uint32_t h[4][4];
    me.pack(h, sum, 0.0f, [&](const float2& of, int j, int) {
      return of + *reinterpret_cast<const float2*>(p.bias1 + 8 * j + me.pair);
    });

    float reduced[Following][32];
    const auto expand = [&](int out) {
#pragma unroll
      for (int part = 0; part < 4; ++part)
        ptx::multiply<T>(sum, h[part], ptx::operand(tile_at(Layout::kWeight2 + out), part), part > 0);
      if (Segment) {
#pragma unroll
        for (int part = 0; part < 4; ++part)
          ptx::multiply<T>(sum, second[part], ptx::operand(tile_at(Layout::kProjection + out), part), true);
      }
    };
    ptx::pin(h);
    if (Segment) ptx::pin(second);
    ptx::pin(sum);
    ptx::begin_products();
    expand(0);
    ptx::commit_products();
#pragma unroll
    for (int out = 0; out < kOut; ++out) {
      uint32_t(&value)[4][4] = values[out % kAhead];
      float2 bias[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) bias[j] = me.of_vector(p.bias2 + 64 * out, j);
      if (out == 0)
        ptx::wait_for_products<0>();
      else
        ptx::wait_for_products<1>();  // the expand; the reduce of the tile before may go on
      ptx::pin(sum);
      me.pack(value, sum, p.floor, [&](const float2& of, int j, int i) {
        return Segment ? of + bias[j] : of + (bias[j] + me.unpack(value, j, i));
      });
      if (out > 0) {
        ptx::wait_for_products<0>();
        ptx::pin(values[(out - 1) % kAhead]);
        if (!Segment && out - 1 + kAhead < kOut) me.load(values[(out - 1) % kAhead], residual, 64 * (out - 1 + kAhead));
      }
      ptx::pin(value);
      ptx::pin(sum);
#pragma unroll
      for (int f = 0; f < Following; ++f) ptx::pin(reduced[f]);
      ptx::begin_products();
      if (out + 1 < kOut) {
        expand(out + 1);
        ptx::commit_products();
      }
#pragma unroll
      for (int f = 0; f < Following; ++f)
#pragma unroll
        for (int part = 0; part < 4; ++part)
          ptx::multiply<T>(reduced[f], value[part], ptx::operand(tile_at(Layout::kWeight3 + f * kOut + out), part),
                           out > 0 || part > 0);
      ptx::commit_products();
      me.store(y, 64 * out, value);
    }
    ptx::wait_for_products<0>();
    ptx::pin(values[(kOut - 1) % kAhead]);
    ptx::pin(h);
    if (Segment) ptx::pin(second);
#pragma unroll
    for (int f = 0; f < Following; ++f) {
      ptx::pin(reduced[f]);
      uint32_t packed[4][4];
      me.pack(packed, reduced[f], 0.0f,
              [&](const float2& of, int j, int) { return of + me.of_vector(p.bias3 + 64 * f, j); });
      me.store(z, 64 * f, packed);
    }
  }
}

}  // namespace fused_resnet::conv
