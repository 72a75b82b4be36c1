// A table of word pairs, and triples, that is looked up, on the GPU (--ngrams): see dev/ngrams.h, whose functions have the same
// names. Gives: ngrams_backward, ngram_gate_forward, ngram_gate_backward, ngram_gate_stream_backward. Needs: dev/cuda/common.cuh, tables.cuh; Sum,
// embedding_backward and gpu::Model of train_moe.cu, which includes it.
//
// The host has the tokens, so it finds their rows as well, and sorts them (send_batch in host.cuh). embedding_forward() of
// train_moe.cu adds the rows as it reads the embedding, and with --ngram-gate keeps their sum.
#pragma once

// The table's gradient, from dx (N,C), the gradient by layer 0's input, and with --ngram-gate from what the layers took.
void ngrams_backward(Model *m, const float *dx) {
    const Config *c = &m->config;
    int N = m->batch.B * m->batch.T, most = m->max_tokens * ngram_orders(c);
    if (!m->grads.ngrams) { // there is none, or it is frozen
        return;
    }
    const int *order = m->pairs + most, *rows = m->staging + (order - m->tokens) + most;
    note_read_rows(m, BY_NGRAM, rows, m->pair_count); // the host's copy of the batch stays until the next one
    if (c->ngram_gate && N > 0) {
        size_t size = (size_t)N * c->dim;
        add_kernel<<<blocks(size), THREADS, 0, stream>>>(m->lookup->dsum, dx, size);
        CHECK(cudaGetLastError());
        dx = m->lookup->dsum;
    }
    embedding_backward(m->grads.ngrams, dx, order, order + most, order + 2 * most, m->pair_count, c->dim);
}

// ---- in each layer

// What the kernels of a layer's take read. A warp has a token.
struct NgramGateArgs {
    const float *key, *value, *e; // (C), (C), (N,C)
    int N, C;
    float eps;
};

NgramGateArgs take_args(const Model *m, int l) {
    const LayerParams *w = &m->params.layer[l];
    return {w->ngram_key, w->ngram_value, m->lookup->sum, m->batch.B * m->batch.T, m->config.dim, (float)m->config.norm_eps};
}

// Of token n, whose residual stream is `stream`: 1 / rms, the gate's logit, and the gate. By a warp.
__device__ NgramGate ngram_gate_of(const NgramGateArgs &t, const Sum &stream, int n) {
    float a[4], e[4], key[4], squares = 0, sum = 0;
    for (int c = 4 * (threadIdx.x % 32); c < t.C; c += 128) {
        sum_of(a, stream, n, c, t.C);
        load_pack(e, t.e + (size_t)n * t.C + c);
        load_pack(key, t.key + c);
        for (int j = 0; j < 4; j++) {
            squares += a[j] * a[j];
            sum += a[j] * key[j] * e[j];
        }
    }
    NgramGate take;
    take.rstd = rsqrtf(warp_sum(squares) / t.C + t.eps);
    take.logit = warp_sum(sum) * take.rstd * rsqrtf((float)t.C);
    take.gate = 1 / (1 + expf(-take.logit));
    return take;
}

// out (N,C) = from (N,C) + what the layer takes. kept (N,C), unless NULL, gets the residual stream behind attention.
__global__ void take_kernel(float *out, float *kept, const float *from, Sum stream, NgramGateArgs t) {
    int n = row_of_warp();
    if (n >= t.N) {
        return;
    }
    float gate = ngram_gate_of(t, stream, n).gate, a[4], e[4], value[4];
    for (int c = 4 * (threadIdx.x % 32); c < t.C; c += 128) {
        size_t at = (size_t)n * t.C + c;
        if (kept) {
            sum_of(a, stream, n, c, t.C);
            store_pack(kept + at, a);
        }
        load_pack(a, from + at);
        load_pack(e, t.e + at);
        load_pack(value, t.value + c);
        for (int j = 0; j < 4; j++) {
            a[j] += gate * value[j] * e[j];
        }
        store_pack(out + at, a);
    }
}

// sum: what layer l adds up to. Returns the same, with what it takes of the tokens' vectors. (A last layer that does not feed
// forward has not made a->mid; it is made here.)
Sum ngram_gate_forward(Model *m, int l, Sum sum) {
    const Config *c = &m->config;
    LayerActs *a = &m->layers[l];
    int N = m->batch.B * m->batch.T;
    if (!c->ngram_gate || N == 0) {
        return sum;
    }
    Sum behind = {a->mid, NULL, NULL, NULL, 0};
    float *kept = NULL;
    if (!feeds(c, l)) {
        behind = sum;
        kept = a->mid;
    }
    take_kernel<<<row_blocks(N), THREADS, 0, stream>>>(m->tables_there->taken, kept, sum.x, behind, take_args(m, l));
    CHECK(cudaGetLastError());
    sum.x = m->tables_there->taken;
    return sum;
}

// slopes (3,N): gate, slope and fall of each token, as in the C twin. dsum (N,C) = or += the gradient by the tokens' vectors.
__global__ void take_back_kernel(float *dsum, float *slopes, const float *dout, const float *x, NgramGateArgs t, int add) {
    int n = row_of_warp();
    if (n >= t.N) {
        return;
    }
    NgramGate take = ngram_gate_of(t, {x, NULL, NULL, NULL, 0}, n);
    float d[4], e[4], value[4], key[4], a[4], sum[4], dgate = 0;
    for (int c = 4 * (threadIdx.x % 32); c < t.C; c += 128) {
        load_pack(d, dout + (size_t)n * t.C + c);
        load_pack(e, t.e + (size_t)n * t.C + c);
        load_pack(value, t.value + c);
        for (int j = 0; j < 4; j++) {
            dgate += d[j] * value[j] * e[j];
        }
    }
    float dlogit = warp_sum(dgate) * take.gate * (1 - take.gate);
    float slope = dlogit * take.rstd * rsqrtf((float)t.C);
    if (threadIdx.x % 32 == 0) {
        slopes[n] = take.gate;
        slopes[t.N + n] = slope;
        slopes[2 * t.N + n] = dlogit * take.logit * take.rstd * take.rstd / t.C;
    }
    for (int c = 4 * (threadIdx.x % 32); c < t.C; c += 128) {
        size_t at = (size_t)n * t.C + c;
        load_pack(d, dout + at);
        load_pack(a, x + at);
        load_pack(value, t.value + c);
        load_pack(key, t.key + c);
        if (add) {
            load_pack(sum, dsum + at);
        }
        for (int j = 0; j < 4; j++) {
            sum[j] = (add ? sum[j] : 0) + take.gate * value[j] * d[j] + slope * a[j] * key[j];
        }
        store_pack(dsum + at, sum);
    }
}

// part (2,chunks,C): sums over TAKE_CHUNK tokens for the gradients by key and value. A block has a chunk and 128 columns; each
// warp takes every so many-th token, then their sums are added.
__global__ void take_sums_kernel(float *part, const float *slopes, const float *dout, const float *x, NgramGateArgs t) {
    __shared__ __align__(16) float of_warp[2][SUM_WARPS][128];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = 128 * blockIdx.y + 4 * lane;
    int from = blockIdx.x * TAKE_CHUNK, until = min(from + TAKE_CHUNK, t.N);
    float d[4], e[4], a[4], of_key[4] = {0}, of_value[4] = {0};
    for (int n = from + warp; n < until && c < t.C; n += SUM_WARPS) {
        size_t at = (size_t)n * t.C + c;
        load_pack(d, dout + at);
        load_pack(e, t.e + at);
        load_pack(a, x + at);
        for (int j = 0; j < 4; j++) {
            of_key[j] += slopes[t.N + n] * a[j] * e[j];
            of_value[j] += slopes[n] * d[j] * e[j];
        }
    }
    store_pack(&of_warp[0][warp][4 * lane], of_key);
    store_pack(&of_warp[1][warp][4 * lane], of_value);
    __syncthreads();
    if (warp > 1 || c >= t.C) {
        return;
    }
    float sum[4] = {0}; // warp 0 has those of the key, warp 1 those of the value
    for (int w = 0; w < SUM_WARPS; w++) {
        for (int j = 0; j < 4; j++) {
            sum[j] += of_warp[warp][w][4 * lane + j];
        }
    }
    store_pack(part + ((size_t)warp * gridDim.x + blockIdx.x) * t.C + c, sum);
}

__global__ void take_weights_kernel(float *dkey, float *dvalue, const float *part, int chunks, int C) {
    add_rows(blockIdx.x ? dvalue : dkey, part + (size_t)blockIdx.x * chunks * C, C, NULL, NULL, 0, chunks, blockIdx.y, C);
}

// Before layer l feeds back: m->dx (N,C) is the gradient by its output, which it takes. The gradients by the tokens' vectors, and
// by key and value. ngram_gate_stream_backward() does the rest.
void ngram_gate_backward(Model *m, int l) {
    const Config *c = &m->config;
    const LayerParams *dw = &m->grads.layer[l];
    Tables *there = m->tables_there;
    int N = m->batch.B * m->batch.T, chunks = div_up(N, TAKE_CHUNK), strips = div_up(c->dim, 128);
    const float *x = m->layers[l].mid;
    if (!c->ngram_gate || N == 0) {
        return;
    }
    take_back_kernel<<<row_blocks(N), THREADS, 0, stream>>>(m->lookup->dsum, there->slopes, m->dx, x, take_args(m, l),
                                                            l < c->layers - 1);
    CHECK(cudaGetLastError());
    take_sums_kernel<<<dim3(chunks, strips), 32 * SUM_WARPS, 0, stream>>>(there->part, there->slopes, m->dx, x, take_args(m, l));
    CHECK(cudaGetLastError());
    take_weights_kernel<<<dim3(2, strips), 32 * SUM_WARPS, 0, stream>>>(dw->ngram_key, dw->ngram_value, there->part, chunks,
                                                                       c->dim);
    CHECK(cudaGetLastError());
}

// dx (N,C), also as dx_low, += what the gate adds to the gradient by the residual stream behind attention.
__global__ void take_stream_kernel(float *dx, floatX *dx_low, const float *slopes, const float *x, NgramGateArgs t, size_t size) {
    size_t i = 4 * thread_of_grid();
    float d[4], a[4], e[4], key[4];
    if (i >= size) {
        return;
    }
    size_t n = i / t.C;
    float slope = slopes[t.N + n], fall = slopes[2 * (size_t)t.N + n];
    load_pack(d, dx + i);
    load_pack(a, x + i);
    load_pack(e, t.e + i);
    load_pack(key, t.key + i % t.C);
    for (int j = 0; j < 4; j++) {
        d[j] += slope * key[j] * e[j] - fall * a[j];
    }
    store_pack(dx + i, d);
    store_pack(dx_low + i, d);
}

// Behind it: m->dx is the gradient by a->mid, but for what the gate adds.
void ngram_gate_stream_backward(Model *m, int l) {
    size_t size = (size_t)m->batch.B * m->batch.T * m->config.dim;
    if (m->config.ngram_gate && size > 0) {
        take_stream_kernel<<<blocks(size, 4 * THREADS), THREADS, 0, stream>>>(m->dx, m->dx_low, m->tables_there->slopes,
                                                                             m->layers[l].mid, take_args(m, l), size);
        CHECK(cudaGetLastError());
    }
}
