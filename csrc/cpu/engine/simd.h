// Vectors as GCC and Clang have them, one width an instruction set. Included once in each of the isa_*.cpp.

#pragma once

#include <cstdint>
#include <cstring>

namespace fused_resnet::engine {
namespace {

typedef float V __attribute__((vector_size(kWidth * 4)));
typedef float Unaligned __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

inline V load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }
inline V splat(float v) { return v - V{}; }
// NaN stays NaN, as PyTorch has it: the comparison is false for it.
inline V relu(V v) { return v < V{} ? V{} : v; }
inline V max(V m, V v) { return (v > m) | (v != v) ? v : m; }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace fused_resnet::engine
