// Routing: which experts a token goes to, what happens where an expert is full, the losses that balance the experts, and
// what a step changes without a gradient. Each against a slow version that follows the words of its paper, or against
// numbers that were worked out by hand.

#include "dev/test/trainer.h"
#include "dev/test/model.h"

// ---------------------------------------------------------------------------------------------------------------------
// Choosing the best, routes, capacity, balance losses

void test_select_topk(void **state) {
    (void)state;
    for (int round = 0; round < 30; round++) {
        int N = 1 + round * 5, E = 1 + round % 9, K = 1 + round / 2 % E;
        real *p = take_scores(N, E, (uint64_t)round);
        int *expert = take_ints((size_t)N * K);
        select_topk(expert, p, N, E, K);
        for (int n = 0; n < N; n++) {
            for (int k = 0; k < K; k++) { // k others come before it: the likelier ones, and equal ones of lower index
                int e = expert[n * K + k], before = 0;
                assert_in_range(e, 0, E - 1);
                for (int other = 0; other < E; other++)
                    before += p[n * E + other] > p[n * E + e] || (p[n * E + other] == p[n * E + e] && other < e);
                assert_int_equal(before, k);
            }
        }
        free_taken();
    }
    const real tied[4] = {(real)0.25, (real)0.25, (real)0.25, (real)0.25};
    int expert[3];
    select_topk(expert, tied, 1, 4, 3);
    for (int k = 0; k < 3; k++)
        assert_int_equal(expert[k], k);
}

// Checks what is served and how it is sorted against their definitions, word by word.
void check_route(const Route *r, int group, double factor) {
    int N = r->N, E = r->E, K = r->K, dropped = 0, rows = 0, groups = N / group;
    int capacity = factor > 0 ? (int)fmin(ceil(factor * K * group / E - 1e-9), N * K) : N * K;
    int *kept = take_ints((size_t)groups * E), *load = take_ints(E);
    for (int g = 0; g < groups; g++) {
        for (int i = 0; i < K * group; i++) { // first choices before second ones, early tokens first
            int choice = (g * group + i % group) * K + i / group;
            int e = r->expert[choice], takes = e >= 0 && kept[g * E + e] < capacity;
            assert_int_equal(r->served[choice], takes ? e : -1);
            if (e >= 0) {
                kept[g * E + e] += takes;
                load[e] += takes;
                dropped += !takes;
            }
        }
        for (int e = 0; e < E; e++)
            assert_in_range(kept[g * E + e], 0, capacity);
    }
    assert_int_equal(r->dropped, dropped);
    assert_int_equal(r->offset[0], 0);
    for (int e = 0; e < E; e++) {
        assert_int_equal(r->offset[e + 1] - r->offset[e], load[e]);
        for (int row = r->offset[e]; row < r->offset[e + 1]; row++) {
            assert_int_equal(r->served[r->choice[row]], e);
            assert_int_equal(r->row[r->choice[row]], row);
            assert_int_equal(r->token[row], r->choice[row] / K);
            assert_true(row == r->offset[e] || r->token[row] > r->token[row - 1]);
        }
    }
    for (int i = 0; i < N * K; i++) {
        assert_true((r->row[i] >= 0) == (r->served[i] >= 0));
        rows += r->row[i] >= 0;
    }
    assert_int_equal(rows, r->offset[E]);
}

void test_route(void **state) {
    (void)state;
    const double factors[] = {0, 0.01, 0.3, 0.5, 1, 1.25, 1000, 1e6};
    uint64_t random = 3;
    for (int round = 0; round < (is_slow() ? 20 : 300); round++) {
        int group = draw(&random, 1, 20), groups = draw(&random, 1, 4), N = groups * group;
        int E = draw(&random, 1, 12), K = draw(&random, 1, E);
        double factor = factors[draw(&random, 0, 7)];
        Route r = take_route(N, E, K);
        select_topk(r.expert, take_scores(N, E, random), N, E, K);
        for (int i = 0; round % 3 == 0 && i < N * K; i += 7)
            r.expert[i] = -1; // no choice
        make_route(&r, group, factor);
        check_route(&r, group, factor);
        free_taken();
    }
}

void assert_ints(const int *found, const int *wanted, int n) {
    for (int i = 0; i < n; i++)
        assert_int_equal(found[i], wanted[i]);
}

// Three tokens choose both of two experts; the capacity is ceil(0.5 * 2*3/2) = 2. Expert 0 takes the first choices of tokens 0
// and 2 and refuses the second choice of token 1. Expert 1 takes the first choice of token 1 and the second of token 0, and
// refuses that of token 2.
void test_route_by_hand(void **state) {
    (void)state;
    const int expert[6] = {0, 1, 1, 0, 0, 1}, served[6] = {0, 1, 1, -1, 0, -1}, row[6] = {0, 2, 3, -1, 1, -1};
    const int choice[4] = {0, 4, 1, 2}, token[4] = {0, 2, 0, 1}, offset[3] = {0, 2, 4};
    Route r = take_route(3, 2, 2);
    memcpy(r.expert, expert, sizeof(expert));
    make_route(&r, 3, 0.5);
    assert_ints(r.served, served, 6);
    assert_ints(r.row, row, 6);
    assert_ints(r.choice, choice, 4);
    assert_ints(r.token, token, 4);
    assert_ints(r.offset, offset, 3);
    assert_int_equal(r.dropped, 2);
    free_taken();
}

// The first group sends four tokens to expert 0, the second none: a group cannot use the capacity of another.
void test_capacity_of_groups(void **state) {
    (void)state;
    const int expert[8] = {0, 0, 0, 0, 1, 1, 0, 1}, served[8] = {0, 0, -1, -1, 1, 1, 0, -1};
    Route r = take_route(8, 2, 1);
    memcpy(r.expert, expert, sizeof(expert));
    make_route(&r, 4, 1);
    assert_ints(r.served, served, 8);
    assert_int_equal(r.dropped, 3);
    check_route(&r, 4, 1);
    free_taken();
}

// A layer with groups of tokens drops choices in training and none at evaluation, and the next batch is not affected.
void test_evaluation_drops_nothing(void **state) {
    (void)state;
    Config c = small_config("switch");
    set_options(&c, "--capacity-factor 0.25 --jitter 0");
    int inputs[16], targets[16];
    random_tokens(inputs, 16, c.vocab, 1);
    random_tokens(targets, 16, c.vocab, 2);
    Model *m = model_allocate(&c, 16, 1, NULL);
    randomize_weights(m);
    double loss[4];
    for (int i = 0; i < 4; i++) {
        const Route *r = &m->acts.layer[1].route;
        loss[i] = run_batch(m, inputs, targets, 2, 8, i % 2 ? EVAL_MODE : TRAIN_MODE, 1, 1, 0);
        assert_int_equal(r->dropped, i % 2 ? 0 : 16 - r->offset[4]);
        assert_true(i % 2 || r->dropped >= 8); // two groups of 8; each of 4 experts takes one choice of a group
        check_route(r, 8, i % 2 ? 0 : 0.25);
        free_taken();
    }
    assert_true(loss[0] == loss[2] && loss[1] == loss[3] && loss[0] != loss[1]);
    model_free(m);
}

void test_balance(void **state) {
    (void)state;
    const int E = 4, K = 2, N = 12;
    real *p = take_filled((size_t)N * E, (real)0.25);
    int *count = take_ints((size_t)N * E);
    for (int groups = 1; groups <= 3; groups++) { // perfect balance
        for (int i = 0; i < groups * E; i++)
            count[i] = N / groups * K / E;
        assert_near(switch_form(p, count, N, E, N / groups, NULL, 0), 1, 1e-6);
    }
    fill(p, (size_t)N * E, 0); // all to expert 2 with probability 1
    memset(count, 0, (size_t)N * E * sizeof(int));
    for (int n = 0; n < N; n++)
        p[n * E + 2] = 1;
    for (int groups = 1; groups <= 3; groups++) {
        for (int group = 0; group < groups; group++)
            count[group * E + 2] = N / groups;
        assert_near(switch_form(p, count, N, E, N / groups, NULL, 0), E, 1e-6);
    }
    // Two experts, K 1, two groups of two tokens. First: both to expert 0, mean p = (0.7, 0.3): 2 * (1*0.7 + 0*0.3)
    // = 1.4. Second: one each, mean p = (0.5, 0.5): 1. The mean of both: 1.2. As one group: f = (3/4, 1/4), P = (0.6,
    // 0.4): 1.1.
    const real hand[8] = {(real)0.8, (real)0.2, (real)0.6, (real)0.4, (real)0.9, (real)0.1, (real)0.1, (real)0.9};
    const int apart[4] = {2, 0, 1, 1}, together[2] = {3, 1};
    assert_near(switch_form(hand, apart, 4, 2, 2, NULL, 0), 1.2, 1e-6);
    assert_near(switch_form(hand, together, 4, 2, 4, NULL, 0), 1.1, 1e-6);
    free_taken();
}

// The loss that is reported as aux is, by definition, weight times balance loss plus weight times z-loss, summed over the layers.
void test_aux(void **state) {
    (void)state;
    for (int group = SEQUENCE; group <= BATCH; group++) {
        Config c = small_config("mixtral");
        set_options(&c, "--aux-weight 0.3 --z-weight 0.7");
        c.group = group;
        int inputs[16], targets[16], T = group == SEQUENCE ? 8 : 16, E = c.experts, K = c.topk, C = c.dim;
        random_tokens(inputs, 16, c.vocab, 1);
        random_tokens(targets, 16, c.vocab, 2);
        Model *m = model_allocate(&c, 16, 1, NULL);
        randomize_weights(m);
        run_batch(m, inputs, targets, 2, 8, TRAIN_MODE, 1, 1, 0);
        double aux = 0;
        for (int l = 0; l < c.layers; l++) {
            double balance = 0, z = 0;
            for (int first = 0; first < 16; first += T) {
                double share[4] = {0}, mean[4] = {0};
                for (int n = first; n < first + T; n++) {
                    double total = 0, e[4];
                    for (int i = 0; i < E; i++)
                        total += e[i] = exp(inner(m->acts.layer[l].h2 + n * C, m->params.layer[l].router + i * C, C));
                    for (int i = 0; i < E; i++)
                        mean[i] += e[i] / total / T;
                    for (int k = 0; k < K; k++)
                        share[m->acts.layer[l].route.expert[n * K + k]] += 1.0 / (T * K);
                    z += log(total) * log(total) / 16;
                }
                for (int i = 0; i < E; i++)
                    balance += E * share[i] * mean[i] * T / 16;
            }
            aux += 0.3 * balance + 0.7 * z;
        }
        assert_near(balance_losses(m), aux, IS_DOUBLE ? 1e-12 : 1e-5);
        model_free(m);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Choosing: every way of it against a slow one that follows the words of its paper

// Six experts in three groups. All scores are negative, so that a masked expert with score 0 would win. The groups' best scores
// are -4, -1, -3, the sums of their two best -9, -3, -12. Then a tie: the first of equal groups is chosen.
void test_mask_groups_by_hand(void **state) {
    (void)state;
    const real inf = (real)INFINITY;
    real score[12] = {-5, -4, -1, -2, -3, -9, -2, -1, -7, -1, -1, -2};
    int chosen[4];
    const int wanted[4] = {2, 3, 1, 0};
    mask_groups(score, 2, 6, 3, 1, BEST);
    select_topk(chosen, score, 2, 6, 2);
    assert_ints(chosen, wanted, 4);
    for (int e = 0; e < 6; e++)
        assert_true((score[e] == -inf) == (e / 2 != 1) && (score[6 + e] == -inf) == (e / 2 != 0));
    real two[6] = {-5, -4, -1, -2, -3, -9};
    const int both[4] = {2, 3, 1, 0};
    mask_groups(two, 1, 6, 3, 2, BEST_TWO);
    select_topk(chosen, two, 1, 6, 4);
    assert_ints(chosen, both, 4);
}

void test_mask_groups(void **state) {
    (void)state;
    uint64_t random = 11;
    for (int round = 0; round < 200; round++) {
        int E = draw(&random, 1, 12), G = draw(&random, 1, E), M = draw(&random, 1, G),
            by = draw(&random, BEST, BEST_TWO), N = 3;
        real *p = take_scores(N, E, random), *masked = take_reals((size_t)N * E);
        for (int i = 0; i < N * E; i++)
            masked[i] = p[i] -= (real)0.5;
        mask_groups(masked, N, E, G, M, by);
        for (int i = 0; i < N * E; i++) {
            double value[12];
            int g = i % E * G / E, before = 0;
            for (int d = 0; d < G; d++) { // the sum of the best and, by two, of the next
                double best = -INFINITY, second = -INFINITY;
                for (int e = 0; e < E; e++) {
                    double s = e * G / E == d ? (double)p[i / E * E + e] : -INFINITY;
                    second = fmax(second, fmin(best, s));
                    best = fmax(best, s);
                }
                value[d] = best + (by == BEST_TWO && second > -INFINITY ? second : 0);
            }
            for (int d = 0; d < G; d++)
                before += value[d] > value[g] || (value[d] == value[g] && d < g);
            assert_true(masked[i] == (before < M ? p[i] : (real)-INFINITY));
        }
        free_taken();
    }
}

void test_select_above(void **state) {
    (void)state;
    uint64_t random = 12;
    for (int round = 0; round < 200; round++) {
        int N = 4, E = draw(&random, 1, 9), K = draw(&random, 1, E), keep = draw(&random, 0, 1),
            own = draw(&random, 0, 1);
        real *p = take_scores(N, E, random), *level = take_scores(1, E, random + 1);
        int *expert = take_ints((size_t)N * K), *best = take_ints((size_t)N * K);
        double all = draw(&random, 0, 8) / 8.0; // often equal to a score, which is not above
        select_topk(best, p, N, E, K);
        memcpy(expert, best, (size_t)N * K * sizeof(int));
        select_above(expert, p, N, E, K, own ? level : NULL, all, keep);
        for (int n = 0; n < N; n++) {
            int place = n * K;
            for (int k = 0; k < K; k++) {
                int e = best[n * K + k];
                if ((keep && !k) || (double)p[n * E + e] > (own ? (double)level[e] : all))
                    assert_int_equal(expert[place++], e);
            }
            while (place < (n + 1) * K)
                assert_int_equal(expert[place++], -1);
        }
        free_taken();
    }
}

// By definition, an expert chooses a token if fewer than `take` others come before it. A higher score comes first, and of equal
// scores the earlier token.
void test_select_by_experts(void **state) {
    (void)state;
    uint64_t random = 13;
    for (int round = 0; round < 100; round++) {
        int n = draw(&random, 1, 15), E = draw(&random, 1, 6), take = draw(&random, 1, n);
        real *p = take_scores(n, E, random);
        int *expert = take_ints((size_t)n * E);
        double lowest[6] = {1, 1, 1, 1, 1, 1}, passes = 2;
        Lowest low_of_all = {lowest, &passes, take};
        select_by_experts(expert, p, n, E, &low_of_all);
        assert_true(passes == 3);
        for (int e = 0; e < E; e++) {
            int count = 0;
            double low = INFINITY;
            for (int i = 0; i < n; i++) {
                int before = 0, has = 0;
                for (int j = 0; j < n; j++)
                    before += p[j * E + e] > p[i * E + e] || (p[j * E + e] == p[i * E + e] && j < i);
                for (int k = 0; k < E; k++)
                    has += expert[i * E + k] == e;
                assert_int_equal(has, before < take);
                low = has ? fmin(low, (double)p[i * E + e]) : low;
                count += has;
            }
            assert_int_equal(count, take);
            assert_near(lowest[e], 1 + low, 1e-12); // added
        }
        for (int i = 0; i < n * E; i++) { // best first, then none
            int e = expert[i], next = i % E < E - 1 ? expert[i + 1] : -1;
            assert_true(next < 0 || (e >= 0 && p[i / E * E + e] >= p[i / E * E + next]));
        }
        free_taken();
    }
}

double assigned(const int *expert, const real *score, int n, int E) { // the sum of the scores; shares are as promised
    int count[16] = {0};
    double sum = 0;
    for (int t = 0; t < n; t++) {
        assert_in_range(expert[t], 0, E - 1);
        count[expert[t]]++;
        sum += (double)score[t * E + expert[t]];
    }
    for (int e = 0; e < E; e++)
        assert_int_equal(count[e], n / E + (e < n % E));
    return sum;
}

double best_assignment(const real *score, int n, int E, int t, int *left) { // of tokens t and later; left (E): how many more each expert takes
    double best = t == n ? 0 : -INFINITY;
    for (int e = 0; t < n && e < E; e++) {
        if (!left[e])
            continue;
        left[e]--;
        best = fmax(best, (double)score[t * E + e] + best_assignment(score, n, E, t + 1, left));
        left[e]++;
    }
    return best;
}

void test_select_balanced(void **state) {
    (void)state;
    uint64_t random = 14;
    int expert[256];
    for (int round = 0; round < (is_slow() ? 20 : 300); round++) {
        int n = draw(&random, 1, 8), E = draw(&random, 1, n < 6 ? 5 : 3), left[8];
        real *score =
            round % 3 ? take_normal((size_t)n * E, random) : take_scores(n, E, random); // with and without ties
        for (int e = 0; e < E; e++)
            left[e] = n / E + (e < n % E);
        select_balanced(expert, score, n, E, NULL);
        double sum = assigned(expert, score, n, E), best = best_assignment(score, n, E, 0, left);
        if (!(fabs(sum - best) <= 1e-9))
            fail_msg("%d tokens, %d experts: %.9g, the best is %.9g", n, E, sum, best);
        free_taken();
    }
    real *same = take_filled(60, 1), *many = take_normal(200 * 7, 5), *bad = take_normal(50 * 4, 6);
    select_balanced(expert, same, 20, 3, NULL);
    assigned(expert, same, 20, 3);
    for (int t = 0; t < 200; t++)
        many[t * 7 + 3] += 3; // nearly all want expert 3
    select_balanced(expert, many, 200, 7, NULL);
    assigned(expert, many, 200, 7);
    alarm(20); // a NaN must not keep it going for ever
    for (int i = 0; i < 50 * 4; i += 7)
        bad[i] = (real)NAN;
    select_balanced(expert, bad, 50, 4, NULL);
    fill(bad, 50 * 4, (real)NAN);
    select_balanced(expert, bad, 50, 4, NULL);
    alarm(0);
    free_taken();
}

void test_balance_table(void **state) {
    (void)state;
    enum { V = 2000, E = 8 };
    double frequency[V], total = 0, load[E] = {0};
    real *table = take_reals(V), *again = take_reals(V), *other = take_reals(V);
    for (int v = 0; v < V; v++)
        total += frequency[v] = floor(1e6 / (v + 5));
    balance_table(table, frequency, V, E, 1);
    balance_table(again, frequency, V, E, 1);
    balance_table(other, frequency, V, E, 2);
    assert_memory_equal(table, again, V * sizeof(real));
    assert_true(memcmp(table, other, V * sizeof(real)) != 0);
    for (int v = 0; v < V; v++)
        load[(int)table[v]] += frequency[v] / total * E;
    for (int e = 0; e < E; e++)
        assert_near(load[e], 1, 0.002);
    int count[E] = {0};
    balance_table(table, NULL, V - 3, E, 1); // 1997 words: 249 or 250 for each
    for (int v = 0; v < V - 3; v++)
        count[(int)table[v]]++;
    for (int e = 0; e < E; e++)
        assert_in_range(count[e], 249, 250);
    balance_table(table, frequency, 3, E, 1); // fewer words than experts
    assert_true(table[0] != table[1] && table[0] != table[2] && table[1] != table[2]);
    memset(frequency, 0, sizeof(frequency)); // words that never came are spread, too
    balance_table(table, frequency, 16, E, 1);
    memset(count, 0, sizeof(count));
    for (int v = 0; v < 16; v++)
        count[(int)table[v]]++;
    for (int e = 0; e < E; e++)
        assert_int_equal(count[e], 2);
    free_taken();
}

// With a threshold of 0.5, second choices of weight 0.1, 0.2, ... are kept in 20%, 40%, ... of 4000 draws, and from 0.5 on
// always. A scale of 2.5 changes nothing.
void test_decline_second(void **state) {
    (void)state;
    enum { N = 4000 };
    Config c = small_config("gshard");
    int l = 1; // a layer with experts
    assert_true(is_moe(&c, l) && c.topk == 2);
    Model *m = model_allocate(&c, N, 1, NULL);
    Route *r = &m->acts.layer[l].route;
    int *served = take_ints(2 * N), *again = take_ints(2 * N);
    real *weight = take_reals(2 * N);
    m->config.second_threshold = 0.5;
    m->batch = make_batch(NULL, NULL, 1, N, TRAIN_MODE, 1, 77, 0);
    for (int i = 0; i <= 7; i++) {
        double w = i * 0.1, scale = i % 2 ? 2.5 : 1, kept = 0;
        for (int n = 0; n < 2 * N; n++) {
            weight[n] = (real)(n % 2 ? w * scale : (1 - w) * scale);
            served[n] = again[n] = n % 5;
        }
        m->config.scale = scale;
        for (int part = 0; part < 3; part++) { // all at once; then in two halves: the same
            int first = part == 2 ? N / 2 : 0;
            r->N = part ? N / 2 : N;
            r->served = (part ? again : served) + 2 * first;
            r->weight = weight + 2 * first;
            m->batch.first_token = first;
            gshard_forward(m, l, NULL);
        }
        for (int n = 0; n < N; n++) {
            assert_int_equal(served[2 * n], 2 * n % 5); // first choices stay
            assert_true(served[2 * n + 1] == -1 || served[2 * n + 1] == (2 * n + 1) % 5);
            kept += served[2 * n + 1] >= 0;
        }
        double p = fmin(1, w / 0.5); // five standard deviations; none at 0 and 1
        assert_true(fabs(kept / N - p) <= 5 * sqrt(p * (1 - p) / N));
        assert_memory_equal(served, again, 2 * N * sizeof(int));
        for (int mode = EVAL_MODE; mode <= CHECK_MODE; mode++) { // only training leaves anything to chance
            m->batch.mode = mode;
            r->served = again;
            gshard_forward(m, l, NULL);
            assert_memory_equal(served, again, 2 * N * sizeof(int));
        }
        m->batch.mode = TRAIN_MODE;
    }
    model_free(m);
    free_taken();
}

// A model of one layer that has nothing but a route, in training. A test fills in what the function looks at that it calls.
// Valid until the next call.
Model bare_model(const Route *r) {
    static LayerActs layer;
    Model m;
    memset(&m, 0, sizeof(m));
    layer.route = *r;
    m.acts.layer = &layer;
    m.config.layers = m.config.subtokens = m.config.routers = 1;
    m.config.scale = m.batch.scale = 1;
    m.batch.mode = TRAIN_MODE;
    m.batch.step = 1;
    return m;
}

// The definition of serve(), one choice after the other. Returns how many choices are refused.
int naive_capacity(const Service *s, int N, int *expert, int *served) {
    int E = s->E, K = s->K, dropped = 0;
    int *order = take_ints((size_t)N * K), *taken = take_ints(s->units), *done = take_ints((size_t)N * K);
    for (int first = 0; first < N * K; first += s->group * K) {
        int count = s->group * K;
        for (int turn = 0; turn < count; turn++) {
            int best = -1;
            for (int i = first; i < first + count; i++) {
                int before = best >= 0 && (s->order == BY_CHOICE  ? i % K < best % K
                                           : s->order == BY_SCORE ? s->weight[i] > s->weight[best]
                                                                  : 0);
                if (!done[i] && (best < 0 || before))
                    best = i;
            }
            done[best] = 1;
            order[turn] = best;
        }
        memset(taken, 0, (size_t)s->units * sizeof(int));
        for (int turn = 0; turn < count; turn++) {
            int i = order[turn], next = -1;
            if (served[i] < 0)
                continue;
            int unit = served[i] * s->units / E;
            if (taken[unit] < s->capacity || (s->exempt && s->exempt[i / K])) {
                taken[unit]++;
                continue;
            }
            for (int e = E - 1; s->p && e >= 0; e--) {
                int has = 0;
                for (int k = 0; k < K; k++)
                    has |= expert[i / K * K + k] == e;
                if (!has && taken[e] < s->capacity && (next < 0 || s->p[i / K * E + e] >= s->p[i / K * E + next]))
                    next = e;
            }
            served[i] = next;
            expert[i] = next < 0 ? expert[i] : next;
            if (next < 0)
                dropped++;
            else
                taken[next]++;
        }
    }
    return dropped;
}

void test_capacity(void **state) {
    (void)state;
    uint64_t random = 15;
    int seen[3][2][2][2] = {{{{0}}}}; // order, groups, exempt, next: which cases dropped something
    for (int round = 0; round < (is_slow() ? 60 : 600); round++) {
        int tokens = draw(&random, 1, 12), N = tokens * draw(&random, 1, 3), E = draw(&random, 1, 8),
            K = draw(&random, 1, E);
        int order = draw(&random, BY_CHOICE, BY_TOKEN), limit = draw(&random, 1, tokens);
        int grouped = draw(&random, 0, 1), spared = draw(&random, 0, 1),
            next = !grouped && order != BY_SCORE && draw(&random, 0, 1);
        real *p = take_scores(N, E, random), *weight = take_scores(N, K, random + 1);
        int units = grouped ? draw(&random, 1, E) : E;
        unsigned char *exempt = spared ? (unsigned char *)take(N, 1) : NULL;
        for (int n = 0; spared && n < N; n++)
            exempt[n] = !draw(&random, 0, 3);
        Route r = take_route(N, E, K);
        int *expert = take_ints((size_t)N * K), *served = take_ints((size_t)N * K), *start = take_ints((size_t)N * K);
        select_topk(r.expert, p, N, E, K);
        for (int i = 0; i < N * K; i++)
            start[i] = draw(&random, 0, 9) ? r.expert[i] : -1; // declined before
        memcpy(expert, r.expert, (size_t)N * K * sizeof(int));
        memcpy(served, start, (size_t)N * K * sizeof(int));
        memcpy(r.served, start, (size_t)N * K * sizeof(int));
        Service s = {E, K, tokens, units, limit, order, r.served, r.expert, weight, next ? p : NULL, exempt};
        int before = count_served(&r);
        serve(&s, N);
        int dropped = naive_capacity(&s, N, expert, served);
        assert_int_equal(before - count_served(&r), dropped);
        assert_ints(r.expert, expert, N * K);
        assert_ints(r.served, served, N * K);
        seen[order][grouped][spared][next] += dropped > 0;

        // The same as a layer of a model, which knows the capacity as a factor. Who is exempt, it decides itself.
        if (!spared) {
            r.group = tokens;
            r.weight = weight;
            r.p = p;
            Model m = bare_model(&r);
            m.config.capacity_factor = (double)limit * units / (K * tokens);
            m.config.capacity_unit = grouped ? EXPERT_GROUP : ONE_EXPERT;
            m.config.groups = units;
            m.config.topk = K;
            m.config.drop_order = order;
            m.config.overflow = next ? NEXT : SKIP;
            select_topk(r.expert, p, N, E, K);
            memcpy(r.served, start, (size_t)N * K * sizeof(int));
            capacity_forward(&m, 0, NULL);
            assert_int_equal(m.acts.layer[0].route.dropped, dropped);
            assert_ints(r.expert, expert, N * K);
            assert_ints(r.served, served, N * K);

            // The lesson's own function does the simplest of these cases.
            if (!grouped && !next && order != BY_SCORE) {
                memcpy(r.served, start, (size_t)N * K * sizeof(int));
                r.dropped = 0;
                drop_overflow(&r, m.config.capacity_factor, K, order == BY_CHOICE);
                assert_int_equal(r.dropped, dropped);
                assert_ints(r.served, served, N * K);
            }
        }
        free_taken();
    }
    for (int order = 0; order < 3; order++) {
        for (int i = 0; i < 4; i++)
            assert_true(is_slow() || seen[order][i / 2][i % 2][0] > 3);
        assert_true(is_slow() || order == BY_SCORE || seen[order][0][1][1] > 3);
    }
}

// With the order BY_TOKEN a later token never decides whether an earlier one is dropped: if the text is cut short and the
// capacity stays, what is served of the rest stays as well. With the other two orders it may change.
void test_capacity_is_causal(void **state) {
    (void)state;
    uint64_t random = 16;
    int differ[3] = {0, 0, 0};
    for (int round = 0; round < 300; round++) {
        int N = draw(&random, 2, 14), cut = draw(&random, 1, N - 1), E = draw(&random, 2, 6), K = draw(&random, 1, 2);
        int order = round % 3, next = order != BY_SCORE && draw(&random, 0, 1), limit = draw(&random, 1, 4);
        int served[2][28];
        real *p = take_scores(N, E, random), *weight = take_scores(N, K, random + 1);
        for (int i = 0; i < 2; i++) {
            int n = i ? cut : N;
            Route r = take_route(n, E, K);
            select_topk(r.expert, p, n, E, K);
            memcpy(r.served, r.expert, (size_t)n * K * sizeof(int));
            Service s = {E, K, n, E, limit, order, r.served, r.expert, weight, next ? p : NULL, NULL};
            serve(&s, n);
            memcpy(served[i], r.served, (size_t)n * K * sizeof(int));
        }
        differ[order] += memcmp(served[0], served[1], (size_t)cut * K * sizeof(int)) != 0;
        free_taken();
    }
    assert_int_equal(differ[BY_TOKEN], 0);
    assert_true(differ[BY_CHOICE] > 0 && differ[BY_SCORE] > 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Balance losses by hand

// Sum over tokens and experts of slope . p / N.
double slope_form(const real *p, const double *slope, int N, int E, int score) {
    Route r = balance_route(p, slope, N, E, N);
    return mean_of_slopes(&r, score);
}

// Runs a loss of dev/routers over N tokens, which are one group, with these counts and served choices, after options have
// been set in m. Adds to slope (E).
void add_loss(void (*forward)(Model *m, int l, const real *x), const Config *c, double *slope, double *count,
              const int *served, int N, int E, int K) {
    Route r = balance_route(NULL, slope, N, E, N);
    r.K = K;
    r.count = count;
    r.served = (int *)served;
    Model m = bare_model(&r);
    m.config = *c;
    forward(&m, 0, NULL);
    arena_free(&m.scratch);
}

// Three tokens chose (0,1), (0,2), (1,0); the sums of their p are 1.4, 0.8, 0.8.
// Switch form: counts (3,2,1) of 6: 3 * (3/6 * 1.4 + 2/6 * 0.8 + 1/6 * 0.8) / 3 = 1.1.
// GShard, first choices only: (2,1,0) of 3: (2 * 1.4 + 1 * 0.8) / 3 = 1.2.
// By width 1, 2, 3: counts (3,4,3) of 10: 0.3 * 1.4 + 0.4 * 0.8 + 0.3 * 0.8 = 0.98.
void test_balance_by_hand(void **state) {
    (void)state;
    const real p[9] = {(real)0.5, (real)0.3, (real)0.2, (real)0.6, (real)0.1,
                       (real)0.3, (real)0.3, (real)0.4, (real)0.3};
    const int choice[6] = {0, 1, 0, 2, 1, 0}, width[3] = {1, 2, 3};
    const double all[3] = {3, 2, 1}, firsts[3] = {2, 1, 0};
    double count[4], wide[3], slope[3][3] = {{0}};
    Config c;
    config_defaults(&c);
    c.aux_weight = 1;
    count_choices(count, choice, 3, 3, 2, 3);
    for (int e = 0; e < 3; e++) {
        assert_true(count[e] == all[e]);
        wide[e] = count[e] * width[e];
    }
    add_balance(slope[0], count, 3, 1);
    add_balance(slope[2], wide, 3, 1);
    add_loss(gshard_loss_forward, &c, slope[1], count, choice, 3, 3, 2);
    for (int e = 0; e < 3; e++)
        assert_true(count[e] == firsts[e]);
    assert_near(slope_form(p, slope[0], 3, 3, SOFTMAX), 1.1, 1e-6);
    assert_near(slope_form(p, slope[1], 3, 3, SOFTMAX), 1.2, 1e-6);
    assert_near(slope_form(p, slope[2], 3, 3, SOFTMAX), 0.98, 1e-6);

    // Two groups of two tokens; a choice that was not made counts nowhere.
    const int some[8] = {0, 1, -1, 2, 1, 1, 2, 0};
    const double counted[6] = {1, 1, 1, 1, 2, 1};
    double apart[6];
    count_choices(apart, some, 4, 3, 2, 2);
    for (int i = 0; i < 6; i++)
        assert_true(apart[i] == counted[i]);

    // sigmoid scores 0.8, 0.4, 0.4 are shares 1/2, 1/4, 1/4: with slopes 2, 1, 0 that is 1.25
    const real sigmoids[3] = {(real)0.8, (real)0.4, (real)0.4};
    const double slopes[3] = {2, 1, 0};
    assert_near(slope_form(sigmoids, slopes, 1, 3, SIGMOID), 1.25, 1e-6);
}

// Experts of width 1, 2, 2, 3. Three tokens chose (0,1), (0,3), (1,0), and the sums of their p are 1.2, 0.8, 0.5, 0.5. Counts
// (3,2,0,1), by width (3,4,0,3) of 10: 4 * (0.3 * 1.2 + 0.4 * 0.8 + 0.3 * 0.5) / 3 = 3.32 / 3. Counts 6, 3, 3, 2 are 6 each;
// whatever P is, the loss is then its weight times the sum of P, which is 1.
void test_width_balance_by_hand(void **state) {
    (void)state;
    const real p[12] = {(real)0.4, (real)0.3, (real)0.2, (real)0.1, (real)0.5, (real)0.1,
                        (real)0.2, (real)0.2, (real)0.3, (real)0.4, (real)0.1, (real)0.2};
    const int choice[6] = {0, 1, 0, 3, 1, 0};
    double count[4], even[4] = {6, 3, 3, 2}, slope[2][4] = {{0}};
    Config c;
    config_defaults(&c);
    c.experts = 4;
    c.mixed = 1;
    c.ffn = 2;
    c.balance = WIDTH;
    c.aux_weight = 1;
    count_choices(count, choice, 3, 4, 2, 3);
    add_loss(mixed_forward, &c, slope[0], count, choice, 3, 4, 2);
    assert_near(slope_form(p, slope[0], 3, 4, SOFTMAX), 3.32 / 3, 1e-6);
    c.aux_weight = 0.5;
    add_loss(mixed_forward, &c, slope[1], even, choice, 3, 4, 2);
    assert_near(slope_form(p, slope[1], 3, 4, SOFTMAX), 0.5, 1e-6);
}

// Two routers with two choices each, and two tokens that are a group each: the counts of a router and of a group are its
// own. Router 0 chose (0,1) of the first token and (1,1) of the second, router 1 (0,2) and (2,0). Slopes are 3/2 of counts.
void test_multirouter_balance_by_hand(void **state) {
    (void)state;
    const int served[8] = {0, 1, 0, 2, 1, 1, 2, 0};
    const double counted[12] = {1, 1, 0, 1, 0, 1, 0, 2, 0, 1, 0, 1}; // group 0: router 0, router 1; group 1: the same
    const double firsts[12] = {1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1};
    for (int balance = SWITCH; balance <= GSHARD; balance++) {
        Config c = small_config("multirouter");
        set_options(&c, "--experts 3 --routers 2 --topk 4 --seq 1 --group sequence --aux-weight 1");
        c.balance = balance;
        Model *m = model_allocate(&c, 2, 1, NULL);
        Route *r = &m->acts.layer[0].route;
        const double *slope = (const double *)*router_state(m, 0, &multirouter_router);
        r->N = 2;
        r->rows = 4;
        r->group = 1;
        memcpy(r->served, served, sizeof(served));
        multirouter_loss_forward(m, 0, NULL);
        for (int i = 0; i < 12; i++)
            assert_near(slope[i], balance == SWITCH ? 1.5 * counted[i] : 3 * firsts[i], 1e-12);
        model_free(m);
    }
}

// Four experts in two groups, counts 2, 1, 1, 0: E*f is the same, its means 1.5 and 0.5; P' = 0.7 and 0.3: 1.2.
// Seven in four groups are {0,1} {2,3} {4,5} {6}. Counts 2,0,1,1,0,2,1 are even for the groups: the sum of P, 1. All to
// expert 0: f' = 3.5 for group 0, P' = 0.3: 1.05. All to expert 6: f' = 7, P' = 0.1: 0.7.
void test_device_balance_by_hand(void **state) {
    (void)state;
    const real four[4] = {(real)0.4, (real)0.3, (real)0.2, (real)0.1};
    const real seven[7] = {(real)0.2, (real)0.1, (real)0.1, (real)0.1, (real)0.2, (real)0.2, (real)0.1};
    double counts[4] = {2, 1, 1, 0},
           uneven[3][7] = {{2, 0, 1, 1, 0, 2, 1}, {7, 0, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 7}};
    const double wanted[3] = {1, 1.05, 0.7};
    const int group[7] = {0, 0, 1, 1, 2, 2, 3};
    double slope[4] = {0};
    Config c;
    config_defaults(&c);
    c.device_weight = 1;
    c.groups = 2;
    add_loss(group_loss_forward, &c, slope, counts, NULL, 1, 4, 1);
    assert_near(slope_form(four, slope, 1, 4, SOFTMAX), 1.2, 1e-6);
    for (int e = 0; e < 7; e++)
        assert_int_equal(group_of(e, 7, 4), group[e]);
    c.groups = 4;
    for (int i = 0; i < 3; i++) {
        double s[7] = {0};
        add_loss(group_loss_forward, &c, s, uneven[i], NULL, 1, 7, 1);
        assert_near(slope_form(seven, s, 1, 7, SOFTMAX), wanted[i], 1e-6);
    }
}

// Six experts in three groups, M = 2. Token A has experts 0, 1, 2: groups 0 (once) and 1; token B 5, 4, 0: groups 2 and
// 0. Sent: 2, 1, 1; f'' = 3 / (2*2) * that = 1.5, 0.75, 0.75; P' = 0.3, 0.4, 0.3: 0.975. Without B's 4 it is the same;
// with one token for each pair of groups each is sent 2 of 3: f'' = 1.
void test_communication_by_hand(void **state) {
    (void)state;
    const real p[6] = {(real)0.1, (real)0.2, (real)0.3, (real)0.1, (real)0.2, (real)0.1};
    const int expert[2][6] = {{0, 1, 2, 5, 4, 0}, {0, 1, 2, 5, -1, 0}}, even[9] = {0, 1, 2, 2, 4, 3, 4, 5, 1};
    Config c;
    config_defaults(&c);
    c.comm_weight = 1;
    c.groups = 3;
    c.group_topk = 2;
    for (int i = 0; i < 2; i++) {
        double slope[6] = {0};
        add_loss(communication_forward, &c, slope, NULL, expert[i], 2, 6, 3);
        assert_near(slope_form(p, slope, 1, 6, SOFTMAX), 0.975, 1e-6);
    }
    double slope[6] = {0};
    add_loss(communication_forward, &c, slope, NULL, even, 3, 6, 3);
    for (int e = 0; e < 6; e++)
        assert_near(slope[e], 1, 1e-12);
}

// (1, 3): mean 2, variance 1, 1 + 1/4; slopes 2/(2*4) * (-1 - 1/2) and (1 - 1/2): -0.375, 0.125. With a mean of 4 known
// beforehand: 1 + 1/16, slopes 2/(2*16) * (-1), (+1). variance: four tokens gave 1 and 3 to two experts, usage 1/4 and
// 3/4, E^2 * variance = 4 / 16, which is what a known mean of tokens / E = 2 gives.
void test_cv_squared_by_hand(void **state) {
    (void)state;
    const double v[2] = {1, 3}, same[3] = {5, 5, 5};
    double slope[3];
    assert_near(cv_squared(v, slope, 2, 0, 1), 1.25, 1e-12);
    assert_near(slope[0], -0.375, 1e-12);
    assert_near(slope[1], 0.125, 1e-12);
    assert_near(cv_squared(v, slope, 2, 4, 2), 1.0625, 1e-12); // the weight is of the slopes
    assert_near(slope[0], -0.125, 1e-12);
    assert_near(slope[1], 0.125, 1e-12);
    assert_near(cv_squared(v, slope, 2, 2, 1), 1 + 4.0 / 16, 1e-12);
    assert_near(cv_squared(same, slope, 3, 0, 1), 1, 1e-12);
    for (int e = 0; e < 3; e++)
        assert_near(slope[e], 0, 1e-12);
}

// One token, logits 2, 1, 0, sizes log(2)+0.01 of noise, noisy ones 1.9, 1.2, 0.1. K = 1: expert 0 is measured against
// the best of the others, 1.2, those against 1.9. K = 2: the chosen 0 and 1 against 0.1, expert 2 against the
// second, 1.2.
void test_smooth_load_by_hand(void **state) {
    (void)state;
    const real logits[6] = {2, 1, 0, 0, 0, 0}, noisy[3] = {(real)1.9, (real)1.2, (real)0.1};
    const double threshold[2][3] = {{1.2, 1.9, 1.9}, {0.1, 0.1, 1.2}}, size = log(2.0) + 0.01;
    const int chosen[2] = {0, 1};
    for (int K = 1; K <= 2; K++) {
        double load[3] = {1, 1, 1}; // added to
        smooth_load(load, chosen, noisy, logits, 3, K, 3);
        for (int e = 0; e < 3; e++)
            assert_near(load[e] - 1, 0.5 * erfc(-((double)logits[e] - threshold[K - 1][e]) / size / sqrt(2.0)), 1e-6);
    }
    assert_near(noise_size(0), 0.7031471805599453, 1e-12);
    assert_near(noise_size(-50), 0.01, 1e-12);
    assert_near(noise_size(50), 50.01, 1e-12);
    assert_near(noise_slope(0), 0.5, 1e-12);
}

// A model of one layer with experts whose input x (4,2) is the types of its tokens, and whose router gives type A the logits
// log(a) and type B log(b).
Model *hand_made(const char *recipe, const char *options, const double *a, const double *b) {
    Config c;
    config_defaults(&c);
    config_recipe(&c, recipe);
    apply_options(&c,
                  "--layers 1 --dim 2 --heads 1 --ffn 2 --seq 4 --batch 1 --moe-every 1 --dense-first 0 --jitter 0");
    c.vocab = 10;
    set_options(&c, options);
    Model *m = model_allocate(&c, 4, 1, NULL);
    for (int e = 0; e < c.experts; e++) {
        m->params.layer[0].router[2 * e] = (real)log(a[e]);
        m->params.layer[0].router[2 * e + 1] = (real)log(b[e]);
    }
    return m;
}

// Sends N tokens x (N,C) in sequences of T through the experts of layer l, in training, and returns where they went.
const Route *route_tokens(Model *m, int l, const real *x, int N, int T) {
    real *out = take_reals((size_t)N * m->config.dim);
    m->batch = make_batch(NULL, NULL, N / T, T, TRAIN_MODE, 1, 1, 0);
    clear_statistics(m);
    moe_forward(m, l, out, x, N, T);
    return &m->acts.layer[l].route;
}

// Routes tokens of types such as "AABA"; `first` is the number of the first one in the step.
const Route *route(Model *m, const char *types, int mode, int first) {
    real x[8], out[8] = {0};
    for (int n = 0; n < 4; n++) {
        x[2 * n] = types[n] == 'A';
        x[2 * n + 1] = types[n] == 'B';
    }
    m->batch = make_batch(NULL, NULL, 1, 4, mode, 1, 1, first);
    if (first == 0 && mode == TRAIN_MODE)
        clear_statistics(m);
    moe_forward(m, 0, out, x, 4, 4);
    return &m->acts.layer[0].route;
}

// Four experts; A has p = 1/2, 1/4, 1/8, 1/8: an entropy of (1/2 * 1 + 1/4 * 2 + 1/4 * 3) log 2 = 1.75 log 2; B 1/4
// each, 2 log 2. AAAB, top-1: all choose expert 0 (B by its index); two find room, 2*1*4/4. The loss is 4 * 1 * P_0 = 4
// * (3/2 + 1/4) / 4.
void test_router_stats_by_hand(void **state) {
    (void)state;
    const double a[4] = {0.5, 0.25, 0.125, 0.125}, b[4] = {0.25, 0.25, 0.25, 0.25};
    Model *m = hand_made("switch", "--experts 4 --capacity-factor 2 --aux-weight 1", a, b);
    const int served[4] = {0, 0, -1, -1};
    for (int again = 0; again < 2; again++) {
        const Route *r = route(m, "AAAB", TRAIN_MODE, 0);
        assert_ints(r->served, served, 4);
        assert_near(r->aux, 1.75, 1e-6);
        assert_int_equal(r->offset[4], 2);
        const Statistics *stats = &m->stats[0];
        for (int mode = EVAL_MODE; mode <= CHECK_MODE; mode++) {
            assert_near(stats->entropy, (3 * 1.75 + 2) * log(2.0), 1e-5);
            assert_true(stats->tokens == 4 && stats->active == 4 && stats->dropped == 2); // active: before the capacity
            for (int e = 0; e < 4; e++)
                assert_true(stats->count[e] == (e ? 0 : 4));
            route(m, "BBBB", mode, 0); // neither of these counts
        }
    }
    model_free(m);
    // sparse choice: A has 1/2 above 0.25, and no more; B nothing, but its best: 4 of 4 tokens * 4 experts are active
    m = hand_made("threshold", "--experts 4 --threshold 0.2 --max-active 3 --aux-weight 0 --sparsity-weight 1", a, b);
    const Route *r = route(m, "AABB", TRAIN_MODE, 0); // A: 0, 1; B: three of four
    assert_true(m->stats[0].active == 10);
    assert_near(r->aux, 10.0 / 16, 1e-12);
    m->config.threshold = 0.3;
    r = route(m, "AABB", TRAIN_MODE, 0); // A: 0; B: the best, 0, though it is not above
    assert_true(m->stats[0].active == 4 && m->stats[0].count[0] == 4);
    assert_near(r->aux, 4.0 / 16, 1e-12);
    model_free(m);
}

// Two experts, top-1, weights as they are; p of A 0.8, 0.2, of B 0.3, 0.7. AAAB gives expert 0 2.4, expert 1 0.7: usage
// 0.6, 0.175, variance 0.2125^2. variance: 1 + 2^2 * that; cv2: 1 + that / 0.3875^2, the mean being that of the
// weights.
void test_importance_by_hand(void **state) {
    (void)state;
    const double a[2] = {0.8, 0.2}, b[2] = {0.3, 0.7}, variance = 0.2125 * 0.2125;
    const double wanted[2] = {1 + 4 * variance, 1 + variance / (0.3875 * 0.3875)};
    for (int i = 0; i < 2; i++) {
        Model *m = hand_made("variance", "--experts 2 --topk 1 --gate probability --aux-weight 0.5", a, b);
        m->config.balance = i ? CV2 : VARIANCE;
        assert_near(route(m, "AAAB", TRAIN_MODE, 0)->aux, 0.5 * wanted[i], 1e-6);
        model_free(m);
    }
}

// Two experts, p of A 0.8, 0.2, of B 0.3, 0.7. AAAB: f = 3/4, 1/4, P = 0.675, 0.325: 2 * (0.50625 + 0.08125) = 1.175.
// Then BBBB in the same step: f of both is 3/8, 5/8, P = 0.3, 0.7: 2 * (0.1125 + 0.4375) = 1.1; as a step of its own, f
// = 0, 1: 1.4.
void test_group_step(void **state) {
    (void)state;
    const double a[2] = {0.8, 0.2}, b[2] = {0.3, 0.7};
    Model *m = hand_made("switch", "--experts 2 --group step --aux-weight 1 --capacity-factor 0", a, b);
    assert_near(route(m, "AAAB", TRAIN_MODE, 0)->aux, 1.175, 1e-6);
    assert_near(route(m, "BBBB", TRAIN_MODE, 4)->aux, 1.1, 1e-6);
    assert_near(route(m, "BBBB", TRAIN_MODE, 0)->aux, 1.4, 1e-6);
    model_free(m);
    Config c = small_config("mixtral");
    int inputs[16], targets[16];
    random_tokens(inputs, 16, c.vocab, 1);
    random_tokens(targets, 16, c.vocab, 2);
    m = model_allocate(&c, 16, 1, NULL);
    randomize_weights(m);
    for (int i = 0; i < 5; i++) { // counted once in each micro-step, by no backward pass, and anew with the first one
        run_batch(m, inputs, targets, 2, 8, TRAIN_MODE, 1, 1, i % 3 * 16);
        model_backward(m);
        double share[4], total = 0;
        expert_load(&m->stats[1], 4, share);
        for (int e = 0; e < 4; e++)
            total += m->stats[1].count[e];
        assert_true(total == 32 * (i % 3 + 1) && m->stats[1].active == total && m->stats[1].tokens == 16 * (i % 3 + 1));
    }
    model_free(m);
}

// The loss takes f from the choice that would be made without bias and groups, and P from all scores. So a bias that forces
// other choices does not change it.
void test_unbiased_balance(void **state) {
    (void)state;
    Config c = small_config("deepseek-v3");
    set_options(&c, "--aux-weight 1 --groups 4 --group-topk 2 --topk 2");
    Model *m = model_allocate(&c, 16, 1, NULL);
    real *x = take_normal(16 * 16, 3);
    const Route *r = NULL;
    double aux[2];
    for (int i = 0; i < 2; i++) {
        randomize_weights(m);
        for (int e = 0; e < 8; e++) // all scores with bias negative; then the last two win
            m->params.layer[1].bias[e] = (real)(i && e < 6 ? -9 : -2);
        r = route_tokens(m, 1, x, 16, 8);
        aux[i] = r->aux;
        for (int n = 0; n < 16 && i; n++)
            assert_true(r->expert[2 * n] + r->expert[2 * n + 1] == 13 && r->expert[2 * n] != r->expert[2 * n + 1]);
    }
    assert_true(aux[0] == aux[1]);
    double wanted = 0;
    for (int first = 0; first < 16; first += 8) {
        double f[8] = {0}, P[8] = {0};
        for (int n = first; n < first + 8; n++) {
            double score[8], sum = 0;
            int best[2];
            for (int e = 0; e < 8; e++)
                sum += score[e] = 1 / (1 + exp(-inner(x + n * 16, m->params.layer[1].router + e * 16, 16)));
            select_topk(best, r->p + n * 8, 1, 8, 2);
            for (int e = 0; e < 8; e++) {
                P[e] += score[e] / sum / 8;
                f[e] += (e == best[0] || e == best[1]) / 16.0;
            }
        }
        for (int e = 0; e < 8; e++)
            wanted += 8 * f[e] * P[e] / 2;
    }
    assert_near(aux[0], wanted, 1e-5);
    model_free(m);
    free_taken();
}

// If groups are chosen first, P is still the mean of the softmax over all experts, not over those in the chosen groups.
void test_balance_of_full_softmax(void **state) {
    (void)state;
    Config c = small_config("deepseek-v2");
    set_options(&c, "--aux-weight 1 --device-weight 0 --comm-weight 0");
    Model *m = model_allocate(&c, 16, 1, NULL);
    randomize_weights(m);
    real *x = take_normal(16 * 16, 3);
    const Route *r = route_tokens(m, 1, x, 16, 8);
    double wanted = 0;
    for (int n = 0; n < 16; n++) {
        double f[8] = {0}, e[8], total = 0;
        for (int i = n / 8 * 24; i < n / 8 * 24 + 24; i++)
            f[r->expert[i]] += 1 / 24.0;
        for (int i = 0; i < 8; i++)
            total += e[i] = exp(inner(x + n * 16, m->params.layer[1].router + i * 16, 16));
        for (int i = 0; i < 8; i++)
            wanted += 8 * f[i] * e[i] / total / 16;
    }
    assert_near(r->aux, wanted, 1e-5);
    model_free(m);
    free_taken();
}

// ---------------------------------------------------------------------------------------------------------------------
// What a step changes without a gradient

// Four experts, counts 5, 3, 4, 4: the mean is 4, so -g, +g, 0, 0. Then 0, 8, 4, 4: +g, -g, 0, 0: back where it was.
// Then 6, 6, 4, 0. The gradient, the moments and the decay have no part in it.
void test_bias_update(void **state) {
    (void)state;
    static const double counts[3][4] = {{5, 3, 4, 4}, {0, 8, 4, 4}, {6, 6, 4, 0}},
                        moved[3][4] = {{-1, 1, 0, 0}, {0, 0, 0, 0}, {-1, -1, 0, 1}};
    Config c = small_config("deepseek-v3");
    set_options(&c, "--experts 4 --topk 2 --bias-rate 0.25 --weight-decay 0.5");
    Model *m = model_allocate(&c, 16, 1, NULL);
    randomize_weights(m);
    real *bias = m->params.layer[1].bias;
    assert_null(m->params.layer[0].bias); // a dense layer
    fill(bias, 4, 3);
    for (int step = 0; step < 3; step++) {
        memcpy(m->stats[1].count, counts[step], sizeof(counts[step]));
        m->stats[1].active = 16;
        fill(m->memory[GRADS], m->size, 1);
        model_update(m, step + 1, 0.1, 1);
        for (int e = 0; e < 4; e++)
            assert_near((double)bias[e], 3 + 0.25 * moved[step][e], 1e-7);
    }
    model_free(m);
}

// Two experts take two of four tokens each. Expert 0 has scores 0.9, 0.5, 0.5, 0.1: tokens 0 and, of the equal ones, 1;
// expert 1 0.1, 0.5, 0.5, 0.9: tokens 3 and 1. Both lowest scores are 0.5; with a level of 0.25 before, it is 0.25 +
// 0.1 * (0.5 - 0.25) after.
void test_level_update(void **state) {
    (void)state;
    Config c = small_config("expert-choice");
    set_options(&c, "--experts 2 --topk 1");
    Model *m = model_allocate(&c, 16, 1, NULL);
    const real p[8] = {(real)0.9, (real)0.1, (real)0.5, (real)0.5, (real)0.5, (real)0.5, (real)0.1, (real)0.9};
    const int wanted[8] = {0, -1, 0, 1, -1, -1, 1, -1};
    int expert[8];
    real *level = layer_tensor(m, 0, "level", WEIGHTS);
    Lowest *low = (Lowest *)*router_state(m, 0, &expert_choice_router);
    level[0] = level[1] = (real)0.25;
    low->take = 2;
    select_by_experts(expert, p, 4, 2, low);
    assert_ints(expert, wanted, 8);
    assert_near(low->sum[0], 0.5, 1e-6);
    assert_true(*low->passes == 1);
    low->sum[1] = 1.2; // three passes
    low->sum[0] = 1.5;
    *low->passes = 3;
    model_update(m, 1, 0, 0);
    assert_near((double)level[0], 0.275, 1e-6);
    assert_near((double)level[1], 0.265, 1e-6);
    *low->passes = 0; // no pass, no change
    model_update(m, 2, 0, 0);
    assert_near((double)level[0], 0.275, 1e-6);
    // a step of two sequences has two passes; the level lets evaluation choose
    set_options(&m->config, "--group sequence");
    randomize_weights(m);
    int inputs[16], targets[16];
    random_tokens(inputs, 16, c.vocab, 1);
    random_tokens(targets, 16, c.vocab, 2);
    run_batch(m, inputs, targets, 2, 8, TRAIN_MODE, 1, 1, 0);
    assert_true(*low->passes == 2 && m->stats[0].count[0] == 8 && m->stats[0].count[1] == 8);
    double sum = low->sum[0];
    for (int micro = 0; micro < 2; micro++) { // the next step begins anew, and its second batch adds to the first
        run_batch(m, inputs, targets, 2, 8, TRAIN_MODE, 1, 2, 16 * micro);
        assert_true(*low->passes == 2 + 2 * micro);
        assert_near(low->sum[0], (1 + micro) * sum, 1e-6);
    }
    level[0] = 2;  // nobody
    level[1] = -1; // everybody
    run_batch(m, inputs, targets, 2, 8, EVAL_MODE, 1, 0, 0);
    for (int n = 0; n < 16; n++)
        assert_true(m->acts.layer[0].route.served[2 * n] == 1 && m->acts.layer[0].route.served[2 * n + 1] == -1);
    model_free(m);
}

// First values that are not only random: hash's table, the level of expert choice, the size of each of cmoe's experts.
void test_first_values(void **state) {
    (void)state;
    Config c = small_config("hash");
    double frequency[50];
    for (int v = 0; v < 50; v++)
        frequency[v] = 1 + v * v % 7;
    Model *m = model_allocate(&c, 16, 0, NULL);
    model_init(m, frequency);
    real *wanted = take_reals(50);
    for (int l = 0; l < 2; l++) {
        uint64_t stream = random_stream((uint64_t)c.seed, RANDOM_INIT, (uint64_t)find_tensor(m, l, "table"), 0);
        balance_table(wanted, frequency, 50, 4, stream);
        assert_memory_equal(layer_tensor(m, l, "table", WEIGHTS), wanted, 50 * sizeof(real));
    }
    model_free(m);

    c = small_config("expert-choice");
    m = model_allocate(&c, 16, 0, NULL);
    model_init(m, NULL);
    for (int l = 0; l < 2; l++) {
        for (int e = 0; e < 4; e++)
            assert_near((double)layer_tensor(m, l, "level", WEIGHTS)[e], 0.25, 0);
    }
    model_free(m);

    c = small_config("cmoe");
    set_options(&c, "--dim 64 --ffn 48");
    m = model_allocate(&c, 16, 0, NULL);
    model_init(m, NULL);
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        const real *w = m->memory[WEIGHTS] + t->offset;
        for (int e = 0; t->of_experts && e < 4; e++) {
            double deviation = 0.02 * (0.5 + e / 3.0) * (strcmp(t->kind, "w_out") ? 1 : 0.5);
            assert_near(rms(w, expert_size(&c, t, e)) / deviation, 1, 0.1);
            w += expert_size(&c, t, e);
        }
    }
    model_free(m);
    free_taken();
}

// The average starts as the router: 1. The step takes the router to 1 - 0.5 (AdamW's first step is lr * sign), the
// average to 1 + 0.1 * (0.5 - 1) = 0.95, and the next one, to 0, by the new router: 0.95 + 0.1 * (0 - 0.95).
void test_history_update(void **state) {
    (void)state;
    Config c = small_config("history");
    set_options(&c, "--history-decay 0.9 --weight-decay 0 --clip 0");
    Model *m = model_allocate(&c, 16, 1, NULL);
    model_init(m, NULL);
    real *router = m->params.layer[1].router, *slow = layer_tensor(m, 1, "slow", WEIGHTS);
    assert_memory_equal(slow, router, 4 * 16 * sizeof(real));
    fill(router, 4 * 16, 1);
    fill(slow, 4 * 16, 1);
    const double wanted[2] = {0.95, 0.95 - 0.095};
    for (int step = 1; step <= 2; step++) {
        fill(m->memory[GRADS], m->size, 1);
        model_update(m, step, 0.5, 1);
        for (int i = 0; i < 4 * 16; i++) {
            assert_near((double)router[i], 1 - 0.5 * step, 1e-6);
            assert_near((double)slow[i], wanted[step - 1], 1e-6);
        }
    }
    // chosen by the average, weighed by the router of now: the other sign reverses the choice, not the scores
    for (int i = 0; i < 4 * 16; i++) {
        router[i] = (real)random_normal(1, i);
        slow[i] = -router[i];
    }
    real *x = take_normal(16 * 16, 3);
    const Route *r = route_tokens(m, 1, x, 16, 8);
    for (int n = 0; n < 16; n++) {
        int best[4];
        const real *p = r->p + n * 4;
        select_topk(best, p, 1, 4, 4);
        assert_int_equal(r->expert[2 * n], best[3]);
        assert_int_equal(r->expert[2 * n + 1], best[2]);
        assert_near((double)r->weight[2 * n], (double)(p[best[3]] / (p[best[2]] + p[best[3]])), 1e-5);
    }
    model_free(m);
    free_taken();
}

// Four tokens, two experts, one choice: three prefer expert 0, by 0.8, 0.6 and 0.4; the last one expert 1, by 0.2. The fair
// share is two, so b_0 becomes the middle of -0.6 and -0.4; expert 1's margins are 0.2, 0, 0, 0, and b_1 stays. A second
// sweep has the margins 0.3, 0.1, 0, 0 and 0.7, 0.1, 0, 0: -0.05 for both, which does not change who is chosen.
void test_quantile_by_hand(void **state) {
    (void)state;
    const real p[8] = {(real)0.9, (real)0.1, (real)0.8, (real)0.2, (real)0.7, (real)0.3, (real)0.4, (real)0.6};
    double bias[2] = {0, 0};
    balance_by_quantiles(bias, p, 4, 2, 1, 1);
    assert_near(bias[0], -0.5, 1e-6);
    assert_near(bias[1], 0, 1e-6);
    balance_by_quantiles(bias, p, 4, 2, 1, 1);
    assert_near(bias[0], -0.55, 1e-6);
    assert_near(bias[1], -0.05, 1e-6);

    // A quarter of the way with a decay of 0.75; the mean of two passes.
    Config c = small_config("quantile");
    set_options(&c, "--experts 3 --topk 2 --quantile-decay 0.75");
    Model *m = model_allocate(&c, 16, 1, NULL);
    Wish *wish = (Wish *)*router_state(m, 0, &quantile_router);
    real *b = m->params.layer[0].bias;
    b[0] = 1;
    wish->sum[0] = 4;
    wish->sum[1] = -2;
    *wish->passes = 2;
    model_update(m, 1, 0, 0);
    assert_near((double)b[0], 1.25, 1e-6);
    assert_near((double)b[1], -0.25, 1e-6);
    *wish->passes = 0; // no pass, no change
    model_update(m, 2, 0, 0);
    assert_near((double)b[0], 1.25, 1e-6);
    model_free(m);

    // All orders, and equal ones: against counting.
    for (int round = 0; round < 200; round++) {
        int n = 1 + round % 20;
        real *v = take_scores(n, 1, (uint64_t)round);
        for (int rank = 0; rank < n; rank++) {
            real found = nth_largest(v, n, rank);
            int larger = 0, equal = 0;
            for (int i = 0; i < n; i++) {
                larger += v[i] > found;
                equal += v[i] == found;
            }
            assert_true(larger <= rank && rank < larger + equal);
        }
        free_taken();
    }
}

double max_over_mean(const Model *m, int l) {
    const Statistics *s = &m->stats[l];
    double most = 0;
    for (int e = 0; e < m->config.experts; e++)
        most = fmax(most, s->count[e]);
    return most * m->config.experts / s->active;
}

// A direction that all tokens share makes the later experts favourites. The bias evens that out after a few steps, on the
// tokens that it has seen nearly exactly; evaluation takes it from the model, and moves it by no step.
void test_quantile_is_even(void **state) {
    (void)state;
    enum { N = 512, E = 8 };
    Config c = small_config("quantile");
    set_options(&c, "--experts 8");
    Model *m = model_allocate(&c, N, 1, NULL);
    real *router = m->params.layer[1].router, *bias = m->params.layer[1].bias;
    real *x[2] = {take_normal(N * 16, 3), take_normal(N * 16, 4)};
    for (int i = 0; i < E * 16; i++)
        router[i] = i % 16 ? (real)(0.3 * random_normal(1, i)) : (real)(0.3 * (i / 16));
    for (int n = 0; n < 2 * N; n++)
        x[n / N][n % N * 16] = 1;
    route_tokens(m, 1, x[0], N, 8);
    assert_true(max_over_mean(m, 1) > 1.8);
    for (int step = 0; step < 12; step++) {
        route_tokens(m, 1, x[0], N, 8);
        router_update(m);
    }
    route_tokens(m, 1, x[0], N, 8);
    assert_true(max_over_mean(m, 1) < 1.03);
    route_tokens(m, 1, x[1], N, 8); // other tokens of the same kind
    assert_true(max_over_mean(m, 1) < 1.2);

    fill(bias, E, 0);
    bias[2] = 3;
    bias[5] = 2;
    real before[E], *out = take_reals(N * 16);
    memcpy(before, bias, sizeof(before));
    Wish *wish = (Wish *)*router_state(m, 1, &quantile_router);
    double passes = *wish->passes;
    m->batch = make_batch(NULL, NULL, N / 8, 8, EVAL_MODE, 1, 1, 0);
    moe_forward(m, 1, out, x[0], N, 8);
    const Route *r = &m->acts.layer[1].route;
    for (int n = 0; n < N; n++) {
        assert_true(r->expert[2 * n] == 2 || (double)r->p[n * E + 5] > (double)r->p[n * E + 2] + 0.99);
        assert_int_equal(r->expert[2 * n] + r->expert[2 * n + 1], 7);
        assert_near((double)r->weight[2 * n], (double)(r->p[n * E + 2] / (r->p[n * E + 2] + r->p[n * E + 5])), 1e-5);
    }
    assert_memory_equal(bias, before, sizeof(before));
    assert_true(*wish->passes == passes);
    model_free(m);
    free_taken();
}

// Counts 6, 2, 0, 0 of 8: loads 3, 1, 0, 0; recent moves by 0.02 of the difference: 0.06, 0.02, 0, 0; then 0, 8, 0, 0:
// loads 0, 4: 0.06 - 0.0012, 0.02 + 0.02 * 3.98. Idle: 0, 0, 1, 1, then 1, 0, 2, 2, then expert 2 has a token: 2, 0,
// 0, 3.
void test_idle_and_recent(void **state) {
    (void)state;
    static const double counts[3][4] = {{6, 2, 0, 0}, {0, 8, 0, 0}, {0, 4, 4, 0}},
                        recent[2][4] = {{0.06, 0.02, 0, 0}, {0.0588, 0.0996, 0, 0}};
    static const int idle[3][4] = {{0, 0, 1, 1}, {1, 0, 2, 2}, {2, 0, 0, 3}};
    Config c = small_config("mixtral");
    Model *m = model_allocate(&c, 16, 1, NULL);
    for (int step = 0; step < 3; step++) {
        memcpy(m->stats[0].count, counts[step], sizeof(counts[step]));
        m->stats[0].active = 8;
        model_update(m, step + 1, 0, 0);
        for (int e = 0; e < 4; e++) {
            assert_int_equal(m->stats[0].idle[e], idle[step][e]);
            assert_true(step == 2 || fabs(m->stats[0].recent[e] - recent[step][e]) < 1e-12);
        }
    }
    model_free(m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_select_topk),
        cmocka_unit_test(test_route),
        cmocka_unit_test(test_route_by_hand),
        cmocka_unit_test(test_capacity_of_groups),
        cmocka_unit_test(test_evaluation_drops_nothing),
        cmocka_unit_test(test_balance),
        cmocka_unit_test(test_aux),
        cmocka_unit_test(test_mask_groups_by_hand),
        cmocka_unit_test(test_mask_groups),
        cmocka_unit_test(test_select_above),
        cmocka_unit_test(test_select_by_experts),
        cmocka_unit_test(test_select_balanced),
        cmocka_unit_test(test_balance_table),
        cmocka_unit_test(test_decline_second),
        cmocka_unit_test(test_capacity),
        cmocka_unit_test(test_capacity_is_causal),
        cmocka_unit_test(test_balance_by_hand),
        cmocka_unit_test(test_width_balance_by_hand),
        cmocka_unit_test(test_multirouter_balance_by_hand),
        cmocka_unit_test(test_device_balance_by_hand),
        cmocka_unit_test(test_communication_by_hand),
        cmocka_unit_test(test_cv_squared_by_hand),
        cmocka_unit_test(test_smooth_load_by_hand),
        cmocka_unit_test(test_router_stats_by_hand),
        cmocka_unit_test(test_importance_by_hand),
        cmocka_unit_test(test_group_step),
        cmocka_unit_test(test_unbiased_balance),
        cmocka_unit_test(test_balance_of_full_softmax),
        cmocka_unit_test(test_bias_update),
        cmocka_unit_test(test_level_update),
        cmocka_unit_test(test_first_values),
        cmocka_unit_test(test_history_update),
        cmocka_unit_test(test_quantile_by_hand),
        cmocka_unit_test(test_quantile_is_even),
        cmocka_unit_test(test_idle_and_recent),
    };
    begin_tests();
    return cmocka_run_group_tests_name("routers", tests, NULL, scratch_done);
}
