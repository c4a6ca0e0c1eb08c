// The functions of csrc/conv/sm80_ptx.cuh on the CPU, by the letter of the PTX manual: the layouts of ldmatrix and
// mma.sync, and copies that happen late (when they are waited for) or, if the machine runs in reverse, at once: a
// kernel that reads too soon sees NaN, one that overwrites too soon spoils what others still read.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fused_resnet::ptx {

inline unsigned char* shared_memory() { return emulation::shared; }

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulation::shared);
}

inline void run(const emulation::Copy& copy) {
  if (copy.to % 16 || copy.to + 16 > emulation::shared_in_use) emulation::fail("a copy outside of shared memory");
  if (copy.exists && reinterpret_cast<uintptr_t>(copy.from) % 16) emulation::fail("a copy from a misaligned address");
  if (copy.exists)
    std::memcpy(emulation::shared + copy.to, copy.from, 16);
  else
    std::memset(emulation::shared + copy.to, 0, 16);
}

inline auto& copies() { return emulation::machine.fibers[emulation::machine.current].copies; }

inline void copy_async(uint32_t to, const void* from, bool exists) {
  const emulation::Copy copy{to, from, exists};
  emulation::loads_at_once ? run(copy) : copies().back().push_back(copy);
}

inline void commit_copies() { copies().emplace_back(); }

template <int Pending>
void wait_for_copies() {
  for (auto& all = copies(); static_cast<int>(all.size()) > Pending + 1; all.pop_front())
    for (const emulation::Copy& copy : all.front()) run(copy);
}

// Every lane's words to all lanes of the warp.
inline uint32_t (*exchange(const uint32_t* words, int count))[6] {
  using emulation::machine;
  emulation::Warp& warp = machine.warps[machine.current / 32];
  auto* slot = warp.words[warp.barrier.generation % 2];
  std::memcpy(slot[machine.current % 32], words, 4 * count);
  emulation::wait(warp.barrier, 32);
  return slot;
}

inline void load_matrices(uint32_t (&r)[4], uint32_t row) {
  const auto* rows = exchange(&row, 1);
  const int lane = emulation::machine.current % 32;
  for (int i = 0; i < 4; ++i) {
    const uint32_t from = rows[i * 8 + lane / 4][0];
    if (from % 16 || from + 16 > emulation::shared_in_use) emulation::fail("a matrix outside of shared memory");
    std::memcpy(&r[i], emulation::shared + from + lane % 4 * 4, 4);
  }
}

inline void load_transposed(uint32_t (&r)[4], uint32_t row) {
  const auto* rows = exchange(&row, 1);
  const int lane = emulation::machine.current % 32;
  for (int i = 0; i < 4; ++i) {
    r[i] = 0;
    for (int j = 0; j < 2; ++j) {
      const uint32_t from = rows[i * 8 + lane % 4 * 2 + j][0];
      if (from % 16 || from + 16 > emulation::shared_in_use) emulation::fail("a matrix outside of shared memory");
      std::memcpy(reinterpret_cast<unsigned char*>(&r[i]) + 2 * j, emulation::shared + from + lane / 4 * 2, 2);
    }
  }
}

template <class T>
float value(uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(pair >> 16 * which);
  T v;
  std::memcpy(&v, &bits, 2);
  return static_cast<float>(v);
}

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto* all = exchange(words, 6);
  const int lane = emulation::machine.current % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t* of_a = all[row % 8 * 4 + k % 8 / 2];
      const uint32_t* of_b = all[column * 4 + k % 8 / 2];
      d[i] += value<T>(of_a[row / 8 + k / 8 * 2], k % 2) * value<T>(of_b[4 + k / 8], k % 2);
    }
  }
}

template <class T>
uint32_t pack(float low, float high, T) {
  const T values[2] = {T(low), T(high)};
  uint32_t pair;
  std::memcpy(&pair, values, 4);
  return pair;
}

template <class T>
float2 unpack(uint32_t pair, T) {
  return {value<T>(pair, 0), value<T>(pair, 1)};
}

template <class T>
uint32_t larger(uint32_t a, uint32_t b, T) {
  const auto one = [&](int i) {
    const float of_a = value<T>(a, i), of_b = value<T>(b, i);
    return of_a != of_a || of_a > of_b || (of_a == of_b && !std::signbit(of_a)) ? of_a : of_b;
  };
  return pack(one(0), one(1), T{});
}

constexpr uint32_t lowest(__half) { return 0xfc00fc00u; }
constexpr uint32_t lowest(__nv_bfloat16) { return 0xff80ff80u; }

inline void store_16_bytes(void* to, const uint4& value) {
  if (reinterpret_cast<uintptr_t>(to) % 16) emulation::fail("a store to a misaligned address");
  // A thread may have waited for one that has: for what that one fetched.
  if (!emulation::machine.waited[emulation::machine.block()])
    emulation::fail("memory is written before the kernels that may read it have ended");
  std::memcpy(to, &value, 16);
}

inline uint4 load_16_bytes(const void* from, bool exists) {
  if (!exists) return {};
  if (reinterpret_cast<uintptr_t>(from) % 16) emulation::fail("a load from a misaligned address");
  if (!emulation::machine.fibers[emulation::machine.current].waited)
    emulation::fail("memory is read before the kernel that writes it has ended");
  uint4 value;
  std::memcpy(&value, from, 16);
  return value;
}

inline void opaque(uint32_t&) {}
inline void opaque(int&) {}

inline void launch_dependents() {}

inline void wait_for_kernels() {
  using emulation::machine;
  machine.fibers[machine.current].waited = machine.waited[machine.block()] = true;
}

inline float at_least(float value, float floor) { return value < floor ? floor : value; }

}  // namespace fused_resnet::ptx
