// What lets one header serve a C++ compiler and nvcc, and numbers as all of them have them: bit patterns and the 16-bit formats.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
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

// The 16-bit floating formats: stored as bits, widened to float32 to compute, rounded to nearest even.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

GRADFUSED_MATH float widen(float x) { return x; }
GRADFUSED_MATH double widen(double x) { return x; }

GRADFUSED_MATH float widen(BFloat16 x) { return bits<float>(uint32_t{x.bits} << 16); }

// Rounded in the upper half; a NaN keeps its sign and top bits and stays one. `u` are the bits of `x`, one or a vector.
template <class F, class U> GRADFUSED_MATH U rounded_bfloat16(const F& x, const U& u) {
  return x != x ? u | 0x400000u : u + 0x7FFFu + ((u >> 16) & 1u);
}

GRADFUSED_MATH BFloat16 narrow_bfloat16(float x) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  return {uint16_t(rounded_bfloat16(x, bits<uint32_t>(x)) >> 16)};
#endif
}

// x as bfloat16 holds it, in float32: loops over this are vectorised better than over narrowing and widening.
GRADFUSED_MATH float held_bfloat16(float x) { return bits<float>(rounded_bfloat16(x, bits<uint32_t>(x)) & 0xFFFF0000u); }

GRADFUSED_MATH float widen(Half x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = uint32_t(x.bits & 0x7FFFu) << 13;
  // Rebias by a multiplication: exact for subnormals too.
  const float finite = bits<float>(magnitude) * 5.192296858534828e33f;  // 2^112
  const uint32_t special = magnitude | 0x7F800000u;                     // inf and nan
  const uint32_t u = magnitude >= 0x0F800000u ? special : bits<uint32_t>(finite);
  return bits<float>(u | sign);
#endif
}

GRADFUSED_MATH Half narrow_half(float x) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t u = bits<uint32_t>(x), sign = (u >> 16) & 0x8000u, a = u & 0x7FFFFFFFu;
  uint32_t h;
  if (a > 0x7F800000u) {
    h = 0x7E00u | ((a >> 13) & 0x3FFu);
  } else if (a >= 0x477FF000u) {
    h = 0x7C00u;  // rounds to infinity
  } else if (a >= 0x38800000u) {
    h = (a - 0x38000000u + 0xFFFu + ((a >> 13) & 1u)) >> 13;
  } else {
    // Subnormal: adding 0.5 puts the wanted bits at the bottom of the mantissa, rounded by the hardware.
    h = bits<uint32_t>(bits<float>(a) + 0.5f) - 0x3F000000u;
  }
  return {uint16_t(sign | h)};
#endif
}

GRADFUSED_MATH void put(float x, float& to) { to = x; }
GRADFUSED_MATH void put(float x, double& to) { to = double(x); }
GRADFUSED_MATH void put(double x, float& to) { to = float(x); }
GRADFUSED_MATH void put(double x, double& to) { to = x; }
template <class T> GRADFUSED_MATH void put(T x, BFloat16& to) { to = narrow_bfloat16(float(x)); }
template <class T> GRADFUSED_MATH void put(T x, Half& to) { to = narrow_half(float(x)); }

}  // namespace
}  // namespace gradfused::math
