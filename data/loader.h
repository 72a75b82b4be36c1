// The data loader: token files as batches.
// Gives: data_open, data_batch, data_window, data_frequency, data_close. Needs: dev/util.h.
//
// Token files are llm.c's: a header of 256 int32 (magic, version, number of tokens), then the tokens as uint16. They are
// mapped, not read, so they may be larger than memory. A file is cut into windows of T tokens (and the next token, the
// last target); an epoch visits every window of every file once, in an order that the seed and the epoch fix, and each
// epoch shifts the cuts within what a file has left over.

#pragma once
#include "../dev/util.h"

#define TOKENS_MAGIC 20240520

typedef struct Shard {
    char *path;
    void *map;
    size_t map_size;
    const uint16_t *tokens;
    int count;       // tokens
    long first, end; // its windows are first..end of all
} Shard;

typedef struct Data {
    Shard *shards;
    int shard_count, T, vocab;
    long windows;
    double tokens;
    uint64_t seed;
    long epoch;      // which order[] is made for
    uint32_t *order; // (windows)
} Data;

int compare_text(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

// Maps dir/name and checks all that its header promises.
void shard_open(Shard *s, const char *path, int T) {
    s->path = strdup(path);
    int file = open(path, O_RDONLY | O_NONBLOCK); // a pipe of that name would wait for ever
    struct stat info;
    if (file < 0 || fstat(file, &info) != 0)
        fail("%s: cannot open: %s", path, strerror(errno));
    s->map_size = (size_t)info.st_size;
    if (!S_ISREG(info.st_mode) || s->map_size < 1024)
        fail("%s: not a token file: expected a header of 1024 bytes, found %zu bytes", path, s->map_size);
    s->map = mmap(NULL, s->map_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (s->map == MAP_FAILED)
        fail("%s: cannot map: %s", path, strerror(errno));
    close(file);
    int32_t header[3];
    memcpy(header, s->map, sizeof(header));
    if (header[0] != TOKENS_MAGIC || header[1] != 1)
        fail("%s: not a token file: expected magic %d and version 1, found %d and %d", path, TOKENS_MAGIC, header[0],
             header[1]);
    if (header[2] < 0 || 1024 + 2 * (size_t)header[2] != s->map_size)
        fail("%s: damaged: the header says %d tokens, which is %zu bytes; the file has %zu", path, header[2],
             1024 + 2 * (size_t)(header[2] < 0 ? 0 : header[2]), s->map_size);
    s->tokens = (const uint16_t *)((const char *)s->map + 1024);
    s->count = header[2];
    s->end = s->count > T ? (s->count - 1) / T : 0;
}

// All files of dir whose name holds `kind` ("train" or "val") and ends in .bin, in order of name.
Data *data_open(const char *dir, const char *kind, int T, int vocab, uint64_t seed) {
    Data *d = (Data *)allocate(1, sizeof(Data));
    DIR *list = opendir(dir);
    if (!list)
        fail("%s: cannot open the data folder: %s", dir, strerror(errno));
    char **names = NULL;
    for (struct dirent *entry; (entry = readdir(list)) != NULL;) {
        size_t n = strlen(entry->d_name);
        if (n < 4 || strcmp(entry->d_name + n - 4, ".bin") || !strstr(entry->d_name, kind))
            continue;
        names = (char **)reallocate(names, (size_t)d->shard_count + 1, sizeof(char *));
        names[d->shard_count++] = strdup(entry->d_name);
    }
    closedir(list);
    if (!d->shard_count)
        fail("%s: no *%s*.bin there; data/tinystories.sh and data/tokenize make such folders", dir, kind);
    qsort(names, (size_t)d->shard_count, sizeof(char *), compare_text);
    d->shards = (Shard *)allocate((size_t)d->shard_count, sizeof(Shard));
    for (int i = 0; i < d->shard_count; i++) {
        char path[4096];
        snprintf(path, sizeof(path), "%s/%s", dir, names[i]);
        shard_open(&d->shards[i], path, T);
        d->shards[i].first = d->windows;
        d->windows = d->shards[i].end += d->windows;
        d->tokens += d->shards[i].count;
        free(names[i]);
    }
    free(names);
    if (!d->windows)
        fail("%s: the *%s*.bin files are too short: a window takes --seq %d tokens and one more", dir, kind, T);
    if (d->windows > UINT32_MAX)
        fail("%s: more than %u windows; a larger --seq makes fewer", dir, UINT32_MAX);
    d->T = T;
    d->vocab = vocab;
    d->seed = seed;
    d->epoch = -1;
    return d;
}

// A number that another text, or the same one in other files, would hardly have: of sizes and some thousand tokens.
double data_fingerprint(const Data *d) {
    uint64_t h = 0;
    for (int i = 0; i < d->shard_count; i++) {
        const Shard *s = &d->shards[i];
        h = hash64(h ^ (uint64_t)s->count);
        for (int k = 0; k < 4096 && s->count; k++)
            h = hash64(h ^ s->tokens[hash64((uint64_t)k) % (uint64_t)s->count]);
    }
    return (double)(h >> 12); // exact in JSON
}

// How often each of the first tokens comes, up to ten million of them. (vocab), to be freed.
double *data_frequency(const Data *d, int vocab) {
    double *frequency = (double *)allocate(vocab, sizeof(double));
    int left = 10000000;
    for (int i = 0; i < d->shard_count; i++) {
        for (int k = 0; k < d->shards[i].count && left-- > 0; k++)
            frequency[min_int(d->shards[i].tokens[k], vocab - 1)] += 1;
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

// inputs (T), targets (T): window w, its cuts shifted as in this epoch; epoch -1: not shifted.
void data_window(const Data *d, long w, long epoch, int *inputs, int *targets) {
    const Shard *s = d->shards;
    while (w >= s->end)
        s++;
    int T = d->T, left = (s->count - 1) % T;
    size_t at = (size_t)(w - s->first) * (size_t)T;
    if (epoch >= 0)
        at += random_stream(d->seed, RANDOM_ORDER, (uint64_t)epoch, (uint64_t)(s - d->shards) + 1) % (uint64_t)(left + 1);
    for (int t = 0; t <= T; t++) {
        int token = s->tokens[at + (size_t)t];
        if (token >= d->vocab)
            fail("%s: token %zu is %d, but the tokenizer has %d; was the file made with another one?", s->path, at + t, token,
                 d->vocab);
        if (t < T)
            inputs[t] = token;
        if (t > 0)
            targets[t - 1] = token;
    }
}

// The sequences number first.. first+B-1 of training, counted from the start of the run. inputs, targets (B,T)
void data_batch(Data *d, long first, int B, int *inputs, int *targets) {
    for (int b = 0; b < B; b++) {
        long epoch = (first + b) / d->windows;
        if (epoch != d->epoch) { // Fisher and Yates's shuffle
            d->order = (uint32_t *)reallocate(d->order, (size_t)d->windows, sizeof(uint32_t));
            uint64_t stream = random_stream(d->seed, RANDOM_ORDER, (uint64_t)epoch, 0);
            for (long i = 0; i < d->windows; i++) {
                long j = (long)(random_uniform(stream, (uint64_t)i) * (double)(i + 1));
                d->order[i] = d->order[j];
                d->order[j] = (uint32_t)i;
            }
            d->epoch = epoch;
        }
        size_t at = (size_t)b * (size_t)d->T;
        data_window(d, d->order[(first + b) % d->windows], epoch, inputs + at, targets + at);
    }
}
