// An LSTM in attention's place on a GPU: see dev/mixers/lstm.h, which has the formulas, and whose arrays have the same names.
// Gives: lstm_kernels; lstm_forward, lstm_step, lstm_backward.
// Needs: dev/cuda/common.cuh; mixer.cuh; product, matmul and scratch memory of train_moe.cu, which includes it.
//
// The products with W_in, and all gradients of weights, are one product each over all tokens. Only what a step reads of the step
// before waits for that step: one product of all sequences' rows (B,P) with W_state, and one kernel for the units. So a layer
// takes 2 launches for each step forward and 2 backward, with a projection 3 and 4. These launches are what a GPU does slowly:
// the larger the batch, the better.
//
// What products read is floatX. z is added up in float32 from W_in's product, which is rounded, and W_state's, which is not. The
// cell and the gradient by it, which are sums over all steps, are float32.
#ifndef CUDA_LSTM_CUH
#define CUDA_LSTM_CUH

struct LstmLayer {  // what is kept of a layer, on the device; row n = b*T + t is step t of sequence b
    floatX *gates;  // (N,4M)  x W_in^T, and then i, f, g and o
    float *cell;    // (N,M)
    floatX *before; // (N+1,P)  what each step reads: r of the step before
    floatX *hidden; // (N,M)  where there is a projection
};

int lstm_has_proj(const Config *c) {
    return lstm_width(c) != c->dim;
}

// ---- memory

size_t lstm_lay(Model *m, int l, int N, char *memory) {
    const Config *c = &m->config;
    size_t M = (size_t)lstm_width(c), P = (size_t)c->dim, low = sizeof(floatX), n = (size_t)N;
    if (!m->layers[l].mixer) {
        m->layers[l].mixer = own_host(m, 1, sizeof(LstmLayer));
    }
    LstmLayer *a = (LstmLayer *)m->layers[l].mixer;
    return lay_list(memory, {{&a->gates, n * 4 * M * low},
                             {&a->cell, n * M * sizeof(float)},
                             {&a->before, (n + 1) * P * low},
                             {&a->hidden, lstm_has_proj(c) ? n * M * low : 0}});
}

// Pieces of scratch memory of lstm_mix and lstm_mix_backward. As in training, sequences have --seq tokens.
size_t lstm_scratch(const Config *c, int N, int train) {
    size_t M = (size_t)lstm_width(c), P = (size_t)c->dim, n = (size_t)N, B = (size_t)div_up(N, c->seq);
    size_t read = B * 4 * M * sizeof(float), dz = n * 4 * M * sizeof(floatX);
    size_t dr = lstm_has_proj(c) ? n * P * sizeof(floatX) + B * M * sizeof(float) : 0;
    size_t backward = dz + dr + B * (P + M) * sizeof(float) + (size_t)div_up(N, CHUNK) * 4 * M * sizeof(double);
    return (train && backward > read ? backward : read) + 8 * 256; // each piece begins at a multiple of 256 bytes
}

// Generation keeps the cell, and what the next step reads.
size_t lstm_cache(const Config *c) {
    return lstm_width(c) * sizeof(float) + c->dim * sizeof(floatX);
}

// ---- the units of one step

// The pointers lead to sequence 0 of the step; the sequences are T rows apart.
struct LstmStep {
    floatX *gates;     // 4M numbers a row: come in as x W_in^T, and become i, f, g and o
    const float *read; // (B,4M)  what the step reads, times W_state; NULL: nothing
    const float *bias; // (4M)
    const float *old;  // the cells of the step before; NULL: zeros. With one sequence it may be the same memory as `cell`
    float *cell;
    floatX *hidden;    // o * tanh(c)
    int B, T, M;
};

__device__ float sigmoid_of(float z) {
    return 1 / (1 + expf(-z));
}

// A thread has four units of a sequence.
__global__ void lstm_units_kernel(LstmStep s) {
    size_t i = 4 * thread_of_grid(), M = s.M, b = i / M, j = i % M, row = b * s.T;
    if (b >= (size_t)s.B) {
        return;
    }

    // z of the four gates
    float z[4][4], more[4], old[4] = {}, cell[4], hidden[4];
    for (int gate = 0; gate < 4; gate++) {
        load_pack(z[gate], s.gates + row * 4 * M + gate * M + j);
        load_pack(more, s.bias + gate * M + j);
        for (int v = 0; v < 4; v++) {
            z[gate][v] += more[v];
        }
        if (s.read) {
            load_pack(more, s.read + b * 4 * M + gate * M + j);
            for (int v = 0; v < 4; v++) {
                z[gate][v] += more[v];
            }
        }
        for (int v = 0; v < 4; v++) {
            z[gate][v] = gate == 2 ? tanhf(z[gate][v]) : sigmoid_of(z[gate][v]);
        }
        store_pack(s.gates + row * 4 * M + gate * M + j, z[gate]);
    }

    if (s.old) {
        load_pack(old, s.old + row * M + j);
    }
    for (int v = 0; v < 4; v++) {
        cell[v] = z[1][v] * old[v] + z[0][v] * z[2][v];
        hidden[v] = z[3][v] * tanhf(cell[v]);
    }
    store_pack(s.cell + row * M + j, cell);
    store_pack(s.hidden + row * M + j, hidden);
}

void lstm_units_forward(const LstmStep &s) {
    lstm_units_kernel<<<blocks((size_t)s.B * s.M, 4 * THREADS), THREADS, 0, stream>>>(s);
    CHECK(cudaGetLastError());
}

struct LstmStepBack {
    floatX *dz;           // 4M numbers a row, T rows apart
    float *dcell;         // (B,M)  comes in as the gradient by c_t from the next step, and goes out as that by c_(t-1)
    const floatX *dout;   // M numbers a row, T rows apart; with a projection NULL
    const float *dhidden; // (B,M)  the other part of the gradient by h_t; NULL: there is none
    const floatX *gates;
    const float *cell, *old;
    int B, T, M, last; // last: no step comes later, so dcell is 0
};

__global__ void lstm_units_backward_kernel(LstmStepBack s) {
    size_t i = 4 * thread_of_grid(), M = s.M, b = i / M, j = i % M, row = b * s.T;
    if (b >= (size_t)s.B) {
        return;
    }
    float gate[4][4], dz[4][4], cell[4], old[4] = {}, dcell[4] = {}, dh[4] = {}, more[4];
    for (int k = 0; k < 4; k++) {
        load_pack(gate[k], s.gates + row * 4 * M + k * M + j);
    }
    load_pack(cell, s.cell + row * M + j);
    if (s.old) {
        load_pack(old, s.old + row * M + j);
    }
    if (!s.last) {
        load_pack(dcell, s.dcell + b * M + j);
    }
    if (s.dout) {
        load_pack(dh, s.dout + row * M + j);
    }
    if (s.dhidden) {
        load_pack(more, s.dhidden + b * M + j);
        for (int v = 0; v < 4; v++) {
            dh[v] += more[v];
        }
    }

    // As lstm_units_backward of the C twin.
    for (int v = 0; v < 4; v++) {
        float in = gate[0][v], keep = gate[1][v], g = gate[2][v], o = gate[3][v], squashed = tanhf(cell[v]);
        float dc = dcell[v] + dh[v] * o * (1 - squashed * squashed);
        dz[0][v] = dc * g * in * (1 - in);
        dz[1][v] = dc * old[v] * keep * (1 - keep);
        dz[2][v] = dc * in * (1 - g * g);
        dz[3][v] = dh[v] * squashed * o * (1 - o);
        dcell[v] = dc * keep;
    }
    for (int k = 0; k < 4; k++) {
        store_pack(s.dz + row * 4 * M + k * M + j, dz[k]);
    }
    store_pack(s.dcell + b * M + j, dcell);
}

// to (rows T apart, P) = dout (the same) + dread (B,P); dread NULL: 0
__global__ void lstm_dr_kernel(floatX *to, const floatX *dout, const float *dread, int B, int T, int P) {
    size_t i = 4 * thread_of_grid(), b = i / P, at = b * T * P + i % P;
    float a[4], more[4] = {};
    if (b >= (size_t)B) {
        return;
    }
    load_pack(a, dout + at);
    if (dread) {
        load_pack(more, dread + i);
    }
    for (int v = 0; v < 4; v++) {
        a[v] += more[v];
    }
    store_pack(to + at, a);
}

// The first row of each sequence of x (B,T,P) becomes 0.
__global__ void lstm_clear_first_kernel(floatX *x, int B, int T, int P) {
    size_t i = 4 * thread_of_grid(), b = i / P;
    const float zeros[4] = {};
    if (b < (size_t)B) {
        store_pack(x + b * T * P + i % P, zeros);
    }
}

// ---- a layer

// out (N,P) = the LSTM of x (N,C), B sequences of T tokens. read (B,4M) is scratch memory.
void lstm_forward(const Model *m, floatX *out, LstmLayer a, const floatX *x, LstmWeights w, float *read, int B, int T,
                  int C, int M, int P) {
    gpu::matmul(a.gates, x, low_of(m, w.in), B * T, C, 4 * M, SET);

    // Row n of `before` is read at n and was written by the step before. A sequence's last row is where the next one begins.
    for (int t = 0; t < T; t++) {
        floatX *given = a.before + (size_t)(t + 1) * P, *hidden = w.proj ? a.hidden + (size_t)t * M : given;
        if (t % 32 == 0) {
            keep_pace();
        }
        if (t > 0) {
            product(read, a.before + (size_t)t * P, 0, low_of(m, w.state), 0, B, 4 * M, P, SET, T * P);
        }
        float *cell = a.cell + (size_t)t * M;
        lstm_units_forward({a.gates + (size_t)t * 4 * M, t ? read : NULL, w.bias, t ? cell - M : NULL, cell, hidden, B,
                            T, M});
        if (w.proj) {
            product(given, hidden, 0, low_of(m, w.proj), 0, B, P, M, SET, T * M, T * P);
        }
    }

    // What the steps gave is the output; and no sequence reads what the one before it gave.
    CHECK(cudaMemcpyAsync(out, a.before + P, (size_t)B * T * P * sizeof(floatX), cudaMemcpyDeviceToDevice, stream));
    lstm_clear_first_kernel<<<blocks((size_t)B * P, 4 * THREADS), THREADS, 0, stream>>>(a.before, B, T, P);
    CHECK(cudaGetLastError());
}

// One token, for generation: out (P) = r. x (C); cell (M) and r (P) are the state. read (4M) is scratch memory.
void lstm_step(const Model *m, floatX *out, float *cell, floatX *r, LstmLayer a, const floatX *x, LstmWeights w,
               float *read, int first, int C, int M, int P) {
    gpu::matmul(a.gates, x, low_of(m, w.in), 1, C, 4 * M, SET);
    if (!first) {
        gpu::matmul(read, r, low_of(m, w.state), 1, P, 4 * M, SET);
    }
    lstm_units_forward({a.gates, first ? NULL : read, w.bias, first ? NULL : cell, cell, w.proj ? a.hidden : r, 1, 1, M});
    if (w.proj) {
        gpu::matmul(r, a.hidden, low_of(m, w.proj), 1, M, P, SET);
    }
    CHECK(cudaMemcpyAsync(out, r, P * sizeof(floatX), cudaMemcpyDeviceToDevice, stream));
}

struct LstmScratch { // backward
    floatX *dz;      // (N,4M)
    floatX *dr;      // (N,P)  with a projection: the gradient by r_t
    float *dread;    // (B,P)  by what the step after this one has read
    float *dhidden;  // (B,M)  with a projection
    float *dcell;    // (B,M)
    double *part;    // sums for the gradient of the bias
};

struct LstmGradients { // by z
    const floatX *dz;
    int columns;
    __device__ double operator()(size_t n, int column) const {
        return (double)to_float(dz[n * columns + column]);
    }
};

// Given dout (N,P), dx (N,C) is written, and the gradients dw are added to.
void lstm_backward(const Model *m, float *dx, LstmWeights dw, LstmScratch s, const floatX *dout, LstmLayer a,
                   const floatX *x, LstmWeights w, int B, int T, int C, int M, int P) {
    int N = B * T;
    for (int t = T - 1; t >= 0; t--) {
        size_t row = (size_t)t;
        float *cell = a.cell + row * M, *dread = t + 1 < T ? s.dread : NULL;
        if (t % 32 == 0) {
            keep_pace();
        }
        if (dread) {
            product(dread, s.dz + (row + 1) * 4 * M, 0, low_of(m, w.state), 1, B, P, 4 * M, SET, T * 4 * M);
        }
        if (w.proj) {
            lstm_dr_kernel<<<blocks((size_t)B * P, 4 * THREADS), THREADS, 0, stream>>>(s.dr + row * P, dout + row * P,
                                                                                       dread, B, T, P);
            CHECK(cudaGetLastError());
            product(s.dhidden, s.dr + row * P, 0, low_of(m, w.proj), 1, B, M, P, SET, T * P);
        }
        LstmStepBack step = {s.dz + row * 4 * M, s.dcell, w.proj ? NULL : dout + row * P, w.proj ? s.dhidden : dread,
                             a.gates + row * 4 * M, cell, t ? cell - M : NULL, B, T, M, t + 1 == T};
        lstm_units_backward_kernel<<<blocks((size_t)B * M, 4 * THREADS), THREADS, 0, stream>>>(step);
        CHECK(cudaGetLastError());
    }

    // All steps at once.
    gpu::matmul_dx(dx, s.dz, low_of(m, w.in), N, C, 4 * M, SET);
    matmul_dw(dw.in, s.dz, x, N, C, 4 * M);
    matmul_dw(dw.state, s.dz, a.before, N, P, 4 * M);
    if (w.proj) {
        matmul_dw(dw.proj, s.dr, a.hidden, N, M, P);
    }
    column_sums(dw.bias, LstmGradients{s.dz, 4 * M}, 1, N, 4 * M, 1, s.part);
}

// ---- the mixer

void lstm_mix(Model *m, int l, floatX *out, const floatX *x) {
    const Config *c = &m->config;
    int B = m->batch.B, T = m->batch.T, C = c->dim, M = lstm_width(c);
    const LstmLayer *a = (const LstmLayer *)m->layers[l].mixer;
    LstmWeights w = lstm_weights(m, l, WEIGHTS);
    float *read = scratch(m, (size_t)B * 4 * M);
    if (m->cache) {
        float *cell = (float *)layer_cache(m, l);
        lstm_step(m, out, cell, (floatX *)(cell + M), *a, x, w, read, m->position == 0, C, M, C);
    } else {
        lstm_forward(m, out, *a, x, w, read, B, T, C, M, C);
    }
}

void lstm_mix_backward(Model *m, int l, float *dx, const floatX *dout, const floatX *x) {
    const Config *c = &m->config;
    int B = m->batch.B, T = m->batch.T, C = c->dim, M = lstm_width(c), proj = lstm_has_proj(c);
    size_t N = (size_t)B * T, low = sizeof(floatX);
    LstmScratch s = {};
    s.dz = (floatX *)scratch_bytes(m, N * 4 * M * low);
    s.dr = (floatX *)scratch_bytes(m, proj ? N * C * low : 0);
    s.dread = scratch(m, (size_t)B * C);
    s.dhidden = scratch(m, proj ? (size_t)B * M : 0);
    s.dcell = scratch(m, (size_t)B * M);
    s.part = (double *)scratch_bytes(m, (size_t)div_up((int)N, CHUNK) * 4 * M * sizeof(double));
    lstm_backward(m, dx, lstm_weights(m, l, GRADS), s, dout, *(const LstmLayer *)m->layers[l].mixer, x,
                  lstm_weights(m, l, WEIGHTS), B, T, C, M, C);
}

const char *lstm_device_refuses(const Config *c) {
    return lstm_width(c) % 8 ? "--cell must be a multiple of 8 on a GPU" : NULL;
}

const MixerKernels lstm_kernels = {
    &lstm_mixer, lstm_device_refuses, lstm_lay, lstm_scratch, lstm_cache, lstm_mix, lstm_mix_backward,
};

#endif
