// Gradients in fewer bits (dev/ranks/compress.h): the codes themselves, in one process. What several processes make of them is
// tested in ranks.c and mpi.c.

#include "dev/test/trainer.h"
#include "dev/test/model.h"

const Codec codecs[] = {{CODE_BF16, 0}, {CODE_INT8, 0}, {CODE_TOPK, 0.01}, {CODE_TOPK, 0.3}, {CODE_TOPK, 1}};
const int code_sizes[] = {0, 1, 2, 255, 256, 257, 999, 1000, 1001, 20011};

// v becomes what is left, and out what arrives. Nothing is written behind the code.
void send_once(Codec codec, real *v, real *out, size_t n) {
    size_t bytes = code_bytes(codec, n);
    unsigned char *code = (unsigned char *)allocate(bytes + 8, 1);
    memset(code + bytes, 77, 8);
    memset(out, 0, n * sizeof(real));
    encode(codec, code, v, n);
    decode(codec, out, code, n);
    for (int i = 0; i < 8; i++)
        assert_int_equal(code[bytes + (size_t)i], 77);
    free(code);
}

// What arrives and what is left behind are together what was there; and what arrives is as near as the code allows.
void test_round_trip(void **state) {
    (void)state;
    for (int k = 0; k < COUNT(codecs); k++) {
        for (int s = 0; s < COUNT(code_sizes); s++) {
            size_t n = (size_t)code_sizes[s], block = block_of(codecs[k]);
            real *v = take_normal(n, 7 + (uint64_t)s), *left = take_reals(n + 1), *out = take_reals(n + 1);
            memcpy(left, v, n * sizeof(real));
            send_once(codecs[k], left, out, n);
            for (size_t i = 0; i < n; i++) {
                double top = 0, lost = fabs((double)left[i]);
                for (size_t j = i / block * block; j < n && j < (i / block + 1) * block; j++)
                    top = fmax(top, fabs((double)v[j]));
                assert_near(out[i] + left[i], v[i], 1e-6 * top);
                if (codecs[k].scheme == CODE_BF16)
                    assert_true(lost <= fabs((double)v[i]) / 256);
                if (codecs[k].scheme == CODE_INT8)
                    assert_true(lost <= 0.5001 * top / 127);
                if (codecs[k].scheme == CODE_TOPK)
                    assert_true(left[i] == v[i] || lost <= 1e-7 * fabs((double)v[i]));
            }
            free_taken();
        }
    }
}

// With topk no number that stays behind is larger than one that is sent, and as many are sent as the ratio says. Of equal
// ones the first are sent.
void test_largest(void **state) {
    (void)state;
    for (int k = 2; k < COUNT(codecs); k++) {
        for (int levels = 1; levels <= 1000; levels *= 10) {
            enum { N = 1000 };
            real *v = take_normal(N, 3), *left = take_reals(N), *out = take_reals(N);
            for (int i = 0; i < N; i++)
                left[i] = v[i] = (real)(float)(ceil(fabs((double)v[i]) / 4 * levels) / levels * (i % 2 ? 1 : -1));
            send_once(codecs[k], left, out, N);
            double least = 1e30, most = 0;
            int sent = 0, last = -1, first_left = N;
            for (int i = 0; i < N; i++) {
                sent += out[i] != 0;
                least = out[i] != 0 ? fmin(least, fabs((double)out[i])) : least;
                most = out[i] != 0 ? most : fmax(most, fabs((double)v[i]));
            }
            for (int i = 0; i < N; i++) {
                last = fabs((double)out[i]) == least ? i : last;
                first_left = out[i] == 0 && fabs((double)v[i]) == least && i < first_left ? i : first_left;
            }
            assert_int_equal(sent, sent_of(codecs[k], N));
            assert_true(least >= most && (first_left == N || last < first_left));
            free_taken();
        }
    }
}

// The bytes of the formulas in doc/compressed_gradients.md.
void test_code_bytes(void **state) {
    (void)state;
    const Codec bf16 = {CODE_BF16, 0}, int8 = {CODE_INT8, 0}, topk = {CODE_TOPK, 0.01};
    assert_int_equal(code_bytes(bf16, 12345), 2 * 12345);
    assert_int_equal(code_bytes(int8, 12345), 12345 + 4 * 49);        // 48 blocks of 256, and 57
    assert_int_equal(code_bytes(topk, 12345), 6 * (12 * 10 + 4));     // 12 blocks of 1,000, and 345, of which 3.45
    assert_int_equal(code_bytes(topk, 1), 6);
    const Codec rounded = {CODE_TOPK, 0.07};                          // 0.07 * 100 is more than 7 in double
    assert_int_equal(code_bytes(rounded, 100), 6 * 7);
    assert_int_equal(code_bytes(int8, 0), 0);
}

// Error feedback: after many steps all that was sent is all there was, but for what is left, which does not grow.
void test_feedback(void **state) {
    (void)state;
    enum { N = 3001, STEPS = 60 };
    for (int k = 0; k < COUNT(codecs); k++) {
        real *lost = take_reals(N), *out = take_reals(N);
        double *sent = (double *)allocate(N, sizeof(double)), *whole = (double *)allocate(N, sizeof(double)), worst = 0;
        memset(lost, 0, N * sizeof(real));
        for (int step = 0; step < STEPS; step++) {
            uint64_t stream = random_stream(5, RANDOM_INIT, (uint64_t)step, 0);
            for (int i = 0; i < N; i++) {
                real g = (real)(random_normal(stream, (uint64_t)i) + 0.5 * (i % 3));
                whole[i] += (double)g;
                lost[i] += g;
            }
            send_once(codecs[k], lost, out, N);
            for (int i = 0; i < N; i++)
                sent[i] += (double)out[i];
        }
        for (int i = 0; i < N; i++) {
            assert_near(sent[i] + (double)lost[i], whole[i], 1e-3);
            worst = fmax(worst, fabs((double)lost[i]));
        }
        // With topk a number waits until it is among the largest; with one of 100 that may take all these steps.
        double allowed = codecs[k].scheme == CODE_TOPK ? (codecs[k].ratio < 0.1 ? 100 : 15) : 0.1;
        if (!(worst <= allowed))
            fail_msg("codec %d: %g is left", k, worst);
        free(sent);
        free(whole);
        free_taken();
    }
}

// What is not finite arrives as something that is not finite, wherever it stands, and so do numbers too large for a code. Zeros
// and the smallest numbers stay what they are, or are left behind.
void test_not_finite(void **state) {
    (void)state;
    static const double bad[] = {NAN, INFINITY, -INFINITY};
    enum { N = 2300 };
    for (int k = 0; k < COUNT(codecs); k++) {
        for (int at = 0; at < N; at += 97) {
            real *v = take_normal(N, 11), *out = take_reals(N);
            v[at] = (real)bad[at % 3];
            send_once(codecs[k], v, out, N);
            assert_true(first_not_finite(out, N) <= (size_t)at);
            free_taken();
        }
        real *tiny = take_reals(N), *out = take_reals(N);
        for (int i = 0; i < N; i++)
            tiny[i] = (real)(i % 5 * 1e-45);
        send_once(codecs[k], tiny, out, N);
        assert_int_equal(first_not_finite(out, N), N);
        assert_int_equal(first_not_finite(tiny, N), N);
        free_taken();
    }
}

// Rows on their way (--compress-rows) are rounded in place, and come out of the end of their memory.
void test_rows(void **state) {
    (void)state;
    for (int n = 0; n < 100; n++) {
        real *v = take_normal((size_t)n + 1, 2), *in = take_reals((size_t)n + 1), *wanted = take_reals((size_t)n + 1);
        for (int i = 0; i < n; i++)
            wanted[i] = (real)nearest_bf16((float)v[i]);
        in[n] = 42;
        narrow(v, (size_t)n);
        memcpy(narrow_part(in, (size_t)n), v, (size_t)n * BF16_BYTES);
        widen(in, narrow_part(in, (size_t)n), (size_t)n);
        assert_memory_equal(in, wanted, (size_t)n * sizeof(real));
        assert_true(in[n] == 42);
        free_taken();
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip), cmocka_unit_test(test_largest),    cmocka_unit_test(test_code_bytes),
        cmocka_unit_test(test_feedback),   cmocka_unit_test(test_not_finite), cmocka_unit_test(test_rows),
    };
    begin_tests();
    return cmocka_run_group_tests_name("compress", tests, NULL, scratch_done);
}
