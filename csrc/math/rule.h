// What every update rule has unless it says otherwise.
//
// A rule is a struct with `states`, the number of its state tensors; `Coef<T>`, the numbers of a step, of which `shrink` and `step` are in
// all: p becomes shrink * p - step * direction; `coef`, which works them out; and `direction`, which moves one element's state.
#pragma once

#include "math/device.h"
#include "table.h"

namespace gradfused::math {
namespace {

// Of what a rule wants the norm, besides the weights', before it steps: trust ratios.
enum class Trust : int8_t { none, gradient, update };

// A moving average's step from one value to another, as torch.lerp takes it: from the nearer end, so that a weight of 1 gives just the other.
template <class T> struct Mix {
  T weight;
  bool from_end;

  GRADFUSED_MATH static Mix of(double weight) { return {T(weight < 0.5 ? weight : weight - 1.0), !(weight < 0.5)}; }
  GRADFUSED_MATH T operator()(T begin, T end) const { return (from_end ? end : begin) + (end - begin) * weight; }
};

struct RuleBase {
  static constexpr bool reads_state = true;
  static constexpr Trust trust = Trust::none;
  static constexpr bool coupled = true;        // weight decay may be part of the gradient: stage 6
  static constexpr bool half_in_loop = false;  // on the CPU, float16 is widened in the step's own loop: faster, and longer to compile
};

// 1 where either norm says nothing.
GRADFUSED_MATH double trust_ratio(double weight_norm, double norm, double over) {
  return weight_norm > 0 && norm > 0 ? weight_norm / over : 1.0;
}

// NAdam's momentum at a step (Dozat 2016).
GRADFUSED_MATH double warmed_momentum(const Settings& settings, double step) {
  return settings.beta1 * (1.0 - 0.5 * pow(0.96, step * settings.momentum_decay));
}

// What the product of the momenta becomes, as the scalar that keeps it holds it.
GRADFUSED_MATH double next_mu_product(const Settings& settings, double step, double product, DType kept_in) {
  const double next = product * warmed_momentum(settings, step);
  return kept_in == DType::float32 ? double(float(next)) : next;
}

}  // namespace
}  // namespace gradfused::math
