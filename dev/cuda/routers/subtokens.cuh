// Sub-tokens on a GPU: see dev/routers/subtokens.h.
// Gives: subtokens_kernels, subtokens_forward, subtokens_backward, subtokens_of. They stand around
// moe_forward and moe_backward of train_moe.cu. Needs: these, combine and rows_of_tokens, which come later in
// that file; m->router_in.
#ifndef CUDA_SUBTOKENS_CUH
#define CUDA_SUBTOKENS_CUH
#include "pieces.cuh"

void moe_forward(Model *m, int l, const floatX *x, const float *x32, int N, int T);
void moe_backward(Model *m, int l, float *dx, const floatX *dout, const floatX *x, const float *x32);
const int *rows_of_tokens(const Model *m, int l);
template <class Out> void combine(Out *out, Sum from, int N, int C);

struct Subtokens {               // of one layer; n = N*h sub-tokens of C/h numbers, which are (N,C), too
    floatX *parts, *answers;     // (n,C/h)  what the experts read, and what they say
    float *dparts;               // (n,C/h)  gradients; all layers share these arrays
    floatX *danswers;            // (n,C/h)
    const floatX *split, *merge; // (C,C)  the two matrices, rounded
};

// All this lives longer than scratch memory, which moe_forward and moe_backward take back when they begin.
void subtokens_allocate(Model *m, int l, int n) {
    Subtokens *s = (Subtokens *)own_host(m, 1, sizeof(Subtokens));
    size_t size = (size_t)n * m->experts.C;
    int below = moe_below(&m->config, l);
    s->parts = own_low(m, size);
    s->answers = own_low(m, size);
    s->split = low_of(m, layer_tensor(m, l, "split", WEIGHTS));
    s->merge = low_of(m, layer_tensor(m, l, "merge", WEIGHTS));
    if (below >= 0) {
        const Subtokens *first = (const Subtokens *)*router_state(m, below, &subtokens_router);
        s->dparts = first->dparts;
        s->danswers = first->danswers;
    } else if (m->memory[GRADS]) {
        s->dparts = own_floats(m, size);
        s->danswers = own_low(m, size);
    }
    *router_state(m, l, &subtokens_router) = s;
}

// The sub-tokens of the last forward pass.
const floatX *subtokens_of(Model *m, int l) {
    return ((const Subtokens *)*router_state(m, l, &subtokens_router))->parts;
}

// m->branch (N,C) = merge * experts(split * x), with x the layer's norm; += where a dense part wrote it
// before.
void subtokens_forward(Model *m, int l) {
    Subtokens *s = (Subtokens *)*router_state(m, l, &subtokens_router);
    int N = m->batch.B * m->batch.T, C = m->config.dim, h = m->config.subtokens, K = m->acts.layer[l].route.K;

    // A matrix mixes a token's numbers; then each C/h of them are a token of their own.
    gpu::matmul(s->parts, m->layers[l].h2, s->split, N, C, C, SET);
    to_high(m->router_in, s->parts, (size_t)N * C);
    gpu::moe_forward(m, l, s->parts, m->router_in, N * h, m->batch.T * h);
    combine(s->answers, Sum{NULL, NULL, m->rows, rows_of_tokens(m, l), K}, N * h, C / h);
    gpu::matmul(m->branch, s->answers, s->merge, N, C, C, m->params.layer[l].dense_in ? ADD : SET);
}

// dx (N,C) = the gradient by the layer's norm, given dout (N,C); += where a dense part wrote it before.
void subtokens_backward(Model *m, int l, float *dx, const floatX *dout) {
    Subtokens *s = (Subtokens *)*router_state(m, l, &subtokens_router);
    int N = m->batch.B * m->batch.T, C = m->config.dim;
    gpu::matmul_dx(s->danswers, dout, s->merge, N, C, C, SET);
    matmul_dw(layer_tensor(m, l, "merge", GRADS), dout, s->answers, N, C, C);
    to_high(m->router_in, s->parts, (size_t)N * C);
    gpu::moe_backward(m, l, s->dparts, s->danswers, s->parts, m->router_in);

    const floatX *h2 = m->layers[l].h2;
    floatX *dparts = s->danswers; // which are no longer needed
    to_low(dparts, s->dparts, (size_t)N * C);
    gpu::matmul_dx(dx, dparts, s->split, N, C, C, m->params.layer[l].dense_in ? ADD : SET);
    matmul_dw(layer_tensor(m, l, "split", GRADS), dparts, h2, N, C, C);
}

const Kernels subtokens_kernels = {&subtokens_router, subtokens_allocate, NULL, NULL, NULL};

#endif
