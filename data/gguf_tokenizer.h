// A tokenizer.json as llama.cpp keeps it: keys of a GGUF file.
// Gives: gguf_tokenizer. Needs: data/gguf.h, data/json.h, data/tokenizer.h.
//
// llama.cpp has byte-level BPE as GPT-2 does, and calls each way to cut a text into words by a name. A file's way is one of
// those in the table below, where the words are the same (llama-vocab.cpp has the patterns); any other is refused, since the ids
// would be others.
#pragma once
#include "gguf.h"
#include "json.h"
#include "tokenizer.h"

enum { GGUF_NORMAL = 1, GGUF_CONTROL = 3, GGUF_ADDED = 4, GGUF_UNUSED = 5 }; // llama.cpp's types of tokens

// What cuts texts into words: a step before (Digits, Split), and whether GPT-2's own pattern follows.
const struct {
    const char *step, *pattern; // the pattern of a Split; NULL: none
    int own;                    // 1: ByteLevel with its own pattern
    const char *name;           // llama.cpp's
} word_cutters[] = {
    {NULL, NULL, 1, "gpt-2"},
    {"Digits", NULL, 1, "smollm"},
    {"Split",
     "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|"
     "\\s+(?!\\S)|\\s+",
     0, "llama-bpe"},
    {"Split",
     "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|"
     "\\s+(?!\\S)|\\s+",
     0, "qwen2"},
};

int is_true(const Json *object, const char *key) {
    const Json *m = json_get(object, key);
    return m && m->type == 't';
}

// llama.cpp's name for the pre-tokenizer of a tokenizer.json; the program ends where there is none.
const char *cutter_name(const char *path, const Json *root) {
    const Json *words = json_get(root, "pre_tokenizer"), *list = json_get(words, "pretokenizers");
    const Json *first = list ? list->child : words, *last = first;
    int steps = 0;
    for (const Json *step = first; list && step; step = step->next) {
        last = step;
        steps++;
    }
    const Json *before = steps == 2 ? first : NULL, *regex = json_get(before, "pattern");
    const char *type = before ? json_get(before, "type")->text : NULL, *pattern = NULL;
    if (json_get(regex, "Regex")) {
        pattern = json_get(regex, "Regex")->text;
    }
    int own = !json_get(last, "use_regex") || is_true(last, "use_regex");
    int good = steps <= 2 && last && json_get(last, "type") && !strcmp(json_get(last, "type")->text, "ByteLevel");
    good &= !type || strcmp(type, "Digits") || is_true(before, "individual_digits");
    for (int i = 0; good && i < COUNT(word_cutters); i++) {
        int same_step = type ? word_cutters[i].step && !strcmp(type, word_cutters[i].step) : !word_cutters[i].step;
        int same = pattern ? word_cutters[i].pattern && !strcmp(pattern, word_cutters[i].pattern) : !word_cutters[i].pattern;
        if (same_step && same && own == word_cutters[i].own) {
            return word_cutters[i].name;
        }
    }
    fail("%s: its pre_tokenizer cuts texts in a way for which llama.cpp has no name, so it would give other ids; export knows "
         "those of GPT-2, Llama 3, Qwen 2 and SmolLM",
         path);
}

// Ends the program where llama.cpp would make other ids of a text.
void check_gguf_tokenizer(const char *path, const Json *root, const char *cutter) {
    const Json *model = json_get(root, "model");
    if (is_true(model, "byte_fallback")) {
        fail("%s: model's byte_fallback is true, as in Llama 2: export writes byte-level vocabularies only", path);
    }
    if (is_true(model, "ignore_merges") && strcmp(cutter, "llama-bpe")) {
        fail("%s: model's ignore_merges is true: llama.cpp does so only where the pre_tokenizer is Llama 3's", path);
    }
    const Json *normalizer = json_get(root, "normalizer");
    if (normalizer && normalizer->type != '0') {
        remark("%s: it has a normalizer, and llama.cpp has none: texts that it would change get other ids there", path);
    }
}

// The tokens' texts and types, in lists with NULL where there is none. The texts are those of the JSON: in GPT-2's alphabet, but
// for added tokens.
void list_tokens(const Json *root, const Tokenizer *t, int vocab, const char **text, int *type) {
    for (const Json *v = json_get(json_get(root, "model"), "vocab")->child; v; v = v->next) {
        int id = (int)v->number;
        if (id < vocab) {
            text[id] = v->key;
            type[id] = GGUF_NORMAL;
        }
    }
    const Json *added = json_get(root, "added_tokens");
    for (const Json *a = added ? added->child : NULL; a; a = a->next) {
        int id = (int)json_get(a, "id")->number;
        if (id < vocab) {
            text[id] = json_get(a, "content")->text;
            type[id] = is_true(a, "special") ? GGUF_CONTROL : GGUF_ADDED;
        }
    }
    if (t->eot >= 0 && t->eot < vocab) {
        type[t->eot] = GGUF_CONTROL;
    }
}

// "merges": each as "left right".
void gguf_merges(Gguf *g, const Json *merges) {
    size_t count = 0;
    for (const Json *m = merges->child; m; m = m->next) {
        count++;
    }
    gguf_list(g, "tokenizer.ggml.merges", GGUF_STRING, count);
    for (const Json *m = merges->child; m; m = m->next) {
        if (m->type == 's') {
            gguf_put_text(g->keys, m->text, m->length);
            continue;
        }
        const Json *left = m->child, *right = left->next;
        gguf_put(g->keys, left->length + 1 + right->length, 8);
        fprintf(g->keys, "%s %s", left->text, right->text);
    }
}

// Writes the keys of tokenizer t, whose file is at `path`, for a model of `vocab` tokens, which may be more than the tokenizer
// has. begin: each text begins with token bos. A text ends with token eos.
void gguf_tokenizer(Gguf *g, const Tokenizer *t, const char *path, int vocab, int begin, int bos, int eos) {
    Json *root = json_parse(t->json, t->json_size, path);
    const char *cutter = cutter_name(path, root);
    check_gguf_tokenizer(path, root, cutter);
    const char **text = (const char **)allocate((size_t)vocab, sizeof(char *));
    int *type = (int *)allocate((size_t)vocab, sizeof(int));
    list_tokens(root, t, vocab, text, type);

    gguf_text(g, "tokenizer.ggml.model", "gpt2");
    gguf_text(g, "tokenizer.ggml.pre", cutter);
    gguf_list(g, "tokenizer.ggml.tokens", GGUF_STRING, (size_t)vocab);
    for (int i = 0; i < vocab; i++) {
        char unused[32];
        snprintf(unused, sizeof(unused), "[PAD%d]", i); // as llama.cpp's converters call them
        const char *name = text[i] ? text[i] : unused;
        gguf_put_text(g->keys, name, strlen(name));
    }
    gguf_list(g, "tokenizer.ggml.token_type", GGUF_I32, (size_t)vocab);
    for (int i = 0; i < vocab; i++) {
        gguf_put(g->keys, (uint64_t)(text[i] ? type[i] : GGUF_UNUSED), 4);
    }
    gguf_merges(g, json_get(json_get(root, "model"), "merges"));
    gguf_integer(g, "tokenizer.ggml.bos_token_id", bos);
    gguf_integer(g, "tokenizer.ggml.eos_token_id", eos);
    gguf_flag(g, "tokenizer.ggml.add_bos_token", begin);
    gguf_flag(g, "tokenizer.ggml.add_eos_token", 0);
    gguf_flag(g, "tokenizer.ggml.add_space_prefix", 0);
    free(text);
    free(type);
    json_free(root);
}
