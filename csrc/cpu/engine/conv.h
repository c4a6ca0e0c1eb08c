// Implicit GEMM: rows of the left operand are gathered a slice of the reduction at a time, unless they lie so already.

#pragma once

#include "gemm.h"

namespace fused_resnet::engine {
namespace {

// rows [row, row + m) of the left operand, columns [begin, end) of the segment's reduction (r, s, c), to out[m][end -
// begin].
void gather(const Segment& seg, int64_t p, int64_t q, int64_t row, int64_t m, int64_t begin, int64_t end, float* out) {
  int64_t image = row / (p * q), oh = row / q % p, ow = row % q;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t k = begin; k < end;) {
      const int64_t tap = k / seg.c, c = k % seg.c, run = smaller(seg.c - c, end - k);
      const int64_t ih = oh * seg.stride_h - seg.pad_h + tap / seg.s * seg.dilation_h;
      const int64_t iw = ow * seg.stride_w - seg.pad_w + tap % seg.s * seg.dilation_w;
      if (ih >= 0 && ih < seg.h && iw >= 0 && iw < seg.w) {
        const float* in = seg.x + ((image * seg.h + ih) * seg.w + iw) * seg.c + c;
        int64_t j = 0;
        for (; j + kWidth <= run; j += kWidth) store(out + j, load(in + j));
        for (; j < run; ++j) out[j] = in[j];
      } else {
        std::memset(out, 0, run * sizeof(float));
      }
      out += run;
      k += run;
    }
    if (++ow == q) {
      ow = 0;
      if (++oh == p) oh = 0, ++image;
    }
  }
}

int64_t conv_scratch(const Conv& conv) { return conv.mc * kKc; }

void conv_task(const Conv& conv, int64_t task, float* scratch) {
  const int64_t column_blocks = ceil_div(conv.channels, conv.nc), rows = conv.batch * conv.p * conv.q;
  const int64_t row = task / column_blocks * conv.mc, column = task % column_blocks * conv.nc;
  const int64_t m = smaller(conv.mc, rows - row), n = smaller(conv.nc, conv.channels - column);
  int64_t k_all = 0;
  for (int64_t s = 0; s < conv.segment_count; ++s) k_all += conv.segments[s].k();
  const int64_t panel = k_all * kNr;
  const float* b = conv.weight + column / kNr * panel;
  float* y = conv.y + row * conv.channels + column;
  const Epilogue epilogue{conv.bias + column, conv.residual ? conv.residual + row * conv.channels + column : nullptr,
                          conv.relu};
  for (int64_t s = 0; s < conv.segment_count; ++s) {
    const Segment& seg = conv.segments[s];
    const Slices slices(seg.k());
    for (int64_t i = 0; i < slices.count; ++i) {
      const int64_t begin = slices.begin(i), end = slices.begin(i + 1);
      const float* a = seg.x + row * seg.c + begin;
      int64_t lda = seg.c;
      if (!seg.is_matrix()) {
        gather(seg, conv.p, conv.q, row, m, begin, end, scratch);
        a = scratch;
        lda = end - begin;
      }
      gemm(a, lda, b, panel, end - begin, y, conv.channels, m, n, s == 0 && i == 0,
           s == conv.segment_count - 1 && i == slices.count - 1, epilogue);
      b += (end - begin) * kNr;
    }
  }
}

}  // namespace
}  // namespace fused_resnet::engine
