// What device code calls.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.h"

namespace gradfused_emulator {

template <class To, class From> To bits(From x) {
  static_assert(sizeof(To) >= sizeof(From), "no bit is lost");
  To y{};
  memcpy(&y, &x, sizeof x);
  return y;
}

template <class T> T shuffle(Meet meet, Site site, unsigned mask, T value, int operand, int width) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles numbers of 32 or 64 bits");
  const uint64_t result = block.meet(meet, site, mask, bits<uint64_t>(value), operand, width);
  memcpy(&value, &result, sizeof value);
  return value;
}

// Hardware faults where the address is no multiple of the size.
template <class T> T& aligned(T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T)) {
    block.blame("went to a misaligned address for " + std::to_string(sizeof(T)) + " bytes");
    block.give_up();
  }
  return *p;
}

template <class T> struct Same {
  using type = T;
};
template <class T> using Value = typename Same<T>::type;  // converts to what the pointer points to, as CUDA's overloads do

template <class T, class... Types> constexpr bool one_of = (std::is_same_v<T, Types> || ...);

template <class A, class B> using Common = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>>;

}  // namespace gradfused_emulator

// ---- meetings, each of which knows the line it was called at

#define GRADFUSED_EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(GRADFUSED_EMULATOR_SITE) {
  gradfused_emulator::block.barrier(gradfused_emulator::Meet::block, false, {file, line});
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFF, GRADFUSED_EMULATOR_SITE) {
  gradfused_emulator::block.meet(gradfused_emulator::Meet::warp, {file, line}, mask, 0);
}
#define GRADFUSED_EMULATOR_BARRIER(name, what)                                                              \
  inline int name(int predicate, GRADFUSED_EMULATOR_SITE) {                                                 \
    return gradfused_emulator::block.barrier(gradfused_emulator::Meet::what, predicate != 0, {file, line}); \
  }
GRADFUSED_EMULATOR_BARRIER(__syncthreads_count, block_count)
GRADFUSED_EMULATOR_BARRIER(__syncthreads_and, block_all)
GRADFUSED_EMULATOR_BARRIER(__syncthreads_or, block_any)

#define GRADFUSED_EMULATOR_VOTE(R, name, what)                                                                    \
  inline R name(unsigned mask, int predicate, GRADFUSED_EMULATOR_SITE) {                                          \
    return R(gradfused_emulator::block.meet(gradfused_emulator::Meet::what, {file, line}, mask, predicate != 0)); \
  }
GRADFUSED_EMULATOR_VOTE(unsigned, __ballot_sync, ballot)
GRADFUSED_EMULATOR_VOTE(int, __all_sync, all)
GRADFUSED_EMULATOR_VOTE(int, __any_sync, any)

#define GRADFUSED_EMULATOR_SHUFFLE(name, Operand, what)                                                                 \
  template <class T> T name(unsigned mask, T value, Operand operand, int width = warpSize, GRADFUSED_EMULATOR_SITE) {   \
    return gradfused_emulator::shuffle(gradfused_emulator::Meet::what, {file, line}, mask, value, int(operand), width); \
  }
GRADFUSED_EMULATOR_SHUFFLE(__shfl_sync, int, index)
GRADFUSED_EMULATOR_SHUFFLE(__shfl_up_sync, unsigned, up)
GRADFUSED_EMULATOR_SHUFFLE(__shfl_down_sync, unsigned, down)
GRADFUSED_EMULATOR_SHUFFLE(__shfl_xor_sync, int, exclusive_or)

// Which lanes run together is up to the hardware; here, all that have not exited.
inline unsigned __activemask() { return gradfused_emulator::block.lanes(); }

[[noreturn]] inline void __trap() {
  gradfused_emulator::block.blame("called __trap()");
  gradfused_emulator::block.give_up();
}

// ---- memory

inline void __threadfence() {}
inline void __threadfence_block() {}

// Threads change at meetings only, so nothing comes in between.
#define GRADFUSED_EMULATOR_ATOMIC(name, result, ...)                                                 \
  template <class T> T name(T* p, gradfused_emulator::Value<T> value) {                              \
    static_assert(gradfused_emulator::one_of<T, __VA_ARGS__>, "CUDA has no " #name " of this type"); \
    const T old = gradfused_emulator::aligned(p);                                                    \
    *p = T(result);                                                                                  \
    return old;                                                                                      \
  }
GRADFUSED_EMULATOR_ATOMIC(atomicAdd, old + value, int, unsigned, unsigned long long, float, double)
GRADFUSED_EMULATOR_ATOMIC(atomicMax, old < value ? value : old, int, unsigned, long long, unsigned long long)
GRADFUSED_EMULATOR_ATOMIC(atomicMin, value < old ? value : old, int, unsigned, long long, unsigned long long)
GRADFUSED_EMULATOR_ATOMIC(atomicOr, old | value, int, unsigned, unsigned long long)
GRADFUSED_EMULATOR_ATOMIC(atomicAnd, (old & value), int, unsigned, unsigned long long)
GRADFUSED_EMULATOR_ATOMIC(atomicInc, old >= value ? 0 : old + 1, unsigned)
GRADFUSED_EMULATOR_ATOMIC(atomicExch, value, int, unsigned, unsigned long long, float)

template <class T> T atomicCAS(T* p, gradfused_emulator::Value<T> expected, gradfused_emulator::Value<T> value) {
  static_assert(gradfused_emulator::one_of<T, int, unsigned, unsigned long long>, "CUDA has no atomicCAS of this type");
  const T old = gradfused_emulator::aligned(p);
  if (old == expected) *p = value;
  return old;
}

#define GRADFUSED_EMULATOR_LOAD(name) \
  template <class T> T name(const T* p) { return gradfused_emulator::aligned(p); }
GRADFUSED_EMULATOR_LOAD(__ldg)
GRADFUSED_EMULATOR_LOAD(__ldca)
GRADFUSED_EMULATOR_LOAD(__ldcg)
GRADFUSED_EMULATOR_LOAD(__ldcs)
GRADFUSED_EMULATOR_LOAD(__ldcv)

#define GRADFUSED_EMULATOR_STORE(name) \
  template <class T> void name(T* p, gradfused_emulator::Value<T> value) { gradfused_emulator::aligned(p) = value; }
GRADFUSED_EMULATOR_STORE(__stwb)
GRADFUSED_EMULATOR_STORE(__stcg)
GRADFUSED_EMULATOR_STORE(__stcs)
GRADFUSED_EMULATOR_STORE(__stwt)

// ---- numbers

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t{a} * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

inline int __float_as_int(float x) { return gradfused_emulator::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return gradfused_emulator::bits<unsigned>(x); }
inline float __int_as_float(int x) { return gradfused_emulator::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return gradfused_emulator::bits<float>(x); }
inline long long __double_as_longlong(double x) { return gradfused_emulator::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return gradfused_emulator::bits<double>(x); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }

// Of a number and a NaN, both give the number.
template <class A, class B, class T = gradfused_emulator::Common<A, B>> T min(A a, B b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B, class T = gradfused_emulator::Common<A, B>> T max(A a, B b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}
