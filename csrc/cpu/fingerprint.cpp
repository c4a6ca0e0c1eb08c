#include "fingerprint.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "../check.h"
#include "hash128.h"

namespace fused_resnet {
namespace {

using torch::stable::Tensor;

// Each thread gets at least this many blocks (256 KiB): waking it costs about what hashing them does.
constexpr int64_t kGrain = 64;

// No gap and no overlap: numel * itemsize bytes from data_ptr hold the elements, each once, in whatever order of
// dimensions.
bool is_dense(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  std::vector<int64_t> dims(sizes.size());
  std::iota(dims.begin(), dims.end(), 0);
  std::sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (const int64_t d : dims) {
    if (sizes[d] == 1) continue;
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// kHashLanes words a tensor.
std::vector<int64_t> hashes(const std::vector<Tensor>& tensors) {
  struct Range {
    const void* data;
    size_t bytes;
  };
  struct Sum {
    std::atomic<uint64_t> lane[kHashLanes] = {0, 0};
  };
  const size_t count = tensors.size();
  std::vector<Range> ranges(count);
  std::vector<int64_t> first_block(count + 1, 0);
  const auto sums = std::make_unique<Sum[]>(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor& t = tensors[i];
    check(t.is_cpu(), "fingerprint: needs tensors on the CPU, tensors[", i, "] is not");
    check(t.layout() == torch::headeronly::Layout::Strided, "fingerprint: needs strided tensors, tensors[", i,
          "] is not");
    const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
    check(bytes == 0 || is_dense(t), "fingerprint: needs dense tensors, tensors[", i, "] has gaps or overlaps");
    ranges[i] = {bytes ? t.const_data_ptr() : nullptr, bytes};
    first_block[i + 1] = first_block[i] + static_cast<int64_t>(hash_blocks(bytes));
    // The same bytes in another shape, order or dtype are another tensor.
    size_t index = 0;
    const auto add = [&](int64_t value) {
      const Hash128 word = hash_word(index++, static_cast<uint64_t>(value));
      for (int lane = 0; lane < kHashLanes; ++lane)
        sums[i].lane[lane].fetch_add(word.lane[lane], std::memory_order_relaxed);
    };
    add(static_cast<int64_t>(bytes));
    add(static_cast<int64_t>(t.scalar_type()));
    add(t.dim());
    for (int64_t d = 0; d < t.dim(); ++d) {
      add(t.size(d));
      add(t.size(d) == 1 ? 0 : t.stride(d));  // the stride of a dimension of one says nothing
    }
  }

  const auto hash_blocks_between = [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first_block.begin(), first_block.end(), begin) - first_block.begin() - 1;
    for (; begin < end; ++i) {
      const int64_t stop = std::min(end, first_block[i + 1]);
      if (stop <= begin) continue;  // a tensor without bytes
      const Hash128 hash = hash_range(ranges[i].data, ranges[i].bytes, begin - first_block[i], stop - first_block[i]);
      for (int lane = 0; lane < kHashLanes; ++lane)
        sums[i].lane[lane].fetch_add(hash.lane[lane], std::memory_order_relaxed);
      begin = stop;
    }
  };
  torch::stable::parallel_for(0, first_block[count], kGrain, hash_blocks_between);

  std::vector<int64_t> values;
  values.reserve(count * kHashLanes);
  for (size_t i = 0; i < count; ++i)
    for (const auto& lane : sums[i].lane) values.push_back(static_cast<int64_t>(lane.load(std::memory_order_relaxed)));
  return values;
}

}  // namespace

Tensor fingerprint(const std::vector<Tensor>& tensors) {
  const std::vector<int64_t> values = hashes(tensors);
  Tensor out = torch::stable::empty({static_cast<int64_t>(tensors.size()), kHashLanes},
                                    torch::headeronly::ScalarType::Long, std::nullopt,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU));
  std::copy(values.begin(), values.end(), out.mutable_data_ptr<int64_t>());
  return out;
}

bool unchanged(const std::vector<Tensor>& tensors, const Tensor& proof) {
  const int64_t count = static_cast<int64_t>(tensors.size());
  check(proof.is_cpu() && proof.is_contiguous() && proof.scalar_type() == torch::headeronly::ScalarType::Long,
        "unchanged: proof must be what fingerprint returned");
  if (proof.numel() != count * kHashLanes) return false;
  for (const Tensor& t : tensors)
    if (!t.is_cpu() || t.layout() != torch::headeronly::Layout::Strided || !is_dense(t)) return false;
  const std::vector<int64_t> values = hashes(tensors);
  return std::equal(values.begin(), values.end(), proof.const_data_ptr<int64_t>());
}

}  // namespace fused_resnet
