#include "cpu/threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
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

// The OpenMP threads of one calling thread. OpenMP ends some when a region wants fewer, torch's regions too.
struct Pool {
  std::atomic<int> alive{0};  // that have worked for the caller and not ended since
  std::atomic<int> users{1};  // those, and the caller
  void release() {
    if (users.fetch_sub(1) == 1) delete this;
  }
};

void leave(void* pool) {
  static_cast<Pool*>(pool)->alive.fetch_sub(1, std::memory_order_relaxed);
  static_cast<Pool*>(pool)->release();
}

// A pointer to a pool that each thread has of its own. A thread_local would end the process where a thread has no memory for it.
class PoolOfThread {
 public:
  explicit PoolOfThread(void (*at_end)(void*)) : usable_(pthread_key_create(&key_, at_end) == 0) {}
  Pool* get() const { return usable_ ? static_cast<Pool*>(pthread_getspecific(key_)) : nullptr; }
  bool set(Pool* pool) const { return usable_ && pthread_setspecific(key_, pool) == 0; }

 private:
  pthread_key_t key_;
  const bool usable_;
};

const PoolOfThread owned([](void* pool) { static_cast<Pool*>(pool)->release(); });
const PoolOfThread joined(leave);

// The calling thread's, or null where there is no memory for it.
Pool* own_pool() {
  if (Pool* const pool = owned.get()) return pool;
  std::unique_ptr<Pool> made(new (std::nothrow) Pool);
  return made && owned.set(made.get()) ? made.release() : nullptr;
}

// The calling thread works for this pool from now on; not counted where there is no memory to remember it.
void join(Pool* pool) {
  Pool* const before = joined.get();
  if (before == pool || !joined.set(pool)) return;
  pool->users.fetch_add(1);
  pool->alive.fetch_add(1, std::memory_order_relaxed);
  if (before) leave(before);
}

struct Team {
  const std::function<void(int)>& work;
  std::atomic<int> next{0};
  void join() { work(next.fetch_add(1, std::memory_order_relaxed)); }
};

struct OpenmpTeam : Team {
  Pool* const pool;
  std::unique_lock<std::mutex>& starting;  // the caller's
  void join() {
    if (owned.get() != pool) {
      cpu::join(pool);
    } else if (starting) {  // the caller's turn comes when all have been started
      starting.unlock();
    }
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

// Between finding that threads can be started and OpenMP's starting them, no other thread here may start its own. Not used after fork().
std::mutex to_start;

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

void in_team(int threads, const std::function<void(int)>& work) {
  const GompParallel run = forked ? nullptr : openmp();
  Pool* const pool = run ? own_pool() : nullptr;
  std::unique_lock<std::mutex> starting(to_start, std::defer_lock);
  if (pool) {
    const int missing = threads - 1 - pool->alive.load(std::memory_order_relaxed);
    if (missing > 0) starting.lock();
    if (can_start(missing)) {
      OpenmpTeam team{{work}, pool, starting};
      run([](void* t) { static_cast<OpenmpTeam*>(t)->join(); }, &team, unsigned(threads), 0);
      return;
    }
  }
  Team team{work};
  std::vector<std::thread> others = started(threads - 1, [&team] { team.join(); });
  if (starting) starting.unlock();
  team.join();
  wait_for(others);
}

}  // namespace gradfused::cpu
