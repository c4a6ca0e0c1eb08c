// Launchers of conv_bias_act and conv_bn_act: check, guard the device, allocate, launch, check the launch.

#include "conv_bn_act.h"

#include <array>
#include <sstream>
#include <string>

#include "conv/instance.h"
#include "conv_checks.h"
#include "conv_instances.h"  // FUSED_RESNET_INSTANCES, from setup.py: a macro of a macro, over what was compiled
#include "kernels/conv_bn_act.cuh"

namespace fused_resnet {
namespace conv {
#define FUSED_RESNET_DECLARE(symbol) extern const Instance symbol;
FUSED_RESNET_INSTANCES(FUSED_RESNET_DECLARE)
}  // namespace conv

namespace {

using conv::Instance;
using conv::Shape;

const std::vector<const Instance*>& instances() {
#define FUSED_RESNET_LIST(symbol) &conv::symbol,
  static const std::vector<const Instance*> all = {FUSED_RESNET_INSTANCES(FUSED_RESNET_LIST)};
  return all;
}

// Raises the reason if the instance cannot run the shape.
void check_shape(const char* op, const Instance& instance, const Shape& s) {
  const std::pair<const char*, int> channels[] = {{"C", s.c}, {"K", s.k}, {"C2", s.c2}};
  for (const auto& [name, count] : channels)
    check(count % 8 == 0, op, ": needs channels that are a multiple of 8, got ", name, " = ", count);
  check(s.p() > 0 && s.q() > 0, op, ": needs a non-empty output, got ", s.p(), "x", s.q());
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  check_positions(op, s);
  check(int64_t{s.r} * s.s * s.c <= most / s.k, op, ": needs a weight of at most ", most, " values");
  check((int64_t{s.r} * s.s * ((s.c + 63) / 64) + (s.c2 + 63) / 64) * 64 <= most, op, ": needs a shorter reduction");
  const char* reason = instance.refuses(s);
  check(reason == nullptr, op, ": ", instance.name, " cannot run ", reason ? reason : "");
}

struct Call {
  const char* op;
  const Instance& instance;
  conv::Problem problem = {};

  Call(const char* op, int64_t index) : op(op), instance(instance_of(op, instances(), index)) {}

  // Everything but the vectors and y.
  void input(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
             const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
    check_dtype_of(op, instance, x);
    check_map(op, "x", x);
    check_aligned(op, "x", x.const_data_ptr());
    check_filter(op, "weight", weight, x);
    const Pair s = pair_of(op, "stride", stride, 1), p = pair_of(op, "padding", padding, 0);
    const Pair d = pair_of(op, "dilation", dilation, 1);
    const auto size = [&](const Tensor& t, int i) { return size_of(op, "a size", t.size(i), 1); };
    problem.shape = {size(x, 0),
                     size(x, 2),
                     size(x, 3),
                     size(x, 1),
                     size(weight, 0),
                     size(weight, 2),
                     size(weight, 3),
                     s.h,
                     s.w,
                     p.h,
                     p.w,
                     d.h,
                     d.w,
                     0,
                     0,
                     0,
                     1};
    problem.x = x.const_data_ptr();
    problem.weight = weight.const_data_ptr();
  }

  void second(const std::optional<Tensor>& x2, const std::optional<Tensor>& weight2, int64_t stride2, const Tensor& x) {
    check(x2.has_value() == weight2.has_value(), op, ": x2 and weight2 go together");
    if (!x2.has_value()) return;
    check_map(op, "x2", *x2);
    check_dtype(op, "x2", *x2, x);
    check_aligned(op, "x2", x2->const_data_ptr());
    check_filter(op, "weight2", *weight2, *x2);
    Shape& s = problem.shape;
    check(x2->size(0) == s.n, op, ": x2 must have the images of x, ", s.n, ", got ", x2->size(0));
    check(weight2->size(0) == s.k && weight2->size(2) == 1 && weight2->size(3) == 1, op, ": weight2 must be [", s.k,
          ", C2, 1, 1]");
    s.c2 = size_of(op, "a size", x2->size(1), 1);
    s.h2 = size_of(op, "a size", x2->size(2), 1);
    s.w2 = size_of(op, "a size", x2->size(3), 1);
    s.stride2 = size_of(op, "stride2", stride2, 1);
    problem.x2 = x2->const_data_ptr();
    problem.weight2 = weight2->const_data_ptr();
  }

  std::array<int64_t, 4> sizes() const {
    const Shape& s = problem.shape;
    return {s.n, s.k, s.p(), s.q()};
  }

  // A new map [N, K, P, Q] in channels_last order.
  Tensor new_output(const Tensor& x) const {
    const auto [n, k, p, q] = sizes();
    return torch::stable::transpose(torch::stable::transpose(torch::stable::new_empty(x, {n, p, q, k}), 2, 3), 1, 2);
  }

  void output(const Tensor& y, const std::optional<Tensor>& residual, bool relu, const Tensor& x) {
    check_sized_map(op, "out", y, sizes(), x);
    if (residual.has_value()) check_sized_map(op, "residual", *residual, sizes(), x);
    problem.relu = relu;
    problem.y = y.mutable_data_ptr();
    problem.residual = residual.has_value() ? residual->const_data_ptr() : nullptr;
  }

  void run(const Device& device, void* workspace) const {
    check_arch(op, instance.name, instance.arch, device);
    check_launch(op, instance.name, instance.run(problem, device.multiprocessors, workspace, device.stream));
  }
};

std::optional<Tensor> new_workspace(const Call& call, const Device& device, const Tensor& x) {
  const size_t size = call.instance.workspace(call.problem.shape, device.multiprocessors);
  if (size == 0) return std::nullopt;
  return torch::stable::new_empty(x, {static_cast<int64_t>(size)}, ScalarType::Byte);
}

void* address(const std::optional<Tensor>& t) { return t.has_value() ? t->mutable_data_ptr() : nullptr; }

}  // namespace

Tensor conv_instances() {
  std::ostringstream json;
  const char* separator = "[";
  for (const Instance* i : instances()) {
    json << separator << "{\"name\": \"" << i->name << "\", \"arch\": " << i->arch << ", \"dtype\": \""
         << name_of(i->dtype) << "\", \"tile\": [" << i->tile_m << ", "
         << i->tile_n << ", " << i->tile_k << "], \"cluster\": [" << i->cluster_m << ", " << i->cluster_n
         << "], \"stages\": " << i->stages
         << ", \"threads\": " << i->threads << ", \"shared_bytes\": " << i->shared_bytes
         << ", \"splits\": " << (i->splits ? "true" : "false") << ", \"parts\": " << i->parts << "}";
    separator = ", ";
  }
  return bytes_of(instances().empty() ? "[]" : json.str() + "]");
}

Tensor conv_plan(int64_t instance, std::vector<int64_t> shape, int64_t multiprocessors) {
  const char* op = "conv_plan";
  check(shape.size() == 17, op, ": shape must be 17 numbers, got ", shape.size());
  const Instance& found = instance_of(op, instances(), instance);
  // What may be 0: padding, and all of the second segment but its stride.
  constexpr int64_t least[17] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 1};
  int v[17];
  for (int i = 0; i < 17; ++i) v[i] = size_of(op, "shape", shape[i], least[i]);
  const Shape s = {v[0], v[1],  v[2],  v[3],  v[4],  v[5],  v[6],  v[7], v[8],
                   v[9], v[10], v[11], v[12], v[13], v[14], v[15], v[16]};
  check_shape(op, found, s);
  Tensor bytes = new_on_cpu(1, ScalarType::Long);
  static_cast<int64_t*>(bytes.mutable_data_ptr())[0] =
      static_cast<int64_t>(found.workspace(s, size_of(op, "multiprocessors", multiprocessors, 1)));
  return bytes;
}

void conv_bias_act_out(int64_t instance, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& scale, const std::optional<Tensor>& residual,
                       const std::optional<Tensor>& x2, const std::optional<Tensor>& weight2, int64_t stride2,
                       std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                       bool relu, const std::optional<Tensor>& workspace, Tensor& out, bool constant_weights) {
  Call call("conv_bias_act", instance);
  call.input(x, weight, stride, padding, dilation);
  call.second(x2, weight2, stride2, x);
  check_shape(call.op, call.instance, call.problem.shape);
  call.output(out, residual, relu, x);
  check_vector(call.op, "bias", bias, out, true);
  check_vector(call.op, "scale", scale, out, true);
  call.problem.bias = data<float>(bias);
  call.problem.scale = data<float>(scale);
  call.problem.constant_weights = constant_weights;
  const std::pair<const char*, std::optional<Tensor>> read[] = {
      {"x", x},   {"weight", weight},   {"bias", bias},          {"scale", scale},
      {"x2", x2}, {"weight2", weight2}, {"workspace", workspace}};
  for (const auto& [name, t] : read) check_apart(call.op, "out", out, name, t);
  if (call.problem.residual != call.problem.y)
    check_apart(call.op, "out", out, "residual, if it is not that", residual);
  const Device device(x);
  const int64_t needed = static_cast<int64_t>(call.instance.workspace(call.problem.shape, device.multiprocessors));
  std::optional<Tensor> space = workspace;
  if (needed && !space.has_value()) space = new_workspace(call, device, x);
  if (needed) {
    const int64_t size = space->numel() * space->element_size();
    check(space->is_contiguous() && same_device(*space, x) && size >= needed, call.op, ": workspace must be ", needed,
          " bytes without gaps on the device of x, got ", size);
    check_aligned(call.op, "workspace", space->const_data_ptr());
  }
  call.run(device, address(space));
}

Tensor conv_bias_act(int64_t instance, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& scale, const std::optional<Tensor>& residual,
                     const std::optional<Tensor>& x2, const std::optional<Tensor>& weight2, int64_t stride2,
                     std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                     bool relu) {
  Call call("conv_bias_act", instance);
  call.input(x, weight, stride, padding, dilation);
  call.second(x2, weight2, stride2, x);
  check_shape(call.op, call.instance, call.problem.shape);
  Tensor y = call.new_output(x);
  conv_bias_act_out(instance, x, weight, bias, scale, residual, x2, weight2, stride2, stride, padding, dilation, relu,
                    std::nullopt, y, false);
  return y;
}

Tensor conv_bn_act(int64_t instance, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bn_weight,
                   const std::optional<Tensor>& bn_bias, const std::optional<Tensor>& mean,
                   const std::optional<Tensor>& var, double eps, const std::optional<Tensor>& residual,
                   std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                   bool relu) {
  Call call("conv_bn_act", instance);
  call.input(x, weight, stride, padding, dilation);
  check_shape(call.op, call.instance, call.problem.shape);
  const Tensor y = call.new_output(x);
  call.output(y, residual, relu, x);
  check(mean.has_value() == var.has_value(), call.op, ": mean and var go together");
  check(mean.has_value() || (!bn_weight.has_value() && !bn_bias.has_value()), call.op,
        ": bn_weight and bn_bias need mean and var");
  check_vector(call.op, "mean", mean, y, false);
  check_vector(call.op, "var", var, y, false);
  check_vector(call.op, "bn_weight", bn_weight, y, false);
  check_vector(call.op, "bn_bias", bn_bias, y, false);
  const Device device(x);
  std::optional<Tensor> scale_shift;
  if (mean.has_value()) {
    const int channels = call.problem.shape.k;
    scale_shift = new_floats(x, 2 * int64_t{channels});
    float* const scale = mutable_data<float>(*scale_shift);
    launch(call.op, device, dim3(conv::ceil_div(channels, 128)), dim3(128), bn_scale_shift_kernel, data<float>(mean),
           data<float>(var), data<float>(bn_weight), data<float>(bn_bias), static_cast<float>(eps), scale,
           scale + channels, channels);
    call.problem.scale = scale;
    call.problem.bias = scale + channels;
  }
  const std::optional<Tensor> workspace = new_workspace(call, device, x);
  call.run(device, address(workspace));
  return y;
}

}  // namespace fused_resnet
