// Muon, the optimizer of the matrices of the layers (--optimizer muon).
// Gives, for both twins: MUON_TURNS, MUON_STEP, MUON_ROUNDS, muon_polynomial, takes_muon, move_mean, matrix_scale, has_turn;
// and Matrix, matrix_memory, prepare_matrix, orthogonalize, most_muon_scratch, muon_update.
// Needs: Model, its scratch memory and the products of train_moe.c, which includes it; moments.h, tables.h, precision.h, offload.h,
// ranks/gradients.h.
//
// AdamW divides each number of a gradient by its own usual size. Muon (Jordan et al. 2024, "Muon: An optimizer for hidden
// layers in neural networks") looks at the matrix as a whole. The mean gradient of a matrix is mostly a sum of few strong
// directions; beside them many weak ones hardly move. Written as U S V^T, the singular value decomposition, S has
// how strong each direction is; all move alike if the step is U V^T, where every strength is 1. The gradient (10 0; 0 0.1), for
// example, becomes (1 0; 0 1). Vectors, embeddings, tables and the router keep AdamW.
//
// U V^T needs no decomposition. For a matrix X whose singular values s are between 0 and 1, the matrix
//     a X + (b X X^T + c (X X^T)^2) X
// has the same U and V, and the singular values a s + b s^3 + c s^5. Three such rounds bring all that are at least 0.02 to
// 0.9 .. 1.1, and make the smaller ones 55 times as large. In each round a, b and c are those of the polynomial that is
// nearest to 1 over the range that the round before has left, which for the first is 0.02 .. 1 (Amsel et al. 2025, The Polar
// Express; Jordan's five rounds with one polynomial cost two thirds more, and reach 0.7 .. 1.2).
//
// A matrix moves in every eighth step, eight times as far; the others wait for their turn, and only their means go on. Turns
// are counted by tensor and expert, so that the experts' work is spread over the steps. For a mixture this is what makes
// Muon cheap: an expert sees few of a step's tokens, so to orthogonalise all experts each time would cost more than to
// train them. What it costs in bits per byte is within what seeds differ by (doc/clock.md).
//
// The step is scaled by 0.1 sqrt(max(R, C)), with which its numbers are about half as large as those of AdamW's steps, so
// that one --lr and one --weight-decay serve both (after Liu et al. 2025, Muon is Scalable for LLM Training, section 2.2).
#pragma once
#include "moments.h"

#define MUON_MOMENTUM 0.95 // memory of the mean gradient
#define MUON_TURNS    8    // steps in which each matrix moves once
#define MUON_STEP     0.1  // times the root of the larger side: the scale of a step
#define MUON_ROUNDS   3
const double muon_polynomial[MUON_ROUNDS][3] = {
    {7.711, -22.1138, 16.2487},
    {3.2153, -2.4112, 0.5013},
    {2.2183, -1.594, 0.4107},
};

// Is this tensor one of Muon's? Routers are not, also those of experts in attention, nor what they are made of (rmoe's "project", dev/routers/recurrent.h).
int takes_muon(const Config *c, const Tensor *t) {
    int is_matrix = t->layer >= 0 && t->dims > 1 && !t->looked_up;
    if (c->optimizer != MUON || !t->trained || !is_matrix) {
        return 0;
    }
    return !strstr(t->kind, "router") && strcmp(t->kind, "project");
}

// Moves one number of the mean gradient; the gradient becomes the direction, which is what the mean would be after one more
// gradient like this one (Nesterov). scale: what clipping multiplies the gradient by.
BOTH void move_mean(real *mean, real *gradient, real scale) {
    const real keep = (real)MUON_MOMENTUM, fresh = (1 - keep) * *gradient * scale;
    *mean = keep * *mean + fresh;
    *gradient = keep * *mean + fresh;
}

// What a matrix is multiplied by before the first round; sum: of its squares. The root of the sum is at least as large as
// the largest singular value, so 1.01 times it brings all of them below 1, beyond which the polynomials rise steeply. What is
// nearly 0 becomes 0, so that nothing overflows.
BOTH real matrix_scale(double sum) {
    return (real)(sum > 1e-60 ? 1 / (1.01 * sqrt(sum)) : 0);
}

// to = a * to + b * from, for n numbers. Inside of a parallel region, each thread does its part.
void blend(real *to, const real *from, double a, double b, size_t n) {
#pragma omp for schedule(static) nowait
    for (size_t j = 0; j < n; j++) {
        to[j] = (real)a * to[j] + (real)b * from[j];
    }
}

// A matrix x (R,C) that will become U V^T, and what that needs. Of X X^T and X^T X the smaller one is taken: a polynomial of
// X^T X to the right of X gives the same as the polynomial of X X^T to the left.
typedef struct Matrix {
    real *x;
    int R, C, small;
    real *gram, *square, *moved; // (small,small) twice, (R,C)
} Matrix;

// Numbers of memory that a matrix (R,C) needs besides itself.
size_t matrix_memory(int R, int C) {
    size_t small = (size_t)min_int(R, C);
    return 2 * small * small + (size_t)R * (size_t)C;
}

// Prepares x, with memory of matrix_memory(R, C) numbers.
Matrix prepare_matrix(real *x, int R, int C, real *memory) {
    int small = min_int(R, C);
    size_t squares = (size_t)small * (size_t)small, size = (size_t)R * (size_t)C;
    Matrix matrix = {x, R, C, small, memory, memory + squares, memory + 2 * squares};
    about_to_pass(x, size); // --offload
    real scale = matrix_scale(sum_of_squares(x, size));
    for (size_t j = 0; j < size; j++) {
        x[j] *= scale;
    }
    return matrix;
}

// Each matrix of the list becomes U V^T, nearly.
void orthogonalize(Matrix *list, int count) {
    for (int round = 0; round < MUON_ROUNDS; round++) {
        const double *p = muon_polynomial[round];

        // gram = X^T X, or X X^T
        begin_products();
        for (int i = 0; i < count; i++) {
            Matrix *a = &list[i];
            if (a->R > a->C) {
                memset(a->gram, 0, (size_t)a->small * (size_t)a->small * sizeof(real));
                matmul_dw(a->gram, a->x, a->x, a->R, a->C, a->C);
            } else {
                matmul(a->gram, a->x, a->x, a->R, a->C, a->R, SET);
            }
        }
        end_products();

        // square = b gram + c gram gram, where gram is its own transpose
        begin_products();
        for (int i = 0; i < count; i++) {
            Matrix *a = &list[i];
            matmul(a->square, a->gram, a->gram, a->small, a->small, a->small, SET);
        }
        end_products();
#pragma omp parallel
        for (int i = 0; i < count; i++) {
            blend(list[i].square, list[i].gram, p[2], p[1], (size_t)list[i].small * (size_t)list[i].small);
        }

        // moved = X square, or square X
        begin_products();
        for (int i = 0; i < count; i++) {
            Matrix *a = &list[i];
            if (a->R > a->C) {
                matmul(a->moved, a->x, a->square, a->R, a->C, a->C, SET);
            } else {
                matmul_dx(a->moved, a->square, a->x, a->R, a->C, a->R, SET);
            }
        }
        end_products();

        // X = a X + moved
#pragma omp parallel
        for (int i = 0; i < count; i++) {
            blend(list[i].x, list[i].moved, p[0], 1, (size_t)list[i].R * (size_t)list[i].C);
        }
    }
}

// Is it the turn of matrix e of tensor i? e counts the experts of all processes.
BOTH int has_turn(int i, int e, int step) {
    return (i + e + step) % MUON_TURNS == 0;
}

// Numbers of scratch memory that the matrices take whose turn it is in this step.
size_t muon_scratch(const Model *m, int step) {
    size_t need = 0;
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        size_t one = (size_t)t->shape[1] * (size_t)t->shape[2];
        for (size_t from = 0; takes_muon(&m->config, t) && from < t->size; from += one) {
            need += has_turn(i, (int)((t->first + from) / one), step) ? matrix_memory(t->shape[1], t->shape[2]) : 0;
        }
    }
    return need;
}

// The most of it that any step takes.
size_t most_muon_scratch(const Model *m) {
    size_t most = 0;
    for (int step = 0; step < MUON_TURNS; step++) {
        size_t need = muon_scratch(m, step);
        most = need > most ? need : most;
    }
    return most;
}

// The means of the gradients and the directions. An expert without tokens has no gradient and so no direction, and its mean
// waits, else it would move on for ever along what it saw last; if it is its turn, the turn passes, and only its weights decay.
void mean_gradients(Model *m, int step, real gradient_scale) {
#pragma omp parallel // each thread does its part of every tensor, and does not wait for the others between two
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        size_t at = t->offset, size = t->size;
        ranks_own_range(m, t, &at, &size);
        if (!takes_muon(&m->config, t) || !size) {
            continue;
        }
        real *g = m->memory[GRADS] + at, *mean = m->memory[MOMENT1] + moment_offset(m, at);
        Rounding rounding = rounding_of(m, i, at, step);
        size_t piece = t->of_experts ? (size_t)t->shape[1] * (size_t)t->shape[2] : 1024;
#pragma omp for schedule(static) nowait
        for (size_t from = 0; from < size; from += piece) {
            size_t end = from + piece < size ? from + piece : size;
            about_to_pass(g + from, end - from); // --offload
            about_to_pass(mean + from, end - from);
            int waits = t->of_experts && !has_gradient(g + from, piece);
            for (size_t j = from; j < end && !waits; j++) {
                move_mean(&mean[j], &g[j], gradient_scale);
            }
            round_moments(&rounding, mean + from, NULL, from, end - from);
            passed_over(g + from, end - from);
            passed_over(mean + from, end - from);
        }
    }
}

// The matrices whose turn it is, prepared; returns how many. A process works out all of a matrix, also where it updates
// only a part of it.
int matrices_in_turn(Model *m, int step, Matrix *list) {
    int count = 0;
    scratch_reset(m);
    real *memory = scratch(m, muon_scratch(m, step));
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        size_t at = t->offset, size = t->size, one = (size_t)t->shape[1] * (size_t)t->shape[2];
        ranks_own_range(m, t, &at, &size);
        for (size_t from = 0; takes_muon(&m->config, t) && size && from < t->size; from += one) {
            if (has_turn(i, (int)((t->first + from) / one), step)) {
                Matrix matrix = {m->memory[GRADS] + t->offset + from, t->shape[1], t->shape[2], 0, memory, NULL, NULL};
                list[count++] = matrix;
                memory += matrix_memory(t->shape[1], t->shape[2]);
            }
        }
    }
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < count; i++) {
        list[i] = prepare_matrix(list[i].x, list[i].R, list[i].C, list[i].gram);
    }
    return count;
}

// --offload: the weights j .. j+n do not stay in memory. Inside of a parallel region, when all threads have done with them.
void let_go_together(const Model *m, size_t j, size_t n) {
    if (m->config.offload) {
#pragma omp barrier
#pragma omp single nowait
        passed_over(m->memory[WEIGHTS] + j, n);
    }
}

// A step of Muon for all its tensors; their gradients are cleared. gradient_scale: what clipping multiplies them by.
void muon_update(Model *m, int step, double lr, real gradient_scale) {
    const Config *c = &m->config;
    if (c->optimizer != MUON) {
        return;
    }
    multiply_in(PRODUCTS_FP32); // also with --precision bf16
    mean_gradients(m, step, gradient_scale);
    ranks_share_directions(m); // several processes: a matrix may have slices in two of them
    int most = 0;
    for (int i = 0; i < m->tensor_count; i++) {
        most += m->tensors[i].shape[0];
    }
    Matrix *list = (Matrix *)allocate(most, sizeof(Matrix));
    orthogonalize(list, matrices_in_turn(m, step, list));
    free(list);

    double far = MUON_TURNS * lr; // the steps of all turns at once
#pragma omp parallel
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        size_t at = t->offset, size = t->size, one = (size_t)t->shape[1] * (size_t)t->shape[2];
        ranks_own_range(m, t, &at, &size);
        if (!takes_muon(c, t) || !size) {
            continue;
        }
        double rate = far * MUON_STEP * sqrt(max_int(t->shape[1], t->shape[2]));
        for (size_t from = at - t->offset, end = from + size, next; from < end; from = next) {
            next = from / one * one + one < end ? from / one * one + one : end; // what is left of this matrix
            if (has_turn(i, (int)((t->first + from) / one), step)) {
                size_t j = t->offset + from;
                about_to_pass(m->memory[WEIGHTS] + j, next - from);
                blend(m->memory[WEIGHTS] + j, m->memory[GRADS] + j, 1 - far * c->weight_decay, -rate, next - from);
                let_go_together(m, j, next - from);
            }
        }
    }
#pragma omp parallel for schedule(dynamic) // for the next step
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        size_t one = (size_t)t->shape[1] * (size_t)t->shape[2];
        for (size_t from = 0; takes_muon(c, t) && from < t->size; from += one) {
            real *g = m->memory[GRADS] + t->offset + from;
            memset(g, 0, one * sizeof(real));
            passed_over(g, one);
        }
    }
}
