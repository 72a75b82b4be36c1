// The reader and the writer of JSON.

#include "data/json.h"
#include "dev/test/common.h"

typedef struct JsonCase {
    const char *text, *message; // message: a part of what the reader must say
    size_t size;                // 0: strlen(text)
} JsonCase;

void parse_case(void *arg) {
    const JsonCase *c = (const JsonCase *)arg;
    json_free(json_parse(c->text, c->size ? c->size : strlen(c->text), "bad.json"));
}

void test_json_values(void **state) {
    (void)state;
    const char *text =
        " {\"a\" : [1, -2.5e+3, 0, true, false, null, \"x\"], \"b\":{}, \"c\":[],\n\t\"a2\":\"\", \"d\":1, "
        "\"d\":2, \"list\":[[1],[2,3]]} ";
    Json *root = json_parse(text, strlen(text), "good.json");
    Json *a = json_get(root, "a");
    const char types[] = "nnntf0s";
    int count = 0;
    for (Json *v = a->child; v; v = v->next)
        assert_int_equal(v->type, types[count++]);
    assert_int_equal(count, 7);
    assert_true(a->child->number == 1 && a->child->next->number == -2500);
    assert_int_equal(json_get(root, "b")->type, 'o');
    assert_null(json_get(root, "b")->child);
    assert_null(json_get(root, "c")->child);
    assert_int_equal(json_get(root, "a2")->length, 0);
    assert_true(json_get(root, "d")->number == 2); // the last counts
    assert_true(json_get(root, "list")->child->next->child->next->number == 3);
    assert_null(json_get(root, "none"));
    assert_null(json_get(NULL, "a"));
    assert_null(json_get(a, "a"));
    json_free(root);
}

void test_json_strings(void **state) {
    (void)state;
    const char *text = "[\"\\\"\\\\\\/\\b\\f\\n\\r\\t\", \"\\u00e9\\u4e2d\\ud83d\\ude00\", \"\\ud83d\", \"\\ude00x\", "
                       "\"\\ud83d\\u0041\", \"a\\u0000b\", \"\xf0\x9f\x98\x80\"]";
    const char *expected[] = {"\"\\/\b\f\n\r\t",  "\xc3\xa9\xe4\xb8\xad\xf0\x9f\x98\x80",
                              "\xef\xbf\xbd",     "\xef\xbf\xbdx",
                              "\xef\xbf\xbd\x41", "a",
                              "\xf0\x9f\x98\x80"};
    Json *root = json_parse(text, strlen(text), "good.json");
    int i = 0;
    for (Json *v = root->child; v; v = v->next, i++) {
        assert_string_equal(v->text, expected[i]);
        assert_int_equal(v->length, i == 5 ? 3 : strlen(expected[i]));
    }
    json_free(root);
}

void test_json_numbers(void **state) {
    (void)state;
    const char *texts[] = {"0", "-0", "7", "1.5", "1e3", "1E-3", "-12.25e+2", "123456789012345678", "1e-999"};
    const double numbers[] = {0, 0, 7, 1.5, 1000, 0.001, -1225, 123456789012345678.0, 0};
    for (int i = 0; i < 9; i++) {
        char text[64]; // with digits behind the end, which must not be read
        snprintf(text, sizeof(text), "%s99", texts[i]);
        Json *json = json_parse(text, strlen(texts[i]), "good.json");
        assert_true(json->type == 'n' && json->number == numbers[i]);
        json_free(json);
    }
}

void test_json_bad(void **state) {
    (void)state;
    static const JsonCase cases[] = {{"", "a value, found the end", 0},
                                     {"  ", "byte 2", 0},
                                     {"{", "a string", 0},
                                     {"[", "a value", 0},
                                     {"[1", "',' or ']'", 0},
                                     {"{\"a\"", "':'", 0},
                                     {"{\"a\":1", "',' or '}'", 0},
                                     {"{\"a\":1,}", "a string", 0},
                                     {"[1,]", "a value", 0},
                                     {"[1 2]", "',' or ']'", 0},
                                     {"{a:1}", "a string", 0},
                                     {"[1]\n]", "byte 4", 0},
                                     {"tru", "a value", 0},
                                     {"NaN", "a value", 0},
                                     {"'a'", "a value", 0},
                                     {"\"a", "'\"'", 0},
                                     {"\"\\", "backslash", 0},
                                     {"\"\\x\"", "backslash", 0},
                                     {"\"\\u12g4\"", "hexadecimal", 0},
                                     {"\"\\u12", "hexadecimal", 0},
                                     {"\"\\ud800\\u12", "hexadecimal", 0},
                                     {"\"\n\"", "control", 0},
                                     {"\"\0\"", "control", 3},
                                     {"\"\xff\"", "UTF-8", 0},
                                     {"\"\xc0\x80\"", "UTF-8", 0},
                                     {"\"\xed\xa0\x80\"", "UTF-8", 0},
                                     {"\"\xe2\x82\"", "UTF-8", 0},
                                     {"01", "a number", 0},
                                     {"+1", "a value", 0},
                                     {"-", "a number", 0},
                                     {"1.", "a number", 0},
                                     {".5", "a value", 0},
                                     {"1e", "the end of the text", 0},
                                     {"1e+", "the end of the text", 0},
                                     {"-.5", "a number", 0},
                                     {"1.e5", "a number", 0},
                                     {"-01", "a number", 0},
                                     {"0x1", "a number", 0},
                                     {"-inf", "a number", 0},
                                     {"1e999", "double", 0},
                                     {"{} x", "the end of the text", 0},
                                     {"\xef\xbb\xbf{}", "a value", 0},
                                     {"{}\0", "byte 0x00", 3}};
    char message[512];
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        JsonCase c = cases[i];
        assert_int_equal(dies(parse_case, &c, message, sizeof(message)), 1);
        if (!strstr(message, c.message) || !strstr(message, "bad.json"))
            fail_msg("case %d, %s: expected \"%s\", got \"%s\"", (int)i, c.text, c.message, message);
    }
}

void test_json_deep_and_long(void **state) {
    (void)state;
    size_t size = 1 << 21;
    char *text = (char *)allocate(size + 1, 1), message[512];
    memset(text, '[', size);
    JsonCase deep = {text, "", size};
    assert_int_equal(dies(parse_case, &deep, message, sizeof(message)), 1);
    assert_non_null(strstr(message, "levels of nesting"));
    memset(text + 99, ']', 99); // 99 levels are fine
    json_free(json_parse(text, 198, "deep.json"));
    for (size_t i = 0; i + 1 < size; i += 2)
        memcpy(text + i, i ? "1," : "[1", 2);
    text[1] = ' ';
    text[size - 1] = ']';
    Json *root = json_parse(text, size, "long.json");
    size_t count = 0;
    for (Json *v = root->child; v; v = v->next)
        count++;
    assert_int_equal(count, size / 2 - 1);
    json_free(root);
    free(text);
}

void test_json_random(void **state) { // a good text with bytes changed or cut off: a tree or a message, never a crash
    (void)state;
    const char *good = "{\"a\":[1,-2.5e3,true,null,\"x\\u00e9\\n\xc3\xa9\"],\"b\":{\"c\":{\"d\":[[],{}]}}}";
    char text[128], message[512];
    for (int i = 0; i < 100; i++) {
        strcpy(text, good);
        for (int k = 0; k < 1 + i % 3; k++)
            text[hash64((uint64_t)(i * 10 + k)) % strlen(good)] = (char)hash64((uint64_t)(i * 10 + k + 5));
        JsonCase c = {text, "", 1 + hash64((uint64_t)i + 99999) % strlen(good)};
        int status = dies(parse_case, &c, message, sizeof(message));
        assert_true(status == 0 || status == 1);
    }
}

void test_json_write(void **state) {
    (void)state;
    char bytes[1024], *out = NULL;
    size_t size = 0;
    for (int i = 0; i < 1024; i++)
        bytes[i] = (char)(i < 256 ? (uint64_t)i : hash64((uint64_t)i));
    FILE *file = open_memstream(&out, &size);
    json_write_string(file, bytes, sizeof(bytes));
    fclose(file);
    Json *json = json_parse(out, size, "written.json"); // valid, whatever was written
    assert_memory_equal(json->text, bytes, 128);
    json_free(json);
    free(out);
    const char *text = "caf\xc3\xa9 \"x\\y\"\n\t\x01\xf0\x9f\x98\x80";
    file = open_memstream(&out, &size);
    json_write_string(file, text, strlen(text));
    json_write_string(file, "\xff\xe2\x82", 3);
    fclose(file);
    assert_string_equal(out, "\"caf\xc3\xa9 \\\"x\\\\y\\\"\\n\\u0009\\u0001\xf0\x9f\x98\x80\""
                             "\"\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\"");
    free(out);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_json_values),
        cmocka_unit_test(test_json_strings),
        cmocka_unit_test(test_json_numbers),
        cmocka_unit_test(test_json_bad),
        cmocka_unit_test(test_json_deep_and_long),
        cmocka_unit_test(test_json_random),
        cmocka_unit_test(test_json_write),
    };
    begin_tests();
    return cmocka_run_group_tests_name("json", tests, NULL, scratch_done);
}
