// The run directory: which checkpoints are there, which of them a run goes on from, and what its file system can do.
// Gives: checkpoint_step, smallest_checkpoint, find_checkpoint, find_latest, stat_latest, model_directory, lock_run,
// has_links, remove_leftovers. Needs: dev/util.h; keep_text of dev/options.h.
//
// In it lie log.jsonl, the folders checkpoint-STEP, and `latest`, a symbolic link to the newest of them. Where the file
// system has no links, `latest` is a small text file with the folder's name.
#pragma once
#include "util.h"

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
    DIR *folder = find_folder(out);
    const char *name;
    *count = 0;
    while (folder && (name = next_name(folder, out)) != NULL) {
        long step = checkpoint_step(name);
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
    for (int i = 0; i < (moments ? 4 : 2); i++) {
        int spread = i == 1 && has_file(dir, "model.safetensors.index.json"); // over several files
        spread |= i == 1 && has_file(dir, "adapter_model.safetensors");       // beside a base (dev/adapter.h)
        if (!spread && !has_file(dir, names[i])) {
            return 0;
        }
    }
    return 1;
}

// Where out/latest leads to, a link or a text file: the folder itself, since `latest` may point elsewhere a moment later.
// Returns 0 where it leads nowhere, and then path is out/latest.
int find_latest(const char *out, char path[4096]) {
    char name[256] = "";
    struct stat info;
    snprintf(path, 4096, "%s/latest", out);
    if (stat(path, &info) != 0) {
        return not_there(path);
    }
    if (S_ISREG(info.st_mode)) {
        FILE *file = fopen(path, "r");
        if (!file) {
            fail("%s: cannot open: %s", path, strerror(errno));
        }
        if (fgets(name, sizeof(name), file)) {
            name[strcspn(name, "\r\n")] = 0;
        }
        fclose(file);
    } else {
        ssize_t n = readlink(path, name, sizeof(name) - 1);
        name[n > 0 ? n : 0] = 0;
    }
    if (checkpoint_step(name) < 0) { // a link to another place, a folder, or a text that says nothing
        return S_ISDIR(info.st_mode);
    }
    snprintf(path, 4096, "%s/%s", out, name);
    return 1;
}

// Puts the newest whole checkpoint in out into path, and returns 1; 0 where there is none. moments: as in is_whole().
int newest_whole(const char *out, int moments, char path[4096]) {
    char each[4096];
    long newest = -1;
    DIR *folder = find_folder(out);
    const char *name;
    while (folder && (name = next_name(folder, out)) != NULL) {
        long step = checkpoint_step(name);
        snprintf(each, sizeof(each), "%.3800s/%.200s", out, name);
        if (step > newest && is_whole(each, moments)) {
            newest = step;
        }
    }
    if (folder) {
        closedir(folder);
    }
    if (newest >= 0) {
        snprintf(path, 4096, "%.3800s/checkpoint-%ld", out, newest);
    }
    return newest >= 0;
}

// The checkpoint of a run directory that counts: where `latest` leads to, else the newest whole one, and a line says so.
// Puts its folder into path and returns 1; 0 where there is none. moments: as in is_whole().
int find_checkpoint(const char *out, int moments, char path[4096]) {
    char newest[4096];
    int linked = find_latest(out, path);
    if (linked && is_whole(path, moments)) {
        return 1;
    }
    if (newest_whole(out, moments, newest)) {
        remark("%s/latest does not lead to a whole checkpoint; %s is taken, the newest whole one", out, newest);
        snprintf(path, 4096, "%s", newest);
        return 1;
    }

    // What the only one lacks is named by the function that opens it.
    return linked && has_file(path, "config.json");
}

// What tells when something was saved in out last: `latest`, or where it is missing the newest checkpoint. Returns 0
// where there is neither.
int stat_latest(const char *out, struct stat *info) {
    char path[4096];
    snprintf(path, sizeof(path), "%.4000s/latest", out);
    if (lstat(path, info) == 0) {
        return 1;
    }
    not_there(path);
    return newest_whole(out, 0, path) && stat(path, info) == 0;
}

// The directory of the model that --init names: a checkpoint, the newest checkpoint of a run, or another maker's model.
// Where it names none of these, the program ends and says what it found.
const char *model_directory(const char *name) {
    char path[4096];
    struct stat info;
    const char *slash = strchr(name, '/');
    int found = stat(name, &info) == 0 || not_there(name);
    if (!found && slash && slash != name && name[0] != '.' && slash[1] && !strchr(slash + 1, '/')) {
        fail("%s: there is no such folder. If it is a model's name on Hugging Face's hub: this program downloads "
             "nothing; run `hf download %s --local-dir DIR` and give --init DIR",
             name, name);
    }
    if (!found) {
        fail("%s: there is no such folder; --init takes the folder of a checkpoint, of a run, or of a Hugging Face model",
             name);
    }
    if (!S_ISDIR(info.st_mode)) {
        fail("%s: a file; give the folder that holds config.json and model.safetensors", name);
    }
    int is_model = has_file(name, "config.json"), is_run = !is_model && find_checkpoint(name, 0, path);
    if (has_file(name, "adapter_config.json") || has_file(name, "adapter_model.safetensors") ||
        (is_run && has_file(path, "adapter_config.json"))) {
        fail("%s: an adapter (adapter_config.json), which is only a change of another model; merge the two (of a run of "
             "this program, --out %s --merge DIR; else merge_and_unload and save_pretrained of Python's peft) and give the "
             "folder of the whole model",
             name, name);
    }
    if (is_model || is_run) {
        return is_model ? name : keep_text(path);
    }
    fail("%s: neither config.json nor latest/config.json is there: neither a model nor a run that has saved one", name);
}

// ---- what the file system of a run directory can do, found out before the first step

// Keeps other processes out of the run whose log is this file. Returns 0 where the file system has no locks, and a line
// says so.
int lock_run(int log, const char *out) {
    int failed;
    do {
        failed = flock(log, LOCK_EX | LOCK_NB);
    } while (failed && errno == EINTR);
    if (!failed) {
        return 1;
    }
    if (errno == EWOULDBLOCK) {
        fail("%s: another process trains there", out);
    }
    printf("%s: the file system has no locks there (%s), so nothing keeps a second process from training in it\n", out,
           strerror(errno));
    return 0;
}

// Can `latest` be a link? Where it cannot, a line says so. Where it cannot be a file either, the program ends.
int has_links(const char *out) {
    char path[4200];
    struct stat info;
    snprintf(path, sizeof(path), "%s/latest", out);
    if (lstat(path, &info) == 0 && S_ISDIR(info.st_mode)) {
        fail("%s: it is a folder, but must be a link to the newest checkpoint; rename the folder to checkpoint-STEP, with "
             "its step",
             path);
    }
    strcat(path, ".new");
    unlink(path);
    int links = symlink("nowhere", path) == 0, error = errno, file = -1;
    if (!links && (error == ENOMEM || error == ENOSPC || error == EIO)) { // of this moment, not of the file system
        fail("%s: cannot create: %s", path, strerror(error));
    }
    if (!links) {
        file = open(path, O_WRONLY | O_CREAT | O_EXCL, 0666);
        if (file < 0) {
            fail("%s: cannot create: %s", path, strerror(errno));
        }
        close(file);
        printf("%s: the file system has no symbolic links there (%s), so `latest` is a text file with the name of the "
               "newest checkpoint\n", out, strerror(error));
    }
    unlink(path);
    return links;
}

// Removes what a killed process left: a checkpoint that it had begun to write, or to remove.
void remove_leftovers(const char *out) {
    static const char *const names[] = {"unfinished-checkpoint", "removed-checkpoint"};
    char path[4200];
    for (int i = 0; i < COUNT(names); i++) {
        snprintf(path, sizeof(path), "%s/%s", out, names[i]);
        remove_tree(path);
    }
}
