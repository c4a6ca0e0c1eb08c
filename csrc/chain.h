#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace fused_resnet {

using torch::stable::Tensor;

// The compiled chains as JSON, in bytes: name, dtype, channels in the middle and of the next convolution, whether there
// is a projection, whether tiles are lines, stages, threads, shared memory.
Tensor chain_instances();

// y = act(conv1x1(relu(conv3x3(x) + bias1)) + bias2 + residual, or + conv1x1(x2, projection, stride2)), z =
// relu(conv1x1(y) + bias3). x and what the 3x3 makes of it have the instance's middle channels, y four times as many.
// quarter: y is its even rows and columns alone. Tensors as in conv_bn_act.h.
void chain_out(int64_t instance, const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
               const Tensor& bias2, const std::optional<Tensor>& residual, const std::optional<Tensor>& x2,
               const std::optional<Tensor>& projection, int64_t stride2, const std::optional<Tensor>& weight3,
               const std::optional<Tensor>& bias3, bool relu, bool quarter, Tensor& y, std::optional<Tensor> z,
               bool constant_weights);

}  // namespace fused_resnet
