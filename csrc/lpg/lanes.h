// Sixteen neighbours in registers, with arithmetic and exp: the same lanes, operations and bits on every instruction set.
#pragma once

#include <cmath>

#include "cpu/stream.h"

namespace gradfused::lpg {
namespace {

using namespace cpu;

constexpr int kAbreast = 16;
typedef double Doubles __attribute__((vector_size(sizeof(Floats))));

GRADFUSED_MATH Floats spread(float x) { return Floats{} + x; }
GRADFUSED_MATH Doubles spread(double x) { return Doubles{} + x; }

// exp by Cephes: Taylor coefficients, with last digits changed to spread the error. Within 1.5 ulp for x in [-87.33, 0]; 0 for smaller x.
GRADFUSED_MATH Floats exp_of(Floats x) {
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // the exponent, rounded, in the lower bits
  const Floats n = shifted - 12582912.0f;
  const Floats r = x - n * 0.693359375f - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Floats power = (Floats)(((Pairs)shifted << 23) + (127u << 23));
  const Floats zero = {};
  return x < -87.33f ? zero : p * power;
}

GRADFUSED_MATH Doubles exp_of(Doubles x) {
  for (unsigned k = 0; k < sizeof x / sizeof(double); ++k) x[k] = ::exp(x[k]);
  return x;
}

template <class T> struct Lanes {
  using Register = decltype(spread(T()));
  static constexpr int kRegisters = kAbreast * int(sizeof(T)) / int(sizeof(Register));
  Register r[kRegisters];

  template <class F> GRADFUSED_MATH static Lanes each(F f) {
    Lanes to;
    for (int k = 0; k < kRegisters; ++k) to.r[k] = f(k);
    return to;
  }
  GRADFUSED_MATH static Lanes all(T x) {
    return each([x](int) { return spread(x); });
  }
  GRADFUSED_MATH Lanes operator+(const Lanes& o) const {
    return each([&](int k) { return r[k] + o.r[k]; });
  }
  GRADFUSED_MATH Lanes operator-(const Lanes& o) const {
    return each([&](int k) { return r[k] - o.r[k]; });
  }
  GRADFUSED_MATH Lanes operator*(const Lanes& o) const {
    return each([&](int k) { return r[k] * o.r[k]; });
  }
  // The greater of each two lanes; this one where either is nan.
  GRADFUSED_MATH Lanes or_greater(const Lanes& o) const {
    return each([&](int k) { return o.r[k] > r[k] ? o.r[k] : r[k]; });
  }
  // a where a lane is `key`, else b.
  GRADFUSED_MATH Lanes equal(T key, const Lanes& a, const Lanes& b) const {
    return each([&](int k) { return r[k] == key ? a.r[k] : b.r[k]; });
  }
  GRADFUSED_MATH Lanes exp() const {
    return each([&](int k) { return exp_of(r[k]); });
  }

  GRADFUSED_MATH void spill(T (&to)[kAbreast]) const { memcpy(to, r, sizeof to); }
  GRADFUSED_MATH static Lanes of(const T (&from)[kAbreast]) {
    Lanes to;
    memcpy(to.r, from, sizeof from);
    return to;
  }
};

template <class T> GRADFUSED_MATH Lanes<T> load(const T* from) {
  typedef typename Lanes<T>::Register Anywhere __attribute__((aligned(sizeof(T)), may_alias));
  return Lanes<T>::each([from](int k) { return reinterpret_cast<const Anywhere*>(from)[k]; });
}
template <class T> GRADFUSED_MATH Lanes<T> load(const Half* from) {
  T wide[kAbreast];
  widen_run(from, wide, kAbreast);
  return Lanes<T>::of(wide);
}
// The first `count`; the other lanes are `filler`.
template <class T, class S> GRADFUSED_MATH Lanes<T> load_some(const S* from, int64_t count, T filler) {
  T wide[kAbreast];
  for (int k = 0; k < kAbreast; ++k) wide[k] = k < count ? T(widen(from[k])) : filler;
  return Lanes<T>::of(wide);
}
template <class T> GRADFUSED_MATH Lanes<T> load(const BFloat16* from) { return load_some<T>(from, kAbreast, T(0)); }

// In place of a count: all lanes.
struct All {};
template <class T, class S> GRADFUSED_MATH Lanes<T> load_some(const S* from, All, T) { return load<T>(from); }

template <class T> GRADFUSED_MATH void store(const Lanes<T>& x, T* to) {
  typedef typename Lanes<T>::Register Anywhere __attribute__((aligned(sizeof(T)), may_alias));
  for (int k = 0; k < Lanes<T>::kRegisters; ++k) reinterpret_cast<Anywhere*>(to)[k] = x.r[k];
}
template <class T, class S> GRADFUSED_MATH void store(const Lanes<T>& x, S* to) {
  T wide[kAbreast];
  x.spill(wide);
  narrow_run(wide, to, kAbreast);
}
// Register by register: left to vectorise sixteen roundings, GCC 12 took 1.4 ns an element more.
GRADFUSED_MATH void store(const Lanes<float>& x, BFloat16* to) {
  typedef uint16_t Halves __attribute__((vector_size(sizeof(Floats) / 2)));
  for (int k = 0; k < Lanes<float>::kRegisters; ++k) {
    const Halves halves = __builtin_convertvector(rounded_bfloat16(x.r[k], (Pairs)x.r[k]) >> 16, Halves);
    memcpy(static_cast<void*>(to + k * kPairs), &halves, sizeof halves);
  }
}
template <class T, class S> GRADFUSED_MATH void store_some(const Lanes<T>& x, S* to, int64_t count) {
  T wide[kAbreast];
  x.spill(wide);
  for (int k = 0; k < count; ++k) put(wide[k], to[k]);
}
template <class T, class S> GRADFUSED_MATH void store_some(const Lanes<T>& x, S* to, All) { store(x, to); }

// The sum over the lanes, in pairs: the order of reduce().
template <class T> double total(const Lanes<T>& x) {
  T lanes[kAbreast];
  x.spill(lanes);
  double sums[kAbreast];
  for (int k = 0; k < kAbreast; ++k) sums[k] = double(lanes[k]);
  for (int half = kAbreast / 2; half; half /= 2) {
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  return sums[0];
}

template <class T> T greatest(const Lanes<T>& x) {
  T lanes[kAbreast];
  x.spill(lanes);
  for (int k = 1; k < kAbreast; ++k) lanes[0] = lanes[k] > lanes[0] ? lanes[k] : lanes[0];
  return lanes[0];
}

// exp of one number, as in the lanes.
inline float exp_one(float x) { return exp_of(spread(x))[0]; }
inline double exp_one(double x) { return ::exp(x); }

}  // namespace
}  // namespace gradfused::lpg
