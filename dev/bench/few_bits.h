// How much faster a model with few bits generates: the same model in float32, 8 bits and 4 bits, by turns.
// Gives: bench_few_bits. Needs: the rounds and Writer of dev/bench/bench.c, which includes it; dev/test/few_bits.h.
//
// At batch 1 the time is that of reading the weights that a token needs, from memory where the model is larger than the last
// cache: this one has 209 million weights, 835 MB in float32 and 143 MB with experts of 4 bits. Of the bytes that a token reads
// in float32 87% are of experts, as in Mixtral 8x7B, where they are 88%.
#pragma once
#include "dev/test/few_bits.h"

#define MODEL_FEW "--layers 8 --dim 512 --heads 8 --kv-heads 2 --experts 8 --topk 2 --ffn 2048 --seq 256 --batch 1"

void bench_few_bits(void) {
    printf("\ngeneration at batch 1 with few bits, around position 100, by turns\n");
    Config c = read_config("mixtral", MODEL_FEW);
    Model *models[3] = {random_model(&c, 1, 0), NULL, NULL};
    const char *const names[] = {"float32", "8 bits", "4 bits"};
    models[1] = put_in_blocks(models[0], ALL_Q8_0);
    models[2] = put_in_blocks(models[0], ALL_Q4_0);
    int threads = thread_count();
    for (int used = threads; used > 0; used = used > 1 ? 1 : 0) {
        use(used);
        Writer w[3];
        Thing t[3];
        for (int i = 0; i < 3; i++) {
            Writer writer = {models[i], allocate_reals(4096), 0};
            w[i] = writer;
            Thing thing = {call_generate, &w[i], 1, {0}};
            t[i] = thing;
        }
        int n = take_turns(t, 3, budget(10));
        for (int i = 0; i < 3; i++) {
            double megabytes = (double)models[i]->bytes[FOR_WEIGHTS] / 1e6;
            printf("  %-8s %2d thread%s %6.1f tokens/s, weights %4.0f MB", names[i], used, used > 1 ? "s" : " ",
                   median(t[i].rate, NULL, n), megabytes);
            if (i > 0)
                printf(", %.2f times as fast as float32", median(t[i].rate, t[0].rate, n));
            printf("\n");
            free(w[i].logits);
        }
        fflush(stdout);
    }
    use(threads);
    for (int i = 2; i >= 0; i--)
        model_free(models[i]);
}
