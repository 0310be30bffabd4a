// Adan (Xie et al. 2022), as its authors' code computes it.
#pragma once

#include "math/rule.h"

namespace gradfused::math {
namespace {

struct Adan : RuleBase {
  static constexpr int states = 4;  // exp_avg, exp_avg_sq, exp_avg_diff, neg_pre_grad
  static constexpr bool coupled = false;
  template <class T> struct Coef {
    T shrink, step, beta1, fresh1, beta2, fresh2, beta3, fresh3, unbias, eps, of_difference, known;
  };
  // Proximal decay divides by 1 + lr * weight_decay after the update.
  template <class T> GRADFUSED_MATH static Coef<T> coef(const Settings& settings, const Count& now) {
    const double correction1 = correction(settings.beta1, now.step), correction2 = correction(settings.beta2, now.step);
    const double decay = settings.lr * settings.weight_decay, by = settings.proximal ? 1.0 / (1.0 + decay) : 1.0;
    return {T(settings.proximal ? by : 1.0 - decay),
            T(settings.lr / correction1 * by),
            T(settings.beta1),
            T(1.0 - settings.beta1),
            T(settings.beta2),
            T(1.0 - settings.beta2),
            T(settings.beta3),
            T(1.0 - settings.beta3),
            T(1.0 / sqrt(correction(settings.beta3, now.step))),
            T(settings.eps),
            T(settings.beta2 * correction1 / correction2),
            T(now.first ? 0 : 1)};
  }
  template <class T> GRADFUSED_MATH static T direction(T g, T, T* s, const Coef<T>& c) {
    const T difference = (g + s[3]) * c.known;  // a choice instead keeps GCC from vectorising the step
    s[0] = s[0] * c.beta1 + g * c.fresh1;
    s[2] = s[2] * c.beta2 + difference * c.fresh2;
    const T ahead = g + c.beta2 * difference;
    s[1] = s[1] * c.beta3 + ahead * c.fresh3 * ahead;
    s[3] = -g;
    return (s[0] + s[2] * c.of_difference) / (root(s[1]) * c.unbias + c.eps);
  }
};

}  // namespace
}  // namespace gradfused::math
