#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace fused_resnet {

using torch::stable::Tensor;

// y = max_pool3x3s2p1(relu(conv7x7s2p3(x) + bias)) in channels_last. x: [N, 3, H, W], NCHW or channels_last, float16 or
// bfloat16, W even; weight: [K, 224] in the order of conv/stem_kernel.cuh, K a multiple of 64; bias: [K] float32.
// rows: pooled rows that a block walks.
void stem_out(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t rows, Tensor& y);

// The convolution alone, in channels_last: [N, K, (H - 1) / 2 + 1, (W - 1) / 2 + 1]. rows: pairs of its rows that a
// block walks.
Tensor stem_conv(const Tensor& x, const Tensor& weight, int64_t rows);

// Of its weight's gradient what each block has summed, float32 [blocks, K, 224]: 7 rows of 8 columns, the first without
// meaning, of 4 channels, the last without meaning. grad: [N, K, P, Q] of the convolution of x, channels_last. rows:
// pairs of its rows that a block walks.
Tensor stem_conv_weight_shares(const Tensor& grad, const Tensor& x, int64_t rows);

}  // namespace fused_resnet
