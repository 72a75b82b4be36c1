// Vectors of the processor, by the compiler's vector extensions, and the functions of one vector or one row.
// Gives: vec, vec_exp, dot, softmax, row_max, row_exp. Needs: dev/util.h.
#pragma once
#include "../util.h"

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef real vec_in_memory __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
#define LANES  ((int)(VECTOR_BYTES / sizeof(real)))

real vec_sum(vec v) {
    real total = 0;
    for (int lane = 0; lane < LANES; lane++)
        total += v[lane];
    return total;
}

real dot(const real *a, const real *b, int n) {
    vec sum[4] = {{0}, {0}, {0}, {0}}; // four, since one would have to wait for itself
    int i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            sum[j] += *(const vec_in_memory *)(a + i + j * LANES) * *(const vec_in_memory *)(b + i + j * LANES);
    }
    for (; i + LANES <= n; i += LANES)
        sum[0] += *(const vec_in_memory *)(a + i) * *(const vec_in_memory *)(b + i);
    real total = vec_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < n; i++)
        total += a[i] * b[i];
    return total;
}

vec vec_load(const real *p, int n) { // the first n of LANES numbers, then zeros
    vec v = {0};
    if (n >= LANES)
        return *(const vec_in_memory *)p;
    memcpy(&v, p, (size_t)n * sizeof(real));
    return v;
}

void vec_store(real *p, vec v, int n) {
    if (n >= LANES)
        *(vec_in_memory *)p = v;
    else
        memcpy(p, &v, (size_t)n * sizeof(real));
}

// The lanes of a where the comparison holds, else those of b. (C, unlike C++, has no ?: for vectors.)
#define CHOOSE(where, a, b) \
    ((__typeof__(a))(((__typeof__(where))(a) & (where)) | ((__typeof__(where))(b) & ~(where))))

vec vec_max(vec a, vec b) {
    return CHOOSE(a > b, a, b);
}

// e^x in every lane. x = n ln 2 + r with |r| <= ln 2 / 2; e^r is a polynomial (Taylor, to 3 ulp in float) and 2^n goes
// straight into the exponent bits. Below -87 the result is about 1e-38 instead of less; in double, libm does it.
vec vec_exp(vec x) {
    if (sizeof(real) == 8) {
        for (int i = 0; i < LANES; i++)
            x[i] = exp(x[i]);
        return x;
    }
    typedef uint32_t bits __attribute__((vector_size(VECTOR_BYTES)));
    typedef float floats __attribute__((vector_size(VECTOR_BYTES)));
    floats v;
    memcpy(&v, &x, sizeof(v));
    floats least = {0}, most = {0};
    least -= 87.0f;
    most += 88.0f;
    v = CHOOSE(v < least, least, v); // NaN stays
    v = CHOOSE(v > most, most, v);
    floats shifted = v * 1.44269504f + 12582912.0f; // 1.5 * 2^23: the sum's low bits are n, rounded
    floats n = shifted - 12582912.0f;
    floats r = v - n * 0.693359375f + n * 2.12194440e-4f;
    floats e = r * (1.0f / 720) + (1.0f / 120);
    e = e * r + (1.0f / 24);
    e = e * r + (1.0f / 6);
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    e = (floats)((bits)e + ((bits)shifted << 23));
    memcpy(&x, &e, sizeof(x));
    return x;
}

// The largest of row (n) and of `least`, which also fills row up to a whole vector. This and the next function work on
// whole vectors, so row must have room for them.
real row_max(real *row, int n, real least) {
    vec top = {0};
    top += least;
    for (int j = n; j % LANES; j++)
        row[j] = least;
    for (int j = 0; j < n; j += LANES)
        top = vec_max(top, *(vec_in_memory *)(row + j));
    for (int lane = 0; lane < LANES; lane++)
        least = top[lane] > least ? top[lane] : least;
    return least;
}

// row[j] becomes exp(row[j] - shift) for j < n, 0 from there to end; returns the sum.
real row_exp(real *row, int n, int end, real shift) {
    vec sum = {0};
    int j = 0;
    for (; j + LANES <= n; j += LANES) {
        vec e = vec_exp(*(vec_in_memory *)(row + j) - shift);
        *(vec_in_memory *)(row + j) = e;
        sum += e;
    }
    int filled = j < n ? j + LANES : n;
    if (j < n)
        *(vec_in_memory *)(row + j) = vec_exp(*(vec_in_memory *)(row + j) - shift);
    memset(row + n, 0, (size_t)(max_int(end, filled) - n) * sizeof(real));
    if (j < n)
        sum += *(vec_in_memory *)(row + j);
    return vec_sum(sum);
}

// row (n) becomes softmax(row); returns log(sum(exp(row)))
real softmax(real *row, int n) {
    vec most = {0};
    real top = row[0];
    most += top;
    int whole = n / LANES * LANES;
    for (int j = 0; j < whole; j += LANES)
        most = vec_max(most, *(vec_in_memory *)(row + j));
    for (int lane = 0; lane < LANES; lane++)
        top = most[lane] > top ? most[lane] : top;
    for (int j = whole; j < n; j++)
        top = row[j] > top ? row[j] : top;
    vec sum = {0};
    for (int j = 0; j < n; j += LANES) {
        vec e = vec_exp(vec_load(row + j, n - j) - top);
        vec_store(row + j, e, n - j);
        sum += n - j >= LANES ? e : vec_load(row + j, n - j); // beyond n there is no term
    }
    real total = vec_sum(sum), scale = 1 / total;
    for (int j = 0; j < n; j++)
        row[j] *= scale;
    return top + (real)log((double)total);
}
