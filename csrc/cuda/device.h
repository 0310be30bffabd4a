// What differs between nvcc and the CPU emulator of the tests, which compiles the same kernels.
#pragma once

#include <cuda_runtime.h>

#ifndef GRADFUSED_EMULATED
#define GRADFUSED_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<(grid), (block), (shared), (stream)>>>(__VA_ARGS__)
#endif
