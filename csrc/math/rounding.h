// Stochastic rounding to the 16-bit formats: the random bits are added below the last bit kept, and what is below it then cut off.
#pragma once

#include "math/half.h"

namespace gradfused::math {
namespace {

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

}  // namespace
}  // namespace gradfused::math
