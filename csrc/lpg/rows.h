// What LPG's kernels know of one row of logits once it has been read.
#pragma once

#include "lpg/lanes.h"
#include "lpg/problem.h"

namespace gradfused::cpu {
namespace {

using math::smaller;

template <class S> struct WideOf {
  using Type = float;
};
template <> struct WideOf<double> {
  using Type = double;
};

template <class T> struct Saved {
  T greatest, others, squares;
};
template <class T> Saved<T>& saved_of(const LpgProblem& p, int64_t row) { return reinterpret_cast<Saved<T>*>(p.saved)[row]; }

template <class T> double weight_of(const LpgProblem& p, int64_t c) { return p.weight ? double(static_cast<const T*>(p.weight)[c]) : 1.0; }

// What no logit but -inf is less than.
inline float lowest(float) { return -3.402823466e+38f; }
inline double lowest(double) { return -1.7976931348623157e+308; }

// Of a row's own class. `exponential` is exp(its logit - the greatest).
struct Own {
  double exponential;
  double sum;          // of all classes' exponentials
  double probability;  // the own class's
  double rest;         // the other classes'
  // softmax - target distribution, from the smaller of the two probabilities: a difference of large ones would leave their rounding errors.
  double gradient;
  template <class T>
  Own(const LpgProblem& p, const Saved<T>& s, T exponential_)
      : exponential(double(exponential_)),
        sum(exponential + double(s.others)),
        probability(exponential / sum),
        rest(double(s.others) / sum),
        gradient(probability < rest ? probability - (1 - p.smoothing + p.share()) : p.smoothing - p.share() - rest) {}
};

template <class T> Own own_of(const LpgProblem& p, const Saved<T>& s, T logit) { return Own(p, s, exp_one(logit - s.greatest)); }

// The coefficient of a row's probabilities in its gradient, and that gradient for the own class, before the factor and without delta.
inline double slope_of(const LpgProblem& p, double weight) { return (1 - p.smoothing) * weight + p.share() * p.weight_sum; }
inline double plain_of(const LpgProblem& p, const Own& own, double weight) {
  return p.share() * (p.weight_sum * own.probability - weight) - (1 - p.smoothing) * weight * own.rest;
}

template <class T> void put_row(const LpgRows& to, int64_t row, double loss, double confidence, double norm) {
  static_cast<T*>(to.loss)[row] = T(loss);
  if (to.confidence) static_cast<T*>(to.confidence)[row] = T(confidence);
  if (to.norm) static_cast<T*>(to.norm)[row] = T(norm);
}

// `weighted` is the sum of weight * (logit - origin), where there is smoothing.
template <class T>
void finish_row(const LpgProblem& p, const LpgRows& to, int64_t row, T logit, const Own& own, double weighted, T origin) {
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

template <class F> auto in_dtype(const LpgProblem& p, F run) {
  switch (p.dtype) {
    case DType::float64: return run(double{});
    case DType::float16: return run(Half{});
    case DType::bfloat16: return run(BFloat16{});
    default: return run(float{});
  }
}

}  // namespace
}  // namespace gradfused::cpu
