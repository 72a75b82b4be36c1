// Jitter on a GPU: see dev/routers/jitter.h.
// Gives: jitter_kernels. Needs: pieces.cuh.
#ifndef CUDA_JITTER_CUH
#define CUDA_JITTER_CUH
#include "pieces.cuh"

void jitter_allocate(Model *m, int l, int n) {
    size_t size = (size_t)n * m->experts.C;
    *router_state(m, l, &jitter_router) = own_floats(m, size);
    part_needs(m, 0, size * sizeof(float));
}

__global__ void apply_jitter_kernel(float *to, const float *from, size_t size, double jitter, uint64_t random,
                                    uint64_t first, int add) {
    size_t i = thread_of_grid();
    if (i < size) {
        float moved = from[i] * (float)(1 + jitter * (2 * random_uniform(random, first + i) - 1));
        to[i] = add == ADD ? to[i] + moved : moved;
    }
}

// to (n,C) = or += from times the factors of this step, this layer, and these tokens' places in the step's
// whole batch.
void apply_jitter(const Model *m, int l, float *to, const float *from, int add) {
    const Config *c = &m->config;
    size_t size = (size_t)m->acts.layer[l].route.N * m->experts.C;
    uint64_t random = random_stream((uint64_t)c->seed, RANDOM_JITTER, (uint64_t)m->batch.step, (uint64_t)l);
    uint64_t first = (uint64_t)m->batch.first_token * (uint64_t)c->dim;
    apply_jitter_kernel<<<blocks(size), THREADS, 0, stream>>>(to, from, size, c->jitter, random, first, add);
    CHECK(cudaGetLastError());
}

void jitter_forward(Model *m, int l, const float *x) {
    const Kernels *next = kernels_of(next_router(m, &jitter_router));
    if (m->batch.mode != TRAIN_MODE) {
        next->forward(m, l, x);
        return;
    }
    float *jittered = (float *)*router_state(m, l, &jitter_router);
    apply_jitter(m, l, jittered, x, SET);
    next->forward(m, l, jittered);
}

void jitter_backward(Model *m, int l, float *dx, float *dweight, const float *x) {
    const Kernels *next = kernels_of(next_router(m, &jitter_router));
    if (m->batch.mode != TRAIN_MODE) {
        next->backward(m, l, dx, dweight, x);
        return;
    }
    const float *jittered = (const float *)*router_state(m, l, &jitter_router);
    float *djittered = scratch_zeros(m, (size_t)m->acts.layer[l].route.N * m->experts.C);
    next->backward(m, l, djittered, dweight, jittered);

    // The derivative of x * factor by x is the factor.
    apply_jitter(m, l, dx, djittered, ADD);
}

const Kernels jitter_kernels = {&jitter_router, jitter_allocate, jitter_forward, jitter_backward, NULL};

#endif
