// What models of other trainers have besides, which is off here by default: biases of queries, keys and values, norms over all
// of a token's queries, heads that are wider than their share, scaled positions (dev/qkv.h, qk_norm.h, rope.h), and shared experts
// with a gate (dev/shared_expert.h). Attention and the shared experts against loops that follow the formulas; --recompute;
// generation; shapes; refusals. Gradients by finite differences are in test_moe.c, several processes in ranks.c, a GPU in cuda_model.cu.

#include "dev/test/trainer.h"
#include "dev/test/model.h"
#include "dev/test/plain.h"

enum { SHAPES_T = 8, SHAPES_N = 16 }; // tokens of a sequence and of a batch

const char *const shapes[] = {
    "--qkv-bias 1",
    "--qk-norm 1 --qk-norm-over row",
    "--head-width 6",
    "--heads 3 --kv-heads 1 --head-width 10 --dim 16",
    "--rope-scaling llama3 --rope-factor 3 --rope-original 40 --rope-theta 30 --head-width 8", // pairs of all three kinds
    "--rope-scaling linear --rope-factor 2.5",
    "--shared 2 --shared-gate 1",
    "--shared 1 --shared-gate 1 --shared-ffn 20 --activation relu --dense-first 1 --dense-ffn 9",
    "--qkv-bias 1 --qk-norm 1 --qk-norm-over row --head-width 8 --value-embedding 1 --shared 1 --shared-gate 1",
};

Config shape_config(int i) {
    Config c = small_config("mixtral");
    set_options(&c, shapes[i]);
    return c;
}

// A model with random weights that has run a batch, forward.
Model *model_of_shape(const Config *c, int *inputs, int *targets, int mode) {
    random_tokens(inputs, SHAPES_N, c->vocab, 1);
    random_tokens(targets, SHAPES_N, c->vocab, 2);
    Model *m = model_allocate(c, SHAPES_N, 1, NULL);
    randomize_weights(m);
    run_batch(m, inputs, targets, 2, SHAPES_T, mode, 1, 1, 0);
    return m;
}

// The frequency of a pair as transformers' _compute_llama3_parameters has it, by wavelengths.
double plain_frequency(const Config *c, double frequency) {
    double length = 2 * acos(-1) / frequency, slow = c->rope_original / c->rope_low, fast = c->rope_original / c->rope_high;
    if (c->rope_scaling == ROPE_NONE || (c->rope_scaling == ROPE_LLAMA3 && length < fast))
        return frequency;
    if (c->rope_scaling == ROPE_LINEAR || length > slow)
        return frequency / c->rope_factor;
    double smooth = (c->rope_original / length - c->rope_low) / (c->rope_high - c->rope_low);
    return (1 - smooth) * frequency / c->rope_factor + smooth * frequency;
}

// The heads of one kind of token n, `count` of them from row `first` of the product on: product, bias, norm, word's value, turn.
void plain_heads(const Model *m, int l, int n, double *to, int first, int count, const real *norm, int values, int turn) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    int C = c->dim, D = head_width(c), width = count * D, over = c->qk_norm_over == OVER_ROW ? width : D;
    for (int i = 0; i < width; i++) {
        int row = first * D + i;
        to[i] = inner(m->acts.layer[l].h1 + n * C, w->qkv + (size_t)row * C, C) + (w->qkv_bias ? (double)w->qkv_bias[row] : 0);
        if (values && w->value_embed)
            to[i] += (double)w->value_embed[m->batch.inputs[n] * width + i];
    }
    for (int part = 0; part < width && norm; part += over) {
        double square = 0;
        for (int i = 0; i < over; i++)
            square += to[part + i] * to[part + i] / over;
        for (int i = 0; i < over; i++)
            to[part + i] *= (double)norm[i] / sqrt(square + c->norm_eps);
    }
    for (int i = 0; i < (turn ? width : 0); i++) {
        int pair = i % D;
        if (pair >= D / 2)
            continue;
        double angle = n % SHAPES_T * plain_frequency(c, pow(c->rope_theta, -2.0 * pair / D)), a = to[i], b = to[i + D / 2];
        to[i] = a * cos(angle) - b * sin(angle);
        to[i + D / 2] = b * cos(angle) + a * sin(angle);
    }
}

// wanted (N,C): layer l's x plus its attention.
void plain_mix(const Model *m, int l, real *wanted) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    int C = c->dim, H = c->heads, KV = c->kv_heads, D = head_width(c), row = (H + 2 * KV) * D;
    double *all = (double *)take((size_t)SHAPES_N * row, sizeof(double)), *att = (double *)take((size_t)H * D, sizeof(double));
    for (int n = 0; n < SHAPES_N; n++) {
        plain_heads(m, l, n, all + n * row, 0, H, w->q_norm, 0, 1);
        plain_heads(m, l, n, all + n * row + H * D, H, KV, w->k_norm, 0, 1);
        plain_heads(m, l, n, all + n * row + (H + KV) * D, H + KV, KV, NULL, 1, 0);
        memset(att, 0, (size_t)H * D * sizeof(double));
        for (int h = 0; h < H; h++) {
            const double *keys = all + (H + h / (H / KV)) * D, *values = keys + KV * D;
            double p[SHAPES_T];
            int start = n / SHAPES_T * SHAPES_T;
            for (int s = start; s <= n; s++) {
                p[s - start] = 0;
                for (int i = 0; i < D; i++)
                    p[s - start] += all[n * row + h * D + i] * keys[s * row + i] / sqrt(D);
            }
            plain_softmax_of(p, n - start + 1);
            for (int s = start; s <= n; s++) {
                for (int i = 0; i < D; i++)
                    att[h * D + i] += p[s - start] * values[s * row + i];
            }
        }
        for (int i = 0; i < C; i++) {
            double sum = (double)m->acts.layer[l].x[n * C + i];
            for (int j = 0; j < H * D; j++)
                sum += (double)w->proj[(size_t)i * H * D + j] * att[j];
            wanted[n * C + i] = (real)sum;
        }
    }
}

void test_shapes_of_attention(void **state) {
    (void)state;
    for (int i = 0; i < COUNT(shapes); i++) {
        Config c = shape_config(i);
        int inputs[SHAPES_N], targets[SHAPES_N], size = SHAPES_N * c.dim;
        Model *m = model_of_shape(&c, inputs, targets, CHECK_MODE);
        real *wanted = take_reals((size_t)size);
        for (int l = 0; l < c.layers; l++) {
            plain_mix(m, l, wanted);
            for (int j = 0; j < size; j++)
                assert_near((double)m->acts.layer[l].mid[j], (double)wanted[j], IS_DOUBLE ? 1e-11 : 2e-4);
        }
        model_free(m);
        free_taken();
    }
}

// The shared experts of a layer, and dense layers: out = gate * act W_out^T, where only shared experts may have a gate.
void test_shapes_of_feed(void **state) {
    (void)state;
    for (int i = 0; i < COUNT(shapes); i++) {
        Config c = shape_config(i);
        int inputs[SHAPES_N], targets[SHAPES_N], C = c.dim;
        Model *m = model_of_shape(&c, inputs, targets, CHECK_MODE);
        real *out = take_reals((size_t)SHAPES_N * C);
        for (int l = 0; l < c.layers && c.shared; l++) {
            const LayerParams *w = &m->params.layer[l];
            int F = is_moe(&c, l) ? c.shared * c.ffn : (c.topk + c.shared) * c.ffn, kind = dense_activation(&c, l);
            if (is_moe(&c, l) ? c.shared_ffn : c.dense_ffn)
                F = is_moe(&c, l) ? c.shared_ffn : c.dense_ffn;
            assert_int_equal(m->tensors[find_tensor(m, l, "dense_out")].shape[2], F);
            assert_true(!w->shared_router == !(c.shared_gate && is_moe(&c, l)));
            memset(out, 0, (size_t)SHAPES_N * C * sizeof(real));
            dense_forward(m, l, out);
            for (int n = 0; n < SHAPES_N; n++) {
                const real *x = m->acts.layer[l].h2 + n * C;
                double gate = w->shared_router ? 1 / (1 + exp(-inner(x, w->shared_router, C))) : 1;
                for (int j = 0; j < C; j++) {
                    double sum = 0;
                    for (int f = 0; f < F; f++) {
                        real slope, value = activate(kind, (real)inner(x, w->dense_in + (size_t)f * C, C), &slope);
                        double up = is_gated(kind) ? inner(x, w->dense_in + (size_t)(F + f) * C, C) : 1;
                        sum += (double)value * up * (double)w->dense_out[(size_t)j * F + f];
                    }
                    assert_near((double)out[n * C + j], gate * sum, IS_DOUBLE ? 1e-11 : 1e-4);
                }
            }
        }
        model_free(m);
        free_taken();
    }
}

// --recompute changes no bit of any gradient.
void test_shapes_recomputed(void **state) {
    (void)state;
    for (int i = 0; i < COUNT(shapes); i++) {
        Config c = shape_config(i);
        Model *m[2];
        int inputs[SHAPES_N], targets[SHAPES_N];
        c.layers = 3;
        for (int again = 0; again < 2; again++) {
            c.recompute = again;
            m[again] = model_of_shape(&c, inputs, targets, TRAIN_MODE);
            model_backward(m[again]);
        }
        if (memcmp(m[0]->memory[GRADS], m[1]->memory[GRADS], m[0]->size * sizeof(real)))
            fail_msg("%s: --recompute changes gradients", shapes[i]);
        model_free(m[0]);
        model_free(m[1]);
    }
}

// Gradients have the same bits with any number of threads.
void test_shapes_threads(void **state) {
    (void)state;
    for (int i = 0; i < COUNT(shapes); i++) {
        Config c = shape_config(i);
        int inputs[SHAPES_N], targets[SHAPES_N];
        for (int team = 0; team < TEAMS; team++) {
            set_threads(teams[team]);
            Model *m = model_of_shape(&c, inputs, targets, TRAIN_MODE);
            model_backward(m);
            assert_same_bits(shapes[i], team, bits_of(m->memory[GRADS], m->size, 1));
            model_free(m);
        }
        set_threads(1);
    }
}

// Generation with the cache gives the logits of the forward pass.
void test_shapes_generate(void **state) {
    (void)state;
    for (int i = 0; i < COUNT(shapes); i++) {
        Config c = shape_config(i);
        int inputs[SHAPES_N], targets[SHAPES_N], V = c.vocab;
        Model *m = model_of_shape(&c, inputs, targets, EVAL_MODE);
        real *wanted = take_reals((size_t)SHAPES_N * V), *logits = take_reals(V);
        all_logits(m, wanted, SHAPES_N);
        for (int t = 0; t < SHAPES_T; t++) {
            model_generate(m, inputs[t], t, logits);
            for (int v = 0; v < V; v++)
                assert_near((double)logits[v], (double)wanted[t * V + v], IS_DOUBLE ? 1e-10 : 1e-4);
        }
        model_free(m);
        free_taken();
    }
}

// What they are called, and how large they are: other files rely on it.
void test_shapes_of_tensors(void **state) {
    (void)state;
    static const struct {
        const char *options, *kind;
        int dims, rows, cols;
    } cases[] = {
        {"--qkv-bias 1", "qkv_bias", 1, 1, 32},
        {"--qkv-bias 1 --head-width 6", "qkv_bias", 1, 1, 48},
        {"--qk-norm 1", "q_norm", 1, 1, 4},
        {"--qk-norm 1 --qk-norm-over row", "q_norm", 1, 1, 16},
        {"--qk-norm 1 --qk-norm-over row", "k_norm", 1, 1, 8},
        {"--head-width 6", "qkv", 2, 48, 16},
        {"--head-width 6", "proj", 2, 16, 24},
        {"--shared 1 --shared-gate 1", "shared_router", 2, 1, 16},
        {"--shared 2 --shared-ffn 7", "dense_in", 2, 14, 16},
        {"--moe-every 0 --dense-ffn 7", "dense_out", 2, 16, 7},
    };
    for (int i = 0; i < COUNT(cases); i++) {
        Config c = small_config("mixtral");
        set_options(&c, cases[i].options);
        Model *m = model_allocate(&c, 8, 0, NULL);
        int t = find_tensor(m, 1, cases[i].kind);
        assert_true(t >= 0);
        assert_int_equal(m->tensors[t].dims, cases[i].dims);
        assert_int_equal(m->tensors[t].shape[1], cases[i].rows);
        assert_int_equal(m->tensors[t].shape[2], cases[i].cols);
        c.optimizer = MUON;
        int is_matrix = cases[i].dims == 2 && strcmp(cases[i].kind, "shared_router");
        assert_int_equal(takes_muon(&c, &m->tensors[t]), is_matrix);
        model_free(m);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shapes_of_attention), cmocka_unit_test(test_shapes_of_feed),
        cmocka_unit_test(test_shapes_recomputed),   cmocka_unit_test(test_shapes_threads),
        cmocka_unit_test(test_shapes_generate),     cmocka_unit_test(test_shapes_of_tensors),
    };
    begin_tests();
    return cmocka_run_group_tests_name("shapes", tests, NULL, scratch_done);
}
