// What learns more by the clock: Muon, tables that are looked up, norms of queries and keys.

#include "dev/test/trainer.h"
#include "dev/test/model.h"

// ---- Muon

// The polynomials bring every singular value from 0.02 to 1 near to 1.
void test_muon_polynomial(void **state) {
    (void)state;
    double worst = 0;
    for (int i = 0; i <= 10000; i++) {
        double s = 0.02 + 0.98 * i / 10000;
        for (int round = 0; round < MUON_ROUNDS; round++) {
            const double *p = muon_polynomial[round];
            s = p[0] * s + p[1] * s * s * s + p[2] * pow(s, 5);
        }
        worst = fmax(worst, fabs(s - 1));
    }
    assert_true(worst < 0.0935 && worst > 0.09);
}

// What orthogonalize() makes of the matrices x (R,C): o. With x = U S V^T, o is U s V^T with all s near 1. So for a wide
// matrix o o^T is near the unit matrix, and o x^T = U s S U^T is symmetric and its diagonal is positive.
void check_orthogonal(int E, int R, int C) {
    size_t size = (size_t)R * C;
    real *x = take_normal(E * size, 1), *o = take_reals(E * size);
    memcpy(o, x, E * size * sizeof(real));
    Matrix list[8];
    for (int e = 0; e < E; e++) {
        list[e] = prepare_matrix(o + e * size, R, C, take_reals(matrix_memory(R, C)));
    }
    orthogonalize(list, E);
    int small = min_int(R, C), row = R > C ? 1 : C, column = R > C ? C : 1; // steps through what is transposed if it is tall
    int large = R + C - small;
    double rounding = sizeof(real) == 8 ? 1e-12 : 1e-4;
    for (int e = 0; e < E; e++) {
        const real *xe = x + e * size, *oe = o + e * size;
        for (int i = 0; i < small; i++) {
            double length = 0, along = 0;
            for (int j = 0; j < small; j++) {
                double oo = 0, ij = 0, ji = 0;
                for (int k = 0; k < large; k++) {
                    oo += (double)oe[i * row + k * column] * (double)oe[j * row + k * column];
                    ij += (double)oe[i * row + k * column] * (double)xe[j * row + k * column];
                    ji += (double)oe[j * row + k * column] * (double)xe[i * row + k * column];
                }
                length = i == j ? oo : length;
                along = i == j ? ij : along;
                assert_true(i == j || fabs(oo) < 0.2);
                assert_near(ij, ji, rounding * large);
            }
            assert_true(length > 0.8 && length < 1.2);
            assert_true(along > 0);
        }
    }
    free_taken();
}

void test_muon_orthogonal(void **state) {
    (void)state;
    check_orthogonal(1, 8, 40);
    check_orthogonal(3, 40, 8);
    check_orthogonal(5, 7, 33);
    check_orthogonal(2, 19, 5);
}

// A gradient of zeros moves nothing, and neither it nor a very small one becomes NaN.
void test_muon_small(void **state) {
    (void)state;
    real x[12] = {0};
    real memory[64];
    Matrix matrix = prepare_matrix(x, 3, 4, memory);
    orthogonalize(&matrix, 1);
    for (int i = 0; i < 12; i++) {
        assert_true(x[i] == 0);
    }
    x[0] = (real)1e-30;
    x[5] = (real)-1e-30;
    matrix = prepare_matrix(x, 3, 4, memory);
    orthogonalize(&matrix, 1);
    assert_true(fabs((double)x[0] - 1) < 0.1 && fabs((double)x[5] + 1) < 0.1);
}

// Many steps by hand: the mean of the gradients, Nesterov's look ahead, whose turn it is, the scale of a step, and weight
// decay. The router has what AdamW does.
void test_muon_step(void **state) {
    (void)state;
    Config c = small_config("mixtral");
    set_options(&c, "--optimizer muon --weight-decay 0.5 --clip 0");
    Model *m = model_allocate(&c, 16, 1, NULL);
    randomize_weights(m);
    int i = find_tensor(m, 1, "w_in"), router = find_tensor(m, 1, "router"), moved[4] = {0};
    const Tensor *t = &m->tensors[i];
    int R = t->shape[1], C = t->shape[2];
    size_t one = (size_t)R * C;
    real *w = m->memory[WEIGHTS] + t->offset, *g = m->memory[GRADS] + t->offset;
    real *mean = take_reals(t->size), *wanted = take_reals(t->size), *first = take_normal(t->size, 1);
    memcpy(wanted, w, t->size * sizeof(real));
    const double lr = 0.01;
    for (int step = 1; step <= 2 * MUON_TURNS; step++) {
        real *direction = take_reals(t->size);
        for (size_t j = 0; j < t->size; j++) {
            g[j] = first[j] * (real)((step + j / one) % 3);
            if (g[j] != 0) { // an expert without a gradient waits
                mean[j] = (real)0.95 * mean[j] + (real)0.05 * g[j];
                direction[j] = (real)0.95 * mean[j] + (real)0.05 * g[j];
            }
        }
        for (int e = 0; e < c.experts; e++) {
            if (!has_turn(i, e, step)) {
                continue;
            }
            Matrix matrix = prepare_matrix(direction + e * one, R, C, take_reals(matrix_memory(R, C)));
            orthogonalize(&matrix, 1);
            for (size_t j = e * one; j < (e + 1) * one; j++) {
                wanted[j] = (real)((1 - 8 * 0.5 * lr) * (double)wanted[j] - 8 * lr * 0.1 * sqrt(max_int(R, C)) * (double)direction[j]);
            }
            moved[e]++;
        }
        m->memory[GRADS][m->tensors[router].offset] = 1;
        double before = (double)m->memory[WEIGHTS][m->tensors[router].offset];
        model_update(m, step, lr, 1);
        assert_near((double)m->memory[WEIGHTS][m->tensors[router].offset], before * (1 - 0.5 * lr) - lr, 1e-6);
        assert_close("weights", w, wanted, t->size, 1, 64 * EPSILON);
        for (size_t j = 0; j < t->size; j++) {
            assert_true(g[j] == 0);
        }
    }
    for (int e = 0; e < c.experts; e++) {
        assert_int_equal(moved[e], 2);
    }
    model_free(m);
    free_taken();
}

// Muon makes the same bits with any number of threads, also where moments are rounded after all threads have moved theirs.
void check_muon_threads(const char *moments) {
    Config c = small_config("mixtral");
    set_options(&c, "--optimizer muon --dim 48 --heads 4 --ffn 40");
    set_option(&c, &options[find_option("moments")], moments, NULL);
    Model *m = model_allocate(&c, 16, 1, NULL);
    real *grads = take_normal(m->size, 1);
    for (int team = 0; team < TEAMS; team++) {
        set_threads(teams[team]);
        randomize_weights(m);
        memset(m->memory[MOMENT1], 0, m->size * sizeof(real));
        memset(m->memory[MOMENT2], 0, m->size * sizeof(real));
        uint64_t bits = 0;
        for (int step = 1; step <= MUON_TURNS; step++) {
            memcpy(m->memory[GRADS], grads, m->size * sizeof(real));
            model_update(m, step, 0.01, gradient_norm(m));
            for (int i = 0; i < 4; i++) {
                bits = bits_of(m->memory[i], m->size, bits);
            }
        }
        assert_same_bits("muon_update", team, bits);
    }
    set_threads(1);
    model_free(m);
    free_taken();
}

void test_muon_threads(void **state) {
    (void)state;
    check_muon_threads("fp32");
    if (!IS_DOUBLE) {
        check_muon_threads("bf16");
    }
}

// ---- tables that are looked up

// A pair has its row wherever it stands, the first token of a sequence is a pair with nothing, and pairs spread evenly.
void test_ngram_rows(void **state) {
    (void)state;
    enum { T = 4, N = 12, ROWS = 64 };
    const int tokens[N] = {5, 7, 5, 7, 7, 5, 7, 5, 5, 0, 0, 7};
    int row[N], count[ROWS] = {0};
    find_ngrams(row, tokens, -1, N, T, 1 << 20);
    assert_int_equal(row[1], row[3]); // (5,7)
    assert_int_equal(row[1], row[6]);
    assert_int_equal(row[2], row[5]);   // (7,5)
    assert_int_not_equal(row[1], row[2]); // order counts
    assert_int_equal(row[0], row[8]);   // 5 at the beginning
    assert_int_not_equal(row[0], row[4]);
    assert_int_not_equal(row[4], row[3]); // 7 at the beginning is not (7,7) or (5,7), which ends the sequence before
    find_ngrams(row, tokens, 0, 1, 1, 1 << 20);
    assert_int_not_equal(row[0], ngram_row(-1, 5, 1 << 20)); // word 0 before is not "nothing before"
    for (int a = 0; a < 80; a++) {
        for (int b = 0; b < 80; b++) {
            int r = ngram_row(a, b, ROWS);
            assert_true(r >= 0 && r < ROWS);
            count[r]++;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        assert_true(count[r] > 50 && count[r] < 150); // 100 on average
    }
}

// Rows that have no gradient keep their weights and moments, also if their moments are not 0; the others move as AdamW
// says. Parts of the table, as processes have them, together give the same.
void test_read_rows(void **state) {
    (void)state;
    enum { ROWS = 40, C = 6, SIZE = ROWS * C };
    real *start = take_normal(4 * SIZE, 1), *whole = take_reals(4 * SIZE), *parts = take_reals(4 * SIZE);
    for (int i = 0; i < SIZE; i++) {
        start[3 * SIZE + i] *= start[3 * SIZE + i]; // m2
        if (i / C % 3) {
            start[SIZE + i] = 0; // g
        }
    }
    start[SIZE + 4 * 3 * C] = 0; // a row with a gradient in which one number is 0
    memcpy(whole, start, 4 * SIZE * sizeof(real));
    memcpy(parts, start, 4 * SIZE * sizeof(real));
    Adam a = {1, (real)0.9, (real)0.99, 2, 3, (real)0.01, 1};
    adamw_of_read_rows(whole, whole + SIZE, whole + 2 * SIZE, whole + 3 * SIZE, 0, SIZE, C, a);
    for (int row = 0; row < ROWS; row++) {
        real w[C], g[C], m1[C], m2[C];
        for (int i = 0; i < C; i++) {
            w[i] = start[row * C + i];
            g[i] = start[SIZE + row * C + i];
            m1[i] = start[2 * SIZE + row * C + i];
            m2[i] = start[3 * SIZE + row * C + i];
        }
        if (row % 3 == 0) {
            adamw(w, g, m1, m2, C, a);
        }
        for (int i = 0; i < C; i++) {
            assert_near((double)whole[row * C + i], (double)w[i], 1e-6);
            assert_near((double)whole[2 * SIZE + row * C + i], (double)m1[i], 1e-6);
            assert_near((double)whole[3 * SIZE + row * C + i], (double)m2[i], 1e-6);
            assert_true(whole[SIZE + row * C + i] == 0);
            assert_true(row % 3 == 0 || whole[row * C + i] == start[row * C + i]);
        }
    }

    // From the last part to the first one: a row that two parts share still has its gradient in the part before.
    const int cut[] = {0, 1, 20, 21, 99, 236, SIZE};
    for (int i = COUNT(cut) - 2; i >= 0; i--) {
        real *w = parts + cut[i];
        // each process has all gradients
        memcpy(parts + SIZE, start + SIZE, SIZE * sizeof(real));
        adamw_of_read_rows(w, w + SIZE, w + 2 * SIZE, w + 3 * SIZE, cut[i], cut[i + 1] - cut[i], C, a);
    }
    assert_close("parts", parts, whole, SIZE, 1, EPSILON);
    free_taken();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_muon_polynomial),
        cmocka_unit_test(test_muon_orthogonal),
        cmocka_unit_test(test_muon_small),
        cmocka_unit_test(test_muon_step),
        cmocka_unit_test(test_muon_threads),
        cmocka_unit_test(test_ngram_rows),
        cmocka_unit_test(test_read_rows),
    };
    begin_tests();
    return cmocka_run_group_tests_name("learning", tests, NULL, scratch_done);
}
