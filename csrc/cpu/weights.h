// Reading and writing a block's weights, with their float32 copy, compensation and average.
#pragma once

#include "cpu/block.h"
#include "cpu/noise_run.h"
#include "math/rounding.h"
#include "math/rule.h"

namespace gradfused::cpu {
namespace {

// The operand that holds the weights before the step in the parameter's dtype.
inline const Operand& kept_weights(const Row& row) { return row.source.data ? row.source : row.param; }

// Rounds x stochastically to the parameter's 16-bit format: each value to one of its two neighbours, the nearer one more likely.
template <class T> void round_randomly(const ChunkContext& context, const Block& b, T* x) {
  uint32_t words[4 * kQuads];
  for (int64_t done = 0; done < b.count;) {
    const int64_t begin = b.begin + done, skip = begin % 4, most = 4 * kQuads - skip, n = smaller(most, b.count - done);
    random_quads(context.settings.seed, uint64_t(begin / 4), context.row.param_number, math::step_word(context.now.count.step), words);
    for (int64_t i = 0; i < n; ++i) {
      const float v = float(x[done + i]);
      x[done + i] =
          T(context.row.param.dtype == DType::bfloat16 ? math::random_bfloat16(v, words[skip + i]) : math::random_half(v, words[skip + i]));
    }
    done += n;
  }
}

// p <- `copy` where that rounds to p.
template <class T> void believe_bfloat16(const T* __restrict copy, int64_t n, T* __restrict p) {
  for (int64_t i = 0; i < n; ++i) p[i] = math::believed_copy(copy[i], T(math::held_bfloat16(float(copy[i]))), p[i]);
}

template <class T> void believe_half(const T* copy, int64_t n, T* p) {
  constexpr int64_t kRunLength = 64;
  Half narrow[kRunLength];
  T rounded[kRunLength];
  for (int64_t done = 0; done < n; done += kRunLength) {
    const int64_t count = smaller(kRunLength, n - done);
    narrow_run(copy + done, narrow, count);
    widen_run(narrow, rounded, count);
    for (int64_t i = done; i < done + count; ++i) p[i] = math::believed_copy(copy[i], rounded[i - done], p[i]);
  }
}

// The block's weights in float precision, in place or in `scratch`. With `written` the caller changes them, so a source is copied first.
// Uses the buffer of the transformed gradient, which is free at this point.
template <class T> T* open_weights(const ChunkContext& context, const Block& b, char* scratch, bool written = true) {
  const Row& row = context.row;
  T* const own = buffer<T>(scratch, kParam);
  const Operand& kept = kept_weights(row);
  const bool kahan = context.needs(Need::kahan);
  if (!context.needs(Need::copy) && !kahan && !(context.needs(Need::source) && written)) return open(kept, b.begin, b.count, own);
  load(kept, b.begin, b.count, own);
  if (context.needs(Need::copy)) {
    const T* const copy = open(row.master, b.begin, b.count, buffer<T>(scratch, kGrad));
    row.param.dtype == DType::bfloat16 ? believe_bfloat16(copy, b.count, own) : believe_half(copy, b.count, own);
  }
  if (kahan) {
    const T* const rest = open(row.kahan_comp, b.begin, b.count, buffer<T>(scratch, kGrad));
    const float half = math::half_unit(row.param.dtype);
    for (int64_t i = 0; i < b.count; ++i) own[i] = own[i] + math::believed_rest(rest[i], own[i], half);
  }
  return own;
}

// Stores the new weights `p` and everything kept beside them. The gradient's buffers are free at this point.
template <class T> void close_weights(const ChunkContext& context, const Block& b, char* scratch, T* p) {
  const Row& row = context.row;
  if (context.needs(Need::ema)) {
    T* const average = open(row.ema, b.begin, b.count, buffer<T>(scratch, kGrad));
    const auto mix = math::Mix<T>::of(1.0 - context.settings.ema);
    for (int64_t i = 0; i < b.count; ++i) average[i] = mix(average[i], p[i]);
    close(row.ema, b.begin, b.count, average);
  }
  if (context.needs(Need::stochastic)) round_randomly(context, b, p);
  if (context.needs(Need::master)) store(row.master, b.begin, b.count, p);
  if (context.needs(Need::source) && !context.needs(Need::kahan) && !context.job.cached) {
    store_around(row.param, b.begin, b.count, p);
  } else if (context.needs(Need::source | Need::kahan | Need::stochastic | Need::master)) {
    store(row.param, b.begin, b.count, p);
  } else {
    close(row.param, b.begin, b.count, p);
  }
  if (context.needs(Need::kahan)) {
    T* const rest = buffer<T>(scratch, kRaw);
    load(row.param, b.begin, b.count, rest);
    for (int64_t i = 0; i < b.count; ++i) rest[i] = p[i] - rest[i];
    store(row.kahan_comp, b.begin, b.count, rest);
  }
  if (context.needs(Need::zero_grad_in_step)) {
    T* const zeros = buffer<T>(scratch, kRaw);
    for (int64_t i = 0; i < b.count; ++i) zeros[i] = T(0);
    store(row.grad, b.begin, b.count, zeros);
  }
}

}  // namespace
}  // namespace gradfused::cpu
