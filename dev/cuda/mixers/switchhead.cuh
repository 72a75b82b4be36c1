// SwitchHead on a GPU: see dev/mixers/switchhead.h, which says what it is, and whose functions have the same names.
// Gives: switchhead_kernels. Needs: attention_experts.cuh.
#ifndef CUDA_SWITCHHEAD_CUH
#define CUDA_SWITCHHEAD_CUH
#include "attention_experts.cuh"

// The columns of values in qkv (N, Q apart; `values` points to the first of them): each head's weighted sum, and with a
// table the word's values. A thread has eight numbers of a row of D.
__global__ void values_kernel(floatX *values, int Q, const floatX *rows, Route r, int heads, int D, const float *table,
                              const int *tokens) {
    size_t i = 8 * thread_of_grid(), at = i / D, n = at / heads, head = at % heads;
    if (n >= (size_t)r.N) {
        return;
    }
    float v[8], sum[8] = {};
    for (int k = 0; k < r.K; k++) {
        size_t choice = (head * r.N + n) * r.K + k;
        if (r.row[choice] >= 0) {
            load_pack(v, rows + (size_t)r.row[choice] * D + i % D);
            for (int j = 0; j < 8; j++) {
                sum[j] += r.weight[choice] * v[j];
            }
        }
    }
    for (int j = 0; j < 8 && table; j++) {
        sum[j] += table[(size_t)tokens[n] * heads * D + head * D + i % D + j];
    }
    store_pack(values + n * Q + head * D + i % D, sum);
}

// The way back: dvalues are columns of dqkv. drows (.,D) sorted = weight * dvalue, dweight = dvalue . row. A warp has a row.
__global__ void values_backward_kernel(floatX *drows, float *dweight, const floatX *dvalues, int Q, const floatX *rows, Route r,
                                       const int *count, int D) {
    int row = row_of_warp(), lane = threadIdx.x % 32;
    if (row >= *count) {
        return;
    }
    int choice = r.choice[row], head = choice / (r.N * r.K);
    const floatX *d = dvalues + (size_t)r.token[row] * Q + head * D;
    float weight = r.weight[choice], sum = 0;
    for (int i = lane; i < D; i += 32) {
        float own = to_float(d[i]);
        sum += own * to_float(rows[(size_t)row * D + i]);
        store(&drows[(size_t)row * D + i], weight * own);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
        dweight[choice] = sum;
    }
}

// x (N,C) -> queries, keys and values in s->qkv
void switchhead_project(Model *m, int l, const floatX *x) {
    const Config *c = &m->config;
    ExpertHeads *s = heads_of(m, l);
    const HeadRoute *h = &s->route[VALUES];
    int N = m->batch.B * m->batch.T, C = c->dim, H = c->heads, KV = c->kv_heads, D = head_width(c);
    int Q = (H + 2 * KV) * D, dense = (H + KV) * D;
    product(s->qkv, x, 0, low_of(m, layer_tensor(m, l, "query_key", WEIGHTS)), 0, N, dense, C, SET, 0, Q);
    rows_of_x(m, h, s->rows, x, layer_tensor(m, l, "value_experts", WEIGHTS));
    values_kernel<<<blocks((size_t)N * KV * D, 8 * THREADS), THREADS, 0, stream>>>(s->qkv + dense, Q, s->rows, h->all, KV, D,
                                                                                   m->params.layer[l].value_embed, m->tokens);
    CHECK(cudaGetLastError());
}

void switchhead_backward(Model *m, int l, float *dx, const floatX *dout, const floatX *x) {
    const Config *c = &m->config;
    ExpertHeads *s = heads_of(m, l);
    const HeadRoute *h = &s->route[VALUES];
    int N = m->batch.B * m->batch.T, C = c->dim, H = c->heads, KV = c->kv_heads, D = head_width(c);
    int Q = (H + 2 * KV) * D, dense = (H + KV) * D;
    size_t most = most_head_rows(h);
    floatX *datt = (floatX *)scratch_bytes(m, (size_t)N * H * D * sizeof(floatX));
    floatX *dqkv = (floatX *)scratch_bytes(m, (size_t)N * Q * sizeof(floatX));
    floatX *drows = (floatX *)scratch_bytes(m, most * D * sizeof(floatX));
    float *doutput_weight = scratch(m, most_head_rows(&s->route[OUTPUTS])), *dvalue_weight = scratch(m, most);
    const float *query_key = layer_tensor(m, l, "query_key", WEIGHTS);

    outputs_backward(m, l, datt, doutput_weight, dout);
    look_back_backward(m, l, dqkv, datt);
    product(dx, dqkv, 0, low_of(m, query_key), 1, N, C, dense, SET, Q);
    product(layer_tensor(m, l, "query_key", GRADS), dqkv, 1, x, 1, dense, C, N, ADD, Q);
    zero(dvalue_weight, most * sizeof(float));
    values_backward_kernel<<<row_blocks(most), THREADS, 0, stream>>>(drows, dvalue_weight, dqkv + dense, Q, s->rows, h->all,
                                                                     served_rows(h), D);
    CHECK(cudaGetLastError());
    rows_of_x_backward(m, h, dx, layer_tensor(m, l, "value_experts", GRADS), drows, x,
                       layer_tensor(m, l, "value_experts", WEIGHTS));
    const float *x32 = router_input(m, x);
    choose_heads_backward(m, l, VALUES, "value_router", dx, dvalue_weight, x32);
    choose_heads_backward(m, l, OUTPUTS, "output_router", dx, doutput_weight, x32);
}

const MixerKernels switchhead_kernels = {&switchhead_mixer,  expert_heads_refuse, expert_heads_lay, expert_heads_scratch,
                                         expert_heads_cache, heads_forward,       switchhead_backward};

#endif
