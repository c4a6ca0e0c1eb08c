// The chained bottleneck of 128 middle channels (layer2), by lines: 3x3 -> 1x1 to 512 channels -> shortcut -> ReLU ->
// (y) -> 1x1 to 128 channels -> ReLU -> (z). Its weights take 544 KiB, too much to stay: they pass through a ring, 16
// KiB at a time, and two warp groups multiply by each. What stays are lines of x, each fetched once for all nine taps.
//
// A tile is two lines of outputs, of at most 28: 56 of the 64 rows of a product. The groups work on four lines that lie
// below one another, then on the next four. Sums are in the natural order of channels; where values are added, stored
// or read they are turned to whole chunks of memory (LinesThread::turn). Warp 0 fetches weights, warp 1 lines of x and,
// into L2, what is to be read of the residual.

#pragma once

#include <cstdint>

#include "lines_sm90_parts.cuh"

namespace fused_resnet::conv {

struct ChainStreamParams {
  CUtensorMap x, weight1, weight2, weight3;
  Strips strips;   // of lines two by two
  int steps, more;  // of four lines: of every block, and how many blocks have one more
  int p, q;
  float floor;  // of y: 0 after a ReLU, else -inf
  bool early;   // weights may be read while the kernel before runs
  const float *bias1, *bias2, *bias3;
  const void* residual;
  void *y, *z;
};

struct ChainStreamLayout {
  static constexpr int kMostOfLine = 28;
  static constexpr int kC = 2, kOut = 8;     // tiles of 64 channels: in the middle, of y
  static constexpr int kStage = 2 * ptx::kTileBytes;
  static constexpr int kStages = 7;           // of weights
  static constexpr int kLines = 10;          // six that a step reads, four for the next
  static constexpr int kHalfLine = 32 * 128;  // 64 channels of a line with its neighbours
  static constexpr int kH = kStages * kStage;  // of either group: h
  static constexpr int kFirstLine = kH + 2 * kC * ptx::kTileBytes;
  static constexpr int kBarriers = kFirstLine + kLines * kC * kHalfLine;
  static constexpr int kShared = kBarriers + 2 * (kStages + kLines) * 8;
  static constexpr int kThreads = 384;
  using Registers = LinesRegisters<40, 232>;
  static_assert(kShared <= 227 * 1024);
};

template <class T>
__global__ void __launch_bounds__(384, 1) chain_stream_kernel(const __grid_constant__ ChainStreamParams p) {
  using Layout = ChainStreamLayout;
  constexpr int kC = Layout::kC, kOut = Layout::kOut, kStages = Layout::kStages, kLines = Layout::kLines;
  constexpr int kMiddle = 64 * kC, kChannels = 64 * kOut;
  ptx::launch_dependents();
  unsigned char* const memory = ptx::shared_memory();
  const uint32_t shared = ptx::shared_address(memory);
  const auto stage_at = [&](int i) { return shared + i * Layout::kStage; };
  const auto line_at = [&](int i) { return shared + Layout::kFirstLine + i * kC * Layout::kHalfLine; };
  const auto full = [&](int stage) { return shared + Layout::kBarriers + 8 * stage; };
  const auto empty = [&](int stage) { return full(kStages + stage); };
  const auto full_line = [&](int i) { return full(2 * kStages + i); };
  const auto empty_line = [&](int i) { return full_line(kLines + i); };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) ptx::init_barrier(full(i), 1), ptx::init_barrier(empty(i), 8);
    for (int i = 0; i < kLines; ++i) ptx::init_barrier(full_line(i), 1), ptx::init_barrier(empty_line(i), 8);
    ptx::publish_barriers();
  }
  __syncthreads();
  const auto first_of = [&](int block) {
    ptx::opaque(block);  // reckoned anew, not kept
    return block * p.steps + min(block, p.more);
  };
  const int first = first_of(blockIdx.x);
  const auto goes_on = [&](int step) { return step < first_of(blockIdx.x + 1); };

  if (warp < 4) {
    ptx::keep_registers<Layout::Registers::kFetch>();
    if (warp > 1 || lane != 0) return;
    if (warp == 0) {
      if (!p.early) ptx::wait_for_kernels();
      Ring<kStages> ring;
      const auto stage = [&](const auto& load) {
        ptx::wait(empty(ring.at), ring.phase ^ 1);
        ptx::arrive_and_expect(full(ring.at), Layout::kStage);
        load(stage_at(ring.at), full(ring.at));
        ring.advance();
      };
      const auto load2 = [&](int out) {
        stage([&](uint32_t to, uint32_t barrier) {
          for (int c = 0; c < kC; ++c)
            ptx::load_tiled(&p.weight2, to + c * ptx::kTileBytes, barrier, 64 * c, 0, 64 * out);
        });
      };
      for (int step = first; goes_on(step); ++step) {
        for (int tap = 0; tap < 9; ++tap)
          for (int c = 0; c < kC; ++c)
            stage([&](uint32_t to, uint32_t barrier) { ptx::load_tiled(&p.weight1, to, barrier, 64 * c, tap, 0); });
        load2(0);
        for (int out = 0; out < kOut; ++out) {
          stage([&](uint32_t to, uint32_t barrier) { ptx::load_tiled(&p.weight3, to, barrier, 64 * out, 0, 0); });
          if (out + 1 < kOut) load2(out + 1);
        }
      }
      return;
    }
    ptx::prefetch_map(&p.x);
    ptx::wait_for_kernels();
    const auto prefetch_residual = [&](const Strips::At& at) {
      const int width = min(p.strips.width, p.q - at.column), top = 2 * at.line;
      for (int line = top; line < min(top + 4, p.p); ++line)
        ptx::prefetch_dense(
            static_cast<const T*>(p.residual) + ((int64_t{at.n} * p.p + line) * p.q + at.column) * kChannels,
            width * kChannels * sizeof(T));
    };
    Ring<kLines> ring;
    int before = -1;
    for (int step = first; goes_on(step); ++step) {
      const Strips::At at = p.strips.at(step);
      const int top = 2 * at.line, end = min(top + 4, p.p);
      // Two of the lines are there from the step above; the last is the one below the outputs.
      for (int line = step == first || at.line == 0 ? top - 1 : top + 1; line <= end; ++line, ring.advance()) {
        ptx::wait(empty_line(ring.at), ring.phase ^ 1);
        ptx::arrive_and_expect(full_line(ring.at), kC * (p.strips.width + 2) * 64 * sizeof(T));
        for (int c = 0; c < kC; ++c)
          ptx::load_line(&p.x, line_at(ring.at) + c * Layout::kHalfLine, full_line(ring.at), 64 * c, at.column - 1,
                         line, at.n);
      }
      // Not earlier than in the step before the one that reads it, or it might be gone from L2 again.
      if (p.residual != nullptr && before >= first) prefetch_residual(p.strips.at(before));
      before = step;
    }
    if (p.residual != nullptr && before >= first) prefetch_residual(p.strips.at(before));
    return;
  }

  // A warp group.
  ptx::take_registers<Layout::Registers::kCompute>();
  const int group = warp / 4 - 1;
  const LinesThread<T> me;
  Ring<kStages> weights;
  Ring<kLines> lines;  // at the first of six
  const auto release = [&](uint32_t barrier) {
    __syncwarp();
    if (lane == 0) ptx::arrive(barrier);
  };
  const auto weight_at = [&](int stage) { return ptx::operand(ptx::uniform(stage_at(stage)), 0); };
  const auto before = [&] { return weights.at == 0 ? kStages - 1 : weights.at - 1; };
  ptx::wait_for_kernels();
  for (int step = first; goes_on(step); ++step) {
    const Strips::At at = p.strips.at(step);
    const bool ends = at.line + 2 >= 2 * p.strips.pairs;  // its strip
    const int top = 2 * at.line, line0 = top + 2 * group;
    const int own = max(min(2, p.p - line0), 0), read = min(top + 4, p.p) - top + 2;  // lines of outputs; of x, in all
    const int width = p.strips.width;
    int rows[2];  // of y, or -1
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = me.row + 8 * j, below = row >= width, column = at.column + row - below * width;
      rows[j] = row < own * width && column < p.q ? (at.n * p.p + line0 + below) * p.q + column : -1;
    }
    const auto in = [&](auto* map, int channels) {  // where the thread's rows are
      struct {
        decltype(map) at[2];
      } found;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int row = rows[j];
        ptx::opaque(row);  // reckoned anew: the addresses of y and of the residual would be eight registers
        found.at[j] = map != nullptr && row >= 0 ? map + int64_t{row} * channels : nullptr;
      }
      return found;
    };
    if (own > 0) {
      uint32_t value[4][4];  // of the residual
      me.load(value, in(static_cast<const T*>(p.residual), kChannels).at, 0);

      float sums[kC][32];  // of h, then of z
      float2 bias[kC][8];  // its, before the products are done
      const auto load_bias = [&](const float* from) {
#pragma unroll
        for (int n = 0; n < kC; ++n)
#pragma unroll
          for (int j = 0; j < 8; ++j) bias[n][j] = *reinterpret_cast<const float2*>(from + 64 * n + 8 * j + me.pair);
      };
      {
        // The row of a line that the lane gives to ldmatrix: of the group's first line or of its second.
        const int given = min(me.warp * 16 + lane % 16, own * width - 1);
        const int below = given >= width, column = given - below * width;
        const auto slot = [&](int line) { return line < kLines ? line : line - kLines; };
        uint32_t a[2][4][4];
        const auto load_operand = [&](int r, int s, int c, uint32_t (&a)[4][4]) {
          const int row = column + s;
          uint32_t from = line_at(slot(lines.at + 2 * group + below + r)) + c * Layout::kHalfLine + row * 128;
          from += (lane / 16 ^ (row & 7)) * 16;
#pragma unroll
          for (int part = 0; part < 4; ++part) ptx::load_matrices(a[part], from ^ part << 5);
        };
        const auto wait_for_lines = [&](int i) {  // up to the i-th of the six
          Ring<kLines> line = lines;
          for (int j = 0; j < i; ++j) line.advance();
          ptx::wait(full_line(line.at), line.phase);
        };
        for (int i = 0; i < own; ++i) wait_for_lines(2 * group + i);
        load_operand(0, 0, 0, a[0]);
#pragma unroll 1
        for (int r = 0; r < 3; ++r) {
#pragma unroll
          for (int i = 0; i < 3 * kC; ++i) {
            const uint64_t weight = weight_at(weights.at);
            ptx::wait(full(weights.at), weights.phase);
#pragma unroll
            for (int n = 0; n < kC; ++n) ptx::pin(sums[n]);
            ptx::pin(a[i % 2]);
            ptx::begin_products();
#pragma unroll
            for (int part = 0; part < 4; ++part)
#pragma unroll
              for (int n = 0; n < kC; ++n)
                ptx::multiply<T>(sums[n], a[i % 2][part], ptx::operand(weight, n, part), r > 0 || i > 0 || part > 0);
            ptx::commit_products();
            // Those before are over: their weights are free, and their operand's registers the next one's.
            if (r > 0 || i > 0) {
              ptx::wait_for_products<1>();
              ptx::pin(a[(i + 1) % 2]);
              release(empty(before()));
            }
            weights.advance();
            if (i + 1 < 3 * kC) {
              load_operand(r, (i + 1) / kC, (i + 1) % kC, a[(i + 1) % 2]);
            } else if (r + 1 < 3) {
              wait_for_lines(2 * group + own + r);
              load_operand(r + 1, 0, 0, a[(i + 1) % 2]);
            }
          }
        }
        load_bias(p.bias1);
        ptx::wait_for_products<0>();
#pragma unroll
        for (int n = 0; n < kC; ++n) ptx::pin(sums[n]);
        ptx::pin(a[0]);
        ptx::pin(a[1]);
        release(empty(before()));
      }
      // h is the left operand of all that follows; it has no registers for that long.
#pragma unroll
      for (int n = 0; n < kC; ++n) {
        uint32_t h[4][4];
        me.pack(h, sums[n], 0.0f, [&](const float2& of, int j, int) { return of + bias[n][j]; });
        unsigned char* const tile = memory + Layout::kH + (group * kC + n) * ptx::kTileBytes;
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int row = me.row + 8 * i;
            unsigned char* const to = tile + row * 128 + (j ^ (row & 7)) * 16 + me.pair * 2;
            *reinterpret_cast<uint32_t*>(to) = h[j / 2][j % 2 * 2 + i];
          }
      }
      ptx::fence_shared_writes();
      ptx::barrier_of(1 + group, 128);
      __syncwarp();
      for (int i = ends ? read : 4; i > 0; --i, lines.advance()) {
        if (lane != 0) continue;
        ptx::wait(full_line(lines.at), lines.phase);
        ptx::arrive(empty_line(lines.at));
      }
      __syncwarp();

      float sum[32];
      uint32_t of_y[4][4];
      const uint64_t h = ptx::operand(ptx::uniform(shared + Layout::kH + group * kC * ptx::kTileBytes), 0);
      const auto expand = [&](uint64_t weight) {
#pragma unroll
        for (int c = 0; c < kC; ++c)
#pragma unroll
          for (int part = 0; part < 4; ++part)
            ptx::multiply<T>(sum, ptx::operand(h, c, part), ptx::operand(weight, c, part), c > 0 || part > 0);
        weights.advance();
      };
      const auto reduce = [&](int out, uint64_t weight) {
#pragma unroll
        for (int part = 0; part < 4; ++part)
#pragma unroll
          for (int n = 0; n < kC; ++n)
            ptx::multiply<T>(sums[n], of_y[part], ptx::operand(weight, n, part), out > 0 || part > 0);
        weights.advance();
      };
      // 64 channels of y from their sums and the residual, when what was multiplied by the weights before is done.
      const auto make_y = [&](int out) {
        float2 more[8];
#pragma unroll
        for (int j = 0; j < 8; ++j)
          more[j] = *reinterpret_cast<const float2*>(p.bias2 + 64 * out + 8 * j + me.pair);
        me.turn(value);
        ptx::wait_for_products<0>();
        ptx::pin(sum);
        ptx::pin(of_y);
#pragma unroll
        for (int n = 0; n < kC; ++n) ptx::pin(sums[n]);
        release(empty(before()));  // of the expand
        if (out > 0) release(empty((weights.at + kStages - 2) % kStages));  // of the reduce before
        me.pack(of_y, sum, p.floor,
                [&](const float2& of, int j, int i) { return of + (more[j] + me.unpack(value, j, i)); });
        ptx::wait(full(weights.at), weights.phase);
      };
      const auto store_y = [&](int out) {
        uint32_t stored[4][4];
#pragma unroll
        for (int part = 0; part < 4; ++part)
#pragma unroll
          for (int i = 0; i < 4; ++i) stored[part][i] = of_y[part][i];
        me.turn(stored);
        me.store(in(static_cast<T*>(p.y), kChannels).at, 64 * out, stored);
      };
      const uint64_t first_weight = weight_at(weights.at);
      ptx::wait(full(weights.at), weights.phase);
      ptx::pin(sum);
      ptx::begin_products();
      expand(first_weight);
      ptx::commit_products();
#pragma unroll 1
      for (int out = 0; out + 1 < kOut; ++out) {
        make_y(out);
        me.load(value, in(static_cast<const T*>(p.residual), kChannels).at, 64 * (out + 1));
        Ring<kStages> next = weights;
        next.advance();
        const uint64_t weight = weight_at(weights.at), next_weight = weight_at(next.at);
        ptx::wait(full(next.at), next.phase);
        ptx::pin(of_y);
        ptx::pin(sum);
        ptx::begin_products();
        reduce(out, weight);
        expand(next_weight);
        ptx::commit_products();
        store_y(out);
      }
      make_y(kOut - 1);
      const uint64_t last_weight = weight_at(weights.at);
      ptx::pin(of_y);
      ptx::begin_products();
      reduce(kOut - 1, last_weight);
      ptx::commit_products();
      store_y(kOut - 1);
      load_bias(p.bias3);
      ptx::wait_for_products<0>();
      ptx::pin(of_y);
      release(empty(before()));
#pragma unroll
      for (int n = 0; n < kC; ++n) {
        ptx::pin(sums[n]);
        uint32_t packed[4][4];
        me.pack(packed, sums[n], 0.0f, [&](const float2& of, int j, int) { return of + bias[n][j]; });
        me.turn(packed);
        me.store(in(static_cast<T*>(p.z), kMiddle).at, 64 * n, packed);
      }
      continue;
    }
    // No line of this group's: what is fetched for both is given back.
    for (int i = ends ? read : 4; i > 0; --i, lines.advance()) {
      ptx::wait(full_line(lines.at), lines.phase);
      release(empty_line(lines.at));
    }
    for (int i = 0; i < 9 * kC + 2 * kOut; ++i, weights.advance()) {
      ptx::wait(full(weights.at), weights.phase);
      release(empty(weights.at));
    }
  }
}

}  // namespace fused_resnet::conv
