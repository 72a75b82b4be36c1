// Two levels on a GPU: see dev/routers/hierarchical.h.
// Gives: hierarchical_kernels, hierarchical_load_kernels. Needs: noisy.cuh; group_of and first_of_group of
// groups.cuh. The arrays of ::Level and of ::Hierarchical are the device's here.
#ifndef CUDA_HIERARCHICAL_CUH
#define CUDA_HIERARCHICAL_CUH
#include "groups.cuh"
#include "noisy.cuh"

Level own_level(Model *m, int n, int rows, int count, int take, int column) {
    size_t all = (size_t)n * rows;
    Level v = {rows, count, take, column, NULL, NULL, NULL};
    v.p = own_floats(m, all * count);
    v.chosen = (int *)own(m, all * take, sizeof(int));
    v.weight = own_floats(m, all * take);
    return v;
}

void hierarchical_allocate(Model *m, int l, int n) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int E = c->experts, G = c->groups, M = c->group_topk, each = c->topk / M;
    Hierarchical *s = (Hierarchical *)own_host(m, 1, sizeof(Hierarchical));
    s->groups = own_level(m, n, 1, G, M, 0);
    s->experts = own_level(m, n, G, E / G, each, G);
    s->noisy = c->noise ? own_floats(m, (size_t)n * (G + E)) : r->logits;
    s->load_slope = own_by_group(m, n, c->load_weight > 0 ? E + G : 0);
    r->slope = NULL; // no loss of counts
    *router_state(m, l, &hierarchical_router) = s;

    // Of each token in backward: the gradients by both levels' weights, scores and noisy logits, by the
    // logits, and a mark for each group.
    size_t numbers = (size_t)M + G * each + 2 * (G + E) + hierarchical_outputs(c);
    part_needs(m, 0, n * (numbers * sizeof(float) + G));
}

// ---- one level

__global__ void level_scores_kernel(Level v, const float *noisy, int rows, int W) {
    int row = row_of_warp();
    if (row < rows) {
        float lse; // there is no z-loss that would need it
        scores_of_row(v.p + (size_t)row * v.count, &lse, noisy + first_logit(v, row, W), v.count, SOFTMAX);
    }
}

// Softmax of each row, the choice, and its weights, which are renormalised ones times scale. taken_over NULL:
// the choice is made here, else it is this one of the host.
void level_forward(const Level *v, const float *noisy, int N, int W, double scale, const int *taken_over) {
    int rows = N * v->rows;
    level_scores_kernel<<<row_blocks(rows), THREADS, 0, stream>>>(*v, noisy, rows, W);
    CHECK(cudaGetLastError());
    select_topk(v->chosen, v->p, rows, v->count, v->take);
    take_over(v->chosen, taken_over, (size_t)rows * v->take);
    gpu::weights_forward(v->weight, v->p, v->chosen, rows, v->count, v->take, RENORMALIZED, scale);
}

__global__ void level_scores_back_kernel(float *dnoisy, const float *dp, Level v, int rows, int W) {
    int row = row_of_warp();
    if (row < rows) {
        size_t at = (size_t)row * v.count;
        scores_back_row(dnoisy + first_logit(v, row, W), dp + at, v.p + at, 0, v.count, SOFTMAX, 0);
    }
}

// Given dweight (N*rows,take), writes this level's columns of dnoisy (N,W).
void level_backward(Model *m, const Level *v, float *dnoisy, const float *dweight, int N, int W,
                    double scale) {
    int rows = N * v->rows;
    float *dp = scratch_zeros(m, (size_t)rows * v->count);
    gpu::weights_backward(dp, dweight, v->weight, v->p, v->chosen, rows, v->count, v->take, RENORMALIZED,
                          scale);
    level_scores_back_kernel<<<row_blocks(rows), THREADS, 0, stream>>>(dnoisy, dp, *v, rows, W);
    CHECK(cudaGetLastError());
}

// ---- the smooth load of both levels

__global__ void mark_groups_kernel(unsigned char *marks, Level groups, size_t size) {
    size_t i = thread_of_grid();
    if (i < size) {
        marks[i / groups.take * groups.count + groups.chosen[i]] = 1;
    }
}

// marks (N,G): 1 where a token is sent to a group.
unsigned char *mark_groups(Model *m, const Hierarchical *s, int N) {
    size_t bytes = (size_t)N * s->groups.count, size = (size_t)N * s->groups.take;
    unsigned char *marks = (unsigned char *)scratch_bytes(m, bytes);
    zero(marks, bytes);
    mark_groups_kernel<<<blocks(size), THREADS, 0, stream>>>(marks, s->groups, size);
    CHECK(cudaGetLastError());
    return marks;
}

// The rows of a level of which the load is made: those of the groups, or those of the experts in the groups
// that are marked.
LoadRows level_rows(const Route *r, const Hierarchical *s, const Level *v, const unsigned char *marks) {
    LoadRows rows = {*v, s->groups.count + r->E, s->noisy, r->logits, marks};
    return rows;
}

// slope (groups of tokens, E+G), loss (groups of tokens), of sums over each group's tokens: inner (E) and
// outer (G) are the loads of both levels, sent (G) is how many tokens each group of experts got. load (E) is
// scratch. One block a group of tokens. slope_factor: see there.
__global__ void load_losses_kernel(double *loss, double *slope, double *load, const double *inner,
                                   const double *outer, const double *sent, int E, int G, double weight,
                                   double slope_factor) {
    size_t group = blockIdx.x;
    slope += group * (E + G);
    load += group * E;
    inner += group * E;
    outer += group * G;
    sent += group * G;
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        int g = group_of(e, E, G);
        load[e] = sent[g] > 0 ? outer[g] * inner[e] / sent[g] : 0;
    }
    __syncthreads();
    double value = weight * cv_squared_of(load, slope, E, 0, weight * slope_factor);
    if (threadIdx.x == 0) {
        loss[group] = value;
    }
    __syncthreads();

    // From the slope by a load to those by its factors.
    for (int g = threadIdx.x; g < G; g += blockDim.x) {
        double sum = 0;
        for (int e = first_of_group(g, E, G); e < first_of_group(g + 1, E, G); e++) {
            sum += sent[g] > 0 ? slope[e] * inner[e] / sent[g] : 0;
            slope[e] *= sent[g] > 0 ? outer[g] / sent[g] : 0;
        }
        slope[E + g] = sum;
    }
}

void hierarchical_load_allocate(Model *m, int l, int n) {
    (void)l;
    const Config *c = &m->config;
    size_t E = c->experts, G = c->groups, chunks = most_chunks(m, n), groups = most_groups(m);
    part_needs(m, n * G * (1 + sizeof(int)) + (chunks * E + groups * (2 * E + 2 * G + 1)) * sizeof(double),
               0);
}

// 1 + CV^2 of the experts' loads, for each group of tokens. An expert's load is that of its group, times its
// share of the tokens that are sent there: outer * inner / sent.
void hierarchical_load_forward(Model *m, int l, const float *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    const Hierarchical *s = (const Hierarchical *)*router_state(m, l, &hierarchical_router);
    int N = r->N, E = r->E, G = c->groups, group = r->group, groups = N / group;
    double weight = c->load_weight / groups;
    double *inner = scratch_doubles(m, (size_t)groups * (2 * E + 2 * G + 1)),
           *outer = inner + (size_t)groups * E;
    double *sent = outer + (size_t)groups * G, *load = sent + (size_t)groups * G,
           *loss = load + (size_t)groups * E;
    double *part = scratch_doubles(m, (size_t)groups * div_up(group, CHUNK) * E);
    int *next = scratch_ints(m, (size_t)N * G);
    unsigned char *marks = mark_groups(m, s, N);
    smooth_load(inner, level_rows(r, s, &s->experts, marks), N, group, next, part);
    smooth_load(outer, level_rows(r, s, &s->groups, NULL), N, group, next, part);
    column_sums(sent, Entries<unsigned char>{marks, G}, groups, group, G, 0, part);
    if (is_spread(c)) {
        sum_over_ranks(inner, E + 2 * G); // there is one group then
    }
    load_losses_kernel<<<groups, THREADS, 0, stream>>>(loss, s->load_slope, load, inner, outer, sent, E, G,
                                                       weight, slope_factor(c));
    CHECK(cudaGetLastError());
    add_sum(layer_aux(m, l), Doubles{loss}, groups, 1);
}

void hierarchical_load_backward(Model *m, const Route *r, const Hierarchical *s, float *dlogits,
                                float *dnoisy) {
    int E = r->E, stride = E + m->config.groups;
    LoadRows experts = level_rows(r, s, &s->experts, mark_groups(m, s, r->N)),
             groups = level_rows(r, s, &s->groups, NULL);
    smooth_load_backward(dlogits, dnoisy, s->load_slope, stride, m->batch.scale, experts, r->N, r->group);
    smooth_load_backward(dlogits, dnoisy, s->load_slope + E, stride, m->batch.scale, groups, r->N, r->group);
}

// ---- both levels together

__global__ void join_levels_kernel(int *expert, float *weight, Hierarchical s, size_t size) {
    int M = s.groups.take, each = s.experts.take, G = s.experts.rows;
    size_t i = thread_of_grid(), n = i / ((size_t)M * each), of_groups = i / each;
    if (i < size) {
        size_t of_experts = (n * G + s.groups.chosen[of_groups]) * each + i % each;
        expert[i] = s.groups.chosen[of_groups] * s.experts.count + s.experts.chosen[of_experts];
        weight[i] = s.groups.weight[of_groups] * s.experts.weight[of_experts];
    }
}

// expert, weight (N,K): the experts that the chosen groups chose.
void join_levels(int *expert, float *weight, const Hierarchical *s, int N) {
    size_t size = (size_t)N * s->groups.take * s->experts.take;
    join_levels_kernel<<<blocks(size), THREADS, 0, stream>>>(expert, weight, *s, size);
    CHECK(cudaGetLastError());
}

__global__ void join_levels_back_kernel(float *dgroups, float *dexperts, const float *dweight, Hierarchical s,
                                        size_t size) {
    int M = s.groups.take, each = s.experts.take, G = s.experts.rows;
    size_t of_groups = thread_of_grid();
    if (of_groups >= size) {
        return;
    }
    size_t of_experts = (of_groups / M * G + s.groups.chosen[of_groups]) * each;
    float sum = 0;
    for (int i = 0; i < each; i++) {
        float d = dweight[of_groups * each + i];
        sum += d * s.experts.weight[of_experts + i];
        dexperts[of_experts + i] = d * s.groups.weight[of_groups];
    }
    dgroups[of_groups] = sum;
}

// A weight is a product, so the gradient by one factor is the other one times dweight. Writes dgroups (N,M),
// dexperts (N,G,K/M).
void join_levels_back(float *dgroups, float *dexperts, const float *dweight, const Hierarchical *s, int N) {
    size_t size = (size_t)N * s->groups.take;
    zero(dexperts, (size_t)N * s->experts.rows * s->experts.take * sizeof(float));
    join_levels_back_kernel<<<blocks(size), THREADS, 0, stream>>>(dgroups, dexperts, dweight, *s, size);
    CHECK(cudaGetLastError());
}

// p (N,E): the probability of each expert, for the log
__global__ void join_scores_kernel(float *p, Hierarchical s, size_t size) {
    size_t i = thread_of_grid();
    if (i < size) {
        p[i] = s.groups.p[i / s.experts.count] * s.experts.p[i];
    }
}

void hierarchical_forward(Model *m, int l, const float *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    Hierarchical *s = (Hierarchical *)*router_state(m, l, &hierarchical_router);
    const Decided *d = decided(m, l);
    int N = r->N, E = r->E, W = c->groups + E;
    size_t size = (size_t)N * E;
    gpu::matmul(r->logits, x, m->params.layer[l].router, N, router_width(c), hierarchical_outputs(c), SET);
    if (c->noise) {
        noise_forward(m, l, s->noisy, r->logits, N, W);
    }
    level_forward(&s->groups, s->noisy, N, W, 1, d ? d->groups_expert : NULL);
    level_forward(&s->experts, s->noisy, N, W, c->scale, d ? d->gate_expert : NULL);
    join_levels(r->expert, r->weight, s, N);
    join_scores_kernel<<<blocks(size), THREADS, 0, stream>>>(r->p, *s, size);
    CHECK(cudaGetLastError());
}

void hierarchical_backward(Model *m, int l, float *dx, float *dweight, const float *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    const Hierarchical *s = (const Hierarchical *)*router_state(m, l, &hierarchical_router);
    int N = r->N, E = r->E, G = c->groups, W = G + E, rows = hierarchical_outputs(c), C = router_width(c);
    float *dgroups = scratch(m, (size_t)N * s->groups.take),
          *dexperts = scratch(m, (size_t)N * G * s->experts.take);
    float *dnoisy = scratch(m, (size_t)N * W), *dlogits = dnoisy;
    join_levels_back(dgroups, dexperts, dweight, s, N);
    level_backward(m, &s->groups, dnoisy, dgroups, N, W, 1);
    level_backward(m, &s->experts, dnoisy, dexperts, N, W, c->scale);

    if (c->noise) {
        dlogits = scratch_zeros(m, (size_t)N * rows);
        if (c->load_weight > 0) {
            hierarchical_load_backward(m, r, s, dlogits, dnoisy);
        }
        noise_backward(m, l, dlogits, dnoisy, r->logits, N, W);
    }
    matmul_dw(m->grads.layer[l].router, dlogits, x, N, C, rows);
    gpu::matmul_dx(dx, dlogits, m->params.layer[l].router, N, C, rows, ADD);
}

const Kernels hierarchical_kernels = {&hierarchical_router, hierarchical_allocate, hierarchical_forward,
                                      hierarchical_backward, NULL};
const Kernels hierarchical_load_kernels = {&hierarchical_load, hierarchical_load_allocate,
                                           hierarchical_load_forward, NULL, NULL};

#endif
