// Queries and keys with a norm of their own (--qk-norm): each head's query and key is RMS-normalised before it is turned.
// Gives: qk_norm_forward, qk_norm_backward. Needs: Model and the layers of train_moe.c, which includes it.
//
// A score is q . k / sqrt(D), and nothing limits how large q and k grow. With a norm only their directions count, times
// two learned vectors; so the rate of learning can be higher. Henry et al. 2020, Query-Key Normalization for Transformers;
// Qwen team 2025, Qwen3, section 2, whose form this is.
#ifndef QK_NORM_H
#define QK_NORM_H

// The norms of layer l, if it has them. In qkv (N,(H+2KV)*D) the H queries become x / rms(x) * q_norm, and the KV keys
// x / rms(x) * k_norm, both vectors (D). a->raw_qk (N,(H+KV)*D) keeps x, a->rstd_qk (N,H+KV) keeps 1 / rms(x).
void qk_norm_forward(Model *m, int l, real *qkv) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    LayerActs *a = &m->acts.layer[l];
    int N = m->batch.B * m->batch.T, H = c->heads, KV = c->kv_heads, D = c->dim / H, heads = H + KV;
    if (!w->q_norm) {
        return;
    }
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++) {
        for (int h = 0; h < heads; h++) {
            real *row = qkv + ((size_t)n * (heads + KV) + h) * D, *raw = a->raw_qk + ((size_t)n * heads + h) * D;
            const real *norm = h < H ? w->q_norm : w->k_norm;
            double sum = 0;
            for (int i = 0; i < D; i++) {
                raw[i] = row[i];
                sum += (double)row[i] * (double)row[i];
            }
            real rstd = (real)(1 / sqrt(sum / D + c->norm_eps));
            a->rstd_qk[(size_t)n * heads + h] = rstd;
            for (int i = 0; i < D; i++) {
                row[i] *= rstd * norm[i];
            }
        }
    }
}

// dqkv (N,(H+2KV)*D) comes in as the gradient by what the norms gave, and becomes that by what they read. The gradients of
// the two vectors are added to. The formulas are those of rmsnorm_backward().
void qk_norm_backward(Model *m, int l, real *dqkv) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l], *dw = &m->grads.layer[l];
    const LayerActs *a = &m->acts.layer[l];
    int N = m->batch.B * m->batch.T, H = c->heads, KV = c->kv_heads, D = c->dim / H, heads = H + KV;
    if (!w->q_norm) {
        return;
    }

    // All tokens add to the two vectors. A task owns one head of all tokens, and the tasks' sums are added in order, so
    // that the bits do not depend on the number of threads.
    real *part = allocate_reals((size_t)heads * D);
#pragma omp parallel for
    for (int h = 0; h < heads; h++) {
        const real *norm = h < H ? w->q_norm : w->k_norm;
        real *sum = part + (size_t)h * D;
        for (int n = 0; n < N; n++) {
            const real *raw = a->raw_qk + ((size_t)n * heads + h) * D;
            real *d = dqkv + ((size_t)n * (heads + KV) + h) * D, rstd = a->rstd_qk[(size_t)n * heads + h], mean = 0;
            for (int i = 0; i < D; i++) {
                sum[i] += d[i] * raw[i] * rstd;
                mean += d[i] * norm[i] * raw[i] * rstd;
            }
            mean /= (real)D;
            for (int i = 0; i < D; i++) {
                d[i] = rstd * (d[i] * norm[i] - raw[i] * rstd * mean);
            }
        }
    }
    for (int h = 0; h < heads; h++) {
        real *to = h < H ? dw->q_norm : dw->k_norm;
        for (int i = 0; i < D; i++) {
            to[i] += part[(size_t)h * D + i];
        }
    }
    free(part);
}

#endif
