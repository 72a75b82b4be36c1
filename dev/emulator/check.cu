// check.cu: does the emulator do what a GPU does, and does it see what it is there to see? Built as the Makefile says,
// by the compiler that builds the emulated twin, plain and with sanitizers. Whatever must fail runs in a forked child.

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <string>

int failures;
#define EXPECT(what) ((what) ? (void)0 : (void)(failures++, fprintf(stderr, "check.cu:%d: %s\n", __LINE__, #what)))

const unsigned ALL = 0xffffffff;

template <class T> T *device(size_t n) {
    T *p = nullptr;
    EXPECT(cudaMalloc(&p, n * sizeof(T)) == cudaSuccess);
    return p;
}
template <class T> T *device(const std::vector<T> &v) {
    T *p = device<T>(v.size());
    EXPECT(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
    return p;
}
template <class T> std::vector<T> host(const T *p, size_t n) {
    std::vector<T> v(n);
    EXPECT(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
    return v;
}

std::vector<float> numbers(size_t n, unsigned seed) { // small integers, so that every sum is exact
    std::vector<float> v(n);
    cudacpu::Random random(seed);
    for (float &x : v)
        x = (float)(int)random.below(17) - 8;
    return v;
}
std::vector<__nv_bfloat16> rounded(const std::vector<float> &v) {
    std::vector<__nv_bfloat16> r(v.size());
    for (size_t i = 0; i < v.size(); i++)
        r[i] = __float2bfloat16(v[i]);
    return r;
}

// What run() prints to stderr, and how it ends: run in a child.
std::string output;
template <class Run> int status_of(Run run) {
    int ends[2], status = 0;
    fflush(NULL);
    if (pipe(ends) != 0)
        return -1;
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        run();
        _exit(0);
    }
    close(ends[1]);
    output.clear();
    char piece[4096];
    for (ssize_t n; (n = read(ends[0], piece, sizeof(piece))) > 0;)
        output.append(piece, n);
    close(ends[0]);
    waitpid(child, &status, 0);
    return status;
}

// run() must end the program with a message that has all these in it.
template <class Run> void must_fail(int line, std::vector<std::string> messages, Run run) {
    int status = status_of([=] {
        run();
        cudaDeviceSynchronize();
    });
    bool good = status != 0;
    for (std::string &m : messages)
        good &= output.find(m) != std::string::npos;
    if (!good) {
        failures++;
        fprintf(stderr, "check.cu:%d: status %d, not the failure expected, but:\n%s\n", line, status, output.c_str());
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 1. Instructions of a warp, by the PTX ISA's own formulas

// a (16,16), b (16,8), d (16,8), row-major
__global__ void mma_kernel(float *d, const __nv_bfloat16 *a, const __nv_bfloat16 *b) {
    int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
    unsigned of_a[4] = {}, of_b[2] = {};
    float of_d[4];
    for (int i = 0; i < 8; i++) {
        int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
        int col = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
        of_a[i / 2] |= (unsigned)a[row * 16 + col].x << 16 * (i % 2);
    }
    for (int i = 0; i < 4; i++) {
        int row = i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
        of_b[i / 2] |= (unsigned)b[row * 8 + group].x << 16 * (i % 2);
        of_d[i] = d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
    }
    cudacpu::mma_m16n8k16(of_d, of_a, of_b);
    for (int i = 0; i < 4; i++)
        d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = of_d[i];
}

void check_mma() {
    std::vector<float> a = numbers(256, 1), b = numbers(128, 2), d = numbers(128, 3), right = d;
    for (int m = 0; m < 16; m++) {
        for (int n = 0; n < 8; n++) {
            for (int k = 0; k < 16; k++)
                right[m * 8 + n] += a[m * 16 + k] * b[k * 8 + n];
        }
    }
    float *on_device = device(d);
    mma_kernel<<<1, 32>>>(on_device, device(rounded(a)), device(rounded(b)));
    EXPECT(host(on_device, 128) == right);
}

// Matrix i's rows lie at distances of 24, 40, ... numbers, each begun at another place.
__global__ void ldmatrix_kernel(unsigned *out, int transposed) {
    __shared__ __align__(16) uint16_t x[2048];
    for (int i = threadIdx.x; i < 2048; i += 32)
        x[i] = i;
    __syncthreads();
    int matrix = threadIdx.x / 8, row = threadIdx.x % 8;
    const uint16_t *mine = x + 8 * matrix + row * (24 + 16 * matrix);
    unsigned r[4];
    if (transposed)
        cudacpu::ldmatrix_x4_trans(r, mine);
    else
        cudacpu::ldmatrix_x4(r, mine);
    for (int i = 0; i < 4; i++)
        out[i * 32 + threadIdx.x] = r[i];
}

void check_ldmatrix() {
    unsigned *out = device<unsigned>(128);
    for (unsigned transposed = 0; transposed < 2; transposed++) {
        ldmatrix_kernel<<<1, 32>>>(out, transposed);
        std::vector<unsigned> r = host(out, 128);
        for (unsigned i = 0; i < 4; i++) {
            auto element = [=](unsigned row, unsigned col) { return 8 * i + row * (24 + 16 * i) + col; };
            for (unsigned t = 0; t < 32; t++) {
                unsigned low = transposed ? element(t % 4 * 2, t / 4) : element(t / 4, t % 4 * 2);
                unsigned high = transposed ? element(t % 4 * 2 + 1, t / 4) : element(t / 4, t % 4 * 2 + 1);
                EXPECT(r[i * 32 + t] == (low | high << 16));
            }
        }
    }
}

// Two batches of copies, of which the second is waited for later; n of the 16 bytes are read.
__global__ void cp_async_kernel(unsigned *out, const uint4 *in, int n) {
    __shared__ uint4 x[64];
    int i = threadIdx.x;
    cudacpu::cp_async_16(&x[i], &in[i], 16);
    cudacpu::cp_async_commit();
    cudacpu::cp_async_16(&x[32 + i], &in[32 + i], n);
    cudacpu::cp_async_commit();
    cudacpu::cp_async_wait(1);
    __syncthreads();
    out[i] = x[31 - i].y;
    out[32 + i] = x[32 + i].x;
    cudacpu::cp_async_wait(0);
    __syncthreads();
    out[64 + i] = x[63 - i].y;
}

void check_cp_async() {
    std::vector<uint4> in(64);
    for (unsigned i = 0; i < 64; i++)
        in[i] = {i, 1000 + i, 0, 0};
    unsigned *out = device<unsigned>(96);
    for (int n = 0; n <= 16; n += 4) {
        cp_async_kernel<<<1, 32>>>(out, device(in), n);
        std::vector<unsigned> r = host(out, 96);
        for (unsigned i = 0; i < 32; i++)
            EXPECT(r[i] == 1031 - i && r[32 + i] == 0x7fa07fa0 && r[64 + i] == (n > 4 ? 1063 - i : 0));
    }
}

template <class T> __global__ void shuffle_kernel(T *out, int width) {
    int lane = threadIdx.x % 32;
    T x = (T)(100 * (threadIdx.x / 32) + lane);
    out[threadIdx.x] = __shfl_sync(ALL, x, lane * 5 + 3, width);
    out[64 + threadIdx.x] = __shfl_xor_sync(ALL, x, 5, width);
    out[128 + threadIdx.x] = __shfl_up_sync(ALL, x, 3, width);
    out[192 + threadIdx.x] = __shfl_down_sync(ALL, x, 3, width);
}

template <class T> void check_shuffles() {
    T *out = device<T>(256);
    for (int width = 8; width <= 32; width *= 2) {
        shuffle_kernel<T><<<1, 64>>>(out, width);
        std::vector<T> r = host(out, 256);
        for (int i = 0; i < 64; i++) {
            int lane = i % 32, first = lane / width * width, base = i / 32 * 100;
            EXPECT(r[i] == (T)(base + first + (lane * 5 + 3) % width));
            EXPECT(r[64 + i] == (T)(base + ((lane ^ 5) < first + width ? lane ^ 5 : lane)));
            EXPECT(r[128 + i] == (T)(base + (lane - 3 >= first ? lane - 3 : lane)));
            EXPECT(r[192 + i] == (T)(base + (lane + 3 < first + width ? lane + 3 : lane)));
        }
    }
}

// Also with the halves of a warp apart, which come to their calls at different times.
__global__ void votes_kernel(unsigned *out) {
    int i = threadIdx.x;
    out[i] = __ballot_sync(ALL, i % 3 == 0);
    out[32 + i] = __any_sync(ALL, i == 7) + 2 * __any_sync(ALL, i == 99) + 4 * __all_sync(ALL, i < 32) +
                  8 * __all_sync(ALL, i != 9);
    out[64 + i] = __match_any_sync(ALL, i % 5);
    out[96 + i] = __reduce_add_sync(ALL, (unsigned)i);
    out[128 + i] = (unsigned)(__reduce_max_sync(ALL, i - 40) + 100 * __reduce_min_sync(ALL, 40 - i));
    if (i < 16)
        out[160 + i] = __ballot_sync(0x0000ffff, i % 2);
    else
        out[160 + i] = __shfl_sync(0xffff0000, i, 20);
    __syncwarp();
}

void check_votes() {
    unsigned *out = device<unsigned>(192);
    votes_kernel<<<1, 32>>>(out);
    std::vector<unsigned> r = host(out, 192);
    for (unsigned i = 0; i < 32; i++) {
        unsigned same = 0;
        for (unsigned j = i % 5; j < 32; j += 5)
            same |= 1u << j;
        EXPECT(r[i] == 0x49249249 && r[32 + i] == 5 && r[64 + i] == same && r[96 + i] == 496 && r[128 + i] == 891);
        EXPECT(r[160 + i] == (i < 16 ? 0xaaaa : 20));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Blocks: barriers, shared memory, order, atomics

template <class T> __device__ T rotated(T x, int by) { // a variable for each T
    __shared__ T all[256];
    __syncthreads();
    all[threadIdx.x] = x;
    __syncthreads();
    return all[(threadIdx.x + by) % blockDim.x];
}

__global__ void barrier_kernel(int *out) {
    __shared__ int scalar;
    __shared__ unsigned long long table[2][128];
    extern __shared__ float dynamic[];
    int i = threadIdx.y * blockDim.x + threadIdx.x, n = blockDim.x * blockDim.y;
    if (i == n - 1)
        scalar = 7;
    table[i % 2][i / 2] = 2 * i;
    dynamic[i] = 3 * i;
    __syncthreads();
    int j = (i + 77) % n;
    out[((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * n + i] =
        (int)(scalar + table[j % 2][j / 2] + dynamic[j]);
}

__global__ void rotate_kernel(double *out) {
    out[threadIdx.x] = rotated(rotated((float)threadIdx.x, 1), 2) + rotated((double)threadIdx.x, 4) / 1024;
}

__global__ void order_kernel(int *counters, int *threads, int *blocks) {
    threads[blockIdx.x * 64 + atomicAdd(&counters[1 + blockIdx.x], 1)] = threadIdx.x;
    if (threadIdx.x == 0)
        blocks[atomicAdd(&counters[0], 1)] = blockIdx.x;
    __syncthreads();
    threads[1024 + blockIdx.x * 64 + atomicAdd(&counters[17 + blockIdx.x], 1)] = threadIdx.x;
}

std::vector<int> order() {
    std::vector<int> zeros(33);
    int *threads = device<int>(2048), *blocks = device<int>(16);
    order_kernel<<<16, 64>>>(device(zeros), threads, blocks);
    std::vector<int> r = host(threads, 2048), b = host(blocks, 16);
    r.insert(r.end(), b.begin(), b.end());
    return r;
}

template <class T> __global__ void atomics_kernel(T *x) {
    T i = (T)(blockIdx.x * blockDim.x + threadIdx.x);
    atomicAdd(&x[0], i);
    atomicMax(&x[1], i);
    atomicMin(&x[2], i);
    atomicOr(&x[3], i);
    if (atomicCAS(&x[4], (T)5, i) == 5)
        atomicExch(&x[5], i);
    for (T seen = atomicOr(&x[6], (T)0), old; (old = atomicCAS(&x[6], seen, seen + 2)) != seen;)
        seen = old;
}

template <class T> void check_atomics() {
    T *x = device(std::vector<T>{0, 0, 99999, 0, 5, 0, 0});
    atomics_kernel<T><<<100, 100>>>(x);
    std::vector<T> r = host(x, 7);
    EXPECT(r[0] == 49995000 && r[1] == 9999 && r[2] == 0 && r[3] == 16383 && r[4] == r[5] && r[6] == 20000);
}

template <class T> auto can_add(T *p) -> decltype(atomicAdd(p, T()), true) {
    return true;
}
bool can_add(...) {
    return false;
}

void check_blocks() {
    int *out = device<int>(24 * 256);
    barrier_kernel<<<dim3(2, 3, 4), dim3(64, 4), 1024>>>(out);
    std::vector<int> r = host(out, 24 * 256);
    for (int i = 0; i < 24 * 256; i++)
        EXPECT(r[i] == 7 + 5 * ((i % 256 + 77) % 256));
    double *rotated = device<double>(96);
    rotate_kernel<<<1, 96>>>(rotated);
    std::vector<double> d = host(rotated, 96);
    for (int i = 0; i < 96; i++)
        EXPECT(d[i] == (i + 3) % 96 + (i + 4) % 96 / 1024.);

    auto sum = [] { // of the order, as it is at this point
        unsigned s = 0;
        for (int i : order())
            s = s * 31 + i;
        return s % 251;
    };
    int first = status_of([=] { _exit(sum()); }), again = status_of([=] { _exit(sum()); });
    setenv("OMP_NUM_THREADS", "1", 1);
    std::vector<int> a = order(), b = order();
    EXPECT(first == again); // reproducible
    for (int i = 0; i < 2048; i += 64)
        EXPECT(!std::equal(&a[i], &a[i] + 64, &b[i]) && !std::is_sorted(&a[i], &a[i] + 64));
    EXPECT(!std::equal(&a[2048], &a[2048] + 16, &b[2048]) && !std::is_sorted(&a[2048], &a[2048] + 16));

    check_atomics<int>();
    check_atomics<unsigned>();
    check_atomics<unsigned long long>();
    EXPECT(can_add((int *)0) && !can_add((float *)0) && !can_add((double *)0) && !can_add((long *)0));
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. The runtime

__global__ void add_kernel(int *x, int n, int add) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        x[i] += add;
}

__global__ void large_kernel(float *x) {
    extern __shared__ float4 dynamic[];
    dynamic[threadIdx.x + 4000] = {1, 2, 3, 4};
    x[threadIdx.x] = dynamic[threadIdx.x + 4000].w;
}

// Managed memory: where its bytes are, and what is refused.
void check_managed() {
    const cudaMemLocation host_place = {cudaMemLocationTypeHost, 0}, place = {cudaMemLocationTypeDevice, 0};
    const cudaMemLocation none = {cudaMemLocationTypeDevice, 1};
    cudaStream_t s, t;
    size_t before, after, total;
    int *p, *plain = device<int>(1000), can = 0, seen = 0;
    EXPECT(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking) == cudaSuccess);
    EXPECT(cudaStreamCreateWithFlags(&t, cudaStreamNonBlocking) == cudaSuccess);
    EXPECT(cudaDeviceGetAttribute(&can, cudaDevAttrConcurrentManagedAccess, 0) == cudaSuccess && can == 1);
    EXPECT(cudaMemGetInfo(&before, &total) == cudaSuccess && cudaMallocManaged(&p, 4000) == cudaSuccess);
    EXPECT(cudaMemGetInfo(&after, &total) == cudaSuccess && after == before);
    EXPECT(cudaMemAdvise(p, 4000, cudaMemAdviseSetPreferredLocation, host_place) == cudaSuccess);

    // Nothing has moved before somebody waits; kernels find the numbers on either side.
    EXPECT(cudaMemset(p, 0, 4000) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess);
    EXPECT(cudaMemPrefetchAsync(p + 100, 1600, place, 0, s) == cudaSuccess);
    EXPECT(cudacpu::bytes_there(p, 4000) == 0);
    EXPECT(cudaStreamSynchronize(s) == cudaSuccess && cudacpu::bytes_there(p, 4000) == 1600 && cudacpu::bytes_there(p + 100, 1600) == 1600);
    EXPECT(cudaMemGetInfo(&after, &total) == cudaSuccess && after == before - 1600);
    add_kernel<<<8, 128, 0, s>>>(p, 1000, 3);
    EXPECT(cudaMemPrefetchAsync(p + 300, 400, host_place, 0, s) == cudaSuccess && cudaStreamSynchronize(s) == cudaSuccess);
    EXPECT(p[0] == 3 && p[999] == 3 && cudacpu::managed_there == 1200 && cudacpu::managed_most == 1600);
    EXPECT(cudaMemcpy(&seen, p + 500, 4, cudaMemcpyDeviceToHost) == cudaSuccess && seen == 3);

    // Another stream that does not wait may come too early.
    must_fail(__LINE__, {"400 bytes", "not all on the device"}, [=] {
        for (int i = 0; i < 20; i++) {
            cudaMemPrefetchAsync(p + 300, 400, host_place, 0, s);
            cudaStreamSynchronize(s);
            cudaMemPrefetchAsync(p + 300, 400, place, 0, s);
            cudacpu::expect_on_device(t, p + 300, 400);
            cudaStreamSynchronize(t);
        }
    });

    // Errors
    EXPECT(cudaMemPrefetchAsync(p, 4001, place, 0, s) == cudaErrorInvalidValue);
    EXPECT(cudaMemPrefetchAsync(p, 4, place, 1, s) == cudaErrorInvalidValue);
    EXPECT(cudaMemPrefetchAsync(plain, 4, place, 0, s) == cudaErrorInvalidValue);
    EXPECT(cudaMemPrefetchAsync(p, 4, none, 0, s) == cudaErrorInvalidDevice);
    EXPECT(cudaMemAdvise(plain, 4, cudaMemAdviseSetAccessedBy, place) == cudaErrorInvalidValue);
    EXPECT(cudaGetLastError() != cudaSuccess);
    EXPECT(cudaFree(p) == cudaSuccess && cudaMemGetInfo(&after, &total) == cudaSuccess);
    EXPECT(after == before && cudacpu::managed_there == 0);
    EXPECT(cudaStreamDestroy(s) == cudaSuccess && cudaStreamDestroy(t) == cudaSuccess);
}

void check_runtime() {
    // Nothing is done before somebody waits, and a host's buffer is read only then.
    cudaStream_t s, t;
    cudaEvent_t e, f;
    EXPECT(cudaStreamCreate(&s) == cudaSuccess && cudaStreamCreateWithFlags(&t, cudaStreamNonBlocking) == cudaSuccess);
    EXPECT(cudaEventCreate(&e) == cudaSuccess && cudaEventCreate(&f) == cudaSuccess);
    int *x = device<int>(100), from[100], to[100] = {};
    std::fill(from, from + 100, 1);
    EXPECT(cudaMemcpyAsync(x, from, sizeof(from), cudaMemcpyHostToDevice, s) == cudaSuccess);
    std::fill(from, from + 100, 2);
    add_kernel<<<1, 128, 0, s>>>(x, 100, 3);
    EXPECT(cudaMemcpyAsync(to, x, sizeof(to), cudaMemcpyDeviceToHost, s) == cudaSuccess);
    EXPECT(to[0] == 0 && to[99] == 0);
    EXPECT(cudaStreamSynchronize(s) == cudaSuccess);
    EXPECT(to[0] == 5 && to[99] == 5);

    // Two streams are out of order, unless an event orders them.
    int other_way = 0;
    for (int i = 0; i < 100; i++) {
        for (int ordered = 0; ordered < 2; ordered++) {
            int seen = 0;
            cudaMemset(x, 0, 400);
            cudaEventRecord(e, s);
            add_kernel<<<1, 128, 0, s>>>(x, 100, 1);
            cudaEventRecord(f, s);
            if (ordered)
                cudaStreamWaitEvent(t, f, 0);
            cudaMemcpyAsync(&seen, x, 4, cudaMemcpyDeviceToHost, t);
            cudaStreamSynchronize(t);
            other_way += !ordered && seen == 0;
            EXPECT(seen == 1 || !ordered);
        }
    }
    EXPECT(other_way > 10 && other_way < 90);
    float ms = -1;
    EXPECT(cudaEventSynchronize(f) == cudaSuccess && cudaEventElapsedTime(&ms, e, f) == cudaSuccess && ms >= 0);
    for (int i = 0; i < 20100; i++)
        add_kernel<<<1, 32, 0, s>>>(x, 1, 1);
    EXPECT(host(x, 1)[0] == 20101); // and the null stream waits for others

    // Errors
    add_kernel<<<1, 1025>>>(x, 1, 1);
    EXPECT(cudaPeekAtLastError() == cudaErrorInvalidConfiguration &&
           cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess);
    add_kernel<<<0, 32>>>(x, 1, 1);
    EXPECT(cudaGetLastError() == cudaErrorInvalidConfiguration);
    float *y = device<float>(32);
    large_kernel<<<1, 32, 65536>>>(y);
    EXPECT(cudaGetLastError() == cudaErrorInvalidValue);
    EXPECT(cudaFuncSetAttribute(large_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 65536) == cudaSuccess);
    large_kernel<<<1, 32, 65536>>>(y);
    EXPECT(cudaGetLastError() == cudaSuccess && host(y, 32)[31] == 4);
    EXPECT(cudaFuncSetAttribute(large_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 20) ==
           cudaErrorInvalidValue);
    size_t available, before, total;
    void *p;
    EXPECT(cudaMemGetInfo(&before, &total) == cudaSuccess && total == (size_t)4096 << 20);
    EXPECT(cudaMalloc(&p, before + 1) == cudaErrorMemoryAllocation && !p);
    EXPECT(!strcmp(cudaGetErrorString(cudaGetLastError()), "out of memory"));
    EXPECT(cudaMalloc(&p, 1 << 20) == cudaSuccess && (uintptr_t)p % 256 == 0);
    EXPECT(cudaMemGetInfo(&available, &total) == cudaSuccess && available == before - (1 << 20));
    EXPECT(cudaFree(p) == cudaSuccess && cudaFree(NULL) == cudaSuccess && cudaFree(from) == cudaErrorInvalidValue);
    EXPECT(cudaMemcpy(from, from + 50, 4, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    EXPECT(cudaMemcpy(x, from, 404, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    cudaGetLastError();

    // "Not ready" is remembered, by calls that succeed as well, until somebody asks.
    for (int i = 0; i < 3; i++)
        add_kernel<<<1, 32, 0, s>>>(x, 1, 1);
    EXPECT(cudaEventRecord(e, s) == cudaSuccess && cudaEventQuery(e) == cudaErrorNotReady);
    EXPECT(cudaEventSynchronize(e) == cudaSuccess && cudaEventQuery(e) == cudaSuccess);
    EXPECT(cudaPeekAtLastError() == cudaErrorNotReady && cudaGetLastError() == cudaErrorNotReady &&
           cudaGetLastError() == cudaSuccess);

    // Rows of 2 out of 5 into rows of 3
    for (int i = 0; i < 100; i++)
        from[i] = i;
    EXPECT(cudaMemcpy2DAsync(x, 12, from, 20, 8, 4, cudaMemcpyHostToDevice, s) == cudaSuccess);
    std::vector<int> r = host(x, 12);
    EXPECT(r[0] == 0 && r[1] == 1 && r[3] == 5 && r[4] == 6 && r[9] == 15 && r[10] == 16 && r[2] == 1);
    EXPECT(cudaEventDestroy(e) == cudaSuccess && cudaEventDestroy(f) == cudaSuccess);
    EXPECT(cudaStreamDestroy(s) == cudaSuccess && cudaStreamDestroy(t) == cudaSuccess);
}

__global__ void half_static_kernel(float *x) { // 40 KiB, and what is dynamic
    __shared__ float fixed[10240];
    extern __shared__ float dynamic[];
    fixed[threadIdx.x] = 1;
    dynamic[threadIdx.x] = 2;
    x[threadIdx.x] = fixed[threadIdx.x] + dynamic[threadIdx.x];
}

// In a process that has been started with CUDACPU_SHARED=99 and CUDACPU_QUEUE=3: a consumer's card, and a short queue.
void check_small_device() {
    cudaDeviceProp p;
    cudaStream_t s;
    float *y = device<float>(32);
    int *x = device(std::vector<int>(1)), *z = device(std::vector<int>(1)), to = -1;
    EXPECT(cudaGetDeviceProperties(&p, 0) == cudaSuccess && p.sharedMemPerBlockOptin == 99 << 10);
    EXPECT(cudaFuncSetAttribute(large_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (99 << 10) + 16) ==
           cudaErrorInvalidValue);
    EXPECT(cudaGetLastError() == cudaErrorInvalidValue);
    EXPECT(cudaFuncSetAttribute(large_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 99 << 10) == cudaSuccess);
    large_kernel<<<1, 32, 99 << 10>>>(y);
    EXPECT(cudaGetLastError() == cudaSuccess && host(y, 32)[31] == 4);
    large_kernel<<<1, 32, (99 << 10) + 16>>>(y);
    EXPECT(cudaGetLastError() == cudaErrorInvalidValue);
    EXPECT(cudaFuncSetAttribute(half_static_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 60 << 10) ==
           cudaSuccess);
    half_static_kernel<<<1, 32, 59 << 10>>>(y);
    EXPECT(host(y, 32)[31] == 3);
    auto too_much = [=] {
        cudacpu::shared_optin -= 1024;
        half_static_kernel<<<1, 32, 59 << 10>>>(y);
    };
    must_fail(__LINE__,
              {"kernel half_static_kernel", "101376 bytes of shared memory, of which 60416 are dynamic, are too many"},
              too_much);

    // The fourth operation waits for the first, and no longer; other streams have room of their own.
    EXPECT(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking) == cudaSuccess);
    cudaMemcpyAsync(&to, x, 4, cudaMemcpyDeviceToHost, s);
    for (int i = 0; i < 2; i++)
        add_kernel<<<1, 32, 0, s>>>(x, 1, 1);
    add_kernel<<<1, 32>>>(z, 1, 1);
    EXPECT(to == -1);
    add_kernel<<<1, 32, 0, s>>>(x, 1, 1);
    EXPECT(to == 0);
    EXPECT(s->tasks.size() == 3);
    EXPECT(cudaStreamSynchronize(s) == cudaSuccess && host(x, 1)[0] == 3);
    EXPECT(cudaStreamDestroy(s) == cudaSuccess);
}

void check_environment() {
    int status = status_of([] {
        setenv("CUDACPU_SHARED", "99", 1);
        setenv("CUDACPU_QUEUE", "3", 1);
        execl("/proc/self/exe", "check", "small", (char *)nullptr);
    });
    if (status != 0)
        failures++, fprintf(stderr, "with CUDACPU_SHARED=99 CUDACPU_QUEUE=3: %s\n", output.c_str());
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. Numbers: bfloat16, cuBLAS, and what must not be taken for a mistake

void check_bf16() {
    for (unsigned i = 0; i < 65536; i++) { // all there are, and what lies half way to the next, and beside that
        __nv_bfloat16 b = {(unsigned short)i};
        float f = __bfloat162float(b);
        EXPECT(__float_as_uint(f) == i << 16);
        if ((i & 0x7fff) > 0x7f80) {
            EXPECT((i & 0x40) == 0 || std::isnan(__bfloat162float(__float2bfloat16(f))));
            continue;
        }
        EXPECT(__float2bfloat16(f).x == i);
        if ((i & 0x7fff) < 0x7f80) {
            EXPECT(__float2bfloat16(__uint_as_float(i << 16 | 0x7fff)).x == i);
            EXPECT(__float2bfloat16(__uint_as_float(i << 16 | 0x8000)).x == i + i % 2);
            EXPECT(__float2bfloat16(__uint_as_float(i << 16 | 0x8001)).x == i + 1);
        }
    }
    cudacpu::Random random(4);
    for (int n = 0; n < 1000000; n++) { // the nearer one of the two around it
        float f = __uint_as_float(random.below(0xff000000)), g = fabsf(f);
        if (!std::isfinite(f) || g > 3e38f)
            continue;
        unsigned low = __float_as_uint(g) >> 16;
        double below = (double)g - __uint_as_float(low << 16), above = (double)__uint_as_float((low + 1) << 16) - g;
        unsigned right = below < above ? low : above < below ? low + 1 : low + low % 2;
        EXPECT(__float2bfloat16(f).x == (right | (std::signbit(f) ? 0x8000 : 0)));
    }
    __nv_bfloat162 pair = __floats2bfloat162_rn(1.5f, -2);
    float2 f = __bfloat1622float2(__halves2bfloat162(pair.y, pair.x));
    EXPECT(f.x == -2 && f.y == 1.5f && sizeof(pair) == 4);
}

template <class AB, class C>
void check_product(cublasHandle_t blas, cudaDataType_t ab, cudaDataType_t c_type, int m, int n, int k, float alpha,
                   float beta) {
    for (int transposed = 0; transposed < 4; transposed++) {
        bool at = transposed & 1, bt = transposed & 2;
        int lda = (at ? k : m) + 3, ldb = (bt ? n : k) + 1, ldc = m + 2, count = 3;
        size_t sa = (size_t)lda * (at ? m : k), sb = (size_t)ldb * (bt ? k : n), sc = (size_t)ldc * n;
        std::vector<float> a = numbers(count * sa, 5), b = numbers(count * sb, 6), c = numbers(count * sc, 7);
        auto convert = [](const std::vector<float> &v, auto like) {
            std::vector<decltype(like)> to(v.size());
            for (size_t i = 0; i < v.size(); i++) {
                if constexpr (sizeof(like) == 4)
                    to[i] = v[i];
                else
                    to[i] = __float2bfloat16(v[i]);
            }
            return to;
        };
        AB *da = device(convert(a, AB())), *db = device(convert(b, AB()));
        C *dc = beta == 0 ? device<C>(c.size()) : device(convert(c, C())); // with beta 0, it is only written
        cublasOperation_t ta = at ? CUBLAS_OP_T : CUBLAS_OP_N, tb = bt ? CUBLAS_OP_T : CUBLAS_OP_N;
        float alpha_now = alpha, beta_now = beta;
        if (sizeof(AB) == 4 && alpha == 2) {
            for (int i = 0; i < count; i++)
                EXPECT(cublasSgemm(blas, ta, tb, m, n, k, &alpha_now, (float *)da + i * sa, lda, (float *)db + i * sb,
                                   ldb, &beta_now, (float *)dc + i * sc, ldc) == CUBLAS_STATUS_SUCCESS);
        } else {
            EXPECT(cublasGemmStridedBatchedEx(blas, ta, tb, m, n, k, &alpha_now, da, ab, lda, sa, db, ab, ldb, sb,
                                              &beta_now, dc, c_type, ldc, sc, count, CUBLAS_COMPUTE_32F,
                                              CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS);
        }
        alpha_now = beta_now = 99; // they were read
        std::vector<C> got = host(dc, c.size());
        for (int v = 0; v < count; v++) {
            for (int j = 0; j < n; j++) {
                for (int i = 0; i < m; i++) {
                    float sum = 0;
                    for (int l = 0; l < k; l++)
                        sum +=
                            a[v * sa + (at ? i * lda + l : l * lda + i)] * b[v * sb + (bt ? l * ldb + j : j * ldb + l)];
                    size_t at_c = v * sc + (size_t)j * ldc + i;
                    float right = alpha * sum + beta * c[at_c];
                    EXPECT(cudacpu::element(got.data(), at_c, c_type) ==
                           (sizeof(C) == 4 ? right : __bfloat162float(__float2bfloat16(right))));
                }
            }
        }
        cudaFree(da), cudaFree(db), cudaFree(dc);
    }
}

void check_blas() {
    cublasHandle_t blas;
    float one = 1, *x = device(std::vector<float>(64));
    EXPECT(cublasCreate(&blas) == CUBLAS_STATUS_SUCCESS);
    int sizes[][3] = {{1, 1, 1}, {16, 4, 8}, {5, 7, 3}, {33, 18, 50}, {3, 2, 0}};
    for (auto [m, n, k] : sizes) {
        check_product<float, float>(blas, CUDA_R_32F, CUDA_R_32F, m, n, k, 2, 0);
        check_product<float, float>(blas, CUDA_R_32F, CUDA_R_32F, m, n, k, 1, 0.5f);
        check_product<__nv_bfloat16, float>(blas, CUDA_R_16BF, CUDA_R_32F, m, n, k, 0.5f, 1);
        check_product<__nv_bfloat16, __nv_bfloat16>(blas, CUDA_R_16BF, CUDA_R_16BF, m, n, k, 1, 0);
        check_product<__nv_bfloat16, __nv_bfloat16>(blas, CUDA_R_16BF, CUDA_R_16BF, m, n, k, 1, 2);
    }
    auto gemm = [&](cudaDataType_t a, cudaDataType_t b, cudaDataType_t c, int lda, int ldb, int ldc) {
        return cublasGemmEx(blas, CUBLAS_OP_N, CUBLAS_OP_T, 4, 2, 3, &one, x, a, lda, x, b, ldb, &one, x, c, ldc,
                            CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    };
    EXPECT(gemm(CUDA_R_32F, CUDA_R_32F, CUDA_R_32F, 4, 2, 4) == CUBLAS_STATUS_SUCCESS);
    EXPECT(gemm(CUDA_R_32F, CUDA_R_16BF, CUDA_R_32F, 4, 2, 4) == CUBLAS_STATUS_NOT_SUPPORTED);
    EXPECT(gemm(CUDA_R_32F, CUDA_R_32F, CUDA_R_16BF, 4, 2, 4) == CUBLAS_STATUS_NOT_SUPPORTED);
    EXPECT(gemm(CUDA_R_32F, CUDA_R_32F, CUDA_R_32F, 3, 2, 4) == CUBLAS_STATUS_INVALID_VALUE);
    EXPECT(gemm(CUDA_R_32F, CUDA_R_32F, CUDA_R_32F, 4, 1, 4) == CUBLAS_STATUS_INVALID_VALUE);
    EXPECT(gemm(CUDA_R_32F, CUDA_R_32F, CUDA_R_32F, 4, 2, 3) == CUBLAS_STATUS_INVALID_VALUE);
    must_fail(__LINE__, {"cublasGemmEx: an uninitialised"}, [=] {
        cublasGemmEx(blas, CUBLAS_OP_N, CUBLAS_OP_N, 8, 8, 8, &one, device<__nv_bfloat16>(64), CUDA_R_16BF, 8, x,
                     CUDA_R_16BF, 8, &one, x, CUDA_R_32F, 8, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    });
    EXPECT(cublasDestroy(blas) == CUBLAS_STATUS_SUCCESS);
}

// What a compiler might do ahead of its condition, or in unused lanes of a vector, must raise nothing: here every
// second number is one on which the operation would be invalid.
__global__ void masks_kernel(float *out, const float *x, int n, int limit) {
    float sum = 0, largest = -INFINITY;
    for (int i = 0; i < n; i++)
        sum += x[i] >= 0 ? sqrtf(x[i]) : 0;
    for (int i = 0; i < n; i++)
        largest = i < limit ? fmaxf(largest, x[i]) : largest;
    for (int i = 0; i < n; i++)
        out[threadIdx.x * n + i] = x[i] == -INFINITY ? 0 : expf(x[i] - largest);
    for (int i = threadIdx.x; i < n; i += 32)
        out[32 * n + i] = i < limit && x[i] > 0 ? logf(x[i]) * x[i] : 0;
    float four[4] = {0, 0, 0, 0};
    for (int i = 0; i < n / 4; i++) {
        for (int v = 0; v < 4; v++)
            four[v] += x[4 * i + v] != -INFINITY ? x[4 * i + v] / (x[4 * i + v] - largest - 1) : 0;
    }
    float3 p = {sum / n, largest / n, four[3] / n};
    p.x *= p.x, p.y *= p.y, p.z /= p.y;
    out[threadIdx.x * n] = p.x + p.y + p.z + four[0] + four[1] + four[2] + (largest == -INFINITY ? 0 : largest - x[0]) +
                           (limit > n ? (float)(int)x[1] : 0) + min(x[2], largest) * max(1, limit);
}

void check_no_false_alarm() {
    for (int n = 4; n < 40; n++) {
        std::vector<float> x(n);
        for (int i = 0; i < n; i++)
            x[i] = i % 2 ? -INFINITY : i - 1.5f;
        float *out = device<float>(33 * n);
        masks_kernel<<<1, 32>>>(out, device(x), n, n - 1);
        EXPECT(std::isfinite(host(out, 1)[0]));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. Mistakes

enum {
    NO_BARRIER,
    NO_BARRIER_INT,
    SOME_LEAVE,
    TWO_BARRIERS,
    BARRIER_AND_WARP,
    HALF_WARP,
    TWO_CALLS,
    LANE_LEAVES,
    LANE_NOT_IN_MASK,
    SHARED_PAST,
    SHARED_BEFORE,
    DYNAMIC_PAST,
    GLOBAL_PAST,
    GLOBAL_BEFORE,
    SHARED_FLOAT,
    GLOBAL_FLOAT,
    GLOBAL_BF16,
    INDEX,
    POINTER,
    CP_UNALIGNED,
    CP_TO_UNALIGNED,
    CP_TOO_EARLY,
    CP_NEVER,
    CP_GLOBAL,
    LDMATRIX_UNALIGNED,
    ALIGNED_BY_LUCK,
    DIVISION,
    INF_MINUS_INF,
    STACK_FULL,
    TOO_MUCH_SHARED
};

int deep(int n) {
    volatile char much[1000];
    for (int i = 0; i < 1000; i++)
        much[i] = (char)(n + i);
    return n == 0 ? much[7] : deep(n - 1) + much[n % 1000];
}

__global__ void wrong_kernel(int mistake, float *x, __nv_bfloat16 *b, int *index, int n, int zero) {
    __shared__ float part[64];
    __shared__ __align__(16) __nv_bfloat16 rows[512];
    __shared__ __nv_bfloat16 by_luck[512];
    extern __shared__ float dynamic[];
    int i = threadIdx.x;
    unsigned r[4] = {};
    float *p = part, *d = dynamic;
    if (mistake != SHARED_FLOAT && mistake != NO_BARRIER)
        p[i] = i;
    for (int j = 0; j < 8; j++)
        rows[i * 8 + j] = by_luck[i * 8 + j] = __float2bfloat16(1);
    d[i] = 0;
    float sum = 0;
    switch (mistake) {
    case NO_BARRIER:
        p[i] = i;
        sum = p[63 - i] + 1;
        break;
    case SOME_LEAVE:
        if (i == 33)
            return;
        __syncthreads();
        break;
    case TWO_BARRIERS:
        if (i < 32)
            __syncthreads();
        else
            __syncthreads();
        break;
    case BARRIER_AND_WARP:
        if (i % 32 == 5)
            __syncthreads();
        else
            sum = __shfl_sync(ALL, p[i], 0);
        break;
    case HALF_WARP:
        if (i % 32 < 16)
            __syncwarp();
        break;
    case TWO_CALLS:
        sum = i % 2 ? __shfl_sync(ALL, p[i], 0) : __shfl_xor_sync(ALL, p[i], 1);
        break;
    case LANE_LEAVES:
        if (i == 40)
            return;
        sum = __shfl_sync(ALL, p[i], 0);
        break;
    case LANE_NOT_IN_MASK:
        if (i % 32 < 16)
            sum = __shfl_sync(0xffff, p[i], 16);
        break;
    case SHARED_PAST:
        p[i + n - 63] = 1;
        break;
    case SHARED_BEFORE:
        p[i - n + 60] = 1;
        break;
    case DYNAMIC_PAST:
        d[i + n - 63] = 1;
        break;
    case GLOBAL_PAST:
        x[i + n - 63] = 1;
        break;
    case GLOBAL_BEFORE:
        x[i - n + 60] = 1;
        break;
    case SHARED_FLOAT:
        sum = p[63 - i] + 1;
        break;
    case GLOBAL_FLOAT:
        sum = x[i] + 1;
        break;
    case GLOBAL_BF16:
        sum = __bfloat162float(b[i]) + 1;
        break;
    case INDEX:
        sum = x[index[i]];
        break;
    case POINTER:
        sum = **(float **)index;
        break;
    case CP_UNALIGNED:
        cudacpu::cp_async_16(rows + 8 * i, (char *)x + 4, 16);
        break;
    case CP_TO_UNALIGNED:
        cudacpu::cp_async_16(rows + 8 * (i % 32) + 1, x, 16);
        break;
    case CP_TOO_EARLY:
        cudacpu::cp_async_16(rows + 8 * i, x, 16);
        cudacpu::cp_async_commit();
        cudacpu::cp_async_wait(1);
        sum = __bfloat162float(rows[8 * i]) + 1;
        cudacpu::cp_async_wait(0);
        break;
    case CP_NEVER:
        cudacpu::cp_async_16(rows + 8 * i, x, 16);
        cudacpu::cp_async_commit();
        break;
    case CP_GLOBAL:
        cudacpu::cp_async_16(x, x, 16);
        break;
    case LDMATRIX_UNALIGNED:
        cudacpu::ldmatrix_x4(r, rows + 4);
        break;
    case ALIGNED_BY_LUCK:
        cudacpu::ldmatrix_x4(r, by_luck);
        break;
    case DIVISION:
        sum = n / zero;
        break;
    case INF_MINUS_INF:
        sum = INFINITY * zero;
        break;
    case STACK_FULL:
        sum = deep(n * 10);
        break;
    case TOO_MUCH_SHARED:
        __shared__ float more[200][64];
        more[i][0] = 0;
        break;
    }
    if (sum == 12345 || r[0] == 1)
        x[i] = sum;
}

// Without the barrier some see what was there before.
__global__ void race_kernel(int *out, const int *in) {
    __shared__ int part[64];
    part[threadIdx.x] = 0;
    __syncthreads();
    part[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = part[(threadIdx.x + 1) % 64];
}

void check_mistakes() {
    auto wrong = [](int mistake) {
        return [=] {
            float *x = mistake == GLOBAL_FLOAT ? device<float>(64) : device(std::vector<float>(64));
            wrong_kernel<<<2, 64, 256>>>(mistake, x, device<__nv_bfloat16>(64), device<int>(64), 64, 0);
        };
    };
#define FAILS(mistake, ...)                                                                                            \
    must_fail(__LINE__, {"kernel wrong_kernel, block (", ",0,0), thread (", __VA_ARGS__}, wrong(mistake))
#define WHERE ",0,0): waits at check.cu:"
    const char *number = "number was used (floating-point exception)";
    FAILS(NO_BARRIER, number);
    FAILS(SOME_LEAVE, WHERE, " for a barrier that thread (33,0,0) never reaches\n");
    FAILS(TWO_BARRIERS, WHERE, " for a barrier that thread (",
          ",0,0) never reaches: it waits at check.cu:", " for a barrier\n");
    FAILS(BARRIER_AND_WARP, WHERE, " in __shfl_sync for thread (",
          ",0,0), which never comes: it waits at check.cu:", " for a barrier\n");
    FAILS(HALF_WARP, WHERE, " in __syncwarp for thread (", ",0,0), which never comes\n");
    FAILS(TWO_CALLS, WHERE, ", which never comes: it waits at check.cu:");
    FAILS(LANE_LEAVES, WHERE, " in __shfl_sync for thread (40,0,0), which never comes\n");
    FAILS(LANE_NOT_IN_MASK, "reads from lane 16, which is not in the mask 0000ffff");
    FAILS(SHARED_FLOAT, number);
    FAILS(GLOBAL_FLOAT, number);
    FAILS(GLOBAL_BF16, number);
    FAILS(CP_UNALIGNED, "check.cu:", "cp.async: address", "not a multiple of 16");
    FAILS(CP_TO_UNALIGNED, "cp.async: address", "not a multiple of 16");
    FAILS(CP_TOO_EARLY, number);
    FAILS(CP_NEVER, "ends without having waited for its copies");
    FAILS(CP_GLOBAL, "not in shared memory");
    FAILS(LDMATRIX_UNALIGNED, "ldmatrix: address", "not a multiple of 16");
    FAILS(ALIGNED_BY_LUCK, "ldmatrix: address", "not a multiple of 16");
    FAILS(INF_MINUS_INF, number);
    FAILS(TOO_MUCH_SHARED, "are too many");
#ifdef CUDACPU_ASAN
    const char *stopped = "this is what a sanitizer stops";
    FAILS(SHARED_PAST, "heap-buffer-overflow", stopped);
    FAILS(SHARED_BEFORE, "AddressSanitizer", stopped);
    FAILS(DYNAMIC_PAST, "heap-buffer-overflow", stopped);
    FAILS(GLOBAL_PAST, "heap-buffer-overflow", stopped);
    FAILS(GLOBAL_BEFORE, "heap-buffer-overflow", stopped);
    FAILS(INDEX, "Sanitizer", stopped);
    FAILS(POINTER, "", stopped);
    FAILS(STACK_FULL, "stack-overflow", stopped);
    FAILS(DIVISION, "");
#else
    must_fail(__LINE__, {"wrong_kernel: block (", "wrote past the end of the shared memory of line "},
              wrong(SHARED_PAST));
    must_fail(__LINE__, {"wrong_kernel: block (", "wrote before the beginning of the shared memory of line "},
              wrong(SHARED_BEFORE));
    must_fail(__LINE__, {"wrong_kernel: block (", "wrote past the end of the dynamic shared memory"},
              wrong(DYNAMIC_PAST));
    must_fail(__LINE__, {"wrote past the end of the 256 bytes of device memory"}, wrong(GLOBAL_PAST));
    must_fail(__LINE__, {"wrote before the beginning of the 256 bytes of device memory"}, wrong(GLOBAL_BEFORE));
    FAILS(INDEX, "wild address");
    FAILS(POINTER, "wild address");
    FAILS(STACK_FULL, "the stack is full");
    FAILS(DIVISION, "integer division by zero");
#endif
    if (system("addr2line --version > /dev/null 2>&1") == 0)
        FAILS(GLOBAL_FLOAT, "wrong_kernel", "check.cu:");

    std::vector<int> in(64, 1);
    int *out = device<int>(64);
    race_kernel<<<1, 64>>>(out, device(in));
    std::vector<int> r = host(out, 64);
    int early = (int)std::count(r.begin(), r.end(), 0);
    EXPECT(early > 10 && early < 54);
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. Races that no order of the fibers shows, since all write what is there anyway: ThreadSanitizer finds them, and
// nothing else does. Each has a mended form, in which there is nothing to be found.

enum {
    IN_BLOCK,
    READ_BEFORE_WRITE,
    IN_WARP,
    IN_PART_OF_WARP,
    BETWEEN_BLOCKS,
    BETWEEN_ATOMICS,
    COPY_OF_ANOTHER,
    COPY_TOO_SOON,
    LAST_BLOCK
};
const char *const race_names[] = {"IN_BLOCK",        "READ_BEFORE_WRITE", "IN_WARP",
                                  "IN_PART_OF_WARP", "BETWEEN_BLOCKS",    "BETWEEN_ATOMICS",
                                  "COPY_OF_ANOTHER", "COPY_TOO_SOON",     "LAST_BLOCK"};

__global__ void planted_kernel(int race, int mended, int *out, int *common, const int *ones) {
    __shared__ __align__(16) int part[1024];
    int i = threadIdx.x, first = blockIdx.x == 0 && i == 0, sum = 0;
    for (int j = i; j < 1024; j += 64)
        part[j] = 1;
    __syncthreads();
    switch (race) {
    case IN_BLOCK: // one writes, the others read
        if (i == 17)
            part[0] = 1;
        if (mended)
            __syncthreads();
        sum = part[0];
        break;
    case READ_BEFORE_WRITE: // a barrier between write and read, but none between read and the next write
        for (int round = 0; round < 3; round++) {
            part[i] = 1;
            __syncthreads();
            sum = part[63 - i];
            if (mended)
                __syncthreads();
        }
        break;
    case IN_WARP: // a shuffle orders no memory
        part[i] = 1;
        sum = __shfl_xor_sync(ALL, 1, 1);
        if (mended)
            __syncwarp();
        sum = part[i ^ 1];
        break;
    case IN_PART_OF_WARP: // a barrier of some lanes orders no others
        part[i] = 1;
        __syncwarp(mended ? ALL : 0xffffu << i / 16 % 2 * 16);
        sum = part[i ^ 16];
        break;
    case BETWEEN_BLOCKS:
        if (i == 0 && (!mended || first))
            common[0] = 1;
        break;
    case BETWEEN_ATOMICS: // only one of the two is atomic
        if (mended || blockIdx.x)
            atomicMax(&common[0], 1);
        else if (first)
            common[0] = 1;
        break;
    case COPY_OF_ANOTHER: // each waits for its own copies alone
        cudacpu::cp_async_16(part + 4 * i, ones + 4 * i, 16);
        cudacpu::cp_async_commit();
        cudacpu::cp_async_wait(0);
        if (mended)
            __syncthreads();
        sum = part[252 - 4 * i];
        break;
    case COPY_TOO_SOON: // into what others still read
        sum = part[252 - 4 * i];
        if (mended)
            __syncthreads();
        cudacpu::cp_async_16(part + 4 * i, ones + 4 * i, 16);
        cudacpu::cp_async_commit();
        cudacpu::cp_async_wait(0);
        break;
    case LAST_BLOCK: // the block that counts itself last reads what the others have written
        common[4 + blockIdx.x * 64 + i] = 1;
        if (mended)
            __threadfence();
        __syncthreads();
        if (i == 0)
            part[0] = atomicAdd(&common[0], 1) == (int)gridDim.x - 1;
        __syncthreads();
        if (mended)
            __threadfence();
        if (part[0])
            sum = common[4 + (gridDim.x - 1 - blockIdx.x) * 64 + i];
        break;
    }
    out[blockIdx.x * 64 + i] = sum;
}

void check_races() {
    for (int race = IN_BLOCK; race <= LAST_BLOCK; race++) {
        for (int mended = 0; mended < 2; mended++) {
            for (int seed = 1; seed <= 3; seed++) {
                auto planted = [=] {
                    setenv("CUDACPU_SEED", std::to_string(seed).c_str(), 1);
                    int *common = device(std::vector<int>(200)), *out = device<int>(128);
                    planted_kernel<<<2, 64>>>(race, mended, out, common, device(std::vector<int>(256, 1)));
                    cudaDeviceSynchronize();
                };
                int status = status_of(planted);
                bool found = output.find("WARNING: ThreadSanitizer: data race") != std::string::npos;
#ifdef CUDACPU_TSAN
                const char *messages[] = {"planted_kernel", "check.cu:", "'block (", ") thread (",
                                          "kernel planted_kernel, block (",
                                          ": a race: no barrier lies between the two accesses above"};
                bool good = found == !mended && WEXITSTATUS(status) == (mended ? 0 : 66);
                for (const char *m : messages)
                    good &= mended || output.find(m) != std::string::npos;
#else
                bool good = !found && status == 0;
#endif
                if (!good) {
                    failures++;
                    fprintf(stderr, "check.cu: %s, mended %d, seed %d: status %d:\n%s\n", race_names[race], mended,
                            seed, status, output.c_str());
                }
            }
        }
    }
#ifdef CUDACPU_TSAN
    int status = status_of([] {
        cudacpu::warp_orders = true; // as CUDACPU_WARP_ORDERS=1
        int *common = device(std::vector<int>(200)), *out = device<int>(128);
        planted_kernel<<<2, 64>>>(IN_WARP, 0, out, common, common);
        cudaDeviceSynchronize();
    });
    EXPECT(status == 0 && output.empty());
#endif
}

void free_all() {
    while (!cudacpu::memory.empty())
        EXPECT(cudaFree(cudacpu::memory.begin()->first) == cudaSuccess);
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "small")) {
        check_small_device();
        free_all();
        return failures != 0;
    }
    void (*checks[])() = {check_races,
                          check_mma,
                          check_ldmatrix,
                          check_cp_async,
                          check_shuffles<int>,
                          check_shuffles<unsigned>,
                          check_shuffles<float>,
                          check_shuffles<double>,
                          check_shuffles<unsigned long long>,
                          check_votes,
                          check_blocks,
                          check_managed,
                          check_runtime,
                          check_environment,
                          check_bf16,
                          check_blas,
#ifndef CUDACPU_TSAN // most mistakes are races as well
                          check_mistakes,
#endif
                          check_no_false_alarm};
    for (auto check : checks) {
        check();
        free_all();
    }
    printf(failures ? "%d failures\n" : "the emulator is well\n", failures);
    return failures != 0;
}
