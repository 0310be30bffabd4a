// SGD with and without momentum (Sutskever et al. 2013), as torch.optim.SGD computes it.
#pragma once

#include "math/rule.h"

namespace gradfused::math {
namespace {

struct SGD : RuleBase {
  static constexpr int states = 0;
  static constexpr bool half_in_loop = true;
  template <class T> struct Coef {
    T shrink, step;
  };
  template <class T> GRADFUSED_MATH static Coef<T> coef(const Settings& settings, const Count&) { return {T(1), T(settings.lr)}; }
  template <class T> GRADFUSED_MATH static T direction(T g, T, T*, const Coef<T>&) { return g; }
};

struct SGDMomentum : RuleBase {
  static constexpr int states = 1;
  static constexpr bool half_in_loop = true;
  template <class T> struct Coef {
    T shrink, step;
    Momentum<T> momentum;
  };
  template <class T> GRADFUSED_MATH static Coef<T> coef(const Settings& settings, const Count& now) {
    return {T(1), T(settings.lr), Momentum<T>::of(settings, now)};
  }
  template <class T> GRADFUSED_MATH static T direction(T g, T, T* s, const Coef<T>& c) { return c.momentum.direction(g, s[0]); }
};

}  // namespace
}  // namespace gradfused::math
