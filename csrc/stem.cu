// Launchers of stem, stem_conv and its weight's gradient: check, guard the device, allocate, launch, check the launch.

#include "stem.h"

#include <limits>

#include "conv/stem_kernel.cuh"
#include "conv/stem_weight_kernel.cuh"
#include "conv_checks.h"

namespace fused_resnet {
namespace {

// columns: of the convolution's map, of a block.
conv::StemPlaces places_of(const char* op, const Tensor& x, int64_t k, int64_t rows, int columns) {
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
  check(k > 0 && k % conv::Stem::kChannels == 0, op, ": K must be a multiple of 64, got ", k);

  conv::StemPlaces p = {};
  p.x = x.const_data_ptr();
  p.h = size_of(op, "H", h, 1);
  p.pairs = static_cast<int>(w / 2);
  p.p1 = static_cast<int>((h - 1) / 2 + 1), p.q1 = static_cast<int>((w - 1) / 2 + 1);
  p.p = (p.p1 - 1) / 2 + 1, p.q = (p.q1 - 1) / 2 + 1;
  p.k = size_of(op, "K", k, 1);

  check(rows >= 1, op, ": rows must be at least 1, got ", rows);
  p.rows = static_cast<int>(rows < p.p ? rows : p.p);
  p.parts = conv::ceil_div(p.p, p.rows);
  p.tiles = conv::ceil_div(p.q1, columns);
  p.groups = p.k / conv::Stem::kChannels;
  const int64_t of_image = int64_t{p.parts} * p.tiles * p.groups;
  check(x.size(0) <= std::numeric_limits<int32_t>::max() / of_image, op, ": needs less than 2^31 blocks, got ",
        x.size(0), " images of ", of_image);
  p.nchw = nchw;
  p.pixel = nchw ? 4 : 12;
  p.row = w / 2 * p.pixel;
  p.plane = nchw ? h * p.row : 4;
  p.image = 6 * h * w;
  return p;
}

// All but y and the bias.
template <bool Pools>
conv::StemParams params_of(const char* op, const Tensor& x, const Tensor& weight, int64_t rows) {
  check(weight.dim() == 2 && weight.size(1) == conv::Stem::kSize && weight.is_contiguous(), op,
        ": weight must be packed, [K, 224]");
  conv::StemParams p = {places_of(op, x, weight.size(0), rows, 2 * conv::StemTile<Pools>::kTile)};
  check_dtype(op, "weight", weight, x);
  check_aligned(op, "weight", weight.const_data_ptr());
  p.advance = conv::Stem::kFetch * p.row;
  p.row_of_y = int64_t{2} * (Pools ? p.q : p.q1) * p.k;
  p.ones = 0xffffffffu;
  p.weight = weight.const_data_ptr();
  return p;
}

template <class Params>
cudaError_t run(void (*kernel)(Params), const Params& p, int shared, unsigned blocks, cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(conv::Stem::kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, p);
}

template <class Params>
void launch_stem(const char* op, void (*halves)(Params), void (*bfloats)(Params), int shared, const Params& p,
                 const Tensor& x) {
  const Device device(x);
  check_arch(op, "the kernel", 80, device);
  const unsigned blocks = static_cast<unsigned>(x.size(0) * p.parts * p.tiles * p.groups);
  const auto kernel = x.scalar_type() == ScalarType::Half ? halves : bfloats;
  check_launch(op, "the kernel", run(kernel, p, shared, blocks, device.stream));
}

template <bool Pools>
void launch_stem(const char* op, const conv::StemParams& p, const Tensor& x) {
  launch_stem(op, conv::stem_kernel<__half, Pools>, conv::stem_kernel<__nv_bfloat16, Pools>,
              conv::StemTile<Pools>::kShared, p, x);
}

}  // namespace

void stem_out(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t rows, Tensor& y) {
  const char* op = "stem";
  conv::StemParams p = params_of<true>(op, x, weight, rows);
  check_sized_map(op, "y", y, {x.size(0), p.k, p.p, p.q}, x);
  check_vector(op, "bias", bias, y, false);
  for (const auto& [name, t] : {std::pair("x", x), std::pair("weight", weight), std::pair("bias", bias)})
    check_apart(op, "y", y, name, t);
  p.bias = data<float>(bias);
  p.y = y.mutable_data_ptr();
  launch_stem<true>(op, p, x);
}

Tensor stem_conv(const Tensor& x, const Tensor& weight, int64_t rows) {
  const char* op = "stem_conv";
  conv::StemParams p = params_of<false>(op, x, weight, rows);
  const Tensor y_rows = torch::stable::new_empty(x, {x.size(0), p.p1, p.q1, p.k});
  p.y = y_rows.mutable_data_ptr();
  launch_stem<false>(op, p, x);
  return torch::stable::transpose(torch::stable::transpose(y_rows, 2, 3), 1, 2);
}

Tensor stem_conv_weight_shares(const Tensor& grad, const Tensor& x, int64_t rows) {
  const char* op = "stem_conv_weight_shares";
  check(grad.dim() == 4, op, ": grad must be [N, K, P, Q], it has ", grad.dim(), " dimensions");
  conv::StemWeightParams p = {places_of(op, x, grad.size(1), rows, conv::StemWeight::kTile)};
  check_sized_map(op, "grad", grad, {x.size(0), p.k, p.p1, p.q1}, x);
  p.g = grad.const_data_ptr();
  const int64_t blocks = x.size(0) * p.parts * p.tiles;
  const Tensor shares = torch::stable::new_empty(x, {blocks, p.k, conv::Stem::kSize}, ScalarType::Float);
  p.shares = mutable_data<float>(shares);
  launch_stem(op, conv::stem_weight_kernel<__half>, conv::stem_weight_kernel<__nv_bfloat16>, conv::StemWeight::kShared,
              p, x);
  return shares;
}

}  // namespace fused_resnet
