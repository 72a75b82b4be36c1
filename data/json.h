// One small JSON reader, for the tokenizer, configurations, checkpoints and the log; and UTF-8.
// Gives: json_parse, json_get, json_free, json_write_string, utf8_decode, utf8_encode.
// Needs: dev/util.h.
// A text becomes a tree, in which objects and arrays hold a list of children, all in one allocation.
// The reader follows RFC 8259 exactly and stops with a message at anything else.
#pragma once
#include "../dev/util.h"
#include <ctype.h>

typedef struct Json {
    char type;     // 'o' object, 'a' array, 's' string, 'n' number, 't' true, 'f' false, '0' null
    char *key;     // name of this member of an object, else NULL
    char *text;    // string: its bytes unescaped to UTF-8, NUL-terminated
    size_t length; // string: number of bytes (may contain NUL)
    double number; // number: its value
    struct Json *child; // object or array: its first member or element
    struct Json *next;  // the next member or element of the same parent
} Json;

// ---- UTF-8

// Reads the character at s, where n >= 1 bytes are left, into *code and returns its length in
// bytes, 1 to 4. A byte that begins no valid character is a character of its own: length 1,
// code -1. A character is also invalid if it is longer than needed, a surrogate (only UTF-16 has
// those), or cut off.
int utf8_decode(const char *s, size_t n, int32_t *code) {
    const unsigned char *u = (const unsigned char *)s;
    *code = u[0];
    if (u[0] < 0x80) {
        return 1;
    }

    // The first byte tells the length; 80 to c1 and f5 to ff begin no character.
    int length = 0;
    if (u[0] >= 0xc2 && u[0] < 0xf5) {
        length = 2 + (u[0] >= 0xe0) + (u[0] >= 0xf0);
    }
    *code = -1;
    if (length == 0 || (size_t)length > n) {
        return 1;
    }

    // Each further byte is 10xxxxxx and adds six bits.
    int32_t c = u[0] & (0x7f >> length);
    for (int i = 1; i < length; i++) {
        if ((u[i] & 0xc0) != 0x80) {
            return 1;
        }
        c = c << 6 | (u[i] & 0x3f);
    }

    // A character must need its length and be in Unicode's range, without the surrogates.
    if (length == 3 && (c < 0x800 || (c >= 0xd800 && c < 0xe000))) {
        return 1;
    }
    if (length == 4 && (c < 0x10000 || c > 0x10ffff)) {
        return 1;
    }
    *code = c;
    return length;
}

// Writes character c as one to four bytes and returns the end of what it wrote.
char *utf8_encode(char *out, int32_t c) {
    if (c < 0x80) {
        *out++ = (char)c;
        return out;
    }

    // The first byte has a one for each byte and the highest bits, each other byte has six bits.
    int more = 1 + (c >= 0x800) + (c >= 0x10000);
    *out++ = (char)((0xff00 >> (more + 1) & 0xff) | c >> 6 * more);
    while (more > 0) {
        more--;
        *out++ = (char)(0x80 | (c >> 6 * more & 0x3f));
    }
    return out;
}

// ---- reading

typedef struct JsonReader {
    const char *name; // the file that messages name
    char *copy;       // the text with a NUL behind it; each string is unescaped into its own bytes
    char *at;         // the next byte to read
    char *end;        // the end of the text
    Json *node;       // the next free node
    const char *hint; // the end of the message about a mistake
} JsonReader;

// Ends the program; the message compares the text at the present byte with the expected one.
void json_fail(const JsonReader *r, const char *expected) {
    char found[32] = "the end of the text";
    if (r->at < r->end) {
        const char *format = *r->at > ' ' && *r->at < 0x7f ? "'%c'" : "byte 0x%02x";
        snprintf(found, sizeof(found), format, (unsigned char)*r->at);
    }
    fail("%s: bad JSON at byte %zu: expected %s, found %s%s", r->name, (size_t)(r->at - r->copy),
         expected, found, r->hint);
}

// Skips white space. If c comes next, skips it too and returns 1, else returns 0.
int json_take(JsonReader *r, char c) {
    r->at += strspn(r->at, " \n\r\t");
    if (*r->at != c) {
        return 0;
    }
    r->at++;
    return 1;
}

// Reads an escape, behind its backslash, and returns the character, or one surrogate of two.
int32_t json_escape(JsonReader *r) {
    static const char names[] = "\"\\/bfnrt";
    static const char values[] = "\"\\/\b\f\n\r\t";
    const char *name = (const char *)memchr(names, *r->at, sizeof(names) - 1);
    if (name) {
        r->at++;
        return values[name - names];
    }
    if (*r->at != 'u' || strspn(r->at + 1, "0123456789abcdefABCDEF") < 4) {
        json_fail(r, "one of \"\\/bfnrt or u and four hexadecimal digits after a backslash");
    }
    char digits[5] = "";
    memcpy(digits, r->at + 1, 4);
    r->at += 5;
    return (int32_t)strtol(digits, NULL, 16);
}

// Two escapes, a high and a low surrogate, stand for one character beyond U+FFFF. `first` was read;
// reads the second if it follows. A surrogate alone becomes U+FFFD, the sign for "no character".
int32_t json_surrogates(JsonReader *r, int32_t first) {
    char *start = r->at;
    if (first < 0xdc00 && strncmp(start, "\\u", 2) == 0) {
        r->at++;
        int32_t second = json_escape(r);
        if (second >= 0xdc00 && second < 0xe000) {
            return 0x10000 + (first - 0xd800) * 0x400 + (second - 0xdc00);
        }
    }
    r->at = start;
    return 0xfffd;
}

// Reads a string and returns its bytes, unescaped; *length does not count the NUL behind them.
char *json_read_string(JsonReader *r, size_t *length) {
    if (!json_take(r, '"')) {
        json_fail(r, "a string");
    }

    // An escape is never shorter than its character, so the output never overtakes the input.
    char *start = r->at;
    char *out = start;
    while (*r->at != '"') {
        int32_t code;
        int n = utf8_decode(r->at, 4, &code); // does not pass the NUL at the end of the text
        if (code < 0x20) {
            json_fail(r, code < 0 ? "UTF-8" : "'\"' (control characters are escaped)");
        }
        r->at += n;

        // An escape stands for another character, and two escapes for one beyond U+FFFF.
        if (code == '\\') {
            code = json_escape(r);
        }
        if (code >= 0xd800 && code < 0xe000) {
            code = json_surrogates(r, code);
        }
        out = utf8_encode(out, code);
    }
    r->at++;
    *length = (size_t)(out - start);
    *out = 0;
    return start;
}

// Reads a number, which ends at the first character that cannot belong to it.
double json_read_number(JsonReader *r) {
    const unsigned char *s = (const unsigned char *)r->at + (*r->at == '-');
    char *end;
    double number = strtod(r->at, &end);
    const unsigned char *point = (const unsigned char *)memchr(r->at, '.', (size_t)(end - r->at));

    // strtod takes more than JSON does: also -.5, 007, 0x7, 7. and 7.e1.
    int bad = !isdigit(*s) || isinf(number);
    bad |= *s == '0' && isalnum(s[1]) && tolower(s[1]) != 'e';
    bad |= point && !isdigit(point[1]);
    if (bad) {
        json_fail(r, "a number that a double can hold");
    }
    r->at = end;
    return number;
}

Json *json_read_value(JsonReader *r, int depth);

// Reads the members behind '{', or the elements behind '[', as the children of `json`.
void json_read_children(JsonReader *r, Json *json, int depth) {
    int object = json->type == 'o';
    char close = object ? '}' : ']';
    if (depth == 100) {
        json_fail(r, "at most 100 levels of nesting");
    }
    if (json_take(r, close)) {
        return;
    }

    // At least one child: each is appended to the list at `link`.
    Json **link = &json->child;
    do {
        size_t length;
        char *key = object ? json_read_string(r, &length) : NULL;
        if (object && !json_take(r, ':')) {
            json_fail(r, "':'");
        }
        *link = json_read_value(r, depth + 1);
        (*link)->key = key;
        link = &(*link)->next;
    } while (json_take(r, ','));
    if (!json_take(r, close)) {
        json_fail(r, object ? "',' or '}'" : "',' or ']'");
    }
}

// Reads any value; `depth` is the number of objects and arrays around it.
Json *json_read_value(JsonReader *r, int depth) {
    static const char *const words[] = {"true", "false", "null"};
    Json *json = r->node++;

    // The first character tells the type.
    if (json_take(r, '{')) {
        json->type = 'o';
        json_read_children(r, json, depth);
    } else if (json_take(r, '[')) {
        json->type = 'a';
        json_read_children(r, json, depth);
    } else if (*r->at == '"') {
        json->type = 's';
        json->text = json_read_string(r, &json->length);
    } else if (*r->at == '-' || isdigit((unsigned char)*r->at)) {
        json->type = 'n';
        json->number = json_read_number(r);
    } else {
        for (int i = 0; i < 3; i++) {
            if (strncmp(r->at, words[i], strlen(words[i])) == 0) {
                json->type = "tf0"[i];
                r->at += strlen(words[i]);
                return json;
            }
        }
        json_fail(r, "a value");
    }
    return json;
}

// The tree of a text of `size` bytes, to be freed by json_free. A mistake in it ends the program
// with a message that names the file `name` and the byte, and ends in `hint`.
Json *json_parse_or(const char *text, size_t size, const char *name, const char *hint) {
    // Every value but the first follows one of these characters, which gives the number of nodes.
    size_t nodes = 1;
    for (size_t i = 0; i < size; i++) {
        nodes += text[i] == ',' || text[i] == '[' || text[i] == '{';
    }

    // The nodes come first and the text behind them, so that one free releases both.
    Json *root = (Json *)allocate(1, nodes * sizeof(Json) + size + 1);
    char *copy = (char *)memcpy(root + nodes, text, size);
    JsonReader r = {name, copy, copy, copy + size, root, hint};
    json_read_value(&r, 0);

    // Only white space may follow.
    json_take(&r, ' ');
    if (r.at != r.end) {
        json_fail(&r, "the end of the text");
    }
    return root;
}

Json *json_parse(const char *text, size_t size, const char *name) {
    return json_parse_or(text, size, name, "");
}

// The member `key` of an object, the last one if there are several; NULL if there is none.
Json *json_get(const Json *object, const char *key) {
    if (!object || object->type != 'o') {
        return NULL;
    }
    Json *found = NULL;
    for (Json *m = object->child; m; m = m->next) {
        if (strcmp(m->key, key) == 0) {
            found = m;
        }
    }
    return found;
}

void json_free(Json *json) {
    free(json);
}

// ---- writing

// Writes `length` bytes as a JSON string with its quotes. A byte that is not UTF-8 becomes U+FFFD,
// so that the output is always valid.
void json_write_string(FILE *file, const char *text, size_t length) {
    fputc('"', file);
    size_t i = 0;
    while (i < length) {
        int32_t code;
        int n = utf8_decode(text + i, length - i, &code);

        // Only quotes, backslashes and control characters have to be escaped.
        if (code < 0) {
            fputs("\xef\xbf\xbd", file);
        } else if (code == '"' || code == '\\') {
            fprintf(file, "\\%c", code);
        } else if (code == '\n') {
            fputs("\\n", file);
        } else if (code < 0x20) {
            fprintf(file, "\\u%04x", code);
        } else {
            fwrite(text + i, 1, (size_t)n, file);
        }
        i += (size_t)n;
    }
    fputc('"', file);
}
