// Muon, another optimizer for the matrices of the layers (--optimizer muon).
// Gives: ADAMW, MUON, muon_polynomial, takes_muon, orthogonalize, muon_update. Needs: Model, the grouped products, moments.h,
// ranks/gradients.h; train_moe.c includes it.
//
// AdamW divides each number of a gradient by its own usual size. Muon (Jordan et al. 2024, "Muon: An optimizer for hidden
// layers in neural networks") looks at the matrix as a whole. The mean gradient of a matrix is mostly a sum of few strong
// directions; beside them many weak ones hardly move. With its singular values, U S V^T, all directions move alike if the
// step is U V^T: every singular value becomes 1. Vectors, embeddings, tables and the router keep AdamW.
//
// U V^T needs no decomposition. For a matrix X whose singular values s are between 0 and 1, the matrix
//     a X + (b X X^T + c (X X^T)^2) X
// has the same U and V, and the singular values a s + b s^3 + c s^5. Three such rounds bring all that are at least 0.02 to
// 0.9 .. 1.1, and make the smaller ones 55 times as large. In each round a, b and c are those of the polynomial that is
// nearest to 1 over the range that the round before has left, which for the first is 0.02 .. 1 (Amsel et al. 2025, The Polar
// Express; Jordan's five rounds with one polynomial cost two thirds more, and reach 0.7 .. 1.2).
//
// The step is scaled by 0.2 sqrt(max(R, C)), with which its numbers are about as large as those of AdamW's steps, so that
// one --lr and one --weight-decay serve both (Liu et al. 2025, Muon is Scalable for LLM Training, section 2.2).
#pragma once
#include "moments.h"

enum { ADAMW, MUON };
#define MUON_MOMENTUM 0.95 // memory of the mean gradient
#define MUON_STEP     0.2  // times the root of the larger side: the scale of a step
#define MUON_ROUNDS   3
const double muon_polynomial[MUON_ROUNDS][3] = {{7.711, -22.1138, 16.2487}, {3.2153, -2.4112, 0.5013}, {2.2183, -1.594, 0.4107}};

// Is this tensor one of Muon's?
int takes_muon(const Config *c, const Tensor *t) {
    return c->optimizer == MUON && t->trained && t->layer >= 0 && t->dims > 1 && !t->looked_up && strcmp(t->kind, "router");
}

// Divides each of the E matrices of x, of `size` numbers each, by the root of the sum of its squares. Then no singular
// value is above 1.
void divide_by_norm(real *x, int E, size_t size) {
    for (int e = 0; e < E; e++) {
        double sum = sum_of_squares(x + (size_t)e * size, size);
        real scale = (real)(sum > 0 ? 1 / sqrt(sum) : 0);
        for (size_t j = 0; j < size; j++) {
            x[(size_t)e * size + j] *= scale;
        }
    }
}

// to = a * to + b * from, for n numbers
void blend(real *to, const real *from, double a, double b, size_t n) {
#pragma omp parallel for if (n > 16384)
    for (size_t j = 0; j < n; j++) {
        to[j] = (real)a * to[j] + (real)b * from[j];
    }
}

// Each of the E matrices x (R,C) becomes U V^T, nearly. The products run over all matrices at once, as if each were an
// expert. Of X X^T and X^T X the smaller one is taken: X S with S made of X^T X is the same as S X with S made of X X^T.
void orthogonalize(Model *m, real *x, int E, int R, int C) {
    int small = min_int(R, C), tall = R > C;
    size_t squares = (size_t)E * (size_t)small * (size_t)small, size = (size_t)E * (size_t)R * (size_t)C;
    scratch_reset(m);
    real *gram = scratch(m, squares), *square = scratch(m, squares), *moved = scratch(m, size);

    // The grouped products ask where each matrix's rows begin, and how wide they are.
    int *row = (int *)allocate(2 * (E + 1) + 3 * E, sizeof(int)), *small_row = row + E + 1;
    int *rows = small_row + E + 1, *columns = rows + E, *smalls = columns + E;
    for (int e = 0; e < E; e++) {
        row[e + 1] = (e + 1) * R;
        small_row[e + 1] = (e + 1) * small;
        rows[e] = R;
        columns[e] = C;
        smalls[e] = small;
    }

    divide_by_norm(x, E, (size_t)R * (size_t)C);
    for (int round = 0; round < MUON_ROUNDS; round++) {
        const double *p = muon_polynomial[round];
        if (tall) {
            memset(gram, 0, squares * sizeof(real));
            grouped_matmul_dw(gram, x, NULL, x, NULL, row, E, columns, columns); // X^T X
        } else {
            grouped_matmul(gram, x, NULL, x, row, E, columns, rows); // X X^T
        }
        grouped_matmul(square, gram, NULL, gram, small_row, E, smalls, smalls); // its square, since it is symmetric
        blend(square, gram, p[2], p[1], squares);
        if (tall) {
            grouped_matmul(moved, x, NULL, square, row, E, columns, columns);
        } else {
            grouped_matmul_dx(moved, square, NULL, x, small_row, E, columns, rows);
        }
        blend(x, moved, p[0], 1, size);
    }
    free(row);
}

// A step of Muon for all its tensors; their gradients are cleared. gradient_scale: what clipping multiplies them by.
void muon_update(Model *m, int step, double lr, real gradient_scale) {
    const Config *c = &m->config;
    if (c->optimizer != MUON) {
        return;
    }

    // The mean of the gradients, and from it the direction, which takes the gradient's place: what the mean would be after
    // one more gradient like this one (Nesterov).
    real keep = (real)MUON_MOMENTUM, part = 1 - keep;
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        size_t at = t->offset, size = t->size;
        ranks_own_range(m, t, &at, &size);
        if (!takes_muon(c, t) || !size) {
            continue;
        }
        real *g = m->memory[GRADS] + at, *mean = m->memory[MOMENT1] + moment_offset(m, at);
#pragma omp parallel for if (size > 16384)
        for (size_t j = 0; j < size; j++) {
            real fresh = part * g[j] * gradient_scale;
            mean[j] = keep * mean[j] + fresh;
            g[j] = keep * mean[j] + fresh;
        }
        round_moments(m, i, at, size, step);
    }
    ranks_share_directions(m); // several processes: a matrix may have slices in two of them

    // The step itself.
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        size_t at = t->offset, size = t->size;
        ranks_own_range(m, t, &at, &size);
        if (!takes_muon(c, t) || !size) {
            continue;
        }
        int R = t->shape[1], C = t->shape[2], E = (int)(t->size / ((size_t)R * (size_t)C));
        real *w = m->memory[WEIGHTS] + at, *direction = m->memory[GRADS] + at;
        orthogonalize(m, m->memory[GRADS] + t->offset, E, R, C);
        blend(w, direction, 1 - lr * c->weight_decay, -lr * MUON_STEP * sqrt(max_int(R, C)), size);
        memset(m->memory[GRADS] + t->offset, 0, t->size * sizeof(real)); // for the next step
    }
}
