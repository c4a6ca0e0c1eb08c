// The first convolution and the max-pool after it: the convolution's rows are pooled while they are in the cache.

#pragma once

#include "gemm.h"

namespace fused_resnet::engine {
namespace {

constexpr int64_t kPool = 3, kPoolStride = 2, kPoolPad = 1;

// The lines of x that one row of the convolution reads, with their padding: [c][r][width], or [r][width][c].
//
// Along s the reduction runs through such a line, and the next output's operand begins `stride` further: so the lines
// are the left operand as they lie.
void copy_lines(const Stem& stem, int64_t image, int64_t row, float* out) {
  const int64_t top = row * stem.stride - stem.pad, width = stem.width();
  const int64_t outer = stem.channels_last ? 1 : stem.c, inner = stem.channels_last ? stem.c : 1;
  const int64_t from = smaller(stem.pad, width), to = smaller(width, stem.pad + stem.w);  // what is not padding
  const bool dense = stem.stride_w == inner && (!stem.channels_last || stem.stride_c == 1);
  for (int64_t c = 0; c < outer; ++c) {
    for (int64_t h = top; h < top + stem.r; ++h, out += width * inner) {
      if (h < 0 || h >= stem.h) {
        std::memset(out, 0, width * inner * sizeof(float));
        continue;
      }
      const float* line = stem.x + image * stem.stride_n + c * stem.stride_c + h * stem.stride_h;
      std::memset(out, 0, from * inner * sizeof(float));
      std::memset(out + to * inner, 0, (width - to) * inner * sizeof(float));
      if (dense) {
        std::memcpy(out + from * inner, line, (to - from) * inner * sizeof(float));
        continue;
      }
      for (int64_t w = from; w < to; ++w)
        for (int64_t i = 0; i < inner; ++i) out[w * inner + i] = line[(w - from) * stem.stride_w + i * stem.stride_c];
    }
  }
}

template <int kRows>
void stem_micro(int64_t rows, const Stem& stem, const float* lines, const float* b, float* c, int64_t columns,
                const Epilogue& epilogue) {
  if (rows == kRows) {
    const int64_t inner = stem.channels_last ? stem.c : 1, count = stem.r * (stem.channels_last ? 1 : stem.c);
    const int64_t run = stem.s * inner, line = stem.width() * inner;
    Accumulators<kRows> acc;
    clear<kRows>(acc);
    for (int64_t l = 0; l < count; ++l, lines += line, b += run * kNr)
      accumulate<kRows>(acc, lines, stem.stride * inner, b, run);
    return finish<kRows>(acc, c, stem.channels, columns, true, true, epilogue);
  }
  if constexpr (kRows > 1) stem_micro<kRows - 1>(rows, stem, lines, b, c, columns, epilogue);
}

// One row of relu(conv(x) + bias).
void stem_row(const Stem& stem, const float* lines, float* out) {
  const int64_t groups = ceil_div(stem.q, kMr), rows = stem.q / groups, larger_groups = stem.q % groups;
  const int64_t step = stem.stride * (stem.channels_last ? stem.c : 1);
  const float* b = stem.weight;
  for (int64_t j = 0; j < stem.channels; j += kNr, b += stem.k() * kNr) {
    const Epilogue epilogue{stem.bias + j, nullptr, true};
    int64_t o = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t count = rows + (g < larger_groups);
      stem_micro<kMr>(count, stem, lines + o * step, b, out + o * stem.channels + j, smaller(kNr, stem.channels - j),
                      epilogue);
      o += count;
    }
  }
}

// The lines of one row, and three rows of the convolution.
int64_t stem_scratch(const Stem& stem) { return stem.width() * stem.r * stem.c + kPool * stem.q * stem.channels; }

void stem_task(const Stem& stem, int64_t task, float* scratch) {
  const int64_t bands = ceil_div(stem.pool_p, stem.band), image = task / bands, from = task % bands * stem.band;
  const int64_t to = smaller(from + stem.band, stem.pool_p), row = stem.q * stem.channels;
  float* const ring = scratch + stem.width() * stem.r * stem.c;
  int64_t next = larger(0, from * kPoolStride - kPoolPad);  // the convolution's row to compute
  for (int64_t p = from; p < to; ++p) {
    const int64_t first = larger(0, p * kPoolStride - kPoolPad);
    const int64_t last = smaller(stem.p, p * kPoolStride - kPoolPad + kPool);
    for (; next < last; ++next) {
      copy_lines(stem, image, next, scratch);
      stem_row(stem, scratch, ring + next % kPool * row);
    }
    float* y = stem.y + (image * stem.pool_p + p) * stem.pool_q * stem.channels;
    for (int64_t q = 0; q < stem.pool_q; ++q, y += stem.channels) {
      const int64_t left = larger(0, q * kPoolStride - kPoolPad);
      const int64_t right = smaller(stem.q, q * kPoolStride - kPoolPad + kPool);
      for (int64_t c = 0; c < stem.channels; c += kWidth) {
        V m = load(ring + first % kPool * row + left * stem.channels + c);
        for (int64_t h = first; h < last; ++h)
          for (int64_t w = left; w < right; ++w) m = max(m, load(ring + h % kPool * row + w * stem.channels + c));
        store(y + c, m);
      }
    }
  }
}

}  // namespace
}  // namespace fused_resnet::engine
