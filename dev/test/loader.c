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
        assert_true(d->tokens == 105 + 41 + 11 + 10);
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
        {"", 0, 0, 0, 0, 0, 0, "*train*.bin"},
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
        assert_true(i || strstr(message, "too short"));
    }
    char message[1024];
    assert_int_equal(mkdir(scratch_file("bad/train_folder.bin"), 0777), 0);
    assert_int_equal(dies(load_all, (void *)"bad", message, sizeof(message)), 1);
    assert_non_null(strstr(message, "train_folder.bin"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_loader),
        cmocka_unit_test(test_loader_bad),
    };
    begin_tests();
    return cmocka_run_group_tests_name("loader", tests, NULL, scratch_done);
}
