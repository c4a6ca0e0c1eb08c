// A stand-in for the CUDA runtime that runs kernels on the CPU: what csrc/*.cu needs, no more. The threads of a block
// are fibers on one thread; a barrier or a shuffle switches to the next. Blocks run one after another.
//
// What it proves: indices, geometry, arithmetic, that every thread reaches every barrier and shuffle. Run in both
// orders, it tells a result that depends on the order of threads or blocks: a missing barrier, a race. What it cannot:
// memory ordering, speed.

#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <tuple>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __forceinline__ inline

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error ? "invalid configuration argument" : "no error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

// Set from outside: how many multiprocessors the device has, and whether blocks and threads run last to first.
inline int multiprocessors = 4;
inline bool reversed = false;
inline int capability = 8;

struct Copy;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  dim3 index;
  bool done = true;
  std::deque<std::vector<struct Copy>> copies;  // groups under way, and the one that is not committed
};

struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  float slot[2][32];  // two, so that one barrier a shuffle is enough
  uint32_t words[2][32][6];
};

// An asynchronous copy to shared memory, of 16 bytes or of as many zeros.
struct Copy {
  uint32_t to;
  const void* from;
  bool exists;
};

constexpr size_t kSharedBytes = 227 << 10;
alignas(1024) inline unsigned char shared[kSharedBytes];
inline size_t shared_in_use = 0;

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier block;
  ucontext_t scheduler;
  std::function<void()> body;
  int current = 0;
  int64_t progress = 0;
};
inline Machine machine;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

inline void wait(Barrier& barrier, int expected) {
  const int64_t generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++machine.progress;
    return;
  }
  while (barrier.generation == generation) {
    swapcontext(&machine.fibers[machine.current].context, &machine.scheduler);
  }
}

inline void enter() {
  machine.body();
  machine.fibers[machine.current].done = true;
  ++machine.progress;
}

inline void run_block(int threads) {
  machine.warps.assign(threads / 32, Warp{});
  machine.block = Barrier{};
  std::memset(shared, 0xff, sizeof shared);  // NaN in every format
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.done = false;
    fiber.copies.assign(1, {});
    fiber.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &machine.scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool any = true; any;) {
    any = false;
    const int64_t before = machine.progress;
    for (int i = 0; i < threads; ++i) {
      machine.current = reversed ? threads - 1 - i : i;
      Fiber& fiber = machine.fibers[machine.current];
      if (fiber.done) continue;
      any = true;
      threadIdx = fiber.index;
      swapcontext(&machine.scheduler, &fiber.context);
    }
    if (any && machine.progress == before) fail("a barrier or shuffle that not every thread reaches");
  }
}

}  // namespace emulation

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? emulation::multiprocessors
           : attribute == cudaDevAttrComputeCapabilityMajor ? emulation::capability
                                                            : 0;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= static_cast<int>(emulation::kSharedBytes) ? cudaSuccess : cudaErrorInvalidConfiguration;
}

inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline float __fdividef(float a, float b) { return a / b; }

inline void __syncwarp() { emulation::wait(emulation::machine.warps[emulation::machine.current / 32].barrier, 32); }

inline void __syncthreads() {
  emulation::wait(emulation::machine.block, static_cast<int>(blockDim.x * blockDim.y * blockDim.z));
}

inline float __shfl_down_sync(unsigned mask, float value, unsigned offset) {
  using emulation::machine;
  if (mask != 0xffffffffu) emulation::fail("shuffles of whole warps only");
  emulation::Warp& warp = machine.warps[machine.current / 32];
  const int lane = machine.current % 32;
  float* slot = warp.slot[warp.barrier.generation % 2];
  slot[lane] = value;
  emulation::wait(warp.barrier, 32);
  return lane + offset < 32 ? slot[lane + offset] : value;
}

inline uint32_t __shfl_up_sync(unsigned mask, uint32_t value, unsigned offset) {
  using emulation::machine;
  if (mask != 0xffffffffu) emulation::fail("shuffles of whole warps only");
  emulation::Warp& warp = machine.warps[machine.current / 32];
  const int lane = machine.current % 32;
  auto* slot = warp.words[warp.barrier.generation % 2];
  slot[lane][0] = value;
  emulation::wait(warp.barrier, 32);
  return lane >= static_cast<int>(offset) ? slot[lane - offset][0] : value;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const dim3 grid = config->gridDim, block = config->blockDim;
  const unsigned threads = block.x * block.y * block.z;
  if (!threads || threads > 1024 || !grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (threads % 32) emulation::fail("whole warps only");
  if (config->dynamicSmemBytes > emulation::kSharedBytes) return cudaErrorInvalidConfiguration;
  emulation::shared_in_use = config->dynamicSmemBytes;
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  emulation::machine.body = [&] { std::apply(kernel, values); };
  if (emulation::machine.fibers.size() < threads) emulation::machine.fibers.resize(threads);
  gridDim = grid;
  blockDim = block;
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned b = emulation::reversed ? blocks - 1 - i : i;
    blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    emulation::run_block(static_cast<int>(threads));
  }
  return cudaSuccess;
}
