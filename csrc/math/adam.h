// Adam (Kingma & Ba 2015), AMSGrad (Reddi et al. 2018) and AdamW (Loshchilov & Hutter 2019), as torch.optim computes them.
#pragma once

#include "math/rule.h"

namespace gradfused::math {
namespace {

template <bool kAmsgrad> struct AdamRule : RuleBase {
  static constexpr int states = kAmsgrad ? 3 : 2;  // exp_avg, exp_avg_sq, max_exp_avg_sq
  static constexpr bool half_in_loop = true;
  template <class T> struct Coef {
    T shrink, step;
    Mix<T> average;
    T beta2, fresh_sq, unbias, eps;
  };
  template <class T> GRADFUSED_MATH static Coef<T> coef(const Settings& settings, const Count& now) {
    const double correction1 = 1.0 - pow(settings.beta1, now.step), correction2 = 1.0 - pow(settings.beta2, now.step);
    return {T(settings.decoupled ? 1.0 - settings.lr * settings.weight_decay : 1.0),
            T(settings.lr / correction1),
            Mix<T>::of(1.0 - settings.beta1),
            T(settings.beta2),
            T(1.0 - settings.beta2),
            T(1.0 / sqrt(correction2)),
            T(settings.eps)};
  }
  template <class T> GRADFUSED_MATH static T direction(T g, T, T* s, const Coef<T>& c) {
    s[0] = c.average(s[0], g);
    s[1] = s[1] * c.beta2 + g * c.fresh_sq * g;  // in torch's order, which keeps gradients of 1e20 finite
    if (kAmsgrad) s[2] = maximum(s[2], s[1]);
    return s[0] / (root(s[kAmsgrad ? 2 : 1]) * c.unbias + c.eps);
  }
};

using Adam = AdamRule<false>;
using AdamAmsgrad = AdamRule<true>;

}  // namespace
}  // namespace gradfused::math
