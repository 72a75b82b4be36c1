// dev/bench/llmc_step: the yardstick "loops in the manner of llm.c". llm.c's trainer on the CPU (train_gpt2.c) computes its
// matrix products by plain loops that the compiler makes fast: forward with eight tokens at a time, so that each weight
// read is used eight times; backward once by the input, parallel over tokens, and once by the weight, parallel over its
// rows. Here are such loops (our own), timed on the products of a model of ours with dense layers of equal active size,
// one layer and the head. They flatter llm.c: its attention, softmax and AdamW, which run at a fraction of this, are
// left out.
//
// Built with llm.c's own flags, which train_moe never sees: cc -Ofast -march=native -fopenmp. Options are those of
// train_moe and of dev/bench/torch_step.py, so that one line of them serves all:
//     dev/bench/llmc_step --layers 4 --dim 256 --heads 8 --experts 8 --topk 2 --ffn 512 --seq 256 --batch 16 --threads 2
// With --turns at the end it computes once for each empty line that it reads, and answers with GFLOP/s: dev/bench/bench uses it.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define TOKENS 8 // at a time

// out (N,O) = x (N,C) w^T, w (O,C); N a multiple of TOKENS
void linear_forward(float *out, const float *x, const float *w, int N, int C, int O) {
#pragma omp parallel for
    for (int first = 0; first < N; first += TOKENS) {
        const float *rows = x + (size_t)first * C;
        for (int o = 0; o < O; o++) {
            float sum[TOKENS] = {0};
            for (int c = 0; c < C; c++) {
                float weight = w[(size_t)o * C + c];
                for (int n = 0; n < TOKENS; n++)
                    sum[n] += rows[n * C + c] * weight;
            }
            for (int n = 0; n < TOKENS; n++)
                out[(size_t)(first + n) * O + o] = sum[n];
        }
    }
}

// to (C) += factor * from (C)
static inline void add_scaled(float *to, float factor, const float *from, int C) {
    for (int c = 0; c < C; c++)
        to[c] += factor * from[c];
}

// dx (N,C) += dout (N,O) w;  dw (O,C) += dout^T x
void linear_backward(float *dx, float *dw, const float *dout, const float *x, const float *w, int N, int C, int O) {
#pragma omp parallel for
    for (int n = 0; n < N; n++) {
        for (int o = 0; o < O; o++)
            add_scaled(dx + (size_t)n * C, dout[(size_t)n * O + o], w + (size_t)o * C, C);
    }
#pragma omp parallel for
    for (int o = 0; o < O; o++) {
        for (int n = 0; n < N; n++)
            add_scaled(dw + (size_t)o * C, dout[(size_t)n * O + o], x + (size_t)n * C, C);
    }
}

double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

float *random_floats(size_t n) { // in [-0.5, 0.5)
    float *p = malloc(n * sizeof(float));
    if (!p) {
        fprintf(stderr, "llmc_step: out of memory\n");
        exit(1);
    }
    for (size_t i = 0; i < n; i++)
        p[i] = (float)rand() / (float)RAND_MAX - 0.5f;
    return p;
}

typedef struct Linear {
    const char *name;
    int in, out, times; // times: in a model
    float *x, *w, *y, *dx, *dw, *dy;
    double forward, backward; // seconds, the least so far
} Linear;

// Computes a product once and notes its time, forward and backward, where it is the least; returns both together.
double time_linear(Linear *p, int N) {
    double start = seconds(), middle, end;
    linear_forward(p->y, p->x, p->w, N, p->in, p->out);
    middle = seconds();
    linear_backward(p->dx, p->dw, p->dy, p->x, p->w, N, p->in, p->out);
    end = seconds();
    p->forward = middle - start < p->forward ? middle - start : p->forward;
    p->backward = end - middle < p->backward ? end - middle : p->backward;
    return end - start;
}

int main(int argc, char **argv) {
    enum { LAYERS, DIM, FFN, TOPK, SEQ, BATCH, VOCAB, THREADS, HEADS, EXPERTS, OPTIONS }; // the last two change nothing
    struct {
        const char *name;
        int value;
    } option[OPTIONS] = {{"--layers", 2}, {"--dim", 128},    {"--ffn", 256},   {"--topk", 2},  {"--seq", 256},
                         {"--batch", 2},  {"--vocab", 4096}, {"--threads", 0}, {"--heads", 8}, {"--experts", 8}};
    int turns = argc > 1 && !strcmp(argv[argc - 1], "--turns");
    argc -= turns;
    for (int i = 1; i < argc; i += 2) {
        int k = 0;
        while (k < OPTIONS && strcmp(argv[i], option[k].name))
            k++;
        if (k == OPTIONS || i + 1 == argc || atoi(argv[i + 1]) < 1) {
            fprintf(stderr, "llmc_step: %s: no such option, or no number behind it\n", argv[i]);
            return 2;
        }
        option[k].value = atoi(argv[i + 1]);
    }
    int L = option[LAYERS].value, C = option[DIM].value, V = option[VOCAB].value, threads = 1;
    int F = option[FFN].value * option[TOPK].value, N = option[SEQ].value * option[BATCH].value / TOKENS * TOKENS;
#ifdef _OPENMP
    if (option[THREADS].value)
        omp_set_num_threads(option[THREADS].value);
    threads = omp_get_max_threads();
#endif
    Linear list[] = {{"qkv", C, 3 * C, L, 0, 0, 0, 0, 0, 0, 1e30, 1e30},
                     {"attention out", C, C, L, 0, 0, 0, 0, 0, 0, 1e30, 1e30},
                     {"gate and up", C, 2 * F, L, 0, 0, 0, 0, 0, 0, 1e30, 1e30},
                     {"down", F, C, L, 0, 0, 0, 0, 0, 0, 1e30, 1e30},
                     {"head", C, V, 1, 0, 0, 0, 0, 0, 0, 1e30, 1e30}};
    double work = 0, forward = 0, backward = 0; // work: operations of all products, forward; backward is twice that
    for (int i = 0; i < 5; i++) {
        Linear *p = &list[i];
        p->x = random_floats((size_t)N * p->in), p->dx = random_floats((size_t)N * p->in);
        p->y = random_floats((size_t)N * p->out), p->dy = random_floats((size_t)N * p->out);
        p->w = random_floats((size_t)p->in * p->out), p->dw = random_floats((size_t)p->in * p->out);
        work += 2.0 * N * p->in * p->out * p->times;
        time_linear(p, N); // warms up
    }
    if (turns) {
        printf("ready: loops in the manner of llm.c, products\n");
        fflush(stdout);
        while (getchar() == '\n') {
            double time = 0;
            for (int i = 0; i < 5; i++)
                time += time_linear(&list[i], N) * list[i].times;
            printf("%.3f\n", 3 * work / time / 1e9);
            fflush(stdout);
        }
        return 0;
    }
    printf("loops in the manner of llm.c, %d threads, tokens x columns x summed\n", threads);
    for (int i = 0; i < 5; i++) {
        Linear *p = &list[i];
        double one = 2.0 * N * p->in * p->out;
        for (int round = 0; round < 3; round++)
            time_linear(p, N);
        printf("  %-14s %5d x %5d x %5d  forward %6.1f  backward %6.1f GFLOP/s\n", p->name, N, p->out, p->in,
               one / p->forward / 1e9, 2 * one / p->backward / 1e9);
        forward += p->forward * p->times;
        backward += p->backward * p->times;
    }
    printf("  all products of a step, %d layers: forward %.1f  backward %.1f  together %.1f GFLOP/s\n", L,
           work / forward / 1e9, 2 * work / backward / 1e9, 3 * work / (forward + backward) / 1e9);
    return 0;
}
