// The instructions of sm_90a that a warp-specialised kernel is made of: barriers in shared memory, the tensor memory
// accelerator, wgmma. tests/cuda_emulation has the same functions for the CPU.
//
// A tile is 64 rows of 64 16-bit values, 128 bytes a row, swizzled as the accelerator writes it: 8 KiB.

#pragma once

#ifndef FUSED_RESNET_EMULATED

#include <cuda.h>

#include <cstdint>

#include "sm80_ptx.cuh"

namespace fused_resnet::ptx {

constexpr int kTileBytes = 64 * 64 * 2;

// A barrier in shared memory, by its address.
__device__ inline void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

// What was initialised is seen by the accelerator; before a __syncthreads().
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }

__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Arrives, and keeps the barrier's phase open until so many bytes have come.
__device__ inline void arrive_and_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of this parity is over.
__device__ inline void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The window (r, s) of 64 output positions from the pixel (w, h, n) on, 64 channels from c on.
__device__ inline void load_im2col(const CUtensorMap* map, uint32_t to, uint32_t barrier, int c, int w, int h, int n,
                                   int s, int r) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], "
      "[%2], {%7, %8};\n" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n), "h"(static_cast<uint16_t>(s)),
      "h"(static_cast<uint16_t>(r))
      : "memory");
}

// 64 channels from c on of as many rows as the map's box has.
__device__ inline void load_tiled(const CUtensorMap* map, uint32_t to, uint32_t barrier, int c, int tap, int row) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];\n" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c), "r"(tap), "r"(row)
      : "memory");
}

// The same into L2 alone: what will soon be loaded.
__device__ inline void prefetch_tiled(const CUtensorMap* map, int c, int tap, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global [%0, {%1, %2, %3}];\n" ::"l"(map), "r"(c), "r"(tap), "r"(row)
               : "memory");
}

// As many pixels of a line of an image as the map's box has, from column w on, 64 channels from c on.
__device__ inline void load_line(const CUtensorMap* map, uint32_t to, uint32_t barrier, int c, int w, int h, int n) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];\n" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n)
      : "memory");
}

// Dense memory into L2, a multiple of 16 bytes at such a one.
__device__ inline void prefetch_dense(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(from), "r"(bytes) : "memory");
}

// What this thread wrote to shared memory comes before what the accelerator will write there, and wgmma will read.
__device__ inline void fence_shared_writes() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Soon to be used: a map takes as long to come as what it describes.
__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// All threads of a cluster's blocks: they have begun, and their barriers are what publish_barriers() left.
__device__ inline void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.relaxed;\n" ::: "memory"); }
__device__ inline void wait_for_cluster() { asm volatile("barrier.cluster.wait;\n" ::: "memory"); }

// Where what is at `address` in this block is in another one of the cluster.
__device__ inline uint32_t address_in_block(uint32_t address, int block) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(there) : "r"(address), "r"(block));
  return there;
}

// Two values into another block, and 8 bytes to its barrier; both by address_in_block().
__device__ inline void push(uint32_t to, float a, float b, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];\n" ::"r"(to), "f"(a),
               "f"(b), "r"(barrier)
               : "memory");
}

// Until the phase of this parity is over, of a barrier that other blocks push to.
__device__ inline void wait_for_pushes(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ inline void barrier_of(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// The operand's descriptor: the sixteenth `part` of a tile's 64 columns, for all its rows (groups of eight are 1 KiB
// apart, swizzled over 128 bytes).
__device__ inline uint64_t operand(uint32_t tile, int part) {
  constexpr uint64_t swizzle_128 = uint64_t{1} << 62, stride = uint64_t{1024 >> 4} << 32, unused = uint64_t{1} << 16;
  return swizzle_128 | stride | unused | ((tile & 0x3ffff) >> 4) + 2 * part;
}

// Operands at a distance from one that is known: nothing is reckoned but the sum.
__device__ inline uint64_t operand(uint64_t first, int tile, int part) {
  return first + static_cast<uint64_t>(tile * (kTileBytes >> 4) + 2 * part);
}

// The same in all threads of a warp, and the compiler may know it.
__device__ inline uint32_t uniform(uint32_t value) { return __shfl_sync(0xffffffffu, value, 0); }

// Of each thread, for a whole warp group: registers go from those that fetch to those that compute.
template <int Registers>
__device__ inline void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(Registers));
}

template <int Registers>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(Registers));
}

__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

template <int Pending>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(Pending) : "memory");
}

// Registers that products read or write: nothing is moved across this.
template <int N>
__device__ inline void pin(float (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

template <int N>
__device__ inline void pin(uint32_t (&r)[N][4]) {
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) asm volatile("" : "+r"(r[i / 4][i % 4])::"memory");
}

template <class T>
constexpr bool is_half = false;
template <>
constexpr bool is_half<__half> = true;

#define FUSED_RESNET_SUMS(d)                                                                                  \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define FUSED_RESNET_SUMS_NAMED                                                                                \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define FUSED_RESNET_PRODUCT(type) \
  "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " FUSED_RESNET_SUMS_NAMED

// d [64, 64] (+)= a [64, 16] * b [64, 16]^T over a warp group, both in shared memory. What a thread has of d: of row
// 16 * warp + lane / 4 (values 4j, 4j + 1) and the row eight further (4j + 2, 4j + 3) the columns 8j + 2 * (lane % 4)
// and the next.
template <class T>
__device__ inline void multiply(float (&d)[32], uint64_t a, uint64_t b, bool add) {
  const int adds = add;
  if constexpr (is_half<T>)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" FUSED_RESNET_PRODUCT("f16") ", %32, %33, p, 1, 1, 0, 0;\n}\n"
        : FUSED_RESNET_SUMS(d)
        : "l"(a), "l"(b), "r"(adds));
  else
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" FUSED_RESNET_PRODUCT("bf16") ", %32, %33, p, 1, 1, 0, 0;\n}\n"
        : FUSED_RESNET_SUMS(d)
        : "l"(a), "l"(b), "r"(adds));
}

// The same with a in registers: of the thread's two rows the columns 2 * (lane % 4) and the next (a[0], a[1]), and
// those eight further (a[2], a[3]).
template <class T>
__device__ inline void multiply(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  const int adds = add;
  if constexpr (is_half<T>)
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n" FUSED_RESNET_PRODUCT(
                     "f16") ", {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"
                 : FUSED_RESNET_SUMS(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));
  else
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n" FUSED_RESNET_PRODUCT(
                     "bf16") ", {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"
                 : FUSED_RESNET_SUMS(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));
}

}  // namespace fused_resnet::ptx

#endif
