// In which order blocks, and the threads of a block, take their turns: GRADFUSED_EMULATOR_ORDER=forward|reverse|shuffle:<seed>
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>

namespace gradfused_emulator {

class Order {
 public:
  // False if the variable says something else.
  bool read_environment() {
    const char* variable = getenv("GRADFUSED_EMULATOR_ORDER");
    const std::string text = variable && *variable ? variable : "forward";
    way_ = text == "reverse" ? reverse : text.compare(0, 8, "shuffle:") == 0 ? shuffle : forward;
    char* end = nullptr;
    if (way_ == shuffle) state_ = strtoull(text.c_str() + 8, &end, 10);
    return way_ == forward ? text == "forward" : way_ == reverse || (text.size() > 8 && !*end);
  }

  // The order inside block number `i`. It does not depend on which blocks ran before.
  Order of_block(unsigned i) const {
    Order order = *this;
    order.state_ += (uint64_t{i} + 1) << 32;
    return order;
  }

  // Whether every fill() gives another order.
  bool varies() const { return way_ == shuffle; }

  void fill(unsigned* turns, unsigned n) {
    for (unsigned i = 0; i < n; ++i) turns[i] = way_ == reverse ? n - 1 - i : i;
    for (unsigned i = n; way_ == shuffle && i > 1; --i) std::swap(turns[i - 1], turns[random() % i]);
  }

 private:
  // splitmix64 (Steele et al. 2014)
  uint64_t random() {
    uint64_t x = state_ += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
  }

  enum { forward, reverse, shuffle } way_ = forward;
  uint64_t state_ = 0;
};

}  // namespace gradfused_emulator
