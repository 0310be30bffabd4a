// Counter-based normal noise: Philox4x32-10 (Salmon et al. 2011) and the Box-Muller transform.
#pragma once

#include "math/device.h"

namespace gradfused::math {
namespace {

// The product of a 32-bit word and a constant. Words are kept in the low half of 64 bits; the high half is ignored, so no masks are needed.
struct Multiply {
  GRADFUSED_MATH uint64_t operator()(uint64_t word, uint32_t by) const { return uint64_t(uint32_t(word)) * by; }
};

// Philox4x32-10 in place. The counter is (element / 4 low, element / 4 high, parameter, step), the key the seed. W is uint64_t, or a
// vector of them with a product of its own.
template <class W, class Product = Multiply> GRADFUSED_MATH void philox(uint64_t seed, W& c0, W& c1, W& c2, W& c3, Product product = {}) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const W a = product(c0, 0xD2511F53u), b = product(c2, 0xCD9E8D57u);
    c0 = (b >> 32) ^ c1 ^ uint64_t{k0};
    c1 = b;
    c2 = (a >> 32) ^ c3 ^ uint64_t{k1};
    c3 = a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// The counter's word for the step after this one's number, from 1: steps taken before, modulo 2^32, after which draws repeat.
GRADFUSED_MATH uint32_t step_word(double step) { return uint32_t(int64_t(step - 1)); }

// 23 random bits in the open interval (0, 1), exact in float32: no log(0), and the tail reaches 5.8 sigma.
GRADFUSED_MATH float uniform(uint32_t x) { return (float(int32_t(x >> 9)) + 0.5f) * 1.1920928955078125e-7f; }

// ln(x) for normal positive x, to about 1 ulp: the mantissa around 1 by a polynomial (coefficients of Cephes logf).
// Our own, so that the compiler can vectorise it and every backend draws the same bits.
GRADFUSED_MATH float log_normal_range(float x) {
  // Shift so that the mantissa lies in [sqrt(1/2), sqrt(2)).
  const int32_t i = bits<int32_t>(x) - 0x3F3504F3;
  const float e = float(i >> 23);
  const float m = bits<float>((i & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
  const float z = m * m;
  float y = 7.0376836292e-2f;
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * z + e * -2.12194440e-4f;
  y = y - 0.5f * z;
  return m + y + e * 0.693359375f;
}

// sin and cos of 2 pi u for u in (0, 1): quarter turns taken off exactly, then polynomials on [-pi/4, pi/4].
GRADFUSED_MATH void sincos_turns(float u, float& s, float& c) {
  const int32_t q = int32_t(u * 4.0f + 0.5f);
  const float r = (u - float(q) * 0.25f) * 6.283185307179586f;
  const float z = r * r;
  const float sine = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
  const float cosine = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
  const bool swap = (q & 1) != 0;
  const float a = swap ? cosine : sine, b = swap ? sine : cosine;
  s = (q & 2) != 0 ? -a : a;
  c = ((q + 1) & 2) != 0 ? -b : b;
}

// Two words to two independent standard normal values.
GRADFUSED_MATH void box_muller(uint32_t a, uint32_t b, float& z0, float& z1) {
  const float r = root(-2.0f * log_normal_range(uniform(a)));
  float s, c;
  sincos_turns(uniform(b), s, c);
  z0 = r * c;
  z1 = r * s;
}

}  // namespace
}  // namespace gradfused::math
