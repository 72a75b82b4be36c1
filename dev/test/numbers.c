// Numbers at the edge: scores that underflow, rows that overflow, losses and weights that are not
// finite, and what the program says of them.

#include "dev/test/trainer.h"
#include "dev/test/both.h"
#include "dev/test/runs.h"
#include "dev/test/slopes.h"

void assert_finite(const char *what, const real *x, size_t n) {
    size_t i = first_not_finite(x, n);
    if (i < n)
        fail_msg("%s[%zu] of %zu is %g", what, i, n, (double)x[i]);
}

void test_first_not_finite(void **state) {
    (void)state;
    const real bad[] = {(real)NAN, (real)INFINITY, (real)-INFINITY};
    for (int n = 0; n < 10000; n = n * 3 / 2 + 1) {
        real *x = take_normal((size_t)n, (uint64_t)n);
        for (int i = 0; i < n; i++)
            x[i] *= i % 3 ? 1 : (real)(IS_DOUBLE ? 1e300 : 1e37);
        assert_int_equal(first_not_finite(x, (size_t)n), n);
        for (int i = n - 1; i >= 0; i -= 1 + n / 7) {
            x[i] = bad[i % 3];
            assert_int_equal(first_not_finite(x, (size_t)n), i);
        }
        free_taken();
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Scores

enum { E4 = 4, ROWS = 12 };

// Logits of four experts: large ones of both signs, equal ones, and some that the scores just do
// not survive.
const double edge_logits[ROWS][E4] = {
    {200, -200, 200, -200}, {-200, -200, -200, -200}, {200, 200, 200, 200},
    {1e4, -1e4, 0, 1},      {-1e4, -1e4, -1e4, -1e4}, {1e4, 1e4, 1e4, 1e4},
    {0, 0, 0, 0},           {-90, -95, -200, -1e4},   {-60, -65, -70, -75},
    {-68, -69, -69.2, -71}, {-1e30, -1e30, -3e37, 0}, {1e30, -1e30, 3e37, 0},
};

real *take_edge_logits(void) {
    real *logits = take_reals(ROWS * E4);
    for (int i = 0; i < ROWS * E4; i++)
        logits[i] = (real)edge_logits[i / E4][i % E4];
    return logits;
}

// From logits to weights, entropy and balance loss and back, with the best two experts chosen and
// with the worst two, as another router than that of the scores may choose.
void check_edge(int score, int gate, int worst) {
    const size_t size = ROWS * E4;
    real *logits = take_edge_logits(), *p = take_reals(size), *lse = take_reals(ROWS),
         *weight = take_reals(ROWS * 2);
    real *dp = take_reals(size), *dlogits = take_reals(size), *dweight = take_normal(ROWS * 2, 3);
    Route r = take_route(ROWS, E4, 2);
    scores_forward(p, lse, logits, ROWS, E4, score);
    assert_finite("p", p, size);
    select_topk(r.expert, p, ROWS, E4, 2);
    for (int i = 0; worst && i < ROWS * 2; i++)
        r.expert[i] = 2 + i % 2;
    memcpy(r.served, r.expert, ROWS * 2 * sizeof(int));
    weights_forward(weight, p, r.expert, ROWS, E4, 2, gate, 1.5);
    assert_finite("weight", weight, ROWS * 2);
    for (int n = 0; gate == RENORMALIZED && n < ROWS; n++)
        assert_near((double)(weight[2 * n] + weight[2 * n + 1]), 1.5, 1e-6);

    // The statistics: no more than the entropy of an even choice.
    double count[E4] = {0}, slope[E4] = {0.5, 1, 1.5, 2};
    Statistics s;
    memset(&s, 0, sizeof(s));
    s.count = count;
    r.p = p;
    r.slope = slope;
    count_routing(&s, &r, score);
    assert_true(s.entropy >= 0 && s.entropy <= ROWS * log((double)E4) * 1.000001);

    // The balance loss is a mean of slopes.
    double loss = mean_of_slopes(&r, score);
    assert_true(loss >= 0.5 * 0.999999 && loss <= 2 * 1.000001);
    weights_backward(dp, dweight, weight, p, r.expert, ROWS, E4, 2, gate, 1.5);
    balance_backward(dp, &r, score, 1);
    assert_finite("dp", dp, size);
    scores_backward(dlogits, dp, p, lse, ROWS, E4, score, 0.001);
    assert_finite("dlogits", dlogits, size);
    // Where all have underflown, there is nothing to learn.
    for (int e = 0; score == SIGMOID && e < E4; e++)
        assert_true(dlogits[1 * E4 + e] == 0 && dlogits[4 * E4 + e] == 0);
    for (int i = 0; score == SIGMOID && gate == RENORMALIZED && i < 2; i++) { // they share evenly
        assert_near((double)weight[2 * 1 + i], 0.75, 1e-6);
        assert_near((double)weight[2 * 4 + i], 0.75, 1e-6);
    }
    free_taken();
}

void test_edge_scores(void **state) {
    (void)state;
    for (int i = 0; i < 8; i++)
        check_edge(i % 2 ? SIGMOID : SOFTMAX, i / 2 % 2 ? RENORMALIZED : PROBABILITY, i / 4);
}

// Scores just above the least that counts have the slopes of any others: the objective is sum of
// weight . g of scores times s.
typedef struct Tiny {
    real *p, *g, *weight;
    int *expert;
} Tiny;

double tiny_objective(void *arg) {
    const Tiny *t = (const Tiny *)arg;
    real p[6];
    for (int i = 0; i < 6; i++)
        p[i] = t->p[i] * (real)1e-20;
    weights_forward(t->weight, p, t->expert, 2, 3, 2, RENORMALIZED, 2);
    return inner(t->weight, t->g, 4);
}

void test_tiny_scores(void **state) {
    (void)state;
    const double numbers[6] = {1,   2,     3,
                               0.5, 1e-12, 4}; // the fifth is below 1e-30, and has no slope
    Tiny t = {take_reals(6), take_normal(4, 5), take_reals(4), take_ints(4)};
    real p[6], *dp = take_reals(6);
    const int expert[4] = {0, 2, 1, 2};
    memcpy(t.expert, expert, sizeof(expert));
    for (int i = 0; i < 6; i++) {
        t.p[i] = (real)numbers[i];
        p[i] = t.p[i] * (real)1e-20;
    }
    tiny_objective(&t);
    assert_near((double)(t.weight[2] + t.weight[3]), 2, 1e-6);
    weights_backward(dp, t.g, t.weight, p, t.expert, 2, 3, 2, RENORMALIZED, 2);
    assert_true(dp[4] == 0);
    for (int i = 0; i < 6; i++)
        dp[i] *= (real)1e-20; // by the numbers that are not so small
    check_slopes("scores of 1e-20", t.p, 4, dp, tiny_objective, &t, 20);
    free_taken();
}

// An infinite logit, or none that is a number, is not passed over.
void test_infinite_logits(void **state) {
    (void)state;
    const real inf = (real)INFINITY, rows[5][3] = {{1, inf, 2},
                                                   {1, -inf, 2},
                                                   {-inf, -inf, -inf},
                                                   {1, (real)NAN, 2},
                                                   {inf, inf, inf}};
    for (int score = SOFTMAX; score <= SIGMOID; score++) {
        for (int i = 0; i < 5; i++) {
            real p[3], lse = 0;
            scores_forward(p, &lse, rows[i], 1, 3, score);
            int none = i == 1 && score == SOFTMAX; // exp(-infinity) is 0: a masked score
            assert_int_equal(first_not_finite(p, 3) < 3, !none);
        }
    }
}

void test_edge_losses(void **state) {
    (void)state;
    double none[3] = {0, 0, 0}, tiny[3] = {1e-44, 2e-44, 0}, slope[3];
    assert_near(cv_squared(none, slope, 3, 0, 1), 1,
                1e-12); // nobody was given any weight: all are equal
    for (int i = 0; i < 3; i++)
        assert_true(slope[i] == 0);
    assert_true(cv_squared(tiny, slope, 3, 0, 1) >= 1);
    for (int i = 0; i < 3; i++)
        assert_true(isfinite((float)slope[i]));

    // No token is served, so there is nothing to balance.
    static Model m;
    static LayerActs layer;
    double balance[3] = {0, 0, 0};
    m.acts.layer = &layer;
    m.config.groups = 2;
    m.config.device_weight = 1;
    layer.route.N = layer.route.group = 4;
    layer.route.E = 3;
    layer.route.count = none;
    layer.route.slope = balance;
    group_loss_forward(&m, 0, NULL);
    add_balance(balance, none, 3, 1);
    for (int i = 0; i < 3; i++)
        assert_true(balance[i] == 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Whole models whose routers' logits are as large as 1e4, of either sign, for all experts of a
// token at once

void check_edge_model(const char *recipe, const char *more, double size) {
    Config c = small_config(recipe);
    set_options(&c, more);
    int N = c.batch * c.seq;
    Model *m = model_allocate(&c, N, 1, NULL);
    randomize_weights(m);
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        real *w = m->memory[WEIGHTS] + t->offset;
        int router = !strcmp(t->kind, "router") || !strcmp(t->kind, "slow");
        for (size_t j = 0; router && j < t->size;
             j++) // a token's logits are its first number times about `size`
            w[j] = j % (size_t)t->shape[2]
                       ? 0
                       : (real)(size * (1 + 0.001 * (double)(j / (size_t)t->shape[2])));
    }
    int *inputs = take_ints((size_t)N), *targets = take_ints((size_t)N);
    random_tokens(inputs, N, c.vocab, 1);
    random_tokens(targets, N, c.vocab, 2);
    double loss = run_batch(m, inputs, targets, c.batch, c.seq, TRAIN_MODE, 1, 1, 0);
    if (!isfinite(loss) || !isfinite(m->aux))
        fail_msg("%s %s: loss %g, balance losses %g", recipe, more, loss, m->aux);
    for (int l = 0; l < c.layers; l++) {
        if (is_moe(&c, l) && !(m->stats[l].entropy >= 0))
            fail_msg("%s %s: entropy %g", recipe, more, m->stats[l].entropy);
    }
    model_backward(m);
    for (int i = 0; i < m->tensor_count; i++)
        assert_finite(m->tensors[i].name, m->memory[GRADS] + m->tensors[i].offset,
                      m->tensors[i].size);
    cpu_update(m, 1, 0.01);
    assert_finite(recipe, m->memory[WEIGHTS], m->size);
    assert_true(isfinite(run_batch(m, inputs, targets, c.batch, c.seq, EVAL_MODE, 1, 0, 0)));
    model_free(m);
    free_taken();
}

void test_edge_models(void **state) {
    (void)state;
    const char *const recipes[][2] = {
        {"deepseek-v3", ""},
        {"deepseek-v3", "--bias-rate 0 --aux-weight 0.1"},
        {"mixtral", "--score sigmoid --z-weight 0"},
        {"mixtral", "--score sigmoid --balance cv2 --gate probability --z-weight 0"},
        {"mixtral", "--score sigmoid --balance variance --z-weight 0"},
        {"mixtral", "--score sigmoid --balance unbiased --bias-rate 0.001 --z-weight 0"},
        {"mixtral", "--capacity-factor 1 --overflow next"},
        {"gshard", ""},
        {"st-moe", ""},
        {"base", ""},
        {"base", "--score softmax"},
        {"history", ""},
        {"history", "--score sigmoid"},
        {"threshold", ""},
        {"threshold", "--score sigmoid --gate renormalized"},
        {"quantile", ""},
        {"multirouter", ""},
        {"expert-choice", ""},
        {"deepseek-v2", ""},
        {"shazeer", ""},
        {"hierarchical", ""},
        {"mh-moe", ""},
        {"rmoe", ""},
        {"cmoe", ""},
    };
    for (int i = 0; i < COUNT(recipes); i++) {
        check_edge_model(recipes[i][0], recipes[i][1], 200);
        check_edge_model(recipes[i][0], recipes[i][1], -200);
        check_edge_model(recipes[i][0], recipes[i][1], 1e4);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Layers

void test_edge_norm(void **state) {
    (void)state;
    enum { C = 37, ROWS_OF_X = 6 };
    const double sizes[ROWS_OF_X] = {0, 1, 1e30, 1e-30, 3e19, 1e36};
    real *x = take_normal(C * ROWS_OF_X, 1), *w = take_filled(C, 1), *out[2], *rstd[2],
         *dout = take_normal(C * ROWS_OF_X, 2);
    for (int i = 0; i < C * ROWS_OF_X; i++)
        x[i] = (real)(sizes[i / C] * (i % 2 ? 1 : -1));
    for (int fast = 0; fast < 2; fast++) {
        out[fast] = take_reals(C * ROWS_OF_X);
        rstd[fast] = take_reals(ROWS_OF_X);
        (fast ? fast_rmsnorm_forward : rmsnorm_forward)(out[fast], rstd[fast], x, w, ROWS_OF_X, C,
                                                        1e-5);
        for (int i = 0; i < C * ROWS_OF_X; i++) {
            double size = sizes[i / C], wanted = size / sqrt(size * size + 1e-5);
            assert_near((double)out[fast][i], i % 2 ? wanted : -wanted, 1e-5);
        }
        real *dx = take_reals(C * ROWS_OF_X), *dw = take_reals(C);
        (fast ? fast_rmsnorm_backward : rmsnorm_backward)(dx, dw, dout, x, rstd[fast], w, ROWS_OF_X,
                                                          C);
        assert_finite("dx", dx, C * ROWS_OF_X);
        assert_finite("dw", dw, C);
    }
    free_taken();
}

void test_edge_activation(void **state) {
    (void)state;
    enum { F = 21 };
    for (int activation = SWIGLU; activation <= GELU; activation++) {
        int gated = is_gated(activation), width = F * (1 + gated), choice = 0;
        real *hidden = take_reals(2 * F), *act = take_reals(F), *plain = take_reals(F),
             *dhidden = take_reals(2 * F);
        real *dact = take_filled(F, 1), weight = 1, dweight = 0;
        const double sizes[] = {0, 1, -1, 1e4, -1e4, 88, -88, 89, -89, 300, -300, 1e15, -1e15};
        for (int j = 0; j < F; j++) {
            hidden[j] = (real)sizes[j % COUNT(sizes)];
            hidden[F + j] = 1;
        }
        for (int fast = 0; fast < 2; fast++) {
            (fast ? fast_activation_forward : activation_forward)(fast ? act : plain, hidden, 1, F,
                                                                  activation);
            fill(dact, F, 1);
            (fast ? fast_activation_backward : activation_backward)(
                dhidden, &dweight, dact, hidden, &weight, &choice, 1, F, activation);
            assert_finite("dhidden", dhidden, (size_t)width);
            for (int j = 0; j < F; j++) { // far from 0 these are straight lines, of slope 1 or 0
                double x = (double)hidden[j];
                if (fabs(x) > 80)
                    assert_near((double)dhidden[j], x > 0, 1e-6);
            }
        }
        for (int j = 0; j < F; j++) {
            double x = (double)hidden[j];
            assert_near((double)act[j], (double)plain[j], 1e-6);
            if (fabs(x) > 80)
                assert_near((double)plain[j], x > 0 ? x : 0, 1e-6);
        }
        free_taken();
    }
}

// Logits of 1e4 and of 1e30: the loss is their distance, the gradient 0 or 1.
void test_edge_loss(void **state) {
    (void)state;
    const double sizes[] = {1e4, 1e30, 1e37};
    for (int i = 0; i < 3; i++) {
        real h[2] = {1, -1}, head[3] = {(real)sizes[i], (real)-sizes[i], 0}, nll[2], dh[2],
             dhead[3] = {0}, logits[6];
        const int targets[2] = {0, 0};
        head_loss(nll, dh, dhead, h, head, targets, 2, 1, 3, 1, logits, 2);
        assert_near((double)nll[0], 0, 1e-6);
        assert_near((double)nll[1] / (2 * sizes[i]), 1, 1e-6);
        assert_finite("dh", dh, 2);
        assert_finite("dhead", dhead, 3);
    }
}

// Scores of attention far below 0: the largest one still decides, and later keys are not seen.
void test_edge_attention(void **state) {
    (void)state;
    enum { T = 5, D = 4, WIDTH = 3 * D };
    const double sizes[] = {1, 1e4, 1e15, 1e18};
    for (int i = 0; i < 4; i++) {
        real *qkv = take_reals(T * WIDTH), *out[2], *lse = take_reals(T),
             *dout = take_normal(T * D, 2), *dqkv = take_reals(T * WIDTH);
        for (int t = 0; t < T; t++) {
            for (int d = 0; d < D; d++) {
                qkv[t * WIDTH + d] = (real)sizes[i];
                qkv[t * WIDTH + D + d] = (real)(-sizes[i] * (1 + 0.1 * t));
                qkv[t * WIDTH + 2 * D + d] = (real)(t + d);
            }
        }
        for (int fast = 0; fast < 2; fast++) {
            out[fast] = take_reals(T * D);
            (fast ? fast_attention_forward : attention_forward)(out[fast], lse, qkv, 1, T, 1, 1, D);
            (fast ? fast_attention_backward : attention_backward)(dqkv, dout, out[fast], lse, qkv,
                                                                  1, T, 1, 1, D);
            assert_finite("dqkv", dqkv, T * WIDTH);
            for (int j = 0; j < T * D && i > 0; j++)
                assert_near((double)out[fast][j], j % D,
                            1e-5); // the first key is the least far away
        }
        free_taken();
    }
}

void test_edge_sample(void **state) {
    (void)state;
    const real logits[4] = {(real)1e4, (real)-1e4, (real)9999, (real)1e4}, even[4] = {0, 0, 0, 0};
    for (int i = 0; i < 20; i++) {
        double u = i / 20.0;
        int id = sample(logits, 4, 1e-300, 0, 1, u);
        assert_true(id == 0 || id == 3);
        assert_int_equal(sample(logits, 4, 1, 0, 0, u), 0);
        assert_int_equal(sample(even, 4, 1000, 0, 1, u), i / 5);
        assert_int_equal(sample(even, 4, 5e-324, 0, 1, u), i / 5);
        assert_in_range(sample(logits, 4, 1000, 0, 1, u), 0, 3);
    }
}

// Gradients from so small that their squares underflow to so large that only their norm is a
// number: AdamW's steps are no longer than a few times --lr, and what it keeps is finite.
void test_edge_update(void **state) {
    (void)state;
    const double sizes[] = {0, 1e-44, 1e-30, 1e-22, 1, 1e18, 1e37};
    for (int i = 0; i < COUNT(sizes); i++) {
        Config c = small_config("mixtral");
        apply_options(&c, i % 2 ? "--beta1 0 --weight-decay 0" : "--weight-decay 0");
        Model *m = model_allocate(&c, c.batch * c.seq, 1, NULL);
        randomize_weights(m);
        real *before = take_reals(m->size);
        memcpy(before, m->memory[WEIGHTS], m->size * sizeof(real));
        for (int step = 1; step <= 3; step++) {
            for (size_t j = 0; j < m->size; j++)
                m->memory[GRADS][j] = (real)(j % 3 ? sizes[i] : -sizes[i]);
            cpu_update(m, step, 0.01);
            assert_true(isfinite(m->norm));
        }
        assert_finite("moment 1", m->memory[MOMENT1], m->size);
        assert_finite("moment 2", m->memory[MOMENT2], m->size);
        for (size_t j = 0; j < m->size; j++)
            assert_true(fabs((double)(m->memory[WEIGHTS][j] - before[j])) <= 0.031);
        model_free(m);
        free_taken();
    }
}

// A process may have no rows at an evaluation, and an expert no tokens.
void test_no_tokens(void **state) {
    (void)state;
    for (int i = 0; i < recipe_count; i++) {
        Config c = small_config(recipes[i].name);
        Model *m = model_allocate(&c, c.batch * c.seq, 1, NULL);
        int none = 0;
        randomize_weights(m);
        run_batch(m, &none, &none, 0, c.seq, EVAL_MODE, 1, 0, 0);
        assert_true(m->loss == 0);
        model_free(m);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What was not finite first

// A run of the small model on the tiny data, after one batch forward and backward, but without
// files.
typedef struct Case {
    const char *recipe, *options;
    const char *tensor; // all of its numbers become `value` times the largest number there is,
                        // before the batch
    double value;
    const char *gradient; // its number 17 becomes NaN behind it
    int recompute;
} Case;

Run make_run(const Case *which) {
    Run run;
    char options[300];
    make_data();
    memset(&run, 0, sizeof(run));
    run.config = small_config(which->recipe);
    run.config.vocab = 265;
    snprintf(options, sizeof(options), "%s --recompute %d", which->options, which->recompute);
    set_options(&run.config, options);
    run.backend = &cpu_backend;
    strcpy(run.out, "runs/case");
    int N = run.config.batch * run.config.seq;
    run.inputs = take_ints((size_t)N);
    run.targets = take_ints((size_t)N);
    run.train = data_open(scratch_file("data"), "train", run.config.seq, run.config.vocab, 1);
    run.model = model_allocate(&run.config, N, 1, NULL);
    randomize_weights(run.model);
    return run;
}

void end_run(Run *run) {
    model_free(run->model);
    data_close(run->train);
    free_taken();
}

// The tensor's numbers in `what`.
real *numbers_of(Model *m, int what, const char *name, size_t *size) {
    for (int i = 0; i < m->tensor_count; i++) {
        if (!strcmp(m->tensors[i].name, name)) {
            *size = m->tensors[i].size;
            return m->memory[what] + m->tensors[i].offset;
        }
    }
    fail_msg("there is no %s", name);
    return NULL;
}

void run_case(void *arg) {
    const Case *which = (const Case *)arg;
    Run run = make_run(which);
    Model *m = run.model;
    size_t size;
    for (real *w = which->tensor ? numbers_of(m, WEIGHTS, which->tensor, &size) : NULL;
         w && size > 0; size--)
        *w++ = (real)(which->value * (IS_DOUBLE ? DBL_MAX : (double)FLT_MAX));
    for (int micro = 0; micro < run.config.accum; micro++) {
        Batch batch = next_batch(&run, micro);
        model_forward(m, &batch);
        model_backward(m);
    }
    if (which->gradient)
        numbers_of(m, GRADS, which->gradient, &size)[17] = (real)NAN;
    cpu_update(m, 1, 1e-3);
    end_step(&run, 1, 1e-3);
}

void expect_case(const Case *which, const char *text) {
    char message[4096];
    int status = dies(run_case, (void *)which, message, sizeof(message));
    if (status != 1 || !strstr(message, text) || !strstr(message, "step 1: the loss is") ||
        !strstr(message, "training stops here, and the last checkpoint in runs/case is as it was"))
        fail_msg("exit status %d, expected 1 and \"%s\"; it said:\n%s", status, text, message);
    const char *rest = strchr(message, '\n');
    if (!rest || (rest[1] && rest[1] != '=')) // AddressSanitizer may add lines, which begin so
        fail_msg("more than a line: %s", message);
}

void test_what_was_first(void **state) {
    (void)state;
    for (int recompute = 0; recompute < 2; recompute++) {
        const struct {
            Case which;
            const char *text;
        } list[] = {
            {{"mixtral", "", "layer1.w_in", INFINITY, NULL, 0},
             "The weight layer1.w_in[0,0,0] is inf (1536 of 1536 there are not finite): an earlier "
             "step's update made it so"},
            {{"mixtral", "", "layer0.norm2", NAN, NULL, 0},
             "The weight layer0.norm2[0] is nan (16 of 16"},
            {{"mixtral", "", "layer1.qkv", 0.9, NULL, 0},
             "First not finite: the queries, keys and values of layer1, of token "},
            {{"mixtral", "", "layer0.proj", 0.9, NULL, 0},
             "First not finite: the residual stream behind the attention of layer0, of token "},
            {{"mixtral", "", "layer1.router", 0.9, NULL, 0},
             "First not finite: the router's logits of layer1, of token "},
            {{"deepseek-v3", "--dense-first 0 --aux-weight 0 --score sigmoid", "layer1.router", 0.9,
              NULL, 0},
             "First not finite: the router's logits of layer1, of token "},
            {{"mixtral", "", "layer0.w_in", 0.9, NULL, 0}, "First not finite: expert "},
            {{"mixtral", "", "layer0.w_out", 0.9, NULL, 0},
             "First not finite: the output of layer0, of token "},
            {{"mixtral", "", "layer1.w_out", 0.9, NULL, 0},
             "First not finite: the output of layer1, of token "},
            {{"dense", "", "layer1.dense_in", 0.9, NULL, 0},
             "First not finite: the dense feed-forward, before its activation, of layer1, of "
             "token "},
            {{"mixtral", "--untied 1", "head", 0.9, NULL, 0},
             "First not finite: the loss, of token 0 of sequence 0 of the batch: "},
            {{"mh-moe", "", "layer1.split", 0.9, NULL, 0},
             "First not finite: the router's logits of layer1, of token "},
            {{"mixtral", "", NULL, 0, "layer0.qkv", 0},
             "Searching the gradients from the last layer to the first, the first one that is not finite: layer0.qkv[1,1] is "
             "nan (1 of 512 there are not finite); all weights are finite (the largest, in "},
            {{"mixtral", "--accum 3", NULL, 0, "layer1.w_out", 0},
             "Searching the gradients from the last layer to the first, the first one that is not finite: "
             "layer1.w_out[0,1,5] is nan"},
        };
        for (int i = 0; i < COUNT(list); i++) {
            Case which = list[i].which;
            which.recompute = recompute;
            expect_case(&which, list[i].text);
        }
    }
}

// With --accum, what went wrong in the first batch of a step is found by running it again: of a
// token that is not in the second one, the embedding and what attention adds to it are too large
// together.
void run_early_batch(void *arg) {
    Case which = {"mixtral", "--accum 2 --untied 1", NULL, 0, NULL, *(int *)arg};
    Run run = make_run(&which);
    Model *m = run.model;
    int N = run.config.batch * run.config.seq, rare = -1, *second = take_ints((size_t)N),
        C = run.config.dim;
    next_batch(&run, 1);
    memcpy(second, run.inputs, (size_t)N * sizeof(int));
    next_batch(&run, 0);
    for (int i = 0; i < N && rare < 0; i++) {
        rare = run.inputs[i];
        for (int j = 0; j < N; j++)
            rare = second[j] == rare ? -1 : rare;
    }
    const double most = IS_DOUBLE ? DBL_MAX : (double)FLT_MAX;
    LayerParams *w = &m->params.layer[0];
    for (int c = 0; rare >= 0 && c < C; c++)
        m->params.embed[rare * C + c] = c ? 0 : (real)1e15;
    int value = (run.config.heads + run.config.kv_heads) *
                (C / run.config.heads); // the first row of the values
    for (int c = 0; c < C; c++)
        w->qkv[value * C + c] = w->proj[c] = 0;
    w->qkv[value * C] = 1;
    w->proj[0] = (real)(0.3 * most);
    w->norm1[0] = (real)0.95;
    Batch batch = next_batch(&run, 1);
    if (!isfinite(model_forward(m, &batch)))
        fprintf(stderr, "the second batch is not finite\n");
    check_step(&run, 1, NAN, 0, NAN);
}

void test_early_batch(void **state) {
    (void)state;
    for (int recompute = 0; recompute < 2; recompute++) {
        char message[4096];
        int status = dies(run_early_batch, &recompute, message, sizeof(message));
        if (status != 1 || strncmp(message, "train_moe: step 1", 17) ||
            !strstr(
                message,
                "First not finite: the residual stream behind the attention of layer0, of token "))
            fail_msg("exit status %d; it said:\n%s", status, message);
    }
}

void run_steep(void *arg) { // finite, but not its square
    Case which = {"mixtral", "--clip 0", NULL, 0, NULL, 0};
    Run run = make_run(&which);
    check_step(&run, 7, 5, 0, *(double *)arg);
}

void test_steep(void **state) {
    (void)state;
    char message[4096];
    double norm = IS_DOUBLE ? 1e151 : 1e19, less = 1e9;
    assert_int_equal(dies(run_steep, &norm, message, sizeof(message)), 1);
    assert_non_null(strstr(message, "step 7: the gradient's norm is 1e+"));
    assert_non_null(strstr(message, "Give a --clip above 0"));
    assert_int_equal(dies(run_steep, &less, message, sizeof(message)), 0);
}

// An evaluation whose activations overflow, though all weights are finite.
void run_validation(void *arg) {
    Case which = {"mixtral", "", NULL, 0, NULL, *(int *)arg};
    Run run = make_run(&which);
    size_t size;
    real *w = numbers_of(run.model, WEIGHTS, "layer1.proj", &size);
    fill(w, size, (real)(0.9 * (IS_DOUBLE ? DBL_MAX : (double)FLT_MAX)));
    next_batch(&run, 0);
    run.step = 40;
    forward_loss(&run, run.config.batch);
}

void test_validation(void **state) {
    (void)state;
    for (int recompute = 0; recompute < 2; recompute++) {
        char message[4096];
        int status = dies(run_validation, &recompute, message, sizeof(message));
        if (status != 1 || !strstr(message, "step 40: the validation loss is ") ||
            !strstr(
                message,
                "First not finite: the residual stream behind the attention of layer1, of token "))
            fail_msg("exit status %d; it said:\n%s", status, message);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The program

// Writes `value` over number i of a tensor of a .safetensors file.
void poison_file(const char *path, const char *tensor, size_t i, float value) {
    size_t size, header = 0;
    char *bytes = read_file(path, &size), name[160];
    memcpy(&header, bytes, 8);
    snprintf(name, sizeof(name), "\"%s\"", tensor);
    char *at = strstr(bytes + 8, name);
    assert_non_null(at);
    at = strstr(at, "\"data_offsets\":[");
    assert_true(at && at < bytes + 8 + header);
    memcpy(bytes + 8 + header + strtoul(at + 16, NULL, 10) + i * 4, &value, 4);
    FILE *file = fopen(path, "wb");
    fwrite(bytes, 1, size, file);
    assert_int_equal(fclose(file), 0);
    free(bytes);
}

// Copies the checkpoint of the run `from` into a run of its own, without any file that vouches for
// what is in it.
void copy_checkpoint(const char *from, const char *to) {
    expect(shell(said, sizeof(said),
                 "mkdir -p %s/checkpoint-2 && ln -sfn checkpoint-2 %s/latest && cd %s/latest && cp "
                 "config.json tokenizer.json "
                 "model.safetensors optimizer.safetensors trainer_state.json %s/checkpoint-2",
                 scratch_file(to), scratch_file(to), scratch_file(from), scratch_file(to)),
           0, NULL);
}

void test_damaged_weights(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    const struct {
        const char *file, *tensor;
        size_t number;
        float value;
        const char *text;
    } list[] = {
        {"model.safetensors", "model.layers.1.self_attn.k_proj.weight", 3 * 32 + 5, (float)NAN,
         "model.safetensors: damaged: number [3,5] of model.layers.1.self_attn.k_proj.weight is "
         "nan"},
        {"model.safetensors", "model.layers.0.block_sparse_moe.experts.2.w2.weight", 31,
         (float)INFINITY,
         "model.safetensors: damaged: number [0,31] of "
         "model.layers.0.block_sparse_moe.experts.2.w2.weight is inf"},
        {"model.safetensors", "model.norm.weight", 7, (float)-INFINITY,
         "model.safetensors: damaged: number [7] of model.norm.weight is -inf"},
        {"optimizer.safetensors", "exp_avg_sq.model.layers.0.input_layernorm.weight", 1, (float)NAN,
         "optimizer.safetensors: damaged: number [1] of "
         "exp_avg_sq.model.layers.0.input_layernorm.weight is nan"},
    };
    char options[512];
    expect(run_tiny("sound", "--steps 2"), 0, NULL);
    for (int i = 0; i < COUNT(list); i++) {
        char file[300];
        int optimizer = !strncmp(list[i].file, "optimizer", 9);
        copy_checkpoint("sound", "damaged");
        snprintf(file, sizeof(file), "damaged/checkpoint-2/%s", list[i].file);
        poison_file(scratch_file(file), list[i].tensor, list[i].number, list[i].value);
        expect(run_tiny("damaged", "--resume --steps 3"), 1, list[i].text);
        expect(run_tiny("damaged", "--prompt Once"), optimizer ? 0 : 1,
               optimizer ? NULL : list[i].text);
        snprintf(options, sizeof(options), "--init %s/latest --steps 1", scratch_file("damaged"));
        expect(run_tiny(optimizer ? "begun" : "begun-not", options), optimizer ? 0 : 1,
               optimizer ? NULL : list[i].text);
    }
}

// All weights are finite, but one is so large that no logit can be computed: --prompt says so
// instead of nothing.
void test_prompt_overflows(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    expect(run_tiny("finite", "--steps 2"), 0, NULL);
    copy_checkpoint("finite", "large");
    for (size_t i = 0; i < 32; i++)
        poison_file(scratch_file("large/checkpoint-2/model.safetensors"), "model.norm.weight", i, 3e38f);
    expect(run_tiny("large", "--prompt hello"), 1, "no text can be told: behind ");
    expect(1, 1, "First not finite: the last norm, of token 0 of sequence 0 of the batch: ");
    expect(1, 1, "; all weights are finite (the largest, in norm, is 3e+38); ");
}

// Where --lr is much too high, the message says which weight or which activation broke first.
void test_wild(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    expect(run_tiny("wild", "--steps 2"), 0, NULL);
    expect(run_tiny("wild", "--resume --steps 1000 --save-every 0 --lr 100 --min-lr 100 "
                            "--weight-decay 100 --warmup 0"),
           1, "training stops here, and the last checkpoint in ");
    assert_true(strstr(said, "The weight ") || strstr(said, "First not finite: ") ||
                strstr(said, "Searching the gradients "));
    expect(1, 1, "; a lower --lr or a longer --warmup may help\n");
    assert_latest("wild", "checkpoint-2");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_first_not_finite), cmocka_unit_test(test_edge_scores),
        cmocka_unit_test(test_tiny_scores),      cmocka_unit_test(test_infinite_logits),
        cmocka_unit_test(test_edge_losses),      cmocka_unit_test(test_edge_models),
        cmocka_unit_test(test_edge_norm),        cmocka_unit_test(test_edge_activation),
        cmocka_unit_test(test_edge_loss),        cmocka_unit_test(test_edge_attention),
        cmocka_unit_test(test_edge_sample),      cmocka_unit_test(test_edge_update),
        cmocka_unit_test(test_no_tokens),        cmocka_unit_test(test_what_was_first),
        cmocka_unit_test(test_early_batch),      cmocka_unit_test(test_steep),
        cmocka_unit_test(test_validation),       cmocka_unit_test(test_damaged_weights),
        cmocka_unit_test(test_prompt_overflows), cmocka_unit_test(test_wild),
    };
    begin_tests();
    return cmocka_run_group_tests_name("numbers", tests, NULL, scratch_done);
}
