// The module gradfused._cpu: addresses, sizes and numbers in, nothing of torch. What arrives here has been checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "bind/common.h"
#include "bind/layout.h"
#include "cpu/engine.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace py = pybind11;
using namespace gradfused;

namespace gradfused::lpg {
void define(py::module_& m);  // csrc/lpg/bindings.cpp
}

namespace {

// Streams as addresses of float32 arrays of one length.
void roof(const std::vector<uintptr_t>& written, const std::vector<uintptr_t>& read, int64_t numel, int threads) {
  std::vector<float*> w;
  std::vector<const float*> r;
  for (uintptr_t a : written) w.push_back(reinterpret_cast<float*>(a));
  for (uintptr_t a : read) r.push_back(reinterpret_cast<const float*>(a));
  volatile float nothing = 0;
  std::atomic<int64_t> next{0};
  cpu::parallel(threads, [&](int) {
    for (int64_t begin; (begin = next.fetch_add(cpu::kCpuChunk)) < numel;) {
      cpu::kernels().roof(w.data(), int(w.size()), r.data(), int(r.size()), begin, std::min(numel, begin + cpu::kCpuChunk), nothing);
    }
  });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "gradfused's kernels for the CPU. Use gradfused.backends.cpu, which checks what these functions trust.";
  m.attr("__version__") = GRADFUSED_VERSION;
  m.attr("UNIT_MAX") = cpu::kUnitMax;
  m.attr("CHUNK") = cpu::kCpuChunk;
  m.attr("BLOCK") = cpu::kBlock;
  m.def("isa", [] { return std::string(cpu::kernels().isa); }, "The instruction set in use.");
  m.def("isas", &cpu::available_isas, "The instruction sets this machine and build have, best first.");
  m.def("use_isa", &cpu::use_isa, py::arg("name"));
  m.def("roof", &roof, py::arg("written"), py::arg("read"), py::arg("numel"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  bind::define(m);

  py::class_<cpu::Engine, Rows>(m, "Engine", py::module_local())
      .def(py::init<size_t>(), py::arg("groups"))
      .def("needs_stats", &cpu::Engine::needs_stats)
      .def(
          "stats",
          [](cpu::Engine& engine, double unscale, uintptr_t sums, int threads) {
            engine.stats(unscale, reinterpret_cast<double*>(sums), threads);
          },
          py::arg("unscale"), py::arg("sums"), py::arg("threads"), py::call_guard<py::gil_scoped_release>())
      .def(
          "apply",
          [](cpu::Engine& engine, double unscale, uintptr_t sums, int threads) {
            const bool taken = engine.apply(unscale, reinterpret_cast<double*>(sums), threads);
            engine.count_taken(taken);
            return taken;
          },
          py::arg("unscale"), py::arg("sums"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  lpg::define(m);

  // The table of kernels that are compiled elsewhere, in Triton.
  py::class_<device::DevicePlan, Rows> plan(m, "DevicePlan", py::module_local());
  bind::define_plan(plan);
  plan.def("patches",
           [](device::DevicePlan& p) {
             std::vector<std::pair<uintptr_t, py::bytes>> due;
             for (const auto& patch : p.patches())
               due.emplace_back(reinterpret_cast<uintptr_t>(patch.to), py::bytes(patch.bytes.data(), patch.bytes.size()));
             return due;
           })
      .def("count_taken", [](device::DevicePlan& p) { p.count_taken(); })
      .def("forget_patches", &device::DevicePlan::forget_patches)
      .def("variants", &device::DevicePlan::variants, py::arg("longest"));
  m.attr("LAYOUT") = bind::layout();
}
