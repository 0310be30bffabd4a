// Lion (Chen et al. 2023).
#pragma once

#include "math/rule.h"

namespace gradfused::math {
namespace {

struct Lion : RuleBase {
  static constexpr int states = 1;  // exp_avg
  static constexpr bool coupled = false;
  template <class T> struct Coef {
    T shrink, step, beta1, fresh1, beta2, fresh2;
  };
  template <class T> GRADFUSED_MATH static Coef<T> coef(const Hyper& h, const Count&) {
    return {T(1.0 - h.lr * h.weight_decay), T(h.lr), T(h.beta1), T(1.0 - h.beta1), T(h.beta2), T(1.0 - h.beta2)};
  }
  template <class T> GRADFUSED_MATH static T direction(T g, T, T* s, const Coef<T>& c) {
    const T x = s[0] * c.beta1 + g * c.fresh1;
    s[0] = s[0] * c.beta2 + g * c.fresh2;
    const T sign = x > T(0) ? T(1) : x < T(0) ? T(-1) : T(0);
    return x == x ? sign : x;  // NaN stays
  }
};

}  // namespace
}  // namespace gradfused::math
