// Runs work on the threads the process already has.
#pragma once

#include <functional>

namespace gradfused::cpu {

// parallel() calls work(worker) once on each of at most `threads` threads, the calling one among them, with distinct numbers from 0. Uses torch's own
// OpenMP threads where the process has them (a second pool would fight theirs, which spin for milliseconds after each operation), else
// starts threads for the call. Safe after fork(). Where no more threads can be started, which torch's OpenMP would end the process for,
// those that can do the work.
void in_team(int threads, const std::function<void(int)>& work);
template <class F> void parallel(int threads, const F& work) { threads > 1 ? in_team(threads, work) : work(0); }

}  // namespace gradfused::cpu
