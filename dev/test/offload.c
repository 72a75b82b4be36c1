// Experts in a file (--offload): the bits are those without, no more experts are in memory than was asked for, and which goes first.

#include "dev/test/trainer.h"
#include "dev/test/model.h"
#include "dev/test/runs.h"

enum { AWAY_B = 2, AWAY_T = 8, AWAY_N = AWAY_B * AWAY_T };

// A model whose matrices of experts are some pages large.
Model *model_with_offload(const char *recipe, const char *options, int held) {
    Config c = small_config(recipe);
    apply_options(&c, "--dim 48 --ffn 96 --experts 5");
    set_options(&c, options);
    c.offload = held;
    c.offload_dir = keep_text(scratch_file("away"));
    Model *m = model_allocate(&c, AWAY_N, 1, NULL);
    model_init(m, NULL);
    return m;
}

// Some steps of two micro-steps each. Returns a hash of the losses.
uint64_t steps_with_offload(Model *m, int steps) {
    int inputs[AWAY_N], targets[AWAY_N];
    uint64_t losses = 0;
    for (int step = 1; step <= steps; step++) {
        for (int micro = 0; micro < 2; micro++) {
            random_tokens(inputs, AWAY_N, m->config.vocab, (uint64_t)(4 * step + 2 * micro));
            random_tokens(targets, AWAY_N, m->config.vocab, (uint64_t)(4 * step + 2 * micro + 1));
            Batch batch = {inputs, targets, AWAY_B, AWAY_T, TRAIN_MODE, 0.5, step, (long)micro * AWAY_N, micro == 0, micro == 1};
            double loss = model_forward(m, &batch);
            losses = hash64(losses ^ hash64((uint64_t)(loss * 1e15)));
            model_backward(m);
        }
        cpu_update(m, step, 1e-3);
    }
    return losses;
}

const char *const models_with_offload[][2] = {
    {"mixtral", ""},
    {"mixtral", "--optimizer muon --recompute 1 --capacity-factor 1"},
    {"mixtral", "--mixed 1 --recompute 1 --experts 8"},
    {"deepseek-v3", "--experts 8 --topk 3 --moments bf16"},
    {"mh-moe", "--precision bf16"},
    {"fast", ""},
};

// Training with any number of experts in memory, by any number of threads, gives the bits of training with all.
void test_offload_bits(void **state) {
    (void)state;
    for (int i = 0; i < (is_slow() ? 2 : COUNT(models_with_offload)); i++) {
        const char *recipe = models_with_offload[i][0], *options = models_with_offload[i][1];
        Model *plain = model_with_offload(recipe, options, 0);
        uint64_t losses = steps_with_offload(plain, 3);
        for (int held = 1; held <= 4; held += i ? 2 : 1) {
            set_threads(1 + (held == 3));
            offloaded.fullest = 0;
            Model *m = model_with_offload(recipe, options, held);
            assert_true(pool_of(m->params.layer[1].w_in) && pool_of(m->grads.layer[1].w_out));
            if (steps_with_offload(m, 3) != losses)
                fail_msg("%s %s: --offload %d has other losses", recipe, options, held);
            for (int what = WEIGHTS; what <= MOMENT2; what++) {
                if (memcmp(m->memory[what], plain->memory[what], plain->size * sizeof(real)))
                    fail_msg("%s %s: --offload %d has other numbers in array %d", recipe, options, held, what);
            }
            assert_int_equal(offloaded.fullest, held);
            model_free(m);
            assert_int_equal(offloaded.pool_count, 0);
        }
        set_threads(1);
        model_free(plain);
    }
}

// One token after the other, with the weights of a model whose experts are in a file.
void test_offload_generates(void **state) {
    (void)state;
    Model *plain = model_with_offload("mixtral", "", 0), *m = model_with_offload("mixtral", "", 2);
    real *a = take_reals(plain->config.vocab), *b = take_reals(plain->config.vocab);
    for (int position = 0; position < 12; position++) {
        model_generate(plain, position * 3, position, a);
        model_generate(m, position * 3, position, b);
        assert_memory_equal(a, b, (size_t)plain->config.vocab * sizeof(real));
    }
    model_free(plain);
    model_free(m);
    free_taken();
}

// Does this mapping of the process lie in the part of an array that is in a file?
int is_of_files(uintptr_t from, uintptr_t end) {
    for (int i = 0; i < offloaded.array_count; i++) {
        const Mapped *a = &offloaded.arrays[i];
        if (from >= (uintptr_t)a->base + a->first && end <= (uintptr_t)a->base + a->end)
            return 1;
    }
    return 0;
}

// KiB of the experts' files that are in this process's memory, by the system's own account; -1: it gives none.
long resident_of_files(void) {
    FILE *file = fopen("/proc/self/smaps", "r");
    char line[512];
    int ours = 0;
    long sum = 0, size;
    if (!file)
        return -1;
    while (fgets(line, sizeof(line), file)) {
        unsigned long from, end;
        if (sscanf(line, "%lx-%lx ", &from, &end) == 2)
            ours = is_of_files((uintptr_t)from, (uintptr_t)end);
        if (ours && sscanf(line, "Rss: %ld kB", &size) == 1)
            sum += size;
    }
    fclose(file);
    return sum;
}

// What the counter says is so: after each part of a step the process holds the pages of N experts of each tensor, and at the
// borders of each up to 64 KiB more, which the system maps at a time.
void check_offload_memory(const char *options) {
    Model *m = model_with_offload("mixtral", options, 2);
    assert_true(resident_of_files() < 200); // the first weights are in the file
    double allowed = 0, all = 0;
    for (int i = 0; i < offloaded.pool_count; i++) {
        const Pool *p = &offloaded.pools[i];
        allowed += p->most * ((double)bytes_of_expert(p, 0) + 2 * 65536);
        all += (double)p->from[p->E] * sizeof(real);
    }
    steps_with_offload(m, 2);
    int tokens[AWAY_N];
    random_tokens(tokens, AWAY_N, m->config.vocab, 1);
    run_batch(m, tokens, tokens, AWAY_B, AWAY_T, TRAIN_MODE, 1, 3, 0);
    assert_true(resident_of_files() > 0 && (double)resident_of_files() * 1024 <= allowed && allowed < 0.5 * all);
    model_backward(m);
    assert_true((double)resident_of_files() * 1024 <= allowed);
    cpu_update(m, 3, 1e-3);
    assert_true((double)resident_of_files() * 1024 <= allowed);
    model_free(m);
    assert_true(resident_of_files() == 0);
}

void test_offload_memory(void **state) {
    (void)state;
#if !defined(__SANITIZE_ADDRESS__)
    if (is_slow() || resident_of_files() < 0)
        skip();
    set_threads(1);
    for (int bf16 = 0; bf16 < 2; bf16++)
        check_offload_memory(bf16 ? "--dim 64 --ffn 1024 --experts 8 --topk 2 --moments bf16"
                                  : "--dim 64 --ffn 1024 --experts 8 --topk 2");
#else
    skip();
#endif
}

void assert_held(const Pool *p, int count, int a, int b) {
    assert_int_equal(p->count, count);
    assert_int_equal(p->held[0], a);
    assert_true(count < 2 || p->held[1] == b);
}

// Where the file system has files without a name, the experts' file has never had one, so nothing of it is left behind whenever the
// program is killed. A folder that is not there is not made for it. All arrays are in one.
void test_offload_has_no_name(void **state) {
    (void)state;
#ifdef O_TMPFILE
    char path[64], name[4200];
    Model *m = model_with_offload("mixtral", "", 2);
    assert_true(!exists("away"));
    int file = open(scratch_file("."), O_TMPFILE | O_RDWR, 0600);
    for (int i = 0; i < offloaded.array_count; i++) {
        snprintf(path, sizeof(path), "/proc/self/fd/%d", offloaded.arrays[i].file);
        ssize_t n = readlink(path, name, sizeof(name) - 1);
        name[n > 0 ? n : 0] = 0;
        if (file >= 0 && n > 0 && strstr(name, "offload-"))
            fail_msg("the file was called %s", name);
        assert_int_equal(offloaded.arrays[i].file, offloaded.arrays[0].file);
    }
    assert_int_equal(offloaded.array_count, 4);
    if (file >= 0)
        close(file);
    model_free(m);
#else
    skip();
#endif
}

// The file of a new run is in the nearest folder above that of the run.
void test_offload_nearest_folder(void **state) {
    (void)state;
    char path[4200];
    static const char *const folders[][2] = {{"/", "/"}, {"/none", "/"}, {"/none//x/", "/"}, {"none", "."}, {"none/x//", "."}, {"", "."},
                                             {"data", "data"}, {"data/none/x/", "data/"}, {"/dev/null/x", "/dev/null/x"}};
    for (int i = 0; i < COUNT(folders); i++) {
        nearest_folder(folders[i][0], path);
        if (strcmp(path, folders[i][1]))
            fail_msg("'%s': '%s'", folders[i][0], path);
    }
}

// The expert whose last use is longest ago goes first.
void test_offload_order(void **state) {
    (void)state;
    Model *m = model_with_offload("mixtral", "", 2);
    Pool *p = pool_of(m->params.layer[0].w_in);
    int plan[5], offset[] = {0, 3, 3, 4, 6, 7}; // expert 1 has no rows
    p->count = 0;
    take_in(p, 0);
    assert_held(p, 1, 0, 0);
    take_in(p, 3);
    take_in(p, 0);
    assert_held(p, 2, 3, 0);
    double before = offloaded.fetched;
    take_in(p, 4);
    assert_held(p, 2, 0, 4);
    take_in(p, 4);
    take_in(p, 0);
    assert_held(p, 2, 4, 0);
    assert_true(offloaded.fetched == before + 1);

    // A product begins with those that are in memory, and leaves out those without rows.
    assert_int_equal(plan_experts(p, offset, plan), 4);
    const int wanted[] = {0, 4, 2, 3};
    assert_memory_equal(plan, wanted, sizeof(wanted));
    let_go(p);
    assert_int_equal(p->count, 0);
    model_free(m);
}

// ---- the program

const char *const away_sizes = "--dim 64 --ffn 128";

int run_offload(const char *out, const char *more) {
    char options[512];
    snprintf(options, sizeof(options), "%s %s", away_sizes, more);
    return run_tiny(out, options);
}

void assert_no_file(const char *out) {
    shell(said, sizeof(said), "ls -a %s", scratch_file(out));
    assert_true(!strstr(said, "offload-"));
}

// A run that was killed goes on with other numbers of experts in memory, and has the bits of one with all of them.
void test_offload_run_resumes(void **state) {
    (void)state;
    need_program();
    expect(run_offload("all", ""), 0, "What next");
    assert_true(!strstr(said, "--offload"));
    char options[512];
    snprintf(options, sizeof(options), "%s --offload 1", away_sizes);
    for (int attempt = 0, status = 0; !WIFSIGNALED(status); attempt++) {
        assert_true(attempt < 5); // it was always done before it could be killed
        remove_tree(scratch_file("away"));
        pid_t child = start_tiny("away", options);
        status = wait_for(child, scratch_file("away/log.jsonl"), "\"step\":7,");
        if (status == -1) {
            kill(child, SIGKILL);
            waitpid(child, &status, 0);
        }
    }
    assert_latest("away", "checkpoint-6");
    assert_no_file("away");
    expect(run_offload("away", "--offload 3 --offload-cold --resume"), 0, "--offload 3: of ");
    assert_same_weights("all", "away");
    assert_no_file("away");
    expect(run_tiny("all", "--prompt ab --seed 3"), 0, "ab");
    char answer[256];
    snprintf(answer, sizeof(answer), "%.200s", strstr(said, "\nab"));
    expect(run_tiny("all", "--prompt ab --seed 3 --offload 2"), 0, "--offload 2: of ");
    assert_true(!strncmp(strstr(said, "\nab"), answer, 10));

    // What an evaluation says of memory counts the experts that are there: 3 of 4 are not, in 2 layers, of 3 * 64 * 128 weights.
    const char *program = getenv("TRAIN_MOE") ? getenv("TRAIN_MOE") : "./train_moe";
    double held[2] = {0, 0};
    for (int i = 0; i < 2; i++) {
        expect(shell(said, sizeof(said), "%s --out %s --evaluate --eval-tokens 64 --threads 1 %s", program, scratch_file("all"),
                     i ? "--offload 1" : ""), 0, "weights in memory: ");
        sscanf(strstr(said, "weights in memory: "), "weights in memory: %lf", &held[i]);
    }
    assert_true(fabs(held[0] - held[1] - 3 * 2 * 3 * 64 * 128 * 4 / 1048576.0) < 0.011);
}

// No room for the file is said before the run begins, and what was saved stays.
void test_offload_full_disk(void **state) {
    (void)state;
    need_program();
    expect(run_offload("saved", "--steps 6"), 0, "What next");
    char options[512];
    snprintf(options, sizeof(options), "%s --offload 2 --resume", away_sizes);
    check_leaks(0);
    expect(shell(said, sizeof(said), "(ulimit -f 100; %s)", command_line("saved", options)), 1,
           "/saved: cannot reserve 3.0 MiB for experts' weights, gradients and moments (");
    assert_true(strstr(said, " MiB are free): File too large; make room, or name another folder by --offload-dir"));
    assert_latest("saved", "checkpoint-6");
    for (int blocks = 100; blocks <= 3200; blocks += 3100) { // there is room for two arrays of the four, which is not enough
        expect(shell(said, sizeof(said), "(ulimit -f %d; %s)", blocks, command_line("fresh/er", "--dim 64 --ffn 128 --offload 2")), 1,
               "cannot reserve 3.0 MiB");
        assert_true(!exists("fresh"));
    }
    check_leaks(1);
    expect(run_offload("saved", "--offload 2 --resume"), 0, "What next");
}

void test_offload_refused(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    expect(run_tiny("refused", "--offload 4"), 2, "--offload 4: a layer has 4 experts, so there would be nothing to offload: give fewer");
    expect(run_tiny("refused", "--recipe dense --offload 2"), 2, "--offload 2 would have no effect: it needs layers with experts");
    expect(run_tiny("refused", "--offload-dir /tmp"), 2, "it needs experts in a file: --offload N");
    expect(run_tiny("refused", "--offload 2 --offload-dir /proc/none"), 1, "/proc/none: cannot create");
    expect(run_tiny("refused", "--offload 2 --offload-dir /proc"), 1, "--offload: /proc: cannot create a file in it");
    expect(run_tiny("base", "--steps 6"), 0, "What next");
    char options[512];
    snprintf(options, sizeof(options), "--offload 2 --lora 2 --init %s", scratch_file("base"));
    expect(run_tiny("refused", options), 2, "--offload is for experts that are trained, and --lora trains none of them");
    snprintf(options, sizeof(options), "%s --out %s", getenv("TRAIN_MOE") ? getenv("TRAIN_MOE") : "./train_moe", scratch_file("base"));
    expect(shell(said, sizeof(said), "%s --quantize q8_0", options), 0, "with few bits");
    expect(shell(said, sizeof(said), "%s-q8_0 --prompt ab --offload 2", options), 2, "this model has experts of few bits");
    snprintf(options, sizeof(options), "--offload 2 --teacher %s", scratch_file("none"));
    expect(run_tiny("refused", options), 1, "there is no such folder");
    assert_true(!exists("refused"));
    check_leaks(1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_offload_bits),        cmocka_unit_test(test_offload_generates), cmocka_unit_test(test_offload_memory),
        cmocka_unit_test(test_offload_order),       cmocka_unit_test(test_offload_has_no_name), cmocka_unit_test(test_offload_run_resumes),
        cmocka_unit_test(test_offload_nearest_folder),
        cmocka_unit_test(test_offload_full_disk),   cmocka_unit_test(test_offload_refused),
    };
    begin_tests();
    return cmocka_run_group_tests_name("offload", tests, NULL, scratch_done);
}
