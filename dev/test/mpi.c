// The program on several processes: `make test_mpi` builds it and sets TRAIN_MOE_MPI, and MPIRUN to the command that starts
// several processes. Without TRAIN_MOE_MPI the tests are skipped. `make test_nccl` runs those called test_mpi_both_... with the
// CUDA twin in the emulator, and sets TRAIN_MOE_OTHER to the C program.

#include "dev/test/trainer.h"
#include "dev/test/runs.h"
#include "dev/test/broken.h"

// The CUDA twin's steps take long in the emulator, so its models and data are smaller. Its heads have a width that is a multiple of 8.
int is_twin(void) {
    return getenv("TRAIN_MOE_OTHER") != NULL;
}

// `mpirun -np ranks train_moe_mpi options` in a small size.
const char *ranks_line(int ranks, const char *options) {
    static char line[2048];
    char small[400] = "";
    if (is_twin()) {
        make_data();
        snprintf(small, sizeof(small), "--heads 2 --layers 1 --experts 4 --seq 16 --batch 1 --optimizer adamw --eval-tokens 16 "
                 "--tokens 1 --data %s ", scratch_file("data"));
    }
    snprintf(line, sizeof(line),
             "timeout 120 $MPIRUN -np %d sh -c '$TRAIN_MOE_MPI --seq 32 --dim 32 --ffn 32 --layers 2 --steps 6 --log-every 1 "
             "--eval-tokens 64 --tokens 5 --threads 1 %s%s'",
             ranks, small, options);
    return line;
}

int run_ranks(char *output, size_t size, int ranks, const char *options) {
    return shell(output, size, "%s", ranks_line(ranks, options));
}

int has_mpi(void) {
    if (!getenv("TRAIN_MOE_MPI"))
        skip();
    setenv("MPIRUN", "mpirun", 0);
    return 1;
}

int times_in(const char *text, const char *part) {
    int count = 0;
    for (; (text = strstr(text, part)) != NULL; text++)
        count++;
    return count;
}

// Messages are printed once, not once for each rank. A checkpoint of 4 ranks goes on with 1 and with 2, with the same loss.
void test_mpi_program(void **state) {
    (void)state;
    char output[16384], options[512], copy[512];
    if (!has_mpi())
        return;
    snprintf(options, sizeof(options), "--batch 1 --group sequence --trace --save-every 3 --lr 0.02 --warmup 1 --out %s", scratch_file("four"));
    assert_int_equal(run_ranks(output, sizeof(output), 4, options), 0);
    assert_int_equal(times_in(output, "step 6/6"), 1);
    assert_int_equal(times_in(output, "What next"), 1);
    assert_non_null(strstr(output, "4 ranks, 1 sequences of a micro-step each; 2 of 8 experts on a rank"));
    shell(output, sizeof(output), "cat %s/log.jsonl; wc -l %s/trace-3.jsonl", scratch_file("four"), scratch_file("four"));
    assert_non_null(strstr(output, "\"ranks\":4,\"ep\":4"));
    assert_non_null(strstr(output, "\"all_to_all_bytes\""));
    assert_non_null(strstr(output, "6 /"));
    char *line = strstr(output, "\"step\":6,\"tokens\":768,\"loss\":");
    assert_non_null(line);
    double loss = atof(line + strlen("\"step\":6,\"tokens\":768,\"loss\":"));
    for (int ranks = 1; ranks <= 2; ranks++) { // 2 ranks in two micro-steps
        snprintf(copy, sizeof(copy), "cp -a %s %s && ln -sfn checkpoint-3 %s/latest", scratch_file("four"), scratch_file(ranks == 1 ? "one" : "two"),
                 scratch_file(ranks == 1 ? "one" : "two"));
        assert_int_equal(shell(output, sizeof(output), "%s", copy), 0);
        snprintf(options, sizeof(options), "--resume --replicate %d %s --out %s", ranks - 1, ranks == 1 ? "" : "--batch 1",
                 scratch_file(ranks == 1 ? "one" : "two"));
        assert_int_equal(run_ranks(output, sizeof(output), ranks, options), 0);
        shell(output, sizeof(output), "cat %s/log.jsonl", scratch_file(ranks == 1 ? "one" : "two"));
        line = strstr(output, "\"step\":6,\"tokens\":768,\"loss\":");
        assert_non_null(line);
        assert_near(atof(line + strlen("\"step\":6,\"tokens\":768,\"loss\":")), loss, 1e-5);
    }
    snprintf(options, sizeof(options), "--resume --steps 9 --out %s", scratch_file("four"));
    assert_int_equal(run_ranks(output, sizeof(output), 3, options), 2);
    assert_non_null(strstr(output, "has 4 sequences, which 3 ranks cannot share evenly"));
    assert_int_equal(shell(output, sizeof(output), "$TRAIN_MOE_MPI --prompt One --tokens 5 --out %s", scratch_file("four")), 0);
    // two machines whose folders are not the same: the run is finished for one rank, and the other has none
    snprintf(copy, sizeof(copy), "mkdir -p %s/0 %s/1 && ln -s ../../four %s/0/run", scratch_file("apart"), scratch_file("apart"), scratch_file("apart"));
    assert_int_equal(shell(output, sizeof(output), "%s", copy), 0);
    for (int first = 0; first < 2; first++) {
        int status = shell(output, sizeof(output),
                           "exec 2>&1; timeout 60 $MPIRUN -np 2 sh -c 'p=$(realpath $TRAIN_MOE_MPI); d=$PWD/data/stories; cd "
                           "%s/$(((%d + $OMPI_COMM_WORLD_RANK) %% 2)) && $p --data $d --resume --out run --steps 6'",
                           scratch_file("apart"), first);
        assert_true(status != 0 && status != 124);
        if (!strstr(output, "rank 1: this rank has other options, other data or another checkpoint"))
            fail_msg("%s", output);
    }
}

// The log does not depend on the number of ranks: validation loss, bits per byte, the routers' lines.
void test_mpi_log(void **state) {
    (void)state;
    static const char *const names[] = {"val_loss", "val_bpb", "entropy", "dropped", "max_over_mean", "active", "fluctuation"};
    enum { COUNT = sizeof(names) / sizeof(names[0]) };
    char output[65536], options[512], name[16], key[64];
    double wanted[COUNT] = {0};
    if (!has_mpi())
        return;
    for (int ranks = 1; ranks <= 6; ranks += ranks < 3 ? 1 : 3) { // 1, 2, 3, 6
        snprintf(name, sizeof(name), "log%d", ranks);
        snprintf(options, sizeof(options),
                 "--batch %d --accum 2 --experts 6 --capacity-factor 0.6 --eval-capacity-factor 0.8 --jitter 0.9 --eval-every 3 "
                 "--eval-tokens 6400 --save-every 0 --out %s",
                 6 / ranks, scratch_file(name));
        assert_int_equal(run_ranks(output, sizeof(output), ranks, options), 0);
        shell(output, sizeof(output), "cat %s/log.jsonl", scratch_file(name));
        for (int i = 0; i < COUNT; i++) {
            char *last = NULL;
            snprintf(key, sizeof(key), "\"%s\":", names[i]);
            for (char *at = output; (at = strstr(at, key)) != NULL; at++)
                last = at + strlen(key);
            assert_non_null(last);
            wanted[i] = ranks == 1 ? atof(last) : wanted[i];
            if (!(fabs(atof(last) - wanted[i]) <= 2e-3 * fmax(1, fabs(wanted[i]))))
                fail_msg("%d ranks: %s is %g, not %g", ranks, names[i], atof(last), wanted[i]);
        }
    }
}

// Each rank has a whole teacher: with one, two and three ranks the teacher's part of the loss is the same, and so is the model.
void test_mpi_both_teacher(void **state) {
    (void)state;
    static const char *const names[] = {"loss", "teacher", "grad_norm", "val_loss"};
    char output[65536], options[512], name[16], key[64];
    double wanted[4] = {0};
    int steps = is_twin() ? 2 : 6, most = is_twin() ? 2 : 3, batch = is_twin() ? 2 : 6;
    if (!has_mpi())
        return;
    snprintf(options, sizeof(options), "--batch %d --warmup 1 --lr 0.02 --dim 48 --heads 2 --steps %d --out %s", batch, steps,
             scratch_file("teacher"));
    assert_int_equal(run_ranks(output, sizeof(output), 1, options), 0);
    for (int ranks = 1; ranks <= most; ranks++) {
        snprintf(name, sizeof(name), "taught%d", ranks);
        snprintf(options, sizeof(options), "--batch %d --experts 6 --warmup 1 --save-every 0 --steps %d --teacher %s --out %s",
                 batch / ranks, steps, scratch_file("teacher"), scratch_file(name));
        assert_int_equal(run_ranks(output, sizeof(output), ranks, options), 0);
        shell(output, sizeof(output), "cat %s/log.jsonl", scratch_file(name));
        for (int i = 0; i < 4; i++) {
            char *last = NULL;
            snprintf(key, sizeof(key), "\"%s\":", names[i]);
            for (char *at = output; (at = strstr(at, key)) != NULL; at++)
                last = at[strlen(key)] == '"' ? last : at + strlen(key); // the option's text is no number
            assert_non_null(last);
            wanted[i] = ranks == 1 ? atof(last) : wanted[i];
            if (!(fabs(atof(last) - wanted[i]) <= 1e-3 * fabs(wanted[i])))
                fail_msg("%d ranks: %s is %g, not %g", ranks, names[i], atof(last), wanted[i]);
        }
    }
    if (is_twin())
        return;

    // Two machines have other weights under the same name.
    assert_int_equal(shell(output, sizeof(output), "cd %s && mkdir 0 1 && cp -rL latest 0/teacher && cp -rL latest 1/teacher && "
                           "cd 1/teacher && rm checksums.json && n=$(wc -c < model.safetensors) && printf x | dd of=model.safetensors "
                           "bs=1 seek=$((n - 3)) conv=notrunc", scratch_file("teacher")), 0);
    shell(output, sizeof(output), "timeout 60 $MPIRUN -np 2 sh -c 'p=$(realpath $TRAIN_MOE_MPI); d=$PWD/data/stories; cd "
          "%s/$OMPI_COMM_WORLD_RANK && $p --data $d --teacher teacher --steps 2 --warmup 0 --threads 1 --out ../run'", scratch_file("teacher"));
    if (times_in(output, "rank 1: --teacher teacher: its weights are not those that rank 0 has read under this name") != 1)
        fail_msg("%s", output);
}

// A trained model is evaluated by 1, 2 and 4 ranks, which divide a step in their ways, at a learning rate of 0: the line of the
// log is the same to the last digit, also where full experts refuse choices, and where each rank has all experts.
void test_mpi_evaluation(void **state) {
    (void)state;
    static const char *const divided[] = {"--batch 4", "--batch 2", "--batch 1", "--batch 1 --ep 1", "--batch 2 --accum 3 --ep 2"};
    static const int ranks[] = {1, 2, 4, 4, 4};
    char output[65536], options[600], name[16], wanted[512] = "";
    if (!has_mpi())
        return;
    snprintf(options, sizeof(options), "--batch 4 --lr 0.01 --warmup 1 --steps 30 --log-every 0 --eval-capacity-factor 0.7 --out %s", scratch_file("learned"));
    assert_int_equal(run_ranks(output, sizeof(output), 1, options), 0);
    for (int i = 0; i < 5; i++) {
        snprintf(name, sizeof(name), "judged%d", i);
        snprintf(options, sizeof(options), "--init %s/latest --lr 0 --warmup 0 --steps 1 --eval-tokens 3000 --eval-capacity-factor 0.7 %s --out %s",
                 scratch_file("learned"), divided[i], scratch_file(name));
        if (run_ranks(output, sizeof(output), ranks[i], options) != 0)
            fail_msg("%s: %s", options, output);
        shell(output, sizeof(output), "grep eval.,.step %s/log.jsonl", scratch_file(name));
        assert_non_null(strstr(output, "\"val_tokens\":3008,\"val_se\":0."));
        if (!*wanted)
            snprintf(wanted, sizeof(wanted), "%.500s", output);
        if (strcmp(output, wanted))
            fail_msg("%d ranks, %s: %s; one: %s", ranks[i], divided[i], output, wanted);
    }
}

// An expert that has been idle for 60 steps on 2 ranks, and for 40 more on 1: all know it.
void test_mpi_idle(void **state) {
    (void)state;
    char output[65536], options[600];
    if (!has_mpi())
        return;
    snprintf(options, sizeof(options),
             "--aux-weight 0 --experts 64 --topk 1 --gate probability --lr 0.02 --warmup 1 --eval-every 0 --sample-every 0 "
             "--save-every 60 --log-every 10 --out %s", scratch_file("idle"));
    char first[700], again[700];
    snprintf(first, sizeof(first), "--batch 1 --steps 61 %s", options);
    snprintf(again, sizeof(again), "--resume --steps 105");
    snprintf(again + strlen(again), 600, " --out %s", scratch_file("idle"));
    assert_int_equal(run_ranks(output, sizeof(output), 2, first), 0);
    assert_null(strstr(output, "has had no token"));
    assert_int_equal(shell(output, sizeof(output), "$TRAIN_MOE_MPI --threads 1 %s", again), 0);
    assert_non_null(strstr(output, "warning: step 100: expert "));
}

void test_mpi_bad_options(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"--nonsense", "there is no option --nonsense"},
        {"--ep 3", "--ep 3: it must divide the 2 ranks and the 8 experts"},
        {"--ep 2 --recipe dense", "--ep 2: this model has no experts to divide"},
        {"--ep 1 --replicate 2", "there must be another rank to have it"},
        {"--replicate 9", "at most all 8 experts can have a copy"},
        {"--replicate-every 2", "--replicate-every 2 would have no effect: it needs copies of experts: --replicate 1"},
        {"--compress int3", "--compress: 'int3' is not one of: none, bf16, int8, topk"},
        {"--compress topk --compress-ratio 0", "--compress-ratio: '0' is not a number from 1e-06 to 1"},
        {"--compress int8 --compress-ratio 0.1", "--compress-ratio 0.1 would have no effect"},
        {"--compress-rows --ep 1", "--compress-rows: no rows travel where each of the 2 ranks has all experts"},
        {"--offload 4", "--offload 4: with --ep 2 each rank has 4 of a layer's 8 experts, so there would be nothing to offload: give fewer"},
        {"--ep 1 --offload $((7 + $OMPI_COMM_WORLD_RANK))", "rank 1: --offload 8: a layer has 8 experts, so there would be nothing to offload"},
        {"--experts 2 --offload 1", "each rank has 1 of a layer's 2 experts, so there would be nothing to offload: leave it out, or give a "
                                    "smaller --ep"},
        {"--offload 2 --replicate 1", "--offload keeps most experts out of it: give one of the two"},
        {"--prompt One", "one process does it; start it without mpirun"},
        {"--data nowhere", "nowhere: cannot open the data folder: No such file or directory"},
        {"--seed $OMPI_COMM_WORLD_RANK", "rank 1: this rank has other options, other data or another checkpoint than rank 0 (here: "
                                         "--seed 1; rank 0: --seed 0;"},
        {"--ep $((1 + $OMPI_COMM_WORLD_RANK))", "rank 1: this rank has other options"},
        {"--overlap $OMPI_COMM_WORLD_RANK", "rank 1: this rank has other options"},
        {"--watchdog 1 --data $([ $OMPI_COMM_WORLD_RANK = 0 ] && echo data/stories || echo $PIPED)",
         "rank 1 of 2 does not answer"}, // it reads for ever
    };
    char output[8192], options[512];
    if (!has_mpi())
        return;
    setenv("PIPED", scratch_file("piped"), 1);
    assert_int_equal(shell(output, sizeof(output), "mkdir $PIPED && mkfifo $PIPED/tokenizer.json"), 0);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        snprintf(options, sizeof(options), "%s --out %s", cases[i][0], scratch_file("refused"));
        assert_true(run_ranks(output, sizeof(output), 2, options) > 0);
        if (times_in(output, cases[i][1]) != 1)
            fail_msg("%s: expected \"%s\" once, got %s", cases[i][0], cases[i][1], output);
    }
    assert_int_equal(shell(output, sizeof(output), "ls %s", scratch_file("refused")), 2);
}

// Processes that were started with different ways of compressing are refused, and the message names the option.
void test_mpi_both_disagree(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"--compress $([ $OMPI_COMM_WORLD_RANK = 0 ] && echo int8 || echo bf16)", "(here: --compress bf16; rank 0: --compress int8;"},
        {"--compress topk --compress-ratio 0.0$((1 + $OMPI_COMM_WORLD_RANK))",
         "(here: --compress-ratio 0.02; rank 0: --compress-ratio 0.01;"},
        {"$([ $OMPI_COMM_WORLD_RANK = 0 ] && echo --compress-rows)", "(here: --compress-rows 0; rank 0: --compress-rows 1;"},
    };
    char output[8192], options[512];
    if (!has_mpi())
        return;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        snprintf(options, sizeof(options), "%s --out %s", cases[i][0], scratch_file("disagree"));
        assert_true(run_ranks(output, sizeof(output), 2, options) > 0);
        if (times_in(output, cases[i][1]) != 1 || times_in(output, "rank 1: this rank has other options") != 1)
            fail_msg("%s: expected \"%s\" once, got %s", cases[i][0], cases[i][1], output);
    }
    assert_int_equal(shell(output, sizeof(output), "ls %s", scratch_file("disagree")), 2);
}

// Damage is named once, and all ranks go on from the same checkpoint where `latest` is missing, or is a text file.
void test_mpi_files(void **state) {
    (void)state;
    char output[16384], options[512], program[1024];
    const char *out = scratch_file("files");
    if (!has_mpi())
        return;
    snprintf(options, sizeof(options), "--save-every 3 --out %s", out);
    assert_int_equal(run_ranks(output, sizeof(output), 2, options), 0);
    snprintf(options, sizeof(options), "--resume --steps 9 --save-every 3 --out %s", out);
    static const char *const flip = "cd %s/latest && cp model.safetensors ../whole && n=$(wc -c < ../whole) && "
                                    "printf x | dd of=model.safetensors bs=1 seek=$((n - 3)) conv=notrunc";
    assert_int_equal(shell(output, sizeof(output), flip, out), 0);
    assert_true(run_ranks(output, sizeof(output), 2, options) > 0);
    if (times_in(output, "damaged: the numbers of model.norm.weight") != 1)
        fail_msg("%s", output);
    assert_int_equal(shell(output, sizeof(output), "cd %s && mv whole latest/model.safetensors && rm latest", out), 0);
    assert_int_equal(run_ranks(output, sizeof(output), 2, options), 0);
    if (times_in(output, "checkpoint-6 is taken, the newest whole one") != 1 || !strstr(output, "going on after step 6"))
        fail_msg("%s", output);

    // Without links and locks, and from a text file.
    char *plain = strdup(getenv("TRAIN_MOE_MPI"));
    snprintf(program, sizeof(program), "BREAK_SYMLINK=%d BREAK_FLOCK=%d", EPERM, ENOLCK);
    const char *begin = broken(program);
    snprintf(program, sizeof(program), "env %s %s", begin, plain);
    setenv("TRAIN_MOE_MPI", program, 1);
    shell(output, sizeof(output), "rm -r %s", out);
    snprintf(options, sizeof(options), "--save-every 3 --out %s", out);
    assert_int_equal(run_ranks(output, sizeof(output), 2, options), 0);
    assert_int_equal(times_in(output, "has no symbolic links there"), 1);
    assert_int_equal(times_in(output, "has no locks there"), 1);
    setenv("TRAIN_MOE_MPI", plain, 1);
    free(plain);
    shell(output, sizeof(output), "cat %s/latest", out);
    assert_string_equal(output, "checkpoint-6\n");
    snprintf(options, sizeof(options), "--resume --steps 7 --out %s", out);
    assert_int_equal(run_ranks(output, sizeof(output), 2, options), 0);
    assert_non_null(strstr(output, "going on after step 6"));
}

// Starts a run of two processes and kills both at once, by SIGKILL, when the log has that step. Returns whether the newest checkpoint
// is then that of step `saved`: a run may have gone on for too long.
int kill_ranks(const char *options, const char *out, int step, int saved) {
    char output[16384];
    shell(output, sizeof(output),
          "exec 2>&1; rm -rf %s; %s & job=$!; "
          "while kill -0 $job && ! grep -q 'step.:%d,.tokens' %s/log.jsonl; do sleep 0.002; done; "
          "kill -KILL $(pgrep -f '^[^ ]*(train_moe_|cuda_ranks_)[a-z0-9_]* .*--out %s'); wait $job; echo status $?",
          out, ranks_line(2, options), step, out, out);
    int killed = !strstr(output, "status 0") && !strstr(output, "status 124"); // of timeout
    shell(output, sizeof(output), "basename $(readlink %s/latest) | tr -dc 0-9", out);
    return killed && atoi(output) == saved;
}

// What has not arrived of compressed gradients is in the checkpoint: a run that was killed and goes on ends with the bits of one that
// was never stopped.
void test_mpi_both_compress(void **state) {
    (void)state;
    static const char *const schemes[] = {"--compress int8 --compress-rows", "--compress topk --compress-ratio 0.02"};
    char output[16384], options[512], whole[256], again[256];
    int steps = is_twin() ? 4 : 12;
    if (!has_mpi())
        return;
    strcpy(whole, scratch_file("packed"));
    strcpy(again, scratch_file("again"));
    for (int i = 0; i < (is_twin() ? 1 : 2); i++) {
        const char *scheme = is_twin() ? "--compress int8" : schemes[i];
        shell(output, sizeof(output), "rm -rf %s", whole);
        snprintf(options, sizeof(options), "--steps %d --save-every %d --warmup 1 %s --out %s", steps, steps / 2, scheme, whole);
        assert_int_equal(run_ranks(output, sizeof(output), 2, options), 0);
        snprintf(options, sizeof(options), "--steps %d --save-every %d --warmup 1 %s --out %s", steps, steps / 2, scheme, again);
        for (int attempt = 0; !kill_ranks(options, again, steps / 2 + 1, steps / 2); attempt++)
            assert_true(attempt < 8);
        snprintf(options, sizeof(options), "--resume --steps %d %s --out %s", steps, scheme, again);
        assert_int_equal(run_ranks(output, sizeof(output), 2, options), 0);
        assert_null(strstr(output, "lost_gradients"));
        assert_int_equal(shell(output, sizeof(output), "cd %s/latest && for f in model optimizer lost_gradients; do cmp $f.safetensors "
                               "%s/latest/$f.safetensors || exit 1; done", whole, again), 0);
    }
}

// With other ranks, or without --compress, a run goes on without what its gradients have lost, and says so.
void test_mpi_compress(void **state) {
    (void)state;
    char output[16384], options[512];
    if (!has_mpi())
        return;
    snprintf(options, sizeof(options), "--compress int8 --warmup 1 --out %s", scratch_file("before"));
    assert_int_equal(run_ranks(output, sizeof(output), 2, options), 0);
    assert_int_equal(times_in(output, " --compress int8\n"), 1); // the command that goes on has it
    snprintf(options, sizeof(options), "--resume --steps 7 --ep 1 --compress bf16 --out %s", scratch_file("before"));
    assert_int_equal(run_ranks(output, sizeof(output), 2, options), 0);
    assert_int_equal(times_in(output, "is of other ranks than 2 with --ep 1"), 1);
    snprintf(options, sizeof(options), "--resume --steps 8 --out %s", scratch_file("before"));
    assert_int_equal(run_ranks(output, sizeof(output), 2, options), 0);
    assert_int_equal(times_in(output, "lost_gradients.safetensors is not used"), 1);
    snprintf(options, sizeof(options), "--resume --steps 9 --compress bf16 --out %s", scratch_file("before"));
    assert_int_equal(run_ranks(output, sizeof(output), 2, options), 0);
    assert_int_equal(times_in(output, "nothing was compressed until then"), 1);
    unlink(scratch_file("before/latest/lost_gradients.safetensors"));
    snprintf(options, sizeof(options), "--resume --steps 10 --compress bf16 --out %s", scratch_file("before"));
    assert_int_equal(run_ranks(output, sizeof(output), 2, options), 0);
    assert_int_equal(times_in(output, "lost_gradients.safetensors was removed"), 1);
    snprintf(options, sizeof(options), "--compress bf16 --out %s", scratch_file("single"));
    assert_int_equal(run_ranks(output, sizeof(output), 1, options), 2);
    assert_int_equal(times_in(output, "--compress: one process sends nothing"), 1);
}

// What gradients of one twin have lost lies elsewhere in the other: it is left out, and the message says so.
void test_mpi_both_exchange(void **state) {
    (void)state;
    char output[16384], options[512], twin[512];
    if (!has_mpi() || !is_twin())
        skip();
    strcpy(twin, getenv("TRAIN_MOE_MPI"));
    for (int step = 1; step <= 3; step++) {
        snprintf(options, sizeof(options), "--compress int8 --warmup 0 --steps %d %s --out %s", step, step > 1 ? "--resume" : "",
                 scratch_file("by_turns"));
        setenv("TRAIN_MOE_MPI", step == 2 ? twin : getenv("TRAIN_MOE_OTHER"), 1);
        int status = run_ranks(output, sizeof(output), 2, options);
        setenv("TRAIN_MOE_MPI", twin, 1);
        if (status || times_in(output, "lost_gradients.safetensors is of other ranks than 2 with --ep 2 and --replicate 0, or of the "
                                       "twin of this program: it is not used, and the run goes on without what was lost") != (step > 1))
            fail_msg("step %d: %s", step, output);
    }
}

// Sets the program of run_ranks() to `before` and, behind it, the program that is to be tested.
void set_program(const char *before) {
    static char tested[512];
    char program[1200];
    if (!tested[0])
        snprintf(tested, sizeof(tested), "%s", getenv("TRAIN_MOE_MPI"));
    snprintf(program, sizeof(program), "%s%s", before, tested);
    setenv("TRAIN_MOE_MPI", program, 1);
}

// A run whose ranks have other numbers of experts in memory is killed, goes on with others, and ends with the bits of one with all
// in memory. A disk that is too small for one rank ends all of them, by the name of that rank, and a new run leaves no folder.
void test_mpi_offload(void **state) {
    (void)state;
    char output[16384], options[512], before[700];
    if (!has_mpi())
        return;
    snprintf(options, sizeof(options), "--warmup 1 --accum 2 --out %s", scratch_file("plain"));
    assert_int_equal(run_ranks(output, sizeof(output), 2, options), 0);
    snprintf(before, sizeof(before), "env %s ", broken("BREAK_SYMLINK=kill")); // when the first checkpoint is to be linked
    set_program(before);
    snprintf(options, sizeof(options), "--warmup 1 --accum 2 --save-every 3 --offload $((1 + 2 * $OMPI_COMM_WORLD_RANK)) --out %s",
             scratch_file("away"));
    assert_true(run_ranks(output, sizeof(output), 2, options) != 0);
    set_program("");
    assert_int_equal(shell(output, sizeof(output), "ls -a %s | grep offload-", scratch_file("away")), 1);
    snprintf(options, sizeof(options), "--resume --offload $((2 - 2 * $OMPI_COMM_WORLD_RANK)) --out %s", scratch_file("away"));
    assert_int_equal(run_ranks(output, sizeof(output), 2, options), 0);
    if (!strstr(output, "going on after step 3"))
        fail_msg("%s", output);
    assert_int_equal(shell(output, sizeof(output), "cd %s/latest && for f in model optimizer; do cmp $f.safetensors %s/latest/$f.safetensors "
                           "|| exit 1; done", scratch_file("plain"), scratch_file("away")), 0);

    set_program("eval [ $OMPI_COMM_WORLD_RANK = 0 ] || ulimit -f 100; ");
    snprintf(options, sizeof(options), "--offload 2 --out %s", scratch_file("full"));
    assert_true(run_ranks(output, sizeof(output), 2, options) > 0);
    set_program("");
    if (times_in(output, "rank 1: --offload: ") != 1 || times_in(output, "cannot reserve 0.4 MiB for experts' weights, gradients and moments") != 1)
        fail_msg("%s", output);
    assert_int_not_equal(access(scratch_file("full"), F_OK), 0);
}

// One rank is killed; or it hangs; or it is asked to stop, by SIGTERM or SIGHUP; or it hangs while it writes. Each time the job ends with a message, and
// the run goes on from its last checkpoint.
void test_mpi_crash(void **state) {
    (void)state;
    static const char *const signals[] = {"KILL", "STOP", "TERM", "STOP", "HUP"};
    char output[16384], options[512];
    const char *out = scratch_file("crash");
    if (!has_mpi())
        return;
    for (int i = 0; i < 5; i++) {
        double start = seconds();
        int writing = i == 3;
        shell(output, sizeof(output),
              "exec 2>&1; timeout 100 $MPIRUN -np 4 $TRAIN_MOE_MPI --seq 32 --dim 32 --ffn 32 --steps 1000000 --batch 1 "
              "--save-every 5 --eval-every 0 --sample-every 0 --threads 1 --watchdog 3 --out %s & job=$!; "
              "while [ ! -e %s/latest ] && kill -0 $job; do sleep 0.2; done; "
              "p=$(pgrep -f '^[^ ]*train_moe_[a-z_]* .*--out %s' | sort -n | sed -n %dp); kill -%s $p; "
              "while [ %d = 1 ] && kill -0 $job && [ ! -e %s/unfinished-checkpoint ]; do kill -CONT $p; sleep 0.01; kill -STOP $p; done; "
              "wait $job; echo status $?",
              out, out, out, writing ? 1 : 3, signals[i], writing, out);
        assert_null(strstr(output, "status 0"));
        assert_null(strstr(output, "status 124")); // of timeout
        assert_true(seconds() - start < 60);
        if (i == 0)
            assert_non_null(strstr(output, "rank 2"));
        if (i == 1)
            assert_non_null(strstr(output, "rank 2 of 4 does not answer"));
        if (writing)
            assert_non_null(strstr(output, "rank 0 of 4 does not answer"));
        if (i == 2 || i == 4)
            assert_int_equal(times_in(output, "stopped after step"), 1);
        shell(output, sizeof(output), "basename $(readlink %s/latest) | tr -dc 0-9", out);
        snprintf(options, sizeof(options), "--resume --steps %d --out %s", atoi(output) + 1, out);
        assert_int_equal(shell(output, sizeof(output), "timeout 100 $MPIRUN -np 2 $TRAIN_MOE_MPI %s", options), 0);
        shell(output, sizeof(output), "mv %s %s-%d", out, out, i);
    }
}

// With --minutes all ranks take the number of steps that the first one decides, and the trial leaves nothing behind.
void test_mpi_minutes(void **state) {
    (void)state;
    char output[65536], options[512], number[32] = "--minutes 0.03";
    if (!has_mpi())
        return;
    for (int i = 0; i < 2; i++) {
        snprintf(options, sizeof(options),
                 "timeout 120 $MPIRUN -np 2 $TRAIN_MOE_MPI --seq 32 --dim 32 --ffn 32 --layers 2 --batch 1 --log-every 500 --warmup 0 "
                 "--eval-tokens 64 --tokens 5 --threads 1 --replicate 2 --replicate-every 2 %s --out %s",
                 number, scratch_file(i ? "counted_minutes" : "timed_minutes"));
        if (shell(output, sizeof(output), "%s", options) != 0)
            fail_msg("%s: %s", options, output);
        assert_int_equal(times_in(output, "--minutes 0.03: "), 1 - i);
        assert_int_equal(times_in(output, "of the 0.03 minutes."), 1 - i);
        const char *at = strstr(output, " steps of ");
        while (!i && at && at[-1] != ' ')
            at--;
        if (!i && at)
            snprintf(number, sizeof(number), "--steps %d", atoi(at));
    }
    shell(output, sizeof(output), "sha256sum %s/latest/*.safetensors | cut -c1-64", scratch_file("timed_minutes"));
    snprintf(options, sizeof(options), "%.500s", output);
    shell(output, sizeof(output), "sha256sum %s/latest/*.safetensors | cut -c1-64", scratch_file("counted_minutes"));
    assert_string_equal(output, options);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_mpi_program),
        cmocka_unit_test(test_mpi_log),
        cmocka_unit_test(test_mpi_both_teacher),
        cmocka_unit_test(test_mpi_evaluation),
        cmocka_unit_test(test_mpi_idle),
        cmocka_unit_test(test_mpi_bad_options),
        cmocka_unit_test(test_mpi_files),
        cmocka_unit_test(test_mpi_crash),
        cmocka_unit_test(test_mpi_minutes),
        cmocka_unit_test(test_mpi_compress),
        cmocka_unit_test(test_mpi_both_disagree),
        cmocka_unit_test(test_mpi_both_compress),
        cmocka_unit_test(test_mpi_both_exchange),
        cmocka_unit_test(test_mpi_offload),
    };
    begin_tests();
    return cmocka_run_group_tests_name("mpi", tests, NULL, scratch_done);
}
