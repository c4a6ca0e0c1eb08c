// What a step of a CPU program is made of. Activations are NHWC and dense, everything is float32.

#pragma once

#include <cstdint>

#include "bn_rows.h"

// A function that is not inlined is kept once for all instruction sets, and it may be the widest one's.
#define FUSED_RESNET_INLINE inline __attribute__((always_inline))

namespace fused_resnet::engine {

FUSED_RESNET_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One reduction segment of a convolution: an activation and how it is walked. A second one is a projection shortcut.
struct Segment {
  const float* x;
  int64_t h, w, c;
  int64_t r, s;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;

  FUSED_RESNET_INLINE int64_t k() const { return r * s * c; }
  // The rows of x are the rows of the left operand as they lie.
  FUSED_RESNET_INLINE bool is_matrix() const {
    return r == 1 && s == 1 && stride_h == 1 && stride_w == 1 && pad_h == 0 && pad_w == 0;
  }
};

// y = act(sum over the segments of conv(x) + bias + residual).
struct Conv {
  Segment segments[2];
  int64_t segment_count;
  const float* weight;    // [ceil(channels / kernels.nr)][k of all segments][kernels.nr], zero-padded
  const float* bias;      // padded to a multiple of kernels.nr
  const float* residual;  // as y, or null
  float* y;               // [batch, p, q, channels]
  int64_t batch, p, q, channels;
  bool relu;
  int64_t mc, nc;  // rows and columns of y that a task computes; nc a multiple of kernels.nr
};

// The same for a 3x3 of stride 1 by minimal filtering (Winograd): m x m outputs from (m + 2) x (m + 2) inputs.
struct Winograd {
  const float* x;       // [batch, h, w, c]
  const float* weight;  // [(m + 2)^2][ceil(channels / kernels.nr)][c][kernels.nr]
  const float* bias;
  const float* residual;
  float* y;  // [batch, p, q, channels]
  int64_t batch, h, w, c, p, q, channels, pad_h, pad_w;
  bool relu;
  int64_t m;      // 2 or 4
  int64_t tiles;  // m x m tiles that are transformed together
  int64_t nc;     // columns of one multiplication
  bool shared;    // all threads work on the same tiles, one transform after the other; else each on its own tiles
  float* buffer;  // shared: room(tiles) floats

  FUSED_RESNET_INLINE int64_t tiles_h() const { return (p + m - 1) / m; }
  FUSED_RESNET_INLINE int64_t tiles_w() const { return (q + m - 1) / m; }
  FUSED_RESNET_INLINE int64_t all_tiles() const { return batch * tiles_h() * tiles_w(); }
  FUSED_RESNET_INLINE int64_t points() const { return (m + 2) * (m + 2); }
  // Distance of the planes of transformed tiles: never a multiple of the cache's way, or all planes share a few sets.
  FUSED_RESNET_INLINE int64_t plane(int64_t channels_) const { return tiles * channels_ + 16; }
  FUSED_RESNET_INLINE int64_t room() const { return points() * (plane(c) + plane(channels)); }
};

// max_pool2d(relu(conv7x7(x, stride 2) + bias), 3, stride 2, padding 1) and its like; the convolution's rows stay in
// cache.
struct Stem {
  const float* x;  // any strides, in floats
  int64_t stride_n, stride_c, stride_h, stride_w;
  int64_t batch, c, h, w;
  int64_t r, s, stride, pad;
  const float* weight;  // [ceil(channels / nr)][c * r * s or r * s * c][nr], see channels_last
  const float* bias;
  float* y;  // [batch, pool_p, pool_q, channels]
  int64_t p, q, channels, pool_p, pool_q;
  int64_t band;        // rows of y a task computes
  bool channels_last;  // the reduction runs over (r, s, c), else over (c, r, s)

  FUSED_RESNET_INLINE int64_t k() const { return c * r * s; }
  // Columns of x that a row of the convolution reads, padding included.
  FUSED_RESNET_INLINE int64_t width() const { return (q - 1) * stride + s; }
};

// The same as Conv for a convolution whose outputs read the inputs of their own group only.
struct Grouped {
  const float* x;       // [batch, h, w, c]
  const float* weight;  // [kernels.grouped_vectors][r][c / groups][s][kernels.width], zero-padded
  const float* bias;    // [kernels.grouped_vectors][kernels.width]
  const float* residual;
  float* y;  // [batch, p, q, channels]
  int64_t batch, h, w, c, p, q, channels, groups;
  int64_t r, s;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool relu;
  int64_t rows;   // of y that a task computes
  int64_t units;  // groups, or vectors of groups, that a task computes

  FUSED_RESNET_INLINE int64_t group_c() const { return c / groups; }
  FUSED_RESNET_INLINE int64_t group_k() const { return channels / groups; }
};

struct MaxPool {
  const float* x;
  float* y;
  int64_t batch, h, w, c, p, q, kernel, stride, pad;
};

struct AvgPool {
  const float* x;
  float* y;
  int64_t batch, pixels, c;
};

// One table an instruction set. A function of a step computes one of its tasks; scratch is the worker's own.
struct Kernels {
  const char* name;
  int64_t width;  // floats in a vector
  int64_t nr;     // columns of a packed weight panel

  int64_t (*conv_scratch)(const Conv&);
  void (*conv)(const Conv&, int64_t task, float* scratch);

  int64_t (*winograd_scratch)(const Winograd&);
  void (*winograd)(const Winograd&, int64_t task, float* scratch);  // private tiles
  void (*winograd_input)(const Winograd&, int64_t first_tile, int64_t task, int64_t tasks);
  void (*winograd_multiply)(const Winograd&, int64_t count, int64_t task);
  void (*winograd_output)(const Winograd&, int64_t first_tile, int64_t task, int64_t tasks);

  int64_t (*stem_scratch)(const Stem&);
  void (*stem)(const Stem&, int64_t task, float* scratch);

  int64_t (*grouped_scratch)(const Grouped&);
  int64_t (*grouped_vectors)(const Grouped&);
  int64_t (*grouped_unit)(const Grouped&);  // channels of x in a unit
  void (*grouped)(const Grouped&, int64_t task, float* scratch);

  void (*max_pool)(const MaxPool&, int64_t row);
  void (*avg_pool)(const AvgPool&, int64_t image);

  BnKernels bn;
};

extern const Kernels kernels_base;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// 0 baseline, 1 AVX2 with FMA, 2 AVX-512; null if this processor has not got it.
const Kernels* kernels_of(int64_t isa);
// The last of them that it has.
int64_t best_isa();

}  // namespace fused_resnet::engine
