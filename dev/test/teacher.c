// Distillation (--teacher): the gradient of the loss, what it is at its ends, the bits of a run that was killed, and what the program
// refuses.

#include "dev/test/trainer.h"
#include "dev/test/model.h"
#include "dev/test/taught.h"
#include "dev/test/slopes.h"

enum { TAUGHT_B = 2, TAUGHT_T = 8, TAUGHT_N = TAUGHT_B * TAUGHT_T };

typedef struct Pupil {
    Model *m;
    int inputs[TAUGHT_N], targets[TAUGHT_N];
    double temperature, weight;
} Pupil;

Model *random_model(const char *recipe, const char *options, int train) {
    Config c = small_config(recipe);
    set_options(&c, options);
    if (!train) { // as open_teacher() has it
        c.group = SEQUENCE;
        c.recompute = 1;
    }
    Model *m = model_allocate(&c, TAUGHT_N, train, NULL);
    randomize_weights(m);
    return m;
}

// A small model of this recipe, and a teacher of another one. All their numbers are random.
Pupil make_pupil(const char *recipe, const char *options, const char *of_teacher, const char *its_options) {
    Pupil k;
    teacher.model = random_model(of_teacher, its_options, 0);
    k.m = random_model(recipe, options, 1);
    k.weight = k.m->config.distill_weight;
    k.temperature = k.m->config.distill_temperature;
    random_tokens(k.inputs, TAUGHT_N, k.m->config.vocab, 1);
    random_tokens(k.targets, TAUGHT_N, k.m->config.vocab, 2);
    return k;
}

void free_pupil(Pupil *k) {
    model_free(k->m);
    if (teacher.model)
        model_free(teacher.model);
    teacher.model = NULL;
}

// All of the loss, and a hash of the student's choices.
double taught_objective(void *arg) {
    Pupil *k = (Pupil *)arg;
    double loss = run_batch(k->m, k->inputs, k->targets, TAUGHT_B, TAUGHT_T, TRAIN_MODE, 1, 1, 0);
    decided = 0;
    for (int l = 0; l < k->m->config.layers; l++) {
        const Route *r = &k->m->acts.layer[l].route;
        for (int i = 0; is_moe(&k->m->config, l) && i < TAUGHT_N * r->K; i++)
            decided = hash64(decided ^ (uint64_t)(r->expert[i] + 1) ^ (uint64_t)r->served[i] << 32);
    }
    return (1 - k->weight) * loss + k->weight * teacher.loss + balance_losses(k->m);
}

// The gradients of one batch; until free_taken().
real *gradients_of(Pupil *k) {
    taught_objective(k);
    model_backward(k->m);
    size_t n = trained_size(k->m);
    real *grads = take_reals(n);
    memcpy(grads, k->m->memory[GRADS], n * sizeof(real));
    return grads;
}

const char *const lessons[][4] = {
    {"mixtral", "", "mixtral", "--experts 6 --dim 24 --heads 2"},
    {"dense", "--distill-weight 0.8 --distill-temperature 3 --untied 1", "deepseek-v3", ""},
    {"mixtral", "--distill-weight 1 --distill-temperature 0.7 --recompute 1", "dense", "--untied 1 --layers 3"},
    {"olmoe", "--distill-weight 0.3 --distill-temperature 1", "shazeer-lstm", ""},
    {"mixtral", "--lora 2 --lora-targets attention,experts", "moa", ""},
};

void test_taught_gradients(void **state) {
    (void)state;
    for (int i = 0; IS_DOUBLE && i < COUNT(lessons); i++) {
        Pupil k = make_pupil(lessons[i][0], lessons[i][1], lessons[i][2], lessons[i][3]);
        Model *m = k.m;
        int checked = 0, samples = is_slow() ? 1 : 4, skipped = 0;
        real *grads = gradients_of(&k);
        for (int t = 0; t < m->tensor_count; t++) {
            const Tensor *tensor = &m->tensors[t];
            char name[256];
            if (!tensor->trained)
                continue;
            snprintf(name, sizeof(name), "%s %s, %s", lessons[i][0], lessons[i][1], tensor->name);
            skipped += check_slopes(name, m->memory[WEIGHTS] + tensor->offset, tensor->size, grads + tensor->offset,
                                    taught_objective, &k, samples);
            checked += samples;
        }
        assert_true(checked > 0 && skipped * 3 <= checked);
        free_pupil(&k);
        free_taken();
    }
    decided = 0;
}

// The divergence as its definition has it, in double, word by word; also at a temperature where q and p are nearly equal, and what
// is left of them is multiplied by a million.
void test_divergence(void **state) {
    (void)state;
    for (int hot = 0; hot < 2; hot++) {
        Pupil k = make_pupil("mixtral", hot ? "--distill-temperature 1000" : "--distill-temperature 1.5", "dense", "--dim 24");
        int V = k.m->config.vocab;
        double sum = 0, t = k.temperature;
        taught_objective(&k);
        real *z = take_reals((size_t)TAUGHT_N * V), *y = take_reals((size_t)TAUGHT_N * V);
        all_logits(k.m, z, TAUGHT_N);
        all_logits(teacher.model, y, TAUGHT_N);
        for (int n = 0; n < TAUGHT_N; n++) {
            double of_z = 0, of_y = 0;
            for (int v = 0; v < V; v++) {
                of_z += exp((double)z[n * V + v] / t);
                of_y += exp((double)y[n * V + v] / t);
            }
            for (int v = 0; v < V; v++) {
                double p = exp((double)z[n * V + v] / t) / of_z, q = exp((double)y[n * V + v] / t) / of_y;
                sum += t * t * q * log(q / p) / TAUGHT_N;
            }
        }
        assert_true(sum > 0.01);
        double wide = hot ? 1e-8 : 1e-12; // the sum above subtracts, too
        assert_near(teacher.loss, sum, IS_DOUBLE ? wide : 1e-5);
        free_pupil(&k);
        free_taken();
    }
}

// From itself a model learns nothing: with w = 1 the divergence and all gradients are 0.
void test_taught_by_itself(void **state) {
    (void)state;
    Pupil k = make_pupil("dense", "--distill-weight 1", "dense", "");
    real *grads = gradients_of(&k);
    assert_true(teacher.loss == 0);
    for (size_t i = 0; i < trained_size(k.m); i++)
        assert_true(grads[i] == 0);
    free_pupil(&k);
    free_taken();
}

// With w = 0 the bits are those without a teacher, whatever its numbers are; with w > 0 they are the same with any number of threads and with the head in pieces of any size.
void test_taught_bits(void **state) {
    (void)state;
    Pupil k = make_pupil("mixtral", "--distill-weight 0", "mixtral", "--dim 24 --heads 2");
    size_t n = trained_size(k.m);
    for (size_t i = 0; i < teacher.model->size; i++)
        teacher.model->memory[WEIGHTS][i] = (real)NAN;
    real *with = gradients_of(&k);
    double loss = k.m->loss;
    free_pupil(&k);
    k = make_pupil("mixtral", "--distill-weight 0", "mixtral", "--dim 24 --heads 2");
    model_free(teacher.model);
    teacher.model = NULL;
    real *without = gradients_of(&k);
    assert_true(loss == k.m->loss);
    assert_memory_equal(with, without, n * sizeof(real));
    free_pupil(&k);

    for (int i = 0; i < TEAMS; i++) {
        set_threads(teams[i]);
        k = make_pupil("mixtral", i % 2 ? "--recompute 1" : "", "mixtral", "--dim 24 --heads 2");
        assert_same_bits("a step with a teacher", i, bits_of(gradients_of(&k), n, 0));
        free_pupil(&k);
    }
    set_threads(1);
    free_taken();
}

// The head in pieces: the gradient by h is that of the whole to the last bit, that of the head up to rounding.
void test_taught_pieces(void **state) {
    (void)state;
    real *dh = NULL, *dhead = NULL;
    const int pieces[] = {TAUGHT_N, 1, 5, 16};
    for (int i = 0; i < COUNT(pieces); i++) {
        Pupil k = make_pupil("dense", "--untied 1", "dense", "--dim 24");
        Model *m = k.m;
        size_t n = (size_t)TAUGHT_N * m->config.dim, of_head = (size_t)m->config.vocab * m->config.dim;
        taught_objective(&k);
        memset(m->grads.head, 0, of_head * sizeof(real));
        scratch_reset(m);
        assert_true(taught_loss(m, pieces[i]));
        if (!dh) {
            dh = take_reals(n);
            dhead = take_reals(of_head);
            memcpy(dh, m->acts.dh, n * sizeof(real));
            memcpy(dhead, m->grads.head, of_head * sizeof(real));
        }
        assert_close("dh", m->acts.dh, dh, n, 0.01, 20 * EPSILON);
        assert_close("dhead", m->grads.head, dhead, of_head, 1, 20 * EPSILON);
        free_pupil(&k);
    }
    free_taken();
}

// Batches of a step add up, each times its scale; and at evaluation there is no teacher.
void test_taught_sums(void **state) {
    (void)state;
    Pupil k = make_pupil("mixtral", "", "dense", "");
    double whole, halves = 0;
    run_batch(k.m, k.inputs, k.targets, TAUGHT_B, TAUGHT_T, TRAIN_MODE, 1, 1, 0);
    whole = teacher.loss;
    for (int half = 0; half < TAUGHT_B; half++)
        run_batch(k.m, k.inputs + half * TAUGHT_T, k.targets + half * TAUGHT_T, 1, TAUGHT_T, TRAIN_MODE, 0.5, 1, (long)half * TAUGHT_T);
    halves = teacher.loss;
    assert_near(halves, whole, IS_DOUBLE ? 1e-12 : 1e-5);
    teacher.loss = -1;
    double taught = run_batch(k.m, k.inputs, k.targets, TAUGHT_B, TAUGHT_T, EVAL_MODE, 1, 1, 0);
    assert_true(teacher.loss == -1);
    model_free(teacher.model);
    teacher.model = NULL;
    assert_true(taught == run_batch(k.m, k.inputs, k.targets, TAUGHT_B, TAUGHT_T, EVAL_MODE, 1, 1, 0));
    free_pupil(&k);
    free_taken();
}

// ---- the program

void test_taught_run_resumes(void **state) {
    (void)state;
    need_teacher(6);
    check_taught_resume(12, 6);
}

void test_untaught_run(void **state) {
    (void)state;
    need_teacher(6);
    check_untaught(12);
}

void test_replaced_teacher(void **state) {
    (void)state;
    need_teacher(6);
    check_replaced_teacher();
}

// A teacher of few bits, and a student that is an adapter.
void test_other_teachers(void **state) {
    (void)state;
    need_teacher(6);
    expect(run_tiny("base", "--steps 6"), 0, "What next");
    check_leaks(0);
    expect(shell(said, sizeof(said), "%s --out %s --quantize q8_0", getenv("TRAIN_MOE") ? getenv("TRAIN_MOE") : "./train_moe",
                 scratch_file("base")), 0, "with few bits");
    check_leaks(1);
    expect(run_tiny("pupil", taught_by("base-q8_0", "")), 0, "What next");
    char options[512];
    snprintf(options, sizeof(options), "--lora 2 --init %s", scratch_file("base"));
    expect(run_tiny("adapter", taught_by("teacher/latest", options)), 0, "/teacher/checkpoint-"); // not a link, which moves
    assert_true(logged("adapter", "step", 12, "teacher") > 0);
}

// What cannot be is refused by its name.
void test_refused_teachers(void **state) {
    (void)state;
    need_teacher(6);
    check_leaks(0);
    expect(run_tiny("refused", "--distill-weight 0.3"), 2, "--distill-weight 0.3 would have no effect: it needs a teacher");
    expect(run_tiny("refused", "--distill-temperature 3"), 2, "it needs a teacher: --teacher DIR");
    expect(run_tiny("refused", "--teacher /nowhere --distill-weight 2"), 2, "--distill-weight: '2' is not a number from 0 to 1");
    expect(run_tiny("refused", "--teacher /nowhere"), 1, "--teacher /nowhere: there is no such folder");
    expect(run_tiny("refused", taught_by("data", "")), 1, "neither config.json nor latest/config.json is there");

    // Another tokenizer, and none.
    char dir[300];
    expect(shell(said, sizeof(said), "cp -rL %s/latest %s", scratch_file("teacher"), scratch_file("other")), 0, "");
    unlink(scratch_file("other/checksums.json"));
    small_tokenizer("other/tokenizer.json", "\"a a\", \"aa aa\"", "\"aa aa\", \"a a\"");
    expect(run_tiny("refused", taught_by("other", "")), 1, "the merges of its tokenizer are not those of the data");
    small_tokenizer("other/tokenizer.json", "\"a\": 98, \"b\": 99", "\"b\": 98, \"a\": 99");
    expect(run_tiny("refused", taught_by("other", "")), 1, "a teacher must have the student's tokenizer");
    snprintf(dir, sizeof(dir), "%s", scratch_file("other/tokenizer.json"));
    unlink(dir);
    expect(run_tiny("refused", taught_by("other", "")), 1, "there is no tokenizer.json");
    assert_true(!exists("refused"));

    // A teacher that is no longer there when the run goes on.
    check_leaks(1);
    expect(run_tiny("pupils", taught_by("teacher", "")), 0, "What next");
    check_leaks(0);
    expect(shell(said, sizeof(said), "mv %s %s", scratch_file("teacher"), scratch_file("moved")), 0, "");
    expect(run_tiny("pupils", "--resume --steps 14"), 1, "and the run has learned from it until now");
    check_leaks(1);
    expect(run_tiny("pupils", taught_by("moved", "--resume --steps 13")), 0, "What next");
    expect(run_tiny("pupils", "--teacher \"\" --resume --steps 14"), 0, "What next");
    assert_true(logged("pupils", "step", 13, "teacher") > 0 && isnan(logged("pupils", "step", 14, "teacher")));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_taught_gradients), cmocka_unit_test(test_divergence),         cmocka_unit_test(test_taught_by_itself),
        cmocka_unit_test(test_taught_bits),      cmocka_unit_test(test_taught_pieces),      cmocka_unit_test(test_taught_sums),
        cmocka_unit_test(test_taught_run_resumes), cmocka_unit_test(test_untaught_run),     cmocka_unit_test(test_other_teachers),
        cmocka_unit_test(test_replaced_teacher),   cmocka_unit_test(test_refused_teachers),
    };
    begin_tests();
    return cmocka_run_group_tests_name("teacher", tests, NULL, scratch_done);
}
