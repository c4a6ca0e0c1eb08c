#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace fused_resnet {

// 128 bits a tensor over its bytes, dtype, shape and strides: int64 [len(tensors), 2] on the CPU.
torch::stable::Tensor fingerprint(const std::vector<torch::stable::Tensor>& tensors);

}  // namespace fused_resnet
