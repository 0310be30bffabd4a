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
  template <class T> GRADFUSED_MATH static Coef<T> coef(const Settings& settings, const Count&) {
    return {T(decayed(settings)), T(settings.lr), T(settings.beta1), T(1.0 - settings.beta1), T(settings.beta2), T(1.0 - settings.beta2)};
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
