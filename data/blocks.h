// Numbers with few bits, in blocks: the formats F16, Q8_0 and Q4_0 of GGUF files, byte by byte as llama.cpp has them.
// https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the roundings are those of quantize_row_q8_0_ref and
// quantize_row_q4_0_ref in ggml-quants.c.
// Gives: FORMAT_F32 .. FORMAT_Q4_0, format_names, BLOCK, half_of, float_of_half, encoded_bytes, fits_blocks, encode_row, decode_row,
// check_blocks. Needs: dev/util.h.
//
// A block is 32 numbers that stand one after the other in a row, with one scale d, a float16:
//   Q8_0: d, then 32 whole numbers q from -127 to 127, a byte each; a number is d * q. 34 bytes.
//   Q4_0: d, then 16 bytes of two numbers q from 0 to 15 each, the lower halves the first 16 numbers and the upper halves the
//         others; a number is d * (q - 8). 18 bytes.
#pragma once
#include "../dev/util.h"

enum { FORMAT_F32, FORMAT_F16, FORMAT_Q8_0, FORMAT_Q4_0 };
const char *const format_names[] = {"f32", "f16", "q8_0", "q4_0", NULL};

enum { BLOCK = 32, Q8_BYTES = 34, Q4_BYTES = 18 }; // numbers of a block, and its bytes

// ---- float16: 1 bit of sign, 5 of exponent, 10 of mantissa

// The float16 nearest to x; of two that are equally near, the one whose last bit is 0. What is too large becomes infinity.
uint16_t half_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) {
        return (uint16_t)(sign | 0x7e00); // NaN
    }
    if (size >= 0x477ff000) { // 65520, from which on infinity is nearest
        return (uint16_t)(sign | 0x7c00);
    }
    if (size < 0x38800000) { // below 2^-14 a float16 is a multiple of 2^-24, and rint() rounds as it should
        return (uint16_t)(sign | (uint32_t)rint(ldexp(fabs((double)x), 24)));
    }
    size += 0xfff + (size >> 13 & 1); // rounds to 10 bits of mantissa; the exponent's offset is 127 there and 15 here
    return (uint16_t)(sign | ((size - ((127 - 15) << 23)) >> 13));
}

float float_of_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, size = half & 0x7fff, bits;
    float x;
    if (size < 0x400) {
        x = (float)size / 16777216; // 2^24
        return sign ? -x : x;
    }
    bits = sign | ((size << 13) + ((size < 0x7c00 ? 127 - 15 : 255 - 31) << 23)); // infinity and NaN stay such
    memcpy(&x, &bits, sizeof(x));
    return x;
}

// ---- how much, and whether at all

// The bytes of n numbers.
size_t encoded_bytes(int format, size_t n) {
    if (format == FORMAT_Q8_0) {
        return n / BLOCK * Q8_BYTES;
    }
    if (format == FORMAT_Q4_0) {
        return n / BLOCK * Q4_BYTES;
    }
    return n * (format == FORMAT_F16 ? 2 : 4);
}

// Can a row of n numbers be in this format? It must be whole blocks.
int fits_blocks(int format, int n) {
    return format < FORMAT_Q8_0 || n % BLOCK == 0;
}

// ---- a block

// Both return 0 where a number is not finite, or so large that the scale is no float16; what is written then has no meaning.
int encode_q8_0(unsigned char *to, const real *x) {
    float most = 0;
    int finite = 1;
    for (int i = 0; i < BLOCK; i++) {
        finite &= isfinite((float)x[i]) != 0;
        most = fmaxf(most, fabsf((float)x[i]));
    }
    float d = most / 127, inverse = 1 / d;
    inverse = isfinite(inverse) ? inverse : 0; // all is 0, or so small that d becomes 0
    uint16_t half = half_of(d);
    if (!finite || half >= 0x7c00) {
        return 0;
    }
    memcpy(to, &half, 2);
    for (int i = 0; i < BLOCK; i++) {
        to[2 + i] = (unsigned char)(signed char)roundf((float)x[i] * inverse);
    }
    return 1;
}

int encode_q4_0(unsigned char *to, const real *x) {
    float most = 0;
    int finite = 1;
    for (int i = 0; i < BLOCK; i++) {
        finite &= isfinite((float)x[i]) != 0;
        most = fabsf((float)x[i]) > fabsf(most) ? (float)x[i] : most;
    }
    float d = most / -8, inverse = 1 / d; // the number of the largest size becomes q = 0
    inverse = isfinite(inverse) ? inverse : 0;
    uint16_t half = half_of(d);
    if (!finite || (half & 0x7fff) >= 0x7c00) {
        return 0;
    }
    memcpy(to, &half, 2);
    for (int i = 0; i < BLOCK / 2; i++) {
        int low = min_int(15, (int)((float)x[i] * inverse + 8.5f));
        int high = min_int(15, (int)((float)x[i + BLOCK / 2] * inverse + 8.5f));
        to[2 + i] = (unsigned char)(low | high << 4);
    }
    return 1;
}

// The scale of a block of either format.
float block_scale(const unsigned char *block) {
    uint16_t half;
    memcpy(&half, block, 2);
    return float_of_half(half);
}

void decode_q8_0(real *to, const unsigned char *block) {
    float d = block_scale(block);
    for (int i = 0; i < BLOCK; i++) {
        to[i] = (real)(d * (float)(signed char)block[2 + i]);
    }
}

void decode_q4_0(real *to, const unsigned char *block) {
    float d = block_scale(block);
    for (int i = 0; i < BLOCK / 2; i++) {
        to[i] = (real)(d * (float)((block[2 + i] & 15) - 8));
        to[i + BLOCK / 2] = (real)(d * (float)((block[2 + i] >> 4) - 8));
    }
}

// ---- a row

// Writes the n numbers of a row, which fits_blocks(), in a format. Returns 0 where they have no place in it: one is NaN or
// infinite, or too large.
int encode_row(int format, unsigned char *to, const real *x, int n) {
    int good = 1;
    if (format == FORMAT_Q8_0 || format == FORMAT_Q4_0) {
        for (int i = 0; i < n; i += BLOCK) {
            unsigned char *block = to + encoded_bytes(format, (size_t)i);
            good &= format == FORMAT_Q8_0 ? encode_q8_0(block, x + i) : encode_q4_0(block, x + i);
        }
        return good;
    }
    for (int i = 0; i < n; i++) {
        float number = (float)x[i];
        uint16_t half = half_of(number);
        memcpy(to + encoded_bytes(format, (size_t)i), format == FORMAT_F16 ? (void *)&half : (void *)&number,
               encoded_bytes(format, 1));
        good &= isfinite(number) && (format == FORMAT_F32 || (half & 0x7fff) < 0x7c00);
    }
    return good;
}

// The way back.
void decode_row(int format, real *to, const unsigned char *from, int n) {
    if (format == FORMAT_Q8_0 || format == FORMAT_Q4_0) {
        for (int i = 0; i < n; i += BLOCK) {
            const unsigned char *block = from + encoded_bytes(format, (size_t)i);
            if (format == FORMAT_Q8_0) {
                decode_q8_0(to + i, block);
            } else {
                decode_q4_0(to + i, block);
            }
        }
        return;
    }
    for (int i = 0; i < n; i++) {
        float number;
        uint16_t half;
        if (format == FORMAT_F16) {
            memcpy(&half, from + 2 * (size_t)i, 2);
            number = float_of_half(half);
        } else {
            memcpy(&number, from + 4 * (size_t)i, 4);
        }
        to[i] = (real)number;
    }
}

// The first of n numbers in blocks whose block cannot be: its scale is no number, or infinite. Returns n where all are good.
size_t check_blocks(int format, const unsigned char *from, size_t n) {
    for (size_t i = 0; i < n; i += BLOCK) {
        if (!isfinite(block_scale(from + encoded_bytes(format, i)))) {
            return i;
        }
    }
    return n;
}
