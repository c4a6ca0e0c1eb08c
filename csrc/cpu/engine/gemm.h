// C = A B for a row-major A and a B in panels, with the convolution's epilogue.

#pragma once

#include "simd.h"
#include "steps.h"

namespace fused_resnet::engine {
namespace {

constexpr int64_t kNr = kWidth * kVectors;
constexpr int64_t kKc = 256;  // a panel of kKc rows stays in the first-level cache

struct Epilogue {
  const float* bias = nullptr;
  const float* residual = nullptr;
  bool relu = false;
};

template <int kRows>
using Accumulators = V[kRows][kVectors];

// acc += A B for kRows rows, lda floats apart, and one panel of k rows.
template <int kRows>
FUSED_RESNET_INLINE void accumulate(Accumulators<kRows>& acc, const float* a, int64_t lda, const float* b, int64_t k) {
#pragma GCC unroll 2
  for (int64_t kk = 0; kk < k; ++kk) {
    V right[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + kk * kNr + j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const V left = splat(a[i * lda + kk]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] += left * right[j];
    }
  }
}

// Writes a tile of C. first: C is written, else added to; last: the epilogue follows. columns < kNr only in the last
// panel.
template <int kRows>
FUSED_RESNET_INLINE void finish(Accumulators<kRows>& acc, float* c, int64_t ldc, int64_t columns, bool first, bool last,
                                const Epilogue& epilogue) {
  float edge[kNr];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    float* out = c + i * ldc;
    const bool whole = columns == kNr;
    if (!first) {
      if (!whole) std::memcpy(edge, out, columns * sizeof(float));
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] += load((whole ? out : edge) + j * kWidth);
    }
    if (last) {
      if (epilogue.bias)
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) acc[i][j] += load(epilogue.bias + j * kWidth);
      if (epilogue.residual) {
        const float* residual = epilogue.residual + i * ldc;
        if (!whole) {
          std::memcpy(edge, residual, columns * sizeof(float));
          residual = edge;
        }
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) acc[i][j] += load(residual + j * kWidth);
      }
      if (epilogue.relu)
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) acc[i][j] = relu(acc[i][j]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store((whole ? out : edge) + j * kWidth, acc[i][j]);
    if (!whole) std::memcpy(out, edge, columns * sizeof(float));
  }
}

template <int kRows>
FUSED_RESNET_INLINE void clear(Accumulators<kRows>& acc) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) acc[i][j] = V{};
}

template <int kRows>
void micro(const float* a, int64_t lda, const float* b, int64_t k, float* c, int64_t ldc, int64_t columns, bool first,
           bool last, const Epilogue& epilogue) {
  Accumulators<kRows> acc;
  clear<kRows>(acc);
  accumulate<kRows>(acc, a, lda, b, k);
  finish<kRows>(acc, c, ldc, columns, first, last, epilogue);
}

template <int kRows>
inline void micro_of(int64_t rows, const float* a, int64_t lda, const float* b, int64_t k, float* c, int64_t ldc,
                     int64_t columns, bool first, bool last, const Epilogue& epilogue) {
  if (rows == kRows) return micro<kRows>(a, lda, b, k, c, ldc, columns, first, last, epilogue);
  if constexpr (kRows > 1) micro_of<kRows - 1>(rows, a, lda, b, k, c, ldc, columns, first, last, epilogue);
}

// One slice of the reduction: C[m, n] (+)= A[m, k] B[k, n]; b is the slice's start in the first panel, panels lie
// `panel` floats apart.
inline void gemm(const float* a, int64_t lda, const float* b, int64_t panel, int64_t k, float* c, int64_t ldc,
                 int64_t m, int64_t n, bool first, bool last, const Epilogue& epilogue) {
  // Equal groups of rows: a last group of one row would wait for its loads.
  const int64_t groups = ceil_div(m, kMr), rows = m / groups, larger_groups = m % groups;
  const float* const start = b;
  for (int64_t j = 0; j < n; j += kNr, b += panel) {
    const int64_t columns = smaller(kNr, n - j);
    // The next panel comes from far away where there are more weights than cache: each group of rows asks for a part.
    const float* next = j + kNr < n || k * kNr == panel ? b + panel : start + k * kNr;
    const int64_t part = ceil_div(k * kNr, groups);
    int64_t i = 0;
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t f = g * part; f < smaller((g + 1) * part, k * kNr); f += 16) __builtin_prefetch(next + f, 0, 2);
      const int64_t count = rows + (g < larger_groups);
      const Epilogue here{epilogue.bias ? epilogue.bias + j : nullptr,
                          epilogue.residual ? epilogue.residual + i * ldc + j : nullptr, epilogue.relu};
      micro_of<kMr>(count, a + i * lda, lda, b, k, c + i * ldc + j, ldc, columns, first, last, here);
      i += count;
    }
  }
}

// The reduction in equal slices of at most kKc.
struct Slices {
  int64_t count, k;
  explicit Slices(int64_t k_) : count(ceil_div(k_, kKc)), k(k_) {}
  int64_t begin(int64_t i) const { return k * i / count; }
};

// C = epilogue(A B) over the whole reduction.
inline void multiply(const float* a, int64_t lda, const float* b, int64_t panel, int64_t k, float* c, int64_t ldc,
                     int64_t m, int64_t n, const Epilogue& epilogue) {
  const Slices slices(k);
  for (int64_t i = 0; i < slices.count; ++i) {
    const int64_t begin = slices.begin(i), end = slices.begin(i + 1);
    gemm(a + begin, lda, b + begin * kNr, panel, end - begin, c, ldc, m, n, i == 0, i == slices.count - 1, epilogue);
  }
}

}  // namespace
}  // namespace fused_resnet::engine
