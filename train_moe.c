// train_moe.c: trains a Mixture-of-Experts language model from scratch, on the CPU, in one file.
//
// It is the whole trainer: configuration, matrix product, attention, router, experts, every backward pass, AdamW,
// tokenizer, data, checkpoints and generation. It is not a framework: there is no autograd, each gradient is written
// out by hand and checked against finite differences in test_moe.c. Read it from top to bottom.
//
//   make train_moe        a C compiler and make are all it takes; OpenMP is used where the compiler has it
//   ./train_moe           trains on the built-in stories and tells one
//   ./train_moe -h        every option
//
// The model, with the shape of what flows (B sequences of T tokens, N = B*T; C = --dim):
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
//        |                         |   plan: tokens sorted by expert      gate weight     |
//        |                         |        |                                      |      |
//        |                         +--> expert 0:  rows off[0]..off[1] --+         v      |
//        |                         +--> expert 1:  rows off[1]..off[2] --+-->  weighted --(+)
//        |                         +--> ...                              |        sum     |
//        |                         +--> expert E-1                     --+                |
//        |  <-----------------------------------------------------------------------------+
//        v
//     rmsnorm --> logits (N,V) = x . embedding^T --> cross-entropy
//
// A feed-forward layer in a dense GPT is one pair of matrices that every token passes. Here there are E such pairs,
// the experts, and a small linear map, the router, sends each token to K of them: E/K times the weights for the same
// work per token. What a dense trainer would not have is in section 6 and, put together, in 7.
//
// Letters, everywhere: B batch, T sequence length, N tokens = B*T, C model width, V vocabulary, L layers, H query heads,
// KV key/value heads, D = C/H head width, E experts, K experts per token, F expert hidden width, S shared experts.
// A comment such as "x (N,C)" gives an array's shape, row-major. Gradients are named like their value with a d before.
// The file is C11 and C++17 at once, so that a CUDA twin can include it and replace only what computes.

#include "dev/util.h"
#include "data/json.h"
#include "data/tokenizer.h"
#include "data/loader.h"
#include "dev/options.h"
#include "dev/ranks/comm.h"
#include "dev/cpu/attention.h"

// ---------------------------------------------------------------------------------------------------------------------
// 5. Norm, softmax, rotary positions, attention, embedding
//
// The layers that every transformer has: a forward and a backward function each, over plain arrays. A backward function
// adds to its gradients (dx, dw) unless its comment says that it writes them. Sums over tokens are taken in chunks of a
// fixed size and the chunks added in order, so that any number of threads gives the same bits.

#define CHUNK 128 // tokens
// out (N,C) = x / rms(x) * w, w (C); rms(x) = sqrt(mean(x^2) + eps), its inverse kept in rstd (N).
// Zhang and Sennrich 2019, Root Mean Square Layer Normalization.
void rmsnorm_forward(real *out, real *rstd, const real *x, const real *w, int N, int C, double eps) {
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++) {
        const real *row = x + (size_t)n * C;
        rstd[n] = (real)(1.0 / sqrt((double)dot(row, row, C) / C + eps));
        for (int c = 0; c < C; c++)
            out[(size_t)n * C + c] = row[c] * rstd[n] * w[c];
    }
}

// dx (N,C) += , dw (C) += . With y = x*rstd: dx = rstd * (dout*w - y * mean(dout*w*y)). partial (chunks of N, C).
void rmsnorm_backward(real *dx, real *dw, const real *dout, const real *x, const real *rstd, const real *w, int N, int C,
                      real *partial) {
    int chunks = div_up(N, CHUNK);
#pragma omp parallel for
    for (int chunk = 0; chunk < chunks; chunk++) {
        real *part = partial + (size_t)chunk * C;
        memset(part, 0, (size_t)C * sizeof(real));
        for (int n = chunk * CHUNK; n < min_int(N, (chunk + 1) * CHUNK); n++) {
            const real *row = x + (size_t)n * C, *g = dout + (size_t)n * C;
            vec sum = {0};
            real scale = rstd[n];
            for (int c = 0; c < C; c += LANES) {
                vec gx = vec_load(g + c, C - c) * vec_load(row + c, C - c);
                vec_store(part + c, vec_load(part + c, C - c) + gx * scale, C - c);
                sum += gx * vec_load(w + c, C - c);
            }
            real mean = vec_sum(sum) * scale * scale * scale / (real)C;
            for (int c = 0; c < C; c++)
                dx[(size_t)n * C + c] += g[c] * w[c] * scale - row[c] * mean;
        }
    }
    for (int chunk = 0; chunk < chunks; chunk++) {
        for (int c = 0; c < C; c++)
            dw[c] += partial[(size_t)chunk * C + c];
    }
}

// Turns the first `heads` heads of each row of qkv (N rows, ld apart) by its token's position: pair (i, i + D/2) of a
// head by the angle position * theta^(-2i/D). direction -1 turns back, which is also the backward pass. Su et al. 2021,
// RoFormer, in the half-split order of Hugging Face. angles (positions, D/2, 2) holds cosines and sines.
void rope(real *qkv, size_t ld, int N, int T, int heads, int D, const real *angles, real direction) {
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++) {
        const real *angle = angles + (size_t)(n % T) * D;
        for (int h = 0; h < heads; h++) {
            real *head = qkv + (size_t)n * ld + (size_t)h * D;
            for (int i = 0; i < D / 2; i++) {
                real c = angle[2 * i], s = angle[2 * i + 1] * direction, a = head[i], b = head[i + D / 2];
                head[i] = a * c - b * s;
                head[i + D / 2] = b * c + a * s;
            }
        }
    }
}

// Counting sort: order (n) lists 0..n-1 by key, stable; offset (keys+1) says where each key begins. Negative keys are
// left out. It sorts tokens by expert and, for the embedding's gradient, by vocabulary entry.
void counting_sort(int *order, int *offset, const int *key, int n, int keys) {
    memset(offset, 0, ((size_t)keys + 1) * sizeof(int));
    for (int i = 0; i < n; i++) {
        if (key[i] >= 0)
            offset[key[i] + 1]++;
    }
    for (int k = 0; k < keys; k++)
        offset[k + 1] += offset[k];
    for (int i = 0; i < n; i++) {
        if (key[i] >= 0)
            order[offset[key[i]]++] = i;
    }
    for (int k = keys; k > 0; k--) // each offset has moved to its successor's place
        offset[k] = offset[k - 1];
    offset[0] = 0;
}

void copy_rows(real *to, const real *from, int N, int C) { // (N,C)
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++)
        memcpy(to + (size_t)n * C, from + (size_t)n * C, (size_t)C * sizeof(real));
}

// x (N,C) = embedding (V,C)[token]
void embedding_forward(real *x, const real *embedding, const int *tokens, int N, int C) {
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++)
        memcpy(x + (size_t)n * C, embedding + (size_t)tokens[n] * C, (size_t)C * sizeof(real));
}

// dembedding (V,C) += ; each row is summed over its tokens in their order. order (N), offset (V+1) are scratch.
void embedding_backward(real *dembedding, const real *dx, const int *tokens, int N, int C, int V, int *order, int *offset) {
    counting_sort(order, offset, tokens, N, V);
#pragma omp parallel for
    for (int v = 0; v < V; v++) {
        for (int i = offset[v]; i < offset[v + 1]; i++) {
            for (int c = 0; c < C; c++)
                dembedding[(size_t)v * C + c] += dx[(size_t)order[i] * C + c];
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. The router and the experts
//
// The mixture of experts (Shazeer et al. 2017), in the order in which it happens. Every recipe is a way through these
// few steps; for mixtral they are what stands on the right.
//
//   scores   how much each token wants each expert              p (N,E) = softmax(h W_g^T)
//   select   which experts each token gets                      the K highest
//   gate     the weight with which each answer will count       p over the sum of the chosen ones
//   balance  losses that keep the load even                     Switch form
//   capacity who is refused by an expert that is full           nobody
//   plan     choices sorted by expert, so that an expert's tokens are rows offset[e]..offset[e+1] of one array
//   experts  each a small feed-forward over its own rows
//   combine  each token adds up its experts' answers, weighted
//
// Choosing is not differentiable, so the router learns in two ways only: through the weights of the experts it did
// choose, and through the balance losses, without which it soon sends everything to a few favourites.

// The integers of one layer's routing. A "choice" is n*K + k: token n's k-th expert. A "slot" is a row of the sorted
// order.
typedef struct Plan {
    int N, E, K;
    int *expert;  // (N*K) expert of each choice, best first; -1: no choice
    int *key;     // (N*K) the same, or -1 where it is not followed: declined by chance, or the expert was full
    int *slot;    // (N*K) slot of each choice, -1 where it has none
    int *choice;  // (N*K) choice of each slot, sorted by expert and then by token
    int *token;   // (N*K) token of each slot
    int *offset;  // (E+1) first slot of each expert; offset[E] slots in all
    int dropped;  // choices refused for want of room
} Plan;

// A gate: rows of E scores, of which K are chosen. Mostly a token has one row; with several routers it has one for
// each, and where a group is chosen first, one for each group.
typedef struct Gate {
    int per, E, K;   // per: rows of a token
    int column;      // of the logits (N,W): where a token's first row begins, row r's is E further for each
    real *p;         // (N*per, E) scores
    real *lse;       // (N*per) log of the sum of exp of the logits
    real *weight;    // (N*per, K) of the chosen
    int *expert;     // (N*per, K) the chosen, best first
} Gate;

// ---- scores

// to (N,C) = from times random numbers from 1-jitter to 1+jitter (Fedus et al. 2021, appendix C). first is the place of
// the first number in the whole batch of the step.
void apply_jitter(real *to, const real *from, size_t size, double jitter, uint64_t stream, uint64_t first) {
#pragma omp parallel for if (size > 1000)
    for (size_t i = 0; i < size; i++)
        to[i] = from[i] * (real)(1 + jitter * (2 * random_uniform(stream, first + i) - 1));
}

BOTH double noise_size(real raw) { // softplus, and a little so that it is never zero
    return fmax((double)raw, 0.0) + log1p(exp(-fabs((double)raw))) + 0.01;
}

BOTH double noise_slope(real raw) {
    return 1 / (1 + exp(-(double)raw));
}

// noisy (N,W) = logits + n * noise_size(raw), n standard normal: Shazeer et al. 2017, equation 4. logits (N,2W): W
// logits, then W raw sizes. train 0: no noise. first is the place of the first token in the whole batch of the step.
void noise_forward(real *noisy, const real *logits, int N, int W, int train, uint64_t stream, uint64_t first) {
    for (int n = 0; n < N; n++) {
        for (int j = 0; j < W; j++) {
            size_t i = (size_t)n * 2 * W + j;
            double draw = train ? random_normal(stream, (first + n) * W + j) : 0;
            noisy[(size_t)n * W + j] = logits[i] + (real)(draw * noise_size(logits[i + W]));
        }
    }
}

// dlogits (N,2W) +=
void noise_backward(real *dlogits, const real *dnoisy, const real *logits, int N, int W, int train, uint64_t stream,
                    uint64_t first) {
    for (int n = 0; n < N; n++) {
        for (int j = 0; j < W; j++) {
            size_t i = (size_t)n * 2 * W + j;
            double d = (double)dnoisy[(size_t)n * W + j], draw = train ? random_normal(stream, (first + n) * W + j) : 0;
            dlogits[i] += (real)d;
            dlogits[i + W] += (real)(d * draw * noise_slope(logits[i + W]));
        }
    }
}

// p of the gate from logits (N,W): softmax of each row, or the sigmoid of each number.
void scores_forward(Gate *g, const real *logits, int N, int W, int score) {
#pragma omp parallel for if (N > 64)
    for (int row = 0; row < N * g->per; row++) {
        real *p = g->p + (size_t)row * g->E;
        memcpy(p, logits + (size_t)(row / g->per) * W + g->column + row % g->per * g->E, (size_t)g->E * sizeof(real));
        if (score == SOFTMAX)
            g->lse[row] = softmax(p, g->E);
        for (int e = 0; score == SIGMOID && e < g->E; e++)
            p[e] = (real)(1 / (1 + exp(-(double)p[e])));
    }
}

// dlogits (N,W) += . Softmax: p * (dp - sum(dp * p)), and z * 2 lse p of the z-loss (z: its weight over the rows);
// sigmoid: dp * p * (1-p).
void scores_backward(real *dlogits, const real *dp, const Gate *g, int N, int W, int score, double z) {
#pragma omp parallel for if (N > 64)
    for (int row = 0; row < N * g->per; row++) {
        const real *d = dp + (size_t)row * g->E, *p = g->p + (size_t)row * g->E;
        real *to = dlogits + (size_t)(row / g->per) * W + g->column + row % g->per * g->E;
        real sum = 0, slope = score == SOFTMAX ? (real)(2 * z) * g->lse[row] : 0;
        for (int e = 0; e < g->E; e++)
            sum += d[e] * p[e];
        for (int e = 0; e < g->E; e++)
            to[e] += score == SOFTMAX ? p[e] * (d[e] - sum + slope) : d[e] * p[e] * (1 - p[e]);
    }
}

// A gated recurrent unit (Cho et al. 2014, in PyTorch's form): with a = x W_x^T + b_x and b = h W_h^T + b_h, three
// blocks of R each,
//   r = sigmoid(a_0 + b_0)   z = sigmoid(a_1 + b_1)   n = tanh(a_2 + r * b_2)   next = (1-z) * n + z * h
// x, h, next (N,R), h NULL: zeros; W (3R,R), b (3R). keep (N,4R): r, z, n and b_2 for the way back. room (N,6R).
void gru_forward(real *next, real *keep, const real *x, const real *h, const real *W_x, const real *W_h,
                 const real *b_x, const real *b_h, int N, int R, real *room) {
    real *a = room, *b = room + (size_t)N * 3 * R;
    product(a, along_rows(x, R, NULL), along_rows(W_x, R, NULL), N, 3 * R, R, 0);
    if (h)
        product(b, along_rows(h, R, NULL), along_rows(W_h, R, NULL), N, 3 * R, R, 0);
    else
        memset(b, 0, (size_t)N * 3 * R * sizeof(real));
    for (int n = 0; n < N; n++) {
        const real *an = a + (size_t)n * 3 * R, *bn = b + (size_t)n * 3 * R;
        real *kn = keep + (size_t)n * 4 * R;
        for (int j = 0; j < R; j++) {
            int J = j + R, K = J + R;
            double r = 1 / (1 + exp(-(double)(an[j] + b_x[j] + bn[j] + b_h[j]))),
                   z = 1 / (1 + exp(-(double)(an[J] + b_x[J] + bn[J] + b_h[J])));
            double hidden = (double)(bn[K] + b_h[K]), fresh = tanh((double)(an[K] + b_x[K]) + r * hidden);
            next[(size_t)n * R + j] = (real)((1 - z) * fresh + (h ? z * (double)h[(size_t)n * R + j] : 0));
            kn[j] = (real)r;
            kn[J] = (real)z;
            kn[K] = (real)fresh;
            kn[K + R] = (real)hidden;
        }
    }
}

// dx (N,R) =, dh (N,R) = (where h is not NULL), the weights' gradients +=
void gru_backward(real *dx, real *dh, real *dW_x, real *dW_h, real *db_x, real *db_h, const real *dnext,
                  const real *keep, const real *x, const real *h, const real *W_x, const real *W_h, int N, int R,
                  real *room) {
    real *da = room, *db = room + (size_t)N * 3 * R;
    for (int n = 0; n < N; n++) {
        for (int j = 0; j < R; j++) {
            const real *k = keep + (size_t)n * 4 * R;
            real *an = da + (size_t)n * 3 * R, *bn = db + (size_t)n * 3 * R;
            real r = k[j], z = k[R + j], fresh = k[2 * R + j], d = dnext[(size_t)n * R + j];
            real dfresh = d * (1 - z) * (1 - fresh * fresh);
            an[j] = bn[j] = dfresh * k[3 * R + j] * r * (1 - r);
            an[R + j] = bn[R + j] = d * ((h ? h[(size_t)n * R + j] : 0) - fresh) * z * (1 - z);
            an[2 * R + j] = dfresh;
            bn[2 * R + j] = dfresh * r;
            if (h)
                dh[(size_t)n * R + j] = d * z;
            for (int i = j; i < 3 * R; i += R) {
                db_x[i] += an[i];
                db_h[i] += bn[i];
            }
        }
    }
    product(dx, along_rows(da, 3 * R, NULL), along_columns(W_x, R, NULL), N, R, 3 * R, 0);
    product(dW_x, along_columns(da, 3 * R, NULL), along_columns(x, R, NULL), 3 * R, R, N, 1);
    if (h) {
        product(dh, along_rows(db, 3 * R, NULL), along_columns(W_h, R, NULL), N, R, 3 * R, 1);
        product(dW_h, along_columns(db, 3 * R, NULL), along_columns(h, R, NULL), 3 * R, R, N, 1);
    }
}

// ---- select

// expert (N,K): the K largest of each row of p (N,E), largest first; of equals the lower index.
void select_topk(int *expert, const real *p, int N, int E, int K) {
#pragma omp parallel for if (N > 64)
    for (int n = 0; n < N; n++) {
        const real *row = p + (size_t)n * E;
        int *chosen = expert + (size_t)n * K;
        for (int k = 0, last = -1; k < K; k++) { // the best of those that come after the last one
            int best = -1;
            for (int e = 0; e < E; e++) {
                int after = last < 0 || row[e] < row[last] || (row[e] == row[last] && e > last);
                if (after && (best < 0 || row[e] > row[best]))
                    best = e;
            }
            chosen[k] = last = best < 0 ? k : best; // none only where a score is NaN
        }
    }
}

BOTH int group_of(int expert, int E, int D) {
    return expert * D / E;
}

// Experts outside the token's M best groups get a score of -infinity (0 would beat negative scores). A group counts as
// its best score (DeepSeek-V2) or the sum of its two best (DeepSeek-V3). score (N,E)
void mask_groups(real *score, int N, int E, int D, int M, int by) {
    real *value = allocate_reals(D);
    int *chosen = (int *)allocate(M, sizeof(int));
    for (int n = 0; n < N; n++) {
        real *row = score + (size_t)n * E;
        for (int d = 0; d < D; d++) {
            real best = (real)-INFINITY, second = (real)-INFINITY;
            for (int e = 0; e < E; e++) {
                real s = group_of(e, E, D) == d ? row[e] : (real)-INFINITY;
                second = s > best ? best : s > second ? s : second;
                best = s > best ? s : best;
            }
            value[d] = by == BEST_TWO && second > (real)-INFINITY ? best + second : best;
        }
        select_topk(chosen, value, 1, D, M);
        for (int e = 0; e < E; e++) {
            int in = 0;
            for (int k = 0; k < M; k++)
                in |= chosen[k] == group_of(e, E, D);
            row[e] = in ? row[e] : (real)-INFINITY;
        }
    }
    free(chosen);
    free(value);
}

// Of each token's experts, best first, only those with p above level[e] (above `all` where level is NULL) stay, and the
// best one if keep_best.
void select_above(int *expert, const real *p, int N, int E, int K, const real *level, double all, int keep_best) {
    for (int n = 0; n < N; n++) {
        int *chosen = expert + (size_t)n * K, kept = 0;
        for (int k = 0; k < K; k++) {
            int e = chosen[k];
            if ((keep_best && k == 0) || (double)p[(size_t)n * E + e] > (level ? (double)level[e] : all))
                chosen[kept++] = e;
        }
        for (; kept < K; kept++)
            chosen[kept] = -1;
    }
}

// Each expert takes its `take` best of the n tokens: Zhou et al. 2022. expert (n,E): those that took a token, best
// first, then -1. lowest (E) += the lowest score that each expert took.
void select_by_experts(int *expert, double *lowest, const real *p, int n, int E, int take) {
    unsigned char *taken = (unsigned char *)allocate((size_t)n * E, 1);
#pragma omp parallel for
    for (int e = 0; e < E; e++) {
        Ranked *list = (Ranked *)allocate(n, sizeof(Ranked));
        for (int i = 0; i < n; i++) {
            list[i].score = (double)p[(size_t)i * E + e];
            list[i].index = i;
        }
        qsort(list, n, sizeof(Ranked), compare_ranked);
        for (int i = 0; i < take; i++)
            taken[(size_t)list[i].index * E + e] = 1;
        lowest[e] += list[take - 1].score;
        free(list);
        ranks_tick();
    }
    select_topk(expert, p, n, E, E);
    for (int i = 0; i < n; i++) {
        int *chosen = expert + (size_t)i * E, kept = 0;
        for (int k = 0; k < E; k++) {
            if (taken[(size_t)i * E + chosen[k]])
                chosen[kept++] = chosen[k];
        }
        for (; kept < E; kept++)
            chosen[kept] = -1;
    }
    free(taken);
}

// expert (n): the assignment with the largest sum of score (n,E) in which expert e has n/E tokens, and one more where e
// < n % E: the problem of Lewis et al. 2021, BASE Layers, solved exactly. Each token begins at its best expert; then,
// while an expert has too many, one token moves along the cheapest chain of experts that leads from any such to one
// with room: token t of a goes to b, one of b's goes on to c, ... (successive shortest paths; Bellman and Ford's
// algorithm over the E experts).
void select_balanced(int *expert, const real *score, int n, int E) {
    double *cost = (double *)allocate((size_t)E * E, sizeof(double)), *far = (double *)allocate(E, sizeof(double));
    int *mover = (int *)allocate((size_t)E * E, sizeof(int)), *from = (int *)allocate(E, sizeof(int));
    int *excess = (int *)allocate(E, sizeof(int)), *stale = (int *)allocate(E, sizeof(int));
    select_topk(expert, score, n, E, 1);
    for (int e = 0; e < E; e++) {
        excess[e] = -(n / E) - (e < n % E);
        stale[e] = 1;
    }
    for (int t = 0; t < n; t++)
        excess[expert[t]]++;
    for (;;) {
        int left = 0, end = -1;
        for (int a = 0; a < E; a++) { // cost[a][b]: what is lost by moving a's best token for it to b
            left += max_int(0, excess[a]);
            for (int b = 0; stale[a] && b < E; b++)
                cost[a * E + b] = INFINITY;
        }
        if (!left)
            break;
        for (int t = 0; t < n; t++) {
            int a = expert[t];
            for (int b = 0; stale[a] && b < E; b++) {
                double loss = (double)score[(size_t)t * E + a] - (double)score[(size_t)t * E + b];
                if (loss < cost[a * E + b]) {
                    cost[a * E + b] = loss;
                    mover[a * E + b] = t;
                }
            }
        }
        memset(stale, 0, (size_t)E * sizeof(int));
        for (int e = 0; e < E; e++) {
            far[e] = excess[e] > 0 ? 0 : INFINITY;
            from[e] = -1;
        }
        for (int again = 1, round = 0; again && round < E; round++) {
            again = 0;
            for (int a = 0; a < E; a++) {
                for (int b = 0; isfinite(far[a]) && b < E; b++) {
                    if (a != b && far[a] + cost[a * E + b] < far[b] - 1e-12) { // or rounding could go in circles
                        far[b] = far[a] + cost[a * E + b];
                        from[b] = a;
                        again = 1;
                    }
                }
            }
        }
        for (int e = 0; e < E; e++) {
            if (excess[e] < 0 && isfinite(far[e]) && (end < 0 || far[e] < far[end]))
                end = e;
        }
        if (end < 0) // only where a score is NaN
            break;
        excess[end]++;
        for (; from[end] >= 0; end = from[end]) {
            expert[mover[from[end] * E + end]] = end;
            stale[end] = stale[from[end]] = 1;
        }
        excess[end]--;
        ranks_tick();
    }
    free(cost), free(far), free(mover), free(from), free(excess), free(stale);
}

// A table from words to experts under which the experts' shares of the text are even (Roller et al. 2021, "balanced"):
// the most frequent word first, each goes to the expert with the least so far. frequency (V), NULL: all equal. The
// order differs a little from layer to layer, so that other words meet. table (V)
void balance_table(real *table, const double *frequency, int V, int E, uint64_t stream) {
    Ranked *list = (Ranked *)allocate(V, sizeof(Ranked));
    double *load = (double *)allocate(E, sizeof(double));
    for (int v = 0; v < V; v++) {
        list[v].score = (frequency ? frequency[v] : 1) * (0.8 + 0.2 * random_uniform(stream, (uint64_t)v));
        list[v].index = v;
    }
    qsort(list, V, sizeof(Ranked), compare_ranked);
    for (int i = 0; i < V; i++) {
        int best = 0, v = list[i].index;
        for (int e = 1; e < E; e++)
            best = load[e] < load[best] ? e : best;
        table[v] = (real)best;
        load[best] += frequency ? frequency[v] + 1 : 1; // words that were not seen are dealt out evenly, too
    }
    free(load);
    free(list);
}

// ---- gate

// weight (N,K) of the chosen experts: p as it is, or divided by the sum of the chosen ones' p; times scale.
void gate_forward(real *weight, const real *p, const int *expert, int N, int E, int K, int gate, double scale) {
    for (int n = 0; n < N; n++) {
        real sum = 0;
        for (int k = 0; k < K; k++) {
            int e = expert[n * K + k];
            weight[n * K + k] = e < 0 ? 0 : (real)scale * p[(size_t)n * E + e];
            sum += e < 0 ? 0 : p[(size_t)n * E + e];
        }
        for (int k = 0; gate == RENORMALIZED && k < K; k++)
            weight[n * K + k] /= sum;
    }
}

// dp (N,E) += . With w_k = scale * p_k / s, s the sum over the chosen: dp_k = (scale * dw_k - sum_j dw_j w_j) / s.
void gate_backward(real *dp, const real *dweight, const real *weight, const real *p, const int *expert, int N, int E,
                   int K, int gate, double scale) {
    for (int n = 0; n < N; n++) {
        real sum = 0, mean = 0;
        for (int k = 0; k < K; k++) {
            int e = expert[n * K + k];
            sum += e < 0 ? 0 : p[(size_t)n * E + e];
            mean += dweight[n * K + k] * weight[n * K + k];
        }
        for (int k = 0; k < K; k++) {
            int e = expert[n * K + k];
            real d = dweight[n * K + k] * (real)scale;
            if (e >= 0)
                dp[(size_t)n * E + e] += gate == RENORMALIZED ? (d - mean) / sum : d;
        }
    }
}

// Two levels (Shazeer et al. 2017, appendix B): the experts j that a token's chosen groups i chose, with the product of
// the weights. groups: (N rows of D, M chosen); inner: (N*D rows of E/D, K/M chosen). expert (N,K), weight (N,K)
void join_gates_forward(int *expert, real *weight, const Gate *groups, const Gate *inner, int N) {
    int M = groups->K, each = inner->K, D = inner->per;
    for (int i = 0; i < N * M * each; i++) {
        int n = i / (M * each), m = n * M + i / each % M, row = n * D + groups->expert[m], k = row * each + i % each;
        expert[i] = groups->expert[m] * inner->E + inner->expert[k];
        weight[i] = groups->weight[m] * inner->weight[k];
    }
}

// dgroups (N,M) =, dinner (N*D,K/M) = : gradients by the two gates' weights
void join_gates_backward(real *dgroups, real *dinner, const real *dweight, const Gate *groups, const Gate *inner,
                         int N) {
    int M = groups->K, each = inner->K, D = inner->per;
    memset(dgroups, 0, (size_t)N * M * sizeof(real));
    memset(dinner, 0, (size_t)N * D * each * sizeof(real));
    for (int i = 0; i < N * M * each; i++) {
        int n = i / (M * each), m = n * M + i / each % M, row = n * D + groups->expert[m], k = row * each + i % each;
        dgroups[m] += dweight[i] * inner->weight[k];
        dinner[k] += dweight[i] * groups->weight[m];
    }
}

// ---- plan

// A second choice is followed with probability weight / threshold (Lepikhin et al. 2020: 0.5; Zoph et al. 2022: 0.2).
// key, weight (N,2); the weights are renormalised ones times scale.
void decline_second(int *key, const real *weight, int N, double threshold, double scale, uint64_t stream,
                    uint64_t first) {
    for (int n = 0; n < N; n++) {
        if (random_uniform(stream, first + n) * threshold * scale >= (double)weight[2 * n + 1])
            key[2 * n + 1] = -1;
    }
}

// A unit - an expert, or a group of experts - takes at most ceil(factor * K * n / units) of the choices of a group of n
// tokens; the key of a refused one becomes -1. Served first are, BY_CHOICE, first choices before second ones and early
// tokens before late ones (Lepikhin et al. 2020, algorithm 1); BY_SCORE, high weights (DeepSeek-V2); BY_TOKEN, early
// tokens with all their choices, so that no later token decides an earlier one's fate. exempt (N): tokens that lose
// nothing, NULL: none. p (N,E): a refused token goes to its best expert with room instead; NULL: it passes by. factor
// 0: no limit.
void plan_capacity(Plan *plan, int group_tokens, double factor, int units, int order, const real *weight,
                   const unsigned char *exempt, const real *p) {
    int E = plan->E, K = plan->K, choices = group_tokens * K;
    int capacity = (int)fmin(ceil(factor * K * group_tokens / units - 1e-9), (double)choices);
    plan->dropped = 0;
    if (factor <= 0)
        return;
    int *taken = (int *)allocate(units, sizeof(int));
    Ranked *list = (Ranked *)allocate(choices, sizeof(Ranked));
    for (int first = 0; first < plan->N; first += group_tokens) {
        memset(taken, 0, (size_t)units * sizeof(int));
        for (int i = 0; i < choices; i++) {
            list[i].index = first * K + (order == BY_CHOICE ? i % group_tokens * K + i / group_tokens : i);
            list[i].score = order == BY_SCORE ? (double)weight[list[i].index] : 0;
        }
        if (order == BY_SCORE)
            qsort(list, choices, sizeof(Ranked), compare_ranked);
        for (int i = 0; i < choices; i++) {
            int choice = list[i].index, n = choice / K, e = plan->key[choice], best = -1;
            if (e < 0)
                continue;
            if (taken[group_of(e, E, units)] < capacity || (exempt && exempt[n])) {
                taken[group_of(e, E, units)]++;
                continue;
            }
            for (int other = 0; p && other < E; other++) {
                int is_chosen = 0;
                for (int k = 0; k < K; k++)
                    is_chosen |= plan->expert[n * K + k] == other;
                if (!is_chosen && taken[other] < capacity &&
                    (best < 0 || p[(size_t)n * E + other] > p[(size_t)n * E + best]))
                    best = other;
            }
            plan->key[choice] = best;
            plan->dropped += best < 0;
            if (best >= 0) {
                plan->expert[choice] = best;
                taken[best]++;
            }
        }
    }
    free(list);
    free(taken);
}

// Sorts what has a place by expert.
void plan_sort(Plan *plan) {
    int choices = plan->N * plan->K;
    counting_sort(plan->choice, plan->offset, plan->key, choices, plan->E);
    memset(plan->slot, -1, (size_t)choices * sizeof(int));
    for (int s = 0; s < plan->offset[plan->E]; s++) {
        plan->slot[plan->choice[s]] = s;
        plan->token[s] = plan->choice[s] / plan->K;
    }
}

// ---- balance
//
// Nearly all losses of the literature have one form: a sum over tokens and experts of p times a slope that depends on
// counts only, and counts carry no gradient. So each loss adds its slopes to one table, slope (groups of tokens, E),
// and one function each takes the sum and its gradient. All but the z-loss and the count of experts are 1 at perfect balance.

// count (groups*per, E): how often each expert stands among the first `first` of the K choices of each row. A gate with
// several rows a token (per) has counts for each of them. group_rows: rows of a group of tokens.
void count_choices(double *count, const int *choice, int rows, int E, int K, int first, int group_rows, int per) {
    memset(count, 0, (size_t)(rows / group_rows) * per * E * sizeof(double));
    for (int row = 0; row < rows; row++) {
        double *c = count + ((size_t)(row / group_rows) * per + row % per) * E;
        for (int k = 0; k < first; k++) {
            if (choice[(size_t)row * K + k] >= 0)
                c[choice[(size_t)row * K + k]] += 1;
        }
    }
}

// slope (E) += weight * E * f_e: the loss of Switch Transformers, E * sum_e f_e P_e, f_e the share of count, P_e the
// mean of p_e. width (E): a choice counts as much as its expert is wide; NULL: as 1.
void add_balance(double *slope, const double *count, const int *width, int E, double weight) {
    double total = 0;
    for (int e = 0; e < E; e++)
        total += count[e] * (width ? width[e] : 1);
    for (int e = 0; e < E && total > 0; e++)
        slope[e] += weight * E * count[e] * (width ? width[e] : 1) / total;
}

// slope (E) += : the device-level loss of Dai et al. 2024, DeepSeekMoE, sum over groups of experts of f'_g P'_g: f' is
// the mean of E * f in the group, P' the sum of P.
void add_device_balance(double *slope, const double *count, int E, int D, double weight) {
    double total = 0;
    for (int e = 0; e < E; e++)
        total += count[e];
    for (int first = 0, end; first < E; first = end) {
        double sum = 0;
        for (end = first; end < E && group_of(end, E, D) == group_of(first, E, D); end++)
            sum += count[end];
        for (int e = first; e < end; e++)
            slope[e] += weight * E * sum / total / (end - first);
    }
}

// slope (E) += : the communication loss of DeepSeek-V2, sum of f''_g P'_g with f''_g = D / (M n) * tokens sent to group
// g. expert (n,K). all: the tokens of the group on all ranks, over which it may be spread.
void add_communication_balance(double *slope, const int *expert, int n, int E, int K, int D, int M, double weight,
                               int all, int spread) {
    double *sent = (double *)allocate(D, sizeof(double));
    for (int i = 0; i < n * K; i++) {
        int seen = expert[i] < 0;
        for (int j = i / K * K; j < i && !seen; j++) // a token is sent to a group once
            seen = expert[j] >= 0 && group_of(expert[j], E, D) == group_of(expert[i], E, D);
        if (!seen)
            sent[group_of(expert[i], E, D)] += 1;
    }
    if (spread)
        sum_over_ranks(sent, D);
    for (int e = 0; e < E; e++)
        slope[e] += weight * D / ((double)M * all) * sent[group_of(e, E, D)];
    free(sent);
}

// The sum over rows of slope . p / rows; sigmoid scores are divided by their sum first.
double balance_forward(const Gate *g, const double *slope, int rows, int group_rows, int score) {
    double loss = 0;
    for (int row = 0; row < rows; row++) {
        const double *c = slope + ((size_t)(row / group_rows) * g->per + row % g->per) * g->E;
        double dot = 0, sum = 0;
        for (int e = 0; e < g->E; e++) {
            dot += c[e] * (double)g->p[(size_t)row * g->E + e];
            sum += (double)g->p[(size_t)row * g->E + e];
        }
        loss += score == SIGMOID ? dot / sum : dot;
    }
    return loss / rows;
}

// dp (rows,E) += scale * its gradient
void balance_backward(real *dp, const Gate *g, const double *slope, int rows, int group_rows, int score, double scale) {
#pragma omp parallel for if (rows > 16)
    for (int row = 0; row < rows; row++) {
        const double *c = slope + ((size_t)(row / group_rows) * g->per + row % g->per) * g->E;
        double dot = 0, sum = 0;
        for (int e = 0; score == SIGMOID && e < g->E; e++) {
            dot += c[e] * (double)g->p[(size_t)row * g->E + e];
            sum += (double)g->p[(size_t)row * g->E + e];
        }
        for (int e = 0; e < g->E; e++)
            dp[(size_t)row * g->E + e] += (real)(scale / rows * (score == SIGMOID ? (c[e] - dot / sum) / sum : c[e]));
    }
}

// 1 + the squared coefficient of variation of v (n): variance over mean^2, so 1 where all are equal. slope (n) = weight
// * its slope. mean: a mean known beforehand, to be taken as a constant; 0: that of v.
double cv_squared(const double *v, double *slope, int n, double mean, double weight) {
    double average = 0, variance = 0, fixed = mean;
    for (int i = 0; i < n; i++)
        average += v[i] / n;
    for (int i = 0; i < n; i++)
        variance += (v[i] - average) * (v[i] - average) / n;
    mean = fixed > 0 ? fixed : average;
    for (int i = 0; i < n; i++)
        slope[i] = weight * 2 / (n * mean * mean) * (v[i] - average - (fixed > 0 ? 0 : variance / mean));
    return 1 + variance / (mean * mean);
}

// How sure a noisy gate's choices are (Shazeer et al. 2017, appendix A): with new noise at (row, e), expert e would be
// among the K with probability Phi((logit - t) / size), t being the K-th highest of the other noisy logits. load
// (per,E) += these over the rows of n tokens from `first` on. live (N*per): rows that count, NULL: all. With dload
// (per,E) not NULL the slopes instead: dnoisy (N,W) +=, by t; dlogits (N,2W) +=, by logit and size.
void smooth_load(double *load, const double *dload, real *dnoisy, real *dlogits, const Gate *g, const real *noisy,
                 const real *logits, int W, int first, int n, const unsigned char *live) {
    for (int row = first * g->per; row < (first + n) * g->per; row++) {
        if (live && !live[row])
            continue;
        size_t at = (size_t)(row / g->per) * W + g->column + row % g->per * g->E, raw = at + (size_t)(row / g->per) * W;
        const real *h = noisy + at;
        const int *chosen = g->expert + (size_t)row * g->K;
        int next = -1; // the best of those not chosen
        for (int e = 0; e < g->E; e++) {
            int is_chosen = 0;
            for (int k = 0; k < g->K; k++)
                is_chosen |= chosen[k] == e;
            if (!is_chosen && (next < 0 || h[e] > h[next]))
                next = e;
        }
        for (int e = 0; e < g->E; e++) {
            int i = row % g->per * g->E + e, t = chosen[g->K - 1];
            for (int k = 0; k < g->K; k++)
                t = chosen[k] == e ? next : t;
            double size = noise_size(logits[raw + W + e]), v = ((double)logits[raw + e] - (double)h[t]) / size;
            if (!dload) {
                load[i] += 0.5 * (1 + erf(v * 0.7071067811865476));
                continue;
            }
            double slope = dload[i] * exp(-0.5 * v * v) * 0.3989422804014327 / size;
            dlogits[raw + e] += (real)slope;
            dnoisy[at + t] -= (real)slope;
            dlogits[raw + W + e] -= (real)(slope * v * noise_slope(logits[raw + W + e]));
        }
    }
}

// ---- experts

// The activation function f of one vector, and its slope f'.
void activate(int activation, vec x, vec *value, vec *slope) {
    vec zero = {0};
    if (activation == SWIGLU) { // SiLU: x * sigmoid(x)
        vec sigmoid = (real)1 / ((real)1 + vec_exp(-x));
        *value = x * sigmoid;
        *slope = sigmoid * ((real)1 + x * ((real)1 - sigmoid));
    } else if (activation == RELU) {
        *value = *slope = zero;
        for (int i = 0; i < LANES; i++) {
            (*value)[i] = x[i] > 0 ? x[i] : 0;
            (*slope)[i] = x[i] > 0 ? 1 : 0;
        }
    } else { // GELU: x * Phi(x), Phi the normal distribution function
        vec bell = vec_exp(x * x * (real)-0.5), phi = zero;
        if (sizeof(real) == 8) {
            for (int i = 0; i < LANES; i++)
                phi[i] = 0.5 * (1 + erf(x[i] * 0.7071067811865476));
        } else { // to 8e-8: Abramowitz and Stegun 1964, 26.2.17: 1 - Phi(|x|) is bell times a polynomial
            vec size = zero, t;
            for (int i = 0; i < LANES; i++)
                size[i] = x[i] < 0 ? -x[i] : x[i];
            t = (real)1 / ((real)1 + (real)0.23164189 * size);
            vec sum = (real)-0.7265760135 + t * (real)0.5307027145;
            sum = (real)-0.142248368 + t * ((real)0.7107068705 + t * sum);
            t = t * bell * ((real)0.127414796 + t * sum);
            for (int i = 0; i < LANES; i++)
                phi[i] = x[i] < 0 ? t[i] : 1 - t[i];
        }
        *value = x * phi;
        *slope = phi + x * bell * (real)0.3989422804014327;
    }
}

// act (rows,F) = f(gate) * up with hidden (rows,2F): F of gate, then F of up; ungated f(hidden) with hidden (rows,F).
// To be called by all threads of a team, or by one.
void activation_forward(real *act, const real *hidden, int rows, int F, int activation) {
    int gated = is_gated(activation);
#pragma omp for nowait
    for (int r = 0; r < rows; r++) {
        const real *h = hidden + (size_t)r * F * (1 + gated), *up = h + F;
        for (int j = 0; j < F; j += LANES) {
            vec value, slope;
            activate(activation, vec_load(h + j, F - j), &value, &slope);
            if (gated)
                value *= vec_load(up + j, F - j);
            vec_store(act + (size_t)r * F + j, value, F - j);
        }
    }
}

// Given dact (rows,F), the gradient by act if each row's weight were 1, and weight (N*K, by choice; NULL: all 1;
// choice[r] is the choice of row r), writes
//   dweight (N*K, by choice; may be NULL) = dact . act: an answer is weight * (act W_out^T), so its slope by the weight
//   needs no
//                                 copy of the answer;
//   dhidden (rows,2F or F), in which the weight is counted;
//   dact    = weight * act, computed anew, which is what W_out's gradient wants.
void activation_backward(real *dhidden, real *dweight, real *dact, const real *hidden, const real *weight,
                         const int *choice, int rows, int F, int activation) {
    int gated = is_gated(activation);
#pragma omp for nowait
    for (int r = 0; r < rows; r++) {
        const real *h = hidden + (size_t)r * F * (1 + gated), *up = h + F;
        real *dh = dhidden + (size_t)r * F * (1 + gated), *d = dact + (size_t)r * F;
        real w = weight ? weight[choice[r]] : 1;
        vec sum = {0};
        for (int j = 0; j < F; j += LANES) {
            vec value, slope, g = vec_load(d + j, F - j), zero = {0}, u = zero + (real)1;
            activate(activation, vec_load(h + j, F - j), &value, &slope);
            if (gated) {
                u = vec_load(up + j, F - j);
                vec_store(dh + F + j, w * g * value, F - j);
            }
            vec_store(dh + j, w * g * u * slope, F - j);
            sum += g * u * value;
            vec_store(d + j, w * u * value, F - j);
        }
        if (dweight)
            dweight[choice[r]] = vec_sum(sum);
    }
}

// The feed-forwards of a layer, and who passes them. A dense layer is one expert with all tokens.
typedef struct Experts {
    int E, C;
    const int *width, *activation; // (E): F and f of each; H = 2F where f is gated, else F
    const real *w_in, *w_out;      // each expert's (H,C), one after another; each one's (C,F)
    const int *offset;             // (E+1): expert e has rows offset[e]..offset[e+1]
    const int *token;              // (rows): the token of each row; NULL: row r is token r
} Experts;

typedef struct Block { // one expert's share: rows, and where its numbers begin
    int rows, F, H, activation;
    const int *token;
    size_t slot, act, hidden, in, out; // its first row; in act and hidden; in w_in and w_out
} Block;

Block *expert_blocks(const Experts *x) { // (E), to be freed
    Block *list = (Block *)allocate(x->E + 1, sizeof(Block));
    for (int e = 0; e < x->E; e++) {
        Block *b = &list[e], *next = b + 1;
        b->rows = x->offset[e + 1] - x->offset[e];
        b->F = x->width[e];
        b->activation = x->activation[e];
        b->H = b->F * (1 + is_gated(b->activation));
        b->token = x->token ? x->token + b->slot : NULL;
        next->slot = b->slot + (size_t)b->rows;
        next->act = b->act + (size_t)b->rows * b->F;
        next->hidden = b->hidden + (size_t)b->rows * b->H;
        next->in = b->in + (size_t)b->H * x->C;
        next->out = b->out + (size_t)b->F * x->C;
    }
    return list;
}

Operand block_rows(const Block *b, const real *x, int C) { // of x (N,C), the rows of the expert's tokens
    return along_rows(b->token ? x : x + b->slot * C, C, b->token);
}

Operand transposed(Operand o) {
    o.row_is_k = !o.row_is_k;
    return o;
}

// hidden (rows,H), block after block, = x W_in^T; x (N,C).
void experts_hidden(real *hidden, const real *x, const Experts *experts) {
    int E = experts->E, C = experts->C;
    Block *blocks = expert_blocks(experts);
    Product *list = (Product *)allocate(E, sizeof(Product));
    for (int e = 0; e < E; e++) {
        const Block *b = &blocks[e];
        Operand rows = block_rows(b, x, C), w = along_rows(experts->w_in + b->in, C, NULL);
        Product p = {hidden + b->hidden, (size_t)b->H, rows, w, b->rows, b->H, C};
        list[e] = p;
    }
    products(list, E, 0);
    free(list);
    free(blocks);
}

// out (rows,C) = or += act W_out^T, with act (rows,F) = f(hidden).
void experts_forward(real *out, real *hidden, real *act, const real *x, const Experts *experts, int accumulate) {
    int E = experts->E, C = experts->C;
    Block *blocks = expert_blocks(experts);
    Product *list = (Product *)allocate(E, sizeof(Product));
    experts_hidden(hidden, x, experts);
#pragma omp parallel if (experts->offset[E] > 16)
    for (int e = 0; e < E; e++)
        activation_forward(act + blocks[e].act, hidden + blocks[e].hidden, blocks[e].rows, blocks[e].F,
                           blocks[e].activation);
    for (int e = 0; e < E; e++) {
        const Block *b = &blocks[e];
        Operand rows = along_rows(act + b->act, b->F, NULL), w = along_rows(experts->w_out + b->out, b->F, NULL);
        Product p = {out + b->slot * C, (size_t)C, rows, w, b->rows, C, b->F};
        list[e] = p;
    }
    products(list, E, accumulate);
    free(list);
    free(blocks);
}

// dx (rows,C) = or +=, dw_in += , dw_out += , dweight (choices) =; dout (N,C) is by token, unweighted. dact (rows,F)
// and dhidden (rows,H) are scratch. With weight NULL rows count as they are.
void experts_backward(real *dx, real *dw_in, real *dw_out, real *dweight, const real *dout, const real *x,
                      const real *hidden, const real *weight, const int *choice, real *dact, real *dhidden,
                      const Experts *experts, int accumulate) {
    int E = experts->E, C = experts->C;
    Block *blocks = expert_blocks(experts);
    Product *list = (Product *)allocate(2 * E, sizeof(Product));
    for (int e = 0; e < E; e++) { // dact = dout W_out
        const Block *b = &blocks[e];
        Operand rows = block_rows(b, dout, C), w = along_columns(experts->w_out + b->out, b->F, NULL);
        Product p = {dact + b->act, (size_t)b->F, rows, w, b->rows, b->F, C};
        list[e] = p;
    }
    products(list, E, 0);
#pragma omp parallel if (experts->offset[E] > 16)
    for (int e = 0; e < E; e++) {
        const Block *b = &blocks[e];
        activation_backward(dhidden + b->hidden, dweight, dact + b->act, hidden + b->hidden, weight,
                            choice ? choice + b->slot : NULL, b->rows, b->F, b->activation);
    }
    for (int e = 0; e < E; e++) { // dW_out += dout^T act, dW_in += dhidden^T x
        const Block *b = &blocks[e];
        Operand g = transposed(block_rows(b, dout, C)), y = along_columns(dact + b->act, b->F, NULL);
        Operand dh = along_columns(dhidden + b->hidden, b->H, NULL), rows = transposed(block_rows(b, x, C));
        Product to_out = {dw_out + b->out, (size_t)b->F, g, y, C, b->F, b->rows};
        Product to_in = {dw_in + b->in, (size_t)C, dh, rows, b->H, C, b->rows};
        list[2 * e] = to_out;
        list[2 * e + 1] = to_in;
    }
    products(list, 2 * E, 1);
    for (int e = 0; e < E; e++) { // dx = dhidden W_in
        const Block *b = &blocks[e];
        Operand rows = along_rows(dhidden + b->hidden, b->H, NULL), w = along_columns(experts->w_in + b->in, C, NULL);
        Product p = {dx + b->slot * C, (size_t)C, rows, w, b->rows, C, b->H};
        list[e] = p;
    }
    products(list, E, accumulate);
    free(list);
    free(blocks);
}

// out (N,C) += sum over k of weight[n,k] * rows[slot[n,k]], in the order of k; weight NULL: all 1. rows (slots,C)
void combine(real *out, const real *rows, const real *weight, const int *slot, int N, int K, int C) {
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++) {
        for (int k = 0; k < K; k++) {
            if (slot[n * K + k] < 0)
                continue;
            const real *row = rows + (size_t)slot[n * K + k] * C;
            real w = weight ? weight[n * K + k] : 1;
            for (int c = 0; c < C; c++)
                out[(size_t)n * C + c] += w * row[c];
        }
    }
}

// out (N,C): row token[r] += rows[r], all tokens different. rows (count,C)
void combine_rows(real *out, const real *rows, const int *token, int count, int C) {
#pragma omp parallel for if (count > 16)
    for (int r = 0; r < count; r++) {
        for (int c = 0; c < C; c++)
            out[(size_t)token[r] * C + c] += rows[(size_t)r * C + c];
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 7. The whole model: weights, activations, forward and backward

// clang-format off
typedef struct LayerWeights { // all real *, in the order of the kinds below
    real *norm1;              // (C)
    real *qkv;                // ((H+2KV)*D, C): rows of all query heads, then keys, then values
    real *proj;               // (C, H*D)
    real *norm2;              // (C)
    real *router;             // (W, C), W from router_width(), or with noise (2W, C); like w_in and w_out only in layers
                              // with experts, and C/h wide with h sub-tokens
    real *w_in;               // (E, 2F, C)   each expert: F rows of gate, then F of up; (E, F, C) where not gated
    real *w_out;              // (E, C, F)
    real *dense_in;           // (2W, C)      the dense layer's, or the shared experts', together W wide
    real *dense_out;          // (C, W)
    real *split, *merge;      // (C, C)       of sub-tokens
    real *project;            // (R, C)       into the recurrent router
    real *bias;               // (E)          added to p for the choice. From here on: buffers, not trained but saved
    real *slow;               // (W, C)       moving average of router
    real *level;              // (E)          expert choice: the p above which evaluation chooses
    real *table;              // (V)          hash: the expert of each word
} LayerWeights;

typedef struct Weights {
    real *embed, *norm, *head;              // (V,C), (C), (V,C); head is embed where tied
    real *gru_x, *gru_h, *gru_bx, *gru_bh;  // (3R,R), (3R,R), (3R), (3R): the recurrent router's, one for all layers
    LayerWeights *layer;                    // (L)
} Weights;

enum {
    NORM1, QKV, PROJ, NORM2, ROUTER, W_IN, W_OUT, DENSE_IN, DENSE_OUT, SPLIT, MERGE, PROJECT, BIAS, SLOW, LEVEL, TABLE,
    LAYER_TENSORS, EMBED = LAYER_TENSORS, NORM, HEAD, GRU_X, GRU_H, GRU_BX, GRU_BH, KINDS
};
const char *const tensor_names[] = {
    "norm1", "qkv", "proj", "norm2", "router", "w_in", "w_out", "dense_in", "dense_out", "split", "merge", "project", "bias",
    "slow", "level", "table", "embed", "norm", "head", "gru_x", "gru_h", "gru_bx", "gru_bh"};

// clang-format on

typedef struct Tensor { // one row of the model's table of weights
    char name[40];
    int layer, kind;       // layer -1: EMBED and what follows
    int shape[3];          // padded with 1 in front
    size_t offset, size;   // in this process's memory
    size_t place, whole;   // in the memory of a process that is alone: where it begins, and its numbers
    size_t first;          // this rank has numbers first..first+size of the whole
} Tensor;

int tensor_is_norm(const Tensor *t) {
    return t->kind == NORM1 || t->kind == NORM2 || t->kind == NORM;
}

int tensor_is_expert(const Tensor *t) { // of which each rank has its own part
    return t->kind == W_IN || t->kind == W_OUT;
}

int tensor_is_buffer(const Tensor *t) {
    return t->kind >= BIAS && t->kind <= TABLE;
}

int tensor_is_vector(const Tensor *t) { // one dimension, and no weight decay
    return tensor_is_norm(t) || t->kind == BIAS || t->kind == LEVEL || t->kind == TABLE || t->kind == GRU_BX ||
           t->kind == GRU_BH;
}

// Appends a tensor of a x b x c numbers, if it has any.
void add_tensor(Tensor *list, int *count, int layer, int kind, const int shape[3]) {
    size_t size = (size_t)shape[0] * (size_t)shape[1] * (size_t)shape[2];
    if (!size)
        return;
    Tensor *t = &list[(*count)++];
    t->layer = layer;
    t->kind = kind;
    memcpy(t->shape, shape, sizeof(t->shape));
    t->whole = t->size = size;
    if (layer < 0)
        snprintf(t->name, sizeof(t->name), "%s", tensor_names[kind]);
    else
        snprintf(t->name, sizeof(t->name), "layer%d.%s", layer, tensor_names[kind]);
}

// Numbers of expert e's part of W_IN or W_OUT.
size_t expert_size(const Config *c, int kind, int e) {
    size_t size = (size_t)expert_width(c, e) * (size_t)(c->dim / c->subtokens);
    return kind == W_OUT ? size : size * (1 + is_gated(expert_activation(c, e)));
}

// Where each tensor lies: in the order of the table. Of several ranks, what all have in common comes first, filled up so
// that it divides evenly among them, into slices of a multiple of 16 numbers (gather_slices); then come this rank's
// experts, each tensor with room for as many large ones as it may have to copy from other ranks (whose moments' room is
// never used). Each begins at a multiple of `unit` numbers. Returns the numbers of all, *common those of the first part.
size_t place_tensors(const Config *c, Tensor *list, int count, size_t unit, size_t *common) {
    size_t place = 0, at = 0, even = (unit > 16 ? unit : 16) * (size_t)ranks.size;
    for (int i = 0; i < count; i++) {
        list[i].place = place;
        place += list[i].whole;
    }
    for (int part = 0; part < (MANY ? 2 : 1); part++) {
        for (int i = 0; i < count; i++) {
            Tensor *t = &list[i];
            if (MANY && tensor_is_expert(t) != part)
                continue;
            t->offset = at;
            t->first = 0;
            t->size = t->whole;
            size_t largest = 0, each = (size_t)(c->experts / ranks.ep), first = (size_t)ranks.place * each;
            for (size_t e = 0; MANY && part == 1 && e < (size_t)c->experts; e++) {
                size_t size = expert_size(c, t->kind, (int)e);
                t->first += e < first ? size : 0;
                t->size -= e < first || e >= first + each ? size : 0;
                largest = size > largest ? size : largest;
            }
            at += (t->size + largest * (size_t)c->replicate + unit - 1) / unit * unit;
        }
        if (part == 0)
            *common = at = MANY ? (at + even - 1) / even * even : at;
    }
    return at;
}

// The table of all weights, in the order in which a single process has them in memory. list has room for
// LAYER_TENSORS*L + KINDS.
int model_tensors(const Config *c, Tensor *list) {
    int count = 0, last, C = c->dim, D = C / c->heads, F = c->ffn, R = c->recurrent, moe = moe_layers(c, &last);
    size_t common;
    const int embed[3] = {1, c->vocab, C};
    add_tensor(list, &count, -1, EMBED, embed);
    for (int l = 0; l < c->layers; l++) {
        int has = is_moe(c, l), E = has ? c->experts : 0, W = has ? router_width(c) : 0, width = dense_width(c, l);
        int c1 = C / c->subtokens, read = R ? R : c1; // what experts and router read
        int in = 1 + is_gated(dense_activation(c, l)), rows = 0;
        for (int e = 0; e < E; e++)
            rows += expert_width(c, e) * (1 + is_gated(expert_activation(c, e)));
        const int split = has && c->subtokens > 1 ? C : 0, mixed = c->mixed && E;
        // clang-format off
        const int shapes[][3] = {
            {1, 1, C}, {1, (c->heads + 2 * c->kv_heads) * D, C}, {1, C, C}, {1, 1, C},
            {1, W * (1 + c->noise), read}, {mixed ? 1 : E, mixed ? rows : E ? rows / E : 0, c1}, {E, c1, F},
            {1, in * width, C}, {1, C, width}, {1, split, C}, {1, split, C}, {1, has ? R : 0, C},
            {1, 1, c->bias_rate > 0 ? E : 0}, {1, c->history_decay > 0 ? W : 0, read},
            {1, 1, c->select == EXPERT_CHOICE ? E : 0}, {1, 1, c->select == HASH && E ? c->vocab : 0}};
        // clang-format on
        for (int kind = 0; kind < LAYER_TENSORS; kind++)
            add_tensor(list, &count, l, kind, shapes[kind]);
    }
    R = moe ? R : 0;
    const int shapes[][3] = {
        {1, 1, C}, {1, c->untied ? c->vocab : 0, C}, {1, 3 * R, R}, {1, 3 * R, R}, {1, 1, 3 * R}, {1, 1, 3 * R}};
    for (int kind = NORM; kind < KINDS; kind++)
        add_tensor(list, &count, -1, kind, shapes[kind - NORM]);
    place_tensors(c, list, count, 1, &common);
    return count;
}

// All weights, and those that one token uses: the embedding once, as the output matrix; what a token passes several
// times (experts by its sub-tokens, the recurrent router in each layer) so often.
void count_parameters(const Config *c, double *total, double *active) {
    Tensor *list = (Tensor *)allocate((size_t)c->layers * LAYER_TENSORS + KINDS, sizeof(Tensor));
    int count = model_tensors(c, list), last, moe = moe_layers(c, &last);
    *total = *active = 0;
    for (int i = 0; i < count; i++) {
        const Tensor *t = &list[i];
        double uses = tensor_is_expert(t)   ? (double)c->topk / c->experts * c->subtokens
                      : t->kind == ROUTER ? c->subtokens
                      : t->kind >= GRU_X  ? moe
                                          : t->kind != HEAD;
        if (tensor_is_buffer(t))
            continue;
        *total += (double)t->whole;
        *active += (double)t->whole * uses;
    }
    free(list);
}

// Operations of a training step per token, a multiply-add counted as two: forward, and twice that backward. 6*L*T*C is
// attention: two products of (T,T) with (T,D), of which causality leaves half, three times.
double flops_per_token(const Config *c) {
    double total, active;
    count_parameters(c, &total, &active);
    return 6 * active + 6.0 * c->layers * c->seq * c->dim;
}

// What one layer keeps of its forward pass for its backward pass. n: N tokens, or N*h sub-tokens; c: C or C/h; R
// routers.
typedef struct LayerState {
    real *x;                     // (N,C): input
    // With --recompute all layers share what follows, and backward works it out anew:
    real *h1, *rstd1;            // (N,C), (N): norm of x
    real *qkv, *att, *lse;       // (N,(H+2KV)*D), (N,H*D), (B,H,T)
    real *mid, *h2, *rstd2;      // (N,C), (N,C), (N): after attention, its norm
    real *dense_hidden;          // (N, 2W) or (N, W)
    real *hidden;                // (n*K, 2F) or (n*K, F): the experts' first products
    // but not this:
    real *sub, *merged;          // (n,c): sub-tokens, and the experts' answers to them
    real *jittered;              // (n,c): the router's input in training, where it has jitter
    real *projected, *gru, *state; // (N,R), (N,4R), (N,R): of the recurrent router
    real *logits, *noisy;        // (n,W) or with noise (n,2W); (n,W)
    Gate gate, groups;           // the experts' gate; that of their groups where they are chosen first
    real *weight;                // (n,K) of each choice
    double *slope, *weight_slope; // (groups of tokens * R, E): of the balance losses by p; by the weights
    double *load_slope;          // (groups of tokens, E) and, behind them, (groups of tokens, D): of the smooth load
    Plan plan;
    double aux;                  // all balance losses, weighted
    struct Exchange *exchange;   // (2) what the other ranks' tokens are to this rank's experts
} LayerState;

typedef struct RouterStats { // of training, since the step began
    double *count;           // (E) choices
    double *lowest;          // (E) sum of the lowest scores that each expert took (expert choice)
    double entropy, dropped, active, tokens; // entropy of p in nats, summed over tokens; choices dropped, choices made
    double passes;           // sums in `lowest`
    double *recent;          // (E) load, averaged over about the last 50 steps
    int *idle;               // (E) steps since an expert had a token
} RouterStats;

typedef struct Room { // memory that grows with what arrives
    void *memory;
    size_t bytes;
} Room;

typedef struct Exchange { // half of the tokens of a layer: what was sent and what came
    int rows, came;                        // rows sent to all ranks of the group, received from all
    int *sent, *sent_at, *got, *got_at;    // (ep) rows sent to each, received from each, and where they begin
    int *token;                            // (rows) of this rank
    real *x, *weight, *hidden;             // (came,C), (came,K), and the experts' first products
    Plan plan;                             // of what came, for the experts here
    Room of_token, of_x, of_weight, of_hidden, of_plan;
} Exchange;

typedef struct Travel { // of half of a layer's tokens, while they are under way
    real *out, *in;               // (rows,C) there; (came,C) in backward
    real *choices_out, *choices;  // (rows,2K), (came,2K): weights, then the experts' numbers; -1: elsewhere
    real *answers, *back;         // (came,C), (rows,C)
    real *dweight, *dweight_back; // (came,K), (rows,K)
    Room of_out, of_in, of_choices_out, of_choices, of_answers, of_back, of_dweight, of_dweight_back;
    Request request[2];
    int requests;
} Travel;

typedef struct Placement { // of the experts of all layers on the ranks of a group
    int here, room;           // experts of this rank, and how many copies of others' it has room for
    int *host, *slot;         // (L,E) the rank with the second copy, -1: none, and its place among that rank's copies
    int *copy;                // (L,room) whose copies this rank has; -1: none
    int *width, *activation;  // (L,here+room)
} Placement;

// What memory is for. HARDLY_TOUCHED is room for the worst case (each token a group of its own); the system gives pages
// only to what is written, so print_memory leaves it out.
enum { FOR_WEIGHTS, FOR_GRADIENTS, FOR_MOMENTS, FOR_ACTIVATIONS, FOR_BUFFERS, HARDLY_TOUCHED, MEMORY_KINDS };

typedef struct Model {
    Config config;
    int max_tokens; // N that the buffers hold
    Tensor *tensors;
    int tensor_count;
    size_t size;     // numbers of all weights
    real *memory[4]; // weights, gradients, AdamW's two moments: (size) each, but of several ranks' moments see below
    // Of several ranks: all have the first `common` numbers and update slice..slice_end of them; moments are kept for
    // these and, behind them, for this rank's experts (ZeRO-1: Rajbhandari et al. 2020).
    size_t whole, common, slice, slice_end; // whole: numbers of all ranks
    real *whole_memory[4]; // what model_fetch has gathered
    struct Placement *placement; // of the experts
    struct Travel *travel;       // (2) rows on their way between ranks
    Room of_rows, of_act, of_dhidden; // the experts' scratch for what came
    int *rank_tokens;            // (ranks) tokens of the last forward pass
    int *came;                   // (L) rows that came to this rank's experts in it
    Weights weights, grads;
    int *expert_width, *expert_activation; // (E)
    LayerState *layers;            // (L)
    real *x, *h, *rstd;            // (N,C), (N,C), (N): last layer's output, its norm
    real *dx, *dh;                 // (N,C): gradients flowing back; dh also by the head, in forward
    real *dqkv, *datt;             // (N,(H+2KV)*D), (N,H*D)
    real *rows, *act, *dhidden;    // (n*K or N, C), (.., F or W), (.., 2F or 2W): the experts' scratch
    real *choice_score;            // (n,W): what decides, where it is not p
    real *dlogits, *dnoisy, *dp, *dgroups, *dweight, *dgate, *dgroup_weight; // of the gates
    real *drouter, *dsub, *dmerged; // (n,c): by the router's input, by sub-tokens, by the experts' answers
    real *dstate, *dprojected, *gru_room; // (N,R), (N,R), (N,6R); dstate also from the layer above
    double *counts;                // (groups of tokens * R, E)
    unsigned char *marks;          // (n*D)
    int *unbiased;                 // (n,K)
    real *logits, *nll;            // (head_rows,V), (N)
    real *partial, *attention, *angles; // norms' partial sums; attention's scratch; (seq, D/2, 2)
    int head_rows;
    int *order, *offset; // (N), (V+1): embedding's sort
    const int *tokens;   // of the last forward
    int B, T, mode;
    double grad_scale;
    uint64_t step, first_token; // of the last forward: they choose the random numbers
    int last_pass;              // it is the last one of its step
    double loss, total_aux, norm; // of the step: means over its passes so far, each times its grad_scale; of its gradients
    RouterStats *stats; // (L)
    size_t bytes[MEMORY_KINDS]; // of the allocations above, by what they are for
    int purpose;
    size_t passing, largest;    // numbers: activations that --recompute would not keep, of all layers and of one layer
    int at_hand;                // with --recompute: the layer whose activations are there
    void **owned;               // every allocation above, for model_free
    int owned_count;
    struct Model *one;  // a model of one token that shares the weights: generation
    real *cache;        // (L, seq, 2*KV*D): keys and values, position p at row p % seq
} Model;

enum { WEIGHTS, GRADS, MOMENT1, MOMENT2 };
// Training; evaluation: no chance, no capacity but eval-capacity-factor; and that with gradients, for whoever checks
// them.
enum { TRAIN_MODE, EVAL_MODE, CHECK_MODE };

// Zeroed memory that lives as long as the model, booked under m->purpose.
void *own(Model *m, size_t count, size_t size) {
    m->bytes[m->purpose] += count * size;
    if (m->owned_count % 64 == 0)
        m->owned = (void **)reallocate(m->owned, (size_t)m->owned_count + 64, sizeof(void *));
    return m->owned[m->owned_count++] = allocate(count, size);
}

real *own_reals(Model *m, size_t count) {
    return (real *)own(m, count, sizeof(real));
}

int halves_of(const Model *m) { // in which a batch travels
    return m->config.overlap ? 2 : 1;
}

// The table of weights, and how many numbers there are of what. list: room for the table; unit: see place_tensors
void lay_tensors(Model *m, Tensor *list, size_t unit) {
    const Config *c = &m->config;
    m->tensors = list;
    m->tensor_count = model_tensors(c, m->tensors);
    m->size = place_tensors(c, m->tensors, m->tensor_count, unit, &m->common);
    m->whole = m->tensors[m->tensor_count - 1].place + m->tensors[m->tensor_count - 1].whole;
    m->slice = m->common / (size_t)ranks.size * (size_t)ranks.rank;
    m->slice_end = m->slice + m->common / (size_t)ranks.size;
}

// Lays the struct of pointers over one allocation.
void point_weights(Model *m, Weights *w, real *memory) {
    w->layer = (LayerWeights *)own(m, m->config.layers, sizeof(LayerWeights));
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        real **pointers = t->layer >= 0 ? (real **)&w->layer[t->layer] : (real **)w - EMBED;
        pointers[t->kind] = memory + t->offset;
    }
    if (!w->head)
        w->head = w->embed;
}

// The weights of step 0. Their standard deviation: normal: 0.02, and 1/sqrt(2L) of it for what is added to the residual
// stream (Radford et al. 2019); truncated: sqrt(0.1/fan-in), nothing beyond two of them (Fedus et al. 2021). A noisy
// router begins at 0 (Shazeer et al. 2017). frequency (V) of each word in the training text, NULL: not known.
void model_init(Model *m, const double *frequency) {
    const Config *c = &m->config;
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        uint64_t stream = random_stream((uint64_t)c->seed, RANDOM_INIT, (uint64_t)i, 0);
        real *w = m->memory[WEIGHTS] + t->offset;
        int residual = t->kind == PROJ || t->kind == W_OUT || t->kind == DENSE_OUT;
        int by_fan = t->kind == SPLIT || t->kind == MERGE || t->kind == GRU_X || t->kind == GRU_H;
        int truncated = c->init_scheme == TRUNCATED && t->kind != EMBED;
        double std = truncated  ? sqrt(0.1 / t->shape[2])
                     : by_fan   ? sqrt(0.5 / t->shape[2])
                     : residual ? 0.02 / sqrt(2.0 * c->layers)
                                : 0.02;
        if (tensor_is_vector(t) || tensor_is_buffer(t) || (t->kind == ROUTER && c->noise))
            std = 0;
#pragma omp parallel for
        for (size_t j = 0; j < t->size; j++) {
            double z = random_normal(stream, t->first + j);
            for (uint64_t again = 1; truncated && fabs(z) > 2; again++)
                z = random_normal(stream, t->first + j + again * t->whole);
            w[j] = (real)(std * z + tensor_is_norm(t));
        }
        size_t next = 0;
        for (int e = 0; c->mixed && tensor_is_expert(t) && e < c->experts; e++) { // from 0.5 to 1.5 times as large
            size_t first = next;
            next += expert_size(c, t->kind, e);
            for (size_t j = first; j < next; j++) {
                if (j >= t->first && j < t->first + t->size)
                    w[j - t->first] *= (real)(0.5 + (double)e / (c->experts - 1));
            }
        }
        if (t->kind == SLOW)
            memcpy(w, m->weights.layer[t->layer].router, t->size * sizeof(real));
        for (size_t e = 0; t->kind == LEVEL && e < t->size; e++)
            w[e] = (real)(1.0 / c->experts);
        if (t->kind == TABLE)
            balance_table(w, frequency, c->vocab, c->experts, stream);
    }
}

void rope_angles(real *angles, int first, int count, int D, double theta) {
    for (int t = 0; t < count; t++) {
        for (int i = 0; i < D / 2; i++) {
            double angle = (first + t) * pow(theta, -2.0 * i / D);
            angles[(size_t)t * D + 2 * i] = (real)cos(angle);
            angles[(size_t)t * D + 2 * i + 1] = (real)sin(angle);
        }
    }
}

void own_gate(Model *m, Gate *g, int n, int per, int E, int K, int column) {
    Gate gate = {per, E, K, column, NULL, NULL, NULL, NULL};
    size_t rows = (size_t)n * per;
    gate.p = own_reals(m, rows * E);
    gate.lse = own_reals(m, rows);
    gate.weight = own_reals(m, rows * K);
    gate.expert = (int *)own(m, rows * K, sizeof(int));
    *g = gate;
}

// What the experts of one layer keep.
void allocate_experts(Model *m, int l, int N) {
    const Config *c = &m->config;
    LayerState *s = &m->layers[l];
    int E = c->experts, K = places(c), R = c->routers, D = c->groups, W = router_width(c), n = N * c->subtokens,
        two = c->select == HIERARCHICAL;
    size_t nK = (size_t)n * K, C = (size_t)c->dim;
    own_gate(m, &s->gate, n, two ? D : R, two ? E / D : E, two ? K / c->group_topk : K / R, two ? D : 0);
    if (two)
        own_gate(m, &s->groups, n, 1, D, c->group_topk, 0);
    s->sub = c->subtokens > 1 ? own_reals(m, N * C) : NULL;
    s->merged = c->subtokens > 1 ? own_reals(m, N * C) : NULL;
    s->jittered = c->jitter > 0 ? own_reals(m, N * C) : NULL;
    s->projected = own_reals(m, (size_t)N * c->recurrent);
    s->gru = own_reals(m, (size_t)N * 4 * c->recurrent);
    s->state = own_reals(m, (size_t)N * c->recurrent);
    s->logits = own_reals(m, (size_t)n * W * (1 + c->noise));
    s->noisy = c->noise ? own_reals(m, (size_t)n * W) : s->logits;
    s->weight = two ? own_reals(m, nK) : s->gate.weight;
    size_t part = c->group == SEQUENCE ? (size_t)c->seq : (size_t)n; // tokens of a group: 1/part of this is touched
    m->bytes[FOR_ACTIVATIONS] += (size_t)n * ((size_t)(R + 2) * E + D) * sizeof(double) / part;
    m->purpose = HARDLY_TOUCHED;
    s->slope = (double *)own(m, (size_t)n * R * E, sizeof(double));
    s->weight_slope = (double *)own(m, (size_t)n * E, sizeof(double));
    s->load_slope = (double *)own(m, (size_t)n * (E + D), sizeof(double));
    m->purpose = FOR_ACTIVATIONS;
    int *ints = (int *)own(m, nK * 5 + E + 1, sizeof(int));
    Plan plan = {
        n, E, K, two ? ints : s->gate.expert, ints + nK, ints + nK * 2, ints + nK * 3, ints + nK * 4, ints + nK * 5, 0};
    s->plan = plan;
    s->exchange = (Exchange *)own(m, ranks.ep > 1 ? 2 : 0, sizeof(Exchange));
    for (int half = 0; half < 2 && ranks.ep > 1; half++) {
        Exchange *ex = &s->exchange[half];
        ex->sent = (int *)own(m, (size_t)ranks.ep * 4, sizeof(int));
        ex->sent_at = ex->sent + ranks.ep;
        ex->got = ex->sent_at + ranks.ep;
        ex->got_at = ex->got + ranks.ep;
    }
    if (ranks.ep > 1) // what comes with an even load
        m->bytes[FOR_ACTIVATIONS] += ((size_t)n * min_int(K, ranks.ep) * (C / c->subtokens + K) +
                                      nK * (size_t)c->ffn * (1 + is_gated(c->activation))) * sizeof(real);
    RouterStats *stats = &m->stats[l];
    stats->count = (double *)own(m, (size_t)E * 3, sizeof(double));
    stats->lowest = stats->count + E;
    stats->recent = stats->count + 2 * E;
    stats->idle = (int *)own(m, E, sizeof(int));
}

// Points to what --recompute shares of a layer's activations, one after another in `memory`; returns their numbers.
size_t place_activations(Model *m, int l, int N, real *memory) {
    const Config *c = &m->config;
    LayerState *s = &m->layers[l];
    size_t C = (size_t)c->dim, used = 0, rows = is_moe(c, l) && ranks.ep == 1 ? (size_t)N * c->subtokens * places(c) : 0;
    size_t Q = C + 2 * C / c->heads * c->kv_heads, dense = (size_t)dense_width(c, l), hidden = 0;
    for (int e = 0; e < c->experts; e++)
        hidden = (size_t)max_int((int)hidden, m->expert_width[e] * (1 + is_gated(m->expert_activation[e])));
    const struct {
        real **to;
        size_t size;
    } list[] = {{&s->h1, N * C}, {&s->rstd1, (size_t)N}, {&s->qkv, N * Q}, {&s->att, N * C}, {&s->lse, (size_t)N * c->heads},
                {&s->mid, N * C}, {&s->h2, N * C}, {&s->rstd2, (size_t)N},
                {&s->dense_hidden, N * dense * (1 + is_gated(dense_activation(c, l)))}, {&s->hidden, rows * hidden}};
    for (size_t i = 0; i < sizeof(list) / sizeof(list[0]); i++) {
        *list[i].to = memory ? memory + used : NULL;
        used += (list[i].size + 15) / 16 * 16;
    }
    return used;
}

// The widths of the experts that this rank has in layer l, copies included.
void place_experts(Model *m, int l) {
    Placement *p = m->placement;
    const Config *c = &m->config;
    for (int i = 0; i < p->here + p->room; i++) {
        int e = i < p->here ? ranks.place * p->here + i : p->copy[l * p->room + i - p->here];
        p->width[l * (p->here + p->room) + i] = e < 0 ? 0 : expert_width(c, e);
        p->activation[l * (p->here + p->room) + i] = e < 0 ? c->activation : expert_activation(c, e);
    }
}

void own_placement(Model *m) {
    const Config *c = &m->config;
    Placement *p = m->placement = (Placement *)own(m, 1, sizeof(Placement));
    p->here = c->experts / ranks.ep;
    p->room = ranks.ep > 1 ? c->replicate : 0;
    size_t all = (size_t)c->layers * c->experts, mine = (size_t)c->layers * (p->here + p->room);
    p->host = (int *)own(m, 2 * all, sizeof(int));
    p->slot = p->host + all;
    p->copy = (int *)own(m, (size_t)c->layers * p->room, sizeof(int));
    p->width = (int *)own(m, 2 * mine, sizeof(int));
    p->activation = p->width + mine;
    memset(p->host, -1, all * sizeof(int));
    memset(p->copy, -1, (size_t)c->layers * p->room * sizeof(int));
    for (int l = 0; l < c->layers; l++)
        place_experts(m, l);
}

// Where the moments of the weight at this offset are.
size_t moment_place(const Model *m, size_t offset) {
    return !MANY ? offset : offset < m->common ? offset - m->slice : offset - m->common + m->slice_end - m->slice;
}

// Buffers for N tokens. train 0: no gradients, no moments. weights: those of another model, or NULL for its own.
Model *model_allocate(const Config *config, int N, int train, real *weights) {
    Model *m = (Model *)allocate(1, sizeof(Model));
    const Config *c = &m->config;
    m->config = *config;
    m->max_tokens = N;
    int L = c->layers, C = c->dim, H = c->heads, KV = c->kv_heads, D = C / H, E = c->experts, R = c->recurrent, last,
        Q = (H + 2 * KV) * D;
    int n = N * c->subtokens, W = router_width(c);
    size_t moe = moe_layers(c, &last) > 0, rows = N, width = 0, hidden = 0, nK = moe * n * places(c);
    size_t two = c->select == HIERARCHICAL ? 1 : 0, scores = moe * n * W;
    lay_tensors(m, (Tensor *)own(m, (size_t)L * LAYER_TENSORS + KINDS, sizeof(Tensor)), 1);
    m->came = (int *)own(m, L, sizeof(int));
    m->rank_tokens = (int *)own(m, ranks.size, sizeof(int));
    m->memory[WEIGHTS] = weights ? weights : own_reals(m, m->size);
    point_weights(m, &m->weights, m->memory[WEIGHTS]);
    m->purpose = FOR_ACTIVATIONS;
    m->expert_width = (int *)own(m, (size_t)2 * E, sizeof(int));
    m->expert_activation = m->expert_width + E;
    for (int e = 0; e < E; e++) {
        m->expert_width[e] = expert_width(c, e);
        m->expert_activation[e] = expert_activation(c, e);
    }
    m->layers = (LayerState *)own(m, L, sizeof(LayerState));
    m->stats = (RouterStats *)own(m, L, sizeof(RouterStats));
    for (int l = 0; l < L; l++) {
        size_t size = place_activations(m, l, N, NULL);
        m->passing += size;
        m->largest = size > m->largest ? size : m->largest;
    }
    real *shared = c->recompute ? own_reals(m, m->largest) : NULL;
    for (int l = 0; l < L; l++) {
        size_t dense = (size_t)N * dense_width(c, l), gated = 1 + is_gated(dense_activation(c, l));
        m->layers[l].x = own_reals(m, (size_t)N * C);
        place_activations(m, l, N, shared ? shared : own_reals(m, place_activations(m, l, N, NULL)));
        if (is_moe(c, l))
            allocate_experts(m, l, N);
        width = dense > width ? dense : width;
        hidden = dense * gated > hidden ? dense * gated : hidden;
    }
    if (ranks.ep > 1 && moe) {
        m->travel = (Travel *)own(m, 2, sizeof(Travel));
        own_placement(m);
        // With an even load, and a quarter more (room_for): rows under way, four times; the experts' scratch of a half.
        size_t row = (size_t)(C / c->subtokens), moving = (size_t)n * min_int(places(c), ranks.ep), slots = nK / halves_of(m);
        size_t scratch = row + (size_t)c->ffn * (1 + 2 * is_gated(c->activation));
        m->bytes[FOR_BUFFERS] += (moving * 4 * row + slots * scratch) * sizeof(real) / 4 * 5;
    }
    for (int e = 0; moe && e < E && ranks.ep == 1; e++) {
        size_t act = nK * m->expert_width[e], both = act * (1 + is_gated(m->expert_activation[e]));
        width = act > width ? act : width;
        hidden = both > hidden ? both : hidden;
    }
    rows = nK > rows ? nK : rows;
    m->x = own_reals(m, (size_t)N * C);
    m->h = own_reals(m, (size_t)N * C);
    m->rstd = own_reals(m, N);
    m->purpose = FOR_BUFFERS;
    m->rows = own_reals(m, ranks.ep == 1 ? rows * C * moe : 0);
    m->act = own_reals(m, width);
    m->choice_score = own_reals(m, scores);
    m->unbiased = (int *)own(m, nK, sizeof(int));
    m->gru_room = own_reals(m, moe * N * 6 * R);
    m->head_rows = max_int(1, min_int(N, (1 << 24) / c->vocab)); // 64 MiB of float logits at most
    m->logits = own_reals(m, (size_t)m->head_rows * c->vocab);
    m->nll = own_reals(m, N);
    m->attention = own_reals(m, attention_room(c->seq, D) * (size_t)thread_count());
    m->angles = own_reals(m, (size_t)c->seq * D);
    rope_angles(m->angles, 0, c->seq, D, c->rope_theta);
    m->order = (int *)own(m, N, sizeof(int));
    m->offset = (int *)own(m, (size_t)c->vocab + 2, sizeof(int));
    m->purpose = HARDLY_TOUCHED;
    m->counts = (double *)own(m, moe * n * c->routers * E, sizeof(double));
    m->marks = (unsigned char *)own(m, moe * n * c->groups, 1);
    if (train) {
        for (int i = GRADS; i <= MOMENT2; i++) {
            m->purpose = i == GRADS ? FOR_GRADIENTS : FOR_MOMENTS;
            m->memory[i] = own_reals(m, i == GRADS || !MANY ? m->size : moment_place(m, m->size));
        }
        point_weights(m, &m->grads, m->memory[GRADS]);
        m->purpose = FOR_BUFFERS;
        m->dx = own_reals(m, (size_t)N * C);
        m->dh = own_reals(m, (size_t)N * C);
        m->datt = own_reals(m, (size_t)N * C);
        m->dqkv = own_reals(m, (size_t)N * Q);
        m->dhidden = own_reals(m, hidden);
        m->dlogits = own_reals(m, scores * (1 + c->noise));
        m->dnoisy = own_reals(m, c->noise ? scores : 0);
        m->dp = own_reals(m, scores);
        m->dgroups = own_reals(m, two * n * c->groups);
        m->dweight = own_reals(m, nK);
        m->dgate = own_reals(m, two * nK * c->groups);
        m->dgroup_weight = own_reals(m, two * nK);
        m->drouter = own_reals(m, c->jitter > 0 ? (size_t)N * C : 0);
        m->dsub = own_reals(m, c->subtokens > 1 ? (size_t)N * C : 0);
        m->dmerged = own_reals(m, c->subtokens > 1 ? (size_t)N * C : 0);
        m->dstate = own_reals(m, moe * N * R * 2);
        m->dprojected = own_reals(m, moe * N * R);
        m->partial = own_reals(m, (size_t)div_up(N, CHUNK) * C);
    }
    return m;
}

void free_rooms(Room *list, int count) {
    for (int i = 0; i < count; i++)
        free(list[i].memory);
}

void model_free(Model *m) {
    if (m->one)
        model_free(m->one);
    for (int half = 0; half < 2 && m->travel; half++) {
        free_rooms(&m->travel[half].of_out, 8);
        for (int l = 0; l < m->config.layers; l++) {
            if (m->layers[l].exchange)
                free_rooms(&m->layers[l].exchange[half].of_token, 5);
        }
    }
    free_rooms(&m->of_rows, 3);
    for (int what = 0; what < 4; what++)
        free(m->whole_memory[what]);
    for (int i = 0; i < m->owned_count; i++)
        free(m->owned[i]);
    free(m->owned);
    free(m);
}

// The tokens of a group of tokens, of n in sequences of T.
int group_size(const Config *c, int n, int T) {
    return c->group == SEQUENCE ? T : n;
}

// Whether other ranks have tokens of the same group.
int is_spread(const Config *c) {
    return MANY && c->group != SEQUENCE;
}

// The tokens of a group of tokens, on all ranks together, of n on this one.
int whole_group_size(const Model *m, int n, int T) {
    int total = 0;
    if (!is_spread(&m->config))
        return group_size(&m->config, n, T);
    for (int r = 0; r < ranks.size; r++)
        total += m->rank_tokens[r] * m->config.subtokens;
    return total;
}

// All tokens' rows of the group, in order, where the group is spread over ranks: each token's `width` things of `size`
// bytes; to be freed. *first: how many tokens come before this rank's.
void *gather_tokens(const Model *m, const void *mine, int width, size_t size, int *first) {
    *first = 0;
    for (int r = 0; r < ranks.rank; r++)
        *first += m->rank_tokens[r] * m->config.subtokens;
    return gather_rows(mine, m->rank_tokens, (size_t)(width * m->config.subtokens) * size);
}

// The layer of experts below l, NULL where there is none: where the recurrent router comes from.
LayerState *experts_below(Model *m, int l) {
    while (--l >= 0 && !is_moe(&m->config, l))
        ;
    return l < 0 ? NULL : &m->layers[l];
}

uint64_t layer_stream(const Model *m, int purpose, int l) {
    return random_stream((uint64_t)m->config.seed, purpose, m->step, (uint64_t)l);
}

// Which experts each token gets: fills plan->expert, and the weights.
void choose(Model *m, int l, LayerState *s, const real *router_in, int n, int group_tokens) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l];
    Gate *g = &s->gate;
    Plan *plan = &s->plan;
    int rows = n * g->per, E = c->experts, W = router_width(c), C = c->recurrent ? c->recurrent : c->dim / c->subtokens;
    const real *score = g->p;
    if (w->slow) { // highest logits are highest scores
        product(m->choice_score, along_rows(router_in, C, NULL), along_rows(w->slow, C, NULL), n, W, C, 0);
        score = m->choice_score;
    } else if (w->bias || (c->select == TOP_K && c->group_topk)) {
        for (size_t i = 0; i < (size_t)n * E; i++)
            m->choice_score[i] = g->p[i] + (w->bias ? w->bias[i % E] : 0);
        score = m->choice_score;
    }
    if (c->select == TOP_K && c->group_topk)
        mask_groups(m->choice_score, n, E, c->groups, c->group_topk, c->group_score);
    if ((c->select == EXPERT_CHOICE || c->select == BALANCED) && m->mode == TRAIN_MODE) {
        int take = max_int(1, (int)((double)group_tokens * c->topk / E)), K = g->K, all = n, mine = 0;
        const real *by = c->select == BALANCED ? s->logits : g->p;
        real *gathered = NULL;
        int *expert = g->expert;
        if (is_spread(c)) { // each rank chooses for all
            by = gathered = (real *)gather_tokens(m, by, E, sizeof(real), &mine);
            all = group_tokens;
            expert = (int *)allocate((size_t)all * K, sizeof(int));
        }
        for (int first = 0; first < all; first += group_tokens) {
            if (c->select == BALANCED) {
                select_balanced(expert + first, by + (size_t)first * E, group_tokens, E);
                continue;
            }
            select_by_experts(expert + (size_t)first * E, m->stats[l].lowest, by + (size_t)first * E, group_tokens, E, take);
            m->stats[l].passes += 1;
        }
        if (gathered) {
            memcpy(g->expert, expert + (size_t)mine * K, (size_t)n * K * sizeof(int));
            free(expert);
            free(gathered);
        }
    } else {
        select_topk(g->expert, score, rows, g->E, g->K);
    }
    if (c->select == THRESHOLD || (c->select == EXPERT_CHOICE && m->mode != TRAIN_MODE))
        select_above(g->expert, g->p, n, E, g->K, w->level, c->threshold > 0 ? c->threshold : 1.0 / E,
                     c->select == THRESHOLD);
    gate_forward(g->weight, g->p, g->expert, rows, g->E, g->K, c->gate, c->scale / c->routers);
    if (c->select == HIERARCHICAL) {
        select_topk(s->groups.expert, s->groups.p, n, c->groups, c->group_topk);
        gate_forward(s->groups.weight, s->groups.p, s->groups.expert, n, c->groups, c->group_topk, c->gate, 1);
        join_gates_forward(plan->expert, s->weight, &s->groups, g, n);
    }
}

// m->marks (n,D): which groups of experts each token chose; all where groups are not chosen first.
void mark_groups(Model *m, const LayerState *s, int n) {
    const Config *c = &m->config;
    int D = c->groups, M = c->group_topk, two = c->select == HIERARCHICAL;
    memset(m->marks, !two, (size_t)n * D);
    for (int i = 0; two && i < n * M; i++)
        m->marks[i / M * D + s->groups.expert[i]] = 1;
}

// The losses of the smooth load, 1 + CV^2 for each group of tokens, and their slopes. Where groups of experts are
// chosen first, an expert's load is that of its group times its share of the tokens sent there (Shazeer et al. 2017,
// appendix B).
double load_losses(Model *m, LayerState *s, int n, int group_tokens) { // group_tokens: of this rank
    const Config *c = &m->config;
    int E = c->experts, D = c->groups, two = c->select == HIERARCHICAL, W = router_width(c);
    double loss = 0, weight = c->load_weight * group_tokens / n;
    double *inner = (double *)allocate((size_t)2 * (E + D), sizeof(double)), *load = inner + E, *outer = load + E,
           *sent = outer + D;
    mark_groups(m, s, n);
    for (int first = 0; first < n; first += group_tokens) {
        double *slope = s->load_slope + (size_t)(first / group_tokens) * (E + D);
        memset(inner, 0, (size_t)2 * (E + D) * sizeof(double));
        smooth_load(inner, NULL, NULL, NULL, &s->gate, s->noisy, s->logits, W, first, group_tokens, m->marks);
        if (two)
            smooth_load(outer, NULL, NULL, NULL, &s->groups, s->noisy, s->logits, W, first, group_tokens, NULL);
        for (int i = first * D; two && i < (first + group_tokens) * D; i++)
            sent[i % D] += m->marks[i];
        if (is_spread(c))
            sum_over_ranks(inner, 2 * (E + D));
        for (int e = 0; e < E; e++) {
            int d = group_of(e, E, D);
            load[e] = !two ? inner[e] : sent[d] > 0 ? outer[d] * inner[e] / sent[d] : 0;
        }
        loss += weight * cv_squared(load, slope, E, 0, weight);
        memset(slope + E, 0, (size_t)D * sizeof(double));
        for (int e = 0; two && e < E; e++) {
            int d = group_of(e, E, D);
            slope[E + d] += sent[d] > 0 ? slope[e] * inner[e] / sent[d] : 0;
            slope[e] *= sent[d] > 0 ? outer[d] / sent[d] : 0;
        }
        for (int i = 0; is_spread(c) && i < E + D; i++) // gradients are averaged over ranks, this is a slope of a sum
            slope[i] *= ranks.size;
    }
    free(inner);
    return loss;
}

// All balance losses of a layer, weighted, into s->aux, and their slopes.
void balance_losses(Model *m, int l, LayerState *s, int n, int group_tokens, int whole_group) {
    const Config *c = &m->config;
    Gate *g = &s->gate;
    const Plan *plan = &s->plan;
    int E = c->experts, K = plan->K, R = c->routers, rows = n * R, groups = n / group_tokens,
        group_rows = group_tokens * R;
    double *counts = m->counts;
    s->aux = 0;
    memset(s->weight_slope, 0, (size_t)groups * E * sizeof(double));
    for (int row = 0; c->z_weight > 0 && row < n * g->per; row++)
        s->aux += c->z_weight * (double)g->lse[row] * (double)g->lse[row] / (n * g->per);
    for (int i = 0; c->sparsity_weight > 0 && i < n * K; i++)
        s->aux += plan->expert[i] >= 0 ? c->sparsity_weight / n / E : 0;
    if (c->load_weight > 0)
        s->aux += load_losses(m, s, n, group_tokens);
    if (c->balance == CV2 || c->balance == VARIANCE) { // of the weights given to each expert
        memset(counts, 0, (size_t)groups * E * sizeof(double));
        double mean = c->balance == VARIANCE ? (double)whole_group / E : 0, weight = c->aux_weight / groups;
        for (int i = 0; i < n * K; i++) {
            if (plan->expert[i] >= 0)
                counts[(size_t)(i / K / group_tokens) * E + plan->expert[i]] += (double)s->weight[i];
        }
        if (is_spread(c))
            sum_over_ranks(counts, E);
        for (int i = 0; i < groups && c->aux_weight > 0; i++)
            s->aux += weight * cv_squared(counts + (size_t)i * E, s->weight_slope + (size_t)i * E, E, mean, weight);
        for (int e = 0; is_spread(c) && e < E; e++) // as in load_losses
            s->weight_slope[e] *= ranks.size;
        if (c->select == HIERARCHICAL)
            return;
    }
    if (c->balance == UNBIASED)
        select_topk(m->unbiased, g->p, n, E, K);
    count_choices(counts, c->balance == UNBIASED ? m->unbiased : plan->key, rows, E, K / R, c->balance == GSHARD ? 1 : K / R, group_rows, R);
    if (c->group == STEP && m->mode == TRAIN_MODE) // all micro-steps so far (Qiu et al. 2025, Demons in the Detail)
        memcpy(counts, m->stats[l].count, (size_t)E * sizeof(double));
    if (is_spread(c))
        sum_over_ranks(counts, R * E);
    memset(s->slope, 0, (size_t)groups * R * E * sizeof(double));
    for (int i = 0; i < groups * R; i++) {
        double *slope = s->slope + (size_t)i * E, *count = counts + (size_t)i * E;
        if (c->balance <= WIDTH && c->aux_weight > 0)
            add_balance(slope, count, c->balance == WIDTH ? m->expert_width : NULL, E, c->aux_weight);
        if (c->device_weight > 0)
            add_device_balance(slope, count, E, c->groups, c->device_weight);
        if (c->comm_weight > 0)
            add_communication_balance(slope, plan->key + (size_t)i * group_tokens * K, group_tokens, E, K, c->groups,
                                      c->group_topk, c->comm_weight, whole_group, is_spread(c));
    }
    s->aux += balance_forward(g, s->slope, rows, group_rows, c->score);
}

// What the log shows of a layer's routing in training, and what some recipes steer by.
void add_router_stats(Model *m, int l, LayerState *s) {
    const Config *c = &m->config;
    RouterStats *stats = &m->stats[l];
    const Gate *g = &s->gate;
    int n = s->plan.N, choices = n * s->plan.K;
    for (int i = 0; i < choices; i++) {
        if (s->plan.key[i] >= 0) {
            stats->count[s->plan.key[i]] += 1;
            stats->active += 1;
        }
    }
    stats->tokens += n;
    int rows = c->select == HASH ? 0 : n * g->per, chunks = div_up(rows, CHUNK);
    double *part = (double *)allocate(chunks, sizeof(double));
#pragma omp parallel for
    for (int chunk = 0; chunk < chunks; chunk++) {
        for (int row = chunk * CHUNK; row < min_int(rows, (chunk + 1) * CHUNK); row++) {
            double share = c->select == HIERARCHICAL ? (double)s->groups.p[row] : 1.0 / g->per, sum = 0;
            for (int e = 0; c->score == SIGMOID && e < g->E; e++)
                sum += (double)g->p[(size_t)row * g->E + e];
            for (int e = 0; e < g->E; e++) {
                double p = (double)g->p[(size_t)row * g->E + e] / (c->score == SIGMOID ? sum : 1);
                part[chunk] -= p > 0 ? share * p * log(c->select == HIERARCHICAL ? p * share : p) : 0;
            }
        }
    }
    for (int chunk = 0; chunk < chunks; chunk++)
        stats->entropy += part[chunk];
    free(part);
}

// plan_capacity, where the group is spread over ranks: each rank does it for all and keeps what is its own.
void plan_whole_capacity(const Model *m, Plan *plan, int group_tokens, double factor, int units, int order,
                         const real *weight, const unsigned char *exempt, const real *p) {
    int K = plan->K, first;
    size_t mine = (size_t)plan->N * K;
    Plan all = *plan;
    all.N = group_tokens;
    all.key = (int *)gather_tokens(m, plan->key, K, sizeof(int), &first);
    all.expert = p ? (int *)gather_tokens(m, plan->expert, K, sizeof(int), &first) : NULL;
    real *weights = order == BY_SCORE ? (real *)gather_tokens(m, weight, K, sizeof(real), &first) : NULL;
    real *scores = p ? (real *)gather_tokens(m, p, plan->E, sizeof(real), &first) : NULL;
    unsigned char *marks = exempt ? (unsigned char *)gather_tokens(m, exempt, 1, 1, &first) : NULL;
    plan_capacity(&all, group_tokens, factor, units, order, weights, marks, scores);
    plan->dropped = 0;
    for (size_t i = 0; i < mine; i++)
        plan->dropped += plan->key[i] >= 0 && all.key[(size_t)first * K + i] < 0;
    memcpy(plan->key, all.key + (size_t)first * K, mine * sizeof(int));
    if (p)
        memcpy(plan->expert, all.expert + (size_t)first * K, mine * sizeof(int));
    free(all.key), free(all.expert), free(weights), free(scores), free(marks);
}

// Routes n tokens x (n,C) in sequences of T: fills s->plan, s->weight and the balance losses.
void router_forward(Model *m, int l, LayerState *s, const real *x, int n, int C, int T) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l];
    Plan *plan = &s->plan;
    int train = m->mode == TRAIN_MODE, W = router_width(c), R = c->recurrent, group_tokens = group_size(c, n, T),
        whole_group = whole_group_size(m, n, T);
    uint64_t first = m->first_token * (uint64_t)c->subtokens;
    plan->N = n;
    if (c->select == HASH) {
        for (int i = 0; i < n; i++) {
            plan->expert[i] = (int)w->table[m->tokens[i]];
            s->weight[i] = (real)c->scale;
        }
    } else {
        if (train && c->jitter > 0) {
            apply_jitter(s->jittered, x, (size_t)n * C, c->jitter, layer_stream(m, RANDOM_JITTER, l), first * C);
            x = s->jittered;
        }
        if (R) {
            LayerState *below = experts_below(m, l);
            product(s->projected, along_rows(x, C, NULL), along_rows(w->project, C, NULL), n, R, C, 0);
            gru_forward(s->state, s->gru, s->projected, below ? below->state : NULL, m->weights.gru_x, m->weights.gru_h,
                        m->weights.gru_bx, m->weights.gru_bh, n, R, m->gru_room);
            x = s->state;
            C = R;
        }
        product(s->logits, along_rows(x, C, NULL), along_rows(w->router, C, NULL), n, W * (1 + c->noise), C, 0);
        if (c->noise)
            noise_forward(s->noisy, s->logits, n, W, train, layer_stream(m, RANDOM_NOISE, l), first);
        scores_forward(&s->gate, s->noisy, n, W, c->score);
        if (c->select == HIERARCHICAL)
            scores_forward(&s->groups, s->noisy, n, W, c->score);
        choose(m, l, s, x, n, whole_group);
    }
    memcpy(plan->key, plan->expert, (size_t)n * plan->K * sizeof(int));
    if (train && c->second_threshold > 0)
        decline_second(plan->key, s->weight, n, c->second_threshold, c->scale, layer_stream(m, RANDOM_SECOND, l),
                       first);
    if (train)
        add_router_stats(m, l, s);
    if (m->mode != EVAL_MODE && c->select != HASH)
        balance_losses(m, l, s, n, group_tokens, whole_group);
    if (train) {
        for (int i = 0; i < n && c->drop_exempt > 0; i++)
            m->marks[i] = random_uniform(random_stream((uint64_t)c->seed, RANDOM_EXEMPT, m->step, 0), (first + i) / T) <
                          c->drop_exempt;
    }
    double factor = train ? c->capacity_factor : c->eval_capacity_factor;
    int units = c->capacity_unit == EXPERT_GROUP ? c->groups : c->experts, order = train ? c->drop_order : BY_TOKEN;
    const unsigned char *exempt = train && c->drop_exempt > 0 ? m->marks : NULL;
    const real *p = c->overflow == NEXT ? s->gate.p : NULL;
    if (is_spread(c) && factor > 0)
        plan_whole_capacity(m, plan, whole_group, factor * c->topk / plan->K, units, order, s->weight, exempt, p);
    else
        plan_capacity(plan, group_tokens, factor * c->topk / plan->K, units, order, s->weight, exempt, p);
    if (c->overflow == NEXT)
        gate_forward(s->weight, s->gate.p, plan->expert, n, plan->E, plan->K, c->gate, c->scale);
    m->stats[l].dropped += train ? plan->dropped : 0;
    plan_sort(plan);
}

// Given m->dweight, the gradient by each choice's weight, adds to dx (n,C) and to the router's gradients.
void router_backward(Model *m, int l, LayerState *s, real *dx, const real *x, int n, int C, int T) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l], *dw = &m->grads.layer[l];
    Gate *g = &s->gate;
    Plan *plan = &s->plan;
    int E = c->experts, K = plan->K, W = router_width(c), WW = W * (1 + c->noise), R = c->recurrent,
        group_tokens = group_size(c, n, T), rows = n * g->per;
    int two = c->select == HIERARCHICAL;
    double scale = m->grad_scale;
    uint64_t first = m->first_token * (uint64_t)c->subtokens;
    if (c->select == HASH)
        return;
    real *dlogits = m->dlogits, *dnoisy = c->noise ? m->dnoisy : dlogits; // by the logits, by the noisy ones
    memset(dlogits, 0, (size_t)n * WW * sizeof(real));
    memset(dnoisy, 0, (size_t)n * W * sizeof(real));
    memset(m->dp, 0, (size_t)n * W * sizeof(real));
    for (int i = 0; i < n * K; i++) { // importance
        if (plan->expert[i] >= 0)
            m->dweight[i] += (real)(scale * s->weight_slope[(size_t)(i / K / group_tokens) * E + plan->expert[i]]);
    }
    const real *dgate = m->dweight;
    if (two) {
        join_gates_backward(m->dgroup_weight, m->dgate, m->dweight, &s->groups, g, n);
        memset(m->dgroups, 0, (size_t)n * c->groups * sizeof(real));
        gate_backward(m->dgroups, m->dgroup_weight, s->groups.weight, s->groups.p, s->groups.expert, n, c->groups,
                      c->group_topk, c->gate, 1);
        scores_backward(dnoisy, m->dgroups, &s->groups, n, W, c->score, 0);
        dgate = m->dgate;
    }
    gate_backward(m->dp, dgate, g->weight, g->p, g->expert, rows, g->E, g->K, c->gate, c->scale / c->routers);
    if (!two)
        balance_backward(m->dp, g, s->slope, rows, group_tokens * c->routers, c->score, scale);
    scores_backward(dnoisy, m->dp, g, n, W, c->score, c->z_weight * scale / rows);
    mark_groups(m, s, n);
    for (int from = 0; c->load_weight > 0 && from < n; from += group_tokens) {
        double *slope = s->load_slope + (size_t)(from / group_tokens) * (E + c->groups);
        for (int e = 0; e < E + c->groups; e++)
            slope[e] *= scale;
        smooth_load(NULL, slope, dnoisy, dlogits, g, s->noisy, s->logits, W, from, group_tokens, m->marks);
        if (two)
            smooth_load(NULL, slope + E, dnoisy, dlogits, &s->groups, s->noisy, s->logits, W, from, group_tokens, NULL);
    }
    if (c->noise)
        noise_backward(dlogits, dnoisy, s->logits, n, W, m->mode == TRAIN_MODE, layer_stream(m, RANDOM_NOISE, l),
                       first);

    // from the logits back to the router's input
    int jitter = m->mode == TRAIN_MODE && c->jitter > 0;
    const real *input = jitter ? s->jittered : x, *read = R ? s->state : input;
    int width = R ? R : C;
    real *target = jitter ? m->drouter : dx;
    product(dw->router, along_columns(dlogits, WW, NULL), along_columns(read, width, NULL), WW, width, n, 1);
    if (R) {
        LayerState *below = experts_below(m, l);
        int last;
        moe_layers(c, &last);
        product(m->dstate, along_rows(dlogits, WW, NULL), along_columns(w->router, R, NULL), n, R, WW, l != last);
        memcpy(m->dstate + (size_t)n * R, m->dstate, (size_t)n * R * sizeof(real));
        gru_backward(m->dprojected, m->dstate, m->grads.gru_x, m->grads.gru_h, m->grads.gru_bx, m->grads.gru_bh,
                     m->dstate + (size_t)n * R, s->gru, s->projected, below ? below->state : NULL, m->weights.gru_x,
                     m->weights.gru_h, n, R, m->gru_room);
        product(dw->project, along_columns(m->dprojected, R, NULL), along_columns(input, C, NULL), R, C, n, 1);
        product(target, along_rows(m->dprojected, R, NULL), along_columns(w->project, C, NULL), n, C, R, target == dx);
    } else {
        product(target, along_rows(dlogits, WW, NULL), along_columns(w->router, C, NULL), n, C, WW, target == dx);
    }
    if (jitter) { // d(x * j)/dx = the same j
        apply_jitter(m->drouter, m->drouter, (size_t)n * C, c->jitter, layer_stream(m, RANDOM_JITTER, l), first * C);
        for (size_t i = 0; i < (size_t)n * C; i++)
            dx[i] += m->drouter[i];
    }
}

// ---- experts on several ranks
//
// A token's row is sent once to each rank that has some of its experts, with their numbers and weights. There it is a
// token like any other: the rank sorts what it has received by expert, lets its experts answer, adds each row's answers
// up and sends one row back. Where --ep divides the number of groups of experts, each of these lies whole on a rank, so
// a router that is held to M groups sends a row to M ranks at most. The tokens go in two halves, so that one can travel
// while the other is worked on.

void *room_for(Room *r, size_t count, size_t size) { // what was in it is lost when it grows
    if (count * size > r->bytes || !r->memory) {
        free(r->memory);
        r->bytes = count * size / 4 * 5;
        r->memory = allocate(r->bytes, 1);
    }
    return r->memory;
}

real *reals_for(Room *r, size_t count) {
    return (real *)room_for(r, count, sizeof(real));
}

// The rank of the group to which token n of the rank at `place` goes for expert e, and the expert's number there. Of two
// copies the one here is best; else even tokens go to one, odd ones to the other. here: experts of a rank; host, slot (E)
BOTH int rank_of_expert(const int *host, const int *slot, int here, int place, int e, int n, int *number) {
    int owner = e / here, there = host[e] >= 0 && owner != place && (host[e] == place || n % 2) ? host[e] : owner;
    *number = there == owner ? e - owner * here : here + slot[e];
    return there;
}

int expert_rank(const Model *m, int l, int e, int n, int *number) { // of layer l, for a token of this rank
    const Placement *p = m->placement;
    int first = l * m->config.experts;
    return rank_of_expert(p->host + first, p->slot + first, p->here, ranks.place, e, n, number);
}

// Sends row after row of `bytes` to the ranks of the group, and receives such.
void send_rows(Travel *t, const void *out, const int *sent, const int *sent_at, void *in, const int *got,
               const int *got_at, size_t bytes) {
    for (int r = 0; r < ranks.ep; r++)
        ranks.traffic.sent += r == ranks.place ? 0 : (double)bytes * sent[r];
    start_all_to_all(out, sent, sent_at, in, got, got_at, bytes, &t->request[t->requests++]);
}

void await_rows(Travel *t) {
    ranks_wait(t->request, t->requests);
    t->requests = 0;
}

// from (N,C) by token: packs the rows that go, and sends them.
void send_tokens(Exchange *ex, Travel *t, const real *from, real *in, int C) {
    t->out = reals_for(&t->of_out, (size_t)ex->rows * C);
#pragma omp parallel for if (ex->rows > 16)
    for (int r = 0; r < ex->rows; r++)
        memcpy(t->out + (size_t)r * C, from + (size_t)ex->token[r] * C, (size_t)C * sizeof(real));
    send_rows(t, t->out, ex->sent, ex->sent_at, in, ex->got, ex->got_at, (size_t)C * sizeof(real));
}

// Sends each of the n tokens x (n,C) to the ranks that have its experts.
void exchange_start(Model *m, int l, LayerState *s, const real *x, int n, int C) {
    const Plan *plan = &s->plan;
    int K = plan->K, ep = ranks.ep, halves = halves_of(m), number;
    int *sending = (int *)allocate((size_t)ep * 6, sizeof(int)), *arriving = sending + 2 * ep; // (ep,2): rows of each half
    int *next = sending + 4 * ep, *row = sending + 5 * ep; // (ep): the next row for each rank, and this token's
    for (int half = 0; half < halves; half++) {
        Exchange *ex = &s->exchange[half];
        Travel *t = &m->travel[half];
        for (int filling = 0; filling < 2; filling++) { // count the rows, then write them down
            for (int i = (int)((long)n * half / halves); i < (int)((long)n * (half + 1) / halves); i++) {
                memset(row, -1, (size_t)ep * sizeof(int));
                for (int k = 0; k < K; k++) {
                    int expert = plan->key[i * K + k], there = expert < 0 ? 0 : expert_rank(m, l, expert, i, &number);
                    if (expert < 0)
                        continue;
                    if (row[there] < 0) {
                        row[there] = next[there]++;
                        if (filling)
                            ex->token[row[there]] = i;
                    }
                    if (filling) {
                        t->choices_out[(size_t)row[there] * 2 * K + k] = s->weight[i * K + k];
                        t->choices_out[(size_t)row[there] * 2 * K + K + k] = (real)number;
                    }
                }
            }
            ex->rows = filling ? ex->rows : 0;
            for (int r = 0; r < ep && !filling; r++) {
                sending[2 * r + half] = ex->sent[r] = next[r];
                ex->sent_at[r] = next[r] = ex->rows;
                ex->rows += ex->sent[r];
            }
            if (!filling) {
                ex->token = (int *)room_for(&ex->of_token, (size_t)ex->rows, sizeof(int));
                t->choices_out = reals_for(&t->of_choices_out, (size_t)ex->rows * 2 * K);
                for (size_t i = 0; i < (size_t)ex->rows * 2 * K; i++)
                    t->choices_out[i] = (real)(i / K % 2 ? -1 : 0);
            }
        }
        memset(next, 0, (size_t)ep * sizeof(int));
    }
    all_to_all(sending, arriving, 2);
    for (int half = 0; half < halves; half++) {
        Exchange *ex = &s->exchange[half];
        Travel *t = &m->travel[half];
        ex->came = 0;
        for (int r = 0; r < ep; r++) {
            ex->got[r] = arriving[2 * r + half];
            ex->got_at[r] = ex->came;
            ex->came += ex->got[r];
        }
        ex->x = reals_for(&ex->of_x, (size_t)ex->came * C);
        t->choices = reals_for(&t->of_choices, (size_t)ex->came * 2 * K);
        send_rows(t, t->choices_out, ex->sent, ex->sent_at, t->choices, ex->got, ex->got_at, (size_t)2 * K * sizeof(real));
        send_tokens(ex, t, x, ex->x, C);
    }
    free(sending);
}

// The experts of layer l for the tokens of a plan: all of them, or those that this rank has, for what came.
Experts layer_experts(const Model *m, int l, const Plan *plan, int C) {
    const LayerWeights *w = &m->weights.layer[l];
    Experts all = {plan->E, C, m->expert_width, m->expert_activation, w->w_in, w->w_out, plan->offset, plan->token};
    if (APART) {
        all.width = m->placement->width + l * plan->E;
        all.activation = m->placement->activation + l * plan->E;
    }
    return all;
}

// Sorts what has come by expert, and makes room for the experts' work.
void exchange_plan(Model *m, int l, Exchange *ex, const Travel *t, int K) {
    Placement *p = m->placement;
    int E = p->here + p->room, widest = 1, wide = 1;
    size_t choices = (size_t)ex->came * K;
    int *ints = (int *)room_for(&ex->of_plan, 5 * choices + E + 1, sizeof(int));
    Plan plan = {ex->came, E, K, ints, ints, ints + choices, ints + 2 * choices, ints + 3 * choices, ints + 4 * choices, 0};
    ex->weight = reals_for(&ex->of_weight, choices);
    for (int r = 0; r < ex->came; r++) {
        for (int k = 0; k < K; k++) {
            ex->weight[r * K + k] = t->choices[(size_t)r * 2 * K + k];
            plan.key[r * K + k] = (int)t->choices[(size_t)r * 2 * K + K + k];
        }
    }
    plan_sort(&plan);
    ex->plan = plan;
    for (int i = l * E; i < (l + 1) * E; i++) {
        wide = max_int(wide, p->width[i]);
        widest = max_int(widest, p->width[i] * (1 + is_gated(p->activation[i])));
    }
    ex->hidden = reals_for(&ex->of_hidden, (size_t)plan.offset[E] * widest);
    reals_for(&m->of_act, (size_t)plan.offset[E] * wide);
    reals_for(&m->of_dhidden, (size_t)plan.offset[E] * widest);
}

// The experts' work on each half as it comes, and their answers' way back: to (n,C) +=
void exchange_forward(Model *m, int l, LayerState *s, real *to, int C) {
    int halves = halves_of(m), K = s->plan.K;
    for (int half = 0; half < halves; half++) {
        Exchange *ex = &s->exchange[half];
        Travel *t = &m->travel[half];
        await_rows(t);
        exchange_plan(m, l, ex, t, K);
        real *rows = reals_for(&m->of_rows, (size_t)ex->plan.offset[ex->plan.E] * C);
        Experts here = layer_experts(m, l, &ex->plan, C);
        experts_forward(rows, ex->hidden, (real *)m->of_act.memory, ex->x, &here, 0);
        t->answers = reals_for(&t->of_answers, (size_t)ex->came * C);
        t->back = reals_for(&t->of_back, (size_t)ex->rows * C);
        memset(t->answers, 0, (size_t)ex->came * C * sizeof(real));
        combine(t->answers, rows, ex->weight, ex->plan.slot, ex->came, K, C);
        send_rows(t, t->answers, ex->got, ex->got_at, t->back, ex->sent, ex->sent_at, (size_t)C * sizeof(real));
    }
    for (int half = 0; half < halves; half++) {
        Exchange *ex = &s->exchange[half];
        Travel *t = &m->travel[half];
        await_rows(t);
        for (int r = 0; r < ranks.ep; r++) // from one rank at most one row for a token
            combine_rows(to, t->back + (size_t)ex->sent_at[r] * C, ex->token + ex->sent_at[r], ex->sent[r], C);
    }
}

// Backward, first: dout (n,C), by token, goes where the tokens went.
void exchange_start_backward(Model *m, LayerState *s, const real *dout, int C) {
    for (int half = 0; half < halves_of(m); half++) {
        Travel *t = &m->travel[half];
        t->in = reals_for(&t->of_in, (size_t)s->exchange[half].came * C);
        send_tokens(&s->exchange[half], t, dout, t->in, C);
    }
}

// And then: the gradients by the experts' weights, dx (n,C) += , m->dweight (n,K) +=
void exchange_backward(Model *m, int l, LayerState *s, real *dx, int C) {
    int halves = halves_of(m), K = s->plan.K;
    const LayerWeights *dw = &m->grads.layer[l];
    for (int half = 0; half < halves; half++) {
        Exchange *ex = &s->exchange[half];
        Travel *t = &m->travel[half];
        await_rows(t);
        real *rows = reals_for(&m->of_rows, (size_t)ex->plan.offset[ex->plan.E] * C);
        Experts here = layer_experts(m, l, &ex->plan, C);
        t->dweight = reals_for(&t->of_dweight, (size_t)ex->came * K);
        t->answers = reals_for(&t->of_answers, (size_t)ex->came * C);
        t->back = reals_for(&t->of_back, (size_t)ex->rows * C);
        t->dweight_back = reals_for(&t->of_dweight_back, (size_t)ex->rows * K);
        memset(t->dweight, 0, (size_t)ex->came * K * sizeof(real));
        memset(t->answers, 0, (size_t)ex->came * C * sizeof(real));
        experts_backward(rows, dw->w_in, dw->w_out, t->dweight, t->in, ex->x, ex->hidden, ex->weight, ex->plan.choice,
                         (real *)m->of_act.memory, (real *)m->of_dhidden.memory, &here, 0);
        combine(t->answers, rows, NULL, ex->plan.slot, ex->came, K, C);
        send_rows(t, t->answers, ex->got, ex->got_at, t->back, ex->sent, ex->sent_at, (size_t)C * sizeof(real));
        send_rows(t, t->dweight, ex->got, ex->got_at, t->dweight_back, ex->sent, ex->sent_at, (size_t)K * sizeof(real));
    }
    for (int half = 0; half < halves; half++) {
        Exchange *ex = &s->exchange[half];
        Travel *t = &m->travel[half];
        await_rows(t);
        for (int r = 0; r < ranks.ep; r++) {
            combine_rows(dx, t->back + (size_t)ex->sent_at[r] * C, ex->token + ex->sent_at[r], ex->sent[r], C);
            combine_rows(m->dweight, t->dweight_back + (size_t)ex->sent_at[r] * K, ex->token + ex->sent_at[r], ex->sent[r], K);
        }
    }
}

// Shared experts, or a dense layer: out (N,C) +=
void dense_forward(Model *m, int l, LayerState *s, real *out, int N) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l];
    int everyone[2] = {0, N}, width = dense_width(c, l), activation = dense_activation(c, l);
    Experts dense = {1, c->dim, &width, &activation, w->dense_in, w->dense_out, everyone, NULL};
    if (w->dense_in)
        experts_forward(out, s->dense_hidden, m->act, s->h2, &dense, 1);
}

void dense_backward(Model *m, int l, LayerState *s, real *dh, const real *dout, int N) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l], *dw = &m->grads.layer[l];
    int everyone[2] = {0, N}, width = dense_width(c, l), activation = dense_activation(c, l);
    Experts dense = {1, c->dim, &width, &activation, w->dense_in, w->dense_out, everyone, NULL};
    if (w->dense_in)
        experts_backward(dh, dw->dense_in, dw->dense_out, NULL, dout, s->h2, s->dense_hidden, NULL, NULL, m->act,
                         m->dhidden, &dense, 1);
}

// One layer's feed-forward: out (N,C) += dense part + mixture of experts, of s->h2 (N,C).
void ffn_forward(Model *m, int l, LayerState *s, real *out, int N, int T) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l];
    int C = c->dim, h = c->subtokens, apart = APART && is_moe(c, l);
    if (!apart)
        dense_forward(m, l, s, out, N);
    if (!is_moe(c, l))
        return;
    const real *x = s->h2;
    real *to = out;
    if (h > 1) { // sub-tokens: Wu et al. 2024
        product(s->sub, along_rows(s->h2, C, NULL), along_rows(w->split, C, NULL), N, C, C, 0);
        memset(s->merged, 0, (size_t)N * C * sizeof(real));
        x = s->sub;
        to = s->merged;
    }
    router_forward(m, l, s, x, N * h, C / h, T * h);
    m->came[l] = N * h;
    if (apart) {
        exchange_start(m, l, s, x, N * h, C / h);
        dense_forward(m, l, s, out, N); // while the rows travel
        exchange_forward(m, l, s, to, C / h);
        m->came[l] = s->exchange[0].came + s->exchange[1].came; // of one half: 0
    } else {
        Experts experts = layer_experts(m, l, &s->plan, C / h);
        experts_forward(m->rows, s->hidden, m->act, x, &experts, 0);
        combine(to, m->rows, s->weight, s->plan.slot, N * h, s->plan.K, C / h);
    }
    if (h > 1)
        product(out, along_rows(s->merged, C, NULL), along_rows(w->merge, C, NULL), N, C, C, 1);
}

// With --recompute: the hidden layers again, of s->h2 and the plan as it was.
void ffn_recompute(Model *m, int l, LayerState *s, int N) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l];
    int everyone[2] = {0, N}, width = dense_width(c, l), activation = dense_activation(c, l);
    Experts dense = {1, c->dim, &width, &activation, w->dense_in, w->dense_out, everyone, NULL};
    if (w->dense_in)
        experts_hidden(s->dense_hidden, s->h2, &dense);
    if (!is_moe(c, l) || APART) // what came from other ranks is kept
        return;
    Experts experts = layer_experts(m, l, &s->plan, c->dim / c->subtokens);
    experts_hidden(s->hidden, c->subtokens > 1 ? s->sub : s->h2, &experts);
}

// Given dout (N,C), writes dh (N,C), the gradient by s->h2, and adds to the weights' gradients.
void ffn_backward(Model *m, int l, LayerState *s, real *dh, const real *dout, int N, int T) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l], *dw = &m->grads.layer[l];
    int C = c->dim, h = c->subtokens, apart = APART && is_moe(c, l);
    const real *of_answers = dout;
    memset(dh, 0, (size_t)N * C * sizeof(real));
    if (!apart)
        dense_backward(m, l, s, dh, dout, N);
    if (!is_moe(c, l))
        return;
    const real *x = h > 1 ? s->sub : s->h2;
    real *dx = h > 1 ? m->dsub : dh;
    if (h > 1) {
        product(m->dmerged, along_rows(dout, C, NULL), along_columns(w->merge, C, NULL), N, C, C, 0);
        product(dw->merge, along_columns(dout, C, NULL), along_columns(s->merged, C, NULL), C, C, N, 1);
        memset(m->dsub, 0, (size_t)N * C * sizeof(real));
        of_answers = m->dmerged;
    }
    Plan *plan = &s->plan;
    memset(m->dweight, 0, (size_t)plan->N * plan->K * sizeof(real)); // dropped choices get none
    if (apart) {
        exchange_start_backward(m, s, of_answers, C / h);
        dense_backward(m, l, s, dh, dout, N);
        exchange_backward(m, l, s, dx, C / h);
    } else {
        Experts experts = layer_experts(m, l, plan, C / h);
        experts_backward(m->rows, dw->w_in, dw->w_out, m->dweight, of_answers, x, s->hidden, s->weight, plan->choice,
                         m->act, m->dhidden, &experts, 0);
        combine(dx, m->rows, NULL, plan->slot, plan->N, plan->K, C / h);
    }
    router_backward(m, l, s, dx, x, plan->N, C / h, T * h);
    if (h > 1) {
        product(dh, along_rows(m->dsub, C, NULL), along_columns(w->split, C, NULL), N, C, C, 1);
        product(dw->split, along_columns(m->dsub, C, NULL), along_columns(s->h2, C, NULL), C, C, N, 1);
    }
}

// A step of training begins.
void clear_router_stats(Model *m) {
    for (int l = 0; l < m->config.layers; l++) {
        RouterStats *s = &m->stats[l];
        if (s->count)
            memset(s->count, 0, (size_t)2 * m->config.experts * sizeof(double)); // and lowest
        s->entropy = s->dropped = s->active = s->tokens = s->passes = 0;
    }
}

// The step's counts of all ranks, of all layers in one message.
void sum_router_stats(Model *m) {
    int L = m->config.layers, E = m->config.experts, each = 2 * E + 5;
    double *all = (double *)allocate((size_t)L * each, sizeof(double));
    for (int l = 0; l < L; l++) {
        const RouterStats *s = &m->stats[l];
        double *counts = all + (size_t)l * each;
        double single[] = {s->entropy, s->dropped, s->active, s->tokens, s->passes};
        if (is_moe(&m->config, l)) {
            memcpy(counts, s->count, (size_t)2 * E * sizeof(double)); // and lowest
            memcpy(counts + 2 * E, single, sizeof(single));
        }
    }
    sum_over_ranks(all, L * each);
    for (int l = 0; l < L; l++) {
        RouterStats *s = &m->stats[l];
        const double *counts = all + (size_t)l * each, *single = counts + 2 * E;
        if (is_moe(&m->config, l))
            memcpy(s->count, counts, (size_t)2 * E * sizeof(double));
        s->entropy = single[0], s->dropped = single[1], s->active = single[2], s->tokens = single[3], s->passes = single[4];
    }
    free(all);
}

// What follows a step without a gradient: the buffers of the recipes that have some, and who has had tokens of late.
void router_update(Model *m) {
    const Config *c = &m->config;
    if (MANY)
        sum_router_stats(m);
    for (int l = 0; l < c->layers; l++) {
        LayerWeights *w = &m->weights.layer[l];
        RouterStats *s = &m->stats[l];
        int E = is_moe(c, l) ? c->experts : 0;
        double mean = s->active / c->experts;
        for (int e = 0; e < E; e++) {
            s->idle[e] = s->count[e] > 0 ? 0 : s->idle[e] + 1;
            s->recent[e] += 0.02 * (s->count[e] / fmax(mean, 1e-9) - s->recent[e]);
            if (w->bias) // DeepSeek-V3: against the sign of what is too much
                w->bias[e] += (real)(c->bias_rate * ((mean > s->count[e]) - (mean < s->count[e])));
            if (w->level && s->passes > 0)
                w->level[e] += (real)(0.1 * (s->lowest[e] / s->passes - (double)w->level[e]));
        }
        size_t size = w->slow ? (size_t)router_width(c) * (c->recurrent ? c->recurrent : c->dim / c->subtokens) : 0;
        for (size_t i = 0; i < size; i++)
            w->slow[i] += (real)(1 - c->history_decay) * (w->router[i] - w->slow[i]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 8. Loss, AdamW, schedule

// The cross-entropy of N rows of hidden states h (N,C) against targets: nll (N), in nats. The logits of a few rows at a
// time are all that is ever in memory; so, with dh (N,C) and dhead (V,C) not NULL, their gradients are taken here and
// now, while the logits are there: dh =, dhead +=, both of scale * sum(nll). logits (head_rows,V) is scratch.
void head_loss(real *nll, real *dh, real *dhead, const real *h, const real *head, const int *targets, int N, int C,
               int V, double scale, real *logits, int head_rows) {
    for (int first = 0; first < N; first += head_rows) {
        int rows = min_int(head_rows, N - first);
        product(logits, along_rows(h + (size_t)first * C, C, NULL), along_rows(head, C, NULL), rows, V, C, 0);
#pragma omp parallel for
        for (int i = 0; i < rows; i++) {
            real *row = logits + (size_t)i * V, right = row[targets[first + i]];
            nll[first + i] = softmax(row, V) - right;
            row[targets[first + i]] -= 1; // d nll / d logits = p - onehot
            for (int v = 0; dh && v < V; v++)
                row[v] *= (real)scale;
        }
        if (dh) {
            product(dh + (size_t)first * C, along_rows(logits, V, NULL), along_columns(head, C, NULL), rows, C, V, 0);
            product(dhead, along_columns(logits, V, NULL), along_columns(h + (size_t)first * C, C, NULL), V, C, rows,
                    1);
        }
    }
}

// The first half of a layer, from s->x to s->h2.
void attend_forward(Model *m, int l) {
    const Config *c = &m->config;
    LayerState *s = &m->layers[l];
    const LayerWeights *w = &m->weights.layer[l];
    int N = m->B * m->T, C = c->dim, H = c->heads, KV = c->kv_heads, D = C / H, Q = (H + 2 * KV) * D;
    rmsnorm_forward(s->h1, s->rstd1, s->x, w->norm1, N, C, c->norm_eps);
    product(s->qkv, along_rows(s->h1, C, NULL), along_rows(w->qkv, C, NULL), N, Q, C, 0);
    rope(s->qkv, Q, N, m->T, H + KV, D, m->angles, 1);
    attention_forward(s->att, s->lse, s->qkv, m->B, m->T, H, KV, D, m->attention);
    copy_rows(s->mid, s->x, N, C);
    product(s->mid, along_rows(s->att, C, NULL), along_rows(w->proj, C, NULL), N, C, C, 1);
    rmsnorm_forward(s->h2, s->rstd2, s->mid, w->norm2, N, C, c->norm_eps);
    m->at_hand = l;
}

// The balance losses of the last forward pass, weighted: what is added to the loss for the gradient.
double model_aux(const Model *m) {
    double aux = 0;
    for (int l = 0; l < m->config.layers; l++)
        aux += m->layers[l].aux;
    return aux;
}

// m->rank_tokens: how many tokens each rank has.
void share_token_counts(Model *m, int N) {
    double *count = (double *)allocate(ranks.size, sizeof(double));
    count[ranks.rank] = N;
    sum_over_ranks(count, ranks.size);
    for (int r = 0; r < ranks.size; r++)
        m->rank_tokens[r] = (int)count[r];
    free(count);
}

// Runs B sequences of T tokens. Returns the mean cross-entropy per token; m->nll (N) holds each token's. In TRAIN_MODE
// capacity and chance are on. In all modes but EVAL_MODE the head's gradients are taken at once, scaled by grad_scale (1 /
// micro-steps). step, and the place of the first token in the step's whole batch, choose the random numbers.
double model_forward(Model *m, const int *tokens, const int *targets, int B, int T, int mode, double grad_scale,
                     long step, long first_token) {
    const Config *c = &m->config;
    int N = B * T, C = c->dim, L = c->layers;
    m->tokens = tokens;
    m->B = B;
    m->T = T;
    m->mode = mode;
    m->grad_scale = grad_scale;
    m->step = (uint64_t)step;
    m->first_token = (uint64_t)first_token;
    int begins = !first_token || first_token < (long)ranks.size * N; // the step's first micro-step
    m->last_pass = first_token / max_int(N, 1) / ranks.size == c->accum - 1;
    m->rank_tokens[ranks.rank] = N;
    if (is_spread(c))
        share_token_counts(m, N);
    if (mode == TRAIN_MODE && begins)
        clear_router_stats(m);
    embedding_forward(m->layers[0].x, m->weights.embed, tokens, N, C);
    for (int l = 0; l < L; l++) {
        LayerState *s = &m->layers[l];
        real *out = l + 1 < L ? m->layers[l + 1].x : m->x;
        attend_forward(m, l);
        copy_rows(out, s->mid, N, C);
        ffn_forward(m, l, s, out, N, T);
    }
    rmsnorm_forward(m->h, m->rstd, m->x, m->weights.norm, N, C, c->norm_eps);
    int train = mode != EVAL_MODE;
    head_loss(m->nll, train ? m->dh : NULL, train ? m->grads.head : NULL, m->h, m->weights.head, targets, N, C,
              c->vocab, grad_scale / max_int(N, 1), m->logits, m->head_rows);
    double loss = 0;
    for (int n = 0; n < N; n++)
        loss += (double)m->nll[n];
    m->loss = (begins ? 0 : m->loss) + grad_scale * loss / max_int(N, 1);
    m->total_aux = (begins ? 0 : m->total_aux) + grad_scale * model_aux(m);
    return loss / max_int(N, 1);
}

// ---- gradients of several ranks
//
// Gradients are summed while backward still runs: those of an expert's tensor as soon as its layer is done; all others
// are put together to buckets, and each begins its way as soon as it is full, or backward at its end.

size_t bucket = 1 << 20; // numbers

Request summing[4096];
int summing_count = 0;

void await_sums(void) {
    if (summing_count)
        ranks_wait(summing, summing_count);
    summing_count = 0;
}

// Begins to sum gradients from..end over all ranks, or, where `peers`, over those that have the same experts.
void start_sum(Model *m, size_t from, size_t end, int peers) {
    int sharing = peers ? ranks.groups : ranks.size;
    for (size_t n; from < end && sharing > 1; from += n) {
        if (summing_count == (int)(sizeof(summing) / sizeof(summing[0])))
            await_sums();
        n = end - from < largest_message / sizeof(real) ? end - from : largest_message / sizeof(real);
        ranks.traffic.reduced += 2.0 * (sharing - 1) / sharing * (double)(n * sizeof(real)); // what a ring sends
        start_sum_of_reals(m->memory[GRADS] + from, n, peers, &summing[summing_count++]);
    }
}

// After the backward pass of layer l (after that of the embedding: -1): sums what is finished. *from: where the gradients
// begin that are on their way already; start: start_sum, or the CUDA twin's.
void sum_layer(Model *m, int l, size_t *from, void (*start)(Model *m, size_t from, size_t end, int peers)) {
    size_t begin = m->common;
    for (int i = m->tensor_count - 1; i >= 0; i--) {
        const Tensor *t = &m->tensors[i];
        if (tensor_is_expert(t) && t->layer == l && !m->config.replicate)
            start(m, t->offset, t->offset + t->size, 1);
        else if (!tensor_is_expert(t) && t->layer == l && (l >= 0 || t->kind == EMBED))
            begin = t->offset; // the first one's in the end
    }
    if (begin < *from && (l < 0 || *from - begin >= bucket)) {
        start(m, begin, *from, 0);
        *from = begin;
    }
}

// Where this rank's expert `number` begins in memory, of tensor t; its own experts count first, then its copies.
size_t expert_offset(const Model *m, const Tensor *t, int number) {
    const Placement *p = m->placement;
    int at = t->layer * (p->here + p->room);
    size_t offset = t->offset, C = (size_t)(m->config.dim / m->config.subtokens);
    for (int i = at; i < at + number; i++)
        offset += C * p->width[i] * (t->kind == W_IN ? 1 + is_gated(p->activation[i]) : 1);
    return offset;
}

typedef struct Copy { // a matrix of an expert that has a second copy, of which this rank has one
    int partner, owned; // who has the other; whether this rank is the owner
    size_t at, size;  // where it is in memory[what]
} Copy;

Copy *list_copies(const Model *m, int *count) { // in the same order on all ranks; to be freed
    const Config *c = &m->config;
    const Placement *p = m->placement;
    Copy *list = (Copy *)allocate((size_t)m->tensor_count * c->experts, sizeof(Copy));
    *count = 0;
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        for (int e = 0; tensor_is_expert(t) && e < c->experts; e++) {
            int host = p->host[t->layer * c->experts + e], owner = e / p->here, owned = owner == ranks.place;
            int number = owned ? e - owner * p->here : p->here + p->slot[t->layer * c->experts + e];
            if (host < 0 || (!owned && host != ranks.place))
                continue;
            Copy copy = {owned ? host : owner, owned, expert_offset(m, t, number), expert_size(c, t->kind, e)};
            list[(*count)++] = copy;
        }
    }
    return list;
}

// Of experts with a second copy: the copies' gradients are added to their owners', or the owners' weights are copied.
void exchange_copies(Model *m, int what) {
    int count;
    size_t room = 0;
    Copy *list = list_copies(m, &count);
    for (int i = 0; i < count; i++)
        room += what == GRADS && list[i].owned ? list[i].size : 0;
    real *arrived = allocate_reals(room), *to = arrived;
    Request *requests = (Request *)allocate(count, sizeof(Request));
    for (int i = 0; i < count; i++) {
        const Copy *k = &list[i];
        real *own = m->memory[what] + k->at;
        if (k->owned == (what == GRADS)) {
            start_receive(what == GRADS ? to : own, k->size, k->partner, what, &requests[i]);
            to += k->size;
        } else {
            ranks.traffic.reduced += (double)(k->size * sizeof(real));
            start_send(own, k->size, k->partner, what, &requests[i]);
        }
    }
    ranks_wait(requests, count);
    free(requests);
    to = arrived;
    for (int i = 0; what == GRADS && i < count; i++) {
        real *own = m->memory[what] + list[i].at;
        for (size_t j = 0; j < list[i].size; j++)
            own[j] = list[i].owned ? own[j] + to[j] : 0;
        to += list[i].owned ? list[i].size : 0;
    }
    free(arrived);
    free(list);
}

// Gives each layer's busiest experts of late a second copy: one after the other on the rank that has least to do by then.
void choose_copies(Model *m) {
    const Config *c = &m->config;
    Placement *p = m->placement;
    int E = c->experts;
    Ranked *busy = (Ranked *)allocate(E, sizeof(Ranked));
    double *load = (double *)allocate(ranks.ep, sizeof(double));
    int *slots = (int *)allocate(ranks.ep, sizeof(int));
    memset(p->host, -1, (size_t)c->layers * E * sizeof(int));
    memset(p->copy, -1, (size_t)c->layers * p->room * sizeof(int));
    for (int l = 0; l < c->layers; l++) {
        if (!is_moe(c, l))
            continue;
        memset(load, 0, (size_t)ranks.ep * sizeof(double));
        memset(slots, 0, (size_t)ranks.ep * sizeof(int));
        for (int e = 0; e < E; e++) {
            busy[e].score = m->stats[l].recent[e];
            busy[e].index = e;
            load[e / p->here] += m->stats[l].recent[e];
        }
        qsort(busy, E, sizeof(Ranked), compare_ranked);
        for (int i = 0; i < min_int(p->room, E); i++) {
            int e = busy[i].index, owner = e / p->here, host = -1;
            for (int r = 0; r < ranks.ep; r++)
                host = r != owner && (host < 0 || load[r] < load[host]) ? r : host;
            load[owner] -= busy[i].score / 2;
            load[host] += busy[i].score / 2;
            p->host[l * E + e] = host;
            p->slot[l * E + e] = slots[host]++;
            if (host == ranks.place)
                p->copy[l * p->room + p->slot[l * E + e]] = e;
        }
        place_experts(m, l);
    }
    free(busy), free(load), free(slots);
}

// Adds the gradients of grad_scale * (loss + aux) of the last forward pass, which was not in EVAL_MODE.
void model_backward(Model *m) {
    const Config *c = &m->config;
    int B = m->B, T = m->T, N = B * T, C = c->dim, H = c->heads, KV = c->kv_heads, D = C / H, Q = (H + 2 * KV) * D;
    int sums = MANY && m->last_pass;
    size_t tail = m->grads.norm ? (size_t)(m->grads.norm - m->memory[GRADS]) : 0, from = tail;
    memset(m->dx, 0, (size_t)N * C * sizeof(real));
    rmsnorm_backward(m->dx, m->grads.norm, m->dh, m->x, m->rstd, m->weights.norm, N, C, m->partial);
    for (int l = c->layers - 1; l >= 0; l--) {
        LayerState *s = &m->layers[l];
        const LayerWeights *w = &m->weights.layer[l], *dw = &m->grads.layer[l];
        if (c->recompute && l != m->at_hand) {
            attend_forward(m, l);
            ffn_recompute(m, l, s, N);
        }
        ffn_backward(m, l, s, m->dh, m->dx, N, T);
        rmsnorm_backward(m->dx, dw->norm2, m->dh, s->mid, s->rstd2, w->norm2, N, C, m->partial);
        product(m->datt, along_rows(m->dx, C, NULL), along_columns(w->proj, C, NULL), N, C, C, 0);
        product(dw->proj, along_columns(m->dx, C, NULL), along_columns(s->att, C, NULL), C, C, N, 1);
        attention_backward(m->dqkv, m->datt, s->att, s->lse, s->qkv, B, T, H, KV, D, m->attention);
        rope(m->dqkv, Q, N, T, H + KV, D, m->angles, -1);
        product(m->dh, along_rows(m->dqkv, Q, NULL), along_columns(w->qkv, C, NULL), N, C, Q, 0);
        product(dw->qkv, along_columns(m->dqkv, Q, NULL), along_columns(s->h1, C, NULL), Q, C, N, 1);
        rmsnorm_backward(m->dx, dw->norm1, m->dh, s->x, s->rstd1, w->norm1, N, C, m->partial);
        if (sums)
            sum_layer(m, l, &from, start_sum);
    }
    embedding_backward(m->grads.embed, m->dx, m->tokens, N, C, c->vocab, m->order, m->offset);
    if (sums) {
        sum_layer(m, -1, &from, start_sum);
        start_sum(m, tail, m->common, 0); // the last norm, and what all layers have in common
    }
    if (sums && m->placement && c->replicate) {
        exchange_copies(m, GRADS);
        start_sum(m, m->common, m->size, 1); // of copies it is 0
    }
}

// The learning rate of step 1, 2, ..., steps.
double learning_rate(const Config *c, int step) {
    double low = c->min_lr < 0 ? c->lr / 10 : c->min_lr;
    if (step <= c->warmup)
        return c->lr * step / c->warmup;
    if (c->schedule == CONSTANT || step >= c->steps)
        return c->schedule == CONSTANT ? c->lr : low;
    if (c->schedule == WSD) { // warm-up, stable, decay: a straight line over the last fifth (Hu et al. 2024, MiniCPM)
        double start = fmax(c->warmup, 0.8 * c->steps);
        return step <= start ? c->lr : c->lr + (low - c->lr) * (step - start) / (c->steps - start);
    }
    double done = (double)(step - c->warmup) / (c->steps - c->warmup);
    return low + (c->lr - low) * 0.5 * (1 + cos(3.141592653589793 * done));
}

#define UPDATE_CHUNK 16384

double sum_of_squares(const real *g, size_t n) {
    int chunks = (int)((n + UPDATE_CHUNK - 1) / UPDATE_CHUNK);
    double *part = (double *)allocate(chunks, sizeof(double)), total = 0;
#pragma omp parallel for
    for (int i = 0; i < chunks; i++) {
        size_t end = (size_t)(i + 1) * UPDATE_CHUNK;
        end = end < n ? end : n;
        double sum[16] = {0}; // side by side, so that vectors can do it
        size_t j = (size_t)i * UPDATE_CHUNK;
        for (; j + 16 <= end; j += 16) {
            for (int k = 0; k < 16; k++)
                sum[k] += (double)g[j + k] * (double)g[j + k];
        }
        for (; j < end; j++)
            sum[0] += (double)g[j] * (double)g[j];
        for (int k = 0; k < 16; k++)
            part[i] += sum[k];
    }
    for (int i = 0; i < chunks; i++)
        total += part[i];
    free(part);
    return total;
}

// The norm of all gradients together.
double gradient_norm(const Model *m) {
    const real *g = m->memory[GRADS];
    if (!MANY)
        return sqrt(sum_of_squares(g, m->size));
    double total = sum_of_squares(g + m->slice, m->slice_end - m->slice);
    for (int i = 0; i < m->tensor_count; i++) {
        if (tensor_is_expert(&m->tensors[i]))
            total += sum_of_squares(g + m->tensors[i].offset, m->tensors[i].size) / ranks.groups;
    }
    sum_over_ranks(&total, 1);
    return sqrt(total);
}

// After each rank has updated its slice of what all have.
void share_weights(Model *m) {
    size_t slice = m->slice_end - m->slice;
    ranks.traffic.reduced += (double)(slice * sizeof(real)) * (ranks.size - 1);
    gather_slices(m->memory[WEIGHTS], slice / 16);
}

// How many numbers of tensor t this rank updates, from *at on in its memory: of what all ranks have, those of its slice.
size_t updated_part(const Model *m, const Tensor *t, size_t *at) {
    size_t end = t->offset + t->size;
    *at = t->offset;
    if (MANY && !tensor_is_expert(t)) {
        *at = *at > m->slice ? *at : m->slice;
        end = end < m->slice_end ? end : m->slice_end;
    }
    return tensor_is_buffer(t) || end < *at ? 0 : end - *at;
}

// AdamW with decoupled decay of the matrices (Loshchilov and Hutter 2019), on gradients scaled down to norm clip; then
// clears the gradients. step counts from 1. norm is gradient_norm(m).
void model_update(Model *m, int step, double lr, double norm) {
    const Config *c = &m->config;
    real scale = (real)(c->clip > 0 && norm > c->clip ? c->clip / norm : 1), b1 = (real)c->beta1, b2 = (real)c->beta2;
    real fix1 = (real)(1 / (1 - pow(c->beta1, step))), fix2 = (real)(1 / (1 - pow(c->beta2, step)));
    real rate = (real)lr, eps = (real)1e-8;
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        size_t at, size = updated_part(m, t, &at);
        if (!size)
            continue;
        size_t moment = moment_place(m, at);
        real *w = m->memory[WEIGHTS] + at, *g = m->memory[GRADS] + at;
        real *m1 = m->memory[MOMENT1] + moment, *m2 = m->memory[MOMENT2] + moment;
        real keep = (real)(tensor_is_vector(t) ? 1 : 1 - lr * c->weight_decay);
#pragma omp parallel for if (size > UPDATE_CHUNK)
        for (size_t j = 0; j < size; j++) {
            real grad = g[j] * scale;
            m1[j] = b1 * m1[j] + (1 - b1) * grad;
            m2[j] = b2 * m2[j] + (1 - b2) * grad * grad;
            w[j] = keep * w[j] - rate * (m1[j] * fix1) / ((real)sqrt(m2[j] * fix2) + eps);
            g[j] = 0;
        }
    }
    if (MANY) {
        memset(m->memory[GRADS], 0, m->common * sizeof(real)); // the other ranks' slices, too
        share_weights(m);
    }
    router_update(m);
    if (MANY && m->placement && c->replicate) {
        if (step % c->replicate_every == 0)
            choose_copies(m);
        exchange_copies(m, WEIGHTS);
    }
}

#include "data/checkpoint.h"
#include "dev/generate.h"
#include "dev/run.h"

#ifndef TRAIN_MOE_NO_MAIN
int main(int argc, char **argv) {
    return run_program(argc, argv, &cpu_backend);
}
#endif
