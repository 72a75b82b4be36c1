// Muon on the GPU (--optimizer muon): see dev/muon.h, whose functions have the same names.
// Gives: own_muon, orthogonalize, muon_update. Needs: dev/cuda/common.cuh, memory.cuh, ranks.cuh; products and clip_scale of
// train_moe.cu, which includes it.
//
// The products are cuBLAS's, of all experts' matrices at once, and of floatX: rounding to bfloat16 is what Jordan et
// al. 2024 do, too; weak directions suffer from it most. The first term of
//     a X + (b X X^T + c (X X^T)^2) X
// needs no pass of its own: a is added on the diagonal of the matrix in the brackets. doc/cuda.md says what a step costs.
#pragma once

const int MUON_PARTS = 64;            // sums that make up a matrix' sum of squares
const size_t MUON_NUMBERS = 1 << 26;  // of the matrices that are worked on at a time, unless one alone is larger

struct MuonScratch {
    floatX *x[2];              // (n,R,C)  matrices, before and after a round
    floatX *gram, *polynomial; // (n,S,S)  X X^T or X^T X, the smaller one; the matrix in the brackets, and a
    float *square;             // (n,S,S)  gram times gram
    double *part;              // (n,MUON_PARTS)
};

// How many matrices (R,C), of E, are worked on at a time.
int muon_matrices(int E, int R, int C) {
    size_t most = MUON_NUMBERS / ((size_t)R * (size_t)C);
    return max_int(1, most < (size_t)E ? (int)most : E);
}

// Memory for the largest of the tensors that are Muon's.
void own_muon(Model *m) {
    const Config *c = &m->config;
    size_t numbers = 0, squares = 0, matrices = 0;
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        if (takes_muon(c, t) && t->size) {
            int R = t->shape[1], C = t->shape[2], small = min_int(R, C);
            size_t n = (size_t)muon_matrices((int)(t->size / ((size_t)R * (size_t)C)), R, C);
            size_t of_x = n * (size_t)R * (size_t)C, of_square = n * (size_t)small * (size_t)small;
            numbers = of_x > numbers ? of_x : numbers;
            squares = of_square > squares ? of_square : squares;
            matrices = n > matrices ? n : matrices;
        }
    }
    MuonScratch *s = m->muon = (MuonScratch *)own_host(m, 1, sizeof(MuonScratch));
    s->x[0] = own_low(m, numbers);
    s->x[1] = own_low(m, numbers);
    s->gram = own_low(m, squares);
    s->polynomial = own_low(m, squares);
    s->square = own_floats(m, squares);
    s->part = (double *)own(m, matrices * MUON_PARTS, sizeof(double));
}

// ---- the direction

// mean and g (size): the mean of the gradients, and from it the direction, in the gradient's place, as muon_update of the
// C twin. first: number of the first one in the whole tensor, for the random numbers that round moments.
template <class Moment>
__global__ void muon_direction_kernel(float *g, Moment *mean, size_t size, size_t first, uint64_t draws, double clip,
                                      const double *norm) {
    const float keep = (float)MUON_MOMENTUM, part = 1 - keep;
    size_t i = 4 * thread_of_grid();
    float a[4], b[4];
    if (i >= size || !isfinite(*norm)) {
        return;
    }
    float scale = clip_scale(clip, *norm);
    load_pack(a, g + i);
    load_pack(b, mean + i);
    for (int j = 0; j < 4; j++) {
        float fresh = part * a[j] * scale;
        b[j] = keep * b[j] + fresh;
        a[j] = keep * b[j] + fresh;
        if (sizeof(Moment) == 2) {
            b[j] = round_stochastically(b[j], (unsigned)(moment_draw(draws, first + i + j) & 0xffff));
        }
    }
    store_pack(mean + i, b);
    store_pack(g + i, a);
}

template <class Moment>
void muon_direction(float *g, void *mean, size_t size, size_t first, uint64_t draws, double clip, const double *norm) {
    muon_direction_kernel<Moment><<<blocks(size, 4 * THREADS), THREADS, 0, stream>>>(g, (Moment *)mean, size, first,
                                                                                     draws, clip, norm);
    CHECK(cudaGetLastError());
}

// ---- its singular values become 1

// part (E,parts) = sums of squares of parts of each matrix g (E,size). Block (i,e) has part i of matrix e.
__global__ void matrix_squares_kernel(double *part, const float *g, size_t size) {
    const float *x = g + blockIdx.y * size;
    double sum = 0;
    float a[4];
    for (size_t i = 4 * thread_of_grid(); i < size; i += (size_t)4 * gridDim.x * THREADS) {
        load_pack(a, x + i);
        for (int j = 0; j < 4; j++) {
            sum += (double)a[j] * (double)a[j];
        }
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        part[blockIdx.y * gridDim.x + blockIdx.x] = sum;
    }
}

// x (E,size) = g, each matrix divided by its norm, and rounded. As in the C twin, what is nearly 0 becomes 0; so does all
// where the norm of all gradients is not finite, and no step follows.
__global__ void divide_by_norm_kernel(floatX *x, const float *g, const double *part, int parts, size_t size,
                                      const double *norm) {
    double sum = block_sum((int)threadIdx.x < parts ? part[blockIdx.y * parts + threadIdx.x] : 0);
    float scale = (float)(isfinite(*norm) && sum > 1e-60 ? 1 / sqrt(sum) : 0), a[4];
    size_t i = 4 * thread_of_grid(), at = blockIdx.y * size + i;
    if (i < size) {
        load_pack(a, g + at);
        for (int j = 0; j < 4; j++) {
            a[j] = scale > 0 ? a[j] * scale : 0;
        }
        store_pack(x + at, a);
    }
}

// to (E,S,S) = a on the diagonal, + b gram + c square
__global__ void polynomial_kernel(floatX *to, const floatX *gram, const float *square, float a, float b, float c, int S) {
    size_t i = thread_of_grid(), size = (size_t)S * S, at = blockIdx.y * size + i;
    if (i < size) {
        store(&to[at], (i % (S + 1) == 0 ? a : 0) + b * to_float(gram[at]) + c * square[at]);
    }
}

// Returns floatX (E,R,C): what becomes of the matrices g (E,R,C) is U V^T, nearly. E is at most muon_matrices().
const floatX *orthogonalize(const MuonScratch *s, const float *g, int E, int R, int C, const double *norm) {
    const float a = 3.4445f, b = -4.7750f, c = 2.0315f; // as in the C twin
    int S = min_int(R, C), tall = R > C;
    size_t size = (size_t)R * C;
    int parts = min_int(MUON_PARTS, blocks(size, 4 * THREADS));
    floatX *x = s->x[0], *after = s->x[1];
    matrix_squares_kernel<<<dim3(parts, E), THREADS, 0, stream>>>(s->part, g, size);
    CHECK(cudaGetLastError());
    divide_by_norm_kernel<<<dim3(blocks(size, 4 * THREADS), E), THREADS, 0, stream>>>(x, g, s->part, parts, size,
                                                                                    norm);
    CHECK(cudaGetLastError());
    for (int round = 0; round < MUON_ROUNDS; round++) {
        products(s->gram, x, tall, x, tall, S, S, tall ? R : C, E);
        products(s->square, s->gram, 0, s->gram, 0, S, S, S, E); // it is symmetric
        polynomial_kernel<<<dim3(blocks((size_t)S * S), E), THREADS, 0, stream>>>(s->polynomial, s->gram, s->square, a,
                                                                                  b, c, S);
        CHECK(cudaGetLastError());
        if (tall) {
            products(after, x, 0, s->polynomial, 0, R, C, C, E);
        } else {
            products(after, s->polynomial, 0, x, 1, R, C, R, E);
        }
        floatX *other = x;
        x = after;
        after = other;
    }
    return x;
}

// ---- the step

// w (size) = keep * w - rate * direction; the gradients g are cleared.
__global__ void muon_step_kernel(float *w, floatX *low, float *g, const floatX *direction, size_t size, float keep,
                                 float rate, const double *norm) {
    size_t i = 4 * thread_of_grid();
    float a[4], b[4], zeros[4] = {0};
    if (i >= size || !isfinite(*norm)) {
        return;
    }
    load_pack(a, w + i);
    load_pack(b, direction + i);
    for (int j = 0; j < 4; j++) {
        a[j] = keep * a[j] - rate * b[j];
    }
    store_pack(w + i, a);
    store_pack(g + i, zeros);
    if (low) {
        store_pack(low + i, a);
    }
}

// A step for the matrices of a tensor, of which this process updates numbers at .. at+size: it may have slices of some.
void muon_step(Model *m, const Tensor *t, size_t at, size_t size, double lr, const double *norm) {
    int R = t->shape[1], C = t->shape[2];
    size_t each = (size_t)R * C;
    int E = (int)(t->size / each), n = muon_matrices(E, R, C);
    float keep = (float)(1 - lr * m->config.weight_decay), rate = (float)(lr * 0.2 * sqrt(fmax(R, C)));
    for (int e = 0; e < E; e += n) {
        keep_pace();
        int count = min_int(n, E - e);
        size_t begin = t->offset + e * each, end = begin + count * each; // of these matrices
        size_t from = begin > at ? begin : at, until = end < at + size ? end : at + size;
        if (from >= until) {
            continue;
        }
        const floatX *direction = gpu::orthogonalize(m->muon, m->memory[GRADS] + begin, count, R, C, norm);
        float *w = m->memory[WEIGHTS] + from;
        floatX *low = (void *)m->low == (void *)m->memory[WEIGHTS] ? NULL : m->low + from;
        muon_step_kernel<<<blocks(until - from, 4 * THREADS), THREADS, 0, stream>>>(
            w, low, m->memory[GRADS] + from, direction + (from - begin), until - from, keep, rate, norm);
        CHECK(cudaGetLastError());
    }
}

// A step of Muon for all its tensors, unless *norm, that of all gradients, is not finite; their gradients are cleared.
void muon_update(Model *m, int step, double lr, const double *norm) {
    const Config *c = &m->config;
    if (c->optimizer != MUON) {
        return;
    }
    for (int pass = 0; pass < 2; pass++) { // all directions first: a matrix may have slices in two processes
        for (int i = 0; i < m->tensor_count; i++) {
            const Tensor *t = &m->tensors[i];
            size_t at = t->offset, size = t->size;
            ranks_own_range(m, t, &at, &size);
            if (!takes_muon(c, t) || !size) {
                continue;
            }
            float *g = m->memory[GRADS] + at;
            void *mean = moment_at(m, MOMENT1, moment_offset(m, at));
            size_t first = t->first + (at - t->offset);
            uint64_t draws = moment_stream((uint64_t)c->seed, step, i);
            if (pass == 1) {
                muon_step(m, t, at, size, lr, norm);
            } else if (c->moments == MOMENTS_BF16) {
                muon_direction<__nv_bfloat16>(g, mean, size, first, draws, c->clip, norm);
            } else {
                muon_direction<float>(g, mean, size, first, draws, c->clip, norm);
            }
        }
        if (pass == 0) {
            share_directions(m);
        }
    }
}
