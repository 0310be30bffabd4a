// The kernels of one instruction set. This file is compiled once for each with GRADFUSED_ISA naming it, and runs only where the
// machine has it; nothing here but kernels_<isa>() is visible outside.
#include "cpu/stepper.h"

namespace gradfused::cpu {
namespace {

template <class T> void mean_of_chunk(const Place& at, char* scratch) {
  const T unscale = T(at.job.unscale);
  RunningMean<T> mean;
  at.for_each_block([&](const Block& b) {
    mean.add(open(at.row.grad, b.begin, b.count, buffer<T>(scratch, kRaw)), b.count, [unscale](T v) { return v * unscale; });
  });
  at.job.chunk_mean[at.index] = mean.get();
}

// The gradient times what each weight may move by.
template <class T> const T* reached(const Place& at, const Block& b, const T* g, char* scratch) {
  const T* const p = open_weights<T>(at, b, scratch, false);
  T* const to = buffer<T>(scratch, kGrad);
  const T eta = T(at.settings.eta);
  for (int64_t i = 0; i < b.count; ++i) to[i] = g[i] * math::reach(p[i], eta);
  return to;
}

template <class T> void squares_chunk(const Place& at, char* scratch) {
  const bool weights = at.settings.agc && at.row.unit_length > kUnitMax;
  double sum = 0, weight_sum = 0;
  at.for_each_block([&](const Block& b) {
    const T* g = open(at.row.grad, b.begin, b.count, buffer<T>(scratch, kRaw));
    PerUnit<T> means;
    PerUnit<double> squares;
    means_of(at, b, g, means);
    if (at.centre_gradient && !at.now.means_known) {
      for (int64_t u = 0; u < b.units; ++u) at.job.unit_mean[b.unit0 + u] = double(means.at[u]);
    }
    if (at.settings.adaptive) g = reached(at, b, g, scratch);
    squares_of(at, b, g, means, squares);
    sum += total(squares, b.units);
    if (!weights) return;
    weight_squares_of(b, open_weights<T>(at, b, scratch, false), squares);
    weight_sum += total(squares, b.units);
  });
  at.job.chunk_sq[at.index] = sum;
  if (weights) at.job.chunk_weight_sq[at.index] = weight_sum;
}

// The type to compute in: float64 for float64 parameters, else float32.
template <class F> void in_compute_type(const Row& row, F run) { row.param.dtype == DType::float64 ? run(double{}) : run(float{}); }

template <class F> void with_rule(Rule rule, F run) {
  switch (rule) {
#define GRADFUSED_RULE(name, type, family) \
  case Rule::name: return run(math::type{});
#include "rules.def"
#undef GRADFUSED_RULE
    case Rule::count: return;
  }
}

void mean(const Job& job, int64_t index, char* scratch) {
  const Place at{job, index};
  in_compute_type(at.row, [&](auto t) { mean_of_chunk<decltype(t)>(at, scratch); });
}

void squares(const Job& job, int64_t index, char* scratch) {
  const Place at{job, index};
  in_compute_type(at.row, [&](auto t) { squares_chunk<decltype(t)>(at, scratch); });
}

void rehearse(const Job& job, int64_t index, char* scratch) {
  const Place at{job, index};
  with_rule(at.row.rule,
            [&](auto rule) { in_compute_type(at.row, [&](auto t) { Stepper<decltype(rule), decltype(t)>(at, scratch).rehearse(); }); });
}

void weigh(const Job& job, int64_t index, char* scratch) {
  const Place at{job, index};
  with_rule(at.row.rule, [&](auto rule) {
    if constexpr (decltype(rule)::trust != math::Trust::none) {
      in_compute_type(at.row, [&](auto t) { Stepper<decltype(rule), decltype(t)>(at, scratch).weigh(); });
    }
  });
}

void apply(const Job& job, int64_t index, char* scratch) {
  const Place at{job, index};
  with_rule(at.row.rule,
            [&](auto rule) { in_compute_type(at.row, [&](auto t) { Stepper<decltype(rule), decltype(t)>(at, scratch).apply(); }); });
}

// 4 reads and 3 writes when called with AdamW's streams. Adding `nothing`, a zero the compiler does not know, keeps values as they are.
void roof(float* const* written, int writes, const float* const* read, int reads, int64_t begin, int64_t end, float nothing) {
  if (writes == 3 && reads == 1) {
    float* __restrict a = written[0];
    float* __restrict b = written[1];
    float* __restrict c = written[2];
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
  static constexpr Kernels kernels = {GRADFUSED_TEXT(GRADFUSED_ISA),
                                      mean,
                                      squares,
                                      rehearse,
                                      weigh,
                                      apply,
                                      roof,
                                      GRADFUSED_NAME(lpg_kernels_, GRADFUSED_ISA),
                                      GRADFUSED_NAME(lpg_column_kernels_, GRADFUSED_ISA)};
  return kernels;
}

}  // namespace gradfused::cpu
