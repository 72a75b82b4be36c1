// Low-rank pairs beside frozen matrices (--lora): a model that exists learns a text with a few weights of its own.
// Gives: Pair, pair_of, register_pair, forget_pairs, and under their own names the products of train_moe.c, which from here
// on look whether a pair stands beside their matrix. Needs: chapters 1 and 2 of train_moe.c, which includes it; lora_rows.h.
//
// A frozen matrix W (O,I) gets two narrow ones, A (r,I) and B (O,r), and the layer computes
//     y = W x + (alpha/r) B A x
// Only A and B are trained (Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, section 4.1). The pair is
// as good as a matrix W' = W + s B A with s = alpha/r. So whatever a layer does with W, it does with W' if its three products do:
//     y  = x W'^T       = x W^T  + s (x A^T) B^T
//     dx = dout W'      = dout W + s (dout B) A
//     dA = s (dout B)^T x        dB = s dout^T (x A^T)        since dW' = dout^T x is never made
// The layers do not know of pairs. A product finds the pair by the address of its matrix, and the product of a gradient
// by the address where that gradient would be: for a frozen matrix that is the address of dA (dev/lora_tensors.h). Where a
// frozen matrix has no pair the address is NULL, and nothing is computed.
//
// A matrix that is several in the files of other programs, as q, k and v, has a pair for each of them. A has the rows of all
// of them, blocks * r; B has the block of each in rows of its own, and between the blocks it is 0 (wide_b).
#ifdef CONFIG_FIELDS
    int lora;                 // rank r of the pairs; 0: there are none, and all weights are trained
    double lora_alpha;
    const char *lora_targets; // words of lora_target_names, with commas between them
    const char *merge;        // --merge: the directory that the whole model goes to
#elif !defined(LORA_H)
#define LORA_H

typedef struct Pair {
    const Model *owner;
    const real *w;            // the frozen matrix (E,O,I); E is 1 where it is none of experts
    const real *key;          // where its gradient would be
    const real *a, *b;        // (E,R,I) with R = blocks * rank; (E,O,rank)
    real *da, *db;            // NULL: the model is not trained
    int E, O, I, rank;
    int blocks, rows[3];      // rows of each block, together O
    real scale;               // alpha / rank
} Pair;

// The pairs of all models that are in memory, and memory that their products share.
struct {
    Pair *list;
    int count;
    real *memory[4];
    size_t size[4];
} pairs;

void register_pair(const Pair *pair) {
    pairs.list = (Pair *)reallocate(pairs.list, (size_t)pairs.count + 1, sizeof(Pair));
    pairs.list[pairs.count++] = *pair;
}

void forget_pairs(const Model *owner) {
    int kept = 0;
    for (int i = 0; i < pairs.count; i++) {
        if (pairs.list[i].owner != owner) {
            pairs.list[kept++] = pairs.list[i];
        }
    }
    pairs.count = kept;
}

// The pair beside the matrix w, NULL where there is none.
const Pair *pair_of(const real *w) {
    for (int i = 0; i < pairs.count; i++) {
        if (pairs.list[i].w == w) {
            return &pairs.list[i];
        }
    }
    return NULL;
}

// The pair whose matrix would have its gradient at dw, NULL where there is none.
const Pair *pair_of_gradient(const real *dw) {
    for (int i = 0; i < pairs.count; i++) {
        if (dw && pairs.list[i].key == dw) {
            return &pairs.list[i];
        }
    }
    return NULL;
}

// ---- what one product needs while it works

enum { INNER, WIDE, WIDE_GRADIENT, OUTER }; // which piece of the shared memory

real *pair_memory(int which, size_t n) {
    if (n > pairs.size[which]) {
        free(pairs.memory[which]);
        pairs.memory[which] = allocate_reals(n);
        pairs.size[which] = n;
    }
    return pairs.memory[which];
}

// x (n) *= scale
void scale_numbers(real *x, size_t n, real scale) {
#pragma omp parallel for if (n > 65536)
    for (size_t i = 0; i < n; i++) {
        x[i] *= scale;
    }
}

// B as one matrix (O, blocks * rank): the block of each row stands in the columns of its block of A, and the rest is 0.
const real *wide_b(const Pair *p) {
    int R = p->blocks * p->rank, o = 0;
    if (p->blocks == 1) {
        return p->b;
    }
    real *wide = pair_memory(WIDE, (size_t)p->O * R);
    memset(wide, 0, (size_t)p->O * R * sizeof(real));
    for (int block = 0; block < p->blocks; block++) {
        for (int end = o + p->rows[block]; o < end; o++) {
            memcpy(wide + (size_t)o * R + block * p->rank, p->b + (size_t)o * p->rank, (size_t)p->rank * sizeof(real));
        }
    }
    return wide;
}

// db (O,rank) += the blocks of the wide gradient (O, blocks * rank)
void add_blocks(const Pair *p, const real *wide) {
    int R = p->blocks * p->rank, o = 0;
    for (int block = 0; block < p->blocks; block++) {
        for (int end = o + p->rows[block]; o < end; o++) {
            for (int j = 0; j < p->rank; j++) {
                p->db[(size_t)o * p->rank + j] += wide[(size_t)o * R + block * p->rank + j];
            }
        }
    }
}

// s x A^T (N,R), in shared memory
real *inner_of_x(const Pair *p, const real *x, int N) {
    int R = p->blocks * p->rank;
    real *inner = pair_memory(INNER, (size_t)N * R);
    matmul(inner, x, p->a, N, p->I, R, SET);
    scale_numbers(inner, (size_t)N * R, p->scale);
    return inner;
}

// s dout B (N,R), in shared memory
real *inner_of_dout(const Pair *p, const real *dout, int N) {
    int R = p->blocks * p->rank;
    real *inner = pair_memory(INNER, (size_t)N * R);
    matmul_dx(inner, dout, wide_b(p), N, R, p->O, SET);
    scale_numbers(inner, (size_t)N * R, p->scale);
    return inner;
}

// ---- the products, with the arguments of those of train_moe.c

void paired_matmul(real *out, const real *x, const real *w, int N, int I, int O, int add) {
    const Pair *p = pair_of(w);
    matmul(out, x, w, N, I, O, add);
    if (p) {
        matmul(out, inner_of_x(p, x, N), wide_b(p), N, p->blocks * p->rank, O, ADD);
    }
}

void paired_matmul_dx(real *dx, const real *dout, const real *w, int N, int I, int O, int add) {
    const Pair *p = pair_of(w);
    matmul_dx(dx, dout, w, N, I, O, add);
    if (p) {
        matmul_dx(dx, inner_of_dout(p, dout, N), p->a, N, I, p->blocks * p->rank, ADD);
    }
}

// dw NULL: a frozen matrix without a pair.
void paired_matmul_dw(real *dw, const real *dout, const real *x, int N, int I, int O) {
    const Pair *p = pair_of_gradient(dw);
    if (!p) {
        if (dw) {
            matmul_dw(dw, dout, x, N, I, O);
        }
        return;
    }
    int R = p->blocks * p->rank;
    real *db = p->blocks == 1 ? p->db : pair_memory(WIDE_GRADIENT, (size_t)O * R);
    if (p->blocks > 1) {
        memset(db, 0, (size_t)O * R * sizeof(real));
    }
    matmul_dw(db, dout, inner_of_x(p, x, N), N, R, O);
    if (p->blocks > 1) {
        add_blocks(p, db);
    }
    matmul_dw(p->da, inner_of_dout(p, dout, N), x, N, I, R);
}

void paired_matmul_backward(real *dx, real *dw, const real *dout, const real *x, const real *w, int N, int I, int O,
                            int add) {
    if (dw && !pair_of_gradient(dw)) {
        matmul_backward(dx, dw, dout, x, w, N, I, O, add);
        return;
    }
    paired_matmul_dx(dx, dout, w, N, I, O, add);
    paired_matmul_dw(dw, dout, x, N, I, O);
}

// Products of pairs need each other's results, so while there are pairs, each product is done when it is asked for.
void paired_begin_products(void) {
    if (!pairs.count) {
        begin_products();
    }
}

void paired_end_products(void) {
    if (!pairs.count) {
        end_products();
    }
}

#include "lora_rows.h" // the same for the experts' grouped products

#undef matmul
#undef matmul_dx
#undef matmul_dw
#undef matmul_backward
#undef grouped_matmul
#undef grouped_matmul_dx
#undef grouped_matmul_dw
#undef begin_products
#undef end_products
#define matmul            paired_matmul
#define matmul_dx         paired_matmul_dx
#define matmul_dw         paired_matmul_dw
#define matmul_backward   paired_matmul_backward
#define grouped_matmul    paired_grouped_matmul
#define grouped_matmul_dx paired_grouped_matmul_dx
#define grouped_matmul_dw paired_grouped_matmul_dw
#define begin_products    paired_begin_products
#define end_products      paired_end_products

#endif
