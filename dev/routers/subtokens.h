// Sub-tokens: each token is split into h narrower ones, which are routed apart, and whose answers are merged again.
// So one token reaches more experts for the same work. Wu et al. 2024, Multi-Head Mixture-of-Experts.
// The recipe: mh-moe. Gives: subtokens_forward, subtokens_backward, subtokens_of. They stand around moe_forward and
// moe_backward of train_moe.c. Needs: moe_below of recurrent.h.
#ifdef CONFIG_FIELDS
    int subtokens; // h, parts of a token; 1: tokens are routed as they are
#elif !defined(SUBTOKENS_H)
#define SUBTOKENS_H

extern const Router subtokens_router;

typedef struct Subtokens {    // of one layer; n = N*h sub-tokens of C/h numbers, which are (N,C), too
    real *parts, *answers;    // (n,C/h)  what the experts read, and what they say
    real *dparts, *danswers;  // (n,C/h)  gradients; all layers share these arrays
} Subtokens;

int subtokens_wanted(const Config *c) {
    return c->subtokens > 1;
}

const char *subtokens_refuse(const Config *c) {
    if (c->dim % c->subtokens || c->recurrent) {
        return "--subtokens must divide --dim, and goes without --recurrent";
    }
    return NULL;
}

void subtokens_tensors(const Config *c, int l, Tensor *list, int *count) {
    if (l >= 0) {
        add_tensor(list, count, l, "split", NO_FIELD, 2, 1, c->dim, c->dim, INIT_FAN_IN);
        add_tensor(list, count, l, "merge", NO_FIELD, 2, 1, c->dim, c->dim, INIT_FAN_IN);
    }
}

// All this lives longer than scratch memory, which moe_forward and moe_backward take back when they begin.
void subtokens_allocate(Model *m, int l, int n) {
    Subtokens *s = (Subtokens *)own(m, 1, sizeof(Subtokens));
    size_t size = (size_t)n * m->experts.C;
    int below = moe_below(&m->config, l);
    s->parts = own_reals(m, size);
    s->answers = own_reals(m, size);
    if (below >= 0) {
        const Subtokens *first = (const Subtokens *)*router_state(m, below, &subtokens_router);
        s->dparts = first->dparts;
        s->danswers = first->danswers;
    } else if (m->memory[GRADS]) {
        s->dparts = own_reals(m, size);
        s->danswers = own_reals(m, size);
    }
    *router_state(m, l, &subtokens_router) = s;
}

// The sub-tokens of the last forward pass.
const real *subtokens_of(Model *m, int l) {
    return ((const Subtokens *)*router_state(m, l, &subtokens_router))->parts;
}

// out (N,C) += merge * experts(split * x)
void subtokens_forward(Model *m, int l, real *out, const real *x) {
    Subtokens *s = (Subtokens *)*router_state(m, l, &subtokens_router);
    int N = m->batch.B * m->batch.T, C = m->config.dim, h = m->config.subtokens;

    // A matrix mixes a token's numbers; then each C/h of them are a token of their own.
    matmul(s->parts, x, layer_tensor(m, l, "split", WEIGHTS), N, C, C, SET);
    memset(s->answers, 0, (size_t)N * C * sizeof(real));
    moe_forward(m, l, s->answers, s->parts, N * h, m->batch.T * h);
    matmul(out, s->answers, layer_tensor(m, l, "merge", WEIGHTS), N, C, C, ADD);
}

// dx (N,C) +=
void subtokens_backward(Model *m, int l, real *dx, const real *dout, const real *x) {
    Subtokens *s = (Subtokens *)*router_state(m, l, &subtokens_router);
    int N = m->batch.B * m->batch.T, C = m->config.dim;
    matmul_dx(s->danswers, dout, layer_tensor(m, l, "merge", WEIGHTS), N, C, C, SET);
    matmul_dw(layer_tensor(m, l, "merge", GRADS), dout, s->answers, N, C, C);
    memset(s->dparts, 0, (size_t)N * C * sizeof(real));
    moe_backward(m, l, s->dparts, s->danswers, s->parts);
    matmul_dx(dx, s->dparts, layer_tensor(m, l, "split", WEIGHTS), N, C, C, ADD);
    matmul_dw(layer_tensor(m, l, "split", GRADS), s->dparts, x, N, C, C);
}

const Option subtokens_options[] = {
    INTEGER("subtokens", subtokens, "1", 1, 256, MODEL, "Router: scores",
            "a token is split into so many, which are routed apart"),
};

const Recipe subtokens_recipes[] = {
    {"mh-moe", 2024, 2.5, "each token is split into four, which are routed apart and merged again", "--subtokens 4",
     "Wu et al., Multi-Head Mixture-of-Experts"},
};

const Router subtokens_router = {
    .place = ELSEWHERE,
    .wanted = subtokens_wanted,
    .refuses = subtokens_refuse,
    .tensors = subtokens_tensors,
    .allocate = subtokens_allocate,
    .options = subtokens_options,
    .option_count = COUNT(subtokens_options),
    .recipes = subtokens_recipes,
    .recipe_count = COUNT(subtokens_recipes),
};

#endif
