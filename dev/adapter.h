// Adapters as files: what --lora trains is saved without its base, found again, and merged into it by --merge.
// Gives: is_adapter, write_adapter, load_adapter, begin_adapter, describe_adapter, merge_adapter.
// Needs: dev/lora_tensors.h, data/checkpoint.h, the writing and reading of dev/save.h, which includes it; Run of dev/run.h.
//
// A checkpoint of such a run has adapter_config.json and adapter_model.safetensors in place of model.safetensors, in the
// format of Hugging Face's PEFT (peft/tuners/lora, version 0.21). Attention, dense layers and shared experts are modules
// there, each with lora_A (r,I) and lora_B (O,r). The experts of a layer are one parameter (E,O,I), as in transformers 5,
// of which PEFT stores A as (E*r, I), expert after expert, and B as (O, r*E), where column j*E + e is column j of expert e's B.
// A second parameter of the same module is wrapped around the first: so w_in is called experts.base_layer, and w_out experts.
//
// The base is named by its path, and by a fingerprint of its numbers: the adapter means nothing beside other ones.
#pragma once
#include "lora_tensors.h"

#define ADAPTER_CONFIG  "adapter_config.json"
#define ADAPTER_WEIGHTS "adapter_model.safetensors"
#define WHOLE_PREFIX    "weight." // prefix of the pairs beside the optimizer's moments, where the adapter's file has them divided

int is_adapter(const char *dir) {
    return has_file(dir, ADAPTER_CONFIG) || has_file(dir, ADAPTER_WEIGHTS);
}

// ---- names and orders in the file

// How the base's class calls what belongs to experts: one of the enum of data/model_classes.h.
int names_of_base(const Config *c) {
    int k = class_of(c);
    return k < 0 ? OUR_NAMES : model_classes[k].names;
}

// A Granite's shared experts have gate and up in one module.
int is_joined(const Config *c, int l) {
    return is_moe(c, l) && names_of_base(c) == GRANITE_NAMES;
}

// PEFT's name of the module, or the parameter, that block `block` of a matrix is. transformers 5 calls experts alike in all classes.
void module_name(char name[40], const Config *c, const Tensor *t, int block) {
    static const char *const qkv[] = {"q_proj", "k_proj", "v_proj"}, *const dense[] = {"gate_proj", "up_proj"};
    static const char *const shared[] = {"mlp.shared_experts.", "mlp.shared_expert.", "shared_mlp."};
    int names = names_of_base(c), granite = names == GRANITE_NAMES, ungated = !is_gated(dense_activation(c, t->layer));
    const char *feed = is_moe(c, t->layer) ? shared[names] : "mlp.", *mixture = granite ? "block_sparse_moe" : "mlp";
    if (!strcmp(t->kind, "qkv")) {
        snprintf(name, 40, "self_attn.%s", qkv[block]);
    } else if (!strcmp(t->kind, "proj")) {
        snprintf(name, 40, "self_attn.o_proj");
    } else if (!strcmp(t->kind, "router")) {
        snprintf(name, 40, "%s.%s", mixture, granite ? "router" : "gate");
    } else if (!strncmp(t->kind, "w_", 2)) {
        snprintf(name, 40, "%s.experts%s", mixture, strcmp(t->kind, "w_in") ? "" : ".base_layer");
    } else if (!strcmp(t->kind, "dense_in")) {
        snprintf(name, 40, "%s%s", feed, granite ? "input_linear" : dense[block + ungated]);
    } else {
        snprintf(name, 40, "%s%s", feed, granite ? "output_linear" : "down_proj");
    }
}

// All of an adapter's numbers, in the order of the table: as PEFT has them, or with `whole` each tensor as it is in memory.
Part *adapter_parts(const Model *m, int whole, int *count) {
    const Config *c = &m->config;
    Part *list = (Part *)allocate(3 * (size_t)m->tensor_count, sizeof(Part));
    *count = 0;
    for (int i = 0; i < base_tensors(m); i++) {
        const Tensor *matrix = &m->tensors[i];
        int a = find_pair(m, i), heights[3];
        int blocks = a < 0 ? 0 : pair_blocks(c, matrix, heights);
        for (int k = a; blocks && k < a + 2; k++) {
            const Tensor *t = &m->tensors[k];
            int E = t->shape[0], is_b = k > a, rows = E * t->shape[1], pieces = whole ? 1 : blocks;
            size_t offset = 0;
            for (int block = 0; block < pieces; block++) {
                Part *part = &list[(*count)++];
                char module[40];
                part->tensor = k;
                part->offset = offset;
                part->rows = rows / pieces;
                part->cols = t->shape[2];
                if (whole) {
                    snprintf(part->name, sizeof(part->name), "%s", t->name);
                    continue;
                }
                if (is_b) {
                    part->rows = blocks == 1 ? t->shape[1] : heights[block];
                    part->cols = E * t->shape[2];
                }
                module_name(module, c, matrix, block);
                snprintf(part->name, sizeof(part->name), "base_model.model.model.layers.%d.%s.lora_%c.weight", t->layer, module,
                         is_b ? 'B' : 'A');
                offset += part_size(part);
            }
        }
    }
    return list;
}

// Some factors of a Granite are folded into the weights when they are read (data/granite.h), and what a pair adds is folded with
// them. In the file B is beside the base as it is, so it is divided by the factor: this one of part p of tensor t.
double folded(const Config *c, const Tensor *t, const Part *p) {
    if (c->fold_embedding == 0 || !strstr(t->kind, ".lora_B")) {
        return 1;
    }
    if (!strncmp(t->kind, "qkv.", 4)) {
        return p->offset == 0 ? c->fold_queries : 1;
    }
    int to_stream = !strncmp(t->kind, "proj.", 5) || !strncmp(t->kind, "w_out.", 6) || !strncmp(t->kind, "dense_out.", 10);
    return to_stream ? c->fold_residual : 1;
}

// The numbers of tensor t of all experts, from memory's order (E,O,r) to the file's (O, r*E), or back. Only B has
// another order there.
void reorder(const Tensor *t, real *to, const real *from, int to_file) {
    int E = t->shape[0], O = t->shape[1], r = t->shape[2], changes = E > 1 && strstr(t->kind, ".lora_B");
    if (!changes) {
        memcpy(to, from, t->whole * sizeof(real));
        return;
    }
    for (int e = 0; e < E; e++) {
        for (int o = 0; o < O; o++) {
            for (int j = 0; j < r; j++) {
                size_t memory = ((size_t)e * O + o) * r + j, file = (size_t)o * r * E + (size_t)j * E + e;
                to[to_file ? file : memory] = from[to_file ? memory : file];
            }
        }
    }
}

// ---- the base

// What tells this base from others: a checksum of all its numbers, as floats, in the order of the table.
uint64_t base_fingerprint(Run *run) {
    Model *m = run->model;
    real *numbers = allocate_tensor(m);
    uint64_t sum = 0;
    for (int i = 0; i < base_tensors(m); i++) {
        size_t n = m->tensors[i].whole;
        run->backend->read(m, WEIGHTS, i, numbers);
        float *as_float = (float *)numbers; // in place: a float is no longer than a real
        for (size_t j = 0; sizeof(real) > sizeof(float) && j < n; j++) {
            float number = (float)numbers[j];
            memcpy(&as_float[j], &number, sizeof(number));
        }
        sum = hash64(sum ^ checksum_of(numbers, n * sizeof(float)));
    }
    free(numbers);
    return sum;
}

// A new run's pairs, after the base has been read from --init.
void begin_adapter(Run *run) {
    Model *m = run->model;
    if (!run->config.lora) {
        return;
    }
    if (!realpath(run->config.init, run->base)) {
        fail("%s: cannot find its place: %s", run->config.init, strerror(errno));
    }
    run->base_print = base_fingerprint(run);
    real *numbers = allocate_tensor(m);
    for (int i = base_tensors(m); i < m->tensor_count; i++) {
        first_pair_numbers(m, i, numbers);
        run->backend->write(m, WEIGHTS, i, numbers);
    }
    free(numbers);
}

// ---- writing

// A file of the pairs' numbers: each of the arrays in `what`, under its prefix. whole: as in adapter_parts().
void write_pairs(const Run *run, const char *name, int whole, const int *what, const char *const *prefix, int arrays,
                 FILE *sums) {
    Model *m = run->model;
    const char *dir = unfinished_path;
    int count;
    Part *parts = adapter_parts(m, whole, &count);
    FILE *file = start_safetensors(dir, name, parts, count, prefix, arrays, sums);
    real *memory = allocate_tensor(m), *numbers = allocate_tensor(m);
    for (int array = 0; array < arrays; array++) {
        int last = -1;
        for (int k = 0; k < count; k++) {
            const Part *p = &parts[k];
            const Tensor *t = &m->tensors[p->tensor];
            if (p->tensor != last) {
                run->backend->read(m, what[array], p->tensor, memory);
                refuse_to_save(run, what[array], p->tensor, memory, t->whole);
                if (whole) {
                    memcpy(numbers, memory, t->whole * sizeof(real));
                } else {
                    reorder(t, numbers, memory, 1);
                }
                last = p->tensor;
            }
            multiply_numbers(numbers + p->offset, part_size(p), whole ? 1 : 1 / folded(&m->config, t, p));
            write_numbers(file, dir, name, numbers + p->offset, part_size(p));
            write_tensor_checksum(sums, array + k == 0, prefix[array], p->name, numbers + p->offset,
                                  part_size(p) * sizeof(real));
        }
    }
    end_checksums(sums);
    close_written(file, dir, name);
    free(memory);
    free(numbers);
    free(parts);
}

// Writes the names of target modules, or of target parameters, each once.
void write_targets(FILE *f, const Model *m, int parameters) {
    const Config *c = &m->config;
    char seen[2048] = ",", module[40], word[96];
    int heights[3];
    for (int i = 0; i < base_tensors(m); i++) {
        const Tensor *t = &m->tensors[i];
        int blocks = find_pair(m, i) < 0 ? 0 : pair_blocks(c, t, heights);
        int is_parameter = !strcmp(t->kind, "router") || t->of_experts;
        for (int block = 0; block < blocks && is_parameter == parameters; block++) {
            module_name(module, c, t, block);
            const char *last = strrchr(module, '.') + 1;
            if (!strcmp(t->kind, "router")) {
                snprintf(word, sizeof(word), ",%s.weight,", module);
            } else if (t->of_experts) {
                const char *end = strcmp(t->kind, "w_in") ? "down_proj" : "gate_up_proj";
                snprintf(word, sizeof(word), ",%.*sexperts.%s,", (int)strcspn(module, ".") + 1, module, end);
            } else {
                snprintf(word, sizeof(word), ",%s,", last);
            }
            if (!strstr(seen, word)) {
                fprintf(f, "%s\"%.*s\"", seen[1] ? ", " : "", (int)strlen(word) - 2, word + 1);
                strncat(seen, word + 1, sizeof(seen) - strlen(seen) - 1);
            }
        }
    }
}

// adapter_config.json. auto_mapping is the one object that PEFT leaves to others, so the fingerprint stands there.
void write_adapter_config(const Run *run, const char *dir) {
    const Config *c = &run->config;
    const char *name = matching_class(c);
    char number[64];
    FILE *f = open_for_writing(dir, ADAPTER_CONFIG);
    fprintf(f, "{\n  \"peft_type\": \"LORA\",\n  \"task_type\": \"CAUSAL_LM\",\n  \"base_model_name_or_path\": ");
    json_write_string(f, run->base, strlen(run->base));
    fprintf(f, ",\n  \"r\": %d,\n  \"lora_alpha\": %s,\n", c->lora, number_text(c->lora_alpha, number));
    fprintf(f, "  \"target_modules\": [");
    write_targets(f, run->model, 0);
    fprintf(f, "],\n  \"target_parameters\": [");
    write_targets(f, run->model, 1);
    fprintf(f, "],\n  \"lora_dropout\": 0.0,\n  \"bias\": \"none\",\n  \"fan_in_fan_out\": false,\n"
               "  \"use_rslora\": false,\n  \"use_dora\": false,\n  \"inference_mode\": true,\n");
    fprintf(f, "  \"auto_mapping\": {\"parent_library\": \"%s\", \"base_model_class\": \"%s\",\n",
            *name ? "transformers" : "train_moe", *name ? name : "TrainMoeForCausalLM");
    if (!*name) {
        fprintf(f, "    \"comment\": \"no class of transformers computes the base; names are in the manner of its classes\",\n");
    }
    fprintf(f, "    \"base_fingerprint\": \"%016llx\"}\n}\n", (unsigned long long)run->base_print);
    close_written(f, dir, ADAPTER_CONFIG);
}

// The adapter, and its moments, into the unfinished checkpoint.
void write_adapter(const Run *run, FILE *sums) {
    const int weights[] = {WEIGHTS}, kept[] = {MOMENT1, MOMENT2, WEIGHTS};
    const char *const plain[] = {""}, *const kept_names[] = {"exp_avg.", "exp_avg_sq.", WHOLE_PREFIX};
    int folds = run->config.fold_embedding != 0; // what was divided is not the same number when it is multiplied again
    write_pairs(run, ADAPTER_WEIGHTS, 0, weights, plain, 1, sums);
    write_pairs(run, "optimizer.safetensors", 1, kept, kept_names, 2 + folds, sums);
    write_adapter_config(run, unfinished_path);
}

// ---- reading

// Ends the program where the file has a tensor that no pair of the run takes: what it does would be lost.
void refuse_more_pairs(const WeightFiles *files, const Part *parts, int count) {
    for (const Json *t = files->list[0].header->child; t; t = t->next) {
        int known = !strcmp(t->key, "__metadata__");
        for (int k = 0; k < count && !known; k++) {
            known = !strcmp(t->key, parts[k].name);
        }
        if (!known) {
            fail("%s: %s is no pair of this adapter, whose config.json says --lora-targets and --lora", files->path, t->key);
        }
    }
}

// One array of all pairs, from the file `name` in dir.
void read_pairs(Run *run, const char *dir, const char *name, int whole, int what, const char *prefix) {
    Model *m = run->model;
    int count;
    Part *parts = adapter_parts(m, whole, &count);
    real *numbers = allocate_tensor(m), *memory = allocate_tensor(m);
    WeightFiles files;
    open_weights(&files, dir, name, 1);
    for (int k = 0; k < count; k++) {
        const Part *p = &parts[k];
        char full[160];
        snprintf(full, sizeof(full), "%s%s", prefix, p->name);
        if (!read_tensor(&files.list[0], full, p, p->rows, 0, numbers + p->offset)) {
            fail("%s: there is no %s, which the adapter's config.json asks for", files.path, full);
        }
        check_read(files.path, prefix, p, numbers + p->offset);
        multiply_numbers(numbers + p->offset, part_size(p), whole ? 1 : folded(&m->config, &m->tensors[p->tensor], p));
        int complete = k + 1 == count || parts[k + 1].tensor != p->tensor;
        if (complete && !whole) {
            reorder(&m->tensors[p->tensor], memory, numbers, 0);
        }
        for (size_t j = 0; whole && j < part_size(p); j++) {
            memory[j] = are_moments(what) && run->config.moments == MOMENTS_BF16 ? (real)nearest_bf16((float)numbers[j]) : numbers[j];
        }
        if (complete) {
            run->backend->write(m, what, p->tensor, memory);
        }
    }
    if (!whole) {
        refuse_more_pairs(&files, parts, count);
    }
    close_weights(&files);
    free(numbers);
    free(memory);
    free(parts);
}

// The base that an adapter names, and its fingerprint.
void find_base(Run *run, const char *dir) {
    char path[4200];
    size_t size;
    snprintf(path, sizeof(path), "%s/%s", dir, ADAPTER_CONFIG);
    char *text = read_file(path, &size);
    Json *json = json_parse(text, size, path);
    const Json *base = expect_member(json, "base_model_name_or_path", 's', path);
    const Json *print = expect_member(expect_member(json, "auto_mapping", 'o', path), "base_fingerprint", 's', path);
    double rank = expect_member(json, "r", 'i', path)->number, alpha = expect_member(json, "lora_alpha", 'n', path)->number;
    if (rank != run->config.lora || alpha != run->config.lora_alpha) {
        fail("%s: r is %g and lora_alpha %g, but config.json beside it says %d and %g; one of the two files was changed",
             path, rank, alpha, run->config.lora, run->config.lora_alpha);
    }
    snprintf(run->base, sizeof(run->base), "%s", base->text);
    run->base_print = strtoull(print->text, NULL, 16);
    if (!has_file(run->base, "config.json")) {
        fail("%s: its base_model_name_or_path is %s, and no model is there; put it back, or write there where the model is now",
             path, run->base);
    }
    if (is_adapter(run->base)) {
        fail("%s: its base_model_name_or_path is %s, which is an adapter, too; write there where the whole model is", path, run->base);
    }
    json_free(json);
    free(text);
}

// What the base's own config.json says of how its files are to be read: the run's does not know it.
void read_as_base(Run *run) {
    Config base;
    Config *both[] = {&run->config, &run->model->config};
    config_from_directory(&base, run->base);
    for (int i = 0; i < 2; i++) {
        both[i]->read_as = base.read_as;
        both[i]->fold_embedding = base.fold_embedding;
        both[i]->fold_queries = base.fold_queries;
        both[i]->fold_residual = base.fold_residual;
        both[i]->fold_logits = base.fold_logits;
    }
}

// The base and the adapter in dir, with `moments` those of the optimizer, too.
void load_adapter(Run *run, const char *dir, int moments) {
    find_base(run, dir);
    read_as_base(run);
    load_weights(run, run->base, 0);
    uint64_t found = base_fingerprint(run);
    if (found != run->base_print) {
        fail("%s: it was trained beside a base with the fingerprint %016llx, and the model in %s has %016llx: put back the one "
             "that it was, or train a new adapter beside this one",
             dir, (unsigned long long)run->base_print, run->base, (unsigned long long)found);
    }
    read_pairs(run, dir, ADAPTER_WEIGHTS, 0, WEIGHTS, "");
    if (moments) {
        read_pairs(run, dir, "optimizer.safetensors", 1, MOMENT1, "exp_avg.");
        read_pairs(run, dir, "optimizer.safetensors", 1, MOMENT2, "exp_avg_sq.");
        if (run->config.fold_embedding != 0) {
            read_pairs(run, dir, "optimizer.safetensors", 1, WEIGHTS, WHOLE_PREFIX);
        }
    }
}

// ---- what is said of it

// Numbers in the pairs.
double pair_numbers(const Model *m) {
    double sum = 0;
    for (int i = base_tensors(m); i < m->tensor_count; i++) {
        sum += (double)m->tensors[i].whole;
    }
    return sum;
}

void describe_adapter(const Run *run, double total) {
    const Config *c = &run->config;
    if (c->lora) {
        double trained = pair_numbers(run->model);
        printf("%.3f million more are trained, in pairs of rank %d beside %s: %.2f%%; the base, %s, is frozen\n", trained / 1e6,
               c->lora, c->lora_targets, 100 * trained / total, run->base);
        const char *slash = strrchr(run->base, '/');
        if (slash && checkpoint_step(slash + 1) >= 0) {
            printf("the adapter needs that checkpoint: if its run goes on, it removes the old ones but for --keep, so copy it before\n");
        }
    }
}

// ---- --merge

// Each matrix W becomes W + s B A.
void merge_pairs(Run *run) {
    Model *m = run->model;
    const Config *c = &m->config;
    real *w = allocate_tensor(m), *a = allocate_tensor(m), *b = allocate_tensor(m);
    for (int i = 0; i < base_tensors(m); i++) {
        const Tensor *t = &m->tensors[i];
        int k = find_pair(m, i), heights[3], E = t->shape[0], O = t->shape[1], I = t->shape[2], r = c->lora;
        if (k < 0) {
            continue;
        }
        int blocks = pair_blocks(c, t, heights);
        run->backend->read(m, WEIGHTS, i, w);
        run->backend->read(m, WEIGHTS, k, a);
        run->backend->read(m, WEIGHTS, k + 1, b);
        scale_numbers(b, m->tensors[k + 1].whole, (real)(c->lora_alpha / r));
        size_t row = 0; // of W, of all experts
        for (int e = 0; e < E * blocks; e++) {
            int height = blocks == 1 ? O : heights[e];
            matmul_dx(w + row * (size_t)I, b + row * (size_t)r, a + (size_t)e * r * I, height, I, r, ADD);
            row += (size_t)height;
        }
        run->backend->write(m, WEIGHTS, i, w);
    }
    free(w);
    free(a);
    free(b);
}

// ./train_moe --out RUN --merge DIR: the model in run->model, which has been read from the adapter `from`, becomes a model of its
// own.
void merge_adapter(Run *run, const char *from, const char *dir) {
    int weights[] = {WEIGHTS};
    const char *const plain[] = {""};
    NewModel n;
    merge_pairs(run);
    begin_new_model(&n, dir);
    write_tensors(run, "model.safetensors", weights, plain, 1, n.sums);
    run->config.lora = 0;
    end_new_model(&n, run, run->base);
    printf("%s and its base %s are one model now: %s\n", from, run->base, dir);
}
