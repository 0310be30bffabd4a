// The weights before a step, with all the digits that are kept of them.
#pragma once

#include "cuda/gradient.h"

namespace gradfused::cuda {
namespace {

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

}  // namespace
}  // namespace gradfused::cuda
