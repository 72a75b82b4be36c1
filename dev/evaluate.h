// What the model is worth so far: validation, a story, and what each expert likes to read.
// Gives: report_evaluation, generate, tell_story, show_experts. Needs: Run of dev/run.h, which includes it.
#pragma once

// ---- validation

// The share of tokens whose chosen experts are not the set that they were at the evaluation before, averaged over the
// layers; -1 at the first one (Dai et al. 2022, StableMoE, call it routing fluctuation).
double routing_fluctuation(Run *run) {
    const Config *c = &run->config;
    int first = !run->probe;
    size_t most = (size_t)c->batch * c->seq * c->subtokens;
    double changed = 0, tokens = 0;
    if (first) {
        run->probe = (uint64_t *)allocate(most * c->layers, sizeof(uint64_t));
    }
    for (int l = 0; l < c->layers; l++) {
        if (!is_moe(c, l)) {
            continue;
        }
        const Route *r = run->backend->route(run->model, l);
        for (int n = 0; n < r->N; n++) {
            uint64_t *before = run->probe + most * l + n, set = 0; // a sum of hashes: the same in any order
            for (int k = 0; k < r->K; k++) {
                set += hash64((uint64_t)r->expert[n * r->K + k]);
            }
            changed += *before != set;
            *before = set;
        }
        tokens += r->N;
    }
    double both[2] = {changed, tokens};
    sum_over_ranks(both, 2);
    return moe_layers(c) && !first ? both[0] / both[1] : -1;
}

// The loss of a batch of validation windows, summed over all its tokens and all processes.
double forward_loss(Run *run, int rows, double scale) {
    Batch batch = {run->inputs, run->targets, rows, run->config.seq, EVAL_MODE, scale, 0, 0, 1, 1};
    double loss, aux, norm;
    run->backend->forward(run->model, &batch);
    run->backend->losses(run->model, &loss, &aux, &norm);
    check_validation(run, loss);
    return loss;
}

// Validation: windows spread evenly over the validation files, always the same ones.
void evaluate(Run *run) {
    const Config *c = &run->config;
    int B = c->batch, T = c->seq;
    long windows = run->val->windows, wanted = c->eval_batches ? (long)c->eval_batches * B * ranks.size : windows;
    if (wanted > windows) {
        wanted = windows;
    }
    double nats = 0, bytes = 0;
    for (long begin = 0; begin < wanted; begin += (long)B * ranks.size) {
        long first = begin + (long)B * ranks.rank, left = wanted - first;
        int rows = left > 0 ? (int)(left < B ? left : B) : 0;
        for (int b = 0; b < rows; b++) {
            long window = (long)((double)(first + b) * (double)windows / (double)wanted);
            size_t at = (size_t)b * (size_t)T;
            data_window(run->val, window, -1, run->inputs + at, run->targets + at);
        }
        nats += forward_loss(run, rows, rows * T);
        if (begin == 0) {
            run->fluctuation = routing_fluctuation(run);
        }
        for (int i = 0; i < rows * T; i++) {
            int target = run->targets[i];
            if (target != run->tokenizer->eot && target < run->tokenizer->vocab) {
                bytes += run->tokenizer->length[target];
            }
        }
    }
    sum_over_ranks(&bytes, 1);
    run->val_loss = nats / ((double)wanted * T);
    run->val_bpb = nats / 0.6931471805599453 / fmax(bytes, 1);
}

void report_evaluation(Run *run) {
    char changed[48] = "";
    evaluate(run);
    if (run->fluctuation >= 0) {
        snprintf(changed, sizeof(changed), ",\"fluctuation\":%.6g", run->fluctuation);
    }
    log_line(run, "eval", "\"step\":%d,\"val_loss\":%.9g,\"val_bpb\":%.9g%s", run->step, run->val_loss, run->val_bpb,
             changed);
    printf("%sstep %d: validation loss %.4f nats per token, %.4f bits per byte%s\n", on_terminal() ? "\r" : "",
           run->step, run->val_loss, run->val_bpb, on_terminal() ? "\033[K" : "");
}

// ---- text

// Goes on from a prompt of size bytes, and writes each token to `to` as soon as it is drawn.
void generate(Run *run, const char *prompt, size_t size, FILE *to) {
    const Config *c = &run->config;
    const Tokenizer *t = run->tokenizer;
    size_t count = 0;
    int *ids = (int *)allocate(size + 2, sizeof(int)), position = 0;
    ids[count++] = t->eot;
    count += tokenizer_encode(run->tokenizer, prompt, size, ids + count);
    real *logits = allocate_reals(c->vocab);
    uint64_t stream = random_stream((uint64_t)c->seed, RANDOM_SAMPLE, 0, 0);
    for (size_t i = 0; i < count; i++) {
        if (ids[i] >= c->vocab) {
            fail("the prompt's token %d is not in the model's vocabulary of %d", ids[i], c->vocab);
        }
        run->backend->generate(run->model, ids[i], position++, logits);
    }
    for (int made = 0; made < c->tokens; made++) {
        if (made > 0) {
            run->backend->generate(run->model, ids[0], position++, logits);
        }
        check_logits(run, logits, position);
        int id = sample(logits, min_int(c->vocab, t->vocab), c->temperature, c->top_k, c->top_p,
                        random_uniform(stream, (uint64_t)position));
        broadcast(&id, sizeof(id)); // processes might differ in the logits' last bits
        if (id == t->eot) {
            break;
        }
        fwrite(t->text[id], 1, (size_t)t->length[id], to);
        fflush(to);
        ids[0] = id;
    }
    free(logits);
    free(ids);
}

// Text of the model's for people: control characters could do things to a terminal. one_line: newlines too.
void print_text(const char *text, int length, int one_line) {
    for (int i = 0; i < length; i++) {
        unsigned char byte = (unsigned char)text[i];
        if ((byte < 32 || byte == 127) && (one_line || byte != '\n')) {
            printf(byte == '\n' ? "\\n" : "\\x%02x", byte);
        } else {
            putchar(byte);
        }
    }
}

void tell_story(Run *run) {
    char *story = NULL;
    size_t size = 0;
    FILE *memory = open_memstream(&story, &size);
    generate(run, "", 0, memory);
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

// ---- the experts

// seen (V): how often each word came in some validation windows; taken (V,E): how often each expert of layer l took it.
void count_words(Run *run, int l, double *seen, double *taken) {
    const Config *c = &run->config;
    int V = run->tokenizer->vocab, E = c->experts;
    int batches = (int)fmin(32, (double)run->val->windows / c->batch / ranks.size);
    for (int i = 0; i < batches; i++) {
        for (int b = 0; b < c->batch; b++) {
            long window = ((long)i * ranks.size + ranks.rank) * c->batch + b;
            data_window(run->val, window, -1, run->inputs + b * c->seq, run->targets + b * c->seq);
        }
        forward_loss(run, c->batch, 1);
        const Route *r = run->backend->route(run->model, l);
        for (int n = 0; n < r->N; n++) {
            int token = run->inputs[n / c->subtokens];
            const int *served = r->served + (size_t)n * r->K;
            if (token >= V) { // of a model whose vocabulary is padded
                continue;
            }
            seen[token] += 1;
            for (int k = 0; k < r->K; k++) {
                int again = 0; // two routers may send a token to the same expert
                for (int j = 0; j < k; j++) {
                    again |= served[j] == served[k];
                }
                if (served[k] >= 0 && !again) {
                    taken[(size_t)token * E + served[k]] += 1;
                }
            }
        }
    }
    sum_over_ranks(seen, V);
    sum_over_ranks(taken, V * E);
}

// Which words each expert of the last layer that has experts likes best: those it takes most above its usual share.
void show_experts(Run *run) {
    const Config *c = &run->config;
    int l = last_moe_layer(c), V = run->tokenizer->vocab, E = c->experts;
    if (l < 0) {
        return;
    }
    double *seen = (double *)allocate(V, sizeof(double)), *taken = (double *)allocate((size_t)V * E, sizeof(double));
    count_words(run, l, seen, taken);
    printf("What the experts of layer %d like to read, and how much of it they take:\n", l + 1);
    for (int e = 0; e < min_int(E, 16); e++) {
        printf("  expert %2d:", e);
        for (int word = 0; word < 7; word++) {
            int best = -1;
            double best_score = 0;
            for (int v = 0; v < V; v++) { // seldom seen words are worth less: they may be there by chance
                double score = seen[v] > 0 ? taken[(size_t)v * E + e] / (seen[v] + 20) : 0;
                if (score > best_score) {
                    best_score = score;
                    best = v;
                }
            }
            if (best < 0) {
                break;
            }
            const char *text = run->tokenizer->text[best];
            int skip = text[0] == ' ' && run->tokenizer->length[best] > 1;
            printf("%s", word ? ", " : " ");
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
