// The transforms (stages 0 to 6 of a step) that a gradient passes through before the update rule.
#pragma once

#include "math/device.h"
#include "schema.h"

namespace gradfused::math {
namespace {

// s(n) = clamp(a + b / (n + e), lo, hi): clip, normalize, amplify and dampen are four numbers each.
GRADFUSED_MATH double perturb_factor(const Perturb& f, double norm) { return clamp(f.a + f.b / (norm + f.e), f.lo, f.hi); }

// Adaptive gradient clipping (Brock et al. 2021): a unit's gradient norm is limited to radius times its weight norm.
GRADFUSED_MATH double agc_factor(double radius, double weight_norm, double norm) {
  // NaN must survive: maximum() lets it through.
  const double bound = radius * maximum(weight_norm, 1e-3) / maximum(1e-6, norm);
  return bound < 1.0 || bound != bound ? bound : 1.0;
}

// Annealed noise (Neelakantan et al. 2015): sigma_t for a step that counts from 0.
GRADFUSED_MATH double noise_sigma(double noise, double decay, double step) { return sqrt(noise / pow(1.0 + step, decay)); }

template <class T> struct Transform {
  T unscale;  // 1 / grad_scale
  T mean;     // of the unscaled gradient over the unit
  T factor;   // s(n)
  T hi;       // clip_value, infinite when off
  T sigma;    // noise
  T sign;     // reverse and maximize
  T decay;    // coupled weight decay
};

// The value subtracted from a unit's elements while their mean is computed: its first element, or 0 if that is not finite. The mean of
// equal elements is then exact, so that they are exactly zero once centred.
template <class T> GRADFUSED_MATH T anchor(T first) { return first - first == T(0) ? first : T(0); }

template <class T> GRADFUSED_MATH T centred(T g, T unscale, T mean) { return g * unscale - mean; }

template <class T> GRADFUSED_MATH T perturbed(T g, const Transform<T>& t) {
  return clamp(centred(g, t.unscale, t.mean) * t.factor, -t.hi, t.hi);
}

}  // namespace
}  // namespace gradfused::math
