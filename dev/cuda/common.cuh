// What all kernels of the CUDA twin stand on: errors, sums over warps and blocks, numbers read and written in packs,
// the tensor cores' tile product, and the few instructions that CUDA C++ has no word for.
// Gives: CHECK, sizes of launches, warp_sum, block_sum, Pack, copy_async, warp_product, convert, column_sums, Rank.
// Needs: floatX and the CUDA runtime. train_moe.cu includes it at the beginning of its namespace, `gpu`.
#ifndef CUDA_COMMON_CUH
#define CUDA_COMMON_CUH

cudaStream_t stream; // all work of the device, in order

// Every call of the CUDA runtime and of cuBLAS, and the start of every kernel, stands in CHECK, which ends the program
// with file, line and cause. dev/bench.cu sets `witness` to learn what was started where.
void (*witness)(const char *function) = NULL;

void check(const char *cause, const char *call, const char *function, const char *file, int line) {
    if (cause) {
        fail("%s:%d: %s: %s", file, line, call, cause);
    }
    if (witness) {
        witness(function);
    }
}

const char *cause_of(cudaError_t error) {
    return error == cudaSuccess ? NULL : cudaGetErrorString(error);
}

const char *cause_of(cublasStatus_t status) {
    return status == CUBLAS_STATUS_SUCCESS ? NULL : cublasGetStatusString(status);
}
#ifdef USE_NCCL
const char *cause_of(ncclResult_t result) {
    if (result == ncclSuccess) {
        return NULL;
    }
    const char *more = ncclGetLastError(NULL); // "Duplicate GPU detected"
    return more && *more ? more : ncclGetErrorString(result);
}
#endif
#define CHECK(call) gpu::check(gpu::cause_of(call), #call, __PRETTY_FUNCTION__, __FILE__, __LINE__)

void zero(void *p, size_t bytes) {
    CHECK(cudaMemsetAsync(p, 0, bytes, stream));
}

// Threads of a block where nothing else decides, and blocks for n of something.
#define THREADS 256
int blocks(size_t n, int each = THREADS) {
    return (int)((n + (size_t)each - 1) / (size_t)each);
}

int row_blocks(size_t rows) { // blocks of THREADS for rows that take a warp each
    return blocks(rows, THREADS / 32);
}

int threads_for(size_t n) { // of a block that has n to do, whole warps, 1024 at most
    return n < 1024 ? (int)(n + 31) / 32 * 32 : 1024;
}

// Bytes of shared memory that a block may ask for: 99 KiB on consumer chips, 163 on the A100, 227 on the H100.
size_t shared_limit() {
    static size_t limit;
    if (!limit) {
        cudaDeviceProp device;
        int number;
        CHECK(cudaGetDevice(&number));
        CHECK(cudaGetDeviceProperties(&device, number));
        limit = device.sharedMemPerBlockOptin;
    }
    return limit;
}

__device__ int row_of_warp() {
    return blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
}

__device__ size_t thread_of_grid() {
    return (size_t)blockIdx.x * blockDim.x + threadIdx.x;
}

__device__ float to_float(float x) {
    return x;
}
__device__ float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
__device__ void store(float *to, float x) {
    *to = x;
}
__device__ void store(__nv_bfloat16 *to, float x) { // rounds to nearest, ties to even
    *to = __float2bfloat16(x);
}

const unsigned ALL_LANES = 0xffffffffu;

// The sum, and the largest, over a warp: the same in every lane.
template <class T> __device__ T warp_sum(T x) {
    for (int step = 16; step > 0; step /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, step);
    }
    return x;
}
__device__ float warp_max(float x) {
    for (int step = 16; step > 0; step /= 2) {
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    }
    return x;
}

__device__ int warp_scan(int x) { // the sum over the lanes up to this one
    for (int step = 1; step < 32; step *= 2) {
        int below = __shfl_up_sync(ALL_LANES, x, step);
        x += (int)(threadIdx.x % 32) >= step ? below : 0;
    }
    return x;
}

// The sum over a block of at most 1024 threads, a multiple of 32, in a fixed order: the same in every thread.
template <class T> __device__ T block_sum(T x) {
    __shared__ T part[32];
    int warps = blockDim.x / 32, lane = threadIdx.x % 32;
    x = warp_sum(x);
    __syncthreads(); // whoever reads part from the last time
    if (lane == 0) {
        part[threadIdx.x / 32] = x;
    }
    __syncthreads();
    return warp_sum(lane < warps ? part[lane] : T(0));
}

// Instructions that CUDA C++ has no word for, each in one function. Off the device, dev/cudacpu does what they do.

// d (16,8) += a (16,16) b (16,8), float32 += bfloat16 * bfloat16, spread over a warp: lane 4g+t holds of a the pairs
// (g,2t), (g+8,2t), (g,2t+8), (g+8,2t+8), of b the pairs (2t,g), (2t+8,g), of d the numbers (g,2t), (g,2t+1), (g+8,2t),
// (g+8,2t+1). PTX ISA, mma.m16n8k16.
__device__ void mma(float (&d)[4], const unsigned *a, const unsigned *b) {
#ifdef CUDACPU
    cudacpu::mma_m16n8k16(d, a, b);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four (8,8) matrices of 16-bit numbers from shared memory: lane 8i+r names row r of matrix i, which is 16 bytes long and
// begins at a multiple of 16; lane 4g+t gets of matrix i the pair (g,2t) in r[i] - transposed: (2t,g) and (2t+1,g). PTX
// ISA, ldmatrix.
__device__ void load_matrices(unsigned *r, const void *row) {
#ifdef CUDACPU
    cudacpu::ldmatrix_x4(r, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
#endif
}
__device__ void load_matrices_transposed(unsigned *r, const void *row) {
#ifdef CUDACPU
    cudacpu::ldmatrix_x4_trans(r, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
#endif
}

// Copies 16 bytes into shared memory without waiting, of which the first n are read and the others are 0. Both addresses
// are multiples of 16. copy_commit() closes a batch of copies; copy_wait<n>() waits until all but the last n batches of
// this thread are there. PTX ISA, cp.async.
__device__ void copy_async(void *to_shared, const void *from, int n) {
#ifdef CUDACPU
    cudacpu::cp_async_16(to_shared, from, n);
#else
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(to_shared)),
        "l"(from), "r"(n)
        : "memory");
#endif
}
__device__ void copy_commit() {
#ifdef CUDACPU
    cudacpu::cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int n> __device__ void copy_wait() {
#ifdef CUDACPU
    cudacpu::cp_async_wait(n);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

// The tile product under everything: one warp adds a (16*MT,nk) times b (nk,8*NT) to acc. Both lie in shared memory. a:
// number (m,k) at a[m*lda + k], BY_K at a[k*lda + m]; b: number (k,n) at b[n*ldb + k], BY_K at b[k*ldb + n]. nk is a
// multiple of 16, NT even, lda and ldb are multiples of 8 (odd ones, so that rows lie in different banks), all begins at
// multiples of 16 bytes. acc[i][j] is mma's d for rows 16*i... and columns 8*j....
template <int MT, int NT, bool A_BY_K, bool B_BY_K>
__device__ void warp_product(float (&acc)[MT][NT][4], const floatX *a, int lda, const floatX *b, int ldb,
                             int nk) {
    int lane = threadIdx.x % 32;
#ifdef FP32
    for (int k = 0; k < nk; k++) {
        for (int i = 0; i < MT; i++) {
            for (int j = 0; j < NT; j++) {
                for (int v = 0; v < 4; v++) {
                    int m = 16 * i + lane / 4 + v / 2 * 8, n = 8 * j + lane % 4 * 2 + v % 2;
                    acc[i][j][v] +=
                        a[A_BY_K ? k * lda + m : m * lda + k] * b[B_BY_K ? k * ldb + n : n * ldb + k];
                }
            }
        }
    }
#else
    for (int k = 0; k < nk; k += 16) {
        unsigned of_a[MT][4], of_b[NT / 2][4];
#pragma unroll
        for (int i = 0; i < MT; i++) {
            if (A_BY_K) {
                load_matrices_transposed(of_a[i], a + (k + lane % 8 + lane / 16 * 8) * lda + 16 * i +
                                                      lane / 8 % 2 * 8);
            } else {
                load_matrices(of_a[i], a + (16 * i + lane % 16) * lda + k + lane / 16 * 8);
            }
        }
#pragma unroll
        for (int j = 0; j < NT; j += 2) {
            if (B_BY_K) {
                load_matrices_transposed(of_b[j / 2], b + (k + lane % 16) * ldb + 8 * j + lane / 16 * 8);
            } else {
                load_matrices(of_b[j / 2],
                              b + (8 * j + lane % 8 + lane / 16 * 8) * ldb + k + lane / 8 % 2 * 8);
            }
        }
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
            for (int j = 0; j < NT; j++) {
                mma(acc[i][j], of_a[i], of_b[j / 2] + j % 2 * 2);
            }
        }
    }
#endif
}

// ---- packs: n numbers that are read and written at once

// n numbers that are read and written at once where whole<n>() says that they begin at a multiple of their size.
template <class T, int n> struct alignas(sizeof(T) * n) Pack {
    T x[n];
};

template <int n, class... T> bool whole(const T *...p) {
    return (((uintptr_t)p % (n * sizeof(T)) == 0) && ...);
}

template <int n, class T> __device__ void load_pack(float (&to)[n], const T *from) {
    Pack<T, n> p = *(const Pack<T, n> *)from;
#pragma unroll
    for (int i = 0; i < n; i++) {
        to[i] = to_float(p.x[i]);
    }
}

template <int n, class T> __device__ void store_pack(T *to, const float (&from)[n]) {
    Pack<T, n> p;
#pragma unroll
    for (int i = 0; i < n; i++) {
        store(&p.x[i], from[i]);
    }
    *(Pack<T, n> *)to = p;
}

template <int n, class To, class From> __global__ void convert_kernel(To *out, const From *x, size_t size) {
    size_t i = n * thread_of_grid();
    float a[n];
    if (i + n <= size) {
        load_pack(a, x + i);
        store_pack(out + i, a);
    } else {
        for (; i < size; i++) {
            store(&out[i], to_float(x[i]));
        }
    }
}

template <class To, class From> void convert(To *out, const From *x, size_t size) {
    if (size == 0) {
        return;
    }
    if (whole<4>(out, x)) {
        convert_kernel<4, To, From><<<blocks(size, 4 * THREADS), THREADS, 0, stream>>>(out, x, size);
    } else {
        convert_kernel<1, To, From><<<blocks(size), THREADS, 0, stream>>>(out, x, size);
    }
    CHECK(cudaGetLastError());
}

void to_low(floatX *out, const float *x, size_t size) { // rounds
    convert(out, x, size);
}

void to_high(float *out, const floatX *x, size_t size) {
    convert(out, x, size);
}

// The threads of a block that works on a row of C numbers, n by n.
int row_threads(int C, int n) {
    return min_int(512, div_up(div_up(C, n), 32) * 32);
}
#define CHUNK 128 // rows of which a thread takes the sum

// ---- sums in a fixed order, and warps that own a row

const int AHEAD = 8; // where few threads read much, each asks for so many numbers before it waits for them

// *to += scale * the sum of value(i), i < n
template <class Value>
__global__ void __launch_bounds__(1024) sum_kernel(double *to, Value value, size_t n, double scale) {
    double sum = 0;
    for (size_t i = threadIdx.x; i < n; i += blockDim.x) {
        sum += value(i);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        *to += scale * sum;
    }
}

template <class Value> void add_sum(double *to, Value value, size_t n, double scale) {
    sum_kernel<Value><<<1, 1024, 0, stream>>>(to, value, n, scale);
    CHECK(cudaGetLastError());
}

// part (groups * chunks, columns): sums of value(row, column) over CHUNK rows of a group of `rows` rows
template <class Value>
__global__ void column_sums_kernel(double *part, Value value, size_t size, int chunks, int rows,
                                   int columns) {
    size_t i = thread_of_grid();
    if (i >= size) {
        return;
    }
    int chunk = (int)(i / columns % chunks), column = (int)(i % columns);
    size_t first = i / columns / chunks * rows;
    double sum = 0;
    for (int row = chunk * CHUNK; row < min_int(rows, (chunk + 1) * CHUNK); row++) {
        sum += value(first + row, column);
    }
    part[i] = sum;
}

template <class T>
__global__ void column_totals_kernel(T *to, const double *part, int outputs, int chunks, int columns,
                                     int accumulate) {
    int i = row_of_warp(), lane = threadIdx.x % 32;
    if (i >= outputs) {
        return;
    }
    double sum = 0;
    for (int chunk = lane; chunk < chunks; chunk += 32) {
        sum += part[((size_t)(i / columns) * chunks + chunk) * columns + i % columns];
    }
    sum = warp_sum(sum);
    if (lane == 0) {
        to[i] = (T)(accumulate ? to[i] + sum : sum);
    }
}

// to (groups, columns) = or += the sums of value(row, column) over each group's rows. part: room for groups *
// div_up(rows, CHUNK) * columns
template <class T, class Value>
void column_sums(T *to, Value value, int groups, int rows, int columns, int accumulate, double *part) {
    int chunks = div_up(rows, CHUNK);
    size_t size = (size_t)groups * chunks * columns;
    column_sums_kernel<Value><<<blocks(size), THREADS, 0, stream>>>(part, value, size, chunks, rows, columns);
    CHECK(cudaGetLastError());
    column_totals_kernel<T><<<row_blocks((size_t)groups * columns), THREADS, 0, stream>>>(
        to, part, groups * columns, chunks, columns, accumulate);
    CHECK(cudaGetLastError());
}

// What is summed.
struct Doubles {
    const double *x;
    __device__ double operator()(size_t i) const {
        return x[i];
    }
};

struct Squares {
    const float *x;
    __device__ double operator()(size_t i) const {
        return (double)x[i] * (double)x[i];
    }
};

struct IsChosen {
    const int *expert;
    __device__ double operator()(size_t i) const {
        return expert[i] >= 0;
    }
};

template <class T> struct Entries { // of a matrix
    const T *x;
    int columns;
    __device__ double operator()(size_t row, int column) const {
        return (double)x[row * columns + column];
    }
};

struct Importance { // the weight that a token gives to an expert
    const int *expert;
    const float *weight; // (n,K)
    int K;
    __device__ double operator()(size_t n, int e) const {
        double sum = 0;
        for (size_t i = n * K; i < (n + 1) * K; i++) {
            sum += expert[i] == e ? (double)weight[i] : 0;
        }
        return sum;
    }
};

// ---- the order of scores

// Where a score stands among others: higher is better, of equal scores the lower index; 0 is below all. -0 equals 0.
typedef unsigned long long Rank;

__device__ unsigned order_of(float score) {
    unsigned bits = __float_as_uint(score);
    return bits == 0x80000000u ? bits : bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ float score_of(unsigned order) {
    return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}

__device__ Rank rank_of(unsigned order, unsigned index) {
    return (Rank)order << 32 | (0xfffffffeu - index);
}

__device__ int index_of(Rank rank) {
    return (int)(0xfffffffeu - (unsigned)rank);
}

__device__ Rank warp_best(Rank x) {
    for (int step = 16; step > 0; step /= 2) {
        Rank other = __shfl_xor_sync(ALL_LANES, x, step);
        x = other > x ? other : x;
    }
    return x;
}

#endif
