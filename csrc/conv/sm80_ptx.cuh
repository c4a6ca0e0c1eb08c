// The few instructions of sm_80 that a convolution is made of. tests/cuda_emulation has the same functions for the CPU.

#pragma once

#ifndef FUSED_RESNET_EMULATED

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fused_resnet::ptx {

// At a multiple of 1024 bytes, over which the accelerator of sm_90 swizzles.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

// Of 32 bits: half the registers of a pointer.
__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copies 16 bytes behind the thread's back, or writes 16 zeros where there is nothing to read.
__device__ inline void copy_async(uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(exists ? 16 : 0)
               : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Until at most `Pending` of the groups committed last are on their way.
template <int Pending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

// Four 8x8 matrices of 16-bit values: lane i gives the address of row i % 8 of matrix i / 8, and gets of each matrix
// the values 2 * (i % 4) and the next of row i / 4.
__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// The same of the matrices' transposes: of each the values 2 * (i % 4) and the next of column i / 4.
__device__ inline void load_transposed(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// d [16, 8] += a [16, 16] * b [8, 16]^T, over a warp.
template <class T>
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void multiply_add<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32_t pack(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ inline uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ inline float2 unpack(uint32_t pair, __half) { return __half22float2(reinterpret_cast<__half2&>(pair)); }

__device__ inline float2 unpack(uint32_t pair, __nv_bfloat16) {
  return __bfloat1622float2(reinterpret_cast<__nv_bfloat162&>(pair));
}

// In one instruction: left to itself the compiler may make four of it.
__device__ inline void store_16_bytes(void* to, const uint4& value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// 16 bytes that are read once, or zeros where there is nothing to read.
__device__ inline uint4 load_16_bytes(const void* from, bool exists) {
  uint4 value;
  asm volatile(
      "{\n"
      ".reg .pred there;\n"
      "setp.ne.b32 there, %5, 0;\n"
      "mov.b32 %0, 0;\n"
      "mov.b32 %1, 0;\n"
      "mov.b32 %2, 0;\n"
      "mov.b32 %3, 0;\n"
      "@there ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "=&r"(value.x), "=&r"(value.y), "=&r"(value.z), "=&r"(value.w)
      : "l"(from), "r"(static_cast<int>(exists))
      : "memory");
  return value;
}

// The larger of each two values, a NaN if one of them is.
__device__ inline uint32_t larger(uint32_t a, uint32_t b, __half) {
  uint32_t y;
  asm("max.NaN.f16x2 %0, %1, %2;\n" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

__device__ inline uint32_t larger(uint32_t a, uint32_t b, __nv_bfloat16) {
  uint32_t y;
  asm("max.NaN.bf16x2 %0, %1, %2;\n" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

// Two times -inf.
__device__ constexpr uint32_t lowest(__half) { return 0xfc00fc00u; }
__device__ constexpr uint32_t lowest(__nv_bfloat16) { return 0xff80ff80u; }

// The next kernel of the stream may start, if it was launched to overlap this one: it waits for what this one writes.
__device__ inline void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Until the kernels before have ended and what they wrote can be read; at once where this one does not overlap them.
__device__ inline void wait_for_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// A value of which the compiler knows nothing from here on.
__device__ inline void opaque(uint32_t& value) { asm volatile("" : "+r"(value)); }
__device__ inline void opaque(int& value) { asm volatile("" : "+r"(value)); }

// PyTorch's ReLU, or nothing: a NaN stays one.
__device__ inline float at_least(float value, float floor) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(y) : "f"(value), "f"(floor));
  return y;
}

}  // namespace fused_resnet::ptx

#endif
