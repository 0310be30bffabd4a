// What a block knows of the row that it works on.
#pragma once

#include "cuda/kept.h"
#include "math/rule.h"

namespace gradfused::cuda {
namespace {

// What there is to do with each element: bits of the row's needs, and beside them those of its rule and of a walk over a unit.
constexpr Needs kElementNeeds =
    Need::noise | Need::copy | Need::kahan | Need::stochastic | Need::master | Need::ema | Need::zero_grad_in_step;
enum Todo : uint32_t {
  kDecay = 1u << 0,   // weight decay is added to the gradient
  kReads = 1u << 1,   // the first state; the others' bits follow
  kWrites = 1u << 5,  // likewise
  kTrustsUpdate = 1u << 9,
  kHeld = 1u << 10,          // the tile holds what the last walk left there
  kCentreBefore = 1u << 11,  // the late mean is subtracted before the rule
  kDirect = 1u << 12,        // the rule is applied
  kCentreAfter = 1u << 13,   // the late mean is subtracted from the rule's direction
  kMove = 1u << 14,          // states are written
  kSum = 1u << 15,           // the result so far is summed for a late mean
  kHold = 1u << 24,          // and put into the tile
  kWeigh = 1u << 25,         // and squared for a trust ratio
  kStep = 1u << 26,          // weights are written, and what is kept along with them
};
constexpr uint32_t kStateBits = (1u << kMaxStates) - 1, kRuleBits = kTrustsUpdate | kStateBits * (kReads | kWrites);
static_assert(kMaxStates == 4, "the states' bits lie side by side");
static_assert(!(kElementNeeds &
                (kDecay | kRuleBits | kHeld | kCentreBefore | kDirect | kCentreAfter | kMove | kSum | kHold | kWeigh | kStep)),
              "a bit has one meaning");

template <class T> struct Move {
  T shrink, step;        // of the weights, of the direction
  math::Mix<T> average;  // how an average takes new weights
  T decay;               // what LAMB adds to a direction before it takes its norm
};

// The row that a block works on: computed by one thread when the row changes.
struct BlockRow {
  alignas(16) char coef[96];       // the rule's Coef<T>
  alignas(16) char transform[64];  // Transform<T> without what depends on the unit
  alignas(16) char move[48];       // Move<T>
  double unscale, step, mu_product;
  uint64_t seed;
  uint32_t param_number, taken;  // with the seed, what random draws depend on; `taken` steps were taken before this one
  uint32_t todo;
  int group;  // with step, mu_product, first and wide, what coef was made for; -1: for this row only
  bool first, wide;
};

// The chunk that a block works on.
struct ChunkTask {
  const Job& job;
  const DeviceRow& r;
  const Chunk& c;
  const BlockRow& block;
  char* tile;
  int index;
  Phase phase;
};

// The first bits of a row's needs are the phases that it takes part in, in their order.
__device__ __forceinline__ bool takes_part(const DeviceRow& r, Phase phase) { return r.needs & (1u << int(phase)); }

__device__ double scalar_at(const char* address, DType dtype) {
  return dtype == DType::float64 ? *reinterpret_cast<const double*>(address) : double(*reinterpret_cast<const float*>(address));
}
__device__ void put_scalar(char* address, DType dtype, double value) {
  if (dtype == DType::float64) {
    *reinterpret_cast<double*>(address) = value;
  } else {
    *reinterpret_cast<float*>(address) = float(value);
  }
}

// This step's number, and the product of the momenta up to it.
__device__ Count count_of(const Row& row, const Settings& settings) {
  Count count = {1 + (row.step ? scalar_at(row.step, row.step_dtype) : 0.0), row.first, 1};
  if (row.mu_product)
    count.mu_product = math::next_mu_product(settings, count.step, scalar_at(row.mu_product, row.mu_product_dtype), row.mu_product_dtype);
  return count;
}

// The block's sum of f(i) over rows [begin, end).
template <class F> __device__ __forceinline__ double sum_rows(int begin, int end, F f) {
  double total = 0;
  for (int i = begin + int(threadIdx.x); i < end; i += kThreads) total += f(i);
  return sum_block(total);
}

__device__ double global_squares(const Job& job) {
  if (!(job.needs & Need::global_norm)) return 0;
  return sum_rows(0, job.row_count, [&](int i) { return job.rows[i].needs & Need::global_norm ? job.squares[i] : 0.0; });
}

// Whether a norm that is not finite forbids the step.
__device__ bool is_spoilt(const Job& job) {
  if (!(job.needs & Need::skip)) return false;
  return sum_rows(0, job.row_count, [&](int i) {
           const bool finite = job.squares[i] - job.squares[i] == 0.0;
           return (job.rows[i].needs & Need::skip) && !finite ? 1.0 : 0.0;
         }) > 0;
}

template <class T> __device__ void set_transform(BlockRow& block, const Settings& settings, double factor) {
  static_assert(sizeof(math::Transform<T>) <= sizeof(block.transform), "room for the transform");
  const double sigma = settings.noise > 0 ? math::noise_sigma(settings.noise, settings.noise_decay, block.step - 1) : 0.0;
  *reinterpret_cast<math::Transform<T>*>(block.transform) = {T(block.unscale),
                                                             T(0),
                                                             T(factor),
                                                             T(settings.clip_value),
                                                             T(sigma),
                                                             T(settings.sign),
                                                             settings.decoupled ? T(0) : T(settings.weight_decay)};
}

}  // namespace
}  // namespace gradfused::cuda
