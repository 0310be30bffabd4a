// The module gradfused._cuda: one optimizer's table on one device and the launches of a step. Python hands it addresses, sizes, numbers and a
// stream, nothing of torch, and has checked what arrives here.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "bind/common.h"
#include "cuda/job.h"

namespace py = pybind11;

namespace gradfused::cuda {

// ---- errors

namespace {

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

std::string remedy(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver: {
      int driver = 0, runtime = 0;
      cudaDriverGetVersion(&driver);
      cudaRuntimeGetVersion(&runtime);
      return "gradfused's kernels were built with CUDA " + version(runtime) + ", the driver " +
             (driver ? "supports up to " + version(driver) : std::string("is missing")) + ": update the NVIDIA driver";
    }
    case cudaErrorNoDevice: return "no CUDA device is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES";
    case cudaErrorNoKernelImageForDevice:
      return "gradfused was built for compute capabilities " GRADFUSED_CUDA_ARCHS
             ": build it from source with GRADFUSED_CUDA_ARCHS naming this GPU's";
    case cudaErrorMemoryAllocation: return "device memory is full: free some, or lower the batch size";
    default: return "a kernel launched earlier, perhaps not gradfused's, may have failed: run with CUDA_LAUNCH_BLOCKING=1 to see which";
  }
}

}  // namespace

void check(cudaError_t error, const std::string& doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that a later call is not blamed for this one
  throw std::runtime_error("CUDA: " + doing + " failed: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + "). " +
                           remedy(error));
}

// ---- the engine

namespace {

// Raises std::invalid_argument if the stream is another device's.
void check_stream([[maybe_unused]] int device, [[maybe_unused]] void* stream) {
#if CUDART_VERSION >= 12080
  int owner = device;
  const bool known = cudaStreamGetDevice(static_cast<cudaStream_t>(stream), &owner) == cudaSuccess;
  if (known && owner != device && stream) {
    throw std::invalid_argument("the current stream belongs to device " + std::to_string(owner) + ", the parameters are on device " +
                                std::to_string(device) + ": use torch.cuda.stream() with one of that device");
  }
#endif
}

Launch launcher(Rule rule, bool full) {
  switch (rule) {
#define GRADFUSED_RULE(name, type, family) \
  case Rule::name: return full ? apply_##family##_full : apply_##family##_lean;
#include "rules.def"
#undef GRADFUSED_RULE
    default: return nullptr;  // refused when planned
  }
}

class Engine : public device::DevicePlan {
 public:
  using DevicePlan::DevicePlan;

  // grad_scale and found_inf are the addresses of float32 scalars in device memory, or 0.
  void stats(int device, uintptr_t stream, uintptr_t grad_scale, uintptr_t found_inf) {
    prepare(device, stream, grad_scale, found_inf);
    launch_stats(job_, device, stream_);
  }

  void apply(int device, uintptr_t stream, uintptr_t grad_scale, uintptr_t found_inf) {
    if (!rows_.empty()) {
      prepare(device, stream, grad_scale, found_inf);
      const Launch launch = launcher(rows_[0].rule, needs() & Need::full);
      for (const Phase phase : phases()) launch(job_, phase, device, stream_);
    }
    count_taken();
  }

 private:
  void prepare(int device, uintptr_t stream, uintptr_t grad_scale, uintptr_t found_inf) {
    void* const now = reinterpret_cast<void*>(stream);
    if (!stream_checked_ || now != stream_) {
      check_stream(device, now);
      stream_ = now;
      stream_checked_ = true;
    }
    for (const DevicePatch& p : patches()) launch_patch(const_cast<void*>(p.to), p.bytes.data(), p.bytes.size(), device, stream_);
    job_.grad_scale = reinterpret_cast<const float*>(grad_scale);
    job_.found_inf = reinterpret_cast<const float*>(found_inf);
  }

  void* stream_ = nullptr;
  bool stream_checked_ = false;
};

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
