// Several routers on a GPU: see dev/routers/multirouter.h.
// Gives: multirouter_kernels, multirouter_loss_kernels. Needs: slow_logits of history.cuh.
#ifndef CUDA_MULTIROUTER_CUH
#define CUDA_MULTIROUTER_CUH
#include "history.cuh"

// A token has R rows of scores, one for each router, instead of one; and slopes (groups of tokens, R,E).
void multirouter_allocate(Model *m, int l, int n) {
    int R = m->config.routers, E = m->config.experts;
    size_t size = (size_t)n * R * E;
    Route *r = &m->acts.layer[l].route;
    r->p = own_floats(m, size);
    r->lse = own_floats(m, (size_t)n * R);
    r->slope = NULL; // the lesson's are for one router
    *router_state(m, l, &multirouter_router) = own_by_group(m, n, R * E);
    part_needs(m, 0, 2 * size * sizeof(float));
}

void multirouter_forward(Model *m, int l, const float *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int N = r->N, E = r->E, R = c->routers, C = router_width(c), each = r->K / R;
    r->rows = N * R;
    gpu::matmul(r->logits, x, m->params.layer[l].router, N, C, R * E, SET);
    gpu::scores_forward(r->p, r->lse, r->logits, r->rows, E, SOFTMAX);

    select_topk(r->expert, c->history_decay > 0 ? slow_logits(m, l, x) : r->p, r->rows, E, each);
    take_choices(m, l);
    weights_forward(r->weight, r->p, r->expert, r->rows, E, each, c->gate, c->scale / R);
}

// The slopes (E) of a row: those of its group of tokens and of its router. slope (groups of tokens, R,E)
__device__ const double *slopes_of_row(const double *slope, int row, const Route &r, int R) {
    return slope + ((size_t)(row / R / r.group) * R + row % R) * r.E;
}

__global__ void multirouter_loss_kernel(double *loss, const double *slope, Route r,
                                        int R) { // loss (rows) = slope . p
    int row = row_of_warp();
    if (row >= r.rows) {
        return;
    }
    const double *weights = slopes_of_row(slope, row, r, R);
    double dot = 0;
    for (int e = threadIdx.x % 32; e < r.E; e += 32) {
        dot += weights[e] * (double)r.p[(size_t)row * r.E + e];
    }
    dot = warp_sum(dot);
    if (threadIdx.x % 32 == 0) {
        loss[row] = dot;
    }
}

void multirouter_loss_allocate(Model *m, int l, int n) {
    (void)l;
    int R = m->config.routers, E = m->config.experts;
    part_needs(m, ((size_t)most_groups(m) * R * E + (size_t)n * R) * sizeof(double), 0);
}

// The balance loss, in the forms of Switch Transformers and of GShard: for each group of tokens and each
// router on its own, and then the mean over the routers.
void multirouter_loss_forward(Model *m, int l, const float *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int E = r->E, R = c->routers, each = r->K / R, tables = r->N / r->group * R;
    double *slope = (double *)*router_state(m, l, &multirouter_router);
    double *count = scratch_doubles(m, (size_t)tables * E), *loss = scratch_doubles(m, r->rows);
    count_rows(count, r->served, r->N, R, E, each, c->balance == GSHARD ? 1 : each, r->group);
    if (is_spread(c)) {
        sum_over_ranks(count, R * E);
    }
    zero(slope, (size_t)tables * E * sizeof(double));
    add_balance(slope, count, E, c->aux_weight, tables);
    multirouter_loss_kernel<<<row_blocks(r->rows), THREADS, 0, stream>>>(loss, slope, *r, R);
    CHECK(cudaGetLastError());
    add_sum(layer_aux(m, l), Doubles{loss}, r->rows, 1.0 / r->rows);
}

__global__ void multirouter_balance_kernel(float *dp, const double *slope, Route r, int R, double scale) {
    int row = row_of_warp();
    if (row < r.rows) {
        size_t at = (size_t)row * r.E;
        balance_back_row(dp + at, r.p + at, slopes_of_row(slope, row, r, R), r.E, SOFTMAX, scale);
    }
}

void multirouter_backward(Model *m, int l, float *dx, float *dweight, const float *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int N = r->N, E = r->E, R = c->routers, C = router_width(c), each = r->K / R, rows = r->rows;
    double scale = m->batch.scale / rows;
    float *dp = scratch_zeros(m, (size_t)rows * E), *dlogits = scratch(m, (size_t)rows * E);
    weights_backward(dp, dweight, r->weight, r->p, r->expert, rows, E, each, c->gate, c->scale / R);

    // The balance loss is the mean over all rows of slope . p.
    if (multirouter_loss_wanted(c)) {
        const double *slope = (const double *)*router_state(m, l, &multirouter_router);
        multirouter_balance_kernel<<<row_blocks(rows), THREADS, 0, stream>>>(dp, slope, *r, R, scale);
        CHECK(cudaGetLastError());
    }
    gpu::scores_backward(dlogits, dp, r->p, r->lse, rows, E, SOFTMAX, c->z_weight * scale);
    matmul_dw(m->grads.layer[l].router, dlogits, x, N, C, R * E);
    gpu::matmul_dx(dx, dlogits, m->params.layer[l].router, N, C, R * E, ADD);
}

const Kernels multirouter_kernels = {&multirouter_router, multirouter_allocate, multirouter_forward,
                                     multirouter_backward, NULL};
const Kernels multirouter_loss_kernels = {&multirouter_loss, multirouter_loss_allocate,
                                          multirouter_loss_forward, NULL, NULL};

#endif
