// Between the 16-bit floating formats and float32, a block at a time.
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "math/device.h"

namespace gradfused::cpu {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float widen(BFloat16 x) { return math::bits<float>(uint32_t{x.bits} << 16); }

// Round to nearest even; a NaN keeps its sign and top bits and stays one.
inline BFloat16 narrow_bfloat16(float x) {
  const uint32_t u = math::bits<uint32_t>(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return {uint16_t(x != x ? (u >> 16) | 0x40u : rounded)};
}

inline float widen(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = uint32_t(x.bits & 0x7FFFu) << 13;
  // Rebias by a multiplication: exact for subnormals too.
  const float finite = math::bits<float>(magnitude) * 5.192296858534828e33f;  // 2^112
  const uint32_t special = magnitude | 0x7F800000u;                          // inf and nan
  const uint32_t u = magnitude >= 0x0F800000u ? special : math::bits<uint32_t>(finite);
  return math::bits<float>(u | sign);
}

inline Half narrow_half(float x) {
  const uint32_t u = math::bits<uint32_t>(x), sign = (u >> 16) & 0x8000u, a = u & 0x7FFFFFFFu;
  uint32_t h;
  if (a > 0x7F800000u) {
    h = 0x7E00u | ((a >> 13) & 0x3FFu);
  } else if (a >= 0x477FF000u) {
    h = 0x7C00u;  // rounds to infinity
  } else if (a >= 0x38800000u) {
    h = (a - 0x38000000u + 0xFFFu + ((a >> 13) & 1u)) >> 13;
  } else {
    // Subnormal: adding 0.5 puts the wanted bits at the bottom of the mantissa, rounded by the hardware.
    h = math::bits<uint32_t>(math::bits<float>(a) + 0.5f) - 0x3F000000u;
  }
  return {uint16_t(sign | h)};
}

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }

template <class S, class T> void widen_run(const S* __restrict from, T* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = T(widen(from[i]));
}
inline void widen_run(const Half* __restrict from, float* __restrict to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
#endif
  for (; i < n; ++i) to[i] = widen(from[i]);
}

template <class T> void narrow_run(const T* __restrict from, BFloat16* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow_bfloat16(float(from[i]));
}
template <class T> void narrow_run(const T* __restrict from, Half* __restrict to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  if (sizeof(T) == sizeof(float)) {
    for (; i + 8 <= n; i += 8) {
      const __m256 x = _mm256_loadu_ps(reinterpret_cast<const float*>(from + i));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
  }
#endif
  for (; i < n; ++i) to[i] = narrow_half(float(from[i]));
}
template <class T, class S> void narrow_run(const T* __restrict from, S* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = S(from[i]);
}

}  // namespace
}  // namespace gradfused::cpu
