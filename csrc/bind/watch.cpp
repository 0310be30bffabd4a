#include "bind/watch.h"

namespace py = pybind11;

namespace gradfused::bind {
Accessor::Accessor(py::object descriptor) : descriptor_(std::move(descriptor)), no_arguments_(py::tuple()) {
  PyObject* d = descriptor_.ptr();
  if (Py_TYPE(d) == &PyMethodDescr_Type) method_ = reinterpret_cast<PyMethodDescrObject*>(d)->d_method;
  if (Py_TYPE(d) == &PyGetSetDescr_Type) getter_ = reinterpret_cast<PyGetSetDescrObject*>(d)->d_getset;
}

py::object Accessor::operator()(const py::object& self) const {
  PyObject* const tensor = self.ptr();
  PyObject* result;
  if (getter_) {
    result = getter_->get(tensor, getter_->closure);
  } else if (method_ && method_->ml_flags == METH_NOARGS) {
    result = method_->ml_meth(tensor, nullptr);
  } else if (method_ && method_->ml_flags == (METH_VARARGS | METH_KEYWORDS)) {
    result = reinterpret_cast<PyCFunctionWithKeywords>(reinterpret_cast<void (*)()>(method_->ml_meth))(tensor, no_arguments_.ptr(), nullptr);
  } else {
    PyObject* args[] = {tensor};
    result = PyObject_Vectorcall(descriptor_.ptr(), args, 1, nullptr);
  }
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

Watch::Watch(py::object tensor, py::list groups, py::dict state)
    : grad_(tensor.attr("grad")),
      data_ptr_(tensor.attr("data_ptr")),
      stride_(tensor.attr("stride")),
      is_contiguous_(tensor.attr("is_contiguous")),
      dtype_(tensor.attr("dtype")),
      shape_(tensor.attr("shape")) {
  for (py::handle group : groups) {
    const py::list params = group["params"];
    group_sizes_.push_back(Py_ssize_t(params.size()));
    for (py::handle p : params) params_.push_back(py::reinterpret_borrow<py::object>(p));
  }
  for (const py::object& p : params_) has_row_[p.ptr()] = false;
  for (auto item : state) states_.emplace_back(item.first.ptr(), item.second.ptr());
}

void Watch::add(py::object param, py::dict state, py::list keys) {
  const py::object grad = grad_(param);
  Watched row{param, shape_(grad), dtype_(grad), address(param), layout(param), layout(grad), state, {}};
  for (py::handle key : keys) {
    const py::object tensor = state[key];
    row.kept.push_back({py::reinterpret_borrow<py::object>(key), tensor, address(tensor)});
  }
  rows_.push_back(std::move(row));
  has_row_[param.ptr()] = true;
}

uintptr_t Watch::address(const py::object& tensor) const { return uintptr_t(PyLong_AsUnsignedLongLong(data_ptr_(tensor).ptr())); }

bool Watch::is_contiguous(const py::object& tensor) const { return is_contiguous_(tensor).ptr() == Py_True; }

Watch::Layout Watch::layout(const py::object& tensor) const { return {is_contiguous(tensor), stride_(tensor)}; }

bool Watch::same_layout(const Layout& known, const py::object& tensor) const {
  return known.contiguous ? is_contiguous(tensor) : stride_(tensor).equal(known.stride);
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
  for (const Kept& k : row.kept) {
    if (PyDict_GetItemWithError(row.state.ptr(), k.key.ptr()) != k.tensor.ptr() || address(k.tensor) != k.address) return false;
  }
  return true;
}

bool Watch::same_gradient(const Watched& row, const py::object& grad, Rows& rows, size_t at) const {
  if (!same_layout(row.grad_layout, grad)) return false;
  const uintptr_t now = address(grad);
  if (now == reinterpret_cast<uintptr_t>(rows.row(at).grad.data)) return true;
  if (now == 0) return false;  // no memory of its own: a wrapper, to be refused
  if (!dtype_(grad).is(row.dtype) || !shape_(grad).equal(row.shape)) return false;
  rows.move_grad(at, reinterpret_cast<char*>(now));
  return true;
}

bool Watch::refresh(py::list groups, py::dict state, Rows& rows) const {
  if (!same_parameters(groups) || !same_states(state)) return false;
  if (rows_.size() < has_row_.size()) {
    for (const py::object& p : params_) {
      if (!has_row_.at(p.ptr()) && !grad_(p).is_none()) return false;
    }
  }
  for (size_t i = 0; i < rows_.size(); ++i) {
    const Watched& row = rows_[i];
    const py::object grad = grad_(row.param);
    if (grad.is_none() || address(row.param) != row.address) return false;
    if (!shape_(row.param).equal(row.shape) || !same_layout(row.param_layout, row.param)) return false;
    if (!same_state(row)) return false;
    if (!same_gradient(row, grad, rows, i)) return false;
  }
  return true;
}

}  // namespace gradfused::bind
