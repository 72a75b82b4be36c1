// dev/test/plain.h: what train_moe.c computes fast, once more in the shortest loops that say what it is: one number after
// the other, sums in double, no blocks, no vectors, no scratch. test_moe.c compares each routine with its plain twin
// here, dev/bench/bench.c prints the two side by side. To be included after train_moe.c, whose comments give the shapes.
// Arguments are those of the fast routine, without its scratch. Only products use all threads.

#pragma once

static inline double *plain_room(size_t n) {
    return (double *)allocate(n, sizeof(double));
}

// The number of an operand that is in row `outer` of a, or column `outer` of b, and meets k.
static inline double plain_at(const Operand *o, int outer, int k) {
    int row = o->row_is_k ? k : outer, column = o->row_is_k ? outer : k;
    return (double)o->p[(size_t)(o->index ? o->index[row] : row) * o->ld + (size_t)column];
}

static inline void plain_products(const Product *list, int count, int accumulate) {
    for (const Product *p = list; p < list + count; p++) {
#pragma omp parallel for
        for (int i = 0; i < p->m; i++) {
            for (int j = 0; j < p->n; j++) {
                real *out = p->out + (size_t)i * p->ld + (size_t)j;
                double sum = accumulate ? (double)*out : 0;
                for (int k = 0; k < p->k; k++)
                    sum += plain_at(&p->a, i, k) * plain_at(&p->b, j, k);
                *out = (real)sum;
            }
        }
    }
}

static inline void plain_product(real *out, Operand a, Operand b, int m, int n, int k, int accumulate) {
    Product p = {out, (size_t)n, a, b, m, n, k};
    plain_products(&p, 1, accumulate);
}

static inline double plain_dot(const real *a, const real *b, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

// row (n) becomes softmax(row); returns log(sum(exp(row))). In double, for those below; then as the fast one.
static inline double plain_softmax_of(double *row, int n) {
    double top = -INFINITY, sum = 0;
    for (int j = 0; j < n; j++)
        top = fmax(top, row[j]);
    for (int j = 0; j < n; j++)
        sum += row[j] = exp(row[j] - top);
    for (int j = 0; j < n; j++)
        row[j] /= sum;
    return top + log(sum);
}

static inline real plain_softmax(real *row, int n) {
    double *p = plain_room((size_t)n);
    for (int j = 0; j < n; j++)
        p[j] = (double)row[j];
    double lse = plain_softmax_of(p, n);
    for (int j = 0; j < n; j++)
        row[j] = (real)p[j];
    free(p);
    return (real)lse;
}

static inline void plain_rmsnorm_forward(real *out, real *rstd, const real *x, const real *w, int N, int C,
                                         double eps) {
    for (int n = 0; n < N; n++, x += C, out += C) {
        double scale = 1 / sqrt(plain_dot(x, x, C) / C + eps);
        rstd[n] = (real)scale;
        for (int c = 0; c < C; c++)
            out[c] = (real)((double)x[c] * scale * (double)w[c]);
    }
}

// y = x*rstd; dx += rstd * (dout*w - y * mean(dout*w*y)), dw += dout*y
static inline void plain_rmsnorm_backward(real *dx, real *dw, const real *dout, const real *x, const real *rstd,
                                          const real *w, int N, int C) {
    double *total = plain_room((size_t)C); // of dw
    for (int n = 0; n < N; n++, x += C, dx += C, dout += C) {
        double scale = (double)rstd[n], mean = 0;
        for (int c = 0; c < C; c++)
            mean += (double)dout[c] * (double)w[c] * (double)x[c] * scale / C;
        for (int c = 0; c < C; c++) {
            double y = (double)x[c] * scale;
            dx[c] += (real)(scale * ((double)dout[c] * (double)w[c] - y * mean));
            total[c] += (double)dout[c] * y;
        }
    }
    for (int c = 0; c < C; c++)
        dw[c] += (real)total[c];
    free(total);
}

// theta instead of the table of angles
static inline void plain_rope(real *qkv, size_t ld, int N, int T, int heads, int D, double theta, double direction) {
    for (int n = 0; n < N; n++) {
        for (int h = 0; h < heads; h++) {
            real *left = qkv + (size_t)n * ld + (size_t)h * D, *right = left + D / 2;
            for (int i = 0; i < D / 2; i++) { // left + i * right is a complex number that turns
                double angle = direction * (n % T) * pow(theta, -2.0 * i / D);
                double a = (double)left[i], b = (double)right[i];
                left[i] = (real)(a * cos(angle) - b * sin(angle));
                right[i] = (real)(a * sin(angle) + b * cos(angle));
            }
        }
    }
}

// P (T,T): row t says how much query t of one head looks at each key, up to the key of its own place; lse (T)
static inline void plain_attention(double *P, double *lse, const real *q, const real *k, size_t ld, int T, int D) {
    for (int t = 0; t < T; t++) {
        for (int s = 0; s <= t; s++)
            P[(size_t)t * T + s] = plain_dot(q + (size_t)t * ld, k + (size_t)s * ld, D) / sqrt((double)D);
        lse[t] = plain_softmax_of(P + (size_t)t * T, t + 1);
    }
}

static inline void plain_attention_forward(real *out, real *lse, const real *qkv, int B, int T, int H, int KV, int D) {
    size_t ld = (size_t)(H + 2 * KV) * D;
    double *P = plain_room((size_t)T * T), *sums = plain_room((size_t)T);
    for (int b = 0; b < B; b++, qkv += T * ld, out += (size_t)T * H * D, lse += (size_t)H * T) {
        for (int h = 0; h < H; h++) {
            const real *k = qkv + (size_t)(H + h / (H / KV)) * D, *v = k + (size_t)KV * D;
            plain_attention(P, sums, qkv + (size_t)h * D, k, ld, T, D);
            for (int t = 0; t < T; t++) {
                lse[(size_t)h * T + t] = (real)sums[t];
                for (int i = 0; i < D; i++) {
                    double sum = 0;
                    for (int s = 0; s <= t; s++)
                        sum += P[(size_t)t * T + s] * (double)v[s * ld + (size_t)i];
                    out[((size_t)t * H + h) * D + i] = (real)sum;
                }
            }
        }
    }
    free(P);
    free(sums);
}

// Needs neither out nor lse of the forward pass: it has the probabilities.
static inline void plain_attention_backward(real *dqkv, const real *dout, const real *qkv, int B, int T, int H, int KV,
                                            int D) {
    size_t ld = (size_t)(H + 2 * KV) * D;
    double *P = plain_room((size_t)T * T), *sums = plain_room((size_t)T);
    double *dP = plain_room((size_t)T), *d = plain_room(T * ld);
    for (int b = 0; b < B; b++, qkv += T * ld, dqkv += T * ld, dout += (size_t)T * H * D) {
        memset(d, 0, T * ld * sizeof(double));
        for (int h = 0; h < H; h++) {
            size_t q = (size_t)h * D, k = (size_t)(H + h / (H / KV)) * D, v = k + (size_t)KV * D; // where they begin
            plain_attention(P, sums, qkv + q, qkv + k, ld, T, D);
            for (int t = 0; t < T; t++) {
                const real *g = dout + ((size_t)t * H + h) * D;
                const double *p = P + (size_t)t * T;
                double mean = 0;
                for (int s = 0; s <= t; s++) {
                    dP[s] = plain_dot(g, qkv + s * ld + v, D);
                    mean += p[s] * dP[s];
                }
                for (int s = 0; s <= t; s++) {
                    double dscore = p[s] * (dP[s] - mean) / sqrt((double)D);
                    for (int i = 0; i < D; i++) {
                        d[t * ld + q + i] += dscore * (double)qkv[s * ld + k + i];
                        d[s * ld + k + i] += dscore * (double)qkv[t * ld + q + i];
                        d[s * ld + v + i] += p[s] * (double)g[i];
                    }
                }
            }
        }
        for (size_t i = 0; i < T * ld; i++)
            dqkv[i] = (real)d[i];
    }
    free(P);
    free(sums);
    free(dP);
    free(d);
}

static inline void plain_embedding_backward(real *dembedding, const real *dx, const int *tokens, int N, int C, int V) {
    double *total = plain_room((size_t)V * C);
    for (int n = 0; n < N; n++) {
        for (int c = 0; c < C; c++)
            total[(size_t)tokens[n] * C + c] += (double)dx[(size_t)n * C + c];
    }
    for (size_t i = 0; i < (size_t)V * C; i++)
        dembedding[i] += (real)total[i];
    free(total);
}

// f and its slope at x
static inline double plain_activate(int activation, double x, double *slope) {
    if (activation == SWIGLU) {
        double sigmoid = 1 / (1 + exp(-x));
        *slope = sigmoid * (1 + x * (1 - sigmoid));
        return x * sigmoid;
    }
    if (activation == RELU) {
        *slope = x > 0;
        return x > 0 ? x : 0;
    }
    double phi = 0.5 * erfc(-x / sqrt(2.0)); // GELU, GEGLU: the normal distribution function
    *slope = phi + x * exp(-0.5 * x * x) / sqrt(2 * 3.141592653589793);
    return x * phi;
}

static inline void plain_activation_forward(real *act, const real *hidden, int rows, int F, int activation) {
    int gated = is_gated(activation);
    for (int r = 0; r < rows; r++, act += F, hidden += F * (1 + gated)) {
        for (int j = 0; j < F; j++) {
            double slope, value = plain_activate(activation, (double)hidden[j], &slope);
            act[j] = (real)(gated ? value * (double)hidden[F + j] : value);
        }
    }
}

static inline void plain_activation_backward(real *dhidden, real *dweight, real *dact, const real *hidden,
                                             const real *weight, const int *choice, int rows, int F, int activation) {
    int gated = is_gated(activation);
    for (int r = 0; r < rows; r++, dact += F, hidden += F * (1 + gated), dhidden += F * (1 + gated)) {
        double w = weight ? (double)weight[choice[r]] : 1, sum = 0;
        for (int j = 0; j < F; j++) {
            double slope, value = plain_activate(activation, (double)hidden[j], &slope), g = (double)dact[j];
            double up = gated ? (double)hidden[F + j] : 1;
            dhidden[j] = (real)(w * g * up * slope);
            if (gated)
                dhidden[F + j] = (real)(w * g * value);
            dact[j] = (real)(w * value * up);
            sum += g * value * up;
        }
        if (dweight)
            dweight[choice[r]] = (real)sum;
    }
}

static inline void plain_experts_forward(real *out, real *hidden, real *act, const real *x, const Experts *experts,
                                         int accumulate) {
    const real *w_in = experts->w_in, *w_out = experts->w_out;
    int C = experts->C;
    for (int e = 0; e < experts->E; e++) {
        int first = experts->offset[e], rows = experts->offset[e + 1] - first, F = experts->width[e];
        int f = experts->activation[e], H = F * (1 + is_gated(f));
        const real *from = experts->token ? x : x + (size_t)first * C;
        const int *token = experts->token ? experts->token + first : NULL;
        plain_product(hidden, along_rows(from, C, token), along_rows(w_in, C, NULL), rows, H, C, 0);
        plain_activation_forward(act, hidden, rows, F, f);
        plain_product(out, along_rows(act, F, NULL), along_rows(w_out, F, NULL), rows, C, F, accumulate);
        hidden += (size_t)rows * H, act += (size_t)rows * F, out += (size_t)rows * C;
        w_in += (size_t)H * C, w_out += (size_t)C * F;
    }
}

// weight, dweight and choice may all be NULL.
static inline void plain_experts_backward(real *dx, real *dw_in, real *dw_out, real *dweight, const real *dout,
                                          const real *x, const real *hidden, const real *weight, const int *choice,
                                          const Experts *experts, int accumulate) {
    const real *w_in = experts->w_in, *w_out = experts->w_out;
    int C = experts->C;
    for (int e = 0; e < experts->E; e++) {
        int first = experts->offset[e], rows = experts->offset[e + 1] - first, F = experts->width[e];
        int f = experts->activation[e], H = F * (1 + is_gated(f));
        size_t skip = experts->token ? 0 : (size_t)first * C;
        const int *token = experts->token ? experts->token + first : NULL;
        real *act = allocate_reals((size_t)rows * F), *dhidden = allocate_reals((size_t)rows * H);
        plain_product(act, along_rows(dout + skip, C, token), along_columns(w_out, F, NULL), rows, F, C, 0);
        plain_activation_backward(dhidden, dweight, act, hidden, weight, choice ? choice + first : NULL, rows, F, f);
        plain_product(dw_out, along_columns(dout + skip, C, token), along_columns(act, F, NULL), C, F, rows, 1);
        plain_product(dw_in, along_columns(dhidden, H, NULL), along_columns(x + skip, C, token), H, C, rows, 1);
        plain_product(dx, along_rows(dhidden, H, NULL), along_columns(w_in, C, NULL), rows, C, H, accumulate);
        free(act);
        free(dhidden);
        hidden += (size_t)rows * H, dx += (size_t)rows * C;
        w_in += (size_t)H * C, w_out += (size_t)C * F, dw_in += (size_t)H * C, dw_out += (size_t)C * F;
    }
}

static inline void plain_combine(real *out, const real *rows, const real *weight, const int *slot, int N, int K,
                                 int C) {
    for (int n = 0; n < N; n++) {
        for (int c = 0; c < C; c++) {
            double sum = (double)out[(size_t)n * C + c];
            for (int choice = n * K; choice < (n + 1) * K; choice++) {
                if (slot[choice] >= 0)
                    sum += (weight ? (double)weight[choice] : 1) * (double)rows[(size_t)slot[choice] * C + c];
            }
            out[(size_t)n * C + c] = (real)sum;
        }
    }
}

// dh and dhead may both be NULL.
static inline void plain_head_loss(real *nll, real *dh, real *dhead, const real *h, const real *head,
                                   const int *targets, int N, int C, int V, double scale) {
    double *p = plain_room((size_t)V), *to_h = plain_room((size_t)C);
    double *to_head = plain_room((size_t)V * C);
    for (int n = 0; n < N; n++, h += C) {
        for (int v = 0; v < V; v++)
            p[v] = plain_dot(h, head + (size_t)v * C, C);
        double right = p[targets[n]];
        nll[n] = (real)(plain_softmax_of(p, V) - right);
        if (!dh)
            continue;
        p[targets[n]] -= 1;
        memset(to_h, 0, (size_t)C * sizeof(double));
        for (int v = 0; v < V; v++) {
            for (int c = 0; c < C; c++) {
                to_h[c] += scale * p[v] * (double)head[(size_t)v * C + c];
                to_head[(size_t)v * C + c] += scale * p[v] * (double)h[c];
            }
        }
        for (int c = 0; c < C; c++)
            dh[(size_t)n * C + c] = (real)to_h[c];
    }
    for (size_t i = 0; dh && i < (size_t)V * C; i++)
        dhead[i] += (real)to_head[i];
    free(p);
    free(to_h);
    free(to_head);
}

static inline double plain_gradient_norm(const real *g, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)g[i] * (double)g[i];
    return sqrt(sum);
}

// One tensor of n numbers: weights, gradients, both moments; scale is what clipping leaves of the gradients. Clears g.
static inline void plain_adamw(real *w, real *g, real *m1, real *m2, size_t n, int step, double lr, double scale,
                               double beta1, double beta2, double decay) {
    for (size_t i = 0; i < n; i++) {
        double grad = (double)g[i] * scale;
        double mean = beta1 * (double)m1[i] + (1 - beta1) * grad;
        double square = beta2 * (double)m2[i] + (1 - beta2) * grad * grad;
        double change = mean / (1 - pow(beta1, step)) / (sqrt(square / (1 - pow(beta2, step))) + 1e-8);
        w[i] = (real)((double)w[i] - lr * (change + decay * (double)w[i]));
        m1[i] = (real)mean;
        m2[i] = (real)square;
        g[i] = 0;
    }
}
