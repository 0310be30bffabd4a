#include "cpu/threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
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

// How many threads of the OpenMP pool that belongs to a thread have worked for it and not ended since.
using Alive = std::shared_ptr<std::atomic<int>>;

// A thread's place in such a pool. OpenMP ends threads when a region wants fewer, torch's regions too.
class Membership {
 public:
  ~Membership() { move_to(nullptr); }
  void move_to(const Alive& pool) {
    if (pool == pool_) return;
    if (pool_) pool_->fetch_sub(1, std::memory_order_relaxed);
    if (pool) pool->fetch_add(1, std::memory_order_relaxed);
    pool_ = pool;
  }

 private:
  Alive pool_;
};

thread_local const Alive own_pool = std::make_shared<std::atomic<int>>(0);
thread_local Membership membership;

struct Team {
  const std::function<void(int)>& work;
  std::atomic<int> next{0};
  void join() { work(next.fetch_add(1, std::memory_order_relaxed)); }
};

struct OpenmpTeam : Team {
  const Alive& pool;
  const std::thread::id caller;
  void join() {
    if (std::this_thread::get_id() != caller) membership.move_to(pool);
    Team::join();
  }
};

// As many threads as there are to be had, up to `count`.
template <class F> std::vector<std::thread> started(int count, const F& work) {
  std::vector<std::thread> threads;
  try {
    threads.reserve(size_t(count));
    while (int(threads.size()) < count) threads.emplace_back(work);
  } catch (const std::exception&) {  // no more threads, or no memory for one
  }
  return threads;
}

void wait_for(std::vector<std::thread>& threads) {
  for (std::thread& t : threads) t.join();
}

// Whether so many threads can be started now, on top of those there are. OpenMP ends the process where it cannot start one.
bool can_start(int count) {
  if (count <= 0) return true;
  std::mutex gate;
  std::unique_lock<std::mutex> closed(gate);  // all of them at one time
  std::vector<std::thread> threads = started(count, [&gate] { const std::lock_guard<std::mutex> through(gate); });
  closed.unlock();
  wait_for(threads);
  return int(threads.size()) == count;
}

}  // namespace

void parallel(int threads, const std::function<void(int)>& work) {
  if (threads <= 1) return work(0);
  const GompParallel run = forked ? nullptr : openmp();
  if (run && can_start(threads - 1 - own_pool->load(std::memory_order_relaxed))) {
    OpenmpTeam team{{work}, own_pool, std::this_thread::get_id()};
    run([](void* t) { static_cast<OpenmpTeam*>(t)->join(); }, &team, unsigned(threads), 0);
    return;
  }
  Team team{work};
  std::vector<std::thread> others = started(threads - 1, [&team] { team.join(); });
  team.join();
  wait_for(others);
}

}  // namespace gradfused::cpu
