// What a step's arithmetic is made of: the transforms (stages 0 to 6) that a gradient passes through, and the parts of update rules.
//
// A rule is a struct derived from RuleBase. It has `states`, the number of its state tensors; `Coef<T>`, the numbers of a step, among them
// `shrink` and `step`; `coef`, which computes them; and `direction`, which updates one element's state and returns the direction, so that
// p becomes shrink * p - step * direction. With a trust ratio it has `trusted` as well, which changes the numbers once the norms are known.
#pragma once

#include "math/device.h"
#include "schema.h"

namespace gradfused::math {
namespace {

// ---- transforms

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

// ---- rules

// What a rule's trust ratio compares the weights' norm with; none: the rule has no trust ratio.
enum class Trust : int8_t { none, gradient, update };

// A moving average's step from one value towards another, computed as torch.lerp does: from the nearer end, so that a weight of 1 gives
// exactly the other value.
template <class T> struct Mix {
  T weight;
  bool from_end;

  GRADFUSED_MATH static Mix of(double weight) { return {T(weight < 0.5 ? weight : weight - 1.0), !(weight < 0.5)}; }
  GRADFUSED_MATH T operator()(T begin, T end) const { return (from_end ? end : begin) + (end - begin) * weight; }
};

// Adam's moving averages of the gradient, in s[0], and of its square, in s[1].
template <class T> struct Moments {
  Mix<T> average;
  T beta2, fresh_sq;

  GRADFUSED_MATH static Moments of(const Settings& settings) {
    return {Mix<T>::of(1.0 - settings.beta1), T(settings.beta2), T(1.0 - settings.beta2)};
  }
  GRADFUSED_MATH void update(T g, T* s) const {
    s[0] = average(s[0], g);
    s[1] = s[1] * beta2 + g * fresh_sq * g;  // in torch's order, which keeps gradients of 1e20 finite
  }
};

// SGD's momentum buffer, which the first gradient fills undamped.
template <class T> struct Momentum {
  T momentum, fresh;
  bool nesterov;

  GRADFUSED_MATH static Momentum of(const Settings& settings, const Count& now) {
    return {T(settings.momentum), T(now.first ? 1.0 : 1.0 - settings.dampening), settings.nesterov};
  }
  GRADFUSED_MATH T direction(T g, T& buffer) const {
    buffer = buffer * momentum + g * fresh;
    return nesterov ? g + buffer * momentum : buffer;
  }
};

// What decoupled weight decay multiplies the weights by.
GRADFUSED_MATH double decayed(const Settings& settings) { return 1.0 - settings.lr * settings.weight_decay; }
GRADFUSED_MATH double decayed_if_decoupled(const Settings& settings) { return settings.decoupled ? decayed(settings) : 1.0; }

// Adam's correction of an average that started at zero.
GRADFUSED_MATH double correction(double beta, double step) { return 1.0 - pow(beta, step); }

struct RuleBase {
  static constexpr bool reads_state = true;
  static constexpr Trust trust = Trust::none;
  static constexpr bool mu_product = false;    // the product of the momenta is kept from step to step
  static constexpr bool coupled = true;        // weight decay may be added to the gradient before the rule sees it
  static constexpr bool half_in_loop = false;  // on the CPU, float16 is converted in the step's own loop: faster, but slower to compile
};

// The ratio weight_norm / over, or 1 where one of the norms is zero or NaN.
GRADFUSED_MATH double trust_ratio(double weight_norm, double norm, double over) {
  return weight_norm > 0 && norm > 0 ? weight_norm / over : 1.0;
}

// NAdam's momentum at a step (Dozat 2016).
GRADFUSED_MATH double warmed_momentum(const Settings& settings, double step) {
  return settings.beta1 * (1.0 - 0.5 * pow(0.96, step * settings.momentum_decay));
}

// The product of the momenta after this step, rounded to the dtype it is kept in.
GRADFUSED_MATH double next_mu_product(const Settings& settings, double step, double product, DType kept_in) {
  const double next = product * warmed_momentum(settings, step);
  return kept_in == DType::float32 ? double(float(next)) : next;
}

}  // namespace
}  // namespace gradfused::math
