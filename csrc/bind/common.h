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

inline Scope scope_named(const std::string& name) {
  static const char* const names[] = {"none", "global", "group", "param", "unit"};
  return named<Scope>("scope", name, names, 5);
}

inline Centre centre_named(const std::string& name) {
  static const char* const names[] = {"gradient", "decayed", "update"};
  return named<Centre>("centralize_at", name, names, 3);
}

inline Rounding rounding_named(const std::string& name) {
  static const char* const names[] = {"nearest", "kahan", "stochastic", "master"};
  return named<Rounding>("rounding", name, names, 4);
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
                    const std::optional<OperandSpec>& master, const std::optional<OperandSpec>& rest, const std::optional<OperandSpec>& ema,
                    const std::string& rounding, int64_t numel, int64_t length, int32_t group, uint32_t parameter, bool centre, bool whole,
                    bool first, const ScalarSpec& step, const ScalarSpec& product) {
  Row row;
  row.rule = rule_named(rule);
  row.param = operand(param);
  row.grad = operand(grad);
  if (state.size() > size_t(kMaxStates)) throw std::invalid_argument("too many state tensors");
  for (size_t k = 0; k < state.size(); ++k) row.state[k] = operand(state[k]);
  row.source = optional_operand(source);
  row.master = optional_operand(master);
  row.rest = optional_operand(rest);
  row.ema = optional_operand(ema);
  row.rounding = rounding_named(rounding);
  row.numel = numel;
  row.length = length;
  row.group = group;
  row.parameter = parameter;
  row.centre = centre;
  row.whole = whole;
  row.first = first;
  set_scalar(step, row.step, row.step_dtype);
  set_scalar(product, row.product, row.product_dtype);
  rows.add(row);
}

// Perturb, Hyper, Rows and Watch, each module's own.
inline void define(py::module_& m) {
  m.def("rules", [] { return std::vector<std::string>(std::begin(kRuleNames), std::end(kRuleNames)); });

  py::class_<Perturb>(m, "Perturb", py::module_local()).def(py::init([](double a, double b, double e, double lo, double hi) {
    return Perturb{a, b, e, lo, hi};
  }));

  py::class_<Hyper>(m, "Hyper", py::module_local())
      .def(py::init<>())
      .def_property("scope", nullptr, [](Hyper& h, const std::string& name) { h.scope = scope_named(name); })
      .def_property("centralize_at", nullptr, [](Hyper& h, const std::string& name) { h.centralize_at = centre_named(name); })
      .def_readwrite("lr", &Hyper::lr)
      .def_readwrite("weight_decay", &Hyper::weight_decay)
      .def_readwrite("momentum", &Hyper::momentum)
      .def_readwrite("dampening", &Hyper::dampening)
      .def_readwrite("beta1", &Hyper::beta1)
      .def_readwrite("beta2", &Hyper::beta2)
      .def_readwrite("beta3", &Hyper::beta3)
      .def_readwrite("eps", &Hyper::eps)
      .def_readwrite("lr_decay", &Hyper::lr_decay)
      .def_readwrite("momentum_decay", &Hyper::momentum_decay)
      .def_readwrite("trust", &Hyper::trust)
      .def_readwrite("nesterov", &Hyper::nesterov)
      .def_readwrite("decoupled", &Hyper::decoupled)
      .def_readwrite("proximal", &Hyper::proximal)
      .def_readwrite("adapt", &Hyper::adapt)
      .def_readwrite("perturb", &Hyper::perturb)
      .def_readwrite("agc", &Hyper::agc)
      .def_readwrite("radius", &Hyper::radius)
      .def_readwrite("clip_value", &Hyper::clip_value)
      .def_readwrite("noise", &Hyper::noise)
      .def_readwrite("noise_decay", &Hyper::noise_decay)
      .def_readwrite("seed", &Hyper::seed)
      .def_readwrite("sign", &Hyper::sign)
      .def_readwrite("skip_nonfinite", &Hyper::skip_nonfinite)
      .def_readwrite("by_weight", &Hyper::by_weight)
      .def_readwrite("eta", &Hyper::eta)
      .def_readwrite("ema", &Hyper::ema)
      .def_readwrite("zero_grad", &Hyper::zero_grad);

  py::class_<Rows>(m, "Rows", py::module_local())
      .def("hyper", &Rows::hyper, py::return_value_policy::reference_internal)
      .def("add", &add_row, py::kw_only(), py::arg("rule"), py::arg("param"), py::arg("grad"), py::arg("state"), py::arg("source"),
           py::arg("master"), py::arg("rest"), py::arg("ema"), py::arg("rounding"), py::arg("numel"), py::arg("length"), py::arg("group"),
           py::arg("parameter"), py::arg("centre"), py::arg("whole"), py::arg("first"), py::arg("step"), py::arg("product"))
      .def("taken", &Rows::taken)
      .def("__len__", &Rows::size);

  py::class_<Watch>(m, "Watch", py::module_local())
      .def(py::init<py::object, py::object, py::object, py::list, py::dict, py::dict, py::list>(), py::arg("tensor"), py::arg("storage"),
           py::arg("exchange"), py::arg("groups"), py::arg("state"), py::arg("sources"), py::arg("rows"))
      .def("refresh", &Watch::refresh, py::arg("groups"), py::arg("state"), py::arg("sources"), py::arg("tables"));
}

}  // namespace gradfused::bind
