// Threads that share a unit: a power of two within a warp, or the whole block. Every thread of the block must make each call.
#pragma once

#include "cuda/device.h"
#include "cuda/job.h"

namespace gradfused::cuda {
namespace {

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

}  // namespace
}  // namespace gradfused::cuda
