// The rows of one optimizer on one device, cut into chunks and laid out as kernels read them. The plan computes addresses in device memory
// but never accesses the device: the backend copies the table there.
#pragma once

#include <cstddef>
#include <set>
#include <tuple>
#include <vector>

#include "plan/layout.h"
#include "plan/rows.h"

namespace gradfused::device {

class DevicePlan : public Rows {
 public:
  explicit DevicePlan(size_t groups) : Rows(groups), lr_from_(groups) {}

  // The group's lr is read from a float32 or float64 scalar in device memory from now on; from its options again if the address is null.
  void lr_from(size_t group, const char* address, DType dtype);

  // Device memory that the table needs, in bytes, and how many of them from the start pack() writes. The rows are complete.
  size_t bytes() { return image().end; }
  size_t packed_bytes() { return image().packed(); }

  // Writes to host memory what belongs at `base` in device memory, which is aligned to 256 bytes and is the caller's to keep. `squares`
  // is a float64 for each row, `skipped` a float64 count, both in device memory. A Job stands first.
  void pack(char* to, char* base, double* squares, double* skipped);

  // An option changed: uploaded with the next launch.
  void reconfigured() { stale_ = true; }

  // An upload was interrupted: everything that may be missing goes with the next launch.
  void forget_patches() { stale_ = moved_ = true; }

  // What the rows need together.
  Needs needs() { return plan(), job_.needs; }
  bool needs_stats() { return needs() & Need::measured; }

  // What changes between steps, as it is to stand in device memory.
  struct DevicePatch {
    const void* to;
    std::vector<char> bytes;
  };
  // The patches that are due: after this none are.
  std::vector<DevicePatch> patches();

  // The launches of a step after that of the statistics, in their order: one for each phase that some row takes part in.
  std::vector<Phase> phases();
  size_t chunks() { return plan(), chunks_.size(); }

  // How elements are accessed: plainly, by dtype, or one at a time, computed in float32 or float64.
  static constexpr int kAny = 4, kAnyWide = 5;
  // Every (rule, access, tile) there is work for, with the gradients where they are now. Tile 0 is for pieces, tile i for units up to
  // longest[i - 1], the last for those longer than all.
  std::set<std::tuple<int, int, int>> variants(const std::vector<int64_t>& longest);

 protected:
  void plan();

  Job job_{};

 private:
  struct Scalar {
    const char* data = nullptr;
    DType dtype = DType::float32;
  };
  // Of a row's chunks: whether there are some of a kind.
  struct Kinds {
    bool plain[2] = {}, any[2] = {};  // pieces, units
  };

  // Where the parts of the table lie, in bytes from its start, which is the job; what follows the tickets is for the kernels to fill.
  struct Image {
    size_t rows, settings, chunks, grads, shapes, tickets, sums, units, end;
    size_t packed() const { return sums; }
  };

  Image image();
  void plan_row(size_t index);
  void add_pieces(int32_t index, int64_t begin, int64_t end, bool plain);
  DeviceSettings device_settings(size_t group) const;
  std::vector<DeviceSettings> all_device_settings() const;
  std::vector<const char*> grads() const;

  std::vector<Scalar> lr_from_;
  bool planned_ = false, stale_ = false;
  std::vector<DeviceRow> device_rows_;
  std::vector<Chunk> chunks_;
  std::vector<Kinds> kinds_;
  std::vector<int32_t> first_row_;  // of each group, and the end: rows come group by group
  int64_t units_ = 0;
  size_t shape_words_ = 0;
};

}  // namespace gradfused::device
