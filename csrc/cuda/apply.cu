// The launches that take the step, for the rules of one family: compiled for each with GRADFUSED_FAMILY naming it, in a lean and a full
// version (GRADFUSED_FULL).
//
// A block walks its share of the chunks, last one first, so that what the stats kernel read last is still in cache. A unit's gradient
// is read once and held in shared memory between its mean or norm and its update; what needs no statistics of its own streams through.
#include "cuda/launch.h"
#if GRADFUSED_FULL
#include "cuda/full.h"
#define GRADFUSED_VERSION_OF(name) GRADFUSED_NAME(GRADFUSED_NAME(name, GRADFUSED_FAMILY), _full)
#else
#include "cuda/lean.h"
#define GRADFUSED_VERSION_OF(name) GRADFUSED_NAME(GRADFUSED_NAME(name, GRADFUSED_FAMILY), _lean)
#endif

namespace gradfused::cuda {
namespace {

// ---- what the last block of a launch does once all others are done: a warp puts a row's chunks together, in a fixed order

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

// ---- the kernel

constexpr bool kFull = GRADFUSED_FULL;
#define GRADFUSED_KERNEL GRADFUSED_VERSION_OF(step_)

__global__ void __launch_bounds__(kThreads, kFull ? 2 : 3) GRADFUSED_KERNEL(const __grid_constant__ Job job, const Phase phase) {
  alignas(16) __shared__ char tile[kTileBytes];
  __shared__ BlockRow block;
  const bool refused = job.found_inf && *job.found_inf != 0;
  const bool spoilt = !refused && is_spoilt(job);
  const double global = global_squares(job);
  if (threadIdx.x == 0) block.group = -1;
  __syncthreads();
  int entered = -1;
  const Share share = share_of(refused || spoilt ? 0 : job.chunk_count);
  for (int index = share.end - 1; index >= share.first; --index) {
    const Chunk& c = job.chunks[index];
    const DeviceRow& r = job.rows[c.row];
    if (kFull && !takes_part(r, phase)) continue;
    if (c.row != entered) enter_row<kFull>(job, block, entered = c.row, phase, global);
    const ChunkTask task{job, r, c, block, tile, index, phase};
#if GRADFUSED_FULL
    step_full(task);
#else
    step_lean(task);
#endif
  }
  if (!last_block(job.tickets)) return;
  if (!refused && !spoilt) finish(job, kFull ? phase : Phase::step);
  if (spoilt && phase == Phase::step && threadIdx.x == 0) *job.skipped += 1;
}

}  // namespace

void GRADFUSED_VERSION_OF(apply_)(const Job& job, Phase phase, int device, void* stream) {
  launch<GRADFUSED_KERNEL>("apply", job.chunk_count, device, stream, job, phase);
}

}  // namespace gradfused::cuda
