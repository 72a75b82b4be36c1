// Low-rank pairs (--lora): their gradients, what stays frozen, the model that a base and its pairs make together, their files, and
// what the program refuses. dev/test/check_peft.py opens such files with PEFT.

#include "dev/test/trainer.h"
#include "dev/test/model.h"
#include "dev/test/runs.h"
#include "dev/test/slopes.h"

enum { B = 2, T = 8, N = B * T };

typedef struct Learner {
    Model *m;
    int inputs[N], targets[N], mode;
} Learner;

// A small model of this recipe with pairs beside all that can have one. All its numbers are random, those of B, too.
Learner make_learner(const char *recipe, const char *options) {
    Learner k;
    Config c = small_config(recipe);
    set_options(&c, options);
    k.m = model_allocate(&c, N, 1, NULL);
    k.mode = TRAIN_MODE;
    randomize_weights(k.m);
    random_tokens(k.inputs, N, c.vocab, 1);
    random_tokens(k.targets, N, c.vocab, 2);
    return k;
}

// The loss, and a hash of all choices.
double lora_objective(void *arg) {
    Learner *k = (Learner *)arg;
    double loss = run_batch(k->m, k->inputs, k->targets, B, T, k->mode, 1, 1, 0);
    decided = 0;
    for (int l = 0; l < k->m->config.layers; l++) {
        const Route *r = &k->m->acts.layer[l].route;
        for (int i = 0; is_moe(&k->m->config, l) && i < N * r->K; i++)
            decided = hash64(decided ^ (uint64_t)(r->expert[i] + 1) ^ (uint64_t)r->served[i] << 32);
    }
    return loss + balance_losses(k->m);
}

#define ALL_TARGETS "--lora 3 --lora-alpha 5 --lora-targets attention,experts,router"
const char *const learners[][2] = {
    {"mixtral", ALL_TARGETS},
    {"mixtral", ALL_TARGETS " --recompute 1 --qk-norm 1 --untied 1"},
    {"mixtral", ALL_TARGETS " --activation relu --capacity-factor 0.8"},
    {"dense", "--lora 3 --lora-alpha 2 --lora-targets attention,experts"},
    {"dense", "--lora 2 --lora-alpha 2 --lora-targets experts --activation gelu"},
    {"deepseek-v3", ALL_TARGETS " --shared 1"},
    {"olmoe", ALL_TARGETS " --lora-targets router"},
    {"mixtral", ALL_TARGETS " --qkv-bias 1 --head-width 6 --shared 1 --shared-gate 1 --qk-norm 1 --qk-norm-over row"},
    {"fast", ALL_TARGETS " --optimizer adamw --ngrams 20 --ngram-gate 1"},
};

void test_pairs_gradients(void **state) {
    (void)state;
    for (int i = 0; IS_DOUBLE && i < COUNT(learners); i++) {
        Learner k = make_learner(learners[i][0], learners[i][1]);
        Model *m = k.m;
        int checked = 0, samples = is_slow() ? 1 : 6, skipped = 0;
        lora_objective(&k);
        model_backward(m);
        real *grads = take_reals(m->pairs);
        memcpy(grads, m->memory[GRADS], m->pairs * sizeof(real));
        for (int t = 0; t < m->tensor_count; t++) {
            const Tensor *tensor = &m->tensors[t];
            char name[256];
            assert_int_equal(tensor->trained, is_pair(tensor));
            if (!is_pair(tensor))
                continue;
            snprintf(name, sizeof(name), "%s %s, %s", learners[i][0], learners[i][1], tensor->name);
            skipped += check_slopes(name, m->memory[WEIGHTS] + tensor->offset, tensor->size, grads + tensor->offset,
                                    lora_objective, &k, samples);
            checked += samples;
        }
        assert_true(checked > 0 && skipped * 3 <= checked);
        model_free(m);
        free_taken();
    }
    decided = 0;
}

// With --recompute the same bits, and with any number of threads.
void test_pairs_bits(void **state) {
    (void)state;
    real *first = NULL;
    for (int i = 0; i < 4; i++) {
        set_threads(teams[i]);
        Learner k = make_learner("mixtral", i % 2 ? ALL_TARGETS " --recompute 1" : ALL_TARGETS);
        lora_objective(&k);
        model_backward(k.m);
        if (!first) {
            first = take_reals(k.m->pairs);
            memcpy(first, k.m->memory[GRADS], k.m->pairs * sizeof(real));
        }
        assert_memory_equal(first, k.m->memory[GRADS], k.m->pairs * sizeof(real));
        model_free(k.m);
    }
    set_threads(1);
    free_taken();
}

// Steps move the pairs and nothing else, and only the pairs have gradients and moments.
void test_frozen(void **state) {
    (void)state;
    for (int i = 0; i < COUNT(learners); i++) {
        Learner k = make_learner(learners[i][0], learners[i][1]);
        Model *m = k.m;
        real *before = take_reals(m->size);
        memcpy(before, m->memory[WEIGHTS], m->size * sizeof(real));
        double losses[2] = {lora_objective(&k), 0};
        for (int step = 1; step <= 8; step++) {
            lora_objective(&k);
            model_backward(m);
            model_update(m, step, 1e-2, gradient_norm(m));
        }
        losses[1] = lora_objective(&k);
        assert_true(losses[1] < losses[0]);
        for (int t = 0; t < m->tensor_count; t++) {
            const Tensor *tensor = &m->tensors[t];
            int same = !memcmp(before + tensor->offset, m->memory[WEIGHTS] + tensor->offset, tensor->size * sizeof(real));
            if (same == is_pair(tensor))
                fail_msg("%s, %s: %s", learners[i][0], tensor->name, same ? "it did not move" : "it is frozen, and moved");
        }
        size_t largest = (size_t)m->config.dim * 4 + 64; // behind the pairs' gradients
        assert_true(m->bytes[FOR_MOMENTS] <= 2 * (m->pairs + largest) * sizeof(real));
        assert_true(m->bytes[FOR_GRADIENTS] <= (m->pairs + largest) * sizeof(real) + m->config.layers * sizeof(LayerParams));
        model_free(m);
        free_taken();
    }
}

// A model without pairs that has the weights of m's base.
Model *base_of(const Model *m) {
    Config c = m->config;
    c.lora = 0;
    Model *base = model_allocate(&c, N, 0, NULL);
    for (int t = 0; t < base->tensor_count; t++)
        memcpy(base->memory[WEIGHTS] + base->tensors[t].offset, m->memory[WEIGHTS] + m->tensors[t].offset,
               base->tensors[t].size * sizeof(real));
    return base;
}

// While B is 0 the model is its base, and when the pairs are merged, the base is the model.
void test_merge_pairs(void **state) {
    (void)state;
    for (int i = 0; i < COUNT(learners); i++) {
        Learner k = make_learner(learners[i][0], learners[i][1]), plain = k;
        Run run;
        memset(&run, 0, sizeof(run));
        run.model = k.m;
        run.backend = &cpu_backend;
        run.config = k.m->config;
        plain.m = base_of(k.m);
        plain.mode = k.mode = EVAL_MODE;
        double loss = lora_objective(&k);
        double apart = fabs(lora_objective(&plain) - lora_objective(&k));
        assert_true(apart > 1e-4); // the pairs do something
        merge_pairs(&run);
        model_free(plain.m);
        plain.m = base_of(k.m);
        assert_near(lora_objective(&plain), loss, IS_DOUBLE ? 1e-10 : 1e-4);
        model_free(plain.m);

        for (int t = base_tensors(k.m); t < k.m->tensor_count; t++)
            first_pair_numbers(k.m, t, k.m->memory[WEIGHTS] + k.m->tensors[t].offset);
        plain.m = base_of(k.m);
        assert_true(lora_objective(&plain) == lora_objective(&k));
        model_free(plain.m);
        model_free(k.m);
    }
    free_taken();
}

// One token after the other gives the logits of all tokens at once.
void test_generate_with_pairs(void **state) {
    (void)state;
    Learner k = make_learner("mixtral", ALL_TARGETS);
    int V = k.m->config.vocab;
    k.mode = EVAL_MODE;
    lora_objective(&k);
    real *all = take_reals((size_t)N * V), *one = take_reals(V);
    all_logits(k.m, all, N);
    for (int t = 0; t < T; t++) {
        model_generate(k.m, k.inputs[t], t, one);
        assert_close("logits", one, all + (size_t)t * V, V, 1, IS_DOUBLE ? 1e-12 : 1e-4);
    }
    model_free(k.m);
    assert_int_equal(pairs.count, 0);
    free_taken();
}

// Two experts of rank 2, as PEFT stores them.
void test_reorder(void **state) {
    (void)state;
    Tensor t;
    memset(&t, 0, sizeof(t));
    t.kind = "w_in.lora_B";
    t.shape[0] = 2;
    t.shape[1] = 3;
    t.shape[2] = 2;
    t.whole = 12;
    const real memory[12] = {0, 1, 2, 3, 4, 5, 100, 101, 102, 103, 104, 105};
    const real wanted[12] = {0, 100, 1, 101, 2, 102, 3, 103, 4, 104, 5, 105};
    real file[12], back[12];
    reorder(&t, file, memory, 1);
    assert_memory_equal(file, wanted, sizeof(file));
    reorder(&t, back, file, 0);
    assert_memory_equal(back, memory, sizeof(back));
}

// ---- the program

#define BASE_OPTIONS "--qk-norm"

// The options of a run that begins beside the base in scratch_file("base").
const char *beside_base(const char *more) {
    static char options[1024];
    snprintf(options, sizeof(options), "--init %s %s", scratch_file("base"), more);
    return options;
}

void need_base(void) {
    need_program();
    if (!exists("base"))
        expect(run_tiny("base", BASE_OPTIONS " --steps 6"), 0, "What next");
}

void assert_same_adapter(const char *a, const char *b) {
    const char *const files[] = {"adapter_model.safetensors", "optimizer.safetensors", "adapter_config.json"};
    for (int i = 0; i < COUNT(files); i++) {
        char x[200], y[200];
        snprintf(x, sizeof(x), "%s/latest/%s", a, files[i]);
        snprintf(y, sizeof(y), "%s/latest/%s", b, files[i]);
        assert_same_file(scratch_file(x), scratch_file(y));
    }
}

// Six steps, SIGKILL and the other six give the bits of twelve, and the base's files stay as they are.
void test_adapter_resumes(void **state) {
    (void)state;
    need_base();
    size_t size, after;
    char *before = read_file(scratch_file("base/latest/model.safetensors"), &size);
    const char *options = "--lora 2 --lora-targets attention,experts,router --eval-every 7 --eval-tokens 0";
    expect(run_tiny("whole", beside_base(options)), 0, "are trained, in pairs of rank 2 beside attention,experts,router");
    for (int attempt = 0, status = 0; !WIFSIGNALED(status); attempt++) {
        assert_true(attempt < 5); // it was always done before it could be killed
        remove_tree(scratch_file("halves"));
        pid_t child = start_tiny("halves", beside_base(options));
        status = wait_for(child, scratch_file("halves/log.jsonl"), "\"step\":7,");
        if (status == -1) {
            kill(child, SIGKILL);
            waitpid(child, &status, 0);
        }
    }
    assert_latest("halves", "checkpoint-6");
    expect(run_tiny("halves", "--resume"), 0, "What next");
    assert_same_adapter("whole", "halves");
    char *now = read_file(scratch_file("base/latest/model.safetensors"), &after);
    assert_true(after == size && !memcmp(before, now, size));
    free(before);
    free(now);
    assert_true(!exists("whole/latest/model.safetensors"));
}

// The merged model tells what the adapter beside its base tells, and DIR appears once, as a whole.
void test_merge(void **state) {
    (void)state;
    need_base();
    char story[sizeof(said)], line[512];
    expect(run_tiny("tuned", beside_base("--lora 2 --lr 0.05")), 0, "What next");
    expect(run_tiny("tuned", "--prompt ab --temperature 0"), 0, "ab");
    strcpy(story, strstr(said, "\nab") ? strstr(said, "\nab") : said);
    snprintf(line, sizeof(line), "%s --out %s --merge", getenv("TRAIN_MOE") ? getenv("TRAIN_MOE") : "./train_moe", scratch_file("tuned"));
    expect(shell(said, sizeof(said), "%s %s --lr 0.1", line, scratch_file("merged")), 2, "training, and --merge only writes a model");
    expect(shell(said, sizeof(said), "%s %s/ --trust-weights", line, scratch_file("merged")), 0, "are one model now"); // with a slash
    assert_true(exists("merged/model.safetensors") && exists("merged/tokenizer.json") && !exists("merged.unfinished"));
    expect(run_tiny("merged", "--prompt ab --temperature 0"), 0, story);
    check_leaks(0);
    expect(shell(said, sizeof(said), "%s %s", line, scratch_file("merged")), 2, "it is there already");
    snprintf(line, sizeof(line), "%s --out %s --merge", getenv("TRAIN_MOE") ? getenv("TRAIN_MOE") : "./train_moe", scratch_file("base"));
    expect(shell(said, sizeof(said), "%s %s", line, scratch_file("again")), 2, "is a whole model, and no adapter");
}

// What does not go together is refused by its name.
void test_refused_adapters(void **state) {
    (void)state;
    need_base();
    static const struct {
        const char *options;
        int status;
        const char *message;
    } refused[] = {
        {"--lora 2 --optimizer muon", 2, "--lora goes with --optimizer adamw"},
        {"--lora 2 --lora-targets heads", 2, "--lora-targets takes one or more of attention, experts, router"},
        {"--lora 2 --mixer lstm", 2, "--mixer lstm"},
        {"--lora-alpha 3", 2, "it needs pairs: --lora 8"},
        {"--lora 2 --merge x", 2, "--merge takes the adapter in --out"},
    };
    check_leaks(0);
    for (int i = 0; i < COUNT(refused); i++)
        expect(run_tiny("refused", beside_base(refused[i].options)), refused[i].status, refused[i].message);
    expect(run_tiny("refused", "--lora 2"), 2, "name it by --init DIR");
    expect(run_tiny("refused", "--recipe shazeer-lstm --lora 2 --init x"), 1, "there is no such folder");

    // Another base under the same name, and none at all.
    check_leaks(1);
    expect(run_tiny("mine", beside_base("--lora 2")), 0, "What next");
    check_leaks(0);
    char a[300], b[300];
    snprintf(a, sizeof(a), "%s", scratch_file("base/checkpoint-6"));
    snprintf(b, sizeof(b), "%s", scratch_file("kept"));
    assert_int_equal(rename(a, b), 0);
    expect(run_tiny("mine", "--prompt a"), 1, "base_model_name_or_path");
    check_leaks(1);
    expect(run_tiny("other", BASE_OPTIONS " --steps 6 --seed 2"), 0, "What next");
    check_leaks(0);
    assert_int_equal(rename(scratch_file("other/checkpoint-6"), a), 0);
    expect(run_tiny("mine", "--prompt a"), 1, "it was trained beside a base with the fingerprint");
    assert_int_equal(remove_tree(a), 0);
    assert_int_equal(rename(b, a), 0);
    expect(run_tiny("mine", "--resume --steps 14 --lora 4"), 2, "--lora 4: in ");
    snprintf(b, sizeof(b), "--lora 2 --init %s", scratch_file("mine"));
    expect(run_tiny("refused", b), 1, "--merge DIR");
}

// Names for --merge, options that it does not read, and adapters whose small file is lost or names an adapter.
void test_merge_names(void **state) {
    (void)state;
    need_base();
    char line[512], change[1200];
    expect(run_tiny("named", beside_base("--lora 2")), 0, "the adapter needs that checkpoint");
    snprintf(line, sizeof(line), "%s --out %s --merge", getenv("TRAIN_MOE") ? getenv("TRAIN_MOE") : "./train_moe", scratch_file("named"));
    check_leaks(0);
    put_text("base/latest/chat_template.jinja", "{{ messages }}");
    expect(shell(said, sizeof(said), "%s ''", line), 2, "--merge: the name is empty");
    expect(shell(said, sizeof(said), "%s %s --lr 0.5", line, scratch_file("lr")), 2, "--merge only writes a model");
    expect(shell(said, sizeof(said), "%s %s//", line, scratch_file("a/slash")), 0, "are one model now");
    assert_true(exists("a/slash/checksums.json") && !exists("a/slash.unfinished"));
    assert_same_file(scratch_file("base/latest/chat_template.jinja"), scratch_file("a/slash/chat_template.jinja"));

    // Another process is writing there: the test itself, which has the folder's lock.
    assert_int_equal(mkdir(scratch_file("busy.unfinished"), 0777), 0);
    put_text("busy.unfinished/model.safetensors", "half");
    int lock = open(scratch_file("busy.unfinished"), O_RDONLY);
    assert_true(lock >= 0 && flock(lock, LOCK_EX | LOCK_NB) == 0);
    expect(shell(said, sizeof(said), "%s %s", line, scratch_file("busy")), 1, "busy: another process is writing it at this moment");
    assert_true(exists("busy.unfinished/model.safetensors") && !exists("busy"));
    close(lock);
    expect(shell(said, sizeof(said), "%s %s", line, scratch_file("busy")), 0, "are one model now");
    assert_true(!exists("busy.unfinished"));

    // What the user has under that name stays: files of another kind, and what a link leads to.
    assert_int_equal(mkdir(scratch_file("own.unfinished"), 0777), 0);
    put_text("own.unfinished/letter.txt", "mine");
    expect(shell(said, sizeof(said), "%s %s", line, scratch_file("own")), 1, "own.unfinished: it is needed for what is not finished, and has letter.txt");
    assert_int_equal(symlink("own.unfinished", scratch_file("link.unfinished")), 0);
    expect(shell(said, sizeof(said), "%s %s", line, scratch_file("link")), 1, "link.unfinished: cannot open");
    assert_int_equal(remove_tree(scratch_file("link.unfinished")), 0);
    assert_true(exists("own.unfinished/letter.txt") && !exists("link.unfinished"));

    snprintf(change, sizeof(change), "cd %s/latest && rm checksums.json && sed -i.old 's#\"base_model_name_or_path\".*#\"base_model_name_or_path\": "
             "\"%s/latest\",#' adapter_config.json", scratch_file("named"), scratch_file("named"));
    expect(shell(said, sizeof(said), "%s", change), 0, NULL);
    expect(run_tiny("named", "--prompt a"), 1, "which is an adapter, too");
    assert_int_equal(unlink(scratch_file("named/latest/adapter_config.json")), 0);
    expect(run_tiny("named", "--prompt a"), 1, "adapter_config.json: cannot open");
    snprintf(change, sizeof(change), "--init %s", scratch_file("named/latest"));
    expect(run_tiny("refused", change), 1, "--merge DIR");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pairs_gradients), cmocka_unit_test(test_pairs_bits),      cmocka_unit_test(test_frozen),
        cmocka_unit_test(test_merge_pairs),     cmocka_unit_test(test_reorder),         cmocka_unit_test(test_generate_with_pairs),
        cmocka_unit_test(test_adapter_resumes), cmocka_unit_test(test_merge),           cmocka_unit_test(test_refused_adapters),
        cmocka_unit_test(test_merge_names),
    };
    begin_tests();
    return cmocka_run_group_tests_name("adapters", tests, NULL, scratch_done);
}
