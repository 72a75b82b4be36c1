// Noisy top-k: in training each logit gets Gaussian noise, whose size the router learns for each token, so that
// experts near the border are tried by chance. And a balance loss of the smooth load: how many tokens each expert
// would get on average over the noise, which, unlike a count, has a derivative. Shazeer et al. 2017, Outrageously
// Large Neural Networks, section 4 and appendix A. The recipe: shazeer.
// Gives for hierarchical.h: noise_forward, smooth_load, their ways back, own_by_group, and what noise refuses.
#ifdef CONFIG_FIELDS
    int noise;          // 1: the router's matrix has as many rows again, for the size of the noise
    double load_weight; // of the smooth load's loss
#elif !defined(NOISY_H)
#define NOISY_H
#include "importance.h" // cv_squared, is_spread

extern const Router noisy_router, noisy_load;

typedef struct Noisy {  // of one layer
    real *logits;       // (n,E)  with noise
    double *load_slope; // (groups of tokens, E)  derivative of the load's loss by each load
} Noisy;

int noisy_wanted(const Config *c) {
    return c->noise && c->select != HIERARCHICAL;
}

const char *noisy_refuses(const Config *c) {
    int E = c->experts, K = c->topk, two = c->select == HIERARCHICAL;
    if (c->score == SIGMOID || (c->select != TOP_K && !two) || c->history_decay > 0) {
        return "--noise needs --score softmax and --select topk or hierarchical, without --history-decay";
    }
    int few = K / c->routers < E;
    if (two) {
        few = K / c->group_topk < E / c->groups && c->group_topk < c->groups;
    }
    if (!few) {
        return "--noise needs fewer chosen than there are to choose from";
    }
    if (!two && (c->group_topk || c->bias_rate > 0)) {
        return "--noise does not know --group-topk and --bias-rate";
    }
    return NULL;
}

int noisy_outputs(const Config *c) {
    return 2 * c->experts;
}

// The router begins with zeros: all experts alike, and all noise of the same size.
void noisy_tensors(const Config *c, int l, Tensor *list, int *count) {
    (void)c;
    for (int i = 0; i < *count; i++) {
        if (list[i].layer == l && !strcmp(list[i].kind, "router")) {
            list[i].init = INIT_ZERO;
        }
    }
}

void noisy_allocate(Model *m, int l, int n) {
    Noisy *s = (Noisy *)own(m, 1, sizeof(Noisy));
    s->logits = own_reals(m, (size_t)n * m->config.experts);
    s->load_slope = own_by_group(m, n, m->config.load_weight > 0 ? m->config.experts : 0);
    *router_state(m, l, &noisy_router) = s;
}

// ---- noise

// Size of the noise: softplus of what the router says, and a little more, so that it is never zero.
BOTH double noise_size(real raw) {
    return fmax((double)raw, 0.0) + log1p(exp(-fabs((double)raw))) + 0.01;
}

BOTH double noise_slope(real raw) { // its derivative
    return 1 / (1 + exp(-(double)raw));
}

// The stream of this step's and this layer's noise, and the noise of logit j of token n. Other modes than
// training have none.
uint64_t noise_stream(const Model *m, int l) {
    return random_stream((uint64_t)m->config.seed, RANDOM_NOISE, (uint64_t)m->batch.step, (uint64_t)l);
}

double noise_of(const Model *m, uint64_t stream, int n, int j, int W) {
    uint64_t token = (uint64_t)m->batch.first_token * (uint64_t)m->config.subtokens + (uint64_t)n;
    return m->batch.mode == TRAIN_MODE ? random_normal(stream, token * (uint64_t)W + (uint64_t)j) : 0;
}

// noisy (N,W) = logits + noise * size (Shazeer et al., equation 4). logits (N,2W): W logits of each token, and
// behind them what noise_size makes the sizes of.
void noise_forward(const Model *m, int l, real *noisy, const real *logits, int N, int W) {
    uint64_t stream = noise_stream(m, l);
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++) {
        const real *row = logits + (size_t)n * 2 * W, *raw = row + W;
        for (int j = 0; j < W; j++) {
            noisy[(size_t)n * W + j] = row[j] + (real)(noise_of(m, stream, n, j, W) * noise_size(raw[j]));
        }
    }
}

// dlogits (N,2W) +=
void noise_backward(const Model *m, int l, real *dlogits, const real *dnoisy, const real *logits, int N, int W) {
    uint64_t stream = noise_stream(m, l);
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++) {
        const real *d = dnoisy + (size_t)n * W, *raw = logits + (size_t)n * 2 * W + W;
        real *drow = dlogits + (size_t)n * 2 * W;
        for (int j = 0; j < W; j++) {
            drow[j] += d[j];
            drow[W + j] += (real)((double)d[j] * noise_of(m, stream, n, j, W) * noise_slope(raw[j]));
        }
    }
}

// ---- the smooth load
//
// Were the noise of expert e drawn again, e would be among the K chosen with probability Phi((logit_e - t) /
// size_e). t is the noisy logit that e has to beat: the K-th highest of the others. The sum of this over tokens
// is the load of e.

int is_among(const int *list, int count, int value) {
    for (int i = 0; i < count; i++) {
        if (list[i] == value) {
            return 1;
        }
    }
    return 0;
}

// The best expert that is not chosen: what a chosen one has to beat. All others have to beat the last chosen one.
int best_unchosen(const int *chosen, const real *noisy, int E, int K) {
    int best = -1;
    for (int e = 0; e < E; e++) {
        if (!is_among(chosen, K, e) && (best < 0 || noisy[e] > noisy[best])) {
            best = e;
        }
    }
    return best;
}

// load (E) += of one token. chosen (K); noisy (E); logits (2E), see noise_forward: those of expert e are
// logits[e] and logits[e + W].
void smooth_load(double *load, const int *chosen, const real *noisy, const real *logits, int E, int K, int W) {
    int best = best_unchosen(chosen, noisy, E, K);
    for (int e = 0; e < E; e++) {
        int t = is_among(chosen, K, e) ? best : chosen[K - 1];
        double v = ((double)logits[e] - (double)noisy[t]) / noise_size(logits[e + W]);
        load[e] += 0.5 * (1 + erf(v * 0.7071067811865476));
    }
}

// Given dload (E) times scale: dlogits += by logit and size, dnoisy += by t.
void smooth_load_backward(real *dlogits, real *dnoisy, const double *dload, double scale, const int *chosen,
                          const real *noisy, const real *logits, int E, int K, int W) {
    int best = best_unchosen(chosen, noisy, E, K);
    for (int e = 0; e < E; e++) {
        int t = is_among(chosen, K, e) ? best : chosen[K - 1];
        double size = noise_size(logits[e + W]), v = ((double)logits[e] - (double)noisy[t]) / size;
        double slope = scale * dload[e] * exp(-0.5 * v * v) * 0.3989422804014327 / size;
        dlogits[e] += (real)slope;
        dlogits[e + W] -= (real)(slope * v * noise_slope(logits[e + W]));
        dnoisy[t] -= (real)slope;
    }
}

int noisy_load_wanted(const Config *c) {
    return c->load_weight > 0 && c->select != HIERARCHICAL;
}

const char *noisy_load_refuses(const Config *c) {
    if (!c->noise) {
        return "--load-weight needs --noise, and does not know --group-topk";
    }
    if (c->group == STEP) {
        return "--group step goes with one router and with losses of counts: --balance switch or width, "
               "--device-weight";
    }
    return NULL;
}

// 1 + CV^2 of the loads, for each group of tokens.
void noisy_load_forward(Model *m, int l, const real *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    const Noisy *s = (const Noisy *)*router_state(m, l, &noisy_router);
    int E = r->E, K = r->K;
    double weight = c->load_weight * r->group / r->N;
    for (int first = 0; first < r->N; first += r->group) {
        double *load = s->load_slope + (size_t)(first / r->group) * E;
        memset(load, 0, (size_t)E * sizeof(double));
        for (int n = first; n < first + r->group; n++) {
            const int *chosen = r->expert + (size_t)n * K;
            smooth_load(load, chosen, s->logits + (size_t)n * E, r->logits + (size_t)n * 2 * E, E, K, E);
        }
        if (is_spread(c)) {
            sum_over_ranks(load, E);
        }
        r->aux += weight * cv_squared(load, load, E, 0, weight); // load becomes its slope

        // Gradients are averaged over processes, but this is a derivative of a sum over them.
        for (int e = 0; is_spread(c) && e < E; e++) {
            load[e] *= ranks.size;
        }
    }
}

// ---- the router

void noisy_forward(Model *m, int l, const real *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    const Noisy *s = (const Noisy *)*router_state(m, l, &noisy_router);
    int N = r->N, E = r->E, K = r->K;
    matmul(r->logits, x, m->params.layer[l].router, N, router_width(c), 2 * E, SET);
    noise_forward(m, l, s->logits, r->logits, N, E);
    scores_forward(r->p, r->lse, s->logits, N, E, SOFTMAX);
    select_topk(r->expert, r->p, N, E, K);
    weights_forward(r->weight, r->p, r->expert, N, E, K, c->gate, c->scale);
}

void noisy_backward(Model *m, int l, real *dx, real *dweight, const real *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    const Noisy *s = (const Noisy *)*router_state(m, l, &noisy_router);
    int N = r->N, E = r->E, K = r->K, C = router_width(c);
    real *dp = scratch(m, (size_t)N * E), *dnoisy = scratch(m, (size_t)N * E);
    real *dlogits = scratch(m, (size_t)N * 2 * E);
    memset(dp, 0, (size_t)N * E * sizeof(real));
    memset(dlogits, 0, (size_t)N * 2 * E * sizeof(real));

    // From the weights and the losses of p to the noisy logits.
    weights_backward(dp, dweight, r->weight, r->p, r->expert, N, E, K, c->gate, c->scale);
    balance_backward(dp, r, c->score, m->batch.scale);
    scores_backward(dnoisy, dp, r->p, r->lse, N, E, SOFTMAX, c->z_weight * m->batch.scale / N);

    // From the smooth load to the noisy logits, and to those without noise.
    for (int n = 0; c->load_weight > 0 && n < N; n++) {
        const double *slope = s->load_slope + (size_t)(n / r->group) * E;
        size_t row = (size_t)n * E;
        smooth_load_backward(dlogits + 2 * row, dnoisy + row, slope, m->batch.scale, r->expert + (size_t)n * K,
                             s->logits + row, r->logits + 2 * row, E, K, E);
    }

    noise_backward(m, l, dlogits, dnoisy, r->logits, N, E);
    matmul_dw(m->grads.layer[l].router, dlogits, x, N, C, 2 * E);
    matmul_dx(dx, dlogits, m->params.layer[l].router, N, C, 2 * E, ADD);
}

const Option noisy_options[] = {
    INTEGER("noise", noise, "0", 0, 1, MODEL, "Router: scores",
            "1: in training the logits get Gaussian noise, whose size the router learns for each token"),
    NUMBER("load-weight", load_weight, "0", 0, 1e6, TRAIN, "Router: balance",
           "weight of the smooth load's loss; needs --noise"),
};

const Recipe noisy_recipes[] = {
    {"shazeer", 2017, 2.5, "noisy top-4; losses on importance and on a smooth count of the load",
     "--topk 4 --ffn 128 --activation relu --noise 1 --balance cv2 --aux-weight 0.1 --load-weight 0.1",
     "Shazeer et al., Outrageously Large Neural Networks"},
};

const Router noisy_router = {
    .place = CHOICE,
    .wanted = noisy_wanted,
    .refuses = noisy_refuses,
    .outputs = noisy_outputs,
    .tensors = noisy_tensors,
    .allocate = noisy_allocate,
    .forward = noisy_forward,
    .backward = noisy_backward,
    .options = noisy_options,
    .option_count = COUNT(noisy_options),
    .recipes = noisy_recipes,
    .recipe_count = COUNT(noisy_recipes),
};

const Router noisy_load = {
    .place = LOSS, .wanted = noisy_load_wanted, .refuses = noisy_load_refuses, .forward = noisy_load_forward};

#endif
