// A table planned for a device, as every module that has one shows it to Python.
#pragma once

#include <string>

#include "bind/common.h"
#include "plan/device.h"

namespace gradfused::bind {

template <class P> void define_plan(py::class_<P, Rows>& of) {
  of.def(py::init<size_t>(), py::arg("groups"))
      .def(
          "lr_from",
          [](P& p, size_t group, uintptr_t address, const std::string& dtype) {
            p.lr_from(group, reinterpret_cast<const char*>(address), named<DType>(dtype));
          },
          py::arg("group"), py::arg("address"), py::arg("dtype"))
      .def("bytes", &P::bytes)
      .def("packed_bytes", &P::packed_bytes)
      .def(
          "pack",
          [](P& p, uintptr_t to, uintptr_t base, uintptr_t squares, uintptr_t skipped) {
            p.pack(reinterpret_cast<char*>(to), reinterpret_cast<char*>(base), reinterpret_cast<double*>(squares),
                   reinterpret_cast<double*>(skipped));
          },
          py::arg("to"), py::arg("base"), py::arg("squares"), py::arg("skipped"))
      .def("reconfigured", &P::reconfigured)
      .def("needs", &P::needs)
      .def("phases",
           [](P& p) {
             std::vector<int> numbers;
             for (const Phase phase : p.phases()) numbers.push_back(int(phase));
             return numbers;
           })
      .def("needs_stats", &P::needs_stats)
      .def("chunks", &P::chunks);
}

}  // namespace gradfused::bind
