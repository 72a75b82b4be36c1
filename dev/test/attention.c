// Experts in attention (dev/mixers/attention_experts.h): SwitchHead and MoA against loops that follow the words of their papers,
// their balance losses and capacities, what is counted, --recompute, sizes, the log. Gradients by finite differences and PyTorch's
// values are in test_moe.c; generation, threads, resume and ranks are tested where those of all recipes are.

#include "dev/test/trainer.h"
#include "dev/test/runs.h"
#include "dev/test/plain.h"

enum { HEADS_N = 16, HEADS_T = 8 }; // tokens, of two sequences

typedef struct PlainRoute { // of one router: weight (heads,N,E), 0 where an expert is not chosen or refuses
    double *weight, aux;
    int dropped, *chosen; // (heads,E)
} PlainRoute;

// By definition, an expert is chosen if fewer than K come before it; of equal ones the lower index comes first.
PlainRoute plain_route(const Model *m, int l, const char *router, int heads, int K) {
    const Config *c = &m->config;
    const real *w = layer_tensor(m, l, router, WEIGHTS), *x = m->acts.layer[l].h1;
    int N = HEADS_N, E = c->attention_experts, C = c->dim, moa = c->attention_form == MOA;
    int group = c->group == SEQUENCE ? HEADS_T : N;
    PlainRoute r = {(double *)take((size_t)heads * N * E, sizeof(double)), 0, 0, take_ints((size_t)heads * E)};
    for (int h = 0; h < heads; h++) {
        double p[HEADS_N][8], z = 0;
        int place[HEADS_N][8];
        for (int n = 0; n < N; n++) {
            double sum = 0;
            for (int e = 0; e < E; e++) {
                double logit = inner(x + n * C, w + (size_t)(h * E + e) * C, C);
                p[n][e] = moa ? exp(logit) : 1 / (1 + exp(-logit));
                sum += p[n][e];
            }
            z += log(sum) * log(sum) / N;
            for (int e = 0; e < E && moa; e++)
                p[n][e] /= sum;
            double of_chosen = 0;
            for (int e = 0; e < E; e++) {
                place[n][e] = 0;
                for (int other = 0; other < E; other++)
                    place[n][e] += p[n][other] > p[n][e] || (p[n][other] == p[n][e] && other < e);
                of_chosen += place[n][e] < K ? p[n][e] : 0;
            }
            for (int e = 0; e < E; e++)
                r.weight[(h * N + n) * E + e] = place[n][e] < K ? p[n][e] / (moa ? of_chosen : 1) : 0;
        }

        // The loss, a mean over heads and groups; then the capacity, where best choices come before second ones.
        int most = c->attention_capacity_factor > 0 ? (int)ceil(c->attention_capacity_factor * K * group / E - 1e-9) : N;
        for (int first = 0; first < N; first += group) {
            for (int e = 0; e < E; e++) {
                double mean = 0;
                int count = 0, served = 0;
                for (int n = first; n < first + group; n++) {
                    double sum = 0;
                    for (int i = 0; i < E; i++)
                        sum += p[n][i];
                    mean += p[n][e] / sum / group;
                    count += place[n][e] < K;
                }
                r.aux += c->attention_aux_weight * E * count / (group * K) * mean * group / N / heads;
                r.chosen[h * E + e] += count;
                for (int k = 0; k < K; k++) {
                    for (int n = first; n < first + group; n++) {
                        served += place[n][e] == k;
                        if (place[n][e] == k && served > most) {
                            r.weight[(h * N + n) * E + e] = 0;
                            r.dropped++;
                        }
                    }
                }
            }
        }
        r.aux += c->attention_z_weight * z;
    }
    return r;
}

// out (D) of one query q (D): attention to keys and values of the tokens 0 .. t of its sequence, which stand in rows `apart` apart.
void plain_look_back(double *out, const double *q, const double *keys, const double *values, int t, int apart, int D) {
    double p[HEADS_T];
    for (int s = 0; s <= t; s++) {
        p[s] = 0;
        for (int i = 0; i < D; i++)
            p[s] += q[i] * keys[s * apart + i] / sqrt(D);
    }
    plain_softmax_of(p, t + 1);
    for (int i = 0; i < D; i++) {
        out[i] = 0;
        for (int s = 0; s <= t; s++)
            out[i] += p[s] * values[s * apart + i];
    }
}

// A row x (C) through a matrix w (D,C), normed and turned as queries and keys are.
void plain_head(double *to, const real *x, const real *w, const real *norm, int t, const Config *c) {
    int D = head_width(c);
    double square = 0;
    for (int i = 0; i < D; i++) {
        to[i] = inner(x, w + (size_t)i * c->dim, c->dim);
        square += to[i] * to[i] / D;
    }
    for (int i = 0; i < D && norm; i++)
        to[i] *= (double)norm[i] / sqrt(square + c->norm_eps);
    for (int i = 0; i < D / 2; i++) {
        double angle = t * pow(c->rope_theta, -2.0 * i / D), a = to[i], b = to[i + D / 2];
        to[i] = a * cos(angle) - b * sin(angle);
        to[i + D / 2] = b * cos(angle) + a * sin(angle);
    }
}

// wanted (N,C): what layer l's attention adds to the stream.
void plain_expert_heads(const Model *m, int l, const PlainRoute *outputs, const PlainRoute *values, real *wanted) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    const real *x = m->acts.layer[l].h1, *out = layer_tensor(m, l, "output_experts", WEIGHTS);
    int N = HEADS_N, C = c->dim, E = c->attention_experts, moa = c->attention_form == MOA, D = head_width(c);
    int KV = key_heads(c), all = moa ? E : c->heads; // heads that look back
    double *keys = (double *)take((size_t)N * KV * D, sizeof(double)), *v = (double *)take((size_t)N * KV * D, sizeof(double));
    double q[16], att[16];
    for (int n = 0; n < N; n++) {
        for (int kv = 0; kv < KV; kv++) {
            const real *key = moa ? layer_tensor(m, l, "key_value", WEIGHTS)
                                  : layer_tensor(m, l, "query_key", WEIGHTS) + (size_t)(c->heads + kv) * D * C;
            plain_head(keys + (n * KV + kv) * D, x + n * C, key, w->k_norm, n % HEADS_T, c);
            for (int i = 0; i < D; i++) {
                double *to = &v[(n * KV + kv) * D + i];
                *to = w->value_embed ? (double)w->value_embed[(m->batch.inputs[n] * KV + kv) * D + i] : 0;
                if (moa)
                    *to += inner(x + n * C, key + (size_t)(D + i) * C, C);
                for (int e = 0; e < E && !moa; e++)
                    *to += values->weight[(kv * N + n) * E + e] *
                           inner(x + n * C, layer_tensor(m, l, "value_experts", WEIGHTS) + (size_t)((kv * E + e) * D + i) * C, C);
            }
        }
    }
    for (int n = 0; n < N; n++) {
        int first = n / HEADS_T * HEADS_T;
        for (int h = 0; h < all; h++) {
            const real *query = layer_tensor(m, l, moa ? "query_experts" : "query_key", WEIGHTS) + (size_t)h * D * C;
            int kv = moa ? 0 : h / (c->heads / KV);
            plain_head(q, x + n * C, query, w->q_norm, n % HEADS_T, c);
            plain_look_back(att, q, keys + (first * KV + kv) * D, v + (first * KV + kv) * D, n - first, KV * D, D);
            for (int e = 0; e < (moa ? 1 : E); e++) {
                double weight = moa ? outputs->weight[n * E + h] : outputs->weight[(h * N + n) * E + e];
                const real *matrix = out + (size_t)(moa ? h : h * E + e) * C * D;
                for (int o = 0; o < C; o++)
                    for (int i = 0; i < D; i++)
                        wanted[n * C + o] += (real)(weight * (double)matrix[o * D + i] * att[i]);
            }
        }
    }
}

void check_statistics_of_heads(const Model *m, int l, int which, const PlainRoute *r) {
    const Config *c = &m->config;
    const Statistics *s = &m->stats[c->layers + 2 * l + which];
    int experts = route_experts(c, which);
    double total = 0;
    for (int i = 0; i < experts; i++) {
        assert_true(s->count[i] == r->chosen[i]);
        total += s->count[i];
    }
    assert_true(s->active == total && s->tokens == HEADS_N * route_heads(c, which) && s->dropped == r->dropped);
    assert_true(s->active == s->tokens * route_choices(c));
    assert_true(s->entropy > 0 && s->entropy <= s->tokens * log(c->attention_experts));
}

void check_expert_heads(const char *recipe, const char *more, int drops) {
    Config c = small_config(recipe);
    int inputs[HEADS_N], targets[HEADS_N], moa;
    double tolerance = IS_DOUBLE ? 1e-12 : 2e-5;
    set_options(&c, more);
    moa = c.attention_form == MOA;
    random_tokens(inputs, HEADS_N, c.vocab, 1);
    random_tokens(targets, HEADS_N, c.vocab, 2);
    Model *m = model_allocate(&c, HEADS_N, 1, NULL);
    randomize_weights(m);
    run_batch(m, inputs, targets, 2, HEADS_T, TRAIN_MODE, 1, 1, 0);
    for (int l = 0; l < c.layers; l++) {
        LayerActs *a = &m->acts.layer[l];
        PlainRoute outputs = plain_route(m, l, "output_router", moa ? 1 : c.heads, moa ? c.heads : c.attention_topk), values;
        memset(&values, 0, sizeof(values));
        if (!moa)
            values = plain_route(m, l, "value_router", c.kv_heads, c.attention_topk);
        real *wanted = take_reals((size_t)HEADS_N * c.dim);
        memcpy(wanted, a->x, (size_t)HEADS_N * c.dim * sizeof(real));
        plain_expert_heads(m, l, &outputs, &values, wanted);
        assert_close(more, a->mid, wanted, (size_t)HEADS_N * c.dim, rms(wanted, (size_t)HEADS_N * c.dim), tolerance);
        assert_near(a->mixer_aux, outputs.aux + values.aux, tolerance);
        check_statistics_of_heads(m, l, OUTPUTS, &outputs);
        if (!moa)
            check_statistics_of_heads(m, l, VALUES, &values);
        assert_true((outputs.dropped + values.dropped > 0) == drops);
    }
    model_free(m);
    free_taken();
}

void test_expert_heads(void **state) {
    (void)state;
    check_expert_heads("switchhead", "--attention-aux-weight 0.3", 0);
    check_expert_heads("switchhead", "--attention-aux-weight 0.3 --kv-heads 4 --attention-topk 1 --group sequence", 0);
    check_expert_heads("switchhead", "--attention-aux-weight 0.3 --attention-capacity-factor 0.6 --qk-norm 1", 1);
    check_expert_heads("switchhead", "--attention-aux-weight 0.3 --attention-capacity-factor 0.8 --group sequence --value-embedding 1", 1);
    check_expert_heads("switchhead", "--heads 1 --kv-heads 1 --attention-experts 5 --attention-topk 3 --moe-every 0", 0);
    check_expert_heads("moa", "--attention-aux-weight 0.3 --attention-z-weight 0.2", 0);
    check_expert_heads("moa", "--attention-aux-weight 0.3 --heads 2 --group sequence --qk-norm 1 --value-embedding 1", 0);
    check_expert_heads("moa", "--attention-aux-weight 0.3 --attention-capacity-factor 0.6 --qk-norm 1 --norm-eps 0", 1);
}

// A refused query must not become NaN where a norm would divide it by 0, and with --recompute the choices, losses and counts of
// the forward pass stay as they were.
void test_expert_heads_recomputed(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"switchhead", "--attention-aux-weight 0.3 --attention-capacity-factor 0.6"},
        {"moa", "--attention-aux-weight 0.3 --attention-z-weight 0.2 --attention-capacity-factor 0.6 --qk-norm 1 --norm-eps 0"}};
    for (int i = 0; i < COUNT(cases); i++) {
        Model *m[2];
        double aux[2];
        int inputs[HEADS_N], targets[HEADS_N];
        Config c = small_config(cases[i][0]);
        set_options(&c, cases[i][1]);
        c.layers = 3;
        random_tokens(inputs, HEADS_N, c.vocab, 1);
        random_tokens(targets, HEADS_N, c.vocab, 2);
        for (int again = 0; again < 2; again++) {
            c.recompute = again;
            m[again] = model_allocate(&c, HEADS_N, 1, NULL);
            randomize_weights(m[again]);
            for (int micro = 0; micro < 2; micro++) {
                Batch batch = make_batch(inputs, targets, 2, HEADS_T, TRAIN_MODE, 0.5, 1, 0);
                batch.first = micro == 0;
                model_forward(m[again], &batch);
                aux[again] = balance_losses(m[again]);
                model_backward(m[again]);
            }
        }
        assert_true(aux[0] == aux[1] && isfinite(gradient_norm(m[0])));
        assert_memory_equal(m[0]->memory[GRADS], m[1]->memory[GRADS], m[0]->size * sizeof(real));
        for (int row = c.layers; row < statistics_rows(&c); row++) {
            const Statistics *a = &m[0]->stats[row], *b = &m[1]->stats[row];
            assert_true(a->active == b->active && a->tokens == b->tokens && a->dropped == b->dropped && a->entropy == b->entropy);
        }
        assert_true(m[0]->stats[c.layers].tokens == 2 * HEADS_N * route_heads(&c, OUTPUTS));
        model_free(m[0]);
        model_free(m[1]);
    }
}

// At evaluation no choice is refused, and nothing is counted.
void test_expert_heads_at_evaluation(void **state) {
    (void)state;
    for (int i = 0; i < 2; i++) {
        Config c = small_config(i ? "moa" : "switchhead");
        int inputs[HEADS_N], targets[HEADS_N];
        double loss[2];
        random_tokens(inputs, HEADS_N, c.vocab, 1);
        random_tokens(targets, HEADS_N, c.vocab, 2);
        for (int limited = 0; limited < 2; limited++) {
            c.attention_capacity_factor = limited * 0.5;
            Model *m = model_allocate(&c, HEADS_N, 1, NULL);
            randomize_weights(m);
            loss[limited] = run_batch(m, inputs, targets, 2, HEADS_T, EVAL_MODE, 1, 1, 0);
            assert_true(m->stats[c.layers].tokens == 0 && balance_losses(m) == 0);
            model_free(m);
        }
        assert_true(loss[0] == loss[1]);
    }
}

// The sizes that a run announces. 2 layers of width 16, 50 words, 4 heads; the experts of the feed-forward half: 4 of which a
// token sees 2, three matrices of 12 x 16 each, and a router.
void test_expert_heads_sizes(void **state) {
    (void)state;
    const double feed = 3 * 12 * 16, rest = 50 * 16 + 16, layer = 2 * 16 + 4 * 16;
    double total, active;
    Config c = small_config("switchhead"); // 2 heads of keys and values, 3 experts of which a token sees 2, heads of 8 numbers
    count_parameters(&c, &total, &active);
    assert_true(total == rest + 2 * (layer + 4 * feed + 6 * 8 * 16 + 6 * (16 + 8 * 16) + 12 * (16 + 8 * 16)));
    assert_true(active == rest + 2 * (layer + 2 * feed + 6 * 8 * 16 + 18 * 16 + 4 * 8 * 16 + 8 * 8 * 16));
    assert_true(mixing_flops(&c) == 2 * 8 * 4 * 8);
    assert_true(mixer_of(&c)->cache(&c) == 8 * 2 * 2 * 8);
    c = small_config("moa"); // 4 of 6 heads of 8 numbers; one head of keys and values
    count_parameters(&c, &total, &active);
    assert_true(total == rest + 2 * (layer + 4 * feed + 2 * 8 * 16 + 6 * (16 + 2 * 8 * 16)));
    assert_true(active == rest + 2 * (layer + 2 * feed + 2 * 8 * 16 + 6 * 16 + 4 * 2 * 8 * 16));
    assert_true(mixer_of(&c)->cache(&c) == 8 * 2 * 8);
}

// A line of the log for each router of a layer: the loads of each head sum to 1.
void test_expert_heads_log(void **state) {
    (void)state;
    need_program();
    static const char *const cases[][2] = {
        {"--recipe switchhead --attention-capacity-factor 0.7 --kv-heads 1", "values outputs"},
        {"--recipe moa --attention-capacity-factor 0.7", "heads"},
        {"--recipe dense --attention-experts 3 --attention-topk 1", "values outputs"}};
    for (int i = 0; i < COUNT(cases); i++) {
        char out[32], file[64];
        size_t size;
        int lines = 0, dropped = 0;
        snprintf(out, sizeof(out), "heads-%d", i);
        snprintf(file, sizeof(file), "heads-%d/log.jsonl", i);
        expect(run_tiny(out, cases[i][0]), 0, "What next");
        char *text = read_file(scratch_file(file), &size);
        for (char *line = text; line < text + size;) {
            Json *json = next_line(&line, text + size);
            if (!strcmp(json->child->text, "attention")) {
                double sum = 0, E = 0;
                for (const Json *e = json_get(json, "load")->child; e; e = e->next, E++)
                    sum += e->number;
                double heads = E / (i == 1 ? 6 : 3), K = i == 0 ? 2 : 1;
                assert_true(strstr(cases[i][1], json_get(json, "experts_of")->text) != NULL);
                assert_near(sum, heads, 1e-4);
                assert_near(json_get(json, "active")->number, i == 1 ? 2 : K, 1e-4);
                assert_true(json_get(json, "max_over_mean")->number >= 1 && json_get(json, "entropy")->number > 0);
                dropped += json_get(json, "dropped")->number > 0;
                lines++;
            }
            json_free(json);
        }
        free(text);
        assert_int_equal(lines, 12 * 2 * (i == 1 ? 1 : 2));
        assert_true((dropped > 0) == (i < 2));
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_expert_heads),
        cmocka_unit_test(test_expert_heads_recomputed),
        cmocka_unit_test(test_expert_heads_at_evaluation),
        cmocka_unit_test(test_expert_heads_sizes),
        cmocka_unit_test(test_expert_heads_log),
    };
    begin_tests();
    return cmocka_run_group_tests_name("attention", tests, NULL, scratch_done);
}
