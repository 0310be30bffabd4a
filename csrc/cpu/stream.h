// Gives kernels an operand as a plain array of the type they compute in: in place where it is one, else through a buffer. Strides and
// dtypes are handled only here.
#pragma once

#if defined(__SSE2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "math/device.h"
#include "schema.h"

namespace gradfused::cpu {
namespace {

// ---- between the 16-bit floating formats and float32

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

// ---- operands

template <class T> constexpr DType dtype_of() { return sizeof(T) == sizeof(float) ? DType::float32 : DType::float64; }

template <class T> bool in_place(const Operand& x) { return x.dims == 0 && x.dtype == dtype_of<T>(); }

// Calls run(offset in elements, stride, length) for each innermost run of the elements [begin, begin + n).
template <class F> void for_each_run(const Operand& x, int64_t begin, int64_t n, F run) {
  const int last = x.dims - 1;
  int64_t inner = begin % x.sizes[last], outer = begin / x.sizes[last];
  while (n > 0) {
    int64_t offset = inner * x.strides[last], rest = outer;
    for (int d = last - 1; d >= 0; --d) {
      offset += rest % x.sizes[d] * x.strides[d];
      rest /= x.sizes[d];
    }
    const int64_t length = n < x.sizes[last] - inner ? n : x.sizes[last] - inner;
    run(offset, x.strides[last], length);
    n -= length;
    inner = 0;
    ++outer;
  }
}

template <class S, class T> void load_as(const Operand& x, int64_t begin, int64_t n, T* to) {
  const S* from = reinterpret_cast<const S*>(x.data);
  if (x.dims == 0) return widen_run(from + begin, to, n);
  for_each_run(x, begin, n, [&](int64_t offset, int64_t stride, int64_t length) {
    for (int64_t i = 0; i < length; ++i) to[i] = T(widen(from[offset + i * stride]));
    to += length;
  });
}

template <class S, class T> void store_as(const Operand& x, int64_t begin, int64_t n, const T* from) {
  S* to = reinterpret_cast<S*>(x.data);
  if (x.dims == 0) return narrow_run(from, to + begin, n);
  for_each_run(x, begin, n, [&](int64_t offset, int64_t stride, int64_t length) {
    for (int64_t i = 0; i < length; ++i) put(from[i], to[offset + i * stride]);
    from += length;
  });
}

// to[0 .. n) <- the elements [begin, begin + n).
template <class T> void load(const Operand& x, int64_t begin, int64_t n, T* to) {
  switch (x.dtype) {
    case DType::float32: return load_as<float>(x, begin, n, to);
    case DType::float64: return load_as<double>(x, begin, n, to);
    case DType::float16: return load_as<Half>(x, begin, n, to);
    case DType::bfloat16: return load_as<BFloat16>(x, begin, n, to);
  }
}

template <class T> void store(const Operand& x, int64_t begin, int64_t n, const T* values) {
  switch (x.dtype) {
    case DType::float32: return store_as<float>(x, begin, n, values);
    case DType::float64: return store_as<double>(x, begin, n, values);
    case DType::float16: return store_as<Half>(x, begin, n, values);
    case DType::bfloat16: return store_as<BFloat16>(x, begin, n, values);
  }
}

// to[0 .. n) <- values, bypassing the caches: an ordinary store would fetch each line first. Call fence() before others read.
template <class T> void copy_around(const T* values, T* to, int64_t n) {
  int64_t i = 0;
#ifdef __SSE2__
  for (; i < n && reinterpret_cast<uintptr_t>(to + i) % sizeof(__m128i); ++i) to[i] = values[i];
  constexpr int64_t few = sizeof(__m128i) / sizeof(T);
  for (; i + few <= n; i += few) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i)));
  }
#endif
  for (; i < n; ++i) to[i] = values[i];
}

inline void fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// store() that bypasses the caches, for elements that were not read and of which the next step would find none in a cache.
template <class T> void store_around(const Operand& x, int64_t begin, int64_t n, const T* values) {
  in_place<T>(x) ? copy_around(values, reinterpret_cast<T*>(x.data) + begin, n) : store(x, begin, n, values);
}

// The elements in place, or copied into `buffer`. Without kRead the buffer is not filled, because it will only be written.
template <bool kRead = true, class T> T* open(const Operand& x, int64_t begin, int64_t n, T* buffer) {
  if (in_place<T>(x)) return reinterpret_cast<T*>(x.data) + begin;
  if (kRead) load(x, begin, n, buffer);
  return buffer;
}

// Writes back the elements that open() copied.
template <class T> void close(const Operand& x, int64_t begin, int64_t n, const T* values) {
  if (!in_place<T>(x)) store(x, begin, n, values);
}

}  // namespace
}  // namespace gradfused::cpu
