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

// ---- gradients in fewer bits

static const char *const schemes[] = {"--compress bf16", "--compress int8", "--compress topk --compress-ratio 0.03"};

// Sums of different gradients on each rank, some steps long: all have the same bits; and what has arrived, and what each rank
// keeps back, are together what there was. A number that is not finite is not lost on the way.
void test_ranks_compressed_sums(void **state) {
    (void)state;
    for (int k = 0; k < 3 * FORMS; k++) {
        Config c = small_config("mixtral");
        set_options(&c, schemes[k % 3]);
        begin_form(forms[k / 3][0], forms[k / 3][1]);
        Model *m = model_allocate(&c, c.seq, 1, NULL);
        int n = (int)m->common, wrong = 0;
        real *g = m->memory[GRADS];
        decoded_piece = block_of(codec_of(&c)); // so that a part has more than one
        double *arrived = (double *)allocate((size_t)n, sizeof(double)), *there = (double *)allocate((size_t)n, sizeof(double));
        real *first = (real *)allocate((size_t)n, sizeof(real));
        for (int step = 0; step < 6; step++) {
            uint64_t stream = random_stream(9, RANDOM_INIT, (uint64_t)step, (uint64_t)ranks.rank);
            for (int i = 0; i < n; i++) {
                g[i] = (real)random_normal(stream, (uint64_t)i);
                there[i] += (double)g[i];
            }
            g[7] = step < 5 || ranks.rank ? g[7] : (real)NAN;
            start_sum(m, 0, m->common, 0);
            await_sums(m);
            memcpy(first, g, (size_t)n * sizeof(real));
            MPI_Bcast(first, n, MPI_REALS, 0, comm.all);
            wrong |= memcmp(first, g, (size_t)n * sizeof(real)) != 0;
            wrong |= (first_not_finite(g, (size_t)n) < (size_t)n) != (step == 5);
            for (int i = 0; i < n && step < 5; i++)
                arrived[i] += (double)g[i];
            if (step < 4)
                continue;
            for (int i = 0; i < n && step == 4; i++)
                there[i] -= (double)m->crossing->lost[i];
            sum_over_ranks(there, step == 4 ? n : 0);
            for (int i = 0; i < n && step == 4; i++)
                wrong |= !(fabs(arrived[i] - there[i]) <= 1e-4);
        }
        free(arrived);
        free(there);
        free(first);
        model_free(m);
        end_form();
        free_taken();
        if (agreed(wrong))
            fail_msg("%s, %d ranks, --ep %d", schemes[k % 3], forms[k / 3][0], forms[k / 3][1]);
    }
    decoded_piece = 256000;
}

// The bytes of one sum of n numbers between W ranks, of all ranks together: all but one send their codes of each part to its
// owner, and each owner the code of the sum to all but one. The formulas of doc/compressed_gradients.md.
double formula(int scheme, double ratio, double n, int W) {
    double code = 2 * n; // bf16
    if (scheme == CODE_INT8)
        code = n + 4 * ceil(n / 256);
    if (scheme == CODE_TOPK)
        code = 6 * (floor(n / 1000) * ceil(1000 * ratio) + ceil(fmod(n, 1000) * ratio));
    return 2.0 * (W - 1) * code;
}

// Bytes as counted are those of the formulas; those of rows are half of what they are without --compress-rows.
void test_ranks_compressed_bytes(void **state) {
    (void)state;
    size_t message = largest_message, filled = bucket;
    largest_message = bucket = 1 << 30;
    for (int k = 0; k < 3 * FORMS; k++) {
        Config c = small_config("mixtral");
        set_options(&c, schemes[k % 3]);
        c.batch = 1;
        begin_form(forms[k / 3][0], forms[k / 3][1]);
        Model *m = model_allocate(&c, c.seq, 1, NULL);
        randomize_weights(m);
        ranks.traffic.reduced = 0;
        run_share(m, 0, ranks.size, TRAIN_MODE, 1, 1, 0);
        await_sums(m);
        double both[2] = {ranks.traffic.reduced, 0}, tail = (double)behind_layers(m);
        for (int i = 0; i < m->tensor_count; i++) {
            const Tensor *t = &m->tensors[i];
            both[1] += t->of_experts ? formula(c.compress, c.compress_ratio, (double)t->size, ranks.groups) / ranks.groups : 0;
        }
        both[1] += (formula(c.compress, c.compress_ratio, tail, ranks.size) +
                    formula(c.compress, c.compress_ratio, (double)m->common - tail, ranks.size)) / ranks.size;
        sum_over_ranks(both, 2);
        model_free(m);
        end_form();
        free_taken();
        if (agreed(fabs(both[0] - both[1])) > 0.5 || both[1] <= 0)
            fail_msg("%s, %d ranks, --ep %d: %.0f bytes, not %.0f", schemes[k % 3], forms[k / 3][0], forms[k / 3][1], both[0], both[1]);
    }
    largest_message = message;
    bucket = filled;
    double expected;
    begin_form(4, 2);
    double sent = pass_bytes("mixtral", "--overlap 1 --compress-rows 1", &expected);
    end_form();
    assert_true(agreed(fabs(sent - expected)) == 0 && expected > 0);
}

// Some steps with compressed gradients and rows: the loss stays near that of one process, whose gradients are not compressed;
// all ranks have the same common weights, those that share experts the same experts, and a second run has the same bits.
void test_ranks_compressed(void **state) {
    (void)state;
    enum { STEPS = 12 };
    double off[3] = {0, 0, 0};
    static const double near[] = {2e-2, 5e-2, 0.3};
    Config c = small_config("mixtral");
    set_options(&c, "--overlap 1");
    Curve alone, found;
    Model *m = train_curve(&c, STEPS, &alone);
    model_free(m);
    for (int k = 0; k < 3 * FORMS; k++) {
        real *bits[2];
        size_t common = 0, all = 0;
        int wrong = 0;
        set_options(&c, schemes[k % 3]);
        c.compress_rows = forms[k / 3][1] > 1;
        c.replicate = k % 2 && forms[k / 3][1] > 1;
        c.replicate_every = 4;
        begin_form(forms[k / 3][0], forms[k / 3][1]);
        for (int turn = 0; turn < 2; turn++) {
            m = train_curve(&c, STEPS, &found);
            common = m->common;
            all = c.replicate ? common : m->tables; // copies of experts are where the load has put them
            bits[turn] = (real *)allocate(all, sizeof(real));
            memcpy(bits[turn], m->memory[WEIGHTS], all * sizeof(real));
            model_free(m);
        }
        wrong |= memcmp(bits[0], bits[1], all * sizeof(real)) != 0;
        MPI_Bcast(bits[1], (int)common, MPI_REALS, 0, comm.all);
        if (ranks.groups > 1)
            MPI_Bcast(bits[1] + common, (int)(all - common), MPI_REALS, 0, comm.peers);
        wrong |= memcmp(bits[0], bits[1], all * sizeof(real)) != 0;
        free(bits[0]);
        free(bits[1]);
        end_form();
        double far = agreed(far_from(found.loss, alone.loss, STEPS));
        off[k % 3] = fmax(off[k % 3], far);
        if (agreed(wrong) || far > near[k % 3] || far == 0)
            fail_msg("%s, %d ranks, --ep %d: off by %.2g%s", schemes[k % 3], forms[k / 3][0], forms[k / 3][1], far,
                     agreed(wrong) ? ", with other bits" : "");
    }
    print_message("    losses within %.2g with bf16, %.2g with int8, %.2g with topk\n", off[0], off[1], off[2]);
    check_ranks("mixtral", IS_DOUBLE ? "" : "--compress topk --compress-ratio 1 --replicate 1 --replicate-every 3", 5); // all is sent
}

// ---- experts in a file

// The bits of what this process has after some steps.
uint64_t bits_of_ranks(const Config *c, Curve *curve) {
    Model *m = train_curve(c, 3, curve);
    size_t moments = moment_offset(m, trained_size(m));
    const size_t sizes[] = {m->size, trained_size(m), moments, moments};
    uint64_t bits = bits_of((const real *)curve->loss, 3 * sizeof(double) / sizeof(real), 0);
    for (int what = WEIGHTS; what <= MOMENT2; what++)
        bits = bits_of(m->memory[what], sizes[what], bits);
    take_weights(m, curve);
    bits = ranks.rank ? bits : bits_of(curve->weights, whole_size(m), bits);
    free(curve->weights);
    model_free(m);
    return bits;
}

// Each rank may have another number of experts in memory, or all of them: the bits are those without a file, and no more experts
// are in memory than was asked for.
void test_ranks_offload(void **state) {
    (void)state;
    static const char *const cases[][2] = {{"mixtral", "--accum 2 --overlap 1"},
                                           {"deepseek-v3", "--optimizer muon --moments bf16 --recompute 1 --overlap 0"},
                                           {"mixtral", "--mixed 1 --overlap 1"},
                                           {"mixtral", "--compress int8 --compress-rows 1 --overlap 1"}};
    for (int k = 0; k < COUNT(cases) * FORMS; k++) {
        const int *form = forms[k % FORMS];
        if (k >= FORMS && k % FORMS != 0 && k % FORMS != 3 + (k / FORMS == 2)) // {2,1} and {4,2} are enough, or {4,4} where widths differ
            continue;
        Config c = small_config(cases[k / FORMS][0]);
        Curve curve;
        set_options(&c, "--experts 8 --dim 32 --ffn 40");
        set_options(&c, cases[k / FORMS][1]);
        c.compress_rows = c.compress_rows && form[1] > 1;
        c.offload_dir = keep_text(scratch_file("away"));
        begin_form(form[0], form[1]);
        uint64_t wanted = bits_of_ranks(&c, &curve);
        int each = c.experts / form[1], wrong = 0;
        for (int turn = 0; turn < 2; turn++) { // rank 0 with one and without; then others have fewer experts in memory
            offloaded.fullest = 0;
            c.offload = turn ? (ranks.rank ? 1 : 0) : 1 + ranks.rank % (each - 1);
            wrong |= (bits_of_ranks(&c, &curve) != wanted) | (offloaded.fullest > c.offload) << 1 | (offloaded.pool_count != 0) << 2;
        }
        end_form();
        if (agreed(wrong))
            fail_msg("%s %s, %d ranks, --ep %d: --offload is wrong in %g", cases[k / FORMS][0], cases[k / FORMS][1], form[0], form[1],
                     agreed(wrong));
    }
}

// While backward works, no more than the experts asked for and one layer's copy of the gradients are in memory, also where ranks sum
// them up; afterwards nothing else is.
void test_ranks_offload_sums(void **state) {
    (void)state;
    Config c = small_config("mixtral");
    set_options(&c, "--experts 4 --layers 3");
    c.batch = 1;
    c.offload = 1;
    c.offload_dir = keep_text(scratch_file("away"));
    begin_form(4, 2);
    Model *m = model_allocate(&c, c.seq, 1, NULL);
    randomize_weights(m);
    run_share(m, 0, 4, TRAIN_MODE, 0.25, 1, 0);
    int wrong = staged_count != 2 || staged[0].n + staged[1].n != staged_bytes(m) / sizeof(real); // those of layer 0
    for (int i = 0; i < offloaded.pool_count; i++)
        wrong |= offloaded.pools[i].what == GRADS && offloaded.pools[i].count > 0;
    cpu_update(m, 1, 1e-3);
    wrong |= staged_count != 0 || offloaded.fullest > 1;
    model_free(m);
    end_form();
    free_taken();
    assert_false(agreed(wrong));
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
        cmocka_unit_test(test_ranks_compressed_sums),
        cmocka_unit_test(test_ranks_compressed_bytes),
        cmocka_unit_test(test_ranks_compressed),
        cmocka_unit_test(test_ranks_offload),
        cmocka_unit_test(test_ranks_offload_sums),
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
