// What the last block of a launch does once all others are done: a warp puts a row's chunks together, in a fixed order.
#pragma once

#include "cuda/row.h"

namespace gradfused::cuda {
namespace {

// The step was taken: the counts of the rows go up by one.
__device__ void finish_step(const Job& job) {
  for (int i = int(threadIdx.x) / kLanes; i < job.row_count; i += kWarps) {
    DeviceRow& r = job.rows[i];
    Row& row = r.row;
    const Settings& settings = job.settings[row.group].settings;
    if ((r.needs & Need::unit_norms) && !(r.needs & Need::measured)) {
      const double squares = sum_chunks(r.chunk0, r.chunk1, [&](int c) { return job.sums[c].squares; });
      if (threadIdx.x % kLanes == 0) job.squares[i] = squares;
    }
    if (threadIdx.x % kLanes) continue;
    const Count count = count_of(row, settings);
    if (row.step) put_scalar(row.step, row.step_dtype, count.step);
    if (row.mu_product) put_scalar(row.mu_product, row.mu_product_dtype, count.mu_product);
    row.first = false;
  }
}

// The means of what is centred late.
__device__ void finish_late_means(const Job& job) {
  for (int i = int(threadIdx.x) / kLanes; i < job.row_count; i += kWarps) {
    const DeviceRow& r = job.rows[i];
    if (!(r.needs & Need::late_means) || !r.row.numel) continue;
    const int64_t units = r.row.numel / r.row.unit_length;
    const int pieces = int((r.row.unit_length + kChunk - 1) / kChunk);
    double mean = 0;
    if (r.row.whole) mean = mean_of_chunks(job, r.chunk0, r.chunk1, double(r.row.numel));
    for (int64_t u = 0; u < units; ++u) {
      const int c0 = r.chunk0 + int(u) * pieces;
      if (!r.row.whole) mean = mean_of_chunks(job, c0, c0 + pieces, double(r.row.unit_length));
      if (threadIdx.x % kLanes == 0) job.units[r.unit0 + u].direction = mean;
    }
  }
}

// The norms of a trust ratio.
__device__ void finish_trust(const Job& job, Phase phase) {
  for (int i = int(threadIdx.x) / kLanes; i < job.row_count; i += kWarps) {
    DeviceRow& r = job.rows[i];
    if (!takes_part(r, phase)) continue;
    const double squares = sum_chunks(r.chunk0, r.chunk1, [&](int c) { return job.sums[c].sum; });
    const double weights = sum_chunks(r.chunk0, r.chunk1, [&](int c) { return job.sums[c].weight_squares; });
    if (threadIdx.x % kLanes) continue;
    r.norm = sqrt(squares);
    r.weight_norm = sqrt(weights);
  }
}

__device__ void finish(const Job& job, Phase phase) {
  switch (phase) {
    case Phase::step: return finish_step(job);
    case Phase::late_means: return finish_late_means(job);
    default: return finish_trust(job, phase);
  }
}

}  // namespace
}  // namespace gradfused::cuda
