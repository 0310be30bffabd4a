// What a tensor, and a group of them, is to a kernel. Shared by every native backend; filled and checked in Python.
#pragma once

#include <cstdint>

namespace gradfused {

enum class DType : int8_t { float32, float64, float16, bfloat16 };

enum class Rule : int8_t {
#define GRADFUSED_RULE(name, type, family) name,
#include "rules.def"
#undef GRADFUSED_RULE
  count
};

// Which tensors share one norm.
enum class Scope : int8_t { none, global, group, param, unit };

// What has its unit mean taken off.
enum class Centre : int8_t { gradient, decayed, update };

constexpr int kMaxStates = 4;

// s(n) = clamp(a + b / (n + e), lo, hi)
struct Perturb {
  double a = 1, b = 0, e = 0, lo = 0, hi = 1;
};

// One parameter group's options. Python validates them before they come here.
struct Hyper {
  // the rule's
  double lr = 0, weight_decay = 0, momentum = 0, dampening = 0, beta1 = 0, beta2 = 0, eps = 0;
  bool nesterov = false, decoupled = false;
  // the transforms'
  Centre centralize_at = Centre::gradient;
  Scope scope = Scope::none;
  Perturb perturb;
  bool agc = false;
  double radius = 1;
  double clip_value = 0;  // infinite when off
  double noise = 0, noise_decay = 0;
  uint64_t seed = 0;
  double sign = 1;  // of reverse and maximize together
  bool skip_nonfinite = false;
};

// A walk over memory in the row's iteration order. Without dims the elements lie one after another.
struct Operand {
  char* data = nullptr;
  DType dtype = DType::float32;
  int32_t dims = 0;
  const int64_t* sizes = nullptr;    // outermost first; kept by whoever keeps the table
  const int64_t* strides = nullptr;  // in elements
};

// A parameter with a gradient, and its optimizer state. Elements are numbered in iteration order, units lie one after another in it.
struct Row {
  Operand param, grad, state[kMaxStates];
  Rule rule = Rule::sgd;
  int64_t numel = 0, length = 0;  // of the row, of one unit
  int32_t group = 0;
  uint32_t parameter = 0;         // the parameter's number in the optimizer: part of the noise counter
  bool centre = false;            // centralisation applies to this row
  bool whole = false;             // over the whole tensor although units are shorter (norms by unit)
  bool first = false;             // the state holds nothing yet
  char* step = nullptr;           // the count of steps taken, a float32 or float64 scalar; null where nothing needs it
  DType step_dtype = DType::float32;
};

}  // namespace gradfused
