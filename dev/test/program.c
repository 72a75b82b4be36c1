// ./train_moe as a user starts it (or the program that TRAIN_MOE names; TRAIN_MOE_DOUBLE is the one in double): a run that
// goes on after a kill, the run directory, the log, memory, options, bad input, --prompt. None of it depends on this
// program's own precision. With VALGRIND set, no program is started and these tests are skipped.

#include "dev/test/trainer.h"
#include "dev/test/model.h"
#include "dev/test/runs.h"
#ifdef __APPLE__
#define MEMORY_UNIT 1 // of ru_maxrss, in bytes
#else
#define MEMORY_UNIT 1024
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Runs and their checkpoints

// Twelve steps without a break give the same bits as six steps, SIGKILL, and the other six.
void check_resume(const char *recipe) {
    char options[256], whole[64], halves[64], path[128];
    snprintf(whole, sizeof(whole), "whole-%s", recipe);
    snprintf(halves, sizeof(halves), "halves-%s", recipe);
    snprintf(path, sizeof(path), "%s/log.jsonl", halves);
    // the validation in step 7, of a third of the file, takes long enough to be killed in
    snprintf(options, sizeof(options), "--recipe %s --eval-every 7 --eval-tokens 10000 --accum 2", recipe);
    expect(run_tiny(whole, options), 0, "What next");
    for (int attempt = 0, status = 0; !WIFSIGNALED(status); attempt++) {
        assert_true(attempt < 5); // it was always done before it could be killed
        remove_tree(scratch_file(halves));
        pid_t child = start_tiny(halves, options);
        status = wait_for(child, scratch_file(path), "\"step\":7,");
        if (status == -1) {
            kill(child, SIGKILL);
            waitpid(child, &status, 0);
        }
    }
    assert_latest(halves, "checkpoint-6");
    strcat(options, " --resume");
    expect(run_tiny(halves, options), 0, "What next");
    assert_latest(halves, "checkpoint-12");
    assert_same_weights(whole, halves);
    Config c = small_config(recipe);
    int routers = moe_layers(&c);
    assert_log(whole, 12, routers);
    assert_log(halves, 12, routers);
    for (int step = 1; step <= 12; step++)
        assert_true(logged(whole, "step", step, "loss") == logged(halves, "step", step, "loss"));
    assert_true(logged(whole, "eval", 12, "val_loss") == logged(halves, "eval", 12, "val_loss"));
    assert_true(logged(whole, "eval", 7, "val_bpb") == logged(halves, "eval", 7, "val_bpb"));
}

void test_resume(void **state) {
    (void)state;
    need_program();
    for (int r = 0; r < recipe_count; r++)
        check_resume(recipes[r].name);
}

// --moments bf16 gives the same bits with any number of threads and after a checkpoint, whose files say so: a resumed run
// keeps it unless the command line asks for something else.
void test_moments_of_runs(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    static const char *const runs[][2] = {
        {"moments-1", "--moments bf16"}, {"moments-2", "--moments bf16 --threads 2"}, {"moments-32", "--moments fp32"}};
    const char *const folders[] = {"moments-kept", "moments-now-32", "moments-now-16"};
    for (int i = 0; i < 3; i++)
        expect(run_tiny(runs[i][0], runs[i][1]), 0, "What next");
    assert_same_weights("moments-1", "moments-2");
    assert_true(logged("moments-1", "step", 1, "loss") == logged("moments-32", "step", 1, "loss"));
    assert_true(logged("moments-1", "step", 12, "loss") != logged("moments-32", "step", 12, "loss"));
    assert_near(logged("moments-1", "step", 12, "loss"), logged("moments-32", "step", 12, "loss"), 1e-2);
    for (int i = 0; i < 3; i++) {
        shell(said, sizeof(said), "cp -a %s %s; ln -sfn checkpoint-6 %s/latest",
              scratch_file(i == 2 ? "moments-32" : "moments-1"), scratch_file(folders[i]), scratch_file(folders[i]));
    }
    expect(run_tiny("moments-kept", "--resume"), 0, "going on after step 6");
    assert_same_weights("moments-1", "moments-kept");
    expect(run_tiny("moments-now-32", "--resume --moments fp32"), 0, "going on after step 6");
    expect(run_tiny("moments-now-16", "--resume --moments bf16"), 0, "going on after step 6");
    for (int i = 0; i < 3; i++) {
        shell(said, sizeof(said), "cat %s/latest/config.json", scratch_file(folders[i]));
        expect(0, 0, i == 1 ? "\"moments\":\"fp32\"" : "\"moments\":\"bf16\"");
    }
    for (int step = 7; step <= 12; step++) { // the loss of step 7 is that of the weights in the checkpoint
        double bf16 = logged("moments-1", "step", step, "loss"), fp32 = logged("moments-32", "step", step, "loss");
        assert_true((logged("moments-now-32", "step", step, "loss") == bf16) == (step == 7 || step == 8));
        assert_true((logged("moments-now-16", "step", step, "loss") == fp32) == (step == 7));
    }
}

// --precision bf16 trains another model than float32, though one as good; gives the same bits with any number of threads and after
// a checkpoint, whose files say so: a resumed run keeps it unless the command line asks for something else.
void test_precision_of_runs(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    static const char *const runs[][2] = {
        {"products-1", "--precision bf16"}, {"products-2", "--precision bf16 --threads 2"}, {"products-32", ""}};
#ifdef PLAIN
    expect(run_tiny(runs[0][0], runs[0][1]), 2, "--precision bf16: this program multiplies in fp32; make train_moe, without PLAIN=1");
    skip();
#endif
    for (int i = 0; i < 3; i++) {
        expect(run_tiny(runs[i][0], runs[i][1]), 0, "What next");
        shell(said, sizeof(said), "grep '\"precision\":\"%s\"' %s/log.jsonl", i < 2 ? "bf16" : "fp32", scratch_file(runs[i][0]));
        expect(0, 0, "\"type\":\"run\"");
    }
    assert_same_weights("products-1", "products-2");
    for (int step = 1; step <= 12; step++) {
        double bf16 = logged("products-1", "step", step, "loss"), fp32 = logged("products-32", "step", step, "loss");
        assert_true(bf16 != fp32);
        assert_near(bf16, fp32, 1e-2);
    }
    const char *const folders[] = {"products-kept", "products-now-32"};
    for (int i = 0; i < 2; i++) {
        shell(said, sizeof(said), "cp -a %s %s; ln -sfn checkpoint-6 %s/latest", scratch_file("products-1"), scratch_file(folders[i]),
              scratch_file(folders[i]));
    }
    expect(run_tiny("products-kept", "--resume"), 0, "bfloat16");
    assert_same_weights("products-1", "products-kept");
    expect(run_tiny("products-now-32", "--resume --precision fp32"), 0, "going on after step 6");
    assert_true(logged("products-now-32", "step", 7, "loss") != logged("products-1", "step", 7, "loss"));
    expect(run_tiny("products-1", "--prompt hello --temperature 0 --precision fp32"), 0, "hello");
}

// Which options may change with --resume, and which may not.
void test_resume_options(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    expect(run_tiny("options", "--steps 4 --save-every 2"), 0, NULL);
    static const char *const fixed[] = {"--dim 64", "--layers 3",  "--seed 2",
                                        "--seq 16", "--experts 8", "--recipe dense", "--untied", "--optimizer adamw"};
    for (int i = 0; i < (int)(sizeof(fixed) / sizeof(fixed[0])); i++) {
        char options[128];
        snprintf(options, sizeof(options), "--resume --steps 6 %s", fixed[i]);
        expect(run_tiny("options", options), 2, "cannot change");
        snprintf(options, sizeof(options), "%.*s", (int)strcspn(fixed[i], " "), fixed[i]);
        expect(2, 2, options);
        assert_latest("options", "checkpoint-4");
    }
    expect(run_tiny("options", "--resume --steps 4"), 0, "is finished");
    expect(run_tiny("options", "--steps 6"), 2, "--resume");
    expect(2, 2, "another --out");
    assert_latest("options", "checkpoint-4");
    expect(run_tiny("options", "--resume --steps 6 --threads 2 --log-every 1 --eval-every 1 --lr 1e-4"), 0,
           "What next");
    assert_latest("options", "checkpoint-6");
    assert_log("options", 6, 2);
    assert_near(logged("options", "step", 6, "lr"), 1e-5, 1e-9);
    assert_true(isfinite(logged("options", "eval", 5, "val_loss")));
}

// Neither optimizer goes on with what the other one remembers: a resumed run keeps its own, and the message says how a new
// run can have the other one.
void test_resume_optimizer(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    static const char *const names[] = {"muon", "adamw"};
    for (int i = 0; i < 2; i++) {
        char options[512], text[512], name[32];
        const char *mine = names[i], *other = names[1 - i];
        snprintf(options, sizeof(options), "--steps 3 --optimizer %s", mine);
        expect(run_tiny(mine, options), 0, "What next");
        snprintf(options, sizeof(options), "--resume --steps 4 --optimizer %s", other);
        snprintf(text, sizeof(text), "it is %s, and it cannot change now; a new run from these weights, --init %s/checkpoint-3, can have it",
                 mine, scratch_file(mine));
        expect(run_tiny(mine, options), 2, text);
        snprintf(options, sizeof(options), "--resume --steps 4%s%s", i ? "" : " --optimizer ", i ? "" : mine); // given or not
        expect(run_tiny(mine, options), 0, "going on after step 3");
        snprintf(name, sizeof(name), "%s-now", other);
        snprintf(options, sizeof(options), "--steps 3 --optimizer %s --init %s/checkpoint-3", other, scratch_file(mine));
        expect(run_tiny(name, options), 0, "What next");
    }
}

// --resume with the same sequences in a step, but cut into other micro-steps. Another number is refused.
void test_resume_pieces(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    char options[128], name[32];
    expect(run_tiny("pieces", "--group sequence --batch 4"), 0, "What next");
    expect(run_tiny("pieces", "--resume --steps 14 --batch 2 --accum 3"), 2, "has 4 sequences, which must be --batch times --accum times 1 rank");
    for (int batch = 1; batch <= 4; batch++) {
        snprintf(name, sizeof(name), "pieces%d", batch);
        shell(said, sizeof(said), "cp -a %s %s; ln -sfn checkpoint-6 %s/latest", scratch_file("pieces"), scratch_file(name), scratch_file(name));
        snprintf(options, sizeof(options), "--group sequence --resume --batch %d", batch);
        if (batch == 3) {
            expect(run_tiny(name, options), 2, "a step there has 4 sequences, which must be --batch times");
            continue;
        }
        expect(run_tiny(name, options), 0, "What next");
        for (int step = 7; step <= 12; step++) {
            double loss = logged("pieces", "step", step, "loss");
            assert_near(logged(name, "step", step, "loss"), loss, (step == 7 ? 2e-6 : 1e-3) * loss); // rounding decides ties
        }
    }
}

// --resume begins a new run if there is no checkpoint. --save-every, --log-every and --keep do what they say.
void test_run_directory(void **state) {
    (void)state;
    need_program();
    expect(
        run_tiny("paces", "--resume --steps 9 --save-every 2 --keep 3 --log-every 4 --eval-every 3 --sample-every 5"),
        0, "What next");
    for (int step = 1; step <= 9; step++) {
        char name[64];
        snprintf(name, sizeof(name), "paces/checkpoint-%d/config.json", step);
        assert_int_equal(exists(name), step == 6 || step == 8 || step == 9);
        assert_int_equal(isfinite(logged("paces", "step", step, "loss")), step == 1 || step % 4 == 0 || step == 9);
        assert_int_equal(isfinite(logged("paces", "eval", step, "val_loss")), step % 3 == 0);
    }
    assert_latest("paces", "checkpoint-9");
    static const char *const files[] = {"config.json",           "model.safetensors",  "optimizer.safetensors",
                                        "tokenizer.json",        "trainer_state.json", "tokenizer_config.json",
                                        "generation_config.json"};
    for (int i = 0; i < 7; i++) {
        char name[64];
        size_t size;
        snprintf(name, sizeof(name), "paces/latest/%s", files[i]);
        assert_true(exists(name));
        char *text = read_file(scratch_file(name), &size);
        if (!strstr(name, "safetensors"))
            json_free(json_parse(text, size, name));
        free(text);
    }
    assert_same_file(scratch_file("paces/latest/tokenizer.json"), scratch_file("data/tokenizer.json"));
    assert_true(!exists("paces/unfinished-checkpoint") && !exists("paces/latest.new"));
    expect(run_tiny("off", "--steps 3 --save-every 0 --log-every 0 --eval-every 0 --sample-every 0 --seed 2"), 0,
           "What next");
    assert_latest("off", "checkpoint-3"); // the last step always saves
    assert_true(!exists("off/checkpoint-2"));
}

// A save that was killed leaves files behind, and a log may end in the middle of a line: neither does any harm.
void test_leftovers(void **state) {
    (void)state;
    need_program();
    char command[1024];
    expect(run_tiny("clean", "--steps 4 --save-every 2"), 0, NULL);
    expect(run_tiny("left", "--steps 2 --save-every 2 --schedule constant"), 0, NULL);
    remove_tree(scratch_file("left"));
    expect(run_tiny("left", "--steps 4 --save-every 2"), 0, NULL);
    snprintf(command, sizeof(command),
             "cd %s && rm -r checkpoint-4 && ln -sfn checkpoint-2 latest && mkdir -p unfinished-checkpoint/x && "
             "echo x > unfinished-checkpoint/model.safetensors && mkdir checkpoint-4 && echo x > "
             "checkpoint-4/config.json && "
             "ln -s nowhere latest.new && printf '{\"type\":\"step\",\"st' >> log.jsonl",
             scratch_file("left"));
    expect(shell(said, sizeof(said), "%s", command), 0, NULL);
    expect(run_tiny("left", "--steps 4 --save-every 2 --resume"), 0, "What next");
    assert_true(!exists("left/unfinished-checkpoint") && !exists("left/latest.new"));
    assert_latest("left", "checkpoint-4");
    assert_same_weights("clean", "left");
    assert_log("left", 4, 2);
}

// --init begins with the weights of a checkpoint, in every recipe: with a learning rate of 0 the validation loss stays the same.
// Does something of this recipe's router change after a step without a gradient?
int has_buffers(const char *recipe) {
    Config c;
    config_defaults(&c);
    config_recipe(&c, recipe);
    int moves = c.bias_rate > 0;
    for (int i = 0; i < all_router_count; i++) {
        moves |= router_is_used(all_routers[i], &c) && all_routers[i]->update;
    }
    return moves;
}

void test_init(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    for (int r = 0; r < recipe_count; r++) {
        char first[64], options[512];
        snprintf(first, sizeof(first), "first-%s", recipes[r].name);
        snprintf(options, sizeof(options), "--recipe %s --steps 5 --lr 0.01 --optimizer adamw", recipes[r].name);
        expect(run_tiny(first, options), 0, NULL);
        snprintf(options, sizeof(options), "--init %s/latest --steps 1 --lr 0 --eval-every 1 --recipe %s",
                 scratch_file(first), recipes[r].name);
        char again[64];
        snprintf(again, sizeof(again), "again-%s", recipes[r].name);
        expect(run_tiny(again, options), 0, NULL);
        double before = logged(first, "eval", 5, "val_loss"), after = logged(again, "eval", 1, "val_loss");
        int moves = has_buffers(recipes[r].name); // which --lr does not hold
        assert_true(moves ? fabs(before - after) < 0.02 : before == after);
        assert_true(logged(first, "eval", 5, "val_loss") < 5.55); // it had learned something
    }
    char options[512];
    snprintf(options, sizeof(options), "--init %s/latest --dim 64", scratch_file("first-mixtral"));
    expect(run_tiny("refused", options), 2, "--dim");
    snprintf(options, sizeof(options), "--init %s/latest --resume", scratch_file("first-mixtral"));
    expect(run_tiny("refused", options), 2, "--init");
    snprintf(options, sizeof(options), "--init %s", scratch_file("data"));
    expect(run_tiny("refused", options), 1, "config.json");
    assert_true(!exists("refused"));
}

// Heads with a width of their own, and a width that no heads divide, since there are none: such models are read again, too.
void test_mixer_checkpoints(void **state) {
    (void)state;
    need_program();
    const char *const models[] = {
        "--recipe moa --head-width 6",
        "--recipe switchhead --head-width 6",
        "--recipe switchhead --attention-experts 0 --head-width 40",
        ("--qkv-bias --qk-norm --qk-norm-over row --head-width 6 --rope-scaling llama3 --rope-original 64 --shared 1 "
         "--shared-gate --shared-ffn 20 --dense-first 1 --dense-ffn 9"),
        "--recipe shazeer-lstm --dim 9",
        "--recipe shazeer-lstm --dim 8",
    };
    for (int i = 0; i < COUNT(models); i++) {
        char name[64], options[512];
        snprintf(name, sizeof(name), "mixer-%d", i);
        snprintf(options, sizeof(options), "%s --steps 1", models[i]);
        expect(run_tiny(name, options), 0, NULL);
        expect(run_tiny(name, "--prompt 12"), 0, NULL);
    }
    expect(shell(said, sizeof(said), "sed -i.old 's/\"head_dim\": 6/\"head_dim\": 8/' %s/latest/config.json",
                 scratch_file("mixer-0")),
           0, NULL);
    expect(run_tiny("mixer-0", "--prompt 12 --trust-weights"), 1, "head_dim 8 is not 6, the model's head-width");
}

// After Ctrl-C the program finishes the step, saves, and says how to go on.
void test_interrupt(void **state) {
    (void)state;
    need_program();
    int status, stopped = 0;
    size_t size;
    pid_t child = start_tiny("stopped", "--steps 1000000 --save-every 3");
    assert_int_equal(wait_for(child, scratch_file("stopped/latest/config.json"), "{"), -1);
    kill(child, SIGINT);
    waitpid(child, &status, 0);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 130);
    char *text = read_file(scratch_file("said"), &size), *at = strstr(text, "stopped after step ");
    assert_non_null(at);
    assert_non_null(strstr(at, "--resume"));
    assert_int_equal(sscanf(at, "stopped after step %d", &stopped), 1);
    free(text);
    char name[64], options[64];
    snprintf(name, sizeof(name), "checkpoint-%d", stopped);
    assert_latest("stopped", name);
    snprintf(options, sizeof(options), "--resume --steps %d", stopped + 2);
    expect(run_tiny("stopped", options), 0, "What next");
    assert_log("stopped", stopped + 2, 2);
}

// Ctrl-C during an evaluation saves the step before it. A second process does not write into the same run.
void test_interrupt_evaluation(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    int status, stopped = 0;
    pid_t child = start_tiny("halted", "--steps 1000000 --save-every 0 --eval-every 2 --eval-tokens 0 --batch 1");
    assert_int_equal(wait_for(child, scratch_file("halted/log.jsonl"), "\"eval\""), -1);
    expect(run_tiny("halted", "--resume"), 1, "another process");
    kill(child, SIGTERM);
    waitpid(child, &status, 0);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 130);
    size_t size;
    char *text = read_file(scratch_file("said"), &size), *at = strstr(text, "stopped after step "), name[64];
    assert_non_null(at);
    assert_int_equal(sscanf(at, "stopped after step %d", &stopped), 1);
    free(text);
    snprintf(name, sizeof(name), "checkpoint-%d", stopped);
    assert_latest("halted", name);
}

// The program does not destroy work: it sees a broken link, refuses a folder that holds another run, and --keep does not remove
// the checkpoint that was just written.
void test_run_safety(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    expect(run_tiny("safe", "--steps 4 --save-every 2"), 0, NULL);
    assert_int_equal(shell(said, sizeof(said), "ln -sfn checkpoint-9 %s", scratch_file("safe/latest")), 0);
    expect(run_tiny("safe", "--resume --steps 4"), 0, "safe/checkpoint-4 is taken");
    assert_int_equal(shell(said, sizeof(said), "ln -sfn checkpoint-2 %s", scratch_file("safe/latest")), 0);
    expect(run_tiny("safe", "--resume --steps 3 --keep 1"), 0, "going on after step 2");
    assert_latest("safe", "checkpoint-3"); // and not removed though checkpoint-4 is there
    assert_int_equal(shell(said, sizeof(said), "mkdir -p %s/checkpoint-1", scratch_file("theirs")), 0);
    expect(run_tiny("theirs", "--steps 2"), 2, "holds a run already");
}

// The table at the start predicts, to 5%, how much memory the process will use. With AdamW, since Muon never touches the second moments
// of its matrices, and the system does not give such memory until a run goes on from a checkpoint, where they are zeros.
void test_memory(void **state) {
    (void)state;
    need_program();
    if (getenv("TRAIN_MOE")) // with a sanitizer's own memory
        skip();
    static const char *const more[] = {"", "--recompute", "--recipe deepseek-v3 --experts 16 --topk 4", "--recipe dense --layers 6"};
    for (int i = 0; i < 4; i++) {
        char out[32], sizes[200], line[2200];
        struct rusage use;
        int status;
        snprintf(out, sizeof(out), "memory-%d", i);
        snprintf(sizes, sizeof(sizes), "--dim 256 --heads 4 --ffn 256 --seq 128 --batch 16 --steps 2 --optimizer adamw %s", more[i]);
        snprintf(line, sizeof(line), "exec %s >/dev/null", command_line(out, sizes));
        pid_t child = fork();
        if (child == 0) {
            execl("/bin/sh", "sh", "-c", line, (char *)NULL);
            _exit(127);
        }
        assert_true(wait4(child, &status, 0, &use) == child);
        assert_int_equal(status, 0);
        double sum = 0, peak = (double)use.ru_maxrss * MEMORY_UNIT;
        char file[300];
        size_t size;
        snprintf(file, sizeof(file), "%s/log.jsonl", out);
        char *text = read_file(scratch_file(file), &size), *at = text;
        Json *json = next_line(&at, text + size);
        for (const Json *part = json_get(json, "memory")->child; part; part = part->next)
            sum += strcmp(part->key, "mapped") ? part->number : 0; // of the token files only pages are held that were read
        json_free(json);
        free(text);
        if (!(fabs(sum - peak) <= 0.05 * peak))
            fail_msg("%s: the table says %.1f MiB; it were %.1f", more[i], sum / 1048576, peak / 1048576);
    }
}

// In all recipes, the same seed gives the same run with any number of threads, and another seed gives another run.
void test_same_run(void **state) {
    (void)state;
    need_program();
    static const char *const differ[] = {"--threads 1", "--threads 1", "--threads 2", "--seed 2"};
    for (int r = 0; r < recipe_count; r++) {
        char out[4][64], options[256];
        for (int i = 0; i < 4; i++) {
            snprintf(out[i], sizeof(out[i]), "same-%s-%d", recipes[r].name, i);
            snprintf(options, sizeof(options), "--recipe %s --steps 5 --batch 3 --seq 70 --ffn 50 %s", recipes[r].name,
                     differ[i]);
            expect(run_tiny(out[i], options), 0, NULL);
        }
        assert_same_weights(out[0], out[1]);
        assert_same_weights(out[0], out[2]);
        for (int step = 1; step <= 5; step++) {
            double loss = logged(out[0], "step", step, "loss");
            assert_true(loss == logged(out[2], "step", step, "loss") && loss != logged(out[3], "step", step, "loss"));
        }
    }
}

// The program in float and the one in double find the same losses.
void test_float_against_double(void **state) {
    (void)state;
    need_program();
    const char *other = getenv("TRAIN_MOE_DOUBLE");
    other = other ? other : "./train_moe_double";
    if (access(other, X_OK) != 0)
        skip();
    for (int r = 0; r < recipe_count; r++) {
        char options[200], out[2][64], line[2200];
        snprintf(options, sizeof(options), "--steps 20 --recipe %s --jitter 0", recipes[r].name);
        snprintf(out[0], sizeof(out[0]), "float-%s", recipes[r].name);
        snprintf(out[1], sizeof(out[1]), "double-%s", recipes[r].name);
        expect(run_tiny(out[0], options), 0, NULL);
        snprintf(line, sizeof(line), "%s", command_line(out[1], options));
        expect(shell(said, sizeof(said), "%s %s", other, strchr(line, ' ')), 0, NULL);
        for (int step = 1; step <= 20; step++) {
            double a = logged(out[0], "step", step, "loss"), b = logged(out[1], "step", step, "loss");
            if (!(fabs(a - b) <=
                  (step <= 10 ? 1e-4 : 1e-2) * b)) // sooner or later a near-tie in a router falls the other way
                fail_msg("%s, step %d: %.9g in float, %.9g in double", recipes[r].name, step, a, b);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What the log and the terminal say of the routing

// The config that run_tiny("--recipe ...") trains.
Config tiny_config(const char *recipe) {
    Config c;
    config_defaults(&c);
    config_recipe(&c, recipe);
    apply_options(&c, "--layers 2 --experts 4");
    apply_options(&c, small_sizes(recipe));
    return c;
}

// Checks the router lines of a run's log, and counts them.
int check_router_lines(const char *recipe, const char *out) {
    Config c = tiny_config(recipe);
    char file[300];
    size_t size;
    int lines = 0;
    snprintf(file, sizeof(file), "%s/log.jsonl", out);
    char *text = read_file(scratch_file(file), &size);
    for (char *line = text; line < text + size;) {
        Json *json = next_line(&line, text + size);
        if (!strcmp(json->child->text, "router")) {
            double sum = 0, top = 0, E = 0;
            for (const Json *e = json_get(json, "load")->child; e; e = e->next, E++) {
                sum += e->number;
                top = fmax(top, e->number);
            }
            assert_true(E == c.experts && is_moe(&c, (int)json_get(json, "layer")->number));
            assert_near(sum, 1, 1e-4);
            assert_near(json_get(json, "max_over_mean")->number, top * E, 1e-4);
            double entropy = json_get(json, "entropy")->number, active = json_get(json, "active")->number;
            assert_true(c.select == HASH ? entropy == 0 : entropy > 0 && entropy <= log(E) + 1e-5);
            double dropped = json_get(json, "dropped")->number, K = c.topk;
            assert_true(dropped >= 0 && dropped <= (c.capacity_factor > 0 ? 1 : 0));
            assert_true(active > 0 && active <= (c.select == THRESHOLD ? c.experts / 2 : K));
            assert_true(json_get(json, "dead")->number == 0);
            lines++;
        }
        json_free(json);
    }
    free(text);
    return lines;
}

// How many lines of the last output contain this text.
int said_lines(const char *text) {
    int count = 0;
    for (const char *at = said; (at = strstr(at, text)) != NULL; at += strlen(text))
        count++;
    return count;
}

void test_router_log(void **state) {
    (void)state;
    need_program();
    for (int r = 0; r < recipe_count; r++) {
        char out[64], options[128];
        Config c = tiny_config(recipes[r].name);
        int moe = moe_layers(&c);
        snprintf(out, sizeof(out), "log-%s", recipes[r].name);
        snprintf(options, sizeof(options), "--recipe %s --steps 6 --lr 0.02 --eval-every 2", recipes[r].name);
        expect(run_tiny(out, options), 0, NULL);
        assert_int_equal(check_router_lines(recipes[r].name, out), 6 * moe);
        for (int step = 2; step <= 6; step += 2) {
            double changed = logged(out, "eval", step, "fluctuation");
            assert_true(moe && step > 2 ? changed >= 0 && changed <= 1 : isnan(changed));
        }
        if (c.select == HASH)
            assert_true(logged(out, "eval", 6, "fluctuation") == 0); // the table never changes
    }
    assert_true(logged("log-mixtral", "eval", 4, "fluctuation") > 0); // at this learning rate
    expect(run_tiny("log-still", "--steps 3 --lr 0 --eval-every 1"), 0, NULL);
    for (int step = 2; step <= 3; step++)
        assert_true(logged("log-still", "eval", step, "fluctuation") == 0);
}

// With 64 experts, 64 tokens a step and no balance loss, most experts never get a token. After 100 steps the program says so, once
// for each layer.
void test_dead_experts(void **state) {
    (void)state;
    need_program();
    expect(run_tiny("dead", "--steps 130 --aux-weight 0 --experts 64 --topk 1 --gate probability --lr 0.02 "
                            "--eval-every 0 --sample-every 0 "
                            "--save-every 0"),
           0, "warning: step 100: expert ");
    for (int layer = 1; layer <= 2; layer++) {
        char text[64];
        snprintf(text, sizeof(text), "of layer %d has had no token for 100 steps", layer);
        assert_int_equal(said_lines(text), 1);
    }
    assert_int_equal(said_lines("has had no token"), 2);
    assert_true(logged("dead", "router", 99, "dead") == 0 && logged("dead", "router", 130, "dead") >= 1);
    // uneven, but not before 200 steps
    assert_int_equal(said_lines("times its share"), 0);
    expect(run_tiny("uneven", "--steps 210 --aux-weight 0 --experts 64 --topk 1 --gate probability --lr 0.02 "
                              "--eval-every 0 --sample-every 0 "
                              "--save-every 0 --log-every 0"),
           0, "mixtral is known to stay below 2.5");
    for (int layer = 1; layer <= 2; layer++) {
        char text[64];
        snprintf(text, sizeof(text), "of layer %d takes ", layer);
        assert_int_equal(said_lines(text), 1);
    }
    assert_true(said_lines("warning: step 200: ") >= 1 && said_lines("warning") == 4);
    expect(run_tiny("even", "--steps 210 --eval-every 0 --sample-every 0 --save-every 0 --log-every 0"), 0, NULL);
    assert_int_equal(said_lines("warning"), 0);
}

// Options of the router that contradict each other are refused, and the message says why.
void test_bad_routers(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    static const char *const cases[][2] = {
        {"--topk 5", "more experts than there are"},
        {"--select threshold --gate probability --max-active 5", "more experts than there are"},
        {"--routers 2 --topk 3", "divisible by --routers"},
        {"--topk 1", "would never learn"},
        {"--routers 2 --topk 2", "would never learn"},
        {"--routers 2 --topk 4 --noise 1", "plain top-k"},
        {"--routers 2 --topk 4 --score sigmoid", "plain top-k"},
        {"--routers 2 --topk 4 --bias-rate 0.1", "plain top-k"},
        {"--routers 2 --topk 4 --groups 2", "plain top-k"},
        {"--routers 2 --topk 4 --balance unbiased", "plain top-k"},
        {"--routers 2 --topk 4 --overflow next --capacity-factor 1", "plain top-k"},
        {"--routers 2 --topk 4 --second-threshold 0.5", "plain top-k"},
        {"--routers 2 --topk 4 --select threshold --gate probability", "plain top-k"},
        {"--groups 5", "to choose from"},
        {"--groups 2 --group-topk 3", "to choose from"},
        {"--groups 4 --group-topk 1", "to choose from"},
        {"--groups 2 --group-topk 1 --select threshold --gate probability", "goes with --select topk or hierarchical"},
        {"--recipe hierarchical --group-topk 0", "--select hierarchical "},
        {"--recipe hierarchical --groups 5", "--select hierarchical "},
        {"--recipe hierarchical --topk 5", "--select hierarchical "},
        {"--recipe hierarchical --gate probability", "--select hierarchical "},
        {"--recipe hierarchical --score sigmoid", "--select hierarchical "},
        {"--recipe hierarchical --jitter 0.1", "--select hierarchical "},
        {"--recipe hierarchical --bias-rate 0.1", "go with --select topk"},
        {"--recipe hierarchical --history-decay 0.9", "--noise needs"},
        {"--recipe hierarchical --z-weight 0.1", "--select hierarchical "},
        {"--recipe hierarchical --device-weight 0.1", "--select hierarchical "},
        {"--recipe hierarchical --comm-weight 0.1", "--select hierarchical "},
        {"--recipe hierarchical --balance switch", "--select hierarchical "},
        {"--noise 1 --score sigmoid", "--noise needs"},
        {"--noise 1 --select threshold --gate probability", "--noise needs"},
        {"--noise 1 --history-decay 0.9", "--noise needs"},
        {"--noise 1 --topk 4", "fewer chosen"},
        {"--recipe hierarchical --experts 8 --topk 4", "fewer chosen"},
        {"--recipe hierarchical --topk 8 --group-topk 4", "fewer chosen"},
        {"--recipe hierarchical --topk 2", "would never learn"},
        {"--recipe hierarchical --topk 2 --group-topk 1", "would never learn"},
        {"--load-weight 0.1", "--load-weight needs"},
        {"--load-weight 0.1 --noise 1 --groups 2 --group-topk 1 --topk 1 --gate probability",
         "does not know --group-topk"},
        {"--device-weight 0.1", "need --groups"},
        {"--comm-weight 0.1", "need --groups"},
        {"--capacity-unit group", "need --groups"},
        {"--groups 2 --comm-weight 0.1", "--comm-weight needs --group-topk"},
        {"--z-weight 0.1 --score sigmoid", "--z-weight is of softmax"},
        {"--bias-rate 0.1 --select threshold --gate probability", "go with --select topk"},
        {"--history-decay 0.9 --select threshold --gate probability", "go with --select topk"},
        {"--bias-rate 0.1 --history-decay 0.9", "give one of them"},
        {"--bias-rate 0.1 --quantile-sweeps 1", "and not with --bias-rate"},
        {"--balance unbiased --select threshold --gate probability", "--balance unbiased goes with"},
        {"--second-threshold 0.5 --topk 3", "--second-threshold needs"},
        {"--second-threshold 0.5 --gate probability", "--second-threshold needs"},
        {"--overflow next", "--overflow next needs"},
        {"--overflow next --capacity-factor 1 --select threshold --gate probability", "--overflow next needs"},
        {"--overflow next --capacity-factor 1 --groups 2 --capacity-unit group", "--overflow next needs"},
        {"--overflow next --capacity-factor 1 --drop-order score", "--overflow next needs"},
        {"--overflow next --capacity-factor 1 --balance cv2", "--overflow next changes weights"},
        {"--overflow next --capacity-factor 1 --balance variance", "--overflow next changes weights"},
        {"--overflow next --capacity-factor 1 --noise 1", "--overflow next changes weights"},
        {"--group step --routers 2 --topk 4", "--group step goes with"},
        {"--group step --balance gshard", "--group step goes with"},
        {"--group step --balance unbiased", "--group step goes with"},
        {"--recipe expert-choice --capacity-factor 1", "full by construction"},
        {"--recipe expert-choice --eval-capacity-factor 1", "full by construction"},
        {"--recipe expert-choice --aux-weight 0.1", "full by construction"},
        {"--recipe expert-choice --gate renormalized", "full by construction"},
        {"--recipe expert-choice --score sigmoid", "full by construction"},
        {"--recipe base --topk 2", "--select balanced gives"},
        {"--recipe base --capacity-factor 1", "--select balanced gives"},
        {"--recipe base --aux-weight 0.1", "--select balanced gives"},
        {"--recipe base --gate renormalized", "would never learn"},
        {"--recipe hash --topk 2", "--select hash has no router"},
        {"--recipe hash --aux-weight 0.1", "--select hash has no router"},
        {"--recipe hash --z-weight 0.1", "--select hash has no router"},
        {"--recipe hash --jitter 0.1", "--select hash has no router"},
        {"--recipe hash --gate renormalized", "would never learn"},
        {"--recipe hash --sparsity-weight 0.1", "--select hash has no router"},
        {"--recipe hash --groups 2 --device-weight 0.1", "--select hash has no router"},
        {"--recipe hash --recurrent 8", "--select hash has no router"},
        {"--recipe hash --subtokens 2", "--select hash has no router"},
        {"--subtokens 3", "--subtokens must divide"},
        {"--subtokens 2 --recurrent 8", "--subtokens must divide"},
        {"--mixed 1 --ffn 33", "--mixed needs"},
        {"--mixed 1 --experts 6", "--mixed needs"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        int status = run_tiny("refused", cases[i][0]);
        if (status != 2 || !strstr(said, cases[i][1]))
            fail_msg("%s: exit status %d, expected 2 and \"%s\"; it said:\n%s", cases[i][0], status, cases[i][1], said);
        if (exists("refused"))
            fail_msg("%s: it wrote something", cases[i][0]);
    }
}

// The list of recipes names each with its year and its options, and a checkpoint's config.json has every option of its run.
void test_recipe_files(void **state) {
    (void)state;
    need_program();
    expect(run_tiny("nothing", "--list-recipes"), 0, NULL);
    for (int r = 0; r < recipe_count; r++) {
        char text[1024];
        snprintf(text, sizeof(text), recipes[r].year ? "\n%s (%d): %s\n    %s\n" : "\n%s (no paper)%.0d: %s\n    %s\n",
                 recipes[r].name, recipes[r].year, recipes[r].summary, recipes[r].choices);
        if (!strstr(said, text))
            fail_msg("--list-recipes does not say:%s", text);
    }
    for (int r = 0; r < recipe_count; r++) {
        const char *name = recipes[r].name, *class_name = "TrainMoeForCausalLM";
        char file[96], line[64];
        size_t size;
        snprintf(file, sizeof(file), "files-%s", name);
        snprintf(line, sizeof(line), "--recipe %s --steps 1", name);
        expect(run_tiny(file, line), 0, NULL);
        snprintf(file, sizeof(file), "files-%s/latest/config.json", name);
        char *text = read_file(scratch_file(file), &size);
        Json *json = json_parse(text, size, file);
        const Json *own = json_get(json, "train_moe");
        for (int i = 0; i < option_count; i++) {
            if ((options[i].when == MODEL || options[i].when == TRAIN || options[i].when == ORDER) &&
                options[i].kind != '-' && !json_get(own, options[i].name))
                fail_msg("%s does not name --%s", file, options[i].name);
        }
        assert_string_equal(json_get(own, "recipe")->text, name);
        if (!strcmp(name, "mixtral") || !strcmp(name, "variance") || !strcmp(name, "qwen3")) // they compute the same
            class_name = "MixtralForCausalLM";
        if (!strcmp(name, "dense"))
            class_name = "LlamaForCausalLM";
        assert_string_equal(json_get(json, "architectures")->child->text, class_name);
        json_free(json);
        free(text);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Bad input

typedef struct BadCase {
    const char *change; // what a shell does in the folder first; NULL: nothing
    const char *options;
    int status;
    const char *message;
} BadCase;

// Bad options are refused before anything is written.
void test_bad_options(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    static const BadCase cases[] = {
        {NULL, "--bogus 1", 2, "--bogus"},
        {NULL, "-x", 2, "-x"},
        {NULL, "stray", 2, "stray"},
        {NULL, "--top 3", 2, "no option --top"},
        {NULL, "--dense-first 9", 2, "leaves none"},
        {NULL, "--dim", 2, "--dim needs a value"},
        {NULL, "--untied=1", 2, "--untied"},
        {NULL, "--dim x", 2, "--dim: 'x' is not a whole number"},
        {NULL, "--dim 1.5", 2, "a whole number"},
        {NULL, "--dim ''", 2, "a whole number"},
        {NULL, "--dim 32x", 2, "a whole number"},
        {NULL, "--dim -2", 2, "from 2 to"},
        {NULL, "--dim 99999999999999999999", 2, "from 2 to"},
        {NULL, "--batch 0", 2, "from 1 to"},
        {NULL, "--seq 0", 2, "from 1 to"},
        {NULL, "--steps 0", 2, "from 1 to"},
        {NULL, "--keep 0", 2, "--keep"},
        {NULL, "--threads 99999", 2, "--threads"},
        {NULL, "--seed -1", 2, "--seed"},
        {NULL, "--lr nan", 2, "--lr: 'nan' is not a number"},
        {NULL, "--lr -1", 2, "--lr"},
        {NULL, "--lr inf", 2, "--lr"},
        {NULL, "--lr 1e-3x", 2, "--lr"},
        {NULL, "--min-lr 1", 2, "--min-lr 1 is more than --lr"},
        {NULL, "--jitter 1", 2, "--jitter"},
        {NULL, "--beta2 1", 2, "--beta2"},
        {NULL, "--precision fp16", 2, "--precision: 'fp16' is not one of: fp32, bf16"},
        {NULL, "--moments fp16", 2, "--moments: 'fp16' is not one of: fp32, bf16"},
        {NULL, "--top-p 1.1", 2, "--top-p"},
        {NULL, "--dim 33", 2, "not divisible by --heads 2"},
        {NULL, "--dim 30", 2, "even width"},
        {NULL, "--kv-heads 3", 2, "not divisible by --kv-heads 3"},
        {NULL, "--heads 64", 2, "not divisible by --heads 64"},
        {NULL, "--topk 5", 2, "a token cannot have more experts"},
        {NULL, "--topk 1", 2, "--gate probability"},
        {NULL, "--activation tanh", 2, "one of: swiglu, geglu, relu, gelu"},
        {NULL, "--schedule linear", 2, "one of: cosine, wsd, constant"},
        {NULL, "--recipe nosuch", 2, "--list-recipes"},
        {NULL, "--batch 1048576 --seq 2999", 2, "--batch"},
        {NULL, "--data /nowhere", 1, "/nowhere: cannot open the data folder: No such file"},
        {NULL, "--tokenizer /nowhere/tokenizer.json", 1, "/nowhere/tokenizer.json"},
        {NULL, "--init /nowhere", 1, "/nowhere: there is no such folder"},
        {NULL, "--seq 4000", 1, "too short: the longest train file has 3000 tokens, but a window takes 4001"},
        {NULL, "--prompt hello", 1, "no checkpoint"},
    };
    for (int i = 0; i < (int)(sizeof(cases) / sizeof(cases[0])); i++) {
        expect(run_tiny("nothing", cases[i].options), cases[i].status, cases[i].message);
        if (exists("nothing"))
            fail_msg("%s: it wrote something", cases[i].options);
    }
    expect(run_tiny("nothing", "-h"), 0, "--capacity-factor");
    for (int i = 0; i < option_count; i++)
        assert_non_null(strstr(said, options[i].name));
    expect(run_tiny("nothing", "--list-recipes"), 0, NULL);
    for (int r = 0; r < recipe_count; r++)
        assert_non_null(strstr(said, recipes[r].summary));
    assert_true(!exists("nothing"));
}

// --out is a path below a file, or a folder that must not be written, or the disk is full.
void test_bad_places(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    expect(run_tiny("data/tokenizer.json", ""), 1, "data/tokenizer.json");
    expect(run_tiny("data/tokenizer.json/run", ""), 1, "data/tokenizer.json");
    if (geteuid() != 0) {
        mkdir(scratch_file("locked"), 0555);
        expect(run_tiny("locked/run", ""), 1, "locked/run");
    }
    const char *const limit = "trap '' XFSZ; ulimit -f 16;"; // 8 or 16 KiB
    expect(shell(said, sizeof(said), "%s %s", limit, command_line("full", "--steps 2")), 1,
           "full/unfinished-checkpoint/");
    expect(1, 1, "cannot write");
    assert_true(!exists("full/unfinished-checkpoint") && !exists("full/latest") && !exists("full/checkpoint-2"));
    expect(run_tiny("fuller", "--steps 2"), 0, NULL);
    expect(shell(said, sizeof(said), "%s %s", limit, command_line("fuller", "--resume --steps 4")), 1, "cannot write");
    assert_true(!exists("fuller/unfinished-checkpoint"));
    assert_latest("fuller", "checkpoint-2");
    expect(run_tiny("fuller", "--resume --steps 4"), 0, "What next"); // nothing was lost
    assert_log("fuller", 4, 2);
}

// Copies the folder scratch_file(from), runs a shell command in the copy that damages it, and runs the program on it.
void check_bad_case(const char *from, const BadCase *c) {
    expect(shell(said, sizeof(said), "rm -rf %s && cp -a %s %s && cd %s && %s", scratch_file("case"), scratch_file(from),
                 scratch_file("case"), scratch_file("case"), c->change),
           0, NULL);
    int status = run_tiny("case", c->options);
    if (status != c->status || !memmem(said, said_size, c->message, strlen(c->message)))
        fail_msg("%s; %s: exit status %d, expected %d and \"%s\"; it said:\n%s", c->change, c->options, status,
                 c->status, c->message, said);
}

void test_bad_checkpoints(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    expect(run_tiny("good", "--steps 2"), 0, NULL);
    const char *const r = "--resume --steps 3", *const p = "--prompt hello", *const trust = "--prompt hello --trust-weights";
    const BadCase cases[] = {
        {"truncate -s 0 latest/model.safetensors", r, 1, "checkpoint-2/model.safetensors"},
        {"truncate -s 5 latest/model.safetensors", r, 1, "checkpoint-2/model.safetensors"},
        {"truncate -s 300 latest/model.safetensors", r, 1, "checkpoint-2/model.safetensors"},
        {"truncate -s -4 latest/model.safetensors", r, 1, "checkpoint-2/model.safetensors"},
        {"truncate -s -4 latest/model.safetensors", p, 1, "checkpoint-2/model.safetensors"},
        {"rm latest/model.safetensors", r, 1, "checkpoint-2/model.safetensors"},
        {"cp latest/tokenizer.json latest/model.safetensors", r, 1, "checkpoint-2/model.safetensors"},
        {"cp latest/optimizer.safetensors latest/model.safetensors", r, 1, "model.embed_tokens.weight"},
        {"LC_ALL=C sed -i 's/__metadata__\":{/__metadata__\":[/' latest/model.safetensors", r, 1, "bad JSON"},
        {"LC_ALL=C sed -i 's/model.norm.weight/model.nurm.weight/' latest/model.safetensors", r, 1,
         "model.norm.weight"},
        {"LC_ALL=C sed -i 's/experts.3.w2/experts.9.w2/' latest/model.safetensors", r, 1, "experts.3.w2"},
        {"LC_ALL=C sed -i 's/\"shape\":\\[265,32\\]/\"shape\":[256,32]/' latest/model.safetensors", r, 1, "265 x 32"},
        {"LC_ALL=C sed -i 's/\"shape\":\\[32\\]/\"shape\":[23]/' latest/model.safetensors", r, 1, "23"},
        {"LC_ALL=C sed -i 's/\"F32\"/\"I32\"/' latest/model.safetensors", r, 1, "I32"},
        {"LC_ALL=C sed -i 's/data_offsets\":\\[0,/data_offsets\":[8,/' latest/model.safetensors", r, 1, "damaged"},
        {"LC_ALL=C sed -i 's/data_offsets\":\\[0,/data_offsets\":{1,/' latest/model.safetensors", r, 1, "bad JSON"},
        {"truncate -s 0 latest/optimizer.safetensors", r, 1, "checkpoint-2/optimizer.safetensors"},
        {"truncate -s -4 latest/optimizer.safetensors", r, 1, "checkpoint-2/optimizer.safetensors"},
        {"rm latest/optimizer.safetensors", r, 1, "checkpoint-2/optimizer.safetensors"},
        {"cp latest/model.safetensors latest/optimizer.safetensors", r, 1, "exp_avg."},
        {": > latest/config.json", r, 1, "checkpoint-2/config.json"},
        {"truncate -s 200 latest/config.json", r, 1, "checkpoint-2/config.json"},
        {"echo '[1]' > latest/config.json", r, 1, "vocab_size"},
        {"echo '{\"vocab_size\":265,\"model_type\":\"gpt2\"}' > latest/config.json", p, 1, "gpt2"},
        {"echo '{\"vocab_size\":2.5}' > latest/config.json", p, 1, "vocab_size"},
        {"echo '{\"vocab_size\":-1,\"model_type\":\"llama\"}' > latest/config.json", p, 1, "vocab_size"},
        {"sed -i 's/\"hidden_size\": 32/\"hidden_size\": 64/;s/\"head_dim\": 16/\"head_dim\": 32/' latest/config.json",
         trust, 1, "model.embed_tokens.weight"},
        {"sed -i 's/\"dim\":32/\"dim\":\"many\"/' latest/config.json", p, 1, "dim is 'many'"},
        {"sed -i 's/\"num_hidden_layers\": 2/\"num_hidden_layers\": 3/' latest/config.json", trust, 1, "model.layers.2."},
        {": > latest/trainer_state.json", r, 1, "checkpoint-2/trainer_state.json"},
        {"truncate -s 60 latest/trainer_state.json", r, 1, "checkpoint-2/trainer_state.json"},
        {"rm latest/trainer_state.json", r, 1, "checkpoint-2/trainer_state.json"},
        {"echo '{}' > latest/trainer_state.json", r, 1, "checkpoint-2/trainer_state.json"},
        {"sed -i 's/\"step\":2/\"step\":\"2\"/' latest/trainer_state.json", r, 1, "a whole number \"step\""},
        {"sed -i 's/\"step\":2/\"step\":-2/' latest/trainer_state.json", r, 1, "step"},
        {"sed -i 's/\"lr\":[^,]*/\"lr\":-5/' latest/config.json", r, 1, "lr is '-5'"},
        {": > latest/tokenizer.json", p, 1, "checkpoint-2/tokenizer.json"},
        {"truncate -s 1000 latest/tokenizer.json", p, 1, "checkpoint-2/tokenizer.json"},
        {"cp latest/config.json latest/tokenizer.json", p, 1, "checkpoint-2/tokenizer.json"},
        {"rm latest/tokenizer.json", p, 1, "checkpoint-2/tokenizer.json"},
        {"sed -i 's/\"he\"/\"eh\"/;s/\"h e\"/\"e h\"/;s/\"he ll\"/\"eh ll\"/;s/hell/ehll/g' latest/tokenizer.json",
         "--resume --steps 3 --trust-weights", 1, "token 257"},
        {"rm -r latest checkpoint-*", p, 1, "no checkpoint"},
    };
    for (int i = 0; i < (int)(sizeof(cases) / sizeof(cases[0])); i++)
        check_bad_case("good", &cases[i]);
    const BadCase fine = {":", r, 0, "What next"};
    check_bad_case("good", &fine);
}

// Damages each file of a data folder in several ways, before a run begins and before it is resumed.
void test_bad_data(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    static const BadCase cases[] = {
        {"rm train*", "", 1, "the word train in its name"},
        {"rm val*", "", 1, "the word val in its name"},
        {"rm tokenizer.json", "", 1, "--tokenizer"},
        {"mkdir replaced-tokens && mv tokenizer.json replaced-tokens", "", 1, "data/tokenize was ended while it replaced"},
        {"mkdir replaced-tokens && mv tokenizer.json replaced-tokens", "--tokenizer nowhere", 1, "was ended while it"},
        {": > train_1.bin", "", 1, "train_1.bin"},
        {"truncate -s 1000 train_1.bin", "", 1, "train_1.bin"},
        {"truncate -s -2 val_0.bin", "", 1, "val_0.bin"},
        {"cp tokenizer.json train_0.bin", "", 1, "train_0.bin"},
        {"truncate -s 1024 train_0.bin && truncate -s 1024 train_1.bin", "", 1, "train_0.bin"},
        {"mv train_1.bin pretrain_val_1.bin && mv train_0.bin my_train_val.bin", "", 1, "my_train_val.bin: the name has"},
        {": > tokenizer.json", "", 1, "tokenizer.json"},
        {"truncate -s 3000 tokenizer.json", "", 1, "tokenizer.json"},
        {"echo '{}' > tokenizer.json", "", 1, "tokenizer.json"},
        {"printf '\\377\\377' | dd of=train_0.bin bs=1 seek=2000 conv=notrunc 2>/dev/null && rm train_1.bin",
         "--steps 60 --save-every 0", 1, "train_0.bin: token 488 is 65535"},
    };
    for (int i = 0; i < (int)(sizeof(cases) / sizeof(cases[0])); i++) {
        char options[300];
        snprintf(options, sizeof(options), "--data %s --out %s %s", scratch_file("case"), scratch_file("nothing"),
                 cases[i].options);
        BadCase c = cases[i];
        c.options = options;
        check_bad_case("data", &c);
        assert_true(!exists("nothing/latest") && !exists("nothing/unfinished-checkpoint"));
        remove_tree(scratch_file("nothing"));
    }
    // the data of a run may not change
    expect(shell(said, sizeof(said), "rm -rf %s && cp -a %s %s", scratch_file("case"), scratch_file("data"), scratch_file("case")), 0,
           NULL);
    char options[300];
    snprintf(options, sizeof(options), "--data %s --steps 2", scratch_file("case"));
    expect(run_tiny("moved", options), 0, NULL);
    expect(shell(said, sizeof(said), "rm %s/train_1.bin", scratch_file("case")), 0, NULL);
    snprintf(options, sizeof(options), "--data %s --steps 4 --resume", scratch_file("case"));
    expect(run_tiny("moved", options), 1, "they may not change");
    assert_latest("moved", "checkpoint-2");
}

// A token file that is cut while it is in use ends the run with its name, and the last checkpoint stays whole. A cut of
// whole pages is a signal's, a small one is found before the next checkpoint.
void check_cut_data(int bytes) {
    char options[400], path[256];
    int status;
    size_t size;
    snprintf(path, sizeof(path), "%s", scratch_file("cut-data"));
    expect(shell(said, sizeof(said), "rm -rf %s && cp -a %s %s", path, scratch_file("data"), path), 0, NULL);
    snprintf(options, sizeof(options), "--data %s --steps 5000 --save-every 3 --eval-every 0", path);
    pid_t child = start_tiny("cut-run", options);
    assert_int_equal(wait_for(child, scratch_file("cut-run/latest/config.json"), "{"), -1);
    expect(shell(said, sizeof(said), "truncate -s %d %s/train_0.bin", bytes, path), 0, NULL);
    assert_int_equal(waitpid(child, &status, 0), child);
    char *text = read_file(scratch_file("said"), &size);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 1 || !strstr(text, "cut-data/train_0.bin: the file changed while"))
        fail_msg("status %d: %s", status, text);
    free(text);
    expect(shell(said, sizeof(said), "cp %s/train_0.bin %s", scratch_file("data"), path), 0, NULL);
    char link[64] = "";
    assert_true(readlink(scratch_file("cut-run/latest"), link, sizeof(link) - 1) > 0);
    snprintf(options, sizeof(options), "--data %s --resume --eval-every 0 --steps %d", path, atoi(strchr(link, '-') + 1) + 2);
    expect(run_tiny("cut-run", options), 0, "What next");
    remove_tree(scratch_file("cut-run"));
}

void test_cut_data(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    check_cut_data(0);
    check_cut_data(7000); // of 7024
}

// If the weights explode, the program stops and names the step, and the last checkpoint stays intact.
void test_nan(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    const char *const wild = "--lr 100 --weight-decay 100 --clip 0 --warmup 0 --schedule constant";
    char options[256];
    expect(run_tiny("nan", "--steps 2"), 0, NULL);
    snprintf(options, sizeof(options), "--resume --steps 1000 --save-every 0 %s", wild);
    expect(run_tiny("nan", options), 1, "training stops here");
    expect(1, 1, "train_moe: step ");
    assert_latest("nan", "checkpoint-2");
    assert_true(!exists("nan/unfinished-checkpoint"));
    expect(run_tiny("nan", "--resume --steps 4 --lr 1e-3 --min-lr 0 --weight-decay 0.1 --save-every 2"), 0,
           "What next");
    assert_log("nan", 4, 2);
}

// ---------------------------------------------------------------------------------------------------------------------
// --prompt

void test_prompt(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    char first[4096], line[2200];
    size_t size = 0;
    expect(run_tiny("told", "--steps 3"), 0, NULL);
    static const char *const pairs[][3] = {
        // two ways to ask, and "same" where they should get the same answer
        {"--temperature 1 --seed 1", "--temperature 1 --seed 1", "same"},
        {"--temperature 1 --seed 1", "--temperature 1 --seed 2", "other"},
        {"--temperature 0 --seed 1", "--temperature 0 --seed 2", "same"},
        {"--top-k 1 --seed 1", "--temperature 0", "same"},
        {"--temperature 1 --threads 2", "--temperature 1", "same"},
        {"--temperature 1 --tokens 30", "--temperature 1 --tokens 100", "other"},
    };
    for (int i = 0; i < 6; i++) {
        for (int j = 0; j < 2; j++) {
            char options[256];
            snprintf(options, sizeof(options), "--prompt hello --tokens 60 %s", pairs[i][j]);
            expect(run_tiny("told", options), 0, "hello");
            assert_true(said_size < sizeof(first));
            if (j == 0) {
                size = said_size;
                memcpy(first, said, size);
            } else {
                assert_int_equal(size == said_size && !memcmp(first, said, size), !strcmp(pairs[i][2], "same"));
            }
        }
    }
    expect(run_tiny("told", "--prompt hello --tokens 20"), 0, "hello");
    size = said_size;
    memcpy(first, said, size);
    snprintf(line, sizeof(line), "%s", command_line("told", "--prompt - --tokens 20"));
    expect(shell(said, sizeof(said), "echo hello | %s", line), 0, "hello");
    assert_true(size == said_size && !memcmp(first, said, size));
    expect(shell(said, sizeof(said), "printf '' | %s", line), 0, NULL); // begins a text
    expect(shell(said, sizeof(said), "printf 'a\\377b\\303' | %s", line), 0,
           "a\xff"
           "b\xc3"); // no UTF-8: as it was
    expect(run_tiny("told", "--prompt ''"), 0, NULL);
    expect(run_tiny("told", "--prompt hello --tokens 100 --temperature 1000"), 0, "hello"); // longer than seq
    expect(run_tiny("told", "--prompt hello --dim 64"), 2, "--dim 64");
    expect(run_tiny("told/latest", "--prompt hello"), 0, "hello"); // a checkpoint's own folder will do
    assert_latest("told", "checkpoint-3");
    // trained by so many ranks that one process would not have room for their sequences
    shell(said, sizeof(said), "sed -i 's/\"batch\":2,/\"batch\":1048576,/' %s/latest/config.json; cat %s/latest/config.json",
          scratch_file("told"), scratch_file("told"));
    expect(0, 0, "1048576");
    expect(run_tiny("told", "--prompt hello"), 0, "hello");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_resume),
        cmocka_unit_test(test_moments_of_runs),
        cmocka_unit_test(test_precision_of_runs),
        cmocka_unit_test(test_resume_options),
        cmocka_unit_test(test_resume_optimizer),
        cmocka_unit_test(test_resume_pieces),
        cmocka_unit_test(test_run_directory),
        cmocka_unit_test(test_leftovers),
        cmocka_unit_test(test_init),
        cmocka_unit_test(test_mixer_checkpoints),
        cmocka_unit_test(test_interrupt),
        cmocka_unit_test(test_interrupt_evaluation),
        cmocka_unit_test(test_run_safety),
        cmocka_unit_test(test_same_run),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_float_against_double),
        cmocka_unit_test(test_router_log),
        cmocka_unit_test(test_dead_experts),
        cmocka_unit_test(test_bad_routers),
        cmocka_unit_test(test_recipe_files),
        cmocka_unit_test(test_bad_options),
        cmocka_unit_test(test_bad_places),
        cmocka_unit_test(test_bad_checkpoints),
        cmocka_unit_test(test_bad_data),
        cmocka_unit_test(test_cut_data),
        cmocka_unit_test(test_nan),
        cmocka_unit_test(test_prompt),
    };
    begin_tests();
    return cmocka_run_group_tests_name("program", tests, NULL, scratch_done);
}
