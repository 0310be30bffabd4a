#include "lpg/bindings.h"

#include <string>

#include "bind/common.h"
#include "lpg/engine.h"

namespace py = pybind11;

namespace gradfused::cpu {
namespace {

// LPG cross-entropy of one batch; see gradfused.lpg.cpu.
class Lpg {
 public:
  Lpg(uintptr_t logits, const std::string& dtype, int64_t rows, int64_t classes, int64_t inner, int64_t outer_stride, int64_t inner_stride,
      int64_t class_stride, bool columns, uintptr_t target, int64_t ignore_index, uintptr_t weight, double weight_sum, double smoothing,
      uintptr_t saved, int threads)
      : problem_{reinterpret_cast<const char*>(logits),
                 bind::named<DType>(dtype),
                 rows,
                 classes,
                 inner,
                 outer_stride,
                 inner_stride,
                 class_stride,
                 columns,
                 reinterpret_cast<const int64_t*>(target),
                 ignore_index,
                 reinterpret_cast<const void*>(weight),
                 weight_sum,
                 smoothing,
                 reinterpret_cast<void*>(saved)},
        threads_(threads) {}

  int64_t stray() const { return lpg_stray(problem_); }
  void forward(uintptr_t loss, uintptr_t total, uintptr_t tally) const {
    const LpgTotals totals = {reinterpret_cast<double*>(total), reinterpret_cast<double*>(tally)};
    lpg_forward(problem_, reinterpret_cast<void*>(loss), totals, threads_);
  }
  void backward(uintptr_t out, uintptr_t factor, int64_t factor_stride, uintptr_t bound, bool by_sample, uintptr_t means) const {
    const LpgGradient gradient = {reinterpret_cast<char*>(out), reinterpret_cast<const double*>(factor), factor_stride};
    lpg_backward(problem_, gradient, {reinterpret_cast<const double*>(bound), by_sample, reinterpret_cast<const void*>(means)}, threads_);
  }
  void class_sums(uintptr_t to) const { lpg_class_sums(problem_, reinterpret_cast<void*>(to), threads_); }

 private:
  const LpgProblem problem_;
  const int threads_;
};

}  // namespace

void define_lpg(py::module_& m) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  py::class_<Lpg>(m, "Lpg", py::module_local())
      .def(py::init<uintptr_t, const std::string&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, uintptr_t, int64_t,
                    uintptr_t, double, double, uintptr_t, int>(),
           py::kw_only(), py::arg("logits"), py::arg("dtype"), py::arg("rows"), py::arg("classes"), py::arg("inner"),
           py::arg("outer_stride"), py::arg("inner_stride"), py::arg("class_stride"), py::arg("columns"), py::arg("target"),
           py::arg("ignore_index"), py::arg("weight"), py::arg("weight_sum"), py::arg("smoothing"), py::arg("saved"), py::arg("threads"))
      .def("stray", &Lpg::stray, released)
      .def("forward", &Lpg::forward, py::arg("loss"), py::arg("total"), py::arg("tally"), released)
      .def("backward", &Lpg::backward, py::arg("out"), py::arg("factor"), py::arg("factor_stride"), py::arg("bound"), py::arg("by_sample"),
           py::arg("means"), released)
      .def("class_sums", &Lpg::class_sums, py::arg("to"), released);
}

}  // namespace gradfused::cpu
