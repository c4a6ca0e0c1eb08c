// Batch norm over rows [rows, channels]: statistics, y = relu((x - mean) * scale + bias + residual), and its backward.
//
// A few rows are taken at once, so that the vectors of mean, scale and so on are loaded once for all of them, while
// memory is still read almost from front to back.

#pragma once

#include "bn_rows.h"
#include "simd.h"
#include "steps.h"

namespace fused_resnet::engine {
namespace {

constexpr int64_t kBnRows = 4;
constexpr int64_t kBnStatsRows = 8;
// Rows that are summed in float32 before the sum is taken into float64.
constexpr int64_t kBnBlock = 128;

// A vector of channels, or one of the channels that fill none.
inline void read(V& v, const float* p) { v = load(p); }
inline void read(float& v, const float* p) { v = *p; }
inline void write(float* p, V v) { store(p, v); }
inline void write(float* p, float v) { *p = v; }

template <int64_t kValue>
struct Constant {
  static constexpr int64_t value = kValue;
};

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

// f(how many rows, as a constant; the first of them) from first to last.
template <int64_t kAtOnce, typename F>
FUSED_RESNET_INLINE void each_rows(int64_t first, int64_t last, const F& f) {
  for (; first + kAtOnce <= last; first += kAtOnce) f(Constant<kAtOnce>{}, first);
  for (; first < last; ++first) f(Constant<1>{}, first);
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

// The first pivot: the mean of a few rows. One row alone could lie far from all others, and cancel digits.
void bn_first_pivot(const float* x, int64_t channels, int64_t rows, float* pivot, double* sum) {
  rows = smaller(rows, kBnStatsRows);
  for (int64_t c = 0; c < channels; ++c) sum[c] = 0;
  for (int64_t row = 0; row < rows; ++row, x += channels)
    for (int64_t c = 0; c < channels; ++c) sum[c] += x[c];
  for (int64_t c = 0; c < channels; ++c) pivot[c] = static_cast<float>(sum[c] / static_cast<double>(rows));
}

// Deviations from a pivot near the mean lose no digits to a mean that is large beside them. The pivot of a block of
// rows is the mean of all blocks before; blocks are merged as Chan, Golub and LeVeque (1979) have it. What a block
// cancels is then never more than what it adds to the whole.
void bn_stats(const float* x, int64_t channels, int64_t first, int64_t last, float* scratch, double* mean,
              double* deviations) {
  float *pivot = scratch, *sum = pivot + channels, *squares = sum + channels;
  x += first * channels;
  const int64_t rows = last - first;
  bn_first_pivot(x, channels, rows, pivot, mean);
  for (int64_t c = 0; c < channels; ++c) mean[c] = deviations[c] = 0;
  for (int64_t begin = 0; begin < rows; begin += kBnBlock) {
    const int64_t end = smaller(rows, begin + kBnBlock);
    for (int64_t c = 0; c < channels; ++c) {
      if (begin > 0) pivot[c] = static_cast<float>(mean[c]);
      sum[c] = squares[c] = 0;
    }
    each_rows<kBnStatsRows>(begin, end, [&](auto count, int64_t row) {
      const float* from = x + row * channels;
      each_vector(channels, [&](auto zero, int64_t c) {
        using T = decltype(zero);
        const T p = at<T>(pivot + c);
        T s = at<T>(sum + c), q = at<T>(squares + c);
        for (int64_t r = 0; r < count.value; ++r) {
          const T d = at<T>(from + r * channels + c) - p;
          s += d;
          q += d * d;
        }
        write(sum + c, s);
        write(squares + c, q);
      });
    });
    const double before = static_cast<double>(begin), here = static_cast<double>(end - begin);
    const double share = here / (before + here), cross = before * share;
    for (int64_t c = 0; c < channels; ++c) {
      const double shift = sum[c] / here, delta = pivot[c] - mean[c] + shift;
      const double own = squares[c] - sum[c] * shift;
      mean[c] += delta * share;
      deviations[c] += (own < 0 ? 0 : own) + delta * delta * cross;
    }
  }
}

// --- forward ---

template <bool kResidual, bool kRelu>
void bn_act_rows(const BnAct& act, int64_t first, int64_t last) {
  const int64_t channels = act.channels;
  const float *mean = act.mean, *scale = act.scale, *bias = act.bias;
  each_rows<kBnRows>(first, last, [&](auto count, int64_t row) {
    const float *x = act.x + row * channels, *residual = kResidual ? act.residual + row * channels : nullptr;
    float* y = act.y + row * channels;
    each_vector(channels, [&](auto zero, int64_t c) {
      using T = decltype(zero);
      const T m = at<T>(mean + c), a = at<T>(scale + c), b = at<T>(bias + c);
      for (int64_t r = 0; r < count.value; ++r) {
        const int64_t i = r * channels + c;
        T v = normalized(at<T>(x + i), m, a, b);
        if (kResidual) v += at<T>(residual + i);
        write(y + i, kRelu ? under_relu(v, v) : v);
      }
    });
  });
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
  const int64_t channels = bwd.channels;
  const BnBwd p = bwd;  // its own copy: for all the compiler knows, a store could change the other
  each_rows<kBnRows>(first, last, [&](auto count, int64_t row) {
    const int64_t start = row * channels;
    each_vector(channels, [&](auto zero, int64_t c) {
      using T = decltype(zero);
      constexpr bool kX = kSums || kBatch || kInput;
      const T mean = kX ? at<T>(p.mean + c) : zero,
              scale = kStep != BnStep::kSums || kInput ? at<T>(p.scale + c) : zero;
      const T bias = kInput ? at<T>(p.bias + c) : zero;
      const T mean_g = kBatch ? at<T>(p.mean_g + c) : zero, slope = kBatch ? at<T>(p.slope + c) : zero;
      T s = kSums ? at<T>(sum + c) : zero, q = kSums ? at<T>(products + c) : zero;
      for (int64_t r = 0; r < count.value; ++r) {
        const int64_t i = start + r * channels + c;
        const T x = kX ? at<T>(p.x + i) : zero;
        T g = at<T>(p.grad + i);
        if (kMask == BnMask::kOutput) g = under_relu(g, at<T>(p.y + i));
        if (kInput) g = under_relu(g, normalized(x, mean, scale, bias));
        if (kSums) {
          s += g;
          q += g * (x - mean);
        }
        if (kBatch) {
          write(p.dx + i, (g - mean_g - (x - mean) * slope) * scale);
        } else {
          if (p.g) write(p.g + i, g);
          if (kStep != BnStep::kSums && p.dx) write(p.dx + i, g * scale);
        }
      }
      if (kSums) {
        write(sum + c, s);
        write(products + c, q);
      }
    });
  });
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
