// What threads wait for each other at: barriers, shuffles and votes.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

namespace gradfused_emulator {

constexpr unsigned kWarp = 32;

// The first four take the whole block, the others lanes of a warp.
enum class Meet : uint8_t { block, block_count, block_all, block_any, warp, index, up, down, exclusive_or, ballot, all, any };

// Where in the source it was called.
struct Site {
  const char* file;
  int line;
};

// A thread's part in it.
struct Meeting {
  Meet meet;
  Site site;
  unsigned mask;       // of lanes
  int operand, width;  // of a shuffle
  uint64_t value;      // brought to it, then taken from it

  bool same_site(const Meeting& other) const {
    return site.line == other.site.line && (site.file == other.site.file || !strcmp(site.file, other.site.file));
  }

  // The lane that this lane's shuffle reads, by the pseudo code of PTX's shfl.sync.
  unsigned source(unsigned lane) const {
    const unsigned inside = unsigned(width) - 1, first = lane & ~inside, last = first | inside, by = unsigned(operand) % kWarp;
    switch (meet) {
      case Meet::up: return lane < first + by ? lane : lane - by;
      case Meet::down: return lane + by > last ? lane : lane + by;
      case Meet::exclusive_or: return (lane ^ by) > last ? lane : lane ^ by;
      default: return first | (by & inside);
    }
  }

  std::string text() const {
    static const char* const names[] = {"__syncthreads",   "__syncthreads_count", "__syncthreads_and", "__syncthreads_or",
                                        "__syncwarp",      "__shfl_sync",         "__shfl_up_sync",    "__shfl_down_sync",
                                        "__shfl_xor_sync", "__ballot_sync",       "__all_sync",        "__any_sync"};
    char lanes[32];
    snprintf(lanes, sizeof lanes, meet < Meet::warp ? ")" : ") with mask 0x%08x", mask);
    return std::string(names[int(meet)]) + " (" + site.file + ":" + std::to_string(site.line) + lanes;
  }
};

}  // namespace gradfused_emulator
