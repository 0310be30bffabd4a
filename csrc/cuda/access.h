// How a kernel reads and writes an operand: 16 bytes at a time where it can, else an element at a time through dtype and strides.
#pragma once

#include <type_traits>

#include "cuda/device.h"
#include "cuda/job.h"
#include "math/rounding.h"

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
struct Eight {
  float at[8];
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
  // What a stored pack holds, rounded as it is.
  static __device__ __forceinline__ Pack stored(Handle, int, const Pack& v) { return v; }

  // An operand that may be wider: a copy or an average of 16-bit weights in float32, two accesses a pack.
  static constexpr bool may_widen = sizeof(S) < sizeof(float);
  struct Rider {
    char* data;
    bool wide;
  };
  struct RiderPack {
    uint4 part[may_widen ? 2 : 1];
  };
  static __device__ __forceinline__ Rider rider(const Operand& x, int64_t begin) {
    const bool wide = may_widen && x.dtype == DType::float32;
    return {global(x.data) + begin * int64_t(wide ? sizeof(float) : sizeof(S)), wide};
  }
  static __device__ __forceinline__ RiderPack load_rider(const Rider& x, int i) {
    RiderPack v{};
    if (x.wide) {
#pragma unroll
      for (int n = 0; n < int(sizeof v / 16); ++n) v.part[n] = load_16_bytes(x.data + i * int64_t(sizeof(float)) + 16 * n);
    } else {
      v.part[0] = load_16_bytes(x.data + i * int64_t(sizeof(S)));
    }
    return v;
  }
  static __device__ __forceinline__ void widen(const Rider& x, const RiderPack& v, T* to) {
    const Pack narrow = math::bits<Pack>(v.part[0]);
#pragma unroll
    for (int k = 0; k < width; ++k) to[k] = T(math::widen(narrow.at[k]));
    if constexpr (may_widen) {
      if (!x.wide) return;
      const Eight wide = math::bits<Eight>(v);
#pragma unroll
      for (int k = 0; k < width; ++k) to[k] = wide.at[k];
    }
  }
  static __device__ __forceinline__ void store_rider(const Rider& x, int i, const T* from) {
    if constexpr (may_widen) {
      if (x.wide) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const Vector<float> part = {from[4 * n], from[4 * n + 1], from[4 * n + 2], from[4 * n + 3]};
          store_16_bytes(x.data + i * int64_t(sizeof(float)) + 16 * n, math::bits<uint4>(part));
        }
        return;
      }
    }
    Pack v;
#pragma unroll
    for (int k = 0; k < width; ++k) math::put(from[k], v.at[k]);
    store_16_bytes(x.data + i * int64_t(sizeof(S)), math::bits<uint4>(v));
  }

  static constexpr bool may_round_randomly = may_widen;
  static __device__ __forceinline__ T rounded_randomly(Handle, T x, uint32_t random) {
    if constexpr (std::is_same_v<S, BFloat16>) return math::random_bfloat16(x, random);
    if constexpr (std::is_same_v<S, Half>) return math::random_half(x, random);
    return x;
  }
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
  static __device__ __forceinline__ Pack stored(const Handle& x, int i, const Pack&) { return load(x, i); }

  using Rider = Handle;
  using RiderPack = Pack;
  static __device__ __forceinline__ Rider rider(const Operand& x, int64_t begin) { return {&x, x.data, begin}; }
  static __device__ __forceinline__ RiderPack load_rider(const Rider& x, int i) { return load(x, i); }
  static __device__ __forceinline__ void widen(const Rider&, const RiderPack& v, T* to) { to[0] = v.at[0]; }
  static __device__ __forceinline__ void store_rider(const Rider& x, int i, const T* from) { store(x, i, {from[0]}); }

  static constexpr bool may_round_randomly = sizeof(T) == sizeof(float);
  static __device__ __forceinline__ T rounded_randomly(const Handle& x, T v, uint32_t random) {
    return x.shape->dtype == DType::bfloat16 ? T(math::random_bfloat16(float(v), random)) : T(math::random_half(float(v), random));
  }
};

// Where a row's weights are kept before the step.
__device__ __forceinline__ const Operand& kept_weights(const Row& row) { return row.source.data ? row.source : row.param; }

// Runs f with the access that suits a chunk: one uniform branch a chunk. Operands of mixed dtypes go an element at a time, but for what may
// be float32 beside 16-bit weights, so that there are six bodies, not one a combination. Without kWide there is no float64.
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
