// The rules of the family that is being compiled: GRADFUSED_FAMILY names it.
#pragma once

#include "cuda/row.h"
#include "math/rules.h"

#define GRADFUSED_PASTE(a, b) a##b
#define GRADFUSED_NAME(a, b) GRADFUSED_PASTE(a, b)
#define GRADFUSED_STRING(x) #x
#define GRADFUSED_TEXT(x) GRADFUSED_STRING(x)

namespace gradfused::cuda {
namespace {

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

}  // namespace
}  // namespace gradfused::cuda
