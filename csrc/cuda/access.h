// How a kernel reads and writes an operand: 16 bytes at a time where it can, else an element at a time through dtype and strides.
#pragma once

#include "cuda/device.h"
#include "cuda/job.h"
#include "math/half.h"

namespace gradfused::cuda {
namespace {

using math::BFloat16;
using math::Half;

// What one access brings: it stays as it is stored, 4 registers of 16 bytes, until an element is computed with.
template <class S> struct alignas(16) Vector {
  S at[16 / sizeof(S)];
};
template <class T> struct One {
  T at[1];
};

// Tells the compiler that an address found in a table is one of device memory: LDG in place of generic loads.
template <class T> __device__ __forceinline__ T* global(T* p) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// Written out: for compute capability 10.0 and 12.0 nvcc 13.0 splits such an access into the elements that are computed with. The
// intrinsics __ldca and __stwb would be strong accesses.
__device__ __forceinline__ uint4 load_16_bytes(const void* p) {
#ifdef __CUDA_ARCH__
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
#else
  return *static_cast<const uint4*>(p);
#endif
}
__device__ __forceinline__ void store_16_bytes(void* p, const uint4& v) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" : : "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#else
  *static_cast<uint4*>(p) = v;
#endif
}

// Arrays of S, aligned to 16 bytes.
template <class S, class T> struct Plain {
  using Compute = T;
  using Pack = Vector<S>;
  using Handle = S*;  // an operand from some element on, as the loops keep it: the table would be read anew after every store
  static constexpr int width = 16 / sizeof(S);

  static __device__ __forceinline__ Handle handle(const Operand&, const char* data, int64_t begin) {
    return global(reinterpret_cast<S*>(const_cast<char*>(data))) + begin;
  }
  static __device__ __forceinline__ Pack load(Handle x, int i) { return math::bits<Pack>(load_16_bytes(x + i)); }
  static __device__ __forceinline__ void store(Handle x, int i, const Pack& v) { store_16_bytes(x + i, math::bits<uint4>(v)); }
};

// Any dtype, layout and alignment.
template <class T> struct Any {
  using Compute = T;
  using Pack = One<T>;
  struct Handle {
    const Operand* shape;
    char* data;
    int64_t begin;
  };
  static constexpr int width = 1;

  static __device__ __forceinline__ Handle handle(const Operand& x, const char* data, int64_t begin) {
    return {&x, const_cast<char*>(data), begin};
  }

  static __device__ __forceinline__ int64_t place(const Operand& x, int64_t i) {
    if (x.dims == 0) return i;
    int64_t at = 0;
#pragma unroll 1
    for (int d = x.dims - 1; d >= 0; --d) {
      const int64_t size = global(x.sizes)[d];
      at += i % size * global(x.strides)[d];
      i /= size;
    }
    return at;
  }
  template <class S> static __device__ __forceinline__ S& element(const Handle& x, int i) {
    return global(reinterpret_cast<S*>(x.data))[place(*x.shape, x.begin + i)];
  }
  static __device__ __forceinline__ Pack load(const Handle& x, int i) {
    switch (x.shape->dtype) {
      case DType::float32: return {T(element<float>(x, i))};
      case DType::float64: return {T(element<double>(x, i))};
      case DType::float16: return {T(math::widen(element<Half>(x, i)))};
      default: return {T(math::widen(element<BFloat16>(x, i)))};
    }
  }
  static __device__ __forceinline__ void store(const Handle& x, int i, const Pack& v) {
    switch (x.shape->dtype) {
      case DType::float32: return math::put(v.at[0], element<float>(x, i));
      case DType::float64: return math::put(v.at[0], element<double>(x, i));
      case DType::float16: return math::put(v.at[0], element<Half>(x, i));
      default: return math::put(v.at[0], element<BFloat16>(x, i));
    }
  }
};

// Runs f with the access that suits a chunk: one uniform branch a chunk. Operands of mixed dtypes go an element at a time, so that there
// are six bodies a rule, not one a combination. Without kWide there is no float64.
template <bool kWide = true, class F> __device__ __forceinline__ void with_access(const Row& row, const char* grad, bool plain, const F& f) {
  if (plain && reinterpret_cast<uintptr_t>(grad) % 16 == 0) {
    switch (row.param.dtype) {
      case DType::float32: return f(Plain<float, float>{});
      case DType::float16: return f(Plain<Half, float>{});
      case DType::bfloat16: return f(Plain<BFloat16, float>{});
      case DType::float64:
        if constexpr (kWide) f(Plain<double, double>{});
        return;
    }
  }
  if constexpr (kWide) {
    if (row.param.dtype == DType::float64) return f(Any<double>{});
  }
  f(Any<float>{});
}

}  // namespace
}  // namespace gradfused::cuda
