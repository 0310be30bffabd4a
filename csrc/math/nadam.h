// NAdam (Dozat 2016), as torch.optim.NAdam computes it.
#pragma once

#include "math/rule.h"

namespace gradfused::math {
namespace {

struct NAdam : RuleBase {
  static constexpr int states = 2;  // exp_avg, exp_avg_sq
  template <class T> struct Coef {
    T shrink, step;
    Mix<T> average;
    T beta2, fresh_sq, unbias, eps, of_gradient, of_average;
  };
  template <class T> GRADFUSED_MATH static Coef<T> coef(const Settings& settings, const Count& now) {
    const double mu = warmed_momentum(settings, now.step), next = warmed_momentum(settings, now.step + 1.0);
    return {T(settings.decoupled ? 1.0 - settings.lr * settings.weight_decay : 1.0),
            T(settings.lr),
            Mix<T>::of(1.0 - settings.beta1),
            T(settings.beta2),
            T(1.0 - settings.beta2),
            T(1.0 / (1.0 - pow(settings.beta2, now.step))),
            T(settings.eps),
            T((1.0 - mu) / (1.0 - now.mu_product)),
            T(next / (1.0 - now.mu_product * next))};
  }
  template <class T> GRADFUSED_MATH static T direction(T g, T, T* s, const Coef<T>& c) {
    s[0] = c.average(s[0], g);
    s[1] = s[1] * c.beta2 + g * c.fresh_sq * g;
    return (g * c.of_gradient + s[0] * c.of_average) / (root(s[1] * c.unbias) + c.eps);
  }
};

}  // namespace
}  // namespace gradfused::math
