// Ranges of memory, and whether another range overlaps one of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "schema.h"

namespace gradfused {

using Span = std::pair<uintptr_t, uintptr_t>;  // first byte, and one past the last

// From the first to the last byte that a walk over `numel` elements touches.
inline Span span_of(const Operand& x, int64_t numel) {
  int64_t reach = x.dims ? 1 : numel;
  for (int d = 0; d < x.dims; ++d) reach += (x.sizes[d] - 1) * x.strides[d];
  const uintptr_t first = reinterpret_cast<uintptr_t>(x.data);
  return {first, first + uintptr_t(numel ? reach * itemsize(x.dtype) : 0)};
}

class Spans {
 public:
  void add(const Span& span) {
    if (span.first < span.second) spans_.push_back(span);
  }

  // Call once, after the last add(): sorts the ranges and merges those that overlap. True if any did.
  bool sort() {
    std::sort(spans_.begin(), spans_.end());
    size_t kept = 0;
    for (const Span& s : spans_) {
      if (kept && s.first < spans_[kept - 1].second) {
        spans_[kept - 1].second = std::max(spans_[kept - 1].second, s.second);
      } else {
        spans_[kept++] = s;
      }
    }
    const bool any = kept < spans_.size();
    spans_.resize(kept);
    return any;
  }

  bool meets(const Span& span) const {
    const auto after =
        std::upper_bound(spans_.begin(), spans_.end(), span.first, [](uintptr_t address, const Span& s) { return address < s.second; });
    return after != spans_.end() && after->first < span.second;
  }

 private:
  std::vector<Span> spans_;
};

}  // namespace gradfused
