// Host side of the 3x3 by lines for Hopper.

#pragma once

#include <algorithm>
#include <limits>

#include "instance.h"
#include "launch_sm90.h"
#include "lines_sm90_kernel.cuh"
#include "maps_sm90.h"

namespace fused_resnet::conv {

template <class T>
struct LinesSm90 {
  using Layout = LinesLayout;

  static const char* refuses(const Shape& s) {
    if (s.c != 64 || s.k != 64 || s.c2 != 0) return "channels that are not 64 to 64, or a second segment";
    if (s.r != 3 || s.s != 3 || s.stride_h != 1 || s.stride_w != 1 || s.pad_h != 1 || s.pad_w != 1 ||
        s.dilation_h != 1 || s.dilation_w != 1)
      return "a filter that is not 3x3 with stride 1 and padding 1";
    return nullptr;
  }

  static size_t workspace(const Shape&, int) { return 0; }

  static cudaError_t run(const Problem& problem, int multiprocessors, void*, cudaStream_t stream) {
    const Shape& s = problem.shape;
    LinesParams p = {};
    p.strips = Strips::of(s.p(), s.q(), kMostOfLine);
    Maps<T> maps;
    maps(p.x, problem.x, lines_of(s, 64, p.strips.width + 2, 2));
    maps(p.weight, problem.weight, tiled_of(64, 9, 64, 64, 64, 2));
    if (maps.error != cudaSuccess) return maps.error;
    p.lines = int64_t{s.n} * p.strips.across * s.p();
    p.p = s.p(), p.q = s.q();
    p.floor = problem.relu ? 0.0f : -std::numeric_limits<float>::infinity();
    p.early = problem.constant_weights;
    p.residual = problem.residual, p.scale = problem.scale, p.bias = problem.bias, p.y = problem.y;

    return launch_overlapping(conv_lines_kernel<T>, std::min<int64_t>(multiprocessors, (p.lines + 1) / 2),
                              Layout::kThreads, Layout::kShared, 1, stream, p);
  }

  static constexpr Instance instance(const char* name) {
    return {name,
            90,
            ptx::is_half<T> ? Dtype::half : Dtype::bfloat16,
            kMostOfLine,
            64,
            64,
            1,
            1,
            Layout::kLines,
            Layout::kThreads,
            Layout::kShared,
            0,
            0,
            &refuses,
            &workspace,
            &run};
  }
};

}  // namespace fused_resnet::conv
