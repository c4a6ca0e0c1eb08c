// What every compiled convolution offers. A translation unit has one for each dtype: the second costs the compiler next
// to nothing.

#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "geometry.h"

namespace fused_resnet::conv {

enum class Dtype { half = 0, bfloat16 = 1 };

// y = act((conv(x, weight) + conv1x1(x2, weight2)) * scale + bias + residual). Null: scale (1), residual and x2 (none).
struct Problem {
  Shape shape;
  const void *x, *weight, *x2, *weight2, *residual;
  const float *scale, *bias;
  void* y;
  bool relu;
  bool constant_weights;  // they may be read before the kernels before have ended: see conv_bias_act_out()
};

struct Instance {
  const char* name;  // of the tile, without the dtype
  int arch;          // 80: any chip that the code was compiled for from 80 on; 90: 9.0 only
  Dtype dtype;
  int tile_m, tile_n, tile_k;
  int cluster_m, cluster_n;
  int stages;
  int threads;
  int shared_bytes;
  int splits;  // 1: divides the reduction where the tiles do not fill the chip
  int parts;   // blocks, a cluster, that share the reduction of a tile; 0: not one of those for few positions

  const char* (*refuses)(const Shape&);  // null: runs it
  size_t (*workspace)(const Shape&, int multiprocessors);
  // Launches on the current device; the error is the launch's own.
  cudaError_t (*run)(const Problem&, int multiprocessors, void* workspace, cudaStream_t);
};

}  // namespace fused_resnet::conv

// A unit's two instances, of Kernel<Half> and Kernel<Bfloat16>: FUSED_RESNET_UNIT_half and FUSED_RESNET_UNIT_bfloat16,
// for the FUSED_RESNET_UNIT and by the FUSED_RESNET_NAME that setup.py gives.
#define FUSED_RESNET_DEFINE(Type, Kernel, Half, Bfloat16)                                  \
  FUSED_RESNET_DEFINE_ONE(Type, FUSED_RESNET_JOIN(FUSED_RESNET_UNIT, _half), Kernel<Half>) \
  FUSED_RESNET_DEFINE_ONE(Type, FUSED_RESNET_JOIN(FUSED_RESNET_UNIT, _bfloat16), Kernel<Bfloat16>)
#define FUSED_RESNET_DEFINE_ONE(Type, symbol, ...) \
  extern const Type symbol;                        \
  const Type symbol = __VA_ARGS__::instance(FUSED_RESNET_NAME);
#define FUSED_RESNET_JOIN(a, b) FUSED_RESNET_JOIN_EXPANDED(a, b)
#define FUSED_RESNET_JOIN_EXPANDED(a, b) a##b
