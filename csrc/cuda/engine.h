// One optimizer's table on one device, and the launches of a step.
#pragma once

#include <cstdint>

#include "plan/device.h"

namespace gradfused::cuda {

class Engine : public device::DevicePlan {
 public:
  using DevicePlan::DevicePlan;

  // grad_scale and found_inf are the addresses of float32 scalars in device memory, or 0.
  void stats(int device, uintptr_t stream, uintptr_t grad_scale, uintptr_t found_inf);
  void apply(int device, uintptr_t stream, uintptr_t grad_scale, uintptr_t found_inf);

 private:
  void prepare(int device, uintptr_t stream, uintptr_t grad_scale, uintptr_t found_inf);

  void* stream_ = nullptr;
  bool stream_checked_ = false;
};

}  // namespace gradfused::cuda
