// A stand-in for the CUDA runtime that runs kernels on the CPU: what csrc/*.cu needs, no more. The threads of a block
// are fibers on one thread; a barrier or a shuffle switches to the next. Clusters of blocks run one after another, the
// blocks of one together, each with a shared memory of its own.
//
// What it proves: indices, geometry, arithmetic, that every thread reaches every barrier and shuffle. Run in both
// orders, it tells a result that depends on the order of threads or blocks: a missing barrier, a race. What it cannot:
// memory ordering, speed.

#pragma once

#include <ucontext.h>

#include <algorithm>
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

using std::max;
using std::min;

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
struct alignas(16) float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error ? "invalid configuration argument" : "no error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

// Set from outside: how many multiprocessors the device has, and whether blocks and threads run last to first.
inline int multiprocessors = 4;
inline bool reversed = false;
inline bool loads_at_once = false, products_at_once = false;  // or as late as may be
inline int capability = 8;

struct Copy;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  dim3 index;
  bool done = true;
  bool waited = true;          // for the kernels before, if this one overlaps them
  int64_t cluster_generation;  // of the cluster's barrier, when it arrived there
  std::deque<std::vector<struct Copy>> copies;  // groups under way, and the one that is not committed
};

struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  uint32_t words[2][32][6];  // two, so that one barrier a shuffle is enough
};

// An asynchronous copy to shared memory, of 16 bytes or of as many zeros.
struct Copy {
  uint32_t to;
  const void* from;
  bool exists;
};

constexpr size_t kSharedBytes = 227 << 10;
constexpr int kMostBlocks = 8;  // of a cluster
alignas(1024) inline unsigned char memories[kMostBlocks][kSharedBytes + 1024];
inline unsigned char* shared = memories[0];  // of the block whose thread runs
inline size_t shared_in_use = 0;

struct Machine {
  std::vector<Fiber> fibers;  // of a cluster's blocks, block after block
  std::vector<Warp> warps;
  Barrier blocks[kMostBlocks], cluster;
  ucontext_t scheduler;
  std::function<void()> body;
  int threads = 0, fibers_in_use = 0;  // of a block, of a cluster
  int free_registers[kMostBlocks];     // of a block's threads that gave some back
  bool waited[kMostBlocks];            // whether a thread of a block has, for the kernels before
  int current = 0;
  int64_t progress = 0;

  int block() const { return current / threads; }
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

inline dim3 at_of(unsigned i, const dim3& size) {
  return dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
}

// The blocks from the first on, in the order in which a grid counts them.
inline void run_cluster(unsigned first, int blocks, int threads, bool overlaps) {
  machine.threads = threads;
  machine.fibers_in_use = blocks * threads;
  if (static_cast<int>(machine.fibers.size()) < machine.fibers_in_use) machine.fibers.resize(machine.fibers_in_use);
  machine.warps.assign(machine.fibers_in_use / 32, Warp{});
  machine.cluster = Barrier{};
  for (int block = 0; block < blocks; ++block) {
    machine.blocks[block] = Barrier{};
    machine.free_registers[block] = 0;
    machine.waited[block] = !overlaps;
    std::memset(memories[block], 0xff, kSharedBytes);  // NaN in every format
  }
  int left[kMostBlocks];
  std::fill_n(left, blocks, threads);
  for (int i = 0; i < machine.fibers_in_use; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.done = false;
    fiber.waited = !overlaps;
    fiber.copies.assign(1, {});
    fiber.index = at_of(i % threads, blockDim);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &machine.scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool any = true; any;) {
    any = false;
    const int64_t before = machine.progress;
    for (int i = 0; i < machine.fibers_in_use; ++i) {
      machine.current = reversed ? machine.fibers_in_use - 1 - i : i;
      Fiber& fiber = machine.fibers[machine.current];
      if (fiber.done) continue;
      any = true;
      threadIdx = fiber.index;
      blockIdx = at_of(first + machine.block(), gridDim);
      shared = memories[machine.block()];
      swapcontext(&machine.scheduler, &fiber.context);
      // What a block had is gone with it: who still reads it sees NaN.
      if (fiber.done && --left[machine.block()] == 0) std::memset(shared, 0xff, kSharedBytes);
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

struct cudaFuncAttributes {
  int ptxVersion = 0;
};

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}

inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline float __fdividef(float a, float b) { return a / b; }

inline void __syncwarp() { emulation::wait(emulation::machine.warps[emulation::machine.current / 32].barrier, 32); }

inline void __syncthreads() {
  emulation::wait(emulation::machine.blocks[emulation::machine.block()], emulation::machine.threads);
}

// What the lane `from` of the warp gives, or the own value where there is no such lane.
inline uint32_t shuffled(unsigned mask, uint32_t value, int from) {
  using emulation::machine;
  if (mask != 0xffffffffu) emulation::fail("shuffles of whole warps only");
  emulation::Warp& warp = machine.warps[machine.current / 32];
  auto* slot = warp.words[warp.barrier.generation % 2];
  slot[machine.current % 32][0] = value;
  emulation::wait(warp.barrier, 32);
  return from >= 0 && from < 32 ? slot[from][0] : value;
}

inline float __shfl_down_sync(unsigned mask, float value, unsigned offset) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = shuffled(mask, bits, emulation::machine.current % 32 + static_cast<int>(offset));
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t __shfl_up_sync(unsigned mask, uint32_t value, unsigned offset) {
  return shuffled(mask, value, emulation::machine.current % 32 - static_cast<int>(offset));
}

inline uint32_t __shfl_xor_sync(unsigned mask, uint32_t value, unsigned distance) {
  return shuffled(mask, value, emulation::machine.current % 32 ^ static_cast<int>(distance));
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
  gridDim = grid;
  blockDim = block;
  unsigned cluster = 1;
  bool overlaps = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      overlaps = attribute.val.programmaticStreamSerializationAllowed;
    else
      cluster = attribute.val.clusterDim.x;
  }
  if (cluster < 1 || cluster > emulation::kMostBlocks || grid.x % cluster) return cudaErrorInvalidConfiguration;
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (unsigned i = 0; i < blocks; i += cluster)
    emulation::run_cluster(emulation::reversed ? blocks - cluster - i : i, cluster, threads, overlaps);
  return cudaSuccess;
}
