// test_moe.c: the tests of train_moe, with cmocka. `make test` builds this file twice, in float and in double, and runs
// both: finite differences only mean something in double; everything else is run in both.

#define TRAIN_MOE_NO_MAIN
#include "train_moe.c"
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/wait.h>
#include <cmocka.h>
#include "dev/golden.h"

#define IS_DOUBLE (sizeof(real) == 8)

// ---------------------------------------------------------------------------------------------------------------------
// Helpers

// Fails where a and b are further apart than tolerance times the larger of |b| and 1; NaN fails too.
void assert_near(double a, double b, double tolerance) {
    if (!(fabs(a - b) <= tolerance * fmax(1, fabs(b))))
        fail_msg("%.17g is not within %g of %.17g", a, tolerance, b);
}

// The small model of dev/golden.py.
Config small_config(const char *recipe) {
    Config c;
    config_defaults(&c);
    config_recipe(&c, recipe);
    c.layers = 2;
    c.dim = 16;
    c.heads = 4;
    c.kv_heads = 2;
    c.experts = 4;
    c.topk = strcmp(recipe, "switch") ? 2 : 1;
    c.ffn = 12;
    c.seq = 8;
    c.batch = 2;
    c.vocab = 50;
    c.threads = 1;
    config_check(&c);
    return c;
}

// ---------------------------------------------------------------------------------------------------------------------
// Golden values: what dev/golden.py computed with PyTorch from the specification

uint32_t golden_hash(uint32_t key) {
    uint32_t x = key * 2654435761u + 12345u;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

void golden_fill(Model *m, int *inputs, int *targets) {
    for (int t = 0; t < m->tensor_count; t++) {
        for (size_t i = 0; i < m->tensors[t].size; i++) {
            double u = golden_hash((uint32_t)t * 1000003u + (uint32_t)i) / 4294967296.0 - 0.5;
            m->memory[WEIGHTS][m->tensors[t].offset + i] = (real)(tensor_is_norm(&m->tensors[t]) ? 1 + 0.5 * u : u);
        }
    }
    int T = m->config.seq, B = m->config.batch;
    for (int i = 0; i < B * (T + 1); i++) {
        int token = (int)(golden_hash(999u * 1000003u + (uint32_t)i) % (uint32_t)m->config.vocab), b = i / (T + 1), t = i % (T + 1);
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
// Finite differences

// Every discrete decision of the last forward pass, hashed: where one changes, the loss has a kink.
uint64_t decisions(const Model *m) {
    uint64_t h = 0;
    int N = m->B * m->T;
    for (int l = 0; l < m->config.layers; l++) {
        const LayerState *s = &m->layers[l];
        if (is_moe(&m->config, l)) {
            for (int i = 0; i < N * s->plan.K; i++)
                h = hash64(h ^ (uint64_t)(uint32_t)(s->plan.expert[i] * 1000 + s->plan.key[i] + 1));
        }
        if (m->config.activation == RELU) {
            size_t used = is_moe(&m->config, l) ? (size_t)s->plan.offset[s->plan.E] * m->config.ffn : 0;
            for (size_t i = 0; i < used; i++)
                h = hash64(h ^ (s->hidden[i] > 0));
            for (size_t i = 0; i < (size_t)N * dense_width(&m->config, l); i++)
                h = hash64(h ^ (s->dense_hidden[i] > 0));
        }
    }
    return h;
}

typedef struct Check {
    Model *m;
    int inputs[64], targets[64], B, T;
} Check;

double objective(Check *k) {
    double loss = model_forward(k->m, k->inputs, k->targets, k->B, k->T, TRAIN_MODE, 1, 1, 0);
    return loss + model_aux(k->m);
}

// Fourth-order central differences of loss + aux against the gradient, `samples` places in every tensor. The error is
// relative to the larger of the gradient and its tensor's root mean square.
void check_gradients(const Config *config, int B, int T, int samples) {
    if (!IS_DOUBLE)
        return;
    Check k;
    k.m = model_allocate(config, B * T, 1, NULL);
    k.B = B;
    k.T = T;
    Model *m = k.m;
    uint64_t stream = random_stream(7, RANDOM_INIT, 1, 2);
    for (int t = 0; t < m->tensor_count; t++) {
        real *w = m->memory[WEIGHTS] + m->tensors[t].offset;
        for (size_t i = 0; i < m->tensors[t].size; i++)
            w[i] = (real)(0.3 * random_normal(stream, m->tensors[t].offset + i) + tensor_is_norm(&m->tensors[t]));
    }
    for (int i = 0; i < B * T; i++) {
        k.inputs[i] = (int)(hash64((uint64_t)i) % (uint64_t)config->vocab);
        k.targets[i] = (int)(hash64((uint64_t)i + 1000) % (uint64_t)config->vocab);
    }
    objective(&k);
    model_backward(m);
    real *grads = (real *)allocate(m->size, sizeof(real));
    memcpy(grads, m->memory[GRADS], m->size * sizeof(real));
    uint64_t before = decisions(m);
    int skipped = 0, checked = 0;
    const double h = 1e-3;
    for (int t = 0; t < m->tensor_count; t++) {
        const Tensor *tensor = &m->tensors[t];
        double rms = 0;
        for (size_t i = 0; i < tensor->size; i++)
            rms += (double)grads[tensor->offset + i] * (double)grads[tensor->offset + i];
        rms = sqrt(rms / (double)tensor->size);
        assert_true(rms > 0);
        for (int sample = 0; sample < samples; sample++) {
            size_t i = tensor->offset + hash64((uint64_t)(t * 1000 + sample)) % tensor->size;
            real *w = m->memory[WEIGHTS] + i, kept = *w;
            double f[4], steps[4] = {2 * h, h, -h, -2 * h};
            int kink = 0;
            for (int j = 0; j < 4; j++) {
                *w = kept + (real)steps[j];
                f[j] = objective(&k);
                kink |= decisions(m) != before;
            }
            *w = kept;
            checked++;
            if (kink) {
                skipped++;
                continue;
            }
            double slope = (-f[0] + 8 * f[1] - 8 * f[2] + f[3]) / (12 * h), grad = (double)grads[i];
            double error = fabs(slope - grad) / fmax(fabs(grad), rms);
            if (!(error <= 1e-6))
                fail_msg("%s, %s[%zu]: gradient %.12g, finite difference %.12g, error %.2g", config->recipe, tensor->name,
                         i - tensor->offset, grad, slope, error);
        }
    }
    print_message("    %-8s %4d checked, %d skipped at a kink\n", config->recipe, checked, skipped);
    assert_true(skipped * 4 <= checked);
    free(grads);
    model_free(m);
}

void test_gradients(void **state) {
    (void)state;
    for (int r = 0; r < recipe_count; r++) {
        Config c = small_config(recipes[r].name);
        check_gradients(&c, 2, 8, 12);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden),
        cmocka_unit_test(test_gradients),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
