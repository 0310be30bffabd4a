// CUDA's error codes, and the last error of each OS thread.
#pragma once

// clang-format off
#define GRADFUSED_EMULATOR_ERRORS(E)                                                                        \
  E(cudaSuccess, 0) E(cudaErrorInvalidValue, 1) E(cudaErrorMemoryAllocation, 2)                             \
  E(cudaErrorInitializationError, 3) E(cudaErrorInvalidConfiguration, 9) E(cudaErrorInsufficientDriver, 35) \
  E(cudaErrorInvalidDeviceFunction, 98) E(cudaErrorNoDevice, 100) E(cudaErrorInvalidDevice, 101)            \
  E(cudaErrorNoKernelImageForDevice, 209) E(cudaErrorUnsupportedPtxVersion, 222)                            \
  E(cudaErrorInvalidResourceHandle, 400) E(cudaErrorNotReady, 600) E(cudaErrorIllegalAddress, 700)          \
  E(cudaErrorLaunchOutOfResources, 701) E(cudaErrorAssert, 710) E(cudaErrorMisalignedAddress, 716)          \
  E(cudaErrorLaunchFailure, 719) E(cudaErrorNotSupported, 801) E(cudaErrorUnknown, 999)
// clang-format on

#define GRADFUSED_EMULATOR_VALUE(name, value) name = value,
enum cudaError { GRADFUSED_EMULATOR_ERRORS(GRADFUSED_EMULATOR_VALUE) };
#undef GRADFUSED_EMULATOR_VALUE
using cudaError_t = cudaError;

inline const char* cudaGetErrorName(cudaError_t error) {
#define GRADFUSED_EMULATOR_NAME(name, value) \
  if (error == name) return #name;
  GRADFUSED_EMULATOR_ERRORS(GRADFUSED_EMULATOR_NAME)
#undef GRADFUSED_EMULATOR_NAME
  return "unrecognized error code";
}
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : cudaGetErrorName(error); }

namespace gradfused_emulator {

inline thread_local cudaError_t last_error = cudaSuccess;

// What an API call returns, remembered if it is an error.
inline cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace gradfused_emulator

inline cudaError_t cudaPeekAtLastError() { return gradfused_emulator::last_error; }

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = gradfused_emulator::last_error;
  gradfused_emulator::last_error = cudaSuccess;
  return error;
}
