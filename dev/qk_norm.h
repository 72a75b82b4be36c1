// Queries and keys with a norm of their own (--qk-norm): each head's query and key is RMS-normalised before it is turned.
// Gives: norm_heads_forward, norm_heads_backward; NormHeads, norm_heads; qk_norm_forward, qk_norm_backward. Needs: Model and
// the layers of train_moe.c, which includes it.
//
// A score is q . k / sqrt(D), and nothing limits how large q and k grow. With a norm only their directions count, times
// two learned vectors; so the rate of learning can be higher. Henry et al. 2020, Query-Key Normalization for Transformers;
// Qwen team 2025, Qwen3, section 2, whose form this is. With --qk-norm-over row all queries of a token have one norm
// together, over H*D numbers, and all its keys another one (Muennighoff et al. 2024, OLMoE, section 4.2.5).
#ifdef CONFIG_FIELDS
    int qk_norm;
    int qk_norm_over; // OVER_HEAD or OVER_ROW
#elif !defined(QK_NORM_H)
#define QK_NORM_H

int head_width(const Config *c); // mixers/attention_experts.h

// In qkv (N, H*DQ + 2*KV*DK) the H queries become x / rms(x) * q_norm, a vector (DQ), and the KV keys x / rms(x) * k_norm,
// a vector (DK). raw (N, H*DQ + KV*DK) keeps x, rstd (N,H+KV) keeps 1 / rms(x). Norms of heads have DQ = DK = D. A norm over
// all queries is that of one head which is H*D wide.
void norm_heads_forward(real *qkv, real *raw_qk, real *rstd_qk, const real *q_norm, const real *k_norm, int N, int H, int KV,
                        int DQ, int DK, double eps) {
    int heads = H + KV, kept = H * DQ + KV * DK, width = kept + KV * DK;
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++) {
        for (int h = 0; h < heads; h++) {
            int D = h < H ? DQ : DK, from = h < H ? h * DQ : H * DQ + (h - H) * DK;
            real *row = qkv + (size_t)n * width + from, *raw = raw_qk + (size_t)n * kept + from;
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

// dqkv (N, H*DQ + 2*KV*DK) comes in as the gradient by what the norms gave, and becomes that by what they read. The gradients of
// the two vectors are added to. The formulas are those of rmsnorm_backward().
void norm_heads_backward(real *dqkv, real *dq_norm, real *dk_norm, const real *raw_qk, const real *rstd_qk,
                         const real *q_norm, const real *k_norm, int N, int H, int KV, int DQ, int DK) {
    int heads = H + KV, kept = H * DQ + KV * DK, width = kept + KV * DK;

    // All tokens add to the two vectors. A task owns one head of all tokens, and the tasks' sums are added in order, so
    // that the bits do not depend on the number of threads.
    real *part = allocate_reals(kept);
#pragma omp parallel for
    for (int h = 0; h < heads; h++) {
        int D = h < H ? DQ : DK, from = h < H ? h * DQ : H * DQ + (h - H) * DK;
        const real *norm = h < H ? q_norm : k_norm;
        real *sum = part + from;
        for (int n = 0; n < N; n++) {
            const real *raw = raw_qk + (size_t)n * kept + from;
            real *d = dqkv + (size_t)n * width + from, rstd = rstd_qk[(size_t)n * heads + h], mean = 0;
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
    for (int h = 0, from = 0; h < heads; h++) {
        int D = h < H ? DQ : DK;
        real *to = h < H ? dq_norm : dk_norm;
        for (int i = 0; i < D; i++) {
            to[i] += part[from + i];
        }
        from += D;
    }
    free(part);
}

// The heads of a model's norms: those of attention, or one of all queries and one of all keys.
typedef struct NormHeads {
    int H, KV, DQ, DK;
} NormHeads;

NormHeads norm_heads(const Config *c) {
    int H = c->heads, KV = c->kv_heads, D = head_width(c);
    NormHeads heads = {H, KV, D, D}, rows = {1, 1, H * D, KV * D};
    return c->qk_norm_over == OVER_ROW ? rows : heads;
}

// norm_heads_forward() of layer l, if it has such norms.
void qk_norm_forward(Model *m, int l, real *qkv) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    LayerActs *a = &m->acts.layer[l];
    NormHeads z = norm_heads(c);
    int N = m->batch.B * m->batch.T;
    if (w->q_norm) {
        norm_heads_forward(qkv, a->raw_qk, a->rstd_qk, w->q_norm, w->k_norm, N, z.H, z.KV, z.DQ, z.DK, c->norm_eps);
    }
}

void qk_norm_backward(Model *m, int l, real *dqkv) {
    const LayerParams *w = &m->params.layer[l], *dw = &m->grads.layer[l];
    const LayerActs *a = &m->acts.layer[l];
    NormHeads z = norm_heads(&m->config);
    int N = m->batch.B * m->batch.T;
    if (w->q_norm) {
        norm_heads_backward(dqkv, dw->q_norm, dw->k_norm, a->raw_qk, a->rstd_qk, w->q_norm, w->k_norm, N, z.H, z.KV, z.DQ,
                            z.DK);
    }
}

#endif
