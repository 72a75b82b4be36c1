// What a tokenizer does to a text before it is cut: Unicode's normal form C, and "▁" (U+2581) for spaces.
// Gives: Bytes, bytes_add, Nfc, nfc_load, nfc_free, nfc_text, underscore_text, UNDERSCORE.
// Needs: data/containers.h, data/json.h for UTF-8, data/nfc.h.
//
// The same letter may be written in several ways: é is one character, or e and an accent. Normal form C (Unicode
// Standard Annex 15) takes the first. A text becomes NFC in three steps:
//
//   1. Each character is decomposed as far as it goes.
//   2. The marks behind a letter are put in the order of their combining classes.
//   3. A letter and a mark that have a common character become that one, from left to right.
//
// Nearly every text is in that form already, so only what is around a suspicious character is looked at closely.
#pragma once
#include "containers.h"
#include "json.h"
#include "nfc.h"

#define UNDERSCORE "\xe2\x96\x81" // U+2581, which SentencePiece writes for a space

// Bytes that grow. All zero is none.
typedef struct Bytes {
    char *list; // (count)
    size_t count, allocated;
} Bytes;

void bytes_add(Bytes *b, const char *s, size_t n) {
    if (n > b->allocated - b->count) {
        b->allocated = 2 * b->allocated + n + 64;
        b->list = (char *)reallocate(b->list, b->allocated, 1);
    }
    if (n) {
        memcpy(b->list + b->count, s, n);
    }
    b->count += n;
}

// ---- normal form C

enum { STABLE = 0, UNSTABLE = 255 }; // of a character that is no mark: may NFC change it, or join it to the one before?

typedef struct Nfc {
    unsigned char *class_of; // (0x110000): STABLE, UNSTABLE, or the combining class of a mark
    Table parts;             // from a character, as int32_t, to 1 + its index in nfc_decompositions
    Table pairs;             // from two characters, as int32_t[2], to the one that they become
} Nfc;

// Hangul syllables follow from their numbers (The Unicode Standard, section 3.12): 19 leading consonants, 21 vowels,
// and 27 trailing consonants or none.
enum { SYLLABLES = 0xac00, LEADING = 0x1100, VOWELS = 0x1161, TRAILING = 0x11a7, VOWEL_COUNT = 21, TRAILING_COUNT = 28 };
enum { LEADING_COUNT = 19, SYLLABLE_COUNT = LEADING_COUNT * VOWEL_COUNT * TRAILING_COUNT };

Nfc *nfc_load(void) {
    Nfc *f = (Nfc *)allocate(1, sizeof(Nfc));
    f->class_of = (unsigned char *)allocate(0x110000, 1);
    memset(f->class_of + VOWELS, UNSTABLE, VOWEL_COUNT);
    memset(f->class_of + TRAILING + 1, UNSTABLE, TRAILING_COUNT - 1);
    for (int i = 0; i < COUNT(nfc_decompositions); i += 3) {
        const int32_t *d = &nfc_decompositions[i];
        *table_put(&f->parts, &d[0], sizeof(int32_t)) = i + 1;
        if (d[2] > 0) {
            *table_put(&f->pairs, &d[1], 2 * sizeof(int32_t)) = d[0];
            f->class_of[d[2]] = UNSTABLE;
        } else {
            f->class_of[d[0]] = UNSTABLE;
        }
    }
    for (int i = 0; i < COUNT(nfc_classes); i += 3) {
        const int32_t *r = &nfc_classes[i];
        memset(f->class_of + r[0], r[2], (size_t)(r[1] - r[0] + 1));
    }
    return f;
}

void nfc_free(Nfc *f) {
    if (f) {
        free(f->class_of);
        table_free(&f->parts);
        table_free(&f->pairs);
        free(f);
    }
}

typedef struct Character {
    int32_t code; // a byte b that is no UTF-8 is -1 - b
    int order;    // its combining class, 0 for a letter
    size_t index; // where it was before it was sorted
} Character;

typedef struct Characters {
    Character *list; // (count)
    size_t count;
} Characters;

// Step 1: adds a character, decomposed as far as it goes.
void add_decomposed(const Nfc *f, Characters *to, int32_t code) {
    int syllable = code - SYLLABLES;
    if (syllable >= 0 && syllable < SYLLABLE_COUNT) {
        add_decomposed(f, to, LEADING + syllable / (VOWEL_COUNT * TRAILING_COUNT));
        add_decomposed(f, to, VOWELS + syllable / TRAILING_COUNT % VOWEL_COUNT);
        if (syllable % TRAILING_COUNT) {
            add_decomposed(f, to, TRAILING + syllable % TRAILING_COUNT);
        }
        return;
    }
    int64_t found = code < 0xc0 ? 0 : table_get(&f->parts, &code, sizeof(code));
    if (found) {
        int32_t second = nfc_decompositions[found + 1];
        add_decomposed(f, to, nfc_decompositions[found]);
        if (second) {
            add_decomposed(f, to, second < 0 ? -second : second);
        }
        return;
    }
    int order = code < 0 ? 0 : f->class_of[code];
    Character c = {code, order == UNSTABLE ? 0 : order, to->count};
    to->list = (Character *)grow(to->list, to->count, sizeof(Character));
    to->list[to->count++] = c;
}

int compare_marks(const void *a, const void *b) {
    const Character *x = (const Character *)a, *y = (const Character *)b;
    if (x->order != y->order) {
        return x->order < y->order ? -1 : 1;
    }
    return x->index < y->index ? -1 : x->index > y->index;
}

// Step 2: sorts the marks of each run.
void sort_marks(Characters *c) {
    for (size_t i = 0; i < c->count;) {
        size_t end = i;
        while (end < c->count && c->list[end].order) {
            end++;
        }
        if (end > i + 1) {
            qsort(c->list + i, end - i, sizeof(Character), compare_marks);
        }
        i = end > i ? end : i + 1;
    }
}

// The character that two become, or 0.
int32_t composed(const Nfc *f, int32_t first, int32_t second) {
    int syllable = first - SYLLABLES, leading = first - LEADING, vowel = second - VOWELS, trailing = second - TRAILING;
    if (leading >= 0 && leading < LEADING_COUNT && vowel >= 0 && vowel < VOWEL_COUNT) {
        return SYLLABLES + (leading * VOWEL_COUNT + vowel) * TRAILING_COUNT;
    }
    int is_open = syllable >= 0 && syllable < SYLLABLE_COUNT && syllable % TRAILING_COUNT == 0;
    if (is_open && trailing > 0 && trailing < TRAILING_COUNT) {
        return first + trailing;
    }
    const int32_t pair[2] = {first, second};
    return (int32_t)table_get(&f->pairs, pair, sizeof(pair));
}

// Step 3. A mark joins the letter before it unless a mark in between has its class or a higher one.
void compose(const Nfc *f, Characters *c) {
    size_t count = 0, letter = 0;
    int last = -1, has_letter = 0; // last: class of the mark between the letter and this one; -1: there is none
    for (size_t i = 0; i < c->count; i++) {
        Character now = c->list[i];
        int32_t both = has_letter && last < now.order ? composed(f, c->list[letter].code, now.code) : 0;
        if (both) {
            c->list[letter].code = both;
            continue;
        }
        last = now.order;
        if (now.order == 0) {
            letter = count;
            has_letter = 1;
            last = -1;
        }
        c->list[count++] = now;
    }
    c->count = count;
}

// Adds NFC of n bytes that begin and end where characters do not influence each other.
void add_composed(const Nfc *f, Bytes *out, Characters *c, const char *s, size_t n) {
    c->count = 0;
    for (size_t i = 0; i < n;) {
        int32_t code;
        int length = utf8_decode(s + i, n - i, &code);
        add_decomposed(f, c, code < 0 ? -1 - (unsigned char)s[i] : code);
        i += (size_t)length;
    }
    sort_marks(c);
    compose(f, c);
    for (size_t i = 0; i < c->count; i++) {
        char bytes[4], *end = bytes;
        if (c->list[i].code < 0) {
            *end++ = (char)(-1 - c->list[i].code);
        } else {
            end = utf8_encode(end, c->list[i].code);
        }
        bytes_add(out, bytes, (size_t)(end - bytes));
    }
}

// Sets `out` to NFC of s (n bytes). Returns 0, and leaves `out` as it was, where s is that already.
int nfc_text(const Nfc *f, Bytes *out, const char *s, size_t n) {
    Characters list = {NULL, 0};
    size_t done = 0, letter = 0, i = 0; // bytes that are in out; where the last stable character begins
    while (i < n) {
        int32_t code = (unsigned char)s[i];
        size_t length = code < 0x80 ? 1 : (size_t)utf8_decode(s + i, n - i, &code);
        if (code < 0x300 || f->class_of[code] == STABLE) { // no character below U+0300 is a mark or changes
            letter = i;
            i += length;
            continue;
        }

        // From the stable character before it to the next one behind it, all depend on each other.
        if (!done) {
            out->count = 0;
        }
        bytes_add(out, s + done, letter - done);
        while (i < n && code >= 0 && f->class_of[code] != STABLE) {
            i += length;
            if (i < n) {
                length = (size_t)utf8_decode(s + i, n - i, &code);
            }
        }
        add_composed(f, out, &list, s + letter, i - letter);
        done = i;
        letter = i;
    }
    if (done) {
        bytes_add(out, s + done, n - done);
    }
    free(list.list);
    return done > 0;
}

// ---- "▁"

// Adds s (n bytes) to `out`, with "▁" for each space if `replace`, and one before all if `prepend`.
void underscore_text(Bytes *out, const char *s, size_t n, int replace, int prepend) {
    const char *end = s + n;
    bytes_add(out, UNDERSCORE, prepend ? 3 : 0);
    while (s < end) {
        const char *space = replace ? (const char *)memchr(s, ' ', (size_t)(end - s)) : NULL;
        const char *stop = space ? space : end;
        bytes_add(out, s, (size_t)(stop - s));
        bytes_add(out, UNDERSCORE, space ? 3 : 0);
        s = space ? space + 1 : end;
    }
}
