// One optimizer's table on one device, and the launches of a step.
#pragma once

#include "cuda/job.h"
#include "plan/device.h"

namespace gradfused::cuda {

class Engine : public device::DevicePlan {
 public:
  using DevicePlan::DevicePlan;

  // grad_scale and found_inf are float32 scalars in device memory, or null.
  void stats(int device, void* stream, const float* grad_scale, const float* found_inf);
  void apply(int device, void* stream, const float* grad_scale, const float* found_inf);

 private:
  void upload(int device, void* stream);

  void* stream_ = nullptr;
  bool stream_checked_ = false;
};

}  // namespace gradfused::cuda
