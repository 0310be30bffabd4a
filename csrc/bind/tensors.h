// What a Python tensor is, asked in native code.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "bind/dlpack.h"
#include "spans.h"

namespace gradfused::bind {

// A method or getter of a C type, called without the look-up and argument handling that cost more than what torch does in it.
class Accessor {
 public:
  explicit Accessor(pybind11::object descriptor);
  pybind11::object operator()(PyObject* self) const;

 private:
  pybind11::object descriptor_, no_arguments_;
  PyMethodDef* method_ = nullptr;
  PyGetSetDef* getter_ = nullptr;
};

// Where a tensor lies and how. `dtype` tells one from another, no more.
struct View {
  uintptr_t address;
  uintptr_t dtype;
  size_t dims;
  const int64_t *sizes, *strides;

  // Equal dtypes and shapes, and the elements lie alike: the stride of a dimension of size 1 means nothing.
  bool lies_as(const View& other) const;
};

// Describes tensors through DLPack's exchange where torch offers it, else through their methods, which takes over three times as long.
class Tensors {
 public:
  // `tensor` and `storage` are torch's types, `exchange` is a capsule named "dlpack_exchange_api" or None.
  Tensors(const pybind11::object& tensor, const pybind11::object& storage, const pybind11::object& exchange);

  pybind11::object grad(PyObject* param) const { return grad_(checked(param)); }

  // Good until the next call. Throws what torch raises for a tensor without memory of its own, TypeError for what is no tensor.
  View operator()(PyObject* tensor) const;

  // Whether a span lies in the tensor's storage, which may have been resized under it.
  bool in_storage(PyObject* tensor, const Span& span) const;

 private:
  // The object, if it is a tensor: accessors trust that it is.
  PyObject* checked(PyObject* object) const;

  const pybind11::object type_;
  const Accessor grad_, data_ptr_, stride_, dtype_, shape_, storage_, storage_data_ptr_, storage_bytes_;
  const DLPackExchangeAPI* exchange_ = nullptr;
  mutable std::vector<int64_t> sizes_, strides_;
};

}  // namespace gradfused::bind
