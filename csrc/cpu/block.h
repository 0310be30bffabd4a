// A chunk is walked in blocks that fit the L1 cache; here are blocks and the statistics of a block's units.
#pragma once

#include "cpu/kernels.h"
#include "cpu/stream.h"
#include "math/rule.h"

namespace gradfused::cpu {
namespace {

// ---- sums in float64 over a fixed number of lanes: the same bits on every instruction set

constexpr int kLanes = 16;
constexpr int kRun = 16;

// The sum of term(x[i]). Terms are added in their own type for a run of 16 a lane, and runs in float64: float32 terms then cost a third
// of what widening each would, and lose nothing that matters. Plain lanes, which the compiler keeps in registers; its own 8-wide vector
// type was 5 times slower.
template <class T, class Term> double reduce(const T* __restrict x, int64_t n, Term term) {
  using A = decltype(term(x[0]));
  double lanes[kLanes] = {};
  int64_t i = 0;
  while (i + kLanes <= n) {
    A run[kLanes] = {};
    const int64_t left = (n - i) / kLanes, end = i + (left < kRun ? left : kRun) * kLanes;
    for (; i < end; i += kLanes) {
      for (int k = 0; k < kLanes; ++k) run[k] += term(x[i + k]);
    }
    for (int k = 0; k < kLanes; ++k) lanes[k] += double(run[k]);
  }
  for (int k = 0; i < n; ++i, ++k) lanes[k] += double(term(x[i]));
  for (int half = kLanes / 2; half; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

// Up to this length a unit is too short for lanes of its own: lanes then run over units.
constexpr int64_t kShortUnit = 64;
constexpr int kUnitsAbreast = 8;

// totals[u] <- the sum of term(u, x[i]) over unit u, for units that lie one after another.
template <class T, class Term>
void reduce_units(const T* __restrict x, int64_t length, int64_t units, double* __restrict totals, Term term) {
  int64_t u = 0;
  if (length <= kShortUnit) {
    for (; u + kUnitsAbreast <= units; u += kUnitsAbreast) {
      double lanes[kUnitsAbreast] = {};
      for (int64_t i = 0; i < length; ++i) {
        for (int k = 0; k < kUnitsAbreast; ++k) lanes[k] += double(term(u + k, x[(u + k) * length + i]));
      }
      for (int k = 0; k < kUnitsAbreast; ++k) totals[u + k] = lanes[k];
    }
    for (; u < units; ++u) {
      totals[u] = 0;
      for (int64_t i = 0; i < length; ++i) totals[u] += double(term(u, x[u * length + i]));
    }
    return;
  }
  for (; u < units; ++u) totals[u] = reduce(x + u * length, length, [&](T v) { return term(u, v); });
}

// totals[u] <- the sum of value(u, x[i])^2 over unit u. Squares of float32 have half its range: they are taken in float32, and again in
// float64 for a unit whose sum comes near either end of it, or is not finite.
template <class T, class Value>
void reduce_squares(const T* __restrict x, int64_t length, int64_t units, double* __restrict totals, Value value) {
  reduce_units(x, length, units, totals, [&value](int64_t u, T v) {
    const T d = value(u, v);
    return d * d;
  });
  if (sizeof(T) == sizeof(double)) return;
  for (int64_t u = 0; u < units; ++u) {
    if (totals[u] > 1e-28 && totals[u] < 1e36) continue;
    totals[u] = reduce(x + u * length, length, [&value, u](T v) {
      const double d = double(value(u, v));
      return d * d;
    });
  }
}

// ---- blocks

using math::smaller;

enum Buffer { kRaw, kGrad, kNoise, kParam, kState };

template <class T> T* buffer(char* scratch, int which) { return reinterpret_cast<T*>(scratch) + which * kUnitMax; }

// A block: elements [begin, begin + count) of a row as whole units of one length, or as a piece of a long one.
struct Block {
  int64_t begin, count;
  int64_t units, length;  // within the block
  int64_t unit0;          // the index of the first one in CpuJob's arrays
};

// Everything that a chunk's kernels read.
struct ChunkContext {
  const CpuJob& job;
  const int64_t index;
  const CpuChunk& chunk = job.chunks[index];
  const Row& row = job.rows[chunk.row];
  const Settings& settings = job.settings[row.group];
  const RowStep& now = job.steps[chunk.row];
  // Blocks are made of whole units: units have a mean or norm of their own, and they fit a buffer.
  const bool whole_units = !needs(Need::long_units) && (row.centre || needs(Need::unit_norms));

  bool needs(Needs bits) const { return now.needs & bits; }

  template <class F> void for_each_block(F work) const {
    const int64_t most = whole_units ? (row.unit_length < kBlock ? kBlock / row.unit_length : 1) * row.unit_length : kBlock;
    const int64_t end = chunk.begin + chunk.count;
    for (int64_t begin = chunk.begin; begin < end; begin += most) {
      const int64_t count = smaller(most, end - begin), length = whole_units ? row.unit_length : count;
      work(Block{begin, count, count / length, length, now.unit0 + begin / row.unit_length});
    }
  }
};

// A number for each unit of a block.
template <class T> struct PerUnit {
  T value[kBlock];
};

// means <- the mean of value(x[i]) over each unit of a block.
template <class T, class Value> void means_of_units(const Block& b, const T* x, Value value, PerUnit<T>& means) {
  PerUnit<T> anchors;
  PerUnit<double> sums;
  for (int64_t u = 0; u < b.units; ++u) anchors.value[u] = math::anchor(value(x[u * b.length]));
  reduce_units(x, b.length, b.units, sums.value, [&anchors, value](int64_t u, T v) { return value(v) - anchors.value[u]; });
  for (int64_t u = 0; u < b.units; ++u) means.value[u] = T(double(anchors.value[u]) + sums.value[u] / double(b.length));
}

// A mean that is computed block by block.
template <class T> class BlockMean {
 public:
  template <class Value> void add(const T* x, int64_t n, Value value) {
    if (count_ == 0) anchor_ = math::anchor(value(x[0]));
    const T anchor = anchor_;
    sum_ += reduce(x, n, [value, anchor](T v) { return value(v) - anchor; });
    count_ += n;
  }
  double get() const { return double(anchor_) + sum_ / double(count_); }

 private:
  T anchor_ = T(0);
  double sum_ = 0;
  int64_t count_ = 0;
};

// means <- the means that centring subtracts from the gradient; zero without centring.
template <class T> void means_of(const ChunkContext& context, const Block& b, const T* g, PerUnit<T>& means) {
  if (!context.needs(Need::centre_early)) {
    for (int64_t u = 0; u < b.units; ++u) means.value[u] = T(0);
  } else if (context.now.means_known) {
    for (int64_t u = 0; u < b.units; ++u) means.value[u] = T(context.job.unit_mean[b.unit0 + u]);
  } else {
    const T unscale = T(context.job.unscale);
    means_of_units(b, g, [unscale](T v) { return v * unscale; }, means);
  }
}

// squares <- each unit's sum of squares of the centred gradient.
template <class T>
void squares_of(const ChunkContext& context, const Block& b, const T* g, const PerUnit<T>& means, PerUnit<double>& squares) {
  const T unscale = T(context.job.unscale);
  reduce_squares(g, b.length, b.units, squares.value,
                 [&means, unscale](int64_t u, T v) { return math::centred(v, unscale, means.value[u]); });
}

template <class T> void weight_squares_of(const Block& b, const T* p, PerUnit<double>& squares) {
  reduce_squares(p, b.length, b.units, squares.value, [](int64_t, T v) { return v; });
}

// The sum of squares of an array.
template <class T> double squares(const T* x, int64_t n) {
  double total;
  reduce_squares(x, n, 1, &total, [](int64_t, T v) { return v; });
  return total;
}

inline double total(const PerUnit<double>& values, int64_t units) {
  double sum = 0;
  for (int64_t u = 0; u < units; ++u) sum += values.value[u];
  return sum;
}

}  // namespace
}  // namespace gradfused::cpu
