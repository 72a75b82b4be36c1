// Hash on a GPU: see dev/routers/hash.h.
// Gives: hash_kernels. Needs: pieces.cuh; m->tokens (N), the batch's tokens on the device.
#ifndef CUDA_HASH_CUH
#define CUDA_HASH_CUH
#include "pieces.cuh"

// Without scores there is no entropy to show and no loss to take.
void hash_allocate(Model *m, int l, int n) {
    (void)n;
    m->acts.layer[l].route.p = NULL;
    m->acts.layer[l].route.slope = NULL;
}

__global__ void look_up_kernel(int *expert, float *weight, const float *table, const int *tokens, int N,
                               float scale) {
    int n = (int)thread_of_grid();
    if (n < N) {
        expert[n] = (int)table[tokens[n]];
        weight[n] = scale;
    }
}

void hash_forward(Model *m, int l, const float *x) {
    (void)x;
    Route *r = &m->acts.layer[l].route;
    const float *table = layer_tensor(m, l, "table", WEIGHTS);
    look_up_kernel<<<blocks(r->N), THREADS, 0, stream>>>(r->expert, r->weight, table, m->tokens, r->N,
                                                         (float)m->config.scale);
    CHECK(cudaGetLastError());
}

void hash_backward(Model *m, int l, float *dx, float *dweight, const float *x) {
    (void)m, (void)l, (void)dx, (void)dweight, (void)x;
}

const Kernels hash_kernels = {&hash_router, hash_allocate, hash_forward, hash_backward, NULL};

#endif
