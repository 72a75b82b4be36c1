// The recurrent router on a GPU: see dev/routers/recurrent.h.
// Gives: recurrent_kernels. Needs: pieces.cuh. The arrays of ::Recurrent are the device's here.
#ifndef CUDA_RECURRENT_CUH
#define CUDA_RECURRENT_CUH
#include "pieces.cuh"

void recurrent_allocate(Model *m, int l, int n) {
    int R = m->config.recurrent, below = moe_below(&m->config, l);
    size_t size = (size_t)n * R, sums = (size_t)div_up(n, CHUNK) * 3 * R;
    Recurrent *s = (Recurrent *)own_host(m, 1, sizeof(Recurrent));
    s->projected = own_floats(m, size);
    s->keep = own_floats(m, 4 * size);
    s->state = own_floats(m, size);
    if (below >= 0) {
        s->dstate = ((Recurrent *)*router_state(m, below, &recurrent_router))->dstate;
    } else if (m->memory[GRADS]) {
        s->dstate = own_floats(m, size);
    }
    *router_state(m, l, &recurrent_router) = s;
    part_needs(m, 6 * size * sizeof(float), 7 * size * sizeof(float) + sums * sizeof(double));
}

// a, b (N,3R): the two products; h NULL: there is no b
__global__ void gru_forward_kernel(float *next, float *keep, const float *a, const float *b, const float *h,
                                   GruParams w, int N, int R) {
    size_t i = thread_of_grid();
    if (i >= (size_t)N * R) {
        return;
    }
    int j0 = (int)(i % R), j1 = R + j0, j2 = R + j1; // the same number in each of the three blocks
    const float *an = a + i / R * 3 * R, *bn = b + i / R * 3 * R;
    float *kept = keep + i / R * 4 * R;
    double r = 1 / (1 + exp(-(double)(an[j0] + w.bx[j0] + (h ? bn[j0] : 0) + w.bh[j0])));
    double z = 1 / (1 + exp(-(double)(an[j1] + w.bx[j1] + (h ? bn[j1] : 0) + w.bh[j1])));
    double hidden = (double)((h ? bn[j2] : 0) + w.bh[j2]);
    double fresh = tanh((double)(an[j2] + w.bx[j2]) + r * hidden);
    next[i] = (float)((1 - z) * fresh + (h ? z * (double)h[i] : 0));
    kept[j0] = (float)r;
    kept[j1] = (float)z;
    kept[j2] = (float)fresh;
    kept[R + j2] = (float)hidden;
}

// x, h, next (N,R); h NULL: zeros. keep (N,4R)
void gru_forward(Model *m, float *next, float *keep, const float *x, const float *h, int N, int R) {
    GruParams w = gru_params(m, WEIGHTS);
    float *a = scratch(m, (size_t)N * 3 * R), *b = scratch(m, (size_t)N * 3 * R);
    gpu::matmul(a, x, w.x, N, R, 3 * R, SET);
    if (h) {
        gpu::matmul(b, h, w.h, N, R, 3 * R, SET);
    }
    gru_forward_kernel<<<blocks((size_t)N * R), THREADS, 0, stream>>>(next, keep, a, b, h, w, N, R);
    CHECK(cudaGetLastError());
}

// da, db (N,3R): the gradients by the two products
__global__ void gru_backward_kernel(float *da, float *db, float *dstate, const float *keep, const float *h,
                                    int N, int R) {
    size_t i = thread_of_grid();
    if (i >= (size_t)N * R) {
        return;
    }
    int j = (int)(i % R);
    const float *kept = keep + i / R * 4 * R;
    float *an = da + i / R * 3 * R, *bn = db + i / R * 3 * R;
    float r = kept[j], z = kept[R + j], fresh = kept[2 * R + j], hidden = kept[3 * R + j], d = dstate[i];
    float dfresh = d * (1 - z) * (1 - fresh * fresh), before = h ? h[i] : 0;
    an[j] = bn[j] = dfresh * hidden * r * (1 - r);
    an[R + j] = bn[R + j] = d * (before - fresh) * z * (1 - z);
    an[2 * R + j] = dfresh;
    bn[2 * R + j] = dfresh * r;
    dstate[i] = d * z;
}

// dstate (N,R) comes in as the gradient by next, and goes out as that by h (where there is an h). Writes dx
// (N,R), and adds to the gradients of the unit's weights.
void gru_backward(Model *m, float *dx, float *dstate, const float *keep, const float *x, const float *h,
                  int N, int R) {
    GruParams w = gru_params(m, WEIGHTS), dw = gru_params(m, GRADS);
    float *da = scratch(m, (size_t)N * 3 * R), *db = scratch(m, (size_t)N * 3 * R);
    double *part = scratch_doubles(m, (size_t)div_up(N, CHUNK) * 3 * R);
    gru_backward_kernel<<<blocks((size_t)N * R), THREADS, 0, stream>>>(da, db, dstate, keep, h, N, R);
    CHECK(cudaGetLastError());
    column_sums(dw.bx, Entries<float>{da, 3 * R}, 1, N, 3 * R, 1, part);
    column_sums(dw.bh, Entries<float>{db, 3 * R}, 1, N, 3 * R, 1, part);
    gpu::matmul_dx(dx, da, w.x, N, R, 3 * R, SET);
    matmul_dw(dw.x, da, x, N, R, 3 * R);
    if (h) {
        gpu::matmul_dx(dstate, db, w.h, N, R, 3 * R, ADD);
        matmul_dw(dw.h, db, h, N, R, 3 * R);
    }
}

void recurrent_forward(Model *m, int l, const float *x) {
    Recurrent *s = (Recurrent *)*router_state(m, l, &recurrent_router);
    int N = m->acts.layer[l].route.N, R = m->config.recurrent;
    gpu::matmul(s->projected, x, layer_tensor(m, l, "project", WEIGHTS), N, m->config.dim, R, SET);
    gru_forward(m, s->state, s->keep, s->projected, state_below(m, l), N, R);
    kernels_of(next_router(m, &recurrent_router))->forward(m, l, s->state);
}

void recurrent_backward(Model *m, int l, float *dx, float *dweight, const float *x) {
    const Config *c = &m->config;
    Recurrent *s = (Recurrent *)*router_state(m, l, &recurrent_router);
    int N = m->acts.layer[l].route.N, R = c->recurrent, above = l + 1;
    while (above < c->layers && !is_moe(c, above)) {
        above++;
    }

    // The state was read by the unit of the layer above, whose gradient is in dstate already, and by this
    // layer's router.
    if (above == c->layers) {
        zero(s->dstate, (size_t)N * R * sizeof(float));
    }
    kernels_of(next_router(m, &recurrent_router))->backward(m, l, s->dstate, dweight, s->state);

    // From the state to what the unit read: the projected input, and the state of the layer below.
    float *dprojected = scratch(m, (size_t)N * R);
    gru_backward(m, dprojected, s->dstate, s->keep, s->projected, state_below(m, l), N, R);
    matmul_dw(layer_tensor(m, l, "project", GRADS), dprojected, x, N, c->dim, R);
    gpu::matmul_dx(dx, dprojected, layer_tensor(m, l, "project", WEIGHTS), N, c->dim, R, ADD);
}

const Kernels recurrent_kernels = {&recurrent_router, recurrent_allocate, recurrent_forward,
                                   recurrent_backward, NULL};

#endif
