// The data loader: token files as batches of windows.
// Gives: data_open, refuse_changed_data, data_batch, data_window, data_frequency, data_close.
// Needs: dev/util.h, data/token_file.h, data/roles.h, data/checksum.h.
// Token files (data/token_file.h) are mapped, so they may be larger than memory. When a file is opened,
// it is read once, to check its tokens. It may not change later, and refuse_changed_data() looks whether it
// did.
//
// A file is cut into windows of T tokens; the token behind a window is its last target. An epoch
// visits every window of every file once, in an order that depends on the seed and the epoch only.
// A few tokens are usually left over, so each epoch can move the cuts of a file by a random step.
#pragma once
#include "checksum.h"
#include "roles.h"
#include "token_file.h"

// One token file.
typedef struct Shard {
    char *path;
    void *map;              // the mapped file
    size_t map_size;        // bytes
    struct timespec time;   // when it was last written to
    const void *tokens;     // (count), inside the map: uint16_t or uint32_t
    int width;              // bytes of a token, 2 or 4
    int count;
    long first, end; // this file's windows are first .. end - 1 of all
} Shard;

// All token files of one split.
typedef struct Data {
    Shard *shards; // (shard_count), in order of name
    int shard_count, T, vocab;
    long windows;  // of all files
    double tokens; // of all files
    double fingerprint; // tells this data from any other, as it was when it was opened
    uint64_t seed;
    long epoch;      // the epoch that `order` is for; -1: none yet
    uint32_t *order; // (windows)
    struct Data *next; // in the list of all that are open
} Data;

Data *data_list = NULL;          // all that are open
void (*data_tick)(void) = NULL;  // called again and again while a file is read, if it is set
int data_part = 0;               // where several processes open the same files, this one checks the tokens
int data_parts = 1;              // of those whose number % data_parts is data_part
struct sigaction data_bus_error; // what a SIGBUS did before data_open

// ---- opening

void data_put(const char *text) { // printf is not allowed where a signal came
    (void)!write(2, text, strlen(text));
}

// Where a mapped file has become shorter, reading behind its end raises SIGBUS.
void on_bus_error(int number, siginfo_t *info, void *context) {
    const char *at = (const char *)info->si_addr;
    (void)number;
    (void)context;
    for (const Data *d = data_list; d; d = d->next) {
        for (int i = 0; i < d->shard_count; i++) {
            const Shard *s = &d->shards[i];
            if (at >= (const char *)s->map && at < (const char *)s->map + s->map_size) {
                data_put(program_name);
                data_put(": ");
                data_put(s->path);
                data_put(": the file changed while it was in use: it is shorter now, or cannot be read. "
                         "The last checkpoint is as it was\n");
                _exit(1);
            }
        }
    }

    // It is of other memory: the same happens once more, and this time ends as it would have done.
    sigaction(SIGBUS, &data_bus_error, NULL);
}

// A token is too large for the vocabulary.
__attribute__((noreturn)) void fail_at_token(const char *path, size_t at, int token, int vocab) {
    fail("%s: token %zu is %d, but the model has %d tokens; was the file made with another tokenizer? Make it "
         "again with data/tokenize, or name its tokenizer by --tokenizer",
         path, at, token, vocab);
}

// Reads n bytes from the place `at` of a file.
void read_piece(int file, const char *path, size_t at, unsigned char *bytes, size_t n) {
    for (size_t have = 0; have < n;) {
        ssize_t got = pread(file, bytes + have, n - have, (off_t)(at + have));
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            fail("%s: cannot read: %s", path, got < 0 ? strerror(errno) : "it became shorter");
        }
        have += (size_t)got;
    }
}

// Token i of tokens of `width` bytes. One of four bytes that is no int becomes the largest that is.
int token_at(const void *tokens, int width, size_t i) {
    if (width == 2) {
        return ((const uint16_t *)tokens)[i];
    }
    uint32_t token = ((const uint32_t *)tokens)[i];
    return token > INT32_MAX ? INT32_MAX : (int)token;
}

int highest_token(const void *tokens, int width, size_t count) {
    if (width == 4) {
        uint32_t highest = 0;
        for (size_t i = 0; i < count; i++) {
            uint32_t token = ((const uint32_t *)tokens)[i];
            highest = token > highest ? token : highest;
        }
        return token_at(&highest, 4, 0);
    }
    uint16_t highest = 0;
    for (size_t i = 0; i < count; i++) {
        uint16_t token = ((const uint16_t *)tokens)[i];
        highest = token > highest ? token : highest;
    }
    return highest;
}

// Reads all tokens once: is their checksum that of the header (0: it has none), and is each below
// `vocab`? They are read, not looked at in the map, which would then count as this program's memory.
void shard_check(const Shard *s, int file, int vocab, uint64_t expected) {
    const size_t most = 1 << 17; // tokens of a piece, which the processor's cache holds
    const size_t width = (size_t)s->width;
    unsigned char *piece = (unsigned char *)allocate(most, width);
    Checksum sum = checksum_begin();
    size_t count = (size_t)s->count, bad = count;
    int token = 0;
    for (size_t at = 0; at < count; at += most) {
        size_t n = count - at < most ? count - at : most;
        read_piece(file, s->path, 1024 + width * at, piece, width * n);
        if (expected) {
            checksum_add(&sum, piece, width * n);
        }

        // Remember the first token that is too large. In a damaged file that is not the fault to report.
        if (bad == count && highest_token(piece, s->width, n) >= vocab) {
            size_t i = 0;
            while (token_at(piece, s->width, i) < vocab) {
                i++;
            }
            bad = at + i;
            token = token_at(piece, s->width, i);
        }
        if (data_tick) {
            data_tick();
        }
    }
    free(piece);
    if (expected && checksum_end(&sum) != expected) {
        fail("%s: damaged: its tokens do not have the checksum in its header; take another copy, or make it "
             "again with data/tokenize",
             s->path);
    }
    if (bad < count) {
        fail_at_token(s->path, bad, token, vocab);
    }
}

// Maps the token file `path` and checks all that its header promises, and with `check` its tokens.
void shard_open(Shard *s, const char *path, int T, int vocab, int check) {
    s->path = copy_text(path);

    // Without O_NONBLOCK, a pipe of that name would wait for a writer for ever.
    int file = open(path, O_RDONLY | O_NONBLOCK);
    struct stat info;
    if (file < 0 || fstat(file, &info) != 0) {
        fail("%s: cannot open: %s", path, strerror(errno));
    }
    s->map_size = (size_t)info.st_size;
    s->time = file_time(&info);
    if (!S_ISREG(info.st_mode) || s->map_size < 1024) {
        fail("%s: not a token file: expected a header of 1024 bytes, found %zu bytes", path,
             s->map_size);
    }

    // The header must be ours, and its number of tokens must fit the size of the file.
    int32_t header[6];
    read_piece(file, path, 0, (unsigned char *)header, sizeof(header));
    s->width = token_bytes(header[0], header[1]);
    if (!s->width) {
        fail("%s: not a token file: expected magic %d and version 1, or %d and 7; found %d and %d", path,
             TOKENS_MAGIC, WIDE_MAGIC, header[0], header[1]);
    }
    size_t expected = 1024 + (size_t)s->width * (size_t)max_int(header[2], 0);
    if (header[2] < 0 || expected != s->map_size) {
        fail("%s: damaged: the header says %d tokens, which is %zu bytes; the file has %zu", path,
             header[2], expected, s->map_size);
    }
    s->count = header[2];
    s->first = 0;
    s->end = s->count > T ? (s->count - 1) / T : 0;
    uint64_t sum = (uint64_t)(uint32_t)header[5] << 32 | (uint32_t)header[4];
    if (check) {
        shard_check(s, file, vocab, header[3] == CHECKSUM_MARK ? sum : 0);
    }

    // The map stays when the file is closed.
    s->map = mmap(NULL, s->map_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (s->map == MAP_FAILED) {
        fail("%s: cannot map: %s", path, strerror(errno));
    }
    close(file);
    s->tokens = (const char *)s->map + 1024;
}

// The names, in order, of all files of `dir` that end in .bin and are for `kind` ("train" or "val"), to
// be freed like the list itself; *count is their number. If there is no such file, the program ends with a message.
char **list_shards(const char *dir, const char *kind, int *count) {
    DIR *folder = open_folder(dir);
    int wanted = strcmp(kind, "train") == 0 ? TRAINING : VALIDATION;
    char **names = NULL;
    char other[300] = ""; // a name that says nothing
    const char *name;
    *count = 0;
    while ((name = next_name(folder, dir)) != NULL) {
        char path[4096];
        snprintf(path, sizeof(path), "%s/%s", dir, name);
        int role = is_bin_name(name) ? file_role(path) : 0;
        if (role == wanted) {
            names = (char **)reallocate(names, (size_t)*count + 1, sizeof(char *));
            names[*count] = copy_text(name);
            *count += 1;
        } else if (is_bin_name(name) && !role) {
            snprintf(other, sizeof(other), "%s, for example, says neither; ", name);
        }
    }
    closedir(folder);
    if (*count == 0) {
        fail("%s: no .bin file there has the word %s in its name; %scall token files train_000000.bin, "
             "val_000000.bin and so on (data/tinystories.sh and data/tokenize make such folders)",
             dir, kind, other);
    }
    qsort(names, (size_t)*count, sizeof(char *), compare_text);
    return names;
}

// Puts d into the list of those that are open.
void data_register(Data *d) {
    if (!data_list) {
        struct sigaction action;
        memset(&action, 0, sizeof(action));
        action.sa_sigaction = on_bus_error;
        action.sa_flags = SA_SIGINFO;
        sigaction(SIGBUS, &action, &data_bus_error);
    }
    d->next = data_list;
    data_list = d;
}

// Checks that there are windows. Names files that have none once: nothing of them is counted or trained on.
void check_windows(const Data *d, const char *dir, const char *kind) {
    const Shard *left_out = NULL;
    int others = -1, longest = 0;
    for (int i = 0; i < d->shard_count; i++) {
        const Shard *s = &d->shards[i];
        longest = max_int(longest, s->count);
        if (s->first == s->end) {
            left_out = left_out ? left_out : s;
            others++;
        }
    }
    if (!d->windows) {
        fail("%s: too short: the longest %s file has %d tokens, but a window takes %d (--seq %d and one more)",
             dir, kind, longest, d->T + 1, d->T);
    }
    if (d->windows > UINT32_MAX) {
        fail("%s: more than %u windows; a larger --seq makes fewer", dir, UINT32_MAX);
    }
    char more[64] = "";
    if (others > 0) {
        snprintf(more, sizeof(more), ", and %d more of these files", others);
    }
    if (left_out) {
        remark("%s has %d tokens, but a window takes %d (--seq %d and one more): it is left out%s",
               left_out->path, left_out->count, d->T + 1, d->T, more);
    }
}

// A number that tells this data from any other: a hash of the files' sizes and of 4096 tokens of
// each. A resumed run compares it with the one that it began with.
double fingerprint_data(const Data *d) {
    uint64_t h = 0;
    for (int i = 0; i < d->shard_count; i++) {
        const Shard *s = &d->shards[i];
        h = hash64(h ^ (uint64_t)s->count);

        // The k-th sample is the same token of the file every time, and the file need not be read.
        int samples = s->count ? 4096 : 0;
        for (int k = 0; k < samples; k++) {
            h = hash64(h ^ (uint64_t)token_at(s->tokens, s->width, hash64((uint64_t)k) % (uint64_t)s->count));
        }
    }
    return (double)(h >> 12); // 52 bits, which a double and JSON hold exactly
}

// Opens the token files of `dir` that are for `kind` ("train" or "val"), for windows of T tokens below
// `vocab`. Ends the program with a message if there is no such file, a damaged one, or no full window.
Data *data_open(const char *dir, const char *kind, int T, int vocab, uint64_t seed) {
    Data *d = (Data *)allocate(1, sizeof(Data));
    refuse_half_replaced(dir);
    char **names = list_shards(dir, kind, &d->shard_count);
    d->shards = (Shard *)allocate((size_t)d->shard_count, sizeof(Shard));
    d->T = T;
    d->vocab = vocab;
    d->seed = seed;
    d->epoch = -1;

    // Number the windows through all files.
    double start = seconds();
    int told = 0;
    for (int i = 0; i < d->shard_count; i++) {
        Shard *s = &d->shards[i];
        char path[4096];
        snprintf(path, sizeof(path), "%s/%s", dir, names[i]);
        if (!told && seconds() - start > 3) {
            remark("reading the %s files of %s once, to check their tokens", kind, dir);
            told = 1;
        }
        shard_open(s, path, T, vocab, i % data_parts == data_part);
        d->tokens += s->end > s->first ? s->count : 0;
        s->first += d->windows;
        s->end += d->windows;
        d->windows = s->end;
        free(names[i]);
    }
    free(names);
    check_windows(d, dir, kind);
    data_register(d);
    d->fingerprint = fingerprint_data(d);
    return d;
}

// Ends the program where an open file has changed: its map may have other tokens now, and zeros behind
// a new end within the last page. A file that was removed does no harm, since its map stays.
void refuse_changed_data(void) {
    for (const Data *d = data_list; d; d = d->next) {
        for (int i = 0; i < d->shard_count; i++) {
            const Shard *s = &d->shards[i];
            struct stat info;
            if (stat(s->path, &info) != 0) {
                continue;
            }
            struct timespec time = file_time(&info);
            if ((size_t)info.st_size != s->map_size || time.tv_sec != s->time.tv_sec ||
                time.tv_nsec != s->time.tv_nsec) {
                fail("%s: the file changed while it was in use; the last checkpoint is as it was. Put the "
                     "old file back, and go on with --resume",
                     s->path);
            }
        }
    }
}

// How often each token occurs among the first ten million tokens of the data. (vocab), to be freed.
double *data_frequency(const Data *d, int vocab) {
    double *frequency = (double *)allocate((size_t)vocab, sizeof(double));
    int left = 10000000;
    for (int i = 0; i < d->shard_count; i++) {
        const Shard *s = &d->shards[i];
        int n = s->end > s->first ? min_int(s->count, left) : 0;
        for (int k = 0; k < n; k++) {
            frequency[min_int(token_at(s->tokens, s->width, (size_t)k), vocab - 1)] += 1;
        }
        left -= n;
    }
    return frequency;
}

void data_close(Data *d) {
    Data **at = &data_list;
    while (*at != d) {
        at = &(*at)->next;
    }
    *at = d->next;
    if (!data_list) {
        sigaction(SIGBUS, &data_bus_error, NULL);
    }
    for (int i = 0; i < d->shard_count; i++) {
        munmap(d->shards[i].map, d->shards[i].map_size);
        free(d->shards[i].path);
    }
    free(d->shards);
    free(d->order);
    free(d);
}

// Reads window w: inputs (T), and as targets (T) the token behind each of them. The cuts are moved
// as in this epoch; epoch -1 does not move them.
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
        int token = token_at(s->tokens, s->width, start + (size_t)t);
        if (token >= d->vocab) {
            fail_at_token(s->path, start + (size_t)t, token, d->vocab); // it changed since it was opened
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
            refuse_changed_data();
            shuffle_windows(d, epoch);
        }

        size_t start = (size_t)b * (size_t)d->T;
        long window = d->order[(first + b) % d->windows];
        data_window(d, window, epoch, inputs + start, targets + start);
    }
}
