// A 3x3 of 64 to 64 channels on Hopper, whose loads would bound it as a product of tiles: nine reads of x and of the
// weights for 64 columns of sums. By lines (lines_sm90_parts.cuh) x is read once, the weights stay, and a line in
// registers is multiplied for all three outputs that it belongs to: the one above, which it finishes, its own, and the
// one below, which it begins. So a warp group holds three lines of sums, in turns.
//
// Each warp group has lines of its own, one after another down a strip. Warps 0 and 1 fetch them, each for a group.

#pragma once

#include <cstdint>

#include "lines_sm90_parts.cuh"

namespace fused_resnet::conv {

struct LinesParams {
  CUtensorMap x, weight;
  Strips strips;
  int64_t lines;  // in all strips of all images
  int p, q;
  float floor;  // of y: 0 after a ReLU, else -inf
  bool early;   // the weight may be read while the kernel before runs
  const void* residual;
  const float *scale, *bias;
  void* y;
};

struct LinesLayout {
  static constexpr int kTaps = 9;
  static constexpr int kLines = 5;  // that a group has under way
  static constexpr int kTiles = kTaps + 2 * kLines;
  static constexpr int kBarriers = 1 + 2 * 2 * kLines;  // the weight; full and empty lines of each group
  static constexpr int kVectors = kTiles * ptx::kTileBytes + kBarriers * 8;  // scale, bias
  static constexpr int kShared = kVectors + 2 * 64 * 4;
  static constexpr int kThreads = 384;
  using Registers = LinesRegisters<40, 232>;
  static_assert(kShared <= 227 * 1024);
};

template <class T>
__global__ void __launch_bounds__(384, 1) conv_lines_kernel(const __grid_constant__ LinesParams p) {
  using Layout = LinesLayout;
  constexpr int kTaps = Layout::kTaps, kLines = Layout::kLines;
  ptx::launch_dependents();
  unsigned char* const memory = ptx::shared_memory();
  const uint32_t shared = ptx::shared_address(memory);
  const auto tile_at = [&](int i) { return shared + i * ptx::kTileBytes; };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = warp < 4 ? warp % 2 : warp / 4 - 1;
  const uint32_t weight_here = tile_at(Layout::kTiles);
  const auto line_at = [&](int i) { return tile_at(kTaps + group * kLines + i); };
  const auto full = [&](int i) { return weight_here + 8 + 8 * (2 * group * kLines + i); };
  const auto empty = [&](int i) { return full(kLines + i); };

  if (threadIdx.x % 32 == 0 && warp < 2) {
    if (warp == 0) ptx::init_barrier(weight_here, 1);
    for (int i = 0; i < kLines; ++i) {
      ptx::init_barrier(full(i), 1);
      ptx::init_barrier(empty(i), 4);  // the group's warps
    }
    ptx::publish_barriers();
  }
  __syncthreads();
  const int64_t part = 2 * blockIdx.x + group, parts = 2 * gridDim.x;
  int first = static_cast<int>(part * p.lines / parts);
  const int last = static_cast<int>((part + 1) * p.lines / parts);
  // Walks the group's lines, as many of one strip at a time as it has: f(n, column, first line, the one after the
  // last).
  const auto strips = [&](const auto& f) {
    const int height = p.p;
    while (first < last) {
      const int strip = first / height, from = first - strip * height, to = min(from + last - first, height);
      const int n = strip / p.strips.across;
      f(n, (strip - n * p.strips.across) * p.strips.width, from, to);
      first += to - from;
    }
  };

  if (warp < 4) {
    ptx::keep_registers<Layout::Registers::kFetch>();
    if (warp > 1 || lane != 0) return;
    if (!p.early) ptx::wait_for_kernels();
    if (warp == 0) {
      ptx::arrive_and_expect(weight_here, kTaps * ptx::kTileBytes);
      for (int i = 0; i < kTaps; ++i) ptx::load_tiled(&p.weight, tile_at(i), weight_here, 0, i, 0);
    }
    ptx::prefetch_map(&p.x);
    if (p.early) ptx::wait_for_kernels();
    Ring<kLines> ring;
    strips([&](int n, int column, int from, int to) {
      for (int line = max(from - 1, 0); line <= to; ++line, ring.advance()) {  // zeros below the map
        ptx::wait(empty(ring.at), ring.phase ^ 1);
        ptx::arrive_and_expect(full(ring.at), (p.strips.width + 2) * 64 * sizeof(T));
        ptx::load_line(&p.x, line_at(ring.at), full(ring.at), 0, column - 1, line, n);
      }
    });
    return;
  }

  // A warp group.
  ptx::take_registers<Layout::Registers::kCompute>();
  const LinesThread<T> me;
  ptx::wait(weight_here, 0);
  for (int i = group; i < kTaps; i += 2) me.reorder(memory + i * ptx::kTileBytes, false, 1 + group);
  ptx::fence_shared_writes();
  ptx::wait_for_kernels();
  float* const scale = reinterpret_cast<float*>(memory + Layout::kVectors);
  float* const bias = scale + 64;
  if (group == 0 && me.thread < 64) {
    scale[me.thread] = p.scale != nullptr ? p.scale[me.thread] : 1.0f;
    bias[me.thread] = p.bias != nullptr ? p.bias[me.thread] : 0.0f;
  }
  ptx::barrier_of(3, 256);

  Ring<kLines> ring;
  float sums[3][32];
  uint32_t value[4][4];  // of the residual, for the line above; then of y
  strips([&](int n, int column, int from, int to) {
    // The first of the thread's rows of y and of the residual, in the strip's first line.
    const int row = n * p.p * p.q + column + me.row, width = min(p.strips.width, p.q - column);
    // All three, also where there is no such output: what is not begun is not stored either.
    const auto step = [&](int line, float(&above)[32], float(&own)[32], float(&below)[32]) {
      uint32_t next[4][4], a[2][4][4];
      int own_row = row + line * p.q;
      const T* residual[2] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (p.residual != nullptr && line >= from && line < to && me.row + 8 * j < width)
          residual[j] = static_cast<const T*>(p.residual) + int64_t{64} * (own_row + 8 * j);
      me.load(next, residual, 0);  // a step ahead
      ptx::wait(full(ring.at), ring.phase);
      // The taps in column s of the filter, of one of its rows. Descriptors are reckoned in every step: kept, they
      // would be 72 registers.
      const uint64_t weights = ptx::operand(ptx::uniform(shared), 0);
      const auto multiply = [&](float(&sum)[32], int r, int s, bool add) {
#pragma unroll
        for (int part = 0; part < 4; ++part)
          ptx::multiply<T>(sum, a[s % 2][part], ptx::operand(weights, 3 * r + s, part), add || part > 0);
      };
      me.load_operand(a[0], line_at(ring.at), 0);
      me.load_operand(a[1], line_at(ring.at), 1);
      ptx::pin(a[0]);
      ptx::pin(a[1]);
      ptx::pin(above);
      ptx::pin(own);
      ptx::pin(below);
      ptx::begin_products();
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        multiply(above, 2, s, true);
        multiply(own, 1, s, s > 0 || line > 0);
        multiply(below, 0, s, s > 0);
        ptx::commit_products();
      }
      ptx::wait_for_products<1>();
      ptx::pin(a[0]);
      me.load_operand(a[0], line_at(ring.at), 2);
      ptx::pin(a[0]);
      ptx::begin_products();
      multiply(above, 2, 2, true);
      ptx::commit_products();
      multiply(own, 1, 2, true);
      multiply(below, 0, 2, true);
      ptx::commit_products();
      __syncwarp();
      if (lane == 0) ptx::arrive(empty(ring.at));
      ring.advance();
      ptx::wait_for_products<1>();
      ptx::pin(above);
      me.pack(value, above, p.floor, [&](const float2& of, int j, int i) {
        const float2 factor = me.of_vector(scale, j), more = me.of_vector(bias, j) + me.unpack(value, j, i);
        return float2{of.x * factor.x + more.x, of.y * factor.y + more.y};
      });
      ptx::opaque(own_row);  // not two addresses all along
      T* y[2] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (line > from && me.row + 8 * j < width)
          y[j] = static_cast<T*>(p.y) + int64_t{64} * (own_row - p.q + 8 * j);
      me.store(y, 0, value);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) value[i][j] = next[i][j];
      ptx::wait_for_products<0>();
      ptx::pin(a[0]);
      ptx::pin(a[1]);
      ptx::pin(own);
      ptx::pin(below);
    };
    for (int line = max(from - 1, 0); line <= to; line += 3) {
      step(line, sums[0], sums[1], sums[2]);
      if (line + 1 <= to) step(line + 1, sums[1], sums[2], sums[0]);
      if (line + 2 <= to) step(line + 2, sums[2], sums[0], sums[1]);
    }
  });
}

}  // namespace fused_resnet::conv
