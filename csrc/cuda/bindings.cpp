// The module gradfused._cuda: one optimizer's table on one device and the launches of a step. Python hands it addresses, sizes, numbers and a
// stream, nothing of torch, and has checked what arrives here.
#include <pybind11/pybind11.h>

#include <utility>

#include "bind/common.h"
#include "cuda/engine.h"
#include "cuda/job.h"

namespace py = pybind11;

namespace gradfused::cuda {
namespace {

// Raises std::runtime_error, with the reason and the remedy, unless there is a device that a kernel can run on.
int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "looking for a GPU");
  return count;
}

}  // namespace
}  // namespace gradfused::cuda

using namespace gradfused;

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
  m.def("device_count", &cuda::device_count);
  bind::define(m);

  py::class_<cuda::Engine, Rows> table(m, "Engine", py::module_local());
  bind::define_plan(table);
  for (const auto& [name, launch] : {std::pair("stats", &cuda::Engine::stats), std::pair("apply", &cuda::Engine::apply)}) {
    table.def(name, launch, py::arg("device"), py::arg("stream"), py::arg("grad_scale"), py::arg("found_inf"),
              py::call_guard<py::gil_scoped_release>());
  }
}
