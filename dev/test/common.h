// What all test programs share: comparing two numbers, memory that notices what is written outside of it, small random
// numbers, temporary files, and functions that are meant to end the process.
// Gives: assert_near, take, free_taken, draw, pick, scratch_file, put_text, dies, begin_tests. Needs: dev/util.h; cmocka.

#pragma once
#include "dev/util.h"
#include <setjmp.h>
#include <sys/wait.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/lsan_interface.h>
#endif
#ifdef __cplusplus
extern "C" {
#endif
#include <cmocka.h>
#ifdef __cplusplus
}
#endif

// Fails if a and b differ by more than tolerance times the larger of |b| and 1, or if one of them is NaN.
void assert_near(double a, double b, double tolerance) {
    if (!(fabs(a - b) <= tolerance * fmax(1, fabs(b))))
        fail_msg("%.17g is not within %g of %.17g", a, tolerance, b);
}

// Whether sizes should be small: under valgrind everything takes fifty times as long.
int is_slow(void) {
    return getenv("VALGRIND") != NULL;
}

void set_threads(int threads) {
#ifdef _OPENMP
    omp_set_num_threads(threads);
#else
    (void)threads;
#endif
}

// Memory for a test, filled with zeros. free_taken() gives all of it back at the end of the test and fails if somebody wrote
// outside of it. In front of each array lies a fence of bytes 0xff (NaN, when read as numbers). Behind it there is a fence
// in half of the cases; in the other half AddressSanitizer sees who reads too far. Arrays begin at odd addresses, seldom at
// one that is convenient for vectors.
typedef struct Taken {
    unsigned char *memory;
    size_t before, size, after;
} Taken;

Taken taken[4096];
int taken_count = 0;

void *take(size_t count, size_t size) {
    static uint64_t turn = 0;
    uint64_t random = hash64(turn++);
    Taken t = {NULL, 64 + random % 16 * (size < 8 ? size : 8), count * size, random / 16 % 2 * 64};
    assert_true(taken_count < 4096);
    t.memory = (unsigned char *)allocate(t.before + t.size + t.after, 1);
    memset(t.memory, 0xff, t.before);
    memset(t.memory + t.before + t.size, 0xff, t.after);
    taken[taken_count++] = t;
    return t.memory + t.before;
}

int *take_ints(size_t n) {
    return (int *)take(n, sizeof(int));
}

void free_taken(void) {
    while (taken_count > 0) {
        Taken t = taken[--taken_count];
        int bad = 0;
        for (size_t i = 0; i < t.before + t.after; i++)
            bad += t.memory[i < t.before ? i : i + t.size] != 0xff;
        free(t.memory);
        if (bad)
            fail_msg("%d bytes were written outside array %d, of %zu bytes", bad, taken_count, t.size);
    }
}

// A random whole number from low to high, both included. *state changes with each draw.
int draw(uint64_t *state, int low, int high) {
    *state = hash64(*state);
    return low + (int)(*state % (uint64_t)(high - low + 1));
}

int pick(uint64_t *state, const int *list, int count) {
    return list[draw(state, 0, count - 1)];
}

char scratch_folder[64];

// A path in a temporary folder. It stays valid until scratch_file() has been called eight more times.
const char *scratch_file(const char *name) {
    static char paths[8][256];
    static int next;
    if (!scratch_folder[0]) {
        strcpy(scratch_folder, "/tmp/test_moe-XXXXXX");
        assert_non_null(mkdtemp(scratch_folder));
    }
    char *path = paths[next++ % 8];
    snprintf(path, sizeof(paths[0]), "%s/%s", scratch_folder, name);
    return path;
}

int scratch_done(void **state) {
    (void)state;
    if (scratch_folder[0]) {
        remove_tree(scratch_folder);
        scratch_folder[0] = 0; // all.c has several groups of tests, each with a folder of its own
    }
    return 0;
}

const char *put_file(const char *name, const char *text, size_t size) {
    const char *path = scratch_file(name);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    fwrite(text, 1, size, file);
    assert_int_equal(fclose(file), 0);
    return path;
}

const char *put_text(const char *name, const char *text) {
    return put_file(name, text, strlen(text));
}

// Runs fn(arg) in a process of its own, and puts into message what it wrote on stderr. Returns the exit status, or the number
// of the signal that ended it, negative.
int dies(void (*fn)(void *), void *arg, char *message, size_t size) {
    int ends[2], status;
    size_t used = 0;
    ssize_t got;
    fflush(NULL);
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        close(ends[1]);
#ifdef __SANITIZE_ADDRESS__
        __lsan_disable(); // it dies without freeing, and of its parent's threads it has but one
#endif
        fn(arg);
        _exit(0);
    }
    close(ends[1]);
    while (used < size - 1 && (got = read(ends[0], message + used, size - 1 - used)) > 0)
        used += (size_t)got;
    message[used] = 0;
    close(ends[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

// The beginning of every main: TEST=pattern runs only the tests whose names match; * and ? stand for anything.
void begin_tests(void) {
    // A shell's command in the background, and nohup, ignore signals that tests send to programs.
    signal(SIGINT, SIG_DFL);
    signal(SIGQUIT, SIG_DFL);
    signal(SIGHUP, SIG_DFL);
    set_threads(1); // small models are slower with more
    not_worth_threads = 0;
    if (getenv("TEST"))
        cmocka_set_test_filter(getenv("TEST"));
}
