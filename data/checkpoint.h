// Checkpoints: Hugging Face model directories.
// Gives: model_parts, parts_to_read, read_part, check_tensors, write_options, write_config, config_from_directory, join_options.
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

// A block of an expert's rows: where transformers 5 can store it instead, in one tensor of all experts of a layer.
void pack_part(Part *p, const Tensor *t, int e, int experts, int block, int blocks) {
    int is_in = !strcmp(t->kind, "w_in"), each = p->rows * blocks;
    snprintf(p->other, sizeof(p->other), "model.layers.%d.mlp.experts.%s", t->layer, is_in ? "gate_up_proj" : "down_proj");
    p->all = experts * each;
    p->first = e * each + block * p->rows;
}

// The parts of one tensor, in files with such names: blocks of rows that together are all of it.
void add_parts(const Config *c, const Tensor *t, int number, int k, Part *list, int *count) {
    int names = k < 0 ? OUR_NAMES : model_classes[k].names, D = head_width(c), packed = names == GRANITE_NAMES;
    int qkv = !strcmp(t->kind, "qkv") || !strcmp(t->kind, "qkv_bias"), w_in = !strcmp(t->kind, "w_in");
    int dense_in = !strcmp(t->kind, "dense_in"), whole = packed && t->of_experts; // all experts in one
    size_t offset = 0;
    for (int e = 0; e < (t->of_experts && !whole ? c->experts : 1); e++) {
        // An expert has its own matrices, and a gated one's first matrix is two, as that of a dense layer is.
        int rows = (t->of_experts && !whole ? 1 : t->shape[0]) * t->shape[1], cols = t->shape[2], blocks = qkv ? 3 : 1, first = 0;
        if (w_in && !whole) {
            rows = expert_width(c, e);
            blocks += is_gated(expert_activation(c, e));
        } else if (t->of_experts && !whole) {
            cols = expert_width(c, e);
        } else if (dense_in && !(packed && is_moe(c, t->layer))) {
            blocks += is_gated(dense_activation(c, t->layer));
            rows /= blocks;
            first = 2 - blocks; // one that is not gated is called up_proj
        }
        for (int block = 0; block < blocks; block++) {
            Part *part = &list[(*count)++];
            int length = (block ? c->kv_heads : c->heads) * D;
            if (qkv && t->dims == 1) {
                cols = length;
                rows = 1;
            } else if (qkv) {
                rows = length;
            }
            part_name(part->name, c, names, t, e, first + block);
            part->tensor = number;
            part->offset = offset;
            part->rows = t->dims == 1 ? 0 : rows;
            part->cols = cols;
            part->experts = whole ? c->experts : 0;
            if (k >= 0 && t->of_experts && !whole) {
                pack_part(part, t, e, c->experts, block, blocks);
            } else if (k == MIXTRAL && !strcmp(t->kind, "router")) {
                snprintf(part->other, sizeof(part->other), "model.layers.%d.mlp.gate.weight", t->layer);
                part->all = rows;
            }
            offset += (size_t)rows * (size_t)cols;
        }
    }
}

// All weights of a model as files of class k hold them (-1: our own models), tensor by tensor.
Part *parts_of_class(const Model *m, int k, int *count) {
    const Config *c = &m->config;
    int limit = 3 * m->tensor_count + 3 * c->layers * c->experts;
    Part *list = (Part *)allocate(limit, sizeof(Part));
    *count = 0;
    for (int i = 0; i < base_tensors(m); i++) { // pairs go elsewhere: dev/adapter.h
        add_parts(c, &m->tensors[i], i, k, list, count);
    }
    return list;
}

// All weights as this model is written.
Part *model_parts(const Model *m, int *count) {
    return parts_of_class(m, class_of(&m->config), count);
}

// All weights as the files have them from which the model is read.
Part *parts_to_read(const Model *m, int *count) {
    int as = m->config.read_as;
    return as ? parts_of_class(m, as - 2 < 0 ? -1 : as - 2, count) : model_parts(m, count);
}

// Reads a part under its own name or under its other one. Returns 0 where the file has neither.
int find_part(const Safetensors *s, const char *prefix, const Part *p, real *to) {
    char name[160];
    snprintf(name, sizeof(name), "%s%s", prefix, p->name);
    if (read_tensor(s, name, p, p->rows, 0, to)) {
        return 1;
    }
    snprintf(name, sizeof(name), "%s%s", prefix, p->other);
    return p->other[0] ? read_tensor(s, name, p, p->all, p->first, to) : 0;
}

// Reads a part, under prefix, from whichever file has it, and returns that file's path.
const char *read_part(const WeightFiles *files, const char *prefix, const Part *p, real *to) {
    char name[160];
    const char *found = NULL;
    snprintf(name, sizeof(name), "%s%s", prefix, p->name);
    for (int i = 0; i < files->count && !found; i++) {
        found = find_part(&files->list[i], prefix, p, to) ? files->list[i].path : NULL;
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
void check_both_names(const Table *seen, const WeightFiles *files, const char *name, const char *other) {
    int64_t first = table_get(seen, name, strlen(name)) - 2, second = table_get(seen, other, strlen(other)) - 2;
    if (first >= 0 && second >= 0) {
        fail("%s: %s is there twice, in %s as %s; remove the one that is old", files->list[first].path, name,
             files->list[second].path, other);
    }
}

// Ends the program where the files have a tensor that is no part of the model: what it does there would be lost.
void check_tensors(const WeightFiles *files, const Config *c, const Part *parts, int count, const char *const *prefix,
                   int copies) {
    Table asked;
    char name[160], other[160];
    memset(&asked, 0, sizeof(asked));
    for (int i = 0; i < copies * count; i++) {
        const Part *p = &parts[i % count];
        int n = snprintf(name, sizeof(name), "%s%s", prefix[i / count], p->name);
        *table_put(&asked, name, (size_t)n) = 1;
        n = snprintf(other, sizeof(other), "%s%s", prefix[i / count], p->other);
        if (p->other[0]) {
            *table_put(&asked, other, (size_t)n) = 1;
        }
    }
    for (int i = 0; i < files->count; i++) {
        const Safetensors *s = &files->list[i];
        for (const Json *t = s->header->child; t; t = t->next) {
            if (!strcmp(t->key, "__metadata__") || is_idle_tensor(t->key, c->untied)) {
                continue;
            }
            if (!table_get(&asked, t->key, strlen(t->key))) {
                fail("%s: %s is no tensor of the model that config.json describes (%d layers, %s biases, %s norms of "
                     "queries and keys), and without it this would be another model",
                     s->path, t->key, c->layers, c->qkv_bias ? "with" : "no", c->qk_norm ? "with" : "no");
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
        snprintf(other, sizeof(other), "%s%s", prefix[i / count], parts[i % count].other);
        if (parts[i % count].other[0]) {
            check_both_names(&asked, files, name, other);
        }
    }
    const char *const embed = "model.embed_tokens.weight";
    if (c->untied && table_get(&asked, embed, strlen(embed)) == 1) {
        fail("%s: there is no %s, which config.json asks for", files->path, embed);
    }
    table_free(&asked);
}

// ---- config.json

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

// What class k's config.json says besides the fields that are options.
void write_class_fields(FILE *f, const Config *c, int k) {
    char number[64];
    write_rope(f, c);
    if (k < 0) {
        return;
    }
    if (model_classes[k].experts != NO_LAYERS) { // transformers' balance loss is K at balance, ours 1
        fprintf(f, "  \"router_aux_loss_coef\": %s,\n", number_text(c->aux_weight / c->topk, number));
    }
    if (model_classes[k].experts == SOME_LAYERS) {
        write_layers(f, c);
    }
    if (k == MISTRAL) { // which has one where it says nothing
        fprintf(f, "  \"sliding_window\": null,\n");
    }
    if (model_classes[k].names == GRANITE_NAMES) {
        write_factors(f, c);
    }
}

void write_config(const char *dir, const Config *c, int bos, int eos) {
    int k = class_of(c);
    FILE *f = open_for_writing(dir, "config.json");
    fprintf(f, "{\n  \"architectures\": [\"%s\"],\n", k < 0 ? "TrainMoeForCausalLM" : model_classes[k].name);
    fprintf(f, "  \"model_type\": \"%s\",\n", k < 0 ? "train_moe" : model_classes[k].type);
    if (k < 0) {
        fprintf(f, "  \"comment\": \"no class of transformers computes this model; the object train_moe says what it "
                   "computes\",\n");
    }
    fprintf(f, "  \"vocab_size\": %d,\n", c->vocab);
    write_fields(f, c, k < 0 ? OURS : k);
    fprintf(f, "  \"hidden_act\": \"%s\",\n", act_name(c));
    write_class_fields(f, c, k);
    fprintf(f, "  \"bos_token_id\": %d,\n  \"eos_token_id\": %d,\n", bos, eos);
    const char *type = sizeof(real) == 8 ? "float64" : "float32";
    fprintf(f, "  \"dtype\": \"%s\",\n  \"torch_dtype\": \"%s\",\n", type, type); // the newer and the older name
    fprintf(f, "  \"train_moe\": {");
    write_options(f, c);
    write_scheme(f, c);
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
    const Json *type = json_get(json, "model_type");
    int k = type && type->type == 's' ? find_class(type->text) : -1;
    double vocab = k < 0 ? 32000 : model_classes[k].vocab; // where the file says nothing
    if (json_get(json, "vocab_size") || !type) {
        vocab = expect_member(json, "vocab_size", 'i', path)->number;
    }
    if (!(vocab >= 1 && vocab <= 1 << 24)) {
        fail("%s: vocab_size %.15g is not possible", path, vocab);
    }
    c->vocab = (int)vocab;
    type = expect_member(json, "model_type", 's', path);
    int own = json_get(json, "train_moe") != NULL;
    c->optimizer = ADAMW; // as older checkpoints have, which do not say it
    if (own) {
        read_options(c, expect_member(json, "train_moe", 'o', path), path);
        find_recipe(c->recipe);
    }
    int window = config_from_hugging_face(c, json, type->text, path, own);
    read_scheme(c, json, path);
    check_weight_files(dir, "model.safetensors");
    int adapter = has_file(dir, "adapter_config.json") || has_file(dir, "adapter_model.safetensors");
    if (!c->untied && !adapter) { // which has no output; its base had one
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
