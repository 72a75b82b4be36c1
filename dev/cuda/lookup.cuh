// Values of words that are looked up (--value-embedding), on the GPU: see dev/lookup.h, whose functions have the same names.
// Gives: value_embedding_forward, value_embedding_backward. Needs: dev/cuda/common.cuh, tables.cuh; embedding_backward
// and gpu::Model of train_moe.cu, which includes it.
//
// The tokens by word, which embedding_backward() needs, serve these tables, too.
#pragma once

// Number i of all values: four numbers of a token's values, which stand last in its row of qkv.
__global__ void value_embedding_kernel(floatX *qkv, const float *table, const int *tokens, size_t size, int values,
                                       int width) {
    size_t i = 4 * thread_of_grid();
    float a[4], b[4];
    if (i < size) {
        size_t n = i / values;
        int c = (int)(i % values);
        floatX *to = qkv + (n + 1) * width - values + c;
        load_pack(a, to);
        load_pack(b, table + (size_t)tokens[n] * values + c);
        for (int j = 0; j < 4; j++) {
            a[j] += b[j];
        }
        store_pack(to, a);
    }
}

// In qkv (N,(H+2KV)*D) of layer l, the values of each token get its word's row of the table (V, KV*D).
void value_embedding_forward(Model *m, int l, floatX *qkv) {
    const Config *c = &m->config;
    const float *table = m->params.layer[l].value_embed;
    int N = m->batch.B * m->batch.T, D = head_width(c), values = c->kv_heads * D, width = c->heads * D + 2 * values;
    size_t size = (size_t)N * values;
    if (table && N > 0) {
        value_embedding_kernel<<<blocks(size, 4 * THREADS), THREADS, 0, stream>>>(qkv, table, m->tokens, size, values,
                                                                                  width);
        CHECK(cudaGetLastError());
    }
}

// The table's gradient, from dqkv (N,(H+2KV)*D).
void value_embedding_backward(Model *m, int l, const floatX *dqkv) {
    const Config *c = &m->config;
    int D = head_width(c), values = c->kv_heads * D, width = c->heads * D + 2 * values;
    const int *order = m->tokens + 2 * m->max_tokens;
    if (m->grads.layer[l].value_embed) {
        note_read_rows(m, BY_WORD, m->staging + 3 * m->max_tokens, m->word_count);
        embedding_backward(m->grads.layer[l].value_embed, dqkv + width - values, order, order + m->max_tokens,
                           order + 2 * m->max_tokens, m->word_count, values, width);
    }
}
