// AdamW for a whole tensor, by all threads; of tables that are looked up (dev/tables.h), only the rows that a step has read.
// Gives: TABLE_RATE, adamw_of_read_rows, adamw_of_offloaded, adamw_of_tensor. Needs: dev/tables.h; dev/offload.h; dev/moments.h;
// moment_offset() of ranks/gradients.h; Model, Adam and adamw() of train_moe.c, which includes it.
//
// A row that no token of a step has looked up has no gradient. Let alone, it keeps its moments until it is read again. If
// they faded at each step, the next step of a rare word would be too long; and a large table would cost as much time as
// all other weights. The moments are corrected for having begun at 0 by the number of the step; a row that is read for the
// first time late moves by (1 - beta1) / sqrt(1 - beta2) of the rate, which with the defaults is 1.
//
// A row is read seldom, so it needs larger steps: three times --lr was best (doc/clock.md).
#pragma once
#include "moments.h"
#include "tables.h"

#define TABLE_RATE 3 // times the learning rate

// AdamW for those rows of a table, of C numbers, that are on the list and have a gradient. Inside of a parallel region, each
// thread does its part.
void adamw_of_read_rows(real *w, real *g, real *m1, real *m2, const ReadRows *r, int C, Adam a, const Rounding *rounding) {
    size_t width = (size_t)C;
#pragma omp for schedule(static) nowait
    for (int i = 0; i < r->count; i++) {
        size_t at = (size_t)r->list[i] * width, next = (size_t)r->list[min_int(i + LOOK_AHEAD, r->count - 1)] * width;
        fetch_row(w + next, width * sizeof(real));
        fetch_row(m1 + next, width * sizeof(real));
        fetch_row(m2 + next, width * sizeof(real));
        if (has_gradient(g + at, width)) {
            adamw(w + at, g + at, m1 + at, m2 + at, width, a);
        }
        round_moments(rounding, m1 + at, m2 + at, at, width);
    }
}

// AdamW for experts that are in a file (dev/offload.h): one after the other, while the next one is on its way. Of the arrays g, m1
// and m2 the pools are those of w's tensor. Inside of a parallel region, each thread does its part.
void adamw_of_offloaded(Pool *of_w, real *w, real *g, real *m1, real *m2, Adam a, const Rounding *rounding) {
    Pool *pools[] = {of_w, pool_of(g), pool_of(m1), pool_of(m2)};
    for (int e = 0; e < of_w->E; e++) {
#pragma omp single // and all wait for it, and in the loop for each other
        for (int i = 0; i < COUNT(pools); i++) {
            offloaded.asked++;
            take_in(pools[i], e);
            if (e + 1 < of_w->E && of_w->most > 1) {
                take_in(pools[i], e + 1);
            }
        }
        size_t begin = of_w->from[e], end = of_w->from[e + 1], piece = 1024;
#pragma omp for schedule(static)
        for (size_t j = begin; j < end; j += piece) {
            size_t n = end - j < piece ? end - j : piece;
            adamw(w + j, g + j, m1 + j, m2 + j, n, a);
            round_moments(rounding, m1 + j, m2 + j, j, n);
        }
    }
}

// AdamW for the numbers at .. at+size of tensor t, or those of them that have been read; then rounds their moments, if
// --moments asks for it. Inside of a parallel region, each thread does its part and does not wait for the others.
void adamw_of_tensor(Model *m, const Tensor *t, size_t at, size_t size, Adam a, int step) {
    real *w = m->memory[WEIGHTS] + at, *g = m->memory[GRADS] + at;
    real *m1 = m->memory[MOMENT1] + moment_offset(m, at), *m2 = m->memory[MOMENT2] + moment_offset(m, at);
    Rounding rounding = rounding_of(m, (int)(t - m->tensors), at, step);
    if (t->looked_up) {
        a.rate *= TABLE_RATE;
        adamw_of_read_rows(w, g, m1, m2, rows_of_table(m, t), t->shape[2], a, &rounding);
        return;
    }
    if (pool_of(w)) {
        adamw_of_offloaded(pool_of(w), w, g, m1, m2, a, &rounding);
        return;
    }
    size_t piece = 1024;
#pragma omp for schedule(static) nowait
    for (size_t j = 0; j < size; j += piece) {
        size_t n = size - j < piece ? size - j : piece;
        adamw(w + j, g + j, m1 + j, m2 + j, n, a);
        round_moments(&rounding, m1 + j, m2 + j, j, n);
    }
}
