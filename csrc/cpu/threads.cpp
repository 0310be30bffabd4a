#include "cpu/threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <thread>
#include <vector>

namespace gradfused::cpu {
namespace {

// The entry point of GNU OpenMP, which LLVM's and Intel's runtimes offer too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

bool forked = false;

// An OpenMP pool does not survive fork(): its threads are gone, and a region in the child waits for them for ever.
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// torch loads its OpenMP runtime for the whole process to see. Looked up until found, since torch may come after this module.
GompParallel openmp() {
  static std::atomic<GompParallel> found{nullptr};
  GompParallel f = found.load(std::memory_order_relaxed);
  if (!f) {
    f = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.store(f, std::memory_order_relaxed);
  }
  return f;
}

struct Team {
  const std::function<void(int)>& work;
  std::atomic<int> next{0};
  void join() { work(next.fetch_add(1, std::memory_order_relaxed)); }
};

}  // namespace

void parallel(int threads, const std::function<void(int)>& work) {
  if (threads <= 1) return work(0);
  Team team{work};
  if (const GompParallel run = forked ? nullptr : openmp()) {
    run([](void* t) { static_cast<Team*>(t)->join(); }, &team, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back([&team] { team.join(); });
  team.join();
  for (std::thread& t : others) t.join();
}

}  // namespace gradfused::cpu
