// Queries and keys with a norm of their own (--qk-norm): each head's query and key is RMS-normalised before it is turned.
// Gives: norm_heads_forward, norm_heads_backward; qk_norm_forward, qk_norm_backward. Needs: Model and the layers of train_moe.c, which includes it.
//
// A score is q . k / sqrt(D), and nothing limits how large q and k grow. With a norm only their directions count, times
// two learned vectors; so the rate of learning can be higher. Henry et al. 2020, Query-Key Normalization for Transformers;
// Qwen team 2025, Qwen3, section 2, whose form this is.
#ifdef CONFIG_FIELDS
    int qk_norm;
#elif !defined(QK_NORM_H)
#define QK_NORM_H

// In qkv (N,(H+2KV)*D) the H queries become x / rms(x) * q_norm, and the KV keys x / rms(x) * k_norm, both vectors (D).
// raw (N,(H+KV)*D) keeps x, rstd (N,H+KV) keeps 1 / rms(x).
void norm_heads_forward(real *qkv, real *raw_qk, real *rstd_qk, const real *q_norm, const real *k_norm, int N, int H, int KV,
                        int D, double eps) {
    int heads = H + KV;
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++) {
        for (int h = 0; h < heads; h++) {
            real *row = qkv + ((size_t)n * (heads + KV) + h) * D, *raw = raw_qk + ((size_t)n * heads + h) * D;
            const real *norm = h < H ? q_norm : k_norm;
            double sum = 0;
            for (int i = 0; i < D; i++) {
                raw[i] = row[i];
                sum += (double)row[i] * (double)row[i];
            }
            real rstd = (real)(1 / sqrt(sum / D + eps));
            rstd_qk[(size_t)n * heads + h] = rstd;
            for (int i = 0; i < D; i++) {
                row[i] *= rstd * norm[i];
            }
        }
    }
}

// dqkv (N,(H+2KV)*D) comes in as the gradient by what the norms gave, and becomes that by what they read. The gradients of
// the two vectors are added to. The formulas are those of rmsnorm_backward().
void norm_heads_backward(real *dqkv, real *dq_norm, real *dk_norm, const real *raw_qk, const real *rstd_qk,
                         const real *q_norm, const real *k_norm, int N, int H, int KV, int D) {
    int heads = H + KV;

    // All tokens add to the two vectors. A task owns one head of all tokens, and the tasks' sums are added in order, so
    // that the bits do not depend on the number of threads.
    real *part = allocate_reals((size_t)heads * D);
#pragma omp parallel for
    for (int h = 0; h < heads; h++) {
        const real *norm = h < H ? q_norm : k_norm;
        real *sum = part + (size_t)h * D;
        for (int n = 0; n < N; n++) {
            const real *raw = raw_qk + ((size_t)n * heads + h) * D;
            real *d = dqkv + ((size_t)n * (heads + KV) + h) * D, rstd = rstd_qk[(size_t)n * heads + h], mean = 0;
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
        real *to = h < H ? dq_norm : dk_norm;
        for (int i = 0; i < D; i++) {
            to[i] += part[(size_t)h * D + i];
        }
    }
    free(part);
}

// The same for layer l, if it has such norms.
void qk_norm_forward(Model *m, int l, real *qkv) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    LayerActs *a = &m->acts.layer[l];
    int N = m->batch.B * m->batch.T, D = c->dim / c->heads;
    if (w->q_norm) {
        norm_heads_forward(qkv, a->raw_qk, a->rstd_qk, w->q_norm, w->k_norm, N, c->heads, c->kv_heads, D, c->norm_eps);
    }
}

void qk_norm_backward(Model *m, int l, real *dqkv) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l], *dw = &m->grads.layer[l];
    const LayerActs *a = &m->acts.layer[l];
    int N = m->batch.B * m->batch.T, D = c->dim / c->heads;
    if (w->q_norm) {
        norm_heads_backward(dqkv, dw->q_norm, dw->k_norm, a->raw_qk, a->rstd_qk, w->q_norm, w->k_norm, N, c->heads,
                            c->kv_heads, D);
    }
}

#endif
