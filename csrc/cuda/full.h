// A chunk's step with all that a row may need: noise, norms by unit, late centring, float64, trust ratios, and weights that are kept in other
// ways than in one array. Bits tell one loop what to do, so that there is one body an access for all rules of a family.
#pragma once

#include "cuda/row.h"
#include "cuda/weights.h"

namespace gradfused::cuda {
namespace {

template <class A> struct States {
  typename A::Raw of[AnyRule::states];
};

// x <- the rule's directions. The rule is chosen once a pack.
template <class A> struct DirectPack {
  using T = typename A::Compute;
  const BlockRow& block;
  T *x, *weights;
  States<A>& s;

  template <class R> __device__ __forceinline__ void operator()(R) const {
    const OneRule<R> rule(block, Rule());
#pragma unroll
    for (int k = 0; k < A::width; ++k) {
      T one[kMaxStates];
#pragma unroll
      for (int n = 0; n < R::states; ++n) one[n] = R::reads_state ? A::get(s.of[n], k) : T(0);
      rule.direct(x[k], weights[k], one);
#pragma unroll
      for (int n = 0; n < R::states; ++n) A::set(s.of[n], k, one[n]);
    }
  }
};

template <class A> class FullStepper {
  using T = typename A::Compute;
  static constexpr int width = A::width, states = AnyRule::states;
  struct TileSlot {
    T item[width];
  };

 public:
  __device__ __forceinline__ explicit FullStepper(const ChunkTask& task)
      : task_(task),
        row_(task.r.row),
        settings_(task.job.settings[task.r.row.group].settings),
        rule_(task.r.row.rule),
        t_(*reinterpret_cast<const math::Transform<T>*>(task.block.transform)),
        move_(*reinterpret_cast<const Move<T>*>(task.block.move)),
        weights_(task.block),
        g_(task.r.row.grad, task.job.grads[task.c.row], task.c.lanes ? int(task.c.lanes) : kThreads, task.tile, task.block.unscale) {}

  __device__ __forceinline__ void run() {
    const Chunk& c = task_.c;
    const int length = c.lanes ? int(row_.unit_length) : c.count, units = c.count / length, groups = kThreads / g_.lanes;
#pragma unroll 1
    for (int first = 0; first < units; first += groups) {
      const int unit = first + int(threadIdx.x) / g_.lanes;
      open(c.begin + int64_t(unit) * length, unit < units ? length : 0);
      const Unit* known = needs(Need::split) && g_.count ? &task_.job.units[task_.r.unit0 + weights_.begin / row_.unit_length] : nullptr;
      const double squares = measure(known);
      walk_unit(known);
      if (task_.phase == Phase::step && g_.lane == 0) total_ += squares;
    }
    leave_sums();
  }

 private:
  __device__ __forceinline__ void open(int64_t begin, int count) {
    g_.open(begin, count);
    weights_.open(row_, begin);
#pragma unroll
    for (int n = 0; n < states; ++n) state_[n] = A::handle(row_.state[n], row_.state[n].data, begin);
  }

  __device__ __forceinline__ bool needs(Needs any_of) const { return task_.r.needs & any_of; }

  // Sets the unit's mean and factor. Returns its sum of squares if norms are by unit.
  __device__ __forceinline__ double measure(const Unit* known) {
    if (needs(Need::centre_early)) {
      if (needs(Need::split)) {
        mean_ = known ? T(known->mean) : T(0);
      } else {
        mean_ = T(g_.mean(double(row_.unit_length)));
      }
    }
    if (!needs(Need::unit_norms)) {
      factor_ = t_.factor;
      return 0;
    }
    double squares, weights = 0;
    if (needs(Need::long_units)) {
      squares = known ? known->squares : 0;
      weights = known ? known->weight_squares : 0;
    } else {
      squares = sum_group(g_.own_squares(mean_), g_.lanes);
      if (settings_.agc) weights = sum_group(g_.own_squares_of(static_cast<const KeptWeights<A>&>(weights_), task_.block.todo), g_.lanes);
    }
    factor_ = T(settings_.agc ? math::agc_factor(settings_.radius, sqrt(weights), sqrt(squares))
                              : math::perturb_factor(settings_.perturb, sqrt(squares)));
    return squares;
  }

  // The bits of a launch's last walk over a unit.
  __device__ __forceinline__ uint32_t last_walk(bool decayed, bool directed) const {
    switch (task_.phase) {
      case Phase::step: return kDirect | kMove | kStep | (decayed ? kCentreBefore : 0) | (directed ? kCentreAfter : 0);
      case Phase::late_means: return kSum | (directed ? kDirect : 0);
      case Phase::early_trust: return kWeigh;
      default: {
        const bool updates = task_.block.todo & kTrustsUpdate;
        return kWeigh | (updates ? kDirect : 0) | (decayed ? kCentreBefore : 0) | (directed && updates ? kCentreAfter : 0);
      }
    }
  }

  // If the mean of late centring is not known yet, a walk that computes it comes first. A unit that fits in the tile stays there, and its
  // states are then written in the first walk.
  __device__ __forceinline__ void walk_unit(const Unit* known) {
    const bool decayed = needs(Need::centre_decayed), directed = needs(Need::centre_update);
    uint32_t last = last_walk(decayed, directed), todo = last;
    bool final = true;
    T mean = known && needs(Need::centre_late) ? T(known->direction) : T(0);
    if (!needs(Need::split) && (last & (kCentreBefore | kCentreAfter))) {
      final = false;
      todo = kSum | (directed ? kDirect : 0);
      if (g_.fits()) {
        todo |= kHold | (directed ? last & kMove : 0);
        last |= kHeld;
        if (directed) last &= ~uint32_t(kDirect | kMove);
      }
    }
#pragma unroll 1
    for (;; todo = last) {
      if (!final) seen_ = {};
      walk(todo | task_.block.todo, mean);
      if (final) return;
      final = true;
      mean = T(seen_.of_group(g_.lanes, double(row_.unit_length)));
    }
  }

  // Stages 0 to 6.
  __device__ __forceinline__ T transformed(T x, float z, T weight, uint32_t todo) const {
    math::Transform<T> t = t_;
    t.mean = mean_;
    t.factor = factor_;
    x = math::perturbed(x, t);
    if (todo & Need::noise) x = x + t_.sigma * T(z);
    x = x * t_.sign;
    return todo & kDecay ? x + t_.decay * weight : x;
  }

  __device__ __forceinline__ void walk(uint32_t todo, T mean) {
    g_.for_each([&](int i) {
      const typename Weights<A>::Loaded loaded = weights_.load(i, todo);
      States<A> s{};
      if (todo & kDirect) {
#pragma unroll
        for (int n = 0; n < states; ++n) {
          if (todo & (kReads << n)) s.of[n] = A::load_raw(state_[n], i);
        }
      }
      T weights[width], x[width];
      if (todo & kHeld) {
        const TileSlot held = g_.template slot<TileSlot>(i);
#pragma unroll
        for (int k = 0; k < width; ++k) x[k] = held.item[k];
        weights_.widen(loaded, todo, weights);
      } else {
        const typename A::Raw g = g_.read_raw(i);
        float z[width] = {};
        if (todo & Need::noise) draw_noise<width>(task_.block, weights_.begin + i, z);
        weights_.widen(loaded, todo, weights);
#pragma unroll
        for (int k = 0; k < width; ++k) x[k] = transformed(A::get(g, k), z[k], weights[k], todo);
      }
      if (todo & kCentreBefore) take_off(mean, x);
      if (todo & kDirect) with_rule(rule_, DirectPack<A>{task_.block, x, weights, s});
      if (todo & kCentreAfter) take_off(mean, x);
      if (todo & kMove) {
#pragma unroll
        for (int n = 0; n < states; ++n) {
          if (todo & (kWrites << n)) A::store_raw(state_[n], i, s.of[n]);
        }
      }
      if (todo & kSum) sum(i, todo, x);
      if (todo & kWeigh) weigh(todo, x, weights);
      if (todo & kStep) {
#pragma unroll
        for (int k = 0; k < width; ++k) weights[k] = weights[k] * move_.shrink - move_.step * x[k];
        weights_.store(i, todo, loaded, move_.average, weights);
        if (todo & Need::zero_grad_in_step) A::store_raw(g_.from, i, typename A::Raw{});
      }
    });
  }

  static __device__ __forceinline__ void take_off(T mean, T* x) {
#pragma unroll
    for (int k = 0; k < width; ++k) x[k] = x[k] - mean;
  }

  // Adds x to the mean, and with kHold puts it into the tile.
  __device__ __forceinline__ void sum(int i, uint32_t todo, const T* x) {
    seen_.template add<width>(x);
    TileSlot held;
#pragma unroll
    for (int k = 0; k < width; ++k) held.item[k] = x[k];
    if (todo & kHold) g_.template slot<TileSlot>(i) = held;
  }

  // Adds to the sums of squares for a trust ratio: of the weights, and of the rule's direction with weight decay or of its gradient.
  __device__ __forceinline__ void weigh(uint32_t todo, T* x, const T* weights) {
    if (todo & kTrustsUpdate) {
#pragma unroll
      for (int k = 0; k < width; ++k) x[k] = x[k] + move_.decay * weights[k];
    }
    total_ += sum_squares<width>(x);
    weight_squares_ += sum_squares<width>(weights);
  }

  __device__ __forceinline__ void leave_sums() {
    if (task_.phase == Phase::step && (!needs(Need::unit_norms) || needs(Need::measured))) return;  // the squares are not needed, or known
    Sums& to = task_.job.sums[task_.index];
    const double total = task_.phase == Phase::late_means ? seen_.of_group(kThreads, double(task_.c.count)) : sum_block(total_);
    if (threadIdx.x == 0) (task_.phase == Phase::step ? to.squares : to.sum) = total;
    if (task_.phase == Phase::step || task_.phase == Phase::late_means) return;
    const double weights = sum_block(weight_squares_);
    if (threadIdx.x == 0) to.weight_squares = weights;
  }

  const ChunkTask& task_;
  const Row& row_;
  const Settings& settings_;
  const Rule rule_;
  // In shared memory: fewer registers.
  const math::Transform<T>& t_;
  const Move<T>& move_;
  Weights<A> weights_;
  Gradient<A> g_;
  typename A::Handle state_[states]{};
  T mean_ = T(0), factor_ = T(1);          // of the unit
  RunningMean<T> seen_;                    // this thread's, of what is centred late
  double total_ = 0, weight_squares_ = 0;  // this thread's, of what the chunk leaves behind
};

struct FullChunk {
  const ChunkTask& task;
  template <class A> __device__ __forceinline__ void operator()(A) const { FullStepper<A>(task).run(); }
};

__device__ __forceinline__ void step_full(const ChunkTask& task) {
  with_access(task.r.row, task.job.grads[task.c.row], task.c.plain, FullChunk{task});
}

}  // namespace
}  // namespace gradfused::cuda
