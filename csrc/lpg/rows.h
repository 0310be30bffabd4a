// What LPG's kernels know of a row once its logits have been read.
#pragma once

#include "lpg/lanes.h"
#include "lpg/problem.h"

#define GRADFUSED_PASTE(a, b) a##b
#define GRADFUSED_NAME(a, b) GRADFUSED_PASTE(a, b)

namespace gradfused::lpg {
namespace {

using math::smaller;

template <class S> using Wide = decltype(widen(S()));  // T for logits of type S

// The greatest logit m and, over the classes other than the row's own, the sums of exp(x - m) and of its square.
template <class T> struct Saved {
  T greatest, others, squares;
};
template <class T> Saved<T>& saved_of(const Problem& p, int64_t row) { return reinterpret_cast<Saved<T>*>(p.saved)[row]; }

template <class T> double weight_of(const Problem& p, int64_t c) { return p.weight ? double(static_cast<const T*>(p.weight)[c]) : 1.0; }

// The lowest finite number.
inline float lowest(float) { return -3.402823466e+38f; }
inline double lowest(double) { return -1.7976931348623157e+308; }

// What concerns a row's own class.
struct Own {
  double exponential;  // exp(its logit - the greatest)
  double sum;          // of the exponentials of all classes
  double probability;
  double rest;  // the probability of all other classes
  // softmax - target distribution, from the smaller of the two probabilities: a difference of large ones would leave their rounding errors.
  double gradient;
  template <class T>
  Own(const Problem& p, const Saved<T>& s, T exponential_)
      : exponential(double(exponential_)),
        sum(exponential + double(s.others)),
        probability(exponential / sum),
        rest(double(s.others) / sum),
        gradient(probability < rest ? probability - (1 - p.smoothing + p.share()) : p.smoothing - p.share() - rest) {}
};

// Without the factor and without delta: the coefficient of a row's probabilities in its weighted gradient, and that gradient at its own class.
inline double slope_of(const Problem& p, double weight) { return (1 - p.smoothing) * weight + p.share() * p.weight_sum; }
inline double plain_of(const Problem& p, const Own& own, double weight) {
  return p.share() * (p.weight_sum * own.probability - weight) - (1 - p.smoothing) * weight * own.rest;
}

template <class T> void put_row(const RowResults& to, int64_t row, double loss, double confidence, double norm) {
  static_cast<T*>(to.loss)[row] = T(loss);
  if (to.confidence) static_cast<T*>(to.confidence)[row] = T(confidence);
  if (to.norm) static_cast<T*>(to.norm)[row] = T(norm);
}

// Writes what the forward returns of a row that counts. `weighted` is the sum of weight * (logit - origin), read with label smoothing only.
template <class T>
void finish_row(const Problem& p, const RowResults& to, int64_t row, T logit, const Own& own, double weighted, T origin) {
  const Saved<T>& saved = saved_of<T>(p, row);
  const double s = p.smoothing;
  const double log_sum = own.exponential == 1 ? log1p(double(saved.others)) : log(own.sum);
  double loss = (1 - s) * weight_of<T>(p, p.target[row]) * (log_sum + (double(saved.greatest) - double(logit)));
  if (s == 1) loss = 0;  // not 0 * inf
  if (s > 0) loss += p.share() * (p.weight_sum * (log_sum + double(saved.greatest) - double(origin)) - weighted);
  double norm = 0;
  if (to.norm) {
    const double rest =
        double(saved.squares) / (own.sum * own.sum) - 2 * p.share() * own.rest + double(p.classes - 1) * p.share() * p.share();
    norm = sqrt(own.gradient * own.gradient + (rest < 0 ? 0 : rest));
  }
  put_row<T>(to, row, loss, own.probability, norm);
}

template <class F> auto in_dtype(const Problem& p, F run) {
  switch (p.dtype) {
    case DType::float64: return run(double{});
    case DType::float16: return run(Half{});
    case DType::bfloat16: return run(BFloat16{});
    default: return run(float{});
  }
}

}  // namespace
}  // namespace gradfused::lpg
