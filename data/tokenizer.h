// The tokenizer: byte-level BPE, read from a Hugging Face tokenizer.json.
// Gives: tokenizer_load, tokenizer_encode, tokenizer_text, tokenizer_share, tokenizer_free. Needs: data/json.h.
//
// Byte-level byte-pair encoding, as GPT-2 introduced it (Radford et al. 2019; BPE for text: Sennrich et
// al. 2016, arXiv:1508.07909). Three steps from text to ids:
//
//   1. <|endoftext|> and other added tokens are cut out: "A.<|endoftext|>It's" -> "A."  <|endoftext|>  "It's"
//   2. What lies between is cut into words, so that no token spans two words:      "A" "."  ...  "It" "'s"
//   3. Each word starts as its bytes. A list of merges, best first, says which neighbours become one token. Again and
//      again the pair of the lowest rank is merged, the leftmost of equals, until no neighbours are in the list.
//
// All 256 bytes are tokens, so there is no text that cannot be written, and what is not UTF-8 comes back as it was.
// The vocabulary is a Hugging Face tokenizer.json. Of what such a file can ask for we follow the GPT-2 way only, and
// refuse the rest rather than give other ids. data/tokenize.c trains such a vocabulary and turns text into token files.

#pragma once
#include "json.h"
#include "unicode.h"

// ---- two containers

// The list with room for one more element of `size` bytes behind its `count`: it doubles at every power of two.
void *grow(void *list, size_t count, size_t size) {
    return count & (count - 1) ? list : reallocate(list, count ? 2 * count : 1, size);
}

// A hash table from keys of any bytes to numbers other than 0, which means that a key is not there.
typedef struct Entry {
    size_t start, length; // the key, in Table.bytes
    int64_t value;
} Entry;

typedef struct Table {
    Entry *entries;      // (slots)
    char *bytes;         // of all keys
    size_t slots, count; // slots: a power of two; count: of keys
    size_t filled, room; // of bytes
} Table;

uint64_t hash_bytes(const char *s, size_t n) {
    uint64_t h = n, chunk = 0;
    for (; n >= 8; s += 8, n -= 8) {
        memcpy(&chunk, s, 8);
        h = hash64(h ^ chunk);
    }
    if (n == 0)
        return h;
    chunk = 0;
    memcpy(&chunk, s, n);
    return hash64(h ^ chunk);
}

Entry *table_slot(const Table *t, const char *key, size_t n) { // where the key stands or would stand
    for (size_t i = (size_t)hash_bytes(key, n);; i++) {
        Entry *e = &t->entries[i & (t->slots - 1)];
        if (!e->value || (e->length == n && memcmp(t->bytes + e->start, key, n) == 0))
            return e;
    }
}

int64_t table_get(const Table *t, const void *key, size_t n) {
    return t->slots ? table_slot(t, (const char *)key, n)->value : 0;
}

// The key's value, to be changed. A new key's is 0, and must be.
int64_t *table_put(Table *t, const void *key, size_t n) {
    if (2 * t->count >= t->slots) {
        Table old = *t;
        t->slots = old.slots ? 2 * old.slots : 1024;
        t->entries = (Entry *)allocate(t->slots, sizeof(Entry));
        for (size_t i = 0; i < old.slots; i++) {
            if (old.entries[i].value)
                *table_slot(t, t->bytes + old.entries[i].start, old.entries[i].length) = old.entries[i];
        }
        free(old.entries);
    }
    Entry *e = table_slot(t, (const char *)key, n);
    if (!e->value) {
        if (n > t->room - t->filled)
            t->bytes = (char *)reallocate(t->bytes, t->room = 2 * t->room + n, 1);
        memcpy(t->bytes + t->filled, key, n);
        e->start = t->filled;
        e->length = n;
        t->filled += n;
        t->count++;
    }
    return &e->value;
}

void table_free(Table *t) {
    free(t->entries);
    free(t->bytes);
    memset(t, 0, sizeof(*t));
}

// A heap: the smallest item comes out first.
typedef struct Item {
    int64_t first, second; // ordered by first, then by second
} Item;

typedef struct Heap {
    Item *items;
    size_t count;
} Heap;

int item_before(Item a, Item b) {
    return a.first != b.first ? a.first < b.first : a.second < b.second;
}

void heap_push(Heap *h, int64_t first, int64_t second) {
    Item item = {first, second};
    h->items = (Item *)grow(h->items, h->count, sizeof(Item));
    size_t i = h->count++;
    for (; i > 0 && item_before(item, h->items[(i - 1) / 2]); i = (i - 1) / 2)
        h->items[i] = h->items[(i - 1) / 2];
    h->items[i] = item;
}

Item heap_pop(Heap *h) {
    Item top = h->items[0], last = h->items[--h->count];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < h->count; i = child) {
        child += child + 1 < h->count && item_before(h->items[child + 1], h->items[child]);
        if (!item_before(h->items[child], last))
            break;
        h->items[i] = h->items[child];
    }
    h->items[i] = last;
    return top;
}

// ---- cutting text into words

enum { OTHER, LETTER, NUMBER, SPACE }; // classes of characters

void mark_characters(unsigned char *class_of, const int32_t *ranges, size_t size, int kind) {
    for (const int32_t *range = ranges; range < ranges + size / sizeof(int32_t); range += 2)
        memset(class_of + range[0], kind, (size_t)(range[1] - range[0] + 1));
}

unsigned char *character_classes(void) { // the class of every code point, to be freed
    unsigned char *class_of = (unsigned char *)allocate(0x110000, 1);
    mark_characters(class_of, unicode_letters, sizeof(unicode_letters), LETTER);
    mark_characters(class_of, unicode_numbers, sizeof(unicode_numbers), NUMBER);
    mark_characters(class_of, unicode_spaces, sizeof(unicode_spaces), SPACE);
    return class_of;
}

// The class of the character at s and its number of bytes. A byte that is no UTF-8 is a character of class OTHER.
int character_class(const unsigned char *class_of, const char *s, size_t n, size_t *bytes) {
    int32_t code = (unsigned char)*s;
    *bytes = code < 0x80 ? 1 : (size_t)utf8_decode(s, n, &code);
    return code < 0 ? (int)OTHER : class_of[code];
}

// The length of the first word of s (n bytes, at least one), by GPT-2's rule, which reads as a regular expression
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// In words: the English contractions; letters, or numbers, or other signs, each with the one space before them; and
// white space, of which the last character is left to what follows.
size_t first_word(const unsigned char *class_of, const char *s, size_t n) {
    if (s[0] == '\'' && n > 1) {
        char a = s[1], b = n > 2 ? s[2] : ' ';
        if (a == 's' || a == 't' || a == 'm' || a == 'd')
            return 2;
        if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l'))
            return 3;
    }
    size_t i = s[0] == ' ' && n > 1, bytes, last = 0; // last: where the last character begins
    int kind = character_class(class_of, s + i, n - i, &bytes);
    if (kind == SPACE)
        i = 0;
    for (; i < n && character_class(class_of, s + i, n - i, &bytes) == kind; i += bytes)
        last = i;
    return kind == SPACE && i < n && last > 0 ? last : i;
}

// ---- encoding

typedef struct Merge {
    int rank, id; // rank: from 1, the lowest goes first; id: the token that the two become
} Merge;

// A word that was met before, with its ids. A word's hash decides its place; a new word drives out the old one.
typedef struct CachedWord {
    unsigned char length, count;
    char text[30];
    int ids[8];
} CachedWord;
enum { CACHED_WORDS = 1 << 15 };

typedef struct Tokenizer {
    int vocab;   // ids are 0 .. vocab - 1
    int eot;     // id of <|endoftext|>
    char **text; // vocab: the bytes of each token
    int *length; // vocab: their number
    char *json;  // the file as it was read
    size_t json_size;
    int byte_id[256];
    Table ids;     // of the tokens' bytes: id + 1
    Table pairs;   // of two ids: a place in merges
    Merge *merges; // by rank; 0: none
    int *added;    // ids that are found as a whole in the text, <|endoftext|> among them
    int added_count;
    unsigned char added_first[256]; // 1 where one of them begins with this byte
    unsigned char *class_of;        // of every code point
    CachedWord *cache;              // what encoding changes: a thread's own
    int shared;                     // everything but the cache belongs to another Tokenizer
} Tokenizer;

const Merge *find_merge(const Tokenizer *t, int left, int right) { // of rank 0 where there is none
    const int pair[2] = {left, right};
    return &t->merges[table_get(&t->pairs, pair, sizeof(pair))];
}

// A token of a word that is being merged, in a doubly linked list (-1: none).
typedef struct Symbol {
    int id, previous, next;
} Symbol;

void push_merge(const Tokenizer *t, Heap *heap, const Symbol *s, int i) { // of symbol i and its right neighbour
    int rank = i < 0 || s[i].next < 0 ? 0 : find_merge(t, s[i].id, s[s[i].next].id)->rank;
    if (rank)
        heap_push(heap, rank, i);
}

// The ids of one word of n bytes, in n log n time. ids has room for n.
size_t merge_word(const Tokenizer *t, const char *word, size_t n, int *ids) {
    if (n > INT32_MAX)
        fail("a word of %zu bytes is too long to encode", n);
    Symbol *s = (Symbol *)allocate(n, sizeof(Symbol));
    Heap heap = {NULL, 0};
    for (int i = 0; i < (int)n; i++) {
        s[i].id = t->byte_id[(unsigned char)word[i]];
        s[i].previous = i - 1;
        s[i].next = i + 1 < (int)n ? i + 1 : -1;
    }
    for (int i = 0; i < (int)n; i++)
        push_merge(t, &heap, s, i);
    while (heap.count > 0) {
        Item item = heap_pop(&heap);
        int i = (int)item.second, next = s[i].next;
        const Merge *m = next < 0 ? t->merges : find_merge(t, s[i].id, s[next].id);
        if (m->rank != item.first)
            continue; // this pair is gone: one of the two has merged elsewhere
        s[i].id = m->id;
        s[i].next = s[next].next;
        s[next].id = s[next].next = -1;
        if (s[i].next >= 0)
            s[s[i].next].previous = i;
        push_merge(t, &heap, s, i);
        push_merge(t, &heap, s, s[i].previous);
    }
    size_t count = 0;
    for (int i = 0; i >= 0; i = s[i].next)
        ids[count++] = s[i].id;
    free(s);
    free(heap.items);
    return count;
}

size_t encode_words(const Tokenizer *t, const char *s, size_t n, int *ids) {
    size_t count = 0;
    for (size_t length; n > 0; s += length, n -= length) {
        length = first_word(t->class_of, s, n);
        CachedWord *c = &t->cache[length <= sizeof(c->text) ? hash_bytes(s, length) % CACHED_WORDS : 0];
        if (c->length == length && memcmp(c->text, s, length) == 0) {
            for (int i = 0; i < c->count; i++)
                ids[count++] = c->ids[i];
            continue;
        }
        size_t added = merge_word(t, s, length, ids + count);
        if (length <= sizeof(c->text) && added <= sizeof(c->ids) / sizeof(c->ids[0])) {
            c->length = (unsigned char)length;
            c->count = (unsigned char)added;
            memcpy(c->text, s, length);
            memcpy(c->ids, ids + count, added * sizeof(int));
        }
        count += added;
    }
    return count;
}

// The longest added token that s begins with, -1 where there is none.
int added_token(const Tokenizer *t, const char *s, size_t n) {
    int best = -1;
    for (int i = 0; t->added_first[(unsigned char)*s] && i < t->added_count; i++) {
        int id = t->added[i], length = t->length[id];
        if ((size_t)length <= n && memcmp(t->text[id], s, (size_t)length) == 0 &&
            (best < 0 || length > t->length[best]))
            best = id;
    }
    return best;
}

// Text of `size` bytes to ids, for which there is room for size + 1 numbers. Returns how many there are.
size_t tokenizer_encode(Tokenizer *t, const char *text, size_t size, int *ids) {
    size_t count = 0;
    for (size_t start = 0, end = 0; start < size; start = end) {
        int id = -1;
        while (end < size && (id = added_token(t, text + end, size - end)) < 0)
            end++;
        count += encode_words(t, text + start, end - start, ids + count);
        if (id >= 0) {
            ids[count++] = id;
            end += (size_t)t->length[id];
        }
    }
    return count;
}

// The bytes of a token; those of several, one after the other, are the text again.
const char *tokenizer_text(const Tokenizer *t, int id, int *length) {
    *length = t->length[id];
    return t->text[id];
}

// ---- tokenizer.json

// GPT-2 writes tokens in JSON with one visible character for each byte: itself where it is visible in Latin-1, else the
// next of U+0100, U+0101, ... Hence "Ġ" (U+0120) for a space and "Ċ" (U+010A) for a newline.
void byte_alphabet(int32_t character[256]) {
    int32_t next = 256;
    for (int b = 0; b < 256; b++)
        character[b] = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae ? b : next++;
}

// From that alphabet to bytes. Returns how many, or -1 where a character is not of the alphabet.
int alphabet_to_bytes(const char *s, size_t n, char *out) {
    int32_t character[256], byte_of[0x144], code;
    byte_alphabet(character);
    memset(byte_of, -1, sizeof(byte_of));
    for (int b = 0; b < 256; b++)
        byte_of[character[b]] = b;
    int count = 0;
    for (size_t i = 0; i < n;) {
        i += (size_t)utf8_decode(s + i, n - i, &code);
        if (code < 0 || code >= 0x144 || byte_of[code] < 0)
            return -1;
        out[count++] = (char)byte_of[code];
    }
    return count;
}

// What a member must be, or is just as well without; anything else asks for other ids than ours. What wraps or cuts the
// finished ids (post-processor, truncation, padding) and the decoder do not matter here.
typedef struct Expected {
    const char *member, *value, *other;
} Expected;

void check_members(const char *path, const char *name, const Json *object, const Expected *list, size_t size) {
    for (const Expected *e = list; e < list + size / sizeof(*list); e++) {
        const Json *m = json_get(object, e->member);
        char number[32] = "null";
        const char *word = number;
        if (m && m->type == 'o')
            m = json_get(m, "type") ? json_get(m, "type") : m;
        if (m && m->type == 's')
            word = m->text;
        else if (m && m->type == 'n')
            snprintf(number, sizeof(number), "%g", m->number);
        else if (m && m->type != '0')
            word = m->type == 't' ? "true" : m->type == 'f' ? "false" : "something else";
        if (strcmp(word, e->value) != 0 && strcmp(word, e->other) != 0)
            fail("%s: %s %s is %s; this program follows \"%s\" only", path, name, e->member, word, e->value);
    }
}

// A token of n bytes (-1: not in the alphabet); `raw` is how the file writes it.
void read_token(Tokenizer *t, const char *path, const char *raw, const char *s, int n, const Json *id) {
    if (n <= 0)
        fail("%s: token \"%s\" is empty or not in GPT-2's byte alphabet", path, raw);
    if (!id || id->type != 'n' || !(id->number >= 0 && id->number < 1 << 24) || id->number != floor(id->number))
        fail("%s: the id of token \"%s\" is not a whole number from 0 to %d", path, raw, (1 << 24) - 1);
    int64_t *value = table_put(&t->ids, s, (size_t)n), number = (int64_t)id->number + 1;
    if (*value && *value != number)
        fail("%s: token \"%s\" is given twice, as %d and %d", path, raw, (int)*value - 1, (int)number - 1);
    *value = number;
}

// The vocabulary, from the model's "vocab" and from "added_tokens", which often are in both.
void read_vocabulary(Tokenizer *t, const char *path, const Json *vocab, const Json *added, char *bytes) {
    static const Expected flags[] = {
        {"single_word", "false", "null"}, {"lstrip", "false", "null"}, {"rstrip", "false", "null"}};
    for (const Json *a = added ? added->child : NULL; a; a = a->next) {
        const Json *content = json_get(a, "content"), *id = json_get(a, "id");
        if (!content || content->type != 's')
            fail("%s: an added token has no \"content\"", path);
        check_members(path, content->text, a, flags, sizeof(flags));
        read_token(t, path, content->text, content->text, (int)content->length, id);
        t->added = (int *)grow(t->added, (size_t)t->added_count, sizeof(int));
        t->added[t->added_count++] = (int)id->number;
    }
    for (const Json *v = vocab->child; v; v = v->next) {
        size_t n = strlen(v->key);
        int64_t known = table_get(&t->ids, v->key, n); // an added token once more, as it is
        if (!known || v->type != 'n' || v->number != (double)(known - 1))
            read_token(t, path, v->key, bytes, alphabet_to_bytes(v->key, n, bytes), v);
    }
    t->vocab = (int)t->ids.count;
    t->text = (char **)allocate(t->ids.count, sizeof(char *));
    t->length = (int *)allocate(t->ids.count, sizeof(int));
    for (const Entry *e = t->ids.entries; e < t->ids.entries + t->ids.slots; e++) {
        int id = (int)e->value - 1;
        if (id >= t->vocab || (id >= 0 && t->text[id]))
            fail("%s: token \"%.*s\" has id %d, but the ids of %d tokens are the numbers below that, each once", path,
                 (int)e->length, t->ids.bytes + e->start, id, t->vocab);
        if (id >= 0) {
            t->text[id] = t->ids.bytes + e->start;
            t->length[id] = (int)e->length;
        }
    }
}

// "merges": the rank is the place in the list; each is a string "left right" or a pair of strings.
void read_merges(Tokenizer *t, const char *path, const Json *merges, char *bytes) {
    int rank = 0;
    t->merges = (Merge *)allocate(1, sizeof(Merge));
    for (const Json *m = merges->child; m; m = m->next) {
        const Json *a = m->type == 'a' ? m->child : NULL, *b = a ? a->next : NULL;
        char *left = a ? a->text : m->text, *right = b && !b->next ? b->text : NULL;
        if (m->type == 's' && (right = strchr(left, ' ')) != NULL)
            *right++ = 0;
        if (!left || !right)
            fail("%s: merge %d is neither \"left right\" nor [\"left\", \"right\"]", path, rank + 1);
        int n = alphabet_to_bytes(left, strlen(left), bytes);
        int k = n < 0 ? -1 : alphabet_to_bytes(right, strlen(right), bytes + n);
        int64_t x = k < 0 ? 0 : table_get(&t->ids, bytes, (size_t)n);
        int64_t y = k < 0 ? 0 : table_get(&t->ids, bytes + n, (size_t)k);
        int64_t id = k < 0 ? 0 : table_get(&t->ids, bytes, (size_t)(n + k));
        if (!x || !y || !id)
            fail("%s: merge %d: \"%s\", \"%s\" and what they make are not all in the vocabulary", path, rank + 1, left,
                 right);
        const int pair[2] = {(int)x - 1, (int)y - 1};
        t->merges = (Merge *)grow(t->merges, (size_t)++rank, sizeof(Merge));
        t->merges[rank].rank = rank;
        t->merges[rank].id = (int)id - 1;
        *table_put(&t->pairs, pair, sizeof(pair)) = rank;
    }
}

Tokenizer *tokenizer_load(const char *path) {
    static const Expected in_root[] = {{"normalizer", "null", "null"}};
    static const Expected in_words[] = {
        {"type", "ByteLevel", "ByteLevel"}, {"use_regex", "true", "null"}, {"add_prefix_space", "false", "null"}};
    static const Expected in_model[] = {{"type", "BPE", "null"},
                                        {"dropout", "null", "0"},
                                        {"continuing_subword_prefix", "null", ""},
                                        {"end_of_word_suffix", "null", ""},
                                        {"byte_fallback", "false", "null"},
                                        {"ignore_merges", "false", "null"}};
    Tokenizer *t = (Tokenizer *)allocate(1, sizeof(Tokenizer));
    t->json = read_file(path, &t->json_size);
    Json *root = json_parse(t->json, t->json_size, path);
    const Json *words = json_get(root, "pre_tokenizer"), *list = json_get(words, "pretokenizers");
    if (list && list->child && !list->child->next) // a sequence of one
        words = list->child;
    const Json *model = json_get(root, "model"), *vocab = json_get(model, "vocab"), *merges = json_get(model, "merges");
    check_members(path, "file's", root, in_root, sizeof(in_root));
    check_members(path, "model's", model, in_model, sizeof(in_model));
    check_members(path, "pre_tokenizer's", words, in_words, sizeof(in_words));
    if (!vocab || vocab->type != 'o' || !merges || merges->type != 'a')
        fail("%s: not a tokenizer.json: expected a \"model\" with an object \"vocab\" and a list \"merges\"", path);
    char *bytes = (char *)allocate(t->json_size, 1); // room for any token
    read_vocabulary(t, path, vocab, json_get(root, "added_tokens"), bytes);
    read_merges(t, path, merges, bytes);
    free(bytes);
    json_free(root);
    for (int b = 0; b < 256; b++) {
        char byte = (char)b;
        t->byte_id[b] = (int)table_get(&t->ids, &byte, 1) - 1;
        if (t->byte_id[b] < 0)
            fail("%s: byte 0x%02x has no token; a byte-level vocabulary has all 256", path, b);
    }
    t->eot = (int)table_get(&t->ids, "<|endoftext|>", 13) - 1;
    if (t->eot < 0)
        fail("%s: the vocabulary has no <|endoftext|>", path);
    t->added = (int *)grow(t->added, (size_t)t->added_count, sizeof(int));
    t->added[t->added_count++] = t->eot; // also where it is in "vocab" only
    for (int i = 0; i < t->added_count; i++)
        t->added_first[(unsigned char)t->text[t->added[i]][0]] = 1;
    t->class_of = character_classes();
    t->cache = (CachedWord *)allocate(CACHED_WORDS, sizeof(CachedWord));
    return t;
}

// The same tokenizer for another thread: the tables are t's, which must outlive it; only the cache is its own.
Tokenizer *tokenizer_share(const Tokenizer *t) {
    Tokenizer *mine = (Tokenizer *)allocate(1, sizeof(Tokenizer));
    *mine = *t;
    mine->shared = 1;
    mine->cache = (CachedWord *)allocate(CACHED_WORDS, sizeof(CachedWord));
    return mine;
}

void tokenizer_free(Tokenizer *t) {
    if (t && !t->shared) {
        free(t->json);
        free(t->text);
        free(t->length);
        free(t->merges);
        free(t->added);
        free(t->class_of);
        table_free(&t->ids);
        table_free(&t->pairs);
    }
    if (t)
        free(t->cache);
    free(t);
}
