// One layer of experts of every recipe against dev/test/recipes.h: what dev/test/recipes.py computed with NumPy from the
// papers' formulas.

#include "dev/test/trainer.h"
#include "dev/test/model.h"
#include "dev/test/recipes.h"

void fill_values(real *x, size_t n, int seed, double scale, double shift) {
    for (size_t i = 0; i < n; i++)
        x[i] = (real)(scale * (golden_hash((uint32_t)seed * 1000003u + (uint32_t)i) / 4294967296.0 - 0.5) + shift);
}

// Where the numbers of each kind of tensor begin in dev/test/recipes.py.
int seed_of(const char *kind) {
    static const struct {
        const char *kind;
        int seed;
    } seeds[] = {{"router", 2},  {"w_in", 3},    {"w_out", 4},  {"dense_in", 15}, {"dense_out", 16}, {"split", 5},
                 {"merge", 6},   {"project", 7}, {"bias", 12},  {"slow", 13},     {"level", 14},     {"gru_x", 8},
                 {"gru_h", 9},   {"gru_bx", 10}, {"gru_bh", 11}};
    for (int i = 0; i < COUNT(seeds); i++) {
        if (!strcmp(seeds[i].kind, kind))
            return seeds[i].seed;
    }
    return 0;
}

void check_recipe(const RecipeGolden *g) {
    double tolerance = IS_DOUBLE ? 1e-12 : 1e-5;
    Config c;
    config_defaults(&c);
    config_recipe(&c, g->recipe);
    apply_options(&c, "--dim 16 --heads 2 --seq 6 --batch 2 --ffn 6 --moe-every 1 --dense-first 0 --layers 2");
    c.vocab = 50;
    set_options(&c, g->options);
    int N = 12, tokens[12], choices = g->M * g->K, l = g->layer;
    for (int n = 0; n < N; n++)
        tokens[n] = (int)(golden_hash(18u * 1000003u + (uint32_t)n) % 50);
    Model *m = model_allocate(&c, N, 1, NULL);
    for (int t = 0; t < m->tensor_count; t++) {
        const Tensor *tensor = &m->tensors[t];
        real *w = m->memory[WEIGHTS] + tensor->offset;
        int bias = !strcmp(tensor->kind, "bias"), level = !strcmp(tensor->kind, "level");
        int seed = seed_of(tensor->kind) + (tensor->layer > 0 ? 100 * tensor->layer : 0);
        double scale = 2, shift = 0;
        if (bias) {
            scale = 1;
            shift = g->bias_shift;
        } else if (level) {
            scale = shift = 0.1;
        }
        fill_values(w, tensor->size, seed, scale, shift);
        for (size_t v = 0; !strcmp(tensor->kind, "table") && v < tensor->size; v++)
            w[v] = (real)(golden_hash(17u * 1000003u + (uint32_t)v) % (uint32_t)c.experts);
    }
    m->batch = make_batch(tokens, NULL, 2, 6, g->train ? TRAIN_MODE : EVAL_MODE, 1, 1, 0);
    real *out = take_reals((size_t)N * c.dim), *v = take_reals(c.dim);
    fill_values(v, c.dim, 99, 1, 0);
    for (int layer = 0; layer <= l; layer++) {
        fill_values(m->acts.layer[layer].h2, (size_t)N * c.dim, g->x_seed, 4, 0);
        fill(out, (size_t)N * c.dim, 0);
        feed_forward(m, layer, out);
    }
    const Route *r = &m->acts.layer[l].route;
    assert_int_equal(r->N, g->M);
    assert_int_equal(r->K, g->K);
    for (int i = 0; i < choices; i++) {
        if (r->expert[i] != g->expert[i] || r->served[i] != g->key[i])
            fail_msg("%s %s, %s: choice %d is expert %d, served by %d; expected %d, %d", g->recipe, g->options,
                     g->train ? "training" : "evaluation", i, r->expert[i], r->served[i], g->expert[i], g->key[i]);
        if (!(fabs((double)r->weight[i] - g->weight[i]) <= tolerance * 4))
            fail_msg("%s %s: choice %d has weight %g; expected %g", g->recipe, g->options, i, (double)r->weight[i],
                     g->weight[i]);
    }
    if (g->train && !(fabs(r->aux - g->aux) <= tolerance * (1 + fabs(g->aux))))
        fail_msg("%s %s: the balance losses are %.15g; expected %.15g", g->recipe, g->options, r->aux, g->aux);
    for (int n = 0; n < N; n++) {
        double dot = inner(out + n * c.dim, v, c.dim);
        if (!(fabs(dot - g->out[n]) <= tolerance * 20 * (1 + fabs(g->out[n]))))
            fail_msg("%s %s: token %d's answer is %.15g; expected %.15g", g->recipe, g->options, n, dot, g->out[n]);
    }
    model_free(m);
    free_taken();
}

void test_recipes(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof(recipe_golden) / sizeof(recipe_golden[0]); i++)
        check_recipe(&recipe_golden[i]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_recipes),
    };
    begin_tests();
    return cmocka_run_group_tests_name("recipes", tests, NULL, scratch_done);
}
