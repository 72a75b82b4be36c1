// How the files that data/tokenize has written take the places of those that were there before.
// Gives: prepare_output, Names, list_old_files, list_new_files, replace_files.
// Needs: data/output.h, data/roles.h.
// The old files are moved into a folder of their own, REPLACED of data/token_file.h, then the new ones
// to where they were, tokenizer.json last. So a run that is killed meanwhile leaves no tokenizer, and
// the next one puts all back.
#pragma once
#include "output.h"
#include "roles.h"

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

// The files of an earlier run, which train_moe would read along with the new ones. Other token files
// stay, with a warning.
static Names list_old_files(const char *out, int warn) {
    Names old = {NULL, 0};
    DIR *folder = open_folder(out);
    const char *name;
    add_old_file(&old, out, "tokenizer.json");
    add_old_file(&old, out, "tokenizer_config.json");
    while ((name = next_name(folder, out)) != NULL) {
        if (is_our_name(name)) {
            add_old_file(&old, out, name);
        } else if (warn && is_bin_name(name) && name_role(name)) {
            remark("%s/%s was there before, and train_moe will read it too", out, name);
        }
    }
    closedir(folder);
    if (old.count > 0) {
        qsort(old.list, old.count, sizeof(char *), compare_text); // the tokenizer comes first
    }
    return old;
}

// The new files, the tokenizer last. has_config: is there a tokenizer_config.json?
static Names list_new_files(const Shards *train, const Shards *val, int has_config) {
    Names fresh = {NULL, 0};
    for (int i = 0; i < train->count + val->count; i++) {
        char name[64];
        shard_name(i < train->count ? train : val, i < train->count ? i : i - train->count, name);
        add_name(&fresh, name);
    }
    if (has_config) {
        add_name(&fresh, "tokenizer_config.json");
    }
    add_name(&fresh, "tokenizer.json");
    return fresh;
}

// Returns once the names in a folder are on the disk, where the file system can tell.
static void sync_folder(const char *path) {
    int folder = open(path, O_RDONLY);
    if (folder >= 0) {
        fsync(folder);
        close(folder);
    }
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

// Not all files could be moved, so those that were moved are moved back. After that, either everything is as
// it was, or the message says where each file is.
__attribute__((noreturn)) static void undo_replacing(const char *out, const char *aside, const Names *old,
                                                     size_t gone, const Names *fresh, size_t came) {
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
        fail("%s: cannot move all new files there (%s), nor move them back (%s): %s to %s are there, the other "
             "new files in %s, and all %zu old ones in %s; give the command again before you train on them",
             out, strerror(error), strerror(errno), fresh->list[0], fresh->list[came - 1], unfinished, gone,
             aside);
    }
    fail("%s: cannot move the new files there (%s), nor move the old ones back (%s): of these %s to %s are in %s, "
         "the others are where they were, and all new ones are in %s; give the command again before you train on "
         "them",
         out, strerror(error), strerror(errno), old->list[0], old->list[gone - 1], aside, unfinished);
}

// The new files take the place of the old ones: these are moved aside, then those are moved in. A kill
// in between leaves no tokenizer.json there, so that nobody trains on half of them.
static void replace_files(const char *out, const Names *old, const Names *fresh) {
    char aside[2100], unfinished[4096];
    size_t gone = 0, came = 0;
    snprintf(aside, sizeof(aside), "%s/" REPLACED, out);
    pthread_mutex_lock(&naming);
    remove_tree(aside); // what an earlier run could not remove
    int able = mkdir(aside, 0777) == 0; // also where there are no old ones: it tells that files are moving
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
    sync_folder(out);

    // What is left does no harm, but takes room.
    remove_tree(unfinished);
    remove_tree(aside);
    if (access(unfinished, F_OK) == 0 || access(aside, F_OK) == 0) {
        remark("all files are in %s, but %s could not be removed", out,
               access(aside, F_OK) == 0 ? aside : unfinished);
    }
}

// ---- the beginning

// Where an earlier run was killed in replace_files(), or could not move all back: all old files are put
// back, and what there is of the new ones goes. This may be killed, too, and then the next run does the
// rest.
static void restore_files(const char *out) {
    char aside[2100], path[4200];
    if (!is_half_replaced(out)) {
        return;
    }
    snprintf(aside, sizeof(aside), "%s/" REPLACED, out);
    Names old = list_old_files(aside, 0);
    if (old.count == 0) { // there were none; the folder stays and says that the new ones are not all there
        return;
    }

    // Where train_000000.bin is in both folders, that of `out` is a new one, and then all old files are
    // aside. It goes last, since it tells.
    Names fresh = {NULL, 0};
    if (has_file(out, "train_000000.bin") && has_file(aside, "train_000000.bin")) {
        fresh = list_old_files(out, 0);
    }
    for (size_t i = fresh.count; i-- > 0;) {
        snprintf(path, sizeof(path), "%s/%s", out, fresh.list[i]);
        if (unlink(path) != 0) {
            fail("%s: cannot remove: %s", path, strerror(errno));
        }
    }

    // The tokenizer, which is the first one in the list, comes back last.
    if (move_back(aside, out, &old, old.count) != 0) {
        int error = errno;
        fail("%s: an earlier run was ended while it replaced the files there, and the old ones cannot be moved "
             "back from %s: %s",
             out, aside, strerror(error));
    }
    sync_folder(out);
    clear_away(aside);
    remark("%s: an earlier run was ended while it replaced the files there; the old ones are back", out);
    free_names(&fresh);
    free_names(&old);
}

// Makes the output folder and, in it, an empty one for files that are being written.
static void prepare_output(const char *out) {
    if (strlen(out) > 2000) {
        fail("%s: the name is too long", out);
    }
    make_directories(out);
    restore_files(out);
    snprintf(unfinished_path, sizeof(unfinished_path), "%s/unfinished-tokens", out);
    Names old = list_old_files(out, 0); // is a folder in the way?
    free_names(&old);
    await_signals();
    remove_tree(unfinished_path); // of a run that was killed
    make_directories(unfinished_path);
}
