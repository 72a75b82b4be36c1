// From text to tokens: trains a byte-level BPE vocabulary (or takes one), and writes the token files that train_moe
// reads.
//
//     data/tokenize --out data/mine mine-train.txt mine-valid.txt
//     data/tokenize --tokenizer gpt2/tokenizer.json --out data/mine mine.txt
//     data/tokenize --tokenizer data/mine/tokenizer.json --ids hello.txt
//
// The text passes by in blocks, so it may be larger than memory: once to count its words, from which the vocabulary is
// made, and once to encode it. Documents are separated by <|endoftext|>. Every result is the same with any number of
// threads, and nothing under its final name is touched before everything is written.


#include "tokenizer.h"
#include "loader.h"
#include <getopt.h>

#define BLOCK_BYTES  (8 << 20)   // of text at a time; a longer document makes it grow
#define SHARD_TOKENS 100000000   // of a token file
#define WORD_MEMORY  (256 << 20) // bytes for counting words
#define SEPARATOR    "<|endoftext|>"

static volatile sig_atomic_t interrupted;

static void on_signal(int number) { // the second one ends at once
    interrupted = 1;
    signal(number, SIG_DFL);
}

static void stop_if_interrupted(void) {
    if (interrupted)
        fail("interrupted; nothing was changed");
}

// ----------------------------------------------------------------------------
// Cleaning (--clean): what web-made story collections such as TinyStories are known for.

enum { MOJIBAKE, CONTROLS, STRAYS, BLANKS, EMPTY, CUT_OFF, TALLIES };
static const char *const tally_names[TALLIES] = {"characters of mojibake repaired",
                                                 "carriage returns and NULs removed",
                                                 "stray pieces of separators removed",
                                                 "superfluous blanks and blank lines removed",
                                                 "empty documents dropped",
                                                 "truncated documents dropped"};

// What Windows-1252 makes of the bytes 0x80 to 0x9f.
static const int32_t windows_1252[32] = {0x20ac, 0x81,   0x201a, 0x192,  0x201e, 0x2026, 0x2020, 0x2021,
                                         0x2c6,  0x2030, 0x160,  0x2039, 0x152,  0x8d,   0x17d,  0x8f,
                                         0x90,   0x2018, 0x2019, 0x201c, 0x201d, 0x2022, 0x2013, 0x2014,
                                         0x2dc,  0x2122, 0x161,  0x203a, 0x153,  0x9d,   0x17e,  0x178};

// Mojibake is UTF-8 that was read as Windows-1252 and written as UTF-8 once more, so that ’ became â€™. Where s begins
// with such a character, puts the right one into out and returns the bytes of s that it replaces, else 0. It looks for
// those that English text has: Latin-1 letters, punctuation, emoji.
static size_t repair_mojibake(const char *s, size_t n, char out[4], int *length) {
    size_t used[5] = {0};
    int32_t code;
    int have = 0;
    for (; have < 4 && used[have] < n; have++) {
        used[have + 1] = used[have] + (size_t)utf8_decode(s + used[have], n - used[have], &code);
        int byte = code >= 0x80 && code <= 0xff ? (int)code : -1;
        for (int i = 0; i < 32; i++) {
            if (windows_1252[i] == code)
                byte = 0x80 + i;
        }
        if (byte < 0)
            break;
        out[have] = (char)byte;
    }
    if (have < 2 || !strchr("\xc2\xc3\xe2\xef\xf0", out[0]))
        return 0;
    *length = utf8_decode(out, (size_t)have, &code);
    if (code >= 0xa0)
        return used[*length];
    if (memcmp(out, "\xe2\x80", 2) != 0)
        return 0;
    memcpy(out, "\xe2\x80\x9d", 3); // â€ alone was ”, whose last byte Windows-1252 does not have
    *length = 3;
    return used[2];
}

// Cleans n bytes in place; returns how many are left.
static size_t clean_text(char *s, size_t n, int tally[TALLIES]) {
    size_t end = 0, i;
    for (int found = 1; found; tally[MOJIBAKE] += found) { // until nothing is found: some texts were mangled twice
        found = 0;
        for (i = end = 0; i < n;) {
            char right[4];
            int length;
            size_t used = (unsigned char)s[i] < 0xc2 ? 0 : repair_mojibake(s + i, n - i, right, &length);
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
    }
    for (i = end = 0; i < n;) {
        char c = s[i++];
        if (c == 'e' && n - i >= 8 && memcmp(s + i, "ndoftext", 8) == 0) { // with what is left of <| and |>
            while (end > 0 && (s[end - 1] == '|' || s[end - 1] == '<'))
                end--;
            for (i += 8; i < n && (s[i] == '|' || s[i] == '>');)
                i++;
            tally[STRAYS]++;
            continue;
        }
        if (c == '\r' || c == 0) {
            tally[CONTROLS]++;
            if (c == 0 || (i < n && s[i] == '\n'))
                continue;
            c = '\n';
        }
        if (c == '\n') { // no blanks at the end of a line, no two blank lines in a row
            size_t before = end;
            while (end > 0 && (s[end - 1] == ' ' || s[end - 1] == '\t'))
                end--;
            int drop = end > 1 && s[end - 1] == '\n' && s[end - 2] == '\n';
            tally[BLANKS] += drop || end < before;
            if (drop)
                continue;
        }
        s[end++] = c;
    }
    return end;
}

// Does a story end as one does: with a full stop or the like, perhaps behind it a quotation mark, or with "The End"?
static int ends_well(const char *s, size_t n) {
    static const char *const endings[] = {"\xe2\x80\x9d", "\xe2\x80\x99", "\xe2\x80\xa6",
                                          "The End",      "The end",      "THE END"};
    if (n > 0 && memchr(".!?\"')*~", s[n - 1], 8))
        return 1;
    for (size_t i = 0; i < sizeof endings / sizeof endings[0]; i++) {
        size_t length = strlen(endings[i]);
        if (n >= length && memcmp(s + n - length, endings[i], length) == 0)
            return 1;
    }
    return 0;
}

// ----------------------------------------------------------------------------
// Reading: blocks of whole documents.

typedef struct Document {
    size_t start, length, ids;
    int edge; // before the first or behind the last separator, where nothing is normal
} Document;

typedef struct Reader {
    char **paths;
    int path_count, clean, next, valid; // next: file to open; valid: is the open one validation text?
    FILE *file;
    char *bytes;
    size_t room, filled, used; // of bytes; used: up to here documents are cut
    Document *documents;
    size_t count;
    int64_t total, done, kept; // bytes of all files, bytes read; documents kept
    int tally[TALLIES];
    const char *label;
    double started, shown;
} Reader;

static int is_valid_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return strstr(slash ? slash : path, "valid") != NULL;
}

// On a terminal one line that is written again and again, into a pipe a line every ten seconds.
static void show_progress(Reader *r, int finished) {
    double now = seconds(), elapsed = now - r->started, share = (double)r->done / (double)r->total;
    int terminal = isatty(2);
    if (finished ? !terminal || r->shown == r->started : now - r->shown < (terminal ? 0.1 : 10))
        return;
    r->shown = now;
    fprintf(stderr, "%s%s: %3.0f%%, %.1f MB/s, %.0f s left%s", terminal ? "\r" : "", r->label, 100 * share,
            (double)r->done / 1e6 / elapsed, elapsed / share - elapsed, terminal && !finished ? "   " : "   \n");
}

static void rewind_reader(Reader *r, const char *label) {
    r->next = 0;
    r->done = r->kept = 0;
    memset(r->tally, 0, sizeof(r->tally));
    r->label = label;
    r->started = r->shown = seconds();
}

static void add_document(Reader *r, size_t end, int edge) { // from `used` to `end`
    Document d = {r->used, end - r->used, 0, edge};
    r->documents = (Document *)grow(r->documents, r->count, sizeof(Document));
    r->documents[r->count++] = d;
}

static int is_blank(char c) {
    return c && strchr(" \t\n\v\f\r", c);
}

static void trim_document(Reader *r, Document *d) {
    int tally[TALLIES] = {0};
    char *s = r->bytes;
    if (r->clean)
        d->length = clean_text(s + d->start, d->length, tally);
    while (d->length > 0 && is_blank(s[d->start]))
        d->start++, d->length--;
    while (d->length > 0 && is_blank(s[d->start + d->length - 1]))
        d->length--;
    tally[EMPTY] = d->length == 0 && !d->edge;
    tally[CUT_OFF] = d->length > 0 && r->clean && !ends_well(s + d->start, d->length);
    if (tally[CUT_OFF])
        d->length = 0;
    for (int k = 0; k < TALLIES; k++) {
#pragma omp atomic
        r->tally[k] += tally[k];
    }
}

// Fills `documents`: those of the next block that are not empty. Returns 0 behind the last block of the last file.
static int next_block(Reader *r) {
    for (r->count = 0; r->count == 0;) {
        int edge = !r->file;
        stop_if_interrupted();
        if (!r->file && r->next == r->path_count) {
            show_progress(r, 1);
            return 0;
        }
        const char *path = r->paths[r->next];
        if (!r->file) {
            r->valid = is_valid_name(path);
            r->file = fopen(path, "rb");
            r->filled = r->used = 0;
        }
        if (!r->file)
            fail("%s: %s", path, strerror(errno));
        r->filled -= r->used;
        if (r->filled == r->room) // at first, and for a document longer than the block
            r->bytes = (char *)reallocate(r->bytes, r->room = r->room ? 2 * r->room : BLOCK_BYTES, 1);
        memmove(r->bytes, r->bytes + r->used, r->filled);
        r->used = 0;
        size_t got = fread(r->bytes + r->filled, 1, r->room - r->filled, r->file);
        if (ferror(r->file))
            fail("%s: %s", path, strerror(errno));
        r->filled += got;
        r->done += (int64_t)got;
        const char *at;
        while ((at = (char *)memmem(r->bytes + r->used, r->filled - r->used, SEPARATOR, strlen(SEPARATOR))) != NULL) {
            add_document(r, (size_t)(at - r->bytes), edge);
            r->used = (size_t)(at - r->bytes) + strlen(SEPARATOR);
            edge = 0;
        }
        if (r->filled < r->room) {
            add_document(r, r->filled, 1);
            r->used = r->filled;
            fclose(r->file);
            r->file = NULL;
            r->next++;
        }
#pragma omp parallel for schedule(dynamic, 16)
        for (int64_t i = 0; i < (int64_t)r->count; i++)
            trim_document(r, &r->documents[i]);
        size_t kept = 0;
        for (size_t i = 0; i < r->count; i++) {
            if (r->documents[i].length > 0)
                r->documents[kept++] = r->documents[i];
        }
        r->count = kept;
        r->kept += (int64_t)kept;
        show_progress(r, 0);
    }
    return 1;
}

// ----------------------------------------------------------------------------
// Counting words: a table from each different word to how often it stands in the text.

static void add_counts(Table *sum, const Table *t, int64_t at_least) { // of the words that occur so often
    for (const Entry *e = t->entries; e < t->entries + t->slots; e++) {
        if (e->value >= at_least)
            *table_put(sum, t->bytes + e->start, e->length) += e->value;
    }
}

// Every thread counts in its own table and the sums are taken after each block, so that when rare words are given up,
// to keep the table in memory, they are the same ones with any number of threads.
static Table count_words(Reader *r) {
    unsigned char *class_of = character_classes();
    int threads = thread_count(), gave_up = 0;
    Table words = {0}, *mine = (Table *)allocate((size_t)threads, sizeof(Table));
    rewind_reader(r, "counting words");
    while (next_block(r)) {
        if (r->valid)
            continue;
#pragma omp parallel for schedule(dynamic, 16)
        for (int64_t i = 0; i < (int64_t)r->count; i++) {
            const char *s = r->bytes + r->documents[i].start;
            size_t length;
            for (size_t n = r->documents[i].length; n > 0; s += length, n -= length) {
                length = first_word(class_of, s, n);
                if (length > 1000) // what has no words, as DNA, counts in pieces
                    length = 1000;
                ++*table_put(&mine[thread_number()], s, length);
            }
        }
        for (int t = 0; t < threads; t++) {
            add_counts(&words, &mine[t], 1);
            table_free(&mine[t]);
        }
        for (int64_t least = 2; words.slots * sizeof(Entry) + words.filled > WORD_MEMORY; least *= 2) {
            Table rest = {0};
            add_counts(&rest, &words, least);
            table_free(&words);
            words = rest;
            gave_up = 1;
        }
    }
    if (gave_up)
        fprintf(stderr, "%s: too many different words: the rarest do not count\n", program_name);
    free(mine);
    free(class_of);
    return words;
}

// ----------------------------------------------------------------------------
// Training a vocabulary: the commonest pair of neighbours becomes a token, again and again. Each pair knows how often
// it occurs and in which words, so that a merge touches only these. Of equally common pairs the one of the lower left
// id goes first, then that of the lower right id.

typedef struct Word {
    int *ids, length;
    int64_t count;
} Word;

typedef struct Pair {
    int left, right, token; // the token it became, 0: none
    int changed;            // is it in the list of those that became more common?
    int64_t count;
    int *words, word_count; // where it occurs, or did
} Pair;

typedef struct Trainer {
    Word *words;
    Table table; // from two ids to a place in pairs, counted from 1
    Pair *pairs;
    int *changed, pair_count, changed_count;
    Heap heap; // of -count, left << 32 | right
} Trainer;

static void count_pair(Trainer *r, int left, int right, int word, int sign) {
    const int ids[2] = {left, right};
    int64_t *place = table_put(&r->table, ids, sizeof(ids));
    if (*place == 0) {
        Pair fresh = {left, right, 0, 0, 0, NULL, 0};
        r->pairs = (Pair *)grow(r->pairs, (size_t)r->pair_count, sizeof(Pair));
        r->pairs[r->pair_count++] = fresh;
        *place = r->pair_count;
    }
    Pair *p = &r->pairs[*place - 1];
    p->count += sign * r->words[word].count;
    if (sign > 0 && (p->word_count == 0 || p->words[p->word_count - 1] != word)) {
        p->words = (int *)grow(p->words, (size_t)p->word_count, sizeof(int));
        p->words[p->word_count++] = word;
    }
    if (sign > 0 && !p->changed) {
        p->changed = 1;
        r->changed = (int *)grow(r->changed, (size_t)r->changed_count, sizeof(int));
        r->changed[r->changed_count++] = (int)*place - 1;
    }
}

static void push_pair(Trainer *r, const Pair *p) {
    if (p->count > 1) // what occurs once is no pattern
        heap_push(&r->heap, -p->count, (int64_t)p->left << 32 | p->right);
}

// The commonest pair, NULL where none occurs twice. A pair's count falls without notice: what comes up with an old
// count goes back with its present one. Counts that rise were pushed anew.
static Pair *pop_pair(Trainer *r) {
    while (r->heap.count > 0) {
        Item item = heap_pop(&r->heap);
        const int ids[2] = {(int)(item.second >> 32), (int)(item.second & 0xffffffff)};
        Pair *p = &r->pairs[table_get(&r->table, ids, sizeof(ids)) - 1];
        if (p->count == -item.first)
            return p;
        if (p->count < -item.first)
            push_pair(r, p);
    }
    return NULL;
}

// In one word left and right become `token`; from left to right, since in "aaa" the pair "aa" is merged only once.
static void merge_in_word(Trainer *r, int word, int left, int right, int token) {
    int *s = r->words[word].ids, n = r->words[word].length, out = 0;
    for (int i = 0; i < n; i++) {
        if (i + 1 == n || s[i] != left || s[i + 1] != right) {
            s[out++] = s[i];
            continue;
        }
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

static void write_token(FILE *file, const Tokenizer *t, int id) { // in GPT-2's alphabet, as a JSON string
    int32_t character[256];
    char *text = (char *)allocate((size_t)t->length[id], 2), *end = text;
    byte_alphabet(character);
    for (int i = 0; i < t->length[id]; i++)
        end = utf8_encode(end, character[(unsigned char)t->text[id][i]]);
    json_write_string(file, text, (size_t)(end - text));
    free(text);
}

// Hugging Face's file; merges (merge_count,2): left and right, in order.
static void write_tokenizer(FILE *file, const Tokenizer *t, const int (*merges)[2], int merge_count) {
    fprintf(file,
            "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n  \"added_tokens\": [\n"
            "    {\"id\": 0, \"content\": \"%s\", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, "
            "\"normalized\": false, \"special\": true}\n  ],\n  \"normalizer\": null,\n",
            SEPARATOR);
    static const char byte_level[] = "\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, "
                                     "\"use_regex\": true";
    fprintf(file, "  \"pre_tokenizer\": {%s},\n  \"post_processor\": null,\n  \"decoder\": {%s},\n", byte_level,
            byte_level);
    fprintf(file,
            "  \"model\": {\n    \"type\": \"BPE\",\n    \"dropout\": null,\n    \"unk_token\": null,\n"
            "    \"continuing_subword_prefix\": null,\n    \"end_of_word_suffix\": null,\n    \"fuse_unk\": false,\n"
            "    \"byte_fallback\": false,\n    \"ignore_merges\": false,\n    \"vocab\": {");
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

static void add_token(Tokenizer *t, Table *ids, char *text, int length) { // which stays where it is
    t->text[t->vocab] = text;
    t->length[t->vocab++] = length;
    *table_put(ids, text, (size_t)length) = t->vocab;
}

// Writes a tokenizer.json of `vocab` tokens: <|endoftext|>, the 256 bytes, and what the words' commonest pairs make.
static void train_vocabulary(const Table *words, int vocab, FILE *file) {
    Trainer r = {0};
    Tokenizer t = {0}; // text, length and vocab only
    t.text = (char **)allocate((size_t)vocab, sizeof(char *));
    t.length = (int *)allocate((size_t)vocab, sizeof(int));
    add_token(&t, &t.ids, strdup(SEPARATOR), (int)strlen(SEPARATOR));
    for (int b = 0; b < 256; b++) {
        char *byte = (char *)allocate(1, 1);
        *byte = (char)b;
        add_token(&t, &t.ids, byte, 1);
    }
    int *ids = (int *)allocate(words->filled, sizeof(int)), word_count = 0, merge_count = 0, (*merges)[2] = NULL;
    for (size_t i = 0; i < words->filled; i++)
        ids[i] = 1 + (unsigned char)words->bytes[i];
    r.words = (Word *)allocate(words->count, sizeof(Word));
    for (const Entry *e = words->entries; e < words->entries + words->slots; e++) {
        if (!e->value)
            continue;
        Word word = {ids + e->start, (int)e->length, e->value};
        r.words[word_count] = word;
        for (int k = 0; k + 1 < word.length; k++)
            count_pair(&r, word.ids[k], word.ids[k + 1], word_count, 1);
        word_count++;
    }
    while (t.vocab < vocab) {
        stop_if_interrupted();
        while (r.changed_count > 0) {
            Pair *p = &r.pairs[r.changed[--r.changed_count]];
            p->changed = 0;
            push_pair(&r, p);
        }
        Pair *p = pop_pair(&r);
        if (!p)
            break;
        if (!p->token) { // else it has arisen once more, out of later tokens
            int left = t.length[p->left], n = left + t.length[p->right];
            char *text = (char *)allocate((size_t)n, 1);
            memcpy(text, t.text[p->left], (size_t)left);
            memcpy(text + left, t.text[p->right], (size_t)(n - left));
            p->token = (int)table_get(&t.ids, text, (size_t)n) - 1;
            if (p->token < 0) {
                p->token = t.vocab;
                add_token(&t, &t.ids, text, n);
            } else {
                free(text); // two ways to one token, as a+bc and ab+c
            }
            merges = (int(*)[2])grow(merges, (size_t)merge_count, sizeof(*merges));
            merges[merge_count][0] = p->left;
            merges[merge_count++][1] = p->right;
        }
        Pair merged = *p; // r.pairs moves when it grows
        p->words = NULL;
        p->word_count = 0;
        for (int i = 0; i < merged.word_count; i++)
            merge_in_word(&r, merged.words[i], merged.left, merged.right, merged.token);
        free(merged.words);
    }
    if (t.vocab < vocab)
        fprintf(stderr, "%s: the text has patterns for %d tokens only, not %d\n", program_name, t.vocab, vocab);
    write_tokenizer(file, &t, (const int(*)[2])merges, merge_count);
    for (int i = 0; i < t.vocab; i++)
        free(t.text[i]);
    for (int i = 0; i < r.pair_count; i++)
        free(r.pairs[i].words);
    table_free(&t.ids);
    table_free(&r.table);
    free(t.text);
    free(t.length);
    free(merges);
    free(ids);
    free(r.words);
    free(r.pairs);
    free(r.changed);
    free(r.heap.items);
}

// ----------------------------------------------------------------------------
// Writing: everything goes into a folder in the output folder first, which fail() removes.

static FILE *open_output(const char *name) {
    char path[4200];
    snprintf(path, sizeof(path), "%s/%s", unfinished_path, name);
    FILE *file = fopen(path, "wb");
    if (!file)
        fail("%s: %s", path, strerror(errno));
    return file;
}

static void close_output(FILE *file) {
    int failed = ferror(file);
    if (fclose(file) != 0 || failed)
        fail("%s: cannot write: %s", unfinished_path, strerror(errno));
}

typedef struct Shards { // the token files of one split
    const char *folder, *split;
    FILE *file; // the open one
    int count;
    int64_t in_file, tokens, documents, bytes;
} Shards;

static void write_header(Shards *s) {
    const int32_t header[256] = {TOKENS_MAGIC, 1, (int32_t)s->in_file};
    fwrite(header, sizeof(header), 1, s->file);
}

static void finish_shard(Shards *s) {
    if (!s->file)
        return;
    rewind(s->file);
    write_header(s);
    close_output(s->file);
    s->file = NULL;
}

static void write_tokens(Shards *s, const int *ids, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (!s->file) {
            char name[64];
            snprintf(name, sizeof(name), "%s_%06d.bin", s->split, s->count++);
            s->file = open_output(name);
            s->in_file = 0;
            write_header(s);
        }
        putc_unlocked(ids[i] & 255, s->file);
        putc_unlocked(ids[i] >> 8, s->file);
        s->tokens++;
        if (++s->in_file == SHARD_TOKENS)
            finish_shard(s);
    }
}

// Encodes the blocks' documents in parallel and writes them in order: those of validation files, or with `split` at
// least 0 those from that number on, to val, the others to train.
static void encode_documents(Reader *r, const Tokenizer *t, int64_t split, Shards *train, Shards *val) {
    int threads = thread_count();
    Tokenizer **mine = (Tokenizer **)allocate((size_t)threads, sizeof(Tokenizer *));
    for (int i = 0; i < threads; i++)
        mine[i] = tokenizer_share(t);
    int *ids = NULL;
    size_t room = 0;
    rewind_reader(r, "encoding");
    for (int64_t number = 0; next_block(r);) {
        if (r->room > room) { // a document's ids stand at its place: behind it the separator gives room for one more
            free(ids);
            ids = (int *)allocate((room = r->room) + 1, sizeof(int));
        }
#pragma omp parallel for schedule(dynamic, 16)
        for (int64_t i = 0; i < (int64_t)r->count; i++) {
            Document *d = &r->documents[i];
            d->ids = tokenizer_encode(mine[thread_number()], r->bytes + d->start, d->length, ids + d->start);
        }
        for (size_t i = 0; i < r->count; i++, number++) {
            const Document *d = &r->documents[i];
            Shards *s = r->valid || (split >= 0 && number >= split) ? val : train;
            write_tokens(s, &t->eot, 1);
            write_tokens(s, ids + d->start, d->ids);
            s->documents++;
            s->bytes += (int64_t)d->length;
        }
    }
    free(ids);
    for (int i = 0; i < threads; i++)
        tokenizer_free(mine[i]);
    free(mine);
}

// Moves all files to where they belong, and removes token files of a former run that would be read along with them.
static void finish_outputs(const char *out) {
    char path[8400], to[8400];
    struct dirent *entry;
    DIR *list = opendir(out);
    while (list && (entry = readdir(list)) != NULL) {
        const char *name = entry->d_name, *number = name + strcspn(name, "_"), *dot = strrchr(name, '.');
        if (!dot || strcmp(dot, ".bin") != 0 || !(strstr(name, "train") || strstr(name, "val")))
            continue;
        int ours = strncmp(name, "train_", 6) == 0 || strncmp(name, "val_", 4) == 0;
        snprintf(path, sizeof(path), "%s/%s", out, name);
        if (ours && strspn(number + 1, "0123456789") == 6 && number + 7 == dot)
            unlink(path);
        else
            fprintf(stderr, "%s: %s was there before, and train_moe will read it too\n", program_name, path);
    }
    if (list)
        closedir(list);
    list = opendir(unfinished_path);
    while (list && (entry = readdir(list)) != NULL) {
        snprintf(path, sizeof(path), "%s/%s", unfinished_path, entry->d_name);
        snprintf(to, sizeof(to), "%s/%s", out, entry->d_name);
        if (entry->d_name[0] != '.' && rename(path, to) != 0)
            fail("%s: %s", to, strerror(errno));
    }
    if (list)
        closedir(list);
    remove_tree(unfinished_path);
    unfinished_path[0] = 0;
}

// ----------------------------------------------------------------------------

static int print_help(void) {
    printf("usage: data/tokenize [--vocab N | --tokenizer FILE] [--clean] TEXTFILE... --out DIR\n"
           "       data/tokenize --tokenizer FILE --ids TEXTFILE...\n\n"
           "Turns texts, whose documents are separated by %s, into token files for train_moe. A file with\n"
           "\"valid\" in its name becomes validation; without one the last hundredth of the documents does.\n\n"
           "  --out DIR         where to write tokenizer.json, train_000000.bin ..., val_000000.bin ...\n"
           "  --vocab N         train a byte-level BPE vocabulary of N tokens, 257 to 65536 (default 4096)\n"
           "  --tokenizer FILE  use this tokenizer.json (byte-level BPE, such as GPT-2's)\n"
           "  --clean           repair mojibake, carriage returns, blank lines and stray separators; drop what ends\n"
           "                    in the middle of a sentence\n"
           "  --ids             print the ids of the text as it is, one line a file; - reads standard input\n"
           "  --threads N       (default: all cores)\n"
           "  -h, --help\n",
           SEPARATOR);
    return 0;
}

static int whole_number(const char *option, const char *text, int least, int most) {
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (end == text || *end || errno || value < least || value > most)
        usage_fail("--%s %s: expected a whole number from %d to %d", option, text, least, most);
    return (int)value;
}

static void print_ids(const char *tokenizer, char **paths, int count) {
    Tokenizer *t = tokenizer_load(tokenizer);
    for (int i = 0; i < count; i++) {
        size_t size;
        char *text = read_file(strcmp(paths[i], "-") == 0 ? "/dev/stdin" : paths[i], &size);
        int *ids = (int *)allocate(size + 1, sizeof(int));
        size_t n = tokenizer_encode(t, text, size, ids);
        for (size_t k = 0; k < n; k++)
            printf(k ? " %d" : "%d", ids[k]);
        printf("\n");
        free(ids);
        free(text);
    }
    tokenizer_free(t);
    if (fflush(stdout) != 0 || ferror(stdout))
        fail("standard output: %s", strerror(errno));
}

static void print_split(const Shards *s) {
    printf("%s/%s_*.bin: %lld document%s, %.1f MB, %lld tokens in %d file%s, %.2f bytes a token\n", s->folder, s->split,
           (long long)s->documents, s->documents == 1 ? "" : "s", (double)s->bytes / 1e6, (long long)s->tokens,
           s->count, s->count == 1 ? "" : "s", (double)s->bytes / (double)s->tokens);
}

int main(int argc, char **argv) {
    static const struct option options[] = {
        {"vocab", required_argument, NULL, 'v'}, {"tokenizer", required_argument, NULL, 't'},
        {"out", required_argument, NULL, 'o'},   {"threads", required_argument, NULL, 'n'},
        {"clean", no_argument, NULL, 'c'},       {"ids", no_argument, NULL, 'i'},
        {"help", no_argument, NULL, 'h'},        {NULL, 0, NULL, 0}};
    const char *tokenizer = NULL, *out = NULL;
    int vocab = 0, threads = 0, ids = 0, option, train_files = 0;
    Reader r = {0};
    program_name = "data/tokenize";
    opterr = 0;
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        if (option == 'v')
            vocab = whole_number("vocab", optarg, 257, 65536);
        else if (option == 't')
            tokenizer = optarg;
        else if (option == 'o')
            out = optarg;
        else if (option == 'n')
            threads = whole_number("threads", optarg, 1, 1024);
        else if (option == 'c' || option == 'i')
            *(option == 'c' ? &r.clean : &ids) = 1;
        else if (option == 'h')
            return print_help();
        else
            usage_fail("%s: unknown option, or its value is missing", argv[optind - 1]);
    }
    r.paths = argv + optind;
    r.path_count = argc - optind;
    if (r.path_count == 0)
        usage_fail("no text file given");
    if (tokenizer && vocab)
        usage_fail("--vocab trains a new vocabulary and --tokenizer uses one: give one of the two");
    if (ids && (!tokenizer || out || r.clean))
        usage_fail("--ids needs --tokenizer FILE, and neither --out nor --clean");
    if (!ids && !out)
        usage_fail("--out DIR is missing: where should the tokens go?");
    if (ids) {
        print_ids(tokenizer, r.paths, r.path_count);
        return 0;
    }
    if (threads)
        use_threads(threads);
    for (int i = 0; i < r.path_count; i++) {
        struct stat info;
        if (stat(r.paths[i], &info) != 0)
            fail("%s: %s", r.paths[i], strerror(errno));
        if (!S_ISREG(info.st_mode))
            fail("%s: not a regular file; texts are read more than once", r.paths[i]);
        if (info.st_size == 0)
            fail("%s: the file is empty", r.paths[i]);
        r.total += info.st_size;
        train_files += !is_valid_name(r.paths[i]);
    }
    if (train_files == 0)
        fail("%s: only validation text; give a file without \"valid\" in its name too", r.paths[0]);
    Tokenizer *t = tokenizer ? tokenizer_load(tokenizer) : NULL;
    if (t && t->vocab > 65536)
        fail("%s: %d tokens, but a token file holds numbers up to 65535 only", tokenizer, t->vocab);
    if (strlen(out) > 2000)
        fail("%s: the name is too long", out);
    make_directories(out);
    snprintf(unfinished_path, sizeof(unfinished_path), "%s/unfinished-tokens", out);
    remove_tree(unfinished_path); // of a run that was killed
    make_directories(unfinished_path);
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);

    int64_t split = -1;
    FILE *file = open_output("tokenizer.json");
    if (t) {
        fwrite(t->json, 1, t->json_size, file);
        close_output(file);
        rewind_reader(&r, "counting documents");
        while (train_files == r.path_count && next_block(&r)) {
        }
    } else {
        Table words = count_words(&r);
        if (words.count == 0)
            fail("%s: no text to learn from", r.paths[0]);
        train_vocabulary(&words, vocab ? vocab : 4096, file);
        close_output(file);
        table_free(&words);
        char path[4200];
        snprintf(path, sizeof(path), "%s/tokenizer.json", unfinished_path);
        t = tokenizer_load(path);
    }
    if (train_files == r.path_count) {
        if (r.kept < 2)
            fail("%s: %lld document, so none is left for validation; put %s between documents, or give a second file "
                 "that has \"valid\" in its name",
                 r.paths[0], (long long)r.kept, SEPARATOR);
        split = r.kept - (r.kept < 200 ? 1 : r.kept / 100);
        printf("no file has \"valid\" in its name: the last %lld of %lld documents become validation\n",
               (long long)(r.kept - split), (long long)r.kept);
    }
    Shards train = {out, "train", NULL, 0, 0, 0, 0, 0}, val = {out, "val", NULL, 0, 0, 0, 0, 0};
    encode_documents(&r, t, split, &train, &val);
    finish_shard(&train);
    finish_shard(&val);
    if (train.tokens == 0 || val.tokens == 0)
        fail("%s: no document for %s", r.paths[0], train.tokens ? "validation" : "training");
    finish_outputs(out);

    print_split(&train);
    print_split(&val);
    for (int k = 0; k < TALLIES; k++)
        if (r.tally[k])
            printf("%d %s\n", r.tally[k], tally_names[k]);
    tokenizer_free(t);
    free(r.bytes);
    free(r.documents);
    return 0;
}
