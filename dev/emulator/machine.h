// machine.h: how a block of CUDA threads runs on the CPU. cuda_runtime.h, which includes this, says what it is for.
//
// From top to bottom: chance, poison and the end of a program; fibers; what threads wait for; shared memory; traps;
// grids.

#ifndef CUDACPU_MACHINE_H
#define CUDACPU_MACHINE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <algorithm>
#include <cfenv>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>
#include <vector>
#ifdef __GLIBC__
#include <execinfo.h>
#include <link.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define CUDACPU_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDACPU_ASAN
#endif
#endif
#ifdef CUDACPU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#include "race.h"

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {
    }
};

namespace cudacpu {

const unsigned MAX_THREADS = 1024;
const size_t SHARED_LIMIT = 48 << 10, SHARED_MOST = 227 << 10; // bytes of shared memory: as it is, on any demand
const size_t GUARD = 64, GUARD_PAGE = 16 << 10, SIGNAL_STACK = 64 << 10;
#if defined(CUDACPU_ASAN) || defined(CUDACPU_TSAN)
const size_t STACK = 256 << 10; // their frames are larger
#else
const size_t STACK = 64 << 10;
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 1. Chance, poison, and the end of a program

struct Random { // xorshift64*, begun with a mixture of three numbers
    uint64_t state;

    Random(uint64_t a = 0, uint64_t b = 0, uint64_t c = 0) {
        state = (((a * 0x9e3779b97f4a7c15 ^ b) * 0xbf58476d1ce4e5b9 ^ c) * 0x94d049bb133111eb) | 1;
        below(1);
    }
    unsigned below(unsigned n) {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        return (unsigned)((state * 0x2545f4914f6cdd1d >> 32) * n >> 32);
    }
    template <class T> void shuffle(T *list, size_t n) {
        for (; n > 1; n--)
            std::swap(list[n - 1], list[below((unsigned)n)]);
    }
};

inline uint64_t environment(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    return text ? strtoull(text, nullptr, 0) : otherwise;
}

// Bytes of shared memory that a block can have on this device, on demand: CUDACPU_SHARED in KiB, 227 as on an H100.
inline size_t shared_optin = std::clamp((size_t)environment("CUDACPU_SHARED", 227) << 10, SHARED_LIMIT, SHARED_MOST);

inline uint64_t seed() { // each rank that mpirun has started shuffles in its own way
    static const uint64_t rank = environment("OMPI_COMM_WORLD_RANK", environment("PMI_RANK", 0));
    static const uint64_t value = environment("CUDACPU_SEED", 1) + 1000003 * rank;
    return value;
}

// What unwritten memory holds: a0 at even addresses, 7f at odd ones. As a float, or as a bfloat16 made a float, it is a
// signalling NaN, whose first use in arithmetic raises FE_INVALID; as an index or a pointer it leads far away.
struct Pattern {
    unsigned char bytes[4097];
    Pattern() {
        for (size_t i = 0; i < sizeof(bytes); i++)
            bytes[i] = i % 2 ? 0x7f : 0xa0;
    }
};
inline const Pattern pattern;

inline void poison(void *memory, size_t n) {
    for (char *p = (char *)memory, *end = p + n; p < end; p += 4096)
        memcpy(p, pattern.bytes + (uintptr_t)p % 2, std::min<size_t>(4096, end - p));
}

inline bool poisoned(const void *memory, size_t n) { // still
    for (const char *p = (const char *)memory, *end = p + n; p < end; p += 4096) {
        if (memcmp(p, pattern.bytes + (uintptr_t)p % 2, std::min<size_t>(4096, end - p)))
            return false;
    }
    return true;
}

// What a write before or past a piece of memory has changed of the guards around it; nullptr: nothing.
inline const char *broken_guard(const char *p, size_t n) {
    size_t odd = (uintptr_t)p % 2, odd_end = (uintptr_t)(p + n) % 2;
    return memcmp(p + n, pattern.bytes + odd_end, GUARD)   ? "past the end of"
           : memcmp(p - GUARD, pattern.bytes + odd, GUARD) ? "before the beginning of"
                                                           : nullptr;
}

struct Thread;
struct Machine;
inline thread_local Thread *current;    // the CUDA thread whose code runs on this thread of the system; nullptr: none
inline thread_local Machine *machine;   // where it runs
inline thread_local const char *kernel; // and what

inline int print_place(char *to, size_t size);

// Says what is wrong, and where. Other threads of the system may fail at the same time: the first one speaks.
inline void complain(const char *format, va_list values) {
    static bool failed;
    while (__atomic_exchange_n(&failed, true, __ATOMIC_SEQ_CST))
        pause();
    char text[1000];
    int n = print_place(text, sizeof(text));
    vsnprintf(text + n, sizeof(text) - n, format, values);
    fprintf(stderr, "%s\n", text);
}

[[noreturn]] inline void stop() {
    fflush(stdout);
    _exit(1);
}

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char *format, ...) {
    va_list values;
    va_start(values, format);
    complain(format, values);
    stop();
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Fibers: go(from, to) keeps where it is on `from`'s stack and goes on where `to` was left

#if defined(__x86_64__) || defined(__aarch64__)
struct Context {
    void *sp;
};
extern "C" __attribute__((visibility("hidden"))) void cudacpu_go(void **from, void *to);

// What a called function must preserve is pushed, the stack changed, and the same popped from there.
#ifdef __x86_64__
__asm__(".text\n.balign 16\n.type cudacpu_go, @function\ncudacpu_go:\n"
        "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n.size cudacpu_go, .-cudacpu_go\n");
enum {
    SAVED = 7,
    RETURN_TO = 6,
    ABOVE = 1
}; // words kept on the stack, which of them is the return address, what is above
#else
__asm__(".text\n.balign 16\n.type cudacpu_go, %function\ncudacpu_go:\n"
        "sub sp, sp, #160\n"
        "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
        "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
        "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
        "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
        "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
        "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
        "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
        "add sp, sp, #160\nret\n.size cudacpu_go, .-cudacpu_go\n");
enum { SAVED = 20, RETURN_TO = 11, ABOVE = 2 };
#endif
CUDACPU_UNSEEN inline void prepare(Context &c, char *stack, size_t size, void (*entry)()) {
    void **sp = (void **)(stack + size) - ABOVE - SAVED; // entry finds the stack aligned as a call would leave it
    memset(sp, 0, (SAVED + ABOVE) * sizeof(*sp));
    sp[RETURN_TO] = (void *)entry;
    c.sp = sp;
}
CUDACPU_UNSEEN inline void go(Context &from, Context &to) {
    cudacpu_go(&from.sp, to.sp);
}
#else
} // namespace cudacpu
#include <ucontext.h>
namespace cudacpu {
typedef ucontext_t Context;
CUDACPU_UNSEEN inline void prepare(Context &c, char *stack, size_t size, void (*entry)()) {
    getcontext(&c);
    c.uc_stack.ss_sp = stack;
    c.uc_stack.ss_size = size;
    c.uc_link = nullptr;
    makecontext(&c, entry, 0);
}
CUDACPU_UNSEEN inline void go(Context &from, Context &to) {
    swapcontext(&from, &to);
}
#endif

inline void *&race_fiber(char *stack) { // ThreadSanitizer's name of the fiber that runs there: above the stack
    return *(void **)(void *)(stack + STACK);
}

inline char *new_stack() { // above a page that nobody may touch
    size_t size = GUARD_PAGE + STACK + sizeof(void *);
    char *p = (char *)mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, GUARD_PAGE, PROT_NONE) != 0)
        fail("no memory for the stack of a fiber");
    p += GUARD_PAGE;
#ifdef CUDACPU_TSAN
    race_fiber(p) = __tsan_create_fiber(0);
#endif
    return p;
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. The threads of a block, and what they wait for

struct Copy { // cp.async
    void *to;
    const void *from;
    int n;
    unsigned batch;
};

enum State { NEW, STARTED, ENDED };

struct Thread {
    uint3 index;
    unsigned number; // in the block
    State state;
    const char *call, *file; // where it waits, in which warp call (nullptr: for a barrier)
    int line;
    Context context;
    char *stack;
    size_t stack_size;
    void *fake; // AddressSanitizer's
    std::vector<Copy> copies;
    unsigned batch; // of copies: the one that is still open
};

// A call that lanes of a warp make together. Each brings the address of what it gives and gets; the one that comes last
// does the work for all, while the others, and so their stacks, stand still.
struct Call {
    const char *name;
    unsigned mask, here;
    void *lane[32];
    Meeting *meeting; // nullptr: it orders no memory
};

struct Variable {         // in shared memory
    const char *function; // nullptr: the dynamic one
    int line;
    char *memory, *data; // what was allocated, what it holds
    size_t size;
};

struct Grid {
    const char *name;
    uint64_t number; // of the launch
    dim3 grid, block;
    size_t dynamic, limit;        // bytes of shared memory
    std::function<void()> thread; // calls the kernel
};

// What runs blocks, one after another: each thread of the system has one.
struct Machine {
    const Grid *grid;
    uint3 block;
    unsigned size = 0; // of the block
    Thread thread[MAX_THREADS];
    Thread host;                         // who runs the block
    std::vector<Thread *> ready, coming; // who can run in this round, the last one first, and who in the next
    bool interleaved;
    unsigned ended, at_barrier;
    Thread *last_ended, *first_at_barrier;
    std::vector<Call> calls[MAX_THREADS / 32];
    Meeting *meeting; // at the barrier
    Random random;
    std::vector<char *> stacks; // free ones
    std::vector<char *> used_stacks, stack_sets[FIBER_SETS]; // of the block, and of blocks: for ThreadSanitizer
    unsigned blocks_run = 0;
    std::vector<Variable> shared;
    size_t shared_size;
    char *arena, *arena_next; // for shared memory
    void *signal_stack;
    bool from_host;

    Machine();
    void run(const Grid *g, size_t number);
    Thread *next();
    void run_thread(Thread *me);
    void leave_for(Thread *to);
    void wait(const char *call, const char *file, int line);
    char *share(const char *function, int line, size_t n, size_t align);
    void end_shared();
};

#define CUDACPU_XYZ(i) (i).x, (i).y, (i).z

inline int print_place(char *to, size_t size) {
    if (!kernel)
        return 0;
    if (!current)
        return snprintf(to, size, "%.300s: ", kernel);
    return snprintf(to, size, "kernel %.300s, block (%u,%u,%u), thread (%u,%u,%u): ", kernel,
                    CUDACPU_XYZ(machine->block), CUDACPU_XYZ(current->index));
}

[[noreturn]] inline void never_comes(Thread *waiting, Thread *missing) {
    char why[300] = "";
    if (missing->state != ENDED)
        snprintf(why, sizeof(why), ": it waits at %s:%d %s", missing->file, missing->line,
                 missing->call ? missing->call : "for a barrier");
    current = waiting;
    if (waiting->call)
        fail("waits at %s:%d in %s for thread (%u,%u,%u), which never comes%s", waiting->file, waiting->line,
             waiting->call, CUDACPU_XYZ(missing->index), why);
    fail("waits at %s:%d for a barrier that thread (%u,%u,%u) never reaches%s", waiting->file, waiting->line,
         CUDACPU_XYZ(missing->index), why);
}

// The next thread to run; nullptr when all have ended.
inline Thread *Machine::next() {
    if (ready.empty()) {
        ready.swap(coming);
        random.shuffle(ready.data(), ready.size());
        if (ready.empty() && ended < size) { // some wait in a warp call, for others at a barrier or in another call
            for (unsigned w = 0; w < MAX_THREADS / 32; w++) {
                for (Call &c : calls[w])
                    never_comes(&thread[w * 32 + __builtin_ctz(c.here)],
                                &thread[w * 32 + __builtin_ctz(c.mask & ~c.here)]);
            }
        }
        if (ready.empty())
            return nullptr;
    }
    Thread *t = ready.back();
    ready.pop_back();
    return t;
}

inline void fiber();

// From the current thread to another one, or from and to the host, until somebody comes back; nobody does to the ended.
CUDACPU_UNSEEN inline void Machine::leave_for(Thread *to) {
    Thread *me = current ? current : &host;
    if (to->state == NEW) {
        if (stacks.empty())
            stacks.push_back(new_stack());
        to->stack = stacks.back();
        stacks.pop_back();
        to->state = STARTED;
#ifdef CUDACPU_ASAN
        __asan_unpoison_memory_region(to->stack + STACK - (16 << 10), 16 << 10); // where fiber() ended
#endif
        // Stacks begin at different places in their pages, or they would all want the same lines of the cache.
        prepare(to->context, to->stack, STACK - to->number % 32 * 128, fiber);
    }
    current = to == &host ? nullptr : to;
#ifdef CUDACPU_ASAN
    from_host = me == &host;
    __sanitizer_start_switch_fiber(me->state == ENDED ? nullptr : &me->fake, to->stack,
                                   to == &host ? host.stack_size : STACK);
#endif
    go(me->context, to->context);
#ifdef CUDACPU_ASAN
    __sanitizer_finish_switch_fiber(me->fake, nullptr, nullptr);
#endif
}

// The current thread waits; whoever ends that puts it into `ready` or `coming`.
CUDACPU_UNSEEN inline void Machine::wait(const char *call, const char *file, int line) {
    Thread *me = current;
    me->call = call;
    me->file = file;
    me->line = line;
    leave_for(next());
}

#ifdef CUDACPU_TSAN
CUDACPU_UNSEEN inline Backstage::~Backstage() {
    become(race_fiber(current->stack));
}
// After a report, where the second of the two accesses was.
extern "C" __attribute__((used)) CUDACPU_UNSEEN inline void __tsan_on_report(void *) {
    char text[500];
    if (print_place(text, sizeof(text)) > 0)
        fprintf(stderr, "%sa race: no barrier lies between the two accesses above\n", text);
}
#endif

CUDACPU_UNSEEN inline void Machine::run_thread(Thread *me) {
#ifdef CUDACPU_TSAN
    char name[64]; // what is longer is cut off
    snprintf(name, sizeof(name), "block (%u,%u,%u) thread (%u,%u,%u)", CUDACPU_XYZ(block), CUDACPU_XYZ(me->index));
    begin_thread(race_fiber(me->stack), name);
    grid->thread();
    end_thread();
#else
    (void)me;
    grid->thread();
#endif
}

// What runs on a fiber's stack: a thread and, when that has ended, the next one, if it is new and so needs a stack.
CUDACPU_UNSEEN inline void fiber() {
    Machine *m = machine;
#ifdef CUDACPU_ASAN
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (m->from_host) {
        m->host.stack = (char *)bottom;
        m->host.stack_size = bytes;
    }
#endif
    for (;;) {
        Thread *me = current;
        m->run_thread(me);
        if (!me->copies.empty())
            fail("ends without having waited for its copies (cp.async)");
        me->state = ENDED;
        m->ended++;
        m->last_ended = me;
        if (m->at_barrier)
            never_comes(m->first_at_barrier, me);
        for (Call &c : m->calls[me->number / 32]) {
            if (c.mask >> me->number % 32 & 1)
                never_comes(&m->thread[me->number / 32 * 32 + __builtin_ctz(c.here)], me);
        }
        Thread *next = m->next();
#ifdef CUDACPU_TSAN
        m->used_stacks.push_back(me->stack); // the next thread on it would seem to come after this one
        m->leave_for(next ? next : &m->host);
#endif
        if (next && next->state == NEW) {
            next->stack = me->stack;
            next->state = STARTED;
            current = next;
        } else {
            m->stacks.push_back(me->stack);
            m->leave_for(next ? next : &m->host);
        }
    }
}

// Waits until all threads of the block have come to this line.
inline void barrier(const char *file, int line) {
    Backstage backstage;
    Machine *m = machine;
    Thread *me = current, *first = m->first_at_barrier;
    me->call = nullptr;
    me->file = file;
    me->line = line;
    if (m->ended)
        never_comes(me, m->last_ended);
    if (m->at_barrier++ == 0)
        m->first_at_barrier = me;
    else if (first->line != line || (first->file != file && strcmp(first->file, file)))
        never_comes(first, me);
#ifdef CUDACPU_TSAN
    if (m->at_barrier == 1)
        m->meeting = new_meeting(m->size);
    Meeting *meeting = m->meeting;
    arrive(race_fiber(me->stack), meeting);
#endif
    if (m->at_barrier < m->size) {
        m->wait(nullptr, file, line);
#ifdef CUDACPU_TSAN
        leave(race_fiber(me->stack), meeting);
#endif
        return;
    }
#ifdef CUDACPU_TSAN
    leave(race_fiber(me->stack), meeting);
#endif
    m->at_barrier = 0;
    for (unsigned i = 0; i < m->size; i++) {
        if (&m->thread[i] != me)
            m->coming.push_back(&m->thread[i]);
    }
}

// One call by all lanes in mask that exist, each with a `mine` of its own; all(lanes, mask) does what they do together.
// Then they run before other warps do, which is faster, or (interleaved) after all others that can. orders: whether
// what one lane did to memory before the call is seen by the others after it.
template <class Mine, class All>
void together(unsigned mask, Mine &mine, const char *name, const char *file, int line, All all, bool orders = false) {
    Backstage backstage;
    Machine *m = machine;
    Thread *me = current, *warp = m->thread + me->number / 32 * 32;
    std::vector<Call> &calls = m->calls[me->number / 32];
    unsigned lane = me->number % 32, rest = m->size - (me->number - lane);
    mask &= rest < 32 ? (1u << rest) - 1 : ~0u;
    if (!(mask >> lane & 1))
        fail("%s:%d: %s: lane %u is not in its own mask %08x", file, line, name, lane, mask);
    size_t c = 0;
    while (c < calls.size() && calls[c].mask != mask)
        c++;
    if (c == calls.size())
        calls.push_back({name, mask, 0, {}, nullptr});
    me->call = name;
    me->file = file;
    me->line = line;
    if (calls[c].name != name && strcmp(calls[c].name, name))
        never_comes(&warp[__builtin_ctz(calls[c].here)], me);
    for (unsigned i = 0; m->ended && i < 32; i++) {
        if (mask >> i & 1 && warp[i].state == ENDED)
            never_comes(me, &warp[i]);
    }
    calls[c].lane[lane] = &mine;
    calls[c].here |= 1u << lane;
    (void)orders;
#ifdef CUDACPU_TSAN
    if ((orders || warp_orders) && !calls[c].meeting)
        calls[c].meeting = new_meeting(__builtin_popcount(mask));
    Meeting *meeting = calls[c].meeting;
    if (meeting)
        arrive(race_fiber(me->stack), meeting);
#endif
    if (calls[c].here != mask) {
        m->wait(name, file, line);
#ifdef CUDACPU_TSAN
        if (meeting)
            leave(race_fiber(me->stack), meeting);
#endif
        return;
    }
#ifdef CUDACPU_TSAN
    if (meeting)
        leave(race_fiber(me->stack), meeting);
#endif
    Mine *lanes[32];
    memcpy(lanes, calls[c].lane, sizeof(lanes));
    calls.erase(calls.begin() + c);
    all(lanes, mask);
    std::vector<Thread *> &list = m->interleaved ? m->coming : m->ready;
    size_t before = list.size();
    for (unsigned i = 0; i < 32; i++) {
        if (mask >> i & 1 && i != lane)
            list.push_back(&warp[i]);
    }
    m->random.shuffle(list.data() + before, list.size() - before);
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. Shared memory: a variable is allocated for a block when its first thread comes by, between guards or the red zones
// of AddressSanitizer, and aligned as its type wants but no better, as nvcc does: what needs more must say __align__

inline char *Machine::share(const char *function, int line, size_t n, size_t align) {
    Backstage backstage;
    for (Variable &v : shared) {
        if (v.line == line && v.function == function)
            return v.data;
    }
    shared_size += function ? n : 0; // the dynamic one was counted at the start
    if (shared_size > grid->limit || shared_size - grid->dynamic > SHARED_LIMIT)
        fail("%zu bytes of shared memory, of which %zu are dynamic, are too many", shared_size, grid->dynamic);
    Variable v = {function, line, nullptr, nullptr, n};
#ifdef CUDACPU_ASAN
    if (posix_memalign((void **)&v.memory, std::max<size_t>(16, 2 * align), n + align) != 0)
        fail("no memory");
    v.data = v.memory + align;
    poison(v.data, n);
    __asan_poison_memory_region(v.memory, align);
#elif defined(CUDACPU_TSAN) // which forgets what was done to memory once it is given back
    size_t front = (GUARD + 2 * align - 1) / (2 * align) * (2 * align) + align;
    if (posix_memalign((void **)&v.memory, std::max<size_t>(16, 2 * align), front + n + GUARD) != 0)
        fail("no memory");
    v.data = v.memory + front;
    poison(v.data - GUARD, n + 2 * GUARD);
#else
    v.data = (char *)(((uintptr_t)arena_next + GUARD + 2 * align - 1) / (2 * align) * (2 * align) + align);
    arena_next = v.data + n + GUARD;
    if (arena_next > arena + 2 * SHARED_MOST)
        fail("too many variables in shared memory");
    poison(v.data - GUARD, n + 2 * GUARD);
#endif
    shared.push_back(v);
    return v.data;
}

inline void Machine::end_shared() {
    for (Variable &v : shared) {
#ifdef CUDACPU_ASAN
        __asan_unpoison_memory_region(v.memory, v.data - v.memory);
        free(v.memory);
#else
        if (const char *where = broken_guard(v.data, v.size))
            fail("block (%u,%u,%u) wrote %s %s shared memory of line %d", CUDACPU_XYZ(block), where,
                 v.function ? "the" : "the dynamic", v.line);
#ifdef CUDACPU_TSAN
        free(v.memory);
#endif
#endif
    }
    shared.clear();
    arena_next = arena;
}

template <class T, size_t align = alignof(T)> T &shared(int line, const char *function) {
    return *(T *)(void *)machine->share(function, line, sizeof(T), align);
}

template <class T> T *dynamic_shared(int line = __builtin_LINE()) {
    return (T *)(void *)machine->share(nullptr, line, machine->grid->dynamic, 16);
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. What else stops a kernel: traps and wild addresses

extern "C" char __executable_start, etext; // the linker's: where the program's own code is

// Where in the source the interrupted function is, if there is an addr2line. On the stack are this function and the
// handler; then, of the C library, what calls handlers, and perhaps a function that the kernel had called; then our
// own.
inline void print_source() {
#ifdef __GLIBC__
    auto ours = [](void *p) { return (char *)p >= &__executable_start && (char *)p < &etext; };
    void *frames[64];
    int n = backtrace(frames, 64), i = 0, handler;
    while (i < n && !ours(frames[i])) // AddressSanitizer's backtrace()
        i++;
    while (i < n && ours(frames[i]))
        i++;
    for (handler = i; i < n && !ours(frames[i]);)
        i++;
    if (i == n)
        return;
    uintptr_t bias = 0; // where the program was put, if it can be put anywhere
    dl_iterate_phdr([](dl_phdr_info *info, size_t, void *to) { return *(uintptr_t *)to = info->dlpi_addr, 1; }, &bias);
    char exe[4000] = "", at[40];
    if (readlink("/proc/self/exe", exe, sizeof(exe) - 1) < 0)
        return;
    snprintf(at, sizeof(at), "%zx",
             (size_t)((uintptr_t)frames[i] - bias - (i > handler + 1))); // a call, not what follows
    pid_t child = fork();
    if (child == 0) {
        dup2(2, 1);
        execlp("addr2line", "addr2line", "-ipfsC", "-e", exe, at, (char *)nullptr);
        _exit(1);
    }
    waitpid(child, nullptr, 0);
#endif
}

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail_at_source(const char *format, ...) {
    va_list values;
    va_start(values, format);
    complain(format, values);
    print_source();
    stop();
}

inline void trap(int signal, siginfo_t *info, void *) {
    char *at = (char *)info->si_addr;
    if (signal == SIGFPE && info->si_code == FPE_INTDIV)
        fail_at_source("integer division by zero");
    if (signal == SIGFPE)
        fail_at_source("an uninitialised or invalid number was used (floating-point exception)");
    if (current && at >= current->stack - GUARD_PAGE && at < current->stack)
        fail("too many local variables: the stack is full");
    fail_at_source("wild address %p", (void *)at);
}

// While one of these lives, FE_INVALID is trapped in this thread of the system.
struct Traps {
    fenv_t before;
    const char *kernel_before;

    Traps(const char *name) : kernel_before(kernel) {
        kernel = name;
        fegetenv(&before);
#ifdef __GLIBC__
        feclearexcept(FE_ALL_EXCEPT);
        feenableexcept(FE_INVALID);
#endif
    }
    ~Traps() {
        fesetenv(&before);
        kernel = kernel_before;
    }
};

inline void print_sanitized() {
    char text[500];
    if (print_place(text, sizeof(text)) > 0)
        fprintf(stderr, "%sthis is what a sanitizer stops\n", text);
}
extern "C" __attribute__((used)) inline void __ubsan_on_report() { // UBSan calls it
    print_sanitized();
}

// And one of these catches the signals, of the whole process. AddressSanitizer reports wild addresses better itself.
struct Handlers {
    struct sigaction before[3];
#ifdef CUDACPU_ASAN
    enum { COUNT = 1 };
#else
    enum { COUNT = 3 };
#endif
    static constexpr int signals[3] = {SIGFPE, SIGSEGV, SIGBUS};

    Handlers() {
        struct sigaction ours = {};
        ours.sa_sigaction = trap;
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < COUNT; i++)
            sigaction(signals[i], &ours, &before[i]);
#ifdef CUDACPU_ASAN
        __sanitizer_set_death_callback(print_sanitized);
#endif
    }
    ~Handlers() {
        for (int i = 0; i < COUNT; i++)
            sigaction(signals[i], &before[i], nullptr);
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// 6. Blocks and grids

inline Machine::Machine() {
    host.state = STARTED;
    host.stack = nullptr;
    arena = arena_next = (char *)malloc(2 * SHARED_MOST);
    signal_stack = malloc(SIGNAL_STACK);
    if (!arena || !signal_stack)
        fail("no memory");
}

inline std::vector<Machine *> &free_machines = *new std::vector<Machine *>; // never freed, and leaks are looked for

// While one of these lives, this thread of the system has a machine, and a stack for signals: a fiber's may be used up.
struct Seat {
    stack_t before;

    Seat() {
#ifdef _OPENMP
#pragma omp critical(cudacpu)
#endif
        {
            if (free_machines.empty())
                free_machines.push_back(new Machine);
            machine = free_machines.back();
            free_machines.pop_back();
        }
        stack_t stack = {};
        stack.ss_sp = machine->signal_stack;
        stack.ss_size = SIGNAL_STACK;
        sigaltstack(&stack, &before);
    }
    ~Seat() {
        sigaltstack(&before, nullptr);
#ifdef _OPENMP
#pragma omp critical(cudacpu)
#endif
        free_machines.push_back(machine);
        machine = nullptr;
    }
};

inline void Machine::run(const Grid *g, size_t number) {
    dim3 n = g->grid, b = g->block;
    grid = g;
    block = {(unsigned)(number % n.x), (unsigned)(number / n.x % n.y), (unsigned)(number / n.x / n.y)};
    size = b.x * b.y * b.z;
    random = Random(seed(), g->number, number);
    interleaved = random.below(4) == 0;
    ended = at_barrier = 0;
    shared_size = g->dynamic;
    uint3 index = {0, 0, 0};
    for (unsigned i = 0; i < size; i++) {
        Thread &t = thread[i];
        t.index = index;
        t.number = i;
        t.state = NEW;
        t.batch = 0;
        coming.push_back(&t);
        if (++index.x == b.x) {
            index.x = 0;
            if (++index.y == b.y) {
                index.y = 0;
                index.z++;
            }
        }
    }
#ifdef CUDACPU_TSAN
    std::vector<char *> &set = stack_sets[blocks_run++ % FIBER_SETS];
    stacks.swap(set);
    leave_for(next());
    stacks.insert(stacks.end(), used_stacks.begin(), used_stacks.end());
    used_stacks.clear();
    stacks.swap(set);
#else
    leave_for(next());
#endif
    end_shared();
}

// Threads of the system that share the work. A forked child has none of its parent's, which OpenMP does not know.
inline const pid_t home = getpid();
inline int workers() {
#ifdef _OPENMP
    return getpid() == home && !omp_in_parallel() ? omp_get_max_threads() : 1;
#else
    return 1;
#endif
}

inline void run_grid(const Grid &g) {
    size_t n = (size_t)g.grid.x * g.grid.y * g.grid.z, block = g.block.x * g.block.y * g.block.z;
    std::vector<unsigned> order(n);
    for (size_t i = 0; i < n; i++)
        order[i] = (unsigned)i;
    Random(seed(), g.number, n).shuffle(order.data(), n);
    RaceGrid race_grid;
    CountedGrid counted_grid(g.name);
    Handlers handlers;
    (void)block; // few threads are not worth the others' waking up
#ifdef _OPENMP
#pragma omp parallel num_threads(workers()) if (n > 1 && n * block >= 2048)
#endif
    {
        Seat seat;
        Traps traps(g.name);
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
        for (size_t i = 0; i < n; i++)
            machine->run(&g, order[i]);
    }
}

} // namespace cudacpu

#endif
