// The table in device memory, as the kernels of CUDA and Triton read it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan/needs.h"

namespace gradfused::device {

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr int kWarps = kThreads / kLanes;

// A block's shared memory in CUDA, in which a unit's gradient waits between its statistics and its update: read from memory once.
constexpr int kTileBytes = 32768;
// Elements a block takes at a time. The order of every sum is fixed by this, not by the grid.
constexpr int64_t kChunk = 8192;
// Units up to this length belong to a warp or a part of one, longer ones to a block, and those beyond kBlockUnit are cut into pieces.
constexpr int64_t kWarpUnit = kTileBytes / kWarps / int64_t{sizeof(float)};
constexpr int64_t kBlockUnit = 65536;

// A run of elements of one row.
struct Chunk {
  int64_t begin;
  int32_t count;
  int32_t row;
  int16_t lanes;  // threads that share a unit, a power of two; 0: a piece, of which no unit's statistics are taken
  bool plain;     // every operand is an array that 16-byte accesses suit, but for the gradient's address, which may move
};

// What a chunk's statistics leave behind. One writer each.
struct Sums {
  double sum;      // the mean of the unscaled gradient or of the rehearsed update, or the sum of the squares that a trust ratio is made of
  double squares;  // around the chunk's own mean where it is a piece of something centred
  double weight_squares;  // for adaptive clipping and trust ratios
};

// What is known of a unit that lies in several chunks.
struct Unit {
  double mean, squares, weight_squares, direction;
};

struct DeviceRow {
  Row row;
  Needs needs;
  int64_t unit0;             // its first place among the units, if `split`
  int32_t chunk0, chunk1;    // its chunks
  double norm, weight_norm;  // of the whole row, for its trust ratio: known after its phase
};

struct DeviceSettings {
  Settings settings;
  const char* lr_at;  // where lr is read from, if not null
  DType lr_dtype;
  int32_t row0, row1;  // the group's rows
};

// Passed to every kernel by value; all pointers are to device memory.
struct Job {
  DeviceRow* rows;
  const DeviceSettings* settings;
  const Chunk* chunks;
  const char* const* grads;  // the gradients' addresses; those in the rows are ignored
  Sums* sums;                // of each chunk
  Unit* units;
  double* squares;          // of each row: what norms are made of
  unsigned* tickets;        // what is done, in blocks and in chunks of each row; 0 between launches
  const float* grad_scale;  // null: 1
  const float* found_inf;   // null, or not zero: the step is not taken
  double* skipped;          // counts steps that were not taken for what the norms saw
  int32_t row_count, chunk_count;
  Needs needs;  // of any row
};

}  // namespace gradfused::device
