// What every compiled chain offers, as instance.h has it.

#pragma once

#include "instance.h"

namespace fused_resnet::conv {

// h = relu(conv3x3(x) + bias1), y = act(conv1x1(h) + bias2 + residual + conv1x1(x2, projection)), z = relu(conv1x1(y) +
// bias3); of middle, middle, 4 * middle and `following` channels. y: its even rows and columns alone if quarter. Null:
// residual, x2, z.
struct Chain {
  Shape shape;  // of the 3x3, x2 its second segment
  const void *x, *weight1, *weight2, *residual, *x2, *projection, *weight3;
  const float *bias1, *bias2, *bias3;
  void *y, *z;
  bool relu, quarter;
  bool constant_weights;  // they may be read before the kernels before have ended
};

struct ChainInstance {
  const char* name;
  Dtype dtype;
  int middle;     // channels of x and h; y has four times as many
  int following;  // channels of the next convolution, 0 for none
  bool segment;
  bool by_lines;  // lines of an image are its tiles; else 64 positions are
  int stages_x, stages_y;  // of the rings of x and of the residual; of lines of x and of weights that do not stay
  int threads;
  int shared_bytes;
  cudaError_t (*run)(const Chain&, int multiprocessors, cudaStream_t);
};

}  // namespace fused_resnet::conv
