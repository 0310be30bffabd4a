#include "cuda/engine.h"

#include <stdexcept>

#include "cuda/job.h"

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

}  // namespace

void Engine::stats(int device, uintptr_t stream, uintptr_t grad_scale, uintptr_t found_inf) {
  prepare(device, stream, grad_scale, found_inf);
  launch_stats(job_, device, stream_);
}

void Engine::apply(int device, uintptr_t stream, uintptr_t grad_scale, uintptr_t found_inf) {
  if (!rows_.empty()) {
    prepare(device, stream, grad_scale, found_inf);
    const Launch launch = launcher(rows_[0].rule, needs() & Need::full);
    for (const Phase phase : phases()) launch(job_, phase, device, stream_);
  }
  count_taken();
}

void Engine::prepare(int device, uintptr_t stream, uintptr_t grad_scale, uintptr_t found_inf) {
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

}  // namespace gradfused::cuda
