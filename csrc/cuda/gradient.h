// The gradient of a unit or a piece of a row, read from memory once and afterwards from the tile if it fits. Each thread reads from the tile
// only what it put there itself, so no barrier is needed.
#pragma once

#include "cuda/access.h"
#include "math/ascend.h"
#include "math/rule.h"

namespace gradfused::cuda {
namespace {

// ---- threads that share a unit: a power of two within a warp, or the whole block. Every thread of the block must make each call.

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// The sum over each group of `lanes` neighbours, at most a warp, known to all of them. The order is fixed.
__device__ __forceinline__ double sum_lanes(double x, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// The sum over the block, known to all threads.
__device__ __forceinline__ double sum_block(double x) {
  __shared__ double warps[kWarps];
  x = sum_lanes(x, kLanes);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % kLanes == 0) warps[threadIdx.x / kLanes] = x;
  __syncthreads();
  double total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += warps[w];
  return total;
}

__device__ __forceinline__ double sum_group(double x, int lanes) { return lanes > kLanes ? sum_block(x) : sum_lanes(x, lanes); }

// Whether all other blocks are done; if so, what they wrote is visible. Resets the counter to 0.
__device__ __forceinline__ bool last_block(unsigned* ticket) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (last) *ticket = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// ---- the gradient of a unit

// Sums of squares are taken in T and again in float64 where T could overflow or lose small values.
template <int kCount, class T> __device__ __forceinline__ double sum_squares(const T* x) {
  T sum = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) sum += x[k] * x[k];
  if (sizeof(T) == sizeof(double) || (sum > T(1e-30) && sum < T(1e36))) return double(sum);
  double exact = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) exact += double(x[k]) * double(x[k]);
  return exact;
}

// The mean of the values that the threads of a group read.
template <class T> struct RunningMean {
  T anchor = T(0);
  double sum = 0;
  int count = 0;

  template <int kCount> __device__ __forceinline__ void add(const T* x) {
    if (count == 0) anchor = math::anchor(x[0]);
    T part = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) part += x[k] - anchor;
    sum += double(part);
    count += kCount;
  }

  // The mean of the group's `numel` values, known to all its threads, computed around the mean of the first thread's.
  __device__ __forceinline__ double of_group(int lanes, double numel) const {
    const double own = count ? double(anchor) + sum / double(count) : 0.0;
    const double first = math::anchor(sum_group(int(threadIdx.x) % lanes ? 0.0 : own, lanes));
    return first + sum_group(count ? double(count) * (own - first) : 0.0, lanes) / numel;
  }
};

template <class A> struct Gradient {
  using T = typename A::Compute;
  using Pack = typename A::Pack;
  using Raw = typename A::Raw;
  static constexpr int width = A::width;

  const Operand& operand;
  const char* const data;
  const int lane, lanes;  // this thread's place in its group, and the group's size
  char* const tile;       // the group's part of the block's
  const T unscale;
  typename A::Handle from{};
  int count = 0;  // 0 if this group has nothing to do
  bool held = false;

  __device__ Gradient(const Operand& row, const char* address, int sharing, char* block_tile, double scale)
      : operand(row),
        data(address),
        lane(int(threadIdx.x) % sharing),
        lanes(sharing),
        tile(block_tile + int(threadIdx.x) / sharing * sharing * (kTileBytes / kThreads)),
        unscale(T(scale)) {}

  __device__ __forceinline__ void open(int64_t begin, int elements) {
    from = A::handle(operand, data, begin);
    count = elements;
    held = false;
  }

  template <class F> __device__ __forceinline__ void for_each(F f) const {
#pragma unroll 1
    for (int i = lane * width; i < count; i += lanes * width) f(i);
  }

  // f(i, load(i)), with several loads at a time: with one, too few bytes are in flight.
  template <int kAhead = 4, class L, class F> __device__ __forceinline__ void for_each_loaded(L load, F f) const {
    const int step = lanes * width;
    int i = lane * width;
#pragma unroll 1
    for (; i + (kAhead - 1) * step < count; i += kAhead * step) {
      decltype(load(0)) v[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) v[k] = load(i + k * step);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) f(i + k * step, v[k]);
    }
#pragma unroll 1
    for (; i < count; i += step) f(i, load(i));
  }

  // The tile as an array of what V is made of.
  template <class V> __device__ __forceinline__ V& slot(int i) const { return *reinterpret_cast<V*>(tile + i * int(sizeof(V) / width)); }

  __device__ __forceinline__ Pack read(int i) const { return held ? A::pack(slot<Raw>(i)) : A::load(from, i); }
  __device__ __forceinline__ Raw read_raw(int i) const { return held ? slot<Raw>(i) : A::load_raw(from, i); }

  __device__ __forceinline__ bool fits() const { return count <= lanes * (kTileBytes / kThreads) / int(sizeof(T)); }

  // The mean of the unscaled gradient of `numel` elements, known to all threads of the group. What fits in the tile is held from now on.
  __device__ __forceinline__ double mean(double numel) {
    const bool fitting = fits();
    RunningMean<T> seen;
    const auto add = [&](int i, const Pack& g) {
      if (fitting) slot<Raw>(i) = A::raw(g);
      T x[width];
#pragma unroll
      for (int k = 0; k < width; ++k) x[k] = T(math::widen(g.item[k])) * unscale;
      seen.template add<width>(x);
    };
    for_each_loaded([&](int i) { return A::load(from, i); }, add);
    held = fitting;
    return seen.of_group(lanes, numel);
  }

  // This thread's part of the centred sum of squares.
  __device__ __forceinline__ double own_squares(T mean) const {
    double total = 0;
    const auto add = [&](int, const Pack& g) {
      T x[width];
#pragma unroll
      for (int k = 0; k < width; ++k) x[k] = math::centred(T(math::widen(g.item[k])), unscale, mean);
      total += sum_squares<width>(x);
    };
    if (held) {
      for_each([&](int i) { add(i, A::pack(slot<Raw>(i))); });
    } else {
      for_each_loaded([&](int i) { return A::load(from, i); }, add);
    }
    return total;
  }

  // A load of 16-bit weights with a float32 copy is three accesses: the registers have room for no more of them.
  static constexpr int kRidersAhead = sizeof(typename A::RiderRaw) > 16 ? 1 : 4;

  // This thread's part of the sum of squares of the same elements' weights.
  template <class W> __device__ __forceinline__ double own_squares_of(const W& weights, Needs needs) const {
    double total = 0;
    const auto add = [&](int, const typename W::Loaded& v) {
      T x[width];
      weights.widen(v, needs, x);
      total += sum_squares<width>(x);
    };
    for_each_loaded<kRidersAhead>([&](int i) { return weights.load(i, needs); }, add);
    return total;
  }

  // This thread's part of the sum of squares of the gradient times what each weight may move by.
  template <class W> __device__ __forceinline__ double own_squares_reached(const W& weights, Needs needs, T eta) const {
    struct Both {
      Pack g;
      typename W::Loaded w;
    };
    double total = 0;
    const auto add = [&](int, const Both& v) {
      T x[width];
      weights.widen(v.w, needs, x);
#pragma unroll
      for (int k = 0; k < width; ++k) x[k] = math::centred(T(math::widen(v.g.item[k])), unscale, T(0)) * math::reach(x[k], eta);
      total += sum_squares<width>(x);
    };
    for_each_loaded<(kRidersAhead + 1) / 2>([&](int i) { return Both{A::load(from, i), weights.load(i, needs)}; }, add);
    return total;
  }
};

// The chunks of this block: neighbours, so that a block seldom changes rows.
struct Share {
  int first, end;
};
__device__ __forceinline__ Share share_of(int count) {
  return {int(int64_t(count) * blockIdx.x / gridDim.x), int(int64_t(count) * (blockIdx.x + 1) / gridDim.x)};
}

// A warp's sum of f(chunk) over chunks [begin, end).
template <class F> __device__ __forceinline__ double sum_chunks(int begin, int end, F f) {
  double total = 0;
#pragma unroll 4
  for (int c = begin + int(threadIdx.x) % kLanes; c < end; c += kLanes) total += f(c);
  return sum_lanes(total, kLanes);
}

// The mean of `numel` elements in chunks [begin, end), from each one's.
__device__ __forceinline__ double mean_of_chunks(const Job& job, int begin, int end, double numel) {
  const double first = math::anchor(job.sums[begin].sum);
  return first + sum_chunks(begin, end, [&](int c) { return double(job.chunks[c].count) * (job.sums[c].sum - first); }) / numel;
}

__device__ __forceinline__ double unscale_of(const Job& job) { return job.grad_scale ? 1.0 / double(*job.grad_scale) : 1.0; }

}  // namespace
}  // namespace gradfused::cuda
