// What the tests of layers, routers and models share: arrays of numbers and how close two of them are, small models of
// every recipe with random weights, and routes, which say which token goes to which expert.
// Gives: take_reals, take_normal, assert_close, small_config, randomize_weights, all_of, set_all, run_batch, take_route, switch_form, ...
// Needs: train_moe.c, which must be included before; dev/test/common.h.

#pragma once
#include "dev/test/common.h"
#include <float.h>

#define IS_DOUBLE (sizeof(real) == 8)
#define EPSILON   (IS_DOUBLE ? DBL_EPSILON : (double)FLT_EPSILON)

// ---------------------------------------------------------------------------------------------------------------------
// Arrays of numbers, and small models of every recipe

real *take_reals(size_t n) {
    return (real *)take(n, sizeof(real));
}

void fill(real *x, size_t n, real value) {
    for (size_t i = 0; i < n; i++)
        x[i] = value;
}

real *take_filled(size_t n, real value) {
    real *x = take_reals(n);
    fill(x, n, value);
    return x;
}

real *take_normal(size_t n, uint64_t seed) { // standard normal numbers
    real *x = take_reals(n);
    for (size_t i = 0; i < n; i++)
        x[i] = (real)random_normal(hash64(seed), i);
    return x;
}

double inner(const real *a, const real *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

double rms(const real *x, size_t n) {
    return sqrt(inner(x, x, n) / (double)(n ? n : 1));
}

// Fails if a number found differs from the wanted one by more than tolerance * (scale + |wanted|), or if it is NaN. The scale is
// the size of the terms that are summed up to the result.
void assert_close(const char *what, const real *found, const real *wanted, size_t n, double scale, double tolerance) {
    for (size_t i = 0; i < n; i++) {
        if (!(fabs((double)found[i] - (double)wanted[i]) <= tolerance * (scale + fabs((double)wanted[i]))))
            fail_msg("%s[%zu] of %zu is %.9g, not %.9g, to %.2g of %.2g", what, i, n, (double)found[i],
                     (double)wanted[i], tolerance, scale);
    }
}

// Fast routines are called with these numbers of threads, and have to give the same bits with each.
enum { TEAMS = 4 };

const int teams[TEAMS] = {1, 2, 3, 5};

uint64_t bits_of(const real *x, size_t n, uint64_t before) {
    for (size_t i = 0; i < n; i++) {
        uint64_t bits = 0;
        memcpy(&bits, &x[i], sizeof(real));
        before = (before ^ bits ^ before >> 32) * 0x100000001b3ull;
    }
    return before;
}

void assert_same_bits(const char *what, int team, uint64_t bits) {
    static uint64_t first;
    if (team == 0)
        first = bits;
    if (bits != first)
        fail_msg("%s: %d threads give other bits than one", what, teams[team]);
}

// Applies "--name value --name value ...".
void apply_options(Config *c, const char *text) {
    char name[64], value[64];
    for (int used = 0; sscanf(text, " --%63s %63s%n", name, value, &used) == 2; text += used) {
        assert_true(find_option(name) >= 0);
        set_option(c, &options[find_option(name)], keep_text(value), NULL);
    }
}

void set_options(Config *c, const char *text) {
    apply_options(c, text);
    config_check(c);
}

// The sizes of those recipes that do not work with 4 experts of which 2 are chosen.
const char *small_sizes(const char *recipe) {
    static const char *const sizes[][2] = {{"switch", "--topk 1"},
                                           {"jacobs", "--topk 4"},
                                           {"shazeer", "--experts 5"},
                                           {"shazeer-lstm", "--experts 5"},
                                           {"hierarchical", "--experts 12 --topk 4"},
                                           {"deepseekmoe", "--experts 7 --topk 3"},
                                           {"deepseek-v2", "--experts 8 --topk 3"},
                                           {"deepseek-v3", "--experts 8 --topk 3"},
                                           {"multirouter", "--topk 4"},
                                           {"st-moe", "--moe-every 2"},
                                           {"olmoe", "--experts 9 --topk 3"},
                                           {"qwen3", "--experts 9 --topk 3"},
                                           {"hash", "--topk 1"},
                                           {"base", "--topk 1"},
                                           {"rmoe", "--recurrent 6"},
                                           {"switchhead", "--attention-experts 3 --head-width 8"},
                                           {"moa", "--attention-experts 6 --head-width 8"},
                                           {"fast", "--ngrams 20"}};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        if (!strcmp(sizes[i][0], recipe))
            return sizes[i][1];
    }
    return "";
}

// The small model of dev/test/golden.py.
Config small_config(const char *recipe) {
    Config c;
    config_defaults(&c);
    apply_options(&c, "--optimizer adamw --beta2 0.95"); // unless the recipe has another
    config_recipe(&c, recipe);
    apply_options(
        &c, "--layers 2 --dim 16 --heads 4 --kv-heads 2 --experts 4 --topk 2 --ffn 12 --seq 8 --batch 2 --threads 1");
    c.vocab = 50;
    set_options(&c, small_sizes(recipe));
    return c;
}

// The recipes, and behind them, as number recipe_count, what none of them has of the tables that are looked up.
#define TABLES_RECIPE "fast"
#define TABLES_CHOICES "--ngram-order 3 --ngram-gate 1"
Config small_variant(int i) {
    Config c = small_config(i < recipe_count ? recipes[i].name : TABLES_RECIPE);
    if (i == recipe_count)
        set_options(&c, TABLES_CHOICES);
    return c;
}

// Random weights, larger than those that training begins with, so that nothing is near zero. A weight's number counts all
// weights in the order of the table, so it is the same on several processes.
void randomize_weights(Model *m) {
    uint64_t stream = random_stream(7, RANDOM_INIT, 1, 2);
    size_t before = 0; // weights of the tensors before this one
    for (int t = 0; t < m->tensor_count; t++) {
        const Tensor *tensor = &m->tensors[t];
        real *w = m->memory[WEIGHTS] + tensor->offset;
        int table = !strcmp(tensor->kind, "table"), level = !strcmp(tensor->kind, "level");
        for (size_t i = 0; i < tensor->size; i++) {
            w[i] = (real)(0.3 * random_normal(stream, before + tensor->first + i) + (tensor->init == INIT_ONE));
            if (table)
                w[i] = (real)(hash64(i) % (uint64_t)m->config.experts);
            if (level)
                w[i] = (real)((0.5 + random_uniform(stream, i)) / m->config.experts);
        }
        before += tensor->whole;
    }
}

// Where a tensor begins in the memory of a single process that has the whole model.
size_t whole_offset(const Model *m, int tensor) {
    size_t at = 0;
    for (int i = 0; i < m->tensor_count; i++) {
        int differ = memory_part(&m->tensors[i]) - memory_part(&m->tensors[tensor]);
        at += differ < 0 || (differ == 0 && i < tensor) ? m->tensors[i].whole : 0;
    }
    return at;
}

size_t whole_size(const Model *m) {
    size_t size = 0;
    for (int i = 0; i < m->tensor_count; i++)
        size += m->tensors[i].whole;
    return size;
}

// The first tensor of which a model has this array: of what is frozen there are WEIGHTS alone.
int first_kept(const Model *m, int what) {
    return what != WEIGHTS && m->config.lora ? base_tensors(m) : 0;
}

// All WEIGHTS, GRADS, MOMENT1 or MOMENT2 of a model on any device, as a single process has them in m->memory; of several ones
// rank 0 gets them, and all have to call it. Until free_taken().
real *all_of(const Backend *backend, Model *m, int what) {
    real *all = take_reals(whole_size(m));
    for (int i = first_kept(m, what); i < m->tensor_count; i++)
        backend->read(m, what, i, all + whole_offset(m, i));
    return all;
}

// The way back, on all processes.
void set_all(const Backend *backend, Model *m, int what, const real *all) {
    for (int i = first_kept(m, what); i < m->tensor_count; i++)
        backend->write(m, what, i, all + whole_offset(m, i));
}

void random_tokens(int *tokens, int n, int vocab, uint64_t seed) {
    for (int i = 0; i < n; i++)
        tokens[i] = (int)(hash64(seed * 1000003 + (uint64_t)i) % (uint64_t)vocab);
}

// ---------------------------------------------------------------------------------------------------------------------
// Random numbers that dev/test/golden.py and dev/test/recipes.py can repeat

uint32_t golden_hash(uint32_t key) {
    uint32_t x = key * 2654435761u + 12345u;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

// ---------------------------------------------------------------------------------------------------------------------
// Batches, routes and balance losses

// A batch that is the last of its step, and the first if its first token is token 0 of the step.
Batch make_batch(const int *inputs, const int *targets, int B, int T, int mode, double scale, long step, long first_token) {
    Batch batch = {inputs, targets, B, T, mode, scale, step, first_token, first_token == 0, 1};
    return batch;
}

// The forward pass of such a batch. Returns its loss.
double run_batch(Model *m, const int *inputs, const int *targets, int B, int T, int mode, double scale, long step,
                 long first_token) {
    Batch batch = make_batch(inputs, targets, B, T, mode, scale, step, first_token);
    return model_forward(m, &batch);
}

// The shapes of E experts that read and write rows of C numbers. The arrays live until free_taken().
Experts take_experts(int E, int C, const int *widths, const int *activations) {
    Experts s = {E, C, take_ints(E), take_ints(E), take_ints(E), take_ints(E), take_ints(E)};
    for (int e = 0; e < E; e++) {
        s.in[e] = s.out[e] = C;
        s.F[e] = widths[e];
        s.hidden[e] = widths[e] * (1 + is_gated(activations[e]));
        s.activation[e] = activations[e];
    }
    return s;
}

// The scratch memory that a function finds. fresh: each piece of it will be an allocation of its own, so that
// AddressSanitizer sees what goes too far. Else it is full of NaN, which shows who reads what nobody wrote.
void prepare_scratch(Model *m, int fresh) {
    if (fresh) {
        arena_free(&m->scratch);
        memset(&m->scratch, 0, sizeof(m->scratch));
        return;
    }
    scratch_reset(m);
    if (m->scratch.memory)
        memset(m->scratch.memory, 0xff, m->scratch.size + 64);
}

// A route whose arrays of integers live until free_taken(). All its tokens are one group.
Route take_route(int N, int E, int K) {
    size_t choices = (size_t)N * K;
    Route r;
    memset(&r, 0, sizeof(r));
    r.N = r.rows = r.group = N;
    r.E = E;
    r.K = K;
    r.expert = take_ints(choices);
    r.served = take_ints(choices);
    r.row = take_ints(choices);
    r.choice = take_ints(choices);
    r.token = take_ints(choices);
    r.offset = take_ints((size_t)E + 1);
    return r;
}

// Fills the rest of a route from r->expert. First choices are served before second ones. factor 0: no choice is refused.
void make_route(Route *r, int group, double factor) {
    r->group = group;
    r->dropped = 0;
    memcpy(r->served, r->expert, (size_t)r->N * r->K * sizeof(int));
    if (factor > 0)
        drop_overflow(r, factor, r->K, 1);
    sort_by_expert(r);
}

// A route that has what the balance losses look at: p (N,E), and slope (groups,E).
Route balance_route(const real *p, const double *slope, int N, int E, int group) {
    Route r;
    memset(&r, 0, sizeof(r));
    r.N = r.rows = N;
    r.E = E;
    r.group = group;
    r.p = (real *)p;
    r.slope = (double *)slope;
    return r;
}

// The balance loss of the Switch Transformer, over groups of tokens, when `count` says how often each expert was chosen.
// dp not NULL: dp (N,E) += scale times its derivative.
double switch_form(const real *p, const int *count, int N, int E, int group, real *dp, double scale) {
    double slope[64] = {0}, counts[64];
    Route r = balance_route(p, slope, N, E, group);
    assert_true(N / group * E <= 64);
    for (int i = 0; i < N / group * E; i++)
        counts[i] = count[i];
    for (int i = 0; i < N / group; i++)
        add_balance(slope + i * E, counts + i * E, E, 1);
    if (dp)
        balance_backward(dp, &r, SOFTMAX, scale);
    return mean_of_slopes(&r, SOFTMAX);
}

// Random probabilities, many of which are equal.
real *take_scores(int N, int E, uint64_t seed) {
    real *p = take_reals((size_t)N * E);
    for (int i = 0; i < N * E; i++)
        p[i] = (real)(hash64(seed * 1000003 + (uint64_t)i) % 8) / 8;
    return p;
}

// The logits of the next token after each of the N tokens of the last forward pass. (N,V)
void all_logits(const Model *m, real *logits, int N) {
    matmul(logits, m->acts.h, m->params.head, N, m->config.dim, m->config.vocab, SET);
}
