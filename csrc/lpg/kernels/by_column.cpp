// LPG cross-entropy's kernels whose lanes are rows, compiled once for each instruction set: classes are walked one after another.
#include "lpg/rows.h"

namespace gradfused::lpg {
namespace {

// Up to sixteen rows that follow each other in memory at one distance, one in each lane.
template <class S> class RowLanes {
 public:
  using T = Wide<S>;
  const int64_t first;
  const int count;

  RowLanes(const Problem& p, int64_t begin, int64_t end)
      : first(begin),
        count(int(smaller(smaller<int64_t>(end - begin, kAbreast), p.inner - begin % p.inner))),
        p_(p),
        from_(reinterpret_cast<const S*>(p.logits) + begin / p.inner * p.outer_stride + begin % p.inner * p.inner_stride) {
    T own_class[kAbreast];
    for (int k = 0; k < kAbreast; ++k) own_class[k] = k < count && counts(k) ? T(own(k)) : T(-1);
    own_class_ = Lanes<T>::of(own_class);
  }

  bool counts(int k) const { return p_.counts(first + k); }
  int64_t own(int k) const { return p_.target[first + k]; }

  // a in the lanes whose class is j, b in the others.
  GRADFUSED_MATH Lanes<T> choose(int64_t j, const Lanes<T>& a, const Lanes<T>& b) const { return own_class_.equal(T(j), a, b); }

  // value(k) in each lane with a row, 0 in the others.
  template <class F> GRADFUSED_MATH Lanes<T> gather(F value) const {
    T some[kAbreast];
    for (int k = 0; k < kAbreast; ++k) some[k] = k < count ? value(k) : T(0);
    return Lanes<T>::of(some);
  }

  // The logits of class j; 0 in lanes without a row.
  GRADFUSED_MATH Lanes<T> logits(int64_t j) const {
    const S* from = from_ + j * p_.class_stride;
    if (p_.inner_stride == 1 && count == kAbreast) return load<T>(from);
    return gather([&](int k) { return T(widen(from[k * p_.inner_stride])); });
  }
  Lanes<T> own_logits() const {
    return gather([&](int k) { return counts(k) ? T(widen(from_[k * p_.inner_stride + own(k) * p_.class_stride])) : T(0); });
  }
  GRADFUSED_MATH Lanes<T> greatest() const {
    return gather([&](int k) { return saved_of<T>(p_, first + k).greatest; });
  }

  // Writes the gradients of class j, 0 for ignored rows, in the layout of the logits without gaps.
  GRADFUSED_MATH void put_gradients(char* out, int64_t j, const Lanes<T>& gradients) const {
    const Lanes<T> x = own_class_.equal(T(-1), Lanes<T>::all(0), gradients);
    const bool dense = p_.inner_stride == 1 && p_.inner > 1;
    const int64_t step = dense ? 1 : p_.classes;
    const int64_t place = dense ? first / p_.inner * p_.classes * p_.inner + first % p_.inner + j * p_.inner : first * p_.classes + j;
    S* to = reinterpret_cast<S*>(out) + place;
    if (dense && count == kAbreast) return store(x, to);
    T some[kAbreast];
    x.spill(some);
    for (int k = 0; k < count; ++k) put(some[k], to[k * step]);
  }

 private:
  const Problem& p_;
  const S* const from_;
  Lanes<T> own_class_;
};

template <class S> void measure_rows(const Problem& p, const RowResults& to, const RowLanes<S>& rows) {
  using T = Wide<S>;
  const T* weight = static_cast<const T*>(p.weight);
  Lanes<T> most = Lanes<T>::all(lowest(T()));
  for (int64_t j = 0; j < p.classes; ++j) most = most.or_greater(rows.logits(j));
  const Lanes<T> none = Lanes<T>::all(0);
  Lanes<T> others = none, squares = none, weighted = none;
  for (int64_t j = 0; j < p.classes; ++j) {
    const Lanes<T> d = rows.logits(j) - most, e = rows.choose(j, none, d.exp());
    others = others + e;
    squares = squares + e * e;
    if (p.smoothing > 0) weighted = weighted + (weight ? d * Lanes<T>::all(weight[j]) : d);
  }
  const Lanes<T> logit = rows.own_logits();
  T m[kAbreast], o[kAbreast], q[kAbreast], w[kAbreast], x[kAbreast], e[kAbreast];
  most.spill(m), others.spill(o), squares.spill(q), weighted.spill(w), logit.spill(x), (logit - most).exp().spill(e);
  for (int k = 0; k < rows.count; ++k) {
    const int64_t row = rows.first + k;
    Saved<T>& saved = saved_of<T>(p, row);
    saved = {};
    if (!rows.counts(k)) {
      put_row<T>(to, row, 0, 0, 0);
      continue;
    }
    saved = {m[k], o[k], q[k]};
    finish_row(p, to, row, x[k], Own(p, saved, e[k]), double(w[k]), m[k]);
  }
}

// Calls use(lane, its Own) for each lane whose row counts.
template <class S, class F> void for_own(const Problem& p, const RowLanes<S>& rows, const Lanes<Wide<S>>& greatest, F use) {
  using T = Wide<S>;
  T e[kAbreast];
  (rows.own_logits() - greatest).exp().spill(e);
  for (int k = 0; k < rows.count; ++k) {
    if (rows.counts(k)) use(k, Own(p, saved_of<T>(p, rows.first + k), e[k]));
  }
}

// Classes whose gradients are kept, for sixteen rows, before they are added to the sums of the rows' classes.
constexpr int64_t kKept = 64;

template <class S> void add_rows(const Problem& p, const RowLanes<S>& rows, void* sums) {
  using T = Wide<S>;
  const Lanes<T> greatest = rows.greatest();
  T scale[kAbreast] = {}, own[kAbreast] = {};
  for_own(p, rows, greatest, [&](int k, const Own& o) {
    scale[k] = T(1 / o.sum);
    own[k] = T(o.gradient);
  });
  const Lanes<T> by = Lanes<T>::of(scale), at_own = Lanes<T>::of(own), share = Lanes<T>::all(T(p.share()));
  T kept[kKept][kAbreast];
  for (int64_t begin = 0; begin < p.classes; begin += kKept) {
    const int64_t n = smaller(kKept, p.classes - begin);
    for (int64_t j = 0; j < n; ++j) {
      rows.choose(begin + j, at_own, (rows.logits(begin + j) - greatest).exp() * by - share).spill(kept[j]);
    }
    for (int k = 0; k < rows.count; ++k) {
      if (!rows.counts(k)) continue;
      T* __restrict to = static_cast<T*>(sums) + rows.own(k) * p.classes + begin;
      for (int64_t j = 0; j < n; ++j) to[j] += kept[j][k];
    }
  }
}

// The norm of each row's logit gradient.
template <class S> void norms_of(const Problem& p, const RowLanes<S>& rows, const Lanes<Wide<S>>& greatest, double (&norm)[kAbreast]) {
  using T = Wide<S>;
  T scale[kAbreast] = {}, squares[kAbreast] = {};
  for_own(p, rows, greatest, [&](int k, const Own& o) {
    scale[k] = T(1 / o.sum);
    squares[k] = T(double(saved_of<T>(p, rows.first + k).squares) / (o.sum * o.sum));
  });
  if (p.smoothing > 0) {
    const Lanes<T> by = Lanes<T>::of(scale), share = Lanes<T>::all(T(p.share()));
    Lanes<T> sum = Lanes<T>::all(0);
    for (int64_t j = 0; j < p.classes; ++j) {
      const Lanes<T> d = rows.choose(j, Lanes<T>::all(0), (rows.logits(j) - greatest).exp() * by - share);
      sum = sum + d * d;
    }
    sum.spill(squares);
  }
  for_own(p, rows, greatest, [&](int k, const Own& o) { norm[k] = sqrt(o.gradient * o.gradient + double(squares[k])); });
}

template <class S> void write_rows(const Problem& p, const GradientOut& gradient, const ColumnDeltas& how, const RowLanes<S>& rows) {
  using T = Wide<S>;
  const Lanes<T> greatest = rows.greatest();
  double norm[kAbreast] = {};
  if (how.bound) norms_of(p, rows, greatest, norm);
  const double b = p.share();
  const T* weight = b > 0 ? static_cast<const T*>(p.weight) : nullptr;
  const T* deltas = static_cast<const T*>(how.deltas);
  T slope[kAbreast] = {}, constant[kAbreast] = {}, by_delta[kAbreast] = {}, by_weight[kAbreast] = {}, own[kAbreast] = {};
  int64_t of[kAbreast] = {};
  for_own(p, rows, greatest, [&](int k, const Own& o) {
    const int64_t row = rows.first + k, y = rows.own(k);
    const double f = gradient.factor[row * gradient.factor_stride], w = weight_of<T>(p, y);
    const double a = how.bound && how.bound[y] != 0 ? w * along(how.bound[y], norm[k]) : 0;
    const double delta = deltas ? w * double(deltas[y * p.classes + y]) : a * o.gradient;
    slope[k] = T(f * (slope_of(p, w) + a) / o.sum);
    constant[k] = T(f * ((weight ? 0 : -b) - a * b));
    by_weight[k] = T(-f * b);
    by_delta[k] = T(f * w);
    own[k] = T(f * (plain_of(p, o, w) + delta));
    of[k] = y;
  });
  const Lanes<T> slopes = Lanes<T>::of(slope), constants = Lanes<T>::of(constant), by = Lanes<T>::of(by_delta);
  const Lanes<T> weights = Lanes<T>::of(by_weight), at_own = Lanes<T>::of(own);
  for (int64_t j = 0; j < p.classes; ++j) {
    Lanes<T> g = (rows.logits(j) - greatest).exp() * slopes + constants;
    if (weight) g = g + weights * Lanes<T>::all(weight[j]);
    if (deltas) {
      T d[kAbreast];
      for (int k = 0; k < kAbreast; ++k) d[k] = deltas[j * p.classes + of[k]];
      g = g + by * Lanes<T>::of(d);
    }
    rows.put_gradients(gradient.out, j, rows.choose(j, at_own, g));
  }
}

template <class F> void for_rows(const Problem& p, int64_t begin, int64_t end, F work) {
  in_dtype(p, [&](auto s) {
    for (int64_t at = begin; at < end;) {
      const RowLanes<decltype(s)> rows(p, at, end);
      work(rows);
      at += rows.count;
    }
  });
}

void measure(const Problem& p, const RowResults& to, int64_t begin, int64_t end) {
  for_rows(p, begin, end, [&](const auto& rows) { measure_rows(p, to, rows); });
}

void add(const Problem& p, int64_t begin, int64_t end, void* sums) {
  const size_t item = p.dtype == DType::float64 ? sizeof(double) : sizeof(float);
  memset(sums, 0, size_t(p.classes * p.classes) * item);
  for_rows(p, begin, end, [&](const auto& rows) { add_rows(p, rows, sums); });
}

void write(const Problem& p, const GradientOut& gradient, const ColumnDeltas& how, int64_t begin, int64_t end) {
  for_rows(p, begin, end, [&](const auto& rows) { write_rows(p, gradient, how, rows); });
}

}  // namespace

const ColumnKernels& GRADFUSED_NAME(column_kernels_, GRADFUSED_ISA)() {
  static constexpr ColumnKernels kernels = {measure, add, write};
  return kernels;
}

}  // namespace gradfused::lpg
