// LPG cross-entropy on the CPU: who works on which rows, in which order, and what is combined in between.
#pragma once

#include "lpg/problem.h"

namespace gradfused::cpu {

// What the forward returns besides its rows.
struct LpgTotals {
  double* total;  // 2: the sum of the losses, and of the weights of the rows that count
  double* tally;  // null, or 3 * classes: of each class, rows that count, their summed confidence and norm
};

// How logit gradients are perturbed.
struct LpgHow {
  const double* bound;  // a class: eps with the sign of its direction
  bool by_sample;       // each row follows its own gradient, else its class's mean
  const void* means;    // T, classes * classes: the means to follow; null for the rows' own
};

// The first row whose target is no class, or -1.
int64_t lpg_stray(const LpgProblem& p);

// Fills p.saved, loss, total and tally. Targets are classes.
void lpg_forward(const LpgProblem& p, void* loss, const LpgTotals& to, int threads);

void lpg_backward(const LpgProblem& p, const LpgGradient& gradient, const LpgHow& how, int threads);

// to, T and classes * classes: the sum of each class's logit gradients.
void lpg_class_sums(const LpgProblem& p, void* to, int threads);

}  // namespace gradfused::cpu
