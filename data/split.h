// Cutting text into words, so that no token spans two of them: each tokenizer has its own rule.
// Gives: character_classes, first_word (GPT-2's rule), Cut, cut_of_pattern, next_piece.
// Needs: data/json.h for UTF-8, data/unicode.h.
// A tokenizer.json writes such a rule as a regular expression. Each expression that is known here has a function
// that finds the same words by looking at each character once; the table is in cut_of_pattern.
#pragma once
#include "json.h"
#include "unicode.h"

enum { OTHER, LETTER, NUMBER, SPACE }; // classes of characters

// Gives class `kind` to the characters of `ranges` (`size` bytes): first and last of each range.
void mark_characters(unsigned char *class_of, const int32_t *ranges, size_t size, int kind) {
    for (size_t i = 0; i < size / sizeof(int32_t); i += 2) {
        memset(class_of + ranges[i], kind, (size_t)(ranges[i + 1] - ranges[i] + 1));
    }
}

// The class of every code point, (0x110000), to be freed.
unsigned char *character_classes(void) {
    unsigned char *class_of = (unsigned char *)allocate(0x110000, 1);
    mark_characters(class_of, unicode_letters, sizeof(unicode_letters), LETTER);
    mark_characters(class_of, unicode_numbers, sizeof(unicode_numbers), NUMBER);
    mark_characters(class_of, unicode_spaces, sizeof(unicode_spaces), SPACE);
    return class_of;
}

// The class of the character at s, where n bytes are left; *bytes is its length. A byte that is not
// UTF-8 is a character of class OTHER.
int character_class(const unsigned char *class_of, const char *s, size_t n, size_t *bytes) {
    int32_t code = (unsigned char)*s;
    *bytes = code < 0x80 ? 1 : (size_t)utf8_decode(s, n, &code);
    return code < 0 ? (int)OTHER : class_of[code];
}

// The length in bytes of the run of characters of class `kind` that s (n bytes) begins with, of at most `most`
// characters. *last is where its last character begins.
size_t run_length(const unsigned char *class_of, const char *s, size_t n, int kind, int most, size_t *last) {
    size_t i = 0, bytes;
    *last = 0;
    for (int count = 0; count < most && i < n && character_class(class_of, s + i, n - i, &bytes) == kind; count++) {
        *last = i;
        i += bytes;
    }
    return i;
}

// The length in bytes of the first word of s (n >= 1 bytes), by GPT-2's regular expression:
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// A word is an English contraction, or a run of letters, of numbers or of other signs, each with
// one space before it if there is one; or a run of white space, but its last character is left to
// the word behind it.
size_t first_word(const unsigned char *class_of, const char *s, size_t n) {
    if (s[0] == '\'' && n > 1) {
        char a = s[1];
        char b = n > 2 ? s[2] : ' ';
        if (a == 's' || a == 't' || a == 'm' || a == 'd') {
            return 2;
        }
        if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) {
            return 3;
        }
    }

    // The run's class is that of the first character, or of the second one behind a space.
    size_t i = s[0] == ' ' && n > 1;
    size_t bytes;
    int kind = character_class(class_of, s + i, n - i, &bytes);
    if (kind == SPACE) {
        i = 0;
    }

    // The run ends before the first character of another class.
    size_t last = 0; // where the run's last character begins
    while (i < n && character_class(class_of, s + i, n - i, &bytes) == kind) {
        last = i;
        i += bytes;
    }
    int leave_last = kind == SPACE && i < n && last > 0;
    return leave_last ? last : i;
}

// The length of 's, 't, 're, 've, 'm, 'll or 'd in letters of either case at the beginning of s, or 0. By Unicode the
// long s (U+017F) is an s, too.
size_t contraction_length(const char *s, size_t n) {
    if (n < 2 || s[0] != '\'') {
        return 0;
    }
    int a = tolower((unsigned char)s[1]);
    int b = n > 2 ? tolower((unsigned char)s[2]) : ' ';
    if (a == 's' || a == 't' || a == 'm' || a == 'd') {
        return 2;
    }
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) {
        return 3;
    }
    return n > 2 && !memcmp(s + 1, "\xc5\xbf", 2) ? 3 : 0;
}

// White space at the beginning of s. Where it has line breaks, a word ends behind the last of them; otherwise its
// last character is left to the word behind it.
size_t space_length(const unsigned char *class_of, const char *s, size_t n) {
    size_t last, run = run_length(class_of, s, n, SPACE, INT32_MAX, &last);
    for (size_t i = run; i > 0; i--) {
        if (s[i - 1] == '\n' || s[i - 1] == '\r') {
            return i;
        }
    }
    return run < n && last > 0 ? last : run;
}

// The length of the first word by GPT-4's expression, which Llama 3 (digits 3) and Qwen (digits 1) have as
//   (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
// A word is a contraction; letters, with any one sign before them; one to three digits; signs, with a space before
// and line breaks behind them; or white space.
size_t gpt4_word(const unsigned char *class_of, const char *s, size_t n, int digits) {
    size_t last, bytes, length = contraction_length(s, n);
    if (length) {
        return length;
    }

    // Letters, where one sign before them may be anything but a line break or a digit.
    int kind = character_class(class_of, s, n, &bytes);
    size_t before = kind == LETTER ? 0 : bytes;
    if (kind != NUMBER && s[0] != '\n' && s[0] != '\r') {
        length = run_length(class_of, s + before, n - before, LETTER, INT32_MAX, &last);
    }
    if (length) {
        return before + length;
    }
    if (kind == NUMBER) {
        return run_length(class_of, s, n, NUMBER, digits, &last);
    }

    // Other signs, with a space before them if there is one.
    before = s[0] == ' ';
    length = run_length(class_of, s + before, n - before, OTHER, INT32_MAX, &last);
    if (!length) {
        return space_length(class_of, s, n);
    }
    length += before;
    while (length < n && (s[length] == '\n' || s[length] == '\r')) {
        length++;
    }
    return length;
}

// Is the character at s a number? The step Digits takes thirteen of Unicode 17 for numbers, too, which the tables behind
// the regular expressions do not have yet.
int is_number(const unsigned char *class_of, const char *s, size_t n, size_t *bytes) {
    int32_t code;
    if (character_class(class_of, s, n, bytes) == NUMBER) {
        return 1;
    }
    if (*bytes < 4) {
        return 0;
    }
    utf8_decode(s, n, &code);
    return (code >= 0x11de0 && code <= 0x11de9) || (code >= 0x16ff4 && code <= 0x16ff6);
}

// Digits, each one alone or `most` of a run together, apart from everything else.
size_t digits_apart(const unsigned char *class_of, const char *s, size_t n, int most) {
    size_t i = 0, bytes;
    int digits = is_number(class_of, s, n, &bytes);
    for (size_t count = 0; i < n && is_number(class_of, s + i, n - i, &bytes) == digits; count++) {
        if (digits && count == (size_t)most) {
            break;
        }
        i += bytes;
    }
    return i;
}

// ---- the rules by name

typedef enum Cut { CUT_NOTHING, CUT_GPT2, CUT_LLAMA3, CUT_QWEN2, CUT_DIGITS, CUT_NUMBERS, CUT_THREE_DIGITS } Cut;

// The rule that a regular expression stands for; *found tells whether it is known.
Cut cut_of_pattern(const char *pattern, int *found) {
#define CONTRACTIONS "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
#define LETTERS      "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
#define SIGNS        "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
#define SPACES       "|\\s+(?!\\S)|\\s+"
    static const struct {
        const char *pattern;
        Cut cut;
    } known[] = {
        {"'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+" SPACES, CUT_GPT2},
        {CONTRACTIONS LETTERS "|\\p{N}{1,3}" SIGNS "|\\s*[\\r\\n]+" SPACES, CUT_LLAMA3},
        {CONTRACTIONS LETTERS "|\\p{N}" SIGNS "|\\s*[\\r\\n]+" SPACES, CUT_QWEN2},
        {CONTRACTIONS LETTERS "|\\p{N}{1,3}" SIGNS "|\\s*[\\r\\n]" SPACES, CUT_LLAMA3},
        {"'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*|\\s*[\\r\\n]" SPACES,
         CUT_LLAMA3},
        {"\\p{N}{1,3}", CUT_THREE_DIGITS},
        {"\\p{N}", CUT_DIGITS},
        {"\\p{N}+", CUT_NUMBERS},
    };
#undef CONTRACTIONS
#undef LETTERS
#undef SIGNS
#undef SPACES
    for (int i = 0; i < COUNT(known); i++) {
        if (strcmp(known[i].pattern, pattern) == 0) {
            *found = 1;
            return known[i].cut;
        }
    }
    *found = 0;
    return CUT_NOTHING;
}

// The length in bytes of the first piece of s (n >= 1 bytes) by a rule.
size_t next_piece(const unsigned char *class_of, Cut cut, const char *s, size_t n) {
    switch (cut) {
    case CUT_GPT2:
        return first_word(class_of, s, n);
    case CUT_LLAMA3:
        return gpt4_word(class_of, s, n, 3);
    case CUT_QWEN2:
        return gpt4_word(class_of, s, n, 1);
    case CUT_DIGITS:
        return digits_apart(class_of, s, n, 1);
    case CUT_THREE_DIGITS:
        return digits_apart(class_of, s, n, 3);
    case CUT_NUMBERS:
        return digits_apart(class_of, s, n, INT32_MAX);
    default:
        return n;
    }
}
