// The kernels of one instruction set. This file is compiled once for each with GRADFUSED_ISA naming it, and runs only where the
// machine has it; nothing here but kernels_<isa>() is visible outside.
#include "cpu/stepper.h"

namespace gradfused::cpu {
namespace {

template <class T> void mean_of_chunk(const ChunkContext& context, char* scratch) {
  const T unscale = T(context.job.unscale);
  BlockMean<T> mean;
  context.for_each_block([&](const Block& b) {
    mean.add(open(context.row.grad, b.begin, b.count, buffer<T>(scratch, kRaw)), b.count, [unscale](T v) { return v * unscale; });
  });
  context.job.chunk_mean[context.index] = mean.get();
}

// The gradient times what each weight may move by.
template <class T> const T* reached(const ChunkContext& context, const Block& b, const T* g, char* scratch) {
  const T* const p = open_weights<T>(context, b, scratch, false);
  T* const to = buffer<T>(scratch, kGrad);
  const T eta = T(context.settings.eta);
  for (int64_t i = 0; i < b.count; ++i) to[i] = g[i] * math::reach(p[i], eta);
  return to;
}

template <class T> void squares_chunk(const ChunkContext& context, char* scratch) {
  const bool weights = context.needs(Need::agc) && context.needs(Need::long_units);
  double sum = 0, weight_sum = 0;
  context.for_each_block([&](const Block& b) {
    const T* g = open(context.row.grad, b.begin, b.count, buffer<T>(scratch, kRaw));
    PerUnit<T> means;
    PerUnit<double> squares;
    means_of(context, b, g, means);
    if (context.needs(Need::centre_early) && !context.now.means_known) {
      for (int64_t u = 0; u < b.units; ++u) context.job.unit_mean[b.unit0 + u] = double(means.value[u]);
    }
    if (context.settings.adaptive) g = reached(context, b, g, scratch);
    squares_of(context, b, g, means, squares);
    sum += total(squares, b.units);
    if (!weights) return;
    weight_squares_of(b, open_weights<T>(context, b, scratch, false), squares);
    weight_sum += total(squares, b.units);
  });
  context.job.chunk_sq[context.index] = sum;
  if (weights) context.job.chunk_weight_sq[context.index] = weight_sum;
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

void means(const CpuJob& job, int64_t index, char* scratch) {
  const ChunkContext context{job, index};
  in_compute_type(context.row, [&](auto t) { mean_of_chunk<decltype(t)>(context, scratch); });
}

void norms(const CpuJob& job, int64_t index, char* scratch) {
  const ChunkContext context{job, index};
  in_compute_type(context.row, [&](auto t) { squares_chunk<decltype(t)>(context, scratch); });
}

void late_means(const CpuJob& job, int64_t index, char* scratch) {
  const ChunkContext context{job, index};
  with_rule(context.row.rule, [&](auto rule) {
    in_compute_type(context.row, [&](auto t) { Stepper<decltype(rule), decltype(t)>(context, scratch).late_mean(); });
  });
}

void trust(const CpuJob& job, int64_t index, char* scratch) {
  const ChunkContext context{job, index};
  with_rule(context.row.rule, [&](auto rule) {
    if constexpr (decltype(rule)::trust != math::Trust::none) {
      in_compute_type(context.row, [&](auto t) { Stepper<decltype(rule), decltype(t)>(context, scratch).trust_norms(); });
    }
  });
}

void step(const CpuJob& job, int64_t index, char* scratch) {
  const ChunkContext context{job, index};
  with_rule(context.row.rule, [&](auto rule) {
    in_compute_type(context.row, [&](auto t) { Stepper<decltype(rule), decltype(t)>(context, scratch).step(); });
  });
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
                                      means,
                                      norms,
                                      late_means,
                                      trust,
                                      step,
                                      roof,
                                      lpg::GRADFUSED_NAME(row_kernels_, GRADFUSED_ISA),
                                      lpg::GRADFUSED_NAME(column_kernels_, GRADFUSED_ISA)};
  return kernels;
}

}  // namespace gradfused::cpu
