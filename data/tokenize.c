// Turns text into tokens: trains a byte-level BPE vocabulary, or takes one, and writes token files.
// Gives: the program data/tokenize, whose output folder train_moe reads with --data.
// Needs: data/tokenizer.h, data/loader.h (the number that token files begin with).
// Texts are read in blocks, so they may be larger than memory: once to count words, from which the
// vocabulary is made, and once to encode them. <|endoftext|> separates documents.
//
//     data/tokenize --out data/mine mine-train.txt mine-valid.txt
//     data/tokenize --tokenizer gpt2/tokenizer.json --out data/mine mine.txt
//     data/tokenize --tokenizer data/mine/tokenizer.json --ids hello.txt
//
// Every result is the same with any number of threads. No file gets its final name before all are
// written, so that an interrupted run changes nothing.
#include "tokenizer.h"
#include "loader.h"
#include <dirent.h>
#include <getopt.h>
#include <signal.h>
#include <sys/stat.h>

#define BLOCK_BYTES  (8 << 20)   // of text at a time; a longer document makes it grow
#define SHARD_TOKENS 100000000   // of a token file
#define WORD_MEMORY  (256 << 20) // bytes for counting words
#define SEPARATOR    "<|endoftext|>"

static volatile sig_atomic_t interrupted;

// The first signal stops the program at the next block or merge; a second one ends it at once.
static void on_signal(int number) {
    interrupted = 1;
    signal(number, SIG_DFL);
}

static void stop_if_interrupted(void) {
    if (interrupted) {
        fail("interrupted; nothing was changed");
    }
}

// ----------------------------------------------------------------------------
// Cleaning (--clean): repairs the flaws of collections from the web, such as TinyStories.

enum { MOJIBAKE, CONTROLS, STRAYS, BLANKS, EMPTY, CUT_OFF, TALLIES }; // counted for the user
static const char *const tally_names[TALLIES] = {"characters of mojibake repaired",
                                                 "carriage returns and NULs removed",
                                                 "stray pieces of separators removed",
                                                 "superfluous blanks and blank lines removed",
                                                 "empty documents dropped",
                                                 "truncated documents dropped"};

// The characters that Windows-1252 has for the bytes 0x80 to 0x9f.
static const int32_t windows_1252[32] = {
    0x20ac, 0x81,   0x201a, 0x192,  0x201e, 0x2026, 0x2020, 0x2021, 0x2c6,  0x2030, 0x160,
    0x2039, 0x152,  0x8d,   0x17d,  0x8f,   0x90,   0x2018, 0x2019, 0x201c, 0x201d, 0x2022,
    0x2013, 0x2014, 0x2dc,  0x2122, 0x161,  0x203a, 0x153,  0x9d,   0x17e,  0x178};

// Mojibake is UTF-8 that was read as Windows-1252 and written as UTF-8 once more, so that ’ became
// â€™. If s (n bytes) begins with such characters, puts the right one into out (4), its length into
// *length, and returns how many bytes of s it replaces, else 0. Only characters that English text
// has are repaired: Latin-1 letters, punctuation, emoji.
static size_t repair_mojibake(const char *s, size_t n, char *out, int *length) {
    size_t used[5] = {0}; // used[k]: bytes of s in its first k characters
    int32_t code;
    int have = 0;

    // Turn up to four characters back into the bytes that Windows-1252 read.
    while (have < 4 && used[have] < n) {
        used[have + 1] = used[have] + (size_t)utf8_decode(s + used[have], n - used[have], &code);
        int byte = code >= 0x80 && code <= 0xff ? (int)code : -1;
        for (int i = 0; i < 32; i++) {
            if (windows_1252[i] == code) {
                byte = 0x80 + i;
            }
        }
        if (byte < 0) {
            break;
        }
        out[have++] = (char)byte;
    }

    // Do these bytes begin with one character of UTF-8, of a kind that English text has?
    if (have < 2 || !strchr("\xc2\xc3\xe2\xef\xf0", out[0])) {
        return 0;
    }
    *length = utf8_decode(out, (size_t)have, &code);
    if (code >= 0xa0) {
        return used[*length];
    }

    // â€ alone was ”, since Windows-1252 does not have the last of its bytes.
    if (memcmp(out, "\xe2\x80", 2) != 0) {
        return 0;
    }
    memcpy(out, "\xe2\x80\x9d", 3);
    *length = 3;
    return used[2];
}

// Repairs all mojibake in the n bytes at s and counts it; returns how many bytes are left.
static size_t repair_text(char *s, size_t n, int *repaired) {
    int found;

    // Some texts were mangled twice, so look again until nothing is found.
    do {
        size_t end = 0, i = 0;
        found = 0;
        while (i < n) {
            char right[4];
            int length = 0;
            size_t used = 0;
            if ((unsigned char)s[i] >= 0xc2) {
                used = repair_mojibake(s + i, n - i, right, &length);
            }
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
        *repaired += found;
    } while (found);
    return n;
}

// Cleans the n bytes at s and counts in tally (TALLIES); returns how many bytes are left.
static size_t clean_text(char *s, size_t n, int *tally) {
    size_t end = 0, i = 0;
    n = repair_text(s, n, &tally[MOJIBAKE]);
    while (i < n) {
        char c = s[i++];

        // A separator that has lost signs separates nothing: drop it with its remaining < | and >.
        if (c == 'e' && n - i >= 8 && memcmp(s + i, "ndoftext", 8) == 0) {
            while (end > 0 && (s[end - 1] == '|' || s[end - 1] == '<')) {
                end--;
            }
            i += 8;
            while (i < n && (s[i] == '|' || s[i] == '>')) {
                i++;
            }
            tally[STRAYS]++;
            continue;
        }

        // A carriage return becomes a newline, unless one follows anyway; a NUL goes.
        if (c == '\r' || c == 0) {
            tally[CONTROLS]++;
            if (c == 0 || (i < n && s[i] == '\n')) {
                continue;
            }
            c = '\n';
        }

        // A line ends without blanks, and one empty line in a row is enough.
        if (c == '\n') {
            size_t before = end;
            while (end > 0 && (s[end - 1] == ' ' || s[end - 1] == '\t')) {
                end--;
            }
            int drop = end > 1 && s[end - 1] == '\n' && s[end - 2] == '\n';
            tally[BLANKS] += drop || end < before;
            if (drop) {
                continue;
            }
        }
        s[end++] = c;
    }
    return end;
}

// Does a story end properly: with a full stop or the like, a quotation mark, or "The End"?
static int ends_well(const char *s, size_t n) {
    static const char *const endings[] = {"\xe2\x80\x9d", "\xe2\x80\x99", "\xe2\x80\xa6",
                                          "The End",      "The end",      "THE END"};
    if (n > 0 && memchr(".!?\"')*~", s[n - 1], 8)) {
        return 1;
    }
    for (size_t i = 0; i < sizeof(endings) / sizeof(endings[0]); i++) {
        size_t length = strlen(endings[i]);
        if (n >= length && memcmp(s + n - length, endings[i], length) == 0) {
            return 1;
        }
    }
    return 0;
}

// ----------------------------------------------------------------------------
// Reading: blocks of complete documents.

typedef struct Document {
    size_t start, length; // bytes, in Reader.bytes
    size_t ids;           // how many ids it has, once it is encoded
    int edge; // 1 before the first separator and behind the last, where an empty text is normal
} Document;

typedef struct Reader {
    char **paths;
    int path_count;
    int clean; // --clean
    int next;  // the file that is open, or the next one to open
    int valid; // is the open file validation text?
    FILE *file;
    char *bytes;
    size_t allocated, filled, used; // bytes; documents are cut up to `used`
    Document *documents;            // (count): those of this block
    size_t count;
    int64_t total, done; // bytes of all files; bytes read
    int64_t kept;        // documents
    int tally[TALLIES];
    const char *label; // the present task, for the progress line
    double started, shown;
} Reader;

static int is_valid_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return strstr(slash ? slash : path, "valid") != NULL;
}

// On a terminal one line that is written again and again, into a pipe a line every ten seconds.
static void show_progress(Reader *r, int finished) {
    double now = seconds();
    double elapsed = now - r->started;
    double share = (double)r->done / (double)r->total;
    int terminal = isatty(2);
    int due = now - r->shown >= (terminal ? 0.1 : 10);
    if (finished) {
        due = terminal && r->shown != r->started; // only to complete a line that was begun
    }
    if (!due) {
        return;
    }
    r->shown = now;
    fprintf(stderr, "%s%s: %3.0f%%, %.1f MB/s, %.0f s left%s", terminal ? "\r" : "", r->label,
            100 * share, (double)r->done / 1e6 / elapsed, elapsed / share - elapsed,
            terminal && !finished ? "   " : "   \n");
}

// Begins again with the first file.
static void rewind_reader(Reader *r, const char *label) {
    r->next = 0;
    r->done = 0;
    r->kept = 0;
    memset(r->tally, 0, sizeof(r->tally));
    r->label = label;
    r->started = seconds();
    r->shown = r->started;
}

// The document from `used` to `end`.
static void add_document(Reader *r, size_t end, int edge) {
    Document d = {r->used, end - r->used, 0, edge};
    r->documents = (Document *)grow(r->documents, r->count, sizeof(Document));
    r->documents[r->count++] = d;
}

static int is_blank(char c) {
    return c && strchr(" \t\n\v\f\r", c);
}

// Cleans a document and takes the blanks from both of its ends. Length 0 means that it is dropped.
static void trim_document(Reader *r, Document *d) {
    int tally[TALLIES] = {0};
    char *s = r->bytes;
    if (r->clean) {
        d->length = clean_text(s + d->start, d->length, tally);
    }

    // Blanks at both ends are no part of the text.
    while (d->length > 0 && is_blank(s[d->start])) {
        d->start++;
        d->length--;
    }
    while (d->length > 0 && is_blank(s[d->start + d->length - 1])) {
        d->length--;
    }

    // With --clean a story without an end goes too.
    tally[EMPTY] = d->length == 0 && !d->edge;
    tally[CUT_OFF] = d->length > 0 && r->clean && !ends_well(s + d->start, d->length);
    if (tally[CUT_OFF]) {
        d->length = 0;
    }

    // Many threads add to the reader's counts.
    for (int k = 0; k < TALLIES; k++) {
#pragma omp atomic
        r->tally[k] += tally[k];
    }
}

// Opens the next file.
static void open_text(Reader *r) {
    const char *path = r->paths[r->next];
    r->file = fopen(path, "rb");
    if (!r->file) {
        fail("%s: %s", path, strerror(errno));
    }
    r->valid = is_valid_name(path);
    r->filled = 0;
    r->used = 0;
}

// Moves the text that is not cut yet to the front and fills the block behind it.
static void fill_block(Reader *r) {
    r->filled -= r->used;

    // There is no memory at first, and too little for a document longer than the block.
    if (r->filled == r->allocated) {
        r->allocated = r->allocated ? 2 * r->allocated : BLOCK_BYTES;
        r->bytes = (char *)reallocate(r->bytes, r->allocated, 1);
    }

    memmove(r->bytes, r->bytes + r->used, r->filled);
    r->used = 0;
    size_t got = fread(r->bytes + r->filled, 1, r->allocated - r->filled, r->file);
    if (ferror(r->file)) {
        fail("%s: %s", r->paths[r->next], strerror(errno));
    }
    r->filled += got;
    r->done += (int64_t)got;
}

// Cuts the block at its separators. At the end of the file the rest is a document too. `edge` is
// that of the first document.
static void cut_documents(Reader *r, int edge) {
    const char *at;
    size_t n = strlen(SEPARATOR);
    while ((at = (char *)memmem(r->bytes + r->used, r->filled - r->used, SEPARATOR, n)) != NULL) {
        add_document(r, (size_t)(at - r->bytes), edge);
        r->used = (size_t)(at - r->bytes) + n;
        edge = 0;
    }

    // A block that is not full is the last one of the file.
    if (r->filled < r->allocated) {
        add_document(r, r->filled, 1);
        r->used = r->filled;
        fclose(r->file);
        r->file = NULL;
        r->next++;
    }
}

// Fills `documents` with those of the next block that are not empty. Returns 0 behind the last
// block of the last file.
static int next_block(Reader *r) {
    r->count = 0;
    while (r->count == 0) {
        int edge = !r->file;
        stop_if_interrupted();
        if (!r->file) {
            if (r->next == r->path_count) {
                show_progress(r, 1);
                return 0;
            }
            open_text(r);
        }
        fill_block(r);
        cut_documents(r, edge);

#pragma omp parallel for schedule(dynamic, 16)
        for (int64_t i = 0; i < (int64_t)r->count; i++) {
            trim_document(r, &r->documents[i]);
        }

        // Keep those that are not empty.
        size_t kept = 0;
        for (size_t i = 0; i < r->count; i++) {
            if (r->documents[i].length > 0) {
                r->documents[kept++] = r->documents[i];
            }
        }
        r->count = kept;
        r->kept += (int64_t)kept;
        show_progress(r, 0);
    }
    return 1;
}

// ----------------------------------------------------------------------------
// Counting words: a table from each different word to how often it occurs in the text.

// Adds to `sum` the counts of those words of t that occur `at_least` times.
static void add_counts(Table *sum, const Table *t, int64_t at_least) {
    for (size_t i = 0; i < t->entry_count; i++) {
        const Entry *e = &t->entries[i];
        if (e->value >= at_least) {
            *table_put(sum, t->bytes + e->start, e->length) += e->value;
        }
    }
}

// Adds 1 to the count of each word of a text. A word of more than 1000 bytes, such as DNA, counts
// in pieces.
static void count_document(Table *counts, const unsigned char *class_of, const char *s, size_t n) {
    const char *end = s + n;
    while (s < end) {
        size_t length = first_word(class_of, s, (size_t)(end - s));
        length = length > 1000 ? 1000 : length;
        *table_put(counts, s, length) += 1;
        s += length;
    }
}

// The words of all training texts, to be freed by table_free.
static Table count_words(Reader *r) {
    unsigned char *class_of = character_classes();
    int threads = thread_count(), gave_up = 0;
    Table words = {0};
    Table *mine = (Table *)allocate((size_t)threads, sizeof(Table));
    rewind_reader(r, "counting words");

    // A vocabulary is made for training text; validation must not influence it.
    while (next_block(r)) {
        if (r->valid) {
            continue;
        }

        // Every thread counts in its own table. The sums are taken after each block, so that they,
        // and with them the words given up below, are the same with any number of threads.
#pragma omp parallel for schedule(dynamic, 16)
        for (int64_t i = 0; i < (int64_t)r->count; i++) {
            const Document *d = &r->documents[i];
            count_document(&mine[thread_number()], class_of, r->bytes + d->start, d->length);
        }
        for (int t = 0; t < threads; t++) {
            add_counts(&words, &mine[t], 1);
            table_free(&mine[t]);
        }

        // The table must stay in memory: if it is too large, give up the rarest words.
        int64_t least = 2;
        while (words.entry_count * sizeof(Entry) + words.used > WORD_MEMORY) {
            Table rest = {0};
            add_counts(&rest, &words, least);
            table_free(&words);
            words = rest;
            gave_up = 1;
            least *= 2;
        }
    }
    if (gave_up) {
        fprintf(stderr, "%s: too many different words: the rarest do not count\n", program_name);
    }
    free(mine);
    free(class_of);
    return words;
}

// ----------------------------------------------------------------------------
// Training a vocabulary: the commonest pair of neighbours becomes a token, again and again. Each
// pair knows its count and the words that it occurs in, so that a merge touches only those words.
// If pairs are equally common, the lower left id goes first, then the lower right id.

typedef struct Word {
    int *ids; // (length)
    int length;
    int64_t count; // how often the word occurs in the text
} Word;

typedef struct Pair {
    int left, right; // ids
    int token;       // the token that the two became; 0: none yet
    int changed;     // is it in the list of pairs that became more common?
    int64_t count;   // how often the pair occurs in the text
    int *words;      // (word_count): the words that it occurs in, or did
    int word_count;
} Pair;

typedef struct Trainer {
    Tokenizer tokens; // only text, length, vocab and ids; each text is an allocation of its own
    Word *words;      // (word_count)
    int *ids;         // of all words, one after the other
    int word_count;
    Table table; // from two ids, as int[2], to an index in pairs, counted from 1
    Pair *pairs; // (pair_count)
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
        Pair fresh = {left, right, 0, 0, 0, NULL, 0};
        r->pairs = (Pair *)grow(r->pairs, (size_t)r->pair_count, sizeof(Pair));
        r->pairs[r->pair_count++] = fresh;
        *number = r->pair_count;
    }

    Pair *p = &r->pairs[*number - 1];
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
static void push_pair(Trainer *r, const Pair *p) {
    if (p->count > 1) {
        heap_push(&r->heap, -p->count, (int64_t)p->left << 32 | p->right);
    }
}

// The commonest pair; NULL if none occurs twice. The heap does not learn that a pair became rarer,
// so an item with an old count goes back with the present one. A pair that became more common was
// pushed again already.
static Pair *pop_pair(Trainer *r) {
    while (r->heap.count > 0) {
        Item item = heap_pop(&r->heap);
        const int ids[2] = {(int)(item.second >> 32), (int)(item.second & 0xffffffff)};
        Pair *p = &r->pairs[table_get(&r->table, ids, sizeof(ids)) - 1];
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
    add_token(t, strdup(SEPARATOR), (int)strlen(SEPARATOR));
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
static void add_merge(Trainer *r, Pair *p) {
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
        stop_if_interrupted();

        // Find the commonest pair, after the pairs that became more common are in the heap.
        while (r.changed_count > 0) {
            Pair *p = &r.pairs[r.changed[--r.changed_count]];
            p->changed = 0;
            push_pair(&r, p);
        }
        Pair *p = pop_pair(&r);
        if (!p) {
            break;
        }

        // A pair that has a token has arisen once more, out of later tokens.
        if (!p->token) {
            add_merge(&r, p);
        }

        // Merge it in all its words. *p is copied first, because r.pairs moves when it grows.
        Pair merged = *p;
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

// ----------------------------------------------------------------------------
// Writing: everything goes into a folder in the output folder first, which fail() removes.

// Opens a file in the unfinished folder.
static FILE *open_output(const char *name) {
    char path[4200];
    snprintf(path, sizeof(path), "%s/%s", unfinished_path, name);
    FILE *file = fopen(path, "wb");
    if (!file) {
        fail("%s: %s", path, strerror(errno));
    }
    return file;
}

// Closes a file. A full disk may show only here.
static void close_output(FILE *file) {
    int failed = ferror(file);
    if (fclose(file) != 0 || failed) {
        fail("%s: cannot write: %s", unfinished_path, strerror(errno));
    }
}

// The token files of one split.
typedef struct Shards {
    const char *folder, *split;
    FILE *file;      // the open one
    int count;       // files
    int64_t in_file; // tokens of the open one
    int64_t tokens, documents, bytes;
} Shards;

// Writes llm.c's header (data/loader.h).
static void write_header(Shards *s) {
    const int32_t header[256] = {TOKENS_MAGIC, 1, (int32_t)s->in_file};
    fwrite(header, sizeof(header), 1, s->file);
}

// Writes the header again, now that the number of tokens is known, and closes the file.
static void finish_shard(Shards *s) {
    if (!s->file) {
        return;
    }
    rewind(s->file);
    write_header(s);
    close_output(s->file);
    s->file = NULL;
}

// Appends ids (count), and begins a new file when one is full.
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
        s->in_file++;
        if (s->in_file == SHARD_TOKENS) {
            finish_shard(s);
        }
    }
}

// Encodes all documents in parallel and writes them in order. Documents of validation files go to
// val, and so do those from number `split` on unless it is -1; the others go to train.
static void encode_documents(Reader *r, const Tokenizer *t, int64_t split, Shards *train,
                             Shards *val) {
    int threads = thread_count();
    Tokenizer **mine = (Tokenizer **)allocate((size_t)threads, sizeof(Tokenizer *));
    for (int i = 0; i < threads; i++) {
        mine[i] = tokenizer_share(t);
    }

    int *ids = NULL;
    size_t allocated = 0;
    int64_t number = 0; // of the next document
    rewind_reader(r, "encoding");
    while (next_block(r)) {
        // The ids of a document begin at the same index as its bytes. The encoder asks for one id
        // more than there are bytes: that is the separator's index, or the one added here.
        if (r->allocated > allocated) {
            free(ids);
            allocated = r->allocated;
            ids = (int *)allocate(allocated + 1, sizeof(int));
        }

        // A thread has a tokenizer of its own, because encoding writes to the cache.
#pragma omp parallel for schedule(dynamic, 16)
        for (int64_t i = 0; i < (int64_t)r->count; i++) {
            Document *d = &r->documents[i];
            Tokenizer *own = mine[thread_number()];
            d->ids = tokenizer_encode(own, r->bytes + d->start, d->length, ids + d->start);
        }

        // Each document begins with <|endoftext|>.
        for (size_t i = 0; i < r->count; i++) {
            const Document *d = &r->documents[i];
            Shards *s = r->valid || (split >= 0 && number >= split) ? val : train;
            write_tokens(s, &t->eot, 1);
            write_tokens(s, ids + d->start, d->ids);
            s->documents++;
            s->bytes += (int64_t)d->length;
            number++;
        }
    }
    free(ids);
    for (int i = 0; i < threads; i++) {
        tokenizer_free(mine[i]);
    }
    free(mine);
}

// Removes token files of an earlier run from `out`, since train_moe would read them along with the
// new ones. Files that have other names stay, with a warning.
static void remove_old_shards(const char *out) {
    char path[8400];
    struct dirent *entry;
    DIR *folder = opendir(out);
    while (folder && (entry = readdir(folder)) != NULL) {
        const char *name = entry->d_name;
        const char *number = name + strcspn(name, "_");
        const char *dot = strrchr(name, '.');
        if (!dot || strcmp(dot, ".bin") != 0 || !(strstr(name, "train") || strstr(name, "val"))) {
            continue;
        }

        // Names such as train_000000.bin are ours.
        int ours = strncmp(name, "train_", 6) == 0 || strncmp(name, "val_", 4) == 0;
        snprintf(path, sizeof(path), "%s/%s", out, name);
        if (ours && strspn(number + 1, "0123456789") == 6 && number + 7 == dot) {
            unlink(path);
        } else {
            fprintf(stderr, "%s: %s was there before, and train_moe will read it too\n",
                    program_name, path);
        }
    }
    if (folder) {
        closedir(folder);
    }
}

// Moves all finished files to the output folder.
static void move_outputs(const char *out) {
    char from[8400], to[8400];
    struct dirent *entry;
    DIR *folder = opendir(unfinished_path);
    while (folder && (entry = readdir(folder)) != NULL) {
        snprintf(from, sizeof(from), "%s/%s", unfinished_path, entry->d_name);
        snprintf(to, sizeof(to), "%s/%s", out, entry->d_name);
        if (entry->d_name[0] != '.' && rename(from, to) != 0) {
            fail("%s: %s", to, strerror(errno));
        }
    }
    if (folder) {
        closedir(folder);
    }
    remove_tree(unfinished_path);
    unfinished_path[0] = 0;
}

// ----------------------------------------------------------------------------
// The command line, and the steps of the program.

typedef struct Options {
    const char *tokenizer; // --tokenizer: a file, or NULL to train a vocabulary
    const char *out;       // --out: a folder
    int vocab;             // --vocab: tokens; 0: the default
    int threads;           // --threads; 0: all cores
    int ids;               // --ids: print ids and write no files
} Options;

static void print_help(void) {
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
}

// The number of an option; stops if it is not a number from least to most.
static int number_option(const char *option, const char *text, int least, int most) {
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (end == text || *end || errno || value < least || value > most) {
        usage_fail("--%s %s: expected a whole number from %d to %d", option, text, least, most);
    }
    return (int)value;
}

// Reads the command line; the paths of the texts and --clean go to the reader.
static void parse_options(Options *o, Reader *r, int argc, char **argv) {
    static const struct option options[] = {
        {"vocab", required_argument, NULL, 'v'}, {"tokenizer", required_argument, NULL, 't'},
        {"out", required_argument, NULL, 'o'},   {"threads", required_argument, NULL, 'n'},
        {"clean", no_argument, NULL, 'c'},       {"ids", no_argument, NULL, 'i'},
        {"help", no_argument, NULL, 'h'},        {NULL, 0, NULL, 0}};
    int option;
    opterr = 0;
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        if (option == 'v') {
            o->vocab = number_option("vocab", optarg, 257, 65536);
        } else if (option == 't') {
            o->tokenizer = optarg;
        } else if (option == 'o') {
            o->out = optarg;
        } else if (option == 'n') {
            o->threads = number_option("threads", optarg, 1, 1024);
        } else if (option == 'c') {
            r->clean = 1;
        } else if (option == 'i') {
            o->ids = 1;
        } else if (option == 'h') {
            print_help();
            exit(0);
        } else {
            usage_fail("%s: unknown option, or its value is missing", argv[optind - 1]);
        }
    }

    r->paths = argv + optind;
    r->path_count = argc - optind;
    if (r->path_count == 0) {
        usage_fail("no text file given");
    }
    if (o->tokenizer && o->vocab) {
        usage_fail("--vocab trains a new vocabulary and --tokenizer uses one: give one of the two");
    }
    if (o->ids && (!o->tokenizer || o->out || r->clean)) {
        usage_fail("--ids needs --tokenizer FILE, and neither --out nor --clean");
    }
    if (!o->ids && !o->out) {
        usage_fail("--out DIR is missing: where should the tokens go?");
    }
}

// --ids: prints the ids of each text as it is, one line a file.
static void print_ids(const char *tokenizer, char **paths, int count) {
    Tokenizer *t = tokenizer_load(tokenizer);
    for (int i = 0; i < count; i++) {
        size_t size;
        char *text = read_file(strcmp(paths[i], "-") == 0 ? "/dev/stdin" : paths[i], &size);
        int *ids = (int *)allocate(size + 1, sizeof(int));
        size_t n = tokenizer_encode(t, text, size, ids);
        for (size_t k = 0; k < n; k++) {
            printf(k ? " %d" : "%d", ids[k]);
        }
        printf("\n");
        free(ids);
        free(text);
    }
    tokenizer_free(t);
    if (fflush(stdout) != 0 || ferror(stdout)) {
        fail("standard output: %s", strerror(errno));
    }
}

// Adds up the sizes of the texts, refuses one that cannot be read twice, and returns the number of
// training texts.
static int check_texts(Reader *r) {
    int train_files = 0;
    for (int i = 0; i < r->path_count; i++) {
        struct stat info;
        if (stat(r->paths[i], &info) != 0) {
            fail("%s: %s", r->paths[i], strerror(errno));
        }
        if (!S_ISREG(info.st_mode)) {
            fail("%s: not a regular file; texts are read more than once", r->paths[i]);
        }
        if (info.st_size == 0) {
            fail("%s: the file is empty", r->paths[i]);
        }
        r->total += info.st_size;
        train_files += !is_valid_name(r->paths[i]);
    }
    if (train_files == 0) {
        fail("%s: only validation text; give a file without \"valid\" in its name too",
             r->paths[0]);
    }
    return train_files;
}

// Makes the output folder and, in it, an empty one for files that are being written.
static void prepare_output(const char *out) {
    if (strlen(out) > 2000) {
        fail("%s: the name is too long", out);
    }
    make_directories(out);
    snprintf(unfinished_path, sizeof(unfinished_path), "%s/unfinished-tokens", out);
    remove_tree(unfinished_path); // of a run that was killed
    make_directories(unfinished_path);
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
}

// Trains a vocabulary on the texts, writes its tokenizer.json and reads it back.
static Tokenizer *train_tokenizer(Reader *r, int vocab) {
    FILE *file = open_output("tokenizer.json");
    Table words = count_words(r);
    if (words.count == 0) {
        fail("%s: no text to learn from", r->paths[0]);
    }
    train_vocabulary(&words, vocab, file);
    close_output(file);
    table_free(&words);
    char path[4200];
    snprintf(path, sizeof(path), "%s/tokenizer.json", unfinished_path);
    return tokenizer_load(path);
}

// Writes the tokenizer that was given, byte for byte.
static void copy_tokenizer(const Tokenizer *t) {
    FILE *file = open_output("tokenizer.json");
    fwrite(t->json, 1, t->json_size, file);
    close_output(file);
}

// The first document of validation, which gets the last hundredth of all, but at least one.
static int64_t choose_split(const Reader *r) {
    if (r->kept < 2) {
        fail("%s: %lld document, so none is left for validation; put %s between documents, "
             "or give a second file that has \"valid\" in its name",
             r->paths[0], (long long)r->kept, SEPARATOR);
    }
    int64_t val = r->kept < 200 ? 1 : r->kept / 100;
    printf("no file has \"valid\" in its name: the last %lld of %lld documents become validation\n",
           (long long)val, (long long)r->kept);
    return r->kept - val;
}

static void print_split(const Shards *s) {
    printf("%s/%s_*.bin: %lld document%s, %.1f MB, %lld tokens in %d file%s, %.2f bytes a token\n",
           s->folder, s->split, (long long)s->documents, s->documents == 1 ? "" : "s",
           (double)s->bytes / 1e6, (long long)s->tokens, s->count, s->count == 1 ? "" : "s",
           (double)s->bytes / (double)s->tokens);
}

int main(int argc, char **argv) {
    Options o = {NULL, NULL, 0, 0, 0};
    Reader r = {0};
    program_name = "data/tokenize";
    parse_options(&o, &r, argc, argv);
    if (o.ids) {
        print_ids(o.tokenizer, r.paths, r.path_count);
        return 0;
    }
    if (o.threads) {
        use_threads(o.threads);
    }

    // Find every mistake that can be found before the output folder is touched.
    int all_train = check_texts(&r) == r.path_count; // no validation file
    Tokenizer *t = o.tokenizer ? tokenizer_load(o.tokenizer) : NULL;
    if (t && t->vocab > 65536) {
        fail("%s: %d tokens, but a token file holds numbers up to 65535 only", o.tokenizer,
             t->vocab);
    }
    prepare_output(o.out);

    // Get the vocabulary. Training it reads all documents and so counts them. With --tokenizer they
    // are counted here, if the split depends on their number.
    if (t) {
        copy_tokenizer(t);
        rewind_reader(&r, "counting documents");
        while (all_train && next_block(&r)) {
        }
    } else {
        t = train_tokenizer(&r, o.vocab ? o.vocab : 4096);
    }

    // Encode all documents. Only then do the files get their names.
    int64_t split = all_train ? choose_split(&r) : -1;
    Shards train = {o.out, "train", NULL, 0, 0, 0, 0, 0};
    Shards val = {o.out, "val", NULL, 0, 0, 0, 0, 0};
    encode_documents(&r, t, split, &train, &val);
    finish_shard(&train);
    finish_shard(&val);
    if (train.tokens == 0 || val.tokens == 0) {
        fail("%s: no document for %s", r.paths[0], train.tokens ? "validation" : "training");
    }
    remove_old_shards(o.out);
    move_outputs(o.out);

    // Tell the user how much there is and how much was cleaned.
    print_split(&train);
    print_split(&val);
    for (int k = 0; k < TALLIES; k++) {
        if (r.tally[k]) {
            printf("%d %s\n", r.tally[k], tally_names[k]);
        }
    }
    tokenizer_free(t);
    free(r.bytes);
    free(r.documents);
    return 0;
}
