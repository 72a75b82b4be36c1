// Runs with a teacher, of ./train_moe or of the program that TRAIN_MOE names: what the tests of the C program and those of the CUDA
// twin share. Gives: taught_size, need_teacher, taught_by, check_taught_resume, check_untaught, check_replaced_teacher. Needs: dev/test/runs.h.

#pragma once
#include "dev/test/runs.h"

const char *taught_size = ""; // options that make all models here smaller

int run_sized(const char *out, const char *more) {
    char options[1200];
    snprintf(options, sizeof(options), "%s %s", more, taught_size);
    return run_tiny(out, options);
}

pid_t start_sized(const char *out, const char *more) {
    char options[1200];
    snprintf(options, sizeof(options), "%s %s", more, taught_size);
    return start_tiny(out, options);
}

void need_teacher(int steps) {
    char options[80];
    need_program();
    snprintf(options, sizeof(options), "--steps %d --dim 48 --lr 0.02", steps);
    if (!exists("teacher"))
        expect(run_sized("teacher", options), 0, "What next");
}

const char *taught_by(const char *name, const char *more) {
    static char options[1024];
    snprintf(options, sizeof(options), "--teacher %s %s", scratch_file(name), more);
    return options;
}

// Half of the steps, SIGKILL and the other half give the bits of all steps; the teacher's run may go on in the meantime.
void check_taught_resume(int steps, int of_teacher) {
    char options[120], half[40], found[80];
    snprintf(options, sizeof(options), "--recipe dense --accum 2 --steps %d --save-every %d", steps, steps / 2);
    snprintf(found, sizeof(found), "/teacher/checkpoint-%d: mixtral, ", of_teacher);
    expect(run_sized("whole", taught_by("teacher", options)), 0, found);
    assert_true(logged("whole", "step", steps, "teacher") > 0);
    snprintf(half, sizeof(half), "\"step\":%d,", steps / 2 + 1);
    for (int attempt = 0, status = 0; !WIFSIGNALED(status); attempt++) {
        assert_true(attempt < 5); // it was always done before it could be killed
        remove_tree(scratch_file("halves"));
        pid_t child = start_sized("halves", taught_by("teacher", options));
        status = wait_for(child, scratch_file("halves/log.jsonl"), half);
        if (status == -1) {
            kill(child, SIGKILL);
            waitpid(child, &status, 0);
        }
    }
    snprintf(half, sizeof(half), "checkpoint-%d", steps / 2);
    assert_latest("halves", half);
    snprintf(options, sizeof(options), "--resume --steps %d --dim 48", of_teacher + 1);
    expect(run_sized("teacher", options), 0, "What next");
    snprintf(options, sizeof(options), "--recipe dense --resume --steps %d --save-every %d", steps, steps / 2);
    expect(run_sized("halves", options), 0, "What next");
    assert_same_weights("whole", "halves");
    assert_true(logged("whole", "step", steps, "teacher") == logged("halves", "step", steps, "teacher"));
    check_leaks(0);
    expect(run_tiny("halves", "--prompt ab"), 0, "ab"); // without the teacher
    check_leaks(1);
}

// With w = 0 a run has the bits of one without a teacher.
void check_untaught(int steps) {
    char options[80];
    snprintf(options, sizeof(options), "--recipe dense --steps %d", steps);
    expect(run_sized("alone", options), 0, "What next");
    snprintf(options, sizeof(options), "--recipe dense --steps %d --distill-weight 0", steps);
    expect(run_sized("beside", taught_by("teacher", options)), 0, "its loss counts 0 ");
    assert_same_weights("alone", "beside");
    assert_true(isnan(logged("alone", "step", steps, "teacher")) && isnan(logged("beside", "step", steps, "teacher")));
}

// A teacher is known by its weights. Other ones under its name are refused, unless the user names it again.
void check_replaced_teacher(void) {
    char dir[256];
    strcpy(dir, scratch_file("replaced"));
    expect(shell(said, sizeof(said), "cp -rL %s/latest %s", scratch_file("teacher"), dir), 0, "");
    expect(run_sized("learner", taught_by("replaced", "--steps 1")), 0, "What next");
    expect(shell(said, sizeof(said), "rm %s/checksums.json", dir), 0, ""); // where there is no list, they are known as well
    expect(run_sized("learner", "--resume --steps 2"), 0, "What next");

    // One byte of the last tensor is another one.
    expect(shell(said, sizeof(said), "cd %s && n=$(wc -c < model.safetensors) && printf x | dd of=model.safetensors bs=1 "
                 "seek=$((n - 3)) conv=notrunc", dir), 0, "");
    check_leaks(0);
    expect(run_sized("learner", "--resume --steps 3"), 1, "/replaced: its weights are not those that taught until step 2; put those back");
    check_leaks(1);
    expect(run_sized("learner", taught_by("replaced", "--resume --steps 3")), 0, "not those that taught until step 2; the run goes on");
    expect(run_sized("learner", "--resume --steps 4"), 0, "What next");
    assert_null(strstr(said, "not those that taught"));
}
