// A model as a GGUF file, which llama.cpp reads as it is (--export FILE, --export-type).
// Gives: export_model. Needs: data/gguf.h, data/gguf_tokenizer.h, data/checkpoint.h; check_read of dev/finite.h; Run of dev/run.h,
// which includes it.
//
// llama.cpp computes what it has a name for, an architecture. The table below says which of them computes a model of ours; a
// model that none computes is refused, with what stands in the way. Weights go from the checkpoint to the file tensor by tensor,
// so that the largest tensor is all that is in memory. https://github.com/ggml-org/llama.cpp/tree/master/src/models has the
// architectures; which keys and names they read is from there, and from gguf-py/gguf/constants.py.
#pragma once
#include "../data/gguf.h"
#include "../data/gguf_tokenizer.h"

// ---- which architecture

typedef struct Architecture {
    const char *name;
    int moe;          // 1: its layers have experts
    int qk_norm;      // 1: norms of queries and keys
    int renormalized; // 1: weights of the chosen experts are divided by their sum
    int shared;       // 1: it has shared experts, and cannot be without
    int dense_first;  // 1: the first layers can be dense
    int turned;       // 1: rotary positions turn neighbours, and not the halves of a head: rows are in another order
    int own_output;   // 1: the output has a matrix of its own, even if it is the embedding's
} Architecture;

const Architecture architectures[] = {
    {"llama", 0, 0, 0, 0, 0, 1, 0},
    {"qwen3", 0, 1, 0, 0, 0, 0, 0},
    {"llama", 1, 0, 1, 0, 0, 1, 0},
    {"qwen3moe", 1, 1, 1, 0, 0, 0, 1},
    {"bailingmoe", 1, 0, 1, 1, 0, 1, 1},
    {"deepseek", 1, 0, 0, 1, 1, 1, 1}, // where we have no shared expert, it has one that is 0
};

// What no architecture of llama.cpp computes; NULL: there is nothing.
const char *not_for_llama(const Config *c) {
    int moe = moe_layers(c);
    int parts = c->subtokens > 1 || c->mixed || c->recurrent;
    const struct {
        int wrong;
        const char *reason;
    } rules[] = {
        {mixer_of(c) != NULL, "it has no LSTM and no attention with experts"},
        {!c->norms || !c->last_feed, "each layer has norms there, and feeds forward (--norms 0, --last-feed 0)"},
        {c->ngrams > 0 || c->value_embedding, "it has no tables of n-grams or values (--ngrams, --value-embedding)"},
        {c->moe_sigmoid, "it has no sigmoid on what the experts answer (--moe-sigmoid)"},
        {moe < c->layers && dense_activation(c, 0) != SWIGLU, "its dense layers have --activation swiglu"},
        {moe > 0 && c->activation != SWIGLU, "its experts have --activation swiglu"},
        {moe > 0 && (parts || choosing_router(c) != &topk_router), "it has no router like this one"},
        {moe > 0 && (c->score != SOFTMAX || c->bias_rate > 0), "its scores are softmax, and no bias chooses (--score, --bias-rate)"},
        {moe > 0 && c->eval_capacity_factor > 0, "it drops no token (--eval-capacity-factor)"},
        {moe > 0 && moe < c->layers && (c->moe_every > 1 || c->gate != PROBABILITY),
         "only where --gate is probability the first layers can be dense, and all others have experts"},
        {c->qk_norm && moe > 0 && c->gate != RENORMALIZED,
         "with norms of queries and keys (--qk-norm) the weights of the chosen experts are divided by their sum"},
        {c->qk_norm && moe > 0 && c->shared > 0, "with norms of queries and keys (--qk-norm) it has no shared experts"},
        {c->qk_norm && moe > 0 && c->scale != 1, "with norms of queries and keys (--qk-norm) weights have no --scale"},
        {moe > 0 && c->gate == RENORMALIZED && !c->shared && c->scale != 1, "without shared experts weights have no --scale"},
        {moe > 0 && c->experts > 512, "it has at most 512 experts"},
        {c->layers > 512, "it has at most 512 layers"},
    };
    for (int i = 0; i < COUNT(rules); i++) {
        if (rules[i].wrong) {
            return rules[i].reason;
        }
    }
    return NULL;
}

const Architecture *find_architecture(const Config *c, const char *dir) {
    int moe = moe_layers(c) > 0;
    const char *reason = not_for_llama(c);
    for (int i = 0; i < COUNT(architectures) && !reason; i++) {
        const Architecture *a = &architectures[i];
        int same = a->moe == moe && a->qk_norm == c->qk_norm;
        if (moe) {
            same &= a->renormalized == (c->gate == RENORMALIZED) && (a->shared == (c->shared > 0) || a->dense_first);
        }
        if (same) {
            return a;
        }
    }
    fail("%s: llama.cpp cannot compute this model, so --export writes no file: %s", dir,
         reason ? reason : "no architecture of it has the same parts");
}

// ---- the keys

void architecture_integer(Gguf *g, const Architecture *a, const char *name, int value) {
    char key[128];
    snprintf(key, sizeof(key), "%s.%s", a->name, name);
    gguf_integer(g, key, value);
}

void architecture_number(Gguf *g, const Architecture *a, const char *name, double value) {
    char key[128];
    snprintf(key, sizeof(key), "%s.%s", a->name, name);
    gguf_number(g, key, value);
}

// What the model computes. window: of attention, 0: none; it makes no difference up to that length.
void write_model_keys(Gguf *g, const Architecture *a, const Config *c, int format, const char *name, int window) {
    static const int file_types[] = {0, 1, 7, 2}; // LLAMA_FTYPE_...
    int first = 0;
    while (first < c->layers && a->moe && !is_moe(c, first)) {
        first++;
    }
    gguf_text(g, "general.architecture", a->name);
    gguf_text(g, "general.type", "model");
    gguf_text(g, "general.name", name);
    gguf_integer(g, "general.file_type", file_types[format]);
    gguf_integer(g, "general.alignment", GGUF_ALIGNMENT);
    if (format == FORMAT_Q8_0 || format == FORMAT_Q4_0) {
        gguf_integer(g, "general.quantization_version", 2);
    }
    architecture_integer(g, a, "block_count", c->layers);
    architecture_integer(g, a, "context_length", window && window < c->seq ? window : c->seq);
    architecture_integer(g, a, "embedding_length", c->dim);
    architecture_integer(g, a, "feed_forward_length", a->moe && !first ? c->ffn : dense_width(c, 0));
    architecture_integer(g, a, "attention.head_count", c->heads);
    architecture_integer(g, a, "attention.head_count_kv", c->kv_heads);
    architecture_integer(g, a, "attention.key_length", head_width(c));
    architecture_integer(g, a, "attention.value_length", head_width(c));
    architecture_number(g, a, "attention.layer_norm_rms_epsilon", c->norm_eps);
    architecture_integer(g, a, "rope.dimension_count", head_width(c));
    architecture_number(g, a, "rope.freq_base", c->rope_theta);
    architecture_integer(g, a, "vocab_size", c->vocab);
    if (!a->moe) {
        return;
    }
    architecture_integer(g, a, "expert_count", c->experts);
    architecture_integer(g, a, "expert_used_count", c->topk);
    architecture_integer(g, a, "expert_feed_forward_length", c->ffn);
    if (a->shared) {
        char key[128];
        snprintf(key, sizeof(key), "%s.expert_weights_norm", a->name);
        gguf_flag(g, key, a->renormalized);
        architecture_integer(g, a, "expert_shared_count", max_int(c->shared, 1));
        architecture_integer(g, a, "leading_dense_block_count", first);
        architecture_number(g, a, "expert_weights_scale", c->scale);
    }
}

// ---- the tensors

// What GGUF calls each kind of tensor: more than one name where it has blocks of its rows apart. %s: "_shexp" for the shared
// experts beside others.
const struct {
    const char *kind, *names[3];
} gguf_names[] = {
    {"embed", {"token_embd.weight"}},
    {"norm1", {"attn_norm.weight"}},
    {"qkv", {"attn_q.weight", "attn_k.weight", "attn_v.weight"}},
    {"q_norm", {"attn_q_norm.weight"}},
    {"k_norm", {"attn_k_norm.weight"}},
    {"proj", {"attn_output.weight"}},
    {"norm2", {"ffn_norm.weight"}},
    {"router", {"ffn_gate_inp.weight"}},
    {"w_in", {"ffn_gate_exps.weight", "ffn_up_exps.weight"}},
    {"w_out", {"ffn_down_exps.weight"}},
    {"dense_in", {"ffn_gate%s.weight", "ffn_up%s.weight"}},
    {"dense_out", {"ffn_down%s.weight"}},
    {"norm", {"output_norm.weight"}},
    {"head", {"output.weight"}},
};

typedef struct Piece {     // a tensor of the file: rows of one of ours
    int tensor;            // its number in the table of weights; -1: zeros
    int matrices, rows;    // so many matrices of so many rows
    size_t first, step;    // our row of its first one; our rows from one matrix to the next
    int heads;             // not 0: the rows are those of so many heads, and are turned
} Piece;

typedef struct Export {
    const Architecture *architecture;
    const Config *config;
    Gguf file;
    Piece *pieces; // one for each tensor of the file
    int format;
    int others;    // matrices that are in float16 because their rows are no whole blocks
} Export;

// In which format a matrix is stored. The router and the vectors decide much and are small: float32. With 4 bits the embedding
// and the output have 8, since each of their errors goes into all that follows, or into each logit.
int format_of(Export *x, const char *kind, int dims, int cols) {
    int wide = !strcmp(kind, "embed") || !strcmp(kind, "head"), format = x->format;
    if (dims == 1 || !strcmp(kind, "router")) {
        return FORMAT_F32;
    }
    format = wide && format == FORMAT_Q4_0 ? FORMAT_Q8_0 : format;
    if (fits_blocks(format, cols)) {
        return format;
    }
    x->others++;
    return FORMAT_F16;
}

// Adds a tensor to the file.
void add_piece(Export *x, int layer, const char *kind, const char *name, int dims, Piece piece, int cols) {
    char full[GGUF_NAME], inner[GGUF_NAME];
    int size[3] = {piece.matrices, piece.rows, cols};
    snprintf(inner, sizeof(inner), name, layer >= 0 && x->architecture->moe && is_moe(x->config, layer) ? "_shexp" : "");
    if (layer < 0) {
        snprintf(full, sizeof(full), "%s", inner);
    } else {
        snprintf(full, sizeof(full), "blk.%d.%.40s", layer, inner);
    }
    x->pieces = (Piece *)grow(x->pieces, (size_t)x->file.count, sizeof(Piece));
    x->pieces[x->file.count] = piece;
    gguf_tensor(&x->file, full, format_of(x, kind, dims, cols), dims, size + 3 - dims);
}

// Adds what one tensor of ours is there: itself, or blocks of its rows. A kind that is not in the table ends the program.
void add_pieces(Export *x, int i, const Tensor *t) {
    const Config *c = x->config;
    int n = 0, blocks = 1;
    while (n < COUNT(gguf_names) && strcmp(gguf_names[n].kind, t->kind)) {
        n++;
    }
    if (n == COUNT(gguf_names)) {
        fail("%s: llama.cpp has no place for %s, so --export cannot write this model", x->file.path, t->name);
    }
    while (blocks < 3 && gguf_names[n].names[blocks]) {
        blocks++;
    }
    Piece p = {i, t->shape[0], t->shape[1] / blocks, 0, (size_t)t->shape[1], 0};
    for (int block = 0; block < blocks; block++) {
        if (blocks == 3) { // queries, keys, values
            int heads = block ? c->kv_heads : c->heads;
            p.rows = heads * head_width(c);
            p.heads = block < 2 && x->architecture->turned ? heads : 0;
        }
        add_piece(x, t->layer, t->kind, gguf_names[n].names[block], t->dims, p, t->shape[2]);
        p.first += (size_t)p.rows;
    }
    if (!strcmp(t->kind, "embed") && !c->untied && x->architecture->own_output) {
        p.first = 0;
        add_piece(x, -1, "head", "output.weight", 2, p, t->shape[2]);
    }
}

// Adds a shared expert whose matrices are 0: the architecture has one, and we have none.
void add_empty_expert(Export *x, int layer) {
    const Config *c = x->config;
    Piece in = {-1, 1, c->ffn, 0, 0, 0}, out = {-1, 1, c->dim, 0, 0, 0};
    add_piece(x, layer, "dense_in", "ffn_gate%s.weight", 2, in, c->dim);
    add_piece(x, layer, "dense_in", "ffn_up%s.weight", 2, in, c->dim);
    add_piece(x, layer, "dense_out", "ffn_down%s.weight", 2, out, c->ffn);
}

// Row r of `heads` heads there is which row here? Here the first half of a head's width turns with its second half, there each
// number with its neighbour. The order of the rows makes up for that.
size_t turned_row(int r, int width) {
    int in_head = r % width;
    return (size_t)(r - in_head + in_head % 2 * (width / 2) + in_head / 2);
}

// Writes all rows of the tensor at hand, out of `numbers`, the whole tensor of ours; NULL: zeros.
void write_piece(Export *x, const real *numbers, const real *zeros) {
    const Piece p = x->pieces[x->file.now];
    const GgufTensor *t = &x->file.tensors[x->file.now];
    size_t cols = (size_t)t->size[t->dims - 1];
    for (int matrix = 0; matrix < p.matrices; matrix++) {
        for (int r = 0; r < p.rows; r++) {
            size_t row = p.first + (size_t)matrix * p.step + (p.heads ? turned_row(r, p.rows / p.heads) : (size_t)r);
            gguf_row(&x->file, numbers ? numbers + row * cols : zeros);
        }
    }
}

// Reads the weights in dir tensor by tensor, and writes each to the file.
void write_pieces(Export *x, const Model *m, const char *dir) {
    const Config *c = x->config;
    WeightFiles files;
    const char *const prefix[] = {""};
    int count;
    Part *parts = model_parts(m, &count), *p = parts;
    real *tensor = allocate_tensor(m), *zeros = allocate_reals((size_t)max_int(c->dim, c->ffn));
    open_weights(&files, dir, "model.safetensors", 1);
    for (int i = 0; i < m->tensor_count; i++) {
        for (; p < parts + count && p->tensor == i; p++) {
            const char *file = read_part(&files, "", p, c->experts, tensor + p->offset);
            check_read(file, "", p, tensor + p->offset);
        }
        while (x->file.now < x->file.count && x->pieces[x->file.now].tensor == i) {
            write_piece(x, tensor, NULL);
        }
        while (x->file.now < x->file.count && x->pieces[x->file.now].tensor < 0) {
            write_piece(x, NULL, zeros);
        }
    }
    check_tensors(&files, c, parts, count, prefix, 1);
    close_weights(&files);
    free(tensor);
    free(zeros);
    free(parts);
}

// ---- the whole

// With which tokens texts begin and end, and whether each begins with one: as config.json and tokenizer.json say. Our own models
// have read <|endoftext|> before each text, and --prompt gives it to them too.
void write_tokenizer_keys(Gguf *g, const Tokenizer *t, const Config *c, const char *dir, const char *tokenizer) {
    char path[4200];
    size_t size;
    snprintf(path, sizeof(path), "%s/config.json", dir);
    char *text = read_file(path, &size);
    Json *json = json_parse(text, size, path), *root = json_parse(t->json, t->json_size, tokenizer);
    const char *const names[] = {"bos_token_id", "eos_token_id"};
    int ids[2] = {t->eot, t->eot};
    for (int i = 0; i < 2; i++) {
        const Json *id = json_get(json, names[i]);
        id = id && id->type == 'a' ? id->child : id; // the first of several
        if (id && id->type == 'n' && id->number >= 0 && id->number < c->vocab) {
            ids[i] = (int)id->number;
        }
    }
    const Json *pattern = json_get(json_get(root, "post_processor"), "single");
    int begins = json_get(json, "train_moe") || (pattern && json_get(pattern->child, "SpecialToken"));
    gguf_tokenizer(g, t, tokenizer, c->vocab, begins, ids[0], ids[1]);
    json_free(json);
    json_free(root);
    free(text);
}

// The last part of a path, which names the model.
const char *last_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash && slash[1] ? slash + 1 : path;
}

// ./train_moe --export FILE: the model in run->out, or in --init, as a GGUF file.
void export_model(Run *run, const Config *asked) {
    char dir[4096], path[4200];
    Config *c = &run->config;
    Export x;
    Model m;
    memset(&x, 0, sizeof(x));
    memset(&m, 0, sizeof(m));
    snprintf(dir, sizeof(dir), "%s", asked->init[0] ? model_directory(asked->init) : run->out);
    if (!has_file(dir, "config.json") && !find_checkpoint(run->out, 0, dir)) {
        fail("%s: no checkpoint there to export; train first, or name a run with --out", run->out);
    }
    check_small_files(dir);
    int window = config_from_directory(c, dir);
    const Config before = *c;
    join_options(c, asked, 1 << MODEL | 1 << ORDER | 1 << TRAIN, 1 << MODEL, dir);
    refuse_idle_options(c, &before);
    c->batch = 1; // the saved one is that of all processes
    config_check(c);
    x.config = c;
    x.format = c->export_type;
    x.architecture = find_architecture(c, dir);
    gguf_open(&x.file, c->export_to);
    snprintf(path, sizeof(path), "%s/tokenizer.json", dir);
    run->tokenizer = tokenizer_load(c->tokenizer[0] ? c->tokenizer : path);
    write_model_keys(&x.file, x.architecture, c, x.format, last_name(asked->init[0] ? asked->init : run->out), window);
    write_tokenizer_keys(&x.file, run->tokenizer, c, dir, c->tokenizer[0] ? c->tokenizer : path);

    // A model of which there is only the table of weights.
    m.config = *c;
    m.tensors = (Tensor *)allocate((size_t)tensor_limit(c), sizeof(Tensor));
    m.tensor_count = model_tensors(c, m.tensors);
    for (int i = 0; i < m.tensor_count; i++) {
        const Tensor *t = &m.tensors[i];
        add_pieces(&x, i, t);
        if (x.architecture->shared && !c->shared && !strcmp(t->kind, "w_out")) {
            add_empty_expert(&x, t->layer);
        }
    }
    gguf_begin_data(&x.file);
    write_pieces(&x, &m, dir);
    if (x.others) {
        remark("%d matrices have rows that are not whole blocks of %d numbers; they are in f16", x.others, BLOCK);
    }
    char *name = quote_for_shell(c->export_to);
    printf("%s is %s as llama.cpp reads it: %s, %s, %d tensors, %.1f MB. For instance:\n"
           "  llama-completion -m %s -no-cnv -p \"Once upon a time\"\n",
           c->export_to, dir, x.architecture->name, format_names[x.format], x.file.count, (double)x.file.size / 1e6, name);
    gguf_close(&x.file);
    free(name);
    free(x.pieces);
    free(m.tensors);
    tokenizer_free(run->tokenizer);
}
