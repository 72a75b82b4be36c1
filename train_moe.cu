// train_moe.cu: the model of train_moe.c on an NVIDIA GPU. It includes that file and replaces only what computes.
//
//   make train_moe_cu                    needs the CUDA Toolkit (nvcc, cuBLAS) and nothing else
//   make train_moe_cu PRECISION=fp32     everything in float32, to be compared with the C twin
//   ./train_moe_cu                       the same options, files, recipes and log as ./train_moe
//   make train_moe_cu_nccl               for several GPUs: mpirun -np 4 ./train_moe_cu_nccl; needs MPI and NCCL besides
//
// Read train_moe.c first, and the routers in dev/routers: what a function here computes is said there. Plans, gates and
// weights have a form of their own here (dev/cuda/host.cuh). A function runs on the host and starts kernels, which run on
// the device, one after another in one stream: nothing is waited for until the losses are read at the end of a step (but with --accum the host
// is at most one micro-step ahead). All arrays are the device's; counts, offsets and sizes of groups never leave it (but
// of several ranks the host must know in each layer how many rows go where).
//
// Weights, their gradients, AdamW's moments, the residual stream x, the router and all losses are float32. What the
// tensor cores multiply is bfloat16 (`floatX`): activations, and a rounded copy of the weights, made by AdamW as it
// writes them. Sums are always float32. The bits are the same from run to run: no floating-point atomics, every sum has a
// fixed order.

#ifndef TRAIN_MOE_NO_MAIN
#define TRAIN_MOE_NO_MAIN
#define TRAIN_MOE_CU_MAIN
#endif
#include "train_moe.c"
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <initializer_list>
#ifdef USE_NCCL
#include <nccl.h>
#elif defined(USE_MPI)
#error "ranks of the CUDA twin need NCCL: -DUSE_MPI -DUSE_NCCL"
#endif

namespace gpu {
#include "dev/cuda/host.cuh" // plans, gates and weights, in the form that this file knows

#ifdef FP32
typedef float floatX;
#else
typedef __nv_bfloat16 floatX;
#endif
static_assert(sizeof(real) == sizeof(float), "the CUDA twin is compared with the C twin in float");

// ---------------------------------------------------------------------------------------------------------------------
// 1. Errors, numbers, and what a warp does together

cudaStream_t stream; // all work of the device, in order

// Every call of the CUDA runtime and of cuBLAS, and the start of every kernel, stands in CHECK, which ends the program
// with file, line and cause. dev/bench.cu sets `witness` to learn what was started where.
void (*witness)(const char *function) = NULL;

void check(const char *cause, const char *call, const char *function, const char *file, int line) {
    if (cause)
        fail("%s:%d: %s: %s", file, line, call, cause);
    if (witness)
        witness(function);
}

const char *cause_of(cudaError_t error) {
    return error == cudaSuccess ? NULL : cudaGetErrorString(error);
}

const char *cause_of(cublasStatus_t status) {
    return status == CUBLAS_STATUS_SUCCESS ? NULL : cublasGetStatusString(status);
}
#ifdef USE_NCCL
const char *cause_of(ncclResult_t result) {
    if (result == ncclSuccess)
        return NULL;
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
    for (int step = 16; step > 0; step /= 2)
        x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}
__device__ float warp_max(float x) {
    for (int step = 16; step > 0; step /= 2)
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
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
    if (lane == 0)
        part[threadIdx.x / 32] = x;
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
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
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
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(to_shared)),
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
__device__ void warp_product(float (&acc)[MT][NT][4], const floatX *a, int lda, const floatX *b, int ldb, int nk) {
    int lane = threadIdx.x % 32;
#ifdef FP32
    for (int k = 0; k < nk; k++) {
        for (int i = 0; i < MT; i++) {
            for (int j = 0; j < NT; j++) {
                for (int v = 0; v < 4; v++) {
                    int m = 16 * i + lane / 4 + v / 2 * 8, n = 8 * j + lane % 4 * 2 + v % 2;
                    acc[i][j][v] += a[A_BY_K ? k * lda + m : m * lda + k] * b[B_BY_K ? k * ldb + n : n * ldb + k];
                }
            }
        }
    }
#else
    for (int k = 0; k < nk; k += 16) {
        unsigned of_a[MT][4], of_b[NT / 2][4];
#pragma unroll
        for (int i = 0; i < MT; i++) {
            if (A_BY_K)
                load_matrices_transposed(of_a[i], a + (k + lane % 8 + lane / 16 * 8) * lda + 16 * i + lane / 8 % 2 * 8);
            else
                load_matrices(of_a[i], a + (16 * i + lane % 16) * lda + k + lane / 16 * 8);
        }
#pragma unroll
        for (int j = 0; j < NT; j += 2) {
            if (B_BY_K)
                load_matrices_transposed(of_b[j / 2], b + (k + lane % 16) * ldb + 8 * j + lane / 16 * 8);
            else
                load_matrices(of_b[j / 2], b + (8 * j + lane % 8 + lane / 16 * 8) * ldb + k + lane / 8 % 2 * 8);
        }
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
            for (int j = 0; j < NT; j++)
                mma(acc[i][j], of_a[i], of_b[j / 2] + j % 2 * 2);
        }
    }
#endif
}

// ---- ranks
//
// Several processes, each with a device of its own (make train_moe_cu_nccl). NCCL moves what is on the devices, in a stream
// of its own and in the same order on all ranks; MPI starts the processes and moves what is on the hosts.

cudaStream_t network;   // all that travels
cudaEvent_t milestone;  // follow()
cudaEvent_t reached, paces[4]; // await(), keep_pace()
enum { OF_ALL, OF_GROUP, OF_PEERS }; // comm.all, .group and .peers
#ifdef USE_NCCL
ncclComm_t comms[3];
#endif
struct Pause {
    cudaEvent_t begin, end;
} *pauses; // in which `stream` waited for others, since await_device()
int pause_count, pause_room;

// What is queued in `later` from now on comes after what is in `earlier` by now.
void follow(cudaStream_t later, cudaStream_t earlier) {
    CHECK(cudaEventRecord(milestone, earlier));
    CHECK(cudaStreamWaitEvent(later, milestone, 0));
}

// The work queued in `stream` from now on waits for the event. Booked in ranks.traffic.waited once it is known how long.
void wait_for(cudaEvent_t event) {
    if (pause_count == pause_room) {
        pauses = (Pause *)reallocate(pauses, (size_t)pause_room + 64, sizeof(Pause));
        for (; pause_room < pause_count + 64; pause_room++) {
            CHECK(cudaEventCreate(&pauses[pause_room].begin));
            CHECK(cudaEventCreate(&pauses[pause_room].end));
        }
    }
    Pause *p = &pauses[pause_count++];
    CHECK(cudaEventRecord(p->begin, stream));
    CHECK(cudaStreamWaitEvent(stream, event, 0));
    CHECK(cudaEventRecord(p->end, stream));
}

void wait_for_network() {
    CHECK(cudaEventRecord(milestone, network));
    wait_for(milestone);
}

// The host waits for an event; one of several ranks keeps the watch meanwhile, and hears of links that fail.
void await(cudaEvent_t event) {
#ifdef USE_NCCL
    double start = seconds();
    while (MANY && cudaEventQuery(event) == cudaErrorNotReady) {
        keep_watch(start);
        for (int i = 0; i < 3; i++) {
            ncclResult_t error = ncclSuccess;
            CHECK(ncclCommGetAsyncError(comms[i], &error));
            CHECK(error);
        }
    }
#endif
    CHECK(cudaEventSynchronize(event));
}

// Until the stream has done everything.
void await(cudaStream_t which) {
    CHECK(cudaEventRecord(reached, which));
    await(reached);
}

// Called once in each layer: waits until the device has come to where the host was four calls ago. A host that is too far
// ahead finds the device's queue full, and waits in the driver, where it keeps no watch.
void keep_pace() {
    static int turn;
    if (!MANY)
        return;
    turn = (turn + 1) % 4;
    await(paces[turn]);
    CHECK(cudaEventRecord(paces[turn], stream));
}

void await_device() {
    await(stream);
#ifdef USE_NCCL
    float ms;
    for (; pause_count > 0; pause_count--) {
        CHECK(cudaEventElapsedTime(&ms, pauses[pause_count - 1].begin, pauses[pause_count - 1].end));
        ranks.traffic.waited += ms / 1000;
    }
#endif
}

#ifdef USE_NCCL
void start_ranks() {
    const MPI_Comm of[] = {comm.all, comm.group, comm.peers};
    ranks_meet();
    for (int i = 0; i < 3 && !comms[OF_PEERS]; i++) {
        ncclUniqueId id;
        int rank, size;
        MPI_Comm_rank(of[i], &rank);
        MPI_Comm_size(of[i], &size);
        if (rank == 0)
            CHECK(ncclGetUniqueId(&id));
        MPI_Bcast(&id, sizeof(id), MPI_BYTE, 0, of[i]);
        CHECK(ncclCommInitRank(&comms[i], size, id, rank));
    }
}

void end_ranks() {
    for (int i = 0; i < 3 && comms[i]; i++) {
        CHECK(ncclCommDestroy(comms[i]));
        comms[i] = NULL;
    }
}

// What may travel, all of it in `network`. In a build without NCCL nothing does.
void nccl_sum(float *v, size_t n, int of) { // in place
    CHECK(ncclAllReduce(v, v, n, ncclFloat, ncclSum, comms[of], network));
}
void nccl_sum(double *v, size_t n, int of) {
    CHECK(ncclAllReduce(v, v, n, ncclDouble, ncclSum, comms[of], network));
}
void nccl_gather(float *all, size_t mine, size_t n) { // each rank's n numbers, this one's are at `mine`
    CHECK(ncclAllGather(all + mine, all, n, ncclFloat, comms[OF_ALL], network));
}
void nccl_broadcast(const void *from, void *to, size_t bytes, int root) {
    CHECK(ncclBroadcast(from, to, bytes, ncclUint8, root, comms[OF_ALL], network));
}
void nccl_send(const void *from, size_t bytes, int rank) { // of the group
    CHECK(ncclSend(from, bytes, ncclUint8, rank, comms[OF_GROUP], network));
}
void nccl_receive(void *to, size_t bytes, int rank) {
    CHECK(ncclRecv(to, bytes, ncclUint8, rank, comms[OF_GROUP], network));
}
void nccl_begin() { // what is asked for from here on is one operation,
    CHECK(ncclGroupStart());
}
void nccl_end() { // which begins here
    CHECK(ncclGroupEnd());
}
#else
void nccl_sum(float *, size_t, int) {
}
void nccl_sum(double *, size_t, int) {
}
void nccl_gather(float *, size_t, size_t) {
}
void nccl_broadcast(const void *, void *, size_t, int) {
}
void nccl_send(const void *, size_t, int) {
}
void nccl_receive(void *, size_t, int) {
}
void nccl_begin() {
}
void nccl_end() {
}
#endif

// v (n), on the device, = the sum of all ranks' v
void sum_over_ranks(double *v, int n) {
    follow(network, stream);
    nccl_sum(v, (size_t)n, OF_ALL);
    wait_for_network();
}

// Sends row after row of `bytes` to the ranks of the group, and receives such: see the C twin.
void send_rows(const void *out, const int *sent, const int *sent_at, void *in, const int *got, const int *got_at,
               size_t bytes) {
    for (int r = 0; r < ranks.ep; r++) {
        ranks.traffic.sent += r == ranks.member ? 0 : (double)bytes * sent[r];
        if (sent[r])
            nccl_send((const char *)out + sent_at[r] * bytes, sent[r] * bytes, r);
        if (got[r])
            nccl_receive((char *)in + got_at[r] * bytes, got[r] * bytes, r);
    }
}

// What is sent between the two travels at once, after what `stream` has done by now; `arrived` happens when it has come.
void depart() {
    follow(network, stream);
    nccl_begin();
}
void arrive(cudaEvent_t arrived) {
    nccl_end();
    CHECK(cudaEventRecord(arrived, network));
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. The model's arrays

// Where a score stands among others: higher is better, of equal scores the lower index; 0 is below all. -0 equals 0.
typedef unsigned long long Rank;

// Room of a block of select_balanced().
struct Balancer {
    Rank *cost;  // (E,E), as order_of_loss()
    int *mover;  // (E,E)
    int *excess; // (E)
    int *list;   // (n) tokens whose costs are looked up anew
};

// Scratch of all layers' routers.
struct RouterScratch {
    int *sort;            // plan_sort()
    int *active;          // (1) choices that were made, before any was refused
    int *next;            // (n*per) smooth_load()
    double *rows;         // (n*per) losses of rows, or of groups of tokens
    double *part;         // column_sums()
    double *load;         // (groups, E) the smooth load within groups of experts, (groups, D) of these, (groups, D) tokens
                          // sent to them, (groups, E) the load altogether
    double *sent;         // (groups, D) tokens sent to groups of experts
    unsigned char *taken; // (n,E), and
    float *lowest;        // (groups, E): select_by_experts()
    Balancer balancer;    // select_balanced()
    // Of all ranks' tokens, where a group of tokens is spread over them:
    float *all_score, *all_weight;     // (n,E), (n,K)
    int *all_expert, *all_key;         // (n,K)
    unsigned char *all_marks;          // (n)
};

struct Exchange { // half of the tokens of a layer, with several ranks: what was sent and what came
    int rows, came, slots;              // rows sent to all ranks of the group, received from all; these rows' choices here
    int *sent, *sent_at, *got, *got_at; // (ep), the host's: rows sent to each, received from each, and where they begin
    floatX *x, *hidden;                 // (came,C), and the experts' first products
    float *weight;                      // (came,K)
    Plan plan;                          // of what came, for the experts here
    int2 *tile;                         // (tiles) of it
    int tiles;
    Room room;                          // for all these
};

struct Travel { // of half of a layer's tokens, while they are under way
    floatX *in, *answers;     // (came,C) in backward; (came,C)
    float *choices, *dweight; // (came,2K): weights, then the experts' numbers, -1: elsewhere; (came,K)
    Room room;
    cudaEvent_t arrived;
};

// The tables of ::Placement, of all layers, on the device; and in the order of their numbers, where the matrices of the
// experts here begin.
struct Places {
    int *host, *slot;            // (L,E)
    int *width, *activation;     // (L,owned+copies)
    size_t *matrix, *matrix_in;  // (L,owned+copies+1)
};

// What experts on several ranks need besides. Rows sent are those of both halves, one after another.
struct Crossing {
    Travel half[2];
    Places places;
    floatX *out;                       // (rows,C); back come m->rows
    float *choices_out, *dweight_back; // (rows,2K), (rows,K)
    int *counts;                       // (4*ep+1), the host's: of the last dispatch
    floatX *rows, *act, *dhidden;      // the experts' scratch: (slots,C), (slots,F), (slots,H)
    float *dweight_part;               // (column tiles, slots)
    int *sort;
    Room room;
};

// What one layer keeps of its forward pass for its backward pass. n: N tokens, or N*h sub-tokens; c: C or C/h; R routers.
struct LayerState {
    float *x;                      // (N,C): input
    floatX *h1, *qkv, *att, *h2;   // (N,C), (N,(H+2KV)*D), (N,H*D), (N,C)
    float *rstd1, *lse, *mid, *rstd2; // (N), (B,H,T), (N,C) after attention, (N)
    floatX *dense_hidden, *hidden; // (N, 2W or W), (n*K, 2F or F): before the activation
    floatX *sub, *merged;          // (n,c): sub-tokens, and the experts' answers to them
    float *jittered;               // (n,c): the router's input in training, where it has jitter
    float *projected, *gru, *state; // (N,R), (N,4R), (N,R): of the recurrent router
    float *logits, *noisy;         // (n,W) or with noise (n,2W); (n,W)
    Gate gate, groups;             // the experts' gate; that of their groups where they are chosen first
    float *weight;                 // (n,K) of each choice
    double *slope, *weight_slope;  // (groups of tokens * R, E): of the balance losses by p; by the weights
    double *load_slope;            // (groups of tokens, E) and, behind them, (groups of tokens, D): of the smooth load
    Plan plan;
    int2 *tile;                    // (tiles): expert and first slot of each tile of rows
    int tiles;
    // With experts on several ranks:
    Plan sending;                  // rows to ranks: key (n*K): half * ep + rank of each choice, once for each; -1: none
    Exchange *exchange;            // (2), of the host
};

// The experts of a layer. act has rows of `widest` numbers, hidden rows of 2*widest, or of widest where none is gated.
struct Experts {
    int E, C, widest, hidden_width, aligned; // aligned: all rows begin at multiples of 16 bytes
    const int *width, *activation;           // (E)
    const size_t *matrix;                    // (E): where an expert's W_out begins; its W_in: matrix_in
    const size_t *matrix_in;
    const int *offset, *token, *choice;      // of the plan
    const int2 *tile;                        // (tiles): expert and first slot of each tile of rows; expert -1: none
    int tiles;
};

struct LayerPlan { // the C twin's choices for one layer, on the host: see Model
    const int *expert, *key, *gate_expert, *groups_expert;
};

// The C twin's Model, of which memory, angles and dx are the device's here, while stats, crossing and the routes in acts are
// the host's copies; and what else there is.
struct Model : ::Model {
    Weights weights, grads;
    LayerState *layers;           // (L), of the host
    float *x, *rstd, *dh;         // (N,C), (N), (N,C): last layer's output, its norm; the gradient by it
    float *choice_score;          // (n,W): what decides, where it is not p
    float *dlogits, *dnoisy, *dp, *dgroups, *dweight, *dgate, *dgroup_weight; // of the gates
    float *drouter, *dsub;        // (n,c): by the router's input, by sub-tokens
    float *dstate, *dprojected, *gru_room; // (N,R), (N,R), (N,6R); dstate also from the layer above
    double *counts;               // (groups of tokens * R, E)
    unsigned char *marks;         // (n*D)
    int *unbiased;                // (n,K)
    float *logits, *nll, *partial; // (head_rows,V), (N); norms' partial sums
    int head_rows, *offset;       // (V+1): embedding's sort, of the host
    floatX *low;                  // the weights rounded, each where it is in memory[WEIGHTS]; see low_of()
    size_t slots;                 // of a layer, at most
    Crossing *transit;            // of the host
    Experts experts;              // what all layers have in common
    int *device_width;            // (E)
    int *tokens, *targets, words; // (N), (N); distinct words of the batch
    floatX *h, *dx_low, *datt, *dqkv, *rows, *act, *dhidden, *dmerged, *dlogits_low;
    floatX *branch, *cache;       // (N,C): what is added to the residual stream; (L,seq,2*KV*D): generation's, of m->one
    int position;                 // of the token that is generated
    float *router_in;             // (N,C): the router's input, not rounded
    float *delta, *dweight_part;  // (B,H,T); (column tiles, slots)
    double *norm_part;
    RouterScratch router;
    double *report, *host_report; // what the host reads after a step: loss, aux, norm, then of each layer stats_size()
    size_t report_size;
    int *staging;                 // what is on its way to the device, until the event `staged`
    cudaEvent_t staged;
    void **device_memory;
    int device_count, dry;
    Model *one;
    const LayerPlan *decided;     // (L) tests: choices that are taken over instead of made, since a near-tie may go either way
};

// Of a layer in report: count (E), the sum of the lowest scores that each expert took (E, expert choice), recent (E), idle (E)
// as in Statistics; then these - PASSES: the sums in the lowest scores -, and the layer's aux.
enum { ENTROPY, DROPPED, ACTIVE, TOKENS, PASSES, AUX, SINGLE_STATS };
enum { LOSS, TOTAL_AUX, GRADIENT_NORM, SINGLE_REPORTS };

int stats_size(const Config *c) {
    return 4 * c->experts + SINGLE_STATS;
}

double *layer_stats(const Model *m, int l) {
    return m->report + SINGLE_REPORTS + (size_t)l * stats_size(&m->config);
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Norm, rotary positions, attention, embedding

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
    for (int i = 0; i < n; i++)
        to[i] = to_float(p.x[i]);
}

template <int n, class T> __device__ void store_pack(T *to, const float (&from)[n]) {
    Pack<T, n> p;
#pragma unroll
    for (int i = 0; i < n; i++)
        store(&p.x[i], from[i]);
    *(Pack<T, n> *)to = p;
}

template <int n, class To, class From> __global__ void convert_kernel(To *out, const From *x, size_t size) {
    size_t i = n * thread_of_grid();
    float a[n];
    if (i + n <= size) {
        load_pack(a, x + i);
        store_pack(out + i, a);
    } else {
        for (; i < size; i++)
            store(&out[i], to_float(x[i]));
    }
}

template <class To, class From> void convert(To *out, const From *x, size_t size) {
    if (size == 0)
        return;
    if (whole<4>(out, x))
        convert_kernel<4, To, From><<<blocks(size, 4 * THREADS), THREADS, 0, stream>>>(out, x, size);
    else
        convert_kernel<1, To, From><<<blocks(size), THREADS, 0, stream>>>(out, x, size);
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

// With y = x + branch, kept in sum (N,C), or y = x where branch is NULL: out (N,C), rounded, and out32 (N,C), either of
// which may be NULL, = y / rms(y) * w.
template <int n>
__global__ void rmsnorm_forward_kernel(float *sum, floatX *out, float *out32, float *rstd, const float *x, const floatX *branch,
                                       const float *w, int C, float eps) {
    size_t row = (size_t)blockIdx.x * C;
    float a[n], b[n], squares = 0;
    for (int c = n * threadIdx.x; c < C; c += n * blockDim.x) {
        load_pack(a, x + row + c);
        if (branch) {
            load_pack(b, branch + row + c);
            for (int i = 0; i < n; i++)
                a[i] += b[i];
            store_pack(sum + row + c, a);
        }
        for (int i = 0; i < n; i++)
            squares += a[i] * a[i];
    }
    float scale = 1 / sqrtf(block_sum(squares) / C + eps);
    if (threadIdx.x == 0)
        rstd[blockIdx.x] = scale;
    for (int c = n * threadIdx.x; c < C; c += n * blockDim.x) { // each thread what it wrote itself
        load_pack(a, (branch ? sum : x) + row + c);
        load_pack(b, w + c);
        for (int i = 0; i < n; i++)
            a[i] *= scale * b[i];
        if (out)
            store_pack(out + row + c, a);
        if (out32)
            store_pack(out32 + row + c, a);
    }
}

void add_rmsnorm_forward(float *sum, floatX *out, float *out32, float *rstd, const float *x, const floatX *branch,
                         const float *w, int N, int C, double eps) {
    if (N == 0)
        return;
    if (C % 4 == 0 && whole<4>(sum, out32, x, w) && whole<4>(out, branch))
        rmsnorm_forward_kernel<4><<<N, row_threads(C, 4), 0, stream>>>(sum, out, out32, rstd, x, branch, w, C, (float)eps);
    else
        rmsnorm_forward_kernel<1><<<N, row_threads(C, 1), 0, stream>>>(sum, out, out32, rstd, x, branch, w, C, (float)eps);
    CHECK(cudaGetLastError());
}

void rmsnorm_forward(floatX *out, float *out32, float *rstd, const float *x, const float *w, int N, int C, double eps) {
    add_rmsnorm_forward(NULL, out, out32, rstd, x, NULL, w, N, C, eps);
}

template <int n>
__global__ void rmsnorm_backward_kernel(float *dx, floatX *dx_low, const float *dout, const float *x, const float *rstd,
                                        const float *w, int C) {
    size_t row = (size_t)blockIdx.x * C;
    float a[n], b[n], g[n], sum = 0, scale = rstd[blockIdx.x];
    for (int c = n * threadIdx.x; c < C; c += n * blockDim.x) {
        load_pack(a, x + row + c);
        load_pack(b, w + c);
        load_pack(g, dout + row + c);
        for (int i = 0; i < n; i++)
            sum += g[i] * a[i] * b[i];
    }
    float mean = block_sum(sum) * scale * scale * scale / C;
    for (int c = n * threadIdx.x; c < C; c += n * blockDim.x) {
        float d[n];
        load_pack(a, x + row + c);
        load_pack(b, w + c);
        load_pack(g, dout + row + c);
        load_pack(d, dx + row + c);
        for (int i = 0; i < n; i++)
            d[i] += g[i] * b[i] * scale - a[i] * mean;
        store_pack(dx + row + c, d);
        if (dx_low)
            store_pack(dx_low + row + c, d);
    }
}

// partial (chunks of CHUNK tokens, C) = sum of dout * x * rstd over a chunk
__global__ void rmsnorm_partial_kernel(float *partial, const float *dout, const float *x, const float *rstd, int N,
                                       int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x, first = blockIdx.y * CHUNK;
    float sum = 0;
    if (c < C) {
#pragma unroll 8
        for (int n = first; n < min(N, first + CHUNK); n++)
            sum += dout[(size_t)n * C + c] * x[(size_t)n * C + c] * rstd[n];
        partial[(size_t)blockIdx.y * C + c] = sum;
    }
}

// to (C) += the sum over i in from..until of the rows order[i] of x (.,C), of all in turn where order is NULL. For
// blocks of SUM_WARPS warps in the y's of the grid: each block has 32n columns, each warp every so many-th row.
#define SUM_WARPS 8
template <int n> __device__ void add_rows(float *to, const float *x, const int *order, int from, int until, int C) {
    __shared__ float part[SUM_WARPS * n][32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = n * (32 * blockIdx.y + lane);
    float a[n], sum[n] = {0};
#pragma unroll 4
    for (int i = from + warp; i < until && c < C; i += SUM_WARPS) {
        load_pack(a, x + (size_t)(order ? order[i] : i) * C + c);
        for (int j = 0; j < n; j++)
            sum[j] += a[j];
    }
    for (int j = 0; j < n; j++)
        part[warp * n + j][lane] = sum[j];
    __syncthreads();
    if (warp == 0 && c < C) {
        load_pack(a, to + c);
        for (int i = 0; i < SUM_WARPS * n; i++)
            a[i % n] += part[i][lane];
        store_pack(to + c, a);
    }
}

__global__ void add_partial_kernel(float *dw, const float *partial, int chunks, int C) {
    add_rows<1>(dw, partial, NULL, 0, chunks, C);
}

// dx (N,C) += , dw (C) += , and dx_low (N,C), unless NULL, = dx rounded. partial (chunks of N, C).
void rmsnorm_backward(float *dx, floatX *dx_low, float *dw, const float *dout, const float *x, const float *rstd,
                      const float *w, int N, int C, float *partial) {
    int chunks = div_up(N, CHUNK);
    if (N == 0)
        return;
    if (C % 4 == 0 && whole<4>(dx, dx_low, dout, x, w))
        rmsnorm_backward_kernel<4><<<N, row_threads(C, 4), 0, stream>>>(dx, dx_low, dout, x, rstd, w, C);
    else
        rmsnorm_backward_kernel<1><<<N, row_threads(C, 1), 0, stream>>>(dx, dx_low, dout, x, rstd, w, C);
    CHECK(cudaGetLastError());
    rmsnorm_partial_kernel<<<dim3(div_up(C, 64), chunks), 64, 0, stream>>>(partial, dout, x, rstd, N, C);
    CHECK(cudaGetLastError());
    add_partial_kernel<<<dim3(1, div_up(C, 32)), 32 * SUM_WARPS, 0, stream>>>(dw, partial, chunks, C);
    CHECK(cudaGetLastError());
}

// A thread turns n neighbouring pairs.
template <int n>
__global__ void rope_kernel(floatX *qkv, size_t ld, size_t turns, int T, int heads, int D, const float *angles,
                            float direction) {
    size_t task = thread_of_grid(), row = task / (heads * (D / 2 / n));
    int rest = (int)(task % (heads * (D / 2 / n))), h = rest / (D / 2 / n), i = rest % (D / 2 / n) * n;
    if (task >= turns)
        return;
    const float *angle = angles + row % T * D + 2 * i;
    floatX *head = qkv + row * ld + (size_t)h * D + i;
    float a[n], b[n];
    load_pack(a, head);
    load_pack(b, head + D / 2);
    for (int j = 0; j < n; j++) {
        float c = angle[2 * j], s = angle[2 * j + 1] * direction, x = a[j];
        a[j] = x * c - b[j] * s;
        b[j] = b[j] * c + x * s;
    }
    store_pack(head, a);
    store_pack(head + D / 2, b);
}

void rope(floatX *qkv, size_t ld, int N, int T, int heads, int D, const float *angles, float direction) {
    size_t pairs = (size_t)N * heads * (D / 2);
    if (pairs == 0)
        return;
    if (D % 8 == 0 && ld % 4 == 0 && whole<4>(qkv))
        rope_kernel<4><<<blocks(pairs / 4), THREADS, 0, stream>>>(qkv, ld, pairs / 4, T, heads, D, angles, direction);
    else
        rope_kernel<1><<<blocks(pairs), THREADS, 0, stream>>>(qkv, ld, pairs, T, heads, D, angles, direction);
    CHECK(cudaGetLastError());
}

// ---- attention
//
// As in the C twin no (T,T) array exists: a block keeps its queries (or, in backward for dK and dV, its keys) and walks
// along the others, some at a time, which are fetched while it computes (Dao 2023, FlashAttention-2). What a warp
// multiplies next it has just computed: the accumulators of one product are, pair by pair, the a of the next, and never
// leave the registers. A head is W = 16, 32, 64, 128 or 256 wide, beyond D with zeros. Backward has one kernel for dQ
// and one for dK and dV, each of which computes the probabilities again: so each sum has one owner, and a fixed order.
//
// Scores are powers of 2 all along: exp(s/sqrt(D)) = 2^(s*scale), scale = log2(e)/sqrt(D).

#define LOG2E 1.44269504f

// 2^x to 2 ulp; 0 where that is below 2^-126. PTX ISA, ex2.approx.ftz.
__device__ float power_of_2(float x) {
#ifdef CUDACPU
    return exp2f(x);
#else
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#endif
}

// How much a block of WARPS warps holds. Registers bound the 16*MT rows of a warp, shared memory the rows at a time.
template <int W> struct Attention {
    static const int BYTES = W * (int)sizeof(floatX), LD = W + 8, WARPS = BYTES <= 512 ? 4 : 2;
    static const int MT = BYTES <= 256 ? 2 : 1, QUERIES_HELD = 16 * MT * WARPS;      // forward and dQ
    static const int KEYS = BYTES <= 512 ? 64 : 32;                                  // forward, at a time
    static const int KEY_MT = BYTES <= 128 ? 2 : 1, KEYS_HELD = 16 * KEY_MT * WARPS; // dK and dV
    static const int PART = W <= 128 ? W : 128;     // of whose columns a block makes as many
    static const int STEP = BYTES <= 512 ? 32 : 16; // keys or queries at a time in backward
    static const int FORWARD_BYTES = (QUERIES_HELD + 2 * KEYS) * LD * (int)sizeof(floatX);
    static const int QUERY_BYTES = (2 * QUERIES_HELD + 4 * STEP) * LD * (int)sizeof(floatX);
    static const int KEY_BYTES = (2 * KEYS_HELD + 4 * STEP) * LD * (int)sizeof(floatX) + 4 * STEP * (int)sizeof(float);
};

// tile (ROWS,W), rows W + 8 apart, = the first `rows` rows of x (.,D), which are ld apart; the rest is 0. Where
// `whole`, x and ld are multiples of 16 bytes and nothing is waited for. Closes the batch of copies.
template <int W, int ROWS>
__device__ void load_tile(floatX *tile, const floatX *x, size_t ld, int rows, int D, int whole) {
    const unsigned n = 16 / sizeof(floatX), threads = 32 * Attention<W>::WARPS, copies = W / n; // of a row
    int d = threadIdx.x % copies * n;
    for (int r = threadIdx.x / copies; r < ROWS && whole; r += threads / copies) {
        int there = r < rows && d < D;
        copy_async(tile + r * (W + 8) + d, there ? x + r * ld + d : x, there ? 16 : 0);
    }
    for (unsigned i = threadIdx.x; !whole && i < ROWS * W; i += threads) {
        int r = i / W, d = i % W;
        if (r < rows && d < D)
            tile[r * (W + 8) + d] = x[r * ld + d];
        else
            store(&tile[r * (W + 8) + d], 0);
    }
    copy_commit();
}

// acc (16*MT,8*NT) += a (16*MT,8*NK) b (8*NK,8*NT): a is in the registers as another product's acc, number (k,n) of b
// at b[k*ldb + n] in shared memory.
template <int MT, int NT, int NK>
__device__ void register_product(float (&acc)[MT][NT][4], const float (&a)[MT][NK][4], const floatX *b, int ldb) {
    int lane = threadIdx.x % 32;
#ifdef FP32
    for (int k = 0; k < 8 * NK; k++) {
        const float *row = b + k * ldb + lane % 4 * 2;
        for (int i = 0; i < MT; i++) {
            int holder = lane / 4 * 4 + k % 8 / 2;
            float upper = __shfl_sync(ALL_LANES, a[i][k / 8][k % 2], holder);
            float lower = __shfl_sync(ALL_LANES, a[i][k / 8][k % 2 + 2], holder);
            for (int j = 0; j < NT; j++) {
                for (int v = 0; v < 4; v++)
                    acc[i][j][v] += (v < 2 ? upper : lower) * row[8 * j + v % 2];
            }
        }
    }
#else
#pragma unroll
    for (int k = 0; k < NK; k += 2) {
        unsigned of_a[MT][4], of_b[4];
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
            for (int v = 0; v < 4; v++) {
                Pack<__nv_bfloat16, 2> pair;
                store(&pair.x[0], a[i][k + v / 2][v % 2 * 2]);
                store(&pair.x[1], a[i][k + v / 2][v % 2 * 2 + 1]);
                memcpy(&of_a[i][v], &pair, sizeof(pair));
            }
        }
#pragma unroll
        for (int j = 0; j < NT; j += 2) {
            load_matrices_transposed(of_b, b + (8 * k + lane % 16) * ldb + 8 * j + lane / 16 * 8);
#pragma unroll
            for (int i = 0; i < MT; i++) {
                mma(acc[i][j], of_a[i], of_b);
                mma(acc[i][j + 1], of_a[i], of_b + 2);
            }
        }
    }
#endif
}

// Scores of keys that come after the query become -1e30, so that their power of 2 is 0. ahead: how far the first column
// of s is ahead of the first row; sign 1: columns are keys, -1: rows are.
template <int MT, int NT> __device__ void hide_future(float (&s)[MT][NT][4], int ahead, int sign) {
    int lane = threadIdx.x % 32, shift = sign * (ahead + lane % 4 * 2 - lane / 4);
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int v = 0; v < 4; v++) {
                if (shift > sign * (16 * i + v / 2 * 8 - 8 * j - v % 2))
                    s[i][j][v] = -1e30f;
            }
        }
    }
}

// Writes acc, times scale, as rows first... of out, ld apart: those before `rows`, columns before `columns`, even.
template <int MT, int NT>
__device__ void store_rows(floatX *out, size_t ld, const float (&acc)[MT][NT][4], int first, int rows, int columns,
                           float scale) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = first + 16 * i + lane / 4 + 8 * half;
#pragma unroll
            for (int j = 0; j < NT; j++) {
                float pair[2] = {acc[i][j][2 * half] * scale, acc[i][j][2 * half + 1] * scale};
                int column = 8 * j + lane % 4 * 2;
                if (row < rows && column < columns)
                    store_pack(out + row * ld + column, pair);
            }
        }
    }
}

template <int W>
__global__ void attention_forward_kernel(floatX *out, float *lse, const floatX *qkv, int T, int H, int KV, int D,
                                         int whole) {
    typedef Attention<W> A;
    const int MT = A::MT, LD = A::LD, KEYS = A::KEYS;
    extern __shared__ float4 dynamic[];
    floatX *queries = (floatX *)dynamic, *keys = queries + A::QUERIES_HELD * LD, *values = keys + KEYS * LD;
    int tiles = div_up(T, A::QUERIES_HELD), head = blockIdx.x / tiles, b = head / H, h = head % H;
    int first = (tiles - 1 - blockIdx.x % tiles) * A::QUERIES_HELD, last = min(T, first + A::QUERIES_HELD); // longest first
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int mine = first + 16 * MT * warp; // this warp's first query
    size_t ld = (size_t)(H + 2 * KV) * D;
    const floatX *q = qkv + (size_t)b * T * ld + (size_t)h * D;
    const floatX *k = qkv + (size_t)b * T * ld + (size_t)(H + h / (H / KV)) * D, *v = k + (size_t)KV * D;
    float answer[MT][W / 8][4] = {}, highest[MT][2], total[MT][2] = {}, scale = LOG2E / sqrtf((float)D);
    for (int i = 0; i < MT; i++)
        highest[i][0] = highest[i][1] = -1e30f;
    load_tile<W, A::QUERIES_HELD>(queries, q + first * ld, ld, T - first, D, whole);
    load_tile<W, KEYS>(keys, k, ld, T, D, whole);
    for (int key = 0; key < last; key += KEYS) {
        float p[MT][KEYS / 8][4] = {};
        int sees = key < mine + 16 * MT;
        copy_wait<0>();
        __syncthreads(); // the keys are there, and nobody needs the last values
        load_tile<W, KEYS>(values, v + key * ld, ld, T - key, D, whole);
        if (sees) {
            warp_product<MT, KEYS / 8, false, false>(p, queries + 16 * MT * warp * LD, LD, keys, LD, W);
            if (key + KEYS - 1 > mine)
                hide_future(p, key - mine, 1);
#pragma unroll
            for (int i = 0; i < MT; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) { // the row of this lane's p[i][][2*half] and p[i][][2*half+1]
                    float top = highest[i][half], sum = 0;
#pragma unroll
                    for (int j = 0; j < KEYS / 4; j++)
                        top = fmaxf(top, p[i][j / 2][2 * half + j % 2]);
                    top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
                    top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
                    float shrink = power_of_2((highest[i][half] - top) * scale);
                    highest[i][half] = top;
#pragma unroll
                    for (int j = 0; j < KEYS / 4; j++) {
                        float *score = &p[i][j / 2][2 * half + j % 2];
                        sum += *score = power_of_2((*score - top) * scale);
                    }
                    total[i][half] = total[i][half] * shrink + sum; // of this lane's keys
#pragma unroll
                    for (int j = 0; j < W / 4; j++)
                        answer[i][j / 2][2 * half + j % 2] *= shrink;
                }
            }
        }
        copy_wait<0>();
        __syncthreads(); // the values are there, and nobody needs these keys
        if (key + KEYS < last)
            load_tile<W, KEYS>(keys, k + (key + KEYS) * ld, ld, T - key - KEYS, D, whole);
        if (sees)
            register_product(answer, p, values, LD);
    }
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = mine + 16 * i + lane / 4 + 8 * half;
            float sum = total[i][half] + __shfl_xor_sync(ALL_LANES, total[i][half], 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            float share = 1 / sum;
            if (row < T && lane % 4 == 0)
                lse[((size_t)b * H + h) * T + row] = (highest[i][half] * scale + log2f(sum)) * (1 / LOG2E);
#pragma unroll
            for (int j = 0; j < W / 4; j++)
                answer[i][j / 2][2 * half + j % 2] *= share;
        }
    }
    store_rows(out + (size_t)b * T * H * D + (size_t)h * D, (size_t)H * D, answer, mine, T, D, 1);
}

// delta (B,H,T) = dout . out, a warp for each token's head
__global__ void attention_delta_kernel(float *delta, const floatX *dout, const floatX *out, size_t rows, int T, int H,
                                       int D) {
    size_t row = thread_of_grid() / 32, token = row / H;
    float sum = 0;
    for (int d = threadIdx.x % 32; row < rows && d < D; d += 32)
        sum += to_float(dout[row * D + d]) * to_float(out[row * D + d]);
    sum = warp_sum(sum);
    if (row < rows && threadIdx.x % 32 == 0)
        delta[(token / T * H + row % H) * T + token % T] = sum;
}

template <int W>
__global__ void attention_query_kernel(floatX *dqkv, const floatX *dout, const float *lse, const float *delta,
                                       const floatX *qkv, int T, int H, int KV, int D, int whole) {
    typedef Attention<W> A;
    const int MT = A::MT, LD = A::LD, STEP = A::STEP;
    extern __shared__ float4 dynamic[];
    floatX *queries = (floatX *)dynamic, *douts = queries + A::QUERIES_HELD * LD, *steps = douts + A::QUERIES_HELD * LD;
    int tiles = div_up(T, A::QUERIES_HELD), head = blockIdx.x / tiles, b = head / H, h = head % H;
    int first = (tiles - 1 - blockIdx.x % tiles) * A::QUERIES_HELD, last = min(T, first + A::QUERIES_HELD);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, turn = 0;
    int mine = first + 16 * MT * warp;
    size_t ld = (size_t)(H + 2 * KV) * D, width = (size_t)H * D, base = (size_t)b * T * ld;
    const floatX *k = qkv + base + (size_t)(H + h / (H / KV)) * D, *v = k + (size_t)KV * D;
    float dq[MT][W / 8][4] = {}, of_lse[MT][2], of_delta[MT][2], scale = LOG2E / sqrtf((float)D);
    for (int i = 0; i < 2 * MT; i++) {
        int row = mine + 8 * i + lane / 4;
        of_lse[i / 2][i % 2] = row < T ? lse[((size_t)b * H + h) * T + row] * LOG2E : 0;
        of_delta[i / 2][i % 2] = row < T ? delta[((size_t)b * H + h) * T + row] : 0;
    }
    load_tile<W, A::QUERIES_HELD>(queries, qkv + base + first * ld + (size_t)h * D, ld, T - first, D, whole);
    load_tile<W, A::QUERIES_HELD>(douts, dout + ((size_t)b * T + first) * width + (size_t)h * D, width, T - first, D,
                                  whole);
    load_tile<W, STEP>(steps, k, ld, T, D, whole);
    load_tile<W, STEP>(steps + STEP * LD, v, ld, T, D, whole);
    for (int key = 0; key < last; key += STEP, turn ^= 1) {
        const floatX *keys = steps + turn * 2 * STEP * LD, *values = keys + STEP * LD;
        floatX *next = steps + (turn ^ 1) * 2 * STEP * LD;
        copy_wait<0>();
        __syncthreads(); // these keys and values are there, and nobody needs the last ones
        if (key + STEP < last) {
            load_tile<W, STEP>(next, k + (key + STEP) * ld, ld, T - key - STEP, D, whole);
            load_tile<W, STEP>(next + STEP * LD, v + (key + STEP) * ld, ld, T - key - STEP, D, whole);
        }
        if (key >= mine + 16 * MT)
            continue; // the future of all of this warp's queries
        float p[MT][STEP / 8][4] = {}, ds[MT][STEP / 8][4] = {};
        warp_product<MT, STEP / 8, false, false>(p, queries + 16 * MT * warp * LD, LD, keys, LD, W);
        warp_product<MT, STEP / 8, false, false>(ds, douts + 16 * MT * warp * LD, LD, values, LD, W);
        if (key + STEP - 1 > mine)
            hide_future(p, key - mine, 1);
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
            for (int j = 0; j < STEP / 8; j++) {
#pragma unroll
                for (int v = 0; v < 4; v++) {
                    float probability = power_of_2(p[i][j][v] * scale - of_lse[i][v / 2]);
                    ds[i][j][v] = probability * (ds[i][j][v] - of_delta[i][v / 2]);
                }
            }
        }
        register_product(dq, ds, keys, LD);
    }
    store_rows(dqkv + base + (size_t)h * D, ld, dq, mine, T, D, scale / LOG2E);
}

// Rows are keys here and columns queries: p and ds are P and dS transposed. A block makes PART columns of dK and dV.
template <int W>
__global__ void attention_key_kernel(floatX *dqkv, const floatX *dout, const float *lse, const float *delta,
                                     const floatX *qkv, int T, int H, int KV, int D, int whole) {
    typedef Attention<W> A;
    const int MT = A::KEY_MT, LD = A::LD, STEP = A::STEP, group = H / KV;
    extern __shared__ float4 dynamic[];
    floatX *keys = (floatX *)dynamic, *values = keys + A::KEYS_HELD * LD, *steps = values + A::KEYS_HELD * LD;
    float *numbers = (float *)(steps + 4 * STEP * LD); // (2,2,STEP) lse and delta
    int tiles = div_up(T, A::KEYS_HELD), head = blockIdx.x / tiles, b = head / KV, kv = head % KV;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, turn = 0, part = blockIdx.y * A::PART;
    int first = blockIdx.x % tiles * A::KEYS_HELD, mine = first + 16 * MT * warp;
    int start = first / STEP * STEP, steps_of_head = (T - start + STEP - 1) / STEP; // no earlier query sees a key
    size_t ld = (size_t)(H + 2 * KV) * D, width = (size_t)H * D, base = (size_t)b * T * ld;
    size_t key_at = base + (size_t)(H + kv) * D, value_at = key_at + (size_t)KV * D;
    float dk[MT][A::PART / 8][4] = {}, dv[MT][A::PART / 8][4] = {}, scale = LOG2E / sqrtf((float)D);
    load_tile<W, A::KEYS_HELD>(keys, qkv + key_at + first * ld, ld, T - first, D, whole);
    load_tile<W, A::KEYS_HELD>(values, qkv + value_at + first * ld, ld, T - first, D, whole);
    for (int step = -1; step < group * steps_of_head; step++, turn ^= 1) { // of step -1 there is only the loading
        const floatX *queries = steps + turn * 2 * STEP * LD, *douts = queries + STEP * LD;
        const float *of_lse = numbers + turn * 2 * STEP, *of_delta = of_lse + STEP;
        int query = start + step % steps_of_head * STEP, next = start + (step + 1) % steps_of_head * STEP;
        int more = step + 1 < group * steps_of_head, h = kv * group + (step + 1) / steps_of_head;
        float next_lse = 0, next_delta = 0; // under way while this step is computed
        copy_wait<0>();
        __syncthreads(); // these queries are there, and nobody needs the last ones
        if (more) {
            floatX *to = steps + (turn ^ 1) * 2 * STEP * LD;
            size_t row = (size_t)b * T + next, from = row * ld + (size_t)h * D;
            load_tile<W, STEP>(to, qkv + from, ld, T - next, D, whole);
            load_tile<W, STEP>(to + STEP * LD, dout + row * width + (size_t)h * D, width, T - next, D, whole);
            if (threadIdx.x < STEP && next + (int)threadIdx.x < T) {
                next_lse = lse[((size_t)b * H + h) * T + next + threadIdx.x] * LOG2E;
                next_delta = delta[((size_t)b * H + h) * T + next + threadIdx.x];
            }
        }
        if (step >= 0 && query + STEP > mine) {
            float p[MT][STEP / 8][4] = {}, ds[MT][STEP / 8][4] = {};
            warp_product<MT, STEP / 8, false, false>(p, keys + 16 * MT * warp * LD, LD, queries, LD, W);
            warp_product<MT, STEP / 8, false, false>(ds, values + 16 * MT * warp * LD, LD, douts, LD, W);
            if (mine + 16 * MT - 1 > query)
                hide_future(p, query - mine, -1);
#pragma unroll
            for (int j = 0; j < STEP / 4; j++) {
                int column = j / 2 * 8 + lane % 4 * 2 + j % 2;
                float its_lse = of_lse[column], its_delta = of_delta[column];
#pragma unroll
                for (int i = 0; i < 2 * MT; i++) {
                    float *score = &p[i / 2][j / 2][i % 2 * 2 + j % 2], *slope = &ds[i / 2][j / 2][i % 2 * 2 + j % 2];
                    *score = power_of_2(*score * scale - its_lse);
                    *slope = *score * (*slope - its_delta);
                }
            }
            register_product(dv, p, douts + part, LD);
            register_product(dk, ds, queries + part, LD);
        }
        if (more && threadIdx.x < STEP) {
            numbers[(turn ^ 1) * 2 * STEP + threadIdx.x] = next_lse;
            numbers[(turn ^ 1) * 2 * STEP + STEP + threadIdx.x] = next_delta;
        }
    }
    store_rows(dqkv + key_at + part, ld, dk, mine, T, D - part, scale / LOG2E);
    store_rows(dqkv + value_at + part, ld, dv, mine, T, D - part, 1);
}

template <int W>
void attention_forward_of(floatX *out, float *lse, const floatX *qkv, int B, int T, int H, int KV, int D, int whole) {
    typedef Attention<W> A;
    int grid = B * H * div_up(T, A::QUERIES_HELD);
    CHECK(cudaFuncSetAttribute(attention_forward_kernel<W>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               A::FORWARD_BYTES));
    attention_forward_kernel<W><<<grid, 32 * A::WARPS, A::FORWARD_BYTES, stream>>>(out, lse, qkv, T, H, KV, D, whole);
    CHECK(cudaGetLastError());
}

template <int W>
void attention_backward_of(floatX *dqkv, const floatX *dout, const float *lse, const float *delta, const floatX *qkv,
                           int B, int T, int H, int KV, int D, int whole) {
    typedef Attention<W> A;
    int queries = B * H * div_up(T, A::QUERIES_HELD);
    dim3 keys(B * KV * div_up(T, A::KEYS_HELD), div_up(D, A::PART));
    CHECK(cudaFuncSetAttribute(attention_query_kernel<W>, cudaFuncAttributeMaxDynamicSharedMemorySize, A::QUERY_BYTES));
    CHECK(cudaFuncSetAttribute(attention_key_kernel<W>, cudaFuncAttributeMaxDynamicSharedMemorySize, A::KEY_BYTES));
    attention_query_kernel<W><<<queries, 32 * A::WARPS, A::QUERY_BYTES, stream>>>(dqkv, dout, lse, delta, qkv, T, H, KV,
                                                                                  D, whole);
    CHECK(cudaGetLastError());
    attention_key_kernel<W><<<keys, 32 * A::WARPS, A::KEY_BYTES, stream>>>(dqkv, dout, lse, delta, qkv, T, H, KV, D,
                                                                              whole);
    CHECK(cudaGetLastError());
}

// Whether rows of heads can be copied 16 bytes at a time.
int whole_heads(int D, const floatX *a, const floatX *b) {
    const int n = 16 / (int)sizeof(floatX);
    if (D % 2 || D > 256)
        fail("on the GPU a head's width is even and at most 256, not %d", D);
    return D % n == 0 && whole<n>(a, b);
}

void attention_forward(floatX *out, float *lse, const floatX *qkv, int B, int T, int H, int KV, int D) {
    int whole = whole_heads(D, qkv, qkv);
    if (B * T == 0)
        return;
    if (D <= 16)
        attention_forward_of<16>(out, lse, qkv, B, T, H, KV, D, whole);
    else if (D <= 32)
        attention_forward_of<32>(out, lse, qkv, B, T, H, KV, D, whole);
    else if (D <= 64)
        attention_forward_of<64>(out, lse, qkv, B, T, H, KV, D, whole);
    else if (D <= 128)
        attention_forward_of<128>(out, lse, qkv, B, T, H, KV, D, whole);
    else
        attention_forward_of<256>(out, lse, qkv, B, T, H, KV, D, whole);
}

// Writes dqkv. delta (B,H,T) is scratch.
void attention_backward(floatX *dqkv, const floatX *dout, const floatX *out, const float *lse, const floatX *qkv, int B,
                        int T, int H, int KV, int D, float *delta) {
    int whole = whole_heads(D, qkv, dout);
    size_t rows = (size_t)B * T * H;
    if (rows == 0)
        return;
    attention_delta_kernel<<<blocks(rows, THREADS / 32), THREADS, 0, stream>>>(delta, dout, out, rows, T, H, D);
    CHECK(cudaGetLastError());
    if (D <= 16)
        attention_backward_of<16>(dqkv, dout, lse, delta, qkv, B, T, H, KV, D, whole);
    else if (D <= 32)
        attention_backward_of<32>(dqkv, dout, lse, delta, qkv, B, T, H, KV, D, whole);
    else if (D <= 64)
        attention_backward_of<64>(dqkv, dout, lse, delta, qkv, B, T, H, KV, D, whole);
    else if (D <= 128)
        attention_backward_of<128>(dqkv, dout, lse, delta, qkv, B, T, H, KV, D, whole);
    else
        attention_backward_of<256>(dqkv, dout, lse, delta, qkv, B, T, H, KV, D, whole);
}

// A block is one query head. Each warp takes positions some at a time, with a highest score, a sum and an answer of its
// own, which are put together at the end.
#define ONE_WARPS 16
__global__ void attention_of_one_kernel(floatX *out, floatX *cache, const floatX *qkv, int slot, int seen, int H,
                                        int KV, int D) {
    const int AT_ONCE = 4, COLUMNS = 256 / 32;
    __shared__ float highest[ONE_WARPS];
    __shared__ float total[ONE_WARPS];
    __shared__ float answer[ONE_WARPS][256];
    int h = blockIdx.x, kv = h / (H / KV), warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = 2 * KV * D;
    const floatX *fresh = qkv + (size_t)H * D + (size_t)kv * D; // this position's key; its value is KV*D further on
    float q[COLUMNS] = {}, sum[COLUMNS] = {}, top = -1e30f, all = 0, scale = LOG2E / sqrtf((float)D);
    for (int d = threadIdx.x; h % (H / KV) == 0 && d < D; d += blockDim.x) {
        cache[(size_t)slot * width + kv * D + d] = fresh[d];
        cache[(size_t)slot * width + (KV + kv) * D + d] = fresh[KV * D + d];
    }
#pragma unroll
    for (int j = 0; j < COLUMNS; j++)
        q[j] = lane + 32 * j < D ? to_float(qkv[(size_t)h * D + lane + 32 * j]) * scale : 0;
    for (int t = warp * AT_ONCE; t < seen; t += ONE_WARPS * AT_ONCE) {
        const floatX *key[AT_ONCE];
        float score[AT_ONCE] = {}, before = top;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) { // other blocks may not have written the slot yet
            key[i] = t + i < seen && t + i != slot ? cache + (size_t)(t + i) * width + kv * D : fresh;
#pragma unroll
            for (int j = 0; j < COLUMNS; j++)
                score[i] += lane + 32 * j < D ? q[j] * to_float(key[i][lane + 32 * j]) : 0;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            score[i] = t + i < seen ? warp_sum(score[i]) : -1e30f;
            top = fmaxf(top, score[i]);
        }
        float shrink = power_of_2(before - top);
        all *= shrink;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++)
            sum[j] *= shrink;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            float p = power_of_2(score[i] - top);
            all += p;
#pragma unroll
            for (int j = 0; j < COLUMNS; j++)
                sum[j] += lane + 32 * j < D ? p * to_float(key[i][KV * D + lane + 32 * j]) : 0;
        }
    }
    for (int j = 0; j < COLUMNS; j++)
        answer[warp][lane + 32 * j] = sum[j];
    if (lane == 0) {
        highest[warp] = top;
        total[warp] = all;
    }
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        float best = highest[0], x = 0, ones = 0;
        for (int w = 1; w < ONE_WARPS; w++)
            best = fmaxf(best, highest[w]);
        for (int w = 0; w < ONE_WARPS; w++) {
            x += answer[w][d] * power_of_2(highest[w] - best);
            ones += total[w] * power_of_2(highest[w] - best);
        }
        store(&out[(size_t)h * D + d], x / ones);
    }
}

// The attention of one layer in model_generate: keys and values of the token at `position` in qkv ((H+2KV)*D), already
// turned, go to their row of cache (seq,2*KV*D); out (H*D) is what the token takes from the last seq positions.
void attention_of_one(floatX *out, floatX *cache, const floatX *qkv, int position, int seq, int H, int KV, int D) {
    int seen = min_int(position + 1, seq), slot = position % seq;
    if (D > 256)
        fail("on the GPU a head's width is at most 256, not %d", D);
    attention_of_one_kernel<<<H, 32 * ONE_WARPS, 0, stream>>>(out, cache, qkv, slot, seen, H, KV, D);
    CHECK(cudaGetLastError());
}

// ---- embedding

template <int n>
__global__ void embedding_forward_kernel(float *x, const float *embedding, const int *tokens, size_t size, int C) {
    size_t i = n * thread_of_grid();
    float a[n];
    if (i < size) {
        load_pack(a, embedding + (size_t)tokens[i / C] * C + i % C);
        store_pack(x + i, a);
    }
}

void embedding_forward(float *x, const float *embedding, const int *tokens, int N, int C) {
    size_t size = (size_t)N * C;
    if (N == 0)
        return;
    if (C % 4 == 0 && whole<4>(x, embedding))
        embedding_forward_kernel<4><<<blocks(size, 4 * THREADS), THREADS, 0, stream>>>(x, embedding, tokens, size, C);
    else
        embedding_forward_kernel<1><<<blocks(size), THREADS, 0, stream>>>(x, embedding, tokens, size, C);
    CHECK(cudaGetLastError());
}

template <int n>
__global__ void embedding_backward_kernel(float *dembedding, const float *dx, const int *order, const int *words,
                                          const int *offset, int C) {
    int from = offset[blockIdx.x], until = offset[blockIdx.x + 1];
    add_rows<n>(dembedding + (size_t)words[blockIdx.x] * C, dx, order, from, until, C);
}

// dembedding (V,C) += . The host has sorted the tokens: order (N) lists them by word, words (count) are the words that
// occur, offset (count+1) says where each begins in order.
void embedding_backward(float *dembedding, const float *dx, const int *order, const int *words, const int *offset,
                        int count, int C) {
    dim3 by_four(count, div_up(C, 4 * 32)), by_one(count, div_up(C, 32));
    if (count == 0)
        return;
    if (C % 4 == 0 && whole<4>(dembedding, dx))
        embedding_backward_kernel<4><<<by_four, 32 * SUM_WARPS, 0, stream>>>(dembedding, dx, order, words, offset, C);
    else
        embedding_backward_kernel<1><<<by_one, 32 * SUM_WARPS, 0, stream>>>(dembedding, dx, order, words, offset, C);
    CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. Loss and AdamW

// A block has a row. First pass: each thread keeps the highest of its logits and the sum of exp(logit - highest).
template <int n>
__global__ void cross_entropy_kernel(float *nll, floatX *dlogits, const float *logits, const int *targets, int V,
                                     float scale) {
    __shared__ float highest[32];
    const float *row = logits + (size_t)blockIdx.x * V;
    int target = targets[blockIdx.x], warps = blockDim.x / 32, lane = threadIdx.x % 32;
    float a[n], top = -1e30f, sum = 0, right = row[target];
    for (int v = n * threadIdx.x; v < V; v += n * blockDim.x) {
        float before = top;
        load_pack(a, row + v);
        for (int i = 0; i < n; i++)
            top = fmaxf(top, a[i]);
        sum *= expf(before - top);
        for (int i = 0; i < n; i++)
            sum += expf(a[i] - top);
    }
    float most = warp_max(top);
    if (lane == 0)
        highest[threadIdx.x / 32] = most;
    __syncthreads();
    most = warp_max(lane < warps ? highest[lane] : -1e30f);
    sum = block_sum(sum * expf(top - most));
    if (threadIdx.x == 0)
        nll[blockIdx.x] = most + logf(sum) - right;
    float share = scale / sum;
    for (int v = n * threadIdx.x; dlogits && v < V; v += n * blockDim.x) {
        load_pack(a, row + v);
        for (int i = 0; i < n; i++)
            a[i] = expf(a[i] - most) * share - (v + i == target ? scale : 0);
        store_pack(dlogits + (size_t)blockIdx.x * V + v, a);
    }
}

// The second half of head_loss: nll (rows), in nats, of logits (rows,V) against targets, and, unless NULL, dlogits
// (rows,V) = scale * (p - onehot), the gradient of scale * sum(nll). In float dlogits may be logits.
void cross_entropy(float *nll, floatX *dlogits, const float *logits, const int *targets, int rows, int V, float scale) {
    if (rows == 0)
        return;
    if (V % 4 == 0 && whole<4>(dlogits, logits))
        cross_entropy_kernel<4><<<rows, row_threads(V, 4), 0, stream>>>(nll, dlogits, logits, targets, V, scale);
    else
        cross_entropy_kernel<1><<<rows, row_threads(V, 1), 0, stream>>>(nll, dlogits, logits, targets, V, scale);
    CHECK(cudaGetLastError());
}

__global__ void add_mean_kernel(double *to, const float *x, int N, double scale) {
    double sum = 0;
    for (int i = threadIdx.x; i < N; i += blockDim.x)
        sum += (double)x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        *to += scale * (sum / N);
}

// *to += scale * mean of x (N)
void add_mean(double *to, const float *x, int N, double scale) {
    add_mean_kernel<<<1, 1024, 0, stream>>>(to, x, N, scale);
    CHECK(cudaGetLastError());
}

#define NORM_PARTS 1024
template <int n> __global__ void sum_squares_kernel(double *part, const float *g, size_t size) {
    double sum = 0;
    float a[n];
    for (size_t i = n * thread_of_grid(); i < size; i += (size_t)n * gridDim.x * THREADS) {
        if (i + n <= size)
            load_pack(a, g + i);
        for (int j = 0; j < n; j++) {
            double x = i + n <= size ? a[j] : i + j < size ? g[i + j] : 0;
            sum += x * x;
        }
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        part[blockIdx.x] = sum;
}

__global__ void root_of_sum_kernel(double *norm, const double *part, int parts) {
    double sum = block_sum((int)threadIdx.x < parts ? part[threadIdx.x] : 0);
    if (threadIdx.x == 0)
        *norm = sqrt(sum);
}

// part (NORM_PARTS) = sums of squares of g (size); returns how many.
int sum_of_squares(double *part, const float *g, size_t size) {
    int parts = (int)(size < (size_t)NORM_PARTS * 4 * THREADS ? blocks(size + 1, 4 * THREADS) : NORM_PARTS);
    if (whole<4>(g))
        sum_squares_kernel<4><<<parts, THREADS, 0, stream>>>(part, g, size);
    else
        sum_squares_kernel<1><<<parts, THREADS, 0, stream>>>(part, g, size);
    CHECK(cudaGetLastError());
    return parts;
}

// *norm = the norm of all gradients g (size) together. part (NORM_PARTS) is scratch.
void gradient_norm(double *norm, const float *g, size_t size, double *part) {
    int parts = gpu::sum_of_squares(part, g, size);
    root_of_sum_kernel<<<1, NORM_PARTS, 0, stream>>>(norm, part, parts);
    CHECK(cudaGetLastError());
}

template <int n>
__global__ void adamw_kernel(float *w, floatX *low, float *g, float *m1, float *m2, size_t size, const double *norm,
                             double clip, float rate, float keep, float b1, float b2, float fix1, float fix2,
                             float eps) {
    size_t i = n * thread_of_grid();
    float a[n], grad[n], first[n], second[n], zero[n] = {0};
    if (i >= size || !isfinite(*norm))
        return;
    float scale = (float)(clip > 0 && *norm > clip ? clip / *norm : 1);
    load_pack(a, w + i);
    load_pack(grad, g + i);
    load_pack(first, m1 + i);
    load_pack(second, m2 + i);
    for (int j = 0; j < n; j++) {
        grad[j] *= scale;
        first[j] = b1 * first[j] + (1 - b1) * grad[j];
        second[j] = b2 * second[j] + (1 - b2) * grad[j] * grad[j];
        a[j] = keep * a[j] - rate * (first[j] * fix1) / (sqrtf(second[j] * fix2) + eps);
    }
    store_pack(w + i, a);
    store_pack(m1 + i, first);
    store_pack(m2 + i, second);
    store_pack(g + i, zero);
    if (low)
        store_pack(low + i, a);
}

// AdamW of one tensor in model_update: keep is 1 - lr * decay, rate lr, fix1 and fix2 are 1 / (1 - b^step). The
// gradients are scaled down where *norm is above clip, unless clip is 0, and cleared. low (size), unless NULL or w
// itself, = w rounded. Nothing happens where *norm is not finite.
void adamw(float *w, floatX *low, float *g, float *m1, float *m2, size_t size, const double *norm, double clip,
           float rate, float keep, float b1, float b2, float fix1, float fix2, float eps) {
    size_t packed = whole<4>(w, low, g, m1, m2) ? size / 4 * 4 : 0, rest = size - packed;
    low = (void *)low == (void *)w ? NULL : low;
    if (packed) {
        adamw_kernel<4><<<blocks(packed, 4 * THREADS), THREADS, 0, stream>>>(w, low, g, m1, m2, packed, norm, clip,
                                                                             rate, keep, b1, b2, fix1, fix2, eps);
        CHECK(cudaGetLastError());
    }
    if (rest) {
        adamw_kernel<1><<<blocks(rest), THREADS, 0, stream>>>(w + packed, low ? low + packed : NULL, g + packed,
                                                              m1 + packed, m2 + packed, rest, norm, clip, rate, keep,
                                                              b1, b2, fix1, fix2, eps);
        CHECK(cudaGetLastError());
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. Products
//
// What every token passes is multiplied by cuBLAS. The experts' rows are picked out of the batch by index and their
// number is known to the device alone, which cuBLAS does not do: the second half of this section does.

cublasHandle_t cublas;

// A matrix in memory, its rows ld apart. A product sums over k; either k runs along a row, or each row belongs to one k. So
// with x (N,C), W (F,C) and dout (N,F):
//   out  (N,F) = x W^T       along_rows(x) times along_rows(W):          k is C, and runs along the rows of both
//   dx   (N,C) = dout W      along_rows(dout) times along_columns(W):    k is F, and each row of W belongs to one k
//   dW   (F,C) = dout^T x    along_columns(dout) times along_columns(x): k is N
template <class T> struct Operand {
    const T *p;
    size_t ld;
    int row_is_k;
};

template <class T> Operand<T> along_rows(const T *p, size_t ld) {
    return {p, ld, 0};
}

template <class T> Operand<T> along_columns(const T *p, size_t ld) {
    return {p, ld, 1};
}

cudaDataType type_of(const float *) {
    return CUDA_R_32F;
}
cudaDataType type_of(const __nv_bfloat16 *) {
    return CUDA_R_16BF;
}

// out (m,n) = or += a times b, both of floatX or both of float; sums in float32, without TF32. A row-major matrix is to
// cuBLAS the transpose of a column-major one, so it is asked for out^T = b^T a^T.
template <class Out, class In>
void product(Out *out, Operand<In> a, Operand<In> b, int m, int n, int k, int accumulate) {
    float one = 1, beta = (float)accumulate;
    if (m > 0 && n > 0)
        CHECK(cublasGemmEx(cublas, b.row_is_k ? CUBLAS_OP_N : CUBLAS_OP_T, a.row_is_k ? CUBLAS_OP_T : CUBLAS_OP_N, n, m, k,
                           &one, b.p, type_of(b.p), (int)b.ld, a.p, type_of(a.p), (int)a.ld, &beta, out, type_of(out), n,
                           CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

// ---- the experts' products
//
// One kernel for all six products of a mixture of experts: hidden, answer, and four backward. A block makes one tile of
// TM x TN results of one expert. It finds out on the device which (tile list, offsets), fetches rows by index straight
// into shared memory, STAGES - 1 tiles of TK ahead of the tensor cores, and does at the end what would else be a pass over
// memory of its own: the activation, its derivative, the gate's weight.
//
//        by slot:                      A (rows,k)              B (k,columns)       at the end
//   HIDDEN   hidden = x W_in^T         x[token], gathered      W_in (H,C)          act = f(gate) * up
//   ANSWER   rows = act W_out^T        act                     W_out (C,F)         times the gate's weight
//   DHIDDEN  dact = dout W_out         dout[token], gathered   W_out, by k         dhidden, dweight; act again
//   DROWS    rows = dhidden W_in       dhidden                 W_in, by k
//        by weight, k being the expert's slots:
//   DOUT     dW_out += dout^T act      dout[token], by k       act, by k
//   DIN      dW_in += dhidden^T x      dhidden, by k           x[token], by k

enum { HIDDEN, ANSWER, DHIDDEN, DROWS, DOUT, DIN };
const int TM = 128, TN = 128, TK = 32, STAGES = 3;

struct ExpertsData { // what a product reads and writes, in the table's order
    const floatX *a, *b, *hidden; // hidden (slots,H): DHIDDEN's
    floatX *out, *act;            // out: hidden (slots,H), rows (slots,C) or dhidden (slots,H); act (slots,F)
    float *grad;                  // dW_out or dW_in
    const float *weight;          // (n*K) by choice; NULL: all 1
    float *dweight;               // (column tiles, slots): each tile's part
    size_t slots;
    int across; // column tiles
};

// The activation function f at x, and its slope.
__device__ void activate(int activation, float x, float *value, float *slope) {
    if (activation == SWIGLU) {
        float sigmoid = 1 / (1 + __expf(-x));
        *value = x * sigmoid;
        *slope = sigmoid * (1 + x * (1 - sigmoid));
    } else if (activation == RELU) {
        *value = x > 0 ? x : 0;
        *slope = x > 0 ? 1 : 0;
    } else {
        float phi = 0.5f * (1 + erff(x * 0.70710678f));
        *value = x * phi;
        *slope = phi + x * __expf(-0.5f * x * x) * 0.39894228f;
    }
}

// 16 bytes of a tile in shared memory, of whose numbers n are there; the others are 0.
template <bool ALIGNED> __device__ void fetch(floatX *to, const floatX *from, int n) {
    if (ALIGNED) {
        copy_async(to, from, n * (int)sizeof(floatX));
        return;
    }
    for (int i = 0; i < 16 / (int)sizeof(floatX); i++)
        store(&to[i], i < n ? to_float(from[i]) : 0);
}

// Two neighbours, of which n are there.
template <bool ALIGNED, class T> __device__ void load_pair(float (&to)[2], const T *from, int n) {
    if (ALIGNED && n > 1) {
        load_pack(to, from);
        return;
    }
    to[0] = n > 0 ? to_float(from[0]) : 0;
    to[1] = n > 1 ? to_float(from[1]) : 0;
}

template <bool ALIGNED, class T> __device__ void store_pair(T *to, float x, float y, int n) {
    if (ALIGNED && n > 1) {
        float pair[2] = {x, y};
        store_pack(to, pair);
        return;
    }
    if (n > 0)
        store(to, x);
    if (n > 1)
        store(to + 1, y);
}

template <int WHAT> struct Shape { // of the tiles in shared memory: by k, or along k
    static constexpr bool by_weight = WHAT == DOUT || WHAT == DIN;
    static constexpr bool a_by_k = by_weight, b_by_k = WHAT >= DHIDDEN;
    static constexpr int a_ld = a_by_k ? TM + 8 : TK + 8, b_ld = b_by_k ? TN + 8 : TK + 8;
    static constexpr int a_size = a_by_k ? TK * a_ld : TM * a_ld, b_size = b_by_k ? TK * b_ld : TN * b_ld;
    static constexpr int bytes = STAGES * (a_size + b_size) * (int)sizeof(floatX);
};

// 8 warps, 2 x 4 of them, each (64,32) of the tile. With rows, columns and depth (k) of an expert's product:
//   HIDDEN rows x H x C   ANSWER rows x C x F   DHIDDEN rows x F x C   DROWS rows x C x H   DOUT C x F x rows   DIN H x C x rows
template <int WHAT, bool ALIGNED> __global__ void __launch_bounds__(THREADS, 2) experts_kernel(Experts x, ExpertsData d) {
    typedef Shape<WHAT> S;
    extern __shared__ float4 dynamic[];
    __shared__ float part[TM][4];
    int C = x.C, e, first, rows, m0 = 0, across = S::by_weight ? blockIdx.y : blockIdx.x % d.across, column = across * TN;
    if (S::by_weight) {
        e = blockIdx.z;
        first = x.offset[e];
        rows = x.offset[e + 1] - first;
        m0 = blockIdx.x * TM;
    } else { // the columns of a tile of rows one after another, while its rows are in the cache
        int2 tile = x.tile[blockIdx.x / d.across];
        e = tile.x;
        first = tile.y;
        rows = e < 0 ? 0 : min(TM, x.offset[e + 1] - first);
    }
    if (rows == 0)
        return;
    int F = x.width[e], activation = x.activation[e], gated = activation == SWIGLU || activation == GEGLU;
    int H = F * (1 + gated), pairs = WHAT == HIDDEN && gated; // a tile of HIDDEN has 64 columns of gate and their 64 of up
    if (pairs)
        column /= 2;
    int columns = WHAT == HIDDEN || WHAT == DHIDDEN || WHAT == DOUT ? F : C;
    int high = WHAT == DOUT ? C : WHAT == DIN ? H : rows;
    int depth = S::by_weight ? rows : WHAT == ANSWER ? F : WHAT == DROWS ? H : C;
    for (int r = threadIdx.x; WHAT == DHIDDEN && column >= columns && r < rows; r += THREADS)
        d.dweight[across * d.slots + first + r] = 0; // of an expert narrower than others
    if (column >= columns || m0 >= high)
        return;

    // Each thread fetches the same places of each tile: the rows are looked up once, and the pointers move along k. Of rows
    // that are tokens by k, a tile ahead is looked up.
    const int EACH = 16 / (int)sizeof(floatX), COUNT = TM * TK / EACH / THREADS;
    const int A_WIDTH = S::a_by_k ? TM : TK, B_WIDTH = S::b_by_k ? TN : TK;
    const int A_STEP = THREADS * EACH / A_WIDTH, B_STEP = THREADS * EACH / B_WIDTH;
    int a_row = threadIdx.x / (A_WIDTH / EACH), a_column = threadIdx.x % (A_WIDTH / EACH) * EACH;
    int b_row = threadIdx.x / (B_WIDTH / EACH), b_column = threadIdx.x % (B_WIDTH / EACH) * EACH;
    size_t act_ld = x.widest, hidden_ld = x.hidden_width;
    size_t a_ld = WHAT == ANSWER ? act_ld : WHAT == DROWS || WHAT == DIN ? hidden_ld : C;
    size_t b_ld = WHAT == ANSWER || WHAT == DHIDDEN ? F : WHAT == DOUT ? act_ld : C;
    const floatX *from_a[COUNT], *from_b[COUNT], *w = d.b;
    if (!S::by_weight)
        w += WHAT == HIDDEN || WHAT == DROWS ? x.matrix_in[e] : x.matrix[e];
    int token[COUNT] = {};
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        int r = a_row + i * A_STEP, c = b_row + i * B_STEP, f = column + c;
        if (S::by_weight) {
            from_a[i] = d.a + (WHAT == DIN ? (first + r) * a_ld : 0) + m0 + a_column;
            from_b[i] = w + (WHAT == DOUT ? (first + c) * b_ld : 0) + column + b_column;
            token[i] = r < depth ? x.token[first + r] : 0;
            continue;
        }
        size_t row = r >= rows ? 0 : WHAT == HIDDEN || WHAT == DHIDDEN ? x.token[first + r] : first + r;
        from_a[i] = r < rows ? d.a + row * a_ld + a_column : NULL;
        if (pairs) // eight rows of gate, their eight of up, and so on
            f = column + c / 16 * 8 + c % 8;
        if (S::b_by_k)
            from_b[i] = w + c * b_ld + column + b_column;
        else
            from_b[i] = f < columns ? w + (size_t)(pairs ? c / 8 % 2 * F + f : f) * b_ld + b_column : NULL;
    }
    floatX *tiles = (floatX *)dynamic;
    auto fetch_tiles = [&](int stage, int k0) {
        floatX *a = tiles + stage * (S::a_size + S::b_size) + a_row * S::a_ld + a_column;
        floatX *b = tiles + stage * (S::a_size + S::b_size) + S::a_size + b_row * S::b_ld + b_column;
        if (k0 >= depth)
            return;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            int a_k = k0 + (S::a_by_k ? a_row + i * A_STEP : a_column), b_k = k0 + (S::b_by_k ? b_row + i * B_STEP : b_column);
            int a_n = S::a_by_k ? high - m0 - a_column : depth - a_k, b_n = S::b_by_k ? columns - column - b_column : depth - b_k;
            a_n = from_a[i] && a_k < depth ? min(max(a_n, 0), EACH) : 0;
            b_n = from_b[i] && b_k < depth ? min(max(b_n, 0), EACH) : 0;
            const floatX *next_a = from_a[i] + (WHAT == DOUT ? token[i] * a_ld : 0);
            const floatX *next_b = from_b[i] + (WHAT == DIN ? token[i] * b_ld : 0);
            fetch<ALIGNED>(a + i * A_STEP * S::a_ld, a_n ? next_a : d.a, a_n);
            fetch<ALIGNED>(b + i * B_STEP * S::b_ld, b_n ? next_b : d.b, b_n);
            if (WHAT != DOUT && from_a[i])
                from_a[i] += S::a_by_k ? TK * a_ld : TK;
            if (WHAT != DIN && from_b[i])
                from_b[i] += S::b_by_k ? TK * b_ld : TK;
            if (S::by_weight && k0 + TK + a_row + i * A_STEP < depth)
                token[i] = x.token[first + k0 + TK + a_row + i * A_STEP];
        }
    };
    float acc[4][4][4] = {};
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp / 4 * 64, wn = warp % 4 * 32;
    for (int s = 0; s < STAGES - 1; s++) {
        fetch_tiles(s, s * TK);
        copy_commit();
    }
    for (int k0 = 0, t = 0; k0 < depth; k0 += TK, t++) {
        copy_wait<STAGES - 2>();
        __syncthreads(); // the tile is there, and the one before it has been used up by all
        fetch_tiles((t + STAGES - 1) % STAGES, k0 + (STAGES - 1) * TK);
        copy_commit();
        const floatX *a = tiles + t % STAGES * (S::a_size + S::b_size), *b = a + S::a_size;
        if (m0 + wm < high) // a small expert leaves warps without rows
            warp_product<4, 4, S::a_by_k, S::b_by_k>(acc, a + (S::a_by_k ? wm : wm * S::a_ld), S::a_ld,
                                                     b + (S::b_by_k ? wn : wn * S::b_ld), S::b_ld, TK);
    }
    copy_wait<0>();

    size_t grad_ld = WHAT == DOUT ? F : C;
    float *grad = S::by_weight ? d.grad + (WHAT == DOUT ? x.matrix[e] : x.matrix_in[e]) : NULL;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = wm + 16 * i + lane / 4 + 8 * half, c0 = column + wn + lane % 4 * 2;
            int left = m0 + row < high ? columns - c0 : 0; // columns from c0 on
            size_t slot = (size_t)first + row;
            float sum = 0, weight = !S::by_weight && left > 0 && d.weight ? d.weight[x.choice[slot]] : 1;
            float gate[4][2], up[4][2]; // what is read, all of a row before anything is written
            float *g = grad + (m0 + row) * grad_ld + c0;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (S::by_weight)
                    load_pair<ALIGNED>(gate[j], g + 8 * j, left - 8 * j);
                if (WHAT == DHIDDEN) {
                    const floatX *h = d.hidden + slot * hidden_ld + c0 + 8 * j;
                    load_pair<ALIGNED>(gate[j], h, left - 8 * j);
                    if (gated)
                        load_pair<ALIGNED>(up[j], h + F, left - 8 * j);
                }
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float *v = &acc[i][j][2 * half], f[2], slope[2];
                int c = c0 + 8 * j, n = left - 8 * j;
                if (S::by_weight) {
                    store_pair<ALIGNED>(g + 8 * j, gate[j][0] + v[0], gate[j][1] + v[1], n);
                } else if (WHAT == ANSWER || WHAT == DROWS) {
                    store_pair<ALIGNED>(d.out + slot * C + c, weight * v[0], weight * v[1], n);
                } else if (WHAT == HIDDEN && pairs) {
                    c = column + wn / 2 + j / 2 * 8 + lane % 4 * 2;
                    n = m0 + row < high ? F - c : 0;
                    store_pair<ALIGNED>(d.out + slot * hidden_ld + j % 2 * F + c, v[0], v[1], n);
                    if (j % 2 == 0)
                        continue;
                    for (int k = 0; k < 2; k++)
                        activate(activation, acc[i][j - 1][2 * half + k], &f[k], &slope[k]);
                    store_pair<ALIGNED>(d.act + slot * act_ld + c, f[0] * v[0], f[1] * v[1], n);
                } else if (WHAT == HIDDEN) {
                    for (int k = 0; k < 2; k++)
                        activate(activation, v[k], &f[k], &slope[k]);
                    store_pair<ALIGNED>(d.out + slot * hidden_ld + c, v[0], v[1], n);
                    store_pair<ALIGNED>(d.act + slot * act_ld + c, f[0], f[1], n);
                } else {
                    float dgate[2], dup[2], act[2];
                    for (int k = 0; k < 2; k++) {
                        float u = gated ? up[j][k] : 1;
                        activate(activation, gate[j][k], &f[k], &slope[k]);
                        sum += k < n ? v[k] * u * f[k] : 0;
                        dgate[k] = weight * v[k] * u * slope[k];
                        dup[k] = weight * v[k] * f[k];
                        act[k] = weight * u * f[k];
                    }
                    store_pair<ALIGNED>(d.out + slot * hidden_ld + c, dgate[0], dgate[1], n);
                    if (gated)
                        store_pair<ALIGNED>(d.out + slot * hidden_ld + F + c, dup[0], dup[1], n);
                    store_pair<ALIGNED>(d.act + slot * act_ld + c, act[0], act[1], n);
                }
            }
            if (WHAT == DHIDDEN) { // four lanes have a row of a warp's tile between them, four warps one of the block's
                sum += __shfl_xor_sync(ALL_LANES, sum, 1);
                sum += __shfl_xor_sync(ALL_LANES, sum, 2);
                if (lane % 4 == 0)
                    part[row][warp % 4] = sum;
            }
        }
    }
    if (WHAT == DHIDDEN) {
        __syncthreads();
        for (int r = threadIdx.x; r < rows; r += THREADS)
            d.dweight[across * d.slots + first + r] = part[r][0] + part[r][1] + part[r][2] + part[r][3];
    }
}

template <int WHAT> void experts_product(const Experts *x, ExpertsData d) {
    const int BYTES = Shape<WHAT>::bytes;
    int columns = WHAT == HIDDEN ? x->hidden_width : WHAT == DHIDDEN || WHAT == DOUT ? x->widest : x->C;
    int high = WHAT == DOUT ? x->C : x->hidden_width;
    d.across = div_up(columns, TN);
    dim3 grid(d.across * x->tiles);
    if (Shape<WHAT>::by_weight)
        grid = dim3(div_up(high, TM), d.across, x->E);
    if (x->aligned) {
        CHECK(cudaFuncSetAttribute(experts_kernel<WHAT, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES));
        experts_kernel<WHAT, true><<<grid, THREADS, BYTES, stream>>>(*x, d);
    } else {
        CHECK(cudaFuncSetAttribute(experts_kernel<WHAT, false>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES));
        experts_kernel<WHAT, false><<<grid, THREADS, BYTES, stream>>>(*x, d);
    }
    CHECK(cudaGetLastError());
}

// tile (tiles): TM rows of one expert each, expert by expert, then expert -1. offset (E+1). One block.
__global__ void list_tiles_kernel(int2 *tile, int tiles, const int *offset, int E) {
    __shared__ int next; // the first tile of the experts to come
    __shared__ int before[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x == 0)
        next = 0;
    for (int first = 0; first < E; first += 1024) {
        int e = first + threadIdx.x, mine = e < E ? div_up(offset[e + 1] - offset[e], TM) : 0, sum = warp_scan(mine);
        if (lane == 31)
            before[warp] = sum;
        __syncthreads();
        int at = next + sum - mine, total = next;
        for (int other = 0; other < 32; other++) {
            at += other < warp ? before[other] : 0;
            total += before[other];
        }
        for (int i = 0; i < mine; i++)
            tile[at + i] = make_int2(e, offset[e] + i * TM);
        __syncthreads();
        if (threadIdx.x == 0)
            next = total;
        __syncthreads();
    }
    for (int i = next + threadIdx.x; i < tiles; i += 1024)
        tile[i] = make_int2(-1, 0);
}

void list_tiles(int2 *tile, int tiles, const int *offset, int E) {
    list_tiles_kernel<<<1, 1024, 0, stream>>>(tile, tiles, offset, E);
    CHECK(cudaGetLastError());
}

// dweight (n*K, by choice) = the sum of the tiles' parts, in their order.
__global__ void sum_dweight_kernel(float *dweight, const float *part, const int *choice, const int *slots, size_t room,
                                   int tiles) {
    size_t slot = thread_of_grid();
    if (slot >= (size_t)*slots)
        return;
    float sum = 0;
    for (int t = 0; t < tiles; t++)
        sum += part[t * room + slot];
    dweight[choice[slot]] = sum;
}

// hidden (slots,H) = x[token] W_in^T; act (slots,F) = f(hidden). x (n,C)
void experts_hidden(floatX *hidden, floatX *act, const floatX *x, const floatX *w_in, const Experts *experts) {
    ExpertsData d = {x, w_in, NULL, hidden, act, NULL, NULL, NULL, 0, 0};
    experts_product<HIDDEN>(experts, d);
}

// rows (slots,C) = weight * (act W_out^T): what combine() adds up.
void experts_forward(floatX *rows, floatX *hidden, floatX *act, const floatX *x, const floatX *w_in, const floatX *w_out,
                     const float *weight, const Experts *experts) {
    gpu::experts_hidden(hidden, act, x, w_in, experts);
    ExpertsData d = {act, w_out, NULL, rows, NULL, NULL, weight, NULL, 0, 0};
    experts_product<ANSWER>(experts, d);
}

// rows (slots,C) = the gradient by each row of x; dw_in, dw_out +=; dweight (n*K) = for choices that have a slot. dout
// (n,C); dact, dhidden, part (column tiles, slots) are scratch; slots: how many they are at most.
void experts_backward(floatX *rows, float *dw_in, float *dw_out, float *dweight, const floatX *dout, const floatX *x,
                      const floatX *hidden, const float *weight, const floatX *w_in, const floatX *w_out, floatX *dact,
                      floatX *dhidden, float *part, size_t slots, const Experts *experts) {
    ExpertsData inner = {dout, w_out, hidden, dhidden, dact, NULL, weight, part, slots, 0};
    experts_product<DHIDDEN>(experts, inner);
    sum_dweight_kernel<<<blocks(slots), THREADS, 0, stream>>>(dweight, part, experts->choice, experts->offset + experts->E, slots,
                                                              div_up(experts->widest, TN));
    CHECK(cudaGetLastError());
    ExpertsData to_out = {dout, dact, NULL, NULL, NULL, dw_out, NULL, NULL, 0, 0};
    experts_product<DOUT>(experts, to_out);
    ExpertsData to_in = {dhidden, x, NULL, NULL, NULL, dw_in, NULL, NULL, 0, 0};
    experts_product<DIN>(experts, to_in);
    ExpertsData to_x = {dhidden, w_in, NULL, rows, NULL, NULL, NULL, NULL, 0, 0};
    experts_product<DROWS>(experts, to_x);
}

// out (N,C) = from + branch + the rows of each token's slots, in the order of k; what is NULL is left out. from, like the
// residual stream, is float32. slot (N*K), -1: none. n numbers a thread.
template <int n, class Out>
__global__ void combine_kernel(Out *out, const float *from, const floatX *branch, const floatX *rows, const int *slot, int K,
                               int C) {
    size_t token = blockIdx.x, at = token * C;
    float sum[n], a[n];
    for (int c = n * threadIdx.x; c < C; c += n * blockDim.x) {
        for (int i = 0; i < n; i++)
            sum[i] = 0;
        if (from)
            load_pack(sum, from + at + c);
        if (branch)
            load_pack(a, branch + at + c);
        for (int i = 0; branch && i < n; i++)
            sum[i] += a[i];
        for (int k = 0; rows && k < K; k++) {
            int s = slot[token * K + k];
            if (s < 0)
                continue;
            load_pack(a, rows + (size_t)s * C + c);
            for (int i = 0; i < n; i++)
                sum[i] += a[i];
        }
        store_pack(out + at + c, sum);
    }
}

template <class Out>
void combine(Out *out, const float *from, const floatX *branch, const floatX *rows, const int *slot, int N, int K, int C) {
    if (N == 0)
        return;
    if (C % 4 == 0)
        combine_kernel<4, Out><<<N, row_threads(C, 4), 0, stream>>>(out, from, branch, rows, slot, K, C);
    else
        combine_kernel<1, Out><<<N, row_threads(C, 1), 0, stream>>>(out, from, branch, rows, slot, K, C);
    CHECK(cudaGetLastError());
}

// ---- feed-forwards that every token passes: cuBLAS, and the activation in between

// act (N,F) = f(hidden), hidden (N,2F or F). A block has a row, its threads n numbers at a time.
template <int n>
__global__ void activation_forward_kernel(floatX *act, const floatX *hidden, int F, int activation, int gated) {
    const floatX *h = hidden + (size_t)blockIdx.x * F * (1 + gated);
    for (int j = n * threadIdx.x; j < F; j += n * blockDim.x) {
        float value[n], up[n], slope;
        load_pack(value, h + j);
        if (gated)
            load_pack(up, h + F + j);
        for (int i = 0; i < n; i++) {
            activate(activation, value[i], &value[i], &slope);
            value[i] *= gated ? up[i] : 1;
        }
        store_pack(act + (size_t)blockIdx.x * F + j, value);
    }
}

// dact (N,F) becomes act; dhidden (N,2F or F) =.
template <int n>
__global__ void activation_backward_kernel(floatX *dhidden, floatX *dact, const floatX *hidden, int F, int activation,
                                           int gated) {
    size_t row = (size_t)blockIdx.x * F * (1 + gated);
    for (int j = n * threadIdx.x; j < F; j += n * blockDim.x) {
        float gate[n], up[n], d[n], dup[n], act[n];
        load_pack(gate, hidden + row + j);
        if (gated)
            load_pack(up, hidden + row + F + j);
        load_pack(d, dact + (size_t)blockIdx.x * F + j);
        for (int i = 0; i < n; i++) {
            float value, slope, u = gated ? up[i] : 1;
            activate(activation, gate[i], &value, &slope);
            act[i] = u * value;
            dup[i] = d[i] * value;
            d[i] *= u * slope;
        }
        store_pack(dhidden + row + j, d);
        if (gated)
            store_pack(dhidden + row + F + j, dup);
        store_pack(dact + (size_t)blockIdx.x * F + j, act);
    }
}

void activation_forward(floatX *act, const floatX *hidden, int N, int F, int activation) {
    int gated = is_gated(activation);
    if (F % 8 == 0)
        activation_forward_kernel<8><<<N, row_threads(F, 8), 0, stream>>>(act, hidden, F, activation, gated);
    else
        activation_forward_kernel<1><<<N, row_threads(F, 1), 0, stream>>>(act, hidden, F, activation, gated);
    CHECK(cudaGetLastError());
}

void activation_backward(floatX *dhidden, floatX *dact, const floatX *hidden, int N, int F, int activation) {
    int gated = is_gated(activation);
    if (F % 8 == 0)
        activation_backward_kernel<8><<<N, row_threads(F, 8), 0, stream>>>(dhidden, dact, hidden, F, activation, gated);
    else
        activation_backward_kernel<1><<<N, row_threads(F, 1), 0, stream>>>(dhidden, dact, hidden, F, activation, gated);
    CHECK(cudaGetLastError());
}

void *own(Model *m, size_t count, size_t size); // section 7: memory of the device, and of the host
void *own_host(Model *m, size_t count, size_t size);

// ---------------------------------------------------------------------------------------------------------------------
// 6. The router
//
// As in train_moe.c and dev/routers, in float32, with the sums of losses in double. A row of a gate belongs to a warp, its
// lanes run over the experts; what C does for one group of tokens after another, one launch does for all. What is chosen
// is a matter of integers: scores become whole numbers in the same order, so that NaN finds a place, too.

// ---- sums in a fixed order, and warps that own a row

const int AHEAD = 8; // where few threads read much, each asks for so many numbers before it waits for them

// *to += scale * the sum of value(i), i < n
template <class Value>
__global__ void __launch_bounds__(1024) sum_kernel(double *to, Value value, size_t n, double scale) {
    double sum = 0;
    for (size_t i = threadIdx.x; i < n; i += blockDim.x)
        sum += value(i);
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        *to += scale * sum;
}

template <class Value> void add_sum(double *to, Value value, size_t n, double scale) {
    sum_kernel<Value><<<1, 1024, 0, stream>>>(to, value, n, scale);
    CHECK(cudaGetLastError());
}

// part (groups * chunks, columns): sums of value(row, column) over CHUNK rows of a group of `rows` rows
template <class Value>
__global__ void column_sums_kernel(double *part, Value value, size_t size, int chunks, int rows, int columns) {
    size_t i = thread_of_grid();
    if (i >= size)
        return;
    int chunk = (int)(i / columns % chunks), column = (int)(i % columns);
    size_t first = i / columns / chunks * rows;
    double sum = 0;
    for (int row = chunk * CHUNK; row < min_int(rows, (chunk + 1) * CHUNK); row++)
        sum += value(first + row, column);
    part[i] = sum;
}

template <class T>
__global__ void column_totals_kernel(T *to, const double *part, int outputs, int chunks, int columns, int accumulate) {
    int i = row_of_warp(), lane = threadIdx.x % 32;
    if (i >= outputs)
        return;
    double sum = 0;
    for (int chunk = lane; chunk < chunks; chunk += 32)
        sum += part[((size_t)(i / columns) * chunks + chunk) * columns + i % columns];
    sum = warp_sum(sum);
    if (lane == 0)
        to[i] = (T)(accumulate ? to[i] + sum : sum);
}

// to (groups, columns) = or += the sums of value(row, column) over each group's rows. part: room for groups *
// div_up(rows, CHUNK) * columns
template <class T, class Value>
void column_sums(T *to, Value value, int groups, int rows, int columns, int accumulate, double *part) {
    int chunks = div_up(rows, CHUNK);
    size_t size = (size_t)groups * chunks * columns;
    column_sums_kernel<Value><<<blocks(size), THREADS, 0, stream>>>(part, value, size, chunks, rows, columns);
    CHECK(cudaGetLastError());
    column_totals_kernel<T><<<row_blocks((size_t)groups * columns), THREADS, 0, stream>>>(to, part, groups * columns,
                                                                                          chunks, columns, accumulate);
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
        for (size_t i = n * K; i < (n + 1) * K; i++)
            sum += expert[i] == e ? (double)weight[i] : 0;
        return sum;
    }
};

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

// ---- scores

__global__ void apply_jitter_kernel(float *to, const float *from, size_t size, double jitter, uint64_t stream,
                                    uint64_t first) {
    size_t i = thread_of_grid();
    if (i < size)
        to[i] = from[i] * (float)(1 + jitter * (2 * random_uniform(stream, first + i) - 1));
}

void apply_jitter(float *to, const float *from, size_t size, double jitter, uint64_t random, uint64_t first) {
    apply_jitter_kernel<<<blocks(size), THREADS, 0, stream>>>(to, from, size, jitter, random, first);
    CHECK(cudaGetLastError());
}

__global__ void noise_forward_kernel(float *noisy, const float *logits, int N, int W, int train, uint64_t stream,
                                     uint64_t first) {
    size_t at = thread_of_grid(), i = at + at / W * W;
    if (at >= (size_t)N * W)
        return;
    double draw = train ? random_normal(stream, first * W + at) : 0;
    noisy[at] = logits[i] + (float)(draw * noise_size(logits[i + W]));
}

void noise_forward(float *noisy, const float *logits, int N, int W, int train, uint64_t random, uint64_t first) {
    noise_forward_kernel<<<blocks((size_t)N * W), THREADS, 0, stream>>>(noisy, logits, N, W, train, random, first);
    CHECK(cudaGetLastError());
}

__global__ void noise_backward_kernel(float *dlogits, const float *dnoisy, const float *logits, int N, int W, int train,
                                      uint64_t stream, uint64_t first) {
    size_t at = thread_of_grid(), i = at + at / W * W;
    if (at >= (size_t)N * W)
        return;
    double d = (double)dnoisy[at], draw = train ? random_normal(stream, first * W + at) : 0;
    dlogits[i] += (float)d;
    dlogits[i + W] += (float)(d * draw * noise_slope(logits[i + W]));
}

void noise_backward(float *dlogits, const float *dnoisy, const float *logits, int N, int W, int train, uint64_t random,
                    uint64_t first) {
    noise_backward_kernel<<<blocks((size_t)N * W), THREADS, 0, stream>>>(dlogits, dnoisy, logits, N, W, train, random,
                                                                         first);
    CHECK(cudaGetLastError());
}

// Where a row's logits begin, of (N,W).
__device__ size_t logits_of(const Gate &g, int row, int W) {
    return (size_t)(row / g.per) * W + g.column + row % g.per * g.E;
}

__global__ void scores_forward_kernel(Gate g, const float *logits, int rows, int W, int score) {
    int row = row_of_warp(), lane = threadIdx.x % 32;
    if (row >= rows)
        return;
    const float *from = logits + logits_of(g, row, W);
    float *p = g.p + (size_t)row * g.E, top = -INFINITY, sum = 0;
    for (int e = lane; score == SIGMOID && e < g.E; e += 32)
        p[e] = (float)(1 / (1 + exp(-(double)from[e])));
    if (score == SIGMOID)
        return;
    for (int e = lane; e < g.E; e += 32)
        top = fmaxf(top, from[e]);
    top = warp_max(top);
    for (int e = lane; e < g.E; e += 32)
        sum += p[e] = expf(from[e] - top);
    sum = warp_sum(sum);
    for (int e = lane; e < g.E; e += 32)
        p[e] *= 1 / sum;
    if (lane == 0)
        g.lse[row] = top + logf(sum);
}

void scores_forward(Gate *g, const float *logits, int N, int W, int score) {
    scores_forward_kernel<<<row_blocks((size_t)N * g->per), THREADS, 0, stream>>>(*g, logits, N * g->per, W, score);
    CHECK(cudaGetLastError());
}

__global__ void scores_backward_kernel(float *dlogits, const float *dp, Gate g, int rows, int W, int score, double z) {
    int row = row_of_warp(), lane = threadIdx.x % 32;
    if (row >= rows)
        return;
    const float *d = dp + (size_t)row * g.E, *p = g.p + (size_t)row * g.E;
    float *to = dlogits + logits_of(g, row, W), sum = 0, slope = score == SOFTMAX ? (float)(2 * z) * g.lse[row] : 0;
    for (int e = lane; e < g.E; e += 32)
        sum += d[e] * p[e];
    sum = warp_sum(sum);
    for (int e = lane; e < g.E; e += 32)
        to[e] += score == SOFTMAX ? p[e] * (d[e] - sum + slope) : d[e] * p[e] * (1 - p[e]);
}

void scores_backward(float *dlogits, const float *dp, const Gate *g, int N, int W, int score, double z) {
    scores_backward_kernel<<<row_blocks((size_t)N * g->per), THREADS, 0, stream>>>(dlogits, dp, *g, N * g->per, W,
                                                                                   score, z);
    CHECK(cudaGetLastError());
}

// a, b (N,3R): the two products
__global__ void gru_forward_kernel(float *next, float *keep, const float *a, const float *b, const float *h,
                                   const float *b_x, const float *b_h, int N, int R) {
    size_t i = thread_of_grid();
    if (i >= (size_t)N * R)
        return;
    int j = (int)(i % R), J = j + R, K = J + R;
    const float *an = a + i / R * 3 * R, *bn = b + i / R * 3 * R;
    float *kn = keep + i / R * 4 * R;
    double r = 1 / (1 + exp(-(double)(an[j] + b_x[j] + (h ? bn[j] : 0) + b_h[j]))),
           z = 1 / (1 + exp(-(double)(an[J] + b_x[J] + (h ? bn[J] : 0) + b_h[J])));
    double hidden = (double)((h ? bn[K] : 0) + b_h[K]), fresh = tanh((double)(an[K] + b_x[K]) + r * hidden);
    next[i] = (float)((1 - z) * fresh + (h ? z * (double)h[i] : 0));
    kn[j] = (float)r;
    kn[J] = (float)z;
    kn[K] = (float)fresh;
    kn[K + R] = (float)hidden;
}

void gru_forward(float *next, float *keep, const float *x, const float *h, const float *W_x, const float *W_h,
                 const float *b_x, const float *b_h, int N, int R, float *room) {
    float *a = room, *b = room + (size_t)N * 3 * R;
    gpu::product(a, along_rows(x, R), along_rows(W_x, R), N, 3 * R, R, 0);
    if (h)
        gpu::product(b, along_rows(h, R), along_rows(W_h, R), N, 3 * R, R, 0);
    gru_forward_kernel<<<blocks((size_t)N * R), THREADS, 0, stream>>>(next, keep, a, b, h, b_x, b_h, N, R);
    CHECK(cudaGetLastError());
}

// da, db (N,3R): the gradients by the two products
__global__ void gru_backward_kernel(float *da, float *db, float *dh, const float *dnext, const float *keep,
                                    const float *h, int N, int R) {
    size_t i = thread_of_grid();
    if (i >= (size_t)N * R)
        return;
    int j = (int)(i % R);
    const float *k = keep + i / R * 4 * R;
    float *an = da + i / R * 3 * R, *bn = db + i / R * 3 * R;
    float r = k[j], z = k[R + j], fresh = k[2 * R + j], d = dnext[i];
    float dfresh = d * (1 - z) * (1 - fresh * fresh);
    an[j] = bn[j] = dfresh * k[3 * R + j] * r * (1 - r);
    an[R + j] = bn[R + j] = d * ((h ? h[i] : 0) - fresh) * z * (1 - z);
    an[2 * R + j] = dfresh;
    bn[2 * R + j] = dfresh * r;
    if (h)
        dh[i] = d * z;
}

// part: room for column_sums() of (N,3R)
void gru_backward(float *dx, float *dh, float *dW_x, float *dW_h, float *db_x, float *db_h, const float *dnext,
                  const float *keep, const float *x, const float *h, const float *W_x, const float *W_h, int N, int R,
                  float *room, double *part) {
    float *da = room, *db = room + (size_t)N * 3 * R;
    gru_backward_kernel<<<blocks((size_t)N * R), THREADS, 0, stream>>>(da, db, dh, dnext, keep, h, N, R);
    CHECK(cudaGetLastError());
    gpu::column_sums(db_x, Entries<float>{da, 3 * R}, 1, N, 3 * R, 1, part);
    gpu::column_sums(db_h, Entries<float>{db, 3 * R}, 1, N, 3 * R, 1, part);
    gpu::product(dx, along_rows(da, 3 * R), along_columns(W_x, R), N, R, 3 * R, 0);
    gpu::product(dW_x, along_columns(da, 3 * R), along_columns(x, R), 3 * R, R, N, 1);
    if (h) {
        gpu::product(dh, along_rows(db, 3 * R), along_columns(W_h, R), N, R, 3 * R, 1);
        gpu::product(dW_h, along_columns(db, 3 * R), along_columns(h, R), 3 * R, R, N, 1);
    }
}

// ---- select

__global__ void select_topk_kernel(int *expert, const float *p, int N, int E, int K) {
    int row = row_of_warp(), lane = threadIdx.x % 32;
    if (row >= N)
        return;
    Rank last = ~(Rank)0;
    for (int k = 0; k < K; k++) { // the best of those that come after the last one
        Rank best = 0;
        for (int e = lane; e < E; e += 32) {
            Rank rank = rank_of(order_of(p[(size_t)row * E + e]), e);
            best = rank < last && rank > best ? rank : best;
        }
        last = warp_best(best);
        if (lane == 0)
            expert[(size_t)row * K + k] = index_of(last);
    }
}

void select_topk(int *expert, const float *p, int N, int E, int K) {
    select_topk_kernel<<<row_blocks(N), THREADS, 0, stream>>>(expert, p, N, E, K);
    CHECK(cudaGetLastError());
}

const int MOST_GROUPS = 1024, MOST_EXPERTS = 4096; // as in `options`

__device__ int first_of_group(int group, int E, int D) { // the inverse of group_of()
    return div_up(group * E, D);
}

__global__ void mask_groups_kernel(float *score, int N, int E, int D, int M, int by) {
    __shared__ float values[THREADS / 32][MOST_GROUPS];
    int n = row_of_warp(), lane = threadIdx.x % 32;
    float *value = values[threadIdx.x / 32], *row = score + (size_t)n * E;
    if (n >= N)
        return;
    for (int d = lane; d < D; d += 32) {
        float best = -INFINITY, second = -INFINITY;
        for (int e = first_of_group(d, E, D); e < first_of_group(d + 1, E, D); e++) {
            float s = row[e];
            int first = order_of(s) > order_of(best);
            second = first ? best : order_of(s) > order_of(second) ? s : second;
            best = first ? s : best;
        }
        value[d] = by == BEST_TWO && order_of(second) > order_of(-INFINITY) ? best + second : best;
    }
    __syncwarp();
    Rank last = ~(Rank)0;
    for (int k = 0; k < M; k++) { // in the end, the M-th best
        Rank best = 0;
        for (int d = lane; d < D; d += 32) {
            Rank rank = rank_of(order_of(value[d]), d);
            best = rank < last && rank > best ? rank : best;
        }
        last = warp_best(best);
    }
    for (int e = lane; e < E; e += 32) {
        int d = group_of(e, E, D);
        if (rank_of(order_of(value[d]), d) < last)
            row[e] = -INFINITY;
    }
}

void mask_groups(float *score, int N, int E, int D, int M, int by) {
    mask_groups_kernel<<<row_blocks(N), THREADS, 0, stream>>>(score, N, E, D, M, by);
    CHECK(cudaGetLastError());
}

__global__ void select_above_kernel(int *expert, const float *p, int N, int E, int K, const float *level, double all,
                                    int keep_best) {
    int row = row_of_warp(), lane = threadIdx.x % 32, kept = 0;
    if (row >= N)
        return;
    int *chosen = expert + (size_t)row * K;
    for (int first = 0; first < K; first += 32) {
        int k = first + lane, e = k < K ? chosen[k] : 0;
        int stays =
            k < K && ((keep_best && k == 0) || (double)p[(size_t)row * E + e] > (level ? (double)level[e] : all));
        unsigned who = __ballot_sync(ALL_LANES, stays);
        if (stays)
            chosen[kept + __popc(who & ((1u << lane) - 1))] = e;
        kept += __popc(who);
        __syncwarp();
    }
    for (int k = kept + lane; k < K; k += 32)
        chosen[k] = -1;
}

void select_above(int *expert, const float *p, int N, int E, int K, const float *level, double all, int keep_best) {
    select_above_kernel<<<row_blocks(N), THREADS, 0, stream>>>(expert, p, N, E, K, level, all, keep_best);
    CHECK(cudaGetLastError());
}

// Of each group of tokens, each of `units` units takes the `take` best of its candidates: one block for a group and
// `each` neighbouring units. A radix search finds the rank of the last one taken, 8 bits after 8, beginning with the
// highest: of the candidates that agree with it so far, those with each value of the next 8 bits are counted.
// Candidates say how many a group has for so many units, which rank candidate i has and for which of the units (-1: for
// none of them), and are told what became of it, and of the lowest order that a unit took.
const int TAKE_UNITS = 16;

template <class Candidates>
__global__ void __launch_bounds__(1024) take_best_kernel(Candidates candidates, int units, int each, int take) {
    __shared__ int bins[TAKE_UNITS][256];
    __shared__ Rank least[TAKE_UNITS];
    __shared__ int left[TAKE_UNITS]; // to take of those that agree with least; -1: all of them, the search is over
    __shared__ unsigned lowest[TAKE_UNITS];
    __shared__ int searching;
    int parts = div_up(units, each), group = blockIdx.x / parts, first = blockIdx.x % parts * each;
    int mine = min_int(each, units - first), unit = threadIdx.x / 32, lane = threadIdx.x % 32;
    size_t size = candidates.size(mine);
    if ((int)threadIdx.x < mine) {
        least[threadIdx.x] = 0;
        left[threadIdx.x] = take;
        lowest[threadIdx.x] = 0xffffffffu;
    }
    for (int shift = 56; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < mine * 256; i += blockDim.x)
            bins[i / 256][i % 256] = 0;
        if (threadIdx.x == 0)
            searching = 0;
        __syncthreads();
        for (size_t i = threadIdx.x; i < size; i += AHEAD * blockDim.x) {
            Rank rank[AHEAD];
            int of[AHEAD];
            for (int j = 0; j < AHEAD; j++) {
                size_t at = i + j * blockDim.x;
                rank[j] = at < size ? candidates.rank(at, group, first, mine, &of[j]) : 0;
                of[j] = at < size ? of[j] : -1;
            }
            for (int j = 0; j < AHEAD; j++) {
                int u = of[j];
                if (u >= 0 && left[u] >= 0 && (shift == 56 || (rank[j] ^ least[u]) >> (shift + 8) == 0))
                    atomicAdd(&bins[u][rank[j] >> shift & 255], 1);
            }
        }
        __syncthreads();
        int want = unit < mine ? left[unit] : -1;
        if (want >= 0) { // lane 0 has the highest eight bins
            int bin = 255 - 8 * lane, sum = 0;
            for (int i = 0; i < 8; i++)
                sum += bins[unit][bin - i];
            int upto = warp_scan(sum);
            unsigned enough = __ballot_sync(ALL_LANES, upto >= want);
            if (enough == 0 && lane == 0) // so few that all are taken
                left[unit] = -1;
            if (enough != 0 && lane == __ffs((int)enough) - 1) {
                want -= upto - sum;
                while (bins[unit][bin] < want)
                    want -= bins[unit][bin--];
                least[unit] |= (Rank)bin << shift;
                left[unit] = bins[unit][bin] == want ? -1 : want;
                if (left[unit] >= 0)
                    searching = 1;
            }
        }
        __syncthreads();
        int over = !searching;
        __syncthreads();
        if (over)
            break;
    }
    for (size_t i = threadIdx.x; i < size; i += blockDim.x) {
        int u;
        Rank rank = candidates.rank(i, group, first, mine, &u);
        if (u < 0)
            continue;
        int taken = rank >= least[u];
        candidates.put(i, group, first, mine, taken);
        if (taken)
            atomicMin(&lowest[u], (unsigned)(rank >> 32));
    }
    __syncthreads();
    if ((int)threadIdx.x < mine)
        candidates.end(group, first + threadIdx.x, lowest[threadIdx.x]);
}

template <class Candidates> void take_best(Candidates candidates, int groups, int units, int take) {
    int each = min_int(TAKE_UNITS, max_int(1, (int)((size_t)groups * units / 512)));
    int grid = groups * div_up(units, each), threads = max_int(32 * each, threads_for(candidates.size(each)));
    take_best_kernel<Candidates><<<grid, threads, 0, stream>>>(candidates, units, each, take);
    CHECK(cudaGetLastError());
}

// The tokens as candidates of the experts.
struct ExpertsChoice {
    unsigned char *taken; // (groups*n, E)
    float *lowest;        // (groups, E)
    const float *p;
    int n, E;

    BOTH size_t size(int mine) const {
        return (size_t)n * mine;
    }
    __device__ size_t at(size_t i, int group, int first, int mine) const {
        return ((size_t)group * n + i / mine) * E + first + i % mine;
    }
    __device__ Rank rank(size_t i, int group, int first, int mine, int *unit) const {
        *unit = (int)(i % mine);
        return rank_of(order_of(p[at(i, group, first, mine)]), (unsigned)(i / mine));
    }
    __device__ void put(size_t i, int group, int first, int mine, int is_taken) const {
        taken[at(i, group, first, mine)] = (unsigned char)is_taken;
    }
    __device__ void end(int group, int e, unsigned order) const {
        lowest[(size_t)group * E + e] = score_of(order);
    }
};

// Of each token's experts, best first, those that took it.
__global__ void taken_experts_kernel(int *expert, const float *p, const unsigned char *taken, int N, int E) {
    int row = row_of_warp(), lane = threadIdx.x % 32, k = 0;
    if (row >= N)
        return;
    for (Rank last = ~(Rank)0; last > 0; k++) {
        Rank best = 0;
        for (int e = lane; e < E; e += 32) {
            size_t i = (size_t)row * E + e;
            Rank rank = taken[i] ? rank_of(order_of(p[i]), e) : 0;
            best = rank < last && rank > best ? rank : best;
        }
        last = warp_best(best);
        if (lane == 0 && last > 0)
            expert[(size_t)row * E + k] = index_of(last);
    }
    for (k = k - 1 + lane; k < E; k += 32)
        expert[(size_t)row * E + k] = -1;
}

__global__ void add_lowest_kernel(double *lowest, const float *of_group, int E, int groups) {
    int e = (int)thread_of_grid();
    for (int group = 0; e < E && group < groups; group++)
        lowest[e] += (double)of_group[(size_t)group * E + e];
}

// For `groups` groups of n tokens. Scratch: taken (groups*n, E), of_group (groups, E)
void select_by_experts(int *expert, double *lowest, const float *p, int n, int E, int take, int groups,
                       unsigned char *taken, float *of_group) {
    ExpertsChoice candidates = {taken, of_group, p, n, E};
    gpu::take_best(candidates, groups, E, take);
    taken_experts_kernel<<<row_blocks((size_t)groups * n), THREADS, 0, stream>>>(expert, p, taken, groups * n, E);
    CHECK(cudaGetLastError());
    add_lowest_kernel<<<blocks(E), THREADS, 0, stream>>>(lowest, of_group, E, groups);
    CHECK(cudaGetLastError());
}

__device__ Rank order_of_loss(double loss) {
    Rank bits = (Rank)__double_as_longlong(loss + 0.0); // 0 for -0
    return bits >> 63 ? ~bits : bits | (Rank)1 << 63;
}

__device__ double loss_of(Rank order) {
    return __longlong_as_double((long long)(order >> 63 ? order & ~((Rank)1 << 63) : ~order));
}

// One block a group of tokens. As in C, only that all of a step happens at once where the order makes no difference:
// the costs, and what experts b gain by one expert a, one a after the other.
__global__ void __launch_bounds__(1024)
    select_balanced_kernel(int *expert, const float *score, int n, int E, int groups, Balancer room) {
    __shared__ double far[MOST_EXPERTS];
    __shared__ unsigned short from[MOST_EXPERTS]; // NOWHERE: a chain begins here
    __shared__ unsigned char stale[MOST_EXPERTS];
    __shared__ int left;
    __shared__ int listed;
    __shared__ int again;
    __shared__ int end;
    const unsigned short NOWHERE = 0xffff;
    int thread = threadIdx.x, threads = blockDim.x, *excess = room.excess + (size_t)blockIdx.x * E;
    int *mover = room.mover + (size_t)blockIdx.x * E * E, *list = room.list + (size_t)blockIdx.x * n;
    Rank *cost = room.cost + (size_t)blockIdx.x * E * E;
    for (int group = blockIdx.x; group < groups; group += gridDim.x) {
        int *of = expert + (size_t)group * n;
        const float *s = score + (size_t)group * n * E;
        for (int e = thread; e < E; e += threads) {
            excess[e] = -(n / E) - (e < n % E);
            stale[e] = 1;
        }
        if (thread == 0)
            left = 0;
        __syncthreads();
        for (int t = thread; t < n; t += threads)
            atomicAdd(&excess[of[t]], 1);
        __syncthreads();
        for (int e = thread; e < E; e += threads)
            atomicAdd(&left, max_int(0, excess[e]));
        __syncthreads();
        while (left > 0) {
            for (int a = 0; a < E; a++) { // cost[a][b]: what is lost by moving a's best token for it to b
                for (int b = thread; stale[a] && b < E; b += threads) {
                    cost[(size_t)a * E + b] = order_of_loss(INFINITY);
                    mover[(size_t)a * E + b] = INT_MAX;
                }
            }
            if (thread == 0)
                listed = 0;
            __syncthreads();
            for (int t = thread; t < n; t += threads) {
                if (stale[of[t]])
                    list[atomicAdd(&listed, 1)] = t;
            }
            __syncthreads();
            for (int pass = 0; pass < 2; pass++) { // the least loss, then the first token that has it
                for (size_t i = thread; i < (size_t)listed * E; i += threads) {
                    int t = list[i / E], a = of[t], b = (int)(i % E);
                    double loss = (double)s[(size_t)t * E + a] - (double)s[(size_t)t * E + b];
                    if (!(loss < INFINITY))
                        continue;
                    if (pass == 0)
                        atomicMin(&cost[(size_t)a * E + b], order_of_loss(loss));
                    else if (cost[(size_t)a * E + b] == order_of_loss(loss))
                        atomicMin(&mover[(size_t)a * E + b], t);
                }
                __syncthreads();
            }
            for (int e = thread; e < E; e += threads) {
                stale[e] = 0;
                far[e] = excess[e] > 0 ? 0 : INFINITY;
                from[e] = NOWHERE;
            }
            if (thread == 0)
                again = 0;
            __syncthreads();
            for (int round = 0; round < E; round++) {
                for (int a = 0; a < E; a++) {
                    for (int b = thread; far[a] < INFINITY && b < E; b += threads) {
                        double way = far[a] + loss_of(cost[(size_t)a * E + b]);
                        if (a != b && way < far[b] - 1e-12) {
                            far[b] = way;
                            from[b] = (unsigned short)a;
                            again = 1;
                        }
                    }
                    __syncthreads();
                }
                int more = again;
                __syncthreads();
                if (!more)
                    break;
                if (thread == 0)
                    again = 0;
                __syncthreads();
            }
            if (thread < 32) {
                double least = INFINITY;
                int best = INT_MAX;
                for (int e = thread; e < E; e += 32) {
                    if (excess[e] < 0 && far[e] < least) {
                        least = far[e];
                        best = e;
                    }
                }
                for (int step = 16; step > 0; step /= 2) {
                    double other = __shfl_xor_sync(ALL_LANES, least, step);
                    int its = __shfl_xor_sync(ALL_LANES, best, step);
                    best = other < least || (other == least && its < best) ? its : best;
                    least = fmin(least, other);
                }
                if (thread == 0) { // none only where a score is NaN
                    end = best;
                    left = best == INT_MAX ? 0 : left - 1;
                }
            }
            __syncthreads();
            if (thread == 0 && end < INT_MAX) {
                excess[end]++;
                for (; from[end] != NOWHERE; end = from[end]) {
                    of[mover[(size_t)from[end] * E + end]] = end;
                    stale[end] = stale[from[end]] = 1;
                }
                excess[end]--;
            }
            __syncthreads();
        }
        __syncthreads();
    }
}

// Blocks of select_balanced(): as many as groups of tokens, if their room stays below 256 MiB.
int balancers(int E, int groups) {
    return max_int(1, (int)fmin(groups, (double)(1 << 28) / ((double)E * E * (sizeof(Rank) + sizeof(int)))));
}

// For `groups` groups of n tokens.
void select_balanced(int *expert, const float *score, int n, int E, int groups, Balancer room) {
    gpu::select_topk(expert, score, groups * n, E, 1);
    select_balanced_kernel<<<balancers(E, groups), threads_for((size_t)n * E), 0, stream>>>(expert, score, n, E, groups,
                                                                                            room);
    CHECK(cudaGetLastError());
}

// ---- gate

__global__ void gate_forward_kernel(float *weight, const float *p, const int *expert, int N, int E, int K, int gate,
                                    double scale) {
    int row = row_of_warp(), lane = threadIdx.x % 32;
    if (row >= N)
        return;
    float sum = 0;
    for (int k = lane; k < K; k += 32) {
        int e = expert[(size_t)row * K + k];
        sum += e < 0 ? 0 : p[(size_t)row * E + e];
    }
    sum = warp_sum(sum);
    for (int k = lane; k < K; k += 32) {
        int e = expert[(size_t)row * K + k];
        float w = e < 0 ? 0 : (float)scale * p[(size_t)row * E + e];
        weight[(size_t)row * K + k] = e >= 0 && gate == RENORMALIZED ? w / sum : w;
    }
}

void gate_forward(float *weight, const float *p, const int *expert, int N, int E, int K, int gate, double scale) {
    gate_forward_kernel<<<row_blocks(N), THREADS, 0, stream>>>(weight, p, expert, N, E, K, gate, scale);
    CHECK(cudaGetLastError());
}

__global__ void gate_backward_kernel(float *dp, const float *dweight, const float *weight, const float *p,
                                     const int *expert, int N, int E, int K, int gate, double scale) {
    int row = row_of_warp(), lane = threadIdx.x % 32;
    if (row >= N)
        return;
    float sum = 0, mean = 0;
    for (int k = lane; k < K; k += 32) {
        int e = expert[(size_t)row * K + k];
        sum += e < 0 ? 0 : p[(size_t)row * E + e];
        mean += dweight[(size_t)row * K + k] * weight[(size_t)row * K + k];
    }
    sum = warp_sum(sum);
    mean = warp_sum(mean);
    for (int k = lane; k < K; k += 32) {
        int e = expert[(size_t)row * K + k];
        float d = dweight[(size_t)row * K + k] * (float)scale;
        if (e >= 0)
            dp[(size_t)row * E + e] += gate == RENORMALIZED ? (d - mean) / sum : d;
    }
}

void gate_backward(float *dp, const float *dweight, const float *weight, const float *p, const int *expert, int N,
                   int E, int K, int gate, double scale) {
    gate_backward_kernel<<<row_blocks(N), THREADS, 0, stream>>>(dp, dweight, weight, p, expert, N, E, K, gate, scale);
    CHECK(cudaGetLastError());
}

__global__ void join_gates_forward_kernel(int *expert, float *weight, Gate groups, Gate inner, size_t size) {
    int M = groups.K, each = inner.K, D = inner.per;
    size_t i = thread_of_grid(), n = i / ((size_t)M * each), m = i / each;
    if (i >= size)
        return;
    size_t k = (n * D + groups.expert[m]) * each + i % each;
    expert[i] = groups.expert[m] * inner.E + inner.expert[k];
    weight[i] = groups.weight[m] * inner.weight[k];
}

void join_gates_forward(int *expert, float *weight, const Gate *groups, const Gate *inner, int N) {
    size_t size = (size_t)N * groups->K * inner->K;
    join_gates_forward_kernel<<<blocks(size), THREADS, 0, stream>>>(expert, weight, *groups, *inner, size);
    CHECK(cudaGetLastError());
}

__global__ void join_gates_backward_kernel(float *dgroups, float *dinner, const float *dweight, Gate groups, Gate inner,
                                           size_t size) {
    int M = groups.K, each = inner.K, D = inner.per;
    size_t m = thread_of_grid();
    if (m >= size)
        return;
    size_t k = (m / M * D + groups.expert[m]) * each;
    float sum = 0;
    for (int i = 0; i < each; i++) {
        sum += dweight[m * each + i] * inner.weight[k + i];
        dinner[k + i] = dweight[m * each + i] * groups.weight[m];
    }
    dgroups[m] = sum;
}

void join_gates_backward(float *dgroups, float *dinner, const float *dweight, const Gate *groups, const Gate *inner,
                         int N) {
    size_t size = (size_t)N * groups->K;
    zero(dinner, (size_t)N * inner->per * inner->K * sizeof(float));
    join_gates_backward_kernel<<<blocks(size), THREADS, 0, stream>>>(dgroups, dinner, dweight, *groups, *inner, size);
    CHECK(cudaGetLastError());
}

// ---- plan

__global__ void decline_second_kernel(int *key, const float *weight, int N, double threshold, double scale,
                                      uint64_t stream, uint64_t first) {
    size_t n = thread_of_grid();
    if (n < (size_t)N && random_uniform(stream, first + n) * threshold * scale >= (double)weight[2 * n + 1])
        key[2 * n + 1] = -1;
}

void decline_second(int *key, const float *weight, int N, double threshold, double scale, uint64_t random,
                    uint64_t first) {
    decline_second_kernel<<<blocks(N), THREADS, 0, stream>>>(key, weight, N, threshold, scale, random, first);
    CHECK(cudaGetLastError());
}

// The i-th choice that is served, of a group of n tokens.
__device__ int served(int i, int n, int K, int order) {
    return order == BY_CHOICE ? i % n * K + i / n : i;
}

// The choices as candidates of the units that have a capacity. Served one after the other, a unit's choice is refused
// if so many came before it, and an exempt one never; whether exempt ones come before or not, all up to the capacity
// are taken. So the first `capacity` are, or those with the highest weights, and the exempt ones.
struct UnitsChoice {
    int *key; // put() writes what other blocks read; a choice that they do not own stays one
    const float *weight;
    const unsigned char *exempt;
    int n, E, K, units, order;

    BOTH size_t size(int) const {
        return (size_t)n * K;
    }
    __device__ size_t at(size_t i, int group) const {
        return (size_t)group * n * K + served((int)i, n, K, order);
    }
    __device__ Rank rank(size_t i, int group, int first, int mine, int *unit) const {
        int e = key[at(i, group)], u = e < 0 ? -1 : group_of(e, E, units) - first;
        *unit = u >= 0 && u < mine ? u : -1;
        return rank_of(order == BY_SCORE && *unit >= 0 ? order_of(weight[at(i, group)]) : 0, (unsigned)i);
    }
    __device__ void put(size_t i, int group, int, int, int taken) const {
        size_t choice = at(i, group);
        if (!taken && !(exempt && exempt[choice / K]))
            key[choice] = -1;
    }
    __device__ void end(int, int, unsigned) const {
    }
};

// One warp a group of tokens, which goes through its choices one after the other, its lanes over the experts.
__global__ void overflow_kernel(Plan plan, int n, int capacity, int order, const unsigned char *exempt,
                                const float *p) {
    extern __shared__ float4 dynamic[];
    int *taken = (int *)dynamic, E = plan.E, K = plan.K, choices = n * K, lane = threadIdx.x;
    size_t first = (size_t)blockIdx.x * choices;
    for (int e = lane; e < E; e += 32)
        taken[e] = 0;
    __syncwarp();
    for (int base = 0; base < choices; base += 32) {
        int i = base + lane, place = i < choices ? served(i, n, K, order) : 0,
            key = i < choices ? plan.key[first + place] : -1;
        for (int j = 0; j < min_int(32, choices - base); j++) {
            size_t choice = first + __shfl_sync(ALL_LANES, place, j), token = choice / K;
            int e = __shfl_sync(ALL_LANES, key, j);
            if (e < 0)
                continue;
            int refused = taken[e] >= capacity && !(exempt && exempt[token]);
            Rank best = 0;
            __syncwarp();
            for (int other = lane; refused && other < E; other += 32) {
                int is_chosen = 0;
                for (int k = 0; k < K; k++)
                    is_chosen |= plan.expert[token * K + k] == other;
                Rank rank = is_chosen || taken[other] >= capacity ? 0 : rank_of(order_of(p[token * E + other]), other);
                best = rank > best ? rank : best;
            }
            best = refused ? warp_best(best) : 0;
            if (lane == 0 && refused) {
                plan.key[choice] = best ? index_of(best) : -1;
                plan.expert[choice] = best ? index_of(best) : e;
            }
            if (lane == 0 && (!refused || best))
                taken[refused ? index_of(best) : e]++;
            __syncwarp();
        }
    }
}

// The refused are not counted here, but after the sort: see router_forward().
void plan_capacity(Plan *plan, int group_tokens, double factor, int units, int order, const float *weight,
                   const unsigned char *exempt, const float *p) {
    int choices = group_tokens * plan->K, groups = plan->N / group_tokens;
    int capacity = (int)fmin(ceil(factor * plan->K * group_tokens / units - 1e-9), (double)choices);
    if (factor <= 0)
        return;
    if (p) {
        overflow_kernel<<<groups, 32, plan->E * sizeof(int), stream>>>(*plan, group_tokens, capacity, order, exempt, p);
        CHECK(cudaGetLastError());
        return;
    }
    UnitsChoice candidates = {plan->key, weight, exempt, group_tokens, plan->E, plan->K, units, order};
    gpu::take_best(candidates, groups, units, capacity);
}

// A counting sort without a long wait: of chunks of choices, a warp each, the experts are counted; each expert's
// counts are added up over the chunks, then the experts'; and each chunk knows where its choices go.
const int SORT_CHUNK = 1024;

__global__ void sort_count_kernel(int *count, const int *key, size_t choices, int E) {
    extern __shared__ float4 dynamic[];
    int *mine = (int *)dynamic, lane = threadIdx.x;
    for (int e = lane; e < E; e += 32)
        mine[e] = 0;
    __syncwarp();
    size_t first = (size_t)blockIdx.x * SORT_CHUNK;
    for (size_t i = first + lane; i < choices && i < first + SORT_CHUNK; i += AHEAD * 32) {
        int e[AHEAD];
        for (int j = 0; j < AHEAD; j++)
            e[j] = i + j * 32 < choices ? key[i + j * 32] : -1;
        for (int j = 0; j < AHEAD; j++) {
            if (e[j] >= 0)
                atomicAdd(&mine[e[j]], 1);
        }
    }
    __syncwarp();
    for (int e = lane; e < E; e += 32)
        count[(size_t)blockIdx.x * E + e] = mine[e];
}

// count (chunks,E) becomes that of the chunks before; total (E)
__global__ void sort_chunks_kernel(int *count, int *total, int chunks, int E) {
    int e = row_of_warp(), lane = threadIdx.x % 32, sum = 0;
    if (e >= E)
        return;
    for (int first = 0; first < chunks; first += 32) {
        int chunk = first + lane, own = chunk < chunks ? count[(size_t)chunk * E + e] : 0, upto = warp_scan(own);
        if (chunk < chunks)
            count[(size_t)chunk * E + e] = sum + upto - own;
        sum += __shfl_sync(ALL_LANES, upto, 31);
    }
    if (lane == 0)
        total[e] = sum;
}

__global__ void sort_offsets_kernel(int *offset, const int *total, int E) { // one warp
    int lane = threadIdx.x, sum = 0;
    for (int first = 0; first < E; first += 32) {
        int e = first + lane, upto = warp_scan(e < E ? total[e] : 0);
        if (e < E)
            offset[e + 1] = sum + upto;
        sum += __shfl_sync(ALL_LANES, upto, 31);
    }
    if (lane == 0)
        offset[0] = 0;
}

__global__ void sort_place_kernel(Plan plan, const int *before, size_t choices) {
    extern __shared__ float4 dynamic[];
    int *next = (int *)dynamic, lane = threadIdx.x; // each expert's next slot
    for (int e = lane; e < plan.E; e += 32)
        next[e] = plan.offset[e] + before[(size_t)blockIdx.x * plan.E + e];
    __syncwarp();
    size_t begin = (size_t)blockIdx.x * SORT_CHUNK;
    for (size_t first = begin + lane; first - lane < choices && first < begin + SORT_CHUNK; first += AHEAD * 32) {
        int key[AHEAD];
        for (int j = 0; j < AHEAD; j++)
            key[j] = first + j * 32 < choices ? plan.key[first + j * 32] : -1;
        for (int j = 0; j < AHEAD; j++) {
            size_t i = first + j * 32;
            unsigned same = __match_any_sync(ALL_LANES, key[j]);
            int e = key[j], earlier = __popc(same & ((1u << lane) - 1)), slot = e < 0 ? -1 : next[e] + earlier;
            __syncwarp();
            if (e >= 0 && earlier == 0)
                next[e] += __popc(same);
            __syncwarp();
            if (i < choices)
                plan.slot[i] = slot;
            if (slot >= 0) {
                plan.choice[slot] = (int)i;
                plan.token[slot] = (int)(i / plan.K);
            }
        }
    }
}

size_t sort_room(size_t choices, int E) { // ints
    return ((choices + SORT_CHUNK - 1) / SORT_CHUNK + 1) * E;
}

// How often each expert is among `choices` keys: the first E ints of room, which is of sort_room() ints. Then the rows
// (chunks,E) of the chunks before each.
void count_keys(int *room, const int *key, size_t choices, int E) {
    int chunks = blocks(choices, SORT_CHUNK);
    sort_count_kernel<<<chunks, 32, E * sizeof(int), stream>>>(room + E, key, choices, E);
    CHECK(cudaGetLastError());
    sort_chunks_kernel<<<row_blocks(E), THREADS, 0, stream>>>(room + E, room, chunks, E);
    CHECK(cudaGetLastError());
}

// room: sort_room() ints. What choice and token hold behind the last slot stays as it is.
void plan_sort(Plan *plan, int *room) {
    size_t choices = (size_t)plan->N * plan->K;
    int chunks = blocks(choices, SORT_CHUNK), E = plan->E;
    gpu::count_keys(room, plan->key, choices, E);
    sort_offsets_kernel<<<1, 32, 0, stream>>>(plan->offset, room, E);
    CHECK(cudaGetLastError());
    sort_place_kernel<<<chunks, 32, E * sizeof(int), stream>>>(*plan, room + E, choices);
    CHECK(cudaGetLastError());
}

// ---- balance

// One block for each group of tokens and each of its rows.
__global__ void __launch_bounds__(1024)
    count_choices_kernel(double *count, const int *choice, int E, int K, int first, int tokens, int per) {
    extern __shared__ float4 dynamic[];
    int *mine = (int *)dynamic;
    for (int e = threadIdx.x; e < E; e += blockDim.x)
        mine[e] = 0;
    __syncthreads();
    for (size_t i = threadIdx.x; i < (size_t)tokens * first; i += AHEAD * blockDim.x) {
        int e[AHEAD];
        for (int j = 0; j < AHEAD; j++) {
            size_t at = i + j * blockDim.x,
                   row = ((size_t)(blockIdx.x / per) * tokens + at / first) * per + blockIdx.x % per;
            e[j] = at < (size_t)tokens * first ? choice[row * K + at % first] : -1;
        }
        for (int j = 0; j < AHEAD; j++) {
            if (e[j] >= 0)
                atomicAdd(&mine[e[j]], 1);
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < E; e += blockDim.x)
        count[(size_t)blockIdx.x * E + e] = mine[e];
}

void count_choices(double *count, const int *choice, int rows, int E, int K, int first, int group_rows, int per) {
    int groups = rows / group_rows;
    count_choices_kernel<<<groups * per, threads_for((size_t)group_rows * first), E * sizeof(int), stream>>>(
        count, choice, E, K, first, group_rows / per, per);
    CHECK(cudaGetLastError());
}

// The four that follow: slope and count (groups, E), one block a group.
__global__ void add_balance_kernel(double *slope, const double *count, const int *width, int E, double weight) {
    double total = 0;
    slope += (size_t)blockIdx.x * E;
    count += (size_t)blockIdx.x * E;
    for (int e = threadIdx.x; e < E; e += blockDim.x)
        total += count[e] * (width ? width[e] : 1);
    total = block_sum(total);
    for (int e = threadIdx.x; e < E && total > 0; e += blockDim.x)
        slope[e] += weight * E * count[e] * (width ? width[e] : 1) / total;
}

void add_balance(double *slope, const double *count, const int *width, int E, double weight, int groups) {
    add_balance_kernel<<<groups, THREADS, 0, stream>>>(slope, count, width, E, weight);
    CHECK(cudaGetLastError());
}

__global__ void add_device_balance_kernel(double *slope, const double *count, int E, int D, double weight) {
    double total = 0;
    slope += (size_t)blockIdx.x * E;
    count += (size_t)blockIdx.x * E;
    for (int e = threadIdx.x; e < E; e += blockDim.x)
        total += count[e];
    total = block_sum(total);
    for (int e = threadIdx.x; e < E && total > 0; e += blockDim.x) {
        int d = group_of(e, E, D), first = first_of_group(d, E, D), end = first_of_group(d + 1, E, D);
        double sum = 0;
        for (int i = first; i < end; i++)
            sum += count[i];
        slope[e] += weight * E * sum / total / (end - first);
    }
}

void add_device_balance(double *slope, const double *count, int E, int D, double weight, int groups) {
    add_device_balance_kernel<<<groups, THREADS, 0, stream>>>(slope, count, E, D, weight);
    CHECK(cudaGetLastError());
}

// sent (groups, D): tokens sent to each group of experts. expert (groups*n, K)
__global__ void __launch_bounds__(1024) count_sent_kernel(double *to, const int *expert, int n, int E, int K, int D) {
    __shared__ int sent[MOST_GROUPS];
    expert += (size_t)blockIdx.x * n * K;
    for (int d = threadIdx.x; d < D; d += blockDim.x)
        sent[d] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n * K; i += blockDim.x) {
        int seen = expert[i] < 0;
        for (int j = i / K * K; j < i && !seen; j++) // a token is sent to a group once
            seen = expert[j] >= 0 && group_of(expert[j], E, D) == group_of(expert[i], E, D);
        if (!seen)
            atomicAdd(&sent[group_of(expert[i], E, D)], 1);
    }
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += blockDim.x)
        to[(size_t)blockIdx.x * D + d] = sent[d];
}

__global__ void add_communication_balance_kernel(double *slope, const double *sent, int E, int D, double weight) {
    for (int e = threadIdx.x; e < E; e += blockDim.x)
        slope[(size_t)blockIdx.x * E + e] += weight * sent[(size_t)blockIdx.x * D + group_of(e, E, D)];
}

// all: the tokens of a group on all ranks. sent (groups, D) is scratch.
void add_communication_balance(double *slope, const int *expert, int n, int E, int K, int D, int M, double weight, int all,
                               int groups, double *sent) {
    count_sent_kernel<<<groups, threads_for((size_t)n * K), 0, stream>>>(sent, expert, n, E, K, D);
    CHECK(cudaGetLastError());
    if (all != n)
        gpu::sum_over_ranks(sent, D);
    add_communication_balance_kernel<<<groups, THREADS, 0, stream>>>(slope, sent, E, D, weight * D / ((double)M * all));
    CHECK(cudaGetLastError());
}

// What a row of a gate has of slope; slope . p, and with sigmoid scores their sum
__device__ const double *row_slope(const Gate &g, const double *slope, int row, int group_rows) {
    return slope + ((size_t)(row / group_rows) * g.per + row % g.per) * g.E;
}

__device__ double slope_times_p(const Gate &g, const double *c, int row, double *sum) {
    double dot = 0, all = 0;
    for (int e = threadIdx.x % 32; e < g.E; e += 32) {
        dot += c[e] * (double)g.p[(size_t)row * g.E + e];
        all += (double)g.p[(size_t)row * g.E + e];
    }
    *sum = warp_sum(all);
    return warp_sum(dot);
}

__global__ void balance_forward_kernel(double *loss, Gate g, const double *slope, int rows, int group_rows, int score) {
    int row = row_of_warp();
    if (row >= rows)
        return;
    double sum, dot = slope_times_p(g, row_slope(g, slope, row, group_rows), row, &sum);
    if (threadIdx.x % 32 == 0)
        loss[row] = score == SIGMOID ? dot / sum : dot;
}

// *loss += . of_row (rows) is scratch.
void balance_forward(double *loss, const Gate *g, const double *slope, int rows, int group_rows, int score,
                     double *of_row) {
    balance_forward_kernel<<<row_blocks(rows), THREADS, 0, stream>>>(of_row, *g, slope, rows, group_rows, score);
    CHECK(cudaGetLastError());
    gpu::add_sum(loss, Doubles{of_row}, rows, 1.0 / rows);
}

__global__ void balance_backward_kernel(float *dp, Gate g, const double *slope, int rows, int group_rows, int score,
                                        double scale) {
    int row = row_of_warp();
    if (row >= rows)
        return;
    const double *c = row_slope(g, slope, row, group_rows);
    double sum = 1, dot = score == SIGMOID ? slope_times_p(g, c, row, &sum) : 0;
    for (int e = threadIdx.x % 32; e < g.E; e += 32)
        dp[(size_t)row * g.E + e] += (float)(scale / rows * (score == SIGMOID ? (c[e] - dot / sum) / sum : c[e]));
}

void balance_backward(float *dp, const Gate *g, const double *slope, int rows, int group_rows, int score,
                      double scale) {
    balance_backward_kernel<<<row_blocks(rows), THREADS, 0, stream>>>(dp, *g, slope, rows, group_rows, score, scale);
    CHECK(cudaGetLastError());
}

// By a whole block, which has seen all of v.
__device__ double cv_squared_of(const double *v, double *slope, int n, double mean, double weight) {
    double average = 0, variance = 0, fixed = mean;
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        average += v[i] / n;
    average = block_sum(average);
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        variance += (v[i] - average) * (v[i] - average) / n;
    variance = block_sum(variance);
    mean = fixed > 0 ? fixed : average;
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        slope[i] = weight * 2 / (n * mean * mean) * (v[i] - average - (fixed > 0 ? 0 : variance / mean));
    return 1 + variance / (mean * mean);
}

__global__ void cv_squared_kernel(double *loss, const double *v, double *slope, int n, double mean, double weight) {
    size_t at = (size_t)blockIdx.x * n;
    double value = cv_squared_of(v + at, slope + at, n, mean, weight);
    if (threadIdx.x == 0)
        loss[blockIdx.x] = value;
}

// loss (groups), v and slope (groups,n)
void cv_squared(double *loss, const double *v, double *slope, int n, double mean, double weight, int groups) {
    cv_squared_kernel<<<groups, THREADS, 0, stream>>>(loss, v, slope, n, mean, weight);
    CHECK(cudaGetLastError());
}

// The best of a row of noisy logits h that is not chosen, by a warp.
__device__ int best_of_others(const float *h, const int *chosen, int E, int K) {
    Rank best = 0;
    for (int e = threadIdx.x % 32; e < E; e += 32) {
        int is_chosen = 0;
        for (int k = 0; k < K; k++)
            is_chosen |= chosen[k] == e;
        Rank rank = is_chosen ? 0 : rank_of(order_of(h[e]), e);
        best = rank > best ? rank : best;
    }
    return index_of(warp_best(best));
}

__global__ void best_of_others_kernel(int *next, Gate g, const float *noisy, int rows, int W) {
    int row = row_of_warp();
    if (row >= rows)
        return;
    int best = best_of_others(noisy + logits_of(g, row, W), g.expert + (size_t)row * g.K, g.E, g.K);
    if (threadIdx.x % 32 == 0)
        next[row] = best;
}

// (logit - t) / size of expert e in a row, with t one of h
__device__ double certainty(const float *logit, float t, int W, double *size) {
    *size = noise_size(logit[W]);
    return ((double)logit[0] - (double)t) / *size;
}

struct SmoothLoad { // by token and (row of the token, expert)
    Gate g;
    const float *noisy, *logits;
    const int *next; // (N*per) best_of_others()
    const unsigned char *live;
    int W;
    __device__ double operator()(size_t n, int j) const {
        int row = (int)n * g.per + j / g.E, e = j % g.E, t = g.expert[(size_t)row * g.K + g.K - 1];
        if (live && !live[row])
            return 0;
        for (int k = 0; k < g.K; k++)
            t = g.expert[(size_t)row * g.K + k] == e ? next[row] : t;
        size_t at = logits_of(g, row, W);
        double size, v = certainty(logits + at + n * W + e, noisy[at + t], W, &size);
        return 0.5 * (1 + erf(v * 0.7071067811865476));
    }
};

__global__ void smooth_load_backward_kernel(float *dnoisy, float *dlogits, const double *dload, int stride, Gate g,
                                            const float *noisy, const float *logits, int W, int rows, int group_rows,
                                            const unsigned char *live, double scale) {
    int row = row_of_warp(), lane = threadIdx.x % 32;
    if (row >= rows || (live && !live[row]))
        return;
    size_t at = logits_of(g, row, W), raw = at + (size_t)(row / g.per) * W;
    const int *chosen = g.expert + (size_t)row * g.K;
    const double *d = dload + (size_t)(row / group_rows) * stride + row % g.per * g.E;
    int next = best_of_others(noisy + at, chosen, g.E, g.K), last = chosen[g.K - 1];
    double of_next = 0, of_last = 0;
    for (int e = lane; e < g.E; e += 32) {
        int is_chosen = 0;
        for (int k = 0; k < g.K; k++)
            is_chosen |= chosen[k] == e;
        double size, v = certainty(logits + raw + e, noisy[at + (is_chosen ? next : last)], W, &size);
        double slope = scale * d[e] * exp(-0.5 * v * v) * 0.3989422804014327 / size;
        dlogits[raw + e] += (float)slope;
        dlogits[raw + W + e] -= (float)(slope * v * noise_slope(logits[raw + W + e]));
        of_next += is_chosen ? slope : 0;
        of_last += is_chosen ? 0 : slope;
    }
    of_next = warp_sum(of_next);
    of_last = warp_sum(of_last);
    if (lane == 0) {
        dnoisy[at + next] -= (float)of_next;
        dnoisy[at + last] -= (float)of_last;
    }
}

// load (groups, per*E) = , of groups of n tokens each; or with dload, whose groups are `stride` apart, scale times the
// slopes. Scratch: next (groups*n*per), part for column_sums() of (n, per*E)
void smooth_load(double *load, const double *dload, int stride, float *dnoisy, float *dlogits, const Gate *g,
                 const float *noisy, const float *logits, int W, int groups, int n, const unsigned char *live,
                 double scale, int *next, double *part) {
    int rows = groups * n * g->per;
    if (dload) {
        smooth_load_backward_kernel<<<row_blocks(rows), THREADS, 0, stream>>>(dnoisy, dlogits, dload, stride, *g, noisy,
                                                                              logits, W, rows, n * g->per, live, scale);
        CHECK(cudaGetLastError());
        return;
    }
    best_of_others_kernel<<<row_blocks(rows), THREADS, 0, stream>>>(next, *g, noisy, rows, W);
    CHECK(cudaGetLastError());
    gpu::column_sums(load, SmoothLoad{*g, noisy, logits, next, live, W}, groups, n, g->per * g->E, 0, part);
}

// ---- the router of a layer, and what of section 7 belongs to it

// Groups of tokens in training: what tables of them have room for.
int most_groups(const Model *m) {
    const Config *c = &m->config;
    return c->group == SEQUENCE ? div_up(m->max_tokens, c->seq) : 1;
}

void allocate_router(Model *m, int n) {
    const Config *c = &m->config;
    RouterScratch *r = &m->router;
    int E = c->experts, D = c->groups, R = c->recurrent, two = c->select == HIERARCHICAL, groups = most_groups(m);
    int tokens = c->group == SEQUENCE ? c->seq * c->subtokens : n; // of a group
    size_t per = (size_t)(two ? D : c->routers), sums = 0, chunks = (size_t)groups * div_up(tokens, CHUNK);
    size_t blocks = balancers(E, groups), balanced = c->select == BALANCED, by_experts = c->select == EXPERT_CHOICE;
    size_t all = is_spread(c) ? (size_t)n * ranks.size : 0, K = (size_t)most_choices(c), scored = all ? all : (size_t)n;
    if (c->noise || c->balance == CV2 || c->balance == VARIANCE)
        sums = chunks * E;
    if ((size_t)div_up(n, CHUNK) * 3 * R > sums)
        sums = (size_t)div_up(n, CHUNK) * 3 * R;
    r->sort = (int *)gpu::own(m, sort_room((size_t)n * most_choices(c), max_int(E, 2 * ranks.ep)), sizeof(int));
    r->active = (int *)gpu::own(m, 1, sizeof(int));
    r->next = (int *)gpu::own(m, c->noise ? n * per : 0, sizeof(int));
    r->rows = (double *)gpu::own(m, n * per, sizeof(double));
    r->part = (double *)gpu::own(m, sums, sizeof(double));
    r->load = (double *)gpu::own(m, c->noise ? (size_t)groups * 2 * (E + D) : 0, sizeof(double));
    r->sent = (double *)gpu::own(m, c->comm_weight > 0 ? (size_t)groups * D : 0, sizeof(double));
    r->taken = (unsigned char *)gpu::own(m, by_experts * scored * E, 1);
    r->lowest = (float *)gpu::own(m, by_experts * groups * E, sizeof(float));
    r->balancer.cost = (Rank *)gpu::own(m, balanced * blocks * E * E, sizeof(Rank));
    r->balancer.mover = (int *)gpu::own(m, balanced * blocks * E * E, sizeof(int));
    r->balancer.excess = (int *)gpu::own(m, balanced * blocks * E, sizeof(int));
    r->balancer.list = (int *)gpu::own(m, balanced * (all ? all : blocks * tokens), sizeof(int));
    all *= by_experts || balanced || c->capacity_factor > 0 || c->eval_capacity_factor > 0;
    r->all_score = (float *)gpu::own(m, all * E, sizeof(float));
    r->all_weight = (float *)gpu::own(m, all * K, sizeof(float));
    r->all_expert = (int *)gpu::own(m, all * K, sizeof(int));
    r->all_key = (int *)gpu::own(m, all * K, sizeof(int));
    r->all_marks = (unsigned char *)gpu::own(m, all, 1);
}

void own_gate(Model *m, Gate *g, int n, int per, int E, int K, int column) {
    size_t rows = (size_t)n * per;
    g->per = per;
    g->E = E;
    g->K = K;
    g->column = column;
    g->p = (float *)gpu::own(m, rows * E, sizeof(float));
    g->lse = (float *)gpu::own(m, rows, sizeof(float));
    g->weight = (float *)gpu::own(m, rows * K, sizeof(float));
    g->expert = (int *)gpu::own(m, rows * K, sizeof(int));
}

// What the router of one layer keeps.
void allocate_experts(Model *m, int l, int N) {
    const Config *c = &m->config;
    LayerState *s = &m->layers[l];
    int E = c->experts, K = most_choices(c), R = c->routers, D = c->groups, W = router_rows(c), n = N * c->subtokens,
        two = c->select == HIERARCHICAL, groups = most_groups(m);
    size_t nK = (size_t)n * K, real_size = sizeof(float);
    gpu::own_gate(m, &s->gate, n, two ? D : R, two ? E / D : E, two ? K / c->group_topk : K / R, two ? D : 0);
    if (two)
        gpu::own_gate(m, &s->groups, n, 1, D, c->group_topk, 0);
    s->jittered = c->jitter > 0 ? (float *)gpu::own(m, (size_t)N * c->dim, real_size) : NULL;
    s->projected = (float *)gpu::own(m, (size_t)N * c->recurrent, real_size);
    s->gru = (float *)gpu::own(m, (size_t)N * 4 * c->recurrent, real_size);
    s->state = (float *)gpu::own(m, (size_t)N * c->recurrent, real_size);
    s->logits = (float *)gpu::own(m, (size_t)n * W * (1 + c->noise), real_size);
    s->noisy = c->noise ? (float *)gpu::own(m, (size_t)n * W, real_size) : s->logits;
    s->weight = two ? (float *)gpu::own(m, nK, real_size) : s->gate.weight;
    s->slope = (double *)gpu::own(m, (size_t)groups * R * E, sizeof(double));
    s->weight_slope = (double *)gpu::own(m, (size_t)groups * E, sizeof(double));
    s->load_slope = (double *)gpu::own(m, (size_t)groups * (E + D), sizeof(double));
    int *ints = (int *)gpu::own(m, nK * 5 + E + 1, sizeof(int));
    Plan plan = {
        n, E, K, two ? ints : s->gate.expert, ints + nK, ints + nK * 2, ints + nK * 3, ints + nK * 4, ints + nK * 5};
    s->plan = plan;
    if (ranks.ep == 1)
        return;
    int to = ranks.ep * (c->overlap ? 2 : 1);
    ints = (int *)gpu::own(m, nK * 5 + to + 1, sizeof(int));
    Plan sending = {n, to, K, ints, ints + nK, ints + nK * 2, ints + nK * 3, ints + nK * 4, ints + nK * 5};
    s->sending = sending;
    s->exchange = (Exchange *)own_host(m, 2, sizeof(Exchange));
    for (int half = 0; half < 2; half++) {
        Exchange *ex = &s->exchange[half];
        ex->sent = (int *)own_host(m, (size_t)ranks.ep * 4, sizeof(int));
        ex->sent_at = ex->sent + ranks.ep;
        ex->got = ex->sent_at + ranks.ep;
        ex->got_at = ex->got + ranks.ep;
    }
    size_t rows = (size_t)n * min_int(K, ranks.ep), room = rows * (c->dim / c->subtokens * sizeof(floatX) + K * 5 * sizeof(int)) +
                  nK * m->experts.hidden_width * sizeof(floatX);
    m->bytes[m->purpose] += room / 4 * 5; // Exchange.room, with an even load
}

LayerState *experts_below(Model *m, int l) {
    while (--l >= 0 && !is_moe(&m->config, l))
        ;
    return l < 0 ? NULL : &m->layers[l];
}

// What decides, where it is not p. bias NULL: none
__global__ void choice_score_kernel(float *score, const float *p, const float *bias, int E, size_t size) {
    size_t i = thread_of_grid();
    if (i < size)
        score[i] = p[i] + (bias ? bias[i % E] : 0);
}

__global__ void add_passes_kernel(double *passes, int groups) {
    *passes += groups;
}

void copy_ints(int *to, const int *from, size_t n, cudaMemcpyKind where) {
    CHECK(cudaMemcpyAsync(to, from, n * sizeof(int), where, stream));
}

// All tokens' rows of the group, in order, where the group is spread over ranks: each token's `bytes`. Returns how many
// tokens come before this rank's.
int gather_tokens(const Model *m, void *all, const void *mine, size_t bytes) {
    int before = 0, at = 0;
    follow(network, stream);
    nccl_begin();
    for (int r = 0; r < ranks.size; r++) {
        int tokens = m->crossing->rank_tokens[r] * m->config.subtokens;
        nccl_broadcast(mine, (char *)all + at * bytes, tokens * bytes, r);
        before += r < ranks.rank ? tokens : 0;
        at += tokens;
    }
    nccl_end();
    wait_for_network();
    return before;
}

void choose(Model *m, int l, LayerState *s, const float *router_in, int n, int group_tokens) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l];
    const LayerPlan *decided = m->decided && c->overflow != NEXT ? &m->decided[l] : NULL;
    RouterScratch *r = &m->router;
    Gate *g = &s->gate;
    Plan *plan = &s->plan;
    int rows = n * g->per, E = c->experts, W = router_rows(c), C = c->recurrent ? c->recurrent : c->dim / c->subtokens,
        groups = is_spread(c) ? 1 : n / group_tokens, mine = 0;
    double *stats = layer_stats(m, l);
    const float *score = g->p, *by = c->select == BALANCED ? s->logits : g->p;
    int *expert = g->expert, whole = (c->select == EXPERT_CHOICE || c->select == BALANCED) && m->batch.mode == TRAIN_MODE;
    if (w->slow) {
        gpu::product(m->choice_score, along_rows(router_in, C), along_rows(w->slow, C), n, W, C, 0);
        score = m->choice_score;
    } else if (w->bias || (c->select == TOP_K && c->group_topk)) {
        choice_score_kernel<<<blocks((size_t)n * E), THREADS, 0, stream>>>(m->choice_score, g->p, w->bias, E,
                                                                           (size_t)n * E);
        CHECK(cudaGetLastError());
        score = m->choice_score;
    }
    if (c->select == TOP_K && c->group_topk)
        gpu::mask_groups(m->choice_score, n, E, c->groups, c->group_topk, c->group_score);
    if (whole && is_spread(c)) { // each rank chooses for all
        mine = gpu::gather_tokens(m, r->all_score, by, (size_t)E * sizeof(float));
        by = r->all_score;
        expert = r->all_expert;
    }
    if (c->select == EXPERT_CHOICE && m->batch.mode == TRAIN_MODE) {
        int take = max_int(1, (int)((double)group_tokens * c->topk / E));
        gpu::select_by_experts(expert, stats + E, by, group_tokens, E, take, groups, r->taken, r->lowest);
        add_passes_kernel<<<1, 1, 0, stream>>>(stats + 4 * E + PASSES, groups);
        CHECK(cudaGetLastError());
    } else if (c->select == BALANCED && m->batch.mode == TRAIN_MODE) {
        gpu::select_balanced(expert, by, group_tokens, E, groups, r->balancer);
    } else {
        gpu::select_topk(g->expert, score, rows, g->E, g->K);
    }
    if (expert != g->expert)
        copy_ints(g->expert, expert + (size_t)mine * g->K, (size_t)n * g->K, cudaMemcpyDeviceToDevice);
    if (c->select == THRESHOLD || (c->select == EXPERT_CHOICE && m->batch.mode != TRAIN_MODE))
        gpu::select_above(g->expert, g->p, n, E, g->K, w->level, c->threshold > 0 ? c->threshold : 1.0 / E,
                          c->select == THRESHOLD);
    if (decided)
        copy_ints(g->expert, decided->gate_expert, (size_t)rows * g->K, cudaMemcpyHostToDevice);
    gpu::gate_forward(g->weight, g->p, g->expert, rows, g->E, g->K, c->gate, c->scale / c->routers);
    if (c->select == HIERARCHICAL) {
        gpu::select_topk(s->groups.expert, s->groups.p, n, c->groups, c->group_topk);
        if (decided)
            copy_ints(s->groups.expert, decided->groups_expert, (size_t)n * c->group_topk, cudaMemcpyHostToDevice);
        gpu::gate_forward(s->groups.weight, s->groups.p, s->groups.expert, n, c->groups, c->group_topk, c->gate, 1);
        gpu::join_gates_forward(plan->expert, s->weight, &s->groups, g, n);
    }
}

__global__ void mark_groups_kernel(unsigned char *marks, const int *chosen, size_t size, int D, int M) {
    size_t i = thread_of_grid();
    if (i < size)
        marks[i / M * D + chosen[i]] = 1;
}

void mark_groups(Model *m, const LayerState *s, int n) {
    const Config *c = &m->config;
    size_t size = (size_t)n * c->group_topk;
    int two = c->select == HIERARCHICAL;
    CHECK(cudaMemsetAsync(m->marks, !two, (size_t)n * c->groups, stream));
    if (!two)
        return;
    mark_groups_kernel<<<blocks(size), THREADS, 0, stream>>>(m->marks, s->groups.expert, size, c->groups,
                                                             c->group_topk);
    CHECK(cudaGetLastError());
}

// The arrays of RouterScratch.load become slope (groups, E + D) and loss (groups); one block a group of tokens. two:
// whether groups of experts are chosen first; of_slope: what slopes are multiplied by
__global__ void load_losses_kernel(double *loss, double *slope, double *load, const double *inner, const double *outer,
                                   const double *sent, int E, int D, int two, double weight, double of_slope) {
    size_t group = blockIdx.x;
    slope += group * (E + D);
    load += group * E;
    inner += group * E;
    outer += group * D;
    sent += group * D;
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        int d = group_of(e, E, D);
        load[e] = !two ? inner[e] : sent[d] > 0 ? outer[d] * inner[e] / sent[d] : 0;
    }
    __syncthreads();
    double value = weight * cv_squared_of(load, slope, E, 0, weight * of_slope);
    if (threadIdx.x == 0)
        loss[group] = value;
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        double sum = 0;
        for (int e = first_of_group(d, E, D); two && e < first_of_group(d + 1, E, D); e++) {
            sum += sent[d] > 0 ? slope[e] * inner[e] / sent[d] : 0;
            slope[e] *= sent[d] > 0 ? outer[d] / sent[d] : 0;
        }
        slope[E + d] = sum;
    }
}

// Gradients are averaged over ranks: what the slope of a sum over them is multiplied by.
double slope_factor(const Config *c) {
    return is_spread(c) ? ranks.size : 1;
}

void load_losses(Model *m, double *loss, LayerState *s, int n, int group_tokens) {
    const Config *c = &m->config;
    RouterScratch *r = &m->router;
    int E = c->experts, D = c->groups, two = c->select == HIERARCHICAL, W = router_rows(c), groups = n / group_tokens;
    double *inner = r->load, *outer = inner + (size_t)groups * E, *sent = outer + (size_t)groups * D,
           *load = sent + (size_t)groups * D;
    gpu::mark_groups(m, s, n);
    gpu::smooth_load(inner, NULL, 0, NULL, NULL, &s->gate, s->noisy, s->logits, W, groups, group_tokens, m->marks, 1,
                     r->next, r->part);
    if (two) {
        gpu::smooth_load(outer, NULL, 0, NULL, NULL, &s->groups, s->noisy, s->logits, W, groups, group_tokens, NULL, 1,
                         r->next, r->part);
        gpu::column_sums(sent, Entries<unsigned char>{m->marks, D}, groups, group_tokens, D, 0, r->part);
    }
    if (is_spread(c))
        gpu::sum_over_ranks(inner, two ? E + 2 * D : E);
    load_losses_kernel<<<groups, THREADS, 0, stream>>>(r->rows, s->load_slope, load, inner, outer, sent, E, D, two,
                                                       c->load_weight * group_tokens / n, slope_factor(c));
    CHECK(cudaGetLastError());
    gpu::add_sum(loss, Doubles{r->rows}, groups, 1);
}

// Whether a loss is of the weights that each expert is given.
int of_weights(const Config *c) {
    return c->aux_weight > 0 && (c->balance == CV2 || c->balance == VARIANCE);
}

// Into the layer's AUX.
void balance_losses(Model *m, int l, LayerState *s, int n, int group_tokens, int whole_group) {
    const Config *c = &m->config;
    RouterScratch *r = &m->router;
    Gate *g = &s->gate;
    const Plan *plan = &s->plan;
    int E = c->experts, K = plan->K, R = c->routers, rows = n * R, groups = n / group_tokens,
        group_rows = group_tokens * R;
    double *counts = m->counts, *stats = layer_stats(m, l), *aux = stats + 4 * E + AUX;
    zero(aux, sizeof(double));
    if (c->z_weight > 0)
        gpu::add_sum(aux, Squares{g->lse}, (size_t)n * g->per, c->z_weight / (n * g->per));
    if (c->sparsity_weight > 0)
        gpu::add_sum(aux, IsChosen{plan->expert}, (size_t)n * K, c->sparsity_weight / n / E);
    if (c->load_weight > 0)
        gpu::load_losses(m, aux, s, n, group_tokens);
    if (of_weights(c)) { // of the weights given to each expert
        double mean = c->balance == VARIANCE ? (double)whole_group / E : 0, weight = c->aux_weight / groups;
        gpu::column_sums(counts, Importance{plan->expert, s->weight, K}, groups, group_tokens, E, 0, r->part);
        if (is_spread(c))
            gpu::sum_over_ranks(counts, E);
        gpu::cv_squared(r->rows, counts, s->weight_slope, E, mean, weight * slope_factor(c), groups);
        gpu::add_sum(aux, Doubles{r->rows}, groups, weight);
    }
    if (c->select == HIERARCHICAL)
        return;
    if (c->balance == UNBIASED)
        gpu::select_topk(m->unbiased, g->p, n, E, K);
    gpu::count_choices(counts, c->balance == UNBIASED ? m->unbiased : plan->key, rows, E, K / R,
                       c->balance == GSHARD ? 1 : K / R, group_rows, R);
    if (c->group == STEP && m->batch.mode == TRAIN_MODE) // all micro-steps so far (Qiu et al. 2025, Demons in the Detail)
        CHECK(cudaMemcpyAsync(counts, stats, (size_t)E * sizeof(double), cudaMemcpyDeviceToDevice, stream));
    if (is_spread(c))
        gpu::sum_over_ranks(counts, R * E);
    zero(s->slope, (size_t)groups * R * E * sizeof(double));
    if (c->balance <= WIDTH && c->aux_weight > 0)
        gpu::add_balance(s->slope, counts, c->balance == WIDTH ? m->device_width : NULL, E, c->aux_weight, groups * R);
    if (c->device_weight > 0)
        gpu::add_device_balance(s->slope, counts, E, c->groups, c->device_weight, groups * R);
    if (c->comm_weight > 0)
        gpu::add_communication_balance(s->slope, plan->key, group_tokens, E, K, c->groups, c->group_topk,
                                       c->comm_weight, is_spread(c) ? whole_group : group_tokens, groups, r->sent);
    gpu::balance_forward(aux, g, s->slope, rows, group_rows, c->score, r->rows);
}

// Adds count (E) to the count, ACTIVE and TOKENS of stats; by one block. *active = their sum.
__global__ void add_counts_kernel(double *stats, int *active, const int *count, int E, int n) {
    int sum = 0;
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        stats[e] += count[e];
        sum += count[e];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        stats[4 * E + ACTIVE] += sum;
        stats[4 * E + TOKENS] += n;
        *active = sum;
    }
}

// share NULL: every row of a token counts alike
__global__ void entropy_kernel(double *of_row, Gate g, const float *share_of, int rows, int score) {
    int row = row_of_warp();
    if (row >= rows)
        return;
    double share = share_of ? (double)share_of[row] : 1.0 / g.per, all = 0, sum = 0;
    for (int e = threadIdx.x % 32; score == SIGMOID && e < g.E; e += 32)
        all += (double)g.p[(size_t)row * g.E + e];
    all = warp_sum(all);
    for (int e = threadIdx.x % 32; e < g.E; e += 32) {
        double p = (double)g.p[(size_t)row * g.E + e] / (score == SIGMOID ? all : 1), of = share_of ? p * share : p;
        sum -= of > 0 ? share * p * log(of) : 0;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0)
        of_row[row] = sum;
}

void add_router_stats(Model *m, int l, LayerState *s) {
    const Config *c = &m->config;
    RouterScratch *r = &m->router;
    const Gate *g = &s->gate;
    double *stats = layer_stats(m, l);
    int E = c->experts, n = s->plan.N, rows = n * g->per;
    gpu::count_keys(r->sort, s->plan.key, (size_t)n * s->plan.K, E);
    add_counts_kernel<<<1, THREADS, 0, stream>>>(stats, r->active, r->sort, E, n);
    CHECK(cudaGetLastError());
    if (c->select == HASH)
        return;
    entropy_kernel<<<row_blocks(rows), THREADS, 0, stream>>>(
        r->rows, *g, c->select == HIERARCHICAL ? s->groups.p : NULL, rows, c->score);
    CHECK(cudaGetLastError());
    gpu::add_sum(stats + 4 * E + ENTROPY, Doubles{r->rows}, rows, 1);
}

__global__ void count_dropped_kernel(double *dropped, const int *active, const int *slots) {
    *dropped += *active - *slots;
}

__global__ void look_up_kernel(int *expert, float *weight, const float *table, const int *tokens, int n, float scale) {
    int i = (int)thread_of_grid();
    if (i < n) {
        expert[i] = (int)table[tokens[i]];
        weight[i] = scale;
    }
}

__global__ void mark_exempt_kernel(unsigned char *marks, int n, int T, uint64_t stream, uint64_t first, double share) {
    int i = (int)thread_of_grid();
    if (i < n)
        marks[i] = random_uniform(stream, (first + i) / T) < share;
}

// plan_capacity, where the group is spread over ranks: each rank does it for all and keeps what is its own.
void plan_whole_capacity(Model *m, Plan *plan, int group_tokens, double factor, int units, int order, const float *weight,
                         const unsigned char *exempt, const float *p) {
    RouterScratch *r = &m->router;
    size_t K = (size_t)plan->K, mine = (size_t)plan->N * K;
    Plan all = *plan;
    all.N = group_tokens;
    all.key = r->all_key;
    all.expert = r->all_expert;
    size_t first = K * gpu::gather_tokens(m, all.key, plan->key, K * sizeof(int));
    if (p) {
        gpu::gather_tokens(m, all.expert, plan->expert, K * sizeof(int));
        gpu::gather_tokens(m, r->all_score, p, plan->E * sizeof(float));
    }
    if (order == BY_SCORE)
        gpu::gather_tokens(m, r->all_weight, weight, K * sizeof(float));
    if (exempt)
        gpu::gather_tokens(m, r->all_marks, exempt, 1);
    gpu::plan_capacity(&all, group_tokens, factor, units, order, r->all_weight, exempt ? r->all_marks : NULL,
                       p ? r->all_score : NULL);
    copy_ints(plan->key, all.key + first, mine, cudaMemcpyDeviceToDevice);
    if (p)
        copy_ints(plan->expert, all.expert + first, mine, cudaMemcpyDeviceToDevice);
}

// Where m->decided is given, what was chosen and refused is the C twin's (what an overflowing expert's tokens chose
// first it does not say).
void router_forward(Model *m, int l, LayerState *s, const float *x, int n, int C, int T) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l];
    Plan *plan = &s->plan;
    double *stats = layer_stats(m, l);
    int train = m->batch.mode == TRAIN_MODE, W = router_rows(c), R = c->recurrent, group_tokens = group_size(c, n, T),
        whole_group = whole_group_size(m, n, T), order = train ? c->drop_order : BY_TOKEN,
        units = c->capacity_unit == EXPERT_GROUP ? c->groups : c->experts;
    uint64_t first = m->batch.first_token * (uint64_t)c->subtokens;
    double factor = train ? c->capacity_factor : c->eval_capacity_factor;
    plan->N = n;
    if (n == 0) { // no tokens here, but other ranks have some
        if (is_spread(c) && factor > 0)
            gpu::plan_whole_capacity(m, plan, whole_group, factor * c->topk / plan->K, units, order, s->weight, NULL,
                                     c->overflow == NEXT ? s->gate.p : NULL);
        return;
    }
    if (m->batch.mode != EVAL_MODE && n / group_tokens > most_groups(m))
        fail("internal error: %d groups of tokens, but there is room for %d", n / group_tokens, most_groups(m));
    if (c->select == HASH) {
        look_up_kernel<<<blocks(n), THREADS, 0, stream>>>(plan->expert, s->weight, w->table, m->tokens, n,
                                                          (float)c->scale);
        CHECK(cudaGetLastError());
    } else {
        if (train && c->jitter > 0) {
            gpu::apply_jitter(s->jittered, x, (size_t)n * C, c->jitter, layer_stream(m, RANDOM_JITTER, l), first * C);
            x = s->jittered;
        }
        if (R) {
            LayerState *below = gpu::experts_below(m, l);
            gpu::product(s->projected, along_rows(x, C), along_rows(w->project, C), n, R, C, 0);
            gpu::gru_forward(s->state, s->gru, s->projected, below ? below->state : NULL, m->weights.gru_x,
                             m->weights.gru_h, m->weights.gru_bx, m->weights.gru_bh, n, R, m->gru_room);
            x = s->state;
            C = R;
        }
        gpu::product(s->logits, along_rows(x, C), along_rows(w->router, C), n, W * (1 + c->noise), C, 0);
        if (c->noise)
            gpu::noise_forward(s->noisy, s->logits, n, W, train, layer_stream(m, RANDOM_NOISE, l), first);
        gpu::scores_forward(&s->gate, s->noisy, n, W, c->score);
        if (c->select == HIERARCHICAL)
            gpu::scores_forward(&s->groups, s->noisy, n, W, c->score);
        gpu::choose(m, l, s, x, n, whole_group);
    }
    copy_ints(plan->key, plan->expert, (size_t)n * plan->K, cudaMemcpyDeviceToDevice);
    if (train && c->second_threshold > 0)
        gpu::decline_second(plan->key, s->weight, n, c->second_threshold, c->scale, layer_stream(m, RANDOM_SECOND, l),
                            first);
    if (train)
        gpu::add_router_stats(m, l, s);
    if (m->batch.mode != EVAL_MODE && c->select != HASH)
        gpu::balance_losses(m, l, s, n, group_tokens, whole_group);
    int exempt = train && c->drop_exempt > 0;
    if (m->decided) {
        copy_ints(plan->expert, m->decided[l].expert, (size_t)n * plan->K, cudaMemcpyHostToDevice);
        copy_ints(plan->key, m->decided[l].key, (size_t)n * plan->K, cudaMemcpyHostToDevice);
    } else if (factor > 0) {
        if (exempt) {
            mark_exempt_kernel<<<blocks(n), THREADS, 0, stream>>>(
                m->marks, n, T, random_stream((uint64_t)c->seed, RANDOM_EXEMPT, m->batch.step, 0), first, c->drop_exempt);
            CHECK(cudaGetLastError());
        }
        const float *p = c->overflow == NEXT ? s->gate.p : NULL;
        const unsigned char *marks = exempt ? m->marks : NULL;
        if (is_spread(c))
            gpu::plan_whole_capacity(m, plan, whole_group, factor * c->topk / plan->K, units, order, s->weight, marks, p);
        else
            gpu::plan_capacity(plan, group_tokens, factor * c->topk / plan->K, units, order, s->weight, marks, p);
    }
    if (c->overflow == NEXT)
        gpu::gate_forward(s->weight, s->gate.p, plan->expert, n, plan->E, plan->K, c->gate, c->scale);
    gpu::plan_sort(plan, m->router.sort);
    if (train && (factor > 0 || m->decided)) {
        count_dropped_kernel<<<1, 1, 0, stream>>>(stats + 4 * c->experts + DROPPED, m->router.active,
                                                  plan->offset + plan->E);
        CHECK(cudaGetLastError());
    }
}

// dweight (n,K) += scale * slope (groups,E) of the chosen
__global__ void add_slopes_kernel(float *dweight, const int *expert, const double *slope, size_t size,
                                  size_t group_size, int E, double scale) {
    size_t i = thread_of_grid();
    if (i < size && expert[i] >= 0)
        dweight[i] += (float)(scale * slope[i / group_size * E + expert[i]]);
}

__global__ void add_kernel(float *to, const float *from, size_t size) {
    size_t i = thread_of_grid();
    if (i < size)
        to[i] += from[i];
}

void router_backward(Model *m, int l, LayerState *s, float *dx, const float *x, int n, int C, int T) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l], *dw = &m->grads.layer[l];
    RouterScratch *room = &m->router;
    Gate *g = &s->gate;
    Plan *plan = &s->plan;
    int E = c->experts, K = plan->K, W = router_rows(c), WW = W * (1 + c->noise), R = c->recurrent,
        group_tokens = group_size(c, n, T), rows = n * g->per, groups = n / group_tokens;
    int two = c->select == HIERARCHICAL;
    double scale = m->batch.scale;
    uint64_t first = m->batch.first_token * (uint64_t)c->subtokens;
    if (c->select == HASH)
        return;
    float *dlogits = m->dlogits, *dnoisy = c->noise ? m->dnoisy : dlogits; // by the logits, by the noisy ones
    zero(dlogits, (size_t)n * WW * sizeof(float));
    if (c->noise)
        zero(dnoisy, (size_t)n * W * sizeof(float));
    zero(m->dp, (size_t)n * W * sizeof(float));
    if (of_weights(c)) { // importance
        add_slopes_kernel<<<blocks((size_t)n * K), THREADS, 0, stream>>>(
            m->dweight, plan->expert, s->weight_slope, (size_t)n * K, (size_t)group_tokens * K, E, scale);
        CHECK(cudaGetLastError());
    }
    const float *dgate = m->dweight;
    if (two) {
        gpu::join_gates_backward(m->dgroup_weight, m->dgate, m->dweight, &s->groups, g, n);
        zero(m->dgroups, (size_t)n * c->groups * sizeof(float));
        gpu::gate_backward(m->dgroups, m->dgroup_weight, s->groups.weight, s->groups.p, s->groups.expert, n, c->groups,
                           c->group_topk, c->gate, 1);
        gpu::scores_backward(dnoisy, m->dgroups, &s->groups, n, W, c->score, 0);
        dgate = m->dgate;
    }
    gpu::gate_backward(m->dp, dgate, g->weight, g->p, g->expert, rows, g->E, g->K, c->gate, c->scale / c->routers);
    if (!two)
        gpu::balance_backward(m->dp, g, s->slope, rows, group_tokens * c->routers, c->score, scale);
    gpu::scores_backward(dnoisy, m->dp, g, n, W, c->score, c->z_weight * scale / rows);
    if (c->load_weight > 0) {
        int stride = E + c->groups;
        gpu::mark_groups(m, s, n);
        gpu::smooth_load(NULL, s->load_slope, stride, dnoisy, dlogits, g, s->noisy, s->logits, W, groups, group_tokens,
                         m->marks, scale, NULL, NULL);
        if (two)
            gpu::smooth_load(NULL, s->load_slope + E, stride, dnoisy, dlogits, &s->groups, s->noisy, s->logits, W,
                             groups, group_tokens, NULL, scale, NULL, NULL);
    }
    if (c->noise)
        gpu::noise_backward(dlogits, dnoisy, s->logits, n, W, m->batch.mode == TRAIN_MODE, layer_stream(m, RANDOM_NOISE, l),
                            first);

    // from the logits back to the router's input
    int jitter = m->batch.mode == TRAIN_MODE && c->jitter > 0;
    const float *input = jitter ? s->jittered : x, *read = R ? s->state : input;
    int width = R ? R : C;
    float *target = jitter ? m->drouter : dx;
    gpu::product(dw->router, along_columns(dlogits, WW), along_columns(read, width), WW, width, n, 1);
    if (R) {
        LayerState *below = gpu::experts_below(m, l);
        gpu::product(m->dstate, along_rows(dlogits, WW), along_columns(w->router, R), n, R, WW, l != last_moe_layer(c));
        float *dnext = m->dstate + (size_t)n * R;
        CHECK(cudaMemcpyAsync(dnext, m->dstate, (size_t)n * R * sizeof(float), cudaMemcpyDeviceToDevice, stream));
        gpu::gru_backward(m->dprojected, m->dstate, m->grads.gru_x, m->grads.gru_h, m->grads.gru_bx, m->grads.gru_bh,
                          dnext, s->gru, s->projected, below ? below->state : NULL, m->weights.gru_x, m->weights.gru_h,
                          n, R, m->gru_room, room->part);
        gpu::product(dw->project, along_columns(m->dprojected, R), along_columns(input, C), R, C, n, 1);
        gpu::product(target, along_rows(m->dprojected, R), along_columns(w->project, C), n, C, R, target == dx);
    } else {
        gpu::product(target, along_rows(dlogits, WW), along_columns(w->router, C), n, C, WW, target == dx);
    }
    if (jitter) { // d(x * j)/dx = the same j
        gpu::apply_jitter(m->drouter, m->drouter, (size_t)n * C, c->jitter, layer_stream(m, RANDOM_JITTER, l),
                          first * C);
        add_kernel<<<blocks((size_t)n * C), THREADS, 0, stream>>>(dx, m->drouter, (size_t)n * C);
        CHECK(cudaGetLastError());
    }
}

void clear_router_stats(Model *m) {
    int E = m->config.experts;
    for (int l = 0; l < m->config.layers; l++) { // all but recent, idle and AUX
        zero(layer_stats(m, l), (size_t)2 * E * sizeof(double));
        zero(layer_stats(m, l) + 4 * E, AUX * sizeof(double));
    }
}

__global__ void router_update_kernel(const double *norm, double *stats, float *bias, float *level, int E,
                                     double bias_rate) {
    int e = (int)thread_of_grid();
    if (e >= E || !isfinite(*norm))
        return;
    const double *single = stats + 4 * E;
    double mean = single[ACTIVE] / E, count = stats[e], *recent = stats + 2 * E, *idle = stats + 3 * E;
    idle[e] = count > 0 ? 0 : idle[e] + 1;
    recent[e] += 0.02 * (count / fmax(mean, 1e-9) - recent[e]);
    if (bias) // DeepSeek-V3: against the sign of what is too much
        bias[e] += (float)(bias_rate * ((mean > count) - (mean < count)));
    if (level && single[PASSES] > 0)
        level[e] += (float)(0.1 * (stats[E + e] / single[PASSES] - (double)level[e]));
}

__global__ void follow_kernel(const double *norm, float *slow, const float *router, size_t size, float rate) {
    size_t i = thread_of_grid();
    if (i < size && isfinite(*norm))
        slow[i] += rate * (router[i] - slow[i]);
}

// The step's counts of all ranks.
void sum_router_stats(Model *m) {
    int E = m->config.experts;
    follow(network, stream);
    nccl_begin();
    for (int l = 0; l < m->config.layers; l++) { // all but recent, idle and AUX
        double *count = layer_stats(m, l), *single = count + 4 * E;
        nccl_sum(count, (size_t)2 * E, OF_ALL);
        nccl_sum(single, AUX, OF_ALL);
    }
    nccl_end();
    wait_for_network();
}

// After a step whose gradients' norm is not finite nothing changes, as in adamw().
void router_update(Model *m) {
    const Config *c = &m->config;
    const double *norm = m->report + GRADIENT_NORM;
    if (MANY)
        gpu::sum_router_stats(m);
    for (int l = 0; l < c->layers; l++) {
        LayerWeights *w = &m->weights.layer[l];
        if (!is_moe(c, l))
            continue;
        router_update_kernel<<<blocks(c->experts), THREADS, 0, stream>>>(norm, layer_stats(m, l), w->bias, w->level,
                                                                         c->experts, c->bias_rate);
        CHECK(cudaGetLastError());
        size_t size = (size_t)router_rows(c) * (c->recurrent ? c->recurrent : c->dim / c->subtokens);
        if (w->slow) {
            follow_kernel<<<blocks(size), THREADS, 0, stream>>>(norm, w->slow, w->router, size,
                                                                (float)(1 - c->history_decay));
            CHECK(cudaGetLastError());
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 7. The whole model: memory, forward and backward

// Memory of the device, not zeroed, that lives as long as the model, booked under m->purpose. While m->dry it is booked
// only: the pointer leads nowhere.
void *own(Model *m, size_t count, size_t size) {
    size_t bytes = (count * size + 255) / 256 * 256;
    m->bytes[m->purpose] += bytes;
    if (m->dry || !bytes)
        return (void *)256;
    if (m->device_count % 64 == 0)
        m->device_memory = (void **)reallocate(m->device_memory, (size_t)m->device_count + 64, sizeof(void *));
    CHECK(cudaMalloc(&m->device_memory[m->device_count], bytes));
    return m->device_memory[m->device_count++];
}

float *own_floats(Model *m, size_t count) {
    return (float *)own(m, count, sizeof(float));
}

floatX *own_low(Model *m, size_t count) {
    return (floatX *)own(m, count, sizeof(floatX));
}

// Zeroed memory of the host.
void *own_host(Model *m, size_t count, size_t size) {
    if (m->owned_count % 64 == 0)
        m->owned = (void **)reallocate(m->owned, (size_t)m->owned_count + 64, sizeof(void *));
    return m->owned[m->owned_count++] = allocate(count, size);
}

void upload(Model *m, void *to, const void *from, size_t bytes) { // waits; not for use in a step
    if (m->dry)
        return;
    CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream));
    CHECK(cudaStreamSynchronize(stream));
}

// The rounded copy of a weight.
floatX *low_of(const Model *m, const float *weight) {
    return m->low + (weight - m->memory[WEIGHTS]);
}

// Points to what --recompute shares of a layer's activations, one after another in `memory`; returns their bytes.
size_t place_activations(Model *m, int l, int N, char *memory) {
    const Config *c = &m->config;
    LayerState *s = &m->layers[l];
    size_t C = (size_t)c->dim, Q = C + 2 * C / c->heads * c->kv_heads, low = sizeof(floatX), used = 0;
    size_t dense = (size_t)dense_width(c, l) * (1 + is_gated(dense_activation(c, l)));
    size_t hidden = is_moe(c, l) && ranks.ep == 1 ? m->slots * m->experts.hidden_width : 0;
    const struct {
        void *to;
        size_t bytes;
    } list[] = {{&s->h1, N * C * low}, {&s->rstd1, N * sizeof(float)}, {&s->qkv, N * Q * low}, {&s->att, N * C * low},
                {&s->lse, (size_t)N * c->heads * sizeof(float)}, {&s->mid, N * C * sizeof(float)}, {&s->h2, N * C * low},
                {&s->rstd2, N * sizeof(float)}, {&s->dense_hidden, N * dense * low}, {&s->hidden, hidden * low}};
    for (size_t i = 0; i < sizeof(list) / sizeof(list[0]); i++) {
        *(void **)list[i].to = memory + used;
        used += (list[i].bytes + 255) / 256 * 256;
    }
    return used;
}

// The experts' table of widths, activations and places: the same for all layers.
void describe_experts(Model *m) {
    const Config *c = &m->config;
    int E = c->experts, C = c->dim / c->subtokens;
    Experts *x = &m->experts;
    size_t *matrix = (size_t *)allocate((size_t)E * 2 + 2, sizeof(size_t)), *matrix_in = matrix + E + 1;
    int *width = (int *)allocate((size_t)2 * E, sizeof(int)), *activation = width + E;
    x->aligned = C * sizeof(floatX) % 16 == 0;
    for (int e = 0; e < E; e++) {
        int F = width[e] = expert_width(c, e), a = activation[e] = expert_activation(c, e);
        matrix[e + 1] = matrix[e] + (size_t)F * C;
        matrix_in[e + 1] = matrix_in[e] + (size_t)F * (1 + is_gated(a)) * C;
        x->widest = max_int(x->widest, F);
        x->hidden_width = max_int(x->hidden_width, F * (1 + is_gated(a)));
        x->aligned &= F * sizeof(floatX) % 16 == 0;
    }
    x->E = E;
    x->C = C;
    int *ints = (int *)own(m, (size_t)2 * E, sizeof(int));
    size_t *places = (size_t *)own(m, (size_t)2 * E + 2, sizeof(size_t));
    upload(m, ints, width, (size_t)2 * E * sizeof(int));
    upload(m, places, matrix, ((size_t)2 * E + 2) * sizeof(size_t));
    free(width);
    free(matrix);
    x->width = m->device_width = ints;
    x->activation = ints + E;
    x->matrix = places;
    x->matrix_in = places + E + 1;
}

// ::Placement's tables on the device.
void place_experts(Model *m) {
    const Placement *p = m->crossing->placement;
    const Places *to = &m->transit->places;
    const int *F = p->here->F, *H = p->here->hidden; // of all layers, one after another
    size_t L = (size_t)m->config.layers, n = (size_t)p->here->E, all = L * (n + 1);
    size_t *matrix = (size_t *)allocate(2 * all, sizeof(size_t)), *matrix_in = matrix + all, C = (size_t)m->experts.C;
    for (size_t l = 0, at = 0; l < L; l++, at++) { // in each layer one more than experts
        for (size_t i = l * n; i < (l + 1) * n; i++, at++) {
            matrix[at + 1] = matrix[at] + (size_t)F[i] * C;
            matrix_in[at + 1] = matrix_in[at] + (size_t)H[i] * C;
        }
    }
    upload(m, to->host, p->host, 2 * L * m->config.experts * sizeof(int)); // and slot
    upload(m, to->width, F, L * n * sizeof(int));
    upload(m, to->activation, p->here->activation, L * n * sizeof(int));
    upload(m, to->matrix, matrix, 2 * all * sizeof(size_t)); // and matrix_in
    free(matrix);
}

// What experts on several ranks need, for n tokens.
void own_crossing(Model *m, int n, const Model *parent) {
    const Config *c = &m->config;
    Crossing *x = m->transit = (Crossing *)own_host(m, 1, sizeof(Crossing));
    size_t K = (size_t)most_choices(c), rows = n * (K < (size_t)ranks.ep ? K : (size_t)ranks.ep), L = (size_t)c->layers;
    x->out = own_low(m, rows * (c->dim / c->subtokens));
    x->choices_out = own_floats(m, rows * 2 * K);
    x->dweight_back = own_floats(m, rows * K);
    size_t C = (size_t)(c->dim / c->subtokens), slots = n * K / (c->overlap ? 2 : 1);
    m->bytes[m->purpose] += (rows * (2 * C * sizeof(floatX) + 3 * K * sizeof(float)) + slots * (C + m->experts.widest +
                            m->experts.hidden_width) * sizeof(floatX)) / 4 * 5; // the rooms, with an even load
    for (int half = 0; half < 2 && !m->dry; half++)
        CHECK(cudaEventCreateWithFlags(&x->half[half].arrived, cudaEventDisableTiming));
    if (!m->dry)
        CHECK(cudaMallocHost((void **)&x->counts, ((size_t)ranks.ep * 4 + 1) * sizeof(int)));
    m->crossing->came = (int *)own_host(m, c->layers, sizeof(int));
    if (parent) { // generation's model has the other's experts
        m->crossing->placement = parent->crossing->placement;
        x->places = parent->transit->places;
        return;
    }
    allocate_placement(m);
    size_t each = (size_t)m->crossing->placement->here->E;
    Places *p = &x->places;
    p->host = (int *)gpu::own(m, 2 * L * c->experts, sizeof(int));
    p->slot = p->host + L * c->experts;
    p->width = (int *)gpu::own(m, 2 * L * each, sizeof(int));
    p->activation = p->width + L * each;
    p->matrix = (size_t *)gpu::own(m, 2 * L * (each + 1), sizeof(size_t));
    p->matrix_in = p->matrix + L * (each + 1);
    gpu::place_experts(m);
}

size_t numbers_of(const Model *m, int what) { // in memory[what]: weights, gradients or moments
    return what >= MOMENT1 ? moment_offset(m, m->size) : m->size;
}

// All memory for N tokens, as in the C twin. parent: the model whose weights it shares, or NULL.
void place_all(Model *m, int N, int train, const Model *parent) {
    const Config *c = &m->config;
    int L = c->layers, C = c->dim, H = c->heads, KV = c->kv_heads, D = C / H, Q = (H + 2 * KV) * D, E = c->experts;
    int n = N * c->subtokens, W = router_rows(c), R = c->recurrent, moe = moe_layers(c) > 0, V = c->vocab;
    int groups = c->group == SEQUENCE ? div_up(N, c->seq) : 1, two = c->select == HIERARCHICAL;
    size_t nK = (size_t)n * most_choices(c), scores = moe * (size_t)n * W, width = 0, hidden = 0, NC = (size_t)N * C;
    lay_out(m, (Tensor *)own_host(m, tensor_limit(c), sizeof(Tensor)), 64);
    if (!m->crossing) // one process
        m->crossing = (::Crossing *)own_host(m, 1, sizeof(::Crossing));
    m->crossing->rank_tokens = (int *)own_host(m, ranks.size, sizeof(int));
    m->acts.layer = (LayerActs *)own_host(m, L, sizeof(LayerActs));
    m->weights.layer = (LayerWeights *)own_host(m, 2 * L, sizeof(LayerWeights));
    m->grads.layer = m->weights.layer + L;
    m->purpose = FOR_WEIGHTS;
    m->memory[WEIGHTS] = parent ? parent->memory[WEIGHTS] : own_floats(m, m->size);
#ifdef FP32
    m->low = m->memory[WEIGHTS];
#else
    m->low = parent ? parent->low : own_low(m, m->size);
#endif
    point_weights(m, &m->weights, m->memory[WEIGHTS]);
    m->purpose = FOR_ACTIVATIONS;
    m->slots = nK;
    describe_experts(m);
    m->layers = (LayerState *)own_host(m, L, sizeof(LayerState));
    m->stats = (Statistics *)own_host(m, L, sizeof(Statistics));
    size_t sum = 0, most = 0;
    for (int l = 0; l < L; l++) {
        size_t bytes = place_activations(m, l, N, NULL);
        sum += bytes;
        most = bytes > most ? bytes : most;
    }
    m->passing = sum / sizeof(real); // print_memory counts in these
    m->largest = most / sizeof(real);
    char *shared = c->recompute ? (char *)own(m, most, 1) : NULL;
    for (int l = 0; l < L; l++) {
        LayerState *s = &m->layers[l];
        size_t dense = (size_t)N * dense_width(c, l), gated = 1 + is_gated(dense_activation(c, l));
        s->x = own_floats(m, NC);
        place_activations(m, l, N, shared ? shared : (char *)own(m, place_activations(m, l, N, NULL), 1));
        if (is_moe(c, l)) {
            gpu::allocate_experts(m, l, N);
            s->sub = c->subtokens > 1 ? own_low(m, NC) : NULL;
            s->merged = c->subtokens > 1 ? own_low(m, NC) : NULL;
            s->tiles = (int)(nK / TM) + E;
            s->tile = (int2 *)own(m, s->tiles, sizeof(int2));
        }
        width = dense > width ? dense : width;
        hidden = dense * gated > hidden ? dense * gated : hidden;
    }
    size_t apart = ranks.ep > 1 && moe, slots = apart ? 0 : moe * nK; // the experts' scratch: see own_crossing
    size_t act = slots * m->experts.widest, both = slots * m->experts.hidden_width;
    width = act > width ? act : width;
    hidden = both > hidden ? both : hidden;
    m->x = own_floats(m, NC);
    m->h = own_low(m, NC);
    m->rstd = own_floats(m, N);
    m->purpose = FOR_BUFFERS;
    m->tokens = (int *)own(m, (size_t)N * 5 + 1, sizeof(int)); // then targets, and embedding_backward's three lists
    m->targets = m->tokens + N;
    m->rows = own_low(m, moe * nK * (C / c->subtokens));
    m->act = own_low(m, width);
    m->router_in = own_floats(m, moe * NC);
    m->branch = own_low(m, NC);
    m->choice_score = own_floats(m, scores);
    m->unbiased = (int *)own(m, moe * nK, sizeof(int));
    m->gru_room = own_floats(m, (size_t)moe * N * 6 * R);
    m->head_rows = max_int(1, min_int(N, (1 << 28) / V / 128 * 128 + 1)); // 1 GiB of float logits at most
    m->logits = own_floats(m, (size_t)m->head_rows * V);
    m->nll = own_floats(m, N);
    m->angles = own_floats(m, (size_t)c->seq * D);
    float *angles = (float *)allocate((size_t)c->seq * D, sizeof(float));
    rope_angles(angles, 0, c->seq, D, c->rope_theta);
    upload(m, m->angles, angles, (size_t)c->seq * D * sizeof(float));
    free(angles);
    m->counts = (double *)own(m, moe * (size_t)groups * c->routers * E, sizeof(double));
    m->marks = (unsigned char *)own(m, moe * (size_t)n * c->groups, 1);
    if (moe)
        allocate_router(m, n);
    if (apart)
        own_crossing(m, n, parent);
    m->report_size = SINGLE_REPORTS + (size_t)L * stats_size(c);
    m->report = (double *)own(m, m->report_size, sizeof(double));
    m->host_report = (double *)own_host(m, m->report_size, sizeof(double));
    if (!train)
        return;
    for (int i = GRADS; i <= MOMENT2; i++) {
        m->purpose = i == GRADS ? FOR_GRADIENTS : FOR_MOMENTS;
        m->memory[i] = own_floats(m, numbers_of(m, i));
    }
    point_weights(m, &m->grads, m->memory[GRADS]);
    m->purpose = FOR_BUFFERS;
    m->dx = own_floats(m, NC);
    m->dx_low = own_low(m, NC);
    m->dh = own_floats(m, NC);
    m->datt = own_low(m, NC);
    m->dqkv = own_low(m, (size_t)N * Q);
    m->delta = own_floats(m, (size_t)N * H);
    m->dhidden = own_low(m, hidden);
    m->dlogits_low = own_low(m, (size_t)m->head_rows * V);
    m->dweight_part = own_floats(m, slots * div_up(m->experts.widest, TN));
    m->dlogits = own_floats(m, scores * (1 + c->noise));
    m->dnoisy = own_floats(m, c->noise ? scores : 0);
    m->dp = own_floats(m, scores);
    m->dgroups = own_floats(m, two * (size_t)n * c->groups);
    m->dweight = own_floats(m, moe * nK);
    m->dgate = own_floats(m, two * nK * c->groups);
    m->dgroup_weight = own_floats(m, two * nK);
    m->drouter = own_floats(m, c->jitter > 0 ? NC : 0);
    m->dsub = own_floats(m, c->subtokens > 1 ? NC : 0);
    m->dmerged = own_low(m, c->subtokens > 1 ? NC : 0);
    m->dstate = own_floats(m, (size_t)moe * N * R * 2);
    m->dprojected = own_floats(m, (size_t)moe * N * R);
    m->partial = own_floats(m, (size_t)div_up(N, CHUNK) * C);
    m->norm_part = (double *)own(m, NORM_PARTS, sizeof(double));
}

void model_free(::Model *base) {
    Model *m = (Model *)base;
    if (m->one)
        gpu::model_free(m->one);
    if (!m->dry)
        await_device();
    for (int i = 0; i < m->device_count; i++)
        CHECK(cudaFree(m->device_memory[i]));
    for (int half = 0; half < 2 && m->transit && !m->dry; half++) {
        CHECK(cudaFree(m->transit->half[half].room.memory));
        CHECK(cudaEventDestroy(m->transit->half[half].arrived));
        for (int l = 0; l < m->config.layers; l++) {
            if (m->layers[l].exchange)
                CHECK(cudaFree(m->layers[l].exchange[half].room.memory));
        }
    }
    if (m->transit && !m->dry) {
        CHECK(cudaFree(m->transit->room.memory));
        CHECK(cudaFreeHost(m->transit->counts));
    }
    ranks_free(m);
    for (int i = 0; i < m->owned_count; i++)
        free(m->owned[i]);
    if (m->staging) {
        CHECK(cudaFreeHost(m->staging));
        CHECK(cudaEventDestroy(m->staged));
#ifdef USE_NCCL
        end_ranks();
#endif
    }
    free(m->owned);
    free(m->device_memory);
    free(m);
}

void own_cache(Model *one) { // what only generation has
    const Config *c = &one->config;
    one->cache = own_low(one, (size_t)c->layers * c->seq * 2 * c->kv_heads * (c->dim / c->heads));
}

Model *new_model(const Config *config, int N, int train, const Model *parent, int dry) {
    Model *m = (Model *)allocate(1, sizeof(Model));
    m->config = *config;
    m->max_tokens = N;
    m->dry = dry;
    gpu::place_all(m, N, train, parent);
    return m;
}

// Bytes of the device that a model takes, generation's included.
double bytes_of(const Config *c, int N, int train) {
    Model *m = new_model(c, N, train, NULL, 1);
    m->one = new_model(c, 1, 0, m, 1);
    own_cache(m->one);
    double sum = 0;
    for (int i = 0; i < MEMORY_KINDS; i++)
        sum += (double)m->bytes[i] + (double)m->one->bytes[i];
    gpu::model_free(m);
    return sum;
}

// Stops where the model does not fit, and says what would. Something is left for what comes later: cuBLAS's own memory, the
// kernels' code, measured_peak(), what the driver rounds up.
void check_room(const Config *c, int N, int train) {
    size_t left, total;
    CHECK(cudaMemGetInfo(&left, &total));
    double need = bytes_of(c, N, train), mib = 1048576;
    left -= left / 32 < (size_t)512 << 20 ? left / 32 : (size_t)512 << 20;
    if (need <= (double)left)
        return;
    Config smaller = *c;
    char hint[160] = "no batch of this model does: it needs a smaller model or a larger device";
    for (int recompute = c->recompute, found = 0; train && recompute <= 1 && !found; recompute++) {
        smaller.recompute = recompute;
        for (int batch = N / c->seq; batch >= 1 && !found; batch = batch == 1 ? 0 : div_up(batch, 2)) {
            found = bytes_of(&smaller, batch * c->seq, train) <= (double)left;
            if (found)
                snprintf(hint, sizeof(hint), "--batch %d%s would fit (and --accum %d makes a step of %d sequences)", batch,
                         recompute > c->recompute ? " --recompute" : "", c->accum * div_up(N / c->seq, batch),
                         c->accum * div_up(N / c->seq, batch) * batch);
        }
    }
    fail("out of memory on the device: the model needs %.0f MiB, %.0f of %.0f are free; %s", need / mib, (double)left / mib,
         (double)total / mib, hint);
}

// The device's stream and cuBLAS, once.
void start_device(void) {
    int count = 0;
    if (stream)
        return;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0)
        fail("no NVIDIA GPU, or no driver for it: %s", error == cudaSuccess ? "none found" : cudaGetErrorString(error));
#ifdef USE_NCCL
    int place;
    MPI_Comm machine;
    ranks_meet(); // MPI, and later NCCL, would wait without a watch
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine);
    MPI_Comm_rank(machine, &place);
    MPI_Comm_free(&machine);
    CHECK(cudaSetDevice(place % count)); // Slurm may show each rank its own device only
    int least, greatest; // what is sent shall not wait until the experts leave a multiprocessor
    CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CHECK(cudaStreamCreateWithPriority(&network, cudaStreamNonBlocking, greatest));
    CHECK(cudaEventCreateWithFlags(&milestone, cudaEventDisableTiming));
#endif
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CHECK(cudaEventCreateWithFlags(&reached, cudaEventDisableTiming));
    for (int i = 0; i < 4; i++)
        CHECK(cudaEventCreateWithFlags(&paces[i], cudaEventDisableTiming));
    CHECK(cublasCreate(&cublas));
    CHECK(cublasSetStream(cublas, stream));
    CHECK(cublasSetMathMode(cublas, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)); // sums are float32
}

// The router for which this file has no kernels; NULL: it has all that the options ask for. A new router of dev/routers
// trains on the CPU until it is added here.
const Router *router_without_kernels(const Config *c) {
    const Router *const known[] = {
        &jitter_router, &recurrent_router, &subtokens_router, &noisy_router, &noisy_load, &hierarchical_router,
        &hierarchical_load, &history_matrix, &groups_router, &multirouter_router, &multirouter_loss, &history_router,
        &threshold_router, &expert_choice_router, &balanced_router, &hash_router, &topk_router, &gshard_router,
        &gshard_loss, &group_loss, &communication_loss, &mixed_loss, &sparsity_loss, &importance_loss, &capacity_part,
    };
    for (const Router *r : all_routers) {
        int found = moe_layers(c) == 0 || !router_is_used(r, c);
        for (const Router *k : known)
            found |= k == r;
        if (!found)
            return r;
    }
    return NULL;
}

// Buffers for N tokens. train 0: no gradients, no moments. weights: always NULL; only the C twin shares them here.
::Model *model_allocate(const Config *config, int N, int train, real *weights) {
    (void)weights;
    if (router_without_kernels(config))
        usage_fail("--recipe %s: its router has no kernels for a GPU yet; ./train_moe trains it on the CPU", config->recipe);
    if (config->dim / config->heads > 256)
        usage_fail("--heads: a head is %d wide; on a GPU 256 is the most", config->dim / config->heads);
    start_device();
#ifdef USE_NCCL
    if (MANY)
        start_ranks();
#endif
    check_room(config, N, train);
    Model *m = new_model(config, N, train, NULL, 0);
    zero(m->report, m->report_size * sizeof(double));
    for (int i = 0; i < (train ? 4 : 1); i++)
        zero(m->memory[i], numbers_of(m, i) * sizeof(float));
    CHECK(cudaMallocHost((void **)&m->staging, ((size_t)N * 5 + 1) * sizeof(int)));
    CHECK(cudaEventCreateWithFlags(&m->staged, cudaEventDisableTiming));
    m->offset = (int *)own_host(m, (size_t)config->vocab + 2, sizeof(int));
    CHECK(cudaStreamSynchronize(stream)); // a plain cudaMemcpy does not wait for this stream
    return m;
}

// Copies to the host once the device has done all. A copy to memory that is not pinned waits in the driver, where no watch
// is kept; so what is before it is waited for here.
void download(void *to, const void *from, size_t bytes) {
    await_device();
    CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream));
    await_device();
}

// Remakes the rounded copies of weights from..end.
void round_weights(Model *m, size_t from, size_t end) {
    if ((void *)m->low != (void *)m->memory[WEIGHTS])
        to_low(m->low + from, m->memory[WEIGHTS] + from, end - from);
}

// As ranks_read and ranks_write (dev/ranks/files.h). The host's memory has one tensor at a time.
void model_read(::Model *m, int what, int tensor, real *to) {
    Share s = ranks_share(m, what, tensor);
    download(to, m->memory[what] + s.at, s.size * sizeof(real));
    ranks_gather(m, what, tensor, to);
}

void model_write(::Model *base, int what, int tensor, const real *from) {
    Model *m = (Model *)base;
    Share s = ranks_share(m, what, tensor);
    await_device(); // as in download
    upload(m, m->memory[what] + s.at, from + s.first, s.size * sizeof(real));
    if (what == WEIGHTS)
        round_weights(m, s.at, s.at + s.size);
}

// The C twin's first weights.
void model_init(::Model *base, const double *frequency) {
    Model *m = (Model *)base;
    real *w = allocate_tensor(m);
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        init_tensor(m, i, w, frequency);
        upload(m, m->memory[WEIGHTS] + t->offset, w, t->size * sizeof(real));
    }
    round_weights(m, 0, m->size);
    free(w);
}

// The experts for the tokens of a plan, of which `tile` (tiles) is made.
Experts layer_experts(const Model *m, const Plan *plan, int2 *tile, int tiles) {
    Experts x = m->experts;
    x.offset = plan->offset;
    x.token = plan->token;
    x.choice = plan->choice;
    x.tile = tile;
    x.tiles = tiles;
    return x;
}

// ---- experts on several ranks
//
// See the C twin. The tokens are counted and sorted by rank on the device, as choices are by expert; only the counts go to
// the host, as ncclSend wants them from there: the one time in a layer that it waits for its own device to finish.

struct Piece {
    void *to; // the pointer that shall lead to it
    size_t bytes;
};

// Points to memory of the device, one piece after another. What was in the room is lost when it grows.
void lay_pieces(Room *r, std::initializer_list<Piece> list) {
    size_t bytes = 0, at = 0;
    for (const Piece &p : list)
        bytes += (p.bytes + 255) / 256 * 256;
    if (bytes > r->bytes) {
        await_device();
        await(network);
        CHECK(cudaFree(r->memory));
        r->memory = NULL;
        r->bytes = bytes / 4 * 5;
        if (cudaMalloc(&r->memory, r->bytes) != cudaSuccess)
            fail("out of memory on the device: %.0f MiB for what other ranks send to the experts here; a smaller --batch, or "
                 "another --recipe that keeps the load even, needs less", (double)r->bytes / 1048576);
    }
    for (const Piece &p : list) {
        *(void **)p.to = (char *)r->memory + at;
        at += (p.bytes + 255) / 256 * 256;
    }
}

struct Where { // expert_rank(), on the device
    const int *host, *slot;
    int owned, member;
    __device__ int operator()(int e, size_t n, int *number) const {
        return rank_of_expert(host, slot, owned, member, e, (int)n, number);
    }
};

Where where_is(const Model *m, int l) {
    const Places *p = &m->transit->places;
    int first = l * m->config.experts;
    return {p->host + first, p->slot + first, m->crossing->placement->owned, ranks.member};
}

// all (n*K): where a choice's token goes, half * ep + rank, -1: nowhere; to (n*K): the same, but each place once.
__global__ void destinations_kernel(int *to, int *all, const int *key, Where where, int n, int K, int ep, int halves) {
    size_t i = thread_of_grid(), token = i / K;
    if (i >= (size_t)n * K)
        return;
    int number, there = key[i] < 0 ? -1 : where(key[i], token, &number), known = there < 0;
    for (size_t j = token * K; j < i && !known; j++)
        known = key[j] >= 0 && where(key[j], token, &number) == there;
    all[i] = there < 0 ? -1 : there + (halves == 2 && token >= (size_t)n / 2 ? ep : 0);
    to[i] = known ? -1 : all[i];
}

// out (rows,2K): of the token of each row, what goes the same way: weights, and the experts' numbers there, else -1.
__global__ void pack_choices_kernel(float *out, Plan sending, const int *key, const float *weight, Where where, size_t size,
                                    int ep) {
    size_t i = thread_of_grid(), row = i / sending.K, k = i % sending.K;
    if (i >= size)
        return;
    int choice = sending.choice[row], token = choice / sending.K, number, with;
    size_t at = (size_t)token * sending.K + k;
    with = key[at] >= 0 && where(key[at], token, &number) == sending.key[choice] % ep;
    out[row * 2 * sending.K + k] = with ? weight[at] : 0;
    out[row * 2 * sending.K + sending.K + k] = with ? (float)number : -1;
}

__global__ void unpack_choices_kernel(float *weight, int *key, const float *choices, size_t size, int K) {
    size_t i = thread_of_grid(), row = i / K, k = i % K;
    if (i < size) {
        weight[i] = choices[row * 2 * K + k];
        key[i] = (int)choices[row * 2 * K + K + k];
    }
}

// dweight (n,K) = the sum of the rows (K) that came back for each token
__global__ void return_dweight_kernel(float *dweight, const float *back, const int *slot, size_t size, int K) {
    size_t i = thread_of_grid();
    float sum = 0;
    if (i >= size)
        return;
    for (size_t j = i / K * K; j < i / K * K + K; j++)
        sum += slot[j] >= 0 ? back[(size_t)slot[j] * K + i % K] : 0;
    dweight[i] = sum;
}

// Room for what is under way, and for the experts' scratch.
void lay_crossing(Model *m, const LayerState *s, int C) {
    Crossing *x = m->transit;
    size_t low = sizeof(floatX), K = (size_t)s->plan.K, slots = 0, sort = 0;
    for (int half = 0; half < halves_of(&m->config); half++) {
        const Exchange *ex = &s->exchange[half];
        Travel *t = &x->half[half];
        size_t came = (size_t)ex->came, room = sort_room(came * K, m->crossing->placement->here->E);
        lay_pieces(&t->room, {{&t->in, came * C * low}, {&t->answers, came * C * low},
                              {&t->choices, came * 2 * K * sizeof(float)}, {&t->dweight, came * K * sizeof(float)}});
        slots = slots > (size_t)ex->slots ? slots : (size_t)ex->slots;
        sort = sort > room ? sort : room;
    }
    lay_pieces(&x->room, {{&x->rows, slots * C * low}, {&x->act, slots * m->experts.widest * low},
                          {&x->dhidden, slots * m->experts.hidden_width * low},
                          {&x->dweight_part, slots * div_up(m->experts.widest, TN) * sizeof(float)},
                          {&x->sort, sort * sizeof(int)}});
}

// How many rows and slots there are for each rank, and from each: the host asks the device, and then the others.
void exchange_counts(Model *m, LayerState *s, int l) {
    int ep = ranks.ep, halves = halves_of(&m->config);
    int *counts = m->transit->counts, *out = (int *)allocate((size_t)ep * 8, sizeof(int)), *in = out + 4 * ep;
    await_device();
    for (int i = 0; i < halves * ep; i++) { // first where rows begin, then the slots
        out[i % ep * 4 + i / ep] = counts[i + 1] - counts[i];
        out[i % ep * 4 + 2 + i / ep] = counts[halves * ep + 1 + i];
    }
    all_to_all(out, in, 4);
    m->crossing->came[l] = 0;
    for (int half = 0; half < halves; half++) {
        Exchange *ex = &s->exchange[half];
        ex->rows = ex->came = ex->slots = 0;
        for (int r = 0; r < ep; r++) {
            ex->sent[r] = out[4 * r + half];
            ex->sent_at[r] = counts[half * ep + r];
            ex->rows += ex->sent[r];
            ex->got[r] = in[4 * r + half];
            ex->got_at[r] = ex->came;
            ex->came += ex->got[r];
            ex->slots += in[4 * r + 2 + half];
        }
        m->crossing->came[l] += ex->came;
    }
    free(out);
}

// Packs the rows of `from` (n,C) that go; send_rows() sends them.
void pack_rows(Model *m, const LayerState *s, const floatX *from, int C) {
    int rows = s->exchange[0].rows + (m->config.overlap ? s->exchange[1].rows : 0);
    combine(m->transit->out, NULL, NULL, from, s->sending.token, rows, 1, C);
}

// Sends each of the n tokens x (n,C) to the ranks that have its experts.
void exchange_start(Model *m, int l, LayerState *s, const floatX *x, int n, int C) {
    const Plan *plan = &s->plan;
    Plan *sending = &s->sending;
    Crossing *cross = m->transit;
    int K = plan->K, halves = halves_of(&m->config), to = sending->E, *room = m->router.sort;
    size_t choices = (size_t)n * K;
    sending->N = n;
    memset(cross->counts, 0, (size_t)(2 * to + 1) * sizeof(int));
    if (n) {
        destinations_kernel<<<blocks(choices), THREADS, 0, stream>>>(sending->key, sending->expert, plan->key, where_is(m, l), n,
                                                                     K, ranks.ep, halves);
        CHECK(cudaGetLastError());
        gpu::count_keys(room, sending->expert, choices, to);
        copy_ints(cross->counts + to + 1, room, to, cudaMemcpyDeviceToHost);
        gpu::plan_sort(sending, room);
        copy_ints(cross->counts, sending->offset, to + 1, cudaMemcpyDeviceToHost);
    }
    exchange_counts(m, s, l);
    lay_crossing(m, s, C);
    size_t rows = (size_t)cross->counts[to], E = (size_t)(m->crossing->placement->here->E);
    if (rows) {
        pack_choices_kernel<<<blocks(rows * K), THREADS, 0, stream>>>(cross->choices_out, *sending, plan->key, s->weight,
                                                                      where_is(m, l), rows * K, ranks.ep);
        CHECK(cudaGetLastError());
        pack_rows(m, s, x, C);
    }
    for (int half = 0; half < halves; half++) {
        Exchange *ex = &s->exchange[half];
        Travel *t = &cross->half[half];
        size_t came = (size_t)ex->came, ints = came * K * sizeof(int);
        Plan p = {ex->came, (int)E, K, NULL, NULL, NULL, NULL, NULL, NULL};
        ex->tiles = ex->slots / TM + (int)E;
        lay_pieces(&ex->room, {{&ex->x, came * C * sizeof(floatX)},
                              {&ex->hidden, (size_t)ex->slots * m->experts.hidden_width * sizeof(floatX)},
                              {&ex->weight, came * K * sizeof(float)},
                              {&ex->tile, ex->tiles * sizeof(int2)},
                              {&p.key, ints}, {&p.slot, ints}, {&p.choice, ints}, {&p.token, ints},
                              {&p.offset, (E + 1) * sizeof(int)}});
        ex->plan = p;
        depart();
        send_rows(cross->choices_out, ex->sent, ex->sent_at, t->choices, ex->got, ex->got_at, 2 * K * sizeof(float));
        send_rows(cross->out, ex->sent, ex->sent_at, ex->x, ex->got, ex->got_at, C * sizeof(floatX));
        arrive(t->arrived);
    }
}

// The experts that this rank has in layer l, for the rows that came.
Experts experts_here(const Model *m, int l, const Exchange *ex) {
    const Places *p = &m->transit->places;
    Experts x = layer_experts(m, &ex->plan, ex->tile, ex->tiles);
    int n = ex->plan.E;
    x.E = n;
    x.width = p->width + l * n;
    x.activation = p->activation + l * n;
    x.matrix = p->matrix + l * (n + 1);
    x.matrix_in = p->matrix_in + l * (n + 1);
    return x;
}

// The experts' work on each half as it comes, and their answers' way back: to m->rows, by s->sending.slot.
void exchange_forward(Model *m, int l, LayerState *s, int C) {
    const LayerWeights *w = &m->weights.layer[l];
    Crossing *x = m->transit;
    int K = s->plan.K, halves = halves_of(&m->config);
    for (int half = 0; half < halves; half++) {
        Exchange *ex = &s->exchange[half];
        Travel *t = &x->half[half];
        size_t choices = (size_t)ex->came * K;
        wait_for(t->arrived);
        if (ex->came) {
            unpack_choices_kernel<<<blocks(choices), THREADS, 0, stream>>>(ex->weight, ex->plan.key, t->choices, choices, K);
            CHECK(cudaGetLastError());
            gpu::plan_sort(&ex->plan, x->sort);
            list_tiles(ex->tile, ex->tiles, ex->plan.offset, ex->plan.E);
            Experts here = gpu::experts_here(m, l, ex);
            gpu::experts_forward(x->rows, ex->hidden, x->act, ex->x, low_of(m, w->w_in), low_of(m, w->w_out), ex->weight,
                                 &here);
            combine(t->answers, NULL, NULL, x->rows, ex->plan.slot, ex->came, K, C);
        }
        depart();
        send_rows(t->answers, ex->got, ex->got_at, m->rows, ex->sent, ex->sent_at, C * sizeof(floatX));
        arrive(t->arrived);
    }
    wait_for(x->half[halves - 1].arrived);
}

// Backward, first: dout (n,C), by token, goes where the tokens went.
void exchange_start_backward(Model *m, LayerState *s, const floatX *dout, int C) {
    lay_crossing(m, s, C);
    pack_rows(m, s, dout, C);
    for (int half = 0; half < halves_of(&m->config); half++) {
        Exchange *ex = &s->exchange[half];
        Travel *t = &m->transit->half[half];
        depart();
        send_rows(m->transit->out, ex->sent, ex->sent_at, t->in, ex->got, ex->got_at, C * sizeof(floatX));
        arrive(t->arrived);
    }
}

// And then: the gradients by the experts' weights, by the tokens' rows (m->rows, by s->sending.slot), m->dweight (n,K).
void exchange_backward(Model *m, int l, LayerState *s, int C) {
    const LayerWeights *w = &m->weights.layer[l], *dw = &m->grads.layer[l];
    Crossing *x = m->transit;
    int K = s->plan.K, halves = halves_of(&m->config);
    for (int half = 0; half < halves; half++) {
        Exchange *ex = &s->exchange[half];
        Travel *t = &x->half[half];
        wait_for(t->arrived);
        if (ex->came) {
            Experts here = gpu::experts_here(m, l, ex);
            zero(t->dweight, (size_t)ex->came * K * sizeof(float));
            gpu::experts_backward(x->rows, dw->w_in, dw->w_out, t->dweight, t->in, ex->x, ex->hidden, ex->weight,
                                  low_of(m, w->w_in), low_of(m, w->w_out), x->act, x->dhidden, x->dweight_part, ex->slots,
                                  &here);
            combine(t->answers, NULL, NULL, x->rows, ex->plan.slot, ex->came, K, C);
        }
        depart();
        send_rows(t->answers, ex->got, ex->got_at, m->rows, ex->sent, ex->sent_at, C * sizeof(floatX));
        send_rows(t->dweight, ex->got, ex->got_at, x->dweight_back, ex->sent, ex->sent_at, K * sizeof(float));
        arrive(t->arrived);
    }
    wait_for(x->half[halves - 1].arrived);
    size_t choices = (size_t)s->sending.N * K;
    return_dweight_kernel<<<blocks(choices), THREADS, 0, stream>>>(m->dweight, x->dweight_back, s->sending.slot, choices, K);
    CHECK(cudaGetLastError());
}

// Shared experts, or a dense layer: m->branch (N,C) =
void dense_forward(Model *m, int l, LayerState *s, int N) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l];
    if (!w->dense_in || N == 0)
        return;
    int C = c->dim, F = dense_width(c, l), activation = dense_activation(c, l), H = F * (1 + is_gated(activation));
    product(s->dense_hidden, along_rows(s->h2, C), along_rows(low_of(m, w->dense_in), C), N, H, C, 0);
    gpu::activation_forward(m->act, s->dense_hidden, N, F, activation);
    product(m->branch, along_rows(m->act, F), along_rows(low_of(m, w->dense_out), F), N, C, F, 0);
}

// dh (N,C) =
void dense_backward(Model *m, int l, LayerState *s, float *dh, const floatX *dout, int N) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l], *dw = &m->grads.layer[l];
    if (!w->dense_in)
        return;
    int C = c->dim, F = dense_width(c, l), activation = dense_activation(c, l), H = F * (1 + is_gated(activation));
    product(m->act, along_rows(dout, C), along_columns(low_of(m, w->dense_out), F), N, F, C, 0);
    gpu::activation_backward(m->dhidden, m->act, s->dense_hidden, N, F, activation);
    product(dw->dense_out, along_columns(dout, C), along_columns(m->act, F), C, F, N, 1);
    product(dw->dense_in, along_columns(m->dhidden, H), along_columns(s->h2, C), H, C, N, 1);
    product(dh, along_rows(m->dhidden, H), along_columns(low_of(m, w->dense_in), C), N, C, H, 0);
}

// One layer's feed-forward: out (N,C) = s->mid + dense part + mixture of experts, of s->h2 (N,C).
void ffn_forward(Model *m, int l, LayerState *s, float *out, int N, int T) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l];
    int C = c->dim, h = c->subtokens, moe = is_moe(c, l), apart = APART && moe;
    const int *slot = apart ? s->sending.slot : s->plan.slot;
    if (!apart)
        gpu::dense_forward(m, l, s, N);
    if (moe) {
        const floatX *x = s->h2;
        if (h > 1) {
            product(s->sub, along_rows(s->h2, C), along_rows(low_of(m, w->split), C), N, C, C, 0);
            to_high(m->router_in, s->sub, (size_t)N * C);
            x = s->sub;
        }
        gpu::router_forward(m, l, s, m->router_in, N * h, C / h, T * h);
        m->acts.layer[l].route.N = N * h;
        if (apart) {
            gpu::exchange_start(m, l, s, x, N * h, C / h);
            gpu::dense_forward(m, l, s, N); // while the rows travel
            gpu::exchange_forward(m, l, s, C / h);
        } else if (N) {
            list_tiles(s->tile, s->tiles, s->plan.offset, c->experts);
            Experts experts = layer_experts(m, &s->plan, s->tile, s->tiles);
            gpu::experts_forward(m->rows, s->hidden, m->act, x, low_of(m, w->w_in), low_of(m, w->w_out), s->weight,
                                 &experts);
        }
        if (h > 1) {
            combine(s->merged, NULL, NULL, m->rows, slot, N * h, s->plan.K, C / h);
            product(m->branch, along_rows(s->merged, C), along_rows(low_of(m, w->merge), C), N, C, C, w->dense_in != NULL);
        }
    }
    combine(out, s->mid, w->dense_in || h > 1 ? m->branch : NULL, moe && h == 1 ? m->rows : NULL, slot, N, s->plan.K, C);
}

// With --recompute: the hidden layers again, of s->h2 and the plan as it was.
void ffn_recompute(Model *m, int l, LayerState *s, int N) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l];
    int C = c->dim, H = dense_width(c, l) * (1 + is_gated(dense_activation(c, l)));
    if (w->dense_in)
        product(s->dense_hidden, along_rows(s->h2, C), along_rows(low_of(m, w->dense_in), C), N, H, C, 0);
    Experts experts = layer_experts(m, &s->plan, s->tile, s->tiles);
    if (is_moe(c, l) && !APART) // what came from other ranks is kept
        gpu::experts_hidden(s->hidden, m->act, c->subtokens > 1 ? s->sub : s->h2, low_of(m, w->w_in), &experts);
}

// Given m->dx_low (N,C), writes dh (N,C), the gradient by s->h2, and adds to the weights' gradients.
void ffn_backward(Model *m, int l, LayerState *s, float *dh, int N, int T) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l], *dw = &m->grads.layer[l];
    int C = c->dim, h = c->subtokens, apart = APART && is_moe(c, l);
    const floatX *dout = m->dx_low;
    if (!apart)
        gpu::dense_backward(m, l, s, dh, dout, N);
    if (!is_moe(c, l))
        return;
    const floatX *x = s->h2;
    float *dx = dh;
    if (h > 1) {
        product(m->dmerged, along_rows(dout, C), along_columns(low_of(m, w->merge), C), N, C, C, 0);
        product(dw->merge, along_columns(dout, C), along_columns(s->merged, C), C, C, N, 1);
        dout = m->dmerged;
        x = s->sub;
        dx = m->dsub;
        to_high(m->router_in, s->sub, (size_t)N * C);
    } else {
        gpu::rmsnorm_forward(NULL, m->router_in, s->rstd2, s->mid, w->norm2, N, C, c->norm_eps);
    }
    Plan *plan = &s->plan;
    if (apart) {
        gpu::exchange_start_backward(m, s, dout, C / h);
        gpu::dense_backward(m, l, s, dh, m->dx_low, N);
        gpu::exchange_backward(m, l, s, C / h);
    } else {
        zero(m->dweight, (size_t)plan->N * plan->K * sizeof(float)); // dropped choices get none
        Experts experts = layer_experts(m, &s->plan, s->tile, s->tiles);
        gpu::experts_backward(m->rows, dw->w_in, dw->w_out, m->dweight, dout, x, s->hidden, s->weight, low_of(m, w->w_in),
                              low_of(m, w->w_out), m->act, m->dhidden, m->dweight_part, m->slots, &experts);
    }
    combine(dx, w->dense_in && h == 1 ? dh : NULL, NULL, m->rows, apart ? s->sending.slot : plan->slot, plan->N, plan->K,
            C / h);
    gpu::router_backward(m, l, s, dx, m->router_in, plan->N, C / h, T * h);
    if (h > 1) {
        floatX *dsub = m->dmerged; // no longer needed for itself
        to_low(dsub, m->dsub, (size_t)N * C);
        product(dh, along_rows(dsub, C), along_columns(low_of(m, w->split), C), N, C, C, w->dense_in != NULL);
        product(dw->split, along_columns(dsub, C), along_columns(s->h2, C), C, C, N, 1);
    }
}

// The first half of a layer, from s->x to s->h2 and, not rounded, the router's input.
void attend_forward(Model *m, int l) {
    const Config *c = &m->config;
    LayerState *s = &m->layers[l];
    const LayerWeights *w = &m->weights.layer[l];
    int N = m->batch.B * m->batch.T, C = c->dim, H = c->heads, KV = c->kv_heads, D = C / H, Q = (H + 2 * KV) * D;
    gpu::rmsnorm_forward(s->h1, NULL, s->rstd1, s->x, w->norm1, N, C, c->norm_eps);
    product(s->qkv, along_rows(s->h1, C), along_rows(low_of(m, w->qkv), C), N, Q, C, 0);
    gpu::rope(s->qkv, Q, N, m->batch.T, H + KV, D, m->angles, 1);
    if (m->cache)
        attention_of_one(s->att, m->cache + (size_t)l * c->seq * 2 * KV * D, s->qkv, m->position, c->seq, H, KV, D);
    else
        gpu::attention_forward(s->att, s->lse, s->qkv, m->batch.B, m->batch.T, H, KV, D);
    product(m->branch, along_rows(s->att, C), along_rows(low_of(m, w->proj), C), N, C, C, 0);
    add_rmsnorm_forward(s->mid, s->h2, is_moe(c, l) && c->subtokens == 1 ? m->router_in : NULL, s->rstd2, s->x, m->branch,
                        w->norm2, N, C, c->norm_eps);
    m->at_hand = l;
}

// All layers, from m->tokens to m->h.
void layers_forward(Model *m) {
    const Config *c = &m->config;
    int N = m->batch.B * m->batch.T, C = c->dim, L = c->layers;
    if (N)
        gpu::embedding_forward(m->layers[0].x, m->weights.embed, m->tokens, N, C);
    for (int l = 0; l < L; l++) {
        keep_pace();
        if (N) // without tokens of its own, a rank's experts have those of others
            gpu::attend_forward(m, l);
        gpu::ffn_forward(m, l, &m->layers[l], l + 1 < L ? m->layers[l + 1].x : m->x, N, m->batch.T);
    }
    gpu::rmsnorm_forward(m->h, NULL, m->rstd, m->x, m->weights.norm, N, C, c->norm_eps);
}

// The cross-entropy of all rows of m->h, and in all modes but EVAL_MODE the gradients by m->h and the head.
void head_loss(Model *m, int N, double scale) {
    int C = m->config.dim, V = m->config.vocab, train = m->batch.mode != EVAL_MODE;
    const floatX *head = low_of(m, m->weights.head);
    for (int first = 0; first < N; first += m->head_rows) {
        int rows = min_int(m->head_rows, N - first);
        const floatX *h = m->h + (size_t)first * C;
        product(m->logits, along_rows(h, C), along_rows(head, C), rows, V, C, 0);
        cross_entropy(m->nll + first, train ? m->dlogits_low : NULL, m->logits, m->targets + first, rows, V, (float)scale);
        if (train) {
            product(m->dh + (size_t)first * C, along_rows(m->dlogits_low, V), along_columns(head, C), rows, C, V, 0);
            product(m->grads.head, along_columns(m->dlogits_low, V), along_columns(h, C), V, C, rows, 1);
        }
    }
}

// report: TOTAL_AUX += scale * the sum of the layers' balance losses.
__global__ void add_aux_kernel(double *report, int L, int stats, int aux, double scale) {
    double sum = 0;
    for (int l = 0; l < L; l++)
        sum += report[SINGLE_REPORTS + l * stats + aux];
    report[TOTAL_AUX] += scale * sum;
}

// Sends the batch to the device: tokens and targets, and the tokens sorted, which only the host sees before the device
// does. The memory it is sent from may not be written again until it is on its way.
void send_batch(Model *m, const int *tokens, const int *targets, int N) {
    int *to = m->staging, *order = to + 2 * m->max_tokens, *words = order + m->max_tokens, *offset = words + m->max_tokens;
    int V = m->config.vocab, count = 0;
    await(m->staged);
    memcpy(to, tokens, (size_t)N * sizeof(int));
    memcpy(to + m->max_tokens, targets, (size_t)N * sizeof(int));
    ::counting_sort(order, m->offset, tokens, N, V);
    for (int v = 0; v < V; v++) {
        if (m->offset[v + 1] > m->offset[v]) {
            words[count] = v;
            offset[count++] = m->offset[v];
        }
    }
    offset[count] = N;
    m->words = count;
    CHECK(cudaMemcpyAsync(m->tokens, to, ((size_t)m->max_tokens * 5 + 1) * sizeof(int), cudaMemcpyHostToDevice, stream));
    CHECK(cudaEventRecord(m->staged, stream));
}

// Queues a pass over a batch: see the C twin. The losses wait on the device for model_losses.
void model_forward(::Model *base, const Batch *batch) {
    Model *m = (Model *)base;
    const Config *c = &m->config;
    int N = batch->B * batch->T;
    m->batch = *batch;
    ranks_begin_batch(m);
    send_batch(m, batch->inputs, batch->targets, N);
    if (batch->first)
        zero(m->report, 2 * sizeof(double)); // LOSS and TOTAL_AUX
    if (batch->mode == TRAIN_MODE && batch->first)
        gpu::clear_router_stats(m);
    layers_forward(m);
    if (N) {
        gpu::head_loss(m, N, batch->scale / N);
        add_mean(m->report + LOSS, m->nll, N, batch->scale);
    }
    if (moe_layers(c) && batch->mode != EVAL_MODE) {
        add_aux_kernel<<<1, 1, 0, stream>>>(m->report, c->layers, stats_size(c), 4 * c->experts + AUX, batch->scale);
        CHECK(cudaGetLastError());
    }
}

// ---- gradients of several ranks

// Begins to sum gradients from..end: see the C twin.
void start_sum(::Model *m, size_t from, size_t end, int peers) {
    int sharing = peers ? ranks.groups : ranks.size;
    if (from >= end || sharing == 1)
        return;
    ranks.traffic.reduced += 2.0 * (sharing - 1) / sharing * (double)((end - from) * sizeof(float)); // what a ring sends
    follow(network, stream);
    nccl_sum(m->memory[GRADS] + from, end - from, peers ? OF_PEERS : OF_ALL);
}

void exchange_copies(Model *m, int what) {
    int count;
    size_t room = 0;
    float *arrived, *to;
    Copy *list = list_copies(m, &count);
    for (int i = 0; i < count; i++)
        room += what == GRADS && list[i].owned ? list[i].size : 0;
    lay_pieces(&m->transit->room, {{&arrived, room * sizeof(float)}});
    to = arrived;
    depart();
    for (int i = 0; i < count; i++) {
        const Copy *k = &list[i];
        int receives = k->owned == (what == GRADS);
        float *own = m->memory[what] + k->at;
        if (receives)
            nccl_receive(what == GRADS ? to : own, k->size * sizeof(float), k->partner);
        else
            nccl_send(own, k->size * sizeof(float), k->partner);
        ranks.traffic.reduced += receives ? 0 : (double)(k->size * sizeof(float));
        to += receives ? k->size : 0;
    }
    arrive(m->transit->half[0].arrived);
    wait_for(m->transit->half[0].arrived);
    to = arrived;
    for (int i = 0; what == GRADS && i < count; i++) {
        float *own = m->memory[what] + list[i].at;
        if (!list[i].owned) {
            zero(own, list[i].size * sizeof(float));
            continue;
        }
        add_kernel<<<blocks(list[i].size), THREADS, 0, stream>>>(own, to, list[i].size);
        CHECK(cudaGetLastError());
        to += list[i].size;
    }
    free(list);
}

// Adds the gradients of grad_scale * (loss + aux) of the last forward pass, which was not in EVAL_MODE.
void model_backward(::Model *base) {
    Model *m = (Model *)base;
    const Config *c = &m->config;
    int B = m->batch.B, T = m->batch.T, N = B * T, C = c->dim, H = c->heads, KV = c->kv_heads, D = C / H, Q = (H + 2 * KV) * D;
    int sums = MANY && m->batch.last;
    size_t tail = (size_t)(m->grads.norm - m->memory[GRADS]), from = tail;
    zero(m->dx, (size_t)N * C * sizeof(float));
    gpu::rmsnorm_backward(m->dx, m->dx_low, m->grads.norm, m->dh, m->x, m->rstd, m->weights.norm, N, C, m->partial);
    for (int l = c->layers - 1; l >= 0; l--) {
        keep_pace();
        LayerState *s = &m->layers[l];
        const LayerWeights *w = &m->weights.layer[l], *dw = &m->grads.layer[l];
        if (c->recompute && l != m->at_hand) {
            gpu::attend_forward(m, l);
            gpu::ffn_recompute(m, l, s, N);
        }
        gpu::ffn_backward(m, l, s, m->dh, N, T);
        gpu::rmsnorm_backward(m->dx, m->dx_low, dw->norm2, m->dh, s->mid, s->rstd2, w->norm2, N, C, m->partial);
        product(m->datt, along_rows(m->dx_low, C), along_columns(low_of(m, w->proj), C), N, C, C, 0);
        product(dw->proj, along_columns(m->dx_low, C), along_columns(s->att, C), C, C, N, 1);
        gpu::attention_backward(m->dqkv, m->datt, s->att, s->lse, s->qkv, B, T, H, KV, D, m->delta);
        gpu::rope(m->dqkv, Q, N, T, H + KV, D, m->angles, -1);
        product(m->dh, along_rows(m->dqkv, Q), along_columns(low_of(m, w->qkv), C), N, C, Q, 0);
        product(dw->qkv, along_columns(m->dqkv, Q), along_columns(s->h1, C), Q, C, N, 1);
        gpu::rmsnorm_backward(m->dx, m->dx_low, dw->norm1, m->dh, s->x, s->rstd1, w->norm1, N, C, m->partial);
        if (sums)
            sum_layer(m, l, &from, gpu::start_sum);
    }
    const int *order = m->tokens + 2 * m->max_tokens;
    gpu::embedding_backward(m->grads.embed, m->dx, order, order + m->max_tokens, order + 2 * m->max_tokens, m->words, C);
    if (!sums)
        return;
    sum_layer(m, -1, &from, gpu::start_sum);
    gpu::start_sum(m, tail, m->common, 0); // the last norm, and what all layers have in common
    if (has_copies(m)) {
        gpu::exchange_copies(m, GRADS);
        gpu::start_sum(m, m->common, m->size, 1);
    }
}

size_t slice_of(const Model *m) { // the numbers that this rank updates of what all have
    return m->crossing->slice_end - m->crossing->slice;
}

// *norm of all ranks' gradients: of this rank's slice of what all have, and of its experts, which `groups` ranks have.
void whole_norm(Model *m, double *norm) {
    const float *g = m->memory[GRADS];
    zero(norm, sizeof(double));
    int parts = gpu::sum_of_squares(m->norm_part, g + m->crossing->slice, slice_of(m));
    gpu::add_sum(norm, Doubles{m->norm_part}, parts, 1);
    parts = gpu::sum_of_squares(m->norm_part, g + m->common, m->size - m->common);
    gpu::add_sum(norm, Doubles{m->norm_part}, parts, 1.0 / ranks.groups);
    gpu::sum_over_ranks(norm, 1);
    root_of_sum_kernel<<<1, 32, 0, stream>>>(norm, norm, 1);
    CHECK(cudaGetLastError());
}

// After each rank has updated its slice of what all have.
void share_weights(Model *m) {
    size_t slice = slice_of(m);
    ranks.traffic.reduced += (double)(slice * sizeof(float)) * (ranks.size - 1);
    follow(network, stream);
    nccl_gather(m->memory[WEIGHTS], m->crossing->slice, slice);
    wait_for_network();
    round_weights(m, 0, m->common);
}

// The report on the host; waits until the device has done all.
void fetch_report(Model *m) {
    download(m->host_report, m->report, m->report_size * sizeof(double));
}

// As of the last fetch_report.
const Statistics *model_statistics(const ::Model *base, int l) {
    const Model *m = (const Model *)base;
    Statistics *s = &m->stats[l];
    int E = m->config.experts;
    double *from = m->host_report + (layer_stats(m, l) - m->report), *single = from + 4 * E;
    s->count = from;
    s->recent = from + 2 * E;
    if (!s->idle)
        s->idle = (int *)own_host((Model *)m, E, sizeof(int));
    for (int e = 0; e < E; e++)
        s->idle[e] = (int)from[3 * E + e];
    s->entropy = single[ENTROPY];
    s->dropped = single[DROPPED];
    s->active = single[ACTIVE];
    s->tokens = single[TOKENS];
    return s;
}

// The gradients' norm, AdamW, and what the router does without gradients; where the norm is not finite nothing is.
void model_update(::Model *base, int step, double lr) {
    Model *m = (Model *)base;
    const Config *c = &m->config;
    double *norm = m->report + GRADIENT_NORM;
    if (MANY) {
        wait_for_network(); // for the gradients' sums
        whole_norm(m, norm);
    } else {
        gpu::gradient_norm(norm, m->memory[GRADS], m->size, m->norm_part);
    }
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        if (!i || t->layer != m->tensors[i - 1].layer)
            keep_pace();
        size_t at = t->offset, size = t->size;
        ranks_own_range(m, t, &at, &size);
        if (!t->trained || !size)
            continue;
        size_t moment = moment_offset(m, at);
        adamw(m->memory[WEIGHTS] + at, m->low + at, m->memory[GRADS] + at, m->memory[MOMENT1] + moment,
              m->memory[MOMENT2] + moment, size, norm, c->clip, (float)lr,
              (float)(t->dims == 1 ? 1 : 1 - lr * c->weight_decay),
              (float)c->beta1, (float)c->beta2, (float)(1 / (1 - pow(c->beta1, step))),
              (float)(1 / (1 - pow(c->beta2, step))), 1e-8f);
    }
    if (MANY) {
        zero(m->memory[GRADS], m->common * sizeof(float)); // the other ranks' slices, too
        gpu::share_weights(m);
    }
    gpu::router_update(m);
    if (has_copies(m)) {
        if (step % c->replicate_every == 0) {
            fetch_report(m);
            for (int l = 0; l < c->layers; l++)
                gpu::model_statistics(m, l);
            choose_copies(m);
            gpu::place_experts(m);
        }
        gpu::exchange_copies(m, WEIGHTS);
        round_weights(m, m->common, m->size);
    }
}

void model_losses(::Model *base, double *loss, double *aux, double *norm) {
    Model *m = (Model *)base;
    fetch_report(m);
    double both[2] = {m->host_report[LOSS], m->host_report[TOTAL_AUX]};
    ::sum_over_ranks(both, 2);
    *loss = both[0];
    *aux = both[1];
    *norm = m->host_report[GRADIENT_NORM];
}

// The choices of the last forward pass, copied to the host.
const Route *model_route(const ::Model *base, int l) {
    Model *m = (Model *)base;
    const Plan *plan = &m->layers[l].plan;
    Route *to = &m->acts.layer[l].route;
    size_t choices = (size_t)plan->N * plan->K, room = (size_t)m->max_tokens * m->config.subtokens * plan->K;
    if (!to->expert && plan->E) {
        int *ints = (int *)own_host(m, room * 5 + plan->E + 1, sizeof(int));
        to->E = plan->E;
        to->K = plan->K;
        to->expert = ints;
        to->served = ints + room;
        to->row = ints + 2 * room;
        to->choice = ints + 3 * room;
        to->token = ints + 4 * room;
        to->offset = ints + 5 * room;
    }
    to->N = plan->N;
    if (!plan->E || !plan->N)
        return to;
    int *const target[] = {to->offset, to->expert, to->served, to->row, to->choice, to->token};
    const int *const from[] = {plan->offset, plan->expert, plan->key, plan->slot, plan->choice, plan->token};
    for (int i = 0; i < 6; i++) { // behind the last slot nothing was ever written
        size_t count = i == 0 ? (size_t)plan->E + 1 : i < 4 ? choices : (size_t)to->offset[plan->E];
        download(target[i], from[i], count * sizeof(int));
    }
    return to;
}

// One token at `position`; logits (V) of the next, on the host: see the C twin. m->one does what a forward pass does, but
// for its attention, which is with the keys and values in its cache.
void model_generate(::Model *base, int token, int position, real *logits) {
    Model *m = (Model *)base, *one = m->one;
    const Config *c = &m->config;
    int D = c->dim / c->heads;
    if (!one) {
        one = m->one = new_model(c, 1, 0, m, 0);
        own_cache(one);
        one->batch.B = one->batch.T = 1;
        one->batch.mode = EVAL_MODE;
        for (int r = 0; r < ranks.size; r++) // all ranks go on with the same token
            one->crossing->rank_tokens[r] = 1;
    }
    one->position = position;
    float *angles = (float *)allocate(D, sizeof(float));
    rope_angles(angles, position, 1, D, c->rope_theta);
    CHECK(cudaMemcpyAsync(one->angles, angles, (size_t)D * sizeof(float), cudaMemcpyHostToDevice, stream));
    CHECK(cudaMemcpyAsync(one->tokens, &token, sizeof(int), cudaMemcpyHostToDevice, stream));
    layers_forward(one);
    product(one->logits, along_rows(one->h, c->dim), along_rows(low_of(m, m->weights.head), c->dim), 1, c->vocab, c->dim, 0);
    download(logits, one->logits, (size_t)c->vocab * sizeof(float));
    free(angles);
}

__global__ void fill_kernel(floatX *x, size_t size) { // with anything but zeros, on which a device is faster than on numbers
    size_t i = thread_of_grid();
    if (i < size)
        store(&x[i], (float)random_uniform(1, i) - 0.5f);
}

// Operations per second of cuBLAS on matrices of floatX as large as the device is wide: the most that can be hoped for.
double measured_peak(void) {
    cudaDeviceProp device;
    cudaEvent_t begin, end;
    int number;
    float ms = 0, best = 1e30f;
    start_device();
    CHECK(cudaGetDevice(&number));
    CHECK(cudaGetDeviceProperties(&device, number));
    int n = min_int(8192, 64 * device.multiProcessorCount);
    size_t size = (size_t)n * n;
    floatX *a, *out;
    CHECK(cudaMalloc((void **)&a, size * sizeof(floatX)));
    CHECK(cudaMalloc((void **)&out, size * sizeof(floatX)));
    fill_kernel<<<blocks(size), THREADS, 0, stream>>>(a, size);
    CHECK(cudaGetLastError());
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    for (int attempt = 0; attempt < 5; attempt++) {
        CHECK(cudaEventRecord(begin, stream));
        product(out, along_rows(a, n), along_rows(a, n), n, n, n, 0);
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        best = ms < best ? ms : best;
    }
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    CHECK(cudaFree(a));
    CHECK(cudaFree(out));
    return 2.0 * n * n * n / (1e-3 * best);
}

void device_name(char name[128]) {
    cudaDeviceProp device;
    int number;
    CHECK(cudaGetDevice(&number));
    CHECK(cudaGetDeviceProperties(&device, number));
    snprintf(name, 128, "%.127s", device.name);
}

double device_memory(void) {
    size_t left, total;
    CHECK(cudaMemGetInfo(&left, &total));
    return (double)total;
}

const Backend backend = {"cuda",         model_allocate, model_free,     model_init,       model_forward, model_backward,
                         model_update,   model_losses,   model_generate, model_statistics, model_route,   model_read,
                         model_write,    measured_peak,  device_name,    device_memory};

} // namespace gpu

#ifdef TRAIN_MOE_CU_MAIN
int main(int argc, char **argv) {
#ifdef USE_NCCL
    program_name = "train_moe_cu_nccl";
#else
    program_name = "train_moe_cu";
#endif
    return run_program(argc, argv, &gpu::backend, train_moe);
}
#endif
