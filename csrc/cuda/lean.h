// A chunk's step with no more than centring, wide norms and elementwise work in float32, in few enough registers for three blocks a
// multiprocessor.
#pragma once

#include "cuda/row.h"

namespace gradfused::cuda {
namespace {

// With the rules R, one or any of the family, and access A.
template <class R, class A> class LeanStepper {
  using T = typename A::Compute;
  using Pack = typename A::Pack;
  static constexpr int width = A::width;

 public:
  __device__ __forceinline__ explicit LeanStepper(const ChunkTask& task)
      : job_(task.job),
        r_(task.r),
        row_(task.r.row),
        c_(task.c),
        rule_(task.block, task.r.row.rule),
        t_(*reinterpret_cast<const math::Transform<T>*>(task.block.transform)),
        move_(*reinterpret_cast<const Move<T>*>(task.block.move)),
        g_(task.r.row.grad, task.job.grads[task.c.row], task.c.lanes ? int(task.c.lanes) : kThreads, task.tile, task.block.unscale) {}

  __device__ __forceinline__ void run() {
    const int length = c_.lanes ? int(row_.unit_length) : c_.count, units = c_.count / length, groups = kThreads / g_.lanes;
#pragma unroll 1
    for (int first = 0; first < units; first += groups) {
      const int unit = first + int(threadIdx.x) / g_.lanes;
      open(c_.begin + int64_t(unit) * length, unit < units ? length : 0);
      if (r_.needs & Need::centre_early) centre();
      step();
    }
  }

 private:
  __device__ __forceinline__ void open(int64_t begin, int count) {
    begin_ = begin;
    g_.open(begin, count);
    param_ = A::handle(row_.param, row_.param.data, begin);
#pragma unroll
    for (int n = 0; n < R::states; ++n) state_[n] = A::handle(row_.state[n], row_.state[n].data, begin);
  }

  __device__ __forceinline__ void centre() {
    if (r_.needs & Need::split) {
      mean_ = g_.count ? T(job_.units[r_.unit0 + begin_ / row_.unit_length].mean) : T(0);
    } else {
      mean_ = T(g_.mean(double(row_.unit_length)));
    }
  }

  static __device__ __forceinline__ T get(const Pack& v, int k) { return T(math::widen(v.item[k])); }

  // Stages 0 to 6.
  __device__ __forceinline__ T transformed(T x, T weight) const {
    math::Transform<T> t = t_;
    t.mean = mean_;
    x = math::perturbed(x, t) * t_.sign;
    return t_.decay != T(0) ? x + t_.decay * weight : x;
  }

  __device__ __forceinline__ void step() {
    g_.for_each([&](int i) {
      Pack p = A::load(param_, i), s[R::states ? R::states : 1]{};
#pragma unroll
      for (int n = 0; n < R::states; ++n) {
        if (rule_.reads(n)) s[n] = A::load(state_[n], i);
      }
      const Pack g = g_.read(i);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const T weight = get(p, k);
        T one[kMaxStates];
#pragma unroll
        for (int n = 0; n < R::states; ++n) one[n] = get(s[n], k);
        T x = transformed(get(g, k), weight);
        rule_.direct(x, weight, one);
#pragma unroll
        for (int n = 0; n < R::states; ++n) math::put(one[n], s[n].item[k]);
        math::put(weight * move_.shrink - move_.step * x, p.item[k]);
      }
#pragma unroll
      for (int n = 0; n < R::states; ++n) {
        if (rule_.writes(n)) A::store(state_[n], i, s[n]);
      }
      A::store(param_, i, p);
    });
  }

  const Job& job_;
  const DeviceRow& r_;
  const Row& row_;
  const Chunk& c_;
  const R rule_;
  // In shared memory: fewer registers.
  const math::Transform<T>& t_;
  const Move<T>& move_;
  T mean_ = T(0);      // of the unit
  int64_t begin_ = 0;  // of the unit or piece at hand
  typename A::Handle param_{}, state_[R::states ? R::states : 1]{};
  Gradient<A> g_;
};

template <class A> struct LeanRule {
  const ChunkTask& task;
  template <class R> __device__ __forceinline__ void operator()(R) const {
    // Rows of other rules are never lean.
    if constexpr (R::trust == math::Trust::none && R::states <= kLeanStates) LeanStepper<OneRule<R>, A>(task).run();
  }
};

// One body a rule for wide accesses, one for all rules for the others.
struct LeanChunk {
  const ChunkTask& task;
  template <class A> __device__ __forceinline__ void operator()(A) const {
    if constexpr (A::width > 1) {
      with_rule(task.r.row.rule, LeanRule<A>{task});
    } else {
      LeanStepper<AnyRule, A>(task).run();
    }
  }
};

__device__ __forceinline__ void step_lean(const ChunkTask& task) {
  with_access<false>(task.r.row, task.job.grads[task.c.row], task.c.plain, LeanChunk{task});
}

}  // namespace
}  // namespace gradfused::cuda
