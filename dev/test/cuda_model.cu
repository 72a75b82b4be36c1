// The CUDA twin as a whole, beside the C twin: experts, models of every recipe, steps of training, generation, files,
// memory and errors.
//
// Tolerances are of norms: |found - wanted| / |wanted|. The fp32 build does the same sums in another order, hence 1e-5.
// Numbers that are rounded to bfloat16 on the way are off by 2^-9 each time, hence 2e-2. In bfloat16 the twins begin with
// numbers that it can hold, and the C twin's choices are taken over: where a token's best scores are closer together than
// 2^-9, the twins would rightly choose differently, and nothing after that could be compared. Weights have a standard
// deviation of SPREAD instead of randomize_weights' 0.3, which makes two layers multiply a rounding by up to 30: the worst
// that was found is then 3e-6, and 1e-2.

#include "dev/test/cuda_twin.h"
#include "dev/test/taught.h"
#include "dev/test/cuda_runs.h"

// ---------------------------------------------------------------------------------------------------------------------
// The layers on the device against their C twins, on random numbers

void too_wide(void *arg) {
    gpu::attention_forward((gpu::floatX *)arg, NULL, NULL, NULL, 1, 1, 1, 1, 258);
}

#define TWIN_TOLERANCE (LOW ? 2e-2 : 1e-5)

// A copy on the device, for which x is rounded.
gpu::floatX *put_low(real *x, size_t n) {
    gpu::floatX *low = (gpu::floatX *)take(n, sizeof(gpu::floatX));
    for (size_t i = 0; i < n; i++) {
        low[i] = rounded(x[i]);
        x[i] = exact(low[i]);
    }
    return on_the_device(low, n);
}

gpu::floatX *room_low(size_t n) {
    return device_room<gpu::floatX>(n);
}

// Rows of `width` numbers, ld apart on the device.
real *take_back_low(const gpu::floatX *x, size_t rows, size_t width, size_t ld) {
    gpu::floatX *low = take_back(x, rows * ld);
    real *to = take_reals(rows * width);
    for (size_t i = 0; i < rows * width; i++)
        to[i] = exact(low[i / width * ld + i % width]);
    return to;
}

double norm_of(const real *x, size_t n) {
    return sqrt(inner(x, x, n));
}

double distance(const real *a, const real *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    return sqrt(sum);
}

// Fails where found is further from wanted than tolerance times the larger of |wanted| and `least`; NaN fails too.
void assert_alike_norm(const char *what, const char *name, const real *found, const real *wanted, size_t n, double least,
                       double tolerance) {
    double far = distance(found, wanted, n), scale = fmax(norm_of(wanted, n), least);
    if (!(far <= tolerance * scale))
        fail_msg("%s: %s is off by %.3g of %.3g (norm %.3g); allowed %.2g", what, name, far / scale, scale,
                 norm_of(wanted, n), tolerance);
}

// ---- the experts alone

enum { ALIKE, UNLIKE, AS_CMOE }; // experts' widths and activations

int eights(int n) { // widths are multiples of eight
    return (n + 7) / 8 * 8;
}

// Both passes of random experts over a random plan. share: of the choices that are made at all; a capacity factor below
// E drops some of these. hot: share of the tokens whose first choice is expert 0.
void check_gpu_experts(int N, int E, int K, int C, int F, int activation, int mixed, double factor, double share,
                       double hot, int weighted) {
    char what[160];
    uint64_t seed = fresh();
    int *width = take_ints(2 * E), *kind = width + E, widest = 0, H = 0;
    size_t slots = (size_t)N * K, size = (size_t)N * C, *in = (size_t *)take(2 * E + 2, sizeof(size_t)), *out = in + E + 1;
    for (int e = 0; e < E; e++) {
        width[e] = F;
        if (mixed == UNLIKE) {
            width[e] = max_int(8, F - e % 3 * 8);
        } else if (mixed == AS_CMOE && e % 4 == 3) {
            width[e] = eights(F * 3 / 2);
        } else if (mixed == AS_CMOE && e % 4 == 0) {
            width[e] = eights(F / 2);
        }
        kind[e] = mixed == UNLIKE ? e % 4 : mixed == AS_CMOE ? (e % 2 ? GELU : SWIGLU) : activation;
        in[e + 1] = in[e] + (size_t)width[e] * (1 + is_gated(kind[e])) * C;
        out[e + 1] = out[e] + (size_t)width[e] * C;
        widest = max_int(widest, width[e]);
        H = max_int(H, width[e] * (1 + is_gated(kind[e])));
    }
    Route plan = take_route(N, E, K);
    for (int i = 0; i < N * K; i++) {
        int e = i % K ? (plan.expert[i - 1] < 0 ? i % K : plan.expert[i - 1] + 1) % E
                      : random_uniform(seed, 3 * i) < hot ? 0 : (int)(random_uniform(seed, 3 * i + 1) * E);
        plan.expert[i] = random_uniform(seed, 3 * i + 2) < share ? e : -1;
    }
    make_route(&plan, N, factor);
    int dropped = plan.dropped;
    size_t rows = plan.offset[E], act_size = 0, hidden_size = 0;
    for (int e = 0; e < E; e++) {
        size_t n = plan.offset[e + 1] - plan.offset[e];
        act_size += n * width[e];
        hidden_size += n * width[e] * (1 + is_gated(kind[e]));
    }
    snprintf(what, sizeof(what), "experts, N %d, E %d, K %d, C %d, F %d, %s, %d rows, %d dropped", N, E, K, C, F,
             mixed ? "mixed" : activation_names[activation], (int)rows, dropped);
    real *x = take_normal(size, seed + 1), *dout = take_normal(size, seed + 2), *from = take_normal(size, seed + 3);
    real *branch = take_normal(size, seed + 4), *w_in = take_normal(in[E], seed + 5), *w_out = take_normal(out[E], seed + 6);
    real *dw_in = take_normal(in[E], seed + 7), *dw_out = take_normal(out[E], seed + 8);
    real *weight = take_normal(slots, seed + 9), *dweight = take_filled(slots, 7);
    for (size_t i = 0; i < in[E]; i++)
        w_in[i] /= (real)sqrt(C);
    for (size_t i = 0; i < out[E]; i++)
        w_out[i] /= (real)sqrt(F);

    gpu::floatX *x_low = put_low(x, size), *dout_low = put_low(dout, size), *in_low = put_low(w_in, in[E]);
    gpu::floatX *out_low = put_low(w_out, out[E]), *branch_low = put_low(branch, size), *rows_low = room_low(slots * C);
    gpu::floatX *hidden = room_low(slots * H), *act = room_low(slots * widest), *dhidden = room_low(slots * H);
    gpu::floatX *drows = room_low(slots * C), *dx_low = room_low(size);
    int tiles = (int)(slots / gpu::TM) + E, *slot = on_the_device(plan.row, slots);
    int2 *list = (int2 *)take(tiles, sizeof(int2)), *tile; // expert and first row of each tile
    for (int e = 0, i = 0; i < tiles; e++) {
        for (int r = e < E ? plan.offset[e] : -1; i < tiles && r < (e < E ? plan.offset[e + 1] : 0); r += gpu::TM) {
            list[i++] = make_int2(e < E ? e : -1, r);
        }
    }
    tile = on_the_device(list, tiles);
    float *device_weight = weighted ? on_the_device(weight, slots) : NULL, *sum_back = device_room<float>(size);
    float *part = device_room<float>(slots * div_up(widest, gpu::TN)), *from_back = on_the_device(from, size);
    float *dw_in_back = on_the_device(dw_in, in[E]), *dw_out_back = on_the_device(dw_out, out[E]);
    float *dweight_back = on_the_device(dweight, slots);
    gpu::Experts experts = {E, C, widest, H, on_the_device(width, E), on_the_device(kind, E), on_the_device(out, E + 1),
                            on_the_device(in, E + 1), on_the_device(plan.offset, E + 1), on_the_device(plan.token, slots),
                            on_the_device(plan.choice, slots), tile, tiles};
    gpu::experts_forward(rows_low, hidden, act, x_low, in_low, out_low, device_weight, &experts);
    gpu::combine(sum_back, from_back, branch_low, rows_low, slot, N, K, C);
    real *found_act = take_back_low(act, rows, widest, widest);
    gpu::experts_backward(drows, dw_in_back, dw_out_back, dout_low, x_low, hidden, device_weight, in_low, out_low, act,
                          dhidden, part, slots, &experts);
    gpu::sum_dweight(dweight_back, part, experts.choice, experts.offset + E, slots, div_up(widest, gpu::TN));
    gpu::combine(dx_low, NULL, NULL, drows, slot, N, K, C);

    Model *m = bare_model(0); // of which the C twin takes scratch memory
    ::Experts plain = take_experts(E, C, width, kind);
    real *c_rows = take_reals(rows * C), *c_hidden = take_reals(hidden_size), *c_act = take_reals(act_size);
    real *c_drows = take_reals(rows * C), *sum = take_reals(size), *dx = take_reals(size), *c_weight = take_filled(slots, 1);
    for (size_t i = 0; i < size; i++)
        sum[i] = from[i] + branch[i];
    for (size_t i = 0; i < slots && weighted; i++)
        c_weight[i] = weight[i];
    ::experts_forward(m, c_rows, c_hidden, x, w_in, w_out, plan.token, plan.offset, &plain);
    ::experts_activation_forward(c_act, c_hidden, plan.offset, &plain);
    ::combine(sum, c_rows, weighted ? weight : NULL, plan.row, N, K, C);
    ::experts_backward(m, c_drows, dweight, dw_in, dw_out, dout, x, c_hidden, c_weight, w_in, w_out, plan.token, plan.choice,
                       plan.offset, &plain);
    ::combine(dx, c_drows, NULL, plan.row, N, K, C);

    real *found_hidden = take_back_low(hidden, rows, H, H);
    size_t at_act = 0, at_hidden = 0;
    for (int e = 0; e < E; e++) { // the C twin's rows are as wide as their expert, the device's as the widest
        size_t F = width[e], wide = F * (1 + is_gated(kind[e]));
        for (int s = plan.offset[e]; s < plan.offset[e + 1]; s++, at_act += F, at_hidden += wide) {
            assert_alike_norm(what, "hidden", found_hidden + (size_t)s * H, c_hidden + at_hidden, wide, 1, TWIN_TOLERANCE);
            assert_alike_norm(what, "act", found_act + (size_t)s * widest, c_act + at_act, F, 1, TWIN_TOLERANCE);
        }
    }
    for (int s = 0; weighted && s < (int)rows; s++) {
        for (int c = 0; c < C; c++)
            c_rows[(size_t)s * C + c] *= weight[plan.choice[s]];
    }
    real *found_dweight = take_back(dweight_back, slots);
    const struct {
        const char *name;
        const real *found, *wanted;
        size_t n;
    } results[] = {{"rows", take_back_low(rows_low, rows, C, C), c_rows, rows * C},
                   {"sum", take_back(sum_back, size), sum, size},
                   {"drows", take_back_low(drows, rows, C, C), c_drows, rows * C},
                   {"dx", take_back_low(dx_low, N, C, C), dx, size},
                   {"dw_in", take_back(dw_in_back, in[E]), dw_in, in[E]},
                   {"dw_out", take_back(dw_out_back, out[E]), dw_out, out[E]},
                   {"dweight", found_dweight, dweight, slots}};
    for (int i = 0; i < 7; i++)
        assert_alike_norm(what, results[i].name, results[i].found, results[i].wanted, results[i].n,
                          0.3 * sqrt((double)results[i].n * (i == 6 ? C : 1)), TWIN_TOLERANCE); // at least their terms' size
    for (size_t i = 0; i < slots; i++) // who has no slot stays as he was
        assert_true(plan.row[i] >= 0 || found_dweight[i] == 7);
    free_device();
    free_taken();
}

void test_gpu_experts(void **state) {
    (void)state;
    gpu::start_device();
    for (int activation = SWIGLU; activation <= GELU; activation++) {
        check_gpu_experts(23, 5, 2, 16, 24, activation, ALIKE, 5, 1, 0.2, 1);
        check_gpu_experts(19, 4, 2, 40, 8, activation, ALIKE, 0.7, 1, 0.2, 1);
    }
    check_gpu_experts(1, 1, 1, 8, 8, SWIGLU, ALIKE, 1, 1, 0, 1);
    check_gpu_experts(1, 5, 2, 8, 8, GEGLU, ALIKE, 5, 1, 0, 1);
    check_gpu_experts(9, 1, 1, 24, 40, SWIGLU, ALIKE, 1, 1, 0, 0);
    check_gpu_experts(6, 4, 2, 16, 8, SWIGLU, ALIKE, 4, 0, 0, 1); // nobody chooses anyone
    check_gpu_experts(12, 300, 2, 8, 8, RELU, ALIKE, 300, 1, 0, 1);
    check_gpu_experts(290, 3, 1, 24, 16, SWIGLU, ALIKE, 3, 1, 0.95, 1); // three tiles of rows, and little else
    check_gpu_experts(150, 2, 2, 8, 72, GELU, ALIKE, 2, 1, 1, 1);       // each has all
    check_gpu_experts(140, 4, 2, 32, 8, GEGLU, ALIKE, 0.5, 0.9, 0.5, 1);
    check_gpu_experts(21, 4, 2, 136, 144, SWIGLU, ALIKE, 4, 1, 0.3, 1); // several tiles of columns, and of depth
    check_gpu_experts(21, 4, 2, 264, 136, GELU, ALIKE, 4, 1, 0.3, 1);
    check_gpu_experts(21, 3, 2, 40, 264, SWIGLU, ALIKE, 3, 1, 0.3, 1);
    for (int N = 127; N <= 129; N++) { // one row less than a tile, and one more
        check_gpu_experts(N, 1, 1, 40, 24, GEGLU, ALIKE, 1, 1, 1, 1);
    }
    check_gpu_experts(40, 8, 2, 32, 24, SWIGLU, UNLIKE, 8, 1, 0.1, 1);
    check_gpu_experts(40, 8, 3, 24, 40, SWIGLU, UNLIKE, 0.8, 0.8, 0.3, 1);
    check_gpu_experts(30, 6, 2, 136, 144, SWIGLU, UNLIKE, 6, 1, 0.3, 1); // some end where the others' second tile begins
    check_gpu_experts(40, 8, 2, 16, 16, SWIGLU, AS_CMOE, 8, 1, 0.1, 1);
    check_gpu_experts(30, 5, 2, 40, 176, SWIGLU, AS_CMOE, 1, 1, 0.4, 1); // widths on both sides of a tile's
    for (int round = 0; round < 8; round++) {
        uint64_t random = fresh();
        int E = draw(&random, 1, 9), C = eights(draw(&random, 1, 72)), F = eights(draw(&random, 1, 72));
        check_gpu_experts(draw(&random, 1, 60), E, min_int(E, draw(&random, 1, 3)), C, F, round % 4, round % 3,
                          draw(&random, 0, 1) ? E : 0.8, 0.9, 0.3, 1);
    }
}

// ---- models

typedef struct Twins { // a model of either kind with the same weights, and a batch for both
    Config c;
    int B, T, N;
    Model *host, *device;
    int *tokens, *targets;
    gpu::Decided *plans;
    int rounded; // 1 if a draw of tokens gave a gradient that was unusually small beside its roundings
    char name[160];
} Twins;

void copy_weights(Twins *t) { // to the device
    set_all(&gpu::backend, t->device, WEIGHTS, t->host->memory[WEIGHTS]);
}

// No two sequences begin alike: their first tokens would have the same scores but for roundings, hence ties.
void draw_tokens(Twins *t) {
    random_tokens(t->tokens, t->N, t->c.vocab, fresh());
    for (int b = 1; b < t->B; b++)
        t->tokens[b * t->T] = (t->tokens[0] + b) % t->c.vocab;
}

// spread: as standard deviation of the weights, with 0.3 of randomize_weights. A model wider than 32 sums more terms, each as
// much smaller: else its attention would look at one token alone, and enlarge roundings.
Twins make_twins(const char *recipe, const char *choices, int B, double spread) {
    Twins t;
    t.c = device_config(recipe);
    if (*choices)
        set_options(&t.c, choices);
    snprintf(t.name, sizeof(t.name), "%s %s", recipe, choices);
    t.rounded = 0;
    spread *= sqrt(32.0 / max_int(32, t.c.dim));
    t.B = B;
    t.T = t.c.seq;
    t.N = B * t.T;
    set_threads(1);
    t.host = ::model_allocate(&t.c, t.N, 1, NULL);
    t.device = gpu::backend.create(&t.c, t.N, 1, NULL);
    t.tokens = take_ints(t.N);
    t.targets = take_ints(t.N);
    t.plans = (gpu::Decided *)take(t.c.layers, sizeof(gpu::Decided));
    draw_tokens(&t);
    random_tokens(t.targets, t.N, t.c.vocab, fresh());
    randomize_weights(t.host);
    for (int i = 0; i < t.host->tensor_count; i++) {
        const Tensor *tensor = &t.host->tensors[i];
        int one = tensor->init == INIT_ONE;
        real *w = t.host->memory[WEIGHTS] + tensor->offset;
        for (size_t j = 0; j < tensor->size && strcmp(tensor->kind, "table") && strcmp(tensor->kind, "level"); j++)
            w[j] = (real)(one + ((double)w[j] - one) * spread / 0.3);
        round_numbers(w, tensor->size);
    }
    copy_weights(&t);
    return t;
}

void free_twins(Twins *t) {
    ::model_free(t->host);
    gpu::backend.release(t->device);
    free_taken();
}

// The choices of the host's model, for another model to take over.
void note_plans(gpu::Decided *plans, const Model *host) {
    for (int l = 0; l < host->config.layers; l++) {
        if (is_moe(&host->config, l))
            plans[l] = layer_plan(host, l);
        for (int which = 0; which < attention_routes(&host->config); which++) {
            plans[l].heads_expert[which] = heads_of(host, l)->route[which].all.expert;
            plans[l].heads_served[which] = heads_of(host, l)->route[which].all.served;
        }
    }
}

void decide(Twins *t, int yes) {
    note_plans(t->plans, t->host);
    ((gpu::Model *)t->device)->decided = yes ? t->plans : NULL;
}

void clear_gradients(Twins *t) {
    memset(t->host->memory[GRADS], 0, trained_size(t->host) * sizeof(real));
    set_all(&gpu::backend, t->device, GRADS, t->host->memory[GRADS]);
}

// Does the first difference of two plans come from scores of the C twin that are less than 1e-5 apart? Who chose
// differently compared a score with another one of its token, or of its expert, or with a bound.
int is_near_tie(Model *m, int l, const Route *other) {
    const Route *plan = &m->acts.layer[l].route;
    Level level = expert_level(m, l);
    int n = 0, K = plan->K, E = level.count;
    while (n < plan->N * K && plan->expert[n] == other->expert[n])
        n++;
    if (n == plan->N * K || m->config.select == HASH)
        return 0;
    n /= K;

    // The assignment of all tokens of a group has the largest sum of logits: two of them may be equally good.
    if (m->config.select == BALANCED) {
        double mine = 0, its = 0;
        for (int i = n / plan->group * plan->group; i < (n / plan->group + 1) * plan->group; i++) {
            mine += (double)plan->logits[(size_t)i * plan->E + plan->expert[i]];
            its += (double)plan->logits[(size_t)i * plan->E + other->expert[i]];
        }
        return fabs(mine - its) < 1e-5;
    }
    const real *p = deciding_scores(m, l);
    for (int row = n * level.rows; row < (n + 1) * level.rows; row++) {
        for (int e = 0; e < E; e++) {
            double mine = (double)p[(size_t)row * E + e];
            if (m->config.select == THRESHOLD && fabs(mine - (m->config.threshold > 0 ? m->config.threshold : 1.0 / E)) < 1e-5)
                return 1;
            for (int i = 0; i < E; i++) {
                if (i != e && fabs(mine - (double)p[(size_t)row * E + i]) < 1e-5)
                    return 1;
            }
            for (int i = 0; m->config.select == EXPERT_CHOICE && i < plan->N; i++) {
                if (i != n && fabs(mine - (double)p[(size_t)i * E + e]) < 1e-5)
                    return 1;
            }
        }
    }
    return 0;
}

// Where high weights are served first, two choices of one unit may change places: one of them is refused here and served
// there, the other one the other way round, and their weights in the C twin are less than 1e-5 apart.
int is_near_tie_of_service(const Twins *t, const Route *mine, const Route *other) {
    int choices = mine->N * mine->K, units = t->c.capacity_unit == EXPERT_GROUP ? t->c.groups : mine->E;
    if (t->c.capacity_factor <= 0 || t->c.drop_order != BY_SCORE)
        return 0;
    for (int i = 0; i < choices; i++) {
        int found = mine->served[i] == other->served[i];
        for (int j = 0; !found && j < choices; j++) {
            found = (mine->served[i] < 0) != (mine->served[j] < 0) && (other->served[i] < 0) != (other->served[j] < 0) &&
                    (mine->served[j] < 0) != (other->served[j] < 0) &&
                    group_of(mine->expert[i], mine->E, units) == group_of(mine->expert[j], mine->E, units) &&
                    fabs((double)(mine->weight[i] - mine->weight[j])) < 1e-5;
        }
        if (!found)
            return 0;
    }
    return memcmp(mine->served, other->served, choices * sizeof(int)) != 0;
}

// Returns 0 where they differ for a reason that is_near_tie() accepts; fails where for another.
int check_plans(const Twins *t) {
    for (int l = 0; l < t->c.layers; l++) {
        if (!is_moe(&t->c, l))
            continue;
        const Route *wanted = &t->host->acts.layer[l].route, *found = gpu::model_route(t->device, l);
        int choices = wanted->N * wanted->K, rows = wanted->offset[wanted->E];
        assert_true(found->N == wanted->N && found->K == wanted->K && found->E == wanted->E);
        if (memcmp(found->expert, wanted->expert, choices * sizeof(int)) && is_near_tie(t->host, l, found)) {
            print_message("    %s: a near-tie, decided otherwise\n", t->name);
            return 0;
        }
        if (!memcmp(found->expert, wanted->expert, choices * sizeof(int)) && is_near_tie_of_service(t, wanted, found)) {
            print_message("    %s: a near-tie of what is served, decided otherwise\n", t->name);
            return 0;
        }
        for (int i = 0; i < choices; i++) {
            if (found->expert[i] != wanted->expert[i] || found->served[i] != wanted->served[i] || found->row[i] != wanted->row[i])
                fail_msg("%s: layer %d, choice %d: expert %d, served %d, row %d; wanted %d, %d, %d", t->name, l, i,
                         found->expert[i], found->served[i], found->row[i], wanted->expert[i], wanted->served[i],
                         wanted->row[i]);
        }
        assert_memory_equal(found->offset, wanted->offset, ((size_t)wanted->E + 1) * sizeof(int));
        assert_memory_equal(found->choice, wanted->choice, rows * sizeof(int));
        assert_memory_equal(found->token, wanted->token, rows * sizeof(int));
    }
    return 1;
}

void check_stats(const Twins *t, double tolerance) { // after model_losses
    for (int l = 0; l < t->c.layers; l++) {
        if (!is_moe(&t->c, l))
            continue;
        const Statistics *wanted = ::cpu_statistics(t->host, l), *found = gpu::model_statistics(t->device, l);
        const Lowest *low = lowest_of(t->host, l);
        const double *lowest = found->count + t->c.experts, passes = found->count[4 * t->c.experts + gpu::PASSES];
        for (int e = 0; e < t->c.experts; e++) {
            if (found->count[e] != wanted->count[e]) {
                fail_msg("%s: layer %d, expert %d has %.0f choices, not %.0f", t->name, l, e, found->count[e], wanted->count[e]);
            }
            assert_near(lowest[e], low ? low->sum[e] : 0, tolerance);
            assert_near(found->recent[e], wanted->recent[e], 1e-12);
            assert_int_equal(found->idle[e], wanted->idle[e]);
        }
        assert_true(found->dropped == wanted->dropped && found->active == wanted->active);
        assert_true(found->tokens == wanted->tokens && passes == (low ? *low->passes : 0));
        assert_near(found->entropy, wanted->entropy, tolerance);
    }
    for (int row = t->c.layers; row < statistics_rows(&t->c); row++) { // of the experts in attention
        const Statistics *wanted = ::cpu_statistics(t->host, row);
        for (int e = 0; e < counted_experts(&t->c, row); e++)
            assert_true(gpu::model_statistics(t->device, row)->count[e] == wanted->count[e]);
        if (counted_experts(&t->c, row)) {
            const Statistics *found = gpu::model_statistics(t->device, row);
            assert_true(found->dropped == wanted->dropped && found->active == wanted->active && found->tokens == wanted->tokens);
            assert_near(found->entropy, wanted->entropy, tolerance);
        }
    }
}

// A tensor's gradient is measured by its own norm, but at least by a hundredth of that of all: where a gradient all but
// vanishes - a router's whose weights are renormalised over one expert, say - what is left is the difference of large
// numbers, and consists of their roundings. Even so, one draw of tokens in a thousand leaves a gradient whose roundings are a
// little more than the tolerance: in float32, both twins were then 1.1e-5 away from what the C twin computes in double. Such
// a one, of at most twice the tolerance (in float32 four times), does not decide: returns 0, once for each model, and other
// tokens are drawn, with which a real fault would be there again.
int check_gradients_alike(Twins *t, double tolerance) {
    const real *found = all_of(&gpu::backend, t->device, GRADS), *wanted = t->host->memory[GRADS];
    double least = 0.01 * norm_of(wanted, gpu::normed_size(t->host));
    for (int i = first_kept(t->host, GRADS); i < t->host->tensor_count; i++) {
        const Tensor *tensor = &t->host->tensors[i];
        const real *mine = found + tensor->offset, *its = wanted + tensor->offset;
        double share = distance(mine, its, tensor->size) / fmax(norm_of(its, tensor->size), least);
        if (!t->rounded && share > tolerance && share <= (LOW ? 2 : 4) * tolerance) {
            print_message("    %s: %s is off by %.3g; other tokens decide\n", t->name, tensor->name, share);
            t->rounded = 1;
            return 0;
        }
        assert_alike_norm(t->name, tensor->name, mine, its, tensor->size, least, tolerance);
    }

    // What the step does to a table it does to the rows on these lists.
    for (int kind = BY_WORD; kind < TABLE_KINDS; kind++)
        assert_int_equal(((const gpu::Model *)t->device)->lookup->read[kind].count, t->host->lookup->read[kind].count);
    return 1;
}

// The best of the experts that a row of the gate did not choose: the smooth load of the chosen ones is measured by it.
// Whether both twins have the same ones; taking over choices does not say which.
int same_unchosen(const Twins *t) {
    int same = 1;
    for (int l = 0; l < t->c.layers; l++) {
        if (!is_moe(&t->c, l) || t->c.load_weight <= 0) {
            continue;
        }
        const Level levels[] = {expert_level(t->host, l), group_level(t->host, l)};
        int two = t->c.select == HIERARCHICAL, W = t->c.experts + (two ? t->c.groups : 0); // logits of a token
        const real *wanted = noisy_logits(t->host, l), *found = take_back(noisy_logits(t->device, l), (size_t)t->N * W);
        for (int i = 0; i <= two; i++) {
            const Level *v = &levels[i];
            for (int row = 0; row < t->N * v->rows; row++) {
                size_t at = (size_t)(row / v->rows) * W + v->column + row % v->rows * v->count;
                const int *chosen = v->chosen + (size_t)row * v->take;
                same &= best_unchosen(chosen, found + at, v->count, v->take) ==
                        best_unchosen(chosen, wanted + at, v->count, v->take);
            }
        }
    }
    return same;
}

// Whether both twins chose the same experts of attention. Where they did not, the scores are nearly equal.
int same_heads(const Twins *t) {
    for (int i = 0; i < t->c.layers * 2; i++) {
        if (i % 2 >= attention_routes(&t->c)) {
            continue;
        }
        const HeadRoute *h = &heads_of(t->host, i / 2)->route[i % 2];
        const gpu::HeadRoute *d = &gpu::heads_of((const gpu::Model *)t->device, i / 2)->route[i % 2];
        int rows = h->heads * h->all.N, K = h->all.K, E = h->all.E;
        const int *found = take_back(d->all.expert, (size_t)rows * K), *served = take_back(d->all.served, (size_t)rows * K);
        for (int j = 0; j < rows * K; j++) {
            const real *p = h->all.p + (size_t)(j / K) * E;
            if (found[j] != h->all.expert[j]) {
                print_message("    %s: a near-tie in attention, decided otherwise\n", t->name);
                assert_true(fabs((double)(p[found[j]] - p[h->all.expert[j]])) < 1e-5);
                return 0;
            }
            assert_int_equal(served[j], h->all.served[j]);
        }
    }
    return 1;
}

// Whether both twins declined the same second choices (dev/routers/gshard.h): the draw may lie between their weights.
int same_declines(const Twins *t) {
    int same = 1;
    for (int l = 0; l < t->c.layers && t->c.second_threshold > 0; l++) {
        if (!is_moe(&t->c, l)) {
            continue;
        }
        const Route *r = &t->host->acts.layer[l].route;
        const real *found = take_back(t->device->acts.layer[l].route.weight, (size_t)r->N * r->K);
        uint64_t stream = random_stream((uint64_t)t->c.seed, RANDOM_SECOND, (uint64_t)t->host->batch.step, (uint64_t)l);
        for (int n = 0; n < r->N; n++) {
            uint64_t token = (uint64_t)(t->host->batch.first_token * t->c.subtokens + n);
            double draw = random_uniform(stream, token) * t->c.second_threshold * t->c.scale;
            same &= (draw >= (double)found[2 * n + 1]) == (draw >= (double)r->weight[2 * n + 1]);
        }
    }
    return same;
}

// The logits (N,V) of the last pass, without those of words that do not exist.
real *take_back_logits(const gpu::Model *device, int N) {
    int V = device->config.vocab, W = gpu::words_with_padding(V);
    real *wide = take_back(device->word_logits, (size_t)N * W), *to = take_reals((size_t)N * V);
    for (int n = 0; n < N; n++) {
        memcpy(to + (size_t)n * V, wide + (size_t)n * W, V * sizeof(real));
    }
    return to;
}

// One pass of both twins in this mode. decided: the C twin's choices are taken over. Returns 0 where a near-tie went the
// other way.
int check_pass(Twins *t, int mode, int decided, double tolerance) {
    int N = t->N, V = t->c.vocab;
    double loss, aux, norm, grad_scale = 0.75;
    gpu::Model *device = (gpu::Model *)t->device;
    clear_gradients(t);
    device->head_rows = mode == EVAL_MODE ? N : max_int(1, N / 3); // the head in one piece, or in several
    Batch batch = make_batch(t->tokens, t->targets, t->B, t->T, mode, grad_scale, 3, 0);
    ::model_forward(t->host, &batch);
    decide(t, decided);
    gpu::model_forward(t->device, &batch);
    gpu::model_losses(t->device, &loss, &aux, &norm);
    if (!same_heads(t) || !check_plans(t) || !same_unchosen(t) || !same_declines(t))
        return 0;
    real *wanted = take_reals((size_t)N * V);
    all_logits(t->host, wanted, N);
    if (mode == EVAL_MODE)
        assert_alike_norm(t->name, "logits", take_back_logits(device, N), wanted, (size_t)N * V, 0, TWIN_TOLERANCE);
    assert_alike_norm(t->name, "nll", take_back(device->nll, N), t->host->acts.nll, N, 0, TWIN_TOLERANCE);
    assert_near(loss, t->host->loss, TWIN_TOLERANCE);
    if (mode == TRAIN_MODE)
        check_stats(t, TWIN_TOLERANCE);
    if (mode != EVAL_MODE) {
        assert_near(aux, t->host->aux, TWIN_TOLERANCE);
        ::model_backward(t->host);
        gpu::model_backward(t->device);
        return check_gradients_alike(t, tolerance);
    }
    return 1;
}

// The modes up to last_mode. In bfloat16 the derivative of ReLU changes from 0 to 1 where a number near zero is rounded to
// the other side, and with few tokens one such changes a gradient altogether. So there the gradients are compared with
// GELU in its place; float32 compares ReLU's.
void check_model(const char *recipe, const char *choices, int last_mode) {
    Twins t = make_twins(recipe, choices, 2, SPREAD);
    int kinks = LOW && (t.c.activation == RELU || t.c.dense_activation == RELU);
    double tolerance = kinks ? 1e30 : TWIN_TOLERANCE;
    for (int mode = TRAIN_MODE; mode <= last_mode; mode++) {
        int same = LOW ? 0 : check_pass(&t, mode, 0, tolerance);
        if (same && last_mode == TRAIN_MODE) // where nothing else is done, choices are taken over in float32, too
            same = check_pass(&t, mode, 1, tolerance);
        for (int again = 0; !same && again < 10; again++) {
            if (again || t.rounded)
                draw_tokens(&t);
            same = check_pass(&t, mode, 1, tolerance);
        }
        assert_true(same);
    }
    free_twins(&t);
    char smooth[256];
    snprintf(smooth, sizeof(smooth), "%s --activation gelu", choices);
    if (kinks)
        check_model(recipe, smooth, last_mode);
}

void test_gpu_recipes(void **state) {
    (void)state;
    for (int r = 0; r < recipe_count; r++) {
        if (has_kernels(recipes[r].name))
            check_model(recipes[r].name, "--heads 2 --kv-heads 1", CHECK_MODE);
    }
}

void test_gpu_variants(void **state) {
    (void)state;
    static const char *const variants[][2] = {
        {"mixtral", "--recompute 1 --untied 1"},
        {"mixtral", "--dim 40 --heads 1 --kv-heads 1 --ffn 24"},
        {"mixtral", "--ffn 136"}, // several tiles of columns
        {"mixtral", "--subtokens 2 --shared 1 --jitter 0.2"},
        {"mixtral", "--group sequence --aux-weight 0.5 --z-weight 0.1 --capacity-factor 0.7"},
        {"mixtral", "--seq 1"},
        {"mixtral", "--experts 1 --topk 1"},
        {"mixtral", "--history-decay 0.9 --recurrent 8 --routers 2 --topk 4"},
        {"deepseek-v2", "--group batch --scale 4 --dim 24 --heads 3 --kv-heads 3"},
        {"cmoe", "--recompute 1 --shared 1 --subtokens 2 --capacity-factor 0.5"},
        {"hierarchical", "--activation swiglu --group sequence --aux-weight 0.5 --load-weight 0.5"},
        {"switch", "--activation gelu --dense-activation geglu --capacity-factor 0.5"},
        {"expert-choice", "--group sequence --recompute 1"},
        {"shazeer", "--activation geglu --dim 24 --heads 3 --kv-heads 3"},
        {"glam", "--activation gelu"},
        {"mh-moe", "--dim 64 --heads 2 --kv-heads 1"},
        {"base", "--group sequence --seq 7"},
        {"fast", "--recompute 1 --heads 4 --kv-heads 2 --ngrams 7 --shared 1"},
        {"dense", "--value-embedding 1 --heads 1 --kv-heads 1"},
        {"fast", "--ngram-order 3 --ngram-gate 1 --recompute 1"},
        {"dense", "--ngrams 90 --ngram-order 3 --ngram-gate 1 --dim 136 --heads 1 --kv-heads 1 --seq 70 --layers 1"},
        {"dense", "--ngrams 9 --ngram-gate 1 --norms 0 --last-feed 0 --dropout 0.2"},
        {"mixtral", "--dropout 0.3 --shared 1 --qk-norm 1"}, // what each half adds is made apart from the residual stream
        {"mixtral", "--moe-sigmoid 1 --shared 1 --recompute 1"},
        {"mh-moe", "--dim 64 --heads 2 --kv-heads 1 --moe-sigmoid 1 --dropout 0.2 --norms 0"},
        {"mixtral", "--norms 0"}, // and so without the fused router
        {"mixtral", "--last-feed 0 --aux-weight 0.5 --recompute 1"},
        {"dense", "--last-feed 0 --norms 0 --dropout 0.5 --ngrams 7 --untied 1"},
        {"shazeer-lstm", "--cell 48 --recompute 1"},
        {"shazeer-lstm", "--cell 8 --layers 3 --norms 1 --last-feed 1 --moe-sigmoid 0"},
        {"hierarchical", "--mixer lstm --norms 0 --last-feed 0 --moe-sigmoid 1 --dropout 0.1"},
        {"mixtral", "--mixer lstm --cell 24 --seq 1 --ngrams 7"},
        {"switchhead", "--attention-capacity-factor 0.7 --attention-aux-weight 0.5 --qk-norm 1 --recompute 1"},
        {"switchhead", "--kv-heads 4 --attention-topk 1 --group sequence --attention-aux-weight 0.5 --value-embedding 1"},
        {"moa", "--attention-capacity-factor 0.7 --attention-z-weight 0.1 --qk-norm 1 --value-embedding 1 --recompute 1"},
        {"moa", "--head-width 136 --heads 2 --group sequence --attention-aux-weight 0.5"}, // several tiles of columns
        {"qwen3", "--attention-experts 3 --heads 1 --kv-heads 1 --head-width 0 --attention-aux-weight 0.5"},
        {"mh-moe", "--dim 64 --attention-experts 6 --attention-form moa --heads 2 --attention-capacity-factor 0.5"},
        {"dense", "--attention-experts 3 --attention-capacity-factor 0.5 --group sequence --dropout 0.2"},
        {"mixtral", "--qkv-bias 1 --head-width 24 --heads 3 --kv-heads 1 --recompute 1"},
        {"mixtral", "--qkv-bias 1 --qk-norm 1 --qk-norm-over row --heads 4 --kv-heads 2 --head-width 40 --value-embedding 1"},
        {"dense", "--qk-norm 1 --qk-norm-over row --dense-ffn 40 --rope-scaling llama3 --rope-original 40 --rope-theta 30 --seq 33"},
        {"mixtral", "--shared 1 --shared-gate 1"},
        {"deepseek-v3", "--shared-gate 1 --shared-ffn 40 --activation gelu --recompute 1 --layers 3"},
        {"mixtral", "--shared 2 --shared-gate 1 --shared-ffn 136 --dropout 0.2 --norms 0 --dim 136 --heads 1 --kv-heads 1"},
        {"mixtral", "--overflow next --capacity-factor 0.5"},
    };
    int count = (int)(sizeof(variants) / sizeof(variants[0])) - LOW; // the last one's first choices cannot be taken over
    for (int i = 0; i < count; i++)
        check_model(variants[i][0], variants[i][1], TRAIN_MODE);
}

// ---- steps

// Ten steps of AdamW on the same gradients, clipped or not.
void check_gpu_optimizer(const char *choices) {
    Twins t = make_twins("mixtral", choices, 2, SPREAD);
    size_t n = t.host->size;
    const char *const names[] = {"weights", "gradients", "first moment", "second moment"};
    for (int step = 1; step <= 10; step++) {
        double loss, aux, norm, lr = 0.001 * step;
        uint64_t seed = fresh();
        for (size_t i = 0; i < n; i++)
            t.host->memory[GRADS][i] = (real)(i % 17 ? random_normal(seed, i) * pow(10, (double)(i % 7) - 4) : 0);
        for (int i = 0; i < t.host->tensor_count; i++) { // of tables that are looked up, every other row was read
            const Tensor *tensor = &t.host->tensors[i];
            for (size_t j = 0; j < tensor->size && tensor->looked_up; j++)
                t.host->memory[GRADS][tensor->offset + j] *= (j / (size_t)tensor->shape[2] + (size_t)step) % 2;
            size_t each = tensor->size / (size_t)(tensor->of_experts ? tensor->shape[0] : 1);
            for (size_t j = 0; j < tensor->size && tensor->of_experts; j++) // of the experts, one in three had no token
                t.host->memory[GRADS][tensor->offset + j] *= (j / each + (size_t)step) % 3 != 0;
        }
        for (int kind = BY_WORD; kind < TABLE_KINDS; kind++) { // all are on the lists; those without a gradient wait
            ReadRows *lists[] = {&t.host->lookup->read[kind], &((gpu::Model *)t.device)->lookup->read[kind]};
            for (int row = 0; row < lists[0]->rows; row++) {
                note_rows(lists[0], &row, 1);
                note_rows(lists[1], &row, 1);
            }
        }
        set_all(&gpu::backend, t.device, GRADS, t.host->memory[GRADS]);
        cpu_update(t.host, step, lr);
        gpu::model_update(t.device, step, lr);
        gpu::model_losses(t.device, &loss, &aux, &norm);
        assert_near(norm / t.host->norm, 1, 1e-6);
    }
    // Moments in bfloat16 are rounded at random, and by the same random numbers, or weights would be 1e-4 apart. (One that is
    // rounded otherwise, because the twins' numbers differ in their last bits, makes far less.)
    int low = t.c.moments == MOMENTS_BF16;
    double of_muon = LOW ? 5e-3 : 1e-5; // its products enlarge what rounding does to weak directions
    for (int what = WEIGHTS; what <= (low ? GRADS : MOMENT2); what++) {
        const real *found = all_of(&gpu::backend, t.device, what);
        for (int i = 0; i < t.host->tensor_count; i++) {
            size_t at = t.host->tensors[i].offset, size = t.host->tensors[i].size;
            double tolerance = what == WEIGHTS && takes_muon(&t.c, &t.host->tensors[i]) ? of_muon : low ? 1e-5 : 1e-6;
            assert_alike_norm(names[what], t.host->tensors[i].name, found + at, t.host->memory[what] + at, size, 0, tolerance);
        }
    }
    free_twins(&t);
}

// A gradient that is no number: nothing changes, and losses() tells.
void check_gpu_nan(const char *recipe, double bad) {
    Twins t = make_twins(recipe, "", 2, SPREAD);
    double loss, aux, norm;
    size_t n = t.host->size;
    real *before[4];
    Batch batch = make_batch(t.tokens, t.targets, t.B, t.T, TRAIN_MODE, 1, 1, 0);
    ::model_forward(t.host, &batch);
    decide(&t, LOW);
    gpu::model_forward(t.device, &batch);
    gpu::model_backward(t.device);
    gpu::model_update(t.device, 1, 0.01); // so that there is something in the moments
    for (int what = WEIGHTS; what <= MOMENT2; what++) {
        before[what] = all_of(&gpu::backend, t.device, what);
        if (what == GRADS) {
            before[what][n / 2] = (real)bad;
            set_all(&gpu::backend, t.device, GRADS, before[what]);
        }
    }
    batch.step = 2;
    gpu::model_forward(t.device, &batch);
    gpu::model_update(t.device, 2, 0.01);
    gpu::model_losses(t.device, &loss, &aux, &norm);
    assert_true(isfinite(loss) && !isfinite(norm));
    for (int what = WEIGHTS; what <= MOMENT2; what++) {
        if (what != GRADS && memcmp(before[what], all_of(&gpu::backend, t.device, what), n * sizeof(real)))
            fail_msg("%s: a gradient of %g changes array %d", recipe, bad, what);
    }
    free_twins(&t);
}

// The buffers of the recipes that have some, and who has been idle, over some steps without learning: forward passes
// fill the counts, gradients are zero.
void check_gpu_buffers(const char *recipe, const char *choices) {
    Twins t = make_twins(recipe, choices, 2, SPREAD);
    for (int step = 1; step <= 3; step++) {
        double loss, aux, norm;
        draw_tokens(&t);
        Batch batch = make_batch(t.tokens, t.targets, t.B, t.T, TRAIN_MODE, 1, step, 0);
        ::model_forward(t.host, &batch);
        decide(&t, LOW);
        gpu::model_forward(t.device, &batch);
        if (!check_plans(&t))
            break;
        clear_gradients(&t);
        cpu_update(t.host, step, 0.01);
        gpu::model_update(t.device, step, 0.01);
        gpu::model_losses(t.device, &loss, &aux, &norm);
        check_stats(&t, TWIN_TOLERANCE);
        const real *found = all_of(&gpu::backend, t.device, WEIGHTS);
        for (int i = 0; i < t.host->tensor_count; i++) {
            const Tensor *tensor = &t.host->tensors[i];
            if (!tensor->trained)
                assert_alike_norm(t.name, tensor->name, found + tensor->offset, t.host->memory[WEIGHTS] + tensor->offset,
                                  tensor->size, 0, !strcmp(tensor->kind, "level") ? TWIN_TOLERANCE : 1e-6);
        }
    }
    free_twins(&t);
}

void test_gpu_optimizer(void **state) {
    (void)state;
    check_gpu_optimizer("--clip 0 --weight-decay 0.5");
    check_gpu_optimizer("--clip 0.5 --beta1 0.8 --untied 1");
    check_gpu_optimizer("--moments bf16");
    check_gpu_optimizer("--optimizer muon --qk-norm 1 --ngrams 20 --value-embedding 1 --shared 1 --weight-decay 0.5");
    check_gpu_optimizer("--optimizer muon --ngrams 20 --ngram-gate 1 --moments bf16 --clip 0 --subtokens 2");
    check_gpu_nan("mixtral", NAN);
    check_gpu_nan("fast", NAN);
    check_gpu_nan("deepseek-v3", INFINITY);
    check_gpu_nan("history", -INFINITY);
    check_gpu_nan("expert-choice", NAN);
    check_gpu_buffers("mixtral", "--experts 16 --ffn 8"); // some are idle
    check_gpu_buffers("deepseek-v3", "--bias-rate 0.01");
    check_gpu_buffers("expert-choice", "");
    check_gpu_buffers("history", "--history-decay 0.9");
}

// Two steps of both twins: passes, lists of the rows that they have read, and AdamW, which moves these rows and no others. The C
// twin takes over the device's gradients, once they have been compared: AdamW divides by their size, and would enlarge the
// smallest ones' roundings. So the same weights have to come of it.
void check_gpu_steps(const char *recipe, const char *choices) {
    Twins t = make_twins(recipe, choices, 2, SPREAD);
    size_t bytes = t.host->size * sizeof(real);
    for (int step = 1; step <= 2; step++) {
        int same = 0, tables = 0;
        for (int again = 0; !same && again < 10; again++) {
            draw_tokens(&t);
            same = check_pass(&t, TRAIN_MODE, 1, TWIN_TOLERANCE);
        }
        assert_true(same);
        for (int kind = BY_WORD; kind < TABLE_KINDS; kind++) {
            const ReadRows *wanted = &t.host->lookup->read[kind], *found = &((gpu::Model *)t.device)->lookup->read[kind];
            assert_int_equal(found->count, wanted->count);
            for (int row = 0; row < wanted->rows; row++)
                assert_true((found->place[row] > 0) == (wanted->place[row] > 0));
        }
        memcpy(t.host->memory[GRADS], all_of(&gpu::backend, t.device, GRADS), bytes);
        real *before = take_reals(t.host->size), *grads = take_reals(t.host->size), *w = t.host->memory[WEIGHTS];
        memcpy(before, w, bytes);
        memcpy(grads, t.host->memory[GRADS], bytes);
        cpu_update(t.host, step, 0.01);
        gpu::model_update(t.device, step, 0.01);
        const real *found = all_of(&gpu::backend, t.device, WEIGHTS);
        for (int i = 0; i < t.host->tensor_count; i++) {
            const Tensor *tensor = &t.host->tensors[i];
            size_t at = tensor->offset, width = (size_t)tensor->shape[2];
            assert_alike_norm(t.name, tensor->name, found + at, w + at, tensor->size, 0, 1e-6);
            tables += tensor->looked_up;
            for (size_t j = 0; j < tensor->size && tensor->looked_up; j += width) { // rows of tables
                int moved = memcmp(found + at + j, before + at + j, width * sizeof(real)) != 0;
                if (moved != (norm_of(grads + at + j, width) > 0))
                    fail_msg("%s, step %d: row %d of %s has %smoved", t.name, step, (int)(j / width), tensor->name,
                             moved ? "" : "not ");
            }
            round_numbers(w + at, tensor->size); // for the next step
        }
        assert_true(tables > 0);
        copy_weights(&t);
    }
    free_twins(&t);
}

void test_gpu_steps(void **state) {
    (void)state;
    check_gpu_steps("switchhead", "--value-embedding 1");
    check_gpu_steps("moa", "--value-embedding 1 --heads 2");
    check_gpu_steps("mixtral", "--attention-experts 3 --heads 1 --kv-heads 1 --value-embedding 1 --ngrams 20");
    check_gpu_steps("dense", "--value-embedding 1 --heads 2 --kv-heads 1 --ngrams 20 --ngram-order 3");
}

// The first token is given, the next one is 3 times the last one and 1, but one time in five any.
void structured_tokens(int *tokens, int n, int vocab, uint64_t seed, int first) {
    tokens[0] = first % vocab;
    for (int i = 1; i < n; i++)
        tokens[i] = random_uniform(seed, 2 * i) < 0.8 ? (3 * tokens[i - 1] + 1) % vocab
                                                     : (int)(random_uniform(seed, 2 * i + 1) * vocab);
}

// Thirty steps of training, always on the same text. In bfloat16 a token now and then goes to another expert, which the
// loss of so few tokens shows: it is the means of ten steps that are compared.
void check_curve(const char *recipe) {
    Twins t = make_twins(recipe, "--layers 1 --moe-every 1 --dense-first 0 --dim 16 --heads 1 --kv-heads 1 --lr 0.01", 8, SPREAD);
    int *text = take_ints(t.T + 1), every = LOW ? 10 : 1;
    double worst = 0, first = 0, sum = 0, host = 0;
    ::model_init(t.host, NULL);
    copy_weights(&t);
    for (int step = 1; step <= 30; step++) {
        double loss, aux, norm;
        for (int b = 0; b < t.B; b++) {
            structured_tokens(text, t.T + 1, 20, hash64(step * t.B + b), step * t.B + b); // no two begin alike
            memcpy(t.tokens + b * t.T, text, t.T * sizeof(int));
            memcpy(t.targets + b * t.T, text + 1, t.T * sizeof(int));
        }
        Batch batch = make_batch(t.tokens, t.targets, t.B, t.T, TRAIN_MODE, 1, step, 0);
        ::model_forward(t.host, &batch);
        ::model_backward(t.host);
        cpu_update(t.host, step, t.c.lr);
        gpu::model_forward(t.device, &batch);
        gpu::model_backward(t.device);
        gpu::model_update(t.device, step, t.c.lr);
        gpu::model_losses(t.device, &loss, &aux, &norm);
        first = step == 1 ? loss : first;
        sum = (step - 1) % every ? sum + loss : loss;
        host = (step - 1) % every ? host + t.host->loss : t.host->loss;
        worst = step % every ? worst : fmax(worst, fabs(sum / host - 1));
    }
    print_message("    %-15s loss %.3f -> %.3f, at most %.2g apart\n", recipe, first, sum / every, worst);
    if (!(worst <= (LOW ? 1e-2 : 1e-3)) || !(sum / every < 0.9 * first))
        fail_msg("%s: losses from %.3f to %.3f, up to %.2g apart", recipe, first, sum / every, worst);
    free_twins(&t);
}

void test_gpu_curves(void **state) {
    (void)state;
    if (is_slow())
        skip();
    static const char *const cases[] = {"mixtral", "deepseek-v3", "switch", "expert-choice"};
    for (int i = 0; i < 4; i++)
        check_curve(cases[i]);
}

// ---- generation

// Text token by token, against the device's own pass over the whole text and against the C twin, also past the end of
// the cache.
void check_gpu_generation(const char *recipe, const char *choices) {
    Twins t = make_twins(recipe, choices, 1, SPREAD);
    int T = t.T, V = t.c.vocab, past = T + T / 2 + 1;
    double tolerance = LOW ? 3e-2 : 1e-4;
    gpu::Model *device = (gpu::Model *)t.device;
    gpu::Decided *plans = (gpu::Decided *)take(t.c.layers, sizeof(gpu::Decided));
    real *found = take_reals((size_t)past * V), *wanted = take_reals((size_t)past * V);
    Batch batch = make_batch(t.tokens, t.targets, 1, T, EVAL_MODE, 1, 1, 0);
    ::model_forward(t.host, &batch);
    decide(&t, LOW);
    gpu::model_forward(t.device, &batch);
    gpu::model_generate(t.device, t.tokens[T - 1], 0, found); // of a text before this one; and now there is device->one
    for (int i = 0; i < past; i++) {
        ::model_generate(t.host, t.tokens[i % T], i, wanted + (size_t)i * V);
        note_plans(plans, t.host->generation->one);
        ((gpu::Model *)device->one)->decided = LOW ? plans : NULL;
        gpu::model_generate(t.device, t.tokens[i % T], i, found + (size_t)i * V);
        assert_alike_norm(t.name, "a token's logits", found + (size_t)i * V, wanted + (size_t)i * V, V, 0, tolerance);
    }
    assert_alike_norm(t.name, "the text's logits", found, take_back_logits(device, T), (size_t)T * V, 0, tolerance);
    free_twins(&t);
}

void test_gpu_generation(void **state) {
    (void)state;
    for (int r = 0; r < recipe_count; r++) {
        if (has_kernels(recipes[r].name))
            check_gpu_generation(recipes[r].name, "--heads 2 --kv-heads 1 --seq 3 --eval-capacity-factor 0"); // st-moe's looks at the whole text
    }
    check_gpu_generation("mixtral", "--dim 48 --heads 2 --kv-heads 1 --ffn 8 --seq 11 --untied 1");
    check_gpu_generation("deepseek-v3", "--kv-heads 4 --seq 1");
    check_gpu_generation("shazeer-lstm", "--cell 40 --seq 11");
    check_gpu_generation("mixtral", "--qkv-bias 1 --qk-norm 1 --qk-norm-over row --head-width 24 --heads 2 --kv-heads 1 "
                                    "--rope-scaling llama3 --rope-original 20 --rope-theta 30 --shared 1 --shared-gate 1 --seq 11");
    check_gpu_generation("fast", "--ngrams 200 --ngram-order 3 --ngram-gate 1 --seq 7");
    check_gpu_generation("dense", "--ngrams 200 --ngram-order 3 --ngram-gate 1 --last-feed 0 --seq 2");
    check_gpu_generation("mixtral", "--mixer lstm --seq 7 --shared 1");
}

// ---- a teacher

// A batch of a student with a teacher, on both twins: the loss, the teacher's part of it, and all gradients; the head in pieces.
void check_gpu_teacher(const char *recipe, const char *choices, const char *of_teacher, const char *its_choices) {
    double loss, aux, norm, taught;
    Twins s = make_twins(of_teacher, its_choices, 2, SPREAD), t = make_twins(recipe, choices, 2, SPREAD);
    Batch batch = make_batch(t.tokens, t.targets, t.B, t.T, TRAIN_MODE, 0.75, 3, 0);
    clear_gradients(&t);
    ((gpu::Model *)t.device)->head_rows = max_int(1, t.N / 3);
    teacher.model = s.host;
    ::model_forward(t.host, &batch);
    taught = teacher.loss;
    teacher.model = s.device;
    teacher.loss = -1;
    decide(&s, 1);
    decide(&t, 1);
    gpu::model_forward(t.device, &batch);
    gpu::model_losses(t.device, &loss, &aux, &norm);
    assert_true(taught > 1e-3);
    assert_near(teacher.loss / taught, 1, TWIN_TOLERANCE);
    assert_near(loss, t.host->loss, TWIN_TOLERANCE);
    assert_alike_norm(t.name, "nll", take_back(((gpu::Model *)t.device)->nll, t.N), t.host->acts.nll, t.N, 0, TWIN_TOLERANCE);
    ::model_backward(t.host);
    gpu::model_backward(t.device);
    check_gradients_alike(&t, TWIN_TOLERANCE);

    // At evaluation there is none.
    batch.mode = EVAL_MODE;
    gpu::model_forward(t.device, &batch);
    gpu::model_losses(t.device, &taught, &aux, &norm);
    teacher.model = NULL;
    gpu::model_forward(t.device, &batch);
    gpu::model_losses(t.device, &loss, &aux, &norm);
    assert_true(loss == taught);
    free_twins(&t);
    free_twins(&s);
}

void test_gpu_teacher(void **state) {
    (void)state;
    check_gpu_teacher("mixtral", "", "mixtral", "--dim 48 --heads 2 --kv-heads 2 --experts 8");
    check_gpu_teacher("dense", "--distill-weight 0.8 --distill-temperature 3 --untied 1", "deepseek-v3", "");
    check_gpu_teacher("mixtral", "--distill-weight 1 --distill-temperature 0.7", "shazeer-lstm", "");
    check_gpu_teacher("dense", "--distill-weight 0.1 --distill-temperature 1000", "dense", "--dim 48 --heads 2 --kv-heads 2");
}

// ---- the same again

// Gradients of a batch of four and of its two halves.
void check_gpu_halves(const char *recipe, const char *choices) {
    Config c = device_config(recipe);
    int tokens[32], targets[32];
    double loss[2], aux[2], norm;
    set_options(&c, choices);
    Model *m[2] = {gpu::backend.create(&c, 32, 1, NULL), gpu::backend.create(&c, 16, 1, NULL)};
    random_tokens(tokens, 32, c.vocab, fresh());
    random_tokens(targets, 32, c.vocab, fresh());
    for (int i = 0; i < 2; i++) {
        gpu::model_init(m[i], NULL);
        for (int micro = 0; micro <= i; micro++) {
            Batch batch = make_batch(tokens + 16 * micro, targets + 16 * micro, i ? 2 : 4, 8, TRAIN_MODE, i ? 0.5 : 1, 3,
                                   16 * micro);
            gpu::model_forward(m[i], &batch);
            gpu::model_backward(m[i]);
        }
        gpu::model_losses(m[i], &loss[i], &aux[i], &norm);
    }
    assert_near(loss[1], loss[0], TWIN_TOLERANCE);
    assert_near(aux[1], aux[0], TWIN_TOLERANCE);
    for (int l = 0; l < c.layers; l++) {
        const Statistics *whole = gpu::model_statistics(m[0], l), *halves = gpu::model_statistics(m[1], l);
        for (int e = 0; is_moe(&c, l) && e < c.experts; e++)
            assert_true(whole->count[e] == halves->count[e]);
        assert_true(!is_moe(&c, l) || (whole->dropped == halves->dropped && whole->tokens == halves->tokens));
    }
    const real *found = all_of(&gpu::backend, m[1], GRADS), *wanted = all_of(&gpu::backend, m[0], GRADS);
    assert_alike_norm(recipe, "the gradient of two halves", found, wanted, whole_size(m[0]), 0, TWIN_TOLERANCE);
    free_taken();
    gpu::backend.release(m[0]);
    gpu::backend.release(m[1]);
}

void test_gpu_accumulation(void **state) {
    (void)state;
    check_gpu_halves("mixtral", "--aux-weight 0.5 --group sequence --z-weight 0.1 --capacity-factor 0.5");
    check_gpu_halves("switch", "--aux-weight 0.5 --jitter 0.2");
    check_gpu_halves("shazeer", "--group sequence");
    check_gpu_halves("dense", "--untied 1");
    check_gpu_halves("fast", "--group sequence --ngram-order 3 --ngram-gate 1");
    check_gpu_halves("shazeer-lstm", "--group sequence --cell 24 --dropout 0.3"); // the same numbers are dropped
}

// The weights after two steps; to be freed.
real *train_gpu(const char *recipe, int B, int T, int recompute, size_t *size) {
    Config c = device_config(recipe);
    char sizes[96];
    int tokens[210], targets[210], N = B * T;
    int heads = !strcmp(recipe, "moa") ? 2 : 1; // moa refuses a single one
    snprintf(sizes, sizeof(sizes), "--heads %d --kv-heads 1 --seq %d --lr 0.01 --recompute %d", heads, T, recompute);
    set_options(&c, sizes);
    if (c.select == TOP_K)
        set_options(&c, "--capacity-factor 1");
    Model *m = gpu::backend.create(&c, N, 1, NULL);
    gpu::model_init(m, NULL);
    for (int step = 1; step <= 2; step++) {
        random_tokens(tokens, N, c.vocab, (uint64_t)(2 * step));
        random_tokens(targets, N, c.vocab, (uint64_t)(2 * step + 1));
        Batch batch = make_batch(tokens, targets, B, T, TRAIN_MODE, 1, step, 0);
        gpu::model_forward(m, &batch);
        gpu::model_backward(m);
        gpu::model_update(m, step, c.lr);
    }
    *size = whole_size(m) * sizeof(real);
    real *weights = (real *)allocate(whole_size(m), sizeof(real));
    memcpy(weights, all_of(&gpu::backend, m, WEIGHTS), *size);
    free_taken();
    gpu::backend.release(m);
    return weights;
}

void check_gpu_bits(const char *recipe, int B, int T, int recompute) {
    size_t size;
    real *once = train_gpu(recipe, B, T, 0, &size), *again = train_gpu(recipe, B, T, recompute, &size);
    if (memcmp(once, again, size))
        fail_msg("%s, %d sequences of %d tokens: other bits%s", recipe, B, T, recompute ? " with --recompute" : "");
    free(once);
    free(again);
}

// The same seed gives the same bits, and --recompute changes none.
void test_gpu_same_bits(void **state) {
    (void)state;
    if (is_slow())
        skip();
    for (int r = 0; r < recipe_count; r++) {
        if (has_kernels(recipes[r].name))
            check_gpu_bits(recipes[r].name, 2, 9, 1);
    }
    check_gpu_bits("mixtral", 3, 70, 0);
    check_gpu_bits("deepseek-v2", 3, 70, 1);
    check_gpu_bits("shazeer-lstm", 3, 70, 1);
}

// ---- files

void add_keys(char *keys, size_t size, const char *type, const Json *object) { // "type key key of a part ..."
    for (const Json *m = object->child; m; m = m->next) {
        char key[160];
        snprintf(key, sizeof(key), "%s.%s\n", type, m->key);
        if (!strstr(keys, key) && strlen(keys) + strlen(key) < size)
            strcat(keys, key);
        if (m->type == 'o') {
            key[strlen(key) - 1] = 0;
            add_keys(keys, size, key, m);
        }
    }
}

// All names in a run's log, in the order in which they first come.
void logged_keys(const char *out, char *keys, size_t size) {
    char file[300];
    size_t length;
    keys[0] = 0;
    snprintf(file, sizeof(file), "%s/log.jsonl", out);
    char *text = read_file(scratch_file(file), &length);
    for (char *line = text; line < text + length;) {
        Json *json = next_line(&line, text + length);
        add_keys(keys, size, json->child->text, json);
        json_free(json);
    }
    free(text);
}

// A checkpoint in a model of either kind: the same bits.
void check_loaded(const char *dir) {
    Run run[2] = {};
    for (int i = 0; i < 2; i++) {
        config_defaults(&run[i].config);
        config_from_directory(&run[i].config, dir);
        run[i].backend = i ? &gpu::backend : &cpu_backend;
        run[i].model = run[i].backend->create(&run[i].config, 32, 1, NULL);
        load_weights(&run[i], dir, 1);
    }
    for (int what = WEIGHTS; what <= MOMENT2; what++) {
        if (what != GRADS)
            assert_memory_equal(all_of(&gpu::backend, run[1].model, what), run[0].model->memory[what],
                                whole_size(run[0].model) * sizeof(real));
    }
    free_taken();
    run[0].backend->release(run[0].model);
    run[1].backend->release(run[1].model);
}

// Either program goes on where the other was, and does what that would have done.
void check_exchange(const char *recipe, int twin, const char *more) {
    char options[160], out[64], other[80], dir[128];
    static char keys[2][1 << 14];
    snprintf(out, sizeof(out), "exchange-%s-%d%d", recipe, twin, *more != 0);
    snprintf(other, sizeof(other), "%.40s-other", out);
    snprintf(options, sizeof(options), "--recipe %s --steps 3 --save-every 2 --eval-every 2 --sample-every 3 --seq 16 %s", recipe,
             more);
    expect(run_either(twin, out, options), 0, "What next");
    assert_int_equal(shell(said, sizeof(said), "cp -r %s %s", scratch_file(out), scratch_file(other)), 0);
    snprintf(dir, sizeof(dir), "%s/latest", out);
    check_loaded(scratch_file(dir));
    expect(run_either(twin, out, "--prompt hello --tokens 3"), 0, "hello");
    expect(run_either(!twin, out, "--prompt hello --tokens 3"), 0, "hello");
    snprintf(options, sizeof(options), "--recipe %s --steps 5 --save-every 2 --eval-every 2 --seq 16 --resume", recipe);
    expect(run_either(twin, out, options), 0, "What next");
    expect(run_either(!twin, other, options), 0, "What next");
    assert_latest(out, "checkpoint-5");
    assert_latest(other, "checkpoint-5");
    Config c = device_config(recipe);
    int routers = moe_layers(&c);
    assert_log(out, 5, routers);
    assert_log(other, 5, routers);
    for (int step = 4; step <= 5; step++)
        assert_near(logged(other, "step", step, "loss") / logged(out, "step", step, "loss"), 1, 1e-2);
    assert_near(logged(other, "eval", 4, "val_loss") / logged(out, "eval", 4, "val_loss"), 1, 1e-2);
    logged_keys(out, keys[0], sizeof(keys[0]));
    logged_keys(other, keys[1], sizeof(keys[1]));
    assert_string_equal(keys[1], keys[0]);
}

// The twin has the precision that it was built with. It refuses the other one, and says so where a checkpoint has it.
void test_gpu_precision(void **state) {
    (void)state;
    if (starts_no_program())
        skip();
    need_program();
    expect(run_either(1, "asked", "--precision fp32"), 2,
           "--precision fp32: this program multiplies in bf16; make train_moe_cu PRECISION=fp32");
    expect(run_either(1, "asked", "--precision bf16 --steps 2"), 0, "What next");
    expect(run_either(0, "built", "--steps 2 --save-every 2"), 0, "What next");
    expect(run_either(1, "built", "--resume --steps 3"), 0, "the run has multiplied in fp32 until now; this program multiplies in bf16");
    expect(run_either(0, "built", "--resume --steps 4"), 0, "bfloat16"); // as the checkpoint says
}

void test_gpu_files(void **state) {
    (void)state;
    if (access(twin_program(), X_OK) != 0)
        skip();
    need_program();
    if (starts_no_program()) { // what the C program has written is read in either precision
        expect(run_either(0, "of-c", "--steps 2"), 0, "What next");
        check_loaded(scratch_file("of-c/latest"));
        return;
    }
    check_exchange("mixtral", 1, "");
    check_exchange("deepseek-v3", 0, "");
    check_exchange("mixtral", 1, "--moments bf16"); // each of them reads the other's moments, too
    expect(run_either(1, "wrong", "--dim 31 --steps 1"), 2, "--dim");

    // What the kernels do not do is refused at the start, and the C program does it.
    expect(run_either(1, "wrong", "--dim 36 --heads 3 --steps 1"), 2, "multiples of 8 on a GPU");
    expect(run_either(1, "wrong", "--heads 8 --steps 1"), 2, "width of a head");
    expect(run_either(1, "wrong", "--ffn 12 --steps 1"), 2, "--ffn");
    expect(run_either(1, "wrong", "--recipe mh-moe --dim 16 --steps 1"), 2, "--subtokens");
    // The program is called as it is, since an LSTM refuses the --heads of a tiny run.
    expect(shell(said, sizeof(said), "%s --mixer lstm --cell 12 --steps 1 --warmup 0 --out %s/wrong", twin_program(), scratch_folder), 2,
           "--cell must be a multiple of 8 on a GPU");
    expect(run_either(1, "wrong", "--recipe quantile --steps 1"), 2, "no kernels for a GPU");
    expect(run_either(0, "wide", "--dim 36 --heads 3 --ffn 12 --steps 1 --save-every 1"), 0, "What next");
}

// Runs with a teacher: as of the C program.
void test_gpu_taught_runs(void **state) {
    (void)state;
    if (starts_no_program())
        skip();
    need_program();
    char *before = getenv("TRAIN_MOE") ? strdup(getenv("TRAIN_MOE")) : NULL;
    setenv("TRAIN_MOE", twin_program(), 1);
    taught_size = "--seq 16 --batch 1 --optimizer adamw --eval-tokens 16 --tokens 1"; // steps take long in the emulator
    need_teacher(2);
    check_taught_resume(4, 2);
    check_untaught(2);
    check_replaced_teacher();
    if (before)
        setenv("TRAIN_MOE", before, 1);
    else
        unsetenv("TRAIN_MOE");
    free(before);
}

// ---- the first weights, memory and errors

void test_gpu_init(void **state) {
    (void)state;
    static const char *const cases[] = {"switch", "hash", "history"};
    for (int i = 0; i < 3; i++) {
        Twins t = make_twins(cases[i], "", 1, SPREAD);
        double *frequency = (double *)take(t.c.vocab, sizeof(double));
        for (int v = 0; v < t.c.vocab; v++)
            frequency[v] = 1 + v * v % 7;
        ::model_init(t.host, frequency);
        gpu::model_init(t.device, frequency);
        assert_memory_equal(all_of(&gpu::backend, t.device, WEIGHTS), t.host->memory[WEIGHTS], t.host->size * sizeof(real));
        free_twins(&t);
    }
}

// What the table of memory says is what the device has given, to 5%; and it gets all of it back.
void test_gpu_memory(void **state) {
    (void)state;
    static const char *const cases[][2] = {{"mixtral", ""}, {"deepseek-v3", "--recompute 1"}, {"dense", "--layers 6"}};
    gpu::start_device();
    for (int i = 0; i < 3; i++) {
        Config c = device_config(cases[i][0]);
        set_options(&c, "--dim 128 --heads 4 --ffn 128 --seq 128");
        if (*cases[i][1])
            set_options(&c, cases[i][1]);
        c.vocab = 8000;
        size_t before, with, after, total;
        double sum = 0;
        gpu::backend.release(gpu::backend.create(&c, 8 * 128, 1, NULL)); // the kernels' code is on the device from now on
        CHECK(cudaMemGetInfo(&before, &total));
        Model *m = gpu::backend.create(&c, 8 * 128, 1, NULL);
        CHECK(cudaMemGetInfo(&with, &total));
        for (int kind = 0; kind < MEMORY_KINDS; kind++)
            sum += (double)m->bytes[kind];
        double taken = (double)(before - with), extra = 0;
#ifndef CUDACPU // a device gives memory 2 MiB at a time, and a model takes one piece
        extra = 2097152.0;
#endif
        gpu::backend.release(m);
        CHECK(cudaMemGetInfo(&after, &total));
        if (!(fabs(taken - sum) <= 0.05 * taken + extra) || fabs((double)before - (double)after) > extra)
            fail_msg("%s: the table says %.1f MiB; it were %.1f, of which %.1f came back", cases[i][0], sum / 1048576,
                     (double)(before - with) / 1048576, ((double)after - (double)with) / 1048576);
    }
}

void create_too_large(void *arg) { // the smallest power of 2 of sequences for which there is no room
    Config c = *(const Config *)arg;
    size_t left, total;
    gpu::start_device();
    CHECK(cudaMemGetInfo(&left, &total));
    for (c.batch = 1; gpu::bytes_of(&c, c.batch * c.seq, 1) <= (double)left; c.batch *= 2) {
    }
    Config half = c;
    half.batch /= 2;
    fprintf(stderr, "half: %d, recompute: %d\n", half.batch, half.recompute);
    gpu::backend.create(&c, c.batch * c.seq, 1, NULL);
}

void test_gpu_no_room(void **state) {
    (void)state;
    char message[1024];
    int batch, said_batch;
    Config c = device_config("mixtral");
    set_options(&c, "--dim 512 --ffn 1024 --seq 1024 --accum 3");
    assert_int_equal(dies(create_too_large, &c, message, sizeof(message)), 1);
    const char *hint = strstr(message, "--batch");
    if (sscanf(message, "half: %d", &batch) != 1 || !strstr(message, "out of memory on the device") || !hint ||
        sscanf(hint, "--batch %d would fit (and --accum 6 makes", &said_batch) != 1 || said_batch != batch)
        fail_msg("%s", message);
    c.layers = 1000;
    c.dim = 16384;
    c.heads = c.kv_heads = 128;
    c.ffn = 65536;
    assert_int_equal(dies(create_too_large, &c, message, sizeof(message)), 1);
    if (!strstr(message, "a smaller model or a larger device"))
        fail_msg("%s", message);
}

enum { BAD_LINE = __LINE__ + 3 }; // of the two calls
void bad_call(void *arg) {
    void *p;
    *(int *)arg ? CHECK(CUBLAS_STATUS_INVALID_VALUE) : CHECK(cudaMalloc(&p, (size_t)1 << 60));
}

void test_gpu_errors(void **state) {
    (void)state;
    for (int i = 0; i < 2; i++) {
        char message[1024], place[300];
        snprintf(place, sizeof(place), "%s:%d: ", __FILE__, (int)BAD_LINE);
        assert_int_equal(dies(bad_call, &i, message, sizeof(message)), 1);
        if (!strstr(message, place) || !strstr(message, i ? "CUBLAS_STATUS_INVALID_VALUE" : "cudaMalloc(&p") ||
            !strstr(message, i ? cublasGetStatusString(CUBLAS_STATUS_INVALID_VALUE)
                               : cudaGetErrorString(cudaErrorMemoryAllocation)))
            fail_msg("%s", message);
    }
    char message[1024];
    assert_int_equal(dies(too_wide, NULL, message, sizeof(message)), 1);
    assert_non_null(strstr(message, "258"));
}

// The data sheet's peak is found by the names that the driver gives, and the log prints both peaks where both are known.
void test_gpu_peak(void **state) {
    (void)state;
    const struct { const char *name; double tflops; } known[] = {
        {"NVIDIA A100-SXM4-80GB", 312}, {"NVIDIA A100-PCIE-40GB", 312}, {"A100-SXM4-40GB", 312}, {"NVIDIA A10", 125},
        {"NVIDIA A10G", 0}, {"NVIDIA H100 80GB HBM3", 989.4}, {"NVIDIA H100 PCIe", 756.4}, {"NVIDIA H100 NVL", 835.5},
        {"NVIDIA H200", 989.4}, {"NVIDIA H200 NVL", 835.5}, {"NVIDIA GH200 480GB", 989.4}, {"NVIDIA B200", 2250},
        {"NVIDIA L4", 121}, {"NVIDIA L40", 181.05}, {"NVIDIA L40S", 362.05}, {"NVIDIA GeForce RTX 4090", 165.2},
        {"NVIDIA GeForce RTX 4090 D", 0}, {"NVIDIA GeForce RTX 4090 Laptop GPU", 0}, {"NVIDIA GeForce RTX 5090", 209.5},
        {"NVIDIA GeForce RTX 3090", 71}, {"NVIDIA GeForce RTX 3090 Ti", 0}, {"NVIDIA H100 80GB HBM3 MIG 1g.10gb", 0},
        {"NVIDIA GeForce RTX 4070", 0}, {"CUDA emulated on the CPU", 0}, {"", 0}};
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        if (gpu::datasheet_peak(known[i].name) != 1e12 * known[i].tflops)
            fail_msg("%s: %g", known[i].name, gpu::datasheet_peak(known[i].name));
    }
    gpu::Peak peak = gpu::measure_peak();
    assert_true(peak.sustained > 0 && peak.burst > 0);

    char text[96];
    Run run;
    memset(&run, 0, sizeof(run));
    run.peak = 800e12;
    describe_share(&run, 400e12, text);
    assert_string_equal(text, "50% of peak");
    run.sheet = 1000e12;
    describe_share(&run, 400e12, text);
    assert_string_equal(text, "40% of the data sheet's peak, 50% of the measured one");
}

#include "dev/test/cuda_adapters.h"

int main(void) {
    const struct CMUnitTest tests[] = { // the first two fork, which a process that has used a GPU cannot
        cmocka_unit_test(test_gpu_no_room),
        cmocka_unit_test(test_gpu_errors),
        cmocka_unit_test(test_gpu_experts),
        cmocka_unit_test(test_gpu_recipes),
        cmocka_unit_test(test_gpu_variants),
        cmocka_unit_test(test_gpu_optimizer),
        cmocka_unit_test(test_gpu_steps),
        cmocka_unit_test(test_gpu_curves),
        cmocka_unit_test(test_gpu_generation),
        cmocka_unit_test(test_gpu_teacher),
        cmocka_unit_test(test_gpu_accumulation),
        cmocka_unit_test(test_gpu_same_bits),
        cmocka_unit_test(test_gpu_files),
        cmocka_unit_test(test_gpu_adapters),
        cmocka_unit_test(test_gpu_adapter_steps),
        cmocka_unit_test(test_gpu_adapter_files),
        cmocka_unit_test(test_gpu_precision),
        cmocka_unit_test(test_gpu_taught_runs),
        cmocka_unit_test(test_gpu_init),
        cmocka_unit_test(test_gpu_memory),
        cmocka_unit_test(test_gpu_peak),
    };
    begin_tests();
    return cmocka_run_group_tests_name("cuda_model", tests, NULL, scratch_done);
}
