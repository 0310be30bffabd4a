// The kernels of one instruction set. This file is compiled once for each with GRADFUSED_ISA naming it, and runs only where the
// machine has it; nothing here but kernels_<isa>() is visible outside.
//
// A chunk is walked in blocks that fit the L1 cache; a block goes through the stages of a step one after another, each a loop the
// compiler vectorises. Going over a block several times costs nothing next to main memory, measured: one loop with everything in it
// takes as long.
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

// What the kernels of one chunk look at.
struct Place {
  const Job& job;
  const int64_t index;
  const Chunk& chunk = job.chunks[index];
  const Row& row = job.rows[chunk.row];
  const Hyper& hyper = job.hypers[row.group];
  const RowStep& now = job.steps[chunk.row];
  const bool centre_gradient = row.centre && hyper.centralize_at == Centre::gradient;

  int64_t unit_at(int64_t element) const { return now.unit0 + element / row.length; }

  // Calls work(begin, n) block by block: whole units where their statistics are wanted and they are short.
  template <class F> void for_each_block(F work) const {
    const bool whole_units = row.length <= kUnitMax && (row.centre || hyper.scope == Scope::unit);
    const int64_t units = kBlock / row.length;
    const int64_t block = whole_units ? (units > 1 ? units : 1) * row.length : kBlock;
    const int64_t end = chunk.begin + chunk.count;
    for (int64_t begin = chunk.begin; begin < end; begin += block) work(begin, smaller(block, end - begin));
  }

  // Calls work(offset in the block, n, unit) for each unit, or piece of one, of a block.
  template <class F> void for_each_unit(int64_t begin, int64_t n, F work) const {
    int64_t unit = unit_at(begin);
    for (int64_t offset = 0; offset < n; offset += row.length, ++unit) work(offset, smaller(row.length, n - offset), unit);
  }
};

template <class T> T mean_of(const Place& at, const T* g, int64_t n, int64_t unit) {
  if (!at.centre_gradient) return T(0);
  if (at.now.means_known) return T(at.job.unit_mean[unit]);
  return T(sum_scaled(g, n, T(at.job.unscale)) / double(n));
}

template <class T> void sum_chunk(const Place& at, char* scratch) {
  double total = 0;
  at.for_each_block([&](int64_t begin, int64_t n) {
    total += sum_scaled(open(at.row.grad, begin, n, buffer<T>(scratch, kRaw)), n, T(at.job.unscale));
  });
  at.job.chunk_sum[at.index] = total;
}

template <class T> void squares_chunk(const Place& at, char* scratch) {
  const bool weights = at.hyper.agc && at.row.length > kUnitMax;
  double squares = 0, weight_squares = 0;
  at.for_each_block([&](int64_t begin, int64_t n) {
    const T* g = open(at.row.grad, begin, n, buffer<T>(scratch, kRaw));
    at.for_each_unit(begin, n, [&](int64_t offset, int64_t length, int64_t unit) {
      const T mean = mean_of(at, g + offset, length, unit);
      if (at.centre_gradient && !at.now.means_known) at.job.unit_mean[unit] = double(mean);
      squares += sum_of_squares(g + offset, length, T(at.job.unscale), mean);
    });
    if (weights) weight_squares += sum_of_squares(open(at.row.param, begin, n, buffer<T>(scratch, kParam)), n, T(1), T(0));
  });
  at.job.chunk_sq[at.index] = squares;
  if (weights) at.job.chunk_weight_sq[at.index] = weight_squares;
}

// Stages 0 to 6. g may not overlap to.
template <bool kNoisy, bool kDecayed, class T>
void transform(const T* __restrict g, const float* __restrict noise, const T* __restrict p, T* __restrict to, int64_t n,
               const math::Transform<T> t) {
  for (int64_t i = 0; i < n; ++i) {
    T x = math::perturbed(g[i], t);
    if (kNoisy) x = x + t.sigma * T(noise[i]);
    x = x * t.sign;
    if (kDecayed) x = x + t.decay * p[i];
    to[i] = x;
  }
}

template <class T>
void transform(const T* g, const float* noise, const T* p, T* to, int64_t n, const math::Transform<T>& t) {
  if (noise && t.decay != T(0)) return transform<true, true>(g, noise, p, to, n, t);
  if (noise) return transform<true, false>(g, noise, p, to, n, t);
  if (t.decay != T(0)) return transform<false, true>(g, noise, p, to, n, t);
  transform<false, false>(g, noise, p, to, n, t);
}

template <class T> void subtract(T* x, int64_t n, T mean) {
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] - mean;
}

// g <- the direction the rule takes. The states move unless this is a rehearsal.
template <class R, bool kRehearse, class T>
void direct(T* __restrict g, T* __restrict s0, T* __restrict s1, T* __restrict s2, int64_t n,
            const typename R::template Coef<T> c) {
  for (int64_t i = 0; i < n; ++i) {
    T s[kMaxStates] = {R::states > 0 ? s0[i] : T(0), R::states > 1 ? s1[i] : T(0), R::states > 2 ? s2[i] : T(0)};
    g[i] = R::direction(g[i], s, c);
    if (kRehearse) continue;
    if (R::states > 0) s0[i] = s[0];
    if (R::states > 1) s1[i] = s[1];
    if (R::states > 2) s2[i] = s[2];
  }
}

template <class T> void descend(T* __restrict p, const T* __restrict d, int64_t n, T shrink, T step) {
  for (int64_t i = 0; i < n; ++i) p[i] = p[i] * shrink - step * d[i];
}

// One chunk's walk through a step, with rule R in type T.
template <class R, class T> class Stepper {
 public:
  Stepper(const Place& at, char* scratch) : at_(at), scratch_(scratch), coef_(R::template coef<T>(at.hyper, at.now.step, at.row.first)) {
    static_assert(R::states <= 3, "direct() names its states");
    t_.unscale = T(at.job.unscale);
    t_.mean = T(0);
    t_.factor = T(at.now.factor);
    t_.hi = T(at.hyper.clip_value);
    t_.lo = -t_.hi;
    t_.sigma = T(at.now.sigma);
    t_.sign = T(at.hyper.sign);
    t_.decay = at.hyper.decoupled ? T(0) : T(at.hyper.weight_decay);
  }

  void apply() {
    at_.for_each_block([&](int64_t begin, int64_t n) {
      open_block(begin, n);
      prepare(begin, n);
      if (at_.row.centre && at_.hyper.centralize_at == Centre::decayed) centre(begin, n);
      direct<R, false>(g_, s_[0], s_[1], s_[2], n, coef_);
      if (at_.row.centre && at_.hyper.centralize_at == Centre::update) centre(begin, n);
      descend(p_, g_, n, coef_.shrink, coef_.step);
      close_block(begin, n);
    });
    if (at_.hyper.scope == Scope::unit && !at_.now.norms_known) at_.job.chunk_sq[at_.index] = squares_;
  }

  // The sum of what centre() would take the mean of, for units whose mean takes several chunks.
  void rehearse() {
    double total = 0;
    at_.for_each_block([&](int64_t begin, int64_t n) {
      open_block(begin, n);
      prepare(begin, n);
      if (at_.hyper.centralize_at == Centre::update) direct<R, true>(g_, s_[0], s_[1], s_[2], n, coef_);
      total += sum(g_, n);
    });
    at_.job.chunk_sum[at_.index] = total;
  }

 private:
  void open_block(int64_t begin, int64_t n) {
    raw_ = open(at_.row.grad, begin, n, buffer<T>(scratch_, kRaw));
    p_ = open(at_.row.param, begin, n, buffer<T>(scratch_, kParam));
    for (int k = 0; k < R::states; ++k) s_[k] = open(at_.row.state[k], begin, n, buffer<T>(scratch_, kState + k));
  }

  void close_block(int64_t begin, int64_t n) {
    close(at_.row.param, begin, n, p_);
    for (int k = 0; k < R::states; ++k) close(at_.row.state[k], begin, n, s_[k]);
  }

  // g_ <- the gradient as the rule sees it.
  void prepare(int64_t begin, int64_t n) {
    float* noise = nullptr;
    if (t_.sigma != T(0)) {
      noise = buffer<float>(scratch_ + kNoise * kUnitMax * sizeof(T), 0);
      noise_run(at_.hyper.seed, begin, n, at_.row.parameter, uint32_t(at_.now.step - 1), noise);
    }
    if (!at_.centre_gradient && at_.hyper.scope != Scope::unit) return transform(raw_, noise, p_, g_, n, t_);
    at_.for_each_unit(begin, n, [&](int64_t offset, int64_t length, int64_t unit) {
      t_.mean = mean_of(at_, raw_ + offset, length, unit);
      if (at_.hyper.scope == Scope::unit) t_.factor = T(unit_factor(offset, length, unit));
      transform(raw_ + offset, noise ? noise + offset : nullptr, p_ + offset, g_ + offset, length, t_);
    });
  }

  double unit_factor(int64_t offset, int64_t n, int64_t unit) {
    const bool known = at_.now.norms_known;
    const double squares = known ? at_.job.unit_sq[unit] : sum_of_squares(raw_ + offset, n, t_.unscale, t_.mean);
    squares_ += squares;
    if (!at_.hyper.agc) return math::perturb_factor(at_.hyper.perturb, sqrt(squares));
    const double weights = known ? at_.job.unit_weight_sq[unit] : sum_of_squares(p_ + offset, n, T(1), T(0));
    return math::agc_factor(at_.hyper.radius, sqrt(weights), sqrt(squares));
  }

  void centre(int64_t begin, int64_t n) {
    at_.for_each_unit(begin, n, [&](int64_t offset, int64_t length, int64_t unit) {
      const bool known = at_.now.directions_known;
      subtract(g_ + offset, length, known ? T(at_.job.unit_direction[unit]) : T(sum(g_ + offset, length) / double(length)));
    });
  }

  const Place& at_;
  char* const scratch_;
  const typename R::template Coef<T> coef_;
  math::Transform<T> t_;
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
#define GRADFUSED_RULE(name, type) \
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
  static constexpr Kernels kernels = {GRADFUSED_TEXT(GRADFUSED_ISA), sum, squares, rehearse, apply, roof};
  return kernels;
}

}  // namespace gradfused::cpu
