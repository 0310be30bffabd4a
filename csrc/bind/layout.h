// Where Triton's kernels, which know no C++, find what a table in device memory holds: byte offsets, sizes, enumerators and bits by name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "bind/schema.h"
#include "math/rules.h"
#include "plan/layout.h"

namespace gradfused::bind {

using Layout = std::map<std::string, int64_t>;

template <class E> void add_values(Layout& layout, const std::string& type) {
  for (size_t i = 0; i < names_of<E>().size(); ++i) layout[type + "_" + names_of<E>()[i]] = int64_t(i);
}

// What the rules declare: a bit or three for each, at the place of its number.
inline void add_rules(Layout& layout) {
  constexpr int kBits = 3;  // enough for a count of states
  static_assert(kMaxStates < 1 << kBits && kBits * int(Rule::count) < 63, "the rules' counts of states have room");
  for (const char* name : {"states", "unread", "mu_product", "trust_gradient", "trust_update"}) layout[std::string("rules_") + name] = 0;
  for (int r = 0; r < int(Rule::count); ++r) {
    const math::RuleTraits rule = math::traits_of(Rule(r));
    layout["rules_states"] |= int64_t{rule.states} << (kBits * r);
    layout["rules_unread"] |= int64_t{!rule.reads_state} << r;
    layout["rules_mu_product"] |= int64_t{rule.mu_product} << r;
    layout["rules_trust_gradient"] |= int64_t{rule.trust == math::Trust::gradient} << r;
    layout["rules_trust_update"] |= int64_t{rule.trust == math::Trust::update} << r;
  }
}

inline void add_needs(Layout& layout) {
#define GRADFUSED_NEED(name) layout["Need_" #name] = int64_t(Need::name);
  GRADFUSED_NEEDS(GRADFUSED_NEED)
  GRADFUSED_NEED_SETS(GRADFUSED_NEED)
#undef GRADFUSED_NEED
#define GRADFUSED_PHASE(name) layout["Phase_" #name] = int64_t(Phase::name);
  GRADFUSED_PHASES(GRADFUSED_PHASE)
#undef GRADFUSED_PHASE
}

inline Layout layout() {
  using namespace device;
  Layout layout;
#define GRADFUSED_AT(prefix, type, field) layout[#prefix "_" #field] = int64_t(offsetof(type, field));
#define GRADFUSED_SIZE(type) layout[#type] = int64_t(sizeof(type));
  GRADFUSED_AT(job, Job, rows)
  GRADFUSED_AT(job, Job, settings)
  GRADFUSED_AT(job, Job, chunks)
  GRADFUSED_AT(job, Job, grads)
  GRADFUSED_AT(job, Job, sums)
  GRADFUSED_AT(job, Job, units)
  GRADFUSED_AT(job, Job, squares)
  GRADFUSED_AT(job, Job, tickets)
  GRADFUSED_AT(job, Job, skipped)
  GRADFUSED_AT(job, Job, needs)
  GRADFUSED_AT(job, Job, row_count)
  GRADFUSED_AT(job, Job, chunk_count)
  GRADFUSED_AT(chunk, Chunk, begin)
  GRADFUSED_AT(chunk, Chunk, count)
  GRADFUSED_AT(chunk, Chunk, row)
  GRADFUSED_AT(chunk, Chunk, lanes)
  GRADFUSED_AT(chunk, Chunk, plain)
  GRADFUSED_AT(operand, Operand, data)
  GRADFUSED_AT(operand, Operand, dtype)
  GRADFUSED_AT(operand, Operand, dims)
  GRADFUSED_AT(operand, Operand, sizes)
  GRADFUSED_AT(operand, Operand, strides)
  GRADFUSED_AT(row, DeviceRow, needs)
  GRADFUSED_AT(row, DeviceRow, unit0)
  GRADFUSED_AT(row, DeviceRow, chunk0)
  GRADFUSED_AT(row, DeviceRow, chunk1)
  GRADFUSED_AT(row, DeviceRow, norm)
  GRADFUSED_AT(row, DeviceRow, weight_norm)
  GRADFUSED_AT(settings, DeviceSettings, lr_at)
  GRADFUSED_AT(settings, DeviceSettings, lr_dtype)
  GRADFUSED_AT(settings, DeviceSettings, row0)
  GRADFUSED_AT(settings, DeviceSettings, row1)
  GRADFUSED_AT(perturb, Perturb, a)
  GRADFUSED_AT(perturb, Perturb, b)
  GRADFUSED_AT(perturb, Perturb, e)
  GRADFUSED_AT(perturb, Perturb, lo)
  GRADFUSED_AT(perturb, Perturb, hi)
  GRADFUSED_AT(sums, Sums, sum)
  GRADFUSED_AT(sums, Sums, squares)
  GRADFUSED_AT(sums, Sums, weight_squares)
  GRADFUSED_AT(unit, Unit, mean)
  GRADFUSED_AT(unit, Unit, squares)
  GRADFUSED_AT(unit, Unit, weight_squares)
  GRADFUSED_AT(unit, Unit, direction)
  GRADFUSED_SIZE(Chunk)
  GRADFUSED_SIZE(Operand)
  GRADFUSED_SIZE(DeviceRow)
  GRADFUSED_SIZE(DeviceSettings)
  GRADFUSED_SIZE(Sums)
  GRADFUSED_SIZE(Unit)
#undef GRADFUSED_AT
#undef GRADFUSED_SIZE

#define GRADFUSED_IN_ROW(name) layout["row_" #name] = int64_t(offsetof(DeviceRow, row) + offsetof(Row, name));
  GRADFUSED_IN_ROW(state)
#define GRADFUSED_ENUM(type, ...) add_values<type>(layout, #type);
#define GRADFUSED_OPTION(type, name, value) \
  layout["settings_" #name] = int64_t(offsetof(DeviceSettings, settings) + offsetof(Settings, name));
#define GRADFUSED_OPERAND(name) GRADFUSED_IN_ROW(name)
#define GRADFUSED_FIELD(type, name, value) GRADFUSED_IN_ROW(name)
#define GRADFUSED_COUNT(name) GRADFUSED_IN_ROW(name) GRADFUSED_IN_ROW(name##_dtype)
#include "schema.def"
#undef GRADFUSED_IN_ROW

  add_values<Rule>(layout, "Rule");
  add_rules(layout);
  add_needs(layout);
  layout["chunk_elements"] = kChunk;
  layout["block_unit"] = kBlockUnit;
  return layout;
}

}  // namespace gradfused::bind
