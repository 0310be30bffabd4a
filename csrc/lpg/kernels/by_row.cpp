// LPG cross-entropy's kernels whose lanes are classes, compiled once for each instruction set. No softmax is ever in memory: probabilities
// are computed from the logits wherever they are needed.
#include "lpg/rows.h"

namespace gradfused::lpg {
namespace {

// Columns that are read twice, for their greatest and for their exponentials: they stay in the L1 cache in between. Sums are kept in T for as
// many columns, then added up in double.
constexpr int64_t kColumns = 2048;

template <class S> const S* row_of(const Problem& p, int64_t row) { return reinterpret_cast<const S*>(p.logits) + row * p.inner_stride; }

template <class S> Own own_of(const Problem& p, const S* x, int64_t row) {
  using T = Wide<S>;
  const Saved<T>& saved = saved_of<T>(p, row);
  return Own(p, saved, exp_one(T(widen(x[p.target[row]])) - saved.greatest));
}

// Calls use(i, count) for each sixteen elements out of n, and for the count that is left.
template <class F> GRADFUSED_MATH void by_sixteen(int64_t n, F use) {
  int64_t i = 0;
  for (; i + kAbreast <= n; i += kAbreast) use(i, All{});
  if (i < n) use(i, n - i);
}

template <class T, class S> T greatest_of(const S* x, int64_t n, T than) {
  Lanes<T> most = Lanes<T>::all(than);
  by_sixteen(n, [&](int64_t i, auto count) { most = most.or_greater(load_some<T>(x + i, count, than)); });
  return greatest(most);
}

// Calls use(lanes) for x[0..n), sixteen at a time. Lanes beyond the end, and the element `but` if it is inside, are -inf.
template <class T, class S, class F> GRADFUSED_MATH void for_others(const S* x, int64_t n, int64_t but, F use) {
  const int64_t full = n / kAbreast * kAbreast;
  const bool inside = but >= 0 && but < full;
  const int64_t hole = inside ? but / kAbreast * kAbreast : full;
  for (int64_t i = 0; i < hole; i += kAbreast) use(load<T>(x + i));
  if (inside) {
    T some[kAbreast];
    load<T>(x + hole).spill(some);
    some[but - hole] = T(-INFINITY);
    use(Lanes<T>::of(some));
    for (int64_t i = hole + kAbreast; i < full; i += kAbreast) use(load<T>(x + i));
  }
  if (full == n) return;
  T some[kAbreast];
  for (int k = 0; k < kAbreast; ++k) some[k] = full + k < n && full + k != but ? T(widen(x[full + k])) : T(-INFINITY);
  use(Lanes<T>::of(some));
}

// others, squares += the sums of e and e^2, e = exp(x - greatest), over all elements but one.
template <class T, class S> void add_exponentials(const S* x, int64_t n, int64_t but, T greatest, double& others, double& squares) {
  const Lanes<T> shift = Lanes<T>::all(greatest);
  Lanes<T> sum = Lanes<T>::all(0), square = sum;
  for_others<T>(x, n, but, [&](const Lanes<T>& v) {
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

template <class S> void measure_row(const Problem& p, const RowResults& to, int64_t row) {
  using T = Wide<S>;
  Saved<T>& saved = saved_of<T>(p, row);
  if (!p.counts(row)) {
    saved = {};
    return put_row<T>(to, row, 0, 0, 0);
  }
  const S* x = row_of<S>(p, row);
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t y = p.target[row];
  T most = lowest(T()), origin = 0;
  double others = 0, squares = 0, weighted = 0;
  for (int64_t at = 0; at < p.classes; at += kColumns) {
    const int64_t n = smaller(kColumns, p.classes - at);
    const T greatest = greatest_of<T>(x + at, n, most);
    if (at == 0) origin = greatest;
    if (at && greatest > most) {
      const double shrink = double(exp_one(most - greatest));
      others *= shrink;
      squares *= shrink * shrink;
    }
    most = greatest;
    add_exponentials(x + at, n, y - at, most, others, squares);
    if (p.smoothing > 0) weighted += weighted_sum(x + at, weight ? weight + at : nullptr, n, origin);
  }
  saved = {most, T(others), T(squares)};
  finish_row(p, to, row, T(widen(x[y])), own_of(p, x, row), weighted, origin);
}

// sums <- or += a row's gradient, right for all classes but its own. Gradients are summed, not probabilities: where gradients are much smaller,
// subtracting the target distribution from summed probabilities would leave the rounding errors of large sums.
template <bool kFirst, class T, class S> void add_gradients(const S* x, int64_t n, T greatest, T inverse, T share, T* __restrict sums) {
  const Lanes<T> shift = Lanes<T>::all(greatest), scale = Lanes<T>::all(inverse), less = Lanes<T>::all(share);
  by_sixteen(n, [&](int64_t i, auto count) {
    const Lanes<T> g = (load_some<T>(x + i, count, greatest) - shift).exp() * scale - less;
    store_some(kFirst ? g : load_some<T>(sums + i, count, T(0)) + g, sums + i, count);
  });
}

template <class S> double accumulate_rows(const Problem& p, const int64_t* rows, int64_t count, Wide<S>* sums) {
  using T = Wide<S>;
  const T share = T(p.share());
  double of_own = 0;
  for (int64_t k = 0; k < count; ++k) {
    const S* x = row_of<S>(p, rows[k]);
    const Saved<T>& saved = saved_of<T>(p, rows[k]);
    const Own own = own_of(p, x, rows[k]);
    const T inverse = T(1 / own.sum);
    of_own += own.gradient;
    k ? add_gradients<false>(x, p.classes, saved.greatest, inverse, share, sums)
      : add_gradients<true>(x, p.classes, saved.greatest, inverse, share, sums);
  }
  return of_own;
}

// The norm of a row's logit gradient. Without label smoothing the forward has summed its squares.
template <class S> double row_norm(const Problem& p, int64_t row) {
  using T = Wide<S>;
  const S* x = row_of<S>(p, row);
  const int64_t y = p.target[row];
  const Saved<T>& saved = saved_of<T>(p, row);
  const Own own = own_of(p, x, row);
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
  by_sixteen(n, [&](int64_t i, auto count) {
    Lanes<T> g = (load_some<T>(x + i, count, line.greatest) - shift).exp() * slope + constant;
    if constexpr (kWeight) g = g + by_weight * load_some<T>(weight + i, count, T(0));
    if constexpr (kMean) g = g + by_mean * load_some<T>(mean + i, count, T(0));
    store_some(g, to + i, count);
  });
}

template <class S> void write_row(const Problem& p, const GradientOut& gradient, const Delta& delta, int64_t row) {
  using T = Wide<S>;
  S* to = reinterpret_cast<S*>(gradient.out) + row * p.classes;
  if (!p.counts(row)) {
    memset(static_cast<void*>(to), 0, size_t(p.classes) * sizeof(S));
    return;
  }
  const S* x = row_of<S>(p, row);
  const int64_t y = p.target[row];
  const Saved<T>& saved = saved_of<T>(p, row);
  const Own own = own_of(p, x, row);
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

void forward(const Problem& p, const RowResults& to, int64_t begin, int64_t end) {
  in_dtype(p, [&](auto s) {
    for (int64_t row = begin; row < end; ++row) measure_row<decltype(s)>(p, to, row);
  });
}

double accumulate(const Problem& p, const int64_t* rows, int64_t count, void* sums) {
  return in_dtype(p, [&](auto s) {
    using S = decltype(s);
    return accumulate_rows<S>(p, rows, count, static_cast<Wide<S>*>(sums));
  });
}

// The sum of (scale * mean)^2.
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

// Two runs: adding the element `but` and subtracting it again would lose what is small beside it.
template <class T> double squares_without(const T* mean, int64_t n, T scale, int64_t but) {
  return squares_of(mean, but, scale) + squares_of(mean + but + 1, n - but - 1, scale);
}

double squares(const Problem& p, const void* mean, double scale, int64_t but) {
  return p.dtype == DType::float64 ? squares_without(static_cast<const double*>(mean), p.classes, scale, but)
                                   : squares_without(static_cast<const float*>(mean), p.classes, float(scale), but);
}

double norm(const Problem& p, int64_t row) {
  return in_dtype(p, [&](auto s) { return row_norm<decltype(s)>(p, row); });
}

void write(const Problem& p, const GradientOut& gradient, const Delta& delta, int64_t row) {
  in_dtype(p, [&](auto s) { write_row<decltype(s)>(p, gradient, delta, row); });
}

}  // namespace

const RowKernels& GRADFUSED_NAME(row_kernels_, GRADFUSED_ISA)() {
  static constexpr RowKernels kernels = {forward, accumulate, squares, norm, write};
  return kernels;
}

}  // namespace gradfused::lpg
