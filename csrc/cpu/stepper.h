// One chunk's walk through a step. Usually a block's statistics are taken first and one loop does the rest. Where something must be known
// of a whole unit in between (a mean of what the rule makes of it), the stages are loops of their own.
#pragma once

#include "cpu/loops.h"
#include "cpu/noise_run.h"
#include "cpu/weights.h"

namespace gradfused::cpu {
namespace {

// What is seldom stepped: a loop of its own for gradients that nothing perturbs is not worth compiling.
template <class S> constexpr bool kSeldom = sizeof(S) == sizeof(double);
template <> constexpr bool kSeldom<Half> = true;

// One chunk's walk through a step, with rule R in type T.
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

  // The chunk's part of what centre() would take the mean of, for units whose mean takes several chunks.
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

  // Squares of the weights, and of what the rule's trust in its step depends on besides.
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
        return step_units<R, Before::perturbed_and_decayed>(b, g, p, s[0], s[1], s[2], s[3], means_, factors_, t_, coef_);
    }
    if constexpr (!kSeldom<S>) {
      if (untouched()) return step_units<R, Before::nothing>(b, g, p, s[0], s[1], s[2], s[3], means_, factors_, t_, coef_);
    }
    step_units<R, Before::perturbed>(b, g, p, s[0], s[1], s[2], s[3], means_, factors_, t_, coef_);
  }

  // Perturbing would leave every gradient as it is.
  bool untouched() const {
    const bool by_one = context_.now.factor == 1.0 && t_.unscale == T(1) && t_.sign == T(1);
    return by_one && !context_.needs(Need::unit_norms) && !context_.needs(Need::centre_early) && t_.hi == T(INFINITY);
  }

  // Every operand is a plain array of this type, and nothing rides on the weights.
  bool stored_as(DType dtype) const {
    const auto is = [dtype](const Operand& x) { return x.dims == 0 && x.dtype == dtype; };
    bool all = !ridden_ && is(context_.row.param) && is(context_.row.grad);
    for (int k = 0; k < R::states; ++k) all = all && is(context_.row.state[k]);
    return all;
  }

  void step_chunk() {
    // The loop's start-up is not worth it for short units.
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

  // 16-bit arrays are widened in the loop: through buffers, each operand would be a stream alone.
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
