// A 128-bit keyed universal hash of a byte range, built to run at memory speed.
//
// The bytes are read as 4 KiB blocks. A block goes through NH (Black et al., "UMAC: Fast and Secure Message
// Authentication", CRYPTO '99): with 32-bit words m and key words k,
//     NH(m) = sum over i of (m[2i] + k[2i] mod 2^32) * (m[2i+1] + k[2i+1] mod 2^32)   mod 2^64.
// The block's 64 bits are then two words of a multilinear hash with 64-bit keys that depend on the block's index:
//     H = sum over b of K[2b] * low(NH_b) + K[2b+1] * high(NH_b)   mod 2^64,
// to which the length, and whatever else tells inputs apart, add words of their own. Two lanes with independent keys
// give 128 bits.
//
// Collisions: for two different inputs and random keys, NH of a block that differs agrees with probability at most
// 2^-32; if it does not agree, the multilinear sum does with probability at most 2^-33 (the difference of two 32-bit
// words has at most 31 factors of two). So a lane collides with probability below 2^-31, both lanes below 2^-62. The
// keys are fixed (splitmix64), so this is a bound for inputs that know nothing of the keys, weights for instance; it is
// no defence against a forger.
//
// All sums are modulo 2^64: blocks may be added in any order, by any number of threads, with the same result.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fused_resnet {

inline constexpr size_t kHashBlock = 4096;
inline constexpr int kHashLanes = 2;

struct Hash128 {
  uint64_t lane[kHashLanes] = {0, 0};
};

namespace hash128 {

constexpr uint64_t splitmix64(uint64_t seed, uint64_t index) {
  uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// Digits of pi: nothing up the sleeve.
inline constexpr uint64_t kBlockSeed[kHashLanes] = {0x243f6a8885a308d3ull, 0x13198a2e03707344ull};
inline constexpr uint64_t kOrderSeed[kHashLanes] = {0xa4093822299f31d0ull, 0x082efa98ec4e6c89ull};
inline constexpr uint64_t kWordSeed[kHashLanes] = {0x452821e638d01377ull, 0xbe5466cf34e90c6cull};

struct alignas(64) Keys {
  uint64_t word[kHashLanes][kHashBlock / 8];
  constexpr Keys() : word() {
    for (int lane = 0; lane < kHashLanes; ++lane)
      for (size_t i = 0; i < kHashBlock / 8; ++i) word[lane][i] = splitmix64(kBlockSeed[lane], i);
  }
};
inline constexpr Keys kKeys;

// Both lanes of NH over `words` 64-bit words, a multiple of 8; every word of the input is read once.
inline void nh_portable(const unsigned char* data, size_t words, uint64_t out[kHashLanes]) {
  uint64_t sum[kHashLanes] = {0, 0};
  for (size_t i = 0; i < words; ++i) {
    uint64_t m;
    std::memcpy(&m, data + 8 * i, 8);
    for (int lane = 0; lane < kHashLanes; ++lane) {
      const uint64_t k = kKeys.word[lane][i];
      const uint32_t low = static_cast<uint32_t>(m) + static_cast<uint32_t>(k);
      const uint32_t high = static_cast<uint32_t>(m >> 32) + static_cast<uint32_t>(k >> 32);
      sum[lane] += static_cast<uint64_t>(low) * high;
    }
  }
  out[0] = sum[0];
  out[1] = sum[1];
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) inline void nh_avx2(const unsigned char* data, size_t words, uint64_t out[kHashLanes]) {
  __m256i sum[kHashLanes][2] = {};
  for (size_t i = 0; i < words; i += 8) {
    // A block ahead, over the page boundary at which the hardware's own prefetcher stops: on one thread this more than
    // doubled the speed. A prefetch beyond the end does not fault.
    _mm_prefetch(reinterpret_cast<const char*>(data) + 8 * i + kHashBlock, _MM_HINT_T1);
    for (int half = 0; half < 2; ++half) {
      const size_t at = i + 4 * half;
      const __m256i m = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + 8 * at));
      for (int lane = 0; lane < kHashLanes; ++lane) {
        const __m256i k = _mm256_load_si256(reinterpret_cast<const __m256i*>(&kKeys.word[lane][at]));
        const __m256i keyed = _mm256_add_epi32(m, k);
        const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
        sum[lane][half] = _mm256_add_epi64(sum[lane][half], product);
      }
    }
  }
  for (int lane = 0; lane < kHashLanes; ++lane) {
    alignas(32) uint64_t part[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(part), _mm256_add_epi64(sum[lane][0], sum[lane][1]));
    out[lane] = part[0] + part[1] + part[2] + part[3];
  }
}
#endif

inline void nh(const unsigned char* data, size_t words, uint64_t out[kHashLanes]) {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2");
  if (avx2) return nh_avx2(data, words, out);
#endif
  nh_portable(data, words, out);
}

inline uint64_t multilinear(uint64_t seed, uint64_t index, uint64_t value) {
  return splitmix64(seed, 2 * index) * static_cast<uint32_t>(value) + splitmix64(seed, 2 * index + 1) * (value >> 32);
}

}  // namespace hash128

inline size_t hash_blocks(size_t bytes) { return (bytes + kHashBlock - 1) / kHashBlock; }

// What the blocks [first, last) of an input add to its hash.
inline Hash128 hash_range(const void* input, size_t bytes, size_t first, size_t last) {
  Hash128 hash;
  const unsigned char* data = static_cast<const unsigned char*>(input);
  for (size_t block = first; block < last; ++block) {
    const unsigned char* at = data + block * kHashBlock;
    const size_t rest = bytes - block * kHashBlock;
    uint64_t sums[kHashLanes];
    if (rest >= kHashBlock) {
      hash128::nh(at, kHashBlock / 8, sums);
    } else {
      // Zero padding: the length, hashed as well, tells it from zeros that were there.
      alignas(64) unsigned char padded[kHashBlock];
      const size_t size = (rest + 63) / 64 * 64;
      std::memcpy(padded, at, rest);
      std::memset(padded + rest, 0, size - rest);
      hash128::nh(padded, size / 8, sums);
    }
    for (int lane = 0; lane < kHashLanes; ++lane)
      hash.lane[lane] += hash128::multilinear(hash128::kOrderSeed[lane], block, sums[lane]);
  }
  return hash;
}

// What a word beside the bytes adds to it; index 0 is the length.
inline Hash128 hash_word(size_t index, uint64_t value) {
  Hash128 hash;
  for (int lane = 0; lane < kHashLanes; ++lane)
    hash.lane[lane] = hash128::multilinear(hash128::kWordSeed[lane], index, value);
  return hash;
}

}  // namespace fused_resnet
