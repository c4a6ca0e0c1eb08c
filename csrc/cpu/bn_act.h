#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

// Batch norm on a CPU. Maps are float32 [N, C, H, W], dense in channels_last order; vectors are float32 [C],
// contiguous. isa is a number of program_isa's, -1 for the best. What comes out does not depend on the number of
// threads.
namespace fused_resnet::cpu {

using torch::stable::Tensor;

// mean, biased variance
std::tuple<Tensor, Tensor> bn_stats(const Tensor& x, int64_t isa);

// act((x - mean) / sqrt(var + eps) * weight + bias + residual)
Tensor bn_act(const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
              const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& residual, bool relu,
              int64_t isa);

// The same into out, which may be x or residual.
void bn_act_out(const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
                const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& residual, bool relu,
                const Tensor& out, int64_t isa);

// dx, dweight, dbias, g. g is grad under the ReLU's mask, the gradient of the residual. The mask is y's, the output's;
// without y it is that of (x - mean) / sqrt(var + eps) * weight + bias, to the bit what bn_act without residual had.
// What the need_ flags turn off comes back empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_bwd(const Tensor& grad, const std::optional<Tensor>& y,
                                                      const Tensor& x, const Tensor& mean, const Tensor& var,
                                                      const std::optional<Tensor>& weight,
                                                      const std::optional<Tensor>& bias, double eps, bool relu,
                                                      bool batch_stats, bool need_x, bool need_sums, bool need_g,
                                                      int64_t isa);

// The same into dx and g, where they are given; returns dweight and dbias. dx may be grad, y or x; g may be grad or y.
std::tuple<Tensor, Tensor> bn_act_bwd_out(const Tensor& grad, const std::optional<Tensor>& y, const Tensor& x,
                                          const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
                                          const std::optional<Tensor>& bias, double eps, bool relu, bool batch_stats,
                                          bool need_sums, const std::optional<Tensor>& dx,
                                          const std::optional<Tensor>& g, int64_t isa);

}  // namespace fused_resnet::cpu
