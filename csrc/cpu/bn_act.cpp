// Batch norm on a CPU: check, allocate, and hand chunks of rows to threads. The arithmetic is in engine/bn.h.

#include "bn_act.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "../check.h"
#include "engine/steps.h"

namespace fused_resnet::cpu {
namespace {

using namespace engine;
using torch::headeronly::ScalarType;

// A task has at least this many elements: waking a thread costs about what they do. Less than twice that is one task.
constexpr int64_t kGrain = 16384;
// Sums of a task are merged with those of the others, so these tasks are larger.
constexpr int64_t kSumsGrain = 65536;
constexpr int64_t kSumsRows = 64;
constexpr int64_t kSumsTasks = 64;

const BnKernels& kernels_for(const char* op, int64_t isa) {
  const Kernels* kernels = kernels_of(isa == -1 ? best_isa() : isa);
  check(kernels != nullptr, op, ": this processor lacks instruction set ", isa);
  return kernels->bn;
}

// --- checks ---

void check_map(const char* op, const char* name, const Tensor& t) {
  check(t.is_cpu() && t.layout() == torch::headeronly::Layout::Strided && t.scalar_type() == ScalarType::Float, op,
        ": ", name, " must be a float32 tensor on the CPU");
  check(t.dim() == 4, op, ": ", name, " must be [N, C, H, W], it has ", t.dim(), " dimensions");
  check(t.numel() > 0, op, ": ", name, " must not be empty");
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    check(t.size(d) == 1 || t.stride(d) == expected, op, ": ", name, " must be dense and channels_last");
    expected *= t.size(d);
  }
}

void check_map_like(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& x) {
  if (!t.has_value()) return;
  check_map(op, name, *t);
  for (int d = 0; d < 4; ++d) check(t->size(d) == x.size(d), op, ": ", name, " must have the shape of x");
}

void check_channels(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& x) {
  if (!t.has_value()) return;
  check(t->is_cpu() && t->layout() == torch::headeronly::Layout::Strided && t->scalar_type() == ScalarType::Float, op,
        ": ", name, " must be a float32 tensor on the CPU");
  check(t->dim() == 1 && t->size(0) == x.size(1), op, ": ", name, " must be [C] = [", x.size(1), "]");
  check(t->is_contiguous(), op, ": ", name, " must be contiguous");
}

const float* data(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}
const float* data(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* mutable_data(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

bool overlap(const Tensor& a, const Tensor& b) {
  return data(a) < data(b) + b.numel() && data(b) < data(a) + a.numel();
}

// Rows are read before they are written, so that an output may be an input, but not lie across it.
void check_output(const char* op, const char* name, const Tensor& out, const char* other_name,
                  const std::optional<Tensor>& other, bool may_be) {
  if (!other.has_value() || !overlap(out, *other)) return;
  check(may_be && data(out) == data(*other), op, ": ", name, " must not overlap ", other_name,
        may_be ? ", unless it is the same" : "");
}

// --- work ---

struct Tasks {
  int64_t rows, each, count;

  int64_t first(int64_t task) const { return task * each; }
  int64_t last(int64_t task) const { return std::min(rows, (task + 1) * each); }
};

Tasks tasks_of(int64_t rows, int64_t wanted) {
  const int64_t each = ceil_div(rows, std::max<int64_t>(wanted, 1));
  return {rows, each, ceil_div(rows, each)};
}

Tasks plain_tasks(const Tensor& x) { return tasks_of(x.numel() / x.size(1), x.numel() / kGrain); }

// By shape alone: the same sums whatever the number of threads.
Tasks summed_tasks(const Tensor& x) {
  const int64_t rows = x.numel() / x.size(1);
  if (x.numel() < 2 * kGrain) return tasks_of(rows, 1);
  const int64_t least = std::max(kSumsGrain, kSumsRows * x.size(1));
  // A few more than there are threads in most machines, where the map is small: half of them idle else.
  return tasks_of(rows, std::min(std::max<int64_t>(x.numel() / least, 2), kSumsTasks));
}

int64_t workers_for(int64_t tasks) { return std::min<int64_t>(tasks, torch::stable::get_num_threads()); }

// f(task, worker) for every task; who comes first takes the next one.
template <typename F>
void over(int64_t tasks, int64_t workers, const F& f) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(task, worker);
  };
  if (workers == 1)
    work(0, 1);
  else
    torch::stable::parallel_for(0, workers, 1, work);
}

// Two float64 numbers a channel from each task: f(first row, last row, scratch, first number, second number).
class Sums {
 public:
  template <typename F>
  Sums(const Tensor& x, int64_t scratch, const F& f) : tasks(summed_tasks(x)), channels_(x.size(1)) {
    const int64_t workers = workers_for(tasks.count), each = ceil_div(scratch * channels_, 16) * 16;
    numbers_.reset(new double[2 * tasks.count * channels_]);
    const std::unique_ptr<float[]> room(new float[workers * each]);
    over(tasks.count, workers, [&](int64_t task, int64_t worker) {
      f(tasks.first(task), tasks.last(task), room.get() + worker * each, first(task), second(task));
    });
  }

  double* first(int64_t task) const { return numbers_.get() + 2 * task * channels_; }
  double* second(int64_t task) const { return first(task) + channels_; }

  const Tasks tasks;

 private:
  int64_t channels_;
  std::unique_ptr<double[]> numbers_;
};

// A plain sum in place of each mean that is not finite: inf less a pivot of inf is NaN, where PyTorch's mean is inf.
void plain_means(const Tensor& x, double* mean) {
  const int64_t channels = x.size(1), rows = x.numel() / channels;
  if (std::all_of(mean, mean + channels, [](double m) { return std::isfinite(m); })) return;
  std::vector<double> sum(channels);
  const float* row = data(x);
  for (int64_t i = 0; i < rows; ++i, row += channels)
    for (int64_t c = 0; c < channels; ++c) sum[c] += row[c];
  for (int64_t c = 0; c < channels; ++c)
    if (!std::isfinite(mean[c])) mean[c] = sum[c] / static_cast<double>(rows);
}

Tensor new_channels(const Tensor& x, int64_t channels) {
  return torch::stable::new_empty(x, {channels}, ScalarType::Float);
}

Tensor new_map(const Tensor& x) {
  return torch::stable::empty(x.sizes(), ScalarType::Float, std::nullopt, x.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

// What both directions use of the vectors, rounded once.
struct Affine {
  Affine(const Tensor& var, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps)
      : inverse(var.numel()), scale(var.numel()), shift(var.numel()) {
    const float *v = data(var), *w = data(weight), *b = data(bias);
    for (size_t c = 0; c < scale.size(); ++c) {
      inverse[c] = 1 / std::sqrt(static_cast<double>(v[c]) + eps);
      scale[c] = static_cast<float>(w ? inverse[c] * w[c] : inverse[c]);
      shift[c] = b ? b[c] : 0;
    }
  }

  std::vector<double> inverse;
  std::vector<float> scale, shift;
};

}  // namespace

std::tuple<Tensor, Tensor> bn_stats(const Tensor& x, int64_t isa) {
  const char* op = "bn_stats";
  const BnKernels& kernels = kernels_for(op, isa);
  check_map(op, "x", x);
  const int64_t channels = x.size(1);
  const Tensor mean = new_channels(x, channels), var = new_channels(x, channels);
  const Sums sums(x, kernels.scratch,
                  [&](int64_t first, int64_t last, float* scratch, double* chunk_mean, double* chunk_deviations) {
                    kernels.stats(data(x), channels, first, last, scratch, chunk_mean, chunk_deviations);
                  });
  // The others into the first, in order (Chan, Golub and LeVeque, 1979).
  double *all = sums.first(0), *deviations = sums.second(0);
  for (int64_t task = 1; task < sums.tasks.count; ++task) {
    const double before = static_cast<double>(sums.tasks.first(task)),
                 here = static_cast<double>(sums.tasks.last(task)) - before;
    const double share = here / (before + here);
    const double *other = sums.first(task), *other_deviations = sums.second(task);
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = other[c] - all[c];
      all[c] += delta * share;
      deviations[c] += other_deviations[c] + delta * delta * share * before;
    }
  }
  plain_means(x, all);
  float *m = mutable_data(mean), *v = mutable_data(var);
  for (int64_t c = 0; c < channels; ++c) {
    m[c] = static_cast<float>(all[c]);
    v[c] = static_cast<float>(deviations[c] / static_cast<double>(sums.tasks.rows));
  }
  return {mean, var};
}

void bn_act_out(const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
                const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& residual, bool relu,
                const Tensor& out, int64_t isa) {
  const char* op = "bn_act";
  const BnKernels& kernels = kernels_for(op, isa);
  check_map(op, "x", x);
  check_map_like(op, "residual", residual, x);
  check_map_like(op, "out", out, x);
  check_channels(op, "mean", mean, x);
  check_channels(op, "var", var, x);
  check_channels(op, "weight", weight, x);
  check_channels(op, "bias", bias, x);
  check_output(op, "out", out, "x", x, true);
  check_output(op, "out", out, "residual", residual, true);
  const Affine affine(var, weight, bias, eps);
  const BnAct act = {data(x),           data(residual), data(mean), affine.scale.data(), affine.shift.data(),
                     mutable_data(out), x.size(1),      relu};
  const Tasks tasks = plain_tasks(x);
  over(tasks.count, workers_for(tasks.count),
       [&](int64_t task, int64_t) { kernels.act(act, tasks.first(task), tasks.last(task)); });
}

Tensor bn_act(const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
              const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& residual, bool relu,
              int64_t isa) {
  check_map("bn_act", "x", x);
  const Tensor out = new_map(x);
  bn_act_out(x, mean, var, weight, bias, eps, residual, relu, out, isa);
  return out;
}

std::tuple<Tensor, Tensor> bn_act_bwd_out(const Tensor& grad, const std::optional<Tensor>& y, const Tensor& x,
                                          const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
                                          const std::optional<Tensor>& bias, double eps, bool relu, bool batch_stats,
                                          bool need_sums, const std::optional<Tensor>& dx,
                                          const std::optional<Tensor>& g, int64_t isa) {
  const char* op = "bn_act_bwd";
  const BnKernels& kernels = kernels_for(op, isa);
  check_map(op, "x", x);
  check_map_like(op, "grad", grad, x);
  check_map_like(op, "y", y, x);
  check_map_like(op, "dx", dx, x);
  check_map_like(op, "g", g, x);
  check_channels(op, "mean", mean, x);
  check_channels(op, "var", var, x);
  check_channels(op, "weight", weight, x);
  check_channels(op, "bias", bias, x);
  if (dx.has_value()) {
    check_output(op, "dx", *dx, "grad", grad, true);
    check_output(op, "dx", *dx, "y", y, true);
    check_output(op, "dx", *dx, "x", x, true);
    check_output(op, "dx", *dx, "g", g, false);
  }
  if (g.has_value()) {
    check_output(op, "g", *g, "grad", grad, true);
    check_output(op, "g", *g, "y", y, true);
    check_output(op, "g", *g, "x", x, false);  // the second pass reads it
  }
  const int64_t channels = x.size(1);
  const Tensor dweight = new_channels(x, need_sums ? channels : 0), dbias = new_channels(x, need_sums ? channels : 0);
  const Affine affine(var, weight, bias, eps);

  BnBwd bwd{};
  bwd.grad = data(grad), bwd.y = data(y), bwd.x = data(x);
  bwd.mean = data(mean), bwd.scale = affine.scale.data(), bwd.bias = affine.shift.data();
  bwd.g = g.has_value() ? mutable_data(*g) : nullptr;
  bwd.channels = channels;
  bwd.mask = !relu ? BnMask::kNone : y.has_value() ? BnMask::kOutput : BnMask::kInput;
  const bool second = batch_stats && dx.has_value();
  if (dx.has_value() && !second) bwd.dx = mutable_data(*dx);

  const Tasks tasks = plain_tasks(x);
  const auto pass = [&] {
    over(tasks.count, workers_for(tasks.count), [&](int64_t task, int64_t) {
      // Backwards: what the first pass read last is still in a cache.
      const int64_t i = tasks.count - 1 - task;
      kernels.bwd(bwd, tasks.first(i), tasks.last(i), nullptr, nullptr, nullptr);
    });
  };
  if (!need_sums && !second) {
    bwd.step = BnStep::kFixed;
    if (bwd.g || bwd.dx) pass();
    return {dweight, dbias};
  }

  bwd.step = bwd.dx ? BnStep::kFixedSums : BnStep::kSums;
  const Sums sums(x, kernels.scratch, [&](int64_t first, int64_t last, float* scratch, double* sum_g, double* moment) {
    kernels.bwd(bwd, first, last, scratch, sum_g, moment);
  });
  double *sum_g = sums.first(0), *moment = sums.second(0);
  for (int64_t task = 1; task < sums.tasks.count; ++task) {
    const double *other_sum = sums.first(task), *other_moment = sums.second(task);
    for (int64_t c = 0; c < channels; ++c) {
      sum_g[c] += other_sum[c];
      moment[c] += other_moment[c];
    }
  }
  if (need_sums) {
    float *dw = mutable_data(dweight), *db = mutable_data(dbias);
    for (int64_t c = 0; c < channels; ++c) {
      dw[c] = static_cast<float>(moment[c] * affine.inverse[c]);
      db[c] = static_cast<float>(sum_g[c]);
    }
  }
  if (!second) return {dweight, dbias};

  std::vector<float> mean_g(channels), slope(channels);
  const double rows = static_cast<double>(sums.tasks.rows);
  for (int64_t c = 0; c < channels; ++c) {
    mean_g[c] = static_cast<float>(sum_g[c] / rows);
    slope[c] = static_cast<float>(affine.inverse[c] * affine.inverse[c] * moment[c] / rows);
  }
  if (bwd.g) {  // it stands for grad and y: one read less
    bwd.grad = bwd.g, bwd.g = nullptr;
    bwd.mask = BnMask::kNone;
  }
  bwd.mean_g = mean_g.data(), bwd.slope = slope.data();
  bwd.dx = mutable_data(*dx);
  bwd.step = BnStep::kBatch;
  pass();
  return {dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_bwd(const Tensor& grad, const std::optional<Tensor>& y,
                                                      const Tensor& x, const Tensor& mean, const Tensor& var,
                                                      const std::optional<Tensor>& weight,
                                                      const std::optional<Tensor>& bias, double eps, bool relu,
                                                      bool batch_stats, bool need_x, bool need_sums, bool need_g,
                                                      int64_t isa) {
  check_map("bn_act_bwd", "x", x);
  const std::optional<Tensor> dx = need_x ? std::optional(new_map(x)) : std::nullopt;
  const std::optional<Tensor> g = need_g ? std::optional(new_map(x)) : std::nullopt;
  const auto [dweight, dbias] =
      bn_act_bwd_out(grad, y, x, mean, var, weight, bias, eps, relu, batch_stats, need_sums, dx, g, isa);
  const Tensor nothing = new_channels(x, 0);
  return {dx.value_or(nothing), dweight, dbias, g.value_or(nothing)};
}

}  // namespace fused_resnet::cpu
