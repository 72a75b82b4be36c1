// train_moe.cu: the model of train_moe.c on an NVIDIA GPU.
//
// Read train_moe.c first. This file includes it, and replaces only what computes: its chapters, functions and arrays
// have the same names and are in the same order, so the two can be read side by side. What a function computes is
// said there. Here it is said what a GPU needs, and why.
//
//   make train_moe_cu                    needs the CUDA Toolkit (nvcc, cuBLAS) and nothing else
//   make train_moe_cu PRECISION=fp32     everything in float32, to be compared with the C twin
//   ./train_moe_cu                       the same options, files, recipes and log as ./train_moe
//   make train_moe_cu_nccl               for several GPUs: mpirun -np 4 ./train_moe_cu_nccl; needs MPI and NCCL, too
//
// Five things are different on a GPU:
//
//   - The program runs on the host and starts kernels, which run on the device, one after the other in one stream.
//     The host does not wait for them: it reads the losses at the end of a step. So all arrays are in the device's
//     memory, and what depends on them (how many tokens an expert has, where its rows begin) is looked up by the
//     kernels. The host only knows the most that it can be, and starts as many blocks. (With several GPUs the host
//     must know how many rows go where, so there it waits once in each layer.)
//   - Starting a kernel takes a few microseconds, and what a kernel reads and writes in memory takes longer than what
//     it computes, unless it is a product of matrices. So small steps that follow each other are one kernel: adding
//     up the residual stream, its norm, and the router with its choice.
//   - Products are done by tensor cores, which multiply bfloat16 and add up in float32. The type floatX is what they
//     multiply: activations, and a rounded copy of the weights, which is made as a step writes the weights. Weights,
//     their gradients, the optimizer's moments (unless --moments bf16), the residual stream x, the router and each
//     token's loss are float32; what is summed over tokens for losses and norms is double.
//   - Thousands of threads work at the same time. A block of up to 1,024 threads shares fast memory and can wait for
//     its threads; 32 of them, a warp, mostly go in step and can read each other's registers (__syncwarp() before one
//     lane reads memory that another one wrote). Each sum has one owner and a fixed order, so the bits are the same
//     from run to run. There are no atomic additions of floating-point numbers. (cuBLAS promises the same for one
//     stream on the same kind of GPU. For NCCL's sums over several GPUs nobody promises it.)
//   - Memory is read in packs of 8 or 16 bytes, and tensor cores take eight numbers at a time. So all widths must be
//     multiples of eight, and the vocabulary is filled up to a multiple of 64 with words that do not exist.

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

// From here on the names of chapter 2 of train_moe.c mean this file's functions. (Tests call the plain ones.)
#include "dev/cpu/plain_names.h"

namespace gpu {

#ifdef FP32
typedef float floatX;
#else
typedef __nv_bfloat16 floatX;
#endif
static_assert(sizeof(real) == sizeof(float), "the CUDA twin is compared with the C twin in float");

#include "dev/cuda/common.cuh"     // errors, sums over warps and blocks, packs of numbers, tiles for the tensor cores
#include "dev/cuda/nccl.cuh"       // streams and events; NCCL, by which several GPUs send each other numbers
#include "dev/cuda/activation.cuh" // SwiGLU and its kin, forward and backward
#include "dev/cuda/experts.cuh"    // the products of a layer's experts; struct Experts

// ---------------------------------------------------------------------------------------------------------------------
// 1. What a model is
//
// Words that come again and again: a pack is a few numbers that a thread reads or writes at once; a tile is a piece
// of a matrix that a block multiplies, in shared memory; a chunk is up to BLOCK_ROWS (32) tokens that a block works
// on; low is what has been rounded to floatX.
//
// Config, Params, Route, Batch and the table of weights are the C twin's. The pointers of Params and Route lead to
// the device's memory here. Activations have a struct of their own, since many of them are floatX.

struct LayerActs {
    float *x;          // (N,C)  the layer's input
    floatX *h1;        // (N,C)
    float *rstd1;      // (N)
    floatX *qkv, *att; // (N,(H+2KV)*D), (N,H*D). Not turned by the rotary positions: attention does that as it reads
    floatX *raw_qk;    // (N,(H+KV)*D)  with --qk-norm: queries and keys before their norm
    float *rstd_qk;    // (N,H+KV)
    float *lse;        // (B,H,T)
    float *mid;        // (N,C)
    floatX *h2;        // (N,C)
    float *rstd2;      // (N)
    floatX *dense_hidden; // (N,2F)
    floatX *hidden;       // (N*K,2F)
    floatX *fed;          // (N,C)  with --moe-sigmoid: what the layer feeds forward
    void *mixer;          // dev/cuda/mixers: what another mixer than attention keeps
    int2 *tile;           // (tiles)  expert and first row of each tile of rows; see experts.cuh
    int tiles;            // as many as there can be
    float *partial[2];    // (blocks of BLOCK_ROWS tokens, C)  sums for the gradients of the two norms
    float *drouter;       // (E,C)  the router's gradient, but for a factor; see fused_router_backward
};

// What is added to the residual stream, but has not been added yet. The kernel that takes the next norm adds it up as
// it reads, so that no pass over memory is spent on the sum alone. Parts that are not there are NULL.
struct Sum {
    const float *x;       // (N,C)
    const floatX *branch; // (N,C)  attention's or a dense layer's output
    const floatX *rows;   // (.,C)  the experts' answers, times their weights: the kernel that makes them multiplies
    const int *row;       // (N,K)  of each token, which rows; -1: none
    int K;
};

// Scratch for counting, sorting and balancing the choices of one layer: see "the plan of a layer" in chapter 3.
struct PlanScratch {
    int *count;          // (E,chunks)  choices of each expert in each chunk of tokens; then, in all chunks before it
    int *unbiased_count; // (E,chunks)  the same of the choices without the selection bias
    int *unbiased;       // (N,K)  those choices
    float *p_sum;        // (E,chunks)  sums of p
    double *lse_squares, *entropy; // (chunks)
    int *total;                    // (E)
    int *first_tile;               // (E+1)
    double *mean_p;                // (groups,E)  sums of p over each group of tokens
    double *group_loss;            // (groups)
    int *active;                   // (1)  choices that were made, before any was refused
    unsigned *done;                // (1)  blocks that have finished
};

// Tests let this file take over the C twin's choices, since rounding may choose another expert where two are nearly
// as good. At first reading skip whatever says `decided`.
struct Decided { // choices of a layer, in the host's memory
    const int *expert, *key, *gate_expert, *groups_expert;
    const int *heads_expert[2], *heads_served[2]; // of the routers in attention
};

struct Crossing; // several GPUs: "experts on several GPUs" in chapter 3

// Of the base's acts only layer[l].route is used here, and its `experts` not at all. What MPI does for several
// processes is in its `crossing`, what NCCL does in `transit`.
struct Model : ::Model {
    LayerActs *layers; // (L)
    float *x, *rstd;   // (N,C), (N)  the last layer's output and its norm
    floatX *h;         // (N,C)
    floatX *low;       // all weights, rounded: number i is that of memory[WEIGHTS][i]; see low_of()
    // What one layer needs while it works.
    floatX *branch, *dx_low;       // (N,C)
    const floatX *dfed;            // (N,C)  the gradient by what the layer at hand feeds forward: one of these two
    floatX *rows, *act, *dhidden;  // (N*K,C), (N*K,F), (N*K,2F)  of the experts; a dense layer uses act and dhidden
    floatX *datt, *dqkv;           // (N,C), (N,(H+2KV)*D)
    float *delta;                  // (B,H,T)  dout . out of attention
    double *qk_part;               // with --qk-norm or --qkv-bias, sums for the gradients of their vectors: see dev/cuda/qk_norm.cuh
    float *dgate;                  // (N)  with --shared-gate: see dev/cuda/shared_expert.cuh
    double *dgate_part;
    float *dh;                     // (N,C)
    float *router_in;              // (N,C)  what routers read that are not fused: the norm, not rounded
    float *dweight, *dweight_part; // (N,K), (tiles of columns, N*K)
    float *router_dlogits;         // (N,E)
    Experts experts;               // what all layers have in common
    PlanScratch plan;
    char *scratch_memory; // scratch()
    size_t scratch_used, scratch_size;
    // The head.
    float *word_logits, *nll; // (head_rows, words_with_padding(V)), (N)
    floatX *word_dlogits;     // (head_rows, words_with_padding(V))
    int head_rows;
    int *tokens, *targets; // (N), (N); in the same piece, for embedding_backward: order (N), words (N), offset (N+1)
    int word_count;        // distinct words of the batch
    int *pairs;            // (orders,N)  with --ngrams: rows of its table, behind them the same three lists, of rows
    int pair_count;        // distinct rows of the batch
    float *last_partial;   // (blocks of BLOCK_ROWS tokens, C)  as LayerActs.partial, of the last norm
    struct Gradient *gradients; // sums that finish the gradients of norms and routers: see finish_gradients
    int gradient_count;
    double *norm_part;
    // What the host reads after a step.
    double *report, *host_report; // TOTAL_LOSS, TOTAL_AUX, GRADIENT_NORM, then stats_size() numbers of each layer
    size_t report_size;
    Route *host_route; // (L)  copies for model_route
    int *staging;      // what is on its way to the device, until the event `staged`
    cudaEvent_t staged;
    // Memory of the device: one allocation, from which own() cuts pieces. While `dry`, own() only counts.
    char *arena;
    size_t arena_used;
    int dry;
    struct MuonScratch *muon; // --optimizer muon: see dev/cuda/muon.cuh
    struct PairMemory *pair_memory; // --lora: see dev/cuda/lora.cuh
    // Generation: a model of one token, its cache (of each layer: keys and values (seq,2*KV*D), or a mixer's state), the
    // position of the token, and the token before it.
    Model *one;
    char *cache;
    int position, before[2];
    struct Tables *tables_there; // tables that are looked up: see dev/cuda/tables.cuh
    Crossing *transit;      // several GPUs
    const Decided *decided; // (L) tests: choices that are taken over; NULL: none
    int *decided_expert;    // (N,K)
};

// The report: three numbers of the whole step; then of each layer four arrays (E) - count, lowest, recent, idle - and
// the numbers ENTROPY to MIXER_AUX. They are those of Statistics (dev/statistics.h), of the layer's balance losses (AUX,
// and those of a mixer), and of expert choice (dev/routers/expert_choice.h): the lowest scores that each expert took, summed over PASSES
// groups.
enum { TOTAL_LOSS, TOTAL_AUX, GRADIENT_NORM, SINGLE_REPORTS };
enum { ENTROPY, DROPPED, ACTIVE, TOKENS, PASSES, AUX, MIXER_AUX, SINGLE_STATS };

int stats_size(const Config *c) {
    return 4 * c->experts + SINGLE_STATS;
}

double *layer_stats(const Model *m, int l) {
    return m->report + SINGLE_REPORTS + (size_t)l * stats_size(&m->config);
}

// Words that the head computes: tensor cores are only fast where the vocabulary is a multiple of eight, and best at
// 64. The weights of the words that do not exist are 0 and stay so; lay_out() of train_moe.c leaves room for them.
const int ALIGNED = 64;
int words_with_padding(int V) {
    return div_up(V, ALIGNED) * ALIGNED;
}

// The rounded copy of a weight.
floatX *low_of(const Model *m, const float *weight) {
    return m->low + (weight - m->memory[WEIGHTS]);
}

const int NORM_PARTS = 1024; // sums that make up the norm of all gradients

#include "dev/cuda/memory.cuh" // own(), scratch(), copies to the device

// ---------------------------------------------------------------------------------------------------------------------
// 2. The layers of a transformer

// ---- matrix products
//
// cuBLAS does them. Its matrices are stored column by column: what is to us a matrix row by row, is to it the
// transpose. So the factors change places.

cublasHandle_t cublas;

// As in the C twin. C++ looks for a function in the namespaces of its arguments' types, too. A SET of this namespace
// sees to it that matmul(..., SET) is this file's function; elsewhere gpu:: says so.
enum { SET, ADD };

cudaDataType type_of(const float *) {
    return CUDA_R_32F;
}

cudaDataType type_of(const __nv_bfloat16 *) {
    return CUDA_R_16BF;
}

// out (M,N) = or += the sum over k < K of a times b. a is (M,K), or with a_by_k (K,M); b is (N,K), or with b_by_k
// (K,N). Sums are float32, without TF32. Rows of a, and of out, that do not lie one behind the other begin row_a, and
// row_out, numbers apart.
template <class Out, class In>
void product(Out *out, const In *a, int a_by_k, const In *b, int b_by_k, int M, int N, int K, int add, int row_a = 0,
             int row_out = 0) {
    float one = 1, beta = add == ADD ? 1 : 0;
    cublasOperation_t turn_a = a_by_k ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t turn_b = b_by_k ? CUBLAS_OP_N : CUBLAS_OP_T;
    int row_b = b_by_k ? N : K;
    row_a = row_a ? row_a : a_by_k ? M : K;
    row_out = row_out ? row_out : N;
    if (M > 0 && N > 0) {
        CHECK(cublasGemmEx(cublas, turn_b, turn_a, N, M, K, &one, b, type_of(b), row_b, a, type_of(a), row_a,
                           &beta, out, type_of(out), row_out, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    }
}

// The same of `count` matrices each, which lie one behind the other: out (count,M,N) = a times b.
template <class Out, class In>
void products(Out *out, const In *a, int a_by_k, const In *b, int b_by_k, int M, int N, int K, int count) {
    float one = 1, none = 0;
    cublasOperation_t turn_a = a_by_k ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t turn_b = b_by_k ? CUBLAS_OP_N : CUBLAS_OP_T;
    int row_a = a_by_k ? M : K, row_b = b_by_k ? N : K;
    long long size_a = (long long)M * K, size_b = (long long)N * K, size_out = (long long)M * N;
    CHECK(cublasGemmStridedBatchedEx(cublas, turn_b, turn_a, N, M, K, &one, b, type_of(b), row_b, size_b, a,
                                     type_of(a), row_a, size_a, &none, out, type_of(out), N, size_out, count,
                                     CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

// out (N,O) = or += x (N,I) times w (O,I) transposed
template <class Out, class In> void matmul(Out *out, const In *x, const In *w, int N, int I, int O, int add) {
    product(out, x, 0, w, 0, N, O, I, add);
}

// dx (N,I) = or += dout (N,O) times w (O,I)
template <class Out, class In> void matmul_dx(Out *dx, const In *dout, const In *w, int N, int I, int O, int add) {
    product(dx, dout, 0, w, 1, N, I, O, add);
}

#include "dev/cuda/lora.cuh" // --lora: low-rank pairs beside frozen matrices, which have no gradient

// dw (O,I) += dout (N,O) transposed times x (N,I)
template <class In> void matmul_dw(float *dw, const In *dout, const In *x, int N, int I, int O) {
    if (!pair_dw(dw, dout, x, N, I, O)) {
        product(dw, dout, 1, x, 1, O, I, N, ADD);
    }
}

// ---- RMSNorm
//
// Forward, each warp has one row, of which its lanes read four numbers at a time. Backward, a block has BLOCK_ROWS
// rows, and its eight warps take them by turns, because the gradient of the norm's weights is a sum over all tokens:
// each block writes the sum over its own rows, and finish_gradients() adds these sums up at the end. (A block has
// THREADS = 256 threads where nothing else is said.)

const int BLOCK_ROWS = 32;

struct NormOut {
    float *sum;   // (N,C)  what was added up; NULL: there is nothing but from.x, which is not written again
    floatX *out;  // (N,C)  its norm, rounded
    float *out32; // (N,C)  the same, not rounded; NULL: it is not wanted
    float *rstd;  // (N)
};

// The four numbers of token n from column c on.
__device__ void sum_of(float (&to)[4], const Sum &from, int n, int c, int C) {
    size_t at = (size_t)n * C + c;
    float more[4];
    for (int i = 0; i < 4; i++) {
        to[i] = 0;
    }
    if (from.x) {
        load_pack(to, from.x + at);
    }
    if (from.branch) {
        load_pack(more, from.branch + at);
        for (int i = 0; i < 4; i++) {
            to[i] += more[i];
        }
    }
    for (int k = 0; from.rows && k < from.K; k++) {
        int row = from.row[(size_t)n * from.K + k];
        if (row >= 0) {
            load_pack(more, from.rows + (size_t)row * C + c);
            for (int i = 0; i < 4; i++) {
                to[i] += more[i];
            }
        }
    }
}

// Adds up row n and takes its norm, by a warp. kept (C), unless NULL, is shared memory: it holds the sum first, and
// the norm, not rounded, in the end.
__device__ void norm_of_row(const NormOut &to, const Sum &from, const float *w, float *kept, int n, int C,
                            float eps) {
    int lane = threadIdx.x % 32;
    size_t row = (size_t)n * C;
    float a[4], b[4], squares = 0;

    // Add up, keep the sum, and sum its squares.
    for (int c = 4 * lane; c < C; c += 128) {
        sum_of(a, from, n, c, C);
        if (to.sum) {
            store_pack(to.sum + row + c, a);
        }
        if (kept) {
            store_pack(kept + c, a);
        }
        for (int i = 0; i < 4; i++) {
            squares += a[i] * a[i];
        }
    }
    squares = warp_sum(squares);
    float scale = 1 / sqrtf(squares / C + eps);
    if (isinf(squares)) { // of numbers above 1e17 or so: they are made smaller first
        squares = 0;
        for (int c = 4 * lane; c < C; c += 128) {
            sum_of(a, from, n, c, C);
            for (int i = 0; i < 4; i++) {
                squares += a[i] * 1e-22f * (a[i] * 1e-22f);
            }
        }
        scale = 1e-22f / sqrtf(warp_sum(squares) / C);
    }
    if (lane == 0) {
        to.rstd[n] = scale;
    }

    // Each lane reads once more what it has read or written itself: from the cache, and without waiting for other
    // lanes.
    for (int c = 4 * lane; c < C; c += 128) {
        if (kept) {
            load_pack(a, kept + c);
        } else {
            load_pack(a, (to.sum ? to.sum : from.x) + row + c);
        }
        load_pack(b, w + c);
        for (int i = 0; i < 4; i++) {
            a[i] *= scale * b[i];
        }
        if (kept) {
            store_pack(kept + c, a);
        }
        if (to.out) {
            store_pack(to.out + row + c, a);
        }
        if (to.out32) {
            store_pack(to.out32 + row + c, a);
        }
    }
}

__global__ void rmsnorm_forward_kernel(NormOut to, Sum from, const float *w, int N, int C, float eps) {
    int n = row_of_warp();
    if (n < N) {
        norm_of_row(to, from, w, NULL, n, C, eps);
    }
}

// to.out = norm(x + branch + rows) * w
void rmsnorm_forward(NormOut to, Sum from, const float *w, int N, int C, double eps) {
    if (N > 0) {
        rmsnorm_forward_kernel<<<row_blocks(N), THREADS, 0, stream>>>(to, from, w, N, C, (float)eps);
        CHECK(cudaGetLastError());
    }
}

struct NormBack {
    float *dx;      // (N,C)  +=
    floatX *dx_low; // (N,C)  the result, rounded
    float *partial; // (blocks,C)  sums for the gradient of w
    const float *x; // (N,C)  the norm's input
    const float *rstd, *w;
};

// The way back through the norm for rows first .. end, by a block; dh (.,C) is the gradient by the norm's output, its
// first row that of token `first`. add: whether `partial` already has the sums of other rows.
//   dx += rstd * (dh * w - y * mean(dh * w * y)) with y = x * rstd
__device__ void norm_back(const NormBack &b, const float *dh, int first, int end, int C, float *partial, int add) {
    __shared__ float mean[BLOCK_ROWS]; // of dh * w * x, times rstd^3
    __shared__ __align__(16) float part[THREADS / 32][128];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = THREADS / 32;
    float d[4], x[4], w[4], g[4];
    __syncthreads(); // dh is complete, and mean is free

    // Of each row, by a warp: mean(dh * w * x) * rstd^3, so that dx += rstd * dh * w - x * that.
    for (int n = first + warp; n < end; n += warps) {
        float sum = 0;
        for (int c = 4 * lane; c < C; c += 128) {
            load_pack(d, dh + (size_t)(n - first) * C + c);
            load_pack(x, b.x + (size_t)n * C + c);
            load_pack(w, b.w + c);
            for (int i = 0; i < 4; i++) {
                sum += d[i] * x[i] * w[i];
            }
        }
        float rstd = b.rstd[n];
        sum = warp_sum(sum) * rstd * rstd * rstd / C;
        if (lane == 0) {
            mean[n - first] = sum;
        }
    }
    __syncthreads();

    // Strips of 128 columns: each warp adds up its own rows, then the warps' sums are added.
    for (int c0 = 0; c0 < C; c0 += 128) {
        int c = c0 + 4 * lane;
        float sum[4] = {0, 0, 0, 0};
        for (int n = first + warp; n < end && c < C; n += warps) {
            size_t at = (size_t)n * C + c;
            float rstd = b.rstd[n];
            load_pack(d, dh + (size_t)(n - first) * C + c);
            load_pack(x, b.x + at);
            load_pack(w, b.w + c);
            load_pack(g, b.dx + at);
            for (int i = 0; i < 4; i++) {
                sum[i] += d[i] * x[i] * rstd;
                g[i] += d[i] * w[i] * rstd - x[i] * mean[n - first];
            }
            store_pack(b.dx + at, g);
            store_pack(b.dx_low + at, g);
        }
        store_pack(&part[warp][4 * lane], sum);
        __syncthreads();
        if (threadIdx.x < 128 && c0 + (int)threadIdx.x < C) {
            float all = add ? partial[c0 + threadIdx.x] : 0;
            for (int i = 0; i < warps; i++) {
                all += part[i][threadIdx.x];
            }
            partial[c0 + threadIdx.x] = all;
        }
        __syncthreads();
    }
}

__global__ void rmsnorm_backward_kernel(NormBack b, const float *dh, int N, int C) {
    int first = blockIdx.x * BLOCK_ROWS;
    norm_back(b, dh + (size_t)first * C, first, min(N, first + BLOCK_ROWS), C, b.partial + (size_t)blockIdx.x * C, 0);
}

// Given dh (N,C), the gradient by the norm's output.
void rmsnorm_backward(NormBack b, const float *dh, int N, int C) {
    if (N > 0) {
        rmsnorm_backward_kernel<<<blocks(N, BLOCK_ROWS), THREADS, 0, stream>>>(b, dh, N, C);
        CHECK(cudaGetLastError());
    }
}

#include "dev/cuda/attention.cuh" // attention, with the rotary positions in it, and that of one token in generation
#include "dev/cuda/qk_norm.cuh"   // --qk-norm: queries and keys with a norm of their own
#include "dev/cuda/qkv.cuh"       // --qkv-bias: a vector that is added to queries, keys and values

// ---- embedding and loss

// Rows of the table of --ngrams that are added to the embedding.
struct NgramRows {
    const float *table; // (R,C), NULL: there is none
    const int *row;     // (orders,N)  of each token
    int orders;
    float *sum;         // (N,C)  what they add up to; NULL: it is not kept
};

__global__ void embedding_forward_kernel(float *x, const float *embedding, const int *tokens, NgramRows more, size_t size,
                                         int C) {
    size_t i = 4 * thread_of_grid(), n = i / C, N = size / C;
    float a[4], b[4], sum[4] = {0};
    if (i >= size) {
        return;
    }
    load_pack(a, embedding + (size_t)tokens[n] * C + i % C);
    for (int k = 0; more.table && k < more.orders; k++) {
        load_pack(b, more.table + (size_t)more.row[k * N + n] * C + i % C);
        for (int j = 0; j < 4; j++) {
            a[j] += b[j];
            sum[j] += b[j];
        }
    }
    store_pack(x + i, a);
    if (more.sum) {
        store_pack(more.sum + i, sum);
    }
}

// x (N,C) = each token's row of the embedding, and with --ngrams its rows of that table.
void embedding_forward(float *x, const float *embedding, const int *tokens, int N, int C, NgramRows more = {}) {
    size_t size = (size_t)N * C;
    if (N > 0) {
        embedding_forward_kernel<<<blocks(size, 4 * THREADS), THREADS, 0, stream>>>(x, embedding, tokens, more, size, C);
        CHECK(cudaGetLastError());
    }
}

// to (C) += factor times the sum of the rows order[from] .. order[until-1] of x, ld numbers apart; order NULL: rows
// from .. until-1; factor (C) NULL: 1. By a block of SUM_WARPS warps, for columns 128*strip and the 127 after it:
// each warp takes every so many-th row, then their sums are added.
const int SUM_WARPS = 8;
template <class T>
__device__ void add_rows(float *to, const T *x, int ld, const int *order, const float *factor, int from, int until,
                         int strip, int C) {
    __shared__ __align__(16) float part[SUM_WARPS][128];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = 128 * strip + 4 * lane;
    float a[4], f[4] = {1, 1, 1, 1}, sum[4] = {0, 0, 0, 0};
#pragma unroll 4 // four reads on their way at once
    for (int i = from + warp; i < until && c < C; i += SUM_WARPS) {
        load_pack(a, x + (size_t)(order ? order[i] : i) * ld + c);
        for (int j = 0; j < 4; j++) {
            sum[j] += a[j];
        }
    }
    store_pack(&part[warp][4 * lane], sum);
    __syncthreads();
    if (warp > 0 || c >= C) {
        return;
    }
    for (int w = 1; w < SUM_WARPS; w++) {
        for (int j = 0; j < 4; j++) {
            sum[j] += part[w][4 * lane + j];
        }
    }
    load_pack(a, to + c);
    if (factor) {
        load_pack(f, factor + c);
    }
    for (int j = 0; j < 4; j++) {
        a[j] += f[j] * sum[j];
    }
    store_pack(to + c, a);
}

template <class T>
__global__ void embedding_backward_kernel(float *dembedding, const T *dx, int ld, const int *order, const int *words,
                                          const int *offset, int C) {
    int from = offset[blockIdx.x], until = offset[blockIdx.x + 1];
    add_rows(dembedding + (size_t)words[blockIdx.x] * C, dx, ld, order, NULL, from, until, blockIdx.y, C);
}

// dembedding (V,C) += . The host has sorted the tokens: order (N) lists them by word, words (count) are the words
// that occur, offset (count+1) says where each begins in order. It has the tokens anyway, and so each strip of a row
// of dembedding has one block that adds to it. The rows of dx are C numbers, or ld numbers apart.
template <class T>
void embedding_backward(float *dembedding, const T *dx, const int *order, const int *words, const int *offset,
                        int count, int C, int ld = 0) {
    if (count > 0 && dembedding) { // NULL: it is frozen
        dim3 grid(count, div_up(C, 128));
        embedding_backward_kernel<T><<<grid, 32 * SUM_WARPS, 0, stream>>>(dembedding, dx, ld ? ld : C, order, words,
                                                                          offset, C);
        CHECK(cudaGetLastError());
    }
}

#include "dev/cuda/tables.cuh" // tables of which a token looks up one row: which rows has a step read?
#include "dev/cuda/lookup.cuh" // --value-embedding: each word has a vector that is added to its values

// A block has a row of logits, W numbers of which V are words. In the first pass each thread keeps the highest of its
// logits and the sum of exp(logit - highest), so that the row is read once for both.
__global__ void cross_entropy_kernel(float *nll, floatX *dlogits, const float *logits, const int *targets, int V,
                                     int W, float scale) {
    __shared__ float highest[32];
    const float *row = logits + (size_t)blockIdx.x * W;
    int target = targets[blockIdx.x], warps = blockDim.x / 32, lane = threadIdx.x % 32;
    float a[4], top = -INFINITY, sum = 0, wanted = row[target];

    // First pass: the highest logit, and the sum.
    for (int v = 4 * threadIdx.x; v < V; v += 4 * blockDim.x) {
        float before = top;
        load_pack(a, row + v);
        for (int i = 0; i < 4; i++) {
            top = v + i < V ? fmaxf(top, a[i]) : top;
        }
        sum *= expf(before - top); // what was summed is relative to the highest logit so far
        for (int i = 0; i < 4; i++) {
            sum += v + i < V ? expf(a[i] - top) : 0;
        }
    }

    // The highest and the sum over the block.
    float most = warp_max(top);
    if (lane == 0) {
        highest[threadIdx.x / 32] = most;
    }
    __syncthreads();
    most = warp_max(lane < warps ? highest[lane] : -INFINITY);
    sum = block_sum(sum * expf(top - most));
    if (threadIdx.x == 0) {
        nll[blockIdx.x] = most + logf(sum) - wanted;
    }

    // The gradient: the probability, less 1 for the word that came; 0 for words that do not exist.
    float share = scale / sum;
    for (int v = 4 * threadIdx.x; dlogits && v < W; v += 4 * blockDim.x) {
        load_pack(a, row + v);
        for (int i = 0; i < 4; i++) {
            float came = v + i == target ? scale : 0;
            a[i] = v + i < V ? expf(a[i] - most) * share - came : 0;
        }
        store_pack(dlogits + (size_t)blockIdx.x * W + v, a);
    }
}

// nll (rows), in nats, of logits (rows,W) against targets, and, unless NULL, dlogits (rows,W), the gradient of scale
// * sum(nll). With PRECISION=fp32 dlogits may be the same array as logits. W is a multiple of four.
void cross_entropy(float *nll, floatX *dlogits, const float *logits, const int *targets, int rows, int V, int W,
                   float scale) {
    if (rows > 0) {
        cross_entropy_kernel<<<rows, row_threads(W, 4), 0, stream>>>(nll, dlogits, logits, targets, V, W, scale);
        CHECK(cudaGetLastError());
    }
}

// The head and the loss of all rows of m->h (N,C); except at evaluation also m->dh, and the head's gradient.
void head_loss(Model *m, int N, double scale) {
    int C = m->config.dim, V = m->config.vocab, W = words_with_padding(V), gradients = m->batch.mode != EVAL_MODE;
    const floatX *head = low_of(m, m->params.head);
    for (int first = 0; first < N; first += m->head_rows) {
        int rows = min_int(m->head_rows, N - first);
        const floatX *h = m->h + (size_t)first * C;

        // As in the C twin, the gradients are taken while the logits are there.
        matmul(m->word_logits, h, head, rows, C, W, SET);
        cross_entropy(m->nll + first, gradients ? m->word_dlogits : NULL, m->word_logits, m->targets + first, rows, V,
                      W, (float)scale);
        if (gradients) {
            matmul_dx(m->dh + (size_t)first * C, m->word_dlogits, head, rows, C, W, SET);
            matmul_dw(m->grads.head, m->word_dlogits, h, rows, C, W);
        }
    }
}

__global__ void add_mean_kernel(double *to, const float *x, int N, double scale) {
    double sum = 0;
    for (int i = threadIdx.x; i < N; i += blockDim.x) {
        sum += (double)x[i];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        *to += scale * (sum / N);
    }
}

// *to += scale * mean of x (N)
void add_mean(double *to, const float *x, int N, double scale) {
    add_mean_kernel<<<1, 1024, 0, stream>>>(to, x, N, scale);
    CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. The mixture of experts
//
// The steps are those of the C twin: scores, choice, weight, balance, capacity, sorting, experts, combining. For the
// lesson's router all steps of a token up to its choice are one kernel together with the norm before them, and
// backward from the weights to the gradient of the norm's input is one. Routers of single papers have kernels of
// their own, in dev/cuda/routers.

// ---- scores, choice and weight of one token, by a warp whose lanes run over the experts

// p (E) = softmax or sigmoid of logits (E); *lse = log of the sum of exp, where scores are softmax.
__device__ void scores_of_row(float *p, float *lse, const float *logits, int E, int score) {
    int lane = threadIdx.x % 32;
    float top = -INFINITY, sum = 0;

    // Each number on its own: sigmoid.
    for (int e = lane; score == SIGMOID && e < E; e += 32) {
        p[e] = 1 / (1 + expf(-logits[e])) + 0 * logits[e]; // NaN of an infinite logit
    }
    if (score == SIGMOID) {
        __syncwarp();
        return;
    }

    // Softmax: the highest logit, then the sum of exp, then the shares.
    for (int e = lane; e < E; e += 32) {
        top = fmaxf(top, logits[e]);
    }
    top = warp_max(top);
    for (int e = lane; e < E; e += 32) {
        p[e] = expf(logits[e] - top);
        sum += p[e];
    }
    sum = warp_sum(sum);
    for (int e = lane; e < E; e += 32) {
        p[e] *= 1 / sum;
    }
    if (lane == 0) {
        *lse = top + logf(sum);
    }
    __syncwarp(); // other lanes will read these
}

// expert (K): those with the highest score(e), best first; of equal ones the lower index comes first. Scores become
// whole numbers in the same order (see Rank), so that NaN finds a place, too.
template <class Score> __device__ void topk_of_row(int *expert, Score score, int E, int K) {
    int lane = threadIdx.x % 32;
    Rank last = ~(Rank)0;
    for (int k = 0; k < K; k++) {
        // The best of those that come after the last one.
        Rank best = 0;
        for (int e = lane; e < E; e += 32) {
            Rank rank = rank_of(order_of(score(e)), e);
            best = rank < last && rank > best ? rank : best;
        }
        last = warp_best(best);
        if (lane == 0) {
            expert[k] = index_of(last);
        }
    }
    __syncwarp();
}

// weight (K): scale * p, or scale * p / (sum of the chosen p).
__device__ void weights_of_row(float *weight, const float *p, const int *expert, int K, int gate, float scale) {
    int lane = threadIdx.x % 32;
    float sum = 0;
    for (int k = lane; k < K; k += 32) {
        sum += expert[k] < 0 ? 0 : at_least_tiny(p[expert[k]]);
    }
    sum = warp_sum(sum);
    for (int k = lane; k < K; k += 32) {
        float w = expert[k] < 0 ? 0 : scale * at_least_tiny(p[expert[k]]);
        weight[k] = gate == RENORMALIZED && expert[k] >= 0 ? w / sum : w;
    }
    __syncwarp();
}

// dp (E) +=
__device__ void weights_back_row(float *dp, const float *dweight, const float *weight, const float *p,
                                 const int *expert, int K, int gate, float scale) {
    int lane = threadIdx.x % 32;
    float sum = 0, dot = 0;

    // Sums over the choices, for the quotient rule.
    for (int k = lane; k < K; k += 32) {
        sum += expert[k] < 0 ? 0 : at_least_tiny(p[expert[k]]);
        dot += dweight[k] * weight[k];
    }
    sum = warp_sum(sum);
    dot = warp_sum(dot);

    for (int k = lane; k < K; k += 32) { // a token chooses an expert once, so no two lanes add to the same number
        float d = scale * dweight[k];
        if (expert[k] >= 0 && !(p[expert[k]] < at_least_tiny(p[expert[k]]))) {
            dp[expert[k]] += gate == RENORMALIZED ? (d - dot) / sum : d;
        }
    }
    __syncwarp();
}

// dp (E) += the derivative of the balance losses by p, whose slopes are those of the token's group.
__device__ void balance_back_row(float *dp, const float *p, const double *slope, int E, int score, double scale) {
    int lane = threadIdx.x % 32;
    double dot = 0, sum = 1;

    // Sigmoid scores count divided by their sum: the quotient rule once more.
    if (score == SIGMOID) {
        sum = 0;
        for (int e = lane; e < E; e += 32) {
            dot += slope[e] * (double)at_least_tiny(p[e]);
            sum += (double)at_least_tiny(p[e]);
        }
        dot = warp_sum(dot);
        sum = warp_sum(sum);
    }
    for (int e = lane; e < E; e += 32) {
        dp[e] += p[e] < at_least_tiny(p[e]) ? 0 : (float)(scale * (slope[e] - dot / sum) / sum);
    }
    __syncwarp();
}

// dlogits (E) = , from dp (E), which may be the same array. z: weight of the z-loss, for one row.
__device__ void scores_back_row(float *dlogits, const float *dp, const float *p, float lse, int E, int score,
                                float z) {
    int lane = threadIdx.x % 32;
    float sum = 0;
    for (int e = lane; e < E; e += 32) {
        sum += dp[e] * p[e];
    }
    sum = warp_sum(sum);
    for (int e = lane; e < E; e += 32) {
        dlogits[e] = score == SOFTMAX ? p[e] * (dp[e] - sum + 2 * z * lse) : dp[e] * p[e] * (1 - p[e]);
    }
    __syncwarp();
}

// ---- the plan of a layer: counts, balance and sorting
//
// A chunk is BLOCK_ROWS tokens of a group, or what is left of it, and has a block of its own, which counts its
// choices. The block that finishes last has all chunks' counts, and does what needs the sum over all: for each
// expert, how many of its choices stand before each chunk; where each expert's rows begin; the balance losses. Then
// each chunk knows where its choices go, and all chunks place them at the same time. That is a counting sort, as in
// the C twin, and choices of the same expert stay in the order of their tokens. Sums are taken in the order of the
// chunks, whichever block is last.
//
// Blocks cannot wait for each other: there may be more of them than the device runs at a time. So each block writes
// its counts, makes them visible to the others, and then adds 1 to a counter. The block that makes it reach the
// number of blocks knows that all other counts are there.

// What other blocks wrote while this kernel ran may be in this multiprocessor's own cache in an older state: it is
// read from the cache that all share.
template <class T> __device__ T fresh(const T *p) {
#ifdef CUDACPU
    return *p;
#else
    return __ldcg(p);
#endif
}

// Whether this block is the last one of its grid that comes here; then it sees what the others wrote.
__device__ int is_last_block(unsigned *done) {
    __shared__ int last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(done, 1u) == gridDim.x - 1;
        if (last) {
            *done = 0; // for the next kernel
        }
    }
    __syncthreads();
    __threadfence();
    return last;
}

// Each chunk's choices are always counted. These bits say what the last block makes of the counts.
enum {
    STATISTICS = 1, // the log's numbers are counted
    COUNTS = 2,     // choices and scores of each group of tokens are summed, for the balance losses
    SLOPES = 4,     // the slopes of the lesson's balance loss
    LOSSES = 8,     // the balance losses' value
    PLAN = 16,      // where each expert's rows begin, and the list of their tiles
    DROPS = 32      // choices that were refused are counted
};

struct Routing { // what the kernels of a layer's router are told
    Route r;
    int score, gate, balance;
    float scale;
    const float *bias;  // (E); NULL: none
    const int *decided; // (N,K) choices that are taken over; NULL: none
    double aux_weight, z_weight;
    int whole_step;                     // --group step: counts are those of the step so far
    int group, chunks_of_group, chunks; // tokens of a group; chunks of one, and of all
    int todo;
    PlanScratch s;
    double *stats; // of the layer
    int2 *tile;    // (tiles)
    int tiles;
};

#include "dev/cuda/plan.cuh" // the kernels for it: count_kernel, balance_kernel, place_kernel

// ---- the lesson's router, forward

// The choice of token n, given its logits (E).
__device__ void choose_row(const Routing &q, const float *logits, int n) {
    const Route &r = q.r;
    int E = r.E, K = r.K, lane = threadIdx.x % 32;
    float *p = r.p + (size_t)n * E;
    int *expert = r.expert + (size_t)n * K;
    scores_of_row(p, r.lse + n, logits, E, q.score);

    // With a selection bias, p + bias decides.
    if (q.decided) {
        for (int k = lane; k < K; k += 32) {
            expert[k] = q.decided[(size_t)n * K + k];
        }
        __syncwarp();
    } else {
        topk_of_row(expert, [&](int e) { return p[e] + (q.bias ? q.bias[e] : 0); }, E, K);
    }
    weights_of_row(r.weight + (size_t)n * K, p, expert, K, q.gate, q.scale);

    // All choices are served, until some are declined or an expert is full.
    for (int k = lane; k < K; k += 32) {
        r.served[(size_t)n * K + k] = expert[k];
    }
    if (q.balance == UNBIASED) { // what the scores would choose without the bias
        topk_of_row(q.s.unbiased + (size_t)n * K, [&](int e) { return p[e]; }, E, K);
    }
}

// logits (R,E) = rows (R,C) router^T, all but the router in shared memory. A warp makes 4 x 4 logits at a time: so
// each number that it reads is used four times. Its lanes share the sum over C.
template <int R> __device__ void logits_of_rows(float *logits, const float *rows, const float *router, int E, int C) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int task = warp; task < R / 4 * div_up(E, 4); task += THREADS / 32) {
        int row = task % (R / 4) * 4, expert = task / (R / 4) * 4;
        float sum[4][4] = {}, x[4][4], w[4][4];

        // Each lane: its part of the sums over C.
        for (int c = 4 * lane; c < C; c += 128) {
            for (int i = 0; i < 4; i++) {
                load_pack(x[i], rows + (row + i) * C + c);
                load_pack(w[i], router + (size_t)min(expert + i, E - 1) * C + c);
            }
            for (int i = 0; i < 16; i++) {
                for (int v = 0; v < 4; v++) {
                    sum[i / 4][i % 4] += x[i / 4][v] * w[i % 4][v];
                }
            }
        }

        // Over the lanes.
        for (int i = 0; i < 16; i++) {
            float logit = warp_sum(sum[i / 4][i % 4]);
            if (lane == 0 && expert + i % 4 < E) {
                logits[(row + i / 4) * E + expert + i % 4] = logit;
            }
        }
    }
}

// From the residual stream to the plan: a block has a chunk of tokens, R of them at a time.
template <int R>
__global__ void __launch_bounds__(THREADS, 3)
    router_forward_kernel(NormOut to, Sum from, const float *w, const float *router, Routing q, int C, float eps) {
    extern __shared__ float4 dynamic[];
    float *rows = (float *)dynamic, *logits = rows + R * C; // (R,C), (R,E)
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, begin, end;
    find_chunk(q, blockIdx.x, &begin, &end);
    for (int first = begin; first < end; first += R) {
        // The norm of R rows, in shared memory. Rows past the end are zeros, so that the next step need not ask.
        for (int i = warp; i < R; i += THREADS / 32) {
            if (first + i < end) {
                norm_of_row(to, from, w, rows + i * C, first + i, C, eps);
            }
            for (int c = lane; c < C && first + i >= end; c += 32) {
                rows[i * C + c] = 0;
            }
        }
        __syncthreads();
        logits_of_rows<R>(logits, rows, router, q.r.E, C);
        __syncthreads();

        // Each warp chooses for some of the rows.
        for (int i = warp; i < R && first + i < end; i += THREADS / 32) {
            choose_row(q, logits + i * q.r.E, first + i);
        }
        __syncthreads();
    }

    // What the choices add up to.
    sums_of_chunk(q, blockIdx.x, begin, end);
    if (is_last_block(q.s.done)) {
        finish_chunks(q);
    }
}

// R: as many rows of C floats as make 64 KiB at most; the logits come on top. (A block may have 48 KiB for the
// asking; more must be asked for by cudaFuncSetAttribute, and 99 are the most on consumer chips.) With fewer rows at
// a time each block would read the router more often. R is a template's argument, since arrays in registers need a
// fixed size.
int rows_at_a_time(int C) {
    if (C <= 1024) {
        return 16;
    }
    return C <= 2048 ? 8 : 4;
}

// With more experts than these, cuBLAS makes the logits faster.
const int MOST_ROUTED = 64;

// Whether layer l's experts are chosen by the lesson's router, with nothing that changes its input, in sizes for
// which the kernels above are made. Parts that decline choices, add losses or limit capacity may be there;
// finish_route() runs them.
int has_fused_router(const Model *m, int l) {
    const Config *c = &m->config;
    return is_moe(c, l) && m->router == &topk_router && c->subtokens == 1 && c->experts <= MOST_ROUTED && c->norms &&
           c->dim <= 4096;
}

#include "dev/cuda/routers/part.cuh" // the parts of a router, and how they are called

double capacity_factor(const Model *m) {
    return m->batch.mode == TRAIN_MODE ? m->config.capacity_factor : m->config.eval_capacity_factor;
}

// What the kernels are told of layer l, whose route has its N, rows and group.
Routing routing_of(Model *m, int l, int todo) {
    const Config *c = &m->config;
    LayerActs *a = &m->layers[l];
    Routing q = {};
    q.r = m->acts.layer[l].route;
    q.score = c->score;
    q.gate = c->gate;
    q.balance = m->batch.mode != EVAL_MODE && q.r.slope ? c->balance : -1;
    q.scale = (float)c->scale;
    q.bias = m->params.layer[l].bias;
    q.aux_weight = c->aux_weight;
    q.z_weight = c->z_weight;
    q.whole_step = c->group == STEP && m->batch.mode == TRAIN_MODE;
    q.group = m->batch.mode == EVAL_MODE ? q.r.N : q.r.group; // without balance losses groups need not be told apart
    q.chunks_of_group = div_up(q.group, BLOCK_ROWS);
    q.chunks = q.r.N / max_int(q.group, 1) * q.chunks_of_group;
    q.s = m->plan;
    q.stats = layer_stats(m, l);
    q.tile = a->tile;
    q.tiles = ranks.ep > 1 ? 0 : a->tiles; // else tiles are made of what comes: see dispatched_forward
    q.todo = todo;
    return q;
}

void launch_count(const Routing &q) {
    count_kernel<<<q.chunks, THREADS, 0, stream>>>(q);
    CHECK(cudaGetLastError());
}

void launch_place(const Routing &q) {
    place_kernel<<<q.chunks, 32, q.r.E * sizeof(int), stream>>>(q);
    CHECK(cudaGetLastError());
}

#include "dev/cuda/routers/all.cuh" // the routers of single papers, and the table that kernels_of() looks at

// Sets what a route has of a batch: see moe_forward in the C twin.
void begin_route(Model *m, int l, int N, int T) {
    Route *r = &m->acts.layer[l].route;
    scratch_reset(m);
    r->N = N;
    r->rows = N * m->config.routers;
    r->group = m->config.group == SEQUENCE ? T : N;
    if (m->batch.mode != EVAL_MODE) {
        if (N > 0 && N / r->group > most_groups(m)) {
            fail("internal error: %d groups of tokens, but there is memory for %d", N / r->group, most_groups(m));
        }
        zero(layer_stats(m, l) + 4 * m->config.experts + AUX, sizeof(double));
    }
}

// From the choice to the sorted rows, in this order: some choices are declined; they are counted; the counts of all
// processes are summed; slopes; losses of single papers; the losses' value; capacity; what is served is counted; rows
// are placed. What is in `done` has been done by the kernel that chose.
void finish_route(Model *m, int l, const float *x, int done) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    const Decided *taken = m->decided ? &m->decided[l] : NULL;
    int train = m->batch.mode == TRAIN_MODE, losses = m->batch.mode != EVAL_MODE && !(done & LOSSES);
    size_t choices = (size_t)r->N * r->K;

    // Some routers decline choices by chance. (The fused kernel counts only where no part declines.)
    if (!(done & STATISTICS)) {
        run_parts(m, l, x, DECLINE);
    }

    // Count what was chosen, for the log and for the balance losses.
    int todo = (train ? STATISTICS : 0) | (losses ? COUNTS : 0);
    if (todo & ~done) {
        Routing q = routing_of(m, l, todo);
        if (q.balance == UNBIASED && !has_fused_router(m, l)) { // the fused kernel chooses them, too
            select_topk(q.s.unbiased, r->p, r->N, r->E, r->K);
        }
        launch_count(q);
    }

    // The balance losses.
    if (losses) {
        if (r->slope && is_spread(c)) {
            sum_over_ranks(r->count, r->E);
        }
        Routing q = routing_of(m, l, SLOPES);
        if (r->slope) {
            balance_kernel<<<1, THREADS, 0, stream>>>(q);
            CHECK(cudaGetLastError());
        }
        run_parts(m, l, x, LOSS); // these may add to the slopes, and the value needs all slopes
        q.todo = LOSSES;
        balance_kernel<<<1, THREADS, 0, stream>>>(q);
        CHECK(cudaGetLastError());
    }

    // Capacity: an expert that is full refuses later choices.
    double factor = capacity_factor(m);
    if (taken) { // tests
        take_over(r->expert, taken->expert, choices);
        take_over(r->served, taken->key, choices);
        if (c->overflow == NEXT) { // other experts have other weights
            weights_forward(r->weight, r->p, r->expert, r->N, r->E, r->K, c->gate, c->scale);
        }
    } else if (factor > 0 && !run_parts(m, l, x, CAPACITY)) {
        drop_overflow(m, l, factor);
    }

    // Sort the choices by expert.
    if (!(done & PLAN)) {
        launch_count(routing_of(m, l, PLAN | (train && (factor > 0 || taken) ? DROPS : 0)));
    }
    launch_place(routing_of(m, l, 0));
}

// The route of x (N,C), the router's input: everything up to the sorted rows. All routers that are not fused come
// here.
void route_forward(Model *m, int l, const float *x, int N, int T) {
    Route *r = &m->acts.layer[l].route;
    begin_route(m, l, N, T);
    if (N == 0) { // a process without tokens, at evaluation; others decide over all tokens
        if (is_spread(&m->config) && capacity_factor(m) > 0) {
            run_parts(m, l, x, CAPACITY);
        }
        return;
    }
    kernels_of(m->router)->forward(m, l, x);
    copy_ints(r->served, r->expert, (size_t)N * r->K, cudaMemcpyDeviceToDevice);
    finish_route(m, l, x, 0);
}

template <int R>
void start_router_forward(const NormOut &to, const Sum &from, const float *w, const float *router, const Routing &q,
                          int C, double eps) {
    size_t bytes = (size_t)R * (C + q.r.E) * sizeof(float);
    CHECK(cudaFuncSetAttribute(router_forward_kernel<R>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    router_forward_kernel<R><<<q.chunks, THREADS, bytes, stream>>>(to, from, w, router, q, C, (float)eps);
    CHECK(cudaGetLastError());
}

// The norm of what is added up, and the choice, in one kernel. What follows the choice is in it, too, as far as no
// part of a router and no other process must come in between; finish_route() does the rest.
void fused_router_forward(Model *m, int l, const NormOut &to, const Sum &from, int N, int T) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    int C = c->dim, train = m->batch.mode == TRAIN_MODE, losses = m->batch.mode != EVAL_MODE, todo = 0;
    begin_route(m, l, N, T);
    if (N == 0) {
        if (is_spread(c) && capacity_factor(m) > 0) {
            run_parts(m, l, NULL, CAPACITY);
        }
        return;
    }

    // What the kernel may do beyond the choice.
    if (!has_part(m, DECLINE)) {
        todo = (train ? STATISTICS : 0) | (losses ? COUNTS : 0);
        int alone = !has_part(m, LOSS) && !is_spread(c);
        todo |= losses && alone ? SLOPES | LOSSES : 0;
        todo |= (alone || !losses) && capacity_factor(m) <= 0 && !m->decided ? PLAN : 0;
    }

    Routing q = routing_of(m, l, todo);
    const Decided *taken = decided(m, l);
    if (taken) {
        q.decided = m->decided_expert;
        take_over(m->decided_expert, taken->expert, (size_t)N * q.r.K);
    }
    if (rows_at_a_time(C) == 16) {
        start_router_forward<16>(to, from, w->norm2, w->router, q, C, c->norm_eps);
    } else if (rows_at_a_time(C) == 8) {
        start_router_forward<8>(to, from, w->norm2, w->router, q, C, c->norm_eps);
    } else {
        start_router_forward<4>(to, from, w->norm2, w->router, q, C, c->norm_eps);
    }
    finish_route(m, l, NULL, todo);
}

// ---- the lesson's router, backward

struct RouterBack {
    // The gradients by the weights of choices. Each block of the experts' backward product saw TN columns of an
    // expert's activation only, and wrote a part of each sum: part (column_tiles, slots), in which number r of a row
    // is that of sorted row r. With part NULL they are summed up in dweight (N,K).
    const float *part;
    int column_tiles;
    size_t slots;
    const float *dweight;
    const double *slope; // (groups,E)
    double scale, z;     // what the batch's loss is multiplied by; the weight of the z-loss of one row, times scale
    const float *router; // (E,C)
    Sum others;          // the other gradients by the norm's output: of dense layers (x), and the experts' rows
    float *dlogits;      // (N,E)  is written, times the norm's rstd
};

// dlogits (E) of token n, in shared memory, from the gradients by its weights, and from the balance losses. By a
// warp.
__device__ void dlogits_of_row(const RouterBack &b, const Routing &q, float *dlogits, float *dweight, float rstd,
                               int n) {
    const Route &r = q.r;
    int E = r.E, K = r.K, lane = threadIdx.x % 32;
    const float *p = r.p + (size_t)n * E;
    size_t choices = (size_t)n * K;

    // The gradients by the token's weights.
    for (int k = lane; k < K; k += 32) {
        int row = r.row[choices + k];
        float sum = b.part ? 0 : b.dweight[choices + k];
        for (int t = 0; b.part && row >= 0 && t < b.column_tiles; t++) {
            sum += b.part[t * b.slots + row];
        }
        dweight[k] = sum;
    }

    // From there and from the balance losses to the scores, and on to the logits; dlogits holds dp at first.
    for (int e = lane; e < E; e += 32) {
        dlogits[e] = 0;
    }
    __syncwarp();
    weights_back_row(dlogits, dweight, r.weight + choices, p, r.expert + choices, K, q.gate, q.scale);
    balance_back_row(dlogits, p, b.slope + (size_t)(n / q.r.group) * E, E, q.score, b.scale / r.N);
    scores_back_row(dlogits, dlogits, p, q.score == SOFTMAX ? r.lse[n] : 0, E, q.score, (float)b.z);
    for (int e = lane; e < E; e += 32) {
        b.dlogits[(size_t)n * E + e] = dlogits[e] * rstd;
    }
}

// dh (R,C), in shared memory, is written: the gradient by the norm's output: of the experts' rows, of dense layers,
// and dlogits (R,E) router (E,C). A thread makes 4 columns of EACH rows, so that it reads the router once for all of
// them.
template <int R>
__device__ void dh_of_rows(const RouterBack &b, float *dh, const float *dlogits, int first, int count, int E, int C) {
    const int EACH = R < 8 ? R : 8;
    for (int task = threadIdx.x; task < C / 4 * (R / EACH); task += THREADS) {
        int c = task % (C / 4) * 4, row = task / (C / 4) * EACH;
        float d[EACH][4] = {}, w[4];

        // What comes from the experts and from dense layers.
#pragma unroll // so that d stays in registers
        for (int i = 0; i < EACH; i++) {
            if (row + i < count) {
                sum_of(d[i], b.others, first + row + i, c, C);
            }
        }

        // What comes through the router.
        for (int e = 0; e < E; e++) {
            load_pack(w, b.router + (size_t)e * C + c);
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                float factor = row + i < count ? dlogits[(row + i) * E + e] : 0;
                for (int v = 0; v < 4; v++) {
                    d[i][v] += factor * w[v];
                }
            }
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            store_pack(dh + (row + i) * C + c, d[i]);
        }
    }
}

template <int R>
__global__ void __launch_bounds__(THREADS) router_backward_kernel(NormBack norm, RouterBack b, Routing q, int C) {
    extern __shared__ float4 dynamic[];
    int E = q.r.E, K = q.r.K, N = q.r.N, warp = threadIdx.x / 32, begin = blockIdx.x * BLOCK_ROWS,
        end = min(N, begin + BLOCK_ROWS);
    float *dh = (float *)dynamic, *dlogits = dh + R * C, *dweight = dlogits + R * E; // (R,C), (R,E), (R,K)
    for (int first = begin; first < end; first += R) {
        int count = min(R, end - first);
        for (int i = warp; i < count; i += THREADS / 32) {
            dlogits_of_row(b, q, dlogits + i * E, dweight + i * K, norm.rstd[first + i], first + i);
        }
        __syncthreads();
        dh_of_rows<R>(b, dh, dlogits, first, count, E, C);
        norm_back(norm, dh, first, first + count, C, norm.partial + (size_t)blockIdx.x * C, first > begin);
    }
}

template <int R> void start_router_backward(const NormBack &norm, const RouterBack &b, const Routing &q, int C) {
    size_t bytes = (size_t)R * (C + q.r.E + q.r.K) * sizeof(float);
    CHECK(cudaFuncSetAttribute(router_backward_kernel<R>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    router_backward_kernel<R><<<blocks(q.r.N, BLOCK_ROWS), THREADS, bytes, stream>>>(norm, b, q, C);
    CHECK(cudaGetLastError());
}

// From the gradients by the experts' rows and by their weights to dx: through the router and the norm before it. The
// router's own gradient is dlogits^T h, with h = x * rstd * norm's weights. h is not kept in float32, but x is: so
// the kernel writes dlogits * rstd, the product takes x, and finish_gradients multiplies with the norm's weights.
void fused_router_backward(Model *m, int l, const NormBack &norm, RouterBack b) {
    const Config *c = &m->config;
    const LayerActs *a = &m->layers[l];
    Routing q = routing_of(m, l, 0);
    int N = q.r.N, E = q.r.E, C = c->dim;

    // The kernel: dlogits, and on through the norm.
    b.slope = q.r.slope;
    b.scale = m->batch.scale;
    b.z = c->z_weight * m->batch.scale / N;
    b.router = m->params.layer[l].router;
    b.dlogits = m->router_dlogits;
    if (rows_at_a_time(C) == 16) {
        start_router_backward<16>(norm, b, q, C);
    } else if (rows_at_a_time(C) == 8) {
        start_router_backward<8>(norm, b, q, C);
    } else {
        start_router_backward<4>(norm, b, q, C);
    }

    // The router's gradient, but for the factor of the norm's weights.
    if (wants_router(m, l)) {
        product(a->drouter, m->router_dlogits, 1, a->mid, 1, E, C, N, SET);
        router_pair_backward(m, l, a->drouter);
    }
}

// The balance losses of single papers that have derivatives by the weights: dweight (N,K) +=
void losses_backward(Model *m, int l, float *dx, float *dweight, const float *x) {
    for (int i = 0; m->parts[i]; i++) {
        const Kernels *k = kernels_of(m->parts[i]);
        if (m->parts[i]->place == LOSS && k->backward) {
            k->backward(m, l, dx, dweight, x);
        }
    }
}

// Adds to dx (N,C), the gradient by the router's input x, from dweight (N,K). All routers that are not fused come
// here.
void route_backward(Model *m, int l, float *dx, float *dweight, const float *x) {
    losses_backward(m, l, dx, dweight, x);
    kernels_of(m->router)->backward(m, l, dx, dweight, x);
}

// After a step: what changes without a gradient, and what the log says of the last steps; nothing where the
// gradients' norm is not finite.
__global__ void router_update_kernel(const double *norm, double *stats, float *bias, int E, double bias_rate) {
    int e = (int)thread_of_grid();
    if (e >= E || !isfinite(*norm)) {
        return;
    }
    double mean = stats[4 * E + ACTIVE] / E, count = stats[e], *recent = stats + 2 * E, *idle = stats + 3 * E;
    idle[e] = count > 0 ? 0 : idle[e] + 1;
    recent[e] += 0.02 * (count / fmax(mean, 1e-9) - recent[e]);
    if (bias) {
        bias[e] += (float)(bias_rate * ((mean > count) - (mean < count)));
    }
}

// ---- combining

// out (N,C) = the sum; out is float or floatX. A block has a token.
template <class Out> __global__ void combine_kernel(Out *out, Sum from, int C) {
    float a[4];
    for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x) {
        sum_of(a, from, blockIdx.x, c, C);
        store_pack(out + (size_t)blockIdx.x * C + c, a);
    }
}

template <class Out> void combine(Out *out, Sum from, int N, int C) {
    if (N > 0) {
        combine_kernel<Out><<<N, row_threads(C, 4), 0, stream>>>(out, from, C);
        CHECK(cudaGetLastError());
    }
}

// out (N,C) = from + branch + the rows of each token; what is NULL is left out.
template <class Out>
void combine(Out *out, const float *from, const floatX *branch, const floatX *rows, const int *row, int N, int K,
             int C) {
    combine(out, Sum{from, branch, rows, row, K}, N, C);
}

// ---- experts on several GPUs
//
// Each process has some of the experts, and its own tokens. In each layer the tokens go to where their experts are,
// and the answers come back: an all-to-all. A token goes to a process once, with the numbers and the weights of all
// experts that it has there, and one row comes back, already added up. On each side:
//
//   1. For each choice, which process has the expert? (destinations_kernel) Rows to send are sorted by process, in
//      the same way as choices are sorted by expert: the route `sending` of LayerExchange.
//   2. The counts go to the host, since NCCL wants to hear from there how many rows go where, and all tell each other
//      by MPI how many they send (exchange_counts). In a layer this is the only time that the host waits.
//   3. The rows are packed, and sent and received by ncclSend and ncclRecv (dispatch).
//   4. What came is sorted by expert; the experts work on it; the answers are added up for each row
//      (experts_on_rows).
//   5. The answers travel back, to m->rows. The kernel that takes the next norm adds them up by sending.row.
//
// With --overlap the tokens travel in two portions: the experts work on the first while the second is still on its
// way. NCCL works in a stream of its own, `network`. What is sent stands between depart(), after which the network
// waits for what the other stream has computed so far, and arrive(event), which says on the network that all is here.
// wait_for(event) makes the other stream wait for that; the host waits for none of them. The network works in order,
// so the event of the last portion stands for all. A Portion is kept from forward to backward, a Travel only while
// rows are on their way. (With one GPU none of this is used: a first reading may go on at the feed-forward layers.)

#include "dev/cuda/crossing.cuh" // what travels, its memory, and the small kernels that pack and unpack it

// Packs the rows of `from` (N,C) that go, in the order of their destinations: with K = 1 combine() copies row
// token[i] to i.
void pack_rows(Model *m, int l, const floatX *from, int C) {
    const LayerExchange *ex = &m->transit->layer[l];
    int rows = ex->portion[0].rows + (m->config.overlap ? ex->portion[1].rows : 0);
    combine(m->transit->out, NULL, NULL, from, ex->sending.token, rows, 1, C);
}

// Steps 1 to 3: sends each of the tokens x (N,C) to the processes that have its experts.
void dispatch(Model *m, int l, const floatX *x, int C) {
    Crossing *cross = m->transit;
    LayerExchange *ex = &cross->layer[l];
    const Route *r = &m->acts.layer[l].route;
    Route *sending = &ex->sending;
    int K = r->K, portions = portions_of(&m->config), places = sending->E; // places: ep for each portion
    size_t choices = (size_t)r->N * K;
    sending->N = r->N;

    // 1. Where do the choices go? A place is a process in one portion. expert: each choice's place; served: the same,
    //    but -1 where an earlier choice of the token goes there, too. So the first count is of choices, and the
    //    second one of rows. cross->counts: where each place's rows begin (places+1), and how many choices go there
    //    (places).
    memset(cross->counts, 0, (size_t)(2 * places + 1) * sizeof(int));
    if (r->N > 0) {
        destinations_kernel<<<blocks(choices), THREADS, 0, stream>>>(sending->expert, sending->served, r->served,
                                                                     where_is(m, l), r->N, K, ranks.ep, portions);
        CHECK(cudaGetLastError());
        Route all = *sending; // several choices of a token may go to a place, but its row goes there once
        all.served = sending->expert;
        launch_count(sorting_of(m, all, NULL, 0, 0));
        copy_ints(cross->counts + places + 1, m->plan.total, places, cudaMemcpyDeviceToHost);
        Routing q = sorting_of(m, *sending, NULL, 0, PLAN);
        launch_count(q);
        launch_place(q);
        copy_ints(cross->counts, sending->offset, places + 1,
                  cudaMemcpyDeviceToHost); // waited for in exchange_counts
    }

    // 2. How many rows go, and how many come?
    exchange_counts(m, l);
    lay_travel(m, l, C);

    // 3. Rows and choices set out.
    size_t rows = (size_t)cross->counts[places];
    if (rows > 0) {
        pack_choices_kernel<<<blocks(rows * K), THREADS, 0, stream>>>(
            cross->choices_out, *sending, sending->expert, r->served, r->weight, where_is(m, l), rows * K, ranks.ep);
        CHECK(cudaGetLastError());
        pack_rows(m, l, x, C);
    }
    for (int i = 0; i < portions; i++) {
        Portion *p = &ex->portion[i];
        Travel *t = &cross->travel[i];
        lay_portion(m, p, K, C);
        depart();
        send_rows(cross->choices_out, p->sent, p->sent_at, t->choices, p->got, p->got_at, 2 * K * sizeof(float));
        send_rows(cross->out, p->sent, p->sent_at, p->x, p->got, p->got_at, C * sizeof(floatX));
        arrive(t->arrived);
    }
}

// Steps 4 and 5: the experts' work on each portion as it comes, and their answers' way back to m->rows.
void dispatched_forward(Model *m, int l, int C) {
    const LayerParams *w = &m->params.layer[l];
    Crossing *x = m->transit;
    int K = m->acts.layer[l].route.K, portions = portions_of(&m->config);
    for (int i = 0; i < portions; i++) {
        Portion *p = &x->layer[l].portion[i];
        Travel *t = &x->travel[i];
        const Route *r = &p->route;
        size_t choices = (size_t)p->came * K;

        // 4. Sort what came by expert, let the experts work, and add up their answers for each row.
        wait_for(t->arrived);
        if (p->came > 0) {
            unpack_choices_kernel<<<blocks(choices), THREADS, 0, stream>>>(r->weight, r->served, t->choices, choices,
                                                                           K);
            CHECK(cudaGetLastError());
            Routing q = sorting_of(m, *r, p->tile, p->tiles, PLAN);
            launch_count(q);
            launch_place(q);
            Experts here = experts_here(m, l, p);
            experts_forward(x->rows, p->hidden, x->act, p->x, low_of(m, w->w_in), low_of(m, w->w_out), r->weight,
                            &here);
            combine(t->answers, NULL, NULL, x->rows, r->row, p->came, K, C);
        }

        // 5. The answers go back.
        depart();
        send_rows(t->answers, p->got, p->got_at, m->rows, p->sent, p->sent_at, C * sizeof(floatX));
        arrive(t->arrived);
    }
    wait_for(x->travel[portions - 1].arrived);
}

// Backward, first: the gradients by the answers, dout (N,C), go where the tokens went.
void dispatch_back(Model *m, int l, const floatX *dout, int C) {
    lay_travel(m, l, C);
    pack_rows(m, l, dout, C);
    for (int i = 0; i < portions_of(&m->config); i++) {
        const Portion *p = &m->transit->layer[l].portion[i];
        Travel *t = &m->transit->travel[i];
        depart();
        send_rows(m->transit->out, p->sent, p->sent_at, t->in, p->got, p->got_at, C * sizeof(floatX));
        arrive(t->arrived);
    }
}

// And then: the gradients by the experts' weights, by the tokens' rows (m->rows), and m->dweight (N,K).
void dispatched_backward(Model *m, int l, int C) {
    const LayerParams *w = &m->params.layer[l], *dw = &m->grads.layer[l];
    Crossing *x = m->transit;
    const Route *sending = &x->layer[l].sending;
    int K = sending->K, portions = portions_of(&m->config);
    for (int i = 0; i < portions; i++) {
        Portion *p = &x->layer[l].portion[i];
        Travel *t = &x->travel[i];
        const Route *r = &p->route;
        wait_for(t->arrived);
        if (p->came > 0) {
            Experts here = experts_here(m, l, p);
            experts_backward(x->rows, dw->w_in, dw->w_out, t->in, p->x, p->hidden, r->weight, low_of(m, w->w_in),
                             low_of(m, w->w_out), x->act, x->dhidden, x->dweight_part, p->slots, &here);
            zero(t->dweight, (size_t)p->came * K * sizeof(float));
            sum_dweight(t->dweight, x->dweight_part, r->choice, r->offset + r->E, p->slots, div_up(here.widest, TN));
            combine(t->answers, NULL, NULL, x->rows, r->row, p->came, K, C);
        }
        depart();
        send_rows(t->answers, p->got, p->got_at, m->rows, p->sent, p->sent_at, C * sizeof(floatX));
        send_rows(t->dweight, p->got, p->got_at, x->dweight_back, p->sent, p->sent_at, K * sizeof(float));
        arrive(t->arrived);
    }
    wait_for(x->travel[portions - 1].arrived);
    size_t choices = (size_t)sending->N * K;
    return_dweight_kernel<<<blocks(choices), THREADS, 0, stream>>>(m->dweight, x->dweight_back, sending->row, choices,
                                                                   K);
    CHECK(cudaGetLastError());
}

// ---- feed-forward layers that every token passes: dense ones, and shared experts

#include "dev/cuda/shared_expert.cuh" // --shared-gate: each token decides how much it takes of the shared experts' answer

// Writes m->branch (N,C).
void dense_forward(Model *m, int l) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    LayerActs *a = &m->layers[l];
    int N = m->batch.B * m->batch.T, F = dense_width(c, l), kind = dense_activation(c, l);
    if (!w->dense_in || N == 0) {
        return;
    }
    matmul(a->dense_hidden, a->h2, low_of(m, w->dense_in), N, c->dim, F * (1 + is_gated(kind)), SET);
    activation_forward(m->act, a->dense_hidden, N, F, kind);
    shared_gate_forward(m, l, N, F);
    matmul(m->branch, m->act, low_of(m, w->dense_out), N, F, c->dim, SET);
}

// Writes m->dh (N,C), the gradient by a->h2, from m->dfed.
void dense_backward(Model *m, int l) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l], *dw = &m->grads.layer[l];
    const LayerActs *a = &m->layers[l];
    int N = m->batch.B * m->batch.T, F = dense_width(c, l), kind = dense_activation(c, l),
        H = F * (1 + is_gated(kind));
    if (!w->dense_in) {
        return;
    }
    matmul_dx(m->act, m->dfed, low_of(m, w->dense_out), N, F, c->dim, SET);
    shared_activation_backward(m, l, N, F, kind); // activation_backward(), with --shared-gate times a gate of each token
    matmul_dw(dw->dense_out, m->dfed, m->act, N, F, c->dim); // act is f(hidden) again by now
    matmul_dw(dw->dense_in, m->dhidden, a->h2, N, c->dim, H);
    matmul_dx(m->dh, m->dhidden, low_of(m, w->dense_in), N, c->dim, H, SET);
    shared_gate_backward(m, l, N);
}

// ---- the layer
//
// Where has_fused_router() says so, the C twin's moe_forward is fused_router_forward(), together with the norm, and
// then experts_answer(). Elsewhere, also for the lesson's router with more than MOST_ROUTED experts, it is
// moe_forward() below.

// What the experts' products are told of a layer (experts.cuh). A tile is TM rows of one expert; a block multiplies a
// tile by TN rows of that expert's matrix. The host does not know how many tiles there are: N*K/TM + E at most. It
// starts as many blocks as that takes, and a block whose tile does not exist (expert -1 in the list) returns at once.
Experts experts_of(const Model *m, int l) {
    const Route *r = &m->acts.layer[l].route;
    Experts x = m->experts;
    x.offset = r->offset;
    x.token = r->token;
    x.choice = r->choice;
    x.tile = m->layers[l].tile;
    x.tiles = m->layers[l].tiles;
    x.plan = plan_of_layer(&m->config, r->offset); // --offload: here the host waits
    return x;
}

// The experts' answers to x (N,C), which have a route: m->rows. A dense part works while rows are on their way.
void experts_answer(Model *m, int l, const floatX *x) {
    const LayerParams *w = &m->params.layer[l];
    LayerActs *a = &m->layers[l];
    const Route *r = &m->acts.layer[l].route;
    if (ranks.ep > 1) {
        dispatch(m, l, x, m->experts.C);
        dense_forward(m, l);
        dispatched_forward(m, l, m->experts.C);
        return;
    }
    dense_forward(m, l);
    if (r->N == 0) { // a process without tokens, at evaluation
        return;
    }
    Experts experts = experts_of(m, l);
    experts_forward(m->rows, a->hidden, m->act, x, low_of(m, w->w_in), low_of(m, w->w_out), r->weight, &experts);
}

// Their way back, given dout (N,C): the gradients by their weights, by the rows of x (m->rows), and by the weights of
// the choices: in m->dweight_part (see sum_dweight), or with several processes in m->dweight.
void experts_answer_back(Model *m, int l, const floatX *dout, const floatX *x) {
    const LayerParams *w = &m->params.layer[l], *dw = &m->grads.layer[l];
    const Route *r = &m->acts.layer[l].route;
    if (ranks.ep > 1) {
        dispatch_back(m, l, dout, m->experts.C);
        dense_backward(m, l);
        dispatched_backward(m, l, m->experts.C);
        return;
    }
    dense_backward(m, l);
    Experts experts = experts_of(m, l);
    experts_backward(m->rows, dw->w_in, dw->w_out, dout, x, m->layers[l].hidden, r->weight, low_of(m, w->w_in),
                     low_of(m, w->w_out), m->act, m->dhidden, m->dweight_part, (size_t)r->N * r->K, &experts);
}

// By which each token finds its rows in m->rows.
const int *rows_of_tokens(const Model *m, int l) {
    return ranks.ep > 1 ? m->transit->layer[l].sending.row : m->acts.layer[l].route.row;
}

// Sums up the parts in m->dweight (N,K), for routers that are not fused, and for losses that add to it.
void gather_dweight(Model *m, int l) {
    const Route *r = &m->acts.layer[l].route;
    if (ranks.ep == 1) {
        zero(m->dweight, (size_t)r->N * r->K * sizeof(float)); // a choice that was refused has no answer
        sum_dweight(m->dweight, m->dweight_part, r->choice, r->offset + r->E, (size_t)r->N * r->K,
                    div_up(m->experts.widest, TN));
    }
}

// The mixture of x (N,C), which is x32 before it was rounded: m->rows.
void moe_forward(Model *m, int l, const floatX *x, const float *x32, int N, int T) {
    route_forward(m, l, x32, N, T);
    experts_answer(m, l, x);
}

// Given dout (N,C): dx (N,C) = the gradient by x, with that of dense layers (m->dh) where dx is m->dh.
void moe_backward(Model *m, int l, float *dx, const floatX *dout, const floatX *x, const float *x32) {
    const Route *r = &m->acts.layer[l].route;
    int C = m->experts.C, added = m->params.layer[l].dense_in && dx == m->dh;
    experts_answer_back(m, l, dout, x);
    gather_dweight(m, l);
    combine(dx, added ? dx : NULL, NULL, m->rows, rows_of_tokens(m, l), r->N, r->K, C);
    route_backward(m, l, dx, m->dweight, x32);
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. Memory and first weights

#include "dev/cuda/mixers/all.cuh"  // what may stand in attention's place: an LSTM, experts
#include "dev/cuda/activations.cuh" // the arrays of LayerActs, Route and Model, cut from one piece of memory

// A model for N tokens. It is laid out twice, the first time to see how much memory it takes, since the driver gives
// memory in pieces of 2 MiB and one allocation wastes least. parent: the model whose weights it shares (generation);
// NULL: none.
Model *new_model(const Config *config, int N, int train, const Model *parent, int dry) {
    Model *m = (Model *)allocate(1, sizeof(Model));
    m->config = *config;
    m->max_tokens = N;
    m->dry = dry;
    m->arena = (char *)256; // while dry: any address that is not NULL; nothing is read or written there
    if (!dry) {
        Model *measured = new_model(config, N, train, parent, 1);
        size_t bytes = measured->arena_used;
        gpu::model_free(measured);
        CHECK(cudaMalloc((void **)&m->arena, bytes));
    }
    allocate_all(m, N, train, parent);
    return m;
}

#include "dev/cuda/device.cuh" // the device's start; what it cannot do, and what does not fit into its memory

// The router that has no kernels yet, of those that the options ask for; NULL: all have. Such a router trains on the
// CPU.
const ::Router *router_without_kernels(const Config *c) {
    for (const ::Router *r : all_routers) {
        if (moe_layers(c) > 0 && router_is_used(r, c) && !kernels_of(r)) {
            return r;
        }
    }
    return NULL;
}

// Is there a mixer, of those that the options ask for, that has no kernels yet? It trains on the CPU, too.
int mixer_without_kernels(const Config *c) {
    return mixer_of(c) && !mixer_kernels(c);
}

// Remakes the rounded copies of weights from .. end.
void round_weights(Model *m, size_t from, size_t end) {
    if ((void *)m->low != (void *)m->memory[WEIGHTS]) {
        to_low(m->low + from, m->memory[WEIGHTS] + from, end - from);
    }
    merge_pairs(m, from, end);
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. The whole model, forward and backward
//
// As in the C twin, but what a layer adds to the residual stream is added by the kernel of the next norm:
// feed_forward returns a Sum, and the next layer's first norm takes it.

#include "dev/cuda/ngrams.cuh"   // --ngrams: so has each pair of words, and triple, before layer 0 and in each layer
#include "dev/cuda/residual.cuh" // norm_forward(): rmsnorm unless --norms 0; what --dropout and --moe-sigmoid do before a sum

// m->branch (N,C) = attention to a->h1.
void attention_layer_forward(Model *m, int l) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    LayerActs *a = &m->layers[l];
    int B = m->batch.B, T = m->batch.T, N = B * T, C = c->dim;
    int H = c->heads, KV = c->kv_heads, D = head_width(c), Q = (H + 2 * KV) * D;

    matmul(a->qkv, a->h1, low_of(m, w->qkv), N, C, Q, SET);
    gpu::qkv_bias_forward(m, l, a->qkv);
    gpu::qk_norm_forward(m, l, a->qkv);
    gpu::value_embedding_forward(m, l, a->qkv);

    // In generation there is one token, and its keys and values go to the cache.
    if (m->cache) {
        floatX *cache = (floatX *)layer_cache(m, l);
        attention_of_one(a->att, cache, a->qkv, m->angles, m->position, c->seq, H, KV, D);
    } else {
        attention_forward(a->att, a->lse, a->qkv, m->angles, B, T, H, KV, D);
    }
    matmul(m->branch, a->att, low_of(m, w->proj), N, H * D, C, SET);
}

// The first half of layer l, up to the output of attention, or of what stands in its place, which is left in m->branch:
// from `before`, what the layers below add up to, which becomes a->x. In layer 0, and with --recompute, it is a->x
// itself, and is not written.
void mix_forward(Model *m, int l, Sum before) {
    const Config *c = &m->config;
    LayerActs *a = &m->layers[l];
    int N = m->batch.B * m->batch.T;

    // The sum and the first norm in one kernel.
    NormOut to = {before.x == a->x ? NULL : a->x, a->h1, NULL, a->rstd1};
    norm_forward(to, before, m->params.layer[l].norm1, N, c->dim, c->norm_eps);
    if (!mixer_forward(m, l, m->branch, a->h1)) {
        attention_layer_forward(m, l);
    }
    end_mixing(m, l);
    m->at_hand = l;
}

// The second norm, and for the lesson's router the route, from a->x and m->branch: a->mid, a->h2.
void second_norm(Model *m, int l, int route) {
    const Config *c = &m->config;
    LayerActs *a = &m->layers[l];
    int B = m->batch.B, T = m->batch.T, wants_norm32 = is_moe(c, l) && c->subtokens == 1 && !has_fused_router(m, l);
    Sum sum = {a->x, m->branch, NULL, NULL, 0};
    NormOut to = {a->mid, a->h2, wants_norm32 && route ? m->router_in : NULL, a->rstd2};
    if (route && has_fused_router(m, l)) {
        fused_router_forward(m, l, to, sum, B * T, T);
    } else {
        norm_forward(to, sum, m->params.layer[l].norm2, B * T, c->dim, c->norm_eps);
    }
}

// The second half: the second norm and the feed-forward layers. Returns what the layer adds up to.
Sum feed_forward(Model *m, int l) {
    const Config *c = &m->config;
    LayerActs *a = &m->layers[l];
    int N = m->batch.B * m->batch.T;
    if (!feeds(c, l)) {
        return {a->x, m->branch, NULL, NULL, 0};
    }
    second_norm(m, l, 1);
    Sum sum = {a->mid, m->params.layer[l].dense_in ? m->branch : NULL, NULL, NULL, 0};
    if (!is_moe(c, l)) {
        dense_forward(m, l);
    } else if (c->subtokens > 1) {
        subtokens_forward(m, l);
        sum.branch = m->branch;
    } else {
        if (has_fused_router(m, l)) {
            experts_answer(m, l, a->h2);
        } else {
            gpu::moe_forward(m, l, a->h2, m->router_in, N, m->batch.T);
        }
        sum.rows = m->rows;
        sum.row = rows_of_tokens(m, l);
        sum.K = m->acts.layer[l].route.K;
    }
    return end_feeding(m, l, sum);
}

// Its way back, with that of the second norm: m->dx (N,C) comes in as the gradient by the layer's output, m->dx_low
// as the same, rounded; both leave as the gradient by a->mid.
void feed_backward(Model *m, int l) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    LayerActs *a = &m->layers[l];
    int N = m->batch.B * m->batch.T, C = c->dim, K = m->acts.layer[l].route.K;
    NormBack norm = {m->dx, m->dx_low, a->partial[1], a->mid, a->rstd2, w->norm2};
    scratch_reset(m);
    if (!feeds(c, l)) {
        return;
    }
    m->dfed = branch_gradient(m, l, FEEDING);
    if (has_fused_router(m, l)) {
        experts_answer_back(m, l, m->dfed, a->h2);

        // With losses that have a part in the weights' gradients, and with several processes, these are summed
        // before.
        RouterBack b = {};
        b.dweight = m->dweight;
        if (ranks.ep == 1 && !has_part(m, LOSS)) {
            b.part = m->dweight_part;
            b.column_tiles = div_up(m->experts.widest, TN);
            b.slots = (size_t)N * K;
        } else {
            gather_dweight(m, l);
            losses_backward(m, l, NULL, m->dweight, NULL);
        }
        b.others = {w->dense_in ? m->dh : NULL, NULL, m->rows, rows_of_tokens(m, l), K};
        fused_router_backward(m, l, norm, b);
        return;
    }

    // Without the fused kernel: m->dh is made step by step, and the norm's way back is a kernel of its own.
    if (!is_moe(c, l)) {
        dense_backward(m, l);
    } else if (c->subtokens > 1) {
        subtokens_backward(m, l, m->dh, m->dfed);
    } else {
        // The router reads the norm in float32. All layers share that array, so it is made once more.
        norm_forward({NULL, NULL, m->router_in, a->rstd2}, {a->mid}, w->norm2, N, C, c->norm_eps);
        moe_backward(m, l, m->dh, m->dfed, a->h2, m->router_in);
    }
    norm_backward(norm, m->dh, N, C);
}

// m->dh (N,C) = the gradient by a->h1, from dout (N,C), that by attention's output.
void attention_layer_backward(Model *m, int l, const floatX *dout) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l], *dw = &m->grads.layer[l];
    LayerActs *a = &m->layers[l];
    int B = m->batch.B, T = m->batch.T, N = B * T, C = c->dim;
    int H = c->heads, KV = c->kv_heads, D = head_width(c), Q = (H + 2 * KV) * D;

    // proj, attention (which turns dq and dk back), qkv
    matmul_dx(m->datt, dout, low_of(m, w->proj), N, H * D, C, SET);
    matmul_dw(dw->proj, dout, a->att, N, H * D, C);
    attention_backward(m->dqkv, m->datt, a->att, a->lse, a->qkv, m->angles, B, T, H, KV, D, m->delta);
    gpu::value_embedding_backward(m, l, m->dqkv);
    gpu::qk_norm_backward(m, l, m->dqkv);
    gpu::qkv_bias_backward(m, l, m->dqkv);
    matmul_dx(m->dh, m->dqkv, low_of(m, w->qkv), N, C, Q, SET);
    matmul_dw(dw->qkv, m->dqkv, a->h1, N, C, Q);
}

// From the gradient by a->mid to that by a->x, in m->dx and m->dx_low.
void mix_backward(Model *m, int l) {
    LayerActs *a = &m->layers[l];
    const floatX *dout = gpu::branch_gradient(m, l, MIXING);
    if (!mixer_backward(m, l, m->dh, dout, a->h1)) {
        attention_layer_backward(m, l, dout);
    }
    NormBack norm = {m->dx, m->dx_low, a->partial[0], a->x, a->rstd1, m->params.layer[l].norm1};
    norm_backward(norm, m->dh, m->batch.B * m->batch.T, m->config.dim);
}

// With --recompute: the activations of layer l once more, from a->x and from the route as it was.
void recompute_layer(Model *m, int l) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    LayerActs *a = &m->layers[l];
    int N = m->batch.B * m->batch.T;
    m->again = 1; // a mixer's own choices, too, stay as they were
    mix_forward(m, l, {a->x, NULL, NULL, NULL, 0});
    m->again = 0;
    if (feeds(c, l)) {
        second_norm(m, l, 0);
    }
    if (w->dense_in) {
        int hidden = dense_width(c, l) * (1 + is_gated(dense_activation(c, l)));
        matmul(a->dense_hidden, a->h2, low_of(m, w->dense_in), N, c->dim, hidden, SET);
    }
    if (is_moe(c, l) && ranks.ep == 1) { // several processes keep what came and their experts' products
        Experts experts = experts_of(m, l);
        experts_hidden(a->hidden, m->act, c->subtokens > 1 ? subtokens_of(m, l) : a->h2, low_of(m, w->w_in),
                       &experts);
    }
}

// All layers, from m->tokens to m->h.
void layers_forward(Model *m) {
    const Config *c = &m->config;
    int N = m->batch.B * m->batch.T;
    NgramRows more = {m->params.ngrams, m->pairs, ngram_orders(c), c->ngram_gate ? m->lookup->sum : NULL};
    embedding_forward(m->layers[0].x, m->params.embed, m->tokens, N, c->dim, more);
    gpu::drop_embedding(m, m->layers[0].x);
    Sum sum = {m->layers[0].x, NULL, NULL, NULL, 0};
    for (int l = 0; l < c->layers; l++) {
        keep_pace(); // several GPUs: the host does not run far ahead, since the device's queue is limited (nccl.cuh)
        if (N > 0) { // without tokens of its own, a process's experts have those of others
            mix_forward(m, l, sum);
        }
        sum = gpu::ngram_gate_forward(m, l, feed_forward(m, l)); // --ngram-gate
    }
    norm_forward({m->x, m->h, NULL, m->rstd}, sum, m->params.norm, N, c->dim, c->norm_eps);
}

// report: TOTAL_AUX += scale * the sum of the layers' balance losses, of which number `aux` and the next one are a layer's.
__global__ void add_aux_kernel(double *report, int L, int stats, int aux, double scale) {
    double sum = 0;
    for (int l = 0; l < L; l++) {
        const double *losses = report + SINGLE_REPORTS + l * stats + aux;
        sum += losses[0] + losses[1];
    }
    report[TOTAL_AUX] += scale * sum;
}

#include "dev/cuda/host.cuh" // what goes to the device and comes back: batches, losses, statistics, routes, tensors
#include "dev/cuda/teacher.cuh" // --teacher: its part of the loss

// Queues a pass over a batch. The losses stay on the device until model_losses() asks for them.
void model_forward(::Model *base, const Batch *batch) {
    Model *m = (Model *)base;
    const Config *c = &m->config;
    int N = batch->B * batch->T;
    m->batch = *batch;
    ranks_begin_batch(m);
    send_batch(m, batch->inputs, batch->targets, N);

    // A step begins.
    if (batch->first) {
        zero(m->report, 2 * sizeof(double)); // TOTAL_LOSS and TOTAL_AUX
    }
    if (batch->mode == TRAIN_MODE && batch->first) {
        gpu::clear_statistics(m);
    }

    // From tokens to the loss, and for the gradients at once to m->dh.
    layers_forward(m);
    if (N > 0) {
        if (!taught_loss(m, N, batch->scale / N)) {
            head_loss(m, N, batch->scale / N);
        }
        add_mean(m->report + TOTAL_LOSS, m->nll, N, batch->scale);
    }

    // The layers' balance losses.
    if ((moe_layers(c) > 0 || mixer_of(c)) && batch->mode != EVAL_MODE) {
        add_aux_kernel<<<1, 1, 0, stream>>>(m->report, c->layers, stats_size(c), 4 * c->experts + AUX, batch->scale);
        CHECK(cudaGetLastError());
    }
}

// ---- the last sums for the gradients of norms and routers

struct Gradient {
    float *to;                  // (C)  += factor * the sum of the rows of `from` (rows,C)
    const float *from, *factor; // factor (C), NULL: 1
    int rows;                   // 0: as many as there are blocks of BLOCK_ROWS tokens
};

__global__ void finish_gradients_kernel(const Gradient *list, int rows, int C) {
    Gradient g = list[blockIdx.x];
    add_rows(g.to, g.from, C, NULL, g.factor, 0, g.rows ? g.rows : rows, blockIdx.y, C);
}

// What is left to sum up: of each layer, from the last to the first, its norms and the router's rows; before all, the
// last norm. Backward starts one kernel for all; but in the last batch of a step of several processes one for
// each layer, whose gradients can then be sent.
void finish_gradients(Model *m, int first, int count) {
    int C = m->config.dim, N = m->batch.B * m->batch.T;
    if (count > 0 && N > 0) {
        finish_gradients_kernel<<<dim3(count, div_up(C, 128)), 32 * SUM_WARPS, 0, stream>>>(m->gradients + first,
                                                                                            div_up(N, BLOCK_ROWS), C);
        CHECK(cudaGetLastError());
    }
}

int norms_of_layer(const Model *m, int l) {
    const LayerParams *w = &m->params.layer[l];
    return (w->norm1 != NULL) + (w->norm2 != NULL);
}

int gradients_of_layer(const Model *m, int l) {
    return norms_of_layer(m, l) + (has_fused_router(m, l) ? m->config.experts : 0);
}

void list_gradients(Model *m) {
    const Config *c = &m->config;
    int most = 1, count = 0, C = c->dim;
    for (int l = 0; l < c->layers; l++) {
        most += gradients_of_layer(m, l);
    }
    Gradient *list = (Gradient *)allocate(most, sizeof(Gradient));
    if (m->grads.norm && !c->lora) {
        list[count++] = {m->grads.norm, m->last_partial, NULL, 0};
    }
    for (int l = c->layers - 1; l >= 0 && !c->lora; l--) { // else all of them are frozen
        const LayerActs *a = &m->layers[l];
        const LayerParams *dw = &m->grads.layer[l];
        if (dw->norm1) {
            list[count++] = {dw->norm1, a->partial[0], NULL, 0};
        }
        if (dw->norm2) {
            list[count++] = {dw->norm2, a->partial[1], NULL, 0};
        }
        for (int e = 0; e < gradients_of_layer(m, l) - norms_of_layer(m, l); e++) {
            list[count++] = {dw->router + (size_t)e * C, a->drouter + (size_t)e * C, m->params.layer[l].norm2, 1};
        }
    }
    m->gradients = (Gradient *)own(m, most, sizeof(Gradient));
    m->gradient_count = count;
    upload(m, m->gradients, list, (size_t)count * sizeof(Gradient));
    free(list);
}

void layer_done(Model *m, int l); // dev/cuda/ranks.cuh

// Adds the other gradients of the last batch: of scale * (loss + balance losses).
void model_backward(::Model *base) {
    Model *m = (Model *)base;
    const Config *c = &m->config;
    int N = m->batch.B * m->batch.T, C = c->dim, apart = MANY && m->batch.last;
    int of_last = m->grads.norm != NULL, done = of_last; // sums of the last norm, and of what has been finished

    // The last norm, then the layers from the last to the first.
    zero(m->dx, (size_t)N * C * sizeof(float));
    norm_backward({m->dx, m->dx_low, m->last_partial, m->x, m->rstd, m->params.norm}, m->dh, N, C);
    for (int l = c->layers - 1; l >= 0; l--) {
        keep_pace();
        if (c->recompute && l != m->at_hand) {
            recompute_layer(m, l);
        }
        gpu::ngram_gate_backward(m, l);
        feed_backward(m, l);
        ngram_gate_stream_backward(m, l);
        mix_backward(m, l);
        if (apart) {
            finish_gradients(m, done, gradients_of_layer(m, l));
            done += gradients_of_layer(m, l);
            layer_done(m, l); // this layer's gradients can be summed over processes
        }
    }

    // The embedding, and what is left to sum up.
    const int *order = m->tokens + 2 * m->max_tokens;
    gpu::drop_embedding(m, m->dx);
    embedding_backward(m->grads.embed, m->dx, order, order + m->max_tokens, order + 2 * m->max_tokens, m->word_count,
                       C);
    gpu::ngrams_backward(m, m->dx);
    finish_gradients(m, 0, apart ? of_last : m->gradient_count);
    layer_done(m, -1);
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. The optimizer

// part[block] = the sum of the squares of a part of g (size). Tensors begin and end at multiples of 16 bytes.
__global__ void sum_squares_kernel(double *part, const float *g, size_t size) {
    double sum = 0;
    float a[4];
    for (size_t i = 4 * thread_of_grid(); i < size; i += (size_t)4 * gridDim.x * THREADS) {
        load_pack(a, g + i);
        for (int j = 0; j < 4; j++) {
            sum += (double)a[j] * (double)a[j];
        }
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        part[blockIdx.x] = sum;
    }
}

__global__ void root_of_sum_kernel(double *norm, const double *part, int parts) {
    double sum = block_sum((int)threadIdx.x < parts ? part[threadIdx.x] : 0);
    if (threadIdx.x == 0) {
        *norm = sqrt(sum);
    }
}

// part (NORM_PARTS) = sums of squares of g (size); returns how many.
int sum_of_squares(double *part, const float *g, size_t size) {
    int parts = (int)(size < (size_t)NORM_PARTS * 4 * THREADS ? blocks(size + 1, 4 * THREADS) : NORM_PARTS);
    sum_squares_kernel<<<parts, THREADS, 0, stream>>>(part, g, size);
    CHECK(cudaGetLastError());
    return parts;
}

// *norm = the norm of all gradients g (size) together. part (NORM_PARTS) is scratch.
void gradient_norm(double *norm, const float *g, size_t size, double *part) {
    int parts = gpu::sum_of_squares(part, g, size);
    root_of_sum_kernel<<<1, NORM_PARTS, 0, stream>>>(norm, part, parts);
    CHECK(cudaGetLastError());
}

struct Adam { // one tensor's part of the update
    float *w, *g;
    floatX *low;                                  // the rounded copy of w
    void *m1, *m2;                                // float, or with --moments bf16 bfloat16
    size_t size, first;                           // first: the part's first number in the whole tensor
    float rate, keep, b1, b2, correct1, correct2; // keep: 1 - lr * decay
    double clip;
    int row;        // numbers in a row of a table that is looked up, see adamw_rows_kernel; 0: no such table
    const int *rows; // (count)  which rows the step has read
    int count;
    int moments;    // MOMENTS_FP32 or MOMENTS_BF16
    uint64_t draws; // the stream of random numbers that round moments: see dev/moments.h
};

// What clipping multiplies the gradients by.
__device__ float clip_scale(double clip, double norm) {
    return (float)(clip > 0 && norm > clip ? clip / norm : 1);
}

// Four weights, from number i on. Reads each number once and writes it once: weight, rounded weight, moments; and
// clears the gradient.
template <class Moment> __device__ void adamw_of_pack(const Adam &a, Moment *m1, Moment *m2, size_t i, float scale) {
    float w[4], grad[4], mean[4], square[4], zeros[4] = {0};
    load_pack(w, a.w + i);
    load_pack(grad, a.g + i);
    load_pack(mean, m1 + i);
    load_pack(square, m2 + i);

    // As in model_update of the C twin.
    for (int j = 0; j < 4; j++) {
        grad[j] *= scale;
        mean[j] = a.b1 * mean[j] + (1 - a.b1) * grad[j];
        square[j] = a.b2 * square[j] + (1 - a.b2) * grad[j] * grad[j];
        w[j] = a.keep * w[j] - a.rate * (mean[j] * a.correct1) / (sqrtf(square[j] * a.correct2) + 1e-8f);
        if (sizeof(Moment) == 2) { // rounded at random: to the nearest, small changes would be lost
            uint64_t draw = moment_draw(a.draws, a.first + i + j);
            mean[j] = round_stochastically(mean[j], (unsigned)(draw & 0xffff));
            square[j] = round_stochastically(square[j], (unsigned)(draw >> 16 & 0xffff));
        }
    }

    store_pack(a.w + i, w);
    store_pack(m1 + i, mean);
    store_pack(m2 + i, square);
    store_pack(a.g + i, zeros);
    if (a.low) {
        store_pack(a.low + i, w);
    }
}

template <class Moment> __global__ void adamw_kernel(Adam a, Moment *m1, Moment *m2, const double *norm) {
    size_t i = 4 * thread_of_grid();
    if (i < a.size && isfinite(*norm)) {
        adamw_of_pack(a, m1, m2, i, clip_scale(a.clip, *norm));
    }
}

// A table that is looked up: a warp has a row that the step has read. If it has no gradient, it is left alone (dev/read_rows.h).
template <class Moment> __global__ void adamw_rows_kernel(Adam a, Moment *m1, Moment *m2, const double *norm) {
    int i = row_of_warp(), read = 0;
    float g[4];
    if (i >= a.count || !isfinite(*norm)) {
        return;
    }
    size_t begin = (size_t)a.rows[i] * a.row;
    for (int c = 4 * (threadIdx.x % 32); c < a.row; c += 128) {
        load_pack(g, a.g + begin + c);
        read |= g[0] != 0 || g[1] != 0 || g[2] != 0 || g[3] != 0;
    }
    if (!__ballot_sync(ALL_LANES, read)) {
        return;
    }
    for (int c = 4 * (threadIdx.x % 32); c < a.row; c += 128) {
        adamw_of_pack(a, m1, m2, begin + c, clip_scale(a.clip, *norm));
    }
}

template <class Moment> void start_adamw(Adam a, const double *norm) {
    a.low = (void *)a.low == (void *)a.w ? NULL : a.low; // in float32 there is no copy
    Moment *m1 = (Moment *)a.m1, *m2 = (Moment *)a.m2;
    if (a.row) {
        adamw_rows_kernel<Moment><<<row_blocks((size_t)a.count), THREADS, 0, stream>>>(a, m1, m2, norm);
    } else {
        adamw_kernel<Moment><<<blocks(a.size, 4 * THREADS), THREADS, 0, stream>>>(a, m1, m2, norm);
    }
    CHECK(cudaGetLastError());
}

// AdamW of one tensor in model_update, unless *norm is not finite.
void adamw(Adam a, const double *norm) {
    if (a.size % 4) {
        fail("internal error: a tensor of %zu numbers, which are no multiple of 4", a.size);
    }
    if (a.row && !a.count) {
        return;
    }
    by_parts(a, [&](const Adam &part) { // --offload: expert by expert
        a.moments == MOMENTS_BF16 ? start_adamw<__nv_bfloat16>(part, norm) : start_adamw<float>(part, norm);
    });
}

#include "dev/cuda/ranks.cuh" // several GPUs: sums of gradients, shares of the update, second copies of busy experts
#include "dev/cuda/muon.cuh"  // --optimizer muon: another step for the matrices of the layers

// After a step: what routers do without gradients.
void router_update(Model *m) {
    const Config *c = &m->config;
    sum_statistics(m);
    for (int l = 0; l < c->layers; l++) {
        if (!is_moe(c, l)) {
            continue;
        }
        router_update_kernel<<<blocks(c->experts), THREADS, 0, stream>>>(
            m->report + GRADIENT_NORM, layer_stats(m, l), c->lora ? NULL : m->params.layer[l].bias, c->experts, c->bias_rate);
        CHECK(cudaGetLastError());
        for (int i = 0; m->parts[i] && !c->lora; i++) {
            if (kernels_of(m->parts[i])->update) {
                kernels_of(m->parts[i])->update(m, l);
            }
        }
    }
}

void model_update(::Model *base, int step, double lr) {
    Model *m = (Model *)base;
    const Config *c = &m->config;
    double *norm = m->report + GRADIENT_NORM;

    // The norm of all gradients stays on the device: AdamW's kernels look at it.
    if (MANY) {
        norm_over_ranks(m, norm);
    } else if (m->tables < normed_size(m)) {
        send_read_rows(m);
        norm_with_tables(m, norm);
    } else {
        gpu::gradient_norm(norm, m->memory[GRADS], normed_size(m), m->norm_part);
    }

    // One kernel for each tensor that Muon leaves: simple, and nearly all the time goes to the large ones.
    gpu::muon_update(m, step, lr, norm);
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        if (!i || t->layer != m->tensors[i - 1].layer) {
            keep_pace();
        }
        size_t at = t->offset, size = t->size;
        ranks_own_range(m, t, &at, &size); // several processes: each updates its share of what all have
        if (!t->trained || !size || takes_muon(c, t)) {
            continue;
        }
        Adam a = {};
        a.w = m->memory[WEIGHTS] + at;
        a.g = m->memory[GRADS] + at;
        a.low = m->low + at;
        a.m1 = moment_at(m, MOMENT1, moment_offset(m, at));
        a.m2 = moment_at(m, MOMENT2, moment_offset(m, at));
        a.size = size;
        a.first = t->first + (at - t->offset);
        a.rate = (float)lr * (t->looked_up ? TABLE_RATE : 1);
        a.keep = (float)(t->dims == 1 || t->looked_up ? 1 : 1 - lr * c->weight_decay);
        a.row = t->looked_up ? t->shape[2] : 0;
        a.rows = m->tables_there->list[t->looked_up];
        a.count = rows_of_table(m, t)->count;
        a.b1 = (float)c->beta1;
        a.b2 = (float)c->beta2;
        a.correct1 = (float)(1 / (1 - pow(c->beta1, step)));
        a.correct2 = (float)(1 / (1 - pow(c->beta2, step)));
        a.clip = c->clip;
        a.moments = c->moments;
        a.draws = moment_stream((uint64_t)c->seed, step, i);
        adamw(a, norm);
    }
    merge_pairs(m, 0, m->size);
    share_weights(m);
    forget_read_rows(m);
    gpu::router_update(m);
    move_copies(m, step);
}

// ---------------------------------------------------------------------------------------------------------------------
// 7. Training: what the loop of train_moe.c asks of this device

// One token at `position`; logits (V) of the next one, on the host. m->one does what a forward pass does, except that
// its attention looks at the keys and values in its cache.
void model_generate(::Model *base, int token, int position, real *logits) {
    Model *m = (Model *)base, *one = m->one;
    const Config *c = &m->config;
    int D = head_width(c);
    if (!one) {
        one = m->one = new_model(c, 1, 0, m, 0);
        one->batch.B = one->batch.T = 1;
        one->batch.mode = EVAL_MODE;
        for (int r = 0; r < ranks.size; r++) { // all processes go on with the same token
            one->crossing->rank_tokens[r] = 1;
        }
    }

    // The token and the angles of its position go to the device, the logits come back.
    one->position = position;
    float *angles = (float *)allocate(D, sizeof(float));
    head_angles(c, angles, position, 1);
    CHECK(cudaMemcpyAsync(one->angles, angles, (size_t)D * sizeof(float), cudaMemcpyHostToDevice, stream));
    CHECK(cudaMemcpyAsync(one->tokens, &token, sizeof(int), cudaMemcpyHostToDevice, stream));
    int row[2]; // out here, since a copy may read it as late as in download()
    if (c->ngrams) {
        find_ngrams(c, row, &token, position ? one->before : NULL, 1, 1);
        CHECK(cudaMemcpyAsync(one->pairs, row, (size_t)ngram_orders(c) * sizeof(int), cudaMemcpyHostToDevice, stream));
    }
    remember_token(one->before, token, position);
    layers_forward(one);
    matmul(one->word_logits, one->h, low_of(m, m->params.head), 1, c->dim, words_with_padding(c->vocab), SET);
    download(logits, one->word_logits, (size_t)c->vocab * sizeof(float));
    free(angles);
}

// A model with buffers for N tokens. train 0: no gradients and no moments. weights: always NULL here.
::Model *model_allocate(const Config *config, int N, int train, real *weights) {
    (void)weights;
    if (router_without_kernels(config)) {
        usage_fail("--recipe %s: its router has no kernels for a GPU yet; ./train_moe trains it on the CPU",
                   config->recipe);
    }
    if (mixer_without_kernels(config)) {
        usage_fail("what mixes along the sequence has no kernels for a GPU yet; ./train_moe trains it on the CPU");
    }
    if (device_refuses(config)) {
        usage_fail("%s", device_refuses(config));
    }
    start_device();
#ifdef USE_NCCL
    if (MANY) {
        start_ranks();
    }
#endif
    check_memory(config, N, train);
    Model *m = new_model(config, N, train, NULL, 0);
    zero(m->report, m->report_size * sizeof(double));
    for (int i = 0; i < (train ? 4 : 1); i++) {
        size_t n = i ? trained_size(m) : m->size;
        zero(m->memory[i], i >= MOMENT1 ? moment_offset(m, n) * moment_size(m) : n * sizeof(float));
    }
    round_weights(m, 0,
                  m->size); // to 0: the words that do not exist belong to no tensor, and nobody else writes them
    CHECK(cudaMallocHost((void **)&m->staging, batch_ints(m) * sizeof(int)));
    CHECK(cudaEventCreateWithFlags(&m->staged, cudaEventDisableTiming));
    allocate_row_staging(m);
    CHECK(cudaStreamSynchronize(stream)); // a plain cudaMemcpy does not wait for this stream
    return m;
}

void model_free(::Model *base) {
    Model *m = (Model *)base;
    if (m->one) {
        gpu::model_free(m->one);
    }
    forget_pairs(m);
    if (!m->dry) {
        await_device();
        free_row_staging(m);
        free_crossing(m);
        CHECK(cudaFree(m->arena));
        free_arrays(m);
    }
    ranks_free(m);
    if (m->staging) { // not generation's model
        CHECK(cudaFreeHost(m->staging));
        CHECK(cudaEventDestroy(m->staged));
        end_ranks();
    }
    for (int i = 0; i < m->owned_count; i++) {
        free(m->owned[i]);
    }
    free(m->owned);
    free(m);
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

#include "dev/cuda/peak.cuh" // what the device can do at most: measured, and by its data sheet

const Backend backend = {
    "cuda",       model_allocate, model_free,     model_init,       model_forward, model_backward,
    model_update, model_losses,   model_generate, model_statistics, model_route,   model_read,
    model_write,  measured_peak,  sheet_peak,     device_name,      device_memory, model_remember,
};

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
