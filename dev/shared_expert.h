// Shared experts with a gate (--shared-gate), and widths of their own for them and for dense layers (--shared-ffn, --dense-ffn).
// Gives: shared_gate_forward, shared_activation_backward. Needs: Model, the layers and the mixture of train_moe.c, which includes it.
//
// With a gate each token decides how much of the shared experts' answer it takes:
//     out += sigmoid(x . w) * (act W_out^T)
// Qwen team 2024, Qwen1.5-MoE; the class Qwen2Moe of transformers. The gate is a number of a token, so it may as well multiply
// act, and the answer itself is not needed on the way back: as an expert's weight in activation_backward().
#ifdef CONFIG_FIELDS
    int shared_gate;
    int shared_ffn; // width of the shared experts together; 0: shared * ffn
    int dense_ffn;  // width of a dense layer; 0: (topk + shared) * ffn
#elif !defined(SHARED_EXPERT_H)
#define SHARED_EXPERT_H

// The gates of layer l's tokens, in scratch memory: (N), sigmoid(x . w). As with routers, --precision bf16 does not hold here.
real *shared_gates(Model *m, int l) {
    int N = m->batch.B * m->batch.T;
    real *gate = scratch(m, N);
    multiply_in(PRODUCTS_FP32);
    matmul(gate, m->acts.layer[l].h2, m->params.layer[l].shared_router, N, m->config.dim, 1, SET);
    multiply_in(m->config.precision);
    for (int n = 0; n < N; n++) {
        gate[n] = (real)(1 / (1 + exp(-(double)gate[n])));
    }
    return gate;
}

// act (N,F) of the shared experts, times the gate of each token; nothing where layer l has none.
void shared_gate_forward(Model *m, int l, real *act, int N, int F) {
    const real *gate = m->params.layer[l].shared_router ? shared_gates(m, l) : NULL;
#pragma omp parallel for if (is_worth_threads(N, F))
    for (int n = 0; n < (gate ? N : 0); n++) {
        for (int i = 0; i < F; i++) {
            act[(size_t)n * F + i] *= gate[n];
        }
    }
}

// activation_backward() of a layer that every token passes; and through the gate, where it has one, to its weights and to
// dx (N,C), both of which are added to.
void shared_activation_backward(Model *m, int l, real *dx, real *dhidden, real *dact, int N, int F, int kind) {
    const LayerParams *w = &m->params.layer[l], *dw = &m->grads.layer[l];
    const LayerActs *a = &m->acts.layer[l];
    if (!w->shared_router) {
        activation_backward(dhidden, NULL, dact, a->dense_hidden, NULL, NULL, N, F, kind);
        return;
    }
    const real *gate = shared_gates(m, l);
    real *dlogit = scratch(m, N);
    int *same = (int *)allocate(N, sizeof(int)); // row n has the weight of token n
    for (int n = 0; n < N; n++) {
        same[n] = n;
    }
    activation_backward(dhidden, dlogit, dact, a->dense_hidden, gate, same, N, F, kind);
    free(same);
    for (int n = 0; n < N; n++) {
        dlogit[n] *= gate[n] * (1 - gate[n]); // the derivative of a sigmoid
    }
    multiply_in(PRODUCTS_FP32);
    matmul_backward(dx, dw->shared_router, dlogit, a->h2, w->shared_router, N, m->config.dim, 1, ADD);
    multiply_in(m->config.precision);
}

#endif
