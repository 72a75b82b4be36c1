// The activation of feed-forward layers. The experts' products have it in them; what every token passes has a kernel.
// Gives: activate, activation_forward, activation_backward. Needs: dev/cuda/common.cuh; is_gated of train_moe.c.
#ifndef CUDA_ACTIVATION_CUH
#define CUDA_ACTIVATION_CUH

// The activation function f at x, and its slope.
__device__ void activate(int activation, float x, float *value, float *slope) {
    if (activation == SWIGLU) {
        float sigmoid = 1 / (1 + __expf(-x));
        *value = x * sigmoid;
        *slope = sigmoid * (1 + x * (1 - sigmoid));
    } else if (activation == RELU) {
        *value = x > 0 ? x : 0;
        *slope = x > 0 ? 1 : 0;
    } else if (activation == SAME) { // none: the experts of attention
        *value = x;
        *slope = 1;
    } else {
        float phi = 0.5f * (1 + erff(x * 0.70710678f));
        *value = x * phi;
        *slope = phi + x * __expf(-0.5f * x * x) * 0.39894228f;
    }
}

// ---- of a feed-forward layer that every token passes: a block has a row, its threads take eight numbers at a time

__global__ void activation_forward_kernel(floatX *act, const floatX *hidden, int F, int activation) {
    int gated = is_gated(activation);
    const floatX *row = hidden + (size_t)blockIdx.x * F * (1 + gated);
    for (int j = 8 * threadIdx.x; j < F; j += 8 * blockDim.x) {
        float value[8], up[8], slope;
        load_pack(value, row + j);
        if (gated) {
            load_pack(up, row + F + j);
        }
        for (int i = 0; i < 8; i++) {
            activate(activation, value[i], &value[i], &slope);
            value[i] *= gated ? up[i] : 1;
        }
        store_pack(act + (size_t)blockIdx.x * F + j, value);
    }
}

// act (N,F) = f(gate) * up, or f(hidden)
void activation_forward(floatX *act, const floatX *hidden, int N, int F, int activation) {
    activation_forward_kernel<<<N, row_threads(F, 8), 0, stream>>>(act, hidden, F, activation);
    CHECK(cudaGetLastError());
}

__global__ void activation_backward_kernel(floatX *dhidden, floatX *dact, const floatX *hidden, int F,
                                           int activation) {
    int gated = is_gated(activation);
    size_t row = (size_t)blockIdx.x * F * (1 + gated);
    for (int j = 8 * threadIdx.x; j < F; j += 8 * blockDim.x) {
        float gate[8], up[8], d[8], dup[8], act[8];
        load_pack(gate, hidden + row + j);
        if (gated) {
            load_pack(up, hidden + row + F + j);
        }
        load_pack(d, dact + (size_t)blockIdx.x * F + j);
        for (int i = 0; i < 8; i++) {
            float value, slope, u = gated ? up[i] : 1;
            activate(activation, gate[i], &value, &slope);
            act[i] = u * value;
            dup[i] = d[i] * value;
            d[i] *= u * slope;
        }
        store_pack(dhidden + row + j, d);
        if (gated) {
            store_pack(dhidden + row + F + j, dup);
        }
        store_pack(dact + (size_t)blockIdx.x * F + j, act);
    }
}

// dact (N,F) becomes act, dhidden (N,2F or F) is written.
void activation_backward(floatX *dhidden, floatX *dact, const floatX *hidden, int N, int F, int activation) {
    activation_backward_kernel<<<N, row_threads(F, 8), 0, stream>>>(dhidden, dact, hidden, F, activation);
    CHECK(cudaGetLastError());
}

#endif
