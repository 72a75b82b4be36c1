// Noisy top-k and the loss of the smooth load on a GPU: see dev/routers/noisy.h.
// Gives: noisy_kernels, noisy_load_kernels; for hierarchical.cuh: first_logit, noise_forward, smooth_load,
// their ways back.
// Needs: pieces.cuh. The arrays of ::Noisy and of ::Level are the device's here.
#ifndef CUDA_NOISY_CUH
#define CUDA_NOISY_CUH
#include "pieces.cuh"

void noisy_allocate(Model *m, int l, int n) {
    const Config *c = &m->config;
    size_t size = (size_t)n * c->experts;
    Noisy *s = (Noisy *)own_host(m, 1, sizeof(Noisy));
    s->logits = own_floats(m, size);
    s->load_slope = own_by_group(m, n, c->load_weight > 0 ? c->experts : 0);
    *router_state(m, l, &noisy_router) = s;
    part_needs(m, 0, 4 * size * sizeof(float));
}

// ---- noise

// The noise of number `at` of noisy (N,W).
__device__ double noise_of(int train, uint64_t random, uint64_t first, size_t at, int W) {
    return train ? random_normal(random, first * W + at) : 0;
}

__global__ void noise_forward_kernel(float *noisy, const float *logits, int N, int W, int train,
                                     uint64_t random, uint64_t first) {
    size_t at = thread_of_grid(), i = at + at / W * W; // logits (N,2W)
    if (at < (size_t)N * W) {
        noisy[at] = logits[i] + (float)(noise_of(train, random, first, at, W) * noise_size(logits[i + W]));
    }
}

// The number of this batch's first token, or sub-token, among all of the step.
uint64_t first_of_batch(const Model *m) {
    return (uint64_t)m->batch.first_token * (uint64_t)m->config.subtokens;
}

// noisy (N,W) = logits + noise * size. logits (N,2W)
void noise_forward(const Model *m, int l, float *noisy, const float *logits, int N, int W) {
    int train = m->batch.mode == TRAIN_MODE;
    noise_forward_kernel<<<blocks((size_t)N * W), THREADS, 0, stream>>>(
        noisy, logits, N, W, train, noise_stream(m, l), first_of_batch(m));
    CHECK(cudaGetLastError());
}

__global__ void noise_backward_kernel(float *dlogits, const float *dnoisy, const float *logits, int N, int W,
                                      int train, uint64_t random, uint64_t first) {
    size_t at = thread_of_grid(), i = at + at / W * W;
    if (at < (size_t)N * W) {
        double d = (double)dnoisy[at], noise = noise_of(train, random, first, at, W);
        dlogits[i] += (float)d;
        dlogits[i + W] += (float)(d * noise * noise_slope(logits[i + W]));
    }
}

// dlogits (N,2W) +=
void noise_backward(const Model *m, int l, float *dlogits, const float *dnoisy, const float *logits, int N,
                    int W) {
    int train = m->batch.mode == TRAIN_MODE;
    noise_backward_kernel<<<blocks((size_t)N * W), THREADS, 0, stream>>>(
        dlogits, dnoisy, logits, N, W, train, noise_stream(m, l), first_of_batch(m));
    CHECK(cudaGetLastError());
}

// ---- the smooth load

// What it is made of: the rows of a level. Here it is the only level, with one row a token.
struct LoadRows {
    Level v;
    int W;                       // of a token's logits without those of the noise
    const float *noisy, *logits; // (N,W), (N,2W)
    const unsigned char *live;   // (N*rows) 1: the row counts; NULL: each does
};

// Where a row's logits begin, of (N,W).
__device__ size_t first_logit(const Level &v, int row, int W) {
    return (size_t)(row / v.rows) * W + v.column + row % v.rows * v.count;
}

__device__ int is_among(const int *list, int count, int value) {
    int found = 0;
    for (int i = 0; i < count; i++) {
        found |= list[i] == value;
    }
    return found;
}

// The best of a row that is not chosen, by a warp.
__device__ int best_unchosen(const LoadRows &s, int row) {
    const float *noisy = s.noisy + first_logit(s.v, row, s.W);
    const int *chosen = s.v.chosen + (size_t)row * s.v.take;
    Rank best = 0;
    for (int e = threadIdx.x % 32; e < s.v.count; e += 32) {
        Rank rank = is_among(chosen, s.v.take, e) ? 0 : rank_of(order_of(noisy[e]), e);
        best = rank > best ? rank : best;
    }
    return index_of(warp_best(best));
}

__global__ void best_unchosen_kernel(int *next, LoadRows s, int rows) {
    int row = row_of_warp();
    if (row >= rows) {
        return;
    }
    int best = best_unchosen(s, row);
    if (threadIdx.x % 32 == 0) {
        next[row] = best;
    }
}

// (logit - t) / size of an expert, with t the noisy logit that it has to beat. logit[W]: what its size is
// made of.
__device__ double certainty(const float *logit, float t, int W, double *size) {
    *size = noise_size(logit[W]);
    return ((double)logit[0] - (double)t) / *size;
}

struct SmoothLoad { // by token and (row of the token, expert)
    LoadRows s;
    const int *next; // (N*rows) best_unchosen()
    __device__ double operator()(size_t n, int j) const {
        int row = (int)n * s.v.rows + j / s.v.count, e = j % s.v.count;
        const int *chosen = s.v.chosen + (size_t)row * s.v.take;
        if (s.live && !s.live[row]) {
            return 0;
        }
        int t = is_among(chosen, s.v.take, e) ? next[row] : chosen[s.v.take - 1];
        size_t at = first_logit(s.v, row, s.W);
        double size, v = certainty(s.logits + at + n * s.W + e, s.noisy[at + t], s.W, &size);
        return 0.5 * (1 + erf(v * 0.7071067811865476));
    }
};

// load (groups, rows*count) = the sums over the tokens of each group. Scratch: next (N*rows); part: see
// column_sums().
void smooth_load(double *load, const LoadRows &s, int N, int group, int *next, double *part) {
    int rows = N * s.v.rows;
    best_unchosen_kernel<<<row_blocks(rows), THREADS, 0, stream>>>(next, s, rows);
    CHECK(cudaGetLastError());
    column_sums(load, SmoothLoad{s, next}, N / group, group, s.v.rows * s.v.count, 0, part);
}

__global__ void smooth_load_backward_kernel(float *dlogits, float *dnoisy, const double *dload, int stride,
                                            double scale, LoadRows s, int rows, int group) {
    int row = row_of_warp(), lane = threadIdx.x % 32, n = row / s.v.rows;
    if (row >= rows || (s.live && !s.live[row])) {
        return;
    }
    size_t at = first_logit(s.v, row, s.W), wide = at + (size_t)n * s.W;
    const int *chosen = s.v.chosen + (size_t)row * s.v.take;
    const double *d = dload + (size_t)(n / group) * stride + row % s.v.rows * s.v.count;
    int next = best_unchosen(s, row), last = chosen[s.v.take - 1];
    double of_next = 0, of_last = 0;
    for (int e = lane; e < s.v.count; e += 32) {
        int is_chosen = is_among(chosen, s.v.take, e);
        double size, v = certainty(s.logits + wide + e, s.noisy[at + (is_chosen ? next : last)], s.W, &size);
        double slope = scale * d[e] * exp(-0.5 * v * v) * 0.3989422804014327 / size;
        dlogits[wide + e] += (float)slope;
        dlogits[wide + s.W + e] -= (float)(slope * v * noise_slope(s.logits[wide + s.W + e]));
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

// Given dload, (rows*count) numbers for each group of tokens, every `stride` numbers, times scale: dlogits
// (N,2W) += by logit and size, dnoisy (N,W) += by t.
void smooth_load_backward(float *dlogits, float *dnoisy, const double *dload, int stride, double scale,
                          const LoadRows &s, int N, int group) {
    int rows = N * s.v.rows;
    smooth_load_backward_kernel<<<row_blocks(rows), THREADS, 0, stream>>>(dlogits, dnoisy, dload, stride,
                                                                          scale, s, rows, group);
    CHECK(cudaGetLastError());
}

LoadRows load_rows(const Route *r, const Noisy *s) {
    Level v = {1, r->E, r->K, 0, r->p, r->expert, r->weight};
    LoadRows rows = {v, r->E, s->logits, r->logits, NULL};
    return rows;
}

void noisy_load_allocate(Model *m, int l, int n) {
    (void)l;
    part_needs(m, n * sizeof(int) + (most_chunks(m, n) * m->config.experts + most_groups(m)) * sizeof(double),
               0);
}

// 1 + CV^2 of the loads, for each group of tokens.
void noisy_load_forward(Model *m, int l, const float *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    const Noisy *s = (const Noisy *)*router_state(m, l, &noisy_router);
    int N = r->N, E = r->E, groups = N / r->group;
    double weight = c->load_weight / groups;
    double *part = scratch_doubles(m, (size_t)groups * div_up(r->group, CHUNK) * E),
           *loss = scratch_doubles(m, groups);
    smooth_load(s->load_slope, load_rows(r, s), N, r->group, scratch_ints(m, N), part);
    if (is_spread(c)) {
        sum_over_ranks(s->load_slope, E);
    }
    cv_squared(loss, s->load_slope, s->load_slope, E, 0, weight * slope_factor(c),
               groups); // the load becomes its slope
    add_sum(layer_aux(m, l), Doubles{loss}, groups, weight);
}

// ---- the router

void noisy_forward(Model *m, int l, const float *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    const Noisy *s = (const Noisy *)*router_state(m, l, &noisy_router);
    int N = r->N, E = r->E, K = r->K;
    gpu::matmul(r->logits, x, m->params.layer[l].router, N, router_width(c), 2 * E, SET);
    noise_forward(m, l, s->logits, r->logits, N, E);
    gpu::scores_forward(r->p, r->lse, s->logits, N, E, SOFTMAX);
    select_topk(r->expert, r->p, N, E, K);
    take_choices(m, l);
    weights_forward(r->weight, r->p, r->expert, N, E, K, c->gate, c->scale);
}

void noisy_backward(Model *m, int l, float *dx, float *dweight, const float *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    const Noisy *s = (const Noisy *)*router_state(m, l, &noisy_router);
    int N = r->N, E = r->E, K = r->K, C = router_width(c);
    float *dp = scratch_zeros(m, (size_t)N * E), *dnoisy = scratch(m, (size_t)N * E);
    float *dlogits = scratch_zeros(m, (size_t)N * 2 * E);

    // From the weights and the losses of p to the noisy logits.
    weights_backward(dp, dweight, r->weight, r->p, r->expert, N, E, K, c->gate, c->scale);
    balance_backward(m, dp, r);
    gpu::scores_backward(dnoisy, dp, r->p, r->lse, N, E, SOFTMAX, c->z_weight * m->batch.scale / N);

    // From the smooth load to the noisy logits, and to those without noise.
    if (c->load_weight > 0) {
        smooth_load_backward(dlogits, dnoisy, s->load_slope, E, m->batch.scale, load_rows(r, s), N, r->group);
    }

    noise_backward(m, l, dlogits, dnoisy, r->logits, N, E);
    matmul_dw(m->grads.layer[l].router, dlogits, x, N, C, 2 * E);
    gpu::matmul_dx(dx, dlogits, m->params.layer[l].router, N, C, 2 * E, ADD);
}

const Kernels noisy_kernels = {&noisy_router, noisy_allocate, noisy_forward, noisy_backward, NULL};
const Kernels noisy_load_kernels = {&noisy_load, noisy_load_allocate, noisy_load_forward, NULL, NULL};

#endif
