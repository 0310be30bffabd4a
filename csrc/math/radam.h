// RAdam (Liu et al. 2020), as torch.optim.RAdam computes it.
#pragma once

#include "math/rule.h"

namespace gradfused::math {
namespace {

struct RAdam : RuleBase {
  static constexpr int states = 2;  // exp_avg, exp_avg_sq
  template <class T> struct Coef {
    T shrink, step;
    Moments<T> moments;
    T eps;
    bool rectified;
  };
  // While the variance of the adaptive rate is intractable, the first steps, it is left out.
  template <class T> GRADFUSED_MATH static Coef<T> coef(const Settings& settings, const Count& now) {
    const double power = pow(settings.beta2, now.step), correction1 = 1.0 - pow(settings.beta1, now.step), correction2 = 1.0 - power;
    const double most = 2.0 / (1.0 - settings.beta2) - 1.0, length = most - 2.0 * now.step * power / correction2;
    const bool rectified = length > 5.0;
    const double rectification =
        rectified ? sqrt((length - 4.0) * (length - 2.0) * most / ((most - 4.0) * (most - 2.0) * length) * correction2) : 1.0;
    return {T(decayed_if_decoupled(settings)), T(settings.lr / correction1 * rectification), Moments<T>::of(settings), T(settings.eps),
            rectified};
  }
  template <class T> GRADFUSED_MATH static T direction(T g, T, T* s, const Coef<T>& c) {
    c.moments.update(g, s);
    const T adaptive = root(s[1]) + c.eps;
    return s[0] / (c.rectified ? adaptive : T(1));
  }
};

}  // namespace
}  // namespace gradfused::math
