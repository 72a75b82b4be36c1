// MoA on a GPU: see dev/mixers/moa.h, which says what it is, and whose functions have the same names.
// Gives: moa_kernels. Needs: attention_experts.cuh.
#ifndef CUDA_MOA_CUH
#define CUDA_MOA_CUH
#include "attention_experts.cuh"

// Query k of each token, the first K*D columns of qkv, from sorted rows. A refused one has ones. A thread has eight
// numbers of a row of D.
__global__ void queries_kernel(floatX *qkv, int Q, const floatX *rows, const int *row_of, int size, int K, int D) {
    size_t i = 8 * thread_of_grid(), choice = i / D;
    if (choice >= (size_t)size) {
        return;
    }
    float v[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    if (row_of[choice] >= 0) {
        load_pack(v, rows + (size_t)row_of[choice] * D + i % D);
    }
    store_pack(qkv + choice / K * Q + choice % K * D + i % D, v);
}

// The way back: drows (.,D) sorted = the gradients by those queries that were not refused.
__global__ void queries_backward_kernel(floatX *drows, const floatX *dqkv, int Q, const int *choice_of, const int *count,
                                        int K, int D) {
    size_t i = 8 * thread_of_grid(), row = i / D;
    float v[8];
    if (row < (size_t)*count) {
        size_t choice = choice_of[row];
        load_pack(v, dqkv + choice / K * Q + choice % K * D + i % D);
        store_pack(drows + i, v);
    }
}

// qkv's columns of values get the words' values, one number a thread.
__global__ void word_values_kernel(floatX *values, int Q, const float *table, const int *tokens, int N, int width) {
    size_t i = thread_of_grid(), n = i / width;
    if (n < (size_t)N) {
        floatX *to = values + n * Q + i % width;
        store(to, to_float(*to) + table[(size_t)tokens[n] * width + i % width]);
    }
}

// x (N,C) -> the queries of the chosen heads, keys and values in s->qkv
void moa_project(Model *m, int l, const floatX *x) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    ExpertHeads *s = heads_of(m, l);
    const HeadRoute *h = &s->route[OUTPUTS];
    int N = m->batch.B * m->batch.T, C = c->dim, K = c->heads, D = head_width(c), Q = (K + 2) * D;
    floatX *rows = (floatX *)scratch_bytes(m, most_head_rows(h) * D * sizeof(floatX));
    product(s->qkv + K * D, x, 0, low_of(m, layer_tensor(m, l, "key_value", WEIGHTS)), 0, N, 2 * D, C, SET, 0, Q);
    rows_of_x(m, h, rows, x, layer_tensor(m, l, "query_experts", WEIGHTS));
    queries_kernel<<<blocks((size_t)N * K * D, 8 * THREADS), THREADS, 0, stream>>>(s->qkv, Q, rows, h->all.row, N * K, K, D);
    CHECK(cudaGetLastError());
    if (w->value_embed) {
        word_values_kernel<<<blocks((size_t)N * D), THREADS, 0, stream>>>(s->qkv + (K + 1) * D, Q, w->value_embed, m->tokens, N, D);
        CHECK(cudaGetLastError());
    }
}

void moa_backward(Model *m, int l, float *dx, const floatX *dout, const floatX *x) {
    const Config *c = &m->config;
    const HeadRoute *h = &heads_of(m, l)->route[OUTPUTS];
    int N = m->batch.B * m->batch.T, C = c->dim, K = c->heads, D = head_width(c), Q = (K + 2) * D;
    size_t most = most_head_rows(h);
    floatX *datt = (floatX *)scratch_bytes(m, (size_t)N * K * D * sizeof(floatX));
    floatX *dqkv = (floatX *)scratch_bytes(m, (size_t)N * Q * sizeof(floatX));
    floatX *drows = (floatX *)scratch_bytes(m, most * D * sizeof(floatX));
    float *dweight = scratch(m, most);
    const float *key_value = layer_tensor(m, l, "key_value", WEIGHTS);

    outputs_backward(m, l, datt, dweight, dout);
    look_back_backward(m, l, dqkv, datt);
    product(dx, dqkv + K * D, 0, low_of(m, key_value), 1, N, C, 2 * D, SET, Q);
    product(layer_tensor(m, l, "key_value", GRADS), dqkv + K * D, 1, x, 1, 2 * D, C, N, ADD, Q);
    queries_backward_kernel<<<blocks(most * D, 8 * THREADS), THREADS, 0, stream>>>(drows, dqkv, Q, h->all.choice, served_rows(h), K, D);
    CHECK(cudaGetLastError());
    rows_of_x_backward(m, h, dx, layer_tensor(m, l, "query_experts", GRADS), drows, x,
                       layer_tensor(m, l, "query_experts", WEIGHTS));
    choose_heads_backward(m, l, OUTPUTS, "output_router", dx, dweight, router_input(m, x));
}

const MixerKernels moa_kernels = {&moa_mixer,         expert_heads_refuse, expert_heads_lay, expert_heads_scratch,
                                  expert_heads_cache, heads_forward,       moa_backward};

#endif
