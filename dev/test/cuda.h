// What the tests of the CUDA twin share. The Makefile says with TWIN which text of the twin is meant: train_moe.cu, which
// nvcc compiles for a GPU, or what dev/emulator/rewrite.sed makes of it for a C++ compiler. Both have the C twin in them.
// FP32 builds the twin in float32 instead of bfloat16.

#pragma once
#define TRAIN_MOE_NO_MAIN
#ifndef TWIN
#define TWIN "train_moe.cu"
#endif
#include TWIN
#include "dev/test/model.h"

#ifdef FP32
enum { LOW = 0 };
#else
enum { LOW = 1 };
#endif

// The small model of a recipe, in sizes that the device's kernels have: they read eight numbers at a time.
Config device_config(const char *recipe) {
    Config c = small_config(recipe);
    apply_options(&c, "--dim 32 --heads 4 --kv-heads 2 --ffn 16");
    if (c.recurrent) {
        apply_options(&c, "--recurrent 8");
    }
    return c;
}

// The recipes whose routers and mixers the twin has.
int has_kernels(const char *recipe) {
    Config c = small_config(recipe);
    return gpu::router_without_kernels(&c) == NULL && !gpu::mixer_without_kernels(&c);
}

#ifdef __SANITIZE_ADDRESS__ // which sees by itself what goes too far
enum { FENCE = 0 };
#else
enum { FENCE = 256 };
#endif

// ---------------------------------------------------------------------------------------------------------------------
// data/tokenize, the program

// Where the random numbers of these tests begin: SEED, or the same place in every run, so that what fails fails again.
// SEED=new draws one and says which: `make draws` looks so for near-ties and rare cases.
uint64_t fresh(void) {
    static uint64_t seed = 0, turn = 0;
    if (!turn) {
        const char *wish = getenv("SEED");
        int drawn = wish && !strcmp(wish, "new");
        seed = drawn ? (uint64_t)time(NULL) * 1000 + (uint64_t)getpid() % 1000 : wish ? strtoull(wish, NULL, 10) : 1;
        print_message("    SEED=%llu\n", (unsigned long long)seed);
    }
    return hash64(seed + turn++);
}

// Fails where found is further from wanted than tolerance times the size of wanted, taken over all of it.
template <class T> void assert_alike(const char *what, const T *found, const T *wanted, size_t n, double tolerance) {
    double error = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        error += ((double)found[i] - (double)wanted[i]) * ((double)found[i] - (double)wanted[i]);
        size += (double)wanted[i] * (double)wanted[i];
    }
    if (!(sqrt(error) <= tolerance * sqrt(size))) {
        size_t i = 0;
        while (i + 1 < n && fabs((double)found[i] - (double)wanted[i]) <= tolerance * sqrt(size / (double)n))
            i++;
        fail_msg("%s (%zu) is %.3g away from its twin, of %.3g; number %zu is %.9g, not %.9g", what, n, sqrt(error),
                 sqrt(size), i, (double)found[i], (double)wanted[i]);
    }
}

// What a test puts on the device, until free_device(), which ends the test like free_taken(). Before and behind it lies
// a fence of bytes 0xff.
typedef struct OnDevice {
    unsigned char *memory;
    size_t size;
} OnDevice;

OnDevice on_device[4096];
int on_device_count = 0;

// A copy of `bytes` bytes of the host's memory; host NULL: room for so many, never written.
void *device_copy(const void *host, size_t bytes) {
    OnDevice d = {NULL, bytes};
    gpu::start_device();
    assert_true(on_device_count < 4096);
    CHECK(cudaMalloc((void **)&d.memory, bytes + 2 * FENCE + !bytes));
    if (FENCE > 0) {
        CHECK(cudaMemset(d.memory, 0xff, FENCE));
        CHECK(cudaMemset(d.memory + FENCE + bytes, 0xff, FENCE));
    }
    if (host && bytes)
        CHECK(cudaMemcpy(d.memory + FENCE, host, bytes, cudaMemcpyHostToDevice));
#ifndef CUDACPU // which poisons it in its own way
    if (!host)
        CHECK(cudaMemset(d.memory + FENCE, 0xff, bytes));
#endif
    CHECK(cudaDeviceSynchronize());
    on_device[on_device_count++] = d;
    return d.memory + FENCE;
}

// Copies from the device, once all that was started has ended.
void fetch(void *host, const void *device, size_t bytes) {
    CHECK(cudaDeviceSynchronize());
    if (bytes)
        CHECK(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost));
}

void free_device(void) {
    CHECK(cudaDeviceSynchronize());
    while (on_device_count > 0) {
        OnDevice d = on_device[--on_device_count];
        unsigned char fence[2 * FENCE + 1];
        int bad = 0;
        fetch(fence, d.memory, FENCE);
        fetch(fence + FENCE, d.memory + FENCE + d.size, FENCE);
        for (int i = 0; i < 2 * FENCE; i++)
            bad += fence[i] != 0xff;
        CHECK(cudaFree(d.memory));
        if (bad)
            fail_msg("%d bytes were written outside device array %d, of %zu bytes", bad, on_device_count, d.size);
    }
}

// The same for arrays of something.
template <class T> T *on_the_device(const T *host, size_t n) {
    return (T *)device_copy(host, n * sizeof(T));
}

template <class T> T *device_room(size_t n) {
    return (T *)device_copy(NULL, n * sizeof(T));
}

template <class T> T *take_back(const T *device, size_t n) { // until free_taken()
    T *host = (T *)take(n, sizeof(T));
    fetch(host, device, n * sizeof(T));
    return host;
}

// ---------------------------------------------------------------------------------------------------------------------
// The CUDA twin as a whole, beside the C twin
//
// Tolerances are of norms: of what is wanted, |found - wanted| / |wanted|. An fp32 build does the same sums in another
// order, hence 1e-5; what is rounded to bfloat16 on the way is off by 2^-9 each time, hence 2e-2. In bfloat16 the twins
// begin with numbers that it can hold, and the C twin's choices are taken over: where a token's best scores are closer
// together than 2^-9, the twins would rightly choose differently, and nothing behind it could be compared. Weights have a
// standard deviation of SPREAD instead of randomize_weights' 0.3, which makes two layers multiply a rounding by up to 30:
// the worst found is then 3e-6, and 1e-2.

#define SPREAD         (LOW ? 0.06 : 0.2)

gpu::floatX rounded(real x) {
#ifdef FP32
    return x;
#else
    return __float2bfloat16(x);
#endif
}

real exact(gpu::floatX x) {
#ifdef FP32
    return x;
#else
    return __bfloat162float(x);
#endif
}

void round_numbers(real *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        x[i] = exact(rounded(x[i]));
}
