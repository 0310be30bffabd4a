// How a chunk is stepped. Usually a block is measured first and a single loop does the rest. Where the mean of a unit is needed in between,
// of the decayed gradient or of the rule's direction, each stage is a loop of its own.
#pragma once

#include "cpu/noise_run.h"
#include "cpu/weights.h"
#include "math/rules.h"

namespace gradfused::cpu {
namespace {

// ---- loops over a block: one for each stage, and one for the whole step

// to <- the transformed gradient (stages 0 to 6). g and to may not overlap.
template <bool kNoisy, bool kDecayed, class T>
void transform(const Block& b, const T* __restrict g, const float* __restrict noise, const T* __restrict p, T* __restrict to,
               const PerUnit<T>& means, const PerUnit<T>& factors, math::Transform<T> t) {
  for (int64_t u = 0; u < b.units; ++u) {
    t.mean = means.value[u];
    t.factor = factors.value[u];
    for (int64_t i = u * b.length; i < (u + 1) * b.length; ++i) {
      T x = math::perturbed(g[i], t);
      if (kNoisy) x = x + t.sigma * T(noise[i]);
      x = x * t.sign;
      if (kDecayed) x = x + t.decay * p[i];
      to[i] = x;
    }
  }
}

// The state of one element in registers.
template <class R, class T> struct Register {
  static constexpr int read = R::reads_state ? R::states : 0;
  T s[kMaxStates];
  Register(const T* s0, const T* s1, const T* s2, const T* s3, int64_t i)
      : s{read > 0 ? s0[i] : T(0), read > 1 ? s1[i] : T(0), read > 2 ? s2[i] : T(0), read > 3 ? s3[i] : T(0)} {}
  void store(T* s0, T* s1, T* s2, T* s3, int64_t i) const {
    if (R::states > 0) s0[i] = s[0];
    if (R::states > 1) s1[i] = s[1];
    if (R::states > 2) s2[i] = s[2];
    if (R::states > 3) s3[i] = s[3];
  }
};

// g <- the direction the rule takes. The states move unless this is a rehearsal.
template <class R, bool kKeep, class T>
void direct(T* __restrict g, const T* __restrict p, T* __restrict s0, T* __restrict s1, T* __restrict s2, T* __restrict s3, int64_t n,
            const typename R::template Coef<T> c) {
  for (int64_t i = 0; i < n; ++i) {
    Register<R, T> state(s0, s1, s2, s3, i);
    g[i] = R::direction(g[i], p[i], state.s, c);
    if (kKeep) state.store(s0, s1, s2, s3, i);
  }
}

template <class T> void descend(T* __restrict p, const T* __restrict d, int64_t n, T shrink, T step) {
  for (int64_t i = 0; i < n; ++i) p[i] = p[i] * shrink - step * d[i];
}

// How a gradient is transformed before the rule sees it.
enum class Before { nothing, perturbed, perturbed_and_decayed };

// transform(), direct() and descend() for a few neighbours from element i on.
template <class R, Before kBefore, int kCount, class S, class T>
GRADFUSED_MATH void step_few(const S* g, S* p, S* s0, S* s1, S* s2, S* s3, int64_t i, const math::Transform<T>& t,
                             const typename R::template Coef<T>& c) {
  T gradient[kCount], weight[kCount], state[kMaxStates][kCount];
  widen_few(g + i, gradient);
  widen_few(p + i, weight);
  constexpr int read = Register<R, T>::read;
  if (read > 0) widen_few(s0 + i, state[0]);
  if (read > 1) widen_few(s1 + i, state[1]);
  if (read > 2) widen_few(s2 + i, state[2]);
  if (read > 3) widen_few(s3 + i, state[3]);
  // A loop over a register's lanes is vectorised; GCC 12 would unroll it first.
#pragma GCC unroll 1
  for (int k = 0; k < kCount; ++k) {
    T x = gradient[k], s[kMaxStates] = {read > 0 ? state[0][k] : T(0), read > 1 ? state[1][k] : T(0), read > 2 ? state[2][k] : T(0),
                                        read > 3 ? state[3][k] : T(0)};
    if (kBefore != Before::nothing) x = math::perturbed(x, t) * t.sign;
    if (kBefore == Before::perturbed_and_decayed) x = x + t.decay * weight[k];
    const T d = R::direction(x, weight[k], s, c);
    weight[k] = weight[k] * c.shrink - c.step * d;
    for (int j = 0; j < R::states; ++j) state[j][k] = s[j];
  }
  narrow_few(weight, p + i);
  if (R::states > 0) narrow_few(state[0], s0 + i);
  if (R::states > 1) narrow_few(state[1], s1 + i);
  if (R::states > 2) narrow_few(state[2], s2 + i);
  if (R::states > 3) narrow_few(state[3], s3 + i);
}

// What is subtracted from the gradients of each unit, and what they are multiplied by then.
template <class T> struct UnitStatistics {
  const PerUnit<T>&means, &factors;
};

// The whole step in one loop, so that all streams advance together, which is fastest in memory. Inlined, it would lose __restrict.
template <class R, Before kBefore, class S, class T>
__attribute__((noinline)) void step_units(const Block& b, const S* __restrict g, S* __restrict p, S* __restrict s0, S* __restrict s1,
                                          S* __restrict s2, S* __restrict s3, UnitStatistics<T> units, math::Transform<T> t,
                                          const typename R::template Coef<T> c) {
  for (int64_t u = 0; u < b.units; ++u) {
    t.mean = units.means.value[u];
    t.factor = units.factors.value[u];
    int64_t i = u * b.length;
    const int64_t end = i + b.length;
    for (; i + kFew<S> <= end; i += kFew<S>) step_few<R, kBefore, kFew<S>>(g, p, s0, s1, s2, s3, i, t, c);
    for (; i < end; ++i) step_few<R, kBefore, 1>(g, p, s0, s1, s2, s3, i, t, c);
  }
}

// ---- a chunk

// Types that are seldom stepped: for them no extra loop is compiled for gradients that need no transform.
template <class S> constexpr bool kSeldom = sizeof(S) == sizeof(double);
template <> constexpr bool kSeldom<Half> = true;

// Steps or measures one chunk with rule R, computing in type T.
template <class R, class T> class Stepper {
 public:
  Stepper(const ChunkContext& context, char* scratch)
      : context_(context),
        scratch_(scratch),
        ridden_(context.needs(Need::riders)),
        coef_(R::template coef<T>(context.settings, context.now.count)) {
    static_assert(R::states <= 4, "direct() names its states");
    if constexpr (R::trust != math::Trust::none) {
      if (context.now.trusted) R::template trusted<T>(coef_, context.settings, context.now.weight_norm, context.now.norm);
    }
    t_.unscale = T(context.job.unscale);
    t_.mean = T(0);
    t_.factor = T(1);
    t_.hi = T(context.settings.clip_value);
    t_.sigma = T(context.now.sigma);
    t_.sign = T(context.settings.sign);
    t_.decay = context.settings.decoupled ? T(0) : T(context.settings.weight_decay);
  }

  void step() {
    step_chunk();
    fence();
    if (context_.needs(Need::unit_norms) && !context_.now.norms_known) context_.job.chunk_sq[context_.index] = squares_;
  }

  // chunk_mean <- the chunk's mean of what is centred late, for units whose mean takes several chunks.
  void late_mean() {
    BlockMean<T> mean;
    context_.for_each_block([&](const Block& b) {
      open_block(b);
      measure(b);
      prepare(b);
      if (context_.needs(Need::centre_update)) look_ahead(b);
      mean.add(g_, b.count, [](T v) { return v; });
    });
    context_.job.chunk_mean[context_.index] = mean.get();
  }

  // chunk_weight_sq and chunk_sum <- sums of squares of the weights and of what the rule's trust ratio compares them with.
  void trust_norms() {
    double sum = 0, weights = 0;
    context_.for_each_block([&](const Block& b) {
      open_block(b);
      measure(b);
      prepare(b);
      if (context_.needs(Need::centre_decayed)) centre(b);
      if (R::trust == math::Trust::update) {
        look_ahead(b);
        if (context_.needs(Need::centre_update)) centre(b);
        const T decay = T(context_.settings.weight_decay);
        for (int64_t i = 0; i < b.count; ++i) g_[i] = g_[i] + decay * p_[i];
      }
      sum += squares(g_, b.count);
      weights += squares(p_, b.count);
    });
    context_.job.chunk_sum[context_.index] = sum;
    context_.job.chunk_weight_sq[context_.index] = weights;
  }

 private:
  void open_block(const Block& b) {
    raw_ = open(context_.row.grad, b.begin, b.count, buffer<T>(scratch_, kRaw));
    p_ = ridden_ ? open_weights<T>(context_, b, scratch_) : open(context_.row.param, b.begin, b.count, buffer<T>(scratch_, kParam));
    for (int k = 0; k < R::states; ++k) {
      T* const own = buffer<T>(scratch_, kState + k);
      s_[k] = around_ ? own : open<R::reads_state>(context_.row.state[k], b.begin, b.count, own);
    }
  }

  void close_block(const Block& b) {
    ridden_ ? close_weights(context_, b, scratch_, p_) : close(context_.row.param, b.begin, b.count, p_);
    for (int k = 0; k < R::states; ++k) {
      around_ ? store_around(context_.row.state[k], b.begin, b.count, s_[k]) : close(context_.row.state[k], b.begin, b.count, s_[k]);
    }
  }

  void measure(const Block& b) {
    means_of(context_, b, raw_, means_);
    set_factors(b);
  }

  template <class S> void together(const Block& b, const S* g, S* p, S* const* s) {
    if constexpr (R::coupled) {
      if (t_.decay != T(0))
        return step_units<R, Before::perturbed_and_decayed>(b, g, p, s[0], s[1], s[2], s[3], {means_, factors_}, t_, coef_);
    }
    if constexpr (!kSeldom<S>) {
      if (untouched()) return step_units<R, Before::nothing>(b, g, p, s[0], s[1], s[2], s[3], {means_, factors_}, t_, coef_);
    }
    step_units<R, Before::perturbed>(b, g, p, s[0], s[1], s[2], s[3], {means_, factors_}, t_, coef_);
  }

  // Whether the transform would leave every gradient as it is.
  bool untouched() const {
    const bool by_one = context_.now.factor == 1.0 && t_.unscale == T(1) && t_.sign == T(1);
    return by_one && !context_.needs(Need::unit_norms) && !context_.needs(Need::centre_early) && t_.hi == T(INFINITY);
  }

  // Whether every operand is a plain array of this dtype and the weights are only read and written.
  bool stored_as(DType dtype) const {
    const auto is = [dtype](const Operand& x) { return x.dims == 0 && x.dtype == dtype; };
    bool all = !ridden_ && is(context_.row.param) && is(context_.row.grad);
    for (int k = 0; k < R::states; ++k) all = all && is(context_.row.state[k]);
    return all;
  }

  void step_chunk() {
    // For short units the single loop costs more to start than it saves.
    const bool short_units = context_.whole_units && context_.row.unit_length <= kShortUnit;
    const bool in_one_loop = t_.sigma == T(0) && !context_.needs(Need::centre_late) && !short_units;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (in_one_loop && stored_as(DType::bfloat16)) return step_stored<BFloat16>();
      if constexpr (R::half_in_loop && kFew<Half> > 1) {
        if (in_one_loop && stored_as(DType::float16)) return step_stored<Half>();
      }
    }
    context_.for_each_block([&](const Block& b) {
      open_block(b);
      measure(b);
      in_one_loop ? together(b, raw_, p_, s_) : stage_by_stage(b);
      close_block(b);
    });
  }

  // Converts 16-bit arrays in the loop itself: through buffers each operand would be a stream of its own.
  template <class S> void step_stored() {
    const auto array = [](const Operand& x, int64_t begin) { return reinterpret_cast<S*>(x.data) + begin; };
    const bool by_unit = context_.needs(Need::unit_norms) && !context_.now.norms_known;
    context_.for_each_block([&](const Block& b) {
      if (by_unit || (context_.needs(Need::centre_early) && !context_.now.means_known)) {
        raw_ = open(context_.row.grad, b.begin, b.count, buffer<T>(scratch_, kRaw));
      }
      if (by_unit && context_.needs(Need::agc)) p_ = open(context_.row.param, b.begin, b.count, buffer<T>(scratch_, kParam));
      measure(b);
      S* s[kMaxStates] = {};
      for (int k = 0; k < R::states; ++k) s[k] = array(context_.row.state[k], b.begin);
      together<S>(b, array(context_.row.grad, b.begin), array(context_.row.param, b.begin), s);
    });
  }

  void stage_by_stage(const Block& b) {
    prepare(b);
    if (context_.needs(Need::centre_decayed)) centre(b);
    direct<R, true>(g_, p_, s_[0], s_[1], s_[2], s_[3], b.count, coef_);
    if (context_.needs(Need::centre_update)) centre(b);
    descend(p_, g_, b.count, coef_.shrink, coef_.step);
  }

  void look_ahead(const Block& b) { direct<R, false>(g_, p_, s_[0], s_[1], s_[2], s_[3], b.count, coef_); }

  // g_ <- the gradient that the rule is given.
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
    noise_run(context_.settings.seed, b.begin, b.count, context_.row.param_number, math::step_word(context_.now.count.step), noise);
    return noise;
  }

  void set_factors(const Block& b) {
    if (!context_.needs(Need::unit_norms)) {
      for (int64_t u = 0; u < b.units; ++u) factors_.value[u] = T(context_.now.factor);
      return;
    }
    PerUnit<double> squares, weights;
    if (context_.now.norms_known) {  // a piece of one long unit
      squares.value[0] = context_.job.unit_sq[b.unit0];
      weights.value[0] = context_.job.unit_weight_sq[b.unit0];
    } else {
      squares_of(context_, b, raw_, means_, squares);
      if (context_.needs(Need::agc)) weight_squares_of(b, p_, weights);
    }
    for (int64_t u = 0; u < b.units; ++u) {
      squares_ += squares.value[u];
      const double norm = sqrt(squares.value[u]);
      factors_.value[u] = T(context_.needs(Need::agc) ? math::agc_factor(context_.settings.radius, sqrt(weights.value[u]), norm)
                                                      : math::perturb_factor(context_.settings.perturb, norm));
    }
  }

  void centre(const Block& b) {
    PerUnit<T> means;
    const bool known = context_.now.directions_known;
    if (!known) means_of_units(b, g_, [](T v) { return v; }, means);
    for (int64_t u = 0; u < b.units; ++u) {
      const T mean = known ? T(context_.job.unit_direction[b.unit0 + u]) : means.value[u];
      for (int64_t i = u * b.length; i < (u + 1) * b.length; ++i) g_[i] = g_[i] - mean;
    }
  }

  const ChunkContext& context_;
  char* const scratch_;
  const bool ridden_, around_ = !R::reads_state && !context_.job.cached;  // around_: state is written alone
  typename R::template Coef<T> coef_;
  math::Transform<T> t_;
  PerUnit<T> means_, factors_;
  T* const g_ = buffer<T>(scratch_, kGrad);
  T *raw_ = nullptr, *p_ = nullptr, *s_[kMaxStates] = {};
  double squares_ = 0;
};

}  // namespace
}  // namespace gradfused::cpu
