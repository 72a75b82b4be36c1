// Several processes: gradients in fewer bits on their way (--compress), and rows of tokens in bfloat16 (--compress-rows).
// Gives: Codec, codec_of, block_of, blocks_in, code_bytes, encode, decode, encode_block, decode_block; narrow, narrow_part, widen;
// compress_refuses.
// Needs: dev/util.h, dev/precision.h; Config of train_moe.c, which includes it for the fields of its options (CONFIG_FIELDS).
//
// Numbers are encoded in blocks, the last of which may be shorter:
//   bf16   the upper half of each float: 2 bytes a number
//   int8   256 numbers and one scale, max |v| / 127: a whole number from -127 to 127 for each, 1 + 4/256 bytes a number
//   topk   of 1,000 numbers the share --compress-ratio whose |v| are largest, each with its place: 6 bytes for each of these
// What the code does not say is lost only for this time: encode() leaves it behind, and it is added to what is sent the next
// time. So over many steps all of a gradient arrives, some of it late: error feedback (Seide et al. 2014, 1-Bit Stochastic
// Gradient Descent; Karimireddy et al. 2019, Error Feedback Fixes SignSGD). compressed_sums.h tells how sums are made of it.
#ifdef CONFIG_FIELDS
    int compress;          // NO_CODEC, CODE_BF16, CODE_INT8 or CODE_TOPK
    double compress_ratio; // the share of numbers that CODE_TOPK sends
    int compress_rows;     // rows of tokens are bfloat16 on their way
#elif !defined(RANKS_COMPRESS_H)
#define RANKS_COMPRESS_H
#include "../precision.h"

enum { INT8_BLOCK = 256, TOPK_BLOCK = 1000, BF16_BYTES = 2, ENTRY_BYTES = 6 };

typedef struct Codec {
    int scheme;
    double ratio;
} Codec;

Codec codec_of(const Config *c) {
    Codec codec = {c->compress, c->compress_ratio};
    return codec;
}

// ---- sizes

// Numbers of a block. With bf16 a block is only what one thread encodes: its code would be the same with any other.
BOTH size_t block_of(Codec codec) {
    return codec.scheme == CODE_INT8 ? INT8_BLOCK : TOPK_BLOCK;
}

// How many of a block's n numbers are sent with topk: at least one.
BOTH int sent_of(Codec codec, int n) {
    int sent = (int)ceil(codec.ratio * n - 1e-9); // 1e-9: against rounding, since 0.07 * 100 is more than 7
    sent = sent < n ? sent : n;
    return sent > 1 ? sent : 1;
}

BOTH size_t code_of_block(Codec codec, int n) {
    if (codec.scheme == CODE_BF16) {
        return (size_t)n * BF16_BYTES;
    }
    return codec.scheme == CODE_INT8 ? sizeof(float) + (size_t)n : (size_t)sent_of(codec, n) * ENTRY_BYTES;
}

// The bytes of n numbers.
size_t code_bytes(Codec codec, size_t n) {
    size_t block = block_of(codec), rest = n % block;
    return n / block * code_of_block(codec, (int)block) + (rest ? code_of_block(codec, (int)rest) : 0);
}

// ---- bfloat16

// The bfloat16 nearest to v, as 16 bits, and back.
BOTH uint16_t bf16_bits(real v) {
    float rounded = nearest_bf16((float)v);
    uint32_t bits;
    memcpy(&bits, &rounded, sizeof(bits));
    return (uint16_t)(bits >> 16);
}

BOTH real of_bf16_bits(uint16_t upper) {
    uint32_t bits = (uint32_t)upper << 16;
    float v;
    memcpy(&v, &bits, sizeof(v));
    return (real)v;
}

// The n numbers of v become bfloat16 that lie in the first bytes of its memory.
void narrow(real *v, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint16_t upper = bf16_bits(v[i]);
        memcpy((unsigned char *)v + i * BF16_BYTES, &upper, BF16_BYTES);
    }
}

// Where n such numbers may lie of which widen() makes numbers in place: at the end of the memory.
unsigned char *narrow_part(real *v, size_t n) {
    return (unsigned char *)(v + n) - n * BF16_BYTES;
}

void widen(real *v, const unsigned char *from, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint16_t upper;
        memcpy(&upper, from + i * BF16_BYTES, BF16_BYTES);
        v[i] = of_bf16_bits(upper);
    }
}

// ---- one block

BOTH void encode_bf16(unsigned char *to, real *v, int n) {
    for (int i = 0; i < n; i++) {
        uint16_t upper = bf16_bits(v[i]);
        memcpy(to + (size_t)i * BF16_BYTES, &upper, BF16_BYTES);
        v[i] -= of_bf16_bits(upper);
    }
}

BOTH void decode_bf16(real *v, const unsigned char *from, int n) {
    for (int i = 0; i < n; i++) {
        uint16_t upper;
        memcpy(&upper, from + (size_t)i * BF16_BYTES, BF16_BYTES);
        v[i] += of_bf16_bits(upper);
    }
}

// A number that is not finite makes the scale NaN, so that all of the block is NaN where it arrives, and the check of the
// gradients' norm finds it.
BOTH void encode_int8(unsigned char *to, real *v, int n) {
    float top = 0;
    int finite = 1;
    for (int i = 0; i < n; i++) {
        float size = fabsf((float)v[i]);
        finite = finite && size <= FLT_MAX;
        top = size > top ? size : top;
    }
    float scale = finite ? top / 127 : (float)NAN;
    memcpy(to, &scale, sizeof(scale));
    for (int i = 0; i < n; i++) {
        double q = scale > 0 ? rint((double)v[i] / (double)scale) : 0;
        q = fmax(-127.0, fmin(127.0, q));
        to[sizeof(scale) + (size_t)i] = (unsigned char)(signed char)q;
        v[i] -= (real)scale * (real)q;
    }
}

BOTH void decode_int8(real *v, const unsigned char *from, int n) {
    float scale;
    memcpy(&scale, from, sizeof(scale));
    for (int i = 0; i < n; i++) {
        v[i] += (real)scale * (real)(signed char)from[sizeof(scale) + (size_t)i];
    }
}

// The k-th largest of a's n numbers, k from 1 on, which it puts into another order (Hoare 1961, Algorithm 65: Find).
BOTH float kth_largest(float *a, int n, int k) {
    int low = 0, high = n - 1, want = k - 1;
    while (low < high) {
        float pivot = a[(low + high) / 2];
        int i = low, j = high;
        while (i <= j) {
            while (a[i] > pivot) {
                i++;
            }
            while (a[j] < pivot) {
                j--;
            }
            if (i <= j) {
                float other = a[i];
                a[i++] = a[j];
                a[j--] = other;
            }
        }
        if (want > j && want < i) {
            return a[want];
        }
        low = want >= i ? i : low;
        high = want <= j ? j : high;
    }
    return a[want];
}

BOTH float size_of(real v) {
    float size = fabsf((float)v);
    return size <= FLT_MAX ? size : (float)INFINITY;
}

// An entry is the number's place in the block and the number. Of those that are equally large, the first ones are sent. What is
// not finite counts as larger than all else, so that it is sent.
BOTH void encode_topk(unsigned char *to, real *v, int n, int sent) {
    float sizes[TOPK_BLOCK]; // the only array, since on GPUs each thread has one
    for (int i = 0; i < n; i++) {
        sizes[i] = size_of(v[i]);
    }
    float least = kth_largest(sizes, n, sent);
    int equal = sent; // that many of those that are as large as the least
    for (int i = 0; i < n; i++) {
        equal -= size_of(v[i]) > least;
    }
    for (int i = 0; i < n; i++) {
        float size = size_of(v[i]);
        if (size < least || (size == least && equal <= 0)) {
            continue;
        }
        equal -= size == least;
        uint16_t place = (uint16_t)i;
        float number = (float)v[i];
        memcpy(to, &place, sizeof(place));
        memcpy(to + sizeof(place), &number, sizeof(number));
        v[i] -= (real)number;
        to += ENTRY_BYTES;
    }
}

BOTH void decode_topk(real *v, const unsigned char *from, int sent) {
    for (int i = 0; i < sent; i++) {
        uint16_t place;
        float number;
        memcpy(&place, from + (size_t)i * ENTRY_BYTES, sizeof(place));
        memcpy(&number, from + (size_t)i * ENTRY_BYTES + sizeof(place), sizeof(number));
        v[place] += (real)number;
    }
}

// ---- many blocks

// Block b of v (n), which begins at its own place in the code.
BOTH void encode_block(Codec codec, unsigned char *to, real *v, size_t n, size_t b) {
    size_t block = block_of(codec);
    int count = (int)(n - b * block < block ? n - b * block : block);
    unsigned char *code = to + b * code_of_block(codec, (int)block);
    if (codec.scheme == CODE_INT8) {
        encode_int8(code, v + b * block, count);
    } else if (codec.scheme == CODE_TOPK) {
        encode_topk(code, v + b * block, count, sent_of(codec, count));
    } else {
        encode_bf16(code, v + b * block, count);
    }
}

BOTH void decode_block(Codec codec, real *v, const unsigned char *from, size_t n, size_t b) {
    size_t block = block_of(codec);
    int count = (int)(n - b * block < block ? n - b * block : block);
    const unsigned char *code = from + b * code_of_block(codec, (int)block);
    if (codec.scheme == CODE_INT8) {
        decode_int8(v + b * block, code, count);
    } else if (codec.scheme == CODE_TOPK) {
        decode_topk(v + b * block, code, sent_of(codec, count));
    } else {
        decode_bf16(v + b * block, code, count);
    }
}

size_t blocks_in(Codec codec, size_t n) {
    return (n + block_of(codec) - 1) / block_of(codec);
}

// The code of v (n): code_bytes() of them. v becomes what is lost.
void encode(Codec codec, unsigned char *to, real *v, size_t n) {
#pragma omp parallel for if (n > 16384)
    for (size_t b = 0; b < blocks_in(codec, n); b++) {
        encode_block(codec, to, v, n, b);
    }
}

// v (n) += what the code says.
void decode(Codec codec, real *v, const unsigned char *from, size_t n) {
#pragma omp parallel for if (n > 16384)
    for (size_t b = 0; b < blocks_in(codec, n); b++) {
        decode_block(codec, v, from, n, b);
    }
}

// ---- what does not go together

// Ends the program where nothing would be sent in fewer bits. ep: the processes among which the experts are divided.
void compress_refuses(const Config *c, int ep) {
    if (!c->compress && !c->compress_rows) {
        return;
    }
    const char *option = c->compress ? "--compress" : "--compress-rows";
    if (ranks.size == 1) {
        usage_fail("%s: one process sends nothing; start several, by mpirun -np N, or leave it out", option);
    }
    if (c->compress_rows && ep == 1) {
        usage_fail("--compress-rows: no rows travel where each of the %d ranks has all experts (--ep 1); leave it out",
                   ranks.size);
    }
#ifdef USE_NCCL
    if (c->compress_rows) {
        usage_fail("--compress-rows: on GPUs rows travel in the numbers that they are computed in, bfloat16 by default; leave it "
                   "out");
    }
#endif
}

#endif
