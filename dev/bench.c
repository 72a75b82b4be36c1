// dev/bench: where a training step's time goes, in one run on one machine: the peak of multiply-adds; the matrix product on
// the model's own shapes, beside OpenBLAS where that was found; each layer, forward and backward; whole steps, and what
// the mixture costs over a dense model of equal work per token. `make bench`, or dev/bench with options of train_moe.

#define TRAIN_MOE_NO_MAIN
#include "../train_moe.c"
#ifdef OPENBLAS
#include <cblas.h>
#endif

double peak; // operations per second

// Median seconds of a call, out of enough calls for a fifth of a second.
double time_call(void (*call)(void *), void *arg) {
    double times[201], start = seconds();
    int n = 0;
    call(arg);
    while (n < 5 || (n < 201 && seconds() - start < 0.2)) {
        double t = seconds();
        call(arg);
        times[n++] = seconds() - t;
    }
    for (int i = 1; i < n; i++) {
        for (int j = i; j > 0 && times[j] < times[j - 1]; j--) {
            double t = times[j];
            times[j] = times[j - 1];
            times[j - 1] = t;
        }
    }
    return times[n / 2];
}

typedef struct Case {
    const char *name;
    Product *list;
    int count;
} Case;

void call_products(void *arg) {
    Case *c = (Case *)arg;
    products(c->list, c->count, 0);
}

#ifdef OPENBLAS
void call_blas(void *arg) { // gathered rows are taken as if they lay together
    Case *c = (Case *)arg;
    for (int i = 0; i < c->count; i++) {
        Product *p = &c->list[i];
        cblas_sgemm(CblasRowMajor, p->a.row_is_k ? CblasTrans : CblasNoTrans, p->b.row_is_k ? CblasNoTrans : CblasTrans, p->m,
                    p->n, p->k, 1, (const float *)p->a.p, (int)p->a.ld, (const float *)p->b.p, (int)p->b.ld, 0, (float *)p->out,
                    (int)p->ld);
    }
}
#endif

// groups products of the given shape, m or k being divided among the groups; kind 0: x W^T, 1: dout W, 2: dout^T x
void bench_product(const char *name, int kind, int groups, int m, int n, int k) {
    real *a = allocate_reals((size_t)m * k), *b = allocate_reals((size_t)n * k * groups), *out = allocate_reals((size_t)m * n * groups);
    for (size_t i = 0; i < (size_t)m * k; i++)
        a[i] = (real)random_uniform(1, i);
    for (size_t i = 0; i < (size_t)n * k * groups; i++)
        b[i] = (real)random_uniform(2, i);
    Case c = {name, (Product *)allocate((size_t)groups, sizeof(Product)), groups};
    for (int g = 0; g < groups; g++) {
        Product *p = &c.list[g];
        size_t first = (size_t)g * (kind == 2 ? k / groups : m / groups);
        p->m = kind == 2 ? m : m / groups;
        p->n = n;
        p->k = kind == 2 ? k / groups : k;
        p->a = kind == 2 ? along_columns(a + first * m, m, NULL) : along_rows(a + first * k, k, NULL);
        p->b = kind == 0   ? along_rows(b + (size_t)g * n * k, k, NULL)
               : kind == 1 ? along_columns(b + (size_t)g * n * k, n, NULL)
                           : along_columns(b + first * n, n, NULL);
        p->out = kind == 2 ? out + (size_t)g * m * n : out + first * n;
        p->ld = (size_t)n;
    }
    double work = 2.0 * m * n * k, ours = work / time_call(call_products, &c);
    printf("  %-24s %2d x %5d x %5d x %5d  %7.1f GFLOP/s  %3.0f%% of peak", name, groups, c.list[0].m, n, c.list[0].k, ours / 1e9,
           100 * ours / peak);
#ifdef OPENBLAS
    double blas = work / time_call(call_blas, &c);
    printf("  %7.1f OpenBLAS, ratio %.2f", blas / 1e9, ours / blas);
#endif
    printf("\n");
    free(a);
    free(b);
    free(out);
    free(c.list);
}

Model *model;
int *inputs, *targets;

void call_forward(void *arg) {
    (void)arg;
    model_forward(model, inputs, targets, model->config.batch, model->config.seq, TRAIN_MODE, 1, 1, 0);
}

void call_backward(void *arg) {
    (void)arg;
    model_backward(model);
}

void call_update(void *arg) {
    (void)arg;
    model_update(model, 1, 1e-9, gradient_norm(model));
}

void call_attention_forward(void *arg) {
    const Config *c = (const Config *)arg;
    LayerState *s = model->layers;
    attention_forward(s->att, s->lse, s->qkv, c->batch, c->seq, c->heads, c->kv_heads, c->dim / c->heads, model->attention);
}

void call_attention_backward(void *arg) {
    const Config *c = (const Config *)arg;
    LayerState *s = model->layers;
    attention_backward(model->dqkv, model->dx, s->att, s->lse, s->qkv, c->batch, c->seq, c->heads, c->kv_heads, c->dim / c->heads,
                       model->attention);
}

void call_ffn_forward(void *arg) {
    const Config *c = (const Config *)arg;
    ffn_forward(model, 0, model->layers, model->x, c->batch * c->seq, c->seq);
}

void call_ffn_backward(void *arg) {
    const Config *c = (const Config *)arg;
    ffn_backward(model, 0, model->layers, model->dh, model->dx, c->batch * c->seq, c->seq);
}

void call_norm(void *arg) {
    const Config *c = (const Config *)arg;
    rmsnorm_forward(model->h, model->rstd, model->x, model->weights.norm, c->batch * c->seq, c->dim, c->norm_eps);
}

void call_head(void *arg) {
    const Config *c = (const Config *)arg;
    head_loss(model->nll, model->dh, model->grads.head, model->h, model->weights.head, targets, c->batch * c->seq, c->dim, c->vocab,
              1e-9, model->logits, model->head_rows);
}

// Times the parts of a training step of one configuration; returns the seconds of a step.
double bench_model(Config *c) {
    int N = c->batch * c->seq, D = c->dim / c->heads;
    model = model_allocate(c, N, 1, NULL);
    model_init(model, NULL);
    inputs = (int *)allocate((size_t)N, sizeof(int));
    targets = (int *)allocate((size_t)N, sizeof(int));
    for (int i = 0; i < N; i++) {
        inputs[i] = (int)(hash64((uint64_t)i) % (uint64_t)c->vocab);
        targets[i] = (int)(hash64((uint64_t)i + 1) % (uint64_t)c->vocab);
    }
    double forward = time_call(call_forward, c), backward = time_call(call_backward, c), update = time_call(call_update, c);
    double step = forward + backward + update, flops = flops_per_token(c);
    printf("%s, %d layers of width %d, %d tokens a step\n", c->recipe, c->layers, c->dim, N);
    printf("  step %8.1f ms  %7.0f tokens/s  %6.1f GFLOP/s  %3.0f%% of peak: forward and head %.1f, backward %.1f, update %.1f ms\n",
           step * 1e3, N / step, N * flops / step / 1e9, 100 * N * flops / step / peak, forward * 1e3, backward * 1e3, update * 1e3);
    // operations of one layer, forward
    double attention = 2.0 * N * c->seq * c->dim, ffn = 2.0 * N * c->dim * (1 + is_gated(c->activation) + 1) * (c->topk + c->shared) * c->ffn;
    const struct {
        const char *name;
        void (*call)(void *);
        double work;
    } parts[] = {{"attention forward", call_attention_forward, attention},
                 {"attention backward", call_attention_backward, 2 * attention},
                 {"feed-forward forward", call_ffn_forward, ffn},
                 {"feed-forward backward", call_ffn_backward, 2 * ffn},
                 {"rmsnorm forward", call_norm, 3.0 * N * c->dim},
                 {"head, both ways", call_head, 6.0 * N * c->dim * c->vocab}};
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        double t = time_call(parts[i].call, c);
        printf("  one %-22s %8.2f ms  %7.1f GFLOP/s  %3.0f%% of peak\n", parts[i].name, t * 1e3, parts[i].work / t / 1e9,
               100 * parts[i].work / t / peak);
    }
    (void)D;
    model_free(model);
    free(inputs);
    free(targets);
    return step;
}

int main(int argc, char **argv) {
    program_name = "bench";
    static Config c;
    parse_command_line(&c, argc, argv);
    config_check(&c);
    use_threads(&c);
    c.vocab = 4096;
    char device[128];
    device_name(device);
    peak = measured_peak();
    int N = c.batch * c.seq, C = c.dim, F = c.ffn, E = c.experts, K = c.topk, Q = C + 2 * C / c.heads * c.kv_heads;
    printf("%s, %d threads, multiply-add peak %.0f GFLOP/s\n\nproducts: groups x rows x columns x summed\n", device, thread_count(),
           peak / 1e9);
    bench_product("qkv", 0, 1, N, Q, C);
    bench_product("qkv, by input", 1, 1, N, C, Q);
    bench_product("qkv, by weight", 2, 1, Q, C, N);
    bench_product("head", 0, 1, N, c.vocab, C);
    bench_product("experts in", 0, E, N * K, 2 * F, C);
    bench_product("experts in, by input", 1, E, N * K, C, 2 * F);
    bench_product("experts in, by weight", 2, E, 2 * F, C, N * K);
    bench_product("experts out", 0, E, N * K, C, F);
    printf("\n");
    double moe = bench_model(&c);
    Config dense = c;
    dense.recipe = "dense";
    dense.moe_every = 0;
    printf("\n");
    double plain = bench_model(&dense);
    printf("\nthe mixture's tax: a step takes %.2f times the dense one of equal active size\n", moe / plain);
    return 0;
}
