// The tokenizer: text to ids and back, by byte-pair encoding (BPE).
// Gives: tokenizer_encode, tokenizer_bound, tokenizer_text, tokenizer_pre, tokenizer_share, tokenizer_differs; and
// tokenizer_load, tokenizer_free of data/read_tokenizer.h. To data/tokenize.c, the trainer of vocabularies, also
// Table, Heap, first_word and byte_alphabet.
// Needs: data/read_tokenizer.h and what it includes.
// A vocabulary is a Hugging Face tokenizer.json: byte-level as GPT-2's, or of characters with bytes to fall back on,
// as SentencePiece has them. data/shape.h refuses any other.
//
// BPE is from Gage 1994, for the words of a text from Sennrich et al. 2016 (arXiv:1508.07909), over
// bytes from GPT-2 (Radford et al. 2019). Three steps lead from text to ids:
//
//   1. <|endoftext|> and other added tokens are cut out (data/added.h):
//      "A.<|endoftext|>It's" -> "A."  <|endoftext|>  "It's"
//   2. The text between them is cut into words, so that no token spans two words (data/split.h):
//      "A." -> "A" "."          "It's" -> "It" "'s"
//   3. Each word starts as its bytes, or, as in SentencePiece, as its characters. A list of merges, best
//      first, tells the neighbours that may become one token. Again and again the pair of the lowest
//      rank is merged, the leftmost if there are several, until no two neighbours are in the list.
//
// All 256 bytes are tokens, so every text can be encoded and comes back unchanged, UTF-8 or not. Only what a
// normalizer does first (data/normalize.h) does not come back.
#pragma once
#include "read_tokenizer.h"

// ---- encoding

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

// The symbols that a word begins with: its bytes, or its characters and the bytes of those that are no token. Returns
// how many they are.
int first_symbols(const Tokenizer *t, const char *word, size_t n, Symbol *s) {
    int count = 0;
    for (size_t i = 0, length = 1; i < n; i += length) {
        int id = -1;
        if (t->shape.kind == BYTE_FALLBACK) {
            int32_t code;
            length = (size_t)utf8_decode(word + i, n - i, &code);
            id = (int)table_get(&t->ids, word + i, length) - 1;
        }
        for (size_t k = i; k < i + length && id < 0; k++) {
            s[count++].id = t->byte_id[(unsigned char)word[k]];
        }
        if (id >= 0) {
            s[count++].id = id;
        }
    }
    return count;
}

// Step 3 for one word of n bytes, in n log n time. ids (n); returns how many ids there are.
size_t merge_word(const Tokenizer *t, const char *word, size_t n, int *ids) {
    if (n > INT32_MAX) {
        fail("a word of %zu bytes is too long to encode", n);
    }

    // At first each byte or character is a symbol, linked to its neighbours.
    Symbol *s = (Symbol *)allocate(n, sizeof(Symbol));
    int symbols = first_symbols(t, word, n, s);
    for (int i = 0; i < symbols; i++) {
        s[i].previous = i - 1;
        s[i].next = i + 1 < symbols ? i + 1 : -1;
    }

    // The heap gives the lowest rank, and of equal ranks the leftmost symbol.
    Heap heap = {NULL, 0};
    for (int i = 0; i < symbols; i++) {
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

// Step 3 for a word that may have been met before.
size_t encode_word(const Tokenizer *t, const char *s, size_t length, int *ids) {
    // Most words of a text have occurred before; the cache knows those that are short.
    size_t count = 0;
    int fits = length <= sizeof(t->cache->text);
    CachedWord *c = &t->cache[fits ? hash_bytes(s, length) % CACHED_WORDS : 0];
    if (c->length == length && memcmp(c->text, s, length) == 0) {
        for (int i = 0; i < c->count; i++) {
            ids[count++] = c->ids[i];
        }
        return count;
    }

    // A new word is encoded in full, and cached if it is short.
    int64_t whole = t->shape.ignore_merges ? table_get(&t->ids, s, length) : 0;
    if (whole) {
        ids[count++] = (int)whole - 1;
    } else {
        count = merge_word(t, s, length, ids);
    }
    if (fits && count <= COUNT(c->ids)) {
        c->length = (unsigned char)length;
        c->count = (unsigned char)count;
        memcpy(c->text, s, length);
        memcpy(c->ids, ids, count * sizeof(int));
    }
    return count;
}

// Text with "▁" (n bytes) is cut before each of them where the tokenizer wants that, or where no merge can lead over the
// place, so that the cache is of use.
size_t encode_underscored(const Tokenizer *t, const char *s, size_t n, int *ids) {
    size_t count = 0, from = 0;
    for (const char *at = s; (at = (const char *)memmem(at, n - (size_t)(at - s), UNDERSCORE, 3)) != NULL; at += 3) {
        size_t i = (size_t)(at - s);
        if (i > from && (t->shape.split || !t->joins[(unsigned char)s[i - 1]])) {
            count += encode_word(t, s + from, i - from, ids + count);
            from = i;
        }
    }
    return from < n ? count + encode_word(t, s + from, n - from, ids + count) : count;
}

// Steps 2 and 3 for n bytes without added tokens: cuts them by the rule `step` and those behind it, and encodes the
// words. ids (tokenizer_bound); returns how many ids there are.
size_t encode_words(const Tokenizer *t, int step, const char *s, size_t n, int *ids) {
    const Shape *shape = &t->shape;
    size_t count = 0, length;
    if (step == shape->cut_count) {
        return shape->kind == BYTE_FALLBACK ? encode_underscored(t, s, n, ids) : encode_word(t, s, n, ids);
    }

    // The last step of a byte-level tokenizer may put a space before each piece that has none.
    int is_last = step + 1 == shape->cut_count && shape->kind == BYTE_LEVEL;
    Bytes spaced = {NULL, 0, 0};
    if (is_last && shape->prefix && s[0] != ' ') {
        bytes_add(&spaced, " ", 1);
        bytes_add(&spaced, s, n);
        s = spaced.list;
        n = spaced.count;
    }
    for (const char *end = s + n; s < end; s += length) {
        length = next_piece(t->class_of, shape->cuts[step], s, (size_t)(end - s));
        count += is_last ? encode_word(t, s, length, ids + count) : encode_words(t, step + 1, s, length, ids + count);
    }
    free(spaced.list);
    return count;
}

// Text between added tokens (n bytes). at_start: is it the beginning of the whole text?
size_t encode_piece(const Tokenizer *t, const char *s, size_t n, int at_start, int *ids) {
    if (t->shape.spaces != REPLACE_LATER || !n) {
        return n ? encode_words(t, 0, s, n, ids) : 0;
    }
    Bytes b = {NULL, 0, 0};
    int has_one = s[0] == ' ' || (n >= 3 && !memcmp(s, UNDERSCORE, 3));
    int prefix = !has_one && (t->shape.prefix == PREFIX_MISSING || (t->shape.prefix == PREFIX_FIRST && at_start));
    underscore_text(&b, s, n, 1, prefix);
    size_t count = encode_words(t, 0, b.list, b.count, ids);
    free(b.list);
    return count;
}

// Step 1 for one of the two lists of added tokens. What is between them goes on: after `first` to the normalizer and
// then to the list `later`, after that to the words.
size_t encode_between(const Tokenizer *t, const AddedList *list, const char *s, size_t n, int at_start, int *ids);

// Normalizes text between added tokens of the first list.
size_t encode_normalized(const Tokenizer *t, const char *s, size_t n, int at_start, int *ids) {
    Bytes composed = {NULL, 0, 0}, underscored = {NULL, 0, 0};
    if (t->nfc && nfc_text(t->nfc, &composed, s, n)) {
        s = composed.list;
        n = composed.count;
    }
    if (n && (t->shape.spaces == REPLACE_FIRST || t->shape.prefix == PREFIX_ALWAYS)) {
        underscore_text(&underscored, s, n, t->shape.spaces == REPLACE_FIRST, t->shape.prefix == PREFIX_ALWAYS);
        s = underscored.list;
        n = underscored.count;
    }
    size_t count = t->later.count ? encode_between(t, &t->later, s, n, at_start, ids) : encode_piece(t, s, n, at_start, ids);
    free(composed.list);
    free(underscored.list);
    return count;
}

size_t encode_between(const Tokenizer *t, const AddedList *list, const char *s, size_t n, int at_start, int *ids) {
    int is_first = list == &t->first;
    size_t count = 0, done = 0, from = 0, at;
    const Added *added;
    do {
        // Look for the next added token. White space at its sides may belong to it, but not to two of them.
        size_t end = n, behind = n;
        added = next_added(list, s, n, from, &at);
        if (added) {
            from = at + added->length;
            end = added->lstrip ? space_before(t->class_of, s, done, at > done ? at : done) : at;
            behind = added->rstrip ? space_behind(t->class_of, s, n, from) : from;
        }
        if (end > done) {
            int begins = at_start && done == 0;
            count += is_first ? encode_normalized(t, s + done, end - done, begins, ids + count)
                              : encode_piece(t, s + done, end - done, begins, ids + count);
        }
        if (added) {
            ids[count++] = added->id;
        }
        done = behind;
    } while (added);
    return count;
}

// How many ids a text of `size` bytes has at most. NFC makes a character three times as long at most, a space becomes the
// three bytes of "▁", and so does the prefix of each piece. A text that is one space can have six ids.
size_t tokenizer_bound(const Tokenizer *t, size_t size) {
    const Shape *s = &t->shape;
    return s->nfc || s->prefix || s->spaces ? 4 * size + 2 : size + 1;
}

// Turns text of `size` bytes into ids and returns their number. The caller gives ids (tokenizer_bound).
size_t tokenizer_encode(Tokenizer *t, const char *text, size_t size, int *ids) {
    return encode_between(t, &t->first, text, size, 1, ids);
}

// The bytes of a token, without a NUL; *length is their number. The bytes of all tokens, one after
// the other, are the text again, where nothing was normalized; with shape.strip, without the first space.
const char *tokenizer_text(const Tokenizer *t, int id, int *length) {
    *length = t->length[id];
    return t->text[id];
}

// What llama.cpp calls the way in which this tokenizer cuts text into words; NULL if it has no name for it.
const char *tokenizer_pre(const Tokenizer *t) {
    const Shape *s = &t->shape;
    Cut first = s->cut_count ? s->cuts[0] : CUT_NOTHING, second = s->cut_count > 1 ? s->cuts[1] : CUT_NOTHING;
    if (s->kind == BYTE_FALLBACK) {
        return s->cut_count || s->split ? NULL : "default";
    }
    if (s->cut_count == 1 || (s->cut_count == 2 && second == CUT_NOTHING)) {
        if (first == CUT_LLAMA3) {
            return s->ignore_merges ? "llama-bpe" : "dbrx";
        }
        if (first == CUT_QWEN2) {
            return "qwen2";
        }
        return first == CUT_GPT2 ? "gpt-2" : NULL;
    }
    return s->cut_count == 2 && first == CUT_DIGITS && second == CUT_GPT2 ? "smollm" : NULL;
}

// ---- comparing and sharing

// Does `large` give every text the ids that `small` gives it, but for added tokens behind those of small? Returns -1 if
// so, else the first token that differs, or small's number of tokens where the merges or
// the rules of cutting do.
int tokenizer_differs(const Tokenizer *large, const Tokenizer *small) {
    if (memcmp(&large->shape, &small->shape, sizeof(Shape)) != 0) {
        return small->vocab;
    }
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
