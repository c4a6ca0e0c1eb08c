// What the kernels of batch norm on a CPU work on: dense rows [rows, channels] in float32, as channels_last maps lie.

#pragma once

#include <cstdint>

namespace fused_resnet::engine {

// y = relu((x - mean) * scale + bias + residual); y may be x or residual.
struct BnAct {
  const float* x;
  const float* residual;             // or null
  const float *mean, *scale, *bias;  // [channels]
  float* y;
  int64_t channels;
  bool relu;
};

// Where the gradient's mask comes from: there is none, the output tells, or the output is computed anew from x.
enum class BnMask { kNone, kOutput, kInput };

// What is done with g = grad under the mask.
enum class BnStep {
  kSums,       // sum g and g * (x - mean); store g
  kBatch,      // dx = (g - mean_g - (x - mean) * slope) * scale, as the batch's own statistics have it
  kFixed,      // dx = g * scale; store g
  kFixedSums,  // kSums and kFixed
};

struct BnBwd {
  const float* grad;
  const float* y;               // BnMask::kOutput
  const float* x;               // of all but kFixed without BnMask::kInput
  const float *mean, *scale;    // [channels]
  const float* bias;            // [channels], BnMask::kInput
  const float *mean_g, *slope;  // [channels], kBatch
  float* g;                     // or null; may be grad
  float* dx;                    // or null; may be grad
  int64_t channels;
  BnMask mask;
  BnStep step;
};

// A function does rows [first, last).
struct BnKernels {
  int64_t scratch;  // floats a channel

  // mean and sum of squared deviations of each channel
  void (*stats)(const float* x, int64_t channels, int64_t first, int64_t last, float* scratch, double* mean,
                double* deviations);
  void (*act)(const BnAct&, int64_t first, int64_t last);
  // scratch and sums are for the steps that sum
  void (*bwd)(const BnBwd&, int64_t first, int64_t last, float* scratch, double* sum_g, double* moment);
};

}  // namespace fused_resnet::engine
