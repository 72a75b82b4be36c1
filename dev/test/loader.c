// The data loader: which tokens are in which batch, and what is said of bad files.

#include "data/loader.h"
#include "dev/test/common.h"

// Writes a token file whose header says `claimed` tokens, and which holds `count`: first, first + 1, ...
void put_shard(const char *name, int magic, int version, int claimed, int count, int first) {
    int32_t header[256] = {magic, version, claimed};
    char *bytes = (char *)allocate(1024 + 2 * (size_t)count, 1);
    memcpy(bytes, header, 1024);
    for (int i = 0; i < count; i++) {
        uint16_t token = (uint16_t)(first + i);
        memcpy(bytes + 1024 + 2 * i, &token, 2);
    }
    put_file(name, bytes, 1024 + 2 * (size_t)count);
    free(bytes);
}

// Writes shards in which every token is different, so that a window shows where it comes from. With T = 10 they have
// 10 + 4 + 1 + 0 windows.
void put_shards(const char *folder) {
    static const struct {
        const char *name;
        int count, first;
    } files[] = {{"b_train.bin", 105, 0},
                 {"train_10.bin", 41, 1000},
                 {"train_9.bin", 11, 2000},
                 {"train_99.bin", 10, 3000},
                 {"val.bin", 50, 5000}};
    assert_true(mkdir(scratch_file(folder), 0777) == 0 || errno == EEXIST);
    for (int i = 0; i < 5; i++) {
        char name[64];
        snprintf(name, sizeof(name), "%s/%s", folder, files[i].name);
        put_shard(name, TOKENS_MAGIC, 1, files[i].count, files[i].count, files[i].first);
    }
    char name[64];
    snprintf(name, sizeof(name), "%s/train.txt", folder);
    put_text(name, "not this one");
}

void test_loader(void **state) {
    (void)state;
    put_shards("shards");
    const int windows = 15, T = 10;
    int inputs[150], targets[150], starts[2][3][15], order[2][3][15];
    for (int seed = 0; seed < 2; seed++) {
        Data *d = data_open(scratch_file("shards"), "train", T, 65536, (uint64_t)seed);
        assert_int_equal(d->windows, windows);
        assert_int_equal(d->shard_count, 4);
        assert_true(d->tokens == 105 + 41 + 11); // no window, so its tokens do not count
        static const char *const names[] = {"b_train.bin", "train_10.bin", "train_9.bin", "train_99.bin"};
        for (int i = 0; i < 4; i++)
            assert_string_equal(strrchr(d->shards[i].path, '/') + 1, names[i]);
        for (int w = 0; w < windows; w++) { // unshifted, as in validation
            data_window(d, w, -1, inputs, targets);
            assert_int_equal(inputs[0], w < 10 ? w * T : w < 14 ? 1000 + (w - 10) * T : 2000);
        }
        for (int epoch = 0; epoch < 3; epoch++) {
            int seen[15] = {0}, shift[3] = {-1, -1, -1};
            data_batch(d, (long)epoch * windows, windows, inputs, targets);
            for (int w = 0; w < windows; w++) {
                int start = starts[seed][epoch][w] = inputs[w * T], shard = start / 1000, at = start % 1000;
                for (int t = 0; t < T; t++) { // one after the other, so all of one shard
                    assert_int_equal(inputs[w * T + t], start + t);
                    assert_int_equal(targets[w * T + t], start + t + 1);
                }
                assert_true(shift[shard] < 0 || shift[shard] == at % T); // the cuts are shifted together
                shift[shard] = at % T;
                order[seed][epoch][w] = (shard == 0 ? 0 : shard == 1 ? 10 : 14) + at / T;
                seen[order[seed][epoch][w]]++;
            }
            assert_true(shift[0] <= 4 && shift[1] == 0 && shift[2] == 0); // within what is left over
            for (int w = 0; w < windows; w++)
                assert_int_equal(seen[w], 1);
        }
        for (int first = 40; first >= 0; first -= 7) { // in any order and any batches: what a resumed run asks for
            data_batch(d, first, 3, inputs, targets);
            for (int b = 0; b < 3 && first + b < 45; b++)
                assert_int_equal(inputs[b * T], starts[seed][(first + b) / windows][(first + b) % windows]);
        }
        data_close(d);
    }
    assert_true(memcmp(order[0][0], order[1][0], sizeof(order[0][0])) != 0);
    assert_true(memcmp(order[0][0], order[0][1], sizeof(order[0][0])) != 0);
    Data *val = data_open(scratch_file("shards"), "val", T, 65536, 1);
    assert_int_equal(val->windows, 4);
    data_close(val);
}

void load_all(void *arg) { // opens a folder and reads all its windows
    const char *folder = (const char *)arg;
    int inputs[10], targets[10];
    Data *d = data_open(scratch_file(folder), "train", 10, 4000, 1);
    for (long w = 0; w < d->windows; w++)
        data_batch(d, w, 1, inputs, targets);
    data_close(d);
}

// Tokens of 32 bits, as data/tokenize writes them for a large vocabulary.
void test_loader_wide(void **state) {
    (void)state;
    uint32_t file[256 + 21] = {WIDE_MAGIC, 7, 21};
    int inputs[10], targets[10];
    char message[1024];
    for (uint32_t i = 0; i < 21; i++)
        file[256 + i] = 100000 + i;
    mkdir(scratch_file("wide"), 0777);
    put_file("wide/train.bin", (const char *)file, sizeof(file));
    Data *d = data_open(scratch_file("wide"), "train", 10, 100021, 1);
    assert_int_equal(d->windows, 2);
    data_window(d, 1, -1, inputs, targets);
    assert_int_equal(inputs[0], 100010);
    assert_int_equal(targets[9], 100020);
    data_close(d);
    assert_int_equal(dies(load_all, (void *)"wide", message, sizeof(message)), 1); // a vocabulary of 4000
    assert_non_null(strstr(message, "token 0 is 100000"));
    file[256] = 1;
    file[257] = 0xffffffff;
    put_file("wide/train.bin", (const char *)file, sizeof(file));
    assert_int_equal(dies(load_all, (void *)"wide", message, sizeof(message)), 1);
    assert_non_null(strstr(message, "token 1 is 2147483647"));
    file[1] = 1;
    put_file("wide/train.bin", (const char *)file, sizeof(file));
    assert_int_equal(dies(load_all, (void *)"wide", message, sizeof(message)), 1);
    assert_non_null(strstr(message, "found 20240801 and 1"));
}

void test_loader_bad(void **state) {
    (void)state;
    static const struct {
        const char *name; // of the file that goes bad; NULL: there is no folder, "": an empty one
        int magic, version, claimed, count, first, cut; // cut: the file has so many bytes only; 0: all
        const char *message;
    } cases[] = {
        {"train_9.bin", TOKENS_MAGIC, 1, 11, 11, 2000, 0, NULL}, // as it was
        {"train_9.bin", TOKENS_MAGIC, 1, 0, 0, 0, 0, NULL},      // no tokens are no damage
        {"train_9.bin", TOKENS_MAGIC, 1, 11, 11, 2000, -1, "0 bytes"},
        {"train_9.bin", TOKENS_MAGIC, 1, 11, 11, 2000, 1023, "1023 bytes"},
        {"train_9.bin", TOKENS_MAGIC, 1, 11, 11, 2000, 1040, "11 tokens"},
        {"train_9.bin", TOKENS_MAGIC, 1, 12, 11, 2000, 0, "12 tokens"},
        {"train_9.bin", TOKENS_MAGIC, 1, 10, 11, 2000, 0, "10 tokens"},
        {"train_9.bin", TOKENS_MAGIC, 1, -1, 11, 2000, 0, "-1 tokens"},
        {"train_9.bin", TOKENS_MAGIC, 1, 2147483647, 11, 2000, 0, "2147483647 tokens"},
        {"train_9.bin", 20240521, 1, 11, 11, 2000, 0, "20240521"},
        {"train_9.bin", TOKENS_MAGIC, 2, 11, 11, 2000, 0, "version 1"},
        {"train_9.bin", TOKENS_MAGIC, 1, 11, 11, 3990, 0, "token 10 is 4000"},
        {NULL, 0, 0, 0, 0, 0, 0, "No such file"},
        {"", 0, 0, 0, 0, 0, 0, "the word train"},
    };
    for (int i = 0; i < (int)(sizeof(cases) / sizeof(cases[0])); i++) {
        char message[1024], name[64];
        remove_tree(scratch_file("bad"));
        if (cases[i].name && !cases[i].name[0])
            assert_int_equal(mkdir(scratch_file("bad"), 0777), 0);
        else if (cases[i].name)
            put_shards("bad");
        if (cases[i].name && cases[i].name[0]) {
            snprintf(name, sizeof(name), "bad/%s", cases[i].name);
            put_shard(name, cases[i].magic, cases[i].version, cases[i].claimed, cases[i].count, cases[i].first);
            if (cases[i].cut)
                assert_int_equal(truncate(scratch_file(name), cases[i].cut < 0 ? 0 : cases[i].cut), 0);
        }
        int status = dies(load_all, (void *)"bad", message, sizeof(message));
        const char *file = cases[i].name && cases[i].name[0] ? name : "bad";
        if (status != (cases[i].message ? 1 : 0) ||
            (cases[i].message && (!strstr(message, cases[i].message) || !strstr(message, file))))
            fail_msg("case %d: exit status %d, expected \"%s\" about %s; it said: %s", i, status,
                     cases[i].message ? cases[i].message : "", file, message);
    }
    for (int i = 0; i < 2; i++) { // nothing but a file of ten tokens: too short for a window of ten and one more
        char message[1024];
        remove_tree(scratch_file("bad"));
        assert_int_equal(mkdir(scratch_file("bad"), 0777), 0);
        put_shard("bad/train.bin", TOKENS_MAGIC, 1, 10 + i, 10 + i, 0);
        assert_int_equal(dies(load_all, (void *)"bad", message, sizeof(message)), i ? 0 : 1);
        assert_true(i || (strstr(message, "too short") && strstr(message, "has 10 tokens") && strstr(message, "takes 11")));
    }
    char message[1024];
    assert_int_equal(mkdir(scratch_file("bad/train_folder.bin"), 0777), 0);
    assert_int_equal(dies(load_all, (void *)"bad", message, sizeof(message)), 1);
    assert_non_null(strstr(message, "train_folder.bin"));
}

// A folder of token files with these names, each of 50 tokens from 0 on.
void put_folder(const char *folder, const char *const *names, int count) {
    remove_tree(scratch_file(folder));
    assert_int_equal(mkdir(scratch_file(folder), 0777), 0);
    for (int i = 0; i < count; i++) {
        char name[128];
        snprintf(name, sizeof(name), "%s/%s", folder, names[i]);
        put_shard(name, TOKENS_MAGIC, 1, 50, 50, 0);
    }
}

void test_loader_roles(void **state) { // whole words of a name decide
    (void)state;
    static const struct {
        const char *name;
        int role;
    } cases[] = {{"train.bin", 1},
                 {"TinyStories_train.bin", 1},
                 {"fineweb_val_000000.bin", 2},
                 {"tiny_shakespeare_train.bin", 1},
                 {"train_000000.bin", 1},
                 {"train0.bin", 1},
                 {"val.2.bin", 2},
                 {"TinyStoriesV2-GPT4-valid.txt", 2},
                 {"TinyStoriesV2-GPT4-train.txt", 1},
                 {"Validation.txt", 2},
                 {"my training text.txt", 1},
                 {"pretrain_val_0.bin", 2},
                 {"medieval_train.txt", 1},
                 {"m\xc3\xa9\x64i\xc3\xa9val.txt", 0},
                 {"pretraining.bin", 0},
                 {"interval_trainer.bin", 0},
                 {"invalid.bin", 0},
                 {"train/my.bin", 0},
                 {"val/train.bin", 1},
                 {"train_val.bin", 3},
                 {"", 0}};
    for (int i = 0; i < COUNT(cases); i++)
        if (name_role(cases[i].name) != cases[i].role)
            fail_msg("%s: role %d, expected %d", cases[i].name, name_role(cases[i].name), cases[i].role);
    static const char *const names[] = {"pretrain_val_0.bin", "medieval_train.bin", "pretrain.bin"};
    put_folder("roles", names, 3);
    Data *train = data_open(scratch_file("roles"), "train", 10, 65536, 1);
    Data *val = data_open(scratch_file("roles"), "val", 10, 65536, 1);
    assert_int_equal(train->shard_count, 1);
    assert_int_equal(val->shard_count, 1);
    assert_non_null(strstr(train->shards[0].path, "medieval_train.bin"));
    assert_non_null(strstr(val->shards[0].path, "pretrain_val_0.bin"));
    data_close(train);
    data_close(val);
    static const char *const both[] = {"train.bin", "val_train_1.bin"};
    char message[1024];
    put_folder("roles", both, 2);
    assert_int_equal(dies(load_all, (void *)"roles", message, sizeof(message)), 1);
    assert_non_null(strstr(message, "roles/val_train_1.bin: "));
    static const char *const neither[] = {"corpus.bin", "val.bin"};
    put_folder("roles", neither, 2);
    assert_int_equal(dies(load_all, (void *)"roles", message, sizeof(message)), 1);
    assert_true(strstr(message, "corpus.bin") && strstr(message, "train_000000.bin")); // what it is called, and what to call it
}

void test_loader_left_out(void **state) { // files without a window are named, once
    (void)state;
    char message[1024];
    put_shards("short");
    put_shard("short/train_98.bin", TOKENS_MAGIC, 1, 0, 0, 0);
    assert_int_equal(dies(load_all, (void *)"short", message, sizeof(message)), 0);
    const char *line = strstr(message, "short/train_98.bin has 0 tokens, but a window takes 11 (--seq 10 and one more)");
    assert_non_null(line);
    assert_non_null(strstr(line, "and 1 more"));
    assert_true(strchr(line, '\n') == message + strlen(message) - 1);
}

// Writes a shard with a checksum.
void put_checked_shard(const char *name, int count, int first) {
    size_t size;
    put_shard(name, TOKENS_MAGIC, 1, count, count, first);
    char *bytes = read_file(scratch_file(name), &size);
    int32_t header[6];
    memcpy(header, bytes, sizeof(header));
    uint64_t sum = checksum_of(bytes + 1024, size - 1024);
    header[3] = CHECKSUM_MARK;
    header[4] = (int32_t)(uint32_t)sum;
    header[5] = (int32_t)(uint32_t)(sum >> 32);
    memcpy(bytes, header, sizeof(header));
    put_file(name, bytes, size);
    free(bytes);
}

void flip_token_bit(const char *name, size_t at, int bit) {
    size_t size;
    char *bytes = read_file(scratch_file(name), &size);
    bytes[at] ^= (char)(1 << bit);
    put_file(name, bytes, size);
    free(bytes);
}

void test_loader_checksum(void **state) {
    (void)state;
    char message[1024];
    for (int i = 0; i < 12; i++) {
        size_t at = i < 6 ? 1024 + hash64((uint64_t)i) % 800 : 10 + (size_t)i; // a token's byte, or one of the checksum
        put_folder("sum", NULL, 0);
        put_checked_shard("sum/train_0.bin", 400, 0);
        put_checked_shard("sum/train_1.bin", 400, 0);
        assert_int_equal(dies(load_all, (void *)"sum", message, sizeof(message)), 0);
        flip_token_bit("sum/train_1.bin", at, i % 8);
        assert_int_equal(dies(load_all, (void *)"sum", message, sizeof(message)), 1);
        assert_true(strstr(message, "sum/train_1.bin: damaged") && strstr(message, "checksum"));
    }
    put_shard("sum/train_1.bin", TOKENS_MAGIC, 1, 400, 400, 0); // of another maker, without a checksum
    flip_token_bit("sum/train_1.bin", 1030, 1);
    assert_int_equal(dies(load_all, (void *)"sum", message, sizeof(message)), 0);
    put_checked_shard("sum/train_1.bin", 400000, 0); // larger than what is read at a time, and with too large ids
    assert_int_equal(dies(load_all, (void *)"sum", message, sizeof(message)), 1);
    assert_non_null(strstr(message, "sum/train_1.bin: token 4000 is 4000, but the model has 4000 tokens"));
}

void only_open(void *arg) { // opens a folder and reads no window
    data_close(data_open(scratch_file((const char *)arg), "train", 10, 4000, 1));
}

void test_loader_large_id(void **state) { // found when a file is opened, wherever it is
    (void)state;
    char message[1024];
    int counts[] = {12, 50, 131072, 131073, 300001};
    for (int i = 0; i < COUNT(counts); i++) {
        uint16_t *tokens = (uint16_t *)allocate((size_t)counts[i] + 512, 2);
        int32_t header[256] = {TOKENS_MAGIC, 1, counts[i]};
        char place[64];
        memcpy(tokens, header, 1024);
        tokens[512 + counts[i] - 1] = 4000;
        put_folder("ids", NULL, 0);
        put_file("ids/train.bin", (const char *)tokens, 1024 + 2 * (size_t)counts[i]);
        free(tokens);
        assert_int_equal(dies(only_open, (void *)"ids", message, sizeof(message)), 1);
        snprintf(place, sizeof(place), "ids/train.bin: token %d is 4000", counts[i] - 1);
        assert_non_null(strstr(message, place));
    }
}

void load_truncated(void *arg) { // while it is used, a file is cut
    int inputs[10], targets[10];
    Data *d = data_open(scratch_file("cut"), "train", 10, 65536, 1), *val = data_open(scratch_file("cut"), "val", 10, 65536, 1);
    assert_int_equal(truncate(scratch_file((const char *)arg), 0), 0);
    data_window(val, 0, -1, inputs, targets);
    data_window(d, d->windows - 1, -1, inputs, targets);
}

volatile int *behind_the_end;

void read_elsewhere(void *arg) { // a SIGBUS that has nothing to do with token files
    signal(SIGBUS, SIG_DFL); // cmocka has it
    data_open(scratch_file("cut"), "val", 10, 65536, 1);
    int file = open(scratch_file((const char *)arg), O_RDONLY);
    behind_the_end = (int *)mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, file, 0);
    assert_int_equal(truncate(scratch_file((const char *)arg), 0), 0);
    _exit(*behind_the_end ? 2 : 3);
}

void test_loader_truncated(void **state) {
    (void)state;
    char message[1024];
    for (int i = 0; i < 3; i++) {
        put_folder("cut", NULL, 0);
        put_shard("cut/train_0.bin", TOKENS_MAGIC, 1, 5000, 5000, 0);
        put_shard("cut/train_1.bin", TOKENS_MAGIC, 1, 5000, 5000, 0);
        put_shard("cut/val.bin", TOKENS_MAGIC, 1, 5000, 5000, 0);
        const char *file = i == 0 ? "cut/train_1.bin" : "cut/val.bin";
        if (i < 2) {
            assert_int_equal(dies(load_truncated, (void *)file, message, sizeof(message)), 1);
            assert_non_null(strstr(message, file));
            assert_true(strchr(message, '\n') == message + strlen(message) - 1);
        } else if (!is_slow()) { // valgrind has much to say of this end
            put_text("cut/text", "some text");
            assert_int_equal(dies(read_elsewhere, (void *)"cut/text", message, sizeof(message)), -SIGBUS);
            assert_null(strstr(message, "cut/"));
        }
    }
}

// A token file that was written to some time ago, as most are.
void put_old_shard(const char *name, int count, int first) {
    const struct timespec times[2] = {{1000000000, 0}, {1000000000, 0}};
    put_shard(name, TOKENS_MAGIC, 1, count, count, first);
    assert_int_equal(utimensat(AT_FDCWD, scratch_file(name), times, 0), 0);
}

// Opens token files, lets something happen to one of them, and looks whether it is noticed: *arg is 's' for a file that
// becomes shorter within its last page, 'l' longer, 'r' rebuilt in place with the same size, 'n' replaced by another of
// the same size, 'd' removed, 'e' rebuilt and noticed by the next epoch, '-' nothing.
void change_data(void *arg) {
    const char what = *(const char *)arg;
    int inputs[10], targets[10];
    Data *d = data_open(scratch_file("new"), "train", 10, 65536, 1);
    data_open(scratch_file("new"), "val", 10, 65536, 1);
    data_batch(d, 0, 1, inputs, targets);
    refuse_changed_data();
    if (what == 's')
        assert_int_equal(truncate(scratch_file("new/train_1.bin"), 4200), 0);
    if (what == 'l')
        assert_int_equal(truncate(scratch_file("new/train_1.bin"), 5026), 0);
    if (what == 'r' || what == 'e')
        put_shard("new/train_1.bin", TOKENS_MAGIC, 1, 2000, 2000, 7);
    if (what == 'n')
        assert_int_equal(rename(scratch_file("other"), scratch_file("new/train_1.bin")), 0);
    if (what == 'd')
        assert_int_equal(unlink(scratch_file("new/train_1.bin")), 0);
    if (what == 'e') {
        data_batch(d, d->windows - 1, 1, inputs, targets);
        fprintf(stderr, "the epoch is over\n");
        data_batch(d, d->windows, 1, inputs, targets);
        fprintf(stderr, "not noticed");
    } else {
        refuse_changed_data();
    }
}

void test_loader_changed(void **state) { // while it is used: once, only what became shorter by a page was noticed
    (void)state;
    char message[1024];
    for (const char *what = "-dslrne"; *what; what++) {
        put_folder("new", NULL, 0);
        put_old_shard("new/train_0.bin", 100, 0);
        put_old_shard("new/train_1.bin", 2000, 0); // 5024 bytes: a page, and a part of one
        put_old_shard("new/val.bin", 100, 0);
        put_shard("other", TOKENS_MAGIC, 1, 2000, 2000, 7);
        int status = dies(change_data, (void *)what, message, sizeof(message));
        int noticed = strstr(message, "new/train_1.bin: the file changed while it was in use") != NULL;
        if (strchr("-d", *what) ? status != 0 || *message : status != 1 || !noticed || strstr(message, "not noticed"))
            fail_msg("%c: exit status %d; it said: %s", *what, status, message);
        assert_true(*what != 'e' || strstr(message, "the epoch is over"));
    }
}

void open_a_part(void *arg) { // as process *arg of two
    data_part = *(const char *)arg - '0';
    data_parts = 2;
    only_open((void *)"part");
}

void test_loader_parts(void **state) { // several processes share the work of checking
    (void)state;
    char message[1024];
    for (int bad = 0; bad < 4; bad++) {
        put_folder("part", NULL, 0);
        for (int i = 0; i < 4; i++) {
            char name[64];
            snprintf(name, sizeof(name), "part/train_%d.bin", i);
            put_checked_shard(name, 400, 0);
            if (i == bad)
                flip_token_bit(name, 1500, 3);
        }
        assert_int_equal(dies(open_a_part, (void *)(bad % 2 ? "1" : "0"), message, sizeof(message)), 1);
        assert_non_null(strstr(message, ".bin: damaged"));
        assert_int_equal(dies(open_a_part, (void *)(bad % 2 ? "0" : "1"), message, sizeof(message)), 0);
    }
    put_shard("part/train_3.bin", TOKENS_MAGIC, 1, 400, 401, 0); // every process looks at all headers
    assert_int_equal(dies(open_a_part, (void *)"0", message, sizeof(message)), 1);
    assert_non_null(strstr(message, "part/train_3.bin: damaged"));
}

void test_loader_half_replaced(void **state) { // data/tokenize was killed while it moved files
    (void)state;
    char message[1024];
    static const char *const names[] = {"train_0.bin", "val_0.bin"};
    put_folder("half", names, 2);
    assert_int_equal(dies(only_open, (void *)"half", message, sizeof(message)), 0);
    assert_int_equal(mkdir(scratch_file("half/replaced-tokens"), 0777), 0);
    assert_int_equal(dies(only_open, (void *)"half", message, sizeof(message)), 1);
    assert_true(strstr(message, "/half: data/tokenize was ended") && strstr(message, "/half/replaced-tokens)"));
    put_text("half/tokenizer.json", ""); // the new ones are all there, and the old ones could not be removed
    assert_int_equal(dies(only_open, (void *)"half", message, sizeof(message)), 0);
}

void read_closed_folder(void *arg) { // readdir fails
    const char *path = scratch_file((const char *)arg);
    DIR *folder = open_folder(path);
    close(dirfd(folder));
    while (next_name(folder, path) != NULL) {
    }
}

void test_loader_readdir(void **state) { // a folder that cannot be read is not a small one
    (void)state;
    char message[1024];
    static const char *const names[] = {"train_0.bin", "train_1.bin", "train_2.bin", "train_3.bin"};
    put_folder("names", names, 4);
    assert_int_equal(dies(read_closed_folder, (void *)"names", message, sizeof(message)), 1);
    assert_true(strstr(message, "/names: ") && strstr(message, strerror(EBADF)));
}

int ticks = 0;

void count_tick(void) {
    ticks++;
}

void test_loader_tick(void **state) { // who reads for long answers others meanwhile
    (void)state;
    put_folder("tick", NULL, 0);
    put_shard("tick/train.bin", TOKENS_MAGIC, 1, 2000000, 2000000, 0);
    void (*before)(void) = data_tick;
    data_tick = count_tick;
    data_close(data_open(scratch_file("tick"), "train", 10, 65536, 1));
    data_tick = before;
    assert_true(ticks > 10);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_loader),
        cmocka_unit_test(test_loader_wide), cmocka_unit_test(test_loader_bad),
        cmocka_unit_test(test_loader_roles),
        cmocka_unit_test(test_loader_left_out),
        cmocka_unit_test(test_loader_checksum),
        cmocka_unit_test(test_loader_large_id),
        cmocka_unit_test(test_loader_truncated),
        cmocka_unit_test(test_loader_readdir),
        cmocka_unit_test(test_loader_tick),
        cmocka_unit_test(test_loader_changed),
        cmocka_unit_test(test_loader_parts),
        cmocka_unit_test(test_loader_half_replaced),
    };
    begin_tests();
    return cmocka_run_group_tests_name("loader", tests, NULL, scratch_done);
}
