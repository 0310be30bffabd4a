// The part of DLPack's C ABI, from version 1.3, with which a framework describes a tensor to native code without Python calls:
// https://dmlc.github.io/dlpack/latest/c_api.html. Names are the standard's.
#pragma once

#include <cstdint>

namespace gradfused::bind {

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

}  // namespace gradfused::bind
