// Running programs through the shell and looking at what they say.
// Gives: shell, said, expect, check_leaks, assert_same_file. Needs: dev/test/common.h.

#pragma once
#include "dev/test/common.h"

char said[1 << 16]; // by the last program, on stdout and stderr
size_t said_size;

// Runs a command line. Returns its exit status, or the number of the signal that ended it, negative.
int shell(char *output, size_t size, const char *format, ...) {
    char command[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof(command) - 16, format, args);
    va_end(args);
    strcat(command, " 2>&1");
    FILE *pipe = popen(command, "r");
    assert_non_null(pipe);
    said_size = fread(output, 1, size - 1, pipe);
    output[said_size] = 0;
    while (fgetc(pipe) != EOF) {
    }
    int status = pclose(pipe);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

// Switches AddressSanitizer's search for leaks on or off: a program that ends with an error does not free its memory.
void check_leaks(int yes) {
    if (yes)
        unsetenv("ASAN_OPTIONS");
    else
        setenv("ASAN_OPTIONS", "detect_leaks=0", 1);
}

void expect(int status, int wanted, const char *text) {
    if (status != wanted || (text && !memmem(said, said_size, text, strlen(text)))) // a text may have NULs
        fail_msg("exit status %d, expected %d and \"%s\"; it said:\n%s", status, wanted, text ? text : "", said);
}

void assert_same_file(const char *a, const char *b) {
    size_t n, m;
    char *x = read_file(a, &n), *y = read_file(b, &m);
    assert_int_equal(n, m);
    assert_memory_equal(x, y, n);
    free(x);
    free(y);
}
