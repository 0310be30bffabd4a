// Settings and rows out of Python objects, field by field as csrc/schema.def lists them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <deque>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "plan/rows.h"

namespace gradfused::bind {

namespace py = pybind11;

// The names of an enumeration's values, in order and separated by ", ".
template <class E> const char* spelling();
#define GRADFUSED_ENUM(type, ...) \
  template <> inline const char* spelling<type>() { return #__VA_ARGS__; }
#include "schema.def"
template <> inline const char* spelling<Rule>() {
  return ""
#define GRADFUSED_RULE(name, type, family) #name ", "
#include "rules.def"
#undef GRADFUSED_RULE
      ;
}

template <class E> const std::vector<std::string>& names_of() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> found(1);
    for (const char* c = spelling<E>(); *c; ++c) {
      if (*c == ',') {
        found.emplace_back();
      } else if (*c != ' ') {
        found.back() += *c;
      }
    }
    if (found.back().empty()) found.pop_back();
    return found;
  }();
  return names;
}

template <class E> E named(const std::string& name) {
  const std::vector<std::string>& names = names_of<E>();
  for (size_t i = 0; i < names.size(); ++i) {
    if (name == names[i]) return E(i);
  }
  throw std::invalid_argument(std::string("expected one of ") + spelling<E>() + ", got '" + name + "'");
}

template <class T> T from_python(const py::handle& value) {
  if constexpr (std::is_enum_v<T>) {
    return named<T>(value.cast<std::string>());
  } else if constexpr (std::is_same_v<T, Perturb>) {
    const auto [a, b, e, lo, hi] = value.cast<std::tuple<double, double, double, double, double>>();
    return {a, b, e, lo, hi};
  } else {
    return value.cast<T>();
  }
}

template <class T> py::object to_python(const T& value) {
  if constexpr (std::is_enum_v<T>) {
    return py::cast(names_of<T>()[size_t(value)]);
  } else if constexpr (std::is_same_v<T, Perturb>) {
    return py::make_tuple(value.a, value.b, value.e, value.lo, value.hi);
  } else {
    return py::cast(value);
  }
}

// The type of a field as Python annotates it.
template <class T> const char* python_type() {
  if (std::is_enum_v<T>) return "str";
  if (std::is_same_v<T, Perturb>) return "tuple";
  return std::is_same_v<T, bool> ? "bool" : std::is_same_v<T, double> ? "float" : "int";
}

// {"Settings": {name: (type, default)}, "Row": {name: type}}
inline py::dict schema() {
  py::dict settings, row;
  const Settings defaults;
  row["state"] = "dict";
#define GRADFUSED_OPTION(type, name, value) settings[#name] = py::make_tuple(python_type<type>(), to_python(defaults.name));
#define GRADFUSED_OPERAND(name) row[#name] = "Tensor";
#define GRADFUSED_FIELD(type, name, value) row[#name] = python_type<type>();
#define GRADFUSED_COUNT(name) row[#name] = "Tensor";
#include "schema.def"
  py::dict both;
  both["Settings"] = settings;
  both["Row"] = row;
  return both;
}

// The attributes of a Python object that are named like options; the others have their defaults.
inline Settings settings_from(const py::handle& object) {
  Settings settings;
#define GRADFUSED_OPTION(type, name, value) \
  if (py::hasattr(object, #name)) settings.name = from_python<type>(object.attr(#name));
#include "schema.def"
  return settings;
}

// (address, dtype, sizes, strides): sizes and strides are empty where the elements lie one after another.
using OperandSpec = std::tuple<uintptr_t, std::string, std::vector<int64_t>, std::vector<int64_t>>;
// (address, dtype) of a one-element tensor
using CountSpec = std::pair<uintptr_t, std::string>;

// Adds the row that keyword arguments describe; what is missing or None has its default.
inline void add_row(Rows& rows, const py::kwargs& given) {
  Row row;
  std::deque<OperandSpec> specs;  // own the shapes until the table has copied them
  size_t known = 0;
  const auto find = [&](const char* name) {
    if (!given.contains(name)) return py::object(py::none());
    ++known;
    return py::object(given[name]);
  };
  const auto operand = [&](const py::handle& value) {
    specs.push_back(value.cast<OperandSpec>());
    const auto& [address, dtype, sizes, strides] = specs.back();
    return Operand{reinterpret_cast<char*>(address), named<DType>(dtype), int32_t(sizes.size()), sizes.data(), strides.data()};
  };
  const py::object states = find("state");
  const py::list state = states.is_none() ? py::list() : py::list(states);
  if (state.size() > size_t(kMaxStates)) {
    throw std::invalid_argument("expected at most " + std::to_string(kMaxStates) + " state tensors, got " + std::to_string(state.size()));
  }
  for (size_t k = 0; k < state.size(); ++k) row.state[k] = operand(state[k]);
#define GRADFUSED_OPERAND(name) \
  if (const py::object found = find(#name); !found.is_none()) row.name = operand(found);
#define GRADFUSED_FIELD(type, name, value) \
  if (const py::object found = find(#name); !found.is_none()) row.name = from_python<type>(found);
#define GRADFUSED_COUNT(name)                                   \
  if (const py::object found = find(#name); !found.is_none()) { \
    const CountSpec spec = found.cast<CountSpec>();             \
    row.name = reinterpret_cast<char*>(spec.first);             \
    row.name##_dtype = named<DType>(spec.second);               \
  }
#include "schema.def"
  if (known != given.size()) throw py::type_error("a row has no such field: expected those of schema()['Row']");
  rows.add(row);
}

}  // namespace gradfused::bind
