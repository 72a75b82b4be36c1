// Jitter: in training the router's input is multiplied by random numbers near 1, so that tokens near a border between two
// experts see both. Fedus et al. 2021, Switch Transformers, appendix C. The recipe: switch.
#ifdef CONFIG_FIELDS
    double jitter; // the factors lie between 1 - jitter and 1 + jitter
#elif !defined(JITTER_H)
#define JITTER_H

extern const Router jitter_router;

int jitter_wanted(const Config *c) {
    return c->jitter > 0;
}

void jitter_allocate(Model *m, int l, int n) {
    *router_state(m, l, &jitter_router) = own_reals(m, (size_t)n * m->experts.C);
}

// to (n,C) = from times the factors of this step, this layer, and these tokens' places in the step's whole batch.
void apply_jitter(const Model *m, int l, real *to, const real *from) {
    const Config *c = &m->config;
    size_t size = (size_t)m->acts.layer[l].route.N * m->experts.C;
    uint64_t stream = random_stream((uint64_t)c->seed, RANDOM_JITTER, (uint64_t)m->batch.step, (uint64_t)l);
    uint64_t first = (uint64_t)m->batch.first_token * (uint64_t)c->dim;
#pragma omp parallel for if (size > 1000)
    for (size_t i = 0; i < size; i++) {
        to[i] = from[i] * (real)(1 + c->jitter * (2 * random_uniform(stream, first + i) - 1));
    }
}

void jitter_forward(Model *m, int l, const real *x) {
    const Router *next = next_router(m, &jitter_router);
    if (m->batch.mode != TRAIN_MODE) {
        next->forward(m, l, x);
        return;
    }
    real *jittered = (real *)*router_state(m, l, &jitter_router);
    apply_jitter(m, l, jittered, x);
    next->forward(m, l, jittered);
}

void jitter_backward(Model *m, int l, real *dx, real *dweight, const real *x) {
    const Router *next = next_router(m, &jitter_router);
    if (m->batch.mode != TRAIN_MODE) {
        next->backward(m, l, dx, dweight, x);
        return;
    }
    const real *jittered = (const real *)*router_state(m, l, &jitter_router);
    size_t size = (size_t)m->acts.layer[l].route.N * m->experts.C;
    real *djittered = scratch(m, size);
    memset(djittered, 0, size * sizeof(real));
    next->backward(m, l, djittered, dweight, jittered);

    // The derivative of x * factor by x is the factor.
    apply_jitter(m, l, djittered, djittered);
    for (size_t i = 0; i < size; i++) {
        dx[i] += djittered[i];
    }
}

const Option jitter_options[] = {
    NUMBER("jitter", jitter, "0", 0, 0.999, TRAIN, "Router: scores",
           "in training the router's input is multiplied by 1 +- this"),
};

const Recipe jitter_recipes[] = {
    {"switch", 2021, 2.5, "top-1, weight is the probability, full experts pass tokens by; every other layer",
     "--topk 1 --ffn 512 --activation relu --gate probability --group sequence --capacity-factor 1.25 --jitter 0.01 "
     "--moe-every 2 --init-scheme truncated",
     "Fedus, Zoph, Shazeer, Switch Transformers"},
};

const Router jitter_router = {
    .place = INPUT,
    .wanted = jitter_wanted,
    .allocate = jitter_allocate,
    .forward = jitter_forward,
    .backward = jitter_backward,
    .options = jitter_options,
    .option_count = COUNT(jitter_options),
    .recipes = jitter_recipes,
    .recipe_count = COUNT(jitter_recipes),
};

#endif
