// Low-rank pairs (--lora) on the device, beside the C twin: forward, the gradients of every pair, steps, the same bits after a
// model has been read back, generation, and files that either program goes on with.
// Gives: test_gpu_adapters, test_gpu_adapter_steps, test_gpu_adapter_files. Needs: dev/test/cuda_model.cu, which includes it.

#pragma once

#define PAIRS "--lora 8 --lora-alpha 12 --lora-targets attention,experts,router"

void test_gpu_adapters(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"mixtral", PAIRS},
        {"mixtral", PAIRS " --recompute 1 --qk-norm 1 --untied 1 --kv-heads 1"},
        {"mixtral", "--lora 16 --lora-targets experts --experts 3 --ffn 136 --dim 136 --heads 1 --kv-heads 1"}, // several tiles
        {"mixtral", "--lora 136 --lora-targets experts --experts 2 --layers 1"}, // of the rank, too
        {"mixtral", "--lora 8 --lora-targets attention"},
        {"mixtral", "--lora 8 --lora-targets router --experts 3 --dim 136 --heads 1 --kv-heads 1"},
        {"mixtral", PAIRS " --norms 0"}, // and so without the fused router
        {"mixtral", PAIRS " --experts 1 --topk 1 --activation geglu"},
        {"dense", "--lora 8 --lora-targets attention,experts"},
        {"dense", "--lora 24 --lora-targets experts --dense-activation gelu --ngrams 20 --ngram-gate 1 --value-embedding 1"},
        {"deepseek-v3", PAIRS " --recompute 1"},
        {"olmoe", PAIRS " --capacity-factor 0.8"},
        {"hierarchical", PAIRS},
    };
    for (int i = 0; i < COUNT(cases); i++) {
        if (i % 3 == 0 || !is_slow())
            check_model(cases[i][0], cases[i][1], TRAIN_MODE);
    }
    check_gpu_generation("mixtral", PAIRS " --seq 3 --kv-heads 1");
    check_gpu_generation("dense", "--lora 8 --lora-targets attention,experts --seq 3");
}

// A new batch for both twins, forward and backward; returns the device's loss.
double adapter_batch(Twins *t, int step) {
    double loss, aux, norm;
    draw_tokens(t);
    Batch batch = make_batch(t->tokens, t->targets, t->B, t->T, TRAIN_MODE, 1, step, 0);
    ::model_forward(t->host, &batch);
    ::model_backward(t->host);
    decide(t, 1);
    gpu::model_forward(t->device, &batch);
    gpu::model_backward(t->device);
    gpu::model_losses(t->device, &loss, &aux, &norm);
    return loss;
}

// Some steps of both twins from the first numbers of pairs. What they learn is alike, what is frozen has the bits that it had,
// and another model that gets the device's numbers goes on with the same bits.
void check_adapter_steps(const char *choices) {
    Twins t = make_twins("mixtral", choices, 2, SPREAD);
    int base = base_tensors(t.host), last = is_slow() ? 3 : 6;
    double worst = 0;
    for (int i = base; i < t.host->tensor_count; i++)
        first_pair_numbers(t.host, i, t.host->memory[WEIGHTS] + t.host->tensors[i].offset);
    copy_weights(&t);
    real *before = all_of(&gpu::backend, t.device, WEIGHTS);
    Model *other = NULL;
    for (int step = 1; step <= last; step++) {
        double loss = adapter_batch(&t, step);
        worst = fmax(worst, fabs(loss / t.host->loss - 1));
        if (step == last - 1) { // read back into a model of its own, which does the last two steps, too
            other = gpu::backend.create(&t.c, t.N, 1, NULL);
            for (int what = WEIGHTS; what <= MOMENT2; what++)
                set_all(&gpu::backend, other, what, all_of(&gpu::backend, t.device, what));
        } else if (step == last) {
            ((gpu::Model *)other)->decided = t.plans;
            gpu::model_forward(other, &t.host->batch);
            gpu::model_backward(other);
        }
        if (other)
            gpu::model_update(other, step, 0.01);
        cpu_update(t.host, step, 0.01);
        gpu::model_update(t.device, step, 0.01);
    }
    if (!(worst <= TWIN_TOLERANCE))
        fail_msg("%s: losses are up to %.2g apart", choices, worst);
    const real *found = all_of(&gpu::backend, t.device, WEIGHTS), *again = all_of(&gpu::backend, other, WEIGHTS);
    for (int i = 0; i < t.host->tensor_count; i++) {
        const Tensor *tensor = &t.host->tensors[i];
        const real *mine = found + tensor->offset;
        assert_memory_equal(mine, again + tensor->offset, tensor->size * sizeof(real));
        int moved = memcmp(mine, before + tensor->offset, tensor->size * sizeof(real)) != 0;
        if (moved != is_pair(tensor))
            fail_msg("%s: %s", tensor->name, moved ? "it is frozen, and moved" : "it did not move");
    }

    // What is on the device besides the weights: their rounded copies, and numbers for the pairs alone.
    const gpu::Model *m = (const gpu::Model *)t.device;
    size_t pairs_size = t.device->pairs, most = (pairs_size + 64 * 4 + 64) * sizeof(real);
    assert_true(m->bytes[FOR_GRADIENTS] <= most && m->bytes[FOR_MOMENTS] <= 2 * most);
    gpu::backend.release(other);
    free_twins(&t);
    assert_int_equal(pairs.count, 0);
}

void test_gpu_adapter_steps(void **state) {
    (void)state;
    check_adapter_steps(PAIRS);
    check_adapter_steps(PAIRS " --recompute 1 --moments bf16 --accum 2");
}

// Either program goes on with the other's adapter, and both merge it to the same bits.
void test_gpu_adapter_files(void **state) {
    (void)state;
    if (starts_no_program())
        skip();
    need_program();
    char options[400];
    expect(run_either(0, "base", "--recipe mixtral --steps 2"), 0, "What next");
    for (int twin = 0; twin < 2; twin++) {
        const char *out = twin ? "of-twin" : "of-cpu";
        snprintf(options, sizeof(options), "--init %s --lora 8 --lora-targets attention,experts,router --steps 3 --lr 0.01",
                 scratch_file("base"));
        expect(run_either(twin, out, options), 0, "What next");
        expect(run_either(!twin, out, "--resume --steps 5"), 0, "What next");
        expect(run_either(twin, out, "--prompt hello --tokens 3"), 0, "hello");
    }
    assert_near(logged("of-twin", "step", 5, "loss") / logged("of-cpu", "step", 5, "loss"), 1, 1e-2);
    snprintf(options, sizeof(options), "--out %s --merge", scratch_file("of-twin"));
    expect(shell(said, sizeof(said), "%s %s %s", twin_program(), options, scratch_file("merged")), 0, "are one model now");
    expect(shell(said, sizeof(said), "%s %s %s-again", getenv("TRAIN_MOE") ? getenv("TRAIN_MOE") : "./train_moe", options,
                 scratch_file("merged")), 0, "are one model now");
    char mine[300], its[300];
    snprintf(mine, sizeof(mine), "%s", scratch_file("merged/model.safetensors"));
    snprintf(its, sizeof(its), "%s", scratch_file("merged-again/model.safetensors"));
    assert_same_file(mine, its);

    // A rank that the device's products do not take is refused; where nothing is trained any rank will do.
    snprintf(options, sizeof(options), "--init %s --lora 3 --steps 3", scratch_file("base"));
    expect(run_either(1, "odd", options), 2, "must be a multiple of 8");
    expect(run_either(0, "odd", options), 0, "What next");
    expect(run_either(1, "odd", "--prompt hello --tokens 3"), 0, "hello");
}
