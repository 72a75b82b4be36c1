// train_moe.c: trains a Mixture-of-Experts language model from scratch, on the CPU.
//
// This file is the lesson. It has the whole model and its training: every layer, forward and
// backward, written out by hand; the mixture of experts; AdamW; and the loop. There is no framework
// and no automatic differentiation. Read it from top to bottom: nearly each function stands before
// its first use, and each chapter begins with what it is about. What every trainer needs besides
// (files, options, log, several processes, fast kernels, the routers of single papers) stands in
// data/ and dev/, and each #include below says what it brings.
//
//   make train_moe        a C compiler and make are all it takes; OpenMP is used where the compiler has it
//   ./train_moe           trains on the built-in stories and tells one
//   ./train_moe -h        every option
//
// The model, with the shape of what flows through it:
//
//     tokens (B,T)
//        |  embedding (V,C)
//        v
//     x (N,C) ----------------------------------------------------------------------------+
//        |                                                                    L layers    |
//        |-- rmsnorm --> qkv (N,(H+2KV)*D) --> rope --> attention (N,H*D) --> proj --(+)  |
//        |                                                                                |
//        |-- rmsnorm --> h (N,C) --+--> router (N,E): which K of the E experts? ---+      |
//        |                         |                                               v      |
//        |                         |   choices sorted by expert               weights     |
//        |                         |        |                                      |      |
//        |                         +--> expert 0: rows offset[0]..offset[1] --+    v      |
//        |                         +--> expert 1: rows offset[1]..offset[2] --+--> sum --(+)
//        |                         +--> ...                                   |           |
//        |                         +--> expert E-1                          --+           |
//        |  <-----------------------------------------------------------------------------+
//        v
//     rmsnorm --> logits (N,V) = x . embedding^T --> cross-entropy
//
// In a dense GPT every token passes the same feed-forward layer, a pair of matrices. Here a layer
// has E such pairs, the experts. A small linear map, the router, sends each token to K of them. So
// the feed-forward layers have E/K times as many weights for the same work per token. Chapter 3 is
// about that; most of the rest is what any GPT has.
//
// Letters, with the same meaning to the end of the file (only in chapter 3 N, T and C are those of
// what the experts read, which with --subtokens are parts of tokens):
//   B sequences in a batch     T tokens in a sequence     N = B*T tokens      C width of the model    V words: all tokens there are
//   L layers                   H query heads              KV key/value heads  D = C/H width of a head (--head-width)
//   E experts of a layer       K experts for each token   F width of a feed-forward layer, after its activation
// A comment such as "x (N,C)" gives the shape of an array, row after row. The gradient of a value
// has the value's name with a d in front: dx is the derivative of the loss with respect to x, in
// short "by x". A backward function adds to the gradients that it is given, unless its comment says
// that it writes them.
//
// The file is C11. It also compiles as C++17, because its CUDA twin, train_moe.cu, includes it and
// replaces the functions that compute.

#include "dev/util.h"        // errors, memory, random numbers; the type `real`: float, or double for exact checks
#include "data/tokenizer.h"  // text to tokens and back
#include "data/loader.h"     // token files to batches
#include "dev/ranks/comm.h"  // several processes: who am I, and the messages between them

// ---------------------------------------------------------------------------------------------------------------------
// 1. What a model is
//
// The structs of this chapter are the vocabulary of all that follows: Config is what the user asks
// for, Params are the weights, Acts are the activations that the backward pass needs, and Route
// says which token goes to which expert. Skim them now, and come back when a function uses them:
// many of their words are explained in chapter 3.

enum { SWIGLU, GEGLU, RELU, GELU, SAME };           // activation functions; SAME: dense layers have that of the experts
enum { SOFTMAX, SIGMOID };                          // what makes scores of logits
enum { PROBABILITY, RENORMALIZED };                 // the weight of a chosen expert
enum { SEQUENCE, BATCH, STEP };                     // the tokens over which loads, capacities and losses are taken
enum { SWITCH, GSHARD, UNBIASED, WIDTH, CV2, VARIANCE }; // balance losses; this file has SWITCH and UNBIASED
enum { TOP_K, HIERARCHICAL, THRESHOLD, EXPERT_CHOICE, BALANCED, HASH }; // ways to choose experts; this file has TOP_K
enum { NORMAL, TRUNCATED };                         // distributions of the first weights
enum { COSINE, WSD, CONSTANT };                     // schedules of the learning rate
enum { ADAMW, MUON };                               // what moves the matrices of the layers: AdamW, or dev/muon.h

// What the user asks for: one field for each option of the command line. dev/options.h has their
// defaults and ranges.
#define MAX_OPTIONS 160
typedef struct Config {
    // The model.
    const char *recipe;                  // which router: a name for a set of the options below
    int layers, dim, heads, kv_heads;    // L, C, H, KV
    int seq, vocab;                      // T; V, which the tokenizer decides
    int untied;                          // 1: the output has a matrix of its own, else it uses the embedding's
    double norm_eps, rope_theta;
    // The experts.
    int experts, topk, ffn, shared;      // E, K, F; experts that every token passes
    int moe_every, dense_first;          // which layers have experts: see is_moe()
    int activation, dense_activation;
    int init_scheme;
    // The router of chapter 3.
    int select, score, gate;             // TOP_K; SOFTMAX or SIGMOID; PROBABILITY or RENORMALIZED
    double scale;                        // all weights of chosen experts are multiplied by this
    double bias_rate;                    // step of the selection bias; 0: there is none
    int balance, group;                  // form of the balance loss; over which tokens: SEQUENCE, BATCH, STEP
    double aux_weight, z_weight;         // weights of the balance loss and of the z-loss
    double capacity_factor, eval_capacity_factor;
    // The routers of single papers, and other parts. Their files begin with the fields that they
    // need here; that part alone is included.
#define CONFIG_FIELDS
#include "dev/routers/all.h"
#include "dev/mixers/all.h"
#include "dev/parts.h"
#undef CONFIG_FIELDS
    // Training.
    int batch, accum, steps;             // B; micro-steps in a step; steps
    double minutes;                      // the time that sets steps; 0: none, see dev/minutes.h
    double lr, min_lr;
    int warmup, schedule;
    double weight_decay, beta1, beta2, clip;
    int optimizer;                       // ADAMW or MUON, see dev/muon.h
    int moments;                         // MOMENTS_FP32 or MOMENTS_BF16, see dev/moments.h
    int precision;                       // PRODUCTS_FP32 or PRODUCTS_BF16, see dev/precision.h
    int seed, recompute, threads;
    // Several processes.
    int ep, overlap, replicate, replicate_every, watchdog, trace;
    // Files, how often things happen (in steps), and generation.
    const char *data, *out, *init, *tokenizer, *export_to;
    int resume, trust_weights, export_type;
    int log_every, eval_every, eval_tokens, sample_every, save_every, keep;
    const char *prompt;
    int tokens, top_k;
    double temperature, top_p;
    int list_recipes, help;
    unsigned char given[MAX_OPTIONS];    // 1 where the command line set the option of that number
} Config;

#include "dev/options.h" // the table of options, the recipes, and the command line

// Does layer l feed forward at all? With --last-feed 0 the last one has only its first half, attention.
int feeds(const Config *c, int l) {
    return c->last_feed || l < c->layers - 1;
}

// Does layer l have experts? Every moe_every-th layer after the first dense_first ones has.
int is_moe(const Config *c, int l) {
    return c->moe_every > 0 && l >= c->dense_first && (l - c->dense_first + 1) % c->moe_every == 0 && feeds(c, l);
}

// A gated activation multiplies f(gate) with a second product, `up`, so w_in has twice as many
// rows. (BOTH: the CUDA twin calls this function on the host and on the device.)
BOTH int is_gated(int activation) {
    return activation == SWIGLU || activation == GEGLU;
}

// Width of the feed-forward that every token of a layer passes: the shared experts together, or a
// whole dense layer. A dense layer is as wide as all experts that a token would see, so that it
// costs the same work.
int dense_width(const Config *c, int l) {
    int own = is_moe(c, l) ? (c->shared > 0) * c->shared_ffn : c->dense_ffn; // --shared-ffn, --dense-ffn
    int experts = is_moe(c, l) ? c->shared : c->topk + c->shared;
    return feeds(c, l) * (own ? own : experts * c->ffn);
}

int dense_activation(const Config *c, int l) {
    return is_moe(c, l) || c->dense_activation == SAME ? c->activation : c->dense_activation;
}

int moe_layers(const Config *c) {
    int count = 0;
    for (int l = 0; l < c->layers; l++) {
        count += is_moe(c, l);
    }
    return count;
}

// The weights of one layer.
typedef struct LayerParams {
    real *norm1;     // (C)
    real *qkv;       // ((H+2KV)*D, C)  rows of all query heads, then of the keys, then of the values
    real *qkv_bias;  // ((H+2KV)*D)     with --qkv-bias
    real *q_norm, *k_norm; // (D)       with --qk-norm; with --qk-norm-over row (H*D) and (KV*D)
    real *value_embed; // (V, KV*D)    with --value-embedding
    real *proj;      // (C, H*D)
    real *ngram_key, *ngram_value; // (C)  with --ngram-gate
    real *norm2;     // (C)
    real *router;    // (E, C)
    real *w_in;      // (E, 2F, C)      each expert: F rows of gate, then F rows of up; (E, F, C) where not gated
    real *w_out;     // (E, C, F)
    real *dense_in;  // (2F, C)         a dense layer, or the shared experts together: here F is dense_width()
    real *dense_out; // (C, F)
    real *shared_router; // (1, C)      with --shared-gate
    real *bias;      // (E)             selection bias: moved after each step, without a gradient
} LayerParams;

typedef struct Params {
    real *embed;        // (V, C)
    real *ngrams;       // (--ngrams, C)
    LayerParams *layer; // (L)
    real *norm;         // (C)
    real *head;         // (V, C)  the same memory as embed, unless untied
} Params;

// One row of the table of weights of chapter 4, which the optimizer, the checkpoints, the CUDA twin
// and the tests walk over.
enum { INIT_NORMAL, INIT_RESIDUAL, INIT_FAN_IN, INIT_ZERO, INIT_ONE }; // see first_deviation()
typedef struct Tensor {
    char name[40];         // "layer3.qkv"
    const char *kind;      // "qkv"
    int layer;             // -1: of the whole model
    int dims, shape[3];    // 1 to 3 dimensions; the others are 1 and come first
    int init;              // how it begins
    int trained;           // 0: no gradient: a buffer, or with --lora frozen (dev/lora_tensors.h)
    int of_experts;        // 1: in the experts' arena
    int looked_up;         // not 0: a table, of which the optimizer moves only the rows that the step has read; see dev/tables.h
    size_t field;          // where LayerParams or Params has its pointer; NO_FIELD: a router's own, see layer_tensor()
    size_t offset, size;   // in the memory of this process, in numbers
    size_t first, whole;   // several processes: this one has numbers first .. first+size of `whole`
} Tensor;

// Which token goes to which expert, in one layer. A "choice" is a number n*K + k: the k-th expert
// of token n. The choices that are served are sorted by expert: expert e has the rows offset[e] up
// to, but not including, offset[e+1]. An example with numbers stands before sort_by_expert().
typedef struct Route {
    int N, E, K;
    int group;       // tokens of a group: T with SEQUENCE, else N; see "balance" in chapter 3
    int rows;        // rows of p: one for each token, but with several routers one for each of them
    real *logits;    // (N,E) what the router's matrix gives; some routers of dev/routers have more columns
    real *p;         // (rows,E) scores
    real *lse;       // (rows) log of the sum of exp of each row of logits, where scores are softmax
    int *expert;     // (N,K) chosen experts, best first; -1: no choice
    real *weight;    // (N,K) with which each answer will count
    int *served;     // (N,K) the same experts, but -1 where a choice is refused, because the expert is full, or declined
    int *row;        // (N,K) sorted row of each choice, -1 where it has none
    int *choice;     // (N*K) choice of each sorted row
    int *token;      // (N*K) token of each sorted row
    int *offset;     // (E+1)
    double *count;   // (groups,E) choices of each expert, of each group of tokens
    double *slope;   // (groups,E) slope / N is the derivative of the balance losses by each p of the group (by softmax's
                     // p: balance_backward()); NULL: the router has no balance loss of this form
    double aux;      // all balance losses, weighted
    int dropped;     // choices refused because the expert was full
    void *state[16]; // what the parts of dev/routers keep
} Route;

// What one layer keeps from its forward pass for its backward pass. With --recompute only x and the
// route are kept for each layer; all layers share the memory of the other arrays, and the backward
// pass fills them anew.
typedef struct LayerActs {
    real *x;             // (N,C)  the layer's input
    real *h1, *rstd1;    // (N,C), (N)  its norm
    real *qkv, *att;     // (N,(H+2KV)*D), (N,H*D)
    real *raw_qk, *rstd_qk; // (N,(H+KV)*D), (N,H+KV)  with --qk-norm: queries and keys before their norm
    real *lse;           // (B,H,T)
    real *mid;           // (N,C)  after attention
    real *h2, *rstd2;    // (N,C), (N)  its norm
    real *dense_hidden;  // (N,2F)
    real *hidden;        // (N*K,2F)  the experts' first products, sorted by expert
    real *fed;           // (N,C)  with --moe-sigmoid: what the layer feeds forward
    void *mixer;         // dev/mixers, an LSTM say, in attention's place: what it keeps
    double mixer_aux;    // its balance losses, weighted
    Route route;
} LayerActs;

typedef struct Acts {
    LayerActs *layer;    // (L)
    real *x, *h, *rstd;  // (N,C), (N,C), (N)  the last layer's output and its norm
    real *nll;           // (N)  loss of each token
    real *dh;            // (N,C)  gradient by h: the forward pass takes it at once, since it does not keep the logits
} Acts;

// The shapes of a layer's experts. They are alike in nearly all recipes; the arrays are there for
// those that differ.
typedef struct Experts {
    int E, C;
    int *in, *out;       // (E)  width of the rows that an expert reads and writes: C
    int *F, *hidden;     // (E)  width after and before the activation: F, and 2F where it is gated
    int *activation;     // (E)
} Experts;

// One pass over a batch: what model_forward is told.
enum { TRAIN_MODE, EVAL_MODE, CHECK_MODE }; // CHECK_MODE, for tests: as at evaluation, but with gradients
typedef struct Batch {
    const int *inputs, *targets; // (B,T)
    int B, T, mode;
    double scale;        // the step's loss is the sum of its batches' losses, each times scale: 1 / (--accum * processes)
    long step;           // step and first_token decide which random numbers are drawn
    long first_token;    // number of this batch's first token among all tokens of the step
    int first, last;     // 1 if this is the first, the last batch of its step
} Batch;

struct Router;           // chapter 3
struct Statistics;       // dev/statistics.h
struct Generation;       // dev/generate.h
struct Lookup;           // dev/tables.h
struct Crossing;         // dev/ranks/: rows on their way between processes
enum { WEIGHTS, GRADS, MOMENT1, MOMENT2 };
enum { FOR_WEIGHTS, FOR_GRADIENTS, FOR_MOMENTS, FOR_ACTIVATIONS, FOR_BUFFERS, HARDLY_TOUCHED, MEMORY_KINDS };

typedef struct Model {
    Config config;
    Params params, grads;
    Acts acts;
    Experts experts;
    const struct Router *router;        // chooses the experts
    const struct Router *parts[16];     // all parts of it, NULL after the last one
    Batch batch;                        // of the last forward pass
    int max_tokens;                     // N that the buffers hold
    // The table of weights, and the four arrays that it describes: weights, gradients, the optimizer's two
    // moments. In each, what all processes have in common comes first, then the experts, from number
    // `common` on, then the tables that are looked up, from number `tables` on. With --lora the pairs come before all.
    Tensor *tensors;
    int tensor_count;
    size_t size, common, tables, pairs;
    real *memory[4];
    real *dx;                           // (N,C)  the gradient that flows back through the residual stream
    struct Lookup *lookup;              // tables that are looked up: which rows
    real *dbranch;                      // (N,C)  with --dropout or --moe-sigmoid, see dev/residual.h
    real *angles;                       // (T, D/2, 2)  cosines and sines of the rotary positions
    Arena scratch;                      // what one part of a layer needs while it works
    double loss, aux;                   // of the step so far, each batch's times its scale
    double norm;                        // of the step's gradients
    struct Statistics *stats;           // (L)  what the experts had to do; behind them attention's
    struct Generation *generation;      // what generation keeps
    struct Crossing *crossing;          // several processes
    int at_hand;                        // with --recompute: the layer whose activations are in memory
    int again;                          // 1: recompute_layer() is at work, a second forward pass of a layer
    // What the program says of its memory: bytes by what they are for; numbers that --recompute
    // would not keep, of all layers together and of the largest one.
    size_t bytes[MEMORY_KINDS], passing, largest;
    int purpose;                        // what own() allocates for at present
    void **owned;                       // every allocation, for model_free()
    int owned_count;
} Model;

#include "dev/memory.h" // memory that lives as long as a model, and scratch memory

// ---------------------------------------------------------------------------------------------------------------------
// 2. The layers of a transformer
//
// Plain loops over plain arrays, forward and backward side by side. Sums run in one fixed order,
// and each number is summed by one thread, so any number of threads gives the same bits.
//
// These loops are real code: `make train_moe PLAIN=1` builds the program with them. The usual build
// takes the faster functions of dev/cpu instead, which have the same names and arguments;
// test_moe.c holds one against the other.

// ---- matrix products
//
// A weight matrix w (O,I) maps rows of I numbers to rows of O numbers: out = x w^T. With dout = d
// loss / d out, the chain rule gives dx = dout w and dw = dout^T x.

enum { SET, ADD }; // the result replaces what is there, or is added to it

// out (N,O) = or += x (N,I) times w (O,I) transposed
void matmul(real *out, const real *x, const real *w, int N, int I, int O, int add) {
#pragma omp parallel for
    for (int n = 0; n < N; n++) {
        for (int o = 0; o < O; o++) {
            real sum = 0;
            for (int i = 0; i < I; i++) {
                sum += x[(size_t)n * I + i] * w[(size_t)o * I + i];
            }
            out[(size_t)n * O + o] = add == ADD ? out[(size_t)n * O + o] + sum : sum;
        }
    }
}

// dx (N,I) = or += dout (N,O) times w (O,I)
void matmul_dx(real *dx, const real *dout, const real *w, int N, int I, int O, int add) {
#pragma omp parallel for
    for (int n = 0; n < N; n++) {
        for (int i = 0; i < I; i++) {
            real sum = 0;
            for (int o = 0; o < O; o++) {
                sum += dout[(size_t)n * O + o] * w[(size_t)o * I + i];
            }
            dx[(size_t)n * I + i] = add == ADD ? dx[(size_t)n * I + i] + sum : sum;
        }
    }
}

// dw (O,I) += dout (N,O) transposed times x (N,I)
void matmul_dw(real *dw, const real *dout, const real *x, int N, int I, int O) {
#pragma omp parallel for
    for (int o = 0; o < O; o++) {
        for (int i = 0; i < I; i++) {
            real sum = 0;
            for (int n = 0; n < N; n++) {
                sum += dout[(size_t)n * O + o] * x[(size_t)n * I + i];
            }
            dw[(size_t)o * I + i] += sum;
        }
    }
}

// The whole way back through out = x w^T: both of these gradients.
void matmul_backward(real *dx, real *dw, const real *dout, const real *x, const real *w, int N, int I, int O, int add) {
    matmul_dx(dx, dout, w, N, I, O, add);
    matmul_dw(dw, dout, x, N, I, O);
}

// A grouped product does the same for all experts: expert e multiplies its rows, offset[e] ..
// offset[e+1], by its own matrix (O[e],I[e]). Rows and matrices stand in the order of the experts;
// an example stands before sort_by_expert(). The input may also be in the order of tokens: then
// token[r] says which row of it is row r, so nothing has to be copied.

// Row r of x, which is I wide. With `token` it is the row of its token. Else x is sorted itself,
// and the row begins at number `from`.
static const real *row_of(const real *x, const int *token, int r, size_t from, int I) {
    return token ? x + (size_t)token[r] * I : x + from;
}

// out (rows,O) = each row of x (.., I) times its expert's w (O,I) transposed
void grouped_matmul(real *out, const real *x, const int *token, const real *w, const int *offset, int E, const int *I,
                    const int *O) {
    size_t from = 0; // where the row begins in x, if x is sorted
    for (int e = 0; e < E; e++) {
        for (int r = offset[e]; r < offset[e + 1]; r++) {
            matmul(out, row_of(x, token, r, from, I[e]), w, 1, I[e], O[e], SET);
            out += O[e];
            from += I[e];
        }
        w += (size_t)O[e] * I[e];
    }
}

// dx (rows,I) = each row of dout (.., O) times its expert's w (O,I); token, if given, says which row of dout
void grouped_matmul_dx(real *dx, const real *dout, const int *token, const real *w, const int *offset, int E,
                       const int *I, const int *O) {
    size_t from = 0;
    for (int e = 0; e < E; e++) {
        for (int r = offset[e]; r < offset[e + 1]; r++) {
            matmul_dx(dx, row_of(dout, token, r, from, O[e]), w, 1, I[e], O[e], SET);
            dx += I[e];
            from += O[e];
        }
        w += (size_t)O[e] * I[e];
    }
}

// Each expert's dw (O,I) += its rows of dout (.., O) transposed times its rows of x (.., I). Each
// of the two arrays may be read by token.
void grouped_matmul_dw(real *dw, const real *dout, const int *dout_token, const real *x, const int *x_token,
                       const int *offset, int E, const int *I, const int *O) {
    size_t from = 0, dfrom = 0;
    for (int e = 0; e < E; e++) {
        for (int r = offset[e]; r < offset[e + 1]; r++) {
            matmul_dw(dw, row_of(dout, dout_token, r, dfrom, O[e]), row_of(x, x_token, r, from, I[e]), 1, I[e], O[e]);
            from += I[e];
            dfrom += O[e];
        }
        dw += (size_t)O[e] * I[e];
    }
}

#include "dev/products.h" // begin_products() .. end_products(): products that may be done in any order, or all at once

// ---- softmax and RMSNorm

// row (n) becomes softmax(row); returns log(sum(exp(row))). The largest number is taken off first,
// so nothing overflows.
real softmax(real *row, int n) {
    real top = row[0], sum = 0;
    for (int i = 1; i < n; i++) {
        top = row[i] > top ? row[i] : top;
    }
    for (int i = 0; i < n; i++) {
        row[i] = (real)exp((double)(row[i] - top));
        sum += row[i];
    }
    for (int i = 0; i < n; i++) {
        row[i] /= sum;
    }
    return top + (real)log((double)sum);
}

// out (N,C) = x / rms(x) * w with w (C) and rms(x) = sqrt(mean(x^2) + eps); rstd (N) keeps 1 /
// rms(x). Zhang and Sennrich 2019, Root Mean Square Layer Normalization.
void rmsnorm_forward(real *out, real *rstd, const real *x, const real *w, int N, int C, double eps) {
#pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const real *row = x + (size_t)n * C;
        double sum = 0; // a float's square may be too large for a float
        for (int c = 0; c < C; c++) {
            sum += (double)row[c] * (double)row[c];
        }
        rstd[n] = (real)(1 / sqrt(sum / C + eps));
        for (int c = 0; c < C; c++) {
            out[(size_t)n * C + c] = row[c] * rstd[n] * w[c];
        }
    }
}

// Let y = x * rstd, the normalised row before the multiplication by w. Then dw += dout * y, and
// dx += rstd * (dout*w - y * mean(dout*w*y)). The second term is there because rstd depends on x,
// too: d rstd / d x_j = -rstd^3 x_j / C.
void rmsnorm_backward(real *dx, real *dw, const real *dout, const real *x, const real *rstd, const real *w, int N, int C) {
    for (int n = 0; n < N; n++) {
        const real *row = x + (size_t)n * C, *d = dout + (size_t)n * C;
        real mean = 0;
        for (int c = 0; c < C; c++) {
            mean += d[c] * w[c] * row[c] * rstd[n] / C;
        }
        for (int c = 0; c < C; c++) {
            real y = row[c] * rstd[n];
            dw[c] += d[c] * y;
            dx[(size_t)n * C + c] += rstd[n] * (d[c] * w[c] - y * mean);
        }
    }
}

// ---- rotary positions

// angles (count, D/2, 2): cosine and sine of position * theta^(-2i/D), for `count` positions from
// `first` on.
void rope_angles(real *angles, int first, int count, int D, double theta) {
    for (int t = 0; t < count; t++) {
        for (int i = 0; i < D / 2; i++) {
            double angle = (first + t) * pow(theta, -2.0 * i / D);
            angles[(size_t)t * D + 2 * i] = (real)cos(angle);
            angles[(size_t)t * D + 2 * i + 1] = (real)sin(angle);
        }
    }
}

// Turns the pair (i, i + D/2) of each head by the angle of its token's position, so that the
// product of a query and a key depends on their positions only by the distance. `heads` heads of D
// stand first in each row of qkv (N rows, `width` numbers each). direction 1 turns; -1 turns back,
// which is the backward pass: a rotation's transpose is its inverse. Su et al. 2021, RoFormer; the
// pairs are those of Hugging Face's models.
void rope(real *qkv, int width, int N, int T, int heads, int D, const real *angles, real direction) {
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++) {
        const real *angle = angles + (size_t)(n % T) * D;
        for (int h = 0; h < heads; h++) {
            real *head = qkv + (size_t)n * width + (size_t)h * D;
            for (int i = 0; i < D / 2; i++) {
                real cosine = angle[2 * i], sine = angle[2 * i + 1] * direction;
                real a = head[i], b = head[i + D / 2];
                head[i] = a * cosine - b * sine;
                head[i + D / 2] = b * cosine + a * sine;
            }
        }
    }
}

// ---- attention
//
// Each token looks at itself and at all tokens before it: out_t = sum over s <= t of p_ts * v_s,
// where p_t = softmax over s of q_t . k_s / sqrt(D). Vaswani et al. 2017, Attention Is All You
// Need. Several query heads share a key and value head: query head h uses number h / (H/KV)
// (Ainslie et al. 2023, GQA).

// qkv (B,T,(H+2KV)*D): H query heads, KV keys, KV values. out (B,T,H*D). lse (B,H,T): log of the
// sum of exp of each query's scores, with which the backward pass finds the probabilities again.
void attention_forward(real *out, real *lse, const real *qkv, int B, int T, int H, int KV, int D) {
    int width = (H + 2 * KV) * D;
    real scale = (real)(1 / sqrt((double)D));
#pragma omp parallel for
    for (int task = 0; task < B * H; task++) {
        int b = task / H, h = task % H;
        const real *q = qkv + (size_t)b * T * width + (size_t)h * D;
        const real *k = qkv + (size_t)b * T * width + (size_t)(H + h / (H / KV)) * D, *v = k + (size_t)KV * D;
        real *p = allocate_reals(T);
        for (int t = 0; t < T; t++) {
            // How well does query t go with each key that it may see?
            for (int s = 0; s <= t; s++) {
                p[s] = 0;
                for (int i = 0; i < D; i++) {
                    p[s] += q[(size_t)t * width + i] * k[(size_t)s * width + i] * scale;
                }
            }
            lse[((size_t)b * H + h) * T + t] = softmax(p, t + 1);

            // The answer is the sum of the values, each times its probability.
            real *to = out + ((size_t)b * T + t) * H * D + (size_t)h * D;
            memset(to, 0, (size_t)D * sizeof(real));
            for (int s = 0; s <= t; s++) {
                for (int i = 0; i < D; i++) {
                    to[i] += p[s] * v[(size_t)s * width + i];
                }
            }
        }
        free(p);
    }
}

// Writes dqkv (B,T,(H+2KV)*D). Of one query, with its probabilities p:
//   dv_s += p_s * dout     dp_s = dout . v_s     dscore_s = p_s * (dp_s - sum over r of p_r * dp_r)
//   dq += dscore_s * k_s / sqrt(D)               dk_s += dscore_s * q / sqrt(D)
// The third formula is the derivative of a softmax: d p_r / d score_s = p_r * ((r == s) - p_s).
// The sum over r is dout . out, since out = sum of p_r * v_r. One task owns a key and value head,
// so it alone adds to it.
void attention_backward(real *dqkv, const real *dout, const real *out, const real *lse, const real *qkv, int B, int T,
                        int H, int KV, int D) {
    int width = (H + 2 * KV) * D;
    real scale = (real)(1 / sqrt((double)D));
    memset(dqkv, 0, (size_t)B * T * width * sizeof(real));
#pragma omp parallel for
    for (int task = 0; task < B * KV; task++) {
        int b = task / KV, kv = task % KV;
        size_t keys = (size_t)b * T * width + (size_t)(H + kv) * D, values = keys + (size_t)KV * D;
        for (int h = kv * (H / KV); h < (kv + 1) * (H / KV); h++) {
            for (int t = 0; t < T; t++) {
                size_t query = ((size_t)b * T + t) * width + (size_t)h * D;
                const real *q = qkv + query, *d = dout + ((size_t)b * T + t) * H * D + (size_t)h * D;
                const real *o = out + ((size_t)b * T + t) * H * D + (size_t)h * D;
                real delta = 0; // dout . out
                for (int i = 0; i < D; i++) {
                    delta += d[i] * o[i];
                }
                for (int s = 0; s <= t; s++) {
                    const real *k = qkv + keys + (size_t)s * width, *v = qkv + values + (size_t)s * width;
                    real score = 0, dp = 0;
                    for (int i = 0; i < D; i++) {
                        score += q[i] * k[i] * scale;
                        dp += d[i] * v[i];
                    }
                    real p = (real)exp((double)(score - lse[((size_t)b * H + h) * T + t]));
                    real dscore = p * (dp - delta) * scale; // with the 1/sqrt(D)
                    for (int i = 0; i < D; i++) {
                        dqkv[values + (size_t)s * width + i] += p * d[i];
                        dqkv[keys + (size_t)s * width + i] += dscore * q[i];
                        dqkv[query + i] += dscore * k[i];
                    }
                }
            }
        }
    }
}

// ---- the activation of a feed-forward layer

// f(x); *slope is f'(x). SwiGLU and GEGLU use f for their gate: Shazeer 2020, GLU Variants Improve
// Transformer.
real activate(int activation, real x, real *slope) {
    double v = (double)x, f = 0, df = 0;
    if (activation == RELU) {
        f = v > 0 ? v : 0;
        df = v > 0;
    } else if (activation == SWIGLU) { // SiLU: x * sigmoid(x)
        double sigmoid = 1 / (1 + exp(-v));
        f = v * sigmoid;
        df = sigmoid * (1 + v * (1 - sigmoid));
    } else { // GELU, also for GEGLU: x * Phi(x), Phi the distribution function of the normal distribution
        double Phi = 0.5 * (1 + erf(v * 0.7071067811865476)); // 1 / sqrt(2)
        f = v * Phi;
        df = Phi + v * exp(-0.5 * v * v) * 0.3989422804014327; // 1 / sqrt(2 pi)
    }
    *slope = (real)df;
    return (real)f;
}

// act (rows,F) = f(gate) * up with hidden (rows,2F): F numbers of gate, then F of up. Not gated:
// f(hidden), hidden (rows,F).
void activation_forward(real *act, const real *hidden, int rows, int F, int activation) {
    int gated = is_gated(activation), width = F * (1 + gated); // of a row of hidden
#pragma omp parallel for
    for (int r = 0; r < rows; r++) {
        for (int j = 0; j < F; j++) {
            real slope, value = activate(activation, hidden[(size_t)r * width + j], &slope);
            act[(size_t)r * F + j] = gated ? value * hidden[(size_t)r * width + F + j] : value;
        }
    }
}

// The way back through the activation, and through the weight of an expert's answer. A token's sum
// has the term weight * (act W_out^T), so
//   the gradient by the weight   dweight = dout . (act W_out^T) = (dout W_out) . act
//   the gradient by act                    weight * (dout W_out)
//   the gradient by W_out                  dout^T (weight * act)
// The first one needs no copy of the answer. What the arrays hold (row r has the choice choice[r]):
//   dact (rows,F)                on entry dout W_out; on return weight * act, for the gradient by W_out
//   dhidden (rows,2F or F)       is written: the gradient by hidden, by the product rule for act = f(gate) * up
//   weight, dweight (choices)    dweight is written; weight NULL: all weights are 1, and there is no dweight
void activation_backward(real *dhidden, real *dweight, real *dact, const real *hidden, const real *weight,
                         const int *choice, int rows, int F, int activation) {
    int gated = is_gated(activation), width = F * (1 + gated); // of a row of hidden
#pragma omp parallel for
    for (int r = 0; r < rows; r++) {
        real w = weight ? weight[choice[r]] : 1, sum = 0;
        for (int j = 0; j < F; j++) {
            const real *gate = hidden + (size_t)r * width + j;
            real *dgate = dhidden + (size_t)r * width + j, *d = dact + (size_t)r * F + j;
            real slope, value = activate(activation, gate[0], &slope), up = gated ? gate[F] : 1;
            sum += *d * value * up;
            dgate[0] = w * *d * up * slope;
            if (gated) {
                dgate[F] = w * *d * value;
            }
            *d = w * value * up;
        }
        if (weight) {
            dweight[choice[r]] = sum;
        }
    }
}

// The sum of the squares of x (n).
double sum_of_squares(const real *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += (double)x[i] * (double)x[i];
    }
    return sum;
}

#ifndef PLAIN
#include "dev/cpu/fast.h" // from here on, the names above mean the fast functions of dev/cpu
#endif
#include "dev/lora.h" // --lora: products look whether a low-rank pair stands beside their matrix
#include "dev/offload_products.h" // --offload: grouped products fetch their experts from a file

// ---- rows, embedding and loss

void copy_rows(real *to, const real *from, int N, int C) { // (N,C)
#pragma omp parallel for if (is_worth_threads(N, C))
    for (int n = 0; n < N; n++) {
        memcpy(to + (size_t)n * C, from + (size_t)n * C, (size_t)C * sizeof(real));
    }
}

// x (N,C): each token's row of embedding (V,C)
void embedding_forward(real *x, const real *embedding, const int *tokens, int N, int C) {
#pragma omp parallel for if (is_worth_threads(N, C))
    for (int n = 0; n < N; n++) {
        memcpy(x + (size_t)n * C, embedding + (size_t)tokens[n] * C, (size_t)C * sizeof(real));
    }
}

// Adds to dembedding (V,C). A thread owns some of the columns, so no two threads add to the same
// number.
void embedding_backward(real *dembedding, const real *dx, const int *tokens, int N, int C) {
    int width = 32; // columns of a task
#pragma omp parallel for if (is_worth_threads(N, C))
    for (int first = 0; first < C; first += width) {
        int end = min_int(C, first + width);
        for (int n = 0; n < N; n++) {
            for (int c = first; c < end; c++) {
                dembedding[(size_t)tokens[n] * C + c] += dx[(size_t)n * C + c];
            }
        }
    }
}

// Rows of logits that are in memory at a time: 64 MiB of floats at most.
int logit_rows(int N, int V) {
    return max_int(1, min_int(N, (1 << 24) / V));
}

// The cross-entropy of N rows h (N,C) against their targets: nll (N) = -log softmax(h
// head^T)[target], in nats. The logits (N,V) would be the largest array of all, so only `rows` rows
// of them are in memory at a time, and the gradients of scale * sum(nll) are taken at once, while
// they are there: dh (N,C) is written, dhead (V,C) is added to. With dh NULL there are no
// gradients.
void head_loss(real *nll, real *dh, real *dhead, const real *h, const real *head, const int *targets, int N, int C, int V,
               double scale, real *logits, int rows) {
    for (int first = 0; first < N; first += rows) {
        int count = min_int(rows, N - first);
        const real *h_rows = h + (size_t)first * C;
        matmul(logits, h_rows, head, count, C, V, SET);
#pragma omp parallel for
        for (int i = 0; i < count; i++) {
            real *row = logits + (size_t)i * V;
            int target = targets[first + i];
            real wanted = row[target];
            nll[first + i] = softmax(row, V) - wanted;

            // The gradient by a logit is the probability, less 1 for the word that came.
            row[target] -= 1;
            for (int v = 0; dh && v < V; v++) {
                row[v] *= (real)scale;
            }
        }
        if (dh) {
            matmul_backward(dh + (size_t)first * C, dhead, logits, h_rows, head, count, C, V, SET);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. The mixture of experts
//
// Shazeer et al. 2017, Outrageously Large Neural Networks; in today's form Fedus et al. 2021,
// Switch Transformers. In the order in which it happens:
//
//   scores    how well each expert suits each token             p (N,E) = softmax(x router^T)
//   choice    which experts a token gets                        the K with the highest p
//   weight    how much each of their answers will count         p, divided by the sum of the K chosen p
//   balance   a loss that keeps the experts equally busy        E * sum over experts of f_e * P_e
//   capacity  an expert that is full refuses further tokens     usually there is no limit
//   sorting   the choices in the order of their experts, so that an expert's tokens are rows of one array
//   experts   each a small feed-forward layer, over its own rows
//   combining each token adds up its experts' answers, weighted
//
// A choice has no derivative. The router learns only by the weights of the experts that it did
// choose, and by losses of its own, above all the balance loss. Without that loss it soon sends all
// tokens to a few favourites, because an expert that gets more tokens learns faster, and so is
// chosen even more.

// Width and activation of expert e. All experts are alike, except with --mixed: then their widths
// are F/2, F, F, 3F/2 by turns, and their activations SwiGLU, GELU by turns.
int expert_width(const Config *c, int e) {
    if (c->mixed && (e % 4 == 0 || e % 4 == 3)) {
        return e % 4 == 0 ? c->ffn / 2 : c->ffn * 3 / 2;
    }
    return c->ffn;
}

int expert_activation(const Config *c, int e) {
    if (c->mixed) {
        return e % 2 ? GELU : SWIGLU;
    }
    return c->activation;
}

// Width of an expert before its activation: a gated one has F rows of gate and F rows of up.
int expert_hidden(const Config *c, int e) {
    return expert_width(c, e) * (1 + is_gated(expert_activation(c, e)));
}

// Width of what a router reads: C, but with --recurrent the width of its state, and with
// --subtokens a part of C.
int router_width(const Config *c) {
    return c->recurrent ? c->recurrent : c->dim / c->subtokens;
}

#include "dev/statistics.h" // what the log shows of the routing: choices of each expert, entropy of the scores, ...

#include "dev/routers/router.h" // Router: a struct of functions that route; this file has one, topk_router

// ---- scores

// p (rows,E) = softmax of each row of the logits, or sigmoid of each number; lse (rows): see
// softmax(). A logit of +infinity has to become NaN, which ends the run: softmax does that by
// itself, sigmoid by the term 0 * logit.
void scores_forward(real *p, real *lse, const real *logits, int rows, int E, int score) {
    memcpy(p, logits, (size_t)rows * E * sizeof(real));
#pragma omp parallel for if (is_worth_threads(rows, 16 * E))
    for (int row = 0; row < rows; row++) {
        real *own = p + (size_t)row * E;
        if (score == SOFTMAX) {
            lse[row] = softmax(own, E);
        } else {
            for (int e = 0; e < E; e++) {
                own[e] = (real)(1 / (1 + exp(-(double)own[e])) + 0 * (double)own[e]);
            }
        }
    }
}

// Writes dlogits (rows,E). Softmax: dlogit_e = p_e * (dp_e - sum_j p_j dp_j); sigmoid: dlogit_e =
// dp_e * p_e * (1 - p_e). The z-loss is z * lse^2 for each row, and the derivative of lse by a
// logit is that logit's p.
void scores_backward(real *dlogits, const real *dp, const real *p, const real *lse, int rows, int E, int score, double z) {
#pragma omp parallel for if (is_worth_threads(rows, 4 * E))
    for (int row = 0; row < rows; row++) {
        size_t at = (size_t)row * E;
        real sum = 0;
        for (int e = 0; e < E; e++) {
            sum += p[at + e] * dp[at + e];
        }
        for (int e = 0; e < E; e++) {
            if (score == SOFTMAX) {
                dlogits[at + e] = p[at + e] * (dp[at + e] - sum + (real)(2 * z) * lse[row]);
            } else {
                dlogits[at + e] = dp[at + e] * p[at + e] * (1 - p[at + e]);
            }
        }
    }
}

// ---- choice

// expert (N,K): the K largest numbers of each row of p (N,E), largest first; of equal ones the
// lower index comes first.
void select_topk(int *expert, const real *p, int N, int E, int K) {
#pragma omp parallel for if (is_worth_threads(N, K * E))
    for (int n = 0; n < N; n++) {
        const real *row = p + (size_t)n * E;
        int last = -1; // the expert that was chosen before
        for (int k = 0; k < K; k++) {
            // The best of those that come after the last one in the order of their scores.
            int best = -1;
            for (int e = 0; e < E; e++) {
                int after = last < 0 || row[e] < row[last] || (row[e] == row[last] && e > last);
                if (after && (best < 0 || row[e] > row[best])) {
                    best = e;
                }
            }
            last = best < 0 ? k : best; // there is none only where a score is not a number
            expert[(size_t)n * K + k] = last;
        }
    }
}

#ifndef PLAIN
#include "dev/cpu/choice.h" // from here on, scores_forward and select_topk mean those of dev/cpu
#endif

// ---- weight

// Scores that are divided by their sum count as 1e-30 at least. So if all sigmoid scores underflow,
// they share evenly, and the sum is not 0. A score that is raised has the derivative 0.
BOTH real at_least_tiny(real p) {
    return p < (real)1e-30 ? (real)1e-30 : p;
}

// weight (N,K) of each chosen expert: scale * p, or scale * p / (sum of the chosen p).
void weights_forward(real *weight, const real *p, const int *expert, int N, int E, int K, int gate, double scale) {
    for (int n = 0; n < N; n++) {
        real sum = 0;
        for (int k = 0; k < K; k++) {
            int e = expert[(size_t)n * K + k];
            real score = e < 0 ? 0 : at_least_tiny(p[(size_t)n * E + e]);
            weight[(size_t)n * K + k] = (real)scale * score;
            sum += score;
        }
        for (int k = 0; gate == RENORMALIZED && k < K; k++) {
            weight[(size_t)n * K + k] /= sum;
        }
    }
}

// Adds to dp (N,E). With w the weights and dw = dweight: PROBABILITY has dp_k = scale * dw_k.
// RENORMALIZED divides by the sum s of the chosen p; there w_k = scale * p_k / s depends on all
// chosen p, and the quotient rule gives dp_k = (scale * dw_k - sum over j of dw_j w_j) / s.
void weights_backward(real *dp, const real *dweight, const real *weight, const real *p, const int *expert, int N, int E,
                      int K, int gate, double scale) {
    for (int n = 0; n < N; n++) {
        real sum = 0, dot = 0;
        for (int k = 0; k < K; k++) {
            size_t choice = (size_t)n * K + k;
            sum += expert[choice] < 0 ? 0 : at_least_tiny(p[(size_t)n * E + expert[choice]]);
            dot += dweight[choice] * weight[choice];
        }
        for (int k = 0; k < K; k++) {
            size_t choice = (size_t)n * K + k;
            real d = (real)scale * dweight[choice];
            size_t at = (size_t)n * E + expert[choice];
            if (expert[choice] >= 0 && !(p[at] < at_least_tiny(p[at]))) {
                dp[at] += gate == RENORMALIZED ? (d - dot) / sum : d;
            }
        }
    }
}

// ---- balance
//
// The loss of Switch Transformers (Fedus et al. 2021, equation 4): E * sum over experts of f_e *
// P_e. f_e is the share of all choices that went to expert e, and P_e the mean of p_e over the
// tokens. It is 1 where all experts are equally busy, and larger where those chosen most often also
// have high scores.
//
// An example with 4 tokens, 2 experts and one choice each: three tokens choose expert 0, so
// f = (3/4, 1/4). If the scores are on average P = (0.7, 0.3), the loss is
// 2 * (3/4 * 0.7 + 1/4 * 0.3) = 1.2.
//
// Counts have no derivative, so for the gradient f is a constant. With slope_e = weight * E * f_e
// the weighted loss is the mean over tokens of the sum over experts of slope_e * p_e, and its
// derivative by each p_e is slope_e / N. Other balance losses have the same form with another
// slope.
//
// Tokens are taken in groups (--group). Counts, slopes and the capacity below are those of
//   SEQUENCE   each sequence on its own;
//   BATCH      all tokens of a micro-step, in all processes;
//   STEP       the same, but the counts are those of the whole step, as far as it has come.

// count (groups,E): how often each expert stands in expert (N,K), for each group of tokens.
void count_choices(double *count, const int *expert, int N, int E, int K, int group) {
    memset(count, 0, (size_t)(N / group) * E * sizeof(double));
    for (int choice = 0; choice < N * K; choice++) {
        if (expert[choice] >= 0) {
            count[(size_t)(choice / K / group) * E + expert[choice]] += 1;
        }
    }
}

// slope (E) += weight * E * f, with f = count / (sum of count).
void add_balance(double *slope, const double *count, int E, double weight) {
    double total = 0;
    for (int e = 0; e < E; e++) {
        total += count[e];
    }
    for (int e = 0; e < E && total > 0; e++) {
        slope[e] += weight * E * count[e] / total;
    }
}

// The sum over tokens of slope . p, divided by N. Sigmoid scores do not sum to 1, so each token's
// are divided by their sum.
double mean_of_slopes(const Route *r, int score) {
    double loss = 0;
    for (int n = 0; n < r->N; n++) {
        const double *slope = r->slope + (size_t)(n / r->group) * r->E;
        const real *p = r->p + (size_t)n * r->E;
        double dot = 0, sum = 0;
        for (int e = 0; e < r->E; e++) {
            dot += slope[e] * (double)at_least_tiny(p[e]);
        }
        for (int e = 0; e < r->E && score == SIGMOID; e++) {
            sum += (double)at_least_tiny(p[e]);
        }
        loss += score == SIGMOID ? dot / sum : dot;
    }
    return loss / r->N;
}

// All balance losses of a layer: r->aux, and r->slope for the backward pass.
void balance_forward(Model *m, int l, const real *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int N = r->N, E = r->E, K = r->K, groups = N / r->group;

    // The z-loss, the mean of lse^2, keeps the logits from growing (Zoph et al. 2022, ST-MoE,
    // equation 5). It goes with softmax scores only.
    for (int row = 0; c->z_weight > 0 && row < r->rows; row++) {
        r->aux += c->z_weight * (double)r->lse[row] * (double)r->lse[row] / r->rows;
    }

    if (r->slope) {
        // Count the choices of each group of tokens. DeepSeek-V3 counts what the scores would
        // choose without the bias.
        const int *balanced = r->served;
        if (c->balance == UNBIASED) {
            int *unbiased = (int *)arena_take(&m->scratch, (size_t)N * K, sizeof(int));
            select_topk(unbiased, r->p, N, E, K);
            balanced = unbiased;
        }
        count_choices(r->count, balanced, N, E, K, r->group);

        // A group may be all tokens of a step (Qiu et al. 2025, Demons in the Detail). Its later
        // micro-steps have not come yet, so the counts are those of the micro-steps up to this one.
        // And it may have tokens in other processes.
        if (c->group == STEP && m->batch.mode == TRAIN_MODE) {
            memcpy(r->count, m->stats[l].count, (size_t)E * sizeof(double));
        }
        if (c->group != SEQUENCE) {
            sum_over_ranks(r->count, E);
        }

        memset(r->slope, 0, (size_t)groups * E * sizeof(double));
        for (int i = 0; i < groups && (c->balance == SWITCH || c->balance == UNBIASED); i++) {
            add_balance(r->slope + (size_t)i * E, r->count + (size_t)i * E, E, c->aux_weight);
        }
    }

    // The losses of single papers (dev/routers) add to r->slope or to r->aux.
    run_parts(m, l, x, LOSS);
    if (r->slope) {
        r->aux += mean_of_slopes(r, c->score);
    }
}

// Adds to dp (N,E) the derivative of mean_of_slopes(): slope / N, or for sigmoid scores, by the
// quotient rule, (slope_e - sum over j of slope_j p_j / s) / s / N with s = sum(p).
void balance_backward(real *dp, const Route *r, int score, double loss_scale) {
    int E = r->E, sigmoid = score == SIGMOID;
    double scale = loss_scale / r->N;
#pragma omp parallel for if (is_worth_threads(r->N, 4 * E))
    for (int n = 0; n < r->N; n++) {
        const double *slope = r->slope + (size_t)(n / r->group) * E;
        const real *p = r->p + (size_t)n * E;
        double dot = 0, sum = sigmoid ? 0 : 1;
        for (int e = 0; sigmoid && e < E; e++) {
            dot += slope[e] * (double)at_least_tiny(p[e]);
            sum += (double)at_least_tiny(p[e]);
        }
        for (int e = 0; e < E; e++) { // with softmax, dot is 0 and sum is 1
            dp[(size_t)n * E + e] += p[e] < at_least_tiny(p[e]) ? 0 : (real)(scale * (slope[e] - dot / sum) / sum);
        }
    }
}

// ---- the router: scores, choice and weight together

// x (N,C) -> r->expert, r->weight.
void topk_forward(Model *m, int l, const real *x) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    Route *r = &m->acts.layer[l].route;
    int N = r->N, E = r->E, K = r->K, C = router_width(c);

    matmul(r->logits, x, w->router, N, C, E, SET);
    scores_forward(r->p, r->lse, r->logits, N, E, c->score);

    // With a selection bias, p + bias decides who is chosen; the weight is still made of p alone.
    // That way the bias can even out the load without pulling on what the model computes
    // (DeepSeek-AI 2024, DeepSeek-V3, section 2.1.2).
    const real *decides = r->p;
    if (w->bias) {
        real *biased = scratch(m, (size_t)N * E);
        for (size_t i = 0; i < (size_t)N * E; i++) {
            biased[i] = r->p[i] + w->bias[i % E];
        }
        decides = biased;
    }
    select_topk(r->expert, decides, N, E, K);
    weights_forward(r->weight, r->p, r->expert, N, E, K, c->gate, c->scale);
}

// From dweight (N,K) and the balance losses back to the router's matrix and to dx (N,C).
void topk_backward(Model *m, int l, real *dx, real *dweight, const real *x) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l], *dw = &m->grads.layer[l];
    Route *r = &m->acts.layer[l].route;
    int N = r->N, E = r->E, C = router_width(c);

    real *dp = scratch(m, (size_t)N * E), *dlogits = scratch(m, (size_t)N * E);
    memset(dp, 0, (size_t)N * E * sizeof(real));
    weights_backward(dp, dweight, r->weight, r->p, r->expert, N, E, r->K, c->gate, c->scale);
    balance_backward(dp, r, c->score, m->batch.scale);
    scores_backward(dlogits, dp, r->p, r->lse, N, E, c->score, c->z_weight * m->batch.scale / N);

    matmul_backward(dx, dw->router, dlogits, x, w->router, N, C, E, ADD);
}

const Router topk_router = {.place = CHOICE, .forward = topk_forward, .backward = topk_backward};

// ---- capacity and sorting

// An expert takes at most ceil(factor * topk * tokens / E) choices of a group; those that come
// later are refused. A token keeps its other experts, and what it is on the residual stream. In
// training all first choices are served before all second ones (Lepikhin et al. 2020, GShard,
// algorithm 1). At evaluation the tokens are served one after the other, so that no later token can
// decide what becomes of an earlier one. topk is the option --topk; it is less than K with routers
// that may choose more experts (dev/routers/threshold.h).
void drop_overflow(Route *r, double factor, int topk, int train) {
    int E = r->E, K = r->K, choices = r->group * K;
    int capacity = (int)fmin(ceil(factor * topk * r->group / E - 1e-9), (double)choices); // 1e-9: against rounding
    int *taken = (int *)allocate(E, sizeof(int));
    for (int first = 0; first < r->N; first += r->group) {
        memset(taken, 0, (size_t)E * sizeof(int));
        for (int i = 0; i < choices; i++) {
            int k_first = i % r->group * K + i / r->group; // of all tokens choice 0, then of all choice 1, ...
            int choice = first * K + (train ? k_first : i);
            int e = r->served[choice];
            if (e < 0) {
                continue;
            }
            if (taken[e] < capacity) {
                taken[e]++;
            } else {
                r->served[choice] = -1;
                r->dropped++;
            }
        }
    }
    free(taken);
}

// Counting sort: order lists 0 .. n-1 by key, those of equal keys in their own order; offset
// (keys+1) says where each key begins. Negative keys are left out.
void counting_sort(int *order, int *offset, const int *key, int n, int keys) {
    memset(offset, 0, ((size_t)keys + 1) * sizeof(int));
    for (int i = 0; i < n; i++) {
        if (key[i] >= 0) {
            offset[key[i] + 1]++;
        }
    }
    for (int k = 0; k < keys; k++) {
        offset[k + 1] += offset[k];
    }
    for (int i = 0; i < n; i++) {
        if (key[i] >= 0) {
            order[offset[key[i]]++] = i;
        }
    }

    // By now each offset has moved on to where the next key begins.
    for (int k = keys; k > 0; k--) {
        offset[k] = offset[k - 1];
    }
    offset[0] = 0;
}

// Sorts the choices that are served by their experts. An example with 3 tokens, 2 experts and K =
// 2, where expert 0 has refused the last choice:
//   served (3,2) = 1 0, 0 1, 1 -1       token 0 has experts 1 and 0, token 1 has 0 and 1, token 2 has 1
//   offset       = 0, 2, 5              expert 0 has rows 0 and 1, expert 1 has rows 2, 3 and 4
//   choice       = 1 2 0 3 4            rows 0, 1, ... belong to choices n*K + k = 1, 2, ...
//   token        = 0 1 0 1 2
//   row    (3,2) = 2 0, 1 3, 4 -1
void sort_by_expert(Route *r) {
    counting_sort(r->choice, r->offset, r->served, r->N * r->K, r->E);
    memset(r->row, -1, (size_t)r->N * r->K * sizeof(int));
    for (int row = 0; row < r->offset[r->E]; row++) {
        r->row[r->choice[row]] = row;
        r->token[row] = r->choice[row] / r->K;
    }
}

// ---- experts

#include "dev/kinds.h" // the activation of all experts, also where they are of several kinds (--mixed)

// answer (rows,C) of each expert to its rows of x (N,C): act W_out^T with act = f(x W_in^T). hidden
// (rows,2F) is kept.
void experts_forward(Model *m, real *answer, real *hidden, const real *x, const real *w_in, const real *w_out,
                     const int *token, const int *offset, const Experts *s) {
    real *act = scratch(m, sorted_size(offset, s->E, s->F));
    grouped_matmul(hidden, x, token, w_in, offset, s->E, s->in, s->hidden);
    experts_activation_forward(act, hidden, offset, s);
    grouped_matmul(answer, act, NULL, w_out, offset, s->E, s->F, s->out);
}

// dx (rows,C) and dweight (by choice) are written, dw_in and dw_out are added to; dout (N,C) is by
// token.
void experts_backward(Model *m, real *dx, real *dweight, real *dw_in, real *dw_out, const real *dout, const real *x,
                      const real *hidden, const real *weight, const real *w_in, const real *w_out, const int *token,
                      const int *choice, const int *offset, const Experts *s) {
    real *dact = scratch(m, sorted_size(offset, s->E, s->F)), *dhidden = scratch(m, sorted_size(offset, s->E, s->hidden));
    grouped_matmul_dx(dact, dout, token, w_out, offset, s->E, s->F, s->out);
    experts_activation_backward(dhidden, dweight, dact, hidden, weight, choice, offset, s);
    begin_products();
    grouped_matmul_dw(dw_out, dout, token, dact, NULL, offset, s->E, s->F, s->out); // dact is weight * act by now
    grouped_matmul_dw(dw_in, dhidden, NULL, x, token, offset, s->E, s->in, s->hidden);
    grouped_matmul_dx(dx, dhidden, NULL, w_in, offset, s->E, s->in, s->hidden);
    end_products();
}

// out (N,C) += the sum of each token's rows, times their weights; weight NULL: all weights are 1.
void combine(real *out, const real *rows, const real *weight, const int *row, int N, int K, int C) {
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++) {
        for (int choice = n * K; choice < (n + 1) * K; choice++) {
            if (row[choice] < 0) {
                continue;
            }
            const real *from = rows + (size_t)row[choice] * C;
            real w = weight ? weight[choice] : 1;
            for (int c = 0; c < C; c++) {
                out[(size_t)n * C + c] += w * from[c];
            }
        }
    }
}

#include "dev/ranks/experts.h" // several processes: rows go to where their experts are, and answers come back

// ---- the layer

// out (N,C) += sum over a token's experts of weight * expert(x). Sequences of x have T tokens.
void moe_forward(Model *m, int l, real *out, const real *x, int N, int T) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    Route *r = &m->acts.layer[l].route;
    int train = m->batch.mode == TRAIN_MODE, C = m->experts.C;
    scratch_reset(m);

    // Which experts does each token choose, and with which weights? Here --precision bf16 does not
    // hold, because a small change of a score can choose another expert.
    multiply_in(PRODUCTS_FP32);
    r->N = N;
    r->rows = N;
    r->group = c->group == SEQUENCE ? T : N;
    r->aux = 0;
    m->router->forward(m, l, x);

    // Some routers decline choices by chance. Only those that remain are counted, for the log and
    // for the balance losses.
    memcpy(r->served, r->expert, (size_t)N * r->K * sizeof(int));
    run_parts(m, l, x, DECLINE);
    if (train) {
        count_routing(&m->stats[l], r, c->score);
    }
    if (m->batch.mode != EVAL_MODE) {
        balance_forward(m, l, x);
    }

    // Capacity: an expert that is full refuses later choices.
    double factor = train ? c->capacity_factor : c->eval_capacity_factor;
    r->dropped = 0;
    if (factor > 0 && !run_parts(m, l, x, CAPACITY)) {
        drop_overflow(r, factor, c->topk, train);
    }
    m->stats[l].dropped += train ? r->dropped : 0;
    multiply_in(c->precision);

    // With several processes the rows go to where their experts are.
    if (ranks.ep > 1) {
        ranks_experts_forward(m, l, out, x);
        return;
    }

    // Sort the choices by expert, let each expert work on its own rows, and give each token the sum
    // of its answers.
    sort_by_expert(r);
    real *answer = scratch(m, (size_t)r->offset[r->E] * C);
    experts_forward(m, answer, m->acts.layer[l].hidden, x, w->w_in, w->w_out, r->token, r->offset, &m->experts);
    combine(out, answer, r->weight, r->row, N, r->K, C);
}

// Given dout (N,C): adds to dx (N,C) and to the gradients of the layer's weights.
void moe_backward(Model *m, int l, real *dx, const real *dout, const real *x) {
    const LayerParams *w = &m->params.layer[l], *dw = &m->grads.layer[l];
    Route *r = &m->acts.layer[l].route;
    int C = m->experts.C;
    scratch_reset(m);

    // Through the experts: the gradient by their rows, by their matrices, and by the weight of each
    // choice. A choice that was refused has no answer, so the gradient by its weight stays 0.
    real *dweight = scratch(m, (size_t)r->N * r->K);
    memset(dweight, 0, (size_t)r->N * r->K * sizeof(real));
    if (ranks.ep > 1) {
        ranks_experts_backward(m, l, dx, dweight, dout);
    } else {
        real *dx_rows = scratch(m, (size_t)r->offset[r->E] * C);
        experts_backward(m, dx_rows, dweight, dw->w_in, dw->w_out, dout, x, m->acts.layer[l].hidden, r->weight, w->w_in,
                         w->w_out, r->token, r->choice, r->offset, &m->experts);
        combine(dx, dx_rows, NULL, r->row, r->N, r->K, C);
    }

    // Through the router: from the weights, and from the balance losses, to its matrix and once
    // more to x.
    multiply_in(PRODUCTS_FP32);
    for (int i = 0; m->parts[i]; i++) {
        if (m->parts[i]->place == LOSS && m->parts[i]->backward) {
            m->parts[i]->backward(m, l, dx, dweight, x);
        }
    }
    m->router->backward(m, l, dx, dweight, x);
    multiply_in(m->config.precision);
}

// After a step: what changes without a gradient. The selection bias of each expert moves by a fixed
// step against its load (DeepSeek-AI 2024, DeepSeek-V3; Wang et al. 2024, Auxiliary-Loss-Free Load
// Balancing).
void router_update(Model *m) {
    const Config *c = &m->config;
    sum_statistics(m);
    for (int l = 0; l < c->layers; l++) {
        if (!is_moe(c, l) || c->lora) { // frozen
            continue;
        }
        real *bias = m->params.layer[l].bias;
        const double *count = m->stats[l].count;
        double mean = m->stats[l].active / c->experts; // active: choices of the step, of all experts together
        for (int e = 0; bias && e < c->experts; e++) {
            bias[e] += (real)(c->bias_rate * ((count[e] < mean) - (count[e] > mean)));
        }
        for (int i = 0; m->parts[i]; i++) {
            if (m->parts[i]->update) {
                m->parts[i]->update(m, l);
            }
        }
    }
}

// ---- feed-forward layers that every token passes: dense ones, and shared experts

#include "dev/shared_expert.h" // --shared-gate: each token decides how much it takes of the shared experts' answer

void dense_forward(Model *m, int l, real *out) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    LayerActs *a = &m->acts.layer[l];
    int N = m->batch.B * m->batch.T, F = dense_width(c, l), kind = dense_activation(c, l);
    int hidden = F * (1 + is_gated(kind));
    scratch_reset(m);
    real *act = scratch(m, (size_t)N * F);
    matmul(a->dense_hidden, a->h2, w->dense_in, N, c->dim, hidden, SET);
    activation_forward(act, a->dense_hidden, N, F, kind);
    shared_gate_forward(m, l, act, N, F); // nothing; with --shared-gate act times a gate of each token
    matmul(out, act, w->dense_out, N, F, c->dim, ADD);
}

// Adds to dx (N,C).
void dense_backward(Model *m, int l, real *dx, const real *dout) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l], *dw = &m->grads.layer[l];
    const LayerActs *a = &m->acts.layer[l];
    int N = m->batch.B * m->batch.T, F = dense_width(c, l), kind = dense_activation(c, l);
    int hidden = F * (1 + is_gated(kind));
    scratch_reset(m);
    real *dact = scratch(m, (size_t)N * F), *dhidden = scratch(m, (size_t)N * hidden);
    matmul_dx(dact, dout, w->dense_out, N, F, c->dim, SET);
    shared_activation_backward(m, l, dx, dhidden, dact, N, F, kind); // activation_backward(), and through that gate
    begin_products();
    matmul_dw(dw->dense_out, dout, dact, N, F, c->dim); // dact is act by now
    matmul_backward(dx, dw->dense_in, dhidden, a->h2, w->dense_in, N, c->dim, hidden, ADD);
    end_products();
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. Memory and first weights
//
// All weights stand in one table. The arrays of weights, gradients and moments are laid out by it,
// and whatever is done to all weights (first values, updates, checkpoints, tests) is one loop over
// its rows.

#include "dev/ranks/gradients.h" // several processes: what each of them has, sums of gradients, shares of the update

// ---- the table of weights

#define NO_FIELD ((size_t)-1)

// Appends a tensor of a x b x c numbers, if it has any; the leading ones are 1 where it has fewer
// than three dimensions. field: where LayerParams, or Params for layer -1, has its pointer. Returns
// the row, which does not count if the tensor has no numbers.
Tensor *add_tensor(Tensor *list, int *count, int layer, const char *kind, size_t field, int dims, int a, int b, int c,
                   int init) {
    Tensor *t = &list[*count];
    size_t size = (size_t)a * (size_t)b * (size_t)c;
    Tensor fresh = {"", kind, layer, dims, {a, b, c}, init, 1, 0, 0, field, 0, size, 0, size};
    *t = fresh;
    if (layer < 0) {
        snprintf(t->name, sizeof(t->name), "%s", kind);
    } else {
        snprintf(t->name, sizeof(t->name), "layer%d.%s", layer, kind);
    }
    *count += size > 0;
    return t;
}

// The row of a layer's tensor; -1 where it has none of this kind.
int find_tensor(const Model *m, int l, const char *kind) {
    int i = m->tensor_count - 1;
    while (i >= 0 && (m->tensors[i].layer != l || strcmp(m->tensors[i].kind, kind))) {
        i--;
    }
    return i;
}

// A weight that a router has for itself, and its gradient; NULL where there is none of this kind.
real *layer_tensor(const Model *m, int l, const char *kind, int what) {
    int i = find_tensor(m, l, kind);
    return i < 0 ? NULL : m->memory[what] + m->tensors[i].offset;
}

#define IN_LAYER(name) #name, offsetof(LayerParams, name)
#define IN_MODEL(name) #name, offsetof(Params, name)

#include "dev/mixers/all.h"  // what may stand in attention's place: an LSTM, attention with experts
#include "dev/routers/all.h" // the routers of single papers, and which of them the options ask for
#include "dev/lora_tensors.h" // --lora: which matrices have a pair; all else is frozen

int tensor_limit(const Config *c) { // more rows than any model's table has
    return 40 * c->layers + 20;
}

// Writes the table of all weights into list, which must hold tensor_limit(c) rows; returns their number.
int model_tensors(const Config *c, Tensor *list) {
    int count = 0, C = c->dim, D = head_width(c), narrow = C / c->subtokens;
    add_tensor(list, &count, -1, IN_MODEL(embed), 2, 1, c->vocab, C, INIT_NORMAL);
    add_tensor(list, &count, -1, IN_MODEL(ngrams), 2, 1, c->ngrams, C, INIT_ZERO)->looked_up = BY_NGRAM;
    for (int l = 0; l < c->layers; l++) {
        int E = is_moe(c, l) ? c->experts : 0, F = dense_width(c, l), gated = is_gated(dense_activation(c, l)), rows = 0;
        for (int e = 0; e < E; e++) {
            rows += expert_hidden(c, e);
        }
        int matrices = c->mixed ? 1 : E; // --mixed: w_in is one block after the other; c->ffn is the mean width
        add_tensor(list, &count, l, IN_LAYER(norm1), 1, 1, 1, c->norms ? C : 0, INIT_ONE);
        if (!add_mixer_tensors(c, l, list, &count)) {
            add_tensor(list, &count, l, IN_LAYER(qkv), 2, 1, (c->heads + 2 * c->kv_heads) * D, C, INIT_NORMAL);
            attention_extras(c, l, list, &count); // qkv_bias, q_norm, k_norm, value_embed: few models have them
            add_tensor(list, &count, l, IN_LAYER(proj), 2, 1, C, c->heads * D, INIT_RESIDUAL);
        }
        add_tensor(list, &count, l, IN_LAYER(ngram_key), 1, 1, 1, c->ngram_gate ? C : 0, INIT_ZERO);
        add_tensor(list, &count, l, IN_LAYER(ngram_value), 1, 1, 1, c->ngram_gate ? C : 0, INIT_ONE);
        add_tensor(list, &count, l, IN_LAYER(norm2), 1, 1, 1, c->norms && feeds(c, l) ? C : 0, INIT_ONE);
        if (E) {
            add_tensor(list, &count, l, IN_LAYER(router), 2, 1, router_outputs(c), router_width(c), INIT_NORMAL);
            add_tensor(list, &count, l, IN_LAYER(w_in), 3, matrices, rows / matrices, narrow, INIT_NORMAL)->of_experts = 1;
            add_tensor(list, &count, l, IN_LAYER(w_out), 3, E, narrow, c->ffn, INIT_RESIDUAL)->of_experts = 1;
        }
        add_tensor(list, &count, l, IN_LAYER(dense_in), 2, 1, F * (1 + gated), C, INIT_NORMAL);
        add_tensor(list, &count, l, IN_LAYER(dense_out), 2, 1, C, F, INIT_RESIDUAL);
        add_tensor(list, &count, l, IN_LAYER(shared_router), 2, 1, c->shared_gate && E && F, C, INIT_NORMAL);
        if (E) {
            add_router_tensors(c, l, list, &count);
            add_tensor(list, &count, l, IN_LAYER(bias), 1, 1, 1, c->bias_rate > 0 ? E : 0, INIT_ZERO)->trained = 0;
        }
    }
    add_tensor(list, &count, -1, IN_MODEL(norm), 1, 1, 1, c->norms ? C : 0, INIT_ONE);
    add_tensor(list, &count, -1, IN_MODEL(head), 2, 1, c->untied ? c->vocab : 0, C, INIT_NORMAL);
    add_router_tensors(c, -1, list, &count);
    add_pair_tensors(c, list, &count);
    return without_blocks(c, list, count); // dev/quantized.h: those of few bits lie elsewhere
}

// Where each tensor lies: first what all processes have in common, then the experts, then tables
// that are looked up. Each tensor begins at a multiple of `unit` numbers, which a GPU wants.
void lay_out(Model *m, Tensor *list, size_t unit) {
    size_t at = 0;
    m->tensors = list;
    m->tensor_count = model_tensors(&m->config, list);
    size_t *ends[] = {&m->pairs, &m->common, &m->tables, &m->size};
    for (int arena = 0; arena < 4; arena++) {
        for (int i = 0; i < m->tensor_count; i++) {
            Tensor *t = &list[i];
            // A matrix of words is filled up to a multiple of `unit` rows, since a GPU multiplies only such fast.
            size_t step = t->layer < 0 && t->dims == 2 ? unit * (size_t)t->shape[2] : unit;
            if (memory_part(t) == arena) {
                t->offset = at;
                at += (t->size + step - 1) / step * step;
            }
        }
        *ends[arena] = at;
    }
    ranks_lay_out(m, unit); // several processes: each has only some of the experts
}

// Points a Params to an array of all weights, or of all gradients: each row of the table says where
// its pointer stands in the struct, and where its numbers begin in the array.
void point_params(Model *m, Params *p, real *memory) {
    p->layer = (LayerParams *)own(m, m->config.layers, sizeof(LayerParams));
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        char *base = t->layer < 0 ? (char *)p : (char *)&p->layer[t->layer];
        if (t->field != NO_FIELD) {
            *(real **)(base + t->field) = place_of(m, i, memory);
        }
    }
    if (!p->head) {
        p->head = p->embed;
    }
}

// ---- the first weights

// Standard deviation of a tensor's first weights. "normal": 0.02, and 1/sqrt(2L) of that for what
// is added to the residual stream (Radford et al. 2019, GPT-2). "truncated": sqrt(0.1 / inputs),
// and nothing beyond two standard deviations (Fedus et al. 2021, Switch Transformers).
double first_deviation(const Config *c, const Tensor *t, int truncated) {
    if (t->init == INIT_ZERO || t->init == INIT_ONE) {
        return 0;
    }
    if (truncated) {
        return sqrt(0.1 / t->shape[2]);
    }
    if (t->init == INIT_FAN_IN) { // square matrices of routers in dev/routers
        return sqrt(0.5 / t->shape[2]);
    }
    return t->init == INIT_RESIDUAL ? 0.02 / sqrt(2.0 * c->layers) : 0.02;
}

// The weights w of tensor i at step 0. frequency (V): how often each word comes in the training
// text; NULL: that is not known.
void init_tensor(const Model *m, int i, real *w, const double *frequency) {
    const Config *c = &m->config;
    const Tensor *t = &m->tensors[i];
    int truncated = c->init_scheme == TRUNCATED && strcmp(t->kind, "embed");
    double deviation = first_deviation(c, t, truncated), mean = t->init == INIT_ONE;
    uint64_t stream = random_stream((uint64_t)c->seed, RANDOM_INIT, (uint64_t)i, 0);
#pragma omp parallel for
    for (size_t j = 0; j < t->size; j++) {
        double z = deviation > 0 ? random_normal(stream, t->first + j) : 0;
        for (uint64_t again = 1; truncated && fabs(z) > 2; again++) {
            z = random_normal(stream, t->first + j + again * t->whole);
        }
        w[j] = (real)(deviation * z + mean);
    }
    init_router_tensor(m, i, w, frequency);
}

void model_init(Model *m, const double *frequency) {
    for (int i = 0; i < m->tensor_count; i++) {
        init_tensor(m, i, m->memory[WEIGHTS] + m->tensors[i].offset, frequency);
        let_go_of_tensor(m, WEIGHTS, i); // --offload
    }
}

// ---- the model's arrays

#include "dev/activations.h" // the arrays of Acts, Route and Experts; the end of a model

// A model with buffers for N tokens. train 0: no gradients and no moments. weights: those of
// another model, or NULL.
Model *model_allocate(const Config *config, int N, int train, real *weights) {
    Model *m = (Model *)allocate(1, sizeof(Model));
    const Config *c = &m->config;
    m->config = *config;
    m->max_tokens = N;
    choose_routers(m);

    // Weights, and for training their gradients and the optimizer's two moments.
    lay_out(m, (Tensor *)own(m, tensor_limit(c), sizeof(Tensor)), 1);
    own_arrays(m, train, weights); // m->memory[WEIGHTS]; in training [GRADS], [MOMENT1] and [MOMENT2], zeroed
    point_params(m, &m->params, m->memory[WEIGHTS]);
    if (train) {
        point_params(m, &m->grads, m->memory[GRADS]);
    }

    register_pairs(m, train);
    allocate_activations(m, N, train); // and what is needed only while something works
    return m;
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. The whole model, forward and backward
//
// A layer adds to the residual stream twice: mid = x + attention(rmsnorm(x)), and then the next
// layer's x = mid + feed-forward layers(rmsnorm(mid)). So its backward pass has the gradient by the
// residual stream in one array, dx, and each of the two norms adds its part to it. At first reading
// norm_forward() is rmsnorm_forward(), and what has `branch` in its name copies x or does nothing.

#include "dev/parts.h" // what few models have: norms of queries and keys, tables, dropout, a gate, or no norms

// out (N,C) += attention of layer l to x (N,C).
void attention_layer_forward(Model *m, int l, real *out, const real *x) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    LayerActs *a = &m->acts.layer[l];
    int B = m->batch.B, T = m->batch.T, N = B * T, C = c->dim;
    int H = c->heads, KV = c->kv_heads, D = head_width(c), Q = (H + 2 * KV) * D;

    matmul(a->qkv, x, w->qkv, N, C, Q, SET);
    qkv_parts_forward(m, l, a->qkv); // nothing, unless options ask for a bias, norms or a table of values: dev/parts.h
    rope(a->qkv, Q, N, T, H + KV, D, m->angles, 1);
    attention_forward(a->att, a->lse, a->qkv, B, T, H, KV, D);
    matmul(out, a->att, w->proj, N, H * D, C, ADD);
}

// Given dout (N,C): writes dx (N,C), and adds to the gradients of the layer's attention.
void attention_layer_backward(Model *m, int l, real *dx, const real *dout, const real *x) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l], *dw = &m->grads.layer[l];
    LayerActs *a = &m->acts.layer[l];
    int B = m->batch.B, T = m->batch.T, N = B * T, C = c->dim;
    int H = c->heads, KV = c->kv_heads, D = head_width(c), Q = (H + 2 * KV) * D;
    scratch_reset(m);
    real *datt = scratch(m, (size_t)N * H * D), *dqkv = scratch(m, (size_t)N * Q);

    matmul_backward(datt, dw->proj, dout, a->att, w->proj, N, H * D, C, SET);
    attention_backward(dqkv, datt, a->att, a->lse, a->qkv, B, T, H, KV, D);
    rope(dqkv, Q, N, T, H + KV, D, m->angles, -1);
    qkv_parts_backward(m, l, dqkv);
    matmul_backward(dx, dw->qkv, dqkv, x, w->qkv, N, C, Q, SET);
}

// The first half of layer l, from a->x to a->h2: x + attention(rmsnorm(x)), and the norm of that.
// In attention's place may stand another mixer, as dev/mixers calls what mixes along the sequence.
void mix_forward(Model *m, int l) {
    const LayerParams *w = &m->params.layer[l];
    LayerActs *a = &m->acts.layer[l];
    int N = m->batch.B * m->batch.T;
    norm_forward(m, a->h1, a->rstd1, a->x, w->norm1, N);
    begin_branch(m, l, MIXING, a->mid, a->x); // mid = x; with --dropout 0
    if (!mixer_forward(m, l, a->mid, a->h1)) {
        attention_layer_forward(m, l, a->mid, a->h1);
    }
    end_branch(m, l, MIXING, a->mid, a->x); // nothing; with --dropout mid = x + dropout(mid)
    norm_forward(m, a->h2, a->rstd2, a->mid, w->norm2, N);
    m->at_hand = l;
}

// The backward pass of mix_forward(). dx (N,C) comes in as the gradient by the layer's output, and
// dh2 (N,C) as that by a->h2. With what the second norm adds, dx is the gradient by a->mid; with
// what the first one adds, that by a->x. dh2 is overwritten.
void mix_backward(Model *m, int l, real *dx, real *dh2) {
    const LayerParams *w = &m->params.layer[l], *dw = &m->grads.layer[l];
    LayerActs *a = &m->acts.layer[l];
    int N = m->batch.B * m->batch.T;
    real *dh1 = dh2;
    norm_backward(m, dx, dw->norm2, dh2, a->mid, a->rstd2, w->norm2, N);
    const real *dmixed = branch_gradient(m, l, MIXING, dx); // dx itself; with --dropout a copy, of which the same are 0
    if (!mixer_backward(m, l, dh1, dmixed, a->h1)) {
        attention_layer_backward(m, l, dh1, dmixed, a->h1);
    }
    norm_backward(m, dx, dw->norm1, dh1, a->x, a->rstd1, w->norm1, N);
}

// The second half: out (N,C) += the feed-forward layers of a->h2.
void feed_forward(Model *m, int l, real *out) {
    LayerActs *a = &m->acts.layer[l];
    if (m->params.layer[l].dense_in) {
        dense_forward(m, l, out);
    }
    if (!is_moe(&m->config, l)) {
        return;
    }
    if (m->config.subtokens > 1) {
        subtokens_forward(m, l, out, a->h2); // each token is split into several, which are routed apart
    } else {
        moe_forward(m, l, out, a->h2, m->batch.B * m->batch.T, m->batch.T);
    }
}

// The backward pass of feed_forward(): given dout (N,C), dh2 (N,C) is written.
void feed_backward(Model *m, int l, real *dh2, const real *dout) {
    LayerActs *a = &m->acts.layer[l];
    memset(dh2, 0, (size_t)m->batch.B * m->batch.T * m->config.dim * sizeof(real));
    if (m->params.layer[l].dense_in) {
        dense_backward(m, l, dh2, dout);
    }
    if (!is_moe(&m->config, l)) {
        return;
    }
    if (m->config.subtokens > 1) {
        subtokens_backward(m, l, dh2, dout, a->h2);
    } else {
        moe_backward(m, l, dh2, dout, a->h2);
    }
}

#include "dev/recompute.h" // --recompute: a layer's activations once more, on the way back

// The balance losses of the last batch, weighted: they are added to the loss for the gradient, and
// reported apart.
double balance_losses(const Model *m) {
    double aux = 0;
    for (int l = 0; l < m->config.layers; l++) {
        aux += m->acts.layer[l].route.aux + m->acts.layer[l].mixer_aux;
    }
    return aux;
}

// Runs a batch. Returns the mean loss of its tokens; m->acts.nll (N) has each token's. Except at
// evaluation it also adds the head's gradient, and leaves the gradient by h in m->acts.dh, for
// model_backward().
double model_forward(Model *m, const Batch *batch) {
    const Config *c = &m->config;
    Acts *a = &m->acts;
    int N = batch->B * batch->T, C = c->dim, gradients = batch->mode != EVAL_MODE;
    m->batch = *batch;
    multiply_in(c->precision);
    ranks_begin_batch(m);
    if (batch->mode == TRAIN_MODE && batch->first) {
        clear_statistics(m);
    }

    // From tokens to the last layer's output. Each layer adds to the residual stream.
    embedding_forward(a->layer[0].x, m->params.embed, batch->inputs, N, C);
    ngrams_forward(m, a->layer[0].x, NULL);
    drop_embedding(m, a->layer[0].x);
    for (int l = 0; l < c->layers; l++) {
        real *out = l + 1 < c->layers ? a->layer[l + 1].x : a->x;
        mix_forward(m, l);
        begin_branch(m, l, FEEDING, out, a->layer[l].mid);
        feed_forward(m, l, out);
        end_branch(m, l, FEEDING, out, a->layer[l].mid);
        ngram_gate_forward(m, l, out, a->layer[l].mid); // --ngram-gate
    }

    // From there to the loss. The gradient by h is taken at once, since the logits are not kept.
    norm_forward(m, a->h, a->rstd, a->x, m->params.norm, N);
    scratch_reset(m);
    int rows = logit_rows(N, c->vocab);
    if (!taught_loss(m, rows)) { // with --teacher the other words count, too: dev/teacher.h
        head_loss(a->nll, gradients ? a->dh : NULL, m->grads.head, a->h, m->params.head, batch->targets, N, C, c->vocab,
                  batch->scale / max_int(N, 1), scratch(m, (size_t)rows * c->vocab), rows);
    }
    double loss = 0;
    for (int n = 0; n < N; n++) {
        loss += (double)a->nll[n] / N;
    }
    m->loss = (batch->first ? 0 : m->loss) + batch->scale * loss;
    m->aux = (batch->first ? 0 : m->aux) + batch->scale * balance_losses(m);
    return loss;
}

// Adds all gradients of the last batch but the head's: of batch.scale * (loss + balance losses).
void model_backward(Model *m) {
    const Config *c = &m->config;
    Acts *a = &m->acts;
    int N = m->batch.B * m->batch.T, C = c->dim;
    real *dx = m->dx, *dh2 = a->dh; // after the last norm dh is not needed any more

    multiply_in(c->precision);
    memset(dx, 0, (size_t)N * C * sizeof(real));
    norm_backward(m, dx, m->grads.norm, a->dh, a->x, a->rstd, m->params.norm, N);
    for (int l = c->layers - 1; l >= 0; l--) {
        if (c->recompute && l != m->at_hand) {
            recompute_layer(m, l);
        }
        feed_backward(m, l, dh2, branch_gradient(m, l, FEEDING, dx));
        ngram_gate_backward(m, l, dx); // --ngram-gate
        mix_backward(m, l, dx, dh2);
        ranks_layer_done(m, l); // several processes: this layer's gradients can be summed
    }
    drop_embedding(m, dx);
    embedding_backward(m->grads.embed, dx, m->batch.inputs, m->grads.embed ? N : 0, C); // none where it is frozen
    ngrams_backward(m, dx);
    ranks_layer_done(m, -1);
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. The optimizer
//
// The gradients of a step are scaled down if they are too large together, and the weights move
// against them: all by AdamW with --optimizer adamw. By default Muon, which has a file of its own,
// moves the matrices of the layers, and AdamW the rest.

#include "dev/moments.h" // --moments bf16: the optimizer's moments in bfloat16
#include "dev/muon.h"    // --optimizer muon: another step for the matrices of the layers

// The learning rate of step 1, 2, ..., steps: a straight line up over the warm-up, then, unless it
// stays constant, down to --min-lr, by default a tenth of --lr.
double learning_rate(const Config *c, int step) {
    double low = c->min_lr < 0 ? c->lr / 10 : c->min_lr;
    if (step <= c->warmup) {
        return c->lr * step / c->warmup;
    }
    if (c->schedule == CONSTANT) {
        return c->lr;
    }
    if (step >= c->steps) {
        return low;
    }
    if (c->schedule == WSD) { // warm-up, stable, decay: a straight line over the last fifth (Hu et al. 2024, MiniCPM)
        double start = fmax(c->warmup, 0.8 * c->steps);
        return step <= start ? c->lr : c->lr + (low - c->lr) * (step - start) / (c->steps - start);
    }
    double done = (double)(step - c->warmup) / (c->steps - c->warmup); // half of a cosine's wave
    return low + (c->lr - low) * 0.5 * (1 + cos(3.141592653589793 * done));
}

// The norm of all gradients together.
double gradient_norm(Model *m) {
    return sqrt(ranks_sum_of_squares(m) + squares_of_read_rows(m)); // one process: sum_of_squares() of memory[GRADS]
}

// What AdamW needs to know of a step and a tensor.
typedef struct Adam {
    real scale;              // of the gradients: 1, or what clipping makes of it
    real b1, b2;             // memory of the two averages
    real correct1, correct2; // for having begun at 0, by the number of the step
    real rate, keep;         // learning rate; what weight decay leaves of a weight
} Adam;

// AdamW: Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization. m1 and m2 are moving
// averages of each gradient and of its square; a weight moves against m1 / sqrt(m2), both corrected
// for having begun at 0. All arrays have n numbers; the gradients are cleared for the next step.
void adamw(real *w, real *g, real *m1, real *m2, size_t n, Adam a) {
    for (size_t j = 0; j < n; j++) {
        real grad = g[j] * a.scale;
        m1[j] = a.b1 * m1[j] + (1 - a.b1) * grad;
        m2[j] = a.b2 * m2[j] + (1 - a.b2) * grad * grad;
        w[j] = a.keep * w[j] - a.rate * (m1[j] * a.correct1) / ((real)sqrt(m2[j] * a.correct2) + (real)1e-8);
        g[j] = 0;
    }
}

#include "dev/read_rows.h" // AdamW of a whole tensor by all threads; of a table, only of the rows that the step has read

// Moves all weights, Muon's first. Matrices decay; vectors do not, nor do tables that are looked
// up. If the norm of all gradients is above --clip, they are scaled down to it. step counts from 1.
void model_update(Model *m, int step, double lr, double norm) {
    const Config *c = &m->config;
    real scale = (real)(c->clip > 0 && norm > c->clip ? c->clip / norm : 1);
    real correct1 = (real)(1 / (1 - pow(c->beta1, step))), correct2 = (real)(1 / (1 - pow(c->beta2, step)));
    muon_update(m, step, lr, scale);
#pragma omp parallel // each thread does its part of every tensor, and does not wait for the others between two
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        size_t at = t->offset, size = t->size;
        ranks_own_range(m, t, &at, &size); // several processes: each updates its share of what all have
        if (!t->trained || !size || takes_muon(c, t)) {
            continue;
        }
        double decay = t->dims == 1 || t->looked_up ? 0 : c->weight_decay;
        Adam a = {scale, (real)c->beta1, (real)c->beta2, correct1, correct2, (real)lr, (real)(1 - lr * decay)};
        adamw_of_tensor(m, t, at, size, a, step); // and rounds the moments, if --moments asks for it
    }
    ranks_share_weights(m);
    forget_read_rows(m);
    router_update(m);
    ranks_move_copies(m, step);
}

// ---------------------------------------------------------------------------------------------------------------------
// 7. Training
//
// The loop at the end of this chapter is the same on every device. What it asks of one is in a
// Backend; this file's is the CPU's.

#include "dev/ranks/files.h" // several processes: one of them reads and writes for all
#include "data/checkpoint.h" // a model as a Hugging Face directory, written and read
#include "dev/generate.h"    // the next token, from a cache of keys and values

typedef struct Backend {
    const char *name;
    Model *(*create)(const Config *config, int tokens, int train, real *weights);
    void (*release)(Model *m);
    void (*init)(Model *m, const double *frequency);
    void (*forward)(Model *m, const Batch *batch);
    void (*backward)(Model *m);
    void (*update)(Model *m, int step, double lr); // changes nothing where the gradients' norm is not finite
    void (*losses)(Model *m, double *loss, double *aux, double *norm); // of the step, in this process; waits for them
    void (*generate)(Model *m, int token, int position, real *logits);
    const Statistics *(*statistics)(const Model *m, int l);
    const Route *(*route)(const Model *m, int l);  // of the last forward pass, in the host's memory
    // One tensor's WEIGHTS, GRADS, ..., all of them, into the host's memory and back.
    void (*read)(Model *m, int what, int tensor, real *to);
    void (*write)(Model *m, int what, int tensor, const real *from);
    double (*peak)(void);                          // operations per second that the device can do at most, measured
    double (*sheet_peak)(void);                    // the same by the device's data sheet; 0: unknown
    void (*device)(char name[128]);
    double (*memory)(void);                        // bytes of memory of its own; 0: it has the host's
    void (*remember)(Model *m, int l, const double *recent, const int *idle); // puts these into the statistics
} Backend;

#include "dev/cpu/backend.h" // cpu_backend: such a table of the functions above
#include "dev/run.h"         // the run directory, log and progress, evaluation, stories, the start and the end of the program

// The whole program, on a device. Returns its exit status.
int train_moe(int argc, char **argv, const Backend *backend) {
    Run run;
    int status = open_run(&run, argc, argv, backend);
    if (!run.opened) { // -h, --prompt, and the like: all is done, or there is nothing to do
        return status;
    }
    const Config *c = &run.config;
    Model *m = run.model;

    while (run.step < c->steps && !asked_to_stop(&run)) {
        int step = run.step + 1, last = step == c->steps;
        double lr = learning_rate(c, step);
        begin_step(&run);

        // A step's batch comes in --accum pieces, whose gradients add up.
        for (int micro = 0; micro < c->accum; micro++) {
            Batch batch = next_batch(&run, micro); // each of several processes has its own sequences
            backend->forward(m, &batch);
            backend->backward(m);
        }
        backend->update(m, step, lr);
        end_step(&run, step, lr); // run.step = step; log and progress; ends the program if the loss or the norm is not finite

        if (last || is_due(step, c->eval_every)) {
            report_evaluation(&run);
        }
        if (last || is_due(step, c->sample_every)) {
            tell_story(&run);
        }
        if (last || is_due(step, c->save_every)) {
            save_checkpoint(&run);
        }
    }
    return close_run(&run);
}

#ifndef TRAIN_MOE_NO_MAIN
int main(int argc, char **argv) {
    return run_program(argc, argv, &cpu_backend, train_moe);
}
#endif
