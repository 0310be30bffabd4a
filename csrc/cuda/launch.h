// Launching a kernel over the whole device.
#pragma once

#include <algorithm>
#include <atomic>
#include <string>

#include "cuda/job.h"

// The emulator of the tests compiles the same kernels for the CPU, and has a macro of its own.
#ifndef GRADFUSED_EMULATED
#define GRADFUSED_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<(grid), (block), (shared), (stream)>>>(__VA_ARGS__)
#endif

namespace gradfused::cuda {

// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "asking for the current device");
    if (device != before_) check(cudaSetDevice(device), "choosing device " + std::to_string(device));
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// How many blocks of a kernel a device runs at once.
template <auto kKernel> int resident_blocks(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // 0: not asked yet
  if (device < kDevices && known[device]) return known[device];
  int blocks = 0, processors = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, kThreads, 0), "loading the kernels");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "asking for the multiprocessors");
  const int most = std::max(1, blocks * processors);
  if (device < kDevices) known[device] = most;
  return most;
}

// As many blocks as there is work for, and no more than run at once: each takes its share of the chunks.
template <auto kKernel, class... Arguments>
void launch(const char* name, int work, int device, void* stream, const Arguments&... arguments) {
  const DeviceGuard guard(device);
  const unsigned blocks = unsigned(std::clamp(work, 1, resident_blocks<kKernel>(device)));
  GRADFUSED_LAUNCH(kKernel, blocks, unsigned(kThreads), 0, static_cast<cudaStream_t>(stream), arguments...);
  check(cudaGetLastError(), std::string("launching ") + name);
}

}  // namespace gradfused::cuda
