// Checkpoints: Hugging Face model directories.
// Gives: model_parts, read_part, check_tensors, write_options, write_config, config_from_directory, join_options.
// Needs: data/safetensors.h, dev/options.h, dev/quote.h, and of train_moe.c Config and the table of weights, which includes it.
//
// config.json, model.safetensors and tokenizer.json are as transformers opens them; optimizer.safetensors has the
// optimizer's moments. Models that no class of transformers computes get names in the same manner, and config.json says
// what they are.
#pragma once
#include "safetensors.h"
#include "hugging_face.h"
#include "dev/quote.h"

// ---- the weights under their Hugging Face names

// What Mixtral's and Llama's files call each kind of tensor: more than one name where they store blocks of its rows
// apart. A kind that is not here, of dev/routers, keeps its own name.
const struct {
    const char *kind, *names[3];
} file_names[] = {
    {"embed", {"model.embed_tokens.weight"}},
    {"ngrams", {"model.embed_ngrams.weight"}},
    {"norm1", {"input_layernorm.weight"}},
    {"qkv", {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"}},
    {"q_norm", {"self_attn.q_norm.weight"}},
    {"k_norm", {"self_attn.k_norm.weight"}},
    {"value_embed", {"self_attn.value_embedding.weight"}},
    {"proj", {"self_attn.o_proj.weight"}},
    {"ngram_key", {"ngram_gate.key.weight"}},
    {"ngram_value", {"ngram_gate.value.weight"}},
    {"query_key", {"self_attn.qk_proj.weight"}},
    {"key_value", {"self_attn.kv_proj.weight"}},
    {"query_experts", {"self_attn.q_experts.weight"}},
    {"value_router", {"self_attn.v_gate.weight"}},
    {"value_experts", {"self_attn.v_experts.weight"}},
    {"output_router", {"self_attn.o_gate.weight"}},
    {"output_experts", {"self_attn.o_experts.weight"}},
    {"lstm_in", {"lstm.weight_ih_l0"}}, // these have the names and shapes of PyTorch's nn.LSTM, whose bias_hh_l0 is 0 here
    {"lstm_state", {"lstm.weight_hh_l0"}},
    {"lstm_bias", {"lstm.bias_ih_l0"}},
    {"lstm_proj", {"lstm.weight_hr_l0"}},
    {"norm2", {"post_attention_layernorm.weight"}},
    {"router", {"block_sparse_moe.gate.weight"}},
    {"w_in", {"block_sparse_moe.experts.%d.w1.weight", "block_sparse_moe.experts.%d.w3.weight"}},
    {"w_out", {"block_sparse_moe.experts.%d.w2.weight"}},
    {"dense_in", {"gate_proj.weight", "up_proj.weight"}},
    {"dense_out", {"down_proj.weight"}},
    {"split", {"block_sparse_moe.split.weight"}},
    {"merge", {"block_sparse_moe.merge.weight"}},
    {"project", {"block_sparse_moe.project.weight"}},
    {"bias", {"block_sparse_moe.gate.e_score_correction_bias"}},
    {"slow", {"block_sparse_moe.gate.moving_average"}},
    {"level", {"block_sparse_moe.gate.level"}},
    {"norm", {"model.norm.weight"}},
    {"head", {"lm_head.weight"}},
    {"gru_x", {"model.router_gru.weight_ih"}},
    {"gru_h", {"model.router_gru.weight_hh"}},
    {"gru_bx", {"model.router_gru.bias_ih"}},
    {"gru_bh", {"model.router_gru.bias_hh"}},
};

// The name of a block of rows of a tensor; of its expert e, where it has experts.
void part_name(char name[96], const Config *c, const Tensor *t, int e, int block) {
    const char *format = NULL;
    for (int i = 0; i < COUNT(file_names) && !format; i++) {
        format = strcmp(file_names[i].kind, t->kind) ? NULL : file_names[i].names[block];
    }
    size_t used = 0, size = 96;
    if (t->layer >= 0) {
        used = (size_t)snprintf(name, size, "model.layers.%d.", t->layer);
    }
    if (!strncmp(t->kind, "dense", 5)) {
        used += (size_t)snprintf(name + used, size - used, is_moe(c, t->layer) ? "mlp.shared_experts." : "mlp.");
    }
    if (format) {
        snprintf(name + used, size - used, format, e);
    } else {
        snprintf(name + used, size - used, "%s.%s", t->layer < 0 ? "model" : "block_sparse_moe", t->kind);
    }
}

// All weights of a model as Hugging Face files hold them: tensor by tensor, each as blocks of rows that together are
// all of it.
Part *model_parts(const Model *m, int *count) {
    const Config *c = &m->config;
    int D = c->dim / c->heads, limit = 3 * m->tensor_count + 3 * c->layers * c->experts;
    Part *list = (Part *)allocate(limit, sizeof(Part));
    *count = 0;
    for (int i = 0; i < base_tensors(m); i++) { // pairs go elsewhere: dev/adapter.h
        const Tensor *t = &m->tensors[i];
        int qkv = !strcmp(t->kind, "qkv"), w_in = !strcmp(t->kind, "w_in"), dense_in = !strcmp(t->kind, "dense_in");
        size_t offset = 0;
        for (int e = 0; e < (t->of_experts ? c->experts : 1); e++) {
            // An expert has its own matrices, and a gated one's first matrix is two, as that of a dense layer is.
            int rows = (t->of_experts ? 1 : t->shape[0]) * t->shape[1], cols = t->shape[2], blocks = qkv ? 3 : 1, first = 0;
            if (w_in) {
                rows = expert_width(c, e);
                blocks += is_gated(expert_activation(c, e));
            } else if (t->of_experts) {
                cols = expert_width(c, e);
            } else if (dense_in) {
                blocks += is_gated(dense_activation(c, t->layer));
                rows /= blocks;
                first = 2 - blocks; // one that is not gated is called up_proj
            }
            for (int block = 0; block < blocks; block++) {
                Part *part = &list[(*count)++];
                if (qkv) {
                    rows = (block ? c->kv_heads : c->heads) * D;
                }
                part_name(part->name, c, t, e, first + block);
                part->tensor = i;
                part->offset = offset;
                part->rows = t->dims == 1 ? 0 : rows;
                part->cols = cols;
                offset += (size_t)rows * (size_t)cols;
            }
        }
    }
    return list;
}

// The name under which transformers 5 can store a tensor of Mixtral's, which for experts is one tensor of all of them.
// Returns 0 where it has no such name, else 1, and for experts which of w1, w2 and w3 it is.
int fused_name(const char *name, char fused[96], int *expert) {
    int layer, w, used = 0;
    if (sscanf(name, "model.layers.%d.block_sparse_moe.experts.%d.w%d%n", &layer, expert, &w, &used) == 3) {
        snprintf(fused, 96, "model.layers.%d.mlp.experts.%s", layer, w == 2 ? "down_proj" : "gate_up_proj");
        return w;
    }
    *expert = -1;
    if (sscanf(name, "model.layers.%d.block_sparse_moe.gate.weight%n", &layer, &used) == 1 && used) {
        snprintf(fused, 96, "model.layers.%d.mlp.gate.weight", layer);
        return 1;
    }
    return 0;
}

// Reads a part under its own name or, as transformers 5 can store Mixtral's experts, out of one tensor of all experts.
// Returns 0 where the file has neither.
int find_part(const Safetensors *s, const char *name, const Part *p, int experts, real *to) {
    int expert, rows = p->rows;
    char fused[96];
    if (read_tensor(s, name, p, rows, 0, to)) {
        return 1;
    }
    int w = fused_name(name, fused, &expert);
    if (!w || expert < 0) {
        return w ? read_tensor(s, fused, p, rows, 0, to) : 0;
    }
    int each = w == 2 ? rows : 2 * rows;
    return read_tensor(s, fused, p, experts * each, expert * each + (w == 3 ? rows : 0), to);
}

// Reads a part, under prefix, from whichever file has it, and returns that file's path.
const char *read_part(const WeightFiles *files, const char *prefix, const Part *p, int experts, real *to) {
    char name[160];
    const char *found = NULL;
    snprintf(name, sizeof(name), "%s%s", prefix, p->name);
    for (int i = 0; i < files->count && !found; i++) {
        found = find_part(&files->list[i], name, p, experts, to) ? files->list[i].path : NULL;
    }

    // A file may have only the output's matrix, where it is the embedding's; where it is not, check_tensors() refuses it.
    for (int i = 0; i < files->count && !found && !strcmp(name, "model.embed_tokens.weight"); i++) {
        found = read_tensor(&files->list[i], "lm_head.weight", p, p->rows, 0, to) ? files->list[i].path : NULL;
    }
    for (int i = 0; i < files->count && !found && !strncmp(name, "model.", 6); i++) {
        if (json_get(files->list[i].header, name + 6)) {
            fail("%s: there is %s, but no %s: it was saved without its output; open it with transformers' "
                 "AutoModelForCausalLM and save it again",
                 files->path, name + 6, name);
        }
    }
    if (!found) {
        fail("%s: there is no %s, which config.json asks for", files->path, name);
    }
    ranks_tick();
    return found;
}

// Tensors of a file that change nothing: frequencies of rotary positions, which old versions of transformers saved, and
// an output's matrix that is the embedding's (untie_output).
int is_idle_tensor(const char *name, int untied) {
    const char *const end = "rotary_emb.inv_freq";
    size_t n = strlen(name), k = strlen(end);
    return (n >= k && !strcmp(name + n - k, end)) || (!untied && !strcmp(name, "lm_head.weight"));
}

// Ends the program where the files have one part under both of its names: only one of the two was read.
void check_both_names(const Table *seen, const WeightFiles *files, const char *name) {
    int expert;
    char fused[96];
    if (!fused_name(name, fused, &expert)) {
        return;
    }
    int64_t first = table_get(seen, name, strlen(name)) - 2, second = table_get(seen, fused, strlen(fused)) - 2;
    if (first >= 0 && second >= 0) {
        fail("%s: %s is there twice, in %s as %s; remove the one that is old", files->list[first].path, name,
             files->list[second].path, fused);
    }
}

// Ends the program where the files have a tensor that is no part of the model: what it does there would be lost.
void check_tensors(const WeightFiles *files, const Config *c, const Part *parts, int count, const char *const *prefix,
                   int copies) {
    Table asked;
    char name[160], fused[96];
    memset(&asked, 0, sizeof(asked));
    for (int i = 0; i < copies * count; i++) {
        int expert, n = snprintf(name, sizeof(name), "%s%s", prefix[i / count], parts[i % count].name);
        *table_put(&asked, name, (size_t)n) = 1;
        if (fused_name(name, fused, &expert)) {
            *table_put(&asked, fused, strlen(fused)) = 1;
        }
    }
    for (int i = 0; i < files->count; i++) {
        const Safetensors *s = &files->list[i];
        for (const Json *t = s->header->child; t; t = t->next) {
            if (!strcmp(t->key, "__metadata__") || is_idle_tensor(t->key, c->untied)) {
                continue;
            }
            if (!table_get(&asked, t->key, strlen(t->key))) {
                fail("%s: %s is no tensor of the model that config.json describes (%d layers, no biases, %s norms of "
                     "queries and keys), and without it this would be another model",
                     s->path, t->key, c->layers, c->qk_norm ? "with" : "no");
            }
            int64_t *seen = table_put(&asked, t->key, strlen(t->key));
            if (*seen != 1) {
                fail("%s: %s is there twice, in %s too; take the files away that are old", s->path, t->key,
                     files->list[*seen - 2].path);
            }
            *seen = i + 2;
        }
    }
    for (int i = 0; i < copies * count; i++) {
        snprintf(name, sizeof(name), "%s%s", prefix[i / count], parts[i % count].name);
        check_both_names(&asked, files, name);
    }
    const char *const embed = "model.embed_tokens.weight";
    if (c->untied && table_get(&asked, embed, strlen(embed)) == 1) {
        fail("%s: there is no %s, which config.json asks for", files->path, embed);
    }
    table_free(&asked);
}

// ---- config.json

// The class of transformers that computes what this configuration does, or "" where there is none.
const char *matching_class(const Config *c) {
    int moe = moe_layers(c);
    if (c->qk_norm || c->ngrams || c->value_embedding || mixer_of(c) || !c->norms || !c->last_feed || c->moe_sigmoid) {
        return "";
    }
    if (moe == 0) {
        return dense_activation(c, 0) == SWIGLU ? "LlamaForCausalLM" : "";
    }
    int plain = c->activation == SWIGLU && !c->shared && !c->mixed && c->subtokens == 1 && !c->recurrent;
    plain &= choosing_router(c) == &topk_router; // of the other routers transformers knows nothing
    plain &= c->score == SOFTMAX && c->scale == 1 && !c->bias_rate && !c->eval_capacity_factor;
    return plain && moe == c->layers && c->gate == RENORMALIZED ? "MixtralForCausalLM" : "";
}

// "name":value for every option but those of this call alone.
void write_options(FILE *file, const Config *config) {
    Config of_all = *config;
    of_all.batch *= ranks.size; // so that it does not matter how many processes go on with it
    const char *comma = "";
    for (int i = 0; i < option_count; i++) {
        const Option *o = &options[i];
        if (o->when == RUN) {
            continue;
        }
        char buffer[64];
        const char *text = option_text(&of_all, o, buffer);
        fprintf(file, "%s\"%s\":", comma, o->name);
        if (o->kind == 's' || o->kind == 'e') {
            json_write_string(file, text, strlen(text));
        } else if (o->kind == 'f') {
            fputs(atoi(text) ? "true" : "false", file);
        } else {
            fputs(text, file);
        }
        comma = ",";
    }
}

void write_config(const char *dir, const Config *c, int eot) {
    const char *name = matching_class(c), *model_type = "train_moe";
    int moe = !strcmp(name, "MixtralForCausalLM"), dense = !strcmp(name, "LlamaForCausalLM");
    if (moe || dense) {
        model_type = moe ? "mixtral" : "llama";
    }
    FILE *f = open_for_writing(dir, "config.json");
    fprintf(f, "{\n  \"architectures\": [\"%s\"],\n", *name ? name : "TrainMoeForCausalLM");
    fprintf(f, "  \"model_type\": \"%s\",\n", model_type);
    if (!*name) {
        fprintf(f, "  \"comment\": \"no class of transformers computes this model; the object train_moe says what it "
                   "computes\",\n");
    }
    fprintf(f, "  \"vocab_size\": %d,\n  \"hidden_size\": %d,\n", c->vocab, c->dim);
    fprintf(f, "  \"intermediate_size\": %d,\n", dense ? dense_width(c, 0) : c->ffn);
    fprintf(f, "  \"num_hidden_layers\": %d,\n  \"num_attention_heads\": %d,\n", c->layers, c->heads);
    fprintf(f, "  \"num_key_value_heads\": %d,\n  \"head_dim\": %d,\n", c->kv_heads, head_width(c));
    fprintf(f, "  \"hidden_act\": \"%s\",\n  \"max_position_embeddings\": %d,\n", act_name(c), c->seq);
    char number[64];
    fprintf(f, "  \"rms_norm_eps\": %s,\n", number_text(c->norm_eps, number));
    fprintf(f, "  \"rope_theta\": %s,\n", number_text(c->rope_theta, number));
    if (moe) { // transformers' balance loss is K at balance, ours 1
        fprintf(f, "  \"num_local_experts\": %d,\n  \"num_experts_per_tok\": %d,\n", c->experts, c->topk);
        fprintf(f, "  \"router_aux_loss_coef\": %s,\n", number_text(c->aux_weight / c->topk, number));
    }
    fprintf(f, "  \"tie_word_embeddings\": %s,\n", c->untied ? "false" : "true");
    fprintf(f, "  \"bos_token_id\": %d,\n  \"eos_token_id\": %d,\n", eot, eot);
    const char *type = sizeof(real) == 8 ? "float64" : "float32";
    fprintf(f, "  \"dtype\": \"%s\",\n  \"torch_dtype\": \"%s\",\n", type, type); // the newer and the older name
    fprintf(f, "  \"train_moe\": {");
    write_options(f, c);
    fprintf(f, "}\n}\n");
    close_written(f, dir, "config.json");
}

// The options in a JSON object of a file. Unknown ones are of a later version and passed over.
void read_options(Config *c, const Json *object, const char *path) {
    for (const Json *m = object->child; m; m = m->next) {
        char number[64];
        const char *text = m->type == 't' ? "1" : "0";
        if (m->type == 's' || m->type == 'n') {
            text = m->type == 's' ? keep_text(m->text) : number_text(m->number, number);
        }
        int i = find_option(m->key);
        if (i >= 0) {
            set_option(c, &options[i], text, path);
        }
    }

    // Once an evaluation was counted in batches, of all processes.
    const Json *batches = json_get(object, "eval-batches");
    if (batches && batches->type == 'n') {
        c->eval_tokens = (int)fmin(fmax(batches->number, 0) * c->batch * c->seq, 2e9);
    }
}

// Where config.json says that the output has the embedding's matrix, but the file has another one for it, that one
// counts. Version 5 of transformers does the same, older versions did not.
void untie_output(Config *c, const char *dir) {
    WeightFiles files;
    const char *const names[] = {"model.embed_tokens.weight", "lm_head.weight"};
    const Safetensors *at[2] = {NULL, NULL};
    const Json *tensors[2] = {NULL, NULL};
    open_weights(&files, dir, "model.safetensors", 0); // checksums are compared when all is read
    for (int i = 0; i < files.count; i++) {
        for (int k = 0; k < 2; k++) {
            const Json *t = json_get(files.list[i].header, names[k]);
            at[k] = t ? &files.list[i] : at[k];
            tensors[k] = t ? t : tensors[k];
        }
    }
    if (tensors[0] && tensors[1] && !same_numbers(at, tensors, names, c->vocab, c->dim)) {
        remark("%s: tie_word_embeddings is true, but %s is not %s: it counts as false, as in transformers 5", dir,
               names[1], names[0]);
        c->untied = 1;
    }
    close_weights(&files);
}

// What dir/config.json says of the model, and the files of weights beside it; ours has every option in it. Returns the
// length of attention's sliding window, 0: none.
int config_from_directory(Config *c, const char *dir) {
    char path[4200];
    snprintf(path, sizeof(path), "%s/config.json", dir);
    size_t size;
    char *text = read_file(path, &size);
    Json *json = json_parse(text, size, path);
    config_defaults(c);
    double vocab = 32000; // of both classes, where the file says nothing
    if (json_get(json, "vocab_size") || !json_get(json, "model_type")) {
        vocab = expect_member(json, "vocab_size", 'i', path)->number;
    }
    if (!(vocab >= 1 && vocab <= 1 << 24)) {
        fail("%s: vocab_size %.15g is not possible", path, vocab);
    }
    c->vocab = (int)vocab;
    const Json *type = expect_member(json, "model_type", 's', path);
    int own = json_get(json, "train_moe") != NULL;
    c->optimizer = ADAMW; // as older checkpoints have, which do not say it
    if (own) {
        read_options(c, expect_member(json, "train_moe", 'o', path), path);
        find_recipe(c->recipe);
    }
    int window = config_from_hugging_face(c, json, type->text, path, own);
    check_weight_files(dir, "model.safetensors");
    if (!c->untied && !has_file(dir, "adapter_config.json")) { // which has no output; its base had one
        untie_output(c, dir);
    }
    json_free(json);
    free(text);
    return window;
}

// Joins what a checkpoint says (c) with what the command line asked for: options of kinds not in `adopted` are as
// asked; of the others the command line's count where given, but where `fixed` they may not differ. Bits: 1 <<
// MODEL... A new run that starts from the same weights may have another ORDER.
void join_options(Config *c, const Config *asked, int adopted, int fixed, const char *path) {
    for (int i = 0; i < option_count; i++) {
        const Option *o = &options[i];
        if (!asked->given[i] && adopted >> o->when & 1) {
            continue;
        }
        char a[64], b[64];
        const char *mine = option_text(asked, o, a), *theirs = option_text(c, o, b);
        if (fixed >> o->when & 1 && asked->given[i] && strcmp(mine, theirs)) {
            int can_begin = o->when == ORDER;
            usage_fail("--%s %s: in %s it is %s, and it cannot change now%s%s%s", o->name, mine, path, theirs,
                       can_begin ? "; a new run from these weights, --init " : "", can_begin ? quote_for_shell(path) : "",
                       can_begin ? ", can have it" : "");
        }
        size_t size = sizeof(int);
        if (o->kind == 's' || o->kind == 'd') {
            size = o->kind == 's' ? sizeof(char *) : sizeof(double);
        }
        memcpy((char *)c + o->offset, (const char *)asked + o->offset, size);
    }
    memcpy(c->given, asked->given, sizeof(c->given));
}
