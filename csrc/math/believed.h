// What is kept beside weights of 16 bits belongs to them only if it still agrees with them: the weights may have been written since, by
// loading a model say. Each element is looked at by itself, so nobody has to be told of the writing.
#pragma once

#include "math/device.h"
#include "schema.h"

namespace gradfused::math {
namespace {

// The weight to step from, of one and its copy in float32. `rounded` is the copy as the weight's format holds it: where that is another
// value, the copy is of other weights.
template <class T> GRADFUSED_MATH T believed_copy(T copy, T rounded, T weight) { return rounded == weight ? copy : weight; }

// Half a unit in the last place of a weight of 1.
GRADFUSED_MATH float half_unit(DType dtype) { return dtype == DType::bfloat16 ? 0.00390625f : 0.00048828125f; }  // 2^-8, 2^-11

// What rounding took off a weight: 0 where that is more than half a unit in its last place, or not finite, as what is left of a sum that
// overflowed. Weights below the normal numbers have no remainder that their format could hold.
template <class T> GRADFUSED_MATH T believed_rest(T rest, T weight, float half_unit) {
  const float power = bits<float>(bits<uint32_t>(float(weight)) & 0x7F800000u);  // of two, below the weight
  const float size = bits<float>(bits<uint32_t>(float(rest)) & 0x7FFFFFFFu);
  return size <= power * half_unit && size < INFINITY ? rest : T(0);
}

}  // namespace
}  // namespace gradfused::math
