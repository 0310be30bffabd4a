// The instruction sets this build has kernels for, and the choice among them.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace gradfused::cpu {

// Those this machine can run, best first.
std::vector<std::string> available_isas();

// The kernels in use: the best available, or what GRADFUSED_CPU_ISA or use_isa() named. An engine keeps those of its first step.
const Kernels& kernels();

// Throws std::invalid_argument, naming what is available, when this machine or build lacks it.
void use_isa(const std::string& name);

}  // namespace gradfused::cpu
