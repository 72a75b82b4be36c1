// A bias of queries, keys and values (--qkv-bias): a learned vector that is added to their product.
// Gives: qkv_bias_forward, qkv_bias_backward. Needs: Model and the layers of train_moe.c, which includes it.
//
// Qwen team 2024, Qwen2 Technical Report, section 2.2.1: biases in this product alone. The vector begins at 0 and does not
// decay, as all vectors.
#ifdef CONFIG_FIELDS
    int qkv_bias;
#elif !defined(QKV_H)
#define QKV_H

// qkv (N,(H+2KV)*D) of layer l += its bias, if it has one.
void qkv_bias_forward(Model *m, int l, real *qkv) {
    const Config *c = &m->config;
    const real *bias = m->params.layer[l].qkv_bias;
    int N = m->batch.B * m->batch.T, Q = (c->heads + 2 * c->kv_heads) * head_width(c);
    if (!bias) {
        return;
    }
#pragma omp parallel for if (is_worth_threads(N, Q))
    for (int n = 0; n < N; n++) {
        for (int i = 0; i < Q; i++) {
            qkv[(size_t)n * Q + i] += bias[i];
        }
    }
}

// The gradient of the bias, from dqkv (N,(H+2KV)*D): the sum of its rows. A task owns some of the columns, so that the bits
// do not depend on the number of threads.
void qkv_bias_backward(Model *m, int l, const real *dqkv) {
    const Config *c = &m->config;
    real *dbias = m->grads.layer[l].qkv_bias;
    int N = m->batch.B * m->batch.T, Q = (c->heads + 2 * c->kv_heads) * head_width(c);
    if (!dbias) { // there is none, or it is frozen
        return;
    }
#pragma omp parallel for if (is_worth_threads(N, Q))
    for (int first = 0; first < Q; first += 32) {
        int end = min_int(Q, first + 32);
        for (int n = 0; n < N; n++) {
            for (int i = first; i < end; i++) {
                dbias[i] += dqkv[(size_t)n * Q + i];
            }
        }
    }
}

#endif
