// Tables of which each token looks up one row: pairs of words (--ngrams), and values of words (--value-embedding).
// Gives: ngram_row, find_ngrams, add_table_rows, ngrams_forward, ngrams_backward, add_word_values, add_word_gradients,
// value_embedding_forward, value_embedding_backward, has_gradient.
// Needs: Model and the layers of train_moe.c, which includes it.
//
// A row is found by its number and added; no product is computed. So such a table holds many weights and costs little
// time: it is conditional computation, as experts are, with a choice that is not learned. AdamW moves only the rows
// that a step has read (dev/read_rows.h).
//
// --ngrams R: the embedding of each token gets row hash(word before, word) mod R of one more table, so that the first
// layer already knows which two words met. Pairs that fall on one row share it. Hashed n-grams as embeddings: Roy et al.
// 2022, N-Grammer; Huang et al. 2025, Over-Tokenized Transformer, section 3.
//
// --value-embedding: in each layer every word of the vocabulary has a vector of its own, which is added to its values.
// So attention can pass on which word stood there, without a part of the residual stream that remembers it. Jordan et al.
// 2024, modded-nanogpt; Karpathy 2025, nanochat.
#ifndef LOOKUP_H
#define LOOKUP_H

// The row of the pair of words (before, word) in a table of so many rows; before -1: a text begins.
int ngram_row(int before, int word, int rows) {
    return (int)(hash64((uint64_t)(before + 1) << 32 | (uint64_t)word) % (uint64_t)rows);
}

// Each token's row, for sequences of T tokens. At the first token of a sequence the word before is `before`.
void find_ngrams(int *row, const int *tokens, int before, int N, int T, int rows) {
    for (int n = 0; n < N; n++) {
        row[n] = ngram_row(n % T ? tokens[n - 1] : before, tokens[n], rows);
    }
}

// x (N,C) += each token's row of table (.., C)
void add_table_rows(real *x, const real *table, const int *row, int N, int C) {
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++) {
        for (int c = 0; c < C; c++) {
            x[(size_t)n * C + c] += table[(size_t)row[n] * C + c];
        }
    }
}

// Before layer 0: x (N,C) is the tokens' embedding, and gets what their pairs add. before: the word before each sequence,
// which only generation knows; else -1.
void ngrams_forward(Model *m, real *x, int before) {
    const Config *c = &m->config;
    int N = m->batch.B * m->batch.T;
    if (c->ngrams) {
        find_ngrams(m->ngram_row, m->batch.inputs, before, N, m->batch.T, c->ngrams);
        add_table_rows(x, m->params.ngrams, m->ngram_row, N, c->dim);
    }
}

// The table's gradient, from dx (N,C), the gradient by layer 0's input.
void ngrams_backward(Model *m, const real *dx) {
    if (m->config.ngrams) {
        embedding_backward(m->grads.ngrams, dx, m->ngram_row, m->batch.B * m->batch.T, m->config.dim);
    }
}

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

// The table's gradient, from dx (N rows, `width` apart). As in embedding_backward, a task owns some of the columns.
void add_word_gradients(real *dtable, const real *dx, int width, const int *tokens, int N, int values) {
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
    int N = m->batch.B * m->batch.T, D = c->dim / c->heads, values = c->kv_heads * D, width = c->heads * D + 2 * values;
    if (table) {
        add_word_values(qkv + width - values, width, table, m->batch.inputs, N, values);
    }
}

// The table's gradient, from dqkv (N,(H+2KV)*D).
void value_embedding_backward(Model *m, int l, const real *dqkv) {
    const Config *c = &m->config;
    real *dtable = m->grads.layer[l].value_embed;
    int N = m->batch.B * m->batch.T, D = c->dim / c->heads, values = c->kv_heads * D, width = c->heads * D + 2 * values;
    if (dtable) {
        add_word_gradients(dtable, dqkv + width - values, width, m->batch.inputs, N, values);
    }
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

#endif
