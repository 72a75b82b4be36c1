// --minutes: how many steps fit into a time, and a run that a trial decided on: the same bits as with --steps, kept when it
// goes on.

#include "dev/test/trainer.h"
#include "dev/test/runs.h"

// ---- the decision

// A run that plans: 100 windows of validation, of which an evaluation reads 6, and one batch of 2 a step.
void planning_run(Run *run, Data *val, const char *more) {
    memset(run, 0, sizeof(*run));
    memset(val, 0, sizeof(*val));
    run->config = small_config("dense");
    set_options(&run->config, "--seq 32 --batch 2 --accum 1 --eval-tokens 192 --tokens 10 --eval-every 4 --sample-every 0 --save-every 3");
    set_options(&run->config, more);
    val->windows = 100;
    run->val = val;
}

// What a plan adds up: steps, windows, tokens and checkpoints, at those steps at which they are due and at the end.
void test_minutes_plan(void **state) {
    (void)state;
    Run run;
    Data val;
    const Pace pace = {1, 1e-2, 1e-4, 1e-6, 0, 0};
    planning_run(&run, &val, "");
    assert_near(planned_seconds(&run, &pace, 1), 1 + 0.06 + 0.001 + 1e-6, 1e-9);
    assert_near(planned_seconds(&run, &pace, 4), 4 + 0.06 + 0.001 + 2e-6, 1e-9);   // due at 3; 4 is the end
    assert_near(planned_seconds(&run, &pace, 9), 9 + 3 * 0.06 + 0.001 + 3e-6, 1e-9); // 4, 8, end; 3, 6, end
    assert_near(planned_seconds(&run, &pace, 555), 555 + 139 * 0.06 + 0.001 + 185e-6, 1e-9);
    // Now 1110 windows are trained on, and all 100 are a third of 3% of the work at the end: 100 / 3 <= 0.03 * 2 * 556
    assert_near(planned_seconds(&run, &pace, 556), 556 + 138 * 0.06 + 1 + 0.001 + 186e-6, 1e-9);
    planning_run(&run, &val, "--eval-every 0 --save-every 0 --sample-every 2");
    assert_near(planned_seconds(&run, &pace, 9), 9 + 0.06 + 5 * 0.001 + 1e-6, 1e-9);
    planning_run(&run, &val, "--moe-every 1"); // eight windows more at each evaluation, and 32 batches at the end
    assert_near(planned_seconds(&run, &pace, 4), 4 + 0.06 + 0.08 + 0.64 + 0.001 + 2e-6, 1e-9);
}

// Of any time, the most steps that fit into it, and one where none does.
void test_minutes_fit(void **state) {
    (void)state;
    Run run;
    Data val;
    const Pace pace = {0.01, 0.003, 0.0002, 0.05, 0, 0};
    planning_run(&run, &val, "");
    for (double limit = 0.3; limit < 1e6; limit *= 1.7) {
        int steps = steps_within(&run, &pace, limit);
        assert_true(planned_seconds(&run, &pace, steps) <= limit);
        assert_true(planned_seconds(&run, &pace, steps + 1) > limit);
    }
    assert_int_equal(steps_within(&run, &pace, 0), 1);
    assert_int_equal(steps_within(&run, &pace, -5), 1);
    const Pace quick = {1e-9, 0, 0, 0, 0, 0};
    assert_int_equal(steps_within(&run, &quick, 60), 2000000000);
}

int turns_taken;

void take_turn(Run *run, int turn) {
    (void)run;
    assert_int_equal(turn, turns_taken++);
    usleep(turn ? 1000 : 100000); // the first turn is slow, and not counted
}

void test_minutes_timing(void **state) {
    (void)state;
    int turns = 5;
    turns_taken = 0;
    double once = time_of(NULL, take_turn, 0, &turns);
    assert_int_equal(turns, 6);
    assert_int_equal(turns_taken, 2);
    assert_true(once >= 0.001);
    turns = turns_taken = 0;
    double many = time_of(NULL, take_turn, 0.02, &turns);
    assert_int_equal(turns_taken, turns + 1);
    assert_true(many >= 0.001 && many * turns >= 0.02);
}

// ---- the program

// The command line of a run of a small fraction of a minute.
const char *minutes_line(const char *out, const char *more) {
    static char line[2048];
    snprintf(line, sizeof(line),
             "exec %s --data %s --out %s --layers 1 --dim 16 --heads 2 --ffn 16 --experts 4 --seq 16 --batch 1 --eval-tokens 64 "
             "--tokens 8 --threads 1 --log-every 500 --warmup 0 --eval-every 0 --save-every 0 %s",
             getenv("TRAIN_MOE") ? getenv("TRAIN_MOE") : "./train_moe", scratch_file("data"), scratch_file(out), more);
    return line;
}

// A run is the one that --steps with the decided number would be, which stands in the log and in the checkpoint.
void test_minutes_program(void **state) {
    (void)state;
    char more[200], line[200];
    need_program();
    expect(shell(said, sizeof(said), "%s", minutes_line("timed", "--minutes 0.01")), 0, "of the 0.01 minutes.");
    double steps = logged("timed", "minutes", 0, "steps");
    assert_true(steps >= 1 && steps == logged("timed", "run", 0, "steps"));
    assert_true(logged("timed", "minutes", 0, "minutes") == 0.01 && logged("timed", "run", 0, "minutes") == 0.01);
    assert_true(logged("timed", "minutes", 0, "step_ms") > 0 && logged("timed", "minutes", 0, "tried") >= 1);
    assert_true(logged("timed", "end", (int)steps, "took") > 0);
    snprintf(line, sizeof(line), "--minutes 0.01: %.0f steps of ", steps);
    expect(0, 0, line);
    snprintf(more, sizeof(more), "--steps %.0f", steps);
    expect(shell(said, sizeof(said), "%s", minutes_line("counted_steps", more)), 0, NULL);
    assert_same_weights("timed", "counted_steps");
    assert_true(isnan(logged("counted_steps", "minutes", 0, "steps")) && isnan(logged("counted_steps", "end", 0, "took")));
    assert_true(!exists("timed/unfinished-checkpoint") && !exists("timed/checkpoint-0"));
}

// Starts a run and ends it by a signal after its first steps. On a busy machine a run may be over before; then a new one has
// more time. Returns the minutes.
double break_off(const char *out) {
    char log[300], name[64], more[100];
    snprintf(name, sizeof(name), "%s/log.jsonl", out);
    snprintf(log, sizeof(log), "%s", scratch_file(name));
    for (double minutes = 0.02; minutes < 2; minutes *= 2) {
        snprintf(more, sizeof(more), "--minutes %g --resume", minutes);
        pid_t child = start_line(minutes_line(out, more));
        int status = wait_for(child, log, "\"step\":1,");
        if (status == -1) {
            kill(child, SIGINT);
            assert_int_equal(waitpid(child, &status, 0), child);
        }
        if (WIFEXITED(status) && WEXITSTATUS(status) == 130)
            return minutes;
        expect(WEXITSTATUS(status), 0, NULL);
        remove_tree(scratch_file(out));
    }
    fail_msg("no run of two minutes could be broken off");
    return 0;
}

// What is interrupted goes on by the same command line, with its number and its bits.
void test_minutes_resume(void **state) {
    (void)state;
    char more[200], again[100];
    need_program();
    double minutes = break_off("broken_off"), steps = logged("broken_off", "minutes", 0, "steps");
    check_leaks(0);
    snprintf(more, sizeof(more), "--minutes %g --resume", 2 * minutes);
    expect(shell(said, sizeof(said), "%s", minutes_line("broken_off", more)), 2, "steps already; --steps says how far");
    check_leaks(1);
    snprintf(again, sizeof(again), "--minutes %g --resume", minutes);
    expect(shell(said, sizeof(said), "%s", minutes_line("broken_off", again)), 0, "going on after step");
    assert_true(logged("broken_off", "run", 0, "steps") == steps);
    snprintf(more, sizeof(more), "checkpoint-%.0f", steps);
    assert_latest("broken_off", more);
    snprintf(more, sizeof(more), "--steps %.0f", steps);
    expect(shell(said, sizeof(said), "%s", minutes_line("unbroken", more)), 0, NULL);
    assert_same_weights("broken_off", "unbroken");
    snprintf(more, sizeof(more), "--resume --steps %.0f", steps + 3);
    expect(shell(said, sizeof(said), "%s", minutes_line("broken_off", more)), 0, "going on after step");
}

void test_minutes_refused(void **state) {
    (void)state;
    static const char *const refused[][2] = {
        {"--minutes 1 --steps 9", "it needs a number of steps that it can set: leave --steps out"},
        {"--minutes -1", "--minutes: '-1' is not a number from 0 to 1000000"},
        {"--minutes nan", "--minutes: 'nan' is not a number"},
        {"--minutes soon", "--minutes: 'soon' is not a number"},
        {"--minutes", "--minutes needs a value"},
    };
    need_program();
    check_leaks(0);
    for (int i = 0; i < COUNT(refused); i++)
        expect(shell(said, sizeof(said), "%s", minutes_line("no_time", refused[i][0])), 2, refused[i][1]);
    assert_true(!exists("no_time"));
    check_leaks(1);

    // A warm-up that turns out to be as long as the run is said, since the trial is over by then.
    expect(shell(said, sizeof(said), "%s", minutes_line("short_time", "--minutes 1e-9 --warmup 7")), 0, "the learning rate only rises");
    expect(0, 0, "--minutes 1e-09: 1 steps of ");
    check_leaks(0);
    expect(run_tiny("short_time", "--prompt hello --minutes 2"), 2, "it needs training");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_minutes_plan),
        cmocka_unit_test(test_minutes_fit),
        cmocka_unit_test(test_minutes_timing),
        cmocka_unit_test(test_minutes_program),
        cmocka_unit_test(test_minutes_resume),
        cmocka_unit_test(test_minutes_refused),
    };
    begin_tests();
    return cmocka_run_group_tests_name("minutes", tests, NULL, scratch_done);
}
