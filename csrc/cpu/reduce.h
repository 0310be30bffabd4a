// Sums in float64 over a fixed number of lanes: the same bits on every instruction set.
#pragma once

#include "math/device.h"

namespace gradfused::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kRun = 16;

// The sum of term(x[i]). Terms are added in their own type for a run of 16 a lane, and runs in float64: float32 terms then cost a third
// of what widening each would, and lose nothing that matters. Plain lanes, which the compiler keeps in registers; its own 8-wide vector
// type was 5 times slower.
template <class T, class Term> double reduce(const T* __restrict x, int64_t n, Term term) {
  using A = decltype(term(x[0]));
  double lanes[kLanes] = {};
  int64_t i = 0;
  while (i + kLanes <= n) {
    A run[kLanes] = {};
    const int64_t left = (n - i) / kLanes, end = i + (left < kRun ? left : kRun) * kLanes;
    for (; i < end; i += kLanes) {
      for (int k = 0; k < kLanes; ++k) run[k] += term(x[i + k]);
    }
    for (int k = 0; k < kLanes; ++k) lanes[k] += double(run[k]);
  }
  for (int k = 0; i < n; ++i, ++k) lanes[k] += double(term(x[i]));
  for (int half = kLanes / 2; half; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

// Up to this length a unit is too short for lanes of its own: lanes then run over units.
constexpr int64_t kShortUnit = 64;
constexpr int kUnitsAbreast = 8;

// totals[u] <- the sum of term(u, x[i]) over unit u, for units that lie one after another.
template <class T, class Term>
void reduce_units(const T* __restrict x, int64_t length, int64_t units, double* __restrict totals, Term term) {
  int64_t u = 0;
  if (length <= kShortUnit) {
    for (; u + kUnitsAbreast <= units; u += kUnitsAbreast) {
      double lanes[kUnitsAbreast] = {};
      for (int64_t i = 0; i < length; ++i) {
        for (int k = 0; k < kUnitsAbreast; ++k) lanes[k] += double(term(u + k, x[(u + k) * length + i]));
      }
      for (int k = 0; k < kUnitsAbreast; ++k) totals[u + k] = lanes[k];
    }
    for (; u < units; ++u) {
      totals[u] = 0;
      for (int64_t i = 0; i < length; ++i) totals[u] += double(term(u, x[u * length + i]));
    }
    return;
  }
  for (; u < units; ++u) totals[u] = reduce(x + u * length, length, [&](T v) { return term(u, v); });
}

// totals[u] <- the sum of value(u, x[i])^2 over unit u. Squares of float32 have half its range: they are taken in float32, and again in
// float64 for a unit whose sum comes near either end of it, or is not finite.
template <class T, class Value>
void reduce_squares(const T* __restrict x, int64_t length, int64_t units, double* __restrict totals, Value value) {
  reduce_units(x, length, units, totals, [&value](int64_t u, T v) {
    const T d = value(u, v);
    return d * d;
  });
  if (sizeof(T) == sizeof(double)) return;
  for (int64_t u = 0; u < units; ++u) {
    if (totals[u] > 1e-28 && totals[u] < 1e36) continue;
    totals[u] = reduce(x + u * length, length, [&value, u](T v) {
      const double d = double(value(u, v));
      return d * d;
    });
  }
}

}  // namespace
}  // namespace gradfused::cpu
