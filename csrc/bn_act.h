#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fused_resnet {

using torch::stable::Tensor;

// Maps are [N, C, H, W], dense in channels_last order, in float32, float16 or bfloat16; vectors are [C] in float32.

// mean, biased variance
std::tuple<Tensor, Tensor> bn_stats(const Tensor& x);

// act((x - mean) / sqrt(var + eps) * weight + bias + residual)
Tensor bn_act(const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
              const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& residual, bool relu);

// dx, dweight, dbias, g. y is the output where a ReLU was applied, else absent; g is grad under its mask, the gradient
// of the residual. What need_x or need_g turns off comes back empty; dweight and dbias come back empty if nothing
// needed them.
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_bwd(const Tensor& grad, const std::optional<Tensor>& y,
                                                      const Tensor& x, const Tensor& mean, const Tensor& var,
                                                      const std::optional<Tensor>& weight, double eps, bool batch_stats,
                                                      bool need_x, bool need_sums, bool need_g);

// dx, dweight, dbias of relu((x - mean) / sqrt(var + eps) * weight + bias), mean and var being x's own. The ReLU's mask
// comes from x, so that its output is not read. dx comes back empty unless need_x.
std::tuple<Tensor, Tensor, Tensor> bn_relu_bwd(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                               const Tensor& var, const std::optional<Tensor>& weight,
                                               const std::optional<Tensor>& bias, double eps, bool need_x);

// (grad under y's mask - mean_g - (x - mean) * slope) * scale; y is the output where a ReLU was applied, else absent
Tensor bn_act_bwd_input(const Tensor& grad, const std::optional<Tensor>& y, const Tensor& x, const Tensor& mean,
                        const Tensor& scale, const Tensor& mean_g, const Tensor& slope);

// g and its sum per channel, in one pass
std::tuple<Tensor, Tensor> relu_bwd_sum(const Tensor& grad, const Tensor& y);

// y and winner: [N, C, P, Q] of max-pool 3x3 stride 2 padding 1 after relu((x - mean) / sqrt(var + eps) * weight + bias);
// winner is uint8: 3 * row + column of the value in its window, 9 where nothing is above zero
std::tuple<Tensor, Tensor> bn_act_pool(const Tensor& x, const Tensor& mean, const Tensor& var,
                                       const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                       double eps);

// dx, dweight, dbias; mean and var are x's own, dx is empty unless need_x
std::tuple<Tensor, Tensor, Tensor> bn_act_pool_bwd(const Tensor& grad, const Tensor& x, const Tensor& winner,
                                                   const Tensor& mean, const Tensor& var,
                                                   const std::optional<Tensor>& weight, double eps, bool need_x);

}  // namespace fused_resnet
