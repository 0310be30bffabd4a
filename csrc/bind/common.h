// What the bindings of every native backend share: the schema, rows and settings, and the watch over them.
#pragma once

#include "bind/schema.h"
#include "bind/watch.h"
#include "plan/device.h"

namespace gradfused::bind {

// Adds schema(), rules(), Rows and Watch to a module, each module's own.
inline void define(py::module_& m) {
  m.def("schema", &schema, "The fields of Settings, with type and default, and of Row, with type.");
  m.def("rules", &names_of<Rule>, "The names of the update rules, in the order of their numbers.");

  py::class_<Rows>(m, "Rows", py::module_local())
      .def(
          "configure", [](Rows& rows, size_t group, const py::object& settings) { rows.settings(group) = settings_from(settings); },
          py::arg("group"), py::arg("settings"))
      .def("add", &add_row)
      .def("taken", &Rows::taken)
      .def("__len__", &Rows::size);

  py::class_<Watch>(m, "Watch", py::module_local())
      .def(py::init<py::object, py::object, py::object, bool, py::list, py::dict, py::dict, py::list>(), py::arg("tensor"),
           py::arg("storage"), py::arg("exchange"), py::arg("shim"), py::arg("groups"), py::arg("state"), py::arg("sources"),
           py::arg("rows"))
      .def("refresh", &Watch::refresh, py::arg("groups"), py::arg("state"), py::arg("sources"), py::arg("tables"));
}

// Adds what every table that is planned for a device shows to Python.
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
