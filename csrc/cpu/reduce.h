// Sums in float64 over a fixed number of lanes: the same bits on every instruction set.
#pragma once

#include "math/device.h"

namespace gradfused::cpu {
namespace {

constexpr int kLanes = 16;

// The sum of term(x[i]), a float64. Plain lanes, which the compiler keeps in registers; its own 8-wide vector type was 5 times slower.
template <class T, class Term> double reduce(const T* __restrict x, int64_t n, Term term) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] += term(x[i + k]);
  }
  for (int k = 0; i < n; ++i, ++k) lanes[k] += term(x[i]);
  for (int half = kLanes / 2; half; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

template <class T> double sum(const T* x, int64_t n) {
  return reduce(x, n, [](T v) { return double(v); });
}

template <class T> double sum_scaled(const T* x, int64_t n, T scale) {
  return reduce(x, n, [scale](T v) { return double(v * scale); });
}

// Of x * scale - mean.
template <class T> double sum_of_squares(const T* x, int64_t n, T scale, T mean) {
  return reduce(x, n, [scale, mean](T v) {
    const double d = double(v * scale - mean);
    return d * d;
  });
}

}  // namespace
}  // namespace gradfused::cpu
