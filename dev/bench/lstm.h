// The benchmark of the LSTM: a layer's forward and backward pass, its share of the peak, and PyTorch's nn.LSTM by turns.
// Gives: bench_lstm. Needs: the things, the turns and the yardsticks of dev/bench/bench.c, which includes it.
#pragma once

typedef struct LstmLayer {
    int B, T, C, M;
    LstmWeights w, dw;
    LstmActs a;
    real *x, *g, *out, *dx, *dz, *dr;
} LstmLayer;

LstmWeights random_lstm(int C, int M) {
    LstmWeights w = {random_reals((size_t)4 * M * C), random_reals((size_t)4 * M * C), random_reals((size_t)4 * M),
                     M == C ? NULL : random_reals((size_t)C * M)};
    real *const list[] = {w.in, w.state, w.proj};
    for (int i = 0; i < (M == C ? 2 : 3); i++) {
        size_t n = i < 2 ? (size_t)4 * M * C : (size_t)C * M;
        for (size_t j = 0; j < n; j++)
            list[i][j] *= (real)(2 / sqrt(C)); // nearly as nn.LSTM begins
    }
    return w;
}

LstmLayer random_lstm_layer(int B, int T, int C, int M) {
    size_t N = (size_t)B * T;
    LstmLayer l = {B, T, C, M, random_lstm(C, M), random_lstm(C, M), {0}, random_reals(N * C), random_reals(N * C),
                   random_reals(N * C), random_reals(N * C), random_reals(N * 4 * M), random_reals(N * C)};
    LstmActs a = {random_reals(N * 4 * M), random_reals(N * M), random_reals(N * C), random_reals(N * M)};
    l.a = a;
    return l;
}

void free_lstm_layer(LstmLayer *l) {
    real *const list[] = {l->w.in, l->w.state, l->w.bias, l->w.proj, l->dw.in, l->dw.state, l->dw.bias, l->dw.proj, l->a.gates,
                          l->a.cell, l->a.before, l->a.hidden, l->x, l->g, l->out, l->dx, l->dz, l->dr};
    for (int i = 0; i < COUNT(list); i++)
        free(list[i]);
}

CALL(call_lstm_forward, LstmLayer, lstm_forward(a->out, &a->a, a->x, &a->w, a->B, a->T, a->C, a->M, a->C))
CALL(call_lstm_backward, LstmLayer,
     lstm_backward(a->dx, &a->dw, a->dz, a->dr, a->g, &a->a, a->x, &a->w, a->B, a->T, a->C, a->M, a->C))

// A pass both ways, as PyTorch's answer is one: seconds.
double lstm_both_ways(LstmLayer *l) {
    double start = seconds();
    call_lstm_forward(l);
    call_lstm_backward(l);
    return seconds() - start;
}

void bench_lstm_layer(int B, int T, int C, int M) {
    LstmLayer l = random_lstm_layer(B, T, C, M);
    double work = 2.0 * B * T * (8.0 * M * C + (M == C ? 0 : (double)M * C));
    Thing t[] = {peak, {call_lstm_forward, &l, work, {0}}, {call_lstm_backward, &l, 2 * work, {0}}};
    int n = take_turns(t, 3, budget(2));
    for (int k = 1; k < 3; k++)
        printf("  %-8s %2d x %4d, width %4d, cell %4d, %d thread%s  %7.1f GFLOP/s  %3.0f%% of peak\n", k == 1 ? "forward" : "backward",
               B, T, C, M, thread_count(), thread_count() > 1 ? "s" : " ", median(t[k].rate, NULL, n) / 1e9,
               100 * median(t[k].rate, t[0].rate, n));

    // PyTorch, a pass of ours and one of theirs by turns.
    char python[512], options[128];
    snprintf(python, sizeof(python), "%s dev/bench/torch_lstm.py", getenv("TORCH_PYTHON") ? getenv("TORCH_PYTHON") : "python3");
    snprintf(options, sizeof(options), "--dim %d --cell %d --seq %d --batch %d", C, M, T, B);
    static Yardstick y;
    memset(&y, 0, sizeof(y));
    if (start_yardstick(&y, NULL, python, options)) {
        double ours[MAX_ROUNDS];
        int round = 0;
        for (double begin = seconds(); round < 3 || (round < MAX_ROUNDS && seconds() - begin < budget(4)); round++) {
            ours[round] = 3 * work / lstm_both_ways(&l) / 1e9;
            rest();
            if (write(y.asks, "\n", 1) != 1 || fscanf(y.answers, "%lf", &y.rate[round]) != 1)
                fail("%s ended", y.name);
        }
        printf("  both ways: ours %.1f ms, %s %.1f ms; ours is %.2f times as fast\n", 3 * work / median(ours, NULL, round) / 1e6,
               y.name, 3 * work / median(y.rate, NULL, round) / 1e6, median(ours, y.rate, round));
    }
    close(y.asks);
    if (y.answers)
        pclose(y.answers);
    free_lstm_layer(&l);
    fflush(stdout);
}

void bench_lstm(void) {
    const int sizes[][4] = {{8, 256, 128, 128}, {8, 256, 512, 512}, {8, 256, 256, 1024}};
    int threads = thread_count();
    printf("\nan LSTM: sequences x tokens; backward counted as twice forward\n");
    for (int i = 0; i < COUNT(sizes); i++) {
        for (int used = threads; used > 0; used = used > 1 ? 1 : 0) {
            use(used);
            bench_lstm_layer(sizes[i][0], sizes[i][1], sizes[i][2], sizes[i][3]);
        }
        use(threads);
    }
}
