#pragma once

#include <pybind11/pybind11.h>

namespace gradfused::cpu {

// Adds the class Lpg to gradfused._cpu.
void define_lpg(pybind11::module_& m);

}  // namespace gradfused::cpu
