#include "bind/tensors.h"

#include <cstring>

#ifdef __linux__
#include <dlfcn.h>
#endif

namespace py = pybind11;

namespace gradfused::bind {
namespace {

// The table of functions for the major version that DLPackExchangeAPI describes, or null.
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

StorageShim::StorageShim([[maybe_unused]] bool allowed) {
#ifdef __linux__
  if (!allowed) return;
  void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (!torch) return;
  bytes_ = reinterpret_cast<Query>(dlsym(torch, "aoti_torch_get_storage_size"));
  offset_ = reinterpret_cast<Query>(dlsym(torch, "aoti_torch_get_storage_offset"));
  if (!offset_) bytes_ = nullptr;
  dlclose(torch);  // torch itself keeps it loaded
#endif
}

void StorageShim::learn(PyObject* tensor, const void* implementation, size_t object_size) {
  if (!bytes_) return;
  const auto holds = [&](size_t place) {
    return std::memcmp(reinterpret_cast<char*>(tensor) + place, &implementation, sizeof(void*)) == 0;
  };
  for (size_t place = sizeof(PyObject); !place_ && place + sizeof(void*) <= object_size; place += sizeof(void*)) {
    if (holds(place)) place_ = place;
  }
  if (!place_ || !holds(place_)) bytes_ = nullptr;
}

StorageShim::operator bool() const { return bytes_ && place_; }

bool StorageShim::ask(PyObject* tensor, int64_t& bytes, int64_t& offset) const {
  const void* const handle = reinterpret_cast<char*>(tensor) + place_;
  return bytes_(handle, &bytes) == 0 && offset_(handle, &offset) == 0;
}

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

int64_t View::bytes() const {
  int64_t last = 0;
  for (size_t d = 0; d < dims; ++d) {
    if (sizes[d] == 0) return 0;
    last += (sizes[d] - 1) * strides[d];
  }
  return (last + 1) * itemsize;
}

bool View::lies_as(const View& other) const {
  if (dtype != other.dtype || dims != other.dims) return false;
  for (size_t d = 0; d < dims; ++d) {
    if (sizes[d] != other.sizes[d] || (strides[d] != other.strides[d] && sizes[d] != 1)) return false;
  }
  return true;
}

Tensors::Tensors(const py::object& tensor, const py::object& storage, const py::object& exchange, bool shim)
    : type_(tensor),
      grad_(tensor.attr("grad")),
      data_ptr_(tensor.attr("data_ptr")),
      stride_(tensor.attr("stride")),
      dtype_(tensor.attr("dtype")),
      shape_(tensor.attr("shape")),
      element_size_(tensor.attr("element_size")),
      offset_(tensor.attr("storage_offset")),
      storage_(tensor.attr("untyped_storage")),
      storage_bytes_(storage.attr("nbytes")),
      implementation_(tensor.attr("_cdata")),
      exchange_(exchange_of(exchange)),
      shim_(shim) {}

PyObject* Tensors::checked(PyObject* object) const {
  if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(type_.ptr()))) throw py::type_error("expected a tensor");
  return object;
}

py::object Tensors::grad(PyObject* param) const { return grad_(checked(param)); }

void Tensors::learn(PyObject* tensor) {
  const void* const implementation = PyLong_AsVoidPtr(implementation_(checked(tensor)).ptr());
  shim_.learn(tensor, implementation, size_t(reinterpret_cast<PyTypeObject*>(type_.ptr())->tp_basicsize));
}

bool Tensors::storage_holds(PyObject* tensor, const View& view) const {
  int64_t size = 0, offset = 0;
  if (shim_) {
    if (!shim_.ask(tensor, size, offset)) return false;
  } else {
    size = PyLong_AsLongLong(storage_bytes_(storage_(tensor).ptr()).ptr());
    offset = PyLong_AsLongLong(offset_(tensor).ptr());
  }
  return offset * view.itemsize + view.bytes() <= size;
}

View Tensors::operator()(PyObject* tensor) const {
  if (exchange_) {
    DLTensor t;
    if (exchange_->dltensor_from_py_object_no_sync(tensor, &t) != 0) throw py::error_already_set();
    const uintptr_t dtype = uintptr_t(t.dtype.code) << 8 | t.dtype.bits;
    return {reinterpret_cast<uintptr_t>(t.data) + t.byte_offset, dtype, t.dtype.bits / 8, size_t(t.ndim), t.shape, t.strides};
  }
  read_tuple(shape_(checked(tensor)), sizes_);
  read_tuple(stride_(tensor), strides_);
  const uintptr_t address = uintptr_t(PyLong_AsUnsignedLongLong(data_ptr_(tensor).ptr()));
  const int64_t itemsize = PyLong_AsLongLong(element_size_(tensor).ptr());
  return {address, reinterpret_cast<uintptr_t>(dtype_(tensor).ptr()), itemsize, sizes_.size(), sizes_.data(), strides_.data()};
}

}  // namespace gradfused::bind
