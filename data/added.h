// Added tokens, such as <|endoftext|>: texts that are one token whatever stands around them.
// Gives: Added, AddedList, added_put, added_sort, next_added, added_free. Needs: data/containers.h, and data/split.h for
// white space.
// Where several begin at the same place, the longest one counts. With lstrip or rstrip the white space on that
// side belongs to the token, too.
#pragma once
#include "containers.h"
#include "split.h"

typedef struct Added {
    char *text; // of `length` bytes, with a NUL behind them
    size_t length;
    int id;
    int lstrip, rstrip;
} Added;

typedef struct AddedList {
    Added *list; // (count): in order of their first byte, those of the same one by length, the longest first
    int count;
    int *begin;                 // (257): those that begin with byte b are begin[b] .. begin[b + 1] - 1
    unsigned char (*second)[32]; // (256): for each first byte, one bit for each second byte that a token has behind it
} AddedList;

int compare_added(const void *a, const void *b) {
    const Added *x = (const Added *)a, *y = (const Added *)b;
    int first = (unsigned char)x->text[0] - (unsigned char)y->text[0];
    if (first) {
        return first;
    }
    if (x->length != y->length) {
        return x->length > y->length ? -1 : 1;
    }
    return memcmp(x->text, y->text, x->length);
}

void added_put(AddedList *a, const char *text, size_t length, int id, int lstrip, int rstrip) {
    Added added = {(char *)allocate(length + 1, 1), length, id, lstrip, rstrip};
    memcpy(added.text, text, length);
    a->list = (Added *)grow(a->list, (size_t)a->count, sizeof(Added));
    a->list[a->count++] = added;
}

// Prepares a finished list for next_added.
void added_sort(AddedList *a) {
    a->begin = (int *)allocate(257, sizeof(int));
    a->second = (unsigned char(*)[32])allocate(256, sizeof(*a->second));
    if (a->count) {
        qsort(a->list, (size_t)a->count, sizeof(Added), compare_added);
    }
    for (int i = 0; i < a->count; i++) {
        const Added *t = &a->list[i];
        unsigned char first = (unsigned char)t->text[0], second = (unsigned char)t->text[1];
        a->begin[first + 1] = i + 1;
        if (t->length == 1) {
            memset(a->second[first], 255, 32);
        }
        a->second[first][second / 8] |= (unsigned char)(1 << second % 8);
    }
    for (int b = 0; b < 256; b++) {
        a->begin[b + 1] = max_int(a->begin[b + 1], a->begin[b]);
    }
}

// The longest token that s (n >= 1 bytes) begins with, or NULL.
const Added *added_here(const AddedList *a, const char *s, size_t n) {
    unsigned char first = (unsigned char)s[0];
    for (int i = a->begin[first]; i < a->begin[first + 1]; i++) {
        const Added *t = &a->list[i];
        if (t->length <= n && memcmp(t->text, s, t->length) == 0) {
            return t;
        }
    }
    return NULL;
}

// The first token in s (n bytes) from byte `from` on, and the longest there; NULL if there is none. *at is where it begins.
const Added *next_added(const AddedList *a, const char *s, size_t n, size_t from, size_t *at) {
    for (size_t i = from; a->count && i < n; i++) {
        // One look at two bytes tells almost anywhere that no token begins here.
        unsigned char first = (unsigned char)s[i], second = i + 1 < n ? (unsigned char)s[i + 1] : 0;
        int may = a->second[first][second / 8] >> second % 8 & 1;
        const Added *t = may ? added_here(a, s + i, n - i) : NULL;
        if (t) {
            *at = i;
            return t;
        }
    }
    return NULL;
}

// Where the white space begins that s[0 .. end) ends with, not before `from`.
size_t space_before(const unsigned char *class_of, const char *s, size_t from, size_t end) {
    size_t bytes;
    while (end > from) {
        size_t i = end - 1;
        while (i > from && ((unsigned char)s[i] & 0xc0) == 0x80) { // back to the character's first byte
            i--;
        }
        if (character_class(class_of, s + i, end - i, &bytes) != SPACE || i + bytes != end) {
            break;
        }
        end = i;
    }
    return end;
}

// Where the white space ends that s[at .. n) begins with.
size_t space_behind(const unsigned char *class_of, const char *s, size_t n, size_t at) {
    size_t last;
    return at + run_length(class_of, s + at, n - at, SPACE, INT32_MAX, &last);
}

void added_free(AddedList *a) {
    for (int i = 0; i < a->count; i++) {
        free(a->list[i].text);
    }
    free(a->list);
    free(a->begin);
    free(a->second);
}
