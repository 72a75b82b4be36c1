// What the model is worth so far: validation, a story, and what each expert likes to read.
// Gives: report_evaluation, generate, tell_story, show_experts. Needs: Run of dev/run.h, which includes it.
#pragma once

// ---- validation
//
// An evaluation reads a fixed number of tokens, and its figure does not depend on how the training is divided: the
// model reads one window after the other, each as a batch of its own. So no router and no capacity sees more than one
// window, the kernels always work on the same shapes, and the losses are added in the order of the windows. What
// several processes add in another order differs in digits that are not printed.

typedef struct Evaluation {
    long windows;       // read
    double loss, bpb;   // nats per token, bits per byte
    double loss_error, bpb_error; // standard errors; NaN where one window was read
} Evaluation;

// Windows of an evaluation during the run, and of the last one. The last one reads all of the validation text where
// that is little work beside the run: a forward pass is a third of a training step, and it may take 3% of all steps.
long evaluation_windows(const Run *run, int last) {
    const Config *c = &run->config;
    long all = run->val->windows, wanted = c->eval_tokens ? ((long)c->eval_tokens + c->seq - 1) / c->seq : all;
    double trained = (double)c->steps * c->accum * c->batch * ranks.size; // windows of the run
    return wanted > all || (last && (double)all / 3 <= 0.03 * trained) ? all : wanted;
}

// The loss of a batch of windows, mean over its tokens; of this process alone.
double forward_loss(Run *run, int rows) {
    Batch batch = {run->inputs, run->targets, rows, run->config.seq, EVAL_MODE, 1, 0, 0, 1, 1};
    double loss, aux, norm;
    run->backend->forward(run->model, &batch);
    run->backend->losses(run->model, &loss, &aux, &norm);
    check_validation(run, loss);
    return loss;
}

// The loss of number i of `count` windows, which are spread evenly over the validation files. Where i is count or more,
// this process has no window, and only does its part for the others.
double window_loss(Run *run, long i, long count) {
    int *group = &run->model->config.group, before = *group;
    if (i < count) {
        long window = (long)((uint64_t)i * (uint64_t)run->val->windows / (uint64_t)count);
        data_window(run->val, window, -1, run->inputs, run->targets);
    }
    *group = SEQUENCE; // the windows that other processes read are no part of this one's batch
    double loss = forward_loss(run, i < count ? 1 : 0);
    *group = before;
    return loss;
}

// The share of tokens whose chosen experts are not the set that they were at the evaluation before, averaged over the
// layers; -1 at the first one (Dai et al. 2022, StableMoE, call it routing fluctuation). It looks at a few windows.
double routing_fluctuation(Run *run, int last) {
    const Config *c = &run->config;
    enum { PROBED = 8 };
    long count = (long)fmin(PROBED, (double)evaluation_windows(run, 0)), rounds = div_up((int)count, ranks.size);
    size_t each = (size_t)c->seq * c->subtokens;
    int first = !run->probe;
    double both[2] = {0, 0}; // tokens whose experts changed, tokens
    if (!moe_layers(c) || (first && last)) { // there is nothing to compare, now and later
        return -1;
    }
    if (first) {
        run->probe = (uint64_t *)allocate((size_t)rounds * c->layers * each, sizeof(uint64_t));
    }
    uint64_t *before = run->probe;
    for (long begin = 0; begin < count; begin += ranks.size) {
        window_loss(run, begin + ranks.rank, count);
        for (int l = 0; l < c->layers; l++, before += each) {
            const Route *r = is_moe(c, l) ? run->backend->route(run->model, l) : NULL;
            for (int n = 0; r && n < r->N; n++) {
                uint64_t set = 0; // a sum of hashes: the same in any order
                for (int k = 0; k < r->K; k++) {
                    set += hash64((uint64_t)r->expert[n * r->K + k]);
                }
                both[0] += before[n] != set;
                both[1] += 1;
                before[n] = set;
            }
        }
    }
    sum_over_ranks(both, 2);
    return first ? -1 : both[0] / both[1];
}

// The bytes of text that the targets of the window in memory stand for.
double target_bytes(const Run *run) {
    double bytes = 0;
    for (int t = 0; t < run->config.seq; t++) {
        int target = run->targets[t];
        if (target != run->tokenizer->eot && target < run->tokenizer->vocab) {
            bytes += run->tokenizer->length[target];
        }
    }
    return bytes;
}

// Validation: always the same windows. The standard errors say how far the figures would be from those of as many other
// windows of that kind: with s the standard deviation of the windows' losses, that of their mean is s / sqrt(windows).
// Bits per byte are a ratio of two sums over windows, nats and bytes: there s is that of nats - ratio * bytes.
Evaluation evaluate(Run *run, long windows) {
    int T = run->config.seq;
    double nats = 0, bytes = 0, nn = 0, nb = 0, bb = 0; // sums over windows, of products, too
    double *part = (double *)allocate((size_t)2 * ranks.size, sizeof(double));
    for (long begin = 0; begin < windows; begin += ranks.size) {
        long mine = begin + ranks.rank;
        memset(part, 0, (size_t)2 * ranks.size * sizeof(double));
        part[2 * ranks.rank] = window_loss(run, mine, windows) * T;
        part[2 * ranks.rank + 1] = mine < windows ? target_bytes(run) : 0;
        sum_over_ranks(part, 2 * ranks.size); // each process has the others' windows now
        for (int r = 0; r < ranks.size; r++) {
            double n = part[2 * r], b = part[2 * r + 1];
            nats += n;
            bytes += b;
            nn += n * n;
            nb += n * b;
            bb += b * b;
        }
    }
    free(part);
    double w = (double)windows, ratio = nats / fmax(bytes, 1);
    double of_mean = sqrt(fmax(0, nn - nats * nats / w) * w / (w - 1)), ln2 = 0.6931471805599453;
    double of_ratio = sqrt(fmax(0, nn - 2 * ratio * nb + ratio * ratio * bb) * w / (w - 1));
    Evaluation e = {windows, nats / (w * T), ratio / ln2, of_mean / (w * T), of_ratio / fmax(bytes, 1) / ln2};
    if (windows == 1) {
        e.loss_error = e.bpb_error = NAN;
    }
    return e;
}

// A standard error as text; "null" where there is none, which is JSON's word for that.
const char *error_text(double error, char text[32]) {
    snprintf(text, 32, isfinite(error) ? "%.2g" : "null", error);
    return text;
}

void report_evaluation(Run *run) {
    char changed[48] = "", errors[80] = "", loss_error[32], bpb_error[32];
    int last = run->step == run->config.steps;
    refuse_changed_data();
    double fluctuation = routing_fluctuation(run, last);
    Evaluation e = evaluate(run, evaluation_windows(run, last));
    error_text(e.loss_error, loss_error);
    error_text(e.bpb_error, bpb_error);
    if (fluctuation >= 0) {
        snprintf(changed, sizeof(changed), ",\"fluctuation\":%.6g", fluctuation);
    }
    log_line(run, "eval",
             "\"step\":%d,\"val_loss\":%.5f,\"val_bpb\":%.5f,\"val_tokens\":%.0f,\"val_se\":%s,\"val_bpb_se\":%s%s",
             run->step, e.loss, e.bpb, (double)e.windows * run->config.seq, loss_error, bpb_error, changed);
    if (last && isfinite(e.bpb_error)) {
        snprintf(errors, sizeof(errors), ", standard error %s, from %s%.0f tokens", bpb_error,
                 e.windows == run->val->windows ? "all " : "", (double)e.windows * run->config.seq);
    }
    printf("%sstep %d: validation loss %.4f nats per token, %.4f bits per byte%s\n", on_terminal() ? "\r\033[K" : "",
           run->step, e.loss, e.bpb, errors);
}

// ---- text

// Goes on from a prompt of size bytes, and writes each token to `to` as soon as it is drawn.
void generate(Run *run, const char *prompt, size_t size, FILE *to) {
    const Config *c = &run->config;
    const Tokenizer *t = run->tokenizer;
    size_t count = 0;
    int *ids = (int *)allocate(tokenizer_bound(t, size) + 1, sizeof(int)), position = 0;
    ids[count++] = t->bos < 0 ? t->eot : t->bos;
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
        int skip = t->shape.strip && !size && !made && t->length[id] && *t->text[id] == ' ';
        fwrite(t->text[id] + skip, 1, (size_t)(t->length[id] - skip), to);
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
    FILE *memory = open_memory(&story, &size);
    generate(run, "", 0, memory);
    close_memory(memory, &story);
    fprintf(run->log, "{\"type\":\"sample\",\"step\":%d,\"text\":", run->step);
    json_write_string(run->log, story, size);
    fprintf(run->log, "}\n");
    flush_log(run);
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
        forward_loss(run, c->batch);
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
