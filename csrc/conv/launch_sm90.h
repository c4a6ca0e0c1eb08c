// How the kernels for Hopper are launched that wait by themselves for the kernel before them.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fused_resnet::conv {

// Blocks of `threads` with `shared` bytes of memory, `cluster` of them together; they may begin while the kernel before
// still runs.
template <class Params>
cudaError_t launch_overlapping(void (*kernel)(Params), int64_t blocks, int threads, int shared, int cluster,
                               cudaStream_t stream, const Params& params) {
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
      error != cudaSuccess)
    return error;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace fused_resnet::conv
