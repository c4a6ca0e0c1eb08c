// Grouped convolution, directly: a vector of outputs belongs to one group, or is whole groups of few channels, and reads
// the inputs of its own groups and no others.

#pragma once

#include "simd.h"
#include "steps.h"

namespace fused_resnet::engine {
namespace {

constexpr int kPixels = kMr > 8 ? 14 : 10;  // of a tile: sums in registers, beside the weights of a row of taps

typedef int32_t I __attribute__((vector_size(kWidth * 4)));

// v's lanes in the order of `lanes`.
inline V shuffle(V v, I lanes) {
#if defined(__clang__)
  V out;
  for (int i = 0; i < kWidth; ++i) out[i] = v[lanes[i]];
  return out;
#else
  return __builtin_shuffle(v, lanes);
#endif
}

// Groups of which a vector holds several: outputs j of all of them read input j of their own. The last vector may have
// fewer than the others.
inline bool spreads(const Grouped& conv) {
  const int64_t c = conv.group_c();
  return c == conv.group_k() && c < kWidth && kWidth % c == 0;
}

inline int64_t unit_c(const Grouped& conv) { return spreads(conv) ? kWidth : conv.group_c(); }
inline int64_t unit_k(const Grouped& conv) { return spreads(conv) ? kWidth : conv.group_k(); }

// Columns and rows of x that a row, or some, of y reads, padding included.
inline int64_t grouped_width(const Grouped& conv) {
  return (conv.q - 1) * conv.stride_w + (conv.s - 1) * conv.dilation_w + 1;
}
inline int64_t grouped_height(const Grouped& conv, int64_t rows) {
  return (rows - 1) * conv.stride_h + (conv.r - 1) * conv.dilation_h + 1;
}

// Floats of a unit's part of x as it is gathered: [unit_c / kWidth][height][width][kWidth].
inline int64_t unit_floats(const Grouped& conv, int64_t rows) {
  return ceil_div(unit_c(conv), kWidth) * grouped_height(conv, rows) * grouped_width(conv) * kWidth;
}

int64_t grouped_scratch(const Grouped& conv) { return conv.units * unit_floats(conv, smaller(conv.rows, conv.p)); }

inline int64_t units_of(const Grouped& conv) { return ceil_div(conv.c, unit_c(conv)); }

// What a tile of outputs next to each other reads, and how far apart its parts are: floats.
struct Taps {
  int64_t r, s, c;                    // of the filter; c: inputs of a group
  int64_t row, column, block, pixel;  // from tap to tap, from kWidth channels to the next, from output to output
  I lanes;
};

struct GroupedOut {
  const float* bias;
  const float* residual;
  float* y;
  int64_t ld, columns;  // floats from pixel to pixel; outputs of the unit, or of the vector, that exist
  bool relu;
};

// kT pixels of one vector of outputs, kTaps taps of a filter's row at a time. Several only where a tap's step is a
// pixel's, a vector: an input is then loaded once for all the outputs that read it. Not inlined: its sums would not stay
// in registers.
template <int kT, int kTaps, bool kSpread>
__attribute__((noinline)) void grouped_tile(const Taps& taps, const float* x, const float* weight,
                                            const GroupedOut& out, int64_t at) {
  V acc[kT];
#pragma GCC unroll 16
  for (int i = 0; i < kT; ++i) acc[i] = V{};
  const int64_t pixel = kTaps > 1 ? kWidth : taps.pixel;
  const int64_t w_step = taps.s * kWidth;
  for (int64_t r = 0; r < taps.r; ++r) {
    for (int64_t s = 0; s < taps.s; s += kTaps) {
      const float* in = x + r * taps.row + s * taps.column;
      const float* w_at = weight + (r * taps.c * taps.s + s) * kWidth;
      for (int64_t left = taps.c; left > 0; left -= kWidth, in += taps.block) {
        const int64_t count = smaller(left, kWidth);
        I lanes = taps.lanes;
        for (int64_t c = 0; c < count; ++c, w_at += w_step) {
          asm("" : "+r"(in));  // a tile's inputs are read again: kept, they would take the registers of its sums
          V w[kTaps];
#pragma GCC unroll 4
          for (int k = 0; k < kTaps; ++k) w[k] = load(w_at + k * kWidth);
#pragma GCC unroll 20
          for (int e = 0; e < kT + kTaps - 1; ++e) {
            const V v = kSpread ? shuffle(load(in + e * pixel), lanes) : splat(in[e * pixel + c]);
#pragma GCC unroll 4
            for (int k = 0; k < kTaps; ++k)
              if (e - k >= 0 && e - k < kT) acc[e - k] += v * w[k];
          }
          lanes += 1;
        }
      }
    }
  }
  const V bias = load(out.bias);
#pragma GCC unroll 16
  for (int i = 0; i < kT; ++i) acc[i] += bias;
  float* const y = out.y + at;
  const bool whole = out.columns == kWidth;
  float edge[kWidth] = {};
  if (out.residual) {
    const float* residual = out.residual + at;
#pragma GCC unroll 16
    for (int i = 0; i < kT; ++i) {
      if (!whole) std::memcpy(edge, residual + i * out.ld, out.columns * sizeof(float));
      acc[i] += load(whole ? residual + i * out.ld : edge);
    }
  }
  if (out.relu)
#pragma GCC unroll 16
    for (int i = 0; i < kT; ++i) acc[i] = relu(acc[i]);
  if (whole)
#pragma GCC unroll 16
    for (int i = 0; i < kT; ++i) store(y + i * out.ld, acc[i]);
  else
#pragma GCC unroll 16
    for (int i = 0; i < kT; ++i) {
      store(edge, acc[i]);
      std::memcpy(y + i * out.ld, edge, out.columns * sizeof(float));
    }
}

template <int kT, int kTaps, bool kSpread, typename... Args>
inline void grouped_tile_of(int64_t pixels, const Args&... args) {
  if (pixels == kT) return grouped_tile<kT, kTaps, kSpread>(args...);
  if constexpr (kT > 1) grouped_tile_of<kT - 1, kTaps, kSpread>(pixels, args...);
}

// `units` units' parts of `rows` rows of x from `top` on, padded with zeros.
void grouped_gather(const Grouped& conv, int64_t image, int64_t top, int64_t rows, int64_t first_channel, int64_t units,
                    float* out) {
  const int64_t width = grouped_width(conv), channels = unit_c(conv), block = rows * width * kWidth;
  const int64_t blocks = units * ceil_div(channels, kWidth);
  // Columns that lie within the map.
  const int64_t left = smaller(conv.pad_w, width), right = larger(left, smaller(width, conv.w + conv.pad_w));
  for (int64_t row = 0; row < rows; ++row, out += width * kWidth) {
    const int64_t h = top + row;
    if (h < 0 || h >= conv.h) {
      for (int64_t b = 0; b < blocks; ++b) std::memset(out + b * block, 0, width * kWidth * sizeof(float));
      continue;
    }
    for (int64_t b = 0; b < blocks; ++b) {
      std::memset(out + b * block, 0, left * kWidth * sizeof(float));
      std::memset(out + b * block + right * kWidth, 0, (width - right) * kWidth * sizeof(float));
    }
    const float* in = conv.x + (image * conv.h + h) * conv.w * conv.c + first_channel;
    for (int64_t w = left; w < right; ++w) {
      const float* from = in + (w - conv.pad_w) * conv.c;
      float* to = out + w * kWidth;
      for (int64_t u = 0; u < units; ++u, from += channels) {
        const int64_t there = smaller(channels, conv.c - first_channel - u * channels);
        int64_t c = 0;
        for (; c + kWidth <= there; c += kWidth, to += block) store(to, load(from + c));
        if (c >= there) continue;
        float edge[kWidth] = {};
        std::memcpy(edge, from + c, (there - c) * sizeof(float));
        store(to, load(edge));
        to += block;
      }
    }
  }
}

// `rows` rows of a unit's outputs, which begin at y, from what was gathered.
template <int kTaps, bool kSpread>
void grouped_unit(const Grouped& conv, const Taps& taps, int64_t rows, const float* x, const float* weight,
                  const GroupedOut& unit) {
  const int64_t tiles = ceil_div(conv.q, kPixels), each = conv.q / tiles, larger_tiles = conv.q % tiles;
  const int64_t k = taps.r * taps.s * taps.c * kWidth, x_row = conv.stride_h * grouped_width(conv) * kWidth;
  GroupedOut out = unit;
  for (int64_t v = 0; v < unit.columns; v += kWidth, weight += k, out.bias += kWidth) {
    out.columns = smaller(kWidth, unit.columns - v);
    for (int64_t row = 0; row < rows; ++row) {
      int64_t q = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t count = each + (tile < larger_tiles);
        grouped_tile_of<kPixels, kTaps, kSpread>(count, taps, x + row * x_row + q * taps.pixel, weight, out,
                                                 (row * conv.q + q) * conv.channels + v);
        q += count;
      }
    }
  }
}

void grouped_task(const Grouped& conv, int64_t task, float* scratch) {
  const bool spread = spreads(conv);
  const int64_t each_c = unit_c(conv), each_k = unit_k(conv), units = units_of(conv);
  const int64_t unit_blocks = ceil_div(units, conv.units), row_blocks = ceil_div(conv.p, conv.rows);
  const int64_t unit = task % unit_blocks * conv.units, row = task / unit_blocks % row_blocks * conv.rows;
  const int64_t image = task / unit_blocks / row_blocks;
  const int64_t count = smaller(conv.units, units - unit), rows = smaller(conv.rows, conv.p - row);
  const int64_t height = grouped_height(conv, rows), row_floats = grouped_width(conv) * kWidth;
  const int64_t floats = unit_floats(conv, rows);
  grouped_gather(conv, image, row * conv.stride_h - conv.pad_h, height, unit * each_c, count, scratch);

  Taps taps{conv.r, conv.s, conv.group_c(), conv.dilation_h * row_floats, conv.dilation_w * kWidth,
            height * row_floats, conv.stride_w * kWidth, I{}};
  if (spread)
    for (int i = 0; i < kWidth; ++i) taps.lanes[i] = static_cast<int32_t>(i / taps.c * taps.c);
  const int64_t vectors = ceil_div(each_k, kWidth), k = taps.r * taps.s * taps.c * kWidth;
  const int64_t at = (image * conv.p + row) * conv.q * conv.channels;
  const bool beside = taps.column == kWidth && taps.pixel == kWidth;
  const auto run = beside && conv.s == 3 ? (spread ? grouped_unit<3, true> : grouped_unit<3, false>)
                                         : (spread ? grouped_unit<1, true> : grouped_unit<1, false>);
  // Vectors of groups share cache lines of y, so all write a row before the next; groups have weights to be kept near.
  const int64_t step = spread ? 1 : rows;
  for (int64_t top = 0; top < rows; top += step) {
    for (int64_t u = 0; u < count; ++u) {
      const int64_t first = (unit + u) * vectors, to = at + top * conv.q * conv.channels + (unit + u) * each_k;
      const int64_t columns = smaller(each_k, conv.channels - (unit + u) * each_k);
      const GroupedOut out{conv.bias + first * kWidth, conv.residual ? conv.residual + to : nullptr, conv.y + to,
                           conv.channels, columns, conv.relu};
      const float* x = scratch + u * floats + top * conv.stride_h * row_floats;
      run(conv, taps, step, x, conv.weight + first * k, out);
    }
  }
}

// Vectors of outputs that the weights and the bias are packed for.
int64_t grouped_vectors(const Grouped& conv) {
  return units_of(conv) * ceil_div(unit_k(conv), kWidth);
}

}  // namespace
}  // namespace fused_resnet::engine
