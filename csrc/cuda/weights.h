// The weights of a unit or piece: read, and written back in the row's precision, with what is kept along with them.
#pragma once

#include "cuda/row.h"
#include "math/noise.h"

namespace gradfused::cuda {
namespace {

// Four random words for four neighbouring elements of a row in a step. `mark` tells one kind of draws from another.
__device__ __forceinline__ void draw_words(const BlockRow& block, uint64_t quad, uint32_t mark, uint32_t* four) {
  uint64_t c0 = uint32_t(quad), c1 = uint32_t(quad >> 32) | mark, c2 = block.param_number, c3 = block.taken;
  math::philox(block.seed, c0, c1, c2, c3);
  four[0] = uint32_t(c0), four[1] = uint32_t(c1), four[2] = uint32_t(c2), four[3] = uint32_t(c3);
}

// Copies to to[] the values of elements i to i + kCount - 1 that are among the `q`-th four of them; i is a multiple of kCount.
template <int kCount, class V> __device__ __forceinline__ void pick(const V* four, int64_t i, int q, V* to) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (kCount >= 4) to[(q * 4 + k) % kCount] = four[k];
    if (kCount < 4 && int(i % 4) <= k && k < int(i % 4) + kCount) to[k % kCount] = four[k];
  }
}

// The normal values of element i and its neighbours.
template <int kCount> __device__ __forceinline__ void draw_noise(const BlockRow& block, int64_t i, float* to) {
#pragma unroll
  for (int q = 0; q < (kCount + 3) / 4; ++q) {
    uint32_t words[4];
    draw_words(block, uint64_t(i) / 4 + uint64_t(q), 0, words);
    float four[4];
    math::box_muller(words[0], words[1], four[0], four[1]);
    math::box_muller(words[2], words[3], four[2], four[3]);
    pick<kCount>(four, i, q, to);
  }
}

// 32 random bits for each of element i and its neighbours, other than the noise's.
template <int kCount> __device__ __forceinline__ void draw_bits(const BlockRow& block, int64_t i, uint32_t* to) {
#pragma unroll
  for (int q = 0; q < (kCount + 3) / 4; ++q) {
    uint32_t four[4];
    draw_words(block, uint64_t(i) / 4 + uint64_t(q), math::kRoundingCounter, four);
    pick<kCount>(four, i, q, to);
  }
}

template <class A> struct Weights : KeptWeights<A> {
  using T = typename A::Compute;
  using Raw = typename A::Raw;
  using KeptWeights<A>::more;
  static constexpr int width = A::width;

  struct Loaded : KeptWeights<A>::Loaded {
    typename A::RiderRaw ema;
  };

  const BlockRow& block;
  int64_t begin = 0;
  typename A::Handle param{};
  typename A::Rider ema{};

  __device__ __forceinline__ explicit Weights(const BlockRow& row) : block(row) {}

  __device__ __forceinline__ void open(const Row& row, int64_t from) {
    begin = from;
    KeptWeights<A>::open(row, from);
    param = A::handle(row.param, row.param.data, from);
    ema = A::rider(row.ema, from);
  }

  __device__ __forceinline__ Loaded load(int i, uint32_t todo) const {
    Loaded v{KeptWeights<A>::load(i, todo), {}};
    if ((todo & (Need::ema | kStep)) == (Need::ema | kStep)) v.ema = A::load_rider(ema, i);
    return v;
  }

  // Stores the new weights `w`, and what is kept along with them.
  __device__ __forceinline__ void store(int i, uint32_t todo, const Loaded& v, const math::Mix<T>& mix, T* w) const {
    if (todo & Need::ema) {
      T average[width];
      A::widen(ema, v.ema, average);
#pragma unroll
      for (int k = 0; k < width; ++k) average[k] = mix(average[k], w[k]);
      A::store_rider(ema, i, average);
    }
    if constexpr (A::may_be_short) {
      if (todo & Need::master) A::store_rider(more, i, w);
      if (todo & Need::stochastic) round_randomly(i, w);
    }
    Raw p{};
#pragma unroll
    for (int k = 0; k < width; ++k) A::set(p, k, w[k]);
    A::store_raw(param, i, p);
    if constexpr (A::may_be_short) {
      if (!(todo & Need::kahan)) return;
      p = A::stored(param, i, p);
#pragma unroll
      for (int k = 0; k < width; ++k) w[k] = w[k] - A::get(p, k);
      A::store_rider(more, i, w);
    }
  }

  __device__ __forceinline__ void round_randomly(int i, T* w) const {
    uint32_t random[width];
    draw_bits<width>(block, begin + i, random);
#pragma unroll
    for (int k = 0; k < width; ++k) w[k] = A::rounded_randomly(param, w[k], random[k]);
  }
};

}  // namespace
}  // namespace gradfused::cuda
