// RMSprop (Hinton 2012), plain, centred (Graves 2013) and with momentum, as torch.optim.RMSprop computes it. beta2 is its alpha.
#pragma once

#include "math/rule.h"

namespace gradfused::math {
namespace {

template <bool kCentered, bool kMomentum> struct RMSpropRule : RuleBase {
  static constexpr int states = 1 + kMomentum + kCentered;  // square_avg, momentum_buffer, grad_avg
  template <class T> struct Coef {
    T shrink, step, alpha, fresh, eps, momentum;
    Mix<T> average;
  };
  template <class T> GRADFUSED_MATH static Coef<T> coef(const Settings& settings, const Count&) {
    return {T(1),
            T(settings.lr),
            T(settings.beta2),
            T(1.0 - settings.beta2),
            T(settings.eps),
            T(settings.momentum),
            Mix<T>::of(1.0 - settings.beta2)};
  }
  template <class T> GRADFUSED_MATH static T direction(T g, T, T* s, const Coef<T>& c) {
    constexpr int average = 1 + kMomentum;
    s[0] = s[0] * c.alpha + g * c.fresh * g;
    T square = s[0];
    if (kCentered) {
      T& mean = s[kCentered ? average : 0];
      mean = c.average(mean, g);
      // No further than the greatest finite number: where the average square is infinite, what is left of it is as well.
      const T most = math::greatest_of(T()), of_mean = mean * mean;
      square = square - (of_mean > most ? most : of_mean);
    }
    const T d = g / (root(square) + c.eps);
    if (!kMomentum) return d;
    s[kMomentum] = s[kMomentum] * c.momentum + d;
    return s[kMomentum];
  }
};

using RMSprop = RMSpropRule<false, false>;
using RMSpropMomentum = RMSpropRule<false, true>;
using RMSpropCentered = RMSpropRule<true, false>;
using RMSpropCenteredMomentum = RMSpropRule<true, true>;

}  // namespace
}  // namespace gradfused::math
