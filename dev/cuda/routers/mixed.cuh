// The balance loss of experts that differ, on a GPU: see dev/routers/mixed.h.
// Gives: mixed_kernels. Needs: pieces.cuh; m->experts.width (E), on the device.
#ifndef CUDA_MIXED_CUH
#define CUDA_MIXED_CUH
#include "pieces.cuh"

void mixed_allocate(Model *m, int l, int n) {
    (void)l, (void)n;
    part_needs(m, (size_t)most_groups(m) * m->config.experts * sizeof(double), 0);
}

__global__ void widen_kernel(double *wide, const double *count, const int *width, int E, size_t size) {
    size_t i = thread_of_grid();
    if (i < size) {
        wide[i] = count[i] * width[i % E];
    }
}

// The form of Switch Transformers (see add_balance), with counts times widths.
void mixed_forward(Model *m, int l, const float *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int E = r->E, groups = r->N / r->group;
    size_t size = (size_t)groups * E;
    if (c->balance != WIDTH || !r->slope) {
        return;
    }
    double *wide = scratch_doubles(m, size);
    widen_kernel<<<blocks(size), THREADS, 0, stream>>>(wide, r->count, m->experts.width, E, size);
    CHECK(cudaGetLastError());
    add_balance(r->slope, wide, E, c->aux_weight, groups);
}

const Kernels mixed_kernels = {&mixed_loss, mixed_allocate, mixed_forward, NULL, NULL};

#endif
