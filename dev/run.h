// A run: the backend, its directory, log, checkpoints, progress, and the program around the loop.
// Gives: Backend, Run, run_program. Needs: the model of train_moe.c, which includes it.
#pragma once

// ---------------------------------------------------------------------------------------------------------------------
// 13. The backend: what the trainer below asks of a model
//
// Everything from here on - the training loop, files, log, command line - is the same on every device. A device fills in
// one such table; this file's own is cpu_backend.

typedef struct Backend {
    const char *name;
    Model *(*create)(const Config *config, int tokens, int train, real *weights); // buffers for that many tokens
    void (*release)(Model *model);
    void (*init)(Model *model, const double *frequency);
    void (*forward)(Model *model, const int *inputs, const int *targets, int B, int T, int mode, double grad_scale,
                    long step, long first_token);
    void (*backward)(Model *model);
    void (*update)(Model *model, int step, double lr); // not at all where the gradients' norm is not finite
    void (*losses)(Model *model, double *loss, double *aux, double *norm); // of the step; waits until all is done
    void (*generate)(Model *model, int token, int position, real *logits);
    const RouterStats *(*stats)(const Model *model, int layer);
    const Plan *(*plan)(const Model *model, int layer); // of the last forward pass
    real *(*fetch)(Model *model, int what); // WEIGHTS, GRADS, MOMENT1 or MOMENT2: all numbers, in the host's memory
    void (*store)(Model *model, int what);  // takes over what was changed there
    double (*peak)(void);                   // operations per second that the device can do at most, measured
    void (*device)(char name[128]);
    double (*memory)(void); // bytes of memory of its own; 0: it has the host's
} Backend;

void cpu_forward(Model *m, const int *inputs, const int *targets, int B, int T, int mode, double grad_scale, long step,
                 long first_token) {
    model_forward(m, inputs, targets, B, T, mode, grad_scale, step, first_token);
}

void cpu_update(Model *m, int step, double lr) {
    await_sums();
    m->norm = gradient_norm(m);
    if (isfinite(m->norm))
        model_update(m, step, lr, m->norm);
}

void model_losses(Model *m, double *loss, double *aux, double *norm) {
    double both[2] = {m->loss, m->total_aux};
    sum_over_ranks(both, 2);
    *loss = both[0];
    *aux = both[1];
    *norm = m->norm;
}

const RouterStats *model_stats(const Model *m, int layer) {
    return &m->stats[layer];
}

const Plan *model_plan(const Model *m, int layer) {
    return &m->layers[layer].plan;
}

// What all ranks have, gathered by rank 0 in the order of a single process; the others have but room for it.
real *model_fetch(Model *m, int what) {
    real *whole = m->whole_memory[what], *mine = m->memory[what], *all = NULL;
    size_t slice = m->slice_end - m->slice;
    int moments = what == MOMENT1 || what == MOMENT2;
    if (!MANY)
        return mine;
    if (!whole)
        whole = m->whole_memory[what] = allocate_reals(m->whole);
    if (moments)
        all = (real *)gather_parts(mine, slice * sizeof(real), ranks.size, NULL);
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        if (tensor_is_expert(t))
            gather_parts(mine + (moments ? moment_place(m, t->offset) : t->offset), t->size * sizeof(real), ranks.ep,
                         whole + t->place);
        else if (!ranks.rank)
            memcpy(whole + t->place, (moments ? all : mine) + t->offset, t->size * sizeof(real));
    }
    free(all);
    return whole;
}

// Takes this rank's part over from model_fetch's memory, after that was filled with what a single process would have.
void model_store(Model *m, int what) {
    const real *whole = m->whole_memory[what];
    int moments = what == MOMENT1 || what == MOMENT2;
    for (int i = 0; MANY && i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        for (size_t j = 0; j < t->size; j++) {
            size_t at = t->offset + j;
            if (!moments || tensor_is_expert(t) || (at >= m->slice && at < m->slice_end))
                m->memory[what][moments ? moment_place(m, at) : at] = whole[t->place + t->first + j];
        }
    }
}

void forget_whole(Model *m) {
    for (int what = 0; what < 4; what++) {
        free(m->whole_memory[what]);
        m->whole_memory[what] = NULL;
    }
}

volatile real peak_result[64]; // or the compiler would leave out what nobody reads

// Multiply-adds in registers alone, on all threads: a rate that no program can pass on this machine today.
double measured_peak(void) {
    const int rounds = 1 << 16;
    double best = 0;
    for (int attempt = 0; attempt < 4; attempt++) {
        double start = seconds();
#pragma omp parallel
        {
            vec sum[12], x = {0}, y = {0};
            x += (real)0.999; // towards y/(1-x), so that nothing overflows or becomes subnormal
            y += (real)1;
            for (int i = 0; i < 12; i++)
                sum[i] = y + (real)i;
            for (int k = 0; k < rounds; k++) {
#pragma GCC unroll 16
                for (int i = 0; i < 12; i++)
                    sum[i] = sum[i] * x + y;
            }
            for (int i = 1; i < 12; i++)
                sum[0] += sum[i];
            peak_result[thread_number() % 64] = dot((real *)&sum[0], (real *)&sum[1], LANES);
        }
        best = fmax(best, 2.0 * 12 * LANES * rounds * thread_count() / (seconds() - start));
    }
    return best;
}

// The processor's name, as far as the system tells.
void cpu_name(char name[128]) {
    char line[256];
    FILE *file = fopen("/proc/cpuinfo", "r");
    snprintf(name, 128, "cpu");
    while (file && fgets(line, sizeof(line), file)) {
        if (sscanf(line, "model name : %127[^\n]", name) == 1)
            break;
    }
    if (file)
        fclose(file);
}

double cpu_memory(void) {
    return 0;
}

const Backend cpu_backend = {"cpu",          model_allocate, model_free,     model_init,    cpu_forward, model_backward,
                             cpu_update,     model_losses,   model_generate, model_stats,   model_plan,  model_fetch,
                             model_store,    measured_peak,  cpu_name,       cpu_memory};

// ---------------------------------------------------------------------------------------------------------------------
// 14. A run: its directory, log, checkpoints and progress

typedef struct Run {
    Config config;
    const Backend *backend;
    Model *model;
    Tokenizer *tokenizer;
    Data *train, *val;
    int *inputs, *targets; // (B,T)
    char out[2048];
    FILE *log, *trace;
    int step;          // steps done
    double peak;       // operations per second
    double val_loss, val_bpb, fluctuation;
    double flops;      // per token
    double before;     // bytes of memory that the process held before it had a model
    int trained;       // steps since this process began
    unsigned char *warned; // (L) what a warning was printed of: 1 a dead expert, 2 an uneven load
    uint64_t *probe;   // (L, tokens) the sets of experts chosen for the first validation batch at the last evaluation
} Run;

#define IDLE_STEPS 100 // without a token, after which an expert is called dead

volatile sig_atomic_t stop_asked = 0;

void ask_stop(int signal_number) {
    (void)signal_number;
    stop_asked = 1;
}

void check_log(Run *run) { // and sends it on its way
    if (fflush(run->log) != 0)
        fail("%s/log.jsonl: cannot write: %s", run->out, strerror(errno));
}

// One object of the log; format continues after its type.
__attribute__((format(printf, 3, 4))) void log_line(Run *run, const char *type, const char *format, ...) {
    va_list args;
    fprintf(run->log, "{\"type\":\"%s\",", type);
    va_start(args, format);
    vfprintf(run->log, format, args);
    va_end(args);
    fprintf(run->log, "}\n");
    check_log(run);
}

int has_file(const char *dir, const char *name) {
    char path[4200];
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    return access(path, F_OK) == 0;
}

void write_text(const char *dir, const char *name, const char *text, size_t size) {
    FILE *file = open_for_writing(dir, name);
    fwrite(text, 1, size, file);
    close_written(file, dir, name);
}

// The smallest step of the checkpoint-STEP folders in out, -1 where there is none; *count says how many there are.
long smallest_checkpoint(const char *out, int *count) {
    long step, smallest = -1;
    char rest;
    DIR *dir = opendir(out);
    *count = 0;
    for (struct dirent *entry; dir && (entry = readdir(dir)) != NULL;) {
        if (sscanf(entry->d_name, "checkpoint-%ld%c", &step, &rest) != 1)
            continue;
        (*count)++;
        if (smallest < 0 || step < smallest)
            smallest = step;
    }
    if (dir)
        closedir(dir);
    return smallest;
}

void sync_directory(const char *path) {
    int dir = open(path, O_RDONLY);
    if (dir >= 0) {
        sync_file(dir);
        close(dir);
    }
}

void save_checkpoint(Run *run) {
    const Config *c = &run->config;
    const Model *shape = run->model;
    real *weights = run->backend->fetch(run->model, WEIGHTS);
    real *moments[2] = {run->backend->fetch(run->model, MOMENT1), run->backend->fetch(run->model, MOMENT2)};
    if (ranks.rank) { // rank 0 has it all and writes it as a single process would
        forget_whole(run->model);
        ranks_meet();
        return;
    }
    for (size_t i = 0; i < shape->whole; i++) {
        if (!isfinite(weights[i]))
            fail("step %d: a weight is %g; it is not saved, and the last checkpoint in %s is as it was", run->step,
                 (double)weights[i], run->out);
    }
    char final[4096], link[4200], name[64];
    snprintf(name, sizeof(name), "checkpoint-%d", run->step);
    snprintf(final, sizeof(final), "%s/%s", run->out, name);
    snprintf(unfinished_path, sizeof(unfinished_path), "%s/unfinished-checkpoint", run->out);
    remove_tree(unfinished_path); // of a run that was killed
    if (mkdir(unfinished_path, 0777) != 0)
        fail("%s: cannot create: %s", unfinished_path, strerror(errno));
    const char *dir = unfinished_path;
    int part_count;
    Part *parts = model_parts(c, &part_count);
    const char *const plain[] = {""}, *const moment_names[] = {"exp_avg.", "exp_avg_sq."};
    write_safetensors(dir, "model.safetensors", parts, part_count, &weights, plain, 1);
    write_safetensors(dir, "optimizer.safetensors", parts, part_count, moments, moment_names, 2);
    free(parts);
    write_config(dir, c, run->tokenizer->eot);
    write_text(dir, "tokenizer.json", run->tokenizer->json, run->tokenizer->json_size);
    char text[512];
    const char *const eot = "<|endoftext|>";
    int n = snprintf(
        text, sizeof(text),
        "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n  \"bos_token\": \"%s\",\n  \"eos_token\": \"%s\",\n"
        "  \"unk_token\": \"%s\",\n  \"clean_up_tokenization_spaces\": false,\n"
        "  \"model_input_names\": [\"input_ids\", \"attention_mask\"],\n  \"model_max_length\": %d\n}\n",
        eot, eot, eot, c->seq);
    write_text(dir, "tokenizer_config.json", text, (size_t)n);
    n = snprintf(text, sizeof(text), "{\n  \"bos_token_id\": %d,\n  \"eos_token_id\": %d,\n  \"pad_token_id\": %d\n}\n",
                 run->tokenizer->eot, run->tokenizer->eot, run->tokenizer->eot);
    write_text(dir, "generation_config.json", text, (size_t)n);
    FILE *state = open_for_writing(dir, "trainer_state.json");
    fprintf(state, "{\"step\":%d,\"data_fingerprint\":%.0f}\n", run->step, data_fingerprint(run->train));
    close_written(state, dir, "trainer_state.json");
    sync_directory(dir);
    remove_tree(final);
    if (rename(dir, final) != 0)
        fail("%s: cannot rename to %s: %s", dir, final, strerror(errno));
    unfinished_path[0] = 0;
    sync_directory(run->out);
    snprintf(final, sizeof(final), "%s/latest", run->out);
    snprintf(link, sizeof(link), "%s/latest.new", run->out);
    unlink(link);
    if (symlink(name, link) != 0 || rename(link, final) != 0)
        fail("%s: cannot link to %s: %s", final, name, strerror(errno));
    sync_directory(run->out);
    int count;
    for (long old; (old = smallest_checkpoint(run->out, &count)) >= 0 && count > c->keep && old != run->step;) {
        snprintf(link, sizeof(link), "%s/checkpoint-%ld", run->out, old);
        remove_tree(link);
        ranks_tick();
        if (access(link, F_OK) == 0) // cannot be removed
            break;
    }
    forget_whole(run->model);
    ranks_meet();
}

void load_weights(Run *run, const char *dir, int moments) {
    int count;
    Part *parts = model_parts(&run->config, &count);
    const char *const prefix[] = {"", "", "exp_avg.", "exp_avg_sq."};
    for (int what = WEIGHTS; what <= (moments ? MOMENT2 : WEIGHTS); what++) {
        if (what == GRADS)
            continue;
        real *all = run->backend->fetch(run->model, what);
        read_weights(dir, what == WEIGHTS ? "model.safetensors" : "optimizer.safetensors", parts, count, run->config.experts,
                     prefix[what], all);
        for (int i = 0; what == WEIGHTS && i < run->model->tensor_count; i++) {
            const Tensor *t = &run->model->tensors[i];
            const real *w = all + t->place;
            for (size_t v = 0; t->kind == TABLE && v < t->size; v++) {
                if (!(w[v] >= 0 && w[v] < run->config.experts))
                    fail("%s: damaged: the table sends word %zu to expert %g of %d", dir, v, (double)w[v], run->config.experts);
            }
        }
        run->backend->store(run->model, what);
        forget_whole(run->model);
    }
    free(parts);
}

// Cuts the log back to what had happened by `step`.
void cut_log(const char *path, int step) {
    if (access(path, F_OK) != 0)
        return;
    size_t size;
    char *text = read_file(path, &size), *line = text;
    while (line < text + size) {
        char *end = (char *)memchr(line, '\n', (size_t)(text + size - line)), *at;
        if (!end) // cut off in the middle of a line
            break;
        *end = 0;
        if ((at = strstr(line, "\"step\":")) != NULL && strncmp(line, "{\"type\":\"run\"", 13) && atol(at + 7) > step)
            break;
        line = end + 1;
    }
    if (truncate(path, (off_t)(line - text)) != 0)
        fail("%s: cannot shorten: %s", path, strerror(errno));
    free(text);
}

// The share of tokens whose chosen experts are not the set that they were at the evaluation before, averaged over the
// layers; -1 at the first one (Dai et al. 2022, StableMoE, call it routing fluctuation).
double routing_fluctuation(Run *run) {
    const Config *c = &run->config;
    int last, moe = moe_layers(c, &last), first = !run->probe;
    size_t room = (size_t)c->batch * c->seq * c->subtokens;
    double changed = 0, tokens = 0;
    if (first)
        run->probe = (uint64_t *)allocate(room * c->layers, sizeof(uint64_t));
    for (int l = 0; l < c->layers; l++) {
        const Plan *plan = run->backend->plan(run->model, l);
        for (int n = 0; is_moe(c, l) && n < plan->N; n++, tokens++) {
            uint64_t *before = run->probe + room * l + n, set = 0; // a sum of hashes: the same in any order
            for (int k = 0; k < plan->K; k++)
                set += hash64((uint64_t)plan->expert[n * plan->K + k]);
            changed += *before != set;
            *before = set;
        }
    }
    double both[2] = {changed, tokens};
    sum_over_ranks(both, 2);
    return moe && !first ? both[0] / both[1] : -1;
}

// Validation: windows spread evenly over the validation files, always the same ones.
void evaluate(Run *run) {
    const Config *c = &run->config;
    int B = c->batch, T = c->seq;
    long windows = run->val->windows, wanted = c->eval_batches ? (long)c->eval_batches * B * ranks.size : windows;
    if (wanted > windows)
        wanted = windows;
    double nats = 0, bytes = 0;
    for (long begin = 0; begin < wanted; begin += (long)B * ranks.size) {
        long first = begin + (long)B * ranks.rank;
        int rows = (int)(first >= wanted ? 0 : wanted - first < B ? wanted - first : B);
        for (int b = 0; b < rows; b++) {
            size_t at = (size_t)b * (size_t)T;
            data_window(run->val, (long)((double)(first + b) * (double)windows / (double)wanted), -1, run->inputs + at,
                        run->targets + at);
        }
        double loss, aux, norm;
        run->backend->forward(run->model, run->inputs, run->targets, rows, T, EVAL_MODE, rows * T, 0, 0);
        run->backend->losses(run->model, &loss, &aux, &norm);
        nats += loss;
        if (begin == 0)
            run->fluctuation = routing_fluctuation(run);
        for (int i = 0; i < rows * T; i++) {
            if (run->targets[i] != run->tokenizer->eot && run->targets[i] < run->tokenizer->vocab)
                bytes += run->tokenizer->length[run->targets[i]];
        }
    }
    sum_over_ranks(&bytes, 1);
    run->val_loss = nats / ((double)wanted * T);
    run->val_bpb = nats / 0.6931471805599453 / fmax(bytes, 1);
}

// Goes on from a prompt of size bytes and calls emit with the bytes of each token. Returns the number of tokens.
int generate(Run *run, const char *prompt, size_t size, void (*emit)(void *to, const char *bytes, int length), void *to) {
    const Config *c = &run->config;
    const Tokenizer *t = run->tokenizer;
    size_t count = 0;
    int *ids = (int *)allocate(size + 2, sizeof(int)), made = 0, position = 0;
    ids[count++] = t->eot;
    count += tokenizer_encode(run->tokenizer, prompt, size, ids + count);
    real *logits = allocate_reals((size_t)c->vocab);
    uint64_t stream = random_stream((uint64_t)c->seed, RANDOM_SAMPLE, 0, 0);
    for (size_t i = 0; i < count; i++) {
        if (ids[i] >= c->vocab)
            fail("the prompt's token %d is not in the model's vocabulary of %d", ids[i], c->vocab);
        run->backend->generate(run->model, ids[i], position++, logits);
    }
    while (made < c->tokens) {
        int id = sample(logits, min_int(c->vocab, t->vocab), c->temperature, c->top_k, c->top_p,
                        random_uniform(stream, (uint64_t)position));
        broadcast(&id, sizeof(id)); // by the logits' last bits the ranks might differ
        if (id == t->eot)
            break;
        emit(to, t->text[id], t->length[id]);
        if (++made < c->tokens)
            run->backend->generate(run->model, id, position++, logits);
    }
    free(logits);
    free(ids);
    return made;
}

// Text of the model's for people: control characters could do things to a terminal. one_line: newlines too.
void print_text(const char *text, int length, int one_line) {
    for (int i = 0; i < length; i++) {
        unsigned char byte = (unsigned char)text[i];
        if ((byte < 32 || byte == 127) && (one_line || byte != '\n'))
            printf(byte == '\n' ? "\\n" : "\\x%02x", byte);
        else
            putchar(byte);
    }
}

void emit_to_file(void *to, const char *bytes, int length) {
    fwrite(bytes, 1, (size_t)length, (FILE *)to);
    fflush((FILE *)to);
}

void tell_story(Run *run) {
    char *story = NULL;
    size_t size = 0;
    FILE *memory = open_memstream(&story, &size);
    generate(run, "", 0, emit_to_file, memory);
    fclose(memory);
    fprintf(run->log, "{\"type\":\"sample\",\"step\":%d,\"text\":", run->step);
    json_write_string(run->log, story, size);
    fprintf(run->log, "}\n");
    check_log(run);
    printf("\n");
    print_text(story, (int)size, 0);
    printf("\n\n");
    free(story);
}

// Which words each expert of the last layer that has experts likes best: those it takes most above its usual share.
void show_experts(Run *run) {
    const Config *c = &run->config;
    int l, V = run->tokenizer->vocab, E = c->experts;
    if (!moe_layers(c, &l))
        return;
    double *seen = (double *)allocate((size_t)V, sizeof(double)), *taken = (double *)allocate((size_t)V * E, sizeof(double));
    int batches = (int)fmin(32, (double)run->val->windows / c->batch / ranks.size);
    for (int i = 0; i < batches; i++) {
        for (int b = 0; b < c->batch; b++)
            data_window(run->val, ((long)i * ranks.size + ranks.rank) * c->batch + b, -1, run->inputs + b * c->seq,
                        run->targets + b * c->seq);
        run->backend->forward(run->model, run->inputs, run->targets, c->batch, c->seq, EVAL_MODE, 1, 0, 0);
        const Plan *plan = run->backend->plan(run->model, l);
        for (int n = 0; n < plan->N; n++) {
            int token = run->inputs[n / c->subtokens];
            if (token >= V) // of a model whose vocabulary is padded
                continue;
            seen[token] += 1;
            for (int k = 0; k < plan->K; k++) {
                int e = plan->key[n * plan->K + k], again = 0; // two routers may send a token to the same expert
                for (int j = 0; j < k; j++)
                    again |= plan->key[n * plan->K + j] == e;
                if (e >= 0 && !again)
                    taken[(size_t)token * E + e] += 1;
            }
        }
    }
    sum_over_ranks(seen, V);
    sum_over_ranks(taken, V * E);
    printf("What the experts of layer %d like to read, and how much of it they take:\n", l + 1);
    for (int e = 0; e < min_int(E, 16); e++) {
        printf("  expert %2d:", e);
        for (int rank = 0; rank < 7; rank++) {
            int best = -1;
            double best_score = 0;
            for (int v = 0; v < V; v++) { // seldom seen words are worth less: they may be there by chance
                double score = seen[v] > 0 ? taken[(size_t)v * E + e] / (seen[v] + 20) : 0;
                if (score > best_score) {
                    best_score = score;
                    best = v;
                }
            }
            if (best < 0)
                break;
            const char *text = run->tokenizer->text[best];
            int skip = text[0] == ' ' && run->tokenizer->length[best] > 1;
            printf("%s", rank ? ", " : " ");
            print_text(text + skip, run->tokenizer->length[best] - skip, 1);
            printf(" %.0f%%", 100 * taken[(size_t)best * E + e] / seen[best]);
            taken[(size_t)best * E + e] = 0;
        }
        printf("\n");
    }
    printf("\n");
    free(seen);
    free(taken);
}

// share (E) of each expert in the choices since the stats were cleared; returns the largest share over the mean one.
double expert_load(const RouterStats *s, int E, double *share) {
    double total = 0, top = 0;
    for (int e = 0; e < E; e++)
        total += s->count[e];
    for (int e = 0; e < E; e++) {
        share[e] = total > 0 ? s->count[e] / total : 0;
        top = fmax(top, share[e]);
    }
    return top * E;
}

void log_router(Run *run) {
    const Config *c = &run->config;
    int E = c->experts;
    double *share = (double *)allocate((size_t)E, sizeof(double));
    for (int l = 0; l < c->layers; l++) {
        if (!is_moe(c, l))
            continue;
        const RouterStats *s = run->backend->stats(run->model, l);
        double top = expert_load(s, E, share), chosen = s->active;
        int dead = 0;
        for (int e = 0; e < E; e++)
            dead += s->idle[e] >= IDLE_STEPS;
        fprintf(run->log, "{\"type\":\"router\",\"step\":%d,\"layer\":%d,\"load\":[", run->step, l);
        for (int e = 0; e < E; e++)
            fprintf(run->log, "%s%.6g", e ? "," : "", share[e]);
        fprintf(run->log, "],\"max_over_mean\":%.6g,\"entropy\":%.6g,\"dropped\":%.6g,\"active\":%.6g,\"dead\":%d}\n", top,
                s->entropy / s->tokens, s->dropped / fmax(chosen, 1), chosen / s->tokens, dead);
    }
    free(share);
    check_log(run);
}

// A line on the terminal, once for each layer, where an expert has had no token for IDLE_STEPS steps, or where the load
// of about the last 50 steps is beyond what the recipe is known for.
void warn_of_routing(Run *run) {
    const Config *c = &run->config;
    for (int l = 0; l < c->layers; l++) {
        const RouterStats *s = run->backend->stats(run->model, l);
        int idle = 0, top = 0;
        for (int e = 0; is_moe(c, l) && e < c->experts; e++) {
            idle = s->idle[e] > s->idle[idle] ? e : idle;
            top = s->recent[e] > s->recent[top] ? e : top;
        }
        double limit = find_recipe(c->recipe)->load;
        int dead = is_moe(c, l) && s->idle[idle] >= IDLE_STEPS;
        int uneven = is_moe(c, l) && limit > 0 && run->trained >= 2 * IDLE_STEPS && s->recent[top] > limit;
        const char *begin = on_terminal() ? "\r\033[K" : "";
        if (dead && !(run->warned[l] & 1))
            printf("%swarning: step %d: expert %d of layer %d has had no token for %d steps; a higher --aux-weight may "
                   "wake it\n",
                   begin, run->step, idle, l + 1, s->idle[idle]);
        if (uneven && !(run->warned[l] & 2))
            printf("%swarning: step %d: expert %d of layer %d takes %.1f times its share; %s is known to stay below "
                   "%.1f\n",
                   begin, run->step, top, l + 1, s->recent[top], c->recipe, limit);
        run->warned[l] |= (unsigned char)(dead | uneven << 1);
    }
}

// How the last step went: on a terminal one line that is written over and over, else a line each time.
void show_step(Run *run, double loss, double lr, double norm, double tokens_per_second, double left) {
    const Config *c = &run->config;
    char time_left[32], bars[256] = "";
    long rest = (long)fmin(left, 1e9);
    snprintf(time_left, sizeof(time_left), rest >= 3600 ? "%ld:%02ld:%02ld" : "%.0ld%ld:%02ld", rest / 3600,
             rest / 60 % 60, rest % 60);
    int l;
    if (moe_layers(c, &l)) { // the last layer's load: full height is twice the fair share
        double *share = (double *)allocate((size_t)c->experts, sizeof(double));
        expert_load(run->backend->stats(run->model, l), c->experts, share);
        strcat(bars, "  ");
        for (int e = 0; e < min_int(c->experts, 16); e++) {
            char bar[4] = "\xe2\x96\x81"; // U+2581, the lowest of eight blocks
            bar[2] = (char)(bar[2] + min_int(7, (int)(share[e] * c->experts * 4)));
            strcat(bars, bar);
        }
        free(share);
    }
    double sol = tokens_per_second * run->flops / run->peak;
    if (on_terminal()) {
        char done[13] = "............";
        memset(done, '#', (size_t)((double)run->step / c->steps * 12));
        printf("\r[%s] %d/%d  loss %.3f  %.0f tokens/s  left %s%s\033[K", done, run->step, c->steps, loss, tokens_per_second,
               time_left, bars);
    } else {
        printf("step %d/%d  loss %.4f  lr %.2e  norm %.2f  %.0f tokens/s  %.0f%% of peak  left %s%s\n", run->step,
               c->steps, loss, lr, norm, tokens_per_second, 100 * sol, time_left, bars);
    }
    fflush(stdout);
}

void show_evaluation(Run *run) {
    char changed[48] = "";
    if (run->fluctuation >= 0)
        snprintf(changed, sizeof(changed), ",\"fluctuation\":%.6g", run->fluctuation);
    log_line(run, "eval", "\"step\":%d,\"val_loss\":%.9g,\"val_bpb\":%.9g%s", run->step, run->val_loss, run->val_bpb,
             changed);
    printf("%sstep %d: validation loss %.4f nats per token, %.4f bits per byte%s\n", on_terminal() ? "\r" : "", run->step,
           run->val_loss, run->val_bpb, on_terminal() ? "\033[K" : "");
}

int due(int step, int every) {
    return every > 0 && step % every == 0;
}

// For the log: what a step's time went into, the mean of all ranks; and the bytes that all of them sent in a step. Then
// begins anew.
void describe_traffic(int steps, double ms, char text[256]) {
    Traffic *t = &ranks.traffic, none = {0, 0, 0};
    double all[3] = {t->waited * 1000 / ranks.size, t->sent, t->reduced};
    sum_over_ranks(all, 3);
    snprintf(text, 256, ",\"compute_ms\":%.4g,\"wait_ms\":%.4g,\"all_to_all_bytes\":%.0f,\"reduce_bytes\":%.0f",
             ms - all[0] / steps, all[0] / steps, all[1] / steps, all[2] / steps);
    *t = none;
}

// One line a step in trace-RANK.jsonl: the same for this rank alone, since the last line of the log, and the rows that
// came to its experts in each layer's last forward pass (--ep 1: its tokens).
void trace_step(Run *run) {
    const Config *c = &run->config;
    fprintf(run->trace, "{\"step\":%d,\"seconds\":%.6f,\"waited\":%.6f,\"all_to_all_bytes\":%.0f,\"reduce_bytes\":%.0f,\"came\":[",
            run->step, seconds(), ranks.traffic.waited, ranks.traffic.sent, ranks.traffic.reduced);
    const char *comma = "";
    for (int l = 0; l < c->layers; l++) {
        if (!is_moe(c, l))
            continue;
        fprintf(run->trace, "%s%d", comma, run->model->came[l]);
        comma = ",";
    }
    fprintf(run->trace, "]}\n");
    if (fflush(run->trace) != 0)
        fail("%s/trace-%d.jsonl: cannot write: %s", run->out, ranks.rank, strerror(errno));
}

// Steps until config.steps, or until Ctrl-C. Returns 1 where it was interrupted.
int train(Run *run) {
    const Config *c = &run->config;
    const Backend *backend = run->backend;
    int B = c->batch, T = c->seq, timed_step = run->step;
    int saved = run->step, stop = 0;
    const Traffic none = {0, 0, 0};
    ranks.traffic = none;
    double timed = seconds(), sequences = (double)c->accum * B * ranks.size; // of a step
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_handler = ask_stop;
    action.sa_flags = (int)SA_RESETHAND | SA_RESTART; // the second Ctrl-C ends at once; the first breaks off no write
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
#ifdef USE_MPI
    sigaction(SIGUSR1, &action, NULL); // which mpirun passes on to all ranks
#endif
    signal(SIGPIPE, SIG_IGN); // training outlives who reads its progress
    while (run->step < c->steps && !stop && (MANY || !stop_asked)) { // no rank may stop alone
        int step = run->step + 1;
        double loss, aux, norm, lr = learning_rate(c, step);
        for (int micro = 0; micro < c->accum; micro++) {
            long first = ((long)micro * ranks.size + ranks.rank) * B;
            data_batch(run->train, run->step * (long)sequences + first, B, run->inputs, run->targets);
            backend->forward(run->model, run->inputs, run->targets, B, T, TRAIN_MODE, 1.0 / c->accum / ranks.size, step,
                             first * T);
            backend->backward(run->model);
        }
        backend->update(run->model, step, lr);
        backend->losses(run->model, &loss, &aux, &norm);
        if (!isfinite(loss) || !isfinite(norm))
            fail("step %d: the loss is %g and the gradient's norm %g; training stops here, and the last checkpoint in "
                 "%s is as it "
                 "was. A lower --lr or a longer --warmup may help",
                 step, loss, norm, run->out);
        run->step = step;
        run->trained++;
        if (run->trace)
            trace_step(run);
        warn_of_routing(run);
        double asked = stop_asked;
        sum_over_ranks(&asked, 1);
        stop = asked > 0;
        int last = step == c->steps || stop, evaluated = due(step, c->eval_every) || step == c->steps;
        if (due(step, c->log_every) || step == 1 || last) {
            double ms = (seconds() - timed) * 1000 / (step - timed_step), rate = sequences * T / ms * 1000;
            char sent[256] = "";
            if (MANY)
                describe_traffic(step - timed_step, ms, sent);
            log_line(run, "step",
                     "\"step\":%d,\"tokens\":%.0f,\"loss\":%.9g,\"aux\":%.9g,\"grad_norm\":%.9g,\"lr\":%.9g,\"ms\":%."
                     "4g,\"tok_s\":%.6g,"
                     "\"gflops\":%.4g,\"sol\":%.4g%s",
                     step, step * sequences * T, loss, aux, norm, lr, ms, rate, rate * run->flops / 1e9,
                     rate * run->flops / run->peak, sent);
            log_router(run);
            show_step(run, loss, lr, norm, rate, ms * (c->steps - step) / 1000);
            timed = seconds();
            timed_step = step;
        }
        double pause = seconds();
        Traffic traffic = ranks.traffic;
        if (evaluated) {
            evaluate(run);
            show_evaluation(run);
        }
        if (due(step, c->sample_every) || step == c->steps)
            tell_story(run);
        if (due(step, c->save_every) || step == c->steps) {
            save_checkpoint(run);
            saved = step;
        }
        timed += seconds() - pause; // none of this is the step's time
        ranks.traffic = traffic;
    }
    if (saved != run->step)
        save_checkpoint(run);
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    return run->step < c->steps;
}

// ---------------------------------------------------------------------------------------------------------------------
// 15. The command line, and main

void default_out(const Config *asked, int fresh, char out[2048]) {
    const char *recipe = asked->recipe;
    snprintf(out, 2048, "runs/%s", recipe);
    for (int n = 2; fresh && access(out, F_OK) == 0; n++)
        snprintf(out, 2048, "runs/%s-%d", recipe, n);
    struct timespec newest = {0, 0};
    DIR *dir = fresh ? NULL : opendir("runs");
    for (struct dirent *entry; dir && (entry = readdir(dir)) != NULL;) {
        char path[2048];
        struct stat info;
        size_t n = strlen(recipe);
        snprintf(path, sizeof(path), "runs/%.1000s/latest", entry->d_name);
        int wanted = !asked->given[find_option("recipe")] ||
                     (!strncmp(entry->d_name, recipe, n) && (!entry->d_name[n] || entry->d_name[n] == '-'));
        if (!wanted || lstat(path, &info) != 0 || info.st_mtim.tv_sec < newest.tv_sec ||
            (info.st_mtim.tv_sec == newest.tv_sec && info.st_mtim.tv_nsec < newest.tv_nsec))
            continue;
        newest = info.st_mtim;
        snprintf(out, 2048, "runs/%.1000s", entry->d_name);
    }
    if (dir)
        closedir(dir);
}

void share_cores(const Config *c) {
    int here = MANY ? ranks_of_machine() : 1; // all ranks ask, whatever their environments say
    if (c->threads)
        use_threads(c->threads);
    else if (MANY && !getenv("OMP_NUM_THREADS")) // the cores are shared by all ranks of this machine
        use_threads(max_int(1, min_int(thread_count(), (int)sysconf(_SC_NPROCESSORS_ONLN) / here)));
}

// ./train_moe --prompt: the model in run->out goes on from a text.
void answer_prompt(Run *run, const Config *asked) {
    char dir[4096], path[4200], *text = NULL;
    Config *c = &run->config;
    int is_model = has_file(run->out, "config.json"); // a checkpoint or Hugging Face directory itself
    snprintf(dir, sizeof(dir), "%s%s", run->out, is_model ? "" : "/latest");
    if (!has_file(dir, "config.json"))
        fail("%s: no checkpoint there to generate from; train first, or name a run with --out", run->out);
    config_from_directory(c, dir);
    join_options(c, asked, 1 << MODEL | 1 << ORDER | 1 << TRAIN, 1 << MODEL, dir);
    c->batch = 1; // generation needs none, and the saved one is that of all ranks
    config_check(c);
    snprintf(path, sizeof(path), "%s/tokenizer.json", dir);
    run->tokenizer = tokenizer_load(c->tokenizer[0] ? c->tokenizer : path);
    run->model = run->backend->create(c, 1, 0, NULL);
    load_weights(run, dir, 0);
    fprintf(stderr, "%s, %s\n", dir, c->recipe);
    const char *prompt = c->prompt;
    size_t size = strlen(prompt);
    if (!strcmp(prompt, "-")) {
        prompt = text = read_file("/dev/stdin", &size);
        while (size && text[size - 1] == '\n')
            text[--size] = 0;
    }
    fwrite(prompt, 1, size, stdout);
    generate(run, prompt, size, emit_to_file, stdout);
    printf("\n");
    free(text);
    run->backend->release(run->model);
    tokenizer_free(run->tokenizer);
}

// The tokenizer that --tokenizer names, that of the data folder, or that of the checkpoint that is resumed.
void load_tokenizer(Run *run, const char *checkpoint) {
    const char *data = run->config.data, *dir = has_file(data, "tokenizer.json") || !checkpoint ? data : checkpoint;
    char path[4200];
    snprintf(path, sizeof(path), "%s/tokenizer.json", dir);
    if (!has_file(dir, "tokenizer.json") && !run->config.tokenizer[0])
        fail("%s: no tokenizer.json there; name the one that the data were made with by --tokenizer FILE", data);
    run->tokenizer = tokenizer_load(run->config.tokenizer[0] ? run->config.tokenizer : path);
}

// Stops unless the vocabulary of dir/tokenizer.json, where there is one, is the data's.
void compare_tokenizers(const Run *run, const char *dir) {
    char path[4200];
    snprintf(path, sizeof(path), "%s/tokenizer.json", dir);
    const Tokenizer *mine = run->tokenizer;
    if (mine->vocab > run->config.vocab)
        fail("%s: the model has %d tokens, the data's tokenizer %d", dir, run->config.vocab, mine->vocab);
    if (!has_file(dir, "tokenizer.json"))
        return;
    Tokenizer *other = tokenizer_load(path);
    for (int i = 0; i < mine->vocab; i++) {
        if (i >= other->vocab || mine->length[i] != other->length[i] ||
            memcmp(mine->text[i], other->text[i], mine->length[i]))
            fail("%s: token %d is not that of the data in %s; make the data with data/tokenize --tokenizer %s", path, i,
                 run->config.data, path);
    }
    tokenizer_free(other);
}

// Groups of ranks that have all experts among them.
void divide_experts(const Config *c) {
    (void)c;
#ifdef USE_MPI
    int last, moe = moe_layers(c, &last), ep = c->ep ? c->ep : 1;
    for (int n = 2; !c->ep && moe && n <= ranks.size; n++)
        ep = ranks.size % n == 0 && c->experts % n == 0 ? n : ep;
    if (!moe && ep > 1)
        usage_fail("--ep %d: this model has no experts to divide", ep);
    if (ranks.size % ep || (moe && c->experts % ep))
        usage_fail("--ep %d: it must divide the %d ranks and the %d experts", ep, ranks.size, c->experts);
    if (c->replicate && (ep == 1 || c->replicate > c->experts))
        usage_fail("--replicate %d: at most all %d experts can have a copy, and there must be another rank to have it (here: "
                   "--ep %d)", c->replicate, c->experts, ep);
    if (MANY)
        ranks_form(comm.all, ep);
#endif
}

// Stops where a rank was started with other options, other data or another checkpoint than rank 0.
void compare_ranks(Run *run) {
    const Config *c = &run->config;
    char *text = NULL;
    size_t size = 0;
    FILE *memory = open_memstream(&text, &size);
    write_options(memory, &run->config);
    fprintf(memory, "%d %d %d %d %d ", c->ep, c->overlap, c->replicate, c->replicate_every, c->tokens); // of this call
    fprintf(memory, "%d ", run->step);
    if (run->train) // of a run that is finished, nobody has read data
        fprintf(memory, "%d %.0f %.0f", c->vocab, data_fingerprint(run->train), data_fingerprint(run->val));
    fclose(memory);
    uint64_t mine = 0;
    for (size_t i = 0; i < size; i++)
        mine = hash64(mine ^ (unsigned char)text[i]);
    free(text);
    uint64_t first = mine;
    ranks_meet(); // what comes next waits inside MPI, where nobody keeps the watch
    broadcast(&first, sizeof(first));
    if (mine != first)
        fail("this rank has other options, other data or another checkpoint than rank 0 (step %d, data %s)", run->step,
             run->config.data);
}

// Everything before the first step; 0 where there is nothing left to do. Nothing is written before all is checked.
int open_run(Run *run, const Config *asked) {
    Config *c = &run->config;
    char checkpoint[4096], path[4200];
    snprintf(checkpoint, sizeof(checkpoint), "%s/latest", run->out);
    if (has_file(run->out, "config.json"))
        usage_fail("%s is a model, not a run directory: start from it by --init, or resume the run that holds it", run->out);
    int resumed = asked->resume && has_file(checkpoint, "config.json"), count;
    long left = smallest_checkpoint(run->out, &count);
    if (asked->resume && !resumed && left >= 0)
        fail("%s does not lead to a checkpoint, though there are some beside it: link it to one that is whole", checkpoint);
    if (resumed) {
        snprintf(path, sizeof(path), "%s/trainer_state.json", checkpoint);
        size_t size;
        char *text = read_file(path, &size);
        Json *state = json_parse(text, size, path);
        config_from_directory(c, checkpoint);
        long whole = (long)c->batch * c->accum;
        if (asked->given[find_option("batch")]) { // the same step in other pieces
            c->batch = asked->batch;
            c->accum = asked->given[find_option("accum")] ? asked->accum : (int)(whole / c->batch / ranks.size);
            if ((long)c->batch * c->accum * ranks.size != whole)
                usage_fail("%s: a step there has %ld sequences, and cannot have --batch %d times --accum %d on %d ranks",
                           checkpoint, whole, c->batch, c->accum, ranks.size);
        } else if (c->batch % ranks.size) {
            usage_fail("%s: a micro-step there has %d sequences, which %d ranks cannot share evenly; --batch makes other ones",
                       checkpoint, c->batch, ranks.size);
        } else {
            c->batch /= ranks.size;
        }
        join_options(c, asked, 1 << MODEL | 1 << ORDER | 1 << TRAIN, 1 << MODEL | 1 << ORDER, checkpoint);
        double step = expect_member(state, "step", 'i', path)->number;
        if (!(step >= 1 && step <= 2e9))
            fail("%s: step is %g; expected a number from 1 to 2e9", path, step);
        run->step = (int)step;
        if (run->step >= c->steps) {
            compare_ranks(run);
            printf("%s is finished: %d steps of %d. To go on, give more --steps\n", run->out, run->step, c->steps);
            json_free(state);
            free(text);
            return 0;
        }
        double fingerprint = expect_member(state, "data_fingerprint", 'n', path)->number;
        config_check(c);
        load_tokenizer(run, checkpoint);
        run->before = memory_now();
        run->train = data_open(c->data, "train", c->seq, c->vocab, (uint64_t)c->seed);
        if (data_fingerprint(run->train) != fingerprint)
            fail("%s: these are not the training tokens that the run in %s began with, and they may not change",
                 c->data, run->out);
        compare_tokenizers(run, checkpoint);
        json_free(state);
        free(text);
    } else {
        if (!asked->resume && (has_file(run->out, "log.jsonl") || left >= 0))
            usage_fail("%s holds a run already: go on with it by --resume, or choose another --out", run->out);
        if (c->init[0]) {
            Config mine = *asked;
            config_from_directory(c, c->init);
            if (!asked->given[find_option("recipe")]) // the checkpoint's, whose training options go with its model
                config_recipe(&mine, c->recipe);
            join_options(c, &mine, 1 << MODEL, 1 << MODEL, asked->init);
        }
        config_check(c);
        if (!c->data[0])
            c->data = has_file("data/tinystories", "tokenizer.json") ? "data/tinystories" : "data/stories";
        load_tokenizer(run, NULL);
        run->before = memory_now();
        c->vocab = c->init[0] ? c->vocab : run->tokenizer->vocab;
        if (c->init[0])
            compare_tokenizers(run, c->init);
        run->train = data_open(c->data, "train", c->seq, c->vocab, (uint64_t)c->seed);
    }
    compare_tokenizers(run, c->data);
    run->val = data_open(c->data, "val", c->seq, c->vocab, (uint64_t)c->seed);
    run->inputs = (int *)allocate((size_t)c->batch * c->seq, sizeof(int));
    run->targets = (int *)allocate((size_t)c->batch * c->seq, sizeof(int));
    compare_ranks(run);
    divide_experts(c);
    run->model = run->backend->create(c, c->batch * c->seq, 1, NULL);
    if (resumed) {
        load_weights(run, checkpoint, 1);
    } else if (c->init[0]) {
        load_weights(run, c->init, 0);
    } else {
        double *frequency = data_frequency(run->train, c->vocab);
        run->backend->init(run->model, frequency);
        free(frequency);
    }
    run->warned = (unsigned char *)allocate(c->layers, 1);
    ranks_meet(); // before the first file is written, all have seen that there is none
    make_directories(run->out);
    if (ranks.rank)
        snprintf(path, sizeof(path), "/dev/null"); // this rank's log is nobody's
    else
        snprintf(path, sizeof(path), "%s/log.jsonl", run->out);
    run->log = fopen(path, "ab");
    if (!run->log)
        fail("%s: cannot open: %s", path, strerror(errno));
    if (!ranks.rank && flock(fileno(run->log), LOCK_EX | LOCK_NB) != 0)
        fail("%s: another process trains there", run->out);
    if (!ranks.rank)
        cut_log(path, run->step);
    ranks_meet();
    if (c->trace) {
        snprintf(path, sizeof(path), "%s/trace-%d.jsonl", run->out, ranks.rank);
        cut_log(path, run->step);
        run->trace = fopen(path, "ab");
        if (!run->trace)
            fail("%s: cannot open: %s", path, strerror(errno));
    }
    return 1;
}

void close_run(Run *run) {
    fclose(run->log);
    if (run->trace)
        fclose(run->trace);
    run->backend->release(run->model);
    tokenizer_free(run->tokenizer);
    data_close(run->train);
    data_close(run->val);
    free(run->inputs);
    free(run->targets);
    free(run->warned);
    free(run->probe);
}

// Where the memory goes, and what --recompute does about it: of all layers' activations that it need not keep, one
// layer's; and nearly the whole forward pass a second time.
void print_memory(Run *run) {
    static const char *const names[] = {"weights", "gradients", "moments", "activations", "buffers"};
    const Config *c = &run->config;
    const Model *m = run->model;
    double before = run->before + 2 * (run->train->tokens + run->val->tokens), sum = before, mib = 1048576, again = 0;
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        int whole = t->kind == QKV || t->kind == PROJ || t->kind == DENSE_IN;
        int some = t->kind == W_IN && ranks.ep == 1; // what came from other ranks is kept
        if (whole || some) // of the last layer nothing is lost
            again += 2.0 * (double)t->whole * (whole ? 1 : (double)c->topk / c->experts * c->subtokens) * (t->layer < c->layers - 1);
    }
    again += 2.0 * (c->layers - 1) * c->seq * c->dim;
    printf("memory in MiB:");
    for (int i = 0; i < HARDLY_TOUCHED; i++) {
        printf(" %s %.1f,", names[i], (double)m->bytes[i] / mib);
        sum += (double)m->bytes[i];
    }
    int bound = c->select == EXPERT_CHOICE || c->select == THRESHOLD; // room for more choices than there will be
    double device = run->backend->memory();
    if (device > 0)
        printf(" together %.1f of the device's %.0f\n", (sum - before) / mib, device / mib);
    else
        printf(" the program and its tokens %.1f; together %s%.1f\n", before / mib, bound ? "at most " : "", sum / mib);
    printf("%s --recompute: activations %.1f and %.0f%% %s operations\n", c->recompute ? "without" : "with",
           ((double)m->bytes[FOR_ACTIVATIONS] +
            (c->recompute ? 1 : -1) * (double)sizeof(real) * (double)(m->passing - m->largest)) / mib,
           100 * again / (run->flops + (c->recompute ? again : 0)), c->recompute ? "fewer" : "more");
    fprintf(run->log, "\"memory\":{");
    for (int i = 0; i < HARDLY_TOUCHED; i++)
        fprintf(run->log, "\"%s\":%zu,", names[i], m->bytes[i]);
    fprintf(run->log, "\"program\":%.0f},", before);
}

void announce(Run *run) {
    const Config *c = &run->config;
    double total, active;
    char device[128];
    count_parameters(c, &total, &active);
    run->backend->device(device);
    run->flops = flops_per_token(c);
    ranks_meet();
    run->peak = run->backend->peak();
    sum_over_ranks(&run->peak, 1);
    fprintf(run->log, "{\"type\":\"run\",");
    write_options(run->log, c);
    fprintf(run->log,
            ",\"vocab\":%d,\"params\":%.0f,\"active_params\":%.0f,\"flops_per_token\":%.0f,\"threads\":%d,\"ranks\":%d,",
            c->vocab, total, active, run->flops, thread_count(), ranks.size);
    if (MANY)
        fprintf(run->log, "\"ep\":%d,\"overlap\":%d,\"replicate\":%d,", ranks.ep, c->overlap, c->replicate);
    int last, moe = moe_layers(c, &last);
    printf("%s: %d layers of width %d, %d of them with %d experts of which a token sees %d\n", c->recipe, c->layers, c->dim, moe,
           moe ? c->experts + c->shared : 0, moe ? c->topk + c->shared : 0);
    printf("%.2f million weights, %.2f million at work for each token; vocabulary %d\n", total / 1e6, active / 1e6, c->vocab);
    printf("data %s: %.2f million tokens, %ld windows of %d; a step takes %d of them\n", c->data, run->train->tokens / 1e6,
           run->train->windows, c->seq, c->batch * c->accum * ranks.size);
    if (MANY)
        printf("%d ranks, %d sequences of a micro-step each; %d of %d experts on a rank%s\n", ranks.size, c->batch,
               moe ? c->experts / ranks.ep : 0, moe ? c->experts : 0, ranks.groups > 1 ? ", which others have, too" : "");
    print_memory(run);
    printf("%s, %d threads, peak %.0f GFLOP/s; run directory %s\n", device, thread_count(), run->peak / 1e9, run->out);
    fprintf(run->log, "\"start_step\":%d,\"peak_gflops\":%.4g,\"device\":", run->step, run->peak / 1e9);
    json_write_string(run->log, device, strlen(device));
    fprintf(run->log, "}\n");
    if (run->step)
        printf("going on after step %d\n", run->step);
    printf("\n");
    fflush(stdout);
}

// The whole program, on a device.
int trainer_main(int argc, char **argv, const Backend *backend) {
    static Run run;
    static Config asked;
    parse_command_line(&asked, argc, argv);
    if (asked.help || asked.list_recipes) {
        asked.help ? print_options() : print_recipes();
        return 0;
    }
    if (asked.init[0] && (asked.prompt || asked.resume))
        usage_fail("--init starts a new run from other weights; --%s goes on from --out: give one of them",
                   asked.prompt ? "prompt" : "resume");
    if (asked.prompt && MANY)
        usage_fail("--prompt: one process goes on from a text; start it without mpirun");
    share_cores(&asked);
    run.config = asked;
    run.backend = backend;
    if (strlen(asked.out) > 1900)
        usage_fail("--out: a path of %zu bytes is too long", strlen(asked.out));
    if (asked.out[0])
        snprintf(run.out, sizeof(run.out), "%s", asked.out);
    else
        default_out(&asked, !asked.resume && !asked.prompt, run.out);
    ranks.watchdog = 10 * asked.watchdog; // some may read longer than others
    broadcast(run.out, sizeof(run.out));
    if (asked.prompt) {
        answer_prompt(&run, &asked);
        return 0;
    }
    if (!open_run(&run, &asked))
        return 0;
    ranks.watchdog = asked.watchdog;
    announce(&run);
    int interrupted = train(&run);
    char begin[32] = "";
    const char *name = program_name;
    if (MANY)
        snprintf(begin, sizeof(begin), "mpirun -np %d ", ranks.size);
    if (interrupted) {
        printf("\nstopped after step %d of %d; go on with\n  %s./%s --out %s --resume\n", run.step, run.config.steps,
               begin, name, run.out);
    } else {
        show_experts(&run);
        printf("The run is in %s: log.jsonl, and in %s/latest the model, which Hugging Face's transformers %s.\n"
               "What next:\n"
               "  ./%s --out %s --prompt \"Once upon a time\"\n"
               "  %s./%s --out %s --resume --steps %d\n"
               "  data/tinystories.sh && %s./%s        (real stories; see README.md)\n",
               run.out, run.out, *matching_class(&run.config) ? "opens as it is" : "has no class for", name, run.out,
               begin, name, run.out, run.config.steps * 2, begin, name);
    }
    close_run(&run);
    return interrupted ? 130 : 0;
}

int run_program(int argc, char **argv, const Backend *backend) {
#ifdef _OPENMP
    // Waiting threads should sleep. OpenMP's default is to spin, which on a machine with anything else to do makes a step
    // ten times slower. Its runtime reads this before main, so the program begins once more.
    if (!getenv("OMP_WAIT_POLICY") && setenv("OMP_WAIT_POLICY", "passive", 1) == 0) {
        setenv("OMP_STACKSIZE", "4M", 0); // product_rows packs on the stack, and some systems give a thread but 128 KiB
        execv("/proc/self/exe", argv);
    }
#endif
#ifdef USE_MPI
    int provided;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
    comm.all = MPI_COMM_WORLD;
    if (provided < MPI_THREAD_FUNNELED)
        fail("this MPI cannot be used by a program of several threads");
    MPI_Comm_rank(comm.all, &ranks.rank);
    MPI_Comm_size(comm.all, &ranks.size);
    MPI_Comm_dup(comm.all, &comm.watch);
    program_rank = ranks.rank;
    end_all = ranks.size > 1 ? abort_ranks : NULL;
    if (ranks.rank && !freopen("/dev/null", "w", stdout)) // rank 0 alone speaks
        fail("/dev/null: cannot open: %s", strerror(errno));
#endif
    int status = trainer_main(argc, argv, backend);
    if (fflush(stdout) != 0)
        fail("standard output: cannot write: %s", strerror(errno));
#ifdef USE_MPI
    MPI_Finalize();
#endif
    return status;
}
