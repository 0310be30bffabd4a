#include "cuda/errors.h"

#include <stdexcept>

#include "cuda/job.h"

namespace gradfused::cuda {
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

void check_stream(int device, void* stream) {
#if CUDART_VERSION >= 12080
  int owner = device;
  const bool known = cudaStreamGetDevice(static_cast<cudaStream_t>(stream), &owner) == cudaSuccess;
  if (known && owner != device && stream) {
    throw std::invalid_argument("the current stream belongs to device " + std::to_string(owner) + ", the parameters are on device " +
                                std::to_string(device) + ": use torch.cuda.stream() with one of that device");
  }
#else
  (void)device;
  (void)stream;
#endif
}

}  // namespace gradfused::cuda
