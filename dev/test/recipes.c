// One layer of experts of every recipe against dev/test/recipes.h: what dev/test/recipes.py computed with NumPy from the
// papers' formulas.

#include "dev/test/trainer.h"
#include "dev/test/model.h"
#include "dev/test/recipes.h"

void fill_values(real *x, size_t n, int seed, double scale, double shift) {
    for (size_t i = 0; i < n; i++)
        x[i] = (real)(scale * (golden_hash((uint32_t)seed * 1000003u + (uint32_t)i) / 4294967296.0 - 0.5) + shift);
}

void check_recipe(const RecipeGolden *g) {
    double tolerance = IS_DOUBLE ? 1e-12 : 1e-5;
    static const int seeds[KINDS] = {0,  0,  0,  0, 2, 3, 4, 15, 16, 5,  6, 7,
                                     12, 13, 14, 0, 0, 0, 0, 8,  9,  10, 11}; // by kind
    Config c;
    config_defaults(&c);
    config_recipe(&c, g->recipe);
    apply_options(&c, "--dim 16 --heads 2 --seq 6 --batch 2 --ffn 6 --moe-every 1 --dense-first 0 --layers 2");
    c.vocab = 50;
    set_options(&c, g->options);
    int N = 12, tokens[12], places = g->M * g->K, l = g->layer;
    for (int n = 0; n < N; n++)
        tokens[n] = (int)(golden_hash(18u * 1000003u + (uint32_t)n) % 50);
    Model *m = model_allocate(&c, N, 1, NULL);
    for (int t = 0; t < m->tensor_count; t++) {
        const Tensor *tensor = &m->tensors[t];
        real *w = m->memory[WEIGHTS] + tensor->offset;
        int kind = tensor->kind, seed = seeds[kind] + (tensor->layer > 0 ? 100 * tensor->layer : 0);
        fill_values(w, tensor->size, seed,
                    kind == BIAS    ? 1
                    : kind == LEVEL ? 0.1
                                    : 2,
                    kind == BIAS    ? g->bias_shift
                    : kind == LEVEL ? 0.1
                                    : 0);
        for (size_t v = 0; kind == TABLE && v < tensor->size; v++)
            w[v] = (real)(golden_hash(17u * 1000003u + (uint32_t)v) % (uint32_t)c.experts);
    }
    m->tokens = tokens;
    m->step = 1;
    real *out = take_reals((size_t)N * c.dim), *v = take_reals(c.dim);
    fill_values(v, c.dim, 99, 1, 0);
    for (int layer = 0; layer <= l; layer++) {
        fill_values(m->layers[layer].h2, (size_t)N * c.dim, g->x_seed, 4, 0);
        fill(out, (size_t)N * c.dim, 0);
        m->mode = g->train ? TRAIN_MODE : EVAL_MODE;
        ffn_forward(m, layer, &m->layers[layer], out, N, 6);
    }
    const Plan *plan = &m->layers[l].plan;
    assert_int_equal(plan->N, g->M);
    assert_int_equal(plan->K, g->K);
    for (int i = 0; i < places; i++) {
        if (plan->expert[i] != g->expert[i] || plan->key[i] != g->key[i])
            fail_msg("%s %s, %s: choice %d is expert %d, key %d; expected %d, %d", g->recipe, g->options,
                     g->train ? "training" : "evaluation", i, plan->expert[i], plan->key[i], g->expert[i], g->key[i]);
        if (!(fabs((double)m->layers[l].weight[i] - g->weight[i]) <= tolerance * 4))
            fail_msg("%s %s: choice %d has weight %g; expected %g", g->recipe, g->options, i,
                     (double)m->layers[l].weight[i], g->weight[i]);
    }
    if (g->train && !(fabs(m->layers[l].aux - g->aux) <= tolerance * (1 + fabs(g->aux))))
        fail_msg("%s %s: the balance losses are %.15g; expected %.15g", g->recipe, g->options, m->layers[l].aux,
                 g->aux);
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
