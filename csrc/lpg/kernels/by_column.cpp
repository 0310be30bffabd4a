// LPG cross-entropy's kernels for few classes, and for dense predictions, whose neighbours in memory are samples: a lane is a row, and the
// classes come one after another. Compiled like kernels.cpp.
#include "lpg/rows.h"

namespace gradfused::cpu {
namespace {

// Up to sixteen rows that follow each other in memory at one distance.
template <class S> class Rows {
 public:
  using T = typename WideOf<S>::Type;
  const int64_t first;
  const int count;

  Rows(const LpgProblem& p, int64_t at, int64_t end)
      : first(at),
        count(int(smaller(smaller<int64_t>(end - at, kAbreast), p.inner - at % p.inner))),
        p_(p),
        offset_(at / p.inner * p.outer_stride + at % p.inner * p.inner_stride) {
    T own[kAbreast];
    for (int k = 0; k < kAbreast; ++k) own[k] = k < count && p.counts(at + k) ? T(p.target[at + k]) : T(-1);
    own_ = Lanes<T>::of(own);
  }

  static T wide() { return T(); }
  // x in the lanes that count, y in the others.
  GRADFUSED_MATH Lanes<T> kept(const Lanes<T>& x, const Lanes<T>& y) const { return own_.equal(T(-1), y, x); }
  bool counts(int k) const { return p_.counts(first + k); }
  int64_t own(int k) const { return p_.target[first + k]; }

  // Class j's logits; 0 in lanes without a row.
  GRADFUSED_MATH Lanes<T> logits(int64_t j) const {
    const S* from = reinterpret_cast<const S*>(p_.logits) + offset_ + j * p_.class_stride;
    if (p_.inner_stride == 1 && count == kAbreast) return load<T>(from);
    T some[kAbreast];
    for (int k = 0; k < kAbreast; ++k) some[k] = k < count ? T(widen(from[k * p_.inner_stride])) : T(0);
    return Lanes<T>::of(some);
  }

  // Class j's gradients, into memory laid out as the logits are, or densely so.
  GRADFUSED_MATH void put_gradients(char* out, int64_t j, const Lanes<T>& x) const {
    const bool dense = p_.inner_stride == 1 && p_.inner > 1;
    const int64_t step = dense ? 1 : p_.classes;
    const int64_t at = dense ? first / p_.inner * p_.classes * p_.inner + first % p_.inner + j * p_.inner : first * p_.classes + j;
    S* to = reinterpret_cast<S*>(out) + at;
    if (dense && count == kAbreast) return store(x, to);
    T some[kAbreast];
    x.spill(some);
    for (int k = 0; k < count; ++k) put(some[k], to[k * step]);
  }

  // a in the lanes whose class is j, b in the others.
  GRADFUSED_MATH Lanes<T> choose(int64_t j, const Lanes<T>& a, const Lanes<T>& b) const { return own_.equal(T(j), a, b); }

  // What the forward saved, by name.
  GRADFUSED_MATH Lanes<T> greatest() const {
    T some[kAbreast];
    for (int k = 0; k < kAbreast; ++k) some[k] = k < count ? saved_of<T>(p_, first + k).greatest : T(0);
    return Lanes<T>::of(some);
  }
  Lanes<T> own_logits() const {
    T some[kAbreast] = {};
    const S* from = reinterpret_cast<const S*>(p_.logits) + offset_;
    for (int k = 0; k < count; ++k) {
      if (counts(k)) some[k] = T(widen(from[k * p_.inner_stride + own(k) * p_.class_stride]));
    }
    return Lanes<T>::of(some);
  }

 private:
  const LpgProblem& p_;
  const int64_t offset_;
  Lanes<T> own_;
};

template <class S> void measure_rows(const LpgProblem& p, const LpgRows& to, const Rows<S>& rows) {
  using T = typename WideOf<S>::Type;
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

// Each lane's Own; those without a row that counts have sum 1.
template <class S, class F> void for_own(const LpgProblem& p, const Rows<S>& rows, const Lanes<typename WideOf<S>::Type>& greatest, F use) {
  using T = typename WideOf<S>::Type;
  T e[kAbreast];
  (rows.own_logits() - greatest).exp().spill(e);
  for (int k = 0; k < rows.count; ++k) {
    if (rows.counts(k)) use(k, Own(p, saved_of<T>(p, rows.first + k), e[k]));
  }
}

// Classes whose gradients are kept for sixteen rows until they are added up by row.
constexpr int64_t kKept = 64;

template <class S> void add_rows(const LpgProblem& p, const Rows<S>& rows, typename WideOf<S>::Type* sums) {
  using T = typename WideOf<S>::Type;
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
      T* __restrict to = sums + rows.own(k) * p.classes + begin;
      for (int64_t j = 0; j < n; ++j) to[j] += kept[j][k];
    }
  }
}

// The norm of each lane's gradient.
template <class S>
void norms_of(const LpgProblem& p, const Rows<S>& rows, const Lanes<typename WideOf<S>::Type>& greatest, double (&norm)[kAbreast]) {
  using T = typename WideOf<S>::Type;
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

template <class S> void write_rows(const LpgProblem& p, const LpgGradient& gradient, const LpgColumns& how, const Rows<S>& rows) {
  using T = typename WideOf<S>::Type;
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
  const Lanes<T> weights = Lanes<T>::of(by_weight), at_own = Lanes<T>::of(own), zero = Lanes<T>::all(0);
  for (int64_t j = 0; j < p.classes; ++j) {
    Lanes<T> g = (rows.logits(j) - greatest).exp() * slopes + constants;
    if (weight) g = g + weights * Lanes<T>::all(weight[j]);
    if (deltas) {
      T d[kAbreast];
      for (int k = 0; k < kAbreast; ++k) d[k] = deltas[j * p.classes + of[k]];
      g = g + by * Lanes<T>::of(d);
    }
    rows.put_gradients(gradient.out, j, rows.kept(rows.choose(j, at_own, g), zero));
  }
}

template <class F> void for_rows(const LpgProblem& p, int64_t begin, int64_t end, F work) {
  in_dtype(p, [&](auto s) {
    for (int64_t at = begin; at < end;) {
      const Rows<decltype(s)> rows(p, at, end);
      work(rows);
      at += rows.count;
    }
  });
}

void measure(const LpgProblem& p, const LpgRows& to, int64_t begin, int64_t end) {
  for_rows(p, begin, end, [&](const auto& rows) { measure_rows(p, to, rows); });
}

void add(const LpgProblem& p, int64_t begin, int64_t end, void* sums) {
  const size_t item = p.dtype == DType::float64 ? sizeof(double) : sizeof(float);
  memset(sums, 0, size_t(p.classes * p.classes) * item);
  for_rows(p, begin, end, [&](const auto& rows) { add_rows(p, rows, static_cast<decltype(rows.wide())*>(sums)); });
}

void write(const LpgProblem& p, const LpgGradient& gradient, const LpgColumns& how, int64_t begin, int64_t end) {
  for_rows(p, begin, end, [&](const auto& rows) { write_rows(p, gradient, how, rows); });
}

}  // namespace

#define GRADFUSED_PASTE(a, b) a##b
#define GRADFUSED_NAME(a, b) GRADFUSED_PASTE(a, b)

const LpgColumnKernels& GRADFUSED_NAME(lpg_column_kernels_, GRADFUSED_ISA)() {
  static constexpr LpgColumnKernels kernels = {measure, add, write};
  return kernels;
}

}  // namespace gradfused::cpu
