#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace fused_resnet {

using torch::stable::Tensor;

// x, residual and the results are maps [N, C, H, W] in float16 or bfloat16, dense in channels_last order, weights
// [K, C, R, S] in the same dtype and order; channels are multiples of 8; vectors are [K] in float32; all of them begin
// at a multiple of 16 bytes. `instance` is an index into conv_instances().

// The compiled convolutions as JSON, in bytes: name, arch, dtype, tile, stages, threads, shared memory.
Tensor conv_instances();

// Bytes of workspace that an instance needs for a shape on a device of so many multiprocessors; raises the reason why
// it cannot run. shape: N, H, W, C, K, R, S, stride, padding, dilation (height and width each), H2, W2, C2, stride2.
Tensor conv_plan(int64_t instance, std::vector<int64_t> shape, int64_t multiprocessors);

// out = act((conv(x, weight) + conv1x1(x2, weight2, stride2)) * scale + bias + residual). constant_weights: a promise
// that weights, scale and bias were written before the last kernel of the stream that did not overlap another, if not
// earlier; they may be read while the kernels before still run.
void conv_bias_act_out(int64_t instance, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& scale, const std::optional<Tensor>& residual,
                       const std::optional<Tensor>& x2, const std::optional<Tensor>& weight2, int64_t stride2,
                       std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                       bool relu, const std::optional<Tensor>& workspace, Tensor& out, bool constant_weights);

Tensor conv_bias_act(int64_t instance, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& scale, const std::optional<Tensor>& residual,
                     const std::optional<Tensor>& x2, const std::optional<Tensor>& weight2, int64_t stride2,
                     std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                     bool relu);

// act((conv(x, weight) - mean) / sqrt(var + eps) * bn_weight + bn_bias + residual); without mean and var, no BN.
Tensor conv_bn_act(int64_t instance, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bn_weight,
                   const std::optional<Tensor>& bn_bias, const std::optional<Tensor>& mean,
                   const std::optional<Tensor>& var, double eps, const std::optional<Tensor>& residual,
                   std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, bool relu);

}  // namespace fused_resnet
