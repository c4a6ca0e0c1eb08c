// Max-pool and global average pool.

#pragma once

#include <limits>

#include "simd.h"
#include "steps.h"

namespace fused_resnet::engine {
namespace {

// f(vector of channels at c) for whole vectors, g(c) for the channels that are left.
template <typename F, typename G>
inline void over_channels(int64_t channels, F f, G g) {
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth) f(c);
  for (; c < channels; ++c) g(c);
}

void max_pool_row(const MaxPool& pool, int64_t row) {
  const int64_t image = row / pool.p, top = row % pool.p * pool.stride - pool.pad;
  const int64_t h0 = larger(0, top), h1 = smaller(pool.h, top + pool.kernel);
  float* y = pool.y + row * pool.q * pool.c;
  for (int64_t q = 0; q < pool.q; ++q, y += pool.c) {
    const int64_t left = q * pool.stride - pool.pad;
    const int64_t w0 = larger(0, left), w1 = smaller(pool.w, left + pool.kernel);
    const float* x = pool.x + image * pool.h * pool.w * pool.c;
    over_channels(
        pool.c,
        [&](int64_t c) {
          V m = splat(-std::numeric_limits<float>::infinity());
          for (int64_t h = h0; h < h1; ++h)
            for (int64_t w = w0; w < w1; ++w) m = max(m, load(x + (h * pool.w + w) * pool.c + c));
          store(y + c, m);
        },
        [&](int64_t c) {
          float m = -std::numeric_limits<float>::infinity();
          for (int64_t h = h0; h < h1; ++h) {
            for (int64_t w = w0; w < w1; ++w) {
              const float v = x[(h * pool.w + w) * pool.c + c];
              if (v > m || v != v) m = v;
            }
          }
          y[c] = m;
        });
  }
}

void avg_pool_image(const AvgPool& pool, int64_t image) {
  const float* x = pool.x + image * pool.pixels * pool.c;
  float* y = pool.y + image * pool.c;
  const float count = static_cast<float>(pool.pixels);
  over_channels(
      pool.c,
      [&](int64_t c) {
        V sum = V{};
        for (int64_t i = 0; i < pool.pixels; ++i) sum += load(x + i * pool.c + c);
        store(y + c, sum / count);
      },
      [&](int64_t c) {
        float sum = 0;
        for (int64_t i = 0; i < pool.pixels; ++i) sum += x[i * pool.c + c];
        y[c] = sum / count;
      });
}

}  // namespace
}  // namespace fused_resnet::engine
