// Checkpoints: Hugging Face model directories.
// Gives: write_safetensors, read_weights, write_config, config_from_directory, model_parts. Needs: data/json.h,
// dev/options.h, and of train_moe.c the table of weights; train_moe.c includes it behind that.
//
// A checkpoint is a Hugging Face model directory: config.json, model.safetensors, tokenizer.json and two small files
// about the tokenizer and generation, which transformers opens as they are; beside them optimizer.safetensors and
// trainer_state.json, to go on. A new one is written under another name, flushed to the disk and renamed, and only then
// does the link `latest` move: whenever the machine stops, the last checkpoint is whole.

#pragma once

typedef struct Part { // a slice of a weight under its Hugging Face name
    char name[96];
    size_t offset;  // in the model's memory
    int rows, cols; // rows 0: one dimension
} Part;

// What Mixtral's and Llama's files call each kind of tensor, and its row blocks where they store these apart. Weights that
// these have not get names in their manner.
const char *const part_names[][3] = {
    {"input_layernorm.weight"},
    {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"},
    {"self_attn.o_proj.weight"},
    {"post_attention_layernorm.weight"},
    {"block_sparse_moe.gate.weight"},
    {"block_sparse_moe.experts.%d.w1.weight", "block_sparse_moe.experts.%d.w3.weight"},
    {"block_sparse_moe.experts.%d.w2.weight"},
    {"mlp.gate_proj.weight", "mlp.up_proj.weight"},
    {"mlp.down_proj.weight"},
    {"block_sparse_moe.split.weight"},
    {"block_sparse_moe.merge.weight"},
    {"block_sparse_moe.project.weight"},
    {"block_sparse_moe.gate.e_score_correction_bias"},
    {"block_sparse_moe.gate.moving_average"},
    {"block_sparse_moe.gate.level"},
    {"block_sparse_moe.table"},
    {"model.embed_tokens.weight"},
    {"model.norm.weight"},
    {"lm_head.weight"},
    {"model.router_gru.weight_ih"},
    {"model.router_gru.weight_hh"},
    {"model.router_gru.bias_ih"},
    {"model.router_gru.bias_hh"},
};

void add_part(Part **list, int *count, const Tensor *t, const char *format, int expert, size_t *offset, int rows, int cols) {
    if (*count % 256 == 0)
        *list = (Part *)reallocate(*list, (size_t)*count + 256, sizeof(Part));
    Part *part = &(*list)[(*count)++];
    char name[72];
    snprintf(name, sizeof(name), format, expert);
    if (t->layer < 0)
        snprintf(part->name, sizeof(part->name), "%s", name);
    else
        snprintf(part->name, sizeof(part->name), "model.layers.%d.%s", t->layer, name);
    part->offset = *offset;
    part->rows = tensor_is_vector(t) ? 0 : rows;
    part->cols = cols;
    *offset += (size_t)rows * (size_t)cols;
}

// All weights of a model as Hugging Face files hold them.
Part *model_parts(const Config *c, int *count) {
    Tensor *tensors = (Tensor *)allocate((size_t)c->layers * LAYER_TENSORS + KINDS, sizeof(Tensor));
    int n = model_tensors(c, tensors), D = c->dim / c->heads;
    Part *list = NULL;
    *count = 0;
    for (int i = 0; i < n; i++) {
        const Tensor *t = &tensors[i];
        const char *const *names = part_names[t->kind];
        int expert = tensor_is_expert(t), dense = t->kind == DENSE_IN || t->kind == DENSE_OUT;
        size_t offset = t->place;
        for (int e = 0; e < (expert ? c->experts : 1); e++) {
            int F = expert_width(c, e), rows = t->shape[1], cols = t->shape[2], blocks = 1;
            if (t->kind == W_IN || t->kind == DENSE_IN) {
                blocks += is_gated(t->kind == W_IN ? expert_activation(c, e) : dense_activation(c, t->layer));
                rows = t->kind == W_IN ? F : rows / blocks;
            } else if (t->kind == W_OUT) {
                cols = F;
            } else if (t->kind == QKV) {
                blocks = 3;
            }
            for (int block = 0; block < blocks; block++) {
                char format[80];
                const char *name =
                    names[block + (t->kind == DENSE_IN && blocks == 1)]; // an ungated dense layer's is its up_proj
                snprintf(format, sizeof(format), "%s%s", dense && is_moe(c, t->layer) ? "mlp.shared_experts." : "",
                         name + (dense && is_moe(c, t->layer) ? 4 : 0));
                add_part(&list, count, t, format, e, &offset,
                         t->kind == QKV ? (block ? c->kv_heads : c->heads) * D : rows, cols);
            }
        }
    }
    free(tensors);
    return list;
}

FILE *open_for_writing(const char *dir, const char *name) {
    char path[4200];
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    FILE *file = fopen(path, "wb");
    if (!file)
        fail("%s: cannot create: %s", path, strerror(errno));
    return file;
}

// Returns once the file's bytes are on the disk.
void await_disk(FILE *file, const char *dir, const char *name) {
    if (fflush(file) != 0 || ferror(file) || (sync_file(fileno(file)) != 0 && errno != EINVAL))
        fail("%s/%s: cannot write: %s", dir, name, strerror(errno));
}

// Closes it once its bytes are there.
void close_written(FILE *file, const char *dir, const char *name) {
    await_disk(file, dir, name);
    fclose(file);
}

// Writes the parts of `copies` memories, each under its prefix. The format: the header's length as 8 bytes, the header in
// JSON, then the numbers. https://github.com/huggingface/safetensors
void write_safetensors(const char *dir, const char *name, const Part *parts, int count, real *const *memory,
                       const char *const *prefix, int copies) {
    char *header = NULL;
    size_t size = 0, at = 0;
    FILE *text = open_memstream(&header, &size);
    fprintf(text, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int copy = 0; copy < copies; copy++) {
        for (int i = 0; i < count; i++) {
            const Part *p = &parts[i];
            size_t bytes = (size_t)max_int(p->rows, 1) * (size_t)p->cols * sizeof(real);
            fprintf(text, ",\"%s%s\":{\"dtype\":\"%s\",\"shape\":[", prefix[copy], p->name,
                    sizeof(real) == 8 ? "F64" : "F32");
            if (p->rows)
                fprintf(text, "%d,", p->rows);
            fprintf(text, "%d],\"data_offsets\":[%zu,%zu]}", p->cols, at, at + bytes);
            at += bytes;
        }
    }
    fprintf(text, "}");
    fflush(text);
    while (size % 8) {
        fputc(' ', text);
        fflush(text);
    }
    fclose(text);
    FILE *file = open_for_writing(dir, name);
    uint64_t length = size;
    fwrite(&length, 8, 1, file);
    fwrite(header, 1, size, file);
    const size_t most = 1 << 22; // numbers to write at once
    size_t written = 0;          // since the disk was last waited for
    for (int copy = 0; copy < copies; copy++) {
        for (int i = 0; i < count; i++) {
            size_t n = (size_t)max_int(parts[i].rows, 1) * (size_t)parts[i].cols, piece;
            for (size_t done = 0; done < n; done += piece) {
                piece = n - done < most ? n - done : most;
                ranks_tick();
                fwrite(memory[copy] + parts[i].offset + done, sizeof(real), piece, file);
                written += piece;
                if (MANY && written >= most) { // or the system's buffers fill up, and fwrite waits, and answers nobody
                    await_disk(file, dir, name);
                    written = 0;
                }
            }
        }
    }
    free(header);
    close_written(file, dir, name);
}

typedef struct Safetensors { // a mapped file
    char path[4200];
    const char *map, *data;
    size_t size, data_size;
    Json *header;
} Safetensors;

void safetensors_open(Safetensors *s, const char *path) {
    snprintf(s->path, sizeof(s->path), "%s", path);
    int file = open(path, O_RDONLY);
    struct stat info;
    if (file < 0 || fstat(file, &info) != 0)
        fail("%s: cannot open: %s", path, strerror(errno));
    s->size = (size_t)info.st_size;
    void *map = s->size >= 8 ? mmap(NULL, s->size, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
    if (map == MAP_FAILED)
        fail("%s: not a safetensors file: %zu bytes", path, s->size);
    close(file);
    s->map = (const char *)map;
    uint64_t length;
    memcpy(&length, s->map, 8);
    if (length > s->size - 8)
        fail("%s: damaged: its header should have %llu bytes, the whole file has %zu", path, (unsigned long long)length,
             s->size);
    s->header = json_parse(s->map + 8, (size_t)length, path);
    s->data = s->map + 8 + length;
    s->data_size = s->size - 8 - (size_t)length;
}

void safetensors_close(Safetensors *s) {
    munmap((void *)s->map, s->size);
    json_free(s->header);
}

// One number of the types that model files use: F64, F32, F16, BF16.
double decode_number(const char *from, int type) {
    if (type == 0) {
        double number;
        memcpy(&number, from, 8);
        return number;
    }
    float number;
    uint32_t bits = 0;
    if (type == 1) {
        memcpy(&bits, from, 4);
    } else if (type == 2) { // sign, 5 bits of exponent, 10 of mantissa
        uint16_t half;
        memcpy(&half, from, 2);
        int exponent = half >> 10 & 31, mantissa = half & 1023;
        double value = exponent == 31  ? (mantissa ? NAN : INFINITY)
                       : exponent == 0 ? ldexp(mantissa, -24)
                                       : ldexp(mantissa + 1024, exponent - 25);
        return half >> 15 ? -value : value;
    } else { // the upper half of a float
        uint16_t half;
        memcpy(&half, from, 2);
        bits = (uint32_t)half << 16;
    }
    memcpy(&number, &bits, 4);
    return number;
}

// Reads rows x cols numbers (rows 0: one dimension) of the tensor `name` to `to`. Where the file's has more dimensions than
// two, the first ones count as one; it should have `all` rows, of which those from `first` on are taken. Returns 0 where
// the file has no such name.
int read_tensor(const Safetensors *s, const char *name, int rows, int cols, int all, int first, real *to) {
    const Json *t = json_get(s->header, name);
    if (!t)
        return 0;
    const Json *dtype = json_get(t, "dtype"), *shape = json_get(t, "shape"), *range = json_get(t, "data_offsets");
    const char *const types[] = {"F64", "F32", "F16", "BF16", NULL};
    const int sizes[] = {8, 4, 2, 2};
    int type = dtype && dtype->type == 's' ? find_word(types, dtype->text) : -1;
    if (type < 0)
        fail("%s: %s has type %s; expected F64, F32, F16 or BF16", s->path, name,
             dtype && dtype->text ? dtype->text : "none");
    char found[128] = "no shape";
    double found_rows = 1, found_cols = 0;
    for (const Json *d = shape ? shape->child : NULL; d; d = d->next) {
        size_t used = d == shape->child ? 0 : strlen(found);
        snprintf(found + used, sizeof(found) - used, "%s%.0f", used ? " x " : "", d->number);
        if (d->next)
            found_rows *= d->number;
        else
            found_cols = d->number;
    }
    if (found_cols != cols || found_rows != max_int(all, 1))
        fail("%s: %s is %s; config.json makes it %.0d%s%d", s->path, name, found, all, all ? " x " : "", cols);
    const Json *from = range ? range->child : NULL, *end = from ? from->next : NULL;
    size_t width = (size_t)sizes[type], count = (size_t)max_int(rows, 1) * (size_t)cols;
    size_t bytes = (size_t)max_int(all, 1) * (size_t)cols * width;
    if (!end || !(from->number >= 0) || !(end->number <= (double)s->data_size) || end->number - from->number != (double)bytes)
        fail("%s: damaged: %s should have %zu bytes within the file's %zu", s->path, name, bytes, s->data_size);
    const char *p = s->data + (size_t)from->number + (size_t)first * (size_t)cols * width;
    if ((type == 0 && sizeof(real) == 8) || (type == 1 && sizeof(real) == 4)) {
        memcpy(to, p, count * width);
    } else {
        for (size_t i = 0; i < count; i++)
            to[i] = (real)decode_number(p + i * width, type);
    }
    return 1;
}

// The class of transformers that computes what this configuration does, or "" where there is none.
const char *matching_class(const Config *c) {
    int last, moe = moe_layers(c, &last), plain = c->activation == SWIGLU;
    if (moe == 0)
        return dense_activation(c, 0) == SWIGLU ? "LlamaForCausalLM" : "";
    plain &= !c->shared && !c->mixed && c->score == SOFTMAX && c->select == TOP_K && !c->group_topk &&
             c->routers == 1 && c->scale == 1;
    plain &= !c->noise && c->subtokens == 1 && !c->recurrent && !c->history_decay && !c->bias_rate &&
             !c->eval_capacity_factor;
    return plain && moe == c->layers && c->gate == RENORMALIZED ? "MixtralForCausalLM" : "";
}

// "name":value for every option but those of this call alone.
void write_options(FILE *file, const Config *config) {
    Config whole = *config, *c = &whole;
    c->batch *= ranks.size; // so that it does not matter how many ranks go on with it
    const char *comma = "";
    for (int i = 0; i < option_count; i++) {
        const Option *o = &options[i];
        if (o->kind == '-' || o->when == RUN)
            continue;
        char buffer[64];
        const char *text = option_text(c, o, buffer);
        fprintf(file, "%s\"%s\":", comma, o->name);
        if (o->kind == 's' || o->kind == 'e')
            json_write_string(file, text, strlen(text));
        else
            fputs(o->kind == 'f' ? (atoi(text) ? "true" : "false") : text, file);
        comma = ",";
    }
}

void write_config(const char *dir, const Config *c, int eot) {
    const char *name = matching_class(c);
    int moe = !strcmp(name, "MixtralForCausalLM"), dense = !strcmp(name, "LlamaForCausalLM");
    FILE *f = open_for_writing(dir, "config.json");
    fprintf(f, "{\n  \"architectures\": [\"%s\"],\n  \"model_type\": \"%s\",\n", *name ? name : "TrainMoeForCausalLM",
            moe ? "mixtral" : dense ? "llama" : "train_moe");
    if (!*name)
        fprintf(f, "  \"comment\": \"no class of transformers has this router; the object train_moe says what it "
                   "computes\",\n");
    fprintf(f, "  \"vocab_size\": %d,\n  \"hidden_size\": %d,\n  \"intermediate_size\": %d,\n", c->vocab, c->dim,
            dense ? dense_width(c, 0) : c->ffn);
    fprintf(f, "  \"num_hidden_layers\": %d,\n  \"num_attention_heads\": %d,\n  \"num_key_value_heads\": %d,\n", c->layers,
            c->heads, c->kv_heads);
    fprintf(f, "  \"head_dim\": %d,\n  \"hidden_act\": \"%s\",\n  \"max_position_embeddings\": %d,\n", c->dim / c->heads,
            c->activation == SWIGLU ? "silu" : c->activation == RELU ? "relu" : "gelu", c->seq);
    char a[64], b[64];
    fprintf(f, "  \"rms_norm_eps\": %s,\n  \"rope_theta\": %s,\n", number_text(c->norm_eps, a),
            number_text(c->rope_theta, b));
    if (moe) // transformers' balance loss is K at balance, ours 1
        fprintf(f, "  \"num_local_experts\": %d,\n  \"num_experts_per_tok\": %d,\n  \"router_aux_loss_coef\": %s,\n",
                c->experts, c->topk, number_text(c->aux_weight / c->topk, a));
    const char *type = sizeof(real) == 8 ? "float64" : "float32";
    fprintf(f, "  \"tie_word_embeddings\": %s,\n  \"bos_token_id\": %d,\n  \"eos_token_id\": %d,\n",
            c->untied ? "false" : "true", eot, eot);
    fprintf(f, "  \"dtype\": \"%s\",\n  \"torch_dtype\": \"%s\",\n", type, type); // the newer and the older name
    fprintf(f, "  \"train_moe\": {");
    write_options(f, c);
    fprintf(f, "}\n}\n");
    close_written(f, dir, "config.json");
}

// A member that has to be there; `type` as in Json, 'i' for a whole number.
const Json *expect_member(const Json *object, const char *name, char type, const char *path) {
    const Json *m = json_get(object, name);
    if (!m || m->type != (type == 'i' ? 'n' : type) || (type == 'i' && m->number != floor(m->number)))
        fail("%s: expected %s \"%s\", found %s", path,
             type == 'o' ? "an object" : type == 's' ? "a text" : type == 'n' ? "a number" : "a whole number", name,
             m ? "something else" : "none");
    return m;
}

// The options in a JSON object of a file. Unknown ones are of a later version and passed over.
void read_options(Config *c, const Json *object, const char *path) {
    for (const Json *m = object->child; m; m = m->next) {
        char number[64];
        int i = find_option(m->key);
        if (i >= 0)
            set_option(c, &options[i], m->type == 's' ? keep_text(m->text) : m->type == 'n'   ? number_text(m->number, number)
                                              : m->type == 't' ? "1"
                                                               : "0",
                       path);
    }
}

// What dir/config.json says of the model: ours has every option in it, of Hugging Face's Mixtral and Llama we take what
// we can compute and refuse the rest.
void config_from_directory(Config *c, const char *dir) {
    char path[4200];
    snprintf(path, sizeof(path), "%s/config.json", dir);
    size_t size;
    char *text = read_file(path, &size);
    Json *json = json_parse(text, size, path);
    c->vocab = (int)expect_member(json, "vocab_size", 'i', path)->number;
    if (c->vocab < 1 || c->vocab > 1 << 24)
        fail("%s: vocab_size %d is not possible", path, c->vocab);
    const Json *ours = json_get(json, "train_moe"), *type = expect_member(json, "model_type", 's', path);
    if (ours) {
        read_options(c, expect_member(json, "train_moe", 'o', path), path);
        find_recipe(c->recipe);
    } else {
        int moe = !strcmp(type->text, "mixtral");
        if (!moe && strcmp(type->text, "llama"))
            fail("%s: model_type is %s; expected mixtral, llama, or a checkpoint of train_moe", path, type->text);
        memset(c->given, 0, sizeof(c->given));
        config_recipe(c, moe ? "mixtral" : "dense");
        const char *const names[][2] = {{"hidden_size", "dim"},           {"num_hidden_layers", "layers"},
                                        {"num_attention_heads", "heads"}, {"num_key_value_heads", "kv-heads"},
                                        {"intermediate_size", "ffn"},     {"max_position_embeddings", "seq"},
                                        {"num_local_experts", "experts"}, {"num_experts_per_tok", "topk"}};
        c->topk = 1; // a dense layer is K*F wide
        c->shared = 0;
        for (int i = 0; i < (moe ? 8 : 6); i++) {
            char number[64];
            set_option(c, &options[find_option(names[i][1])],
                       number_text(expect_member(json, names[i][0], 'i', path)->number, number), path);
        }
        c->seq = min_int(c->seq, 4096); // the cache of generation
        c->norm_eps = expect_member(json, "rms_norm_eps", 'n', path)->number;
        const Json *rope = json_get(json, "rope_parameters"), *scaling = json_get(json, "rope_scaling"); // newer, older form
        c->rope_theta = expect_member(rope && rope->type == 'o' ? rope : json, "rope_theta", 'n', path)->number;
        const Json *kind = json_get(rope && rope->type == 'o' ? rope : scaling, "rope_type");
        if ((kind && kind->text && strcmp(kind->text, "default")) || (!kind && scaling && scaling->type == 'o'))
            fail("%s: its rotary positions are scaled, which this program does not compute", path);
        const Json *tied = json_get(json, "tie_word_embeddings"), *width = json_get(json, "head_dim");
        const Json *act = json_get(json, "hidden_act"), *window = json_get(json, "sliding_window");
        c->untied = !tied || tied->type != 't';
        if (act && act->text && strcmp(act->text, "silu"))
            fail("%s: hidden_act is %s; expected silu", path, act->text);
        if (width && width->type == 'n' && width->number * c->heads != c->dim)
            fail("%s: head_dim %.0f is not hidden_size %d / num_attention_heads %d", path, width->number, c->dim, c->heads);
        if (window && window->type == 'n' && window->number < c->seq)
            c->seq = (int)window->number;
        const char *const biases[] = {"attention_bias", "mlp_bias"};
        for (int i = 0; i < 2; i++) {
            if (json_get(json, biases[i]) && json_get(json, biases[i])->type == 't')
                fail("%s: %s is true; this model has no biases", path, biases[i]);
        }
    }
    json_free(json);
    free(text);
}

// Joins what a checkpoint says (c) with what the command line asked for: options of kinds not in `adopted` are as asked;
// of the others the command line's count where given, but where `fixed` they may not differ. Bits: 1 << MODEL...
void join_options(Config *c, const Config *asked, int adopted, int fixed, const char *path) {
    for (int i = 0; i < option_count; i++) {
        const Option *o = &options[i];
        if (o->kind == '-' || (!asked->given[i] && adopted >> o->when & 1))
            continue;
        char a[64], b[64];
        const char *mine = option_text(asked, o, a), *theirs = option_text(c, o, b);
        if (fixed >> o->when & 1 && asked->given[i] && strcmp(mine, theirs))
            usage_fail("--%s %s: in %s it is %s, and it cannot change now", o->name, mine, path, theirs);
        size_t size = o->kind == 's' ? sizeof(char *) : o->kind == 'd' ? sizeof(double) : sizeof(int);
        memcpy((char *)c + o->offset, (const char *)asked + o->offset, size);
    }
    memcpy(c->given, asked->given, sizeof(c->given));
}

// Reads a part under its own name or, as transformers 5 can store Mixtral's experts, out of one tensor of all experts.
int read_part(const Safetensors *s, const char *name, const Part *p, int experts, real *to) {
    int layer, expert, w, rows = p->rows, used = 0;
    char fused[96];
    if (read_tensor(s, name, rows, p->cols, rows, 0, to))
        return 1;
    if (sscanf(name, "model.layers.%d.block_sparse_moe.experts.%d.w%d%n", &layer, &expert, &w, &used) == 3) {
        snprintf(fused, sizeof(fused), "model.layers.%d.mlp.experts.%s", layer, w == 2 ? "down_proj" : "gate_up_proj");
        int each = w == 2 ? rows : 2 * rows;
        return read_tensor(s, fused, rows, p->cols, experts * each, expert * each + (w == 3 ? rows : 0), to);
    }
    if (sscanf(name, "model.layers.%d.block_sparse_moe.gate%n", &layer, &used) == 1 && used) {
        snprintf(fused, sizeof(fused), "model.layers.%d.mlp.gate.weight", layer);
        return read_tensor(s, fused, rows, p->cols, rows, 0, to);
    }
    return 0;
}

// Reads the parts, each under prefix, from dir/name: one file, or those that dir/name.index.json lists.
void read_weights(const char *dir, const char *name, const Part *parts, int count, int experts, const char *prefix,
                  real *memory) {
    char path[4200];
    Safetensors *files = NULL;
    int n = 0;
    snprintf(path, sizeof(path), "%s/%s.index.json", dir, name);
    if (access(path, F_OK) == 0) {
        size_t size;
        char *text = read_file(path, &size), index[4200];
        memcpy(index, path, sizeof(index));
        Json *json = json_parse(text, size, index);
        for (const Json *m = expect_member(json, "weight_map", 'o', index)->child; m; m = m->next) {
            if (m->type != 's')
                fail("%s: the file of %s is not a text", index, m->key);
            snprintf(path, sizeof(path), "%s/%s", dir, m->text);
            int known = 0;
            for (int i = 0; i < n; i++)
                known |= !strcmp(files[i].path, path);
            if (known)
                continue;
            files = (Safetensors *)reallocate(files, (size_t)n + 1, sizeof(Safetensors));
            safetensors_open(&files[n++], path);
        }
        json_free(json);
        free(text);
    } else {
        files = (Safetensors *)allocate(1, sizeof(Safetensors));
        snprintf(path, sizeof(path), "%s/%s", dir, name);
        safetensors_open(&files[n++], path);
    }
    for (int i = 0; i < count; i++) {
        char full[160];
        snprintf(full, sizeof(full), "%s%s", prefix, parts[i].name);
        int found = 0;
        for (int f = 0; f < n && !found; f++)
            found = read_part(&files[f], full, &parts[i], experts, memory + parts[i].offset);
        if (!found)
            fail("%s: there is no %s, which config.json asks for", path, full);
        ranks_tick();
    }
    for (int f = 0; f < n; f++)
        safetensors_close(&files[f]);
    free(files);
}
