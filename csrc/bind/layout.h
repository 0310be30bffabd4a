// Where Triton's kernels, which know no C++, find what a table in device memory holds: byte offsets, sizes, enumerators and bits by name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>
#include <utility>

#include "bind/schema.h"
#include "math/rules.h"
#include "plan/layout.h"

namespace gradfused::bind {

using Layout = std::map<std::string, int64_t>;

template <class E> void add_values(Layout& layout, const std::string& type) {
  for (size_t i = 0; i < names_of<E>().size(); ++i) layout[type + "_" + names_of<E>()[i]] = int64_t(i);
}

// Byte offsets of fields, each under the names of its struct and its own.
inline void add_fields(Layout& layout, const std::string& of, std::initializer_list<std::pair<const char*, size_t>> fields) {
  for (const auto& [name, offset] : fields) layout[of + "_" + name] = int64_t(offset);
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
#define GRADFUSED_AT(type, field) {#field, offsetof(type, field)}
  add_fields(layout, "job",
             {GRADFUSED_AT(Job, rows), GRADFUSED_AT(Job, settings), GRADFUSED_AT(Job, chunks), GRADFUSED_AT(Job, grads),
              GRADFUSED_AT(Job, sums), GRADFUSED_AT(Job, units), GRADFUSED_AT(Job, squares), GRADFUSED_AT(Job, tickets),
              GRADFUSED_AT(Job, skipped), GRADFUSED_AT(Job, needs), GRADFUSED_AT(Job, row_count), GRADFUSED_AT(Job, chunk_count)});
  add_fields(layout, "chunk",
             {GRADFUSED_AT(Chunk, begin), GRADFUSED_AT(Chunk, count), GRADFUSED_AT(Chunk, row), GRADFUSED_AT(Chunk, lanes),
              GRADFUSED_AT(Chunk, plain)});
  add_fields(layout, "operand",
             {GRADFUSED_AT(Operand, data), GRADFUSED_AT(Operand, dtype), GRADFUSED_AT(Operand, dims), GRADFUSED_AT(Operand, sizes),
              GRADFUSED_AT(Operand, strides)});
  add_fields(layout, "row",
             {GRADFUSED_AT(DeviceRow, needs), GRADFUSED_AT(DeviceRow, unit0), GRADFUSED_AT(DeviceRow, chunk0),
              GRADFUSED_AT(DeviceRow, chunk1), GRADFUSED_AT(DeviceRow, norm), GRADFUSED_AT(DeviceRow, weight_norm)});
  add_fields(layout, "settings",
             {GRADFUSED_AT(DeviceSettings, lr_at), GRADFUSED_AT(DeviceSettings, lr_dtype), GRADFUSED_AT(DeviceSettings, row0),
              GRADFUSED_AT(DeviceSettings, row1)});
  add_fields(
      layout, "perturb",
      {GRADFUSED_AT(Perturb, a), GRADFUSED_AT(Perturb, b), GRADFUSED_AT(Perturb, e), GRADFUSED_AT(Perturb, lo), GRADFUSED_AT(Perturb, hi)});
  add_fields(layout, "sums", {GRADFUSED_AT(Sums, sum), GRADFUSED_AT(Sums, squares), GRADFUSED_AT(Sums, weight_squares)});
  add_fields(layout, "unit",
             {GRADFUSED_AT(Unit, mean), GRADFUSED_AT(Unit, squares), GRADFUSED_AT(Unit, weight_squares), GRADFUSED_AT(Unit, direction)});
#undef GRADFUSED_AT
#define GRADFUSED_SIZE(type) \
  {                          \
    #type, sizeof(type)      \
  }
  const std::pair<const char*, size_t> sizes[] = {GRADFUSED_SIZE(Chunk),          GRADFUSED_SIZE(Operand), GRADFUSED_SIZE(DeviceRow),
                                                  GRADFUSED_SIZE(DeviceSettings), GRADFUSED_SIZE(Sums),    GRADFUSED_SIZE(Unit)};
  for (const auto& [name, size] : sizes) layout[name] = int64_t(size);
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
