// GShard's second choice and its balance loss on a GPU: see dev/routers/gshard.h.
// Gives: gshard_kernels, gshard_loss_kernels. Needs: pieces.cuh.
#ifndef CUDA_GSHARD_CUH
#define CUDA_GSHARD_CUH
#include "pieces.cuh"

// threshold: the weight from which on a second choice is always kept
__global__ void decline_second_kernel(int *served, const float *weight, int N, double threshold,
                                      uint64_t random, uint64_t first) {
    size_t n = thread_of_grid();
    if (n < (size_t)N && random_uniform(random, first + n) * threshold >= (double)weight[2 * n + 1]) {
        served[2 * n + 1] = -1;
    }
}

// In training a second choice is kept with probability weight / threshold. The weights of a token's two
// experts sum to --scale.
void gshard_forward(Model *m, int l, const float *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    if (m->batch.mode != TRAIN_MODE) {
        return;
    }
    uint64_t random = random_stream((uint64_t)c->seed, RANDOM_SECOND, (uint64_t)m->batch.step, (uint64_t)l);
    uint64_t first = (uint64_t)m->batch.first_token * (uint64_t)c->subtokens;
    double threshold = c->second_threshold * c->scale;
    decline_second_kernel<<<blocks(r->N), THREADS, 0, stream>>>(r->served, r->weight, r->N, threshold, random,
                                                                first);
    CHECK(cudaGetLastError());
}

// The form of Switch Transformers (see add_balance), with f of the first choices only. The counts stay in
// r->count.
void gshard_loss_forward(Model *m, int l, const float *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    if (!r->slope) {
        return;
    }
    count_rows(r->count, r->served, r->N, 1, r->E, r->K, 1, r->group);
    if (is_spread(c)) {
        sum_over_ranks(r->count, r->E);
    }
    add_balance(r->slope, r->count, r->E, c->aux_weight, r->N / r->group);
}

const Kernels gshard_kernels = {&gshard_router, NULL, gshard_forward, NULL, NULL};
const Kernels gshard_loss_kernels = {&gshard_loss, NULL, gshard_loss_forward, NULL, NULL};

#endif
