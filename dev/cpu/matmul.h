// The matrix product, near the processor's limit: nine tenths of the training time go here.
// Gives: fast_matmul, fast_matmul_dx, fast_matmul_dw, fast_matmul_backward, fast_grouped_matmul, fast_grouped_matmul_dx,
// fast_grouped_matmul_dw, fast_begin_products, fast_end_products; and what attention takes from it: Operand, pack_a,
// pack_b, product_panel. Needs: dev/cpu/vector.h; dev/ranks/comm.h, because between two tasks it answers other
// processes (ranks_tick).
//
// Why are the lesson's three loops slow? A core can do dozens of multiply-adds in the time in which one
// number comes from far memory, and those loops load two numbers for each multiply-add. The remedy is that of
// Goto and van de Geijn 2008, Anatomy of High-Performance Matrix Multiplication. It has three parts, which
// stand below in this order:
//
// 1. The kernel keeps a tile of MR x NR results in registers and runs along k, the dimension that is summed.
//
//              NR columns of b
//              +--------+
//    MR rows   |  tile  |    For each k, it loads NV vectors of b and one number of each row of a, and
//    of a      |        |    adds their products to the tile: MR * NV multiply-adds for MR + NV loads.
//              +--------+
//
// 2. Packing. First, a block of a and a block of b are copied into the order in which the kernel will read
//    them. The blocks are so small that they stay in the caches, and each copied number is used many times.
//    The copying can transpose a matrix, and it can pick its rows by index. So one kernel serves x w^T, dout
//    w and dout^T x, and also the experts, whose rows are spread over the batch.
// 3. Tasks. The rows of all products are divided among the threads. Each result is summed by one thread in
//    one order, so the bits do not depend on the number of threads.
#pragma once
#include "vector.h"
#include "blocks.h"
#include "../precision.h"
#include "../ranks/comm.h"

// ---- sizes

#if defined(__AVX512F__) || defined(__aarch64__)
#define NV 4 // vectors in a row of the tile: these processors have 32 registers for vectors,
#else
#define NV 2 // and the others 16
#endif
#define MR     6            // rows of the tile
#define NR     (NV * LANES) // columns of the tile

// A block of a and a block of b fit into the second-level cache together, and MR rows of a into the first.
// ROW is not a power of two, because then all rows would have to share the same few lines of a cache.
#define TILE_M 48                           // rows of a that are packed at a time,
#define TILE_N ((int)(1024 / sizeof(real))) // columns of b,
#define TILE_K 256                          // and k
#define ROW    (TILE_K + 16)                // from one packed row of a to the next

// ---- products

// A matrix in memory: row r begins at p + index[r]*ld, or at p + r*ld where index is NULL. A product sums
// over k. Either k runs along each row, or each row belongs to one k. With x (N,I), w (O,I) and dout (N,O):
//   out (N,O) = x w^T      along_rows(x) times along_rows(w):           k runs along the rows of both
//   dx  (N,I) = dout w     along_rows(dout) times along_columns(w):     each row of w belongs to one k
//   dw  (O,I) = dout^T x   along_columns(dout) times along_columns(x):  each row of both belongs to one k
typedef struct Operand {
    const real *p;
    size_t ld;
    const int *index;
    int row_is_k;
} Operand;

// out (m,n), its rows ld apart, = or += a (m,k) times b (k,n)
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

// ---- 1. the kernel

// out (rows,cols) = or += a (rows,nk) times b (nk,width*LANES), for rows <= height and cols <= width*LANES.
// Number (i,k) of a is a[i*row + k*step]. The function is always inlined: then height, width and row are
// constants, the loops over them are unrolled, and all sums stay in registers.
static inline __attribute__((always_inline)) void kernel(int height, int width, int row, int step, real *out,
                                                         size_t ld, const real *a, const real *b, int nk,
                                                         int rows, int cols, int add) {
    // The tile begins at zero. The processor begins to fetch the results now, which are needed at the end.
    vec sum[2 * MR][NV], of_b[NV], zero = {0};
#pragma GCC unroll 16
    for (int i = 0; i < height; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) {
            sum[i][j] = zero;
            __builtin_prefetch(out + (size_t)(i < rows ? i : 0) * ld + (size_t)(j * LANES), 1);
        }
    }

    // For each k: a column of a times a row of b.
    for (int k = 0; k < nk; k++, a += step, b += width * LANES) {
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) {
            of_b[j] = *(const vec_in_memory *)(b + j * LANES);
        }
#pragma GCC unroll 16
        for (int i = 0; i < height; i++) {
#pragma GCC unroll 4
            for (int j = 0; j < width; j++) {
                sum[i][j] += a[i * row] * of_b[j];
            }
        }
    }

    // The tile goes into the result. At the result's border, where the tile is larger, it goes into `edge`
    // first, and from there as many numbers as there are into the result.
    real edge[2 * MR * NR];
    int fits = rows == height && cols == width * LANES;
#pragma GCC unroll 16
    for (int i = 0; i < height; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) {
            vec_in_memory *to = (vec_in_memory *)((fits ? out + (size_t)i * ld : edge + i * NR) + j * LANES);
            if (fits && add) {
                sum[i][j] += *to;
            }
            *to = sum[i][j];
        }
    }
    for (int i = 0; !fits && i < rows; i++) {
        for (int j = 0; j < cols; j++) {
            out[(size_t)i * ld + j] = edge[i * NR + j] + (add ? out[(size_t)i * ld + j] : 0);
        }
    }
}

// A panel is a strip of b that is packed for one tile: NR columns. The last panel has only NR/2 if they are
// enough; its tiles have twice as many rows, so that as many sums are under way.
int panel_width(int cols) {
    return cols <= NR / 2 ? NR / 2 : NR;
}

// out (rows,cols) = or += a packed block of a times a panel of b (nk,panel_width(cols)). Number (i,k) of a is
// a[i*ROW + k], or, where row_is_k, a[k*step + i]. The last tile is MR/2 or MR rows high if that is enough. A
// tile reads all its rows of a, so there must be rows in memory up to the next multiple of 2*MR, with any
// numbers in them.
void product_panel(real *out, size_t ld, const real *a, int row_is_k, int step, const real *b, int nk, int rows,
                   int cols, int add) {
    int high = panel_width(cols) == NR ? MR : 2 * MR;
    for (int left = rows; left > 0; left -= high, out += (size_t)high * ld, a += row_is_k ? high : high * ROW) {
        int n = min_int(left, high), low = n <= high / 2;
#define KERNEL(height, width)                                                                                  \
    do {                                                                                                       \
        if (row_is_k)                                                                                          \
            kernel(height, width, 1, step, out, ld, a, b, nk, n, cols, add);                                   \
        else                                                                                                   \
            kernel(height, width, ROW, 1, out, ld, a, b, nk, n, cols, add);                                    \
    } while (0)
        if (high == MR && !low) {
            KERNEL(MR, NV);
        } else if (high == MR) {
            KERNEL(MR / 2, NV);
        } else if (!low) {
            KERNEL(2 * MR, NV / 2);
        } else {
            KERNEL(MR, NV / 2);
        }
#undef KERNEL
    }
}

// ---- 2. packing

// Packs `rows` rows of a from `first` on, and nk of k from k0 on. Where k runs along the rows, packed rows
// stand ROW apart; else the packed numbers of one k stand together, and those of the next k TILE_M behind
// them. Behind the last row, up to the next multiple of 2*MR, are zeros.
void pack_a(real *packed, const Operand *o, int first, int rows, int k0, int nk) {
    int filled = div_up(rows, 2 * MR) * 2 * MR;
    for (int i = 0; !o->row_is_k && i < filled; i++) {
        if (i < rows) {
            memcpy(packed + i * ROW, operand_row(o, first + i) + k0, (size_t)nk * sizeof(real));
        } else {
            memset(packed + i * ROW, 0, (size_t)nk * sizeof(real));
        }
    }
    for (int k = 0; o->row_is_k && k < nk; k++) {
        const real *from = operand_row(o, k0 + k) + first;
        real *to = packed + k * TILE_M;
        if (rows == TILE_M) {
            memcpy(to, from, TILE_M * sizeof(real)); // of a constant size, which is faster
        } else {
            for (int i = 0; i < filled; i++) {
                to[i] = i < rows ? from[i] : 0;
            }
        }
    }
}

// A square of LANES x LANES numbers is transposed in registers. Zipping two vectors takes a number of the
// first, a number of the second, and so on: ZIP_LOW zips their lower lanes, ZIP_HIGH their upper lanes.
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

// to[k*width + i] = from[i][k], for LANES rows i, and for LANES numbers from k on. Write the position of a
// number in the square in binary, its row's bits first, then its column's. Zipping each row i with row i +
// LANES/2 rotates these bits by one. After log2(LANES) rotations the row's bits and the column's have changed
// sides, and so have rows and columns.
static inline void transpose_square(real *to, int width, const real *const *from, int k) {
#ifdef CAN_ZIP
    if (sizeof(real) == 4) {
        enum { SIDE = VECTOR_BYTES / 4 };
        typedef float floats __attribute__((vector_size(VECTOR_BYTES)));
        floats v[SIDE], z[SIDE];
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) {
            memcpy(&v[i], from[i] + k, sizeof(v[i]));
        }
#pragma GCC unroll 4
        for (int turn = 1; turn < SIDE; turn *= 2) {
#pragma GCC unroll 16
            for (int i = 0; i < SIDE / 2; i++) {
                z[2 * i] = ZIP_LOW(v[i], v[i + SIDE / 2]);
                z[2 * i + 1] = ZIP_HIGH(v[i], v[i + SIDE / 2]);
            }
#pragma GCC unroll 16
            for (int i = 0; i < SIDE; i++) {
                v[i] = z[i];
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) {
            memcpy(to + (k + i) * width, &v[i], sizeof(v[i]));
        }
        return;
    }
#endif
    for (int i = 0; i < LANES; i++) {
        for (int j = 0; j < LANES; j++) {
            to[(k + j) * width + i] = from[i][k + j];
        }
    }
}

// One panel, where each row of b belongs to one k: `used` columns from `first` on, then zeros.
void pack_rows_of_b(real *panel, const Operand *o, int first, int used, int k0, int nk) {
    int width = panel_width(used);
    for (int k = 0; k < nk; k++) {
        const real *from = operand_row(o, k0 + k) + first;
        if (used == NR) {
            memcpy(panel + k * NR, from, NR * sizeof(real));
        } else if (used == NR / 2) {
            memcpy(panel + k * NR / 2, from, NR / 2 * sizeof(real));
        } else {
            for (int i = 0; i < width; i++) {
                panel[k * width + i] = i < used ? from[i] : 0;
            }
        }
    }
}

// One panel, where k runs along the rows of b: they are transposed, LANES rows at a time.
void pack_columns_of_b(real *panel, const Operand *o, int first, int used, int k0, int nk) {
    int width = panel_width(used);
    for (int part = 0; part < width; part += LANES) {
        const real *from[LANES] = {NULL};
        int rows = max_int(0, min_int(LANES, used - part)), k = 0;
        real *to = panel + part;
        for (int i = 0; i < rows; i++) {
            from[i] = operand_row(o, first + part + i) + k0;
        }
        for (; rows == LANES && k + LANES <= nk; k += LANES) {
            transpose_square(to, width, from, k);
        }
        for (; k < nk; k++) {
            for (int i = 0; i < LANES; i++) {
                to[k * width + i] = i < rows ? from[i][k] : 0;
            }
        }
    }
}

// Packs cols columns of b from `first` on, and nk of k from k0 on: panel after panel, in each k after k.
void pack_b(real *packed, const Operand *o, int first, int cols, int k0, int nk) {
    for (int j = 0; j < cols; j += NR) {
        int used = min_int(NR, cols - j);
        if (o->row_is_k) {
            pack_rows_of_b(packed + j * nk, o, first + j, used, k0, nk);
        } else {
            pack_columns_of_b(packed + j * nk, o, first + j, used, k0, nk);
        }
    }
}

// ---- 3. tasks

// The two blocks that a thread packs are too large for the stack that some systems give it. They are made here
// once, for all threads and any later call, by the thread that begins the products.
#define PACKED_A (TILE_M * ROW)
#define PACKED_B (TILE_K * TILE_N)
real *packing_memory; // (threads, PACKED_A + PACKED_B), at a multiple of 64 bytes

size_t packing_bytes(void) {
    return (size_t)thread_count() * (PACKED_A + PACKED_B) * sizeof(real);
}

void reserve_packing(void) {
    static Arena arena;
    size_t bytes = packing_bytes();
    if (bytes > arena.size) {
        arena_reserve(&arena, bytes);
        arena_reset(&arena);
        packing_memory = (real *)arena_take(&arena, bytes, 1);
    }
}

void bf16_product_rows(const Product *p, int first, int rows, int add); // bf16.h: the same of rounded numbers
real bf16_dot(const real *a, const real *b, int n);

// Rows first .. first+rows of a product, by one thread. A block of b is packed once for all these rows.
void product_rows(const Product *p, int first, int rows, int add) {
    if (product_precision == PRODUCTS_BF16) {
        bf16_product_rows(p, first, rows, add);
        return;
    }
    real *a = packing_memory + (size_t)thread_number() * (PACKED_A + PACKED_B), *b = a + PACKED_A;
    for (int j0 = 0; j0 < p->n; j0 += TILE_N) {
        int cols = min_int(TILE_N, p->n - j0);
        for (int k0 = 0; k0 < max_int(p->k, 1); k0 += TILE_K) { // once even for k = 0, whose sum is 0
            int nk = min_int(TILE_K, p->k - k0);
            pack_b(b, &p->b, j0, cols, k0, nk);
            for (int i0 = first; i0 < first + rows; i0 += TILE_M) {
                int height = min_int(TILE_M, first + rows - i0);
                pack_a(a, &p->a, i0, height, k0, nk);
                for (int j = 0; j < cols; j += NR) {
                    product_panel(p->out + (size_t)i0 * p->ld + (size_t)(j0 + j), p->ld, a, p->a.row_is_k,
                                  TILE_M, b + j * nk, nk, height, min_int(NR, cols - j), add || k0 > 0);
                }
            }
        }
    }
}

// One or two rows x, mostly those of generation, do not repay the packing of w: each result is a plain dot
// product.
int few_rows(const Product *p) {
    return p->m <= 2 && !p->a.row_is_k && !p->b.row_is_k;
}

// Columns first .. first+cols of such a product.
void product_of_few_rows(const Product *p, int first, int cols, int add) {
    for (int i = 0; i < p->m; i++) {
        for (int j = first; j < first + cols; j++) {
            const real *a = operand_row(&p->a, i), *b = operand_row(&p->b, j);
            real total = product_precision == PRODUCTS_BF16 ? bf16_dot(a, b, p->k) : dot(a, b, p->k);
            real *out = p->out + (size_t)i * p->ld + (size_t)j;
            *out = add ? *out + total : total;
        }
    }
}

// Few results a row, such as a router's, would fill a small part of a panel: a vector holds them all. For these, a is
// read as it is, and only b is packed: a vector for each k.
int few_columns(const Product *p) {
    return p->n <= LANES && product_precision == PRODUCTS_FP32 && !p->a.row_is_k && !p->b.row_is_k && p->k * LANES <= PACKED_B;
}

// Rows first .. first+rows of such a product. The sums of eight rows are under way at the same time.
void product_of_few_columns(const Product *p, int first, int rows, int add) {
    enum { ROWS = 8 };
    real *b = packing_memory + (size_t)thread_number() * (PACKED_A + PACKED_B) + PACKED_A;
    for (int j = 0; j < LANES; j++) {
        const real *from = j < p->n ? operand_row(&p->b, j) : NULL;
        for (int k = 0; k < p->k; k++) {
            b[k * LANES + j] = from ? from[k] : 0;
        }
    }
    for (int i0 = first; i0 < first + rows; i0 += ROWS) {
        const real *a[ROWS];
        vec sum[ROWS] = {{0}};
        for (int i = 0; i < ROWS; i++) {
            a[i] = operand_row(&p->a, min_int(i0 + i, first + rows - 1));
        }
        for (int k = 0; k < p->k; k++) {
            vec of_b = *(const vec_in_memory *)(b + k * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) {
                sum[i] += a[i][k] * of_b;
            }
        }
        for (int i = 0; i < min_int(ROWS, first + rows - i0); i++) {
            real *out = p->out + (size_t)(i0 + i) * p->ld;
            for (int j = 0; j < p->n; j++) {
                out[j] = sum[i][j] + (add ? out[j] : 0);
            }
        }
    }
}

// Products that will be done: each alone, or those between begin_products() and end_products() together.
struct {
    Product *list;
    char *add;           // of each: 1 to add to what is there
    int count, most;
    int together;        // calls of begin_products() that have not met their end_products()
} planned;

// All planned products, by all threads. There are about four tasks of equal work for each thread: with
// fewer tasks one thread would wait for another, and with more b would be packed too often. Most experts are
// one task each.
void do_products(void) {
    typedef struct Task {
        const Product *p;
        int first, count; // rows; of a product of few rows: columns
        int add;
    } Task;
    const Product *list = planned.list;
    int count = planned.count;
    double work = 0;
    for (int i = 0; i < count; i++) {
        work += (double)list[i].m * list[i].n * list[i].k;
    }

    // Divide each product by its share of the work, and so that tiles are full.
    Task *task = NULL;
    int tasks = 0, most = 0;
    for (int i = 0; i < count; i++) {
        const Product *p = &list[i];
        int few = few_rows(p), total = few ? p->n : p->m, unit = few ? NR : 2 * MR;
        double share = (double)p->m * p->n * p->k / (work + 1) * 4 * thread_count();
        int pieces = max_int((int)(share + 0.5), 1 + total / 1024);
        int step = div_up(div_up(total, pieces), unit) * unit;
        for (int first = 0; first < total; first += step) {
            if (tasks == most) {
                most = 2 * most + 64;
                task = (Task *)reallocate(task, (size_t)most, sizeof(Task));
            }
            Task t = {p, first, min_int(step, total - first), planned.add[i]};
            task[tasks++] = t;
        }
    }

    reserve_packing();
#pragma omp parallel for schedule(dynamic) if (work > 20000)
    for (int t = 0; t < tasks; t++) {
        if (few_rows(task[t].p)) {
            product_of_few_rows(task[t].p, task[t].first, task[t].count, task[t].add);
        } else if (few_columns(task[t].p)) {
            product_of_few_columns(task[t].p, task[t].first, task[t].count, task[t].add);
        } else {
            product_rows(task[t].p, task[t].first, task[t].count, task[t].add);
        }
        ranks_tick();
    }
    free(task);
    planned.count = 0;
}

// Does all products of the list, or plans them for end_products().
void products(const Product *list, int count, int add) {
    if (planned.count + count > planned.most) {
        planned.most = 2 * (planned.count + count);
        planned.list = (Product *)reallocate(planned.list, (size_t)planned.most, sizeof(Product));
        planned.add = (char *)reallocate(planned.add, (size_t)planned.most, 1);
    }
    for (int i = 0; i < count; i++) {
        planned.list[planned.count] = list[i];
        planned.add[planned.count++] = (char)add;
    }
    if (!planned.together) {
        do_products();
    }
}

// A pair of these may stand between another one; then the outer one counts.
void fast_begin_products(void) {
    planned.together++;
}

void fast_end_products(void) {
    if (planned.together == 0) {
        fail("end_products() without begin_products()");
    }
    planned.together--;
    if (!planned.together) {
        do_products();
    }
}

// ---- the lesson's functions

void product(real *out, Operand a, Operand b, int m, int n, int k, int add) {
    Product p = {out, (size_t)n, a, b, m, n, k};
    products(&p, 1, add);
}

// out (N,O) = or += x (N,I) times w (O,I) transposed
void fast_matmul(real *out, const real *x, const real *w, int N, int I, int O, int add) {
    if (in_blocks(w)) {
        blocks_matmul(out, x, w, N, I, O, add);
        return;
    }
    product(out, along_rows(x, I, NULL), along_rows(w, I, NULL), N, O, I, add);
}

// dx (N,I) = or += dout (N,O) times w (O,I)
void fast_matmul_dx(real *dx, const real *dout, const real *w, int N, int I, int O, int add) {
    product(dx, along_rows(dout, O, NULL), along_columns(w, I, NULL), N, I, O, add);
}

// dw (O,I) += dout (N,O) transposed times x (N,I)
void fast_matmul_dw(real *dw, const real *dout, const real *x, int N, int I, int O) {
    product(dw, along_columns(dout, O, NULL), along_columns(x, I, NULL), O, I, N, 1);
}

// Both of these gradients, so that the threads wait for each other only once.
void fast_matmul_backward(real *dx, real *dw, const real *dout, const real *x, const real *w, int N, int I, int O,
                          int add) {
    fast_begin_products();
    fast_matmul_dx(dx, dout, w, N, I, O, add);
    fast_matmul_dw(dw, dout, x, N, I, O);
    fast_end_products();
}

// The operand that has one expert's rows in *x, which is `width` wide: by token, or, in a sorted array, the
// next rows. There *x moves on to the rows of the next expert.
Operand expert_rows(const real **x, const int *token, const int *offset, int width) {
    Operand o = along_rows(*x, width, token ? token + offset[0] : NULL);
    *x += token ? 0 : (size_t)(offset[1] - offset[0]) * width;
    return o;
}

// out (rows,O) = each row of x (.., I) times its expert's w (O,I) transposed
void fast_grouped_matmul(real *out, const real *x, const int *token, const real *w, const int *offset, int E,
                         const int *I, const int *O) {
    if (in_blocks(w)) {
        blocks_grouped_matmul(out, x, token, w, offset, E, I, O);
        return;
    }
    Product *list = (Product *)allocate(E, sizeof(Product));
    for (int e = 0; e < E; e++) {
        int rows = offset[e + 1] - offset[e];
        Operand a = expert_rows(&x, token, offset + e, I[e]), b = along_rows(w, I[e], NULL);
        Product p = {out, (size_t)O[e], a, b, rows, O[e], I[e]};
        list[e] = p;
        out += (size_t)rows * O[e];
        w += (size_t)O[e] * I[e];
    }
    products(list, E, 0);
    free(list);
}

// dx (rows,I) = each row of dout (.., O) times its expert's w (O,I)
void fast_grouped_matmul_dx(real *dx, const real *dout, const int *token, const real *w, const int *offset,
                            int E, const int *I, const int *O) {
    Product *list = (Product *)allocate(E, sizeof(Product));
    for (int e = 0; e < E; e++) {
        int rows = offset[e + 1] - offset[e];
        Operand a = expert_rows(&dout, token, offset + e, O[e]), b = along_columns(w, I[e], NULL);
        Product p = {dx, (size_t)I[e], a, b, rows, I[e], O[e]};
        list[e] = p;
        dx += (size_t)rows * I[e];
        w += (size_t)O[e] * I[e];
    }
    products(list, E, 0);
    free(list);
}

// Each expert's dw (O,I) += its rows of dout (.., O) transposed times its rows of x (.., I)
void fast_grouped_matmul_dw(real *dw, const real *dout, const int *dout_token, const real *x,
                            const int *x_token, const int *offset, int E, const int *I, const int *O) {
    Product *list = (Product *)allocate(E, sizeof(Product));
    for (int e = 0; e < E; e++) {
        Operand a = expert_rows(&dout, dout_token, offset + e, O[e]),
                b = expert_rows(&x, x_token, offset + e, I[e]);
        a.row_is_k = b.row_is_k = 1;
        Product p = {dw, (size_t)I[e], a, b, O[e], I[e], offset[e + 1] - offset[e]};
        list[e] = p;
        dw += (size_t)O[e] * I[e];
    }
    products(list, E, 1);
    free(list);
}
