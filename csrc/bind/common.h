// What the bindings of every native backend share: names into enumerations, rows, options and the watch over them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/watch.h"
#include "rows.h"

namespace gradfused::bind {

namespace py = pybind11;

inline const char* const kRuleNames[] = {
#define GRADFUSED_RULE(name, type, family) #name,
#include "rules.def"
#undef GRADFUSED_RULE
};

template <class E> E named(const char* what, const std::string& name, const char* const* names, int count) {
  for (int i = 0; i < count; ++i) {
    if (name == names[i]) return E(i);
  }
  throw std::invalid_argument(std::string("unknown ") + what + " '" + name + "'");
}

inline Rule rule_named(const std::string& name) { return named<Rule>("rule", name, kRuleNames, int(Rule::count)); }

inline DType dtype_named(const std::string& name) {
  static const char* const names[] = {"float32", "float64", "float16", "bfloat16"};
  return named<DType>("dtype", name, names, 4);
}

inline NormScope norm_scope_named(const std::string& name) {
  static const char* const names[] = {"none", "global", "group", "param", "unit"};
  return named<NormScope>("norm_scope", name, names, 5);
}

inline Centre centre_named(const std::string& name) {
  static const char* const names[] = {"gradient", "decayed", "update"};
  return named<Centre>("centralize_at", name, names, 3);
}

inline Precision precision_named(const std::string& name) {
  static const char* const names[] = {"none", "kahan", "stochastic", "master"};
  return named<Precision>("precision", name, names, 4);
}

// (address, dtype, sizes, strides): sizes and strides empty where the elements lie one after another.
using OperandSpec = std::tuple<uintptr_t, std::string, std::vector<int64_t>, std::vector<int64_t>>;

inline Operand operand(const OperandSpec& spec) {
  Operand x;
  x.data = reinterpret_cast<char*>(std::get<0>(spec));
  x.dtype = dtype_named(std::get<1>(spec));
  x.dims = int32_t(std::get<2>(spec).size());
  x.sizes = std::get<2>(spec).data();
  x.strides = std::get<3>(spec).data();
  return x;
}

inline Operand optional_operand(const std::optional<OperandSpec>& spec) { return spec ? operand(*spec) : Operand{}; }

// (address, dtype) of a one-element tensor
using ScalarSpec = std::optional<std::pair<uintptr_t, std::string>>;

inline void set_scalar(const ScalarSpec& spec, char*& at, DType& dtype) {
  if (!spec) return;
  at = reinterpret_cast<char*>(spec->first);
  dtype = dtype_named(spec->second);
}

inline void add_row(Rows& rows, const std::string& rule, const OperandSpec& param, const OperandSpec& grad,
                    const std::vector<OperandSpec>& state, const std::optional<OperandSpec>& source,
                    const std::optional<OperandSpec>& master, const std::optional<OperandSpec>& kahan_comp,
                    const std::optional<OperandSpec>& ema, const std::string& precision, int64_t numel, int64_t unit_length, int32_t group,
                    uint32_t param_number, bool centre, bool whole, bool first, const ScalarSpec& step, const ScalarSpec& mu_product) {
  Row row;
  row.rule = rule_named(rule);
  row.param = operand(param);
  row.grad = operand(grad);
  if (state.size() > size_t(kMaxStates)) throw std::invalid_argument("too many state tensors");
  for (size_t k = 0; k < state.size(); ++k) row.state[k] = operand(state[k]);
  row.source = optional_operand(source);
  row.master = optional_operand(master);
  row.kahan_comp = optional_operand(kahan_comp);
  row.ema = optional_operand(ema);
  row.precision = precision_named(precision);
  row.numel = numel;
  row.unit_length = unit_length;
  row.group = group;
  row.param_number = param_number;
  row.centre = centre;
  row.whole = whole;
  row.first = first;
  set_scalar(step, row.step, row.step_dtype);
  set_scalar(mu_product, row.mu_product, row.mu_product_dtype);
  rows.add(row);
}

// Perturb, Settings, Rows and Watch, each module's own.
inline void define(py::module_& m) {
  m.def("rules", [] { return std::vector<std::string>(std::begin(kRuleNames), std::end(kRuleNames)); });

  py::class_<Perturb>(m, "Perturb", py::module_local()).def(py::init([](double a, double b, double e, double lo, double hi) {
    return Perturb{a, b, e, lo, hi};
  }));

  py::class_<Settings>(m, "Settings", py::module_local())
      .def(py::init<>())
      .def_property("norm_scope", nullptr,
                    [](Settings& settings, const std::string& name) { settings.norm_scope = norm_scope_named(name); })
      .def_property("centralize_at", nullptr,
                    [](Settings& settings, const std::string& name) { settings.centralize_at = centre_named(name); })
      .def_readwrite("lr", &Settings::lr)
      .def_readwrite("weight_decay", &Settings::weight_decay)
      .def_readwrite("momentum", &Settings::momentum)
      .def_readwrite("dampening", &Settings::dampening)
      .def_readwrite("beta1", &Settings::beta1)
      .def_readwrite("beta2", &Settings::beta2)
      .def_readwrite("beta3", &Settings::beta3)
      .def_readwrite("eps", &Settings::eps)
      .def_readwrite("lr_decay", &Settings::lr_decay)
      .def_readwrite("momentum_decay", &Settings::momentum_decay)
      .def_readwrite("trust_coefficient", &Settings::trust_coefficient)
      .def_readwrite("nesterov", &Settings::nesterov)
      .def_readwrite("decoupled", &Settings::decoupled)
      .def_readwrite("proximal", &Settings::proximal)
      .def_readwrite("adapt", &Settings::adapt)
      .def_readwrite("perturb", &Settings::perturb)
      .def_readwrite("agc", &Settings::agc)
      .def_readwrite("radius", &Settings::radius)
      .def_readwrite("clip_value", &Settings::clip_value)
      .def_readwrite("noise", &Settings::noise)
      .def_readwrite("noise_decay", &Settings::noise_decay)
      .def_readwrite("seed", &Settings::seed)
      .def_readwrite("sign", &Settings::sign)
      .def_readwrite("skip_nonfinite", &Settings::skip_nonfinite)
      .def_readwrite("adaptive", &Settings::adaptive)
      .def_readwrite("eta", &Settings::eta)
      .def_readwrite("ema", &Settings::ema)
      .def_readwrite("zero_grad_in_step", &Settings::zero_grad_in_step);

  py::class_<Rows>(m, "Rows", py::module_local())
      .def("settings", &Rows::settings, py::return_value_policy::reference_internal)
      .def("add", &add_row, py::kw_only(), py::arg("rule"), py::arg("param"), py::arg("grad"), py::arg("state"), py::arg("source"),
           py::arg("master"), py::arg("kahan_comp"), py::arg("ema"), py::arg("precision"), py::arg("numel"), py::arg("unit_length"),
           py::arg("group"), py::arg("param_number"), py::arg("centre"), py::arg("whole"), py::arg("first"), py::arg("step"),
           py::arg("mu_product"))
      .def("taken", &Rows::taken)
      .def("__len__", &Rows::size);

  py::class_<Watch>(m, "Watch", py::module_local())
      .def(py::init<py::object, py::object, py::object, bool, py::list, py::dict, py::dict, py::list>(), py::arg("tensor"),
           py::arg("storage"), py::arg("exchange"), py::arg("shim"), py::arg("groups"), py::arg("state"), py::arg("sources"),
           py::arg("rows"))
      .def("refresh", &Watch::refresh, py::arg("groups"), py::arg("state"), py::arg("sources"), py::arg("tables"));
}

}  // namespace gradfused::bind
