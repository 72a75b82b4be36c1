// The classes of Hugging Face's transformers: directories of each, written here by hand, are read as what they are;
// what is written back has the same tensors under the same names; what cannot be computed is refused by its name.
// dev/test/check_hf.py has transformers itself make such directories, and compares losses.
//
// Every number of a file follows from its tensor's name and its place there, in steps of 1/64 below 1, which all
// formats hold exactly.

#include "dev/test/trainer.h"
#include "dev/test/model.h"

// ---------------------------------------------------------------------------------------------------------------------
// The directories

enum { V = 11, C = 8, H = 2, KV = 1, F = 6, S = 10, W = 14, E = 3, L = 3 }; // S: shared, W: dense layers between

typedef struct Class {
    const char *type, *name, *fields; // fields: those besides the common ones
    int D, norms, biases, dense;      // norms: width of q_norm's vector over D; dense: layers 0 .. dense-1 have no experts
    const char *router, *gate, *up, *down, *all_in, *all_out;
    const char *shared_in[2], *shared_out, *shared_gate;
    double m, q, r, s;                // what must be folded into weights
} Class;

#define QWEN "mlp.gate", "mlp.experts.%d.gate_proj", "mlp.experts.%d.up_proj", "mlp.experts.%d.down_proj", NULL, NULL
#define PACKED "block_sparse_moe.router.layer", NULL, NULL, NULL, "block_sparse_moe.input_linear", "block_sparse_moe.output_linear"
#define NONE NULL, NULL, NULL, NULL, NULL, NULL, {NULL, NULL}, NULL, NULL, 1, 1, 1, 1
#define MULTIPLIERS "\"embedding_multiplier\": 2, \"attention_multiplier\": 2.0, \"residual_multiplier\": 0.5, \"logits_scaling\": 8, "

const Class classes[] = {
    {"mixtral", "MixtralForCausalLM", "\"num_local_experts\": 3, \"num_experts_per_tok\": 2, \"intermediate_size\": 6, ", 4, 0, 0, 0,
     "block_sparse_moe.gate", "block_sparse_moe.experts.%d.w1", "block_sparse_moe.experts.%d.w3", "block_sparse_moe.experts.%d.w2", NULL,
     NULL, {NULL, NULL}, NULL, NULL, 1, 1, 1, 1},
    {"llama", "LlamaForCausalLM",
     "\"intermediate_size\": 14, \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 1, \"high_freq_factor\": "
     "4, \"original_max_position_embeddings\": 64}, ",
     4, 0, 0, L, NONE},
    {"mistral", "MistralForCausalLM", "\"intermediate_size\": 14, \"head_dim\": 6, ", 6, 0, 0, L, NONE},
    {"qwen2", "Qwen2ForCausalLM", "\"intermediate_size\": 14, ", 4, 0, 1, L, NONE},
    {"qwen3", "Qwen3ForCausalLM", "\"intermediate_size\": 14, \"head_dim\": 6, ", 6, 1, 0, L, NONE},
    {"qwen2_moe", "Qwen2MoeForCausalLM",
     "\"num_experts\": 3, \"num_experts_per_tok\": 2, \"moe_intermediate_size\": 6, \"shared_expert_intermediate_size\": 10, "
     "\"intermediate_size\": 14, \"mlp_only_layers\": [0], ",
     4, 0, 1, 1, QWEN, {"mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"}, "mlp.shared_expert.down_proj",
     "mlp.shared_expert_gate", 1, 1, 1, 1},
    {"qwen3_moe", "Qwen3MoeForCausalLM",
     "\"num_experts\": 3, \"num_experts_per_tok\": 2, \"moe_intermediate_size\": 6, \"head_dim\": 6, \"norm_topk_prob\": true, "
     "\"intermediate_size\": 14, \"mlp_only_layers\": [0, 1], ",
     6, 1, 0, 2, QWEN, {NULL, NULL}, NULL, NULL, 1, 1, 1, 1},
    {"olmoe", "OlmoeForCausalLM", "\"num_experts\": 3, \"num_experts_per_tok\": 2, \"intermediate_size\": 6, ", 4, 2, 0, 0, QWEN,
     {NULL, NULL}, NULL, NULL, 1, 1, 1, 1},
    {"granitemoe", "GraniteMoeForCausalLM",
     "\"num_local_experts\": 3, \"num_experts_per_tok\": 2, \"intermediate_size\": 6, " MULTIPLIERS, 4, 0, 0, 0, PACKED, {NULL, NULL}, NULL,
     NULL, 2, 4, 0.5, 8},
    {"granitemoeshared", "GraniteMoeSharedForCausalLM",
     "\"num_local_experts\": 3, \"num_experts_per_tok\": 2, \"intermediate_size\": 6, \"shared_intermediate_size\": 10, " MULTIPLIERS, 4, 0,
     0, 0, PACKED, {"shared_mlp.input_linear", NULL}, "shared_mlp.output_linear", NULL, 2, 4, 0.5, 8},
};

// A tensor of a file, and where its numbers belong: rows from `first` on of layer `layer`'s tensor `kind`.
typedef struct FilePiece {
    char name[96];
    int layer, experts, rows, cols, first; // experts 0: two dimensions; rows 0: one
    const char *kind;
    double by; // what its numbers are multiplied by when they are read
} FilePiece;

FilePiece pieces[128];
int piece_count;
int fused; // 1: transformers 5 has stored all experts of a layer in two tensors

void piece(int layer, const char *kind, const char *name, const char *end, int rows, int cols, int first, double by) {
    FilePiece *p = &pieces[piece_count++];
    memset(p, 0, sizeof(*p));
    snprintf(p->name, sizeof(p->name), layer < 0 ? "%.0d%s%s" : "model.layers.%d.%s%s", max_int(layer, 0), name, end);
    p->layer = layer;
    p->kind = kind;
    p->rows = rows;
    p->cols = cols;
    p->first = first;
    p->by = by;
}

void list_attention(const Class *k, int l) {
    int D = k->D, first[] = {0, H * D, (H + KV) * D}, rows[] = {H * D, KV * D, KV * D};
    const char *const names[] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"};
    for (int i = 0; i < 3; i++) {
        piece(l, "qkv", names[i], ".weight", rows[i], C, first[i], i ? 1 : k->q);
        if (k->biases) {
            piece(l, "qkv_bias", names[i], ".bias", 0, rows[i], first[i], 1);
        }
    }
    if (k->norms) {
        piece(l, "q_norm", "self_attn.q_norm", ".weight", 0, k->norms == 2 ? H * D : D, 0, 1);
        piece(l, "k_norm", "self_attn.k_norm", ".weight", 0, k->norms == 2 ? KV * D : D, 0, 1);
    }
    piece(l, "proj", "self_attn.o_proj", ".weight", C, H * D, 0, k->r);
}

void list_experts(const Class *k, int l) {
    char name[96];
    int apart = !k->all_in && !fused;
    piece(l, "router", fused ? "mlp.gate" : k->router, ".weight", E, C, 0, 1);
    if (!apart) {
        piece(l, "w_in", fused ? "mlp.experts.gate_up_proj" : k->all_in, fused ? "" : ".weight", 2 * F, C, 0, 1);
        pieces[piece_count - 1].experts = E;
        piece(l, "w_out", fused ? "mlp.experts.down_proj" : k->all_out, fused ? "" : ".weight", C, F, 0, k->r);
        pieces[piece_count - 1].experts = E;
    }
    for (int e = 0; e < E && apart; e++) {
        snprintf(name, sizeof(name), k->gate, e);
        piece(l, "w_in", name, ".weight", F, C, e * 2 * F, 1);
        snprintf(name, sizeof(name), k->up, e);
        piece(l, "w_in", name, ".weight", F, C, e * 2 * F + F, 1);
        snprintf(name, sizeof(name), k->down, e);
        piece(l, "w_out", name, ".weight", C, F, e * C, 1);
    }
    for (int i = 0; i < 2 && k->shared_in[i]; i++) {
        piece(l, "dense_in", k->shared_in[i], ".weight", k->shared_in[1] ? S : 2 * S, C, i * S, 1);
    }
    if (k->shared_out) {
        piece(l, "dense_out", k->shared_out, ".weight", C, S, 0, k->r);
    }
    if (k->shared_gate) {
        piece(l, "shared_router", k->shared_gate, ".weight", 1, C, 0, 1);
    }
}

void list_pieces(const Class *k, int untied) {
    piece_count = 0;
    piece(-1, "embed", "model.embed_tokens", ".weight", V, C, 0, k->m);
    for (int l = 0; l < L; l++) {
        piece(l, "norm1", "input_layernorm", ".weight", 0, C, 0, 1);
        list_attention(k, l);
        piece(l, "norm2", "post_attention_layernorm", ".weight", 0, C, 0, 1);
        if (l >= k->dense) {
            list_experts(k, l);
            continue;
        }
        piece(l, "dense_in", "mlp.gate_proj", ".weight", W, C, 0, 1);
        piece(l, "dense_in", "mlp.up_proj", ".weight", W, C, W, 1);
        piece(l, "dense_out", "mlp.down_proj", ".weight", C, W, 0, 1);
    }
    piece(-1, "norm", "model.norm", ".weight", 0, C, 0, 1 / k->s / (untied ? 1 : k->m));
    if (untied) {
        piece(-1, "head", "lm_head", ".weight", V, C, 0, 1);
    }
}

size_t piece_size(const FilePiece *p) {
    return (size_t)max_int(1, p->experts) * (size_t)max_int(1, p->rows) * (size_t)p->cols;
}

float number_of(const char *name, size_t i) {
    uint64_t h = 1;
    for (const char *c = name; *c; c++)
        h = hash64(h ^ (uint64_t)(unsigned char)*c);
    return (float)((int)(hash64(h + i) % 127) - 63) / 64;
}

// Writes config.json, with `more` in front of the class's own fields, and the pieces in numbers of 4 or 2 bytes; drop:
// not this one.
void put_class(const char *dir, const Class *k, int untied, int bytes, const char *more, const char *drop) {
    char path[128], *data = NULL;
    size_t size = 0, at = 0;
    mkdir(scratch_file(dir), 0777);
    FILE *file = open_memstream(&data, &size);
    fprintf(file, "{\"model_type\": \"%s\", \"vocab_size\": %d, \"hidden_size\": %d, \"num_hidden_layers\": %d, %s %s", k->type, V, C, L,
            more, k->fields);
    fprintf(file, "\"num_attention_heads\": %d, \"num_key_value_heads\": %d, \"max_position_embeddings\": 16, \"rms_norm_eps\": 1e-5, "
                  "\"rope_theta\": 500, \"tie_word_embeddings\": %s}", H, KV, untied ? "false" : "true");
    fclose(file);
    snprintf(path, sizeof(path), "%s/config.json", dir);
    put_file(path, data, size);
    free(data);
    list_pieces(k, untied);
    file = open_memstream(&data, &size);
    for (int i = 0; i < piece_count; i++) {
        const FilePiece *p = &pieces[i];
        size_t next = at + piece_size(p) * (size_t)bytes;
        if (drop && !strcmp(drop, p->name))
            continue;
        fprintf(file, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", at ? "," : "{", p->name, bytes == 4 ? "F32" : "BF16");
        if (p->experts)
            fprintf(file, "%d,", p->experts);
        if (p->rows)
            fprintf(file, "%d,", p->rows);
        fprintf(file, "%d],\"data_offsets\":[%zu,%zu]}", p->cols, at, next);
        at = next;
    }
    fprintf(file, "}");
    fflush(file);
    uint64_t length = size;
    for (int i = 0; i < piece_count; i++) {
        for (size_t j = 0; j < piece_size(&pieces[i]) && !(drop && !strcmp(drop, pieces[i].name)); j++) {
            char number[4];
            float x = number_of(pieces[i].name, j);
            memcpy(number, &x, 4);
            fwrite(number + 4 - bytes, 1, (size_t)bytes, file); // bfloat16 is a float's upper half
        }
    }
    fclose(file);
    snprintf(path, sizeof(path), "%s/model.safetensors", dir);
    file = fopen(scratch_file(path), "wb");
    assert_non_null(file);
    fwrite(&length, 8, 1, file);
    fwrite(data, 1, size, file);
    assert_int_equal(fclose(file), 0);
    free(data);
}

void read_class(Run *run, const char *dir) {
    memset(run, 0, sizeof(*run));
    config_from_directory(&run->config, dir);
    config_check(&run->config);
    run->backend = &cpu_backend;
    run->model = model_allocate(&run->config, 8, 0, NULL);
    load_weights(run, dir, 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading and writing

// The numbers of every piece are where they belong, and no other numbers are in the model.
void check_numbers(const Class *k, const Model *m) {
    size_t all = 0, seen = 0;
    for (int i = 0; i < m->tensor_count; i++)
        all += m->tensors[i].size;
    for (int i = 0; i < piece_count; i++) {
        const FilePiece *p = &pieces[i];
        int t = find_tensor(m, p->layer, p->kind);
        if (t < 0)
            fail_msg("%s: the model has no %s for %s", k->type, p->kind, p->name);
        const real *at = m->memory[WEIGHTS] + m->tensors[t].offset + (size_t)p->first * (size_t)(p->rows ? p->cols : 1);
        for (size_t j = 0; j < piece_size(p); j++) {
            double wanted = p->by * (double)number_of(p->name, j);
            if ((double)at[j] != wanted)
                fail_msg("%s: number %zu of %s is %g, not %g", k->type, j, p->name, (double)at[j], wanted);
        }
        seen += piece_size(p);
    }
    assert_int_equal(all, seen);
}

// Writes the model as a run does, into scratch_file("back").
void write_back(Run *run) {
    const int weights[] = {WEIGHTS};
    const char *const plain[] = {""};
    char *list = NULL;
    size_t size = 0;
    remove_tree(scratch_file("back"));
    mkdir(scratch_file("back"), 0777);
    snprintf(unfinished_path, sizeof(unfinished_path), "%s", scratch_file("back"));
    FILE *sums = open_memory(&list, &size);
    fprintf(sums, "{");
    write_tensors(run, "model.safetensors", weights, plain, 1, sums);
    close_memory(sums, &list);
    free(list);
    write_config(unfinished_path, &run->config, 0, 0);
    unfinished_path[0] = 0;
}

void check_written(const Class *k, int untied) {
    Safetensors s;
    int count = 0;
    safetensors_open(&s, scratch_file("back/model.safetensors"), 0);
    for (const Json *t = s.header->child; t; t = t->next)
        count += strcmp(t->key, "__metadata__") != 0;
    list_pieces(k, untied);
    assert_int_equal(count, piece_count);
    for (int i = 0; i < piece_count; i++) {
        const FilePiece *p = &pieces[i];
        char shape[64] = "", wanted[64];
        const Json *t = json_get(s.header, p->name);
        if (!t)
            fail_msg("%s: %s is not written", k->type, p->name);
        for (const Json *d = json_get(t, "shape")->child; d; d = d->next)
            snprintf(shape + strlen(shape), sizeof(shape) - strlen(shape), "%.0f ", d->number);
        snprintf(wanted, sizeof(wanted), "%.0d%s%.0d%s%d ", p->experts, p->experts ? " " : "", p->rows, p->rows ? " " : "", p->cols);
        assert_string_equal(shape, wanted);
        Part part;
        memset(&part, 0, sizeof(part));
        part.rows = max_int(1, p->experts) * p->rows;
        part.cols = p->cols;
        real *numbers = allocate_reals(piece_size(p));
        assert_true(read_tensor(&s, p->name, &part, part.rows, 0, numbers));
        for (size_t j = 0; j < piece_size(p); j++)
            assert_true((double)numbers[j] == p->by * (double)number_of(p->name, j));
        free(numbers);
    }
    safetensors_close(&s);
}

// Both models do the same: all options of models, and all weights, to the bit.
void check_same(const Class *k, const Run *a, const Run *b) {
    for (int i = 0; i < option_count; i++) {
        char one[64], other[64];
        if (options[i].when != MODEL || !strcmp(options[i].name, "recipe"))
            continue;
        const char *first = option_text(&a->config, &options[i], one), *second = option_text(&b->config, &options[i], other);
        if (strcmp(first, second))
            fail_msg("%s: --%s is %s, and after writing %s", k->type, options[i].name, first, second);
    }
    assert_int_equal(class_of(&a->config), class_of(&b->config));
    assert_int_equal(a->model->size, b->model->size);
    assert_memory_equal(a->model->memory[WEIGHTS], b->model->memory[WEIGHTS], a->model->size * sizeof(real));
}

// Every class is read, tied and untied, in float32 and bfloat16, and written back as the same class.
void test_classes_there_and_back(void **state) {
    (void)state;
    for (int i = 0; i < COUNT(classes); i++) {
        for (int form = 0; form < (is_slow() ? 1 : 2); form++) {
            const Class *k = &classes[i];
            Run run, again;
            put_class("there", k, form, form ? 2 : 4, "", NULL);
            read_class(&run, scratch_file("there"));
            assert_string_equal(matching_class(&run.config), k->name);
            check_numbers(k, run.model);
            write_back(&run);
            check_written(k, form);
            read_class(&again, scratch_file("back"));
            check_same(k, &run, &again);
            model_free(again.model);
            model_free(run.model);
        }
    }
}

// The experts of a layer can be in two tensors, which is how transformers 5 has them in memory.
void test_classes_fused(void **state) {
    (void)state;
    for (int i = 0; i < COUNT(classes); i++) {
        Run run;
        if (!classes[i].gate)
            continue;
        fused = 1;
        put_class("there", &classes[i], 0, 2, "", NULL);
        read_class(&run, scratch_file("there"));
        check_numbers(&classes[i], run.model);
        fused = 0;
        model_free(run.model);
    }
}

// What the fields make of the options.
void test_classes_options(void **state) {
    (void)state;
    const struct {
        int of;
        const char *more, *option, *value;
    } cases[] = {
        {1, "", "rope-scaling", "llama3"},
        {1, "", "rope-factor", "8"},
        {1, "", "rope-original", "64"},
        {1, "", "moe-every", "0"},
        {1, "", "ffn", "14"},
        {2, "", "head-width", "6"},
        {3, "", "qkv-bias", "1"},
        {4, "", "qk-norm", "1"},
        {4, "", "qk-norm-over", "head"},
        {5, "", "gate", "probability"},
        {5, "\"norm_topk_prob\": true,", "gate", "renormalized"},
        {5, "", "shared-gate", "1"},
        {5, "", "shared-ffn", "10"},
        {5, "", "dense-ffn", "14"},
        {5, "", "dense-first", "1"},
        {6, "", "dense-first", "2"},
        {6, "", "gate", "renormalized"},
        {7, "", "qk-norm-over", "row"},
        {7, "", "gate", "probability"},
        {7, "", "topk", "2"},
        {8, "", "gate", "renormalized"},
        {9, "", "shared-gate", "0"},
    };
    for (int i = 0; i < COUNT(cases); i++) {
        char text[64];
        Config c;
        put_class("there", &classes[cases[i].of], 0, 4, cases[i].more, NULL);
        config_from_directory(&c, scratch_file("there"));
        const char *found = option_text(&c, &options[find_option(cases[i].option)], text);
        if (strcmp(found, cases[i].value))
            fail_msg("%s %s: --%s is %s, not %s", classes[cases[i].of].type, cases[i].more, cases[i].option, found, cases[i].value);
    }
}

// Qwen's layers without experts, as they can be here.
void test_classes_layers(void **state) {
    (void)state;
    const struct {
        const char *fields;
        int every, first;
    } cases[] = {
        {"\"decoder_sparse_step\": 1, \"mlp_only_layers\": []", 1, 0},
        {"\"decoder_sparse_step\": 2, \"mlp_only_layers\": []", 2, 0},
        {"\"decoder_sparse_step\": 3", 3, 0},
        {"\"mlp_only_layers\": [0, 1, 2]", 1, 3},
        {"\"mlp_only_layers\": [0, 1, 2, 3, 4]", 2, 4},
        {"\"decoder_sparse_step\": 2, \"mlp_only_layers\": [1]", 2, 2},
        {"\"mlp_only_layers\": [0, 1, 2, 3, 4, 5]", 0, 0},
    };
    for (int i = 0; i < COUNT(cases); i++) {
        ConfigReader r;
        char text[128];
        Config c;
        memset(&r, 0, sizeof(r));
        config_defaults(&c);
        c.layers = 6;
        snprintf(text, sizeof(text), "{%s}", cases[i].fields);
        Json *json = json_parse(text, strlen(text), "config.json");
        r.json = json;
        r.kind = QWEN3_MOE;
        take_layers(&r, &c);
        for (int l = 0; l < 6; l++) {
            Config wanted = c;
            wanted.moe_every = cases[i].every;
            wanted.dense_first = cases[i].first;
            if (is_moe(&c, l) != is_moe(&wanted, l))
                fail_msg("%s: layer %d: --moe-every %d --dense-first %d", cases[i].fields, l, c.moe_every, c.dense_first);
        }
        json_free(json);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Refusals

void read_only(void *arg) {
    Run run;
    read_class(&run, (const char *)arg);
    model_free(run.model);
}

void test_classes_refused(void **state) {
    (void)state;
    if (is_slow())
        skip();
    const struct {
        int of;
        const char *more, *drop, *message;
    } cases[] = {
        {0, "\"norm_topk_prob\": false,", NULL, "norm_topk_prob is false"},
        {0, "\"embedding_multiplier\": 2,", NULL, "embedding_multiplier is 2: only a Granite has this factor"},
        {1, "\"rope_parameters\": {\"rope_type\": \"yarn\", \"factor\": 2},", NULL, "rope_parameters's rope_type is yarn"},
        {1, "\"attention_bias\": true,", NULL, "attention_bias is true"},
        {1, "", "model.layers.2.mlp.up_proj.weight", "there is no model.layers.2.mlp.up_proj.weight"},
        {3, "\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 2},", NULL, "rope_scaling has no number low_freq_factor"},
        {3, "", "model.layers.0.self_attn.k_proj.bias", "there is no model.layers.0.self_attn.k_proj.bias"},
        {4, "", "model.layers.1.self_attn.q_norm.weight", "there is no model.layers.1.self_attn.q_norm.weight"},
        {4, "\"layer_types\": [\"chunked_attention\"],", NULL, "layer_types is chunked_attention"},
        {5, "", "model.layers.1.mlp.shared_expert_gate.weight", "there is no model.layers.1.mlp.shared_expert_gate.weight"},
        {5, "\"decoder_sparse_step\": 0,", NULL, "expected a whole number decoder_sparse_step"},
        {6, "", "model.layers.2.mlp.experts.2.up_proj.weight", "there is no model.layers.2.mlp.experts.2.up_proj.weight"},
        {7, "\"clip_qkv\": 8,", NULL, "clip_qkv is 8: queries, keys and values are not clipped here"},
        {7, "\"hidden_act\": \"gelu\",", NULL, "hidden_act is gelu; expected silu"},
        {8, "", "model.layers.0.block_sparse_moe.output_linear.weight", "there is no model.layers.0.block_sparse_moe.output_linear.weight"},
    };
    char message[1024];
    for (int i = 0; i < COUNT(cases); i++) {
        put_class("there", &classes[cases[i].of], 0, 4, cases[i].more, cases[i].drop);
        int status = dies(read_only, (void *)scratch_file("there"), message, sizeof(message));
        if (status != 1 || !strstr(message, cases[i].message))
            fail_msg("%s %s: exit status %d: %s", classes[cases[i].of].type, cases[i].more, status, message);
    }

    // A class that is none of ours: the message lists those that are. Layers that no option makes.
    Class other = classes[0];
    other.type = "gpt_neox";
    put_class("there", &other, 0, 4, "", NULL);
    assert_int_equal(dies(read_only, (void *)scratch_file("there"), message, sizeof(message)), 1);
    assert_non_null(strstr(message, "model_type is gpt_neox; expected one of mixtral, llama, mistral, qwen2, qwen3, qwen2_moe, qwen3_moe, "
                                    "olmoe, granitemoe, granitemoeshared"));
    other = classes[6];
    other.fields = "\"num_experts\": 3, \"mlp_only_layers\": [1], ";
    put_class("there", &other, 0, 4, "", NULL);
    assert_int_equal(dies(read_only, (void *)scratch_file("there"), message, sizeof(message)), 1);
    assert_non_null(strstr(message, "mlp_only_layers and decoder_sparse_step"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_classes_there_and_back),
        cmocka_unit_test(test_classes_fused),
        cmocka_unit_test(test_classes_options),
        cmocka_unit_test(test_classes_layers),
        cmocka_unit_test(test_classes_refused),
    };
    begin_tests();
    return cmocka_run_group_tests_name("classes", tests, NULL, scratch_done);
}
