// Launchers of stem and stem_conv: check, guard the device, allocate, launch, check the launch.

#include "stem.h"

#include <limits>

#include "conv/stem_kernel.cuh"
#include "conv_checks.h"

namespace fused_resnet {
namespace {

// All but y and the bias.
template <bool Pools>
conv::StemParams params_of(const char* op, const Tensor& x, const Tensor& weight, int64_t rows) {
  check(x.dim() == 4 && x.size(1) == 3, op, ": x must be [N, 3, H, W]");
  check(x.numel() > 0, op, ": x must not be empty");
  const ScalarType dtype = x.scalar_type();
  check(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op, ": x must be float16 or bfloat16, got ",
        torch::headeronly::toString(dtype));
  const bool nchw = x.is_contiguous();
  if (!nchw) check_map(op, "x", x);
  const int64_t h = x.size(2), w = x.size(3);
  check(w % 2 == 0, op, ": x must have an even width, got ", w);
  check(3 * h <= std::numeric_limits<int32_t>::max() / w, op, ": an image must have less than 2^31 elements, got ", h,
        "x", w);
  // A pair of pixels is read at a time.
  check(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 4 == 0, op, ": x must begin at a multiple of 4 bytes");

  check(weight.dim() == 2 && weight.size(1) == conv::Stem::kSize && weight.is_contiguous(), op,
        ": weight must be packed, [K, 224]");
  check_dtype(op, "weight", weight, x);
  check_aligned(op, "weight", weight.const_data_ptr());
  const int64_t k = weight.size(0);
  check(k > 0 && k % conv::Stem::kChannels == 0, op, ": K must be a multiple of 64, got ", k);
  conv::StemParams p = {};
  p.h = size_of(op, "H", h, 1);
  p.pairs = static_cast<int>(w / 2);
  p.p1 = static_cast<int>((h - 1) / 2 + 1), p.q1 = static_cast<int>((w - 1) / 2 + 1);
  p.p = (p.p1 - 1) / 2 + 1, p.q = (p.q1 - 1) / 2 + 1;
  p.k = size_of(op, "K", k, 1);

  check(rows >= 1, op, ": rows must be at least 1, got ", rows);
  p.rows = static_cast<int>(rows < p.p ? rows : p.p);
  p.parts = conv::ceil_div(p.p, p.rows);
  p.tiles = conv::ceil_div(p.q, conv::StemTile<Pools>::kTile);
  p.groups = p.k / conv::Stem::kChannels;
  const int64_t of_image = int64_t{p.parts} * p.tiles * p.groups;
  check(x.size(0) <= std::numeric_limits<int32_t>::max() / of_image, op, ": needs less than 2^31 blocks, got ",
        x.size(0), " images of ", of_image);
  p.nchw = nchw;
  p.pixel = nchw ? 4 : 12;
  p.row = w / 2 * p.pixel;
  p.advance = conv::Stem::kFetch * p.row;
  p.plane = nchw ? h * p.row : 4;
  p.image = 6 * h * w;
  p.row_of_y = int64_t{2} * (Pools ? p.q : p.q1) * p.k;
  p.ones = 0xffffffffu;
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  return p;
}

template <class T, bool Pools>
cudaError_t run(const conv::StemParams& p, unsigned blocks, cudaStream_t stream) {
  const auto kernel = conv::stem_kernel<T, Pools>;
  constexpr int shared = conv::StemTile<Pools>::kShared;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(conv::Stem::kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, p);
}

template <bool Pools>
void launch_stem(const char* op, const Device& device, const conv::StemParams& p, const Tensor& x) {
  const unsigned blocks = static_cast<unsigned>(x.size(0) * p.parts * p.tiles * p.groups);
  check_launch(op, "the kernel",
               x.scalar_type() == ScalarType::Half ? run<__half, Pools>(p, blocks, device.stream)
                                                   : run<__nv_bfloat16, Pools>(p, blocks, device.stream));
}

}  // namespace

void stem_out(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t rows, Tensor& y) {
  const char* op = "stem";
  conv::StemParams p = params_of<true>(op, x, weight, rows);
  check_sized_map(op, "y", y, {x.size(0), p.k, p.p, p.q}, x);
  check_vector(op, "bias", bias, y, false);
  for (const auto& [name, t] : {std::pair("x", x), std::pair("weight", weight), std::pair("bias", bias)})
    check_apart(op, "y", y, name, t);
  const Device device(x);
  check_arch(op, "the kernel", 80, device);
  p.bias = data<float>(bias);
  p.y = y.mutable_data_ptr();
  launch_stem<true>(op, device, p, x);
}

Tensor stem_conv(const Tensor& x, const Tensor& weight, int64_t rows) {
  const char* op = "stem_conv";
  conv::StemParams p = params_of<false>(op, x, weight, rows);
  const Device device(x);
  check_arch(op, "the kernel", 80, device);
  const Tensor y_rows = torch::stable::new_empty(x, {x.size(0), p.p1, p.q1, p.k});
  p.y = y_rows.mutable_data_ptr();
  launch_stem<false>(op, device, p, x);
  return torch::stable::transpose(torch::stable::transpose(y_rows, 2, 3), 1, 2);
}

}  // namespace fused_resnet
