// Host side of the chained bottleneck of 128 middle channels.

#pragma once

#include <algorithm>
#include <limits>

#include "chain_instance.h"
#include "chain_stream_sm90_kernel.cuh"
#include "launch_sm90.h"
#include "maps_sm90.h"

namespace fused_resnet::conv {

template <class T>
struct ChainStreamSm90 {
  using Layout = ChainStreamLayout;
  static constexpr int kMiddle = 64 * Layout::kC, kChannels = 64 * Layout::kOut;

  static cudaError_t run(const Chain& chain, int multiprocessors, cudaStream_t stream) {
    const Shape& s = chain.shape;
    ChainStreamParams p = {};
    p.strips = Strips::of((s.p() + 1) / 2, s.q(), Layout::kMostOfLine);
    Maps<T> maps;
    maps(p.x, chain.x, lines_of(s, 64, p.strips.width + 2, 2));
    maps(p.weight1, chain.weight1, tiled_of(kMiddle, 9, kMiddle, 64, kMiddle, 2));
    maps(p.weight2, chain.weight2, tiled_of(kChannels, 1, kMiddle, 64, 64, 2));
    maps(p.weight3, chain.weight3, tiled_of(kMiddle, 1, kChannels, 64, kMiddle, 2));
    if (maps.error != cudaSuccess) return maps.error;
    const int64_t steps = p.strips.all(s.n), blocks = std::min<int64_t>(multiprocessors, steps);
    p.steps = static_cast<int>(steps / blocks), p.more = static_cast<int>(steps % blocks);
    p.p = s.p(), p.q = s.q();
    p.floor = chain.relu ? 0.0f : -std::numeric_limits<float>::infinity();
    p.early = chain.constant_weights;
    p.bias1 = chain.bias1, p.bias2 = chain.bias2, p.bias3 = chain.bias3;
    p.residual = chain.residual;
    p.y = chain.y, p.z = chain.z;

    return launch_overlapping(chain_stream_kernel<T>, blocks, Layout::kThreads, Layout::kShared, 1, stream, p);
  }

  static constexpr ChainInstance instance(const char* name) {
    return {name,
            ptx::is_half<T> ? Dtype::half : Dtype::bfloat16,
            kMiddle,
            kMiddle,
            false,
            true,
            Layout::kLines,
            Layout::kStages,
            Layout::kThreads,
            Layout::kShared,
            &run};
  }
};

}  // namespace fused_resnet::conv
