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
    Moments<T> moments;
    T unbias, eps;
  };
  template <class T> GRADFUSED_MATH static Coef<T> coef(const Settings& settings, const Count& now) {
    return {T(decayed_if_decoupled(settings)), T(settings.lr / correction(settings.beta1, now.step)), Moments<T>::of(settings),
            T(1.0 / sqrt(correction(settings.beta2, now.step))), T(settings.eps)};
  }
  template <class T> GRADFUSED_MATH static T direction(T g, T, T* s, const Coef<T>& c) {
    c.moments.update(g, s);
    if (kAmsgrad) s[2] = maximum(s[2], s[1]);
    return s[0] / (root(s[kAmsgrad ? 2 : 1]) * c.unbias + c.eps);
  }
};

using Adam = AdamRule<false>;
using AdamAmsgrad = AdamRule<true>;

}  // namespace
}  // namespace gradfused::math
