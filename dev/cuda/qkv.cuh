// A bias of queries, keys and values (--qkv-bias) on the GPU: see dev/qkv.h, whose functions have the same names.
// Gives: qkv_bias_forward, qkv_bias_backward. Needs: dev/cuda/common.cuh, qk_norm.cuh (qk_sums); gpu::Model of train_moe.cu,
// which includes it.
#pragma once

// Number i of qkv (size / Q rows of Q numbers): eight numbers of a row.
__global__ void qkv_bias_kernel(floatX *qkv, const float *bias, size_t size, int Q) {
    size_t i = 8 * thread_of_grid();
    float a[8], b[8];
    if (i < size) {
        load_pack(a, qkv + i);
        load_pack(b, bias + i % Q);
        for (int j = 0; j < 8; j++) {
            a[j] += b[j];
        }
        store_pack(qkv + i, a);
    }
}

// qkv (N,(H+2KV)*D) of layer l += its bias, if it has one.
void qkv_bias_forward(Model *m, int l, floatX *qkv) {
    const Config *c = &m->config;
    const float *bias = m->params.layer[l].qkv_bias;
    int Q = (c->heads + 2 * c->kv_heads) * head_width(c);
    size_t size = (size_t)m->batch.B * m->batch.T * Q;
    if (bias && size > 0) {
        qkv_bias_kernel<<<blocks(size, 8 * THREADS), THREADS, 0, stream>>>(qkv, bias, size, Q);
        CHECK(cudaGetLastError());
    }
}

struct BiasGradient { // what token n adds to the gradient of number i of a bias
    const floatX *d; // (N,Q)
    int Q;
    __device__ double operator()(size_t n, int i) const {
        return (double)to_float(d[n * Q + i]);
    }
};

// The gradient of the bias, from dqkv (N,(H+2KV)*D).
void qkv_bias_backward(Model *m, int l, const floatX *dqkv) {
    const Config *c = &m->config;
    int N = m->batch.B * m->batch.T, Q = (c->heads + 2 * c->kv_heads) * head_width(c);
    if (m->grads.layer[l].qkv_bias && N > 0) {
        column_sums(m->grads.layer[l].qkv_bias, BiasGradient{dqkv, Q}, 1, N, Q, 1, m->qk_part);
    }
}
