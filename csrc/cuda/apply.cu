// The launch that takes the step, for the rules of one family: compiled for each with GRADFUSED_FAMILY naming it, in a lean and a full
// version (GRADFUSED_FULL: see Stepper).
//
// A block walks its share of the chunks, last one first, so that what the stats kernel read last is still in cache. A unit's gradient
// is read once and held in shared memory between its mean or norm and its update; what needs no statistics of its own streams through.
#include "cuda/gradient.h"
#include "cuda/launch.h"
#include "math/adam.h"
#include "math/noise.h"
#include "math/sgd.h"

#define GRADFUSED_PASTE(a, b) a##b
#define GRADFUSED_NAME(a, b) GRADFUSED_PASTE(a, b)
#define GRADFUSED_STRING(x) #x
#define GRADFUSED_TEXT(x) GRADFUSED_STRING(x)

namespace gradfused::cuda {
namespace {

constexpr __host__ __device__ bool same(const char* a, const char* b) { return *a == *b && (*a == '\0' || same(a + 1, b + 1)); }

// Runs f with the rule, among those of this family. What runs big bodies is given as a functor: the compiler leaves lambdas of that size
// as calls, through local memory.
template <class F> __device__ __forceinline__ void with_rule(Rule rule, const F& f) {
  switch (rule) {
#define GRADFUSED_RULE(name, type, family)                                              \
  case Rule::name:                                                                      \
    if constexpr (same(#family, GRADFUSED_TEXT(GRADFUSED_FAMILY))) return f(math::type{}); \
    return;
#include "rules.def"
#undef GRADFUSED_RULE
    case Rule::count: return;
  }
}

// What the block knows of the row it works on: worked out by one thread when the row changes.
struct Now {
  alignas(16) char coef[96];       // the rule's Coef<T>
  alignas(16) char transform[64];  // Transform<T>, but for what is of a unit
  double unscale, step;
  int row;
  int group;  // with `first` and `wide`: what coef was made for
  bool first, wide;
};

__device__ double scalar_at(const char* at, DType dtype) {
  return dtype == DType::float64 ? *reinterpret_cast<const double*>(at) : double(*reinterpret_cast<const float*>(at));
}

// The block's sum of f(i) over rows [begin, end).
template <class F> __device__ __forceinline__ double sum_rows(int begin, int end, F f) {
  double total = 0;
  for (int i = begin + int(threadIdx.x); i < end; i += kThreads) total += f(i);
  return sum_block(total);
}

__device__ double global_squares(const Job& job) {
  if (!job.any_global) return 0;
  return sum_rows(0, job.row_count, [&](int i) {
    return job.hypers[job.rows[i].row.group].hyper.scope == Scope::global ? job.squares[i] : 0.0;
  });
}

// Whether what the norms saw forbids the step.
__device__ bool is_spoilt(const Job& job) {
  if (!job.any_skip) return false;
  return sum_rows(0, job.row_count, [&](int i) {
           const bool finite = job.squares[i] - job.squares[i] == 0.0;
           return job.hypers[job.rows[i].row.group].hyper.skip_nonfinite && !finite ? 1.0 : 0.0;
         }) > 0;
}

template <class T> __device__ void set_transform(Now& now, const Hyper& h, double factor) {
  static_assert(sizeof(math::Transform<T>) <= sizeof(now.transform), "room for the transform");
  const double sigma = h.noise > 0 ? math::noise_sigma(h.noise, h.noise_decay, now.step - 1) : 0.0;
  *reinterpret_cast<math::Transform<T>*>(now.transform) = {T(now.unscale), T(0),      T(factor), T(h.clip_value),
                                                           T(sigma),       T(h.sign), h.decoupled ? T(0) : T(h.weight_decay)};
}

template <class T> __device__ void set_coef(Now& now, const Row& row, const Hyper& h) {
  with_rule(row.rule, [&](auto rule) {
    using R = decltype(rule);
    using C = typename R::template Coef<T>;
    static_assert(sizeof(C) <= sizeof(now.coef), "room for the coefficients");
    *reinterpret_cast<C*>(now.coef) = R::template coef<T>(h, now.step, row.first);
  });
}

__device__ void enter_row(const Job& job, Now& now, int index, double global) {
  const Row& row = job.rows[index].row;
  const DeviceHyper& group = job.hypers[row.group];
  double squares = global;
  if (group.hyper.scope == Scope::group) squares = sum_rows(group.row0, group.row1, [&](int i) { return job.squares[i]; });
  if (group.hyper.scope == Scope::param) squares = job.squares[index];
  __syncthreads();  // nobody reads the last row's any more
  if (threadIdx.x == 0) {
    Hyper h = group.hyper;
    if (group.lr_at) h.lr = scalar_at(group.lr_at, group.lr_dtype);
    const bool wide = row.param.dtype == DType::float64;
    const double step = 1 + (row.step ? scalar_at(row.step, row.step_dtype) : 0.0);
    const bool scoped = h.scope == Scope::global || h.scope == Scope::group || h.scope == Scope::param;
    // Powers are slow: most rows are of the last one's group and age.
    const bool known = now.row >= 0 && now.group == row.group && now.step == step && now.first == row.first && now.wide == wide;
    now.row = index;
    now.group = row.group;
    now.step = step;
    now.first = row.first;
    now.wide = wide;
    now.unscale = unscale_of(job);
    const double factor = scoped ? math::perturb_factor(h.perturb, sqrt(squares)) : 1.0;
    wide ? set_transform<double>(now, h, factor) : set_transform<float>(now, h, factor);
    if (!known) wide ? set_coef<double>(now, row, h) : set_coef<float>(now, row, h);
  }
  __syncthreads();
}

// The normal values of element i and its neighbours, which share a draw: i is a multiple of kCount.
template <int kCount> __device__ __forceinline__ void draw(uint64_t seed, uint32_t parameter, uint32_t step, int64_t i, float* z) {
#pragma unroll
  for (int q = 0; q < (kCount + 3) / 4; ++q) {
    const uint64_t quad = uint64_t(i) / 4 + uint64_t(q);
    uint64_t c0 = uint32_t(quad), c1 = quad >> 32, c2 = parameter, c3 = step;
    math::philox(seed, c0, c1, c2, c3);
    float four[4];
    math::box_muller(uint32_t(c0), uint32_t(c1), four[0], four[1]);
    math::box_muller(uint32_t(c2), uint32_t(c3), four[2], four[3]);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (kCount >= 4) z[(q * 4 + k) % kCount] = four[k];
      if (kCount < 4 && int(i % 4) <= k && k < int(i % 4) + kCount) z[k % kCount] = four[k];
    }
  }
}

// One chunk's walk through a step, with rule R and access A. Without kFull: no noise, no norm by unit and nothing centred late, which
// leaves room in the registers for more threads.
template <class R, class A, bool kFull> class Stepper {
  using T = typename A::Compute;
  using Pack = typename A::Pack;
  static constexpr int width = A::width;
  struct States {
    Pack of[R::states ? R::states : 1];
  };
  struct Late {
    T at[width];
  };

 public:
  __device__ __forceinline__ Stepper(const Job& job, const DeviceRow& r, const Chunk& c, const Now& now, char* tile)
      : job_(job), r_(r), row_(r.row), h_(job.hypers[r.row.group].hyper), c_(c), now_(now),
        coef_(*reinterpret_cast<const typename R::template Coef<T>*>(now.coef)),
        t_(*reinterpret_cast<const math::Transform<T>*>(now.transform)),
        g_(r.row.grad, job.grads[c.row], c.lanes ? int(c.lanes) : kThreads, tile, now.unscale) {}

  // The step; or, for the mean of what the rule makes of a unit that takes several chunks, only that sum.
  __device__ __forceinline__ void run(int index, bool rehearsal) {
    const int length = c_.lanes ? int(row_.length) : c_.count, units = c_.count / length, groups = kThreads / g_.lanes;
    double total = 0;
#pragma unroll 1
    for (int first = 0; first < units; first += groups) {
      const int unit = first + int(threadIdx.x) / g_.lanes;
      open(c_.begin + int64_t(unit) * length, unit < units ? length : 0);
      const Unit* known = r_.split && g_.count ? &job_.units[r_.unit0 + begin_ / row_.length] : nullptr;
      const double squares = measure(known);
      if (kFull && rehearsal) {
        total += own_rehearsal(false);
      } else {
        step(known);
        if (g_.lane == 0) total += squares;
      }
    }
    if (!kFull || (!rehearsal && !measures_units())) return;
    total = sum_block(total);
    if (threadIdx.x == 0) (rehearsal ? job_.sums[index].sum : job_.sums[index].squares) = total;
  }

 private:
  __device__ __forceinline__ void open(int64_t begin, int count) {
    begin_ = begin;
    g_.open(begin, count);
    param_ = A::handle(row_.param, row_.param.data, begin);
#pragma unroll
    for (int n = 0; n < R::states; ++n) state_[n] = A::handle(row_.state[n], row_.state[n].data, begin);
  }

  __device__ __forceinline__ bool by_unit() const { return kFull && h_.scope == Scope::unit; }
  __device__ __forceinline__ bool late() const { return kFull && row_.centre && h_.centralize_at != Centre::gradient; }
  __device__ __forceinline__ bool noisy() const { return kFull && t_.sigma != T(0); }
  // Nobody has summed the squares of this row yet.
  __device__ __forceinline__ bool measures_units() const { return by_unit() && !r_.measured; }

  // Sets the unit's mean and factor. Returns its sum of squares if norms are by unit.
  __device__ __forceinline__ double measure(const Unit* known) {
    if (row_.centre && !late()) {
      if (r_.split) {
        mean_ = known ? T(known->mean) : T(0);
      } else {
        mean_ = T(g_.sum() / double(row_.length));
      }
    }
    if (!by_unit()) return 0;
    double squares, weights = 0;
    if (r_.split && row_.length > kBlockUnit) {
      squares = known ? known->squares : 0;
      weights = known ? known->weight_squares : 0;
    } else {
      squares = sum_group(g_.own_squares(mean_), g_.lanes);
      if (h_.agc) weights = sum_group(g_.own_squares_of(param_), g_.lanes);
    }
    factor_ = T(h_.agc ? math::agc_factor(h_.radius, sqrt(weights), sqrt(squares)) : math::perturb_factor(h_.perturb, sqrt(squares)));
    return squares;
  }

  static __device__ __forceinline__ T get(const Pack& v, int k) { return T(math::widen(v.at[k])); }

  __device__ __forceinline__ States load_states(int i) const {
    States s;
#pragma unroll
    for (int n = 0; n < R::states; ++n) s.of[n] = A::load(state_[n], i);
    return s;
  }
  __device__ __forceinline__ void store_states(int i, const States& s) const {
#pragma unroll
    for (int n = 0; n < R::states; ++n) A::store(state_[n], i, s.of[n]);
  }

  __device__ __forceinline__ void draw_noise(int i, float* z) const {
    if (noisy()) draw<width>(h_.seed, row_.parameter, uint32_t(now_.step - 1), begin_ + i, z);
  }

  // Stages 0 to 6.
  __device__ __forceinline__ T transformed(T x, float z, T p) const {
    math::Transform<T> t = t_;
    t.mean = mean_;
    if (by_unit()) t.factor = factor_;
    x = math::perturbed(x, t);
    if (noisy()) x = x + t_.sigma * T(z);
    x = x * t_.sign;
    return t_.decay != T(0) ? x + t_.decay * p : x;
  }

  // The direction the rule takes at element k.
  __device__ __forceinline__ T direction(T x, States& s, int k) const {
    T one[kMaxStates];
#pragma unroll
    for (int n = 0; n < R::states; ++n) one[n] = get(s.of[n], k);
    x = R::direction(x, one, coef_);
#pragma unroll
    for (int n = 0; n < R::states; ++n) math::put(one[n], s.of[n].at[k]);
    return x;
  }

  // This thread's part of the sum of what is to be centred late. With `keep` the tile holds it and the states have moved.
  __device__ __forceinline__ double own_rehearsal(bool keep) const {
    const bool directed = h_.centralize_at == Centre::update;
    double total = 0;
    g_.for_each([&](int i) {
      Pack p{};
      States s{};
      float z[width];
      if (t_.decay != T(0)) p = A::load(param_, i);
      if (directed) s = load_states(i);
      const Pack g = g_.read(i);
      draw_noise(i, z);
      Late late;
#pragma unroll
      for (int k = 0; k < width; ++k) {
        late.at[k] = transformed(get(g, k), z[k], get(p, k));
        if (directed) late.at[k] = direction(late.at[k], s, k);
        total += double(late.at[k]);
      }
      if (!keep) return;
      if (directed) store_states(i, s);
      g_.template slot<Late>(i) = late;
    });
    return total;
  }

  __device__ __forceinline__ void step(const Unit* known) {
    // Of what is centred late: its mean, and whether the tile has it.
    const bool decayed = late() && h_.centralize_at == Centre::decayed, directed = late() && !decayed;
    const bool kept = late() && !r_.split && g_.fits();
    T mean = T(0);
    if (late()) {
      if (r_.split) {
        mean = known ? T(known->direction) : T(0);
      } else {
        mean = T(sum_group(own_rehearsal(kept), g_.lanes) / double(row_.length));
      }
    }
    const bool moved = kept && directed;  // the states are where they shall be already
    g_.for_each([&](int i) {
      Pack p = A::load(param_, i), g{};
      States s{};
      Late held{};
      float z[width];
      if (!moved) s = load_states(i);
      if (kept) {
        held = g_.template slot<Late>(i);
      } else {
        g = g_.read(i);
        draw_noise(i, z);
      }
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const T weight = get(p, k);
        T x = kept ? held.at[k] : transformed(get(g, k), z[k], weight);
        if (decayed) x = x - mean;
        if (!moved) x = direction(x, s, k);
        if (directed) x = x - mean;
        math::put(weight * coef_.shrink - coef_.step * x, p.at[k]);
      }
      if (!moved) store_states(i, s);
      A::store(param_, i, p);
    });
  }

  const Job& job_;
  const DeviceRow& r_;
  const Row& row_;
  const Hyper& h_;
  const Chunk& c_;
  const Now& now_;
  // In shared memory: fewer registers.
  const typename R::template Coef<T>& coef_;
  const math::Transform<T>& t_;
  T mean_ = T(0), factor_ = T(1);  // of the unit
  int64_t begin_ = 0;  // of the unit or piece at hand
  typename A::Handle param_{}, state_[R::states ? R::states : 1]{};
  Gradient<A> g_;
};

// Where the block is.
struct Place {
  const Job& job;
  const DeviceRow& r;
  const Chunk& c;
  const Now& now;
  char* tile;
  int index;
  bool rehearsal;
};

template <class R, bool kFull> struct StepChunk {
  const Place& at;
  template <class A> __device__ __forceinline__ void operator()(A) const {
    Stepper<R, A, kFull>(at.job, at.r, at.c, at.now, at.tile).run(at.index, at.rehearsal);
  }
};

template <bool kFull> struct StepRule {
  const Place& at;
  template <class R> __device__ __forceinline__ void operator()(R) const {
    with_access<kFull>(at.r.row, at.job.grads[at.c.row], at.c.plain, StepChunk<R, kFull>{at});
  }
};

__device__ bool is_rehearsed(const Job& job, const DeviceRow& r) {
  return r.split && r.row.centre && job.hypers[r.row.group].hyper.centralize_at != Centre::gradient;
}

// By the last block, when nobody reads the step counts any more: a warp a row.
__device__ void finish(const Job& job, bool taken) {
  for (int i = int(threadIdx.x) / kLanes; i < job.row_count; i += kWarps) {
    DeviceRow& r = job.rows[i];
    if (taken && job.hypers[r.row.group].hyper.scope == Scope::unit && !r.measured) {
      const double squares = sum_chunks(r.chunk0, r.chunk1, [&](int c) { return job.sums[c].squares; });
      if (threadIdx.x % kLanes == 0) job.squares[i] = squares;
    }
    if (!taken || threadIdx.x % kLanes) continue;
    r.row.first = false;
    if (!r.row.step) continue;
    if (r.row.step_dtype == DType::float64) {
      *reinterpret_cast<double*>(r.row.step) += 1;
    } else {
      *reinterpret_cast<float*>(r.row.step) += 1;
    }
  }
}

// By the last block: the rehearsed means.
__device__ void finish_rehearsal(const Job& job) {
  for (int i = int(threadIdx.x) / kLanes; i < job.row_count; i += kWarps) {
    const DeviceRow& r = job.rows[i];
    if (!is_rehearsed(job, r) || !r.row.numel) continue;
    const auto sum = [&](int c) { return job.sums[c].sum; };
    const int64_t units = r.row.numel / r.row.length;
    const int pieces = int((r.row.length + kChunk - 1) / kChunk);
    double mean = 0;
    if (r.row.whole) mean = sum_chunks(r.chunk0, r.chunk1, sum) / double(r.row.numel);
    for (int64_t u = 0; u < units; ++u) {
      const int c0 = r.chunk0 + int(u) * pieces;
      if (!r.row.whole) mean = sum_chunks(c0, c0 + pieces, sum) / double(r.row.length);
      if (threadIdx.x % kLanes == 0) job.units[r.unit0 + u].direction = mean;
    }
  }
}

template <bool kFull> __global__ void __launch_bounds__(kThreads, kFull ? 2 : 3) apply(const __grid_constant__ Job job, const bool rehearsal) {
  alignas(16) __shared__ char tile[kTileBytes];
  __shared__ Now now;
  const bool refused = job.found_inf && *job.found_inf != 0;
  const bool spoilt = !refused && is_spoilt(job);
  const double global = global_squares(job);
  if (threadIdx.x == 0) now.row = -1;
  __syncthreads();
  int entered = -1;
  const Share share = share_of(refused || spoilt ? 0 : job.chunk_count);
  for (int index = share.end - 1; index >= share.first; --index) {
    const Chunk& c = job.chunks[index];
    const DeviceRow& r = job.rows[c.row];
    if (rehearsal && !is_rehearsed(job, r)) continue;
    if (c.row != entered) enter_row(job, now, entered = c.row, global);
    with_rule(r.row.rule, StepRule<kFull>{{job, r, c, now, tile, index, rehearsal}});
  }
  if (!last_block(job.tickets)) return;
  if (rehearsal) return finish_rehearsal(job);
  finish(job, !refused && !spoilt);
  if (spoilt && threadIdx.x == 0) *job.skipped += 1;
}

}  // namespace

#if GRADFUSED_FULL
#define GRADFUSED_LAUNCHER(family) GRADFUSED_NAME(GRADFUSED_NAME(apply_, family), _full)
#else
#define GRADFUSED_LAUNCHER(family) GRADFUSED_NAME(GRADFUSED_NAME(apply_, family), _lean)
#endif

void GRADFUSED_LAUNCHER(GRADFUSED_FAMILY)(const Job& job, Doing doing, int device, void* stream) {
  launch<apply<bool(GRADFUSED_FULL)>>("apply", job.chunk_count, device, stream, job, doing == Doing::rehearsal);
}

}  // namespace gradfused::cuda
