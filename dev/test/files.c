// The files of a run, when something goes wrong: flipped bits, kills, file systems without locks or links, closed
// descriptors, files that may not grow, signals, clocks. The program is ./train_moe (or the one that TRAIN_MOE names). With
// VALGRIND set, no program is started and these tests are skipped.

#include "dev/test/trainer.h"
#include "dev/test/model.h"
#include "dev/test/runs.h"
#include "dev/test/broken.h"
#include <sys/socket.h>

// ---------------------------------------------------------------------------------------------------------------------
// Helpers

// Flips one bit of the byte `at` of a file; counted from its end if negative.
void flip_bit_of(const char *name, long at, int bit) {
    FILE *file = fopen(scratch_file(name), "r+b");
    assert_non_null(file);
    fseek(file, at, at < 0 ? SEEK_END : SEEK_SET);
    long place = ftell(file);
    int byte = fgetc(file);
    fseek(file, place, SEEK_SET);
    fputc(byte ^ 1 << bit, file);
    assert_int_equal(fclose(file), 0);
}

// Copies a run, changes it by a shell command in it, and runs the program there.
int run_changed(const char *from, const char *to, const char *change, const char *options) {
    expect(shell(said, sizeof(said), "rm -rf %s && cp -a %s %s && cd %s && %s", scratch_file(to), scratch_file(from),
                 scratch_file(to), scratch_file(to), change),
           0, NULL);
    return run_tiny(to, options);
}

// The same as run_tiny(), with the preloaded library.
int run_broken(const char *how, const char *out, const char *options) {
    char line[2600];
    snprintf(line, sizeof(line), "%s%s", broken(how), command_line(out, options));
    return shell(said, sizeof(said), "%s", line);
}

// Each folder that bears a checkpoint's name has all of its files.
void assert_all_whole(const char *out) {
    DIR *folder = opendir(scratch_file(out));
    assert_non_null(folder);
    for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
        char path[600];
        snprintf(path, sizeof(path), "%s/%s", scratch_file(out), entry->d_name);
        if (!strncmp(entry->d_name, "checkpoint-", 11) && !is_whole(path, 1))
            fail_msg("%s is not whole", path);
    }
    closedir(folder);
}

int log_has(const char *out, const char *text) {
    char name[300];
    size_t size;
    snprintf(name, sizeof(name), "%s/log.jsonl", out);
    char *log = read_file(scratch_file(name), &size);
    int found = strstr(log, text) != NULL;
    free(log);
    return found;
}

// ---------------------------------------------------------------------------------------------------------------------
// Checksums

// Any flipped bit in the numbers of a checkpoint is found, and the message names the tensor and the file.
void test_flipped_bits(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    expect(run_tiny("sums", "--steps 2"), 0, NULL);
    static const char *const files[] = {"model.safetensors", "optimizer.safetensors"};
    char name[300], options[400];
    uint64_t random = 16;
    for (int i = 0; i < 2; i++) {
        size_t size;
        uint64_t header;
        snprintf(name, sizeof(name), "sums/latest/%s", files[i]);
        char *text = read_file(scratch_file(name), &size);
        memcpy(&header, text, 8);
        free(text);
        for (int n = 0; n < 10; n++) {
            long first = 8 + (long)header, at = n ? draw(&random, (int)first, (int)size - 1) : first;
            int bit = draw(&random, 0, 7);
            at = n == 1 ? (long)size - 1 : at;
            flip_bit_of(name, at, bit);
            expect(run_tiny("sums", "--resume --steps 3"), 1, "damaged: the numbers of ");
            expect(1, 1, i ? "optimizer.safetensors: damaged: the numbers of exp_avg" : "model.safetensors: damaged: the numbers of ");
            expect(1, 1, "--trust-weights");
            assert_latest("sums", "checkpoint-2");
            flip_bit_of(name, at, bit);
        }
    }

    // The first tensor is named, for --prompt and --init, too; --trust-weights takes it as it is.
    flip_bit_of("sums/latest/model.safetensors", -3, 0);
    expect(run_tiny("sums", "--prompt hello"), 1, "checkpoint-2/model.safetensors: damaged: the numbers of model.norm.weight do not");
    snprintf(options, sizeof(options), "--init %s --steps 1", scratch_file("sums/latest"));
    expect(run_tiny("refused", options), 1, "latest/model.safetensors: damaged: the numbers of model.norm.weight do not");
    assert_true(!exists("refused"));
    expect(run_tiny("sums", "--prompt hello --trust-weights"), 0, "hello");
    snprintf(options, sizeof(options), "--init %s --steps 1 --trust-weights", scratch_file("sums/latest"));
    expect(run_tiny("accepted", options), 0, "What next");
    expect(run_tiny("sums", "--resume --steps 3 --trust-weights"), 0, "What next");
    expect(run_tiny("sums", "--resume --steps 4"), 0, "What next"); // the new checkpoint has new checksums
}

// The small files: a digit may flip and leave valid JSON. A file of another size was changed on purpose.
void test_flipped_digits(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    expect(run_tiny("digits", "--steps 2"), 0, NULL);
    static const char *const changes[][2] = {
        {"sed -i 's/\"step\":2/\"step\":3/' latest/trainer_state.json", "checkpoint-2/trainer_state.json: damaged"},
        {"sed -i 's/\"beta2\":0.99/\"beta2\":0.94/' latest/config.json", "checkpoint-2/config.json: damaged"},
        {"sed -i 's/\"he\"/\"eh\"/;s/\"h e\"/\"e h\"/' latest/tokenizer.json", "checkpoint-2/tokenizer.json: damaged"},
        {"printf x > latest/checksums.json", "checkpoint-2/checksums.json: bad JSON at byte 0"},
        {"sed -i 's/\"model.norm.weight\":\"./\"model.norm.weight\":\"x/' latest/checksums.json", "model.norm.weight"},
        {"sed -i 's/\"model.norm.weight\"/\"model.narm.weight\"/' latest/checksums.json", "model.norm.weight"},
    };
    for (int i = 0; i < COUNT(changes); i++) {
        expect(run_changed("digits", "digits-now", changes[i][0], "--resume --steps 3"), 1, changes[i][1]);
        expect(1, 1, "; remove that checkpoint's folder, and --resume takes the newest whole one; or take it as it is, by --trust-weights\n");
        assert_true(!strstr(said, ", or edited by hand: ") == (i > 2));
    }
    expect(run_changed("digits", "digits-now", changes[1][0], "--resume --steps 3 --trust-weights"), 0, "What next");
    expect(run_changed("digits", "digits-now", changes[3][0], "--resume --steps 3 --trust-weights"), 0, "What next");
    expect(run_changed("digits", "digits-now", "sed -i 's/\"beta2\":0.99/\"beta2\":0.9/' latest/config.json", "--resume --steps 3"),
           0, "checkpoint-2/config.json: another size than checksums.json says");
    expect(0, 0, "What next");
}

// Weights that another program has written are told from damage; files without checksums load as ever.
void test_replaced_weights(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    expect(run_tiny("theirs", "--steps 2"), 0, NULL);
    size_t size;
    uint64_t length;
    char *text = read_file(scratch_file("theirs/latest/model.safetensors"), &size), *at = strstr(text + 8, "\"pt\"");
    memcpy(&length, text, 8);
    assert_non_null(at);
    text[size - 3] ^= 1; // another number
    put_file("theirs/latest/model.safetensors", text, size);
    expect(run_tiny("theirs", "--resume --steps 3"), 1, "damaged: the numbers of model.norm.weight");
    memcpy(at, "\"tp\"", 4); // another header of the same size
    put_file("theirs/latest/model.safetensors", text, size);
    expect(run_tiny("theirs", "--prompt hello"), 0, "another list of tensors than checksums.json says");
    char *longer = (char *)allocate(size + 8, 1); // a longer header
    memcpy(longer, text, 8 + length);
    memset(longer + 8 + length, ' ', 8);
    memcpy(longer + 16 + length, text + 8 + length, size - 8 - length);
    length += 8;
    memcpy(longer, &length, 8);
    put_file("theirs/latest/model.safetensors", longer, size + 8);
    expect(run_tiny("theirs", "--prompt hello"), 0, "another size than checksums.json says");
    expect(run_tiny("theirs", "--resume --steps 3"), 0, "What next");
    free(longer);
    free(text);

    expect(run_tiny("bare", "--steps 2"), 0, NULL);
    flip_bit_of("bare/latest/model.safetensors", -3, 0);
    flip_bit_of("bare/latest/optimizer.safetensors", -3, 0);
    shell(said, sizeof(said), "rm %s", scratch_file("bare/latest/checksums.json"));
    expect(run_tiny("bare", "--resume --steps 3"), 0, "What next");
}

// ---------------------------------------------------------------------------------------------------------------------
// Kills, and which checkpoint counts

// A kill before the first checkpoint is linked: it is found. So is the newest whole one where `latest` leads nowhere.
void test_newest_whole(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    expect(run_tiny("unkilled", "--steps 6 --save-every 2"), 0, NULL);
    assert_int_equal(run_broken("BREAK_SYMLINK=kill", "killed", "--steps 6 --save-every 2"), 137);
    assert_true(exists("killed/checkpoint-2") && !exists("killed/latest"));
    expect(run_tiny("killed", "--prompt hello"), 0, "checkpoint-2 is taken, the newest whole one");
    expect(run_tiny("killed", "--steps 6 --save-every 2 --resume"), 0, "going on after step 2");
    expect(0, 0, "checkpoint-2 is taken, the newest whole one");
    assert_latest("killed", "checkpoint-6");
    assert_same_weights("unkilled", "killed");
    assert_log("killed", 6, 2);

    static const char *const changes[] = {
        "rm latest", "ln -sfn checkpoint-77 latest", "rm checkpoint-6/model.safetensors", "rm checkpoint-6/config.json",
        "rm checkpoint-6/optimizer.safetensors", "rm checkpoint-6/trainer_state.json", "rm -r checkpoint-6"};
    for (int i = 0; i < COUNT(changes); i++) {
        char change[128];
        snprintf(change, sizeof(change), "mkdir checkpoint-9 checkpoint-x && touch checkpoint-9/config.json && %s", changes[i]);
        expect(run_changed("killed", "killed-now", change, "--steps 8 --resume"), 0,
               i < 2 ? "going on after step 6" : "going on after step 4");
        expect(0, 0, i < 2 ? "checkpoint-6 is taken" : "checkpoint-4 is taken");
        assert_latest("killed-now", "checkpoint-8");
    }

    // Generation needs no moments; and what none has is refused.
    expect(run_changed("killed", "killed-now", "rm checkpoint-6/optimizer.safetensors", "--prompt hello"), 0, "killed-now/checkpoint-6, mixtral");
    expect(run_changed("killed", "killed-now", "rm checkpoint-*/config.json", "--resume"), 1, "none of those beside it is whole");
    expect(run_tiny("killed-now", "--prompt hello"), 1, "no checkpoint there");
}

// ./train_moe --resume without --out finds the run that was saved last, though it was killed before its first link.
void test_newest_run(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    expect(run_tiny("some/runs/mixtral", "--steps 2"), 0, NULL);
    expect(run_tiny("some/runs/mixtral-2", "--steps 2"), 0, NULL);
    const char *const program = getenv("TRAIN_MOE") ? getenv("TRAIN_MOE") : "./train_moe";
    char *path = realpath(program, NULL);
    shell(said, sizeof(said), "cd %s/some && rm runs/mixtral-2/latest && touch -h -d 2001-01-01 runs/mixtral/latest && %s --prompt hello --tokens 3",
          scratch_folder, path);
    expect(0, 0, "runs/mixtral-2/checkpoint-2, mixtral");
    shell(said, sizeof(said), "cd %s/some && rm runs/mixtral/latest && echo checkpoint-2 > runs/mixtral/latest && %s --prompt hello --tokens 3", scratch_folder, path);
    expect(0, 0, "runs/mixtral/checkpoint-2, mixtral");
    assert_true(!strstr(said, "newest whole one"));
    free(path);
}

// A kill in the middle of removing a checkpoint leaves no half one of that name, and the next start clears up.
void test_removed_aside(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    const char *const options = "--steps 6 --save-every 2 --keep 1";
    assert_int_equal(run_broken("BREAK_UNLINK=1", "half", options), 137);
    assert_all_whole("half");
    assert_latest("half", "checkpoint-4");
    assert_true(exists("half/removed-checkpoint") && !exists("half/checkpoint-2"));
    expect(run_tiny("half", "--prompt hi"), 0, "hi"); // reads only
    assert_true(exists("half/removed-checkpoint"));
    expect(run_tiny("half", "--steps 6 --save-every 2 --keep 1 --resume"), 0, "What next");
    assert_true(!exists("half/removed-checkpoint") && !exists("half/checkpoint-4") && exists("half/checkpoint-6"));

    // Of a step that is saved again, the old one goes when the new one has its name.
    expect(run_tiny("twice", "--steps 4 --save-every 2"), 0, NULL);
    static const char *const how[] = {"BREAK_UNLINK=1", "BREAK_RENAME=1"};
    for (int i = 0; i < 2; i++) {
        shell(said, sizeof(said), "ln -sfn checkpoint-2 %s", scratch_file("twice/latest"));
        assert_int_equal(run_broken(how[i], "twice", "--steps 4 --save-every 2 --resume"), 137);
        assert_all_whole("twice");
        assert_latest("twice", i ? "checkpoint-2" : "checkpoint-4");
    }
    expect(run_tiny("twice", "--steps 4 --save-every 2 --resume"), 0, "What next");
    assert_true(!exists("twice/removed-checkpoint") && !exists("twice/unfinished-checkpoint"));
    expect(run_tiny("once", "--steps 4 --save-every 2"), 0, NULL);
    assert_same_weights("once", "twice");
}

// ---------------------------------------------------------------------------------------------------------------------
// What a file system can do

// Without locks, training goes on with a word. Where the lock is taken, it does not.
void test_no_locks(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    const int errors[] = {ENOLCK, ENOSYS, EOPNOTSUPP, EINVAL};
    for (int i = 0; i < COUNT(errors); i++) {
        char how[64], out[32];
        snprintf(how, sizeof(how), "BREAK_FLOCK=%d", errors[i]);
        snprintf(out, sizeof(out), "unlocked-%d", i);
        expect(run_broken(how, out, "--steps 2"), 0, "What next");
        expect(0, 0, "has no locks there");
        assert_null(strstr(said, "another process"));
    }
    char how[64];
    snprintf(how, sizeof(how), "BREAK_FLOCK=%d", EWOULDBLOCK);
    expect(run_broken(how, "locked-out", "--steps 2"), 1, "another process trains there");
}

// Without links, `latest` is a text file, which everything reads as it does a link.
void test_no_links(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    const int errors[] = {EPERM, ENOSYS, EOPNOTSUPP};
    char how[64], options[400];
    size_t size;
    expect(run_tiny("links", "--steps 6 --save-every 2"), 0, NULL);
    for (int i = 0; i < COUNT(errors); i++) {
        snprintf(how, sizeof(how), "BREAK_SYMLINK=%d", errors[i]);
        shell(said, sizeof(said), "rm -rf %s", scratch_file("unlinked"));
        expect(run_broken(how, "unlinked", "--steps 6 --save-every 2"), 0, "has no symbolic links there");
        expect(0, 0, "unlinked/checkpoint-6 the model");
        char *text = read_file(scratch_file("unlinked/latest"), &size);
        assert_string_equal(text, "checkpoint-6\n");
        free(text);
    }
    put_text("unlinked/latest", "checkpoint-4\n");
    expect(run_tiny("unlinked", "--prompt hello"), 0, "unlinked/checkpoint-4, mixtral");
    expect(run_broken(how, "unlinked", "--steps 6 --save-every 2 --resume"), 0, "going on after step 4");
    assert_null(strstr(said, "newest whole one"));
    shell(said, sizeof(said), "cmp %s/latest/model.safetensors %s/checkpoint-6/model.safetensors", scratch_file("links"), scratch_file("unlinked"));
    assert_string_equal(said, "");
    put_text("unlinked/latest", "checkpoint-4"); // as a link that was copied through Windows
    expect(run_tiny("unlinked", "--steps 5 --resume"), 0, "going on after step 4");
    assert_latest("unlinked", "checkpoint-5"); // a link again
    expect(run_changed("unlinked", "unlinked-now", "rm latest && echo ../../nonsense > latest", "--steps 7 --resume"), 0,
           "unlinked-now/checkpoint-6 is taken, the newest whole one");

    // A copied folder in place of the link is found before the first step.
    shell(said, sizeof(said), "cd %s && cp -rL latest copied && rm latest && mv copied latest", scratch_file("unlinked"));
    expect(run_tiny("unlinked", "--steps 9 --resume"), 1, "latest: it is a folder, but must be a link to the newest checkpoint");
    snprintf(options, sizeof(options), "--init %s --steps 1", scratch_file("unlinked/latest"));
    expect(run_tiny("from-copy", options), 0, "What next");
}

// A folder that cannot be read to its end is not one that ends there.
void test_unread_folders(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    expect(run_tiny("unread", "--steps 4 --save-every 2"), 0, NULL);
    expect(run_broken("BREAK_READDIR=/unread", "unread", "--steps 6 --resume"), 1, "unread: cannot read the folder: Input/output error");
    shell(said, sizeof(said), "mkdir %s", scratch_file("unread/unfinished-checkpoint"));
    put_text("unread/unfinished-checkpoint/x", "x");
    expect(run_broken("BREAK_READDIR=/unfinished-checkpoint", "unread", "--steps 6 --resume"), 1,
           "unread/unfinished-checkpoint: cannot remove: Input/output error");
    assert_latest("unread", "checkpoint-4");
    char *path = realpath(getenv("TRAIN_MOE") ? getenv("TRAIN_MOE") : "./train_moe", NULL);
    shell(said, sizeof(said), "mkdir -p %s/runs && cd %s && %s%s --resume --data data", scratch_folder, scratch_folder,
          broken("BREAK_READDIR=/runs"), path);
    expect(1, 1, "runs: cannot read the folder: Input/output error");
    free(path);
}

// Where checkpoints cannot be looked at, --resume does not begin anew and empty the log. Links that lead to themselves fail
// for root, too.
void test_unseen_checkpoints(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    expect(run_tiny("unseen", "--steps 4 --save-every 2"), 0, NULL);
    static const char *const changes[][2] = {
        {"ln -sfn latest latest", "unseen-now/latest: cannot look whether it is there: "},
        {"rm checkpoint-*/config.json && ln -s config.json checkpoint-4/config.json", "checkpoint-4/config.json: cannot look whether it is there: "},
        {"rm -r checkpoint-*", "unseen-now/latest leads to no checkpoint, and none is beside it: put them back, or begin anew with another --out"},
    };
    for (int i = 0; i < COUNT(changes); i++) {
        expect(run_changed("unseen", "unseen-now", changes[i][0], "--resume --steps 6"), 1, changes[i][1]);
        assert_log("unseen-now", 4, 2);
    }
    expect(run_changed("unseen", "unseen-now", "rm latest", "--steps 4"), 2, "holds a run already");
    expect(run_broken("BREAK_OPENDIR=/unseen-now", "unseen-now", "--resume --steps 6"), 1, "unseen-now: cannot read the folder: Permission denied");
    assert_log("unseen-now", 4, 2);
    char *path = realpath(getenv("TRAIN_MOE") ? getenv("TRAIN_MOE") : "./train_moe", NULL);
    shell(said, sizeof(said), "mkdir -p %s/runs && cd %s && %s%s --resume --data data", scratch_folder, scratch_folder,
          broken("BREAK_OPENDIR=runs"), path);
    expect(1, 1, "runs: cannot read the folder: Permission denied");
    free(path);

    // A run that was killed before its first checkpoint begins anew.
    expect(run_changed("unseen", "unseen-now", "rm -r checkpoint-* latest", "--resume --steps 3"), 0, "What next");
    assert_log("unseen-now", 3, 2);
}

// ---------------------------------------------------------------------------------------------------------------------
// Descriptors, limits, signals, clocks

// With standard output closed, or all three, nothing of what is printed gets into the log.
void test_closed_descriptors(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    static const char *const closed[] = {">&-", "2>&-", "<&- >&- 2>&-", "<&-"};
    for (int i = 0; i < COUNT(closed); i++) {
        char out[32];
        snprintf(out, sizeof(out), "closed-%d", i);
        shell(said, sizeof(said), "(%s %s)", command_line(out, "--steps 4 --save-every 2"), closed[i]);
        assert_latest(out, "checkpoint-4");
        assert_log(out, 4, 2);
    }
}

// A limit on the size of files is an error like a full disk.
void test_file_size_limit(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    expect(run_tiny("limit", "--steps 2"), 0, NULL);
    expect(shell(said, sizeof(said), "ulimit -f 16; %s", command_line("limit", "--steps 4 --resume")), 1,
           "unfinished-checkpoint/model.safetensors: cannot write: File too large");
    assert_true(!exists("limit/unfinished-checkpoint"));
    assert_latest("limit", "checkpoint-2");
    expect(run_tiny("limit", "--steps 4 --resume"), 0, "What next");
}

// SIGHUP and SIGTERM save and end as Ctrl-C does, SIGHUP also when it comes twice, and the end of the reader of the output.
void test_signals(void **state) {
    (void)state;
    need_program();
    static const int signals[] = {SIGHUP, SIGTERM, SIGINT};
    int status, stopped;
    size_t size;
    char out[32], name[64], path[64];
    for (int i = 0; i < COUNT(signals); i++) {
        snprintf(out, sizeof(out), "signal-%d", i);
        snprintf(path, sizeof(path), "%s/latest/config.json", out);
        pid_t child = start_tiny(out, "--steps 1000000 --save-every 3");
        assert_int_equal(wait_for(child, scratch_file(path), "{"), -1);
        kill(child, signals[i]);
        if (signals[i] == SIGHUP)
            kill(child, signals[i]);
        waitpid(child, &status, 0);
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 130);
        char *text = read_file(scratch_file("said"), &size), *at = strstr(text, "stopped after step ");
        assert_non_null(at);
        assert_int_equal(sscanf(at, "stopped after step %d", &stopped), 1);
        free(text);
        snprintf(name, sizeof(name), "checkpoint-%d", stopped);
        assert_latest(out, name);
    }

    // | head: without SIGPIPE's default in the shell it would not be noticed at all.
    shell(said, sizeof(said), "{ %s; echo status $? > %s; } | head -n 1", command_line("piped", "--steps 1000000"), scratch_file("piped-status"));
    char *text = read_file(scratch_file("piped-status"), &size);
    assert_string_equal(text, "status 130\n");
    free(text);
    assert_true(exists("piped/latest/model.safetensors"));
    assert_all_whole("piped");
    shell(said, sizeof(said), "tail -n 1 %s | tr , '\\n' | sed -n 's/\"step\":/checkpoint-/p'; readlink %s", scratch_file("piped/log.jsonl"),
          scratch_file("piped/latest"));
    char *second = strchr(said, '\n');
    assert_non_null(second);
    assert_true(!strncmp(said, second + 1, (size_t)(second - said))); // it stopped where it was saved
}

// nohup ignores SIGHUP: the run goes on. A second SIGTERM in the same step ends it at once.
void test_more_signals(void **state) {
    (void)state;
    need_program();
    int status;
    char line[2200];
    snprintf(line, sizeof(line), "trap '' HUP; exec %s", command_line("nohup", "--steps 1000000 --save-every 3"));
    pid_t child = start_line(line);
    assert_int_equal(wait_for(child, scratch_file("nohup/latest/config.json"), "{"), -1);
    kill(child, SIGHUP);
    usleep(300000);
    assert_int_equal(waitpid(child, &status, WNOHANG), 0); // it is still there
    kill(child, SIGTERM);
    waitpid(child, &status, 0);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 130);

    child = start_tiny("hasty", "--steps 1000000 --accum 20000 --log-every 0"); // its first step takes long
    assert_int_equal(wait_for(child, scratch_file("hasty/log.jsonl"), "\"run\""), -1);
    usleep(200000); // signals are caught from behind that line on
    kill(child, SIGTERM);
    usleep(50000);
    kill(child, SIGTERM);
    double start = seconds();
    waitpid(child, &status, 0);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM && seconds() - start < 1);
}

// A clock that stands still, or runs backwards, leaves a log of JSON, and no inf or nan on the terminal.
void test_clocks(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    static const char *const how[] = {"still", "backwards"};
    for (int i = 0; i < 2; i++) {
        char out[32], breaks[64];
        snprintf(out, sizeof(out), "clock-%s", how[i]);
        snprintf(breaks, sizeof(breaks), "BREAK_CLOCK=%s timeout 60", how[i]);
        expect(run_broken(breaks, out, "--steps 4 --eval-every 2"), 0, "What next");
        assert_null(strstr(said, "inf "));
        assert_null(strstr(said, "nan"));
        assert_log(out, 4, 2);
        assert_true(log_has(out, "\"ms\":null"));
    }
}

void write_finite_text(const char *text, const char *wanted) {
    char *found = NULL;
    size_t size;
    FILE *file = open_memstream(&found, &size);
    write_finite(file, text, strlen(text));
    fclose(file);
    assert_string_equal(found, wanted);
    free(found);
}

void test_finite_log(void **state) {
    (void)state;
    write_finite_text("", "");
    write_finite_text("{\"a\":inf,\"b\":-inf,\"c\":[nan,-nan,1,-2.5e-3,null,true]}\n",
                      "{\"a\":null,\"b\":null,\"c\":[null,null,1,-2.5e-3,null,true]}\n");
    write_finite_text("{\"inf\":\"nan -inf \\\" inf \\\\\",\"b\":nan}", "{\"inf\":\"nan -inf \\\" inf \\\\\",\"b\":null}");
    write_finite_text("[-", "[-");
    write_finite_text("[-in", "[-in");
}

// A mapped token file is not held in memory.
void test_mapped_memory(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    char options[300];
    int32_t header[256] = {TOKENS_MAGIC, 1, 200000000};
    expect(shell(said, sizeof(said), "cp -a %s %s", scratch_file("data"), scratch_file("large")), 0, NULL);
    put_file("large/train_2.bin", (const char *)header, sizeof(header));
    assert_int_equal(truncate(scratch_file("large/train_2.bin"), 1024 + 2 * (off_t)header[2]), 0); // a hole
    snprintf(options, sizeof(options), "--steps 1 --eval-every 0 --sample-every 0 --data %s", scratch_file("large"));
    expect(run_tiny("mapped", options), 0, "of tokens are mapped, not held");
    size_t size;
    char *text = read_file(scratch_file("mapped/log.jsonl"), &size), *line = text;
    Json *json = next_line(&line, text + size);
    const Json *memory = json_get(json, "memory");
    assert_true(json_get(memory, "mapped")->number == 2.0 * (200000000 + 3777 + 30000));
    assert_true(json_get(memory, "program")->number < 1e8);
    json_free(json);
    free(text);
}

// ---------------------------------------------------------------------------------------------------------------------
// --prompt -, and commands that are printed

// Standard input may be a pipe, a file or a socket. Line breaks at the end of a prompt do not count, however it comes.
void test_prompt_input(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    char plain[4096], line[2200];
    expect(run_tiny("asked", "--steps 3"), 0, NULL);
    expect(run_tiny("asked", "--prompt hello --tokens 20"), 0, "hello");
    assert_true(said_size < sizeof(plain));
    memcpy(plain, said, said_size + 1);
    expect(run_tiny("asked", "--prompt \"$(printf 'hello\\n\\nx')\" --tokens 20"), 0, "hello\n\n"); // inside it they count
    static const char *const ends_of_lines[] = {"\n", "\n\n", "\r\n", "\r\n\r\n", "\r"};
    for (int i = 0; i < COUNT(ends_of_lines); i++) {
        char text[32], options[64];
        snprintf(text, sizeof(text), "hello%s", ends_of_lines[i]);
        snprintf(options, sizeof(options), "--prompt '%s' --tokens 20", text);
        expect(run_tiny("asked", options), 0, NULL);
        assert_string_equal(said, plain);
        put_text("question", text);
        expect(shell(said, sizeof(said), "%s < %s", command_line("asked", "--prompt - --tokens 20"), scratch_file("question")), 0, NULL);
        assert_string_equal(said, plain);
    }
    expect(shell(said, sizeof(said), "%s <&-", command_line("asked", "--prompt - --tokens 20")), 1, "standard input: cannot read");

    int ends[2], status;
    size_t size;
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
    snprintf(line, sizeof(line), "exec %s", command_line("asked", "--prompt - --tokens 20"));
    pid_t child = fork();
    if (child == 0) {
        int file = open(scratch_file("answer"), O_WRONLY | O_CREAT | O_TRUNC, 0666);
        dup2(ends[0], 0);
        dup2(file, 1);
        dup2(file, 2);
        close(ends[1]);
        execl("/bin/sh", "sh", "-c", line, (char *)NULL);
        _exit(127);
    }
    close(ends[0]);
    assert_int_equal(write(ends[1], "hello\n", 6), 6);
    close(ends[1]);
    waitpid(child, &status, 0);
    assert_int_equal(status, 0);
    char *text = read_file(scratch_file("answer"), &size);
    assert_string_equal(text, plain);
    free(text);
}

// What a shell makes of a quoted word is the word.
void check_quoted(const char *shell_name, const char *word) {
    char *quoted = quote_for_shell(word);
    char command[1024];
    snprintf(command, sizeof(command), "printf '<%%s>' %s", quoted);
    put_text("quoted.sh", command);
    shell(said, sizeof(said), "%s %s", shell_name, scratch_file("quoted.sh"));
    said[said_size] = 0;
    snprintf(command, sizeof(command), "<%s>", word);
    if (strcmp(said, command))
        fail_msg("%s takes %s for %s, not for %s", shell_name, quoted, said, command);
    for (const char *c = quoted; *c; c++)
        assert_true(!iscntrl((unsigned char)*c));
    free(quoted);
}

void test_quoted_words(void **state) {
    (void)state;
    if (is_slow())
        skip();
    static const char *const words[] = {"", "runs/mixtral-2", "a b", "it's", "''", "$HOME", "`ls`", "-x", "~", "~root", "a\\b", "\"", "*",
                                        "a;b", "a&b|c", "(x)", "#x", "!x", "=ls", "gr\303\266\303\237e", "{a,b}", "\\'"};
    static const char *const control[] = {"a\nb", "\t", "it's\n", "\\\n", "\x1b[2J", "\00123", "\n$HOME`ls`\""};
    for (int i = 0; i < COUNT(words); i++)
        check_quoted("sh", words[i]);
    assert_string_equal(quote_for_shell("runs/mixtral-2"), "runs/mixtral-2");
    if (shell(said, sizeof(said), "command -v bash") != 0)
        skip();
    for (int i = 0; i < COUNT(control); i++)
        check_quoted("bash", control[i]);
    uint64_t random = 5;
    for (int i = 0; i < 100; i++) {
        char word[24];
        int n = draw(&random, 0, 20);
        for (int k = 0; k < n; k++)
            word[k] = (char)draw(&random, 1, 127);
        word[n] = 0;
        check_quoted("bash", word);
    }
}

// The commands that a run prints work as they stand.
void test_printed_commands(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    char line[2400], out[64] = "it's a \"run\"; $HOME", *word;
    snprintf(line, sizeof(line), "%s", command_line("PLACE", "--steps 1"));
    char *place = strstr(line, "PLACE"), rest[2200];
    assert_non_null(place);
    while (place > line && place[-1] != ' ')
        place--;
    snprintf(rest, sizeof(rest), "%s", place + strcspn(place, " "));
    word = quote_for_shell(scratch_file(out));
    snprintf(place, sizeof(line) - (size_t)(place - line), "%s%s", word, rest);
    expect(shell(said, sizeof(said), "%s", line), 0, "What next");
    char wanted[512];
    snprintf(wanted, sizeof(wanted), "--out %s --prompt \"Once upon a time\"\n", word);
    expect(0, 0, wanted);
    snprintf(wanted, sizeof(wanted), "--out %s --resume --steps 2\n", word);
    expect(0, 0, wanted);
    snprintf(line, sizeof(line), "%s --out %s --prompt Once --tokens 3", getenv("TRAIN_MOE") ? getenv("TRAIN_MOE") : "./train_moe", word);
    expect(shell(said, sizeof(said), "%s", line), 0, "Once");
    free(word);
}

// A run that was ended before it saved anything: the user reads that nothing is there to go on with.
void test_unsaved_run(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    assert_int_equal(mkdir(scratch_file("unsaved"), 0777), 0);
    put_text("unsaved/log.jsonl", "{\"type\":\"run\"}\n{\"type\":\"step\",\"step\":1}\n");
    expect(run_tiny("unsaved", "--steps 2"), 2, "the log of a run that has saved nothing");
    expect(run_tiny("unsaved", "--steps 2 --resume"), 0, "nothing was saved there, so the run begins anew");
    assert_log("unsaved", 2, 2);
}

// Training goes on with another validation text, and says so.
void test_other_validation(void **state) {
    (void)state;
    char options[512];
    need_program();
    check_leaks(0);
    expect(run_tiny("validated", "--steps 2"), 0, NULL);
    expect(shell(said, sizeof(said), "cp -a %s %s", scratch_file("data"), scratch_file("otherwise")), 0, NULL);
    snprintf(options, sizeof(options), "--resume --steps 3 --data %s", scratch_file("otherwise"));
    expect(run_tiny("validated", options), 0, NULL);
    assert_null(strstr(said, "validation tokens"));
    put_tokens("otherwise/val_0.bin", 30000, 265, 4);
    snprintf(options, sizeof(options), "--resume --steps 4 --data %s", scratch_file("otherwise"));
    expect(run_tiny("validated", options), 0, "these are not the validation tokens of the steps before");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_flipped_bits),      cmocka_unit_test(test_flipped_digits),  cmocka_unit_test(test_replaced_weights),
        cmocka_unit_test(test_newest_whole),      cmocka_unit_test(test_newest_run),      cmocka_unit_test(test_removed_aside),
        cmocka_unit_test(test_no_locks),          cmocka_unit_test(test_no_links),        cmocka_unit_test(test_unread_folders),
        cmocka_unit_test(test_closed_descriptors), cmocka_unit_test(test_file_size_limit), cmocka_unit_test(test_signals),
        cmocka_unit_test(test_more_signals),      cmocka_unit_test(test_clocks),          cmocka_unit_test(test_finite_log),
        cmocka_unit_test(test_mapped_memory),     cmocka_unit_test(test_prompt_input),    cmocka_unit_test(test_quoted_words),
        cmocka_unit_test(test_printed_commands),  cmocka_unit_test(test_unsaved_run),
        cmocka_unit_test(test_other_validation),
        cmocka_unit_test(test_unseen_checkpoints),
    };
    begin_tests();
    return cmocka_run_group_tests_name("files", tests, NULL, scratch_done);
}
