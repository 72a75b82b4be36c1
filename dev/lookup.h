// Values of words that are looked up (--value-embedding).
// Gives: add_word_values, add_word_gradients, value_embedding_forward, value_embedding_backward.
// Needs: Model and its memory of train_moe.c, which includes it; dev/tables.h.
//
// In each layer every word of the vocabulary has a vector of its own, which is added to its values. So attention can pass
// on which word stood there, without a part of the residual stream that remembers it. Jordan et al. 2024, modded-nanogpt;
// Karpathy 2025, nanochat. As with --ngrams (dev/ngrams.h), only the rows of words that a step has read move.
#ifdef CONFIG_FIELDS
    int value_embedding;
#elif !defined(LOOKUP_H)
#define LOOKUP_H
#include "tables.h"

// x (N rows, `width` apart) += each token's row of table (V,values)
void add_word_values(real *x, int width, const real *table, const int *tokens, int N, int values) {
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++) {
        const real *from = table + (size_t)tokens[n] * values;
        real *to = x + (size_t)n * width;
        for (int i = 0; i < values; i++) {
            to[i] += from[i];
        }
    }
}

// The gradient of a table (V,values), dtable, from dx (N rows, `width` apart). As in embedding_backward, a task owns some of
// the columns.
void add_word_gradients(Model *m, real *dtable, const real *dx, int width, int values) {
    const int *tokens = m->batch.inputs;
    int N = m->batch.B * m->batch.T;
    note_rows(&m->lookup->read[BY_WORD], tokens, N);
#pragma omp parallel for
    for (int first = 0; first < values; first += 32) {
        int end = min_int(values, first + 32);
        for (int n = 0; n < N; n++) {
            const real *from = dx + (size_t)n * width;
            real *to = dtable + (size_t)tokens[n] * values;
            for (int i = first; i < end; i++) {
                to[i] += from[i];
            }
        }
    }
}

// In qkv (N,(H+2KV)*D) of layer l, the values of each token, which stand last in a row, get its word's row of the table
// (V, KV*D).
void value_embedding_forward(Model *m, int l, real *qkv) {
    const Config *c = &m->config;
    const real *table = m->params.layer[l].value_embed;
    int N = m->batch.B * m->batch.T, D = head_width(c), values = c->kv_heads * D, width = c->heads * D + 2 * values;
    if (table) {
        add_word_values(qkv + width - values, width, table, m->batch.inputs, N, values);
    }
}

// The table's gradient, from dqkv (N,(H+2KV)*D).
void value_embedding_backward(Model *m, int l, const real *dqkv) {
    const Config *c = &m->config;
    real *dtable = m->grads.layer[l].value_embed;
    int D = head_width(c), values = c->kv_heads * D, width = c->heads * D + 2 * values;
    if (dtable) {
        add_word_gradients(m, dtable, dqkv + width - values, width, values);
    }
}
#endif
