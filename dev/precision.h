// In which precision matrices are multiplied (--precision).
// Gives: PRODUCTS_FP32, PRODUCTS_BF16, precision_names, product_precision, multiply_in, check_precision, nearest_bf16.
// Needs: Config of train_moe.c, and dev/options.h, which includes it.
//
// With bf16 both matrices of a product are rounded to bfloat16, as the CUDA twin does, and all else stays as it is:
// weights, sums, residual stream, norms, softmax, attention, the router, the loss and the optimizer are float32. The products of
// dev/cpu/bf16.h do so. A bfloat16 is the upper half of a float: 1 bit of sign, 8 of exponent, 7 of mantissa.
#pragma once
#include "util.h"

enum { PRODUCTS_FP32, PRODUCTS_BF16 };
const char *const precision_names[] = {"fp32", "bf16", NULL};

// Some programs can do one of the two only: the CUDA twin, which is built for one, and the plain loops of the lesson.
#if defined(__CUDACC__) || defined(CUDACPU)
#ifdef FP32
#define ONE_PRECISION "fp32"
#else
#define ONE_PRECISION "bf16"
#endif
#define OTHER_PRECISION "make train_moe_cu PRECISION="
#elif defined(PLAIN)
#define ONE_PRECISION   "fp32"
#define OTHER_PRECISION "make train_moe, without PLAIN=1, builds one that takes --precision "
#endif
#ifdef ONE_PRECISION
#define PRECISION_STANDARD ONE_PRECISION
#else
#define PRECISION_STANDARD "fp32"
#endif

int product_precision; // of the products that follow

// Each pass of a model begins with this, and the router's part of it stands between two calls. (The C twin of a program of
// one precision multiplies in float32.)
void multiply_in(int precision) {
#ifdef ONE_PRECISION
    precision = PRODUCTS_FP32;
#endif
    product_precision = precision;
}

int find_word(const char *const *words, const char *text); // options.h
int find_option(const char *name);

// A program of one precision refuses the other, and goes on in its own where a checkpoint says another.
void check_precision(Config *c) {
#ifdef ONE_PRECISION
    int only = find_word(precision_names, ONE_PRECISION);
    const char *asked = precision_names[c->precision];
    if (c->precision != only && c->given[find_option("precision")]) {
        usage_fail("--precision %s: this program multiplies in %s; " OTHER_PRECISION "%s", asked, ONE_PRECISION, asked);
    }
    if (c->precision != only && !c->prompt) {
        remark("the run has multiplied in %s until now; this program multiplies in %s", asked, ONE_PRECISION);
    }
    c->precision = only;
#else
    (void)c;
#endif
}

// The bfloat16 number nearest to x; of two that are equally near, the one whose last bit is 0. Infinity and NaN have an
// exponent of ones, into which nothing may carry; the NaN of a computation stays NaN without its lower half, because the
// highest bit of its mantissa is set.
BOTH static inline float nearest_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    bits += (bits & 0x7f800000u) == 0x7f800000u ? 0 : 0x7fff + (bits >> 16 & 1);
    bits &= 0xffff0000u;
    memcpy(&x, &bits, sizeof(bits));
    return x;
}
