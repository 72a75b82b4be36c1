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

#define TRAIN_MOE_NO_MAIN
#include "../train_moe.c" // which has the tokenizer and the system's headers

#ifndef BLOCK_BYTES // tests make these small
#define BLOCK_BYTES  (8 << 20)
#define SHARD_TOKENS 100000000
#define WORDS_KEPT   (4 << 20)
#endif
#define SEPARATOR "<|endoftext|>"
enum { SEPARATOR_LENGTH = sizeof SEPARATOR - 1 };

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
// with such a character, puts the right one into out and returns the bytes of s that it replaces, else 0. Looks only
// for first bytes that English text has in UTF-8 (Latin-1 letters, punctuation, emoji) and that make no sense as
// letters.
static size_t repair_mojibake(const char *s, size_t n, char out[4], int *length) {
    size_t used = 0, used_two = 0;
    int want = 1, have = 0;
    for (; have < want && used < n; have++) {
        int32_t code;
        size_t bytes = (size_t)utf8_decode(s + used, n - used, &code);
        int byte = code >= 0xa0 && code <= 0xff ? (int)code : -1;
        for (int i = 0; i < 32; i++)
            if (windows_1252[i] == code || 0x80 + i == code)
                byte = 0x80 + i;
        if (have == 0)
            want = byte == 0xc2 || byte == 0xc3 ? 2 : byte == 0xe2 || byte == 0xef ? 3 : byte == 0xf0 ? 4 : 0;
        if (want == 0 || (have > 0 && (byte < 0x80 || byte > 0xbf)))
            break;
        out[have] = (char)byte;
        used += bytes;
        if (have == 1)
            used_two = used;
    }
    int32_t code;
    *length = want;
    if (want > 0 && have == want && utf8_decode(out, (size_t)want, &code) == want && code >= 0xa0)
        return used;
    if (have != 2 || memcmp(out, "\xe2\x80", 2) != 0)
        return 0;
    memcpy(out, "\xe2\x80\x9d", 3); // â€ alone was ”, whose last byte Windows-1252 does not have
    *length = 3;
    return used_two;
}

// Cleans n bytes in place; returns how many are left.
static size_t clean_text(char *s, size_t n, int tally[TALLIES]) {
    for (int found = 1; found;) { // until nothing is found: some texts were mangled twice
        size_t end = 0;
        found = 0;
        for (size_t i = 0; i < n;) {
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
        tally[MOJIBAKE] += found;
    }
    size_t end = 0;
    for (size_t i = 0; i < n; i++) {
        tally[CONTROLS] += s[i] == '\r' || s[i] == 0;
        if (s[i] == '\r' && (i + 1 == n || s[i + 1] != '\n'))
            s[end++] = '\n';
        else if (s[i] != '\r' && s[i] != 0)
            s[end++] = s[i];
    }
    n = end;
    for (char *found; (found = (char *)memmem(s, n, "endoftext", 9)) != NULL;
         tally[STRAYS]++) { // with what is left of <| |>
        char *stop = found + 9;
        while (found > s && (found[-1] == '|' || found[-1] == '<'))
            found--;
        while (stop < s + n && (*stop == '|' || *stop == '>'))
            stop++;
        memmove(found, stop, (size_t)(s + n - stop));
        n -= (size_t)(stop - found);
    }
    end = 0;
    for (size_t i = 0; i < n; i++) { // no blanks at the end of a line, no two blank lines in a row
        size_t before = end;
        if (s[i] == '\n')
            while (end > 0 && (s[end - 1] == ' ' || s[end - 1] == '\t'))
                end--;
        int drop = s[i] == '\n' && end > 1 && s[end - 1] == '\n' && s[end - 2] == '\n';
        tally[BLANKS] += drop || end < before;
        if (!drop)
            s[end++] = s[i];
    }
    return end;
}

// Does a story end as one does: with a full stop or the like, perhaps behind it a quotation mark, or with "The End"?
static int ends_well(const char *s, size_t n) {
    static const char *const endings[] = {
        ".",       "!",       "?",      "\"", "'", ")", "*", "~", "\xe2\x80\x9d", "\xe2\x80\x99", "\xe2\x80\xa6",
        "The End", "The end", "THE END"};
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
    int edge, tally[TALLIES];
} Document;

typedef struct Reader {
    char **paths;
    int path_count, clean, next, valid; // next: file to open; valid: is the open one validation text?
    FILE *file;
    char *bytes;
    size_t room, filled, used; // of bytes; used: up to here documents are cut
    Document *documents;
    size_t count, document_room;
    int64_t total, done, kept, tally[TALLIES]; // bytes of all files, bytes read; documents kept
    const char *label;
    double started, shown;
} Reader;

static int is_valid_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return strstr(slash ? slash + 1 : path, "valid") != NULL;
}

// On a terminal one line that is written again and again, into a pipe a line every ten seconds.
static void show_progress(Reader *r, int finished) {
    double now = seconds(), elapsed = now - r->started, share = (double)r->done / (double)r->total;
    int terminal = isatty(2);
    if (finished ? !terminal || r->shown == 0 : now - r->shown < (terminal ? 0.1 : 10) || (!terminal && elapsed < 10))
        return;
    r->shown = now;
    fprintf(stderr, "%s%s: %3.0f%%, %.1f MB/s, %.0f s left%s", terminal ? "\r" : "", r->label, 100 * share,
            (double)r->done / 1e6 / elapsed, elapsed / share - elapsed, terminal && !finished ? "   " : "   \n");
}

static void rewind_reader(Reader *r, const char *label) {
    if (!r->bytes)
        r->bytes = (char *)allocate(r->room = BLOCK_BYTES, 1);
    r->next = 0;
    r->done = r->kept = 0;
    memset(r->tally, 0, sizeof r->tally);
    r->label = label;
    r->started = seconds();
    r->shown = 0;
}

static void add_document(Reader *r, size_t start, size_t end, int edge) {
    if (r->count == r->document_room) {
        r->document_room = r->document_room ? 2 * r->document_room : 1024;
        r->documents = (Document *)reallocate(r->documents, r->document_room, sizeof(Document));
    }
    Document *d = &r->documents[r->count++];
    memset(d, 0, sizeof *d);
    d->start = start;
    d->length = end - start;
    d->edge = edge; // before the first or behind the last separator, where nothing is normal
}

static void trim_document(Reader *r, Document *d) {
    if (r->clean)
        d->length = clean_text(r->bytes + d->start, d->length, d->tally);
    while (d->length > 0 && strchr(" \t\n\v\f\r", r->bytes[d->start]) && r->bytes[d->start])
        d->start++, d->length--;
    const char *s = r->bytes + d->start;
    while (d->length > 0 && strchr(" \t\n\v\f\r", s[d->length - 1]) && s[d->length - 1])
        d->length--;
    if (d->length == 0) {
        d->tally[EMPTY] = !d->edge;
    } else if (r->clean && !ends_well(s, d->length)) {
        d->tally[CUT_OFF] = 1;
        d->length = 0;
    }
}

// Fills `documents`: those of the next block that are not empty. Returns 0 behind the last block of the last file.
static int next_block(Reader *r) {
    for (r->count = 0; r->count == 0;) {
        int edge = 0;
        if (!r->file) {
            if (r->next == r->path_count) {
                show_progress(r, 1);
                return 0;
            }
            const char *path = r->paths[r->next];
            r->valid = is_valid_name(path);
            r->file = fopen(path, "rb");
            if (!r->file)
                fail("%s: %s", path, strerror(errno));
            r->filled = r->used = 0;
            edge = 1;
        }
        memmove(r->bytes, r->bytes + r->used, r->filled - r->used);
        r->filled -= r->used;
        r->used = 0;
        if (r->filled == r->room) { // a document longer than the block
            r->bytes = (char *)reallocate(r->bytes, r->room *= 2, 1);
        }
        size_t got = fread(r->bytes + r->filled, 1, r->room - r->filled, r->file);
        if (ferror(r->file))
            fail("%s: %s", r->paths[r->next], strerror(errno));
        r->filled += got;
        r->done += (int64_t)got;
        const char *end = r->bytes + r->filled, *at;
        while ((at = (char *)memmem(r->bytes + r->used, r->filled - r->used, SEPARATOR, SEPARATOR_LENGTH)) != NULL) {
            add_document(r, r->used, (size_t)(at - r->bytes), edge);
            r->used = (size_t)(at - r->bytes) + SEPARATOR_LENGTH;
            edge = 0;
        }
        if (r->filled < r->room) {
            add_document(r, r->used, (size_t)(end - r->bytes), 1);
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
            for (int k = 0; k < TALLIES; k++)
                r->tally[k] += r->documents[i].tally[k];
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
// Counting words: a hash table from each different word to how often it stands in the text.

typedef struct Word {
    size_t start, length;
    int64_t count;
} Word; // start: in the table's bytes; count 0: an empty slot

typedef struct Words {
    Word *slots;
    char *bytes;
    size_t slot_count, count, filled, room; // slots, words; bytes filled and allocated
} Words;

static void add_word(Words *w, const char *s, size_t n, int64_t count) {
    if (2 * (w->count + 1) > w->slot_count) {
        Words old = *w;
        w->slot_count = w->slot_count ? 2 * w->slot_count : 1024;
        w->slots = (Word *)allocate(w->slot_count, sizeof(Word));
        for (size_t i = 0; i < old.slot_count; i++) {
            if (old.slots[i].count == 0)
                continue;
            size_t k = (size_t)hash_bytes(w->bytes + old.slots[i].start, old.slots[i].length);
            while (w->slots[k & (w->slot_count - 1)].count)
                k++;
            w->slots[k & (w->slot_count - 1)] = old.slots[i];
        }
        free(old.slots);
    }
    for (size_t k = (size_t)hash_bytes(s, n);; k++) {
        Word *slot = &w->slots[k & (w->slot_count - 1)];
        if (slot->count > 0 && (slot->length != n || memcmp(w->bytes + slot->start, s, n) != 0))
            continue;
        if (slot->count == 0) {
            if (n > w->room - w->filled) {
                w->room = 2 * w->room + n;
                w->bytes = (char *)reallocate(w->bytes, w->room, 1);
            }
            slot->start = w->filled;
            slot->length = n;
            memcpy(w->bytes + w->filled, s, n);
            w->filled += n;
            w->count++;
        }
        slot->count += count;
        return;
    }
}

static void add_words(Words *w, const Words *more, int64_t at_least) { // those that occur so often
    for (size_t i = 0; i < more->slot_count; i++)
        if (more->slots[i].count >= at_least && more->slots[i].count > 0)
            add_word(w, more->bytes + more->slots[i].start, more->slots[i].length, more->slots[i].count);
}

static void free_words(Words *w) {
    free(w->slots);
    free(w->bytes);
    memset(w, 0, sizeof *w);
}

// Every thread counts in its own table and the sums are taken after each block, so that when rare words are given up,
// to keep the table in memory, they are the same ones with any number of threads.
static void count_words(Reader *r, Words *words) {
    unsigned char *class_of = character_classes();
    int threads = thread_count(), gave_up = 0;
    Words *mine = (Words *)allocate((size_t)threads, sizeof(Words));
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
                add_word(&mine[thread_number()], s, length, 1);
            }
        }
        for (int t = 0; t < threads; t++) {
            add_words(words, &mine[t], 1);
            if (mine[t].slots)
                memset(mine[t].slots, 0, mine[t].slot_count * sizeof(Word));
            mine[t].count = mine[t].filled = 0;
        }
        for (int64_t least = 2; words->count > WORDS_KEPT || words->filled > (size_t)WORDS_KEPT * 32; least *= 2) {
            Words rest = {0};
            add_words(&rest, words, least);
            free_words(words);
            *words = rest;
            gave_up = 1;
        }
    }
    if (gave_up)
        fprintf(stderr, "%s: too many different words: the rarest do not count\n", program_name);
    for (int t = 0; t < threads; t++)
        free_words(&mine[t]);
    free(mine);
    free(class_of);
}

// ----------------------------------------------------------------------------
// Training a vocabulary: the commonest pair of neighbours becomes a token, again and again. All words stand in one row
// of places; each pair knows how often it occurs and a list of the places where it begins, so that a merge touches only
// what it changes. Of equally common pairs the one with the lower left id goes first, then the one with the lower right
// id.

typedef struct Place {
    int symbol, previous, next, word; // neighbours in the word, -1: none
    int earlier, later;               // list of the places that begin the same pair, -1: none
} Place;
typedef struct Pair {
    int left, right, first, merged, step;
    int64_t count;
} Pair; // merged: the token it became, -1: none
typedef struct Candidate {
    int64_t count;
    int left, right, pair;
} Candidate;

typedef struct Trainer {
    Place *places;
    int64_t *word_count;
    Pair *pairs;
    int *slots, pair_count, pair_room; // a hash table of 2 * pair_room places in pairs
    Candidate *heap;
    size_t heap_size, heap_room;
    int step, *changed, changed_count; // pairs that the merge at hand made more common
} Trainer;

static int find_pair(Trainer *r, int left, int right) { // an index, as r->pairs moves when it grows
    if (r->pair_count == r->pair_room) {
        r->pair_room = r->pair_room ? 2 * r->pair_room : 4096;
        r->pairs = (Pair *)reallocate(r->pairs, (size_t)r->pair_room, sizeof(Pair));
        r->changed = (int *)reallocate(r->changed, (size_t)r->pair_room, sizeof(int));
        free(r->slots);
        r->slots = (int *)allocate((size_t)r->pair_room * 2, sizeof(int));
        memset(r->slots, -1, (size_t)r->pair_room * 2 * sizeof(int));
        for (int i = 0; i < r->pair_count; i++) {
            size_t k = (size_t)hash64((uint64_t)r->pairs[i].left << 32 | (uint64_t)r->pairs[i].right);
            while (r->slots[k % ((size_t)r->pair_room * 2)] >= 0)
                k++;
            r->slots[k % ((size_t)r->pair_room * 2)] = i;
        }
    }
    for (size_t k = (size_t)hash64((uint64_t)left << 32 | (uint64_t)right);; k++) {
        int *slot = &r->slots[k % ((size_t)r->pair_room * 2)];
        if (*slot >= 0 && (r->pairs[*slot].left != left || r->pairs[*slot].right != right))
            continue;
        if (*slot < 0) {
            *slot = r->pair_count++;
            Pair new_pair = {left, right, -1, -1, -1, 0};
            r->pairs[*slot] = new_pair;
        }
        return *slot;
    }
}

static void link_place(Trainer *r, int i) { // place i begins a pair
    Place *p = &r->places[i];
    if (p->next < 0)
        return;
    int index = find_pair(r, p->symbol, r->places[p->next].symbol);
    Pair *pair = &r->pairs[index];
    p->earlier = -1;
    p->later = pair->first;
    if (pair->first >= 0)
        r->places[pair->first].earlier = i;
    pair->first = i;
    pair->count += r->word_count[p->word];
    if (pair->step != r->step) {
        pair->step = r->step;
        r->changed[r->changed_count++] = index;
    }
}

static void unlink_place(Trainer *r, int i) {
    Place *p = &r->places[i];
    if (p->next < 0)
        return;
    int index = find_pair(r, p->symbol, r->places[p->next].symbol);
    Pair *pair = &r->pairs[index];
    if (p->earlier >= 0)
        r->places[p->earlier].later = p->later;
    else
        pair->first = p->later;
    if (p->later >= 0)
        r->places[p->later].earlier = p->earlier;
    pair->count -= r->word_count[p->word];
}

static int goes_first(const Candidate *a, const Candidate *b) {
    if (a->count != b->count)
        return a->count > b->count;
    return a->left != b->left ? a->left < b->left : a->right < b->right;
}

static void push_candidate(Trainer *r, int index) {
    const Pair *p = &r->pairs[index];
    Candidate new_one = {p->count, p->left, p->right, index};
    if (p->count < 2)
        return; // what occurs once is no pattern
    if (r->heap_size == r->heap_room) {
        r->heap_room = r->heap_room ? 2 * r->heap_room : 4096;
        r->heap = (Candidate *)reallocate(r->heap, r->heap_room, sizeof(Candidate));
    }
    size_t k = r->heap_size++;
    for (; k > 0 && goes_first(&new_one, &r->heap[(k - 1) / 2]); k = (k - 1) / 2)
        r->heap[k] = r->heap[(k - 1) / 2];
    r->heap[k] = new_one;
}

// The commonest pair, -1 where none occurs twice. A pair's count falls without notice: what comes up with an old count
// goes back with its present one. Counts that rise were pushed anew.
static int pop_pair(Trainer *r) {
    while (r->heap_size > 0) {
        Candidate top = r->heap[0], last = r->heap[--r->heap_size];
        size_t k = 0;
        for (size_t child; (child = 2 * k + 1) < r->heap_size; k = child) {
            if (child + 1 < r->heap_size && goes_first(&r->heap[child + 1], &r->heap[child]))
                child++;
            if (!goes_first(&r->heap[child], &last))
                break;
            r->heap[k] = r->heap[child];
        }
        r->heap[k] = last;
        if (r->pairs[top.pair].count == top.count)
            return top.pair;
        if (r->pairs[top.pair].count < top.count)
            push_candidate(r, top.pair);
    }
    return -1;
}

static int compare_ints(const void *a, const void *b) {
    int x = *(const int *)a, y = *(const int *)b;
    return (x > y) - (x < y);
}

// Every occurrence of a pair becomes `token`; from left to right, since in "aaa" the pair "aa" is merged only once.
static void merge_everywhere(Trainer *r, int index, int token) {
    int left = r->pairs[index].left, right = r->pairs[index].right;
    size_t count = 0, room = 0;
    int *where = NULL;
    for (int i = r->pairs[index].first; i >= 0; i = r->places[i].later) {
        if (count == room)
            where = (int *)reallocate(where, room = room ? 2 * room : 64, sizeof(int));
        where[count++] = i;
    }
    if (count > 0)
        qsort(where, count, sizeof(int), compare_ints);
    for (size_t k = 0; k < count; k++) {
        int i = where[k], next = r->places[i].next;
        if (r->places[i].symbol != left || next < 0 || r->places[next].symbol != right)
            continue;
        int previous = r->places[i].previous, after = r->places[next].next;
        if (previous >= 0)
            unlink_place(r, previous);
        unlink_place(r, i);
        unlink_place(r, next);
        r->places[i].symbol = token;
        r->places[i].next = after;
        r->places[next].symbol = -1;
        if (after >= 0)
            r->places[after].previous = i;
        if (previous >= 0)
            link_place(r, previous);
        link_place(r, i);
    }
    free(where);
}

static void write_token(FILE *file, const char *s, int n) { // in GPT-2's alphabet, as a JSON string
    int32_t character[256];
    char *text = (char *)allocate((size_t)n * 2 + 1, 1), *end = text;
    byte_alphabet(character);
    for (int i = 0; i < n; i++)
        end = utf8_encode(end, character[(unsigned char)s[i]]);
    json_write_string(file, text, (size_t)(end - text));
    free(text);
}

// Writes a tokenizer.json of `vocab` tokens: <|endoftext|>, the 256 bytes, and what the words' commonest pairs make.
static void train_vocabulary(const Words *words, int vocab, FILE *file) {
    if (words->filled > INT32_MAX)
        fail("the different words of the text are too long to train on");
    Trainer r = {0};
    Tokenizer t = {0}; // text, length and vocab only
    TokenIndex index;
    t.text = (char **)allocate((size_t)vocab, sizeof(char *));
    t.length = (int *)allocate((size_t)vocab, sizeof(int));
    for (index.count = 1024; index.count < 2 * (size_t)vocab;)
        index.count *= 2;
    index.slots = (int *)allocate(index.count, sizeof(int));
    memset(index.slots, -1, index.count * sizeof(int));
    for (int i = 0; i < 257; i++) {
        char byte = (char)(i - 1);
        const char *text = i ? &byte : SEPARATOR;
        t.length[i] = i ? 1 : SEPARATOR_LENGTH;
        t.text[i] = (char *)allocate(1, (size_t)t.length[i]);
        memcpy(t.text[i], text, (size_t)t.length[i]);
        *find_token(&t, &index, text, t.length[i]) = i;
    }
    t.vocab = 257;

    r.places = (Place *)allocate(words->filled, sizeof(Place));
    r.word_count = (int64_t *)allocate(words->count, sizeof(int64_t));
    int place = 0, word = 0;
    for (size_t i = 0; i < words->slot_count; i++) {
        const Word *w = &words->slots[i];
        if (w->count == 0)
            continue;
        for (size_t k = 0; k < w->length; k++, place++) {
            Place p = {1 + (unsigned char)words->bytes[w->start + k],
                       k ? place - 1 : -1,
                       k + 1 < w->length ? place + 1 : -1,
                       word,
                       -1,
                       -1};
            r.places[place] = p;
        }
        r.word_count[word++] = w->count;
    }
    for (int i = 0; i < place; i++)
        link_place(&r, i);
    for (int i = 0; i < r.pair_count; i++)
        push_candidate(&r, i);

    int *merges = NULL, merge_count = 0, merge_room = 0, pair;
    while (t.vocab < vocab && (pair = pop_pair(&r)) >= 0) {
        int left = r.pairs[pair].left, right = r.pairs[pair].right, n = t.length[left] + t.length[right];
        if (r.pairs[pair].merged < 0) { // else it has arisen once more, out of later tokens
            char *text = (char *)allocate(1, (size_t)n);
            memcpy(text, t.text[left], (size_t)t.length[left]);
            memcpy(text + t.length[left], t.text[right], (size_t)t.length[right]);
            int *token = find_token(&t, &index, text, n);
            if (*token < 0) {
                t.text[t.vocab] = text;
                t.length[t.vocab] = n;
                *token = t.vocab++;
            } else {
                free(text); // two ways to one token, as a+bc and ab+c
            }
            r.pairs[pair].merged = *token;
            if (merge_count == merge_room) {
                merge_room = merge_room ? 2 * merge_room : 4096;
                merges = (int *)reallocate(merges, (size_t)merge_room, sizeof(int));
            }
            merges[merge_count++] = pair;
        }
        r.step++;
        r.changed_count = 0;
        merge_everywhere(&r, pair, r.pairs[pair].merged);
        for (int i = 0; i < r.changed_count; i++)
            push_candidate(&r, r.changed[i]);
    }
    if (t.vocab < vocab)
        fprintf(stderr, "%s: the text has patterns for %d tokens only, not %d\n", program_name, t.vocab, vocab);

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
    for (int i = 0; i < t.vocab; i++) {
        fprintf(file, i ? ",\n      " : "\n      ");
        write_token(file, t.text[i], t.length[i]);
        fprintf(file, ": %d", i);
    }
    fprintf(file, "\n    },\n    \"merges\": [");
    for (int i = 0; i < merge_count; i++) {
        const Pair *p = &r.pairs[merges[i]];
        fprintf(file, i ? ",\n      [" : "\n      [");
        write_token(file, t.text[p->left], t.length[p->left]);
        fprintf(file, ", ");
        write_token(file, t.text[p->right], t.length[p->right]);
        fprintf(file, "]");
    }
    fprintf(file, "\n    ]\n  }\n}\n");

    for (int i = 0; i < t.vocab; i++)
        free(t.text[i]);
    free(t.text);
    free(t.length);
    free(index.slots);
    free(merges);
    free(r.places);
    free(r.word_count);
    free(r.pairs);
    free(r.slots);
    free(r.heap);
    free(r.changed);
}

// ----------------------------------------------------------------------------
// Writing: every file under a temporary name first. On failure or Ctrl-C what was begun is removed.

typedef struct Output {
    char *path, *temporary;
    FILE *file;
} Output;
static Output outputs[4096];
static volatile int output_count, outputs_done; // done: those that have their final names

static void remove_temporaries(void) {
    for (int i = outputs_done; i < output_count; i++)
        unlink(outputs[i].temporary);
}

static void on_signal(int number) {
    remove_temporaries();
    _exit(128 + number);
}

static Output *open_output(const char *folder, const char *name) {
    Output *o = &outputs[output_count];
    if (output_count == sizeof outputs / sizeof outputs[0])
        fail("%s: more than %d files to write", folder, output_count);
    size_t room = strlen(folder) + strlen(name) + 7;
    o->path = (char *)allocate(room, 1);
    o->temporary = (char *)allocate(room, 1);
    snprintf(o->path, room, "%s/%s", folder, name);
    snprintf(o->temporary, room, "%s.part", o->path);
    o->file = fopen(o->temporary, "wb");
    if (!o->file)
        fail("%s: %s", o->temporary, strerror(errno));
    output_count++;
    return o;
}

static void close_output(Output *o) {
    int failed = ferror(o->file);
    if (fclose(o->file) != 0 || failed)
        fail("%s: cannot write: %s", o->temporary, strerror(errno));
}

typedef struct Shards { // the token files of one split
    const char *folder, *split;
    Output *output; // the open one
    int count;
    int64_t in_file, tokens, documents, bytes;
} Shards;

static void write_or_fail(Output *o, const void *bytes, size_t n) {
    if (fwrite(bytes, 1, n, o->file) != n)
        fail("%s: cannot write: %s", o->temporary, strerror(errno));
}

static void
write_header(Shards *s) { // llm.c's: 256 numbers of 32 bits, little-endian, the third is the number of tokens
    unsigned char header[1024] = {0};
    const uint32_t numbers[3] = {20240520, 1, (uint32_t)s->in_file};
    for (int i = 0; i < 12; i++)
        header[i] = (unsigned char)(numbers[i / 4] >> 8 * (i % 4));
    write_or_fail(s->output, header, sizeof header);
}

static void finish_shard(Shards *s) {
    if (!s->output)
        return;
    rewind(s->output->file);
    write_header(s);
    close_output(s->output);
    s->output = NULL;
}

static void write_tokens(Shards *s, const int *ids, size_t count) {
    while (count > 0) {
        if (!s->output) {
            char name[64];
            snprintf(name, sizeof name, "%s_%06d.bin", s->split, s->count++);
            s->output = open_output(s->folder, name);
            s->in_file = 0;
            write_header(s);
        }
        unsigned char bytes[8192];
        size_t n = count < sizeof bytes / 2 ? count : sizeof bytes / 2;
        if ((int64_t)n > SHARD_TOKENS - s->in_file)
            n = (size_t)(SHARD_TOKENS - s->in_file);
        for (size_t i = 0; i < n; i++) {
            bytes[2 * i] = (unsigned char)(ids[i] & 255);
            bytes[2 * i + 1] = (unsigned char)(ids[i] >> 8);
        }
        write_or_fail(s->output, bytes, 2 * n);
        ids += n;
        count -= n;
        s->in_file += (int64_t)n;
        s->tokens += (int64_t)n;
        if (s->in_file == SHARD_TOKENS)
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

// Gives all files their names, and removes token files of a former run that would be read along with them.
static void finish_outputs(const char *folder) {
    for (int i = 0; i < output_count; i++) {
        if (rename(outputs[i].temporary, outputs[i].path) != 0)
            fail("%s: %s", outputs[i].path, strerror(errno));
        outputs_done = i + 1;
    }
    DIR *list = opendir(folder);
    for (struct dirent *entry; list && (entry = readdir(list)) != NULL;) {
        char path[4096], canonical[64] = "";
        int number, ours = 0, train = strncmp(entry->d_name, "train_", 6) == 0;
        if (sscanf(entry->d_name, train ? "train_%6d.bin" : "val_%6d.bin", &number) == 1)
            snprintf(canonical, sizeof canonical, "%s_%06d.bin", train ? "train" : "val", number);
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        for (int i = 0; i < output_count; i++)
            ours |= strcmp(outputs[i].path, path) == 0;
        const char *dot = strrchr(entry->d_name, '.');
        if (ours || !dot || strcmp(dot, ".bin") != 0)
            continue;
        if (strcmp(entry->d_name, canonical) == 0)
            unlink(path);
        else if (strstr(entry->d_name, "train") || strstr(entry->d_name, "val"))
            fprintf(stderr, "%s: %s was there before, and train_moe will read it too\n", program_name, path);
    }
    if (list)
        closedir(list);
}

// ----------------------------------------------------------------------------

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

static void set_threads(int count) { // of no effect in a build without OpenMP
    (void)count;
#ifdef _OPENMP
    omp_set_num_threads(count);
#endif
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

static void make_folder(const char *path) { // and those above it
    char *part = (char *)allocate(strlen(path) + 1, 1);
    for (size_t i = 1; i <= strlen(path); i++) {
        if (path[i] != '/' && path[i] != 0)
            continue;
        memcpy(part, path, i);
        if (mkdir(part, 0777) != 0 && errno != EEXIST)
            fail("%s: %s", part, strerror(errno));
    }
    free(part);
}

static void print_split(const Shards *s) {
    printf("%s/%s_*.bin: %lld documents, %.1f MB, %lld tokens in %d file%s, %.2f bytes a token\n", s->folder, s->split,
           (long long)s->documents, (double)s->bytes / 1e6, (long long)s->tokens, s->count, s->count == 1 ? "" : "s",
           (double)s->bytes / (double)s->tokens);
}

int main(int argc, char **argv) {
    static const struct option options[] = {
        {"vocab", required_argument, NULL, 'v'}, {"tokenizer", required_argument, NULL, 't'},
        {"out", required_argument, NULL, 'o'},   {"threads", required_argument, NULL, 'n'},
        {"clean", no_argument, NULL, 'c'},       {"ids", no_argument, NULL, 'i'},
        {"help", no_argument, NULL, 'h'},        {NULL, 0, NULL, 0}};
    const char *tokenizer = NULL, *out = NULL;
    int vocab = 0, ids = 0, help = 0, threads = thread_count(), option;
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
        else if (option == 'c')
            r.clean = 1;
        else if (option == 'i')
            ids = 1;
        else if (option == 'h')
            help = 1;
        else
            usage_fail("%s: unknown option, or its value is missing", argv[optind - 1]);
    }
    if (help) {
        print_help();
        return 0;
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
    set_threads(threads);

    int train_files = 0;
    for (int i = 0; i < r.path_count; i++) {
        struct stat info;
        if (stat(r.paths[i], &info) != 0)
            fail("%s: %s", r.paths[i], strerror(errno));
        if (!S_ISREG(info.st_mode))
            fail("%s: not a regular file; texts are read more than once", r.paths[i]);
        if (info.st_size == 0)
            fail("%s: the file is empty", r.paths[i]);
        if (access(r.paths[i], R_OK) != 0)
            fail("%s: %s", r.paths[i], strerror(errno));
        r.total += info.st_size;
        train_files += !is_valid_name(r.paths[i]);
    }
    if (train_files == 0)
        fail("%s: only validation text; give a file without \"valid\" in its name too", r.paths[0]);
    Tokenizer *t = tokenizer ? tokenizer_load(tokenizer) : NULL;
    if (t && t->vocab > 65536)
        fail("%s: %d tokens, but a token file holds numbers up to 65535 only", tokenizer, t->vocab);
    make_folder(out);
    atexit(remove_temporaries);
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);

    int all_train = train_files == r.path_count;
    int64_t split = -1;
    if (!t) {
        Words words = {0};
        count_words(&r, &words);
        if (words.count == 0)
            fail("%s: no text to learn from", r.paths[0]);
        Output *o = open_output(out, "tokenizer.json");
        train_vocabulary(&words, vocab ? vocab : 4096, o->file);
        close_output(o);
        free_words(&words);
        t = tokenizer_load(o->temporary);
    } else {
        Output *o = open_output(out, "tokenizer.json");
        write_or_fail(o, t->json, t->json_size);
        close_output(o);
        if (all_train) {
            rewind_reader(&r, "counting documents");
            while (next_block(&r)) {
            }
        }
    }
    if (all_train) {
        if (r.kept < 2)
            fail("%s: %lld document, so none is left for validation; separate documents by %s, or give a second file "
                 "with "
                 "\"valid\" in its name",
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
            printf("%lld %s\n", (long long)r.tally[k], tally_names[k]);
    tokenizer_free(t);
    free(r.bytes);
    free(r.documents);
    return 0;
}
