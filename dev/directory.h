// The run directory: which checkpoints are there, which one counts, and what its file system can do.
// Gives: next_entry, checkpoint_step, smallest_checkpoint, find_checkpoint, find_latest. Needs: dev/util.h.
//
// In it lie log.jsonl, the folders checkpoint-STEP, and `latest`, a symbolic link to the newest of them. Where the file
// system has no links, `latest` is a small text file with the folder's name.
#pragma once
#include "util.h"

// The next entry of a folder, NULL behind the last one. A folder that cannot be read to its end ends the program.
struct dirent *next_entry(DIR *folder, const char *path) {
    errno = 0;
    struct dirent *entry = readdir(folder);
    if (!entry && errno != 0) {
        fail("%s: cannot read the folder: %s", path, strerror(errno));
    }
    return entry;
}

// The step of a folder that is called checkpoint-STEP, as we write it; -1: it has another name.
long checkpoint_step(const char *name) {
    long step;
    char again[64];
    if (sscanf(name, "checkpoint-%ld", &step) != 1 || step < 0) {
        return -1;
    }
    snprintf(again, sizeof(again), "checkpoint-%ld", step);
    return strcmp(name, again) ? -1 : step;
}

// The smallest step of the checkpoint-STEP folders in out, -1 where there is none; *count says how many there are.
long smallest_checkpoint(const char *out, int *count) {
    long smallest = -1;
    DIR *folder = opendir(out);
    *count = 0;
    for (struct dirent *entry; folder && (entry = next_entry(folder, out)) != NULL;) {
        long step = checkpoint_step(entry->d_name);
        if (step < 0) {
            continue;
        }
        (*count)++;
        if (smallest < 0 || step < smallest) {
            smallest = step;
        }
    }
    if (folder) {
        closedir(folder);
    }
    return smallest;
}

// Does this folder have all files of a checkpoint? Without `moments`: all that a model needs, to write or to begin with.
int is_whole(const char *dir, int moments) {
    static const char *const names[] = {"config.json", "model.safetensors", "optimizer.safetensors", "trainer_state.json"};
    char path[4200];
    for (int i = 0; i < (moments ? 4 : 2); i++) {
        snprintf(path, sizeof(path), "%s/%s", dir, names[i]);
        int there = access(path, F_OK) == 0;
        if (!there && i == 1) { // a model may be spread over several files
            strcat(path, ".index.json");
            there = access(path, F_OK) == 0;
        }
        if (!there) {
            return 0;
        }
    }
    return 1;
}

// Where out/latest leads to, a link or a text file. Returns 0 where there is no such thing, and then path is out/latest.
int find_latest(const char *out, char path[4096]) {
    char name[256] = "";
    struct stat info;
    snprintf(path, 4096, "%s/latest", out);
    if (stat(path, &info) != 0) {
        return 0;
    }
    if (!S_ISREG(info.st_mode)) {
        return 1;
    }
    FILE *file = fopen(path, "r");
    if (file && fgets(name, sizeof(name), file)) {
        name[strcspn(name, "\r\n")] = 0;
    }
    if (file) {
        fclose(file);
    }
    if (checkpoint_step(name) < 0) {
        return 0;
    }
    snprintf(path, 4096, "%s/%s", out, name);
    return 1;
}

// The checkpoint of a run directory that counts: where `latest` leads to, else the newest whole one, and a line says so.
// Puts its folder into path and returns 1; 0 where there is none. moments: as in is_whole().
int find_checkpoint(const char *out, int moments, char path[4096]) {
    char newest[4096], each[4096];
    long best = -1;
    int linked = find_latest(out, path);
    if (linked && is_whole(path, moments)) {
        return 1;
    }
    DIR *folder = opendir(out);
    for (struct dirent *entry; folder && (entry = next_entry(folder, out)) != NULL;) {
        long step = checkpoint_step(entry->d_name);
        snprintf(each, sizeof(each), "%.3800s/%.200s", out, entry->d_name);
        if (step > best && is_whole(each, moments)) {
            best = step;
            snprintf(newest, sizeof(newest), "%s", each);
        }
    }
    if (folder) {
        closedir(folder);
    }
    if (best >= 0) {
        if (program_rank == 0) {
            fprintf(stderr, "%s: %s/latest does not lead to a whole checkpoint; %s is taken, the newest whole one\n",
                    program_name, out, newest);
        }
        snprintf(path, 4096, "%s", newest);
        return 1;
    }

    // What is missing in the only one there is will be named by who reads it.
    snprintf(each, sizeof(each), "%.4000s/config.json", path);
    return linked && access(each, F_OK) == 0;
}
