// One small JSON reader, for the tokenizer, configurations, checkpoints and the log; and UTF-8.
// Gives: json_parse, json_get, json_free, json_write_string, utf8_decode, utf8_encode. Needs: dev/util.h.
//
// One small JSON reader, for the tokenizer, configurations, checkpoints and the log. A file becomes a tree: objects and
// arrays hold a list of children. All nodes and strings live in one allocation, so that a tree is freed by one call.
// It takes exactly what RFC 8259 allows and stops with a message at anything else.
#pragma once
#include "../dev/util.h"

typedef struct Json {
    char type;     // 'o' object, 'a' array, 's' string, 'n' number, 't' true, 'f' false, '0' null
    char *key;     // member name inside an object, else NULL
    char *text;    // string: its bytes unescaped to UTF-8, NUL-terminated
    size_t length; // string: number of bytes (may contain NUL)
    double number;
    struct Json *child, *next; // first element or member; next sibling
} Json;

// The length of the UTF-8 character at s (n bytes are left, at least one), and its code point. A byte that begins no
// valid character (overlong forms, surrogates and cut-off ones included) is a character of its own: length 1, code -1.
int utf8_decode(const char *s, size_t n, int32_t *code) {
    const unsigned char *u = (const unsigned char *)s;
    int length = u[0] < 0x80 ? 1 : u[0] < 0xc2 ? 0 : u[0] < 0xe0 ? 2 : u[0] < 0xf0 ? 3 : u[0] < 0xf5 ? 4 : 0;
    int32_t c = length <= 1 ? u[0] : u[0] & (0x7f >> length);
    int valid = length > 0 && (size_t)length <= n;
    for (int i = 1; valid && i < length; i++) {
        valid = (u[i] & 0xc0) == 0x80;
        c = c << 6 | (u[i] & 0x3f);
    }
    if ((length == 3 && (c < 0x800 || (c >= 0xd800 && c < 0xe000))) || (length == 4 && (c < 0x10000 || c > 0x10ffff)))
        valid = 0;
    *code = valid ? c : -1;
    return valid ? length : 1;
}

char *utf8_encode(char *out, int32_t c) { // returns the end of what it wrote, one to four bytes
    int more = c < 0x80 ? 0 : c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
    *out++ = (char)(more ? (0xff00 >> (more + 1) & 0xff) | c >> 6 * more : c);
    while (more--)
        *out++ = (char)(0x80 | (c >> 6 * more & 0x3f));
    return out;
}

typedef struct JsonReader {
    const char *name;
    char *copy, *at, *end; // of the text, with a NUL behind it; strings are unescaped where they stand
    Json *node;            // the next free node
} JsonReader;

void json_fail(const JsonReader *r, const char *expected) {
    char found[32] = "the end of the text";
    if (r->at < r->end)
        snprintf(found, sizeof(found), *r->at > ' ' && *r->at < 0x7f ? "'%c'" : "byte 0x%02x", (unsigned char)*r->at);
    fail("%s: bad JSON at byte %zu: expected %s, found %s", r->name, (size_t)(r->at - r->copy), expected, found);
}

int json_take(JsonReader *r, char c) { // steps over white space, and then over c: is it there?
    r->at += strspn(r->at, " \n\r\t");
    if (*r->at != c)
        return 0;
    r->at++;
    return 1;
}

int32_t json_escape(JsonReader *r) { // the character, or half a pair, that stands behind a backslash
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    const char *name = (const char *)memchr(names, *r->at, sizeof(names) - 1);
    if (name) {
        r->at++;
        return values[name - names];
    }
    if (*r->at != 'u' || strspn(r->at + 1, "0123456789abcdefABCDEF") < 4)
        json_fail(r, "one of \"\\/bfnrt or u and four hexadecimal digits after a backslash");
    char digits[5] = "";
    memcpy(digits, r->at + 1, 4);
    r->at += 5;
    return (int32_t)strtol(digits, NULL, 16);
}

char *json_read_string(JsonReader *r, size_t *length) {
    if (!json_take(r, '"'))
        json_fail(r, "a string");
    char *start = r->at, *out = start;
    while (*r->at != '"') {
        int32_t code, low = 0;
        int n = utf8_decode(r->at, 4, &code); // the NUL stops it at the end of the text
        if (code < 0x20)
            json_fail(r, code < 0 ? "UTF-8" : "'\"' (control characters are escaped)");
        r->at += n;
        if (code == '\\')
            code = json_escape(r);
        if (code >= 0xd800 && code < 0xe000) { // half a pair; without the other U+FFFD
            char *second = r->at++;
            if (code < 0xdc00 && strncmp(second, "\\u", 2) == 0)
                low = json_escape(r);
            int pair = low >= 0xdc00 && low < 0xe000;
            code = pair ? 0x10000 + (code - 0xd800) * 0x400 + (low - 0xdc00) : 0xfffd;
            r->at = pair ? r->at : second;
        }
        out = utf8_encode(out, code);
    }
    r->at++;
    *length = (size_t)(out - start);
    *out = 0;
    return start;
}

double json_read_number(JsonReader *r) {
    const unsigned char *s = (const unsigned char *)r->at + (*r->at == '-'), *point;
    char *end;
    double number = strtod(r->at, &end);
    point = (const unsigned char *)memchr(r->at, '.', (size_t)(end - r->at));
    // strtod also takes -.5, 007, 0x7, 7. and 7.e1
    if (!isdigit(*s) || (*s == '0' && isalnum(s[1]) && tolower(s[1]) != 'e') || (point && !isdigit(point[1])) ||
        isinf(number))
        json_fail(r, "a number that a double can hold");
    r->at = end;
    return number;
}

Json *json_read_value(JsonReader *r, int depth) {
    Json *json = r->node++;
    if (json_take(r, '{') || json_take(r, '[')) {
        int object = r->at[-1] == '{';
        json->type = object ? 'o' : 'a';
        if (depth == 100)
            json_fail(r, "at most 100 levels of nesting");
        if (json_take(r, object ? '}' : ']'))
            return json;
        Json **link = &json->child;
        do {
            size_t length;
            char *key = object ? json_read_string(r, &length) : NULL;
            if (object && !json_take(r, ':'))
                json_fail(r, "':'");
            *link = json_read_value(r, depth + 1);
            (*link)->key = key;
            link = &(*link)->next;
        } while (json_take(r, ','));
        if (!json_take(r, object ? '}' : ']'))
            json_fail(r, object ? "',' or '}'" : "',' or ']'");
    } else if (*r->at == '"') {
        json->type = 's';
        json->text = json_read_string(r, &json->length);
    } else if (*r->at == '-' || isdigit((unsigned char)*r->at)) {
        json->type = 'n';
        json->number = json_read_number(r);
    } else {
        const char *word = *r->at == 't' ? "true" : *r->at == 'f' ? "false" : "null";
        if (strncmp(r->at, word, strlen(word)) != 0)
            json_fail(r, "a value");
        json->type = *word == 'n' ? '0' : *word;
        r->at += strlen(word);
    }
    return json;
}

// The tree of a text of `size` bytes; `name` is the file that messages blame.
Json *json_parse(const char *text, size_t size, const char *name) {
    size_t nodes = 1; // every value but the first stands behind one of these
    for (size_t i = 0; i < size; i++)
        nodes += text[i] == ',' || text[i] == '[' || text[i] == '{';
    Json *root = (Json *)allocate(1, nodes * sizeof(Json) + size + 1);
    char *copy = (char *)memcpy(root + nodes, text, size);
    JsonReader r = {name, copy, copy, copy + size, root};
    json_read_value(&r, 0);
    json_take(&r, ' '); // trailing white space
    if (r.at != r.end)
        json_fail(&r, "the end of the text");
    return root;
}

// The member of an object, the last where several have this name; NULL where there is none, or no object.
Json *json_get(const Json *object, const char *key) {
    Json *found = NULL;
    for (Json *m = object && object->type == 'o' ? object->child : NULL; m; m = m->next) {
        if (strcmp(m->key, key) == 0)
            found = m;
    }
    return found;
}

void json_free(Json *json) {
    free(json);
}

// Quoted and escaped. Bytes that are no UTF-8 become U+FFFD, so that the output is always valid.
void json_write_string(FILE *file, const char *text, size_t length) {
    fputc('"', file);
    for (size_t i = 0; i < length;) {
        int32_t code;
        int n = utf8_decode(text + i, length - i, &code);
        if (code < 0)
            fputs("\xef\xbf\xbd", file);
        else if (code == '"' || code == '\\' || code == '\n')
            fprintf(file, "\\%c", code == '\n' ? 'n' : code);
        else if (code < 0x20)
            fprintf(file, "\\u%04x", code);
        else
            fwrite(text + i, 1, (size_t)n, file);
        i += (size_t)n;
    }
    fputc('"', file);
}
