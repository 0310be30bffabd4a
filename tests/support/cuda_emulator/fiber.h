// Stacks that one OS thread switches between: each CUDA thread has its own.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>

// AddressSanitizer wants to know of each switch.
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__
#endif
#endif
extern "C" {
void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* saved, const void** bottom, size_t* size);
void __asan_unpoison_memory_region(const volatile void* p, size_t size);
}

namespace gradfused_emulator {

#ifdef __SANITIZE_ADDRESS__
constexpr bool kAsan = true;
#else
constexpr bool kAsan = false;
#endif

#if defined(__x86_64__) && !defined(GRADFUSED_EMULATOR_UCONTEXT)
// Where the registers lie that a callee has to keep, and above them the address to go on at. Most switches go between two threads
// at the same barrier, so the processor foretells where `ret` goes.
using Context = void**;
__attribute__((naked, noinline, noipa, no_profile_instrument_function)) inline void switch_stack(Context*, const Context*) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n\t"
      "movq %rsp, (%rdi); movq (%rsi), %rsp\n\t"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

inline void prepare(Context& context, char*, char* top, void (*entry)()) {
  context = reinterpret_cast<void**>(top) - 8;  // six registers, the entry, and a return address that aligns its frame
  for (int i = 0; i < 8; ++i) context[i] = i == 6 ? reinterpret_cast<void*>(entry) : nullptr;
}
#else
}  // namespace gradfused_emulator
#include <ucontext.h>
namespace gradfused_emulator {
using Context = ucontext_t;
inline void switch_stack(Context* from, const Context* to) { swapcontext(from, to); }

inline void prepare(Context& context, char* bottom, char* top, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = bottom;
  context.uc_stack.ss_size = size_t(top - bottom);
  makecontext(&context, entry, 0);
}
#endif

// One of the stacks of a block's threads, or the launching thread's own.
struct Fiber {
  Context context;
  char *bottom = nullptr, *top = nullptr;
  void* shadow = nullptr;  // AddressSanitizer's
};

// Goes from one stack to another. Returns once something switches back, unless it is for good.
inline void switch_fiber(Fiber& from, const Fiber& to, bool for_good = false) {
  if constexpr (kAsan) __sanitizer_start_switch_fiber(for_good ? nullptr : &from.shadow, to.bottom, size_t(to.top - to.bottom));
  switch_stack(&from.context, &to.context);
  if constexpr (kAsan) __sanitizer_finish_switch_fiber(from.shadow, nullptr, nullptr);
}

// The first thing to do on a new stack. Finds out where the one lies that was left for it.
inline void arrive_on_fiber([[maybe_unused]] Fiber& from) {
  if constexpr (kAsan) {
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    from.bottom = const_cast<char*>(static_cast<const char*>(bottom));
    from.top = from.bottom + size;
  }
}

// Makes a fiber start at `entry` when next switched to, whatever it was in the middle of. Its stack is number `i` of those that
// every launch uses again; below each lies a page that faults. False if there is no memory.
inline bool start_fiber(Fiber& fiber, unsigned i, [[maybe_unused]] bool abandoned, void (*entry)()) {
  constexpr size_t page = 4096, stack = (kAsan ? 256 : 64) << 10, slot = page + stack + page, count = 1024;
  static void* const all = mmap(nullptr, count * slot, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (!fiber.bottom) {
    if (all == MAP_FAILED || i >= count) return false;
    char* const bottom = static_cast<char*>(all) + i * slot + page;
    if (mprotect(bottom, slot - page, PROT_READ | PROT_WRITE)) return false;
    fiber.bottom = bottom;
    fiber.top = bottom + stack + page - i * 5 % 64 * 64;  // at one offset in their pages, all would share a few lines of the cache
  }
  if constexpr (kAsan) {
    if (abandoned) __asan_unpoison_memory_region(fiber.bottom, size_t(fiber.top - fiber.bottom));
  }
  prepare(fiber.context, fiber.bottom, fiber.top, entry);
  return true;
}

}  // namespace gradfused_emulator
