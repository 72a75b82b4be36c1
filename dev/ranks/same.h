// Several processes: all must have been started for the same run.
// Gives: compare_ranks, options_of_ranks. Needs: comm.h; dev/options.h; Run of dev/run.h, which includes it.
//
// Each process writes down, a line each, what it was asked for and what it has found. The first one's text goes to all.
#pragma once

// The options of this call that all must have alike. Those that a checkpoint keeps are compared, too.
int is_shared_option(const Option *o) {
    static const char *const of_call[] = {"ep", "overlap", "replicate", "replicate-every", "tokens", "compress", "compress-ratio",
                                          "compress-rows"};
    for (int i = 0; i < COUNT(of_call); i++) {
        if (!strcmp(o->name, of_call[i])) {
            return 1;
        }
    }
    return o->when != RUN;
}

// The lines of this process; to be freed.
char *describe_rank(const Run *run, size_t *size) {
    Config of_all = run->config;
    of_all.batch *= ranks.size; // so that the batch of a whole step is compared
    char *text = NULL;
    FILE *memory = open_memory(&text, size);
    for (int i = 0; i < option_count; i++) {
        char buffer[64];
        if (is_shared_option(&options[i])) {
            fprintf(memory, "--%s %s\n", options[i].name, option_text(&of_all, &options[i], buffer));
        }
    }
    fprintf(memory, "step %d\n", run->step);
    if (run->train) { // nobody has read the data of a run that is finished
        fprintf(memory, "%d tokens of the vocabulary\n", run->config.vocab);
        fprintf(memory, "training text %.0f\nvalidation text %.0f\n", run->train->fingerprint, run->val->fingerprint);
    }
    close_memory(memory, &text);
    return text;
}

// Stops where a process was started with other options, other data or another checkpoint than the first, and names the first
// line that differs.
void compare_ranks(Run *run) {
    size_t size = 0, first_size;
    char *mine = describe_rank(run, &size);
    ranks_meet(); // what comes next waits inside MPI, where nobody keeps the watch
    first_size = size;
    broadcast(&first_size, sizeof(first_size));
    char *first = (char *)allocate(first_size + 1, 1);
    memcpy(first, mine, size < first_size ? size : first_size);
    broadcast(first, first_size);
    if (strcmp(mine, first) != 0) {
        const char *line = mine;
        const char *other = first;
        size_t length = strcspn(line, "\n");
        while (length == strcspn(other, "\n") && !strncmp(line, other, length) && line[length]) {
            line += length + 1;
            other += length + 1;
            length = strcspn(line, "\n");
        }
        fail("this rank has other options, other data or another checkpoint than rank 0 (here: %.*s; rank 0: %.*s; data %s)",
             (int)strcspn(line, "\n"), line, (int)strcspn(other, "\n"), other, run->config.data);
    }
    free(first);
    free(mine);
    ranks_meet(); // so that no process goes on, maybe to another message, before all have compared
}

// The options of this call about ranks, as one would type them, for the command that goes on with the run: a checkpoint does not
// keep them. To be freed.
char *options_of_ranks(const Config *c) {
    char *text = NULL, buffer[64];
    size_t size;
    FILE *memory = open_memory(&text, &size);
    for (int i = 0; i < option_count; i++) {
        const Option *o = &options[i];
        if (c->given[i] && !strcmp(o->heading, RANKS)) {
            fprintf(memory, " --%s%s%s", o->name, o->kind == 'f' ? "" : " ", o->kind == 'f' ? "" : option_text(c, o, buffer));
        }
    }
    close_memory(memory, &text);
    return text;
}
