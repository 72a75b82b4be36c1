// checksums.json, a file of each checkpoint: it shows when one of the others is damaged, before training goes on from it.
// Gives: trust_files, fingerprint_of_read; to write it begin_checksums, write_tensor_checksum, end_checksums, write_small_checksums; to read
// it open_checksums, check_tensor, close_checksums, check_small_files. Needs: checksum.h, json.h.
//
// {"model.safetensors": {"bytes": 5816, "header": CHECKSUM, "tensors": {NAME: CHECKSUM, ...}}, ...,
//  "config.json": {"bytes": 1846, "checksum": CHECKSUM}, ...}, where a checksum is 16 hexadecimal digits as text.
// A file that another program has written anew has another size or another header. Then its checksums do not count.
#pragma once
#include "checksum.h"
#include "json.h"

int trust_files = 0; // --trust-weights: nothing is compared

// Where each tensor that is read leaves its mark: the sum of them is a number by which a model is known again, in whatever order
// its tensors were read. NULL: nobody wants to know.
uint64_t *fingerprint_of_read = NULL;

// What a user can do about a checkpoint that is damaged.
#define OLDER_CHECKPOINT   "remove that checkpoint's folder, and --resume takes the newest whole one"
#define INSTEAD_OF_DAMAGED OLDER_CHECKPOINT "; or take it as it is, by --trust-weights"

// The small files that a run reads again, as far as a checkpoint has them.
static const char *const checked_files[] = {"config.json", "tokenizer.json", "trainer_state.json", "router_state.json"};

// ---- writing

// Begins the entry of a file of tensors, of so many bytes and with this header.
void begin_checksums(FILE *sums, const char *name, size_t bytes, const char *header, size_t header_size) {
    fprintf(sums, "\"%s\":{\"bytes\":%zu,\"header\":\"%016llx\",\"tensors\":{", name, bytes,
            (unsigned long long)checksum_of(header, header_size));
}

// The next tensor of that file; its name is prefix and name.
void write_tensor_checksum(FILE *sums, int first, const char *prefix, const char *name, const void *numbers, size_t bytes) {
    fprintf(sums, "%s\n\"%s%s\":\"%016llx\"", first ? "" : ",", prefix, name,
            (unsigned long long)checksum_of(numbers, bytes));
}

void end_checksums(FILE *sums) {
    fprintf(sums, "}},\n");
}

// Adds the small files, which are in dir by now, to the entries of the others.
void write_small_checksums(FILE *sums, const char *dir) {
    const char *comma = "";
    for (int i = 0; i < COUNT(checked_files); i++) {
        char path[4200];
        size_t size;
        snprintf(path, sizeof(path), "%s/%s", dir, checked_files[i]);
        if (!has_file(dir, checked_files[i])) {
            continue;
        }
        char *text = read_file(path, &size);
        fprintf(sums, "%s\"%s\":{\"bytes\":%zu,\"checksum\":\"%016llx\"}", comma, checked_files[i], size,
                (unsigned long long)checksum_of(text, size));
        free(text);
        comma = ",\n";
    }
}

// ---- reading

typedef struct Sums {    // what checksums.json says of one file of tensors
    Json *json;          // all of it
    const Json *tensors; // the file's; NULL: there are none, or they do not count
    const Json *next;    // behind the one that was looked up last: tensors are read in the order of the list
} Sums;

// What checksums.json in this folder says; NULL where there is none. To be freed by json_free().
Json *read_checksums(const char *dir) {
    char path[4300];
    size_t size;
    snprintf(path, sizeof(path), "%s/checksums.json", dir);
    if (trust_files || !has_file(dir, "checksums.json")) {
        return NULL;
    }
    char *text = read_file(path, &size);
    Json *json = json_parse_or(text, size, path, "; " INSTEAD_OF_DAMAGED);
    free(text);
    return json;
}

// Is this text the checksum? A list without it is damaged itself.
int checksum_matches(const Json *wanted, uint64_t found) {
    char text[24];
    snprintf(text, sizeof(text), "%016llx", (unsigned long long)found);
    return wanted && wanted->type == 's' && !strcmp(wanted->text, text);
}

// Says that a file's checksums do not count, since it is not the one that they were taken of.
void pass_over_checksums(const char *path, const char *why) {
    remark("%s: another %s than checksums.json says: it was written anew, so it is not compared with its checksums", path,
           why);
}

// Ends the program: a file is not as it was written.
__attribute__((noreturn)) void fail_checksum(const char *path, const char *what) {
    fail("%s: damaged%s not have the checksum that stands in checksums.json beside it; " INSTEAD_OF_DAMAGED, path, what);
}

// The checksums of the file of tensors `path`, which has so many bytes and this header.
Sums *open_checksums(const char *path, size_t bytes, const char *header, size_t header_size) {
    Sums *s = (Sums *)allocate(1, sizeof(Sums));
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    char dir[4200];
    snprintf(dir, sizeof(dir), "%.*s", slash ? (int)(slash - path) : 1, slash ? path : ".");
    s->json = read_checksums(dir);
    const Json *file = json_get(s->json, name), *size = json_get(file, "bytes");
    if (!file) {
        return s;
    }
    if (!size || size->number != (double)bytes) {
        pass_over_checksums(path, "size");
    } else if (!checksum_matches(json_get(file, "header"), checksum_of(header, header_size))) {
        pass_over_checksums(path, "list of tensors");
    } else {
        const Json *tensors = json_get(file, "tensors");
        s->tensors = tensors && tensors->type == 'o' ? tensors : NULL;
    }
    return s;
}

// Ends the program unless the tensor `name` of the file `path` is as it was written.
void check_tensor(Sums *s, const char *path, const char *name, const void *numbers, size_t bytes) {
    int compared = s && s->tensors;
    if (!compared && !fingerprint_of_read) {
        return;
    }
    uint64_t found = checksum_of(numbers, bytes);
    if (fingerprint_of_read) {
        *fingerprint_of_read += hash64(found ^ checksum_of(name, strlen(name)));
    }
    if (!compared) {
        return;
    }
    if (!s->next || strcmp(s->next->key, name) != 0) {
        s->next = json_get(s->tensors, name);
    }
    if (!checksum_matches(s->next, found)) {
        char what[256];
        snprintf(what, sizeof(what), ": the numbers of %.200s do", name);
        fail_checksum(path, what);
    }
    s->next = s->next->next;
}

void close_checksums(Sums *s) {
    if (s) {
        json_free(s->json);
        free(s);
    }
}

// Ends the program unless the small files in dir are as they were written. One of another size was changed on purpose.
void check_small_files(const char *dir) {
    Json *json = read_checksums(dir);
    for (int i = 0; json && i < COUNT(checked_files); i++) {
        const Json *file = json_get(json, checked_files[i]), *bytes = json_get(file, "bytes");
        char path[4300];
        size_t size;
        snprintf(path, sizeof(path), "%s/%s", dir, checked_files[i]);
        if (!file || !has_file(dir, checked_files[i])) {
            continue;
        }
        char *text = read_file(path, &size);
        if (!bytes || bytes->number != (double)size) {
            pass_over_checksums(path, "size");
        } else if (!checksum_matches(json_get(file, "checksum"), checksum_of(text, size))) {
            fail_checksum(path, ", or edited by hand: its bytes do");
        }
        free(text);
    }
    json_free(json);
}
