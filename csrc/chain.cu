// Launcher of chain: check, guard the device, launch, check the launch.

#include "chain.h"

#include <sstream>

#include "conv/chain_instance.h"
#include "conv_checks.h"
#include "conv_instances.h"  // FUSED_RESNET_CHAINS, from setup.py

namespace fused_resnet {
namespace conv {
#define FUSED_RESNET_DECLARE(symbol) extern const ChainInstance symbol;
FUSED_RESNET_CHAINS(FUSED_RESNET_DECLARE)
}  // namespace conv

namespace {

using conv::ChainInstance;

const std::vector<const ChainInstance*>& chains() {
#define FUSED_RESNET_LIST(symbol) &conv::symbol,
  static const std::vector<const ChainInstance*> all = {FUSED_RESNET_CHAINS(FUSED_RESNET_LIST)};
  return all;
}

}  // namespace

Tensor chain_instances() {
  std::ostringstream json;
  json << "[";
  const char* separator = "";
  for (const ChainInstance* i : chains()) {
    json << separator << "{\"name\": \"" << i->name << "\", \"dtype\": \""
         << name_of(i->dtype) << "\", \"middle\": " << i->middle << ", \"following\": " << i->following
         << ", \"segment\": " << (i->segment ? "true" : "false")
         << ", \"by_lines\": " << (i->by_lines ? "true" : "false") << ", \"stages\": [" << i->stages_x << ", "
         << i->stages_y << "], \"threads\": " << i->threads << ", \"shared_bytes\": " << i->shared_bytes << "}";
    separator = ", ";
  }
  json << "]";
  return bytes_of(json.str());
}

void chain_out(int64_t instance, const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
               const Tensor& bias2, const std::optional<Tensor>& residual, const std::optional<Tensor>& x2,
               const std::optional<Tensor>& projection, int64_t stride2, const std::optional<Tensor>& weight3,
               const std::optional<Tensor>& bias3, bool relu, bool quarter, Tensor& y, std::optional<Tensor> z,
               bool constant_weights) {
  const char* op = "chain";
  const ChainInstance& found = instance_of(op, chains(), instance);
  check_dtype_of(op, found, x);
  const int64_t c = found.middle, k = 4 * c;
  check(x.dim() == 4 && x.size(1) == c, op, ": x must be [N, ", c, ", H, W]");
  const int64_t n = x.size(0), h = x.size(2), w = x.size(3);
  check_sized_map(op, "x", x, {n, c, h, w}, x);
  check_sized_map(op, "weight1", weight1, {c, c, 3, 3}, x);
  check_sized_map(op, "weight2", weight2, {k, c, 1, 1}, x);
  conv::Chain chain = {};
  conv::Shape& s = chain.shape;
  s = {size_of(op, "N", n, 1),
       size_of(op, "H", h, 1),
       size_of(op, "W", w, 1),
       found.middle,
       found.middle,
       3,
       3,
       1,
       1,
       1,
       1,
       1,
       1,
       0,
       0,
       0,
       1};

  check(x2.has_value() == found.segment && projection.has_value() == found.segment, op, ": ", found.name,
        found.segment ? " needs x2 and projection" : " takes no x2 or projection");
  check(!found.segment || !residual.has_value(), op, ": ", found.name, " takes no residual");
  check(!quarter || found.middle == 64, op, ": ", found.name, " stores all of y");
  if (found.segment) {
    check(x2->dim() == 4, op, ": x2 must be [N, 64, H2, W2]");
    check_sized_map(op, "x2", *x2, {n, 64, x2->size(2), x2->size(3)}, x);
    check_sized_map(op, "projection", *projection, {k, 64, 1, 1}, x);
    s.c2 = 64;
    s.h2 = size_of(op, "H2", x2->size(2), 1);
    s.w2 = size_of(op, "W2", x2->size(3), 1);
    s.stride2 = size_of(op, "stride2", stride2, 1);
    check(s.stride2 <= 8, op, ": stride2 must be at most 8, got ", s.stride2);
  }
  check_positions(op, s);
  if (residual.has_value()) check_sized_map(op, "residual", *residual, {n, k, h, w}, x);

  const bool following = found.following > 0;
  check(weight3.has_value() == following && bias3.has_value() == following && z.has_value() == following, op, ": ",
        found.name, following ? " needs weight3, bias3 and z" : " takes no weight3, bias3 or z");
  if (following) {
    check_sized_map(op, "weight3", *weight3, {found.following, k, 1, 1}, x);
    check_sized_map(op, "z", *z, {n, found.following, h, w}, x);
  }
  check_sized_map(op, "y", y, {n, k, quarter ? (h + 1) / 2 : h, quarter ? (w + 1) / 2 : w}, x);
  check_vector(op, "bias1", bias1, x, true);
  check_vector(op, "bias2", bias2, y, true);
  if (following) check_vector(op, "bias3", bias3, *z, true);

  const std::pair<const char*, std::optional<Tensor>> read[] = {
      {"x", x},   {"weight1", weight1},       {"bias1", bias1},     {"weight2", weight2}, {"bias2", bias2},
      {"x2", x2}, {"projection", projection}, {"weight3", weight3}, {"bias3", bias3}};
  for (const auto& [name, t] : read) {
    check_apart(op, "y", y, name, t);
    if (z.has_value()) check_apart(op, "z", *z, name, t);
  }
  check_apart(op, "y", y, "z", z);
  if (z.has_value()) check_apart(op, "z", *z, "residual", residual);
  const bool in_place = residual.has_value() && residual->const_data_ptr() == y.const_data_ptr() && !quarter;
  if (!in_place) check_apart(op, "y", y, "residual, if it is not that, whole", residual);

  chain.x = x.const_data_ptr();
  chain.weight1 = weight1.const_data_ptr();
  chain.weight2 = weight2.const_data_ptr();
  chain.residual = residual.has_value() ? residual->const_data_ptr() : nullptr;
  chain.x2 = x2.has_value() ? x2->const_data_ptr() : nullptr;
  chain.projection = projection.has_value() ? projection->const_data_ptr() : nullptr;
  chain.weight3 = weight3.has_value() ? weight3->const_data_ptr() : nullptr;
  chain.bias1 = data<float>(bias1);
  chain.bias2 = data<float>(bias2);
  chain.bias3 = data<float>(bias3);
  chain.y = y.mutable_data_ptr();
  chain.z = z.has_value() ? z->mutable_data_ptr() : nullptr;
  chain.relu = relu;
  chain.quarter = quarter;
  chain.constant_weights = constant_weights;
  const Device device(x);
  check_arch(op, found.name, 90, device);
  check_launch(op, found.name, found.run(chain, device.multiprocessors, device.stream));
}

}  // namespace fused_resnet
