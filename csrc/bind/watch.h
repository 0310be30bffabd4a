// Notices what changed since a table was built, for all its tensors in one call, and holds them for the time of a step.
#pragma once

#include <pybind11/pybind11.h>

#include <unordered_map>
#include <utility>
#include <vector>

#include "bind/tensors.h"
#include "plan/rows.h"

namespace gradfused::bind {

// A steady step must not spend more on finding out that nothing changed than on the work itself, so this asks the tensors without
// Python code for each. It knows Python objects, not torch: how to ask comes from the caller.
//
// Between two steps it keeps no tensor alive. What it remembers of one is the address of the Python object and where its elements
// lie. An object that has died may have left its address to another one: that makes no difference, because everything that a kernel
// is told of a tensor is asked again of the one that is there now.
class Watch {
 public:
  // `tensor`, `storage`, `exchange` and `shim` are as in Tensors; `groups` and `state` are the optimizer's; `sources` says where the
  // weights of some parameters are read in their place. For each row of the table, in order, `rows` has its parameter's number among those
  // of all groups, the parameter, its gradient, its state by key, and whether the step leaves the gradient at zero.
  Watch(pybind11::object tensor, pybind11::object storage, pybind11::object exchange, bool shim, pybind11::list groups,
        pybind11::dict state, pybind11::dict sources, pybind11::list rows);

  // If the tables still describe the optimizer, gradients that moved, but kept their layout, are taken over into them. Returns three
  // lists that hold what the step uses: parameters, all tensors that it writes, and those that it only reads. None asks for a new
  // table.
  pybind11::object refresh(pybind11::list groups, pybind11::dict state, pybind11::dict sources, pybind11::list tables) const;

 private:
  // Objects that a dict holds, in its order.
  using Pairs = std::vector<std::pair<PyObject*, PyObject*>>;

  // How a tensor lay: its sizes and then its strides stand in shapes_, from `shape` on.
  struct Seen {
    uintptr_t address, dtype;
    int64_t itemsize;
    size_t dims, shape;
  };
  // A state tensor: its place in its parameter's state dict, and the key there.
  struct Kept {
    Py_ssize_t place;
    pybind11::object key;
    PyObject* tensor;
  };
  struct Watched {
    size_t number;
    Py_ssize_t state, source;  // places in states_ and sources_, or -1
    Py_ssize_t keys;           // how many its state has: one that is of no use any more has to go, which takes a new table
    bool zeroed;
    std::vector<Kept> kept;
  };
  struct Held {
    pybind11::list params, written, read, others;  // the others have no row
  };
  using Places = std::unordered_map<PyObject*, Py_ssize_t>;

  void add(const pybind11::tuple& row, const Places& states, const Places& sources);
  void add_state(Watched& row, const pybind11::dict& kept);
  void see(const pybind11::handle& tensor);
  View view(const Seen& seen) const;

  bool same_parameters(const pybind11::list& groups) const;
  bool gather(const Held& held) const;
  bool gather_state(const Watched& row, const pybind11::list& written) const;
  bool gather_gradients(const Held& held) const;
  bool lies_still(const Held& held, const std::vector<Rows*>& tables) const;
  bool same_gradient(const Seen& seen, PyObject* grad, const std::vector<Rows*>& tables, size_t row) const;

  Tensors tensors_;
  // Not owned, and followed only once they are known to be what the optimizer holds now.
  std::vector<PyObject*> params_;
  Pairs states_, sources_;
  std::vector<Py_ssize_t> group_sizes_;
  std::vector<bool> stepped_;  // whether a parameter has a row, itself or where it is listed once more
  std::vector<Watched> rows_;
  std::vector<Seen> seen_;  // for each row its parameter, its state, its source if it has one, and its gradient
  std::vector<int64_t> shapes_;
  bool complete_ = true;  // false if another thread changed the optimizer while the table was made: it serves one step
};

}  // namespace gradfused::bind
