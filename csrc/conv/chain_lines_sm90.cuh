// Host side of the chained bottleneck by lines.

#pragma once

#include <algorithm>
#include <limits>

#include "chain_instance.h"
#include "chain_lines_sm90_kernel.cuh"
#include "launch_sm90.h"
#include "maps_sm90.h"

namespace fused_resnet::conv {

template <class T, int Following, bool Segment>
struct ChainLinesSm90 {
  using Layout = ChainLinesLayout<Following, Segment>;

  static cudaError_t run(const Chain& chain, int multiprocessors, cudaStream_t stream) {
    const Shape& s = chain.shape;
    ChainLinesParams p = {};
    p.strips = Strips::of(s.p(), s.q(), kMostOfLine);
    Maps<T> maps;
    maps(p.x, chain.x, lines_of(s, 64, p.strips.width + 2, 2));
    maps(p.weight1, chain.weight1, tiled_of(64, 9, 64, 64, 64, 2));
    maps(p.weight2, chain.weight2, tiled_of(256, 1, 64, 64, 64, 2));
    maps(p.weight3, chain.weight3, tiled_of(64 * Following, 1, 256, 64, 64, 2));
    if (Segment) maps(p.projection, chain.projection, tiled_of(256, 1, 64, 64, 64, 2));
    if (maps.error != cudaSuccess) return maps.error;
    p.pairs = p.strips.all(s.n);
    p.p = s.p(), p.q = s.q(), p.h2 = s.h2, p.w2 = s.w2, p.stride2 = s.stride2;
    p.floor = chain.relu ? 0.0f : -std::numeric_limits<float>::infinity();
    p.quarter = chain.quarter;
    p.early = chain.constant_weights;
    p.bias1 = chain.bias1, p.bias2 = chain.bias2, p.bias3 = chain.bias3;
    p.residual = chain.residual, p.x2 = chain.x2;
    p.y = chain.y, p.z = chain.z;

    return launch_overlapping(chain_lines_kernel<T, Following, Segment>, std::min<int64_t>(multiprocessors, p.pairs),
                              Layout::kThreads, Layout::kShared, 1, stream, p);
  }

  static constexpr ChainInstance instance(const char* name) {
    return {name,
            ptx::is_half<T> ? Dtype::half : Dtype::bfloat16,
            64,
            64 * Following,
            Segment,
            true,
            Layout::kLines,
            0,
            Layout::kThreads,
            Layout::kShared,
            &run};
  }
};

}  // namespace fused_resnet::conv
