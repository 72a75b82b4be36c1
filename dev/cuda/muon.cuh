// Muon on the GPU (--optimizer muon): see dev/muon.h, whose functions have the same names.
// Gives: own_muon, orthogonalize, muon_update. Needs: dev/cuda/common.cuh, memory.cuh, ranks.cuh; products and clip_scale of
// train_moe.cu, which includes it.
//
// The products are cuBLAS's, of all experts at once whose turn it is, and of floatX: rounding to bfloat16 is what Jordan et
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

// How many matrices (R,C), of E whose turn it is, are worked on at a time.
int muon_matrices(int E, int R, int C) {
    size_t most = MUON_NUMBERS / ((size_t)R * (size_t)C);
    return max_int(1, most < (size_t)E ? (int)most : E);
}

// Memory for the largest of the tensors that are Muon's.
void own_muon(Model *m) {
    const Config *c = &m->config;
    size_t numbers = 0, squares = 0;
    int matrices = 0;
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        if (takes_muon(c, t) && t->size) {
            int R = t->shape[1], C = t->shape[2], small = min_int(R, C), E = (int)(t->size / ((size_t)R * (size_t)C));
            size_t n = (size_t)muon_matrices((E + MUON_TURNS - 1) / MUON_TURNS, R, C);
            size_t of_x = n * (size_t)R * (size_t)C, of_square = n * (size_t)small * (size_t)small;
            numbers = of_x > numbers ? of_x : numbers;
            squares = of_square > squares ? of_square : squares;
            matrices = max_int(matrices, E);
        }
    }
    MuonScratch *s = m->muon = (MuonScratch *)own_host(m, 1, sizeof(MuonScratch));
    s->x[0] = own_low(m, numbers);
    s->x[1] = own_low(m, numbers);
    s->gram = own_low(m, squares);
    s->polynomial = own_low(m, squares);
    s->square = own_floats(m, squares);
    s->part = (double *)own(m, (size_t)matrices * MUON_PARTS, sizeof(double));
}

// part (E,parts) = sums of squares of parts of E matrices of `size` numbers, of which one begins each `stride` numbers
// behind the last one. Block (i,e) has part i of matrix e.
__global__ void matrix_squares_kernel(double *part, const float *g, size_t size, size_t stride) {
    const float *x = g + blockIdx.y * stride;
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

// Returns the number of parts of each matrix.
int matrix_squares(double *part, const float *g, int E, size_t size, size_t stride) {
    int parts = min_int(MUON_PARTS, blocks(size, 4 * THREADS));
    matrix_squares_kernel<<<dim3(parts, E), THREADS, 0, stream>>>(part, g, size, stride);
    CHECK(cudaGetLastError());
    return parts;
}

// For all threads of a block: the sum of squares of matrix blockIdx.y.
__device__ double matrix_sum(const double *part, int parts) {
    return block_sum((int)threadIdx.x < parts ? part[blockIdx.y * parts + threadIdx.x] : 0);
}

// ---- the direction

struct Direction {
    float *g;           // (E,size)  gradients, which become the direction
    void *mean;         // (E,size)  the mean of the gradients, float or bfloat16
    size_t size;        // of a matrix, or of this process's slice of a tensor
    const double *part; // (E,parts)  sums of squares of the gradients; without parts, all matrices have gradients
    int parts;
    size_t first; // number of the first one in the whole tensor, for the random numbers that round moments
    uint64_t draws;
    double clip;
};

// As mean_gradients of the C twin: an expert without a gradient keeps its mean and gets no direction.
template <class Moment> __global__ void muon_direction_kernel(Direction d, const double *norm) {
    size_t i = 4 * thread_of_grid(), at = blockIdx.y * d.size + i;
    float a[4], b[4];
    if (!isfinite(*norm) || (d.parts && matrix_sum(d.part, d.parts) == 0) || i >= d.size) {
        return;
    }
    float scale = clip_scale(d.clip, *norm);
    Moment *mean = (Moment *)d.mean + at;
    load_pack(a, d.g + at);
    load_pack(b, mean);
    for (int j = 0; j < 4; j++) {
        move_mean(&b[j], &a[j], scale);
        if (sizeof(Moment) == 2) {
            b[j] = round_stochastically(b[j], (unsigned)(moment_draw(d.draws, d.first + at + j) & 0xffff));
        }
    }
    store_pack(mean, b);
    store_pack(d.g + at, a);
}

// For the numbers at .. at+size of tensor i.
void muon_direction(Model *m, int i, size_t at, size_t size, int step, const double *norm) {
    const Config *c = &m->config;
    const Tensor *t = &m->tensors[i];
    Direction d = {};
    d.g = m->memory[GRADS] + at;
    d.mean = moment_at(m, MOMENT1, moment_offset(m, at));
    d.size = t->of_experts ? (size_t)t->shape[1] * t->shape[2] : size;
    d.part = m->muon->part;
    d.first = t->first + (at - t->offset);
    d.draws = moment_stream((uint64_t)c->seed, step, i);
    d.clip = c->clip;
    int E = (int)(size / d.size);
    if (t->of_experts) {
        d.parts = matrix_squares(m->muon->part, d.g, E, d.size, d.size);
    }
    dim3 grid(blocks(d.size, 4 * THREADS), E);
    if (c->moments == MOMENTS_BF16) {
        muon_direction_kernel<__nv_bfloat16><<<grid, THREADS, 0, stream>>>(d, norm);
    } else {
        muon_direction_kernel<float><<<grid, THREADS, 0, stream>>>(d, norm);
    }
    CHECK(cudaGetLastError());
}

// ---- its singular values become 1

// x (E,size) = the matrices of g, which lie `stride` numbers apart, each divided by its norm, and rounded. All become 0 where
// the norm of all gradients is not finite, and no step follows.
__global__ void divide_by_norm_kernel(floatX *x, const float *g, const double *part, int parts, size_t size,
                                      size_t stride, const double *norm) {
    double sum = matrix_sum(part, parts);
    float scale = isfinite(*norm) ? matrix_scale(sum) : 0, a[4];
    size_t i = 4 * thread_of_grid();
    if (i < size) {
        load_pack(a, g + blockIdx.y * stride + i);
        for (int j = 0; j < 4; j++) {
            a[j] = scale > 0 ? a[j] * scale : 0;
        }
        store_pack(x + blockIdx.y * size + i, a);
    }
}

// to (E,S,S) = a on the diagonal, + b gram + c square
__global__ void polynomial_kernel(floatX *to, const floatX *gram, const float *square, float a, float b, float c, int S) {
    size_t i = thread_of_grid(), size = (size_t)S * S, at = blockIdx.y * size + i;
    if (i < size) {
        store(&to[at], (i % (S + 1) == 0 ? a : 0) + b * to_float(gram[at]) + c * square[at]);
    }
}

// Returns floatX (E,R,C): what becomes of E matrices (R,C) of g, which lie `stride` numbers apart, is U V^T, nearly. E is at
// most muon_matrices().
const floatX *orthogonalize(const MuonScratch *s, const float *g, size_t stride, int E, int R, int C, const double *norm) {
    int S = min_int(R, C), tall = R > C;
    size_t size = (size_t)R * C;
    floatX *x = s->x[0], *after = s->x[1];
    int parts = matrix_squares(s->part, g, E, size, stride);
    divide_by_norm_kernel<<<dim3(blocks(size, 4 * THREADS), E), THREADS, 0, stream>>>(x, g, s->part, parts, size,
                                                                                    stride, norm);
    CHECK(cudaGetLastError());
    for (int round = 0; round < MUON_ROUNDS; round++) {
        const double *p = muon_polynomial[round];
        products(s->gram, x, tall, x, tall, S, S, tall ? R : C, E);
        products(s->square, s->gram, 0, s->gram, 0, S, S, S, E); // it is symmetric
        polynomial_kernel<<<dim3(blocks((size_t)S * S), E), THREADS, 0, stream>>>(
            s->polynomial, s->gram, s->square, (float)p[0], (float)p[1], (float)p[2], S);
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

struct MuonStep {
    float *w;        // weights of the whole tensor
    floatX *low;     // their rounded copies, or NULL
    size_t at, size; // of the tensor's numbers, those that this process updates
    float keep, rate;
};

// w = keep * w - rate * direction, for matrices of `each` numbers: number blockIdx.y, whose direction is in row blockIdx.y
// of direction (.., each), begins at number first + blockIdx.y * stride of the tensor.
__global__ void muon_step_kernel(MuonStep s, const floatX *direction, size_t each, size_t first, size_t stride,
                                 const double *norm) {
    size_t i = 4 * thread_of_grid(), j = first + blockIdx.y * stride + i;
    float a[4], b[4];
    if (i >= each || j < s.at || j >= s.at + s.size || !isfinite(*norm)) {
        return;
    }
    load_pack(a, s.w + j);
    load_pack(b, direction + blockIdx.y * each + i);
    for (int k = 0; k < 4; k++) {
        a[k] = s.keep * a[k] - s.rate * b[k];
    }
    store_pack(s.w + j, a);
    if (s.low) {
        store_pack(s.low + j, a);
    }
}

// Gradients that are not finite are left for who searches them.
__global__ void clear_gradients_kernel(float *g, size_t size, const double *norm) {
    size_t i = 4 * thread_of_grid();
    float zeros[4] = {0};
    if (i < size && isfinite(*norm)) {
        store_pack(g + i, zeros);
    }
}

// A step for the matrices of tensor i whose turn it is, those of every MUON_TURNS-th expert. This process updates numbers
// at .. at+size: it may have slices of some. All gradients of the tensor are cleared.
void muon_step(Model *m, int i, size_t at, size_t size, int step, double lr, const double *norm) {
    const Tensor *t = &m->tensors[i];
    int R = t->shape[1], C = t->shape[2], e = 0;
    size_t each = (size_t)R * C, stride = MUON_TURNS * each;
    int E = (int)(t->size / each), before = (int)(t->first / each); // experts of other processes count
    double far = MUON_TURNS * lr;
    MuonStep s = {m->memory[WEIGHTS] + t->offset, m->low + t->offset, at - t->offset, size,
                  (float)(1 - far * m->config.weight_decay), (float)(far * MUON_STEP * sqrt(max_int(R, C)))};
    s.low = (void *)m->low == (void *)m->memory[WEIGHTS] ? NULL : s.low;
    while (!has_turn(i, before + e, step)) {
        e++;
    }
    for (int count; e < E; e += count * MUON_TURNS) {
        int left = (E - e + MUON_TURNS - 1) / MUON_TURNS;
        count = min_int(left, muon_matrices(left, R, C));
        keep_pace();
        const floatX *direction =
            gpu::orthogonalize(m->muon, m->memory[GRADS] + t->offset + e * each, stride, count, R, C, norm);
        dim3 grid(blocks(each, 4 * THREADS), count);
        muon_step_kernel<<<grid, THREADS, 0, stream>>>(s, direction, each, e * each, stride, norm);
        CHECK(cudaGetLastError());
    }
    clear_gradients_kernel<<<blocks(t->size, 4 * THREADS), THREADS, 0, stream>>>(m->memory[GRADS] + t->offset, t->size, norm);
    CHECK(cudaGetLastError());
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
            if (pass == 0) {
                muon_direction(m, i, at, size, step, norm);
            } else {
                muon_step(m, i, at, size, step, lr, norm);
            }
        }
        if (pass == 0) {
            share_directions(m);
        }
    }
}
