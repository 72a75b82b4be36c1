// Several processes against one, of the C program: `make test_mpi` starts this one by mpirun -np 4, in double and in float.

#include "dev/test/trainer.h"
#include "dev/test/ranks.h"

void test_ranks_recipes(void **state) {
    (void)state;
    for (int r = 0; r < recipe_count; r++)
        check_ranks(recipes[r].name, "--overlap 1", 50);
    print_message("    losses within %.2g, weights %.2g\n", farthest[0], farthest[1]);
}

void test_ranks_variants(void **state) {
    (void)state;
    static const char *const variants[][2] = {
        {"mixtral", "--overlap 0"},
        {"mixtral", "--accum 3 --overlap 1"},
        {"mixtral", "--qkv-bias 1 --qk-norm 1 --qk-norm-over row --head-width 6 --shared 1 --shared-gate 1 --shared-ffn 20"},
        {"mixtral", "--dropout 0.2 --moe-sigmoid 1 --norms 0 --last-feed 0"},
        {"mixtral", "--recompute 1 --overlap 1 --shared 1"},
        {"mixtral", "--mixer lstm --cell 21 --accum 2 --overlap 1"},
        {"hierarchical", "--mixer lstm --recompute 1 --dropout 0.2"},
        {"mixtral", "--capacity-factor 0.7 --overlap 1"},
        {"mixtral", "--capacity-factor 0.7 --drop-order score --drop-exempt 0.3 --eval-capacity-factor 0.8"},
        {"mixtral", "--capacity-factor 0.6 --overflow next --overlap 1"},
        {"mixtral", "--balance cv2 --aux-weight 0.5 --overlap 1 --untied 1"},
        {"mixtral", "--replicate 2 --replicate-every 3 --overlap 1"},
        {"cmoe", "--replicate 1 --replicate-every 2 --experts 8"},
        {"mh-moe", "--replicate 3 --replicate-every 1 --overlap 1 --capacity-factor 0.9"},
        {"deepseek-v2", "--group batch --overlap 1 --replicate 1 --replicate-every 4"},
        {"mixtral", "--group step --accum 2 --overlap 1"},
        {"hierarchical", "--group batch --aux-weight 0.5 --load-weight 0.5 --overlap 1"},
        {"expert-choice", "--group sequence --accum 2 --overlap 1"},
        {"base", "--group sequence --overlap 1"},
        {"qwen3", "--accum 2 --overlap 0"},
        {"rmoe", "--noise 1 --load-weight 0.1 --overlap 1"},
        {"mixtral", "--moments bf16 --overlap 1 --shared 1"},
        {"deepseek-v3", "--moments bf16 --replicate 2 --replicate-every 3 --overlap 1"},
        {"switchhead", "--attention-capacity-factor 0.7 --attention-aux-weight 0.1 --overlap 1"},
        {"moa", "--attention-capacity-factor 0.7 --attention-z-weight 0.1 --accum 2 --overlap 1"},
        {"qwen3", "--attention-experts 3 --attention-aux-weight 0.1 --accum 2 --overlap 0"},
        {"deepseek-v3", "--attention-experts 3 --attention-capacity-factor 0.7 --recompute 1 --overlap 1"},
        {"mh-moe", "--attention-experts 6 --attention-form moa --attention-capacity-factor 0.7 --overlap 1"},
        {"mixtral", "--layers 3 --moe-every 2 --routers 2 --topk 4 --overlap 1"},
        {"dense", "--ngrams 3000 --ngram-order 3 --ngram-gate 1 --accum 2"},
        {"fast", "--ngrams 40 --ngram-order 3 --moments bf16 --replicate 1 --overlap 1"},
    };
    for (size_t i = 0; i < sizeof(variants) / sizeof(variants[0]); i++)
        check_ranks(variants[i][0], variants[i][1], 12);
}

// A copy of a busy expert goes to the rank with the least work, and takes over half of the expert's tokens.
void test_ranks_copies(void **state) {
    (void)state;
    static const double load[8] = {8, 7, 1, 1, 1, 1, 2, 1};
    Config c = small_config("mixtral");
    set_options(&c, "--experts 8 --replicate 3");
    begin_form(4, 4);
    Model *m = model_allocate(&c, c.seq, 1, NULL);
    memcpy(m->stats[1].recent, load, sizeof(load));
    choose_copies(m); // loads 15 2 2 3; then 11 6 2 3; 7.5 6 5.5 3
    const int *host = m->crossing->placement->host + 8;
    int wrong = host[0] != 1 || host[1] != 2 || host[6] != 2 || m->crossing->placement->nth[8 + 6] != 1;
    for (int e = 2; e < 8; e++)
        wrong |= e != 6 && host[e] != -1;
    model_free(m);
    end_form();
    assert_false(agreed(wrong));
}

// Moments in bfloat16 have the same bits on any number of processes, each of which rounds its share of them: three updates
// from the same gradients.
void test_ranks_moments(void **state) {
    (void)state;
    static const char *const names[] = {"mixtral", "cmoe"}; // cmoe's experts differ in size
    for (int r = 0; r < COUNT(names); r++) {
        Config c = small_config(names[r]);
        set_options(&c, "--moments bf16");
        real *wanted[4] = {NULL, NULL, NULL, NULL};
        for (int f = -1; f < FORMS; f++) {
            int size = f < 0 ? 1 : forms[f][0], ep = f < 0 ? 1 : forms[f][1], same = 1;
            if (c.experts % ep)
                continue;
            begin_form(size, ep);
            Model *m = model_allocate(&c, c.seq, 1, NULL);
            randomize_weights(m);
            for (int step = 1; step <= 3; step++) {
                for (int i = 0; i < m->tensor_count; i++) {
                    const Tensor *t = &m->tensors[i];
                    uint64_t stream = random_stream(9, RANDOM_INIT, (uint64_t)step, (uint64_t)i);
                    for (size_t j = 0; j < t->size; j++)
                        m->memory[GRADS][t->offset + j] = (real)random_normal(stream, t->first + j);
                }
                model_update(m, step, 0.01, 1);
            }
            for (int what = MOMENT1; what <= MOMENT2; what++) {
                const real *found = all_of(&cpu_backend, m, what);
                size_t bytes = whole_size(m) * sizeof(real);
                if (f < 0) {
                    wanted[what] = (real *)allocate(bytes, 1);
                    memcpy(wanted[what], found, bytes);
                }
                same &= ranks.rank || memcmp(wanted[what], found, bytes) == 0;
            }
            model_free(m);
            end_form();
            free_taken();
            assert_false(agreed(!same));
        }
        free(wanted[MOMENT1]);
        free(wanted[MOMENT2]);
    }
}

// While one rank computes for a long time, the watch still hears from it, and the job goes on.
void test_ranks_busy(void **state) {
    (void)state;
    double patience = watch_patience, start = seconds();
    begin_form(4, 4);
    ranks.watchdog = 1;
    watch_patience = 0.5;
    real *a = take_reals(256 * 256), *out = take_reals(256 * 256);
    while (ranks.rank == 3 && seconds() - start < 4)
        matmul(out, a, a, 256, 256, 256, SET);
    ranks_meet();
    watch_patience = patience;
    end_form();
    free_taken();
}

// KiB of memory that this process has had at most since it last was made to forget, and has now. Returns 0 where /proc does
// not tell.
int memory_used(double *most, double *now) {
    char line[256];
    int found = 0;
    FILE *file = fopen("/proc/self/status", "r");
    while (file && fgets(line, sizeof(line), file))
        found += sscanf(line, "VmHWM: %lf", most) + sscanf(line, "VmRSS: %lf", now) > 0;
    if (file)
        fclose(file);
    return found == 2;
}

int forget_peak(void) {
    FILE *file = fopen("/proc/self/clear_refs", "w");
    return file && fputs("5", file) > 0 && fclose(file) == 0;
}

// Rank 0 writes a model of 36 MiB and both its moments with no more memory than its largest tensor takes, which has 2 MiB. The
// file has what each process has: here the number of each weight, and three times that as the second moment.
void test_ranks_saving_memory(void **state) {
    (void)state;
    Config c = small_config("mixtral");
    set_options(&c, "--layers 12 --dim 128 --ffn 256 --experts 8");
    begin_form(4, 2);
    largest_message = 1 << 20;
    Model *m = model_allocate(&c, c.seq, 1, NULL);
    real *tensor = allocate_tensor(m);
    double most = 0, now = 0, before = 0, largest = 0;
    for (int i = 0; i < m->tensor_count; i++) {
        for (size_t j = 0; j < m->tensors[i].whole; j++)
            tensor[j] = (real)(j % 1000 + i);
        largest = fmax(largest, (double)m->tensors[i].whole * sizeof(real));
        ranks_write(m, WEIGHTS, i, tensor);
        ranks_write(m, MOMENT1, i, tensor);
        for (size_t j = 0; j < m->tensors[i].whole; j++)
            tensor[j] *= 3;
        ranks_write(m, MOMENT2, i, tensor);
    }
    Run run = {0};
    run.model = m;
    run.backend = &cpu_backend;
    snprintf(unfinished_path, sizeof(unfinished_path), "%s", scratch_file("saved"));
    int failed = !ranks.rank && mkdir(unfinished_path, 0777) != 0, weights[] = {WEIGHTS}, moments[] = {MOMENT1, MOMENT2};
    const char *const plain[] = {""}, *const names[] = {"exp_avg.", "exp_avg_sq."};
    FILE *sums = fopen("/dev/null", "w");
    write_tensors(&run, "warm.safetensors", weights, plain, 1, sums); // MPI makes its own memory at the first messages
    int known = forget_peak() && memory_used(&most, &before);
    write_tensors(&run, "model.safetensors", weights, plain, 1, sums);
    write_tensors(&run, "optimizer.safetensors", moments, names, 2, sums);
    fclose(sums);
    known = known && memory_used(&most, &now);
    double more = (most - before) * 1024;

    // What is in the files, in the form of any reader.
    int count;
    Part *parts = model_parts(m, &count);
    for (int moment = 0; moment < 3 && !ranks.rank; moment++) {
        WeightFiles files;
        open_weights(&files, unfinished_path, moment ? "optimizer.safetensors" : "model.safetensors", 1);
        for (int p = 0; p < count; p++) {
            read_part(&files, moment ? names[moment - 1] : "", &parts[p], tensor);
            for (size_t j = 0; j < part_size(&parts[p]); j++)
                failed |= tensor[j] != (real)((moment == 2 ? 3 : 1) * ((parts[p].offset + j) % 1000 + (size_t)parts[p].tensor));
        }
        close_weights(&files);
    }
    unfinished_path[0] = 0;
    free(parts);
    free(tensor);
    model_free(m);
    largest_message = 4000;
    end_form();
    assert_false(agreed(failed));
    if (agreed(known ? more : 0) > 2 * largest)
        fail_msg("saving takes %.1f MiB, the largest tensor %.1f", more / (1 << 20), largest / (1 << 20));
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ranks_recipes),
        cmocka_unit_test(test_ranks_variants),
        cmocka_unit_test(test_ranks_copies),
        cmocka_unit_test(test_ranks_moments),
        cmocka_unit_test(test_ranks_busy),
        cmocka_unit_test(test_ranks_checkpoints),
        cmocka_unit_test(test_ranks_first_weights),
        cmocka_unit_test(test_ranks_saving_memory),
        cmocka_unit_test(test_ranks_generate),
        cmocka_unit_test(test_ranks_without_window),
        cmocka_unit_test(test_ranks_bytes),
        cmocka_unit_test(test_ranks_uneven),
    };
    if (!begin_ranks(&argc, &argv))
        return 1;
    int failed = cmocka_run_group_tests_name("ranks", tests, NULL, scratch_done);
    MPI_Finalize();
    return failed;
}
