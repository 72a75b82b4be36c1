// Threshold on a GPU: see dev/routers/threshold.h.
// Gives: threshold_kernels, sparsity_kernels; select_above, which expert_choice.cuh uses too. Needs:
// pieces.cuh.
#ifndef CUDA_THRESHOLD_CUH
#define CUDA_THRESHOLD_CUH
#include "pieces.cuh"

__global__ void select_above_kernel(int *expert, const float *p, int N, int E, int K, const float *level,
                                    double all, int keep_best) {
    int row = row_of_warp(), lane = threadIdx.x % 32, kept = 0;
    if (row >= N) {
        return;
    }
    int *chosen = expert + (size_t)row * K;
    for (int first = 0; first < K; first += 32) {
        int k = first + lane, e = k < K ? chosen[k] : 0;
        double least = level ? (double)level[e] : all;
        int stays = k < K && ((keep_best && k == 0) || (double)p[(size_t)row * E + e] > least);
        unsigned staying = __ballot_sync(ALL_LANES, stays);
        __syncwarp(); // all lanes have read what is written now
        if (stays) {
            chosen[kept + __popc(staying & ((1u << lane) - 1))] = e;
        }
        kept += __popc(staying);
        __syncwarp();
    }
    for (int k = kept + lane; k < K; k += 32) {
        chosen[k] = -1;
    }
}

// Of each token's experts in expert (N,K), best first, those stay whose score is above the threshold: level
// (E) of the expert, or, with level NULL, `all`. The best one stays in any case if keep_best. The others
// become -1.
void select_above(int *expert, const float *p, int N, int E, int K, const float *level, double all,
                  int keep_best) {
    select_above_kernel<<<row_blocks(N), THREADS, 0, stream>>>(expert, p, N, E, K, level, all, keep_best);
    CHECK(cudaGetLastError());
}

void threshold_forward(Model *m, int l, const float *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int N = r->N, E = r->E, K = r->K;
    gpu::matmul(r->logits, x, m->params.layer[l].router, N, router_width(c), E, SET);
    scores_forward(r->p, r->lse, r->logits, N, E, c->score);
    select_topk(r->expert, r->p, N, E, K);
    select_above(r->expert, r->p, N, E, K, NULL, c->threshold > 0 ? c->threshold : 1.0 / E, 1);
    take_choices(m, l);
    weights_forward(r->weight, r->p, r->expert, N, E, K, c->gate, c->scale);
}

void sparsity_forward(Model *m, int l, const float *x) {
    (void)x;
    Route *r = &m->acts.layer[l].route;
    add_sum(layer_aux(m, l), IsChosen{r->expert}, (size_t)r->N * r->K,
            m->config.sparsity_weight / r->N / r->E);
}

const Kernels threshold_kernels = {&threshold_router, topk_allocate, threshold_forward, topk_backward, NULL};
const Kernels sparsity_kernels = {&sparsity_loss, NULL, sparsity_forward, NULL, NULL};

#endif
