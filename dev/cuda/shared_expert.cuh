// Shared experts with a gate (--shared-gate) on the GPU: see dev/shared_expert.h.
// Gives: own_shared_gate, shared_gate_forward, shared_activation_backward, shared_gate_backward. Needs: dev/cuda/common.cuh,
// activation.cuh, memory.cuh; gpu::Model of train_moe.cu, which includes it.
//
// A gate is a dot product of as many numbers as the model is wide. The kernels that need it work on a row of the activation,
// which is longer; so each block makes its token's gate anew, and none is kept.
#pragma once

// sigmoid(x . w) of rows of C numbers, in each thread of the block. A thread reads eight numbers at a time.
__device__ float gate_of_row(const floatX *x, const float *w, int C) {
    float sum = 0;
    for (int c = 8 * threadIdx.x; c < C; c += 8 * blockDim.x) {
        float a[8], b[8];
        load_pack(a, x + c);
        load_pack(b, w + c);
        for (int i = 0; i < 8; i++) {
            sum += a[i] * b[i];
        }
    }
    return 1 / (1 + __expf(-block_sum(sum)));
}

// Block n: row n of act (N,F) is multiplied by the gate of x (N,C).
__global__ void shared_gate_kernel(floatX *act, const floatX *x, const float *w, int C, int F) {
    float gate = gate_of_row(x + (size_t)blockIdx.x * C, w, C);
    floatX *row = act + (size_t)blockIdx.x * F;
    for (int j = 8 * threadIdx.x; j < F; j += 8 * blockDim.x) {
        float a[8];
        load_pack(a, row + j);
        for (int i = 0; i < 8; i++) {
            a[i] *= gate;
        }
        store_pack(row + j, a);
    }
}

// activation_backward_kernel() of a layer with a gate. Row n of dact (N,F) becomes gate * act, and dlogit (N) is the gradient
// by x . w: that by the gate is the sum of dact * act, and the derivative of a sigmoid is gate * (1 - gate).
__global__ void shared_activation_kernel(floatX *dhidden, floatX *dact, float *dlogit, const floatX *hidden, const floatX *x,
                                         const float *w, int C, int F, int activation) {
    float weight = gate_of_row(x + (size_t)blockIdx.x * C, w, C), sum = 0;
    int gated = is_gated(activation);
    size_t row = (size_t)blockIdx.x * F * (1 + gated);
    for (int j = 8 * threadIdx.x; j < F; j += 8 * blockDim.x) {
        float gate[8], up[8], d[8], dup[8];
        load_pack(gate, hidden + row + j);
        if (gated) {
            load_pack(up, hidden + row + F + j);
        }
        load_pack(d, dact + (size_t)blockIdx.x * F + j);
        for (int i = 0; i < 8; i++) {
            float value, slope, u = gated ? up[i] : 1, by_act = weight * d[i];
            activate(activation, gate[i], &value, &slope);
            sum += d[i] * u * value;
            gate[i] = weight * u * value;
            dup[i] = by_act * value;
            d[i] = by_act * u * slope;
        }
        store_pack(dhidden + row + j, d);
        if (gated) {
            store_pack(dhidden + row + F + j, dup);
        }
        store_pack(dact + (size_t)blockIdx.x * F + j, gate);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        dlogit[blockIdx.x] = sum * weight * (1 - weight);
    }
}

// Number i of dx (N,C) += dlogit w: eight numbers of a row.
__global__ void shared_gate_dx_kernel(float *dx, const float *dlogit, const float *w, size_t size, int C) {
    size_t i = 8 * thread_of_grid();
    float a[8], b[8];
    if (i < size) {
        load_pack(a, dx + i);
        load_pack(b, w + i % C);
        for (int j = 0; j < 8; j++) {
            a[j] += dlogit[i / C] * b[j];
        }
        store_pack(dx + i, a);
    }
}

struct GateGradient { // what token n adds to the gradient of w
    const floatX *x;
    const float *dlogit;
    int C;
    __device__ double operator()(size_t n, int c) const {
        return (double)dlogit[n] * (double)to_float(x[n * C + c]);
    }
};

// Memory of the backward pass of N tokens.
void own_shared_gate(Model *m, int N) {
    int gated = m->config.shared_gate;
    m->dgate = own_floats(m, gated ? N : 0);
    m->dgate_part = (double *)own(m, gated ? (size_t)div_up(N, CHUNK) * m->config.dim : 0, sizeof(double));
}

// m->act (N,F) of the shared experts, times the gate of each token; nothing where layer l has none.
void shared_gate_forward(Model *m, int l, int N, int F) {
    const float *w = m->params.layer[l].shared_router;
    if (w) {
        shared_gate_kernel<<<N, row_threads(F, 8), 0, stream>>>(m->act, m->layers[l].h2, w, m->config.dim, F);
        CHECK(cudaGetLastError());
    }
}

// m->act (N,F), the gradient, becomes the activation again, and m->dhidden is written.
void shared_activation_backward(Model *m, int l, int N, int F, int activation) {
    const float *w = m->params.layer[l].shared_router;
    const LayerActs *a = &m->layers[l];
    if (!w) {
        activation_backward(m->dhidden, m->act, a->dense_hidden, N, F, activation);
        return;
    }
    shared_activation_kernel<<<N, row_threads(F, 8), 0, stream>>>(m->dhidden, m->act, m->dgate, a->dense_hidden, a->h2, w,
                                                                  m->config.dim, F, activation);
    CHECK(cudaGetLastError());
}

// And then through the gate: to m->dh (N,C) and to its weights, both of which are added to.
void shared_gate_backward(Model *m, int l, int N) {
    const float *w = m->params.layer[l].shared_router;
    int C = m->config.dim;
    size_t size = (size_t)N * C;
    if (!w) {
        return;
    }
    shared_gate_dx_kernel<<<blocks(size, 8 * THREADS), THREADS, 0, stream>>>(m->dh, m->dgate, w, size, C);
    CHECK(cudaGetLastError());
    column_sums(m->grads.layer[l].shared_router, GateGradient{m->layers[l].h2, m->dgate, C}, 1, N, C, 1, m->dgate_part);
}
