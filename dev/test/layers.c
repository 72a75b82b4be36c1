// The layers, each alone: forward and backward, in hundreds of sizes, with hostile numbers, with several numbers of threads
// (the bits have to be the same), and against finite differences. The functions of dev/cpu are held against the plain loops
// of train_moe.c, and those that the lesson has only once against dev/test/plain.h.

#include "dev/test/trainer.h"
#include "dev/test/model.h"
#include "dev/test/both.h"
#include "dev/test/plain.h"
#include "dev/test/slopes.h"

void assert_untouched(const char *what, const real *x, size_t n) { // still the poison it was filled with
    for (size_t i = 0; i < n; i++) {
        if (!isnan(x[i]))
            fail_msg("%s[%zu] behind the result was written", what, i);
    }
}

typedef struct Layer { // what one of the layers below works on; its objective is inner(out, g), g random
    int B, T, N, C, H, KV, D, E, K, F, V, activation, gated, gate, group, head_rows;
    real *x, *w, *w2, *out, *g, *rstd, *logits, *hidden, *act, *weight, *rows, *angles, *nll;
    int *index, *targets;
    Experts experts;
    Route route;
    Model *model;
} Layer;

Layer empty_layer; // all zero: what a test starts from

void subtract_one(real *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        x[i] -= 1;
}

double rmsnorm_objective(void *arg) {
    Layer *l = (Layer *)arg;
    fast_rmsnorm_forward(l->out, l->rstd, l->x, l->w, l->N, l->C, 1e-5);
    return inner(l->out, l->g, (size_t)l->N * l->C);
}

// hostile: some rows are zero, others have numbers of any size from 1e-6 to 1e6.
void check_rmsnorm(int N, int C, int hostile, int slopes) {
    Layer l = empty_layer;
    char what[64];
    l.N = N;
    l.C = C;
    size_t size = (size_t)N * C;
    l.x = take_normal(size, 1);
    for (size_t i = 0; hostile && i < size; i++)
        l.x[i] *= (real)(i / C % 5 == 3 ? 0 : pow(10, (double)(i / C % 13) - 6));
    l.w = take_normal(C, 2);
    l.g = take_normal(size, 3);
    l.out = take_reals(size);
    l.rstd = take_reals(N);
    real *dx = take_reals(size), *dw = take_reals(C), *start = take_normal(size, 4);
    real *out = take_reals(size), *rstd = take_reals(N), *plain_dx = take_reals(size), *plain_dw = take_normal(C, 5);
    snprintf(what, sizeof(what), "rmsnorm %d x %d", N, C);
    rmsnorm_forward(out, rstd, l.x, l.w, N, C, 1e-5);
    for (size_t i = 0; i < size; i++)
        plain_dx[i] = start[i] *= rstd[i / C]; // as large as what is added to it
    rmsnorm_backward(plain_dx, plain_dw, l.g, l.x, rstd, l.w, N, C);
    for (int team = 0; team < TEAMS; team++) {
        set_threads(teams[team]);
        fill(l.out, size, (real)NAN);
        fill(l.rstd, N, (real)NAN);
        memcpy(dx, start, size * sizeof(real));
        for (int c = 0; c < C; c++)
            dw[c] = (real)random_normal(hash64(5), c);
        rmsnorm_objective(&l);
        fast_rmsnorm_backward(dx, dw, l.g, l.x, l.rstd, l.w, N, C);
        assert_same_bits(what, team, bits_of(l.out, size, bits_of(dx, size, bits_of(dw, C, 0))));
    }
    set_threads(1);
    // Sums of squares lose nothing; those of either sign lose like products, see test_products.
    assert_close("rmsnorm out", l.out, out, size, 0, 16 * EPSILON);
    assert_close("rstd", l.rstd, rstd, N, 0, 16 * EPSILON);
    for (int n = 0; n < N; n++)
        assert_close("rmsnorm dx", dx + (size_t)n * C, plain_dx + (size_t)n * C, C, 4 * (double)rstd[n], 16 * EPSILON);
    assert_close("rmsnorm dw", dw, plain_dw, C, sqrt(N), (16 + 2 * sqrt(N)) * EPSILON);
    if (slopes) {
        for (size_t i = 0; i < size; i++)
            dx[i] -= start[i]; // it was added to
        for (int c = 0; c < C; c++)
            dw[c] -= (real)random_normal(hash64(5), c);
        check_slopes(what, l.x, size, dx, rmsnorm_objective, &l, 40);
        check_slopes(what, l.w, C, dw, rmsnorm_objective, &l, 10);
    }
    free_taken();
}

void test_rmsnorm(void **state) {
    (void)state;
    const int tokens[] = {1, 2, 15, 16, 17, 127, 128, 129, 255, 256, 257, 300};
    const int widths[] = {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 64, 97, 100, 255, 256, 257, 513};
    uint64_t random = 1;
    check_rmsnorm(2 * 128 + 5, 21, 0, 1); // three chunks of fast_rmsnorm_backward
    for (int round = 0; round < (is_slow() ? 5 : 60); round++)
        check_rmsnorm(pick(&random, tokens, 12), pick(&random, widths, 21), round % 2, 0);
}

double rope_objective(void *arg) {
    Layer *l = (Layer *)arg;
    size_t size = (size_t)l->N * (l->H * l->D + 3);
    memcpy(l->out, l->x, size * sizeof(real));
    rope(l->out, l->H * l->D + 3, l->N, l->T, l->H, l->D, l->angles, 1);
    return inner(l->out, l->g, size);
}

void check_rope(int B, int T, int heads, int D) {
    Layer l = empty_layer;
    l.T = T;
    l.N = B * T;
    l.H = heads;
    l.D = D;
    size_t ld = (size_t)heads * D + 3, size = l.N * ld; // three numbers of a row are none of its business
    l.x = take_normal(size, 1);
    l.g = take_normal(size, 2);
    l.out = take_reals(size);
    l.angles = take_reals((size_t)T * D);
    rope_angles(l.angles, 0, T, D, 10000);
    real *plain = take_reals(size), *dx = take_reals(size);
    for (int team = 0; team < TEAMS; team++) {
        set_threads(teams[team]);
        rope_objective(&l);
        memcpy(dx, l.g, size * sizeof(real));
        rope(dx, (int)ld, l.N, T, heads, D, l.angles, -1);
        assert_same_bits("rope", team, bits_of(l.out, size, bits_of(dx, size, 0)));
    }
    set_threads(1);
    memcpy(plain, l.x, size * sizeof(real));
    plain_rope(plain, ld, l.N, T, heads, D, 10000, 1);
    assert_close("rope", l.out, plain, size, 1, 16 * EPSILON);
    for (int n = 0; n < l.N; n++)
        assert_memory_equal(l.out + (n + 1) * ld - 3, l.x + (n + 1) * ld - 3, 3 * sizeof(real));
    memcpy(plain, l.g, size * sizeof(real));
    plain_rope(plain, ld, l.N, T, heads, D, 10000, -1);
    assert_close("rope back", dx, plain, size, 1, 16 * EPSILON);
    if (size < 1000)
        check_slopes("rope", l.x, size, dx, rope_objective, &l, 40);
    free_taken();
}

void test_rope(void **state) {
    (void)state;
    check_rope(2, 9, 3, 6);
    const int widths[] = {2, 4, 6, 8, 10, 16, 24, 30, 32, 34, 64, 66};
    uint64_t random = 1;
    for (int round = 0; round < (is_slow() ? 3 : 30); round++)
        check_rope(draw(&random, 1, 3), draw(&random, 1, 40), draw(&random, 1, 5), pick(&random, widths, 12));
}

double attention_objective(void *arg) {
    Layer *l = (Layer *)arg;
    fast_attention_forward(l->out, l->rstd, l->x, l->B, l->T, l->H, l->KV, l->D);
    return inner(l->out, l->g, (size_t)l->N * l->H * l->D);
}

// Lets attention work in an array of the test, as large as it needs for the largest team and full of NaN: that shows who
// writes outside of it, or reads what nobody wrote. Returns the memory that it had; to be put back by attention_memory = .
real *take_attention_memory(int T, int D) {
    set_threads(teams[TEAMS - 1]);
    reserve_attention(T, D);
    real *before = attention_memory;
    attention_memory = take_filled(attention_bytes(T, D) / sizeof(real), (real)NAN);
    set_threads(1);
    return before;
}

// Compares one part of each row of qkv: the numbers from `first` to first + width. `scale` is the size of their terms.
void assert_close_part(const char *what, const real *found, const real *wanted, int N, size_t ld, int first, int width,
                       double scale, double tolerance) {
    double square = 0;
    for (int n = 0; n < N; n++)
        square += inner(wanted + n * ld + first, wanted + n * ld + first, width);
    for (int n = 0; n < N; n++)
        assert_close(what, found + n * ld + first, wanted + n * ld + first, width,
                     scale + sqrt(square / ((double)N * width)), tolerance);
}

// Queries and keys have the standard deviation `spread`. So scores have its square, and some are five times as large.
void check_attention(int B, int T, int H, int KV, int D, double spread, int slopes) {
    Layer l = empty_layer;
    char what[64];
    l.B = B;
    l.T = T;
    l.N = B * T;
    l.H = H;
    l.KV = KV;
    l.D = D;
    size_t ld = (size_t)(H + 2 * KV) * D, size = l.N * ld, width = (size_t)l.N * H * D, rows = (size_t)l.N * H;
    l.x = take_normal(size, 1);
    for (size_t i = 0; i < size; i++)
        l.x[i] *= (real)(i % ld < (size_t)(H + KV) * D ? spread : 1);
    l.g = take_normal(width, 2);
    l.out = take_reals(width);
    l.rstd = take_reals(rows);
    real *before = take_attention_memory(T, D);
    real *dx = take_reals(size), *out = take_reals(width), *lse = take_reals(rows), *dqkv = take_reals(size);
    snprintf(what, sizeof(what), "attention, B %d, T %d, H %d, KV %d, D %d, spread %g", B, T, H, KV, D, spread);
    for (int team = 0; team < TEAMS; team++) {
        set_threads(teams[team]);
        fill(l.out, width, (real)NAN);
        fill(l.rstd, rows, (real)NAN);
        fill(dx, size, (real)NAN); // written, not added to
        fill(attention_memory, attention_bytes(T, D) / sizeof(real), (real)NAN); // what this team may use
        attention_objective(&l);
        fill(attention_memory, attention_bytes(T, D) / sizeof(real), (real)NAN);
        fast_attention_backward(dx, l.g, l.out, l.rstd, l.x, B, T, H, KV, D);
        assert_same_bits(what, team, bits_of(l.out, width, bits_of(l.rstd, rows, bits_of(dx, size, 0))));
    }
    set_threads(1);
    attention_forward(out, lse, l.x, B, T, H, KV, D);
    attention_backward(dqkv, l.g, out, lse, l.x, B, T, H, KV, D);
    // A score is rounded to epsilon of itself, and its sum of D terms like a product's; that much, as a share, is
    // unsure of its probability.
    double score = spread * spread, unsure = (16 + (8 + sqrt(D)) * score) * EPSILON;
    assert_close(what, l.out, out, width, 2 * rms(out, width), unsure);
    assert_close("lse", l.rstd, lse, rows, score, (8 + sqrt(D)) * EPSILON);
    // dscore is P * (dP - mean) / sqrt(D), and dP of the size of sqrt(D); so where the two cancel, what remains is an
    // error of epsilon times the size of a key. The first keys are looked at by all, 1 + 1/2 + 1/3... in sum.
    assert_close_part("dq", dx, dqkv, l.N, ld, 0, H * D, 2 * spread, unsure);
    assert_close_part("dk", dx, dqkv, l.N, ld, H * D, KV * D, 2 * spread, unsure);
    assert_close_part("dv", dx, dqkv, l.N, ld, (H + KV) * D, KV * D, 3, unsure);
    for (int part = 0; slopes && part < H + 2 * KV; part++) { // one head at the first and the last place, to be sure
        real *last = l.x + size - (size_t)(H + 2 * KV - part) * D, *first = l.x + (size_t)part * D;
        check_slopes(what, last, D, dx + (last - l.x), attention_objective, &l, 1);
        if (part >= H)
            check_slopes(what, first, D, dx + (first - l.x), attention_objective, &l, 1);
    }
    if (slopes)
        check_slopes(what, l.x, size, dx, attention_objective, &l, T < 64 ? 40 : 15);
    attention_memory = before;
    free_taken();
}

void test_attention(void **state) {
    (void)state;
    const int few[] = {2, 5, 64, 70, 131}, heads[][2] = {{2, 2}, {4, 2}, {3, 1}, {1, 1}, {2, 1}, {6, 3}, {8, 1}};
    const int lengths[] = {1,  2,  3,  5,  11,  12,  13,  15,  16,  17,  31,  32,  33,  47,  48,  49,  63,  64,
                           65, 95, 96, 97, 127, 128, 129, 191, 192, 193, 255, 256, 257, 289, 300, 385, 513, 700};
    const int widths[] = {2, 4, 6, 8, 10, 16, 24, 32, 34, 48, 64, 80, 128, 254, 256, 258, 300, 514};
    uint64_t random = 1;
    for (int i = 0; i < (is_slow() ? 2 : 5); i++) {
        for (int j = 0; j < 3; j++)
            check_attention(2, few[i], heads[j][0], heads[j][1], i % 2 ? 6 : 20, 1, 1);
    }
    for (int round = 0; round < (is_slow() ? 3 : 80); round++) {
        int B, T, D, j;
        do {
            B = draw(&random, 1, 3);
            T = pick(&random, lengths, 36);
            D = pick(&random, widths, 18);
            j = draw(&random, 0, 6);
        } while ((double)B * heads[j][0] * T * T * D > (is_slow() ? 1e5 : 3e6));
        check_attention(B, T, heads[j][0], heads[j][1], D, round % 3 ? 1 : round % 2 ? 30 : 100, 0);
    }
    if (!is_slow())
        check_attention(1, 700, 1, 1, 64, 1, 0);
}

double activation_objective(void *arg) { // sum of weight[choice[r]] * inner(act[r], g[r])
    Layer *l = (Layer *)arg;
    double sum = 0;
    fast_activation_forward(l->act, l->hidden, l->N, l->F, l->activation);
    for (int r = 0; r < l->N; r++)
        sum += (l->weight ? (double)l->weight[l->index[r]] : 1) * inner(l->act + r * l->F, l->g + r * l->F, l->F);
    return sum;
}

// wild: the numbers before the activation have either sign, and any size from 1e-4 to 1e4.
void check_activation(int activation, int rows, int F, int weighted, int wild) {
    Layer l = empty_layer;
    int gated = is_gated(activation);
    char what[64];
    l.N = rows;
    l.F = F;
    l.activation = activation;
    l.gated = gated;
    size_t size = (size_t)rows * F, in = size * (1 + gated);
    l.hidden = take_normal(in, 1);
    for (size_t i = 0; i < in; i++) {
        int up = gated && i % (2 * F) >= (size_t)F;
        double x = (double)l.hidden[i], u = random_uniform(hash64(1), i);
        if (up)
            l.hidden[i] = (real)(2 * u - 1);
        else if (wild)
            l.hidden[i] = (real)copysign(pow(10, 8 * u - 4), x);
        else if (fabs(x) < 0.01)
            l.hidden[i] = (real)0.5; // away from ReLU's kink
    }
    l.g = take_reals(size);
    for (size_t i = 0; i < size; i++)
        l.g[i] = (real)(2 * random_uniform(2, i) - 1);
    l.act = take_reals(size);
    l.index = take_ints(rows);
    l.weight = weighted ? take_reals((size_t)rows + 2) : NULL;
    for (int r = 0; weighted && r < rows + 2; r++)
        l.weight[r] = (real)(2 * random_uniform(3, r) - 1);
    for (int r = 0; r < rows; r++)
        l.index[r] = (int)(((unsigned)r * 7919u + 3u) % (unsigned)rows) + 2; // choices 0 and 1 have no row
    real *dhidden = take_reals(in), *dweight = take_reals((size_t)rows + 2), *dact = take_reals(size);
    real *act = take_reals(size), *plain_dhidden = take_reals(in), *plain_dact = take_reals(size);
    real *plain_dweight = take_reals((size_t)rows + 2);
    snprintf(what, sizeof(what), "%s, %d x %d%s%s", activation_names[activation], rows, F, weighted ? ", weighted" : "",
             wild ? ", wild" : "");
    for (int team = 0; team < TEAMS; team++) {
        set_threads(teams[team]);
        fill(l.act, size, (real)NAN);
        fill(dhidden, in, (real)NAN);
        fill(dweight, (size_t)rows + 2, (real)NAN);
        memcpy(dact, l.g, size * sizeof(real));
        fast_activation_forward(l.act, l.hidden, rows, F, activation);
        fast_activation_backward(dhidden, weighted ? dweight : NULL, dact, l.hidden, l.weight, l.index, rows, F,
                                 activation);
        uint64_t bits = bits_of(l.act, size, bits_of(dact, size, bits_of(dhidden, in, 0)));
        assert_same_bits(what, team, bits_of(dweight + 2, rows, bits));
    }
    set_threads(1);
    memcpy(plain_dact, l.g, size * sizeof(real));
    activation_forward(act, l.hidden, rows, F, activation);
    activation_backward(plain_dhidden, weighted ? plain_dweight : NULL, plain_dact, l.hidden, l.weight, l.index, rows, F,
                        activation);
    assert_close(what, l.act, act, size, 1, 16 * EPSILON);
    assert_close(what, dhidden, plain_dhidden, in, 1, 16 * EPSILON);
    assert_close(what, dact, plain_dact, size, 1, 16 * EPSILON);
    assert_untouched(what, dweight, weighted ? 2 : (size_t)rows + 2);
    if (weighted)
        assert_close(what, dweight + 2, plain_dweight + 2, rows, sqrt(F) * (1 + rms(act, size)), 16 * EPSILON);
    if (rows == 19) {
        check_slopes(what, l.hidden, in, dhidden, activation_objective, &l, 60);
        if (weighted)
            check_slopes(what, l.weight + 2, rows, dweight + 2, activation_objective, &l, 10);
    }
    free_taken();
}

void test_activation(void **state) {
    (void)state;
    const int widths[] = {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 129, 255, 257};
    uint64_t random = 1;
    for (int activation = SWIGLU; activation <= GELU; activation++) {
        for (int weighted = 0; weighted < 2; weighted++) {
            check_activation(activation, 19, 21, weighted, 0);
            for (int round = 0; round < (is_slow() ? 2 : 40); round++)
                check_activation(activation, draw(&random, 0, round % 4 ? 18 : 70), pick(&random, widths, 23), weighted,
                                 round % 2);
        }
    }
}

double experts_objective(void *arg) { // of all answers, weighted and summed by token
    Layer *l = (Layer *)arg;
    const Route *r = &l->route;
    size_t size = (size_t)l->N * l->C;
    memset(l->out, 0, size * sizeof(real));
    scratch_reset(l->model);
    experts_forward(l->model, l->rows, l->hidden, l->x, l->w, l->w2, r->token, r->offset, &l->experts);
    combine(l->out, l->rows, l->weight, r->row, l->N, l->K, l->C);
    return inner(l->out, l->g, size);
}

// Compares both passes of these experts over N tokens, for all numbers of threads, with the plain loops. Row r is that of
// token[r], or, with token NULL, row r of x. Its answer is multiplied by weight[choice[r]], and the weight's gradient goes
// to the same index, below `choices`.
void compare_experts(const char *what, const Experts *e, const real *w_in, const real *w_out, const int *token,
                     const int *offset, int N, int choices, const real *weight, const int *choice) {
    static Model m; // for its scratch memory
    size_t rows = offset[e->E], hidden = sorted_size(offset, e->E, e->hidden), act = sorted_size(offset, e->E, e->F);
    size_t in = 0, out = 0, C = e->C;
    for (int i = 0; i < e->E; i++) {
        in += e->hidden[i] * C;
        out += e->F[i] * C;
    }
    enum { OUT, HIDDEN, DX, DW_IN, DW_OUT, DWEIGHT, RESULTS };
    static const char *const names[] = {"out", "hidden", "dx", "dw_in", "dw_out", "dweight"};
    const size_t sizes[] = {rows * C, hidden, rows * C, in, out, (size_t)choices};
    const int added[] = {0, 0, 0, 1, 1, 0};
    const size_t more = 7; // numbers behind the result, not to be written
    real *found[RESULTS], *plain[RESULTS], *start[RESULTS], *x = take_normal(N * C, 11), *g = take_normal(N * C, 12);
    for (int i = 0; i < RESULTS; i++) {
        found[i] = take_reals(sizes[i] + more);
        plain[i] = take_reals(sizes[i] + more);
        start[i] = take_filled(sizes[i] + more, (real)NAN);
        for (size_t j = 0; added[i] && j < sizes[i]; j++)
            start[i][j] = (real)random_normal(i, j);
        memcpy(plain[i], start[i], (sizes[i] + more) * sizeof(real));
    }
    for (int team = 0; team < TEAMS; team++) {
        uint64_t bits = 0;
        set_threads(teams[team]);
        for (int i = 0; i < RESULTS; i++)
            memcpy(found[i], start[i], (sizes[i] + more) * sizeof(real));
        prepare_scratch(&m, team == 0);
        experts_forward(&m, found[OUT], found[HIDDEN], x, w_in, w_out, token, offset, e);
        prepare_scratch(&m, team == 0);
        experts_backward(&m, found[DX], found[DWEIGHT], found[DW_IN], found[DW_OUT], g, x, found[HIDDEN], weight, w_in,
                         w_out, token, choice, offset, e);
        for (int i = 0; i < RESULTS; i++)
            bits = bits_of(found[i], sizes[i], bits);
        assert_same_bits(what, team, bits);
    }
    set_threads(1);
    plain_experts_forward(plain[OUT], plain[HIDDEN], take_reals(act), x, w_in, w_out, token, offset, e);
    plain_experts_backward(plain[DX], plain[DWEIGHT], plain[DW_IN], plain[DW_OUT], g, x, plain[HIDDEN], weight, w_in, w_out,
                           token, choice, offset, e);
    for (int i = 0; i < RESULTS - 1; i++) {
        assert_close(names[i], found[i], plain[i], sizes[i], rms(plain[i], sizes[i]), 64 * EPSILON);
        assert_untouched(names[i], found[i] + sizes[i], more);
    }
    for (int i = 0; i < choices; i++) { // those without a row stay as they were
        if (!isnan(plain[DWEIGHT][i]))
            assert_close(names[DWEIGHT], found[DWEIGHT] + i, plain[DWEIGHT] + i, 1, sqrt((double)C), 64 * EPSILON);
        else
            assert_untouched(names[DWEIGHT], found[DWEIGHT] + i, 1);
    }
    prepare_scratch(&m, 1); // gives its memory back
}

// mixed: experts have different widths and activations. A capacity factor below E makes experts drop choices.
void check_experts(int N, int E, int K, int C, int F, int activation, int mixed, double factor, uint64_t seed,
                   int slopes) {
    static Model m; // for its scratch memory
    Layer l = empty_layer;
    char what[128];
    l.N = N;
    l.E = E;
    l.K = K;
    l.C = C;
    l.F = F;
    l.model = &m;
    int *width = take_ints(E), *kind = take_ints(E);
    size_t in = 0, out = 0, choices = (size_t)N * K, size = (size_t)N * C;
    for (int e = 0; e < E; e++) {
        width[e] = mixed ? max_int(1, F - e % 3) : F;
        kind[e] = mixed ? e % 4 : activation;
        in += (size_t)width[e] * (1 + is_gated(kind[e])) * C;
        out += (size_t)width[e] * C;
    }
    l.experts = take_experts(E, C, width, kind);
    l.route = take_route(N, E, K);
    for (int n = 0; n < N; n++) { // many go to the first experts, few to the last
        double u = random_uniform(seed, n);
        for (int k = 0; k < K; k++)
            l.route.expert[n * K + k] = ((int)(u * u * E) + k * max_int(1, E / K)) % E;
    }
    make_route(&l.route, N, factor);
    l.x = take_normal(size, seed);
    l.w = take_normal(in, seed + 1);
    l.w2 = take_normal(out, seed + 2);
    for (size_t i = 0; i < in; i++)
        l.w[i] /= (real)sqrt(C);
    for (size_t i = 0; i < out; i++)
        l.w2[i] /= (real)sqrt(F);
    l.weight = take_normal(choices, seed + 4);
    snprintf(what, sizeof(what), "experts, N %d, E %d, K %d, C %d, F %d, %s, dropped %d", N, E, K, C, F,
             mixed ? "mixed" : activation_names[activation], l.route.dropped);
    compare_experts(what, &l.experts, l.w, l.w2, l.route.token, l.route.offset, N, N * K, l.weight, l.route.choice);
    if (slopes) {
        l.g = take_normal(size, seed + 3);
        l.out = take_reals(size);
        l.rows = take_filled(choices * C, (real)NAN);
        l.hidden = take_filled(choices * 2 * F, (real)NAN);
        real *dx = take_reals(size), *drows = take_filled(choices * C, (real)NAN), *dweight = take_reals(choices);
        real *dw = take_reals(in), *dw2 = take_reals(out);
        experts_objective(&l);
        prepare_scratch(&m, 0);
        experts_backward(&m, drows, dweight, dw, dw2, l.g, l.x, l.hidden, l.weight, l.w, l.w2, l.route.token,
                         l.route.choice, l.route.offset, &l.experts);
        combine(dx, drows, NULL, l.route.row, N, K, C);
        check_slopes(what, l.x, size, dx, experts_objective, &l, 30);
        check_slopes(what, l.w, in, dw, experts_objective, &l, 30);
        check_slopes(what, l.w2, out, dw2, experts_objective, &l, 30);
        check_slopes(what, l.weight, choices, dweight, experts_objective, &l, 20);
    }
    prepare_scratch(&m, 1);
    free_taken();
}

void test_experts(void **state) {
    (void)state;
    for (int activation = SWIGLU; activation <= GELU; activation++)
        check_experts(23, 5, 2, 10, 7, activation, 0, 5, activation == RELU ? 200 : 100, 1);
    check_experts(23, 5, 2, 10, 7, SWIGLU, 1, 5, 300, 1);
    const int counts[] = {1, 2, 3, 8, 17, 64, 300}, widths[] = {1, 2, 3, 5, 12, 16, 17, 31, 33, 48, 65, 97};
    uint64_t random = 1;
    for (int round = 0; round < (is_slow() ? 2 : 40); round++) {
        int E = pick(&random, counts, 7);
        check_experts(draw(&random, 1, 200), E, min_int(E, draw(&random, 1, 4)), pick(&random, widths, 12),
                      pick(&random, widths, 12), round % 4, round % 3 == 0, round % 2 ? E : 1, (uint64_t)round, 0);
    }
}

// Experts each of which has its own rows of x, in order.
void test_experts_in_order(void **state) {
    (void)state;
    const int N = 50, C = 10, F = 33, widths[] = {F, F, F}, kinds[] = {SWIGLU, RELU, SWIGLU}, offset[] = {0, 20, 20, N};
    Experts three = take_experts(3, C, widths, kinds);
    real *w_in = take_normal((size_t)3 * 2 * F * C, 2), *w_out = take_normal((size_t)3 * F * C, 3);
    int *choice = take_ints(N);
    for (int n = 0; n < N; n++)
        choice[n] = n;
    compare_experts("three in order", &three, w_in, w_out, NULL, offset, N, N, take_filled(N, 1), choice);
    free_taken();
}

// A layer that all tokens pass, which adds to what is there.
double dense_objective(void *arg) {
    Layer *l = (Layer *)arg;
    fill(l->out, (size_t)l->N * l->C, 1);
    dense_forward(l->model, 0, l->out);
    return inner(l->out, l->g, (size_t)l->N * l->C);
}

void check_dense(int activation) {
    Layer l = empty_layer;
    Config c = small_config("dense");
    set_options(&c, "--layers 1 --dim 12 --heads 2 --kv-heads 2 --topk 1 --seq 50 --ffn 33");
    c.dense_activation = activation;
    l.N = c.seq;
    l.C = c.dim;
    l.F = dense_width(&c, 0);
    assert_int_equal(l.F, 33);
    size_t size = (size_t)l.N * l.C, H = (size_t)l.F * (1 + is_gated(activation)), in = H * l.C, out = (size_t)l.F * l.C;
    Model *m = l.model = model_allocate(&c, l.N, 1, NULL);
    m->batch = make_batch(NULL, NULL, 1, c.seq, TRAIN_MODE, 1, 1, 0);
    l.x = m->acts.layer[0].h2;
    l.w = m->params.layer[0].dense_in;
    l.w2 = m->params.layer[0].dense_out;
    memcpy(l.x, take_normal(size, 1), size * sizeof(real));
    memcpy(l.w, take_normal(in, 2), in * sizeof(real));
    memcpy(l.w2, take_normal(out, 3), out * sizeof(real));
    l.g = take_normal(size, 4);
    l.out = take_reals(size);
    real *dw = m->grads.layer[0].dense_in, *dw2 = m->grads.layer[0].dense_out;
    real *dx = take_reals(size), *start_x = take_normal(size, 5), *start_in = take_normal(in, 6);
    real *start_out = take_normal(out, 7);

    // With any number of threads, and whatever is in the scratch memory: the same bits.
    for (int team = 0; team < TEAMS; team++) {
        set_threads(teams[team]);
        memcpy(dx, start_x, size * sizeof(real));
        memcpy(dw, start_in, in * sizeof(real));
        memcpy(dw2, start_out, out * sizeof(real));
        prepare_scratch(m, team == 0);
        dense_objective(&l);
        prepare_scratch(m, team == 0);
        dense_backward(m, 0, dx, l.g);
        uint64_t bits = bits_of(l.out, size, bits_of(dx, size, 0));
        assert_same_bits("dense", team, bits_of(dw, in, bits_of(dw2, out, bits)));
    }
    set_threads(1);

    // The same as one expert that has all tokens, added to what was there.
    int offset[2] = {0, l.N}, *choice = take_ints(l.N);
    for (int n = 0; n < l.N; n++)
        choice[n] = n;
    Experts one = take_experts(1, l.C, &l.F, &activation);
    real *hidden = take_reals(l.N * H), *answer = take_reals(size), *dx_rows = take_reals(size);
    plain_experts_forward(answer, hidden, take_reals(l.N * l.F), l.x, l.w, l.w2, NULL, offset, &one);
    plain_experts_backward(dx_rows, take_reals(l.N), start_in, start_out, l.g, l.x, hidden, take_filled(l.N, 1), l.w, l.w2,
                           NULL, choice, offset, &one);
    for (size_t i = 0; i < size; i++) {
        answer[i] += 1;
        dx_rows[i] += start_x[i];
    }
    assert_close("dense out", l.out, answer, size, rms(answer, size), 64 * EPSILON);
    assert_close("dense dx", dx, dx_rows, size, rms(dx_rows, size), 64 * EPSILON);
    assert_close("dense dw_in", dw, start_in, in, rms(start_in, in), 64 * EPSILON);
    assert_close("dense dw_out", dw2, start_out, out, rms(start_out, out), 64 * EPSILON);

    // Finite differences.
    memset(dx, 0, size * sizeof(real));
    memset(dw, 0, in * sizeof(real));
    memset(dw2, 0, out * sizeof(real));
    dense_objective(&l);
    dense_backward(m, 0, dx, l.g);
    check_slopes("dense dx", l.x, size, dx, dense_objective, &l, activation == RELU ? 0 : 30);
    check_slopes("dense dw_in", l.w, in, dw, dense_objective, &l, activation == RELU ? 0 : 30);
    check_slopes("dense dw_out", l.w2, out, dw2, dense_objective, &l, 30);
    model_free(m);
    free_taken();
}

void test_dense(void **state) {
    (void)state;
    for (int activation = SWIGLU; activation <= GELU; activation++)
        check_dense(activation);
}

void test_combine(void **state) {
    (void)state;
    uint64_t random = 1;
    for (int round = 0; round < (is_slow() ? 5 : 60); round++) {
        int N = round % 3 ? draw(&random, 1, 20) : draw(&random, 21, 300), K = draw(&random, 1, 8);
        int C = draw(&random, 1, round % 2 ? 35 : 300), count = draw(&random, 1, N * K);
        size_t size = (size_t)N * C;
        real *rows = take_normal((size_t)count * C, 1), *weight = round % 4 ? take_normal((size_t)N * K, 2) : NULL;
        real *start = take_normal(size, 3), *out = take_reals(size), *plain = take_reals(size);
        int *row = take_ints((size_t)N * K);
        for (int i = 0; i < N * K; i++)
            row[i] = draw(&random, -1 - count / 8, count - 1) < 0 ? -1 : draw(&random, 0, count - 1);
        for (int team = 0; team < TEAMS; team++) {
            set_threads(teams[team]);
            memcpy(out, start, size * sizeof(real));
            combine(out, rows, weight, row, N, K, C);
            assert_same_bits("combine", team, bits_of(out, size, 0));
        }
        set_threads(1);
        memcpy(plain, start, size * sizeof(real));
        plain_combine(plain, rows, weight, row, N, K, C);
        assert_close("combine", out, plain, size, K, 16 * EPSILON);
        free_taken();
    }
}

double weights_objective(void *arg) {
    Layer *l = (Layer *)arg;
    weights_forward(l->weight, l->x, l->index, l->N, l->E, l->K, l->gate, 2.5);
    return inner(l->weight, l->g, (size_t)l->N * l->K);
}

void test_weights(void **state) {
    (void)state;
    for (int gate = PROBABILITY; gate <= RENORMALIZED; gate++) {
        Layer l = empty_layer;
        l.N = 9;
        l.E = 7;
        l.K = 3;
        l.gate = gate;
        l.x = take_normal((size_t)l.N * l.E, 5);
        for (int n = 0; n < l.N; n++)
            softmax(l.x + n * l.E, l.E);
        l.g = take_normal((size_t)l.N * l.K, 6);
        l.weight = take_reals((size_t)l.N * l.K);
        l.index = take_ints((size_t)l.N * l.K);
        for (int i = 0; i < l.N * l.K; i++)
            l.index[i] = i % 11 == 10 ? -1 : (i / l.K + i % l.K * 2) % l.E; // here and there no choice
        real *dx = take_filled((size_t)l.N * l.E, 1);
        weights_objective(&l);
        for (int n = 0; n < l.N && gate == RENORMALIZED; n++)
            assert_near((double)(l.weight[n * 3] + l.weight[n * 3 + 1] + l.weight[n * 3 + 2]), 2.5, 3e-6);
        weights_backward(dx, l.g, l.weight, l.x, l.index, l.N, l.E, l.K, gate, 2.5);
        subtract_one(dx, (size_t)l.N * l.E);
        check_slopes(gate_names[gate], l.x, (size_t)l.N * l.E, dx, weights_objective, &l, 63);
        free_taken();
    }
}

double head_objective(void *arg) { // 0.7 times the sum of all nll
    Layer *l = (Layer *)arg;
    double sum = 0;
    head_loss(l->nll, NULL, NULL, l->x, l->w, l->targets, l->N, l->C, l->V, 0.7, l->logits, l->head_rows);
    for (int n = 0; n < l->N; n++)
        sum += 0.7 * (double)l->nll[n];
    return sum;
}

// The logits' standard deviation is about `spread`.
void check_head_loss(int N, int C, int V, int head_rows, double spread, int slopes) {
    Layer l = empty_layer;
    char what[64];
    l.N = N;
    l.C = C;
    l.V = V;
    l.head_rows = head_rows;
    size_t size = (size_t)N * C, w_size = (size_t)V * C;
    l.x = take_normal(size, 1);
    l.w = take_normal(w_size, 2);
    for (size_t i = 0; i < size; i++)
        l.x[i] *= (real)(spread / sqrt(C));
    l.targets = take_ints(N);
    random_tokens(l.targets, N, V, 3);
    l.targets[N / 2] = l.targets[0];
    l.targets[N - 1] = V - 1;
    l.nll = take_reals(N);
    l.logits = take_reals((size_t)head_rows * V);
    real *dx = take_reals(size), *dw = take_reals(w_size), *start = take_normal(w_size, 4), *alone = take_reals(N);
    real *nll = take_reals(N), *plain_dx = take_filled(size, (real)NAN), *plain_dw = take_reals(w_size);
    snprintf(what, sizeof(what), "head, N %d, C %d, V %d, rows %d, spread %g", N, C, V, head_rows, spread);
    for (size_t i = 0; i < w_size; i++)
        plain_dw[i] = start[i] *= (real)0.1;
    for (int team = 0; team < TEAMS; team++) {
        set_threads(teams[team]);
        fill(l.nll, N, (real)NAN);
        fill(dx, size, (real)NAN);
        fill(l.logits, (size_t)head_rows * V, (real)NAN);
        memcpy(dw, start, w_size * sizeof(real));
        head_loss(l.nll, dx, dw, l.x, l.w, l.targets, N, C, V, 0.7, l.logits, head_rows);
        uint64_t bits = bits_of(l.nll, N, bits_of(dx, size, bits_of(dw, w_size, 0)));
        fill(l.logits, (size_t)head_rows * V, (real)NAN);
        head_loss(alone, NULL, NULL, l.x, l.w, l.targets, N, C, V, 0.7, l.logits, head_rows);
        assert_same_bits(what, team, bits_of(alone, N, bits));
    }
    set_threads(1);
    plain_head_loss(nll, plain_dx, plain_dw, l.x, l.w, l.targets, N, C, V, 0.7);
    // As in attention: a logit is rounded to epsilon of itself and, being a sum of C terms, more than once. So is the
    // sum of V exponentials.
    double unsure = (16 + sqrt(V) + (8 + sqrt(C)) * spread) * EPSILON;
    assert_close(what, l.nll, nll, N, 1, unsure);
    assert_close(what, alone, nll, N, 1, unsure);
    assert_close("head dh", dx, plain_dx, size, 1, unsure);
    assert_close("head dhead", dw, plain_dw, w_size, rms(plain_dw, w_size) + spread / sqrt(C), unsure);
    if (slopes) {
        for (size_t i = 0; i < w_size; i++)
            dw[i] -= start[i];
        check_slopes(what, l.x, size, dx, head_objective, &l, 40);
        check_slopes(what, l.w, w_size, dw, head_objective, &l, 40);
    }
    free_taken();
}

void test_head_loss(void **state) {
    (void)state;
    const int rows[] = {13, 14, 5, 1}, widths[] = {1, 3, 6, 8, 16, 21, 33, 64};
    const int vocabs[] = {1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 50, 127, 129, 255, 257, 1000, 1900};
    uint64_t random = 1;
    for (int i = 0; i < 4; i++)
        check_head_loss(13, 6, 37, rows[i], 3, 1);
    for (int round = 0; round < (is_slow() ? 4 : 60); round++) {
        int N = draw(&random, 1, round % 3 ? 20 : 150), C = pick(&random, widths, 8);
        int V = pick(&random, vocabs, is_slow() ? 11 : 17);
        check_head_loss(N, C, V, draw(&random, 1, N + 2), round % 4 == 0 ? 1e4 : round % 4, 0);
    }
}

double embedding_objective(void *arg) {
    Layer *l = (Layer *)arg;
    embedding_forward(l->out, l->w, l->index, l->N, l->C);
    return inner(l->out, l->g, (size_t)l->N * l->C);
}

void check_embedding(int N, int C, int V, int slopes) {
    Layer l = empty_layer;
    l.N = N;
    l.C = C;
    l.V = V;
    size_t size = (size_t)V * C;
    l.w = take_normal(size, 1);
    l.g = take_normal((size_t)N * C, 2);
    l.out = take_reals((size_t)N * C);
    l.index = take_ints(N);
    random_tokens(l.index, N, max_int(V - 1, 1), 3); // the last one never, some several times
    real *dw = take_reals(size), *start = take_normal(size, 4), *plain = take_reals(size);
    for (int team = 0; team < TEAMS; team++) {
        set_threads(teams[team]);
        memcpy(dw, start, size * sizeof(real));
        embedding_backward(dw, l.g, l.index, N, C);
        assert_same_bits("embedding", team, bits_of(dw, size, 0));
    }
    set_threads(1);
    memcpy(plain, start, size * sizeof(real));
    plain_embedding_backward(plain, l.g, l.index, N, C, V);
    double terms = 1 + (double)N / V; // of a row, about; their sum is rounded like a product
    assert_close("embedding", dw, plain, size, terms, 16 * EPSILON);
    for (int c = 0; c < C && V > 1; c++)
        assert_true(dw[(V - 1) * C + c] == start[(V - 1) * C + c]);
    if (slopes) {
        for (size_t i = 0; i < size; i++)
            dw[i] -= start[i];
        check_slopes("embedding", l.w, size, dw, embedding_objective, &l, 55);
    }
    free_taken();
}

void test_embedding(void **state) {
    (void)state;
    check_embedding(40, 5, 11, 1);
    uint64_t random = 1;
    for (int round = 0; round < (is_slow() ? 3 : 40); round++)
        check_embedding(draw(&random, 1, 300), draw(&random, 1, 70), draw(&random, 1, round % 2 ? 20 : 500), 0);
}

double balance_objective(void *arg) {
    Layer *l = (Layer *)arg;
    return 0.7 * switch_form(l->x, l->index, l->N, l->E, l->group, NULL, 0);
}

void test_balance_backward(void **state) {
    (void)state;
    for (int group = 6; group <= 12; group += 6) {
        Layer l = empty_layer;
        l.N = 12;
        l.E = 5;
        l.group = group;
        l.x = take_normal((size_t)l.N * l.E, 1);
        l.index = take_ints((size_t)l.N / group * l.E);
        for (int i = 0; i < l.N / group * l.E; i++)
            l.index[i] = i * i % 7;
        real *dx = take_filled((size_t)l.N * l.E, 1);
        switch_form(l.x, l.index, l.N, l.E, group, dx, 0.7);
        subtract_one(dx, (size_t)l.N * l.E);
        check_slopes("balance", l.x, (size_t)l.N * l.E, dx, balance_objective, &l, 60);
        free_taken();
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The matrix product, exp and softmax

enum { GUARD = 12345 };

typedef struct ProductCase {
    Product p;
    real *start, *found, *wanted; // of the result's rows, with guards between them: before, ours, plain
    size_t size;
} ProductCase;

// A random operand with `outer` rows (or columns) and k terms for each. Numbers that do not belong to it, between its rows or in
// rows that no index names, are NaN: reading one of them would be seen in the result.
Operand random_operand(int outer, int k, uint64_t *state) {
    int row_is_k = draw(state, 0, 1), gather = draw(state, 0, 1);
    int rows = row_is_k ? k : outer, width = row_is_k ? outer : k, source = rows + (gather ? draw(state, 0, 3) : 0);
    size_t ld = (size_t)width + (draw(state, 0, 1) ? draw(state, 1, 5) : 0);
    real *p = take_filled(source ? ((size_t)source - 1) * ld + width : 0, (real)NAN);
    int *index = gather ? take_ints(rows) : NULL;
    uint64_t stream = hash64(*state);
    for (int r = 0; r < rows; r++) {
        size_t row = gather ? (size_t)(index[r] = draw(state, 0, source - 1)) : (size_t)r;
        for (int i = 0; i < width; i++)
            p[row * ld + i] = (real)(sqrt(3.0) * (2 * random_uniform(stream, row * ld + i) - 1));
    }
    return row_is_k ? along_columns(p, ld, index) : along_rows(p, ld, index);
}

void random_product(ProductCase *c, int m, int n, int k, int accumulate, uint64_t *state) {
    size_t ld = (size_t)n + (draw(state, 0, 1) || !n ? draw(state, 1, 5) : 0);
    Operand a = random_operand(m, k, state), b = random_operand(n, k, state);
    Product p = {NULL, ld, a, b, m, n, k};
    c->size = m ? (m - 1) * ld + n : 0;
    c->start = take_filled(c->size, GUARD);
    for (int i = 0; i < m; i++) {
        for (int j = 0; j < n; j++)
            c->start[i * ld + j] = (real)(accumulate ? random_normal(*state, i * n + j) : NAN);
    }
    c->found = take_reals(c->size);
    c->wanted = take_reals(c->size);
    c->p = p;
}

// How exact a product has to be. The partial sums of k random terms of size 1 grow to sqrt(k), and each of them is rounded by a
// third of an epsilon of its size. Together that is k/5 epsilons, and, once in a million results, k. Four times as much never
// happens, and a term that is lost, doubled or in the wrong place hardly ever makes less.
void check_product(const ProductCase *c) {
    const Product *p = &c->p;
    for (size_t i = 0; i < c->size; i++) {
        int row = (int)(i / p->ld), column = (int)(i % p->ld);
        double found = (double)c->found[i], wanted = (double)c->wanted[i];
        if (column < p->n && !(fabs(found - wanted) <= (4 * p->k + 16) * EPSILON))
            fail_msg("%d x %d x %d, a%s%s, b%s%s: [%d,%d] is %.9g, not %.9g", p->m, p->n, p->k,
                     p->a.row_is_k ? " by columns" : "", p->a.index ? " gathered" : "",
                     p->b.row_is_k ? " by columns" : "", p->b.index ? " gathered" : "", row, column, found, wanted);
        if (column >= p->n && found != GUARD)
            fail_msg("%d x %d x %d: wrote behind the columns of row %d", p->m, p->n, p->k, row);
    }
}

void check_products(ProductCase *cases, int count, int accumulate) {
    Product *list = (Product *)take(count, sizeof(Product));
    for (int team = 0; team < TEAMS; team++) {
        uint64_t bits = 0;
        set_threads(teams[team]);
        for (int i = 0; i < count; i++) {
            memcpy(cases[i].found, cases[i].start, cases[i].size * sizeof(real));
            list[i] = cases[i].p;
            list[i].out = cases[i].found;
        }
        if (count == 1 && list[0].ld == (size_t)list[0].n)
            product(list[0].out, list[0].a, list[0].b, list[0].m, list[0].n, list[0].k, accumulate);
        else
            products(list, count, accumulate);
        for (int i = 0; i < count; i++)
            bits = bits_of(cases[i].found, cases[i].size, bits);
        assert_same_bits("products", team, bits);
    }
    for (int i = 0; i < count; i++) {
        memcpy(cases[i].wanted, cases[i].start, cases[i].size * sizeof(real));
        list[i].out = cases[i].wanted;
    }
    plain_products(list, count, accumulate);
    set_threads(1);
    for (int i = 0; i < count; i++)
        check_product(&cases[i]);
    free_taken();
}

void test_products(void **state) {
    (void)state;
    const int sizes[] = {0,  1,   2,   3,   4,   5,   6,   7,   8,   9,   11,  12,  13,  15,  16,
                         17, 23,  24,  25,  31,  32,  33,  47,  48,  49,  63,  64,  65,  95,  96,
                         97, 127, 128, 129, 191, 193, 255, 256, 257, 300, 511, 512, 513, 700, 1030};
    const int size_count = (int)(sizeof(sizes) / sizeof(sizes[0]));
    uint64_t random = 1;
    for (int round = 0; round < (is_slow() ? 20 : 500); round++) {
        ProductCase cases[4];
        int count = round % 3 ? 1 : draw(&random, 0, 4), accumulate = draw(&random, 0, 1);
        for (int i = 0; i < count; i++) {
            int m, n, k;
            do {
                m = pick(&random, sizes, size_count);
                n = pick(&random, sizes, size_count);
                k = pick(&random, sizes, size_count);
            } while ((double)m * n * k > (is_slow() ? 1e5 : round % 20 == 1 ? 1e7 : 1e6));
            random_product(&cases[i], m, n, k, accumulate, &random);
        }
        check_products(cases, count, accumulate);
    }
}

// Many products at once, of different sizes, a third of them empty. They share out the rows, as in the experts' answers, or k, as
// in the gradients of their matrices.
void test_many_products(void **state) {
    (void)state;
    static ProductCase cases[300];
    const int counts[] = {2, 5, 8, 17, 64, 100, 300};
    uint64_t random = 2;
    for (int round = 0; round < (is_slow() ? 2 : 40); round++) {
        int count = pick(&random, counts, is_slow() ? 3 : 7), accumulate = round % 2, width = draw(&random, 1, 50);
        int large = draw(&random, 0, count - 1), other = draw(&random, 1, 50);
        for (int i = 0; i < count; i++) {
            int rows = draw(&random, 0, 2) ? draw(&random, 0, i == large ? 300 : 20) : 0;
            random_product(&cases[i], round / 2 % 2 ? other : rows, width, round / 2 % 2 ? rows : other, accumulate,
                           &random);
        }
        check_products(cases, count, accumulate);
    }
}

// A result of the lesson's plain loops and of dev/cpu for the same product, which has to be as exact as check_product says:
// numbers are of size 1, and k of them are summed.
void assert_product(const char *what, const real *found, const real *wanted, size_t n, int k) {
    assert_close(what, found, wanted, n, 1, (4 * k + 16) * EPSILON);
}

real *take_uniform(size_t n, uint64_t seed) { // of variance 1
    real *x = take_reals(n);
    for (size_t i = 0; i < n; i++)
        x[i] = (real)(sqrt(3.0) * (2 * random_uniform(hash64(seed), i) - 1));
    return x;
}

// matmul, matmul_dx and matmul_dw of dev/cpu against the lesson's.
void check_matmul(int N, int I, int O, int add, uint64_t seed) {
    size_t nx = (size_t)N * I, nw = (size_t)O * I, no = (size_t)N * O;
    real *x = take_uniform(nx, seed), *w = take_uniform(nw, seed + 1), *dout = take_uniform(no, seed + 2);
    real *start_o = take_normal(no, seed + 3), *start_x = take_normal(nx, seed + 4), *start_w = take_normal(nw, seed + 5);
    real *out[2] = {take_reals(no), take_reals(no)}, *dx[2] = {take_reals(nx), take_reals(nx)};
    real *dw[2] = {take_reals(nw), take_reals(nw)};
    for (int team = 0; team <= TEAMS; team++) { // the last time by plain loops
        int plain = team == TEAMS;
        set_threads(teams[team % TEAMS]);
        memcpy(out[plain], add == ADD ? start_o : take_filled(no, (real)NAN), no * sizeof(real));
        memcpy(dx[plain], add == ADD ? start_x : take_filled(nx, (real)NAN), nx * sizeof(real));
        memcpy(dw[plain], start_w, nw * sizeof(real));
        if (plain) {
            matmul(out[1], x, w, N, I, O, add);
            matmul_dx(dx[1], dout, w, N, I, O, add);
            matmul_dw(dw[1], dout, x, N, I, O);
        } else {
            fast_matmul(out[0], x, w, N, I, O, add);
            fast_matmul_dx(dx[0], dout, w, N, I, O, add);
            fast_matmul_dw(dw[0], dout, x, N, I, O);
            assert_same_bits("matmul", team, bits_of(out[0], no, bits_of(dx[0], nx, bits_of(dw[0], nw, 0))));
        }
    }
    set_threads(1);
    assert_product("matmul", out[0], out[1], no, I);
    assert_product("matmul_dx", dx[0], dx[1], nx, O);
    assert_product("matmul_dw", dw[0], dw[1], nw, N);
    free_taken();
}

// The grouped ones, with experts of any width, some of which have no rows. Bits 1 and 2 of by_token: x, dout are read by
// token.
void check_grouped(int E, int tokens, int by_token, uint64_t *random) {
    int *offset = take_ints(E + 1), *I = take_ints(E), *O = take_ints(E), most = 0;
    size_t nw = 0, nx = 0, no = 0, wide_x = 0, wide_o = 0;
    for (int e = 0; e < E; e++) {
        int rows = draw(random, 0, 2) ? draw(random, 0, 40) : 0;
        I[e] = by_token & 1 && e ? I[0] : draw(random, 1, 40); // what is read by token is as wide for all experts
        O[e] = by_token & 2 && e ? O[0] : draw(random, 1, 40);
        offset[e + 1] = offset[e] + rows;
        most = max_int(most, max_int(rows, max_int(I[e], O[e])));
        nw += (size_t)I[e] * O[e];
        nx += (size_t)rows * I[e];
        no += (size_t)rows * O[e];
    }
    wide_x = by_token & 1 ? (size_t)tokens * I[0] : nx;
    wide_o = by_token & 2 ? (size_t)tokens * O[0] : no;
    int *token = take_ints(offset[E]);
    for (int r = 0; r < offset[E]; r++)
        token[r] = draw(random, 0, tokens - 1);
    const int *x_token = by_token & 1 ? token : NULL, *o_token = by_token & 2 ? token : NULL;
    real *x = take_uniform(wide_x, 1), *w = take_uniform(nw, 2), *dout = take_uniform(wide_o, 3), *start = take_normal(nw, 4);
    real *out[2] = {take_reals(no), take_reals(no)}, *dx[2] = {take_reals(nx), take_reals(nx)};
    real *dw[2] = {take_reals(nw), take_reals(nw)};
    for (int team = 0; team <= TEAMS; team++) {
        int plain = team == TEAMS;
        set_threads(teams[team % TEAMS]);
        fill(out[plain], no, (real)NAN);
        fill(dx[plain], nx, (real)NAN);
        memcpy(dw[plain], start, nw * sizeof(real));
        if (plain) {
            grouped_matmul(out[1], x, x_token, w, offset, E, I, O);
            grouped_matmul_dx(dx[1], dout, o_token, w, offset, E, I, O);
            grouped_matmul_dw(dw[1], dout, o_token, x, x_token, offset, E, I, O);
        } else {
            fast_grouped_matmul(out[0], x, x_token, w, offset, E, I, O);
            fast_grouped_matmul_dx(dx[0], dout, o_token, w, offset, E, I, O);
            fast_grouped_matmul_dw(dw[0], dout, o_token, x, x_token, offset, E, I, O);
            assert_same_bits("grouped", team, bits_of(out[0], no, bits_of(dx[0], nx, bits_of(dw[0], nw, 0))));
        }
    }
    set_threads(1);
    assert_product("grouped_matmul", out[0], out[1], no, most);
    assert_product("grouped_matmul_dx", dx[0], dx[1], nx, most);
    assert_product("grouped_matmul_dw", dw[0], dw[1], nw, most);
    free_taken();
}

void test_matmul(void **state) {
    (void)state;
    const int sizes[] = {1, 2, 5, 6, 7, 12, 13, 31, 32, 33, 48, 49, 97, 129, 257};
    uint64_t random = 3;
    for (int round = 0; round < (is_slow() ? 4 : 60); round++) {
        int N = pick(&random, sizes, is_slow() ? 8 : 15), I = pick(&random, sizes, is_slow() ? 8 : 15);
        check_matmul(N, I, pick(&random, sizes, 12), round % 2 ? ADD : SET, random);
    }
    for (int round = 0; round < (is_slow() ? 4 : 60); round++)
        check_grouped(draw(&random, 1, round % 5 ? 9 : 60), draw(&random, 1, 50), round % 4, &random);
}

// Sums of squares of either size, and of a number of numbers that is no multiple of anything.
void test_sum_of_squares(void **state) {
    (void)state;
    const int sizes[] = {0, 1, 15, 16, 17, 1000, 16383, 16384, 16385, 50000};
    for (int i = 0; i < 10; i++) {
        real *x = take_normal(sizes[i], (uint64_t)i);
        double wanted = sum_of_squares(x, sizes[i]);
        assert_near(wanted, inner(x, x, sizes[i]), 1e-15);
        for (int team = 0; team < TEAMS; team++) {
            set_threads(teams[team]);
            double found = fast_sum_of_squares(x, sizes[i]);
            uint64_t bits;
            memcpy(&bits, &found, sizeof(bits));
            assert_same_bits("sum of squares", team, bits);
            assert_near(found / fmax(wanted, 1e-9), wanted > 0, 1e-13);
        }
        set_threads(1);
        free_taken();
    }
}

double exp_of(double x) { // the first lane of vec_exp
    vec v = {0};
    v += (real)x;
    v = vec_exp(v);
    return (double)v[0];
}

void test_exp(void **state) {
    (void)state;
    for (double x = -87; x <= 88; x += is_slow() ? 1.7 : 0.00171) {
        double wanted = exp((double)(real)x);
        if (!(fabs(exp_of(x) - wanted) <= (IS_DOUBLE ? 1e-15 : 3e-7) * wanted))
            fail_msg("exp(%.9g) is %.9g, not %.9g", x, exp_of(x), wanted);
    }
    assert_true(exp_of(0) == 1);
    const double low[] = {-87.5, -100, -1e4, -1e30, -INFINITY}, high[] = {88.5, 100, 1e30};
    for (int i = 0; i < 5; i++)
        assert_true(exp_of(low[i]) >= 0 && exp_of(low[i]) < 2e-38);
    for (int i = 0; i < 3; i++)
        assert_true(exp_of(high[i]) > 1e38);
    assert_true(isnan(exp_of(NAN)));
}

void test_softmax(void **state) {
    (void)state;
    const double scales[] = {1, 30, 1e4, 1e30}, shifts[] = {0, 1e4, -1e4};
    for (int i = 0; i < (is_slow() ? 40 : 140); i++) {
        int n = i < 136 ? i + 1 : 500 * (i - 134) + 33;
        real *row = take_reals(n), *plain = take_reals(n), *x = take_normal(n, (uint64_t)i);
        if (i % 3)
            x[i % 3 == 1 ? n - 1 : 0] = 4; // the top at either end
        for (int j = 0; j < 12; j++) {
            for (int k = 0; k < n; k++)
                plain[k] = row[k] = (real)((double)x[k] * scales[j % 4] + shifts[j / 4]);
            real lse = fast_softmax(row, n), plain_lse = softmax(plain, n);
            assert_close("softmax's log of the sum", &lse, &plain_lse, 1, 1, 4 * EPSILON);
            assert_close("softmax", row, plain, n, rms(plain, n), (16 + 2 * sqrt(n)) * EPSILON);
        }
        free_taken();
    }
    real bad[5] = {0, 1, (real)NAN, 2, 3}, worse[5] = {0, 1, (real)NAN, 2, 3}; // a NaN must not hide
    assert_true(isnan(fast_softmax(bad, 5)) && isnan(bad[0]));
    assert_true(isnan(softmax(worse, 5)) && isnan(worse[0]));
}

// Rows of 1 to 300 numbers, fewer and more than a vector has lanes; some of them have a number that is none.
void test_softmax_rows(void **state) {
    (void)state;
    const int widths[] = {1, 2, 3, 5, 8, 16, 17, 64, 128, 129, 300};
    for (int i = 0; i < COUNT(widths) * 4; i++) {
        int n = widths[i / 4], rows = i % 4 * 15 + 1; // 1, 16, 31, 46
        size_t size = (size_t)rows * n;
        real *x = take_normal(size, (uint64_t)i), *p = take_reals(size), *plain = take_reals(size);
        real *lse = take_filled(rows, GUARD), *plain_lse = take_reals(rows);
        for (size_t j = 0; j < size; j++)
            x[j] *= (real)(j / n % 3 == 2 ? 1e4 : 3);
        if (rows > 1)
            x[size / 2] = (real)(i % 2 ? NAN : INFINITY);
        int bad = rows > 1 ? (int)(size / 2) / n : -1;
        memcpy(plain, x, size * sizeof(real));
        for (int row = 0; row < rows; row++)
            plain_lse[row] = softmax(plain + (size_t)row * n, n);
        for (int team = 0; team < TEAMS; team++) {
            set_threads(teams[team]);
            memcpy(p, x, size * sizeof(real));
            fast_softmax_rows(p, lse, rows, n);
            assert_same_bits("softmax_rows", team, bits_of(p, size, bits_of(lse, rows, 0)));
        }
        for (int row = 0; row < rows; row++) {
            if (row == bad) {
                assert_true(isnan(lse[row]) && isnan(p[(size_t)row * n]) && isnan(plain_lse[row]));
                continue;
            }
            assert_close("log of the sum", lse + row, plain_lse + row, 1, 1 + fabs((double)plain_lse[row]), 4 * EPSILON);
            assert_close("softmax", p + (size_t)row * n, plain + (size_t)row * n, n, rms(plain + (size_t)row * n, n),
                         (16 + 2 * sqrt(n)) * EPSILON);
        }
        free_taken();
    }
    set_threads(1);
}

// The same experts as the plain loop finds, where many scores are equal and some are no numbers.
void test_topk_in_lanes(void **state) {
    (void)state;
    const int counts[] = {1, 2, 3, 8, 16, 31, 128, 129};
    uint64_t random = 1;
    for (int i = 0; i < COUNT(counts) * 8; i++) {
        int E = counts[i / 8], K = draw(&random, 1, E < 6 ? E : 6), N = draw(&random, 1, 70);
        real *p = take_reals((size_t)N * E);
        int *found = take_ints((size_t)N * K), *wanted = take_ints((size_t)N * K);
        for (int j = 0; j < N * E; j++)
            p[j] = (real)(i % 2 ? draw(&random, -2, 2) : draw(&random, 0, 1000000) * 1e-6);
        for (int j = 0; j < N * E && i % 4 == 3; j += 7)
            p[j] = (real)(j % 3 ? NAN : j % 2 ? INFINITY : -INFINITY);
        select_topk(wanted, p, N, E, K);
        fast_select_topk(found, p, N, E, K);
        assert_memory_equal(found, wanted, (size_t)N * K * sizeof(int));
        free_taken();
    }
}

// Products that are planned together: nothing is done before the end, each sets or adds as it was asked to, and the bits are
// those of the same products one by one.
void test_planned_products(void **state) {
    (void)state;
    enum { N = 70, I = 40, O = 90, E = 3 };
    const int offset[E + 1] = {0, 30, 30, 70}, in[E] = {I, I, I}, out[E] = {O, O, O};
    real *x = take_normal(N * I, 1), *dout = take_normal(N * O, 2), *w = take_normal(E * O * I, 3);
    real *dx[2], *dw[2], *rows[2], *few[2];
    for (int together = 0; together < 2; together++) {
        dx[together] = take_normal(N * I, 4);
        dw[together] = take_normal(E * O * I, 5);
        rows[together] = take_normal(N * I, 6);
        few[together] = take_normal(N * 5, 7);
        set_threads(together ? 3 : 1);
        if (together)
            fast_begin_products();
        fast_matmul_dx(dx[together], dout, w, N, I, O, ADD);
        fast_grouped_matmul_dw(dw[together], dout, NULL, x, NULL, offset, E, in, out);
        fast_grouped_matmul_dx(rows[together], dout, NULL, w, offset, E, in, out);
        fast_matmul(few[together], x, w, N, I, 5, SET);
        if (together) {
            real *before = take_normal(N * I, 4);
            assert_memory_equal(dx[1], before, N * I * sizeof(real));
            fast_end_products();
        }
    }
    set_threads(1);
    assert_memory_equal(dx[0], dx[1], N * I * sizeof(real));
    assert_memory_equal(dw[0], dw[1], E * O * I * sizeof(real));
    assert_memory_equal(rows[0], rows[1], N * I * sizeof(real));
    assert_memory_equal(few[0], few[1], N * 5 * sizeof(real));
    fast_matmul(dx[0], dout, w, 4, O, 2, SET); // and after the end, each is done at once again
    fast_matmul(dx[1], dout, w, 4, O, 2, SET);
    assert_memory_equal(dx[0], dx[1], 8 * sizeof(real));
    free_taken();
}

// Both gradients of a product are those of the two functions that take one each, alone and between begin_products() and
// end_products(), of which the outermost pair counts.
void test_matmul_backward(void **state) {
    (void)state;
    enum { N = 50, I = 40, O = 70 };
    real *x = take_normal(N * I, 1), *dout = take_normal(N * O, 2), *w = take_normal(O * I, 3), *start = take_normal(N * I, 4);
    for (int add = SET; add <= ADD; add++) {
        real *dx = take_normal(N * I, 4), *dw = take_normal(O * I, 5);
        fast_matmul_dx(dx, dout, w, N, I, O, add);
        fast_matmul_dw(dw, dout, x, N, I, O);
        for (int together = 0; together < 2; together++) {
            real *found_dx = take_normal(N * I, 4), *found_dw = take_normal(O * I, 5);
            set_threads(1 + 2 * together);
            if (together)
                fast_begin_products();
            fast_matmul_backward(found_dx, found_dw, dout, x, w, N, I, O, add);
            if (together) {
                assert_memory_equal(found_dx, start, N * I * sizeof(real)); // nothing is done yet
                fast_end_products();
            }
            assert_memory_equal(found_dx, dx, N * I * sizeof(real));
            assert_memory_equal(found_dw, dw, O * I * sizeof(real));
        }
        real *plain_dx = take_normal(N * I, 4), *plain_dw = take_normal(O * I, 5);
        matmul_backward(plain_dx, plain_dw, dout, x, w, N, I, O, add);
        assert_close("dx", dx, plain_dx, N * I, sqrt(O), 4 * EPSILON);
        assert_close("dw", dw, plain_dw, O * I, sqrt(N), 4 * EPSILON);
    }
    set_threads(1);
    free_taken();
}

// The scores in lanes are those of the lesson's loop: softmax but for rounding, with lse, and sigmoid to the bit.
void test_scores_in_lanes(void **state) {
    (void)state;
    const int counts[] = {1, 3, 8, 17, 128, 129};
    for (int i = 0; i < COUNT(counts); i++) {
        int E = counts[i], N = 37;
        size_t size = (size_t)N * E;
        real *logits = take_normal(size, (uint64_t)i), *p = take_reals(size), *wanted = take_reals(size);
        real *lse = take_filled(N, GUARD), *wanted_lse = take_filled(N, GUARD);
        fast_scores_forward(p, lse, logits, N, E, SOFTMAX);
        memcpy(wanted, logits, size * sizeof(real));
        for (int row = 0; row < N; row++) {
            wanted_lse[row] = softmax(wanted + (size_t)row * E, E);
        }
        assert_close("softmax", p, wanted, size, rms(wanted, size), (16 + 2 * sqrt(E)) * EPSILON);
        assert_close("log of the sum", lse, wanted_lse, N, 1 + log(E), 8 * EPSILON);
        memcpy(wanted_lse, lse, N * sizeof(real));
        fast_scores_forward(p, lse, logits, N, E, SIGMOID);
        for (size_t j = 0; j < size; j++) {
            wanted[j] = (real)(1 / (1 + exp(-(double)logits[j])));
        }
        assert_close("sigmoid", p, wanted, size, 1, 4 * EPSILON);
        assert_memory_equal(lse, wanted_lse, N * sizeof(real));
        free_taken();
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_attention),
        cmocka_unit_test(test_activation),
        cmocka_unit_test(test_experts),
        cmocka_unit_test(test_experts_in_order),
        cmocka_unit_test(test_dense),
        cmocka_unit_test(test_combine),
        cmocka_unit_test(test_weights),
        cmocka_unit_test(test_head_loss),
        cmocka_unit_test(test_embedding),
        cmocka_unit_test(test_balance_backward),
        cmocka_unit_test(test_products),
        cmocka_unit_test(test_many_products),
        cmocka_unit_test(test_matmul),
        cmocka_unit_test(test_sum_of_squares),
        cmocka_unit_test(test_exp),
        cmocka_unit_test(test_softmax),
        cmocka_unit_test(test_softmax_rows),
        cmocka_unit_test(test_topk_in_lanes),
        cmocka_unit_test(test_planned_products),
        cmocka_unit_test(test_matmul_backward),
        cmocka_unit_test(test_scores_in_lanes),
    };
    begin_tests();
    return cmocka_run_group_tests_name("layers", tests, NULL, scratch_done);
}
