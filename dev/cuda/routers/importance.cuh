// Losses on the weights that each expert is given, on a GPU: see dev/routers/importance.h.
// Gives: importance_kernels. Needs: cv_squared of pieces.cuh.
#ifndef CUDA_IMPORTANCE_CUH
#define CUDA_IMPORTANCE_CUH
#include "pieces.cuh"

// slope (groups,E) of the losses by each weight that is given to the expert.
void importance_allocate(Model *m, int l, int n) {
    int E = m->config.experts;
    *router_state(m, l, &importance_loss) = own_by_group(m, n, E);
    part_needs(m, (most_chunks(m, n) * E + most_groups(m)) * sizeof(double), 0);
}

void importance_forward(Model *m, int l, const float *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int E = r->E, groups = r->N / r->group;
    double *slope = (double *)*router_state(m, l, &importance_loss), weight = c->aux_weight / groups;
    double *part = scratch_doubles(m, (size_t)groups * div_up(r->group, CHUNK) * E),
           *loss = scratch_doubles(m, groups);

    // The sum of the weights that each expert is given in each group of tokens.
    column_sums(slope, Importance{r->expert, r->weight, r->K}, groups, r->group, E, 0, part);
    if (is_spread(c)) {
        sum_over_ranks(slope, E);
    }

    // The loss, and its derivative by each of these sums. With `variance` the mean is known: each token gives
    // 1 in all.
    double mean = c->balance == VARIANCE ? (double)ranks_group_size(m, r) / E : 0;
    cv_squared(loss, slope, slope, E, mean, weight * slope_factor(c), groups);
    add_sum(layer_aux(m, l), Doubles{loss}, groups, weight);
}

// dweight (N,K) += scale * slope (groups,E) of the chosen
__global__ void add_slopes_kernel(float *dweight, const double *slope, Route r, double scale) {
    size_t i = thread_of_grid();
    if (i < (size_t)r.N * r.K && r.expert[i] >= 0) {
        dweight[i] += (float)(scale * slope[i / r.K / r.group * r.E + r.expert[i]]);
    }
}

void importance_backward(Model *m, int l, float *dx, float *dweight, const float *x) {
    (void)dx, (void)x;
    const Route *r = &m->acts.layer[l].route;
    const double *slope = (const double *)*router_state(m, l, &importance_loss);
    add_slopes_kernel<<<blocks((size_t)r->N * r->K), THREADS, 0, stream>>>(dweight, slope, *r,
                                                                           m->batch.scale);
    CHECK(cudaGetLastError());
}

const Kernels importance_kernels = {&importance_loss, importance_allocate, importance_forward,
                                    importance_backward, NULL};

#endif
