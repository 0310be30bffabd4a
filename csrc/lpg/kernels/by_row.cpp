// LPG cross-entropy's kernels of one instruction set, compiled like kernels.cpp. No row's softmax is ever in memory: probabilities are made
// from the logits where they are wanted.
#include "lpg/rows.h"

namespace gradfused::cpu {
namespace {

// Columns whose greatest is found before their exponentials: they stay in the L1 cache in between. Sums are widened as often.
constexpr int64_t kColumns = 2048;

template <class S> const S* row_of(const LpgProblem& p, int64_t row) { return reinterpret_cast<const S*>(p.logits) + row * p.inner_stride; }

template <class T, class S> T greatest_of(const S* x, int64_t n, T than) {
  Lanes<T> most = Lanes<T>::all(than);
  int64_t i = 0;
  for (; i + kAbreast <= n; i += kAbreast) most = most.or_greater(load<T>(x + i));
  if (i < n) most = most.or_greater(load_some<T>(x + i, n - i, than));
  return greatest(most);
}

// Calls with(lanes, their place) for x[0..n) sixteen at a time. What is beyond the end, and the element `but` if it is inside, is -inf.
template <class T, class S, class F> GRADFUSED_MATH void for_others(const S* x, int64_t n, int64_t but, F with) {
  const int64_t full = n / kAbreast * kAbreast;
  const bool inside = but >= 0 && but < full;
  const int64_t hole = inside ? but / kAbreast * kAbreast : full;
  for (int64_t i = 0; i < hole; i += kAbreast) with(load<T>(x + i), i);
  if (inside) {
    T some[kAbreast];
    load<T>(x + hole).spill(some);
    some[but - hole] = T(-INFINITY);
    with(Lanes<T>::of(some), hole);
    for (int64_t i = hole + kAbreast; i < full; i += kAbreast) with(load<T>(x + i), i);
  }
  if (full == n) return;
  T some[kAbreast];
  for (int k = 0; k < kAbreast; ++k) some[k] = full + k < n && full + k != but ? T(widen(x[full + k])) : T(-INFINITY);
  with(Lanes<T>::of(some), full);
}

// others, squares += the sums of e and e^2, e = exp(x - greatest), over all elements but one.
template <class T, class S> void add_exponentials(const S* x, int64_t n, int64_t but, T greatest, double& others, double& squares) {
  const Lanes<T> shift = Lanes<T>::all(greatest);
  Lanes<T> sum = Lanes<T>::all(0), square = sum;
  for_others<T>(x, n, but, [&](const Lanes<T>& v, int64_t) {
    const Lanes<T> e = (v - shift).exp();
    sum = sum + e;
    square = square + e * e;
  });
  others += total(sum);
  squares += total(square);
}

// The sum of weight * (x - origin).
template <class T, class S> double weighted_sum(const S* x, const T* weight, int64_t n, T origin) {
  const Lanes<T> shift = Lanes<T>::all(origin);
  Lanes<T> sum = Lanes<T>::all(0);
  int64_t i = 0;
  for (; i + kAbreast <= n; i += kAbreast) {
    const Lanes<T> v = load<T>(x + i) - shift;
    sum = sum + (weight ? v * load<T>(weight + i) : v);
  }
  double rest = 0;
  for (; i < n; ++i) rest += double((T(widen(x[i])) - origin) * (weight ? weight[i] : T(1)));
  return total(sum) + rest;
}

template <class S> class Reader {
 public:
  using T = typename WideOf<S>::Type;
  explicit Reader(const LpgProblem& p) : p_(p), weight_(static_cast<const T*>(p.weight)) {}

  void measure(const LpgRows& to, int64_t row) const {
    Saved<T>& saved = saved_of<T>(p_, row);
    if (!p_.counts(row)) {
      saved = {};
      return put_row<T>(to, row, 0, 0, 0);
    }
    const S* x = row_of<S>(p_, row);
    const int64_t y = p_.target[row];
    T most = lowest(T());
    double others = 0, squares = 0, weighted = 0;
    T origin = 0;
    for (int64_t at = 0; at < p_.classes; at += kColumns) {
      const int64_t n = smaller(kColumns, p_.classes - at);
      const T greatest = greatest_of<T>(x + at, n, most);
      if (at == 0) origin = greatest;
      if (at && greatest > most) {
        const double shrink = double(exp_one(most - greatest));
        others *= shrink;
        squares *= shrink * shrink;
      }
      most = greatest;
      add_exponentials(x + at, n, y - at, most, others, squares);
      if (p_.smoothing > 0) weighted += weighted_sum(x + at, weight_ ? weight_ + at : nullptr, n, origin);
    }
    saved = {most, T(others), T(squares)};
    const T logit = T(widen(x[y]));
    finish_row(p_, to, row, logit, own_of(p_, saved, logit), weighted, origin);
  }

 private:
  const LpgProblem& p_;
  const T* const weight_;
};

// sums <- or += a row's gradient, of classes that are not its own. Summed probabilities, from which the target distribution was taken
// afterwards, would leave the rounding errors of large sums where gradients are small beside probabilities.
template <bool kFirst, class T, class S> void add_gradients(const S* x, int64_t n, T greatest, T inverse, T share, T* __restrict sums) {
  const Lanes<T> shift = Lanes<T>::all(greatest), scale = Lanes<T>::all(inverse), less = Lanes<T>::all(share);
  int64_t i = 0;
  for (; i + kAbreast <= n; i += kAbreast) {
    const Lanes<T> g = (load<T>(x + i) - shift).exp() * scale - less;
    store(kFirst ? g : load<T>(sums + i) + g, sums + i);
  }
  if (i == n) return;
  const Lanes<T> g = (load_some<T>(x + i, n - i, greatest) - shift).exp() * scale - less;
  store_some(kFirst ? g : load_some<T>(sums + i, n - i, T(0)) + g, sums + i, n - i);
}

template <class S> double accumulate_rows(const LpgProblem& p, const int64_t* rows, int64_t count, typename WideOf<S>::Type* sums) {
  using T = typename WideOf<S>::Type;
  const T share = T(p.share());
  double of_own = 0;
  for (int64_t k = 0; k < count; ++k) {
    const S* x = row_of<S>(p, rows[k]);
    const Saved<T>& saved = saved_of<T>(p, rows[k]);
    const Own own = own_of(p, saved, T(widen(x[p.target[rows[k]]])));
    const T inverse = T(1 / own.sum);
    of_own += own.gradient;
    k ? add_gradients<false>(x, p.classes, saved.greatest, inverse, share, sums)
      : add_gradients<true>(x, p.classes, saved.greatest, inverse, share, sums);
  }
  return of_own;
}

// The norm of a row's logit gradient. Without smoothing the forward has measured it.
template <class S> double row_norm(const LpgProblem& p, int64_t row) {
  using T = typename WideOf<S>::Type;
  const S* x = row_of<S>(p, row);
  const int64_t y = p.target[row];
  const Saved<T>& saved = saved_of<T>(p, row);
  const Own own = own_of(p, saved, T(widen(x[y])));
  double rest = double(saved.squares) / (own.sum * own.sum);
  if (p.smoothing > 0) {
    rest = 0;
    const T inverse = T(1 / own.sum), share = T(p.share());
    const Lanes<T> shift = Lanes<T>::all(saved.greatest), scale = Lanes<T>::all(inverse), less = Lanes<T>::all(share);
    const auto one = [&](int64_t j) {
      const T d = exp_one(T(widen(x[j])) - saved.greatest) * inverse - share;
      if (j != y) rest += double(d * d);
    };
    for (int64_t at = 0; at < p.classes; at += kColumns) {
      const int64_t end = smaller(at + kColumns, p.classes);
      Lanes<T> squares = Lanes<T>::all(0);
      int64_t i = at;
      for (; i + kAbreast <= end; i += kAbreast) {
        if (i <= y && y < i + kAbreast) {
          for (int64_t j = i; j < i + kAbreast; ++j) one(j);
          continue;
        }
        const Lanes<T> d = (load<T>(x + i) - shift).exp() * scale - less;
        squares = squares + d * d;
      }
      rest += total(squares);
      for (; i < end; ++i) one(i);
    }
  }
  return sqrt(own.gradient * own.gradient + rest);
}

// Coefficients of a row's gradient: slope * exp(x - greatest) + constant + by_weight * weight + by_mean * mean.
template <class T> struct Line {
  T greatest, slope, constant, by_weight, by_mean;
};

template <bool kWeight, bool kMean, class T, class S>
void write_line(const S* __restrict x, int64_t n, const Line<T>& line, const T* __restrict weight, const T* __restrict mean,
                S* __restrict to) {
  const Lanes<T> shift = Lanes<T>::all(line.greatest), slope = Lanes<T>::all(line.slope), constant = Lanes<T>::all(line.constant);
  const Lanes<T> by_weight = Lanes<T>::all(line.by_weight), by_mean = Lanes<T>::all(line.by_mean);
  const auto value = [&](const Lanes<T>& v, const auto& operand) {
    Lanes<T> g = (v - shift).exp() * slope + constant;
    if constexpr (kWeight) g = g + by_weight * operand(weight);
    if constexpr (kMean) g = g + by_mean * operand(mean);
    return g;
  };
  int64_t i = 0;
  for (; i + kAbreast <= n; i += kAbreast) {
    store(value(load<T>(x + i), [i](const T* from) { return load<T>(from + i); }), to + i);
  }
  if (i == n) return;
  const int64_t left = n - i;
  const auto some = [i, left](const T* from) { return load_some<T>(from + i, left, T(0)); };
  store_some(value(load_some<T>(x + i, left, line.greatest), some), to + i, left);
}

template <class S> void write_row(const LpgProblem& p, const LpgGradient& gradient, const LpgDelta& delta, int64_t row) {
  using T = typename WideOf<S>::Type;
  S* to = reinterpret_cast<S*>(gradient.out) + row * p.classes;
  if (!p.counts(row)) {
    memset(static_cast<void*>(to), 0, size_t(p.classes) * sizeof(S));
    return;
  }
  const S* x = row_of<S>(p, row);
  const int64_t y = p.target[row];
  const Saved<T>& saved = saved_of<T>(p, row);
  const Own own = own_of(p, saved, T(widen(x[y])));
  const double f = gradient.factor[row * gradient.factor_stride], w = weight_of<T>(p, y);
  const double b = p.share(), along = w * delta.along;
  const double slope = slope_of(p, w) + (delta.mean ? 0 : along);
  const double offset = delta.mean ? 0 : -along * b;
  const T* weight = b > 0 ? static_cast<const T*>(p.weight) : nullptr;
  const T* mean = static_cast<const T*>(delta.mean);
  const Line<T> line = {saved.greatest, T(f * slope / own.sum), T(f * (weight ? offset : offset - b)), T(-f * b),
                        T(f * along * delta.scale)};
  if (weight) {
    mean ? write_line<true, true>(x, p.classes, line, weight, mean, to) : write_line<true, false>(x, p.classes, line, weight, mean, to);
  } else {
    mean ? write_line<false, true>(x, p.classes, line, weight, mean, to) : write_line<false, false>(x, p.classes, line, weight, mean, to);
  }
  put(T(f * (plain_of(p, own, w) + along * (mean ? delta.own_mean : own.gradient))), to[y]);
}

template <class F> auto in_wide(const LpgProblem& p, F run) { return p.dtype == DType::float64 ? run(double{}) : run(float{}); }

void forward(const LpgProblem& p, const LpgRows& to, int64_t begin, int64_t end) {
  in_dtype(p, [&](auto s) {
    const Reader<decltype(s)> reader(p);
    for (int64_t row = begin; row < end; ++row) reader.measure(to, row);
  });
}

double accumulate(const LpgProblem& p, const int64_t* rows, int64_t count, void* sums) {
  return in_dtype(p, [&](auto s) {
    using S = decltype(s);
    return accumulate_rows<S>(p, rows, count, static_cast<typename WideOf<S>::Type*>(sums));
  });
}

template <class T> double squares_of(const T* mean, int64_t n, T scale) {
  const Lanes<T> by = Lanes<T>::all(scale);
  double sum = 0;
  for (int64_t at = 0; at < n; at += kColumns) {
    const int64_t end = smaller(at + kColumns, n);
    Lanes<T> squares = Lanes<T>::all(0);
    int64_t i = at;
    for (; i + kAbreast <= end; i += kAbreast) {
      const Lanes<T> d = load<T>(mean + i) * by;
      squares = squares + d * d;
    }
    sum += total(squares);
    for (; i < end; ++i) sum += double(mean[i] * scale) * double(mean[i] * scale);
  }
  return sum;
}

double squares(const LpgProblem& p, const void* mean, double scale, int64_t but) {
  return in_wide(p, [&](auto t) {
    using T = decltype(t);
    const T* m = static_cast<const T*>(mean);
    // Two runs: taking the one off again would lose what is small beside it.
    return squares_of(m, but, T(scale)) + squares_of(m + but + 1, p.classes - but - 1, T(scale));
  });
}

double norm(const LpgProblem& p, int64_t row) {
  return in_dtype(p, [&](auto s) { return row_norm<decltype(s)>(p, row); });
}

void write(const LpgProblem& p, const LpgGradient& gradient, const LpgDelta& delta, int64_t row) {
  in_dtype(p, [&](auto s) { write_row<decltype(s)>(p, gradient, delta, row); });
}

void combine(const LpgProblem& p, const void* parts, int64_t count, void* to, int64_t begin, int64_t end) {
  in_wide(p, [&](auto t) {
    using T = decltype(t);
    for (int64_t j = begin; j < end; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < count; ++k) sum += double(static_cast<const T*>(parts)[k * p.classes + j]);
      static_cast<T*>(to)[j] = T(sum);
    }
  });
}

}  // namespace

#define GRADFUSED_PASTE(a, b) a##b
#define GRADFUSED_NAME(a, b) GRADFUSED_PASTE(a, b)

const LpgKernels& GRADFUSED_NAME(lpg_kernels_, GRADFUSED_ISA)() {
  static constexpr LpgKernels kernels = {forward, accumulate, squares, norm, write, combine};
  return kernels;
}

}  // namespace gradfused::cpu
