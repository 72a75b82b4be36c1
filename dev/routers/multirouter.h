// Several routers: each of R routers chooses K/R experts of a token by scores of its own, and a token's answer is the
// mean of what the routers' choices say. Two routers may choose the same expert. This is the multi-head routing of the
// source documents. The recipe: multirouter.
// Needs: history.h, since a moving average of the routers can choose.
#ifdef CONFIG_FIELDS
    int routers; // R
#elif !defined(MULTIROUTER_H)
#define MULTIROUTER_H
#include "capacity.h" // NEXT
#include "history.h"

extern const Router multirouter_router, multirouter_loss;

int multirouter_wanted(const Config *c) {
    return c->routers > 1;
}

const char *multirouter_refuses(const Config *c) {
    if (c->topk % c->routers) {
        return "--topk must be divisible by --routers";
    }
    if (c->select != TOP_K || c->noise || c->groups > 1 || c->group_topk || c->bias_rate > 0 ||
        c->score == SIGMOID || c->balance == UNBIASED || c->balance == WIDTH || c->overflow == NEXT ||
        c->second_threshold > 0) {
        return "--routers goes with plain top-k of softmax scores only";
    }
    if (c->group == STEP) {
        return "--group step goes with one router and with losses of counts: --balance switch or width, "
               "--device-weight";
    }
    return NULL;
}

int multirouter_outputs(const Config *c) {
    return c->routers * c->experts;
}

// A token has R rows of scores, one for each router, instead of one; and slopes (groups of tokens, R,E).
void multirouter_allocate(Model *m, int l, int n) {
    int R = m->config.routers, E = m->config.experts;
    Route *r = &m->acts.layer[l].route;
    r->p = own_reals(m, (size_t)n * R * E);
    r->lse = own_reals(m, (size_t)n * R);
    r->slope = NULL; // the lesson's are for one router
    *router_state(m, l, &multirouter_router) = own_by_group(m, n, R * E);
}

void multirouter_forward(Model *m, int l, const real *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int N = r->N, E = r->E, R = c->routers, C = router_width(c), each = r->K / R;
    r->rows = N * R;
    matmul(r->logits, x, m->params.layer[l].router, N, C, R * E, SET);
    scores_forward(r->p, r->lse, r->logits, r->rows, E, SOFTMAX);

    select_topk(r->expert, c->history_decay > 0 ? slow_logits(m, l, x) : r->p, r->rows, E, each);
    weights_forward(r->weight, r->p, r->expert, r->rows, E, each, c->gate, c->scale / R);
}

// The balance loss, in the forms of Switch Transformers and of GShard, which counts first choices only: for each
// group of tokens and each router on its own, and then the mean over the routers.
void multirouter_loss_forward(Model *m, int l, const real *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int E = r->E, R = c->routers, each = r->K / R, groups = r->N / r->group;
    int counted = c->balance == GSHARD ? 1 : each;
    double *slope = (double *)*router_state(m, l, &multirouter_router), loss = 0;
    double *count = (double *)arena_take(&m->scratch, (size_t)groups * R * E, sizeof(double));
    memset(count, 0, (size_t)groups * R * E * sizeof(double));
    memset(slope, 0, (size_t)groups * R * E * sizeof(double));
    for (int row = 0; row < r->rows; row++) {
        for (int k = 0; k < counted; k++) {
            int e = r->served[(size_t)row * each + k];
            count[((size_t)(row / R / r->group) * R + row % R) * E + e] += 1;
        }
    }
    if (is_spread(c)) {
        sum_over_ranks(count, R * E);
    }
    for (int i = 0; i < groups * R; i++) {
        add_balance(slope + (size_t)i * E, count + (size_t)i * E, E, c->aux_weight);
    }
    for (int row = 0; row < r->rows; row++) {
        const double *weights = slope + ((size_t)(row / R / r->group) * R + row % R) * E;
        for (int e = 0; e < E; e++) {
            loss += weights[e] * (double)r->p[(size_t)row * E + e];
        }
    }
    r->aux += loss / r->rows;
}

int multirouter_loss_wanted(const Config *c) {
    return c->routers > 1 && (c->balance == SWITCH || c->balance == GSHARD);
}

void multirouter_backward(Model *m, int l, real *dx, real *dweight, const real *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int N = r->N, E = r->E, R = c->routers, C = router_width(c), each = r->K / R, rows = r->rows;
    real *dp = scratch(m, (size_t)rows * E), *dlogits = scratch(m, (size_t)rows * E);
    memset(dp, 0, (size_t)rows * E * sizeof(real));
    weights_backward(dp, dweight, r->weight, r->p, r->expert, rows, E, each, c->gate, c->scale / R);

    // The balance loss is the mean over all rows of slope . p.
    const double *slope = (const double *)*router_state(m, l, &multirouter_router);
    for (int row = 0; row < rows && multirouter_loss_wanted(c); row++) {
        const double *weights = slope + ((size_t)(row / R / r->group) * R + row % R) * E;
        for (int e = 0; e < E; e++) {
            dp[(size_t)row * E + e] += (real)(m->batch.scale / rows * weights[e]);
        }
    }
    scores_backward(dlogits, dp, r->p, r->lse, rows, E, SOFTMAX, c->z_weight * m->batch.scale / rows);
    matmul_dw(m->grads.layer[l].router, dlogits, x, N, C, R * E);
    matmul_dx(dx, dlogits, m->params.layer[l].router, N, C, R * E, ADD);
}

const Option multirouter_options[] = {
    INTEGER("routers", routers, "1", 1, 64, MODEL, "Router: scores",
            "so many routers choose K/R experts each; their answers are averaged"),
};

const Recipe multirouter_recipes[] = {
    {"multirouter", 0, 2.5, "two routers choose two experts each; the answers are averaged",
     "--routers 2 --topk 4 --ffn 128", "multi-head routing of the source documents"},
};

const Router multirouter_router = {
    .place = CHOICE,
    .wanted = multirouter_wanted,
    .refuses = multirouter_refuses,
    .outputs = multirouter_outputs,
    .allocate = multirouter_allocate,
    .forward = multirouter_forward,
    .backward = multirouter_backward,
    .options = multirouter_options,
    .option_count = COUNT(multirouter_options),
    .recipes = multirouter_recipes,
    .recipe_count = COUNT(multirouter_recipes),
};

const Router multirouter_loss = {
    .place = LOSS, .wanted = multirouter_loss_wanted, .forward = multirouter_loss_forward};

#endif
