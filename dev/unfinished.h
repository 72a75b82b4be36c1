// A folder that a task makes beside the place it writes to: nothing has its name before it is whole.
// Gives: without_slashes, begin_unfinished, end_unfinished. Needs: dev/util.h.
//
// For PLACE it is called PLACE.unfinished. A program that was killed leaves it there, and the next one removes it. Two that write to
// one place at the same time must not: the second would remove what the first is writing, and the first would give the name to
// what the second has only begun. So the one that writes holds a lock on the folder, which ends with its process.
#pragma once
#include "util.h"

int unfinished_lock = -1; // the open folder

// Copies a path to place, without the slashes at its end.
void without_slashes(char place[4096], const char *path) {
    size_t length = strlen(path);
    while (length > 1 && path[length - 1] == '/') {
        length--;
    }
    if (length + sizeof(".unfinished") > 4096) {
        fail("%s: the name is too long", path);
    }
    memcpy(place, path, length);
    place[length] = 0;
}

// Opens a folder and locks it. Ends the program where another process has it; returns -1 where it is not there. A file system
// without locks is taken as it is.
int lock_folder(const char *folder, const char *place) {
    struct stat opened, named;
    int file = open(folder, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (file < 0 && errno == ENOENT) {
        return -1;
    }
    if (file < 0) {
        fail("%s: cannot open: %s; %s is made in a folder of that name", folder, strerror(errno), place);
    }
    int locked = flock(file, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK;

    // The folder may have been removed, and made again, since it was opened.
    int same = fstat(file, &opened) == 0 && stat(folder, &named) == 0 && opened.st_ino == named.st_ino;
    if (!locked || !same) {
        fail("%s: another process is writing it at this moment (in %s)", place, folder);
    }
    return file;
}

// Ends the program where a folder has other things than a killed program leaves: then it is the user's.
void check_left(const char *folder) {
    static const char *const names[] = {"model.gguf", "model.safetensors", "config.json", "tokenizer.json", "checksums.json",
                                        "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
                                        "chat_template.jinja", NULL};
    DIR *list = find_folder(folder);
    const char *name;
    while (list && (name = next_name(list, folder)) != NULL) {
        int known = 0;
        for (int i = 0; names[i]; i++) {
            known |= !strcmp(names[i], name);
        }
        if (!known) {
            fail("%s: it is needed for what is not finished, and has %s, which this program did not leave there; rename that folder",
                 folder, name);
        }
    }
    if (list) {
        closedir(list);
    }
}

// Makes the folder for `place`, and writes its name to unfinished_path, so that fail() removes it.
void begin_unfinished(const char *place) {
    char folder[4096];
    if (snprintf(folder, sizeof(folder), "%s.unfinished", place) >= (int)sizeof(folder)) {
        fail("%s: the name is too long", place);
    }
    int left = lock_folder(folder, place); // by a program that was killed
    if (is_there(place)) {
        fail("%s: there is something of that name already; remove it, or give another name", place);
    }
    if (left >= 0) {
        check_left(folder);
    }
    if (left >= 0 && remove_tree(folder) != 0) {
        fail("%s: cannot remove what a program that was killed has left: %s", folder, strerror(errno));
    }
    if (mkdir(folder, 0777) != 0) {
        fail("%s: cannot create: %s", folder, strerror(errno));
    }
    unfinished_lock = lock_folder(folder, place);
    if (left >= 0) {
        close(left);
    }
    if (unfinished_lock < 0) {
        fail("%s: another process has removed it", folder);
    }
    snprintf(unfinished_path, sizeof(unfinished_path), "%s", folder);
}

// The folder, or what was in it, has its name now.
void end_unfinished(void) {
    unfinished_path[0] = 0;
    close(unfinished_lock);
    unfinished_lock = -1;
}
