// Causal attention with rotary positions on the GPU, forward, backward, and of one new token with a cache.
// Gives: attention_forward, attention_backward, attention_of_one.
// Needs: dev/cuda/common.cuh (floatX, packs, warp_product and the instructions under it, CHECK, stream). train_moe.cu
// includes it inside namespace gpu. The formulas are those of rope, attention_forward and attention_backward in
// train_moe.c; a head is a multiple of 8 numbers wide, and 256 at most.
//
// The scores of T queries with T keys would be an array (T,T) for each head, which is too much to keep and too slow to
// write and read. So it never exists. A block of threads owns some queries of one head, keeps them in shared memory, and
// walks along the keys and values that they may see, some at a time. The next ones are fetched meanwhile (Dao 2023,
// FlashAttention-2). The softmax needs the highest score of a query, but later keys may bring a higher one: then all
// that was summed so far is scaled down (Milakov and Gimelshein 2018, Online normalizer calculation for softmax).
//
// Each warp of the block owns 16 or 32 of the queries. What it multiplies next it has just computed: the accumulators of
// one product are, pair by pair, the left matrix of the next, and never leave the registers.
//
// qkv holds queries and keys without their positions. They are turned in shared memory, after they have arrived. In
// return no kernel has to read and write all of qkv for that alone. The gradients dQ and dK are turned back in the
// registers, just before they are stored.
//
// Scores are powers of 2 all along: exp(s / sqrt(D)) = 2^(s * scale), scale = log2(e) / sqrt(D).
#pragma once

#define LOG2E 1.44269504f

// 2^x to 2 ulp; 0 where that is below 2^-126. PTX ISA, ex2.approx.ftz.
__device__ float power_of_2(float x) {
#ifdef CUDACPU
    return exp2f(x);
#else
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#endif
}

// ---- tiles in shared memory
//
// A tile holds some rows of one head, in a layout of its own: W = 16, 32, 64, 128 or 256 columns, of which the first
// half of the head begins at column 0 and the second half at column W/2. What is left of both halves is zeros, which
// change no product. Rotary positions turn number i of the first half with number i of the second one. In this layout
// the two are always W/2 columns apart, and so, in the accumulators of a product, in the same thread.

// Bytes of shared memory that a block may have on every GPU that has bfloat16: the smallest limit is that of compute
// capability 8.6, 8.9 and 12.0 (CUDA C++ Programming Guide, Technical Specifications per Compute Capability).
#define SHARED_BYTES (99 * 1024)

// Keys that a block fetches at a time, forward, for heads of so many bytes. With 64 instead of 48 the registers would not
// hold the scores.
constexpr int forward_step(int bytes) {
    if (bytes == 256) {
        return 48;
    }
    return bytes <= 512 ? 64 : 16;
}

// How many rows a block of WARPS warps holds, and how many it fetches at a time. Registers bound the first, since each
// row that is held has W accumulators (dK and dV: 2*W), and shared memory bounds the second.
template <int W> struct Tiles {
    static const int BYTES = W * (int)sizeof(floatX);          // of a head
    static const int LD = W + 16 / (int)sizeof(floatX);        // rows are 16 bytes further apart, hence in other banks
    static const int WARPS = BYTES <= 512 ? 4 : 1;             // 1 only for 256 numbers in float32
    static const int QUERY_MT = BYTES <= 256 ? 2 : 1;          // of a warp: 16 * QUERY_MT queries, forward and for dQ,
    static const int KEY_MT = BYTES <= 128 ? 2 : 1;            // or 16 * KEY_MT keys, for dK and dV
    static const int QUERIES_HELD = 16 * QUERY_MT * WARPS;     // of a block
    static const int KEYS_HELD = 16 * KEY_MT * WARPS;
    static const int FORWARD_STEP = forward_step(BYTES);       // keys at a time, forward
    static const int QUERY_STEP = BYTES <= 128 ? 32 : 16;      // keys at a time, for dQ
    static const int KEY_STEP = BYTES <= 256 ? 32 : 16;        // queries at a time, for dK and dV
    static const int ROW_BYTES = LD * (int)sizeof(floatX);
    static const int FORWARD_BYTES = (QUERIES_HELD + 2 * FORWARD_STEP) * ROW_BYTES;      // queries; keys, values
    static const int QUERY_BYTES = (2 * QUERIES_HELD + 2 * 2 * QUERY_STEP) * ROW_BYTES;  // queries, dout; keys, values, twice
    static const int KEY_BYTES = (2 * KEYS_HELD + 2 * 2 * KEY_STEP) * ROW_BYTES;         // keys, values; queries, dout, twice
    static_assert(FORWARD_BYTES <= SHARED_BYTES && QUERY_BYTES <= SHARED_BYTES && KEY_BYTES <= SHARED_BYTES,
                  "a block needs more shared memory than every GPU has");
};

// B sequences of T tokens; H query heads, KV key and value heads, of D numbers each.
struct HeadSizes {
    int T, H, KV, D;
};

// Where the first token's numbers are: query head h and key and value head kv of sequence b in qkv (B,T,(H+2KV)*D) or
// dqkv, head h in out or dout (B,T,H*D), and in lse or delta (B,H,T).
__device__ size_t query_at(HeadSizes z, int b, int h) {
    return (size_t)b * z.T * (z.H + 2 * z.KV) * z.D + (size_t)h * z.D;
}
__device__ size_t key_at(HeadSizes z, int b, int kv) {
    return query_at(z, b, z.H + kv);
}
__device__ size_t value_at(HeadSizes z, int b, int kv) {
    return query_at(z, b, z.H + z.KV + kv);
}
__device__ size_t answer_at(HeadSizes z, int b, int h) {
    return (size_t)b * z.T * z.H * z.D + (size_t)h * z.D;
}
__device__ size_t lse_at(HeadSizes z, int b, int h) {
    return ((size_t)b * z.H + h) * z.T;
}

// tile (ROWS,W) = the first `rows` rows of x (.,D), which are ld apart. The other rows are zeros. Does not wait for what
// it copies, and closes the batch of copies.
template <int W, int ROWS>
__device__ void load_tile(floatX *tile, const floatX *x, size_t ld, int rows, int D) {
    const int n = 16 / (int)sizeof(floatX), copies = W / n, threads = 32 * Tiles<W>::WARPS;
    int half = D / 2, second_aligned = half % n == 0;

#pragma unroll 1 // or the addresses take too many registers
    for (int task = threadIdx.x; task < ROWS * copies; task += threads) {
        int row = task / copies, column = task % copies * n, i = column % (W / 2); // i: in its half
        floatX *to = tile + row * Tiles<W>::LD + column;
        const floatX *from = x + row * ld + (column < W / 2 ? i : half + i);
        int there = row < rows ? max(0, min(n, half - i)) : 0; // numbers: n, or 4 of 8, or none

        if (column < W / 2 || second_aligned) {
            copy_async(to, there ? from : x, there * (int)sizeof(floatX));
            continue;
        }

        // Of a head of 8, 24, 40... numbers in bfloat16 the second half begins in the middle of 16 bytes.
        for (int part = 0; part < n; part += 4) {
            float four[4] = {};
            if (part < there) {
                load_pack(four, from + part);
            }
            store_pack(to + part, four);
        }
    }
    copy_commit();
}

// Turns four pairs of numbers by their angles, four times cosine and sine. direction 1 turns, -1 turns back. fmaf is
// written out so that the bits do not depend on the compiler.
template <int n>
__device__ void turn_pairs(float (&first)[n], float (&second)[n], const float (&angle)[2 * n], float direction) {
#pragma unroll
    for (int i = 0; i < n; i++) {
        float cosine = angle[2 * i], sine = angle[2 * i + 1] * direction, before = first[i];
        first[i] = fmaf(before, cosine, -(second[i] * sine));
        second[i] = fmaf(second[i], cosine, before * sine);
    }
}

// Turns the rows of a tile (ROWS,W) of queries or keys in place, and rounds them again. Their positions are first,
// first + 1... up to T; angles (T, D/2, 2). All threads see the whole tile before and need a barrier afterwards.
template <int W, int ROWS> __device__ void turn_tile(floatX *tile, const float *angles, int first, int T, int D) {
    const int fours = W / 8, threads = 32 * Tiles<W>::WARPS; // fours: of pairs, in a row

    for (int task = threadIdx.x; task < ROWS * fours; task += threads) {
        int turn = task / fours, i = task % fours * 4;
        int row = turn / 8 * 8 + turn % 2 * 4 + turn % 8 / 2; // 4 rows apart, neighbours are in different banks
        if (i < D / 2 && first + row < T) {
            floatX *to = tile + row * Tiles<W>::LD + i;
            float a[4], b[4], angle[8];
            load_pack(angle, angles + (size_t)(first + row) * D + 2 * i);
            load_pack(a, to);
            load_pack(b, to + W / 2);
            turn_pairs(a, b, angle, 1);
            store_pack(to, a);
            store_pack(to + W / 2, b);
        }
    }
}

// Writes acc (16*MT,8*NT), times scale, as rows first... of out, ld apart: of those before T, D numbers each. With
// angles they are turned back on the way.
template <int MT, int NT>
__device__ void store_rows(floatX *out, size_t ld, const float (&acc)[MT][NT][4], const float *angles, int first, int T,
                           int D, float scale) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) {
        int row = first + 8 * i + lane / 4;
#pragma unroll
        for (int j = 0; j < NT / 2; j++) {
            int column = 8 * j + lane % 4 * 2;
            const float *its = acc[i / 2][j] + i % 2 * 2, *partner = acc[i / 2][j + NT / 2] + i % 2 * 2;
            float a[2] = {its[0] * scale, its[1] * scale}, b[2] = {partner[0] * scale, partner[1] * scale};
            if (row < T && column < D / 2) {
                if (angles) {
                    float angle[4];
                    load_pack(angle, angles + (size_t)row * D + 2 * column);
                    turn_pairs(a, b, angle, -1);
                }
                store_pack(out + row * ld + column, a);
                store_pack(out + row * ld + D / 2 + column, b);
            }
        }
    }
}

// ---- products and scores in registers

// acc (16*MT,8*NT) += a (16*MT,8*NK) b (8*NK,8*NT): a is in the registers as another product's acc, number (k,n) of b
// at b[k*ldb + n] in shared memory.
template <int MT, int NT, int NK>
__device__ void register_product(float (&acc)[MT][NT][4], const float (&a)[MT][NK][4], const floatX *b, int ldb) {
    int lane = threadIdx.x % 32;
#ifdef FP32
#pragma unroll
    for (int k = 0; k < 8 * NK; k++) {
        const float *row = b + k * ldb + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < MT; i++) {
            int holder = lane / 4 * 4 + k % 8 / 2;
            float upper = __shfl_sync(ALL_LANES, a[i][k / 8][k % 2], holder);
            float lower = __shfl_sync(ALL_LANES, a[i][k / 8][k % 2 + 2], holder);
#pragma unroll
            for (int j = 0; j < NT; j++) {
                for (int v = 0; v < 4; v++) {
                    acc[i][j][v] += (v < 2 ? upper : lower) * row[8 * j + v % 2];
                }
            }
        }
    }
#else
#pragma unroll
    for (int k = 0; k < NK; k += 2) {
        unsigned of_a[MT][4], of_b[4];
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
            for (int v = 0; v < 4; v++) {
                Pack<__nv_bfloat16, 2> pair;
                store(&pair.x[0], a[i][k + v / 2][v % 2 * 2]);
                store(&pair.x[1], a[i][k + v / 2][v % 2 * 2 + 1]);
                memcpy(&of_a[i][v], &pair, sizeof(pair));
            }
        }
#pragma unroll
        for (int j = 0; j < NT; j += 2) {
            load_matrices_transposed(of_b, b + (8 * k + lane % 16) * ldb + 8 * j + lane / 16 * 8);
#pragma unroll
            for (int i = 0; i < MT; i++) {
                mma(acc[i][j], of_a[i], of_b);
                mma(acc[i][j + 1], of_a[i], of_b + 2);
            }
        }
    }
#endif
}

// Scores of keys that come after the query become -3e38, so that their power of 2 is 0. ahead: how far the first column
// of s is ahead of the first row; sign 1: columns are keys, -1: rows are.
template <int MT, int NT> __device__ void hide_future(float (&s)[MT][NT][4], int ahead, int sign) {
    int lane = threadIdx.x % 32, shift = sign * (ahead + lane % 4 * 2 - lane / 4);
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int v = 0; v < 4; v++) {
                if (shift > sign * (16 * i + v / 2 * 8 - 8 * j - v % 2)) {
                    s[i][j][v] = -3e38f;
                }
            }
        }
    }
}

// ---- forward

// One step of the softmax over a row's keys. p (16*MT,8*NT): scores of these keys, which become powers of 2 that are
// relative to the highest score so far. Of each row (this lane's are p[i][.][2*half] and p[i][.][2*half+1], of row
// 16*i + 8*half + lane/4): highest is that score, total the sum of the powers, of this lane's keys, and answer the sum
// of the values, times their powers. The latter two are scaled to a new highest score here.
template <int MT, int NT, int COLUMNS>
__device__ void softmax_step(float (&p)[MT][NT][4], float (&answer)[MT][COLUMNS][4], float (&highest)[MT][2],
                             float (&total)[MT][2], float scale) {
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // The four lanes of a row must agree on its highest score.
            float top = highest[i][half], sum = 0;
#pragma unroll
            for (int j = 0; j < 2 * NT; j++) {
                top = fmaxf(top, p[i][j / 2][2 * half + j % 2]);
            }
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
            float shrink = power_of_2((highest[i][half] - top) * scale);
            highest[i][half] = top;

#pragma unroll
            for (int j = 0; j < 2 * NT; j++) {
                float *score = &p[i][j / 2][2 * half + j % 2];
                *score = power_of_2((*score - top) * scale);
                sum += *score;
            }
            total[i][half] = total[i][half] * shrink + sum;
#pragma unroll
            for (int j = 0; j < 2 * COLUMNS; j++) {
                answer[i][j / 2][2 * half + j % 2] *= shrink;
            }
        }
    }
}

// Divides each row's answer by the sum of its powers, and writes lse, of rows first... before T: the log of the sum of
// exp(score / sqrt(D)).
template <int MT, int COLUMNS>
__device__ void softmax_end(float *lse, float (&answer)[MT][COLUMNS][4], const float (&highest)[MT][2],
                            const float (&total)[MT][2], int first, int T, float scale) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = first + 16 * i + 8 * half + lane / 4;
            float sum = total[i][half] + __shfl_xor_sync(ALL_LANES, total[i][half], 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            float share = 1 / sum;
            if (row < T && lane % 4 == 0) {
                lse[row] = (highest[i][half] * scale + log2f(sum)) * (1 / LOG2E);
            }
#pragma unroll
            for (int j = 0; j < 2 * COLUMNS; j++) {
                answer[i][j / 2][2 * half + j % 2] *= share;
            }
        }
    }
}

// A block owns QUERIES_HELD queries of one head and walks along the keys up to the last of them, FORWARD_STEP at a time.
template <int W>
__global__ void attention_forward_kernel(floatX *out, float *lse, const floatX *qkv, const float *angles, HeadSizes z) {
    typedef Tiles<W> A;
    const int MT = A::QUERY_MT, LD = A::LD, HELD = A::QUERIES_HELD, STEP = A::FORWARD_STEP;
    extern __shared__ float4 dynamic[];
    floatX *queries = (floatX *)dynamic, *keys = queries + HELD * LD, *values = keys + STEP * LD;
    int T = z.T, D = z.D, tiles = div_up(T, HELD), head = blockIdx.x / tiles, b = head / z.H, h = head % z.H;
    int kv = h / (z.H / z.KV);
    int first = (tiles - 1 - blockIdx.x % tiles) * HELD; // blocks with the longest way begin first
    int last = min(T, first + HELD), mine = first + 16 * MT * (threadIdx.x / 32); // mine: this warp's first query
    size_t ld = (size_t)(z.H + 2 * z.KV) * D;
    const floatX *k = qkv + key_at(z, b, kv), *v = qkv + value_at(z, b, kv);
    float scale = LOG2E / sqrtf((float)D);
    float answer[MT][W / 8][4] = {};
    float total[MT][2] = {};
    float highest[MT][2];
    for (int i = 0; i < MT; i++) {
        highest[i][0] = highest[i][1] = -3e38f;
    }

    load_tile<W, HELD>(queries, qkv + query_at(z, b, h) + first * ld, ld, T - first, D);
    load_tile<W, STEP>(keys, k, ld, T, D);
    copy_wait<1>();
    __syncthreads(); // the queries are there
    turn_tile<W, HELD>(queries, angles, first, T, D);

    for (int key = 0; key < last; key += STEP) {
        int sees = key < mine + 16 * MT; // otherwise these keys are the future of all of this warp's queries
        float p[MT][STEP / 8][4] = {};

        // The keys are there, and nobody needs the last values: fetch the next ones while the keys are turned.
        copy_wait<0>();
        __syncthreads();
        load_tile<W, STEP>(values, v + key * ld, ld, T - key, D);
        turn_tile<W, STEP>(keys, angles, key, T, D);
        __syncthreads();
        if (sees) {
            warp_product<MT, STEP / 8, false, false>(p, queries + (mine - first) * LD, LD, keys, LD, W);
            if (key + STEP - 1 > mine) {
                hide_future(p, key - mine, 1);
            }
            softmax_step(p, answer, highest, total, scale);
        }

        // The values are there, and nobody needs these keys.
        copy_wait<0>();
        __syncthreads();
        if (key + STEP < last) {
            load_tile<W, STEP>(keys, k + (key + STEP) * ld, ld, T - key - STEP, D);
        }
        if (sees) {
            register_product(answer, p, values, LD);
        }
    }
    softmax_end(lse + lse_at(z, b, h), answer, highest, total, mine, T, scale);
    store_rows(out + answer_at(z, b, h), (size_t)z.H * D, answer, NULL, mine, T, D, 1);
}

// ---- backward
//
// With P the probabilities, dP = dout V^T and delta = dout . out of each query: dS = P * (dP - delta). Then
// dQ = dS K / sqrt(D), dK = dS^T Q / sqrt(D) and dV = P^T dout. The scores are computed again from Q and K, and lse makes
// them probabilities at once.
//
// One kernel makes dQ: a block owns queries and walks along keys. Another makes dK and dV: a block owns keys and walks
// along the queries that see them. Each has one owner for each sum, in a fixed order, so the bits are always the same.
//
// The price is that both compute P and dP: seven products, where five would do if blocks that own keys also added to dQ.
// We keep seven. For the five, dQ would have to travel through memory, read and written in float32 by one block of keys
// after the other: with T = 1024, D = 64 and blocks of 128 keys a query meets T/128/2 = 4 of them, which is
// 4 * 8 * 64 = 2048 bytes for each token and head, 0.41 ns of a second-level cache of 5 TB/s. The two products that it
// saves are 2 * 2 * 64 operations for each of the T/2 keys that a query sees on average, 131,072 in all, 0.33 ns at
// 400 TFLOP/s. And in a fixed order the blocks would have to wait for one another.

// delta of this warp's queries = dout . out: douts (16*MT,W) is a tile, out (rows,D) in memory, `width` apart. This lane's
// delta[i][half] is of row 16*i + 8*half + lane/4, and 0 where that is not below `rows`.
template <int W, int MT>
__device__ void dot_rows(float (&delta)[MT][2], const floatX *douts, const floatX *out, size_t width, int rows, int D) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) {
        int row = 8 * i + lane / 4;
        float sum = 0;
        for (int second = 0; second < 2; second++) {
            const floatX *a = douts + row * Tiles<W>::LD + second * (W / 2), *b = out + row * width + second * (D / 2);
            for (int column = lane % 4 * 4; column < D / 2 && row < rows; column += 16) {
                float x[4], y[4];
                load_pack(x, a + column);
                load_pack(y, b + column);
                for (int c = 0; c < 4; c++) {
                    sum += x[c] * y[c];
                }
            }
        }
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        delta[i / 2][i % 2] = sum;
    }
}

// Scores p (rows are queries) become probabilities, and ds, which is dP, becomes dS. lse, in powers of 2, and delta are
// those of this lane's rows.
template <int MT, int NT>
__device__ void score_gradients(float (&p)[MT][NT][4], float (&ds)[MT][NT][4], const float (&lse)[MT][2],
                                const float (&delta)[MT][2], float scale) {
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int v = 0; v < 4; v++) {
                float probability = power_of_2(p[i][j][v] * scale - lse[i][v / 2]);
                ds[i][j][v] = probability * (ds[i][j][v] - delta[i][v / 2]);
            }
        }
    }
}

// dQ, and delta (B,H,T) for the other kernel. A block owns QUERIES_HELD queries of one head and their dout, and walks
// along the keys and values up to the last of them, QUERY_STEP at a time.
template <int W>
__global__ void attention_query_kernel(floatX *dqkv, float *delta, const floatX *dout, const floatX *out, const float *lse,
                                       const floatX *qkv, const float *angles, HeadSizes z) {
    typedef Tiles<W> A;
    const int MT = A::QUERY_MT, LD = A::LD, HELD = A::QUERIES_HELD, STEP = A::QUERY_STEP;
    extern __shared__ float4 dynamic[];
    floatX *queries = (floatX *)dynamic, *douts = queries + HELD * LD, *steps = douts + HELD * LD;
    int T = z.T, D = z.D, tiles = div_up(T, HELD), head = blockIdx.x / tiles, b = head / z.H, h = head % z.H;
    int kv = h / (z.H / z.KV), lane = threadIdx.x % 32, turn = 0;
    int first = (tiles - 1 - blockIdx.x % tiles) * HELD, last = min(T, first + HELD);
    int mine = first + 16 * MT * (threadIdx.x / 32), my_row = mine - first;
    size_t ld = (size_t)(z.H + 2 * z.KV) * D, width = (size_t)z.H * D, at = answer_at(z, b, h);
    const floatX *k = qkv + key_at(z, b, kv), *v = qkv + value_at(z, b, kv);
    float scale = LOG2E / sqrtf((float)D);
    float dq[MT][W / 8][4] = {};
    float its_lse[MT][2];
    float its_delta[MT][2];

    load_tile<W, HELD>(queries, qkv + query_at(z, b, h) + first * ld, ld, T - first, D);
    load_tile<W, HELD>(douts, dout + at + first * width, width, T - first, D);
    load_tile<W, STEP>(steps, k, ld, T, D);
    load_tile<W, STEP>(steps + STEP * LD, v, ld, T, D);
    copy_wait<2>();
    __syncthreads(); // the queries and their dout are there
    turn_tile<W, HELD>(queries, angles, first, T, D);
    dot_rows<W>(its_delta, douts + my_row * LD, out + at + mine * width, width, T - mine, D);
    for (int i = 0; i < 2 * MT; i++) {
        int row = mine + 8 * i + lane / 4;
        its_lse[i / 2][i % 2] = row < T ? lse[lse_at(z, b, h) + row] * LOG2E : 0;
        if (row < T && lane % 4 == 0) {
            delta[lse_at(z, b, h) + row] = its_delta[i / 2][i % 2];
        }
    }

    for (int key = 0; key < last; key += STEP, turn ^= 1) {
        floatX *keys = steps + turn * 2 * STEP * LD, *values = keys + STEP * LD;
        floatX *next = steps + (turn ^ 1) * 2 * STEP * LD;

        // These keys and values are there, and nobody needs the last ones.
        copy_wait<0>();
        __syncthreads();
        if (key + STEP < last) {
            load_tile<W, STEP>(next, k + (key + STEP) * ld, ld, T - key - STEP, D);
            load_tile<W, STEP>(next + STEP * LD, v + (key + STEP) * ld, ld, T - key - STEP, D);
        }
        turn_tile<W, STEP>(keys, angles, key, T, D);
        __syncthreads();

        if (key < mine + 16 * MT) { // not the future of all of this warp's queries
            float p[MT][STEP / 8][4] = {};
            float ds[MT][STEP / 8][4] = {};
            warp_product<MT, STEP / 8, false, false>(p, queries + my_row * LD, LD, keys, LD, W);
            warp_product<MT, STEP / 8, false, false>(ds, douts + my_row * LD, LD, values, LD, W);
            if (key + STEP - 1 > mine) {
                hide_future(p, key - mine, 1);
            }
            score_gradients(p, ds, its_lse, its_delta, scale);
            register_product(dq, ds, keys, LD);
        }
    }
    store_rows(dqkv + query_at(z, b, h), ld, dq, angles, mine, T, D, scale / LOG2E);
}

// The same with keys as rows and queries as columns: p and ds are P and dS transposed. Query r of the tile has its lse, in
// powers of 2, and its delta in the 16 bytes behind row r.
template <int W, int MT, int NT>
__device__ void score_gradients_by_key(float (&p)[MT][NT][4], float (&ds)[MT][NT][4], const floatX *queries, float scale) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 2 * NT; j++) {
        int column = j / 2 * 8 + lane % 4 * 2 + j % 2;
        const float *its = (const float *)(queries + column * Tiles<W>::LD + W);
        float lse = its[0], delta = its[1];
#pragma unroll
        for (int i = 0; i < 2 * MT; i++) {
            float *score = &p[i / 2][j / 2][i % 2 * 2 + j % 2], *slope = &ds[i / 2][j / 2][i % 2 * 2 + j % 2];
            *score = power_of_2(*score * scale - lse);
            *slope = *score * (*slope - delta);
        }
    }
}

// The steps of a block that owns keys: along the queries from `start` to T of one head after the other of its group, since
// all of them share these keys.
struct QuerySteps {
    int b, h, start, of_head; // h: the group's first head; of_head: steps of one head
};

// Fetches the queries of a step and their dout to a buffer (2,STEP,W).
template <int W>
__device__ void load_step(floatX *buffer, const floatX *qkv, const floatX *dout, QuerySteps steps, int step, HeadSizes z) {
    const int STEP = Tiles<W>::KEY_STEP, LD = Tiles<W>::LD;
    int h = steps.h + step / steps.of_head, query = steps.start + step % steps.of_head * STEP, rows = z.T - query;
    size_t ld = (size_t)(z.H + 2 * z.KV) * z.D, width = (size_t)z.H * z.D;
    load_tile<W, STEP>(buffer, qkv + query_at(z, steps.b, h) + query * ld, ld, rows, z.D);
    load_tile<W, STEP>(buffer + STEP * LD, dout + answer_at(z, steps.b, h) + query * width, width, rows, z.D);
}

// Turns the queries of a step, which are in the buffer, and puts lse, in powers of 2, and delta behind each row. These
// two are read first and written last: on their way from memory the queries are turned.
template <int W>
__device__ void prepare_step(floatX *buffer, const float *lse, const float *delta, const float *angles, QuerySteps steps,
                             int step, HeadSizes z) {
    const int STEP = Tiles<W>::KEY_STEP;
    int h = steps.h + step / steps.of_head, query = steps.start + step % steps.of_head * STEP, row = threadIdx.x;
    int there = row < min(STEP, z.T - query);
    size_t at = lse_at(z, steps.b, h) + query + row;
    float numbers[2] = {there ? lse[at] * LOG2E : 0, there ? delta[at] : 0};
    turn_tile<W, STEP>(buffer, angles, query, z.T, z.D);
    if (row < STEP) {
        store_pack((float *)(buffer + row * Tiles<W>::LD + W), numbers);
    }
}

// dK or dV or both, of KEYS_HELD keys of one key and value head.
template <int W, bool DK, bool DV>
__device__ void key_gradients(floatX *dqkv, const floatX *dout, const float *lse, const float *delta, const floatX *qkv,
                              const float *angles, HeadSizes z, floatX *keys) {
    typedef Tiles<W> A;
    const int MT = A::KEY_MT, LD = A::LD, HELD = A::KEYS_HELD, STEP = A::KEY_STEP;
    floatX *values = keys + HELD * LD, *buffers = values + HELD * LD;
    int T = z.T, D = z.D, group = z.H / z.KV, tiles = div_up(T, HELD), head = blockIdx.x / tiles;
    int b = head / z.KV, kv = head % z.KV, first = blockIdx.x % tiles * HELD;
    int my_row = 16 * MT * (threadIdx.x / 32), mine = first + my_row;
    int start = first / STEP * STEP; // no earlier query sees a key
    QuerySteps steps = {b, kv * group, start, div_up(T - start, STEP)};
    int count = group * steps.of_head;
    size_t ld = (size_t)(z.H + 2 * z.KV) * D;
    float scale = LOG2E / sqrtf((float)D);
    float dk[MT][W / 8][4] = {};
    float dv[MT][W / 8][4] = {};

    load_tile<W, HELD>(keys, qkv + key_at(z, b, kv) + first * ld, ld, T - first, D);
    load_tile<W, HELD>(values, qkv + value_at(z, b, kv) + first * ld, ld, T - first, D);
    load_step<W>(buffers, qkv, dout, steps, 0, z);
    copy_wait<3>();
    __syncthreads(); // the keys are there
    turn_tile<W, HELD>(keys, angles, first, T, D);

    for (int step = 0; step < count; step++) {
        floatX *queries = buffers + step % 2 * 2 * STEP * LD, *douts = queries + STEP * LD;
        floatX *next = buffers + (step + 1) % 2 * 2 * STEP * LD;
        int query = start + step % steps.of_head * STEP;

        // These queries are there, and nobody needs the last ones.
        copy_wait<0>();
        __syncthreads();
        if (step + 1 < count) {
            load_step<W>(next, qkv, dout, steps, step + 1, z);
        }
        prepare_step<W>(queries, lse, delta, angles, steps, step, z);
        __syncthreads();

        if (query + STEP > mine) { // not all of them come before this warp's keys
            float p[MT][STEP / 8][4] = {};
            float ds[MT][STEP / 8][4] = {};
            warp_product<MT, STEP / 8, false, false>(p, keys + my_row * LD, LD, queries, LD, W);
            if (DK) {
                warp_product<MT, STEP / 8, false, false>(ds, values + my_row * LD, LD, douts, LD, W);
            }
            if (mine + 16 * MT - 1 > query) {
                hide_future(p, query - mine, -1);
            }
            score_gradients_by_key<W>(p, ds, queries, scale);
            if (DV) {
                register_product(dv, p, douts, LD);
            }
            if (DK) {
                register_product(dk, ds, queries, LD);
            }
        }
    }
    if (DK) {
        store_rows(dqkv + key_at(z, b, kv), ld, dk, angles, mine, T, D, scale / LOG2E);
    }
    if (DV) {
        store_rows(dqkv + value_at(z, b, kv), ld, dv, NULL, mine, T, D, 1);
    }
}

// A block makes both, but heads of more than 128 numbers have too many of them for the registers: there blocks with
// blockIdx.y 0 make dK, and those with 1 dV.
template <int W>
__global__ void attention_key_kernel(floatX *dqkv, const floatX *dout, const float *lse, const float *delta,
                                     const floatX *qkv, const float *angles, HeadSizes z) {
    extern __shared__ float4 dynamic[];
    if constexpr (W <= 128) {
        key_gradients<W, true, true>(dqkv, dout, lse, delta, qkv, angles, z, (floatX *)dynamic);
    } else if (blockIdx.y == 0) {
        key_gradients<W, true, false>(dqkv, dout, lse, delta, qkv, angles, z, (floatX *)dynamic);
    } else {
        key_gradients<W, false, true>(dqkv, dout, lse, delta, qkv, angles, z, (floatX *)dynamic);
    }
}

// ---- what the model calls

// Beyond 48 KiB a kernel must ask for its shared memory.
template <class Kernel> void ask_for_shared(Kernel kernel, int bytes) {
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

template <int W>
void attention_forward_of(floatX *out, float *lse, const floatX *qkv, const float *angles, int B, HeadSizes z) {
    typedef Tiles<W> A;
    int grid = B * z.H * div_up(z.T, A::QUERIES_HELD), threads = 32 * A::WARPS;
    ask_for_shared(attention_forward_kernel<W>, A::FORWARD_BYTES);
    attention_forward_kernel<W><<<grid, threads, A::FORWARD_BYTES, stream>>>(out, lse, qkv, angles, z);
    CHECK(cudaGetLastError());
}

template <int W>
void attention_backward_of(floatX *dqkv, float *delta, const floatX *dout, const floatX *out, const float *lse,
                           const floatX *qkv, const float *angles, int B, HeadSizes z) {
    typedef Tiles<W> A;
    int queries = B * z.H * div_up(z.T, A::QUERIES_HELD), threads = 32 * A::WARPS;
    dim3 keys(B * z.KV * div_up(z.T, A::KEYS_HELD), W <= 128 ? 1 : 2);
    ask_for_shared(attention_query_kernel<W>, A::QUERY_BYTES);
    attention_query_kernel<W><<<queries, threads, A::QUERY_BYTES, stream>>>(dqkv, delta, dout, out, lse, qkv, angles, z);
    CHECK(cudaGetLastError());
    ask_for_shared(attention_key_kernel<W>, A::KEY_BYTES);
    attention_key_kernel<W><<<keys, threads, A::KEY_BYTES, stream>>>(dqkv, dout, lse, delta, qkv, angles, z);
    CHECK(cudaGetLastError());
}

void check_head(int D) {
    if (D % 8 || D > 256) {
        fail("on the GPU a head's width is a multiple of 8 and at most 256, not %d", D);
    }
}

// out (B,T,H*D), lse (B,H,T): log of the sum of exp of each query's scores. qkv (B,T,(H+2KV)*D) without positions,
// angles (T,D/2,2): cosine and sine. qkv and out begin at multiples of 16 bytes.
void attention_forward(floatX *out, float *lse, const floatX *qkv, const float *angles, int B, int T, int H, int KV,
                       int D) {
    HeadSizes z = {T, H, KV, D};
    check_head(D);
    if (B * T == 0) {
        return;
    }
    if (D <= 16) {
        attention_forward_of<16>(out, lse, qkv, angles, B, z);
    } else if (D <= 32) {
        attention_forward_of<32>(out, lse, qkv, angles, B, z);
    } else if (D <= 64) {
        attention_forward_of<64>(out, lse, qkv, angles, B, z);
    } else if (D <= 128) {
        attention_forward_of<128>(out, lse, qkv, angles, B, z);
    } else {
        attention_forward_of<256>(out, lse, qkv, angles, B, z);
    }
}

// Writes dqkv (B,T,(H+2KV)*D), the gradient by qkv without positions. delta (B,H,T) is a buffer.
void attention_backward(floatX *dqkv, const floatX *dout, const floatX *out, const float *lse, const floatX *qkv,
                        const float *angles, int B, int T, int H, int KV, int D, float *delta) {
    HeadSizes z = {T, H, KV, D};
    check_head(D);
    if (B * T == 0) {
        return;
    }
    if (D <= 16) {
        attention_backward_of<16>(dqkv, delta, dout, out, lse, qkv, angles, B, z);
    } else if (D <= 32) {
        attention_backward_of<32>(dqkv, delta, dout, out, lse, qkv, angles, B, z);
    } else if (D <= 64) {
        attention_backward_of<64>(dqkv, delta, dout, out, lse, qkv, angles, B, z);
    } else if (D <= 128) {
        attention_backward_of<128>(dqkv, delta, dout, out, lse, qkv, angles, B, z);
    } else {
        attention_backward_of<256>(dqkv, delta, dout, out, lse, qkv, angles, B, z);
    }
}

// ---- one token, in generation

#define ONE_WARPS   16 // of a block
#define ONE_STEP    4  // positions of a warp at a time
#define ONE_COLUMNS 8  // numbers of a lane: columns lane, lane + 32, ... of 256

// What a warp has seen so far: the highest score, the sum of powers of 2 relative to it, and the sum of the values, times
// these powers.
struct Seen {
    float top, total, sum[ONE_COLUMNS];
};

// Number d of a head (D), turned by its angle (D/2,2), and rounded.
__device__ float turned_number(const floatX *head, const float *angle, int d, int D) {
    int i = d % (D / 2);
    float a[1] = {to_float(head[i])}, b[1] = {to_float(head[i + D / 2])};
    float its[2] = {angle[2 * i], angle[2 * i + 1]};
    floatX rounded;
    turn_pairs(a, b, its, 1);
    store(&rounded, d < D / 2 ? a[0] : b[0]);
    return to_float(rounded);
}

// Adds the first `count` of ONE_STEP positions to what a warp has seen. q: the query's numbers of this lane, times scale.
__device__ void see_positions(Seen *seen, const float (&q)[ONE_COLUMNS], const floatX *(&key)[ONE_STEP],
                              const floatX *(&value)[ONE_STEP], int count, int D) {
    int lane = threadIdx.x % 32;
    float score[ONE_STEP] = {}, before = seen->top;
#pragma unroll
    for (int i = 0; i < ONE_STEP; i++) {
#pragma unroll
        for (int j = 0; j < ONE_COLUMNS; j++) {
            score[i] += lane + 32 * j < D ? q[j] * to_float(key[i][lane + 32 * j]) : 0;
        }
    }
#pragma unroll
    for (int i = 0; i < ONE_STEP; i++) {
        score[i] = i < count ? warp_sum(score[i]) : -3e38f;
        seen->top = fmaxf(seen->top, score[i]);
    }

    // A new highest score scales down what was summed so far.
    float shrink = power_of_2(before - seen->top);
    seen->total *= shrink;
#pragma unroll
    for (int j = 0; j < ONE_COLUMNS; j++) {
        seen->sum[j] *= shrink;
    }
#pragma unroll
    for (int i = 0; i < ONE_STEP; i++) {
        float p = power_of_2(score[i] - seen->top);
        seen->total += p;
#pragma unroll
        for (int j = 0; j < ONE_COLUMNS; j++) {
            seen->sum[j] += lane + 32 * j < D ? p * to_float(value[i][lane + 32 * j]) : 0;
        }
    }
}

// out (D) = the answer of all warps together.
__device__ void put_together(floatX *out, const Seen &seen, int D) {
    __shared__ float top[ONE_WARPS];
    __shared__ float total[ONE_WARPS];
    __shared__ float answer[ONE_WARPS][32 * ONE_COLUMNS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int j = 0; j < ONE_COLUMNS; j++) {
        answer[warp][lane + 32 * j] = seen.sum[j];
    }
    if (lane == 0) {
        top[warp] = seen.top;
        total[warp] = seen.total;
    }
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        float best = top[0], x = 0, ones = 0;
        for (int w = 1; w < ONE_WARPS; w++) {
            best = fmaxf(best, top[w]);
        }
        for (int w = 0; w < ONE_WARPS; w++) {
            x += answer[w][d] * power_of_2(top[w] - best);
            ones += total[w] * power_of_2(top[w] - best);
        }
        store(&out[d], x / ones);
    }
}

// A block is one query head. Each warp takes positions, ONE_STEP at a time; at the end the block puts together what its
// warps have seen. `slot` is this token's row of the cache.
__global__ void attention_of_one_kernel(floatX *out, floatX *cache, const floatX *qkv, const float *angle, int slot,
                                        int seen_count, int H, int KV, int D) {
    __shared__ floatX new_key[32 * ONE_COLUMNS];
    int h = blockIdx.x, group = H / KV, kv = h / group, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    size_t width = 2 * KV * D;
    const floatX *query = qkv + (size_t)h * D, *unturned = qkv + (size_t)(H + kv) * D, *new_value = unturned + KV * D;
    floatX *keys = cache + kv * D, *values = keys + KV * D; // of position 0; rows are `width` apart
    float q[ONE_COLUMNS] = {}, scale = LOG2E / sqrtf((float)D);
    Seen seen = {-3e38f, 0, {}};

    // The new key gets its position here. One block of those that share it writes it to the cache.
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        store(&new_key[d], turned_number(unturned, angle, d, D));
        if (h % group == 0) {
            keys[slot * width + d] = new_key[d];
            values[slot * width + d] = new_value[d];
        }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < ONE_COLUMNS; j++) {
        q[j] = lane + 32 * j < D ? turned_number(query, angle, lane + 32 * j, D) * scale : 0;
    }

    for (int t = warp * ONE_STEP; t < seen_count; t += ONE_WARPS * ONE_STEP) {
        const floatX *key[ONE_STEP];
        const floatX *value[ONE_STEP];
#pragma unroll
        for (int i = 0; i < ONE_STEP; i++) {
            int is_old = t + i < seen_count && t + i != slot; // other blocks may not have written the slot yet
            key[i] = is_old ? keys + (t + i) * width : new_key;
            value[i] = is_old ? values + (t + i) * width : new_value;
        }
        see_positions(&seen, q, key, value, seen_count - t, D);
    }
    put_together(out + (size_t)h * D, seen, D);
}

// The attention of one layer in model_generate: query, key and value of the token at `position` are in qkv ((H+2KV)*D),
// without their position, angle (D/2,2) is of it. Key, turned, and value go to their row of cache (seq,2*KV*D); out (H*D)
// is what the token takes from the last seq positions.
void attention_of_one(floatX *out, floatX *cache, const floatX *qkv, const float *angle, int position, int seq, int H,
                      int KV, int D) {
    int seen = min_int(position + 1, seq), slot = position % seq;
    check_head(D);
    attention_of_one_kernel<<<H, 32 * ONE_WARPS, 0, stream>>>(out, cache, qkv, angle, slot, seen, H, KV, D);
    CHECK(cudaGetLastError());
}
