// Notices what changed since a table was built, for all its tensors in one call.
#pragma once

#include <pybind11/pybind11.h>

#include <unordered_map>
#include <utility>
#include <vector>

#include "rows.h"

namespace gradfused::bind {

// A method or getter of a C type, called without the look-up and argument handling that cost more than what torch does in it.
class Accessor {
 public:
  explicit Accessor(pybind11::object descriptor);
  pybind11::object operator()(const pybind11::object& self) const;

 private:
  pybind11::object descriptor_, no_arguments_;
  PyMethodDef* method_ = nullptr;
  PyGetSetDef* getter_ = nullptr;
};

// A steady step must not spend more on finding out that nothing changed than on the work itself, so this asks the tensors without
// Python code for each. It knows Python objects, not torch: how to ask comes from the caller.
class Watch {
 public:
  // `tensor` is torch's tensor type, whose grad, data_ptr, stride, is_contiguous, dtype and shape are used; `groups` and `state` the
  // optimizer's, of which every parameter and every state dict is remembered.
  Watch(pybind11::object tensor, pybind11::list groups, pybind11::dict state);

  // The next row of the table is this parameter, with these tensors in its state.
  void add(pybind11::object param, pybind11::dict state, pybind11::list keys);

  // True if the table still describes the optimizer; gradients that moved, but kept their layout, are taken over into it. False
  // asks for a new table.
  bool refresh(pybind11::list groups, pybind11::dict state, Rows& rows) const;

 private:
  struct Kept {
    pybind11::object key, tensor;
    uintptr_t address;
  };
  // Whether a tensor is contiguous is cheaper to ask than its strides.
  struct Layout {
    bool contiguous;
    pybind11::object stride;
  };
  struct Watched {
    pybind11::object param, shape, dtype;  // a gradient has the parameter's shape
    uintptr_t address;
    Layout param_layout, grad_layout;
    pybind11::dict state;
    std::vector<Kept> kept;
  };

  uintptr_t address(const pybind11::object& tensor) const;
  bool is_contiguous(const pybind11::object& tensor) const;
  Layout layout(const pybind11::object& tensor) const;
  bool same_layout(const Layout& known, const pybind11::object& tensor) const;
  bool same_parameters(const pybind11::list& groups) const;
  bool same_states(const pybind11::dict& state) const;
  bool same_state(const Watched& row) const;
  bool same_gradient(const Watched& row, const pybind11::object& grad, Rows& rows, size_t at) const;

  const Accessor grad_, data_ptr_, stride_, is_contiguous_, dtype_, shape_;
  std::vector<pybind11::object> params_;
  std::vector<Py_ssize_t> group_sizes_;
  std::unordered_map<PyObject*, bool> has_row_;  // of each parameter
  std::vector<std::pair<PyObject*, PyObject*>> states_;
  std::vector<Watched> rows_;
};

}  // namespace gradfused::bind
