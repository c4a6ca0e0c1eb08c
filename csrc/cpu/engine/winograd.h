// 3x3 convolution of stride 1 by minimal filtering (Lavin and Gray, arXiv 1509.09308): y = A'[(G g G') * (B' d B)]A.
//
// m = 2: points 0, 1, -1 and infinity. m = 4: 0, 3/4, -3/4, 3/2, -3/2 and infinity, whose rounding errors are a third
// of those of the usual 0, 1, -1, 2, -2. G has all the scaling; it is applied in float64 when the weights are packed.

#pragma once

#include "gemm.h"

namespace fused_resnet::engine {
namespace {

template <int kM>
struct Transform;

template <>
struct Transform<2> {
  static constexpr int kPoints = 4;
  static inline void input(const V (&d)[4], V (&t)[4]) {
    t[0] = d[2] - d[0];
    t[1] = d[2] + d[1];
    t[2] = d[2] - d[1];
    t[3] = d[3] - d[1];
  }
  static inline void output(const V (&m)[4], V (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] + m[3];
  }
};

template <>
struct Transform<4> {
  static constexpr int kPoints = 6;
  static constexpr float kA = 0.75f, kB = 1.5f;
  static constexpr float kA2 = kA * kA, kB2 = kB * kB, kSum = kA2 + kB2, kProduct = kA2 * kB2;
  static inline void input(const V (&d)[6], V (&t)[6]) {
    const V even_a = d[4] - d[2] * kB2, odd_a = (d[3] - d[1] * kB2) * kA;
    const V even_b = d[4] - d[2] * kA2, odd_b = (d[3] - d[1] * kA2) * kB;
    t[0] = (d[4] - d[2] * kSum) + d[0] * kProduct;
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = (d[5] - d[3] * kSum) + d[1] * kProduct;
  }
  static inline void output(const V (&m)[6], V (&y)[4]) {
    const V sum_a = m[1] + m[2], diff_a = m[1] - m[2], sum_b = m[3] + m[4], diff_b = m[3] - m[4];
    y[0] = m[0] + sum_a + sum_b;
    y[1] = diff_a * kA + diff_b * kB;
    y[2] = sum_a * kA2 + sum_b * kB2;
    y[3] = (m[5] + diff_a * (kA2 * kA)) + diff_b * (kB2 * kB);
  }
};

struct TileAt {
  int64_t image, h, w;  // of the tile's first output
};

inline TileAt tile_at(const Winograd& wino, int64_t tile) {
  const int64_t tw = wino.tiles_w(), th = wino.tiles_h();
  return {tile / (tw * th), tile / tw % th * wino.m, tile % tw * wino.m};
}

// Tile `tile`, its channels [begin, end), to row `row` of the planes v.
template <int kM>
void transform_input(const Winograd& wino, int64_t tile, int64_t row, int64_t begin, int64_t end, float* v) {
  constexpr int kT = Transform<kM>::kPoints;
  alignas(64) static const float kZeros[kWidth] = {};
  const TileAt at = tile_at(wino, tile);
  const float* in[kT][kT];
  bool inside[kT][kT];
  for (int i = 0; i < kT; ++i) {
    for (int j = 0; j < kT; ++j) {
      const int64_t h = at.h - wino.pad_h + i, w = at.w - wino.pad_w + j;
      inside[i][j] = h >= 0 && h < wino.h && w >= 0 && w < wino.w;
      in[i][j] = inside[i][j] ? wino.x + ((at.image * wino.h + h) * wino.w + w) * wino.c : kZeros;
    }
  }
  const int64_t plane = wino.plane(wino.c);
  for (int64_t c = begin; c < end; c += kWidth) {
    V rows[kT][kT];
    for (int j = 0; j < kT; ++j) {
      V d[kT], t[kT];
#pragma GCC unroll 6
      for (int i = 0; i < kT; ++i) d[i] = load(in[i][j] + (inside[i][j] ? c : 0));
      Transform<kM>::input(d, t);
#pragma GCC unroll 6
      for (int i = 0; i < kT; ++i) rows[i][j] = t[i];
    }
    float* out = v + row * wino.c + c;
    for (int i = 0; i < kT; ++i) {
      V t[kT];
      Transform<kM>::input(rows[i], t);
#pragma GCC unroll 6
      for (int j = 0; j < kT; ++j) store(out + (i * kT + j) * plane, t[j]);
    }
  }
}

template <int kM>
void transform_output(const Winograd& wino, int64_t tile, int64_t row, int64_t begin, int64_t end, const float* m) {
  constexpr int kT = Transform<kM>::kPoints;
  const TileAt at = tile_at(wino, tile);
  const int64_t height = smaller(kM, wino.p - at.h), width = smaller(kM, wino.q - at.w);
  const int64_t plane = wino.plane(wino.channels);
  const int64_t first = ((at.image * wino.p + at.h) * wino.q + at.w) * wino.channels;
  for (int64_t k = begin; k < end; k += kWidth) {
    const float* in = m + row * wino.channels + k;
    V columns[kT][kM];
    for (int i = 0; i < kT; ++i) {
      V t[kT];
#pragma GCC unroll 6
      for (int j = 0; j < kT; ++j) t[j] = load(in + (i * kT + j) * plane);
      Transform<kM>::output(t, columns[i]);
    }
    const V bias = load(wino.bias + k);
    for (int64_t j = 0; j < width; ++j) {
      V t[kT], out[kM];
#pragma GCC unroll 6
      for (int i = 0; i < kT; ++i) t[i] = columns[i][j];
      Transform<kM>::output(t, out);
      for (int64_t i = 0; i < height; ++i) {
        const int64_t to = first + (i * wino.q + j) * wino.channels + k;
        V value = out[i] + bias;
        if (wino.residual) value += load(wino.residual + to);
        store(wino.y + to, wino.relu ? relu(value) : value);
      }
    }
  }
}

// Columns [column, column + n) of one point's product, for `count` tiles.
void multiply_point(const Winograd& wino, int64_t point, int64_t column, int64_t n, int64_t count, const float* v,
                    float* m) {
  const int64_t panel = wino.c * kNr, panels = ceil_div(wino.channels, kNr);
  const float* b = wino.weight + (point * panels + column / kNr) * panel;
  multiply(v + point * wino.plane(wino.c), wino.c, b, panel, wino.c, m + point * wino.plane(wino.channels) + column,
           wino.channels, count, n, Epilogue{});
}

inline float* products(const Winograd& wino, float* buffer) { return buffer + wino.points() * wino.plane(wino.c); }

int64_t winograd_scratch(const Winograd& wino) { return wino.shared ? 0 : wino.room(); }

template <int kM>
void winograd_private(const Winograd& wino, int64_t task, float* v) {
  const int64_t first = task * wino.tiles, count = smaller(wino.tiles, wino.all_tiles() - first);
  float* m = products(wino, v);
  for (int64_t t = 0; t < count; ++t) transform_input<kM>(wino, first + t, t, 0, wino.c, v);
  for (int64_t point = 0; point < wino.points(); ++point) multiply_point(wino, point, 0, wino.channels, count, v, m);
  for (int64_t t = 0; t < count; ++t) transform_output<kM>(wino, first + t, t, 0, wino.channels, m);
}

void winograd_task(const Winograd& wino, int64_t task, float* scratch) {
  return wino.m == 2 ? winograd_private<2>(wino, task, scratch) : winograd_private<4>(wino, task, scratch);
}

// Tasks of the transforms: vectors of channels of tiles, in equal runs. f(tile, row, begin, end) for each tile touched.
template <typename F>
void over_tiles(const Winograd& wino, int64_t first, int64_t channels, int64_t task, int64_t tasks, F f) {
  const int64_t count = smaller(wino.tiles, wino.all_tiles() - first), vectors = channels / kWidth;
  int64_t at = count * vectors * task / tasks;
  const int64_t end = count * vectors * (task + 1) / tasks;
  while (at < end) {
    const int64_t t = at / vectors, begin = at % vectors, stop = smaller(vectors, begin + end - at);
    f(first + t, t, begin * kWidth, stop * kWidth);
    at += stop - begin;
  }
}

void winograd_input(const Winograd& wino, int64_t first, int64_t task, int64_t tasks) {
  over_tiles(wino, first, wino.c, task, tasks, [&](int64_t tile, int64_t row, int64_t begin, int64_t end) {
    wino.m == 2 ? transform_input<2>(wino, tile, row, begin, end, wino.buffer)
                : transform_input<4>(wino, tile, row, begin, end, wino.buffer);
  });
}

void winograd_multiply(const Winograd& wino, int64_t count, int64_t task) {
  const int64_t blocks = ceil_div(wino.channels, wino.nc), column = task % blocks * wino.nc;
  multiply_point(wino, task / blocks, column, smaller(wino.nc, wino.channels - column), count, wino.buffer,
                 products(wino, wino.buffer));
}

void winograd_output(const Winograd& wino, int64_t first, int64_t task, int64_t tasks) {
  const float* m = products(wino, wino.buffer);
  over_tiles(wino, first, wino.channels, task, tasks, [&](int64_t tile, int64_t row, int64_t begin, int64_t end) {
    wino.m == 2 ? transform_output<2>(wino, tile, row, begin, end, m)
                : transform_output<4>(wino, tile, row, begin, end, m);
  });
}

}  // namespace
}  // namespace fused_resnet::engine
