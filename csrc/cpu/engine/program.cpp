#include "program.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <initializer_list>

#include "../../check.h"
#include "steps.h"

namespace fused_resnet {
namespace {

using torch::stable::Tensor;
using namespace engine;

constexpr int64_t kVersion = 2;
enum Op : int64_t { kConv, kWinograd, kStem, kMaxPool, kAvgPool, kGrouped };

// Reads the program word by word, and proves that each operand lies inside its buffer.
class Reader {
 public:
  Reader(const int64_t* at, const int64_t* end, const std::vector<Tensor>& buffers) : at_(at), end_(end) {
    for (const Tensor& t : buffers) {
      check(t.is_cpu() && t.scalar_type() == torch::headeronly::ScalarType::Float,
            "run_program: buffers must be float32 tensors on the CPU");
      int64_t last = t.numel() ? 1 : 0;
      for (int64_t d = 0; d < t.dim(); ++d) {
        check(t.stride(d) >= 0, "run_program: buffers must have no negative strides");
        if (t.numel()) last += (t.size(d) - 1) * t.stride(d);
      }
      buffers_.push_back({static_cast<float*>(t.data_ptr()), last});
    }
  }

  bool more() const { return at_ < end_; }

  int64_t number() {
    check(more(), "run_program: the program ends within a step");
    return *at_++;
  }

  int64_t positive() {
    const int64_t value = number();
    check(value > 0 && value < (int64_t{1} << 31), "run_program: a size must be positive, got ", value);
    return value;
  }

  int64_t natural(int bits = 31) {
    const int64_t value = number();
    check(value >= 0 && value < (int64_t{1} << bits), "run_program: a padding or stride must not be negative, got ",
          value);
    return value;
  }

  // A number of floats, small enough that sums of a few do not overflow.
  static int64_t product(std::initializer_list<int64_t> factors) {
    int64_t result = 1;
    for (const int64_t factor : factors)
      check(!__builtin_mul_overflow(result, factor, &result) && result < (int64_t{1} << 60),
            "run_program: sizes are too large");
    return result;
  }

  // Two words: the buffer (-1: none) and the first float's place in it.
  struct Operand {
    int64_t buffer, offset;
  };
  Operand operand() {
    const int64_t buffer = number();
    return {buffer, number()};
  }

  float* in(const Operand& operand, int64_t floats) const {
    check(operand.buffer >= 0 && operand.buffer < static_cast<int64_t>(buffers_.size()),
          "run_program: there is no buffer ", operand.buffer);
    const auto& [data, size] = buffers_[operand.buffer];
    check(operand.offset >= 0 && floats >= 0 && floats <= size && operand.offset <= size - floats,
          "run_program: an operand of ", floats, " floats at ", operand.offset, " does not fit buffer ", operand.buffer,
          " of ", size);
    return data + operand.offset;
  }

  const float* maybe_in(const Operand& operand, int64_t floats) const {
    return operand.buffer == -1 ? nullptr : in(operand, floats);
  }

 private:
  struct Range {
    float* data;
    int64_t floats;
  };
  const int64_t* at_;
  const int64_t* end_;
  std::vector<Range> buffers_;
};

class Machine {
 public:
  Machine(const Kernels& kernels, int64_t workers, float* scratch, int64_t scratch_floats)
      : k_(kernels), workers_(workers), scratch_(scratch), each_(scratch_floats / workers / 16 * 16) {}

  void step(Reader& in) {
    const int64_t op = in.number();
    switch (op) {
      case kConv:
        return conv(in);
      case kWinograd:
        return winograd(in);
      case kStem:
        return stem(in);
      case kMaxPool:
        return max_pool(in);
      case kAvgPool:
        return avg_pool(in);
      case kGrouped:
        return grouped(in);
      default:
        check(false, "run_program: there is no step ", op);
    }
  }

 private:
  // f(task, worker's scratch) for every task; who comes first takes the next one.
  template <typename F>
  void over(int64_t tasks, int64_t scratch, const F& f) {
    check(scratch <= each_, "run_program: a step needs ", scratch, " floats of scratch a worker, there are ", each_);
    const int64_t workers = std::min(workers_, tasks);
    std::atomic<int64_t> next{0};
    const auto work = [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker)
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
          f(task, scratch_ + worker * each_);
    };
    if (workers == 1)
      work(0, 1);
    else
      torch::stable::parallel_for(0, workers, 1, work);
  }

  int64_t padded(int64_t channels) const { return ceil_div(channels, k_.nr) * k_.nr; }

  void columns(int64_t nc) const {
    check(nc % k_.nr == 0, "run_program: blocks of columns must be a multiple of ", k_.nr, ", got ", nc);
  }

  void conv(Reader& in) {
    Conv c{};
    const auto weight = in.operand(), bias = in.operand(), residual = in.operand(), y = in.operand();
    c.batch = in.positive(), c.p = in.positive(), c.q = in.positive(), c.channels = in.positive();
    c.relu = in.number() != 0, c.mc = in.positive(), c.nc = in.positive();
    columns(c.nc);
    c.segment_count = in.positive();
    check(c.segment_count <= 2, "run_program: a convolution has one or two segments, got ", c.segment_count);
    int64_t k = 0;
    for (int64_t i = 0; i < c.segment_count; ++i) {
      Segment& s = c.segments[i];
      const auto x = in.operand();
      s.h = in.positive(), s.w = in.positive(), s.c = in.positive(), s.r = in.positive(), s.s = in.positive();
      s.stride_h = in.positive(), s.stride_w = in.positive(), s.pad_h = in.natural(), s.pad_w = in.natural();
      s.dilation_h = in.positive(), s.dilation_w = in.positive();
      check(!s.is_matrix() || (s.h == c.p && s.w == c.q), "run_program: a 1x1 convolution keeps its map");
      s.x = in.in(x, Reader::product({c.batch, s.h, s.w, s.c}));
      k += Reader::product({s.r, s.s, s.c});
    }
    const int64_t rows = Reader::product({c.batch, c.p, c.q}), floats = Reader::product({rows, c.channels});
    c.weight = in.in(weight, Reader::product({padded(c.channels), k})), c.bias = in.in(bias, padded(c.channels));
    c.residual = in.maybe_in(residual, floats), c.y = in.in(y, floats);
    over(ceil_div(rows, c.mc) * ceil_div(c.channels, c.nc), k_.conv_scratch(c),
         [&](int64_t task, float* scratch) { k_.conv(c, task, scratch); });
  }

  void winograd(Reader& in) {
    Winograd w{};
    const auto x = in.operand(), weight = in.operand(), bias = in.operand(), residual = in.operand(), y = in.operand();
    w.batch = in.positive(), w.h = in.positive(), w.w = in.positive(), w.c = in.positive();
    w.p = in.positive(), w.q = in.positive(), w.channels = in.positive();
    w.pad_h = in.natural(), w.pad_w = in.natural(), w.relu = in.number() != 0;
    w.m = in.positive(), w.tiles = in.positive(), w.nc = in.positive(), w.shared = in.number() != 0;
    const auto buffer = in.operand();
    columns(w.nc);
    check((w.m == 2 || w.m == 4) && w.c % k_.width == 0 && w.channels % k_.width == 0,
          "run_program: Winograd needs tiles of 2 or 4 and channels in whole vectors of ", k_.width);
    const int64_t floats = Reader::product({w.batch, w.p, w.q, w.channels});
    Reader::product({w.points(), w.tiles, w.c + w.channels});  // room() is a number
    w.x = in.in(x, Reader::product({w.batch, w.h, w.w, w.c})), w.y = in.in(y, floats),
    w.residual = in.maybe_in(residual, floats);
    w.weight = in.in(weight, Reader::product({w.points(), padded(w.channels), w.c})),
    w.bias = in.in(bias, padded(w.channels));
    if (!w.shared) {
      over(ceil_div(w.all_tiles(), w.tiles), k_.winograd_scratch(w),
           [&](int64_t task, float* scratch) { k_.winograd(w, task, scratch); });
      return;
    }
    w.buffer = in.in(buffer, w.room());
    for (int64_t first = 0; first < w.all_tiles(); first += w.tiles) {
      const int64_t count = std::min(w.tiles, w.all_tiles() - first);
      const int64_t parts = std::min(4 * workers_, count * std::min(w.c, w.channels) / k_.width);
      over(parts, 0, [&](int64_t task, float*) { k_.winograd_input(w, first, task, parts); });
      over(w.points() * ceil_div(w.channels, w.nc), 0,
           [&](int64_t task, float*) { k_.winograd_multiply(w, count, task); });
      over(parts, 0, [&](int64_t task, float*) { k_.winograd_output(w, first, task, parts); });
    }
  }

  void stem(Reader& in) {
    Stem s{};
    const auto x = in.operand(), weight = in.operand(), bias = in.operand(), y = in.operand();
    s.stride_n = in.natural(40), s.stride_c = in.natural(40), s.stride_h = in.natural(40), s.stride_w = in.natural(40);
    s.batch = in.positive(), s.c = in.positive(), s.h = in.positive(), s.w = in.positive();
    s.r = in.positive(), s.s = in.positive(), s.stride = in.positive(), s.pad = in.natural();
    s.p = in.positive(), s.q = in.positive(), s.channels = in.positive();
    s.pool_p = in.positive(), s.pool_q = in.positive(), s.band = in.positive(), s.channels_last = in.number() != 0;
    check(s.channels % k_.width == 0, "run_program: the stem needs channels in whole vectors of ", k_.width);
    check((s.pool_p - 1) * 2 - 1 < s.p && (s.pool_q - 1) * 2 - 1 < s.q,
          "run_program: the stem's pool reads beyond the convolution's map");
    Reader::product({s.width(), s.r, s.c}), Reader::product({3, s.q, s.channels});  // its scratch is a number
    s.x = in.in(x, 1 + Reader::product({s.batch - 1, s.stride_n}) + Reader::product({s.c - 1, s.stride_c}) +
                       Reader::product({s.h - 1, s.stride_h}) + Reader::product({s.w - 1, s.stride_w}));
    s.weight = in.in(weight, Reader::product({padded(s.channels), s.c, s.r, s.s})),
    s.bias = in.in(bias, padded(s.channels));
    s.y = in.in(y, Reader::product({s.batch, s.pool_p, s.pool_q, s.channels}));
    over(s.batch * ceil_div(s.pool_p, s.band), k_.stem_scratch(s),
         [&](int64_t task, float* scratch) { k_.stem(s, task, scratch); });
  }

  void grouped(Reader& in) {
    Grouped g{};
    const auto x = in.operand(), weight = in.operand(), bias = in.operand(), residual = in.operand(), y = in.operand();
    g.batch = in.positive(), g.h = in.positive(), g.w = in.positive(), g.c = in.positive();
    g.p = in.positive(), g.q = in.positive(), g.channels = in.positive(), g.groups = in.positive();
    g.r = in.positive(), g.s = in.positive(), g.stride_h = in.positive(), g.stride_w = in.positive();
    g.pad_h = in.natural(), g.pad_w = in.natural(), g.dilation_h = in.positive(), g.dilation_w = in.positive();
    g.relu = in.number() != 0, g.rows = in.positive(), g.units = in.positive();
    check(g.c % g.groups == 0 && g.channels % g.groups == 0, "run_program: ", g.groups, " groups do not divide ", g.c,
          " and ", g.channels, " channels");
    const int64_t units = ceil_div(g.c, k_.grouped_unit(g));
    g.units = std::min(g.units, units);
    g.rows = std::min(g.rows, g.p);
    const int64_t height = Reader::product({g.p, g.stride_h}) + Reader::product({g.r, g.dilation_h});
    const int64_t width = Reader::product({g.q, g.stride_w}) + Reader::product({g.s, g.dilation_w});
    Reader::product({height, width, g.c, k_.width});  // its scratch is a number
    const int64_t vectors = k_.grouped_vectors(g), floats = Reader::product({g.batch, g.p, g.q, g.channels});
    g.x = in.in(x, Reader::product({g.batch, g.h, g.w, g.c})), g.y = in.in(y, floats);
    g.weight = in.in(weight, Reader::product({vectors, g.r, g.group_c(), g.s, k_.width}));
    g.bias = in.in(bias, Reader::product({vectors, k_.width})), g.residual = in.maybe_in(residual, floats);
    over(g.batch * ceil_div(g.p, g.rows) * ceil_div(units, g.units), k_.grouped_scratch(g),
         [&](int64_t task, float* scratch) { k_.grouped(g, task, scratch); });
  }

  void max_pool(Reader& in) {
    MaxPool m{};
    const auto x = in.operand(), y = in.operand();
    m.batch = in.positive(), m.h = in.positive(), m.w = in.positive(), m.c = in.positive();
    m.p = in.positive(), m.q = in.positive(), m.kernel = in.positive(), m.stride = in.positive(), m.pad = in.natural();
    m.x = in.in(x, Reader::product({m.batch, m.h, m.w, m.c})),
    m.y = in.in(y, Reader::product({m.batch, m.p, m.q, m.c}));
    over(m.batch * m.p, 0, [&](int64_t row, float*) { k_.max_pool(m, row); });
  }

  void avg_pool(Reader& in) {
    AvgPool a{};
    const auto x = in.operand(), y = in.operand();
    a.batch = in.positive(), a.pixels = in.positive(), a.c = in.positive();
    a.x = in.in(x, Reader::product({a.batch, a.pixels, a.c})), a.y = in.in(y, Reader::product({a.batch, a.c}));
    over(a.batch, 0, [&](int64_t image, float*) { k_.avg_pool(a, image); });
  }

  const Kernels& k_;
  int64_t workers_;
  float* scratch_;
  int64_t each_;
};

}  // namespace

Tensor program_isa(int64_t isa) {
  if (isa == -1) isa = best_isa();
  const Kernels* kernels = kernels_of(isa);
  Tensor out = torch::stable::empty({4}, torch::headeronly::ScalarType::Long, std::nullopt,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU));
  int64_t* values = out.mutable_data_ptr<int64_t>();
  values[0] = isa, values[1] = kernels != nullptr;
  values[2] = kernels ? kernels->width : 0, values[3] = kernels ? kernels->nr : 0;
  return out;
}

void run_program(const Tensor& program, const std::vector<Tensor>& buffers, const std::optional<Tensor>& times) {
  check(program.is_cpu() && program.is_contiguous() && program.scalar_type() == torch::headeronly::ScalarType::Long,
        "run_program: program must be a contiguous int64 tensor on the CPU");
  const int64_t* words = program.const_data_ptr<int64_t>();
  Reader in(words, words + program.numel(), buffers);
  const int64_t version = in.number();
  check(version == kVersion, "run_program: this library runs programs of version ", kVersion, ", got ", version);
  const int64_t isa = in.number();
  const Kernels* kernels = kernels_of(isa);
  check(kernels != nullptr, "run_program: this processor lacks instruction set ", isa);
  const int64_t workers = in.positive(), scratch_floats = in.natural(40);
  float* scratch = in.in(in.operand(), scratch_floats);
  Machine machine(*kernels, workers, scratch, scratch_floats);
  double* seconds = nullptr;
  if (times.has_value()) {
    check(times->is_cpu() && times->is_contiguous() && times->scalar_type() == torch::headeronly::ScalarType::Double,
          "run_program: times must be a contiguous float64 tensor on the CPU");
    seconds = static_cast<double*>(times->data_ptr());
  }
  for (int64_t i = 0; in.more(); ++i) {
    const auto start = std::chrono::steady_clock::now();
    machine.step(in);
    if (!seconds) continue;
    check(i < times->numel(), "run_program: times has room for ", times->numel(), " steps, there are more");
    seconds[i] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
}

}  // namespace fused_resnet
