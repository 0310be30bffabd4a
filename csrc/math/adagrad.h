// Adagrad (Duchi et al. 2011), as torch.optim.Adagrad computes it.
#pragma once

#include "math/rule.h"

namespace gradfused::math {
namespace {

struct Adagrad : RuleBase {
  static constexpr int states = 1;  // sum
  template <class T> struct Coef {
    T shrink, step, eps;
  };
  template <class T> GRADFUSED_MATH static Coef<T> coef(const Settings& settings, const Count& now) {
    return {T(1), T(settings.lr / (1.0 + (now.step - 1.0) * settings.lr_decay)), T(settings.eps)};
  }
  template <class T> GRADFUSED_MATH static T direction(T g, T, T* s, const Coef<T>& c) {
    s[0] = s[0] + g * g;
    return g / (root(s[0]) + c.eps);
  }
};

}  // namespace
}  // namespace gradfused::math
