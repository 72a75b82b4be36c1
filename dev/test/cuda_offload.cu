// Experts in the host's memory (--offload on the CUDA twin): the bits are those without, no more experts are on the device than was
// asked for, they are there when a kernel begins, and either twin goes on with the other one's run.

#include "dev/test/cuda.h"
#include "dev/test/cuda_runs.h"

enum { AWAY_B = 2, AWAY_T = 8, AWAY_N = AWAY_B * AWAY_T };

Model *gpu_with_offload(const char *recipe, const char *options, int held) {
    Config c = device_config(recipe);
    apply_options(&c, "--experts 5");
    set_options(&c, options);
    c.offload = held;
    Model *m = gpu::backend.create(&c, AWAY_N, 1, NULL);
    gpu::backend.init(m, NULL);
    return m;
}

// Some steps of two micro-steps each, and an evaluation. Returns a hash of the losses.
uint64_t gpu_steps_with_offload(Model *m, int steps) {
    int inputs[AWAY_N], targets[AWAY_N];
    uint64_t losses = 0;
    double loss, aux, norm;
    for (int step = 1; step <= steps; step++) {
        for (int micro = 0; micro < 3; micro++) {
            random_tokens(inputs, AWAY_N, m->config.vocab, (uint64_t)(6 * step + 2 * micro));
            random_tokens(targets, AWAY_N, m->config.vocab, (uint64_t)(6 * step + 2 * micro + 1));
            int mode = micro == 2 ? EVAL_MODE : TRAIN_MODE;
            Batch batch = {inputs, targets, AWAY_B, AWAY_T, mode, 0.5, step, (long)micro * AWAY_N, micro % 2 == 0, micro == 1};
            gpu::model_forward(m, &batch);
            if (mode == TRAIN_MODE) {
                gpu::model_backward(m);
            }
            gpu::model_losses(m, &loss, &aux, &norm);
            losses = hash64(losses ^ hash64((uint64_t)(loss * 1e15)) ^ hash64((uint64_t)(aux * 1e15)));
            if (micro == 1) {
                gpu::model_update(m, step, 1e-2);
            }
        }
    }
    return losses;
}

// Training, by any number of experts on the device, gives the bits of training with all. And no more than these are ever there.
void check_gpu_offload(const char *recipe, const char *options, int first, int every, int steps) {
    Model *plain = gpu_with_offload(recipe, options, 0);
    uint64_t losses = gpu_steps_with_offload(plain, steps);
    for (int held = first; held < plain->config.experts; held += every) {
        offloaded.fullest = 0;
        double fetched = offloaded.fetched;
        Model *m = gpu_with_offload(recipe, options, held);
        size_t most = 0;
        for (int i = 0; i < offloaded.pool_count; i++) {
            most += offload_bytes(&m->config, &m->tensors[offloaded.pools[i].tensor], offloaded.pools[i].each);
        }
        assert_true(most > 0 && most == (size_t)offloaded.on_device && offloaded.on_host > offloaded.on_device);
#ifdef CUDACPU
        assert_true(cudacpu::managed_there > 0); // what experts have in common
        most += cudacpu::managed_there;
        cudacpu::managed_most = 0;
#endif
        if (gpu_steps_with_offload(m, steps) != losses)
            fail_msg("%s %s: --offload %d has other losses", recipe, options, held);
#ifdef CUDACPU
        if (cudacpu::managed_most > most)
            fail_msg("%s %s: --offload %d had %zu bytes on the device, of %zu", recipe, options, held, cudacpu::managed_most, most);
#endif
        assert_int_equal(offloaded.fullest, held);
        assert_true(offloaded.fetched > fetched);
        for (int what = WEIGHTS; what <= MOMENT2; what++) {
            if (memcmp(all_of(&gpu::backend, m, what), all_of(&gpu::backend, plain, what), whole_size(m) * sizeof(real)))
                fail_msg("%s %s: --offload %d has other numbers in array %d", recipe, options, held, what);
        }
        gpu::backend.release(m);
        assert_int_equal(offloaded.pool_count, 0);
        assert_true(offloaded.on_host == 0 && offloaded.on_device == 0);
        free_taken();
    }
    gpu::backend.release(plain);
}

void test_gpu_offload_bits(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"mixtral", ""},
        {"deepseek-v3", "--experts 8 --topk 3 --moments bf16 --recompute 1"},
        {"mixtral", "--optimizer muon --capacity-factor 1"},
        {"mixtral", "--mixed 1 --experts 8"},
        {"mh-moe", "--dim 64 --moments bf16 --recompute 1"},
        {"mixtral", "--experts 70 --ffn 8 --layers 1"}, // a router that is not fused; most experts have no rows
    };
    for (int i = 0; i < (is_slow() || !LOW ? 2 : COUNT(cases)); i++) { // all in one precision
        check_gpu_offload(cases[i][0], cases[i][1], 1 + i % 4, i || is_slow() ? 99 : 2, i ? 1 : 2);
    }
}

// One token after the other.
void test_gpu_offload_generates(void **state) {
    (void)state;
    Model *plain = gpu_with_offload("mixtral", "", 0), *m = gpu_with_offload("mixtral", "", 2);
    real *a = take_reals(plain->config.vocab), *b = take_reals(plain->config.vocab);
    double fetched = offloaded.fetched, asked = offloaded.asked;
    for (int position = 0; position < 12; position++) {
        gpu::model_generate(plain, position * 3, position, a);
        gpu::model_generate(m, position * 3, position, b);
        assert_memory_equal(a, b, (size_t)plain->config.vocab * sizeof(real));
    }
    assert_true(offloaded.fetched > fetched && offloaded.fetched - fetched < offloaded.asked - asked);
    gpu::backend.release(plain);
    gpu::backend.release(m);
    free_taken();
}

// Whether an expert is on the device, as far as that can be known.
void assert_there(const Pool *p, int e, int yes) {
#ifdef CUDACPU
    CHECK(cudaDeviceSynchronize());
    assert_int_equal(cudacpu::bytes_there(gpu::address_of_expert(p, e), bytes_of_expert(p, e)), yes ? bytes_of_expert(p, e) : 0);
#else
    assert_int_equal(is_held(p, e), yes);
#endif
}

// The expert whose last use is longest ago goes first. A product begins with those that are there, and leaves out those without rows.
void test_gpu_offload_order(void **state) {
    (void)state;
    Model *m = gpu_with_offload("mixtral", "", 2);
    Pool *p = find_pool(m, GRADS, 0);
    for (int i = 1; !p; i++) {
        p = find_pool(m, GRADS, i);
    }
    gpu::Pools pools = {{p}, 1}, none = {{NULL}, 0};
    int offset[] = {0, 3, 3, 4, 6, 7}, order[5], count = 0; // expert 1 has no rows
    const int plan[] = {0, 3, 0, 4, 2}, wanted[] = {2, 4, 0, 3};
    for (int i = 0; i < 4; i++) {
        gpu::move_in_group(&pools, plan, i + 1, i);
    }
    assert_int_equal(p->count, 2);
    for (int e = 0; e < 5; e++) {
        assert_there(p, e, e == 0 || e == 4);
    }
    gpu::move_in_group(&pools, plan, 5, 4); // 0 goes
    assert_there(p, 0, 0);
    assert_there(p, 4, 1);
    gpu::through_experts(&pools, &none, offset, [&](int e) { order[count++] = e; });
    assert_int_equal(count, 4);
    assert_memory_equal(order, wanted, sizeof(wanted));
    for (int e = 0; e < 5; e++) {
        assert_there(p, e, e == 0 || e == 3);
    }
    gpu::backend.release(m);
}

// The table of memory counts what the device gives at most; and what was taken comes back.
void test_gpu_offload_memory(void **state) {
    (void)state;
#ifdef CUDACPU
    size_t before, with, after, total, sum = 0;
    gpu::start_device();
    CHECK(cudaMemGetInfo(&before, &total));
    Model *m = gpu_with_offload("mixtral", "--dim 64 --ffn 128 --experts 6", 2);
    gpu_steps_with_offload(m, 1);
    CHECK(cudaMemGetInfo(&with, &total));
    for (int kind = 0; kind < MEMORY_KINDS; kind++)
        sum += m->bytes[kind];
    size_t taken = before - with;
    if (taken > sum + 4096 || (double)taken < 0.95 * (double)sum)
        fail_msg("the table says %zu bytes, and it were %zu", sum, taken);
    gpu::backend.release(m);
    CHECK(cudaMemGetInfo(&after, &total));
    assert_true(after == before);
#else
    skip();
#endif
}

// ---- the program

// A run that was killed goes on with another N, and has the bits of one with all experts on the device; and the C twin goes on with
// it, too.
void test_gpu_offload_run(void **state) {
    (void)state;
    if (starts_no_program())
        skip();
    need_program();
    const char *options = "--steps 4 --save-every 2";
    expect(run_either(1, "gpu-all", options), 0, "What next");
    assert_true(!strstr(said, "--offload"));
    for (int attempt = 0, status = 0; !WIFSIGNALED(status); attempt++) {
        assert_true(attempt < 5); // it was always done before it could be killed
        remove_tree(scratch_file("gpu-away"));
        pid_t child = start_twin("gpu-away", "--steps 4 --save-every 2 --offload 1");
        status = wait_for(child, scratch_file("gpu-away/log.jsonl"), "\"step\":3,");
        if (status == -1) {
            kill(child, SIGKILL);
            waitpid(child, &status, 0);
        }
    }
    assert_latest("gpu-away", "checkpoint-2");
    assert_int_equal(shell(said, sizeof(said), "cp -r %s %s-cpu", scratch_file("gpu-away"), scratch_file("gpu-away")), 0);
    expect(run_either(1, "gpu-away", "--steps 4 --save-every 2 --resume --offload 3"), 0, "--offload 3: of ");
    assert_true(strstr(said, "MiB of experts are in the host's memory") != NULL);
    assert_same_weights("gpu-all", "gpu-away");
    expect(run_either(0, "gpu-away-cpu", "--steps 3 --save-every 2 --resume --offload 2"), 0, "--offload 2: of ");

    // Generation.
    expect(run_either(1, "gpu-all", "--prompt ab --seed 3"), 0, "ab");
    char answer[256];
    snprintf(answer, sizeof(answer), "%.200s", strstr(said, "\nab"));
    expect(run_either(1, "gpu-all", "--prompt ab --seed 3 --offload 2"), 0, "--offload 2: of ");
    assert_true(!strncmp(strstr(said, "\nab"), answer, 10));
}

void test_gpu_offload_refused(void **state) {
    (void)state;
    if (access(twin_program(), X_OK) != 0)
        skip();
    need_program();
    check_leaks(0);
    expect(run_either(1, "refused", "--offload 4"), 2, "--offload 4: a layer has 4 experts");
    const char *no_file = "with a GPU the experts are in the host's memory: leave them out";
    expect(run_either(1, "refused", "--offload 2 --offload-cold"), 2, no_file);
    expect(run_either(1, "refused", "--offload 2 --offload-dir /tmp"), 2, no_file);
#ifdef CUDACPU
    setenv("CUDACPU_MANAGED", "0", 1);
    expect(run_either(1, "refused", "--offload 2"), 1, "this device cannot share memory with the host while it works");
    unsetenv("CUDACPU_MANAGED");

    // The experts of all arrays are counted before the first is taken: 18 bytes for each of 2 * E * 3 * 32 * F weights.
    double has = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE), each = 2.0 * 4096 * 3 * 32;
    int width = (int)(1.1 * has / 4 / each / 8) * 8; // the first array alone is too large, so that a fault here takes no memory
    if (width >= 8 && width <= 65536) {
        char more[128], wanted[128];
        snprintf(more, sizeof(more), "--offload 1 --experts 4096 --ffn %d", width);
        snprintf(wanted, sizeof(wanted), "the experts need %.0f MiB of the host's memory", 18 * each * width / 1048576);
        expect(run_either(1, "refused", more), 1, wanted);
    }
#endif
    assert_true(access(scratch_file("refused"), F_OK) != 0);
    check_leaks(1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gpu_offload_bits),   cmocka_unit_test(test_gpu_offload_generates),
        cmocka_unit_test(test_gpu_offload_order),  cmocka_unit_test(test_gpu_offload_memory),
        cmocka_unit_test(test_gpu_offload_run),    cmocka_unit_test(test_gpu_offload_refused),
    };
    begin_tests();
    return cmocka_run_group_tests_name("cuda_offload", tests, NULL, scratch_done);
}
