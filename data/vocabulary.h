// Trains a vocabulary and writes it as a tokenizer.json.
// Gives: train_vocabulary. Needs: data/tokenizer.h; SEPARATOR of data/tokenize.c, which includes it.
//
// Training a vocabulary: the commonest pair of neighbours becomes a token, again and again. Each
// pair knows its count and the words that it occurs in, so that a merge touches only those words.
// If pairs are equally common, the lower left id goes first, then the lower right id.
#pragma once
#include "tokenizer.h"

typedef struct Word {
    int *ids; // (length)
    int length;
    int64_t count; // how often the word occurs in the text
} Word;

typedef struct TokenPair {
    int left, right; // ids
    int token;       // the token that the two became; 0: none yet
    int changed;     // is it in the list of pairs that became more common?
    int64_t count;   // how often the pair occurs in the text
    int *words;      // (word_count): the words that it occurs in, or did
    int word_count;
} TokenPair;

typedef struct Trainer {
    Tokenizer tokens; // only text, length, vocab and ids; each text is an allocation of its own
    Word *words;      // (word_count)
    int *ids;         // of all words, one after the other
    int word_count;
    Table table; // from two ids, as int[2], to an index in pairs, counted from 1
    TokenPair *pairs; // (pair_count)
    int pair_count;
    int *changed; // (changed_count): indices of pairs to be pushed
    int changed_count;
    Heap heap;        // of (-count, left << 32 | right)
    int (*merges)[2]; // (merge_count,2): left and right, in order
    int merge_count;
} Trainer;

// Counts a pair once more (sign 1) or once less (sign -1) in a word.
static void count_pair(Trainer *r, int left, int right, int word, int sign) {
    const int ids[2] = {left, right};
    int64_t *number = table_put(&r->table, ids, sizeof(ids));

    // The first time, the pair is added to the list of all pairs.
    if (*number == 0) {
        TokenPair fresh = {left, right, 0, 0, 0, NULL, 0};
        r->pairs = (TokenPair *)grow(r->pairs, (size_t)r->pair_count, sizeof(TokenPair));
        r->pairs[r->pair_count++] = fresh;
        *number = r->pair_count;
    }

    TokenPair *p = &r->pairs[*number - 1];
    p->count += sign * r->words[word].count;

    // A pair that became more common must know the word and must go into the heap again.
    if (sign > 0 && (p->word_count == 0 || p->words[p->word_count - 1] != word)) {
        p->words = (int *)grow(p->words, (size_t)p->word_count, sizeof(int));
        p->words[p->word_count++] = word;
    }
    if (sign > 0 && !p->changed) {
        p->changed = 1;
        r->changed = (int *)grow(r->changed, (size_t)r->changed_count, sizeof(int));
        r->changed[r->changed_count++] = (int)*number - 1;
    }
}

// A pair that occurs once is no pattern and stays out of the heap.
static void push_pair(Trainer *r, const TokenPair *p) {
    if (p->count > 1) {
        heap_push(&r->heap, -p->count, (int64_t)p->left << 32 | p->right);
    }
}

// The commonest pair; NULL if none occurs twice. The heap does not learn that a pair became rarer,
// so an item with an old count goes back with the present one. A pair that became more common was
// pushed again already.
static TokenPair *pop_pair(Trainer *r) {
    while (r->heap.count > 0) {
        Item item = heap_pop(&r->heap);
        const int ids[2] = {(int)(item.second >> 32), (int)(item.second & 0xffffffff)};
        TokenPair *p = &r->pairs[table_get(&r->table, ids, sizeof(ids)) - 1];
        if (p->count == -item.first) {
            return p;
        }
        if (p->count < -item.first) {
            push_pair(r, p);
        }
    }
    return NULL;
}

// Replaces left and right by `token` in one word, from left to right: "aaa" has one pair "aa".
static void merge_in_word(Trainer *r, int word, int left, int right, int token) {
    int *s = r->words[word].ids;
    int n = r->words[word].length, out = 0;
    for (int i = 0; i < n; i++) {
        if (i + 1 == n || s[i] != left || s[i + 1] != right) {
            s[out++] = s[i];
            continue;
        }

        // The pair is gone, and so are the pairs with its neighbours; the token has new ones.
        count_pair(r, left, right, word, -1);
        if (out > 0) {
            count_pair(r, s[out - 1], left, word, -1);
            count_pair(r, s[out - 1], token, word, 1);
        }
        if (i + 2 < n) {
            count_pair(r, right, s[i + 2], word, -1);
            count_pair(r, token, s[i + 2], word, 1);
        }
        s[out++] = token;
        i++;
    }
    r->words[word].length = out;
}

// Writes a token in GPT-2's alphabet, as a JSON string.
static void write_token(FILE *file, const Tokenizer *t, int id) {
    int32_t character[256];
    char *text = (char *)allocate((size_t)t->length[id], 2); // one or two bytes of UTF-8 each
    char *end = text;
    byte_alphabet(character);
    for (int i = 0; i < t->length[id]; i++) {
        end = utf8_encode(end, character[(unsigned char)t->text[id][i]]);
    }
    json_write_string(file, text, (size_t)(end - text));
    free(text);
}

// Writes a tokenizer.json; merges (merge_count,2).
static void write_tokenizer(FILE *file, const Tokenizer *t, int (*merges)[2], int merge_count) {
    static const char byte_level[] = "\"type\": \"ByteLevel\", \"add_prefix_space\": false, "
                                     "\"trim_offsets\": true, \"use_regex\": true";

    // These members are the same in every file.
    fprintf(file,
            "{\n"
            "  \"version\": \"1.0\",\n"
            "  \"truncation\": null,\n"
            "  \"padding\": null,\n"
            "  \"added_tokens\": [\n"
            "    {\"id\": 0, \"content\": \"%s\", \"single_word\": false, \"lstrip\": false, "
            "\"rstrip\": false, \"normalized\": false, \"special\": true}\n"
            "  ],\n"
            "  \"normalizer\": null,\n"
            "  \"pre_tokenizer\": {%s},\n"
            "  \"post_processor\": null,\n"
            "  \"decoder\": {%s},\n",
            SEPARATOR, byte_level, byte_level);
    fprintf(file, "  \"model\": {\n"
                  "    \"type\": \"BPE\",\n"
                  "    \"dropout\": null,\n"
                  "    \"unk_token\": null,\n"
                  "    \"continuing_subword_prefix\": null,\n"
                  "    \"end_of_word_suffix\": null,\n"
                  "    \"fuse_unk\": false,\n"
                  "    \"byte_fallback\": false,\n"
                  "    \"ignore_merges\": false,\n");

    // Tokens are in the order of their ids, merges in the order of their ranks.
    fprintf(file, "    \"vocab\": {");
    for (int i = 0; i < t->vocab; i++) {
        fprintf(file, i ? ",\n      " : "\n      ");
        write_token(file, t, i);
        fprintf(file, ": %d", i);
    }
    fprintf(file, "\n    },\n    \"merges\": [");
    for (int i = 0; i < merge_count; i++) {
        fprintf(file, i ? ",\n      [" : "\n      [");
        write_token(file, t, merges[i][0]);
        fprintf(file, ", ");
        write_token(file, t, merges[i][1]);
        fprintf(file, "]");
    }
    fprintf(file, "\n    ]\n  }\n}\n");
}

// Gives the next id to a token, whose text stays where it is.
static void add_token(Tokenizer *t, char *text, int length) {
    int id = t->vocab++;
    t->text[id] = text;
    t->length[id] = length;
    *table_put(&t->ids, text, (size_t)length) = id + 1;
}

// Makes t, for `vocab` tokens, and the first of them: <|endoftext|> and the 256 bytes.
static void add_first_tokens(Tokenizer *t, int vocab) {
    t->text = (char **)allocate((size_t)vocab, sizeof(char *));
    t->length = (int *)allocate((size_t)vocab, sizeof(int));
    add_token(t, copy_text(SEPARATOR), (int)strlen(SEPARATOR));
    for (int b = 0; b < 256; b++) {
        char *byte = (char *)allocate(1, 1);
        *byte = (char)b;
        add_token(t, byte, 1);
    }
}

// Turns the counted words into ids, those of their bytes, and counts all pairs.
static void add_words(Trainer *r, const Table *words) {
    r->ids = (int *)allocate(words->used, sizeof(int));
    for (size_t i = 0; i < words->used; i++) {
        r->ids[i] = 1 + (unsigned char)words->bytes[i];
    }

    r->words = (Word *)allocate(words->count, sizeof(Word));
    for (size_t i = 0; i < words->entry_count; i++) {
        const Entry *e = &words->entries[i];
        if (!e->value) {
            continue;
        }
        Word word = {r->ids + e->start, (int)e->length, e->value};
        r->words[r->word_count] = word;
        for (int k = 0; k + 1 < word.length; k++) {
            count_pair(r, word.ids[k], word.ids[k + 1], r->word_count, 1);
        }
        r->word_count++;
    }
}

// Notes a merge and makes its token, unless there is one of the same bytes (a+bc and ab+c).
static void add_merge(Trainer *r, TokenPair *p) {
    Tokenizer *t = &r->tokens;
    int left = t->length[p->left], n = left + t->length[p->right];
    char *text = (char *)allocate((size_t)n, 1);
    memcpy(text, t->text[p->left], (size_t)left);
    memcpy(text + left, t->text[p->right], (size_t)(n - left));

    p->token = (int)table_get(&t->ids, text, (size_t)n) - 1;
    if (p->token < 0) {
        p->token = t->vocab;
        add_token(t, text, n);
    } else {
        free(text);
    }

    r->merges = (int(*)[2])grow(r->merges, (size_t)r->merge_count, sizeof(*r->merges));
    r->merges[r->merge_count][0] = p->left;
    r->merges[r->merge_count][1] = p->right;
    r->merge_count++;
}

static void free_trainer(Trainer *r) {
    for (int i = 0; i < r->tokens.vocab; i++) {
        free(r->tokens.text[i]);
    }
    for (int i = 0; i < r->pair_count; i++) {
        free(r->pairs[i].words);
    }
    table_free(&r->tokens.ids);
    table_free(&r->table);
    free(r->tokens.text);
    free(r->tokens.length);
    free(r->merges);
    free(r->ids);
    free(r->words);
    free(r->pairs);
    free(r->changed);
    free(r->heap.items);
}

// Makes at most `vocab` tokens, the first ones and those of the commonest pairs, and writes them.
static void train_vocabulary(const Table *words, int vocab, FILE *file) {
    Trainer r = {0};
    add_first_tokens(&r.tokens, vocab);
    add_words(&r, words);
    while (r.tokens.vocab < vocab) {
        // Find the commonest pair, after the pairs that became more common are in the heap.
        while (r.changed_count > 0) {
            TokenPair *p = &r.pairs[r.changed[--r.changed_count]];
            p->changed = 0;
            push_pair(&r, p);
        }
        TokenPair *p = pop_pair(&r);
        if (!p) {
            break;
        }

        // A pair that has a token has arisen once more, out of later tokens.
        if (!p->token) {
            add_merge(&r, p);
        }

        // Merge it in all its words. *p is copied first, because r.pairs moves when it grows.
        TokenPair merged = *p;
        p->words = NULL;
        p->word_count = 0;
        for (int i = 0; i < merged.word_count; i++) {
            merge_in_word(&r, merged.words[i], merged.left, merged.right, merged.token);
        }
        free(merged.words);
    }
    if (r.tokens.vocab < vocab) {
        fprintf(stderr, "%s: the text has patterns for %d tokens only, not %d\n", program_name,
                r.tokens.vocab, vocab);
    }
    write_tokenizer(file, &r.tokens, r.merges, r.merge_count);
    free_trainer(&r);
}
