// What the name of a file says of it: is it for training, or for validation?
// Gives: TRAINING, VALIDATION, name_role, file_role. Needs: dev/util.h.
// Whole words decide, and a word is a run of letters: train_000000.bin is for training and
// my-text.valid.txt for validation. "pretrain" and "medieval" are other words, so pretrain_val_0.bin is
// for validation only.
#pragma once
#include "../dev/util.h"
#include <strings.h>

enum { TRAINING = 1, VALIDATION = 2 };

// Is c in a word? A byte beyond ASCII is part of a letter.
int is_word_letter(char c) {
    return isalpha((unsigned char)c) || (unsigned char)c >= 0x80;
}

// TRAINING, VALIDATION, 0 (the name says neither) or both, by the last part of a path.
int name_role(const char *path) {
    static const struct {
        const char *word;
        int role;
    } words[] = {{"train", TRAINING},   {"training", TRAINING},     {"val", VALIDATION},
                 {"valid", VALIDATION}, {"validation", VALIDATION}, {"eval", VALIDATION}};
    const char *slash = strrchr(path, '/');
    const char *s = slash ? slash + 1 : path;
    int role = 0;
    while (*s) {
        size_t n = 0;
        while (is_word_letter(s[n])) {
            n++;
        }
        for (int i = 0; i < COUNT(words); i++) {
            if (strlen(words[i].word) == n && strncasecmp(s, words[i].word, n) == 0) {
                role |= words[i].role;
            }
        }
        s += n ? n : 1;
    }
    return role;
}

// The same, but a name that says both ends the program.
int file_role(const char *path) {
    int role = name_role(path);
    if (role == (TRAINING | VALIDATION)) {
        fail("%s: the name has a word for training and one for validation; give the file a name with one of "
             "them",
             path);
    }
    return role;
}
