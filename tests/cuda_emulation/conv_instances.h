// In the place of the file that setup.py writes: the convolutions that are emulated, in the order of the tests.

#pragma once

#define FUSED_RESNET_INSTANCES(X)                                                                   \
  X(kHalf64x64) X(kBfloat64x64) X(kHalf128x64) X(kHalf128x128) X(kHalf256x128) X(kHalf1) X(kHalf2) \
  X(kHalf4) X(kHalf8) X(kBfloat1) X(kBfloat4) X(kHalfLines) X(kBfloatLines)
#define FUSED_RESNET_CHAINS(X)                                                                   \
  X(kHalfChain64) X(kHalfChain128) X(kHalfChainSegment) X(kBfloatChain64) X(kHalfLines64)        \
  X(kHalfLines128) X(kHalfLinesSegment) X(kBfloatLines64) X(kHalfStream) X(kBfloatStream)
