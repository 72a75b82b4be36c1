// Recurrent router: it reads the state of a gated recurrent unit (GRU) that runs through the layers, so the router
// of a layer knows what the routers below saw. Qiu et al. 2024, Layerwise Recurrent Router for Mixture-of-Experts.
// The recipe: rmoe. Gives: recurrent_router, moe_below.
#ifdef CONFIG_FIELDS
    int recurrent; // R, the width of the state; 0: the router reads the layer's input
#elif !defined(RECURRENT_H)
#define RECURRENT_H

extern const Router recurrent_router;

typedef struct Recurrent { // of one layer
    real *projected;       // (n,R)  the layer's input, projected: what the unit reads
    real *keep;            // (n,4R) what gru_forward leaves for gru_backward
    real *state;           // (n,R)  the unit's state, which the router reads
    real *dstate;          // (n,R)  gradient by the state; all layers share this array
} Recurrent;

typedef struct GruParams { // one unit for all layers
    real *x, *h;           // (3R,R)
    real *bx, *bh;         // (3R)
} GruParams;

int recurrent_wanted(const Config *c) {
    return c->recurrent > 0;
}

// The next layer with experts below layer l; -1: there is none.
int moe_below(const Config *c, int l) {
    do {
        l--;
    } while (l >= 0 && !is_moe(c, l));
    return l;
}

void recurrent_tensors(const Config *c, int l, Tensor *list, int *count) {
    int R = c->recurrent;
    if (l >= 0) {
        add_tensor(list, count, l, "project", NO_FIELD, 2, 1, R, c->dim, INIT_NORMAL);
        return;
    }
    add_tensor(list, count, l, "gru_x", NO_FIELD, 2, 1, 3 * R, R, INIT_FAN_IN);
    add_tensor(list, count, l, "gru_h", NO_FIELD, 2, 1, 3 * R, R, INIT_FAN_IN);
    add_tensor(list, count, l, "gru_bx", NO_FIELD, 1, 1, 1, 3 * R, INIT_ZERO);
    add_tensor(list, count, l, "gru_bh", NO_FIELD, 1, 1, 1, 3 * R, INIT_ZERO);
}

// what: WEIGHTS or GRADS
GruParams gru_params(const Model *m, int what) {
    GruParams p = {
        layer_tensor(m, -1, "gru_x", what),
        layer_tensor(m, -1, "gru_h", what),
        layer_tensor(m, -1, "gru_bx", what),
        layer_tensor(m, -1, "gru_bh", what),
    };
    return p;
}

void recurrent_allocate(Model *m, int l, int n) {
    int R = m->config.recurrent, below = moe_below(&m->config, l);
    Recurrent *s = (Recurrent *)own(m, 1, sizeof(Recurrent));
    s->projected = own_reals(m, (size_t)n * R);
    s->keep = own_reals(m, (size_t)n * 4 * R);
    s->state = own_reals(m, (size_t)n * R);
    if (below >= 0) {
        s->dstate = ((Recurrent *)*router_state(m, below, &recurrent_router))->dstate;
    } else if (m->memory[GRADS]) {
        s->dstate = own_reals(m, (size_t)n * R);
    }
    *router_state(m, l, &recurrent_router) = s;
}

// The state of the layer with experts below l; NULL: there is none, and the unit begins with zeros.
const real *state_below(Model *m, int l) {
    int below = moe_below(&m->config, l);
    return below < 0 ? NULL : ((Recurrent *)*router_state(m, below, &recurrent_router))->state;
}

// One step of the unit (Cho et al. 2014, in PyTorch's form). With a = x W_x^T + b_x and b = h W_h^T + b_h, each
// three blocks of R numbers,
//   r = sigmoid(a_0 + b_0)   z = sigmoid(a_1 + b_1)   fresh = tanh(a_2 + r * b_2)   next = (1 - z) * fresh + z * h
// x, h, next (N,R); h NULL: zeros. keep (N,4R) becomes r, z, fresh and b_2.
void gru_forward(Model *m, real *next, real *keep, const real *x, const real *h, int N, int R) {
    GruParams w = gru_params(m, WEIGHTS);
    real *a = scratch(m, (size_t)N * 3 * R), *b = scratch(m, (size_t)N * 3 * R);
    matmul(a, x, w.x, N, R, 3 * R, SET);
    if (h) {
        matmul(b, h, w.h, N, R, 3 * R, SET);
    } else {
        memset(b, 0, (size_t)N * 3 * R * sizeof(real));
    }
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++) {
        const real *an = a + (size_t)n * 3 * R, *bn = b + (size_t)n * 3 * R;
        real *kept = keep + (size_t)n * 4 * R;
        for (int j0 = 0; j0 < R; j0++) {
            int j1 = R + j0, j2 = 2 * R + j0; // the same number in the second and in the third block
            double r = 1 / (1 + exp(-(double)(an[j0] + w.bx[j0] + bn[j0] + w.bh[j0])));
            double z = 1 / (1 + exp(-(double)(an[j1] + w.bx[j1] + bn[j1] + w.bh[j1])));
            double hidden = (double)(bn[j2] + w.bh[j2]), fresh = tanh((double)(an[j2] + w.bx[j2]) + r * hidden);
            double before = h ? (double)h[(size_t)n * R + j0] : 0;
            next[(size_t)n * R + j0] = (real)((1 - z) * fresh + z * before);
            kept[j0] = (real)r;
            kept[j1] = (real)z;
            kept[j2] = (real)fresh;
            kept[3 * R + j0] = (real)hidden;
        }
    }
}

// dstate (N,R) comes in as the gradient by next, and goes out as that by h (where there is an h). Writes dx
// (N,R), and adds to the gradients of the unit's weights.
void gru_backward(Model *m, real *dx, real *dstate, const real *keep, const real *x, const real *h, int N, int R) {
    GruParams w = gru_params(m, WEIGHTS), dw = gru_params(m, GRADS);
    real *da = scratch(m, (size_t)N * 3 * R), *db = scratch(m, (size_t)N * 3 * R);
    for (int n = 0; n < N; n++) {
        const real *kept = keep + (size_t)n * 4 * R;
        real *an = da + (size_t)n * 3 * R, *bn = db + (size_t)n * 3 * R, *d = dstate + (size_t)n * R;
        for (int j = 0; j < R; j++) {
            real r = kept[j], z = kept[R + j], fresh = kept[2 * R + j], hidden = kept[3 * R + j];
            real before = h ? h[(size_t)n * R + j] : 0, dfresh = d[j] * (1 - z) * (1 - fresh * fresh);
            an[j] = bn[j] = dfresh * hidden * r * (1 - r);
            an[R + j] = bn[R + j] = d[j] * (before - fresh) * z * (1 - z);
            an[2 * R + j] = dfresh;
            bn[2 * R + j] = dfresh * r;
            d[j] *= z;
        }
        for (int j = 0; j < 3 * R; j++) {
            dw.bx[j] += an[j];
            dw.bh[j] += bn[j];
        }
    }
    matmul_dx(dx, da, w.x, N, R, 3 * R, SET);
    matmul_dw(dw.x, da, x, N, R, 3 * R);
    if (h) {
        matmul_dx(dstate, db, w.h, N, R, 3 * R, ADD);
        matmul_dw(dw.h, db, h, N, R, 3 * R);
    }
}

void recurrent_forward(Model *m, int l, const real *x) {
    Recurrent *s = (Recurrent *)*router_state(m, l, &recurrent_router);
    int N = m->acts.layer[l].route.N, R = m->config.recurrent;
    matmul(s->projected, x, layer_tensor(m, l, "project", WEIGHTS), N, m->config.dim, R, SET);
    gru_forward(m, s->state, s->keep, s->projected, state_below(m, l), N, R);
    next_router(m, &recurrent_router)->forward(m, l, s->state);
}

void recurrent_backward(Model *m, int l, real *dx, real *dweight, const real *x) {
    const Config *c = &m->config;
    Recurrent *s = (Recurrent *)*router_state(m, l, &recurrent_router);
    int N = m->acts.layer[l].route.N, R = c->recurrent, above = l + 1;
    while (above < c->layers && !is_moe(c, above)) {
        above++;
    }

    // The state was read by the unit of the layer above, whose gradient is in dstate already, and by this layer's
    // router.
    if (above == c->layers) {
        memset(s->dstate, 0, (size_t)N * R * sizeof(real));
    }
    next_router(m, &recurrent_router)->backward(m, l, s->dstate, dweight, s->state);

    // From the state to what the unit read: the projected input, and the state of the layer below.
    real *dprojected = scratch(m, (size_t)N * R);
    gru_backward(m, dprojected, s->dstate, s->keep, s->projected, state_below(m, l), N, R);
    matmul_dw(layer_tensor(m, l, "project", GRADS), dprojected, x, N, c->dim, R);
    matmul_dx(dx, dprojected, layer_tensor(m, l, "project", WEIGHTS), N, c->dim, R, ADD);
}

const Option recurrent_options[] = {
    INTEGER("recurrent", recurrent, "0", 0, 4096, MODEL, "Router: scores",
            "the router reads a GRU of this width that runs through the layers; 0: none"),
};

const Recipe recurrent_recipes[] = {
    {"rmoe", 2024, 2.5, "the router reads a GRU that runs through the layers, so it knows what was chosen below",
     "--recurrent 64", "Qiu et al., Layerwise Recurrent Router for Mixture-of-Experts"},
};

const Router recurrent_router = {
    .place = INPUT,
    .wanted = recurrent_wanted,
    .tensors = recurrent_tensors,
    .allocate = recurrent_allocate,
    .forward = recurrent_forward,
    .backward = recurrent_backward,
    .options = recurrent_options,
    .option_count = COUNT(recurrent_options),
    .recipes = recurrent_recipes,
    .recipe_count = COUNT(recurrent_recipes),
};

#endif
