// Cleaning of texts: repairs the flaws of collections from the web, such as TinyStories.
// Gives: clean_text, ends_well, and what it counts for the user. Needs: data/json.h (UTF-8).
#pragma once
#include "json.h"

enum { MOJIBAKE, CONTROLS, STRAYS, BLANKS, EMPTY, CUT_OFF, TALLIES }; // counted for the user
static const char *const tally_names[TALLIES] = {"characters of mojibake repaired",
                                                 "carriage returns and NULs removed",
                                                 "stray pieces of separators removed",
                                                 "superfluous blanks and blank lines removed",
                                                 "empty documents dropped",
                                                 "truncated documents dropped"};

// The characters that Windows-1252 has for the bytes 0x80 to 0x9f.
static const int32_t windows_1252[32] = {
    0x20ac, 0x81,   0x201a, 0x192,  0x201e, 0x2026, 0x2020, 0x2021, 0x2c6,  0x2030, 0x160,
    0x2039, 0x152,  0x8d,   0x17d,  0x8f,   0x90,   0x2018, 0x2019, 0x201c, 0x201d, 0x2022,
    0x2013, 0x2014, 0x2dc,  0x2122, 0x161,  0x203a, 0x153,  0x9d,   0x17e,  0x178};

// Mojibake is UTF-8 that was read as Windows-1252 and written as UTF-8 once more, so that ’ became
// â€™. If s (n bytes) begins with such characters, puts the right one into out (4), its length into
// *length, and returns how many bytes of s it replaces, else 0. Only characters that English text
// has are repaired: Latin-1 letters, punctuation, emoji.
static size_t repair_mojibake(const char *s, size_t n, char *out, int *length) {
    size_t used[5] = {0}; // used[k]: bytes of s in its first k characters
    int32_t code;
    int have = 0;

    // Turn up to four characters back into the bytes that Windows-1252 read.
    while (have < 4 && used[have] < n) {
        used[have + 1] = used[have] + (size_t)utf8_decode(s + used[have], n - used[have], &code);
        int byte = code >= 0x80 && code <= 0xff ? (int)code : -1;
        for (int i = 0; i < 32; i++) {
            if (windows_1252[i] == code) {
                byte = 0x80 + i;
            }
        }
        if (byte < 0) {
            break;
        }
        out[have++] = (char)byte;
    }

    // Do these bytes begin with one character of UTF-8, of a kind that English text has?
    if (have < 2 || !strchr("\xc2\xc3\xe2\xef\xf0", out[0])) {
        return 0;
    }
    *length = utf8_decode(out, (size_t)have, &code);
    if (code >= 0xa0) {
        return used[*length];
    }

    // â€ alone was ”, since Windows-1252 does not have the last of its bytes.
    if (memcmp(out, "\xe2\x80", 2) != 0) {
        return 0;
    }
    memcpy(out, "\xe2\x80\x9d", 3);
    *length = 3;
    return used[2];
}

// Repairs all mojibake in the n bytes at s and counts it; returns how many bytes are left.
static size_t repair_text(char *s, size_t n, int *repaired) {
    int found;

    // Some texts were mangled twice, so look again until nothing is found.
    do {
        size_t end = 0, i = 0;
        found = 0;
        while (i < n) {
            char right[4];
            int length = 0;
            size_t used = 0;
            if ((unsigned char)s[i] >= 0xc2) {
                used = repair_mojibake(s + i, n - i, right, &length);
            }
            if (used) {
                memcpy(s + end, right, (size_t)length);
                end += (size_t)length;
                i += used;
                found++;
            } else {
                s[end++] = s[i++];
            }
        }
        n = end;
        *repaired += found;
    } while (found);
    return n;
}

// Cleans the n bytes at s and counts in tally (TALLIES); returns how many bytes are left.
static size_t clean_text(char *s, size_t n, int *tally) {
    size_t end = 0, i = 0;
    n = repair_text(s, n, &tally[MOJIBAKE]);
    while (i < n) {
        char c = s[i++];

        // A separator that has lost signs separates nothing: drop it with its remaining < | and >.
        if (c == 'e' && n - i >= 8 && memcmp(s + i, "ndoftext", 8) == 0) {
            while (end > 0 && (s[end - 1] == '|' || s[end - 1] == '<')) {
                end--;
            }
            i += 8;
            while (i < n && (s[i] == '|' || s[i] == '>')) {
                i++;
            }
            tally[STRAYS]++;
            continue;
        }

        // A carriage return becomes a newline, unless one follows anyway; a NUL goes.
        if (c == '\r' || c == 0) {
            tally[CONTROLS]++;
            if (c == 0 || (i < n && s[i] == '\n')) {
                continue;
            }
            c = '\n';
        }

        // A line ends without blanks, and one empty line in a row is enough.
        if (c == '\n') {
            size_t before = end;
            while (end > 0 && (s[end - 1] == ' ' || s[end - 1] == '\t')) {
                end--;
            }
            int drop = end > 1 && s[end - 1] == '\n' && s[end - 2] == '\n';
            tally[BLANKS] += drop || end < before;
            if (drop) {
                continue;
            }
        }
        s[end++] = c;
    }
    return end;
}

// Does a story end properly: with a full stop or the like, a quotation mark, or "The End"?
static int ends_well(const char *s, size_t n) {
    static const char *const endings[] = {"\xe2\x80\x9d", "\xe2\x80\x99", "\xe2\x80\xa6",
                                          "The End",      "The end",      "THE END"};
    if (n > 0 && memchr(".!?\"')*~", s[n - 1], 8)) {
        return 1;
    }
    for (size_t i = 0; i < sizeof(endings) / sizeof(endings[0]); i++) {
        size_t length = strlen(endings[i]);
        if (n >= length && memcmp(s + n - length, endings[i], length) == 0) {
            return 1;
        }
    }
    return 0;
}
