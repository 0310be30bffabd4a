// A chunk is walked in blocks that fit the L1 cache; here are blocks and the statistics of a block's units.
#pragma once

#include "cpu/kernels.h"
#include "cpu/reduce.h"
#include "cpu/stream.h"
#include "math/rule.h"

namespace gradfused::cpu {
namespace {

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
