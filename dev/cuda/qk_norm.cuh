// Queries and keys with a norm of their own (--qk-norm) on the GPU: see dev/qk_norm.h, whose functions have the same names.
// Gives: qk_sums, qk_norm_forward, qk_norm_backward. Needs: dev/cuda/common.cuh, attention.cuh (HeadSizes); gpu::Model of
// train_moe.cu, which includes it.
//
// The norm comes before the rotary positions, and attention turns queries and keys as it reads them. So the norm is a
// kernel of its own between the product that makes qkv and attention. A row is one head of one token, D numbers. Several
// lanes of a warp share a row, and each reads four numbers at a time: 2, 4, ... 32 lanes, as many as D asks for. With
// --qk-norm-over row there are two rows, all queries and all keys of a token, and a warp has one.
#pragma once

const int QK_TOKENS = 64; // that a block has, backward

int lanes_of_head(int D) {
    int lanes = 2;
    while (lanes < 32 && 4 * lanes < D) {
        lanes *= 2;
    }
    return lanes;
}

// The sum over the lanes of a row, the same in each of them. All lanes of the warp take part.
__device__ float row_sum(float x, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, step);
    }
    return x;
}

// The two vectors, their layer's rows before the norm (N,(H+KV)*D), and of each row 1 / rms (N,H+KV).
struct QkNorm {
    const float *q_norm, *k_norm; // (DQ), (DK)
    floatX *raw;
    float *rstd;
};

// Block (.,h) has head h of some tokens: a query's, or from H on a key's.
__global__ void qk_norm_forward_kernel(floatX *qkv, QkNorm a, NormHeads z, int N, int lanes, float eps) {
    int h = blockIdx.y, heads = z.H + z.KV, D = h < z.H ? z.DQ : z.DK, lane = threadIdx.x % lanes;
    int n = blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes, end = n < N ? D : 0; // end 0: there is no such token
    int kept = z.H * z.DQ + z.KV * z.DK, from = h < z.H ? h * D : z.H * z.DQ + (h - z.H) * D;
    size_t row = (size_t)n * heads + h;
    floatX *x = qkv + (size_t)n * (kept + z.KV * z.DK) + from, *raw = a.raw + (size_t)n * kept + from;
    const float *norm = h < z.H ? a.q_norm : a.k_norm;
    float v[4], w[4], squares = 0;

    for (int c = 4 * lane; c < end; c += 4 * lanes) {
        load_pack(v, x + c);
        store_pack(raw + c, v);
        for (int i = 0; i < 4; i++) {
            squares += v[i] * v[i];
        }
    }
    float rstd = 1 / sqrtf(row_sum(squares, lanes) / D + eps);
    if (lane == 0 && end) {
        a.rstd[row] = rstd;
    }
    for (int c = 4 * lane; c < end; c += 4 * lanes) {
        load_pack(v, x + c);
        load_pack(w, norm + c);
        for (int i = 0; i < 4; i++) {
            v[i] *= rstd * w[i];
        }
        store_pack(x + c, v);
    }
}

// Block (i,h) has head h of the i-th QK_TOKENS tokens. d becomes the gradient by what the norm read:
//   rstd * (d * w - y * mean(d * w * y)) with y = x * rstd
// part (heads, blocks of tokens, D): the sums of d * y over the block's tokens, for the gradient of w.
__global__ void __launch_bounds__(THREADS)
    qk_norm_backward_kernel(floatX *dqkv, double *part, QkNorm a, HeadSizes z, int N, int lanes) {
    __shared__ float sums[THREADS / 32 * 256]; // (rows at a time, D): if D is above 128, a row has 32 lanes
    int h = blockIdx.y, heads = z.H + z.KV, D = z.D, lane = threadIdx.x % lanes, rows = THREADS / lanes;
    int first = blockIdx.x * QK_TOKENS, until = min(N, first + QK_TOKENS);
    const float *norm = h < z.H ? a.q_norm : a.k_norm;
    float sum[2][4] = {}; // a lane has four or eight columns

    for (int n = first + threadIdx.x / lanes, left = QK_TOKENS; left > 0; n += rows, left -= rows) {
        size_t row = (size_t)n * heads + h;
        floatX *to = dqkv + ((size_t)n * (heads + z.KV) + h) * D;
        float d[2][4] = {}, y[2][4] = {}, w[4], mean = 0, rstd = n < until ? a.rstd[row] : 0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int c = 4 * (lane + half * lanes);
            if (n < until && c < D) {
                load_pack(d[half], to + c);
                load_pack(y[half], a.raw + row * D + c);
                load_pack(w, norm + c);
                for (int i = 0; i < 4; i++) {
                    y[half][i] *= rstd;
                    sum[half][i] += d[half][i] * y[half][i];
                    d[half][i] *= w[i];
                    mean += d[half][i] * y[half][i];
                }
            }
        }
        mean = row_sum(mean, lanes) / D;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int c = 4 * (lane + half * lanes);
            if (n < until && c < D) {
                for (int i = 0; i < 4; i++) {
                    d[half][i] = rstd * (d[half][i] - y[half][i] * mean);
                }
                store_pack(to + c, d[half]);
            }
        }
    }

    // Threads that have the same columns: their sums are added.
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int c = 4 * (lane + half * lanes);
        if (c < D) {
            for (int i = 0; i < 4; i++) {
                sums[threadIdx.x / lanes * D + c + i] = sum[half][i];
            }
        }
    }
    __syncthreads();
    if ((int)threadIdx.x < D) {
        double all = 0;
        for (int i = 0; i < rows; i++) {
            all += (double)sums[i * D + threadIdx.x];
        }
        part[((size_t)h * gridDim.x + blockIdx.x) * D + threadIdx.x] = all;
    }
}

// ---- norms of rows

// Warp n of block (.,0) has the queries of token n, that of (.,1) its keys; the formula is the one above.
__global__ void qk_row_backward_kernel(floatX *dqkv, QkNorm a, NormHeads z, int N) {
    int n = row_of_warp(), keys = blockIdx.y, D = keys ? z.DK : z.DQ, lane = threadIdx.x % 32;
    if (n >= N) {
        return;
    }
    const floatX *raw = a.raw + (size_t)n * (z.DQ + z.DK) + keys * z.DQ;
    const float *norm = keys ? a.k_norm : a.q_norm;
    floatX *to = dqkv + (size_t)n * (z.DQ + 2 * z.DK) + keys * z.DQ;
    float d[4], y[4], w[4], mean = 0, rstd = a.rstd[2 * (size_t)n + keys];
    for (int c = 4 * lane; c < D; c += 128) {
        load_pack(d, to + c);
        load_pack(y, raw + c);
        load_pack(w, norm + c);
        for (int i = 0; i < 4; i++) {
            mean += d[i] * w[i] * y[i] * rstd;
        }
    }
    mean = warp_sum(mean) / D;
    for (int c = 4 * lane; c < D; c += 128) {
        load_pack(d, to + c);
        load_pack(y, raw + c);
        load_pack(w, norm + c);
        for (int i = 0; i < 4; i++) {
            d[i] = rstd * (d[i] * w[i] - y[i] * rstd * mean);
        }
        store_pack(to + c, d);
    }
}

struct RowGradient { // what token n adds to the gradient of number c of q_norm, or of k_norm
    const floatX *d, *raw; // of the first token
    const float *rstd;
    int width, kept; // of a row of d, of a row of raw
    __device__ double operator()(size_t n, int c) const {
        return (double)(to_float(d[n * width + c]) * to_float(raw[n * kept + c]) * rstd[2 * n]);
    }
};

// The gradients of both vectors are taken first, since the kernel overwrites dqkv.
void qk_row_backward(const LayerParams *dw, floatX *dqkv, double *part, QkNorm a, NormHeads z, int N) {
    int kept = z.DQ + z.DK, width = kept + z.DK;
    column_sums(dw->q_norm, RowGradient{dqkv, a.raw, a.rstd, width, kept}, 1, N, z.DQ, 1, part);
    column_sums(dw->k_norm, RowGradient{dqkv + z.DQ, a.raw + z.DQ, a.rstd + 1, width, kept}, 1, N, z.DK, 1, part);
    qk_row_backward_kernel<<<dim3(row_blocks(N), 2), THREADS, 0, stream>>>(dqkv, a, z, N);
    CHECK(cudaGetLastError());
}

// ---- the same for a layer

// Numbers of m->qk_part, for N tokens; --qkv-bias needs it, too.
size_t qk_sums(const Config *c, int N) {
    size_t kept = (size_t)(c->heads + c->kv_heads) * head_width(c), all = kept + (size_t)c->kv_heads * head_width(c);
    size_t norms = c->qk_norm ? kept * (size_t)div_up(N, QK_TOKENS) : 0, bias = c->qkv_bias ? all * (size_t)div_up(N, CHUNK) : 0;
    return norms > bias ? norms : bias;
}

QkNorm qk_norm_of(const Model *m, int l) {
    const LayerParams *w = &m->params.layer[l];
    return {w->q_norm, w->k_norm, m->layers[l].raw_qk, m->layers[l].rstd_qk};
}

// In qkv (N,(H+2KV)*D) queries and keys become their norms.
void qk_norm_forward(Model *m, int l, floatX *qkv) {
    const Config *c = &m->config;
    NormHeads z = norm_heads(c);
    int N = m->batch.B * m->batch.T, lanes = lanes_of_head(z.DQ);
    if (c->qk_norm && N > 0) {
        dim3 grid(blocks(N, THREADS / lanes), z.H + z.KV);
        qk_norm_forward_kernel<<<grid, THREADS, 0, stream>>>(qkv, qk_norm_of(m, l), z, N, lanes, (float)c->norm_eps);
        CHECK(cudaGetLastError());
    }
}

// The way back, in dqkv (N,(H+2KV)*D), and the gradients of the two vectors.
void qk_norm_backward(Model *m, int l, floatX *dqkv) {
    const Config *c = &m->config;
    const LayerParams *dw = &m->grads.layer[l];
    int N = m->batch.B * m->batch.T, H = c->heads, KV = c->kv_heads, D = head_width(c), chunks = div_up(N, QK_TOKENS);
    if (!c->qk_norm || N == 0) {
        return;
    }
    if (c->qk_norm_over == OVER_ROW) {
        qk_row_backward(dw, dqkv, m->qk_part, qk_norm_of(m, l), norm_heads(c), N);
        return;
    }
    qk_norm_backward_kernel<<<dim3(chunks, H + KV), THREADS, 0, stream>>>(dqkv, m->qk_part, qk_norm_of(m, l),
                                                                          HeadSizes{0, H, KV, D}, N, lanes_of_head(D));
    CHECK(cudaGetLastError());

    // The sums of the blocks, those of the queries first.
    const double *of_keys = m->qk_part + (size_t)H * chunks * D;
    column_totals_kernel<float><<<row_blocks(D), THREADS, 0, stream>>>(dw->q_norm, m->qk_part, D, H * chunks, D, 1);
    CHECK(cudaGetLastError());
    column_totals_kernel<float><<<row_blocks(D), THREADS, 0, stream>>>(dw->k_norm, of_keys, D, KV * chunks, D, 1);
    CHECK(cudaGetLastError());
}
