// LPG cross-entropy on the CPU: deals rows out to threads and combines what they find.
#pragma once

#include "lpg/problem.h"

namespace gradfused::lpg {

struct Totals {
  double* total;  // [2]: the sum of the losses, and of the class weights of the rows that count
  double* tally;  // null, or [3][classes]: each class's number of rows, their summed confidence and summed norm
};

struct Perturbation {
  const double* bound;  // [classes]: the radius with the sign of its direction
  bool by_sample;       // each row is moved along its own gradient, else along its class's mean
  const void* means;    // T[classes][classes]: the means to use; null for those of the batch
};

// The first row whose target is neither a class nor ignored, or -1. The functions below trust the targets.
int64_t find_stray(const Problem& p);

// Fills p.saved, loss (T[rows]) and the totals.
void forward(const Problem& p, void* loss, const Totals& to);

void backward(const Problem& p, const GradientOut& to, const Perturbation& how);

// to, T[classes][classes] <- the sums of each class's logit gradients.
void class_sums(const Problem& p, void* to);

}  // namespace gradfused::lpg
