// LAMB (You et al. 2020): Adam's update, decay included, at a length proportional to that of the weights.
#pragma once

#include "math/rule.h"

namespace gradfused::math {
namespace {

struct LAMB : RuleBase {
  static constexpr int states = 2;  // exp_avg, exp_avg_sq
  static constexpr bool coupled = false;
  static constexpr Trust trust = Trust::update;
  template <class T> struct Coef {
    T shrink, step;
    Moments<T> moments;
    T unbias1, unbias2, eps;
  };
  template <class T> GRADFUSED_MATH static Coef<T> coef(const Settings& settings, const Count& now) {
    return {T(decayed(settings)),
            T(settings.lr),
            Moments<T>::of(settings),
            T(1.0 / correction(settings.beta1, now.step)),
            T(1.0 / sqrt(correction(settings.beta2, now.step))),
            T(settings.eps)};
  }
  // `norm` is that of direction + weight_decay * p.
  template <class T> GRADFUSED_MATH static void trusted(Coef<T>& c, const Settings& settings, double weight_norm, double norm) {
    const double rate = settings.lr * trust_ratio(weight_norm, norm, norm);
    c.shrink = T(1.0 - rate * settings.weight_decay);
    c.step = T(rate);
  }
  template <class T> GRADFUSED_MATH static T direction(T g, T, T* s, const Coef<T>& c) {
    c.moments.update(g, s);
    return s[0] * c.unbias1 / (root(s[1]) * c.unbias2 + c.eps);
  }
};

}  // namespace
}  // namespace gradfused::math
