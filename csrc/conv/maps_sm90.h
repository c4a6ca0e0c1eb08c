// The tensor maps of a kernel's parameters, encoded one after another.

#pragma once

#include "sm90_ptx.cuh"
#include "tensor_map.h"

namespace fused_resnet::conv {

// Of elements T. After an error, which `error` keeps, nothing more is encoded.
template <class T>
struct Maps {
  cudaError_t error = cudaSuccess;

  template <class Like>
  void operator()(CUtensorMap& map, const void* data, const Like& like) {
    constexpr auto type = ptx::is_half<T> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    if (error == cudaSuccess) error = encode(map, data, like, type);
  }
};

}  // namespace fused_resnet::conv
