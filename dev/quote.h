// A word as a shell takes it, for commands that are printed to be typed again.
// Gives: quote_for_shell. Needs: dev/util.h.
//
// Plain words stay as they are; others stand in single quotes, and those with control characters in bash's $'...'.
#pragma once
#include "util.h"

// The word as one types it, in memory to be freed.
char *quote_for_shell(const char *word) {
    static const char *const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_@%+=:,./-";
    if (*word && *word != '=' && !word[strspn(word, plain)]) {
        return copy_text(word);
    }
    int control = 0;
    for (const char *c = word; *c; c++) {
        control |= iscntrl((unsigned char)*c) != 0;
    }
    char *quoted = NULL;
    size_t size;
    FILE *text = open_memory(&quoted, &size);
    fprintf(text, control ? "$'" : "'");
    for (const char *c = word; *c; c++) {
        if (control && iscntrl((unsigned char)*c)) {
            fprintf(text, "\\%03o", (unsigned char)*c);
        } else if (control && (*c == '\'' || *c == '\\')) {
            fprintf(text, "\\%c", *c);
        } else if (*c == '\'') { // ends the quotes, gives one, and begins them again
            fprintf(text, "'\\''");
        } else {
            fputc(*c, text);
        }
    }
    fprintf(text, "'");
    close_memory(text, &quoted);
    return quoted;
}
