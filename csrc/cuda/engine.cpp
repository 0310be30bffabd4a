#include "cuda/engine.h"

namespace gradfused::cuda {
namespace {

Launch launcher(Rule rule, bool full) {
  switch (rule) {
#define GRADFUSED_RULE(name, type, family) \
  case Rule::name: return full ? apply_##family##_full : apply_##family##_lean;
#include "rules.def"
#undef GRADFUSED_RULE
    default: return nullptr;  // refused when planned
  }
}

}  // namespace

void Engine::upload(int device, void* stream) {
  if (!stream_checked_ || stream != stream_) {
    check_stream(device, stream);
    stream_ = stream;
    stream_checked_ = true;
  }
  for (const DevicePatch& p : patches()) launch_patch(const_cast<void*>(p.to), p.bytes.data(), p.bytes.size(), device, stream);
}

void Engine::stats(int device, void* stream, const float* grad_scale, const float* found_inf) {
  upload(device, stream);
  job_.grad_scale = grad_scale;
  job_.found_inf = found_inf;
  launch_stats(job_, device, stream);
}

void Engine::apply(int device, void* stream, const float* grad_scale, const float* found_inf) {
  if (rows_.empty()) return;
  upload(device, stream);
  job_.grad_scale = grad_scale;
  job_.found_inf = found_inf;
  const Launch launch = launcher(rows_[0].rule, needs() & Need::full);
  for (const Phase phase : phases()) launch(job_, phase, device, stream);
}

}  // namespace gradfused::cuda
