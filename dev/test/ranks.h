// Ranks: what the tests of several processes share, for the C program and for the CUDA twin. Started by mpirun -np 4.
//
// Four processes train small models together, all four, or two and two. Each process also trains the same model alone,
// and the results are compared. All processes have to find the same result, or the others would wait for ever.

#pragma once
#include "dev/test/model.h"

#ifndef SMALL_CONFIG // the CUDA twin has sizes of its own
#define SMALL_CONFIG small_config
#endif

#ifdef TWIN
#define RANKS_BACKEND   (&gpu::backend)
#define RANKS_TOLERANCE (LOW || getenv("THOROUGH") ? 1e-3 : 1e-4) // of losses, after a few steps or 50
#define RANKS_FIRST     (LOW ? 1e-4 : 1e-6)                       // of the first
#define RANKS_WEIGHTS   (LOW ? 1e-2 : 1e-3)                       // of weights, and of gradients' norms
#define RANKS_WIDE      sizeof(gpu::floatX)
const int forms[][2] = {{2, 1}, {2, 2}, {4, 2}, {4, 4}}; // ranks, and --ep
#else
#define RANKS_BACKEND   (&cpu_backend)
#define RANKS_TOLERANCE (IS_DOUBLE ? 1e-9 : 1e-3) // after 50 steps
#define RANKS_FIRST     (RANKS_TOLERANCE / 100)
#define RANKS_WEIGHTS   (RANKS_TOLERANCE * 100)
#define RANKS_WIDE      sizeof(real)
const int forms[][2] = {{2, 1}, {2, 2}, {4, 1}, {4, 2}, {4, 4}};
#endif

typedef struct Curve {
    double loss[50], aux[50], norm[50], validation;
    real *weights; // on rank 0
} Curve;

enum { FORMS = sizeof(forms) / sizeof(forms[0]) };
MPI_Comm form_comm = MPI_COMM_NULL;
const Backend *trained = &cpu_backend; // whose models are trained together

void begin_form(int size, int ep) { // size 1: this process alone
    static const Ranks alone = {1, 0, 1, 0, 1, 0, 0, {0, 0, 0}};
    int world;
    ranks = alone;
    if (size == 1)
        return;
    MPI_Comm_rank(MPI_COMM_WORLD, &world);
    MPI_Comm_split(MPI_COMM_WORLD, world / size, world, &form_comm);
    MPI_Comm_dup(form_comm, &comm.watch);
    ranks_form(form_comm, ep);
}

void end_form(void) {
    if (ranks.size > 1) {
        MPI_Comm_free(&comm.group);
        MPI_Comm_free(&comm.peers);
        MPI_Comm_free(&comm.watch);
        MPI_Comm_free(&form_comm);
    }
    begin_form(1, 1);
}

// Runs rank r's share of `sequences` sequences, numbered from `first` on, of the whole batch.
void run_share(Model *m, int first, int sequences, int mode, double grad_scale, int step, int micro) {
    const Config *c = &m->config;
    int T = c->seq, B = div_up(sequences, ranks.size), begin = min_int(sequences, B * ranks.rank),
        mine = min_int(sequences, begin + B) - begin;
    int *tokens = take_ints((size_t)(mine + 1) * (T + 1)), *inputs = take_ints(mine * T + 1), *targets = take_ints(mine * T + 1);
    for (int b = 0; b < mine; b++) {
        random_tokens(tokens, T + 1, c->vocab, (uint64_t)(1000 * step + first + begin + b));
        // Equal beginnings would have equal scores, but for rounding, and a tie may go either way.
        tokens[0] = (13 * step + first + begin + b) % c->vocab;
        tokens[1] = tokens[1] == tokens[0] ? (tokens[0] + 1) % c->vocab : tokens[1];
        memcpy(inputs + b * T, tokens, T * sizeof(int));
        memcpy(targets + b * T, tokens + 1, T * sizeof(int));
    }
    long first_token = ((long)micro * ranks.size * B + (long)ranks.rank * B) * T;
    Batch batch = {inputs, targets, mine, T, mode, grad_scale, step, first_token, micro == 0, micro == c->accum - 1};
    if (mode == EVAL_MODE) {
        batch.scale = mine * T;
        batch.first_token = 0;
    }
    trained->forward(m, &batch);
    if (mode != EVAL_MODE)
        trained->backward(m);
}

// randomize_weights, and for the tests of uneven loads what draws all tokens to expert 0.
void draw_weights(Model *m, real bias) {
    Model *host = trained == &cpu_backend ? m : model_allocate(&m->config, 1, 0, NULL);
    randomize_weights(host);
    for (int l = 0; l < m->config.layers && bias != 0; l++)
        host->params.layer[l].bias[0] = bias;
#ifdef TWIN
    real *device = allocate_reals(m->size); // a model's first tensor of experts may have room behind it, for copies
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        for (size_t j = 0; j < t->size; j++) {
            real *w = &host->memory[WEIGHTS][host->tensors[i].offset + j];
            int one = t->init == INIT_ONE;
            if (t->trained)
                *w = (real)(one + (*w - one) * SPREAD / 0.3);
            round_numbers(w, 1);
            device[t->offset + j] = *w;
        }
    }
    if (host != m) {
        gpu::Model *to = (gpu::Model *)m;
        gpu::upload(to, m->memory[WEIGHTS], device, m->size * sizeof(real));
        gpu::round_weights(to, 0, m->size);
    }
    free(device);
#endif
    if (host != m)
        model_free(host);
}

// As the program trains: 4 sequences in a micro-step of all ranks together.
Model *train_curve(const Config *config, int steps, Curve *curve) {
    Config c = *config;
    double aux, norm;
    c.batch = 4 / ranks.size;
    Model *m = trained->create(&c, c.batch * c.seq, 1, NULL);
    draw_weights(m, 0);
    for (int step = 1; step <= steps; step++) {
        for (int micro = 0; micro < c.accum; micro++)
            run_share(m, 4 * micro, 4, TRAIN_MODE, 1.0 / c.accum / ranks.size, step, micro);
        trained->update(m, step, 3e-3);
        sum_losses(trained, m, &curve->loss[step - 1], &curve->aux[step - 1], &curve->norm[step - 1]);
        free_taken();
    }
    curve->validation = 0;
    for (int sequences = 1; sequences <= 3; sequences += 2) { // some ranks have none
        double validation;
        run_share(m, 0, sequences, EVAL_MODE, 0, 999, 0);
        sum_losses(trained, m, &validation, &aux, &norm);
        curve->validation += validation;
    }
    free_taken();
    return m;
}

void take_weights(Model *m, Curve *curve) {
    curve->weights = (real *)allocate(whole_size(m), sizeof(real));
    memcpy(curve->weights, all_of(trained, m, WEIGHTS), whole_size(m) * sizeof(real));
    free_taken();
}

// The same number on all processes of the world: the largest.
double agreed(double x) {
    MPI_Allreduce(MPI_IN_PLACE, &x, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    return x;
}

double far_from(const double *a, const double *b, int n) {
    double worst = 0;
    for (int i = 0; i < n; i++) // NaN counts as far
        worst = fabs(a[i] - b[i]) <= worst * fmax(1, fabs(b[i])) ? worst : isfinite(a[i]) ? fabs(a[i] - b[i]) / fmax(1, fabs(b[i])) : 1e30;
    return worst;
}

double farthest[2]; // losses and weights, of all that was compared

void compare_curves(const char *what, const Curve *found, const Curve *wanted, size_t size, int steps) {
    double tolerance = RANKS_TOLERANCE, error = 0, norm = 0;
    double loss = agreed(far_from(found->loss, wanted->loss, steps)), aux = agreed(far_from(found->aux, wanted->aux, steps)),
           grad = agreed(far_from(found->norm, wanted->norm, steps)), validation = agreed(far_from(&found->validation, &wanted->validation, 1));
    for (size_t i = 0; !ranks.rank && i < size; i++) {
        error += ((double)found->weights[i] - (double)wanted->weights[i]) * ((double)found->weights[i] - (double)wanted->weights[i]);
        norm += (double)wanted->weights[i] * (double)wanted->weights[i];
    }
    double weights = agreed(ranks.rank ? 0 : isfinite(error) ? sqrt(error / norm) : 1e30);
    farthest[0] = fmax(farthest[0], loss);
    farthest[1] = fmax(farthest[1], weights);
    if (agreed(far_from(found->loss, wanted->loss, 1)) > RANKS_FIRST)
        fail_msg("%s, %d ranks, --ep %d: the first loss is %.9g, not %.9g", what, ranks.size, ranks.ep, found->loss[0],
                 wanted->loss[0]);
    if (loss > tolerance || aux > tolerance || grad > RANKS_WEIGHTS || validation > tolerance || weights > RANKS_WEIGHTS)
        fail_msg("%s, %d ranks, --ep %d: off by %.2g (loss), %.2g (aux), %.2g (gradient's norm), %.2g (validation), %.2g (weights)",
                 what, ranks.size, ranks.ep, loss, aux, grad, validation, weights);
}

// Trains in every form, on the device in the CUDA twin's tests, and alone on the processor; forms that do not divide the
// experts are passed over.
void check_ranks(const char *recipe, const char *choices, int steps) {
    Config c = SMALL_CONFIG(recipe);
    Curve alone, together;
    char what[300];
    snprintf(what, sizeof(what), "%s %s", recipe, choices);
    if (*choices)
        set_options(&c, choices);
    Config single = c;
    single.replicate = 0;
    Model *m = train_curve(&single, steps, &alone);
    take_weights(m, &alone);
    size_t size = whole_size(m);
    model_free(m);
    static int turn = 0; // the emulator is slow: every other form, by turns
    turn += RANKS_BACKEND != &cpu_backend;
    for (int i = 0; i < FORMS; i++) {
        if ((moe_layers(&c) ? c.experts : 1) % forms[i][1] || (c.replicate && forms[i][1] == 1) || (turn && !getenv("THOROUGH") && (i + turn) % 2))
            continue;
        begin_form(forms[i][0], forms[i][1]);
        trained = RANKS_BACKEND;
        m = train_curve(&c, steps, &together);
        take_weights(m, &together);
        trained->release(m);
        trained = &cpu_backend;
        compare_curves(what, &together, &alone, size, steps);
        free(together.weights);
        end_form();
    }
    free(alone.weights);
}

// The bytes that one forward and backward pass should send to other ranks, from all routes. `wide`: bytes of a row's number.
double expected_bytes(const Model *m, double wide) {
    const Config *c = &m->config;
    double bytes = 0;
    int C = c->dim / c->subtokens, number;
    for (int l = 0; l < c->layers; l++) {
        const Route *route = trained->route(m, l);
        const Placement *p = m->crossing->placement;
        int mine = 0; // rows that this rank sends to itself
        for (int n = 0; is_moe(c, l) && n < route->N; n++) {
            for (int r = 0; r < ranks.ep; r++) {
                int there = 0;
                for (int k = 0; k < route->K; k++) {
                    int e = route->served[n * route->K + k], all = l * c->experts;
                    there |= e >= 0 && rank_of_expert(p->host + all, p->nth + all, p->owned, ranks.member, e, n, &number) == r;
                }
                mine += there && r == ranks.member;
                if (there && r != ranks.member) // the token and, backward, the answer's gradient; weights and numbers
                    bytes += 2.0 * C * wide + 2 * route->K * sizeof(real);
            }
        }
        if (is_moe(c, l)) // and back what others sent here
            bytes += (ranks_came(m, l) - mine) * (2.0 * C * wide + route->K * sizeof(real));
    }
    return bytes;
}

double pass_bytes(const char *recipe, const char *choices, double *expected) {
    Config c = SMALL_CONFIG(recipe);
    set_options(&c, choices);
    c.batch = 1;
    trained = RANKS_BACKEND;
    Model *m = trained->create(&c, c.seq, 1, NULL);
    draw_weights(m, 0);
    ranks.traffic.sent = 0;
    run_share(m, 0, ranks.size, TRAIN_MODE, 1, 1, 0);
    double both[2] = {ranks.traffic.sent, expected_bytes(m, c.compress_rows ? 2 : RANKS_WIDE)};
    sum_over_ranks(both, 2);
    await_sums(m);
    trained->release(m);
    trained = &cpu_backend;
    free_taken();
    *expected = both[1];
    return both[0];
}

// Limiting the groups of experts limits what is sent: groups lie whole on ranks.
void test_ranks_bytes(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"mixtral", "--overlap 1"}, {"mixtral", "--overlap 0 --capacity-factor 0.5"}, {"mh-moe", "--overlap 1"},
        {"mixtral", "--experts 8 --topk 4 --seq 33 --overlap 1"}, {"threshold", "--overlap 1"}};
    double expected, limited, free_choice;
    for (int i = 1; i < FORMS; i += RANKS_BACKEND == &cpu_backend ? 1 : 2) {
        begin_form(forms[i][0], forms[i][1]);
        for (size_t j = 0; forms[i][1] > 1 && j < sizeof(cases) / sizeof(cases[0]); j++) {
            double sent = pass_bytes(cases[j][0], cases[j][1], &expected);
            assert_true(agreed(fabs(sent - expected)) == 0 && expected > 0);
        }
        end_form();
    }
    begin_form(4, 4);
    const char *const sizes = "--experts 16 --groups 4 --topk 4 --seq 40 --capacity-factor 0 --dense-first 0 --overlap 1";
    char one[200];
    snprintf(one, sizeof(one), "%s --group-topk 1", sizes);
    limited = pass_bytes("deepseek-v2", one, &expected);
    snprintf(one, sizeof(one), "%s --group-topk 0 --comm-weight 0", sizes);
    free_choice = pass_bytes("deepseek-v2", one, &expected);
    print_message("    bytes: %.0f with one group of four, %.0f with all\n", limited, free_choice);
    int C = SMALL_CONFIG("deepseek-v2").dim, row = 2 * (C + 4) + 2 * C + 4; // numbers for a token that goes to another rank, there and back, both ways
    double most = 4.0 * 40 * 2 * row * sizeof(real); // and less where rows are bfloat16
    end_form();
    assert_true(agreed(limited) <= most && limited < 0.6 * free_choice);
}

real *weights_here(const Model *m) { // as this process has them
#ifdef TWIN
    return take_back(m->memory[WEIGHTS], m->size);
#else
    return m->memory[WEIGHTS];
#endif
}

// All tokens to expert 0, so that three of four ranks have experts without a token; and copies of it.
void test_ranks_uneven(void **state) {
    (void)state;
    for (int copies = 0; copies < 2; copies++) {
        Config c = SMALL_CONFIG("mixtral");
        Curve alone, together;
        set_options(&c, "--topk 1 --gate probability --aux-weight 0 --bias-rate 1e-9 --overlap 1");
        for (int form = 0; form < 2; form++) {
            Config mine = c;
            mine.batch = form ? 1 : 4;
            mine.replicate = form * copies;
            mine.replicate_every = 1;
            begin_form(form ? 4 : 1, form ? 4 : 1);
            Curve *curve = form ? &together : &alone;
            trained = form ? RANKS_BACKEND : &cpu_backend;
            Model *m = trained->create(&mine, mine.batch * mine.seq, 1, NULL);
            draw_weights(m, 10);
            for (int step = 1; step <= 5; step++) {
                double aux;
                run_share(m, 0, 4, TRAIN_MODE, 1.0 / ranks.size, step, 0);
                if (form && !copies)
                    assert_int_equal(ranks_came(m, 0), ranks.member ? 0 : 4 * c.seq);
                if (form && copies && step > 1) // two ranks have it now, and half of what the others send
                    assert_int_equal(ranks_came(m, 0), ranks.member < 2 ? 2 * c.seq : 0);
                trained->update(m, step, 1e-2);
                sum_losses(trained, m, &curve->loss[step - 1], &aux, &curve->norm[step - 1]);
                curve->aux[step - 1] = 0;
                free_taken();
            }
            if (form && copies && ranks.member < 2) { // the copy is the owner's, to the bit
                const Tensor *t = m->tensors;
                while (strcmp(t->name, "layer1.w_in"))
                    t++;
                size_t size = expert_size(&c, t, 0), at = expert_offset(m, t, ranks.member ? m->crossing->placement->owned : 0);
                real *weights = weights_here(m) + at, *other = take_reals(size);
                MPI_Sendrecv(weights, (int)size, MPI_REALS, 1 - ranks.member, 7, other, (int)size, MPI_REALS, 1 - ranks.member, 7,
                             comm.group, MPI_STATUS_IGNORE);
                assert_memory_equal(weights, other, size * sizeof(real));
                free_taken();
            }
            take_weights(m, curve);
            curve->validation = 0;
            size_t size = whole_size(m);
            trained->release(m);
            trained = &cpu_backend;
            if (form)
                compare_curves("all to one expert", &together, &alone, size, 5);
            end_form();
        }
        free(alone.weights);
        free(together.weights);
    }
}

// What the model has, in the order of a single process, on all processes of the world. To be freed.
real *take_whole(Model *m, int what) {
    real *all = (real *)allocate(whole_size(m), sizeof(real));
    memcpy(all, all_of(trained, m, what), whole_size(m) * sizeof(real));
    MPI_Bcast(all, (int)whole_size(m), MPI_REALS, 0, MPI_COMM_WORLD);
    free_taken();
    return all;
}

// Two steps in one form, then two in another, which has all weights and moments from the first: as four in one.
void test_ranks_checkpoints(void **state) {
    (void)state;
    static const int from_to[][2][2] = {{{4, 2}, {1, 1}}, {{1, 1}, {2, 2}}, {{2, 2}, {4, 4}}};
    Config c = SMALL_CONFIG("deepseek-v3");
    set_options(&c, "--overlap 1 --replicate 0");
    Curve alone, parts;
    Model *m = train_curve(&c, 4, &alone);
    take_weights(m, &alone);
    size_t size = whole_size(m);
    model_free(m);
    for (size_t i = 0; i < sizeof(from_to) / sizeof(from_to[0]); i++) {
        real *kept[4] = {NULL, NULL, NULL, NULL};
        for (int half = 0; half < 2; half++) {
            const int *form = from_to[i][half];
            begin_form(form[0], form[1]);
            trained = RANKS_BACKEND;
            Config mine = c;
            mine.batch = 4 / ranks.size;
            mine.replicate = ranks.ep > 1;
            mine.replicate_every = 1;
            m = trained->create(&mine, mine.batch * c.seq, 1, NULL);
            draw_weights(m, 0);
            for (int what = WEIGHTS; what <= MOMENT2 && half; what++) {
                set_all(trained, m, what, kept[what]);
                free(kept[what]);
            }
            for (int step = 2 * half + 1; step <= 2 * half + 2; step++) {
                run_share(m, 0, 4, TRAIN_MODE, 1.0 / ranks.size, step, 0);
                trained->update(m, step, 3e-3);
                sum_losses(trained, m, &parts.loss[step - 1], &parts.aux[step - 1], &parts.norm[step - 1]);
                free_taken();
            }
            for (int what = WEIGHTS; what <= MOMENT2 && !half; what++)
                kept[what] = take_whole(m, what);
            if (half) {
                take_weights(m, &parts);
                parts.validation = alone.validation;
                compare_curves("checkpoint", &parts, &alone, size, 4);
                free(parts.weights);
            }
            trained->release(m);
            trained = &cpu_backend;
            end_form();
        }
    }
    free(alone.weights);
}

// The first weights are those of one process, whichever experts a rank has: cmoe's differ in width and in size.
void test_ranks_first_weights(void **state) {
    (void)state;
    static const char *const names[] = {"mixtral", "cmoe", "deepseek-v3", "rmoe"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        Config c = SMALL_CONFIG(names[i]);
        Model *alone = model_allocate(&c, 1, 0, NULL);
        model_init(alone, NULL);
        for (int form = 0; form < FORMS; form++) {
            if (c.experts % forms[form][1])
                continue;
            begin_form(forms[form][0], forms[form][1]);
            trained = RANKS_BACKEND;
            Model *m = trained->create(&c, 1, 0, NULL);
            trained->init(m, NULL);
            const real *all = all_of(trained, m, WEIGHTS);
            int same = ranks.rank || memcmp(all, alone->memory[WEIGHTS], whole_size(m) * sizeof(real)) == 0;
            free_taken();
            trained->release(m);
            trained = &cpu_backend;
            end_form();
            assert_false(agreed(!same));
        }
        model_free(alone);
    }
}

// All ranks go on with the same text, and find the same as one process.
void test_ranks_generate(void **state) {
    (void)state;
    Config c = SMALL_CONFIG("mixtral");
    set_options(&c, "--overlap 1 --shared 1");
    real *wanted = (real *)allocate(6 * c.vocab, sizeof(real)), *found = (real *)allocate(6 * c.vocab, sizeof(real));
    for (int form = 0; form < 2; form++) {
        begin_form(form ? 4 : 1, form ? 4 : 1);
        trained = RANKS_BACKEND;
        Model *m = trained->create(&c, c.seq, 0, NULL);
        draw_weights(m, 0);
        for (int i = 0; i < 6; i++)
            trained->generate(m, 7 * i % c.vocab, i, (form ? found : wanted) + i * c.vocab);
        trained->release(m);
        trained = &cpu_backend;
        end_form();
    }
    double error = 0, norm = 0;
    for (int i = 0; i < 6 * c.vocab; i++) {
        error += (double)(found[i] - wanted[i]) * (double)(found[i] - wanted[i]);
        norm += (double)wanted[i] * (double)wanted[i];
    }
    free(wanted), free(found);
    assert_true(agreed(sqrt(error / norm)) < (IS_DOUBLE ? 1e-12 : RANKS_WEIGHTS));
}

// Evaluation where some ranks have no sequence: those pass zero rows through every layer, for the others. One and three
// sequences on four ranks, for each mixer; each rank has all experts, or a quarter of them.
void test_ranks_without_window(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"shazeer-lstm", ""}, {"mixtral", "--mixer lstm --cell 24"}, {"switchhead", "--value-embedding 1"}, {"moa", ""}, {"mixtral", ""}};
    enum { SIGNALS = 3 };
    static const int faults[SIGNALS] = {SIGFPE, SIGSEGV, SIGBUS};
    void (*before[SIGNALS])(int);
    for (int i = 0; i < SIGNALS; i++) { // cmocka would go on after a fault, and the other ranks wait for ever
        before[i] = signal(faults[i], SIG_DFL);
    }
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        Config c = SMALL_CONFIG(cases[i][0]);
        double loss[3][2] = {{0}}; // of one process, of four with all experts, of four with a quarter
        set_options(&c, cases[i][1]);
        for (int form = 0; form < 3; form++) {
            int ep = form == 2 ? 4 : 1;
            if (moe_layers(&c) == 0 ? ep > 1 : c.experts % ep)
                continue;
            begin_form(form ? 4 : 1, ep);
            trained = form ? RANKS_BACKEND : &cpu_backend;
            Model *m = trained->create(&c, (form ? 1 : 3) * c.seq, 0, NULL);
            draw_weights(m, 0);
            for (int j = 0; j < 2; j++) {
                double aux, norm;
                run_share(m, 0, 1 + 2 * j, EVAL_MODE, 0, 999, 0);
                sum_losses(trained, m, &loss[form][j], &aux, &norm);
                free_taken();
            }
            trained->release(m);
            trained = &cpu_backend;
            double far = agreed(far_from(loss[form], loss[0], 2));
            end_form();
            if (far > RANKS_FIRST)
                fail_msg("%s %s, 4 ranks, --ep %d: losses %.9g and %.9g, not %.9g and %.9g", cases[i][0], cases[i][1], ep,
                         loss[form][0], loss[form][1], loss[0][0], loss[0][1]);
        }
    }
    for (int i = 0; i < SIGNALS; i++) {
        signal(faults[i], before[i]);
    }
}

// The beginning of main on each of the four processes, of which only the first one prints. Returns whether there are four.
int begin_ranks(int *argc, char ***argv) {
    int size, rank;
    MPI_Init(argc, argv);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    if (size != 4) {
        fprintf(stderr, "start it by mpirun -np 4\n");
        return 0;
    }
    if (rank && (!freopen("/dev/null", "w", stdout) || !freopen("/dev/null", "w", stderr)))
        return 0;
    bucket = 5000;          // so that these small models fill some
    largest_message = 4000; // and what is sent is cut
    begin_form(1, 1);
    begin_tests();
    return 1;
}
