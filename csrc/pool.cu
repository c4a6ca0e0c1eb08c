// Launcher of avg_pool: check, guard the device, launch, check the launch.

#include "pool.h"

#include "conv_checks.h"
#include "kernels/avg_pool.cuh"

namespace fused_resnet {

void avg_pool_out(const Tensor& x, Tensor& y) {
  const char* op = "avg_pool";
  check_map(op, "x", x);
  check(x.size(1) % 2 == 0, op, ": x must have an even number of channels, got ", x.size(1));
  check(x.size(0) <= 65535, op, ": needs at most 65535 images, got ", x.size(0));
  const int channels = size_of(op, "C", x.size(1), 2);
  const int positions = size_of(op, "H x W", x.size(2) * x.size(3), 1);
  check_sized_map(op, "y", y, {x.size(0), x.size(1), 1, 1}, x);
  check_apart(op, "y", y, "x", x);
  const auto dtype = x.scalar_type();
  with_dtype(op, dtype, [&](auto value) {
    using T = decltype(value);
    for (const auto& [name, t] : {std::pair("x", x), std::pair("y", Tensor(y))})
      check(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % (2 * sizeof(T)) == 0, op, ": ", name,
            " must begin at a multiple of ", 2 * sizeof(T), " bytes");
    const Device device(x);
    const dim3 grid((channels / 2 + 31) / 32, static_cast<unsigned>(x.size(0)));
    launch_overlapping(op, device, grid, dim3(32 * kPoolWarps), avg_pool_kernel<T>, data<T>(x), mutable_data<T>(y),
                       positions, channels);
  });
}

}  // namespace fused_resnet
