// What a tensor, and a group of them, is to a kernel. Shared by every native backend; filled and checked in Python.
#pragma once

#include <cstdint>

namespace gradfused {

enum class DType : int8_t { float32, float64, float16, bfloat16 };

constexpr int64_t itemsize(DType d) { return d == DType::float64 ? 8 : d == DType::float32 ? 4 : 2; }

enum class Rule : int8_t {
#define GRADFUSED_RULE(name, type, family) name,
#include "rules.def"
#undef GRADFUSED_RULE
  count
};

// Which tensors share one norm.
enum class NormScope : int8_t { none, global, group, param, unit };

// Units that share a norm have to be read before any of them is stepped.
constexpr bool wide(NormScope scope) { return scope == NormScope::global || scope == NormScope::group || scope == NormScope::param; }

// What has its unit mean taken off.
enum class Centre : int8_t { gradient, decayed, update };

// How weights of 16 bits are kept: rounded to nearest, with what rounding took off in a second tensor, rounded at random, or as a copy of
// one in float32.
enum class Precision : int8_t { none, kahan, stochastic, master };

constexpr int kMaxStates = 4;

// s(n) = clamp(a + b / (n + e), lo, hi)
struct Perturb {
  double a = 1, b = 0, e = 0, lo = 0, hi = 1;
};

// One parameter group's options. Python validates them before they come here.
struct Settings {
  // the rule's
  double lr = 0, weight_decay = 0, momentum = 0, dampening = 0, beta1 = 0, beta2 = 0, beta3 = 0, eps = 0;
  double lr_decay = 0, momentum_decay = 0, trust_coefficient = 0;
  bool nesterov = false, decoupled = false, proximal = false, adapt = false;
  // the transforms'
  Centre centralize_at = Centre::gradient;
  NormScope norm_scope = NormScope::none;
  Perturb perturb;
  bool agc = false;
  double radius = 1;
  double clip_value = 0;  // infinite when off
  double noise = 0, noise_decay = 0;
  uint64_t seed = 0;
  double sign = 1;  // of reverse and maximize together
  bool skip_nonfinite = false;
  bool adaptive = false;  // the gradient is multiplied by |p| + eta before its norm is taken: adaptive SAM
  double eta = 0;
  // the riders'
  double ema = 0;                  // what the average keeps of itself in a step
  bool zero_grad_in_step = false;  // gradients are left at zero
};

// What a rule's numbers depend on besides the options.
struct Count {
  double step;        // this step's number, from 1
  bool first;         // the state holds nothing yet
  double mu_product;  // of NAdam's momenta up to this step
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
  Operand source;      // where the weights are read, if not from param: SAM's backup
  Operand master;      // a copy of 16-bit weights in float32, believed where it rounds to them; written with Precision::master alone
  Operand kahan_comp;  // what rounding took off (Precision::kahan)
  Operand ema;         // moving average of the weights, if any
  Precision precision = Precision::none;
  Rule rule = Rule::sgd;
  int64_t numel = 0, unit_length = 0;  // of the row, of one unit
  int32_t group = 0;
  uint32_t param_number = 0;  // the parameter's number in the optimizer: part of the noise counter
  bool centre = false;        // centralisation applies to this row
  bool whole = false;         // over the whole tensor although units are shorter (norms by unit)
  bool first = false;         // the state holds nothing yet
  char* step = nullptr;       // the count of steps taken, a float32 or float64 scalar; null where nothing needs it
  DType step_dtype = DType::float32;
  char* mu_product = nullptr;  // the product of the momenta so far, likewise; only NAdam has one
  DType mu_product_dtype = DType::float32;
};

}  // namespace gradfused
