// geometry.h's descriptions as the tensor memory accelerator's maps.

#pragma once

#ifndef FUSED_RESNET_EMULATED

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "geometry.h"

namespace fused_resnet::conv {

// The driver's functions, found at run time: the library links to no driver.
template <class F>
F driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<F>(found) : nullptr;
}

inline cudaError_t encode(CUtensorMap& map, const void* data, const Im2col& t, CUtensorMapDataType type) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  if (encode == nullptr) return cudaErrorCallRequiresNewerDriver;
  const CUresult result = encode(&map, type, 4, const_cast<void*>(data), t.size, t.bytes, t.lower, t.upper, t.channels,
                                 t.pixels, t.stride, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Like: Tiled or Lines.
template <class Like>
cudaError_t encode(CUtensorMap& map, const void* data, const Like& t, CUtensorMapDataType type) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  if (encode == nullptr) return cudaErrorCallRequiresNewerDriver;
  constexpr int dimensions = sizeof(t.box) / sizeof(t.box[0]);
  const uint32_t ones[4] = {1, 1, 1, 1};
  const CUresult result = encode(&map, type, dimensions, const_cast<void*>(data), t.size, t.bytes, t.box, ones,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace fused_resnet::conv

#endif
