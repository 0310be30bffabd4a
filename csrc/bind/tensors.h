// What a Python tensor is, asked in native code.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "plan/spans.h"

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
  int64_t itemsize;
  size_t dims;
  const int64_t *sizes, *strides;

  // How many bytes lie between the first element and the end of the last one.
  int64_t bytes() const;

  // Equal dtypes and shapes, and the elements lie alike: the stride of a dimension of size 1 means nothing.
  bool lies_as(const View& other) const;
};

// The part of DLPack's C ABI, from version 1.3, with which a framework describes a tensor to native code without Python calls:
// https://dmlc.github.io/dlpack/latest/c_api.html. Names are the standard's.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  const DLPackExchangeAPI* prev_api;  // of an older major version
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);  // may be null; shape and strides stay the tensor's
  void* current_work_stream;
};

// Asks a tensor about its storage without making a Python object of that, in 5 ns where torch's methods take 90: through functions of
// libtorch's C interface (torch/csrc/inductor/aoti_torch/c/shim.h). They are given the address of an at::Tensor, which is one pointer to
// the tensor's implementation. A Python tensor holds that pointer too, and `_cdata` says its value, so the first tensor shows where.
class StorageShim {
 public:
  // Finds the functions in the libtorch that is loaded. Without `allowed` it is never used.
  explicit StorageShim(bool allowed);

  // Prepares for a tensor whose implementation is at `implementation`. An object that does not hold it where the others do ends the use
  // of the shim.
  void learn(PyObject* tensor, const void* implementation, size_t object_size);

  // Whether the shim can be used: this torch has the functions, and every tensor so far had its pointer in the same place.
  explicit operator bool() const;

  // Sets the size of the storage in bytes and the tensor's offset in it in elements. False for a tensor without a storage.
  bool ask(PyObject* tensor, int64_t& bytes, int64_t& offset) const;

 private:
  using Query = int32_t (*)(const void* tensor, int64_t* result);  // returns 0 if all went well
  Query bytes_ = nullptr, offset_ = nullptr;
  size_t place_ = 0;  // in bytes from the start of a Python tensor; 0 while it is unknown
};

// Describes tensors through DLPack's exchange where torch offers it, else through their methods, which takes over three times as long.
class Tensors {
 public:
  // `tensor` and `storage` are torch's types, `exchange` is a capsule named "dlpack_exchange_api" or None, `shim` allows the StorageShim.
  Tensors(const pybind11::object& tensor, const pybind11::object& storage, const pybind11::object& exchange, bool shim);

  pybind11::object grad(PyObject* param) const;

  // Good until the next call. Throws what torch raises for a tensor without memory of its own, TypeError for what is no tensor.
  View operator()(PyObject* tensor) const;

  // Prepares storage_holds() for a tensor. To be called with the tensors of a table when that is made.
  void learn(PyObject* tensor);

  // Whether a tensor's storage, which may have been resized under it, holds all elements of its view. Asks nothing of the view's address.
  bool storage_holds(PyObject* tensor, const View& view) const;

 private:
  // The object, if it is a tensor: accessors trust that it is.
  PyObject* checked(PyObject* object) const;

  const pybind11::object type_;
  const Accessor grad_, data_ptr_, stride_, dtype_, shape_, element_size_, offset_, storage_, storage_bytes_, implementation_;
  const DLPackExchangeAPI* exchange_ = nullptr;
  StorageShim shim_;
  mutable std::vector<int64_t> sizes_, strides_;
};

}  // namespace gradfused::bind
