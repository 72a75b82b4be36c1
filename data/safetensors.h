// Safetensors, the files in which models keep their numbers. https://github.com/huggingface/safetensors
// Gives: Part, start_safetensors, write_numbers, open_weights, close_weights, read_tensor; open_for_writing, write_text,
// expect_member.
// Needs: data/json.h; find_word of dev/options.h; ranks_tick of dev/ranks/comm.h.
//
// Such a file is the length of its header as 8 bytes, the header, which is JSON, and the numbers.
#pragma once
#include "checksums.h"
#include "json.h"

typedef struct Part { // a block of a tensor's rows
    char name[96];
    int tensor;     // its number in the table of weights
    size_t offset;  // the block's first number in that tensor
    int rows, cols; // rows 0: one dimension
    int experts;    // not 0: all experts' rows, a dimension of its own in front of them
    char other[96]; // another name under which a file may have it: rows first, first + 1, ... of a tensor of `all`; "": none
    int all, first;
} Part;

size_t part_size(const Part *p) {
    return (size_t)max_int(p->rows, 1) * (size_t)p->cols;
}

// ---- writing files

FILE *open_for_writing(const char *dir, const char *name) {
    char path[4200];
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    FILE *file = fopen(path, "wb");
    if (!file) {
        fail("%s: cannot create: %s", path, strerror(errno));
    }
    return file;
}

// Returns once the file's bytes are on the disk.
void await_disk(FILE *file, const char *dir, const char *name) {
    if (fflush(file) != 0 || ferror(file) || (sync_file(fileno(file)) != 0 && errno != EINVAL)) {
        fail("%s/%s: cannot write: %s", dir, name, strerror(errno));
    }
}

// Closes it once its bytes are there.
void close_written(FILE *file, const char *dir, const char *name) {
    await_disk(file, dir, name);
    fclose(file);
}

void write_text(const char *dir, const char *name, const char *text, size_t size) {
    FILE *file = open_for_writing(dir, name);
    fwrite(text, 1, size, file);
    close_written(file, dir, name);
}

// ---- writing tensors

// The header of a file that holds all parts `copies` times, each time under another prefix. To be freed.
char *safetensors_header(const Part *parts, int count, const char *const *prefix, int copies, size_t *size) {
    char *header = NULL;
    size_t at = 0;
    FILE *text = open_memory(&header, size);
    fprintf(text, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int copy = 0; copy < copies; copy++) {
        for (int i = 0; i < count; i++) {
            const Part *p = &parts[i];
            size_t end = at + part_size(p) * sizeof(real);
            fprintf(text, ",\"%s%s\":{\"dtype\":\"%s\",\"shape\":[", prefix[copy], p->name,
                    sizeof(real) == 8 ? "F64" : "F32");
            if (p->experts) {
                fprintf(text, "%d,", p->experts);
            }
            if (p->rows) {
                fprintf(text, "%d,", p->rows / max_int(1, p->experts));
            }
            fprintf(text, "%d],\"data_offsets\":[%zu,%zu]}", p->cols, at, end);
            at = end;
        }
    }
    fprintf(text, "}");
    fflush(text);

    // The numbers begin at a multiple of 8 bytes.
    while (*size % 8) {
        fputc(' ', text);
        fflush(text);
    }
    close_memory(text, &header);
    return header;
}

// Begins a file of these parts, and its entry in the list of checksums. Their numbers follow by write_numbers, in the
// order of the parts.
FILE *start_safetensors(const char *dir, const char *name, const Part *parts, int count, const char *const *prefix,
                        int copies, FILE *sums) {
    uint64_t length;
    size_t size = 0;
    char *header = safetensors_header(parts, count, prefix, copies, &size);
    FILE *file = open_for_writing(dir, name);
    length = size;
    size_t bytes = 8 + size;
    for (int i = 0; i < count; i++) {
        bytes += (size_t)copies * part_size(&parts[i]) * sizeof(real);
    }
    begin_checksums(sums, name, bytes, header, size);
    fwrite(&length, 8, 1, file);
    fwrite(header, 1, size, file);
    free(header);
    return file;
}

// Writes n numbers behind those that are in the file dir/name.
void write_numbers(FILE *file, const char *dir, const char *name, const real *from, size_t n) {
    const size_t most = 1 << 22; // numbers to write at once
    size_t piece;
    for (size_t done = 0; done < n; done += piece) {
        piece = n - done < most ? n - done : most;
        ranks_tick();
        size_t before = (size_t)ftello(file) / (most * sizeof(real));
        fwrite(from + done, sizeof(real), piece, file);

        // With several processes the system's buffers must not fill up: fwrite would wait, and this one would not
        // answer the watch. So each time that the file has grown by so much, the disk is waited for.
        if (ranks.size > 1 && (size_t)ftello(file) / (most * sizeof(real)) > before) {
            await_disk(file, dir, name);
        }
    }
}

// ---- reading tensors

typedef struct Safetensors { // a mapped file
    char path[4200];
    const char *map, *data;
    size_t size, data_size;
    Json *header;
    Sums *sums; // the checksums that were written beside it; NULL: its numbers are not compared
} Safetensors;

// compared: its numbers are compared with their checksums when they are read.
void safetensors_open(Safetensors *s, const char *path, int compared) {
    snprintf(s->path, sizeof(s->path), "%s", path);
    int file = open(path, O_RDONLY);
    struct stat info;
    if (file < 0 || fstat(file, &info) != 0) {
        fail("%s: cannot open: %s", path, strerror(errno));
    }
    s->size = (size_t)info.st_size;
    void *map = s->size >= 8 ? mmap(NULL, s->size, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
    if (map == MAP_FAILED) {
        fail("%s: not a safetensors file: %zu bytes", path, s->size);
    }
    close(file);
    s->map = (const char *)map;
    uint64_t length;
    memcpy(&length, s->map, 8);
    if (length > s->size - 8) {
        fail("%s: damaged: its header should have %llu bytes, the whole file has %zu", path, (unsigned long long)length,
             s->size);
    }
    s->header = json_parse(s->map + 8, (size_t)length, path);
    s->sums = compared ? open_checksums(path, s->size, s->map + 8, (size_t)length) : NULL;
    s->data = s->map + 8 + length;
    s->data_size = s->size - 8 - (size_t)length;
}

void safetensors_close(Safetensors *s) {
    munmap((void *)s->map, s->size);
    json_free(s->header);
    close_checksums(s->sums);
}

// The types of numbers that model files use.
enum { F64, F32, F16, BF16 };
const char *const number_types[] = {"F64", "F32", "F16", "BF16", NULL};
const size_t number_bytes[] = {8, 4, 2, 2};

double decode_number(const char *from, int type) {
    if (type == F64) {
        double number;
        memcpy(&number, from, 8);
        return number;
    }
    if (type == F16) { // sign, 5 bits of exponent, 10 of mantissa
        uint16_t bits;
        memcpy(&bits, from, 2);
        int exponent = bits >> 10 & 31, mantissa = bits & 1023;
        double value = ldexp(mantissa + 1024, exponent - 25);
        if (exponent == 31) {
            value = mantissa ? NAN : INFINITY;
        } else if (exponent == 0) {
            value = ldexp(mantissa, -24);
        }
        return bits >> 15 ? -value : value;
    }
    float number;
    char bytes[4] = {0, 0, 0, 0}; // BF16 is the upper two bytes of a float
    size_t size = number_bytes[type];
    memcpy(bytes + 4 - size, from, size);
    memcpy(&number, bytes, 4);
    return number;
}

// Where the tensor t, called `name`, has its numbers, of the given type; ends the program unless it is rows x cols.
// Where it has more dimensions than two, the first ones count as one; rows 0: one dimension.
const char *tensor_data(const Safetensors *s, const Json *t, const char *name, int rows, int cols, int *type) {
    const Json *dtype = json_get(t, "dtype"), *shape = json_get(t, "shape"), *range = json_get(t, "data_offsets");
    *type = dtype && dtype->type == 's' ? find_word(number_types, dtype->text) : -1;
    if (*type < 0) {
        fail("%s: %s has type %s; expected F64, F32, F16 or BF16", s->path, name,
             dtype && dtype->text ? dtype->text : "none");
    }

    // The shape, as text and as rows and columns.
    char found[128] = "no shape";
    double found_rows = 1, found_cols = 0;
    for (const Json *d = shape ? shape->child : NULL; d; d = d->next) {
        size_t used = d == shape->child ? 0 : strlen(found);
        snprintf(found + used, sizeof(found) - used, "%s%.0f", used ? " x " : "", d->number);
        if (d->next) {
            found_rows *= d->number;
        } else {
            found_cols = d->number;
        }
    }
    if (found_cols != cols || found_rows != max_int(rows, 1)) {
        fail("%s: %s is %s; config.json makes it %.0d%s%d", s->path, name, found, rows, rows ? " x " : "", cols);
    }

    const Json *from = range ? range->child : NULL, *end = from ? from->next : NULL;
    size_t bytes = (size_t)max_int(rows, 1) * (size_t)cols * number_bytes[*type];
    if (!end || !(from->number >= 0) || !(end->number <= (double)s->data_size) ||
        end->number - from->number != (double)bytes) {
        fail("%s: damaged: %s should have %zu bytes within the file's %zu", s->path, name, bytes, s->data_size);
    }
    return s->data + (size_t)from->number;
}

// Reads the part's numbers to `to`: rows from `first` on of the tensor `name`, which should have `all` rows (0: one
// dimension). Returns 0 where the file has no such name.
int read_tensor(const Safetensors *s, const char *name, const Part *p, int all, int first, real *to) {
    const Json *t = json_get(s->header, name);
    if (!t) {
        return 0;
    }
    int type;
    const char *from = tensor_data(s, t, name, all, p->cols, &type);
    size_t bytes = number_bytes[type], count = part_size(p);
    check_tensor(s->sums, s->path, name, from, (size_t)max_int(all, 1) * (size_t)p->cols * bytes);
    from += (size_t)first * (size_t)p->cols * bytes;
    if (bytes == sizeof(real)) {
        memcpy(to, from, count * bytes);
    } else {
        for (size_t i = 0; i < count; i++) {
            to[i] = (real)decode_number(from + i * bytes, type);
        }
    }
    forget_pages(from, count * bytes); // so that a large model is in memory once
    return 1;
}

// Are two tensors of rows x cols, each in the file at[i], the same numbers?
int same_numbers(const Safetensors *const at[2], const Json *const tensors[2], const char *const names[2], int rows,
                 int cols) {
    const char *from[2];
    int type[2];
    for (int i = 0; i < 2; i++) {
        from[i] = tensor_data(at[i], tensors[i], names[i], rows, cols, &type[i]);
    }
    size_t count = (size_t)rows * (size_t)cols, a = number_bytes[type[0]], b = number_bytes[type[1]];
    if (type[0] == type[1]) {
        return !memcmp(from[0], from[1], count * a);
    }
    for (size_t i = 0; i < count; i++) {
        if (decode_number(from[0] + i * a, type[0]) != decode_number(from[1] + i * b, type[1])) {
            return 0;
        }
    }
    return 1;
}

// A member that has to be there; `type` as in Json, 'i' for a whole number.
const Json *expect_member(const Json *object, const char *name, char type, const char *path) {
    const Json *m = json_get(object, name);
    if (!m || m->type != (type == 'i' ? 'n' : type) || (type == 'i' && m->number != floor(m->number))) {
        const char *what = type == 'i' ? "a whole number" : "a number";
        if (type == 'o' || type == 's') {
            what = type == 'o' ? "an object" : "a text";
        } else if (type == 'a') {
            what = "a list";
        }
        fail("%s: expected %s \"%s\", found %s", path, what, name, m ? "something else" : "none");
    }
    return m;
}

typedef struct WeightFiles { // one file, or several over which a model's tensors are spread
    char path[4200];         // of the last one
    Safetensors *list;
    int count;
} WeightFiles;

// Opens one more, unless it is open.
void open_one(WeightFiles *w, const char *dir, const char *name, int compared) {
    snprintf(w->path, sizeof(w->path), "%s/%s", dir, name);
    for (int i = 0; i < w->count; i++) {
        if (!strcmp(w->list[i].path, w->path)) {
            return;
        }
    }
    w->list = (Safetensors *)reallocate(w->list, (size_t)w->count + 1, sizeof(Safetensors));
    safetensors_open(&w->list[w->count++], w->path, compared);
}

// Opens dir/name, or, where it is not there, the files that dir/name.index.json lists. compared: as in
// safetensors_open().
void open_weights(WeightFiles *w, const char *dir, const char *name, int compared) {
    w->list = NULL;
    w->count = 0;
    snprintf(w->path, sizeof(w->path), "%s/%s.index.json", dir, name);
    if (has_file(dir, name) || !is_there(w->path)) {
        open_one(w, dir, name, compared);
        return;
    }
    size_t size;
    char *text = read_file(w->path, &size);
    Json *json = json_parse(text, size, w->path);
    for (const Json *m = expect_member(json, "weight_map", 'o', w->path)->child; m; m = m->next) {
        if (m->type != 's') {
            fail("%s/%s.index.json: the file of %s is not a text", dir, name, m->key);
        }
        open_one(w, dir, m->text, compared);
    }
    json_free(json);
    free(text);
}

void close_weights(WeightFiles *w) {
    for (int i = 0; i < w->count; i++) {
        safetensors_close(&w->list[i]);
    }
    free(w->list);
}
