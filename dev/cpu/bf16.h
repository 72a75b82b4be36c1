// Products of matrices that are rounded to bfloat16 (--precision bf16), with sums in float32.
// Gives: bf16_product_rows and bf16_dot, which dev/cpu/matmul.h calls; ready_products, products_gain. Needs: of matmul.h
// the sizes, the packing and the kernel; dev/precision.h.
//
// The blocks that matmul.h packs are rounded where they lie in the cache. Then they are multiplied in one of two ways:
//
// - By the kernel of matmul.h. A product of two bfloat16 numbers has 16 bits of mantissa, so it is exact in a float32.
// - By vdpbf16ps, the instruction of AVX512_BF16, which multiplies 32 numbers instead of 16. It takes pairs along k: of 16
//   bits each, in the upper half of a lane the number of k and in the lower half that of k + 1.
//
// vdpbf16ps adds the product of the upper halves first and then that of the lower halves, and rounds each time (Intel,
// Software Developer's Manual). That is the order of the kernel, so both ways give the same bits: which one is taken
// depends on the processor, and no result does. The exception are numbers below 1.2e-38, which vdpbf16ps takes for zero.
#pragma once
#include "matmul.h"
#include "../precision.h"

// nvcc need not know the instruction: the CUDA twin multiplies on the GPU.
#if defined(__AVX512F__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10) && !defined(__CUDACC__)
#define CAN_MULTIPLY_PAIRS
#include <immintrin.h>
#endif

typedef uint32_t pair __attribute__((may_alias)); // two bfloat16 numbers

// Where pack_a puts row i of a, if each row of the matrix belongs to one k: TALL numbers of the same k stand together, and
// behind them those of the next k; the next TALL rows begin TALL*ROW further.
#ifndef TALL
#define TALL TILE_M
#endif
#define ROW_OF_A(i) ((i) / TALL * TALL * ROW + (i) % TALL)

int pairs_pay;            // 1: vdpbf16ps is taken; ready_products decides
double products_gain = 1; // operations a second of what multiplies, over those of float32 multiply-adds

// ---- rounding what is packed

void round_to_bf16(real *p, size_t n) {
    for (size_t i = 0; i < n; i++) {
        p[i] = (real)nearest_bf16((float)p[i]);
    }
}

// Rows of `width` rounded numbers, where each row belongs to one k, become half as many rows of pairs.
void pair_rows(real *block, int width, int nk) {
    pair *p = (pair *)(void *)block;
    for (int k = 0; k < nk; k += 2) {
        const pair *upper = p + (size_t)k * width, *lower = upper + width;
        pair *to = p + (size_t)k / 2 * width;
        for (int i = 0; i < width; i++) {
            to[i] = upper[i] | (k + 1 < nk ? lower[i] >> 16 : 0);
        }
    }
}

// A row along which k runs: the pair of numbers k and k + 1 stands at the place of k, for even k. (For odd k, too, where
// nobody reads it: so the loop is a simple one.) There is memory for one number behind the row.
void pair_along(real *row, int nk) {
    pair *p = (pair *)(void *)row;
    p[nk] = 0;
    for (int k = 0; k < nk; k++) {
        p[k] |= p[k + 1] >> 16;
    }
}

// A block that pack_a has made.
void round_a(real *a, int row_is_k, int rows, int nk) {
    for (int i = 0; row_is_k && i < rows; i += TALL) {
        real *block = a + ROW_OF_A(i);
        int filled = min_int(TALL, div_up(rows - i, 2 * MR) * 2 * MR);
        for (int k = 0; k < nk; k++) {
            round_to_bf16(block + k * TALL, (size_t)filled);
        }
        if (pairs_pay) {
            pair_rows(block, TALL, nk);
        }
    }
    for (int i = 0; !row_is_k && i < rows; i++) {
        round_to_bf16(a + i * ROW, (size_t)nk);
        if (pairs_pay) {
            pair_along(a + i * ROW, nk);
        }
    }
}

// A panel that pack_b has made.
void round_panel(real *panel, int width, int nk) {
    round_to_bf16(panel, (size_t)width * nk);
    if (pairs_pay) {
        pair_rows(panel, width, nk);
    }
}

// ---- products of pairs

#ifdef CAN_MULTIPLY_PAIRS
#define WITH_PAIRS __attribute__((target("avx512f,avx512bf16")))

WITH_PAIRS static inline __attribute__((always_inline)) __m512 multiply_pairs(__m512 sum, pair a, const pair *b) {
    __m512i row = _mm512_loadu_si512((const void *)b), same = _mm512_set1_epi32((int)a);
    return _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)same);
}

// The kernel of matmul.h for pairs: tile (height,width*16) = a (height,2*pairs) times b (2*pairs,width*16). Pair (i,k) of a
// is a[i*row + k*step].
WITH_PAIRS static inline __attribute__((always_inline)) void kernel_of_pairs(float *tile, int height, int width, int row,
                                                                             int step, const pair *a, const pair *b,
                                                                             int pairs) {
    __m512 sum[2 * MR][NV];
#pragma GCC unroll 16
    for (int i = 0; i < height; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) {
            sum[i][j] = _mm512_setzero_ps();
        }
    }
    for (int k = 0; k < pairs; k++, a += step, b += width * 16) {
#pragma GCC unroll 16
        for (int i = 0; i < height; i++) {
#pragma GCC unroll 4
            for (int j = 0; j < width; j++) {
                sum[i][j] = multiply_pairs(sum[i][j], a[i * row], b + j * 16);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < height; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) {
            _mm512_storeu_ps(tile + (i * width + j) * 16, sum[i][j]);
        }
    }
}

// product_panel of matmul.h, for a block of a and a panel of b that are pairs.
WITH_PAIRS void panel_of_pairs(real *out, size_t ld, const real *block, int row_is_k, const real *panel, int nk, int rows,
                               int cols, int add) {
    const pair *a = (const pair *)(const void *)block, *b = (const pair *)(const void *)panel;
    int wide = panel_width(cols) == NR, high = wide ? MR : 2 * MR, across = 16 * (wide ? NV : NV / 2);
    int pairs = div_up(nk, 2);
    float tile[MR * NV * 16];
    for (int first = 0; first < rows; first += high) {
        if (wide && row_is_k) {
            kernel_of_pairs(tile, MR, NV, 1, TALL, a + ROW_OF_A(first), b, pairs);
        } else if (wide) {
            kernel_of_pairs(tile, MR, NV, ROW, 2, a + first * ROW, b, pairs);
        } else if (row_is_k) {
            kernel_of_pairs(tile, 2 * MR, NV / 2, 1, TALL, a + ROW_OF_A(first), b, pairs);
        } else {
            kernel_of_pairs(tile, 2 * MR, NV / 2, ROW, 2, a + first * ROW, b, pairs);
        }
        for (int i = 0; i < min_int(high, rows - first); i++, out += ld) {
            for (int j = 0; j < cols; j++) {
                out[j] = tile[i * across + j] + (add ? out[j] : 0);
            }
        }
    }
}

// Seconds that so many multiply-adds take, by pairs or one after another.
WITH_PAIRS double time_of_products(int by_pairs) {
    enum { SUMS = 12, ROUNDS = 1 << 12 }; // so many sums that none has to wait for its last product; 10 us
    volatile float one = 1; // the compiler cannot know that it stays so
    pair b[16];
    __m512 sum[SUMS], x = _mm512_set1_ps(one / 2);
    memset(b, one == 1, sizeof(b));
    for (int i = 0; i < SUMS; i++) {
        sum[i] = x + (float)i; // all different, or the compiler would compute one
    }
    double start = seconds();
    for (int k = 0; by_pairs && k < ROUNDS / 2; k++) {
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; i++) {
            sum[i] = multiply_pairs(sum[i], b[0], b);
        }
    }
    for (int k = 0; !by_pairs && k < ROUNDS; k++) {
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; i++) {
            sum[i] = _mm512_fmadd_ps(sum[i], x, x);
        }
    }
    double time = seconds() - start;
    for (int i = 0; i < SUMS; i++) {
        one += sum[i][0];
    }
    return time;
}
#endif

// Can this processor multiply pairs?
int has_pairs(void) {
#ifdef CAN_MULTIPLY_PAIRS
    __builtin_cpu_init();
    return sizeof(real) == 4 && __builtin_cpu_supports("avx512bf16");
#else
    return 0;
#endif
}

// Before the first product of a run: is vdpbf16ps faster here than float32 multiply-adds? There are processors on which it has
// half of their speed. Returns what the user is told behind the peak.
const char *ready_products(int precision) {
    multiply_in(precision);
    pairs_pay = 0;
    products_gain = 1;
    if (product_precision == PRODUCTS_FP32) {
        return "";
    }
#ifdef CAN_MULTIPLY_PAIRS
    double best[2] = {1, 1}; // of several tries, since other programs may disturb one
    for (int i = 0; has_pairs() && i < 24; i++) {
        best[i % 2] = fmin(best[i % 2], time_of_products(i % 2));
    }
    pairs_pay = best[1] < 0.95 * best[0];
    products_gain = pairs_pay ? best[0] / best[1] : 1;
#endif
    return pairs_pay ? " in bfloat16" : " in float32, which also multiplies what is rounded to bfloat16: no instruction here is faster";
}

// ---- what matmul.h calls

// Rows first .. first+rows of a product, by one thread: as product_rows, but that the blocks are rounded.
void bf16_product_rows(const Product *p, int first, int rows, int add) {
    real *a = packing_memory + (size_t)thread_number() * (PACKED_A + PACKED_B), *b = a + PACKED_A;
    for (int j0 = 0; j0 < p->n; j0 += TILE_N) {
        int cols = min_int(TILE_N, p->n - j0);
        for (int k0 = 0; k0 < max_int(p->k, 1); k0 += TILE_K) { // once even for k = 0, whose sum is 0
            int nk = min_int(TILE_K, p->k - k0);
            for (int j = 0; j < cols; j += NR) {
                int used = min_int(NR, cols - j);
                pack_b(b + j * nk, &p->b, j0 + j, used, k0, nk);
                round_panel(b + j * nk, panel_width(used), nk);
            }
            for (int i0 = first; i0 < first + rows; i0 += TILE_M) {
                int height = min_int(TILE_M, first + rows - i0);
                pack_a(a, &p->a, i0, height, k0, nk);
                round_a(a, p->a.row_is_k, height, nk);
                for (int j = 0; j < cols; j += NR) {
                    real *out = p->out + (size_t)i0 * p->ld + (size_t)(j0 + j);
                    int used = min_int(NR, cols - j), more = add || k0 > 0;
#ifdef CAN_MULTIPLY_PAIRS
                    if (pairs_pay) {
                        panel_of_pairs(out, p->ld, a, p->a.row_is_k, b + j * nk, nk, height, used, more);
                        continue;
                    }
#endif
                    product_panel(out, p->ld, a, p->a.row_is_k, TALL, b + j * nk, nk, height, used, more);
                }
            }
        }
    }
}

// dot() of rounded numbers.
real bf16_dot(const real *a, const real *b, int n) {
    enum { PART = 256 };
    real rounded[2][PART], total = 0;
    for (int i = 0; i < n; i += PART) {
        int count = min_int(PART, n - i);
        memcpy(rounded[0], a + i, (size_t)count * sizeof(real));
        memcpy(rounded[1], b + i, (size_t)count * sizeof(real));
        round_to_bf16(rounded[0], (size_t)count);
        round_to_bf16(rounded[1], (size_t)count);
        total += dot(rounded[0], rounded[1], count);
    }
    return total;
}
