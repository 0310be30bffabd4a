// Runs a kernel over its grid, at once and on the calling OS thread.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "block.h"
#include "errors.h"

using cudaStream_t = struct CUstream_st*;

namespace gradfused_emulator {

constexpr size_t kSharedDefault = 48 << 10, kSharedMost = 227 << 10;

inline std::mutex mutex;  // held by the launch under way
inline std::string last_report;
inline std::map<const void*, size_t> shared_limits;  // of the kernels that have another than the default
inline char* dynamic_shared = nullptr;

// What was wrong with the last launch that failed, empty if none did.
inline std::string emulator_report() {
  const std::lock_guard<std::mutex> lock(mutex);
  return last_report;
}

inline void emulator_clear_report() {
  const std::lock_guard<std::mutex> lock(mutex);
  last_report.clear();
}

struct Grid {
  unsigned blocks, threads;
  size_t shared;
  cudaStream_t stream;  // the only one there is
};

// What is wrong goes to `report`.
inline cudaError_t run(const Kernel& kernel, size_t shared_limit, const Grid& grid, std::string& report) {
  Order order;
  if (!order.read_environment()) {
    report = ": GRADFUSED_EMULATOR_ORDER is neither forward, reverse nor shuffle:<seed>";
    return cudaErrorInvalidValue;
  }
  if (grid.blocks < 1 || grid.blocks > 0x7FFFFFFF || grid.threads < 1 || grid.threads > kMaxThreads) {
    report = ": a grid of " + std::to_string(grid.blocks) + " blocks of " + std::to_string(grid.threads) + " threads";
    return cudaErrorInvalidConfiguration;
  }
  if (grid.shared > shared_limit) {
    report = ": " + std::to_string(grid.shared) + " bytes of dynamic shared memory, which cudaFuncSetAttribute did not allow";
    return cudaErrorInvalidValue;
  }
  // Some bytes behind should stay as they are. AddressSanitizer sees for itself, if allocated to size.
  const size_t guarded = grid.shared + (kAsan ? 0 : 1024);
  const std::unique_ptr<char, void (*)(void*)> shared(static_cast<char*>(malloc(guarded)), free);
  if (!shared) return cudaErrorMemoryAllocation;
  dynamic_shared = shared.get();
  gridDim.x = grid.blocks;
  blockDim.x = grid.threads;
  std::vector<unsigned> turns(grid.blocks);
  order.fill(turns.data(), grid.blocks);
  for (const unsigned i : turns) {
    blockIdx.x = i;
    std::fill_n(dynamic_shared, guarded, char(0xFF));  // which makes every float a NaN
    const std::string& wrong = block.run(kernel, grid.threads, order.of_block(i));
    if (!wrong.empty()) {
      report = ", block " + std::to_string(i) + ": " + wrong;
      return cudaErrorAssert;
    }
    if (std::any_of(dynamic_shared + grid.shared, dynamic_shared + guarded, [](char c) { return c != char(0xFF); })) {
      report = ", block " + std::to_string(i) + ": wrote beyond its dynamic shared memory";
      return cudaErrorIllegalAddress;
    }
  }
  return cudaSuccess;
}

inline unsigned long long launches = 0;  // so far

inline void launch(const Kernel& kernel, const void* function, const Grid& grid) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++launches;
  const auto limit = shared_limits.find(function);
  std::string report;
  if (!remember(run(kernel, limit == shared_limits.end() ? kSharedDefault : limit->second, grid, report))) return;
  last_report = std::string("kernel ") + kernel.name + report;
  fprintf(stderr, "cuda emulator: %s\n", last_report.c_str());
}

// A kernel and its grid, to be called with the kernel's arguments.
template <class... Parameters> struct Launch {
  const char* name;
  void (*kernel)(Parameters...);
  Grid grid;

  template <class... Arguments> void operator()(Arguments&&... arguments) const {
    static_assert((std::is_trivially_copyable_v<Parameters> && ...), "a kernel's parameters travel as bytes");
    static_assert((sizeof(Parameters) + ... + 0) <= 32764, "a kernel's parameters are 32764 bytes at most");
    const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
    const auto call = [&] { std::apply(kernel, values); };
    launch({name, [](const void* p) { (*static_cast<decltype(call)*>(p))(); }, &call}, reinterpret_cast<const void*>(kernel), grid);
  }
};
template <class... Parameters> Launch(const char*, void (*)(Parameters...), Grid) -> Launch<Parameters...>;

}  // namespace gradfused_emulator

#define GRADFUSED_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::gradfused_emulator::Launch{#kernel, kernel, {unsigned(grid), unsigned(block), size_t(shared_bytes), stream}}(__VA_ARGS__)

#define GRADFUSED_DYNAMIC_SHARED(name) char* const name = ::gradfused_emulator::dynamic_shared
