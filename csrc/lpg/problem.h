// A batch of LPG cross-entropy, and what the engine asks of one instruction set's kernels. T is the type of all arithmetic: double for float64
// logits, else float.
#pragma once

#include "math/device.h"
#include "schema.h"

namespace gradfused::lpg {

struct Problem {
  const char* logits;
  DType dtype;
  int64_t rows, classes;
  // In elements, logit j of row i lies at i / inner * outer_stride + i % inner * inner_stride + j * class_stride. Kernels that work by row
  // need inner = rows and class_stride = 1.
  int64_t inner, outer_stride, inner_stride, class_stride;
  bool by_column;  // use ColumnKernels
  const int64_t* target;
  int64_t ignore_index;
  const void* weight;  // T[classes], or null
  double weight_sum;   // without weights the number of classes
  double smoothing;
  void* saved;  // T[rows][3]: see Saved in rows.h
  int threads;

  // The part of the target distribution that each class but the row's own has.
  double share() const { return smoothing / double(classes); }
  bool counts(int64_t row) const { return target[row] != ignore_index; }
};

// What the forward writes, T[rows] each. The last two may be null.
struct RowResults {
  void* loss;
  void* confidence;  // the probability of the row's own class
  void* norm;        // of the row's logit gradient
};

// Where the backward writes, and what each row's gradient is multiplied by.
struct GradientOut {
  char* out;  // in the dtype of the logits, without gaps
  const double* factor;
  int64_t factor_stride;  // 0: one factor for all rows
};

// What is added to a row's logit gradient g: along * scale * mean, and along * own_mean for the row's own class. Without a mean, along * g.
struct Delta {
  double along = 0;
  const void* mean = nullptr;  // T[classes]; the value of the rows' own class is not read
  double scale = 1, own_mean = 0;
};

namespace {
// The closed form of delta as a multiple of a gradient with this norm; 0 for a gradient without a direction.
GRADFUSED_MATH double along(double bound, double norm) {
  if (!(norm > 0)) return 0;
  return (bound < 0 ? -math::smaller(-bound, norm) : bound) / norm;
}
}  // namespace

// Kernels whose lanes are classes: for many classes.
struct RowKernels {
  void (*forward)(const Problem&, const RowResults&, int64_t begin, int64_t end);
  // sums[j] <- the sum of the gradients of rows[0..count), which are of one class, at every other class j. Returns the sum at their own.
  double (*accumulate)(const Problem&, const int64_t* rows, int64_t count, void* sums);
  // The sum of (scale * mean[j])^2 over all j but one.
  double (*squares)(const Problem&, const void* mean, double scale, int64_t but);
  // The norm of one row's logit gradient.
  double (*norm)(const Problem&, int64_t row);
  // The perturbed gradient of one row; zeros if it is ignored.
  void (*write)(const Problem&, const GradientOut&, const Delta&, int64_t row);
};

// How kernels by column perturb: by at most one of these.
struct ColumnDeltas {
  const double* bound;  // [classes]: each row is moved along its own gradient
  const void* deltas;   // T[classes][classes]: column c is the delta of class c
};

// Kernels whose lanes are rows: for few classes, and for dense predictions, whose neighbours in memory are rows.
struct ColumnKernels {
  void (*forward)(const Problem&, const RowResults&, int64_t begin, int64_t end);
  // sums, T[classes][classes] <- in row c the sum of the gradients of class c's rows.
  void (*add)(const Problem&, int64_t begin, int64_t end, void* sums);
  // Gradients are written in the layout of the logits, without gaps.
  void (*write)(const Problem&, const GradientOut&, const ColumnDeltas&, int64_t begin, int64_t end);
};

const RowKernels& row_kernels_generic();
const RowKernels& row_kernels_avx2();
const RowKernels& row_kernels_avx512();
const ColumnKernels& column_kernels_generic();
const ColumnKernels& column_kernels_avx2();
const ColumnKernels& column_kernels_avx512();

}  // namespace gradfused::lpg
