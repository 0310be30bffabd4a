// Stands in for CUDA's header of this name, so that a C++ compiler builds kernels which then run on the CPU:
//   c++ -x c++ -std=c++17 -I tests/support/cuda_emulator -I csrc csrc/cuda/some.cu
// A block's threads are fibers of one OS thread, and change at barriers, shuffles and votes only. Blocks run one after another.
#pragma once

#include "errors.h"
#include "intrinsics.h"
#include "language.h"
#include "launch.h"
#include "runtime.h"
