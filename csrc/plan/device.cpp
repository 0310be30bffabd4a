#include "plan/device.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "math/rules.h"

namespace gradfused::device {
namespace {

// Every operand a 16-byte aligned array of one dtype, but that copies and averages of 16-bit weights may be of float32; the gradient's
// address is looked at in each step.
bool is_plain(const Row& row) {
  const auto fits = [&](const Operand& x) { return x.dims == 0 && x.dtype == row.param.dtype; };
  const auto aligned = [](const Operand& x) { return reinterpret_cast<uintptr_t>(x.data) % 16 == 0; };
  const bool may_widen = itemsize(row.param.dtype) < itemsize(DType::float32);
  const auto rides = [&](const Operand& x) {
    return !x.data || (x.dims == 0 && aligned(x) && (x.dtype == row.param.dtype || (may_widen && x.dtype == DType::float32)));
  };
  if (!fits(row.param) || !aligned(row.param) || !fits(row.grad)) return false;
  if (!rides(row.master) || !rides(row.ema)) return false;
  const auto matches = [&](const Operand& x) { return !x.data || (fits(x) && aligned(x)); };
  return matches(row.source) && matches(row.kahan_comp) && std::all_of(row.state, row.state + kMaxStates, matches);
}

// Threads for a unit: as many as it has 16-byte packs, up to a warp, or the block.
int16_t lanes_for(int64_t length, int64_t width) {
  if (length > kWarpUnit) return kThreads;
  int16_t lanes = 1;
  while (lanes < kLanes && lanes * width < length) lanes = int16_t(lanes * 2);
  return lanes;
}

constexpr size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

void DevicePlan::lr_from(size_t group, const char* address, DType dtype) {
  lr_from_.at(group) = {address, dtype};
  stale_ = true;
}

void DevicePlan::add_pieces(int32_t index, int64_t begin, int64_t end, bool plain) {
  const int64_t width = 16 / itemsize(rows_[size_t(index)].param.dtype);
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = std::min(kChunk, end - first), tail = plain ? count % width : 0;
    if (count > tail) chunks_.push_back({first, int32_t(count - tail), index, 0, plain});
    if (tail) chunks_.push_back({first + count - tail, int32_t(tail), index, 0, false});
  }
}

// Cuts a row into chunks.
void DevicePlan::plan_row(size_t index) {
  const Row& row = rows_[index];
  DeviceRow& r = device_rows_[index];
  r = {};
  r.row = row;
  r.needs = needs_of(row, settings_[size_t(row.group)], kBlockUnit);
  r.unit0 = units_;
  r.chunk0 = int32_t(chunks_.size());
  if (row.numel) {
    const int64_t units = row.numel / row.unit_length, width = 16 / itemsize(row.param.dtype);
    if (r.needs & Need::split) units_ += units;
    const bool by_units = row.centre || (r.needs & Need::unit_norms);
    const bool plain = is_plain(row) && (!by_units || row.unit_length % width == 0);
    if (!by_units) {
      add_pieces(int32_t(index), 0, row.numel, plain);
    } else if (r.needs & Need::long_units) {
      for (int64_t u = 0; u < units; ++u) add_pieces(int32_t(index), u * row.unit_length, (u + 1) * row.unit_length, plain);
    } else {
      const int16_t lanes = lanes_for(row.unit_length, plain ? width : 1);
      const int64_t groups = kThreads / lanes,
                    together = groups == 1 ? 1 : groups * std::max<int64_t>(1, kChunk / (groups * row.unit_length));
      for (int64_t u = 0; u < units; u += together) {
        chunks_.push_back({u * row.unit_length, int32_t(std::min(together, units - u) * row.unit_length), int32_t(index), lanes, plain});
      }
    }
  }
  r.chunk1 = int32_t(chunks_.size());
  job_.needs |= r.needs;
  for_each_operand(row, [this](const Operand& x) { shape_words_ += 2 * size_t(x.dims); });
}

void DevicePlan::plan() {
  if (planned_) return;
  device_rows_.resize(rows_.size());
  kinds_.resize(rows_.size());
  first_row_.assign(settings_.size() + 1, 0);
  for (const Row& row : rows_) ++first_row_[size_t(row.group) + 1];
  std::partial_sum(first_row_.begin(), first_row_.end(), first_row_.begin());
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (std::strcmp(math::traits_of(rows_[i].rule).family, math::traits_of(rows_[0].rule).family) != 0) {
      throw std::invalid_argument("rules of two families in one table");
    }
    plan_row(i);
  }
  for (const Chunk& c : chunks_) (c.plain ? kinds_[size_t(c.row)].plain : kinds_[size_t(c.row)].any)[c.lanes != 0] = true;
  planned_ = true;
}

DevicePlan::Image DevicePlan::image() {
  plan();
  size_t end = aligned(sizeof(Job));
  const auto place = [&](size_t bytes) {
    const size_t begin = end;
    end += aligned(bytes);
    return begin;
  };
  Image image;
  image.rows = place(device_rows_.size() * sizeof(DeviceRow));
  image.settings = place(settings_.size() * sizeof(DeviceSettings));
  image.chunks = place(chunks_.size() * sizeof(Chunk));
  image.grads = place(rows_.size() * sizeof(char*));
  image.shapes = place(shape_words_ * sizeof(int64_t));
  image.tickets = place((1 + rows_.size()) * sizeof(unsigned));
  image.sums = place(chunks_.size() * sizeof(Sums));
  image.units = place(size_t(units_) * sizeof(Unit));
  image.end = end;
  return image;
}

DeviceSettings DevicePlan::device_settings(size_t group) const {
  DeviceSettings d{};
  d.settings = settings_[group];
  d.lr_at = lr_from_[group].data;
  d.lr_dtype = lr_from_[group].dtype;
  d.row0 = first_row_[group];
  d.row1 = first_row_[group + 1];
  return d;
}

std::vector<DeviceSettings> DevicePlan::all_device_settings() const {
  std::vector<DeviceSettings> all;
  for (size_t g = 0; g < settings_.size(); ++g) all.push_back(device_settings(g));
  return all;
}

std::vector<const char*> DevicePlan::grads() const {
  std::vector<const char*> addresses;
  for (const Row& row : rows_) addresses.push_back(row.grad.data);
  return addresses;
}

void DevicePlan::pack(char* to, char* base, double* squares, double* skipped) {
  const Image parts = image();
  std::memset(to, 0, parts.packed());
  // Writes here, and says where that is there.
  const auto fill = [&](size_t where, const auto& values) {
    using T = std::decay_t<decltype(values[0])>;
    if (!values.empty()) std::memcpy(to + where, values.data(), values.size() * sizeof(T));
    return reinterpret_cast<T*>(base + where);
  };
  job_.settings = fill(parts.settings, all_device_settings());
  job_.chunks = fill(parts.chunks, chunks_);
  job_.grads = fill(parts.grads, grads());

  int64_t* words = reinterpret_cast<int64_t*>(to + parts.shapes);
  const int64_t* device_words = reinterpret_cast<const int64_t*>(base + parts.shapes);
  const auto move_shape = [&](Operand& x) {
    if (!x.dims) return;
    std::copy_n(x.sizes, x.dims, words);
    std::copy_n(x.strides, x.dims, words + x.dims);
    x.sizes = device_words;
    x.strides = device_words + x.dims;
    words += 2 * x.dims;
    device_words += 2 * x.dims;
  };
  std::vector<DeviceRow> moved = device_rows_;
  for (DeviceRow& r : moved) for_each_operand(r.row, move_shape);
  job_.rows = fill(parts.rows, moved);
  job_.tickets = reinterpret_cast<unsigned*>(base + parts.tickets);
  job_.sums = reinterpret_cast<Sums*>(base + parts.sums);
  job_.units = reinterpret_cast<Unit*>(base + parts.units);

  job_.squares = squares;
  job_.skipped = skipped;
  job_.row_count = int32_t(rows_.size());
  job_.chunk_count = int32_t(chunks_.size());
  std::memcpy(to, &job_, sizeof job_);
  moved_ = stale_ = false;
}

std::vector<Phase> DevicePlan::phases() {
  std::vector<Phase> due;
  for (int i = 0; i < int(Phase::count); ++i) {
    const Phase phase = Phase(i);
    if (needs() & need_of(phase) & ~Need::measured) due.push_back(phase);
  }
  return due;
}

std::vector<DevicePlan::DevicePatch> DevicePlan::patches() {
  std::vector<DevicePatch> due;
  const auto add = [&](const void* to, const auto& values) {
    const char* const first = reinterpret_cast<const char*>(values.data());
    due.push_back({to, {first, first + values.size() * sizeof(values[0])}});
  };
  if (moved_) add(job_.grads, grads());
  if (stale_) add(job_.settings, all_device_settings());
  moved_ = stale_ = false;
  return due;
}

std::set<std::tuple<int, int, int>> DevicePlan::variants(const std::vector<int64_t>& longest) {
  plan();
  std::set<std::tuple<int, int, int>> found;
  for (size_t i = 0; i < rows_.size(); ++i) {
    const Row& row = rows_[i];
    const bool aligned = reinterpret_cast<uintptr_t>(row.grad.data) % 16 == 0;
    const int any = row.param.dtype == DType::float64 ? kAnyWide : kAny;
    const int fitting = 1 + int(std::lower_bound(longest.begin(), longest.end(), row.unit_length) - longest.begin());
    for (const int units : {0, 1}) {
      const int tile = units ? fitting : 0;
      const bool plain = kinds_[i].plain[units];
      if (plain && aligned) found.insert({int(row.rule), int(row.param.dtype), tile});
      if (kinds_[i].any[units] || (plain && !aligned)) found.insert({int(row.rule), any, tile});
    }
  }
  return found;
}

}  // namespace gradfused::device
