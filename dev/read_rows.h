// AdamW for a whole tensor, by all threads; of tables that are looked up (dev/lookup.h), only the rows that a step has read.
// Gives: TABLE_RATE, adamw_of_read_rows, adamw_of_tensor. Needs: has_gradient() of lookup.h; moment_offset() of
// ranks/gradients.h; Model, Adam and adamw() of train_moe.c, which includes it.
//
// A row that no token of a step has looked up has no gradient. Let alone, it keeps its moments until it is read again. If
// they faded at each step, the next step of a rare word would be too long; and a large table would cost as much time as
// all other weights. The moments are corrected for having begun at 0 by the number of the step; a row that is read for the
// first time late moves by (1 - beta1) / sqrt(1 - beta2) of the rate, which with the defaults is 1.
//
// A row is read now and then, so it learns little at each --lr; three times that was best (doc/clock.md).
#pragma once

#define TABLE_RATE 3 // times the learning rate

// AdamW for `size` numbers, from number `first` of a table with rows of C on. All gradients of the table are in memory,
// since the numbers of one process need not begin or end with a row. Inside of a parallel region, each thread does its part.
void adamw_of_read_rows(real *w, real *g, real *m1, real *m2, size_t first, size_t size, int C, Adam a) {
    size_t width = (size_t)C, from = first / width, until = (first + size + width - 1) / width;
    const real *table = g - first;
#pragma omp for schedule(static) nowait
    for (size_t row = from; row < until; row++) {
        if (has_gradient(table + row * width, width)) {
            size_t begin = row * width > first ? row * width - first : 0;
            size_t end = (row + 1) * width - first < size ? (row + 1) * width - first : size;
            adamw(w + begin, g + begin, m1 + begin, m2 + begin, end - begin, a);
        }
    }
}

// AdamW for the numbers at .. at+size of tensor t, or those of them that have been read. Inside of a parallel region, each
// thread does its part and does not wait for the others.
void adamw_of_tensor(Model *m, const Tensor *t, size_t at, size_t size, Adam a) {
    real *w = m->memory[WEIGHTS] + at, *g = m->memory[GRADS] + at;
    real *m1 = m->memory[MOMENT1] + moment_offset(m, at), *m2 = m->memory[MOMENT2] + moment_offset(m, at);
    if (t->looked_up) {
        a.rate *= TABLE_RATE;
        adamw_of_read_rows(w, g, m1, m2, at - t->offset, size, t->shape[2], a);
        return;
    }
    size_t piece = 1024;
#pragma omp for schedule(static) nowait
    for (size_t j = 0; j < size; j += piece) {
        adamw(w + j, g + j, m1 + j, m2 + j, size - j < piece ? size - j : piece, a);
    }
}
