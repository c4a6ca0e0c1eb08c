// Device code of bn_act_pool and its backward: batch norm, ReLU and max-pool 3x3 stride 2 padding 1. Raw pointers, no
// torch header.
//
// Maps are laid out as in bn_act.cuh, and a thread owns V channels as there; its "rows" are walks: down some rows of
// windows in one column of windows. What a window shares with the one below it, it keeps: in the forward the largest
// values of a line of x, in the backward two windows' gradients. So every line of x is read by three columns of windows
// in the forward, whose threads are neighbours, and by one in the backward. No atomics: the same input gives the same
// bits.

#pragma once

#include <type_traits>

#include "../conv/sm80_ptx.cuh"
#include "bn_act.cuh"

namespace fused_resnet {

// Blocks on a multiprocessor: 128 registers a thread, of which what it loads takes the most; some 50 KB are in flight.
inline constexpr int kPoolBlocks = 2;
inline constexpr int kLost = 9;  // the winner of a window where nothing is above zero

// Maps of H x W, and of P x Q windows, of which a walk has `steps`; walks of an image: segments * Q.
struct PoolMaps {
  int height, width, p, q, steps, segments;
};

struct Walk {
  int64_t image;
  int q, p, end;

  __device__ Walk(const PoolMaps& maps, int64_t walk) {
    const int of = static_cast<int>(walk) / maps.q;
    q = static_cast<int>(walk) - of * maps.q;
    image = of / maps.segments;
    p = (of - static_cast<int>(image) * maps.segments) * maps.steps;
    end = min(p + maps.steps, maps.p);
  }
};

// A value after the ReLU and its place 3 * row + column in a window, as a number that is larger where PyTorch's pool
// prefers it: the larger value, of equal ones the first place; a NaN before all, of several the last. 0 is below all.
template <typename T>
struct Ranked {
  using Word = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  using Key = std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>;
  static constexpr Word kNaN = static_cast<Word>(~Word{0}) >> 1;
  static constexpr int kLast = 15;

  static __device__ Key of(float v, int place) {
    if (v != v) return Key{kNaN} << 4 | static_cast<Key>(place);
    return Key{rounded(v)} << 4 | static_cast<Key>(kLast - place);
  }

  // The bits of v as the pool would see it. Rounding two at once takes a quarter of the time of one.
  static __device__ uint32_t rounded(float v) {
    if constexpr (sizeof(T) == 2) {
      return ptx::pack(v, 0.0f, T{});
    } else {
      uint32_t word;
      memcpy(&word, &v, sizeof(word));
      return word;
    }
  }

  static __device__ bool is_nan(Key key) { return key >> 4 == kNaN; }

  // The same value, `places` earlier: in the window below.
  static __device__ Key earlier(Key key, int places) { return is_nan(key) ? key - places : key + places; }

  static __device__ T value(Key key) {
    const Word word = static_cast<Word>(key >> 4);
    T v;
    memcpy(&v, &word, sizeof(v));
    return v;
  }

  static __device__ uint8_t winner(Key key) {
    const int low = static_cast<int>(key) & 15;
    return static_cast<uint8_t>(key >> 4 == 0 ? kLost : is_nan(key) ? low : kLast - low);
  }
};

// Three neighbours in a line, the second of them at x, the others so far to its left and right. All loads come before
// any arithmetic: nothing is skipped, what is not there is read where something is.
template <int V, typename T>
__device__ void load_line(Pack<T, V> (&line)[3], const T* x, int64_t left, int64_t right) {
  line[0] = load<V>(x, -left);
  line[1] = load<V>(x, 0);
  line[2] = load<V>(x, right);
}

// y, winner: [N, P, Q, C]. The winner is 3 * row + column of the value that y is, in its window, or kLost.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kPoolBlocks)
    bn_act_pool_kernel(const T* __restrict__ x, const float* __restrict__ mean, const float* __restrict__ var,
                       const float* __restrict__ weight, const float* __restrict__ bias, float eps, T* __restrict__ y,
                       uint8_t* __restrict__ winner, PoolMaps maps, int64_t walks, int channels,
                       int64_t walks_per_block) {
  using Rank = Ranked<T>;
  using Key = typename Rank::Key;
  Slice<V> slice(walks, channels, walks_per_block);
  if (!slice.active) return;
  float center[V], scale[V], shift[V];
  load_normalization(center, scale, shift, mean, var, weight, bias, eps, slice.channel);
  const int64_t line_step = int64_t{maps.width} * channels;

  for (int64_t walk = slice.row; walk < slice.end; walk += slice.step) {
    Walk at(maps, walk);
    const bool left = at.q > 0, right = 2 * at.q + 1 < maps.width;
    const int64_t to_left = left ? channels : 0, to_right = right ? channels : 0;
    const T* middle = x + ((at.image * maps.height + 2 * at.p) * maps.width + 2 * at.q) * channels + slice.channel;
    int64_t out = ((at.image * maps.p + at.p) * maps.q + at.q) * channels + slice.channel;

    // best: the largest of each channel so far, from a line whose first place is `first`. No branches: a compiler would
    // move loads into them.
    const auto take = [&](Key(&best)[V], const Pack<T, V>(&line)[3], bool there, int first) {
#pragma unroll
      for (int s = 0; s < 3; ++s) {
        const bool counts = there && (s != 0 || left) && (s != 2 || right);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float v = (to_float(line[s].value[j]) - center[j]) * scale[j] + shift[j];
          const Key key = Rank::of(relu_of(v), first + s);
          best[j] = counts && key > best[j] ? key : best[j];
        }
      }
    };

    Key above[V] = {};
    if (at.p > 0) {
      Pack<T, V> line[3];
      load_line<V>(line, middle - line_step, to_left, to_right);
      take(above, line, true, 0);
    }
    // The lines of the next windows are on their way while these are compared.
    Pack<T, V> next[2][3];
    const auto fetch = [&](int p) {
      const T* const from = middle + (p - at.p) * 2 * line_step;
      load_line<V>(next[0], from, to_left, to_right);
      load_line<V>(next[1], from + (2 * p + 1 < maps.height ? line_step : 0), to_left, to_right);
    };
    fetch(at.p);
    for (int p = at.p; p < at.end; ++p) {
      const bool there = 2 * p + 1 < maps.height;
      Pack<T, V> line[2][3];
#pragma unroll
      for (int s = 0; s < 3; ++s) {
        line[0][s] = next[0][s];
        line[1][s] = next[1][s];
      }
      fetch(min(p + 1, at.end - 1));
      Key below[V] = {};
      take(above, line[0], true, 3);
      take(below, line[1], there, 6);
      Pack<T, V> largest;
      Pack<uint8_t, V> place;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const Key best = above[j] > below[j] ? above[j] : below[j];
        largest.value[j] = Rank::value(best);
        place.value[j] = Rank::winner(best);
        above[j] = Rank::earlier(below[j], 6);
      }
      store<V>(y, out, largest);
      store<V>(winner, out, place);
      out += int64_t{maps.q} * channels;
    }
  }
}

// Winners of V channels, which stay four to a register.
template <int V>
struct alignas(V) Places {
  using Word = std::conditional_t<V % 4 == 0, uint32_t, uint8_t>;
  static constexpr int kOf = sizeof(Word);
  Word word[V / kOf];

  __device__ int operator[](int j) const { return word[j / kOf] >> (8 * (j % kOf)) & 0xff; }
};

// A window's gradient and winner; of one that is not there, another's gradient and no winner.
template <typename T, int V>
struct PoolWindow {
  Pack<T, V> grad;
  Places<V> winner;

  __device__ void fetch(const T* of_grad, const uint8_t* of_winner, int64_t at, int64_t beyond, bool there) {
    const int64_t from = there ? at + beyond : at;
    grad = load<V>(of_grad, from);
    winner = *reinterpret_cast<const Places<V>*>(of_winner + from);
    if (there) return;
#pragma unroll
    for (auto& word : winner.word) word = static_cast<typename Places<V>::Word>(0x01010101u * kLost);
  }

  // Of channel j, for the value at this place of the window.
  __device__ float gradient(int j, int place) const { return winner[j] == place ? to_float(grad.value[j]) : 0.0f; }
};

// The four positions of x that are a window's own: its middle, what lies to the right, below, and below to the right.
// They lie in one, two, two and four windows.
template <typename T, int V>
struct PoolCell {
  static constexpr int kPositions = 4;
  Pack<T, V> x[kPositions];
  bool there[kPositions];
  int64_t offset[kPositions];
  PoolWindow<T, V> here, beside, under, across;

  // The pool's gradient at position i, of channel j.
  __device__ float gradient(int i, int j) const {
    if (i == 0) return here.gradient(j, 4);
    if (i == 1) return here.gradient(j, 5) + beside.gradient(j, 3);
    if (i == 2) return here.gradient(j, 7) + under.gradient(j, 1);
    return (here.gradient(j, 8) + beside.gradient(j, 6)) + (under.gradient(j, 2) + across.gradient(j, 0));
  }
};

// Calls f(cell) for every cell that a thread has.
template <typename T, int V, typename F>
__device__ void for_each_cell(const T* __restrict__ grad, const uint8_t* __restrict__ winner, const T* __restrict__ x,
                              const PoolMaps& maps, const Slice<V>& slice, int channels, const F& f) {
  const int64_t window_line = int64_t{maps.q} * channels, line = int64_t{maps.width} * channels;
  for (int64_t walk = slice.row; walk < slice.end; walk += slice.step) {
    Walk at(maps, walk);
    const bool right = 2 * at.q + 1 < maps.width, next = at.q + 1 < maps.q;
    int64_t from = ((at.image * maps.p + at.p) * maps.q + at.q) * channels + slice.channel;
    int64_t to = ((at.image * maps.height + 2 * at.p) * maps.width + 2 * at.q) * channels + slice.channel;
    PoolWindow<T, V> here, beside;
    here.fetch(grad, winner, from, 0, true);
    beside.fetch(grad, winner, from, channels, next);
    for (int p = at.p; p < at.end; ++p) {
      const bool below = 2 * p + 1 < maps.height, under = p + 1 < maps.p;
      PoolCell<T, V> cell;
      cell.here = here;
      cell.beside = beside;
      cell.under.fetch(grad, winner, from, window_line, under);
      cell.across.fetch(grad, winner, from, window_line + channels, next && under);
#pragma unroll
      for (int i = 0; i < cell.kPositions; ++i) {
        cell.there[i] = (i % 2 == 0 || right) && (i / 2 == 0 || below);
        cell.offset[i] = cell.there[i] ? to + i % 2 * int64_t{channels} + i / 2 * line : to;
        cell.x[i] = load<V>(x, cell.offset[i]);
      }
      f(cell);
      here = cell.under;
      beside = cell.across;
      from += window_line;
      to += 2 * line;
    }
  }
}

// partial: [2, splits, channels]: sum of g and of g * (x - mean), where g is the pool's gradient at x.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kPoolBlocks)
    bn_act_pool_bwd_partial_kernel(const T* __restrict__ grad, const uint8_t* __restrict__ winner,
                                   const T* __restrict__ x, const float* __restrict__ mean, float* __restrict__ partial,
                                   PoolMaps maps, int64_t walks, int channels, int64_t walks_per_block) {
  Slice<V> slice(walks, channels, walks_per_block);
  Sums<2> sums[V];
  if (slice.active) {
    float center[V];
    load_parameters(center, mean, slice.channel, 0.0f);
    for_each_cell<T, V>(grad, winner, x, maps, slice, channels, [&](const PoolCell<T, V>& cell) {
#pragma unroll
      for (int i = 0; i < cell.kPositions; ++i) {
        if (!cell.there[i]) continue;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float g = cell.gradient(i, j);
          sums[j].word[0] += g;
          sums[j].word[1] += g * (to_float(cell.x[i].value[j]) - center[j]);
        }
      }
    });
  }
  merge_rows(sums);
  store_partial<0>(partial, channels, slice, sums);
}

// dx from the pool's gradient and x, as bn_bwd_input_kernel tells.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kPoolBlocks)
    bn_act_pool_bwd_input_kernel(const T* __restrict__ grad, const uint8_t* __restrict__ winner,
                                 const T* __restrict__ x, const float* __restrict__ mean,
                                 const float* __restrict__ var, const float* __restrict__ weight,
                                 const float* __restrict__ sum_g, const float* __restrict__ dweight, float share,
                                 float eps, T* __restrict__ dx, PoolMaps maps, int64_t walks, int channels,
                                 int64_t walks_per_block) {
  Slice<V> slice(walks, channels, walks_per_block);
  if (!slice.active) return;
  float scale[V], center[V], flat[V], slope[V], variance[V];
  load_parameters(variance, var, slice.channel, 1.0f);
  load_parameters(scale, weight, slice.channel, 1.0f);
  load_parameters(center, mean, slice.channel, 0.0f);
  load_parameters(flat, sum_g, slice.channel, 0.0f);
  load_parameters(slope, dweight, slice.channel, 0.0f);
  // (g - flat - (x - center) * slope) * scale as g * scale + x * slope + flat: of the mean, 2^-24 are lost at most,
  // where x is known to 2^-12 of it. Not so in float32, where x - center stays.
  constexpr bool kFolds = sizeof(T) == 2;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float inv = rsqrtf(variance[j] + eps);
    scale[j] *= inv;
    slope[j] *= -inv * share * scale[j];
    flat[j] *= -share * scale[j];
    if (kFolds) flat[j] -= center[j] * slope[j];
  }
  for_each_cell<T, V>(grad, winner, x, maps, slice, channels, [&](const PoolCell<T, V>& cell) {
#pragma unroll
    for (int i = 0; i < cell.kPositions; ++i) {
      Pack<T, V> result;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float in = to_float(cell.x[i].value[j]);
        const float rest = (kFolds ? in : in - center[j]) * slope[j] + flat[j];
        result.value[j] = from_float<T>(cell.gradient(i, j) * scale[j] + rest);
      }
      if (cell.there[i]) store<V>(dx, cell.offset[i], result);
    }
  });
}

}  // namespace fused_resnet
