// A float32 copy or a compensation kept beside 16-bit weights is used only where it still agrees with them: the weights may have been
// written in between, for example by loading a model. Agreement is checked for each element, so that no writer has to report itself.
#pragma once

#include "math/device.h"
#include "schema.h"

namespace gradfused::math {
namespace {

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
