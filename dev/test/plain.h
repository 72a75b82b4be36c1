// What the lesson and dev/cpu compute, once more in the shortest loops that say what it is: one number after the other, and
// sums in double. It is for what train_moe.c does not have twice: tests hold such functions against these, whose arguments
// are the same but for scratch memory. (For what it has twice, see dev/test/both.h.)
// Gives: plain_products, plain_rope, plain_embedding_backward, plain_combine, plain_head_loss, plain_adamw.
// Needs: train_moe.c, whose comments give the shapes, and dev/cpu/matmul.h.

#pragma once
#include "dev/cpu/matmul.h"

// The number of an operand that is in row `outer` of a, or column `outer` of b, and meets k.
static inline double plain_at(const Operand *o, int outer, int k) {
    int row = o->row_is_k ? k : outer, column = o->row_is_k ? outer : k;
    return (double)o->p[(size_t)(o->index ? o->index[row] : row) * o->ld + (size_t)column];
}

static inline void plain_products(const Product *list, int count, int add) {
    for (const Product *p = list; p < list + count; p++) {
#pragma omp parallel for
        for (int i = 0; i < p->m; i++) {
            for (int j = 0; j < p->n; j++) {
                real *out = p->out + (size_t)i * p->ld + (size_t)j;
                double sum = add ? (double)*out : 0;
                for (int k = 0; k < p->k; k++)
                    sum += plain_at(&p->a, i, k) * plain_at(&p->b, j, k);
                *out = (real)sum;
            }
        }
    }
}

static inline double plain_dot(const real *a, const real *b, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

// row (n) becomes softmax(row); returns log(sum(exp(row))).
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

static inline void plain_embedding_backward(real *dembedding, const real *dx, const int *tokens, int N, int C, int V) {
    double *total = (double *)allocate((size_t)V * C, sizeof(double));
    for (int n = 0; n < N; n++) {
        for (int c = 0; c < C; c++)
            total[(size_t)tokens[n] * C + c] += (double)dx[(size_t)n * C + c];
    }
    for (size_t i = 0; i < (size_t)V * C; i++)
        dembedding[i] += (real)total[i];
    free(total);
}

static inline void plain_combine(real *out, const real *rows, const real *weight, const int *row, int N, int K,
                                 int C) {
    for (int n = 0; n < N; n++) {
        for (int c = 0; c < C; c++) {
            double sum = (double)out[(size_t)n * C + c];
            for (int choice = n * K; choice < (n + 1) * K; choice++) {
                if (row[choice] >= 0)
                    sum += (weight ? (double)weight[choice] : 1) * (double)rows[(size_t)row[choice] * C + c];
            }
            out[(size_t)n * C + c] = (real)sum;
        }
    }
}

// dh and dhead may both be NULL.
static inline void plain_head_loss(real *nll, real *dh, real *dhead, const real *h, const real *head,
                                   const int *targets, int N, int C, int V, double scale) {
    double *p = (double *)allocate(V, sizeof(double)), *to_h = (double *)allocate(C, sizeof(double));
    double *to_head = (double *)allocate((size_t)V * C, sizeof(double));
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
