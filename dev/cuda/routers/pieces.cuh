// What the routers of this folder are put together from: the pieces of the lesson's router, each over all
// rows at once.
// Gives: scores_forward, select_topk, weights_forward, count_rows, add_balance, cv_squared, choose_by_groups;
// and topk_kernels, the lesson's router where the one kernel of train_moe.cu cannot be used.
// Needs: common.cuh; chapter 3 of train_moe.cu, whose functions for one row are called here.
//
// Names, arguments and arrays are those of train_moe.c, but the arrays are the device's. A row belongs to a
// warp, whose lanes run over the experts. Where the C twin does one group of tokens after another, one launch
// does all of them.
#ifndef CUDA_PIECES_CUH
#define CUDA_PIECES_CUH

// ---- what a layer's router and its losses ask of the model

// Where the losses of layer l are added up.
double *layer_aux(const Model *m, int l) {
    return layer_stats(m, l) + 4 * m->config.experts + AUX;
}

// Gradients are averaged over ranks, but the slope of a sum over ranks must not be: what it is multiplied by.
double slope_factor(const Config *c) {
    return is_spread(c) ? ranks.size : 1;
}

// The forward and the backward pass of a part take so many bytes of scratch memory, in at most 16 pieces, of
// which each begins at a multiple of 256 bytes.
void part_needs(Model *m, size_t forward, size_t backward) {
    need_scratch(m, (forward > backward ? forward : backward) + 16 * 256);
}

double *scratch_doubles(Model *m, size_t count) {
    return (double *)scratch_bytes(m, count * sizeof(double));
}

int *scratch_ints(Model *m, size_t count) {
    return (int *)scratch_bytes(m, count * sizeof(int));
}

float *scratch_zeros(Model *m, size_t count) {
    float *x = scratch(m, count);
    zero(x, count * sizeof(float));
    return x;
}

// Most chunks of CHUNK tokens in the groups of n tokens: what column_sums() takes for each column, in
// doubles.
size_t most_chunks(const Model *m, int n) {
    const Config *c = &m->config;
    int tokens = c->group == SEQUENCE ? c->seq * c->subtokens : n;
    return (size_t)most_groups(m) * div_up(tokens, CHUNK);
}

// Most tokens of a group, on all ranks, where each rank has n at most and chooses for all.
size_t most_tokens(const Config *c, int n) {
    return (size_t)n * (is_spread(c) ? ranks.size : 1);
}

// Tests: the choices of layer l are taken over from the C twin.
void take_choices(Model *m, int l) {
    Route *r = &m->acts.layer[l].route;
    const Decided *d = decided(m, l);
    if (d) {
        take_over(r->expert, d->expert, (size_t)r->N * r->K);
    }
}

// ---- scores

__global__ void scores_forward_kernel(float *p, float *lse, const float *logits, int rows, int E, int score) {
    int row = row_of_warp();
    if (row < rows) {
        size_t at = (size_t)row * E;
        scores_of_row(p + at, score == SOFTMAX ? lse + row : NULL, logits + at, E, score);
    }
}

void scores_forward(float *p, float *lse, const float *logits, int rows, int E, int score) {
    scores_forward_kernel<<<row_blocks(rows), THREADS, 0, stream>>>(p, lse, logits, rows, E, score);
    CHECK(cudaGetLastError());
}

__global__ void scores_backward_kernel(float *dlogits, const float *dp, const float *p, const float *lse,
                                       int rows, int E, int score, float z) {
    int row = row_of_warp();
    if (row < rows) {
        size_t at = (size_t)row * E;
        scores_back_row(dlogits + at, dp + at, p + at, score == SOFTMAX ? lse[row] : 0, E, score, z);
    }
}

// Writes dlogits (rows,E).
void scores_backward(float *dlogits, const float *dp, const float *p, const float *lse, int rows, int E,
                     int score, double z) {
    scores_backward_kernel<<<row_blocks(rows), THREADS, 0, stream>>>(dlogits, dp, p, lse, rows, E, score,
                                                                     (float)z);
    CHECK(cudaGetLastError());
}

// ---- choice

__global__ void select_topk_kernel(int *expert, const float *p, int N, int E, int K) {
    int row = row_of_warp();
    if (row < N) {
        const float *score = p + (size_t)row * E;
        topk_of_row(expert + (size_t)row * K, [=](int e) { return score[e]; }, E, K);
    }
}

void select_topk(int *expert, const float *p, int N, int E, int K) {
    select_topk_kernel<<<row_blocks(N), THREADS, 0, stream>>>(expert, p, N, E, K);
    CHECK(cudaGetLastError());
}

// r->expert (N,K) by a function that looks at whole groups of tokens: it fills expert (groups*group,K) by the
// numbers `by` (groups*group,E). Where a group is spread over ranks, each rank gathers the tokens of all,
// chooses for all, and keeps what it chose for its own.
void choose_by_groups(Model *m, int l, const float *by,
                      void (*choose)(Model *m, int l, int *expert, const float *by, int group, int groups)) {
    Route *r = &m->acts.layer[l].route;
    int group = ranks_group_size(m, r);
    if (!is_spread(&m->config)) {
        choose(m, l, r->expert, by, group, r->N / group);
        return;
    }
    float *all = scratch(m, (size_t)group * r->E);
    int *expert = scratch_ints(m, (size_t)group * r->K);
    int first = gather_tokens(m, all, by, (size_t)r->E * sizeof(float));
    choose(m, l, expert, all, group, 1);
    copy_ints(r->expert, expert + (size_t)first * r->K, (size_t)r->N * r->K, cudaMemcpyDeviceToDevice);
}

// What choose_by_groups() itself takes of the scratch memory.
size_t choose_bytes(const Config *c, int n) {
    return is_spread(c) ? most_tokens(c, n) * (c->experts * sizeof(float) + most_choices(c) * sizeof(int))
                        : 0;
}

// ---- weight

__global__ void weights_forward_kernel(float *weight, const float *p, const int *expert, int N, int E, int K,
                                       int gate, float scale) {
    int row = row_of_warp();
    if (row < N) {
        size_t choice = (size_t)row * K;
        weights_of_row(weight + choice, p + (size_t)row * E, expert + choice, K, gate, scale);
    }
}

void weights_forward(float *weight, const float *p, const int *expert, int N, int E, int K, int gate,
                     double scale) {
    weights_forward_kernel<<<row_blocks(N), THREADS, 0, stream>>>(weight, p, expert, N, E, K, gate,
                                                                  (float)scale);
    CHECK(cudaGetLastError());
}

__global__ void weights_backward_kernel(float *dp, const float *dweight, const float *weight, const float *p,
                                        const int *expert, int N, int E, int K, int gate, float scale) {
    int row = row_of_warp();
    if (row < N) {
        size_t at = (size_t)row * E, choice = (size_t)row * K;
        weights_back_row(dp + at, dweight + choice, weight + choice, p + at, expert + choice, K, gate, scale);
    }
}

// dp (N,E) +=
void weights_backward(float *dp, const float *dweight, const float *weight, const float *p, const int *expert,
                      int N, int E, int K, int gate, double scale) {
    weights_backward_kernel<<<row_blocks(N), THREADS, 0, stream>>>(dp, dweight, weight, p, expert, N, E, K,
                                                                   gate, (float)scale);
    CHECK(cudaGetLastError());
}

// ---- balance

// One block for each group of tokens and each of a token's R rows.
__global__ void __launch_bounds__(1024)
    count_rows_kernel(double *count, const int *expert, int R, int E, int K, int counted, int group) {
    extern __shared__ float4 dynamic[];
    int *mine = (int *)dynamic;
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        mine[e] = 0;
    }
    __syncthreads();
    size_t first = (size_t)(blockIdx.x / R) * group, size = (size_t)group * counted;
    for (size_t i = threadIdx.x; i < size; i += AHEAD * blockDim.x) {
        int e[AHEAD];
        for (int j = 0; j < AHEAD; j++) {
            size_t at = i + j * blockDim.x, row = (first + at / counted) * R + blockIdx.x % R;
            e[j] = at < size ? expert[row * K + at % counted] : -1;
        }
        for (int j = 0; j < AHEAD; j++) {
            if (e[j] >= 0) {
                atomicAdd(&mine[e[j]], 1);
            }
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        count[(size_t)blockIdx.x * E + e] = mine[e];
    }
}

// count (groups,R,E): how often each expert is among the first `counted` of a row's K choices, for each group
// of tokens and each of a token's R rows. expert (N*R,K).
void count_rows(double *count, const int *expert, int N, int R, int E, int K, int counted, int group) {
    int threads = threads_for((size_t)group * counted);
    count_rows_kernel<<<N / group * R, threads, E * sizeof(int), stream>>>(count, expert, R, E, K, counted,
                                                                           group);
    CHECK(cudaGetLastError());
}

__global__ void add_balance_kernel(double *slope, const double *count, int E,
                                   double weight) { // one block a group
    double total = 0;
    slope += (size_t)blockIdx.x * E;
    count += (size_t)blockIdx.x * E;
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        total += count[e];
    }
    total = block_sum(total);
    for (int e = threadIdx.x; e < E && total > 0; e += blockDim.x) {
        slope[e] += weight * E * count[e] / total;
    }
}

// slope (groups,E) += weight * E * f, with f = count / (sum of the group's count).
void add_balance(double *slope, const double *count, int E, double weight, int groups) {
    add_balance_kernel<<<groups, THREADS, 0, stream>>>(slope, count, E, weight);
    CHECK(cudaGetLastError());
}

__global__ void balance_backward_kernel(float *dp, Route r, int score, double scale) {
    int n = row_of_warp();
    if (n < r.N) {
        size_t at = (size_t)n * r.E;
        balance_back_row(dp + at, r.p + at, r.slope + (size_t)(n / r.group) * r.E, r.E, score, scale);
    }
}

void balance_backward(Model *m, float *dp, const Route *r) {
    int score = m->config.score;
    balance_backward_kernel<<<row_blocks(r->N), THREADS, 0, stream>>>(dp, *r, score, m->batch.scale / r->N);
    CHECK(cudaGetLastError());
}

// See cv_squared() of dev/routers/importance.h. By a whole block, which has seen all of v; slope may be v.
__device__ double cv_squared_of(const double *v, double *slope, int n, double mean, double weight) {
    double average = 0, variance = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        average += v[i] / n;
    }
    average = block_sum(average);
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        variance += (v[i] - average) * (v[i] - average) / n;
    }
    variance = block_sum(variance);
    double by = mean > 0 ? mean : fmax(average, 1e-30), moved = mean > 0 ? 0 : variance / by;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        slope[i] = weight * 2 / (n * by * by) * (v[i] - average - moved);
    }
    return 1 + variance / (by * by);
}

__global__ void cv_squared_kernel(double *loss, const double *v, double *slope, int n, double mean,
                                  double weight) {
    size_t at = (size_t)blockIdx.x * n;
    double value = cv_squared_of(v + at, slope + at, n, mean, weight);
    if (threadIdx.x == 0) {
        loss[blockIdx.x] = value;
    }
}

// loss (groups), v and slope (groups,n)
void cv_squared(double *loss, const double *v, double *slope, int n, double mean, double weight, int groups) {
    cv_squared_kernel<<<groups, THREADS, 0, stream>>>(loss, v, slope, n, mean, weight);
    CHECK(cudaGetLastError());
}

// ---- the lesson's router

void topk_allocate(Model *m, int l, int n) {
    if (!has_fused_router(m, l)) {
        part_needs(m, 0, 2 * (size_t)n * m->config.experts * sizeof(float));
    }
}

// From the logits to the scores, the choice by p + bias (NULL: by p), and the weights.
__global__ void topk_forward_kernel(Route r, const float *bias, int score, int gate, float scale) {
    int n = row_of_warp();
    if (n >= r.N) {
        return;
    }
    size_t at = (size_t)n * r.E, choice = (size_t)n * r.K;
    const float *p = r.p + at;
    scores_of_row(r.p + at, score == SOFTMAX ? r.lse + n : NULL, r.logits + at, r.E, score);
    topk_of_row(r.expert + choice, [=](int e) { return bias ? p[e] + bias[e] : p[e]; }, r.E, r.K);
    weights_of_row(r.weight + choice, p, r.expert + choice, r.K, gate, scale);
}

void topk_forward(Model *m, int l, const float *x) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    Route *r = &m->acts.layer[l].route;
    int N = r->N, E = r->E, K = r->K;
    gpu::matmul(r->logits, x, w->router, N, router_width(c), E, SET);
    topk_forward_kernel<<<row_blocks(N), THREADS, 0, stream>>>(*r, w->bias, c->score, c->gate,
                                                               (float)c->scale);
    CHECK(cudaGetLastError());
    if (decided(m, l)) {
        take_choices(m, l);
        weights_forward(r->weight, r->p, r->expert, N, E, K, c->gate, c->scale);
    }
}

// From the weights and the balance losses back to the scores, and to the logits. dp (N,E) is scratch.
__global__ void topk_backward_kernel(float *dlogits, float *dp, const float *dweight, Route r, int score,
                                     int gate, float scale, double balance, float z) {
    int n = row_of_warp();
    if (n >= r.N) {
        return;
    }
    size_t at = (size_t)n * r.E, choice = (size_t)n * r.K;
    const float *p = r.p + at;
    dp += at;
    for (int e = threadIdx.x % 32; e < r.E; e += 32) {
        dp[e] = 0;
    }
    __syncwarp();
    weights_back_row(dp, dweight + choice, r.weight + choice, p, r.expert + choice, r.K, gate, scale);
    balance_back_row(dp, p, r.slope + (size_t)(n / r.group) * r.E, r.E, score, balance);
    scores_back_row(dlogits + at, dp, p, score == SOFTMAX ? r.lse[n] : 0, r.E, score, z);
}

void topk_backward(Model *m, int l, float *dx, float *dweight, const float *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int N = r->N, E = r->E, C = router_width(c);
    double scale = m->batch.scale / N;
    float *dp = scratch(m, (size_t)N * E), *dlogits = scratch(m, (size_t)N * E);
    topk_backward_kernel<<<row_blocks(N), THREADS, 0, stream>>>(
        dlogits, dp, dweight, *r, c->score, c->gate, (float)c->scale, scale, (float)(c->z_weight * scale));
    CHECK(cudaGetLastError());
    matmul_dw(m->grads.layer[l].router, dlogits, x, N, C, E);
    gpu::matmul_dx(dx, dlogits, m->params.layer[l].router, N, C, E, ADD);
}

const Kernels topk_kernels = {&topk_router, topk_allocate, topk_forward, topk_backward, NULL};

#endif
