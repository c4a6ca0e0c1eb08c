#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace fused_resnet {

// 128 bits a tensor over its bytes, dtype, shape and strides: int64 [len(tensors), 2] on the CPU.
torch::stable::Tensor fingerprint(const std::vector<torch::stable::Tensor>& tensors);

// Whether fingerprint(tensors) is `proof`; false for tensors that fingerprint refuses.
bool unchanged(const std::vector<torch::stable::Tensor>& tensors, const torch::stable::Tensor& proof);

}  // namespace fused_resnet
