#include "bind/watch.h"

#include <unordered_set>

namespace py = pybind11;

namespace gradfused::bind {
namespace {

py::dict copy_of(const py::handle& dict) {
  PyObject* const copy = PyDict_Copy(dict.ptr());
  if (copy == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::dict>(copy);
}

std::vector<std::pair<PyObject*, PyObject*>> pairs_of(const py::dict& dict) {
  std::vector<std::pair<PyObject*, PyObject*>> pairs;
  for (auto item : dict) pairs.emplace_back(item.first.ptr(), item.second.ptr());
  return pairs;
}

bool same_pairs(const py::dict& dict, const std::vector<std::pair<PyObject*, PyObject*>>& known) {
  if (size_t(PyDict_GET_SIZE(dict.ptr())) != known.size()) return false;
  auto pair = known.begin();
  PyObject *key, *value;
  for (Py_ssize_t position = 0; PyDict_Next(dict.ptr(), &position, &key, &value); ++pair) {
    if (pair->first != key || pair->second != value) return false;
  }
  return true;
}

std::unordered_map<PyObject*, Py_ssize_t> places_of(const std::vector<std::pair<PyObject*, PyObject*>>& pairs) {
  std::unordered_map<PyObject*, Py_ssize_t> places;
  for (const auto& pair : pairs) places.emplace(pair.first, Py_ssize_t(places.size()));
  return places;
}

Py_ssize_t find(const py::handle& key, const std::unordered_map<PyObject*, Py_ssize_t>& places) {
  const auto found = places.find(key.ptr());
  return found == places.end() ? -1 : found->second;
}

void append(const py::list& list, PyObject* object) {
  if (PyList_Append(list.ptr(), object) != 0) throw py::error_already_set();
}

}  // namespace

Watch::Watch(py::object tensor, py::object storage, py::object exchange, bool shim, py::list groups, py::dict state, py::dict sources,
             py::list rows)
    : tensors_(tensor, storage, exchange, shim) {
  // Alive until all is read, whatever other threads do: a garbage collection, which a new object may start, lets them run.
  const py::dict state_now = copy_of(state), sources_now = copy_of(sources);
  states_ = pairs_of(state_now);
  sources_ = pairs_of(sources_now);
  for (py::handle group : groups) {
    const py::list params = group["params"];
    group_sizes_.push_back(Py_ssize_t(params.size()));
    for (py::handle p : params) params_.push_back(p.ptr());
  }
  const Places states = places_of(states_), from = places_of(sources_);
  for (py::handle row : rows) add(py::reinterpret_borrow<py::tuple>(row), states, from);
  std::unordered_set<PyObject*> stepped;
  for (py::handle row : rows) stepped.insert(py::object(row[py::int_(1)]).ptr());
  for (PyObject* p : params_) stepped_.push_back(stepped.count(p) != 0);
}

void Watch::add(const py::tuple& row, const Places& states, const Places& sources) {
  const py::object param = row[1];
  Watched watched{row[0].cast<size_t>(), find(param, states), find(param, sources), 0, row[4].cast<bool>(), {}};
  complete_ &= watched.number < params_.size() && params_[watched.number] == param.ptr();
  see(param);
  add_state(watched, row[3]);
  if (watched.source >= 0) see(sources_[size_t(watched.source)].second);
  see(row[2]);
  rows_.push_back(std::move(watched));
}

void Watch::add_state(Watched& row, const py::dict& kept) {
  if (row.state >= 0) {
    Py_ssize_t place = 0;
    const py::dict state = copy_of(states_[size_t(row.state)].second);
    row.keys = PyDict_GET_SIZE(state.ptr());
    for (auto item : state) {
      if (kept.contains(item.first)) {
        row.kept.push_back({place, py::reinterpret_borrow<py::object>(item.first), item.second.ptr()});
        complete_ &= item.second.is(kept[item.first]);
        see(item.second);
      }
      ++place;
    }
  }
  complete_ &= row.kept.size() == kept.size();
}

void Watch::see(const py::handle& tensor) {
  const View v = tensors_(tensor.ptr());
  tensors_.learn(tensor.ptr());
  seen_.push_back({v.address, v.dtype, v.itemsize, v.dims, shapes_.size()});
  shapes_.insert(shapes_.end(), v.sizes, v.sizes + v.dims);
  shapes_.insert(shapes_.end(), v.strides, v.strides + v.dims);
}

View Watch::view(const Seen& seen) const {
  const int64_t* const sizes = shapes_.data() + seen.shape;
  return {seen.address, seen.dtype, seen.itemsize, seen.dims, sizes, sizes + seen.dims};
}

bool Watch::same_parameters(const py::list& groups) const {
  if (groups.size() != group_sizes_.size()) return false;
  auto known = params_.begin();
  auto size = group_sizes_.begin();
  for (py::handle group : groups) {
    const py::list params = group["params"];
    if (Py_ssize_t(params.size()) != *size++) return false;
    for (py::handle p : params) {
      if (p.ptr() != *known++) return false;
    }
  }
  return true;
}

bool Watch::gather_state(const Watched& row, const py::list& written) const {
  if (row.state >= 0 && PyDict_GET_SIZE(states_[size_t(row.state)].second) != row.keys) return false;
  if (row.kept.empty()) return true;
  auto kept = row.kept.begin();
  PyObject *key, *value;
  Py_ssize_t place = 0;
  for (Py_ssize_t position = 0; PyDict_Next(states_[size_t(row.state)].second, &position, &key, &value); ++place) {
    if (place != kept->place) continue;
    if (key != kept->key.ptr() || value != kept->tensor) return false;
    append(written, value);
    if (++kept == row.kept.end()) return true;
  }
  return false;
}

// No Python code runs in here, nor since the objects were compared with what they were, so that no other thread can take away what is not
// yet held.
bool Watch::gather(const Held& held) const {
  for (const Watched& row : rows_) {
    append(held.params, params_[row.number]);
    append(held.written, params_[row.number]);
    if (!gather_state(row, held.written)) return false;
    if (row.source >= 0) append(held.read, sources_[size_t(row.source)].second);
  }
  if (rows_.size() == params_.size()) return true;
  for (size_t i = 0; i < params_.size(); ++i) {
    if (!stepped_[i]) append(held.others, params_[i]);
  }
  return true;
}

bool Watch::gather_gradients(const Held& held) const {
  for (py::handle p : held.others) {
    if (!tensors_.grad(p.ptr()).is_none()) return false;
  }
  for (py::handle p : held.params) {
    const py::object grad = tensors_.grad(p.ptr());
    if (grad.is_none()) return false;
    append(held.read, grad.ptr());
  }
  return true;
}

bool Watch::same_gradient(const Seen& seen, PyObject* grad, const std::vector<Rows*>& tables, size_t row) const {
  const View now = tensors_(grad);
  // A storage that was freed or shrunk is for whoever builds a table to refuse, and so is a gradient without memory of its own.
  if (!now.lies_as(view(seen)) || !tensors_.storage_holds(grad, now)) return false;
  for (Rows* table : tables) {
    Operand moved = table->row(row).grad;
    if (now.address == reinterpret_cast<uintptr_t>(moved.data)) continue;
    moved.data = reinterpret_cast<char*>(now.address);
    if (now.address == 0 || !table->move_grad(row, moved.data)) return false;
  }
  return true;
}

bool Watch::lies_still(const Held& held, const std::vector<Rows*>& tables) const {
  const Seen* seen = seen_.data();
  const auto still = [&](PyObject* tensor) {
    const View now = tensors_(tensor);
    const bool same = now.address == seen->address && now.lies_as(view(*seen)) && tensors_.storage_holds(tensor, now);
    ++seen;
    return same;
  };
  PyObject *const written = held.written.ptr(), *const read = held.read.ptr();
  Py_ssize_t to = 0, from = 0, grads = PyList_GET_SIZE(read) - Py_ssize_t(rows_.size());
  for (size_t i = 0; i < rows_.size(); ++i) {
    for (size_t k = 0; k <= rows_[i].kept.size(); ++k) {
      if (!still(PyList_GET_ITEM(written, to++))) return false;
    }
    if (rows_[i].source >= 0 && !still(PyList_GET_ITEM(read, from++))) return false;
    if (!same_gradient(*seen++, PyList_GET_ITEM(read, grads++), tables, i)) return false;
  }
  return true;
}

py::object Watch::refresh(py::list groups, py::dict state, py::dict sources, py::list tables) const {
  // Made before anything is compared: a new list may start a garbage collection, whose callbacks are Python code.
  Held held;
  std::vector<Rows*> known;
  for (py::handle table : tables) known.push_back(table.cast<Rows*>());
  if (!complete_ || !same_parameters(groups) || !same_pairs(state, states_) || !same_pairs(sources, sources_)) return py::none();
  try {
    if (!gather(held) || !gather_gradients(held) || !lies_still(held, known)) return py::none();
  } catch (const py::error_already_set& error) {
    // A tensor that cannot be described, sparse say: whoever builds a table says what is wrong.
    if (!error.matches(PyExc_Exception)) throw;
    return py::none();
  }
  for (Rows* table : known) {
    if (!table->zeroes_apart()) return py::none();
  }
  const Py_ssize_t grads = PyList_GET_SIZE(held.read.ptr()) - Py_ssize_t(rows_.size());
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (rows_[i].zeroed) append(held.written, PyList_GET_ITEM(held.read.ptr(), grads + Py_ssize_t(i)));
  }
  return py::make_tuple(held.params, held.written, held.read);
}

}  // namespace gradfused::bind
