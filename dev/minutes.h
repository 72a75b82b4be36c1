// --minutes: a budget of time instead of a number of steps. Before the first step, a trial measures how long a step, a
// window of validation, a token of a story and a checkpoint take; from that follows how many steps fit into the time.
// Gives: Pace, planned_seconds, steps_within, decide_steps, report_decision, report_minutes, refuse_other_minutes.
// Needs: Run, first_model and next_batch of dev/run.h, which includes it.
//
// The trial trains a model that is thrown away, on the run's first batches. So the run itself is, to the last bit, the
// one that --steps with the decided number would be: from its first step on, the learning rate follows the schedule of
// all its steps. The number is decided once. It stands in the log and in the checkpoints as that of --steps does, so a
// run that goes on keeps it. If the machine becomes slower or faster on the way, the schedule stays and the time
// changes, and the end of the run says how long it took.
#pragma once

#define BUDGET_USED 0.99 // of the time; the rest is for what the trial does not see

// Turns `work` again and again for about so many seconds, at least once, after a first turn that is not timed, since it
// touches memory for the first time and wakes the threads. Returns the mean seconds of a turn, and adds the number of
// timed ones to *turns. The first of several processes decides when it is enough.
double time_of(Run *run, void (*work)(Run *run, int turn), double limit, int *turns) {
    enum { MOST = 1 << 14 }; // turns, for a clock that stands still
    int count = 0, enough = 0;
    work(run, 0);
    double begin = seconds();
    while (!enough) {
        work(run, ++count);
        enough = count == MOST || !(seconds() - begin < limit);
        broadcast(&enough, sizeof(enough));
    }
    *turns += count;
    return (seconds() - begin) / count;
}

// ---- what is timed

// A training step like those of the loop in train_moe.c. The learning rate rises as in a long run.
void try_step(Run *run, int turn) {
    const Config *c = &run->config;
    double loss, aux, norm;
    Config endless = *c;
    endless.steps = 2000000000;
    run->step = turn;
    for (int micro = 0; micro < c->accum; micro++) {
        Batch batch = next_batch(run, micro);
        run->backend->forward(run->model, &batch);
        run->backend->backward(run->model);
    }
    run->backend->update(run->model, turn + 1, learning_rate(&endless, turn + 1));
    run->backend->losses(run->model, &loss, &aux, &norm); // waits
}

// A window of validation for each process.
void try_windows(Run *run, int turn) {
    (void)turn;
    evaluate(run, ranks.size);
}

// A token of a story, at all its places one after the other.
void try_token(Run *run, int turn) {
    real *logits = allocate_reals(run->config.vocab);
    run->backend->generate(run->model, run->tokenizer->eot, turn % run->config.tokens, logits);
    free(logits);
}

// A checkpoint, which is removed at once. Returns the seconds that it took.
double try_checkpoint(Run *run) {
    double begin = seconds();
    write_checkpoint(run);
    if (ranks.rank == 0) {
        remove_tree(unfinished_path);
        unfinished_path[0] = 0;
    }
    ranks_meet();
    return seconds() - begin;
}

// ---- the decision

// How often something happens that is due every so many steps and after the last one.
double times_due(int steps, int every) {
    return 1 + (every > 0 ? (steps - 1) / every : 0);
}

// The seconds that a run of so many steps takes from its first step to its end.
double planned_seconds(const Run *run, const Pace *pace, int steps) {
    Run plan = *run;
    Config *c = &plan.config;
    c->steps = steps;
    int moe = moe_layers(c) > 0, size = ranks.size;

    // Validation, in rounds of a window for each process: that on the way, the last one, and the eight windows that
    // show how much the routing has changed. At the end 32 batches show what the experts like to read.
    double evaluations = times_due(steps, c->eval_every);
    double rounds = (evaluations - 1) * div_up((int)evaluation_windows(&plan, 0), size);
    rounds += div_up((int)evaluation_windows(&plan, 1), size);
    rounds += moe * evaluations * div_up(8, size);
    rounds += moe * fmin(32.0 * c->batch, (double)run->val->windows / size);

    double tokens = times_due(steps, c->sample_every) * c->tokens;
    return steps * pace->step + rounds * pace->window + tokens * pace->token +
           times_due(steps, c->save_every) * pace->save;
}

// The largest number of steps that take no more than so many seconds; at least 1.
int steps_within(const Run *run, const Pace *pace, double limit) {
    int fits = 1, most = 2000000000; // the answer is one of fits .. most
    while (fits < most) {
        int middle = fits + (most - fits + 1) / 2;
        if (planned_seconds(run, pace, middle) <= limit) {
            fits = middle;
        } else {
            most = middle - 1;
        }
    }
    return fits;
}

// Before the first step of a run with --minutes: measures, and sets run->config.steps. What was read before and the
// trial itself, which takes about a fiftieth of the time, count as time that is used.
void decide_steps(Run *run) {
    Config *c = &run->config;
    Pace *pace = &run->pace;
    if (!c->minutes || run->step) { // a run that goes on has its number
        return;
    }
    double all = 60 * c->minutes;
    int turns = 0;
    pace->step = time_of(run, try_step, fmin(0.02 * all, 20), &pace->tried);
    pace->window = time_of(run, try_windows, fmin(0.002 * all, 2), &turns);
    pace->token = time_of(run, try_token, fmin(0.001 * all, 1), &turns);
    pace->save = try_checkpoint(run);
    if (!(pace->step > 0)) {
        fail("--minutes: the clock of this machine stands still, so nothing can be timed; give --steps");
    }
    run->step = 0;
    run->backend->release(run->model);
    first_model(run);
    c->steps = steps_within(run, pace, BUDGET_USED * all - (seconds() - run->began));
    broadcast(&c->steps, sizeof(c->steps));
    pace->planned = seconds() - run->began + planned_seconds(run, pace, c->steps);
    run->model->config.steps = c->steps;
}

// Says what was decided: a line on the terminal, one in the log. Called when the log has its first line.
void report_decision(Run *run) {
    const Config *c = &run->config;
    const Pace *pace = &run->pace;
    if (!pace->step) {
        return;
    }
    Config plan = *c;
    plan.given[find_option("warmup")] = 0; // it is not refused any more, but said
    check_warmup(&plan, NULL);
    printf("--minutes %g: %d steps of %.3g ms (%d were tried), with all else in %.3g minutes\n\n", c->minutes, c->steps,
           1000 * pace->step, pace->tried, pace->planned / 60);
    log_line(run, "minutes",
             "\"minutes\":%.9g,\"steps\":%d,\"tried\":%d,\"step_ms\":%.4g,\"window_ms\":%.4g,\"token_ms\":%.4g,"
             "\"save_ms\":%.4g,\"planned\":%.4g",
             c->minutes, c->steps, pace->tried, 1000 * pace->step, 1000 * pace->window, 1000 * pace->token,
             1000 * pace->save, pace->planned / 60);
}

// At the end: how long it took. A run that was interrupted has no figure.
void report_minutes(Run *run) {
    if (!run->pace.step || run->step < run->config.steps) {
        return;
    }
    double took = (seconds() - run->began) / 60;
    log_line(run, "end", "\"step\":%d,\"minutes\":%.4g,\"took\":%.4g", run->step, run->config.minutes, took);
    printf("All took %.3g of the %g minutes.\n", took, run->config.minutes);
}

// A run that goes on has its number of steps. before: what its checkpoint says.
void refuse_other_minutes(const Run *run, const Config *asked, const Config *before) {
    if (asked->given[find_option("minutes")] && asked->minutes != before->minutes) {
        usage_fail("--minutes %g: the run in %s has its %d steps already; --steps says how far it goes on", asked->minutes,
                   run->out, before->steps);
    }
}
