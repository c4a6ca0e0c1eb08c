// Device code of bn_stats, bn_act, bn_act_bwd, bn_act_bwd_input and relu_bwd_sum. Raw pointers, no torch header.
//
// An activation in channels_last is a matrix [rows, channels], rows = N*H*W, dense. A thread owns one vector of V
// channels (16 bytes, or one element where channels or alignment forbid) and walks down rows, so that what belongs to a
// channel is loaded and computed once a thread. blockDim = (lanes, 256 / lanes), lanes a power of two up to 32: x runs
// over vectors, y over rows. gridDim = (channel tiles, row splits); a block owns the rows [blockIdx.y, blockIdx.y + 1)
// * rows_per_block.
//
// Reductions have two stages and no atomics: a block writes one partial result a channel, a second kernel merges the
// partial results in a fixed order. The same input on the same device gives the same bits.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fused_resnet {

inline constexpr int kThreads = 256;
inline constexpr int kWarp = 32;
inline constexpr int kWarps = kThreads / kWarp;
inline constexpr int kFinalLanes = 8;  // channels of a block in the second stage: one 32-byte sector of partial results

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// A NaN stays a NaN, as in PyTorch; fmaxf would make it 0.
__device__ inline float relu_of(float v) { return v <= 0.0f ? 0.0f : v; }

// The gradient where the ReLU let it through; an output that is NaN lets it through.
__device__ inline float masked(float grad, float y) { return y <= 0.0f ? 0.0f : grad; }

// Where a ReLU's mask comes from: there is none, the ReLU's output, or the batch norm of x, computed again in the same
// way. What is positive there is so in the output, unless it is too small for the output's type.
enum Mask { kNoMask, kMaskOfY, kMaskOfX };

// Count, mean and sum of squared distances from the mean.
struct Moments {
  static constexpr int kWords = 3;
  float word[kWords] = {0.0f, 0.0f, 0.0f};

  // Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
  __device__ void merge(const Moments& other) {
    const float count = word[0] + other.word[0];
    const float share = count > 0.0f ? __fdividef(other.word[0], count) : 0.0f;
    const float delta = other.word[1] - word[1];
    word[2] += other.word[2] + delta * delta * (word[0] * share);
    word[1] += delta * share;
    word[0] = count;
  }
};

template <int N>
struct Sums {
  static constexpr int kWords = N;
  float word[N] = {};

  __device__ void merge(const Sums& other) {
#pragma unroll
    for (int i = 0; i < N; ++i) word[i] += other.word[i];
  }
};

// Merges over threadIdx.y. The result is right in the threads with threadIdx.y == 0.
template <int V, typename Acc>
__device__ void merge_rows(Acc (&acc)[V]) {
  __shared__ float shared[kWarps][V][Acc::kWords][kWarp];
  const int lanes = blockDim.x;
  const int thread = threadIdx.y * lanes + threadIdx.x;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    for (int offset = kWarp / 2; offset >= lanes; offset /= 2) {
      Acc other;
#pragma unroll
      for (int i = 0; i < Acc::kWords; ++i) other.word[i] = __shfl_down_sync(0xffffffffu, acc[j].word[i], offset);
      acc[j].merge(other);
    }
    if (thread % kWarp < lanes) {
#pragma unroll
      for (int i = 0; i < Acc::kWords; ++i) shared[thread / kWarp][j][i][threadIdx.x] = acc[j].word[i];
    }
  }
  __syncthreads();
  if (threadIdx.y == 0) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      for (int warp = 0; warp < kWarps; ++warp) {
        Acc other;
#pragma unroll
        for (int i = 0; i < Acc::kWords; ++i) other.word[i] = shared[warp][j][i][threadIdx.x];
        if (warp == 0) {
          acc[j] = other;
        } else {
          acc[j].merge(other);
        }
      }
    }
  }
}

// What a thread owns: V channels from `channel` on, and every blockDim.y-th row of [row, end).
template <int V>
struct Slice {
  int channel;
  bool active;
  int64_t row, end, step;

  __device__ Slice(int64_t rows, int channels, int64_t rows_per_block)
      : channel((blockIdx.x * blockDim.x + threadIdx.x) * V), active(channel < channels), step(blockDim.y) {
    const int64_t begin = static_cast<int64_t>(blockIdx.y) * rows_per_block;
    row = begin + threadIdx.y;
    end = rows - begin < rows_per_block ? rows : begin + rows_per_block;
  }

  // A row beyond the end becomes the last one: a kernel that maps rows to rows reads it again and stores the same once
  // more, and needs no loop for the rest.
  __device__ int64_t within(int64_t r) const { return r < end ? r : end - 1; }
};

template <int V, typename T>
__device__ Pack<T, V> load(const T* data, int64_t offset) {
  return *reinterpret_cast<const Pack<T, V>*>(data + offset);
}

template <int V, typename T>
__device__ void store(T* data, int64_t offset, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(data + offset) = pack;
}

// A channel vector's share of this thread, 16 bytes at a time: where V > 1, the launcher has seen to the alignment.
// Every parameter is loaded before any arithmetic, so that the latencies overlap.
template <int V>
__device__ void load_parameters(float (&to)[V], const float* from, int channel, float otherwise) {
  constexpr int kWide = V % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int j = 0; j < V; j += kWide) {
    if (from == nullptr) {
#pragma unroll
      for (int i = 0; i < kWide; ++i) to[j + i] = otherwise;
    } else {
      const Pack<float, kWide> in = load<kWide>(from, channel + j);
#pragma unroll
      for (int i = 0; i < kWide; ++i) to[j + i] = in.value[i];
    }
  }
}

// What makes y = (x - center) * scale + shift of a thread's channels.
template <int V>
__device__ void load_normalization(float (&center)[V], float (&scale)[V], float (&shift)[V], const float* mean,
                                   const float* var, const float* weight, const float* bias, float eps, int channel) {
  float variance[V];
  load_parameters(center, mean, channel, 0.0f);
  load_parameters(variance, var, channel, 1.0f);
  load_parameters(scale, weight, channel, 1.0f);
  load_parameters(shift, bias, channel, 0.0f);
#pragma unroll
  for (int j = 0; j < V; ++j) scale[j] *= rsqrtf(variance[j] + eps);
}

// out[i][split][channel], i < Acc::kWords - kSkip: the partial result of a block without its first kSkip words.
template <int kSkip, int V, typename Acc>
__device__ void store_partial(float* out, int channels, const Slice<V>& slice, const Acc (&acc)[V]) {
  if (threadIdx.y != 0 || !slice.active) return;
#pragma unroll
  for (int i = kSkip; i < Acc::kWords; ++i) {
    float* to = out + (static_cast<int64_t>(i - kSkip) * gridDim.y + blockIdx.y) * channels + slice.channel;
#pragma unroll
    for (int j = 0; j < V; ++j) to[j] = acc[j].word[i];
  }
}

// partial: [2, splits, channels], mean and sum of squared distances; the count follows from the geometry.
//
// kRows rows are loaded at once, their moments formed around their own mean, and merged into the thread's: the division
// is one for all of them and all V channels, and no term ever holds the square of a mean.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 3)
    bn_stats_partial_kernel(const T* __restrict__ x, float* __restrict__ partial, int64_t rows, int channels,
                            int64_t rows_per_block) {
  constexpr int kRows = 4;
  Slice<V> slice(rows, channels, rows_per_block);
  float count = 0.0f, mean[V] = {}, square[V] = {};
  if (slice.active) {
    int64_t row = slice.row;
    for (; row + (kRows - 1) * slice.step < slice.end; row += kRows * slice.step) {
      Pack<T, V> in[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) in[r] = load<V>(x, (row + r * slice.step) * channels + slice.channel);
      const float total = count + kRows;
      const float share = __fdividef(kRows, total);
      const float weight = count * share;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        float sum = 0.0f, around = 0.0f;
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum += to_float(in[r].value[j]);
        const float center = sum * (1.0f / kRows);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float distance = to_float(in[r].value[j]) - center;
          around += distance * distance;
        }
        const float delta = center - mean[j];
        mean[j] += delta * share;
        square[j] += around + delta * delta * weight;
      }
      count = total;
    }
    Pack<T, V> in[kRows];
#pragma unroll
    for (int r = 0; r < kRows - 1; ++r) {
      if (row + r * slice.step < slice.end) in[r] = load<V>(x, (row + r * slice.step) * channels + slice.channel);
    }
#pragma unroll
    for (int r = 0; r < kRows - 1; ++r) {
      if (row + r * slice.step >= slice.end) break;
      count += 1.0f;
      const float share = __fdividef(1.0f, count);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float v = to_float(in[r].value[j]);
        const float delta = v - mean[j];
        mean[j] += delta * share;
        square[j] += delta * (v - mean[j]);
      }
    }
  }
  Moments moments[V];
#pragma unroll
  for (int j = 0; j < V; ++j) moments[j] = {{count, mean[j], square[j]}};
  merge_rows(moments);
  store_partial<1>(partial, channels, slice, moments);
}

// mean, var: [channels]; var is the biased variance. gridDim.y is 1 here and rows_per_block that of the first stage.
__global__ void __launch_bounds__(kThreads)
    bn_stats_final_kernel(const float* __restrict__ partial, float* __restrict__ mean, float* __restrict__ var,
                          int splits, int64_t rows, int channels, int64_t rows_per_block) {
  const int channel = blockIdx.x * blockDim.x + threadIdx.x;
  Moments moments[1];
  if (channel < channels) {
    for (int split = threadIdx.y; split < splits; split += blockDim.y) {
      const int64_t left = rows - split * rows_per_block;
      const int64_t at = static_cast<int64_t>(split) * channels + channel;
      const float count = static_cast<float>(left < rows_per_block ? left : rows_per_block);
      moments[0].merge({{count, partial[at], partial[static_cast<int64_t>(splits) * channels + at]}});
    }
  }
  merge_rows(moments);
  if (threadIdx.y == 0 && channel < channels) {
    mean[channel] = moments[0].word[1];
    var[channel] = moments[0].word[2] / static_cast<float>(rows);
  }
}

// y = act((x - mean) * weight / sqrt(var + eps) + bias + residual). x - mean comes first: folded into one shift, it
// would cancel where the mean is large.
template <typename T, int V, bool kResidual>
__global__ void __launch_bounds__(kThreads, 3)
    bn_act_kernel(const T* __restrict__ x, const float* __restrict__ mean, const float* __restrict__ var,
                  const float* __restrict__ weight, const float* __restrict__ bias, float eps,
                  const T* __restrict__ residual, bool relu, T* __restrict__ y, int64_t rows, int channels,
                  int64_t rows_per_block) {
  constexpr int kRows = 2;
  Slice<V> slice(rows, channels, rows_per_block);
  if (!slice.active) return;
  float center[V], scale[V], shift[V];
  load_normalization(center, scale, shift, mean, var, weight, bias, eps, slice.channel);
  for (int64_t row = slice.row; row < slice.end; row += kRows * slice.step) {
    Pack<T, V> in[kRows], add[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = slice.within(row + r * slice.step) * channels + slice.channel;
      in[r] = load<V>(x, at);
      if (kResidual) add[r] = load<V>(residual, at);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Pack<T, V> out;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        float v = (to_float(in[r].value[j]) - center[j]) * scale[j] + shift[j];
        if (kResidual) v += to_float(add[r].value[j]);
        out.value[j] = from_float<T>(relu ? relu_of(v) : v);
      }
      store<V>(y, slice.within(row + r * slice.step) * channels + slice.channel, out);
    }
  }
}

// partial: [1 or 2, splits, channels]: sum of g and, with kCenter, sum of g * (x - mean), where g is grad under the
// ReLU's mask or grad itself. g_out, unless null, receives g. var, weight and bias are read for kMaskOfX only, which
// needs kCenter.
template <typename T, int V, Mask kMask, bool kCenter>
__global__ void __launch_bounds__(kThreads, 3)
    bn_bwd_partial_kernel(const T* __restrict__ grad, const T* __restrict__ y, const T* __restrict__ x,
                          const float* __restrict__ mean, const float* __restrict__ var,
                          const float* __restrict__ weight, const float* __restrict__ bias, float eps,
                          T* __restrict__ g_out, float* __restrict__ partial, int64_t rows, int channels,
                          int64_t rows_per_block) {
  constexpr int kRows = 2;
  Slice<V> slice(rows, channels, rows_per_block);
  Sums<kCenter ? 2 : 1> sums[V];
  if (slice.active) {
    float center[V], scale[V], shift[V];
    if (kMask == kMaskOfX) {
      load_normalization(center, scale, shift, mean, var, weight, bias, eps, slice.channel);
    } else {
      load_parameters(center, mean, slice.channel, 0.0f);
    }
    for (int64_t row = slice.row; row < slice.end; row += kRows * slice.step) {
      Pack<T, V> g[kRows], out[kRows], in[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = slice.within(row + r * slice.step) * channels + slice.channel;
        g[r] = load<V>(grad, at);
        if (kMask == kMaskOfY) out[r] = load<V>(y, at);
        if (kCenter) in[r] = load<V>(x, at);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (row + r * slice.step >= slice.end) break;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          float v = to_float(g[r].value[j]), distance = 0.0f;
          if constexpr (kCenter) distance = to_float(in[r].value[j]) - center[j];
          if (kMask == kMaskOfX) v = masked(v, distance * scale[j] + shift[j]);
          if (kMask == kMaskOfY) v = masked(v, to_float(out[r].value[j]));
          if (kMask != kNoMask) g[r].value[j] = from_float<T>(v);
          sums[j].word[0] += v;
          if constexpr (kCenter) sums[j].word[1] += v * distance;
        }
        if (g_out != nullptr) store<V>(g_out, (row + r * slice.step) * channels + slice.channel, g[r]);
      }
    }
  }
  merge_rows(sums);
  store_partial<0>(partial, channels, slice, sums);
}

// sum_g: [channels]; dweight: [channels] = sum g * (x - mean) / sqrt(var + eps), or null where the first stage had no
// x.
template <bool kCenter>
__global__ void __launch_bounds__(kThreads)
    bn_bwd_final_kernel(const float* __restrict__ partial, const float* __restrict__ var, float eps,
                        float* __restrict__ sum_g, float* __restrict__ dweight, int splits, int channels) {
  const int channel = blockIdx.x * blockDim.x + threadIdx.x;
  constexpr int kWords = kCenter ? 2 : 1;
  Sums<kWords> sums[1];
  if (channel < channels) {
    for (int split = threadIdx.y; split < splits; split += blockDim.y) {
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        sums[0].word[i] += partial[(static_cast<int64_t>(i) * splits + split) * channels + channel];
    }
  }
  merge_rows(sums);
  if (threadIdx.y == 0 && channel < channels) {
    sum_g[channel] = sums[0].word[0];
    if constexpr (kCenter) dweight[channel] = sums[0].word[1] * rsqrtf(var[channel] + eps);
  }
}

// dx = weight * inv * g, and with kBatch, where mean and var are functions of x,
// dx = weight * inv * (g - sum_g * share - (x - mean) * inv * dweight * share), inv = 1 / sqrt(var + eps), share being
// one over the number of rows behind the sums. Where there is no var, inv is 1. kMaskOfX needs kBatch, and alone reads
// the bias.
template <typename T, int V, Mask kMask, bool kBatch>
__global__ void __launch_bounds__(kThreads, 3)
    bn_bwd_input_kernel(const T* __restrict__ grad, const T* __restrict__ y, const T* __restrict__ x,
                        const float* __restrict__ mean, const float* __restrict__ var, const float* __restrict__ weight,
                        const float* __restrict__ bias, const float* __restrict__ sum_g,
                        const float* __restrict__ dweight, float share, float eps, T* __restrict__ dx, int64_t rows,
                        int channels, int64_t rows_per_block) {
  constexpr int kRows = 2;
  Slice<V> slice(rows, channels, rows_per_block);
  if (!slice.active) return;
  float scale[V], center[V], flat[V], slope[V], shift[V], variance[V];
  load_parameters(variance, var, slice.channel, 1.0f);
  load_parameters(scale, weight, slice.channel, 1.0f);
  if (kBatch) {
    load_parameters(center, mean, slice.channel, 0.0f);
    load_parameters(flat, sum_g, slice.channel, 0.0f);
    load_parameters(slope, dweight, slice.channel, 0.0f);
  }
  if (kMask == kMaskOfX) load_parameters(shift, bias, slice.channel, 0.0f);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float inv = rsqrtf(variance[j] + eps);
    scale[j] *= inv;
    if (kBatch) {
      flat[j] *= share;
      slope[j] *= inv * share;
    }
  }
  for (int64_t row = slice.row; row < slice.end; row += kRows * slice.step) {
    Pack<T, V> g[kRows], out[kRows], in[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = slice.within(row + r * slice.step) * channels + slice.channel;
      g[r] = load<V>(grad, at);
      if (kMask == kMaskOfY) out[r] = load<V>(y, at);
      if (kBatch) in[r] = load<V>(x, at);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Pack<T, V> result;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        float v = to_float(g[r].value[j]), distance = 0.0f;
        if (kBatch) distance = to_float(in[r].value[j]) - center[j];
        if (kMask == kMaskOfX) v = masked(v, distance * scale[j] + shift[j]);
        if (kMask == kMaskOfY) v = masked(v, to_float(out[r].value[j]));
        if (kBatch) v = v - flat[j] - distance * slope[j];
        result.value[j] = from_float<T>(v * scale[j]);
      }
      store<V>(dx, slice.within(row + r * slice.step) * channels + slice.channel, result);
    }
  }
}

}  // namespace fused_resnet
