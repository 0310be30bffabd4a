// One block: its threads take turns, each until it has to wait for others.
#pragma once

#include <map>
#include <string>

#include "fiber.h"
#include "language.h"
#include "meeting.h"
#include "order.h"

namespace gradfused_emulator {

constexpr unsigned kMaxThreads = 1024;

struct Thread {
  Fiber fiber;
  enum : uint8_t { fresh, ready, waiting, exited } state = fresh;
  bool abandoned = false;
  Meeting at;  // when waiting
};

struct Kernel {
  const char* name;
  void (*run)(const void* arguments);
  const void* arguments;
};

class Block {
 public:
  // Runs one block to its end. Returns what went wrong, if anything.
  const std::string& run(const Kernel& kernel, unsigned threads, const Order& order) {
    kernel_ = &kernel;
    size_ = threads;
    report_.clear();
    exited_ = arrived_ = count_ = turn_ = 0;
    ran_ = false;
    for (unsigned& lanes : waiting_) lanes = 0;
    for (unsigned t = 0; t < size_; ++t) {
      Thread& thread = threads_[t];
      if (!start_fiber(thread.fiber, t, thread.abandoned, &Block::thread_main)) return report_ = "no memory for its stacks";
      thread.abandoned = false;
      thread.state = Thread::fresh;
    }
    order_ = order;
    order_.fill(turns_, size_);
    go(launcher_, next());
    if (report_.empty() && exited_ < size_) report_ = "deadlock" + whereabouts();
    if (!report_.empty()) abandon();
    return report_;
  }

  // Waits for the whole block, exited threads too: what hardware makes of them differs.
  int barrier(Meet meet, bool predicate, Site site) {
    Meeting& me = threads_[current_].at;
    me = {meet, site, 0, 0, 0, 0};
    if (arrived_ == 0) first_ = current_;
    const Meeting& first = threads_[first_].at;
    if (meet != first.meet || !me.same_site(first)) {
      blame("came to " + me.text() + " while " + named(first_) + "waits at " + first.text());
      give_up();
    }
    count_ += predicate;
    if (++arrived_ < size_) {
      wait();
    } else {
      result_ = int(meet == Meet::block_all ? count_ == size_ : meet == Meet::block_any ? count_ > 0 : count_);
      arrived_ = count_ = 0;
      for (unsigned t = 0; t < size_; ++t) threads_[t].state = Thread::ready;
    }
    return result_;  // the next barrier cannot end before all have read it
  }

  // Waits for those lanes of the mask that the warp has. The last to come computes for all, so no value is overwritten unread.
  uint64_t meet(Meet meet, Site site, unsigned mask, uint64_t value, int operand = 0, int width = kWarp) {
    const unsigned lane = current_ % kWarp, lanes = size_ - (current_ - lane);
    Thread* const warp = &threads_[current_ - lane];
    Meeting& me = warp[lane].at;
    me = {meet, site, lanes < kWarp ? mask & ((1u << lanes) - 1) : mask, operand, width, value};
    if (!(me.mask >> lane & 1) || width < 1 || width > int(kWarp) || (width & (width - 1))) {
      blame("called " + me.text() + " and width " + std::to_string(width) + ": its lane is not in the mask, or no such width");
      give_up();
    }
    unsigned& waiting = waiting_[current_ / kWarp];
    waiting |= 1u << lane;
    if ((waiting & me.mask) == me.mask && agreed(me, warp)) {
      waiting &= ~me.mask;
      finish(me, warp);
    } else {
      wait();
    }
    return me.value;
  }

  // Lanes of the current warp that have not exited.
  unsigned lanes() const {
    unsigned mask = 0;
    for (unsigned lane = 0, t = current_ / kWarp * kWarp; lane < kWarp && t < size_; ++lane, ++t) {
      mask |= unsigned(threads_[t].state != Thread::exited) << lane;
    }
    return mask;
  }

  // Reports what the current thread did. It has to give up next, in a statement of its own: that leaves the stack as it is.
  void blame(const std::string& did) { report_ = named(current_) + did; }

  [[noreturn]] void give_up() {
    threads_[current_].abandoned = true;
    exit_thread();
  }

 private:
  static void thread_main();

  // The thread whose turn it is; the launcher if none can go on.
  Fiber& next() {
    for (;; turn_ = 0) {
      while (turn_ < size_) {
        const unsigned t = turns_[turn_++];
        if (threads_[t].state > Thread::ready) continue;
        ran_ = true;
        return choose(t);
      }
      if (!ran_) return launcher_;
      ran_ = false;
      if (order_.varies()) order_.fill(turns_, size_);
    }
  }

  Fiber& choose(unsigned t) {
    current_ = threadIdx.x = t;
    threads_[t].state = Thread::ready;
    return threads_[t].fiber;
  }

  void go(Fiber& from, const Fiber& to, bool for_good = false) {
    left_ = &from;
    switch_fiber(from, to, for_good);
  }

  void wait() {
    Thread& me = threads_[current_];
    me.state = Thread::waiting;
    go(me.fiber, next());
    if (me.abandoned) exit_thread();
  }

  [[noreturn]] void exit_thread() {
    Thread& me = threads_[current_];
    me.state = Thread::exited;
    ++exited_;
    go(me.fiber, me.abandoned ? launcher_ : next(), true);
    abort();
  }

  // What the stacks still hold is dropped: device code owns nothing. Each is left from inside, as AddressSanitizer wants it.
  void abandon() {
    for (unsigned t = 0; t < size_; ++t) {
      if (threads_[t].state == Thread::fresh || threads_[t].state == Thread::exited) continue;
      threads_[t].abandoned = true;
      go(launcher_, choose(t));
    }
  }

  // Whether all lanes of the mask, which all wait, do so at the same thing.
  bool agreed(const Meeting& me, const Thread* warp) {
    const Thread* elsewhere = nullptr;
    for (unsigned rest = me.mask; rest; rest &= rest - 1) {
      const Thread& other = warp[__builtin_ctz(rest)];
      if (other.at.meet != me.meet || other.at.mask != me.mask) return false;
      if (!other.at.same_site(me)) elsewhere = &other;
    }
    if (!elsewhere || me.meet == Meet::warp) return true;
    blame("came to " + me.text() + " while " + named(unsigned(elsewhere - threads_)) + "waits at " + elsewhere->at.text());
    give_up();
  }

  void finish(const Meeting& me, Thread* warp) {
    uint64_t results[kWarp];
    unsigned ballot = 0;
    for (unsigned rest = me.mask; rest; rest &= rest - 1) {
      const unsigned lane = unsigned(__builtin_ctz(rest)), from = me.meet < Meet::ballot ? warp[lane].at.source(lane) : lane;
      if (!(me.mask >> from & 1)) {
        report_ = named(unsigned(warp - threads_) + lane);
        report_ += "reads lane " + std::to_string(from) + " by " + me.text() + ", which leaves it out";
        give_up();
      }
      results[lane] = warp[from].at.value;
      ballot |= unsigned(results[lane] != 0) << lane;
    }
    for (unsigned rest = me.mask; rest; rest &= rest - 1) {
      Thread& thread = warp[__builtin_ctz(rest)];
      thread.state = Thread::ready;
      switch (me.meet) {
        case Meet::ballot: thread.at.value = ballot; break;
        case Meet::all: thread.at.value = ballot == me.mask; break;
        case Meet::any: thread.at.value = ballot != 0; break;
        default: thread.at.value = results[__builtin_ctz(rest)];
      }
    }
  }

  static std::string named(unsigned t) { return "thread " + std::to_string(t) + " "; }

  std::string whereabout(unsigned t) const {
    if (threads_[t].state == Thread::exited) return "exited";
    const Meeting& at = threads_[t].at;
    for (unsigned rest = at.mask; rest; rest &= rest - 1) {
      const unsigned lane = unsigned(__builtin_ctz(rest));
      if (threads_[t / kWarp * kWarp + lane].state != Thread::exited) continue;
      return "wait at " + at.text() + ", of which lane " + std::to_string(lane) + " exited";
    }
    return "wait at " + at.text();
  }

  // A line for each thing that threads do, with their numbers.
  std::string whereabouts() const {
    std::map<std::string, std::string> who;
    for (unsigned t = 0, end; t < size_; t = end) {
      const std::string where = whereabout(t);
      for (end = t + 1; end < size_ && whereabout(end) == where;) ++end;
      who[where] += " " + std::to_string(t) + (end > t + 1 ? "-" + std::to_string(end - 1) : "");
    }
    std::string all;
    for (const auto& [where, numbers] : who) all += "\n  threads" + numbers + ": " + where;
    return all;
  }

  const Kernel* kernel_ = nullptr;
  std::string report_;
  Fiber launcher_, *left_ = nullptr;  // left_: the one switched away from last
  Thread threads_[kMaxThreads];
  unsigned waiting_[kMaxThreads / kWarp];  // lanes at a meeting of their warp
  unsigned size_ = 0, current_ = 0, exited_ = 0;
  // the block's barrier
  unsigned arrived_ = 0, first_ = 0, count_ = 0;
  int result_ = 0;
  // taking turns
  Order order_;
  unsigned turns_[kMaxThreads], turn_ = 0;
  bool ran_ = false;  // whether any thread did in this round
};

inline Block block;

inline void Block::thread_main() {
  arrive_on_fiber(*block.left_);
  bool thrown = false;
  try {
    block.kernel_->run(block.kernel_->arguments);
  } catch (...) {
    thrown = true;
  }
  if (!thrown) block.exit_thread();
  block.blame("threw an exception");
  block.give_up();
}

}  // namespace gradfused_emulator
