// CUDA's keywords, vector types and built-in variables.
#pragma once

#include <memory>  // before __noinline__ is defined: libstdc++ uses the word there

#define GRADFUSED_EMULATED 1

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static  // blocks run one after another

#define GRADFUSED_EMULATOR_VECTOR(T, name, bytes2, bytes4)           \
  struct alignas(bytes2) name##2 { T x, y; };                        \
  struct name##3 { T x, y, z; };                                     \
  struct alignas(bytes4) name##4 { T x, y, z, w; };                  \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
GRADFUSED_EMULATOR_VECTOR(unsigned char, uchar, 2, 4)
GRADFUSED_EMULATOR_VECTOR(unsigned short, ushort, 4, 8)
GRADFUSED_EMULATOR_VECTOR(int, int, 8, 16)
GRADFUSED_EMULATOR_VECTOR(unsigned, uint, 8, 16)
GRADFUSED_EMULATOR_VECTOR(long long, longlong, 16, 16)
GRADFUSED_EMULATOR_VECTOR(unsigned long long, ulonglong, 16, 16)
GRADFUSED_EMULATOR_VECTOR(float, float, 8, 16)
GRADFUSED_EMULATOR_VECTOR(double, double, 16, 16)
#undef GRADFUSED_EMULATOR_VECTOR

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;
