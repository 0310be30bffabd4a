// NAdam (Dozat 2016), as torch.optim.NAdam computes it.
#pragma once

#include "math/rule.h"

namespace gradfused::math {
namespace {

struct NAdam : RuleBase {
  static constexpr int states = 2;  // exp_avg, exp_avg_sq
  static constexpr bool mu_product = true;
  template <class T> struct Coef {
    T shrink, step;
    Moments<T> moments;
    T unbias, eps, of_gradient, of_average;
  };
  template <class T> GRADFUSED_MATH static Coef<T> coef(const Settings& settings, const Count& now) {
    const double mu = warmed_momentum(settings, now.step), next = warmed_momentum(settings, now.step + 1.0);
    return {T(decayed_if_decoupled(settings)),
            T(settings.lr),
            Moments<T>::of(settings),
            T(1.0 / correction(settings.beta2, now.step)),
            T(settings.eps),
            T((1.0 - mu) / (1.0 - now.mu_product)),
            T(next / (1.0 - now.mu_product * next))};
  }
  template <class T> GRADFUSED_MATH static T direction(T g, T, T* s, const Coef<T>& c) {
    c.moments.update(g, s);
    return (g * c.of_gradient + s[0] * c.of_average) / (root(s[1] * c.unbias) + c.eps);
  }
};

}  // namespace
}  // namespace gradfused::math
