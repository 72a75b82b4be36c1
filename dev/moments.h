// The optimizer's moments in bfloat16, rounded at random (--moments bf16).
// Gives: MOMENTS_FP32, MOMENTS_BF16, round_stochastically, moment_stream, moment_draw, Rounding, rounding_of, round_moments.
// Needs: util.h; for rounding_of the table of weights of train_moe.c.
//
// A bfloat16 is the upper half of a float: 1 bit of sign, 8 of exponent, 7 of mantissa. Neighbours differ by 0.4 to
// 0.8%, and from one step to the next most moments change by less than that. Rounded to the nearest, such a moment
// would stay where it is for ever. So each moment is rounded up or down at random, up with the probability that makes
// the mean right (Gupta et al. 2015, Deep Learning with Limited Numerical Precision). DeepSeek-V3 keeps its moments in
// bfloat16, too (DeepSeek-AI 2024, section 3.3.3).
//
// The CUDA twin stores 2 bytes for each moment, which saves half of their memory. The C program keeps the rounded
// numbers in its arrays of `real`: it computes the same and saves nothing.
#pragma once
#include "util.h"

enum { MOMENTS_FP32, MOMENTS_BF16 };

// One of the two bfloat16 numbers around x; x itself if it is one. random16: 16 random bits. The lower half of x says
// how far x is on its way from the one number to the other, in 65536 parts, and that is the share of all random16
// that carry into the upper half. Infinity and NaN have an exponent of ones, which must not carry; the NaN of a
// computation has the highest bit of its mantissa set, so it stays NaN without its lower half.
BOTH float round_stochastically(float x, unsigned random16) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    bits += (bits & 0x7f800000u) == 0x7f800000u ? 0 : random16;
    bits &= 0xffff0000u;
    memcpy(&x, &bits, sizeof(bits));
    return x;
}

// The random numbers of one step and one row of the table of weights.
BOTH uint64_t moment_stream(uint64_t seed, int step, int row) {
    return random_stream(seed, RANDOM_MOMENTS, (uint64_t)step, (uint64_t)row);
}

// 64 random bits for number `index` of the whole tensor, counted over all processes: the lowest 16 are for its first
// moment, the next 16 for its second one.
BOTH uint64_t moment_draw(uint64_t stream, uint64_t index) {
    return hash64(stream ^ hash64(index));
}

// How --moments wants the moments of a tensor rounded in one step.
typedef struct Rounding {
    int on;          // 0: not at all
    uint64_t stream; // of random numbers
    size_t first;    // several processes: where this one's numbers begin in the whole tensor
} Rounding;

// Of the numbers from `at` on of the tensor in this row of the table.
Rounding rounding_of(const Model *m, int row, size_t at, int step) {
    const Tensor *t = &m->tensors[row];
    Rounding r = {m->config.moments == MOMENTS_BF16, moment_stream((uint64_t)m->config.seed, step, row), t->first + (at - t->offset)};
    return r;
}

// AdamW or Muon has worked out new moments of n numbers, from number j of the range on: rounds them. m2: NULL with Muon, whose
// second moments stay 0.
void round_moments(const Rounding *r, real *m1, real *m2, size_t j, size_t n) {
    for (size_t i = 0; r->on && i < n; i++) {
        uint64_t draw = moment_draw(r->stream, r->first + j + i);
        m1[i] = round_stochastically((float)m1[i], (unsigned)(draw & 0xffff));
        if (m2) {
            m2[i] = round_stochastically((float)m2[i], (unsigned)(draw >> 16 & 0xffff));
        }
    }
}
