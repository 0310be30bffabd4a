#include "cpu/engine.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu/isa.h"
#include "cpu/threads.h"
#include "math/rules.h"
#include "math/transforms.h"

namespace gradfused::cpu {
namespace {

// Below this many elements a thread's start costs more than its help.
constexpr int64_t kWorthAThread = 32768;
// Weights beyond this many elements are in no cache when the next pass comes to them.
constexpr int64_t kCached = 8 << 20;

bool has_long_units(const Row& row) { return row.unit_length > kUnitMax; }

// The mean of a unit takes more than one chunk.
bool mean_is_split(const Row& row) { return row.centre && (row.whole || has_long_units(row)); }

double read_scalar(const char* at, DType dtype, double otherwise) {
  if (!at) return otherwise;
  return dtype == DType::float64 ? *reinterpret_cast<const double*>(at) : double(*reinterpret_cast<const float*>(at));
}

void write_scalar(char* at, DType dtype, double value) {
  if (!at) return;
  if (dtype == DType::float64) {
    *reinterpret_cast<double*>(at) = value;
  } else {
    *reinterpret_cast<float*>(at) = float(value);
  }
}

}  // namespace

bool Table::wants(Phase phase, const Row& row) const {
  const Settings& settings = settings_[size_t(row.group)];
  const bool at_gradient = settings.centralize_at == Centre::gradient;
  switch (phase) {
    case kMean: return mean_is_split(row) && at_gradient;
    case kSquares:
      return wide(settings.norm_scope) || settings.skip_nonfinite || (settings.norm_scope == NormScope::unit && has_long_units(row));
    case kRehearse: return mean_is_split(row) && !at_gradient;
    // A rehearsed direction takes a gradient's trust ratio into account, and the ratio a rehearsed mean of the decayed gradient.
    case kWeighFirst:
      return settings.adapt && math::trust_of(row.rule) == math::Trust::gradient && settings.centralize_at != Centre::decayed;
    case kWeigh: return settings.adapt && math::trust_of(row.rule) != math::Trust::none && !wants(kWeighFirst, row);
    default: return true;
  }
}

// Cuts a row into chunks: whole units together, long units (and rows in which units have no meaning: one unit) into segments.
void Table::add_chunks(int32_t index) {
  const Row& row = rows_[size_t(index)];
  first_chunk_.push_back(chunks_.size());
  if (row.numel == 0) return;
  const bool whole_units = !has_long_units(row);
  const int64_t units = whole_units ? std::max<int64_t>(1, kChunk / row.unit_length) : 1;
  const int64_t run = units * row.unit_length;
  for (int64_t begin = 0; begin < row.numel; begin += run) {
    const int64_t end = std::min(row.numel, begin + run);
    const int64_t step = whole_units ? run : kChunk;
    for (int64_t at = begin; at < end; at += step) chunks_.push_back({index, at, std::min(step, end - at)});
  }
}

// Rows are complete by the first call.
void Table::plan() {
  if (planned_) return;
  chunks_.clear();
  first_chunk_.clear();
  steps_.assign(rows_.size(), RowStep{});
  int64_t units = 0, elements = 0;
  for (size_t i = 0; i < rows_.size(); ++i) {
    const Row& row = rows_[i];
    elements += row.numel;
    add_chunks(int32_t(i));
    steps_[i].unit0 = units;
    const bool kept = wants(kMean, row) || wants(kSquares, row) || wants(kRehearse, row);
    if (kept && row.unit_length && (row.centre || settings_[size_t(row.group)].norm_scope == NormScope::unit))
      units += row.numel / row.unit_length;
  }
  cached_ = elements <= kCached;
  first_chunk_.push_back(chunks_.size());
  for (int phase = 0; phase < kPhases; ++phase) {
    todo_[phase].clear();
    for (size_t c = 0; c < chunks_.size(); ++c) {
      if (wants(Phase(phase), rows_[size_t(chunks_[c].row)])) todo_[phase].push_back(int64_t(c));
    }
  }
  // Backwards: what the norm's pass read last is still in cache.
  std::reverse(todo_[kApply].begin(), todo_[kApply].end());
  for (auto* v : {&chunk_mean_, &chunk_sum_, &chunk_sq_, &chunk_weight_sq_}) v->assign(chunks_.size(), 0);
  for (auto* v : {&unit_mean_, &unit_sq_, &unit_weight_sq_, &unit_direction_}) v->assign(size_t(units), 0);
  planned_ = true;
}

void Table::run(Phase phase, int threads) {
  const std::vector<int64_t>& todo = todo_[phase];
  if (todo.empty()) return;
  const Kernels& k = kernels();
  void (*const kernels[kPhases])(const Job&, int64_t, char*) = {k.mean, k.squares, k.weigh, k.rehearse, k.weigh, k.apply};
  void (*const kernel)(const Job&, int64_t, char*) = kernels[phase];
  const Job job = {rows_.data(),      settings_.data(),   steps_.data(),          chunks_.data(),        cached_,
                   unscale_,          chunk_mean_.data(), chunk_sum_.data(),      chunk_sq_.data(),      chunk_weight_sq_.data(),
                   unit_mean_.data(), unit_sq_.data(),    unit_weight_sq_.data(), unit_direction_.data()};

  int64_t elements = 0;
  for (size_t i = 0; i < todo.size() && elements < threads * kWorthAThread; ++i) elements += chunks_[size_t(todo[i])].count;
  threads = int(std::clamp<int64_t>(elements / kWorthAThread, 1, std::max(1, threads)));
  while (scratch_.size() < size_t(threads)) scratch_.emplace_back(new char[size_t(kScratchBytes)]);

  // Neighbouring chunks are small for small tensors: take several at a time.
  const int64_t count = int64_t(todo.size()), grain = std::max<int64_t>(1, std::min<int64_t>(8, count / (8 * threads)));
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int worker) {
    for (int64_t begin; (begin = next.fetch_add(grain, std::memory_order_relaxed)) < count;) {
      for (int64_t i = begin; i < std::min(count, begin + grain); ++i) kernel(job, todo[size_t(i)], scratch_[size_t(worker)].get());
    }
  });
}

double Table::row_total(size_t row, const std::vector<double>& values) const {
  double total = 0;
  for (size_t c = first_chunk_[row]; c < first_chunk_[row + 1]; ++c) total += values[c];
  return total;
}

// The mean over chunks [begin, end), from each one's.
double Table::mean_of_chunks(size_t begin, size_t end) const {
  const double first = math::anchor(chunk_mean_[begin]);
  double sum = 0, count = 0;
  for (size_t c = begin; c < end; ++c) {
    sum += double(chunks_[c].count) * (chunk_mean_[c] - first);
    count += double(chunks_[c].count);
  }
  return first + sum / count;
}

// Turns the chunks' means into unit means where a unit, or a tensor centred whole, takes several chunks.
void Table::spread_means(std::vector<double>& unit_means, Phase phase) {
  for (size_t i = 0; i < rows_.size(); ++i) {
    const Row& row = rows_[i];
    if (!wants(phase, row) || !row.numel) continue;
    double* means = unit_means.data() + steps_[i].unit0;
    const int64_t units = row.numel / row.unit_length;
    if (row.whole) {
      std::fill(means, means + units, mean_of_chunks(first_chunk_[i], first_chunk_[i + 1]));
      continue;
    }
    const size_t pieces = size_t((row.unit_length + kChunk - 1) / kChunk);
    for (int64_t u = 0; u < units; ++u) {
      const size_t begin = first_chunk_[i] + size_t(u) * pieces;
      means[u] = mean_of_chunks(begin, begin + pieces);
    }
  }
}

void Table::collect_squares(double* sums) {
  for (size_t i = 0; i < rows_.size(); ++i) {
    const Row& row = rows_[i];
    const Settings& settings = settings_[size_t(row.group)];
    sums[i] = wants(kSquares, row) ? row_total(i, chunk_sq_) : 0.0;
    if (settings.norm_scope != NormScope::unit || !has_long_units(row)) continue;
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

bool Table::needs_stats() {
  plan();
  return !todo_[kMean].empty() || !todo_[kSquares].empty();
}

void Table::stats(double unscale, double* sums, int threads) {
  plan();
  unscale_ = unscale;
  for (RowStep& s : steps_) s.means_known = s.norms_known = s.directions_known = false;
  if (!todo_[kMean].empty()) {
    run(kMean, threads);
    spread_means(unit_mean_, kMean);
    for (size_t i = 0; i < rows_.size(); ++i) steps_[i].means_known = wants(kMean, rows_[i]);
  }
  run(kSquares, threads);
  collect_squares(sums);
  for (size_t i = 0; i < rows_.size(); ++i) {
    const Settings& settings = settings_[size_t(rows_[i].group)];
    const bool measured = wants(kSquares, rows_[i]);
    steps_[i].means_known |= measured && rows_[i].centre && settings.centralize_at == Centre::gradient;
    steps_[i].norms_known = measured && settings.norm_scope == NormScope::unit && has_long_units(rows_[i]);
  }
}

bool Table::may_step(const double* sums) const {
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (settings_[size_t(rows_[i].group)].skip_nonfinite && !std::isfinite(sums[i])) return false;
  }
  return true;
}

void Table::prepare_rows(const double* sums) {
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
    now.factor = wide(settings.norm_scope) ? math::perturb_factor(settings.perturb, std::sqrt(squares)) : 1.0;
    const Row& row = rows_[i];
    now.count = {read_scalar(row.step, row.step_dtype, 0) + 1, row.first, 1};
    if (row.mu_product) {
      now.count.mu_product =
          math::next_mu_product(settings, now.count.step, read_scalar(row.mu_product, row.mu_product_dtype, 1), row.mu_product_dtype);
    }
    now.sigma = settings.noise > 0 ? math::noise_sigma(settings.noise, settings.noise_decay, now.count.step - 1) : 0.0;
    now.trusted = false;
  }
}

void Table::weigh(Phase phase, int threads) {
  run(phase, threads);
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (!wants(phase, rows_[i])) continue;
    steps_[i].norm = std::sqrt(row_total(i, chunk_sum_));
    steps_[i].weight_norm = std::sqrt(row_total(i, chunk_weight_sq_));
    steps_[i].trusted = true;
  }
}

void Table::finish_rows(double* sums) {
  for (size_t i = 0; i < rows_.size(); ++i) {
    Row& row = rows_[i];
    write_scalar(row.step, row.step_dtype, steps_[i].count.step);
    write_scalar(row.mu_product, row.mu_product_dtype, steps_[i].count.mu_product);
    row.first = false;
    if (settings_[size_t(row.group)].norm_scope == NormScope::unit) sums[i] = row_total(i, chunk_sq_);
  }
}

bool Table::apply(double unscale, double* sums, int threads) {
  plan();
  unscale_ = unscale;
  if (!may_step(sums)) return false;
  prepare_rows(sums);
  weigh(kWeighFirst, threads);
  if (!todo_[kRehearse].empty()) {
    run(kRehearse, threads);
    spread_means(unit_direction_, kRehearse);
    for (size_t i = 0; i < rows_.size(); ++i) steps_[i].directions_known = wants(kRehearse, rows_[i]);
  }
  weigh(kWeigh, threads);
  run(kApply, threads);
  finish_rows(sums);
  return true;
}

}  // namespace gradfused::cpu
