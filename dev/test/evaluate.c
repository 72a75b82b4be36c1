// Evaluation and what a run remembers of its routers: the figure does not depend on how the training is divided, it has a
// standard error, the last one reads all where that is quick; idle experts are known across resumes.

#include "dev/test/trainer.h"
#include "dev/test/runs.h"

// ---- the figure

// A device whose loss of a window is known: the first input's number, plus 1.
Run *fake_run;

void fake_forward(Model *m, const Batch *batch) {
    m->loss = batch->B ? batch->inputs[0] + 1 : 0;
    assert_true(batch->B <= 1 && m->config.group == SEQUENCE);
}

void fake_losses(Model *m, double *loss, double *aux, double *norm) {
    *loss = m->loss;
    *aux = *norm = 0;
}

// Means and standard errors by the definition, and which windows are read.
void test_evaluation_figures(void **state) {
    (void)state;
    enum { T = 4, ALL = 50, COUNT = 12 };
    Run run;
    Backend backend;
    Model *m = (Model *)allocate(1, sizeof(Model));
    memset(&run, 0, sizeof(run));
    memset(&backend, 0, sizeof(backend));
    assert_int_equal(mkdir(scratch_file("few"), 0777), 0);
    put_tokens("few/val_0.bin", T * ALL + 1, 265, 5);
    backend.forward = fake_forward;
    backend.losses = fake_losses;
    run.backend = &backend;
    run.model = m;
    m->config.group = BATCH;
    run.config.seq = T;
    run.tokenizer = tokenizer_load(small_tokenizer("few/tokenizer.json", NULL, NULL));
    run.val = data_open(scratch_file("few"), "val", T, run.tokenizer->vocab, 1);
    run.inputs = (int *)allocate(T, sizeof(int));
    run.targets = (int *)allocate(T, sizeof(int));
    assert_int_equal(run.val->windows, ALL);

    double nats[COUNT], bytes[COUNT], sum = 0, all_bytes = 0, of_mean = 0, of_ratio = 0;
    for (int i = 0; i < COUNT; i++) {
        data_window(run.val, i * ALL / COUNT, -1, run.inputs, run.targets);
        nats[i] = T * (run.inputs[0] + 1.0);
        bytes[i] = 0;
        for (int t = 0; t < T; t++)
            bytes[i] += run.targets[t] == run.tokenizer->eot ? 0 : run.tokenizer->length[run.targets[t]];
        sum += nats[i];
        all_bytes += bytes[i];
    }
    for (int i = 0; i < COUNT; i++) {
        of_mean += pow(nats[i] - sum / COUNT, 2) / (COUNT - 1);
        of_ratio += pow(nats[i] - sum / all_bytes * bytes[i], 2) / (COUNT - 1);
    }
    Evaluation e = evaluate(&run, COUNT);
    assert_near(e.loss, sum / COUNT / T, 1e-12);
    assert_near(e.bpb, sum / all_bytes / log(2), 1e-12);
    assert_near(e.loss_error, sqrt(of_mean / COUNT) / T, 1e-9);
    assert_near(e.bpb_error, sqrt(of_ratio * COUNT) / all_bytes / log(2), 1e-9);
    assert_true(isnan(evaluate(&run, 1).bpb_error));
    assert_int_equal(m->config.group, BATCH);
    data_close(run.val);
    tokenizer_free(run.tokenizer);
    free(run.inputs);
    free(run.targets);
    free(m);
}

// The line of the log of an evaluation, without its step.
void eval_line(const char *out, int step, char line[512]) {
    char file[300], begin[64];
    size_t size;
    snprintf(file, sizeof(file), "%s/log.jsonl", out);
    snprintf(begin, sizeof(begin), "{\"type\":\"eval\",\"step\":%d,", step);
    char *text = read_file(scratch_file(file), &size), *at = strstr(text, begin);
    if (!at)
        fail_msg("no evaluation of step %d in %s", step, file);
    snprintf(line, 512, "%.*s", (int)(strchr(at, '\n') - at - (long)strlen(begin)), at + strlen(begin));
    free(text);
}

// A trained model is evaluated by runs that divide their steps in other ways, at a learning rate of 0: all of them say the
// same, also where experts that are full refuse choices.
void test_evaluation_division(void **state) {
    (void)state;
    static const char *const recipes[] = {"mixtral", "st-moe", "mixtral --eval-capacity-factor 0.5", "threshold"};
    static const char *const division[] = {"--batch 1", "--batch 4", "--batch 1 --accum 3", "--batch 3 --threads 2"};
    char first[64], more[512], wanted[512], line[512];
    need_program();
    for (int r = 0; r < 4; r++) {
        snprintf(first, sizeof(first), "trained%d", r);
        snprintf(more, sizeof(more), "--lr 0.02 --steps 40 --recipe %s", recipes[r]);
        expect(run_tiny(first, more), 0, NULL);
        for (int i = -1; i < 4; i++) {
            snprintf(more, sizeof(more), "--init %s/latest --lr 0 --warmup 0 --steps 1 --eval-tokens 700 --recipe %s %s",
                     scratch_file(first), recipes[r], i < 0 ? "" : division[i]);
            remove_tree(scratch_file("divided"));
            expect(run_tiny("divided", more), 0, NULL);
            eval_line("divided", 1, line);
            assert_non_null(strstr(line, "\"val_tokens\":704,"));
            if (i < 0)
                strcpy(wanted, line);
            if (strcmp(line, wanted))
                fail_msg("%s, %s: %s; without: %s", recipes[r], division[i], line, wanted);
        }
    }
}

// The last evaluation reads all where that is less than 3% of the work of the run, and says so with a standard error.
void test_evaluation_last(void **state) {
    (void)state;
    char line[512];
    need_program();
    assert_int_equal(mkdir(scratch_file("short"), 0777), 0);
    put_tokens("short/train_0.bin", 3000, 265, 1);
    put_tokens("short/val_0.bin", 21 * 32 + 9, 265, 3); // 21 windows, of which a run of 2 * 117 windows can read all
    small_tokenizer("short/tokenizer.json", NULL, NULL);
    for (int steps = 116; steps <= 117; steps++) {
        char more[300], out[16];
        snprintf(out, sizeof(out), "last%d", steps);
        snprintf(more, sizeof(more), "--data %s --steps %d --eval-every 100", scratch_file("short"), steps);
        expect(run_tiny(out, more), 0, steps == 116 ? ", from 64 tokens" : ", from all 672 tokens");
        expect(0, 0, "bits per byte, standard error 0.");
        assert_true(logged(out, "eval", 100, "val_tokens") == 64);
        assert_true(logged(out, "eval", steps, "val_tokens") == (steps == 116 ? 64 : 672));
    }
    eval_line("last117", 117, line);
    assert_non_null(strstr(line, "\"val_se\":0."));
    assert_non_null(strstr(line, "\"val_bpb_se\":0."));
    expect(run_tiny("one_window", "--eval-tokens 1 --steps 2 --warmup 0"), 0, NULL);
    eval_line("one_window", 2, line);
    assert_non_null(strstr(line, "\"val_tokens\":32,\"val_se\":null,\"val_bpb_se\":null"));
}

// A checkpoint of earlier days counts batches. On the command line there is but one word for it.
void test_evaluation_batches(void **state) {
    (void)state;
    need_program();
    expect(run_tiny("counted", ""), 0, NULL);
    shell(said, sizeof(said), "sed -i 's/\"eval-tokens\":64/\"eval-batches\": 3/' %s/latest/config.json", scratch_file("counted"));
    expect(shell(said, sizeof(said), "%s --out %s --resume --steps 13 --threads 1", getenv("TRAIN_MOE") ? getenv("TRAIN_MOE") : "./train_moe",
                 scratch_file("counted")), 0, NULL);
    assert_true(logged("counted", "eval", 13, "val_tokens") == 3 * 2 * 32);
    expect(run_tiny("refused", "--eval-batches 3"), 2, "--eval-tokens");
}

// ---- what is remembered of the routers

// The lines of a run's log of this type, without those of other types.
char *lines_of(const char *out, const char *type) {
    char file[300], begin[64], *kept;
    size_t size, used = 0;
    snprintf(file, sizeof(file), "%s/log.jsonl", out);
    snprintf(begin, sizeof(begin), "{\"type\":\"%s\"", type);
    char *text = read_file(scratch_file(file), &size);
    kept = (char *)allocate(size + 1, 1);
    for (char *line = text; line < text + size; line = strchr(line, '\n') + 1) {
        size_t n = (size_t)(strchr(line, '\n') + 1 - line);
        if (!strncmp(line, begin, strlen(begin))) {
            memcpy(kept + used, line, n);
            used += n;
        }
    }
    free(text);
    return kept;
}

// A copy of a run that goes on from an earlier checkpoint.
void go_back(const char *from, const char *to, int step) {
    expect(shell(said, sizeof(said), "rm -rf %s && cp -a %s %s && ln -sfn checkpoint-%d %s/latest", scratch_file(to), scratch_file(from),
                 scratch_file(to), step, scratch_file(to)), 0, NULL);
}

// An expert that is idle for 60 steps, and after a resume for 40 more, is warned of, and a warning is not repeated. The log of
// the router is that of a run that was never stopped.
void test_idle_across_resume(void **state) {
    (void)state;
    static const char *const options = "--steps 130 --aux-weight 0 --experts 64 --topk 1 --gate probability --lr 0.02 --keep 9 "
                                       "--eval-every 0 --sample-every 0 --save-every 60";
    char more[512];
    need_program();
    expect(run_tiny("never", options), 0, "warning: step 100: expert ");
    char *wanted = lines_of("never", "router");
    assert_non_null(strstr(wanted, "\"dead\":4"));
    snprintf(more, sizeof(more), "%s --resume", options);
    for (int step = 60; step <= 120; step += 60) {
        go_back("never", "stopped", step);
        expect(run_tiny("stopped", more), 0, step == 60 ? "warning: step 100: expert " : "What next");
        assert_true(step == 60 || !strstr(said, "warning"));
        char *found = lines_of("stopped", "router");
        assert_string_equal(found, wanted);
        free(found);
    }

    // An older checkpoint does not have the file, and a damaged one is named.
    go_back("never", "stopped", 60);
    shell(said, sizeof(said), "rm %s/latest/router_state.json", scratch_file("stopped"));
    expect(run_tiny("stopped", more), 0, "What next");
    assert_null(strstr(said, "warning"));
    go_back("never", "stopped", 60);
    shell(said, sizeof(said), "sed -i 's/\"idle\":.[0-9]*,/\"idle\":[/' %s/latest/router_state.json", scratch_file("stopped"));
    check_leaks(0);
    expect(run_tiny("stopped", more), 1, "router_state.json: damaged: idle has 63 numbers, and there are 64 experts");
    free(wanted);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_evaluation_figures),
        cmocka_unit_test(test_evaluation_division),
        cmocka_unit_test(test_evaluation_last),
        cmocka_unit_test(test_evaluation_batches),
        cmocka_unit_test(test_idle_across_resume),
    };
    begin_tests();
    return cmocka_run_group_tests_name("evaluate", tests, NULL, scratch_done);
}
