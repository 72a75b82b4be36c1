// A run: how it is opened, stepped and closed, and the start and the end of the program.
// Gives: Run, open_run, begin_step, next_batch, end_step, close_run, run_program; and what the #includes below say.
// Needs: the model, the files and Backend of train_moe.c, which includes it.
//
// The training loop itself is in train_moe.c. Nothing is written before all is checked.
#pragma once

// What the trial of --minutes measured, in seconds; all 0 where there was none.
typedef struct Pace {
    double step, window, token, save; // a training step, a window of validation for each process, ...
    double planned;                   // the whole run, from its beginning to its end
    int tried;                        // steps that were timed
} Pace;

typedef struct Run {
    Config config;
    const Backend *backend;
    Model *model;
    Tokenizer *tokenizer;
    Data *train, *val;
    int *inputs, *targets; // (B,T)
    char out[2048];        // the run directory
    FILE *log;             // lines for the log, in memory: flush_log() writes them to the file
    char *log_text;
    size_t log_size;
    FILE *log_file, *trace;
    int links;             // can the run directory have symbolic links?
    int opened;            // is there something to train?
    int step, saved;       // steps done; those of the last checkpoint
    int trained;           // steps whose loads are in the statistics
    int stop;              // one of the processes was asked to stop
    double peak;           // operations per second, measured
    double sheet;          // the same by the data sheet; 0: unknown
    double flops;          // of a token
    double val_before;     // fingerprint of the validation tokens of a run that goes on; 0: unknown
    double before;         // bytes of memory that the process held before it had data and a model
    unsigned char *warned; // (L) what a warning was printed of: 1 a dead expert, 2 an uneven load
    uint64_t *probe;       // (windows, L, tokens) the sets of experts that a few windows had at the last evaluation
    double timed;          // when the steps began that the log has not yet shown
    int timed_step;        // and the step before them
    double paused;         // when the last step ended
    double began;          // when the run was opened
    Pace pace;
    char base[4096];       // with --lora: where the frozen weights are, and what tells them from others
    uint64_t base_print;
    Traffic traffic;       // messages since the log's last line, by then
} Run;

Batch next_batch(Run *run, int micro);
void first_model(Run *run);
#include "quote.h"    // words as a shell takes them
#include "finite.h"   // NaN and infinities, and where they come from
#include "remember.h" // what a checkpoint remembers of the routers
#include "save.h"     // the checkpoints of a run
#include "open_teacher.h" // --teacher
#include "log.h"      // the log and the terminal
#include "evaluate.h" // validation, a story, what each expert likes to read
#include "minutes.h"  // --minutes

volatile sig_atomic_t stop_asked = 0;

void ask_stop(int signal_number) {
    (void)signal_number;
    stop_asked = 1;
}

// These signals end the run after its step, and what it has is saved. A second Ctrl-C or SIGTERM ends it at once. SIGHUP,
// which comes twice when a terminal is closed, and SIGPIPE, which comes with each line that nobody reads, never do; where
// the caller ignores these two (nohup), they stay ignored.
void catch_signals(void) {
    static const int once[] = {SIGINT, SIGTERM}, often[] = {SIGHUP, SIGPIPE};
    struct sigaction action, before;
    memset(&action, 0, sizeof(action));
    action.sa_handler = ask_stop;
    action.sa_flags = SA_RESTART; // it breaks off no write
    for (int i = 0; i < 2; i++) {
        sigaction(often[i], NULL, &before);
        if (before.sa_handler != SIG_IGN) {
            sigaction(often[i], &action, NULL);
        }
    }
    action.sa_flags |= (int)SA_RESETHAND;
    for (int i = 0; i < 2; i++) {
        sigaction(once[i], &action, NULL);
    }
#ifdef USE_MPI
    sigaction(SIGUSR1, &action, NULL); // which mpirun passes on to all processes
    if (ranks.rank > 0) {
        signal(SIGPIPE, SIG_IGN); // it prints nothing
    }
#endif
}

// ---- opening: which directory, which cores, which tokenizer

// The run directory where none is given: for a new run the first free one of runs/RECIPE, runs/RECIPE-2, ...; else the
// one with the newest checkpoint, of that recipe if one is given.
void default_out(const Config *asked, int fresh, char out[2048]) {
    const char *recipe = asked->recipe;
    snprintf(out, 2048, "runs/%s", recipe);
    for (int n = 2; fresh && is_there(out); n++) {
        snprintf(out, 2048, "runs/%s-%d", recipe, n);
    }
    struct timespec newest = {0, 0};
    DIR *dir = fresh ? NULL : find_folder("runs");
    const char *name;
    while (dir && (name = next_name(dir, "runs")) != NULL) {
        char path[2048];
        struct stat info;
        size_t n = strlen(recipe);
        snprintf(path, sizeof(path), "runs/%.1000s", name);
        int of_recipe = !strncmp(name, recipe, n) && (!name[n] || name[n] == '-');
        if ((asked->given[find_option("recipe")] && !of_recipe) || !stat_latest(path, &info)) {
            continue;
        }
        struct timespec time = file_time(&info);
        if (time.tv_sec > newest.tv_sec || (time.tv_sec == newest.tv_sec && time.tv_nsec >= newest.tv_nsec)) {
            newest = time;
            snprintf(out, 2048, "runs/%.1000s", name);
        }
    }
    if (dir) {
        closedir(dir);
    }
}

void share_cores(const Config *c) {
    share_processors(c->threads, ranks.size > 1 ? ranks_of_machine() : 1); // all processes ask, whatever they are told
}

// The tokenizer that --tokenizer names, that of the data folder, or that of the checkpoint that is resumed.
void load_tokenizer(Run *run, const char *checkpoint) {
    const char *data = run->config.data, *dir = has_file(data, "tokenizer.json") || !checkpoint ? data : checkpoint;
    char path[4200];
    snprintf(path, sizeof(path), "%s/tokenizer.json", dir);
    refuse_half_replaced(data);
    if (!has_file(dir, "tokenizer.json") && !run->config.tokenizer[0]) {
        closedir(open_folder(data)); // says so where there is no such folder
        fail("%s: no tokenizer.json there; name the one that the data were made with by --tokenizer FILE", data);
    }
    run->tokenizer = tokenizer_load(run->config.tokenizer[0] ? run->config.tokenizer : path);
}

// Stops unless dir/tokenizer.json, where there is one, encodes the data's texts as the data's tokenizer does. That of a
// checkpoint may have more added tokens, which the data do not use: then it is kept, and goes into the new checkpoints.
void compare_tokenizers(Run *run, const char *dir) {
    char path[4200];
    snprintf(path, sizeof(path), "%s/tokenizer.json", dir);
    Tokenizer *mine = run->tokenizer;
    if (mine->vocab > run->config.vocab) {
        fail("%s: the model has %d tokens, the data's tokenizer %d", dir, run->config.vocab, mine->vocab);
    }
    if (!has_file(dir, "tokenizer.json")) {
        return;
    }
    Tokenizer *other = tokenizer_load(path);
    int is_kept = mine->vocab > other->vocab && !strcmp(dir, run->config.data); // mine, from the checkpoint
    const Tokenizer *small = is_kept ? other : mine;
    int differs = tokenizer_differs(is_kept ? mine : other, small);
    if (differs >= 0 && differs < small->vocab) {
        fail("%s: token %d is not that of the data in %s; make the data with data/tokenize --tokenizer %s", path,
             differs, run->config.data, quote_for_shell(path));
    }
    if (differs >= 0) {
        fail("%s: its merges are not those of the data in %s; make the data with data/tokenize --tokenizer %s", path,
             run->config.data, quote_for_shell(path));
    }
    if (other->vocab > run->config.vocab) {
        remark("%s has %d tokens, the model %d: the data's tokenizer is kept", path, other->vocab, run->config.vocab);
    } else if (other->vocab > mine->vocab) {
        run->tokenizer = other;
        other = mine;
    }
    tokenizer_free(other);
}

#include "ranks/same.h" // several processes: all must have been started for the same run
#include "tasks.h" // what the program does instead of training: --prompt, --evaluate, --merge, --quantize, --export

// Groups of processes that have all experts among them.
void divide_experts(const Config *c) {
    (void)c;
#ifdef USE_MPI
    int moe = moe_layers(c), ep = c->ep ? c->ep : 1;
    for (int n = 2; !c->ep && moe && n <= ranks.size; n++) {
        ep = ranks.size % n == 0 && c->experts % n == 0 ? n : ep;
    }
    if (!moe && ep > 1) {
        usage_fail("--ep %d: this model has no experts to divide", ep);
    }
    if (ranks.size % ep || (moe && c->experts % ep)) {
        usage_fail("--ep %d: it must divide the %d ranks and the %d experts", ep, ranks.size, c->experts);
    }
    if (c->replicate && (ep == 1 || c->replicate > c->experts)) {
        usage_fail("--replicate %d: at most all %d experts can have a copy, and there must be another rank to have it "
                   "(here: --ep %d)",
                   c->replicate, c->experts, ep);
    }
    compress_refuses(c, ep);
    offload_refuses_ranks(c, ep);
    if (ranks.size > 1) {
        ranks_form(comm.all, ep);
    }
#endif
}

// ---- opening: from a checkpoint, or from the beginning

// A checkpoint's batch is that of all processes. These share it, or cut the same step into other pieces.
void share_batch(Config *c, const Config *asked, const char *checkpoint) {
    long all = (long)c->batch * c->accum; // sequences of a step
    if (asked->given[find_option("batch")]) {
        c->batch = asked->batch;
        c->accum = asked->given[find_option("accum")] ? asked->accum : (int)(all / c->batch / ranks.size);
        if ((long)c->batch * c->accum * ranks.size != all) {
            usage_fail("%s: a step there has %ld sequences, which must be --batch times --accum times %d rank%s", checkpoint,
                       all, ranks.size, ranks.size > 1 ? "s" : "");
        }
    } else if (c->batch % ranks.size) {
        usage_fail("%s: a micro-step there has %d sequences, which %d ranks cannot share evenly; --batch makes other "
                   "ones",
                   checkpoint, c->batch, ranks.size);
    } else {
        c->batch /= ranks.size;
    }
}

// Goes on from a checkpoint. Returns 0 where all steps are done.
int resume_run(Run *run, const Config *asked, const char *checkpoint) {
    Config *c = &run->config;
    char path[4200];
    check_small_files(checkpoint);
    snprintf(path, sizeof(path), "%s/trainer_state.json", checkpoint);
    size_t size;
    char *text = read_file(path, &size);
    Json *state = json_parse(text, size, path);
    config_from_directory(c, checkpoint);
    const Config before = *c;
    share_batch(c, asked, checkpoint);
    join_options(c, asked, 1 << MODEL | 1 << ORDER | 1 << TRAIN, 1 << MODEL | 1 << ORDER, checkpoint);
    double step = expect_member(state, "step", 'i', path)->number;
    if (!(step >= 1 && step <= 2e9)) {
        fail("%s: step is %g; expected a number from 1 to 2e9", path, step);
    }
    run->step = (int)step;
    int unfinished = run->step < c->steps;
    if (!unfinished) {
        compare_ranks(run);
        printf("%s is finished: %d steps of %d. To go on, give more --steps\n", run->out, run->step, c->steps);
    } else {
        double fingerprint = expect_member(state, "data_fingerprint", 'n', path)->number;
        const Json *val = json_get(state, "val_fingerprint"); // not in checkpoints of earlier days
        run->val_before = val ? val->number : 0;
        config_check(c);
        refuse_idle_options(c, &before);
        check_warmup(c, &before);
        refuse_other_minutes(run, asked, &before);
        load_tokenizer(run, checkpoint);
        run->before = memory_now();
        run->train = data_open(c->data, "train", c->seq, c->vocab, (uint64_t)c->seed);
        if (run->train->fingerprint != fingerprint) {
            fail("%s: these are not the training tokens that the run in %s began with, and they may not change",
                 c->data, run->out);
        }
        compare_tokenizers(run, checkpoint);
    }
    json_free(state);
    free(text);
    return unfinished;
}

// Begins a new run, with --init from other weights.
void start_run(Run *run, const Config *asked) {
    Config *c = &run->config;
    if (c->init[0]) {
        Config mine = *asked;
        mine.init = model_directory(asked->init);
        check_small_files(mine.init);
        int window = config_from_directory(c, mine.init);
        if (!asked->given[find_option("recipe")]) { // the checkpoint's, whose training options go with its model
            config_recipe(&mine, c->recipe);
        }
        join_options(c, &mine, 1 << MODEL, 1 << MODEL, asked->init);
        refuse_window(c, window, c->init);
    }
    if (c->lora && !c->init[0]) {
        usage_fail("--lora %d trains pairs beside the weights of a model that exists: name it by --init DIR", c->lora);
    }
    config_check(c);
    refuse_idle_options(c, NULL);
    if (!c->minutes) { // with it, the number of steps is not known yet
        check_warmup(c, NULL);
    }
    if (!c->data[0]) {
        c->data = has_file("data/tinystories", "tokenizer.json") ? "data/tinystories" : "data/stories";
    }
    load_tokenizer(run, NULL);
    run->before = memory_now();
    if (c->init[0]) {
        compare_tokenizers(run, c->init);
    } else {
        c->vocab = run->tokenizer->vocab;
    }
    run->train = data_open(c->data, "train", c->seq, c->vocab, (uint64_t)c->seed);
}

// The model of a run that begins, with new weights or those of --init.
void first_model(Run *run) {
    Config *c = &run->config;
    run->model = run->backend->create(c, c->batch * c->seq, 1, NULL);
    if (c->init[0]) {
        load_weights(run, c->init, 0);
        begin_adapter(run);
    } else {
        double *frequency = data_frequency(run->train, c->vocab);
        run->backend->init(run->model, frequency);
        free(frequency);
    }
}

// Everything that is read before the first step: options, data, model. Returns 0 where there is nothing left to do.
int prepare_run(Run *run, const Config *asked) {
    Config *c = &run->config;
    char checkpoint[4096];
    struct stat latest;
    if (has_file(run->out, "config.json")) {
        usage_fail("%s is a model, not a run directory: start from it by --init, or resume the run that holds it",
                   run->out);
    }
    int resumed = asked->resume && find_checkpoint(run->out, 1, checkpoint), count;
    long left = smallest_checkpoint(run->out, &count);
    if (asked->resume && !resumed && left >= 0) {
        fail("%s/latest does not lead to a checkpoint, and none of those beside it is whole", run->out);
    }
    if (asked->resume && !resumed && stat_latest(run->out, &latest)) { // a run that was killed before it had one has none
        fail("%s/latest leads to no checkpoint, and none is beside it: put them back, or begin anew with another --out",
             run->out);
    }
    int logged = has_file(run->out, "log.jsonl");
    if (!asked->resume && left >= 0) {
        usage_fail("%s holds a run already: go on with it by --resume, or choose another --out", run->out);
    }
    if (!asked->resume && logged) {
        usage_fail("%s holds the log of a run that has saved nothing: remove that folder, or choose another --out", run->out);
    }
    if (!resumed && logged) {
        remark("%s: nothing was saved there, so the run begins anew, with the options of this command line", run->out);
    }
    if (!resumed) {
        start_run(run, asked);
    } else if (!resume_run(run, asked, checkpoint)) {
        return 0;
    }
    compare_tokenizers(run, c->data);
    run->val = data_open(c->data, "val", c->seq, c->vocab, (uint64_t)c->seed);
    if (resumed && run->val_before && run->val_before != run->val->fingerprint) {
        remark("%s: these are not the validation tokens of the steps before, so their losses cannot be compared", c->data);
    }
    run->inputs = (int *)allocate((size_t)c->batch * c->seq, sizeof(int));
    run->targets = (int *)allocate((size_t)c->batch * c->seq, sizeof(int));
    compare_ranks(run);

    // The model: the optimizer's moments are read where the run goes on, the weights also where it starts from others.
    divide_experts(c);
    if (resumed) {
        run->model = run->backend->create(c, c->batch * c->seq, 1, NULL);
        load_weights(run, checkpoint, 1);
    } else {
        first_model(run);
    }
    open_teacher(run, resumed ? checkpoint : NULL);
    run->warned = (unsigned char *)allocate(c->layers, 1);
    if (resumed) {
        read_router_state(run, checkpoint);
        read_lost(run, checkpoint);
    }
    return 1;
}

// The log, which a lock keeps from other processes, and the trace.
void open_log(Run *run) {
    char path[4200];
    ranks_meet(); // before the first file is written, all have seen that there is none
    make_directories(run->out);
    snprintf(path, sizeof(path), "%s/log.jsonl", run->out);
    run->log = open_memory(&run->log_text, &run->log_size);
    run->log_file = fopen(ranks.rank ? "/dev/null" : path, "ab"); // the first process writes it
    if (!run->log_file) {
        fail("%s: cannot open: %s", path, strerror(errno));
    }
    if (!ranks.rank) {
        if (lock_run(fileno(run->log_file), run->out)) {
            remove_leftovers(run->out);
        }
        run->links = has_links(run->out);
        cut_log(path, run->step);
    }
    ranks_meet();
    if (run->config.trace) {
        snprintf(path, sizeof(path), "%s/trace-%d.jsonl", run->out, ranks.rank);
        cut_log(path, run->step);
        run->trace = fopen(path, "ab");
        if (!run->trace) {
            fail("%s: cannot open: %s", path, strerror(errno));
        }
    }
}

// Everything before the first step. run->opened says if there is something to train; if not, the exit status is
// returned.
int open_run(Run *run, int argc, char **argv, const Backend *backend) {
    Config asked;
    memset(run, 0, sizeof(*run));
    run->began = seconds();
    parse_command_line(&asked, argc, argv);
    if (asked.help || asked.list_recipes) {
        asked.help ? print_options() : print_recipes();
        return 0;
    }
    if (asked.init[0] && (asked.prompt || asked.resume)) {
        usage_fail("--init starts a new run from other weights; --%s goes on from --out: give one of them",
                   asked.prompt ? "prompt" : "resume");
    }
    refuse_two_tasks(&asked);
    share_cores(&asked);
    run->config = asked;
    trust_files = asked.trust_weights;
    run->backend = backend;
    if (strlen(asked.out) > 1900) {
        usage_fail("--out: a path of %zu bytes is too long", strlen(asked.out));
    }
    if (asked.out[0]) {
        snprintf(run->out, sizeof(run->out), "%s", asked.out);
    } else {
        default_out(&asked, !asked.resume && !task_of(&asked), run->out);
    }
    ranks.watchdog = 10 * asked.watchdog; // some may read longer than others
    data_tick = ranks_tick;               // and answer while they read
    data_part = ranks.rank;               // each checks a part of the token files
    data_parts = ranks.size;
    broadcast(run->out, sizeof(run->out));
    run->config.offload_dir = asked.offload_dir = folder_of_offload(&asked, run->out);
    if (task_of(&asked)) {
        do_task(run, &asked);
        return 0;
    }
    if (!prepare_run(run, &asked)) {
        return 0;
    }
    open_log(run);
    ranks.watchdog = asked.watchdog;
    ready_products(run->config.precision); // so that the trial takes what the run will take
    decide_steps(run);
    announce(run);
    report_decision(run);
    catch_signals();
    const Traffic none = {0, 0, 0};
    ranks.traffic = none;
    run->saved = run->timed_step = run->step;
    run->timed = run->paused = seconds();
    run->opened = 1;
    return 0;
}

// ---- the steps

int is_due(int step, int every) {
    return every > 0 && step % every == 0;
}

// Ctrl-C stops after the step. No process of several may stop alone: they agree at the end of a step.
int asked_to_stop(const Run *run) {
    return run->stop || (ranks.size == 1 && stop_asked);
}

// The time and the messages between two steps (evaluation, stories, saving) are not counted as the steps'.
void begin_step(Run *run) {
    run->timed += seconds() - run->paused;
    ranks.traffic = run->traffic;
}

// This process's sequences of a micro-step of the step that begins.
Batch next_batch(Run *run, int micro) {
    const Config *c = &run->config;
    long first = ((long)micro * ranks.size + ranks.rank) * c->batch; // its first sequence in the step
    long done = (long)run->step * c->accum * c->batch * ranks.size;  // sequences of the steps before
    data_batch(run->train, done + first, c->batch, run->inputs, run->targets);
    Batch batch = {run->inputs, run->targets, c->batch, c->seq, TRAIN_MODE, 1.0 / c->accum / ranks.size,
                   run->step + 1, first * c->seq, micro == 0, micro == c->accum - 1};
    return batch;
}

// The step's losses, of all processes together; the norm is that of all of them already.
void sum_losses(const Backend *backend, Model *m, double *loss, double *aux, double *norm) {
    double both[2];
    backend->losses(m, &both[0], &both[1], norm);
    sum_over_ranks(both, 2);
    *loss = both[0];
    *aux = both[1];
}

// After the step's update: its losses, warnings, and from time to time a line of the log.
void end_step(Run *run, int step, double lr) {
    const Config *c = &run->config;
    double loss, aux, norm;
    sum_losses(run->backend, run->model, &loss, &aux, &norm);
    check_step(run, step, loss, aux, norm);
    run->step = step;
    run->trained++;
    if (run->trace) {
        trace_step(run);
    }
    warn_of_routing(run);
    double asked = stop_asked;
    sum_over_ranks(&asked, 1);
    run->stop = asked > 0;
    if (is_due(step, c->log_every) || step == 1 || step == c->steps || run->stop) {
        report_step(run, loss, aux, norm, lr);
    }
    run->paused = seconds();
    run->traffic = ranks.traffic;
}

// ---- the end

// Saves what is not saved, says what can be done next, and gives all memory back. Returns the exit status: 130 where
// the run was stopped.
int close_run(Run *run) {
    const Config *c = &run->config;
    const char *name = program_name;
    char begin[32] = "", model[4096], *out = quote_for_shell(run->out), *of_ranks = options_of_ranks(c);
    int stopped = run->step < c->steps;
    if (run->saved != run->step) {
        save_checkpoint(run);
    }
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    if (ranks.size > 1) {
        snprintf(begin, sizeof(begin), "mpirun -np %d ", ranks.size);
    }
    if (stopped) {
        printf("\nstopped after step %d of %d; go on with\n  %s./%s --out %s --resume%s\n", run->step, c->steps, begin,
               name, out, of_ranks);
    } else {
        show_experts(run);
        snprintf(model, sizeof(model), run->links ? "%s/latest" : "%s/checkpoint-%d", run->out, run->step);
        const char *whole = *matching_class(c) ? "transformers opens as it is" : "transformers has no class for";
        printf("The run is in %s: log.jsonl, and in %s the %s, which Hugging Face's %s.\n"
               "What next:\n"
               "  ./%s --out %s --prompt \"Once upon a time\"\n"
               "  %s./%s --out %s --resume --steps %d%s\n"
               "  data/tinystories.sh && %s./%s        (real stories; see README.md)\n",
               run->out, model, c->lora ? "adapter" : "model", c->lora ? "peft opens beside its base" : whole, name, out, begin,
               name, out, c->steps * 2, of_ranks, begin, name);
        if (c->lora) {
            printf("  ./%s --out %s --merge DIR        (one model of the base and the adapter)\n", name, out);
        }
    }
    free(out);
    free(of_ranks);
    report_minutes(run);
    print_offload(c, stdout);
    close_log(run);
    if (run->trace) {
        fclose(run->trace);
    }
    run->backend->release(run->model);
    close_teacher(run);
    tokenizer_free(run->tokenizer);
    data_close(run->train);
    data_close(run->val);
    free(run->inputs);
    free(run->targets);
    free(run->warned);
    free(run->probe);
    return stopped ? 130 : 0;
}

// The start and the end of the program around `program`.
int run_program(int argc, char **argv, const Backend *backend, int (*program)(int, char **, const Backend *)) {
    open_standard_files();
    signal(SIGXFSZ, SIG_IGN); // a file that may not grow is an error like a full disk
    choose_waiting(argv);
    check_exp();
#ifdef USE_MPI
    int provided;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
    comm.all = MPI_COMM_WORLD;
    if (provided < MPI_THREAD_FUNNELED) {
        fail("this MPI cannot be used by a program of several threads");
    }
    MPI_Comm_rank(comm.all, &ranks.rank);
    MPI_Comm_size(comm.all, &ranks.size);
    MPI_Comm_dup(comm.all, &comm.watch);
    program_rank = ranks.rank;
    end_all = ranks.size > 1 ? abort_ranks : NULL;
    if (ranks.rank && !freopen("/dev/null", "w", stdout)) { // only the first process prints
        fail("/dev/null: cannot open: %s", strerror(errno));
    }
#endif
    int status = program(argc, argv, backend);
    int lost = ferror(stdout);
    if ((fflush(stdout) != 0 || lost) && !stop_asked) { // a run that was stopped may have lost its reader, or its terminal
        fail("standard output: cannot write: %s", lost ? "a part of it is lost" : strerror(errno));
    }
#ifdef USE_MPI
    MPI_Finalize();
#endif
    return status;
}
