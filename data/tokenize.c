// Turns text into tokens: trains a byte-level BPE vocabulary, or takes one, and writes token files.
// Gives: the program data/tokenize, whose output folder train_moe reads with --data.
// Needs: data/tokenizer.h, data/roles.h, and the parts that are included below.
// Texts are read in blocks, so they may be larger than memory: once to count documents, where some
// of them are set aside for validation, once to count words, from which the vocabulary is made, and
// once to encode them. <|endoftext|> separates documents.
//
//     data/tokenize --out data/mine mine-train.txt mine-valid.txt
//     data/tokenize --tokenizer gpt2/tokenizer.json --out data/mine mine.txt
//     data/tokenize --tokenizer data/mine/tokenizer.json --ids hello.txt
//
// Every result is the same with any number of threads. No file gets its final name before all are
// written, so that an interrupted run changes nothing.
#define PROGRAM "data/tokenize"
#include "roles.h"
#include "tokenizer.h"
#include <getopt.h>

#ifndef BLOCK_BYTES              // dev/test/fuzz.c takes smaller ones
#define BLOCK_BYTES  (8 << 20)   // of text at a time; a longer document makes it grow
#endif
#define WORD_BYTES   1000        // of a word that counts as one
#define WORD_MEMORY  (256 << 20) // bytes for counting words
#define SEPARATOR    "<|endoftext|>"

#include "clean.h"      // --clean
#include "interrupt.h"  // Ctrl-C
#include "output.h"     // token files
#include "replace.h"    // how they take the place of old ones
#include "vocabulary.h" // --vocab

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
    int64_t split; // the first document of validation, where no file is validation text; else -1
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

// On a terminal one line that is written again and again, into a pipe a line every ten seconds.
static void show_progress(Reader *r, int finished) {
    double now = seconds();
    double elapsed = now - r->started;
    double share = (double)r->done / (double)r->total;
    int terminal = is_terminal(2);
    int due = now - r->shown >= (terminal ? 0.1 : 10);
    if (finished) {
        due = terminal && r->shown != r->started; // only to complete a line that was begun
    }
    if (!due) {
        return;
    }
    r->shown = now;
    char line[256];
    snprintf(line, sizeof(line), "%s: %3.0f%%, %.1f MB/s, %.0f s left", r->label, 100 * share,
             (double)r->done / 1e6 / elapsed, elapsed / share - elapsed);
    if (terminal) {
        write_over(stderr, line, 0);
    }
    fprintf(stderr, "%s%s", terminal ? "" : line, terminal && !finished ? "" : "\n");
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
static void open_next_text(Reader *r) {
    const char *path = r->paths[r->next];
    r->file = fopen(path, "rb");
    if (!r->file) {
        fail("%s: %s", path, strerror(errno));
    }
    r->valid = file_role(path) == VALIDATION;
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
        if (!r->file) {
            if (r->next == r->path_count) {
                show_progress(r, 1);
                return 0;
            }
            open_next_text(r);
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

// How many of the block's documents are for training; those of validation come behind them.
static int64_t training_documents(const Reader *r) {
    int64_t count = (int64_t)r->count;
    int64_t left = r->split - (r->kept - count); // documents for training from this block on
    if (r->valid) {
        return 0;
    }
    if (r->split < 0 || left > count) {
        return count;
    }
    return left > 0 ? left : 0;
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

// Adds 1 to the count of each word of a text. A word of more than WORD_BYTES, such as DNA, counts
// in pieces.
static void count_document(Table *counts, const unsigned char *class_of, const char *s, size_t n) {
    const char *end = s + n;
    while (s < end) {
        // Of a longer word only a few bytes behind the first WORD_BYTES are looked at: enough for the
        // character that is cut there and the next one. So a run without a break is looked through
        // once, and not again for every piece.
        size_t left = (size_t)(end - s);
        size_t length = first_word(class_of, s, left > WORD_BYTES + 8 ? WORD_BYTES + 8 : left);
        length = length > WORD_BYTES ? WORD_BYTES : length;
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
        int64_t count = training_documents(r);

        // Every thread counts in its own table. The sums are taken after each block, so that they,
        // and with them the words given up below, are the same with any number of threads.
#pragma omp parallel for schedule(dynamic, 16)
        for (int64_t i = 0; i < count; i++) {
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
// Encoding.

// Encodes all documents in parallel and writes them in order, those of validation to val, the others to
// train.
static void encode_documents(Reader *r, const Tokenizer *t, Shards *train, Shards *val) {
    int threads = thread_count();
    Tokenizer **mine = (Tokenizer **)allocate((size_t)threads, sizeof(Tokenizer *));
    for (int i = 0; i < threads; i++) {
        mine[i] = tokenizer_share(t);
    }

    int *ids = NULL;
    size_t allocated = 0, each = tokenizer_bound(t, 2) - tokenizer_bound(t, 1);
    rewind_reader(r, "encoding");
    while (next_block(r)) {
        // The ids of a document begin at the index of its bytes, times `each` where a byte may become several ids. The
        // encoder asks for one or two ids more: they are at the separator's index, or those that tokenizer_bound() adds.
        if (r->allocated > allocated) {
            free(ids);
            allocated = r->allocated;
            ids = (int *)allocate(tokenizer_bound(t, allocated), sizeof(int));
        }

        // A thread has a tokenizer of its own, because encoding writes to the cache.
#pragma omp parallel for schedule(dynamic, 16)
        for (int64_t i = 0; i < (int64_t)r->count; i++) {
            Document *d = &r->documents[i];
            Tokenizer *own = mine[thread_number()];
            d->ids = tokenizer_encode(own, r->bytes + d->start, d->length, ids + each * d->start);
        }

        // Each document begins with <|endoftext|>, and with the token that begins a text where there is one.
        int64_t for_training = training_documents(r);
        for (int64_t i = 0; i < (int64_t)r->count; i++) {
            const Document *d = &r->documents[i];
            Shards *s = i < for_training ? train : val;
            write_tokens(s, &t->eot, 1);
            write_tokens(s, &t->bos, t->bos >= 0);
            write_tokens(s, ids + each * d->start, d->ids);
            s->documents++;
            s->bytes += (int64_t)d->length;
        }
    }
    free(ids);
    for (int i = 0; i < threads; i++) {
        tokenizer_free(mine[i]);
    }
    free(mine);
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

// Standard output must have taken everything that was printed.
static void finish_output(void) {
    int lost = ferror(stdout);
    if (fflush(stdout) != 0 || lost) {
        fail("standard output: cannot write: %s", lost ? "a part of it is lost" : strerror(errno));
    }
}

static void print_help(void) {
    printf("usage: data/tokenize [--vocab N | --tokenizer FILE] [--clean] TEXTFILE... --out DIR\n"
           "       data/tokenize --tokenizer FILE --ids TEXTFILE...\n\n"
           "Turns texts, whose documents are separated by %s, into token files for train_moe. A file\n"
           "whose name has the word val, valid, validation or eval (my-text.valid.txt) becomes validation\n"
           "text; one with the word train or training, or none of these, is for training. Without\n"
           "validation text the last hundredth of the documents becomes it.\n\n"
           "  --out DIR         where to write tokenizer.json, train_000000.bin ..., val_000000.bin ...\n"
           "  --vocab N         train a byte-level BPE vocabulary of N tokens, 257 to 65536 (default 4096)\n"
           "  --tokenizer FILE  use this tokenizer.json, or that of a model's folder (BPE, such as GPT-2's, Llama's, Qwen's)\n"
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

// The word that getopt_long did not understand. In one of short options, such as -x.txt, it stops
// behind the first letter, and the word is then the next one.
static const char *refused_word(char **argv) {
    const char *last = argv[optind - 1], *next = argv[optind];
    int is_last = strncmp(last, "--", 2) == 0 || (last[0] == '-' && last[1] == optopt);
    return !is_last && next && next[0] == '-' && next[1] == optopt ? next : last;
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
            finish_output();
            exit(0);
        } else {
            usage_fail("%s: unknown option, or its value is missing", refused_word(argv));
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

// Where another file than tokenizer.json says which token ends a text, a tokenizer_config.json hands it on to those who
// read the output folder.
static void write_ends(const Tokenizer *t) {
    if (t->eot_file || t->bos >= 0) {
        printf("each document begins with %s", t->raw[t->eot]);
        if (t->eot_file) {
            printf(" (%s says that it ends a text)", t->eot_file);
        }
        if (t->bos >= 0) {
            printf(" and %s", t->raw[t->bos]);
        }
        printf("\n");
        fflush(stdout);
    }
    if (!t->eot_file) {
        return;
    }
    char *text = NULL;
    size_t size;
    FILE *memory = open_memory(&text, &size);
    fprintf(memory, "{\n  \"eos_token\": ");
    json_write_string(memory, t->raw[t->eot], strlen(t->raw[t->eot]));
    fprintf(memory, "\n}\n");
    close_memory(memory, &text);
    write_output("tokenizer_config.json", text, size);
    free(text);
}

// --ids: prints the ids of each text as it is, one line a file.
static void print_ids(const char *tokenizer, char **paths, int count) {
    Tokenizer *t = tokenizer_load(tokenizer);
    for (int i = 0; i < count; i++) {
        size_t size;
        int is_input = strcmp(paths[i], "-") == 0;
        char *text = is_input ? read_stream(stdin, "standard input", &size) : read_file(paths[i], &size);
        int *ids = (int *)allocate(tokenizer_bound(t, size), sizeof(int));
        size_t n = tokenizer_encode(t, text, size, ids);
        for (size_t k = 0; k < n; k++) {
            printf(k ? " %d" : "%d", ids[k]);
        }
        printf("\n");
        free(ids);
        free(text);
    }
    tokenizer_free(t);
    finish_output();
}

// Adds up the sizes of the texts, refuses one that cannot be read twice, and returns the number of
// training texts.
static int check_texts(Reader *r) {
    int train_files = 0;
    for (int i = 0; i < r->path_count; i++) {
        struct stat info;
        if (strcmp(r->paths[i], "-") == 0) {
            fail("-: texts are read more than once, which standard input cannot be: write it to a file "
                 "first");
        }
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
        train_files += file_role(r->paths[i]) != VALIDATION;
    }
    if (train_files == 0) {
        fail("%s: only validation text, as its name says; give one for training too, such as train.txt",
             r->paths[0]);
    }
    return train_files;
}

// Trains a vocabulary on the texts, writes its tokenizer.json and reads it back.
static Tokenizer *train_tokenizer(Reader *r, int vocab) {
    char path[4200], *json = NULL;
    size_t size = 0;
    Table words = count_words(r);
    if (words.count == 0) {
        fail("%s: no text to learn from", r->paths[0]);
    }
    FILE *memory = open_memory(&json, &size);
    train_vocabulary(&words, vocab, memory);
    close_memory(memory, &json);
    write_output("tokenizer.json", json, size);
    table_free(&words);
    free(json);
    snprintf(path, sizeof(path), "%s/tokenizer.json", unfinished_path);
    return tokenizer_load(path);
}

// Counts the documents, and chooses the first one of validation, which gets the last hundredth of all,
// but at least one.
static void choose_split(Reader *r) {
    rewind_reader(r, "counting documents");
    while (next_block(r)) {
    }
    if (r->kept == 0) {
        fail("%s: no text to learn from", r->paths[0]);
    }
    if (r->kept < 2) {
        fail("%s: 1 document, so none is left for validation; put %s between documents, "
             "or give a second file that has the word \"valid\" in its name",
             r->paths[0], SEPARATOR);
    }
    int64_t val = r->kept < 200 ? 1 : r->kept / 100;
    printf("no file has \"valid\" in its name: the last %lld of %lld documents become validation\n",
           (long long)val, (long long)r->kept);
    fflush(stdout);
    r->split = r->kept - val;
}

static void print_split(const Shards *s) {
    printf("%s/%s_*.bin: %lld document%s, %.1f MB, %lld tokens in %d file%s, %.2f bytes a token\n",
           s->folder, s->split, (long long)s->documents, s->documents == 1 ? "" : "s",
           (double)s->bytes / 1e6, (long long)s->tokens, s->count, s->count == 1 ? "" : "s",
           (double)s->bytes / (double)s->tokens);
}

// Tells the user how much there is and how much was cleaned.
static void print_result(const Reader *r, const Shards *train, const Shards *val) {
    print_split(train);
    print_split(val);
    for (int k = 0; k < TALLIES; k++) {
        if (r->tally[k]) {
            printf("%d %s\n", r->tally[k], tally_names[k]);
        }
    }
    finish_output();
}

int main(int argc, char **argv) {
    Options o = {NULL, NULL, 0, 0, 0};
    Reader r = {0};
    program_name = "data/tokenize";
    open_standard_files();
    signal(SIGXFSZ, SIG_IGN); // the write that is too long says so
    r.split = -1;
    parse_options(&o, &r, argc, argv);
    if (o.ids) {
        print_ids(o.tokenizer, r.paths, r.path_count);
        return 0;
    }
    share_processors(o.threads, 1);

    // Find every mistake that can be found before the output folder is touched.
    int all_train = check_texts(&r) == r.path_count; // no validation file
    Tokenizer *t = o.tokenizer ? tokenizer_load(o.tokenizer) : NULL;
    prepare_output(o.out);

    // Set documents aside for validation, then make the vocabulary from the others.
    if (all_train) {
        choose_split(&r);
    }
    if (t) {
        write_output("tokenizer.json", t->json, t->json_size); // byte for byte
        write_ends(t);
    } else {
        t = train_tokenizer(&r, o.vocab ? o.vocab : 4096);
    }

    // Encode all documents. Only then do the files get their names.
    int wide = t->vocab > 65536;
    Shards train = {o.out, "train", wide, NULL, "", checksum_begin(), 0, 0, 0, 0, 0};
    Shards val = {o.out, "val", wide, NULL, "", checksum_begin(), 0, 0, 0, 0, 0};
    encode_documents(&r, t, &train, &val);
    finish_shard(&train);
    finish_shard(&val);
    if (train.tokens == 0 || val.tokens == 0) {
        fail("%s: no document for %s", r.paths[0], train.tokens ? "validation" : "training");
    }
    Names old = list_old_files(o.out, 1);
    Names fresh = list_new_files(&train, &val, t->eot_file != NULL);
    replace_files(o.out, &old, &fresh);
    print_result(&r, &train, &val);
    free_names(&old);
    free_names(&fresh);
    tokenizer_free(t);
    free(r.bytes);
    free(r.documents);
    return 0;
}
