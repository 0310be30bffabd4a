// Runs work on the threads the process already has.
#pragma once

#include <functional>

namespace gradfused::cpu {

// Calls work(worker) once on each of at most `threads` threads, the calling one among them, with distinct numbers from 0. It uses torch's
// OpenMP threads where the process has them, since a second pool would fight theirs, which spin for milliseconds after each operation. Else it
// starts threads for the call. It is safe after fork(). Where the system refuses to start a thread, fewer threads do the work.
void in_team(int threads, const std::function<void(int)>& work);

// The same, without a team where one thread does the work.
template <class F> void parallel(int threads, const F& work) { threads > 1 ? in_team(threads, work) : work(0); }

}  // namespace gradfused::cpu
