// LPG cross-entropy: rows of logits, and what the engine asks of an instruction set's kernels. T below is float64 for float64 logits, else
// float32.
#pragma once

#include "math/device.h"
#include "schema.h"

namespace gradfused::cpu {

struct LpgProblem {
  const char* logits;
  DType dtype;
  int64_t rows, classes;
  // Where logit j of row i lies, in elements: i / inner * outer_stride + i % inner * inner_stride + j * class_stride. The kernels by row
  // want class_stride 1 and rows at one distance: inner = rows.
  int64_t inner, outer_stride, inner_stride, class_stride;
  bool columns;  // a lane is a row: LpgColumnKernels
  const int64_t* target;
  int64_t ignore_index;
  const void* weight;  // T a class, or null
  double weight_sum;   // the classes' number without weights
  double smoothing;
  void* saved;  // kSaved values of T a row: the greatest logit m; of the other classes, the sums of exp(x - m) and its square

  double share() const { return smoothing / double(classes); }  // of the target distribution, for each class but the row's own
  bool counts(int64_t row) const { return target[row] != ignore_index; }
};
constexpr int kSaved = 3;

// What the forward finds of each row, in T. The last two may be null: the own class's probability, the norm of the logit gradient.
struct LpgRows {
  void *loss, *confidence, *norm;
};

// The gradient of rows.
struct LpgGradient {
  char* out;  // as the logits, its rows one after another
  const double* factor;
  int64_t factor_stride;  // 0: one for all
};

// What is added to the logit gradients g of a class's rows: along * scale * mean, and along * own_mean for their own class.
// Without `mean`: along * g.
struct LpgDelta {
  double along = 0;
  const void* mean = nullptr;  // T a class; its own class's value is not read
  double scale = 1, own_mean = 0;
};

namespace {
// The closed form of delta, as a multiple of a gradient of this norm; 0 where that has no direction.
GRADFUSED_MATH double along(double bound, double norm) {
  if (!(norm > 0)) return 0;
  return (bound < 0 ? -math::smaller(-bound, norm) : bound) / norm;
}
}  // namespace

struct LpgKernels {
  void (*forward)(const LpgProblem&, const LpgRows&, int64_t begin, int64_t end);
  // sums[j] <- the sum of class j's gradient over rows[0..count), for all j but their own class; returns the sum for that one.
  double (*accumulate)(const LpgProblem&, const int64_t* rows, int64_t count, void* sums);
  // The sum of (scale * mean[j])^2 over all j but one.
  double (*squares)(const LpgProblem&, const void* mean, double scale, int64_t but);
  // The norm of one row's logit gradient.
  double (*norm)(const LpgProblem&, int64_t row);
  // The perturbed gradient of one row that counts, or zeros for one that does not.
  void (*write)(const LpgProblem&, const LpgGradient&, const LpgDelta&, int64_t row);
  // to[j] <- the sum of parts[k * classes + j] over k, for begin <= j < end. to may be the first part.
  void (*combine)(const LpgProblem&, const void* parts, int64_t count, void* to, int64_t begin, int64_t end);
};

// How a gradient by column is perturbed: by one of these, or not at all.
struct LpgColumns {
  const double* bound;  // a class: each row along its own gradient
  const void* deltas;   // T: class c's delta in column c, classes * classes
};

// The same with a lane a row. Gradients are written as the logits lie, without gaps.
struct LpgColumnKernels {
  void (*forward)(const LpgProblem&, const LpgRows&, int64_t begin, int64_t end);
  // sums, classes * classes <- in row c, the sums of the gradients of class c's rows.
  void (*add)(const LpgProblem&, int64_t begin, int64_t end, void* sums);
  void (*write)(const LpgProblem&, const LpgGradient&, const LpgColumns&, int64_t begin, int64_t end);
};

const LpgColumnKernels& lpg_column_kernels_generic();
const LpgColumnKernels& lpg_column_kernels_avx2();
const LpgColumnKernels& lpg_column_kernels_avx512();

const LpgKernels& lpg_kernels_generic();
const LpgKernels& lpg_kernels_avx2();
const LpgKernels& lpg_kernels_avx512();

}  // namespace gradfused::cpu
