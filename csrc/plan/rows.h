// The rows of a table and their groups' settings, which every native backend keeps between steps.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <vector>

#include "plan/spans.h"
#include "schema.h"

namespace gradfused {

class Rows {
 public:
  explicit Rows(size_t groups) : settings_(groups) {}

  // Rows are added before the first step; the sizes and strides are copied.
  void add(Row row) {
    for_each_operand(row, [this](Operand& x) { adopt(x); });
    rows_.push_back(row);
  }

  size_t size() const { return rows_.size(); }
  const Row& row(size_t i) const { return rows_[i]; }
  Settings& settings(size_t i) { return settings_.at(i); }

  // Sets a new address for a row's gradient, whose layout stays. False, with nothing changed, if it may share memory with what a step
  // writes: a new table then has to check that exactly.
  [[nodiscard]] bool move_grad(size_t i, char* data) {
    Operand grad = rows_[i].grad;
    grad.data = data;
    if (written().meets(span_of(grad, rows_[i].numel))) return false;
    rows_[i].grad = grad;
    moved_ = unchecked_ = true;
    return true;
  }

  // Whether gradients that are zeroed in the step overlap no other gradient, checked again after gradients moved.
  bool zeroes_apart() {
    const auto zeroes = [](const Settings& settings) { return settings.zero_grad_in_step; };
    if (!unchecked_ || std::none_of(settings_.begin(), settings_.end(), zeroes)) return true;
    Spans grads;
    for (const Row& row : rows_) grads.add(span_of(row.grad, row.numel));
    unchecked_ = grads.sort();
    return !unchecked_;
  }

  // How many steps have written tensors or were launched to. Counted natively, so that a Python interrupt cannot lose one.
  size_t taken() const { return taken_; }
  void count_taken(bool taken = true) { taken_ += taken; }

 protected:
  std::vector<Settings> settings_;
  std::vector<Row> rows_;
  bool moved_ = false;  // a gradient moved since the derived class last looked
  size_t taken_ = 0;

 private:
  // The memory that a step writes, and sources. Gathered at the first call, when all rows have been added.
  const Spans& written() {
    if (written_) return *written_;
    written_ = std::make_unique<Spans>();
    for (const Row& row : rows_) {
      for_each_operand(row, [&](const Operand& x) {
        if (x.data && &x != &row.grad) written_->add(span_of(x, row.numel));
      });
    }
    written_->sort();
    return *written_;
  }

  // Copies an operand's shape into memory that lives as long as the rows.
  void adopt(Operand& x) {
    if (!x.dims) return;
    shapes_.emplace_back(new int64_t[2 * size_t(x.dims)]);
    int64_t* const sizes = shapes_.back().get();
    for (int d = 0; d < x.dims; ++d) {
      sizes[d] = x.sizes[d];
      sizes[x.dims + d] = x.strides[d];
    }
    x.sizes = sizes;
    x.strides = sizes + x.dims;
  }

  std::vector<std::unique_ptr<int64_t[]>> shapes_;
  std::unique_ptr<Spans> written_;
  bool unchecked_ = false;  // gradients moved since zeroes_apart() was asked
};

}  // namespace gradfused
