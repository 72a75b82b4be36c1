// Causal attention in tiles, on the kernel of the matrix product.
// Gives: fast_attention_forward, fast_attention_backward, attention_bytes. Needs: dev/cpu/matmul.h.
//
// The formulas and the shapes are those of attention_forward and attention_backward in train_moe.c. What is
// different:
//
// - Nearly all of the work is products of matrices: Q K^T and P V forward, five more of the kind backward.
//   They use the kernel and the packing of matmul.h.
// - There is no (T,T) array of scores. QUERIES queries meet TILE_K keys at a time, in a tile of scores that
//   stays in the cache. The softmax needs a row's highest score, but later tiles may bring a higher one: then
//   all that was summed so far is scaled down (Milakov and Gimelshein 2018, Online normalizer calculation for
//   softmax; Dao et al. 2022, FlashAttention).
// - A query may not see later keys. Their scores are computed only where they share a kernel's tile with
//   scores that are needed, and then set to 0.
//
// A tile of scores is laid out like a packed a, its rows ROW apart, so the next product reads it as it is. A
// kernel may read rows and columns of the tile that were not computed this time, but what it makes of them is
// never stored.
#pragma once
#include "matmul.h"

#define QUERIES 96       // rows of a tile of scores
#define STRIP   (2 * MR) // rows of a tile that are computed up to the same key, the last that any of them sees
#define NEAR    24       // rows whose scores stay in the first-level cache until the softmax has read them

// ---- buffers

// What a thread keeps while it works on a head. "As a" means packed as the left matrix, "as b" as the right.
typedef struct Buffers {
    real *P, *dP;              // two tiles (QUERIES,ROW): probabilities, and their gradients
    real *queries, *douts;     // a tile's queries, and their rows of dout: as a of products over D,
    real *queries_b, *douts_b; // and as b of products over queries. Forward: queries_b holds the sums of values
    real *keys, *values;       // all keys and values of the head, as b of products over D
    real *over_keys;           // forward the values, backward the keys: as b of a product over keys
} Buffers;

real *attention_memory; // of all threads, for any later call: it only grows

size_t packed_width(int cols) { // numbers in a packed row of so many columns
    return (size_t)(cols / NR * NR + (cols % NR ? panel_width(cols % NR) : 0));
}

// The sizes of a tile, of queries as a, of queries as b, of keys. Returns the sum of a thread's buffers.
size_t buffer_sizes(size_t size[4], int T, int D) {
    size_t width = packed_width(D);
    size[0] = QUERIES * ROW;
    size[1] = (size_t)div_up(D, TILE_K) * QUERIES * ROW;
    size[2] = QUERIES * width;
    size[3] = (size_t)(T + NR) * (width > (size_t)D ? width : (size_t)D);
    return 2 * size[0] + 2 * size[1] + 2 * size[2] + 3 * size[3];
}

// Bytes of attention_memory, for sequences of T tokens and heads of width D.
size_t attention_bytes(int T, int D) {
    size_t size[4];
    return buffer_sizes(size, T, D) * (size_t)thread_count() * sizeof(real);
}

void reserve_attention(int T, int D) {
    static size_t reserved;
    size_t bytes = attention_bytes(T, D);
    if (bytes > reserved) {
        free(attention_memory);
        attention_memory = (real *)allocate(bytes, 1);
        reserved = bytes;
    }
}

Buffers thread_buffers(int T, int D) { // those of the calling thread
    size_t size[4];
    real *p = attention_memory + buffer_sizes(size, T, D) * (size_t)thread_number();
    Buffers b;
    b.P = p;
    b.dP = b.P + size[0];
    b.queries = b.dP + size[0];
    b.douts = b.queries + size[1];
    b.queries_b = b.douts + size[1];
    b.douts_b = b.queries_b + size[2];
    b.keys = b.douts_b + size[2];
    b.values = b.keys + size[3];
    b.over_keys = b.values + size[3];
    return b;
}

// x (rows,D), for rows <= QUERIES, times scale, as a of a product over D: TILE_K numbers of D after another.
void pack_queries(real *packed, const real *x, size_t ld, int rows, int D, real scale) {
    Operand o = along_rows(x, ld, NULL);
    for (int d = 0; d < D; d += TILE_K, packed += QUERIES * ROW) {
        int n = min_int(TILE_K, D - d);
        pack_a(packed, &o, 0, rows, d, n);
        for (int i = 0; i < rows; i++) {
            for (int j = 0; j < n; j++) {
                packed[i * ROW + j] *= scale;
            }
        }
    }
}

// x (T,D) as b of products over D: TILE_K rows after another, and of each of these, TILE_K numbers of D.
void pack_over_D(real *packed, const real *x, size_t ld, int T, int D) {
    Operand o = along_rows(x, ld, NULL);
    for (int t = 0; t < T; t += TILE_K) {
        int n = min_int(TILE_K, T - t);
        for (int d = 0; d < D; d += TILE_K) {
            int nd = min_int(TILE_K, D - d);
            pack_b(packed, &o, t, n, d, nd);
            packed += packed_width(n) * (size_t)nd;
        }
    }
}

// x (T,D), times scale, as b of products over T: TILE_K rows after another.
void pack_over_T(real *packed, const real *x, size_t ld, int T, int D, real scale) {
    Operand o = along_columns(x, ld, NULL);
    for (int t = 0; t < T; t += TILE_K) {
        int n = min_int(TILE_K, T - t);
        size_t size = packed_width(D) * (size_t)n;
        pack_b(packed, &o, 0, D, t, n);
        for (size_t i = 0; scale != 1 && i < size; i++) {
            packed[i] *= scale;
        }
        packed += size;
    }
}

// ---- products of a tile: its queries are first .. first+rows, its keys are key .. key+n

// tile (rows,n) = queries times keys transposed, as far as some query sees the keys. keys begin at `key`.
void attention_scores(real *tile, const real *queries, const real *keys, int first, int rows, int key, int n,
                      int D) {
    for (int d = 0; d < D; d += TILE_K, queries += QUERIES * ROW) {
        int nd = min_int(TILE_K, D - d);
        for (int j = 0; j < min_int(n, first + rows - key); j += NR) {
            // Queries before number i see no key of this panel.
            int i = max_int(0, key + j - first) / STRIP * STRIP;
            product_panel(tile + i * ROW + j, ROW, queries + i * ROW, 0, 1,
                          keys + packed_width(n) * (size_t)d + (size_t)j * (size_t)nd, nd, rows - i,
                          min_int(NR, n - j), d > 0);
        }
    }
}

// out (rows,D), its rows ld apart, = or += tile times x: what each query takes of the keys' rows of x, packed
// over T.
void attention_take(real *out, size_t ld, const real *tile, const real *x, int first, int rows, int key, int n,
                    int D, int add) {
    for (int i = 0; i < rows; i += STRIP) {
        int height = min_int(STRIP, rows - i), seen = min_int(n, first + i + height - key);
        for (int j = 0; seen > 0 && j < D; j += NR) {
            product_panel(out + (size_t)i * ld + (size_t)j, ld, tile + i * ROW, 0, 1, x + (size_t)j * (size_t)n,
                          seen, height, min_int(NR, D - j), add);
        }
    }
}

// out (n,D), its rows ld apart, += tile transposed times x: what each key gets of the queries' rows of x,
// packed over T.
void attention_give(real *out, size_t ld, const real *tile, const real *x, int first, int rows, int key, int n,
                    int D) {
    int end = min_int(n, first + rows - key);
    for (int i = 0; i < end; i += STRIP) {
        int from = max_int(0, key + i - first); // queries before this one see none of these keys
        for (int j = 0; j < D; j += NR) {
            int cols = min_int(NR, D - j);
            product_panel(out + (size_t)i * ld + (size_t)j, ld, tile + i + from * ROW, 1, ROW,
                          x + (size_t)j * (size_t)rows + (size_t)(from * panel_width(cols)), rows - from,
                          min_int(STRIP, end - i), cols, 1);
        }
    }
}

// ---- forward

// The tile's scores become e^(score - highest), and 0 where a query may not see the key. highest and total
// (rows) are each row's highest score and the sum of its powers, over the tiles so far. sums (rows,width) are
// the values' sums so far.
void softmax_of_tile(real *tile, real *highest, real *total, real *sums, size_t width, int first, int rows,
                     int key, int n) {
    for (int i = 0; i < rows; i++) {
        real *row = tile + i * ROW;
        int seen = max_int(0, min_int(n, first + i + 1 - key)), end = min_int(n, first + rows - key);
        real before = key ? highest[i] : (real)-INFINITY;
        highest[i] = row_max(row, seen, before);
        real sum = row_exp(row, seen, end, highest[i]);

        // What was summed before counts e^(before - highest) times as much.
        real shrink = key ? (real)exp((double)(before - highest[i])) : 0;
        total[i] = key ? total[i] * shrink + sum : sum;
        for (size_t j = 0; shrink != 1 && key && j < width; j++) {
            sums[(size_t)i * width + j] *= shrink;
        }
    }
}

void fast_attention_forward(real *out, real *lse, const real *qkv, int B, int T, int H, int KV, int D) {
    size_t ld = (size_t)(H + 2 * KV) * (size_t)D, width = packed_width(D);
    real scale = (real)(1.0 / sqrt((double)D));
    reserve_attention(T, D);
#pragma omp parallel for schedule(dynamic) if (B * T > 16)
    for (int task = 0; task < B * H; task++) {
        int b = task / H, h = task % H;
        const real *q = qkv + (size_t)b * T * ld + (size_t)h * D;
        const real *k = qkv + (size_t)b * T * ld + (size_t)(H + h / (H / KV)) * D, *v = k + (size_t)KV * D;
        Buffers x = thread_buffers(T, D);
        real *tile = x.P, *sums = x.queries_b, highest[QUERIES], total[QUERIES];

        // Keys and values are packed once for all queries.
        pack_over_D(x.keys, k, ld, T, D);
        pack_over_T(x.over_keys, v, ld, T, D, 1);
        for (int first = 0; first < T; first += NEAR) {
            int rows = min_int(NEAR, T - first);
            pack_queries(x.queries, q + (size_t)first * ld, ld, rows, D, scale);
            for (int key = 0; key < first + rows; key += TILE_K) {
                int n = min_int(TILE_K, T - key);
                attention_scores(tile, x.queries, x.keys + (size_t)key * (size_t)D, first, rows, key, n, D);
                softmax_of_tile(tile, highest, total, sums, width, first, rows, key, n);
                attention_take(sums, width, tile, x.over_keys + (size_t)key * width, first, rows, key, n, D,
                               key > 0);
            }

            // Each query's sum of values, divided by the sum of its powers.
            for (int i = 0; i < rows; i++) {
                real *to = out + ((size_t)b * T + first + i) * H * D + (size_t)h * D, one = 1 / total[i];
                for (int j = 0; j < D; j++) {
                    to[j] = sums[(size_t)i * width + (size_t)j] * one;
                }
                lse[((size_t)b * H + h) * T + first + i] = highest[i] + (real)log((double)total[i]);
            }
        }
        ranks_tick();
    }
}

// ---- backward

// P has a tile's scores and becomes its probabilities. dP has the gradients by the probabilities and becomes
// those by the scores: P * (dP - delta), where delta (rows) is each query's dout . out.
void softmax_backward_of_tile(real *P, real *dP, const real *lse, const real *delta, int first, int rows,
                              int key, int n) {
    vec zero = {0};
    int end = min_int(n, first + rows + STRIP - key); // attention_give may read so far
    for (int i = 0; i < rows; i++) {
        real *p = P + i * ROW, *dp = dP + i * ROW;
        int seen = max_int(0, min_int(n, first + i + 1 - key));
        row_exp(p, seen, end, lse[i]);
        for (int j = 0; j < end; j += LANES) {
            vec_in_memory *to = (vec_in_memory *)(dp + j);
            *to = vec_first(*(vec_in_memory *)(p + j) * (*to - delta[i]), seen - j, zero); // 0 in the future
        }
    }
}

// One query head: writes dq, and adds to dk and dv. q, dq, dk, dv have rows ld apart, out and dout rows
// out_ld apart. x has the head's keys and values packed.
void query_head_backward(real *dq, real *dk, real *dv, const real *q, const real *out, const real *dout,
                         const real *lse, const Buffers *x, size_t ld, size_t out_ld, int T, int D) {
    real scale = (real)(1.0 / sqrt((double)D)), delta[QUERIES];
    for (int first = 0; first < T; first += QUERIES) {
        int rows = min_int(QUERIES, T - first);
        const real *q_rows = q + (size_t)first * ld, *o = out + (size_t)first * out_ld,
                   *g = dout + (size_t)first * out_ld;
        pack_queries(x->queries, q_rows, ld, rows, D, scale);
        pack_queries(x->douts, g, out_ld, rows, D, 1);
        pack_over_T(x->queries_b, q_rows, ld, rows, D, scale);
        pack_over_T(x->douts_b, g, out_ld, rows, D, 1);
        for (int i = 0; i < rows; i++) {
            delta[i] = dot(g + (size_t)i * out_ld, o + (size_t)i * out_ld, D);
        }
        for (int key = 0; key < first + rows; key += TILE_K) {
            int n = min_int(TILE_K, T - key);
            size_t at = (size_t)key * (size_t)D;

            // P = e^(Q K^T - lse), dP = dout V^T; then dP becomes dS, the gradient by the scores.
            for (int i = 0; i < rows; i += NEAR) {
                int near = min_int(NEAR, rows - i);
                real *P = x->P + i * ROW, *dP = x->dP + i * ROW;
                attention_scores(P, x->queries + i * ROW, x->keys + at, first + i, near, key, n, D);
                attention_scores(dP, x->douts + i * ROW, x->values + at, first + i, near, key, n, D);
                softmax_backward_of_tile(P, dP, lse + first + i, delta + i, first + i, near, key, n);
            }

            // dV += P^T dout, dK += dS^T Q, dQ += dS K
            attention_give(dv + (size_t)key * ld, ld, x->P, x->douts_b, first, rows, key, n, D);
            attention_give(dk + (size_t)key * ld, ld, x->dP, x->queries_b, first, rows, key, n, D);
            attention_take(dq + (size_t)first * ld, ld, x->dP, x->over_keys + (size_t)key * packed_width(D),
                           first, rows, key, n, D, key > 0);
        }
    }
}

// Writes dqkv (B,T,(H+2KV)*D). One task owns one key and value head, so it alone adds to it.
void fast_attention_backward(real *dqkv, const real *dout, const real *out, const real *lse, const real *qkv,
                             int B, int T, int H, int KV, int D) {
    size_t ld = (size_t)(H + 2 * KV) * (size_t)D, out_ld = (size_t)H * D;
    real scale = (real)(1.0 / sqrt((double)D));
    reserve_attention(T, D);
#pragma omp parallel for schedule(dynamic)
    for (int task = 0; task < B * KV; task++) {
        int b = task / KV, kv = task % KV;
        size_t base = (size_t)b * T * ld, keys = base + (size_t)(H + kv) * D, values = keys + (size_t)KV * D;
        Buffers x = thread_buffers(T, D);
        pack_over_D(x.keys, qkv + keys, ld, T, D);
        pack_over_D(x.values, qkv + values, ld, T, D);
        pack_over_T(x.over_keys, qkv + keys, ld, T, D, scale);
        for (int t = 0; t < T; t++) {
            memset(dqkv + keys + (size_t)t * ld, 0, (size_t)D * sizeof(real));
            memset(dqkv + values + (size_t)t * ld, 0, (size_t)D * sizeof(real));
        }
        for (int h = kv * (H / KV); h < (kv + 1) * (H / KV); h++) {
            size_t query = base + (size_t)h * D, at = (size_t)b * T * out_ld + (size_t)h * D;
            query_head_backward(dqkv + query, dqkv + keys, dqkv + values, qkv + query, out + at, dout + at,
                                lse + ((size_t)b * H + h) * T, &x, ld, out_ld, T, D);
        }
        ranks_tick();
    }
}
