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
#include "dev/test/both.h"
#include "dev/test/plain.h"
#include "dev/test/slopes.h"

// ---------------------------------------------------------------------------------------------------------------------
// Plain loops and fast routines
//
// The usual build trains with the functions of dev/cpu instead of the lesson's plain loops. Behind dev/test/both.h, matmul()
// is the plain loop and fast_matmul() is the function of dev/cpu, and so on. Here both compute one layer of a usual size;
// dev/test/layers.c does the same for hundreds of sizes, for hostile numbers and for several numbers of threads.

enum { TOKENS = 2 * 70, LENGTH = 70, DIM = 48, HEADS = 4, KV_HEADS = 2, HEAD_DIM = 12, VOCAB = 101 };

// Every number found is as close to the wanted one as rounding allows, measured by the size of all of them.
void assert_equal_but_for_rounding(const char *what, const real *found, const real *wanted, size_t n) {
    assert_close(what, found, wanted, n, rms(wanted, n), 200 * EPSILON);
}

// Two arrays of n numbers each: for the fast result and for the plain one.
void take_two(real *two[2], size_t n) {
    two[0] = take_reals(n);
    two[1] = take_reals(n);
}

void test_plain_matmul(void **state) {
    (void)state;
    int N = TOKENS, I = DIM, O = VOCAB;
    real *x = take_normal((size_t)N * I, 1), *w = take_normal((size_t)O * I, 2), *dout = take_normal((size_t)N * O, 3);
    real *out[2], *dx[2], *dw[2];
    take_two(out, (size_t)N * O);
    take_two(dx, (size_t)N * I);
    take_two(dw, (size_t)O * I);
    for (int add = SET; add <= ADD; add++) { // the second time, to what is there
        fast_matmul(out[0], x, w, N, I, O, add);
        fast_matmul_dx(dx[0], dout, w, N, I, O, add);
        fast_matmul_dw(dw[0], dout, x, N, I, O);
        matmul(out[1], x, w, N, I, O, add);
        matmul_dx(dx[1], dout, w, N, I, O, add);
        matmul_dw(dw[1], dout, x, N, I, O);
        assert_equal_but_for_rounding("out", out[0], out[1], (size_t)N * O);
        assert_equal_but_for_rounding("dx", dx[0], dx[1], (size_t)N * I);
        assert_equal_but_for_rounding("dw", dw[0], dw[1], (size_t)O * I);
    }
    free_taken();
}

// A row of logits, as in the loss.
void test_plain_softmax(void **state) {
    (void)state;
    real *row[2] = {take_normal(VOCAB, 1), take_normal(VOCAB, 1)};
    real fast = fast_softmax(row[0], VOCAB), plain = softmax(row[1], VOCAB);
    assert_equal_but_for_rounding("log of the sum", &fast, &plain, 1);
    assert_equal_but_for_rounding("softmax", row[0], row[1], VOCAB);
    free_taken();
}

void test_plain_rmsnorm(void **state) {
    (void)state;
    size_t size = TOKENS * DIM;
    real *x = take_normal(size, 1), *w = take_normal(DIM, 2), *dout = take_normal(size, 3);
    real *out[2], *rstd[2], *dx[2], *dw[2];
    take_two(out, size);
    take_two(rstd, TOKENS);
    take_two(dx, size);
    take_two(dw, DIM);
    fast_rmsnorm_forward(out[0], rstd[0], x, w, TOKENS, DIM, 1e-5);
    fast_rmsnorm_backward(dx[0], dw[0], dout, x, rstd[0], w, TOKENS, DIM);
    rmsnorm_forward(out[1], rstd[1], x, w, TOKENS, DIM, 1e-5);
    rmsnorm_backward(dx[1], dw[1], dout, x, rstd[1], w, TOKENS, DIM);
    assert_equal_but_for_rounding("out", out[0], out[1], size);
    assert_equal_but_for_rounding("rstd", rstd[0], rstd[1], TOKENS);
    assert_equal_but_for_rounding("dx", dx[0], dx[1], size);
    assert_equal_but_for_rounding("dw", dw[0], dw[1], DIM);
    free_taken();
}

// Rotary positions, and attention over what they turned.
void test_plain_attention(void **state) {
    (void)state;
    int B = TOKENS / LENGTH, T = LENGTH, H = HEADS, KV = KV_HEADS, D = HEAD_DIM, width = (H + 2 * KV) * D;
    size_t size = TOKENS * (size_t)width, out_size = (size_t)TOKENS * H * D;
    real *out[2], *lse[2], *dqkv[2];
    real *qkv = take_normal(size, 1), *turned = take_normal(size, 1);
    real *dout = take_normal(out_size, 2), *angles = take_reals((size_t)T * D);
    take_two(out, out_size);
    take_two(lse, (size_t)TOKENS * H);
    take_two(dqkv, size);
    rope_angles(angles, 0, T, D, 10000);
    rope(qkv, width, TOKENS, T, H + KV, D, angles, 1);
    plain_rope(turned, width, TOKENS, T, H + KV, D, 10000, 1);
    fast_attention_forward(out[0], lse[0], qkv, B, T, H, KV, D);
    fast_attention_backward(dqkv[0], dout, out[0], lse[0], qkv, B, T, H, KV, D);
    attention_forward(out[1], lse[1], qkv, B, T, H, KV, D);
    attention_backward(dqkv[1], dout, out[1], lse[1], qkv, B, T, H, KV, D);
    assert_equal_but_for_rounding("turned", qkv, turned, size);
    assert_equal_but_for_rounding("out", out[0], out[1], out_size);
    assert_equal_but_for_rounding("lse", lse[0], lse[1], (size_t)TOKENS * H);
    assert_equal_but_for_rounding("dqkv", dqkv[0], dqkv[1], size);
    free_taken();
}

// Five experts, to which the tokens go unevenly: as the model runs them, and row after row by plain loops.
void test_plain_experts(void **state) {
    (void)state;
    enum { E = 5, F = 20 };
    static Model m; // for its scratch memory
    const int widths[E] = {F, F, F, F, F}, kinds[E] = {SWIGLU, SWIGLU, SWIGLU, SWIGLU, SWIGLU};
    const int offset[E + 1] = {0, 60, 60, 61, 100, TOKENS};
    int *token = take_ints(TOKENS), *choice = take_ints(TOKENS);
    size_t size = TOKENS * DIM, in = (size_t)E * 2 * F * DIM, out = (size_t)E * F * DIM;
    real *x = take_normal(size, 1), *dout = take_normal(size, 2), *weight = take_normal(TOKENS, 3);
    real *w_in = take_normal(in, 4), *w_out = take_normal(out, 5), *act = take_reals(TOKENS * F);
    Experts experts = take_experts(E, DIM, widths, kinds);
    for (int row = 0; row < TOKENS; row++) {
        token[row] = choice[row] = 3 * row % TOKENS;
    }
    real *answer[2], *hidden[2], *dx[2], *dw_in[2], *dw_out[2], *dweight[2];
    take_two(answer, size);
    take_two(hidden, TOKENS * 2 * F);
    take_two(dx, size);
    take_two(dw_in, in);
    take_two(dw_out, out);
    take_two(dweight, TOKENS);
    experts_forward(&m, answer[0], hidden[0], x, w_in, w_out, token, offset, &experts);
    experts_backward(&m, dx[0], dweight[0], dw_in[0], dw_out[0], dout, x, hidden[0], weight, w_in, w_out, token, choice,
                     offset, &experts);
    plain_experts_forward(answer[1], hidden[1], act, x, w_in, w_out, token, offset, &experts);
    plain_experts_backward(dx[1], dweight[1], dw_in[1], dw_out[1], dout, x, hidden[1], weight, w_in, w_out, token, choice,
                           offset, &experts);
    assert_equal_but_for_rounding("answer", answer[0], answer[1], size);
    assert_equal_but_for_rounding("dx", dx[0], dx[1], size);
    assert_equal_but_for_rounding("dw_in", dw_in[0], dw_in[1], in);
    assert_equal_but_for_rounding("dw_out", dw_out[0], dw_out[1], out);
    assert_equal_but_for_rounding("dweight", dweight[0], dweight[1], TOKENS);
    arena_free(&m.scratch);
    free_taken();
}

// The products of the experts alone, which read the tokens' rows of x and of dout.
void test_plain_grouped(void **state) {
    (void)state;
    enum { E = 3, O = 40 };
    const int offset[E + 1] = {0, 50, 50, TOKENS}, I_of[E] = {DIM, DIM, DIM}, O_of[E] = {O, O, O};
    int *token = take_ints(TOKENS);
    size_t size = TOKENS * DIM, out_size = TOKENS * O, w_size = (size_t)E * O * DIM;
    real *x = take_normal(size, 1), *w = take_normal(w_size, 2), *dout = take_normal(out_size, 3);
    real *out[2], *dx[2], *dw[2];
    for (int row = 0; row < TOKENS; row++) {
        token[row] = 3 * row % TOKENS;
    }
    take_two(out, out_size);
    take_two(dx, size);
    take_two(dw, w_size);
    fast_grouped_matmul(out[0], x, token, w, offset, E, I_of, O_of);
    fast_grouped_matmul_dx(dx[0], dout, token, w, offset, E, I_of, O_of);
    fast_grouped_matmul_dw(dw[0], dout, NULL, x, token, offset, E, I_of, O_of);
    grouped_matmul(out[1], x, token, w, offset, E, I_of, O_of);
    grouped_matmul_dx(dx[1], dout, token, w, offset, E, I_of, O_of);
    grouped_matmul_dw(dw[1], dout, NULL, x, token, offset, E, I_of, O_of);
    assert_equal_but_for_rounding("out", out[0], out[1], out_size);
    assert_equal_but_for_rounding("dx", dx[0], dx[1], size);
    assert_equal_but_for_rounding("dw", dw[0], dw[1], w_size);
    free_taken();
}

void test_plain_activation(void **state) {
    (void)state;
    enum { F = 20 };
    real *weight = take_normal(TOKENS, 2), *hidden = take_normal(TOKENS * 2 * F, 1);
    int *choice = take_ints(TOKENS);
    for (int row = 0; row < TOKENS; row++) {
        choice[row] = 3 * row % TOKENS;
    }
    for (int activation = SWIGLU; activation <= GELU; activation++) {
        int H = F * (1 + is_gated(activation));
        real *act[2], *dhidden[2], *dweight[2], *dact[2] = {take_normal(TOKENS * F, 3), take_normal(TOKENS * F, 3)};
        take_two(act, TOKENS * F);
        take_two(dhidden, TOKENS * H);
        take_two(dweight, TOKENS);
        fast_activation_forward(act[0], hidden, TOKENS, F, activation);
        fast_activation_backward(dhidden[0], dweight[0], dact[0], hidden, weight, choice, TOKENS, F, activation);
        activation_forward(act[1], hidden, TOKENS, F, activation);
        activation_backward(dhidden[1], dweight[1], dact[1], hidden, weight, choice, TOKENS, F, activation);
        assert_equal_but_for_rounding("act", act[0], act[1], TOKENS * F);
        assert_equal_but_for_rounding("dhidden", dhidden[0], dhidden[1], TOKENS * H);
        assert_equal_but_for_rounding("dweight", dweight[0], dweight[1], TOKENS);
        assert_equal_but_for_rounding("dact", dact[0], dact[1], TOKENS * F);
    }
    free_taken();
}

void test_plain_sum_of_squares(void **state) {
    (void)state;
    real *x = take_normal(100000, 1); // several chunks of the fast one
    assert_near(fast_sum_of_squares(x, 100000) / sum_of_squares(x, 100000), 1, 1e-13);
    free_taken();
}

// The lesson has the loss only once, so it is held against dev/test/plain.h.
void test_plain_head_loss(void **state) {
    (void)state;
    size_t size = TOKENS * DIM, head_size = (size_t)VOCAB * DIM;
    real *h = take_normal(size, 1), *head = take_normal(head_size, 2), *logits = take_reals((size_t)TOKENS * VOCAB);
    real *nll[2], *dh[2], *dhead[2];
    int *targets = take_ints(TOKENS);
    random_tokens(targets, TOKENS, VOCAB, 3);
    take_two(nll, TOKENS);
    take_two(dh, size);
    take_two(dhead, head_size);
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

uint64_t hash_ints(uint64_t h, const int *list, size_t n) {
    for (size_t i = 0; i < n; i++) {
        h = hash64(h ^ (uint64_t)(uint32_t)list[i]);
    }
    return h;
}

// Which numbers are the K highest of each row of p (rows,E), and in which order?
uint64_t hash_best(uint64_t h, const real *p, int rows, int E, int K) {
    int best[16];
    for (int row = 0; row < rows; row++) {
        select_topk(best, p + (size_t)row * E, 1, E, K);
        h = hash_ints(h, best, K);
    }
    return h;
}

// Which numbers are in each row of list (rows,K), in any order?
uint64_t hash_sets(uint64_t h, const int *list, int rows, int K) {
    for (int row = 0; row < rows; row++) {
        uint64_t sum = 0;
        for (int k = 0; k < K; k++) {
            sum += hash64((uint64_t)(uint32_t)list[(size_t)row * K + k]);
        }
        h = hash64(h ^ sum);
    }
    return h;
}

// Which numbers does ReLU let through?
uint64_t hash_signs(uint64_t h, const real *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        h = hash64(h ^ (x[i] > 0));
    }
    return h;
}

uint64_t decisions(Model *m) {
    const Config *c = &m->config;
    uint64_t h = 0;
    for (int l = 0; l < c->layers; l++) {
        const LayerActs *a = &m->acts.layer[l];
        const Route *r = &a->route;
        if (dense_activation(c, l) == RELU) {
            h = hash_signs(h, a->dense_hidden, (size_t)m->batch.B * m->batch.T * dense_width(c, l));
        }
        for (int which = 0; which < attention_routes(c); which++) {
            const HeadRoute *of_heads = &heads_of(m, l)->route[which];
            const Route *all = &of_heads->all;
            h = hash_sets(h, all->expert, of_heads->heads * all->N, all->K);
            h = hash_sets(h, all->served, of_heads->heads * all->N, all->K);
        }
        if (!is_moe(c, l)) {
            continue;
        }

        // Which experts each token has chosen, and which of these choices are served.
        h = hash_ints(h, r->expert, (size_t)r->N * r->K);
        h = hash_ints(h, r->served, (size_t)r->N * r->K);
        if (c->activation == RELU) {
            h = hash_signs(h, a->hidden, (size_t)r->offset[r->E] * c->ffn);
        }

        // With noise the load depends on the best expert that was not chosen, too. The unbiased loss makes a choice of its
        // own.
        if (c->select == HIERARCHICAL) {
            const Hierarchical *s = (const Hierarchical *)*router_state(m, l, &hierarchical_router);
            const Level *of_groups = &s->groups, *of_experts = &s->experts;
            h = hash_best(h, of_groups->p, r->N, of_groups->count, of_groups->take + c->noise);
            h = hash_best(h, of_experts->p, r->N * of_experts->rows, of_experts->count, of_experts->take + c->noise);
        } else if (c->noise || c->balance == UNBIASED) {
            h = hash_best(h, r->p, r->N, r->E, r->K + c->noise);
        }
    }
    return h;
}

typedef struct Check {
    Model *m;
    int inputs[64], targets[64], B, T, mode;
} Check;

double objective(void *arg) {
    Check *k = (Check *)arg;
    double loss = run_batch(k->m, k->inputs, k->targets, k->B, k->T, k->mode, 1, 1, 0);
    decided = decisions(k->m);
    return loss + balance_losses(k->m);
}

int all_checked, all_skipped; // numbers whose gradients were compared, or were not, being at a kink

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
        dropped += is_moe(config, l) ? k.m->acts.layer[l].route.dropped : 0;
    model_backward(k.m);
    real *grads = take_reals(k.m->size);
    memcpy(grads, k.m->memory[GRADS], k.m->size * sizeof(real));
    for (int t = 0; t < k.m->tensor_count; t++) {
        const Tensor *tensor = &k.m->tensors[t];
        char name[256];
        if (!tensor->trained)
            continue;
        snprintf(name, sizeof(name), "%s, %s", what, tensor->name);
        skipped += check_slopes(name, k.m->memory[WEIGHTS] + tensor->offset, tensor->size, grads + tensor->offset,
                                objective, &k, samples);
        checked += samples;
    }
    if (skipped)
        print_message("    %s: %d of %d skipped at a kink\n", what, skipped, checked);
    assert_true(skipped * 4 <= checked);
    all_checked += checked - skipped;
    all_skipped += skipped;
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
        {"mixtral", "--norms 0"},
        {"mixtral", "--mixer lstm"},
        {"mixtral", "--mixer lstm --cell 21 --recompute 1 --layers 3"},
        {"mixtral", "--mixer lstm --cell 7 --seq 2"},
        {"dense", "--mixer lstm --cell 40 --untied 1"},
        {"hierarchical", "--mixer lstm --norms 0 --last-feed 0 --moe-sigmoid 1 --dropout 0.2"},
        {"shazeer-lstm", "--cell 9 --recompute 1 --aux-weight 0.5 --load-weight 0.5"},
        {"mixtral", "--dropout 0.3 --recompute 1"},
        {"mixtral", "--moe-sigmoid 1 --moe-every 2"},
        {"mixtral", "--moe-sigmoid 1 --recompute 1"},
        {"mixtral", "--moe-sigmoid 1 --dropout 0.2 --norms 0 --last-feed 0 --jitter 0.1"},
        {"mixtral", "--last-feed 0 --shared 1"},
        {"dense", "--dropout 0.3 --last-feed 0"},
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
        {"switchhead", "--kv-heads 4 --attention-aux-weight 0.5"},
        {"switchhead", "--kv-heads 1 --attention-aux-weight 0.5 --group sequence --attention-topk 1"},
        {"switchhead", "--attention-capacity-factor 0.7 --attention-aux-weight 0.5 --qk-norm 1"},
        {"switchhead", "--attention-capacity-factor 0.5 --group sequence --value-embedding 1 --ngrams 20"},
        {"switchhead", "--heads 1 --kv-heads 1 --attention-experts 5 --attention-topk 3 --head-width 0 --norms 0"},
        {"switchhead", "--attention-experts 1 --attention-topk 1 --seq 2 --untied 1"},
        {"moa", "--attention-aux-weight 0.5 --attention-z-weight 0.5 --qk-norm 1 --value-embedding 1"},
        {"moa", "--attention-aux-weight 0.5 --group sequence --heads 2 --head-width 0"},
        {"moa", "--attention-capacity-factor 0.7 --attention-aux-weight 0.5 --qk-norm 1"},
        {"moa", "--attention-experts 4 --seq 2 --moe-every 0 --attention-capacity-factor 0.5"},
        {"hierarchical", "--attention-experts 3 --attention-aux-weight 0.5 --head-width 8"},
        {"shazeer", "--attention-experts 6 --attention-form moa --attention-aux-weight 0.5"},
        {"deepseek-v3", "--attention-experts 3 --attention-capacity-factor 0.7 --attention-aux-weight 0.5"},
        {"qwen3", "--attention-experts 3 --attention-aux-weight 0.5"},
        {"mh-moe", "--attention-experts 6 --attention-form moa --attention-capacity-factor 0.7"},
        {"rmoe", "--attention-experts 3 --head-width 6"},
        {"expert-choice", "--attention-experts 3"},
        {"fast", "--attention-experts 3 --optimizer adamw"},
        {"dense", "--attention-experts 3 --attention-aux-weight 0.5 --dropout 0.2"},
        {"dense", "--attention-experts 6 --attention-form moa --attention-aux-weight 0.5 --dropout 0.2"},
        {"dense", "--activation gelu --untied 1"},
        {"dense", "--seq 1 --activation relu"},
        {"dense", "--ngrams 20 --ngram-order 3 --seq 2"},
        {"fast", "--ngram-gate 1 --dropout 0.3"},
        {"dense", "--ngrams 9 --ngram-gate 1 --norms 0"},
        {"fast", "--ngram-order 3 --ngram-gate 1 --recompute 1 --layers 3"},
        {"mixtral", "--qkv-bias 1 --head-width 6"},
        {"mixtral", "--qkv-bias 1 --qk-norm 1 --qk-norm-over row --rope-scaling llama3 --rope-original 40 --rope-theta 30"},
        {"fast", "--qk-norm-over row --kv-heads 1 --head-width 10 --optimizer adamw"},
        {"mixtral", "--shared 1 --shared-gate 1 --shared-ffn 7"},
        {"deepseek-v3", "--shared-gate 1 --dense-ffn 9 --recompute 1 --layers 3"},
        {"mixtral", "--shared 1 --shared-gate 1 --activation gelu"},
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
    run_batch(once, inputs, targets, 2, 8, TRAIN_MODE, 1, 1, 0);
    model_backward(once);
    for (int micro = 0; micro < 2; micro++) {
        run_batch(twice, inputs, targets, 2, 8, TRAIN_MODE, 0.5, 1, 0);
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
            m->memory[WEIGHTS][m->tensors[t].offset + i] = (real)(m->tensors[t].init == INIT_ONE ? 1 + 0.5 * u : u);
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
    set_options(&c, g->options);
    c.jitter = 0;
    Model *m = model_allocate(&c, c.batch * c.seq, 1, NULL);
    int inputs[16], targets[16], N = 16;
    golden_fill(m, inputs, targets);
    double loss = run_batch(m, inputs, targets, 2, 8, TRAIN_MODE, 1, 1, 0);
    assert_near(loss, g->loss[0], tolerance);
    assert_near(loss + balance_losses(m), g->total, tolerance);
    for (int i = 0; i < 16; i++) {
        double logit = 0;
        for (int k = 0; k < c.dim; k++)
            logit += (double)m->acts.h[(i / 8 * 8 + 7) * c.dim + k] * (double)m->params.head[i % 8 * c.dim + k];
        assert_near(logit, g->logits[i], tolerance);
    }
    int moe = 0, dropped = 0;
    for (int l = 0; l < c.layers; l++) {
        if (!is_moe(&c, l))
            continue;
        for (int i = 0; i < N * c.topk; i++)
            assert_int_equal(m->acts.layer[l].route.expert[i], g->chosen[moe][i]);
        dropped += m->acts.layer[l].route.dropped;
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
        loss = run_batch(m, inputs, targets, 2, 8, TRAIN_MODE, 1, 1, 0);
        assert_near(loss, g->loss[step], tolerance * 10);
        model_backward(m);
    }
    model_free(m);
}

void test_golden(void **state) {
    (void)state;
    for (int i = 0; i < COUNT(golden); i++)
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
            last = run_batch(m, inputs, targets, 2, 8, TRAIN_MODE, 1, step, 0);
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
    c.vocab = 700; // more weights than model_update gives to one thread
    c.seed = seed;
    int inputs[210], targets[210];
    set_threads(threads);
    Model *m = model_allocate(&c, 210, 1, NULL);
    model_init(m, NULL);
    for (int step = 1; step <= 4; step++) {
        random_tokens(inputs, 210, 300, (uint64_t)(2 * step));
        random_tokens(targets, 210, 300, (uint64_t)(2 * step + 1));
        run_batch(m, inputs, targets, 3, 70, TRAIN_MODE, 1, step, 0);
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
        cmocka_unit_test(test_plain_matmul),
        cmocka_unit_test(test_plain_softmax),
        cmocka_unit_test(test_plain_rmsnorm),
        cmocka_unit_test(test_plain_attention),
        cmocka_unit_test(test_plain_activation),
        cmocka_unit_test(test_plain_grouped),
        cmocka_unit_test(test_plain_experts),
        cmocka_unit_test(test_plain_sum_of_squares),
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
    int failed = cmocka_run_group_tests_name("test_moe", tests, NULL, scratch_done);
    if (all_checked)
        printf("%d coordinates of gradients checked, %d skipped at a kink\n", all_checked, all_skipped);
    return failed;
}
