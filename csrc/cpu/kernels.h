// The interface between the engine and the kernels, which are compiled once for each instruction set.
#pragma once

#include "lpg/problem.h"
#include "plan/needs.h"

namespace gradfused::cpu {

// Units up to this length are processed whole, in a core's own cache. Longer ones are cut into segments whose sums are combined first.
constexpr int64_t kUnitMax = 16384;
// Elements a thread takes at a time. Partial sums are per chunk, so results do not depend on the number of threads.
constexpr int64_t kCpuChunk = 65536;
// Elements that pass through the stages together, so that gradients, states and scratch stay in the L1 cache.
constexpr int64_t kBlock = 1024;

// A thread's private memory: buffers for the operands of one block, of float64 at most.
constexpr int64_t kBuffers = 4 + kMaxStates;
constexpr int64_t kScratchBytes = kBuffers * kUnitMax * int64_t{sizeof(double)};

// A run of elements of one row: whole units, or a segment of a long one.
struct CpuChunk {
  int32_t row;
  int64_t begin, count;
};

// What the kernels know of a row besides its operands; all but `needs` and `unit0` is computed for each step.
struct RowStep {
  Needs needs = 0;
  Count count = {0, false, 1};
  double factor = 1;                 // s(n) of a scope wider than the unit
  double sigma = 0;                  // noise
  double weight_norm = 0, norm = 0;  // of the whole row, where the rule trusts them
  bool trusted = false;
  bool means_known = false, norms_known = false, directions_known = false;  // of its units, in CpuJob
  int64_t unit0 = 0;                                                        // its first unit's place in CpuJob's arrays
};

// One step's work, shared by all threads. Sums are float64 and each has one writer.
struct CpuJob {
  const Row* rows;
  const Settings* settings;
  const RowStep* steps;
  const CpuChunk* chunks;
  bool cached;         // the table is small enough to stay in a cache from one step to the next
  double unscale;      // 1 / grad_scale
  double* chunk_mean;  // a slot a chunk, of the unscaled gradient or of what is centred late
  double* chunk_sum;   // squares that a trust ratio is made of
  double* chunk_sq;    // centred sum of squares of the unscaled gradient
  double* chunk_weight_sq;
  double *unit_mean, *unit_sq, *unit_weight_sq, *unit_direction;
};

struct Kernels {
  const char* isa;
  // chunk_mean <- mean of the unscaled gradient
  void (*means)(const CpuJob&, int64_t chunk, char* scratch);
  // chunk_sq, and unit_mean where units are whole
  void (*norms)(const CpuJob&, int64_t chunk, char* scratch);
  // chunk_mean <- mean of the update (or of the decayed gradient, whichever is to be centred), changing nothing
  void (*late_means)(const CpuJob&, int64_t chunk, char* scratch);
  // chunk_weight_sq, and chunk_sum <- the squares of what a trust ratio compares them with
  void (*trust)(const CpuJob&, int64_t chunk, char* scratch);
  // the step
  void (*step)(const CpuJob&, int64_t chunk, char* scratch);
  // every stream in place with no math: the memory roof; `nothing` is 0
  void (*roof)(float* const* written, int writes, const float* const* read, int reads, int64_t begin, int64_t end, float nothing);
  const lpg::RowKernels& (*lpg_rows)();
  const lpg::ColumnKernels& (*lpg_columns)();
};

const Kernels& kernels_generic();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace gradfused::cpu
