// The matrix product, near the processor's limit.
// Gives: product, products, and the pieces of it that attention uses. Needs: dev/cpu/vector.h, dev/ranks/comm.h (ticks).
//
// Nine tenths of the time goes here, so this is the one routine written for speed; everything else calls it. The idea
// (Goto and van de Geijn 2008): a core can do dozens of multiply-adds in the time of one load from far memory, so both
// operands are copied ("packed"), a block at a time, into the order in which they will be read, and a kernel keeps a
// tile of MR x NR results in registers while it runs along the summed dimension k.
//
//              NR columns of b
//              +--------+
//    MR rows   |  tile  |    For each k, NV vectors of b are loaded, one number of each row of a is multiplied
//    of a      |        |    with all of them and added to the row's sums: MR*NV multiply-adds for MR + NV loads.
//              +--------+
//
// Packing is also where transposition and gathering happen, hence one routine serves the forward pass (x W^T), both
// backward passes (dout W and dout^T x), and the experts, whose rows are picked out of the batch by index.
// Each result is summed by one thread in one order, so the bits do not depend on the number of threads.

#pragma once
#include "vector.h"
#include "../ranks/comm.h"

#if defined(__AVX512F__) || defined(__aarch64__) // 32 vector registers
#define NV 4
#else // 16
#define NV 2
#endif
#define MR     6
#define NR     (NV * LANES)
#define TILE_M 48  // rows of a packed at a time,
#define TILE_N ((int)(1024 / sizeof(real))) // columns of b,
#define TILE_K 256 // and k: both blocks stay in the second-level cache, MR rows of a in the first
#define ROW    (TILE_K + 16) // from one packed row of a to the next; no power of two, so that they share the cache

// A matrix in memory: row r starts at p + index[r]*ld, or at p + r*ld where index is NULL. A product sums over k; either
// k runs along a row, or each row belongs to one k. So with x (N,C), W (F,C) and dout (N,F):
//   out  (N,F) = x W^T       along_rows(x) times along_rows(W):          k is C, and runs along the rows of both
//   dx   (N,C) = dout W      along_rows(dout) times along_columns(W):    k is F, and each row of W belongs to one k
//   dW   (F,C) = dout^T x    along_columns(dout) times along_columns(x): k is N
typedef struct Operand {
    const real *p;
    size_t ld;
    const int *index;
    int row_is_k;
} Operand;

// out (m,n), its rows ld apart = a (m,k) times b (k,n)
typedef struct Product {
    real *out;
    size_t ld;
    Operand a, b;
    int m, n, k;
} Product;

Operand along_rows(const real *p, size_t ld, const int *index) {
    Operand o = {p, ld, index, 0};
    return o;
}

Operand along_columns(const real *p, size_t ld, const int *index) {
    Operand o = {p, ld, index, 1};
    return o;
}

const real *operand_row(const Operand *o, int r) {
    return o->p + (size_t)(o->index ? o->index[r] : r) * o->ld;
}

// out (rows,cols), of at most height x width*LANES, = or += a (rows,nk) times b (nk,width*LANES). Number (i,k) of a is
// a[i*row + k*step]. Inline, so that the compiler knows height, width and row, keeps all sums in registers and unrolls
// the loops over them.
static inline __attribute__((always_inline)) void kernel(int height, int width, int row, int step, real *out, size_t ld,
                                                         const real *a, const real *b, int nk, int rows, int cols,
                                                         int accumulate) {
    vec sum[2 * MR][NV], of_b[NV], zero = {0};
#pragma GCC unroll 16
    for (int i = 0; i < height; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) {
            sum[i][j] = zero;
            __builtin_prefetch(out + (size_t)(i < rows ? i : 0) * ld + (size_t)(j * LANES), 1);
        }
    }
    for (int k = 0; k < nk; k++, a += step, b += width * LANES) {
#pragma GCC unroll 4
        for (int j = 0; j < width; j++)
            of_b[j] = *(const vec_in_memory *)(b + j * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < height; i++) {
#pragma GCC unroll 4
            for (int j = 0; j < width; j++)
                sum[i][j] += a[i * row] * of_b[j];
        }
    }
    real edge[2 * MR * NR]; // where the tile sticks out of the result, it is written here first
    int whole = rows == height && cols == width * LANES;
#pragma GCC unroll 16
    for (int i = 0; i < height; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) {
            vec_in_memory *to = (vec_in_memory *)((whole ? out + (size_t)i * ld : edge + i * NR) + j * LANES);
            if (whole && accumulate)
                sum[i][j] += *to;
            *to = sum[i][j];
        }
    }
    for (int i = 0; !whole && i < rows; i++) {
        for (int j = 0; j < cols; j++)
            out[(size_t)i * ld + j] = edge[i * NR + j] + (accumulate ? out[(size_t)i * ld + j] : 0);
    }
}

// A panel of b is NR wide; the last one only NR/2 if that is enough, and then a tile has twice as many rows.
int panel_width(int cols) {
    return cols <= NR / 2 ? NR / 2 : NR;
}

// out (rows,cols) = or += a block of a times a panel of b (nk,panel_width(cols)). Number (i,k) of a is a[i*ROW + k]
// (row_is_k 0; step is not used) or a[k*step + i] (row_is_k 1). The last rows take a kernel of half the height if that
// is enough, so a must hold rows up to the next multiple of 2*MR, whatever is in them.
void product_panel(real *out, size_t ld, const real *a, int row_is_k, int step, const real *b, int nk, int rows,
                   int cols, int accumulate) {
    int high = panel_width(cols) == NR ? MR : 2 * MR;
    for (int left = rows; left > 0; left -= high, out += (size_t)high * ld, a += row_is_k ? high : high * ROW) {
        int n = min_int(left, high), half = n <= high / 2;
#define KERNEL(height, width)                                                                   \
    do {                                                                                        \
        if (row_is_k)                                                                           \
            kernel(height, width, 1, step, out, ld, a, b, nk, n, cols, accumulate);             \
        else                                                                                    \
            kernel(height, width, ROW, 1, out, ld, a, b, nk, n, cols, accumulate);              \
    } while (0)
        if (high == MR && !half)
            KERNEL(MR, NV);
        else if (high == MR)
            KERNEL(MR / 2, NV);
        else if (!half)
            KERNEL(2 * MR, NV / 2);
        else
            KERNEL(MR, NV / 2);
#undef KERNEL
    }
}

// Packs rows first... of a, and k0...: rows ROW apart, or k TILE_M apart. What lies beyond is zero.
void pack_a(real *packed, const Operand *o, int first, int rows, int k0, int nk) {
    int filled = div_up(rows, 2 * MR) * 2 * MR; // as many as a kernel may read
    for (int i = 0; !o->row_is_k && i < filled; i++) {
        if (i < rows)
            memcpy(packed + i * ROW, operand_row(o, first + i) + k0, (size_t)nk * sizeof(real));
        else
            memset(packed + i * ROW, 0, (size_t)nk * sizeof(real));
    }
    for (int k = 0; o->row_is_k && k < nk; k++) {
        const real *from = operand_row(o, k0 + k) + first;
        real *to = packed + k * TILE_M;
        if (rows == TILE_M)
            memcpy(to, from, TILE_M * sizeof(real));
        else
            for (int i = 0; i < filled; i++)
                to[i] = i < rows ? from[i] : 0;
    }
}

// to[k*width + i] = from[i][k] for LANES rows and LANES k. Write the number of a place as the bits of its row, then those
// of its column. Zipping rows i and i + LANES/2 (an element of one, then of the other) rotates these bits by one; after
// log2(LANES) rotations rows and columns have changed places.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define CAN_ZIP
#endif
#endif
#if defined(CAN_ZIP) && VECTOR_BYTES == 64
#define ZIP_LOW(a, b)  __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif defined(CAN_ZIP) && VECTOR_BYTES == 32
#define ZIP_LOW(a, b)  __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#elif defined(CAN_ZIP)
#define ZIP_LOW(a, b)  __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif
static inline void transpose_square(real *to, int width, const real *const *from, int k) {
#ifdef CAN_ZIP
    if (sizeof(real) == 4) {
        enum { SIDE = VECTOR_BYTES / 4 };
        typedef float floats __attribute__((vector_size(VECTOR_BYTES)));
        floats v[SIDE], z[SIDE];
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++)
            memcpy(&v[i], from[i] + k, sizeof(v[i]));
#pragma GCC unroll 4
        for (int turn = 1; turn < SIDE; turn *= 2) {
#pragma GCC unroll 16
            for (int i = 0; i < SIDE / 2; i++) {
                z[2 * i] = ZIP_LOW(v[i], v[i + SIDE / 2]);
                z[2 * i + 1] = ZIP_HIGH(v[i], v[i + SIDE / 2]);
            }
#pragma GCC unroll 16
            for (int i = 0; i < SIDE; i++)
                v[i] = z[i];
        }
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++)
            memcpy(to + (k + i) * width, &v[i], sizeof(v[i]));
        return;
    }
#endif
    for (int i = 0; i < LANES; i++) {
        for (int j = 0; j < LANES; j++)
            to[(k + j) * width + i] = from[i][k + j];
    }
}

// Packs columns first... of b, cols of them, and k0...: panel after panel. What lies beyond is zero.
void pack_b(real *packed, const Operand *o, int first, int cols, int k0, int nk) {
    for (int j = 0; j < cols; j += NR) {
        int used = min_int(NR, cols - j), width = panel_width(used);
        real *panel = packed + j * nk;
        for (int k = 0; o->row_is_k && k < nk; k++) {
            const real *from = operand_row(o, k0 + k) + first + j;
            if (used == NR)
                memcpy(panel + k * NR, from, NR * sizeof(real));
            else if (used == NR / 2)
                memcpy(panel + k * NR / 2, from, NR / 2 * sizeof(real));
            else
                for (int i = 0; i < width; i++)
                    panel[k * width + i] = i < used ? from[i] : 0;
        }
        for (int part = 0; !o->row_is_k && part < width; part += LANES) {
            const real *from[LANES];
            int rows = max_int(0, min_int(LANES, used - part)), k = 0;
            real *to = panel + part;
            for (int i = 0; i < rows; i++)
                from[i] = operand_row(o, first + j + part + i) + k0;
            for (; rows == LANES && k + LANES <= nk; k += LANES)
                transpose_square(to, width, from, k);
            for (; k < nk; k++) {
                for (int i = 0; i < LANES; i++)
                    to[k * width + i] = i < rows ? from[i][k] : 0;
            }
        }
    }
}

// A task: rows first... of a product, by one thread.
void product_rows(const Product *p, int first, int rows, int accumulate) {
    real a[TILE_M * ROW] __attribute__((aligned(64))), b[TILE_K * TILE_N] __attribute__((aligned(64)));
    for (int j0 = 0; j0 < p->n; j0 += TILE_N) {
        int cols = min_int(TILE_N, p->n - j0);
        for (int k0 = 0; k0 < max_int(p->k, 1); k0 += TILE_K) {
            int nk = min_int(TILE_K, p->k - k0);
            pack_b(b, &p->b, j0, cols, k0, nk);
            for (int i0 = first; i0 < first + rows; i0 += TILE_M) {
                int height = min_int(TILE_M, first + rows - i0);
                pack_a(a, &p->a, i0, height, k0, nk);
                for (int j = 0; j < cols; j += NR)
                    product_panel(p->out + (size_t)i0 * p->ld + (size_t)(j0 + j), p->ld, a, p->a.row_is_k, TILE_M,
                                  b + j * nk, nk, height, min_int(NR, cols - j), accumulate || k0 > 0);
            }
        }
    }
}

// One or two rows (generation, mostly) are not worth packing W for: their results are plain dot products.
int few_rows(const Product *p) {
    return p->m <= 2 && !p->a.row_is_k && !p->b.row_is_k;
}

void product_of_few_rows(const Product *p, int first, int cols, int accumulate) {
    for (int i = 0; i < p->m; i++) {
        for (int j = first; j < first + cols; j++) {
            real total = dot(operand_row(&p->a, i), operand_row(&p->b, j), p->k);
            real *out = p->out + (size_t)i * p->ld + (size_t)j;
            *out = accumulate ? *out + total : total;
        }
    }
}

// All products of the list, by all threads: four tasks a thread of about equal work. Fewer would let one thread wait for
// another, more would pack b too often; the experts of a layer are mostly a task each.
void products(const Product *list, int count, int accumulate) {
    typedef struct Task {
        const Product *p;
        int first, count; // rows; of few rows: columns
    } Task;
    double work = 0;
    int tasks = 0, most = 0;
    for (int i = 0; i < count; i++)
        work += (double)list[i].m * list[i].n * list[i].k;
    Task *task = NULL;
    for (int i = 0; i < count; i++) {
        const Product *p = &list[i];
        int few = few_rows(p), total = few ? p->n : p->m, unit = few ? NR : 2 * MR;
        double share = (double)p->m * p->n * p->k / (work + 1) * 4 * thread_count();
        int pieces = max_int((int)(share + 0.5), 1 + total / 1024), step = div_up(div_up(total, pieces), unit) * unit;
        for (int first = 0; first < total; first += step) {
            if (tasks == most)
                task = (Task *)reallocate(task, (size_t)(most = 2 * most + 64), sizeof(Task));
            Task t = {p, first, min_int(step, total - first)};
            task[tasks++] = t;
        }
    }
#pragma omp parallel for schedule(dynamic) if (work > 20000)
    for (int t = 0; t < tasks; t++) {
        if (few_rows(task[t].p))
            product_of_few_rows(task[t].p, task[t].first, task[t].count, accumulate);
        else
            product_rows(task[t].p, task[t].first, task[t].count, accumulate);
        ranks_tick();
    }
    free(task);
}

// out (m,n) = or += a times b
void product(real *out, Operand a, Operand b, int m, int n, int k, int accumulate) {
    Product p = {out, (size_t)n, a, b, m, n, k};
    products(&p, 1, accumulate);
}
