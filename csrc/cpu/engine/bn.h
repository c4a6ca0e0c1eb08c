// Batch norm over rows [rows, channels]: statistics, y = relu((x - mean) * scale + bias + residual), and its backward.
//
// Row after row, from front to back: the vectors of mean, scale and so on are loaded again for every row, but they are
// in the L1 cache. Taking several rows at once to load them less often lost a third of the memory's bandwidth.

#pragma once

#include "bn_rows.h"
#include "simd.h"
#include "steps.h"

namespace fused_resnet::engine {
namespace {

// Rows that are summed in float32 before the sum is taken into float64.
constexpr int64_t kBnBlock = 128;
// The statistics start with a block of these.
constexpr int64_t kBnFirstBlock = 8;

// A vector of channels, or one of the channels that fill none.
inline void read(V& v, const float* p) { v = load(p); }
inline void read(float& v, const float* p) { v = *p; }
inline void write(float* p, V v) { store(p, v); }
inline void write(float* p, float v) { *p = v; }

template <typename T>
inline T at(const float* p) {
  T v;
  read(v, p);
  return v;
}

// f(zero, c): zero is of the type that f is to use for what begins at channel c.
template <typename F>
FUSED_RESNET_INLINE void each_vector(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth) f(V{}, c);
  for (; c < channels; ++c) f(0.0f, c);
}

// v where the ReLU lets it through; what is NaN passes, as in PyTorch.
template <typename T>
inline T under_relu(T v, T pre_activation) {
  return pre_activation <= T{} ? T{} : v;
}

// In one place, so that the backward finds the forward's bits again.
template <typename T>
inline T normalized(T x, T mean, T scale, T bias) {
  return (x - mean) * scale + bias;
}

// --- statistics ---

// Deviations from a pivot near the mean lose no digits to a mean that is large beside them. The pivot of the first
// block of rows is its own mean, that of another the mean of all rows before it; blocks are merged as Chan, Golub and
// LeVeque (1979) have it. No block is larger than all before it together: what its sum of squares cancels is then at
// most as much again as what the block adds to the whole, wherever outliers lie.
void bn_stats(const float* x, int64_t channels, int64_t first, int64_t last, float* scratch, double* mean,
              double* deviations) {
  float *pivot = scratch, *sum = pivot + channels, *squares = sum + channels;
  x += first * channels;
  const int64_t rows = last - first, own = smaller(rows, kBnFirstBlock);
  for (int64_t c = 0; c < channels; ++c) mean[c] = deviations[c] = 0;
  for (int64_t row = 0; row < own; ++row)
    for (int64_t c = 0; c < channels; ++c) mean[c] += x[row * channels + c] / static_cast<double>(own);
  for (int64_t begin = 0, end; begin < rows; begin = end) {
    end = smaller(rows, begin + smaller(larger(begin, kBnFirstBlock), kBnBlock));
    for (int64_t c = 0; c < channels; ++c) {
      pivot[c] = static_cast<float>(mean[c]);
      sum[c] = squares[c] = 0;
    }
    for (int64_t row = begin; row < end; ++row) {
      const float* from = x + row * channels;
      each_vector(channels, [&](auto zero, int64_t c) {
        using T = decltype(zero);
        const T d = at<T>(from + c) - at<T>(pivot + c);
        write(sum + c, at<T>(sum + c) + d);
        write(squares + c, at<T>(squares + c) + d * d);
      });
    }
    const double before = static_cast<double>(begin), here = static_cast<double>(end - begin);
    const double share = here / (before + here), cross = before * share;
    for (int64_t c = 0; c < channels; ++c) {
      const double shift = sum[c] / here, delta = pivot[c] + shift - mean[c];
      const double about_own_mean = squares[c] - sum[c] * shift;
      mean[c] += delta * share;
      deviations[c] += (about_own_mean < 0 ? 0 : about_own_mean) + delta * delta * cross;
    }
  }
}

// --- forward ---

template <bool kResidual, bool kRelu>
void bn_act_rows(const BnAct& act, int64_t first, int64_t last) {
  const BnAct p = act;  // its own copy: for all the compiler knows, a store could change the other
  for (int64_t start = first * p.channels; start < last * p.channels; start += p.channels) {
    each_vector(p.channels, [&](auto zero, int64_t c) {
      using T = decltype(zero);
      const int64_t i = start + c;
      T v = normalized(at<T>(p.x + i), at<T>(p.mean + c), at<T>(p.scale + c), at<T>(p.bias + c));
      if (kResidual) v += at<T>(p.residual + i);
      write(p.y + i, kRelu ? under_relu(v, v) : v);
    });
  }
}

void bn_act(const BnAct& act, int64_t first, int64_t last) {
  if (act.residual)
    return act.relu ? bn_act_rows<true, true>(act, first, last) : bn_act_rows<true, false>(act, first, last);
  act.relu ? bn_act_rows<false, true>(act, first, last) : bn_act_rows<false, false>(act, first, last);
}

// --- backward ---

template <BnMask kMask, BnStep kStep>
void bn_bwd_rows(const BnBwd& bwd, int64_t first, int64_t last, float* sum, float* products) {
  constexpr bool kSums = kStep == BnStep::kSums || kStep == BnStep::kFixedSums;
  constexpr bool kBatch = kStep == BnStep::kBatch, kInput = kMask == BnMask::kInput;
  const BnBwd p = bwd;  // as above
  for (int64_t start = first * p.channels; start < last * p.channels; start += p.channels) {
    each_vector(p.channels, [&](auto zero, int64_t c) {
      using T = decltype(zero);
      const int64_t i = start + c;
      const T x = kSums || kBatch || kInput ? at<T>(p.x + i) : zero;
      const T mean = kSums || kBatch || kInput ? at<T>(p.mean + c) : zero;
      const T scale = kStep != BnStep::kSums || kInput ? at<T>(p.scale + c) : zero;
      T g = at<T>(p.grad + i);
      if (kMask == BnMask::kOutput) g = under_relu(g, at<T>(p.y + i));
      if (kInput) g = under_relu(g, normalized(x, mean, scale, at<T>(p.bias + c)));
      if (kSums) {
        write(sum + c, at<T>(sum + c) + g);
        write(products + c, at<T>(products + c) + g * (x - mean));
      }
      if (kBatch) {
        write(p.dx + i, (g - at<T>(p.mean_g + c) - (x - mean) * at<T>(p.slope + c)) * scale);
        return;
      }
      if (p.g) write(p.g + i, g);
      if (kStep != BnStep::kSums && p.dx) write(p.dx + i, g * scale);
    });
  }
}

template <BnMask kMask, BnStep kStep>
void bn_bwd_blocks(const BnBwd& bwd, int64_t first, int64_t last, float* scratch, double* sum_g, double* moment) {
  const int64_t channels = bwd.channels;
  float *sum = scratch, *products = scratch + channels;
  for (int64_t c = 0; c < channels; ++c) sum_g[c] = moment[c] = 0;
  for (; first < last; first += kBnBlock) {
    for (int64_t c = 0; c < channels; ++c) sum[c] = products[c] = 0;
    bn_bwd_rows<kMask, kStep>(bwd, first, smaller(last, first + kBnBlock), sum, products);
    for (int64_t c = 0; c < channels; ++c) {
      sum_g[c] += sum[c];
      moment[c] += products[c];
    }
  }
}

template <BnMask kMask>
void bn_bwd_masked(const BnBwd& bwd, int64_t first, int64_t last, float* scratch, double* sum_g, double* moment) {
  switch (bwd.step) {
    case BnStep::kSums:
      return bn_bwd_blocks<kMask, BnStep::kSums>(bwd, first, last, scratch, sum_g, moment);
    case BnStep::kFixedSums:
      return bn_bwd_blocks<kMask, BnStep::kFixedSums>(bwd, first, last, scratch, sum_g, moment);
    case BnStep::kBatch:
      return bn_bwd_rows<kMask, BnStep::kBatch>(bwd, first, last, nullptr, nullptr);
    case BnStep::kFixed:
      return bn_bwd_rows<kMask, BnStep::kFixed>(bwd, first, last, nullptr, nullptr);
  }
}

void bn_bwd(const BnBwd& bwd, int64_t first, int64_t last, float* scratch, double* sum_g, double* moment) {
  switch (bwd.mask) {
    case BnMask::kNone:
      return bn_bwd_masked<BnMask::kNone>(bwd, first, last, scratch, sum_g, moment);
    case BnMask::kOutput:
      return bn_bwd_masked<BnMask::kOutput>(bwd, first, last, scratch, sum_g, moment);
    case BnMask::kInput:
      return bn_bwd_masked<BnMask::kInput>(bwd, first, last, scratch, sum_g, moment);
  }
}

constexpr BnKernels kBn = {3, bn_stats, bn_act, bn_bwd};

}  // namespace
}  // namespace fused_resnet::engine
