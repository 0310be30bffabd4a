// The launches of a step's kernels, each over one table in device memory, and CUDA's errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "plan/layout.h"

namespace gradfused::cuda {

using namespace device;

// The launches of a step after that of the statistics, one a phase. A stream is a cudaStream_t of the device.
using Launch = void (*)(const Job&, Phase, int device, void* stream);
#define GRADFUSED_RULE(name, type, family)                                 \
  void apply_##family##_lean(const Job&, Phase, int device, void* stream); \
  void apply_##family##_full(const Job&, Phase, int device, void* stream);
#include "rules.def"
#undef GRADFUSED_RULE
void launch_stats(const Job& job, int device, void* stream);

// Writes host memory to device memory through a kernel's arguments: the host's copy is free at once, and a captured graph keeps the bytes.
void launch_patch(void* to, const void* from, size_t bytes, int device, void* stream);

// Raises std::runtime_error that says what failed, what CUDA calls it and what may help.
void check(cudaError_t error, const std::string& doing);

}  // namespace gradfused::cuda
