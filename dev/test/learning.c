// What learns more by the clock: Muon, tables that are looked up, norms of queries and keys.

#include "dev/test/trainer.h"
#include "dev/test/model.h"
#include <setjmp.h>
#include <sys/mman.h>

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

int row_of_pair(int before, int word, int rows) {
    return ngram_row(-1, before, word, 2, rows);
}

// A pair has its row wherever it stands, the first token of a sequence is a pair with nothing, and pairs spread evenly.
void test_ngram_rows(void **state) {
    (void)state;
    enum { T = 4, N = 12, ROWS = 64 };
    const int tokens[N] = {5, 7, 5, 7, 7, 5, 7, 5, 5, 0, 0, 7};
    int row[N], count[ROWS] = {0};
    Config c = small_config("dense");
    set_options(&c, "--ngrams 1048576");
    find_ngrams(&c, row, tokens, NULL, N, T);
    assert_int_equal(row[1], row[3]); // (5,7)
    assert_int_equal(row[1], row[6]);
    assert_int_equal(row[2], row[5]);   // (7,5)
    assert_int_not_equal(row[1], row[2]); // order counts
    assert_int_equal(row[0], row[8]);   // 5 at the beginning
    assert_int_not_equal(row[0], row[4]);
    assert_int_not_equal(row[4], row[3]); // 7 at the beginning is not (7,7) or (5,7), which ends the sequence before
    assert_int_not_equal(row_of_pair(0, 5, 1 << 20), row_of_pair(-1, 5, 1 << 20)); // word 0 before is not "nothing before"
    for (int a = 0; a < 80; a++) {
        for (int b = 0; b < 80; b++) {
            int r = row_of_pair(a, b, ROWS);
            assert_true(r >= 0 && r < ROWS);
            count[r]++;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        assert_true(count[r] > 50 && count[r] < 150); // 100 on average
    }
}

// Pairs keep their rows where there are triples. A triple's row belongs to three words in their order. Tokens before the
// sequence, which generation knows, are seen where the sequence does not reach that far.
void test_triple_rows(void **state) {
    (void)state;
    enum { N = 8, ROWS = 1001 };
    const int tokens[N] = {3, 4, 5, 3, 4, 5, 4, 5}, before[2] = {4, 5};
    int row[2 * N], behind[2 * N], one[2], last[2], count[ROWS] = {0};
    Config c = small_config("dense");
    set_options(&c, "--ngrams 1000001 --ngram-order 3");
    find_ngrams(&c, row, tokens, NULL, N, N);
    for (int n = 0; n < N; n++) {
        assert_int_equal(row[n], row_of_pair(n ? tokens[n - 1] : -1, tokens[n], 1000001));
        assert_int_not_equal(row[n], row[N + n]);
    }
    const int *triple = row + N;
    assert_int_equal(triple[2], triple[5]);     // (3,4,5)
    assert_int_not_equal(triple[2], triple[7]); // (5,4,5) ends with the same pair
    assert_int_equal(row[2], row[7]);
    assert_int_not_equal(triple[0], triple[3]); // (nothing,nothing,3) and (4,5,3)

    // Behind (4,5), all but the first two tokens have the rows that they had.
    find_ngrams(&c, behind, tokens, before, N, N);
    assert_memory_equal(behind + 1, row + 1, (N - 1) * sizeof(int));
    assert_memory_equal(behind + N + 2, triple + 2, (N - 2) * sizeof(int));
    assert_int_equal(behind[N], triple[3]); // (4,5,3)
    assert_int_equal(behind[0], row[3]);

    // One token at a time, as generation does it.
    for (int again = 0; again < 2; again++) {
        for (int n = 0; n < N; n++) {
            find_ngrams(&c, one, &tokens[n], n ? last : NULL, 1, 1);
            remember_token(last, tokens[n], n);
            assert_int_equal(one[0], row[n]);
            assert_int_equal(one[1], triple[n]);
        }
    }
    for (int a = -1; a < 40; a++) {
        for (int b = 0; b < 25 * 40; b++) {
            count[ngram_row(a, b / 25, b % 25, 3, ROWS)]++;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        assert_true(count[r] > 10 && count[r] < 80); // 41 on average
    }
}

// Rows that are not on the list, or have no gradient, keep their weights and moments, also if their moments are not 0; the
// others move as AdamW says.
void test_read_rows(void **state) {
    (void)state;
    enum { ROWS = 40, C = 6, SIZE = ROWS * C };
    real *start = take_normal(4 * SIZE, 1), *whole = take_reals(4 * SIZE);
    int list[ROWS], place[ROWS] = {0};
    ReadRows r = {ROWS, 0, list, place};
    for (int i = 0; i < SIZE; i++) {
        start[3 * SIZE + i] *= start[3 * SIZE + i]; // m2
        if (i / C % 3 == 1) {
            start[SIZE + i] = 0; // g
        }
    }
    for (int row = ROWS - 1; row >= 0; row--) {
        note_rows(&r, &row, row % 3 < 2);
        note_rows(&r, &row, row % 3 < 1); // again
    }
    assert_int_equal(r.count, (ROWS * 2 + 2) / 3);
    start[SIZE + 4 * 3 * C] = 0; // a row with a gradient in which one number is 0
    memcpy(whole, start, 4 * SIZE * sizeof(real));
    Adam a = {1, (real)0.9, (real)0.99, 2, 3, (real)0.01, 1};
    Rounding none = {0, 0, 0};
    adamw_of_read_rows(whole, whole + SIZE, whole + 2 * SIZE, whole + 3 * SIZE, &r, C, a, &none);
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
            assert_true(whole[SIZE + row * C + i] == (row % 3 ? start[SIZE + row * C + i] : 0));
            assert_true(row % 3 == 0 || whole[row * C + i] == start[row * C + i]);
        }
    }
    forget_rows(&r);
    for (int row = 0; row < ROWS; row++) {
        assert_true(!r.count && !place[row]);
    }
    free_taken();
}

// ---- a step with a large table visits only the rows that it has read

sigjmp_buf trespass;

void report_trespass(int number) {
    (void)number;
    siglongjmp(trespass, 1);
}

// Forbids, or with `open` allows, to touch those pages from `first` on, `size` bytes, in which no unit of `width` bytes is
// on the list. Returns how many bytes they have.
size_t close_pages(char *first, size_t size, size_t width, const ReadRows *r, int open) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *at = (char *)(((uintptr_t)first + page - 1) / page * page);
    size_t closed = 0;
    for (; at + page <= first + size; at += page) {
        size_t from = (size_t)(at - first) / width, until = ((size_t)(at - first) + page - 1) / width;
        int read = 0;
        for (int i = 0; i < r->count; i++) {
            read |= (size_t)r->list[i] >= from && (size_t)r->list[i] <= until;
        }
        if (!read) {
            assert_int_equal(mprotect(at, page, open ? PROT_READ | PROT_WRITE : PROT_NONE), 0);
            closed += page;
        }
    }
    return closed;
}

// All pages of the table, its gradients and moments, and of the list's places, but those of rows that are on the list.
size_t close_table(Model *m, const ReadRows *r, int open) {
    const Tensor *t = &m->tensors[find_tensor(m, -1, "ngrams")];
    size_t width = (size_t)t->shape[2] * sizeof(real);
    size_t closed = close_pages((char *)m->lookup->read[BY_NGRAM].place, (size_t)r->rows * sizeof(int), sizeof(int), r, open);
    for (int what = WEIGHTS; what <= MOMENT2; what++) {
        closed += close_pages((char *)(m->memory[what] + t->offset), t->size * sizeof(real), width, r, open);
    }
    return closed;
}

// Two micro-steps and an update, then an evaluation, while every page of the table is closed that has no row of theirs.
void check_untouched(const char *choices) {
    enum { ROWS = 200000, N = 16 };
    Config c = small_config("dense");
    set_options(&c, "--ngrams 200000 --ngram-order 3");
    set_options(&c, choices);
    int tokens[2 * N], targets[2 * N], *row = take_ints(4 * N), *list = take_ints(ROWS), *place = take_ints(ROWS);
    random_tokens(tokens, 2 * N, c.vocab, 1);
    random_tokens(targets, 2 * N, c.vocab, 2);
    Model *m = model_allocate(&c, N, 1, NULL);
    real *w = m->params.ngrams;
    ReadRows r = {ROWS, 0, list, place};
    find_ngrams(&c, row, tokens, NULL, 2 * N, c.seq);
    note_rows(&r, row, 4 * N);
    model_init(m, NULL);
    assert_true(close_table(m, &r, 0) > 20e6); // of 200,000 rows of 64 bytes, four times, and their places; a page may have 64 KiB
    struct sigaction action, before[2];
    memset(&action, 0, sizeof(action));
    action.sa_handler = report_trespass;
    sigaction(SIGSEGV, &action, &before[0]);
    sigaction(SIGBUS, &action, &before[1]);
    if (sigsetjmp(trespass, 1)) {
        fail_msg("--ngrams 200000 %s: a step touches a page of the table without any of its rows", choices);
    }
    for (int step = 1; step <= 2; step++) {
        for (int micro = 0; micro < 2; micro++) {
            run_batch(m, tokens + N * micro, targets + N * micro, 2, c.seq, TRAIN_MODE, 0.5, step, N * micro);
            model_backward(m);
        }
        cpu_update(m, step, 0.01);
    }
    run_batch(m, tokens, targets, 2, c.seq, EVAL_MODE, 1, 0, 0);
    sigaction(SIGSEGV, &before[0], NULL);
    sigaction(SIGBUS, &before[1], NULL);
    close_table(m, &r, 1);
    for (int i = 0; i < r.count; i++) { // and each row of theirs has moved
        assert_true(has_gradient(w + (size_t)r.list[i] * c.dim, c.dim));
    }
    assert_int_equal(m->lookup->read[BY_NGRAM].count, 0);
    model_free(m);
    free_taken();
}

void test_untouched_rows(void **state) {
    (void)state;
    set_threads(1); // siglongjmp() stays in one thread
    check_untouched("--optimizer muon --ngram-gate 1");
    if (!IS_DOUBLE) {
        check_untouched("--moments bf16");
    }
}

// Steps of a model with tables give the same bits with any number of threads: loss, norm, gradients before the update, and
// what the update makes of all.
void test_table_threads(void **state) {
    (void)state;
    enum { N = 192 };
    Config c = small_variant(recipe_count);
    set_options(&c, "--dim 96 --heads 4 --ngrams 5000 --seq 64 --batch 3");
    int tokens[N], targets[N];
    random_tokens(tokens, N, c.vocab, 1);
    random_tokens(targets, N, c.vocab, 2);
    for (int team = 0; team < TEAMS; team++) {
        set_threads(teams[team]);
        Model *m = model_allocate(&c, N, 1, NULL);
        randomize_weights(m);
        uint64_t bits = 0;
        for (int step = 1; step <= 3; step++) {
            real loss = (real)run_batch(m, tokens, targets, 3, 64, TRAIN_MODE, 1, step, 0);
            model_backward(m);
            bits = bits_of(m->memory[GRADS], m->size, bits_of(&loss, 1, bits));
            double norm = gradient_norm(m);
            model_update(m, step, 0.01, norm);
            uint64_t word;
            memcpy(&word, &norm, sizeof(word));
            bits = hash64(bits ^ word);
            for (int i = 0; i < 4; i++) {
                bits = bits_of(m->memory[i], m->size, bits);
            }
        }
        assert_same_bits("a step with tables", team, bits);
        model_free(m);
    }
    set_threads(1);
}

// The norm of the gradients of all tensors, of which tables count where they were read.
void test_table_norm(void **state) {
    (void)state;
    enum { N = 16 };
    Config c = small_variant(recipe_count);
    int tokens[N], targets[N];
    random_tokens(tokens, N, c.vocab, 1);
    random_tokens(targets, N, c.vocab, 2);
    Model *m = model_allocate(&c, N, 1, NULL);
    randomize_weights(m);
    run_batch(m, tokens, targets, 2, c.seq, TRAIN_MODE, 1, 1, 0);
    model_backward(m);
    const real *g = m->memory[GRADS];
    assert_true(m->tables > m->common && m->tables < m->size && inner(g + m->tables, g + m->tables, m->size - m->tables) > 0);
    assert_near(gradient_norm(m) / sqrt(inner(g, g, m->size)), 1, 1e-12);
    model_free(m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_muon_polynomial),
        cmocka_unit_test(test_muon_orthogonal),
        cmocka_unit_test(test_muon_small),
        cmocka_unit_test(test_muon_step),
        cmocka_unit_test(test_muon_threads),
        cmocka_unit_test(test_ngram_rows),
        cmocka_unit_test(test_triple_rows),
        cmocka_unit_test(test_read_rows),
        cmocka_unit_test(test_untouched_rows),
        cmocka_unit_test(test_table_threads),
        cmocka_unit_test(test_table_norm),
    };
    begin_tests();
    return cmocka_run_group_tests_name("learning", tests, NULL, scratch_done);
}
