// race.h: tells ThreadSanitizer about the CUDA threads that machine.h runs, so that it finds races. Built with
// g++ -fsanitize=thread (GCC 12 and its runtime, which tells up to 8,000 threads apart; newer runtimes know 256),
// without OpenMP; in any other build, nothing here does anything.
//
// Every thread of a block is a fiber for ThreadSanitizer, too. Switching between fibers orders nothing; only this does:
//   - the start of a kernel comes after all the host has done, and the host goes on after the kernel's end;
//   - __syncthreads orders the threads of a block, and __syncwarp those of its mask. Other calls of a warp (shuffles,
//     votes, mma, ldmatrix) order no memory: "these intrinsics do not imply a memory barrier" (CUDA C++ Programming Guide).
//     With CUDACPU_WARP_ORDERS=1 they do, which is slower, and hides a lane that overwrites what another lane has read
//     and then voted about: no GPU gets that wrong, though nothing promises it;
//   - __threadfence comes after all earlier fences of the grid, which is more than CUDA promises;
//   - atomics are atomic, and order nothing.
// So two accesses to the same number, at least one of which writes, are reported unless one of these lies between them,
// in whatever order the fibers ran; also where several threads write the same value, as flags are set. cp.async writes
// when it is issued and again when the thread waits for it.
//
// Not found: races between two streams, since the emulator's host does all tasks itself; some races between two blocks
// out of more than FIBER_SETS, since fibers are used again: blocks of the same set seem to be in order. (A fiber for
// each block would be exact, but the runtime gives out no more than about half a million in a run.)
//
// A report names both source lines, the kernel and, as the "thread" of each access, its block and thread. It ends the
// program with status 66; TSAN_OPTIONS=halt_on_error=0 goes on.

#ifndef CUDACPU_RACE_H
#define CUDACPU_RACE_H

#include "count.h"
#include <cstddef>

#if defined(__SANITIZE_THREAD__) && !defined(CUDACPU_BYTES)
#define CUDACPU_TSAN
#include <sanitizer/tsan_interface.h>
#define CUDACPU_UNSEEN __attribute__((no_sanitize_thread)) // without it, a function's entry and exit are noted
extern "C" {
void AnnotateIgnoreReadsBegin(const char *file, int line);
void AnnotateIgnoreReadsEnd(const char *file, int line);
void AnnotateIgnoreWritesBegin(const char *file, int line);
void AnnotateIgnoreWritesEnd(const char *file, int line);
void __tsan_read_range(void *p, long n);
void __tsan_write_range(void *p, long n);
}
#else
#define CUDACPU_UNSEEN
#endif

namespace cudacpu {

// Consecutive blocks take their fibers from different ones of so many sets.
const unsigned FIBER_SETS = 2;

// Where threads meet: what each did before it arrives comes before what any does after it has left.
struct Meeting {
    unsigned left; // to leave
};

#ifdef CUDACPU_TSAN

inline void *host_fiber; // ThreadSanitizer's name of the thread that runs grids
inline Meeting *kernel_begins, *kernel_ends;
inline char fences;

CUDACPU_UNSEEN inline void become(void *fiber) {
    __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
}

// While one of these lives, a CUDA thread runs the emulator's code, which counts as the host's; during a kernel, what
// the host reads and writes is ignored.
struct Backstage {
    CUDACPU_UNSEEN Backstage() {
        become(host_fiber);
    }
    CUDACPU_UNSEEN ~Backstage();
    Backstage(const Backstage &) = delete;
};

CUDACPU_UNSEEN inline void arrive(void *fiber, Meeting *meeting) {
    become(fiber);
    __tsan_release(meeting);
    become(host_fiber);
}

CUDACPU_UNSEEN inline void leave(void *fiber, Meeting *meeting) {
    become(fiber);
    __tsan_acquire(meeting);
    become(host_fiber);
    if (--meeting->left == 0)
        delete meeting;
}

inline bool warp_orders = getenv("CUDACPU_WARP_ORDERS") && atoi(getenv("CUDACPU_WARP_ORDERS"));

inline Meeting *new_meeting(unsigned threads) {
    return new Meeting{threads};
}

struct RaceGrid { // while a grid runs
    RaceGrid() {
        host_fiber = __tsan_get_current_fiber();
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
        kernel_begins = new_meeting(1);
        kernel_ends = new_meeting(1);
        __tsan_release(kernel_begins);
    }
    ~RaceGrid() {
        __tsan_acquire(kernel_ends);
        delete kernel_begins;
        delete kernel_ends;
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    }
};

CUDACPU_UNSEEN inline void begin_thread(void *fiber, const char *name) { // from here on, what is done is the thread's
    become(fiber);
    __tsan_set_fiber_name(fiber, name);
    __tsan_acquire(kernel_begins);
}

CUDACPU_UNSEEN inline void end_thread() {
    __tsan_release(kernel_ends);
    become(host_fiber);
}

// What the emulator reads and writes in the name of the current thread, outside of a Backstage.
inline void thread_reads(const void *p, size_t n) {
    if (n)
        __tsan_read_range((void *)p, (long)n);
}
inline void thread_writes(void *p, size_t n) {
    if (n)
        __tsan_write_range(p, (long)n);
}

inline void fence() {
    __tsan_acquire(&fences);
    __tsan_release(&fences);
}

// What TSAN_OPTIONS may change: the first race ends the program; a fiber's memory of its own past is as short as can
// be, or thousands of them would need gigabytes.
extern "C" __attribute__((used)) CUDACPU_UNSEEN inline const char *__tsan_default_options() {
    return "halt_on_error=1 history_size=0 report_signal_unsafe=0 detect_deadlocks=0";
}

#else

struct Backstage {
    Backstage() {
    }
};
struct RaceGrid {
    RaceGrid() {
    }
};
inline void thread_reads(const void *p, size_t n) { // counted, where bytes are
    (void)p, (void)n;
#ifdef CUDACPU_BYTES
    were_read.add(p, n);
#endif
}
inline void thread_writes(void *p, size_t n) {
    (void)p, (void)n;
#ifdef CUDACPU_BYTES
    were_written.add(p, n);
#endif
}
inline void fence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

#endif

} // namespace cudacpu

#endif
