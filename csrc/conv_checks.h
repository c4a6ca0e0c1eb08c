// Checks that the launchers of conv_bias_act, conv_bn_act, chain and stem share.

#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "conv/instance.h"
#include "launch.h"

namespace fused_resnet {

inline int size_of(const char* op, const char* name, int64_t value, int64_t least) {
  check(value >= least && value <= std::numeric_limits<int32_t>::max() / 2, op, ": ", name, " must be from ", least,
        " to 2^30, got ", value);
  return static_cast<int>(value);
}

struct Pair {
  int h, w;
};

inline Pair pair_of(const char* op, const char* name, const std::vector<int64_t>& values, int64_t least) {
  check(values.size() == 2, op, ": ", name, " must be two numbers, got ", values.size());
  return {size_of(op, name, values[0], least), size_of(op, name, values[1], least)};
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check(t.scalar_type() == x.scalar_type(), op, ": ", name, " must have the dtype of x");
  check(same_device(t, x), op, ": ", name, " must be on the device of x");
}

inline void check_aligned(const char* op, const char* name, const void* p) {
  check(reinterpret_cast<uintptr_t>(p) % 16 == 0, op, ": ", name, " must begin at a multiple of 16 bytes");
}

// A map of these sizes in the dtype of x, and on its device.
inline void check_sized_map(const char* op, const char* name, const Tensor& t, const std::array<int64_t, 4>& sizes,
                            const Tensor& x) {
  check_map(op, name, t);
  check_dtype(op, name, t, x);
  check_aligned(op, name, t.const_data_ptr());
  for (int d = 0; d < 4; ++d)
    check(t.size(d) == sizes[d], op, ": ", name, " must be [", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ", sizes[3],
          "]");
}

// [K, C, R, S], dense in channels_last order.
inline void check_filter(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check(t.dim() == 4, op, ": ", name, " must be [K, C, R, S], it has ", t.dim(), " dimensions");
  check_map(op, name, t);
  check_dtype(op, name, t, x);
  check(t.size(1) == x.size(1), op, ": ", name, " must be of ", x.size(1), " channels, got ", t.size(1));
  check_aligned(op, name, t.const_data_ptr());
}

inline void check_vector(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& y,
                         bool aligned) {
  if (!t.has_value()) return;
  check_channels(op, name, *t, y);
  if (aligned) check_aligned(op, name, t->const_data_ptr());
}

// What is written, out, may not be what is read: tiles are written in no order.
inline void check_apart(const char* op, const char* name, const Tensor& out, const char* other_name,
                        const std::optional<Tensor>& other) {
  if (!other.has_value()) return;
  const auto range = [](const Tensor& t) {  // dense
    const uintptr_t first = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    return std::pair(first, first + t.numel() * t.element_size());
  };
  const auto [first, last] = range(out);
  const auto [other_first, other_last] = range(*other);
  check(last <= other_first || other_last <= first, op, ": ", name, " must not overlap ", other_name);
}

// One of those that were compiled, by its index.
template <class Instance>
const Instance& instance_of(const char* op, const std::vector<const Instance*>& all, int64_t index) {
  const int64_t count = static_cast<int64_t>(all.size());
  check(index >= 0 && index < count, op, ": instance must be below ", count, ", got ", index);
  return *all[index];
}

inline const char* name_of(conv::Dtype dtype) { return dtype == conv::Dtype::half ? "float16" : "bfloat16"; }

template <class Instance>
void check_dtype_of(const char* op, const Instance& instance, const Tensor& x) {
  const ScalarType dtype = instance.dtype == conv::Dtype::half ? ScalarType::Half : ScalarType::BFloat16;
  check(x.scalar_type() == dtype, op, ": ", instance.name, " needs x in ", torch::headeronly::toString(dtype),
        ", got ", torch::headeronly::toString(x.scalar_type()));
}

// Output positions that 32 bits count, and a second segment of as many.
inline void check_positions(const char* op, const conv::Shape& s) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max() - 512;
  check(s.m() <= most, op, ": needs at most ", most, " output positions, got ", s.m());
  if (!s.c2) return;
  const int p = conv::Shape::outputs(s.h2, 1, s.stride2, 0, 1), q = conv::Shape::outputs(s.w2, 1, s.stride2, 0, 1);
  check(p == s.p() && q == s.q(), op, ": x2 must have ", s.p(), "x", s.q(), " positions, got ", p, "x", q);
}

inline Tensor new_on_cpu(int64_t size, ScalarType dtype) {
  return torch::stable::empty({size}, dtype, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

inline Tensor bytes_of(const std::string& text) {
  Tensor bytes = new_on_cpu(static_cast<int64_t>(text.size()), ScalarType::Byte);
  text.copy(static_cast<char*>(bytes.mutable_data_ptr()), text.size());
  return bytes;
}

// 90: nothing but 9.0 will do.
inline void check_arch(const char* op, const char* name, int needed, const Device& device) {
  int major = 0, minor = 0;
  for (const auto& [value, attribute] :
       {std::pair(&major, cudaDevAttrComputeCapabilityMajor), std::pair(&minor, cudaDevAttrComputeCapabilityMinor)})
    check(cudaDeviceGetAttribute(value, attribute, device.index) == cudaSuccess, op, ": no such CUDA device");
  const int arch = 10 * major + minor;
  check(needed == 90 ? arch == 90 : arch >= needed, op, ": ", name, " cannot run on sm_", arch);
}

inline void check_launch(const char* op, const char* name, cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // or the next call that asks would report this error as its own
  check(error == cudaSuccess, op, ": the launch of ", name, " failed: ", cudaGetErrorString(error));
}

}  // namespace fused_resnet
