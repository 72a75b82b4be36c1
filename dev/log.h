// What a run says: log.jsonl, the lines on the terminal, warnings, the trace of a process.
// Gives: log_line, log_router, announce, warn_of_routing, show_step, trace_step. Needs: Run of dev/run.h, which
// includes it.
#pragma once

enum { IDLE_STEPS = 100 }; // without a token, after which an expert is called dead

// Writes lines of JSON, of which numbers may be infinite or none: these have no form in JSON, and become null.
void write_finite(FILE *to, const char *text, size_t size) {
    int quoted = 0;
    for (size_t i = 0; i < size; i++) {
        char c = text[i];
        size_t word = i + (c == '-');
        if (!quoted && word + 3 <= size && (!memcmp(text + word, "nan", 3) || !memcmp(text + word, "inf", 3))) {
            fputs("null", to);
            i = word + 2;
            continue;
        }
        fputc(c, to);
        if (quoted && c == '\\' && i + 1 < size) {
            fputc(text[++i], to);
        } else if (c == '"') {
            quoted = !quoted;
        }
    }
}

// Writes the lines that are new to log.jsonl, and ends the program if that fails.
void flush_log(Run *run) {
    if (ftell(run->log) == 0) { // nothing is new, and not every C library says so by log_size
        return;
    }
    flush_memory(run->log);
    write_finite(run->log_file, run->log_text, run->log_size);
    rewind(run->log);
    if (fflush(run->log_file) != 0 || ferror(run->log_file)) {
        fail("%s/log.jsonl: cannot write: %s", run->out, strerror(errno));
    }
}

void close_log(Run *run) {
    flush_log(run);
    fclose(run->log);
    fclose(run->log_file);
    free(run->log_text);
}

// One object of the log; format continues after its type.
__attribute__((format(printf, 3, 4))) void log_line(Run *run, const char *type, const char *format, ...) {
    va_list args;
    fprintf(run->log, "{\"type\":\"%s\",", type);
    va_start(args, format);
    vfprintf(run->log, format, args);
    va_end(args);
    fprintf(run->log, "}\n");
    flush_log(run);
}

// The last layer that has experts; -1: none has.
int last_moe_layer(const Config *c) {
    int l = c->layers - 1;
    while (l >= 0 && !is_moe(c, l)) {
        l--;
    }
    return l;
}

// ---- the routing

// share (E) of each expert in the step's choices; returns the largest share over the mean one.
double expert_load(const Statistics *s, int E, double *share) {
    double total = 0, top = 0;
    for (int e = 0; e < E; e++) {
        total += s->count[e];
    }
    for (int e = 0; e < E; e++) {
        share[e] = total > 0 ? s->count[e] / total : 0;
        top = fmax(top, share[e]);
    }
    return top * E;
}

// The same for the experts in attention, a line for each router of a layer. The heads' experts stand one after the other;
// max_over_mean is the largest of the heads'.
void log_attention(Run *run) {
    const Config *c = &run->config;
    int L = c->layers, E = c->attention_experts;
    for (int row = L; row < statistics_rows(c); row++) {
        int all = counted_experts(c, row);
        if (!all) {
            continue;
        }
        const Statistics *s = run->backend->statistics(run->model, row);
        double *share = (double *)allocate(E, sizeof(double)), top = 0;
        fprintf(run->log, "{\"type\":\"attention\",\"step\":%d,\"layer\":%d,\"experts_of\":\"%s\",\"load\":[", run->step,
                (row - L) / 2, route_name(c, (row - L) % 2));
        for (int first = 0; first < all; first += E) {
            Statistics head = *s;
            head.count += first;
            top = fmax(top, expert_load(&head, E, share));
            for (int e = 0; e < E; e++) {
                fprintf(run->log, "%s%.6g", first + e ? "," : "", share[e]);
            }
        }
        fprintf(run->log, "],\"max_over_mean\":%.6g,\"entropy\":%.6g,\"dropped\":%.6g,\"active\":%.6g}\n", top,
                s->entropy / s->tokens, s->dropped / fmax(s->active, 1), s->active / s->tokens);
        free(share);
    }
}

void log_router(Run *run) {
    const Config *c = &run->config;
    int E = c->experts;
    double *share = (double *)allocate(E, sizeof(double));
    for (int l = 0; l < c->layers; l++) {
        if (!is_moe(c, l)) {
            continue;
        }
        const Statistics *s = run->backend->statistics(run->model, l);
        double top = expert_load(s, E, share);
        int dead = 0;
        fprintf(run->log, "{\"type\":\"router\",\"step\":%d,\"layer\":%d,\"load\":[", run->step, l);
        for (int e = 0; e < E; e++) {
            fprintf(run->log, "%s%.6g", e ? "," : "", share[e]);
            dead += s->idle[e] >= IDLE_STEPS;
        }
        fprintf(run->log, "],\"max_over_mean\":%.6g,\"entropy\":%.6g,\"dropped\":%.6g,\"active\":%.6g,\"dead\":%d}\n",
                top, s->entropy / s->tokens, s->dropped / fmax(s->active, 1), s->active / s->tokens, dead);
    }
    free(share);
    log_attention(run);
    flush_log(run);
}

// A line on the terminal, once for each layer, where an expert has had no token for IDLE_STEPS steps, or where the load
// of about the last 50 steps is beyond what the recipe is known for.
void warn_of_routing(Run *run) {
    const Config *c = &run->config;
    const char *begin = on_terminal() ? "\r\033[K" : "";
    double limit = find_recipe(c->recipe)->load;
    for (int l = 0; l < c->layers; l++) {
        if (!is_moe(c, l)) {
            continue;
        }
        const Statistics *s = run->backend->statistics(run->model, l);
        int idle = 0, top = 0;
        for (int e = 0; e < c->experts; e++) {
            idle = s->idle[e] > s->idle[idle] ? e : idle;
            top = s->recent[e] > s->recent[top] ? e : top;
        }
        int dead = s->idle[idle] >= IDLE_STEPS;
        int uneven = limit > 0 && run->trained >= 2 * IDLE_STEPS && s->recent[top] > limit;
        if (dead && !(run->warned[l] & 1)) {
            printf("%swarning: step %d: expert %d of layer %d has had no token for %d steps; a higher --aux-weight may "
                   "wake it\n",
                   begin, run->step, idle, l + 1, s->idle[idle]);
        }
        if (uneven && !(run->warned[l] & 2)) {
            printf("%swarning: step %d: expert %d of layer %d takes %.1f times its share; %s is known to stay below "
                   "%.1f\n",
                   begin, run->step, top, l + 1, s->recent[top], c->recipe, limit);
        }
        run->warned[l] |= (unsigned char)(dead | uneven << 1);
    }
}

// ---- a step

// Says as text which share of the peak `rate` operations per second are.
void describe_share(const Run *run, double rate, char text[96]) {
    if (run->sheet > 0) {
        snprintf(text, 96, "%.0f%% of the data sheet's peak, %.0f%% of the measured one", 100 * rate / run->sheet,
                 100 * rate / fmax(run->peak, 1));
    } else {
        snprintf(text, 96, "%.0f%% of peak", 100 * rate / fmax(run->peak, 1));
    }
}

// How the last step went: on a terminal one line that is written over and over, else a line each time.
void show_step(Run *run, double loss, const char *teacher_part, double lr, double norm, double tokens_per_second,
               double left) {
    const Config *c = &run->config;
    char time_left[32], bars[256] = "";
    long rest = (long)fmin(left, 1e9);
    if (rest >= 3600) {
        snprintf(time_left, sizeof(time_left), "%ld:%02ld:%02ld", rest / 3600, rest / 60 % 60, rest % 60);
    } else {
        snprintf(time_left, sizeof(time_left), "%ld:%02ld", rest / 60, rest % 60);
    }

    // The last layer's load, as bars: full height is nearly twice the fair share.
    int l = last_moe_layer(c);
    if (l >= 0) {
        double *share = (double *)allocate(c->experts, sizeof(double));
        expert_load(run->backend->statistics(run->model, l), c->experts, share);
        strcat(bars, "  ");
        for (int e = 0; e < min_int(c->experts, 16); e++) {
            char bar[4] = "\xe2\x96\x81"; // U+2581, the lowest of eight blocks
            bar[2] = (char)(bar[2] + min_int(7, (int)(share[e] * c->experts * 4)));
            strcat(bars, bar);
        }
        free(share);
    }
    if (on_terminal()) {
        char done[13] = "............";
        memset(done, '#', (size_t)((double)run->step / c->steps * 12));
        char line[512];
        snprintf(line, sizeof(line), "[%s] %d/%d  loss %.3f  %.0f tokens/s  left %s%s", done, run->step, c->steps, loss,
                 tokens_per_second, time_left, bars);
        write_over(stdout, line, (int)strlen(done) + 3);
    } else {
        char share[96];
        describe_share(run, tokens_per_second * run->flops, share);
        printf("step %d/%d  loss %.4f%s  lr %.2e  norm %.2f  %.0f tokens/s  %s  left %s%s\n", run->step, c->steps, loss,
               teacher_part, lr, norm, tokens_per_second, share, time_left, bars);
    }
    fflush(stdout);
}

// For the log: what a step's time went into, the mean of all processes; and the bytes that all of them sent in a step.
// Then the counters are set to 0.
void describe_traffic(int steps, double ms, char text[256]) {
    Traffic *t = &ranks.traffic, none = {0, 0, 0};
    double all[3] = {t->waited * 1000 / ranks.size, t->sent, t->reduced};
    sum_over_ranks(all, 3);
    snprintf(text, 256, ",\"compute_ms\":%.4g,\"wait_ms\":%.4g,\"all_to_all_bytes\":%.0f,\"reduce_bytes\":%.0f",
             ms - all[0] / steps, all[0] / steps, all[1] / steps, all[2] / steps);
    *t = none;
}

// One line a step in trace-RANK.jsonl: the same for this process alone, since the last line of the log, and the rows
// that came to its experts in each layer's last forward pass (--ep 1: its tokens).
void trace_step(Run *run) {
    const Config *c = &run->config;
    fprintf(run->trace,
            "{\"step\":%d,\"seconds\":%.6f,\"waited\":%.6f,\"all_to_all_bytes\":%.0f,\"reduce_bytes\":%.0f,\"came\":[",
            run->step, seconds(), ranks.traffic.waited, ranks.traffic.sent, ranks.traffic.reduced);
    const char *comma = "";
    for (int l = 0; l < c->layers; l++) {
        if (is_moe(c, l)) {
            fprintf(run->trace, "%s%d", comma, ranks_came(run->model, l));
            comma = ",";
        }
    }
    fprintf(run->trace, "]}\n");
    if (fflush(run->trace) != 0) {
        fail("%s/trace-%d.jsonl: cannot write: %s", run->out, ranks.rank, strerror(errno));
    }
}

// A line of the log and one on the terminal, with the mean time of the steps since the last ones.
void report_step(Run *run, double loss, double aux, double norm, double lr) {
    const Config *c = &run->config;
    int steps = run->step - run->timed_step;
    double tokens = (double)c->accum * c->batch * ranks.size * c->seq; // of a step
    double ms = (seconds() - run->timed) * 1000 / steps, rate = tokens / ms * 1000;
    int timed = ms > 0; // else the clock stood still, or ran backwards
    if (!timed) {
        ms = rate = NAN;
    }
    char sent[256] = "", mfu[40] = "", taught[64], part[64]; // model FLOPs utilization: the share of the data sheet's peak
    if (ranks.size > 1) {
        describe_traffic(steps, ms, sent);
    }
    if (run->sheet > 0) {
        snprintf(mfu, sizeof(mfu), ",\"mfu\":%.4g", rate * run->flops / run->sheet);
    }
    describe_teacher(c, taught, part);
    log_line(run, "step",
             "\"step\":%d,\"tokens\":%.0f,\"loss\":%.9g,\"aux\":%.9g,\"grad_norm\":%.9g,\"lr\":%.9g,\"ms\":%.4g,"
             "\"tok_s\":%.6g,\"gflops\":%.4g,\"sol\":%.4g%s%s%s",
             run->step, run->step * tokens, loss, aux, norm, lr, ms, rate, rate * run->flops / 1e9,
             rate * run->flops / run->peak, mfu, sent, taught);
    log_router(run);
    show_step(run, loss, part, lr, norm, timed ? rate : 0, timed ? ms * (c->steps - run->step) / 1000 : 0);
    run->timed = seconds();
    run->timed_step = run->step;
}

// ---- the beginning

// What --recompute works out again for each token, in operations: nearly the whole forward pass, but of the last layer
// nothing is lost.
double recompute_flops(const Model *m) {
    const Config *c = &m->config;
    double again = (c->layers - 1) * mixing_flops(c);
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        double uses = !strcmp(t->kind, "qkv") || !strcmp(t->kind, "proj") || !strcmp(t->kind, "dense_in");
        if (strstr(t->kind, "_experts") || !strcmp(t->kind, "query_key") || !strcmp(t->kind, "key_value") ||
            !strncmp(t->kind, "lstm_", 5)) {
            uses = mixer_uses(c, t); // attention with experts, or an LSTM
        }
        if (!strcmp(t->kind, "w_in") && ranks.ep == 1) { // what came from other processes is kept
            uses = (double)c->topk / c->experts * c->subtokens;
        }
        if (t->layer < c->layers - 1) {
            again += 2 * (double)t->whole * uses;
        }
    }
    return again;
}

// Where the memory goes, and what --recompute does about it: with it, one layer's activations stay in memory instead of
// all layers'.
void print_memory(Run *run) {
    static const char *const names[] = {"weights", "gradients", "moments", "activations", "buffers"};
    const Config *c = &run->config;
    const Model *m = run->model;
    double mapped = 2 * (run->train->tokens + run->val->tokens), sum = 0, mib = 1048576; // the token files
    printf("memory in MiB:");
    for (int i = 0; i < HARDLY_TOUCHED; i++) {
        printf(" %s %.1f,", names[i], (double)m->bytes[i] / mib);
        sum += (double)m->bytes[i];
    }
    // There is memory for more choices than will come, and for rows of a table that may never be read (dev/tables.h).
    int bound = c->select == EXPERT_CHOICE || c->select == THRESHOLD || c->ngrams > 0;
    double device = run->backend->memory();
    if (device > 0) {
        printf(" together %.1f of the device's %.0f\n", sum / mib, device / mib);
    } else {
        printf(" the program %.1f; together %s%.1f, and %.1f of tokens are mapped, not held\n", run->before / mib,
               bound ? "at most " : "", (run->before + sum) / mib, mapped / mib);
    }
    print_offload_memory();

    double again = recompute_flops(m), passing = (double)sizeof(real) * (double)(m->passing - m->largest);
    double activations = (double)m->bytes[FOR_ACTIVATIONS] + (c->recompute ? passing : -passing);
    printf("%s --recompute: activations %.1f and %.0f%% %s operations\n", c->recompute ? "without" : "with",
           activations / mib, 100 * again / (run->flops + (c->recompute ? again : 0)),
           c->recompute ? "fewer" : "more");
    fprintf(run->log, "\"memory\":{");
    for (int i = 0; i < HARDLY_TOUCHED; i++) {
        fprintf(run->log, "\"%s\":%zu,", names[i], m->bytes[i]);
    }
    fprintf(run->log, "\"program\":%.0f,\"mapped\":%.0f},", run->before, mapped);
}

// The log's first line and what the terminal shows of it: the model, the data, the memory, the machine.
void announce(Run *run) {
    const Config *c = &run->config;
    double total, active;
    char device[128], advice[256] = "";
    int team = team_size();
    count_parameters(c, &total, &active);
    run->backend->device(device);
    run->flops = flops_per_token(c) + teacher_flops(c);
    ranks_meet();
    const char *products = ready_products(c->precision);
    double peak[3] = {run->backend->peak(), run->backend->sheet_peak(), 0};
    peak[2] = peak[1] > 0; // of how many ranks' devices it is known
    sum_over_ranks(peak, 3);
    run->peak = isfinite(peak[0]) ? peak[0] : 0; // not by a clock that stands still
    run->sheet = peak[2] < ranks.size ? 0 : peak[1];
    fprintf(run->log, "{\"type\":\"run\",");
    write_options(run->log, c);
    fprintf(run->log, ",\"vocab\":%d,\"params\":%.0f,\"active_params\":%.0f,\"flops_per_token\":%.0f,", c->vocab, total,
            active, run->flops);
    fprintf(run->log, "\"cache_bytes\":%zu,", c->layers * kept_numbers(c) * sizeof(real)); // of a text, while one is told
    fprintf(run->log, "\"threads\":%d,\"ranks\":%d,", team, ranks.size);
    if (ranks.size > 1) {
        fprintf(run->log, "\"ep\":%d,\"overlap\":%d,\"replicate\":%d,", ranks.ep, c->overlap, c->replicate);
        fprintf(run->log, "\"compress\":\"%s\",\"compress_ratio\":%g,\"compress_rows\":%d,", compress_names[c->compress],
                c->compress_ratio, c->compress_rows);
    }
    int moe = moe_layers(c);
    printf("%s: %d layers of width %d, %d of them with %d experts of which a token sees %d\n", c->recipe, c->layers,
           c->dim, moe, moe ? c->experts + c->shared : 0, moe ? c->topk + c->shared : 0);
    printf("%.2f million weights, %.2f million at work for each token; vocabulary %d\n", total / 1e6, active / 1e6,
           c->vocab);
    describe_adapter(run, total);
    printf("data %s: %.2f million tokens, %ld windows of %d; a step takes %d of them\n", c->data,
           run->train->tokens / 1e6, run->train->windows, c->seq, c->batch * c->accum * ranks.size);
    if (ranks.size > 1) {
        printf("%d ranks, %d sequences of a micro-step each; %d of %d experts on a rank%s\n", ranks.size, c->batch,
               moe ? c->experts / ranks.ep : 0, moe ? c->experts : 0,
               ranks.groups > 1 ? ", which others have, too" : "");
    }
    print_memory(run);
    print_teacher(run);
    if (run->backend->memory() == 0) { // it is the processor that computes
        describe_threads(advice, thread_count(), team, job_processors());
    }
    printf("%s%s%s, %d thread%s, peak %.0f GFLOP/s%s", advice, advice[0] ? "\n" : "", device, team, team > 1 ? "s" : "",
           run->peak / 1e9, products);
    fprintf(run->log, "\"start_step\":%d,\"peak_gflops\":%.4g,", run->step, run->peak / 1e9);
    if (run->sheet > 0) {
        printf(" measured, %.0f by the data sheet", run->sheet / 1e9);
        fprintf(run->log, "\"sheet_gflops\":%.6g,", run->sheet / 1e9);
    }
    printf("; run directory %s\n", run->out);
    fprintf(run->log, "\"device\":");
    json_write_string(run->log, device, strlen(device));
    fprintf(run->log, "}\n");
    flush_log(run);
    if (run->step) {
        printf("going on after step %d\n", run->step);
    }
    printf("\n");
    fflush(stdout);
}
