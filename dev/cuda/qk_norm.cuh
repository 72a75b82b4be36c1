// Queries and keys with a norm of their own (--qk-norm) on the GPU: see dev/qk_norm.h, whose functions have the same names.
// Gives: qk_sums, qk_norm_forward, qk_norm_backward. Needs: dev/cuda/common.cuh, attention.cuh (HeadSizes); gpu::Model of
// train_moe.cu, which includes it.
//
// The norm comes before the rotary positions, and attention turns queries and keys as it reads them. So the norm is a
// kernel of its own between the product that makes qkv and attention. A row is one head of one token, D numbers. Several
// lanes of a warp share a row, and each reads four numbers at a time: 2, 4, ... 32 lanes, as many as D asks for.
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
    const float *q_norm, *k_norm; // (D)
    floatX *raw;
    float *rstd;
};

// Block (.,h) has head h of some tokens: a query's, or from H on a key's.
__global__ void qk_norm_forward_kernel(floatX *qkv, QkNorm a, HeadSizes z, int N, int lanes, float eps) {
    int h = blockIdx.y, heads = z.H + z.KV, D = z.D, lane = threadIdx.x % lanes;
    int n = blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes, end = n < N ? D : 0; // end 0: there is no such token
    size_t row = (size_t)n * heads + h;
    floatX *x = qkv + ((size_t)n * (heads + z.KV) + h) * D, *raw = a.raw + row * D;
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

// Numbers of m->qk_part, for N tokens.
size_t qk_sums(const Config *c, int N) {
    size_t heads = (size_t)(c->heads + c->kv_heads), D = (size_t)(c->dim / c->heads);
    return c->qk_norm ? heads * (size_t)div_up(N, QK_TOKENS) * D : 0;
}

QkNorm qk_norm_of(const Model *m, int l) {
    const LayerParams *w = &m->params.layer[l];
    return {w->q_norm, w->k_norm, m->layers[l].raw_qk, m->layers[l].rstd_qk};
}

// In qkv (N,(H+2KV)*D) queries and keys become their norms.
void qk_norm_forward(Model *m, int l, floatX *qkv) {
    const Config *c = &m->config;
    int N = m->batch.B * m->batch.T, H = c->heads, KV = c->kv_heads, D = c->dim / H, lanes = lanes_of_head(D);
    if (c->qk_norm && N > 0) {
        dim3 grid(blocks(N, THREADS / lanes), H + KV);
        qk_norm_forward_kernel<<<grid, THREADS, 0, stream>>>(qkv, qk_norm_of(m, l), HeadSizes{0, H, KV, D}, N, lanes,
                                                             (float)c->norm_eps);
        CHECK(cudaGetLastError());
    }
}

// The way back, in dqkv (N,(H+2KV)*D), and the gradients of the two vectors.
void qk_norm_backward(Model *m, int l, floatX *dqkv) {
    const Config *c = &m->config;
    const LayerParams *dw = &m->grads.layer[l];
    int N = m->batch.B * m->batch.T, H = c->heads, KV = c->kv_heads, D = c->dim / H, chunks = div_up(N, QK_TOKENS);
    if (!c->qk_norm || N == 0) {
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
