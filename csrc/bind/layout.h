// Where a kernel that knows no C++ finds what a table in device memory holds: byte offsets, sizes, enumerators and sets by name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "device/layout.h"
#include "math/rules.h"

namespace gradfused::bind {

inline std::map<std::string, int64_t> layout() {
  using namespace device;
  std::map<std::string, int64_t> at;
#define GRADFUSED_AT(prefix, type, field) at[#prefix "_" #field] = int64_t(offsetof(type, field));
#define GRADFUSED_IN(prefix, outer, inner, type, field) at[#prefix "_" #field] = int64_t(offsetof(outer, inner) + offsetof(type, field));
#define GRADFUSED_SIZE(type) at[#type] = int64_t(sizeof(type));
#define GRADFUSED_VALUE(type, name) at[#type "_" #name] = int64_t(type::name);
  GRADFUSED_AT(job, Job, rows)
  GRADFUSED_AT(job, Job, settings)
  GRADFUSED_AT(job, Job, chunks)
  GRADFUSED_AT(job, Job, grads)
  GRADFUSED_AT(job, Job, sums)
  GRADFUSED_AT(job, Job, units)
  GRADFUSED_AT(job, Job, squares)
  GRADFUSED_AT(job, Job, tickets)
  GRADFUSED_AT(job, Job, skipped)
  GRADFUSED_AT(job, Job, row_count)
  GRADFUSED_AT(job, Job, chunk_count)
  GRADFUSED_AT(job, Job, any_global)
  GRADFUSED_AT(job, Job, any_skip)
  GRADFUSED_AT(job, Job, any_rehearsed)
  GRADFUSED_AT(job, Job, any_weighed_first)
  GRADFUSED_AT(job, Job, any_weighed)
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
  GRADFUSED_IN(row, DeviceRow, row, Row, param)
  GRADFUSED_IN(row, DeviceRow, row, Row, grad)
  GRADFUSED_IN(row, DeviceRow, row, Row, state)
  GRADFUSED_IN(row, DeviceRow, row, Row, source)
  GRADFUSED_IN(row, DeviceRow, row, Row, master)
  GRADFUSED_IN(row, DeviceRow, row, Row, kahan_comp)
  GRADFUSED_IN(row, DeviceRow, row, Row, ema)
  GRADFUSED_IN(row, DeviceRow, row, Row, precision)
  GRADFUSED_IN(row, DeviceRow, row, Row, rule)
  GRADFUSED_IN(row, DeviceRow, row, Row, numel)
  GRADFUSED_IN(row, DeviceRow, row, Row, unit_length)
  GRADFUSED_IN(row, DeviceRow, row, Row, group)
  GRADFUSED_IN(row, DeviceRow, row, Row, param_number)
  GRADFUSED_IN(row, DeviceRow, row, Row, centre)
  GRADFUSED_IN(row, DeviceRow, row, Row, whole)
  GRADFUSED_IN(row, DeviceRow, row, Row, first)
  GRADFUSED_IN(row, DeviceRow, row, Row, step)
  GRADFUSED_IN(row, DeviceRow, row, Row, step_dtype)
  GRADFUSED_IN(row, DeviceRow, row, Row, mu_product)
  GRADFUSED_IN(row, DeviceRow, row, Row, mu_product_dtype)
  GRADFUSED_AT(row, DeviceRow, unit0)
  GRADFUSED_AT(row, DeviceRow, chunk0)
  GRADFUSED_AT(row, DeviceRow, chunk1)
  GRADFUSED_AT(row, DeviceRow, split)
  GRADFUSED_AT(row, DeviceRow, measured)
  GRADFUSED_AT(row, DeviceRow, weighed_first)
  GRADFUSED_AT(row, DeviceRow, weighed)
  GRADFUSED_AT(row, DeviceRow, norm)
  GRADFUSED_AT(row, DeviceRow, weight_norm)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, lr)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, weight_decay)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, momentum)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, dampening)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, beta1)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, beta2)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, beta3)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, eps)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, lr_decay)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, momentum_decay)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, trust_coefficient)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, nesterov)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, decoupled)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, proximal)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, adapt)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, centralize_at)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, norm_scope)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, perturb)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, agc)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, radius)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, clip_value)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, noise)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, noise_decay)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, seed)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, sign)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, skip_nonfinite)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, adaptive)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, eta)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, ema)
  GRADFUSED_IN(settings, DeviceSettings, settings, Settings, zero_grad_in_step)
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
  GRADFUSED_VALUE(DType, float32)
  GRADFUSED_VALUE(DType, float64)
  GRADFUSED_VALUE(DType, float16)
  GRADFUSED_VALUE(DType, bfloat16)
  GRADFUSED_VALUE(NormScope, global)
  GRADFUSED_VALUE(NormScope, group)
  GRADFUSED_VALUE(NormScope, param)
  GRADFUSED_VALUE(NormScope, unit)
  GRADFUSED_VALUE(Centre, gradient)
  GRADFUSED_VALUE(Centre, decayed)
  GRADFUSED_VALUE(Centre, update)
  GRADFUSED_VALUE(Precision, none)
  GRADFUSED_VALUE(Precision, kahan)
  GRADFUSED_VALUE(Precision, stochastic)
  GRADFUSED_VALUE(Precision, master)
  // Sets of rules, a bit each: those that trust by the gradient's norm, by their update's, and those whose state is only written.
  int64_t &by_gradient = at["rules_trust_gradient"], &by_update = at["rules_trust_update"], &unread = at["rules_unread"];
#define GRADFUSED_RULE(name, type, family)                                               \
  GRADFUSED_VALUE(Rule, name)                                                            \
  by_gradient |= int64_t(math::type::trust == math::Trust::gradient) << int(Rule::name); \
  by_update |= int64_t(math::type::trust == math::Trust::update) << int(Rule::name);     \
  unread |= int64_t(!math::type::reads_state) << int(Rule::name);
#include "rules.def"
#undef GRADFUSED_RULE
  at["chunk_elements"] = kChunk;
  at["block_unit"] = kBlockUnit;
#undef GRADFUSED_AT
#undef GRADFUSED_IN
#undef GRADFUSED_SIZE
#undef GRADFUSED_VALUE
  return at;
}

}  // namespace gradfused::bind
