// What stands between the halves of a layer and the residual stream: its norms, dropout (--dropout), and the sigmoid on
// the mixture's output (--moe-sigmoid).
// Gives: norm_forward, norm_backward, drop, begin_branch, end_branch, branch_gradient.
// Needs: Model and the layers of train_moe.c, which includes it.
//
// A layer adds two branches to the stream: what mixes along the sequence, and what feeds forward. Usually a branch adds its
// numbers to the stream itself. With dropout they are made apart, since each becomes 0 with probability p, and the others
// are divided by 1 - p, before they are added (Srivastava et al. 2014, Dropout). At evaluation nothing is dropped. The
// embedding's output is dropped likewise. Chance depends only on the seed, the step, the branch, the token and the column. So
// the backward pass draws the same numbers again, and no mask has to be kept.
//
// The model of Shazeer et al. 2017 (appendix C.1) has dropout on each layer's output, a sigmoid on the mixture's output
// before it, and no norms (--norms 0).
#ifdef CONFIG_FIELDS
    int norms;       // 0: there are none
    int moe_sigmoid, last_feed;
    double dropout;
#elif !defined(RESIDUAL_H)
#define RESIDUAL_H

enum { MIXING, FEEDING }; // the branches of a layer

// out (N,C) = rmsnorm of x (N,C); a copy of x where the model has no such norm (w NULL).
void norm_forward(const Model *m, real *out, real *rstd, const real *x, const real *w, int N) {
    if (w) {
        rmsnorm_forward(out, rstd, x, w, N, m->config.dim, m->config.norm_eps);
    } else {
        copy_rows(out, x, N, m->config.dim);
    }
}

// Adds to dx (N,C), and to dw (C) where there is a norm.
void norm_backward(const Model *m, real *dx, real *dw, const real *dout, const real *x, const real *rstd, const real *w, int N) {
    int C = m->config.dim;
    if (w) {
        rmsnorm_backward(dx, dw, dout, x, rstd, w, N, C);
        return;
    }
#pragma omp parallel for if (is_worth_threads(N, C))
    for (int n = 0; n < N; n++) {
        for (int c = 0; c < C; c++) {
            dx[(size_t)n * C + c] += dout[(size_t)n * C + c];
        }
    }
}

// ---- dropout

int has_dropout(const Model *m) {
    return m->config.dropout > 0 && m->batch.mode == TRAIN_MODE;
}

// The random numbers of branch `which` of layer l; those of the embedding have l -1 and FEEDING.
uint64_t drop_stream(const Model *m, int l, int which) {
    uint64_t branch = (uint64_t)(2 * l + which + 1);
    return random_stream((uint64_t)m->config.seed, RANDOM_DROPOUT, (uint64_t)m->batch.step, branch);
}

// Row n of a branch, row (C): 0 with probability p, else divided by 1 - p. The number of the token in its step decides,
// so any number of processes drops the same.
void drop_row(const Model *m, real *row, uint64_t stream, int n) {
    int C = m->config.dim;
    uint64_t token = (uint64_t)(m->batch.first_token + n);
    real factor = (real)(1 / (1 - m->config.dropout));
    for (int c = 0; c < C; c++) {
        int kept = random_uniform(stream, token * (uint64_t)C + (uint64_t)c) >= m->config.dropout;
        row[c] = kept ? row[c] * factor : 0;
    }
}

// x (N,C), the embedding of the batch, with dropout. The gradient by it goes the same way: it is multiplied by the same
// factors.
void drop_embedding(const Model *m, real *x) {
    int N = m->batch.B * m->batch.T, C = m->config.dim;
    uint64_t stream = drop_stream(m, -1, FEEDING);
#pragma omp parallel for if (is_worth_threads(N, C))
    for (int n = 0; n < (has_dropout(m) ? N : 0); n++) {
        drop_row(m, x + (size_t)n * C, stream, n);
    }
}

// ---- branches

int has_sigmoid(const Model *m, int l, int which) {
    return m->config.moe_sigmoid && which == FEEDING && is_moe(&m->config, l);
}

// Is the branch made apart from the stream?
int is_apart(const Model *m, int l, int which) {
    return has_dropout(m) || has_sigmoid(m, l, which);
}

// out (N,C), to which a branch adds its numbers next: the stream x (N,C), or 0 where the branch is made apart.
void begin_branch(const Model *m, int l, int which, real *out, const real *x) {
    int N = m->batch.B * m->batch.T, C = m->config.dim;
    if (is_apart(m, l, which)) {
        memset(out, 0, (size_t)N * C * sizeof(real));
    } else {
        copy_rows(out, x, N, C);
    }
}

// The branch is complete. Where it was made apart, out (N,C) becomes x + dropout(sigmoid(out)).
void end_branch(const Model *m, int l, int which, real *out, const real *x) {
    int N = m->batch.B * m->batch.T, C = m->config.dim, sigmoid = has_sigmoid(m, l, which), dropped = has_dropout(m);
    real *fed = m->acts.layer[l].fed;
    uint64_t stream = drop_stream(m, l, which);
#pragma omp parallel for if (is_worth_threads(N, C))
    for (int n = 0; n < (is_apart(m, l, which) ? N : 0); n++) {
        real *row = out + (size_t)n * C;
        for (int c = 0; sigmoid && c < C; c++) {
            row[c] = (real)(1 / (1 + exp(-(double)row[c])));
            fed[(size_t)n * C + c] = row[c];
        }
        if (dropped) {
            drop_row(m, row, stream, n);
        }
        for (int c = 0; c < C; c++) {
            row[c] += x[(size_t)n * C + c];
        }
    }
}

// The gradient by what the branch made, from dout (N,C), that by the stream behind it. It is dout itself unless the branch
// was made apart: then m->dbranch. The derivative of y = sigmoid(z) is y * (1 - y).
const real *branch_gradient(const Model *m, int l, int which, const real *dout) {
    int N = m->batch.B * m->batch.T, C = m->config.dim, sigmoid = has_sigmoid(m, l, which), dropped = has_dropout(m);
    const real *fed = m->acts.layer[l].fed;
    uint64_t stream = drop_stream(m, l, which);
    if (!is_apart(m, l, which)) {
        return dout;
    }
#pragma omp parallel for if (is_worth_threads(N, C))
    for (int n = 0; n < N; n++) {
        real *row = m->dbranch + (size_t)n * C;
        memcpy(row, dout + (size_t)n * C, (size_t)C * sizeof(real));
        if (dropped) {
            drop_row(m, row, stream, n);
        }
        for (int c = 0; sigmoid && c < C; c++) {
            row[c] *= fed[(size_t)n * C + c] * (1 - fed[(size_t)n * C + c]);
        }
    }
    return m->dbranch;
}

#endif
