// What data/tokenize writes: token files, and at the end all new files take the place of all old ones.
// Gives: open_output, close_output, Shards, write_tokens, finish_shard, Names, list_old_files, list_new_files, replace_files.
// Needs: data/loader.h (how token files begin), data/interrupt.h, data/containers.h.
// Everything goes into a folder in the output folder first, unfinished_path, which fail() removes.
#pragma once
#include "containers.h"
#include "interrupt.h"
#include "loader.h"

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

__attribute__((noreturn)) static void fail_to_write(void) {
    fail("%s: cannot write: %s", unfinished_path, strerror(errno));
}

// Closes a file. A full disk may show only here.
static void close_output(FILE *file) {
    int failed = ferror(file);
    if (fclose(file) != 0 || failed) {
        fail_to_write();
    }
}

// The token files of one split.
typedef struct Shards {
    const char *folder, *split;
    FILE *file;      // the open one
    Checksum sum;    // of its tokens
    int64_t in_file; // its tokens
    int count;       // files
    int64_t tokens, documents, bytes;
} Shards;

static void shard_name(const Shards *s, int number, char name[64]) {
    snprintf(name, 64, "%s_%06d.bin", s->split, number);
}

// Writes the header (data/loader.h), its lower bytes first.
static void write_header(Shards *s) {
    uint64_t sum = checksum_end(&s->sum);
    const uint32_t fields[] = {TOKENS_MAGIC,  1,             (uint32_t)s->in_file,
                               CHECKSUM_MARK, (uint32_t)sum, (uint32_t)(sum >> 32)};
    unsigned char bytes[1024] = {0};
    for (int i = 0; i < 4 * COUNT(fields); i++) {
        bytes[i] = (unsigned char)(fields[i / 4] >> 8 * (i % 4));
    }
    if (fwrite(bytes, sizeof(bytes), 1, s->file) != 1) {
        fail_to_write();
    }
}

// Writes the header again, now that the number of tokens and their checksum are known, and closes the file.
static void finish_shard(Shards *s) {
    if (!s->file) {
        return;
    }
    if (fseek(s->file, 0, SEEK_SET) != 0) {
        fail_to_write();
    }
    write_header(s);
    close_output(s->file);
    s->file = NULL;
}

// Appends ids (count), and begins a new file when one is full.
static void write_tokens(Shards *s, const int *ids, size_t count) {
    unsigned char bytes[4096];
    while (count > 0) {
        if (!s->file) {
            char name[64];
            shard_name(s, s->count++, name);
            s->file = open_output(name);
            s->in_file = 0;
            s->sum = checksum_begin();
            write_header(s);
        }

        // As many as fit into the buffer and into the file, the lower byte of each first.
        size_t n = count < sizeof(bytes) / 2 ? count : sizeof(bytes) / 2;
        size_t room = (size_t)(SHARD_TOKENS - s->in_file);
        n = n < room ? n : room;
        for (size_t i = 0; i < n; i++) {
            bytes[2 * i] = (unsigned char)(ids[i] & 255);
            bytes[2 * i + 1] = (unsigned char)(ids[i] >> 8);
        }
        checksum_add(&s->sum, bytes, 2 * n);
        if (fwrite(bytes, 2, n, s->file) != n) {
            fail_to_write();
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

// ---- the end: all new files take the place of all old ones

typedef struct Names {
    char **list; // (count): names of files
    size_t count;
} Names;

static void add_name(Names *n, const char *name) {
    n->list = (char **)grow(n->list, n->count, sizeof(char *));
    n->list[n->count++] = copy_text(name);
}

static void free_names(Names *n) {
    for (size_t i = 0; i < n->count; i++) {
        free(n->list[i]);
    }
    free(n->list);
}

// Is it a name of ours, such as train_000000.bin?
static int is_our_name(const char *name) {
    const char *number = strchr(name, '_');
    if (strncmp(name, "train_", 6) != 0 && strncmp(name, "val_", 4) != 0) {
        return 0;
    }
    return strspn(number + 1, "0123456789") == 6 && strcmp(number + 7, ".bin") == 0;
}

// Notes that `name` in the folder `out` is to be replaced, if it is there. Only a file can be.
static void add_old_file(Names *old, const char *out, const char *name) {
    char path[4200];
    struct stat info;
    snprintf(path, sizeof(path), "%s/%s", out, name);
    if (lstat(path, &info) != 0) {
        if (errno != ENOENT) {
            fail("%s: %s", path, strerror(errno));
        }
        return;
    }
    if (!S_ISREG(info.st_mode) && !S_ISLNK(info.st_mode)) {
        fail("%s: not a file, and in the way of a new one; move it to another place", path);
    }
    add_name(old, name);
}

// The files of an earlier run, which train_moe would read along with the new ones. Other token files stay, with a warning.
static Names list_old_files(const char *out, int warn) {
    Names old = {NULL, 0};
    DIR *folder = open_folder(out);
    const char *name;
    add_old_file(&old, out, "tokenizer.json");
    while ((name = next_name(folder, out)) != NULL) {
        if (is_our_name(name)) {
            add_old_file(&old, out, name);
        } else if (warn && is_bin_name(name) && name_role(name)) {
            fprintf(stderr, "%s: %s/%s was there before, and train_moe will read it too\n", program_name, out, name);
        }
    }
    closedir(folder);
    if (old.count > 0) {
        qsort(old.list, old.count, sizeof(char *), compare_text); // the tokenizer comes first
    }
    return old;
}

// The new files, the tokenizer last.
static Names list_new_files(const Shards *train, const Shards *val) {
    Names fresh = {NULL, 0};
    for (int i = 0; i < train->count + val->count; i++) {
        char name[64];
        shard_name(i < train->count ? train : val, i < train->count ? i : i - train->count, name);
        add_name(&fresh, name);
    }
    add_name(&fresh, "tokenizer.json");
    return fresh;
}

// Moves a file; returns 0 where that fails, and errno says why.
static int move_file(const char *from, const char *to, const char *name) {
    char old_path[4200], new_path[4200];
    snprintf(old_path, sizeof(old_path), "%s/%s", from, name);
    snprintf(new_path, sizeof(new_path), "%s/%s", to, name);
    return rename(old_path, new_path) == 0;
}

// Moves files in order until one cannot be moved, and returns how many it moved.
static size_t move_files(const char *from, const char *to, const Names *names) {
    size_t moved = 0;
    while (moved < names->count && move_file(from, to, names->list[moved])) {
        moved++;
    }
    return moved;
}

// Moves the first `count` files back, the last one first, and returns how many are not back.
static size_t move_back(const char *from, const char *to, const Names *names, size_t count) {
    while (count > 0 && move_file(from, to, names->list[count - 1])) {
        count--;
    }
    return count;
}

// What could not be moved is moved back. Either all is as it was, or the message says where everything is.
__attribute__((noreturn)) static void undo_replacing(const char *out, const char *aside, const Names *old, size_t gone,
                                                     const Names *fresh, size_t came) {
    int error = errno;
    came = move_back(out, unfinished_path, fresh, came);
    if (came == 0) {
        gone = move_back(aside, out, old, gone);
    }
    if (came == 0 && gone == 0) {
        rmdir(aside);
        fail("%s: cannot move the new files there: %s; nothing was changed", out, strerror(error));
    }

    // The unfinished folder has files that nobody else has, so it stays.
    char unfinished[4096];
    snprintf(unfinished, sizeof(unfinished), "%s", unfinished_path);
    unfinished_path[0] = 0;
    if (came > 0) {
        fail("%s: cannot move all new files there (%s), nor move them back (%s): %s to %s are there, the other new files in "
             "%s, and all %zu old ones in %s; give the command again before you train on them",
             out, strerror(error), strerror(errno), fresh->list[0], fresh->list[came - 1], unfinished, gone, aside);
    }
    fail("%s: cannot move the new files there (%s), nor move the old ones back (%s): of these %s to %s are in %s, the others "
         "are where they were, and all new ones are in %s; give the command again before you train on them",
         out, strerror(error), strerror(errno), old->list[0], old->list[gone - 1], aside, unfinished);
}

// The new files take the place of the old ones: these are moved aside, then those are moved in. A kill in between leaves no
// tokenizer.json there, so that nobody trains on half of them.
static void replace_files(const char *out, const Names *old, const Names *fresh) {
    char aside[2100], unfinished[4096];
    size_t gone = 0, came = 0;
    snprintf(aside, sizeof(aside), "%s/replaced-tokens", out);
    pthread_mutex_lock(&naming);
    int able = old->count == 0 || mkdir(aside, 0777) == 0 || errno == EEXIST;
    if (able) {
        gone = move_files(out, aside, old);
    }
    if (able && gone == old->count) {
        came = move_files(unfinished_path, out, fresh);
    }
    if (came < fresh->count) {
        undo_replacing(out, aside, old, gone, fresh, came);
    }
    snprintf(unfinished, sizeof(unfinished), "%s", unfinished_path);
    unfinished_path[0] = 0;
    pthread_mutex_unlock(&naming);

    // What is left does no harm, but takes room.
    remove_tree(unfinished);
    remove_tree(aside);
    if (access(unfinished, F_OK) == 0 || access(aside, F_OK) == 0) {
        fprintf(stderr, "%s: all files are in %s, but %s could not be removed\n", program_name, out,
                access(aside, F_OK) == 0 ? aside : unfinished);
    }
}
