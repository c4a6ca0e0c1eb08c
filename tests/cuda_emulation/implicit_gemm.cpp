// The main loop of csrc/conv/sm90_mainloop.cuh in plain C++: the same walk over geometry.h's tiles and steps, around a
// tensor memory accelerator that does what the PTX manual says of the im2col and the tiled mode, and nothing more.

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "conv/geometry.h"

using namespace fused_resnet::conv;

namespace {

// pixels x channels values, from the pixel (w, h, n) on and channel c on. The pixels walk the box of the map from its
// lower to its upper corner, in strides, rows before images; what is read lies an offset further; outside is zero.
void load_im2col(const Im2col& map, const float* data, int c, int w, int h, int n, unsigned offset_w, unsigned offset_h,
                 float* to) {
  const int size[4] = {int(map.size[0]), int(map.size[1]), int(map.size[2]), int(map.size[3])};
  if (offset_w > 255 || offset_h > 255) std::abort();
  for (unsigned pixel = 0; pixel < map.pixels; ++pixel) {
    const int x = w + int(offset_w), y = h + int(offset_h);
    const bool inside = x >= 0 && x < size[1] && y >= 0 && y < size[2] && n >= 0 && n < size[3];
    for (unsigned i = 0; i < map.channels; ++i) {
      const int channel = c + int(i);
      const uint64_t at = (channel * sizeof(float) + x * map.bytes[0] + y * map.bytes[1] + n * map.bytes[2]) / 4;
      to[pixel * map.channels + i] = inside && channel >= 0 && channel < size[0] ? data[at] : 0.0f;
    }
    w += int(map.stride[1]);
    if (w <= size[1] - 1 + map.upper[0]) continue;
    w = map.lower[0];
    h += int(map.stride[2]);
    if (h <= size[2] - 1 + map.upper[1]) continue;
    h = map.lower[1];
    ++n;
  }
}

void load_tiled(const Tiled& map, const float* data, int c, int tap, int k, float* to) {
  for (unsigned row = 0; row < map.box[2]; ++row)
    for (unsigned i = 0; i < map.box[0]; ++i) {
      const uint64_t channel = c + i, output = k + row;
      const bool inside = channel < map.size[0] && uint64_t(tap) < map.size[1] && output < map.size[2];
      const uint64_t at = (channel * sizeof(float) + tap * map.bytes[0] + output * map.bytes[1]) / 4;
      to[row * map.box[0] + i] = inside ? data[at] : 0.0f;
    }
}

}  // namespace

extern "C" {

// y [M, K]; the reduction in two ranges, [0, split) and from split on. Returns the number of its steps.
int implicit_gemm(const int* v, int tile_m, int tile_n, int cluster_m, int cluster_n, int split, const float* x,
                  const float* weight, const float* x2, const float* weight2, double* y) {
  constexpr int block = 64;
  const Shape s = {v[0], v[1],  v[2],  v[3],  v[4],  v[5],  v[6],  v[7], v[8],
                   v[9], v[10], v[11], v[12], v[13], v[14], v[15], v[16]};
  const Reduction reduction = reduction_of(s, block);
  const Window window = window_of(s), second_window = second_window_of(s);
  const int pixels = tile_m / cluster_n, rows = tile_n / cluster_m, steps = reduction.steps();
  const Im2col maps[2] = {im2col_of(s, block, pixels, 4), second_im2col_of(s, block, pixels, 4)};
  const Tiled weights[2] = {tiled_of(s.k, s.r * s.s, s.c, block, rows, 4), tiled_of(s.k, 1, s.c2, block, rows, 4)};
  std::vector<float> a(tile_m * block), b(tile_n * block);
  for (int64_t row = 0; row < s.m(); row += tile_m)
    for (int column = 0; column < s.k; column += tile_n) {
      std::vector<double> sum(tile_m * tile_n);
      for (const auto& [first, last] : {std::pair(0, split), std::pair(split, steps)}) {
        Part at = reduction.at(first);
        for (int step = first; step < last; ++step, reduction.advance(at)) {
          for (int rank = 0; rank < cluster_n; ++rank) {
            const Pixel from = (at.second ? second_window : window).at(row + rank * pixels);
            load_im2col(maps[at.second], at.second ? x2 : x, at.c, from.w, from.h, from.n, at.s * s.dilation_w,
                        at.r * s.dilation_h, a.data() + rank * pixels * block);
          }
          for (int rank = 0; rank < cluster_m; ++rank)
            load_tiled(weights[at.second], at.second ? weight2 : weight, at.c, at.r * reduction.columns + at.s,
                       column + rank * rows, b.data() + rank * rows * block);
          for (int i = 0; i < tile_m; ++i)
            for (int j = 0; j < tile_n; ++j)
              for (int k = 0; k < block; ++k) sum[i * tile_n + j] += double(a[i * block + k]) * b[j * block + k];
        }
      }
      for (int i = 0; i < tile_m && row + i < s.m(); ++i)
        for (int j = 0; j < tile_n && column + j < s.k; ++j) y[(row + i) * s.k + column + j] = sum[i * tile_n + j];
    }
  return steps;
}

const char* tma_refuses_shape(const int* v) {
  return tma_refuses(
      {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15], v[16]});
}
}
