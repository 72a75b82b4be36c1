// Expert choice on a GPU: see dev/routers/expert_choice.h.
// Gives: expert_choice_kernels. Needs: take_best.cuh; select_above of threshold.cuh; the report of
// train_moe.cu, which has, of the step so far, each expert's sum of lowest scores (E numbers behind the
// counts) and how many groups are in it (PASSES).
#ifndef CUDA_EXPERT_CHOICE_CUH
#define CUDA_EXPERT_CHOICE_CUH
#include "take_best.cuh"
#include "threshold.cuh"

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

// Of each token's experts, best first, those that took it; then -1.
__global__ void taken_experts_kernel(int *expert, const float *p, const unsigned char *taken, int N, int E) {
    int row = row_of_warp(), lane = threadIdx.x % 32, k = 0;
    if (row >= N) {
        return;
    }
    for (Rank last = ~(Rank)0; last > 0; k++) {
        Rank best = 0;
        for (int e = lane; e < E; e += 32) {
            size_t i = (size_t)row * E + e;
            Rank rank = taken[i] ? rank_of(order_of(p[i]), e) : 0;
            best = rank < last && rank > best ? rank : best;
        }
        last = warp_best(best);
        if (lane == 0 && last > 0) {
            expert[(size_t)row * E + k] = index_of(last);
        }
    }
    for (k = k - 1 + lane; k < E; k += 32) {
        expert[(size_t)row * E + k] = -1;
    }
}

__global__ void add_lowest_kernel(double *sum, const float *lowest, int E, int groups) {
    int e = (int)thread_of_grid();
    for (int group = 0; e < E && group < groups; group++) {
        sum[e] += (double)lowest[(size_t)group * E + e];
    }
}

// expert (groups*n,E): the experts that took a token, best first, then -1. sum (E) += the lowest score that
// each expert took of each group. Scratch: taken (groups*n, E), lowest (groups, E).
void select_by_experts(int *expert, double *sum, const float *p, int n, int E, int take, int groups,
                       unsigned char *taken, float *lowest) {
    int N = groups * n;
    take_best(ExpertsChoice{taken, lowest, p, n, E}, groups, E, take);
    taken_experts_kernel<<<row_blocks(N), THREADS, 0, stream>>>(expert, p, taken, N, E);
    CHECK(cudaGetLastError());
    add_lowest_kernel<<<blocks(E), THREADS, 0, stream>>>(sum, lowest, E, groups);
    CHECK(cudaGetLastError());
}

__global__ void add_passes_kernel(double *passes, int groups) {
    *passes += groups;
}

void expert_choice_allocate(Model *m, int l, int n) {
    const Config *c = &m->config;
    size_t E = c->experts,
           forward = choose_bytes(c, n) + most_tokens(c, n) * E + most_groups(m) * E * sizeof(float);
    (void)l;
    part_needs(m, forward, 2 * n * E * sizeof(float));
}

void choose_tokens(Model *m, int l, int *expert, const float *p, int group, int groups) {
    double *stats = layer_stats(m, l);
    int E = m->config.experts, take = max_int(1, (int)((double)group * m->config.topk / E));
    unsigned char *taken = (unsigned char *)scratch_bytes(m, (size_t)groups * group * E);
    float *lowest = scratch(m, (size_t)groups * E);
    select_by_experts(expert, stats + E, p, group, E, take, groups, taken, lowest);
    add_passes_kernel<<<1, 1, 0, stream>>>(stats + 4 * E + PASSES, groups);
    CHECK(cudaGetLastError());
}

void expert_choice_forward(Model *m, int l, const float *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int N = r->N, E = r->E;
    gpu::matmul(r->logits, x, m->params.layer[l].router, N, router_width(c), E, SET);
    scores_forward(r->p, r->lse, r->logits, N, E, c->score);
    if (m->batch.mode == TRAIN_MODE) {
        choose_by_groups(m, l, r->p, choose_tokens);
    } else {
        select_topk(r->expert, r->p, N, E, E);
        select_above(r->expert, r->p, N, E, E, layer_tensor(m, l, "level", WEIGHTS), 0, 0);
    }
    take_choices(m, l);
    weights_forward(r->weight, r->p, r->expert, N, E, E, c->gate, c->scale);
}

__global__ void move_level_kernel(const double *norm, float *level, const double *sum, const double *passes,
                                  int E) {
    int e = (int)thread_of_grid();
    if (e < E && isfinite(*norm) && *passes > 0) {
        level[e] += (float)(0.1 * (sum[e] / *passes - (double)level[e]));
    }
}

// The level is a moving average over steps.
void expert_choice_update(Model *m, int l) {
    int E = m->config.experts;
    const double *stats = layer_stats(m, l);
    float *level = layer_tensor(m, l, "level", WEIGHTS);
    move_level_kernel<<<blocks(E), THREADS, 0, stream>>>(m->report + GRADIENT_NORM, level, stats + E,
                                                         stats + 4 * E + PASSES, E);
    CHECK(cudaGetLastError());
}

const Kernels expert_choice_kernels = {&expert_choice_router, expert_choice_allocate, expert_choice_forward,
                                       topk_backward, expert_choice_update};

#endif
