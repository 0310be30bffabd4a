// The module gradfused._cuda: addresses, sizes, numbers and a stream in, nothing of torch. What arrives here has been checked in Python.
#include <pybind11/pybind11.h>

#include <string>

#include "bind/common.h"
#include "bind/plan.h"
#include "cuda/device.h"
#include "cuda/engine.h"
#include "cuda/errors.h"

namespace py = pybind11;
using namespace gradfused;

namespace {

const float* scalar(uintptr_t address) { return reinterpret_cast<const float*>(address); }

// Raises std::runtime_error, with the reason and the remedy, unless there is a device that a kernel can run on.
int device_count() {
  int count = 0;
  cuda::check(cudaGetDeviceCount(&count), "looking for a GPU");
  return count;
}

}  // namespace

PYBIND11_MODULE(GRADFUSED_CUDA_MODULE, m) {
  m.doc() = "gradfused's kernels for CUDA. Use gradfused.backends.cuda, which checks what these functions trust.";
  m.attr("__version__") = GRADFUSED_VERSION;
  m.attr("ARCHS") = GRADFUSED_CUDA_ARCHS;
  m.attr("CHUNK") = cuda::kChunk;
  m.attr("WARP_UNIT") = cuda::kWarpUnit;
  m.attr("BLOCK_UNIT") = cuda::kBlockUnit;
#ifdef GRADFUSED_EMULATED
  m.attr("EMULATED") = true;
  m.def("_launches", [] { return gradfused_emulator::launches; });
#else
  m.attr("EMULATED") = false;
#endif
  m.def("device_count", &device_count);
  bind::define(m);

  py::class_<cuda::Engine, Rows> table(m, "Engine", py::module_local());
  bind::define_plan(table);
  table
      .def(
          "stats",
          [](cuda::Engine& t, int device, uintptr_t stream, uintptr_t grad_scale, uintptr_t found_inf) {
            t.stats(device, reinterpret_cast<void*>(stream), scalar(grad_scale), scalar(found_inf));
          },
          py::arg("device"), py::arg("stream"), py::arg("grad_scale"), py::arg("found_inf"), py::call_guard<py::gil_scoped_release>())
      .def(
          "apply",
          [](cuda::Engine& t, int device, uintptr_t stream, uintptr_t grad_scale, uintptr_t found_inf) {
            t.apply(device, reinterpret_cast<void*>(stream), scalar(grad_scale), scalar(found_inf));
            t.count_taken();
          },
          py::arg("device"), py::arg("stream"), py::arg("grad_scale"), py::arg("found_inf"), py::call_guard<py::gil_scoped_release>());
}
