// Muon, another optimizer for the matrices of the layers (--optimizer muon).
// Gives: ADAMW, MUON, takes_muon, orthogonalize, muon_update, muon_scratch. Needs: Model, the grouped products, moments.h,
// ranks/gradients.h; train_moe.c includes it.
//
// AdamW divides each number of a gradient by its own usual size. Muon (Jordan et al. 2024, "Muon: An optimizer for hidden
// layers in neural networks") looks at the matrix as a whole. The mean gradient of a matrix is mostly a sum of few strong
// directions; beside them many weak ones hardly move. With its singular values, U S V^T, all directions move alike if the
// step is U V^T: every singular value becomes 1. Vectors, embeddings, tables and the router keep AdamW.
//
// U V^T needs no decomposition. For a matrix X whose singular values s are between 0 and 1, the matrix
//     a X + (b X X^T + c (X X^T)^2) X
// has the same U and V, and the singular values a s + b s^3 + c s^5. The a, b and c below bring all that are not tiny to
// 0.7 .. 1.2 within five rounds, which is near enough to 1.
//
// The step is scaled by 0.2 sqrt(max(R, C)), with which its numbers are about as large as those of AdamW's steps, so that
// one --lr and one --weight-decay serve both (Liu et al. 2025, Muon is Scalable for LLM Training, section 2.2).
#pragma once
#include "moments.h"

enum { ADAMW, MUON };
#define MUON_MOMENTUM 0.95 // memory of the mean gradient
#define MUON_ROUNDS   5

// Is this tensor one of Muon's?
int takes_muon(const Config *c, const Tensor *t) {
    return c->optimizer == MUON && t->trained && t->layer >= 0 && t->dims > 1 && !t->looked_up && strcmp(t->kind, "router");
}

// Numbers of scratch memory that orthogonalize() takes.
size_t muon_scratch(int E, int R, int C) {
    size_t small = (size_t)min_int(R, C);
    return (size_t)E * (2 * small * small + (size_t)R * (size_t)C) + 64;
}

// Divides each of the E matrices of x, of `size` numbers each, by the root of the sum of its squares. Then no singular
// value is above 1. What is nearly 0 becomes 0: the mean gradient of an expert that has been idle for a thousand steps.
void divide_by_norm(real *x, int E, size_t size) {
    for (int e = 0; e < E; e++) {
        double sum = sum_of_squares(x + (size_t)e * size, size);
        real scale = (real)(sum > 1e-60 ? 1 / sqrt(sum) : 0);
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
    const double a = 3.4445, b = -4.7750, c = 2.0315;
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
        if (tall) {
            memset(gram, 0, squares * sizeof(real));
            grouped_matmul_dw(gram, x, NULL, x, NULL, row, E, columns, columns); // X^T X
        } else {
            grouped_matmul(gram, x, NULL, x, row, E, columns, rows); // X X^T
        }
        grouped_matmul(square, gram, NULL, gram, small_row, E, smalls, smalls); // its square, since it is symmetric
        blend(square, gram, c, b, squares);
        if (tall) {
            grouped_matmul(moved, x, NULL, square, row, E, columns, columns);
        } else {
            grouped_matmul_dx(moved, square, NULL, x, small_row, E, columns, rows);
        }
        blend(x, moved, a, 1, size);
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
        blend(w, direction, 1 - lr * c->weight_decay, -lr * 0.2 * sqrt(fmax(R, C)), size);
        memset(m->memory[GRADS] + t->offset, 0, t->size * sizeof(real)); // for the next step
    }
}
