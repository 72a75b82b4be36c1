// The tokenizer: text to ids and back, by byte-level byte-pair encoding (BPE).
// Gives: tokenizer_load, tokenizer_encode, tokenizer_text, tokenizer_share, tokenizer_differs, tokenizer_free; to
// data/tokenize.c, the trainer of vocabularies, also Table, Heap, first_word and byte_alphabet.
// Needs: data/json.h, data/unicode.h.
// A vocabulary is a Hugging Face tokenizer.json that works as GPT-2's does; any other is refused.
//
// BPE is from Gage 1994, for the words of a text from Sennrich et al. 2016 (arXiv:1508.07909), over
// bytes from GPT-2 (Radford et al. 2019). Three steps lead from text to ids:
//
//   1. <|endoftext|> and other added tokens are cut out:
//      "A.<|endoftext|>It's" -> "A."  <|endoftext|>  "It's"
//   2. The text between them is cut into words, so that no token spans two words:
//      "A." -> "A" "."          "It's" -> "It" "'s"
//   3. Each word starts as its bytes. A list of merges, best first, tells the neighbours that may
//      become one token. Again and again the pair of the lowest rank is merged, the leftmost if
//      there are several, until no two neighbours are in the list.
//
// All 256 bytes are tokens, so every text can be encoded and comes back unchanged, UTF-8 or not.
#pragma once
#include "containers.h"
#include "json.h"
#include "unicode.h"

// ---- cutting text into words

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

// ---- encoding

typedef struct Merge {
    int rank; // 1, 2, ...: the lowest goes first
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
    int eot;     // id of <|endoftext|>
    char **text; // (vocab): the bytes of each token, in ids.bytes
    int *length; // (vocab): how many bytes
    char *json;  // the file as it was read
    size_t json_size;
    int byte_id[256];
    Table ids;     // from a token's bytes to its id + 1
    Table pairs;   // from two ids, as int[2], to the rank of their merge
    Merge *merges; // by rank; merges[0] stands for "no merge"
    int *added;    // (added_count): ids that step 1 cuts out, with <|endoftext|>
    int added_count;
    unsigned char added_first[256]; // 1 if an added token begins with this byte
    unsigned char *class_of;        // of every code point
    CachedWord *cache; // (CACHED_WORDS): encoding writes here, so each thread has its own
    int shared;        // 1 if all but the cache belongs to another Tokenizer
} Tokenizer;

// The merge of two neighbours; its rank is 0 if they have none.
const Merge *find_merge(const Tokenizer *t, int left, int right) {
    const int pair[2] = {left, right};
    return &t->merges[table_get(&t->pairs, pair, sizeof(pair))];
}

// A token of a word that is being merged, in a doubly linked list (-1: none).
typedef struct Symbol {
    int id, previous, next;
} Symbol;

// Pushes the merge of symbol i and its right neighbour, if both are there and have one.
void push_merge(const Tokenizer *t, Heap *heap, const Symbol *s, int i) {
    if (i < 0 || s[i].next < 0) {
        return;
    }
    int rank = find_merge(t, s[i].id, s[s[i].next].id)->rank;
    if (rank) {
        heap_push(heap, rank, i);
    }
}

// Step 3 for one word of n bytes, in n log n time. ids (n); returns how many ids there are.
size_t merge_word(const Tokenizer *t, const char *word, size_t n, int *ids) {
    if (n > INT32_MAX) {
        fail("a word of %zu bytes is too long to encode", n);
    }

    // At first each byte is a symbol, linked to its neighbours.
    Symbol *s = (Symbol *)allocate(n, sizeof(Symbol));
    for (int i = 0; i < (int)n; i++) {
        s[i].id = t->byte_id[(unsigned char)word[i]];
        s[i].previous = i - 1;
        s[i].next = i + 1 < (int)n ? i + 1 : -1;
    }

    // The heap gives the lowest rank, and of equal ranks the leftmost symbol.
    Heap heap = {NULL, 0};
    for (int i = 0; i < (int)n; i++) {
        push_merge(t, &heap, s, i);
    }
    while (heap.count > 0) {
        Item item = heap_pop(&heap);
        int i = (int)item.second, next = s[i].next;
        const Merge *m = next < 0 ? &t->merges[0] : find_merge(t, s[i].id, s[next].id);
        if (m->rank != item.first) {
            continue; // one of the two has merged with its other neighbour since the push
        }

        // Symbol i becomes the merged token and its neighbour leaves the list.
        s[i].id = m->id;
        s[i].next = s[next].next;
        s[next].id = -1;
        s[next].next = -1;
        if (s[i].next >= 0) {
            s[s[i].next].previous = i;
        }

        // The new token may merge with its neighbours on both sides.
        push_merge(t, &heap, s, i);
        push_merge(t, &heap, s, s[i].previous);
    }

    // Symbol 0 is still the first, because only right neighbours leave the list.
    size_t count = 0;
    for (int i = 0; i >= 0; i = s[i].next) {
        ids[count++] = s[i].id;
    }
    free(s);
    free(heap.items);
    return count;
}

// Steps 2 and 3 for n bytes without added tokens. ids (n); returns how many ids there are.
size_t encode_words(const Tokenizer *t, const char *s, size_t n, int *ids) {
    size_t count = 0, length;
    for (const char *end = s + n; s < end; s += length) {
        length = first_word(t->class_of, s, (size_t)(end - s));

        // Most words of a text have occurred before; the cache knows those that are short.
        int fits = length <= sizeof(t->cache->text);
        CachedWord *c = &t->cache[fits ? hash_bytes(s, length) % CACHED_WORDS : 0];
        if (c->length == length && memcmp(c->text, s, length) == 0) {
            for (int i = 0; i < c->count; i++) {
                ids[count++] = c->ids[i];
            }
            continue;
        }

        // A new word is encoded in full, and cached if it is short.
        size_t added = merge_word(t, s, length, ids + count);
        if (fits && added <= sizeof(c->ids) / sizeof(c->ids[0])) {
            c->length = (unsigned char)length;
            c->count = (unsigned char)added;
            memcpy(c->text, s, length);
            memcpy(c->ids, ids + count, added * sizeof(int));
        }
        count += added;
    }
    return count;
}

// The id of the longest added token that s (n >= 1 bytes) begins with, -1 if there is none.
int added_token(const Tokenizer *t, const char *s, size_t n) {
    int best = -1;
    if (!t->added_first[(unsigned char)*s]) {
        return -1;
    }
    for (int i = 0; i < t->added_count; i++) {
        int id = t->added[i], length = t->length[id];
        int found = (size_t)length <= n && memcmp(t->text[id], s, (size_t)length) == 0;
        if (found && (best < 0 || length > t->length[best])) {
            best = id;
        }
    }
    return best;
}

// Turns text of `size` bytes into ids and returns their number. The caller gives ids (size + 1).
size_t tokenizer_encode(Tokenizer *t, const char *text, size_t size, int *ids) {
    size_t count = 0, start = 0;
    while (start < size) {
        // Step 1: look for the next added token, then encode what is before it.
        size_t end = start;
        int id = -1;
        while (end < size && (id = added_token(t, text + end, size - end)) < 0) {
            end++;
        }
        count += encode_words(t, text + start, end - start, ids + count);
        if (id >= 0) {
            ids[count++] = id;
            end += (size_t)t->length[id];
        }
        start = end;
    }
    return count;
}

// The bytes of a token, without a NUL; *length is their number. The bytes of all tokens, one after
// the other, are the text again.
const char *tokenizer_text(const Tokenizer *t, int id, int *length) {
    *length = t->length[id];
    return t->text[id];
}

// ---- reading tokenizer.json

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
int alphabet_to_bytes(const char *s, size_t n, char *out) {
    int32_t character[256];
    int32_t byte_of[0x144]; // the alphabet ends at U+0143
    byte_alphabet(character);
    memset(byte_of, -1, sizeof(byte_of));
    for (int b = 0; b < 256; b++) {
        byte_of[character[b]] = b;
    }

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

// The two values that a member of the file may have; "null" also means that it is missing. With
// any other value the ids would not be ours. The post-processor, truncation, padding and the
// decoder are not checked: they wrap, cut or read ids that are finished.
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

// Adds a token, the n bytes at s, under the id that the file gives it; n -1 means that it is not in
// the alphabet. `raw` is how the file writes the token, for messages.
void read_token(Tokenizer *t, const char *path, const char *raw, const char *s, int n,
                const Json *id) {
    if (n <= 0) {
        fail("%s: token \"%s\" is empty or not in GPT-2's byte alphabet", path, raw);
    }
    int valid = id && id->type == 'n' && id->number >= 0 && id->number < 1 << 24;
    if (!valid || id->number != floor(id->number)) {
        fail("%s: the id of token \"%s\" is not a whole number from 0 to %d", path, raw,
             (1 << 24) - 1);
    }

    // A token may be in the file twice, as long as its id is the same.
    int64_t *value = table_put(&t->ids, s, (size_t)n);
    int64_t number = (int64_t)id->number + 1;
    if (*value && *value != number) {
        fail("%s: token \"%s\" is given twice, as %d and %d", path, raw, (int)*value - 1,
             (int)number - 1);
    }
    *value = number;
}

// "added_tokens": a list of objects with "content", which is plain text, and "id".
void read_added_tokens(Tokenizer *t, const char *path, const Json *list) {
    static const Expected flags[] = {
        {"single_word", "false", "null"}, {"lstrip", "false", "null"}, {"rstrip", "false", "null"}};
    for (const Json *a = list ? list->child : NULL; a; a = a->next) {
        const Json *content = json_get(a, "content");
        const Json *id = json_get(a, "id");
        if (!content || content->type != 's') {
            fail("%s: an added token has no \"content\"", path);
        }
        check_members(path, content->text, a, flags, sizeof(flags) / sizeof(flags[0]));
        read_token(t, path, content->text, content->text, (int)content->length, id);

        t->added = (int *)grow(t->added, (size_t)t->added_count, sizeof(int));
        t->added[t->added_count++] = (int)id->number;
    }
}

// "vocab": an object of ids by token, in GPT-2's alphabet. bytes: memory for any token.
void read_vocabulary(Tokenizer *t, const char *path, const Json *vocab, char *bytes) {
    for (const Json *v = vocab->child; v; v = v->next) {
        size_t n = strlen(v->key);

        // An added token is often here once more, as plain text and with the same id.
        int64_t known = table_get(&t->ids, v->key, n);
        if (!known || v->type != 'n' || v->number != (double)(known - 1)) {
            read_token(t, path, v->key, bytes, alphabet_to_bytes(v->key, n, bytes), v);
        }
    }

    // Every id below the number of tokens must occur, and once only.
    t->vocab = (int)t->ids.count;
    t->text = (char **)allocate(t->ids.count, sizeof(char *));
    t->length = (int *)allocate(t->ids.count, sizeof(int));
    for (size_t i = 0; i < t->ids.entry_count; i++) {
        const Entry *e = &t->ids.entries[i];
        if (!e->value) {
            continue;
        }
        int id = (int)e->value - 1;
        if (id >= t->vocab || t->text[id]) {
            fail("%s: token \"%.*s\" has id %d, but %d tokens must have the ids 0 to %d, each once",
                 path, (int)e->length, t->ids.bytes + e->start, id, t->vocab, t->vocab - 1);
        }
        t->text[id] = t->ids.bytes + e->start;
        t->length[id] = (int)e->length;
    }
}

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

// "merges": a list, best first, so that the n-th merge has rank n. bytes: memory for any token.
void read_merges(Tokenizer *t, const char *path, const Json *merges, char *bytes) {
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
        int64_t x = 0, y = 0, id = 0;
        int n = alphabet_to_bytes(left, strlen(left), bytes);
        int k = n < 0 ? -1 : alphabet_to_bytes(right, strlen(right), bytes + n);
        if (k >= 0) {
            x = table_get(&t->ids, bytes, (size_t)n);
            y = table_get(&t->ids, bytes + n, (size_t)k);
            id = table_get(&t->ids, bytes, (size_t)(n + k));
        }
        if (!x || !y || !id) {
            fail("%s: merge %d: \"%s\", \"%s\" and the two together are not all in the vocabulary",
                 path, rank, left, right);
        }

        // A rank is also the index in `merges`, which has no merge at 0.
        const int pair[2] = {(int)x - 1, (int)y - 1};
        t->merges = (Merge *)grow(t->merges, (size_t)rank, sizeof(Merge));
        t->merges[rank].rank = rank;
        t->merges[rank].id = (int)id - 1;
        *table_put(&t->pairs, pair, sizeof(pair)) = rank;
    }
}

// Stops if the file asks for another way of encoding than GPT-2's.
void check_tokenizer(const char *path, const Json *root) {
    static const Expected in_root[] = {{"normalizer", "null", "null"}};
    static const Expected in_model[] = {{"type", "BPE", "null"},
                                        {"dropout", "null", "0"},
                                        {"continuing_subword_prefix", "null", ""},
                                        {"end_of_word_suffix", "null", ""},
                                        {"byte_fallback", "false", "null"},
                                        {"ignore_merges", "false", "null"}};
    static const Expected in_words[] = {{"type", "ByteLevel", "ByteLevel"},
                                        {"use_regex", "true", "null"},
                                        {"add_prefix_space", "false", "null"}};
    check_members(path, "file's", root, in_root, 1);
    check_members(path, "model's", json_get(root, "model"), in_model,
                  sizeof(in_model) / sizeof(in_model[0]));

    // The pre-tokenizer cuts text into words. A sequence of one is as good as that one.
    const Json *words = json_get(root, "pre_tokenizer");
    const Json *list = json_get(words, "pretokenizers");
    if (list && list->child && !list->child->next) {
        words = list->child;
    }
    check_members(path, "pre_tokenizer's", words, in_words, sizeof(in_words) / sizeof(in_words[0]));
}

// Finds the ids of the 256 bytes and of <|endoftext|>, which is always cut out of the text, even if
// the file has it in "vocab" only.
void find_special_ids(Tokenizer *t, const char *path) {
    for (int b = 0; b < 256; b++) {
        char byte = (char)b;
        t->byte_id[b] = (int)table_get(&t->ids, &byte, 1) - 1;
        if (t->byte_id[b] < 0) {
            fail("%s: byte 0x%02x has no token; a byte-level vocabulary has all 256", path, b);
        }
    }

    t->eot = (int)table_get(&t->ids, "<|endoftext|>", 13) - 1;
    if (t->eot < 0) {
        fail("%s: the vocabulary has no <|endoftext|>", path);
    }

    // Their first bytes: almost anywhere in a text one look tells that no added token begins there.
    t->added = (int *)grow(t->added, (size_t)t->added_count, sizeof(int));
    t->added[t->added_count++] = t->eot;
    for (int i = 0; i < t->added_count; i++) {
        t->added_first[(unsigned char)t->text[t->added[i]][0]] = 1;
    }
}

// Reads a tokenizer.json, to be freed by tokenizer_free. A file that is missing, damaged, or not of
// GPT-2's kind ends the program with a message.
Tokenizer *tokenizer_load(const char *path) {
    Tokenizer *t = (Tokenizer *)allocate(1, sizeof(Tokenizer));
    t->json = read_file(path, &t->json_size);
    Json *root = json_parse(t->json, t->json_size, path);
    check_tokenizer(path, root);

    const Json *vocab = json_get(json_get(root, "model"), "vocab");
    const Json *merges = json_get(json_get(root, "model"), "merges");
    if (!vocab || vocab->type != 'o' || !merges || merges->type != 'a') {
        fail("%s: not a tokenizer.json: expected a \"model\" with an object \"vocab\" "
             "and a list \"merges\"",
             path);
    }

    char *bytes = (char *)allocate(t->json_size, 1); // no token is longer than the file
    read_added_tokens(t, path, json_get(root, "added_tokens"));
    read_vocabulary(t, path, vocab, bytes);
    read_merges(t, path, merges, bytes);
    find_special_ids(t, path);
    free(bytes);
    json_free(root);

    t->class_of = character_classes();
    t->cache = (CachedWord *)allocate(CACHED_WORDS, sizeof(CachedWord));
    return t;
}

int is_added(const Tokenizer *t, int id) {
    for (int i = 0; i < t->added_count; i++) {
        if (t->added[i] == id) {
            return 1;
        }
    }
    return 0;
}

// Does `large` give every text the ids that `small` gives it, but for added tokens behind those of small? Returns -1 if
// so, else the first token that differs, or small's number of tokens where the merges do.
int tokenizer_differs(const Tokenizer *large, const Tokenizer *small) {
    for (int i = 0; i < small->vocab; i++) {
        int same = i < large->vocab && small->length[i] == large->length[i] && is_added(small, i) == is_added(large, i);
        if (!same || memcmp(small->text[i], large->text[i], (size_t)small->length[i])) {
            return i;
        }
    }

    // The same pairs have the same ranks.
    int differ = small->pairs.count != large->pairs.count;
    for (size_t i = 0; i < small->pairs.entry_count && !differ; i++) {
        const Entry *e = &small->pairs.entries[i];
        differ = e->value && table_get(&large->pairs, small->pairs.bytes + e->start, e->length) != e->value;
    }
    return differ ? small->vocab : -1;
}

// The same tokenizer for another thread. All but the cache is t's, so t must be freed last.
Tokenizer *tokenizer_share(const Tokenizer *t) {
    Tokenizer *mine = (Tokenizer *)allocate(1, sizeof(Tokenizer));
    *mine = *t;
    mine->shared = 1;
    mine->cache = (CachedWord *)allocate(CACHED_WORDS, sizeof(CachedWord));
    return mine;
}

void tokenizer_free(Tokenizer *t) {
    if (!t) {
        return;
    }
    if (!t->shared) {
        free(t->json);
        free(t->text);
        free(t->length);
        free(t->merges);
        free(t->added);
        free(t->class_of);
        table_free(&t->ids);
        table_free(&t->pairs);
    }
    free(t->cache);
    free(t);
}
