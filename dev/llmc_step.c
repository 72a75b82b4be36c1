// dev/llmc_step: the yardstick "loops in the manner of llm.c". llm.c's trainer on the CPU (train_gpt2.c) computes its
// matrix products by plain loops that the compiler makes fast: forward with eight tokens at a time, so that each weight
// read is used eight times; backward once by the input, parallel over tokens, and once by the weight, parallel over its
// rows. Here are such loops (our own), timed on the products of a model of ours with dense layers of equal active size,
// one layer and the head. They flatter llm.c: its attention, softmax and AdamW, which run at a fraction of this, are
// left out.
//
// Built with llm.c's own flags, which train_moe never sees: cc -Ofast -march=native -fopenmp. Options are those of
// train_moe and of dev/torch_step.py, so that one line of them serves all:
//     dev/llmc_step --layers 4 --dim 256 --heads 8 --experts 8 --topk 2 --ffn 512 --seq 256 --batch 16 --threads 2

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

// The seconds of a product, forward into time[0] and backward into time[1]: the best of three, after one to warm up.
void time_product(double time[2], int N, int C, int O) {
    size_t inputs = (size_t)N * C, weights = (size_t)O * C, outputs = (size_t)N * O;
    float *x = random_floats(inputs), *w = random_floats(weights), *out = random_floats(outputs);
    float *dx = random_floats(inputs), *dw = random_floats(weights), *dout = random_floats(outputs);
    time[0] = time[1] = 1e30;
    for (int round = 0; round < 4; round++) {
        double start = seconds(), middle, end;
        linear_forward(out, x, w, N, C, O);
        middle = seconds();
        linear_backward(dx, dw, dout, x, w, N, C, O);
        end = seconds();
        if (round) {
            time[0] = middle - start < time[0] ? middle - start : time[0];
            time[1] = end - middle < time[1] ? end - middle : time[1];
        }
    }
    float *all[] = {x, w, out, dx, dw, dout};
    for (int i = 0; i < 6; i++)
        free(all[i]);
}

int main(int argc, char **argv) {
    enum { LAYERS, DIM, FFN, TOPK, SEQ, BATCH, VOCAB, THREADS, HEADS, EXPERTS, OPTIONS }; // the last two change nothing
    struct {
        const char *name;
        int value;
    } option[OPTIONS] = {{"--layers", 2}, {"--dim", 128},    {"--ffn", 256},   {"--topk", 2},  {"--seq", 256},
                         {"--batch", 2},  {"--vocab", 4096}, {"--threads", 0}, {"--heads", 8}, {"--experts", 8}};
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
    const struct {
        const char *name;
        int in, out, times;
    } list[] = {{"qkv", C, 3 * C, L},
                {"attention out", C, C, L},
                {"gate and up", C, 2 * F, L},
                {"down", F, C, L},
                {"head", C, V, 1}};
    double sum[2] = {0}, work = 0; // forward; backward is twice that
    printf("loops in the manner of llm.c, %d threads, tokens x columns x summed\n", threads);
    for (int i = 0; i < 5; i++) {
        double time[2], one = 2.0 * N * list[i].in * list[i].out;
        time_product(time, N, list[i].in, list[i].out);
        printf("  %-14s %5d x %5d x %5d  forward %6.1f  backward %6.1f GFLOP/s\n", list[i].name, N, list[i].out,
               list[i].in, one / time[0] / 1e9, 2 * one / time[1] / 1e9);
        work += one * list[i].times;
        sum[0] += time[0] * list[i].times;
        sum[1] += time[1] * list[i].times;
    }
    printf("  all products of a step, %d layers: forward %.1f  backward %.1f  together %.1f GFLOP/s\n", L,
           work / sum[0] / 1e9, 2 * work / sum[1] / 1e9, 3 * work / (sum[0] + sum[1]) / 1e9);
    return 0;
}
