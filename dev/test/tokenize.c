// data/tokenize, the program (or the one that TOKENIZE names): the merges it learns, the token files it writes, and what it
// says of bad input.

#include "data/tokenizer.h"
#include "dev/test/shell.h"
#include "dev/test/tokens.h"

// Byte-pair encoding by its definition: look at all pairs, merge the first pair of the lowest rank, and begin again.
size_t encode_by_definition(const Tokenizer *t, const char *s, size_t n, int *ids) {
    size_t count = 0;
    for (size_t length; n > 0; s += length, n -= length) {
        length = first_word(t->class_of, s, n);
        int *word = ids + count, size = (int)length;
        for (int i = 0; i < size; i++)
            word[i] = t->byte_id[(unsigned char)s[i]];
        for (;;) {
            int best = -1;
            const Merge *merge = NULL;
            for (int i = 0; i + 1 < size; i++) {
                const Merge *m = find_merge(t, word[i], word[i + 1]);
                if (m->rank && (!merge || m->rank < merge->rank)) {
                    merge = m;
                    best = i;
                }
            }
            if (best < 0)
                break;
            word[best] = merge->id;
            memmove(word + best + 1, word + best + 2, (size_t)(--size - best - 1) * sizeof(int));
        }
        count += (size_t)size;
    }
    return count;
}

uint16_t *read_shard(const char *path, size_t *count) { // to be freed; checks the header
    size_t size;
    char *bytes = read_file(path, &size);
    int32_t header[256];
    assert_true(size >= 1024);
    memcpy(header, bytes, 1024);
    assert_int_equal(header[0], 20240520);
    assert_int_equal(header[1], 1);
    *count = (size_t)header[2];
    assert_int_equal(size, 1024 + 2 * *count);
    for (int i = 3; i < 256; i++)
        assert_int_equal(header[i], 0);
    memmove(bytes, bytes + 1024, size - 1024);
    return (uint16_t *)bytes;
}

// Writes many short documents of invented words, some of them followed by a comma.
const char *write_documents(const char *name, int documents, uint64_t seed) {
    static const char *const parts[] = {"sto", "ry",        "ba",  "na", "the",
                                        "ing", "e\xcc\x81", "cat", "12", "\xe4\xb8\xad"};
    const char *path = scratch_file(name);
    FILE *file = fopen(path, "wb");
    for (int d = 0; d < documents; d++) {
        for (int w = 0; w < 40; w++) {
            uint64_t h = hash64(seed + (uint64_t)(d * 64 + w));
            for (int k = 0; k < 1 + (int)(h % 3); k++)
                fputs(parts[(h >> 8 * (k + 1)) % 10], file);
            fputs(h >> 60 ? " " : ", ", file);
        }
        fputs(".\n<|endoftext|>\n", file);
    }
    fclose(file);
    return path;
}

void test_tokenize_trains_by_definition(void **state) {
    (void)state;
    char output[4096];
    const char *text_path = write_documents("text.txt", 60, 1), *valid = write_documents("valid.txt", 5, 2);
    enum { VOCAB = 330 };
    assert_int_equal(
        shell(output, sizeof(output), "$TOKENIZE --vocab %d %s %s --out %s", VOCAB, text_path, valid, scratch_file("d")), 0);
    Tokenizer *t = tokenizer_load(scratch_file("d/tokenizer.json"));
    assert_int_equal(t->vocab, VOCAB);

    // All words in a row, -1 between them; one merge after the other, each after counting all pairs anew.
    size_t size, n = 0;
    char *text = read_file(text_path, &size);
    int *row = (int *)allocate(2 * size, sizeof(int));
    for (char *document = text, *end; (end = strstr(document, "<|endoftext|>")) != NULL; document = end + 13) {
        while (*document == '\n')
            document++;
        char *stop = end;
        while (stop > document && stop[-1] == '\n')
            stop--;
        for (char *s = document; s < stop;) {
            size_t length = first_word(t->class_of, s, (size_t)(stop - s));
            for (size_t i = 0; i < length; i++)
                row[n++] = 1 + (unsigned char)s[i];
            row[n++] = -1;
            s += length;
        }
    }
    Json *root = json_parse(t->json, t->json_size, "tokenizer.json");
    Json *merge = json_get(json_get(root, "model"), "merges")->child;
    int *counts = (int *)allocate(VOCAB * VOCAB, sizeof(int));
    for (int token = 257; token < VOCAB; token++, merge = merge->next) {
        memset(counts, 0, VOCAB * VOCAB * sizeof(int));
        for (size_t i = 0; i + 1 < n; i++)
            if (row[i] >= 0 && row[i + 1] >= 0)
                counts[row[i] * VOCAB + row[i + 1]]++;
        int best = 0, left, right, length;
        for (int i = 0; i < VOCAB * VOCAB; i++)
            if (counts[i] > counts[best])
                best = i;
        left = best / VOCAB;
        right = best % VOCAB;
        size_t kept = 0;
        for (size_t i = 0; i < n; i++) {
            int here = row[i] == left && i + 1 < n && row[i + 1] == right;
            row[kept++] = here ? token : row[i];
            i += (size_t)here;
        }
        n = kept;
        char a[64], b[64], bytes[128];
        int a_length = alphabet_to_bytes(merge->child->text, merge->child->length, a);
        int b_length = alphabet_to_bytes(merge->child->next->text, merge->child->next->length, b);
        assert_int_equal(a_length, t->length[left]);
        assert_memory_equal(a, t->text[left], (size_t)a_length);
        assert_int_equal(b_length, t->length[right]);
        assert_memory_equal(b, t->text[right], (size_t)b_length);
        memcpy(bytes, a, (size_t)a_length);
        memcpy(bytes + a_length, b, (size_t)b_length);
        const char *made = tokenizer_text(t, token, &length);
        assert_int_equal(length, a_length + b_length);
        assert_memory_equal(bytes, made, (size_t)length);
    }
    assert_null(merge);

    int *ids = (int *)allocate(size + 1, sizeof(int)), *slow = (int *)allocate(size + 1, sizeof(int));
    size_t count = tokenizer_encode(t, text, size, ids), at = 0;
    for (char *s = text, *end; s < text + size; s = end + 13) {
        end = strstr(s, "<|endoftext|>");
        size_t stop = encode_by_definition(t, s, (size_t)((end ? end : text + size) - s), slow + at);
        at += stop;
        if (!end)
            break;
        slow[at++] = t->eot;
    }
    assert_int_equal(count, at);
    assert_memory_equal(ids, slow, at * sizeof(int));
    free(ids);
    free(slow);
    free(counts);
    free(row);
    free(text);
    json_free(root);
    tokenizer_free(t);
}

void test_tokenize_shards(void **state) {
    (void)state;
    char output[4096];
    const char *train =
        put_text("a.txt", "<|endoftext|>\nhello hello\n<|endoftext|>\n\n<|endoftext|> aaaa <|endoftext|>\nhello");
    const char *valid = put_text("a-valid.txt", "hello<|endoftext|>");
    const char *json = small_tokenizer("t.json", NULL, NULL);
    assert_int_equal(
        shell(output, sizeof(output), "$TOKENIZE --tokenizer %s %s %s --out %s", json, train, valid, scratch_file("e")), 0);
    assert_non_null(strstr(output, "3 documents"));
    assert_non_null(strstr(output, "1 empty"));
    size_t n;
    uint16_t *ids = read_shard(scratch_file("e/train_000000.bin"), &n);
    const uint16_t expected[] = {0, 260, 262, 0, 264, 0, 260};
    assert_int_equal(n, 7);
    assert_memory_equal(ids, expected, sizeof(expected));
    free(ids);
    ids = read_shard(scratch_file("e/val_000000.bin"), &n);
    assert_int_equal(n, 2);
    free(ids);
    assert_same_file(json, scratch_file("e/tokenizer.json"));
}

void test_tokenize_split(void **state) { // without a validation file the last hundredth of the documents
    (void)state;
    char output[4096];
    const char *text = write_documents("many.txt", 300, 3), *json = small_tokenizer("t.json", NULL, NULL);
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s %s --out %s", json, text, scratch_file("f")),
                     0);
    assert_non_null(strstr(output, "last 3 of 300 documents"));
    size_t n, train = 0, val = 0;
    uint16_t *ids = read_shard(scratch_file("f/train_000000.bin"), &n);
    for (size_t i = 0; i < n; i++)
        train += ids[i] == 0;
    free(ids);
    ids = read_shard(scratch_file("f/val_000000.bin"), &n);
    for (size_t i = 0; i < n; i++)
        val += ids[i] == 0;
    free(ids);
    assert_int_equal(train, 297);
    assert_int_equal(val, 3);
}

void test_tokenize_threads(void **state) {
    (void)state;
    char output[4096];
    const char *text = write_documents("many.txt", 1000, 4),
               *names[] = {"tokenizer.json", "train_000000.bin", "val_000000.bin"};
    for (int threads = 1; threads <= 2; threads++)
        assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --vocab 400 --threads %d %s --out %s%d", threads,
                               text, scratch_file("threads"), threads),
                         0);
    for (int i = 0; i < 3; i++) {
        char a[64], b[64];
        snprintf(a, sizeof(a), "threads1/%s", names[i]);
        snprintf(b, sizeof(b), "threads2/%s", names[i]);
        assert_same_file(scratch_file(a), scratch_file(b));
    }
}

void test_tokenize_long_document(void **state) { // longer than the blocks of 8 MiB that are read
    (void)state;
    char output[4096];
    size_t size = 9000000;
    char *text = (char *)allocate(size + 40, 1);
    for (size_t i = 0; i < size; i += 6)
        memcpy(text + i, " hello", 6);
    memcpy(text + size, "<|endoftext|> hello<|endoftext|>aaaa", 37);
    const char *path = put_file("long.txt", text, size + 36), *json = small_tokenizer("t.json", NULL, NULL);
    free(text);
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s %s --out %s", json, path, scratch_file("g")),
                     0);
    size_t n;
    uint16_t *ids = read_shard(scratch_file("g/train_000000.bin"), &n);
    assert_int_equal(n, 1 + size / 6 + 2);
    assert_true(ids[0] == 0 && ids[1] == 260 && ids[2] == 262 && ids[n - 3] == 262 && ids[n - 2] == 0 &&
                ids[n - 1] == 260);
    free(ids);
}

void test_tokenize_clean(void **state) {
    (void)state;
    char output[4096];
    static const char text[] = "It\xc3\xa2\xe2\x82\xac\xe2\x84\xa2s caf\xc3\x83\xc2\xa9, "
                               "\xc3\xa2\xe2\x82\xac\xc5\x93hi\xc3\xa2\xe2\x82\xac\xc2\x9d \xc3\xa2\xe2\x82\xac.\r\n"
                               "  \n\n\nEnd.  <|endoftext|>Cut off in the<|endoftext|>\n<|endoftext|>endoftext|>Right. "
                               "\xc3\xa2 propos \xc2\xab\xc3\xa9\xc2\xbb!"
                               "<|endoftext|>The End";
    static const char expected[] = "It\xe2\x80\x99s caf\xc3\xa9, \xe2\x80\x9chi\xe2\x80\x9d \xe2\x80\x9d.\n\nEnd.";
    static const char second[] = "Right. \xc3\xa2 propos \xc2\xab\xc3\xa9\xc2\xbb!";
    const char *path = put_file("dirty.txt", text, sizeof(text) - 1), *valid = put_text("dirty-valid.txt", "One.");
    const char *json = small_tokenizer("t.json", NULL, NULL);
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --clean --tokenizer %s %s %s --out %s", json, path, valid,
                           scratch_file("h")),
                     0);
    Tokenizer *t = tokenizer_load(json);
    size_t n, used = 0;
    uint16_t *ids = read_shard(scratch_file("h/train_000000.bin"), &n);
    char got[1024];
    for (size_t i = 0; i < n; i++) {
        int length;
        const char *token = tokenizer_text(t, ids[i], &length);
        if (ids[i] == 0)
            token = "|", length = 1;
        memcpy(got + used, token, (size_t)length);
        used += (size_t)length;
    }
    got[used] = 0;
    char whole[1024];
    snprintf(whole, sizeof(whole), "|%s|%s|The End", expected, second);
    assert_string_equal(got, whole);
    assert_non_null(strstr(output, "5 characters of mojibake"));
    assert_non_null(strstr(output, "1 stray"));
    assert_non_null(strstr(output, "1 empty"));
    assert_non_null(strstr(output, "1 truncated"));
    free(ids);
    tokenizer_free(t);
}

void test_tokenize_ids(void **state) {
    (void)state;
    char output[4096];
    const char *json = small_tokenizer("t.json", NULL, NULL), *path = put_text("x.txt", " hello\n<|endoftext|>\n");
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s --ids %s", json, path), 0);
    assert_string_equal(output, "262 11 0 11\n");
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s --ids - < %s", json, path), 0);
    assert_string_equal(output, "262 11 0 11\n");
}

void test_tokenize_old_shards(void **state) { // those of a former run go; other files stay
    (void)state;
    char output[4096];
    const char *text = write_documents("many.txt", 10, 5), *json = small_tokenizer("t.json", NULL, NULL);
    for (int round = 0; round < 2; round++) {
        assert_int_equal(
            shell(output, sizeof(output), "$TOKENIZE --tokenizer %s %s --out %s", json, text, scratch_file("old")), 0);
        if (round == 0)
            assert_int_equal(shell(output, sizeof(output),
                                   "cd %s && touch train_000007.bin val_000001.bin my_train.bin notes.txt train_1.txt",
                                   scratch_file("old")),
                             0);
    }
    assert_non_null(strstr(output, "my_train.bin"));
    assert_int_equal(shell(output, sizeof(output), "ls %s", scratch_file("old")), 0);
    assert_string_equal(output,
                        "my_train.bin\nnotes.txt\ntokenizer.json\ntrain_000000.bin\ntrain_1.txt\nval_000000.bin\n");
}

void test_tokenize_bad_options(void **state) {
    (void)state;
    char output[4096];
    static const char *const cases[][2] = {{"", "no text file"},
                                           {"x.txt", "--out"},
                                           {"--out d", "no text file"},
                                           {"--vocab 256 x.txt --out d", "--vocab 256"},
                                           {"--vocab 70000 x.txt --out d", "--vocab 70000"},
                                           {"--vocab 300x x.txt --out d", "300x"},
                                           {"--vocab", "--vocab"},
                                           {"--frob x.txt --out d", "--frob"},
                                           {"--vocab 300 --tokenizer t.json x.txt --out d", "one of the two"},
                                           {"--ids x.txt", "--tokenizer"},
                                           {"--threads 0 x.txt --out d", "--threads 0"}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        assert_int_equal(shell(output, sizeof(output), "$TOKENIZE %s", cases[i][0]), 2);
        if (!strstr(output, cases[i][1]))
            fail_msg("%s: expected \"%s\", got \"%s\"", cases[i][0], cases[i][1], output);
    }
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE -h"), 0);
    assert_non_null(strstr(output, "--vocab N"));
}

// Runs the program on a text that it has to refuse: with exit status 1, this message, and no file left in the output folder.
void assert_refused(const char *message, const char *prefix, const char *arguments) {
    char output[4096], here[2048];
    assert_non_null(getcwd(here, sizeof(here)));
    int status =
        shell(output, sizeof(output), "cd %s && mkdir -p out && rm -f out/* && %s %s/data/tokenize %s --out out",
              scratch_file(""), prefix, here, arguments);
    if (status != 1 || !strstr(output, message))
        fail_msg("%s: exit %d, expected \"%s\", got \"%s\"", arguments, status, message, output);
    assert_int_equal(shell(output, sizeof(output), "ls %s", scratch_file("out")), 0);
    assert_string_equal(output, "");
}

void test_tokenize_missing_file(void **state) {
    (void)state;
    assert_refused("absent.txt", "", "absent.txt");
}

void test_tokenize_folder_for_file(void **state) {
    (void)state;
    assert_refused("not a regular file", "", "out");
}

void test_tokenize_empty_file(void **state) {
    (void)state;
    put_text("empty.txt", "");
    assert_refused("empty.txt: the file is empty", "", "empty.txt");
}

void test_tokenize_no_text(void **state) {
    (void)state;
    put_text("blank.txt", " \n<|endoftext|>\n \n");
    assert_refused("no text", "", "blank.txt");
}

void test_tokenize_one_document(void **state) {
    (void)state;
    put_text("one.txt", "A single story.");
    assert_refused("1 document", "", "one.txt");
}

void test_tokenize_only_validation(void **state) {
    (void)state;
    put_text("my-valid.txt", "A story.");
    assert_refused("only validation", "", "my-valid.txt");
}

void test_tokenize_empty_validation(void **state) {
    (void)state;
    put_text("one.txt", "A single story.");
    put_text("none-valid.txt", "\n");
    assert_refused("no document for validation", "", "one.txt none-valid.txt");
}

void test_tokenize_bad_tokenizer(void **state) {
    (void)state;
    put_text("one.txt", "A single story.");
    put_text("broken.json", "{");
    assert_refused("broken.json", "", "--tokenizer broken.json one.txt");
}

void test_tokenize_large_tokenizer(void **state) { // 65537 tokens do not fit 16 bits
    (void)state;
    char output[256];
    char *more = (char *)allocate(1 << 22, 1), *end = more;
    end += sprintf(end, "\"aaaa\": 264");
    for (int id = 265; id <= 65536; id++)
        end += sprintf(end, ", \"token%d\": %d", id, id);
    small_tokenizer("large.json", "\"aaaa\": 264", more);
    free(more);
    put_text("one.txt", "hello");
    assert_refused("65537 tokens", "", "--tokenizer large.json one.txt");
    assert_int_equal(
        shell(output, sizeof(output), "$TOKENIZE --tokenizer %s --ids %s", scratch_file("large.json"), scratch_file("one.txt")),
        0);
    assert_string_equal(output, "260\n");
}

void test_tokenize_no_room(void **state) { // a limit on file sizes stands for a full disk
    (void)state;
    write_documents("many.txt", 3000, 6);
    assert_refused("cannot write", "trap '' XFSZ; ulimit -f 8;", "--vocab 300 many.txt");
    char output[256];
    if (access("/dev/full", W_OK) == 0)
        assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s --ids %s > /dev/full",
                               small_tokenizer("t.json", NULL, NULL), scratch_file("many.txt")),
                         1);
}

void test_tokenize_no_permission(void **state) {
    (void)state;
    char output[1024];
    write_documents("many.txt", 10, 7);
    put_text("file", "x");
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE %s --out %s/inner", scratch_file("many.txt"), scratch_file("file")),
                     1);
    assert_non_null(strstr(output, "file"));
    if (geteuid() == 0) // root may write anywhere
        return;
    shell(output, sizeof(output), "mkdir %s && chmod 555 %s", scratch_file("locked"), scratch_file("locked"));
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE %s --out %s", scratch_file("many.txt"), scratch_file("locked")), 1);
    assert_non_null(strstr(output, "Permission denied"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tokenize_trains_by_definition),
        cmocka_unit_test(test_tokenize_shards),
        cmocka_unit_test(test_tokenize_split),
        cmocka_unit_test(test_tokenize_threads),
        cmocka_unit_test(test_tokenize_long_document),
        cmocka_unit_test(test_tokenize_clean),
        cmocka_unit_test(test_tokenize_ids),
        cmocka_unit_test(test_tokenize_old_shards),
        cmocka_unit_test(test_tokenize_bad_options),
        cmocka_unit_test(test_tokenize_missing_file),
        cmocka_unit_test(test_tokenize_folder_for_file),
        cmocka_unit_test(test_tokenize_empty_file),
        cmocka_unit_test(test_tokenize_no_text),
        cmocka_unit_test(test_tokenize_one_document),
        cmocka_unit_test(test_tokenize_only_validation),
        cmocka_unit_test(test_tokenize_empty_validation),
        cmocka_unit_test(test_tokenize_bad_tokenizer),
        cmocka_unit_test(test_tokenize_large_tokenizer),
        cmocka_unit_test(test_tokenize_no_room),
        cmocka_unit_test(test_tokenize_no_permission),
    };
    setenv("TOKENIZE", "data/tokenize", 0);
    begin_tests();
    return cmocka_run_group_tests_name("tokenize", tests, NULL, scratch_done);
}
