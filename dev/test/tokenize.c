// data/tokenize, the program (or the one that TOKENIZE names): the merges it learns, the token files it writes, and what it
// says of bad input.

#include "data/checksum.h"
#include "data/tokenizer.h"
#include "dev/test/shell.h"
#include <sys/socket.h>
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
    uint64_t sum = checksum_of(bytes + 1024, size - 1024);
    assert_int_equal(header[3], 0x6d757363);
    assert_int_equal((uint32_t)header[4], (uint32_t)sum);
    assert_int_equal((uint32_t)header[5], (uint32_t)(sum >> 32));
    for (int i = 6; i < 256; i++)
        assert_int_equal(header[i], 0);
    memmove(bytes, bytes + 1024, size - 1024);
    return (uint16_t *)bytes;
}

void assert_shard(const char *name, const uint16_t *expected, size_t count) {
    size_t n;
    uint16_t *ids = read_shard(scratch_file(name), &n);
    assert_int_equal(n, count);
    assert_memory_equal(ids, expected, 2 * count);
    free(ids);
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
        int32_t byte_of[0x144];
        alphabet_bytes(byte_of);
        int a_length = alphabet_to_bytes(byte_of, merge->child->text, merge->child->length, a);
        int b_length = alphabet_to_bytes(byte_of, merge->child->next->text, merge->child->next->length, b);
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
                                           {"--vocab 400 -x.txt --out d", "data/tokenize: -x.txt: "},
                                           {"--vocab 400 x.txt -y --out d", "data/tokenize: -y: "},
                                           {"--vocab 400 x.txt --outt d", "data/tokenize: --outt: "},
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
    put_text("my-val.txt", "A story.");
    assert_refused("only validation", "", "my-val.txt");
}

void test_tokenize_empty_validation(void **state) {
    (void)state;
    put_text("one.txt", "A single story.");
    put_text("none-valid.txt", "\n");
    assert_refused("no document for validation", "", "one.txt none-valid.txt");
}

void test_tokenize_both_roles(void **state) { // a name that says both
    (void)state;
    put_text("a.txt", "A story.");
    put_text("train-and-val.txt", "A story.");
    assert_refused("train-and-val.txt: the name has a word for training", "", "a.txt train-and-val.txt");
}

void test_tokenize_roles(void **state) { // "medieval" and "invalid" are no words for validation
    (void)state;
    char output[4096];
    const char *json = small_tokenizer("t.json", NULL, NULL), *names[] = {"medieval.txt", "invalid_text.txt", "pretrain_val.txt"};
    char *program = realpath(getenv("TOKENIZE"), NULL);
    for (int i = 0; i < 3; i++)
        put_text(names[i], i < 2 ? "hello hello" : "aaaa");
    assert_int_equal(shell(output, sizeof(output), "cd %s && %s --tokenizer %s medieval.txt invalid_text.txt "
                           "pretrain_val.txt --out roles", scratch_file(""), program, json), 0);
    const uint16_t train[] = {0, 260, 262, 0, 260, 262}, val[] = {0, 264};
    assert_shard("roles/train_000000.bin", train, 6);
    assert_shard("roles/val_000000.bin", val, 2);
    free(program);
}

void test_tokenize_set_aside(void **state) { // the vocabulary is learned without the documents of validation
    (void)state;
    char output[4096], text[4096] = "";
    for (int i = 0; i < 20; i++)
        strcat(text, "abab abab<|endoftext|>");
    strcat(text, "xyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxyxy xyxyxy");
    const char *path = put_text("one.txt", text);
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --vocab 300 %s --out %s", path, scratch_file("aside")), 0);
    assert_non_null(strstr(output, "last 1 of 21 documents"));
    Tokenizer *t = tokenizer_load(scratch_file("aside/tokenizer.json"));
    for (int id = 257; id < t->vocab; id++)
        assert_null(memchr(t->text[id], 'x', (size_t)t->length[id]));
    assert_true(t->vocab > 257); // ab
    tokenizer_free(t);
}

void test_tokenize_long_run(void **state) { // without a break: once it took a minute for 8 MB
    (void)state;
    char output[4096];
    size_t n = 8000000, count;
    char *text = (char *)allocate(n, 1);
    const char *path = put_file("zeros.txt", text, n), *valid = put_text("zeros-valid.txt", "A story.");
    double start = seconds();
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --vocab 257 %s %s --out %s", path, valid, scratch_file("run")), 0);
    assert_true(seconds() - start < 10);
    uint16_t *ids = read_shard(scratch_file("run/train_000000.bin"), &count);
    assert_int_equal(count, n + 1);
    free(ids);
    free(text);
}

void test_tokenize_bad_tokenizer(void **state) {
    (void)state;
    put_text("one.txt", "A single story.");
    put_text("broken.json", "{");
    assert_refused("broken.json", "", "--tokenizer broken.json one.txt");
}

void test_tokenize_large_tokenizer(void **state) { // 65537 tokens do not fit 16 bits
    (void)state;
    char output[512];
    char *more = (char *)allocate(1 << 22, 1), *end = more;
    end += sprintf(end, "\"aaaa\": 65536");
    for (int id = 264; id < 65536; id++)
        end += sprintf(end, ", \"token%d\": %d", id, id);
    small_tokenizer("large.json", "\"aaaa\": 264", more);
    free(more);
    put_text("two.txt", "hello<|endoftext|>aaaa");
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s %s --out %s", scratch_file("large.json"),
                           scratch_file("two.txt"), scratch_file("wide")),
                     0);
    size_t size;
    char *bytes = read_file(scratch_file("wide/val_000000.bin"), &size);
    const uint32_t tokens[] = {0, 65536};
    const int32_t header[] = {20240801, 7, 2}; // llm.c's for Llama 3
    assert_int_equal(size, 1024 + sizeof(tokens));
    assert_memory_equal(bytes, header, sizeof(header));
    assert_memory_equal(bytes + 1024, tokens, sizeof(tokens));
    free(bytes);
}

// A model's folder is as good as its tokenizer.json, and what ends a text there is between the documents here. The files
// of the next run have no such file any more.
void test_tokenize_folder(void **state) {
    (void)state;
    char output[512];
    mkdir(scratch_file("model"), 0777);
    small_tokenizer("model/tokenizer.json", NULL, NULL);
    put_text("model/generation_config.json", "{\"eos_token_id\": 259}");
    put_text("two.txt", "hello<|endoftext|>aaaa");
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s %s --out %s", scratch_file("model"),
                           scratch_file("two.txt"), scratch_file("ends")),
                     0);
    assert_non_null(strstr(output, "begins with hell (generation_config.json"));
    const uint16_t expected[] = {259, 264};
    assert_shard("ends/val_000000.bin", expected, 2);
    Tokenizer *t = tokenizer_load(scratch_file("ends"));
    assert_int_equal(t->eot, 259);
    tokenizer_free(t);
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s %s --out %s", small_tokenizer("t.json", NULL, NULL),
                           scratch_file("two.txt"), scratch_file("ends")),
                     0);
    t = tokenizer_load(scratch_file("ends"));
    assert_int_equal(t->eot, 0);
    tokenizer_free(t);
}

void test_tokenize_no_room(void **state) { // a limit on file sizes stands for a full disk
    (void)state;
    write_documents("many.txt", 3000, 6);
    assert_refused("unfinished-tokens/train_000000.bin: cannot write: File too large", "ulimit -f 16;",
                   "--vocab 300 many.txt"); // SIGXFSZ would end it without a word
    assert_refused("unfinished-tokens/tokenizer.json: cannot write: File too large", "ulimit -f 2;", "--vocab 300 many.txt");
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

// Starts the program on a text that keeps it busy for long, and sends it a signal after so many seconds.
int stop_after(double wait, int number, const char *options, const char *text, double *took) {
    char *arguments[16] = {getenv("TOKENIZE")}, line[256], *rest = line;
    int count = 1, status;
    snprintf(line, sizeof(line), "%s", options);
    for (char *word = strsep(&rest, " "); word; word = strsep(&rest, " "))
        arguments[count++] = word;
    char path[256], out[256];
    snprintf(arguments[count++] = path, sizeof(path), "%s", scratch_file(text));
    arguments[count++] = (char *)"--out";
    snprintf(arguments[count++] = out, sizeof(out), "%s", scratch_file("stopped"));
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        signal(number, SIG_DFL); // a shell may have started the tests with SIGINT ignored: `make test &`
        freopen(scratch_file("said"), "w", stderr);
        freopen("/dev/null", "w", stdout);
        execv(arguments[0], arguments);
        _exit(127);
    }
    usleep((unsigned)(wait * 1e6));
    double start = seconds();
    kill(child, number);
    assert_int_equal(waitpid(child, &status, 0), child);
    *took = seconds() - start;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

void test_tokenize_signals(void **state) { // end any phase within a second, and nothing has changed
    (void)state;
    if (is_slow())
        skip();
    size_t n = 30000000, size;
    char *text = (char *)allocate(n, 1), output[4096];
    const char *json = small_tokenizer("t.json", NULL, NULL);
    memset(text, 'a', n);
    memcpy(text + 20, "<|endoftext|>", 13);
    put_file("busy.txt", text, n); // one word of 30 MB
    for (size_t i = 0; i < n; i++)
        text[i] = (char)('a' + hash64(i) % 26);
    memcpy(text + 20, "<|endoftext|>", 13);
    put_file("letters.txt", text, n);
    free(text);
    write_documents("many.txt", 10, 5);
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s %s --out %s", json, scratch_file("many.txt"),
                           scratch_file("stopped")), 0);
    assert_int_equal(shell(output, sizeof(output), "cd %s && cat *", scratch_file("stopped")), 0);
    uint64_t before = checksum_of(output, said_size);
    char encode[300];
    snprintf(encode, sizeof(encode), "--tokenizer %s", json);
    const struct {
        double wait;
        int number;
        const char *options, *text;
    } cases[] = {{0.02, SIGTERM, "--vocab 400", "letters.txt"}, {1.5, SIGINT, "--vocab 400", "letters.txt"},
                 {1, SIGTERM, encode, "busy.txt"}, {0.3, SIGHUP, encode, "busy.txt"}};
    for (int i = 0; i < COUNT(cases); i++) {
        double took;
        int status = stop_after(cases[i].wait, cases[i].number, cases[i].options, cases[i].text, &took);
        char *message = read_file(scratch_file("said"), &size);
        if (took > 1 || (i > 0 && (status != 1 || !strstr(message, "interrupted; nothing was changed"))))
            fail_msg("case %d: exit %d after %.1f s: %s", i, status, took, message);
        free(message);
        remove_tree(scratch_file("stopped/unfinished-tokens")); // the first signal may come before there is a thread for it
        assert_int_equal(shell(output, sizeof(output), "cd %s && cat *", scratch_file("stopped")), 0);
        assert_true(checksum_of(output, said_size) == before);
    }
}

void test_tokenize_descriptors(void **state) { // standard input that has no name, output that is closed or full
    (void)state;
    char output[4096];
    const char *json = small_tokenizer("t.json", NULL, NULL), *path = put_text("x.txt", " hello");
    write_documents("many.txt", 10, 5);
    int ends[2];
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0); // /dev/stdin cannot be opened where it is a socket
    assert_int_equal(write(ends[1], " hello", 6), 6);
    close(ends[1]);
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s --ids - <&%d", json, ends[0]), 0);
    assert_string_equal(output, "262\n");
    close(ends[0]);
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s --ids - <&-", json), 1);
    assert_non_null(strstr(output, "standard input: "));

    // A closed descriptor is not that of a token file, and what was not printed is an error.
    assert_int_equal(shell(output, sizeof(output), "($TOKENIZE --tokenizer %s %s --out %s >&- 2>&-)", json, scratch_file("many.txt"),
                           scratch_file("closed")), 1);
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s %s --out %s", json, scratch_file("many.txt"),
                           scratch_file("open")), 0);
    const char *names[] = {"tokenizer.json", "train_000000.bin", "val_000000.bin"};
    for (int i = 0; i < 3; i++) {
        char a[64], b[64];
        snprintf(a, sizeof(a), "closed/%s", names[i]);
        snprintf(b, sizeof(b), "open/%s", names[i]);
        assert_same_file(scratch_file(a), scratch_file(b));
    }
    assert_int_equal(shell(output, sizeof(output), "($TOKENIZE --tokenizer %s --ids %s >&-)", json, path), 1);
    if (access("/dev/full", W_OK) == 0) {
        assert_int_equal(shell(output, sizeof(output), "$TOKENIZE -h > /dev/full"), 1);
        assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s %s --out %s > /dev/full", json,
                               scratch_file("many.txt"), scratch_file("closed")), 1);
    }
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --vocab 300 - --out %s < %s", scratch_file("closed"), path), 1);
    assert_non_null(strstr(output, "more than once"));
}

// A library that makes calls fail: opendir of names with FAIL_OPENDIR in them, and rename, the FAIL_RENAME-th (FAIL_MORE: and
// all that follow; FAIL_KILL: it ends the program). Returns the beginning of a command, or null where it cannot be built.
const char *failing_calls(void) {
    static char prefix[400];
    char output[4096];
    const char *source = put_text("fail.c",
        "#define _GNU_SOURCE\n#include <dirent.h>\n#include <dlfcn.h>\n#include <errno.h>\n#include <signal.h>\n#include <stdio.h>\n#include <stdlib.h>\n"
        "#include <string.h>\n"
        "DIR *opendir(const char *path) {\n"
        "    DIR *(*real)(const char *) = (DIR *(*)(const char *))dlsym(RTLD_NEXT, \"opendir\");\n"
        "    const char *part = getenv(\"FAIL_OPENDIR\");\n"
        "    if (part && strstr(path, part)) { errno = ENOMEM; return NULL; }\n"
        "    return real(path);\n}\n"
        "int rename(const char *a, const char *b) {\n"
        "    int (*real)(const char *, const char *) = (int (*)(const char *, const char *))dlsym(RTLD_NEXT, \"rename\");\n"
        "    static int calls;\n"
        "    int which = getenv(\"FAIL_RENAME\") ? atoi(getenv(\"FAIL_RENAME\")) : 0;\n"
        "    calls++;\n"
        "    if (which == calls && getenv(\"FAIL_KILL\")) raise(SIGKILL);\n"
        "    if (which && (calls == which || (getenv(\"FAIL_MORE\") && calls > which))) { errno = EIO; return -1; }\n"
        "    return real(a, b);\n}\n");
    if (is_slow() || shell(output, sizeof(output), "cc -shared -fPIC -o %s %s -ldl", scratch_file("fail.so"), source) != 0)
        return NULL;
    snprintf(prefix, sizeof(prefix), "ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 LD_PRELOAD=%s", scratch_file("fail.so"));
    return prefix;
}

void test_tokenize_replacing(void **state) { // all old files or all new ones, or a message that says what is where
    (void)state;
    char output[4096];
    const char *prefix = failing_calls();
    if (!prefix)
        skip();
    char old[256], fresh[256];
    snprintf(old, sizeof(old), "%s", write_documents("old.txt", 10, 5));
    snprintf(fresh, sizeof(fresh), "%s", write_documents("new.txt", 10, 6));
    char json[256], out[256], blank[256];
    snprintf(json, sizeof(json), "%s", small_tokenizer("t.json", NULL, NULL));
    snprintf(out, sizeof(out), "%s", scratch_file("swap"));
    snprintf(blank, sizeof(blank), "%s", put_text("blank.txt", "\n"));

    // The folder of new files cannot be listed: once, nothing was moved then, and all was said to be well.
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s %s --out %s", json, old, out), 0);
    assert_int_equal(shell(output, sizeof(output), "cd %s && cat *.bin", out), 0);
    uint64_t before = checksum_of(output, said_size);
    assert_int_equal(shell(output, sizeof(output), "%s FAIL_OPENDIR=unfinished $TOKENIZE --vocab 300 %s --out %s", prefix, fresh,
                           out), 0);
    assert_int_equal(shell(output, sizeof(output), "cd %s && cat *.bin", out), 0);
    uint64_t after = checksum_of(output, said_size);
    assert_true(after != before);
    assert_int_equal(shell(output, sizeof(output), "rm -r %s; $TOKENIZE --tokenizer %s %s --out %s", out, json, old, out), 0);

    // The output folder cannot be listed: nobody knows what there is to be replaced.
    assert_int_equal(shell(output, sizeof(output), "%s FAIL_OPENDIR=swap $TOKENIZE --vocab 300 %s --out %s", prefix, fresh, out), 1);

    // Each call of rename fails: three move old files, three new ones.
    for (int call = 1; call <= 6; call++) {
        int status = shell(output, sizeof(output), "%s FAIL_RENAME=%d $TOKENIZE --vocab 300 %s --out %s", prefix, call, fresh, out);
        expect(status, 1, NULL);
        assert_true(strstr(output, "swap: cannot move") && strstr(output, "nothing was changed"));
        assert_int_equal(shell(output, sizeof(output), "cd %s && cat *.bin", out), 0);
        assert_true(checksum_of(output, said_size) == before);
        assert_int_equal(shell(output, sizeof(output), "ls %s", out), 0);
        assert_string_equal(output, "tokenizer.json\ntrain_000000.bin\nval_000000.bin\n");
    }

    // All calls from then on fail, so nothing can be moved back, but nothing is lost.
    for (int call = 2; call <= 6; call++) {
        assert_int_equal(shell(output, sizeof(output), "%s FAIL_RENAME=%d FAIL_MORE=1 $TOKENIZE --vocab 300 %s --out %s", prefix,
                               call, fresh, out), 1);
        assert_non_null(strstr(output, call == 2 ? "of these tokenizer.json to tokenizer.json are in" : call == 3 ?
            "of these tokenizer.json to train_000000.bin are in" : call == 4 ? "of these tokenizer.json to val_000000.bin" :
            call == 5 ? "train_000000.bin to train_000000.bin are there" : "train_000000.bin to val_000000.bin are there"));
        assert_int_equal(shell(output, sizeof(output), "find %s -type f | wc -l; test ! -e %s/tokenizer.json", out, out), 0);
        assert_int_equal(atoi(output), 6);
        assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s %s --out %s; ls %s | wc -l", json, old, out, out), 0);
        assert_true(strcmp(output + strlen(output) - 2, "3\n") == 0); // the same command again
    }

    // A kill at each of them: either nothing has changed, or there is no tokenizer.json. The command again makes all well.
    for (int call = 1; call <= 6; call++) {
        shell(output, sizeof(output), "exec env %s FAIL_RENAME=%d FAIL_KILL=1 $TOKENIZE --vocab 300 %s --out %s", prefix, call, fresh,
              out);
        assert_int_equal(access(scratch_file("swap/tokenizer.json"), F_OK), call == 1 ? 0 : -1);

        // Even where it then fails, all old files are back, and a line says so.
        if (call % 2) {
            assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s %s --out %s", json, blank, out), 1);
            assert_true(call == 1 || strstr(output, "swap: an earlier run was ended while it replaced the files there"));
            assert_int_equal(shell(output, sizeof(output), "cd %s && cat *.bin", out), 0);
            assert_true(checksum_of(output, said_size) == before);
            assert_same_file(json, scratch_file("swap/tokenizer.json"));
        }
        assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s %s --out %s", json, old, out), 0);
        assert_int_equal(shell(output, sizeof(output), "ls %s", out), 0);
        assert_string_equal(output, "tokenizer.json\ntrain_000000.bin\nval_000000.bin\n");
    }
}

void test_tokenize_restoring(void **state) { // what a kill left is put back, also where there are more new files than old ones
    (void)state;
    char output[4096];
    char json[256], out[256], blank[256];
    const char *text = write_documents("old.txt", 10, 5);
    snprintf(json, sizeof(json), "%s", small_tokenizer("t.json", NULL, NULL));
    snprintf(out, sizeof(out), "%s", scratch_file("half"));
    snprintf(blank, sizeof(blank), "%s", put_text("blank.txt", "\n"));
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s %s --out %s; cd %s && cat *.bin", json, text, out, out), 0);
    assert_int_equal(shell(output, sizeof(output), "cd %s && cat *.bin", out), 0);
    uint64_t before = checksum_of(output, said_size);
    static const char *const left[] = {
        "mv tokenizer.json replaced-tokens", "mv tokenizer.json train_000000.bin replaced-tokens",
        "mv *.json *.bin replaced-tokens", "mv *.json *.bin replaced-tokens; echo new > train_000000.bin",
        "mv *.json *.bin replaced-tokens; for i in 0 1 2; do echo new > train_00000$i.bin; done",
        "mv *.json *.bin replaced-tokens; for i in 0 1 2; do echo new > train_00000$i.bin; done; echo new > val_000000.bin"};
    for (int i = 0; i < COUNT(left); i++) {
        assert_int_equal(shell(output, sizeof(output), "cd %s && mkdir replaced-tokens && %s", out, left[i]), 0);
        assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s %s --out %s", json, blank, out), 1);
        assert_non_null(strstr(output, "half: an earlier run was ended while it replaced the files there; the old ones are back"));
        assert_int_equal(shell(output, sizeof(output), "cd %s && cat *.bin", out), 0);
        assert_true(checksum_of(output, said_size) == before);
        assert_same_file(json, scratch_file("half/tokenizer.json"));
        assert_int_equal(shell(output, sizeof(output), "ls %s", out), 0);
        assert_string_equal(output, "tokenizer.json\ntrain_000000.bin\nval_000000.bin\n");
    }
}

void test_tokenize_no_reader(void **state) { // data/tokenize | head: once a signal ended it, and unfinished-tokens stayed
    (void)state;
    char output[4096];
    const char *json = small_tokenizer("t.json", NULL, NULL), *text = write_documents("many.txt", 10, 5), *out = scratch_file("pipe");
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    close(ends[0]);
    int status = shell(output, sizeof(output), "($TOKENIZE --tokenizer %s %s --out %s >&%d)", json, text, out, ends[1]);
    close(ends[1]);
    if (status != 1 || !strstr(output, "standard output: cannot write"))
        fail_msg("exit %d: %s", status, output);
    assert_int_equal(shell(output, sizeof(output), "ls %s", out), 0);
    assert_string_equal(output, "tokenizer.json\ntrain_000000.bin\nval_000000.bin\n");
}

void test_tokenize_stories(void **state) { // data/make_stories, where its output cannot be written
    (void)state;
    char output[4096];
    if (is_slow() || access("data/make_stories", X_OK) != 0)
        skip();
    assert_int_equal(shell(output, sizeof(output), "(data/make_stories >&-)"), 1);
    assert_non_null(strstr(output, "cannot write"));
    assert_int_equal(shell(output, sizeof(output), "(ulimit -f 8; data/make_stories --count 1000 > %s)", scratch_file("s.txt")), 1);
    assert_non_null(strstr(output, "cannot write"));
}

void test_tokenize_in_the_way(void **state) { // a folder with the name of a token file is no old token file
    (void)state;
    char output[4096];
    const char *text = write_documents("many.txt", 10, 5), *json = small_tokenizer("t.json", NULL, NULL);
    assert_int_equal(shell(output, sizeof(output), "mkdir -p %s/val_000003.bin/mine", scratch_file("way")), 0);
    assert_int_equal(shell(output, sizeof(output), "$TOKENIZE --tokenizer %s %s --out %s", json, text, scratch_file("way")), 1);
    assert_non_null(strstr(output, "val_000003.bin: not a file"));
    assert_int_equal(access(scratch_file("way/val_000003.bin/mine"), F_OK), 0);
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
        cmocka_unit_test(test_tokenize_both_roles),
        cmocka_unit_test(test_tokenize_roles),
        cmocka_unit_test(test_tokenize_set_aside),
        cmocka_unit_test(test_tokenize_long_run),
        cmocka_unit_test(test_tokenize_bad_tokenizer),
        cmocka_unit_test(test_tokenize_large_tokenizer),
        cmocka_unit_test(test_tokenize_folder),
        cmocka_unit_test(test_tokenize_no_room),
        cmocka_unit_test(test_tokenize_no_permission),
        cmocka_unit_test(test_tokenize_signals),
        cmocka_unit_test(test_tokenize_descriptors),
        cmocka_unit_test(test_tokenize_replacing),
        cmocka_unit_test(test_tokenize_in_the_way),
        cmocka_unit_test(test_tokenize_restoring),
        cmocka_unit_test(test_tokenize_no_reader),
        cmocka_unit_test(test_tokenize_stories),
    };
    setenv("TOKENIZE", "data/tokenize", 0);
    begin_tests();
    return cmocka_run_group_tests_name("tokenize", tests, NULL, scratch_done);
}
