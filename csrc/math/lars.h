// LARS (You et al. 2017): SGD on gradients brought to a length proportional to that of the weights.
#pragma once

#include "math/rule.h"

namespace gradfused::math {
namespace {

template <bool kMomentum> struct LARSRule : RuleBase {
  static constexpr int states = kMomentum;  // momentum_buffer
  static constexpr bool coupled = false;
  static constexpr Trust trust = Trust::gradient;
  template <class T> struct Coef {
    T shrink, step, decay, scale;
    Momentum<T> momentum;
  };
  template <class T> GRADFUSED_MATH static Coef<T> coef(const Settings& settings, const Count& now) {
    return {T(1), T(settings.lr), T(settings.weight_decay), T(1), Momentum<T>::of(settings, now)};
  }
  // `norm` is that of the gradient without decay.
  template <class T> GRADFUSED_MATH static void trusted(Coef<T>& c, const Settings& settings, double weight_norm, double norm) {
    c.scale = T(trust_ratio(settings.trust_coefficient * weight_norm, norm, norm + settings.weight_decay * weight_norm + settings.eps));
  }
  template <class T> GRADFUSED_MATH static T direction(T g, T p, T* s, const Coef<T>& c) {
    g = (g + c.decay * p) * c.scale;
    return kMomentum ? c.momentum.direction(g, s[0]) : g;
  }
};

using LARS = LARSRule<false>;
using LARSMomentum = LARSRule<true>;

}  // namespace
}  // namespace gradfused::math
