// History on a GPU: see dev/routers/history.h.
// Gives: history_kernels, history_matrix_kernels; slow_logits, by which several routers can choose, too
// (multirouter.cuh).
// Needs: mask_groups of groups.cuh.
#ifndef CUDA_HISTORY_CUH
#define CUDA_HISTORY_CUH
#include "groups.cuh"

void history_matrix_allocate(Model *m, int l, int n) {
    (void)l;
    part_needs(m, (size_t)n * router_outputs(&m->config) * sizeof(float), 0);
}

// (N,W): the slow router's logits, which decide.
float *slow_logits(Model *m, int l, const float *x) {
    int N = m->acts.layer[l].route.N, W = router_outputs(&m->config);
    float *slow = scratch(m, (size_t)N * W);
    gpu::matmul(slow, x, layer_tensor(m, l, "slow", WEIGHTS), N, router_width(&m->config), W, SET);
    return slow;
}

void history_forward(Model *m, int l, const float *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int N = r->N, E = r->E, K = r->K;
    gpu::matmul(r->logits, x, m->params.layer[l].router, N, router_width(c), E, SET);
    scores_forward(r->p, r->lse, r->logits, N, E, c->score);
    float *slow = slow_logits(m, l, x);
    if (c->group_topk) {
        mask_groups(slow, N, E, c->groups, c->group_topk, c->group_score);
    }
    select_topk(r->expert, slow, N, E, K);
    take_choices(m, l);
    weights_forward(r->weight, r->p, r->expert, N, E, K, c->gate, c->scale);
}

__global__ void follow_kernel(const double *norm, float *slow, const float *router, size_t size,
                              float fresh) {
    size_t i = thread_of_grid();
    if (i < size && isfinite(*norm)) {
        slow[i] += fresh * (router[i] - slow[i]);
    }
}

void history_update(Model *m, int l) {
    float *slow = layer_tensor(m, l, "slow", WEIGHTS), fresh = (float)(1 - m->config.history_decay);
    const float *router = m->params.layer[l].router;
    size_t size = (size_t)router_outputs(&m->config) * router_width(&m->config);
    follow_kernel<<<blocks(size), THREADS, 0, stream>>>(m->report + GRADIENT_NORM, slow, router, size, fresh);
    CHECK(cudaGetLastError());
}

const Kernels history_matrix_kernels = {&history_matrix, history_matrix_allocate, NULL, NULL, history_update};
const Kernels history_kernels = {&history_router, topk_allocate, history_forward, topk_backward, NULL};

#endif
