// The module gradfused._cpu: addresses, sizes and numbers in, nothing of torch. What arrives here has been checked in Python.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/engine.h"
#include "cpu/isa.h"
#include "cpu/threads.h"
#include "cpu/watch.h"

namespace py = pybind11;
using namespace gradfused;

namespace {

const char* const kRuleNames[] = {
#define GRADFUSED_RULE(name, type) #name,
#include "rules.def"
#undef GRADFUSED_RULE
};

template <class E> E named(const char* what, const std::string& name, const char* const* names, int count) {
  for (int i = 0; i < count; ++i) {
    if (name == names[i]) return E(i);
  }
  throw std::invalid_argument(std::string("unknown ") + what + " '" + name + "'");
}

Rule rule_named(const std::string& name) { return named<Rule>("rule", name, kRuleNames, int(Rule::count)); }

DType dtype_named(const std::string& name) {
  static const char* const names[] = {"float32", "float64", "float16", "bfloat16"};
  return named<DType>("dtype", name, names, 4);
}

Scope scope_named(const std::string& name) {
  static const char* const names[] = {"none", "global", "group", "param", "unit"};
  return named<Scope>("scope", name, names, 5);
}

Centre centre_named(const std::string& name) {
  static const char* const names[] = {"gradient", "decayed", "update"};
  return named<Centre>("centralize_at", name, names, 3);
}

// (address, dtype, sizes, strides): sizes and strides empty where the elements lie one after another.
using OperandSpec = std::tuple<uintptr_t, std::string, std::vector<int64_t>, std::vector<int64_t>>;

Operand operand(const OperandSpec& spec) {
  Operand x;
  x.data = reinterpret_cast<char*>(std::get<0>(spec));
  x.dtype = dtype_named(std::get<1>(spec));
  x.dims = int32_t(std::get<2>(spec).size());
  x.sizes = std::get<2>(spec).data();
  x.strides = std::get<3>(spec).data();
  return x;
}

void add_row(cpu::Table& table, const std::string& rule, const OperandSpec& param, const OperandSpec& grad,
             const std::vector<OperandSpec>& state, int64_t numel, int64_t length, int32_t group, uint32_t parameter, bool centre,
             bool whole, bool first, const std::optional<std::pair<uintptr_t, std::string>>& step) {
  Row row;
  row.rule = rule_named(rule);
  row.param = operand(param);
  row.grad = operand(grad);
  if (state.size() > size_t(kMaxStates)) throw std::invalid_argument("too many state tensors");
  for (size_t k = 0; k < state.size(); ++k) row.state[k] = operand(state[k]);
  row.numel = numel;
  row.length = length;
  row.group = group;
  row.parameter = parameter;
  row.centre = centre;
  row.whole = whole;
  row.first = first;
  if (step) {
    row.step = reinterpret_cast<char*>(step->first);
    row.step_dtype = dtype_named(step->second);
  }
  table.add(row);
}

// Streams as addresses of float32 arrays of one length.
void roof(const std::vector<uintptr_t>& written, const std::vector<uintptr_t>& read, int64_t numel, int threads) {
  std::vector<float*> w;
  std::vector<const float*> r;
  for (uintptr_t a : written) w.push_back(reinterpret_cast<float*>(a));
  for (uintptr_t a : read) r.push_back(reinterpret_cast<const float*>(a));
  volatile float nothing = 0;
  std::atomic<int64_t> next{0};
  cpu::parallel(threads, [&](int) {
    for (int64_t begin; (begin = next.fetch_add(cpu::kChunk)) < numel;) {
      cpu::kernels().roof(w.data(), int(w.size()), r.data(), int(r.size()), begin, std::min(numel, begin + cpu::kChunk), nothing);
    }
  });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "gradfused's kernels for the CPU. Use gradfused.backends.cpu, which checks what these functions trust.";
  m.attr("__version__") = GRADFUSED_VERSION;
  m.attr("UNIT_MAX") = cpu::kUnitMax;
  m.attr("CHUNK") = cpu::kChunk;
  m.attr("BLOCK") = cpu::kBlock;
  m.def("isa", [] { return std::string(cpu::kernels().isa); }, "The instruction set in use.");
  m.def("isas", &cpu::available_isas, "The instruction sets this machine and build have, best first.");
  m.def("use_isa", &cpu::use_isa, py::arg("name"));
  m.def("rules", [] { return std::vector<std::string>(std::begin(kRuleNames), std::end(kRuleNames)); });
  m.def("roof", &roof, py::arg("written"), py::arg("read"), py::arg("numel"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  py::class_<Perturb>(m, "Perturb").def(py::init([](double a, double b, double e, double lo, double hi) { return Perturb{a, b, e, lo, hi}; }));

  py::class_<Hyper>(m, "Hyper")
      .def(py::init<>())
      .def_property("scope", nullptr, [](Hyper& h, const std::string& name) { h.scope = scope_named(name); })
      .def_property("centralize_at", nullptr, [](Hyper& h, const std::string& name) { h.centralize_at = centre_named(name); })
      .def_readwrite("lr", &Hyper::lr)
      .def_readwrite("weight_decay", &Hyper::weight_decay)
      .def_readwrite("momentum", &Hyper::momentum)
      .def_readwrite("dampening", &Hyper::dampening)
      .def_readwrite("beta1", &Hyper::beta1)
      .def_readwrite("beta2", &Hyper::beta2)
      .def_readwrite("eps", &Hyper::eps)
      .def_readwrite("nesterov", &Hyper::nesterov)
      .def_readwrite("decoupled", &Hyper::decoupled)
      .def_readwrite("perturb", &Hyper::perturb)
      .def_readwrite("agc", &Hyper::agc)
      .def_readwrite("radius", &Hyper::radius)
      .def_readwrite("clip_value", &Hyper::clip_value)
      .def_readwrite("noise", &Hyper::noise)
      .def_readwrite("noise_decay", &Hyper::noise_decay)
      .def_readwrite("seed", &Hyper::seed)
      .def_readwrite("sign", &Hyper::sign)
      .def_readwrite("skip_nonfinite", &Hyper::skip_nonfinite);

  py::class_<cpu::Table>(m, "Table")
      .def(py::init([](size_t groups) { return std::make_unique<cpu::Table>(std::vector<Hyper>(groups)); }), py::arg("groups"))
      .def("hyper", &cpu::Table::hyper, py::return_value_policy::reference_internal)
      .def("add", &add_row, py::kw_only(), py::arg("rule"), py::arg("param"), py::arg("grad"), py::arg("state"), py::arg("numel"),
           py::arg("length"), py::arg("group"), py::arg("parameter"), py::arg("centre"), py::arg("whole"), py::arg("first"),
           py::arg("step"))
      .def("needs_stats", &cpu::Table::needs_stats)
      .def("stats", [](cpu::Table& t, double unscale, uintptr_t sums, int threads) {
            t.stats(unscale, reinterpret_cast<double*>(sums), threads);
          }, py::arg("unscale"), py::arg("sums"), py::arg("threads"), py::call_guard<py::gil_scoped_release>())
      .def("apply", [](cpu::Table& t, double unscale, uintptr_t sums, int threads) {
            return t.apply(unscale, reinterpret_cast<double*>(sums), threads);
          }, py::arg("unscale"), py::arg("sums"), py::arg("threads"), py::call_guard<py::gil_scoped_release>())
      .def("__len__", &cpu::Table::rows);

  py::class_<cpu::Watch>(m, "Watch")
      .def(py::init<py::object, py::list, py::dict>(), py::arg("tensor"), py::arg("groups"), py::arg("state"))
      .def("add", &cpu::Watch::add, py::arg("param"), py::arg("state"), py::arg("keys"))
      .def("refresh", &cpu::Watch::refresh, py::arg("groups"), py::arg("state"), py::arg("table"));
}
