// Several processes: the gradients of tables that are looked up. Only the rows travel that any process has read.
// Gives: ranks_sum_tables; for the CUDA twin unite_rows, count_read_numbers. Needs: comm.h, dev/tables.h; of train_moe.c the
// table of weights.
//
// Each process has a table as a whole, with its moments, and moves all rows that any of them has read: their sums are the
// same bits everywhere, which MPI promises for a sum that all get, and so the weights stay the same. Nothing of a table is
// sent after the update. (What all have in common and is no table, each updates a slice of: see gradients.h.)
#ifndef RANKS_TABLES_H
#define RANKS_TABLES_H
#include "../tables.h"

// The list becomes that of the rows that any process has read, in the same order on all of them.
void unite_rows(ReadRows *r) {
    double *size = (double *)allocate(ranks.size, sizeof(double));
    int *count = (int *)allocate(ranks.size, sizeof(int)), total = 0;
    size[ranks.rank] = r->count;
    sum_over_ranks(size, ranks.size);
    for (int rank = 0; rank < ranks.size; rank++) {
        count[rank] = (int)size[rank];
        total += count[rank];
    }
    int *all = (int *)gather_rows(r->list, count, sizeof(int));
    ranks.traffic.reduced += (double)((size_t)(total - r->count) * sizeof(int));
    forget_rows(r);
    note_rows(r, all, total);
    free(all);
    free(count);
    free(size);
}

// The numbers of all rows that were read, of all tables.
size_t count_read_numbers(const Model *m) {
    size_t numbers = 0;
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        numbers += t->looked_up ? (size_t)rows_of_table(m, t)->count * (size_t)t->shape[2] : 0;
    }
    return numbers;
}

// Copies the gradients of all rows that were read out of the tables, one row behind the other, or with `back` into them.
void pack_read_rows(Model *m, real *packed, int back) {
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        const ReadRows *r = t->looked_up ? rows_of_table(m, t) : NULL;
        size_t C = (size_t)t->shape[2];
        for (int j = 0; r && j < r->count; j++) {
            real *row = m->memory[GRADS] + t->offset + (size_t)r->list[j] * C;
            memcpy(back ? row : packed, back ? packed : row, C * sizeof(real));
            packed += C;
        }
    }
}

// After the step's last backward: all processes have the same list of rows, and the sums of their gradients.
void ranks_sum_tables(Model *m) {
    for (int kind = BY_WORD; kind < TABLE_KINDS; kind++) {
        if (m->lookup->read[kind].rows) {
            unite_rows(&m->lookup->read[kind]);
        }
    }
    size_t numbers = count_read_numbers(m), most = largest_message / sizeof(real);
    real *packed = allocate_reals(numbers);
    pack_read_rows(m, packed, 0);
    for (size_t from = 0, n; from < numbers; from += n) {
        Request request;
        n = numbers - from < most ? numbers - from : most;
        start_sum_of_reals(packed + from, n, 0, &request);
        ranks_wait(&request, 1);
    }
    ranks.traffic.reduced += 2.0 * (ranks.size - 1) / ranks.size * (double)(numbers * sizeof(real)); // what a ring sends
    pack_read_rows(m, packed, 1);
    free(packed);
}

#endif
