// Muon, another optimizer for the matrices of the layers (--optimizer muon).
// Gives: ADAMW, MUON, muon_polynomial, takes_muon, prepare_matrices, orthogonalize, muon_update. Needs: Model, the grouped products, moments.h,
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

// to = a * to + b * from, for n numbers
void blend(real *to, const real *from, double a, double b, size_t n) {
#pragma omp parallel for if (n > 16384)
    for (size_t j = 0; j < n; j++) {
        to[j] = (real)a * to[j] + (real)b * from[j];
    }
}

// E matrices x (R,C) that will become U V^T, and what that needs. Of X X^T and X^T X the smaller one is taken: X S with S
// made of X^T X is the same as S X with S made of X X^T.
typedef struct Matrices {
    real *x;
    int E, R, C, small;
    real *gram, *square, *moved;         // (E,small,small) twice, (E,R,C)
    int *row, *small_row;                // (E+1)  where the rows of each x and of each gram begin
    int *rows, *columns, *smalls;        // (E)  R, C and small, as the grouped products want them
} Matrices;

// Prepares E matrices x (R,C), in scratch memory. Each is divided by the root of the sum of its squares; then no singular
// value is above 1.
Matrices prepare_matrices(Model *m, real *x, int E, int R, int C) {
    int small = min_int(R, C);
    size_t squares = (size_t)E * (size_t)small * (size_t)small, each = (size_t)R * (size_t)C;
    int *integers = (int *)arena_take(&m->scratch, 5 * (size_t)E + 2, sizeof(int));
    Matrices list = {x, E, R, C, small, scratch(m, squares), scratch(m, squares), scratch(m, (size_t)E * each),
                     integers, integers + E + 1, integers + 2 * E + 2, integers + 3 * E + 2, integers + 4 * E + 2};
    list.row[0] = list.small_row[0] = 0;
    for (int e = 0; e < E; e++) {
        list.row[e + 1] = (e + 1) * R;
        list.small_row[e + 1] = (e + 1) * small;
        list.rows[e] = R;
        list.columns[e] = C;
        list.smalls[e] = small;
    }
#pragma omp parallel for if (E > 1)
    for (int e = 0; e < E; e++) {
        double sum = 0;
        for (size_t j = e * each; j < (e + 1) * each; j++) {
            sum += (double)x[j] * (double)x[j];
        }
        real scale = (real)(sum > 0 ? 1 / sqrt(sum) : 0);
        for (size_t j = e * each; j < (e + 1) * each; j++) {
            x[j] *= scale;
        }
    }
    return list;
}

// Each matrix of the list becomes U V^T, nearly. The products run over all of them together, as if each were an expert.
void orthogonalize(Matrices *list, int count) {
    for (int round = 0; round < MUON_ROUNDS; round++) {
        const double *p = muon_polynomial[round];

        // gram = X^T X, or X X^T
        begin_products();
        for (int i = 0; i < count; i++) {
            Matrices *a = &list[i];
            if (a->R > a->C) {
                memset(a->gram, 0, (size_t)a->E * (size_t)a->small * (size_t)a->small * sizeof(real));
                grouped_matmul_dw(a->gram, a->x, NULL, a->x, NULL, a->row, a->E, a->columns, a->columns);
            } else {
                grouped_matmul(a->gram, a->x, NULL, a->x, a->row, a->E, a->columns, a->rows);
            }
        }
        end_products();

        // square = b gram + c gram gram, where gram is its own transpose
        begin_products();
        for (int i = 0; i < count; i++) {
            Matrices *a = &list[i];
            grouped_matmul(a->square, a->gram, NULL, a->gram, a->small_row, a->E, a->smalls, a->smalls);
        }
        end_products();
        for (int i = 0; i < count; i++) {
            size_t squares = (size_t)list[i].E * (size_t)list[i].small * (size_t)list[i].small;
            blend(list[i].square, list[i].gram, p[2], p[1], squares);
        }

        // X = a X + X square, or a X + square X
        begin_products();
        for (int i = 0; i < count; i++) {
            Matrices *a = &list[i];
            if (a->R > a->C) {
                grouped_matmul(a->moved, a->x, NULL, a->square, a->row, a->E, a->columns, a->columns);
            } else {
                grouped_matmul_dx(a->moved, a->square, NULL, a->x, a->small_row, a->E, a->columns, a->rows);
            }
        }
        end_products();
        for (int i = 0; i < count; i++) {
            blend(list[i].x, list[i].moved, p[0], 1, (size_t)list[i].E * (size_t)list[i].R * (size_t)list[i].C);
        }
    }
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

    // The step itself, layer by layer. A process works out all of a matrix, also where it updates only a part of it.
    for (int l = 0; l < c->layers; l++) {
        Matrices list[16];
        int count = 0;
        scratch_reset(m);
        for (int i = 0; i < m->tensor_count; i++) {
            const Tensor *t = &m->tensors[i];
            size_t at = t->offset, size = t->size;
            ranks_own_range(m, t, &at, &size);
            if (t->layer == l && takes_muon(c, t) && size) {
                int R = t->shape[1], C = t->shape[2], E = (int)(t->size / ((size_t)R * (size_t)C));
                list[count++] = prepare_matrices(m, m->memory[GRADS] + t->offset, E, R, C);
            }
        }
        orthogonalize(list, count);
    }
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        size_t at = t->offset, size = t->size;
        ranks_own_range(m, t, &at, &size);
        if (takes_muon(c, t) && size) {
            double rate = lr * MUON_STEP * sqrt(max_int(t->shape[1], t->shape[2]));
            blend(m->memory[WEIGHTS] + at, m->memory[GRADS] + at, 1 - lr * c->weight_decay, -rate, size);
            memset(m->memory[GRADS] + t->offset, 0, t->size * sizeof(real)); // for the next step
        }
    }
}
