// The layers on the device against their C twins, on random numbers (SEED=new: others).

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

// The norm of x + branch + rows of each token, where they are there, and its way back, added up by finish_gradients.
void check_gpu_rmsnorm(int N, int C, int with_branch, int K) {
    size_t size = (size_t)N * C, parts = (size_t)div_up(N, gpu::BLOCK_ROWS) * C, slots = (size_t)N * max_int(K, 1);
    real *x = draw_normal(size), *w = draw_normal(C), *dout = draw_normal(size), *dx = draw_normal(size), *dw = draw_normal(C);
    real *branch = draw_normal(size), *rows = draw_normal(slots * C), *out = take_reals(size), *rstd = take_reals(N);
    real *sum = take_reals(size);
    int *row = take_ints(slots);
    gpu::floatX *branch_there = device_low(branch, size), *rows_there = device_low(rows, slots * C);
    for (size_t i = 0; i < slots; i++) {
        row[i] = draw(&layers_draw, 0, 3) ? draw(&layers_draw, 0, (int)slots - 1) : -1;
    }
    for (size_t i = 0; i < size; i++) {
        sum[i] = x[i] + (with_branch ? branch[i] : 0);
        for (int k = 0; k < K; k++) {
            int r = row[i / C * K + k];
            sum[i] += r < 0 ? 0 : rows[(size_t)r * C + i % C];
        }
    }
    float *x_there = device_reals(x, size), *w_there = device_reals(w, C), *dout_there = device_reals(dout, size);
    float *dx_there = device_reals(dx, size), *dw_there = device_reals(dw, C), *partial = (float *)device_poison(parts * 4);
    float *sum_there = (float *)device_poison(size * 4), *out32 = (float *)device_poison(size * 4);
    float *rstd_there = (float *)device_poison(N * 4);
    gpu::floatX *out_there = (gpu::floatX *)device_poison(size * sizeof(gpu::floatX));
    gpu::floatX *dx_low = (gpu::floatX *)device_poison(size * sizeof(gpu::floatX));
    gpu::Sum from = {x_there, with_branch ? branch_there : NULL, K ? rows_there : NULL, (int *)device_copy(row, slots * sizeof(int)), K};
    gpu::rmsnorm_forward({sum_there, out_there, out32, rstd_there}, from, w_there, N, C, 1e-5);
    gpu::rmsnorm_backward({dx_there, dx_low, partial, sum_there, rstd_there, w_there}, dout_there, N, C);
    gpu::Gradient gradient = {dw_there, partial, NULL, 0};
    gpu::Model m = {};
    m.config.dim = C;
    m.batch.B = N;
    m.batch.T = 1;
    m.gradients = (gpu::Gradient *)device_copy(&gradient, sizeof(gradient));
    gpu::finish_gradients(&m, 0, 1);
    rmsnorm_forward(out, rstd, sum, w, N, C, 1e-5);
    rmsnorm_backward(dx, dw, dout, sum, rstd, w, N, C);
    assert_alike("the sum", fetch_reals(sum_there, size), sum, size, EXACT);
    assert_alike("rmsnorm's out", fetch_low(out_there, size), out, size, ROUNDED);
    assert_alike("rmsnorm's out32", fetch_reals(out32, size), out, size, EXACT);
    assert_alike("rmsnorm's rstd", fetch_reals(rstd_there, N), rstd, N, EXACT);
    assert_alike("rmsnorm's dx", fetch_reals(dx_there, size), dx, size, EXACT);
    assert_alike("rmsnorm's dx, rounded", fetch_low(dx_low, size), dx, size, ROUNDED);
    assert_alike("rmsnorm's dw", fetch_reals(dw_there, C), dw, C, EXACT);
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

// Rows of a second table beside the embedding's, by pair and by triple: what both twins make of them, and of their way back,
// for which the device's tokens are sorted by the function that sorts a batch.
void check_gpu_ngrams(int N, int T, int C, int V, int rows, int order) {
    size_t size = (size_t)N * C, of_table = (size_t)rows * C;
    int orders = order - 1, most = N * orders;
    real *embed = draw_normal((size_t)V * C), *table = draw_normal(of_table), *x = take_reals(size), *sum = take_reals(size);
    real *dx = draw_normal(size), *dtable = draw_normal(of_table);
    int *tokens = take_ints(N), *row = take_ints((size_t)4 * most + 1);
    Config c = device_config("dense");
    c.ngrams = rows;
    c.ngram_order = order;
    for (int n = 0; n < N; n++) {
        tokens[n] = draw(&layers_draw, 0, V - 1);
    }
    ReadRows batch = {rows, 0, take_ints(rows), take_ints(rows)};
    find_ngrams(&c, row, tokens, NULL, N, T);
    int count = gpu::sort_by_row(row + most, most, row, most, N, &batch), all = 0;
    assert_int_equal(batch.count, 0);
    for (int i = 0; i < count; i++) {
        all += row[3 * most + i + 1] - row[3 * most + i];
    }
    assert_int_equal(all, most);
    float *embed_there = device_reals(embed, (size_t)V * C), *table_there = device_reals(table, of_table);
    int *tokens_there = (int *)device_copy(tokens, N * sizeof(int));
    int *row_there = (int *)device_copy(row, ((size_t)4 * most + 1) * sizeof(int)), *order_there = row_there + most;
    float *x_there = (float *)device_poison(size * 4), *sum_there = (float *)device_poison(size * 4);
    float *dx_there = device_reals(dx, size), *dtable_there = device_reals(dtable, of_table);
    gpu::embedding_forward(x_there, embed_there, tokens_there, N, C, {table_there, row_there, orders, sum_there});
    gpu::embedding_backward(dtable_there, dx_there, order_there, order_there + most, order_there + 2 * most, count, C);
    embedding_forward(x, embed, tokens, N, C);
    for (int i = 0; i < orders; i++) {
        add_table_rows(x, table, row + (size_t)i * N, N, C);
        add_table_rows(sum, table, row + (size_t)i * N, N, C);
        embedding_backward(dtable, dx, row + (size_t)i * N, N, C);
    }
    assert_memory_equal(fetch_reals(x_there, size), x, size * sizeof(real));
    assert_memory_equal(fetch_reals(sum_there, size), sum, size * sizeof(real));
    assert_alike("gradient of n-grams", fetch_reals(dtable_there, of_table), dtable, of_table, EXACT);
    end_layers();
}

void assert_columns_alike(const char *what, const real *found, const real *wanted, size_t N, size_t ld, size_t begin,
                          size_t until);

// What a layer does to qkv (N,(H+2KV)*D) between its product and attention, and the way back: a bias, norms of queries and
// keys, over heads or over rows, and rows of the values' table. Tokens are sorted for the device by the function that sorts a batch.
void check_gpu_qkv(int N, int H, int KV, int D, int V, int over) {
    int heads = H + KV, Q = (H + 2 * KV) * D, values = KV * D, DQ = over == OVER_ROW ? H * D : D, DK = over == OVER_ROW ? KV * D : D;
    int rows = over == OVER_ROW ? 2 : heads;
    size_t size = (size_t)N * Q, norms = (size_t)N * rows, of_table = (size_t)V * values;
    real *qkv = draw_normal(size), *dqkv = draw_normal(size), *w = draw_normal(DQ + DK), *dw = draw_normal(DQ + DK);
    real *bias = draw_normal(Q), *dbias = draw_normal(Q);
    real *table = draw_normal(of_table), *dtable = draw_normal(of_table);
    int *tokens = take_ints((size_t)5 * N + 1);
    for (int n = 0; n < N; n++) {
        tokens[n] = draw(&layers_draw, 0, V - 1);
    }
    for (size_t i = 0; i < size; i++) { // rows of different lengths
        qkv[i] *= (real)(1 + i / D % 5);
    }

    Model *host = bare_model(1);
    LayerParams params = {}, grads = {};
    host->config.dim = H * D;
    host->config.heads = H;
    host->config.kv_heads = KV;
    host->config.qk_norm = host->config.value_embedding = host->config.qkv_bias = 1;
    host->config.qk_norm_over = over;
    host->config.norm_eps = 1e-5;
    host->batch.B = N;
    host->batch.T = 1;
    host->batch.inputs = tokens;
    host->params.layer = &params;
    host->grads.layer = &grads;
    params.q_norm = w;
    params.k_norm = w + DQ;
    params.qkv_bias = bias;
    params.value_embed = table;
    grads.q_norm = dw;
    grads.k_norm = dw + DQ;
    grads.qkv_bias = dbias;
    grads.value_embed = dtable;
    host->acts.layer->raw_qk = take_reals((size_t)N * heads * D);
    host->acts.layer->rstd_qk = take_reals(norms);

    // The same on the device.
    gpu::Model there = {};
    gpu::LayerActs acts = {};
    LayerParams params_there = {}, grads_there = {};
    (Model &)there = *host;
    there.layers = &acts;
    there.params.layer = &params_there;
    there.grads.layer = &grads_there;
    there.max_tokens = N;
    Lookup lookup = {};
    ReadRows batch = {V, 0, take_ints(V), take_ints(V)}, *read = &lookup.read[BY_WORD];
    *read = {V, 0, take_ints(V), take_ints(V)};
    host->lookup = there.lookup = &lookup;
    there.word_count = gpu::sort_by_row(tokens + 2 * N, N, tokens, N, N, &batch);
    there.staging = tokens;
    there.tokens = (int *)device_copy(tokens, (5 * N + 1) * sizeof(int));
    there.qk_part = (double *)device_poison(gpu::qk_sums(&there.config, N) * sizeof(double));
    float *w_there = device_reals(w, DQ + DK), *dw_there = device_reals(dw, DQ + DK);
    params_there.q_norm = w_there;
    params_there.k_norm = w_there + DQ;
    params_there.qkv_bias = device_reals(bias, Q);
    params_there.value_embed = device_reals(table, of_table);
    grads_there.q_norm = dw_there;
    grads_there.k_norm = dw_there + DQ;
    grads_there.qkv_bias = device_reals(dbias, Q);
    grads_there.value_embed = device_reals(dtable, of_table);
    acts.raw_qk = (gpu::floatX *)device_poison((size_t)N * heads * D * sizeof(gpu::floatX));
    acts.rstd_qk = (float *)device_poison(norms * 4);
    gpu::floatX *qkv_there = device_low(qkv, size), *dqkv_there = device_low(dqkv, size);

    gpu::qkv_bias_forward(&there, 0, qkv_there);
    qkv_bias_forward(host, 0, qkv);
    real *found = fetch_low(qkv_there, size);
    assert_columns_alike("queries, keys and values with their bias", found, qkv, N, Q, 0, Q);
    memcpy(qkv, found, size * sizeof(real)); // the sums are rounded before the norm reads them
    gpu::qk_norm_forward(&there, 0, qkv_there);
    gpu::value_embedding_forward(&there, 0, qkv_there);
    qk_norm_forward(host, 0, qkv);
    value_embedding_forward(host, 0, qkv);
    found = fetch_low(qkv_there, size);
    assert_columns_alike("queries and keys", found, qkv, N, Q, 0, (size_t)heads * D);
    assert_columns_alike("values", found, qkv, N, Q, (size_t)heads * D, Q);
    assert_alike("rstd of queries and keys", fetch_reals(acts.rstd_qk, norms), host->acts.layer->rstd_qk, norms, EXACT);

    gpu::value_embedding_backward(&there, 0, dqkv_there);
    gpu::qk_norm_backward(&there, 0, dqkv_there);
    gpu::qkv_bias_backward(&there, 0, dqkv_there);
    assert_int_equal(read->count, there.word_count);
    value_embedding_backward(host, 0, dqkv);
    assert_int_equal(read->count, there.word_count); // the same rows
    qk_norm_backward(host, 0, dqkv);
    found = fetch_low(dqkv_there, size);
    qkv_bias_backward(host, 0, found); // of the same rounded numbers
    assert_columns_alike("dq", found, dqkv, N, Q, 0, (size_t)H * D);
    assert_columns_alike("dk", found, dqkv, N, Q, (size_t)H * D, (size_t)heads * D);
    assert_columns_alike("dv", found, dqkv, N, Q, (size_t)heads * D, Q);
    assert_alike("gradient of q_norm", fetch_reals(dw_there, DQ), dw, DQ, EXACT);
    assert_alike("gradient of k_norm", fetch_reals(dw_there + DQ, DK), dw + DQ, DK, EXACT);
    assert_alike("gradient of the bias", fetch_reals(grads_there.qkv_bias, Q), dbias, Q, EXACT);
    assert_alike("gradient of the values' table", fetch_reals(grads_there.value_embed, of_table), dtable, of_table, EXACT);
    end_layers();
}

void test_gpu_tables_and_norms(void **state) {
    (void)state;
    layers_draw = fresh();
    const int widths[] = {8, 16, 24, 40, 64, 104, 128, 136, 256}; // two, ... 32 lanes of a head, and twice as many fours
    for (int i = 0; i < 18; i++) {
        check_gpu_qkv(draw(&layers_draw, 1, 20), draw(&layers_draw, 1, 4), draw(&layers_draw, 1, 2), widths[i / 2], 10,
                      i % 2 ? OVER_ROW : OVER_HEAD);
    }
    check_gpu_qkv(150, 3, 1, 16, 30, OVER_HEAD); // several blocks of tokens
    check_gpu_qkv(150, 3, 1, 16, 30, OVER_ROW);
    check_gpu_qkv(64, 1, 1, 64, 7, OVER_HEAD);
    for (int i = 0; i < 5; i++) {
        check_gpu_ngrams(12 * draw(&layers_draw, 1, 20), 12, widths[i], 9, draw(&layers_draw, 1, 40), 2 + i % 2);
    }
}

void test_gpu_rows(void **state) {
    (void)state;
    layers_draw = fresh();
    const int widths[] = {8, 16, 24, 40, 64, 104, 128, 136, 264, 512};
    for (int i = 0; i < 6; i++) {
        check_convert(draw(&layers_draw, 1, 5000));
    }
    for (int i = 0; i < 10; i++) {
        check_gpu_rmsnorm(draw(&layers_draw, 1, 10), widths[i], i % 2, i % 4);
        check_gpu_rmsnorm(draw(&layers_draw, 30, 200), widths[i], i % 3 > 0, i % 5);
        check_gpu_embedding(draw(&layers_draw, 1, 300), widths[i], draw(&layers_draw, 1, 40));
    }
    check_gpu_rmsnorm(2, 3000, 1, 2);
    check_gpu_rmsnorm(700, 8, 0, 0);
}

// qkv (N,(H+2KV)*D) as the device has it in shared memory: queries and keys turned to their positions, n % T in row n,
// and rounded again. The C twin's rope must find the same, but it may add in another order, and one number in ten
// thousand would be rounded to the other side. So what is rounded is computed here as the device does it.
real *turned_as_there(const real *qkv, int N, int T, int H, int KV, int D, const real *angles) {
    size_t ld = (size_t)(H + 2 * KV) * D, size = (size_t)N * ld;
    real *by_twin = take_reals(size), *turned = take_reals(size);
    memcpy(by_twin, qkv, size * sizeof(real));
    memcpy(turned, qkv, size * sizeof(real));
    rope(by_twin, (int)ld, N, T, H + KV, D, angles, 1);

    for (size_t n = 0; n < (size_t)N; n++) {
        for (int h = 0; h < H + KV; h++) {
            real *head = turned + n * ld + (size_t)h * D;
            for (int i = 0; i < D / 2; i++) {
                real cosine = angles[n % T * D + 2 * i], sine = angles[n % T * D + 2 * i + 1];
                real a = head[i], b = head[i + D / 2];
                real b_part = b * sine, a_part = a * sine;
                head[i] = fmaf(a, cosine, -b_part);
                head[i + D / 2] = fmaf(b, cosine, a_part);
            }
        }
    }
    assert_alike("rope", turned, by_twin, size, 1e-6);
    round_numbers(turned, size);
    return turned;
}

// Compares the columns begin... until of two arrays (N,ld).
void assert_columns_alike(const char *what, const real *found, const real *wanted, size_t N, size_t ld, size_t begin,
                          size_t until) {
    size_t columns = until - begin;
    real *a = take_reals(N * columns), *b = take_reals(N * columns);
    for (size_t n = 0; n < N; n++) {
        memcpy(a + n * columns, found + n * ld + begin, columns * sizeof(real));
        memcpy(b + n * columns, wanted + n * ld + begin, columns * sizeof(real));
    }
    assert_alike(what, a, b, N * columns, ROUNDED);
    for (size_t i = 0; i < N * columns; i++) {
        assert_true(fabs((double)(a[i] - b[i])) < 0.2);
    }
}

// The device turns queries and keys itself; the C twin has rope for that, before attention and, backward, after it.
void check_gpu_attention(int B, int T, int H, int KV, int D) {
    char what[3][100];
    const char *names[3] = {"dq", "dk", "dv"};
    size_t ld = (size_t)(H + 2 * KV) * D, N = (size_t)B * T, size = N * ld, width = N * H * D, rows = N * H;
    real *qkv = draw_normal(size), *dout = draw_normal(width), *angles = take_reals((size_t)T * D);
    real *out = take_reals(width), *lse = take_reals(rows), *dqkv = take_reals(size);
    gpu::floatX *qkv_there = device_low(qkv, size), *dout_there = device_low(dout, width);
    gpu::floatX *out_there = (gpu::floatX *)device_poison(width * sizeof(gpu::floatX));
    gpu::floatX *dqkv_there = (gpu::floatX *)device_poison(size * sizeof(gpu::floatX));
    float *lse_there = (float *)device_poison(rows * 4), *delta = (float *)device_poison(rows * 4);
    rope_angles(angles, 0, T, D, 10000);
    float *angles_there = device_reals(angles, (size_t)T * D);
    gpu::attention_forward(out_there, lse_there, qkv_there, angles_there, B, T, H, KV, D);
    gpu::attention_backward(dqkv_there, dout_there, out_there, lse_there, qkv_there, angles_there, B, T, H, KV, D, delta);

    real *turned = turned_as_there(qkv, (int)N, T, H, KV, D, angles), *found = fetch_low(out_there, width);
    attention_forward(out, lse, turned, B, T, H, KV, D);
    attention_backward(dqkv, dout, found, lse, turned, B, T, H, KV, D); // of the same out, rounded
    rope(dqkv, (int)ld, (int)N, T, H + KV, D, angles, -1);

    const char *first_names[2] = {"out", "lse"};
    for (int i = 0; i < 2; i++) {
        snprintf(what[i], sizeof(what[i]), "attention, B %d, T %d, H %d, KV %d, D %d: %s", B, T, H, KV, D, first_names[i]);
    }
    assert_alike(what[0], found, out, width, ROUNDED);
    assert_alike(what[1], fetch_reals(lse_there, rows), lse, rows, EXACT);

    // What was not turned must be as it was.
    assert_memory_equal(fetch_low(qkv_there, size), qkv, size * sizeof(real));

    // Queries, keys and values apart: a gradient may be far smaller than another.
    found = fetch_low(dqkv_there, size);
    size_t begins[4] = {0, (size_t)H * D, (size_t)(H + KV) * D, ld};
    for (int part = 0; part < 3; part++) {
        snprintf(what[part], sizeof(what[part]), "attention, B %d, T %d, H %d, KV %d, D %d: %s", B, T, H, KV, D, names[part]);
        if (T > 1 || part == 2) { // a single key gets all attention whatever is asked
            assert_columns_alike(what[part], found, dqkv, N, ld, begins[part], begins[part + 1]);
        }
    }
    end_layers();
}

void check_gpu_generation(int seq, int H, int KV, int D) { // one token after another, also beyond seq
    int width = 2 * KV * D, Q = (H + 2 * KV) * D, positions = seq + 3;
    real *qkv = draw_normal((size_t)positions * Q), *out = take_reals((size_t)seq * H * D),
         *lse = take_reals((size_t)seq * H), *angles = take_reals((size_t)positions * D);
    gpu::floatX *there = device_low(qkv, (size_t)positions * Q);
    gpu::floatX *cache = (gpu::floatX *)device_poison((size_t)seq * width * sizeof(gpu::floatX));
    rope_angles(angles, 0, positions, D, 10000);
    float *angles_there = device_reals(angles, (size_t)positions * D);
    real *turned = turned_as_there(qkv, positions, positions, H, KV, D, angles);
    for (int p = 0; p < positions; p++) {
        int T = min_int(p + 1, seq);
        gpu::floatX *answer = (gpu::floatX *)device_poison((size_t)H * D * sizeof(gpu::floatX));
        gpu::attention_of_one(answer, cache, there + (size_t)p * Q, angles_there + (size_t)p * D, p, seq, H, KV, D);
        if (p > 2 && p < seq - 1 && draw(&layers_draw, 0, 9)) {
            continue;
        }
        attention_forward(out, lse, turned + (size_t)(p + 1 - T) * Q, 1, T, H, KV, D);
        assert_alike("attention of one", fetch_low(answer, (size_t)H * D), out + (size_t)(T - 1) * H * D, (size_t)H * D,
                     ROUNDED);

        // The cache has this token's keys, turned, and its values, to the bit.
        real *row = fetch_low(cache + (size_t)(p % seq) * width, width);
        assert_memory_equal(row, turned + (size_t)p * Q + (size_t)H * D, width * sizeof(real));
    }
    end_layers();
}

void test_gpu_attention(void **state) {
    (void)state;
    layers_draw = fresh();
    const int lengths[] = {1, 2, 17, 64, 65, 200}, widths[] = {8, 16, 24, 40, 64, 80, 128};
    for (int t = 0; t < 6; t++) {
        for (int d = 0; d < 7; d++) {
            int KV = draw(&layers_draw, 1, 2), H = KV * draw(&layers_draw, 1, 3);
            check_gpu_attention(t < 3 ? draw(&layers_draw, 1, 3) : 1, lengths[t], H, KV, widths[d]);
        }
    }
}

// Lengths around the edges of tiles, several sequences, and the widest heads.
void test_gpu_attention_edges(void **state) {
    (void)state;
    layers_draw = fresh();
    const int lengths[] = {15, 16, 31, 32, 33, 47, 48, 49, 63, 127, 128, 129, 257};
    for (int t = 0; t < 13; t++) {
        check_gpu_attention(1, lengths[t], 1, 1, 8 * draw(&layers_draw, 1, 16));
    }
    check_gpu_attention(2, 150, 4, 2, 32);
    check_gpu_attention(3, 130, 2, 1, 48);
    check_gpu_attention(1, 70, 2, 1, 96);
    check_gpu_attention(2, 100, 2, 1, 256);
    check_gpu_attention(1, 65, 1, 1, 256);
    check_gpu_attention(1, 33, 2, 2, 136);
    check_gpu_attention(1, 80, 2, 1, 8 * draw(&layers_draw, 17, 31));
}

void test_gpu_attention_of_one(void **state) {
    (void)state;
    layers_draw = fresh();
    check_gpu_generation(5, 4, 2, 8);
    check_gpu_generation(20, 3, 1, 24);
    check_gpu_generation(130, 6, 2, 64);
    check_gpu_generation(1, 1, 1, 40);
    check_gpu_generation(70, 2, 1, 256);
}

// Logits stand in rows of W numbers, of which V are words; what the others hold makes no difference.
void check_gpu_cross_entropy(int rows, int V, double spread) {
    int W = gpu::words_with_padding(V);
    size_t size = (size_t)rows * V, wide = (size_t)rows * W;
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
    real *padded = take_filled(wide, 1000), *d_padded = take_reals(wide);
    for (int n = 0; n < rows; n++) {
        memcpy(padded + (size_t)n * W, logits + (size_t)n * V, V * sizeof(real));
        memcpy(d_padded + (size_t)n * W, d + (size_t)n * V, V * sizeof(real));
    }
    float *logits_there = device_reals(padded, wide), *nll_there = (float *)device_poison(rows * 4);
    gpu::floatX *d_there = (gpu::floatX *)device_poison(wide * sizeof(gpu::floatX));
    int *targets_there = (int *)device_copy(targets, rows * sizeof(int));
    double *sum_there = (double *)device_copy(&sum, sizeof(sum));
    gpu::cross_entropy(nll_there, NULL, logits_there, targets_there, rows, V, W, (float)scale);
    assert_alike("nll without gradients", fetch_reals(nll_there, rows), nll, rows, EXACT);
    nll_there = (float *)device_poison(rows * 4);
    gpu::cross_entropy(nll_there, d_there, logits_there, targets_there, rows, V, W, (float)scale);
    assert_alike("nll", fetch_reals(nll_there, rows), nll, rows, EXACT);
    if (V > 1) {
        real *found = fetch_low(d_there, wide);
        assert_alike("dlogits", found, d_padded, wide, ROUNDED);
        for (size_t i = 0; i < wide; i++) {
            assert_true((int)(i % W) < V || found[i] == 0);
        }
    }
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

// A model of a matrix and a norm, which is updated three times. moments: as
// floats, or as bfloat16, of which the device's bits are the C twin's.
template <class Moment> void check_gpu_update(int size, double clip, double share) {
    Config c = device_config("dense");
    Tensor tensors[2] = {};
    tensors[0].dims = 2;
    tensors[1].dims = 1; // and so without weight decay
    tensors[0].trained = tensors[1].trained = 1;
    Model m = {};
    m.config = c;
    m.config.layers = 0;
    m.config.clip = clip;
    m.config.moments = sizeof(Moment) == 2 ? MOMENTS_BF16 : MOMENTS_FP32;
    m.tensors = tensors;
    m.tensor_count = 2;
    tensors[0].size = (size_t)size;
    tensors[1].offset = (size_t)size;
    tensors[1].size = 20;
    Lookup lookup = {};
    m.lookup = &lookup;
    m.size = m.tables = (size_t)size + 20;
    for (int i = 0; i < 4; i++) {
        m.memory[i] = draw_normal(m.size);
    }
    Moment *moments[2];
    for (int i = 0; i < 2; i++) {
        Moment *low = (Moment *)take(m.size, sizeof(Moment));
        for (size_t j = 0; j < m.size; j++) {
            real x = m.memory[MOMENT1 + i][j] * (i ? m.memory[MOMENT1 + i][j] : (real)0.1);
            set_low_number(&low[j], x);
            m.memory[MOMENT1 + i][j] = low_number(low[j]);
        }
        moments[i] = (Moment *)device_poison(m.size * sizeof(Moment));
        CHECK(cudaMemcpy(moments[i], low, m.size * sizeof(Moment), cudaMemcpyHostToDevice));
    }
    float *w = (float *)device_poison(m.size * 4), *g = (float *)device_poison(m.size * 4);
    CHECK(cudaMemcpy(w, m.memory[WEIGHTS], m.size * sizeof(float), cudaMemcpyHostToDevice));
    gpu::floatX *low = (gpu::floatX *)device_poison(m.size * sizeof(gpu::floatX));
    double *norm_there = (double *)device_poison(sizeof(double)), *part = (double *)device_poison(gpu::NORM_PARTS * 8);
    gpu::Adam a = {};
    a.b1 = (float)c.beta1;
    a.b2 = (float)c.beta2;
    a.clip = clip;
    a.moments = m.config.moments;
    for (int step = 1; step <= 3; step++) {
        double lr = 0.01 * step, norm, found;
        for (size_t i = 0; i < m.size; i++) {
            m.memory[GRADS][i] = (real)(share * random_normal(layers_draw + step, i));
        }
        CHECK(cudaMemcpy(g, m.memory[GRADS], m.size * sizeof(float), cudaMemcpyHostToDevice));
        norm = gradient_norm(&m);
        gpu::gradient_norm(norm_there, g, m.size, part);
        fetch(&found, norm_there, sizeof(found));
        assert_near(found / norm, 1, 1e-12);
        model_update(&m, step, lr, norm);
        for (int t = 0; t < 2; t++) {
            size_t at = tensors[t].offset;
            a.w = w + at;
            a.g = g + at;
            a.low = sizeof(gpu::floatX) == 4 && step > 1 ? (gpu::floatX *)a.w : low + at;
            a.m1 = moments[0] + at;
            a.m2 = moments[1] + at;
            a.size = tensors[t].size;
            a.rate = (float)lr;
            a.keep = (float)(t ? 1 : 1 - lr * c.weight_decay);
            a.correct1 = (float)(1 / (1 - pow(c.beta1, step)));
            a.correct2 = (float)(1 / (1 - pow(c.beta2, step)));
            a.draws = moment_stream((uint64_t)c.seed, step, t);
            gpu::adamw(a, norm_there);
        }
        assert_alike("AdamW's weights", fetch_reals(w, m.size), m.memory[WEIGHTS], m.size, EXACT);
        for (int i = 0; i < 2; i++) {
            Moment *kept = take_back(moments[i], m.size);
            real *high = take_reals(m.size);
            for (size_t j = 0; j < m.size; j++) {
                high[j] = low_number(kept[j]);
            }
            // Where a sum is rounded otherwise, a moment may be rounded the other way: that is rare.
            assert_alike("AdamW's moments", high, m.memory[MOMENT1 + i], m.size, sizeof(Moment) == 2 ? 1e-4 : EXACT);
        }
        if (sizeof(gpu::floatX) == 2 || step == 1) {
            assert_alike("AdamW's rounded weights", fetch_low(low, m.size), m.memory[WEIGHTS], m.size,
                         sizeof(gpu::floatX) == 2 ? 4e-3 : EXACT);
        }
        assert_memory_equal(fetch_reals(g, m.size), m.memory[GRADS], m.size * sizeof(real)); // cleared
    }
    double bad = draw(&layers_draw, 0, 1) ? INFINITY : NAN;
    CHECK(cudaMemcpy(norm_there, &bad, sizeof(bad), cudaMemcpyHostToDevice));
    real *before = fetch_reals(w, m.size);
    gpu::adamw(a, norm_there);
    assert_memory_equal(fetch_reals(w, m.size), before, m.size * sizeof(real));
    end_layers();
}

void test_gpu_update(void **state) {
    (void)state;
    layers_draw = fresh();
    check_gpu_update<float>(4, 1, 3);
    check_gpu_update<float>(4 * draw(&layers_draw, 300, 2000), 1, 1);
    check_gpu_update<float>(4 * draw(&layers_draw, 100, 300), 1, 1e-3);
    check_gpu_update<float>(4 * draw(&layers_draw, 30, 100), 0, 1);
    check_gpu_update<__nv_bfloat16>(4 * draw(&layers_draw, 100, 300), 1, 1);
    check_gpu_update<__nv_bfloat16>(4 * draw(&layers_draw, 30, 300), 0, 1);
    double norm, *norm_there = (double *)device_poison(sizeof(double)), *part = (double *)device_poison(gpu::NORM_PARTS * 8);
    real *g = draw_normal(1 << 21);
    gpu::gradient_norm(norm_there, device_reals(g, 1 << 21), 1 << 21, part);
    fetch(&norm, norm_there, sizeof(norm));
    assert_near(norm / sqrt(inner(g, g, 1 << 21)), 1, 1e-12);
    end_layers();
}

// The norm of a table's gradients, and AdamW, both of the rows on a list. The gradients of others are NaN, and stay.
void check_gpu_read_rows(int rows, int C) {
    Config c = device_config("dense");
    size_t whole = (size_t)rows * C;
    Model m = {};
    gpu::Model there = {};
    gpu::Tables tables = {};
    gpu::Adam a = {};
    Tensor t = {};
    Lookup lookup = {};
    Adam plain = {1, (real)c.beta1, (real)c.beta2, (real)1.5, (real)2.5, (real)0.01, 1};
    ReadRows *r = &lookup.read[BY_NGRAM];
    *r = {rows, 0, take_ints(rows), take_ints(rows)};
    double norm = 1;
    for (int i = 0; i < 4; i++) {
        m.memory[i] = draw_normal(whole);
    }
    for (size_t i = 0; i < whole; i++) { // some rows are not read, some have no gradient; of others most numbers are 0
        int kind = (int)(i / C % 4), row = (int)(i / C);
        real *g = &m.memory[GRADS][i];
        *g = kind == 0 ? (real)NAN : kind == 1 || (kind == 2 && i % C != (size_t)C - 3) ? 0 : *g;
        m.memory[MOMENT2][i] *= m.memory[MOMENT2][i];
        note_rows(r, &row, kind > 0);
    }
    m.tensors = &t;
    m.tensor_count = 1;
    m.lookup = &lookup;
    t.shape[2] = C;
    t.looked_up = BY_NGRAM;
    (Model &)there = m;
    there.tables_there = &tables;
    there.memory[GRADS] = device_reals(m.memory[GRADS], whole);
    tables.list[BY_NGRAM] = (int *)device_copy(r->list, (size_t)r->count * sizeof(int));

    double sum = 0.25, *sum_there = (double *)device_copy(&sum, sizeof(sum)), *part = (double *)device_poison(gpu::NORM_PARTS * 8);
    gpu::add_squares_of_read_rows(&there, sum_there, part);
    fetch(&sum, sum_there, sizeof(sum));
    assert_near((sum - 0.25) / squares_of_read_rows(&m), 1, 1e-12);

    float *w = device_reals(m.memory[WEIGHTS], whole), *g = there.memory[GRADS];
    float *m1 = device_reals(m.memory[MOMENT1], whole), *m2 = device_reals(m.memory[MOMENT2], whole);
    double *norm_there = (double *)device_copy(&norm, sizeof(norm));
    a.w = w;
    a.g = g;
    a.m1 = m1;
    a.m2 = m2;
    a.low = sizeof(gpu::floatX) == 4 ? (gpu::floatX *)a.w : (gpu::floatX *)device_poison(whole * sizeof(gpu::floatX));
    a.size = whole;
    a.row = C;
    a.rows = tables.list[BY_NGRAM];
    a.count = r->count;
    a.rate = plain.rate;
    a.keep = 1;
    a.b1 = plain.b1;
    a.b2 = plain.b2;
    a.correct1 = plain.correct1;
    a.correct2 = plain.correct2;
    gpu::adamw(a, norm_there);
    Rounding none = {0, 0, 0};
    adamw_of_read_rows(m.memory[WEIGHTS], m.memory[GRADS], m.memory[MOMENT1], m.memory[MOMENT2], r, C, plain, &none);
    float *const arrays[] = {w, g, m1, m2};
    for (int i = 0; i < 4; i++) {
        real *found = fetch_reals(arrays[i], whole);
        for (size_t j = 0; i == GRADS && j < whole; j++) { // NaN is not like itself
            assert_true(isnan(found[j]) == (j / C % 4 == 0));
            found[j] = m.memory[GRADS][j] = isnan(found[j]) ? 0 : found[j];
        }
        assert_alike("AdamW of rows", found, m.memory[i], whole, EXACT);
    }
    end_layers();
}

// Matrices that Muon turns into U V^T. In bfloat16 a direction whose singular value is small is lost in the noise; so they
// are not square, or of rows that are nearly orthogonal. Between two lie others, whose turn it is not.
void check_gpu_orthogonalize(int E, int R, int C) {
    size_t one = (size_t)R * C, size = (size_t)E * one, stride = MUON_TURNS * one;
    int small = min_int(R, C), most = gpu::muon_matrices(E, R, C);
    real *x = draw_normal(size), *among = draw_normal((size_t)E * stride);
    Matrix list[8];
    gpu::MuonScratch s = {};
    double norm = 1;
    for (size_t i = 0; i < size && R == C; i++) {
        x[i] = (real)(0.1 / sqrt(C)) * x[i] + (i / C % R == i % C);
    }
    for (size_t i = 0; i < size; i++) { // of different sizes, which must not matter
        x[i] *= (real)(1 + i / one % 3);
        among[i / one * stride + i % one] = x[i];
    }
    assert_int_equal(most, E);
    for (int i = 0; i < 2; i++) {
        s.x[i] = (gpu::floatX *)device_poison(size * sizeof(gpu::floatX));
    }
    s.gram = (gpu::floatX *)device_poison((size_t)E * small * small * sizeof(gpu::floatX));
    s.polynomial = (gpu::floatX *)device_poison((size_t)E * small * small * sizeof(gpu::floatX));
    s.square = (float *)device_poison((size_t)E * small * small * sizeof(float));
    s.part = (double *)device_poison((size_t)E * gpu::MUON_PARTS * sizeof(double));
    const float *there = device_reals(among, (size_t)E * stride);
    real *found = fetch_low(gpu::orthogonalize(&s, there, stride, E, R, C, (double *)device_copy(&norm, 8)), size);
    for (int e = 0; e < E; e++) {
        list[e] = prepare_matrix(x + e * one, R, C, take_reals(matrix_memory(R, C)));
    }
    orthogonalize(list, E);
    for (int e = 0; e < E; e++) {
        size_t at = e * one;
        assert_alike("U V^T", found + at, x + at, one, sizeof(gpu::floatX) == 4 ? 1e-4 : 5e-2);
    }
    end_layers();
}

void test_gpu_muon_and_rows(void **state) {
    (void)state;
    layers_draw = fresh();
    check_gpu_read_rows(4, 8);
    check_gpu_read_rows(30, 40);
    check_gpu_read_rows(21, 136);
    check_gpu_read_rows(1200, 16); // several blocks
    check_gpu_orthogonalize(1, 8, 24);
    check_gpu_orthogonalize(1, 24, 8);
    check_gpu_orthogonalize(1, 32, 32);
    check_gpu_orthogonalize(3, 16, 64);
    check_gpu_orthogonalize(5, 96, 24);
    check_gpu_orthogonalize(2, 264, 64); // several blocks sum up the squares of one
}

// ---- the LSTM of dev/mixers/lstm.h

typedef struct LstmTest { // B sequences of T tokens; C numbers come in, M units, P numbers go out
    int B, T, C, M, P;
    size_t N, in, state, proj;
    real *weights;         // all in one array, and so are their gradients
    gpu::Model m;          // has them on the device, for low_of()
    gpu::LstmLayer a;      // on the device
    float *read;
} LstmTest;

LstmWeights lstm_parts(const LstmTest *t, real *w) {
    LstmWeights parts = {w, w + t->in, w + t->in + t->state, t->proj ? w + t->in + t->state + 4 * t->M : NULL};
    return parts;
}

size_t lstm_size(const LstmTest *t) {
    return t->in + t->state + 4 * (size_t)t->M + t->proj;
}

LstmTest begin_lstm(int B, int T, int C, int M, int P) {
    LstmTest t = {B, T, C, M, P, (size_t)B * T, (size_t)4 * M * C, (size_t)4 * M * P, M == P ? 0 : (size_t)P * M};
    size_t low = sizeof(gpu::floatX);
    t.weights = draw_normal(lstm_size(&t));
    for (size_t i = 0; i < lstm_size(&t); i++)
        t.weights[i] *= (real)(0.7 / sqrt(C));
    t.m.low = device_low(t.weights, lstm_size(&t));
    t.m.memory[WEIGHTS] = device_reals(t.weights, lstm_size(&t));
    t.a.gates = (gpu::floatX *)device_poison(t.N * 4 * M * low);
    t.a.cell = (float *)device_poison(t.N * M * sizeof(float));
    t.a.before = (gpu::floatX *)device_poison((t.N + 1) * P * low);
    t.a.hidden = (gpu::floatX *)device_poison(t.N * M * low);
    t.read = (float *)device_poison((size_t)B * 4 * M * sizeof(float));
    return t;
}

// Both passes of all sequences beside the C twin, and then each sequence step by step.
void check_gpu_lstm(int B, int T, int C, int M, int P) {
    LstmTest t = begin_lstm(B, T, C, M, P);
    size_t N = t.N, size = lstm_size(&t), low = sizeof(gpu::floatX);
    real *x = draw_normal(N * C), *dout = draw_normal(N * P), *dw = draw_normal(size), *out = take_reals(N * P);
    real *dx = take_reals(N * C), *dz = take_reals(N * 4 * M), *dr = take_reals(N * P);
    gpu::floatX *x_there = device_low(x, N * C), *dout_there = device_low(dout, N * P);
    gpu::floatX *out_there = (gpu::floatX *)device_poison(N * P * low);
    float *dx_there = (float *)device_poison(N * C * sizeof(float)), *dw_there = device_reals(dw, size);
    gpu::LstmScratch s = {(gpu::floatX *)device_poison(N * 4 * M * low),
                          (gpu::floatX *)device_poison(N * P * low),
                          (float *)device_poison((size_t)B * P * sizeof(float)),
                          (float *)device_poison((size_t)B * M * sizeof(float)),
                          (float *)device_poison((size_t)B * M * sizeof(float)),
                          (double *)device_poison(div_up((int)N, CHUNK) * 4 * M * sizeof(double))};
    LstmWeights w_there = lstm_parts(&t, t.m.memory[WEIGHTS]);
    gpu::lstm_forward(&t.m, out_there, t.a, x_there, w_there, t.read, B, T, C, M, P);
    gpu::lstm_backward(&t.m, dx_there, lstm_parts(&t, dw_there), s, dout_there, t.a, x_there, w_there, B, T, C, M, P);

    LstmWeights w = lstm_parts(&t, t.weights), of_dw = lstm_parts(&t, dw);
    LstmActs a = {take_reals(N * 4 * M), take_reals(N * M), take_reals(N * P), take_reals(N * M)};
    lstm_forward(out, &a, x, &w, B, T, C, M, P);
    lstm_backward(dx, &of_dw, dz, dr, dout, &a, x, &w, B, T, C, M, P);
    assert_alike("the LSTM's out", fetch_low(out_there, N * P), out, N * P, ROUNDED);
    assert_alike("its gates", fetch_low(t.a.gates, N * 4 * M), a.gates, N * 4 * M, ROUNDED);
    assert_alike("its cells", fetch_reals(t.a.cell, N * M), a.cell, N * M, ROUNDED);
    assert_alike("what its steps read", fetch_low(t.a.before, N * P), a.before, N * P, ROUNDED);
    assert_alike("its dz", fetch_low(s.dz, N * 4 * M), dz, N * 4 * M, ROUNDED);
    assert_alike("its dx", fetch_reals(dx_there, N * C), dx, N * C, ROUNDED);
    real *found = fetch_reals(dw_there, size);
    assert_alike("its dw_in", found, dw, t.in, ROUNDED);
    assert_alike("its dw_state", found + t.in, of_dw.state, t.state, ROUNDED);
    assert_alike("its dbias", found + t.in + t.state, of_dw.bias, 4 * M, ROUNDED);
    assert_alike("its dw_proj", found + t.in + t.state + 4 * M, of_dw.proj, t.proj, ROUNDED);

    // The state of one token is the next one's beginning, whatever was there before the first one.
    float *cell = (float *)device_poison(M * sizeof(float));
    gpu::floatX *r = (gpu::floatX *)device_poison(P * low);
    for (int b = 0; b < B; b++) {
        for (int i = 0; i < T; i++) {
            size_t n = (size_t)b * T + i;
            gpu::lstm_step(&t.m, out_there + n * P, cell, r, t.a, x_there + n * C, w_there, t.read, i == 0, C, M, P);
        }
    }
    assert_alike("the LSTM's out, step by step", fetch_low(out_there, N * P), out, N * P, ROUNDED);
    end_layers();
}

void test_gpu_lstm(void **state) {
    (void)state;
    layers_draw = fresh();
    check_gpu_lstm(1, 1, 8, 8, 8);
    check_gpu_lstm(1, 9, 8, 16, 16);
    check_gpu_lstm(3, 5, 16, 24, 24);
    check_gpu_lstm(5, 4, 24, 40, 16); // with a projection
    check_gpu_lstm(4, 1, 8, 8, 16);
    check_gpu_lstm(2, 70, 8, 8, 8);
    check_gpu_lstm(9, 3, 16, 136, 32); // several blocks for the units of a step
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gpu_lstm),
        cmocka_unit_test(test_gpu_tables_and_norms),
        cmocka_unit_test(test_gpu_muon_and_rows),
        cmocka_unit_test(test_gpu_rows),
        cmocka_unit_test(test_gpu_attention),
        cmocka_unit_test(test_gpu_attention_edges),
        cmocka_unit_test(test_gpu_attention_of_one),
        cmocka_unit_test(test_gpu_loss),
        cmocka_unit_test(test_gpu_update),
    };
    begin_tests();
    return cmocka_run_group_tests_name("cuda_layers", tests, NULL, scratch_done);
}
