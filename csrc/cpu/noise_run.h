// Normal noise for a run of elements, several counters at a time.
#pragma once

#ifdef GRADFUSED_X86
#include <immintrin.h>
// GCC 12 takes its own AVX-512 headers' deliberate undefined values for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "math/noise.h"
#include "math/rounding.h"

namespace gradfused::cpu {
namespace {

// As many counter words as a register holds, and their product: the compiler does not find the widening one by itself.
#if defined(__AVX512F__)
typedef unsigned long long CounterWords __attribute__((vector_size(64)));
inline CounterWords multiply(const CounterWords& x, uint32_t by) {
  return (CounterWords)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(by));
}
#elif defined(__AVX2__)
typedef unsigned long long CounterWords __attribute__((vector_size(32)));
inline CounterWords multiply(const CounterWords& x, uint32_t by) {
  return (CounterWords)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(by));
}
#elif defined(GRADFUSED_X86)
typedef unsigned long long CounterWords __attribute__((vector_size(16)));
inline CounterWords multiply(const CounterWords& x, uint32_t by) { return (CounterWords)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(by)); }
#else
using CounterWords = uint64_t;
inline CounterWords multiply(CounterWords x, uint32_t by) { return math::Multiply()(x, by); }
#endif

constexpr int kQuads = 32;
constexpr int kWide = sizeof(CounterWords) / sizeof(uint64_t);

// words[k] <- the k-th word of each counter. `mark` tells draws of one kind from another's.
inline void philox_quads(uint64_t seed, uint64_t quad, uint32_t mark, uint32_t param_number, uint32_t step, uint32_t (*words)[kQuads]) {
  alignas(64) uint64_t counters[4][kQuads];
  for (int i = 0; i < kQuads; ++i) {
    counters[0][i] = quad + uint64_t(i);
    counters[1][i] = (quad + uint64_t(i)) >> 32 | mark;
    counters[2][i] = param_number;
    counters[3][i] = step;
  }
  for (int i = 0; i < kQuads; i += kWide) {
    CounterWords c[4];
    for (int k = 0; k < 4; ++k) memcpy(&c[k], &counters[k][i], sizeof(CounterWords));
    math::philox(seed, c[0], c[1], c[2], c[3], [](const CounterWords& x, uint32_t by) { return multiply(x, by); });
    for (int k = 0; k < 4; ++k) memcpy(&counters[k][i], &c[k], sizeof(CounterWords));
  }
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < kQuads; ++i) words[k][i] = uint32_t(counters[k][i]);
  }
}

// to[0 .. 4 * kQuads) <- the noise of elements 4 * quad and on.
inline void noise_quads(uint64_t seed, uint64_t quad, uint32_t param_number, uint32_t step, float* __restrict to) {
  alignas(64) uint32_t words[4][kQuads];
  alignas(64) float z[4][kQuads];
  philox_quads(seed, quad, 0, param_number, step, words);
  for (int i = 0; i < kQuads; ++i) math::box_muller(words[0][i], words[1][i], z[0][i], z[1][i]);
  for (int i = 0; i < kQuads; ++i) math::box_muller(words[2][i], words[3][i], z[2][i], z[3][i]);
  for (int i = 0; i < kQuads; ++i) {
    for (int k = 0; k < 4; ++k) to[4 * i + k] = z[k][i];
  }
}

// to[0 .. 4 * kQuads) <- 32 random bits for each of elements 4 * quad and on, other than the noise's.
inline void random_quads(uint64_t seed, uint64_t quad, uint32_t param_number, uint32_t step, uint32_t* __restrict to) {
  alignas(64) uint32_t words[4][kQuads];
  philox_quads(seed, quad, math::kRoundingCounter, param_number, step, words);
  for (int i = 0; i < kQuads; ++i) {
    for (int k = 0; k < 4; ++k) to[4 * i + k] = words[k][i];
  }
}

// to[0 .. n) <- the noise of elements begin .. begin + n.
inline void noise_run(uint64_t seed, int64_t begin, int64_t n, uint32_t param_number, uint32_t step, float* to) {
  alignas(64) float quads[4 * kQuads];
  while (n > 0) {
    const int64_t skip = begin % 4, length = n < 4 * kQuads - skip ? n : 4 * kQuads - skip;
    noise_quads(seed, uint64_t(begin / 4), param_number, step, quads);
    memcpy(to, quads + skip, size_t(length) * sizeof(float));
    to += length;
    begin += length;
    n -= length;
  }
}

}  // namespace
}  // namespace gradfused::cpu
