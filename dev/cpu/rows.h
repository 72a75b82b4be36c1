// The lesson's functions that work row by row, a vector at a time: softmax, RMSNorm, activation, sum of squares.
// Gives: fast_softmax, fast_softmax_rows, load_rows, fast_rmsnorm_forward, fast_rmsnorm_backward, fast_activation_forward,
// fast_activation_backward, fast_sum_of_squares. Needs: dev/cpu/vector.h; the activations' names and
// is_gated() of train_moe.c, which includes it.
//
// The formulas and the shapes are explained in train_moe.c, chapter 2; here is only how vectors compute them.
// The last vector of a row has fewer numbers: vec_load(p, n) and vec_store(p, v, n) take the n that are left,
// if they are few.
#pragma once
#include "vector.h"

// row (n) becomes softmax(row); returns log(sum(exp(row)))
real fast_softmax(real *row, int n) {
    // The largest number: of each lane, then of all lanes, then of what is left behind the last full vector.
    vec most = {0};
    real top = row[0];
    most += top;
    int full = n / LANES * LANES;
    for (int j = 0; j < full; j += LANES) {
        most = vec_max(most, *(vec_in_memory *)(row + j));
    }
    for (int lane = 0; lane < LANES; lane++) {
        top = most[lane] > top ? most[lane] : top;
    }
    for (int j = full; j < n; j++) {
        top = row[j] > top ? row[j] : top;
    }

    // The powers and their sum. Lanes behind the row's end do not count.
    vec sum = {0};
    for (int j = 0; j < n; j += LANES) {
        vec e = vec_exp(vec_load(row + j, n - j) - top);
        vec_store(row + j, e, n - j);
        sum += n - j >= LANES ? e : vec_load(row + j, n - j);
    }

    real total = vec_sum(sum), scale = 1 / total;
    for (int j = 0; j < n; j++) {
        row[j] *= scale;
    }
    return top + (real)log((double)total);
}

// ---- many short rows
//
// A router's rows have as many numbers as there are experts, often fewer than a vector has lanes. There it is the rows
// that stand side by side in the lanes of a vector: a block of LANES rows is transposed, so that block[j] has number j
// of each.

enum { SHORT = 128 }; // numbers in a row, at most

// x (rows,n), rows first .. first+LANES. Behind the last row it stands once more.
void load_rows(vec *block, const real *x, int first, int rows, int n) {
    for (int lane = 0; lane < LANES; lane++) {
        const real *row = x + (size_t)min_int(first + lane, rows - 1) * n;
        for (int j = 0; j < n; j++) {
            block[j][lane] = row[j];
        }
    }
}

// Each row of p (rows,n) becomes its softmax; lse (rows): log(sum(exp(row))). A sum that is no number stays none.
void fast_softmax_rows(real *p, real *lse, int rows, int n) {
    if (n > SHORT) {
#pragma omp parallel for if (is_worth_threads(rows, 4 * n))
        for (int row = 0; row < rows; row++) {
            lse[row] = fast_softmax(p + (size_t)row * n, n);
        }
        return;
    }
#pragma omp parallel for if (is_worth_threads(rows, 4 * n))
    for (int first = 0; first < rows; first += LANES) {
        vec block[SHORT], sum = {0}, top = {0};
        load_rows(block, p, first, rows, n);
        top -= (real)INFINITY;
        for (int j = 0; j < n; j++) {
            top = vec_max(block[j], top);
        }
        for (int j = 0; j < n; j++) {
            block[j] = vec_exp(block[j] - top);
            sum += block[j];
        }
        vec logs = top + vec_log(sum) + sum * 0, scale = (real)1 / sum;
        for (int lane = 0; lane < min_int(LANES, rows - first); lane++) {
            real *row = p + (size_t)(first + lane) * n;
            for (int j = 0; j < n; j++) {
                row[j] = block[j][lane] * scale[lane];
            }
            lse[first + lane] = logs[lane];
        }
    }
}

// ---- RMSNorm

// out (N,C) = x / rms(x) * w, w (C); rstd (N) keeps 1 / rms(x)
void fast_rmsnorm_forward(real *out, real *rstd, const real *x, const real *w, int N, int C, double eps) {
#pragma omp parallel for if (is_worth_threads(N, C))
    for (int n = 0; n < N; n++) {
        const real *row = x + (size_t)n * C;
        double sum = (double)dot(row, row, C);
        if (isinf(sum)) { // a float's square may be too large for a float
            sum = sum_of_squares(row, (size_t)C);
        }
        rstd[n] = (real)(1.0 / sqrt(sum / C + eps));
        for (int c = 0; c < C; c++) {
            out[(size_t)n * C + c] = row[c] * rstd[n] * w[c];
        }
    }
}

// With y = x * rstd: dw (C) += dout * y, and dx (N,C) += rstd * (dout*w - y * mean(dout*w*y)).
void fast_rmsnorm_backward(real *dx, real *dw, const real *dout, const real *x, const real *rstd, const real *w,
                           int N, int C) {
    // All rows add to dw. So that threads can share them, each chunk of rows adds to a sum of its own; the
    // sums are added at the end, in order, and the bits do not depend on the number of threads.
    enum { CHUNK = 128 };
    int chunks = div_up(N, CHUNK);
    real *partial = allocate_reals((size_t)chunks * C);
#pragma omp parallel for
    for (int chunk = 0; chunk < chunks; chunk++) {
        real *part = partial + (size_t)chunk * C;
        for (int n = chunk * CHUNK; n < min_int(N, (chunk + 1) * CHUNK); n++) {
            const real *row = x + (size_t)n * C, *d = dout + (size_t)n * C;
            vec sum = {0};
            real scale = rstd[n];
            for (int c = 0; c < C; c += LANES) {
                vec product = vec_load(d + c, C - c) * vec_load(row + c, C - c);
                vec_store(part + c, vec_load(part + c, C - c) + product * scale, C - c);
                sum += product * vec_load(w + c, C - c);
            }
            real mean = vec_sum(sum) * scale * scale * scale / (real)C;
            for (int c = 0; c < C; c++) {
                dx[(size_t)n * C + c] += d[c] * w[c] * scale - row[c] * mean;
            }
        }
    }
    for (int chunk = 0; chunk < chunks; chunk++) {
        for (int c = 0; c < C; c++) {
            dw[c] += partial[(size_t)chunk * C + c];
        }
    }
    free(partial);
}

// ---- the activation of a feed-forward layer

// Phi(x), the distribution function of the normal distribution; bell = exp(-x^2/2). In float a polynomial is
// right to 8e-8: 1 - Phi(|x|) is bell times a polynomial of t (Abramowitz and Stegun 1964, 26.2.17).
vec vec_normal(vec x, vec bell) {
    vec zero = {0};
    if (sizeof(real) == 8) {
        for (int i = 0; i < LANES; i++) {
            x[i] = 0.5 * (1 + erf(x[i] * 0.7071067811865476));
        }
        return x;
    }
    vec size = vec_max(x, -x);
    vec t = (real)1 / ((real)1 + (real)0.23164189 * size);
    vec sum = (real)-0.7265760135 + t * (real)0.5307027145;
    sum = (real)-0.142248368 + t * ((real)0.7107068705 + t * sum);
    t = t * bell * ((real)0.127414796 + t * sum);
    return CHOOSE(x < zero, t, (real)1 - t);
}

// The activation function of each lane; *slope is its derivative.
vec vec_activate(int activation, vec x, vec *slope) {
    vec value, zero = {0};
    if (activation == RELU) {
        value = CHOOSE(x > zero, x, zero);
        *slope = CHOOSE(x > zero, zero + (real)1, zero);
    } else if (activation == SWIGLU) {
        vec sigmoid = (real)1 / ((real)1 + vec_exp(-x));
        value = x * sigmoid;
        *slope = sigmoid * ((real)1 + x * ((real)1 - sigmoid));
    } else { // GELU
        vec bell = vec_exp(x * x * (real)-0.5), phi = vec_normal(x, bell);
        value = x * phi;
        *slope = phi + x * bell * (real)0.3989422804014327;
    }
    return value;
}

// act (rows,F) = f(gate) * up with hidden (rows,2F): F numbers of gate, then F of up. Not gated: f(hidden),
// hidden (rows,F).
void fast_activation_forward(real *act, const real *hidden, int rows, int F, int activation) {
    int gated = is_gated(activation);
#pragma omp parallel for if (rows > 16)
    for (int r = 0; r < rows; r++) {
        const real *gate = hidden + (size_t)r * F * (1 + gated), *up = gate + F;
        for (int j = 0; j < F; j += LANES) {
            vec slope, value = vec_activate(activation, vec_load(gate + j, F - j), &slope);
            if (gated) {
                value *= vec_load(up + j, F - j);
            }
            vec_store(act + (size_t)r * F + j, value, F - j);
        }
    }
}

// dweight (by choice) = dact . act; dhidden (rows,2F or F) = the gradient by hidden; dact (rows,F) becomes
// weight * act. weight NULL: all weights are 1, and dweight is not used.
void fast_activation_backward(real *dhidden, real *dweight, real *dact, const real *hidden, const real *weight,
                              const int *choice, int rows, int F, int activation) {
    int gated = is_gated(activation);
#pragma omp parallel for if (rows > 16)
    for (int r = 0; r < rows; r++) {
        const real *gate = hidden + (size_t)r * F * (1 + gated), *up = gate + F;
        real *dgate = dhidden + (size_t)r * F * (1 + gated), *dup = dgate + F, *d = dact + (size_t)r * F;
        real w = weight ? weight[choice[r]] : 1;
        vec sum = {0};
        for (int j = 0; j < F; j += LANES) {
            vec slope, value = vec_activate(activation, vec_load(gate + j, F - j), &slope);
            vec g = vec_load(d + j, F - j), u = {0};
            u += (real)1;
            if (gated) {
                u = vec_load(up + j, F - j);
                vec_store(dup + j, w * g * value, F - j);
            }
            vec_store(dgate + j, w * g * u * slope, F - j);
            sum += g * u * value;
            vec_store(d + j, w * u * value, F - j);
        }
        if (weight) {
            dweight[choice[r]] = vec_sum(sum);
        }
    }
}

// ---- the sum of squares

void about_to_pass(const real *x, size_t n); // dev/offload.h
void passed_over(const real *x, size_t n);

// passes: 1: what lies in a file does not stay in memory (--offload).
double squares_in_chunks(const real *x, size_t n, int passes) {
    // Chunks are summed by the threads and added in order. Within a chunk there are 16 sums, which vectors
    // can hold.
    enum { CHUNK = 16384, SUMS = 16 };
    int chunks = (int)((n + CHUNK - 1) / CHUNK);
    double *part = (double *)allocate(chunks, sizeof(double));
    double total = 0;
#pragma omp parallel for
    for (int i = 0; i < chunks; i++) {
        size_t j = (size_t)i * CHUNK;
        size_t end = j + CHUNK < n ? j + CHUNK : n;
        double sum[SUMS] = {0};
        if (passes) {
            about_to_pass(x + j, end - j);
        }
        for (; j + SUMS <= end; j += SUMS) {
            for (int k = 0; k < SUMS; k++) {
                sum[k] += (double)x[j + k] * (double)x[j + k];
            }
        }
        for (; j < end; j++) {
            sum[0] += (double)x[j] * (double)x[j];
        }
        for (int k = 0; k < SUMS; k++) {
            part[i] += sum[k];
        }
        if (passes) {
            passed_over(x + (size_t)i * CHUNK, end - (size_t)i * CHUNK);
        }
    }
    for (int i = 0; i < chunks; i++) {
        total += part[i];
    }
    free(part);
    return total;
}

double fast_sum_of_squares(const real *x, size_t n) {
    return squares_in_chunks(x, n, 0);
}
