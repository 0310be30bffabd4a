// The launch of the phases `means` and `norms`: centred sums of squares of rows, and means of units that take several chunks. It reads each
// gradient once.
#include "cuda/gradient.h"
#include "cuda/launch.h"

namespace gradfused::cuda {
namespace {

// A chunk around its own mean; finish() moves it to the unit's (Chan et al. 1979), so that a long unit is read once as well.
template <class A> __device__ __forceinline__ void measure_piece(const Job& job, const DeviceRow& r, int index, bool centre, char* tile) {
  using T = typename A::Compute;
  const Chunk& c = job.chunks[index];
  Gradient<A> g(r.row.grad, job.grads[c.row], kThreads, tile, unscale_of(job));
  g.open(c.begin, c.count);
  const Settings& settings = job.settings[r.row.group].settings;
  const double mean = centre ? g.mean(double(c.count)) : 0.0;
  const bool weighed = (r.needs & Need::split) && settings.agc;
  KeptWeights<A> weights;
  if (settings.adaptive || weighed) weights.open(r.row, c.begin);
  const double squares = sum_block(settings.adaptive ? g.own_squares_reached(weights, r.needs, T(settings.eta)) : g.own_squares(T(mean)));
  const double weight_squares = weighed ? sum_block(g.own_squares_of(weights, r.needs)) : 0.0;
  if (threadIdx.x == 0) job.sums[index] = {mean, squares, weight_squares};
}

template <class A> __device__ __forceinline__ void measure_units(const Job& job, const DeviceRow& r, int index, char* tile) {
  using T = typename A::Compute;
  const Chunk& c = job.chunks[index];
  Gradient<A> g(r.row.grad, job.grads[c.row], c.lanes, tile, unscale_of(job));
  const int length = int(r.row.unit_length), units = c.count / length, groups = kThreads / c.lanes;
  double squares = 0;
  for (int first = 0; first < units; first += groups) {
    const int unit = first + int(threadIdx.x) / c.lanes;
    g.open(c.begin + int64_t(unit) * length, unit < units ? length : 0);
    const T mean = T(g.mean(double(length)));
    squares += g.own_squares(mean);
  }
  squares = sum_block(squares);
  if (threadIdx.x == 0) job.sums[index] = {0, squares, 0};
}

// One warp puts a row's chunks together where a mean or norm of its units takes several. Returns the row's sum of squares.
__device__ double finish_split_row(const Job& job, const DeviceRow& r, bool centre) {
  const Row& row = r.row;
  const bool leads = threadIdx.x % kLanes == 0;
  const auto weights = [&](int c) { return job.sums[c].weight_squares; };
  double mean = 0;
  const auto squares = [&](int c) {
    const double n = job.chunks[c].count, off = centre ? job.sums[c].sum - mean : 0.0;
    return job.sums[c].squares + n * off * off;
  };
  if (row.whole && centre) mean = mean_of_chunks(job, r.chunk0, r.chunk1, double(row.numel));
  const int64_t units = row.numel / row.unit_length;
  if (row.unit_length <= kBlockUnit) {  // short units of a tensor that is centred as a whole: their norms are taken in the step
    for (int64_t u = threadIdx.x % kLanes; u < units; u += kLanes) job.units[r.unit0 + u].mean = mean;
    return sum_chunks(r.chunk0, r.chunk1, squares);
  }
  double total = 0;
  const int pieces = int((row.unit_length + kChunk - 1) / kChunk);
  for (int64_t u = 0; u < units; ++u) {
    const int c0 = r.chunk0 + int(u) * pieces, c1 = c0 + pieces;
    if (!row.whole && centre) mean = mean_of_chunks(job, c0, c1, double(row.unit_length));
    const double s = sum_chunks(c0, c1, squares), w = sum_chunks(c0, c1, weights);
    if (leads) job.units[r.unit0 + u] = {mean, s, w, 0};
    total += s;
  }
  return total;
}

// Called by the last block: a warp a row, in a fixed order.
__device__ void finish(const Job& job) {
  for (int i = int(threadIdx.x) / kLanes; i < job.row_count; i += kWarps) {
    const DeviceRow& r = job.rows[i];
    if (!(r.needs & Need::measured)) continue;
    const double squares = (r.needs & Need::split) && r.row.numel
                               ? finish_split_row(job, r, r.needs & Need::centre_early)
                               : sum_chunks(r.chunk0, r.chunk1, [&](int c) { return job.sums[c].squares; });
    if (threadIdx.x % kLanes == 0) job.squares[i] = squares;
  }
}

__global__ void __launch_bounds__(kThreads, 4) stats(const __grid_constant__ Job job) {
  alignas(16) __shared__ char tile[kTileBytes];
  const Share share = share_of(job.chunk_count);
  for (int index = share.first; index < share.end; ++index) {
    const Chunk& c = job.chunks[index];
    const DeviceRow& r = job.rows[c.row];
    if (!(r.needs & Need::measured)) continue;
    const bool centre = r.needs & Need::centre_early;
    with_access(r.row, job.grads[c.row], c.plain, [&](auto access) {
      using A = decltype(access);
      centre && !(r.needs & Need::split) ? measure_units<A>(job, r, index, tile) : measure_piece<A>(job, r, index, centre, tile);
    });
  }
  if (last_block(job.tickets)) finish(job);
}

// ---- small writes to device memory

constexpr int kPatchBytes = 3968;
struct Patch {
  char* to;
  int bytes;
  char data[kPatchBytes];
};

__global__ void patch(const __grid_constant__ Patch p) {
  for (int i = int(threadIdx.x); i < p.bytes; i += kThreads) p.to[i] = p.data[i];
}

}  // namespace

void launch_stats(const Job& job, int device, void* stream) { launch<stats>("stats", job.chunk_count, device, stream, job); }

void launch_patch(void* to, const void* from, size_t bytes, int device, void* stream) {
  for (size_t done = 0; done < bytes; done += kPatchBytes) {
    Patch p;
    p.to = static_cast<char*>(to) + done;
    p.bytes = int(bytes - done < size_t(kPatchBytes) ? bytes - done : size_t(kPatchBytes));
    memcpy(p.data, static_cast<const char*>(from) + done, size_t(p.bytes));
    launch<patch>("patch", 1, device, stream, p);
  }
}

}  // namespace gradfused::cuda
