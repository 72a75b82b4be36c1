// Which kind of tokenizer a tokenizer.json describes, as far as this program follows it.
// Gives: Shape, read_shape, json_word. Needs: data/json.h, data/split.h.
// The file says in four members what happens to a text: "normalizer" changes its characters, "pre_tokenizer" cuts it
// into words, "model" merges inside them, "decoder" leads back. Each may be many things, and what is not known here
// is refused by its name, since the ids would be others.
#pragma once
#include "split.h"

// BYTE_LEVEL: a word is its bytes, as in GPT-2. BYTE_FALLBACK: a word is its characters, a space is "▁", and only a
// character without a token is its bytes, <0x00> to <0xFF>, as in SentencePiece.
enum { BYTE_LEVEL, BYTE_FALLBACK };

// Does a text get a space (or "▁") before it? Always; unless it begins with one; or so, but only at the very beginning
// and not behind an added token.
enum { PREFIX_NEVER, PREFIX_ALWAYS, PREFIX_MISSING, PREFIX_FIRST };

enum { KEEP_SPACES, REPLACE_FIRST, REPLACE_LATER }; // "▁" for spaces: before added tokens are looked for, or after that

typedef struct Shape {
    int kind;          // BYTE_LEVEL or BYTE_FALLBACK
    int nfc;           // 1: Unicode's normal form C
    int spaces;        // KEEP_SPACES, ...
    int prefix;        // PREFIX_NEVER, ...
    int split;         // 1: a word begins at each "▁"
    Cut cuts[4];       // (cut_count): each cuts the pieces of the one before
    int cut_count;
    int ignore_merges; // 1: a word that is a token is that token, whatever its merges
    int strip;         // 1: the first space of a decoded text goes
} Shape;

// The two values that a member of the file may have; "null" also means that it is missing. With any other value the
// ids would not be ours. Truncation and padding are not checked: they cut or fill ids that are finished.
typedef struct Expected {
    const char *member, *value, *other;
} Expected;

// A value as a word: a string itself, an object's "type", a number in digits, put into number (32).
const char *json_word(const Json *m, char *number) {
    if (m && m->type == 'o') {
        const Json *type = json_get(m, "type");
        m = type ? type : m;
    }
    switch (m ? m->type : '0') {
    case 's':
        return m->text;
    case 'n':
        snprintf(number, 32, "%g", m->number);
        return number;
    case 't':
        return "true";
    case 'f':
        return "false";
    case '0':
        return "null";
    default:
        return "something else";
    }
}

// Stops if a member of `object` is not as in `list` (count). `path` and `name` are for the message.
void check_members(const char *path, const char *name, const Json *object, const Expected *list,
                   size_t count) {
    for (size_t i = 0; i < count; i++) {
        const Expected *e = &list[i];
        char number[32];
        const char *word = json_word(json_get(object, e->member), number);
        if (strcmp(word, e->value) != 0 && strcmp(word, e->other) != 0) {
            fail("%s: %s %s is %s; this program follows \"%s\" only", path, name, e->member, word,
                 e->value);
        }
    }
}

// Is a member true? `missing` is what it is where the file does not say.
int read_flag(const char *path, const char *name, const Json *object, const char *member, int missing) {
    const Json *flag = json_get(object, member);
    if (!flag || flag->type == '0') {
        return missing;
    }
    if (flag->type != 't' && flag->type != 'f') {
        fail("%s: %s %s is neither true nor false", path, name, member);
    }
    return flag->type == 't';
}

int has_type(const Json *object, const char *type) {
    char number[32];
    return !strcmp(json_word(object, number), type);
}

// The text of a member, which has to be one of at least a byte, in which no NUL is.
const char *text_member(const char *path, const char *name, const Json *object, const char *member) {
    const Json *text = json_get(object, member);
    if (!text || text->type != 's' || !text->length || strlen(text->text) != text->length) {
        fail("%s: %s %s is missing or not a text", path, name, member);
    }
    return text->text;
}

// Stops if a step of the file comes a second time, or together with one that does the same.
void refuse_second(const char *path, const char *name, int has, const char *type) {
    if (has) {
        fail("%s: %s has %s a second time, or beside a step that does the same; this program follows one", path, name, type);
    }
}

// A Prepend or Replace of the normalizer.
void read_underscore(Shape *s, const char *path, const Json *step, int is_prepend) {
    const char *const name = "normalizer's";
    const char *content = text_member(path, name, step, is_prepend ? "prepend" : "content");
    const char *pattern = is_prepend ? " " : text_member(path, name, json_get(step, "pattern"), "String");
    if (strcmp(content, "\xe2\x96\x81") != 0 || strcmp(pattern, " ") != 0) {
        fail("%s: %s %s is of \"%s\" and \"%s\"; this program follows those that put \"\xe2\x96\x81\" for a space only",
             path, name, is_prepend ? "Prepend" : "Replace", pattern, content);
    }
    refuse_second(path, name, is_prepend ? s->prefix : s->spaces, is_prepend ? "Prepend" : "Replace");
    if (is_prepend) {
        s->prefix = PREFIX_ALWAYS;
    } else {
        s->spaces = REPLACE_FIRST;
    }
}

void read_normalizer(Shape *s, const char *path, const Json *n) {
    char number[32];
    if (!n || n->type == '0') {
        return;
    }
    if (has_type(n, "Sequence")) {
        const Json *list = json_get(n, "normalizers");
        for (const Json *step = list ? list->child : NULL; step; step = step->next) {
            if (has_type(step, "Sequence")) {
                fail("%s: the normalizer has a Sequence in a Sequence; this program follows one list of steps", path);
            }
            read_normalizer(s, path, step);
        }
        return;
    }
    if (has_type(n, "NFC")) {
        s->nfc = 1;
    } else if (has_type(n, "Prepend") || has_type(n, "Replace")) {
        read_underscore(s, path, n, has_type(n, "Prepend"));
    } else {
        fail("%s: the normalizer is %s; this program follows NFC, Prepend, Replace, a Sequence of them, or null only",
             path, json_word(n, number));
    }
}

// ---- the pre-tokenizer

void add_cut(Shape *s, const char *path, Cut cut) {
    if (s->cut_count == COUNT(s->cuts)) {
        fail("%s: the pre_tokenizer has more than %d steps", path, COUNT(s->cuts));
    }
    s->cuts[s->cut_count++] = cut;
}

// Cuts at a regular expression, or, as Gemma does, at spaces that its normalizer has replaced.
void read_split(Shape *s, const char *path, const Json *step) {
    static const Expected members[] = {{"behavior", "Isolated", "Isolated"}, {"invert", "false", "null"}};
    const char *const name = "pre_tokenizer's Split";
    const Json *pattern = json_get(step, "pattern");
    const Json *text = json_get(pattern, "String");
    if (s->spaces && text && text->type == 's' && !strcmp(text->text, " ")) {
        return; // there is no space any more
    }
    int found;
    const char *regex = text_member(path, name, pattern, "Regex");
    Cut cut = cut_of_pattern(regex, &found);
    if (!found) {
        fail("%s: %s has a regular expression that this program does not know: %s", path, name, regex);
    }
    check_members(path, name, step, members, COUNT(members));
    add_cut(s, path, cut);
}

// Metaspace puts "▁" for spaces, and may cut before each.
void read_metaspace(Shape *s, const char *path, const Json *step) {
    static const Expected members[] = {{"replacement", "\xe2\x96\x81", "\xe2\x96\x81"}};
    const char *const name = "pre_tokenizer's Metaspace";
    const Json *scheme = json_get(step, "prepend_scheme");
    char number[32];
    check_members(path, name, step, members, 1);
    refuse_second(path, name, s->spaces || s->prefix, "\xe2\x96\x81");

    // Older files say by add_prefix_space what newer ones say by prepend_scheme.
    const char *word = scheme ? json_word(scheme, number) : "always";
    if (!read_flag(path, name, step, "add_prefix_space", 1)) {
        word = "never";
    }
    if (!strcmp(word, "always")) {
        s->prefix = PREFIX_MISSING;
    } else if (!strcmp(word, "first")) {
        s->prefix = PREFIX_FIRST;
    } else if (strcmp(word, "never") != 0) {
        fail("%s: %s prepend_scheme is %s; this program follows \"first\", \"always\" and \"never\" only", path, name, word);
    }
    s->spaces = REPLACE_LATER;
    s->split = read_flag(path, name, step, "split", 1);
}

// One step. Returns 1 behind the last that may be: ByteLevel, which turns bytes into letters, or Metaspace.
int read_step(Shape *s, const char *path, const Json *step) {
    static const char *const name = "pre_tokenizer's";
    char number[32];
    if (has_type(step, "ByteLevel")) {
        s->kind = BYTE_LEVEL;
        if (read_flag(path, name, step, "add_prefix_space", 0)) {
            refuse_second(path, name, s->prefix, "add_prefix_space");
            s->prefix = PREFIX_MISSING;
        }
        add_cut(s, path, read_flag(path, name, step, "use_regex", 1) ? CUT_GPT2 : CUT_NOTHING);
        return 1;
    }
    if (has_type(step, "Metaspace")) {
        if (s->cut_count) {
            fail("%s: the pre_tokenizer has Metaspace behind other steps; this program follows it alone only", path);
        }
        read_metaspace(s, path, step);
        return 1;
    }
    if (has_type(step, "Digits")) {
        add_cut(s, path, read_flag(path, name, step, "individual_digits", 0) ? CUT_DIGITS : CUT_NUMBERS);
    } else if (has_type(step, "Split")) {
        read_split(s, path, step);
    } else {
        fail("%s: the pre_tokenizer's type is %s; this program follows ByteLevel, Split, Digits, Metaspace and a "
             "Sequence of them only",
             path, json_word(step, number));
    }
    return 0;
}

void read_pre_tokenizer(Shape *s, const char *path, const Json *words) {
    s->kind = BYTE_FALLBACK;
    if (!words || words->type == '0') {
        return;
    }
    if (!has_type(words, "Sequence")) {
        read_step(s, path, words);
        return;
    }
    const Json *list = json_get(words, "pretokenizers");
    int last = 0;
    for (const Json *step = list ? list->child : NULL; step; step = step->next) {
        if (last) {
            fail("%s: the pre_tokenizer's last step is not ByteLevel or Metaspace, but it has one: this program does not "
                 "follow what comes behind it",
                 path);
        }
        last = read_step(s, path, step);
    }
}

// Does the decoder take the first space of a text away?
int strips_first(const Json *decoder) {
    const Json *list = json_get(decoder, "decoders"), *start = json_get(decoder, "start");
    char number[32];
    if (has_type(decoder, "Metaspace")) {
        const Json *scheme = json_get(decoder, "prepend_scheme"), *add = json_get(decoder, "add_prefix_space");
        return strcmp(scheme ? json_word(scheme, number) : "always", "never") != 0 && (!add || add->type != 'f');
    }
    int strips = has_type(decoder, "Strip") && start && start->type == 'n' && start->number > 0;
    for (const Json *d = list ? list->child : NULL; d; d = d->next) {
        strips |= !has_type(d, "Sequence") && strips_first(d);
    }
    return strips;
}

// Stops if the file asks for a way of encoding that is not known here.
void read_shape(Shape *s, const char *path, const Json *root) {
    static const Expected in_model[] = {{"type", "BPE", "null"},
                                        {"dropout", "null", "0"},
                                        {"continuing_subword_prefix", "null", ""},
                                        {"end_of_word_suffix", "null", ""}};
    const Json *model = json_get(root, "model");
    memset(s, 0, sizeof(*s));
    check_members(path, "model's", model, in_model, COUNT(in_model));
    read_normalizer(s, path, json_get(root, "normalizer"));
    read_pre_tokenizer(s, path, json_get(root, "pre_tokenizer"));

    // Bytes are letters of GPT-2's alphabet, or tokens of their own.
    int fallback = read_flag(path, "model's", model, "byte_fallback", 0);
    if (s->kind == BYTE_LEVEL && (fallback || s->spaces || s->prefix == PREFIX_ALWAYS)) {
        fail("%s: the pre_tokenizer is ByteLevel, and %s; this program follows one of the two only", path,
             fallback ? "the model's byte_fallback is true" : "the normalizer puts \"\xe2\x96\x81\"");
    }
    if (s->kind == BYTE_FALLBACK && !fallback) {
        char number[32];
        fail("%s: the pre_tokenizer's type is %s and the model's byte_fallback is not true: a text may have characters "
             "without a token; this program follows ByteLevel or byte_fallback only",
             path, json_word(json_get(root, "pre_tokenizer"), number));
    }
    s->ignore_merges = read_flag(path, "model's", model, "ignore_merges", 0);
    s->strip = strips_first(json_get(root, "decoder"));
}
