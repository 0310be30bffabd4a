// Notices what changed since a table was built, for all its tensors in one call.
#pragma once

#include <pybind11/pybind11.h>

#include <unordered_map>
#include <utility>
#include <vector>

#include "bind/tensors.h"
#include "rows.h"

namespace gradfused::bind {

// A steady step must not spend more on finding out that nothing changed than on the work itself, so this asks the tensors without
// Python code for each. It knows Python objects, not torch: how to ask comes from the caller.
class Watch {
 public:
  // `tensor` and `exchange` as Tensors has them; `groups` and `state` the optimizer's, of which every parameter and every state dict is
  // remembered.
  Watch(pybind11::object tensor, pybind11::object exchange, pybind11::list groups, pybind11::dict state);

  // The next row of the table is this parameter, with these tensors in its state.
  void add(pybind11::object param, pybind11::dict state, pybind11::list keys);

  // True if the table still describes the optimizer; gradients that moved, but kept their layout, are taken over into it. False
  // asks for a new table.
  bool refresh(pybind11::list groups, pybind11::dict state, Rows& rows) const;

 private:
  // What a tensor was.
  struct Seen {
    explicit Seen(const View& view);
    View view() const;
    bool still(const View& now) const { return now.address == address && now.lies_as(view()); }

    uintptr_t address, dtype;
    std::vector<int64_t> sizes, strides;
  };
  struct Kept {
    pybind11::object key, tensor;
    Seen seen;
  };
  struct Watched {
    pybind11::object param;
    Seen seen, grad;  // the gradient itself is not kept alive
    pybind11::dict state;
    Py_ssize_t keys;  // how many the state has: one that is of no use any more is to go
    std::vector<Kept> kept;
  };

  bool same_parameters(const pybind11::list& groups) const;
  bool same_states(const pybind11::dict& state) const;
  bool same_state(const Watched& row) const;
  bool same_gradient(const Watched& row, const pybind11::object& grad, Rows& rows, size_t at) const;

  const Tensors tensors_;
  std::vector<pybind11::object> params_;
  std::vector<Py_ssize_t> group_sizes_;
  std::unordered_map<PyObject*, bool> has_row_;  // of each parameter
  std::vector<std::pair<PyObject*, PyObject*>> states_;
  std::vector<Watched> rows_;
};

}  // namespace gradfused::bind
