// The LSTM's loops over time, near the processor's limit.
// Gives: fast_lstm_recur for lstm_recur, fast_lstm_recur_backward for lstm_recur_backward, vec_tanh, vec_sigmoid, Meeting, meet.
// Needs: the plain loops of dev/mixers/lstm.h, which includes it; dev/cpu/matmul.h (transpose_square), dev/cpu/bf16.h.
//
// The formulas and the shapes are explained in dev/mixers/lstm.h. A step multiplies few rows, one for each sequence, by the
// whole matrix W_state. What is different from the plain loops:
//
// - The matrix is packed once for all steps, in panels of four vectors. Forward, the four vectors of a panel are z_0, z_1, z_2
//   and z_3 of LANES units: so the kernel has all four gates of these units in registers, and goes on to c and h at once.
// - A thread owns some of the sequences. They need nothing from the others, so no thread waits for another one in all T steps.
// - Where there are fewer sequences than threads, a team of threads owns a sequence together, and each of them has a part of
//   the units, with that part of the matrix. Then the team meets in each step, since every unit needs all of r. (Such teams
//   were tried for large matrices, too, where each thread would have a part in its cache. But where other programs share the
//   processor, the meetings cost far more than that: a team waits for whichever of its threads does not run just then.)
// - Each result is one sum in one order, whatever the tile's height. So the bits depend neither on the threads nor on B.
#pragma once
#include "matmul.h"
#include "bf16.h"
#include <sched.h>

enum { QUAD = 4 };                                     // vectors in a row of a panel
#define LSTM_WIDTH (QUAD * LANES)                      // numbers in it
#define LSTM_HIGH  (NV == 4 ? 8 : 4)                   // most rows of a tile
#define LSTM_AHEAD 16                                  // rows of a panel between what is multiplied and what is fetched

// ---- functions

// tanh(x) in every lane, to 4 units in the last digit. In double, the C library does it.
static inline vec vec_tanh(vec x) {
    if (sizeof(real) == 8) {
        for (int i = 0; i < LANES; i++) {
            x[i] = (real)tanh((double)x[i]);
        }
        return x;
    }
    typedef uint32_t bits __attribute__((vector_size(VECTOR_BYTES)));
    typedef float floats __attribute__((vector_size(VECTOR_BYTES)));
    floats v;
    memcpy(&v, &x, sizeof(v));

    // From 9.1 on, tanh is 1 in a float. A NaN stays a NaN.
    floats least = {0}, most = {0};
    least -= 18.2f;
    most += 18.2f;
    v += v;
    v = CHOOSE(v < least, least, v);
    v = CHOOSE(v > most, most, v);

    // As in vec_exp, 2x = n ln 2 + r. But here it is e^2x - 1 that keeps all its digits: tanh(x) = (e^2x - 1) / (e^2x + 1).
    floats shifted = v * 1.44269504f + 12582912.0f;
    floats n = shifted - 12582912.0f;
    floats r = v - n * 0.693359375f + n * 2.12194440e-4f;
    floats e = r * (1.0f / 5040) + (1.0f / 720);
    e = e * r + (1.0f / 120);
    e = e * r + (1.0f / 24);
    e = e * r + (1.0f / 6);
    e = e * r + 0.5f;
    e = e * r * r + r; // e^r - 1
    bits one = {0};
    one += 0x3f800000;
    floats power = (floats)(one + ((bits)shifted << 23)); // 2^n
    e = e * power + (power - 1.0f);
    e = e / (e + 2.0f);
    memcpy(&x, &e, sizeof(x));
    return x;
}

static inline vec vec_sigmoid(vec x) {
    return (real)1 / ((real)1 + vec_exp(-x));
}

// ---- a team of threads

typedef struct Meeting {
    int arrived, round;
    char alone[120]; // no other meeting in the same lines of the cache
} Meeting;

// Returns when all `size` threads of the team have come. What one of them wrote before, all see behind it.
void meet(Meeting *m, int size) {
    if (size == 1) {
        return;
    }
    int round = __atomic_load_n(&m->round, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&m->arrived, 1, __ATOMIC_ACQ_REL) == size) {
        __atomic_store_n(&m->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&m->round, round + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int i = 0; __atomic_load_n(&m->round, __ATOMIC_ACQUIRE) == round; i++) {
        if (i > 4000) {
            sched_yield(); // there may be fewer processors than threads
        }
    }
}

// ---- the kernel

// sum (height,QUAD) = a (height,nk) times `width` vectors of a panel, whose rows have QUAD vectors. Always inlined, as the
// kernel of matmul.h: the loops over height and width are unrolled, and all sums stay in registers.
static inline __attribute__((always_inline)) void lstm_kernel(int height, int width, vec *sum, const real *a, size_t ld,
                                                              const real *panel, int nk) {
    vec s[LSTM_HIGH][QUAD], of_b[QUAD], zero = {0};
#pragma GCC unroll 8
    for (int i = 0; i < height; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) {
            s[i][j] = zero;
        }
    }
    for (int k = 0; k < nk; k++, panel += LSTM_WIDTH) {
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) {
            of_b[j] = *(const vec_in_memory *)(panel + j * LANES);
            __builtin_prefetch(panel + LSTM_AHEAD * LSTM_WIDTH + j * LANES);
        }
#pragma GCC unroll 8
        for (int i = 0; i < height; i++) {
#pragma GCC unroll 4
            for (int j = 0; j < width; j++) {
                s[i][j] += a[i * ld + k] * of_b[j];
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < height; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) {
            sum[i * QUAD + j] = s[i][j];
        }
    }
}

// The same for all vectors of the panel. A high tile takes two at a time, since more sums would not fit into the registers.
void lstm_tile(vec *sum, const real *a, size_t ld, const real *panel, int nk, int height) {
#define TILE(height, width)                                                                                    \
    for (int j = 0; j < QUAD; j += width) {                                                                    \
        lstm_kernel(height, width, sum + j, a, ld, panel + j * LANES, nk);                                     \
    }                                                                                                          \
    break
    switch (height) {
    case 1: TILE(1, 4);
    case 2: TILE(2, 4);
#if NV == 4
    case 3: TILE(3, 4);
    case 4: TILE(4, 4);
    case 5: TILE(5, 4);
    case 6: TILE(6, 4);
    case 7: TILE(7, 2);
    default: TILE(8, 2);
#else
    case 3: TILE(3, 2);
    default: TILE(4, 2);
#endif
    }
#undef TILE
}

// ---- packing

// Vector j of panel p begins at this column of n, and has as many as are left, if they are fewer than LANES. units > 0: a panel
// has LANES units, and vector j is block j, `units` columns wide, of their gates.
typedef struct Columns {
    int first, count;
} Columns;

Columns panel_columns(int p, int j, int n, int units) {
    int first = units ? p * LANES : (p * QUAD + j) * LANES, end = units ? units : n;
    Columns c = {first + j * units, max_int(0, min_int(LANES, end - first))};
    return c;
}

int panel_count(int n, int units) {
    return units ? div_up(units, LANES) : div_up(n, LSTM_WIDTH);
}

size_t panel_numbers(int n, int nk, int units) {
    return (size_t)panel_count(n, units) * (size_t)nk * LSTM_WIDTH;
}

// A matrix w, as the right one of products over k, in panels: w (n,nk) transposed, or, where row_is_k, w (nk,n) as it is.
typedef struct Panels {
    real *p;
    int n, nk, units, row_is_k;
} Panels;

void pack_panel(const Panels *to, const real *w, int index) {
    real *panel = to->p + (size_t)index * (size_t)to->nk * LSTM_WIDTH;
    for (int j = 0; j < QUAD; j++) {
        Columns c = panel_columns(index, j, to->n, to->units);
        const real *from[LANES];
        int k = 0;
        for (int i = 0; !to->row_is_k && i < c.count; i++) {
            from[i] = w + (size_t)(c.first + i) * to->nk;
        }
        for (; !to->row_is_k && c.count == LANES && k + LANES <= to->nk; k += LANES) {
            transpose_square(panel + j * LANES, LSTM_WIDTH, from, k);
        }
        for (; k < to->nk; k++) {
            for (int i = 0; i < LANES; i++) {
                real value = 0;
                if (i < c.count) {
                    value = to->row_is_k ? w[(size_t)k * to->n + c.first + i] : from[i][k];
                }
                panel[(size_t)k * LSTM_WIDTH + j * LANES + i] = value;
            }
        }
    }
    if (product_precision == PRODUCTS_BF16) {
        round_to_bf16(panel, (size_t)to->nk * LSTM_WIDTH);
    }
}

// ---- what the threads share

typedef struct Recurrence {
    const LstmActs *a;
    const LstmWeights *w;
    real *out, *dz, *dr;   // forward; backward
    const real *dout;
    int B, T, M, P;
    Panels state, proj;
    real *rows;            // (threads, row_size)  the left rows of a thread's product
    size_t row_size;
    real *dcell, *dbias;   // (B,M), (B,4M)
    Meeting *meetings;     // of the teams
} Recurrence;

// M units, whose state has P numbers, for B sequences of T tokens. What is not said here is 0.
Recurrence recurrence_of(const LstmActs *a, const LstmWeights *w, int B, int T, int M, int P) {
    Recurrence r;
    memset(&r, 0, sizeof(r));
    r.a = a;
    r.w = w;
    r.B = B;
    r.T = T;
    r.M = M;
    r.P = P;
    return r;
}

// A thread's part: sequences first .. end, and of each product the panels from part/team to (part+1)/team of all.
typedef struct LstmPart {
    int first, end, team, part;
    Meeting *meeting;
    real *rows;
} LstmPart;

int team_threads(void) { // of this parallel region
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

// Returns 0 where nothing is left for this thread.
int share_of_thread(LstmPart *s, const Recurrence *r) {
    int threads = team_threads(), me = thread_number();
    int teams = min_int(threads, r->B), team = threads / teams, mine = me / team;
    s->team = team;
    s->part = me % team;
    s->first = (int)((long)r->B * mine / teams);
    s->end = (int)((long)r->B * (mine + 1) / teams);
    s->meeting = r->meetings + mine;
    s->rows = r->rows + r->row_size * (size_t)me;
    return mine < teams;
}

// What stands behind a product: it gets the sums of rows first .. first+height of panel `index`, in step t.
typedef void (*After)(const Recurrence *r, const vec *sum, int first, int height, int t, int index);

// One product of step t, over nk of k: the left rows are those of `left` (N,nk) in step t_left, copied to where they lie close
// together; nk 0: the sums are 0.
static inline __attribute__((always_inline)) void lstm_product(const Recurrence *r, const LstmPart *s, const Panels *b,
                                                               const real *left, int t_left, int t, int skip, After after) {
    int rows = s->end - s->first, nk = b->nk, count = panel_count(b->n, b->units);
    int tiles = div_up(rows, LSTM_HIGH), high = div_up(rows, tiles);
    size_t ld = (size_t)nk + 16;
    for (int i = 0; !skip && i < rows; i++) {
        memcpy(s->rows + i * ld, left + ((size_t)(s->first + i) * r->T + t_left) * nk, (size_t)nk * sizeof(real));
        if (product_precision == PRODUCTS_BF16) {
            round_to_bf16(s->rows + i * ld, (size_t)nk);
        }
    }
    for (int p = (int)((long)count * s->part / s->team); p < (int)((long)count * (s->part + 1) / s->team); p++) {
        for (int i = 0; i < rows; i += high) {
            vec sum[LSTM_HIGH * QUAD];
            int height = min_int(high, rows - i);
            lstm_tile(sum, s->rows + i * ld, ld, b->p + (size_t)p * nk * LSTM_WIDTH, skip ? 0 : nk, height);
            after(r, sum, s->first + i, height, t, p);
        }
    }
}

// Packs both matrices, which all threads do together, and takes memory for the rest. k: the longest sum of a product.
void prepare_recurrence(Recurrence *r, int k) {
    static Arena arena;
    size_t threads = (size_t)thread_count();
    size_t numbers[] = {panel_numbers(r->state.n, r->state.nk, r->state.units),
                        r->w->proj ? panel_numbers(r->proj.n, r->proj.nk, r->proj.units) : 0,
                        (size_t)r->B * ((size_t)k + 16) + 16,
                        r->dz ? (size_t)r->B * r->M : 0};
    size_t total = numbers[0] + numbers[1] + numbers[2] * threads + 5 * numbers[3] + 64;
    if (arena.size < total * sizeof(real) + threads * sizeof(Meeting) + 1024) {
        arena_reserve(&arena, total * sizeof(real) + threads * sizeof(Meeting) + 1024);
    }
    arena_reset(&arena);
    r->state.p = (real *)arena_take(&arena, numbers[0], sizeof(real));
    r->proj.p = (real *)arena_take(&arena, numbers[1], sizeof(real));
    r->row_size = numbers[2];
    r->rows = (real *)arena_take(&arena, numbers[2] * threads, sizeof(real));
    r->dcell = (real *)arena_take(&arena, numbers[3], sizeof(real));
    r->dbias = (real *)arena_take(&arena, 4 * numbers[3], sizeof(real));
    r->meetings = (Meeting *)arena_take(&arena, threads, sizeof(Meeting));
    memset(r->meetings, 0, threads * sizeof(Meeting));
    memset(r->dcell, 0, numbers[3] * sizeof(real));
    memset(r->dbias, 0, 4 * numbers[3] * sizeof(real));

    int of_state = panel_count(r->state.n, r->state.units);
    int of_proj = r->w->proj ? panel_count(r->proj.n, r->proj.units) : 0;
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < of_state + of_proj; i++) {
        if (i < of_state) {
            pack_panel(&r->state, r->w->state, i);
        } else {
            pack_panel(&r->proj, r->w->proj, i - of_state);
        }
    }
}

// ---- forward

// Step t of row n gives these `count` numbers, from number `at` on.
static inline void lstm_give(const Recurrence *r, size_t n, int t, int at, vec v, int count) {
    real *out = r->out + n * r->P + at;
    vec_store(out, vec_load(out, count) + v, count);
    if (t + 1 < r->T) {
        vec_store(r->a->before + (n + 1) * r->P + at, v, count);
    }
}

// From r_(t-1) W_state^T to c and h of LANES units.
static inline void units_after(const Recurrence *r, const vec *sum, int first, int height, int t, int index) {
    int M = r->M, at = index * LANES, count = min_int(LANES, M - at);
    vec bias[QUAD];
    for (int j = 0; j < QUAD; j++) {
        bias[j] = vec_load(r->w->bias + j * M + at, count);
    }
    for (int i = 0; i < height; i++, sum += QUAD) {
        size_t n = (size_t)(first + i) * r->T + t;
        real *gates = r->a->gates + n * 4 * M + at, *cell = r->a->cell + n * M + at;
        vec old = {0};
        vec of_i = vec_sigmoid(vec_load(gates, count) + (sum[0] + bias[0]));
        vec of_f = vec_sigmoid(vec_load(gates + M, count) + (sum[1] + bias[1]));
        vec of_g = vec_tanh(vec_load(gates + 2 * M, count) + (sum[2] + bias[2]));
        vec of_o = vec_sigmoid(vec_load(gates + 3 * M, count) + (sum[3] + bias[3]));
        if (t) {
            old = vec_load(cell - M, count);
        }
        vec c = of_f * old + of_i * of_g, h = of_o * vec_tanh(c);
        vec_store(gates, of_i, count);
        vec_store(gates + M, of_f, count);
        vec_store(gates + 2 * M, of_g, count);
        vec_store(gates + 3 * M, of_o, count);
        vec_store(cell, c, count);
        if (r->w->proj) {
            vec_store(r->a->hidden + n * M + at, h, count);
        } else {
            lstm_give(r, n, t, at, h, count);
        }
    }
}

// h W_proj^T is what the step gives.
static inline void projection_after(const Recurrence *r, const vec *sum, int first, int height, int t, int index) {
    for (int i = 0; i < height; i++, sum += QUAD) {
        for (int j = 0; j < QUAD; j++) {
            Columns c = panel_columns(index, j, r->P, 0);
            if (c.count > 0) {
                lstm_give(r, (size_t)(first + i) * r->T + t, t, c.first, sum[j], c.count);
            }
        }
    }
}

void fast_lstm_recur(real *out, const LstmActs *a, const LstmWeights *w, int B, int T, int M, int P) {
    Recurrence r = recurrence_of(a, w, B, T, M, P);
    if (B == 0) { // a process that has no window to evaluate
        return;
    }
    r.out = out;
    r.state.n = 4 * M;
    r.state.nk = P;
    r.state.units = M;
    r.proj.n = P;
    r.proj.nk = M;
    prepare_recurrence(&r, max_int(M, P));
#pragma omp parallel
    {
        LstmPart s;
        int works = share_of_thread(&s, &r);
        for (int b = s.first; works && s.part == 0 && b < s.end; b++) {
            memset(a->before + (size_t)b * T * P, 0, (size_t)P * sizeof(real));
        }
        for (int t = 0; works && t < T; t++) {
            lstm_product(&r, &s, &r.state, a->before, t, t, t == 0, units_after);
            meet(s.meeting, s.team);
            if (w->proj) {
                lstm_product(&r, &s, &r.proj, a->hidden, t, t, 0, projection_after);
                meet(s.meeting, s.team);
            }
            ranks_tick();
        }
    }
}

// ---- backward

// dhidden: the gradient by h_t of `count` units from number `at` on, of row n = b*T + t.
static inline void lstm_unit_back(const Recurrence *r, int b, int t, int at, vec dhidden, int count) {
    int M = r->M;
    size_t n = (size_t)b * r->T + t;
    const real *gates = r->a->gates + n * 4 * M + at, *cell = r->a->cell + n * M + at;
    real *dcell = r->dcell + (size_t)b * M + at, *dz = r->dz + n * 4 * M + at, *dbias = r->dbias + (size_t)b * 4 * M + at;
    vec i = vec_load(gates, count), f = vec_load(gates + M, count), g = vec_load(gates + 2 * M, count);
    vec o = vec_load(gates + 3 * M, count), squashed = vec_tanh(vec_load(cell, count)), old = {0}, d[QUAD];
    if (t) {
        old = vec_load(cell - M, count);
    }
    vec dc = vec_load(dcell, count) + dhidden * o * ((real)1 - squashed * squashed);
    d[0] = dc * g * i * ((real)1 - i);
    d[1] = dc * old * f * ((real)1 - f);
    d[2] = dc * i * ((real)1 - g * g);
    d[3] = dhidden * squashed * o * ((real)1 - o);
    vec_store(dcell, dc * f, count);
    for (int j = 0; j < QUAD; j++) {
        vec_store(dz + j * M, d[j], count);
        vec_store(dbias + j * M, vec_load(dbias + j * M, count) + d[j], count);
    }
}

// From dz_(t+1) W_state to the gradient by r_t, and where that is h_t, on to dz_t.
static inline void read_after(const Recurrence *r, const vec *sum, int first, int height, int t, int index) {
    for (int i = 0; i < height; i++, sum += QUAD) {
        size_t n = (size_t)(first + i) * r->T + t;
        for (int j = 0; j < QUAD; j++) {
            Columns c = panel_columns(index, j, r->P, 0);
            if (c.count == 0) {
                continue;
            }
            vec d = vec_load(r->dout + n * r->P + c.first, c.count) + sum[j];
            if (r->w->proj) {
                vec_store(r->dr + n * r->P + c.first, d, c.count);
            } else {
                lstm_unit_back(r, first + i, t, c.first, d, c.count);
            }
        }
    }
}

// From dr W_proj, the gradient by h_t, to dz_t.
static inline void hidden_after(const Recurrence *r, const vec *sum, int first, int height, int t, int index) {
    for (int i = 0; i < height; i++, sum += QUAD) {
        for (int j = 0; j < QUAD; j++) {
            Columns c = panel_columns(index, j, r->M, 0);
            if (c.count > 0) {
                lstm_unit_back(r, first + i, t, c.first, sum[j], c.count);
            }
        }
    }
}

void fast_lstm_recur_backward(real *dz, real *dr, real *dbias, const real *dout, const LstmActs *a, const LstmWeights *w,
                              int B, int T, int M, int P) {
    Recurrence r = recurrence_of(a, w, B, T, M, P);
    if (B == 0) {
        return;
    }
    r.dz = dz;
    r.dr = dr;
    r.dout = dout;

    // On the way back a product sums over what it gave forward, so both matrices are taken as they are.
    r.state.n = P;
    r.state.nk = 4 * M;
    r.state.row_is_k = 1;
    r.proj.n = M;
    r.proj.nk = P;
    r.proj.row_is_k = 1;
    prepare_recurrence(&r, max_int(4 * M, P));
#pragma omp parallel
    {
        LstmPart s;
        int works = share_of_thread(&s, &r);
        for (int t = T - 1; works && t >= 0; t--) {
            lstm_product(&r, &s, &r.state, dz, t + 1, t, t + 1 == T, read_after);
            meet(s.meeting, s.team);
            if (w->proj) {
                lstm_product(&r, &s, &r.proj, dr, t, t, 0, hidden_after);
                meet(s.meeting, s.team);
            }
            ranks_tick();
        }
    }

    // Each sequence has its own sum; they are added in order.
#pragma omp parallel for if (is_worth_threads(B, 4 * M))
    for (int j = 0; j < 4 * M; j++) {
        for (int b = 0; b < B; b++) {
            dbias[j] += r.dbias[(size_t)b * 4 * M + j];
        }
    }
}

#define lstm_recur          fast_lstm_recur
#define lstm_recur_backward fast_lstm_recur_backward
