// What is left of a batch norm beside a convolution that multiplies and adds in its epilogue.

#pragma once

namespace fused_resnet {

// scale = weight / sqrt(var + eps), shift = bias - mean * scale, of each channel; weight is 1 and bias 0 where null.
__global__ void __launch_bounds__(128)
    bn_scale_shift_kernel(const float* mean, const float* var, const float* weight, const float* bias, float eps,
                          float* scale, float* shift, int channels) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  const float factor = (weight ? weight[c] : 1.0f) * rsqrtf(var[c] + eps);
  scale[c] = factor;
  shift[c] = (bias ? bias[c] : 0.0f) - mean[c] * factor;
}

}  // namespace fused_resnet
