// Every rule of rules.def.
#pragma once

#include "rules.def"

namespace gradfused::math {
namespace {

// What a rule declares of itself.
struct RuleTraits {
  int states;  // how many state tensors it has
  bool reads_state, mu_product;
  Trust trust;
  const char* family;
};

[[maybe_unused]] constexpr RuleTraits traits_of(Rule rule) {
  switch (rule) {
#define GRADFUSED_RULE(name, type, family) \
  case Rule::name: return {type::states, type::reads_state, type::mu_product, type::trust, #family};
#include "rules.def"
#undef GRADFUSED_RULE
    default: return {};
  }
}

}  // namespace
}  // namespace gradfused::math
