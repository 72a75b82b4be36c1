// cuda_runtime.h, the look-alike: as much of the CUDA runtime and of CUDA C++ as train_moe.cu uses, on the CPU, so that
// its kernels are compiled by g++ or clang++ and tested without a GPU. For correctness, never for speed.
//
// rewrite.sed first turns <<<...>>> and __shared__ into calls of what is here. Then a kernel is a plain function, and
//
//   - each thread of a block is a fiber: a stack of its own, which runs until it must wait for others. Blocks, and the
//     threads of a block whenever there is a choice, run in a shuffled order, so that a missing barrier shows;
//   - whoever waits for a thread that never comes ends the program, with the kernel, the block, the thread and the line;
//   - memory that nobody has written is full of signalling NaNs, and a kernel that computes with one, or computes a
//     NaN, is ended too; memory past the end is seen by AddressSanitizer, and without it, later, by guard bytes;
//   - work in a stream waits until something waits for it, so that a host that looks too early shows as well.
//
// CUDACPU_SEED=n shuffles differently; CUDACPU_MEMORY=n gives the device n MiB (4096). Compile with -ftrapping-math:
// otherwise the compiler may compute, and throw away, what the program never asked for, and that may be a NaN.

#ifndef CUDACPU_CUDA_RUNTIME_H
#define CUDACPU_CUDA_RUNTIME_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <algorithm>
#include <chrono>
#include <cfenv>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <math.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <tuple>
#include <unistd.h>
#include <vector>
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

// ---------------------------------------------------------------------------------------------------------------------
// 1. Words and types of CUDA C++

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct int2 { int x, y; };
struct uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {
    }
};

#define threadIdx (cudacpu::current->index)
#define blockIdx (cudacpu::machine->block)
#define blockDim (cudacpu::machine->grid->block)
#define gridDim (cudacpu::machine->grid->grid)

namespace cudacpu {

// ---------------------------------------------------------------------------------------------------------------------
// 2. Random order, poison, and the end of a program

struct Random { // xorshift64*; the multiplier first mixes what it is made of
    uint64_t state;
    Random(uint64_t a, uint64_t b, uint64_t c) {
        state = ((a * 0x9e3779b97f4a7c15 ^ b) * 0xbf58476d1ce4e5b9 ^ c) * 0x94d049bb133111eb | 1;
        below(1);
    }
    unsigned below(unsigned n) {
        state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
        return (unsigned)((state * 0x2545f4914f6cdd1d >> 32) * n >> 32);
    }
    template <class T> void shuffle(T *list, size_t n) {
        for (size_t i = n; i > 1; i--)
            std::swap(list[i - 1], list[below((unsigned)i)]);
    }
};

inline uint64_t environment(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    return text ? strtoull(text, nullptr, 0) : otherwise;
}

inline uint64_t seed() {
    static const uint64_t value = environment("CUDACPU_SEED", 1);
    return value;
}

// What unwritten memory holds: a0 at even addresses, 7f at odd ones. As a float, or as a bfloat16 made a float, it is a
// signalling NaN, whose first use in arithmetic raises FE_INVALID; as an index or a pointer it leads far away.
struct Poison {
    unsigned char bytes[4097];
    Poison() {
        for (size_t i = 0; i < sizeof(bytes); i++)
            bytes[i] = i % 2 ? 0x7f : 0xa0;
    }
};
inline const Poison pattern;

inline void poison(void *memory, size_t n) {
    for (char *p = (char *)memory, *end = p + n; p < end; p += 4096)
        memcpy(p, pattern.bytes + (uintptr_t)p % 2, std::min<size_t>(4096, end - p));
}

inline bool poisoned(const void *memory, size_t n) { // n at most 4096
    return memcmp(memory, pattern.bytes + (uintptr_t)memory % 2, n) == 0;
}

struct Thread;
struct Machine;
inline thread_local Thread *current = nullptr;    // whose code runs on this thread of the system
inline thread_local Machine *machine = nullptr;   // where it runs
inline thread_local const char *kernel = nullptr; // and what

inline int print_place(char *to, size_t size);

// Ends the program. Other threads of the system may fail at the same time: the first one speaks.
[[noreturn]] inline void stop() {
    fflush(stdout);
    _exit(1);
}

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char *format, ...) {
    static bool failed;
    while (__atomic_exchange_n(&failed, true, __ATOMIC_SEQ_CST))
        pause();
    char text[1000];
    int n = print_place(text, sizeof(text));
    va_list values;
    va_start(values, format);
    vsnprintf(text + n, sizeof(text) - n, format, values);
    va_end(values);
    fprintf(stderr, "%s\n", text);
    stop();
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Fibers: go(from, to) keeps where it is on `from`'s stack and goes on where `to` was left

#if defined(__x86_64__) || defined(__aarch64__)
struct Context {
    void *sp;
};
extern "C" __attribute__((visibility("hidden"))) void cudacpu_go(void **from, void *to);
#ifdef __x86_64__
// What a called function must preserve is pushed, the stack changed, and the same popped from there.
__asm__(".text\n.balign 16\n.type cudacpu_go, @function\ncudacpu_go:\n"
        "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n.size cudacpu_go, .-cudacpu_go\n");
enum { SAVED = 7, RETURN_TO = 6, ABOVE = 1 }; // words on the stack of one that waits, which is its return address, what is above
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
inline void prepare(Context &c, char *stack, size_t size, void (*entry)()) {
    void **sp = (void **)(stack + size) - ABOVE - SAVED; // aligned to 16 bytes, on x86-64 before a call
    memset(sp, 0, (SAVED + ABOVE) * sizeof(*sp));
    sp[RETURN_TO] = (void *)entry;
    c.sp = sp;
}
inline void go(Context &from, Context &to) {
    cudacpu_go(&from.sp, to.sp);
}
#else
#include <ucontext.h>
typedef ucontext_t Context;
inline void prepare(Context &c, char *stack, size_t size, void (*entry)()) {
    getcontext(&c);
    c.uc_stack.ss_sp = stack, c.uc_stack.ss_size = size, c.uc_link = nullptr;
    makecontext(&c, entry, 0);
}
inline void go(Context &from, Context &to) {
    swapcontext(&from, &to);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 4. A block's threads

#ifdef CUDACPU_ASAN
const size_t STACK = 256 << 10; // its frames are larger
#else
const size_t STACK = 64 << 10;
#endif
const size_t PAGE = 16 << 10, SHARED_LIMIT = 48 << 10, SHARED_OPTIN = 227 << 10, GUARD = 64;
const unsigned MAX_THREADS = 1024;

struct Copy { // of cp.async
    void *to;
    const void *from;
    int n;
    unsigned batch;
};

enum State { NEW, READY, AT_BARRIER, IN_WARP, ENDED };

struct Thread {
    uint3 index;
    unsigned number; // in the block
    State state;
    const char *file, *what; // where and in which call it waits
    int line;
    Context context;
    char *stack;
    void *fake; // AddressSanitizer's
    std::vector<Copy> copies;
    unsigned batch; // of copies, that is still open
};

// A call that lanes of a warp make together. Each brings the address of what it gives and gets; the last one to come
// does the work for all, while the others, and so their stacks, stand still.
struct Call {
    unsigned mask, here;
    const char *what;
    size_t size;
    void *lane[32];
};

struct Variable { // in shared memory
    const char *function; // nullptr: the dynamic one
    int line;
    char *memory; // what was allocated
    char *data;
    size_t size;
};

struct Grid {
    const char *name;
    uint64_t number;
    dim3 grid, block;
    size_t dynamic;
    std::function<void()> thread; // calls the kernel
};

// What runs blocks, one at a time: there is one for each thread of the system.
struct Machine {
    const Grid *grid;
    uint3 block;
    unsigned size; // of the block
    Thread thread[MAX_THREADS];
    Thread host; // the thread of the system itself
    std::vector<Call> calls[MAX_THREADS / 32];
    std::vector<Thread *> ready, coming; // who can run now; who can after them
    size_t next_ready;
    unsigned ended, at_barrier;
    Thread *last_ended, *first_at_barrier;
    Random random{0, 0, 0};
    std::vector<char *> stacks; // free ones
    std::vector<Variable> shared;
    size_t shared_size;
    char *arena, *arena_end;
    size_t host_stack; // its size
    bool from_host;

    Machine();
    Thread *next();
    void leave(Thread *to);
    void wait(State state, const char *what, const char *file, int line);
    [[noreturn]] void stuck();
    void run(const Grid *g, size_t number);
    char *share(const char *function, int line, size_t n, size_t align);
    void end_shared();
    void must_be_shared(const void *p, const char *what);
};

#define CUDACPU_THREAD "thread (%u,%u,%u)"
#define CUDACPU_XYZ(i) (i).x, (i).y, (i).z

inline int print_place(char *to, size_t size) {
    if (!kernel)
        return 0;
    int n = snprintf(to, size, current ? "kernel %.300s" : "%.300s", kernel);
    if (current)
        n += snprintf(to + n, size - n, ", block (%u,%u,%u), " CUDACPU_THREAD, CUDACPU_XYZ(machine->block), CUDACPU_XYZ(current->index));
    return n + snprintf(to + n, size - n, ": ");
}

inline char *new_stack() {
    char *p = (char *)mmap(nullptr, PAGE + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, PAGE, PROT_NONE) != 0)
        fail("no memory for a fiber's stack");
    return p + PAGE;
}

inline Machine::Machine() {
    for (unsigned i = 0; i < MAX_THREADS; i++)
        thread[i].number = i;
    host.state = READY;
    host.stack = nullptr;
    next_ready = shared_size = host_stack = 0;
    arena = (char *)malloc(SHARED_OPTIN + (64 << 10));
    arena_end = arena;
    stack_t own = {};
    own.ss_size = 64 << 10;
    own.ss_sp = malloc(own.ss_size); // handlers need one, where a fiber's is used up
    if (!arena || !own.ss_sp || sigaltstack(&own, nullptr) != 0)
        fail("no memory");
}

// The next thread to run; nullptr when all have ended.
inline Thread *Machine::next() {
    if (next_ready == ready.size()) {
        ready.swap(coming);
        coming.clear();
        random.shuffle(ready.data(), ready.size());
        next_ready = 0;
        if (ready.empty()) {
            if (ended < size)
                stuck();
            return nullptr;
        }
    }
    return ready[next_ready++];
}

inline void fiber();

// From the current thread to another one (nullptr: to the host), until somebody comes back. Nobody comes back to one that
// has ended.
inline void Machine::leave(Thread *to) {
    Thread *me = current;
    if (!to)
        to = &host;
    if (to->state == NEW) {
        if (stacks.empty())
            stacks.push_back(new_stack());
        to->stack = stacks.back();
        stacks.pop_back();
        to->state = READY;
#ifdef CUDACPU_ASAN
        __asan_unpoison_memory_region(to->stack + STACK - (16 << 10), 16 << 10); // what fiber() and leave() left there
#endif
        // Stacks begin at different places in their pages, or they would all want the same lines of the cache.
        prepare(to->context, to->stack, STACK - to->number % 32 * 128, fiber);
    }
    current = to == &host ? nullptr : to;
#ifdef CUDACPU_ASAN
    from_host = me == nullptr;
    __sanitizer_start_switch_fiber(me && me->state == ENDED ? nullptr : me ? &me->fake : &host.fake, to->stack,
                                   to == &host ? host_stack : STACK);
#endif
    go(me ? me->context : host.context, to->context);
#ifdef CUDACPU_ASAN
    __sanitizer_finish_switch_fiber(me ? me->fake : host.fake, nullptr, nullptr);
#endif
}

// The current thread waits; whoever it waits for puts it into `coming`.
inline void Machine::wait(State state, const char *what, const char *file, int line) {
    Thread *me = current;
    me->state = state, me->what = what, me->file = file, me->line = line;
    leave(next());
}

[[noreturn]] inline void never_comes(Thread *waiting, Thread *missing) {
    current = waiting;
    const char *barrier = "a barrier that";
    char call[100];
    if (waiting->state == IN_WARP)
        snprintf(call, sizeof(call), "%s with", waiting->what);
    if (missing->state == ENDED)
        fail("waits at %s:%d for %s " CUDACPU_THREAD " never reaches", waiting->file, waiting->line,
             waiting->state == IN_WARP ? call : barrier, CUDACPU_XYZ(missing->index));
    fail("waits at %s:%d for %s " CUDACPU_THREAD " never reaches, which waits at %s:%d for %s", waiting->file, waiting->line,
         waiting->state == IN_WARP ? call : barrier, CUDACPU_XYZ(missing->index), missing->file, missing->line,
         missing->state == IN_WARP ? missing->what : "a barrier");
}

// Nobody can run, and not all have ended: at least one waits in a warp call, for somebody at a barrier or in another call.
inline void Machine::stuck() {
    for (unsigned w = 0; w * 32 < size; w++) {
        for (Call &call : calls[w]) {
            unsigned first = __builtin_ctz(call.here), missing = __builtin_ctz(call.mask & ~call.here);
            never_comes(&thread[w * 32 + first], &thread[w * 32 + missing]);
        }
    }
    fail("threads wait for each other");
}

// What runs on a fiber's stack. A thread that ends hands its stack to the next one, if that is a new one.
inline void fiber() {
    Machine *m = machine;
#ifdef CUDACPU_ASAN
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (m->from_host)
        m->host.stack = (char *)bottom, m->host_stack = bytes;
#endif
    for (;;) {
        Thread *me = current;
        m->grid->thread();
        if (!me->copies.empty())
            fail("ends without having waited for its copies (cp.async)");
        me->state = ENDED;
        m->ended++;
        m->last_ended = me;
        if (m->at_barrier)
            never_comes(m->first_at_barrier, me);
        for (Call &call : m->calls[me->number / 32]) {
            if (call.mask >> me->number % 32 & 1)
                never_comes(&m->thread[me->number / 32 * 32 + __builtin_ctz(call.here)], me);
        }
        Thread *next = m->next();
        if (next && next->state == NEW) {
            next->stack = me->stack;
            next->state = READY;
            current = next;
        } else {
            m->stacks.push_back(me->stack);
            m->leave(next);
        }
    }
}

inline void Machine::run(const Grid *g, size_t number) {
    grid = g;
    dim3 n = g->grid, b = g->block;
    block = {(unsigned)(number % n.x), (unsigned)(number / n.x % n.y), (unsigned)(number / n.x / n.y)};
    size = b.x * b.y * b.z;
    random = Random(seed(), g->number, number);
    ready.clear();
    coming.clear();
    next_ready = ended = at_barrier = 0;
    for (unsigned i = 0; i < size; i++) {
        Thread &t = thread[i];
        t.index = {i % b.x, i / b.x % b.y, i / b.x / b.y};
        t.state = NEW;
        t.batch = 0;
        coming.push_back(&t);
    }
    leave(next());
    end_shared();
}

inline void barrier(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
    Machine *m = machine;
    Thread *me = current, *first = m->first_at_barrier;
    if (m->at_barrier++ == 0)
        m->first_at_barrier = first = me;
    else if (first->line != line || strcmp(first->file, file))
        fail("is at the barrier at %s:%d while " CUDACPU_THREAD " waits at the one at %s:%d", file, line, CUDACPU_XYZ(first->index),
             first->file, first->line);
    me->file = file, me->line = line, me->state = AT_BARRIER;
    if (m->ended)
        never_comes(me, m->last_ended);
    if (m->at_barrier < m->size)
        return m->wait(AT_BARRIER, "__syncthreads", file, line);
    m->at_barrier = 0;
    for (unsigned i = 0; i < m->size; i++) {
        m->thread[i].state = READY;
        if (&m->thread[i] != me)
            m->coming.push_back(&m->thread[i]);
    }
}

// One call of the lanes in mask, each with its own `mine`; all(lanes, mask) does what they do together.
template <class Mine, class All>
void together(unsigned mask, Mine &mine, const char *what, const char *file, int line, All all) {
    Machine *m = machine;
    Thread *me = current;
    unsigned lane = me->number % 32, warp = me->number / 32;
    if (m->size - warp * 32 < 32)
        mask &= (1u << (m->size - warp * 32)) - 1;
    if (!(mask >> lane & 1))
        fail("%s:%d: %s: lane %u is not in its own mask %08x", file, line, what, lane, mask);
    std::vector<Call> &calls = m->calls[warp];
    Call *call = nullptr;
    for (Call &c : calls) {
        if (c.mask == mask)
            call = &c;
    }
    if (!call) {
        calls.push_back({mask, 0, what, sizeof(Mine), {}});
        call = &calls.back();
    }
    me->file = file, me->line = line, me->state = IN_WARP, me->what = what;
    if (call->what != what && strcmp(call->what, what))
        never_comes(&m->thread[warp * 32 + __builtin_ctz(call->here)], me);
    call->lane[lane] = &mine;
    call->here |= 1u << lane;
    if (m->ended) {
        for (unsigned i = 0; i < 32; i++) {
            if (mask >> i & 1 && m->thread[warp * 32 + i].state == ENDED)
                never_comes(me, &m->thread[warp * 32 + i]);
        }
    }
    if (call->here != mask)
        return m->wait(IN_WARP, what, file, line);
    Mine *lanes[32];
    for (int i = 0; i < 32; i++)
        lanes[i] = (Mine *)call->lane[i];
    *call = calls.back();
    calls.pop_back();
    for (unsigned i = 0; i < 32; i++) {
        if (mask >> i & 1) {
            m->thread[warp * 32 + i].state = READY;
            if (i != lane)
                m->coming.push_back(&m->thread[warp * 32 + i]);
        }
    }
    all(lanes, mask);
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. Shared memory: allocated for a block when a thread first comes by, between guards (or AddressSanitizer's red zones),
// and aligned as its type wants, but no better: what needs more must say __align__.

inline char *Machine::share(const char *function, int line, size_t n, size_t align) {
    for (Variable &v : shared) {
        if (v.line == line && v.function == function)
            return v.data;
    }
    shared_size += n;
    if (shared_size > SHARED_OPTIN || (function && n > SHARED_LIMIT))
        fail("a block needs %zu bytes of shared memory", shared_size);
    Variable v = {function, line, nullptr, nullptr, n};
#ifdef CUDACPU_ASAN
    if (posix_memalign((void **)&v.memory, std::max<size_t>(16, 2 * align), n + align) != 0)
        fail("no memory");
    v.data = v.memory + align;
    poison(v.data, n);
    __asan_poison_memory_region(v.memory, align);
#else
    uintptr_t data = ((uintptr_t)arena_end + GUARD + 2 * align - 1) / (2 * align) * (2 * align) + align;
    v.memory = (char *)data - GUARD;
    v.data = (char *)data;
    arena_end = v.data + n + GUARD;
    if (arena_end > arena + SHARED_OPTIN + (64 << 10))
        fail("too many variables in shared memory");
    poison(v.memory, n + 2 * GUARD);
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
        if (!poisoned(v.data - GUARD, GUARD) || !poisoned(v.data + v.size, GUARD)) {
            char name[40];
            snprintf(name, sizeof(name), "of line %d", v.line);
            fail("block (%u,%u,%u) wrote %s the shared memory %s", CUDACPU_XYZ(block),
                 poisoned(v.data - GUARD, GUARD) ? "past the end of" : "before the beginning of",
                 v.function ? name : "that is dynamic");
        }
#endif
    }
    shared.clear();
    shared_size = 0;
    arena_end = arena;
}

template <class T, size_t align = alignof(T)> T &shared(int line, const char *function) {
    return *(T *)(void *)machine->share(function, line, sizeof(T), align);
}

template <class T> T *dynamic_shared() {
    return (T *)(void *)machine->share(nullptr, 0, machine->grid->dynamic, 16);
}

inline void Machine::must_be_shared(const void *p, const char *what) {
    for (Variable &v : shared) {
        if (p >= v.data && (char *)p + 16 <= v.data + v.size) {
            if ((uintptr_t)p % 16)
                fail("%s: address %p is not a multiple of 16", what, p);
            return;
        }
    }
    fail("%s: 16 bytes at %p are not in shared memory", what, p);
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. What stops a kernel: traps and wild addresses

// Where in the source an instruction is, if there is an addr2line.
inline void print_source(void *address) {
    FILE *maps = fopen("/proc/self/maps", "r");
    unsigned long low, high, offset, base = 0;
    char line[600], path[400], exe[400], number[40];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof(exe) - 1);
    exe[n < 0 ? 0 : n] = 0;
    bool found = false;
    while (maps && !found && fgets(line, sizeof(line), maps)) {
        if (sscanf(line, "%lx-%lx %*s %lx %*s %*s %399s", &low, &high, &offset, path) == 4 && !strcmp(path, exe)) {
            if (offset == 0)
                base = low;
            found = (unsigned long)address >= low && (unsigned long)address < high;
        }
    }
    if (!found)
        return;
    unsigned long at = (unsigned long)address - (base >= 0x10000000 ? base : 0); // what is not at a fixed place
    snprintf(number, sizeof(number), "%lx", at);
    fflush(stderr);
    pid_t child = fork();
    if (child == 0) {
        dup2(2, 1);
        execlp("addr2line", "addr2line", "-i", "-p", "-f", "-s", "-C", "-e", exe, number, (char *)nullptr);
        _exit(1);
    }
    waitpid(child, nullptr, 0);
}

inline void trap(int signal, siginfo_t *info, void *) {
    char *at = (char *)info->si_addr;
    if (signal == SIGFPE)
        print_source(at);
    if (signal == SIGFPE && info->si_code == FPE_INTDIV)
        fail("integer division by zero");
    if (signal == SIGFPE)
        fail("an uninitialised or invalid number was used (floating-point exception)");
    if (current && at >= current->stack - PAGE && at < current->stack)
        fail("too many local variables: the fiber's stack is full");
    fail("wild address %p", (void *)at);
}

// While one of these lives, this thread of the system traps FE_INVALID.
struct Traps {
    fenv_t before;
    Traps(const char *name) {
        kernel = name;
        fegetenv(&before);
#ifdef __GLIBC__
        feclearexcept(FE_ALL_EXCEPT);
        feenableexcept(FE_INVALID);
#endif
    }
    ~Traps() {
        fesetenv(&before);
        kernel = nullptr;
    }
};

inline void print_sanitized() { // at the end of a sanitizer's report
    char text[500];
    if (print_place(text, sizeof(text)) > 0)
        fprintf(stderr, "%s that was what AddressSanitizer or UBSan says above\n", text);
}

// And these catch the signals, for the whole process.
struct Handlers {
    struct sigaction before[3];
    static constexpr int signals[3] = {SIGFPE, SIGSEGV, SIGBUS};
    Handlers() {
        struct sigaction ours = {};
        ours.sa_sigaction = trap;
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
#ifdef CUDACPU_ASAN
        __sanitizer_set_death_callback(print_sanitized);
        sigaction(SIGFPE, &ours, &before[0]); // it reports the others better itself
#else
        for (int i = 0; i < 3; i++)
            sigaction(signals[i], &ours, &before[i]);
#endif
    }
    ~Handlers() {
#ifdef CUDACPU_ASAN
        sigaction(SIGFPE, &before[0], nullptr);
#else
        for (int i = 0; i < 3; i++)
            sigaction(signals[i], &before[i], nullptr);
#endif
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// 7. A grid

// Threads of the system that may share the work. A forked child has none of its parent's, which OpenMP does not know.
inline int workers() {
#ifdef _OPENMP
    static const pid_t home = getpid();
    return getpid() == home && !omp_in_parallel() ? omp_get_max_threads() : 1;
#else
    return 1;
#endif
}

inline void run_grid(const Grid &g) {
    size_t n = (size_t)g.grid.x * g.grid.y * g.grid.z;
    std::vector<unsigned> order(n);
    for (size_t i = 0; i < n; i++)
        order[i] = (unsigned)i;
    Random(seed(), g.number, ~0ull).shuffle(order.data(), n);
    Handlers handlers;
    int threads = (int)std::min<size_t>(n, workers());
    (void)threads;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
    {
        static std::vector<Machine *> all; // none is ever freed, and leaks are looked for
        if (!machine) {
#ifdef _OPENMP
#pragma omp critical(cudacpu)
#endif
            all.push_back(machine = new Machine());
        }
        Traps traps(g.name);
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
        for (size_t i = 0; i < n; i++)
            machine->run(&g, order[i]);
    }
}

} // namespace cudacpu

// ---------------------------------------------------------------------------------------------------------------------
// 8. The runtime: errors, streams and events, memory

enum cudaError_t {
    cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidPitchValue = 12, cudaErrorInvalidDevice = 101, cudaErrorInvalidResourceHandle = 400, cudaErrorNotReady = 600,
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault
};
enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock, maxThreadsPerMultiProcessor, regsPerBlock, l2CacheSize;
};

namespace cudacpu {

inline cudaError_t last_error = cudaSuccess;
inline cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess)
        last_error = error;
    return error;
}

struct Event {
    unsigned recorded = 0, done = 0; // how often it was, in the host's time and in the device's
    bool timed = true;
    std::chrono::steady_clock::time_point when;
};

struct Task {
    std::function<void()> run;
    Event *event; // what it waits for, and the how manieth time
    unsigned count;
};

struct Stream {
    std::deque<Task> tasks;
    bool blocking = true; // it and the null stream wait for each other
};

inline Stream null_stream;
inline std::vector<Stream *> streams{&null_stream};

// Runs what waits in the streams, the next one of a stream at random, until `enough`.
template <class Enough> void run_tasks(Enough enough) {
    static Random random(seed(), 0, 0);
    while (!enough()) {
        Stream *able[1000];
        unsigned n = 0;
        for (Stream *s : streams) {
            if (!s->tasks.empty() && n < 1000 && (!s->tasks[0].event || s->tasks[0].event->done >= s->tasks[0].count))
                able[n++] = s;
        }
        Stream *s = able[random.below(n)];
        std::function<void()> run = std::move(s->tasks[0].run);
        s->tasks.pop_front();
        if (run)
            run();
    }
}

inline void run_stream(Stream *s) {
    run_tasks([s] { return s->tasks.empty(); });
}
inline void run_all(bool only_blocking = false) {
    for (Stream *s : streams) {
        if (s->blocking || !only_blocking)
            run_stream(s);
    }
}

inline void enqueue(Stream *s, std::function<void()> run, Event *event = nullptr, unsigned count = 0) {
    s = s ? s : &null_stream;
    if (s == &null_stream) {
        for (Stream *other : streams) {
            if (other != s && other->blocking)
                run_stream(other);
        }
    } else if (s->blocking) {
        run_stream(&null_stream);
    }
    s->tasks.push_back({std::move(run), event, count});
    if (s->tasks.size() > 10000)
        run_stream(s);
}

// Device memory. Without AddressSanitizer it has guards on both sides.
#ifdef CUDACPU_ASAN
const size_t FRONT = 0, BACK = 0;
#else
const size_t FRONT = 256, BACK = GUARD;
#endif
inline std::map<char *, size_t> memory;
inline size_t memory_used = 0;
inline size_t memory_size() {
    static const size_t size = (size_t)environment("CUDACPU_MEMORY", 4096) << 20;
    return size;
}

inline void check_guards(char *p, size_t n) {
    (void)p, (void)n;
#ifndef CUDACPU_ASAN
    if (!poisoned(p - GUARD, GUARD) || !poisoned(p + n, GUARD))
        fail("a kernel before this wrote %s the %zu bytes of device memory at %p",
             poisoned(p - GUARD, GUARD) ? "past the end of" : "before the beginning of", n, (void *)p);
#endif
}

inline void check_memory() {
    for (auto &[p, n] : memory)
        check_guards(p, n);
}

inline bool on_device(const void *p, size_t n) {
    auto after = memory.upper_bound((char *)p);
    return after != memory.begin() && (--after, (char *)p + n <= after->first + after->second);
}

inline bool touches_device(const void *p) {
    return on_device(p, 1);
}

inline cudaError_t copy(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind,
                        Stream *stream) {
    if (width == 0 || height == 0)
        return cudaSuccess;
    size_t to_size = (height - 1) * to_pitch + width, from_size = (height - 1) * from_pitch + width;
    if (to_pitch < width || from_pitch < width)
        return result(cudaErrorInvalidPitchValue);
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind != cudaMemcpyDefault && (to_device != touches_device(to) || from_device != touches_device(from)))
        return result(cudaErrorInvalidValue);
    if ((to_device && !on_device(to, to_size)) || (from_device && !on_device(from, from_size)))
        return result(cudaErrorInvalidValue);
    enqueue(stream, [=] {
        for (size_t i = 0; i < height; i++)
            memmove((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
    });
    return cudaSuccess;
}

inline std::map<void *, size_t> dynamic_limits; // of kernels that have asked for more than SHARED_LIMIT

} // namespace cudacpu

typedef cudacpu::Stream *cudaStream_t;
typedef cudacpu::Event *cudaEvent_t;

inline const char *cudaGetErrorName(cudaError_t e) {
    return e == cudaSuccess                     ? "cudaSuccess"
           : e == cudaErrorInvalidValue         ? "cudaErrorInvalidValue"
           : e == cudaErrorMemoryAllocation     ? "cudaErrorMemoryAllocation"
           : e == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration"
           : e == cudaErrorInvalidPitchValue    ? "cudaErrorInvalidPitchValue"
           : e == cudaErrorInvalidDevice        ? "cudaErrorInvalidDevice"
           : e == cudaErrorNotReady             ? "cudaErrorNotReady"
                                                : "cudaErrorInvalidResourceHandle";
}
inline const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaSuccess                     ? "no error"
           : e == cudaErrorInvalidValue         ? "invalid argument"
           : e == cudaErrorMemoryAllocation     ? "out of memory"
           : e == cudaErrorInvalidConfiguration ? "invalid configuration argument"
           : e == cudaErrorInvalidPitchValue    ? "invalid pitch argument"
           : e == cudaErrorInvalidDevice        ? "invalid device ordinal"
           : e == cudaErrorNotReady             ? "device not ready"
                                                : "invalid resource handle";
}
inline cudaError_t cudaPeekAtLastError() {
    return cudacpu::last_error;
}
inline cudaError_t cudaGetLastError() {
    cudaError_t e = cudacpu::last_error;
    cudacpu::last_error = cudaSuccess;
    return e;
}

inline cudaError_t cudaGetDeviceCount(int *n) {
    *n = 1;
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    return cudacpu::result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof(*p));
    strcpy(p->name, "CUDA emulated on the CPU");
    p->totalGlobalMem = cudacpu::memory_size();
    p->sharedMemPerBlock = cudacpu::SHARED_LIMIT;
    p->sharedMemPerBlockOptin = cudacpu::SHARED_OPTIN;
    p->sharedMemPerMultiprocessor = 228 << 10;
    p->major = 9, p->minor = 0;
    p->multiProcessorCount = 2;
    p->warpSize = 32;
    p->maxThreadsPerBlock = cudacpu::MAX_THREADS;
    p->maxThreadsPerMultiProcessor = 2048;
    p->regsPerBlock = 65536;
    p->l2CacheSize = 1 << 20;
    return cudacpu::result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
inline cudaError_t cudaDeviceSynchronize() {
    cudacpu::run_all();
    cudacpu::check_memory();
    return cudaSuccess;
}
template <class Kernel> cudaError_t cudaFuncSetAttribute(Kernel *kernel, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        if (value < 0 || (size_t)value > cudacpu::SHARED_OPTIN)
            return cudacpu::result(cudaErrorInvalidValue);
        cudacpu::dynamic_limits[(void *)kernel] = value;
    }
    return cudaSuccess;
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    *stream = new cudacpu::Stream;
    (*stream)->blocking = flags != cudaStreamNonBlocking;
    cudacpu::streams.push_back(*stream);
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (stream)
        cudacpu::run_stream(stream);
    else
        cudacpu::run_all(true);
    return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (!stream)
        return cudacpu::result(cudaErrorInvalidResourceHandle);
    cudacpu::run_stream(stream);
    cudacpu::streams.erase(std::find(cudacpu::streams.begin(), cudacpu::streams.end(), stream));
    delete stream;
    return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned = 0) {
    cudacpu::enqueue(stream, nullptr, event, event->recorded);
    return cudaSuccess;
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = new cudacpu::Event;
    (*event)->timed = !(flags & cudaEventDisableTiming);
    return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t *event) {
    return cudaEventCreateWithFlags(event, cudaEventDefault);
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr) {
    unsigned count = ++event->recorded;
    cudacpu::enqueue(stream, [=] {
        event->done = std::max(event->done, count);
        event->when = std::chrono::steady_clock::now();
    });
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    unsigned count = event->recorded;
    cudacpu::run_tasks([=] { return event->done >= count; });
    return cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
    return event->done == event->recorded ? cudaSuccess : cudacpu::result(cudaErrorNotReady);
}
inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    if (!from->timed || !to->timed || !from->recorded || !to->recorded)
        return cudacpu::result(cudaErrorInvalidResourceHandle);
    if (from->done < from->recorded || to->done < to->recorded)
        return cudacpu::result(cudaErrorNotReady);
    *ms = std::chrono::duration<float, std::milli>(to->when - from->when).count();
    return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    cudacpu::run_all(); // whatever names it
    delete event;
    return cudaSuccess;
}

inline cudaError_t cudaMalloc(void **p, size_t n) {
    *p = nullptr;
    if (n == 0)
        return cudaSuccess;
    char *base = nullptr;
    if (n > cudacpu::memory_size() - cudacpu::memory_used ||
        posix_memalign((void **)&base, 256, cudacpu::FRONT + n + cudacpu::BACK) != 0)
        return cudacpu::result(cudaErrorMemoryAllocation);
    cudacpu::poison(base, cudacpu::FRONT + n + cudacpu::BACK);
    cudacpu::memory[base + cudacpu::FRONT] = n;
    cudacpu::memory_used += n;
    *p = base + cudacpu::FRONT;
    return cudaSuccess;
}
template <class T> cudaError_t cudaMalloc(T **p, size_t n) {
    return cudaMalloc((void **)(void *)p, n);
}
inline cudaError_t cudaFree(void *p) {
    cudacpu::run_all();
    auto found = cudacpu::memory.find((char *)p);
    if (!p)
        return cudaSuccess;
    if (found == cudacpu::memory.end())
        return cudacpu::result(cudaErrorInvalidValue);
    cudacpu::check_guards(found->first, found->second);
    cudacpu::poison(p, found->second);
    cudacpu::memory_used -= found->second;
    cudacpu::memory.erase(found);
    free((char *)p - cudacpu::FRONT);
    return cudaSuccess;
}
inline cudaError_t cudaMallocHost(void **p, size_t n, unsigned = 0) {
    return posix_memalign(p, 256, n) == 0 ? cudaSuccess : cudacpu::result(cudaErrorMemoryAllocation);
}
template <class T> cudaError_t cudaMallocHost(T **p, size_t n, unsigned = 0) {
    return cudaMallocHost((void **)(void *)p, n);
}
inline cudaError_t cudaFreeHost(void *p) {
    cudacpu::run_all();
    free(p);
    return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = cudacpu::memory_size();
    *available = *total - cudacpu::memory_used;
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind, cudaStream_t stream = nullptr) {
    return cudacpu::copy(to, n, from, n, n, 1, kind, stream);
}
inline cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                                     cudaMemcpyKind kind, cudaStream_t stream = nullptr) {
    return cudacpu::copy(to, to_pitch, from, from_pitch, width, height, kind, stream);
}
inline cudaError_t cudaMemcpy(void *to, const void *from, size_t n, cudaMemcpyKind kind) {
    cudaError_t e = cudaMemcpyAsync(to, from, n, kind, nullptr);
    cudacpu::run_all(true);
    return e;
}
inline cudaError_t cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t stream = nullptr) {
    if (n && !cudacpu::on_device(p, n))
        return cudacpu::result(cudaErrorInvalidValue);
    if (n)
        cudacpu::enqueue(stream, [=] { memset(p, value, n); });
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void *p, int value, size_t n) {
    return cudaMemsetAsync(p, value, n, nullptr);
}

namespace cudacpu {

// launch("name", name, grid, block, shared, stream)(arguments...): the arguments become the kernel's types at once.
template <class... P> struct Launch {
    const char *name;
    void (*kernel)(P...);
    dim3 grid, block;
    size_t dynamic;
    Stream *stream;

    void operator()(P... arguments) const {
        size_t threads = (size_t)block.x * block.y * block.z;
        if (threads == 0 || threads > MAX_THREADS || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
            grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
            result(cudaErrorInvalidConfiguration);
            return;
        }
        auto limit = dynamic_limits.find((void *)kernel);
        if (dynamic > std::max(SHARED_LIMIT, limit == dynamic_limits.end() ? 0 : limit->second)) {
            result(cudaErrorInvalidValue);
            return;
        }
        static uint64_t launches = 0;
        std::tuple<P...> kept(arguments...);
        Grid g{name, ++launches, grid, block, dynamic, [kernel = kernel, kept] { std::apply(kernel, kept); }};
        enqueue(stream, [g] { run_grid(g); });
    }
};
template <class... P>
Launch<P...> launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic = 0, Stream *stream = nullptr) {
    return {name, kernel, grid, block, dynamic, stream};
}

} // namespace cudacpu

// ---------------------------------------------------------------------------------------------------------------------
// 9. What a kernel can call

inline void __syncthreads(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
    cudacpu::barrier(file, line);
}

#define CUDACPU_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace cudacpu {

template <class T> struct Shuffle {
    T value, result;
    int from; // lane
};

template <class T> T shuffle(unsigned mask, T value, int from, const char *what, const char *file, int line) {
    Shuffle<T> mine{value, value, from};
    together(mask, mine, what, file, line, [=](Shuffle<T> **lane, unsigned mask) {
        for (int i = 0; i < 32; i++) {
            if (!(mask >> i & 1))
                continue;
            if (!(mask >> lane[i]->from & 1))
                fail("%s:%d: %s: lane %d reads from lane %d, which is not in the mask %08x", file, line, what, i, lane[i]->from, mask);
            lane[i]->result = lane[lane[i]->from]->value;
        }
    });
    return mine.result;
}

// all(values of the lanes in mask, in order, how many) for every lane.
template <class T, class R, class All> R reduce(unsigned mask, T value, const char *what, const char *file, int line, All all) {
    struct Mine {
        T value;
        R result;
    } mine{value, R()};
    together(mask, mine, what, file, line, [=](Mine **lane, unsigned mask) {
        for (int i = 0; i < 32; i++) {
            if (mask >> i & 1) {
                R result = R();
                bool first = true;
                for (int j = 0; j < 32; j++) {
                    if (mask >> j & 1) {
                        all(result, lane[i]->value, lane[j]->value, j, first);
                        first = false;
                    }
                }
                lane[i]->result = result;
            }
        }
    });
    return mine.result;
}

inline int lane() {
    return current->number % 32;
}

} // namespace cudacpu

template <class T> T __shfl_sync(unsigned mask, T x, int from, int width = 32, CUDACPU_WHERE) {
    return cudacpu::shuffle(mask, x, (cudacpu::lane() & ~(width - 1)) | (from & (width - 1)), "__shfl_sync", file, line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32, CUDACPU_WHERE) {
    int lane = cudacpu::lane(), from = lane ^ bits;
    return cudacpu::shuffle(mask, x, from <= (lane | (width - 1)) ? from : lane, "__shfl_xor_sync", file, line);
}
template <class T> T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32, CUDACPU_WHERE) {
    int lane = cudacpu::lane();
    return cudacpu::shuffle(mask, x, (unsigned)(lane & (width - 1)) < by ? lane : lane - (int)by, "__shfl_up_sync", file, line);
}
template <class T> T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32, CUDACPU_WHERE) {
    int lane = cudacpu::lane();
    return cudacpu::shuffle(mask, x, (lane & (width - 1)) + by >= (unsigned)width ? lane : lane + (int)by, "__shfl_down_sync", file, line);
}
inline void __syncwarp(unsigned mask = 0xffffffff, CUDACPU_WHERE) {
    int nothing = 0;
    cudacpu::together(mask, nothing, "__syncwarp", file, line, [](int **, unsigned) {});
}
inline unsigned __ballot_sync(unsigned mask, int x, CUDACPU_WHERE) {
    return cudacpu::reduce<bool, unsigned>(mask, x != 0, "__ballot_sync", file, line,
                                           [](unsigned &r, bool, bool other, int i, bool) { r |= (unsigned)other << i; });
}
inline int __any_sync(unsigned mask, int x, CUDACPU_WHERE) {
    return cudacpu::reduce<bool, int>(mask, x != 0, "__any_sync", file, line, [](int &r, bool, bool other, int, bool) { r |= other; });
}
inline int __all_sync(unsigned mask, int x, CUDACPU_WHERE) {
    return !cudacpu::reduce<bool, int>(mask, x != 0, "__all_sync", file, line, [](int &r, bool, bool other, int, bool) { r |= !other; });
}
template <class T> unsigned __match_any_sync(unsigned mask, T x, CUDACPU_WHERE) {
    return cudacpu::reduce<T, unsigned>(mask, x, "__match_any_sync", file, line,
                                        [](unsigned &r, T mine, T other, int i, bool) { r |= (unsigned)(mine == other) << i; });
}
template <class T> T __reduce_add_sync(unsigned mask, T x, CUDACPU_WHERE) {
    return (T)cudacpu::reduce<unsigned, unsigned>(mask, x, "__reduce_add_sync", file, line,
                                                  [](unsigned &r, unsigned, unsigned other, int, bool) { r += other; });
}
template <class T> T __reduce_max_sync(unsigned mask, T x, CUDACPU_WHERE) {
    return cudacpu::reduce<T, T>(mask, x, "__reduce_max_sync", file, line,
                                 [](T &r, T, T other, int, bool first) { r = first || other > r ? other : r; });
}
template <class T> T __reduce_min_sync(unsigned mask, T x, CUDACPU_WHERE) {
    return cudacpu::reduce<T, T>(mask, x, "__reduce_min_sync", file, line,
                                 [](T &r, T, T other, int, bool first) { r = first || other < r ? other : r; });
}

// Atomics of integers alone: those of floats would make sums depend on the order.
#define CUDACPU_ATOMICS(T)                                                                                              \
    inline T atomicAdd(T *p, T x) { return __atomic_fetch_add(p, x, __ATOMIC_RELAXED); }                                \
    inline T atomicOr(T *p, T x) { return __atomic_fetch_or(p, x, __ATOMIC_RELAXED); }                                  \
    inline T atomicExch(T *p, T x) { return __atomic_exchange_n(p, x, __ATOMIC_RELAXED); }                              \
    inline T atomicCAS(T *p, T expected, T x) {                                                                         \
        __atomic_compare_exchange_n(p, &expected, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);                        \
        return expected;                                                                                                \
    }                                                                                                                   \
    inline T atomicMax(T *p, T x) {                                                                                     \
        T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                                   \
        while (old < x && !__atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}       \
        return old;                                                                                                     \
    }                                                                                                                   \
    inline T atomicMin(T *p, T x) {                                                                                     \
        T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                                   \
        while (old > x && !__atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}       \
        return old;                                                                                                     \
    }
CUDACPU_ATOMICS(int)
CUDACPU_ATOMICS(unsigned)
CUDACPU_ATOMICS(unsigned long long)
#undef CUDACPU_ATOMICS

#define CUDACPU_MIN_MAX(T)                                                                                              \
    inline T min(T a, T b) { return b < a ? b : a; }                                                                    \
    inline T max(T a, T b) { return a < b ? b : a; }
CUDACPU_MIN_MAX(int)
CUDACPU_MIN_MAX(unsigned)
CUDACPU_MIN_MAX(long)
CUDACPU_MIN_MAX(unsigned long)
CUDACPU_MIN_MAX(long long)
CUDACPU_MIN_MAX(unsigned long long)
#undef CUDACPU_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

namespace cudacpu {
template <class To, class From> To bits(From x) {
    To to;
    static_assert(sizeof(To) == sizeof(From), "");
    memcpy(&to, &x, sizeof(to));
    return to;
}
inline float reciprocal_root(float x) { return 1 / sqrtf(x); }
inline float quotient(float a, float b) { return a / b; }
} // namespace cudacpu

template <class T> T __ldg(const T *p) { return *p; }
inline unsigned __float_as_uint(float x) { return cudacpu::bits<unsigned>(x); }
inline int __float_as_int(float x) { return cudacpu::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return cudacpu::bits<float>(x); }
inline float __int_as_float(int x) { return cudacpu::bits<float>(x); }
inline long long __double_as_longlong(double x) { return cudacpu::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return cudacpu::bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __threadfence(); }
inline long long clock64() { return std::chrono::steady_clock::now().time_since_epoch().count(); }
// The C library has, or will have, these names for itself.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __fdividef(a, b) cudacpu::quotient(a, b)
#define rsqrtf(x) cudacpu::reciprocal_root(x)

// ---------------------------------------------------------------------------------------------------------------------
// 10. Instructions that CUDA C++ has no word for, as the PTX ISA describes them

namespace cudacpu {

struct Rows {
    unsigned *r;
    const void *row;
};

inline void ldmatrix(unsigned *r, const void *row, bool transposed, const char *what, const char *file, int line) {
    Rows mine{r, row};
    machine->must_be_shared(row, what);
    together(0xffffffff, mine, what, file, line, [=](Rows **lane, unsigned) {
        for (int i = 0; i < 4; i++) {
            uint16_t m[8][8];
            for (int j = 0; j < 8; j++)
                memcpy(m[j], lane[8 * i + j]->row, 16);
            for (int l = 0; l < 32; l++) {
                int g = l / 4, t = l % 4;
                lane[l]->r[i] = transposed ? m[2 * t][g] | (unsigned)m[2 * t + 1][g] << 16 : m[g][2 * t] | (unsigned)m[g][2 * t + 1] << 16;
            }
        }
    });
}
inline void ldmatrix_x4(unsigned *r, const void *row, CUDACPU_WHERE) {
    ldmatrix(r, row, false, "ldmatrix", file, line);
}
inline void ldmatrix_x4_trans(unsigned *r, const void *row, CUDACPU_WHERE) {
    ldmatrix(r, row, true, "ldmatrix.trans", file, line);
}

struct Fragments {
    float *d;
    const unsigned *a, *b;
};

inline void mma_m16n8k16(float (&d)[4], const unsigned *a, const unsigned *b, CUDACPU_WHERE) {
    typedef float Row __attribute__((vector_size(32))); // 8 numbers
    Fragments mine{d, a, b};
    together(0xffffffff, mine, "mma", file, line, [](Fragments **lane, unsigned) {
        uint32_t of_a[16][16], of_b[16][8];
        float A[16][16];
        Row B[16], D[16];
        for (int l = 0; l < 32; l++) {
            int g = l / 4, t = l % 4;
            for (int i = 0; i < 4; i++) {
                unsigned pair = lane[l]->a[i];
                of_a[g + i % 2 * 8][2 * t + i / 2 * 8] = pair << 16;
                of_a[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = pair & 0xffff0000;
                D[g + i / 2 * 8][2 * t + i % 2] = lane[l]->d[i];
            }
            for (int i = 0; i < 2; i++) {
                of_b[2 * t + i * 8][g] = lane[l]->b[i] << 16;
                of_b[2 * t + i * 8 + 1][g] = lane[l]->b[i] & 0xffff0000;
            }
        }
        memcpy(A, of_a, sizeof(A));
        memcpy(B, of_b, sizeof(B));
        for (int m = 0; m < 16; m++) {
            for (int k = 0; k < 16; k++)
                D[m] += A[m][k] * B[k];
        }
        for (int l = 0; l < 32; l++) {
            for (int i = 0; i < 4; i++)
                lane[l]->d[i] = D[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
        }
    });
}

// Until a thread waits for a copy, its bytes are poison.
inline void cp_async_16(void *to, const void *from, int n) {
    machine->must_be_shared(to, "cp.async");
    if ((uintptr_t)from % 16)
        fail("cp.async: address %p is not a multiple of 16", from);
    if (n < 0 || n > 16)
        fail("cp.async: %d of 16 bytes", n);
    poison(to, 16);
    current->copies.push_back({to, from, n, current->batch});
}
inline void cp_async_commit() {
    current->batch++;
}
inline void cp_async_wait(int open) {
    std::vector<Copy> &copies = current->copies;
    size_t done = 0;
    for (; done < copies.size() && copies[done].batch + open < current->batch; done++) {
        memcpy(copies[done].to, copies[done].from, copies[done].n);
        memset((char *)copies[done].to + copies[done].n, 0, 16 - copies[done].n);
    }
    copies.erase(copies.begin(), copies.begin() + done);
}

} // namespace cudacpu

#undef CUDACPU_WHERE
#endif
