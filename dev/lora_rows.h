// Pairs of experts: each expert has a pair of its own, and its rows of a grouped product pass it.
// Gives: paired_grouped_matmul, paired_grouped_matmul_dx, paired_grouped_matmul_dw. Needs: the products of train_moe.c;
// dev/lora.h, which has the formulas and includes it.
//
// A stack of A matrices (E,R,I), and of B (E,O,r), is multiplied by the same grouped products as the experts' own matrices:
// expert e has the rows offset[e] .. offset[e+1]. An expert without rows adds nothing to its pair's gradient.
#pragma once

// n times the number k, for products that ask each expert's width.
int *same_widths(int n, int k) {
    int *list = (int *)allocate(n, sizeof(int));
    for (int e = 0; e < n; e++) {
        list[e] = k;
    }
    return list;
}

// to (n) += from
void add_numbers(real *to, const real *from, size_t n) {
#pragma omp parallel for if (n > 65536)
    for (size_t i = 0; i < n; i++) {
        to[i] += from[i];
    }
}

// s x A^T (rows,rank), in shared memory; token as in grouped_matmul().
real *inner_of_rows(const Pair *p, const real *x, const int *token, const int *offset, const int *I, const int *rank) {
    size_t n = (size_t)offset[p->E] * p->rank;
    real *inner = pair_memory(INNER, n);
    grouped_matmul(inner, x, token, p->a, offset, p->E, I, rank);
    scale_numbers(inner, n, p->scale);
    return inner;
}

// s dout B (rows,rank), in shared memory
real *inner_of_drows(const Pair *p, const real *dout, const int *token, const int *offset, const int *O, const int *rank) {
    size_t n = (size_t)offset[p->E] * p->rank;
    real *inner = pair_memory(INNER, n);
    grouped_matmul_dx(inner, dout, token, p->b, offset, p->E, rank, O);
    scale_numbers(inner, n, p->scale);
    return inner;
}

void paired_grouped_matmul(real *out, const real *x, const int *token, const real *w, const int *offset, int E,
                           const int *I, const int *O) {
    const Pair *p = pair_of(w);
    grouped_matmul(out, x, token, w, offset, E, I, O);
    if (!p) {
        return;
    }
    int *rank = same_widths(E, p->rank);
    size_t n = (size_t)offset[E] * p->O;
    real *more = pair_memory(OUTER, n);
    grouped_matmul(more, inner_of_rows(p, x, token, offset, I, rank), NULL, p->b, offset, E, rank, O);
    add_numbers(out, more, n);
    free(rank);
}

void paired_grouped_matmul_dx(real *dx, const real *dout, const int *token, const real *w, const int *offset, int E,
                              const int *I, const int *O) {
    const Pair *p = pair_of(w);
    grouped_matmul_dx(dx, dout, token, w, offset, E, I, O);
    if (!p) {
        return;
    }
    int *rank = same_widths(E, p->rank);
    size_t n = (size_t)offset[E] * p->I;
    real *more = pair_memory(OUTER, n);
    grouped_matmul_dx(more, inner_of_drows(p, dout, token, offset, O, rank), NULL, p->a, offset, E, I, rank);
    add_numbers(dx, more, n);
    free(rank);
}

void paired_grouped_matmul_dw(real *dw, const real *dout, const int *dout_token, const real *x, const int *x_token,
                              const int *offset, int E, const int *I, const int *O) {
    const Pair *p = pair_of_gradient(dw);
    if (!p) {
        if (dw) {
            grouped_matmul_dw(dw, dout, dout_token, x, x_token, offset, E, I, O);
        }
        return;
    }
    int *rank = same_widths(E, p->rank);
    grouped_matmul_dw(p->db, dout, dout_token, inner_of_rows(p, x, x_token, offset, I, rank), NULL, offset, E, rank, O);
    grouped_matmul_dw(p->da, inner_of_drows(p, dout, dout_token, offset, O, rank), NULL, x, x_token, offset, E, I, rank);
    free(rank);
}
