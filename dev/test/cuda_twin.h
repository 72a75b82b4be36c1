// The C twin's functions in the form that the CUDA twin's have, for tests that hold one against the other: Plan and Gate
// where the C twin has Route, counts and slopes of gates with several rows a token, and the arguments that the C twin finds
// in its Model. Each one calls the C twin's function, or puts together what it does. Needs: dev/test/cuda.h.

#pragma once
#include "dev/test/cuda.h"

typedef gpu::Plan Plan;
typedef gpu::Gate Gate;

// A model of one layer without weights. A test fills in what the function looks at that it calls. Valid until the next call.
Model *bare_model(uint64_t seed) {
    static Model m;
    static LayerActs layer;
    arena_free(&m.scratch);
    memset(&m, 0, sizeof(m));
    memset(&layer, 0, sizeof(layer));
    m.acts.layer = &layer;
    m.config.seed = (int)(seed % 1000000);
    m.config.layers = 1;
    m.config.dim = m.config.subtokens = 1;
    m.batch.step = 3;
    m.batch.scale = 1;
    return &m;
}

// The stream of random numbers that layer 0 of such a model has for this purpose.
uint64_t stream_of(const Model *m, int purpose) {
    return random_stream((uint64_t)m->config.seed, purpose, (uint64_t)m->batch.step, 0);
}

// ---- plans

// A plan whose arrays live until free_taken().
Plan take_plan(int N, int E, int K) {
    size_t choices = (size_t)N * K;
    Plan p = {N,
              E,
              K,
              take_ints(choices),
              take_ints(choices),
              take_ints(choices),
              take_ints(choices),
              take_ints(choices),
              take_ints((size_t)E + 1)};
    return p;
}

Route route_of(const Plan *plan, int group_tokens) {
    Route r = {};
    r.N = plan->N;
    r.E = plan->E;
    r.K = plan->K;
    r.group = group_tokens;
    r.rows = plan->N;
    r.expert = plan->expert;
    r.served = plan->key;
    r.row = plan->slot;
    r.choice = plan->choice;
    r.token = plan->token;
    r.offset = plan->offset;
    return r;
}

// Returns how many choices are refused.
int plan_capacity(Plan *plan, int group_tokens, double factor, int units, int order, const real *weight,
                  const unsigned char *exempt, const real *p) {
    Route r = route_of(plan, group_tokens);
    if (factor <= 0)
        return 0;
    if (units == plan->E && order != BY_SCORE && !exempt && !p) { // what the lesson does itself
        drop_overflow(&r, factor, plan->K, order == BY_CHOICE);
        return r.dropped;
    }
    double capacity = ceil(factor * plan->K * group_tokens / units - 1e-9);
    Service s = {plan->E, plan->K, group_tokens, units, (int)fmin(capacity, (double)group_tokens * plan->K), order,
                 plan->key, plan->expert, weight, p, exempt};
    int before = count_served(&r);
    serve(&s, plan->N);
    return before - count_served(&r);
}

void plan_sort(Plan *plan) {
    Route r = route_of(plan, plan->N);
    sort_by_expert(&r);
}

// Fills the rest of a plan from plan->expert. First choices are served before second ones. Returns how many are refused.
int make_plan(Plan *plan, int group_tokens, double factor) {
    memcpy(plan->key, plan->expert, (size_t)plan->N * plan->K * sizeof(int));
    int dropped = ::plan_capacity(plan, group_tokens, factor, plan->E, BY_CHOICE, NULL, NULL, NULL);
    ::plan_sort(plan);
    return dropped;
}

void decline_second(Model *m, int *key, real *weight, int N, double threshold, double scale) {
    Route *r = &m->acts.layer[0].route;
    r->N = N;
    r->K = 2;
    r->served = key;
    r->weight = weight;
    m->config.second_threshold = threshold;
    m->config.scale = scale;
    m->batch.mode = TRAIN_MODE;
    gshard_forward(m, 0, NULL);
}

// ---- scores of gates

// Where a row of a gate begins among the logits, of which a token has W.
size_t logits_of(const Gate *g, int row, int W) {
    return (size_t)(row / g->per) * W + g->column + row % g->per * g->E;
}

void scores_forward(Gate *g, const real *logits, int N, int W, int score) {
    int rows = N * g->per;
    real *own = take_reals((size_t)rows * g->E);
    for (int row = 0; row < rows; row++)
        memcpy(own + (size_t)row * g->E, logits + logits_of(g, row, W), (size_t)g->E * sizeof(real));
    ::scores_forward(g->p, g->lse, own, rows, g->E, score);
}

// dlogits (N,W) +=
void scores_backward(real *dlogits, const real *dp, const Gate *g, int N, int W, int score, double z) {
    int rows = N * g->per;
    real *own = take_reals((size_t)rows * g->E);
    ::scores_backward(own, dp, g->p, g->lse, rows, g->E, score, z);
    for (int row = 0; row < rows; row++) {
        for (int e = 0; e < g->E; e++)
            dlogits[logits_of(g, row, W) + e] += own[(size_t)row * g->E + e];
    }
}

// The recurrent unit's weights as a model's: W_x, W_h (3R,R), b_x, b_h (3R), or their gradients.
typedef struct Gru {
    real *x, *h, *bx, *bh;
} Gru;

Model *gru_model(const Gru *w, const Gru *dw, int R, Tensor *list) {
    Model *m = bare_model(0);
    m->tensors = list;
    add_tensor(list, &m->tensor_count, -1, "gru_x", NO_FIELD, 2, 1, 3 * R, R, INIT_FAN_IN);
    add_tensor(list, &m->tensor_count, -1, "gru_h", NO_FIELD, 2, 1, 3 * R, R, INIT_FAN_IN);
    add_tensor(list, &m->tensor_count, -1, "gru_bx", NO_FIELD, 1, 1, 1, 3 * R, INIT_ZERO);
    add_tensor(list, &m->tensor_count, -1, "gru_bh", NO_FIELD, 1, 1, 1, 3 * R, INIT_ZERO);
    for (int i = 0; i < 4; i++) {
        list[i].offset = m->size;
        m->size += list[i].size;
    }
    m->memory[WEIGHTS] = take_reals(m->size);
    m->memory[GRADS] = take_reals(m->size);
    const real *from[2][4] = {{w->x, w->h, w->bx, w->bh}, {dw->x, dw->h, dw->bx, dw->bh}};
    for (int i = 0; i < 4; i++) {
        memcpy(m->memory[WEIGHTS] + list[i].offset, from[0][i], list[i].size * sizeof(real));
        memcpy(m->memory[GRADS] + list[i].offset, from[1][i], list[i].size * sizeof(real));
    }
    return m;
}

// The experts j that a token's chosen groups i chose, with the product of the weights.
Hierarchical levels_of(const Gate *groups, const Gate *inner) {
    Hierarchical s = {{groups->per, groups->E, groups->K, groups->column, groups->p, groups->expert, groups->weight},
                      {inner->per, inner->E, inner->K, inner->column, inner->p, inner->expert, inner->weight},
                      NULL,
                      NULL};
    return s;
}

void join_gates_forward(int *expert, real *weight, const Gate *groups, const Gate *inner, int N) {
    Hierarchical s = levels_of(groups, inner);
    for (int i = 0; i < N * groups->K * inner->K; i++) {
        int m, k;
        both_choices(&s, i, &m, &k);
        expert[i] = groups->expert[m] * inner->E + inner->expert[k];
        weight[i] = groups->weight[m] * inner->weight[k];
    }
}

void join_gates_backward(real *dgroups, real *dinner, const real *dweight, const Gate *groups, const Gate *inner, int N) {
    Hierarchical s = levels_of(groups, inner);
    for (int i = 0; i < N * groups->K * inner->K; i++) {
        int m, k;
        both_choices(&s, i, &m, &k);
        dgroups[m] += dweight[i] * inner->weight[k];
        dinner[k] += dweight[i] * groups->weight[m];
    }
}

// ---- balance

// count (groups*per,E), of the first `first` choices of each row. The rows of a token are counted apart.
void count_choices(double *count, const int *choice, int rows, int E, int K, int first, int group_rows, int per) {
    int N = rows / per, groups = rows / group_rows;
    for (int i = 0; i < per; i++) {
        int *own = take_ints((size_t)N * first);
        double *counted = (double *)take((size_t)groups * E, sizeof(double));
        for (int j = 0; j < N * first; j++)
            own[j] = choice[(size_t)(j / first * per + i) * K + j % first];
        count_choices(counted, own, N, E, first, group_rows / per);
        for (int group = 0; group < groups; group++)
            memcpy(count + ((size_t)group * per + i) * E, counted + (size_t)group * E, E * sizeof(double));
    }
}

// width (E): a choice counts as much as its expert is wide; NULL: as 1.
void add_balance(double *slope, const double *count, const int *width, int E, double weight) {
    double *wide = (double *)take(E, sizeof(double));
    for (int e = 0; e < E; e++)
        wide[e] = count[e] * (width ? width[e] : 1);
    add_balance(slope, wide, E, weight);
}

Model *loss_model(int n, int E, int K, int G, int M, double *slope) {
    Model *m = bare_model(0);
    Route *r = &m->acts.layer[0].route;
    m->config.groups = G;
    m->config.group_topk = M;
    r->N = r->group = n;
    r->E = E;
    r->K = K;
    r->slope = slope;
    return m;
}

void add_device_balance(double *slope, const double *count, int E, int D, double weight) {
    Model *m = loss_model(1, E, 1, D, 1, slope);
    m->acts.layer[0].route.count = (double *)count;
    m->config.device_weight = weight;
    group_loss_forward(m, 0, NULL);
}

void add_communication_balance(double *slope, const int *expert, int n, int E, int K, int D, int M, double weight) {
    Model *m = loss_model(n, E, K, D, M, slope);
    m->acts.layer[0].route.served = (int *)expert;
    m->config.comm_weight = weight;
    communication_forward(m, 0, NULL);
}

// The i-th row of each token, and its slopes: a route of a gate with one row a token.
Route rows_of_gate(const Gate *g, const double *slope, int rows, int group_rows, int i) {
    int N = rows / g->per, groups = rows / group_rows;
    Route r = {};
    r.N = r.rows = N;
    r.E = g->E;
    r.K = g->K;
    r.group = group_rows / g->per;
    r.p = take_reals((size_t)N * g->E);
    r.slope = (double *)take((size_t)groups * g->E, sizeof(double));
    for (int n = 0; n < N; n++)
        memcpy(r.p + (size_t)n * g->E, g->p + ((size_t)n * g->per + i) * g->E, g->E * sizeof(real));
    for (int group = 0; group < groups; group++)
        memcpy(r.slope + (size_t)group * g->E, slope + ((size_t)group * g->per + i) * g->E, g->E * sizeof(double));
    return r;
}

double balance_forward(const Gate *g, const double *slope, int rows, int group_rows, int score) {
    double loss = 0;
    for (int i = 0; i < g->per; i++) {
        Route r = rows_of_gate(g, slope, rows, group_rows, i);
        loss += mean_of_slopes(&r, score) / g->per;
    }
    return loss;
}

void balance_backward(real *dp, const Gate *g, const double *slope, int rows, int group_rows, int score, double scale) {
    for (int i = 0; i < g->per; i++) {
        Route r = rows_of_gate(g, slope, rows, group_rows, i);
        Model *m = bare_model(0);
        real *own = take_reals((size_t)r.N * g->E);
        m->config.score = score;
        m->batch.scale = scale / g->per;
        for (int n = 0; n < r.N; n++)
            memcpy(own + (size_t)n * g->E, dp + ((size_t)n * g->per + i) * g->E, g->E * sizeof(real));
        ::balance_backward(m, own, &r);
        for (int n = 0; n < r.N; n++)
            memcpy(dp + ((size_t)n * g->per + i) * g->E, own + (size_t)n * g->E, g->E * sizeof(real));
    }
}

// load (per,E) += over n tokens from `first` on. live (N*per): rows that count, NULL: all. With dload (per,E) not NULL the
// slopes instead.
void smooth_load(double *load, const double *dload, real *dnoisy, real *dlogits, const Gate *g, const real *noisy,
                 const real *logits, int W, int first, int n, const unsigned char *live) {
    for (int row = first * g->per; row < (first + n) * g->per; row++) {
        size_t at = logits_of(g, row, W), raw = at + (size_t)(row / g->per) * W, own = (size_t)(row % g->per) * g->E;
        const int *chosen = g->expert + (size_t)row * g->K;
        if (live && !live[row])
            continue;
        if (dload)
            smooth_load_backward(dlogits + raw, dnoisy + at, dload + own, 1, chosen, noisy + at, logits + raw, g->E, g->K, W);
        else
            ::smooth_load(load + own, chosen, noisy + at, logits + raw, g->E, g->K, W);
    }
}

// ---- layers

// A layer's choices as gates: the experts' gate, and that of their groups where these are chosen first.
Gate expert_gate(const Model *m, int l) {
    const Route *r = &m->acts.layer[l].route;
    int R = m->config.routers;
    Gate g = {R, r->E, r->K / R, 0, r->p, r->lse, r->weight, r->expert};
    if (m->config.select == HIERARCHICAL) {
        const Level *v = &((const Hierarchical *)*router_state((Model *)m, l, &hierarchical_router))->experts;
        Gate inner = {v->rows, v->count, v->take, v->column, v->p, NULL, v->weight, v->chosen};
        return inner;
    }
    return g;
}

Gate group_gate(const Model *m, int l) {
    Gate g = {};
    if (m->config.select == HIERARCHICAL) {
        const Level *v = &((const Hierarchical *)*router_state((Model *)m, l, &hierarchical_router))->groups;
        Gate groups = {v->rows, v->count, v->take, v->column, v->p, NULL, v->weight, v->chosen};
        return groups;
    }
    return g;
}

// The choices of the C twin's layer, for the CUDA twin to take over.
gpu::LayerPlan layer_plan(const Model *m, int l) {
    const Route *r = &m->acts.layer[l].route;
    gpu::LayerPlan plan = {r->expert, r->served, expert_gate(m, l).expert, group_gate(m, l).expert};
    return plan;
}

// (N,W) with noise.
const real *noisy_logits(const Model *m, int l) {
    if (m->config.select == HIERARCHICAL)
        return ((const Hierarchical *)*router_state((Model *)m, l, &hierarchical_router))->noisy;
    return ((const Noisy *)*router_state((Model *)m, l, &noisy_router))->logits;
}

// What decided the choice of the last pass, (n,W): scores, or logits, which have the same order.
const real *deciding_scores(Model *m, int l) {
    const Config *c = &m->config;
    const LayerActs *a = &m->acts.layer[l];
    const Route *r = &a->route;
    const real *x = c->subtokens > 1 ? subtokens_of(m, l) : a->h2;
    real *score;
    scratch_reset(m);
    if (c->history_decay > 0) {
        if (c->jitter > 0 && m->batch.mode == TRAIN_MODE)
            x = (const real *)*router_state(m, l, &jitter_router);
        if (c->recurrent)
            x = ((const Recurrent *)*router_state(m, l, &recurrent_router))->state;
        score = slow_logits(m, l, x);
    } else if (m->params.layer[l].bias) {
        score = scratch(m, (size_t)r->N * r->E);
        for (size_t i = 0; i < (size_t)r->N * r->E; i++)
            score[i] = r->p[i] + m->params.layer[l].bias[i % r->E];
    } else {
        return expert_gate(m, l).p;
    }
    if (c->group_topk)
        mask_groups(score, r->N, r->E, c->groups, c->group_topk, c->group_score);
    return score;
}

// The sums of the lowest scores that each expert took (E), and how many such there were; NULL where experts do not choose.
const Lowest *lowest_of(const Model *m, int l) {
    return m->config.select == EXPERT_CHOICE ? (const Lowest *)*router_state((Model *)m, l, &expert_choice_router) : NULL;
}

// The end of moe_backward: from the weights and the losses to the router and to its input. dx (n,C) +=
void router_backward(Model *m, int l, real *dx, real *dweight, const real *x) {
    scratch_reset(m);
    for (int i = 0; m->parts[i]; i++) {
        if (m->parts[i]->place == LOSS && m->parts[i]->backward)
            m->parts[i]->backward(m, l, dx, dweight, x);
    }
    m->router->backward(m, l, dx, dweight, x);
}
