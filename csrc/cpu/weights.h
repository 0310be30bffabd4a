// A block's weights: read from where they are kept, and written back in the way that is asked for, with what rides on that.
#pragma once

#include "cpu/block.h"
#include "cpu/noise_run.h"
#include "math/rounding.h"
#include "math/rule.h"

namespace gradfused::cpu {
namespace {

// Whether the weights of a row are more than an array that is read and written.
inline bool is_ridden(const Row& row, const Hyper& h) {
  return row.source.data || row.ema.data || row.rounding != Rounding::nearest || h.zero_grad;
}

// Where the weights are kept before the step.
inline const Operand& kept_weights(const Row& row) { return row.source.data ? row.source : row.param; }

// x <- values that its 16-bit format can hold, each to one of its two neighbours there, the nearer the likelier.
template <class T> void round_randomly(const Place& at, const Block& b, T* x) {
  uint32_t words[4 * kQuads];
  for (int64_t done = 0; done < b.count;) {
    const int64_t begin = b.begin + done, skip = begin % 4, most = 4 * kQuads - skip, n = smaller(most, b.count - done);
    random_quads(at.hyper.seed, uint64_t(begin / 4), at.row.parameter, uint32_t(at.now.count.step - 1), words);
    for (int64_t i = 0; i < n; ++i) {
      const float v = float(x[done + i]);
      x[done + i] =
          T(at.row.param.dtype == DType::bfloat16 ? math::random_bfloat16(v, words[skip + i]) : math::random_half(v, words[skip + i]));
    }
    done += n;
  }
}

// The weights in `scratch` or in place.
template <class T> T* open_weights(const Place& at, const Block& b, char* scratch) {
  const Row& row = at.row;
  T* const own = buffer<T>(scratch, kParam);
  const Operand& kept = kept_weights(row);
  if (!row.source.data || row.rounding == Rounding::master) {
    if (row.rounding != Rounding::kahan) return open(kept, b.begin, b.count, own);
  }
  load(kept, b.begin, b.count, own);
  if (row.rounding == Rounding::kahan) {
    const T* const rest = open(row.rest, b.begin, b.count, buffer<T>(scratch, kGrad));
    for (int64_t i = 0; i < b.count; ++i) own[i] = own[i] + rest[i];
  }
  return own;
}

// Takes the step's weights `p` to where they are kept. The gradient's buffers are free by now.
template <class T> void close_weights(const Place& at, const Block& b, char* scratch, T* p) {
  const Row& row = at.row;
  if (row.ema.data) {
    T* const average = open(row.ema, b.begin, b.count, buffer<T>(scratch, kGrad));
    const auto mix = math::Mix<T>::of(1.0 - at.hyper.ema);
    for (int64_t i = 0; i < b.count; ++i) average[i] = mix(average[i], p[i]);
    close(row.ema, b.begin, b.count, average);
  }
  if (row.rounding == Rounding::stochastic) round_randomly(at, b, p);
  if (row.rounding == Rounding::master) close(row.source, b.begin, b.count, p);
  if (row.source.data && row.rounding != Rounding::kahan && !at.job.cached) {
    store_around(row.param, b.begin, b.count, p);
  } else if (row.source.data || row.rounding != Rounding::nearest) {
    store(row.param, b.begin, b.count, p);
  } else {
    close(row.param, b.begin, b.count, p);
  }
  if (row.rounding == Rounding::kahan) {
    T* const rest = buffer<T>(scratch, kRaw);
    load(row.param, b.begin, b.count, rest);
    for (int64_t i = 0; i < b.count; ++i) rest[i] = p[i] - rest[i];
    store(row.rest, b.begin, b.count, rest);
  }
  if (at.hyper.zero_grad) {
    T* const zeros = buffer<T>(scratch, kRaw);
    for (int64_t i = 0; i < b.count; ++i) zeros[i] = T(0);
    store(row.grad, b.begin, b.count, zeros);
  }
}

}  // namespace
}  // namespace gradfused::cpu
