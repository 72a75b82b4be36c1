// dev/bench/bench: how fast train_moe.c is on this machine, and how fast it could be, in one run:
//
//     make bench                          everything; make bench_all also model B beside PyTorch
//     dev/bench/bench [--quick] [--all] PART... of: products attention lstm rows step tax tables generate few_bits yardsticks;
//     --quick leaves out B
//
// On a shared machine a core is half as fast one second as it was the second before. So no two numbers are compared that
// were not taken side by side: in short rounds the peak of multiply-adds, ours and the yardstick take turns, a ratio is
// taken in each round, and the median of all rounds is printed; so is the median of the absolute rates.

#define TRAIN_MOE_NO_MAIN
#include "train_moe.c"
#include "dev/test/plain.h"
#ifdef OPENBLAS
#include <cblas.h>
#endif

#define MODEL_A "--layers 4 --dim 256 --heads 8 --experts 8 --topk 2 --ffn 512 --seq 256 --batch 16"
#define FINE_A  "--layers 4 --dim 256 --heads 8 --experts 64 --topk 16 --ffn 64 --seq 256 --batch 16"
#define SMALL   "--dim 64" // of the default job: 2 layers, 512 tokens a step
#define MODEL_B "--layers 8 --dim 512 --heads 8 --experts 16 --topk 2 --ffn 1024 --seq 512 --batch 8"

// A thing to be timed: double name(void *arg), in which `a` is arg as a Type *
#define CALL(name, Type, ...)     \
    double name(void *arg) {      \
        Type *a = (Type *)arg;    \
        __VA_ARGS__;              \
        return 0;                 \
    }
#define BURST      2e-3 // seconds that a thing has its turn at least
#define PEAK_TIME  3e-3 // and the peak loop
#define MAX_ROUNDS 400

int quick, thorough;

// ---- rounds

typedef struct Thing {
    double (*call)(void *); // returns its rate if it takes its own time, else 0
    void *arg;
    double work; // operations, bytes or tokens of a call
    double rate[MAX_ROUNDS];
} Thing;

int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// of a[i]/b[i], or of a[i] where b is NULL
double median(const double *a, const double *b, int n) {
    double sorted[MAX_ROUNDS];
    for (int i = 0; i < n; i++)
        sorted[i] = b ? a[i] / b[i] : a[i];
    qsort(sorted, (size_t)n, sizeof(double), by_size);
    return n % 2 ? sorted[n / 2] : (sorted[n / 2 - 1] + sorted[n / 2]) / 2;
}

void rest(void) { // other programs' threads, and OpenBLAS's, fall asleep
    if (thread_count() > 1)
        usleep(1000);
}

// Calls a thing so often; returns its rate.
double turn(Thing *t, int times) {
    double done = 0, begin = seconds(), now = begin;
    for (int k = 0; k < times; k++) {
        double start = now, rate = t->call(t->arg);
        now = seconds();
        done += rate > 0 ? rate * (now - start) : t->work;
    }
    return done / (now - begin);
}

// Lets the things take turns for about so many seconds; returns the number of rounds. All turns are about as long as the
// longest call: where the core is shared with others, short turns often escape them and long ones do not.
int take_turns(Thing *list, int count, double budget) {
    double time[8], longest = BURST;
    for (int i = 0; i < count; i++) {
        turn(&list[i], 1); // warms up
        time[i] = -seconds();
        turn(&list[i], 1);
        time[i] += seconds();
        longest = fmax(longest, time[i]);
    }
    int round = 0;
    for (double begin = seconds(); round < 3 || (round < MAX_ROUNDS && seconds() - begin < budget); round++) {
        for (int i = 0; i < count; i++) {
            int k = (i + round) % count; // back and forth, so that none always follows the same one
            k = round / count % 2 ? count - 1 - k : k;
            list[k].rate[round] = turn(&list[k], (int)fmax(1, longest / time[k]));
            rest();
        }
    }
    return round;
}

double budget(double full) {
    return quick ? full / 4 : full;
}

// ---- what the machine can do

void use(int threads) {
    Config c;
    memset(&c, 0, sizeof(c));
    c.threads = threads;
    if (c.threads)
        use_threads(c.threads);
}

// As the trainer measures it at its start, but the mean of a few stretches behind the first one, in which the threads wake
// up. arg: not NULL for one thread.
double peak_loop(void *arg) {
    double work[4];
    peak_work(arg ? 1 : thread_count(), PEAK_TIME / 4, 4, work);
    return (work[1] + work[2] + work[3]) / (PEAK_TIME * 3 / 4);
}
const Thing peak = {peak_loop, NULL, 0, {0}};

typedef struct Array {
    real *p;
    size_t n;
} Array;

#define PIECE 65536
double read_array(void *arg) { // n numbers
    const Array *a = (const Array *)arg;
#pragma omp parallel for
    for (size_t piece = 0; piece < a->n / PIECE; piece++) {
        vec sum[8] = {{0}};
        for (int i = 0; i < PIECE / 8; i += LANES) {
            for (int j = 0; j < 8; j++) // eight streams: of one alone a core is fetching too little at a time
                sum[j] += *(const vec *)(a->p + piece * PIECE + j * (PIECE / 8) + i);
        }
        for (int j = 1; j < 8; j++)
            sum[0] += sum[j];
        peak_result[thread_number() % 64] = vec_sum(sum[0]);
    }
    return 0;
}

double triad(void *arg) { // a third of n numbers = the second third + c * the last third
    const Array *a = (const Array *)arg;
    size_t n = a->n / 3;
    real c = peak_one;
#pragma omp parallel for
    for (size_t i = 0; i < n; i++)
        a->p[i] = a->p[n + i] + c * a->p[2 * n + i];
    return 0;
}

Array far = {NULL, 3 * (size_t)32 * 1024 * 1024}; // 384 MiB: larger than caches

real *random_reals(size_t n) { // in [-0.5, 0.5); aligned like a vector
    real *p = (real *)aligned_alloc(64, (n * sizeof(real) + 127) / 64 * 64);
    if (!p)
        fail("out of memory: %zu numbers", n);
#pragma omp parallel for
    for (size_t i = 0; i < n; i++)
        p[i] = (real)((double)(hash64(i) >> 11) * 0x1p-53 - 0.5);
    return p;
}

void bench_machine(void) {
    char device[128];
    cpu_name(device);
    Thing t[] = {peak, {peak_loop, &far, 0, {0}}, {read_array, &far, (double)far.n * sizeof(real), {0}},
                 {triad, &far, (double)far.n * sizeof(real), {0}}};
    int n = take_turns(t, 4, budget(3));
    printf("%s, vectors of %d bytes\n", device, VECTOR_BYTES);
    printf("multiply-adds: %.0f GFLOP/s with %d threads, %.0f with 1\n", median(t[0].rate, NULL, n) / 1e9, thread_count(),
           median(t[1].rate, NULL, n) / 1e9);
    printf("memory: reads %.1f GB/s, triad (two read, one written) %.1f GB/s\n", median(t[2].rate, NULL, n) / 1e9,
           median(t[3].rate, NULL, n) / 1e9);
}

// ---- products

typedef struct List {
    Product *p;
    int count;
} List;

CALL(call_products, List, products(a->p, a->count, 0))
CALL(call_plain, List, plain_products(a->p, a->count, 0))

double call_blas(void *arg) { // takes gathered rows as if they lay together, which flatters it
    (void)arg;
#ifdef OPENBLAS
    List *l = (List *)arg;
    for (Product *p = l->p; p < l->p + l->count; p++) {
        if (p->m && p->k)
            cblas_sgemm(CblasRowMajor, p->a.row_is_k ? CblasTrans : CblasNoTrans,
                        p->b.row_is_k ? CblasNoTrans : CblasTrans, p->m, p->n, p->k, 1, (const float *)p->a.p,
                        (int)p->a.ld, (const float *)p->b.p, (int)p->b.ld, 0, (float *)p->out, (int)p->ld);
    }
#endif
    return 0;
}

enum { FORWARD, BY_INPUT, BY_WEIGHT };
enum { TOGETHER = 0, GATHERED = 1, RAGGED = 2 };

// groups of `rows` rows of x (rows,in), W (out,in), dout (rows,out): x W^T, dout W or dout^T x. Gathered rows of x are
// picked from half as many tokens; ragged groups have from none to three times the rows.
void bench_product(const char *name, int kind, int groups, int rows, int out, int in, int how) {
    size_t all = 0, most = (size_t)groups * rows * 3 / 2 + 64, weights = (size_t)groups * out * in, at = 0;
    real *x = random_reals(most * in), *dout = random_reals(most * out), *w = random_reals(weights);
    int *token = (int *)allocate(most, sizeof(int));
    for (size_t i = 0; i < most; i++)
        token[i] = (int)(hash64(i) % (most / 2));
    List ours = {(Product *)allocate(groups, sizeof(Product)), groups};
    List plain = {(Product *)allocate(groups, sizeof(Product)), groups};
    double work = 0, plain_work = 0;
    for (int g = 0; g < groups; g++, at += all) {
        double place = groups > 1 ? (double)g / (groups - 1) : 0;
        all = how & RAGGED ? (size_t)(3 * place * place * rows) : (size_t)rows;
        const int *index = how & GATHERED ? token + at : NULL;
        real *own_x = index ? x : x + at * in, *own_w = w + (size_t)g * out * in, *own_dout = dout + at * out;
        Product list[] = {
            {own_dout, (size_t)out, along_rows(own_x, in, index), along_rows(own_w, in, NULL), (int)all, out, in},
            {x + at * in, (size_t)in, along_rows(own_dout, out, NULL), along_columns(own_w, in, NULL), (int)all, in, out},
            {own_w, (size_t)in, along_columns(own_dout, out, NULL), along_columns(own_x, in, index), out, in, (int)all}};
        Product p = list[kind];
        ours.p[g] = p;
        work += 2.0 * p.m * p.n * p.k;
        p.m = min_int(p.m, max_int(thread_count(), (int)(3e7 / groups / ((double)p.n * p.k + 1))));
        plain.p[g] = p;
        plain_work += 2.0 * p.m * p.n * p.k;
    }
    double start = seconds();
    call_plain(&plain);
    double by_plain = plain_work / (seconds() - start);
    Thing t[3] = {peak, {call_products, &ours, work, {0}}, {call_blas, &ours, work, {0}}};
#ifdef OPENBLAS
    int n = take_turns(t, 3, budget(0.5));
#else
    int n = take_turns(t, 2, budget(0.5));
#endif
    double rate = median(t[1].rate, NULL, n);
    printf("  %-22s %2d x %5d x %4d x %4d  %7.1f GFLOP/s %3.0f%% of peak", name, groups, kind == BY_WEIGHT ? out : rows,
           kind == FORWARD ? out : in, kind == FORWARD ? in : kind == BY_INPUT ? out : rows, rate / 1e9,
           100 * median(t[1].rate, t[0].rate, n));
#ifdef OPENBLAS
    printf("  %5.2f x OpenBLAS", median(t[1].rate, t[2].rate, n));
#endif
    printf("  %4.0f x plain loops\n", rate / by_plain);
    fflush(stdout);
    free(x), free(dout), free(w), free(token), free(ours.p), free(plain.p);
}

void bench_products(void) {
    const int N = 4096, C = 256, V = 4096;
    printf("\nproducts: groups x rows x columns x summed");
#ifdef OPENBLAS
    openblas_set_num_threads(thread_count());
    printf("; OpenBLAS for %s, %d threads", openblas_get_corename(), openblas_get_num_threads());
#endif
    printf("\n");
    bench_product("qkv", FORWARD, 1, N, 3 * C, C, TOGETHER);
    bench_product("qkv, by input", BY_INPUT, 1, N, 3 * C, C, TOGETHER);
    bench_product("qkv, by weight", BY_WEIGHT, 1, N, 3 * C, C, TOGETHER);
    bench_product("proj", FORWARD, 1, N, C, C, TOGETHER);
    bench_product("head", FORWARD, 1, N, V, C, TOGETHER);
    bench_product("head, by input", BY_INPUT, 1, N, V, C, TOGETHER);
    bench_product("head, by weight", BY_WEIGHT, 1, N, V, C, TOGETHER);
    const int experts[][3] = {{8, 1024, 512}, {64, 256, 64}}; // groups, rows, F
    for (int i = 0; i < 2; i++) {
        int G = experts[i][0], R = experts[i][1], F = experts[i][2];
        bench_product("experts in", FORWARD, G, R, 2 * F, C, GATHERED);
        bench_product("experts in, by input", BY_INPUT, G, R, 2 * F, C, TOGETHER);
        bench_product("experts in, by weight", BY_WEIGHT, G, R, 2 * F, C, GATHERED);
        bench_product("experts out", FORWARD, G, R, C, F, TOGETHER);
        bench_product("experts out, by weight", BY_WEIGHT, G, R, C, F, TOGETHER);
        bench_product("ragged in", FORWARD, G, R, 2 * F, C, GATHERED + RAGGED);
        bench_product("ragged in, by weight", BY_WEIGHT, G, R, 2 * F, C, GATHERED + RAGGED);
    }
    const int rows[] = {16, 64, 128, 512};
    for (int i = 0; i < 8; i++)
        bench_product("groups", FORWARD, i < 4 ? 8 : 64, rows[i % 4], 1024, 256, GATHERED);
}

// ---- attention

typedef struct Heads {
    int B, T, H, D;
    real *qkv, *out, *lse, *dout, *dqkv;
} Heads;

CALL(call_attention_forward, Heads, attention_forward(a->out, a->lse, a->qkv, a->B, a->T, a->H, a->H, a->D))
CALL(call_attention_backward, Heads,
     attention_backward(a->dqkv, a->dout, a->out, a->lse, a->qkv, a->B, a->T, a->H, a->H, a->D))

void bench_attention(void) {
    printf("\nattention: sequences x tokens x heads x width; half of all pairs counted, backward as twice forward\n");
    const Heads sizes[] = {{16, 256, 8, 32, 0, 0, 0, 0, 0}, {8, 512, 8, 64, 0, 0, 0, 0, 0},
                           {4, 1024, 8, 64, 0, 0, 0, 0, 0}, {2, 2048, 8, 64, 0, 0, 0, 0, 0}};
    for (int i = 0; i < 4; i++) {
        Heads a = sizes[i];
        int N = a.B * a.T, C = a.H * a.D;
        double work = 2.0 * N * a.T * C; // two products of half a (T,T) matrix; backward is five, of which one is anew
        a.qkv = random_reals((size_t)N * 3 * C), a.dqkv = random_reals((size_t)N * 3 * C);
        a.out = random_reals((size_t)N * C), a.dout = random_reals((size_t)N * C), a.lse = random_reals((size_t)N * a.H);
        real *w = random_reals((size_t)3 * C * C), *x = random_reals((size_t)N * C);
        Product qkv = {a.dqkv, (size_t)(3 * C), along_rows(x, C, NULL), along_rows(w, C, NULL), N, 3 * C, C};
        List product_list = {&qkv, 1};
        Thing t[] = {peak, {call_attention_forward, &a, work, {0}}, {call_attention_backward, &a, 2 * work, {0}},
                     {call_products, &product_list, 6.0 * N * C * C, {0}}};
        int n = take_turns(t, 4, budget(1.5));
        for (int k = 1; k < 3; k++)
            printf("  %-8s %2d x %4d x %d x %2d  %7.1f GFLOP/s  %3.0f%% of peak  %3.0f%% of the qkv product\n",
                   k == 1 ? "forward" : "backward", a.B, a.T, a.H, a.D, median(t[k].rate, NULL, n) / 1e9,
                   100 * median(t[k].rate, t[0].rate, n), 100 * median(t[k].rate, t[3].rate, n));
        fflush(stdout);
        free(a.qkv), free(a.out), free(a.lse), free(a.dout), free(a.dqkv), free(w), free(x);
    }
}

// ---- models

typedef struct Trainee {
    const char *name;
    Model *model;
    int *inputs, *targets;
    double work; // operations of a step
    int threads;
    double total[MAX_ROUNDS], part[3][MAX_ROUNDS]; // seconds: of a step; forward, backward, update
    double possible[MAX_ROUNDS];                   // operations of the peak loop in that time
} Trainee;

Config read_config(const char *recipe, const char *line) {
    Config c;
    char text[512];
    char *words[64] = {NULL};
    int count = 0;
    snprintf(text, sizeof(text), "bench --recipe %s --optimizer adamw --beta2 0.95 %s", recipe, line);
    for (char *word = strtok(text, " "); word; word = strtok(NULL, " "))
        words[count++] = word;
    parse_command_line(&c, count, words);
    config_check(&c);
    c.vocab = 4096;
    return c;
}

// model_init would draw a normal number for each weight, which takes longer than the bench
Model *random_model(const Config *c, int N, int train) {
    Model *m = model_allocate(c, N, train, NULL);
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        real *w = m->memory[WEIGHTS] + t->offset;
#pragma omp parallel for
        for (size_t j = 0; j < t->size; j++)
            w[j] = (real)(t->init == INIT_ONE ? 1 : ((double)(hash64(t->offset + j) >> 11) * 0x1p-53 - 0.5) * 0.07);
    }
    return m;
}

void run_batch(Trainee *t, int B) {
    Batch batch = {t->inputs, t->targets, B, t->model->config.seq, TRAIN_MODE, 1, 1, 0, 1, 1};
    model_forward(t->model, &batch);
}

Trainee *new_trainee(const char *name, const char *recipe, const char *options) {
    Config c = read_config(recipe, options);
    Trainee *t = (Trainee *)allocate(1, sizeof(Trainee));
    int N = c.batch * c.seq;
    t->name = name;
    t->model = random_model(&c, N, 1);
    t->work = N * flops_per_token(&c);
    t->threads = thread_count();
    t->inputs = (int *)allocate((size_t)N, sizeof(int));
    t->targets = (int *)allocate((size_t)N, sizeof(int));
    for (int i = 0; i < N; i++) {
        t->inputs[i] = (int)(hash64((uint64_t)i) % (uint64_t)c.vocab);
        t->targets[i] = (int)(hash64((uint64_t)i + 1) % (uint64_t)c.vocab);
    }
    run_batch(t, 1); // the memory becomes real
    model_backward(t->model);
    model_update(t->model, 1, 1e-9, gradient_norm(t->model));
    return t;
}

void free_trainee(Trainee *t) {
    model_free(t->model);
    free(t->inputs), free(t->targets), free(t);
}

double peak_now(void) {
    Thing t = peak;
    return turn(&t, 10);
}

// A step with turns of the peak loop before, between and after its parts.
void train_step(Trainee *t, int round) {
    const Config *c = &t->model->config;
    int threads = thread_count();
    use(t->threads);
    double before = peak_now();
    t->total[round] = t->possible[round] = 0;
    for (int part = 0; part < 3; part++) {
        double start = seconds();
        if (part == 0)
            run_batch(t, c->batch);
        else if (part == 1)
            model_backward(t->model);
        else
            model_update(t->model, 1, 1e-9, gradient_norm(t->model));
        double time = seconds() - start, after = peak_now();
        t->part[part][round] = time;
        t->total[round] += time;
        t->possible[round] += time * (before + after) / 2;
        before = after;
    }
    multiply_in(PRODUCTS_FP32); // what follows outside of a model
    use(threads);
    rest();
}

int train_in_turn(Trainee **list, int count, double seconds_for_all) {
    int round = 0;
    for (double begin = seconds(); round < 3 || (round < MAX_ROUNDS && seconds() - begin < seconds_for_all); round++) {
        for (int i = 0; i < count; i++)
            train_step(list[(i + round) % count], round);
    }
    return round;
}

void print_step(const Trainee *t, int n) {
    const Config *c = &t->model->config;
    double step = median(t->total, NULL, n), share[MAX_ROUNDS];
    for (int i = 0; i < n; i++)
        share[i] = t->work / t->possible[i];
    printf("  %-26s %2d thread%s %7.0f ms %6.0f tokens/s %6.1f GFLOP/s %3.0f%% of peak; forward and head %.0f, backward %.0f, "
           "update %.0f ms\n",
           t->name, t->threads, t->threads > 1 ? "s" : " ", step * 1e3, c->batch * c->seq / step, t->work / step / 1e9,
           100 * median(share, NULL, n), median(t->part[0], NULL, n) * 1e3, median(t->part[1], NULL, n) * 1e3,
           median(t->part[2], NULL, n) * 1e3);
}

CALL(call_layer_attention, Model, const Config *c = &a->config; LayerActs *x = a->acts.layer; int D = head_width(c);
     scratch_reset(a); real *dqkv = scratch(a, (size_t)c->batch * c->seq * (c->heads + 2 * c->kv_heads) * D);
     attention_forward(x->att, x->lse, x->qkv, c->batch, c->seq, c->heads, c->kv_heads, D);
     attention_backward(dqkv, a->dx, x->att, x->lse, x->qkv, c->batch, c->seq, c->heads, c->kv_heads, D))
CALL(call_layer_ffn, Model, feed_forward(a, 0, a->acts.x); feed_backward(a, 0, a->acts.dh, a->dx))
CALL(call_head, Trainee, Model *m = a->model; const Config *c = &m->config; int N = c->batch * c->seq;
     int rows = logit_rows(N, c->vocab); scratch_reset(m);
     head_loss(m->acts.nll, m->acts.dh, m->grads.head, m->acts.h, m->params.head, a->targets, N, c->dim, c->vocab, 1e-9,
               scratch(m, (size_t)rows * c->vocab), rows))

void bench_parts(Trainee *t) {
    const Config *c = &t->model->config;
    double N = (double)c->batch * c->seq, in = c->dim * (1.0 + is_gated(c->activation) + 1) * (c->topk + c->shared) * c->ffn;
    const char *const names[] = {"", "one layer's attention", "one layer's feed-forward", "the head"};
    Thing part[] = {peak, {call_layer_attention, t->model, 6 * N * c->seq * c->dim, {0}}, {call_layer_ffn, t->model, 6 * N * in, {0}},
                    {call_head, t, 6 * N * c->dim * c->vocab, {0}}};
    int n = take_turns(part, 4, budget(3));
    for (int i = 1; i < 4; i++)
        printf("    %-24s both ways  %8.1f ms  %6.1f GFLOP/s %3.0f%% of peak\n", names[i],
               part[i].work / median(part[i].rate, NULL, n) * 1e3, median(part[i].rate, NULL, n) / 1e9,
               100 * median(part[i].rate, part[0].rate, n));
}

// The step of a model with all threads and with one, and beside dense models of equal active size.
void bench_model(const char *letter, const char *options, const char *fine, int step, int tax, double time) {
    printf("\na training step of model %s: %s\n", letter, options);
    Trainee *list[5], *mixture = new_trainee("mixture", "mixtral", options), single, *alone = NULL, *dense = NULL, *narrow = NULL;
    Trainee *low = NULL;
    int count = 0;
    list[count++] = mixture;
    const char *products = ready_products(PRODUCTS_BF16); // with PLAIN=1 it has none
    if (step && *products) {
        char rounded[512];
        snprintf(rounded, sizeof(rounded), "%s --precision bf16", options);
        printf("  (products of --precision bf16%s)\n", products);
        list[count++] = low = new_trainee("mixture, bf16", "mixtral", rounded);
    }
    if (step && thread_count() > 1) {
        single = *mixture;
        single.threads = 1;
        list[count++] = alone = &single;
    }
    if (tax)
        list[count++] = dense = new_trainee("dense, as many at work", "dense", options);
    if (tax && fine)
        list[count++] = narrow = new_trainee("64 experts, top 16", "mixtral", fine);
    int n = train_in_turn(list, count, budget(time));
    for (int i = 0; i < count; i++) {
        print_step(list[i], n);
        if (i == 0 && step)
            bench_parts(mixture);
    }
    if (low)
        printf("  bf16 takes %.2f times the time of fp32\n", median(low->total, mixture->total, n));
    if (alone) {
        double speed[MAX_ROUNDS]; // what the peak loop gained
        for (int i = 0; i < n; i++)
            speed[i] = mixture->possible[i] / mixture->total[i] / (alone->possible[i] / alone->total[i]);
        printf("  %d threads are %.2f times as fast as 1; the peak loop: %.2f times\n", mixture->threads,
               median(alone->total, mixture->total, n), median(speed, NULL, n));
    }
    Trainee *with_experts[] = {mixture, narrow};
    for (int i = 0; dense && i < 2 && with_experts[i]; i++)
        printf("  tax: %s takes %.2f times the time of dense (by the peak loop's clock %.2f)\n", with_experts[i]->name,
               median(with_experts[i]->total, dense->total, n), median(with_experts[i]->possible, dense->possible, n));
    free_trainee(mixture);
    if (low)
        free_trainee(low);
    if (dense)
        free_trainee(dense);
    if (narrow)
        free_trainee(narrow);
    fflush(stdout);
}

// ---- row by row

enum { ROWS = 65536, ROW_WIDTH = 512, WORDS = 4096, HIDDEN = 1024 }; // arrays of 128 to 256 MiB, so that none stays in a cache
typedef struct Rows {
    real *a, *b, *c, *d, *w, *rstd;
    int *row;
    Model *model;
} Rows;

CALL(call_softmax, Rows, _Pragma("omp parallel for") for (int i = 0; i < ROWS / 4; i++)
     softmax(a->a + (size_t)i * WORDS, WORDS))
CALL(call_norm_forward, Rows, rmsnorm_forward(a->b, a->rstd, a->a, a->w, ROWS, ROW_WIDTH, 1e-5))
CALL(call_norm_backward, Rows, rmsnorm_backward(a->c, a->d, a->b, a->a, a->rstd, a->w, ROWS, ROW_WIDTH))
CALL(call_activation_forward, Rows, activation_forward(a->b, a->a, ROWS / 2, HIDDEN, SWIGLU))
CALL(call_activation_backward, Rows,
     activation_backward(a->c, NULL, a->b, a->a, NULL, NULL, ROWS / 2, HIDDEN, SWIGLU))
CALL(call_combine, Rows, combine(a->b, a->a, a->w, a->row, ROWS, 2, ROW_WIDTH))
CALL(call_gradient_norm, Rows, peak_result[0] = (real)gradient_norm(a->model))
CALL(call_update, Rows, model_update(a->model, 1, 1e-9, 1))

void bench_rows(void) {
    Config c = read_config("mixtral", "--layers 2 --dim 512 --experts 16 --ffn 1024 --seq 16 --batch 1");
    size_t size = (size_t)ROWS * 2 * ROW_WIDTH; // 256 MiB; also (ROWS/4, WORDS), (ROWS/2, 2*HIDDEN)
    Rows r = {random_reals(size), random_reals(size), random_reals(size), random_reals(ROW_WIDTH), random_reals(2 * ROWS),
              random_reals(ROWS), NULL, random_model(&c, 16, 1)};
    r.row = (int *)allocate(2 * ROWS, sizeof(int));
    for (int i = 0; i < 2 * ROWS; i++) // a permutation
        r.row[i] = (int)((unsigned)i * 40503u % (2 * ROWS));
    double n = (double)ROWS * ROW_WIDTH, h = (double)ROWS / 2 * HIDDEN, weights = (double)r.model->size;
    const struct {
        const char *name;
        double (*call)(void *);
        double numbers; // that have to come from memory or go there; what a write fetches first is not counted
    } list[] = {{"softmax, 4096 wide", call_softmax, 2 * (double)ROWS / 4 * WORDS}, // in place
                {"rmsnorm forward", call_norm_forward, 2 * n},                      // x; out
                {"rmsnorm backward", call_norm_backward, 4 * n},                    // x, dout, dx; dx
                {"SwiGLU forward", call_activation_forward, 3 * h},                 // gate, up; act
                {"SwiGLU backward", call_activation_backward, 6 * h},               // gate, up, dact; their gradients, act
                {"combine, top 2", call_combine, 4 * n},                            // two rows, out; out
                {"gradient norm", call_gradient_norm, weights},
                {"AdamW", call_update, 8 * weights}}; // weight, gradient, both moments; the same
    printf("\nrow by row, on arrays that no cache holds; what reads and writes in place may pass the triad, which does not\n");
    for (int i = 0; i < (int)(sizeof(list) / sizeof(list[0])); i++) {
        Thing t[] = {{list[i].call, &r, list[i].numbers * sizeof(real), {0}},
                     {read_array, &far, (double)far.n * sizeof(real), {0}},
                     {triad, &far, (double)far.n * sizeof(real), {0}}};
        int rounds = take_turns(t, 3, budget(1));
        printf("  %-20s %6.1f GB/s  %3.0f%% of reading  %3.0f%% of triad\n", list[i].name, median(t[0].rate, NULL, rounds) / 1e9,
               100 * median(t[0].rate, t[1].rate, rounds), 100 * median(t[0].rate, t[2].rate, rounds));
        fflush(stdout);
    }
    model_free(r.model);
    free(r.a), free(r.b), free(r.c), free(r.d), free(r.w), free(r.rstd), free(r.row);
}

// ---- tables that are looked up

double thread_seconds(void) { // of this thread alone, so that it does not count when other programs have the processor
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

double fastest(const double *a, int n) {
    double least = a[0];
    for (int i = 1; i < n; i++)
        least = fmin(least, a[i]);
    return least;
}

// Each step has other words, drawn evenly, so nearly each of its pairs and triples has a row that no step before has read.
void table_step(Trainee *t, int round) {
    const Config *c = &t->model->config;
    for (int i = 0; i < c->batch * c->seq; i++)
        t->inputs[i] = (int)(hash64((uint64_t)round << 32 | (uint64_t)i) % (uint64_t)c->vocab);
    double start = thread_seconds();
    run_batch(t, c->batch);
    t->part[0][round] = thread_seconds() - start;
    model_backward(t->model);
    t->part[1][round] = thread_seconds() - start - t->part[0][round];
    model_update(t->model, 1, 1e-9, gradient_norm(t->model));
    t->total[round] = thread_seconds() - start;
    t->part[2][round] = t->total[round] - t->part[0][round] - t->part[1][round];
}

// A step of the default job at --dim 64, with no table, a small one and a large one.
void bench_tables(void) {
    enum { LIST = 3 };
    const char *const names[LIST] = {"no table", "1,000 rows", "1,000,000 rows"};
    const char *const more[LIST] = {"", "--ngrams 1000 --ngram-order 3 --ngram-gate", "--ngrams 1000000 --ngram-order 3 --ngram-gate"};
    Trainee *list[LIST];
    int threads = thread_count(), round = 0;
    printf("\na training step with a table of word pairs and triples: %s, and --ngrams ROWS --ngram-order 3 --ngram-gate; one thread, "
           "and its own time\n",
           SMALL);
    use(1);
    for (int i = 0; i < LIST; i++) {
        char options[256];
        snprintf(options, sizeof(options), "%s %s --optimizer muon", SMALL, more[i]);
        list[i] = new_trainee(names[i], "mixtral", options);
        Model *m = list[i]->model;
        for (int what = GRADS; what <= MOMENT2; what++) // all pages are there, as after a long run
            memset(m->memory[what] + m->tables, 0, (m->size - m->tables) * sizeof(real));
    }
    for (double begin = seconds(), time = budget(15); round < 3 || (round < MAX_ROUNDS && seconds() - begin < time); round++) {
        for (int i = 0; i < LIST; i++)
            table_step(list[(i + round) % LIST], round);
    }
    for (int i = 0; i < LIST; i++) {
        const Trainee *t = list[i];
        printf("  %-14s %6.2f ms (median of %d), %3.0f%% of that with 1,000 rows; at least %6.2f ms, %3.0f%%: forward and head %.2f, "
               "backward %.2f, update %.2f; four arrays of %.0f MB\n",
               t->name, median(t->total, NULL, round) * 1e3, round, 100 * median(t->total, list[1]->total, round),
               fastest(t->total, round) * 1e3, 100 * fastest(t->total, round) / fastest(list[1]->total, round),
               fastest(t->part[0], round) * 1e3, fastest(t->part[1], round) * 1e3, fastest(t->part[2], round) * 1e3,
               sizeof(real) * (double)t->model->size / 1e6);
        fflush(stdout);
        free_trainee(list[i]);
    }
    use(threads);
}

// ---- generation

typedef struct Writer {
    Model *model;
    real *logits;
    int made;
} Writer;

// a token, somewhere after the 64th
CALL(call_generate, Writer, int made = a->made++;
     model_generate(a->model, (int)(hash64((uint64_t)made) % 4096), 64 + made % 64, a->logits))

void bench_generation(void) {
    const char *const models[] = {MODEL_A, MODEL_B};
    printf("\ngeneration at batch 1, around position 100, beside the time to read the active weights once (keys and values not "
           "counted)\n");
    for (int i = 0; i < (quick ? 1 : 2); i++) {
        Config c = read_config("mixtral", models[i]);
        double total, active;
        count_parameters(&c, &total, &active);
        int threads = thread_count();
        for (int used = threads; used > 0; used = used > 1 ? 1 : 0) { // one thread, too: so small a work may not pay for two
        use(used);
            Writer w = {random_model(&c, 1, 0), allocate_reals(4096), 0};
            Array all = {(real *)(((size_t)w.model->memory[WEIGHTS] + 63) / 64 * 64), w.model->size - 16};
            Thing t[] = {{call_generate, &w, 4.0 * active, {0}}, {read_array, &all, 4.0 * (double)all.n, {0}}};
            int n = take_turns(t, 2, budget(2));
            double rate = median(t[0].rate, NULL, n), share = median(t[0].rate, t[1].rate, n);
            printf("  model %c, %2d thread%s  %6.0f tokens/s  %5.1f GB/s  %3.0f%% of the bound; read bandwidth over all %.0f MB of "
                   "weights %.1f GB/s\n",
                   'A' + i, used, used > 1 ? "s" : " ", rate / (4 * active), rate / 1e9, 100 * share, 4 * total / 1e6,
                   median(t[1].rate, NULL, n) / 1e9);
            fflush(stdout);
            free(w.logits);
            model_free(w.model);
        }
        use(threads);
    }
}

// ---- yardsticks: other programs, which take a step whenever a line reaches them and answer with GFLOP/s

typedef struct Yardstick {
    FILE *answers;
    int asks;
    const Trainee *ours;
    char name[128];
    double rate[MAX_ROUNDS], ratio[MAX_ROUNDS];
} Yardstick;

// Returns 0 where the program is missing, or PyTorch is.
int start_yardstick(Yardstick *y, const Trainee *ours, const char *program, const char *options) {
    char command[1024];
    int ends[2];
    if (pipe(ends) != 0)
        fail("no pipe: %s", strerror(errno));
    fcntl(ends[1], F_SETFD, FD_CLOEXEC); // or one program would hold another one's pipe open
    snprintf(command, sizeof(command), "%s %s --threads %d --turns < /dev/fd/%d", program, options, thread_count(), ends[0]);
    fflush(stdout);
    y->answers = popen(command, "r");
    close(ends[0]);
    y->asks = ends[1];
    y->ours = ours;
    if (y->answers && fgets(y->name, sizeof(y->name), y->answers) && sscanf(y->name, "ready: %127[^\n]", y->name) == 1)
        return 1;
    printf("  %s", *y->name ? y->name : "no answer\n");
    return 0;
}

void bench_yardsticks(const char *letter, const char *options, int loops, double time) {
    printf("\nyardsticks for model %s, our steps and theirs by turns\n", letter);
    char python[512];
    snprintf(python, sizeof(python), "%s dev/bench/torch_step.py", getenv("TORCH_PYTHON") ? getenv("TORCH_PYTHON") : "python3");
    Trainee *ours[2] = {new_trainee("ours, mixture", "mixtral", options), new_trainee("ours, dense", "dense", options)};
    static Yardstick list[3];
    char dense[512];
    snprintf(dense, sizeof(dense), "%s --dense", options);
    int count = 0, round = 0;
    memset(list, 0, sizeof(list));
    count += start_yardstick(&list[count], ours[0], python, options);
    if (count) // no PyTorch, no second one
        count += start_yardstick(&list[count], ours[1], python, dense);
    if (loops)
        count += start_yardstick(&list[count], ours[1], "dev/bench/llmc_step", options);
    for (double begin = seconds(); count && (round < 3 || (round < MAX_ROUNDS && seconds() - begin < time)); round++) {
        for (int i = 0; i < count; i++) {
            Yardstick *y = &list[i];
            if (i == 0 || y->ours != list[i - 1].ours)
                train_step((Trainee *)y->ours, round);
            if (write(y->asks, "\n", 1) != 1 || fscanf(y->answers, "%lf", &y->rate[round]) != 1)
                fail("%s ended", y->name);
            y->ratio[round] = y->ours->work / y->ours->total[round] / 1e9 / y->rate[round];
            rest();
        }
    }
    for (int i = 0; i < count; i++) {
        const Yardstick *y = &list[i];
        double rate = median(y->rate, NULL, round);
        if (i == 0 || y->ours != list[i - 1].ours)
            print_step(y->ours, round);
        printf("  %-40s %6.0f tokens/s %6.1f GFLOP/s; ours is %.2f times as fast\n", y->name,
               rate * 1e9 / y->ours->work * y->ours->model->max_tokens, rate, median(y->ratio, NULL, round));
        close(y->asks);
        pclose(y->answers);
    }
    free_trainee(ours[0]);
    free_trainee(ours[1]);
    fflush(stdout);
}

#include "few_bits.h" // generation with experts of 8 and 4 bits
#include "lstm.h"     // the LSTM, alone and beside PyTorch's

int main(int argc, char **argv) {
    const char *const parts[] = {"products", "attention", "lstm", "rows", "step", "tax", "tables",
                                 "generate", "few_bits", "yardsticks"};
    enum { PRODUCTS, ATTENTION, AN_LSTM, ROW_BY_ROW, A_STEP, TAX, TABLES, GENERATE, FEW_BITS, YARDSTICKS, PARTS };
    int wanted[PARTS] = {0}, any = 0;
    program_name = "bench";
    for (int i = 1; i < argc; i++) {
        int part = 0;
        while (part < PARTS && strcmp(argv[i], parts[part]))
            part++;
        if (!strcmp(argv[i], "--quick"))
            quick = 1;
        else if (!strcmp(argv[i], "--all"))
            thorough = 1;
        else if (part < PARTS)
            wanted[part] = any = 1;
        else
            fail("%s is none of --quick, --all, products, attention, lstm, rows, step, tax, tables, generate, few_bits, yardsticks",
                 argv[i]);
    }
    for (int i = 0; !any && i < PARTS; i++)
        wanted[i] = 1;
    any = wanted[A_STEP] || wanted[TAX];
    signal(SIGPIPE, SIG_IGN);
    far.p = random_reals(far.n);
    double start = seconds();
    bench_machine();
    if (wanted[PRODUCTS])
        bench_products();
    if (wanted[ATTENTION])
        bench_attention();
    if (wanted[AN_LSTM])
        bench_lstm();
    if (wanted[ROW_BY_ROW])
        bench_rows();
    if (any)
        bench_model("A", MODEL_A, FINE_A, wanted[A_STEP], wanted[TAX], 35);
    if (any && !quick)
        bench_model("B", MODEL_B, NULL, wanted[A_STEP], wanted[TAX], 40);
    if (wanted[TABLES])
        bench_tables();
    if (wanted[GENERATE])
        bench_generation();
    if (wanted[FEW_BITS])
        bench_few_bits();
    if (wanted[YARDSTICKS])
        bench_yardsticks("A", MODEL_A, 1, budget(35));
    if (wanted[YARDSTICKS] && thorough)
        bench_yardsticks("B", MODEL_B, 0, budget(60));
    free(far.p);
    printf("\nall this took %.0f s\n", seconds() - start);
    return 0;
}
