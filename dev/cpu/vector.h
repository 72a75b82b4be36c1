// Vectors of the processor: 2 to 16 numbers with which one instruction computes at once.
// Gives: vec, LANES, vec_load, vec_store, vec_sum, vec_max, vec_exp, vec_log, check_exp; and of rows of numbers: dot, row_max, row_exp.
// Needs: dev/util.h; gcc or clang, whose vector extensions these are: a * b + c with vectors works on all
// lanes, a number beside a vector counts for every lane, v[i] is one lane, and the compiler takes the
// instructions that the processor has.
//
// A sum by vectors adds in another order than a plain loop, but always in the same one.
#pragma once
#include "../util.h"

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define LANES ((int)(VECTOR_BYTES / sizeof(real))) // numbers in a vector
typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
// The same at any address: `*(vec_in_memory *)p` reads or writes the LANES numbers from p on.
typedef real vec_in_memory __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

// A vector is also a few quarters of 16 bytes. To add or compare these first keeps the chain of operations short, of which
// each waits for the one before: 3 and 3 steps instead of 16.
typedef real quarter __attribute__((vector_size(16)));
#define QUARTERS      (VECTOR_BYTES / 16)
#define QUARTER_LANES ((int)(16 / sizeof(real)))

real vec_sum(vec v) {
    quarter part[QUARTERS];
    memcpy(part, &v, sizeof(v));
    for (int i = 1; i < QUARTERS; i++) {
        part[0] += part[i];
    }
    real total = part[0][0];
    for (int lane = 1; lane < QUARTER_LANES; lane++) {
        total += part[0][lane];
    }
    return total;
}

// The first n numbers at p, then zeros, if there are fewer than LANES.
vec vec_load(const real *p, int n) {
    vec v = {0};
    if (n >= LANES) {
        return *(const vec_in_memory *)p;
    }
    memcpy(&v, p, (size_t)n * sizeof(real));
    return v;
}

// Writes the first n lanes only, if n is less than LANES.
void vec_store(real *p, vec v, int n) {
    if (n >= LANES) {
        *(vec_in_memory *)p = v;
    } else {
        memcpy(p, &v, (size_t)n * sizeof(real));
    }
}

// The lanes of a where the comparison holds, else those of b. A comparison gives all bits 1 or all bits 0 in
// each lane. (C, unlike C++, has no ?: for vectors.)
#define CHOOSE(where, a, b)                                                                                    \
    ((__typeof__(a))(((__typeof__(where))(a) & (where)) | ((__typeof__(where))(b) & ~(where))))

vec vec_max(vec a, vec b) {
    return CHOOSE(a > b, a, b);
}

// The largest lane.
real vec_top(vec v) {
    quarter part[QUARTERS];
    memcpy(part, &v, sizeof(v));
    for (int i = 1; i < QUARTERS; i++) {
        part[0] = CHOOSE(part[0] > part[i], part[0], part[i]);
    }
    real top = part[0][0];
    for (int lane = 1; lane < QUARTER_LANES; lane++) {
        top = part[0][lane] > top ? part[0][lane] : top;
    }
    return top;
}

// The first n lanes of v, and those of `rest` behind them.
vec vec_first(vec v, int n, vec rest) {
    vec lane;
    for (int i = 0; i < LANES; i++) {
        lane[i] = (real)i;
    }
    return CHOOSE(lane < (real)n, v, rest);
}

// e^x in every lane, to 3 units in the last digit. Below -87 the result is about 1e-38 instead of less. In
// double, the C library does it.
vec vec_exp(vec x) {
    if (sizeof(real) == 8) {
        for (int i = 0; i < LANES; i++) {
            x[i] = exp(x[i]);
        }
        return x;
    }
    typedef uint32_t bits __attribute__((vector_size(VECTOR_BYTES)));
    typedef float floats __attribute__((vector_size(VECTOR_BYTES)));
    floats v;
    memcpy(&v, &x, sizeof(v));

    // Outside of these bounds the exponent of a float would overflow. A NaN stays a NaN.
    floats least = {0}, most = {0};
    least -= 87.0f;
    most += 88.0f;
    v = CHOOSE(v < least, least, v);
    v = CHOOSE(v > most, most, v);

    // x = n ln 2 + r with an integer n and |r| <= ln 2 / 2. A float near 1.5 * 2^23 has no digits behind the
    // point, so adding that number rounds, and n stands in the lowest bits. ln 2 is taken off in two parts,
    // for the sake of its digits.
    floats shifted = v * 1.44269504f + 12582912.0f;
    floats n = shifted - 12582912.0f;
    floats r = v - n * 0.693359375f + n * 2.12194440e-4f;

    // e^r is 1 + r + r^2/2 + ... + r^6/720.
    floats e = r * (1.0f / 720) + (1.0f / 120);
    e = e * r + (1.0f / 24);
    e = e * r + (1.0f / 6);
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;

    // Times 2^n: n is added to the exponent, which begins at bit 23.
    e = (floats)((bits)e + ((bits)shifted << 23));
    memcpy(&x, &e, sizeof(x));
    return x;
}

// log(x) in every lane, for x from 1e-37 on, to 2 units in the last digit. In double, the C library does it.
vec vec_log(vec x) {
    if (sizeof(real) == 8) {
        for (int i = 0; i < LANES; i++) {
            x[i] = (real)log((double)x[i]);
        }
        return x;
    }
    typedef int32_t bits __attribute__((vector_size(VECTOR_BYTES)));
    typedef float floats __attribute__((vector_size(VECTOR_BYTES)));
    floats v;
    memcpy(&v, &x, sizeof(v));

    // x = m 2^n with m between 3/4 and 3/2: the exponent begins at bit 23, and 0x3f400000 are the bits of 3/4.
    bits n = ((bits)v - 0x3f400000) >> 23;
    floats m = (floats)((bits)v - (n << 23)), exponent;
    for (int i = 0; i < (int)(VECTOR_BYTES / sizeof(float)); i++) {
        exponent[i] = (float)n[i];
    }

    // log(m) = 2 artanh(s) = 2 (s + s^3/3 + s^5/5 + ...) with s = (m - 1) / (m + 1), which is at most 1/5.
    floats s = (m - 1.0f) / (m + 1.0f), q = s * s;
    floats sum = q * (1.0f / 11) + (1.0f / 9);
    sum = sum * q + (1.0f / 7);
    sum = sum * q + (1.0f / 5);
    sum = sum * q + (1.0f / 3);
    s = s + s * q * sum;
    s = exponent * 0.693147182f + (s + s);
    memcpy(&x, &s, sizeof(x));
    return x;
}

// Ends the program if the compiler was told to compute otherwise than it is written here: by flags that allow sums to
// be taken in another order, vec_exp is wrong by up to 41%, and by others no NaN is found. Those that the compiler
// tells of are refused in dev/portable.h.
void check_exp(void) {
    volatile real none = 0; // which the compiler cannot know
    vec x = {0};
    int wrong = !isnan(none / none) || isfinite((real)1 / none);
    for (int i = -320; i <= 320; i++) {
        real at = (real)i / 4 + none;
        double exact = exp((double)at);
        wrong |= !(fabs((double)vec_exp(x + at)[0] - exact) <= 1e-6 * exact);
    }
    if (wrong) {
        fail("exp comes out wrong: this program was built with flags such as -funsafe-math-optimizations or "
             "-ffinite-math-only; build it with -O3 alone");
    }
}

// The sum of a[i] * b[i]. There are four sums, since each addition to one sum would have to wait for the
// addition before.
real dot(const real *a, const real *b, int n) {
    vec sum[4] = {{0}, {0}, {0}, {0}};
    int i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            sum[j] += *(const vec_in_memory *)(a + i + j * LANES) * *(const vec_in_memory *)(b + i + j * LANES);
        }
    }
    for (; i + LANES <= n; i += LANES) {
        sum[0] += *(const vec_in_memory *)(a + i) * *(const vec_in_memory *)(b + i);
    }
    real total = vec_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < n; i++) {
        total += a[i] * b[i];
    }
    return total;
}

// The next two functions read up to LANES - 1 numbers behind the row's last one, because they work on full vectors only;
// what stands there does not count.

// The largest of row (n) and of `least`.
real row_max(const real *row, int n, real least) {
    vec lowest = {0}, top;
    lowest += least;
    top = lowest;
    int j = 0;
    for (; j + LANES <= n; j += LANES) {
        top = vec_max(top, *(const vec_in_memory *)(row + j));
    }
    if (j < n) {
        top = vec_max(top, vec_first(*(const vec_in_memory *)(row + j), n - j, lowest));
    }
    return vec_top(top);
}

// row[j] becomes exp(row[j] - shift) for j < n, and 0 from there to the end of the last vector, and to `end`. Returns the sum.
real row_exp(real *row, int n, int end, real shift) {
    vec sum = {0}, zero = {0};
    int j = 0;
    for (; j + LANES <= n; j += LANES) {
        vec e = vec_exp(*(vec_in_memory *)(row + j) - shift);
        *(vec_in_memory *)(row + j) = e;
        sum += e;
    }
    if (j < n) {
        vec e = vec_first(vec_exp(*(vec_in_memory *)(row + j) - shift), n - j, zero);
        *(vec_in_memory *)(row + j) = e;
        sum += e;
        j += LANES;
    }
    for (; j < end; j += LANES) {
        *(vec_in_memory *)(row + j) = zero;
    }
    return vec_sum(sum);
}
