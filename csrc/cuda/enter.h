// A block comes to another row.
#pragma once

#include "cuda/family.h"
#include "math/noise.h"

namespace gradfused::cuda {
namespace {

// Whether a launch knows the row's trust ratio.
__device__ bool is_trusted(const DeviceRow& r, Doing doing) {
  return (r.weighed_first && doing != Doing::weigh_first) || (r.weighed && doing == Doing::step);
}

// The squares of the norm of the scope that a row belongs to, if that is wider than a unit. `global` is known already.
__device__ double squares_of(const Job& job, int index, const DeviceSettings& group, double global) {
  if (group.settings.norm_scope == NormScope::group) return sum_rows(group.row0, group.row1, [&](int i) { return job.squares[i]; });
  return group.settings.norm_scope == NormScope::param ? job.squares[index] : global;
}

// By one thread. Without kFull there is neither float64 nor trust.
template <bool kFull> __device__ void set_row(const Job& job, Now& now, int index, Doing doing, double squares) {
  const DeviceRow& r = job.rows[index];
  const Row& row = r.row;
  const DeviceSettings& group = job.settings[row.group];
  Settings settings = group.settings;
  if (group.lr_at) settings.lr = scalar_at(group.lr_at, group.lr_dtype);
  const Count count = count_of(row, settings);
  const bool wide = kFull && row.param.dtype == DType::float64, trusted = kFull && is_trusted(r, doing);
  const bool scoped =
      settings.norm_scope == NormScope::global || settings.norm_scope == NormScope::group || settings.norm_scope == NormScope::param;
  now.row = index;
  now.unscale = unscale_of(job);
  const double factor = scoped ? math::perturb_factor(settings.perturb, sqrt(squares)) : 1.0;
  now.seed = settings.seed;
  now.param_number = row.param_number;
  now.taken = math::step_word(count.step);
  // Powers are slow: most rows are of the last one's group and age.
  const bool known = now.group == row.group && now.step == count.step && now.mu_product == count.mu_product && now.first == row.first &&
                     now.wide == wide && !trusted;
  constexpr uint32_t rules = kTrustsUpdate | ((1u << kMaxStates) - 1) * (kReads | kWrites);
  now.todo = todo_of(row, settings) | (known ? now.todo & rules : 0);
  now.group = trusted ? -1 : row.group;
  now.step = count.step;
  now.mu_product = count.mu_product;
  now.first = row.first;
  now.wide = wide;
  const DeviceRow* const ratio = trusted ? &r : nullptr;
  if constexpr (kFull) {
    if (wide) {
      set_transform<double>(now, settings, factor);
      if (!known) set_coef<double>(now, row, settings, count, ratio);
      return;
    }
  }
  set_transform<float>(now, settings, factor);
  if (!known) set_coef<float>(now, row, settings, count, ratio);
}

template <bool kFull> __device__ void enter_row(const Job& job, Now& now, int index, Doing doing, double global) {
  const double squares = squares_of(job, index, job.settings[job.rows[index].row.group], global);
  __syncthreads();  // nobody reads the last row's any more
  if (threadIdx.x == 0) set_row<kFull>(job, now, index, doing, squares);
  __syncthreads();
}

}  // namespace
}  // namespace gradfused::cuda
