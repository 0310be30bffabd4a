#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace gradfused::cpu {
namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> all;
#ifdef GRADFUSED_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    all.push_back(&kernels_avx512());
  }
  if (avx2) all.push_back(&kernels_avx2());
#endif
  all.push_back(&kernels_generic());
  return all;
}

const Kernels* find(const std::string& name) {
  std::string names;
  for (const Kernels* k : available()) {
    if (name == k->isa) return k;
    names += (names.empty() ? "" : ", ") + std::string(k->isa);
  }
  throw std::invalid_argument("GRADFUSED_CPU_ISA: this machine and build have " + names + ", got '" + name + "'");
}

const Kernels*& chosen() {
  static const Kernels* kernels = [] {
    const char* name = std::getenv("GRADFUSED_CPU_ISA");
    return name && *name ? find(name) : available().front();
  }();
  return kernels;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* k : available()) names.emplace_back(k->isa);
  return names;
}

const Kernels& kernels() { return *chosen(); }

void use_isa(const std::string& name) { chosen() = find(name); }

}  // namespace gradfused::cpu
