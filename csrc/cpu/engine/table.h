// Included last in each isa_*.cpp, which has set kWidth, kVectors and kMr: the table of its kernels.

#pragma once

#include "bn.h"
#include "conv.h"
#include "grouped.h"
#include "pool.h"
#include "stem.h"
#include "winograd.h"

#define FUSED_RESNET_KERNELS(table, name)   \
  namespace fused_resnet::engine {          \
  const Kernels table = {name,              \
                         kWidth,            \
                         kNr,               \
                         conv_scratch,      \
                         conv_task,         \
                         winograd_scratch,  \
                         winograd_task,     \
                         winograd_input,    \
                         winograd_multiply, \
                         winograd_output,   \
                         stem_scratch,      \
                         stem_task,         \
                         grouped_scratch,   \
                         grouped_vectors,   \
                         unit_c,            \
                         grouped_task,      \
                         max_pool_row,      \
                         avg_pool_image,    \
                         kBn};              \
  }
