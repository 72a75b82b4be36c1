// The LSTM (dev/mixers/lstm.h): the fast loops over time against the plain ones in many sizes and with several numbers of
// threads, finite differences, PyTorch's values, one step at a time against the whole sequence, and long generated texts.

#include "dev/test/trainer.h"
#include "dev/test/model.h"
#include "dev/test/both.h"
#include "dev/test/slopes.h"
#include "dev/test/lstm_golden.h"

// A layer with everything that its functions read and write. The objective is inner(out, g).
typedef struct LstmCase {
    int B, T, C, M, P;
    LstmWeights w, dw;
    LstmActs a;
    real *x, *g, *out, *dx, *dz, *dr;
} LstmCase;

LstmWeights take_lstm_weights(const LstmCase *k, uint64_t seed) {
    size_t M = (size_t)k->M, P = (size_t)k->P, C = (size_t)k->C;
    LstmWeights w = {take_normal(4 * M * C, seed), take_normal(4 * M * P, seed + 1), take_normal(4 * M, seed + 2),
                     k->M == k->P ? NULL : take_normal(P * M, seed + 3)};
    return w;
}

LstmCase take_lstm(int B, int T, int C, int M, int P) {
    LstmCase k;
    memset(&k, 0, sizeof(k));
    k.B = B;
    k.T = T;
    k.C = C;
    k.M = M;
    k.P = P;
    size_t N = (size_t)B * T;
    k.w = take_lstm_weights(&k, 1);
    k.dw = take_lstm_weights(&k, 5);
    for (size_t i = 0; i < (size_t)4 * M * C; i++)
        k.w.in[i] *= (real)(1 / sqrt(C));
    for (size_t i = 0; i < (size_t)4 * M * P; i++)
        k.w.state[i] *= (real)(1.5 / sqrt(P));
    for (size_t i = 0; k.w.proj && i < (size_t)P * M; i++)
        k.w.proj[i] *= (real)(1.5 / sqrt(M));
    LstmActs a = {take_reals(N * 4 * M), take_reals(N * M), take_reals(N * P), k.w.proj ? take_reals(N * M) : NULL};
    k.a = a;
    k.x = take_normal(N * C, 10);
    k.g = take_normal(N * P, 11);
    k.out = take_reals(N * P);
    k.dx = take_reals(N * C);
    k.dz = take_reals(N * 4 * M);
    k.dr = k.w.proj ? take_reals(N * P) : NULL;
    return k;
}

// Whatever is written is NaN before it.
void spoil_lstm(const LstmCase *k) {
    size_t N = (size_t)k->B * k->T;
    fill(k->a.cell, N * k->M, (real)NAN);
    fill(k->a.before, N * k->P, (real)NAN);
    fill(k->dz, N * 4 * k->M, (real)NAN);
    if (k->w.proj) {
        fill(k->a.hidden, N * k->M, (real)NAN);
        fill(k->dr, N * k->P, (real)NAN);
    }
}

uint64_t lstm_bits(const LstmCase *k, uint64_t bits) {
    size_t N = (size_t)k->B * k->T;
    bits = bits_of(k->out, N * k->P, bits_of(k->a.gates, N * 4 * k->M, bits_of(k->a.cell, N * k->M, bits)));
    bits = bits_of(k->a.before, N * k->P, bits_of(k->dz, N * 4 * k->M, bits_of(k->dw.bias, 4 * k->M, bits)));
    return k->w.proj ? bits_of(k->a.hidden, N * k->M, bits_of(k->dr, N * k->P, bits)) : bits;
}

// ---- fast against plain

void compare_lstm(int B, int T, int M, int P) {
    size_t N = (size_t)B * T, Z = N * 4 * M;
    LstmCase fast = take_lstm(B, T, 3, M, P), plain = take_lstm(B, T, 3, M, P);
    real *z = take_normal(Z, 20), *bias = take_normal(4 * M, 7), *before = take_normal(N * P, 21);
    char what[80];
    snprintf(what, sizeof(what), "lstm, B %d, T %d, M %d, P %d", B, T, M, P);
    for (int team = 0; team < TEAMS; team++) {
        set_threads(teams[team]);
        spoil_lstm(&fast);
        memcpy(fast.a.gates, z, Z * sizeof(real));
        memcpy(fast.out, before, N * P * sizeof(real)); // it is added to
        memcpy(fast.dw.bias, bias, (size_t)4 * M * sizeof(real));
        fast_lstm_recur(fast.out, &fast.a, &fast.w, B, T, M, P);
        fast_lstm_recur_backward(fast.dz, fast.dr, fast.dw.bias, fast.g, &fast.a, &fast.w, B, T, M, P);
        assert_same_bits(what, team, lstm_bits(&fast, 0));
    }
    set_threads(1);
    spoil_lstm(&plain);
    memcpy(plain.a.gates, z, Z * sizeof(real));
    memcpy(plain.out, before, N * P * sizeof(real));
    memcpy(plain.dw.bias, bias, (size_t)4 * M * sizeof(real));
    lstm_recur(plain.out, &plain.a, &plain.w, B, T, M, P);
    lstm_recur_backward(plain.dz, plain.dr, plain.dw.bias, plain.g, &plain.a, &plain.w, B, T, M, P);

    // A small error of one step is an error of what the next one reads; it grows by no more than the largest singular value
    // of what a step does to the state, which with these weights is about 1.
    double tolerance = 8 * (4 + T) * EPSILON;
    assert_close(what, fast.a.gates, plain.a.gates, Z, 1, tolerance);
    assert_close(what, fast.a.cell, plain.a.cell, N * M, 1, tolerance);
    assert_close(what, fast.a.before, plain.a.before, N * P, 1, tolerance);
    assert_close(what, fast.out, plain.out, N * P, 1, tolerance);
    assert_close(what, fast.dz, plain.dz, Z, 1 + rms(plain.dz, Z), tolerance);
    assert_close(what, fast.dw.bias, plain.dw.bias, 4 * M, 1 + rms(plain.dw.bias, 4 * M), 4 * tolerance);
    if (fast.w.proj) {
        assert_close(what, fast.a.hidden, plain.a.hidden, N * M, 1, tolerance);
        assert_close(what, fast.dr, plain.dr, N * P, 1 + rms(plain.dr, N * P), tolerance);
    }
    free_taken();
}

void test_lstm_fast(void **state) {
    (void)state;
    const int widths[] = {1, 2, 7, 8, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 129, 160};
    uint64_t random = 1;
    compare_lstm(1, 1, 1, 1);
    compare_lstm(0, 5, 9, 9); // of several processes, one may have no sequence
    compare_lstm(8, 3, 330, 330);
    compare_lstm(1, 9, 130, 70); // teams of all threads
    compare_lstm(2, 9, 70, 70);
    for (int round = 0; round < (is_slow() ? 4 : 60); round++) {
        int M = pick(&random, widths, is_slow() ? 8 : 16), P = round % 2 ? M : pick(&random, widths, is_slow() ? 8 : 16);
        compare_lstm(draw(&random, 1, round % 4 ? 9 : 33), draw(&random, 1, 12), M, P);
    }
}

// tanh keeps its digits near 0, too, where e^x - 1 would have lost them.
void test_tanh(void **state) {
    (void)state;
    for (int i = -4000; i <= 4000; i += is_slow() ? 97 : 1) {
        double x = i % 2 ? i * 0.003 : copysign(pow(10, -abs(i) / 300.0), i), wanted = tanh((double)(real)x);
        vec v = {0};
        v += (real)x;
        if (!(fabs((double)vec_tanh(v)[LANES - 1] - wanted) <= (IS_DOUBLE ? 1e-15 : 4e-7) * fabs(wanted)))
            fail_msg("tanh(%.9g) is %.9g, not %.9g", x, (double)vec_tanh(v)[LANES - 1], wanted);
    }
    const real ends[] = {(real)-INFINITY, (real)-1e30, (real)-20, 0, 20, (real)1e30, (real)INFINITY};
    for (int i = 0; i < 7; i++) {
        vec v = {0};
        v += ends[i];
        assert_near((double)vec_tanh(v)[0], i == 3 ? 0 : i < 3 ? -1 : 1, 2 * EPSILON);
    }
    vec none = {0};
    none += (real)NAN;
    assert_true(isnan(vec_tanh(none)[0]));
}

// ---- a layer

double lstm_objective(void *arg) {
    const LstmCase *k = (const LstmCase *)arg;
    size_t size = (size_t)k->B * k->T * k->P;
    memset(k->out, 0, size * sizeof(real));
    lstm_forward(k->out, &k->a, k->x, &k->w, k->B, k->T, k->C, k->M, k->P);
    return inner(k->out, k->g, size);
}

void clear_lstm_gradients(const LstmCase *k) {
    size_t M = (size_t)k->M, P = (size_t)k->P, C = (size_t)k->C;
    memset(k->dw.in, 0, 4 * M * C * sizeof(real));
    memset(k->dw.state, 0, 4 * M * P * sizeof(real));
    memset(k->dw.bias, 0, 4 * M * sizeof(real));
    memset(k->dw.proj ? k->dw.proj : k->dx, 0, k->dw.proj ? P * M * sizeof(real) : 0);
}

void test_lstm_gradients(void **state) {
    (void)state;
    const int sizes[][5] = {{3, 5, 4, 6, 6}, {2, 7, 5, 3, 5}, {1, 9, 6, 20, 6}, {5, 2, 1, 1, 1}};
    for (int i = 0; i < COUNT(sizes); i++) {
        LstmCase k = take_lstm(sizes[i][0], sizes[i][1], sizes[i][2], sizes[i][3], sizes[i][4]);
        size_t N = (size_t)k.B * k.T, M = (size_t)k.M, P = (size_t)k.P, C = (size_t)k.C;
        clear_lstm_gradients(&k);
        lstm_objective(&k);
        lstm_backward(k.dx, &k.dw, k.dz, k.dr, k.g, &k.a, k.x, &k.w, k.B, k.T, k.C, k.M, k.P);
        check_slopes("x", k.x, N * C, k.dx, lstm_objective, &k, 30);
        check_slopes("lstm_in", k.w.in, 4 * M * C, k.dw.in, lstm_objective, &k, 30);
        check_slopes("lstm_state", k.w.state, 4 * M * P, k.dw.state, lstm_objective, &k, 30);
        check_slopes("lstm_bias", k.w.bias, 4 * M, k.dw.bias, lstm_objective, &k, 30);
        if (k.w.proj)
            check_slopes("lstm_proj", k.w.proj, P * M, k.dw.proj, lstm_objective, &k, 30);
        free_taken();
    }
}

// At evaluation a process may have no window: a layer of no sequence does nothing.
void test_lstm_no_tokens(void **state) {
    (void)state;
    LstmCase k = take_lstm(0, 5, 4, 6, 3);
    assert_true(lstm_objective(&k) == 0);
    lstm_backward(k.dx, &k.dw, k.dz, k.dr, k.g, &k.a, k.x, &k.w, k.B, k.T, k.C, k.M, k.P);
    free_taken();
}

// Numbers of tensor `tensor` of dev/test/lstm.py, times scale.
void golden_lstm_fill(real *to, size_t n, uint32_t tensor, double scale) {
    for (size_t i = 0; i < n; i++)
        to[i] = (real)(scale * (golden_hash(tensor * 1000003u + (uint32_t)i) / 4294967296.0 - 0.5));
}

void check_lstm_golden(const LstmGolden *g) {
    LstmCase k = take_lstm(g->B, g->T, g->C, g->M, g->P);
    size_t N = (size_t)k.B * k.T, M = (size_t)k.M, P = (size_t)k.P, C = (size_t)k.C;
    golden_lstm_fill(k.w.in, 4 * M * C, 0, 2);
    golden_lstm_fill(k.w.state, 4 * M * P, 1, 2);
    golden_lstm_fill(k.w.bias, 4 * M, 2, 2);
    if (k.w.proj)
        golden_lstm_fill(k.w.proj, P * M, 3, 2);
    golden_lstm_fill(k.x, N * C, 10, 4);
    golden_lstm_fill(k.g, N * P, 11, 1);
    clear_lstm_gradients(&k);
    lstm_objective(&k);
    real *last = take_reals(k.B * M);
    for (int b = 0; b < k.B; b++)
        memcpy(last + b * M, k.a.cell + ((size_t)(b + 1) * k.T - 1) * M, M * sizeof(real));
    lstm_backward(k.dx, &k.dw, k.dz, k.dr, k.g, &k.a, k.x, &k.w, k.B, k.T, k.C, k.M, k.P);
    const real *found[] = {k.out, last, k.dx, k.dw.in, k.dw.state, k.dw.bias, k.dw.proj};
    const size_t sizes[] = {N * P, k.B * M, N * C, 4 * M * C, 4 * M * P, 4 * M, P * M};
    double tolerance = IS_DOUBLE ? 1e-12 : 2e-6;
    for (int i = 0; i < g->count; i++) {
        const LstmGoldenArray *a = &g->list[i];
        size_t n = sizes[i], at[5] = {0, n / 4, n / 2, 3 * n / 4, n - 1};
        assert_int_equal(n, a->size);
        assert_near(sqrt(inner(found[i], found[i], n)), a->norm, tolerance);
        for (int j = 0; j < 5; j++)
            assert_near((double)found[i][at[j]], a->sample[j], tolerance);
    }
    free_taken();
}

void test_lstm_golden(void **state) {
    (void)state;
    for (int i = 0; i < COUNT(lstm_golden); i++)
        check_lstm_golden(&lstm_golden[i]);
}

// One token at a time gives what the whole sequence gives.
void test_lstm_steps(void **state) {
    (void)state;
    for (int projected = 0; projected < 2; projected++) {
        LstmCase k = take_lstm(1, 20, 9, projected ? 30 : 18, 18);
        real *out = take_normal(k.P, 1), *r = take_reals(k.P), *cell = take_reals(k.M), *work = take_reals(5 * k.M);
        lstm_objective(&k);
        for (int t = 0; t < k.T; t++) {
            memset(out, 0, k.P * sizeof(real));
            lstm_step(out, r, cell, work, k.x + t * k.C, &k.w, k.C, k.M, k.P);
            assert_close("out of a step", out, k.out + t * k.P, k.P, 1, 64 * EPSILON);
            assert_close("cell of a step", cell, k.a.cell + t * k.M, k.M, 1, 64 * EPSILON);
        }
        free_taken();
    }
}

// ---- in the model

// A generated text remembers its beginning, however long it is: it goes on as the whole of it does in one sequence.
void test_lstm_long_text(void **state) {
    (void)state;
    enum { LONG = 50 };
    for (int i = 0; i < 2; i++) {
        Config c = small_config("shazeer-lstm");
        set_options(&c, i ? "--cell 23" : "--norms 1 --last-feed 1");
        int tokens[LONG], V = c.vocab;
        random_tokens(tokens, LONG, V, 1);
        assert_true(c.seq < LONG);
        Model *m = model_allocate(&c, LONG, 1, NULL);
        randomize_weights(m);
        real *wanted = take_reals((size_t)LONG * V), *logits = take_reals(V);
        run_batch(m, tokens, tokens, 1, LONG, EVAL_MODE, 1, 0, 0);
        all_logits(m, wanted, LONG);
        for (int again = 0; again < 2; again++) {
            for (int t = 0; t < LONG; t++) {
                model_generate(m, tokens[t], t, logits);
                assert_close("logits", logits, wanted + (size_t)t * V, V, 1, IS_DOUBLE ? 1e-11 : 1e-4);
            }
        }
        model_free(m);
        free_taken();
    }
}

// The first weights: the forget gate's bias is 1, the other biases are 0.
void test_lstm_init(void **state) {
    (void)state;
    Config c = small_config("shazeer-lstm");
    set_options(&c, "--cell 10");
    Model *m = model_allocate(&c, 16, 1, NULL);
    model_init(m, NULL);
    for (int l = 0; l < c.layers; l++) {
        const real *bias = layer_tensor(m, l, "lstm_bias", WEIGHTS);
        for (int j = 0; j < 40; j++)
            assert_true(bias[j] == (j / 10 == 1));
    }
    model_free(m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lstm_fast),  cmocka_unit_test(test_tanh),       cmocka_unit_test(test_lstm_gradients),
        cmocka_unit_test(test_lstm_golden), cmocka_unit_test(test_lstm_steps), cmocka_unit_test(test_lstm_long_text),
        cmocka_unit_test(test_lstm_init),  cmocka_unit_test(test_lstm_no_tokens),
    };
    begin_tests();
    return cmocka_run_group_tests_name("lstm", tests, NULL, scratch_done);
}
