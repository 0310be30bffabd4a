// What a block knows of the row that it works on, the rules that a row may have, and what a block does when its next chunk is of another row.
#pragma once

#include "cuda/gradient.h"
#include "math/noise.h"
#include "math/rules.h"

#define GRADFUSED_PASTE(a, b) a##b
#define GRADFUSED_NAME(a, b) GRADFUSED_PASTE(a, b)
#define GRADFUSED_STRING(x) #x
#define GRADFUSED_TEXT(x) GRADFUSED_STRING(x)

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

// ---- the rules of the family that is being compiled: GRADFUSED_FAMILY names it

constexpr __host__ __device__ bool same(const char* a, const char* b) { return *a == *b && (*a == '\0' || same(a + 1, b + 1)); }

// Runs f with the rule, one of this family. Big bodies are given as functors: the compiler does not inline lambdas of that size, and calls
// go through local memory.
template <class F> __device__ __forceinline__ void with_rule(Rule rule, const F& f) {
  switch (rule) {
#define GRADFUSED_RULE(name, type, family)                                                 \
  case Rule::name:                                                                         \
    if constexpr (same(#family, GRADFUSED_TEXT(GRADFUSED_FAMILY))) return f(math::type{}); \
    return;
#include "rules.def"
#undef GRADFUSED_RULE
    case Rule::count: return;
  }
}

constexpr int most_states() {
  int most = 0;
#define GRADFUSED_RULE(name, type, family) \
  if (same(#family, GRADFUSED_TEXT(GRADFUSED_FAMILY)) && math::type::states > most) most = math::type::states;
#include "rules.def"
#undef GRADFUSED_RULE
  return most;
}

// The only rule that a body is compiled for.
template <class R> struct OneRule {
  static constexpr int states = R::states;
  const BlockRow& block;  // in shared memory: fewer registers

  __device__ OneRule(const BlockRow& row, Rule) : block(row) {}
  __device__ __forceinline__ bool reads(int) const { return R::reads_state; }
  __device__ __forceinline__ bool writes(int) const { return true; }

  // x <- the direction the rule takes at one element.
  template <class T> __device__ __forceinline__ void direct(T& x, T weight, T* state) const {
    x = R::direction(x, weight, state, *reinterpret_cast<const typename R::template Coef<T>*>(block.coef));
  }
};

template <class T> struct DirectOne {
  const BlockRow& block;
  T &x, weight, *state;
  template <class R> __device__ __forceinline__ void operator()(R) const { OneRule<R>(block, Rule()).direct(x, weight, state); }
};

// Any rule of the family, chosen at run time: one body for all of them.
struct AnyRule {
  static constexpr int states = most_states();
  const BlockRow& block;
  const Rule rule;

  __device__ AnyRule(const BlockRow& row, Rule which) : block(row), rule(which) {}
  __device__ __forceinline__ bool reads(int n) const { return block.todo & (kReads << n); }
  __device__ __forceinline__ bool writes(int n) const { return block.todo & (kWrites << n); }

  template <class T> __device__ __forceinline__ void direct(T& x, T weight, T* state) const {
    with_rule(rule, DirectOne<T>{block, x, weight, state});
  }
};

// Writes the rule's numbers for a row to block.coef, and those that all rules have to block.move.
template <class T>
__device__ void set_coef(BlockRow& block, const Row& row, const Settings& settings, const Count& count, const DeviceRow* trusted) {
  with_rule(row.rule, [&](auto rule) {
    using R = decltype(rule);
    using C = typename R::template Coef<T>;
    static_assert(sizeof(C) <= sizeof(block.coef), "room for the coefficients");
    C c = R::template coef<T>(settings, count);
    if constexpr (R::trust != math::Trust::none) {
      if (trusted) R::template trusted<T>(c, settings, trusted->weight_norm, trusted->norm);
    }
    *reinterpret_cast<C*>(block.coef) = c;
    static_assert(sizeof(Move<T>) <= sizeof(block.move), "room for the numbers of all rules");
    *reinterpret_cast<Move<T>*>(block.move) = {c.shrink, c.step, math::Mix<T>::of(1.0 - settings.ema), T(settings.weight_decay)};
    constexpr uint32_t states = (1u << R::states) - 1;
    block.todo |= (R::reads_state ? states : 0) * kReads | states * kWrites;
    if (R::trust == math::Trust::update) block.todo |= kTrustsUpdate;
  });
}

// ---- entering a row

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
