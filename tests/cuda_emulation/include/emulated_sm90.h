// The functions of csrc/conv/sm90_ptx.cuh and tensor_map.h on the CPU, by the letter of the PTX manual: barriers with
// phases, pending arrivals and pending bytes; the tensor memory accelerator in im2col and tiled mode, swizzling what it
// writes; wgmma on descriptors of swizzled tiles, and with its left operand in registers.
//
// Loads and products happen late, when they are waited for, or, if the machine runs in reverse, at once: loads, and
// products as well unless they are to stay late, when they read what came too early.

#pragma once

#include <array>

#include "conv/geometry.h"
#include "emulated_ptx.h"

#define __grid_constant__

enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };

struct CUtensorMap {
  const unsigned char* data = nullptr;
  enum { windows_, tiles_, lines_ } kind = windows_;
  fused_resnet::conv::Im2col windows;
  fused_resnet::conv::Tiled tiles;
  fused_resnet::conv::Lines lines;
};

namespace fused_resnet::conv {

inline cudaError_t encode(CUtensorMap& map, const void* data, const Im2col& like, CUtensorMapDataType) {
  const bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && like.bytes[0] % 16 == 0 && like.channels <= 256 &&
                    like.pixels <= 1024;
  map = {static_cast<const unsigned char*>(data), CUtensorMap::windows_, like, {}, {}};
  return fits ? cudaSuccess : cudaErrorInvalidConfiguration;
}

inline cudaError_t encode(CUtensorMap& map, const void* data, const Tiled& like, CUtensorMapDataType) {
  const bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && like.bytes[0] % 16 == 0 && like.box[2] <= 256;
  map = {static_cast<const unsigned char*>(data), CUtensorMap::tiles_, {}, like, {}};
  return fits ? cudaSuccess : cudaErrorInvalidConfiguration;
}

inline cudaError_t encode(CUtensorMap& map, const void* data, const Lines& like, CUtensorMapDataType) {
  const bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && like.bytes[0] % 16 == 0 && like.box[0] == 64 &&
                    like.box[1] <= 256 && like.box[2] == 1 && like.box[3] == 1;
  map = {static_cast<const unsigned char*>(data), CUtensorMap::lines_, {}, {}, like};
  return fits ? cudaSuccess : cudaErrorInvalidConfiguration;
}

}  // namespace fused_resnet::conv

namespace fused_resnet::ptx {

constexpr int kTileBytes = 64 * 64 * 2;

template <class T>
constexpr bool is_half = std::is_same_v<T, __half>;

struct Mbarrier {
  int32_t bytes;
  uint8_t arrivals, pending, phase, used;
};
static_assert(sizeof(Mbarrier) == 8);

inline Mbarrier& mbarrier(uint32_t at) {
  if (at % 8 || at + 8 > emulation::shared_in_use) emulation::fail("a barrier outside of shared memory");
  return *reinterpret_cast<Mbarrier*>(emulation::shared + at);
}

// Under way: their block and its barrier, what they do.
inline std::vector<std::pair<std::pair<int, uint32_t>, std::function<void()>>> loads;

inline void init_barrier(uint32_t at, int arrivals) {
  mbarrier(at) = {0, static_cast<uint8_t>(arrivals), static_cast<uint8_t>(arrivals), 0, 1};
}

inline void publish_barriers() {}
inline void fence_shared_writes() {}

// Registers that a block was launched with and a thread has given back: who takes more waits for them.
inline int launched_with() { return 65536 / emulation::machine.threads / 8 * 8; }

template <int Registers>
void keep_registers() {
  emulation::machine.free_registers[emulation::machine.block()] += launched_with() - Registers;
  ++emulation::machine.progress;
}

template <int Registers>
void take_registers() {
  using emulation::machine;
  const int more = Registers - launched_with(), current = machine.current;
  int& free = machine.free_registers[machine.block()];
  while (free < more) swapcontext(&machine.fibers[current].context, &machine.scheduler);
  free -= more;
  ++machine.progress;
}

inline void settle(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.arrivals;
}

inline void arrive_and_expect(uint32_t at, uint32_t bytes) {
  Mbarrier& barrier = mbarrier(at);
  if (!barrier.used || !barrier.pending) emulation::fail("an arrival that the barrier does not expect");
  barrier.bytes += static_cast<int32_t>(bytes);
  --barrier.pending;
  settle(barrier);
  ++emulation::machine.progress;
}

inline void arrive(uint32_t at) { arrive_and_expect(at, 0); }

inline void run_loads(uint32_t at) {
  for (size_t i = 0; i < loads.size();) {
    if (loads[i].first != std::pair(emulation::machine.block(), at)) {
      ++i;
      continue;
    }
    const auto load = std::move(loads[i].second);
    loads.erase(loads.begin() + i);
    load();
    ++emulation::machine.progress;
  }
}

inline void wait(uint32_t at, uint32_t parity) {
  for (;;) {
    run_loads(at);
    if (mbarrier(at).phase != parity) return;
    using emulation::machine;
    swapcontext(&machine.fibers[machine.current].context, &machine.scheduler);
  }
}

// 128 bytes of a row where the accelerator puts them.
inline void put_row(uint32_t tile, int row, const unsigned char (&bytes)[128]) {
  for (int chunk = 0; chunk < 8; ++chunk)
    std::memcpy(emulation::shared + tile + row * 128 + (chunk ^ (row & 7)) * 16, bytes + chunk * 16, 16);
}

inline void later(uint32_t to, uint32_t barrier, std::function<void()> rows, int bytes = kTileBytes) {
  if (to % 1024 || to + bytes > emulation::shared_in_use) emulation::fail("a tile outside of shared memory");
  auto load = [=] {
    rows();
    mbarrier(barrier).bytes -= bytes;
    settle(mbarrier(barrier));
  };
  if (emulation::loads_at_once)
    load();
  else
    loads.emplace_back(std::pair(emulation::machine.block(), barrier), load);
}

inline void load_im2col(const CUtensorMap* map, uint32_t to, uint32_t barrier, int c, int w, int h, int n, int s,
                        int r) {
  if (map->kind != CUtensorMap::windows_) emulation::fail("another map in im2col mode");
  if (!emulation::machine.fibers[emulation::machine.current].waited)
    emulation::fail("a map is read before the kernel that writes it has ended");
  const auto& m = map->windows;
  later(to, barrier, [=, &m] {
    const int size[4] = {int(m.size[0]), int(m.size[1]), int(m.size[2]), int(m.size[3])};
    int x = w, y = h, image = n;
    for (unsigned pixel = 0; pixel < m.pixels; ++pixel) {
      unsigned char row[128] = {};
      const int column = x + s, line = y + r;
      if (column >= 0 && column < size[1] && line >= 0 && line < size[2] && image >= 0 && image < size[3])
        for (int i = 0; i < 64 && c + i < size[0]; ++i)
          std::memcpy(row + 2 * i,
                      map->data + 2 * (c + i) + column * m.bytes[0] + line * m.bytes[1] + image * m.bytes[2], 2);
      put_row(to, pixel, row);
      x += int(m.stride[1]);
      if (x <= size[1] - 1 + m.upper[0]) continue;
      x = m.lower[0];
      y += int(m.stride[2]);
      if (y <= size[2] - 1 + m.upper[1]) continue;
      y = m.lower[1];
      ++image;
    }
  });
}

inline void load_tiled(const CUtensorMap* map, uint32_t to, uint32_t barrier, int c, int tap, int first) {
  if (map->kind != CUtensorMap::tiles_) emulation::fail("another map in tiled mode");
  const auto& t = map->tiles;
  const auto rows = [=, &t] {
    for (unsigned i = 0; i < t.box[2]; ++i) {
      unsigned char row[128] = {};
      const uint64_t k = first + i;
      if (uint64_t(tap) < t.size[1] && k < t.size[2])
        for (uint64_t j = 0; j < 64 && c + j < t.size[0]; ++j)
          std::memcpy(row + 2 * j, map->data + 2 * (c + j) + tap * t.bytes[0] + k * t.bytes[1], 2);
      put_row(to, i, row);
    }
  };
  later(to, barrier, rows, 128 * t.box[2]);
}

inline void load_line(const CUtensorMap* map, uint32_t to, uint32_t barrier, int c, int w, int h, int n) {
  if (map->kind != CUtensorMap::lines_) emulation::fail("another map as lines");
  if (!emulation::machine.fibers[emulation::machine.current].waited)
    emulation::fail("a map is read before the kernel that writes it has ended");
  const auto& m = map->lines;
  const auto rows = [=, &m] {
    const bool exists = h >= 0 && uint64_t(h) < m.size[2] && uint64_t(n) < m.size[3];
    for (int i = 0; i < int(m.box[1]); ++i) {
      unsigned char row[128] = {};
      if (exists && w + i >= 0 && uint64_t(w + i) < m.size[1])
        std::memcpy(row, map->data + 2 * c + (w + i) * m.bytes[0] + h * m.bytes[1] + n * m.bytes[2], 128);
      put_row(to, i, row);
    }
  };
  later(to, barrier, rows, 128 * m.box[1]);
}

inline void prefetch_tiled(const CUtensorMap* map, int, int, int) {
  if (map->kind != CUtensorMap::tiles_) emulation::fail("another map in tiled mode");
}

// Only what is there: on a GPU as well, it would be a fault of the kernel's.
inline void prefetch_dense(const void* from, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16) emulation::fail("a prefetch that is not aligned");
  if (!emulation::machine.fibers[emulation::machine.current].waited)
    emulation::fail("memory is read before the kernel that writes it has ended");
  volatile unsigned char sum = 0;
  for (uint32_t i = 0; i < bytes; ++i) sum ^= static_cast<const unsigned char*>(from)[i];
}

inline std::array<std::array<emulation::Barrier, 16>, emulation::kMostBlocks> named;  // of each block

inline void barrier_of(int id, int threads) { emulation::wait(named[emulation::machine.block()][id], threads); }

inline void prefetch_map(const CUtensorMap*) {}

inline void arrive_at_cluster() {
  using emulation::machine;
  machine.fibers[machine.current].cluster_generation = machine.cluster.generation;
  if (++machine.cluster.arrived < machine.fibers_in_use) return;
  machine.cluster.arrived = 0;
  ++machine.cluster.generation;
  ++machine.progress;
}

inline void wait_for_cluster() {
  using emulation::machine;
  const int current = machine.current;
  while (machine.cluster.generation == machine.fibers[current].cluster_generation)
    swapcontext(&machine.fibers[current].context, &machine.scheduler);
}

// As the hardware has it: the block in the address.
inline uint32_t address_in_block(uint32_t address, int block) {
  if (block < 0 || block >= emulation::machine.fibers_in_use / emulation::machine.threads)
    emulation::fail("a block that is not in the cluster");
  return address | static_cast<uint32_t>(block) << 24;
}

inline void push(uint32_t to, float a, float b, uint32_t barrier) {
  const uint32_t within = to & 0xffffff, at = barrier & 0xffffff;
  const int block = to >> 24;
  if (within % 8 || within + 8 > emulation::shared_in_use) emulation::fail("a push outside of shared memory");
  if (block != static_cast<int>(barrier >> 24)) emulation::fail("a push to one block and the barrier of another");
  const auto arrives = [=] {
    unsigned char* const memory = emulation::memories[block];
    const float values[2] = {a, b};
    std::memcpy(memory + within, values, 8);
    Mbarrier& of_block = *reinterpret_cast<Mbarrier*>(memory + at);
    if (of_block.used != 1) emulation::fail("a push to a barrier that is not there, yet or any more");
    of_block.bytes -= 8;
    settle(of_block);
  };
  if (emulation::loads_at_once)
    arrives();
  else
    loads.emplace_back(std::pair(block, at), arrives);
}

inline void wait_for_pushes(uint32_t at, uint32_t parity) { wait(at, parity); }

inline uint64_t operand(uint32_t tile, int part) {
  constexpr uint64_t swizzle_128 = uint64_t{1} << 62, stride = uint64_t{1024 >> 4} << 32, unused = uint64_t{1} << 16;
  return swizzle_128 | stride | unused | ((tile & 0x3ffff) >> 4) + 2 * part;
}

inline uint64_t operand(uint64_t first, int tile, int part) {
  return first + static_cast<uint64_t>(tile * (kTileBytes >> 4) + 2 * part);
}

inline uint32_t uniform(uint32_t value) { return value; }

// A value of an operand: its address is that of the row in its group of eight, then the bits 4 to 6 are flipped by the
// bits 7 to 9.
template <class T>
float element(uint64_t descriptor, int row, int k) {
  if (descriptor >> 62 != 1) emulation::fail("an operand that is not swizzled over 128 bytes");
  const uint32_t start = (descriptor & 0x3fff) << 4, group = (descriptor >> 32 & 0x3fff) << 4;
  uint32_t at = start + row / 8 * group + row % 8 * 128 + 2 * k;
  at ^= at >> 3 & 0x70;
  if (at + 2 > emulation::shared_in_use) emulation::fail("an operand outside of shared memory");
  T v;
  std::memcpy(&v, emulation::shared + at, 2);
  return static_cast<float>(v);
}

// Products of this thread that are under way, in groups; the last is not committed.
using Products = std::deque<std::vector<std::function<void()>>>;
inline std::vector<Products> products;

inline Products& mine() {
  const size_t thread = emulation::machine.current;
  if (products.size() <= thread) products.resize(emulation::machine.fibers.size());
  if (products[thread].empty()) products[thread].emplace_back();
  return products[thread];
}

inline void begin_products() {}
inline void commit_products() { mine().emplace_back(); }

template <int Pending>
void wait_for_products() {
  Products& all = mine();
  for (; static_cast<int>(all.size()) > Pending + 1; all.pop_front())
    for (const auto& product : all.front()) product();
}

template <class R>
void pin(R&) {}

template <class A>
void product(float (&d)[32], uint64_t b, bool add, A of_a, float (*of_b)(uint64_t, int, int)) {
  auto run = [=, &d] {
    const int warp = threadIdx.x / 32 % 4, lane = emulation::machine.current % 32;
    for (int i = 0; i < 32; ++i) {
      const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = add ? d[i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += of_a(row, k) * of_b(b, column, k);
      d[i] = sum;
    }
  };
  emulation::products_at_once ? run() : mine().back().push_back(run);
}

template <class T>
void multiply(float (&d)[32], uint64_t a, uint64_t b, bool add) {
  product(d, b, add, [=](int row, int k) { return element<T>(a, row, k); }, &element<T>);
}

template <class T>
void multiply(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  // What the warp's lanes have now; a kernel may not change it before the product is over, and this would not see it.
  std::array<std::array<uint32_t, 4>, 32> all;
  const auto* words = exchange(a, 4);
  for (int lane = 0; lane < 32; ++lane) std::copy(words[lane], words[lane] + 4, all[lane].begin());
  product(
      d, b, add,
      [=](int row, int k) {
        const auto& of = all[row % 8 * 4 + k % 8 / 2];
        return value<T>(of[row / 8 % 2 + k / 8 * 2], k % 2);
      },
      &element<T>);
}

}  // namespace fused_resnet::ptx
