// Groups of experts on a GPU: see dev/routers/groups.h.
// Gives: groups_kernels, group_loss_kernels, communication_kernels; for other routers first_of_group and
// mask_groups.
// Needs: pieces.cuh.
#ifndef CUDA_GROUPS_CUH
#define CUDA_GROUPS_CUH
#include "pieces.cuh"

const int MOST_GROUPS = 1024; // as --groups of dev/routers/groups.h allows

__device__ int first_of_group(int g, int E, int G) { // the first expert with group_of(expert, E, G) == g
    return div_up(g * E, G);
}

// ---- the choice within the best groups

// value (G): what each group counts as, by the scores of a row (E); by a warp
__device__ void values_of_groups(float *value, const float *row, int E, int G, int by) {
    for (int g = threadIdx.x % 32; g < G; g += 32) {
        float best = -INFINITY, second = -INFINITY;
        for (int e = first_of_group(g, E, G); e < first_of_group(g + 1, E, G); e++) {
            float score = row[e];
            if (order_of(score) > order_of(best)) {
                second = best;
                best = score;
            } else if (order_of(score) > order_of(second)) {
                second = score;
            }
        }
        int has_two = order_of(second) > order_of(-INFINITY);
        value[g] = by == BEST_TWO && has_two ? best + second : best;
    }
    __syncwarp();
}

__global__ void mask_groups_kernel(float *score, int N, int E, int G, int M, int by) {
    __shared__ float values[THREADS / 32][MOST_GROUPS];
    int n = row_of_warp(), lane = threadIdx.x % 32;
    float *value = values[threadIdx.x / 32], *row = score + (size_t)n * E;
    if (n >= N) {
        return;
    }
    values_of_groups(value, row, E, G, by);
    Rank last = ~(Rank)0;
    for (int k = 0; k < M; k++) { // in the end, the M-th best
        Rank best = 0;
        for (int g = lane; g < G; g += 32) {
            Rank rank = rank_of(order_of(value[g]), g);
            best = rank < last && rank > best ? rank : best;
        }
        last = warp_best(best);
    }
    for (int e = lane; e < E; e += 32) {
        int g = group_of(e, E, G);
        if (rank_of(order_of(value[g]), g) < last) {
            row[e] = -INFINITY;
        }
    }
}

// Experts outside of a token's M best groups get a score of -infinity. score (N,E)
void mask_groups(float *score, int N, int E, int G, int M, int by) {
    mask_groups_kernel<<<row_blocks(N), THREADS, 0, stream>>>(score, N, E, G, M, by);
    CHECK(cudaGetLastError());
}

// bias (E); NULL: there is none
__global__ void add_bias_kernel(float *decides, const float *p, const float *bias, int E, size_t size) {
    size_t i = thread_of_grid();
    if (i < size) {
        decides[i] = p[i] + (bias ? bias[i % E] : 0);
    }
}

void groups_forward(Model *m, int l, const float *x) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    Route *r = &m->acts.layer[l].route;
    int N = r->N, E = r->E, K = r->K;
    size_t size = (size_t)N * E;
    gpu::matmul(r->logits, x, w->router, N, router_width(c), E, SET);
    scores_forward(r->p, r->lse, r->logits, N, E, c->score);

    // As in the lesson's router, p + bias decides, where there is a bias.
    float *decides = scratch(m, size);
    add_bias_kernel<<<blocks(size), THREADS, 0, stream>>>(decides, r->p, w->bias, E, size);
    CHECK(cudaGetLastError());
    mask_groups(decides, N, E, c->groups, c->group_topk, c->group_score);
    select_topk(r->expert, decides, N, E, K);
    take_choices(m, l);
    weights_forward(r->weight, r->p, r->expert, N, E, K, c->gate, c->scale);
}

// ---- losses

__global__ void group_loss_kernel(double *slope, const double *count, int E, int G,
                                  double weight) { // one block a group of tokens
    double total = 0;
    slope += (size_t)blockIdx.x * E;
    count += (size_t)blockIdx.x * E;
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        total += count[e];
    }
    total = block_sum(total);
    for (int e = threadIdx.x; e < E && total > 0; e += blockDim.x) {
        int g = group_of(e, E, G), first = first_of_group(g, E, G), end = first_of_group(g + 1, E, G);
        double sum = 0;
        for (int i = first; i < end; i++) {
            sum += count[i];
        }
        slope[e] += weight * E * sum / total / (end - first);
    }
}

// The device-level loss of DeepSeekMoE.
void group_loss_forward(Model *m, int l, const float *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    if (c->device_weight > 0) {
        group_loss_kernel<<<r->N / r->group, THREADS, 0, stream>>>(r->slope, r->count, r->E, c->groups,
                                                                   c->device_weight);
        CHECK(cudaGetLastError());
    }
}

// sent (groups of tokens, G): tokens that are sent to each group of experts. expert (groups*n, K); one block
// a group of tokens
__global__ void __launch_bounds__(1024)
    count_sent_kernel(double *to, const int *expert, int n, int E, int K, int G) {
    __shared__ int sent[MOST_GROUPS];
    expert += (size_t)blockIdx.x * n * K;
    for (int g = threadIdx.x; g < G; g += blockDim.x) {
        sent[g] = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n * K; i += blockDim.x) {
        int seen = expert[i] < 0;
        for (int j = i / K * K; j < i && !seen; j++) { // a token is sent to a group once
            seen = expert[j] >= 0 && group_of(expert[j], E, G) == group_of(expert[i], E, G);
        }
        if (!seen) {
            atomicAdd(&sent[group_of(expert[i], E, G)], 1);
        }
    }
    __syncthreads();
    for (int g = threadIdx.x; g < G; g += blockDim.x) {
        to[(size_t)blockIdx.x * G + g] = sent[g];
    }
}

__global__ void communication_kernel(double *slope, const double *sent, int E, int G, double weight) {
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        slope[(size_t)blockIdx.x * E + e] += weight * sent[(size_t)blockIdx.x * G + group_of(e, E, G)];
    }
}

void communication_allocate(Model *m, int l, int n) {
    (void)l, (void)n;
    part_needs(m, (size_t)most_groups(m) * m->config.groups * sizeof(double), 0);
}

// The communication loss of DeepSeek-V2.
void communication_forward(Model *m, int l, const float *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int E = r->E, K = r->K, G = c->groups, groups = r->N / r->group,
        threads = threads_for((size_t)r->group * K);
    double *sent = scratch_doubles(m, (size_t)groups * G);
    count_sent_kernel<<<groups, threads, 0, stream>>>(sent, r->served, r->group, E, K, G);
    CHECK(cudaGetLastError());
    if (is_spread(c)) {
        sum_over_ranks(sent, G);
    }
    double weight = c->comm_weight * G / ((double)c->group_topk * ranks_group_size(m, r));
    communication_kernel<<<groups, THREADS, 0, stream>>>(r->slope, sent, E, G, weight);
    CHECK(cudaGetLastError());
}

const Kernels groups_kernels = {&groups_router, topk_allocate, groups_forward, topk_backward, NULL};
const Kernels group_loss_kernels = {&group_loss, NULL, group_loss_forward, NULL, NULL};
const Kernels communication_kernels = {&communication_loss, communication_allocate, communication_forward,
                                       NULL, NULL};

#endif
