// Gives kernels an operand as a plain array of the type they compute in: in place where it is one, else through a buffer. Strides and
// dtypes are handled only here.
#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "cpu/convert.h"
#include "schema.h"

namespace gradfused::cpu {
namespace {

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
