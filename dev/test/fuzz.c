// Random inputs for everything that is read: libFuzzer changes inputs until they reach new code, under AddressSanitizer and
// UBSan. A wrong input may end the program by fail(), but by nothing else.
// Gives: make fuzz. Needs: clang; the programs train_moe, data/tokenize and data/make_stories, which make what the inputs
// begin with; the trainer and data/tokenize as source, compiled into this one.
//
//     FUZZ=tokenizer INPUTS=1000000 dev/build/fuzz     one format's share of the inputs; see formats[] below
//     FUZZ=tokenizer dev/build/fuzz FILE               one input, such as dev/build/fuzzing/tokenizer-crash-...
//
// Inputs that led to new code stay in dev/build/fuzzing/FORMAT and are where the next call begins.
//
// fail() ends in exit(), which here jumps back to the fuzzer. What the product allocated and opened until then is taken back:
// the macros below send its calls through functions that keep lists. Its variables are in sections of their own, and get
// the values back that they had at the start.
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <sanitizer/allocator_interface.h>
#include <sanitizer/asan_interface.h>

// Only the product's own branches guide the fuzzer.
#pragma clang attribute push(__attribute__((no_sanitize("coverage"))), apply_to = function)

// ---------------------------------------------------------------------------------------------------------------------
// What the product's calls become

// Memory, in a list, so that it can be taken back. The link before each block is poisoned: who reads it, reads too far.
typedef struct Block {
    struct Block *next, *previous;
    long stays, unused; // from before the first input
} Block;

static Block blocks = {&blocks, &blocks, 0, 0};
static int listing; // while an input is read; what was allocated before stays
static jmp_buf back;

#define LARGEST (64 << 20) // bytes; more is said to be too much

static void open_block(Block *b) {
    ASAN_UNPOISON_MEMORY_REGION(b, sizeof(Block));
}

static void close_block(Block *b) {
    if (b != &blocks) {
        ASAN_POISON_MEMORY_REGION(b, sizeof(Block));
    }
}

static void link_block(Block *b, Block *next, Block *previous) {
    open_block(next);
    open_block(previous);
    next->previous = b == next ? previous : b;
    previous->next = b == next ? next : b;
    if (b != next) {
        b->next = next;
        b->previous = previous;
        close_block(b);
    }
    close_block(next);
    close_block(previous);
}

static void *take_block(size_t count, size_t size, int zeros) {
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes) || bytes > LARGEST) {
        errno = ENOMEM;
        return NULL;
    }
    Block *b = zeros ? calloc(1, sizeof(Block) + bytes) : malloc(sizeof(Block) + bytes);
    b->stays = !listing;
    if (listing) {
        link_block(b, blocks.next, &blocks);
    } else {
        close_block(b);
    }
    return b + 1;
}

static void *fuzz_calloc(size_t count, size_t size) {
    return take_block(count, size, 1);
}

static void *fuzz_malloc(size_t size) {
    return take_block(size, 1, 0);
}

static void fuzz_free(void *p) {
    if (!p || __sanitizer_get_ownership(p)) { // from the C library
        free(p);
        return;
    }
    Block *b = (Block *)p - 1;
    open_block(b);
    if (b->stays && listing) {
        close_block(b);
        return;
    }
    if (!b->stays) {
        Block *next = b->next, *previous = b->previous;
        link_block(next, next, previous);
    }
    free(b);
}

static void *fuzz_realloc(void *p, size_t size) {
    if (p && __sanitizer_get_ownership(p)) {
        return realloc(p, size);
    }
    void *moved = fuzz_malloc(size);
    if (p && moved) {
        size_t old = __sanitizer_get_allocated_size((Block *)p - 1) - sizeof(Block);
        memcpy(moved, p, old < size ? old : size);
        fuzz_free(p);
    }
    return moved;
}

// Files: all are real but one, whose content is the input.
static const char *input_name = "";
static const uint8_t *input;
static size_t input_size;
static FILE *files[64];
static DIR *folders[64];
static int descriptors[64];

static int is_input(const char *path) {
    const char *slash = strrchr(path, '/');
    return !strcmp(slash ? slash + 1 : path, input_name);
}

static FILE *fuzz_fopen(const char *path, const char *mode) {
    FILE *file = is_input(path) && *mode == 'r' ? fmemopen((void *)input, input_size, mode) : fopen(path, mode);
    for (int i = 0; file && listing && i < 64; i++) {
        if (!files[i]) {
            files[i] = file;
            break;
        }
    }
    return file;
}

static int fuzz_fclose(FILE *file) {
    for (int i = 0; i < 64; i++) {
        files[i] = files[i] == file ? NULL : files[i];
    }
    return fclose(file);
}

static DIR *fuzz_opendir(const char *path) {
    DIR *folder = opendir(path);
    for (int i = 0; folder && listing && i < 64; i++) {
        if (!folders[i]) {
            folders[i] = folder;
            break;
        }
    }
    return folder;
}

static int fuzz_closedir(DIR *folder) {
    for (int i = 0; i < 64; i++) {
        folders[i] = folders[i] == folder ? NULL : folders[i];
    }
    return closedir(folder);
}

static int fuzz_open(const char *path, int flags, ...) {
    int file;
    if (is_input(path) && !(flags & (O_WRONLY | O_RDWR))) {
        file = memfd_create("input", 0);
        if (file < 0 || write(file, input, input_size) != (ssize_t)input_size || lseek(file, 0, SEEK_SET) != 0) {
            abort();
        }
    } else {
        file = open(path, flags, 0666);
    }
    for (int i = 0; file >= 0 && listing && i < 64; i++) {
        if (!descriptors[i]) {
            descriptors[i] = file;
            break;
        }
    }
    return file;
}

static int fuzz_close(int file) {
    for (int i = 0; i < 64; i++) {
        descriptors[i] = descriptors[i] == file ? 0 : descriptors[i];
    }
    return close(file);
}

// A mapped file is memory of its size, so that AddressSanitizer sees what is read behind its end.
static void *fuzz_mmap(void *at, size_t size, int protection, int flags, int file, off_t offset) {
    if (file < 0) {
        return mmap(at, size, protection, flags, file, offset);
    }
    char *memory = fuzz_malloc(size);
    if (!memory || pread(file, memory, size, offset) != (ssize_t)size) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    return memory;
}

static int fuzz_munmap(void *at, size_t size) {
    (void)size;
    fuzz_free(at);
    return 0;
}

__attribute__((noreturn)) static void fuzz_exit(int status) {
    if (!listing) {
        exit(status);
    }
    longjmp(back, 1);
}

static void take_back(void) {
    for (int i = 0; i < 64; i++) {
        if (files[i]) {
            fclose(files[i]);
        }
        if (folders[i]) {
            closedir(folders[i]);
        }
        if (descriptors[i]) {
            close(descriptors[i]);
        }
        files[i] = NULL;
        folders[i] = NULL;
        descriptors[i] = 0;
    }
    while (blocks.next != &blocks) {
        fuzz_free(blocks.next + 1);
    }
}

#define malloc(size)             fuzz_malloc(size)
#define calloc(count, size)      fuzz_calloc(count, size)
#define realloc(p, size)         fuzz_realloc(p, size)
#define free(p)                  fuzz_free(p)
#define fopen(path, mode)        fuzz_fopen(path, mode)
#define fclose(file)             fuzz_fclose(file)
#define opendir(path)            fuzz_opendir(path)
#define closedir(folder)         fuzz_closedir(folder)
#define open(...)                fuzz_open(__VA_ARGS__)
#define close(file)              fuzz_close(file)
#define mmap(a, n, p, f, d, o)   fuzz_mmap(a, n, p, f, d, o)
#define munmap(a, n)             fuzz_munmap(a, n)
#define truncate(path, size)     ((void)(path), (void)(size), 0)
#define exit(status)             fuzz_exit(status)
#define fsync(file)              ((void)(file), 0) // millions of times
#define pthread_create(t, a, f, x)       ((void)(t), (void)(f), 0) // it would wait for signals
#define pthread_sigmask(how, set, old)   ((void)(set), 0)

#pragma clang attribute pop
#pragma clang section bss = "product_bss" data = "product_data"
#define TRAIN_MOE_NO_MAIN
#include "train_moe.c"
#undef PROGRAM
#define BLOCK_BYTES 256
#define main        main_of_tokenize
#define count_words count_words_of_texts
#include "data/tokenize.c"
#undef main
#pragma clang section bss = "" data = ""
#pragma clang attribute push(__attribute__((no_sanitize("coverage"))), apply_to = function)

// The product's variables, and what they had in them before the first input.
extern char __start_product_bss[], __stop_product_bss[], __start_product_data[], __stop_product_data[];
static char *variables[2];

// memcpy over variables and over what AddressSanitizer put between them.
__attribute__((no_sanitize("address"))) static void copy_plainly(char *to, const char *from, size_t size) {
    for (size_t i = 0; i < size / 8; i++) {
        ((volatile uint64_t *)(void *)to)[i] = ((const uint64_t *)(const void *)from)[i];
    }
}

static void keep_variables(int keep) {
    char *const start[] = {__start_product_bss, __start_product_data};
    const size_t size[] = {(size_t)(__stop_product_bss - start[0]), (size_t)(__stop_product_data - start[1])};
    for (int i = 0; i < 2; i++) {
        if (keep) {
            variables[i] = (char *)allocate(size[i], 1);
            copy_plainly(variables[i], start[i], size[i]);
        } else {
            copy_plainly(start[i], variables[i], size[i]);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What the inputs begin with: a run of the programs themselves

static char base[64]; // the folder of make_base()

#define TINY                                                                                                           \
    "--layers 1 --dim 4 --heads 1 --ffn 4 --experts 2 --seq 8 --batch 2 --eval-tokens 32 --tokens 4 --threads 1 "      \
    "--steps 2 --save-every 1"

static const char *in_base(const char *name) {
    static char path[8][128];
    static int next;
    char *p = path[next++ % 8];
    snprintf(p, sizeof(path[0]), "%s/%s", base, name);
    return p;
}

// A byte of the input, which then is shorter: for what is not in a file.
static int take_byte(void) {
    if (!input_size) {
        return 0;
    }
    input_size--;
    return *input++;
}

// ---------------------------------------------------------------------------------------------------------------------
// The formats

static void expect_true(int condition, const char *what) {
    if (!condition) {
        static const char text[] = "\n== this should not be: ";
        if (write(2, text, sizeof(text) - 1) < 0 || write(2, what, strlen(what)) < 0) {
            abort();
        }
        abort();
    }
}

static void read_json(void) {
    Json *json = json_parse((const char *)input, input_size, "input");
    const Json *members = json_get(json, "members");
    for (const Json *m = members ? members->child : NULL; m; m = m->next) {
        expect_true(m->type != 's' || strlen(m->text) <= m->length, "a text is longer than its length");
    }
    json_free(json);
}

// Any tokenizer that is taken turns any text into ids, and back where it has no normalizer.
static void read_tokenizer(void) {
    static const char text[] = "It's 12 o'clock,\n\n  caf\xc3\xa9 \xe4\xb8\xad\xff<|endoftext|>hello hello\t the the";
    Tokenizer *t = tokenizer_load("tokenizer.json");
    int *ids = (int *)allocate(tokenizer_bound(t, sizeof(text) - 1), sizeof(int)), length, strips = 0;
    size_t count = tokenizer_encode(t, text, sizeof(text) - 1, ids), at = 0;
    expect_true(count <= tokenizer_bound(t, sizeof(text) - 1), "more ids than the bound");
    for (int i = 0; i < t->first.count; i++) {
        strips |= t->first.list[i].lstrip | t->first.list[i].rstrip;
    }
    if (tokenizer_bound(t, 1) > 2 || strips) {
        at = sizeof(text) - 1;
        count = 0;
    }
    for (size_t i = 0; i < count; i++) {
        const char *token = tokenizer_text(t, ids[i], &length);
        int same = at + (size_t)length < sizeof(text) && !memcmp(text + at, token, (size_t)length);
        expect_true(same, "another text comes back");
        at += (size_t)length;
    }
    expect_true(at == sizeof(text) - 1, "a shorter text comes back");
    free(ids);
    tokenizer_free(t);
}

// One step forward and back of the model that a configuration describes, where it is small.
static void try_config(Config *c) {
    config_check(c);
    c->batch = 1;
    double width = (double)c->dim * c->layers * (c->experts + 4) * (c->topk + 1);
    double rest = (double)c->ffn * c->layers * c->experts;
    if (c->layers > 3 || c->vocab > 300 || c->seq > 32 || width > 4000 || rest > 1000 || c->dim > 64 || c->heads > 16 ||
        c->routers > 4 || c->cell > 64 || c->ngrams > 1000 || c->attention_experts > 16 || c->head_width > 64 || c->shared_ffn + c->dense_ffn > 1000) {
        return;
    }
    int tokens[33];
    for (int i = 0; i < 33; i++) {
        tokens[i] = i * 7 % c->vocab;
    }
    Model *m = model_allocate(c, c->seq, 1, NULL);
    double *frequency = (double *)allocate((size_t)c->vocab, sizeof(double));
    model_init(m, frequency);
    Batch batch = {tokens, tokens + 1, 1, c->seq, TRAIN_MODE, 1, 1, 0, 1, 1};
    model_forward(m, &batch);
    model_backward(m);
    model_free(m);
}

static void read_config(void) {
    Config c;
    config_defaults(&c);
    config_recipe(&c, "mixtral");
    config_from_directory(&c, in_base("run/latest"));
    try_config(&c);
}

// The words of a command line, one in a line.
static void read_options_line(void) {
    char *text = (char *)allocate(input_size + 1, 1), *words[66] = {(char *)"train_moe"}, *rest = NULL;
    int count = 1;
    memcpy(text, input, input_size);
    for (char *word = strtok_r(text, "\n", &rest); word && count < 64; word = strtok_r(NULL, "\n", &rest)) {
        words[count++] = word;
    }
    Config c;
    parse_command_line(&c, count, words);
    c.vocab = 50;
    try_config(&c);
}

static Run ready; // with a model and a tokenizer, from before the first input

static void make_ready(void) {
    Config *c = &ready.config;
    FILE *to = fopen("/dev/null", "wb");
    ready.backend = &cpu_backend;
    config_defaults(c);
    config_recipe(c, "mixtral");
    config_from_directory(c, in_base("run/latest"));
    config_check(c);
    c->batch = 1;
    ready.model = model_allocate(c, 1, 0, NULL);
    ready.tokenizer = tokenizer_load(in_base("data/tokenizer.json"));
    load_weights(&ready, in_base("run/latest"), 0);

    // What generation allocates once is allocated now.
    static const char prompt[] = "Once upon a time there was a small text, longer than any that the fuzzer makes, which are "
                                 "of one hundred bytes at most";
    for (int i = 0; i < 2; i++) {
        generate(&ready, prompt, sizeof(prompt), to);
    }
    fclose(to);
}

static void read_weights(const char *dir) {
    load_weights(&ready, in_base(dir), 0);
}

static void read_safetensors(void) {
    trust_files = (int)(input_size % 2); // else nothing that was changed behind the header gets far
    read_weights("run/latest");
}

static void read_index(void) {
    read_weights("split");
}

static void read_state(void) {
    Run run;
    Config asked;
    memset(&run, 0, sizeof(run));
    config_defaults(&asked);
    config_recipe(&asked, "mixtral");
    run.config = asked;
    run.backend = &cpu_backend;
    snprintf(run.out, sizeof(run.out), "%s", in_base("run"));
    trust_files = (int)(input_size % 2);
    resume_run(&run, &asked, in_base("run/latest"));
}

static void read_log(void) {
    cut_log(in_base("run/log.jsonl"), 1);
}

static void read_tokens(void) {
    int inputs[64], targets[64];
    Data *d = data_open(in_base("data"), "train", 8, 270, 1);
    free(data_frequency(d, 270));
    data_batch(d, 0, 8, inputs, targets);
    data_batch(d, 1000003, 8, inputs, targets);
    data_window(d, 0, -1, inputs, targets);
    for (int i = 0; i < 8; i++) {
        expect_true(inputs[i] < 270 && targets[i] < 270, "a token is not in the vocabulary");
    }
    data_close(d);
}

// All of data/tokenize, on a text of which the first byte says how.
static void read_texts(void) {
    int how = take_byte();
    char vocab[16], out[128], train[128];
    snprintf(vocab, sizeof(vocab), "%d", 257 + how % 64);
    snprintf(out, sizeof(out), "%s", in_base("out"));
    snprintf(train, sizeof(train), "%s", in_base("train.txt"));
    const char *const words[] = {"data/tokenize", train, "--out", out, "--vocab", vocab, how & 64 ? "--clean" : train, NULL};
    optind = 0;
    main_of_tokenize(how & 128 ? 6 : 7, (char **)words);
}

// A prompt is encoded, and the model goes on from it.
static void read_prompt(void) {
    int how = take_byte();
    Config *c = &ready.config;
    c->tokens = how % 4;
    c->temperature = how & 4 ? 0 : 0.01 * how;
    c->top_k = how / 16;
    c->top_p = how & 8 ? 0.5 : 1;
    FILE *to = fopen("/dev/null", "wb");
    generate(&ready, (const char *)input, input_size, to);
    fclose(to);
}

// Logits as they may come out of any weights.
static void read_logits(void) {
    int how = take_byte();
    double u = take_byte() / 256.0;
    int n = (int)(input_size / sizeof(real));
    real *logits = allocate_reals((size_t)n + 1);
    memcpy(logits, input, (size_t)n * sizeof(real));
    int id = n ? sample(logits, n, how & 1 ? 0 : how / 64.0, how % 7, how % 5 / 4.0, u) : 0;
    expect_true(id >= 0 && id <= max_int(n - 1, 0), "a token that there is not");
}

static const struct {
    const char *name, *input; // the file that the input stands for
    void (*read)(void);
    int share, longest;   // of a thousand inputs, by how fast they are; bytes of one
    const char *seeds[4]; // files to begin with
} formats[] = {
    {"json", "", read_json, 170, 8192, {"run/latest/config.json", "data/tokenizer.json", "run/log.jsonl"}},
    {"tokenizer", "tokenizer.json", read_tokenizer, 100, 8192, {"data/tokenizer.json", "data/steps.json", "data/sentence.json"}},
    {"config", "config.json", read_config, 120, 4096, {"run/latest/config.json"}},
    {"options", "", read_options_line, 150, 400, {NULL}},
    {"safetensors", "model.safetensors", read_safetensors, 60, 8192, {"run/latest/model.safetensors"}},
    {"index", "model.safetensors.index.json", read_index, 60, 1000, {NULL}},
    {"state", "trainer_state.json", read_state, 120, 400, {"run/latest/trainer_state.json"}},
    {"log", "log.jsonl", read_log, 80, 4096, {"run/log.jsonl"}},
    {"tokens", "train_000000.bin", read_tokens, 95, 8192, {"data/train_000000.bin", "data/val_000000.bin"}},
    {"texts", "train.txt", read_texts, 5, 1000, {"train.txt", "valid.txt"}},
    {"prompt", "", read_prompt, 10, 100, {"valid.txt"}},
    {"logits", "", read_logits, 30, 1024, {"run/latest/model.safetensors"}},
};

// More to begin with, which no program writes.
static const struct {
    const char *format, *text;
} texts[] = {
    {"json", "[{\"a\":[-1.5e3,true,null,\"\\ud83d\\ude00\\n\\u0000\"]},{}]"},
    {"config",
     "{\"model_type\":\"mixtral\",\"architectures\":[\"MixtralForCausalLM\"],\"vocab_size\":270,\"hidden_size\":8,"
     "\"num_hidden_layers\":1,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"intermediate_size\":8,"
     "\"max_position_embeddings\":16,\"num_local_experts\":4,\"num_experts_per_tok\":2,\"rms_norm_eps\":1e-5,"
     "\"rope_theta\":10000.0,\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":1e4},\"rope_scaling\":null,"
     "\"sliding_window\":null,\"tie_word_embeddings\":false,\"hidden_act\":\"silu\",\"head_dim\":4,"
     "\"attention_bias\":false,\"partial_rotary_factor\":1.0,\"clip_qkv\":null,\"norm_topk_prob\":true}"},
    {"config",
     "{\"model_type\":\"llama\",\"vocab_size\":270,\"hidden_size\":8,\"num_hidden_layers\":2,\"num_attention_heads\":2,"
     "\"intermediate_size\":12,\"rms_norm_eps\":1e-6,\"rope_theta\":5e5,\"rope_scaling\":{\"type\":\"linear\","
     "\"factor\":2.0},\"mlp_bias\":false,\"max_position_embeddings\":8,\"num_key_value_heads\":2,\"hidden_act\":\"silu\"}"},
    {"config",
     "{\"model_type\":\"qwen2_moe\",\"vocab_size\":270,\"hidden_size\":8,\"num_hidden_layers\":4,\"num_attention_heads\":2,"
     "\"num_key_value_heads\":1,\"moe_intermediate_size\":4,\"intermediate_size\":6,\"shared_expert_intermediate_size\":5,"
     "\"num_experts\":4,\"num_experts_per_tok\":2,\"norm_topk_prob\":false,\"qkv_bias\":true,\"decoder_sparse_step\":2,"
     "\"mlp_only_layers\":[1],\"use_sliding_window\":false,\"sliding_window\":0,\"rope_parameters\":{\"rope_type\":\"llama3\","
     "\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4,\"original_max_position_embeddings\":64}}"},
    {"config",
     "{\"model_type\":\"granitemoeshared\",\"vocab_size\":270,\"hidden_size\":8,\"num_hidden_layers\":1,\"num_attention_heads\":2,"
     "\"num_key_value_heads\":1,\"intermediate_size\":4,\"shared_intermediate_size\":5,\"num_local_experts\":4,"
     "\"embedding_multiplier\":12,\"attention_multiplier\":0.5,\"residual_multiplier\":0.22,\"logits_scaling\":6.0}"},
    {"index", "{\"metadata\":{\"total_size\":1},\"weight_map\":{\"model.embed_tokens.weight\":\"part.safetensors\","
              "\"model.norm.weight\":\"part.safetensors\"}}"},
    {"options", "--recipe\ndeepseek-v3\n--layers\n2\n--dim\n8\n--heads\n2\n--ffn\n4\n--experts\n4\n--seq\n8"},
    {"options", "--recipe=switch\n--layers=2\n--dim=8\n--heads=2\n--ffn=4\n--experts=4\n--seq=8\n--capacity-factor=1.25\n--z-weight=0"},
    {"options", "--select\nexpert-choice\n--group\nsequence\n--balance\nswitch\n--score\nsigmoid\n--dim\n8\n--heads\n4"},
    {"options", "--mixer=lstm\n--cell=12\n--layers=2\n--dim=8\n--ffn=4\n--experts=4\n--seq=8\n--norms=0\n--last-feed=0\n--moe-sigmoid\n"
                "--dropout=0.5"},
    {"options", "--attention-experts=4\n--attention-form=moa\n--head-width=6\n--layers=2\n--dim=8\n--heads=2\n--ffn=4\n--seq=8\n"
                "--ngrams=50\n--ngram-order=3\n--ngram-gate"},
    {"options", "--attention-experts=4\n--attention-topk=3\n--attention-capacity-factor=0.5\n--layers=2\n--dim=8\n--heads=2\n--ffn=4\n"
                "--seq=8\n--value-embedding"},
    {"texts", "\x40It\xc3\xa2\xe2\x82\xac\xe2\x84\xa2s a day.\r\n\r\n\r\n<|endoftext|>Once, |endoftext|> the cat. \"The end\""},
    {"texts", "\xc0" "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA<|endoftext|>BBBBBBBBBBBBBBBBBBB<|endoftext|>\n<|endoftext|>c"},
    {"prompt", "\x1bOnce upon a time<|endoftext|>{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"},
    {"log", "{\"type\":\"run\",\"step\":5}\n{\"type\":\"step\",\"step\":1}\n{\"type\":\"step\",\"step\":99999999999999999999}\n{"},
};

static int chosen; // of formats

// Has the programs make the files that the inputs begin with.
static void make_base(void) {
    char command[4096];
    snprintf(base, sizeof(base), "dev/build/fuzzing/%s-base", formats[chosen].name);
    remove_tree(base); // of the last call
    make_directories(base);
    snprintf(command, sizeof(command),
             "{ data/make_stories --count 2 >%s/train.txt && data/make_stories --first 7 --count 1 >%s/valid.txt && "
             "data/tokenize --threads 1 --vocab 270 --out %s/data %s/train.txt %s/valid.txt && "
             "./train_moe --data %s/data --out %s/run " TINY "; } >%s/said 2>&1 && cd %s && mkdir split && "
             "cp run/latest/*.json split && cp run/latest/model.safetensors split/part.safetensors && "
             "touch split/model.safetensors.index.json && "
             "sed 's/\"normalizer\": null/\"normalizer\": {\"type\": \"NFC\"}/; s/\"ignore_merges\": false/\"ignore_merges\": true/; "
             "s/\"pre_tokenizer\": \\(.*\\),$/\"pre_tokenizer\": {\"type\": \"Sequence\", \"pretokenizers\": "
             "[{\"type\": \"Digits\"}, \\1]},/' data/tokenizer.json >data/steps.json && "
             "awk 'BEGIN { printf \"{\\\"added_tokens\\\": [{\\\"id\\\": 256, \\\"content\\\": \\\"<|endoftext|>\\\"}], "
             "\\\"pre_tokenizer\\\": {\\\"type\\\": \\\"Metaspace\\\", \\\"replacement\\\": \\\"\\342\\226\\201\\\"}, "
             "\\\"model\\\": {\\\"byte_fallback\\\": true, \\\"vocab\\\": {\"; for (i = 0; i < 256; i++) "
             "printf \"\\\"<0x%%02X>\\\": %%d, \", i, i; "
             "print \"\\\"a\\\": 257, \\\"\\342\\226\\201\\\": 258}, \\\"merges\\\": []}}\" }' >data/sentence.json",
             base, base, base, base, base, base, base, base, base);
    if (system(command) != 0) {
        fail("%s/said: the programs did not make what the inputs begin with", base);
    }
}

// Writes what the inputs begin with into a folder.
static void write_seeds(const char *folder) {
    char path[4096];
    for (int i = 0; i < 4 && formats[chosen].seeds[i]; i++) {
        size_t size;
        char *bytes = read_file(in_base(formats[chosen].seeds[i]), &size);
        if (formats[chosen].read == read_tokens && i == 1) { // as llm.c writes them: without a checksum
            memset(bytes + 12, 0, 12);
        }
        snprintf(path, sizeof(path), "%s/seed-%d", folder, i);
        FILE *file = fopen(path, "wb");
        if (!file || fwrite(bytes, 1, size, file) != size || fclose(file) != 0) {
            fail("%s: cannot write: %s", path, strerror(errno));
        }
        free(bytes);
    }
    for (int i = 0; i < COUNT(texts); i++) {
        if (!strcmp(texts[i].format, formats[chosen].name)) {
            snprintf(path, sizeof(path), "%s/text-%d", folder, i);
            FILE *file = fopen(path, "wb");
            if (!file || fputs(texts[i].text, file) < 0 || fclose(file) != 0) {
                fail("%s: cannot write: %s", path, strerror(errno));
            }
        }
    }
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

// ---------------------------------------------------------------------------------------------------------------------
// Inputs of JSON: half of the changes put another value in the place of one, so that the rest can still be read

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);

// The first value behind `after` in the text, or its name and the value where it has one: from *start, and its length is
// returned. 0: there is none.
static size_t find_value(const char *s, size_t size, size_t after, size_t *start) {
    int quoted = 0, depth = 0, begins = 1, inside = 0;
    for (size_t i = 0; i < size; i++) {
        int opens = !quoted && (s[i] == '{' || s[i] == '['), closes = !quoted && (s[i] == '}' || s[i] == ']');
        int ends = closes || (!quoted && s[i] == ',');
        if (inside && ends && depth == 0) {
            return i - *start;
        }
        if (begins && !ends && !isspace((unsigned char)s[i]) && i >= after && !inside) {
            *start = i;
            inside = 1;
            depth = 0;
        }
        begins = !quoted && (opens || s[i] == ',' || s[i] == ':' || (begins && isspace((unsigned char)s[i])));
        depth += opens - closes;
        if (s[i] == '\\' && quoted) {
            i++;
        } else {
            quoted ^= s[i] == '"';
        }
    }
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    static const char *const values[] = {
        "0", "1", "-1", "2", "3", "7", "255", "65536", "16777216", "2147483647", "4294967296", "-2147483648", "1e300", "0.5",
        "1e-300", "null", "true", "false", "\"\"", "\"x\"", "[]", "{}", "[1,2]", "{\"type\":\"linear\"}", "\"default\"",
        "\"F64\"", "\"BF16\"", "\"F16\"", "\"../x\"", "\"a\":1", "12", "\"yarn\"", "270", "8"};
    size_t before = formats[chosen].read == read_safetensors ? 8 : 0, from = 0, other = 0;
    int json = before || formats[chosen].read == read_json || strstr(formats[chosen].input, ".json") != NULL;
    if (!json || seed % 2 || size <= before) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    uint64_t header = size;
    if (before) {
        memcpy(&header, data, 8);
        header = header < size - 8 ? header : size - 8;
    }

    // One of the values above, or another one of the text.
    char *text = (char *)data + before;
    size_t all = header < size ? header : size;
    size_t length = find_value(text, all, all ? hash64(seed) % all : 0, &from);
    size_t room = find_value(text, all, all ? hash64(seed + 1ull) % all : 0, &other);
    if (!length) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    const char *value = values[hash64(seed + 2ull) % COUNT(values)];
    size_t added = seed % 8 < 2 ? room : strlen(value);
    char *copy = (char *)malloc(added + 1);
    memcpy(copy, seed % 8 < 2 ? text + other : value, added);
    if (size - length + added <= max_size) {
        memmove(text + from + added, text + from + length, size - before - from - length);
        memcpy(text + from, copy, added);
        size = size - length + added;
        header = header - length + added;
        if (before) {
            memcpy(data, &header, 8);
        }
    }
    free(copy);
    return size;
}

const char *__asan_default_options(void);

const char *__asan_default_options(void) {
    return "allocator_may_return_null=1:detect_leaks=0";
}

static void choose_format(void) {
    const char *name = getenv("FUZZ");
    for (chosen = 0; chosen < COUNT(formats); chosen++) {
        if (name && !strcmp(name, formats[chosen].name)) {
            return;
        }
    }
    fprintf(stderr, "fuzz: FUZZ names one of:");
    for (int i = 0; i < COUNT(formats); i++) {
        fprintf(stderr, " %s", formats[i].name);
    }
    fprintf(stderr, "\n");
    exit(2);
}

// The fuzzer's options, before those of the command line; and, unless that names a file, the folder of inputs.
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    static char longest[32], runs[32], crashes[128], folder[64];
    static char *words[64] = {NULL, longest, runs, crashes, (char *)"-timeout=20", (char *)"-rss_limit_mb=4096",
                              (char *)"-close_fd_mask=3", (char *)"-print_final_stats=1"};
    int count = 8, named = 0;
    program_name = "fuzz";
    choose_format();
    long inputs = getenv("INPUTS") ? atol(getenv("INPUTS")) : 1000000;
    words[0] = (*argv)[0];
    snprintf(longest, sizeof(longest), "-max_len=%d", formats[chosen].longest);
    snprintf(runs, sizeof(runs), "-runs=%ld", inputs * formats[chosen].share / 1000);
    snprintf(crashes, sizeof(crashes), "-artifact_prefix=dev/build/fuzzing/%s-", formats[chosen].name);
    snprintf(folder, sizeof(folder), "dev/build/fuzzing/%s", formats[chosen].name);
    for (int i = 1; i < *argc && count < 62; i++) {
        words[count++] = (*argv)[i];
        named |= (*argv)[i][0] != '-';
    }
    make_base();
    make_ready();
    if (named) {
        snprintf(runs, sizeof(runs), "-runs=1");
    } else {
        make_directories(folder);
        write_seeds(folder);
        words[count++] = folder;
    }
    *argc = count;
    *argv = words;
    keep_variables(1);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input = data;
    input_size = size;
    input_name = formats[chosen].input;
    listing = 1;
    if (setjmp(back) == 0) {
        formats[chosen].read();
    }
    listing = 0;
    input_name = "";
    take_back();
    keep_variables(0);
    return 0;
}
#pragma clang attribute pop
