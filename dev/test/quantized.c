// Models with few bits: blocks (data/blocks.h), their products (dev/cpu/blocks.h), a model that has them (dev/quantized.h), and
// --quantize and --evaluate (dev/few_bits.h).

#include "dev/test/trainer.h"
#include "dev/test/model.h"
#include "dev/test/runs.h"
#include "dev/test/few_bits.h"

#ifdef PLAIN // such a program refuses blocks
#define IS_PLAIN 1
#else
#define IS_PLAIN 0
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Blocks

// All float16 numbers there and back; and floats between two of them, which go to the nearest one, or to the even one.
void test_blocks_half(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float x = float_of_half((uint16_t)h);
        assert_int_equal(isnan(x) != 0, (h & 0x7fff) > 0x7c00);
        if (isnan(x))
            assert_true(isnan(float_of_half(half_of(x))));
        else
            assert_int_equal(half_of(x), h);
        if ((h & 0x7fff) < 0x7bff) {
            float next = float_of_half((uint16_t)(h + 1)), middle = x + (next - x) / 2; // exact
            assert_int_equal(half_of(middle), h + (h & 1));
            assert_int_equal(half_of(nextafterf(middle, x)), h);
            assert_int_equal(half_of(nextafterf(middle, next)), h + 1);
        }
    }
    assert_true(float_of_half(0x3c00) == 1 && float_of_half(0xc000) == -2 && float_of_half(1) == ldexpf(1, -24));
    assert_true(float_of_half(0x7bff) == 65504 && isinf(float_of_half(0xfc00)));
    assert_int_equal(half_of(65519), 0x7bff);
    assert_int_equal(half_of(65520), 0x7c00);
}

// What PyPI's package gguf 0.19 makes of the same 32 numbers.
void test_blocks_bytes(void **state) {
    (void)state;
    static const unsigned char q8[] = {0xb5, 0x21, 0x00, 0x19, 0x1d, 0x5c, 0x3a, 0x39, 0xee, 0xc9, 0x66, 0x0c,
                                       0xad, 0xef, 0xdf, 0xc1, 0x2f, 0xc8, 0x6d, 0x3a, 0x11, 0xca, 0xca, 0xe3,
                                       0x74, 0x20, 0x3a, 0xd4, 0x90, 0xd0, 0x81, 0xf0, 0x9e, 0xe3};
    static const unsigned char q4[] = {0xaa, 0x31, 0xf8, 0xca, 0x9a, 0x5e, 0x5c, 0x6c, 0xf7,
                                       0xa5, 0xce, 0x59, 0x13, 0x57, 0x06, 0x74, 0x2b, 0x64};
    real x[BLOCK];
    unsigned char found[Q8_BYTES];
    for (int i = 0; i < BLOCK; i++)
        x[i] = (real)(golden_hash((uint32_t)i) / 4294967296.0 * 3 - 1.7);
    assert_true(encode_row(FORMAT_Q8_0, found, x, BLOCK));
    assert_memory_equal(found, q8, sizeof(q8));
    assert_true(encode_row(FORMAT_Q4_0, found, x, BLOCK));
    assert_memory_equal(found, q4, sizeof(q4));
}

// Rows there and back: no number is further off than half a step, but where 4 bits end below the largest number, a whole one.
void test_blocks_rows(void **state) {
    (void)state;
    enum { N = 96 };
    for (int format = FORMAT_F32; format <= FORMAT_Q4_0; format++) {
        unsigned char *bytes = (unsigned char *)take(encoded_bytes(format, N), 1);
        real *x = take_normal(N, 3), *y = take_reals(N);
        fill(x + 32, 32, 0);
        for (int i = 64; i < N; i++)
            x[i] *= (real)1e-9; // too small for a scale
        assert_true(fits_blocks(format, N) && fits_blocks(format, N + 1) == (format < FORMAT_Q8_0));
        assert_true(encode_row(format, bytes, x, N));
        decode_row(format, y, bytes, N);
        real most = 0;
        for (int i = 0; i < 32; i++)
            most = (real)fmax((double)most, fabs((double)x[i]));
        const double step[] = {1e-7, 1e-3, 1.0 / 127, 1.0 / 8};
        for (int i = 0; i < N; i++) {
            double limit = i < 32 ? (format == FORMAT_Q4_0 ? 1.01 : 0.51) * step[format] * (double)most : 6e-8;
            if (!(fabs((double)(x[i] - y[i])) <= limit))
                fail_msg("%s: %g became %g", format_names[format], (double)x[i], (double)y[i]);
        }
        if (format >= FORMAT_Q8_0)
            assert_int_equal(check_blocks(format, bytes, N), N);

        // Numbers that have no place.
        const real bad[] = {(real)NAN, (real)INFINITY, (real)-INFINITY, (real)3e7};
        for (int i = 0; i < COUNT(bad) && format != FORMAT_F32; i++) {
            x[40] = bad[i];
            assert_false(encode_row(format, bytes, x, N));
        }
        if (format >= FORMAT_Q8_0) {
            uint16_t none = 0x7e01;
            memcpy(bytes + encoded_bytes(format, 64), &none, 2);
            memcpy(bytes + encoded_bytes(format, 32), &none, 1); // a small number
            bytes[encoded_bytes(format, 32) + 1] = 0;
            assert_int_equal(check_blocks(format, bytes, N), 64);
        }
        free_taken();
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Products

// Random rows of blocks as they lie in memory; extreme: each whole number is one of the two outermost.
unsigned char *take_packed(int format, int O, int I, int extreme, uint64_t seed) {
    size_t packed = packed_bytes(format, I), row = encoded_bytes(format, (size_t)I);
    unsigned char *w = (unsigned char *)take((size_t)O * packed, 1), *bytes = (unsigned char *)allocate(row, 1);
    for (int o = 0; o < O; o++) {
        for (size_t i = 0; i < row; i++) {
            unsigned random = (unsigned)(hash64(seed + (uint64_t)o * 99991 + i) >> 20);
            unsigned outer = format == FORMAT_Q8_0 ? 0x7f + (random & 1) : (random & 1) * 15 | (random & 2) * 120;
            bytes[i] = (unsigned char)(extreme ? outer : random);
        }
        for (int b = 0; b < I / BLOCK; b++) {
            uint16_t scale = half_of((float)random_normal(hash64(seed), (uint64_t)(o * 1000 + b)));
            memcpy(bytes + encoded_bytes(format, (size_t)b * BLOCK), &scale, 2);
        }
        pack_row(w + (size_t)o * packed, format, bytes, I);
    }
    free(bytes);
    return w;
}

// The processor's instructions against the plain loops, for lengths of every kind. The whole numbers' sums are the same: only
// the order of the floats differs.
void test_blocks_dot(void **state) {
    (void)state;
    const int lengths[] = {32, 64, 96, 224, 256, 288, 544, 1056};
    for (int run = 0; run < 2 * 2 * COUNT(lengths); run++) {
        int format = FORMAT_Q8_0 + run % 2, extreme = run / 2 % 2, I = lengths[run / 4], offset[] = {0, 4};
        unsigned char *w = take_packed(format, 1, I, extreme, (uint64_t)run);
        real *x = take_normal(4 * (size_t)I, (uint64_t)run + 50);
        for (int i = 0; i < 4 * I && extreme; i++)
            x[i] = x[i] < 0 ? -1 : 1;
        Rounded rounded = round_rows(x, NULL, offset, 1, &I);
        float plain[4], fast[4];
        plain_dot_of_blocks(plain, format, w, rounded, 4, I);
        for (int rows = 1; rows <= 4; rows++) {
            dot_of_blocks(fast, format, w, rounded, rows, I);
            for (int r = 0; r < rows; r++) {
                double scale = I * (double)(format == FORMAT_Q8_0 ? 128 : 8) * (extreme ? 1 : 4);
                if (!(fabs((double)fast[r] - (double)plain[r]) <= 1e-6 * scale))
                    fail_msg("%s, %d numbers, row %d of %d: %.9g, plain loops %.9g", format_names[format], I, r, rows,
                             (double)fast[r], (double)plain[r]);
            }
        }

        // One block with scales of 1: the sum of whole numbers itself.
        uint16_t one = 0x3c00;
        memcpy(w, &one, 2);
        rounded.d[0] = 1;
        Rounded first = rounded;
        int whole = 0, width = BLOCK;
        unsigned char *block = (unsigned char *)take(packed_bytes(format, BLOCK), 1);
        memcpy(block, &one, 2);
        memcpy(block + 16, w + 2 * scales_of(I), bytes_of_block(format));
        for (int i = 0; i < BLOCK; i++) {
            const unsigned char *of_w = block + 16;
            int half = i / 16 ? of_w[i % 16] >> 4 : of_w[i % 16] & 15;
            whole += rounded.q[i] * (format == FORMAT_Q8_0 ? (signed char)of_w[i] : half - 8);
        }
        dot_of_blocks(fast, format, block, first, 1, width);
        assert_true(fast[0] == (float)whole);
        free(rounded.q);
        free(rounded.d);
        free(rounded.shift);
        free_taken();
    }
}

// Matrices of several experts against plain sums of the numbers that the blocks stand for; the same bits with any number of
// threads and in any company.
void test_blocks_products(void **state) {
    (void)state;
    enum { E = 4, N = 9, K = 2 };
    int I[E] = {64, 64, 64, 64}, O[E] = {40, 40, 40, 40}, offset[E + 1] = {0, 5, 5, 6, 18}, token[N * K];
    for (int r = 0; r < N * K; r++)
        token[r] = (r * 7 + 1) % N;
    real *x = take_normal(N * 64, 1), *sorted = take_reals(N * K * 64), *wanted = take_reals(N * K * 40);
    Blocks b = {E, (BlockMatrix *)take(E, sizeof(BlockMatrix))};
    for (int e = 0; e < E; e++) {
        b.matrix[e].format = FORMAT_Q8_0 + e % 2;
        b.matrix[e].rows = take_packed(b.matrix[e].format, 40, 64, 0, 70 + (uint64_t)e);
    }
    Rounded rounded = round_rows(x, token, offset, E, I);
    for (int e = 0; e < E; e++) {
        for (int r = offset[e]; r < offset[e + 1]; r++) {
            memcpy(sorted + r * 64, x + token[r] * 64, 64 * sizeof(real));
            for (int o = 0; o < 40; o++) {
                const unsigned char *w = b.matrix[e].rows + (size_t)o * packed_bytes(b.matrix[e].format, 64);
                double sum = 0;
                for (int i = 0; i < 64; i++) {
                    const unsigned char *of_w = w + 16 + (size_t)(i / 32) * bytes_of_block(b.matrix[e].format);
                    int at = i % 32, half = at / 16 ? of_w[at % 16] >> 4 : of_w[at % 16] & 15;
                    int q = b.matrix[e].format == FORMAT_Q8_0 ? (signed char)of_w[at] : half - 8;
                    sum += (double)block_scale(w + 2 * (i / 32)) * q * (double)rounded.d[r * 8 + i / 32] * rounded.q[r * 64 + i];
                }
                wanted[r * 40 + o] = (real)sum;
            }
        }
    }
    for (int team = 0; team < TEAMS; team++) {
        set_threads(teams[team]);
        real *out = take_filled(N * K * 40, (real)NAN), *same = take_filled(N * K * 40, (real)NAN), *one = take_filled(5 * 40, 1);
        fast_grouped_matmul(out, x, token, as_weights(&b), offset, E, I, O);
        fast_grouped_matmul(same, sorted, NULL, as_weights(&b), offset, E, I, O);
        assert_close("a product of blocks", out, wanted, N * K * 40, 200, 1e-5);
        assert_memory_equal(out, same, N * K * 40 * sizeof(real));
        assert_same_bits("a product of blocks", team, bits_of(out, N * K * 40, 7));
        for (int r = 0; r < 5; r++) // alone, and added to what is there
            fast_matmul(one + r * 40, sorted + r * 64, as_weights(&b), 1, 64, 40, ADD);
        for (int i = 0; i < 5 * 40; i++)
            assert_true(one[i] == (real)(float)out[i] + 1);
    }
    set_threads(1);

    // A number that is not finite does not get lost.
    x[token[0] * 64 + 33] = (real)INFINITY;
    real *out = take_reals(N * K * 40);
    fast_grouped_matmul(out, x, token, as_weights(&b), offset, E, I, O);
    for (int o = 0; o < 40; o++)
        assert_false(isfinite(out[o]));
    assert_true(isfinite(out[40]));
    free(rounded.q);
    free(rounded.d);
    free(rounded.shift);
    free_taken();
}

// ---------------------------------------------------------------------------------------------------------------------
// A model

// A model with blocks computes what one with the blocks' numbers does, but for the rounding of activations to 8 bits; and
// generation is the forward pass, token by token.
void test_blocks_model(void **state) {
    (void)state;
    if (IS_PLAIN)
        skip();
    enum { T = 8 };
    for (int scheme = ALL_Q8_0; scheme <= MIXED; scheme++) {
        Config c = small_config("deepseek-v3"); // a dense layer, shared experts, and experts
        set_options(&c, "--layers 2 --dim 32 --ffn 32 --heads 2");
        c.vocab = 50;
        int inputs[T], targets[T];
        random_tokens(inputs, T, 50, 1);
        random_tokens(targets, T, 50, 2);
        Model *plain = model_allocate(&c, T, 0, NULL);
        randomize_weights(plain);
        Model *few = put_in_blocks(plain, scheme);
        double wanted = run_batch(plain, inputs, targets, 1, T, EVAL_MODE, 1, 0, 0);
        double found = run_batch(few, inputs, targets, 1, T, EVAL_MODE, 1, 0, 0);
        if (!(fabs(found - wanted) < 0.02 * wanted) || found == wanted)
            fail_msg("%s: the loss is %g, and by numbers %g", scheme_names[scheme], found, wanted);
        real *a = take_reals(T * 50), *b = take_reals(T * 50), *one = take_reals(50);
        all_logits(plain, a, T);
        all_logits(few, b, T);
        double differ = 0;
        for (int i = 0; i < T * 50; i++)
            differ += pow((double)(a[i] - b[i]), 2) / (T * 50);
        assert_true(sqrt(differ) < 0.03 * rms(a, T * 50));
        for (int t = 0; t < T; t++) {
            model_generate(few, inputs[t], t, one);
            assert_close("a token's logits", one, b + t * 50, 50, rms(b, T * 50), 1e-4);
        }
        model_free(few);
        model_free(plain);
        free_taken();
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The program

int ask(const char *out, const char *more) {
    const char *program = getenv("TRAIN_MOE");
    return shell(said, sizeof(said), "%s --out %s --threads 1 %s", program ? program : "./train_moe", scratch_file(out), more);
}

// The validation loss that --evaluate prints.
double evaluated(const char *out, const char *more) {
    char options[200];
    double loss = NAN;
    snprintf(options, sizeof(options), "--evaluate %s", more);
    expect(ask(out, options), 0, "bits per byte");
    const char *at = strstr(said, "validation loss ");
    assert_non_null(at);
    sscanf(at + 16, "%lf", &loss);
    return loss;
}

// Parts of scratch_file(dir)'s file whose names contain `kind` and which have this format.
int count_format(const char *dir, const char *kind, int format) {
    char path[300];
    Safetensors s;
    int count = 0;
    snprintf(path, sizeof(path), "%s/model.safetensors", dir);
    safetensors_open(&s, scratch_file(path), 0);
    for (const Json *t = s.header->child; t; t = t->next) {
        const Json *type = json_get(t, "dtype"), *shape = json_get(t, "shape");
        if (type && !strcmp(type->text, "U8") && strstr(t->key, kind))
            count += shape->child->next->number == (double)encoded_bytes(format, 32);
    }
    safetensors_close(&s);
    return count;
}

void make_small_run(void) {
    need_program();
    if (IS_PLAIN)
        skip();
    if (access(scratch_file("run"), F_OK) != 0)
        expect(run_tiny("run", "--shared 1 --lr 0.02"), 0, "What next");
}

// Each scheme: what is in the file, and that the model is still nearly the same.
void test_quantized_program(void **state) {
    (void)state;
    make_small_run();
    double loss = evaluated("run", "");
    assert_near(loss, logged("run", "eval", 12, "val_loss"), 1e-5);
    assert_near(evaluated("run", "--eval-tokens 320"), loss, 0.1);
    static const struct {
        const char *scheme;
        int q8, q4; // matrices of experts; there are 2 layers, 4 experts, 3 matrices of each
        double near;
    } list[] = {{"q8_0", 24, 0, 2e-3}, {"q4_0", 0, 24, 5e-2}, {"mixed", 12, 12, 5e-2}, {"mixed-often --few 0.25", 18, 6, 5e-2},
                {"mixed --few 0 --eval-tokens 16", 24, 0, 2e-3}, {"mixed --few 1", 0, 24, 5e-2}};
    for (int i = 0; i < COUNT(list); i++) {
        char options[200], to[16];
        snprintf(to, sizeof(to), "few%d", i);
        snprintf(options, sizeof(options), "--quantized %s --quantize %s", scratch_file(to), list[i].scheme);
        expect(ask("run", options), 0, "with few bits");
        assert_int_equal(count_format(to, "block_sparse_moe.experts", FORMAT_Q8_0), list[i].q8);
        assert_int_equal(count_format(to, "block_sparse_moe.experts", FORMAT_Q4_0), list[i].q4);
        assert_int_equal(count_format(to, "shared_experts", i == 1 ? FORMAT_Q4_0 : FORMAT_Q8_0), 6);
        assert_near(evaluated(to, ""), loss, list[i].near);
        expect(ask(to, "--prompt ab --tokens 8 --temperature 0"), 0, "ab");
    }

    // Of the mixed ones, --few says which experts, and 0 and 1 are the schemes of one kind.
    char path[2][256];
    snprintf(path[0], sizeof(path[0]), "%s", scratch_file("few0/model.safetensors"));
    assert_same_file(path[0], scratch_file("few4/model.safetensors"));
    expect(ask("run", "--quantize q8_0"), 0, "run-q8_0 --evaluate");
    assert_same_file(path[0], scratch_file("run-q8_0/model.safetensors"));
}

// What is refused, and damage of every kind.
void test_quantized_refused(void **state) {
    (void)state;
    make_small_run();
    if (access(scratch_file("run-q8_0"), F_OK) != 0)
        expect(ask("run", "--quantize q8_0"), 0, "run-q8_0 --evaluate");
    check_leaks(0);
    expect(ask("run", "--quantize q8_0"), 2, "run-q8_0 is there already");
    expect(ask("run", "--quantize q5_0"), 2, "one of: none, q8_0, q4_0, mixed, mixed-often");
    expect(ask("run", "--quantize q8_0 --few 0.3"), 2, "it needs experts of two kinds: --quantize mixed");
    expect(ask("run", "--quantize q8_0 --evaluate"), 2, "does nothing else");
    expect(ask("run", "--evaluate --steps 50"), 2, "--quantize and --evaluate only read a model");
    expect(ask("none", "--evaluate"), 1, "no checkpoint there to evaluate");
    expect(ask("run-q8_0", "--quantize q4_0"), 2, "its weights have few bits (q8_0)");
    expect(ask("run-q8_0", "--resume"), 2, "is a model, not a run directory");
    char options[600];
    snprintf(options, sizeof(options), "--init %s", scratch_file("run-q8_0"));
    expect(run_tiny("other", options), 2, "run-q8_0: its weights have few bits (q8_0)");
    snprintf(options, sizeof(options), "--export %s", scratch_file("x.gguf"));
    expect(ask("run-q8_0", options), 2, "its weights have few bits");
    expect(run_tiny("dense", "--recipe dense --steps 4"), 0, "What next");
    expect(ask("dense", "--quantize mixed"), 2, "has no experts; give q8_0 or q4_0");
    expect(ask("dense", "--quantize q4_0"), 0, "with few bits");
    evaluated("dense-q4_0", "");
    expect(run_tiny("odd", "--ffn 40 --steps 4"), 0, "What next");
    expect(ask("odd", "--quantize q4_0"), 1, "experts.0.w2.weight has 40 numbers, which are no blocks of 32");
    assert_int_equal(access(scratch_file("odd-q4_0"), F_OK), -1);

    static const struct {
        const char *change, *message;
    } cases[] = {
        {"sed -i 's/\"blocks\":\"q8_0\"/\"blocks\":\"q2\"/' config.json; rm checksums.json", "config.json: train_moe: blocks is q2"},
        {"sed -i 's/\"blocks\":\"q8_0\"/\"blocks\":\"q4_0\"/' config.json; rm checksums.json", "has blocks of the format q8_0"},
        {"sed -i 's/,\"blocks\":\"q8_0\"//' config.json; rm checksums.json", "w1.weight has type U8"},
        {"sed -i 's/w1.weight\":{\"dtype\":\"U8\",\"shape\":\\[32,34\\]/w1.weight\":{\"dtype\":\"U8\",\"shape\":[32,33]/' model.safetensors",
         "w1.weight has type U8; config.json says that it is in blocks: U8, 32 x 34 bytes"},
        {"printf '\\1' | dd of=model.safetensors conv=notrunc bs=1 seek=$(($(stat -c %s model.safetensors) - 9000)) 2>/dev/null",
         "do not have the checksum"},
        {"truncate -s -4000 model.safetensors; rm checksums.json", "damaged"},
    };
    for (int i = 0; i < COUNT(cases); i++) {
        if (shell(said, sizeof(said), "rm -rf %s && cp -r %s %s && cd %s && %s", scratch_file("bad"), scratch_file("run-q8_0"),
                  scratch_file("bad"), scratch_file("bad"), cases[i].change))
            fail_msg("%s: %s", cases[i].change, said);
        expect(ask("bad", "--evaluate"), 1, cases[i].message);
    }

    // A scale that is no number, where there are no checksums.
    size_t size;
    expect(shell(said, sizeof(said), "rm -rf %s && cp -r %s %s && rm %s", scratch_file("bad"), scratch_file("run-q8_0"),
                 scratch_file("bad"), scratch_file("bad/checksums.json")), 0, NULL);
    char *text = read_file(scratch_file("bad/model.safetensors"), &size), *name = strstr(text + 8, "layers.1.block_sparse_moe.experts.2.w3");
    uint64_t header, from;
    memcpy(&header, text, 8);
    assert_non_null(name);
    from = strtoull(strstr(name, "data_offsets\":[") + 15, NULL, 10);
    memset(text + 8 + header + from + 3 * 34, 0xff, 2);
    put_file("bad/model.safetensors", text, size);
    free(text);
    expect(ask("bad", "--evaluate"), 1, "the block of model.layers.1.block_sparse_moe.experts.2.w3.weight at row 3, column 0");
    expect(ask("bad", "--prompt a"), 1, "has a scale that is not finite");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_blocks_half),       cmocka_unit_test(test_blocks_bytes),
        cmocka_unit_test(test_blocks_rows),       cmocka_unit_test(test_blocks_dot),
        cmocka_unit_test(test_blocks_products),   cmocka_unit_test(test_blocks_model),
        cmocka_unit_test(test_quantized_program), cmocka_unit_test(test_quantized_refused),
    };
    begin_tests();
    return cmocka_run_group_tests_name("quantized", tests, NULL, scratch_done);
}
