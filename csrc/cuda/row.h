// What a block knows of the row that it works on.
#pragma once

#include "cuda/kept.h"
#include "math/rule.h"

namespace gradfused::cuda {
namespace {

// What there is to do with each element: first what depends on the row, then what depends on the walk. Bits 2 and 3 are those of
// cuda/kept.h.
enum Todo : uint32_t {
  kNoise = 1u << 0,
  kDecay = 1u << 1,   // coupled
  kMaster = 1u << 4,  // the copy in float32 is written
  kStochastic = 1u << 5,
  kEma = 1u << 6,
  kZeroGrad = 1u << 7,
  kTrustsUpdate = 1u << 8,
  kReads = 1u << 9,  // of the first state; the others' follow
  kWrites = 1u << (9 + kMaxStates),
  kHeld = 1u << 17,          // the tile has what the last walk left there
  kCentreBefore = 1u << 18,  // the mean is taken off what the rule is given
  kDirect = 1u << 19,
  kCentreAfter = 1u << 20,  // the mean is taken off what the rule makes of it
  kMove = 1u << 21,         // states are written
  kSum = 1u << 22,          // of what has come about so far
  kHold = 1u << 23,         // and it is put into the tile
  kWeigh = 1u << 24,        // sums of squares for a trust ratio
  kStep = 1u << 25,         // weights are written, and what rides on that
};
static_assert(9 + 2 * kMaxStates == 17, "the states' bits have room");

template <class T> struct Move {
  T shrink, step;        // of the weights, of the direction
  math::Mix<T> average;  // how an average takes new weights
  T decay;               // what LAMB adds to a direction before it takes its norm
};

// Worked out by one thread when the row changes.
struct Now {
  alignas(16) char coef[96];       // the rule's Coef<T>
  alignas(16) char transform[64];  // Transform<T>, but for what is of a unit
  alignas(16) char move[48];       // Move<T>
  double unscale, step, mu_product;
  uint64_t seed;
  uint32_t param_number, taken;  // with the seed, what draws are a function of: the parameter's number, steps taken before this one
  uint32_t todo;
  int row;
  int group;  // with step, product, `first` and `wide`: what coef was made for; -1: for no other row
  bool first, wide;
};

// Where the block is.
struct Place {
  const Job& job;
  const DeviceRow& r;
  const Chunk& c;
  const Now& now;
  char* tile;
  int index;
  Doing doing;
};

__device__ double scalar_at(const char* at, DType dtype) {
  return dtype == DType::float64 ? *reinterpret_cast<const double*>(at) : double(*reinterpret_cast<const float*>(at));
}
__device__ void put_scalar(char* at, DType dtype, double value) {
  if (dtype == DType::float64) {
    *reinterpret_cast<double*>(at) = value;
  } else {
    *reinterpret_cast<float*>(at) = float(value);
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
  if (!job.any_global) return 0;
  return sum_rows(0, job.row_count, [&](int i) {
    return job.settings[job.rows[i].row.group].settings.norm_scope == NormScope::global ? job.squares[i] : 0.0;
  });
}

// Whether what the norms saw forbids the step.
__device__ bool is_spoilt(const Job& job) {
  if (!job.any_skip) return false;
  return sum_rows(0, job.row_count, [&](int i) {
           const bool finite = job.squares[i] - job.squares[i] == 0.0;
           return job.settings[job.rows[i].row.group].settings.skip_nonfinite && !finite ? 1.0 : 0.0;
         }) > 0;
}

template <class T> __device__ void set_transform(Now& now, const Settings& settings, double factor) {
  static_assert(sizeof(math::Transform<T>) <= sizeof(now.transform), "room for the transform");
  const double sigma = settings.noise > 0 ? math::noise_sigma(settings.noise, settings.noise_decay, now.step - 1) : 0.0;
  *reinterpret_cast<math::Transform<T>*>(now.transform) = {T(now.unscale),
                                                           T(0),
                                                           T(factor),
                                                           T(settings.clip_value),
                                                           T(sigma),
                                                           T(settings.sign),
                                                           settings.decoupled ? T(0) : T(settings.weight_decay)};
}

// What a row's options and weights ask of each element.
__device__ uint32_t todo_of(const Row& row, const Settings& settings) {
  uint32_t todo = kept_in(row);
  const auto ask = [&](bool asked, uint32_t what) { todo |= asked ? what : 0; };
  ask(settings.noise > 0, kNoise);
  ask(!settings.decoupled && settings.weight_decay != 0, kDecay);
  ask(row.precision == Precision::master, kMaster);
  ask(row.precision == Precision::stochastic, kStochastic);
  ask(row.ema.data, kEma);
  ask(settings.zero_grad_in_step, kZeroGrad);
  return todo;
}

}  // namespace
}  // namespace gradfused::cuda
