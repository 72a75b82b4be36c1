// The router on the device: each function beside its C twin, on the same random numbers, and then whole layers. The numbers
// are new in each run (SEED=number repeats one).

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
        if (found[i] != wanted[i])
            fail_msg("%s[%zu] of %zu is %.9g, not %.9g", what, i, n, (double)found[i], (double)wanted[i]);
    }
}

const double CLOSE = 1e-6;
const int expert_counts[] = {1, 2, 3, 4, 7, 8, 31, 32, 33, 64, 100, 300};

// Scores: with ties among them, or without.
real *draw_scores(uint64_t *random, int N, int E) {
    *random = hash64(*random);
    if (*random % 3 == 0)
        return take_scores(N, E, *random);
    real *p = take_normal((size_t)N * E, *random);
    for (int i = 0; i < N * E && *random % 3 == 1; i++)
        p[i] = (real)(1 / (1 + exp(-(double)p[i])));
    return p;
}

int draw_experts(uint64_t *random) {
    return pick(random, expert_counts, (int)(sizeof(expert_counts) / sizeof(int)));
}

void draw_choices(uint64_t *random, int *expert, int N, int E, int K, double none) { // different ones of a token
    for (int i = 0; i < N * K; i++) {
        int again = 1;
        while (again) {
            expert[i] = draw(random, 0, E - 1);
            again = 0;
            for (int j = i / K * K; j < i; j++)
                again |= expert[j] == expert[i];
        }
    }
    for (int i = 0; i < N * K; i++)
        expert[i] = random_uniform(*random, (uint64_t)i) < none ? -1 : expert[i];
}

// A gate with arrays on the host, and the same with their copies.
Gate draw_gate(uint64_t *random, int N, int per, int E, int K, int column, Gate *device) {
    size_t rows = (size_t)N * per;
    Gate g = {per,
              E,
              K,
              column,
              draw_scores(random, N * per, E),
              take_normal(rows, *random + 1),
              take_normal(rows * K, *random + 2),
              take_ints(rows * K)};
    for (size_t i = 0; i < rows * E; i++)
        g.p[i] = (real)(fabs((double)g.p[i]) + 0.01);
    draw_choices(random, g.expert, (int)rows, E, K, 0);
    *device = g;
    device->p = on_the_device(g.p, rows * E);
    device->lse = on_the_device(g.lse, rows);
    device->weight = on_the_device(g.weight, rows * K);
    device->expert = on_the_device(g.expert, rows * K);
    return g;
}

void test_gpu_scores(void **state) {
    (void)state;
    uint64_t random = fresh();
    for (int round = 0; round < 40; round++) {
        int N = draw(&random, 1, 70), E = draw_experts(&random), per = draw(&random, 1, 3),
            column = draw(&random, 0, 1) * 3;
        int W = column + per * E, score = draw(&random, SOFTMAX, SIGMOID), train = draw(&random, 0, 1);
        size_t NW = (size_t)N * W, rows = (size_t)N * per;
        real *logits = take_normal(2 * NW, random), *noisy = take_reals(NW), *jittered = take_reals(NW);
        for (size_t i = 0; i < 2 * NW; i++)
            logits[i] *= round % 4 ? 3 : 30;
        real *logits_d = on_the_device(logits, 2 * NW), *noisy_d = device_room<real>(NW),
             *jittered_d = device_room<real>(NW);
        Model *m = bare_model(random); // has but seed and step, and so its random numbers
        m->config.jitter = 0.3;
        m->acts.layer->route.N = N;
        m->experts.C = W;
        m->batch.first_token = 17;
        apply_jitter(m, 0, jittered, logits);
        gpu::apply_jitter(jittered_d, logits_d, NW, 0.3, stream_of(m, RANDOM_JITTER), 17);
        assert_device_alike("jittered", jittered_d, jittered, NW, CLOSE);
        m->batch.mode = train ? TRAIN_MODE : EVAL_MODE;
        m->batch.first_token = 5;
        noise_forward(m, 0, noisy, logits, N, W);
        gpu::noise_forward(noisy_d, logits_d, N, W, train, stream_of(m, RANDOM_NOISE), 5);
        assert_device_alike("noisy", noisy_d, noisy, NW, CLOSE);
        Gate gd, g = draw_gate(&random, N, per, E, 1, column, &gd);
        gd.p = device_room<real>(rows * E);
        gd.lse = score == SOFTMAX ? device_room<real>(rows) : gd.lse;
        ::scores_forward(&g, noisy, N, W, score);
        gpu::scores_forward(&gd, on_the_device(noisy, NW), N, W, score);
        assert_device_alike("p", gd.p, g.p, rows * E, CLOSE);
        assert_device_alike("lse", gd.lse, g.lse, rows, CLOSE);
        real *dp = take_normal(rows * E, random + 7), *dnoisy = take_normal(NW, random + 8),
             *dlogits = take_normal(2 * NW, random + 9);
        real *dnoisy_d = on_the_device(dnoisy, NW), *dlogits_d = on_the_device(dlogits, 2 * NW);
        double z = draw(&random, 0, 1) * 0.1;
        ::scores_backward(dnoisy, dp, &g, N, W, score, z);
        gpu::scores_backward(dnoisy_d, on_the_device(dp, rows * E), &gd, N, W, score, z);
        assert_device_alike("dnoisy", dnoisy_d, dnoisy, NW, CLOSE);
        noise_backward(m, 0, dlogits, dnoisy, logits, N, W);
        gpu::noise_backward(dlogits_d, dnoisy_d, logits_d, N, W, train, stream_of(m, RANDOM_NOISE), 5);
        assert_device_alike("dlogits", dlogits_d, dlogits, 2 * NW, CLOSE);
        free_device();
        free_taken();
    }
}

void test_gpu_gru(void **state) {
    (void)state;
    uint64_t random = fresh();
    for (int round = 0; round < 12; round++) {
        int N = draw(&random, 1, 300), R = draw(&random, 1, 40), first = draw(&random, 0, 1);
        size_t size = (size_t)N * R, square = (size_t)3 * R * R;
        real *x = take_normal(size, random + 1), *h = first ? NULL : take_normal(size, random + 2),
             *W_x = take_normal(square, random + 3), *W_h = take_normal(square, random + 4),
             *b_x = take_normal(3 * R, random + 5), *b_h = take_normal(3 * R, random + 6),
             *dnext = take_normal(size, random + 7), *next = take_reals(size), *keep = take_reals(4 * size),
             *dx = take_reals(size), *dh = take_reals(size),
             *dW_x = take_normal(square, random + 8), *dW_h = take_normal(square, random + 9),
             *db_x = take_normal(3 * R, random + 10), *db_h = take_normal(3 * R, random + 11);
        for (size_t i = 0; i < square; i++) {
            W_x[i] *= (real)0.3;
            W_h[i] *= (real)0.3;
        }
        real *x_d = on_the_device(x, size), *h_d = first ? NULL : on_the_device(h, size),
             *W_x_d = on_the_device(W_x, square), *W_h_d = on_the_device(W_h, square),
             *next_d = device_room<real>(size), *keep_d = device_room<real>(4 * size),
             *room_d = device_room<real>(6 * size), *dx_d = device_room<real>(size), *dh_d = on_the_device(dh, size),
             *dW_x_d = on_the_device(dW_x, square), *dW_h_d = on_the_device(dW_h, square),
             *db_x_d = on_the_device(db_x, 3 * R), *db_h_d = on_the_device(db_h, 3 * R);
        Tensor list[4];
        Gru w = {W_x, W_h, b_x, b_h}, dw = {dW_x, dW_h, db_x, db_h};
        Model *m = gru_model(&w, &dw, R, list);
        gru_forward(m, next, keep, x, h, N, R);
        gpu::gru_forward(next_d, keep_d, x_d, h_d, W_x_d, W_h_d, on_the_device(b_x, 3 * R), on_the_device(b_h, 3 * R),
                         N, R, room_d);
        assert_device_alike("next", next_d, next, size, CLOSE);
        assert_device_alike("keep", keep_d, keep, 4 * size, CLOSE);
        real *dstate = take_reals(size);
        memcpy(dstate, dnext, size * sizeof(real));
        gru_backward(m, dx, dstate, keep, x, h, N, R);
        dh = first ? dh : dstate; // without an h there is no gradient by it
        dW_x = layer_tensor(m, -1, "gru_x", GRADS);
        dW_h = layer_tensor(m, -1, "gru_h", GRADS);
        db_x = layer_tensor(m, -1, "gru_bx", GRADS);
        db_h = layer_tensor(m, -1, "gru_bh", GRADS);
        gpu::gru_backward(dx_d, dh_d, dW_x_d, dW_h_d, db_x_d, db_h_d, on_the_device(dnext, size), keep_d, x_d, h_d,
                          W_x_d, W_h_d, N, R, room_d, device_room<double>((size_t)div_up(N, CHUNK) * 3 * R));
        assert_device_alike("dx", dx_d, dx, size, CLOSE);
        assert_device_alike("dh", dh_d, dh, size, CLOSE);
        assert_device_alike("dW_x", dW_x_d, dW_x, square, CLOSE);
        assert_device_alike("dW_h", dW_h_d, dW_h, square, CLOSE);
        assert_device_alike("db_x", db_x_d, db_x, 3 * R, CLOSE);
        assert_device_alike("db_h", db_h_d, db_h, 3 * R, CLOSE);
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
            for (size_t i = 0; i < NE; i += 3) // 0 and -0 are equal, -infinity is below all
                p[i] = i % 2 ? 0 : i % 4 ? (real)-0.0 : (real)-INFINITY;
            p_d = on_the_device(p, NE);
        }
        int *expert = take_ints(NK), *expert_d = device_room<int>(NK);
        select_topk(expert, p, N, E, K);
        gpu::select_topk(expert_d, p_d, N, E, K);
        assert_device_same("expert", expert_d, expert, NK);
        for (int e = 0; e < E; e++)
            level[e] = p[draw(&random, 0, N * E - 1)];
        int levels = draw(&random, 0, 1), keep_best = draw(&random, 0, 1);
        select_above(expert, p, N, E, K, levels ? level : NULL, (double)level[0], keep_best);
        gpu::select_above(expert_d, p_d, N, E, K, levels ? on_the_device(level, E) : NULL, (double)level[0], keep_best);
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
            if (!draw(&random, 0, round % 4))
                memcpy(&p[i], &bits[draw(&random, 0, 3)], sizeof(p[i]));
        }
        real *p_d = on_the_device(p, (size_t)N * E), *of_group = device_room<real>(E);
        int *expert_d = device_room<int>((size_t)N * E);
        double *lowest = on_the_device((double *)take(E, sizeof(double)), E);
        for (int by_experts = 0; by_experts < 2; by_experts++) {
            int total = 0;
            if (by_experts)
                gpu::select_by_experts(expert_d, lowest, p_d, N, E, take_each, 1,
                                       device_room<unsigned char>((size_t)N * E), of_group);
            else
                gpu::select_topk(expert_d, p_d, N, E, E);
            int *expert = take_back(expert_d, (size_t)N * E), *seen = take_ints((size_t)N * E);
            for (int i = 0; i < N * E; i++) {
                if (expert[i] < 0)
                    continue;
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
        for (int e = 0; e < E; e++)
            lowest[e] = e;
        double *lowest_d = on_the_device(lowest, E), passes = 0;
        Lowest low = {lowest, &passes, take_each};
        for (int group = 0; group < groups; group++)
            select_by_experts(expert + (size_t)group * n * E, p + (size_t)group * n * E, n, E, &low);
        assert_true(passes == groups);
        gpu::select_by_experts(expert_d, lowest_d, on_the_device(p, NE), n, E, take_each, groups,
                               device_room<unsigned char>(NE), device_room<real>((size_t)groups * E));
        assert_device_same("expert", expert_d, expert, NE);
        assert_device_same("lowest", lowest_d, lowest, E);
        free_device();
        free_taken();
    }
}

gpu::Balancer device_balancer(int n, int E, int groups) {
    size_t rooms = (size_t)gpu::balancers(E, groups), EE = rooms * E * E;
    gpu::Balancer room = {device_room<gpu::Rank>(EE), device_room<int>(EE), device_room<int>(rooms * E),
                          device_room<int>(rooms * n)};
    return room;
}

void test_gpu_select_balanced(void **state) {
    (void)state;
    uint64_t random = fresh();
    for (int round = 0; round < 30; round++) {
        int n = draw(&random, 1, 40), groups = draw(&random, 1, 3), E = pick(&random, expert_counts, 9), N = n * groups;
        real *score = draw_scores(&random, N, E);
        for (int i = 0; i < N * E && round % 3 == 0; i += E)
            score[i] += 1; // all want the same
        int *expert = take_ints(N), *expert_d = device_room<int>(N);
        for (int group = 0; group < groups; group++)
            select_balanced(expert + (size_t)group * n, score + (size_t)group * n * E, n, E, NULL);
        gpu::select_balanced(expert_d, on_the_device(score, (size_t)N * E), n, E, groups,
                             device_balancer(n, E, groups));
        assert_device_same("expert", expert_d, expert, N);
        free_device();
        free_taken();
    }
}

void test_gpu_gate(void **state) {
    (void)state;
    uint64_t random = fresh();
    for (int round = 0; round < 40; round++) {
        int N = draw(&random, 1, 60), E = draw_experts(&random),
            K = draw(&random, 0, 2) ? draw(&random, 1, min_int(E, 6)) : E;
        int gate = draw(&random, PROBABILITY, RENORMALIZED);
        size_t NK = (size_t)N * K, NE = (size_t)N * E;
        Gate gd, g = draw_gate(&random, N, 1, E, K, 0, &gd);
        draw_choices(&random, g.expert, N, E, K, 0.3);
        for (int n = 0; n < N; n++) // of a token, one at least
            g.expert[n * K] = g.expert[n * K] < 0 ? 0 : g.expert[n * K];
        for (int i = 0; i < N * K; i++)
            g.expert[i] = i % K && g.expert[i] == g.expert[i / K * K] ? -1 : g.expert[i];
        gd.expert = on_the_device(g.expert, NK);
        gd.weight = device_room<real>(NK);
        weights_forward(g.weight, g.p, g.expert, N, E, K, gate, 1.7);
        gpu::gate_forward(gd.weight, gd.p, gd.expert, N, E, K, gate, 1.7);
        assert_device_alike("weight", gd.weight, g.weight, NK, CLOSE);
        real *dweight = take_normal(NK, random), *dp = take_normal(NE, random + 1), *dp_d = on_the_device(dp, NE);
        weights_backward(dp, dweight, g.weight, g.p, g.expert, N, E, K, gate, 1.7);
        gpu::gate_backward(dp_d, on_the_device(dweight, NK), gd.weight, gd.p, gd.expert, N, E, K, gate, 1.7);
        assert_device_alike("dp", dp_d, dp, NE, CLOSE);

        int D = draw(&random, 1, 40), M = draw(&random, 1, min_int(D, 5)), inner = draw(&random, 1, 9),
            each = draw(&random, 1, inner);
        Gate outer_d, outer = draw_gate(&random, N, 1, D, M, 0, &outer_d), in_d,
                      in = draw_gate(&random, N, D, inner, each, D, &in_d);
        size_t NM = (size_t)N * M, NMe = NM * each, NDe = (size_t)N * D * each;
        int *expert = take_ints(NMe), *expert_d = device_room<int>(NMe);
        real *weight = take_reals(NMe), *weight_d = device_room<real>(NMe), *dgroups = take_reals(NM),
             *dinner = take_reals(NDe), *dgroups_d = device_room<real>(NM), *dinner_d = device_room<real>(NDe),
             *dout = take_normal(NMe, random + 2);
        ::join_gates_forward(expert, weight, &outer, &in, N);
        gpu::join_gates_forward(expert_d, weight_d, &outer_d, &in_d, N);
        assert_device_same("joined expert", expert_d, expert, NMe);
        assert_device_same("joined weight", weight_d, weight, NMe);
        ::join_gates_backward(dgroups, dinner, dout, &outer, &in, N);
        gpu::join_gates_backward(dgroups_d, dinner_d, on_the_device(dout, NMe), &outer_d, &in_d, N);
        assert_device_alike("dgroups", dgroups_d, dgroups, NM, CLOSE);
        assert_device_alike("dinner", dinner_d, dinner, NDe, CLOSE);
        free_device();
        free_taken();
    }
}

Plan device_plan(const Plan *plan) { // expert and key are copied, the rest is poison
    size_t choices = (size_t)plan->N * plan->K;
    Plan p = *plan;
    p.expert = on_the_device(plan->expert, choices);
    p.key = on_the_device(plan->key, choices);
    p.slot = device_room<int>(choices);
    p.choice = device_room<int>(choices);
    p.token = device_room<int>(choices);
    p.offset = device_room<int>(plan->E + 1);
    return p;
}

void check_gpu_sort(Plan *plan, Plan *device) {
    size_t choices = (size_t)plan->N * plan->K;
    ::plan_sort(plan);
    gpu::plan_sort(device, device_room<int>(gpu::sort_room(choices, plan->E)));
    assert_device_same("offset", device->offset, plan->offset, plan->E + 1);
    assert_device_same("slot", device->slot, plan->slot, choices);
    assert_device_same("choice", device->choice, plan->choice, plan->offset[plan->E]);
    assert_device_same("token", device->token, plan->token, plan->offset[plan->E]);
}

void test_gpu_plan(void **state) {
    (void)state;
    uint64_t random = fresh();
    for (int round = 0; round < 60; round++) {
        int tokens = draw(&random, 1, round % 6 ? 20 : 700), groups = draw(&random, 1, 3), N = tokens * groups;
        int E = draw_experts(&random), K = draw(&random, 1, min_int(E, round % 6 ? 6 : 3)),
            order = draw(&random, BY_CHOICE, BY_TOKEN);
        int grouped = draw(&random, 0, 1), spared = draw(&random, 0, 1),
            next = !grouped && order != BY_SCORE && draw(&random, 0, 1);
        int units = grouped ? draw(&random, 1, E) : E, favourites = draw(&random, K, E);
        size_t choices = (size_t)N * K;
        Plan plan = take_plan(N, E, K);
        draw_choices(&random, plan.expert, N, favourites, K, 0); // so that some experts have none
        memcpy(plan.key, plan.expert, choices * sizeof(int));
        real *weight = draw_scores(&random, N, K), *p = draw_scores(&random, N, E);
        unsigned char *exempt = (unsigned char *)take(N, 1);
        for (int n = 0; n < N; n++)
            exempt[n] = !draw(&random, 0, 3);
        for (size_t i = 0; i < choices; i++)
            plan.key[i] = draw(&random, 0, 9) ? plan.key[i] : -1; // declined before
        if (K == 2) {
            Plan d = device_plan(&plan);
            Model *m = bare_model(random);
            m->batch.first_token = 11;
            decline_second(m, plan.key, weight, N, 0.7, 1.3);
            gpu::decline_second(d.key, on_the_device(weight, choices), N, 0.7, 1.3, stream_of(m, RANDOM_SECOND), 11);
            assert_device_same("declined", d.key, plan.key, choices);
        }
        Plan device = device_plan(&plan);
        double factor = draw(&random, 0, 5) ? draw(&random, 1, 30) * 0.1 : 0;
        ::plan_capacity(&plan, tokens, factor, units, order, weight, spared ? exempt : NULL, next ? p : NULL);
        gpu::plan_capacity(&device, tokens, factor, units, order, on_the_device(weight, choices),
                           spared ? on_the_device(exempt, N) : NULL, next ? on_the_device(p, (size_t)N * E) : NULL);
        assert_device_same("expert", device.expert, plan.expert, choices);
        assert_device_same("key", device.key, plan.key, choices);
        check_gpu_sort(&plan, &device);
        free_device();
        free_taken();
    }
}

// More chunks than a warp has lanes, and empty experts.
void test_gpu_sort(void **state) {
    (void)state;
    uint64_t random = fresh();
    const int sizes[][3] = {{1, 1, 1}, {40000, 7, 1}, {3000, 300, 3}, {1024, 32, 1}, {1025, 1, 1}, {6, 4096, 5}};
    for (int i = 0; i < 6; i++) {
        Plan plan = take_plan(sizes[i][0], sizes[i][1], sizes[i][2]);
        for (int j = 0; j < plan.N * plan.K; j++) // the second half of the experts is hardly ever chosen
            plan.expert[j] = plan.key[j] = draw(&random, -1, draw(&random, 0, 500) ? (plan.E - 1) / 2 : plan.E - 1);
        Plan device = device_plan(&plan);
        check_gpu_sort(&plan, &device);
        free_device();
        free_taken();
    }
}

void test_gpu_balance(void **state) {
    (void)state;
    uint64_t random = fresh();
    for (int round = 0; round < 40; round++) {
        int tokens = draw(&random, 1, round % 5 ? 30 : 300), groups = draw(&random, 1, 4), n = tokens * groups,
            E = draw_experts(&random);
        int per = draw(&random, 1, 3), K = draw(&random, 1, min_int(E, 5)), first = draw(&random, 0, 1) ? 1 : K,
            rows = n * per;
        int D = draw(&random, 1, min_int(E, 40)), M = draw(&random, 1, D), tables = groups * per,
            score = draw(&random, SOFTMAX, SIGMOID);
        size_t size = (size_t)tables * E;
        Gate gd, g = draw_gate(&random, n, per, E, K, 0, &gd);
        draw_choices(&random, g.expert, rows, E, K, 0.2);
        g.expert[0] = max_int(g.expert[0], 0);
        gd.expert = on_the_device(g.expert, (size_t)rows * K);
        double *count = (double *)take(size, sizeof(double)), *slope = (double *)take(size, sizeof(double)),
               *count_d = device_room<double>(size);
        int *width = take_ints(E);
        for (int e = 0; e < E; e++)
            width[e] = draw(&random, 1, 9);
        for (size_t i = 0; i < size; i++)
            slope[i] = random_normal(random, i);
        double *slope_d = on_the_device(slope, size);
        count_choices(count, g.expert, rows, E, K, first, tokens * per, per);
        gpu::count_choices(count_d, gd.expert, rows, E, K, first, tokens * per, per);
        assert_device_same("count", count_d, count, size);
        for (int i = 0; i < tables; i++) {
            double total = 0;
            for (int e = 0; e < E; e++)
                total += count[(size_t)i * E + e];
            add_balance(slope + (size_t)i * E, count + (size_t)i * E, round % 2 ? width : NULL, E, 0.3);
            if (total > 0)
                add_device_balance(slope + (size_t)i * E, count + (size_t)i * E, E, D, 0.5);
        }
        gpu::add_balance(slope_d, count_d, round % 2 ? on_the_device(width, E) : NULL, E, 0.3, tables);
        gpu::add_device_balance(slope_d, count_d, E, D, 0.5, tables);
        for (int i = 0; i < groups && per == 1; i++)
            add_communication_balance(slope + (size_t)i * E, g.expert + (size_t)i * tokens * K, tokens, E, K, D, M,
                                      0.7);
        if (per == 1)
            gpu::add_communication_balance(slope_d, gd.expert, tokens, E, K, D, M, 0.7, tokens, groups,
                                           device_room<double>((size_t)groups * D));
        assert_device_alike("slope", slope_d, slope, size, 1e-12);
        double zero = 0, loss = ::balance_forward(&g, slope, rows, tokens * per, score),
               *loss_d = on_the_device(&zero, 1);
        gpu::balance_forward(loss_d, &gd, slope_d, rows, tokens * per, score, device_room<double>(rows));
        assert_device_alike("loss", loss_d, &loss, 1, 1e-11);
        real *dp = take_normal((size_t)rows * E, random), *dp_d = on_the_device(dp, (size_t)rows * E);
        ::balance_backward(dp, &g, slope, rows, tokens * per, score, 3);
        gpu::balance_backward(dp_d, &gd, slope_d, rows, tokens * per, score, 3);
        assert_device_alike("dp", dp_d, dp, (size_t)rows * E, CLOSE);

        double mean = draw(&random, 0, 1) * 2.5, *v = (double *)take(size, sizeof(double)),
               *losses = (double *)take(tables, sizeof(double)), *losses_d = device_room<double>(tables),
               *cv_slope_d = device_room<double>(size);
        for (size_t i = 0; i < size; i++)
            v[i] = 0.1 + random_uniform(random, i);
        for (int i = 0; i < tables; i++)
            losses[i] = cv_squared(v + (size_t)i * E, slope + (size_t)i * E, E, mean, 0.4);
        gpu::cv_squared(losses_d, on_the_device(v, size), cv_slope_d, E, mean, 0.4, tables);
        assert_device_alike("cv^2", losses_d, losses, tables, 1e-12);
        if (E > 1)
            assert_device_alike("cv^2's slope", cv_slope_d, slope, size, 1e-10);
        free_device();
        free_taken();
    }
}

void test_gpu_smooth_load(void **state) {
    (void)state;
    uint64_t random = fresh();
    for (int round = 0; round < 25; round++) {
        int tokens = draw(&random, 1, round % 5 ? 20 : 300), groups = draw(&random, 1, 3), N = tokens * groups,
            per = draw(&random, 1, 3);
        int E = max_int(2, draw_experts(&random) % 64), K = draw(&random, 1, min_int(E - 1, 5)),
            column = draw(&random, 0, 1) * 3;
        int W = column + per * E, gap = draw(&random, 0, 3), stride = per * E + gap;
        size_t NW = (size_t)N * W, rows = (size_t)N * per;
        Gate gd, g = draw_gate(&random, N, per, E, K, column, &gd);
        real *logits = take_normal(2 * NW, random), *noisy = take_normal(NW, random + 1),
             *p = take_reals((size_t)rows * E);
        for (size_t row = 0; row < rows; row++)
            memcpy(p + row * E, noisy + row / per * W + column + row % per * E, E * sizeof(real));
        select_topk(g.expert, p, (int)rows, E, K);
        gd.expert = on_the_device(g.expert, rows * K);
        unsigned char *live = (unsigned char *)take(rows, 1);
        for (size_t row = 0; row < rows; row++)
            live[row] = draw(&random, 0, 2) > 0;
        live = round % 2 ? live : NULL;
        unsigned char *live_d = live ? on_the_device(live, rows) : NULL;
        double *load = (double *)take((size_t)groups * per * E, sizeof(double)),
               *dload = (double *)take((size_t)groups * stride, sizeof(double));
        double *load_d = device_room<double>((size_t)groups * per * E),
               *scaled = (double *)take((size_t)groups * stride, sizeof(double));
        for (int i = 0; i < groups * stride; i++) {
            dload[i] = random_normal(random, (uint64_t)i);
            scaled[i] = 0.7 * dload[i];
        }
        real *dnoisy = take_normal(NW, random + 2), *dlogits = take_normal(2 * NW, random + 3),
             *dnoisy_d = on_the_device(dnoisy, NW), *dlogits_d = on_the_device(dlogits, 2 * NW),
             *noisy_d = on_the_device(noisy, NW), *logits_d = on_the_device(logits, 2 * NW);
        for (int i = 0; i < groups; i++) {
            ::smooth_load(load + (size_t)i * per * E, NULL, NULL, NULL, &g, noisy, logits, W, i * tokens, tokens, live);
            ::smooth_load(NULL, scaled + (size_t)i * stride, dnoisy, dlogits, &g, noisy, logits, W, i * tokens, tokens,
                        live);
        }
        gpu::smooth_load(load_d, NULL, 0, NULL, NULL, &gd, noisy_d, logits_d, W, groups, tokens, live_d, 1,
                         device_room<int>(rows), device_room<double>((size_t)groups * div_up(tokens, CHUNK) * per * E));
        gpu::smooth_load(NULL, on_the_device(dload, (size_t)groups * stride), stride, dnoisy_d, dlogits_d, &gd, noisy_d,
                         logits_d, W, groups, tokens, live_d, 0.7, NULL, NULL);
        assert_device_alike("load", load_d, load, (size_t)groups * per * E, 1e-12);
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
    {"mixtral",
     "--experts 33 --topk 5 --groups 7 --group-topk 3 --device-weight 0.3 --comm-weight 0.2 --group sequence"},
    {"mixtral", "--group step --device-weight 0.1 --groups 2"},
    {"shazeer", "--recurrent 5 --group sequence"},
    {"hierarchical", "--group sequence --balance variance"},
    {"multirouter", "--group sequence --capacity-factor 0.7 --z-weight 0.1"},
    {"threshold", "--max-active 3 --experts 40 --capacity-factor 0.5"},
    {"variance", "--group sequence"},
    {"deepseek-v3", "--groups 4 --group-topk 2 --topk 2 --group batch"},
    {"rmoe", "--jitter 0.1 --history-decay 0.9"},
    {"expert-choice", "--group sequence --experts 6 --topk 3"},
    {"base", "--group sequence"},
    {"mh-moe", "--group sequence --jitter 0.1 --capacity-factor 0.8"},
    {"switch", "--experts 64 --second-threshold 0"},
};

const int router_case_count = (int)(sizeof(router_cases) / sizeof(router_cases[0]));

void store_weights(gpu::Model *d, const Model *m) {
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        CHECK(cudaMemcpy(*gpu::weight_field(&d->weights, t), m->memory[WEIGHTS] + t->offset, t->size * sizeof(real),
                         cudaMemcpyHostToDevice));
        CHECK(cudaMemset(*gpu::weight_field(&d->grads, t), 0, t->size * sizeof(real)));
    }
}

// Whether the device chose as the C twin did, which a near-tie may prevent.
int same_plan(const gpu::Model *d, const Model *m, int l) {
    const Route *a = &m->acts.layer[l].route;
    const Plan *b = &d->layers[l].plan;
    size_t size = (size_t)a->N * a->K * sizeof(int);
    int same = a->N == b->N && !memcmp(take_back(b->expert, (size_t)a->N * a->K), a->expert, size) &&
               !memcmp(take_back(b->key, (size_t)a->N * a->K), a->served, size);
    if (m->config.balance == UNBIASED && m->batch.mode != EVAL_MODE) {
        int *unbiased = take_ints((size_t)a->N * a->K);
        select_topk(unbiased, a->p, a->N, a->E, a->K);
        same &= !memcmp(take_back(d->unbiased, (size_t)a->N * a->K), unbiased, size);
    }
    return same;
}

void compare_gates(const Gate *found, const Gate *wanted, int n, int has_p) {
    size_t rows = (size_t)n * wanted->per;
    assert_device_same("gate's expert", found->expert, wanted->expert, rows * wanted->K);
    assert_device_alike("gate's weight", found->weight, wanted->weight, rows * wanted->K, 1e-5);
    if (has_p)
        assert_device_alike("gate's p", found->p, wanted->p, rows * wanted->E, 1e-5);
}

void compare_stats(const gpu::Model *d, const Model *m, int l) {
    const Statistics *s = &m->stats[l];
    const Lowest *low = lowest_of(m, l);
    int E = m->config.experts;
    double *found = take_back(gpu::layer_stats(d, l), gpu::stats_size(&m->config)), *single = found + 4 * E;
    assert_alike("count", found, s->count, E, 0);
    assert_alike("lowest", found + E, low ? low->sum : (double *)take(E, sizeof(double)), E, 1e-5);
    assert_alike("recent", found + 2 * E, s->recent, E, 1e-12);
    for (int e = 0; e < E; e++)
        assert_true(found[3 * E + e] == s->idle[e]);
    assert_true(single[gpu::DROPPED] == s->dropped);
    assert_true(single[gpu::ACTIVE] == s->active);
    assert_true(single[gpu::TOKENS] == s->tokens);
    assert_true(single[gpu::PASSES] == (low ? *low->passes : 0));
    assert_near(single[gpu::ENTROPY], s->entropy, 1e-5);
}

// One micro-step of all layers with experts, on both sides. Returns 0 where the device chose otherwise.
int check_router_pass(gpu::Model *d, Model *m, uint64_t random, int decided) {
    const Config *c = &m->config;
    int h = c->subtokens, C = c->dim / h, n = m->max_tokens * h, T = c->seq * h;
    size_t nC = (size_t)n * C;
    real *xs[8], *xs_d[8], *out = take_reals(nC);
    gpu::LayerPlan *twin = (gpu::LayerPlan *)take(c->layers, sizeof(gpu::LayerPlan));
    d->batch = m->batch;
    d->decided = decided ? twin : NULL;
    for (int l = 0; l < c->layers; l++) {
        if (!is_moe(c, l))
            continue;
        const Route *r = &m->acts.layer[l].route;
        gpu::LayerState *g = &d->layers[l];
        xs[l] = take_normal(nC, random + (uint64_t)l);
        xs_d[l] = on_the_device(xs[l], nC);
        moe_forward(m, l, out, xs[l], n, T); // and the experts, of which nothing is asked here
        twin[l] = layer_plan(m, l);
        gpu::router_forward(d, l, g, xs_d[l], n, C, T);
        size_t nK = (size_t)n * r->K;
        if (!same_plan(d, m, l))
            return 0;
        Gate gate = expert_gate(m, l), groups = group_gate(m, l);
        compare_gates(&g->gate, &gate, n, c->select != HASH);
        if (c->select == HIERARCHICAL)
            compare_gates(&g->groups, &groups, n, 1);
        assert_device_alike("weight", g->weight, r->weight, nK, 1e-5);
        assert_device_same("offset", g->plan.offset, r->offset, r->E + 1);
        assert_device_same("slot", g->plan.slot, r->row, nK);
        assert_device_same("choice", g->plan.choice, r->choice, r->offset[r->E]);
        assert_device_same("token", g->plan.token, r->token, r->offset[r->E]);
        if (m->batch.mode != EVAL_MODE) {
            double aux = take_back(gpu::layer_stats(d, l) + 4 * c->experts, gpu::SINGLE_STATS)[gpu::AUX];
            assert_near(aux, r->aux, 1e-5);
        }
        compare_stats(d, m, l);
    }
    for (int l = c->layers - 1; m->batch.mode != EVAL_MODE && l >= 0; l--) {
        if (!is_moe(c, l))
            continue;
        size_t nK = (size_t)n * m->acts.layer[l].route.K;
        real *dweight = take_normal(nK, random + 100 + (uint64_t)l), *dx = take_normal(nC, random + 200 + (uint64_t)l);
        real *dx_d = on_the_device(dx, nC);
        CHECK(cudaMemcpy(d->dweight, dweight, nK * sizeof(real), cudaMemcpyHostToDevice));
        router_backward(m, l, dx, dweight, xs[l]);
        gpu::router_backward(d, l, &d->layers[l], dx_d, xs_d[l], n, C, T);
        assert_device_alike("dx", dx_d, dx, nC, 2e-5);
    }
    return 1;
}

void check_router(const char *recipe, const char *text, uint64_t random, int *otherwise) {
    Config c = small_config(recipe);
    char sizes[200];
    snprintf(sizes, sizeof(sizes), "--seq %d --batch %d", draw(&random, 1, 40), draw(&random, 1, 4));
    set_options(&c, text);
    set_options(&c, sizes);
    int N = c.batch * c.seq;
    if (!moe_layers(&c))
        return;
    for (int again = 1, decided = draw(&random, 0, 1); again; decided = 1) { // where it chose otherwise, as decided
        uint64_t pass = random;
        Model *m = model_allocate(&c, N, 1, NULL);
        gpu::Model *d = (gpu::Model *)gpu::model_allocate(&c, N, 1, NULL);
        int *tokens = take_ints(N), same = 1;
        randomize_weights(m);
        store_weights(d, m);
        random_tokens(tokens, N, c.vocab, random);
        CHECK(cudaMemcpy(d->tokens, tokens, (size_t)N * sizeof(int), cudaMemcpyHostToDevice));
        for (int step = 1; step < 3 && same; step++) {
            clear_statistics(m);
            gpu::clear_router_stats(d);
            for (int micro = 0; micro < 3 && same; micro++) { // two of training, and one more
                int mode = micro < 2 ? TRAIN_MODE : step == 1 ? CHECK_MODE : EVAL_MODE;
                m->batch = make_batch(tokens, NULL, c.batch, c.seq, mode, 0.5, step, micro * N);
                same = check_router_pass(d, m, hash64(pass++), decided);
            }
            if (!same)
                break;
            router_update(m);
            gpu::router_update(d);
            for (int l = 0; l < c.layers; l++) {
                if (is_moe(&c, l))
                    compare_stats(d, m, l);
            }
            for (int i = 0; i < m->tensor_count; i++) {
                const Tensor *t = &m->tensors[i];
                if (!strcmp(t->kind, "router") || !strcmp(t->kind, "project") || !strncmp(t->kind, "gru", 3))
                    assert_device_alike(t->name, *gpu::weight_field(&d->grads, t), m->memory[GRADS] + t->offset, t->size, 2e-5);
                if (!t->trained)
                    assert_device_alike(t->name, *gpu::weight_field(&d->weights, t), m->memory[WEIGHTS] + t->offset, t->size, 1e-6);
            }
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
        if (has_kernels(recipes[i].name))
            check_router(recipes[i].name, "", random = hash64(random), &otherwise);
    }
    for (int i = 0; i < router_case_count; i++)
        check_router(router_cases[i].recipe, router_cases[i].options, random = hash64(random), &otherwise);
    assert_true(otherwise <= 2);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gpu_scores),
        cmocka_unit_test(test_gpu_gru),
        cmocka_unit_test(test_gpu_select),
        cmocka_unit_test(test_gpu_select_nan),
        cmocka_unit_test(test_gpu_select_by_experts),
        cmocka_unit_test(test_gpu_select_balanced),
        cmocka_unit_test(test_gpu_gate),
        cmocka_unit_test(test_gpu_plan),
        cmocka_unit_test(test_gpu_sort),
        cmocka_unit_test(test_gpu_balance),
        cmocka_unit_test(test_gpu_smooth_load),
        cmocka_unit_test(test_gpu_routers),
    };
    begin_tests();
    return cmocka_run_group_tests_name("cuda_routers", tests, NULL, scratch_done);
}
