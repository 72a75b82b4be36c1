// Tiny runs of the programs of either twin. Gives: twin_program, starts_no_program, start_twin, run_either. Needs: dev/test/runs.h.

#pragma once
#include "dev/test/runs.h"

const char *twin_program(void) {
    return getenv("TRAIN_MOE_CU") ? getenv("TRAIN_MOE_CU") : "./train_moe_cu";
}

// The program has a precision of its own, whatever that of these tests is. So only the tests in bfloat16 start it.
int starts_no_program(void) {
    return !LOW || access(twin_program(), X_OK) != 0;
}

// Tiny runs start the CUDA twin's program from now on; returns what TRAIN_MOE was before, for end_twin().
char *begin_twin(void) {
    char *before = getenv("TRAIN_MOE") ? strdup(getenv("TRAIN_MOE")) : NULL;
    setenv("TRAIN_MOE", twin_program(), 1);
    return before;
}

void end_twin(char *before) {
    if (before)
        setenv("TRAIN_MOE", before, 1);
    else
        unsetenv("TRAIN_MOE");
    free(before);
}

// A tiny run of the CUDA twin, which is not waited for.
pid_t start_twin(const char *out, const char *more) {
    char *before = begin_twin();
    pid_t child = start_tiny(out, more);
    end_twin(before);
    return child;
}

// A tiny run of either program.
int run_either(int twin, const char *out, const char *more) {
    char *before = twin ? begin_twin() : NULL;
    int status = run_tiny(out, more);
    if (twin)
        end_twin(before);
    return status;
}
