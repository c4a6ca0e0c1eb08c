// Host side of the convolution for sm_80 and its kin.

#pragma once

#include <cuda_runtime.h>

#include "instance.h"
#include "sm80_kernel.cuh"

namespace fused_resnet::conv {

template <class T, int TileM, int TileN, int WarpsM, int WarpsN, int Stages>
struct Sm80 {
  using Tile = Sm80Tile<T, TileM, TileN, WarpsM, WarpsN, Stages>;
  static constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

  static const char* refuses(const Shape& s) {
    if (s.r * s.s > 32) return "a filter of more than 32 taps";
    // A thread counts in 32 bits from the first image of its tile to the last.
    const int64_t images = TileM / (int64_t{s.p()} * s.q()) + 2;
    const int64_t reach = int64_t{s.h + 2 * s.pad_h + s.dilation_h * s.r} * s.w * s.c;
    if (reach > kMost / images || int64_t{s.h2} * s.w2 * s.c2 > kMost / images) return "maps that fill 32 bits";
    return nullptr;
  }

  static size_t workspace(const Shape&, int) { return 0; }

  static cudaError_t run(const Problem& problem, int, void*, cudaStream_t stream) {
    const Shape& s = problem.shape;
    Sm80Params p = {};
    p.reduction = reduction_of(s, Tile::kTileK);
    p.window = window_of(s);
    p.second_window = second_window_of(s);
    p.m = s.m();
    p.h = s.h, p.w = s.w, p.c = s.c, p.h2 = s.h2, p.w2 = s.w2, p.k = s.k;
    p.dilation_h = s.dilation_h, p.dilation_w = s.dilation_w;
    p.tiles_n = ceil_div(s.k, TileN);
    p.floor = problem.relu ? 0.0f : -std::numeric_limits<float>::infinity();
    p.x = problem.x, p.weight = problem.weight, p.x2 = problem.x2, p.weight2 = problem.weight2;
    p.residual = problem.residual, p.scale = problem.scale, p.bias = problem.bias, p.y = problem.y;

    const auto kernel = conv_sm80_kernel<T, TileM, TileN, WarpsM, WarpsN, Stages>;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kShared);
    if (error != cudaSuccess) return error;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>((p.m + TileM - 1) / TileM * p.tiles_n));
    config.blockDim = dim3(Tile::kThreads);
    config.dynamicSmemBytes = Tile::kShared;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, p);
  }

  static constexpr Instance instance(const char* name) {
    constexpr Dtype dtype = std::is_same_v<T, __half> ? Dtype::half : Dtype::bfloat16;
    return {name,   80,        dtype, TileM, TileN, Tile::kTileK, 1, 1, Stages, Tile::kThreads, Tile::kShared, 0, 0,
            &refuses, &workspace, &run};
  }
};

}  // namespace fused_resnet::conv
