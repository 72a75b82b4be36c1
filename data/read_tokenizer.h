// What a tokenizer is, and how it is read from a tokenizer.json.
// Gives: Tokenizer, tokenizer_load, tokenizer_free, is_added, byte_alphabet.
// Needs: data/shape.h (which kinds there are), data/added.h, data/normalize.h, data/containers.h, data/json.h.
// Besides the file itself, that folder's tokenizer_config.json, generation_config.json or config.json are looked into:
// they say which token ends a text.
#pragma once
#include "added.h"
#include "normalize.h"
#include "shape.h"

// The numbers that GGUF gives to kinds of tokens.
enum { TOKEN_NORMAL = 1, TOKEN_UNKNOWN = 2, TOKEN_CONTROL = 3, TOKEN_USER = 4, TOKEN_BYTE = 6 };

typedef struct Merge {
    int rank; // 1, 2, ...: the lowest goes first
    int left, right;
    int id;   // the token that the two become
} Merge;

// A word that was met before, with its ids. The word's hash gives its index in the cache, and a
// new word replaces an old one there.
typedef struct CachedWord {
    unsigned char length; // bytes; 0: nothing cached
    unsigned char count;  // ids
    char text[30];
    int ids[8];
} CachedWord;
enum { CACHED_WORDS = 1 << 15 };

typedef struct Tokenizer {
    int vocab;   // ids are 0 .. vocab - 1
    int eot;     // id of <|endoftext|>, or what this tokenizer has for it: it ends a text
    int bos;     // id of the token that begins every text of the model, -1: none
    int unk;     // id of the token for what is unknown, -1: none
    Shape shape;
    char **text; // (vocab): the bytes that each token stands for
    int *length; // (vocab): how many bytes
    char **raw;  // (vocab): each token as the file writes it, with a NUL behind it
    unsigned char *type; // (vocab): TOKEN_NORMAL, ...
    unsigned char *added; // (vocab): 1 if it is an added token
    char *json;  // the file as it was read
    size_t json_size;
    const char *eot_file; // which file names the end of text; NULL: none, and it is <|endoftext|>
    char *bytes;   // the text of all tokens
    Table raws;    // from a token as the file writes it, with its NUL, to its id + 1
    Table ids;     // the same for tokens of the model alone, by their bytes (BYTE_LEVEL) or as they are written
    int byte_id[256];
    Table pairs;   // from two ids, as int[2], to the rank of their merge
    Merge *merges; // (merge_count + 1), by rank; merges[0] stands for "no merge"
    int merge_count;
    AddedList first, later;       // added tokens: looked for in the text as it is, and after the normalizer
    unsigned char joins[256];     // 1 if a token has "▁" behind this byte
    unsigned char *class_of;      // of every code point
    Nfc *nfc;          // where the normalizer is NFC
    CachedWord *cache; // (CACHED_WORDS): encoding writes here, so each thread has its own
    int shared;        // 1 if all but the cache belongs to another Tokenizer
} Tokenizer;

// ---- GPT-2's alphabet

// In JSON, GPT-2 writes a token with one visible character for each byte: the byte's own character
// if it is visible in Latin-1, else the next of U+0100, U+0101, ... So "Ġ" (U+0120) stands for a
// space and "Ċ" (U+010A) for a newline.
void byte_alphabet(int32_t character[256]) {
    int32_t next = 256;
    for (int b = 0; b < 256; b++) {
        int visible = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
        character[b] = visible ? b : next++;
    }
}

// Turns n bytes in that alphabet into the bytes they stand for, out (n). Returns their number, or
// -1 if a character is not in the alphabet.
int alphabet_to_bytes(const int32_t byte_of[0x144], const char *s, size_t n, char *out) {
    int count = 0;
    size_t i = 0;
    while (i < n) {
        int32_t code;
        i += (size_t)utf8_decode(s + i, n - i, &code);
        if (code < 0 || code >= 0x144 || byte_of[code] < 0) {
            return -1;
        }
        out[count++] = (char)byte_of[code];
    }
    return count;
}

// The alphabet the other way round; it ends at U+0143.
void alphabet_bytes(int32_t byte_of[0x144]) {
    int32_t character[256];
    byte_alphabet(character);
    for (int i = 0; i < 0x144; i++) {
        byte_of[i] = -1;
    }
    for (int b = 0; b < 256; b++) {
        byte_of[character[b]] = b;
    }
}

// The byte that <0x00> to <0xFF> stands for, or -1.
int fallback_byte(const char *s) {
    static const char digits[] = "0123456789ABCDEF";
    if (strlen(s) != 6 || strncmp(s, "<0x", 3) != 0 || s[5] != '>') {
        return -1;
    }
    const char *high = strchr(digits, s[3]), *low = strchr(digits, s[4]);
    return high && low ? (int)(16 * (high - digits) + (low - digits)) : -1;
}

// ---- tokens

// Notes a token, as the file writes it, under the id that the file gives it.
void read_token(Tokenizer *t, const char *path, const char *raw, const Json *id) {
    int valid = id && id->type == 'n' && id->number >= 0 && id->number < 1 << 24;
    if (!*raw) {
        fail("%s: a token is empty", path);
    }
    if (!valid || id->number != floor(id->number)) {
        fail("%s: the id of token \"%s\" is not a whole number from 0 to %d", path, raw,
             (1 << 24) - 1);
    }

    // A token may be in the file twice, as long as its id is the same.
    int64_t *value = table_put(&t->raws, raw, strlen(raw) + 1);
    int64_t number = (int64_t)id->number + 1;
    if (*value && *value != number) {
        fail("%s: token \"%s\" is given twice, as %d and %d", path, raw, (int)*value - 1,
             (int)number - 1);
    }
    *value = number;
}

// The content of an added token.
const char *added_content(const char *path, const Json *added) {
    const Json *content = json_get(added, "content");
    if (!content || content->type != 's' || strlen(content->text) != content->length) {
        fail("%s: an added token has no \"content\"", path);
    }
    return content->text;
}

// Every id below the number of tokens must occur, and once only.
void number_tokens(Tokenizer *t, const char *path) {
    size_t count = t->raws.count;
    t->vocab = (int)count;
    t->text = (char **)allocate(count, sizeof(char *));
    t->length = (int *)allocate(count, sizeof(int));
    t->raw = (char **)allocate(count, sizeof(char *));
    t->type = (unsigned char *)allocate(count, 1);
    t->added = (unsigned char *)allocate(count, 1);
    for (size_t i = 0; i < t->raws.entry_count; i++) {
        const Entry *e = &t->raws.entries[i];
        if (!e->value) {
            continue;
        }
        int id = (int)e->value - 1;
        char *raw = t->raws.bytes + e->start;
        if (id >= t->vocab || t->raw[id]) {
            fail("%s: token \"%s\" has id %d, but %d tokens must have the ids 0 to %d, each once", path, raw, id, t->vocab,
                 t->vocab - 1);
        }
        t->raw[id] = raw;
        t->type[id] = TOKEN_NORMAL;
    }
}

// The id of a token that the file writes so, or -1.
int id_of(const Tokenizer *t, const char *raw) {
    return raw ? (int)table_get(&t->raws, raw, strlen(raw) + 1) - 1 : -1;
}

// "added_tokens": which are they, and where are they looked for?
void read_added_tokens(Tokenizer *t, const char *path, const Json *list) {
    static const Expected flags[] = {{"single_word", "false", "null"}};
    Bytes composed = {NULL, 0, 0}, content = {NULL, 0, 0};
    if (list && list->type != 'a' && list->type != '0') {
        fail("%s: added_tokens is no list", path);
    }
    for (const Json *a = list ? list->child : NULL; a; a = a->next) {
        const char *raw = added_content(path, a);
        int id = id_of(t, raw);
        int lstrip = read_flag(path, raw, a, "lstrip", 0), rstrip = read_flag(path, raw, a, "rstrip", 0);
        check_members(path, raw, a, flags, 1);
        t->type[id] = read_flag(path, raw, a, "special", 1) ? TOKEN_CONTROL : TOKEN_USER;
        if (t->added[id]) {
            continue; // a second time
        }
        t->added[id] = 1;
        if (!read_flag(path, raw, a, "normalized", 0)) {
            added_put(&t->first, raw, strlen(raw), id, lstrip, rstrip);
            continue;
        }

        // It is looked for in normalised text, so it is normalised itself.
        content.count = 0;
        bytes_add(&content, raw, strlen(raw));
        if (t->nfc && nfc_text(t->nfc, &composed, raw, strlen(raw))) {
            content.count = 0;
            bytes_add(&content, composed.list, composed.count);
        }
        if (t->shape.spaces == REPLACE_FIRST || t->shape.prefix == PREFIX_ALWAYS) {
            composed.count = 0;
            underscore_text(&composed, content.list, content.count, t->shape.spaces == REPLACE_FIRST,
                            t->shape.prefix == PREFIX_ALWAYS);
            content.count = 0;
            bytes_add(&content, composed.list, composed.count);
        }
        added_put(&t->later, content.list, content.count, id, lstrip, rstrip);
    }
    free(composed.list);
    free(content.list);
}

// The texts of all tokens, and the table of those that the model merges, which `vocab` lists.
void read_token_texts(Tokenizer *t, const char *path, const Json *vocab) {
    int32_t byte_of[0x144];
    alphabet_bytes(byte_of);
    t->bytes = (char *)allocate(t->raws.used, 1); // no text is longer than the token in the file
    char *end = t->bytes;
    unsigned char *is_model = (unsigned char *)allocate((size_t)t->vocab, 1);
    for (const Json *v = vocab->child; v; v = v->next) {
        is_model[(int)v->number] = 1;
    }
    for (int id = 0; id < t->vocab; id++) {
        const char *raw = t->raw[id];
        size_t n = strlen(raw);
        int byte = t->shape.kind == BYTE_FALLBACK && is_model[id] ? fallback_byte(raw) : -1;
        int k = t->shape.kind == BYTE_LEVEL && is_model[id] ? alphabet_to_bytes(byte_of, raw, n, end) : -1;
        if (k < 0 && t->shape.kind == BYTE_LEVEL && !t->added[id]) {
            fail("%s: token \"%s\" is not in GPT-2's byte alphabet", path, raw);
        }
        if (is_model[id] && (k >= 0 || t->shape.kind == BYTE_FALLBACK)) {
            *table_put(&t->ids, k >= 0 ? end : raw, k >= 0 ? (size_t)k : n) = id + 1;
        }

        // An added token is as it is written. Another may be a byte, or have "▁" for spaces.
        t->text[id] = end;
        if (byte >= 0 && !t->added[id]) {
            *end++ = (char)byte;
            t->type[id] = TOKEN_BYTE;
        } else if (k >= 0 && !t->added[id]) {
            end += k;
        } else {
            for (size_t i = 0; i < n; i++) {
                int is_space = t->shape.spaces && t->type[id] != TOKEN_CONTROL && !strncmp(raw + i, UNDERSCORE, 3);
                *end++ = is_space ? ' ' : raw[i];
                i += is_space ? 2 : 0;
            }
        }
        t->length[id] = (int)(end - t->text[id]);
    }
    free(is_model);
}

// ---- merges

// Reads the two sides of a merge, "left right" or ["left", "right"]. A missing side is NULL.
void read_sides(const Json *m, char **left, char **right) {
    *left = NULL;
    *right = NULL;
    if (m->type == 's') {
        *left = m->text;
        *right = strchr(m->text, ' ');
        if (*right) {
            *(*right)++ = 0; // the text of `left` ends at the space
        }
    } else if (m->type == 'a' && m->child) {
        const Json *second = m->child->next;
        *left = m->child->text;
        *right = second && !second->next ? second->text : NULL;
    }
}

// "merges": a list, best first, so that the n-th merge has rank n. both: memory for any token.
void read_merges(Tokenizer *t, const char *path, const Json *merges, char *both) {
    int rank = 0;
    t->merges = (Merge *)allocate(1, sizeof(Merge));
    for (const Json *m = merges->child; m; m = m->next) {
        char *left, *right;
        rank++;
        read_sides(m, &left, &right);
        if (!left || !right) {
            fail("%s: merge %d is neither \"left right\" nor [\"left\", \"right\"]", path, rank);
        }

        // Both sides, and the two put together, must be tokens.
        sprintf(both, "%s%s", left, right);
        int x = id_of(t, left), y = id_of(t, right), id = id_of(t, both);
        if (x < 0 || y < 0 || id < 0) {
            fail("%s: merge %d: \"%s\", \"%s\" and the two together are not all in the vocabulary",
                 path, rank, left, right);
        }

        // A rank is also the index in `merges`, which has no merge at 0.
        const int pair[2] = {x, y};
        Merge merge = {rank, x, y, id};
        t->merges = (Merge *)grow(t->merges, (size_t)rank, sizeof(Merge));
        t->merges[rank] = merge;
        *table_put(&t->pairs, pair, sizeof(pair)) = rank;
    }
    t->merge_count = rank;
}

// Finds the ids of the 256 bytes.
void find_bytes(Tokenizer *t, const char *path) {
    for (int b = 0; b < 256; b++) {
        char name[8] = {(char)b};
        if (t->shape.kind == BYTE_FALLBACK) {
            snprintf(name, sizeof(name), "<0x%02X>", b);
        }
        t->byte_id[b] = (int)table_get(&t->ids, name, t->shape.kind == BYTE_FALLBACK ? 6 : 1) - 1;
        if (t->byte_id[b] < 0) {
            fail("%s: byte 0x%02x has no token; a byte-level vocabulary has all 256", path, b);
        }
    }
}

// Where no token has "▁" behind a byte, no merge leads over the place between the two: there a text may be cut.
void find_joins(Tokenizer *t) {
    for (int id = 0; id < t->vocab && t->shape.kind == BYTE_FALLBACK; id++) {
        const char *s = t->raw[id];
        while ((s = strstr(s, UNDERSCORE)) != NULL) {
            if (s > t->raw[id]) {
                t->joins[(unsigned char)s[-1]] = 1;
            }
            s += 3;
        }
    }
    if (t->shape.ignore_merges) { // what is a word matters
        memset(t->joins, 1, sizeof(t->joins));
    }
}

// ---- the ends of a text

// The token that a post-processor puts before a text, -1 if it puts none.
int read_first_token(const Tokenizer *t, const char *path, const Json *p) {
    const Json *list = json_get(p, "processors");
    for (const Json *inner = list ? list->child : NULL; inner; inner = inner->next) {
        int id = has_type(inner, "Sequence") ? -1 : read_first_token(t, path, inner);
        if (id >= 0) {
            return id;
        }
    }
    const Json *single = has_type(p, "TemplateProcessing") ? json_get(p, "single") : NULL;
    const Json *special = single && single->child ? json_get(single->child, "SpecialToken") : NULL;
    if (!special) {
        return -1;
    }
    const char *name = text_member(path, "post_processor's first token", special, "id");
    if (id_of(t, name) < 0) {
        fail("%s: the post_processor puts \"%s\" before a text, which is no token", path, name);
    }
    return id_of(t, name);
}

// The token that the file `name` beside the file `tokenizer` says ends a text: "eos_token", a text or an object with
// "content", or "eos_token_id", a number or a list of them. -1: it does not say, or names none of these tokens.
int read_end_of_text(const Tokenizer *t, const char *tokenizer, const char *name) {
    const char *slash = strrchr(tokenizer, '/');
    size_t size, room = strlen(tokenizer) + strlen(name) + 1;
    int id = -1;
    char *path = (char *)allocate(room, 1);
    snprintf(path, room, "%.*s%s", slash ? (int)(slash + 1 - tokenizer) : 0, tokenizer, name);
    if (!is_there(path)) {
        free(path);
        return -1;
    }
    char *text = read_file(path, &size);
    Json *root = json_parse(text, size, path);
    const Json *token = json_get(root, "eos_token"), *number = json_get(root, "eos_token_id");
    token = token && token->type == 'o' ? json_get(token, "content") : token;
    number = number && number->type == 'a' ? number->child : number;
    if (token && token->type == 's') {
        id = id_of(t, token->text);
    } else if (number && number->type == 'n' && number->number >= 0 && number->number < t->vocab) {
        id = (int)number->number;
    }
    json_free(root);
    free(text);
    free(path);
    return id;
}

// Finds the token that ends a text, which is always cut out, even if the file has it in "vocab" only.
void find_end_of_text(Tokenizer *t, const char *path) {
    static const char *const files[] = {"tokenizer_config.json", "generation_config.json", "config.json"};
    t->eot = -1;
    for (int i = 0; i < COUNT(files) && t->eot < 0; i++) {
        t->eot = read_end_of_text(t, path, files[i]);
        t->eot_file = t->eot < 0 ? NULL : files[i];
    }
    if (t->eot < 0) {
        t->eot = id_of(t, "<|endoftext|>");
    }
    if (t->eot < 0) {
        fail("%s: the vocabulary has no <|endoftext|>, and no tokenizer_config.json beside it names another \"eos_token\", "
             "to stand between documents",
             path);
    }
    t->type[t->eot] = TOKEN_CONTROL;
    if (!t->added[t->eot]) {
        added_put(&t->first, t->raw[t->eot], strlen(t->raw[t->eot]), t->eot, 0, 0);
        t->added[t->eot] = 1;
    }
}

// ---- the whole file

// Reads a tokenizer.json, or that of a folder, to be freed by tokenizer_free. A file that is missing, damaged, or of a
// kind that is not followed ends the program with a message.
Tokenizer *tokenizer_load(const char *file) {
    static const char *const name = "/tokenizer.json";
    size_t room = strlen(file) + strlen(name) + 1;
    char *path = (char *)allocate(room, 1);
    snprintf(path, room, "%s%s", file, has_file(file, name + 1) ? name : "");
    struct stat info;
    if (stat(path, &info) == 0 && S_ISDIR(info.st_mode)) {
        fail("%s: there is no tokenizer.json in this folder; of other files (tokenizer.model, vocab.json) Python's transformers makes one: "
             "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)", path);
    }
    Tokenizer *t = (Tokenizer *)allocate(1, sizeof(Tokenizer));
    t->json = read_file(path, &t->json_size);
    Json *root = json_parse(t->json, t->json_size, path);
    const Json *model = json_get(root, "model"), *added = json_get(root, "added_tokens");
    const Json *vocab = json_get(model, "vocab"), *merges = json_get(model, "merges"), *unk = json_get(model, "unk_token");
    read_shape(&t->shape, path, root);
    if (!vocab || vocab->type != 'o' || !merges || merges->type != 'a') {
        fail("%s: not a tokenizer.json: expected a \"model\" with an object \"vocab\" "
             "and a list \"merges\"",
             path);
    }
    t->class_of = character_classes();
    t->nfc = t->shape.nfc ? nfc_load() : NULL;

    // Added tokens are often in the vocabulary, too, with the same id.
    for (const Json *v = vocab->child; v; v = v->next) {
        read_token(t, path, v->key, v);
    }
    for (const Json *a = added ? added->child : NULL; a; a = a->next) {
        read_token(t, path, added_content(path, a), json_get(a, "id"));
    }
    number_tokens(t, path);
    read_added_tokens(t, path, added);
    find_end_of_text(t, path);
    t->unk = unk && unk->type == 's' ? id_of(t, unk->text) : -1;
    if (t->unk >= 0 && t->unk != t->eot) {
        t->type[t->unk] = TOKEN_UNKNOWN;
    }
    t->bos = read_first_token(t, path, json_get(root, "post_processor"));
    read_token_texts(t, path, vocab);
    char *both = (char *)allocate(t->json_size + 1, 1); // no token is longer than the file
    read_merges(t, path, merges, both);
    free(both);
    find_bytes(t, path);
    find_joins(t);
    json_free(root);
    added_sort(&t->first);
    added_sort(&t->later);
    t->cache = (CachedWord *)allocate(CACHED_WORDS, sizeof(CachedWord));
    free(path);
    return t;
}

int is_added(const Tokenizer *t, int id) {
    return t->added[id];
}

void tokenizer_free(Tokenizer *t) {
    if (!t) {
        return;
    }
    if (!t->shared) {
        free(t->json);
        free(t->text);
        free(t->length);
        free(t->raw);
        free(t->type);
        free(t->added);
        free(t->bytes);
        free(t->merges);
        free(t->class_of);
        added_free(&t->first);
        added_free(&t->later);
        nfc_free(t->nfc);
        table_free(&t->raws);
        table_free(&t->ids);
        table_free(&t->pairs);
    }
    free(t->cache);
    free(t);
}
