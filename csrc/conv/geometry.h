// The arithmetic of an implicit GEMM, in plain C++ for host and device: y[M, K] = sum over the steps of a reduction of
// a block of x, gathered along M = N*P*Q output positions, times a block of weight. tests/test_conv_geometry.py runs it
// on the CPU against PyTorch's convolution.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FUSED_RESNET_HD __host__ __device__
#else
#define FUSED_RESNET_HD
#endif

namespace fused_resnet::conv {

// y [N, P, Q, K] = conv(x [N, H, W, C], weight [K, R, S, C]) + conv1x1(x2 [N, H2, W2, C2], weight2 [K, C2], stride2);
// all of them dense. c2 is 0 where there is no second convolution.
struct Shape {
  int n, h, w, c;
  int k, r, s;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int h2, w2, c2, stride2;

  static constexpr int outputs(int size, int kernel, int stride, int pad, int dilation) {
    const int64_t room = int64_t{size} + 2 * int64_t{pad} - int64_t{dilation} * (kernel - 1) - 1;
    return room < 0 ? 0 : static_cast<int>(room / stride) + 1;
  }
  constexpr int p() const { return outputs(h, r, stride_h, pad_h, dilation_h); }
  constexpr int q() const { return outputs(w, s, stride_w, pad_w, dilation_w); }
  constexpr int64_t m() const { return int64_t{n} * p() * q(); }
};

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// What a step of the reduction covers: `block` channels from c on, of tap (r, s) of x, or of x2.
struct Part {
  int c = 0, r = 0, s = 0;
  bool second = false;
};

// The steps in their order: for each tap of the first convolution all its channels, then the second's channels.
struct Reduction {
  int c, c2, rows, columns;  // channels, taps
  int block;                 // channels a step

  FUSED_RESNET_HD constexpr int blocks() const { return (c + block - 1) / block; }
  FUSED_RESNET_HD constexpr int first_steps() const { return rows * columns * blocks(); }
  FUSED_RESNET_HD constexpr int steps() const { return first_steps() + (c2 + block - 1) / block; }

  FUSED_RESNET_HD constexpr Part at(int step) const {
    if (step >= first_steps()) return {(step - first_steps()) * block, 0, 0, true};
    const int tap = step / blocks();
    return {(step - tap * blocks()) * block, tap / columns, tap % columns, false};
  }

  FUSED_RESNET_HD constexpr void advance(Part& at) const {
    at.c += block;
    if (at.second || at.c < c) return;
    at.c = 0;
    if (++at.s < columns) return;
    at.s = 0;
    if (++at.r < rows) return;
    at.r = 0;
    at.second = true;
  }
};

// Where the window of an output position begins in the input: in rows and columns of the map, the padding negative.
struct Pixel {
  int n, h, w;
};

struct Window {
  int p, q, stride_h, stride_w, pad_h, pad_w;

  // row: below 2^31, and as far beyond the last as a tile reaches. Divisions of 64 bits would cost a hundred
  // instructions.
  FUSED_RESNET_HD constexpr Pixel at(int64_t row) const {
    const uint32_t m = static_cast<uint32_t>(row), map = static_cast<uint32_t>(p) * static_cast<uint32_t>(q);
    const uint32_t n = m / map, rest = m - n * map, line = rest / static_cast<uint32_t>(q);
    const int column = static_cast<int>(rest - line * static_cast<uint32_t>(q));
    return {static_cast<int>(n), static_cast<int>(line) * stride_h - pad_h, column * stride_w - pad_w};
  }
};

constexpr Reduction reduction_of(const Shape& s, int block) { return {s.c, s.c2, s.r, s.s, block}; }
constexpr Window window_of(const Shape& s) { return {s.p(), s.q(), s.stride_h, s.stride_w, s.pad_h, s.pad_w}; }
constexpr Window second_window_of(const Shape& s) { return {s.p(), s.q(), s.stride2, s.stride2, 0, 0}; }

// What cuTensorMapEncodeIm2col is told. The box of window origins reaches from `lower`, counted from the first pixel,
// to `upper`, counted from the last; the hardware walks it in steps of `stride`, row after row, image after image, and
// reads zeros outside the map. Widths come before heights.
struct Im2col {
  uint64_t size[4];        // C, W, H, N
  uint64_t bytes[3];       // between columns, rows, images
  int lower[2], upper[2];  // W, H
  uint32_t stride[4];      // C, W, H, N
  uint32_t channels, pixels;
};

constexpr Im2col im2col_of(int n, int h, int w, int c, int r, int s, int stride_h, int stride_w, int pad_h, int pad_w,
                           int dilation_h, int dilation_w, int channels, int pixels, int itemsize) {
  const uint64_t column = uint64_t(c) * itemsize, row = column * w;
  return {{uint64_t(c), uint64_t(w), uint64_t(h), uint64_t(n)},
          {column, row, row * h},
          {-pad_w, -pad_h},
          {pad_w - (s - 1) * dilation_w, pad_h - (r - 1) * dilation_h},
          {1, uint32_t(stride_w), uint32_t(stride_h), 1},
          uint32_t(channels),
          uint32_t(pixels)};
}

constexpr Im2col im2col_of(const Shape& s, int channels, int pixels, int itemsize) {
  return im2col_of(s.n, s.h, s.w, s.c, s.r, s.s, s.stride_h, s.stride_w, s.pad_h, s.pad_w, s.dilation_h, s.dilation_w,
                   channels, pixels, itemsize);
}

constexpr Im2col second_im2col_of(const Shape& s, int channels, int pixels, int itemsize) {
  return im2col_of(s.n, s.h2, s.w2, s.c2, 1, 1, s.stride2, s.stride2, 0, 0, 1, 1, channels, pixels, itemsize);
}

// What cuTensorMapEncodeTiled is told of a weight [K, taps, C]: a block of one tap's channels never reaches into the
// next tap, whatever C is.
struct Tiled {
  uint64_t size[3];   // C, taps, K
  uint64_t bytes[2];  // between taps, output channels
  uint32_t box[3];
};

constexpr Tiled tiled_of(int k, int taps, int c, int channels, int rows, int itemsize) {
  const uint64_t tap = uint64_t(c) * itemsize;
  return {{uint64_t(c), uint64_t(taps), uint64_t(k)}, {tap, tap * taps}, {uint32_t(channels), 1, uint32_t(rows)}};
}

// What cuTensorMapEncodeTiled is told of a map [N, H, W, C] whose lines are read piece by piece: `pixels` of one line,
// of `channels` channels. What lies outside of the map is zero, on either side.
struct Lines {
  uint64_t size[4];   // C, W, H, N
  uint64_t bytes[3];  // between columns, rows, images
  uint32_t box[4];
};

constexpr Lines lines_of(const Shape& s, int channels, int pixels, int itemsize) {
  const uint64_t column = uint64_t(s.c) * itemsize, row = column * s.w;
  return {{uint64_t(s.c), uint64_t(s.w), uint64_t(s.h), uint64_t(s.n)},
          {column, row, row * s.h},
          {uint32_t(channels), uint32_t(pixels), 1, 1}};
}

// The output lines of a 3x3 of stride 1, cut into strips no wider than `most`, all of one width but for the last of a
// line; walked down a strip in pairs of lines, one strip after another.
struct Strips {
  int across, width, pairs;  // strips of a line, their width, pairs of lines in a strip

  static constexpr Strips of(int p, int q, int most) {
    const int across = ceil_div(q, most);
    return {across, ceil_div(q, across), ceil_div(p, 2)};
  }
  constexpr int64_t all(int n) const { return int64_t{n} * across * pairs; }

  struct At {
    int n, column, line;  // of the first of the two lines
  };

  FUSED_RESNET_HD constexpr At at(int pair) const {
    const int strip = pair / pairs, n = strip / across;
    return {n, (strip - n * across) * width, 2 * (pair - strip * pairs)};
  }

  FUSED_RESNET_HD constexpr void advance(At& at) const {
    at.line += 2;
    if (at.line < 2 * pairs) return;
    at.line = 0;
    at.column += width;
    if (at.column < across * width) return;
    at.column = 0;
    ++at.n;
  }
};

// The limits of the tensor memory accelerator: why this shape is out of its reach, or null.
constexpr const char* tma_refuses(const Shape& s) {
  const int r[2] = {(s.s - 1) * s.dilation_w, (s.r - 1) * s.dilation_h};
  const int pad[2] = {s.pad_w, s.pad_h};
  for (int i = 0; i < 2; ++i) {
    if (r[i] > 255) return "a filter that spans more than 256 rows or columns";
    if (pad[i] > 128 || pad[i] - r[i] > 127 || pad[i] - r[i] < -128) return "a padding beyond 128";
  }
  if (s.stride_h > 8 || s.stride_w > 8 || s.stride2 > 8) return "a stride above 8";
  return nullptr;
}

}  // namespace fused_resnet::conv
