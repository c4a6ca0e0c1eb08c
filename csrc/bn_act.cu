// Launchers of bn_stats, bn_act, bn_act_bwd, bn_relu_bwd, bn_act_bwd_input, relu_bwd_sum, bn_act_pool and
// bn_act_pool_bwd: check, guard the device, allocate, launch, check the launch.

#include "bn_act.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "kernels/bn_act.cuh"
#include "kernels/bn_act_pool.cuh"
#include "launch.h"

namespace fused_resnet {
namespace {

// Blocks of 256 threads a multiprocessor; three or four are resident at once. A reduction pays for every block with a
// partial result, and one wave of three blocks, with two to six loads of 16 bytes in flight a thread, is enough to hide
// the memory's latency. Twelve are whole waves of three and of four.
constexpr int kReductionBlocks = 3;
constexpr int kStreamBlocks = 12;
// Rows of a thread, at least: what it loads and computes for its channels, and its share of a partial result, has to be
// earned back. A multiple of the rows that a kernel has in flight, so that only the last block reads a row again.
constexpr int kLeastRows = 4;

struct Geometry {
  int64_t rows;
  int channels;
  int vector;              // elements a load
  int64_t rows_per_block;  // a multiple of block.y and of the rows of a thread, at least
  dim3 grid, block;

  int splits() const { return static_cast<int>(grid.y); }
  dim3 final_grid() const { return dim3((channels + kFinalLanes - 1) / kFinalLanes); }
  static dim3 final_block() { return dim3(kFinalLanes, kThreads / kFinalLanes); }
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The geometry for `rows` of maps like x, a thread having so many at least; `pointers` are those of maps and
// parameters, which are read or written 16 bytes at a time if all of them can be.
Geometry geometry_of(const char* op, const Tensor& x, int64_t rows, int least_rows,
                     std::initializer_list<const void*> pointers, int blocks) {
  Geometry g;
  const int64_t channels = x.size(1);
  check(channels <= std::numeric_limits<int>::max() / 2, op, ": too many channels, got ", channels);
  g.rows = rows;
  g.channels = static_cast<int>(channels);
  const int wide = static_cast<int>(16 / x.element_size());
  const bool aligned = std::all_of(pointers.begin(), pointers.end(),
                                   [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
  g.vector = channels % wide == 0 && aligned ? wide : 1;

  const int64_t vectors = channels / g.vector;
  unsigned lanes = 1;
  while (lanes < vectors && lanes < kWarp) lanes *= 2;
  g.block = dim3(lanes, kThreads / lanes);
  const int64_t tiles = ceil_div(vectors, lanes);
  // gridDim.y ends at 65535; a device has far fewer multiprocessors than that.
  const int64_t splits = std::clamp<int64_t>(blocks / tiles, 1, 32768);
  const int64_t least = int64_t{least_rows} * g.block.y;
  g.rows_per_block = ceil_div(ceil_div(g.rows, splits), least) * least;
  g.grid = dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(ceil_div(g.rows, g.rows_per_block)));
  return g;
}

// Of all rows of x.
Geometry geometry_of(const char* op, const Tensor& x, std::initializer_list<const void*> pointers, int blocks) {
  return geometry_of(op, x, x.numel() / x.size(1), kLeastRows, pointers, blocks);
}

template <bool B>
using Bool = std::bool_constant<B>;

// Calls f with the element type and the vector width, both as types.
template <typename F>
void with_type(const char* op, const Tensor& x, const Geometry& geometry, const F& f) {
  with_dtype(op, x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (geometry.vector == 1) return f(element, std::integral_constant<int, 1>{});
    f(element, std::integral_constant<int, 16 / sizeof(T)>{});
  });
}

template <typename F>
void with_bool(bool value, const F& f) {
  value ? f(Bool<true>{}) : f(Bool<false>{});
}

template <Mask M>
using MaskOf = std::integral_constant<Mask, M>;

template <typename F>
void with_mask(bool of_y, bool of_x, const F& f) {
  of_x ? f(MaskOf<kMaskOfX>{}) : of_y ? f(MaskOf<kMaskOfY>{}) : f(MaskOf<kNoMask>{});
}

const void* address(const Tensor& t) { return t.const_data_ptr(); }
const void* address(const std::optional<Tensor>& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }

void check_batch_norm(const char* op, const Tensor& x, const Tensor& mean, const Tensor& var,
                      const std::optional<Tensor>& weight, const std::optional<Tensor>& bias = std::nullopt) {
  check_channels(op, "mean", mean, x);
  check_channels(op, "var", var, x);
  if (weight.has_value()) check_channels(op, "weight", *weight, x);
  if (bias.has_value()) check_channels(op, "bias", *bias, x);
}

// First and second stage of the backward's sums; x, mean and var are absent in relu_bwd_sum.
struct BwdSums {
  Tensor sum_g, dweight;
};

// The second stage: what the first one's blocks left in `partial`.
void finish(const char* op, const Device& device, const Geometry& geometry, const Tensor& partial,
            const std::optional<Tensor>& var, double eps, const BwdSums& sums) {
  with_bool(var.has_value(), [&](auto center) {
    launch(op, device, geometry.final_grid(), Geometry::final_block(), bn_bwd_final_kernel<decltype(center)::value>,
           data<float>(partial), data<float>(var), static_cast<float>(eps), mutable_data<float>(sums.sum_g),
           mutable_data<float>(sums.dweight), geometry.splits(), geometry.channels);
  });
}

// What a mask is made of where it comes from x.
struct Affine {
  std::optional<Tensor> weight, bias;
};

BwdSums bwd_sums(const char* op, const Device& device, const Tensor& grad, const std::optional<Tensor>& y,
                 const std::optional<Tensor>& x, const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                 double eps, const Tensor& g, const std::optional<Affine>& affine = std::nullopt) {
  const Affine of_x = affine.value_or(Affine{});
  const Geometry geometry = geometry_of(op, grad,
                                        {address(grad), address(y), address(x), address(g), address(mean),
                                         address(var), address(of_x.weight), address(of_x.bias)},
                                        kReductionBlocks * device.multiprocessors);
  const int words = x.has_value() ? 2 : 1;
  const Tensor partial = new_floats(grad, words * geometry.splits() * static_cast<int64_t>(geometry.channels));
  BwdSums sums{new_floats(grad, geometry.channels), new_floats(grad, x.has_value() ? geometry.channels : 0)};
  with_type(op, grad, geometry, [&](auto element, auto vector) {
    using T = decltype(element);
    constexpr int V = decltype(vector)::value;
    const auto first = [&](auto mask, auto center) {
      launch(op, device, geometry.grid, geometry.block,
             bn_bwd_partial_kernel<T, V, decltype(mask)::value, decltype(center)::value>, data<T>(grad), data<T>(y),
             data<T>(x), data<float>(mean), data<float>(var), data<float>(of_x.weight), data<float>(of_x.bias),
             static_cast<float>(eps), g.numel() ? mutable_data<T>(g) : nullptr, mutable_data<float>(partial),
             geometry.rows, geometry.channels, geometry.rows_per_block);
    };
    if (!x.has_value()) return first(MaskOf<kMaskOfY>{}, Bool<false>{});
    with_mask(y.has_value(), affine.has_value(), [&](auto mask) { first(mask, Bool<true>{}); });
  });
  finish(op, device, geometry, partial, var, eps, sums);
  return sums;
}

// dx from grad and x, as bn_bwd_input_kernel tells; with batch, sum_g and dweight are sums over 1 / share rows.
Tensor bwd_input(const char* op, const Device& device, const Tensor& grad, const std::optional<Tensor>& y,
                 const Tensor& x, const Tensor& mean, const std::optional<Tensor>& var,
                 const std::optional<Tensor>& weight, const Tensor& sum_g, const Tensor& dweight, float share,
                 double eps, bool batch, const std::optional<Affine>& affine = std::nullopt) {
  const Tensor dx = torch::stable::empty_like(x);
  const std::optional<Tensor> bias = affine.has_value() ? affine->bias : std::nullopt;
  const Geometry geometry = geometry_of(op, x,
                                        {address(grad), address(y), address(x), address(dx), address(mean),
                                         address(var), address(weight), address(bias), address(sum_g),
                                         address(dweight)},
                                        kStreamBlocks * device.multiprocessors);
  with_type(op, x, geometry, [&](auto element, auto vector) {
    using T = decltype(element);
    const auto run = [&](auto mask, auto of_batch) {
      launch(op, device, geometry.grid, geometry.block,
             bn_bwd_input_kernel<T, decltype(vector)::value, decltype(mask)::value, decltype(of_batch)::value>,
             data<T>(grad), data<T>(y), data<T>(x), data<float>(mean), data<float>(var), data<float>(weight),
             data<float>(bias), data<float>(sum_g), data<float>(dweight), share, static_cast<float>(eps),
             mutable_data<T>(dx), geometry.rows, geometry.channels, geometry.rows_per_block);
    };
    if (affine.has_value()) return run(MaskOf<kMaskOfX>{}, Bool<true>{});
    with_mask(y.has_value(), false, [&](auto mask) { with_bool(batch, [&](auto of_batch) { run(mask, of_batch); }); });
  });
  return dx;
}

// Windows of a walk, at most. With fewer, more lines are read twice; with more, small batches leave a GPU idle.
constexpr int kLongestWalk = 8;
constexpr int kShortestWalk = 2;

PoolMaps pool_maps(const char* op, const Tensor& x) {
  PoolMaps maps;
  check(std::max(x.size(2), x.size(3)) <= std::numeric_limits<int>::max() / 2, op, ": too large maps, got ", x.size(2),
        " x ", x.size(3));
  maps.height = static_cast<int>(x.size(2));
  maps.width = static_cast<int>(x.size(3));
  maps.p = (maps.height + 1) / 2;
  maps.q = (maps.width + 1) / 2;
  return maps;
}

// Walks short enough that each multiprocessor has two waves of blocks, 32 walks of 8 vectors each or alike.
void divide(PoolMaps& maps, const Tensor& x, const Device& device) {
  const int64_t vectors = ceil_div(x.size(1) * x.element_size(), 16);
  const int64_t wanted = int64_t{2} * kPoolBlocks * device.multiprocessors * kThreads;
  maps.steps = kLongestWalk;
  while (maps.steps > kShortestWalk && x.size(0) * maps.q * vectors * ceil_div(maps.p, maps.steps) < wanted)
    maps.steps /= 2;
  maps.segments = static_cast<int>(ceil_div(maps.p, maps.steps));
}

// [N, C, P, Q], channels_last.
Tensor new_windows(const Tensor& x, const PoolMaps& maps, ScalarType dtype) {
  const Tensor rows = torch::stable::new_empty(x, {x.size(0), maps.p, maps.q, x.size(1)}, dtype);
  return torch::stable::transpose(torch::stable::transpose(rows, 2, 3), 1, 2);
}

// Rows are walks: see kernels/bn_act_pool.cuh.
Geometry pool_geometry(const char* op, const Tensor& x, const PoolMaps& maps,
                       std::initializer_list<const void*> pointers, int blocks) {
  const int64_t walks = x.size(0) * maps.segments * maps.q;
  check(walks <= std::numeric_limits<int>::max(), op, ": too many windows, in maps of ", x.size(2), " x ", x.size(3));
  return geometry_of(op, x, walks, 1, pointers, blocks);
}

// A map of x's windows: y, grad or winner.
void check_windows(const char* op, const char* name, const Tensor& t, const Tensor& x, const PoolMaps& maps,
                   ScalarType dtype) {
  check_map(op, name, t);
  check(t.size(0) == x.size(0) && t.size(1) == x.size(1) && t.size(2) == maps.p && t.size(3) == maps.q, op, ": ", name,
        " must be [", x.size(0), ", ", x.size(1), ", ", maps.p, ", ", maps.q, "]");
  check(t.scalar_type() == dtype, op, ": ", name, " must be ", torch::headeronly::toString(dtype));
  check(same_device(t, x), op, ": ", name, " must be on the device of x");
}

}  // namespace

std::tuple<Tensor, Tensor> bn_stats(const Tensor& x) {
  const char* op = "bn_stats";
  check_map(op, "x", x);
  const Device device(x);
  const Geometry geometry = geometry_of(op, x, {address(x)}, kReductionBlocks * device.multiprocessors);
  const Tensor partial = new_floats(x, int64_t{2} * geometry.splits() * geometry.channels);
  const Tensor mean = new_floats(x, geometry.channels);
  const Tensor var = new_floats(x, geometry.channels);
  with_type(op, x, geometry, [&](auto element, auto vector) {
    using T = decltype(element);
    launch(op, device, geometry.grid, geometry.block, bn_stats_partial_kernel<T, decltype(vector)::value>, data<T>(x),
           mutable_data<float>(partial), geometry.rows, geometry.channels, geometry.rows_per_block);
  });
  launch(op, device, geometry.final_grid(), Geometry::final_block(), bn_stats_final_kernel, data<float>(partial),
         mutable_data<float>(mean), mutable_data<float>(var), geometry.splits(), geometry.rows, geometry.channels,
         geometry.rows_per_block);
  return {mean, var};
}

Tensor bn_act(const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
              const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& residual, bool relu) {
  const char* op = "bn_act";
  check_map(op, "x", x);
  check_batch_norm(op, x, mean, var, weight, bias);
  if (residual.has_value()) check_map_like(op, "residual", *residual, x);
  const Device device(x);
  const Tensor y = torch::stable::empty_like(x);
  const Geometry geometry = geometry_of(op, x,
                                        {address(x), address(residual), address(y), address(mean), address(var),
                                         address(weight), address(bias)},
                                        kStreamBlocks * device.multiprocessors);
  with_type(op, x, geometry, [&](auto element, auto vector) {
    using T = decltype(element);
    with_bool(residual.has_value(), [&](auto add) {
      launch(op, device, geometry.grid, geometry.block, bn_act_kernel<T, decltype(vector)::value, decltype(add)::value>,
             data<T>(x), data<float>(mean), data<float>(var), data<float>(weight), data<float>(bias),
             static_cast<float>(eps), data<T>(residual), relu, mutable_data<T>(y), geometry.rows, geometry.channels,
             geometry.rows_per_block);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_bwd(const Tensor& grad, const std::optional<Tensor>& y,
                                                      const Tensor& x, const Tensor& mean, const Tensor& var,
                                                      const std::optional<Tensor>& weight, double eps, bool batch_stats,
                                                      bool need_x, bool need_sums, bool need_g) {
  const char* op = "bn_act_bwd";
  check_map(op, "x", x);
  check_map_like(op, "grad", grad, x);
  if (y.has_value()) check_map_like(op, "y", *y, x);
  check_batch_norm(op, x, mean, var, weight);
  const Device device(x);
  const Tensor nothing = new_floats(x, 0);
  Tensor dx = nothing, g = nothing;
  BwdSums sums{nothing, nothing};
  if (need_g) g = torch::stable::empty_like(x);
  if (need_sums || need_g || (need_x && batch_stats)) sums = bwd_sums(op, device, grad, y, x, mean, var, eps, g);
  if (need_x) {
    // g, once it is stored, stands for grad and y: one read less.
    const float share = 1.0f / static_cast<float>(x.numel() / x.size(1));
    dx = bwd_input(op, device, need_g ? g : grad, need_g ? std::nullopt : y, x, mean, var, weight, sums.sum_g,
                   sums.dweight, share, eps, batch_stats);
  }
  return {dx, sums.dweight, sums.sum_g, g};
}

std::tuple<Tensor, Tensor, Tensor> bn_relu_bwd(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                               const Tensor& var, const std::optional<Tensor>& weight,
                                               const std::optional<Tensor>& bias, double eps, bool need_x) {
  const char* op = "bn_relu_bwd";
  check_map(op, "x", x);
  check_map_like(op, "grad", grad, x);
  check_batch_norm(op, x, mean, var, weight, bias);
  const Device device(x);
  const Affine affine{weight, bias};
  Tensor dx = new_floats(x, 0);
  const BwdSums sums = bwd_sums(op, device, grad, std::nullopt, x, mean, var, eps, dx, affine);
  if (need_x) {
    const float share = 1.0f / static_cast<float>(x.numel() / x.size(1));
    dx = bwd_input(op, device, grad, std::nullopt, x, mean, var, weight, sums.sum_g, sums.dweight, share, eps, true,
                   affine);
  }
  return {dx, sums.dweight, sums.sum_g};
}

Tensor bn_act_bwd_input(const Tensor& grad, const std::optional<Tensor>& y, const Tensor& x, const Tensor& mean,
                        const Tensor& scale, const Tensor& mean_g, const Tensor& slope) {
  const char* op = "bn_act_bwd_input";
  check_map(op, "x", x);
  check_map_like(op, "grad", grad, x);
  if (y.has_value()) check_map_like(op, "y", *y, x);
  check_channels(op, "mean", mean, x);
  check_channels(op, "scale", scale, x);
  check_channels(op, "mean_g", mean_g, x);
  check_channels(op, "slope", slope, x);
  return bwd_input(op, Device(x), grad, y, x, mean, std::nullopt, scale, mean_g, slope, 1.0f, 0.0, true);
}

std::tuple<Tensor, Tensor> relu_bwd_sum(const Tensor& grad, const Tensor& y) {
  const char* op = "relu_bwd_sum";
  check_map(op, "grad", grad);
  check_map_like(op, "y", y, grad);
  const Device device(grad);
  const Tensor g = torch::stable::empty_like(grad);
  const BwdSums sums = bwd_sums(op, device, grad, y, std::nullopt, std::nullopt, std::nullopt, 0.0, g);
  return {g, sums.sum_g};
}

std::tuple<Tensor, Tensor> bn_act_pool(const Tensor& x, const Tensor& mean, const Tensor& var,
                                       const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                       double eps) {
  const char* op = "bn_act_pool";
  check_map(op, "x", x);
  check_batch_norm(op, x, mean, var, weight, bias);
  const Device device(x);
  PoolMaps maps = pool_maps(op, x);
  divide(maps, x, device);
  const Tensor y = new_windows(x, maps, x.scalar_type()), winner = new_windows(x, maps, ScalarType::Byte);
  const Geometry geometry = pool_geometry(op, x, maps,
                                          {address(x), address(y), address(winner), address(mean), address(var),
                                           address(weight), address(bias)},
                                          kStreamBlocks * device.multiprocessors);
  with_type(op, x, geometry, [&](auto element, auto vector) {
    using T = decltype(element);
    launch(op, device, geometry.grid, geometry.block, bn_act_pool_kernel<T, decltype(vector)::value>, data<T>(x),
           data<float>(mean), data<float>(var), data<float>(weight), data<float>(bias), static_cast<float>(eps),
           mutable_data<T>(y), mutable_data<uint8_t>(winner), maps, geometry.rows, geometry.channels,
           geometry.rows_per_block);
  });
  return {y, winner};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_pool_bwd(const Tensor& grad, const Tensor& x, const Tensor& winner,
                                                   const Tensor& mean, const Tensor& var,
                                                   const std::optional<Tensor>& weight, double eps, bool need_x) {
  const char* op = "bn_act_pool_bwd";
  check_map(op, "x", x);
  PoolMaps maps = pool_maps(op, x);
  check_windows(op, "grad", grad, x, maps, x.scalar_type());
  check_windows(op, "winner", winner, x, maps, ScalarType::Byte);
  check_batch_norm(op, x, mean, var, weight);
  const Device device(x);
  divide(maps, x, device);
  const Geometry geometry =
      pool_geometry(op, x, maps, {address(grad), address(x), address(winner), address(mean)},
                    kPoolBlocks * device.multiprocessors);
  const Tensor partial = new_floats(x, int64_t{2} * geometry.splits() * geometry.channels);
  const BwdSums sums{new_floats(x, geometry.channels), new_floats(x, geometry.channels)};
  with_type(op, x, geometry, [&](auto element, auto vector) {
    using T = decltype(element);
    launch(op, device, geometry.grid, geometry.block, bn_act_pool_bwd_partial_kernel<T, decltype(vector)::value>,
           data<T>(grad), data<uint8_t>(winner), data<T>(x), data<float>(mean), mutable_data<float>(partial), maps,
           geometry.rows, geometry.channels, geometry.rows_per_block);
  });
  finish(op, device, geometry, partial, var, eps, sums);
  if (!need_x) return {new_floats(x, 0), sums.dweight, sums.sum_g};

  const Tensor dx = torch::stable::empty_like(x);
  const float share = 1.0f / static_cast<float>(x.numel() / x.size(1));
  const Geometry of_input = pool_geometry(op, x, maps,
                                          {address(grad), address(x), address(winner), address(dx), address(mean),
                                           address(var), address(weight), address(sums.sum_g), address(sums.dweight)},
                                          kStreamBlocks * device.multiprocessors);
  with_type(op, x, of_input, [&](auto element, auto vector) {
    using T = decltype(element);
    launch(op, device, of_input.grid, of_input.block, bn_act_pool_bwd_input_kernel<T, decltype(vector)::value>,
           data<T>(grad), data<uint8_t>(winner), data<T>(x), data<float>(mean), data<float>(var), data<float>(weight),
           data<float>(sums.sum_g), data<float>(sums.dweight), share, static_cast<float>(eps), mutable_data<T>(dx),
           maps, of_input.rows, of_input.channels, of_input.rows_per_block);
  });
  return {dx, sums.dweight, sums.sum_g};
}

}  // namespace fused_resnet
