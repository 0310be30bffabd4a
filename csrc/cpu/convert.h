// Between the 16-bit floating formats and float32, a block at a time.
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "math/device.h"

namespace gradfused::cpu {
namespace {

using math::BFloat16;
using math::Half;
using math::put;
using math::rounded_bfloat16;
using math::widen;

// A few neighbours at a time, for loops that convert as they go.
template <class S> constexpr int kFew = 1;
template <class S, class T> void widen_few(const S* from, T (&to)[1]) { to[0] = T(widen(*from)); }
template <class S, class T> void narrow_few(const T (&from)[1], S* to) { put(from[0], *to); }

// A register of words, each with two neighbours of bfloat16: widened, the lower halves come first, then the upper. Nothing moves from one
// lane to another, which would cost more than rounding.
#if defined(__AVX512F__)
typedef uint32_t Pairs __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
#elif defined(__AVX2__)
typedef uint32_t Pairs __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));
#else
typedef uint32_t Pairs __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));
#endif
constexpr int kPairs = sizeof(Floats) / sizeof(float);

template <> constexpr int kFew<BFloat16> = 2 * kPairs;
inline void widen_few(const BFloat16* from, float (&to)[2 * kPairs]) {
  Pairs pairs;
  memcpy(&pairs, from, sizeof pairs);
  const Pairs low = pairs << 16, high = pairs & 0xFFFF0000u;
  memcpy(to, &low, sizeof low);
  memcpy(to + kPairs, &high, sizeof high);
}
inline void narrow_few(const float (&from)[2 * kPairs], BFloat16* to) {
  Floats low, high;
  memcpy(&low, from, sizeof low);
  memcpy(&high, from + kPairs, sizeof high);
  const Pairs pairs = rounded_bfloat16(low, (Pairs)low) >> 16 | (rounded_bfloat16(high, (Pairs)high) & 0xFFFF0000u);
  memcpy(to, &pairs, sizeof pairs);
}

#ifdef __F16C__
inline void widen_eight(const Half* from, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline void narrow_eight(const float* from, Half* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}

template <> constexpr int kFew<Half> = 8;
inline void widen_few(const Half* from, float (&to)[8]) { widen_eight(from, to); }
inline void narrow_few(const float (&from)[8], Half* to) { narrow_eight(from, to); }
#endif

template <class S, class T> void widen_run(const S* __restrict from, T* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = T(widen(from[i]));
}
inline void widen_run(const Half* __restrict from, float* __restrict to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) widen_eight(from + i, to + i);
#endif
  for (; i < n; ++i) to[i] = widen(from[i]);
}

template <class T> void narrow_run(const T* __restrict from, BFloat16* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = math::narrow_bfloat16(float(from[i]));
}
inline void narrow_run(const float* __restrict from, Half* __restrict to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) narrow_eight(from + i, to + i);
#endif
  for (; i < n; ++i) to[i] = math::narrow_half(from[i]);
}
inline void narrow_run(const double* __restrict from, Half* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = math::narrow_half(float(from[i]));
}
template <class T, class S> void narrow_run(const T* __restrict from, S* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = S(from[i]);
}

}  // namespace
}  // namespace gradfused::cpu
