// --teacher: the model that teaches is read from its directory, and what the program says of it.
// Gives: open_teacher, close_teacher, describe_teacher, teacher_flops, print_teacher. Needs: dev/teacher.h, load_model of
// dev/few_bits.h; Run of dev/run.h, which includes it.
#pragma once

size_t load_model(Run *run, const char *dir, int tokens);

// The folder of the teacher: a checkpoint, the newest one of a run, or a Hugging Face directory. A checkpoint of the student has
// the name of that folder, so that a run that goes on has the same teacher even where the teacher's own run has gone on, too.
const char *teacher_directory(const Run *run) {
    const char *name = run->config.teacher;
    if (!is_there(name)) {
        fail("--teacher %s: there is no such folder%s", name,
             run->step ? ", and the run has learned from it until now: put it back, or say by --teacher DIR where it is, or give "
                         "--teacher \"\" to go on without a teacher"
                       : "; give that of a checkpoint, of a run, or of a Hugging Face model");
    }

    // A run's `latest` is a link to its newest checkpoint, and leads to another one when that run goes on.
    char path[4096], parent[4096];
    size_t n = strlen(name), of_link = strlen("/latest");
    while (n > 1 && name[n - 1] == '/') {
        n--;
    }
    if (n > of_link && !strncmp(name + n - of_link, "/latest", of_link)) {
        snprintf(parent, sizeof(parent), "%.*s", (int)(n - of_link), name);
        return model_directory(find_latest(parent, path) ? keep_text(path) : name);
    }
    return model_directory(name);
}

// Stops unless the teacher has the student's words: its probabilities are compared number by number.
void compare_with_teacher(const Run *run, const char *dir, const Config *its) {
    const Config *c = &run->config;
    char path[4200];
    snprintf(path, sizeof(path), "%s/tokenizer.json", dir);
    if (!has_file(dir, "tokenizer.json")) {
        fail("--teacher %s: there is no tokenizer.json, so nobody knows whether its tokens are those of the data in %s; put the "
             "one that it was trained with there",
             dir, c->data);
    }
    Tokenizer *other = tokenizer_load(path);
    int differs = tokenizer_differs(other, run->tokenizer);
    if (differs >= 0 && differs < run->tokenizer->vocab) {
        fail("--teacher %s: token %d of its %d is not that of the data in %s, which have %d; a teacher must have the student's "
             "tokenizer: train one on these data, or make the data with data/tokenize --tokenizer %s",
             dir, differs, other->vocab, c->data, run->tokenizer->vocab, quote_for_shell(path));
    }
    if (differs >= 0) {
        fail("--teacher %s: the merges of its tokenizer are not those of the data in %s; make the data with data/tokenize "
             "--tokenizer %s",
             dir, c->data, quote_for_shell(path));
    }
    if (its->vocab < c->vocab) {
        fail("--teacher %s: it has %d tokens, the student %d", dir, its->vocab, c->vocab);
    }
    tokenizer_free(other);
}

// Reads the teacher's weights. A fingerprint of them comes of the checksums that reading takes anyway.
void read_teacher(Run *of_teacher, const Run *run) {
    const Config *c = &run->config;
    Ranks all = be_alone();
    teacher.fingerprint = 0;
    fingerprint_of_read = &teacher.fingerprint;
    load_model(of_teacher, c->teacher, c->batch * c->seq);
    fingerprint_of_read = NULL;
    ranks = all;
    teacher.model = of_teacher->model;
    teacher.loss = 0;

    // Each of several processes has read it, maybe on another machine.
    uint64_t first = teacher.fingerprint;
    ranks_meet(); // what comes next waits inside MPI, where nobody keeps the watch
    broadcast(&first, sizeof(first));
    if (first != teacher.fingerprint) {
        fail("--teacher %s: its weights are not those that rank 0 has read under this name: give all machines the same folder",
             c->teacher);
    }
}

// Stops where the weights that were read are not those that have taught until now, unless the user names the teacher anew.
void compare_with_taught(const Run *run, const char *checkpoint) {
    const Config *c = &run->config;
    char path[4200];
    size_t size;
    snprintf(path, sizeof(path), "%s/trainer_state.json", checkpoint);
    char *text = read_file(path, &size);
    Json *state = json_parse(text, size, path);
    const Json *before = json_get(state, "teacher_fingerprint"); // none: nobody has taught, or nobody has noted it
    int other = before && !checksum_matches(before, teacher.fingerprint), named = c->given[find_option("teacher")];
    json_free(state);
    free(text);
    if (other && !named) {
        fail("--teacher %s: its weights are not those that taught until step %d; put those back, or name it again, --resume "
             "--teacher %s, to go on with these",
             c->teacher, run->step, quote_for_shell(c->teacher));
    }
    if (other) {
        remark("--teacher %s: its weights are not those that taught until step %d; the run goes on with these", c->teacher, run->step);
    }
}

// Reads the teacher, if the options ask for one, after the student's model was made. checkpoint: from which the student goes on;
// NULL: it begins.
void open_teacher(Run *run, const char *checkpoint) {
    Config *c = &run->config;
    Run of_teacher;
    Config *t = &of_teacher.config;
    if (!c->teacher[0]) {
        return;
    }
    c->teacher = keep_text(teacher_directory(run));
    run->model->config.teacher = c->teacher;
    memset(&of_teacher, 0, sizeof(of_teacher));
    of_teacher.backend = run->backend;
    check_small_files(c->teacher);
    int window = config_from_directory(t, c->teacher);
    if (window && window < c->seq) {
        fail("--teacher %s: sliding_window is %d in its config.json: attention has no window here; give --seq %d or less, where it "
             "makes no difference (now: --seq %d)",
             c->teacher, window, window, c->seq);
    }
    compare_with_teacher(run, c->teacher, t);
    t->teacher = "";
    t->evaluate = 1; // it is only read, so it may have few bits
    t->seq = c->seq;
    t->batch = c->batch;
    t->precision = c->precision;
    config_check(t);
    t->group = SEQUENCE; // as at evaluation
    t->recompute = 1;    // activations of one layer are enough, since there is no way back

    read_teacher(&of_teacher, run);
    if (checkpoint) {
        compare_with_taught(run, checkpoint);
    }
}

void close_teacher(const Run *run) {
    if (teacher.model) {
        Ranks all = be_alone();
        run->backend->release(teacher.model);
        ranks = all;
        teacher.model = NULL;
    }
}

// The operations of the teacher's forward pass for a token: a third of what a training step of that model takes.
double teacher_flops(const Config *c) {
    return teacher_works(c) ? flops_per_token(&teacher.model->config) / 3 : 0;
}

// Says how large the teacher is, on the terminal and in the log's first line.
void print_teacher(Run *run) {
    const Config *c = &run->config;
    double total, active, bytes = 0, mib = 1048576;
    if (!teacher.model) {
        return;
    }
    const Model *m = teacher.model;
    count_parameters(&m->config, &total, &active);
    for (int i = 0; i < HARDLY_TOUCHED; i++) {
        bytes += (double)m->bytes[i];
    }
    printf("teacher %s: %s, %.2f million weights, %.2f at work for each token, in %.1f MiB more (weights %.1f); its loss counts %g "
           "at a temperature of %g, that of the text %g\n",
           c->teacher, m->config.recipe, total / 1e6, active / 1e6, bytes / mib, (double)m->bytes[FOR_WEIGHTS] / mib,
           c->distill_weight, c->distill_temperature, 1 - c->distill_weight);
    fprintf(run->log, "\"teacher_params\":%.0f,\"teacher_bytes\":%.0f,", total, bytes);
}

// The teacher's part of a step's loss, of all processes together, for the log and for a line on the terminal.
void describe_teacher(const Config *c, char logged[64], char shown_as[64]) {
    logged[0] = shown_as[0] = 0;
    if (teacher_works(c)) {
        double loss = teacher.loss;
        sum_over_ranks(&loss, 1);
        snprintf(logged, 64, ",\"teacher\":%.9g", loss);
        snprintf(shown_as, 64, "  teacher %.4f", loss);
    }
}
