// The rows of a step and their groups' options, as every native backend keeps them between steps.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "table.h"

namespace gradfused {

class Rows {
 public:
  explicit Rows(size_t groups) : hypers_(groups) {}

  // Rows are added before the first step; the sizes and strides are copied.
  void add(Row row) {
    adopt(row.param);
    adopt(row.grad);
    for (Operand& s : row.state) adopt(s);
    for (Operand* x : {&row.source, &row.master, &row.rest, &row.ema}) adopt(*x);
    rows_.push_back(row);
  }

  size_t size() const { return rows_.size(); }
  const Row& row(size_t i) const { return rows_[i]; }
  Hyper& hyper(size_t i) { return hypers_.at(i); }

  // The gradient of a row lies elsewhere from now on, in the same layout.
  void move_grad(size_t i, char* data) {
    rows_[i].grad.data = data;
    moved_ = true;
  }

 protected:
  std::vector<Hyper> hypers_;
  std::vector<Row> rows_;
  bool moved_ = false;  // since whoever asks last looked

 private:
  // Copies an operand's shape into memory that lives as long as the rows.
  void adopt(Operand& x) {
    if (!x.dims) return;
    shapes_.emplace_back(new int64_t[2 * size_t(x.dims)]);
    int64_t* const at = shapes_.back().get();
    for (int d = 0; d < x.dims; ++d) {
      at[d] = x.sizes[d];
      at[x.dims + d] = x.strides[d];
    }
    x.sizes = at;
    x.strides = at + x.dims;
  }

  std::vector<std::unique_ptr<int64_t[]>> shapes_;
};

}  // namespace gradfused
