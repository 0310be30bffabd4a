// The part of CUDA's runtime API that host code calls, for one made-up device whose memory is the host's. Streams are done with
// what they are given before a call returns.
#pragma once

#include <cstdlib>
#include <cstring>

#include "errors.h"
#include "launch.h"

#define GRADFUSED_EMULATOR_ATTRIBUTES(A)                                       \
  A(cudaDevAttrMaxThreadsPerBlock, 1, gradfused_emulator::kMaxThreads)         \
  A(cudaDevAttrMaxSharedMemoryPerBlock, 8, gradfused_emulator::kSharedDefault) \
  A(cudaDevAttrWarpSize, 10, warpSize)                                         \
  A(cudaDevAttrMultiProcessorCount, 16, gradfused_emulator::processors())      \
  A(cudaDevAttrL2CacheSize, 38, 4 << 20)                                       \
  A(cudaDevAttrMaxThreadsPerMultiProcessor, 39, 2048)                          \
  A(cudaDevAttrComputeCapabilityMajor, 75, 9)                                  \
  A(cudaDevAttrComputeCapabilityMinor, 76, 0)                                  \
  A(cudaDevAttrMaxSharedMemoryPerBlockOptin, 97, gradfused_emulator::kSharedMost)

#define GRADFUSED_EMULATOR_VALUE(name, number, value) name = number,
enum cudaDeviceAttr { GRADFUSED_EMULATOR_ATTRIBUTES(GRADFUSED_EMULATOR_VALUE) };
#undef GRADFUSED_EMULATOR_VALUE

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive, cudaStreamCaptureStatusInvalidated };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };

struct cudaFuncAttributes {
  size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, cacheModeCA, maxDynamicSharedSizeBytes, preferredShmemCarveout;
};

namespace gradfused_emulator {

// How wide grids that fill the device are: GRADFUSED_EMULATOR_PROCESSORS, 2 if it is not set.
inline int processors() {
  const char* variable = getenv("GRADFUSED_EMULATOR_PROCESSORS");
  return variable && atoi(variable) > 0 ? atoi(variable) : 2;
}

template <class To, class From> cudaError_t give(To* to, From value) {
  *to = To(value);
  return cudaSuccess;
}

}  // namespace gradfused_emulator

// ---- the device

inline cudaError_t cudaGetDeviceCount(int* count) { return gradfused_emulator::give(count, 1); }
inline cudaError_t cudaGetDevice(int* device) { return gradfused_emulator::give(device, 0); }
inline cudaError_t cudaSetDevice(int device) { return gradfused_emulator::remember(device ? cudaErrorInvalidDevice : cudaSuccess); }
inline cudaError_t cudaDriverGetVersion(int* version) { return gradfused_emulator::give(version, 13000); }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return gradfused_emulator::give(version, 13000); }
inline cudaError_t cudaDeviceSynchronize() { return cudaPeekAtLastError(); }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return gradfused_emulator::remember(cudaErrorInvalidDevice);
#define GRADFUSED_EMULATOR_ATTRIBUTE(name, number, result) \
  if (attribute == name) return gradfused_emulator::give(value, result);
  GRADFUSED_EMULATOR_ATTRIBUTES(GRADFUSED_EMULATOR_ATTRIBUTE)
#undef GRADFUSED_EMULATOR_ATTRIBUTE
  return gradfused_emulator::remember(cudaErrorInvalidValue);
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaPeekAtLastError(); }
inline cudaError_t cudaStreamGetDevice(cudaStream_t, int* device) { return gradfused_emulator::give(device, 0); }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return gradfused_emulator::give(status, cudaStreamCaptureStatusNone);
}

// ---- kernels

template <class... P> cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || size_t(value) > gradfused_emulator::kSharedMost) return gradfused_emulator::remember(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(gradfused_emulator::mutex);
  gradfused_emulator::shared_limits[reinterpret_cast<const void*>(kernel)] = size_t(value);
  return cudaSuccess;
}

template <class... P> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(P...)) {
  *attributes = {};
  attributes->maxThreadsPerBlock = int(gradfused_emulator::kMaxThreads);
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  return cudaSuccess;
}

template <class... P> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int, size_t) {
  return gradfused_emulator::give(blocks, 2);
}

// ---- memory

template <class T> cudaError_t cudaMalloc(T** pointer, size_t bytes) {
  void* p = *pointer = nullptr;
  if (bytes && posix_memalign(&p, 256, bytes)) return gradfused_emulator::remember(cudaErrorMemoryAllocation);
  if (bytes) memset(p, 0xFF, bytes);  // NaN, so that nothing relies on zeros
  return gradfused_emulator::give(pointer, static_cast<T*>(p));
}
inline cudaError_t cudaFree(void* pointer) { return free(pointer), cudaSuccess; }

inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes) memmove(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t = nullptr) {
  return cudaMemcpy(to, from, bytes, kind);
}
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  if (bytes) memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t n, cudaStream_t = nullptr) { return cudaMemset(to, value, n); }
