// Every rule of rules.def.
#pragma once

#include "math/adagrad.h"
#include "math/adam.h"
#include "math/adan.h"
#include "math/ascend.h"
#include "math/lamb.h"
#include "math/lars.h"
#include "math/lion.h"
#include "math/nadam.h"
#include "math/radam.h"
#include "math/rmsprop.h"
#include "math/sgd.h"

namespace gradfused::math {
namespace {

[[maybe_unused]] Trust trust_of(Rule rule) {
  switch (rule) {
#define GRADFUSED_RULE(name, type, family) \
  case Rule::name: return type::trust;
#include "rules.def"
#undef GRADFUSED_RULE
    default: return Trust::none;
  }
}

}  // namespace
}  // namespace gradfused::math
