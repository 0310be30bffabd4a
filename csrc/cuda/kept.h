// The weights before a step: read from where they are kept, in all the digits that belong to them.
#pragma once

#include "cuda/gradient.h"

namespace gradfused::cuda {
namespace {

// Beside the parameter. The bits are among those of what there is to do with each element: cuda/row.h.
constexpr uint32_t kCopied = 1u << 2;  // in a copy in float32
constexpr uint32_t kKahan = 1u << 3;   // in what rounding took off

__device__ __forceinline__ uint32_t kept_in(const Row& row) {
  return (row.master.data ? kCopied : 0u) | (row.precision == Precision::kahan ? kKahan : 0u);
}

template <class A> struct Kept {
  using T = typename A::Compute;
  static constexpr int width = A::width;

  // As they came from memory: nothing waits for them until they are widened.
  struct Loaded {
    typename A::Raw own;
    typename A::RiderRaw more;
  };

  typename A::Handle own{};
  typename A::Rider more{};  // the copy or the remainder: no row has both

  __device__ __forceinline__ void open(const Row& row, int64_t at) {
    const Operand& kept = kept_weights(row);
    own = A::handle(kept, kept.data, at);
    more = A::rider(row.master.data ? row.master : row.kahan_comp, at);
  }

  __device__ __forceinline__ Loaded load(int i, uint32_t todo) const {
    Loaded v{};
    v.own = A::load_raw(own, i);
    if constexpr (A::may_be_short) {
      if (todo & (kCopied | kKahan)) v.more = A::load_rider(more, i);
    }
    return v;
  }

  __device__ __forceinline__ void widen(const Loaded& v, uint32_t todo, T* to) const {
#pragma unroll
    for (int k = 0; k < width; ++k) to[k] = A::get(v.own, k);
    if constexpr (A::may_be_short) {
      if (!(todo & (kCopied | kKahan))) return;
      T finer[width];
      A::widen(more, v.more, finer);
      if (todo & kCopied) {
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

}  // namespace
}  // namespace gradfused::cuda
