// Causal attention in tiles, on the kernel of the matrix product.
// Gives: attention_forward, attention_backward, attention_room. Needs: dev/cpu/matmul.h.
//
// Causal grouped-query attention. qkv (B,T,(H+2KV)*D): H query heads, then KV keys, then KV values; query head h uses
// key and value head h/(H/KV). out (B,T,H*D); lse (B,H,T): log of the sum of exp of each query's scores, with which
// backward gets the probabilities again. Vaswani et al. 2017; Ainslie et al. 2023 (grouped queries).
//
// There is no (T,T) array: QUERIES queries meet TILE_K keys at a time, in a tile of scores, and what they take from the
// values is scaled down whenever a later tile brings a higher score (Milakov and Gimelshein 2018; Dao et al. 2022).
// Tiles are the a of the kernel above as they are, rows ROW apart; keys and values are packed once for all queries of a
// head. Of the future only what shares a kernel with the past is computed. A kernel may read rows and columns of a tile
// that were not computed this time; what it makes of them is never stored.
#define QUERIES 96 // of a tile
#define STRIP   (2 * MR) // rows that are computed up to the same key, the last that any of them sees
#pragma once
#include "matmul.h"

size_t packed_width(int cols) { // numbers a packed row of so many columns takes
    return (size_t)(cols / NR * NR + (cols % NR ? panel_width(cols % NR) : 0));
}

// Scratch for one thread, as attention_backward lays it out (forward takes less): two tiles, queries and douts as a and
// as b, and over all T keys, values and keys_b.
size_t attention_room(int T, int D) {
    size_t tile = QUERIES * ROW, rows = (size_t)div_up(D, TILE_K) * tile, width = packed_width(D);
    return 3 * (size_t)(T + NR) * (width > (size_t)D ? width : (size_t)D) + 2 * tile + 2 * rows + 2 * QUERIES * width;
}

// x (rows <= QUERIES, D) as the a of a product over D: TILE_K of D after another; times scale.
void pack_queries(real *packed, const real *x, size_t ld, int rows, int D, real scale) {
    Operand o = along_rows(x, ld, NULL);
    for (int d = 0; d < D; d += TILE_K, packed += QUERIES * ROW) {
        pack_a(packed, &o, 0, rows, d, min_int(TILE_K, D - d));
        for (int i = 0; i < rows; i++) {
            for (int j = 0; j < min_int(TILE_K, D - d); j++)
                packed[i * ROW + j] *= scale;
        }
    }
}

// x (T,D) as the b of a product over D (transposed), or of one over T: TILE_K of T after another; times scale.
void pack_keys(real *packed, const real *x, size_t ld, int T, int D, int transposed, real scale) {
    Operand o = transposed ? along_rows(x, ld, NULL) : along_columns(x, ld, NULL);
    for (int t = 0; t < T; t += TILE_K) {
        int n = min_int(TILE_K, T - t);
        size_t size = transposed ? packed_width(n) * (size_t)D : packed_width(D) * (size_t)n;
        for (int d = 0; transposed && d < D; d += TILE_K)
            pack_b(packed + packed_width(n) * (size_t)d, &o, t, n, d, min_int(TILE_K, D - d));
        if (!transposed)
            pack_b(packed, &o, 0, D, t, n);
        for (size_t i = 0; scale != 1 && i < size; i++)
            packed[i] *= scale;
        packed += size;
    }
}

// tile (rows, n): queries first... times the n keys from `key` on, as far as some query sees them. Both packed.
void attention_scores(real *tile, const real *queries, const real *keys, int first, int rows, int key, int n, int D) {
    for (int d = 0; d < D; d += TILE_K, queries += QUERIES * ROW) {
        int nd = min_int(TILE_K, D - d);
        for (int j = 0; j < min_int(n, first + rows - key); j += NR) {
            int i = max_int(0, key + j - first) / STRIP * STRIP;
            product_panel(tile + i * ROW + j, ROW, queries + i * ROW, 0, 1,
                          keys + packed_width(n) * (size_t)d + (size_t)j * (size_t)nd, nd, rows - i, min_int(NR, n - j),
                          d > 0);
        }
    }
}

// out (rows,D), rows ld apart, = or += tile (rows,n) times the n keys (or values) from `key` on, packed over T.
void attention_take(real *out, size_t ld, const real *tile, const real *keys, int first, int rows, int key, int n,
                    int D, int accumulate) {
    for (int i = 0; i < rows; i += STRIP) {
        int height = min_int(STRIP, rows - i), nk = min_int(n, first + i + height - key);
        for (int j = 0; nk > 0 && j < D; j += NR)
            product_panel(out + (size_t)i * ld + (size_t)j, ld, tile + i * ROW, 0, 1, keys + (size_t)j * (size_t)n, nk,
                          height, min_int(NR, D - j), accumulate);
    }
}

// out (n,D), rows ld apart, += tile (rows,n) transposed times x (rows,D), packed over its rows.
void attention_give(real *out, size_t ld, const real *tile, const real *x, int first, int rows, int key, int n, int D) {
    int end = min_int(n, first + rows - key);
    for (int i = 0; i < end; i += STRIP) {
        int from = max_int(0, key + i - first); // queries before that see none of these keys
        for (int j = 0; j < D; j += NR)
            product_panel(out + (size_t)i * ld + (size_t)j, ld, tile + i + from * ROW, 1, ROW,
                          x + (size_t)j * (size_t)rows + (size_t)(from * panel_width(min_int(NR, D - j))), rows - from,
                          min_int(STRIP, end - i), min_int(NR, D - j), 1);
    }
}

void attention_forward(real *out, real *lse, const real *qkv, int B, int T, int H, int KV, int D, real *scratch) {
    size_t ld = (size_t)(H + 2 * KV) * (size_t)D, width = packed_width(D);
    real scale = (real)(1.0 / sqrt((double)D));
#pragma omp parallel for schedule(dynamic) if (B * T > 16)
    for (int task = 0; task < B * H; task++) {
        int b = task / H, h = task % H;
        const real *q = qkv + (size_t)b * T * ld + (size_t)h * D;
        const real *k = qkv + (size_t)b * T * ld + (size_t)(H + h / (H / KV)) * D;
        real *tile = scratch + (size_t)thread_number() * attention_room(T, D), *answer = tile + QUERIES * ROW;
        real *queries = answer + QUERIES * width, *keys = queries + (size_t)div_up(D, TILE_K) * QUERIES * ROW;
        real *values = keys + packed_width(T) * (size_t)D;
        pack_keys(keys, k, ld, T, D, 1, 1);
        pack_keys(values, k + (size_t)KV * D, ld, T, D, 0, 1);
        for (int first = 0; first < T; first += QUERIES) {
            int rows = min_int(QUERIES, T - first);
            real highest[QUERIES], total[QUERIES];
            pack_queries(queries, q + (size_t)first * ld, ld, rows, D, scale);
            for (int key = 0; key < first + rows; key += TILE_K) {
                int n = min_int(TILE_K, T - key);
                attention_scores(tile, queries, keys + (size_t)key * (size_t)D, first, rows, key, n, D);
                for (int i = 0; i < rows; i++) {
                    real *row = tile + i * ROW;
                    int seen = max_int(0, min_int(n, first + i + 1 - key)), end = min_int(n, first + rows - key);
                    real before = key ? highest[i] : -(real)1e30, top = row_max(row, seen, before);
                    real sum = row_exp(row, seen, end, top), shrink = key ? (real)exp((double)(before - top)) : 0;
                    total[i] = key ? total[i] * shrink + sum : sum;
                    highest[i] = top;
                    for (size_t j = 0; shrink != 1 && key && j < width; j++)
                        answer[(size_t)i * width + j] *= shrink;
                }
                attention_take(answer, width, tile, values + (size_t)key * width, first, rows, key, n, D, key > 0);
            }
            for (int i = 0; i < rows; i++) {
                real *to = out + ((size_t)b * T + first + i) * H * D + (size_t)h * D, one = 1 / total[i];
                for (int j = 0; j < D; j++)
                    to[j] = answer[(size_t)i * width + (size_t)j] * one;
                lse[((size_t)b * H + h) * T + first + i] = highest[i] + (real)log((double)total[i]);
            }
        }
        ranks_tick();
    }
}

// Writes dqkv (B,T,(H+2KV)*D). With P the probabilities: dV = P^T dout, dP = dout V^T, dS = P * (dP - rowsum(P * dP)) / sqrt(D),
// where rowsum(P * dP) = dout . out; dQ = dS K, dK = dS^T Q. One task owns one key/value head, so it alone adds to it.
void attention_backward(real *dqkv, const real *dout, const real *out, const real *lse, const real *qkv, int B, int T, int H,
                        int KV, int D, real *scratch) {
    size_t ld = (size_t)(H + 2 * KV) * (size_t)D, width = (size_t)H * D;
    real scale = (real)(1.0 / sqrt((double)D));
#pragma omp parallel for schedule(dynamic)
    for (int task = 0; task < B * KV; task++) {
        int b = task / KV, kv = task % KV;
        size_t base = (size_t)b * T * ld, room = (size_t)div_up(D, TILE_K) * QUERIES * ROW;
        const real *k = qkv + base + (size_t)(H + kv) * D, *v = k + (size_t)KV * D;
        real *dk = dqkv + base + (size_t)(H + kv) * D, *dv = dk + (size_t)KV * D;
        // Packed: P and dS are tiles of scores; queries and douts the a of a product over D, queries_b and douts_b the b of
        // one over queries; keys and values the b of a product over D, keys_b the b of one over keys.
        real *P = scratch + (size_t)thread_number() * attention_room(T, D), *dS = P + QUERIES * ROW;
        real *queries = dS + QUERIES * ROW, *douts = queries + room, *queries_b = douts + room;
        real *douts_b = queries_b + QUERIES * packed_width(D), *keys = douts_b + QUERIES * packed_width(D);
        real *values = keys + packed_width(T) * (size_t)D, *keys_b = values + packed_width(T) * (size_t)D;
        pack_keys(keys, k, ld, T, D, 1, 1);
        pack_keys(values, v, ld, T, D, 1, 1);
        pack_keys(keys_b, k, ld, T, D, 0, scale);
        for (int t = 0; t < T; t++) {
            memset(dk + (size_t)t * ld, 0, (size_t)D * sizeof(real));
            memset(dv + (size_t)t * ld, 0, (size_t)D * sizeof(real));
        }
        for (int h = kv * (H / KV); h < (kv + 1) * (H / KV); h++) {
            for (int first = 0; first < T; first += QUERIES) {
                int rows = min_int(QUERIES, T - first);
                const real *q = qkv + base + (size_t)first * ld + (size_t)h * D;
                const real *o = out + ((size_t)b * T + first) * width + (size_t)h * D;
                const real *g = dout + ((size_t)b * T + first) * width + (size_t)h * D;
                real *dq = dqkv + base + (size_t)first * ld + (size_t)h * D, delta[QUERIES];
                pack_queries(queries, q, ld, rows, D, scale);
                pack_queries(douts, g, width, rows, D, 1);
                pack_keys(queries_b, q, ld, rows, D, 0, scale);
                pack_keys(douts_b, g, width, rows, D, 0, 1);
                for (int i = 0; i < rows; i++)
                    delta[i] = dot(g + (size_t)i * width, o + (size_t)i * width, D);
                for (int key = 0; key < first + rows; key += TILE_K) {
                    int n = min_int(TILE_K, T - key);
                    attention_scores(P, queries, keys + (size_t)key * (size_t)D, first, rows, key, n, D);
                    attention_scores(dS, douts, values + (size_t)key * (size_t)D, first, rows, key, n, D);
                    for (int i = 0; i < rows; i++) {
                        real *p = P + i * ROW, *ds = dS + i * ROW;
                        int seen = max_int(0, min_int(n, first + i + 1 - key)), end = min_int(n, first + rows - key);
                        row_exp(p, seen, end, lse[((size_t)b * H + h) * T + first + i]);
                        for (int j = 0; j < seen; j++)
                            ds[j] = p[j] * (ds[j] - delta[i]);
                        memset(ds + seen, 0, (size_t)(end - seen) * sizeof(real)); // the future
                    }
                    attention_give(dv + (size_t)key * ld, ld, P, douts_b, first, rows, key, n, D);
                    attention_give(dk + (size_t)key * ld, ld, dS, queries_b, first, rows, key, n, D);
                    attention_take(dq, ld, dS, keys_b + (size_t)key * packed_width(D), first, rows, key, n, D, key > 0);
                }
            }
        }
        ranks_tick();
    }
}
