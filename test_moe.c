// test_moe.c: the proof of the lesson, in four parts:
//
//   1. The fast routines compute what plain loops compute.
//   2. The gradient of every tensor, in every recipe, is what finite differences say it is.
//   3. Losses, gradients and five AdamW steps are those that PyTorch finds.
//   4. Training lowers the loss, and gives the same bits with any number of threads.
//
// `make test_moe` builds this file in float and in double and runs both: finite differences only mean something in double.
// TEST='test_grad*' runs only the tests whose names match. With VALGRIND set, sizes are small. All other tests are in
// dev/test/, one program for each subject; `make test` runs everything.

#include "dev/test/trainer.h"
#include "dev/test/golden.h"
#include "dev/test/model.h"
#include "dev/test/plain.h"
#include "dev/test/slopes.h"

// ---------------------------------------------------------------------------------------------------------------------
// Plain loops and fast routines
//
// dev/test/plain.h computes each layer in the shortest loops that say what it is. Here both compute one layer of a usual
// size; dev/test/layers.c does the same for hundreds of sizes, for hostile numbers and for several numbers of threads.

enum { TOKENS = 2 * 70, LENGTH = 70, DIM = 48, HEADS = 4, KV_HEADS = 2, HEAD_DIM = 12, VOCAB = 101 };

// Every number found is as close to the wanted one as rounding allows, measured by the size of all of them.
void assert_equal_but_for_rounding(const char *what, const real *found, const real *wanted, size_t n) {
    assert_close(what, found, wanted, n, rms(wanted, n), 200 * EPSILON);
}

void test_plain_product(void **state) {
    (void)state;
    int m = TOKENS, n = VOCAB, k = DIM;
    real *a = take_normal((size_t)m * k, 1), *b = take_normal((size_t)n * k, 2);
    real *fast = take_reals((size_t)m * n), *plain = take_reals((size_t)m * n);
    product(fast, along_rows(a, k, NULL), along_rows(b, k, NULL), m, n, k, 0);
    plain_product(plain, along_rows(a, k, NULL), along_rows(b, k, NULL), m, n, k, 0);
    assert_equal_but_for_rounding("a b^T", fast, plain, (size_t)m * n);
    free_taken();
}

void test_plain_rmsnorm(void **state) {
    (void)state;
    size_t size = TOKENS * DIM;
    real *x = take_normal(size, 1), *w = take_normal(DIM, 2), *dout = take_normal(size, 3);
    real *out[2], *rstd[2], *dx[2], *dw[2];
    real *partial = take_reals((size_t)div_up(TOKENS, CHUNK) * DIM);
    for (int plain = 0; plain < 2; plain++) {
        out[plain] = take_reals(size);
        rstd[plain] = take_reals(TOKENS);
        dx[plain] = take_reals(size);
        dw[plain] = take_reals(DIM);
    }
    rmsnorm_forward(out[0], rstd[0], x, w, TOKENS, DIM, 1e-5);
    rmsnorm_backward(dx[0], dw[0], dout, x, rstd[0], w, TOKENS, DIM, partial);
    plain_rmsnorm_forward(out[1], rstd[1], x, w, TOKENS, DIM, 1e-5);
    plain_rmsnorm_backward(dx[1], dw[1], dout, x, rstd[1], w, TOKENS, DIM);
    assert_equal_but_for_rounding("out", out[0], out[1], size);
    assert_equal_but_for_rounding("dx", dx[0], dx[1], size);
    assert_equal_but_for_rounding("dw", dw[0], dw[1], DIM);
    free_taken();
}

// Rotary positions, and attention over what they turned.
void test_plain_attention(void **state) {
    (void)state;
    int B = TOKENS / LENGTH, T = LENGTH, H = HEADS, KV = KV_HEADS, D = HEAD_DIM;
    size_t ld = (size_t)(H + 2 * KV) * D, size = TOKENS * ld, width = (size_t)TOKENS * H * D;
    real *qkv[2], *out[2], *lse[2], *dqkv[2];
    real *dout = take_normal(width, 2), *angles = take_reals((size_t)T * D);
    real *scratch = take_reals(attention_room(T, D));
    for (int plain = 0; plain < 2; plain++) {
        qkv[plain] = take_normal(size, 1);
        out[plain] = take_reals(width);
        lse[plain] = take_reals((size_t)TOKENS * H);
        dqkv[plain] = take_reals(size);
    }
    rope_angles(angles, 0, T, D, 10000);
    rope(qkv[0], ld, TOKENS, T, H + KV, D, angles, 1);
    attention_forward(out[0], lse[0], qkv[0], B, T, H, KV, D, scratch);
    attention_backward(dqkv[0], dout, out[0], lse[0], qkv[0], B, T, H, KV, D, scratch);
    plain_rope(qkv[1], ld, TOKENS, T, H + KV, D, 10000, 1);
    plain_attention_forward(out[1], lse[1], qkv[1], B, T, H, KV, D);
    plain_attention_backward(dqkv[1], dout, qkv[1], B, T, H, KV, D);
    assert_equal_but_for_rounding("turned", qkv[0], qkv[1], size);
    assert_equal_but_for_rounding("out", out[0], out[1], width);
    assert_equal_but_for_rounding("lse", lse[0], lse[1], (size_t)TOKENS * H);
    assert_equal_but_for_rounding("dqkv", dqkv[0], dqkv[1], size);
    free_taken();
}

// Five experts of SwiGLU, to which the tokens go unevenly.
void test_plain_experts(void **state) {
    (void)state;
    enum { E = 5, F = 20 };
    int widths[E] = {F, F, F, F, F}, kinds[E] = {SWIGLU, SWIGLU, SWIGLU, SWIGLU, SWIGLU};
    int offset[E + 1] = {0, 60, 60, 61, 100, TOKENS}, *token = take_ints(TOKENS), *choice = take_ints(TOKENS);
    size_t size = TOKENS * DIM, in = (size_t)E * 2 * F * DIM, out = (size_t)E * F * DIM;
    real *x = take_normal(size, 1), *dout = take_normal(size, 2), *weight = take_normal(TOKENS, 3);
    real *w_in = take_normal(in, 4), *w_out = take_normal(out, 5);
    for (int row = 0; row < TOKENS; row++)
        token[row] = choice[row] = 3 * row % TOKENS;
    Experts experts = {E, DIM, widths, kinds, w_in, w_out, offset, token};
    real *answer[2], *hidden[2], *act[2], *dx[2], *dw_in[2], *dw_out[2], *dweight[2];
    real *dact = take_reals(TOKENS * F), *dhidden = take_reals(TOKENS * 2 * F);
    for (int plain = 0; plain < 2; plain++) {
        answer[plain] = take_reals(size);
        hidden[plain] = take_reals(TOKENS * 2 * F);
        act[plain] = take_reals(TOKENS * F);
        dx[plain] = take_reals(size);
        dw_in[plain] = take_reals(in);
        dw_out[plain] = take_reals(out);
        dweight[plain] = take_reals(TOKENS);
    }
    experts_forward(answer[0], hidden[0], act[0], x, &experts, 0);
    experts_backward(dx[0], dw_in[0], dw_out[0], dweight[0], dout, x, hidden[0], weight, choice, dact, dhidden, &experts, 0);
    plain_experts_forward(answer[1], hidden[1], act[1], x, &experts, 0);
    plain_experts_backward(dx[1], dw_in[1], dw_out[1], dweight[1], dout, x, hidden[1], weight, choice, &experts, 0);
    assert_equal_but_for_rounding("answer", answer[0], answer[1], size);
    assert_equal_but_for_rounding("dx", dx[0], dx[1], size);
    assert_equal_but_for_rounding("dw_in", dw_in[0], dw_in[1], in);
    assert_equal_but_for_rounding("dw_out", dw_out[0], dw_out[1], out);
    assert_equal_but_for_rounding("dweight", dweight[0], dweight[1], TOKENS);
    free_taken();
}

void test_plain_head_loss(void **state) {
    (void)state;
    size_t size = TOKENS * DIM, head_size = (size_t)VOCAB * DIM;
    real *h = take_normal(size, 1), *head = take_normal(head_size, 2), *logits = take_reals((size_t)TOKENS * VOCAB);
    real *nll[2], *dh[2], *dhead[2];
    int *targets = take_ints(TOKENS);
    random_tokens(targets, TOKENS, VOCAB, 3);
    for (int plain = 0; plain < 2; plain++) {
        nll[plain] = take_reals(TOKENS);
        dh[plain] = take_reals(size);
        dhead[plain] = take_reals(head_size);
    }
    head_loss(nll[0], dh[0], dhead[0], h, head, targets, TOKENS, DIM, VOCAB, 1.0 / TOKENS, logits, TOKENS);
    plain_head_loss(nll[1], dh[1], dhead[1], h, head, targets, TOKENS, DIM, VOCAB, 1.0 / TOKENS);
    assert_equal_but_for_rounding("nll", nll[0], nll[1], TOKENS);
    assert_equal_but_for_rounding("dh", dh[0], dh[1], size);
    assert_equal_but_for_rounding("dhead", dhead[0], dhead[1], head_size);
    free_taken();
}

// ---------------------------------------------------------------------------------------------------------------------
// Finite differences

// A hash of all discrete decisions of the last forward pass. Where one of them changes, the loss has a kink.
uint64_t decisions(const Model *m) {
    uint64_t h = 0;
    int N = m->B * m->T;
    for (int l = 0; l < m->config.layers; l++) {
        const LayerState *s = &m->layers[l];
        const Config *c = &m->config;
        int more[16], K = s->gate.K + c->noise,
                      two = c->select == HIERARCHICAL; // noise: the load looks at the best one not chosen, too
        for (int row = 0; is_moe(c, l) && (c->noise || c->balance == UNBIASED) && row < N * (s->gate.per + two);
             row++) {
            const Gate *g = row < N * s->gate.per ? &s->gate : &s->groups;
            select_topk(more, g->p + (size_t)(g == &s->gate ? row : row - N * s->gate.per) * g->E, 1, g->E, K);
            for (int k = 0; k < K; k++)
                h = hash64(h ^ (uint64_t)more[k]);
        }
        if (is_moe(&m->config, l)) {
            for (int i = 0; i < s->plan.N * s->plan.K; i++)
                h = hash64(h ^ (uint64_t)(uint32_t)(s->plan.expert[i] * 1000 + s->plan.key[i] + 1));
        }
        size_t relu = is_moe(c, l) && c->activation == RELU ? (size_t)s->plan.offset[s->plan.E] * c->ffn : 0;
        for (size_t i = 0; i < relu; i++)
            h = hash64(h ^ (s->hidden[i] > 0));
        relu = dense_activation(c, l) == RELU ? (size_t)N * dense_width(c, l) : 0;
        for (size_t i = 0; i < relu; i++)
            h = hash64(h ^ (s->dense_hidden[i] > 0));
    }
    return h;
}

typedef struct Check {
    Model *m;
    int inputs[64], targets[64], B, T, mode;
} Check;

double objective(void *arg) {
    Check *k = (Check *)arg;
    double loss = model_forward(k->m, k->inputs, k->targets, k->B, k->T, k->mode, 1, 1, 0);
    decided = decisions(k->m);
    return loss + model_aux(k->m);
}

// Checks the gradient of loss + aux by every tensor of a model. Returns how many choices were dropped in that forward pass.
int check_gradients(const char *what, const Config *config, int B, int T, int samples, int mode) {
    if (!IS_DOUBLE)
        return 0;
    Check k;
    int skipped = 0, checked = 0, dropped = 0;
    k.m = model_allocate(config, B * T, 1, NULL);
    k.B = B;
    k.T = T;
    k.mode = mode;
    randomize_weights(k.m);
    random_tokens(k.inputs, B * T, config->vocab, 1);
    random_tokens(k.targets, B * T, config->vocab, 2);
    objective(&k);
    for (int l = 0; l < config->layers; l++)
        dropped += is_moe(config, l) ? k.m->layers[l].plan.dropped : 0;
    model_backward(k.m);
    real *grads = take_reals(k.m->size);
    memcpy(grads, k.m->memory[GRADS], k.m->size * sizeof(real));
    for (int t = 0; t < k.m->tensor_count; t++) {
        const Tensor *tensor = &k.m->tensors[t];
        char name[256];
        if (tensor_is_buffer(tensor))
            continue;
        snprintf(name, sizeof(name), "%s, %s", what, tensor->name);
        skipped += check_slopes(name, k.m->memory[WEIGHTS] + tensor->offset, tensor->size, grads + tensor->offset,
                                objective, &k, samples);
        checked += samples;
    }
    if (skipped)
        print_message("    %s: %d of %d skipped at a kink\n", what, skipped, checked);
    assert_true(skipped * 4 <= checked);
    model_free(k.m);
    free_taken();
    decided = 0;
    return dropped;
}

void test_gradients(void **state) {
    (void)state;
    for (int r = 0; r < recipe_count; r++) {
        Config c = small_config(recipes[r].name);
        char what[64];
        snprintf(what, sizeof(what), "%s at evaluation", recipes[r].name);
        check_gradients(recipes[r].name, &c, 2, 8, is_slow() ? 1 : 12, TRAIN_MODE);
        check_gradients(what, &c, 2, 8, is_slow() ? 1 : 12, CHECK_MODE);
        // the balance losses alone, so large that their gradients are seen
        double *const weights[] = {&c.aux_weight, &c.load_weight, &c.device_weight, &c.comm_weight, &c.z_weight};
        double top = 0;
        for (int i = 0; i < 5; i++)
            top = fmax(top, *weights[i]);
        for (int i = 0; i < 5 && top > 0; i++)
            *weights[i] = *weights[i] > 0 ? 0.5 : 0;
        snprintf(what, sizeof(what), "%s with large balance losses", recipes[r].name);
        if (top > 0)
            check_gradients(what, &c, 2, 8, is_slow() ? 1 : 6, TRAIN_MODE);
    }
}

// Experts that can take few tokens, so that choices are dropped while the gradient is checked, in training and at evaluation.
void test_gradients_of_dropped(void **state) {
    (void)state;
    static const char *const cases[] = {"switch", "gshard", "glam", "st-moe", "deepseek-v2", "mixtral"};
    for (int i = 0; i < 12; i++) {
        Config c = small_config(cases[i / 2]);
        char what[64];
        int mode = i % 2 ? CHECK_MODE : TRAIN_MODE;
        set_options(&c, "--capacity-factor 0.5 --eval-capacity-factor 0.5 --drop-exempt 0 --aux-weight 0.5");
        snprintf(what, sizeof(what), "%s, dropping%s", cases[i / 2], i % 2 ? " at evaluation" : "");
        int dropped = check_gradients(what, &c, 2, 8, is_slow() ? 1 : 6, mode);
        if (IS_DOUBLE && !dropped)
            fail_msg("%s: nothing was dropped", what);
    }
}

// Combinations of options that no recipe has.
void test_gradients_of_variants(void **state) {
    (void)state;
    static const char *const variants[][2] = {
        {"mixtral", "--untied 1"},
        {"mixtral", "--shared 1"},
        {"mixtral", "--shared 2 --activation relu --aux-weight 0.5"},
        {"mixtral", "--dense-first 1"},
        {"mixtral", "--activation gelu"},
        {"mixtral", "--activation geglu --shared 1"},
        {"mixtral", "--gate probability --aux-weight 0.5"},
        {"mixtral", "--experts 1 --topk 1 --z-weight 0.5"},
        {"mixtral", "--topk 4 --aux-weight 0.5"},
        {"mixtral", "--z-weight 0.5"},
        {"mixtral", "--capacity-factor 0.5 --topk 2"},
        {"mixtral", "--capacity-factor 0.5 --group sequence --aux-weight 0.5"},
        {"mixtral", "--group sequence --aux-weight 0.5"},
        {"mixtral", "--kv-heads 1"},
        {"mixtral", "--kv-heads 4"},
        {"mixtral", "--seq 1"},
        {"mixtral", "--norm-eps 0.1 --rope-theta 100"},
        {"mixtral", "--recurrent 6 --jitter 0.3"},
        {"mixtral", "--recurrent 6 --moe-every 2 --layers 4 --untied 1"},
        {"mixtral", "--recurrent 6 --noise 1 --load-weight 0.3 --balance cv2 --aux-weight 0.5"},
        {"mixtral", "--recurrent 6 --history-decay 0.9 --aux-weight 0.5"},
        {"mixtral", "--recurrent 6 --routers 2 --topk 4 --aux-weight 0.5"},
        {"mixtral", "--subtokens 2 --jitter 0.2 --shared 1"},
        {"mixtral", "--subtokens 4 --group sequence --aux-weight 0.5 --capacity-factor 0.7"},
        {"mixtral", "--subtokens 2 --noise 1 --load-weight 0.3 --balance cv2 --aux-weight 0.5 --group sequence"},
        {"mixtral", "--subtokens 2 --routers 2 --topk 4 --z-weight 0.1 --aux-weight 0.5"},
        {"mixtral", "--routers 2 --topk 4 --capacity-factor 0.5"},
        {"mixtral", "--routers 2 --topk 4 --group sequence --aux-weight 0.5 --jitter 0.2"},
        {"mixtral", "--routers 2 --topk 4 --balance cv2 --aux-weight 0.5"},
        {"mixtral", "--routers 2 --topk 2 --gate probability --balance gshard --aux-weight 0.5"},
        {"mixtral", "--overflow next --capacity-factor 0.5"},
        {"mixtral", "--overflow next --capacity-factor 0.5 --gate probability --drop-order token --aux-weight 0.5"},
        {"mixtral", "--overflow next --capacity-factor 0.7 --group sequence --z-weight 0.1 --aux-weight 0.5"},
        {"mixtral", "--history-decay 0.9 --balance variance --aux-weight 0.5"},
        {"mixtral", "--history-decay 0.9 --jitter 0.2 --groups 2 --group-topk 1"},
        {"mixtral", "--mixed 1 --shared 1"},
        {"mixtral", "--mixed 1 --balance width --group sequence --aux-weight 0.5 --untied 1"},
        {"mixtral", "--mixed 1 --subtokens 2 --capacity-factor 0.5"},
        {"mixtral", "--noise 1 --balance cv2 --load-weight 0.3 --topk 1 --gate probability"},
        {"mixtral", "--noise 1 --jitter 0.2 --z-weight 0.1 --load-weight 0.3"},
        {"mixtral", "--bias-rate 0.01 --score softmax"},
        {"mixtral", "--bias-rate 0.01 --score sigmoid --balance cv2 --aux-weight 0.5 --scale 2"},
        {"mixtral", "--score sigmoid --aux-weight 0.5 --group sequence"},
        {"mixtral", "--score sigmoid --second-threshold 0.5 --scale 2.5 --capacity-factor 0.7"},
        {"mixtral", "--dense-activation relu --moe-every 2"},
        {"mixtral", "--dense-activation geglu --dense-first 1 --activation relu"},
        {"mixtral", "--group step --aux-weight 0.5 --device-weight 0.5 --groups 2"},
        {"mixtral", "--groups 3 --experts 7 --device-weight 0.5"},
        {"shazeer", "--group sequence --aux-weight 0.5 --load-weight 0.5"},
        {"shazeer", "--balance variance --capacity-factor 0.7 --aux-weight 0.5"},
        {"hierarchical", "--group sequence --aux-weight 0.5 --load-weight 0.5"},
        {"hierarchical", "--balance variance --aux-weight 0.5 --capacity-factor 0.7 --scale 1"},
        {"hierarchical", "--noise 0 --load-weight 0 --aux-weight 0.5 --recurrent 6"},
        {"hierarchical", "--subtokens 2 --noise 0 --load-weight 0 --aux-weight 0.5 --activation swiglu"},
        {"deepseek-v3", "--groups 4 --group-topk 2 --aux-weight 0.5"},
        {"deepseek-v2", "--group batch --scale 16 --comm-weight 0.5 --jitter 0.2"},
        {"deepseekmoe", "--group sequence --device-weight 0.5 --capacity-factor 0.7 --drop-order score"},
        {"threshold", "--jitter 0.2 --gate renormalized --aux-weight 0.5"},
        {"threshold", "--threshold 0.1 --max-active 3 --capacity-factor 0.7 --subtokens 2"},
        {"threshold", "--score sigmoid --recurrent 6 --balance cv2 --aux-weight 0.5"},
        {"expert-choice", "--group sequence"},
        {"expert-choice", "--jitter 0.2 --z-weight 0.1 --shared 1 --subtokens 2"},
        {"expert-choice", "--recurrent 6 --mixed 1 --device-weight 0.5 --groups 2"},
        {"base", "--group sequence"},
        {"base", "--score softmax --z-weight 0.1 --jitter 0.2"},
        {"base", "--recurrent 6 --subtokens 1 --shared 1"},
        {"hash", "--mixed 1 --shared 1 --capacity-factor 0.7"},
        {"switch", "--jitter 0.3 --aux-weight 0.5 --moe-every 1"},
        {"switch", "--group batch --aux-weight 0.5"},
        {"switch", "--capacity-factor 0.5"},
        {"switch", "--balance cv2 --aux-weight 0.5"},
        {"switch", "--activation swiglu --z-weight 0.1"},
        {"dense", "--activation gelu --untied 1"},
        {"dense", "--seq 1 --activation relu"},
    };
    for (int i = 0; i < (int)(sizeof(variants) / sizeof(variants[0])); i++) {
        Config c = small_config(variants[i][0]);
        char what[128];
        set_options(&c, variants[i][1]);
        snprintf(what, sizeof(what), "%s %s", variants[i][0], variants[i][1]);
        check_gradients(what, &c, 2, c.seq, is_slow() ? 1 : 5, TRAIN_MODE);
    }
}

// Two micro-steps with half of the gradient each add up to the gradient of one step.
void test_gradient_scale(void **state) {
    (void)state;
    Config c = small_config("mixtral");
    int inputs[32], targets[32];
    random_tokens(inputs, 32, c.vocab, 1);
    random_tokens(targets, 32, c.vocab, 2);
    Model *once = model_allocate(&c, 16, 1, NULL), *twice = model_allocate(&c, 16, 1, NULL);
    randomize_weights(once);
    randomize_weights(twice);
    model_forward(once, inputs, targets, 2, 8, TRAIN_MODE, 1, 1, 0);
    model_backward(once);
    for (int micro = 0; micro < 2; micro++) {
        model_forward(twice, inputs, targets, 2, 8, TRAIN_MODE, 0.5, 1, 0);
        model_backward(twice);
    }
    for (size_t i = 0; i < once->size; i++)
        assert_near((double)twice->memory[GRADS][i], (double)once->memory[GRADS][i], IS_DOUBLE ? 1e-14 : 1e-5);
    model_free(once);
    model_free(twice);
}

// ---------------------------------------------------------------------------------------------------------------------
// Golden values: what dev/test/golden.py computed with PyTorch from the specification

void golden_fill(Model *m, int *inputs, int *targets) {
    for (int t = 0; t < m->tensor_count; t++) {
        for (size_t i = 0; i < m->tensors[t].size; i++) {
            double u = golden_hash((uint32_t)t * 1000003u + (uint32_t)i) / 4294967296.0 - 0.5;
            m->memory[WEIGHTS][m->tensors[t].offset + i] = (real)(tensor_is_norm(&m->tensors[t]) ? 1 + 0.5 * u : u);
        }
    }
    int T = m->config.seq, B = m->config.batch;
    for (int i = 0; i < B * (T + 1); i++) {
        int token = (int)(golden_hash(999u * 1000003u + (uint32_t)i) % (uint32_t)m->config.vocab), b = i / (T + 1),
            t = i % (T + 1);
        if (t < T)
            inputs[b * T + t] = token;
        if (t > 0)
            targets[b * T + t - 1] = token;
    }
}

void check_golden(const Golden *g) {
    double tolerance = IS_DOUBLE ? 1e-12 : 2e-5;
    Config c = small_config(g->recipe);
    c.jitter = 0;
    Model *m = model_allocate(&c, c.batch * c.seq, 1, NULL);
    int inputs[16], targets[16], N = 16;
    golden_fill(m, inputs, targets);
    double loss = model_forward(m, inputs, targets, 2, 8, TRAIN_MODE, 1, 1, 0);
    assert_near(loss, g->loss[0], tolerance);
    assert_near(loss + model_aux(m), g->total, tolerance);
    for (int i = 0; i < 16; i++) {
        double logit = 0;
        for (int k = 0; k < c.dim; k++)
            logit += (double)m->h[(i / 8 * 8 + 7) * c.dim + k] * (double)m->weights.head[i % 8 * c.dim + k];
        assert_near(logit, g->logits[i], tolerance);
    }
    int moe = 0, dropped = 0;
    for (int l = 0; l < c.layers; l++) {
        if (!is_moe(&c, l))
            continue;
        for (int i = 0; i < N * c.topk; i++)
            assert_int_equal(m->layers[l].plan.expert[i], g->chosen[moe][i]);
        dropped += m->layers[l].plan.dropped;
        moe++;
    }
    assert_int_equal(moe, g->moe_layers);
    assert_int_equal(dropped, g->dropped);
    model_backward(m);
    assert_int_equal(m->tensor_count, g->tensors);
    for (int t = 0; t < m->tensor_count; t++) {
        const real *d = m->memory[GRADS] + m->tensors[t].offset;
        size_t n = m->tensors[t].size, at[3] = {0, n / 2, n - 1};
        double norm = 0;
        assert_int_equal(n, g->tensor[t].size);
        for (size_t i = 0; i < n; i++)
            norm += (double)d[i] * (double)d[i];
        assert_near(sqrt(norm), g->tensor[t].norm, tolerance);
        for (int i = 0; i < 3; i++)
            assert_near((double)d[at[i]], g->tensor[t].sample[i], tolerance);
    }
    c.weight_decay = m->config.weight_decay = 0.1;
    for (int step = 1; step <= 5; step++) { // the loss after each AdamW step
        double norm = gradient_norm(m);
        assert_near(norm, g->grad_norm[step - 1], tolerance * 10);
        model_update(m, step, 1e-2, norm);
        loss = model_forward(m, inputs, targets, 2, 8, TRAIN_MODE, 1, 1, 0);
        assert_near(loss, g->loss[step], tolerance * 10);
        model_backward(m);
    }
    model_free(m);
}

void test_golden(void **state) {
    (void)state;
    for (int i = 0; i < 3; i++)
        check_golden(&golden[i]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Training: the loss falls, and the bits are the same every time

// Thirty steps on a batch of random tokens: the model learns them by heart, whatever its recipe.
void test_loss_falls(void **state) {
    (void)state;
    for (int r = 0; r < recipe_count; r++) {
        Config c = small_config(recipes[r].name);
        int inputs[16], targets[16];
        random_tokens(inputs, 16, c.vocab, 1);
        random_tokens(targets, 16, c.vocab, 2);
        Model *m = model_allocate(&c, 16, 1, NULL);
        model_init(m, NULL);
        double first = 0, last = 0;
        for (int step = 1; step <= 30; step++) {
            last = model_forward(m, inputs, targets, 2, 8, TRAIN_MODE, 1, step, 0);
            if (step == 1)
                first = last;
            model_backward(m);
            model_update(m, step, 0.02, gradient_norm(m));
        }
        if (!(fabs(first - log(c.vocab)) < 0.5) || !(last < 0.5 * first))
            fail_msg("%s: the loss was %g at first and is %g after thirty steps", recipes[r].name, first, last);
        model_free(m);
    }
}

// Returns the weights after four steps; the caller frees them. The batch is large enough to make every parallel loop parallel.
real *train_some(const char *recipe, int threads, int seed, size_t *size) {
    Config c = small_config(recipe);
    set_options(&c, "--dim 32 --ffn 40 --seq 70 --batch 3 --lr 0.01");
    if (c.select == TOP_K)
        set_options(&c, "--capacity-factor 1");
    c.vocab = 700; // more weights than UPDATE_CHUNK
    c.seed = seed;
    int inputs[210], targets[210];
    set_threads(threads);
    Model *m = model_allocate(&c, 210, 1, NULL);
    model_init(m, NULL);
    for (int step = 1; step <= 4; step++) {
        random_tokens(inputs, 210, 300, (uint64_t)(2 * step));
        random_tokens(targets, 210, 300, (uint64_t)(2 * step + 1));
        model_forward(m, inputs, targets, 3, 70, TRAIN_MODE, 1, step, 0);
        model_backward(m);
        model_update(m, step, c.lr, gradient_norm(m));
    }
    real *weights = (real *)allocate(m->size, sizeof(real));
    memcpy(weights, m->memory[WEIGHTS], m->size * sizeof(real));
    *size = m->size * sizeof(real);
    model_free(m);
    set_threads(1);
    return weights;
}

void test_same_bits(void **state) {
    (void)state;
    for (int r = 0; r < (is_slow() ? 0 : recipe_count); r++) {
        size_t size;
        real *one = train_some(recipes[r].name, 1, 1, &size);
        for (int threads = 1; threads <= 2; threads++) {
            real *again = train_some(recipes[r].name, threads, 1, &size);
            assert_memory_equal(again, one, size);
            free(again);
        }
        real *other = train_some(recipes[r].name, 1, 2, &size);
        assert_true(memcmp(other, one, size) != 0);
        free(other);
        free(one);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_plain_product),
        cmocka_unit_test(test_plain_rmsnorm),
        cmocka_unit_test(test_plain_attention),
        cmocka_unit_test(test_plain_experts),
        cmocka_unit_test(test_plain_head_loss),
        cmocka_unit_test(test_gradients),
        cmocka_unit_test(test_gradients_of_dropped),
        cmocka_unit_test(test_gradients_of_variants),
        cmocka_unit_test(test_gradient_scale),
        cmocka_unit_test(test_golden),
        cmocka_unit_test(test_loss_falls),
        cmocka_unit_test(test_same_bits),
    };
    begin_tests();
    return cmocka_run_group_tests_name("test_moe", tests, NULL, scratch_done);
}
