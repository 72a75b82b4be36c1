// Several processes: all have the common weights, sum up their gradients, and each updates a share of them.
// Gives: ranks_lay_out, moment_offset, ranks_layer_done, ranks_sum_of_squares, ranks_own_range, ranks_share_directions,
// ranks_share_weights.
// Needs: comm.h, experts.h, copies.h; of train_moe.c the table of weights.
//
// Gradients are summed while backward still runs. Those of experts set out as soon as their layer is done. Those of
// the common weights are put together to buckets, and a bucket sets out when it is full. Then each process updates
// one slice of the common weights, and keeps the moments of that slice only (ZeRO-1: Rajbhandari et al. 2020).
#ifndef RANKS_GRADIENTS_H
#define RANKS_GRADIENTS_H
#include "copies.h"
#include "compressed_sums.h"
#include "staged_sums.h"
#include "tables.h"

size_t bucket = 1 << 20; // numbers

// ---- where weights and moments are

// Divides the experts among the members of a group, and lays out the memory of this process: first the common
// weights, filled up so that they divide evenly into slices of a multiple of 16 numbers; then its own experts, each
// tensor with memory for as many copies as it may get, of the largest size; then the tables that are looked up, which each
// process has as a whole, with their moments. Each tensor begins at a multiple of `unit` numbers.
void ranks_lay_out(Model *m, size_t unit) {
    const Config *c = &m->config;
    if (!MANY) {
        return;
    }
    size_t even = (unit > 16 ? unit : 16) * (size_t)ranks.size;
    m->common = (m->common + even - 1) / even * even;
    Crossing *x = m->crossing = (Crossing *)own(m, 1, sizeof(Crossing));
    x->slice = m->common / (size_t)ranks.size * (size_t)ranks.rank;
    x->slice_end = x->slice + m->common / (size_t)ranks.size;

    int each = c->experts / ranks.ep, first = ranks.member * each;
    size_t at = m->common;
    for (int i = 0; i < m->tensor_count; i++) {
        Tensor *t = &m->tensors[i];
        size_t largest = 0;
        if (!t->of_experts) {
            continue;
        }
        t->size = 0;
        for (int e = 0; e < c->experts; e++) {
            size_t size = expert_size(c, t, e);
            t->first += e < first ? size : 0;
            t->size += e >= first && e < first + each ? size : 0;
            largest = size > largest ? size : largest;
        }
        t->offset = at;
        at += (t->size + largest * (size_t)c->replicate + unit - 1) / unit * unit;
    }
    for (int i = 0; i < m->tensor_count; i++) {
        Tensor *t = &m->tensors[i];
        t->offset = t->looked_up ? t->offset - m->tables + at : t->offset;
    }
    m->size = m->size - m->tables + at;
    m->tables = at;
}

// Where the moments of the weight at this offset are: those of the slice come first, then those of experts and tables.
size_t moment_offset(const Model *m, size_t offset) {
    if (!MANY) {
        return offset;
    }
    const Crossing *x = m->crossing;
    return offset < m->common ? offset - x->slice : offset - m->common + x->slice_end - x->slice;
}

// ---- sums of gradients

Request sums[4096]; // under way
int sum_count = 0;

void await_messages(void) {
    if (sum_count > 0) {
        ranks_wait(sums, sum_count);
        sum_count = 0;
    }
}

void await_sums(Model *m) {
    await_compressed_sums(m);
    await_messages();
    unstage();
}

// Begins to sum the gradients from .. end of all processes, or with `peers` of those that have the same experts.
void start_sum(Model *m, size_t from, size_t end, int peers) {
    int sharing = peers ? ranks.groups : ranks.size;
    size_t most = largest_message / sizeof(real);
    real *g = m->memory[GRADS] + from;
    Pool *pool = sharing > 1 ? pool_of(g) : NULL; // --offload
    if (m->config.compress) {
        start_compressed_sum(m, from, end, peers);
        from = end;
    } else if (pool) {
        g = stage(g, end - from);
    }
    if (pool) {
        let_go(pool);
    }
    while (from < end && sharing > 1) {
        size_t n = end - from < most ? end - from : most;
        if (sum_count == COUNT(sums)) {
            await_messages();
        }
        ranks.traffic.reduced += 2.0 * (sharing - 1) / sharing * (double)(n * sizeof(real)); // what a ring sends
        start_sum_of_reals(g, n, peers, &sums[sum_count++]);
        from += n;
        g += n;
    }
}

// Layer l is done in backward, -1: all is. Begins those sums that can begin now; `start` is start_sum, or that of
// the CUDA twin. *from: the sums of the common gradients from this number on have begun. Backward goes from the last
// layer to the first, so it goes down; the embedding's gradients come first in memory.
void sum_layer(Model *m, int l, size_t *from, void (*start)(Model *m, size_t from, size_t end, int peers)) {
    size_t begin = l < 0 ? 0 : m->common; // of the layer's first tensor, in the end
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        if (t->layer != l || l < 0) {
            continue;
        }
        if (!t->of_experts) {
            begin = t->offset < begin ? t->offset : begin;
        } else if (!m->config.replicate) {
            start(m, t->offset, t->offset + t->size, 1);
        }
    }
    if (begin < *from && (l < 0 || *from - begin >= bucket)) {
        start(m, begin, *from, 0);
        *from = begin;
    }
}

// Where the common tensors behind those of all layers begin: the last norm, and what the whole model has.
size_t behind_layers(const Model *m) {
    size_t at = m->common;
    for (int i = m->tensor_count - 1; m->tensors[i].layer < 0; i--) {
        at = m->tensors[i].offset;
    }
    return at;
}

// What the step's last backward calls when it has done with layer l; at its end with -1.
void ranks_layer_done(Model *m, int l) {
    if (!MANY || !m->batch.last) {
        return;
    }
    size_t tail = behind_layers(m);
    if (l == m->config.layers - 1) {
        m->crossing->summing = tail;
    }
    if (staged_count && l >= 0) { // --offload: all sums that are under way must come first, those of common weights, too
        await_sums(m);
    }
    sum_layer(m, l, &m->crossing->summing, start_sum);
    if (l >= 0) {
        return;
    }
    start_sum(m, tail, m->common, 0);
    if (has_copies(m)) {
        exchange_copies(m, GRADS);
        start_sum(m, m->common, m->tables, 1); // those of copies are 0 by now
    }
    ranks_sum_tables(m);
}

// The sum of the squares of g (n), of which those that lie in a file (--offload) do not stay in memory. In a build of plain loops it
// runs from the first number to the last, as sum_of_squares() does; the fast function of that name gives each piece back by itself.
double squares_of(const real *g, size_t n) {
#ifdef PLAIN
    const size_t piece = 1 << 18;
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += (double)g[i] * (double)g[i];
        if ((i + 1) % piece == 0 || i + 1 == n) {
            passed_over(g + i / piece * piece, i % piece + 1);
        }
    }
    return sum;
#else
    return squares_in_chunks(g, n, 1);
#endif
}

// Of all gradients but those of tables. Each process adds up those of its slice and of its experts, which `groups` processes
// have.
double ranks_sum_of_squares(Model *m) {
    const real *g = m->memory[GRADS];
    if (!MANY) {
        return squares_of(g, m->config.lora ? m->pairs : m->tables);
    }
    const Crossing *x = m->crossing;
    await_sums(m);
    double total = squares_of(g + x->slice, x->slice_end - x->slice);
    total += squares_of(g + m->common, m->tables - m->common) / ranks.groups;
    sum_over_ranks(&total, 1);
    return total;
}

// ---- the update

// Of a tensor that lies at *at and has *size numbers: those that this process updates. All update the tables.
void ranks_own_range(const Model *m, const Tensor *t, size_t *at, size_t *size) {
    if (MANY && !t->of_experts && !t->looked_up) {
        const Crossing *x = m->crossing;
        size_t end = t->offset + t->size < x->slice_end ? t->offset + t->size : x->slice_end;
        *at = t->offset > x->slice ? t->offset : x->slice;
        *size = end > *at ? end - *at : 0;
    }
}

// --optimizer muon: each process has turned the gradients of its slice into directions; all get those of the others.
void ranks_share_directions(Model *m) {
    if (MANY) {
        size_t slice = m->crossing->slice_end - m->crossing->slice;
        ranks.traffic.reduced += (double)(slice * sizeof(real)) * (ranks.size - 1);
        gather_slices(m->memory[GRADS], slice / 16);
    }
}

// Each process has updated its slice: all get the slices of the others, and clear the gradients of these.
void ranks_share_weights(Model *m) {
    if (MANY) {
        size_t slice = m->crossing->slice_end - m->crossing->slice;
        memset(m->memory[GRADS], 0, m->common * sizeof(real));
        ranks.traffic.reduced += (double)(slice * sizeof(real)) * (ranks.size - 1);
        gather_slices(m->memory[WEIGHTS], slice / 16);
    }
}

#endif
