// Tables of which a token looks up one row: which of their rows has a step read?
// Gives: NO_TABLE, BY_WORD, BY_NGRAM, ReadRows, Lookup, allocate_lookup, note_rows, forget_rows, forget_read_rows,
// rows_of_table, has_gradient, squares_of_read_rows. Needs: util.h, memory.h; Tensor and Model of train_moe.c, which includes it.
//
// A step reads a few hundred rows, and a table may have a million. All that a step does to gradients, moments and
// weights of a table, it does to the rows of this list alone: so a large table costs no more time than a small one
// (doc/ngrams.md). What is never touched takes no memory of the machine either, since the system gives a page when
// it is first written.
#pragma once
#include "util.h"

// Tensor.looked_up: by what does a token find its row? By its word, or by the last two or three words (--ngrams).
enum { NO_TABLE, BY_WORD, BY_NGRAM, TABLE_KINDS };

// The rows that were read since the last update, in the order in which they were read first.
typedef struct ReadRows {
    int rows;   // of the table; 0: there is none of this kind
    int count;
    int *list;  // (count), with memory for all rows
    int *place; // (rows)  1 + where the row stands in the list; 0: it was not read
} ReadRows;

// What a model needs to look up its tables (dev/lookup.h, dev/ngrams.h).
typedef struct Lookup {
    ReadRows read[TABLE_KINDS]; // training only
    int *row;                   // (orders, N) with --ngrams: each token's row by its pair of words; then that by its triple
    real *sum, *dsum;           // (N,C) with --ngram-gate: the sum of a token's rows, and the gradient by it
} Lookup;

// Memory for what Lookup lists, for N tokens. The lists have memory for all rows, of which a run touches what it uses.
void allocate_lookup(Model *m, int N, int train) {
    const Config *c = &m->config;
    const int rows[TABLE_KINDS] = {0, c->value_embedding ? c->vocab : 0, c->ngrams};
    Lookup *lookup = m->lookup = (Lookup *)own(m, 1, sizeof(Lookup));
    for (int kind = BY_WORD; kind < TABLE_KINDS && train; kind++) {
        ReadRows *r = &lookup->read[kind];
        r->rows = rows[kind];
        r->list = (int *)own(m, (size_t)2 * rows[kind], sizeof(int));
        r->place = r->list + rows[kind];
    }
    size_t gated = c->ngram_gate ? (size_t)N * c->dim : 0;
    lookup->row = (int *)own(m, c->ngrams ? (size_t)N * (c->ngram_order - 1) : 0, sizeof(int));
    lookup->sum = own_reals(m, gated);
    lookup->dsum = own_reals(m, train ? gated : 0);
}

// Rows of a large table are rarely in a cache, and each lies somewhere else. So a loop over rows asks for a row of `bytes`
// this many turns before it needs it: then the memory brings several at a time.
#define LOOK_AHEAD 8

void fetch_row(const void *row, size_t bytes) {
    for (size_t at = 0; at < bytes; at += 64) {
        __builtin_prefetch((const char *)row + at);
    }
}

// Puts those of n rows that are new onto the list.
void note_rows(ReadRows *r, const int *row, int n) {
    for (int i = 0; i < n; i++) {
        if (!r->place[row[i]]) {
            r->list[r->count++] = row[i];
            r->place[row[i]] = r->count;
        }
    }
}

void forget_rows(ReadRows *r) {
    for (int i = 0; i < r->count; i++) {
        r->place[r->list[i]] = 0;
    }
    r->count = 0;
}

// All lists, after an update.
void forget_read_rows(Model *m) {
    for (int kind = BY_WORD; kind < TABLE_KINDS; kind++) {
        forget_rows(&m->lookup->read[kind]);
    }
}

ReadRows *rows_of_table(const Model *m, const Tensor *t) {
    return &m->lookup->read[t->looked_up];
}

// Are any of these n gradients not 0? If all are 0, nothing that these weights belong to, a row of a table or an expert, had
// a part in the step.
int has_gradient(const real *g, size_t n) {
    int any = 0;
    for (size_t j = 0; j < n; j++) {
        any |= g[j] != 0;
    }
    return any;
}

// The sum of the squares of all tables' gradients. Chunks of rows are summed by the threads and added in order, so any
// number of threads gives the same bits.
double squares_of_read_rows(const Model *m) {
    enum { CHUNK = 64 }; // rows
    double total = 0;
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        if (!t->looked_up) {
            continue;
        }
        const ReadRows *r = rows_of_table(m, t);
        const real *g = m->memory[GRADS] + t->offset;
        size_t C = (size_t)t->shape[2];
        int chunks = div_up(r->count, CHUNK);
        double *part = (double *)allocate(chunks, sizeof(double));
#pragma omp parallel for if (r->count * C > 16384)
        for (int chunk = 0; chunk < chunks; chunk++) {
            for (int j = chunk * CHUNK; j < min_int(r->count, (chunk + 1) * CHUNK); j++) {
                const real *row = g + (size_t)r->list[j] * C;
                fetch_row(g + (size_t)r->list[min_int(j + LOOK_AHEAD, r->count - 1)] * C, C * sizeof(real));
                for (size_t c = 0; c < C; c++) {
                    part[chunk] += (double)row[c] * (double)row[c];
                }
            }
        }
        for (int chunk = 0; chunk < chunks; chunk++) {
            total += part[chunk];
        }
        free(part);
    }
    return total;
}
