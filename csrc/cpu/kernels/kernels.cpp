// The kernels of one instruction set. This file is compiled once for each with GRADFUSED_ISA naming it, and runs only where the
// machine has it; nothing here but kernels_<isa>() is visible outside.
//
// A chunk is walked in blocks that fit the L1 cache. Usually a block's statistics are taken first and one loop does the rest. Where
// something must be known of a whole unit in between (a mean of what the rule makes of it), the stages are loops of their own.
#include "cpu/kernels.h"

#include "cpu/noise_run.h"
#include "cpu/reduce.h"
#include "cpu/stream.h"
#include "math/adam.h"
#include "math/sgd.h"
#include "math/transforms.h"

namespace gradfused::cpu {
namespace {

enum Buffer { kRaw, kGrad, kNoise, kParam, kState };

template <class T> T* buffer(char* scratch, int which) { return reinterpret_cast<T*>(scratch) + which * kUnitMax; }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A block: elements [begin, begin + count) of a row as whole units of one length, or as a piece of a long one.
struct Block {
  int64_t begin, count;
  int64_t units, length;  // within the block
  int64_t unit0;          // the first one's place in Job's arrays
};

// What the kernels of one chunk look at.
struct Place {
  const Job& job;
  const int64_t index;
  const Chunk& chunk = job.chunks[index];
  const Row& row = job.rows[chunk.row];
  const Hyper& hyper = job.hypers[row.group];
  const RowStep& now = job.steps[chunk.row];
  const bool centre_gradient = row.centre && hyper.centralize_at == Centre::gradient;
  const bool by_unit = hyper.scope == Scope::unit;
  // Statistics of units are wanted here and a unit fits.
  const bool whole_units = row.length <= kUnitMax && (row.centre || by_unit);

  template <class F> void for_each_block(F work) const {
    const int64_t most = whole_units ? (row.length < kBlock ? kBlock / row.length : 1) * row.length : kBlock;
    const int64_t end = chunk.begin + chunk.count;
    for (int64_t begin = chunk.begin; begin < end; begin += most) {
      const int64_t count = smaller(most, end - begin), length = whole_units ? row.length : count;
      work(Block{begin, count, count / length, length, now.unit0 + begin / row.length});
    }
  }
};

// A number for each unit of a block.
template <class T> struct PerUnit {
  T at[kBlock];
};

// means <- stage 1's means; zero where the gradient is not centred.
template <class T> void means_of(const Place& at, const Block& b, const T* g, PerUnit<T>& means) {
  if (!at.centre_gradient) {
    for (int64_t u = 0; u < b.units; ++u) means.at[u] = T(0);
  } else if (at.now.means_known) {
    for (int64_t u = 0; u < b.units; ++u) means.at[u] = T(at.job.unit_mean[b.unit0 + u]);
  } else {
    const T unscale = T(at.job.unscale);
    PerUnit<double> sums;
    reduce_units(g, b.length, b.units, sums.at, [unscale](int64_t, T v) { return v * unscale; });
    for (int64_t u = 0; u < b.units; ++u) means.at[u] = T(sums.at[u] / double(b.length));
  }
}

// squares <- each unit's sum of squares of the centred gradient.
template <class T> void squares_of(const Place& at, const Block& b, const T* g, const PerUnit<T>& means, PerUnit<double>& squares) {
  const T unscale = T(at.job.unscale);
  reduce_squares(g, b.length, b.units, squares.at, [&means, unscale](int64_t u, T v) { return math::centred(v, unscale, means.at[u]); });
}

template <class T> void weight_squares_of(const Block& b, const T* p, PerUnit<double>& squares) {
  reduce_squares(p, b.length, b.units, squares.at, [](int64_t, T v) { return v; });
}

inline double total(const PerUnit<double>& values, int64_t units) {
  double sum = 0;
  for (int64_t u = 0; u < units; ++u) sum += values.at[u];
  return sum;
}

template <class T> void sum_chunk(const Place& at, char* scratch) {
  const T unscale = T(at.job.unscale);
  double sum = 0;
  at.for_each_block([&](const Block& b) {
    sum += reduce(open(at.row.grad, b.begin, b.count, buffer<T>(scratch, kRaw)), b.count, [unscale](T v) { return v * unscale; });
  });
  at.job.chunk_sum[at.index] = sum;
}

template <class T> void squares_chunk(const Place& at, char* scratch) {
  const bool weights = at.hyper.agc && at.row.length > kUnitMax;
  double sum = 0, weight_sum = 0;
  at.for_each_block([&](const Block& b) {
    const T* g = open(at.row.grad, b.begin, b.count, buffer<T>(scratch, kRaw));
    PerUnit<T> means;
    PerUnit<double> squares;
    means_of(at, b, g, means);
    if (at.centre_gradient && !at.now.means_known) {
      for (int64_t u = 0; u < b.units; ++u) at.job.unit_mean[b.unit0 + u] = double(means.at[u]);
    }
    squares_of(at, b, g, means, squares);
    sum += total(squares, b.units);
    if (!weights) return;
    weight_squares_of(b, open(at.row.param, b.begin, b.count, buffer<T>(scratch, kParam)), squares);
    weight_sum += total(squares, b.units);
  });
  at.job.chunk_sq[at.index] = sum;
  if (weights) at.job.chunk_weight_sq[at.index] = weight_sum;
}

// Stages 0 to 6. g may not overlap to.
template <bool kNoisy, bool kDecayed, class T>
void transform(const Block& b, const T* __restrict g, const float* __restrict noise, const T* __restrict p, T* __restrict to,
               const PerUnit<T>& means, const PerUnit<T>& factors, math::Transform<T> t) {
  for (int64_t u = 0; u < b.units; ++u) {
    t.mean = means.at[u];
    t.factor = factors.at[u];
    for (int64_t i = u * b.length; i < (u + 1) * b.length; ++i) {
      T x = math::perturbed(g[i], t);
      if (kNoisy) x = x + t.sigma * T(noise[i]);
      x = x * t.sign;
      if (kDecayed) x = x + t.decay * p[i];
      to[i] = x;
    }
  }
}

// One element's state in registers.
template <class R, class T> struct Register {
  T s[kMaxStates];
  Register(const T* s0, const T* s1, const T* s2, int64_t i)
      : s{R::states > 0 ? s0[i] : T(0), R::states > 1 ? s1[i] : T(0), R::states > 2 ? s2[i] : T(0)} {}
  void store(T* s0, T* s1, T* s2, int64_t i) const {
    if (R::states > 0) s0[i] = s[0];
    if (R::states > 1) s1[i] = s[1];
    if (R::states > 2) s2[i] = s[2];
  }
};

// g <- the direction the rule takes. The states move unless this is a rehearsal.
template <class R, bool kRehearse, class T>
void direct(T* __restrict g, T* __restrict s0, T* __restrict s1, T* __restrict s2, int64_t n,
            const typename R::template Coef<T> c) {
  for (int64_t i = 0; i < n; ++i) {
    Register<R, T> state(s0, s1, s2, i);
    g[i] = R::direction(g[i], state.s, c);
    if (!kRehearse) state.store(s0, s1, s2, i);
  }
}

template <class T> void descend(T* __restrict p, const T* __restrict d, int64_t n, T shrink, T step) {
  for (int64_t i = 0; i < n; ++i) p[i] = p[i] * shrink - step * d[i];
}

// What happens to a gradient before the rule sees it.
enum class Before { nothing, perturbed, perturbed_and_decayed };

// transform(), direct() and descend() for a few neighbours from element i on.
template <class R, Before kBefore, int kCount, class S, class T>
GRADFUSED_MATH void step_few(const S* g, S* p, S* s0, S* s1, S* s2, int64_t i, const math::Transform<T>& t,
                             const typename R::template Coef<T>& c) {
  T gradient[kCount], weight[kCount], state[kMaxStates][kCount];
  widen_few(g + i, gradient);
  widen_few(p + i, weight);
  if (R::states > 0) widen_few(s0 + i, state[0]);
  if (R::states > 1) widen_few(s1 + i, state[1]);
  if (R::states > 2) widen_few(s2 + i, state[2]);
  // A loop over a register's lanes is vectorised; GCC 12 would unroll it first.
#pragma GCC unroll 1
  for (int k = 0; k < kCount; ++k) {
    T x = gradient[k], s[kMaxStates] = {R::states > 0 ? state[0][k] : T(0), R::states > 1 ? state[1][k] : T(0),
                                        R::states > 2 ? state[2][k] : T(0)};
    if (kBefore != Before::nothing) x = math::perturbed(x, t) * t.sign;
    if (kBefore == Before::perturbed_and_decayed) x = x + t.decay * weight[k];
    weight[k] = weight[k] * c.shrink - c.step * R::direction(x, s, c);
    for (int j = 0; j < R::states; ++j) state[j][k] = s[j];
  }
  narrow_few(weight, p + i);
  if (R::states > 0) narrow_few(state[0], s0 + i);
  if (R::states > 1) narrow_few(state[1], s1 + i);
  if (R::states > 2) narrow_few(state[2], s2 + i);
}

// All of a step in one loop: all streams move together, which memory likes best. Not inlined, where __restrict would no longer hold.
template <class R, Before kBefore, class S, class T>
__attribute__((noinline)) void step_units(const Block& b, const S* __restrict g, S* __restrict p, S* __restrict s0, S* __restrict s1,
                                          S* __restrict s2, const PerUnit<T>& means, const PerUnit<T>& factors,
                                          math::Transform<T> t, const typename R::template Coef<T> c) {
  for (int64_t u = 0; u < b.units; ++u) {
    t.mean = means.at[u];
    t.factor = factors.at[u];
    int64_t i = u * b.length;
    const int64_t end = i + b.length;
    for (; i + kFew<S> <= end; i += kFew<S>) step_few<R, kBefore, kFew<S>>(g, p, s0, s1, s2, i, t, c);
    for (; i < end; ++i) step_few<R, kBefore, 1>(g, p, s0, s1, s2, i, t, c);
  }
}

// One chunk's walk through a step, with rule R in type T.
template <class R, class T> class Stepper {
 public:
  Stepper(const Place& at, char* scratch)
      : at_(at), scratch_(scratch), coef_(R::template coef<T>(at.hyper, at.now.step, at.row.first)) {
    static_assert(R::states <= 3, "direct() names its states");
    t_.unscale = T(at.job.unscale);
    t_.mean = T(0);
    t_.factor = T(1);
    t_.hi = T(at.hyper.clip_value);
    t_.sigma = T(at.now.sigma);
    t_.sign = T(at.hyper.sign);
    t_.decay = at.hyper.decoupled ? T(0) : T(at.hyper.weight_decay);
  }

  void apply() {
    step_chunk();
    if (at_.by_unit && !at_.now.norms_known) at_.job.chunk_sq[at_.index] = squares_;
  }

  // The sum of what centre() would take the mean of, for units whose mean takes several chunks.
  void rehearse() {
    double sum = 0;
    at_.for_each_block([&](const Block& b) {
      open_block(b);
      measure(b);
      prepare(b);
      if (at_.hyper.centralize_at == Centre::update) direct<R, true>(g_, s_[0], s_[1], s_[2], b.count, coef_);
      sum += reduce(g_, b.count, [](T v) { return v; });
    });
    at_.job.chunk_sum[at_.index] = sum;
  }

 private:
  void open_block(const Block& b) {
    raw_ = open(at_.row.grad, b.begin, b.count, buffer<T>(scratch_, kRaw));
    p_ = open(at_.row.param, b.begin, b.count, buffer<T>(scratch_, kParam));
    for (int k = 0; k < R::states; ++k) s_[k] = open(at_.row.state[k], b.begin, b.count, buffer<T>(scratch_, kState + k));
  }

  void close_block(const Block& b) {
    close(at_.row.param, b.begin, b.count, p_);
    for (int k = 0; k < R::states; ++k) close(at_.row.state[k], b.begin, b.count, s_[k]);
  }

  void measure(const Block& b) {
    means_of(at_, b, raw_, means_);
    set_factors(b);
  }

  template <class S> void together(const Block& b, const S* g, S* p, S* s0, S* s1, S* s2) {
    if (t_.decay != T(0)) return step_units<R, Before::perturbed_and_decayed>(b, g, p, s0, s1, s2, means_, factors_, t_, coef_);
    if (!untouched()) return step_units<R, Before::perturbed>(b, g, p, s0, s1, s2, means_, factors_, t_, coef_);
    step_units<R, Before::nothing>(b, g, p, s0, s1, s2, means_, factors_, t_, coef_);
  }

  // Perturbing would leave every gradient as it is.
  bool untouched() const {
    const bool by_one = at_.now.factor == 1.0 && t_.unscale == T(1) && t_.sign == T(1);
    return by_one && !at_.by_unit && !at_.centre_gradient && t_.hi == T(INFINITY);
  }

  // Every operand is a plain array of this type.
  bool stored_as(DType dtype) const {
    const auto is = [dtype](const Operand& x) { return x.dims == 0 && x.dtype == dtype; };
    bool all = is(at_.row.param) && is(at_.row.grad);
    for (int k = 0; k < R::states; ++k) all = all && is(at_.row.state[k]);
    return all;
  }

  void step_chunk() {
    // The loop's start-up is not worth it for short units.
    const bool short_units = at_.whole_units && at_.row.length <= kShortUnit;
    const bool in_one_loop = t_.sigma == T(0) && (!at_.row.centre || at_.centre_gradient) && !short_units;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (in_one_loop && stored_as(DType::bfloat16)) return step_stored<BFloat16>();
      if (in_one_loop && kFew<Half> > 1 && stored_as(DType::float16)) return step_stored<Half>();
    }
    at_.for_each_block([&](const Block& b) {
      open_block(b);
      measure(b);
      in_one_loop ? together(b, raw_, p_, s_[0], s_[1], s_[2]) : stage_by_stage(b);
      close_block(b);
    });
  }

  // 16-bit arrays are widened in the loop: through buffers, each operand would be a stream alone.
  template <class S> void step_stored() {
    const auto array = [](const Operand& x, int64_t begin) { return reinterpret_cast<S*>(x.data) + begin; };
    const bool by_unit = at_.by_unit && !at_.now.norms_known;
    at_.for_each_block([&](const Block& b) {
      if (by_unit || (at_.centre_gradient && !at_.now.means_known)) {
        raw_ = open(at_.row.grad, b.begin, b.count, buffer<T>(scratch_, kRaw));
      }
      if (by_unit && at_.hyper.agc) p_ = open(at_.row.param, b.begin, b.count, buffer<T>(scratch_, kParam));
      measure(b);
      S* s[kMaxStates] = {};
      for (int k = 0; k < R::states; ++k) s[k] = array(at_.row.state[k], b.begin);
      together<S>(b, array(at_.row.grad, b.begin), array(at_.row.param, b.begin), s[0], s[1], s[2]);
    });
  }

  void stage_by_stage(const Block& b) {
    prepare(b);
    if (at_.row.centre && at_.hyper.centralize_at == Centre::decayed) centre(b);
    direct<R, false>(g_, s_[0], s_[1], s_[2], b.count, coef_);
    if (at_.row.centre && at_.hyper.centralize_at == Centre::update) centre(b);
    descend(p_, g_, b.count, coef_.shrink, coef_.step);
  }

  // g_ <- the gradient as the rule sees it.
  void prepare(const Block& b) {
    const float* noise = nullptr;
    if (t_.sigma != T(0)) noise = draw(b);
    const bool decayed = t_.decay != T(0);
    if (noise && decayed) return transform<true, true>(b, raw_, noise, p_, g_, means_, factors_, t_);
    if (noise) return transform<true, false>(b, raw_, noise, p_, g_, means_, factors_, t_);
    if (decayed) return transform<false, true>(b, raw_, noise, p_, g_, means_, factors_, t_);
    transform<false, false>(b, raw_, noise, p_, g_, means_, factors_, t_);
  }

  const float* draw(const Block& b) {
    float* noise = reinterpret_cast<float*>(buffer<T>(scratch_, kNoise));
    noise_run(at_.hyper.seed, b.begin, b.count, at_.row.parameter, uint32_t(at_.now.step - 1), noise);
    return noise;
  }

  void set_factors(const Block& b) {
    if (!at_.by_unit) {
      for (int64_t u = 0; u < b.units; ++u) factors_.at[u] = T(at_.now.factor);
      return;
    }
    PerUnit<double> squares, weights;
    if (at_.now.norms_known) {  // a piece of one long unit
      squares.at[0] = at_.job.unit_sq[b.unit0];
      weights.at[0] = at_.job.unit_weight_sq[b.unit0];
    } else {
      squares_of(at_, b, raw_, means_, squares);
      if (at_.hyper.agc) weight_squares_of(b, p_, weights);
    }
    for (int64_t u = 0; u < b.units; ++u) {
      squares_ += squares.at[u];
      const double norm = sqrt(squares.at[u]);
      factors_.at[u] = T(at_.hyper.agc ? math::agc_factor(at_.hyper.radius, sqrt(weights.at[u]), norm)
                                       : math::perturb_factor(at_.hyper.perturb, norm));
    }
  }

  void centre(const Block& b) {
    PerUnit<double> sums;
    const bool known = at_.now.directions_known;
    if (!known) reduce_units(g_, b.length, b.units, sums.at, [](int64_t, T v) { return v; });
    for (int64_t u = 0; u < b.units; ++u) {
      const T mean = T(known ? at_.job.unit_direction[b.unit0 + u] : sums.at[u] / double(b.length));
      for (int64_t i = u * b.length; i < (u + 1) * b.length; ++i) g_[i] = g_[i] - mean;
    }
  }

  const Place& at_;
  char* const scratch_;
  const typename R::template Coef<T> coef_;
  math::Transform<T> t_;
  PerUnit<T> means_, factors_;
  T* const g_ = buffer<T>(scratch_, kGrad);
  T *raw_ = nullptr, *p_ = nullptr, *s_[kMaxStates] = {};
  double squares_ = 0;
};

// The type to compute in: float64 for float64 parameters, else float32.
template <class F> void in_compute_type(const Row& row, F run) {
  row.param.dtype == DType::float64 ? run(double{}) : run(float{});
}

template <class F> void with_rule(Rule rule, F run) {
  switch (rule) {
#define GRADFUSED_RULE(name, type, family) \
  case Rule::name: return run(math::type{});
#include "rules.def"
#undef GRADFUSED_RULE
    case Rule::count: return;
  }
}

void sum(const Job& job, int64_t index, char* scratch) {
  const Place at{job, index};
  in_compute_type(at.row, [&](auto t) { sum_chunk<decltype(t)>(at, scratch); });
}

void squares(const Job& job, int64_t index, char* scratch) {
  const Place at{job, index};
  in_compute_type(at.row, [&](auto t) { squares_chunk<decltype(t)>(at, scratch); });
}

void rehearse(const Job& job, int64_t index, char* scratch) {
  const Place at{job, index};
  with_rule(at.row.rule, [&](auto rule) {
    in_compute_type(at.row, [&](auto t) { Stepper<decltype(rule), decltype(t)>(at, scratch).rehearse(); });
  });
}

void apply(const Job& job, int64_t index, char* scratch) {
  const Place at{job, index};
  with_rule(at.row.rule, [&](auto rule) {
    in_compute_type(at.row, [&](auto t) { Stepper<decltype(rule), decltype(t)>(at, scratch).apply(); });
  });
}

// 4 reads and 3 writes when called with AdamW's streams. Adding `nothing`, a zero the compiler does not know, keeps values as they are.
void roof(float* const* written, int writes, const float* const* read, int reads, int64_t begin, int64_t end, float nothing) {
  if (writes == 3 && reads == 1) {
    float *__restrict a = written[0], *__restrict b = written[1], *__restrict c = written[2];
    const float* __restrict g = read[0];
    for (int64_t i = begin; i < end; ++i) {
      const float x = g[i] * nothing;
      a[i] += x;
      b[i] += x;
      c[i] += x;
    }
    return;
  }
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t last = smaller(end, block + kBlock);
    for (int w = 0; w < writes; ++w) {
      float* __restrict a = written[w];
      const float* __restrict g = reads ? read[w % reads] : a;
      for (int64_t i = block; i < last; ++i) a[i] += g[i] * nothing;
    }
    for (int r = writes; r < reads; ++r) {
      float* __restrict a = written[0];
      const float* __restrict g = read[r];
      for (int64_t i = block; i < last; ++i) a[i] += g[i] * nothing;
    }
  }
}

}  // namespace

#define GRADFUSED_PASTE(a, b) a##b
#define GRADFUSED_NAME(a, b) GRADFUSED_PASTE(a, b)
#define GRADFUSED_STRING(x) #x
#define GRADFUSED_TEXT(x) GRADFUSED_STRING(x)

const Kernels& GRADFUSED_NAME(kernels_, GRADFUSED_ISA)() {
  static constexpr Kernels kernels = {GRADFUSED_TEXT(GRADFUSED_ISA), sum, squares, rehearse, apply, roof,
                                      GRADFUSED_NAME(lpg_kernels_, GRADFUSED_ISA), GRADFUSED_NAME(lpg_column_kernels_, GRADFUSED_ISA)};
  return kernels;
}

}  // namespace gradfused::cpu
