#include "bind/tensors.h"

namespace py = pybind11;

namespace gradfused::bind {
namespace {

// The table of functions for the major version that bind/dlpack.h describes, or null.
const DLPackExchangeAPI* exchange_of(const py::object& capsule) {
  if (capsule.is_none()) return nullptr;
  auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  while (api && api->major != 1) api = api->prev_api;
  return api && api->dltensor_from_py_object_no_sync ? api : nullptr;
}

void read_tuple(const py::object& tuple, std::vector<int64_t>& into) {
  into.resize(size_t(PyTuple_GET_SIZE(tuple.ptr())));
  for (size_t i = 0; i < into.size(); ++i) into[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), Py_ssize_t(i)));
}

}  // namespace

Accessor::Accessor(py::object descriptor) : descriptor_(std::move(descriptor)), no_arguments_(py::tuple()) {
  PyObject* d = descriptor_.ptr();
  if (Py_TYPE(d) == &PyMethodDescr_Type) method_ = reinterpret_cast<PyMethodDescrObject*>(d)->d_method;
  if (Py_TYPE(d) == &PyGetSetDescr_Type) getter_ = reinterpret_cast<PyGetSetDescrObject*>(d)->d_getset;
}

py::object Accessor::operator()(PyObject* tensor) const {
  PyObject* result;
  if (getter_) {
    result = getter_->get(tensor, getter_->closure);
  } else if (method_ && method_->ml_flags == METH_NOARGS) {
    result = method_->ml_meth(tensor, nullptr);
  } else if (method_ && method_->ml_flags == (METH_VARARGS | METH_KEYWORDS)) {
    result =
        reinterpret_cast<PyCFunctionWithKeywords>(reinterpret_cast<void (*)()>(method_->ml_meth))(tensor, no_arguments_.ptr(), nullptr);
  } else {
    PyObject* args[] = {tensor};
    result = PyObject_Vectorcall(descriptor_.ptr(), args, 1, nullptr);
  }
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

bool View::lies_as(const View& other) const {
  if (dtype != other.dtype || dims != other.dims) return false;
  for (size_t d = 0; d < dims; ++d) {
    if (sizes[d] != other.sizes[d] || (strides[d] != other.strides[d] && sizes[d] != 1)) return false;
  }
  return true;
}

Tensors::Tensors(const py::object& tensor, const py::object& storage, const py::object& exchange)
    : type_(tensor),
      grad_(tensor.attr("grad")),
      data_ptr_(tensor.attr("data_ptr")),
      stride_(tensor.attr("stride")),
      dtype_(tensor.attr("dtype")),
      shape_(tensor.attr("shape")),
      storage_(tensor.attr("untyped_storage")),
      storage_data_ptr_(storage.attr("data_ptr")),
      storage_bytes_(storage.attr("nbytes")),
      exchange_(exchange_of(exchange)) {}

PyObject* Tensors::checked(PyObject* object) const {
  if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(type_.ptr()))) throw py::type_error("expected a tensor");
  return object;
}

bool Tensors::in_storage(PyObject* tensor, const Span& span) const {
  const py::object storage = storage_(tensor);
  const uintptr_t first = uintptr_t(PyLong_AsUnsignedLongLong(storage_data_ptr_(storage.ptr()).ptr()));
  return first <= span.first && span.second <= first + uintptr_t(PyLong_AsUnsignedLongLong(storage_bytes_(storage.ptr()).ptr()));
}

View Tensors::operator()(PyObject* tensor) const {
  if (exchange_) {
    DLTensor t;
    if (exchange_->dltensor_from_py_object_no_sync(tensor, &t) != 0) throw py::error_already_set();
    const uintptr_t dtype = uintptr_t(t.dtype.code) << 8 | t.dtype.bits;
    return {reinterpret_cast<uintptr_t>(t.data) + t.byte_offset, dtype, size_t(t.ndim), t.shape, t.strides};
  }
  read_tuple(shape_(checked(tensor)), sizes_);
  read_tuple(stride_(tensor), strides_);
  const uintptr_t address = uintptr_t(PyLong_AsUnsignedLongLong(data_ptr_(tensor).ptr()));
  return {address, reinterpret_cast<uintptr_t>(dtype_(tensor).ptr()), sizes_.size(), sizes_.data(), strides_.data()};
}

}  // namespace gradfused::bind
