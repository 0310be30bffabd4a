// The loops over a block: stage by stage, and all of a step in one.
#pragma once

#include "cpu/block.h"
#include "math/rules.h"

namespace gradfused::cpu {
namespace {

// Stages 0 to 6. g may not overlap to.
template <bool kNoisy, bool kDecayed, class T>
void transform(const Block& b, const T* __restrict g, const float* __restrict noise, const T* __restrict p, T* __restrict to,
               const PerUnit<T>& means, const PerUnit<T>& factors, math::Transform<T> t) {
  for (int64_t u = 0; u < b.units; ++u) {
    t.mean = means.value[u];
    t.factor = factors.value[u];
    for (int64_t i = u * b.length; i < (u + 1) * b.length; ++i) {
      T x = math::perturbed(g[i], t);
      if (kNoisy) x = x + t.sigma * T(noise[i]);
      x = x * t.sign;
      if (kDecayed) x = x + t.decay * p[i];
      to[i] = x;
    }
  }
}

// One element's state in registers.
template <class R, class T> struct Register {
  static constexpr int read = R::reads_state ? R::states : 0;
  T s[kMaxStates];
  Register(const T* s0, const T* s1, const T* s2, const T* s3, int64_t i)
      : s{read > 0 ? s0[i] : T(0), read > 1 ? s1[i] : T(0), read > 2 ? s2[i] : T(0), read > 3 ? s3[i] : T(0)} {}
  void store(T* s0, T* s1, T* s2, T* s3, int64_t i) const {
    if (R::states > 0) s0[i] = s[0];
    if (R::states > 1) s1[i] = s[1];
    if (R::states > 2) s2[i] = s[2];
    if (R::states > 3) s3[i] = s[3];
  }
};

// g <- the direction the rule takes. The states move unless this is a rehearsal.
template <class R, bool kKeep, class T>
void direct(T* __restrict g, const T* __restrict p, T* __restrict s0, T* __restrict s1, T* __restrict s2, T* __restrict s3, int64_t n,
            const typename R::template Coef<T> c) {
  for (int64_t i = 0; i < n; ++i) {
    Register<R, T> state(s0, s1, s2, s3, i);
    g[i] = R::direction(g[i], p[i], state.s, c);
    if (kKeep) state.store(s0, s1, s2, s3, i);
  }
}

template <class T> void descend(T* __restrict p, const T* __restrict d, int64_t n, T shrink, T step) {
  for (int64_t i = 0; i < n; ++i) p[i] = p[i] * shrink - step * d[i];
}

// What happens to a gradient before the rule sees it.
enum class Before { nothing, perturbed, perturbed_and_decayed };

// transform(), direct() and descend() for a few neighbours from element i on.
template <class R, Before kBefore, int kCount, class S, class T>
GRADFUSED_MATH void step_few(const S* g, S* p, S* s0, S* s1, S* s2, S* s3, int64_t i, const math::Transform<T>& t,
                             const typename R::template Coef<T>& c) {
  T gradient[kCount], weight[kCount], state[kMaxStates][kCount];
  widen_few(g + i, gradient);
  widen_few(p + i, weight);
  constexpr int read = Register<R, T>::read;
  if (read > 0) widen_few(s0 + i, state[0]);
  if (read > 1) widen_few(s1 + i, state[1]);
  if (read > 2) widen_few(s2 + i, state[2]);
  if (read > 3) widen_few(s3 + i, state[3]);
  // A loop over a register's lanes is vectorised; GCC 12 would unroll it first.
#pragma GCC unroll 1
  for (int k = 0; k < kCount; ++k) {
    T x = gradient[k], s[kMaxStates] = {read > 0 ? state[0][k] : T(0), read > 1 ? state[1][k] : T(0), read > 2 ? state[2][k] : T(0),
                                        read > 3 ? state[3][k] : T(0)};
    if (kBefore != Before::nothing) x = math::perturbed(x, t) * t.sign;
    if (kBefore == Before::perturbed_and_decayed) x = x + t.decay * weight[k];
    const T d = R::direction(x, weight[k], s, c);
    weight[k] = weight[k] * c.shrink - c.step * d;
    for (int j = 0; j < R::states; ++j) state[j][k] = s[j];
  }
  narrow_few(weight, p + i);
  if (R::states > 0) narrow_few(state[0], s0 + i);
  if (R::states > 1) narrow_few(state[1], s1 + i);
  if (R::states > 2) narrow_few(state[2], s2 + i);
  if (R::states > 3) narrow_few(state[3], s3 + i);
}

// All of a step in one loop: all streams move together, which memory likes best. Not inlined, where __restrict would no longer hold.
template <class R, Before kBefore, class S, class T>
__attribute__((noinline)) void step_units(const Block& b, const S* __restrict g, S* __restrict p, S* __restrict s0, S* __restrict s1,
                                          S* __restrict s2, S* __restrict s3, const PerUnit<T>& means, const PerUnit<T>& factors,
                                          math::Transform<T> t, const typename R::template Coef<T> c) {
  for (int64_t u = 0; u < b.units; ++u) {
    t.mean = means.value[u];
    t.factor = factors.value[u];
    int64_t i = u * b.length;
    const int64_t end = i + b.length;
    for (; i + kFew<S> <= end; i += kFew<S>) step_few<R, kBefore, kFew<S>>(g, p, s0, s1, s2, s3, i, t, c);
    for (; i < end; ++i) step_few<R, kBefore, 1>(g, p, s0, s1, s2, s3, i, t, c);
  }
}

}  // namespace
}  // namespace gradfused::cpu
