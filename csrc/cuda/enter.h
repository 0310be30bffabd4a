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
__device__ double squares_of(const Job& job, int index, const DeviceHyper& group, double global) {
  if (group.hyper.scope == Scope::group) return sum_rows(group.row0, group.row1, [&](int i) { return job.squares[i]; });
  return group.hyper.scope == Scope::param ? job.squares[index] : global;
}

// By one thread. Without kFull there is neither float64 nor trust.
template <bool kFull> __device__ void set_row(const Job& job, Now& now, int index, Doing doing, double squares) {
  const DeviceRow& r = job.rows[index];
  const Row& row = r.row;
  const DeviceHyper& group = job.hypers[row.group];
  Hyper h = group.hyper;
  if (group.lr_at) h.lr = scalar_at(group.lr_at, group.lr_dtype);
  const Count count = count_of(row, h);
  const bool wide = kFull && row.param.dtype == DType::float64, trusted = kFull && is_trusted(r, doing);
  const bool scoped = h.scope == Scope::global || h.scope == Scope::group || h.scope == Scope::param;
  now.row = index;
  now.unscale = unscale_of(job);
  const double factor = scoped ? math::perturb_factor(h.perturb, sqrt(squares)) : 1.0;
  now.seed = h.seed;
  now.parameter = row.parameter;
  now.taken = math::step_word(count.step);
  // Powers are slow: most rows are of the last one's group and age.
  const bool known = now.group == row.group && now.step == count.step && now.product == count.product && now.first == row.first &&
                     now.wide == wide && !trusted;
  constexpr uint32_t rules = kTrustsUpdate | ((1u << kMaxStates) - 1) * (kReads | kWrites);
  now.todo = todo_of(row, h) | (known ? now.todo & rules : 0);
  now.group = trusted ? -1 : row.group;
  now.step = count.step;
  now.product = count.product;
  now.first = row.first;
  now.wide = wide;
  const DeviceRow* const ratio = trusted ? &r : nullptr;
  if constexpr (kFull) {
    if (wide) {
      set_transform<double>(now, h, factor);
      if (!known) set_coef<double>(now, row, h, count, ratio);
      return;
    }
  }
  set_transform<float>(now, h, factor);
  if (!known) set_coef<float>(now, row, h, count, ratio);
}

template <bool kFull> __device__ void enter_row(const Job& job, Now& now, int index, Doing doing, double global) {
  const double squares = squares_of(job, index, job.hypers[job.rows[index].row.group], global);
  __syncthreads();  // nobody reads the last row's any more
  if (threadIdx.x == 0) set_row<kFull>(job, now, index, doing, squares);
  __syncthreads();
}

}  // namespace
}  // namespace gradfused::cuda
