// Launcher of chain: check, guard the device, launch, check the launch.

#include "chain.h"

#include <sstream>
#include <string>

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

void check_weight(const char* op, const char* name, const Tensor& weight, int64_t k, int64_t c, int64_t taps,
                  const Tensor& x) {
  check(weight.dim() == 4 && weight.size(0) == k && weight.size(1) == c && weight.size(2) == taps &&
            weight.size(3) == taps,
        op, ": ", name, " must be [", k, ", ", c, ", ", taps, ", ", taps, "]");
  check_map(op, name, weight);
  check_dtype(op, name, weight, x);
  check_aligned(op, name, weight.const_data_ptr());
}

void check_bias(const char* op, const char* name, const Tensor& bias, int64_t k, const Tensor& x) {
  check(bias.dim() == 1 && bias.size(0) == k, op, ": ", name, " must be [", k, "]");
  check(bias.scalar_type() == ScalarType::Float && bias.is_contiguous() && same_device(bias, x), op, ": ", name,
        " must be float32, contiguous, on the device of x");
  check_aligned(op, name, bias.const_data_ptr());
}

}  // namespace

Tensor chain_instances() {
  std::ostringstream json;
  json << "[";
  const char* separator = "";
  for (const ChainInstance* i : chains()) {
    json << separator << "{\"name\": \"" << i->name << "\", \"dtype\": \""
         << (i->dtype == conv::Dtype::half ? "float16" : "bfloat16") << "\", \"following\": " << i->following
         << ", \"segment\": " << (i->segment ? "true" : "false") << ", \"stages\": [" << i->stages_x << ", "
         << i->stages_y << "], \"threads\": " << i->threads << ", \"shared_bytes\": " << i->shared_bytes << "}";
    separator = ", ";
  }
  json << "]";
  const std::string text = json.str();
  Tensor bytes = new_on_cpu(static_cast<int64_t>(text.size()), ScalarType::Byte);
  text.copy(static_cast<char*>(bytes.mutable_data_ptr()), text.size());
  return bytes;
}

void chain_out(int64_t instance, const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
               const Tensor& bias2, const std::optional<Tensor>& residual, const std::optional<Tensor>& x2,
               const std::optional<Tensor>& projection, int64_t stride2, const std::optional<Tensor>& weight3,
               const std::optional<Tensor>& bias3, bool relu, bool quarter, Tensor& y, std::optional<Tensor> z) {
  const char* op = "chain";
  const int64_t count = static_cast<int64_t>(chains().size());
  check(instance >= 0 && instance < count, op, ": instance must be below ", count, ", got ", instance);
  const ChainInstance& found = *chains()[instance];
  const ScalarType dtype = found.dtype == conv::Dtype::half ? ScalarType::Half : ScalarType::BFloat16;
  check(x.scalar_type() == dtype, op, ": ", found.name, " needs x in ", torch::headeronly::toString(dtype), ", got ",
        torch::headeronly::toString(x.scalar_type()));
  check(x.dim() == 4 && x.size(1) == 64, op, ": x must be [N, 64, H, W]");
  const int64_t n = x.size(0), h = x.size(2), w = x.size(3);
  check_sized_map(op, "x", x, {n, 64, h, w}, x);
  check_weight(op, "weight1", weight1, 64, 64, 3, x);
  check_weight(op, "weight2", weight2, 256, 64, 1, x);
  check_bias(op, "bias1", bias1, 64, x);
  check_bias(op, "bias2", bias2, 256, x);
  conv::Chain chain = {};
  conv::Shape& s = chain.shape;
  s = {size_of(op, "N", n, 1),
       size_of(op, "H", h, 1),
       size_of(op, "W", w, 1),
       64,
       64,
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
  constexpr int64_t most = std::numeric_limits<int32_t>::max() - 512;
  check(s.m() <= most, op, ": needs at most ", most, " output positions, got ", s.m());

  check(x2.has_value() == found.segment && projection.has_value() == found.segment, op, ": ", found.name,
        found.segment ? " needs x2 and projection" : " takes no x2 or projection");
  check(!found.segment || !residual.has_value(), op, ": ", found.name, " takes no residual");
  if (found.segment) {
    check(x2->dim() == 4, op, ": x2 must be [N, 64, H2, W2]");
    check_sized_map(op, "x2", *x2, {n, 64, x2->size(2), x2->size(3)}, x);
    check_weight(op, "projection", *projection, 256, 64, 1, x);
    s.c2 = 64;
    s.h2 = size_of(op, "H2", x2->size(2), 1);
    s.w2 = size_of(op, "W2", x2->size(3), 1);
    s.stride2 = size_of(op, "stride2", stride2, 1);
    check(s.stride2 <= 8, op, ": stride2 must be at most 8, got ", s.stride2);
    const int p = conv::Shape::outputs(s.h2, 1, s.stride2, 0, 1), q = conv::Shape::outputs(s.w2, 1, s.stride2, 0, 1);
    check(p == h && q == w, op, ": x2 must have ", h, "x", w, " positions, got ", p, "x", q);
  }
  if (residual.has_value()) check_sized_map(op, "residual", *residual, {n, 256, h, w}, x);

  const bool following = found.following > 0;
  check(weight3.has_value() == following && bias3.has_value() == following && z.has_value() == following, op, ": ",
        found.name, following ? " needs weight3, bias3 and z" : " takes no weight3, bias3 or z");
  if (following) {
    check_weight(op, "weight3", *weight3, found.following, 256, 1, x);
    check_bias(op, "bias3", *bias3, found.following, x);
    check_sized_map(op, "z", *z, {n, found.following, h, w}, x);
  }
  check_sized_map(op, "y", y, {n, 256, quarter ? (h + 1) / 2 : h, quarter ? (w + 1) / 2 : w}, x);

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
  const Device device(x);
  check_arch(op, found.name, 90, device);
  check_launch(op, found.name, found.run(chain, device.multiprocessors, device.stream));
}

}  // namespace fused_resnet
