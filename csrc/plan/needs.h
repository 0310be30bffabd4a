// What a step has to do for a row, decided here and nowhere else: engines and kernels read the bits.
#pragma once

#include <cstdint>

#include "schema.h"

namespace gradfused {

// The passes of a step in their order. Only `step` changes tensors; the others leave sums behind for the rows that need them.
#define GRADFUSED_PHASES(PHASE)                                                                                 \
  PHASE(means)       /* of gradients whose mean takes several chunks */                                         \
  PHASE(norms)       /* of centred gradients */                                                                 \
  PHASE(early_trust) /* norms for a trust ratio that a late mean depends on */                                  \
  PHASE(late_means)  /* of what is centred after the gradient was transformed, where it takes several chunks */ \
  PHASE(late_trust)  /* norms for the other trust ratios */                                                     \
  PHASE(step)

enum class Phase : int8_t {
#define GRADFUSED_PHASE(name) name,
  GRADFUSED_PHASES(GRADFUSED_PHASE)
#undef GRADFUSED_PHASE
      count
};

// The first bits are the phases that a row takes part in, in their order.
#define GRADFUSED_NEEDS(NEED)                                                            \
  GRADFUSED_PHASES(NEED)                                                                 \
  NEED(long_units)     /* a unit takes several chunks */                                 \
  NEED(split)          /* a mean or a norm of its units takes several chunks */          \
  NEED(centre_early)   /* the gradient is centred */                                     \
  NEED(centre_decayed) /* the gradient is centred after weight decay was added */        \
  NEED(centre_update)  /* the rule's direction is centred */                             \
  NEED(global_norm)                                                                      \
  NEED(wide_norm) /* its norm is over more than a unit; global norms are wide as well */ \
  NEED(unit_norms)                                                                       \
  NEED(agc)                                                                              \
  NEED(skip) /* a step whose norms are not finite is skipped */                          \
  NEED(noise)                                                                            \
  NEED(source) /* weights are read from the source */                                    \
  NEED(copy)   /* weights have a float32 copy to be read */                              \
  NEED(kahan)                                                                            \
  NEED(stochastic)                                                                       \
  NEED(master) /* the float32 copy is written */                                         \
  NEED(ema)                                                                              \
  NEED(zero_grad_in_step)                                                                \
  NEED(mu_product) /* the product of momenta is kept */                                  \
  NEED(empty)      /* the row has no elements here */                                    \
  NEED(full)       /* the kernel with all registers: more than centring, wide norms and float32 */

#define GRADFUSED_NEED_SETS(SET)                                                                  \
  SET(centre_late)                                                                                \
  SET(measured) /* before the step begins: phases that one launch of a device's takes together */ \
  SET(riders)   /* the weights are more than an array that is read and written */

struct Need {
  enum Index {
#define GRADFUSED_NEED(name) index_##name,
    GRADFUSED_NEEDS(GRADFUSED_NEED)
#undef GRADFUSED_NEED
  };
  enum Bits : uint32_t {
#define GRADFUSED_NEED(name) name = 1u << index_##name,
    GRADFUSED_NEEDS(GRADFUSED_NEED)
#undef GRADFUSED_NEED
            centre_late = centre_decayed |
        centre_update,
    measured = means | norms,
    riders = source | copy | kahan | stochastic | master | ema | zero_grad_in_step,
  };
};

// A set of Need's bits, of a row or of all rows of a table.
using Needs = uint32_t;

constexpr Needs need_of(Phase phase) { return 1u << int(phase); }

// A rule with more states needs more registers than a lean kernel has: Adan's loops in 16 bits kept 15 values in local memory.
constexpr int kLeanStates = 3;

// What a row needs of a step, where units longer than `longest` are cut into several chunks. It depends only on settings whose change makes
// a new table.
Needs needs_of(const Row& row, const Settings& settings, int64_t longest);

}  // namespace gradfused
