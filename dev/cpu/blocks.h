// Products with matrices of few bits (data/blocks.h), which multiply the blocks as they are, near the speed of the memory.
// Gives: Blocks, BlockMatrix, in_blocks, blocks_of, as_weights; packed_bytes, pack_row; round_rows, dot_of_blocks,
// plain_dot_of_blocks; blocks_matmul, blocks_grouped_matmul, which dev/cpu/matmul.h calls. Needs: data/blocks.h.
//
// A product of one row, as in generation, does two operations with each weight, and waits for the weights to come from
// memory. So what counts is their bytes, of which a block has a quarter or an eighth. The row x is rounded to blocks too: whole
// numbers from -127 to 127, and a scale for each 32 of them. Then a block of w and a block of x give
//
//   sum over i of (d_w * q_w[i]) * (d_x * q_x[i])  =  d_w * d_x * (sum over i of q_w[i] * q_x[i])
//
// The sum in brackets has whole numbers alone, and for these processors have instructions that multiply 32 or more of them at
// once. It is exact, whichever instructions take it; the sums over blocks, of floats, may differ in their last digits between
// two builds. In one build each result is summed by one thread in one order, so the bits depend neither on the number of threads
// nor on the other rows.
#pragma once
#include "../../data/blocks.h"

#if defined(__AVX2__) && defined(__FMA__) && !defined(__CUDACC__)
#define BLOCKS_BY_AVX2
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON) && !defined(__CUDACC__)
#define BLOCKS_BY_NEON
#include <arm_neon.h>
#endif

// ---- matrices in blocks

typedef struct BlockMatrix { // (O,I), row after row, each as pack_row() writes it
    unsigned char *rows;
    int format;              // FORMAT_Q8_0 or FORMAT_Q4_0
} BlockMatrix;

typedef struct Blocks { // the matrices of all experts of a layer, or the one of a dense layer
    int count;
    BlockMatrix *matrix;
} Blocks;

// The model has pointers to weights, of type real *. One that leads to Blocks instead is an odd address, which no number has.
static inline int in_blocks(const real *w) {
    return (int)((uintptr_t)w & 1);
}

static inline const Blocks *blocks_of(const real *w) {
    return (const Blocks *)((uintptr_t)w - 1);
}

real *as_weights(const Blocks *b) {
    return (real *)((uintptr_t)b + 1);
}

// ---- rows of w
//
// In memory the scales of a row stand together, in front of its whole numbers, so that eight of them are read at once.

// Scales of a row of n numbers, with zeros behind them up to a multiple of eight.
static inline int scales_of(int n) {
    return div_up(n / BLOCK, 8) * 8;
}

// The whole numbers of a block, without its scale.
static inline size_t bytes_of_block(int format) {
    return format == FORMAT_Q8_0 ? Q8_BYTES - 2 : Q4_BYTES - 2;
}

// The bytes of a row of n numbers.
size_t packed_bytes(int format, int n) {
    return (size_t)scales_of(n) * 2 + (size_t)(n / BLOCK) * bytes_of_block(format);
}

// Writes a row of n numbers, which is in blocks as a file has them.
void pack_row(unsigned char *to, int format, const unsigned char *from, int n) {
    unsigned char *bytes = to + (size_t)scales_of(n) * 2;
    memset(to, 0, (size_t)scales_of(n) * 2);
    for (int b = 0; b < n / BLOCK; b++, from += 2 + bytes_of_block(format), bytes += bytes_of_block(format)) {
        memcpy(to + 2 * b, from, 2);
        memcpy(bytes, from + 2, bytes_of_block(format));
    }
}

// ---- rows of x in blocks

typedef struct Rounded {
    signed char *q; // (rows,I) the whole numbers
    float *d;       // (rows,S) the scales, one for each 32 of them, and then zeros; S is scales_of(I)
    float *shift;   // (rows,S) 8 times the sum of a block's whole numbers
} Rounded;

// Rounds n numbers. A block in which one is not finite gets a scale that is no number, and so does every result of it.
void round_row(signed char *q, float *d, float *shift, const real *x, int n) {
    for (int first = 0; first < n; first += BLOCK, x += BLOCK, q += BLOCK) {
        float most = 0, none = 0;
        for (int i = 0; i < BLOCK; i++) {
            float size = fabsf((float)x[i]);
            most = size > most ? size : most;
            none += (float)x[i] * 0;
        }
        float inverse = most > 1e-30f ? 127 / most : 0;
        inverse = none == 0 ? inverse : 0;
        *d++ = most / 127 + none;
        int sum = 0;
        for (int i = 0; i < BLOCK; i++) {
            // A float near 1.5 * 2^23 has no digits behind the point, so this sum rounds, and its lowest bits are the number.
            float shifted = (none == 0 ? (float)x[i] : 0) * inverse + 12582912.0f;
            int32_t bits;
            memcpy(&bits, &shifted, sizeof(bits));
            q[i] = (signed char)(bits - 0x4b400000);
            sum += q[i];
        }
        *shift++ = (float)(8 * sum);
    }
}

// ---- a row of w times rows of x

// out[r] = row of w (I) . row r of x, for `rows` rows: the plain loops, for processors without the instructions below, and
// for tests.
void plain_dot_of_blocks(float *out, int format, const unsigned char *w, Rounded x, int rows, int I) {
    for (int r = 0; r < rows; r++) {
        const signed char *q = x.q + (size_t)r * I;
        const float *d = x.d + (size_t)r * scales_of(I);
        float total = 0;
        for (int b = 0; b < I / BLOCK; b++) {
            const unsigned char *of_w = w + (size_t)scales_of(I) * 2 + (size_t)b * bytes_of_block(format);
            const signed char *of_x = q + b * BLOCK;
            int sum = 0;
            for (int i = 0; i < BLOCK && format == FORMAT_Q8_0; i++) {
                sum += (signed char)of_w[i] * of_x[i];
            }
            for (int i = 0; i < BLOCK / 2 && format == FORMAT_Q4_0; i++) {
                sum += ((of_w[i] & 15) - 8) * of_x[i] + ((of_w[i] >> 4) - 8) * of_x[i + BLOCK / 2];
            }
            total += block_scale(w + 2 * b) * d[b] * (float)sum;
        }
        out[r] = total;
    }
}

#ifdef BLOCKS_BY_AVX2
// Eight sums, of four products of whole numbers each: those of a block of w and one of x. The instructions multiply numbers
// without a sign by numbers with one. Four bits have none yet, and what is 8 too much in each is taken off later. Of eight bits
// w gives its size, and x takes the sign of w. No sum of two products goes beyond 16 bits: 2 * 128 * 127 < 2^15.
static inline __m256i products_of_block(int format, const unsigned char *w, const signed char *q) {
    __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)q), size;
    if (format == FORMAT_Q8_0) {
        __m256i bytes = _mm256_loadu_si256((const __m256i *)(const void *)w);
        size = _mm256_abs_epi8(bytes);
        x = _mm256_sign_epi8(x, bytes);
    } else {
        __m128i pairs = _mm_loadu_si128((const __m128i *)(const void *)w);
        __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(pairs), _mm_srli_epi16(pairs, 4), 1);
        size = _mm256_and_si256(both, _mm256_set1_epi8(15));
    }
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(_mm256_setzero_si256(), size, x);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), size, x);
#else
    return _mm256_madd_epi16(_mm256_maddubs_epi16(size, x), _mm256_set1_epi16(1));
#endif
}

// Eight scales as floats. Where there is no instruction for it: the exponent of a float16 is that of a float less 112. (There
// is no infinity and no NaN among them: check_blocks().)
static inline __m256 eight_scales(const unsigned char *half) {
#ifdef __F16C__
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)half));
#else
    __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)half));
    __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(bits, 15), 31);
    __m256i size = _mm256_srli_epi32(_mm256_slli_epi32(bits, 17), 4);
    return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_or_si256(sign, size)), _mm256_set1_ps(0x1p112f));
#endif
}

static inline float sum_of_lanes(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

enum { AHEAD = 2048 }; // what will be read so many bytes later is fetched from memory now: by a fifth faster than the processor alone

// As plain_dot_of_blocks. It is always inlined: then format and rows are constants, and all sums stay in registers. Even and
// odd blocks have sums of their own, since each addition to one sum has to wait for the one before.
static inline __attribute__((always_inline)) void dot_kernel(float *out, int format, const unsigned char *w, Rounded x,
                                                             int rows, int I) {
    int blocks = I / BLOCK, S = scales_of(I);
    const unsigned char *bytes = w + (size_t)S * 2;
    float scale[4][8];
    __m256 sum[4][2];
    for (int r = 0; r < rows; r++) {
        sum[r][0] = sum[r][1] = _mm256_setzero_ps();
    }
    for (int first = 0; first < blocks; first += 8) {
        // The scales of eight blocks, and what is 8 too much in each number of four bits.
        __m256 of_w = eight_scales(w + 2 * first);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            __m256 both = _mm256_mul_ps(of_w, _mm256_loadu_ps(x.d + (size_t)r * S + first));
            _mm256_storeu_ps(scale[r], both);
            if (format == FORMAT_Q4_0) {
                sum[r][0] = _mm256_fnmadd_ps(both, _mm256_loadu_ps(x.shift + (size_t)r * S + first), sum[r][0]);
            }
        }

        int n = min_int(8, blocks - first);
#pragma GCC unroll 8
        for (int b = 0; b < n; b++, bytes += bytes_of_block(format)) {
            if (b * bytes_of_block(format) % 64 == 0) {
                __builtin_prefetch(bytes + AHEAD);
            }
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const signed char *q = x.q + (size_t)r * I + (size_t)(first + b) * BLOCK;
                __m256 products = _mm256_cvtepi32_ps(products_of_block(format, bytes, q));
                sum[r][b % 2] = _mm256_fmadd_ps(products, _mm256_broadcast_ss(&scale[r][b]), sum[r][b % 2]);
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        out[r] = sum_of_lanes(_mm256_add_ps(sum[r][0], sum[r][1]));
    }
}
#endif

#ifdef BLOCKS_BY_NEON
// Half of a block of w as 16 bytes with signs.
static inline int8x16_t half_block(int format, const unsigned char *w, int half) {
    if (format == FORMAT_Q8_0) {
        return vld1q_s8((const signed char *)(w + 16 * half));
    }
    uint8x16_t pairs = vld1q_u8(w);
    uint8x16_t bytes = half ? vshrq_n_u8(pairs, 4) : vandq_u8(pairs, vdupq_n_u8(15));
    return vsubq_s8(vreinterpretq_s8_u8(bytes), vdupq_n_s8(8));
}

// Four sums, of eight products each.
static inline int32x4_t products_of_block(const int8x16_t *w, const signed char *q) {
    int8x16_t x[2] = {vld1q_s8(q), vld1q_s8(q + 16)};
#ifdef __ARM_FEATURE_DOTPROD
    return vdotq_s32(vdotq_s32(vdupq_n_s32(0), w[0], x[0]), w[1], x[1]);
#else
    // No sum of two products goes beyond 16 bits: 2 * 128 * 127 < 2^15.
    int16x8_t low = vmull_s8(vget_low_s8(w[0]), vget_low_s8(x[0]));
    int16x8_t high = vmull_s8(vget_high_s8(w[0]), vget_high_s8(x[0]));
    low = vmlal_s8(low, vget_low_s8(w[1]), vget_low_s8(x[1]));
    high = vmlal_s8(high, vget_high_s8(w[1]), vget_high_s8(x[1]));
    return vpadalq_s16(vpaddlq_s16(low), high);
#endif
}

// The scale of a block: the exponent of a float16 is that of a float less 112. (There is no infinity and no NaN among them:
// check_blocks().)
static inline float fast_scale(const unsigned char *from) {
    uint16_t half;
    memcpy(&half, from, 2);
    uint32_t bits = (uint32_t)(half & 0x8000) << 16 | (uint32_t)(half & 0x7fff) << 13;
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x * 0x1p112f;
}

// As plain_dot_of_blocks. It is always inlined: then format and rows are constants, and all sums stay in registers.
static inline __attribute__((always_inline)) void dot_kernel(float *out, int format, const unsigned char *w, Rounded x,
                                                             int rows, int I) {
    int blocks = I / BLOCK, S = scales_of(I);
    const unsigned char *bytes = w + (size_t)S * 2;
    float32x4_t sum[4];
    for (int r = 0; r < rows; r++) {
        sum[r] = vdupq_n_f32(0);
    }
    for (int b = 0; b < blocks; b++, bytes += bytes_of_block(format)) {
        int8x16_t of_w[2] = {half_block(format, bytes, 0), half_block(format, bytes, 1)};
        float scale = fast_scale(w + 2 * b);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            int32x4_t products = products_of_block(of_w, x.q + (size_t)r * I + b * BLOCK);
            sum[r] = vfmaq_n_f32(sum[r], vcvtq_f32_s32(products), scale * x.d[(size_t)r * S + b]);
        }
    }
    for (int r = 0; r < rows; r++) {
        out[r] = vaddvq_f32(sum[r]);
    }
}
#endif

// Row r and those behind it.
static inline Rounded rows_from(Rounded x, size_t r, int I) {
    Rounded rest = {x.q + r * (size_t)I, x.d + r * (size_t)scales_of(I), x.shift + r * (size_t)scales_of(I)};
    return rest;
}

// out[r] = row of w (I) . row r of x, for 1 to 4 rows.
void dot_of_blocks(float *out, int format, const unsigned char *w, Rounded x, int rows, int I) {
#if defined(BLOCKS_BY_AVX2) || defined(BLOCKS_BY_NEON)
    if (rows == 4 && format == FORMAT_Q8_0) {
        dot_kernel(out, FORMAT_Q8_0, w, x, 4, I);
        return;
    }
    if (rows == 4) {
        dot_kernel(out, FORMAT_Q4_0, w, x, 4, I);
        return;
    }
    for (int r = 0; r < rows; r++) {
        Rounded one = rows_from(x, (size_t)r, I);
        if (format == FORMAT_Q8_0) {
            dot_kernel(out + r, FORMAT_Q8_0, w, one, 1, I);
        } else {
            dot_kernel(out + r, FORMAT_Q4_0, w, one, 1, I);
        }
    }
#else
    plain_dot_of_blocks(out, format, w, x, rows, I);
#endif
}

// ---- products

typedef struct BlockTask { // some rows of a matrix w times all rows of its x
    const unsigned char *w;
    int format, first, count; // rows of w
    Rounded x;
    int rows, I, O;
    real *out; // (rows,O)
} BlockTask;

// A row of w is read once, and multiplied by four rows of x at a time.
void do_block_task(const BlockTask *t, int add) {
    size_t bytes = packed_bytes(t->format, t->I);
    for (int o = t->first; o < t->first + t->count; o++) {
        for (int r = 0; r < t->rows; r += 4) {
            float total[4];
            int rows = min_int(4, t->rows - r);
            dot_of_blocks(total, t->format, t->w + (size_t)o * bytes, rows_from(t->x, (size_t)r, t->I), rows, t->I);
            for (int i = 0; i < rows; i++) {
                real *out = t->out + (size_t)(r + i) * t->O + o;
                *out = (real)total[i] + (add ? *out : 0);
            }
        }
    }
}

// Rounds the rows of x: row r of expert e is x's row token[r], or the next one of a sorted x. The memory is to be freed.
Rounded round_rows(const real *x, const int *token, const int *offset, int E, const int *I) {
    size_t numbers = 0, scales = 0;
    for (int e = 0; e < E; e++) {
        numbers += (size_t)(offset[e + 1] - offset[e]) * I[e];
        scales += (size_t)(offset[e + 1] - offset[e]) * scales_of(I[e]);
    }
    Rounded all = {(signed char *)allocate(numbers, 1), (float *)allocate(scales, sizeof(float)),
                   (float *)allocate(scales, sizeof(float))};
    Rounded to = all;
    for (int e = 0; e < E; e++) {
        int first = offset[e], rows = offset[e + 1] - first, width = I[e];
#pragma omp parallel for if (is_worth_threads(rows, width))
        for (int r = 0; r < rows; r++) {
            Rounded row = rows_from(to, (size_t)r, width);
            round_row(row.q, row.d, row.shift, x + (size_t)(token ? token[first + r] : r) * width, width);
        }
        to = rows_from(to, (size_t)rows, width);
        x += token ? 0 : (size_t)rows * width;
    }
    return all;
}

// out (rows,O) = or += each row of x (.., I) times its expert's matrix (O,I) transposed. Each expert's rows of w are
// divided into tasks, of which each thread gets about four.
void multiply_blocks(real *out, const real *x, const int *token, const Blocks *w, const int *offset, int E, const int *I,
                     const int *O, int add) {
    double work = 0;
    for (int e = 0; e < E; e++) {
        work += (double)(offset[e + 1] - offset[e]) * I[e] * O[e];
    }
    int limit = 5 * thread_count() + E, tasks = 0; // each expert has a piece more than its share at most
    BlockTask *task = (BlockTask *)allocate(limit, sizeof(BlockTask));
    Rounded all = round_rows(x, token, offset, E, I), here = all;
    for (int e = 0; e < E; e++) {
        int rows = offset[e + 1] - offset[e];
        int pieces = (int)((double)rows * I[e] * O[e] / (work + 1) * 4 * thread_count()) + 1, step = div_up(O[e], pieces);
        for (int first = 0; rows && first < O[e]; first += step) {
            BlockTask t = {w->matrix[e].rows, w->matrix[e].format, first, min_int(step, O[e] - first), here, rows, I[e],
                           O[e], out};
            task[tasks++] = t;
        }
        here = rows_from(here, (size_t)rows, I[e]);
        out += (size_t)rows * O[e];
    }
#pragma omp parallel for schedule(dynamic) if (work > 20000)
    for (int t = 0; t < tasks; t++) {
        do_block_task(&task[t], add);
    }
    free(all.q);
    free(all.d);
    free(all.shift);
    free(task);
}

// The functions of train_moe.c's chapter 2, for a w in blocks.
void blocks_matmul(real *out, const real *x, const real *w, int N, int I, int O, int add) {
    int offset[2] = {0, N};
    multiply_blocks(out, x, NULL, blocks_of(w), offset, 1, &I, &O, add);
}

void blocks_grouped_matmul(real *out, const real *x, const int *token, const real *w, const int *offset, int E, const int *I,
                           const int *O) {
    multiply_blocks(out, x, token, blocks_of(w), offset, E, I, O, 0);
}
