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
    int moe;          // 1: all its layers have experts
    int qk_norm;      // norms of queries and keys: 0: none, 1: of each head, 2: of the whole row
    int bias;         // 1: queries, keys and values can have a bias
    int renormalized; // 1: weights of the chosen experts are divided by their sum
    int shared;       // NOT_SHARED, SHARED or SHARED_GATED, as in data/model_classes.h
    int multiple;     // 1: the shared experts are as wide as so many experts, at least one
    int dense_first;  // 1: the first layers can be dense
    int scale;        // 1: --scale
    int wide;         // 1: heads can have a width of their own
    int factors;      // 1: rope_freqs.weight, factors of the rotary frequencies
    int turned;       // 1: rotary positions turn neighbours, and not the halves of a head: rows are in another order
    int own_output;   // 1: the output has a matrix of its own, even if it is the embedding's
} Architecture;

// The first that fits is taken. Of the two with `multiple` a model without shared experts has one that is 0.
const Architecture architectures[] = {
    // moe, qk_norm, bias, renormalized, shared, multiple, dense_first, scale, wide, factors, turned, own_output
    {"llama", 0, 0, 0, 0, NOT_SHARED, 0, 0, 0, 1, 1, 1, 0},
    {"qwen3", 0, 1, 0, 0, NOT_SHARED, 0, 0, 0, 1, 0, 0, 0},
    {"qwen2", 0, 0, 1, 0, NOT_SHARED, 0, 0, 0, 0, 0, 0, 0},
    {"llama", 1, 0, 0, 1, NOT_SHARED, 0, 0, 0, 1, 1, 1, 0},
    {"qwen3moe", 1, 1, 0, 1, NOT_SHARED, 0, 0, 0, 1, 0, 0, 1},
    {"olmoe", 1, 2, 0, 0, NOT_SHARED, 0, 0, 0, 0, 0, 0, 1},
    {"qwen2moe", 1, 0, 1, 0, SHARED_GATED, 0, 0, 0, 0, 0, 0, 1},
    {"granitemoe", 1, 0, 0, 1, SHARED, 0, 0, 0, 1, 1, 1, 0},
    {"bailingmoe", 1, 0, 0, 1, SHARED, 1, 0, 1, 1, 0, 1, 1},
    {"deepseek", 1, 0, 0, 0, SHARED, 1, 1, 1, 0, 0, 1, 1},
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
        {moe > 0 && (c->score != SOFTMAX || c->bias_rate > 0),
         "its scores are softmax, and no bias chooses (--score, --bias-rate)"},
        {moe > 0 && c->eval_capacity_factor > 0, "it drops no token (--eval-capacity-factor)"},
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

// Does the architecture have all that the model has?
int fits_architecture(const Architecture *a, const Config *c) {
    int moe = moe_layers(c), dense = c->layers - moe, gated = c->shared_gate ? SHARED_GATED : SHARED;
    int normed = c->qk_norm ? 1 + (c->qk_norm_over == OVER_ROW) : 0;
    if (a->moe != (moe > 0) || a->qk_norm != normed || c->qkv_bias > a->bias) {
        return 0;
    }
    if ((c->rope_scaling == ROPE_LLAMA3 && !a->factors) || (head_width(c) * c->heads != c->dim && !a->wide)) {
        return 0;
    }
    if (normed == 2 && c->kv_heads != c->heads) { // olmoe's norms of queries and of keys are equally wide
        return 0;
    }
    if (!moe) {
        return 1;
    }
    int all = dense == 0 || (a->dense_first && c->moe_every == 1), width = dense_width(c, c->layers - 1);
    int shared = a->shared == (c->shared ? gated : NOT_SHARED) || (a->multiple && !c->shared);
    return all && shared && a->renormalized == (c->gate == RENORMALIZED) && (c->scale == 1 || a->scale) &&
           (!a->multiple || width % c->ffn == 0);
}

const Architecture *find_architecture(const Config *c, const char *dir) {
    const char *reason = not_for_llama(c);
    for (int i = 0; i < COUNT(architectures) && !reason; i++) {
        if (fits_architecture(&architectures[i], c)) {
            return &architectures[i];
        }
    }
    char parts[512] = "";
    if (!reason) { // each of these some architecture has, but none has them all
        int moe = moe_layers(c);
        snprintf(parts, sizeof(parts), "none of its architectures has these parts together: %s%s%s%s%s%s%s%s",
                 moe ? "--gate " : "no experts", moe ? gate_names[c->gate] : "", moe && moe < c->layers ? ", dense layers" : "",
                 moe && c->shared ? ", --shared" : "", moe && c->shared && c->shared_gate ? ", --shared-gate" : "",
                 moe && c->scale != 1 ? ", --scale" : "", c->qkv_bias ? ", --qkv-bias" : "", c->qk_norm ? ", --qk-norm" : "");
        size_t used = strlen(parts);
        snprintf(parts + used, sizeof(parts) - used, "%s%s%s%s", c->qk_norm && c->qk_norm_over == OVER_ROW ? " over rows" : "",
                 c->kv_heads != c->heads ? ", --kv-heads" : "", head_width(c) * c->heads != c->dim ? ", --head-width" : "",
                 c->rope_scaling == ROPE_LLAMA3 ? ", --rope-scaling llama3" : "");
    }
    fail("%s: llama.cpp cannot compute this model, so --export writes no file: %s", dir, reason ? reason : parts);
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

// The experts.
void write_expert_keys(Gguf *g, const Architecture *a, const Config *c, int first) {
    char key[128];
    architecture_integer(g, a, "expert_count", c->experts);
    architecture_integer(g, a, "expert_used_count", c->topk);
    architecture_integer(g, a, "expert_feed_forward_length", c->ffn);
    if (a->multiple) {
        snprintf(key, sizeof(key), "%s.expert_weights_norm", a->name);
        gguf_flag(g, key, a->renormalized);
        architecture_integer(g, a, "expert_shared_count", max_int(dense_width(c, c->layers - 1) / c->ffn, 1));
        architecture_integer(g, a, "leading_dense_block_count", first);
        architecture_number(g, a, "expert_weights_scale", c->scale);
    } else if (a->shared != NOT_SHARED) {
        architecture_integer(g, a, "expert_shared_feed_forward_length", dense_width(c, c->layers - 1));
    }
    if (!strcmp(a->name, "granitemoe")) { // its factors, of which all but this one are 1 by themselves
        architecture_number(g, a, "logit_scale", 1);
    }
}

// What the model computes. window: of attention, 0: none; it makes no difference up to that length.
void write_model_keys(Gguf *g, const Architecture *a, const Config *c, int format, const char *name, int window) {
    static const int file_types[] = {0, 1, 7, 2}; // LLAMA_FTYPE_...
    char key[128];
    int first = 0; // layer with experts
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
    if (c->rope_scaling == ROPE_LINEAR) {
        snprintf(key, sizeof(key), "%s.rope.scaling.type", a->name);
        gguf_text(g, key, "linear");
        architecture_number(g, a, "rope.scaling.factor", c->rope_factor);
    }
    if (a->moe) {
        write_expert_keys(g, a, c, first);
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
    {"qkv_bias", {"attn_q.bias", "attn_k.bias", "attn_v.bias"}},
    {"q_norm", {"attn_q_norm.weight"}},
    {"k_norm", {"attn_k_norm.weight"}},
    {"proj", {"attn_output.weight"}},
    {"norm2", {"ffn_norm.weight"}},
    {"router", {"ffn_gate_inp.weight"}},
    {"w_in", {"ffn_gate_exps.weight", "ffn_up_exps.weight"}},
    {"w_out", {"ffn_down_exps.weight"}},
    {"dense_in", {"ffn_gate%s.weight", "ffn_up%s.weight"}},
    {"dense_out", {"ffn_down%s.weight"}},
    {"shared_router", {"ffn_gate_inp_shexp.weight"}},
    {"norm", {"output_norm.weight"}},
    {"head", {"output.weight"}},
};

enum { ZEROS = -1, ROPE_FACTORS = -2 };

typedef struct Piece {  // a tensor of the file: rows of one of ours
    int tensor;         // its number in the table of weights; or ZEROS, or ROPE_FACTORS
    int matrices, rows; // so many matrices of so many rows
    size_t first, step; // where its first row begins in ours; from one matrix to the next
    int heads;          // not 0: the rows are those of so many heads, and are turned
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
    int columns = t->dims == 1 && blocks == 3, width = head_width(c), cols = t->shape[2]; // a vector is cut, too
    int dims = strcmp(t->kind, "shared_router") ? t->dims : 1;
    Piece p = {i, t->shape[0], t->shape[1] / blocks, 0, (size_t)t->shape[1] * (size_t)cols, 0};
    for (int block = 0; block < blocks; block++) {
        if (blocks == 3) { // queries, keys, values
            int heads = block ? c->kv_heads : c->heads;
            p.rows = columns ? 1 : heads * width;
            cols = columns ? heads * width : cols;
            p.heads = block < 2 && x->architecture->turned ? heads : 0;
        }
        add_piece(x, t->layer, t->kind, gguf_names[n].names[block], dims, p, cols);
        p.first += (size_t)p.rows * (size_t)cols;
    }
    if (strcmp(t->kind, "embed")) {
        return;
    }
    p.first = 0;
    if (!c->untied && x->architecture->own_output) {
        add_piece(x, -1, "head", "output.weight", 2, p, cols);
    }
    if (c->rope_scaling == ROPE_LLAMA3) {
        Piece factors = {ROPE_FACTORS, 1, 1, 0, 0, 0};
        add_piece(x, -1, "rope", "rope_freqs.weight", 1, factors, width / 2);
    }
}

// Adds a shared expert whose matrices are 0: the architecture has one, and we have none.
void add_empty_expert(Export *x, int layer) {
    const Config *c = x->config;
    Piece in = {ZEROS, 1, c->ffn, 0, 0, 0}, out = {ZEROS, 1, c->dim, 0, 0, 0};
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

// Writes all rows of the tensor at hand, out of `numbers`, the whole tensor of ours.
void write_piece(Export *x, const real *numbers) {
    const Piece p = x->pieces[x->file.now];
    const GgufTensor *t = &x->file.tensors[x->file.now];
    size_t cols = (size_t)t->size[t->dims - 1];
    for (int matrix = 0; matrix < p.matrices; matrix++) {
        const real *first = numbers + p.first + (size_t)matrix * p.step;
        for (int r = 0; r < p.rows; r++) {
            gguf_row(&x->file, first + cols * (p.heads ? turned_row(r, p.rows / p.heads) : (size_t)r));
        }
    }
}

// Writes the tensor at hand where none of ours is in it: zeros, or what rotary frequencies are divided by.
void write_made(Export *x) {
    const Config *c = x->config;
    const Piece p = x->pieces[x->file.now];
    const GgufTensor *t = &x->file.tensors[x->file.now];
    int cols = t->size[t->dims - 1];
    real *row = allocate_reals((size_t)cols);
    for (int i = 0; i < cols && p.tensor == ROPE_FACTORS; i++) {
        double frequency = pow(c->rope_theta, -2.0 * i / head_width(c));
        row[i] = (real)(frequency / scaled_frequency(c, frequency));
    }
    for (int r = 0; r < p.rows; r++) {
        gguf_row(&x->file, row);
    }
    free(row);
}

// Reads the weights in dir tensor by tensor, and writes each to the file.
void write_pieces(Export *x, const Model *m, const char *dir) {
    WeightFiles files;
    const char *const prefix[] = {""};
    int count;
    Part *parts = parts_to_read(m, &count), *p = parts;
    real *tensor = allocate_tensor(m);
    open_weights(&files, dir, "model.safetensors", 1);
    for (int i = 0; i < m->tensor_count; i++) {
        for (; p < parts + count && p->tensor == i; p++) {
            const char *file = read_part(&files, "", p, tensor + p->offset);
            check_read(file, "", p, tensor + p->offset);
        }
        fold_factors(x->config, &m->tensors[i], tensor); // Granite's
        while (x->file.now < x->file.count && x->pieces[x->file.now].tensor <= i) {
            if (x->pieces[x->file.now].tensor == i) {
                write_piece(x, tensor);
            } else {
                write_made(x);
            }
        }
    }
    check_tensors(&files, x->config, parts, count, prefix, 1);
    close_weights(&files);
    free(tensor);
    free(parts);
}

// ---- the whole

// With which tokens texts begin and end, and whether each begins with one. Our own models have read the token that ends a text
// before each text, and --prompt gives it to them, too; those of others say it in config.json and tokenizer.json.
void write_tokenizer_keys(Gguf *g, const Tokenizer *t, const Config *c, const char *dir, const char *tokenizer) {
    char path[4200];
    size_t size;
    snprintf(path, sizeof(path), "%s/config.json", dir);
    char *text = read_file(path, &size);
    Json *json = json_parse(text, size, path);
    const char *const names[] = {"bos_token_id", "eos_token_id"};
    int own = json_get(json, "train_moe") != NULL, ids[2] = {t->bos < 0 || own ? t->eot : t->bos, t->eot};
    for (int i = 0; i < 2 && !own; i++) {
        const Json *id = json_get(json, names[i]);
        id = id && id->type == 'a' ? id->child : id; // the first of several
        if (id && id->type == 'n' && id->number >= 0 && id->number < c->vocab) {
            ids[i] = (int)id->number;
        }
    }
    gguf_tokenizer(g, t, tokenizer, c->vocab, own || t->bos >= 0, ids[0], ids[1]);
    json_free(json);
    free(text);
}

// The last part of a path, which names the model.
const char *last_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash && slash[1] ? slash + 1 : path;
}

// ./train_moe --export FILE: the model in run->out, or in --init, as a GGUF file.
// window: the length of attention's sliding window, 0: none.
void export_model(Run *run, const Config *asked, const char *dir, int window) {
    char path[4200];
    Config *c = &run->config;
    Export x;
    Model m;
    memset(&x, 0, sizeof(x));
    memset(&m, 0, sizeof(m));
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
        if (x.architecture->multiple && !c->shared && !strcmp(t->kind, "w_out")) {
            add_empty_expert(&x, t->layer);
        }
    }
    gguf_begin_data(&x.file);
    write_pieces(&x, &m, dir);
    if (x.others) {
        remark("%d matrices have rows that are not whole blocks of %d numbers; they are in f16", x.others, BLOCK);
    }
    gguf_close(&x.file);
    char *name = quote_for_shell(c->export_to);
    printf("%s is %s as llama.cpp reads it: %s, %s, %d tensors, %.1f MB. For instance:\n"
           "  llama-completion -m %s -no-cnv -p \"Once upon a time\"\n",
           c->export_to, dir, x.architecture->name, format_names[x.format], x.file.count, (double)x.file.size / 1e6, name);
    free(name);
    free(x.pieces);
    free(m.tensors);
    tokenizer_free(run->tokenizer);
}
