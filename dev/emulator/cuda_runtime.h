// cuda_runtime.h, the look-alike: as much of the CUDA runtime and of CUDA C++ as train_moe.cu uses, on the CPU, so that
// its kernels are compiled by g++ or clang++ and tested without a GPU. For correctness, never for speed.
//
// rewrite.sed first turns <<<...>>> and __shared__ into calls of what is here. Then a kernel is a plain function, and
//
//   - each thread of a block is a fiber: a stack of its own, which runs until it must wait for others. Blocks, and the
//     threads of a block whenever there is a choice, run in a shuffled order, so that a missing barrier shows;
//   - whoever waits for a thread that never comes ends the program, with the kernel, the block, the thread and the
//   line;
//   - memory that nobody has written is full of signalling NaNs, and a kernel that computes with one, or computes a
//     NaN, is ended too; memory past the end is seen by AddressSanitizer, and without it, later, by guard bytes;
//   - work in a stream is done when something waits for it, so that a host that looks too early, or changes too early
//     what is to be copied, shows as well;
//   - built with g++ -fsanitize=thread, a missing barrier is reported whatever the order was, and so are two blocks
//     that write the same number: race.h, make race_emulated;
//   - launches are counted, and in a build of its own the bytes that each kernel reads and writes: count.h, make
//     count_emulated.
//
// Environment variables:
//   CUDACPU_SEED=n      shuffles differently
//   CUDACPU_MEMORY=n    gives the device n MiB (4096)
//   CUDACPU_SHARED=n    gives a block at most n KiB of shared memory (227; 99 as on a consumer's card)
//   CUDACPU_MANAGED=0   has no memory that device and host share while both work: managed.h
//   CUDACPU_QUEUE=n     lets a stream hold n operations (10,000); a host that starts one more waits, and starts nothing
//                       in other streams meanwhile, which ends in vain if the device waits for that
//   CUDACPU_COUNT=file  writes a table of kernels, launches and bytes at the end
//
// Compile with -ftrapping-math (and clang with -ffp-exception-behavior=maytrap): otherwise compilers compute, and throw
// away, what the program never asked for, and that may be a NaN. machine.h runs the blocks; this file has what programs
// call.
//
// Different here: a race between two streams is only found if an order of the emulator shows it. Static and dynamic shared
// memory that are too large together make a launch fail on a GPU; here they end the program once the kernel runs.

#ifndef CUDACPU_CUDA_RUNTIME_H
#define CUDACPU_CUDA_RUNTIME_H

#include "machine.h"
#include <chrono>
#include <cmath>
#include <deque>
#include <map>
#include <math.h>
#include <sched.h>
#include <tuple>

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
#define CUDART_VERSION 13000

#define threadIdx (cudacpu::current->index)
#define blockIdx  (cudacpu::machine->block)
#define blockDim  (cudacpu::machine->grid->block)
#define gridDim   (cudacpu::machine->grid->grid)

// clang-format off
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
// clang-format on

// ---------------------------------------------------------------------------------------------------------------------
// 2. The runtime: errors, streams and events, memory, launches

#define CUDACPU_ERRORS(ERROR)                                                                                          \
    ERROR(cudaSuccess, 0, "no error")                                                                                  \
    ERROR(cudaErrorInvalidValue, 1, "invalid argument")                                                                \
    ERROR(cudaErrorMemoryAllocation, 2, "out of memory")                                                               \
    ERROR(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                                          \
    ERROR(cudaErrorInvalidPitchValue, 12, "invalid pitch argument")                                                    \
    ERROR(cudaErrorInvalidDevice, 101, "invalid device ordinal")                                                       \
    ERROR(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")                                              \
    ERROR(cudaErrorNotReady, 600, "device not ready")
#define CUDACPU_ENUM(name, number, text) name = number,
#define CUDACPU_NAME(name, number, text) e == name ? #name:
#define CUDACPU_TEXT(name, number, text) e == name ? text:
enum cudaError_t { CUDACPU_ERRORS(CUDACPU_ENUM) };
inline const char *cudaGetErrorName(cudaError_t e) {
    return CUDACPU_ERRORS(CUDACPU_NAME) "unrecognized error code";
}
inline const char *cudaGetErrorString(cudaError_t e) {
    return CUDACPU_ERRORS(CUDACPU_TEXT) "unrecognized error code";
}

enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock, maxThreadsPerMultiProcessor, regsPerBlock,
        l2CacheSize;
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
    std::function<void()> run;  // may be empty
    std::function<bool()> able; // whether its time has come; empty: whenever it is the stream's first
    bool counts = true;         // whether it takes a place in the queue
};

struct Stream {
    std::deque<Task> tasks;
    size_t queued = 0;    // how many tasks count
    bool blocking = true; // it and the null stream wait for each other
};

inline Stream null_stream;
inline std::vector<Stream *> streams{&null_stream};

// Does what is to be done in the streams, each time the next task of one that need not wait, until `enough`. Where all
// wait, it is for other processes (nccl.h).
template <class Enough> void run_tasks(Enough enough) {
    static Random random(seed());
    static unsigned idle = 0; // also from call to call: who asks again and again shall not keep others from working
    while (!enough()) {
        Stream *chosen = nullptr;
        unsigned able = 0;
        for (Stream *s : streams) {
            if (!s->tasks.empty() && (!s->tasks[0].able || s->tasks[0].able()) && random.below(++able) == 0)
                chosen = s;
        }
        if (!chosen) {
            if (idle++ < 100)
                sched_yield();
            else
                usleep(50);
            continue;
        }
        idle = 0;
        Task task = std::move(chosen->tasks[0]);
        chosen->tasks.pop_front();
        chosen->queued -= task.counts;
        if (task.run)
            task.run();
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

// How many operations a stream's queue holds. A host that starts one more waits in the driver, and starts nothing in
// other streams meanwhile: what the device waits for must not be among that.
inline size_t queue_limit = std::max<size_t>(1, environment("CUDACPU_QUEUE", 10000));
inline void wait_for_room(Stream *s) {
    s = s ? s : &null_stream;
    run_tasks([s] { return s->queued < queue_limit; });
}

inline void enqueue(Stream *s, std::function<void()> run, std::function<bool()> able = nullptr, bool counts = true) {
    s = s ? s : &null_stream;
    if (counts)
        wait_for_room(s);
    if (s == &null_stream) {
        for (Stream *other : streams) {
            if (other != s && other->blocking)
                run_stream(other);
        }
    } else if (s->blocking) {
        run_stream(&null_stream);
    }
    s->tasks.push_back({std::move(run), std::move(able), counts});
    s->queued += counts;
}

// Device memory. Without AddressSanitizer it has guards on both sides.
#ifdef CUDACPU_ASAN
const size_t FRONT = 0, BACK = 0;
#else
const size_t FRONT = 256, BACK = GUARD;
#endif
inline char *take_memory(size_t n) { // aligned to 256
#ifdef CUDACPU_BYTES
    return take_counted(n);
#else
    void *p = nullptr;
    return posix_memalign(&p, 256, n) == 0 ? (char *)p : nullptr;
#endif
}
inline void give_back(char *p, size_t n) {
#ifdef CUDACPU_BYTES
    give_counted_back(p, n);
#else
    (void)n;
    free(p);
#endif
}
inline std::map<char *, size_t> memory;
inline size_t memory_used = 0;
inline size_t memory_size() {
    static const size_t size = (size_t)environment("CUDACPU_MEMORY", 4096) << 20;
    return size;
}

inline void check_guards(const char *p, size_t n) {
    const char *where = FRONT ? broken_guard(p, n) : nullptr;
    if (where)
        fail("a kernel before this wrote %s the %zu bytes of device memory at %p", where, n, (const void *)p);
}

inline void check_memory() {
    for (auto &[p, n] : memory)
        check_guards(p, n);
}

inline bool on_device(const void *p, size_t n) {
    auto after = memory.upper_bound((char *)p);
    return after != memory.begin() && (--after, (char *)p + n <= after->first + after->second);
}

inline cudaError_t copy(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                        cudaMemcpyKind kind, Stream *stream) {
    if (width == 0 || height == 0)
        return cudaSuccess;
    size_t to_size = (height - 1) * to_pitch + width, from_size = (height - 1) * from_pitch + width;
    if (to_pitch < width || from_pitch < width)
        return result(cudaErrorInvalidPitchValue);
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind != cudaMemcpyDefault && (to_device != on_device(to, 1) || from_device != on_device(from, 1)))
        return result(cudaErrorInvalidValue);
    if ((to_device && !on_device(to, to_size)) || (from_device && !on_device(from, from_size)))
        return result(cudaErrorInvalidValue);
    enqueue(stream, [=] {
        for (size_t i = 0; i < height; i++)
            memmove((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
        if (count_file()) {
            bool reads = on_device(from, 1), writes = on_device(to, 1);
            count(reads && writes ? "copy on the device" : reads ? "copy to the host" : "copy from the host",
                  reads ? width * height : 0, writes ? width * height : 0);
        }
    });
    return cudaSuccess;
}

inline std::map<void *, size_t> dynamic_limits; // of kernels that have asked for more than SHARED_LIMIT

} // namespace cudacpu

typedef cudacpu::Stream *cudaStream_t;
typedef cudacpu::Event *cudaEvent_t;

#include "managed.h"

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
    p->sharedMemPerBlockOptin = cudacpu::shared_optin;
    p->sharedMemPerMultiprocessor = cudacpu::shared_optin + 1024;
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
        if (value < 0 || (size_t)value > cudacpu::shared_optin)
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
inline cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = *greatest = 0;
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int) {
    return cudaStreamCreateWithFlags(stream, flags);
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
    cudacpu::enqueue(stream, nullptr, [event, count = event->recorded] { return event->done >= count; });
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
// A task is done between two questions. The answer "not ready" is remembered as the last error, and a program that asks
// has to clear it. (The Programming Guide says that cudaGetLastError does not report it; yet PyTorch has had to clear it, in
// pull request 18584, and a program that clears it is right in both cases.)
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
    int asked = 0;
    cudacpu::run_tasks([&] { return event->done >= event->recorded || asked++ > 0; });
    return cudacpu::result(event->done >= event->recorded ? cudaSuccess : cudaErrorNotReady);
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    unsigned count = event->recorded;
    cudacpu::run_tasks([=] { return event->done >= count; });
    return cudaSuccess;
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
    size_t whole = cudacpu::FRONT + n + cudacpu::BACK;
    bool fits = n <= cudacpu::memory_size() - cudacpu::memory_used;
    char *base = fits ? cudacpu::take_memory(whole) : nullptr;
    if (!base)
        return cudacpu::result(cudaErrorMemoryAllocation);
    cudacpu::poison(base, whole);
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
    size_t n = found->second;
    cudacpu::check_guards(found->first, n);
    cudacpu::poison(p, n);
    cudacpu::memory_used -= cudacpu::leave_device(found->first, n);
    cudacpu::memory.erase(found);
    cudacpu::give_back((char *)p - cudacpu::FRONT, cudacpu::FRONT + n + cudacpu::BACK);
    return cudaSuccess;
}
inline cudaError_t cudaMallocHost(void **p, size_t n, unsigned = 0) {
    if (posix_memalign(p, 256, n) != 0)
        return cudacpu::result(cudaErrorMemoryAllocation);
    cudacpu::poison(*p, n);
    return cudaSuccess;
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
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind,
                                   cudaStream_t stream = nullptr) {
    return cudacpu::copy(to, n, from, n, n, 1, kind, stream);
}
inline cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                                     size_t height, cudaMemcpyKind kind, cudaStream_t stream = nullptr) {
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
        cudacpu::enqueue(stream, [=] {
            memset(p, value, n);
            if (cudacpu::count_file())
                cudacpu::count("memset", 0, n);
        });
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void *p, int value, size_t n) {
    return cudaMemsetAsync(p, value, n, nullptr);
}

namespace cudacpu {

inline uint64_t launches = 0;

// launch("name", name, grid, block, shared, stream)(arguments...): the arguments become the kernel's types here and
// now.
template <class... P> struct Launch {
    const char *name;
    void (*kernel)(P...);
    dim3 grid, block;
    size_t dynamic;
    Stream *stream;

    void operator()(P... arguments) const {
        size_t threads = (size_t)block.x * block.y * block.z;
        auto asked = dynamic_limits.find((void *)kernel);
        size_t most = asked == dynamic_limits.end() ? SHARED_LIMIT : std::max(asked->second, SHARED_LIMIT);
        if (threads == 0 || threads > MAX_THREADS || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
            grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
            result(cudaErrorInvalidConfiguration);
        } else if (dynamic > most) {
            result(cudaErrorInvalidValue);
        } else {
            auto call = [kernel = kernel, kept = std::tuple<P...>(arguments...)] { std::apply(kernel, kept); };
            size_t limit = most > SHARED_LIMIT ? shared_optin : SHARED_LIMIT;
            enqueue(stream, [g = Grid{name, ++launches, grid, block, dynamic, limit, call}] { run_grid(g); });
        }
    }
};
template <class... P>
Launch<P...> launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic = 0,
                    Stream *stream = nullptr) {
    return {name, kernel, grid, block, dynamic, stream};
}

} // namespace cudacpu

// ---------------------------------------------------------------------------------------------------------------------
// 3. What a kernel can call

#define CUDACPU_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE() // of the caller

inline void __syncthreads(CUDACPU_WHERE) {
    cudacpu::barrier(file, line);
}

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
                fail("%s:%d: %s: lane %d reads from lane %d, which is not in the mask %08x", file, line, what, i,
                     lane[i]->from, mask);
            lane[i]->result = lane[lane[i]->from]->value;
        }
    });
    return mine.result;
}

// add(result, own value, value of lane j, j) for each lane j in mask, in order, beginning with T's result of `none`.
template <class R, class T, class Add>
R reduce(unsigned mask, R none, T value, const char *what, const char *file, int line, Add add) {
    struct Mine {
        T value;
        R result;
    } mine{value, none};
    together(mask, mine, what, file, line, [=](Mine **lane, unsigned mask) {
        for (int i = 0; i < 32; i++) {
            for (int j = 0; j < 32; j++) {
                if (mask >> i & mask >> j & 1)
                    add(lane[i]->result, lane[i]->value, lane[j]->value, j);
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
    return cudacpu::shuffle(mask, x, (cudacpu::lane() & ~(width - 1)) | (from & (width - 1)), "__shfl_sync", file,
                            line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32, CUDACPU_WHERE) {
    int lane = cudacpu::lane(), from = lane ^ bits;
    return cudacpu::shuffle(mask, x, from <= (lane | (width - 1)) ? from : lane, "__shfl_xor_sync", file, line);
}
template <class T> T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32, CUDACPU_WHERE) {
    int lane = cudacpu::lane();
    return cudacpu::shuffle(mask, x, (unsigned)(lane & (width - 1)) < by ? lane : lane - (int)by, "__shfl_up_sync",
                            file, line);
}
template <class T> T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32, CUDACPU_WHERE) {
    int lane = cudacpu::lane();
    return cudacpu::shuffle(mask, x, (lane & (width - 1)) + by >= (unsigned)width ? lane : lane + (int)by,
                            "__shfl_down_sync", file, line);
}
inline void __syncwarp(unsigned mask = 0xffffffff, CUDACPU_WHERE) {
    int nothing = 0;
    cudacpu::together(mask, nothing, "__syncwarp", file, line, [](int **, unsigned) {}, true);
}
inline unsigned __ballot_sync(unsigned mask, int x, CUDACPU_WHERE) {
    return cudacpu::reduce(mask, 0u, x != 0, "__ballot_sync", file, line,
                           [](unsigned &r, bool, bool x, int j) { r |= (unsigned)x << j; });
}
inline int __any_sync(unsigned mask, int x, CUDACPU_WHERE) {
    return cudacpu::reduce(mask, 0, x != 0, "__any_sync", file, line, [](int &r, bool, bool x, int) { r |= x; });
}
inline int __all_sync(unsigned mask, int x, CUDACPU_WHERE) {
    return cudacpu::reduce(mask, 1, x != 0, "__all_sync", file, line, [](int &r, bool, bool x, int) { r &= x; });
}
template <class T> unsigned __match_any_sync(unsigned mask, T x, CUDACPU_WHERE) {
    return cudacpu::reduce(mask, 0u, x, "__match_any_sync", file, line,
                           [](unsigned &r, T own, T x, int j) { r |= (unsigned)(x == own) << j; });
}
template <class T> T __reduce_add_sync(unsigned mask, T x, CUDACPU_WHERE) {
    return (T)cudacpu::reduce(mask, 0u, (unsigned)x, "__reduce_add_sync", file, line,
                              [](unsigned &r, unsigned, unsigned x, int) { r += x; });
}
template <class T> T __reduce_max_sync(unsigned mask, T x, CUDACPU_WHERE) {
    return cudacpu::reduce(mask, x, x, "__reduce_max_sync", file, line, [](T &r, T, T x, int) { r = std::max(r, x); });
}
template <class T> T __reduce_min_sync(unsigned mask, T x, CUDACPU_WHERE) {
    return cudacpu::reduce(mask, x, x, "__reduce_min_sync", file, line, [](T &r, T, T x, int) { r = std::min(r, x); });
}

// clang-format off
// Atomics of integers alone: those of floats would make sums depend on the order.
#define CUDACPU_ATOMICS(T)                                                                                             \
    inline T atomicAdd(T *p, T x) { return __atomic_fetch_add(p, x, __ATOMIC_RELAXED); }                               \
    inline T atomicOr(T *p, T x) { return __atomic_fetch_or(p, x, __ATOMIC_RELAXED); }                                 \
    inline T atomicExch(T *p, T x) { return __atomic_exchange_n(p, x, __ATOMIC_RELAXED); }                             \
    inline T atomicCAS(T *p, T expected, T x) {                                                                        \
        __atomic_compare_exchange_n(p, &expected, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);                       \
        return expected;                                                                                               \
    }                                                                                                                  \
    inline T atomicMax(T *p, T x) {                                                                                    \
        T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                                  \
        while (old < x && !__atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}      \
        return old;                                                                                                    \
    }                                                                                                                  \
    inline T atomicMin(T *p, T x) {                                                                                    \
        T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                                  \
        while (old > x && !__atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}      \
        return old;                                                                                                    \
    }
CUDACPU_ATOMICS(int)
CUDACPU_ATOMICS(unsigned)
CUDACPU_ATOMICS(unsigned long long)
#undef CUDACPU_ATOMICS

#define CUDACPU_MIN_MAX(T)                                                                                             \
    inline T min(T a, T b) { return b < a ? b : a; }                                                                   \
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
inline void __threadfence() { cudacpu::fence(); }
inline void __threadfence_block() { __threadfence(); }
inline long long clock64() { return std::chrono::steady_clock::now().time_since_epoch().count(); }
// The C library has, or will have, these names for itself.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __fdividef(a, b) cudacpu::quotient(a, b)
#define rsqrtf(x) cudacpu::reciprocal_root(x)
// clang-format on

// ---------------------------------------------------------------------------------------------------------------------
// 4. Instructions that CUDA C++ has no word for, as the PTX ISA describes them

namespace cudacpu {

inline void check_address(const void *p, bool is_shared, const char *what, const char *file, int line) {
    Backstage backstage;
    bool found = !is_shared;
    for (Variable &v : machine->shared)
        found |= p >= v.data && (char *)p + 16 <= v.data + v.size;
    if (!found)
        fail("%s:%d: %s: 16 bytes at %p are not in shared memory", file, line, what, p);
    if ((uintptr_t)p % 16)
        fail("%s:%d: %s: address %p is not a multiple of 16", file, line, what, p);
}

struct Rows {
    unsigned *r;
    const void *row;
};

inline void ldmatrix(unsigned *r, const void *row, bool transposed, const char *what, const char *file, int line) {
    Rows mine{r, row};
    check_address(row, true, what, file, line);
    thread_reads(row, 16);
    together(0xffffffff, mine, what, file, line, [=](Rows **lane, unsigned) {
        for (int i = 0; i < 4; i++) {
            uint16_t m[8][8];
            for (int j = 0; j < 8; j++)
                memcpy(m[j], lane[8 * i + j]->row, 16);
            for (int l = 0; l < 32; l++) {
                int g = l / 4, t = l % 4;
                lane[l]->r[i] = transposed ? m[2 * t][g] | (unsigned)m[2 * t + 1][g] << 16
                                           : m[g][2 * t] | (unsigned)m[g][2 * t + 1] << 16;
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
            Row sum = D[m];
            for (int k = 0; k < 16; k++)
                sum += A[m][k] * B[k];
            D[m] = sum;
        }
        for (int l = 0; l < 32; l++) {
            for (int i = 0; i < 4; i++)
                lane[l]->d[i] = D[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
        }
    });
}

// The bytes come when the thread waits for them; until then poison is in their place.
inline void cp_async_16(void *to, const void *from, int n, CUDACPU_WHERE) {
    check_address(to, true, "cp.async", file, line);
    check_address(from, false, "cp.async", file, line);
    if (n < 0 || n > 16)
        fail("%s:%d: cp.async: %d bytes of 16", file, line, n);
    if (n) // a wild address shows here, not when it waits
        (void)(*(volatile const char *)from + ((volatile const char *)from)[n - 1]);
    thread_reads(from, n);
    thread_writes(to, 16);
    Backstage backstage;
    poison(to, 16);
    current->copies.push_back({to, from, n, current->batch});
}
inline void cp_async_commit() {
    Backstage backstage;
    current->batch++;
}
inline void cp_async_wait(int open) {
    std::vector<Copy> &copies = current->copies;
    size_t done = 0;
    for (; done < copies.size() && copies[done].batch + open < current->batch; done++) {
        thread_reads(copies[done].from, copies[done].n);
        thread_writes(copies[done].to, 16);
        Backstage backstage;
        memcpy(copies[done].to, copies[done].from, copies[done].n);
        memset((char *)copies[done].to + copies[done].n, 0, 16 - copies[done].n);
    }
    Backstage backstage;
    copies.erase(copies.begin(), copies.begin() + done);
}

} // namespace cudacpu

#undef CUDACPU_WHERE
#endif
