// How a kernel reads and writes an operand: 16 bytes at a time where it can, else an element at a time through dtype and strides. And how it
// reads the weights before a step.
#pragma once

#include <type_traits>

#include "cuda/job.h"
#include "math/rounding.h"

namespace gradfused::cuda {
namespace {

using math::BFloat16;
using math::Half;

// The elements of one access. They stay as they are stored, in 4 registers, until one of them is computed with.
template <class S> struct alignas(16) Vector {
  S item[16 / sizeof(S)];
};
template <class T> struct One {
  T item[1];
};
// The same as words: otherwise nvcc splits a pack that is loaded in a branch into 16-bit halves at once, and waits for the load.
struct alignas(16) Words {
  uint32_t item[4];
};

// Tells the compiler that an address found in a table is one of device memory: LDG in place of generic loads.
template <class T> __device__ __forceinline__ T* global(T* p) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// In assembly, since nvcc 13.0 splits such an access into elements for compute capability 10.0 and 12.0. The
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

  using Raw = Words;
  // The elements as the store rounded them.
  static __device__ __forceinline__ Raw stored(Handle, int, const Raw& v) { return v; }
  static __device__ __forceinline__ Raw load_raw(Handle x, int i) { return math::bits<Words>(load_16_bytes(x + i)); }
  static __device__ __forceinline__ void store_raw(Handle x, int i, const Raw& v) { store_16_bytes(x + i, math::bits<uint4>(v)); }
  static __device__ __forceinline__ Raw raw(const Pack& v) { return math::bits<Raw>(v); }
  static __device__ __forceinline__ Pack pack(const Raw& v) { return math::bits<Pack>(v); }
  static __device__ __forceinline__ T get(const Raw& v, int k) {
    if constexpr (sizeof(S) == 2) return T(math::widen(S{uint16_t(v.item[k / 2] >> (16 * (k % 2)))}));
    if constexpr (sizeof(S) == 4) return math::bits<S>(v.item[k]);
    if constexpr (sizeof(S) == 8) return math::bits<S>(uint64_t{v.item[(2 * k) % 4]} | uint64_t{v.item[(2 * k + 1) % 4]} << 32);
  }
  static __device__ __forceinline__ void set(Raw& v, int k, T x) {
    S stored;
    math::put(x, stored);
    if constexpr (sizeof(S) == 2) {
      const uint32_t half = stored.bits;
      v.item[k / 2] = k % 2 ? (v.item[k / 2] & 0xFFFFu) | half << 16 : (v.item[k / 2] & 0xFFFF0000u) | half;
    }
    if constexpr (sizeof(S) == 4) v.item[k] = math::bits<uint32_t>(stored);
    if constexpr (sizeof(S) == 8) {
      v.item[(2 * k) % 4] = uint32_t(math::bits<uint64_t>(stored));
      v.item[(2 * k + 1) % 4] = uint32_t(math::bits<uint64_t>(stored) >> 32);
    }
  }

  // An operand that may be wider: a copy or an average of 16-bit weights in float32, two accesses a pack.
  static constexpr bool may_widen = sizeof(S) < sizeof(float);
  struct Rider {
    char* data;
    bool wide;
  };
  struct RiderRaw {
    Words part[may_widen ? 2 : 1];
  };
  static __device__ __forceinline__ Rider rider(const Operand& x, int64_t begin) {
    const bool wide = may_widen && x.dtype == DType::float32;
    return {global(x.data) + begin * int64_t(wide ? sizeof(float) : sizeof(S)), wide};
  }
  static __device__ __forceinline__ RiderRaw load_rider(const Rider& x, int i) {
    RiderRaw v{};
    if constexpr (may_widen) {
      const char* const from = x.data + int64_t(i) * (x.wide ? 4 : 2);
      v.part[0] = math::bits<Words>(load_16_bytes(from));
      if (x.wide) v.part[1] = math::bits<Words>(load_16_bytes(from + 16));
    } else {
      v.part[0] = math::bits<Words>(load_16_bytes(x.data + int64_t(i) * int64_t(sizeof(S))));
    }
    return v;
  }
  static __device__ __forceinline__ void widen(const Rider& x, const RiderRaw& v, T* to) {
    if constexpr (may_widen) {
      if (x.wide) {
#pragma unroll
        for (int k = 0; k < width; ++k) to[k] = math::bits<float>(v.part[k / 4].item[k % 4]);
        return;
      }
    }
#pragma unroll
    for (int k = 0; k < width; ++k) to[k] = get(v.part[0], k);
  }
  static __device__ __forceinline__ void store_rider(const Rider& x, int i, const T* from) {
    Words v{};
    if constexpr (may_widen) {
      if (x.wide) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int k = 0; k < 4; ++k) v.item[k] = math::bits<uint32_t>(from[4 * n + k]);
          store_16_bytes(x.data + int64_t(i) * 4 + 16 * n, math::bits<uint4>(v));
        }
        return;
      }
    }
#pragma unroll
    for (int k = 0; k < width; ++k) set(v, k, from[k]);
    store_16_bytes(x.data + int64_t(i) * int64_t(sizeof(S)), math::bits<uint4>(v));
  }

  // x rounded to the dtype of the operand.
  static __device__ __forceinline__ T rounded(Handle, T x) {
    S stored;
    math::put(x, stored);
    return T(math::widen(stored));
  }
  static __device__ __forceinline__ float half_unit(Handle) {
    return math::half_unit(std::is_same_v<S, BFloat16> ? DType::bfloat16 : DType::float16);
  }

  // Whether weights that are accessed in this way may be of 16 bits.
  static constexpr bool may_be_short = may_widen;
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
    int64_t offset = 0;
#pragma unroll 1
    for (int d = x.dims - 1; d >= 0; --d) {
      const int64_t size = global(x.sizes)[d];
      offset += i % size * global(x.strides)[d];
      i /= size;
    }
    return offset;
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
      case DType::float32: return math::put(v.item[0], element<float>(x, i));
      case DType::float64: return math::put(v.item[0], element<double>(x, i));
      case DType::float16: return math::put(v.item[0], element<Half>(x, i));
      default: return math::put(v.item[0], element<BFloat16>(x, i));
    }
  }

  using Raw = Pack;
  static __device__ __forceinline__ Raw load_raw(const Handle& x, int i) { return load(x, i); }
  static __device__ __forceinline__ void store_raw(const Handle& x, int i, const Raw& v) { store(x, i, v); }
  static __device__ __forceinline__ Raw raw(const Pack& v) { return v; }
  static __device__ __forceinline__ Pack pack(const Raw& v) { return v; }
  static __device__ __forceinline__ T get(const Raw& v, int) { return v.item[0]; }
  static __device__ __forceinline__ void set(Raw& v, int, T x) { v.item[0] = x; }
  static __device__ __forceinline__ Raw stored(const Handle& x, int i, const Raw&) { return load(x, i); }

  using Rider = Handle;
  using RiderRaw = Raw;
  static __device__ __forceinline__ Rider rider(const Operand& x, int64_t begin) { return {&x, x.data, begin}; }
  static __device__ __forceinline__ RiderRaw load_rider(const Rider& x, int i) { return load(x, i); }
  static __device__ __forceinline__ void widen(const Rider&, const RiderRaw& v, T* to) { to[0] = v.item[0]; }
  static __device__ __forceinline__ void store_rider(const Rider& x, int i, const T* from) { store(x, i, {from[0]}); }

  static __device__ __forceinline__ T rounded(const Handle& x, T v) {
    return x.shape->dtype == DType::bfloat16 ? Plain<BFloat16, T>::rounded(nullptr, v) : Plain<Half, T>::rounded(nullptr, v);
  }
  static __device__ __forceinline__ float half_unit(const Handle& x) { return math::half_unit(x.shape->dtype); }

  static constexpr bool may_be_short = sizeof(T) == sizeof(float);
  static __device__ __forceinline__ T rounded_randomly(const Handle& x, T v, uint32_t random) {
    return x.shape->dtype == DType::bfloat16 ? T(math::random_bfloat16(float(v), random)) : T(math::random_half(float(v), random));
  }
};

// The operand that a row's weights are read from, in the parameter's dtype.
__device__ __forceinline__ const Operand& kept_weights(const Row& row) { return row.source.data ? row.source : row.param; }

// The weights before a step, with all the digits that are kept of them.
template <class A> struct KeptWeights {
  using T = typename A::Compute;
  static constexpr int width = A::width;

  // As loaded: no instruction waits for them until they are widened.
  struct Loaded {
    typename A::Raw own;
    typename A::RiderRaw more;
  };

  typename A::Handle own{};
  typename A::Rider more{};  // the float32 copy or the compensation: no row has both

  __device__ __forceinline__ void open(const Row& row, int64_t begin) {
    const Operand& kept = kept_weights(row);
    own = A::handle(kept, kept.data, begin);
    more = A::rider(row.master.data ? row.master : row.kahan_comp, begin);
  }

  __device__ __forceinline__ Loaded load(int i, uint32_t todo) const {
    Loaded v{};
    v.own = A::load_raw(own, i);
    if constexpr (A::may_be_short) {
      if (todo & (Need::copy | Need::kahan)) v.more = A::load_rider(more, i);
    }
    return v;
  }

  __device__ __forceinline__ void widen(const Loaded& v, uint32_t todo, T* to) const {
#pragma unroll
    for (int k = 0; k < width; ++k) to[k] = A::get(v.own, k);
    if constexpr (A::may_be_short) {
      if (!(todo & (Need::copy | Need::kahan))) return;
      T finer[width];
      A::widen(more, v.more, finer);
      if (todo & Need::copy) {
#pragma unroll
        for (int k = 0; k < width; ++k) to[k] = math::believed_copy(finer[k], A::rounded(own, finer[k]), to[k]);
      } else {
        const float half = A::half_unit(own);
#pragma unroll
        for (int k = 0; k < width; ++k) to[k] = to[k] + math::believed_rest(finer[k], to[k], half);
      }
    }
  }
};

// Runs f with the access that suits a chunk: one uniform branch a chunk. Operands of mixed dtypes are accessed an element at a time, except
// those that may be float32 beside 16-bit weights, so that there are six bodies and not one a combination. Without kWide there is no float64.
template <bool kWide = true, class F>
__device__ __forceinline__ void with_access(const Row& row, const char* grad, bool plain, const F& f) {
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
