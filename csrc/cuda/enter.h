// What a block does when its next chunk is of another row.
#pragma once

#include "cuda/family.h"
#include "math/noise.h"

namespace gradfused::cuda {
namespace {

// Whether the norms of the row's trust ratio were taken in a phase before this one.
__device__ bool is_trusted(const DeviceRow& r, Phase phase) {
  return r.needs & (Need::early_trust | Need::late_trust) & ((1u << int(phase)) - 1);
}

// The square of a row's norm, if its scope is wider than a unit. That of the global norm is known already.
__device__ double squares_of(const Job& job, int index, const DeviceSettings& group, double global) {
  if (group.settings.norm_scope == NormScope::group) return sum_rows(group.row0, group.row1, [&](int i) { return job.squares[i]; });
  return group.settings.norm_scope == NormScope::param ? job.squares[index] : global;
}

// Called by one thread. Without kFull there is neither float64 nor a trust ratio.
template <bool kFull> __device__ void set_row(const Job& job, BlockRow& block, int index, Phase phase, double squares) {
  const DeviceRow& r = job.rows[index];
  const Row& row = r.row;
  const DeviceSettings& group = job.settings[row.group];
  Settings settings = group.settings;
  if (group.lr_at) settings.lr = scalar_at(group.lr_at, group.lr_dtype);
  const Count count = count_of(row, settings);
  const bool wide = kFull && row.param.dtype == DType::float64, trusted = kFull && is_trusted(r, phase);
  block.unscale = unscale_of(job);
  const double factor = r.needs & Need::wide_norm ? math::perturb_factor(settings.perturb, sqrt(squares)) : 1.0;
  block.seed = settings.seed;
  block.param_number = row.param_number;
  block.taken = math::step_word(count.step);
  // Powers are slow, and most rows have the group and the step of the row before.
  const bool known = block.group == row.group && block.step == count.step && block.mu_product == count.mu_product &&
                     block.first == row.first && block.wide == wide && !trusted;
  const bool decays = !settings.decoupled && settings.weight_decay != 0;
  block.todo = (r.needs & kElementNeeds) | (decays ? kDecay : 0) | (known ? block.todo & kRuleBits : 0);
  block.group = trusted ? -1 : row.group;
  block.step = count.step;
  block.mu_product = count.mu_product;
  block.first = row.first;
  block.wide = wide;
  const DeviceRow* const ratio = trusted ? &r : nullptr;
  if constexpr (kFull) {
    if (wide) {
      set_transform<double>(block, settings, factor);
      if (!known) set_coef<double>(block, row, settings, count, ratio);
      return;
    }
  }
  set_transform<float>(block, settings, factor);
  if (!known) set_coef<float>(block, row, settings, count, ratio);
}

template <bool kFull> __device__ void enter_row(const Job& job, BlockRow& block, int index, Phase phase, double global) {
  const double squares = squares_of(job, index, job.settings[job.rows[index].row.group], global);
  __syncthreads();  // no thread still reads the last row's numbers
  if (threadIdx.x == 0) set_row<kFull>(job, block, index, phase, squares);
  __syncthreads();
}

}  // namespace
}  // namespace gradfused::cuda
