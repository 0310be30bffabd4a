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
    T shrink, step, momentum, fresh;
    bool nesterov;
  };
  // The first gradient fills the buffer undamped.
  template <class T> GRADFUSED_MATH static Coef<T> coef(const Settings& settings, const Count& now) {
    return {T(1), T(settings.lr), T(settings.momentum), T(now.first ? 1.0 : 1.0 - settings.dampening), settings.nesterov};
  }
  template <class T> GRADFUSED_MATH static T direction(T g, T, T* s, const Coef<T>& c) {
    s[0] = s[0] * c.momentum + g * c.fresh;
    return c.nesterov ? g + s[0] * c.momentum : s[0];
  }
};

}  // namespace
}  // namespace gradfused::math
