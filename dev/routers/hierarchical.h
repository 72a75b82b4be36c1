// Two levels: each token chooses M of G groups of experts, and in each of them K/M of its E/G experts. An expert's
// weight is the product of both levels' weights. Shazeer et al. 2017, Outrageously Large Neural Networks, appendix B.
// The recipe: hierarchical. Needs: noisy.h, for the noise and the smooth load. The options are those of groups.h.
#if !defined(CONFIG_FIELDS) && !defined(HIERARCHICAL_H)
#define HIERARCHICAL_H
#include "noisy.h"

extern const Router hierarchical_router, hierarchical_load;

typedef struct Level {     // each token has `rows` rows of `count` scores, and `take` of each row are chosen
    int rows, count, take; // of the groups 1, G, M; of the experts G, E/G, K/M
    int column;            // where this level's logits begin in those of a token
    real *p;               // (n*rows,count)
    int *chosen;           // (n*rows,take)
    real *weight;          // (n*rows,take)
} Level;

typedef struct Hierarchical { // of one layer
    Level groups, experts;
    real *noisy;              // (n,G+E)  logits of the groups and then of the experts, with noise if there is any
    double *load_slope;       // (groups of tokens, E+G)  derivative of the load's loss
} Hierarchical;

int hierarchical_wanted(const Config *c) {
    return c->select == HIERARCHICAL;
}

const char *hierarchical_refuses(const Config *c) {
    int E = c->experts, K = c->topk, G = c->groups, M = c->group_topk, of_weights = c->balance >= CV2;
    if (M < 1 || E % G || K % M) {
        return "--select hierarchical needs --group-topk, --experts divisible by --groups and --topk by "
               "--group-topk";
    }
    if (c->gate != RENORMALIZED || c->score == SIGMOID || c->jitter + c->z_weight > 0 ||
        c->device_weight + c->comm_weight > 0 || (c->aux_weight > 0 && !of_weights)) {
        return "--select hierarchical goes with --gate renormalized and softmax, and balances by --balance cv2 or "
               "variance and --load-weight";
    }
    if (K / M == 1 || M == 1) {
        return "where one is chosen, --gate renormalized makes its weight always 1, so the router would never "
               "learn; use --gate probability or choose more (for each router, and on each level)";
    }
    return c->noise ? noisy_refuses(c) : NULL;
}

int hierarchical_outputs(const Config *c) {
    return (c->groups + c->experts) * (1 + c->noise);
}

void hierarchical_tensors(const Config *c, int l, Tensor *list, int *count) {
    if (c->noise) {
        noisy_tensors(c, l, list, count);
    }
}

Level own_level(Model *m, int n, int rows, int count, int take, int column) {
    size_t all = (size_t)n * rows;
    Level v = {rows, count, take, column, NULL, NULL, NULL};
    v.p = own_reals(m, all * count);
    v.chosen = (int *)own(m, all * take, sizeof(int));
    v.weight = own_reals(m, all * take);
    return v;
}

void hierarchical_allocate(Model *m, int l, int n) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int E = c->experts, G = c->groups, M = c->group_topk;
    Hierarchical *s = (Hierarchical *)own(m, 1, sizeof(Hierarchical));
    s->groups = own_level(m, n, 1, G, M, 0);
    s->experts = own_level(m, n, G, E / G, c->topk / M, G);
    s->noisy = c->noise ? own_reals(m, (size_t)n * (G + E)) : r->logits;
    s->load_slope = own_by_group(m, n, c->load_weight > 0 ? E + G : 0);
    r->slope = NULL; // no loss of counts
    *router_state(m, l, &hierarchical_router) = s;
}

// ---- one level

// Softmax of each row, the choice, and its weights, which are renormalised ones times scale.
void level_forward(Level *v, const real *noisy, int N, int W, double scale) {
    size_t width = (size_t)v->rows * v->count;
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++) {
        memcpy(v->p + n * width, noisy + (size_t)n * W + v->column, width * sizeof(real));
        for (int row = 0; row < v->rows; row++) {
            softmax(v->p + n * width + (size_t)row * v->count, v->count);
        }
    }
    select_topk(v->chosen, v->p, N * v->rows, v->count, v->take);
    weights_forward(v->weight, v->p, v->chosen, N * v->rows, v->count, v->take, RENORMALIZED, scale);
}

// Given dweight (N*rows,take), writes this level's columns of dnoisy (N,W).
void level_backward(Model *m, const Level *v, real *dnoisy, const real *dweight, int N, int W, double scale) {
    size_t width = (size_t)v->rows * v->count;
    real *dp = scratch(m, N * width);
    memset(dp, 0, N * width * sizeof(real));
    weights_backward(dp, dweight, v->weight, v->p, v->chosen, N * v->rows, v->count, v->take, RENORMALIZED, scale);
    for (int row = 0; row < N * v->rows; row++) {
        const real *p = v->p + (size_t)row * v->count, *d = dp + (size_t)row * v->count;
        real *to = dnoisy + (size_t)(row / v->rows) * W + v->column + (size_t)(row % v->rows) * v->count, mean = 0;
        for (int e = 0; e < v->count; e++) {
            mean += p[e] * d[e];
        }
        for (int e = 0; e < v->count; e++) {
            to[e] = p[e] * (d[e] - mean);
        }
    }
}

// ---- the smooth load of both levels

// load (rows,count) += of one row of token n; logits (n,2W).
void level_load(double *load, const Level *v, const real *noisy, const real *logits, int n, int row, int W) {
    size_t first = (size_t)row * v->count, at = (size_t)n * W + v->column + first;
    const int *chosen = v->chosen + ((size_t)n * v->rows + row) * v->take;
    smooth_load(load + first, chosen, noisy + at, logits + at + (size_t)n * W, v->count, v->take, W);
}

// Given dload (rows,count) times scale: dlogits (n,2W) and dnoisy (n,W) +=.
void level_load_backward(real *dlogits, real *dnoisy, const double *dload, double scale, const Level *v,
                         const real *noisy, const real *logits, int n, int row, int W) {
    size_t first = (size_t)row * v->count, at = (size_t)n * W + v->column + first, wide = at + (size_t)n * W;
    const int *chosen = v->chosen + ((size_t)n * v->rows + row) * v->take;
    smooth_load_backward(dlogits + wide, dnoisy + at, dload + first, scale, chosen, noisy + at, logits + wide,
                         v->count, v->take, W);
}

int hierarchical_load_wanted(const Config *c) {
    return c->load_weight > 0 && c->select == HIERARCHICAL;
}

// 1 + CV^2 of the experts' loads, for each group of tokens. An expert's load is that of its group, times its
// share of the tokens that are sent there: outer * inner / sent.
void hierarchical_load_forward(Model *m, int l, const real *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    const Hierarchical *s = (const Hierarchical *)*router_state(m, l, &hierarchical_router);
    int E = r->E, G = c->groups, M = c->group_topk, W = G + E, sums = E + 2 * G;
    double *inner = (double *)arena_take(&m->scratch, sums, sizeof(double)), *outer = inner + E, *sent = outer + G;
    double weight = c->load_weight * r->group / r->N;
    for (int first = 0; first < r->N; first += r->group) {
        memset(inner, 0, (size_t)sums * sizeof(double));
        for (int n = first; n < first + r->group; n++) {
            level_load(outer, &s->groups, s->noisy, r->logits, n, 0, W);
            for (int k = 0; k < M; k++) {
                int g = s->groups.chosen[(size_t)n * M + k];
                level_load(inner, &s->experts, s->noisy, r->logits, n, g, W);
                sent[g] += 1;
            }
        }
        if (is_spread(c)) {
            sum_over_ranks(inner, sums);
        }
        double *load = s->load_slope + (size_t)(first / r->group) * (E + G), *douter = load + E;
        for (int e = 0; e < E; e++) {
            int g = e / (E / G);
            load[e] = sent[g] > 0 ? outer[g] * inner[e] / sent[g] : 0;
        }
        r->aux += weight * cv_squared(load, load, E, 0, weight); // load becomes its slope

        // From the slope by a load to those by its factors. Gradients are averaged over processes, but these are
        // derivatives of sums over them.
        memset(douter, 0, (size_t)G * sizeof(double));
        for (int e = 0; e < E; e++) {
            int g = e / (E / G);
            double slope = sent[g] > 0 ? load[e] / sent[g] * (is_spread(c) ? ranks.size : 1) : 0;
            douter[g] += slope * inner[e];
            load[e] = slope * outer[g];
        }
    }
}

void hierarchical_load_backward(Model *m, const Route *r, const Hierarchical *s, real *dlogits, real *dnoisy) {
    int E = r->E, G = m->config.groups, M = m->config.group_topk, W = G + E;
    double scale = m->batch.scale;
    for (int n = 0; n < r->N; n++) {
        const double *slope = s->load_slope + (size_t)(n / r->group) * (E + G);
        for (int k = 0; k < M; k++) {
            int g = s->groups.chosen[(size_t)n * M + k];
            level_load_backward(dlogits, dnoisy, slope, scale, &s->experts, s->noisy, r->logits, n, g, W);
        }
        level_load_backward(dlogits, dnoisy, slope + E, scale, &s->groups, s->noisy, r->logits, n, 0, W);
    }
}

// ---- both levels together

// Where choice i (of N*K) comes from: the choice of its group, and that of its expert within the group.
void both_choices(const Hierarchical *s, int i, int *of_groups, int *of_experts) {
    int M = s->groups.take, each = s->experts.take, G = s->experts.rows, n = i / (M * each);
    *of_groups = n * M + i / each % M;
    *of_experts = (n * G + s->groups.chosen[*of_groups]) * each + i % each;
}

void hierarchical_forward(Model *m, int l, const real *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    Hierarchical *s = (Hierarchical *)*router_state(m, l, &hierarchical_router);
    int N = r->N, E = r->E, G = c->groups, W = G + E, size = E / G;
    matmul(r->logits, x, m->params.layer[l].router, N, router_width(c), hierarchical_outputs(c), SET);
    if (c->noise) {
        noise_forward(m, l, s->noisy, r->logits, N, W);
    }
    level_forward(&s->groups, s->noisy, N, W, 1);
    level_forward(&s->experts, s->noisy, N, W, c->scale);

    // The experts that the chosen groups chose.
    for (int i = 0; i < N * r->K; i++) {
        int of_groups, of_experts;
        both_choices(s, i, &of_groups, &of_experts);
        r->expert[i] = s->groups.chosen[of_groups] * size + s->experts.chosen[of_experts];
        r->weight[i] = s->groups.weight[of_groups] * s->experts.weight[of_experts];
    }

    // The probability of each expert, for the log.
    for (size_t i = 0; i < (size_t)N * E; i++) {
        r->p[i] = s->groups.p[i / size] * s->experts.p[i];
    }
}

void hierarchical_backward(Model *m, int l, real *dx, real *dweight, const real *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    const Hierarchical *s = (const Hierarchical *)*router_state(m, l, &hierarchical_router);
    int N = r->N, E = r->E, G = c->groups, W = G + E, rows = hierarchical_outputs(c), C = router_width(c);

    // A weight is a product, so the gradient by one factor is the other one times dweight.
    size_t of_groups_size = (size_t)N * s->groups.take, of_experts_size = (size_t)N * G * s->experts.take;
    real *dgroups = scratch(m, of_groups_size), *dexperts = scratch(m, of_experts_size);
    memset(dgroups, 0, of_groups_size * sizeof(real));
    memset(dexperts, 0, of_experts_size * sizeof(real));
    for (int i = 0; i < N * r->K; i++) {
        int of_groups, of_experts;
        both_choices(s, i, &of_groups, &of_experts);
        dgroups[of_groups] += dweight[i] * s->experts.weight[of_experts];
        dexperts[of_experts] += dweight[i] * s->groups.weight[of_groups];
    }
    real *dnoisy = scratch(m, (size_t)N * W), *dlogits = dnoisy;
    level_backward(m, &s->groups, dnoisy, dgroups, N, W, 1);
    level_backward(m, &s->experts, dnoisy, dexperts, N, W, c->scale);

    if (c->noise) {
        dlogits = scratch(m, (size_t)N * rows);
        memset(dlogits, 0, (size_t)N * rows * sizeof(real));
        if (c->load_weight > 0) {
            hierarchical_load_backward(m, r, s, dlogits, dnoisy);
        }
        noise_backward(m, l, dlogits, dnoisy, r->logits, N, W);
    }
    matmul_dw(m->grads.layer[l].router, dlogits, x, N, C, rows);
    matmul_dx(dx, dlogits, m->params.layer[l].router, N, C, rows, ADD);
}

const Recipe hierarchical_recipes[] = {
    {"hierarchical", 2017, 3, "noisy top-2 of 4 groups, then noisy top-2 of each group's 4 experts",
     "--experts 16 --topk 4 --ffn 128 --activation relu --select hierarchical --groups 4 --group-topk 2 --noise 1 "
     "--balance cv2 --aux-weight 0.1 --load-weight 0.1",
     "Shazeer et al., Outrageously Large Neural Networks, appendix B"},
};

const Router hierarchical_router = {
    .place = CHOICE,
    .wanted = hierarchical_wanted,
    .refuses = hierarchical_refuses,
    .outputs = hierarchical_outputs,
    .tensors = hierarchical_tensors,
    .allocate = hierarchical_allocate,
    .forward = hierarchical_forward,
    .backward = hierarchical_backward,
    .recipes = hierarchical_recipes,
    .recipe_count = COUNT(hierarchical_recipes),
};

const Router hierarchical_load = {.place = LOSS,
                                  .wanted = hierarchical_load_wanted,
                                  .refuses = noisy_load_refuses,
                                  .forward = hierarchical_load_forward};

#endif
