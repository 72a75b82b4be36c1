// The tokenizer: reading tokenizer.json, cutting texts into words, merging, and back again.

#include "data/tokenizer.h"
#include "dev/test/tokens.h"

void assert_ids(Tokenizer *t, const char *text, const char *expected) { // expected: ids, a space behind each
    int ids[256];
    char list[2048] = "";
    size_t n = tokenizer_encode(t, text, strlen(text), ids);
    for (size_t i = 0; i < n; i++)
        sprintf(list + strlen(list), "%d ", ids[i]);
    if (strcmp(list, expected) != 0)
        fail_msg("\"%s\": %s, expected %s", text, list, expected);
}

void assert_round_trip(Tokenizer *t, const char *text, size_t size) {
    int *ids = (int *)allocate(size + 1, sizeof(int)), length;
    size_t n = tokenizer_encode(t, text, size, ids), at = 0;
    assert_true(n <= size + 1);
    for (size_t i = 0; i < n; i++) {
        assert_true(ids[i] >= 0 && ids[i] < t->vocab);
        const char *token = tokenizer_text(t, ids[i], &length);
        assert_true(at + (size_t)length <= size && memcmp(text + at, token, (size_t)length) == 0);
        at += (size_t)length;
    }
    assert_int_equal(at, size);
    free(ids);
}

void test_tokenizer_merges(void **state) {
    (void)state;
    Tokenizer *t = tokenizer_load(small_tokenizer("t.json", NULL, NULL));
    assert_int_equal(t->vocab, 265);
    assert_int_equal(t->eot, 0);
    assert_ids(t, "hello hello", "260 262 ");
    assert_ids(t, "hel", "257 109 ");
    assert_ids(t, "aaa aaaaa", "263 98 33 264 98 "); // the left ones first
    assert_ids(t, "hello<|endoftext|>hello", "260 0 260 ");
    assert_ids(t, "<|endoftext|><|endoftext|>", "0 0 ");
    assert_ids(t, "<|endoftext", "61 125 102 111 101 112 103 117 102 121 117 ");
    assert_ids(t, "", "");
    tokenizer_free(t);
}

void test_tokenizer_forms(void **state) { // other ways to write the same file
    (void)state;
    Tokenizer *t =
        tokenizer_load(small_tokenizer("t.json", "\"he ll\", \"hell o\"", "[\"he\", \"ll\"], [\"hell\", \"o\"]"));
    assert_ids(t, "hello hello", "260 262 ");
    tokenizer_free(t);
    t = tokenizer_load(small_tokenizer("t.json",
                                       "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"use_regex\": true}",
                                       "{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"ByteLevel\"}]}"));
    assert_ids(t, "hello hello", "260 262 ");
    tokenizer_free(t);
    t = tokenizer_load(
        small_tokenizer("t.json", "\"lstrip\": false}", "\"lstrip\": false}, {\"id\": 265, \"content\": \"<|\"}"));
    assert_ids(t, "<|endoftext|><|hello", "0 265 260 "); // the longest
    tokenizer_free(t);
    t = tokenizer_load(small_tokenizer("t.json", "{\"id\": 0, \"content\": \"<|endoftext|>\", \"lstrip\": false}", ""));
    assert_ids(t, "hello<|endoftext|>", "260 0 "); // only in the vocabulary
    tokenizer_free(t);
}

void load_case(void *arg) {
    tokenizer_free(tokenizer_load((const char *)arg));
}

void test_tokenizer_bad(void **state) {
    (void)state;
    static const char *const cases[][3] = {
        {"\"type\": \"BPE\"", "\"type\": \"Unigram\"", "Unigram"},
        {"\"byte_fallback\": false", "\"byte_fallback\": true", "byte_fallback"},
        {"\"dropout\": null", "\"dropout\": 0.1", "dropout"},
        {"\"dropout\": null", "\"end_of_word_suffix\": \"</w>\"", "end_of_word_suffix"},
        {"\"normalizer\": null", "\"normalizer\": {\"type\": \"NFKC\"}", "normalizer is NFKC"},
        {"\"type\": \"ByteLevel\"", "\"type\": \"Whitespace\"", "type is Whitespace"},
        {"{\"type\": \"ByteLevel\"", "{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Split\"}]",
         "pre_tokenizer's Split Regex"},
        {"{\"type\": \"ByteLevel\"",
         "{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"ByteLevel\"}, {\"type\": \"Digits\"}]",
         "last step"},
        {"\"use_regex\": true", "\"use_regex\": 1", "use_regex"},
        {"\"add_prefix_space\": false", "\"add_prefix_space\": \"no\"", "add_prefix_space"},
        {"\"pre_tokenizer\"", "\"something\"", "type is null"},
        {"\"model\"", "\"modal\"", "\"model\""},
        {"\"vocab\"", "\"vocal\"", "\"vocab\""},
        {"\"merges\"", "\"mergers\"", "\"merges\""},
        {"\"lstrip\": false", "\"single_word\": true", "single_word"},
        {"\"content\": \"<|endoftext|>\"", "\"contents\": 1", "content"},
        {"\"hello\": 260", "\"hello\": 259", "has id 259"},
        {"\"hello\": 260", "\"hell\": 260", "given twice"},
        {"\"hello\": 260", "\"hello\": 26000", "26000"},
        {"\"hello\": 260", "\"hello\": -1", "whole number"},
        {"\"hello\": 260", "\"hello\": 260.5", "whole number"},
        {"\"hello\": 260", "\"hello\": \"260\"", "whole number"},
        {"\"hello\": 260", "\"\": 260", "empty"},
        {"\"aaaa\": 264", "\"aaaa\": 265", "has id 265"},
        {"\"hello\": 260", "\"\xe2\x96\x81hello\": 260", "alphabet"},
        {"\"z\": 123", "\"zzz\": 123", "byte 0x7a has no token"},
        {"\"hell o\"", "\"hell x\"", "not all in the vocabulary"},
        {"\"hell o\"", "\"help o\"", "not all in the vocabulary"},
        {"\"hell o\"", "\"o help\"", "not all in the vocabulary"},
        {"\"hell o\"", "\"hello\"", "neither"},
        {"\"hell o\"", "[\"hello\"]", "neither"},
        {"\"hell o\"", "[\"h\", \"e\", \"l\"]", "neither"},
        {"\"hell o\"", "7", "neither"},
        {"\"version\"", "version", "bad JSON"}};
    char message[1024];
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        const char *path = small_tokenizer("bad.json", cases[i][0], cases[i][1]);
        assert_int_equal(dies(load_case, (void *)path, message, sizeof(message)), 1);
        if (!strstr(message, cases[i][2]) || !strstr(message, "bad.json"))
            fail_msg("%s: expected \"%s\", got \"%s\"", cases[i][1], cases[i][2], message);
    }
    const char *path = put_text("bad.json", "");
    assert_int_equal(dies(load_case, (void *)path, message, sizeof(message)), 1);
    assert_int_equal(dies(load_case, (void *)scratch_file("absent.json"), message, sizeof(message)), 1);
    assert_non_null(strstr(message, "absent.json"));
}

void test_tokenizer_no_endoftext(void **state) {
    (void)state;
    char message[1024];
    const char *path = small_tokenizer("bad.json", "\"content\": \"<|endoftext|>\"", "\"content\": \"<|end|>\"");
    size_t size;
    char *text = read_file(path, &size), *second = strstr(text, "\"<|endoftext|>\": 0, ");
    memmove(second, second + 20, strlen(second + 20) + 1);
    path = put_text("bad.json", text);
    free(text);
    assert_int_equal(dies(load_case, (void *)path, message, sizeof(message)), 1);
    assert_non_null(strstr(message, "<|endoftext|>"));
}

void test_tokenizer_words(void **state) { // how text is cut; the words are separated by |
    (void)state;
    static const char *const cases[] = {
        "Hello| world|!!",
        "It|'s| we|'ll| I|'m| they|'ve| he|'d| you|'re| don|'t",
        "IT|'|S| '|s",
        "x|=|12|.|5| ²|a",
        "  | a",
        "a|  ",
        "a| | b",
        "\n|\n|a",
        "\n| a",
        "a| \n| b",
        "a|\r\n\r|\n|b",
        "  ",
        "a|\xc2\xa0|b",
        "a|\xc2\xa0| b",
        "\xe2\x80\xa8|b",
        "\xe4\xb8\xad\xe6\x96\x87|\xe3\x80\x82| \xd9\x85\xd8\xb1|\xd9\xa3\xe2\x85\xa7|x",
        "e|\xcc\x81|x",
        "a|\xe2\x80\x8b|b",
        "a|\xff\xfe|b| \xc3(|x",
        " \xf0\x9f\x91\xa8\xe2\x80\x8d\xf0\x9f\x91\xa9!",
        "''|s|'|lx"};
    unsigned char *class_of = character_classes();
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char text[128] = "", cut[256] = "";
        for (const char *s = cases[i]; *s; s++)
            if (*s != '|')
                strncat(text, s, 1);
        for (size_t at = 0, n = strlen(text); at < n;) {
            size_t length = first_word(class_of, text + at, n - at);
            snprintf(cut + strlen(cut), sizeof(cut) - strlen(cut), "%s%.*s", at ? "|" : "", (int)length, text + at);
            at += length;
        }
        if (strcmp(cut, cases[i]) != 0)
            fail_msg("expected \"%s\", got \"%s\"", cases[i], cut);
    }
    free(class_of);
}

// data/tokenize counts a word of more than 1000 bytes in pieces, and looks at 1008 bytes of it only: the same pieces.
void test_tokenizer_pieces(void **state) {
    (void)state;
    static const char *const bits[] = {"a", "\xe4\xb8\xad", "\xf0\x9f\x98\x80", "\xf0\x9f\x98", " ", "\xc2\xa0", "7", "!", "\xff", "'s"};
    unsigned char *class_of = character_classes();
    for (int round = 0; round < 3000; round++) {
        char text[1100];
        size_t n = 0, most = 990 + (size_t)round % 100;
        uint64_t state_of = (uint64_t)round;
        int kind = round / 100 % 10, other = (int)(hash64((uint64_t)round) % 10);
        for (size_t turn = 985 + hash64((uint64_t)round + 7) % 20; n < most;) { // one kind, but another from the turn on
            const char *bit = bits[n < turn || draw(&state_of, 0, 2) ? kind : other];
            memcpy(text + n, bit, strlen(bit));
            n += strlen(bit);
        }
        size_t whole = first_word(class_of, text, n), part = first_word(class_of, text, n < 1008 ? n : 1008);
        assert_int_equal(whole < 1000 ? whole : 1000, part < 1000 ? part : 1000);
    }
    free(class_of);
}

void test_tokenizer_round_trip(void **state) {
    (void)state;
    Tokenizer *t = tokenizer_load(small_tokenizer("t.json", NULL, NULL));
    char text[5000];
    for (int i = 0; i < 256; i++) {
        text[0] = (char)i;
        assert_round_trip(t, text, 1);
    }
    for (int i = 0; i < 256; i++)
        text[i] = (char)i;
    assert_round_trip(t, text, 256);
    static const char *const bits[] = {"hello ",           "aaaa", "<|endoftext|>", "<|end", "\xe4\xb8\xad",
                                       "\xf0\x9f\x98\x80", " \n",  "\xc3",          "'s"};
    for (int round = 0; round < 60; round++) {
        size_t n = 0;
        for (int k = 0; n < 4900 && k < 50 * round; k++) {
            uint64_t h = hash64((uint64_t)(round * 10000 + k));
            if (round % 2) {
                text[n++] = (char)h;
            } else {
                memcpy(text + n, bits[h % 9], strlen(bits[h % 9]));
                n += strlen(bits[h % 9]);
            }
        }
        assert_round_trip(t, text, n);
    }
    tokenizer_free(t);
}

void test_tokenizer_long_word(void **state) { // a million letters: a quadratic algorithm would take an hour
    (void)state;
    Tokenizer *t = tokenizer_load(small_tokenizer("t.json", NULL, NULL));
    size_t n = 1000000;
    char *text = (char *)allocate(n, 1);
    for (size_t i = 0; i < n; i++)
        text[i] = i < n / 2 ? 'a' : "helo"[hash64(i) % 4];
    double start = seconds();
    assert_round_trip(t, text, n);
    assert_true(seconds() - start < 20);
    free(text);
    tokenizer_free(t);
}

void test_tokenizer_share(void **state) {
    (void)state;
    Tokenizer *t = tokenizer_load(small_tokenizer("t.json", NULL, NULL)), *other = tokenizer_share(t);
    assert_ids(other, "hello aaaa", "260 33 264 ");
    assert_ids(t, "hello aaaa", "260 33 264 ");
    tokenizer_free(other);
    assert_ids(t, "hello", "260 ");
    tokenizer_free(t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tokenizer_merges),
        cmocka_unit_test(test_tokenizer_forms),
        cmocka_unit_test(test_tokenizer_bad),
        cmocka_unit_test(test_tokenizer_no_endoftext),
        cmocka_unit_test(test_tokenizer_words),
        cmocka_unit_test(test_tokenizer_pieces),
        cmocka_unit_test(test_tokenizer_round_trip),
        cmocka_unit_test(test_tokenizer_long_word),
        cmocka_unit_test(test_tokenizer_share),
    };
    begin_tests();
    return cmocka_run_group_tests_name("tokenizer", tests, NULL, scratch_done);
}
