// Several processes of the CUDA twin against the C twin alone: `make test_nccl` starts this one by mpirun -np 4, in the
// emulator, in float32 and in bfloat16. With AS_PROGRAM it is the program itself, so that nobody has to compile it once more.

#include "dev/test/cuda.h"

// As small as the device allows, since differences grow with the count of numbers that are rounded.
Config ranks_config(const char *recipe) {
    Config c = device_config(recipe);
    if (c.subtokens == 1) {
        apply_options(&c, "--dim 16 --heads 2 --kv-heads 1");
    }
    return c;
}

#define SMALL_CONFIG ranks_config
#include "dev/test/ranks.h"

void test_gpu_ranks_recipes(void **state) {
    (void)state;
    static const char *const few[] = {"mixtral", "deepseek-v2", "expert-choice"};
    for (int r = 0; r < (LOW ? 3 : recipe_count); r++) {
        const char *recipe = LOW ? few[r] : recipes[r].name;
        if (has_kernels(recipe))
            check_ranks(recipe, "--overlap 1", !LOW && getenv("THOROUGH") ? 50 : 2); // a quarter of an hour
    }
    print_message("    losses within %.2g, weights %.2g\n", farthest[0], farthest[1]);
}

void test_gpu_ranks_variants(void **state) {
    (void)state;
    static const char *const variants[][2] = {
        {"mixtral", "--overlap 1 --shared 1"},
        {"mixtral", "--overlap 0 --accum 2 --balance cv2 --aux-weight 0.5 --untied 1"},
        {"mixtral", "--recompute 1 --overlap 1 --shared 1 --replicate 2 --replicate-every 2"},
        {"mixtral", "--overlap 1 --shared 1 --shared-gate 1 --qkv-bias 1 --qk-norm 1 --qk-norm-over row --head-width 16"},
        {"mixtral", "--capacity-factor 0.7 --drop-order score --drop-exempt 0.3 --eval-capacity-factor 0.8"},
        {"mixtral", "--capacity-factor 0.6 --overflow next --overlap 1 --group step --accum 2"},
        {"cmoe", "--replicate 1 --replicate-every 2 --experts 8"},
        {"mh-moe", "--replicate 3 --replicate-every 1 --overlap 1 --capacity-factor 0.9"},
        {"deepseek-v2", "--group batch --overlap 0 --recompute 1"},
        {"hierarchical", "--group batch --aux-weight 0.5 --load-weight 0.5 --overlap 1"},
        {"mixtral", "--layers 3 --moe-every 2 --routers 2 --topk 4 --overlap 1"},
        {"shazeer-lstm", "--experts 8 --cell 24 --overlap 1 --recompute 1 --untied 1"}, // without a last norm
        {"mixtral", "--dropout 0.2 --norms 0 --shared 1 --last-feed 0 --layers 3"},
        {"switchhead", "--attention-aux-weight 0.1 --attention-capacity-factor 0.7 --group sequence --overlap 1"},
        {"moa", "--attention-aux-weight 0.1 --heads 2 --accum 2 --overlap 1"},
        {"dense", "--ngrams 300 --ngram-order 3 --ngram-gate 1 --accum 2"},
        {"fast", "--shared 1 --overlap 1 --weight-decay 0.5"}, // long enough that each matrix has its turn
    };
    for (size_t i = 0; i < (LOW ? 3 : sizeof(variants) / sizeof(variants[0])); i++)
        check_ranks(variants[i][0], variants[i][1], i && strcmp(variants[i][0], "fast") ? 3 : 10);
}

// Compressed sums: the same codes as the C twin's on as many ranks, so the losses are as near as without; and all ranks have the
// same common weights, bit for bit. With topk a number that is as large as another but for rounding may wait in one of them.
void test_gpu_ranks_compressed(void **state) {
    (void)state;
    enum { STEPS = 4 };
    static const char *const schemes[] = {"--compress bf16", "--compress int8", "--compress topk --compress-ratio 0.1"};
    for (int k = 0; k < (LOW ? 1 : 3); k++) {
        Config c = ranks_config("mixtral");
        set_options(&c, "--overlap 1 --aux-weight 0.01");
        set_options(&c, schemes[k]);
        for (int form = k % 2; form < FORMS; form += 2) {
            Curve wanted, found;
            begin_form(forms[form][0], forms[form][1]);
            model_free(train_curve(&c, STEPS, &wanted));
            ranks.traffic.reduced = 0;
            trained = RANKS_BACKEND;
            Model *m = train_curve(&c, STEPS, &found);
            int wrong = !LOW && ranks.traffic.reduced <= 0, n = (int)m->common;
            real *mine = weights_here(m), *first = take_reals(m->common);
            memcpy(first, mine, m->common * sizeof(real));
            MPI_Bcast(first, n, MPI_REALS, 0, comm.all);
            wrong |= memcmp(first, mine, m->common * sizeof(real)) != 0;
            trained->release(m);
            trained = &cpu_backend;
            free_taken();
            end_form();
            double far = agreed(far_from(found.loss, wanted.loss, STEPS));
            print_message("    %s: %.2g\n", schemes[k], far);
            if (agreed(wrong) || far > (k == 2 ? 3e-2 : LOW ? 1e-2 : 1e-3))
                fail_msg("%s, %d ranks: off by %.2g%s", schemes[k], forms[form][0], far, agreed(wrong) ? ", or other bits" : "");
        }
    }
    if (!LOW)
        check_ranks("mixtral", "--overlap 1 --compress topk --compress-ratio 1", 2); // all is sent
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gpu_ranks_recipes),
        cmocka_unit_test(test_gpu_ranks_variants),
        cmocka_unit_test(test_gpu_ranks_compressed),
        cmocka_unit_test(test_ranks_checkpoints),
        cmocka_unit_test(test_ranks_first_weights),
        cmocka_unit_test(test_ranks_generate),
        cmocka_unit_test(test_ranks_without_window),
        cmocka_unit_test(test_ranks_bytes),
        cmocka_unit_test(test_ranks_uneven),
    };
    if (getenv("AS_PROGRAM")) {
        program_name = "train_moe_cu_nccl";
        return run_program(argc, argv, &gpu::backend, train_moe);
    }
    if (!begin_ranks(&argc, &argv))
        return 1;
    int failed = cmocka_run_group_tests_name("cuda_ranks", tests, NULL, scratch_done);
    MPI_Finalize();
    return failed;
}
