// --precision bf16: products of rounded numbers against plain loops, by both ways of dev/cpu/bf16.h; models that compute with
// them beside models in float32.

#include "dev/test/trainer.h"
#include "dev/test/model.h"
#include "dev/test/both.h"

#ifdef PLAIN
#define HAS_BF16 0 // the program has not
#else
#define HAS_BF16 1
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Products

// Random numbers (rows,width). With an index its rows stand where the index says, and rows that it does not name are NaN.
real *take_operand(int rows, int width, const int *index, int source, uint64_t seed) {
    real *normal = take_normal((size_t)rows * width, seed), *x = take_filled((size_t)source * width, (real)NAN);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < width; i++)
            x[(size_t)(index ? index[r] : r) * width + i] = normal[(size_t)r * width + i];
    return x;
}

double rounded(real x, int precision) {
    return precision == PRODUCTS_BF16 ? (double)nearest_bf16((float)x) : (double)x;
}

double term(const Operand *o, int i, int k, int precision) {
    return rounded(o->row_is_k ? operand_row(o, k)[i] : operand_row(o, i)[k], precision);
}

// One product, in one of the forms x w^T, dout w, dout^T x, by rows that an index names or by all: by multiply-adds of rounded
// numbers and, if this processor has them, by pairs, with any number of threads.
void check_rounded_product(int m, int n, int k, int a_by_k, int b_by_k, int gathered, int add) {
    int *index = gathered ? take_ints((size_t)max_int(k, m)) : NULL, terms = a_by_k ? k : m;
    for (int i = 0; gathered && i < terms; i++)
        index[i] = terms - i;
    int width = a_by_k ? m : k;
    const real *a = take_operand(terms, width, index, terms + 1, 1);
    const real *b = take_operand(b_by_k ? k : n, b_by_k ? n : k, NULL, b_by_k ? k : n, 2);
    Product p = {NULL, (size_t)n, {a, (size_t)width, index, a_by_k}, {b, (size_t)(b_by_k ? n : k), NULL, b_by_k}, m, n, k};
    real *before = take_normal((size_t)m * n, 3), *first = take_reals((size_t)m * n);
    product_precision = PRODUCTS_BF16;
    for (pairs_pay = 0; pairs_pay <= has_pairs(); pairs_pay++) {
        for (int team = 0; team < TEAMS; team++) {
            set_threads(teams[team]);
            p.out = take_reals((size_t)m * n);
            memcpy(p.out, before, (size_t)m * n * sizeof(real));
            products(&p, 1, add);
            if (!pairs_pay && !team)
                memcpy(first, p.out, (size_t)m * n * sizeof(real));
            if (memcmp(first, p.out, (size_t)m * n * sizeof(real)))
                fail_msg("%d x %d x %d: %s, %d threads, give other bits", m, n, k, pairs_pay ? "pairs" : "numbers", teams[team]);
        }
    }
    product_precision = PRODUCTS_FP32;
    pairs_pay = 0;
    set_threads(1);
    int near_fp32 = 0;
    for (int i = 0; i < m * n; i++) {
        double wanted[2];
        for (int precision = 0; precision < 2; precision++) {
            wanted[precision] = add ? (double)before[i] : 0;
            for (int t = 0; t < k; t++)
                wanted[precision] += term(&p.a, i / n, t, precision) * term(&p.b, i % n, t, precision);
        }
        double tolerance = (4 * k + 16) * EPSILON; // as check_product in layers.c
        if (!(fabs((double)first[i] - wanted[PRODUCTS_BF16]) <= tolerance))
            fail_msg("%d x %d x %d, a %d, b %d, by index %d: number %d is %.9g, not %.9g", m, n, k, a_by_k, b_by_k, gathered, i,
                     (double)first[i], wanted[PRODUCTS_BF16]);
        near_fp32 += fabs(wanted[PRODUCTS_FP32] - wanted[PRODUCTS_BF16]) <= tolerance;
    }
    if (m * n * k > 1000 && near_fp32 > m * n / 4)
        fail_msg("%d x %d x %d: rounding changes too little to be seen", m, n, k);
    free_taken();
}

void test_rounded_products(void **state) {
    (void)state;
    static const int sizes[][3] = {{1, 1, 1},    {1, 7, 3},     {2, 65, 300},   {3, 5, 0},     {3, 1, 2},     {6, 64, 255},
                                   {7, 33, 257}, {13, 32, 511}, {48, 100, 17},  {49, 300, 64}, {97, 31, 129}, {5, 257, 1},
                                   {130, 96, 5}, {12, 64, 256}, {100, 130, 33}, {25, 48, 513}};
    for (int s = 0; s < (is_slow() ? 8 : COUNT(sizes)); s++)
        for (int form = 0; form < 16; form++)
            check_rounded_product(sizes[s][0], sizes[s][1], sizes[s][2], form & 1, form >> 1 & 1, form >> 2 & 1, form >> 3);
}

// The lesson's functions, experts among them, come by the rounded products.
void test_rounded_matmul(void **state) {
    (void)state;
    enum { N = 40, I = 24, O = 36, E = 2 };
    const int offset[E + 1] = {0, 30, N}, I_of[E] = {I, I}, O_of[E] = {O, O};
    real *x = take_normal(N * I, 1), *w = take_normal(E * O * I, 2), *dout = take_normal(N * O, 3);
    real *rounded_x = take_reals(N * I), *rounded_w = take_reals(E * O * I), *rounded_dout = take_reals(N * O), *found[6], *wanted[6];
    int size[6] = {N * O, N * I, O * I, N * O, N * I, E * O * I};
    for (int i = 0; i < N * I; i++)
        rounded_x[i] = (real)nearest_bf16((float)x[i]);
    for (int i = 0; i < E * O * I; i++)
        rounded_w[i] = (real)nearest_bf16((float)w[i]);
    for (int i = 0; i < N * O; i++)
        rounded_dout[i] = (real)nearest_bf16((float)dout[i]);
    for (int i = 0; i < 6; i++) {
        found[i] = take_reals(size[i]);
        wanted[i] = take_reals(size[i]);
    }
    product_precision = PRODUCTS_BF16;
    fast_matmul(found[0], x, w, N, I, O, SET);
    fast_matmul_dx(found[1], dout, w, N, I, O, SET);
    fast_matmul_dw(found[2], dout, x, N, I, O);
    fast_grouped_matmul(found[3], x, NULL, w, offset, E, I_of, O_of);
    fast_grouped_matmul_dx(found[4], dout, NULL, w, offset, E, I_of, O_of);
    fast_grouped_matmul_dw(found[5], dout, NULL, x, NULL, offset, E, I_of, O_of);
    product_precision = PRODUCTS_FP32;
    matmul(wanted[0], rounded_x, rounded_w, N, I, O, SET);
    matmul_dx(wanted[1], rounded_dout, rounded_w, N, I, O, SET);
    matmul_dw(wanted[2], rounded_dout, rounded_x, N, I, O);
    grouped_matmul(wanted[3], rounded_x, NULL, rounded_w, offset, E, I_of, O_of);
    grouped_matmul_dx(wanted[4], rounded_dout, NULL, rounded_w, offset, E, I_of, O_of);
    grouped_matmul_dw(wanted[5], rounded_dout, NULL, rounded_x, NULL, offset, E, I_of, O_of);
    for (int i = 0; i < 6; i++)
        assert_close("a rounded product", found[i], wanted[i], size[i], sqrt(N), 64 * EPSILON);
    free_taken();
}

// What is no number stays none, and a number too large for a bfloat16 becomes infinite: neither hides.
void test_rounded_nan(void **state) {
    (void)state;
    enum { N = 8, I = 70, O = 40 };
    real *x = take_normal(N * I, 1), *w = take_normal(O * I, 2), *out = take_reals(N * O);
    x[3 * I + 69] = (real)NAN;
    x[5 * I + 1] = (real)INFINITY;
    x[6 * I + 2] = (real)3.4e38;
    for (pairs_pay = 0; pairs_pay <= has_pairs(); pairs_pay++) {
        product_precision = PRODUCTS_BF16;
        fast_matmul(out, x, w, N, I, O, SET);
        product_precision = PRODUCTS_FP32;
        for (int i = 0; i < N * O; i++) {
            int row = i / O;
            assert_int_equal(!isnan(out[i]), row != 3);
            assert_int_equal(!isfinite(out[i]), row == 3 || row == 5 || row == 6);
        }

        // An odd number of terms: what the memory behind the last one has, from the product before, is no part of it.
        real *few = take_normal(N * (I - 1), 4);
        product_precision = PRODUCTS_BF16;
        fast_matmul(out, few, w, N, I - 1, O, SET);
        product_precision = PRODUCTS_FP32;
        for (int i = 0; i < N * O; i++)
            assert_true(isfinite(out[i]));
    }
    pairs_pay = 0;
    free_taken();
}

// What the user is told agrees with what is done.
void test_way_of_products(void **state) {
    (void)state;
    const char *words = ready_products(PRODUCTS_FP32);
    assert_string_equal(words, "");
    assert_true(!pairs_pay && products_gain == 1);
    words = ready_products(PRODUCTS_BF16);
    assert_true(HAS_BF16 ? strstr(words, " in bfloat16") != NULL || strstr(words, " in float32") != NULL : !*words);
    assert_int_equal(pairs_pay, HAS_BF16 && !strcmp(words, " in bfloat16"));
    assert_true(pairs_pay ? has_pairs() && products_gain > 1.05 : products_gain == 1);
    ready_products(PRODUCTS_FP32);
}

// ---------------------------------------------------------------------------------------------------------------------
// Models

// A model of two layers with all its experts for every token, so that rounding sends no token elsewhere.
Config precise_config(const char *recipe, const char *choices) {
    Config c = small_config(recipe);
    set_options(&c, "--dim 32 --ffn 24 --seq 16");
    set_options(&c, choices);
    return c;
}

Model *precise_model(Config c, int precision, real *logits, double *loss) {
    int N = c.batch * c.seq, *tokens = take_ints(N + 1);
    c.precision = precision;
    random_tokens(tokens, N + 1, c.vocab, 5);
    Model *m = model_allocate(&c, N, 1, NULL);
    model_init(m, NULL);
    *loss = run_batch(m, tokens, tokens + 1, c.batch, c.seq, TRAIN_MODE, 1, 1, 0);
    model_backward(m);
    product_precision = PRODUCTS_FP32;
    fast_matmul(logits, m->acts.h, m->params.head, N, c.dim, c.vocab, SET);
    return m;
}

// Each tensor's gradient differs from float32's by what rounding makes: by 2^-9 a number, a few times that in a product, and
// more on the way through the layers, as in the CUDA twin's tests.
void check_rounded_gradients(const char *recipe, const char *choices) {
    Config c = precise_config(recipe, choices);
    real *logits[2];
    double loss[2];
    Model *m[2];
    for (int precision = 0; precision < 2; precision++) {
        logits[precision] = take_reals((size_t)c.batch * c.seq * c.vocab);
        m[precision] = precise_model(c, precision, logits[precision], &loss[precision]);
    }
    assert_true(loss[0] != loss[1]);
    assert_near(loss[1], loss[0], 2e-2);
    for (int i = 0; i < m[0]->tensor_count; i++) {
        const Tensor *t = &m[0]->tensors[i];
        const real *exact = m[0]->memory[GRADS] + t->offset, *near = m[1]->memory[GRADS] + t->offset;
        double norm = 0, apart = 0;
        for (size_t j = 0; j < t->size; j++) {
            norm += (double)exact[j] * (double)exact[j];
            apart += ((double)near[j] - (double)exact[j]) * ((double)near[j] - (double)exact[j]);
        }
        if (t->trained && norm > 0 && !(apart <= 4e-4 * norm && apart >= 1e-8 * norm))
            fail_msg("%s %s: the gradient of %s is off by %.2g of its norm", recipe, choices, t->name, sqrt(apart / norm));
    }
    model_free(m[0]);
    model_free(m[1]);
    free_taken();
}

void test_rounded_gradients(void **state) {
    (void)state;
    if (!HAS_BF16)
        skip();
    check_rounded_gradients("dense", "--activation swiglu");
    check_rounded_gradients("mixtral", "--experts 4 --topk 4 --gate probability");
    check_rounded_gradients("mixtral", "--experts 4 --topk 4 --shared 1 --untied 1 --recompute 1");
    check_rounded_gradients("dense", "--mixer lstm --activation swiglu");
    check_rounded_gradients("dense", "--mixer lstm --cell 40 --untied 1");
}

// The router is not rounded: from the same rows it has the bits of float32, forward and backward.
void test_router_stays_exact(void **state) {
    (void)state;
    if (!HAS_BF16)
        skip();
    Config c = precise_config("mixtral", "--experts 4 --topk 2");
    int N = c.batch * c.seq, E = c.experts;
    real *logits = take_reals((size_t)N * c.vocab), *again = take_reals((size_t)N * E), *x = take_normal((size_t)N * c.dim, 4);
    real *dx[2], *dw[2];
    double loss;
    Model *m = precise_model(c, PRODUCTS_BF16, logits, &loss);
    for (int l = 0; l < c.layers; l++) {
        fast_matmul(again, m->acts.layer[l].h2, m->params.layer[l].router, N, c.dim, E, SET);
        assert_memory_equal(again, m->acts.layer[l].route.logits, (size_t)N * E * sizeof(real));
    }
    product_precision = PRODUCTS_BF16;
    fast_matmul(again, m->acts.layer[0].h2, m->params.layer[0].router, N, c.dim, E, SET); // else this test would see nothing
    assert_true(memcmp(again, m->acts.layer[0].route.logits, (size_t)N * E * sizeof(real)) != 0);

    // Backward: the layer's experts have no weights here, so all that dx and the router's gradient have comes through the router.
    for (int precision = 0; precision < 2; precision++) {
        m->config.precision = precision;
        dx[precision] = take_reals((size_t)N * c.dim);
        memset(m->params.layer[0].w_in, 0, (size_t)E * 2 * c.ffn * c.dim * sizeof(real));
        memset(m->grads.layer[0].router, 0, (size_t)E * c.dim * sizeof(real));
        multiply_in(precision);
        real *out = take_reals((size_t)N * c.dim);
        moe_forward(m, 0, out, x, N, c.seq);
        assert_int_equal(product_precision, precision);
        moe_backward(m, 0, dx[precision], x, x);
        assert_int_equal(product_precision, precision);
        dw[precision] = take_reals((size_t)E * c.dim);
        memcpy(dw[precision], m->grads.layer[0].router, (size_t)E * c.dim * sizeof(real));
    }
    multiply_in(PRODUCTS_FP32);
    assert_true(inner(dw[0], dw[0], (size_t)E * c.dim) > 0);
    assert_memory_equal(dx[0], dx[1], (size_t)N * c.dim * sizeof(real));
    assert_memory_equal(dw[0], dw[1], (size_t)E * c.dim * sizeof(real));
    model_free(m);
    free_taken();
}

// Generation, a row at a time, gives what training gives.
void test_rounded_generation(void **state) {
    (void)state;
    if (!HAS_BF16)
        skip();
    Config c = precise_config("mixtral", "--experts 4 --topk 4 --gate probability --batch 1");
    int tokens[16];
    real *logits = take_reals(c.vocab), *exact = take_reals(c.vocab), *all = take_reals((size_t)c.seq * c.vocab);
    double loss;
    random_tokens(tokens, c.seq, c.vocab, 5);
    Model *m = precise_model(c, PRODUCTS_BF16, all, &loss);
    product_precision = PRODUCTS_BF16;
    fast_matmul(all, m->acts.h, m->params.head, c.seq, c.dim, c.vocab, SET);
    for (int t = 0; t < c.seq; t++)
        model_generate(m, tokens[t], t, logits);
    const real *last = all + (size_t)(c.seq - 1) * c.vocab;
    m->generation->one->config.precision = m->config.precision = PRODUCTS_FP32;
    for (int t = 0; t < c.seq; t++)
        model_generate(m, tokens[t], t, exact);
    double apart = 0, changed = 0, norm = inner(last, last, c.vocab);
    for (int i = 0; i < c.vocab; i++) {
        apart += ((double)logits[i] - (double)last[i]) * ((double)logits[i] - (double)last[i]);
        changed += ((double)logits[i] - (double)exact[i]) * ((double)logits[i] - (double)exact[i]);
    }
    assert_true(changed > 1e-7 * norm); // it is rounded,
    if (!(apart < changed / 4)) // and alike, but for numbers that lie between two bfloat16 numbers
        fail_msg("generation is off by %.2g, and rounding makes %.2g", sqrt(apart / norm), sqrt(changed / norm));
    model_free(m);
    free_taken();
}

// Forty steps of training on one text: the loss falls as that of float32.
void test_rounded_training(void **state) {
    (void)state;
    if (!HAS_BF16 || is_slow())
        skip();
    double loss[2] = {0, 0}, begin = 0;
    for (int precision = 0; precision < 2; precision++) {
        Config c = precise_config("mixtral", "--experts 4 --topk 2 --lr 0.02");
        int N = c.batch * c.seq, *tokens = take_ints(N + 1);
        c.precision = precision;
        random_tokens(tokens, N + 1, c.vocab, 5);
        Model *m = model_allocate(&c, N, 1, NULL);
        model_init(m, NULL);
        for (int step = 1; step <= 40; step++) {
            loss[precision] = run_batch(m, tokens, tokens + 1, c.batch, c.seq, TRAIN_MODE, 1, step, 0);
            begin = step == 1 ? loss[precision] : begin;
            model_backward(m);
            model_update(m, step, 0.02, gradient_norm(m));
        }
        model_free(m);
    }
    multiply_in(PRODUCTS_FP32);
    assert_true(loss[0] != loss[1] && loss[0] < 0.7 * begin);
    assert_near(loss[1], loss[0], 0.05 * (begin - loss[0]));
    free_taken();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rounded_products),   cmocka_unit_test(test_rounded_matmul),
        cmocka_unit_test(test_rounded_nan),        cmocka_unit_test(test_way_of_products),
        cmocka_unit_test(test_rounded_gradients),  cmocka_unit_test(test_router_stays_exact),
        cmocka_unit_test(test_rounded_generation), cmocka_unit_test(test_rounded_training),
    };
    begin_tests();
    return cmocka_run_group_tests_name("precision", tests, NULL, scratch_done);
}
