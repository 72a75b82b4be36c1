// What the program does on other people's machines: few threads, quotas, older processors, narrow terminals, small stacks.
// Needs ./train_moe, or the program that TRAIN_MOE names; what compilers refuse is in dev/test/builds.sh.

#include "dev/test/trainer.h"
#include "dev/test/model.h"
#include "dev/test/runs.h"
#include <dlfcn.h>
#include <poll.h>

// ---------------------------------------------------------------------------------------------------------------------
// The peak and the team

// The peak that a run of one step measures, with this wait policy and these options.
double peak_of_run(const char *policy, const char *options) {
    setenv("OMP_WAIT_POLICY", policy, 1);
    remove_tree(scratch_file("peak"));
    expect(run_tiny("peak", options), 0, "What next");
    setenv("OMP_WAIT_POLICY", "passive", 1);
    return logged("peak", "run", 0, "peak_gflops");
}

// The most that so many threads did in one of 16 ms, in any of five tries.
double best_rate(int threads) {
    double work[16], best = 0;
    for (int i = 0; i < 5; i++) {
        peak_work(threads, 1e-3, 16, work);
        for (int k = 0; k < 16; k++)
            best = fmax(best, work[k] / 1e-3);
    }
    return best;
}

// A stretch is as long as it was asked to be, and no more is counted in it than the processors do, however many threads
// share them.
void test_peak_work(void **state) {
    (void)state;
    double work[8], begin = seconds();
    peak_work(1, 2e-3, 8, work);
    assert_true(seconds() - begin >= 0.016);
    double one = best_rate(1), many = best_rate(16);
    assert_true(one > 0 && many > 0);
    if (processor_count() <= 2 && many > 6 * one)
        fail_msg("16 threads on %d processors did %g times what one did", processor_count(), many / one);
}

// Have two threads two processors to themselves? Then in nearly all stretches they do twice what one does at its best.
int is_quiet(void) {
    double work[16], one = best_rate(1);
    int full = 0, all = 0;
    for (int i = 0; i < 6; i++) {
        peak_work(2, 1e-3, 16, work);
        for (int k = 8; k < 16; k++, all++)
            full += work[k] / 1e-3 > 1.8 * one;
    }
    return full > 0.9 * all;
}

// Threads that sleep when the measurement begins are not counted as slow ones: the peak is the same as with threads that
// spin. A measurement of a fifth of a millisecond lost up to half of it. Where other programs keep the machine busy,
// nothing can be said.
void test_peak(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    double passive = 0, active = 0;
    int quiet = is_quiet();
    for (int i = 0; i < 8 && (i < 2 || passive < 0.9 * active); i++) {
        passive = fmax(passive, peak_of_run("passive", "--threads 2 --steps 1"));
        active = fmax(active, peak_of_run("active", "--threads 2 --steps 1"));
    }
    if (passive < 0.9 * active && quiet && is_quiet())
        fail_msg("peak %g GFLOP/s, and %g where threads are awake", passive, active);
}

// The threads that run are counted, not those that were asked for. In the log of a build without OpenMP there is one.
void test_team(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    double one = peak_of_run("passive", "--threads 1 --steps 1");
    setenv("OMP_THREAD_LIMIT", "1", 1);
    double limited = peak_of_run("passive", "--threads 32 --steps 1");
    unsetenv("OMP_THREAD_LIMIT");
    assert_true(logged("peak", "run", 0, "threads") == 1);
    expect(0, 0, ", 1 thread, peak ");
#ifdef _OPENMP
    expect(0, 0, "threads asked for: 32; OMP_THREAD_LIMIT or OMP_DYNAMIC allows no more than 1");
#else
    expect(0, 0, "built without OpenMP: one thread");
#endif
    if (!(limited < 8 * one)) // thirty-two times as much was claimed
        fail_msg("one thread's peak is %g GFLOP/s, that of one of 32 is %g", one, limited);
#ifdef _OPENMP
    peak_of_run("passive", "--threads 32 --steps 1");
    if (processor_count() < 32)
        expect(0, 0, "they will wait for each other; --threads ");
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// How threads wait

// A number that libgomp says of its settings; -1: it says nothing of it. The last start of the program counts.
long shown_setting(const char *name) {
    long value = -1;
    for (const char *at = said; (at = strstr(at, name)) != NULL; at++)
        sscanf(at + strlen(name), " = '%ld'", &value);
    return value;
}

// Where the user has set nothing, waiting threads stay awake for a moment and then sleep; what the user has set stays.
void test_waiting(void **state) {
    (void)state;
    need_program();
#ifndef _OPENMP
    skip();
#endif
    long looks = looks_in(1e-3);
    double best = 1;
    for (int i = 0; i < 20 && !(best < 1.5e-3); i++) {
        double start = seconds();
        looks_in(0);
        best = fmin(best, (seconds() - start) / 4000 * (double)looks); // it looks 4000 times
    }
    if (!(looks >= 1 && best < 4e-3))
        fail_msg("%ld looks should take a millisecond, and take %g s", looks, best);
    assert_int_equal(shell(said, sizeof(said), "unset OMP_WAIT_POLICY GOMP_SPINCOUNT KMP_BLOCKTIME; OMP_DISPLAY_ENV=verbose "
                           "%s -h", getenv("TRAIN_MOE") ? getenv("TRAIN_MOE") : "./train_moe"), 0);
    long turns = shown_setting("GOMP_SPINCOUNT");
    if (turns >= 0 && (turns < 50 || turns > 1000000 || turns == 300000)) // 300000 is libgomp's own default
        fail_msg("a waiting thread looks %ld times", turns);
    assert_int_equal(shell(said, sizeof(said), "unset OMP_WAIT_POLICY KMP_BLOCKTIME; GOMP_SPINCOUNT=77 OMP_DISPLAY_ENV=verbose "
                           "%s -h", getenv("TRAIN_MOE") ? getenv("TRAIN_MOE") : "./train_moe"), 0);
    turns = shown_setting("GOMP_SPINCOUNT");
    assert_true(turns == 77 || turns == -1);
}

// The parallel loops of a step of the default job. Each costs microseconds, and where threads sleep, tens of them.
#if defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__) && defined(RTLD_NEXT)
long parallel_loops;

// libgomp begins every parallel region by one of these two calls. A team of one thread is none.
void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags) {
    static void (*real_call)(void (*)(void *), void *, unsigned, unsigned);
    if (!real_call)
        *(void **)&real_call = dlsym(RTLD_NEXT, "GOMP_parallel");
    parallel_loops += threads != 1 && !omp_in_parallel();
    real_call(body, data, threads, flags);
}

void GOMP_parallel_loop_nonmonotonic_dynamic(void (*body)(void *), void *data, unsigned threads, long start, long end, long step,
                                             long chunk, unsigned flags) {
    static void (*real_call)(void (*)(void *), void *, unsigned, long, long, long, long, unsigned);
    if (!real_call)
        *(void **)&real_call = dlsym(RTLD_NEXT, "GOMP_parallel_loop_nonmonotonic_dynamic");
    parallel_loops += threads != 1 && !omp_in_parallel();
    real_call(body, data, threads, start, end, step, chunk, flags);
}

void check_parallel_loops(const char *optimizer, long most) {
    Config c;
    config_defaults(&c);
    config_recipe(&c, "mixtral");
    set_option(&c, &options[find_option("optimizer")], optimizer, NULL);
    config_check(&c);
    c.vocab = 500;
    int N = c.batch * c.seq, *tokens = take_ints(N);
    Model *m = model_allocate(&c, N, 1, NULL);
    model_init(m, NULL);
    random_tokens(tokens, N, c.vocab, 1);
    Batch batch = make_batch(tokens, tokens, c.batch, c.seq, TRAIN_MODE, 1, 1, 0);
    parallel_loops = 0;
    model_forward(m, &batch);
    model_backward(m);
    model_update(m, 1, 1e-3, gradient_norm(m));
    long found = parallel_loops;
    model_free(m);
    free_taken();
#ifdef PLAIN
    most = 1000;
#endif
    if (found < 10 || found > most)
        fail_msg("a step with %s has %ld parallel loops; it had %ld", optimizer, found, most);
}

void test_parallel_loops(void **state) {
    (void)state;
    if (is_slow() || IS_DOUBLE)
        skip();
    size_t before = not_worth_threads;
    not_worth_threads = 1 << 16;
    set_threads(2);
    check_parallel_loops("adamw", 46);
    check_parallel_loops("muon", 65);
    set_threads(1);
    not_worth_threads = before;
}
#else
void test_parallel_loops(void **state) {
    (void)state;
    skip();
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Quotas of control groups

// Makes the folders of a file, and the file.
void put_below(const char *root, const char *path, const char *text) {
    char name[256], folder[256];
    snprintf(name, sizeof(name), "%s%s", root, path);
    snprintf(folder, sizeof(folder), "%s", scratch_file(name));
    *strrchr(folder, '/') = 0;
    make_directories(folder);
    put_text(name, text);
}

void test_quota(void **state) {
    (void)state;
    static const struct {
        const char *files[4][2]; // path and text
        double quota;
    } cases[] = {
        {{{"/proc/self/cgroup", "0::/\n"}}, 0},
        {{{"/proc/self/cgroup", "0::/\n"}, {"/sys/fs/cgroup/cpu.max", "max 100000\n"}}, 0},
        {{{"/proc/self/cgroup", "0::/\n"}, {"/sys/fs/cgroup/cpu.max", "150000 100000\n"}}, 1.5},
        // the group's own, and a smaller one around it
        {{{"/proc/self/cgroup", "0::/a/b.slice\n"}, {"/sys/fs/cgroup/a/b.slice/cpu.max", "50000 100000\n"}}, 0.5},
        {{{"/proc/self/cgroup", "0::/a/b\n"},
          {"/sys/fs/cgroup/a/b/cpu.max", "400000 100000\n"},
          {"/sys/fs/cgroup/a/cpu.max", "100000 50000\n"}}, 2},
        // a container that is told its group's name outside
        {{{"/proc/self/cgroup", "0::/docker/abc\n"}, {"/sys/fs/cgroup/cpu.max", "25000 100000\n"}}, 0.25},
        // version 1
        {{{"/proc/self/cgroup", "5:memory:/m\n3:cpuset:/\n2:cpu,cpuacct:/d\n0::/\n"},
          {"/sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_quota_us", "300000\n"},
          {"/sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_period_us", "100000\n"}}, 3},
        {{{"/proc/self/cgroup", "1:cpu:/\n0::/\n"},
          {"/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n"},
          {"/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"}}, 0},
        {{{"/proc/self/cgroup", "no such lines\n::\n"}}, 0},
    };
    assert_true(processor_quota(scratch_file("no-such-root")) == 0);
    for (int i = 0; i < COUNT(cases); i++) {
        char root[32];
        snprintf(root, sizeof(root), "root-%d", i);
        for (int k = 0; k < 4 && cases[i].files[k][0]; k++)
            put_below(root, cases[i].files[k][0], cases[i].files[k][1]);
        assert_near(processor_quota(scratch_file(root)), cases[i].quota, 1e-12);
    }

    // threads, processors, quota, processes
    assert_int_equal(fair_threads(8, 8, 0, 1), 8);
    assert_int_equal(fair_threads(8, 8, 0.5, 1), 1);
    assert_int_equal(fair_threads(8, 8, 1.5, 1), 2);
    assert_int_equal(fair_threads(8, 8, 16, 1), 8);
    assert_int_equal(fair_threads(8, 8, 0, 3), 2);
    assert_int_equal(fair_threads(8, 8, 4, 8), 1);
    machine.quota = 0.5;
    assert_true(quota_share(2) == 0.25);
#ifdef _OPENMP
    char text[256];
    machine.shared = 1;
    describe_threads(text, 1, 1, 2);
    assert_non_null(strstr(text, "quota here is 0.5 of 2 processors, so there is 1 thread;"));
    machine.shared = 0;
    describe_threads(text, 2, 2, 2);
    assert_non_null(strstr(text, "2 threads for 0.5 processors (the quota here)"));
    machine.quota = 0;
    describe_threads(text, 2, 2, 2);
    assert_string_equal(text, "");
    describe_threads(text, 64, 64, 2);
    assert_non_null(strstr(text, "64 threads for 2 processors: they will wait for each other; --threads 2 is faster"));
#endif
    machine.quota = 0;
}

// In a group with a quota, where this user may make one, the default is a thread for each processor that it is worth.
void test_quota_of_run(void **state) {
    (void)state;
    need_program();
#ifndef _OPENMP
    skip();
#endif
    char line[2200];
    const char *folder = access("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", F_OK) == 0 ? "/sys/fs/cgroup/cpu" : "/sys/fs/cgroup";
    snprintf(line, sizeof(line), "%s", command_line("quota", "--steps 1"));
    char *threads = strstr(line, "--threads 1");
    memset(threads, ' ', strlen("--threads 1"));
    shell(said, sizeof(said),
          "unset OMP_NUM_THREADS; g=%s/train_moe_test_%d; mkdir $g 2>/dev/null || exit 77; q=0; "
          "if [ -e $g/cpu.max ]; then echo '50000 100000' > $g/cpu.max || q=1; "
          "elif [ -e $g/cpu.cfs_quota_us ]; then echo 50000 > $g/cpu.cfs_quota_us || q=1; else q=1; fi; "
          "if [ $q = 0 ]; then sh -c \"echo \\$\\$ > $g/cgroup.procs && exec %s\"; else echo no quotas; fi; rmdir $g",
          folder, (int)getpid(), line);
    if (!strstr(said, "What next")) {
        print_message("no control group with a quota can be made here: %.100s\n", said);
        skip();
    }
    if (processor_count() > 1) {
        expect(0, 0, "the processor quota here is 0.5 of");
        assert_true(logged("quota", "run", 0, "threads") == 1);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Instructions, arithmetic, the second start

void raise_illegal(void *arg) {
    (void)arg;
    ask_processor(); // once more, because cmocka has a handler of its own
    raise(SIGILL);
}

void begin_echo(void *arg) {
    char *argv[] = {(char *)"echo", (char *)"begun again", NULL};
    (void)arg;
    dup2(2, 1);
    begin_again("/no/such/program", argv);
}

void end_for_avx(void *arg) {
    (void)arg;
    end_on_other_processor("AVX-512");
}

void try_exp(void *arg) {
    (void)arg;
    check_exp();
}

void test_processor(void **state) {
    (void)state;
    char message[1024];
    assert_int_equal(dies(raise_illegal, NULL, message, sizeof(message)), 1);
    assert_string_equal(message, PROGRAM ": an illegal instruction: perhaps it was built for another processor; run make clean " PROGRAM
                                         " here\n");
    assert_int_equal(dies(end_for_avx, NULL, message, sizeof(message)), 1);
    assert_string_equal(message, PROGRAM ": built for a processor that has AVX-512, and this one does not: run make clean " PROGRAM
                                         " here\n");
    assert_int_equal(dies(try_exp, NULL, message, sizeof(message)), 0);
    assert_int_equal(dies(begin_echo, NULL, message, sizeof(message)), 0);
    assert_string_equal(message, "begun again\n");
}

// Is ./train_moe a program of this processor? Where an emulator runs the tests, it is a script that calls the emulator.
int runs_itself(void) {
    char begin[4] = "";
    FILE *file = fopen("./train_moe", "rb");
    size_t size = file ? fread(begin, 1, 4, file) : 0;
    if (file)
        fclose(file);
    return size == 4 && !memcmp(begin, "\177ELF", 4);
}

// The program that was built here, on an emulated processor of 2008. Where it needs nothing newer, it runs.
void test_older_processor(void **state) {
    (void)state;
    need_program();
#ifndef __x86_64__
    skip();
#endif
    if (getenv("TRAIN_MOE") || !runs_itself() || shell(said, sizeof(said), "command -v qemu-x86_64") != 0)
        skip();
    static const char *const programs[] = {"train_moe", "data/tokenize"};
    for (int i = 0; i < 2; i++) {
        int status = shell(said, sizeof(said), "qemu-x86_64 -cpu Nehalem ./%s -h", programs[i]);
#ifdef __AVX__
        expect(status, 1, "built for a processor that has AVX, and this one does not: run make clean ");
        assert_non_null(strstr(said, programs[i]));
#else
        expect(status, 0, "--threads");
#endif
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The terminal

int open_terminal(int columns, int *other) {
    int terminal = posix_openpt(O_RDWR | O_NOCTTY);
    struct winsize size;
    memset(&size, 0, sizeof(size));
    size.ws_row = 24;
    size.ws_col = (unsigned short)columns;
    assert_true(terminal >= 0 && grantpt(terminal) == 0 && unlockpt(terminal) == 0);
    *other = open(ptsname(terminal), O_RDWR | O_NOCTTY);
    assert_true(*other >= 0);
    assert_int_equal(ioctl(*other, TIOCSWINSZ, &size), 0);
    return terminal;
}

// What came to the terminal, until nothing more comes for so many milliseconds and the program, if there is one, has ended.
void read_terminal(int terminal, pid_t child) {
    size_t used = 0;
    int ended = 0;
    for (;;) {
        struct pollfd wait = {terminal, POLLIN, 0};
        ended = ended || child <= 0 || waitpid(child, NULL, WNOHANG) == child;
        if (poll(&wait, 1, ended ? 20 : 100) > 0 && (wait.revents & POLLIN)) {
            ssize_t got = read(terminal, said + used, sizeof(said) - 1 - used);
            used += got > 0 ? (size_t)got : 0;
        } else if (ended) {
            break;
        }
    }
    said[used] = 0;
    said_size = used;
}

// A tiny run with 16 experts and a long way to go, stopped after the first steps, on such a terminal.
void run_on_terminal(const char *kind, int columns) {
    int other, terminal = open_terminal(columns, &other);
    char line[2100];
    snprintf(line, sizeof(line), "exec %s", command_line("terminal", "--experts 16 --steps 6 --warmup 2"));
    remove_tree(scratch_file("terminal"));
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        dup2(other, 1);
        dup2(other, 2);
        kind ? setenv("TERM", kind, 1) : unsetenv("TERM");
        unsetenv("OMPI_COMM_WORLD_SIZE");
        unsetenv("PMI_SIZE");
        execl("/bin/sh", "sh", "-c", line, (char *)NULL);
        _exit(127);
    }
    close(other);
    read_terminal(terminal, child);
    close(terminal);
    expect(0, 0, "What next");
}

int columns_of(const char *begin, const char *end) {
    int columns = 0;
    for (; begin < end; begin++)
        columns += ((unsigned char)*begin & 0xc0) != 0x80;
    return columns;
}

void test_terminal(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    static const int widths[] = {20, 40, 80, 200};
    for (int i = 0; i < COUNT(widths); i++) {
        int lines = 0;
        run_on_terminal("xterm", widths[i]);
        for (const char *at = strstr(said, "\r["); at; at = strstr(at + 1, "\r")) {
            const char *end = strstr(at, "\033[K");
            if (!end || at[1] == '\n' || memchr(at + 1, '\n', (size_t)(end - at - 1)))
                continue;
            if (columns_of(at + 1, end) >= widths[i])
                fail_msg("%d columns on a terminal of %d: %.*s", columns_of(at + 1, end), widths[i], (int)(end - at - 1), at + 1);
            lines++;
        }
        if (widths[i] == 200)
            assert_true(lines >= 3);
    }
    static const char *const kinds[] = {"dumb", "", NULL};
    for (int i = 0; i < COUNT(kinds); i++) {
        run_on_terminal(kinds[i], 80);
        for (const char *at = said; *at; at++) // the terminal itself writes "\r\n" for "\n"
            assert_true(*at != '\033' && (*at != '\r' || at[1] == '\n'));
        expect(0, 0, "step 6/6  loss");
    }
}

// The width is asked for each line; a character counts as one column however many bytes it has.
void test_width(void **state) {
    (void)state;
    int other, terminal = open_terminal(24, &other);
    FILE *to = fdopen(other, "w");
    const char *const line = "[##..] 12/34  loss 1.234  \xe2\x96\x81\xe2\x96\x88\xe2\x96\x82";
    struct winsize size = {24, 18, 0, 0};
    char text[64];
    assert_non_null(to);
    strcpy(text, line);
    write_over(to, text, 7);
    fflush(to);
    ioctl(other, TIOCSWINSZ, &size);
    strcpy(text, line);
    write_over(to, text, 7);
    fflush(to);
    size.ws_col = 31;
    ioctl(other, TIOCSWINSZ, &size);
    strcpy(text, line);
    write_over(to, text, 7);
    fflush(to);
    read_terminal(terminal, 0);
    assert_string_equal(said, "\r12/34  loss 1.234  \xe2\x96\x81\xe2\x96\x88\xe2\x96\x82\033[K"
                              "\r12/34  loss 1.234\033[K"
                              "\r[##..] 12/34  loss 1.234  \xe2\x96\x81\xe2\x96\x88\xe2\x96\x82\033[K");
    fclose(to);
    close(terminal);
    strcpy(text, "\xe2\x96\x81\xe2\x96\x88");
    assert_int_equal(cut_columns(text, 1), 1);
    assert_string_equal(text, "\xe2\x96\x81");
    assert_int_equal(cut_columns(text, -3), 0);
    assert_string_equal(text, "");
}

// ---------------------------------------------------------------------------------------------------------------------
// Small stacks

void test_stack(void **state) {
    (void)state;
    need_program();
    if (getenv("TRAIN_MOE") || !runs_itself()) // a sanitizer and an emulator need more
        skip();
    expect(shell(said, sizeof(said), "ulimit -s 256; export OMP_STACKSIZE=64K; %s",
                 command_line("stack", "--threads 2 --dim 64 --ffn 300")), 0, "What next");
    expect(shell(said, sizeof(said), "ulimit -s 256; export OMP_STACKSIZE=64K; %s",
                 command_line("stack", "--prompt 'Once upon' --threads 2")), 0, "Once upon");
    put_text("stack.txt", "One day a fish swam.\n<|endoftext|>\nTwo fish swam home again.\n<|endoftext|>\nThree.\n");
    expect(shell(said, sizeof(said), "ulimit -s 256; OMP_STACKSIZE=64K data/tokenize --vocab 260 %s --out %s --threads 2",
                 scratch_file("stack.txt"), scratch_file("stack-data")), 0, "tokens in 1 file");
}

// The packed blocks of all threads are made for as many threads as there are, also when these become more.
void test_packing(void **state) {
    (void)state;
    enum { N = 150, I = 300, O = 310 };
    static const int threads[] = {1, 3, 2, 5};
    real *x = take_filled(N * I, 0), *w = take_filled(O * I, 0), *first = take_filled(N * O, 0), *out = take_filled(N * O, 0);
    for (int i = 0; i < N * I; i++)
        x[i] = (real)random_normal(1, (uint64_t)i);
    for (int i = 0; i < O * I; i++)
        w[i] = (real)random_normal(2, (uint64_t)i);
    for (int i = 0; i < COUNT(threads); i++) {
        set_threads(threads[i]);
        matmul(i ? out : first, x, w, N, I, O, 0);
        if (i)
            assert_memory_equal(first, out, N * O * sizeof(real));
    }
    set_threads(1);
    free_taken();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_peak_work), cmocka_unit_test(test_peak),
        cmocka_unit_test(test_team),          cmocka_unit_test(test_quota),
        cmocka_unit_test(test_waiting),       cmocka_unit_test(test_parallel_loops),
        cmocka_unit_test(test_quota_of_run), cmocka_unit_test(test_processor),  cmocka_unit_test(test_older_processor),
        cmocka_unit_test(test_terminal),  cmocka_unit_test(test_width),         cmocka_unit_test(test_stack),
        cmocka_unit_test(test_packing),
    };
    begin_tests();
    return cmocka_run_group_tests_name("machine", tests, NULL, scratch_done);
}
