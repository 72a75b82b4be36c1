// The layers on the device against their C twins, on numbers that are new in each run (SEED=number repeats one).

#include "dev/test/cuda_twin.h"

uint64_t layers_draw; // moves on with each draw
#define EXACT   1e-5                                     // what is float32 in both builds
#define ROUNDED (sizeof(gpu::floatX) == 4 ? 1e-5 : 2e-2) // what the tensor cores multiply, and makes of it

float low_number(float x) {
    return x;
}

float low_number(__nv_bfloat16 x) {
    return __bfloat162float(x);
}

void set_low_number(float *to, real x) {
    *to = x;
}

void set_low_number(__nv_bfloat16 *to, real x) {
    *to = __float2bfloat16(x);
}

// x (n), which is rounded here too, as floatX on the device.
gpu::floatX *device_low(real *x, size_t n) {
    gpu::floatX *low = (gpu::floatX *)take(n, sizeof(gpu::floatX));
    for (size_t i = 0; i < n; i++) {
        set_low_number(&low[i], x[i]);
        x[i] = low_number(low[i]);
    }
    return (gpu::floatX *)device_copy(low, n * sizeof(gpu::floatX));
}

real *fetch_low(const gpu::floatX *x, size_t n) {
    gpu::floatX *low = (gpu::floatX *)take(n, sizeof(gpu::floatX));
    real *high = take_reals(n);
    fetch(low, x, n * sizeof(gpu::floatX));
    for (size_t i = 0; i < n; i++)
        high[i] = low_number(low[i]);
    return high;
}

float *device_reals(const real *x, size_t n) {
    return (float *)device_copy(x, n * sizeof(float));
}

real *fetch_reals(const float *x, size_t n) {
    real *to = take_reals(n);
    fetch(to, x, n * sizeof(float));
    return to;
}

void *device_poison(size_t bytes) { // NaN, whatever it is read as
    void *poison = take(bytes, 1);
    memset(poison, 0xff, bytes);
    return device_copy(poison, bytes);
}

real *draw_normal(size_t n) {
    layers_draw = hash64(layers_draw);
    return take_normal(n, layers_draw);
}

void end_layers(void) {
    free_device();
    free_taken();
}

void check_convert(size_t n) {
    real *x = draw_normal(n), *before = take_reals(n);
    memcpy(before, x, n * sizeof(real));
    float *high = device_reals(x, n), *back = (float *)device_poison(n * sizeof(float));
    gpu::floatX *low = (gpu::floatX *)device_poison(n * sizeof(gpu::floatX));
    device_low(x, n); // rounds x
    gpu::to_low(low, high, n);
    gpu::to_high(back, low, n);
    real *found = fetch_low(low, n), *again = fetch_reals(back, n);
    assert_memory_equal(found, x, n * sizeof(real));
    assert_memory_equal(again, x, n * sizeof(real));
    assert_alike("rounded", x, before, n, 4e-3);
    end_layers();
}

void check_gpu_rmsnorm(int N, int C) {
    size_t size = (size_t)N * C, parts = (size_t)div_up(N, CHUNK) * C;
    real *x = draw_normal(size), *w = draw_normal(C), *dout = draw_normal(size), *dx = draw_normal(size),
         *dw = draw_normal(C);
    real *out = take_reals(size), *rstd = take_reals(N);
    float *x_there = device_reals(x, size), *w_there = device_reals(w, C), *dout_there = device_reals(dout, size);
    float *dx_there = device_reals(dx, size), *dw_there = device_reals(dw, C);
    gpu::floatX *out_there = (gpu::floatX *)device_poison(size * sizeof(gpu::floatX));
    gpu::floatX *dx_low = (gpu::floatX *)device_poison(size * sizeof(gpu::floatX));
    float *out32 = (float *)device_poison(size * 4), *rstd_there = (float *)device_poison(N * 4);
    gpu::rmsnorm_forward(out_there, NULL, rstd_there, x_there, w_there, N, C, 1e-5);
    gpu::rmsnorm_forward(NULL, out32, rstd_there, x_there, w_there, N, C, 1e-5);
    gpu::rmsnorm_backward(dx_there, dx_low, dw_there, dout_there, x_there, rstd_there, w_there, N, C,
                          (float *)device_poison(parts * 4));
    rmsnorm_forward(out, rstd, x, w, N, C, 1e-5);
    rmsnorm_backward(dx, dw, dout, x, rstd, w, N, C);
    assert_alike("rmsnorm's out", fetch_low(out_there, size), out, size, ROUNDED);
    assert_alike("rmsnorm's out32", fetch_reals(out32, size), out, size, EXACT);
    assert_alike("rmsnorm's rstd", fetch_reals(rstd_there, N), rstd, N, EXACT);
    assert_alike("rmsnorm's dx", fetch_reals(dx_there, size), dx, size, EXACT);
    assert_alike("rmsnorm's dx, rounded", fetch_low(dx_low, size), dx, size, ROUNDED);
    assert_alike("rmsnorm's dw", fetch_reals(dw_there, C), dw, C, EXACT);
    gpu::rmsnorm_backward(dx_there, NULL, dw_there, dout_there, x_there, rstd_there, w_there, N, C,
                          (float *)device_poison(parts * 4));
    rmsnorm_backward(dx, dw, dout, x, rstd, w, N, C);
    assert_alike("rmsnorm's dx again", fetch_reals(dx_there, size), dx, size, EXACT);
    end_layers();
}

void check_gpu_rope(int N, int T, int heads, int D, int extra) {
    size_t ld = (size_t)heads * D + extra, size = N * ld;
    real *x = draw_normal(size), *angles = take_reals((size_t)T * D);
    rope_angles(angles, 0, T, D, 10000);
    gpu::floatX *there = device_low(x, size);
    float *angles_there = device_reals(angles, (size_t)T * D);
    real *before = take_reals(size);
    memcpy(before, x, size * sizeof(real));
    gpu::rope(there, ld, N, T, heads, D, angles_there, 1);
    rope(x, (int)ld, N, T, heads, D, angles, 1);
    real *found = fetch_low(there, size);
    assert_alike("rope", found, x, size, ROUNDED);
    for (size_t i = 0; i < size; i++) {
        if (i % ld >= (size_t)heads * D)
            assert_true(found[i] == before[i]);
    }
    gpu::rope(there, ld, N, T, heads, D, angles_there, -1);
    assert_alike("rope turned back", fetch_low(there, size), before, size, ROUNDED);
    end_layers();
}

void check_gpu_embedding(int N, int C, int V) {
    size_t size = (size_t)N * C;
    real *table = draw_normal((size_t)V * C), *dx = draw_normal(size), *dtable = draw_normal((size_t)V * C);
    real *x = take_reals(size);
    int *tokens = take_ints(N), *order = take_ints(N), *offset = take_ints(V + 1), *words = take_ints(V + 1), count = 0;
    for (int n = 0; n < N; n++) // every other one the same
        tokens[n] = draw(&layers_draw, 0, 1) ? V / 2 : draw(&layers_draw, 0, V - 1);
    int *tokens_there = (int *)device_copy(tokens, N * sizeof(int));
    float *table_there = device_reals(table, (size_t)V * C), *dx_there = device_reals(dx, size);
    float *dtable_there = device_reals(dtable, (size_t)V * C), *x_there = (float *)device_poison(size * 4);
    embedding_forward(x, table, tokens, N, C);
    embedding_backward(dtable, dx, tokens, N, C);
    counting_sort(order, offset, tokens, N, V);
    int *begins = take_ints(V + 1);
    for (int v = 0; v < V; v++) {
        words[count] = v;
        begins[count] = offset[v];
        count += offset[v + 1] > offset[v];
    }
    begins[count] = N;
    int *order_there = (int *)device_copy(order, N * sizeof(int)),
        *words_there = (int *)device_copy(words, count * sizeof(int));
    int *begins_there = (int *)device_copy(begins, (count + 1) * sizeof(int));
    gpu::embedding_forward(x_there, table_there, tokens_there, N, C);
    gpu::embedding_backward(dtable_there, dx_there, order_there, words_there, begins_there, count, C);
    real *found = fetch_reals(x_there, size);
    assert_memory_equal(found, x, size * sizeof(real));
    assert_alike("dembedding", fetch_reals(dtable_there, (size_t)V * C), dtable, (size_t)V * C, EXACT);
    end_layers();
}

void test_gpu_rows(void **state) {
    (void)state;
    layers_draw = fresh();
    const int widths[] = {1, 2, 6, 8, 20, 33, 64, 100, 132, 260};
    for (int i = 0; i < 6; i++)
        check_convert(draw(&layers_draw, 1, 5000));
    for (int i = 0; i < 10; i++) {
        check_gpu_rmsnorm(draw(&layers_draw, 1, 10), widths[i]);
        check_gpu_rmsnorm(draw(&layers_draw, 100, 400), widths[i]);
        check_gpu_embedding(draw(&layers_draw, 1, 300), widths[i], draw(&layers_draw, 1, 40));
    }
    check_gpu_rmsnorm(2, 3000);
    check_gpu_rmsnorm(1500, 5);
    for (int i = 0; i < 20; i++)
        check_gpu_rope(draw(&layers_draw, 1, 60), draw(&layers_draw, 1, 70), draw(&layers_draw, 1, 4),
                       2 * draw(&layers_draw, 1, 20), draw(&layers_draw, 0, 9));
    check_gpu_rope(50, 25, 3, 64, 128);
}

void check_gpu_attention(int B, int T, int H, int KV, int D) {
    char what[100];
    size_t ld = (size_t)(H + 2 * KV) * D, N = (size_t)B * T, size = N * ld, width = N * H * D, rows = N * H;
    real *qkv = draw_normal(size), *dout = draw_normal(width);
    real *out = take_reals(width), *lse = take_reals(rows), *dqkv = take_reals(size);
    gpu::floatX *qkv_there = device_low(qkv, size), *dout_there = device_low(dout, width);
    gpu::floatX *out_there = (gpu::floatX *)device_poison(width * sizeof(gpu::floatX));
    gpu::floatX *dqkv_there = (gpu::floatX *)device_poison(size * sizeof(gpu::floatX));
    float *lse_there = (float *)device_poison(rows * 4), *delta = (float *)device_poison(rows * 4);
    gpu::attention_forward(out_there, lse_there, qkv_there, B, T, H, KV, D);
    gpu::attention_backward(dqkv_there, dout_there, out_there, lse_there, qkv_there, B, T, H, KV, D, delta);
    attention_forward(out, lse, qkv, B, T, H, KV, D);
    real *found = fetch_low(out_there, width);
    attention_backward(dqkv, dout, found, lse, qkv, B, T, H, KV, D); // of the same out, rounded
    int used = snprintf(what, sizeof(what), "attention, B %d, T %d, H %d, KV %d, D %d: ", B, T, H, KV, D);
    snprintf(what + used, sizeof(what) - used, "out");
    assert_alike(what, found, out, width, ROUNDED);
    snprintf(what + used, sizeof(what) - used, "lse");
    assert_alike(what, fetch_reals(lse_there, rows), lse, rows, EXACT);
    // Queries, keys and values apart: a gradient may be far smaller than another.
    found = fetch_low(dqkv_there, size);
    int begins[4] = {0, H * D, (H + KV) * D, (H + 2 * KV) * D};
    for (int part = 0; part < 3; part++) {
        size_t columns = begins[part + 1] - begins[part];
        real *a = take_reals(N * columns), *b = take_reals(N * columns);
        for (size_t n = 0; n < N; n++) {
            memcpy(a + n * columns, found + n * ld + begins[part], columns * sizeof(real));
            memcpy(b + n * columns, dqkv + n * ld + begins[part], columns * sizeof(real));
        }
        snprintf(what + used, sizeof(what) - used, "d%s", part == 0 ? "q" : part == 1 ? "k" : "v");
        if (T > 1 || part == 2) // a single key gets all attention whatever is asked
            assert_alike(what, a, b, N * columns, ROUNDED);
        for (size_t i = 0; i < N * columns; i++)
            assert_true(fabs((double)(a[i] - b[i])) < 0.2);
    }
    end_layers();
}

void check_gpu_generation(int seq, int H, int KV, int D) { // one token after another, also beyond seq
    int width = 2 * KV * D, Q = (H + 2 * KV) * D, positions = seq + 3;
    real *qkv = draw_normal((size_t)positions * Q), *out = take_reals((size_t)seq * H * D),
         *lse = take_reals((size_t)seq * H);
    gpu::floatX *there = device_low(qkv, (size_t)positions * Q);
    gpu::floatX *cache = (gpu::floatX *)device_poison((size_t)seq * width * sizeof(gpu::floatX));
    for (int p = 0; p < positions; p++) {
        int T = min_int(p + 1, seq);
        gpu::floatX *answer = (gpu::floatX *)device_poison((size_t)H * D * sizeof(gpu::floatX));
        gpu::attention_of_one(answer, cache, there + (size_t)p * Q, p, seq, H, KV, D);
        if (p > 2 && p < seq - 1 && draw(&layers_draw, 0, 9))
            continue;
        attention_forward(out, lse, qkv + (size_t)(p + 1 - T) * Q, 1, T, H, KV, D);
        assert_alike("attention of one", fetch_low(answer, (size_t)H * D), out + (size_t)(T - 1) * H * D, (size_t)H * D,
                     ROUNDED);
    }
    end_layers();
}

void test_gpu_attention(void **state) {
    (void)state;
    layers_draw = fresh();
    const int lengths[] = {1, 2, 17, 64, 65, 200}, widths[] = {2, 6, 16, 20, 64, 128};
    for (int t = 0; t < 6; t++) {
        for (int d = 0; d < 6; d++) {
            int KV = draw(&layers_draw, 1, 2), H = KV * draw(&layers_draw, 1, 3);
            check_gpu_attention(t < 3 ? draw(&layers_draw, 1, 3) : 1, lengths[t], H, KV, widths[d]);
        }
    }
    check_gpu_attention(2, 150, 4, 2, 32);
    check_gpu_attention(1, 130, 2, 1, 40);
    check_gpu_attention(1, 70, 2, 1, 96);
    check_gpu_attention(1, 100, 2, 1, 256);
    check_gpu_attention(1, 33, 1, 1, 130);
    check_gpu_generation(5, 4, 2, 6);
    check_gpu_generation(130, 6, 2, 64);
    check_gpu_generation(1, 1, 1, 2);
    check_gpu_generation(70, 2, 1, 256);
}

void check_gpu_cross_entropy(int rows, int V, double spread) {
    size_t size = (size_t)rows * V;
    real *logits = draw_normal(size), *nll = take_reals(rows), *d = take_reals(size);
    int *targets = take_ints(rows);
    double mean = 0, scale = 0.37, sum = 2.5;
    for (size_t i = 0; i < size; i++)
        logits[i] *= (real)spread;
    for (int n = 0; n < rows; n++) {
        targets[n] = draw(&layers_draw, 0, V - 1);
        memcpy(d + (size_t)n * V, logits + (size_t)n * V, V * sizeof(real));
        nll[n] = softmax(d + (size_t)n * V, V) - logits[(size_t)n * V + targets[n]];
        d[(size_t)n * V + targets[n]] -= 1;
        mean += (double)nll[n] / rows;
    }
    for (size_t i = 0; i < size; i++)
        d[i] *= (real)scale;
    float *logits_there = device_reals(logits, size), *nll_there = (float *)device_poison(rows * 4);
    gpu::floatX *d_there = (gpu::floatX *)device_poison(size * sizeof(gpu::floatX));
    int *targets_there = (int *)device_copy(targets, rows * sizeof(int));
    double *sum_there = (double *)device_copy(&sum, sizeof(sum));
    gpu::cross_entropy(nll_there, NULL, logits_there, targets_there, rows, V, (float)scale);
    assert_alike("nll without gradients", fetch_reals(nll_there, rows), nll, rows, EXACT);
    nll_there = (float *)device_poison(rows * 4);
    gpu::cross_entropy(nll_there, d_there, logits_there, targets_there, rows, V, (float)scale);
    assert_alike("nll", fetch_reals(nll_there, rows), nll, rows, EXACT);
    if (V > 1)
        assert_alike("dlogits", fetch_low(d_there, size), d, size, ROUNDED);
    gpu::add_mean(sum_there, nll_there, rows, 0.5);
    fetch(&sum, sum_there, sizeof(sum));
    assert_near(sum, 2.5 + 0.5 * mean, 1e-6);
    end_layers();
}

void test_gpu_loss(void **state) {
    (void)state;
    layers_draw = fresh();
    const int words[] = {2, 5, 33, 1000, 1001, 5000};
    for (int i = 0; i < 6; i++) {
        check_gpu_cross_entropy(1, words[i], 1);
        check_gpu_cross_entropy(draw(&layers_draw, 2, 20), words[i], 3);
    }
    check_gpu_cross_entropy(1500, 7, 1);
    check_gpu_cross_entropy(3, 100, 60); // one word has all the probability
}

// A model of a matrix and a norm, which is updated three times. shift: where among 16 bytes the tensors begin.
void check_gpu_update(int size, int shift, double clip, double share) {
    Config c = small_config("dense");
    Tensor tensors[2] = {};
    tensors[0].dims = 2;
    tensors[1].dims = 1; // and so without weight decay
    tensors[0].trained = tensors[1].trained = 1;
    Model m = {};
    m.config = c;
    m.config.layers = 0;
    m.config.clip = clip;
    m.tensors = tensors;
    m.tensor_count = 2;
    tensors[0].size = (size_t)size;
    tensors[1].offset = (size_t)size;
    tensors[1].size = 17;
    m.size = (size_t)size + 17;
    float *there[4];
    for (int i = 0; i < 4; i++) {
        m.memory[i] = draw_normal(m.size);
        for (size_t j = 0; j < m.size && i > 1; j++)
            m.memory[i][j] *= i == MOMENT2 ? m.memory[i][j] : (real)0.1;
        there[i] = (float *)device_poison((m.size + 4) * sizeof(float)) + shift;
        CHECK(cudaMemcpy(there[i], m.memory[i], m.size * sizeof(float), cudaMemcpyHostToDevice));
    }
    gpu::floatX *low = (gpu::floatX *)device_poison((m.size + 4) * sizeof(gpu::floatX)) + shift;
    double *norm_there = (double *)device_poison(sizeof(double)),
           *part = (double *)device_poison(NORM_PARTS * sizeof(double));
    for (int step = 1; step <= 3; step++) {
        double lr = 0.01 * step, norm, found;
        for (size_t i = 0; i < m.size; i++)
            m.memory[GRADS][i] = (real)(share * random_normal(layers_draw + step, i));
        CHECK(cudaMemcpy(there[GRADS], m.memory[GRADS], m.size * sizeof(float), cudaMemcpyHostToDevice));
        norm = gradient_norm(&m);
        gpu::gradient_norm(norm_there, there[GRADS], m.size, part);
        fetch(&found, norm_there, sizeof(found));
        assert_near(found / norm, 1, 1e-12);
        model_update(&m, step, lr, norm);
        for (int t = 0; t < 2; t++) {
            size_t at = tensors[t].offset;
            gpu::floatX *same = sizeof(gpu::floatX) == 4 && step > 1 ? (gpu::floatX *)(there[WEIGHTS] + at) : NULL;
            gpu::adamw(there[WEIGHTS] + at, t ? same : low, there[GRADS] + at, there[MOMENT1] + at, there[MOMENT2] + at,
                       tensors[t].size, norm_there, clip, (float)lr, (float)(t ? 1 : 1 - lr * c.weight_decay),
                       (float)c.beta1, (float)c.beta2, (float)(1 / (1 - pow(c.beta1, step))),
                       (float)(1 / (1 - pow(c.beta2, step))), 1e-8f);
        }
        for (int i = 0; i < 4; i++) {
            if (i != GRADS)
                assert_alike("AdamW", fetch_reals(there[i], m.size), m.memory[i], m.size, EXACT);
        }
        assert_alike("AdamW's rounded weights", fetch_low(low, (size_t)size), m.memory[WEIGHTS], (size_t)size,
                     sizeof(gpu::floatX) == 2 ? 4e-3 : EXACT);
        assert_memory_equal(fetch_reals(there[GRADS], m.size), m.memory[GRADS], m.size * sizeof(real)); // cleared
    }
    double bad = draw(&layers_draw, 0, 1) ? INFINITY : NAN;
    CHECK(cudaMemcpy(norm_there, &bad, sizeof(bad), cudaMemcpyHostToDevice));
    real *before = fetch_reals(there[WEIGHTS], m.size);
    gpu::adamw(there[WEIGHTS], low, there[GRADS], there[MOMENT1], there[MOMENT2], m.size, norm_there, clip, 0.1f, 0.9f,
               0.9f, 0.9f, 1, 1, 1e-8f);
    assert_memory_equal(fetch_reals(there[WEIGHTS], m.size), before, m.size * sizeof(real));
    end_layers();
}

void test_gpu_update(void **state) {
    (void)state;
    layers_draw = fresh();
    check_gpu_update(1, 0, 1, 3);
    check_gpu_update(draw(&layers_draw, 1000, 9000), 0, 1, 1);
    check_gpu_update(4 * draw(&layers_draw, 100, 300), 0, 1, 1e-3);
    check_gpu_update(draw(&layers_draw, 100, 300), 3, 0, 1);
    double norm, *norm_there = (double *)device_poison(sizeof(double)), *part = (double *)device_poison(NORM_PARTS * 8);
    real *g = draw_normal(1 << 21);
    gpu::gradient_norm(norm_there, device_reals(g, 1 << 21), 1 << 21, part);
    fetch(&norm, norm_there, sizeof(norm));
    assert_near(norm / sqrt(inner(g, g, 1 << 21)), 1, 1e-12);
    end_layers();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gpu_rows),
        cmocka_unit_test(test_gpu_attention),
        cmocka_unit_test(test_gpu_loss),
        cmocka_unit_test(test_gpu_update),
    };
    begin_tests();
    return cmocka_run_group_tests_name("cuda_layers", tests, NULL, scratch_done);
}
