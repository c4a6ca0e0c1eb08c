// What every launcher needs: checks of the arguments, the device and its stream, a dtype made a type, a checked launch.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <utility>

#include "check.h"

// Lives in libtorch_cuda. Weak, so that the library loads, with its CPU ops, beside a torch without CUDA.
#pragma weak aoti_torch_get_current_cuda_stream

namespace fused_resnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// While it lives, the tensor's device is the current one.
struct Device {
  explicit Device(const Tensor& t) : index(t.get_device_index()), guard(index) {
    void* current = nullptr;
    check(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    check(aoti_torch_get_current_cuda_stream(index, &current) == 0, "no current stream on CUDA device ", index);
    stream = static_cast<cudaStream_t>(current);
    const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index);
    check(error == cudaSuccess, "CUDA device ", index, ": ", cudaGetErrorString(error));
  }

  int index;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
  int multiprocessors = 0;
};

// Whether a kernel that waits for those before it has the instruction: code for older GPUs, which newer ones run, has
// not, and must not overlap anything.
template <typename... Parameters>
bool may_overlap(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes = {};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

// Launches, and checks that the launch was accepted. overlaps: it may start before the kernel before it has ended, for
// whose results it waits.
template <typename... Parameters, typename... Arguments>
void launch_as(bool overlaps, const char* op, const Device& device, dim3 grid, dim3 block,
               void (*kernel)(Parameters...), Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = device.stream;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = overlaps ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();  // or the next call that asks would report this error as its own
  check(error == cudaSuccess, op, ": the launch failed: ", cudaGetErrorString(error));
}

template <typename... Parameters, typename... Arguments>
void launch(const char* op, const Device& device, dim3 grid, dim3 block, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  launch_as(false, op, device, grid, block, kernel, std::forward<Arguments>(arguments)...);
}

// Of a kernel that waits for those before it by itself (ptx::wait_for_kernels).
template <typename... Parameters, typename... Arguments>
void launch_overlapping(const char* op, const Device& device, dim3 grid, dim3 block, void (*kernel)(Parameters...),
                        Arguments&&... arguments) {
  launch_as(may_overlap(kernel), op, device, grid, block, kernel, std::forward<Arguments>(arguments)...);
}

// Calls f with a value of the dtype's type.
template <typename F>
void with_dtype(const char* op, ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) return f(float{});
  if (dtype == ScalarType::Half) return f(__half{});
  if (dtype == ScalarType::BFloat16) return f(__nv_bfloat16{});
  check(false, op, ": needs float32, float16 or bfloat16, got ", torch::headeronly::toString(dtype));
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// [N, C, H, W], not empty, dense in channels_last order: a matrix [N*H*W, C].
inline void check_map(const char* op, const char* name, const Tensor& t) {
  check(t.dim() == 4, op, ": ", name, " must be [N, C, H, W], it has ", t.dim(), " dimensions");
  check(t.numel() > 0, op, ": ", name, " must not be empty");
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    check(t.size(d) == 1 || t.stride(d) == expected, op, ": ", name, " must be dense and channels_last");
    expected *= t.size(d);
  }
}

// The same, with the shape, dtype and device of x.
inline void check_map_like(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_map(op, name, t);
  for (int d = 0; d < 4; ++d) check(t.size(d) == x.size(d), op, ": ", name, " must have the shape of x");
  check(t.scalar_type() == x.scalar_type(), op, ": ", name, " must have the dtype of x");
  check(same_device(t, x), op, ": ", name, " must be on the device of x");
}

// [C] in float32 on the device of x, whose channels it belongs to.
inline void check_channels(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check(t.dim() == 1 && t.size(0) == x.size(1), op, ": ", name, " must be [C] = [", x.size(1), "]");
  check(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32");
  check(t.is_contiguous(), op, ": ", name, " must be contiguous");
  check(same_device(t, x), op, ": ", name, " must be on the device of x");
}

inline Tensor new_floats(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {size}, ScalarType::Float);
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
const T* data(const std::optional<Tensor>& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}

template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace fused_resnet
