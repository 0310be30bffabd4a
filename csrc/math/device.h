// What lets one header serve a C++ compiler and nvcc.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define GRADFUSED_MATH __host__ __device__ __forceinline__
#else
#define GRADFUSED_MATH __attribute__((always_inline)) inline
#endif

// Every header in this folder is compiled once per instruction set with other flags. Unnamed namespaces keep the linker from
// folding an AVX-512 copy into the code that a smaller machine runs.
// No fused multiply-add is written and contraction is off, so all instruction sets and devices round alike.
namespace gradfused::math {
namespace {

template <class To, class From> GRADFUSED_MATH To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "a bit pattern keeps its size");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

GRADFUSED_MATH float root(float x) { return sqrtf(x); }
GRADFUSED_MATH double root(double x) { return sqrt(x); }

// Comparisons are ordered so that a NaN in `x` stays, as in torch.clamp.
template <class T> GRADFUSED_MATH T clamp(T x, T lo, T hi) {
  x = x < lo ? lo : x;
  return x > hi ? hi : x;
}

GRADFUSED_MATH float greatest_of(float) { return 3.402823466e+38f; }
GRADFUSED_MATH double greatest_of(double) { return 1.7976931348623157e+308; }

// Of numbers that are not NaN.
template <class T> GRADFUSED_MATH T smaller(T a, T b) { return a < b ? a : b; }

// torch.maximum: a NaN on either side wins.
template <class T> GRADFUSED_MATH T maximum(T a, T b) { return (b > a || b != b) ? b : a; }

}  // namespace
}  // namespace gradfused::math
