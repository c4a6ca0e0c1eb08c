#pragma once

#include <torch/csrc/stable/tensor.h>

namespace fused_resnet {

using torch::stable::Tensor;

// y = the mean of each channel over the map. x: [N, C, H, W], dense channels_last, C even, at most 65535 images, in
// float32, float16 or bfloat16; y: [N, C, 1, 1] in the same dtype.
void avg_pool_out(const Tensor& x, Tensor& y);

}  // namespace fused_resnet
