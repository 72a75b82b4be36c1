// dev/test/logits DIR: reads token ids from standard input, and writes the logits (T,V) that the model in DIR gives them, as
// raw float32, to standard output. For dev/test/check_hf.py, which compares them with those of transformers.

#define TRAIN_MOE_NO_MAIN
#include "train_moe.c"

int main(int argc, char **argv) {
    program_name = "logits";
    if (argc != 2)
        usage_fail("usage: dev/test/logits DIR < IDS");
    static Run run;
    config_defaults(&run.config);
    config_from_directory(&run.config, argv[1]);
    config_check(&run.config);
    int *ids = NULL, T = 0, id;
    while (scanf("%d", &id) == 1) {
        if (id < 0 || id >= run.config.vocab)
            fail("token %d is not in the vocabulary of %d", id, run.config.vocab);
        ids = (int *)reallocate(ids, (size_t)T + 1, sizeof(int));
        ids[T++] = id;
    }
    int V = run.config.vocab, C = run.config.dim;
    run.config.seq = T;
    run.backend = &cpu_backend;
    run.model = model_allocate(&run.config, T, 0, NULL);
    load_weights(&run, argv[1], 0);
    Batch batch = {ids, ids, 1, T, EVAL_MODE, 1, 0, 0, 1, 1};
    model_forward(run.model, &batch);
    real *logits = allocate_reals((size_t)T * V);
    matmul(logits, run.model->acts.h, run.model->params.head, T, C, V, SET);
    for (size_t i = 0; i < (size_t)T * V; i++) {
        float x = (float)logits[i];
        fwrite(&x, sizeof(x), 1, stdout);
    }
    free(logits);
    free(ids);
    model_free(run.model);
    return 0;
}
