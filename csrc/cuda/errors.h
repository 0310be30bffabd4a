// CUDA's errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <string>

namespace gradfused::cuda {

// Raises std::runtime_error that says what failed, what CUDA calls it and what may help.
void check(cudaError_t error, const std::string& doing);

}  // namespace gradfused::cuda
