#include "bind/watch.h"

namespace py = pybind11;

namespace gradfused::bind {
Watch::Seen::Seen(const View& v)
    : address(v.address), dtype(v.dtype), sizes(v.sizes, v.sizes + v.dims), strides(v.strides, v.strides + v.dims) {}

View Watch::Seen::view() const { return {address, dtype, sizes.size(), sizes.data(), strides.data()}; }

Watch::Watch(py::object tensor, py::object exchange, py::list groups, py::dict state) : tensors_(tensor, exchange) {
  for (py::handle group : groups) {
    const py::list params = group["params"];
    group_sizes_.push_back(Py_ssize_t(params.size()));
    for (py::handle p : params) params_.push_back(py::reinterpret_borrow<py::object>(p));
  }
  for (const py::object& p : params_) has_row_[p.ptr()] = false;
  for (auto item : state) states_.emplace_back(item.first.ptr(), item.second.ptr());
}

void Watch::add(py::object param, py::dict state, py::list keys) {
  Watched row{param, Seen(tensors_(param.ptr())),  Seen(tensors_(tensors_.grad(param.ptr()).ptr())),
              state, PyDict_GET_SIZE(state.ptr()), {}};
  for (py::handle key : keys) {
    const py::object tensor = state[key];
    row.kept.push_back({py::reinterpret_borrow<py::object>(key), tensor, Seen(tensors_(tensor.ptr()))});
  }
  rows_.push_back(std::move(row));
  has_row_[param.ptr()] = true;
}

bool Watch::same_parameters(const py::list& groups) const {
  if (groups.size() != group_sizes_.size()) return false;
  auto known = params_.begin();
  auto size = group_sizes_.begin();
  for (py::handle group : groups) {
    const py::list params = group["params"];
    if (Py_ssize_t(params.size()) != *size++) return false;
    for (py::handle p : params) {
      if (!p.is(*known++)) return false;
    }
  }
  return true;
}

bool Watch::same_states(const py::dict& state) const {
  if (size_t(PyDict_GET_SIZE(state.ptr())) != states_.size()) return false;
  auto known = states_.begin();
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value); ++known) {
    if (known->first != key || known->second != value) return false;
  }
  return true;
}

bool Watch::same_state(const Watched& row) const {
  if (PyDict_GET_SIZE(row.state.ptr()) != row.keys) return false;
  for (const Kept& k : row.kept) {
    PyObject* const tensor = PyDict_GetItemWithError(row.state.ptr(), k.key.ptr());
    if (tensor != k.tensor.ptr() || !k.seen.still(tensors_(tensor))) return false;
  }
  return true;
}

bool Watch::same_gradient(const Watched& row, const py::object& grad, Rows& rows, size_t at) const {
  const View now = tensors_(grad.ptr());
  if (!now.lies_as(row.grad.view())) return false;
  if (now.address == reinterpret_cast<uintptr_t>(rows.row(at).grad.data)) return true;
  if (now.address == 0) return false;  // no memory of its own: a wrapper, to be refused
  return rows.move_grad(at, reinterpret_cast<char*>(now.address));
}

bool Watch::refresh(py::list groups, py::dict state, Rows& rows) const {
  if (!same_parameters(groups) || !same_states(state)) return false;
  if (rows_.size() < has_row_.size()) {
    for (const py::object& p : params_) {
      if (!has_row_.at(p.ptr()) && !tensors_.grad(p.ptr()).is_none()) return false;
    }
  }
  try {
    for (size_t i = 0; i < rows_.size(); ++i) {
      const Watched& row = rows_[i];
      const py::object grad = tensors_.grad(row.param.ptr());
      if (grad.is_none() || !row.seen.still(tensors_(row.param.ptr()))) return false;
      if (!same_state(row) || !same_gradient(row, grad, rows, i)) return false;
    }
  } catch (const py::error_already_set&) {  // a tensor that cannot be described, sparse say: whoever builds a table says what is wrong
    return false;
  }
  return rows.zeroes_apart();
}

}  // namespace gradfused::bind
