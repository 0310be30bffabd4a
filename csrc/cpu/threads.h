// Runs work on the threads the process already has.
#pragma once

#include <functional>

namespace gradfused::cpu {

// Calls work(worker) once on each of at most `threads` threads, the calling one among them, with distinct numbers from 0. Uses torch's own
// OpenMP threads where the process has them (a second pool would fight theirs, which spin for milliseconds after each operation), else
// starts threads for the call. Safe after fork(). Where no more threads can be started, which torch's OpenMP would end the process for,
// those that can do the work.
void parallel(int threads, const std::function<void(int)>& work);

}  // namespace gradfused::cpu
