// Values of words that are looked up (--value-embedding).
// Gives: value_embedding_forward, value_embedding_backward.
// Needs: Model and its memory of train_moe.c, which includes it; dev/tables.h.
//
// In each layer every word of the vocabulary has a vector of its own, which is added to its values. So attention can pass
// on which word stood there, without a part of the residual stream that remembers it. Jordan et al. 2024, modded-nanogpt;
// Karpathy 2025, nanochat. As with --ngrams (dev/ngrams.h), only the rows of words that a step has read move.
#ifndef LOOKUP_H
#define LOOKUP_H
#include "tables.h"

// In qkv (N,(H+2KV)*D) of layer l, the values of each token get its word's row of the table (V, KV*D).
void value_embedding_forward(Model *m, int l, real *qkv) {
    const Config *c = &m->config;
    const real *table = m->params.layer[l].value_embed;
    int N = m->batch.B * m->batch.T, D = c->dim / c->heads, values = c->kv_heads * D, width = c->heads * D + 2 * values;
    if (!table) {
        return;
    }
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++) {
        const real *from = table + (size_t)m->batch.inputs[n] * values;
        real *to = qkv + (size_t)(n + 1) * width - values; // they stand last in a row
        for (int i = 0; i < values; i++) {
            to[i] += from[i];
        }
    }
}

// The table's gradient, from dqkv (N,(H+2KV)*D). As in embedding_backward, a task owns some of the columns.
void value_embedding_backward(Model *m, int l, const real *dqkv) {
    const Config *c = &m->config;
    real *dtable = m->grads.layer[l].value_embed;
    int N = m->batch.B * m->batch.T, D = c->dim / c->heads, values = c->kv_heads * D, width = c->heads * D + 2 * values;
    if (!dtable) {
        return;
    }
    note_rows(&m->lookup->read[BY_WORD], m->batch.inputs, N);
#pragma omp parallel for
    for (int first = 0; first < values; first += 32) {
        int end = min_int(values, first + 32);
        for (int n = 0; n < N; n++) {
            const real *from = dqkv + (size_t)(n + 1) * width - values;
            real *to = dtable + (size_t)m->batch.inputs[n] * values;
            for (int i = first; i < end; i++) {
                to[i] += from[i];
            }
        }
    }
}

#endif
