// 16-bit weights with more digits than their format has: rounded stochastically, or with a copy or compensation kept beside them.
#pragma once

#include "math/device.h"
#include "schema.h"

namespace gradfused::math {
namespace {

// Stochastic rounding: the random bits are added below the last bit kept, and what is below it is then cut off.

// Draws for rounding have counters of their own: the noise's never reach this one.
constexpr uint32_t kRoundingCounter = 0x80000000u;

// Infinities and NaN stay; finite values beyond the format's largest become it.
GRADFUSED_MATH float random_bfloat16(float x, uint32_t random) {
  const uint32_t u = bits<uint32_t>(x);
  if ((u & 0x7F800000u) == 0x7F800000u) return x;
  const uint32_t rounded = (u + (random >> 16)) & 0xFFFF0000u;
  return bits<float>((rounded & 0x7F800000u) == 0x7F800000u ? u & 0xFFFF0000u : rounded);
}

GRADFUSED_MATH float random_half(float x, uint32_t random) {
  const uint32_t u = bits<uint32_t>(x), sign = u & 0x80000000u, a = u & 0x7FFFFFFFu;
  if (a >= 0x7F800000u) return x;
  if (a < 0x38800000u) {  // subnormal there: whole multiples of 2^-24
    const float scaled = bits<float>(a) * 16777216.0f + float(random >> 8) * 5.9604644775390625e-8f;
    return bits<float>(bits<uint32_t>(float(int32_t(scaled)) * 5.9604644775390625e-8f) | sign);
  }
  const uint32_t rounded = (a + (random >> 19)) & 0xFFFFE000u;
  return bits<float>((rounded > 0x477FE000u ? 0x477FE000u : rounded) | sign);  // 65504
}

// A float32 copy or a compensation is used only where it still agrees with the weights, which may have been written in between, for
// example by loading a model. Agreement is checked for each element, so that no writer has to report itself.

// The value to step from: the float32 copy if it rounds to the weight, else the weight. `rounded` is the copy rounded to the weight's
// format.
template <class T> GRADFUSED_MATH T believed_copy(T copy, T rounded, T weight) { return rounded == weight ? copy : weight; }

// Half a unit in the last place of a weight of 1.
GRADFUSED_MATH float half_unit(DType dtype) { return dtype == DType::bfloat16 ? 0.00390625f : 0.00048828125f; }  // 2^-8, 2^-11

// The compensation of a weight, or 0 if it is not finite or more than half a unit in the weight's last place and so cannot belong to it.
// Subnormal weights have no compensation that their format could hold.
template <class T> GRADFUSED_MATH T believed_rest(T rest, T weight, float half_unit) {
  const float power = bits<float>(bits<uint32_t>(float(weight)) & 0x7F800000u);  // of two, below the weight
  const float size = bits<float>(bits<uint32_t>(float(rest)) & 0x7FFFFFFFu);
  return size <= power * half_unit && size < INFINITY ? rest : T(0);
}

}  // namespace
}  // namespace gradfused::math
