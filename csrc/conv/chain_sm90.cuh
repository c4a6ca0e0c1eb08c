// Host side of the chained bottleneck for Hopper.

#pragma once

#include <algorithm>
#include <limits>

#include "chain_instance.h"
#include "chain_sm90_kernel.cuh"
#include "launch_sm90.h"
#include "maps_sm90.h"

namespace fused_resnet::conv {

template <class T, int Following, bool Segment>
struct ChainSm90 {
  using Layout = ChainLayout<Following, Segment>;

  static cudaError_t run(const Chain& chain, int multiprocessors, cudaStream_t stream) {
    const Shape& s = chain.shape;
    ChainParams p = {};
    Maps<T> maps;
    maps(p.x, chain.x, im2col_of(s, 64, 64, 2));
    maps(p.weight1, chain.weight1, tiled_of(64, 9, 64, 64, 64, 2));
    maps(p.weight2, chain.weight2, tiled_of(256, 1, 64, 64, 64, 2));
    if (Following) maps(p.weight3, chain.weight3, tiled_of(64 * Following, 1, 256, 64, 64, 2));
    if (Segment) {
      maps(p.x2, chain.x2, second_im2col_of(s, 64, 64, 2));
      maps(p.projection, chain.projection, tiled_of(256, 1, 64, 64, 64, 2));
    } else if (chain.residual) {
      maps(p.residual, chain.residual, tiled_of(static_cast<int>(s.m()), 1, 256, 64, 64, 2));
    }
    if (maps.error != cudaSuccess) return maps.error;
    p.window = window_of(s);
    p.second_window = second_window_of(s);
    p.m = s.m();
    p.tiles = static_cast<int>((s.m() + 63) / 64);
    p.p = s.p(), p.q = s.q();
    p.floor = chain.relu ? 0.0f : -std::numeric_limits<float>::infinity();
    p.has_residual = chain.residual != nullptr;
    p.quarter = chain.quarter;
    p.early = chain.constant_weights;
    p.bias1 = chain.bias1, p.bias2 = chain.bias2, p.bias3 = chain.bias3;
    p.y = chain.y, p.z = chain.z;

    return launch_overlapping(chain_sm90_kernel<T, Following, Segment>, std::min(multiprocessors, (p.tiles + 1) / 2),
                              Layout::kThreads, Layout::kShared, 1, stream, p);
  }

  static constexpr ChainInstance instance(const char* name) {
    return {name,
            ptx::is_half<T> ? Dtype::half : Dtype::bfloat16,
            64,
            64 * Following,
            Segment,
            false,
            Layout::kX,
            Layout::kY,
            Layout::kThreads,
            Layout::kShared,
            &run};
  }
};

}  // namespace fused_resnet::conv
