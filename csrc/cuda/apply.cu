// The launches that take the step, for the rules of one family: compiled for each with GRADFUSED_FAMILY naming it, in a lean and a full
// version (GRADFUSED_FULL).
//
// A block walks its share of the chunks, last one first, so that what the stats kernel read last is still in cache. A unit's gradient
// is read once and held in shared memory between its mean or norm and its update; what needs no statistics of its own streams through.
#include "cuda/finish.h"
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
