// What the bindings of every native backend share: the schema, rows and settings, and the watch over them.
#pragma once

#include "bind/schema.h"
#include "bind/watch.h"

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

}  // namespace gradfused::bind
