// The class Lpg of gradfused._cpu, a Problem: addresses and sizes, which it trusts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>

#include "bind/common.h"
#include "lpg/engine.h"

namespace gradfused::lpg {
namespace {

namespace py = pybind11;

// Address, dtype, (outer, inner, classes) and their strides in elements.
using Logits = std::tuple<uintptr_t, std::string, std::array<int64_t, 3>, std::array<int64_t, 3>>;

Problem make(const Logits& logits, bool by_column, uintptr_t target, int64_t ignore_index, uintptr_t weight, double weight_sum,
             double smoothing, uintptr_t saved, int threads) {
  const auto& [data, dtype, sizes, strides] = logits;
  return {reinterpret_cast<const char*>(data),
          bind::named<DType>(dtype),
          sizes[0] * sizes[1],
          sizes[2],
          sizes[1],
          strides[0],
          strides[1],
          strides[2],
          by_column,
          reinterpret_cast<const int64_t*>(target),
          ignore_index,
          reinterpret_cast<const void*>(weight),
          weight_sum,
          smoothing,
          reinterpret_cast<void*>(saved),
          threads};
}

void forward_at(const Problem& p, uintptr_t loss, uintptr_t total, uintptr_t tally) {
  forward(p, reinterpret_cast<void*>(loss), {reinterpret_cast<double*>(total), reinterpret_cast<double*>(tally)});
}

void backward_at(const Problem& p, uintptr_t out, uintptr_t factor, int64_t factor_stride, uintptr_t bound, bool by_sample,
                 uintptr_t means) {
  backward(p, {reinterpret_cast<char*>(out), reinterpret_cast<const double*>(factor), factor_stride},
           {reinterpret_cast<const double*>(bound), by_sample, reinterpret_cast<const void*>(means)});
}

}  // namespace

void define(py::module_& m) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  py::class_<Problem>(m, "Lpg", py::module_local())
      .def(py::init(&make), py::kw_only(), py::arg("logits"), py::arg("by_column"), py::arg("target"), py::arg("ignore_index"),
           py::arg("weight"), py::arg("weight_sum"), py::arg("smoothing"), py::arg("saved"), py::arg("threads"))
      .def("find_stray", &find_stray, released)
      .def("forward", &forward_at, py::arg("loss"), py::arg("total"), py::arg("tally"), released)
      .def("backward", &backward_at, py::arg("out"), py::arg("factor"), py::arg("factor_stride"), py::arg("bound"), py::arg("by_sample"),
           py::arg("means"), released)
      .def("class_sums", [](const Problem& p, uintptr_t to) { class_sums(p, reinterpret_cast<void*>(to)); }, py::arg("to"), released);
}

}  // namespace gradfused::lpg
