// Host side of the convolution of few positions for Hopper.

#pragma once

#include <limits>

#include "instance.h"
#include "launch_sm90.h"
#include "maps_sm90.h"
#include "split_sm90_kernel.cuh"

namespace fused_resnet::conv {

// Splits: blocks of a cluster, which share the reduction of a tile.
template <class T, int Splits>
struct SplitSm90 {
  using Layout = SplitLayout;
  static constexpr int kTile = Layout::kTile;

  static int64_t tiles(const Shape& s) { return (s.m() + kTile - 1) / kTile * ceil_div(s.k, kTile); }

  static const char* refuses(const Shape& s) {
    if (const char* reason = tma_refuses(s)) return reason;
    if (reduction_of(s, kTile).steps() < Splits) return "a reduction of fewer steps than blocks that share it";
    if (tiles(s) > std::numeric_limits<int32_t>::max() / Splits) return "more blocks than a grid has";
    return nullptr;
  }

  static size_t workspace(const Shape&, int) { return 0; }

  static cudaError_t run(const Problem& problem, int, void*, cudaStream_t stream) {
    const Shape& s = problem.shape;
    SplitParams p = {};
    Maps<T> maps;
    maps(p.x, problem.x, im2col_of(s, kTile, kTile, 2));
    maps(p.weight, problem.weight, tiled_of(s.k, s.r * s.s, s.c, kTile, kTile, 2));
    if (s.c2) {
      maps(p.x2, problem.x2, second_im2col_of(s, kTile, kTile, 2));
      maps(p.weight2, problem.weight2, tiled_of(s.k, 1, s.c2, kTile, kTile, 2));
    }
    if (maps.error != cudaSuccess) return maps.error;
    p.reduction = reduction_of(s, kTile);
    p.window = window_of(s);
    p.second_window = second_window_of(s);
    p.m = s.m();
    p.k = s.k;
    p.tiles_n = ceil_div(s.k, kTile);
    p.dilation_h = s.dilation_h, p.dilation_w = s.dilation_w;
    p.floor = problem.relu ? 0.0f : -std::numeric_limits<float>::infinity();
    p.early = problem.constant_weights;
    p.residual = problem.residual, p.scale = problem.scale, p.bias = problem.bias, p.y = problem.y;

    return launch_overlapping(conv_split_kernel<T, Splits>, tiles(s) * Splits,
                              Layout::kThreads, Layout::kShared, Splits, stream, p);
  }

  static constexpr Instance instance(const char* name) {
    return {name,
            90,
            ptx::is_half<T> ? Dtype::half : Dtype::bfloat16,
            kTile,
            kTile,
            kTile,
            1,
            1,
            Layout::kStages,
            Layout::kThreads,
            Layout::kShared,
            0,
            Splits,
            &refuses,
            &workspace,
            &run};
  }
};

}  // namespace fused_resnet::conv
