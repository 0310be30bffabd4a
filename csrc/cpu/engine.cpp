#include "cpu/engine.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu/isa.h"
#include "cpu/threads.h"
#include "math/rules.h"

namespace gradfused::cpu {
namespace {

// Below this many elements, starting a thread costs more than it gains.
constexpr int64_t kWorthAThread = 32768;
// A table of more elements than this is no longer in any cache when the next pass begins.
constexpr int64_t kCached = 8 << 20;

double read_scalar(const char* address, DType dtype, double otherwise) {
  if (!address) return otherwise;
  return dtype == DType::float64 ? *reinterpret_cast<const double*>(address) : double(*reinterpret_cast<const float*>(address));
}

void write_scalar(char* address, DType dtype, double value) {
  if (!address) return;
  if (dtype == DType::float64) {
    *reinterpret_cast<double*>(address) = value;
  } else {
    *reinterpret_cast<float*>(address) = float(value);
  }
}

}  // namespace

// Cuts a row into chunks: whole units together, long units (and rows in which units have no meaning: one unit) into segments.
void Engine::add_chunks(int32_t index) {
  const Row& row = rows_[size_t(index)];
  first_chunk_.push_back(chunks_.size());
  if (row.numel == 0) return;
  const bool whole_units = !needs(size_t(index), Need::long_units);
  const int64_t units = whole_units ? std::max<int64_t>(1, kCpuChunk / row.unit_length) : 1;
  const int64_t run = units * row.unit_length;
  for (int64_t begin = 0; begin < row.numel; begin += run) {
    const int64_t end = std::min(row.numel, begin + run);
    const int64_t step = whole_units ? run : kCpuChunk;
    for (int64_t first = begin; first < end; first += step) chunks_.push_back({index, first, std::min(step, end - first)});
  }
}

// Rows are complete by the first call.
void Engine::plan() {
  if (planned_) return;
  kernels_ = &kernels();
  chunks_.clear();
  first_chunk_.clear();
  steps_.assign(rows_.size(), RowStep{});
  int64_t units = 0, elements = 0;
  for (size_t i = 0; i < rows_.size(); ++i) {
    const Row& row = rows_[i];
    steps_[i].needs = needs_of(row, settings_[size_t(row.group)], kUnitMax);
    elements += row.numel;
    add_chunks(int32_t(i));
    steps_[i].unit0 = units;
    const bool kept = needs(i, Need::measured | Need::late_means);
    if (kept && row.unit_length && (row.centre || needs(i, Need::unit_norms))) units += row.numel / row.unit_length;
  }
  cached_ = elements <= kCached;
  first_chunk_.push_back(chunks_.size());
  for (int phase = 0; phase < int(Phase::count); ++phase) {
    todo_[phase].clear();
    for (size_t c = 0; c < chunks_.size(); ++c) {
      if (needs(size_t(chunks_[c].row), need_of(Phase(phase)))) todo_[phase].push_back(int64_t(c));
    }
  }
  // Backwards: what the norms' pass read last is still in cache.
  std::reverse(todo_[int(Phase::step)].begin(), todo_[int(Phase::step)].end());
  for (auto* v : {&chunk_mean_, &chunk_sum_, &chunk_sq_, &chunk_weight_sq_}) v->assign(chunks_.size(), 0);
  for (auto* v : {&unit_mean_, &unit_sq_, &unit_weight_sq_, &unit_direction_}) v->assign(size_t(units), 0);
  planned_ = true;
}

void Engine::run(Phase phase, int threads) {
  const std::vector<int64_t>& todo = todo_[int(phase)];
  if (todo.empty()) return;
  const Kernels& k = *kernels_;
  void (*const of_phase[])(const CpuJob&, int64_t, char*) = {k.means, k.norms, k.trust, k.late_means, k.trust, k.step};
  void (*const kernel)(const CpuJob&, int64_t, char*) = of_phase[int(phase)];
  const CpuJob job = {rows_.data(),      settings_.data(),   steps_.data(),          chunks_.data(),        cached_,
                      unscale_,          chunk_mean_.data(), chunk_sum_.data(),      chunk_sq_.data(),      chunk_weight_sq_.data(),
                      unit_mean_.data(), unit_sq_.data(),    unit_weight_sq_.data(), unit_direction_.data()};

  int64_t elements = 0;
  for (size_t i = 0; i < todo.size() && elements < threads * kWorthAThread; ++i) elements += chunks_[size_t(todo[i])].count;
  threads = int(std::clamp<int64_t>(elements / kWorthAThread, 1, std::max(1, threads)));
  while (scratch_.size() < size_t(threads)) scratch_.emplace_back(new char[size_t(kScratchBytes)]);

  // Small tensors have small chunks: take several neighbours at a time.
  const int64_t count = int64_t(todo.size()), grain = std::max<int64_t>(1, std::min<int64_t>(8, count / (8 * threads)));
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int worker) {
    for (int64_t begin; (begin = next.fetch_add(grain, std::memory_order_relaxed)) < count;) {
      for (int64_t i = begin; i < std::min(count, begin + grain); ++i) kernel(job, todo[size_t(i)], scratch_[size_t(worker)].get());
    }
  });
}

double Engine::row_total(size_t row, const std::vector<double>& values) const {
  double total = 0;
  for (size_t c = first_chunk_[row]; c < first_chunk_[row + 1]; ++c) total += values[c];
  return total;
}

// The mean over chunks [begin, end), computed from the means of the chunks.
double Engine::mean_of_chunks(size_t begin, size_t end) const {
  const double first = math::anchor(chunk_mean_[begin]);
  double sum = 0, count = 0;
  for (size_t c = begin; c < end; ++c) {
    sum += double(chunks_[c].count) * (chunk_mean_[c] - first);
    count += double(chunks_[c].count);
  }
  return first + sum / count;
}

// Turns the chunks' means into unit means where a unit, or a tensor centred whole, takes several chunks.
void Engine::spread_means(std::vector<double>& unit_means, Phase phase) {
  for (size_t i = 0; i < rows_.size(); ++i) {
    const Row& row = rows_[i];
    if (!needs(i, need_of(phase)) || !row.numel) continue;
    double* means = unit_means.data() + steps_[i].unit0;
    const int64_t units = row.numel / row.unit_length;
    if (row.whole) {
      std::fill(means, means + units, mean_of_chunks(first_chunk_[i], first_chunk_[i + 1]));
      continue;
    }
    const size_t pieces = size_t((row.unit_length + kCpuChunk - 1) / kCpuChunk);
    for (int64_t u = 0; u < units; ++u) {
      const size_t begin = first_chunk_[i] + size_t(u) * pieces;
      means[u] = mean_of_chunks(begin, begin + pieces);
    }
  }
}

void Engine::collect_squares(double* sums) {
  for (size_t i = 0; i < rows_.size(); ++i) {
    const Row& row = rows_[i];
    sums[i] = needs(i, Need::norms) ? row_total(i, chunk_sq_) : 0.0;
    if (!needs(i, Need::unit_norms) || !needs(i, Need::long_units)) continue;
    for (int64_t u = 0; u < row.numel / row.unit_length; ++u) {
      unit_sq_[size_t(steps_[i].unit0 + u)] = unit_weight_sq_[size_t(steps_[i].unit0 + u)] = 0;
    }
    for (size_t c = first_chunk_[i]; c < first_chunk_[i + 1]; ++c) {
      const size_t unit = size_t(steps_[i].unit0 + chunks_[c].begin / row.unit_length);
      unit_sq_[unit] += chunk_sq_[c];
      unit_weight_sq_[unit] += chunk_weight_sq_[c];
    }
  }
}

bool Engine::needs_stats() {
  plan();
  return !todo_[int(Phase::means)].empty() || !todo_[int(Phase::norms)].empty();
}

void Engine::stats(double unscale, double* sums, int threads) {
  plan();
  unscale_ = unscale;
  for (RowStep& s : steps_) s.means_known = s.norms_known = s.directions_known = false;
  if (!todo_[int(Phase::means)].empty()) {
    run(Phase::means, threads);
    spread_means(unit_mean_, Phase::means);
    for (size_t i = 0; i < rows_.size(); ++i) steps_[i].means_known = needs(i, Need::means);
  }
  run(Phase::norms, threads);
  collect_squares(sums);
  for (size_t i = 0; i < rows_.size(); ++i) {
    const bool measured = needs(i, Need::norms);
    steps_[i].means_known |= measured && needs(i, Need::centre_early);
    steps_[i].norms_known = measured && needs(i, Need::unit_norms) && needs(i, Need::long_units);
  }
}

bool Engine::may_step(const double* sums) const {
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (needs(i, Need::skip) && !std::isfinite(sums[i])) return false;
  }
  return true;
}

void Engine::prepare_rows(const double* sums) {
  double global = 0;
  std::vector<double> group(settings_.size(), 0);
  for (size_t i = 0; i < rows_.size(); ++i) {
    const size_t g = size_t(rows_[i].group);
    if (settings_[g].norm_scope == NormScope::global) global += sums[i];
    if (settings_[g].norm_scope == NormScope::group) group[g] += sums[i];
  }
  for (size_t i = 0; i < rows_.size(); ++i) {
    const size_t g = size_t(rows_[i].group);
    const Settings& settings = settings_[g];
    RowStep& now = steps_[i];
    const double squares = settings.norm_scope == NormScope::global ? global : settings.norm_scope == NormScope::group ? group[g] : sums[i];
    now.factor = needs(i, Need::wide_norm) ? math::perturb_factor(settings.perturb, std::sqrt(squares)) : 1.0;
    const Row& row = rows_[i];
    now.count = {read_scalar(row.step, row.step_dtype, 0) + 1, row.first, 1};
    if (row.mu_product) {
      now.count.mu_product =
          math::next_mu_product(settings, now.count.step, read_scalar(row.mu_product, row.mu_product_dtype, 1), row.mu_product_dtype);
    }
    now.sigma = needs(i, Need::noise) ? math::noise_sigma(settings.noise, settings.noise_decay, now.count.step - 1) : 0.0;
    now.trusted = false;
  }
}

void Engine::take_trust_norms(Phase phase, int threads) {
  run(phase, threads);
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (!needs(i, need_of(phase))) continue;
    steps_[i].norm = std::sqrt(row_total(i, chunk_sum_));
    steps_[i].weight_norm = std::sqrt(row_total(i, chunk_weight_sq_));
    steps_[i].trusted = true;
  }
}

void Engine::finish_rows(double* sums) {
  for (size_t i = 0; i < rows_.size(); ++i) {
    Row& row = rows_[i];
    write_scalar(row.step, row.step_dtype, steps_[i].count.step);
    write_scalar(row.mu_product, row.mu_product_dtype, steps_[i].count.mu_product);
    row.first = false;
    if (needs(i, Need::unit_norms)) sums[i] = row_total(i, chunk_sq_);
  }
}

bool Engine::apply(double unscale, double* sums, int threads) {
  plan();
  unscale_ = unscale;
  if (!may_step(sums)) return false;
  prepare_rows(sums);
  take_trust_norms(Phase::early_trust, threads);
  if (!todo_[int(Phase::late_means)].empty()) {
    run(Phase::late_means, threads);
    spread_means(unit_direction_, Phase::late_means);
    for (size_t i = 0; i < rows_.size(); ++i) steps_[i].directions_known = needs(i, Need::late_means);
  }
  take_trust_norms(Phase::late_trust, threads);
  run(Phase::step, threads);
  finish_rows(sums);
  return true;
}

}  // namespace gradfused::cpu
