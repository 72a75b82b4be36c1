// GGUF, the file in which llama.cpp keeps a model. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
// Gives: Gguf, gguf_open, gguf_text, gguf_integer, gguf_number, gguf_flag, gguf_list, gguf_tensor, gguf_begin_data, gguf_row,
// gguf_close.
// Needs: data/blocks.h; sync_file of dev/portable.h; dev/unfinished.h.
//
// Version 3 of the format, all numbers with their lower bytes first: "GGUF", the version, how many tensors and how many keys
// there are; each key with its value; each tensor's name, shape, type and place; and behind them the numbers of the tensors,
// each of which begins at a multiple of 32 bytes. So all shapes are told first, and the numbers follow row by row: no tensor is
// in memory as a whole. The file is made in a folder beside it, and gets its name when it is complete and on the disk.
#pragma once
#include "blocks.h"
#include "../dev/unfinished.h"

enum { GGUF_U32 = 4, GGUF_I32 = 5, GGUF_F32 = 6, GGUF_BOOL = 7, GGUF_STRING = 8, GGUF_ARRAY = 9 }; // types of values
enum { GGUF_ALIGNMENT = 32, GGUF_NAME = 64 }; // GGUF_NAME: bytes of a tensor's name with its NUL, ggml's GGML_MAX_NAME

typedef struct GgufTensor {
    char name[GGUF_NAME];
    int format;        // FORMAT_F32 ...
    int dims, size[3]; // as C arrays have them: the last one is a row
    size_t rows;       // of all matrices together
    size_t offset;     // of its first number, from where numbers begin
} GgufTensor;

typedef struct Gguf {
    char path[2048], folder[2100]; // the file, and where it is made
    FILE *file;
    FILE *keys;                    // the keys and their values, in memory
    char *key_text;
    size_t key_size;
    uint64_t key_count;
    GgufTensor *tensors;           // (count)
    int count, now;                // now: the tensor whose rows are written
    size_t row, size;              // its rows that are written; bytes of all tensors
    unsigned char *encoded;        // one row
} Gguf;

// Bytes from n on to the next multiple of 32.
size_t gguf_gap(size_t n) {
    return (GGUF_ALIGNMENT - n % GGUF_ALIGNMENT) % GGUF_ALIGNMENT;
}

// Begins a file. Nothing is written yet.
void gguf_open(Gguf *g, const char *path) {
    memset(g, 0, sizeof(*g));
    if (strlen(path) >= sizeof(g->path)) {
        fail("%s: the name is too long", path);
    }
    if (!*path || path[strlen(path) - 1] == '/') {
        fail("'%s' names no file; give the name of a new one, as model.gguf", path);
    }
    if (is_there(path)) {
        fail("%s: there is something of that name already; remove it, or give another name", path);
    }
    snprintf(g->path, sizeof(g->path), "%s", path);
    snprintf(g->folder, sizeof(g->folder), "%s.unfinished", path);
    g->keys = open_memory(&g->key_text, &g->key_size);
}

// ---- keys and values

void gguf_put(FILE *file, uint64_t number, int bytes) {
    for (int i = 0; i < bytes; i++) {
        fputc((int)(number >> 8 * i & 255), file);
    }
}

void gguf_put_text(FILE *file, const char *text, size_t size) {
    gguf_put(file, size, 8);
    fwrite(text, 1, size, file);
}

void gguf_put_number(FILE *file, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    gguf_put(file, bits, 4);
}

void gguf_key(Gguf *g, const char *key, int type) {
    gguf_put_text(g->keys, key, strlen(key));
    gguf_put(g->keys, (uint64_t)type, 4);
    g->key_count++;
}

void gguf_text(Gguf *g, const char *key, const char *text) {
    gguf_key(g, key, GGUF_STRING);
    gguf_put_text(g->keys, text, strlen(text));
}

void gguf_integer(Gguf *g, const char *key, int value) { // not negative
    gguf_key(g, key, GGUF_U32);
    gguf_put(g->keys, (uint64_t)value, 4);
}

void gguf_number(Gguf *g, const char *key, double value) {
    gguf_key(g, key, GGUF_F32);
    gguf_put_number(g->keys, (float)value);
}

void gguf_flag(Gguf *g, const char *key, int value) {
    gguf_key(g, key, GGUF_BOOL);
    gguf_put(g->keys, value != 0, 1);
}

// Begins a list of `count` values of a type, which the caller writes to g->keys.
void gguf_list(Gguf *g, const char *key, int type, size_t count) {
    gguf_key(g, key, GGUF_ARRAY);
    gguf_put(g->keys, (uint64_t)type, 4);
    gguf_put(g->keys, count, 8);
}

// ---- tensors

// The number that GGUF has for a format.
int gguf_format(int format) {
    static const int numbers[] = {0, 1, 8, 2};
    return numbers[format];
}

// Appends a tensor of 1 to 3 dimensions, size (dims), the last of them a row. Its numbers are written later.
void gguf_tensor(Gguf *g, const char *name, int format, int dims, const int *size) {
    GgufTensor t;
    memset(&t, 0, sizeof(t));
    if (strlen(name) >= sizeof(t.name)) {
        fail("%s: a tensor's name in a GGUF file has at most %d bytes, not the %zu of %s", g->path, GGUF_NAME - 1,
             strlen(name), name);
    }
    snprintf(t.name, sizeof(t.name), "%s", name);
    t.format = format;
    t.dims = dims;
    t.rows = 1;
    for (int i = 0; i < dims; i++) {
        t.size[i] = size[i];
        t.rows *= i < dims - 1 ? (size_t)size[i] : 1;
    }
    t.offset = g->size;
    g->size += t.rows * encoded_bytes(format, (size_t)size[dims - 1]);
    g->size += gguf_gap(g->size);
    g->tensors = (GgufTensor *)grow(g->tensors, (size_t)g->count, sizeof(GgufTensor));
    g->tensors[g->count++] = t;
}

// Ends the program where the file cannot be written.
__attribute__((noreturn)) void gguf_fail(const Gguf *g) {
    int error = errno;
    fail("%s: cannot write: %s", g->path, strerror(error));
}

// Everything before the numbers. What the keys and tensors are is known now.
void gguf_begin_data(Gguf *g) {
    char name[2200];
    size_t widest = 0;
    close_memory(g->keys, &g->key_text);
    begin_unfinished(g->path);
    snprintf(name, sizeof(name), "%s/model.gguf", g->folder);
    g->file = fopen(name, "wb");
    if (!g->file) {
        fail("%s: cannot create: %s", name, strerror(errno));
    }
    errno = 0;
    fwrite("GGUF", 1, 4, g->file);
    gguf_put(g->file, 3, 4);
    gguf_put(g->file, (uint64_t)g->count, 8);
    gguf_put(g->file, g->key_count, 8);
    fwrite(g->key_text, 1, g->key_size, g->file);
    free(g->key_text);
    size_t size = 24 + g->key_size;
    for (int i = 0; i < g->count; i++) {
        const GgufTensor *t = &g->tensors[i];
        gguf_put_text(g->file, t->name, strlen(t->name));
        gguf_put(g->file, (uint64_t)t->dims, 4);
        for (int d = t->dims - 1; d >= 0; d--) { // the length of a row comes first
            gguf_put(g->file, (uint64_t)t->size[d], 8);
        }
        gguf_put(g->file, (uint64_t)gguf_format(t->format), 4);
        gguf_put(g->file, t->offset, 8);
        size += 8 + strlen(t->name) + 4 + 8 * (size_t)t->dims + 4 + 8;
        size_t bytes = encoded_bytes(t->format, (size_t)t->size[t->dims - 1]);
        widest = bytes > widest ? bytes : widest;
    }
    for (size_t gap = gguf_gap(size); gap > 0; gap--) {
        fputc(0, g->file);
    }
    if (ferror(g->file)) {
        gguf_fail(g);
    }
    g->encoded = (unsigned char *)allocate(widest, 1);
}

// Writes the next row of the tensor at hand, and after its last one goes to the next tensor.
void gguf_row(Gguf *g, const real *x) {
    const GgufTensor *t = &g->tensors[g->now];
    int width = t->size[t->dims - 1];
    size_t bytes = encoded_bytes(t->format, (size_t)width);
    if (!encode_row(t->format, g->encoded, x, width)) {
        fail("%s: row %zu of %s has a number that %s cannot hold; export it as f32", g->path, g->row, t->name,
             format_names[t->format]);
    }
    if (fwrite(g->encoded, 1, bytes, g->file) != bytes) {
        gguf_fail(g);
    }
    g->row++;
    if (g->row < t->rows) {
        return;
    }
    for (size_t gap = gguf_gap(t->rows * bytes); gap > 0; gap--) {
        fputc(0, g->file);
    }
    g->row = 0;
    g->now++;
}

// Gives the file its name, once all rows are written and on the disk.
void gguf_close(Gguf *g) {
    char name[2200];
    snprintf(name, sizeof(name), "%s/model.gguf", g->folder);
    if (fflush(g->file) != 0 || ferror(g->file) || (sync_file(fileno(g->file)) != 0 && errno != EINVAL)) {
        gguf_fail(g);
    }
    fclose(g->file);
    if (rename(name, g->path) != 0) {
        fail("%s: cannot rename to %s: %s", name, g->path, strerror(errno));
    }
    end_unfinished();
    clear_away(g->folder);
    free(g->encoded);
    free(g->tensors);
}
