// The router on the device: each function beside its C twin, on the same random numbers, and then whole layers.

#include "dev/test/cuda_twin.h"

// ---------------------------------------------------------------------------------------------------------------------
// The router on the device: each function beside its C twin, on the same random numbers.

template <class T>
void assert_device_alike(const char *what, const T *device, const T *wanted, size_t n, double tolerance) {
    assert_alike(what, take_back(device, n), wanted, n, tolerance);
}

template <class T> void assert_device_same(const char *what, const T *device, const T *wanted, size_t n) {
    T *found = take_back(device, n);
    for (size_t i = 0; i < n; i++) {
        if (found[i] != wanted[i]) {
            fail_msg("%s[%zu] of %zu is %.9g, not %.9g", what, i, n, (double)found[i], (double)wanted[i]);
        }
    }
}

const double CLOSE = 1e-6;
const int expert_counts[] = {1, 2, 3, 4, 7, 8, 31, 32, 33, 64, 100, 300};

// Scores: with ties among them, or without.
real *draw_scores(uint64_t *random, int N, int E) {
    *random = hash64(*random);
    if (*random % 3 == 0) {
        return take_scores(N, E, *random);
    }
    real *p = take_normal((size_t)N * E, *random);
    for (int i = 0; i < N * E && *random % 3 == 1; i++) {
        p[i] = (real)(1 / (1 + exp(-(double)p[i])));
    }
    return p;
}

int draw_experts(uint64_t *random) {
    return pick(random, expert_counts, (int)(sizeof(expert_counts) / sizeof(int)));
}

void draw_choices(uint64_t *random, int *expert, int N, int E, int K,
                  double none) { // different ones of a token
    for (int i = 0; i < N * K; i++) {
        int again = 1;
        while (again) {
            expert[i] = draw(random, 0, E - 1);
            again = 0;
            for (int j = i / K * K; j < i; j++) {
                again |= expert[j] == expert[i];
            }
        }
    }
    for (int i = 0; i < N * K; i++) {
        expert[i] = random_uniform(*random, (uint64_t)i) < none ? -1 : expert[i];
    }
}

// What is chosen of N rows: different experts, or -1 with a probability of `none`; but one of each row at least.
void draw_some_choices(uint64_t *random, int *expert, int N, int E, int K, double none) {
    draw_choices(random, expert, N, E, K, none);
    for (int n = 0; n < N; n++) {
        expert[n * K] = expert[n * K] < 0 ? 0 : expert[n * K];
    }
    for (int i = 0; i < N * K; i++) {
        expert[i] = i % K && expert[i] == expert[i / K * K] ? -1 : expert[i];
    }
}

// Scores above 0.
real *draw_positive(uint64_t *random, int N, int E) {
    real *p = draw_scores(random, N, E);
    for (int i = 0; i < N * E; i++) {
        p[i] = (real)(fabs((double)p[i]) + 0.01);
    }
    return p;
}

// What chance adds: jitter to the router's input (N,E), noise to its logits; and the way back of the noise.
void check_gpu_chance(const real *logits, int N, int E, uint64_t random) {
    size_t NE = (size_t)N * E;
    real *noisy = take_reals(NE), *jittered = take_reals(NE), *jittered_d = device_room<real>(NE);
    real *logits_d = on_the_device(logits, 2 * NE), *noisy_d = device_room<real>(NE);
    Model *m = bare_model(random); // has but seed and step, and so its random numbers
    m->config.jitter = 0.3;
    m->acts.layer->route.N = N;
    m->experts.C = E;
    m->batch.first_token = 17;
    m->batch.mode = random % 2 ? TRAIN_MODE : EVAL_MODE;
    gpu::Model *d = bare_twin(m);
    d->experts.C = E;
    apply_jitter(m, 0, jittered, logits);
    gpu::apply_jitter(d, 0, jittered_d, logits_d, SET);
    assert_device_alike("jittered", jittered_d, jittered, NE, CLOSE);
    for (size_t i = 0; i < NE; i++) {
        jittered[i] *= 2;
    }
    gpu::apply_jitter(d, 0, jittered_d, logits_d, ADD);
    assert_device_alike("added jitter", jittered_d, jittered, NE, CLOSE);
    noise_forward(m, 0, noisy, logits, N, E);
    gpu::noise_forward(d, 0, noisy_d, logits_d, N, E);
    assert_device_alike("noisy", noisy_d, noisy, NE, CLOSE);
    real *dnoisy = take_normal(NE, random + 8), *dlogits = take_normal(2 * NE, random + 9);
    real *dnoisy_d = on_the_device(dnoisy, NE), *dlogits_d = on_the_device(dlogits, 2 * NE);
    noise_backward(m, 0, dlogits, dnoisy, logits, N, E);
    gpu::noise_backward(d, 0, dlogits_d, dnoisy_d, logits_d, N, E);
    assert_device_alike("dlogits", dlogits_d, dlogits, 2 * NE, CLOSE);
}

void test_gpu_scores(void **state) {
    (void)state;
    uint64_t random = fresh();
    for (int round = 0; round < 40; round++) {
        int N = draw(&random, 1, 70), E = draw_experts(&random), score = draw(&random, SOFTMAX, SIGMOID);
        size_t NE = (size_t)N * E;
        real *logits = take_normal(2 * NE, random);
        for (size_t i = 0; i < 2 * NE; i++) {
            logits[i] *= round % 4 ? 3 : 30;
        }
        check_gpu_chance(logits, N, E, random + 20);
        real *p = take_reals(NE), *lse = take_normal(N, random + 1), *p_d = device_room<real>(NE),
             *lse_d = on_the_device(lse, N);
        scores_forward(p, lse, logits, N, E, score);
        gpu::scores_forward(p_d, lse_d, on_the_device(logits, NE), N, E, score);
        assert_device_alike("p", p_d, p, NE, CLOSE);
        assert_device_alike("lse", lse_d, lse, N, CLOSE);
        real *dp = take_normal(NE, random + 7), *dlogits = take_reals(NE), *dlogits_d = device_room<real>(NE);
        double z = draw(&random, 0, 1) * 0.1;
        scores_backward(dlogits, dp, p, lse, N, E, score, z);
        gpu::scores_backward(dlogits_d, on_the_device(dp, NE), p_d, lse_d, N, E, score, z);
        real *found = take_back(dlogits_d, NE),
             *added = take_normal(NE, random + 8); // what is left may be near 0
        for (size_t i = 0; i < NE; i++) {
            found[i] += added[i];
            dlogits[i] += added[i];
        }
        assert_alike("dlogits", found, dlogits, NE, CLOSE);
        free_device();
        free_taken();
    }
}

// A model that has the recurrent unit's weights, and gradients that are not zero.
Model *gru_model(uint64_t random, int R, Tensor *list) {
    Model *m = bare_model(random);
    m->tensors = list;
    add_tensor(list, &m->tensor_count, -1, "gru_x", NO_FIELD, 2, 1, 3 * R, R, INIT_FAN_IN);
    add_tensor(list, &m->tensor_count, -1, "gru_h", NO_FIELD, 2, 1, 3 * R, R, INIT_FAN_IN);
    add_tensor(list, &m->tensor_count, -1, "gru_bx", NO_FIELD, 1, 1, 1, 3 * R, INIT_ZERO);
    add_tensor(list, &m->tensor_count, -1, "gru_bh", NO_FIELD, 1, 1, 1, 3 * R, INIT_ZERO);
    for (int i = 0; i < 4; i++) {
        list[i].offset = m->size;
        m->size += list[i].size;
    }
    m->memory[WEIGHTS] = take_normal(m->size, random + 1);
    m->memory[GRADS] = take_normal(m->size, random + 2);
    for (size_t i = 0; i < list[0].size + list[1].size; i++) {
        m->memory[WEIGHTS][i] *= (real)0.3;
    }
    return m;
}

void test_gpu_gru(void **state) {
    (void)state;
    uint64_t random = fresh();
    for (int round = 0; round < 12; round++) {
        int N = draw(&random, 1, 300), R = 4 * draw(&random, 1, 10), first = draw(&random, 0, 1); // R as the device allows
        size_t size = (size_t)N * R;
        Tensor list[4];
        Model *m = gru_model(random, R, list);
        gpu::Model *d = bare_twin(m);
        real *x = take_normal(size, random + 3), *h = first ? NULL : take_normal(size, random + 4);
        real *next = take_reals(size), *keep = take_reals(4 * size), *dx = take_reals(size);
        real *dstate = take_normal(size, random + 5), *dstate_d = on_the_device(dstate, size);
        real *x_d = on_the_device(x, size), *h_d = device_twin(h, size), *next_d = device_room<real>(size);
        real *keep_d = device_room<real>(4 * size), *dx_d = device_room<real>(size);
        gru_forward(m, next, keep, x, h, N, R);
        gpu::gru_forward(d, next_d, keep_d, x_d, h_d, N, R);
        assert_device_alike("next", next_d, next, size, CLOSE);
        assert_device_alike("keep", keep_d, keep, 4 * size, CLOSE);
        gru_backward(m, dx, dstate, keep, x, h, N, R);
        gpu::gru_backward(d, dx_d, dstate_d, keep_d, x_d, h_d, N, R);
        assert_device_alike("dx", dx_d, dx, size, CLOSE);
        assert_device_alike("dstate", dstate_d, dstate, size, CLOSE);
        for (int i = 0; i < 4; i++) {
            assert_device_alike(list[i].kind, d->memory[GRADS] + list[i].offset,
                                m->memory[GRADS] + list[i].offset, list[i].size, CLOSE);
        }
        free_device();
        free_taken();
    }
}

void test_gpu_select(void **state) {
    (void)state;
    uint64_t random = fresh();
    for (int round = 0; round < 60; round++) {
        int N = draw(&random, 1, 50), E = draw_experts(&random),
            K = draw(&random, 0, 2) ? draw(&random, 1, min_int(E, 6)) : E;
        real *p = draw_scores(&random, N, E), *level = take_reals(E), *p_d = on_the_device(p, (size_t)N * E);
        size_t NK = (size_t)N * K, NE = (size_t)N * E;
        if (round % 5 == 0) {
            for (size_t i = 0; i < NE; i += 3) { // 0 and -0 are equal, -infinity is below all
                p[i] = i % 2 ? 0 : i % 4 ? (real)-0.0 : (real)-INFINITY;
            }
            p_d = on_the_device(p, NE);
        }
        int *expert = take_ints(NK), *expert_d = device_room<int>(NK);
        select_topk(expert, p, N, E, K);
        gpu::select_topk(expert_d, p_d, N, E, K);
        assert_device_same("expert", expert_d, expert, NK);
        for (int e = 0; e < E; e++) {
            level[e] = p[draw(&random, 0, N * E - 1)];
        }
        int levels = draw(&random, 0, 1), keep_best = draw(&random, 0, 1);
        select_above(expert, p, N, E, K, levels ? level : NULL, (double)level[0], keep_best);
        gpu::select_above(expert_d, p_d, N, E, K, levels ? on_the_device(level, E) : NULL, (double)level[0],
                          keep_best);
        assert_device_same("expert above", expert_d, expert, NK);
        int D = draw(&random, 1, min_int(E, 40)), M = draw(&random, 1, D), by = draw(&random, BEST, BEST_TWO);
        mask_groups(p, N, E, D, M, by);
        gpu::mask_groups(p_d, N, E, D, M, by);
        assert_device_same("masked", p_d, p, NE);
        free_device();
        free_taken();
    }
}

// NaN, of whatever sign and bits, finds some place: each expert is still named once.
void test_gpu_select_nan(void **state) {
    (void)state;
    uint64_t random = fresh();
    const uint32_t bits[] = {0x7fc00000u, 0xffc00000u, 0x7fffffffu, 0xffffffffu};
    for (int round = 0; round < 20; round++) {
        int N = draw(&random, 1, 40), E = draw_experts(&random), take_each = draw(&random, 1, N);
        real *p = draw_scores(&random, N, E);
        for (int i = 0; i < N * E; i++) {
            if (!draw(&random, 0, round % 4)) {
                memcpy(&p[i], &bits[draw(&random, 0, 3)], sizeof(p[i]));
            }
        }
        real *p_d = on_the_device(p, (size_t)N * E), *of_group = device_room<real>(E);
        int *expert_d = device_room<int>((size_t)N * E);
        double *lowest = on_the_device((double *)take(E, sizeof(double)), E);
        for (int by_experts = 0; by_experts < 2; by_experts++) {
            int total = 0;
            if (by_experts) {
                gpu::select_by_experts(expert_d, lowest, p_d, N, E, take_each, 1,
                                       device_room<unsigned char>((size_t)N * E), of_group);
            } else {
                gpu::select_topk(expert_d, p_d, N, E, E);
            }
            int *expert = take_back(expert_d, (size_t)N * E), *seen = take_ints((size_t)N * E);
            for (int i = 0; i < N * E; i++) {
                if (expert[i] < 0) {
                    continue;
                }
                assert_in_range(expert[i], 0, E - 1);
                assert_int_equal(seen[i / E * E + expert[i]]++, 0);
                total++;
            }
            assert_int_equal(total, by_experts ? take_each * E : N * E);
        }
        free_device();
        free_taken();
    }
}

void test_gpu_select_by_experts(void **state) {
    (void)state;
    uint64_t random = fresh();
    for (int round = 0; round < 30; round++) {
        int n = draw(&random, 1, round % 5 ? 40 : 300), groups = draw(&random, 1, 3),
            E = pick(&random, expert_counts, round % 5 ? 12 : 5);
        if (round == 0) { // so many that a block has several experts
            n = 20;
            groups = 4;
            E = 300;
        }
        int take_each = draw(&random, 0, 3) ? draw(&random, 1, n) : n;
        size_t NE = (size_t)groups * n * E;
        real *p = draw_scores(&random, groups * n, E);
        int *expert = take_ints(NE), *expert_d = device_room<int>(NE);
        double *lowest = (double *)take(E, sizeof(double));
        for (int e = 0; e < E; e++) {
            lowest[e] = e;
        }
        double *lowest_d = on_the_device(lowest, E), passes = 0;
        Lowest low = {lowest, &passes, take_each};
        for (int group = 0; group < groups; group++) {
            select_by_experts(expert + (size_t)group * n * E, p + (size_t)group * n * E, n, E, &low);
        }
        assert_true(passes == groups);
        gpu::select_by_experts(expert_d, lowest_d, on_the_device(p, NE), n, E, take_each, groups,
                               device_room<unsigned char>(NE), device_room<real>((size_t)groups * E));
        assert_device_same("expert", expert_d, expert, NE);
        assert_device_same("lowest", lowest_d, lowest, E);
        free_device();
        free_taken();
    }
}

void test_gpu_select_balanced(void **state) {
    (void)state;
    uint64_t random = fresh();
    for (int round = 0; round < (is_slow() ? 6 : 30); round++) {
        int n = draw(&random, 1, 40), groups = draw(&random, 1, 3),
            E = pick(&random, expert_counts, is_slow() ? 6 : 9), N = n * groups;
        real *score = draw_scores(&random, N, E);
        for (int i = 0; i < N * E && round % 3 == 0; i += E) {
            score[i] += 1; // all want the same
        }
        int *expert = take_ints(N), *expert_d = device_room<int>(N);
        for (int group = 0; group < groups; group++) {
            select_balanced(expert + (size_t)group * n, score + (size_t)group * n * E, n, E, NULL);
        }
        gpu::select_balanced(expert_d, on_the_device(score, (size_t)N * E), n, E, groups,
                             device_room<char>(gpu::balancing_bytes(n, E, groups)));
        assert_device_same("expert", expert_d, expert, N);
        free_device();
        free_taken();
    }
}

void test_gpu_weights(void **state) {
    (void)state;
    uint64_t random = fresh();
    for (int round = 0; round < 40; round++) {
        int N = draw(&random, 1, 60), E = draw_experts(&random);
        int K = draw(&random, 0, 2) ? draw(&random, 1, min_int(E, 6)) : E,
            gate = draw(&random, PROBABILITY, RENORMALIZED);
        size_t NK = (size_t)N * K, NE = (size_t)N * E;
        int *expert = take_ints(NK);
        real *p = draw_positive(&random, N, E), *weight = take_reals(NK);
        draw_some_choices(&random, expert, N, E, K, 0.3);
        int *expert_d = on_the_device(expert, NK);
        real *p_d = on_the_device(p, NE), *weight_d = device_room<real>(NK);
        weights_forward(weight, p, expert, N, E, K, gate, 1.7);
        gpu::weights_forward(weight_d, p_d, expert_d, N, E, K, gate, 1.7);
        assert_device_alike("weight", weight_d, weight, NK, CLOSE);
        real *dweight = take_normal(NK, random), *dp = take_normal(NE, random + 1),
             *dp_d = on_the_device(dp, NE);
        weights_backward(dp, dweight, weight, p, expert, N, E, K, gate, 1.7);
        gpu::weights_backward(dp_d, on_the_device(dweight, NK), weight_d, p_d, expert_d, N, E, K, gate, 1.7);
        assert_device_alike("dp", dp_d, dp, NE, CLOSE);
        free_device();
        free_taken();
    }
}

Level take_level(int N, int rows, int count, int chosen, int column) {
    size_t all = (size_t)N * rows;
    Level v = {rows,
               count,
               chosen,
               column,
               take_reals(all * count),
               take_ints(all * chosen),
               take_reals(all * chosen)};
    return v;
}

Level device_level(const Level *v, int N) { // the same with room on the device
    size_t all = (size_t)N * v->rows;
    Level d = *v;
    d.p = device_room<real>(all * v->count);
    d.chosen = device_room<int>(all * v->take);
    d.weight = device_room<real>(all * v->take);
    return d;
}

void check_level(Model *m, gpu::Model *d, const Level *v, const Level *device, const real *noisy, int N,
                 int W, uint64_t random) {
    size_t all = (size_t)N * v->rows, NW = (size_t)N * W;
    level_forward((Level *)v, noisy, N, W, 1.3);
    gpu::level_forward(device, on_the_device(noisy, NW), N, W, 1.3, NULL);
    assert_device_alike("level's p", device->p, v->p, all * v->count, CLOSE);
    assert_device_same("level's choice", device->chosen, v->chosen, all * v->take);
    assert_device_alike("level's weight", device->weight, v->weight, all * v->take, CLOSE);
    real *dnoisy = take_normal(NW, random), *dnoisy_d = on_the_device(dnoisy, NW),
         *dweight = take_normal(all * v->take, random + 1);
    level_backward(m, v, dnoisy, dweight, N, W, 1.3);
    gpu::level_backward(d, device, dnoisy_d, on_the_device(dweight, all * v->take), N, W, 1.3);
    assert_device_alike("dnoisy of a level", dnoisy_d, dnoisy, NW, CLOSE);
}

void test_gpu_levels(void **state) {
    (void)state;
    uint64_t random = fresh();
    for (int round = 0; round < 25; round++) {
        int N = draw(&random, 1, 40), G = draw(&random, 1, 40), M = draw(&random, 1, min_int(G, 5)),
            inner = draw(&random, 1, 9);
        int each = draw(&random, 1, inner), W = G + G * inner;
        size_t NM = (size_t)N * M, NMe = NM * each, NGe = (size_t)N * G * each;
        Model *m = bare_model(random);
        gpu::Model *d = bare_twin(m);
        Hierarchical s = {take_level(N, 1, G, M, 0), take_level(N, G, inner, each, G),
                          take_normal((size_t)N * W, random), NULL};
        Hierarchical device = {device_level(&s.groups, N), device_level(&s.experts, N), NULL, NULL};
        check_level(m, d, &s.groups, &device.groups, s.noisy, N, W, random + 1);
        check_level(m, d, &s.experts, &device.experts, s.noisy, N, W, random + 3);

        int *expert = take_ints(NMe), *expert_d = device_room<int>(NMe);
        real *weight = take_reals(NMe), *weight_d = device_room<real>(NMe),
             *dweight = take_normal(NMe, random + 5);
        real *dgroups = take_reals(NM), *dexperts = take_reals(NGe);
        real *dgroups_d = device_room<real>(NM), *dexperts_d = device_room<real>(NGe);
        for (int i = 0; i < (int)NMe; i++) {
            int of_groups, of_experts;
            both_choices(&s, i, &of_groups, &of_experts);
            expert[i] = s.groups.chosen[of_groups] * inner + s.experts.chosen[of_experts];
            weight[i] = s.groups.weight[of_groups] * s.experts.weight[of_experts];
            dgroups[of_groups] += dweight[i] * s.experts.weight[of_experts];
            dexperts[of_experts] += dweight[i] * s.groups.weight[of_groups];
        }
        gpu::join_levels(expert_d, weight_d, &device, N);
        assert_device_same("joined expert", expert_d, expert, NMe);
        assert_device_alike("joined weight", weight_d, weight, NMe, CLOSE);
        gpu::join_levels_back(dgroups_d, dexperts_d, on_the_device(dweight, NMe), &device, N);
        assert_device_alike("dgroups", dgroups_d, dgroups, NM, CLOSE);
        assert_device_alike("dexperts", dexperts_d, dexperts, NGe, CLOSE);
        free_device();
        free_taken();
    }
}

// ---- what is served

void check_gpu_sort(Model *m, gpu::Model *d) {
    Route *r = &m->acts.layer->route, *device = &d->acts.layer->route;
    size_t choices = (size_t)r->N * r->K;
    sort_by_expert(r);
    d->layers->tiles = (int)(choices / gpu::TM) + r->E;
    d->layers->tile = device_room<int2>(d->layers->tiles);
    gpu::Routing q = gpu::routing_of(d, 0, gpu::PLAN);
    gpu::launch_count(q);
    gpu::launch_place(q);
    assert_device_same("offset", device->offset, r->offset, r->E + 1);
    assert_device_same("row", device->row, r->row, choices);
    assert_device_same("choice", device->choice, r->choice, r->offset[r->E]);
    assert_device_same("token", device->token, r->token, r->offset[r->E]);

    // Each expert's rows in tiles of TM; then tiles that nobody has.
    int2 *tile = take_back(d->layers->tile, d->layers->tiles);
    int i = 0;
    for (int e = 0; e < r->E; e++) {
        for (int row = r->offset[e]; row < r->offset[e + 1]; row += gpu::TM, i++) {
            assert_true(i < d->layers->tiles && tile[i].x == e && tile[i].y == row);
        }
    }
    for (; i < d->layers->tiles; i++) {
        assert_int_equal(tile[i].x, -1);
    }
}

// Settings by chance. Returns whether the lesson's drop_overflow() is all that they ask for.
int draw_capacity(uint64_t *random, Config *c, int E, int K) {
    c->topk = draw(random, 1, K);
    c->groups = draw(random, 1, E);
    c->capacity_unit = draw(random, 0, 1) ? EXPERT_GROUP : ONE_EXPERT;
    c->drop_order = draw(random, BY_CHOICE, BY_TOKEN);
    c->drop_exempt = draw(random, 0, 1) * 0.3;
    c->overflow =
        c->capacity_unit == ONE_EXPERT && c->drop_order != BY_SCORE && draw(random, 0, 1) ? NEXT : SKIP;
    c->gate = draw(random, PROBABILITY, RENORMALIZED);
    c->scale = 1.3;
    c->subtokens = draw(random, 1, 2);
    c->capacity_factor = draw(random, 1, 30) * 0.1;
    c->eval_capacity_factor = draw(random, 1, 30) * 0.1;
    c->second_threshold = 0.7;
    return !capacity_wanted(c);
}

void test_gpu_capacity(void **state) {
    (void)state;
    uint64_t random = fresh();
    for (int round = 0; round < (is_slow() ? 24 : 80); round++) {
        int tokens = draw(&random, 1, round % 6 ? 20 : is_slow() ? 100 : 700), N = tokens * draw(&random, 1, 3),
            E = draw_experts(&random);
        int K = draw(&random, 1, min_int(E, round % 6 ? 6 : 3)), favourites = draw(&random, K, E);
        size_t choices = (size_t)N * K;
        Model *m = bare_model(random);
        Route *r = &m->acts.layer->route;
        *r = take_route(N, E, K);
        r->group = tokens;
        r->weight = draw_scores(&random, N, K);
        r->p = draw_positive(&random, N, E);
        draw_choices(&random, r->expert, N, favourites, K, 0); // so that some experts have none
        for (size_t i = 0; i < choices; i++) {
            r->served[i] = draw(&random, 0, 9) ? r->expert[i] : -1; // declined before
        }
        int plain = draw_capacity(&random, &m->config, E, K);
        if (draw(&random, 0, 2) == 0) {
            m->config.capacity_unit = m->config.drop_order = m->config.overflow = 0;
            m->config.drop_exempt = 0;
            plain = 1;
        }
        m->batch.mode = draw(&random, 0, 1) ? TRAIN_MODE : EVAL_MODE;
        m->batch.T = draw(&random, 1, 9);
        m->batch.first_token = 11;
        gpu::Model *d = bare_twin(m);
        Route *device = &d->acts.layer->route;
        if (K == 2) {
            gshard_forward(m, 0, NULL);
            gpu::gshard_forward(d, 0, NULL);
            assert_device_same("declined", device->served, r->served, choices);
        }
        if (plain) {
            drop_overflow(r, m->config.capacity_factor, m->config.topk, m->batch.mode == TRAIN_MODE);
            gpu::drop_overflow(d, 0, m->config.capacity_factor);
        } else {
            capacity_forward(m, 0, NULL);
            gpu::capacity_forward(d, 0, NULL);
        }
        assert_device_same("expert", device->expert, r->expert, choices);
        assert_device_same("served", device->served, r->served, choices);
        assert_device_alike("weight", device->weight, r->weight, choices, CLOSE);
        check_gpu_sort(m, d);
        free_device();
        free_taken();
    }
}

// More chunks than a warp has lanes, and empty experts.
void test_gpu_sort(void **state) {
    (void)state;
    uint64_t random = fresh();
    const int sizes[][3] = {{1, 1, 1},     {40000, 7, 1}, {3000, 300, 3},
                            {1024, 32, 1}, {1025, 1, 1},  {6, 4096, 5}};
    for (int i = 0; i < 6; i++) {
        Model *m = bare_model(random);
        Route *r = &m->acts.layer->route;
        *r = take_route(sizes[i][0], sizes[i][1], sizes[i][2]);
        for (int j = 0; j < r->N * r->K; j++) { // the second half of the experts is hardly ever chosen
            r->expert[j] = r->served[j] =
                draw(&random, -1, draw(&random, 0, 500) ? (r->E - 1) / 2 : r->E - 1);
        }
        check_gpu_sort(m, bare_twin(m));
        free_device();
        free_taken();
    }
}

// ---- losses

// The slopes of the losses of counts, and their way back to the scores.
void check_gpu_slopes(Model *m, gpu::Model *d, uint64_t random) {
    Route *r = &m->acts.layer->route, *device = &d->acts.layer->route;
    int N = r->N, E = r->E, groups = N / r->group;
    size_t size = (size_t)groups * E;
    count_choices(r->count, r->served, N, E, r->K, r->group);
    gpu::count_rows(device->count, device->served, N, 1, E, r->K, r->K, r->group);
    assert_device_same("count", device->count, r->count, size);
    for (int i = 0; i < groups; i++) {
        add_balance(r->slope + (size_t)i * E, r->count + (size_t)i * E, E, 0.3);
    }
    gpu::add_balance(device->slope, device->count, E, 0.3, groups);
    group_loss_forward(m, 0, NULL);
    gpu::group_loss_forward(d, 0, NULL);
    communication_forward(m, 0, NULL);
    gpu::communication_forward(d, 0, NULL);
    mixed_forward(m, 0, NULL);
    gpu::mixed_forward(d, 0, NULL);
    assert_device_alike("slope", device->slope, r->slope, size, 1e-12);
    gshard_loss_forward(m, 0, NULL);
    gpu::gshard_loss_forward(d, 0, NULL);
    assert_device_same("count of first choices", device->count, r->count, size);
    assert_device_alike("slope", device->slope, r->slope, size, 1e-12);

    real *dp = take_normal((size_t)N * E, random), *dp_d = on_the_device(dp, (size_t)N * E);
    balance_backward(dp, r, m->config.score, m->batch.scale);
    gpu::balance_backward(d, dp_d, device);
    assert_device_alike("dp", dp_d, dp, (size_t)N * E, CLOSE);
}

void test_gpu_balance(void **state) {
    (void)state;
    uint64_t random = fresh();
    for (int round = 0; round < 40; round++) {
        int tokens = draw(&random, 1, round % 5 ? 30 : 300), groups = draw(&random, 1, 4),
            N = tokens * groups;
        int E = draw_experts(&random), K = draw(&random, 1, min_int(E, 5));
        size_t size = (size_t)groups * E;
        Model *m = bare_model(random);
        Config *c = &m->config;
        Route *r = &m->acts.layer->route;
        *r = take_route(N, E, K);
        r->group = tokens;
        r->p = draw_positive(&random, N, E);
        r->count = (double *)take(size, sizeof(double));
        r->slope = (double *)take(size, sizeof(double));
        draw_some_choices(&random, r->served, N, E, K, 0.2);
        for (size_t i = 0; i < size; i++) {
            r->slope[i] = random_normal(random, i);
        }
        c->groups = draw(&random, 1, min_int(E, 40));
        c->group_topk = draw(&random, 1, c->groups);
        c->device_weight = 0.5;
        c->comm_weight = 0.7;
        c->balance = WIDTH;
        c->mixed = draw(&random, 0, 1);
        c->ffn = 12;
        c->aux_weight = 0.4;
        c->experts = E;
        c->score = draw(&random, SOFTMAX, SIGMOID);
        m->batch.scale = 3;
        int *width = take_ints(E);
        for (int e = 0; e < E; e++) {
            width[e] = expert_width(c, e);
        }
        gpu::Model *d = bare_twin(m);
        d->experts.width = on_the_device(width, E);
        check_gpu_slopes(m, d, random);

        double mean = draw(&random, 0, 1) * 2.5, *v = (double *)take(size, sizeof(double)),
               *slope = (double *)take(size, sizeof(double));
        double *losses = (double *)take(groups, sizeof(double)), *losses_d = device_room<double>(groups);
        for (size_t i = 0; i < size; i++) {
            v[i] = 0.1 + random_uniform(random, i);
        }
        double *v_d = on_the_device(v, size);
        for (int i = 0; i < groups; i++) {
            losses[i] = cv_squared(v + (size_t)i * E, slope + (size_t)i * E, E, mean, 0.4);
        }
        gpu::cv_squared(losses_d, v_d, v_d, E, mean, 0.4, groups); // in place
        assert_device_alike("cv^2", losses_d, losses, groups, 1e-12);
        if (E > 1) {
            assert_device_alike("cv^2's slope", v_d, slope, size, 1e-10);
        }
        free_device();
        free_taken();
    }
}

// A level of which the K experts with the highest noisy logits (N,W) are chosen.
Level take_choices(const real *noisy, int N, int W, int rows, int E, int K, int column) {
    Level v = take_level(N, rows, E, K, column);
    for (int row = 0; row < N * rows; row++) {
        const real *from = noisy + (size_t)(row / rows) * W + column + (size_t)(row % rows) * E;
        memcpy(v.p + (size_t)row * E, from, E * sizeof(real));
    }
    select_topk(v.chosen, v.p, N * rows, E, K);
    return v;
}

void test_gpu_smooth_load(void **state) {
    (void)state;
    uint64_t random = fresh();
    for (int round = 0; round < 25; round++) {
        int tokens = draw(&random, 1, round % 5 ? 20 : 300), groups = draw(&random, 1, 3),
            N = tokens * groups;
        int E = max_int(2, draw_experts(&random) % 64), K = draw(&random, 1, min_int(E - 1, 5)),
            each = draw(&random, 1, 3);
        int column = draw(&random, 0, 1) * 3, W = column + each * E, loads = each * E,
            stride = loads + draw(&random, 0, 3);
        size_t NW = (size_t)N * W, rows = (size_t)N * each;
        real *logits = take_normal(2 * NW, random), *noisy = take_normal(NW, random + 1);
        Level v = take_choices(noisy, N, W, each, E, K, column);
        unsigned char *live = round % 2 ? (unsigned char *)take(rows, 1) : NULL;
        for (size_t row = 0; live && row < rows; row++) {
            live[row] = draw(&random, 0, 2) > 0;
        }
        double *load = (double *)take((size_t)groups * loads, sizeof(double)),
               *load_d = device_room<double>((size_t)groups * loads);
        double *dload = (double *)take((size_t)groups * stride, sizeof(double));
        for (int i = 0; i < groups * stride; i++) {
            dload[i] = random_normal(random, (uint64_t)i);
        }
        real *dnoisy = take_normal(NW, random + 2), *dlogits = take_normal(2 * NW, random + 3);
        real *dnoisy_d = on_the_device(dnoisy, NW), *dlogits_d = on_the_device(dlogits, 2 * NW);
        for (int row = 0; row < (int)rows; row++) {
            int n = row / each, group = n / tokens;
            if (live && !live[row]) {
                continue;
            }
            level_load(load + (size_t)group * loads, &v, noisy, logits, n, row % each, W);
            level_load_backward(dlogits, dnoisy, dload + (size_t)group * stride, 0.7, &v, noisy, logits, n,
                                row % each, W);
        }
        Level device = v;
        device.chosen = on_the_device(v.chosen, rows * K);
        gpu::LoadRows s = {device, W, on_the_device(noisy, NW), on_the_device(logits, 2 * NW),
                           device_twin(live, rows)};
        gpu::smooth_load(load_d, s, N, tokens, device_room<int>(rows),
                         device_room<double>((size_t)groups * div_up(tokens, CHUNK) * loads));
        gpu::smooth_load_backward(dlogits_d, dnoisy_d, on_the_device(dload, (size_t)groups * stride), stride,
                                  0.7, s, N, tokens);
        assert_device_alike("load", load_d, load, (size_t)groups * loads, 1e-12);
        assert_device_alike("dnoisy", dnoisy_d, dnoisy, NW, CLOSE);
        assert_device_alike("dlogits", dlogits_d, dlogits, 2 * NW, CLOSE);
        free_device();
        free_taken();
    }
}

// ---- whole layers

typedef struct RouterCase {
    const char *recipe, *options;
} RouterCase;

const RouterCase router_cases[] = {
    {"mixtral", "--capacity-factor 0.6"},
    {"mixtral", "--capacity-factor 0.6 --drop-order token --group sequence --drop-exempt 0.5"},
    {"mixtral", "--capacity-factor 0.6 --drop-order score --eval-capacity-factor 0.5 --z-weight 0.1"},
    {"mixtral", "--capacity-factor 0.6 --overflow next --gate probability"},
    {"mixtral", "--capacity-factor 0.6 --overflow next --drop-order token --group sequence"},
    {"mixtral", "--experts 33 --topk 5 --groups 7 --group-topk 3 --device-weight 0.3 --comm-weight 0.2 "
                "--group sequence"},
    {"mixtral", "--group step --device-weight 0.1 --groups 2"},
    {"shazeer", "--recurrent 8 --group sequence"},
    {"hierarchical", "--group sequence --balance variance"},
    {"multirouter", "--group sequence --capacity-factor 0.7 --z-weight 0.1"},
    {"multirouter", "--group sequence --balance gshard --history-decay 0.9"},
    {"threshold", "--max-active 3 --experts 40 --capacity-factor 0.5"},
    {"threshold", "--threshold 0.6"},
    {"threshold", "--threshold 0.15 --group sequence --balance switch --aux-weight 0.3"}, // groups of unlike counts
    {"variance", "--group sequence"},
    {"deepseek-v3", "--groups 4 --group-topk 2 --topk 2 --group batch"},
    {"rmoe", "--jitter 0.1 --history-decay 0.9"},
    {"expert-choice", "--group sequence --experts 6 --topk 3"},
    {"base", "--group sequence"},
    {"mh-moe", "--group sequence --jitter 0.1 --capacity-factor 0.8"},
    {"switch", "--experts 64 --second-threshold 0"},
    {"mixtral", "--dim 1040 --heads 13 --kv-heads 1 --ffn 8 --layers 1"}, // eight rows at a time in shared memory
    {"deepseek-v3", "--dim 2080 --heads 26 --kv-heads 1 --ffn 8 --layers 1 --dense-first 0"}, // four
    {"mixtral", "--experts 70 --topk 5 --z-weight 0.1 --capacity-factor 0.9"}, // more than 64
    {"deepseek-v3", "--experts 70 --topk 5 --groups 1 --group-topk 0"},
};

const int router_case_count = (int)(sizeof(router_cases) / sizeof(router_cases[0]));

void store_weights(gpu::Model *d, const Model *m) {
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i], *to = &d->tensors[i];
        CHECK(cudaMemcpy(d->memory[WEIGHTS] + to->offset, m->memory[WEIGHTS] + t->offset,
                         t->size * sizeof(real), cudaMemcpyHostToDevice));
        CHECK(cudaMemset(d->memory[GRADS] + to->offset, 0, t->size * sizeof(real)));
    }
}

// Whether the device chose as the C twin did, which a near-tie may prevent: for one token, or for two that an expert
// compares; only a balanced assignment, and what passes on to the next best, may be another one altogether.
int same_choices(const gpu::Model *d, const Model *m, int l) {
    const Route *a = &m->acts.layer[l].route, *b = &d->acts.layer[l].route;
    size_t choices = (size_t)a->N * a->K, tables = (size_t)(a->N / a->group) * a->E;
    assert_int_equal(a->N, b->N);
    const int *expert = take_back(b->expert, choices), *served = take_back(b->served, choices);
    int different = 0, of_token = a->K * (int)sizeof(int);
    for (int i = 0; i < a->N; i++) {
        different += memcmp(expert + (size_t)i * a->K, a->expert + (size_t)i * a->K, of_token) != 0;
    }
    int same = different == 0 && !memcmp(served, a->served, choices * sizeof(int));
    if (m->config.balance == UNBIASED && m->batch.mode != EVAL_MODE) { // of what the scores would choose
        same &= !memcmp(take_back(b->count, tables), a->count, tables * sizeof(double));
    }
    if (different > 2 && m->config.select != BALANCED && m->config.overflow != NEXT) {
        fail_msg("%d of %d tokens have other experts in layer %d", different, a->N, l);
    }
    return same;
}

void compare_levels(const Level *found, const Level *wanted, int N) {
    size_t rows = (size_t)N * wanted->rows;
    assert_device_same("level's choice", found->chosen, wanted->chosen, rows * wanted->take);
    assert_device_alike("level's weight", found->weight, wanted->weight, rows * wanted->take, 1e-5);
    if (wanted->p) {
        assert_device_alike("level's p", found->p, wanted->p, rows * wanted->count, 1e-5);
    }
}

void compare_routes(const gpu::Model *d, const Model *m, int l) {
    const Route *wanted = &m->acts.layer[l].route, *found = &d->acts.layer[l].route;
    size_t choices = (size_t)wanted->N * wanted->K;
    Level experts = expert_level(m, l), experts_d = expert_level(d, l), groups = group_level(m, l),
          groups_d = group_level(d, l);
    compare_levels(&experts_d, &experts, wanted->N);
    if (m->config.select == HIERARCHICAL) {
        compare_levels(&groups_d, &groups, wanted->N);
        assert_device_alike("p", found->p, wanted->p, (size_t)wanted->N * wanted->E, 1e-5);
    }
    assert_true(found->rows == wanted->rows && !found->p == !wanted->p && !found->slope == !wanted->slope);
    assert_device_alike("weight", found->weight, wanted->weight, choices, 1e-5);
    assert_device_same("offset", found->offset, wanted->offset, wanted->E + 1);
    assert_device_same("row", found->row, wanted->row, choices);
    assert_device_same("choice", found->choice, wanted->choice, wanted->offset[wanted->E]);
    assert_device_same("token", found->token, wanted->token, wanted->offset[wanted->E]);
    if (m->batch.mode != EVAL_MODE) {
        double aux = take_back(gpu::layer_stats(d, l) + 4 * m->config.experts, gpu::SINGLE_STATS)[gpu::AUX];
        assert_near(aux, wanted->aux, 1e-5);
    }
}

void compare_stats(const gpu::Model *d, const Model *m, int l) {
    const Statistics *s = &m->stats[l];
    const Lowest *low = lowest_of(m, l);
    int E = m->config.experts;
    double *found = take_back(gpu::layer_stats(d, l), gpu::stats_size(&m->config)), *single = found + 4 * E;
    assert_alike("count", found, s->count, E, 0);
    assert_alike("lowest", found + E, low ? low->sum : (double *)take(E, sizeof(double)), E, 1e-5);
    assert_alike("recent", found + 2 * E, s->recent, E, 1e-12);
    for (int e = 0; e < E; e++) {
        assert_true(found[3 * E + e] == s->idle[e]);
    }
    assert_true(single[gpu::DROPPED] == s->dropped);
    assert_true(single[gpu::ACTIVE] == s->active);
    assert_true(single[gpu::TOKENS] == s->tokens);
    assert_true(single[gpu::PASSES] == (low ? *low->passes : 0));
    assert_near(single[gpu::ENTROPY], s->entropy, 1e-5);
}

// The end of moe_backward: from the weights and the losses to the router and to its input. dx (n,C) +=
void route_backward(Model *m, int l, real *dx, real *dweight, const real *x) {
    scratch_reset(m);
    for (int i = 0; m->parts[i]; i++) {
        if (m->parts[i]->place == LOSS && m->parts[i]->backward) {
            m->parts[i]->backward(m, l, dx, dweight, x);
        }
    }
    m->router->backward(m, l, dx, dweight, x);
}

// What goes into a layer's router: where the device has the norm and the lesson's router in one kernel, that is the residual
// stream, and x (n,C) is its norm.
typedef struct RouterInput {
    int fused;
    real *x, *x_d, *stream, *stream_d, *rstd;
} RouterInput;

RouterInput router_input(const gpu::Model *d, const Model *m, int l, int n, uint64_t random) {
    int C = m->experts.C;
    size_t size = (size_t)n * C;
    RouterInput in = {
        gpu::has_fused_router(d, l), take_normal(size, random), NULL, NULL, NULL, take_reals(n)};
    if (in.fused) {
        in.stream = take_normal(size, random + 50);
        in.stream_d = on_the_device(in.stream, size);
        rmsnorm_forward(in.x, in.rstd, in.stream, m->params.layer[l].norm2, n, C, m->config.norm_eps);
    }
    in.x_d = on_the_device(in.x, size);
    return in;
}

void route_on_device(gpu::Model *d, int l, const RouterInput *in, int n, int T) {
    gpu::LayerActs *a = &d->layers[l];
    gpu::scratch_reset(d);
    if (in->fused) {
        gpu::fused_router_forward(d, l, {a->mid, a->h2, NULL, a->rstd2}, {in->stream_d, NULL, NULL, NULL, 0},
                                  n, T);
    } else {
        gpu::route_forward(d, l, in->x_d, n, T);
    }
}

// Both ways back through the norm, too. The device leaves the router's gradient divided by the norm's weights.
void check_fused_backward(gpu::Model *d, Model *m, int l, const RouterInput *in, real *dweight, int n,
                          uint64_t random) {
    const gpu::LayerActs *a = &d->layers[l];
    int C = m->experts.C, E = m->experts.E, K = m->acts.layer[l].route.K;
    size_t nC = (size_t)n * C, EC = (size_t)E * C, at = d->params.layer[l].router - d->memory[WEIGHTS];
    real *dx = take_normal(nC, random), *dh = take_normal(nC, random + 1), *dnorm = take_reals(C);
    real *dx_d = on_the_device(dx, nC), *dh_d = on_the_device(dh, nC),
         *dweight_d = on_the_device(dweight, (size_t)n * K);
    gpu::NormBack norm = {dx_d, d->dx_low, a->partial[1], a->mid, a->rstd2, d->params.layer[l].norm2};
    gpu::RouterBack back = {};
    back.dweight = dweight_d;
    back.others = {dh_d, NULL, NULL, NULL, K};
    gpu::scratch_reset(d);
    gpu::losses_backward(d, l, NULL, dweight_d, NULL);
    gpu::fused_router_backward(d, l, norm, back);
    real *found = take_back(a->drouter, EC), *sum = take_back(d->memory[GRADS] + at, EC);
    for (size_t i = 0; i < EC; i++) {
        sum[i] += found[i] * m->params.layer[l].norm2[i % C];
    }
    CHECK(cudaMemcpy(d->memory[GRADS] + at, sum, EC * sizeof(real), cudaMemcpyHostToDevice));

    route_backward(m, l, dh, dweight, in->x);
    rmsnorm_backward(dx, dnorm, dh, in->stream, in->rstd, m->params.layer[l].norm2, n, C);
    assert_device_alike("dx", dx_d, dx, nC, 2e-5);
}

// One micro-step of all layers with experts, on both sides. Returns 0 where the device chose otherwise.
int check_router_pass(gpu::Model *d, Model *m, uint64_t random, int taken_over) {
    const Config *c = &m->config;
    int h = c->subtokens, C = c->dim / h, n = m->max_tokens * h, T = c->seq * h;
    size_t nC = (size_t)n * C;
    RouterInput in[8];
    real *out = take_reals(nC);
    gpu::Decided *twin = (gpu::Decided *)take(c->layers, sizeof(gpu::Decided));
    d->batch = m->batch;
    d->decided = taken_over ? twin : NULL;
    for (int l = 0; l < c->layers; l++) {
        if (!is_moe(c, l)) {
            continue;
        }
        in[l] = router_input(d, m, l, n, random + (uint64_t)l);
        moe_forward(m, l, out, in[l].x, n, T); // and the experts, of which nothing is asked here
        twin[l] = layer_plan(m, l);
        route_on_device(d, l, &in[l], n, T);
        if (!same_choices(d, m, l)) {
            return 0;
        }
        compare_routes(d, m, l);
        compare_stats(d, m, l);
    }
    for (int l = c->layers - 1; m->batch.mode != EVAL_MODE && l >= 0; l--) {
        if (!is_moe(c, l)) {
            continue;
        }
        size_t nK = (size_t)n * m->acts.layer[l].route.K;
        real *dweight = take_normal(nK, random + 100 + (uint64_t)l),
             *dx = take_normal(nC, random + 200 + (uint64_t)l);
        if (in[l].fused) {
            check_fused_backward(d, m, l, &in[l], dweight, n, random + 300 + (uint64_t)l);
            continue;
        }
        real *dx_d = on_the_device(dx, nC), *dweight_d = on_the_device(dweight, nK);
        route_backward(m, l, dx, dweight, in[l].x);
        gpu::scratch_reset(d);
        gpu::route_backward(d, l, dx_d, dweight_d, in[l].x_d);
        assert_device_alike("dx", dx_d, dx, nC, 2e-5);
    }
    return 1;
}

// After two steps: what has gradients, and what changes without them.
void compare_tensors(const gpu::Model *d, const Model *m) {
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        size_t at = d->tensors[i].offset;
        if (!strcmp(t->kind, "router") || !strcmp(t->kind, "project") || !strncmp(t->kind, "gru", 3)) {
            assert_device_alike(t->name, d->memory[GRADS] + at, m->memory[GRADS] + t->offset, t->size, 2e-5);
        }
        if (!t->trained) {
            assert_device_alike(t->name, d->memory[WEIGHTS] + at, m->memory[WEIGHTS] + t->offset, t->size,
                                1e-6);
        }
    }
}

void check_router(const char *recipe, const char *text, uint64_t random, int *otherwise) {
    Config c = device_config(recipe);
    char sizes[200];
    snprintf(sizes, sizeof(sizes), "--seq %d --batch %d", draw(&random, 1, 40), draw(&random, 1, 4));
    set_options(&c, text);
    set_options(&c, sizes);
    int N = c.batch * c.seq;
    if (!moe_layers(&c)) {
        return;
    }
    for (int again = 1, decided = draw(&random, 0, 1); again;
         decided = 1) { // where it chose otherwise, as decided
        uint64_t pass = random;
        Model *m = model_allocate(&c, N, 1, NULL);
        gpu::Model *d = (gpu::Model *)gpu::model_allocate(&c, N, 1, NULL);
        int *tokens = take_ints(N), same = 1;
        randomize_weights(m);
        for (int i = 0; i < m->tensor_count && c.dim > 1024; i++) { // or logits were so large that their roundings show
            const Tensor *t = &m->tensors[i];
            for (size_t j = 0; j < t->size && !strcmp(t->kind, "router"); j++) {
                m->memory[WEIGHTS][t->offset + j] *= (real)0.1;
            }
        }
        store_weights(d, m);
        random_tokens(tokens, N, c.vocab, random);
        CHECK(cudaMemcpy(d->tokens, tokens, (size_t)N * sizeof(int), cudaMemcpyHostToDevice));
        for (int step = 1; step < 3 && same; step++) {
            clear_statistics(m);
            gpu::clear_statistics(d);
            for (int micro = 0; micro < 3 && same; micro++) { // two of training, and one more
                int mode = micro < 2 ? TRAIN_MODE : step == 1 ? CHECK_MODE : EVAL_MODE;
                m->batch = make_batch(tokens, NULL, c.batch, c.seq, mode, 0.5, step, micro * N);
                same = check_router_pass(d, m, hash64(pass++), decided);
            }
            if (!same) {
                break;
            }
            router_update(m);
            gpu::router_update(d);
            for (int l = 0; l < c.layers; l++) {
                if (is_moe(&c, l)) {
                    compare_stats(d, m, l);
                }
            }
            compare_tensors(d, m);
        }
        again = !same && !decided;
        assert_true(same || again);
        *otherwise += !same;
        gpu::model_free(d);
        model_free(m);
        free_device();
        free_taken();
    }
}

void test_gpu_routers(void **state) {
    (void)state;
    uint64_t random = fresh();
    int otherwise = 0;
    for (int i = 0; i < recipe_count; i++) {
        if (has_kernels(recipes[i].name)) {
            check_router(recipes[i].name, "", random = hash64(random), &otherwise);
        }
    }
    for (int i = 0; i < router_case_count; i++) {
        check_router(router_cases[i].recipe, router_cases[i].options, random = hash64(random), &otherwise);
    }
    assert_true(otherwise <= 2);
}

// ---------------------------------------------------------------------------------------------------------------------
// Numbers at the edge: see dev/test/numbers.c. In the emulator a kernel that makes NaN out of numbers ends the program.

template <class T> void assert_device_finite(const char *what, const T *device, size_t n) {
    const T *found = take_back(device, n);
    for (size_t i = 0; i < n; i++) {
        if (!isfinite((double)found[i])) {
            fail_msg("%s[%zu] of %zu is %g", what, i, n, (double)found[i]);
        }
    }
}

// Logits of four experts: large ones of both signs, equal ones, and some that sigmoid scores just do not survive.
const double edge_rows[][4] = {
    {200, -200, 200, -200},   {-200, -200, -200, -200}, {200, 200, 200, 200}, {1e4, -1e4, 0, 1},
    {-1e4, -1e4, -1e4, -1e4}, {1e4, 1e4, 1e4, 1e4},     {0, 0, 0, 0},         {-90, -95, -200, -1e4},
    {-60, -65, -70, -75},     {-68, -69, -69.2, -71},   {-88, -88, -88, -88},
};

// From such logits to scores, weights, losses and back, beside the C twin. worst: other experts are chosen than the scores say.
void check_gpu_edge(int score, int gate, int worst) {
    const int N = COUNT(edge_rows), E = 4, K = 2;
    const size_t NE = (size_t)N * E, NK = (size_t)N * K;
    real *logits = take_reals(NE), *p = take_reals(NE), *lse = take_reals(N), *weight = take_reals(NK);
    for (int i = 0; i < N * E; i++) {
        logits[i] = (real)edge_rows[i / E][i % E];
    }
    Model *m = bare_model(1);
    Route *r = &m->acts.layer->route;
    *r = take_route(N, E, K);
    r->weight = weight;
    r->p = p;
    r->lse = lse;
    r->count = (double *)take(E, sizeof(double));
    r->slope = (double *)take(E, sizeof(double));
    for (int e = 0; e < E; e++) {
        r->slope[e] = 0.5 + 0.5 * e;
    }
    m->config.score = score;
    m->config.experts = E;
    scores_forward(p, lse, logits, N, E, score);
    select_topk(r->expert, p, N, E, K);
    for (int i = 0; worst && i < N * K; i++) {
        r->expert[i] = 2 + i % 2;
    }
    memcpy(r->served, r->expert, NK * sizeof(int));
    weights_forward(weight, p, r->expert, N, E, K, gate, 1.5);

    gpu::Model *d = bare_twin(m);
    Route *there = &d->acts.layer->route;
    gpu::scores_forward(there->p, there->lse, on_the_device(logits, NE), N, E, score);
    assert_device_alike("p", there->p, p, NE, CLOSE);
    gpu::weights_forward(there->weight, there->p, there->expert, N, E, K, gate, 1.5);
    assert_device_alike("weight", there->weight, weight, NK, CLOSE);
    real *dweight = take_normal(NK, 3), *dp = take_reals(NE), *dlogits = take_reals(NE), *dp_d = on_the_device(dp, NE);
    weights_backward(dp, dweight, weight, p, r->expert, N, E, K, gate, 1.5);
    balance_backward(dp, r, m->config.score, m->batch.scale);
    scores_backward(dlogits, dp, p, lse, N, E, score, 0.001);
    gpu::weights_backward(dp_d, on_the_device(dweight, NK), there->weight, there->p, there->expert, N, E, K, gate, 1.5);
    gpu::balance_backward(d, dp_d, there);
    assert_device_finite("dp", dp_d, NE);
    gpu::scores_backward(dp_d, dp_d, there->p, there->lse, N, E, score, 0.001);
    assert_device_alike("dlogits", dp_d, dlogits, NE, 1e-5);
    free_device();
    free_taken();
}

void test_gpu_edge_scores(void **state) {
    (void)state;
    for (int i = 0; i < 8; i++) {
        check_gpu_edge(i % 2 ? SIGMOID : SOFTMAX, i / 2 % 2 ? RENORMALIZED : PROBABILITY, i / 4);
    }
    double none[3] = {0, 0, 0}, tiny[3] = {1e-44, 2e-44, 0}, *loss = device_room<double>(1);
    for (int i = 0; i < 2; i++) {
        double *v = on_the_device(i ? tiny : none, 3), wanted[3];
        double value = cv_squared(i ? tiny : none, wanted, 3, 0, 1);
        gpu::cv_squared(loss, v, v, 3, 0, 1, 1);
        assert_device_alike("cv^2", loss, &value, 1, 1e-12);
        assert_device_alike("its slope", v, wanted, 3, 1e-12);
    }
    free_device();
    free_taken();
}

// All layers of a model whose routers' logits are as large as `size`, of either sign, for all experts of a token at once. The
// choices are the C twin's.
void check_gpu_edge_router(const char *recipe, const char *text, double size) {
    Config c = device_config(recipe);
    set_options(&c, text);
    int h = c.subtokens, N = c.batch * c.seq, n = N * h, T = c.seq * h, C = c.dim / h, E = c.experts;
    Model *m = model_allocate(&c, N, 1, NULL);
    gpu::Model *d = (gpu::Model *)gpu::model_allocate(&c, N, 1, NULL);
    gpu::Decided *twin = (gpu::Decided *)take(c.layers, sizeof(gpu::Decided));
    int *tokens = take_ints(N);
    real *out = take_reals((size_t)n * C);
    randomize_weights(m);
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        size_t W = (size_t)t->shape[2];
        int router = !strcmp(t->kind, "router") || !strcmp(t->kind, "slow");
        for (size_t j = 0; router && j < t->size; j++) {
            m->memory[WEIGHTS][t->offset + j] = j % W ? 0 : (real)(size * (1 + 0.001 * (double)(j / W)));
        }
    }
    store_weights(d, m);
    random_tokens(tokens, N, c.vocab, 1);
    CHECK(cudaMemcpy(d->tokens, tokens, (size_t)N * sizeof(int), cudaMemcpyHostToDevice));
    clear_statistics(m);
    gpu::clear_statistics(d);
    m->batch = make_batch(tokens, NULL, c.batch, c.seq, TRAIN_MODE, 1, 1, 0);
    d->batch = m->batch;
    d->decided = twin;
    for (int l = 0; l < c.layers; l++) {
        if (!is_moe(&c, l)) {
            continue;
        }
        RouterInput in = router_input(d, m, l, n, (uint64_t)l);
        moe_forward(m, l, out, in.x, n, T);
        twin[l] = layer_plan(m, l);
        route_on_device(d, l, &in, n, T);
        const Route *r = &m->acts.layer[l].route, *there = &d->acts.layer[l].route;
        size_t choices = (size_t)n * r->K;
        assert_device_finite("weight", there->weight, choices);
        double *single = take_back(gpu::layer_stats(d, l) + 4 * E, gpu::SINGLE_STATS);
        assert_near(single[gpu::AUX], r->aux, 1e-2);
        assert_near(single[gpu::ENTROPY], m->stats[l].entropy, 1e-2);
        real *dweight = take_normal(choices, 5), *dx_d = on_the_device(out, (size_t)n * C);
        if (in.fused) {
            const gpu::LayerActs *a = &d->layers[l];
            gpu::NormBack norm = {dx_d, d->dx_low, a->partial[1], a->mid, a->rstd2, d->params.layer[l].norm2};
            gpu::RouterBack back = {};
            back.dweight = on_the_device(dweight, choices);
            back.others = {on_the_device(out, (size_t)n * C), NULL, NULL, NULL, r->K};
            gpu::scratch_reset(d);
            gpu::losses_backward(d, l, NULL, (real *)back.dweight, NULL);
            gpu::fused_router_backward(d, l, norm, back);
            assert_device_finite("drouter", a->drouter, (size_t)E * C);
        } else {
            gpu::scratch_reset(d);
            gpu::route_backward(d, l, dx_d, on_the_device(dweight, choices), in.x_d);
        }
        assert_device_finite("dx", dx_d, (size_t)n * C);
    }
    gpu::model_free(d);
    model_free(m);
    free_device();
    free_taken();
}

void test_gpu_edge_routers(void **state) {
    (void)state;
    const char *const list[][2] = {
        {"deepseek-v3", "--bias-rate 0 --aux-weight 0.1"},
        {"mixtral", "--score sigmoid --z-weight 0"},
        {"mixtral", "--score sigmoid --balance cv2 --gate probability --z-weight 0"},
        {"mixtral", "--score sigmoid --balance unbiased --bias-rate 0.001 --z-weight 0"},
        {"history", "--score sigmoid"},
        {"threshold", "--score sigmoid --gate renormalized"},
        {"base", ""},
        {"quantile", ""},
        {"multirouter", ""},
        {"gshard", ""},
        {"deepseek-v2", ""},
        {"shazeer", ""},
        {"hierarchical", ""},
    };
    for (int i = 0; i < COUNT(list); i++) {
        if (has_kernels(list[i][0])) {
            check_gpu_edge_router(list[i][0], list[i][1], 200);
            check_gpu_edge_router(list[i][0], list[i][1], -1e4);
        }
    }
}

// Rows of zeros and of numbers whose squares are too large; gates far from 0; logits and scores far below 0.
void test_gpu_edge_layers(void **state) {
    (void)state;
    enum { C = 40, ROWS = 5, V = 50, W = 64, F = 16, T = 5, D = 8 };
    const double sizes[ROWS] = {0, 1, 1e30, 2e38, 3e19}, far[] = {-1e33, -1e33, 1e4, -1e4};
    real *x = take_reals(ROWS * C), *w = take_filled(C, 1), *found, *out = device_room<real>(ROWS * C);
    for (int i = 0; i < ROWS * C; i++) {
        x[i] = (real)(sizes[i / C] * (i % 2 ? 1 : -1));
    }
    gpu::Sum from = {on_the_device(x, ROWS * C), NULL, NULL, NULL, 0};
    gpu::rmsnorm_forward({NULL, NULL, out, device_room<real>(ROWS)}, from, on_the_device(w, C), ROWS, C, 1e-5);
    found = take_back(out, ROWS * C);
    for (int i = 0; i < ROWS * C; i++) {
        assert_near((double)found[i], sizes[i / C] > 0 ? i % 2 ? 1 : -1 : 0, 1e-4);
    }

    // Cross-entropy: all words are alike but one.
    real *logits = take_reals(4 * W), *nll = device_room<real>(4);
    int targets[4] = {3, 0, 3, 3};
    for (int i = 0; i < 4 * W; i++) {
        logits[i] = (real)(far[i / W] * (i % W == 3 ? 1 : 1.5));
    }
    gpu::cross_entropy(nll, device_room<gpu::floatX>(4 * W), on_the_device(logits, 4 * W), on_the_device(targets, 4), 4, V, W, 1);
    found = take_back(nll, 4);
    const double wanted[4] = {0, 0.5e33, 0.5e4 + log(V - 1), 0};
    for (int i = 0; i < 4; i++) {
        assert_near((double)found[i], wanted[i], 1e-5);
    }

    // Activations: far from 0 they are straight lines.
    const double gates[F] = {1e4, -1e4, 200, -200, 88, -88, 89, -89, 1e15, -1e15, 1000, -1000, 300, -300, 90, -90};
    gpu::floatX hidden[2 * F];
    for (int activation = SWIGLU; activation <= GELU; activation++) {
        int gated = is_gated(activation);
        for (int j = 0; j < F; j++) {
            hidden[j] = rounded((real)gates[j]);
            hidden[F + j] = rounded(1);
        }
        gpu::floatX *hidden_d = on_the_device(hidden, 2 * F), *act = device_room<gpu::floatX>(F);
        gpu::activation_forward(act, hidden_d, 1, F, activation);
        gpu::floatX *value = take_back(act, F), ones[F], *dhidden = device_room<gpu::floatX>(2 * F);
        for (int j = 0; j < F; j++) {
            assert_near((double)exact(value[j]), gates[j] > 0 ? (double)exact(hidden[j]) : 0, 1e-6);
            ones[j] = rounded(1);
        }
        gpu::activation_backward(dhidden, on_the_device(ones, F), hidden_d, 1, F, activation);
        value = take_back(dhidden, F * (1 + gated));
        for (int j = 0; j < F; j++) {
            assert_near((double)exact(value[j]), gates[j] > 0, 1e-6);
        }
    }

    // Attention: all scores lie far below 0, and the first key's is the highest.
    const double scales[] = {1e4, 1e15, 1e18};
    gpu::floatX qkv[T * 3 * D];
    real angles[T * D];
    for (int i = 0; i < T * D; i++) {
        angles[i] = i % 2 ? 0 : 1; // no turn
    }
    for (int i = 0; i < COUNT(scales); i++) {
        for (int j = 0; j < T * D; j++) {
            int t = j / D, at = t * 3 * D + j % D;
            qkv[at] = rounded((real)scales[i]);
            qkv[at + D] = rounded((real)(-scales[i] * (1 + t)));
            qkv[at + 2 * D] = rounded((real)(t + j % D));
        }
        gpu::floatX *answer = device_room<gpu::floatX>(T * D);
        gpu::attention_forward(answer, device_room<real>(T), on_the_device(qkv, T * 3 * D), on_the_device(angles, T * D), 1, T, 1, 1, D);
        gpu::floatX *value = take_back(answer, T * D);
        for (int j = 0; j < T * D; j++) {
            assert_near((double)exact(value[j]), j % D, 1e-5);
        }
    }
    free_device();
    free_taken();
}

// An infinite logit, or one that is no number, is not passed over. The emulator ends the program where NaN is made of numbers.
void run_gpu_infinite(void *arg) {
    real logits[8] = {1, 2, (real)INFINITY, 3, 1, 2, (real)NAN, 3};
    int score = *(int *)arg, first = score / 2 * 4;
    real *p = device_room<real>(4), *lse = device_room<real>(1);
    gpu::scores_forward(p, lse, on_the_device(logits + first, 4), 1, 4, score % 2 ? SIGMOID : SOFTMAX);
    real *found = take_back(p, 4);
    if (isnan(found[2])) {
        fprintf(stderr, "NaN is there");
        _exit(1);
    }
}

void test_gpu_infinite_logits(void **state) {
    (void)state;
#ifndef CUDACPU // a process that has used a GPU cannot fork
    skip();
#endif
    for (int i = 0; i < 4; i++) {
        char message[8192];
        int status = dies(run_gpu_infinite, &i, message, sizeof(message));
        assert_true(status != 0);
        assert_true(strstr(message, "NaN is there") || strstr(message, "invalid number"));
    }
}

// What was not finite first is found among the device's weights and gradients, too.
void run_gpu_step(void *arg) {
    Run run;
    memset(&run, 0, sizeof(run));
    run.config = device_config("mixtral");
    run.backend = &gpu::backend;
    strcpy(run.out, "runs/case");
    Model *m = run.model = gpu::model_allocate(&run.config, run.config.batch * run.config.seq, 1, NULL);
    gpu::model_init(m, NULL);
    int what = *(int *)arg, tensor = find_tensor(m, 1, what == GRADS ? "w_out" : "qkv");
    real *numbers = allocate_tensor(m);
    run.backend->read(m, what, tensor, numbers);
    numbers[2 * 32 + 5] = (real)-INFINITY;
    run.backend->write(m, what, tensor, numbers);
    run.backend->update(m, 1, 0.01);
    double loss, aux, norm;
    run.backend->losses(m, &loss, &aux, &norm);
    check_step(&run, 9, what == GRADS ? 5 : (double)NAN, aux, norm);
}

void test_gpu_what_was_first(void **state) {
    (void)state;
#ifndef CUDACPU // a process that has used a GPU cannot fork
    skip();
#endif
    const char *const texts[] = {
        "step 9: the loss is nan, the balance losses 0 and the gradient's norm 0; training stops here, and the last checkpoint in "
        "runs/case is as it was. The weight layer1.qkv[2,5] is -inf (1 of 2048 there are not finite): an earlier step's update ",
        "step 9: the loss is 5, the balance losses 0 and the gradient's norm inf; training stops here, and the last checkpoint in "
        "runs/case is as it was. Searching the gradients from the last layer to the first, the first one that is not finite: layer1.w_out[0,4,5] is -inf (1 of "
        "2048 there are not finite); all weights are finite (the largest, in layer0.norm1, is 1); a lower --lr"};
    for (int what = WEIGHTS; what <= GRADS; what++) {
        char message[8192];
        int status = dies(run_gpu_step, &what, message, sizeof(message));
        if (status != 1 || !strstr(message, texts[what])) {
            fail_msg("exit status %d; it said:\n%s", status, message);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gpu_scores),
        cmocka_unit_test(test_gpu_gru),
        cmocka_unit_test(test_gpu_select),
        cmocka_unit_test(test_gpu_select_nan),
        cmocka_unit_test(test_gpu_select_by_experts),
        cmocka_unit_test(test_gpu_select_balanced),
        cmocka_unit_test(test_gpu_weights),
        cmocka_unit_test(test_gpu_levels),
        cmocka_unit_test(test_gpu_capacity),
        cmocka_unit_test(test_gpu_sort),
        cmocka_unit_test(test_gpu_balance),
        cmocka_unit_test(test_gpu_smooth_load),
        cmocka_unit_test(test_gpu_routers),
        cmocka_unit_test(test_gpu_edge_scores),
        cmocka_unit_test(test_gpu_edge_routers),
        cmocka_unit_test(test_gpu_edge_layers),
        cmocka_unit_test(test_gpu_infinite_logits),
        cmocka_unit_test(test_gpu_what_was_first),
    };
    begin_tests();
    return cmocka_run_group_tests_name("cuda_routers", tests, NULL, scratch_done);
}
