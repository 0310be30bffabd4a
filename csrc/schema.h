// The structs that csrc/schema.def declares: a parameter group's settings and a row, as every native backend and kernel reads them.
#pragma once

#include <cmath>
#include <cstdint>

namespace gradfused {

enum class Rule : int8_t {
#define GRADFUSED_RULE(name, type, family) name,
#include "rules.def"
#undef GRADFUSED_RULE
  count
};

#define GRADFUSED_ENUM(type, ...) enum class type : int8_t { __VA_ARGS__ };
#include "schema.def"

constexpr int64_t itemsize(DType d) { return d == DType::float64 ? 8 : d == DType::float32 ? 4 : 2; }

// Whether norms are over more than one unit, so that every unit has to be read before any of them is stepped.
constexpr bool is_wide(NormScope scope) { return scope == NormScope::global || scope == NormScope::group || scope == NormScope::param; }

constexpr int kMaxStates = 4;

// s(n) = clamp(a + b / (n + e), lo, hi)
struct Perturb {
  double a = 1, b = 0, e = 0, lo = 0, hi = 1;
};

// One parameter group's options, validated in Python.
struct Settings {
#define GRADFUSED_OPTION(type, name, value) type name = value;
#include "schema.def"
};

// What a rule's coefficients depend on besides the settings.
struct Count {
  double step;        // this step's number, from 1
  bool first;         // the state has not been written yet
  double mu_product;  // of NAdam's momenta up to this step
};

// A walk over memory in the row's iteration order. With dims == 0 the elements lie one after another.
struct Operand {
  char* data = nullptr;
  DType dtype = DType::float32;
  int32_t dims = 0;
  const int64_t* sizes = nullptr;    // outermost first; owned by the table that the row is in
  const int64_t* strides = nullptr;  // in elements
};

// A parameter with a gradient and its state. Elements are numbered in iteration order, in which units lie one after another.
struct Row {
#define GRADFUSED_OPERAND(name) Operand name;
#define GRADFUSED_FIELD(type, name, value) type name = value;
#define GRADFUSED_COUNT(name) \
  char* name = nullptr;       \
  DType name##_dtype = DType::float32;
  Operand state[kMaxStates];
#include "schema.def"
};

// Calls f with every operand of a row, those without memory included.
template <class R, class F> void for_each_operand(R& row, F f) {
  for (auto& state : row.state) f(state);
#define GRADFUSED_OPERAND(name) f(row.name);
#include "schema.def"
}

}  // namespace gradfused
