// What data/tokenize writes: token files, and a tokenizer.json.
// Gives: write_output, Shards, write_tokens, finish_shard.
// Needs: data/token_file.h (how token files begin), data/checksum.h, data/interrupt.h, data/containers.h.
// Everything goes into a folder in the output folder first, unfinished_path, which fail() removes.
// data/replace.h gives the files their names. A file is on the disk before it gets its name, whatever
// happens to the machine.
#pragma once
#include "checksum.h"
#include "containers.h"
#include "interrupt.h"
#include "token_file.h"

#define SHARD_TOKENS 100000000 // of a token file

// Opens a file in the unfinished folder.
static FILE *open_output(const char *name) {
    char path[4200];
    snprintf(path, sizeof(path), "%s/%s", unfinished_path, name);
    pthread_mutex_lock(&naming);
    FILE *file = fopen(path, "wb");
    pthread_mutex_unlock(&naming);
    if (!file) {
        fail("%s: %s", path, strerror(errno));
    }
    return file;
}

__attribute__((noreturn)) static void fail_to_write(const char *name) {
    int error = errno;
    fail("%s/%s: cannot write: %s", unfinished_path, name, strerror(error));
}

// Closes a file once its bytes are on the disk. A full disk may show only here. Some file systems have
// no fsync.
static void close_output(FILE *file, const char *name) {
    if (fflush(file) != 0 || (fsync(fileno(file)) != 0 && errno != EINVAL)) {
        fail_to_write(name);
    }
    fclose(file);
}

// Writes a file at once, so that errno tells of the write that failed.
static void write_output(const char *name, const char *text, size_t size) {
    FILE *file = open_output(name);
    if (fwrite(text, 1, size, file) != size) {
        fail_to_write(name);
    }
    close_output(file, name);
}

// The token files of one split.
typedef struct Shards {
    const char *folder, *split;
    int wide;        // 1: four bytes a token, not two
    FILE *file;      // the open one
    char name[64];   // its name
    Checksum sum;    // of its tokens
    int64_t in_file; // its tokens
    int count;       // files
    int64_t tokens, documents, bytes;
} Shards;

static void shard_name(const Shards *s, int number, char name[64]) {
    snprintf(name, 64, "%s_%06d.bin", s->split, number);
}

// Writes the header (data/token_file.h), its lower bytes first.
static void write_header(Shards *s) {
    uint64_t sum = checksum_end(&s->sum);
    const uint32_t magic = s->wide ? WIDE_MAGIC : TOKENS_MAGIC, version = s->wide ? 7 : 1;
    const uint32_t fields[] = {magic,         version,       (uint32_t)s->in_file,
                               CHECKSUM_MARK, (uint32_t)sum, (uint32_t)(sum >> 32)};
    unsigned char bytes[1024] = {0};
    for (int i = 0; i < 4 * COUNT(fields); i++) {
        bytes[i] = (unsigned char)(fields[i / 4] >> 8 * (i % 4));
    }
    if (fwrite(bytes, sizeof(bytes), 1, s->file) != 1) {
        fail_to_write(s->name);
    }
}

// Writes the header again, now that the number of tokens and their checksum are known, and closes the file.
static void finish_shard(Shards *s) {
    if (!s->file) {
        return;
    }
    if (fseek(s->file, 0, SEEK_SET) != 0) {
        fail_to_write(s->name);
    }
    write_header(s);
    close_output(s->file, s->name);
    s->file = NULL;
}

// Appends ids (count), and begins a new file when one is full.
static void write_tokens(Shards *s, const int *ids, size_t count) {
    unsigned char bytes[4096];
    size_t width = s->wide ? 4 : 2;
    while (count > 0) {
        if (!s->file) {
            shard_name(s, s->count++, s->name);
            s->file = open_output(s->name);
            s->in_file = 0;
            s->sum = checksum_begin();
            write_header(s);
        }

        // As many as fit into the buffer and into the file, the lower byte of each first.
        size_t n = count < sizeof(bytes) / width ? count : sizeof(bytes) / width;
        size_t room = (size_t)(SHARD_TOKENS - s->in_file);
        n = n < room ? n : room;
        for (size_t i = 0; i < width * n; i++) {
            bytes[i] = (unsigned char)(ids[i / width] >> 8 * (i % width));
        }
        checksum_add(&s->sum, bytes, width * n);
        if (fwrite(bytes, width, n, s->file) != n) {
            fail_to_write(s->name);
        }
        ids += n;
        count -= n;
        s->tokens += (int64_t)n;
        s->in_file += (int64_t)n;
        if (s->in_file == SHARD_TOKENS) {
            finish_shard(s);
        }
    }
}
