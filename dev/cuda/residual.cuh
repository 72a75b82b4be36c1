// What stands between the halves of a layer and the residual stream: norms that may be missing (--norms 0), dropout, and the
// sigmoid on what the mixture adds (--moe-sigmoid). See dev/residual.h, whose functions have the same names and whose masks
// are the same random numbers.
// Gives: norm_forward, norm_backward, drop_embedding, end_mixing, end_feeding, branch_gradient.
// Needs: dev/cuda/common.cuh; the norms, Sum and Model of train_moe.cu, which includes it.
//
// Usually no kernel of this file runs: what a half adds is added by the kernel of the next norm. With dropout or sigmoid it
// is changed in m->branch before that. A mask is drawn anew wherever it is wanted, so it takes no memory.
#ifndef CUDA_RESIDUAL_CUH
#define CUDA_RESIDUAL_CUH

// ---- norms, or none

__global__ void add_up_kernel(NormOut to, Sum from, size_t size, int C) {
    size_t i = 4 * thread_of_grid();
    float a[4];
    if (i >= size) {
        return;
    }
    sum_of(a, from, (int)(i / C), (int)(i % C), C);
    if (to.sum) {
        store_pack(to.sum + i, a);
    }
    if (to.out) {
        store_pack(to.out + i, a);
    }
    if (to.out32) {
        store_pack(to.out32 + i, a);
    }
}

// rmsnorm_forward, or with w NULL the sum itself in the norm's place.
void norm_forward(NormOut to, Sum from, const float *w, int N, int C, double eps) {
    size_t size = (size_t)N * C;
    if (w) {
        rmsnorm_forward(to, from, w, N, C, eps);
    } else if (N > 0) {
        add_up_kernel<<<blocks(size, 4 * THREADS), THREADS, 0, stream>>>(to, from, size, C);
        CHECK(cudaGetLastError());
    }
}

__global__ void add_gradient_kernel(float *dx, floatX *dx_low, const float *dh, size_t size) {
    size_t i = 4 * thread_of_grid();
    float a[4], b[4];
    if (i >= size) {
        return;
    }
    load_pack(a, dx + i);
    load_pack(b, dh + i);
    for (int j = 0; j < 4; j++) {
        a[j] += b[j];
    }
    store_pack(dx + i, a);
    store_pack(dx_low + i, a);
}

// rmsnorm_backward, or dx += dh where there is no norm.
void norm_backward(NormBack b, const float *dh, int N, int C) {
    size_t size = (size_t)N * C;
    if (b.w) {
        rmsnorm_backward(b, dh, N, C);
    } else if (N > 0) {
        add_gradient_kernel<<<blocks(size, 4 * THREADS), THREADS, 0, stream>>>(b.dx, b.dx_low, dh, size);
        CHECK(cudaGetLastError());
    }
}

// ---- dropout

struct Dropout {
    double probability; // 0: all numbers stay
    float factor;       // of those that stay: 1 / (1 - probability)
    uint64_t stream;
    uint64_t first; // number of the batch's first number among all of the step
};

// That of branch `which` of layer l; the embedding's has l -1 and FEEDING.
Dropout dropout_of(const Model *m, int l, int which) {
    const Config *c = &m->config;
    Dropout d = {};
    d.probability = has_dropout(m) ? c->dropout : 0;
    d.factor = (float)(1 / (1 - c->dropout));
    d.stream = drop_stream(m, l, which);
    d.first = (uint64_t)m->batch.first_token * (uint64_t)c->dim;
    return d;
}

// The four numbers x, of which the first is number i of (N,C).
__device__ void drop(float (&x)[4], const Dropout &d, size_t i) {
    for (int j = 0; j < 4 && d.probability > 0; j++) {
        x[j] = random_uniform(d.stream, d.first + i + j) >= d.probability ? x[j] * d.factor : 0;
    }
}

__global__ void drop_kernel(float *x, Dropout d, size_t size) {
    size_t i = 4 * thread_of_grid();
    float a[4];
    if (i < size) {
        load_pack(a, x + i);
        drop(a, d, i);
        store_pack(x + i, a);
    }
}

// x (N,C): what layer 0 reads, or the gradient by it, which is multiplied by the same factors.
void drop_embedding(Model *m, float *x) {
    size_t size = (size_t)m->batch.B * m->batch.T * m->config.dim;
    if (has_dropout(m) && size > 0) {
        drop_kernel<<<blocks(size, 4 * THREADS), THREADS, 0, stream>>>(x, dropout_of(m, -1, FEEDING), size);
        CHECK(cudaGetLastError());
    }
}

// ---- branches

// out (N,C) = dropout(from), or with `fed` (N,C), which is kept, dropout(sigmoid(from)).
__global__ void end_branch_kernel(floatX *out, floatX *fed, Sum from, Dropout d, size_t size, int C) {
    size_t i = 4 * thread_of_grid();
    float a[4];
    if (i >= size) {
        return;
    }
    sum_of(a, from, (int)(i / C), (int)(i % C), C);
    if (fed) {
        for (int j = 0; j < 4; j++) {
            a[j] = 1 / (1 + expf(-a[j]));
        }
        store_pack(fed + i, a);
    }
    drop(a, d, i);
    store_pack(out + i, a);
}

// m->branch (N,C) = what `from` adds up to, after sigmoid and dropout.
void end_branch(Model *m, int l, int which, Sum from) {
    size_t size = (size_t)m->batch.B * m->batch.T * m->config.dim;
    floatX *fed = has_sigmoid(m, l, which) ? m->layers[l].fed : NULL;
    if (size > 0) {
        end_branch_kernel<<<blocks(size, 4 * THREADS), THREADS, 0, stream>>>(
            m->branch, fed, from, dropout_of(m, l, which), size, m->config.dim);
        CHECK(cudaGetLastError());
    }
}

// What mixes has left its output in m->branch.
void end_mixing(Model *m, int l) {
    if (is_apart(m, l, MIXING)) {
        end_branch(m, l, MIXING, {NULL, m->branch, NULL, NULL, 0});
    }
}

// What feeds forward adds sum.branch and sum.rows to sum.x. Where the branch is made apart, these are added up first.
Sum end_feeding(Model *m, int l, Sum sum) {
    if (!is_apart(m, l, FEEDING)) {
        return sum;
    }
    end_branch(m, l, FEEDING, {NULL, sum.branch, sum.rows, sum.row, sum.K});
    return {sum.x, m->branch, NULL, NULL, 0};
}

__global__ void branch_gradient_kernel(floatX *out, const float *dx, const floatX *fed, Dropout d, size_t size) {
    size_t i = 4 * thread_of_grid();
    float a[4], y[4];
    if (i >= size) {
        return;
    }
    load_pack(a, dx + i);
    drop(a, d, i);
    if (fed) {
        load_pack(y, fed + i);
        for (int j = 0; j < 4; j++) {
            a[j] *= y[j] * (1 - y[j]);
        }
    }
    store_pack(out + i, a);
}

// The gradient (N,C) by what a branch made, from m->dx, that by the stream behind it. It is m->dx_low unless the branch was
// made apart: then it is in m->branch, which is free while a layer goes back.
const floatX *branch_gradient(Model *m, int l, int which) {
    size_t size = (size_t)m->batch.B * m->batch.T * m->config.dim;
    if (!is_apart(m, l, which)) {
        return m->dx_low;
    }
    if (size > 0) {
        branch_gradient_kernel<<<blocks(size, 4 * THREADS), THREADS, 0, stream>>>(
            m->branch, m->dx, has_sigmoid(m, l, which) ? m->layers[l].fed : NULL, dropout_of(m, l, which), size);
        CHECK(cudaGetLastError());
    }
    return m->branch;
}

#endif
