// The data loader: token files as batches of windows.
// Gives: data_open, data_batch, data_window, data_frequency, data_fingerprint, data_close.
// Needs: dev/util.h.
// Token files are llm.c's: a header of 256 int32 (magic, version, number of tokens), then the
// tokens as uint16. They are mapped, not read, so they may be larger than memory.
//
// A file is cut into windows of T tokens; the token behind a window is its last target. An epoch
// visits every window of every file once, in an order that depends on the seed and the epoch only.
// A few tokens are usually left over, so each epoch can move the cuts of a file by a random step.
#pragma once
#include "../dev/util.h"
#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define TOKENS_MAGIC 20240520

// One token file.
typedef struct Shard {
    char *path;
    void *map;              // the mapped file
    size_t map_size;        // bytes
    const uint16_t *tokens; // (count), inside the map
    int count;
    long first, end; // this file's windows are first .. end - 1 of all
} Shard;

// All token files of one split.
typedef struct Data {
    Shard *shards; // (shard_count), in order of name
    int shard_count, T, vocab;
    long windows;  // of all files
    double tokens; // of all files
    uint64_t seed;
    long epoch;      // the epoch that `order` is for; -1: none yet
    uint32_t *order; // (windows)
} Data;

// For qsort: pointers to strings, in order of their bytes.
int compare_text(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

// Maps the token file `path` and checks all that its header promises.
void shard_open(Shard *s, const char *path, int T) {
    s->path = strdup(path);

    // Without O_NONBLOCK, a pipe of that name would wait for a writer for ever.
    int file = open(path, O_RDONLY | O_NONBLOCK);
    struct stat info;
    if (file < 0 || fstat(file, &info) != 0) {
        fail("%s: cannot open: %s", path, strerror(errno));
    }
    s->map_size = (size_t)info.st_size;
    if (!S_ISREG(info.st_mode) || s->map_size < 1024) {
        fail("%s: not a token file: expected a header of 1024 bytes, found %zu bytes", path,
             s->map_size);
    }

    // The map stays when the file is closed.
    s->map = mmap(NULL, s->map_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (s->map == MAP_FAILED) {
        fail("%s: cannot map: %s", path, strerror(errno));
    }
    close(file);

    // The header must be ours, and its number of tokens must fit the size of the file.
    int32_t header[3];
    memcpy(header, s->map, sizeof(header));
    if (header[0] != TOKENS_MAGIC || header[1] != 1) {
        fail("%s: not a token file: expected magic %d and version 1, found %d and %d", path,
             TOKENS_MAGIC, header[0], header[1]);
    }
    size_t expected = 1024 + 2 * (size_t)max_int(header[2], 0);
    if (header[2] < 0 || expected != s->map_size) {
        fail("%s: damaged: the header says %d tokens, which is %zu bytes; the file has %zu", path,
             header[2], expected, s->map_size);
    }
    s->tokens = (const uint16_t *)((const char *)s->map + 1024);
    s->count = header[2];
    s->first = 0;
    s->end = s->count > T ? (s->count - 1) / T : 0;
}

// The names, in order, of all files in `dir` that hold `kind` in their name and end in .bin, to be
// freed like the list itself; *count is their number. No such file ends the program with a message.
char **list_shards(const char *dir, const char *kind, int *count) {
    DIR *folder = opendir(dir);
    if (!folder) {
        fail("%s: cannot open the data folder: %s", dir, strerror(errno));
    }

    char **names = NULL;
    struct dirent *entry;
    *count = 0;
    while ((entry = readdir(folder)) != NULL) {
        const char *name = entry->d_name;
        size_t n = strlen(name);
        if (n >= 4 && strcmp(name + n - 4, ".bin") == 0 && strstr(name, kind)) {
            names = (char **)reallocate(names, (size_t)*count + 1, sizeof(char *));
            names[*count] = strdup(name);
            *count += 1;
        }
    }
    closedir(folder);
    if (*count == 0) {
        fail("%s: no *%s*.bin there; data/tinystories.sh and data/tokenize make such folders", dir,
             kind);
    }
    qsort(names, (size_t)*count, sizeof(char *), compare_text);
    return names;
}

// Opens the token files of `dir` whose name holds `kind` ("train" or "val"), for windows of T
// tokens below `vocab`. Ends the program with a message if there is no such file, a damaged one, or
// no full window.
Data *data_open(const char *dir, const char *kind, int T, int vocab, uint64_t seed) {
    Data *d = (Data *)allocate(1, sizeof(Data));
    char **names = list_shards(dir, kind, &d->shard_count);
    d->shards = (Shard *)allocate((size_t)d->shard_count, sizeof(Shard));
    d->T = T;
    d->vocab = vocab;
    d->seed = seed;
    d->epoch = -1;

    // Number the windows through all files.
    for (int i = 0; i < d->shard_count; i++) {
        Shard *s = &d->shards[i];
        char path[4096];
        snprintf(path, sizeof(path), "%s/%s", dir, names[i]);
        shard_open(s, path, T);
        s->first += d->windows;
        s->end += d->windows;
        d->windows = s->end;
        d->tokens += s->count;
        free(names[i]);
    }
    free(names);
    if (!d->windows) {
        fail("%s: the *%s*.bin files are too short: a window takes --seq %d tokens and one more",
             dir, kind, T);
    }
    if (d->windows > UINT32_MAX) {
        fail("%s: more than %u windows; a larger --seq makes fewer", dir, UINT32_MAX);
    }
    return d;
}

// A number that tells this data from any other: a hash of the files' sizes and of 4096 tokens of
// each. A resumed run compares it with the one that it began with.
double data_fingerprint(const Data *d) {
    uint64_t h = 0;
    for (int i = 0; i < d->shard_count; i++) {
        const Shard *s = &d->shards[i];
        h = hash64(h ^ (uint64_t)s->count);

        // The k-th sample is the same token of the file every time, and the file need not be read.
        int samples = s->count ? 4096 : 0;
        for (int k = 0; k < samples; k++) {
            h = hash64(h ^ s->tokens[hash64((uint64_t)k) % (uint64_t)s->count]);
        }
    }
    return (double)(h >> 12); // 52 bits, which a double and JSON hold exactly
}

// How often each token occurs among the first ten million tokens of the data. (vocab), to be freed.
double *data_frequency(const Data *d, int vocab) {
    double *frequency = (double *)allocate((size_t)vocab, sizeof(double));
    int left = 10000000;
    for (int i = 0; i < d->shard_count; i++) {
        int n = min_int(d->shards[i].count, left);
        for (int k = 0; k < n; k++) {
            frequency[min_int(d->shards[i].tokens[k], vocab - 1)] += 1;
        }
        left -= n;
    }
    return frequency;
}

void data_close(Data *d) {
    for (int i = 0; i < d->shard_count; i++) {
        munmap(d->shards[i].map, d->shards[i].map_size);
        free(d->shards[i].path);
    }
    free(d->shards);
    free(d->order);
    free(d);
}

// Reads window w: inputs (T), and as targets (T) the token behind each of them. The cuts are moved
// as in this epoch; epoch -1 does not move them. An id that the tokenizer lacks ends the program.
void data_window(const Data *d, long w, long epoch, int *inputs, int *targets) {
    const Shard *s = d->shards;
    while (w >= s->end) {
        s++;
    }
    int T = d->T, left = (s->count - 1) % T;
    size_t start = (size_t)(w - s->first) * (size_t)T;

    // All cuts of a file move together, by 0 to `left` tokens, so the windows do not overlap.
    if (epoch >= 0) {
        uint64_t shard = (uint64_t)(s - d->shards);
        uint64_t shift = random_stream(d->seed, RANDOM_ORDER, (uint64_t)epoch, shard + 1);
        start += shift % (uint64_t)(left + 1);
    }

    // T + 1 tokens: all but the last are inputs, all but the first are targets.
    for (int t = 0; t <= T; t++) {
        int token = s->tokens[start + (size_t)t];
        if (token >= d->vocab) {
            fail("%s: token %zu is %d, but the tokenizer has %d; "
                 "was the file made with another one?",
                 s->path, start + (size_t)t, token, d->vocab);
        }
        if (t < T) {
            inputs[t] = token;
        }
        if (t > 0) {
            targets[t - 1] = token;
        }
    }
}

// Draws the order in which an epoch visits the windows (the shuffle of Fisher and Yates, inside
// out: each new number swaps with a random earlier one, or with itself).
void shuffle_windows(Data *d, long epoch) {
    uint64_t stream = random_stream(d->seed, RANDOM_ORDER, (uint64_t)epoch, 0);
    d->order = (uint32_t *)reallocate(d->order, (size_t)d->windows, sizeof(uint32_t));
    for (long i = 0; i < d->windows; i++) {
        long j = (long)(random_uniform(stream, (uint64_t)i) * (double)(i + 1));
        d->order[i] = d->order[j];
        d->order[j] = (uint32_t)i;
    }
    d->epoch = epoch;
}

// inputs (B,T), targets (B,T): sequences `first` to `first` + B - 1, counted from the start of the
// run. Any order of calls gives the same sequences, so that a resumed run goes on where it stopped.
void data_batch(Data *d, long first, int B, int *inputs, int *targets) {
    for (int b = 0; b < B; b++) {
        long epoch = (first + b) / d->windows;
        if (epoch != d->epoch) {
            shuffle_windows(d, epoch);
        }

        size_t start = (size_t)b * (size_t)d->T;
        long window = d->order[(first + b) % d->windows];
        data_window(d, window, epoch, inputs + start, targets + start);
    }
}
