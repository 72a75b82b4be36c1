// What the experts had to do: loads, entropy, choices refused. The log shows it, and the selection bias follows it.
// Gives: Statistics, statistics_rows, counted_experts, count_routing, clear_statistics, set_statistics, sum_statistics, count_parameters, flops_per_token.
// Needs: Config, Route and Model of train_moe.c, which includes it.
#ifndef STATISTICS_H
#define STATISTICS_H
#include "cpu/vector.h"
#include "tables.h"

typedef struct Statistics { // of one mixture, in training, since the step began
    double *count;          // (E) choices that went to each expert, before any was refused for want of capacity
    double entropy;         // of the scores, in nats, summed over tokens
    double dropped;         // choices refused
    double active, tokens;  // choices made, tokens
    double *recent;         // (E) load over the mean load, averaged over about the last 50 steps
    int *idle;              // (E) steps since the expert had a token
} Statistics;

void *own(Model *m, size_t count, size_t size);
BOTH real at_least_tiny(real p);

// A model has rows of statistics: of the experts of each layer, and, where attention has experts, two more for each layer,
// of its routers; row L + 2*l + r is that of router r of layer l (dev/mixers/attention_experts.h).
int statistics_rows(const Config *c) {
    return c->layers * (c->attention_experts ? 3 : 1);
}

int route_experts(const Config *c, int which); // of all heads of a router of attention

// Experts that a row counts; 0: there are none, and the row is empty.
int counted_experts(const Config *c, int row) {
    if (row >= c->layers) {
        return route_experts(c, (row - c->layers) % 2);
    }
    return is_moe(c, row) ? c->experts : 0;
}

void allocate_statistics(Model *m, int row) {
    Statistics *s = &m->stats[row];
    int E = counted_experts(&m->config, row);
    s->count = (double *)own(m, (size_t)2 * E, sizeof(double));
    s->recent = s->count + E;
    s->idle = (int *)own(m, E, sizeof(int));
}

// A step of training begins.
void clear_statistics(Model *m) {
    for (int row = 0; row < statistics_rows(&m->config); row++) {
        Statistics *s = &m->stats[row];
        if (s->count) {
            memset(s->count, 0, (size_t)counted_experts(&m->config, row) * sizeof(double));
        }
        s->entropy = s->dropped = s->active = s->tokens = 0;
    }
}

// Minus the sum of p log(p) over n numbers p; of numbers that are not above 0, nothing.
double entropy_of(const real *p, int n) {
    enum { BLOCK = 1024 }; // numbers that are added up as a real
    double total = 0;
    vec zero = {0}, tiny = zero + (real)1e-37;
    for (int first = 0; first < n; first += BLOCK) {
        vec sum = zero;
        for (int i = first; i < min_int(n, first + BLOCK); i += LANES) {
            vec x = vec_load(p + i, n - i);
            sum += CHOOSE(x > zero, x, zero) * vec_log(CHOOSE(x > tiny, x, tiny));
        }
        total -= (double)vec_sum(sum);
    }
    return total;
}

// Adds a batch's routing. Each token's entropy is the mean of its rows; sigmoid scores are divided by their sum first.
void count_routing(Statistics *s, const Route *r, int score) {
    enum { CHUNK = 128 }; // rows; chunks are added in order, so the sum does not depend on the number of threads
    int rows = r->p ? r->rows : 0, E = r->E, chunks = div_up(rows, CHUNK);
    for (int i = 0; i < r->N * r->K; i++) {
        if (r->served[i] >= 0) {
            s->count[r->served[i]] += 1;
            s->active += 1;
        }
    }
    s->tokens += r->N;

    double *part = (double *)allocate(chunks, sizeof(double));
#pragma omp parallel for if (is_worth_threads(rows, 4 * E))
    for (int chunk = 0; chunk < chunks; chunk++) {
        int first = chunk * CHUNK, end = min_int(rows, first + CHUNK);
        if (score != SIGMOID) {
            part[chunk] = entropy_of(r->p + (size_t)first * E, (end - first) * E);
        }
        for (int row = first; row < end && score == SIGMOID; row++) {
            const real *p = r->p + (size_t)row * E;
            double sum = 0;
            for (int e = 0; e < E; e++) {
                sum += (double)at_least_tiny(p[e]);
            }
            for (int e = 0; e < E; e++) {
                double share = (double)at_least_tiny(p[e]) / sum;
                part[chunk] -= share > 0 ? share * log(share) : 0;
            }
        }
    }
    for (int chunk = 0; chunk < chunks; chunk++) {
        s->entropy += part[chunk] * r->N / rows;
    }
    free(part);
}

// What a checkpoint remembers of a layer: Backend's remember.
void set_statistics(Model *m, int l, const double *recent, const int *idle) {
    Statistics *s = &m->stats[l];
    memcpy(s->recent, recent, (size_t)m->config.experts * sizeof(double));
    memcpy(s->idle, idle, (size_t)m->config.experts * sizeof(int));
}

// After the last batch of a step: the counts of all processes, of all layers in one message; then what the log says of
// the last steps.
void sum_statistics(Model *m) {
    int rows = statistics_rows(&m->config), size = 0;
    for (int row = 0; row < rows; row++) {
        size += counted_experts(&m->config, row) + 4;
    }
    double *all = (double *)allocate(size, sizeof(double)), *at = all;
    for (int row = 0; row < rows; row++) {
        const Statistics *s = &m->stats[row];
        int E = counted_experts(&m->config, row);
        double single[4] = {s->entropy, s->dropped, s->active, s->tokens};
        if (E) {
            memcpy(at, s->count, (size_t)E * sizeof(double));
            memcpy(at + E, single, sizeof(single));
        }
        at += E + 4;
    }
    sum_over_ranks(all, size);
    at = all;
    for (int row = 0; row < rows; row++) {
        Statistics *s = &m->stats[row];
        int E = counted_experts(&m->config, row);
        const double *single = at + E;
        if (!E) {
            at += 4;
            continue;
        }
        memcpy(s->count, at, (size_t)E * sizeof(double));
        at += E + 4;
        s->entropy = single[0];
        s->dropped = single[1];
        s->active = single[2];
        s->tokens = single[3];
        double mean = fmax(s->active / E, 1e-9);
        for (int e = 0; e < E; e++) {
            s->idle[e] = s->count[e] > 0 ? 0 : s->idle[e] + 1;
            s->recent[e] += 0.02 * (s->count[e] / mean - s->recent[e]);
        }
    }
    free(all);
}

int tensor_limit(const Config *c);
int model_tensors(const Config *c, Tensor *list);
double mixer_uses(const Config *c, const Tensor *t); // dev/mixers/all.h
double mixing_flops(const Config *c);

// All weights, and those that one token uses. The embedding counts once, as the output matrix. What a token passes
// several times counts so often: experts by each of its sub-tokens, a recurrent router in each layer.
void count_parameters(const Config *c, double *total, double *active) {
    Tensor *list = (Tensor *)allocate(tensor_limit(c), sizeof(Tensor));
    Config whole = *c;
    whole.lora = 0; // all weights are at work, also those that are frozen beside pairs
    int count = model_tensors(&whole, list);
    *total = *active = 0;
    for (int i = 0; i < count; i++) {
        const Tensor *t = &list[i];
        double uses = 1;
        if (t->of_experts) {
            uses = (double)c->topk / c->experts * c->subtokens;
        } else if (t->layer >= 0 && !strcmp(t->kind, "router")) {
            uses = c->subtokens;
        } else if (t->layer < 0 && !strncmp(t->kind, "gru", 3)) {
            uses = moe_layers(c);
        } else if (t->layer < 0 && !strcmp(t->kind, "head")) {
            uses = 0;
        } else if (t->looked_up) {
            uses = (t->looked_up == BY_NGRAM ? c->ngram_order - 1.0 : 1.0) / t->shape[1]; // a row or two, which are added
        } else if (t->layer >= 0) {
            uses = mixer_uses(c, t);
        }
        if (t->trained) {
            *total += (double)t->whole;
            *active += (double)t->whole * uses;
        }
    }
    free(list);
}

// Operations of a training step for each token, a multiply-add counted as two: forward, and twice that backward.
double flops_per_token(const Config *c) {
    double total, active;
    count_parameters(c, &total, &active);
    return (c->lora ? 4 : 6) * active + 3 * c->layers * mixing_flops(c);
}

#endif
