// The ascent of SAM (Foret et al. 2021) and ASAM (Kwon et al. 2021): the transforms have scaled the gradient to length rho, p moves up
// along it, and the backup keeps the old p.
#pragma once

#include "math/rule.h"

namespace gradfused::math {
namespace {

// The scale of a weight's neighbourhood with Settings::adaptive.
template <class T> GRADFUSED_MATH T reach(T p, T eta) { return (p < T(0) ? -p : p) + eta; }

struct Ascend : RuleBase {
  static constexpr int states = 1;  // the backup
  static constexpr bool coupled = false;
  static constexpr bool reads_state = false;
  template <class T> struct Coef {
    T shrink, step, eta;
    bool adaptive;
  };
  template <class T> GRADFUSED_MATH static Coef<T> coef(const Settings& settings, const Count&) {
    return {T(1), T(-1), T(settings.eta), settings.adaptive};
  }
  template <class T> GRADFUSED_MATH static T direction(T g, T p, T* s, const Coef<T>& c) {
    s[0] = p;
    const T t = reach(p, c.eta);
    return c.adaptive ? g * t * t : g;
  }
};

}  // namespace
}  // namespace gradfused::math
