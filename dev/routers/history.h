// History: a moving average of the router chooses the experts, and the router of now weighs them. So a token's experts
// change slowly. Compare Dai et al. 2022, StableMoE, which freezes its router altogether. The recipe: history.
// Needs: mask_groups of groups.h, for a choice within the best groups of experts.
#ifdef CONFIG_FIELDS
    double history_decay; // of the moving average, for each step; 0: there is none
#elif !defined(HISTORY_H)
#define HISTORY_H
#include "groups.h"

extern const Router history_router, history_matrix;

int history_wanted(const Config *c) {
    return c->history_decay > 0;
}

int history_chooses(const Config *c) {
    return c->history_decay > 0 && c->routers == 1;
}

const char *history_refuses(const Config *c) {
    if (c->select != TOP_K) {
        return "--bias-rate and --history-decay go with --select topk";
    }
    return c->bias_rate > 0 ? "--bias-rate or --history-decay: give one of them" : NULL;
}

void history_tensors(const Config *c, int l, Tensor *list, int *count) {
    if (l >= 0) {
        add_tensor(list, count, l, "slow", NO_FIELD, 2, 1, router_outputs(c), router_width(c), INIT_ZERO)->trained = 0;
    }
}

void init_tensor(const Model *m, int i, real *w, const double *frequency);

// The average begins at the router's first weights.
void history_init(const Model *m, int i, real *w, const double *frequency) {
    if (!strcmp(m->tensors[i].kind, "slow")) {
        init_tensor(m, find_tensor(m, m->tensors[i].layer, "router"), w, frequency);
    }
}

// (N,W): the slow router's logits, which decide. Its scores would decide the same, since they grow with the logits.
// A choice by several routers (multirouter.h) can be made by these, too.
real *slow_logits(Model *m, int l, const real *x) {
    int N = m->acts.layer[l].route.N, W = router_outputs(&m->config);
    real *slow = scratch(m, (size_t)N * W);
    matmul(slow, x, layer_tensor(m, l, "slow", WEIGHTS), N, router_width(&m->config), W, SET);
    return slow;
}

void history_forward(Model *m, int l, const real *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int N = r->N, E = r->E, K = r->K;
    matmul(r->logits, x, m->params.layer[l].router, N, router_width(c), E, SET);
    scores_forward(r->p, r->lse, r->logits, N, E, c->score);
    real *slow = slow_logits(m, l, x);
    if (c->group_topk) {
        mask_groups(slow, N, E, c->groups, c->group_topk, c->group_score);
    }
    select_topk(r->expert, slow, N, E, K);
    weights_forward(r->weight, r->p, r->expert, N, E, K, c->gate, c->scale);
}

void history_update(Model *m, int l) {
    real *slow = layer_tensor(m, l, "slow", WEIGHTS), fresh = (real)(1 - m->config.history_decay);
    const real *router = m->params.layer[l].router;
    size_t size = (size_t)router_outputs(&m->config) * router_width(&m->config);
    for (size_t i = 0; i < size; i++) {
        slow[i] += fresh * (router[i] - slow[i]);
    }
}

const Option history_options[] = {
    NUMBER("history-decay", history_decay, "0", 0, 0.999999, MODEL, "Router: choice and weight",
           "choose by a moving average of the router; 0: by the router"),
};

const Recipe history_recipes[] = {
    {"history", 2022, 2.5, "chosen by a moving average of the router, weighed by the router of now",
     "--history-decay 0.99", "cf. Dai et al., StableMoE"},
};

const Router history_matrix = {
    .place = ELSEWHERE,
    .wanted = history_wanted,
    .refuses = history_refuses,
    .tensors = history_tensors,
    .init = history_init,
    .update = history_update,
    .options = history_options,
    .option_count = COUNT(history_options),
    .recipes = history_recipes,
    .recipe_count = COUNT(history_recipes),
};

const Router history_router = {
    .place = CHOICE,
    .wanted = history_chooses,
    .forward = history_forward,
    .backward = topk_backward, // the choice has no derivative
};

#endif
