// The CPU's engine: the rows of one optimizer, and the phases of a step over them.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "cpu/kernels.h"
#include "plan/rows.h"

namespace gradfused::cpu {

class Engine : public Rows {
 public:
  using Rows::Rows;

  // Whether stats() has to run before apply().
  bool needs_stats();

  // Writes the unscaled sum of squares of each row's gradient, as stage 1 leaves it, to sums[row]: 0 where no option needs it. What
  // apply() needs of units too long for one chunk is measured here too. Rows without elements count as measured.
  void stats(double unscale, double* sums, int threads);

  // The rest of the step. `sums` come from stats(), perhaps added up over processes; where norms are by unit they are written.
  // Returns false, having changed nothing, when a sum is not finite in a group that skips such steps.
  bool apply(double unscale, double* sums, int threads);

 private:
  void plan();
  void add_chunks(int32_t row);
  bool needs(size_t row, Needs bits) const { return steps_[row].needs & bits; }
  void run(Phase phase, int threads);
  double mean_of_chunks(size_t begin, size_t end) const;
  double row_total(size_t row, const std::vector<double>& chunk_values) const;
  void spread_means(std::vector<double>& unit_means, Phase phase);
  void collect_squares(double* sums);
  bool may_step(const double* sums) const;
  void prepare_rows(const double* sums);
  void take_trust_norms(Phase phase, int threads);
  void finish_rows(double* sums);

  bool planned_ = false, cached_ = true;
  const Kernels* kernels_ = nullptr;  // those in use when the chunks were planned
  std::vector<RowStep> steps_;
  std::vector<CpuChunk> chunks_;
  std::vector<size_t> first_chunk_;               // of each row, and the end
  std::vector<int64_t> todo_[int(Phase::count)];  // chunks of each phase
  std::vector<double> chunk_mean_, chunk_sum_, chunk_sq_, chunk_weight_sq_, unit_mean_, unit_sq_, unit_weight_sq_, unit_direction_;
  double unscale_ = 1;
  std::vector<std::unique_ptr<char[]>> scratch_;
};

}  // namespace gradfused::cpu
