// A tokenizer.json as llama.cpp keeps it: keys of a GGUF file.
// Gives: gguf_tokenizer. Needs: data/gguf.h, data/tokenizer.h.
//
// llama.cpp has byte-level BPE as GPT-2 does, its model "gpt2", and knows by names the ways to cut a text into words. And it has
// SentencePiece's BPE, its model "llama", where spaces are "▁" and what has no token is bytes: there each token has a score,
// and of two neighbours that are a token together, those with the highest score go first. A tokenizer that would give other ids
// in llama.cpp is refused, or the user is told for which texts. llama-vocab.cpp of llama.cpp has what it does.
#pragma once
#include "gguf.h"
#include "tokenizer.h"

enum { TOKEN_UNUSED = 5 };

// Ends the program where llama.cpp would cut or merge a text in another way; a remark where that comes to few texts.
void check_gguf_tokenizer(const Tokenizer *t, const char *path) {
    const Shape *s = &t->shape;
    const char *pre = tokenizer_pre(t);
    if (!pre) {
        fail("%s: it cuts texts into words in a way for which llama.cpp has no name, so ids would be others there; --export writes "
             "tokenizers like those of GPT-2, Llama 2, Llama 3, Qwen 2 and SmolLM",
             path);
    }
    if (s->kind == BYTE_LEVEL && s->prefix != PREFIX_NEVER) {
        fail("%s: it puts a space before a text (add_prefix_space), which llama.cpp does not do with byte-level tokens", path);
    }
    if (s->ignore_merges && (s->kind == BYTE_FALLBACK || strcmp(pre, "llama-bpe"))) {
        fail("%s: ignore_merges is true: llama.cpp does so only where texts are cut as Llama 3 does it", path);
    }
    if (s->nfc) {
        remark("%s: its normalizer is NFC, and llama.cpp has none: a text that is not in this form gets other ids there", path);
    }
    if (s->kind == BYTE_FALLBACK && (s->prefix == PREFIX_MISSING || s->prefix == PREFIX_FIRST)) {
        remark("%s: in llama.cpp a text that begins with a space, or follows a special token, also gets a space before it", path);
    }
}

// Two tokens that are a token together must be a merge, and the merges of one token must follow each other: llama.cpp knows only
// the tokens. rank (vocab): of each token's first merge, 0: it has none.
void check_scores(const Tokenizer *t, const char *path, const int *rank) {
    for (int m = 2; m <= t->merge_count; m++) {
        if (t->merges[m].id != t->merges[m - 1].id && rank[t->merges[m].id] != m) {
            fail("%s: merge %d makes \"%s\" as merge %d does, and others stand between them: llama.cpp has one rank for a token",
                 path, m, t->raw[t->merges[m].id], rank[t->merges[m].id]);
        }
    }
    for (int id = 0; id < t->vocab; id++) {
        const char *raw = t->raw[id];
        size_t n = strlen(raw), length;
        for (size_t i = 0; i < n && t->type[id] == TOKEN_NORMAL; i += length) {
            int32_t code;
            length = (size_t)utf8_decode(raw + i, n - i, &code);
            int left = (int)table_get(&t->ids, raw, i) - 1, right = (int)table_get(&t->ids, raw + i, n - i) - 1;
            int plain = i > 0 && left >= 0 && right >= 0 && t->type[left] == TOKEN_NORMAL && t->type[right] == TOKEN_NORMAL;
            const Merge *merge = plain ? find_merge(t, left, right) : NULL;
            if (merge && (!merge->rank || merge->id != id)) {
                fail("%s: \"%s\" and \"%s\" are not merged, though both together are a token: llama.cpp would merge them", path,
                     t->raw[left], t->raw[right]);
            }
        }
    }
}

// SentencePiece's scores: here the negative rank of a token's first merge. Tokens that no merge makes are characters.
void gguf_scores(Gguf *g, const Tokenizer *t, const char *path, int vocab) {
    int *rank = (int *)allocate((size_t)vocab, sizeof(int));
    for (int m = t->merge_count; m > 0; m--) {
        rank[t->merges[m].id] = m;
    }
    check_scores(t, path, rank);
    gguf_list(g, "tokenizer.ggml.scores", GGUF_F32, (size_t)vocab);
    for (int i = 0; i < vocab; i++) {
        gguf_put_number(g->keys, (float)(rank[i] ? -rank[i] : 0));
    }
    free(rank);
}

// Each merge as "left right", the best first.
void gguf_merges(Gguf *g, const Tokenizer *t) {
    gguf_list(g, "tokenizer.ggml.merges", GGUF_STRING, (size_t)t->merge_count);
    for (int m = 1; m <= t->merge_count; m++) {
        const char *left = t->raw[t->merges[m].left], *right = t->raw[t->merges[m].right];
        gguf_put(g->keys, strlen(left) + 1 + strlen(right), 8);
        fprintf(g->keys, "%s %s", left, right);
    }
}

// Writes the keys of tokenizer t, whose file is at `path`, for a model of `vocab` tokens, which may be more than the tokenizer
// has. begin: each text begins with token bos. A text ends with token eos.
void gguf_tokenizer(Gguf *g, const Tokenizer *t, const char *path, int vocab, int begin, int bos, int eos) {
    check_gguf_tokenizer(t, path);
    if (t->vocab > vocab) {
        fail("%s: it has %d tokens, and the model only %d: it is the tokenizer of another model; name the model's own by --tokenizer",
             path, t->vocab, vocab);
    }
    gguf_text(g, "tokenizer.ggml.model", t->shape.kind == BYTE_LEVEL ? "gpt2" : "llama");
    gguf_text(g, "tokenizer.ggml.pre", tokenizer_pre(t));
    gguf_list(g, "tokenizer.ggml.tokens", GGUF_STRING, (size_t)vocab);
    for (int i = 0; i < vocab; i++) {
        char unused[32];
        snprintf(unused, sizeof(unused), "[PAD%d]", i); // as llama.cpp's converters call them
        const char *name = i < t->vocab ? t->raw[i] : unused;
        gguf_put_text(g->keys, name, strlen(name));
    }
    gguf_list(g, "tokenizer.ggml.token_type", GGUF_I32, (size_t)vocab);
    for (int i = 0; i < vocab; i++) {
        gguf_put(g->keys, i < t->vocab ? t->type[i] : (uint64_t)TOKEN_UNUSED, 4);
    }
    if (t->shape.kind == BYTE_LEVEL) {
        gguf_merges(g, t);
    } else {
        gguf_scores(g, t, path, vocab);
    }
    gguf_integer(g, "tokenizer.ggml.bos_token_id", bos);
    gguf_integer(g, "tokenizer.ggml.eos_token_id", eos);
    if (t->unk >= 0) {
        gguf_integer(g, "tokenizer.ggml.unknown_token_id", t->unk);
    }
    gguf_flag(g, "tokenizer.ggml.add_bos_token", begin);
    gguf_flag(g, "tokenizer.ggml.add_eos_token", 0);
    gguf_flag(g, "tokenizer.ggml.add_space_prefix", t->shape.prefix != PREFIX_NEVER);
}
