// Other makers' checkpoints: what ./train_moe --init reads of a Hugging Face directory, and what it refuses by name. The
// directories are made here, of a tiny run's own checkpoint; dev/test/check_hf.py has transformers make them. Where a
// directory is read, a run of one step with a learning rate of 0 shows the loss of its weights.

#include "dev/test/trainer.h"
#include "dev/test/model.h"
#include "dev/test/runs.h"

// ---------------------------------------------------------------------------------------------------------------------
// Helpers

// Starts from scratch_file(from), with a learning rate of 0. Returns the exit status.
int start_from(const char *from, const char *more) {
    const char *program = getenv("TRAIN_MOE");
    remove_tree(scratch_file("tried"));
    return shell(said, sizeof(said),
                 "%s --init %s --data %s --out %s --steps 1 --lr 0 --warmup 0 --eval-tokens 64 --batch 2 --seq 32 --tokens 4 "
                 "--threads 1 %s",
                 program ? program : "./train_moe", from[0] == '/' ? from : scratch_file(from), scratch_file("data"),
                 scratch_file("tried"), more);
}

double loss_from(const char *from) {
    expect(start_from(from, ""), 0, "What next");
    return logged("tried", "eval", 1, "val_loss");
}

// Copies scratch_file(from) to scratch_file(to) and runs a shell command there.
void make_case(const char *from, const char *to, const char *change) {
    remove_tree(scratch_file(to));
    if (shell(said, sizeof(said), "cp -rL %s %s && cd %s && %s", scratch_file(from), scratch_file(to), scratch_file(to), change))
        fail_msg("%s: %s", change, said);
}

// A checkpoint of ours, scratch_file(name), and the same without the object train_moe: scratch_file(name-foreign).
void make_base(const char *name, const char *recipe) {
    char options[128], folder[64], foreign[64];
    snprintf(folder, sizeof(folder), "%s-run", name);
    snprintf(options, sizeof(options), "%s --steps 8 --lr 0.01", recipe);
    if (access(scratch_file(folder), F_OK) == 0)
        return;
    expect(run_tiny(folder, options), 0, "What next");
    snprintf(folder, sizeof(folder), "%s-run/latest", name);
    make_case(folder, name, "rm -f optimizer.safetensors trainer_state.json checksums.json");
    snprintf(foreign, sizeof(foreign), "%s-foreign", name);
    make_case(name, foreign, "sed -i '/\"train_moe\": {/d;s/\\(\"torch_dtype\": \"float32\"\\),/\\1/' config.json");
}

typedef struct Change { // of the tensors of a file
    const char *name;   // one that is added, or that replaces another of that name
    int rows, cols;     // rows 0: one dimension
    const char *like;   // its numbers are those of this tensor, and where that has too few, ever the same one; NULL: 0.125
} Change;

// Rewrites scratch_file(dir)/from as scratch_file(dir)/to: without the tensors whose names contain `without`, and with `changes`.
void rewrite(const char *dir, const char *from, const char *to, const char *without, const Change *changes, int count) {
    char path[300];
    Safetensors s;
    snprintf(path, sizeof(path), "%s/%s", dir, from);
    safetensors_open(&s, scratch_file(path), 0);
    char *header = NULL, *data = NULL;
    size_t header_size = 0, size = 0;
    FILE *text = open_memstream(&header, &header_size), *numbers = open_memstream(&data, &size);
    fprintf(text, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (const Json *t = s.header->child; t; t = t->next) {
        int drop = !strcmp(t->key, "__metadata__") || (without && strstr(t->key, without));
        for (int i = 0; i < count; i++)
            drop |= !strcmp(t->key, changes[i].name);
        if (drop)
            continue;
        const Json *shape = json_get(t, "shape")->child, *range = json_get(t, "data_offsets")->child;
        size_t first = (size_t)range->number, bytes = (size_t)range->next->number - first;
        fflush(numbers);
        fprintf(text, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%.0f", t->key, json_get(t, "dtype")->text, shape->number);
        if (shape->next)
            fprintf(text, ",%.0f", shape->next->number);
        fprintf(text, "],\"data_offsets\":[%zu,%zu]}", size, size + bytes);
        fwrite(s.data + first, 1, bytes, numbers);
    }
    for (int i = 0; i < count; i++) {
        const Change *c = &changes[i];
        const Json *like = c->like ? json_get(s.header, c->like) : NULL;
        size_t n = (size_t)max_int(c->rows, 1) * (size_t)c->cols, first = 0, had = 0;
        float number = 0.125f;
        if (like) {
            const Json *range = json_get(like, "data_offsets")->child;
            first = (size_t)range->number;
            had = ((size_t)range->next->number - first) / 4;
        }
        fflush(numbers);
        fprintf(text, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[", c->name);
        if (c->rows)
            fprintf(text, "%d,", c->rows);
        fprintf(text, "%d],\"data_offsets\":[%zu,%zu]}", c->cols, size, size + 4 * n);
        for (size_t k = 0; k < n; k++) {
            if (k < had)
                memcpy(&number, s.data + first + 4 * k, 4);
            fwrite(&number, 4, 1, numbers);
        }
    }
    fprintf(text, "}");
    fclose(text);
    fclose(numbers);
    safetensors_close(&s);
    uint64_t length = header_size;
    snprintf(path, sizeof(path), "%s/%s", dir, to);
    FILE *file = fopen(scratch_file(path), "wb");
    assert_non_null(file);
    fwrite(&length, 8, 1, file);
    fwrite(header, 1, header_size, file);
    fwrite(data, 1, size, file);
    assert_int_equal(fclose(file), 0);
    free(header);
    free(data);
}

// ---------------------------------------------------------------------------------------------------------------------
// config.json

typedef struct FieldCase {
    const char *change;  // in the folder
    const char *options; // besides --init
    const char *message; // with which it is refused; NULL: it is read, with the loss of the folder that it was made of
} FieldCase;

void check_fields_of(const char *base, const FieldCase *cases, int count) {
    double wanted = loss_from(base);
    for (int i = 0; i < count; i++) {
        const FieldCase *c = &cases[i];
        make_case(base, "case", c->change);
        int status = start_from("case", c->options);
        if (c->message && (status != 1 || !strstr(said, c->message)))
            fail_msg("%s; %s: exit status %d, expected 1 and \"%s\"; it said:\n%s", c->change, c->options, status, c->message, said);
        if (!c->message && status != 0)
            fail_msg("%s; %s: exit status %d; it said:\n%s", c->change, c->options, status, said);
        if (!c->message && logged("tried", "eval", 1, "val_loss") != wanted)
            fail_msg("%s: the loss is %.9g, not %.9g", c->change, logged("tried", "eval", 1, "val_loss"), wanted);
    }
}

// A field behind the others, or in the place of one.
#define ADD(fields)        "sed -i 's/\"vocab_size\"/" fields ",\\n  &/' config.json"
#define DROP(name)         "sed -i '/\"" name "\"/d' config.json"
#define PUT(name, value)   "sed -i 's/\"" name "\": [^,]*/\"" name "\": " value "/' config.json"

// Each field that changes what the model computes is honoured, or refused by its name.
void test_foreign_fields(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    make_base("mixtral", "");
    static const FieldCase cases[] = {
        // rotary positions, in the forms of all versions
        {DROP("rope_theta") " && " ADD("\"rope_parameters\": {\"rope_theta\": 10000.0, \"rope_type\": \"default\"}"), "", NULL},
        {ADD("\"rope_scaling\": null"), "", NULL},
        {ADD("\"rope_scaling\": {\"type\": \"default\"}"), "", NULL},
        {ADD("\"rope_scaling\": {\"rope_type\": \"default\"}"), "", NULL},
        {ADD("\"rope_scaling\": {\"type\": \"linear\"}"), "", "rope_scaling has no number factor"},
        {ADD("\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 2.0}"), "", "rope_scaling's rope_type is yarn"},
        {ADD("\"rope_parameters\": {\"rope_theta\": 1e4, \"type\": \"longrope\", \"factor\": 2.0}"), "",
         "rope_parameters's type is longrope"},
        {ADD("\"rope_parameters\": {\"rope_theta\": 1e4, \"rope_type\": \"default\"}, \"rope_scaling\": {\"type\": \"dynamic\"}"), "",
         "rope_scaling's type is dynamic"},
        {ADD("\"rope_parameters\": {\"rope_type\": \"llama3\"}, \"rope_scaling\": {\"rope_type\": \"default\"}"), "",
         "rope_parameters's rope_type is llama3"},
        {ADD("\"rope_parameters\": {\"rope_type\": \"default\", \"partial_rotary_factor\": 0.5}"), "", "partial_rotary_factor is 0.5"},
        {ADD("\"partial_rotary_factor\": 0.5"), "", "partial_rotary_factor is 0.5"},
        {ADD("\"partial_rotary_factor\": 1.0"), "", NULL},
        // attention
        {ADD("\"sliding_window\": 16"), "", "sliding_window is 16"},
        {ADD("\"sliding_window\": 16"), "--seq 17", "--seq 16 or less"},
        {ADD("\"sliding_window\": 32"), "", NULL},
        {ADD("\"sliding_window\": null"), "", NULL},
        {ADD("\"attention_bias\": true"), "", "attention_bias"},
        {ADD("\"attention_bias\": false, \"mlp_bias\": false"), "", NULL},
        {ADD("\"mlp_bias\": true"), "", "mlp_bias"},
        {ADD("\"clip_qkv\": 8.0"), "", "clip_qkv is 8"},
        {ADD("\"clip_qkv\": null"), "", NULL},
        {ADD("\"attn_logit_softcapping\": 50.0"), "", "attn_logit_softcapping"},
        {ADD("\"final_logit_softcapping\": 30.0"), "", "final_logit_softcapping"},
        {ADD("\"use_qk_norm\": true"), "", "use_qk_norm"},
        {ADD("\"layer_types\": [\"full_attention\", \"sliding_attention\"]"), "", "layer_types is sliding_attention"},
        {ADD("\"layer_types\": [\"full_attention\", \"full_attention\"]"), "", NULL},
        {PUT("head_dim", "8"), "", "self_attn.q_proj.weight is 32 x 32; config.json makes it 16 x 32"},
        {PUT("head_dim", "15"), "", "head_dim, or hidden_size 32 / num_attention_heads 2, is 15"},
        {PUT("head_dim", "null"), "", NULL},
        {DROP("head_dim"), "", NULL},
        // experts
        {ADD("\"norm_topk_prob\": false"), "", "norm_topk_prob is false"},
        {ADD("\"norm_topk_prob\": true"), "", NULL},
        {PUT("hidden_act", "\"gelu\""), "", "hidden_act is gelu"},
        {PUT("hidden_act", "\"swish\""), "", NULL},
        {PUT("num_experts_per_tok", "1"), "", "set num_experts_per_tok to 2"},
        {PUT("num_experts_per_tok", "5"), "", "num_experts_per_tok 5 is more than the 4 experts of a layer"},
        {DROP("num_local_experts") " && " ADD("\"num_experts\": 4"), "", NULL},
        {ADD("\"quantization_config\": {\"quant_method\": \"awq\"}"), "", "quantization_config"},
        // what changes nothing
        {ADD("\"attention_dropout\": 0.1, \"use_cache\": true, \"pad_token_id\": null, \"torchscript\": false"), "", NULL},
        {PUT("max_position_embeddings", "10485760"), "", NULL},
        {PUT("num_key_value_heads", "null"), "", NULL}, // as many as heads
        {PUT("model_type", "\"gpt2\""), "", "model_type is gpt2; expected one of mixtral, llama, mistral"},
        {PUT("hidden_size", "\"32\""), "", "hidden_size is 32: expected a number"},
        {PUT("hidden_size", "32.5"), "", "hidden_size: dim is '32.5'"},
    };
    check_fields_of("mixtral-foreign", cases, COUNT(cases));
    make_case("mixtral-foreign", "case", ADD("\"attention_dropout\": 0.1"));
    expect(start_from("case", ""), 0, "these fields act in training only, and this program has nothing like them: attention_dropout");
    make_case("mixtral-foreign", "case", ADD("\"some_new_thing\": 7, \"another\": null"));
    expect(start_from("case", ""), 0, "these fields are unknown, and ignored: some_new_thing\n");

    // The options of the command line do not slip into what the file does not say.
    expect(start_from("mixtral-foreign", "--score sigmoid"), 2, "--score sigmoid");
    expect(start_from("mixtral-foreign", "--shared 1"), 2, "--shared 1");
}

// Fields that a file lacks have the values that the class documents: the loss is that of a file that says them.
void test_foreign_defaults(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    make_base("mixtral", "");
    make_base("llama", "--recipe dense");
    static const char *const pairs[][3] = {
        {"mixtral-foreign", DROP("rope_theta"), PUT("rope_theta", "1e6")},
        {"mixtral-foreign", DROP("rms_norm_eps"), PUT("rms_norm_eps", "1e-5")},
        {"mixtral-foreign", DROP("num_experts_per_tok"), PUT("num_experts_per_tok", "2")},
        {"mixtral-foreign", DROP("max_position_embeddings"), ":"},
        {"llama-foreign", DROP("rope_theta"), PUT("rope_theta", "10000")},
        {"llama-foreign", DROP("rms_norm_eps"), PUT("rms_norm_eps", "1e-6")},
        {"llama-foreign", DROP("num_key_value_heads"), ":"},
        {"llama-foreign", DROP("max_position_embeddings"), ":"},
        {"llama-foreign", ADD("\"sliding_window\": 16"), ":"}, // which Llama does not look at
        {"llama-foreign", ADD("\"num_local_experts\": 8"), ":"},
        {"llama-foreign", ADD("\"rope_parameters\": {\"rope_theta\": 500.0}"), PUT("rope_theta", "500")},
        {"llama-foreign", ADD("\"rope_parameters\": {\"rope_theta\": 500.0}, \"rope_scaling\": {\"rope_theta\": 300.0}"),
         PUT("rope_theta", "300")},
    };
    for (int i = 0; i < COUNT(pairs); i++) {
        make_case(pairs[i][0], "case", pairs[i][1]);
        double found = loss_from("case");
        make_case(pairs[i][0], "case", pairs[i][2]);
        double wanted = loss_from("case");
        if (found != wanted)
            fail_msg("%s; %s: the loss is %.9g, not %.9g", pairs[i][0], pairs[i][1], found, wanted);
    }

    // An output of its own, where the file does not say that it has the embedding's matrix.
    const Change head[] = {{"lm_head.weight", 265, 32, "model.layers.0.block_sparse_moe.experts.0.w1.weight"}};
    make_case("mixtral-foreign", "case", DROP("tie_word_embeddings"));
    expect(start_from("case", ""), 1, "there is no lm_head.weight");
    rewrite("case", "model.safetensors", "model.safetensors", NULL, head, 1);
    assert_true(loss_from("case") != loss_from("mixtral-foreign"));
    make_case("mixtral-foreign", "case", DROP("num_key_value_heads"));
    expect(start_from("case", ""), 1, "num_attention_heads 2 is no multiple of num_key_value_heads 8");
}

// Another tool has changed a checkpoint of ours and saved it: the fields count, not what our object in the same file says.
void test_changed_by_others(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    make_base("mixtral", "");
    static const Change experts[] = {
        {"model.layers.0.block_sparse_moe.gate.weight", 5, 32, "model.layers.0.block_sparse_moe.gate.weight"},
        {"model.layers.1.block_sparse_moe.gate.weight", 5, 32, "model.layers.1.block_sparse_moe.gate.weight"},
        {"model.layers.0.block_sparse_moe.experts.4.w1.weight", 32, 32, "model.layers.0.block_sparse_moe.experts.1.w1.weight"},
        {"model.layers.0.block_sparse_moe.experts.4.w2.weight", 32, 32, "model.layers.0.block_sparse_moe.experts.1.w3.weight"},
        {"model.layers.0.block_sparse_moe.experts.4.w3.weight", 32, 32, "model.layers.0.block_sparse_moe.experts.1.w3.weight"},
        {"model.layers.1.block_sparse_moe.experts.4.w1.weight", 32, 32, "model.layers.1.block_sparse_moe.experts.1.w1.weight"},
        {"model.layers.1.block_sparse_moe.experts.4.w2.weight", 32, 32, "model.layers.1.block_sparse_moe.experts.1.w3.weight"},
        {"model.layers.1.block_sparse_moe.experts.4.w3.weight", 32, 32, "model.layers.1.block_sparse_moe.experts.1.w3.weight"},
        {"lm_head.weight", 265, 32, "model.layers.0.block_sparse_moe.experts.0.w1.weight"},
    };
    static const struct {
        const char *change, *without;
        int first, count; // of the tensors above
        const char *message;
    } cases[] = {
        {PUT("num_hidden_layers", "1"), "layers.1.", 0, 0, "num_hidden_layers fell from 2 to 1"},
        {PUT("num_local_experts", "5"), NULL, 0, 8, "num_local_experts rose from 4 to 5"},
        {PUT("tie_word_embeddings", "false"), NULL, 8, 1, "tie_word_embeddings is false now"},
        {PUT("rms_norm_eps", "0.5"), NULL, 0, 0, "rms_norm_eps rose from 1e-05 to 0.5"},
        {PUT("rope_theta", "50"), NULL, 0, 0, "rope_theta fell from 10000 to 50"},
        {DROP("rope_theta") " && " ADD("\"rope_parameters\": {\"rope_theta\": 50}"), NULL, 0, 0, "rope_theta fell from 10000 to 50"},
        {PUT("num_experts_per_tok", "3"), NULL, 0, 0, "num_experts_per_tok rose from 2 to 3"},
        {PUT("num_attention_heads", "1") " && " PUT("num_key_value_heads", "1") " && " PUT("head_dim", "32"), NULL, 0, 0,
         "num_attention_heads fell from 2 to 1"},
    };
    for (int i = 0; i < COUNT(cases); i++) {
        double losses[2];
        for (int foreign = 0; foreign < 2; foreign++) {
            make_case(foreign ? "mixtral-foreign" : "mixtral", "case", cases[i].change);
            rewrite("case", "model.safetensors", "model.safetensors", cases[i].without, experts + cases[i].first, cases[i].count);
            losses[foreign] = loss_from("case");
            if (!foreign)
                expect(0, 0, cases[i].message);
        }
        if (losses[0] != losses[1])
            fail_msg("%s: the loss is %.9g with our object in config.json, %.9g without it", cases[i].change, losses[0], losses[1]);
    }

    // What cannot be read is refused by name.
    static const FieldCase refused[] = {
        {PUT("hidden_act", "\"gelu\""), "", "hidden_act is gelu"},
        {PUT("model_type", "\"llama\""), "", "model_type is llama"},
        {PUT("model_type", "\"mistral\""), "", "model_type is mistral"},
        {ADD("\"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 2.0}"), "", "rope_scaling"},
        {ADD("\"sliding_window\": 16"), "", "sliding_window is 16"},
        {PUT("num_hidden_layers", "1"), "", "model.layers.1."}, // the tensors are still there
        {PUT("architectures", "[\"MixtralForCausalLM\"]"), "", NULL},
    };
    check_fields_of("mixtral", refused, COUNT(refused));

    // A dense model, and one that no class of transformers computes.
    make_base("llama", "--recipe dense");
    make_base("olmoe", "--recipe olmoe --topk 3");
    static const FieldCase dense[] = {{PUT("intermediate_size", "32"), "", "is 64 x 32; config.json makes it 32 x 32"},
                                      {PUT("rms_norm_eps", "1e-05"), "", NULL}};
    check_fields_of("llama", dense, COUNT(dense));
    static const FieldCase ours[] = {{PUT("hidden_size", "64") " && " PUT("head_dim", "32"), "", "model.embed_tokens.weight is 265 x 32"},
                                     {PUT("num_hidden_layers", "1"), "", "model.layers.1."},
                                     {PUT("comment", "\"\""), "", NULL}};
    check_fields_of("olmoe", ours, COUNT(ours));
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensors and files

// Each tensor of a file is used, known to be idle, or refused by name.
void test_foreign_tensors(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    make_base("mixtral", "");
    const char *const base = "mixtral-foreign";
    double wanted = loss_from(base);
    static const Change refused[] = {{"model.layers.0.self_attn.q_proj.bias", 0, 32, NULL},
                                     {"model.layers.1.self_attn.k_norm.weight", 0, 16, NULL},
                                     {"model.layers.2.input_layernorm.weight", 0, 32, NULL},
                                     {"model.layers.0.block_sparse_moe.experts.4.w1.weight", 32, 32, NULL},
                                     {"score.weight", 2, 32, NULL}};
    for (int i = 0; i < COUNT(refused); i++) {
        make_case(base, "case", ":");
        rewrite("case", "model.safetensors", "model.safetensors", NULL, &refused[i], 1);
        expect(start_from("case", ""), 1, refused[i].name);
    }
    // A part is there under both names that transformers has had for it.
    static const Change twice[][2] = {
        {{"model.layers.1.mlp.gate.weight", 4, 32, NULL}, {"model.layers.1.block_sparse_moe.gate.weight", 0, 0, NULL}},
        {{"model.layers.0.mlp.experts.gate_up_proj", 4 * 64, 32, NULL}, {"model.layers.0.block_sparse_moe.experts.0.w1.weight", 0, 0, NULL}},
        {{"model.layers.0.mlp.experts.down_proj", 4 * 32, 32, NULL}, {"model.layers.0.block_sparse_moe.experts.0.w2.weight", 0, 0, NULL}}};
    for (int i = 0; i < COUNT(twice); i++) {
        make_case(base, "case", ":");
        rewrite("case", "model.safetensors", "model.safetensors", NULL, twice[i], 1);
        expect(start_from("case", ""), 1, twice[i][0].name);
        expect(1, 1, twice[i][1].name);
        expect(1, 1, " is there twice, in ");
    }
    const Change idle[] = {{"model.layers.0.self_attn.rotary_emb.inv_freq", 0, 8, NULL},
                           {"lm_head.weight", 265, 32, "model.embed_tokens.weight"}};
    make_case(base, "case", ":");
    rewrite("case", "model.safetensors", "model.safetensors", NULL, idle, 2);
    assert_true(loss_from("case") == wanted);
    assert_null(strstr(said, "tie_word_embeddings"));

    // Tied, but with another matrix for the output: version 5 of transformers takes it.
    const Change head[] = {{"lm_head.weight", 265, 32, "model.layers.0.block_sparse_moe.experts.0.w1.weight"}};
    make_case(base, "case", ":");
    rewrite("case", "model.safetensors", "model.safetensors", NULL, head, 1);
    double untied = loss_from("case");
    expect(0, 0, "tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight");
    make_case("case", "said-so", PUT("tie_word_embeddings", "false"));
    assert_true(untied != wanted && untied == loss_from("said-so"));

    // A model that was saved without its output has other names.
    const Change bare[] = {{"embed_tokens.weight", 265, 32, "model.embed_tokens.weight"}};
    make_case(base, "case", ":");
    rewrite("case", "model.safetensors", "model.safetensors", "model.embed_tokens", bare, 1);
    expect(start_from("case", ""), 1, "AutoModelForCausalLM");

    // Norms of queries and keys: a Qwen3Moe has them, a Mixtral has none.
    make_base("normed", "--qk-norm");
    make_case("normed", "case", "grep '\"Qwen3MoeForCausalLM\"' config.json");
    assert_true(loss_from("normed") == loss_from("normed-foreign"));
    rewrite("case", "model.safetensors", "model.safetensors", NULL, &refused[0], 1);
    expect(start_from("case", ""), 1, "2 layers, no biases, with norms of queries and keys");
    make_case(base, "case", ":");
    rewrite("case", "model.safetensors", "model.safetensors", NULL, &refused[1], 1);
    expect(start_from("case", ""), 1, "self_attn.k_norm.weight is no tensor of the model that config.json describes (2 layers, no biases, "
                                      "no norms of queries and keys)");

    // A model without norms, whose last layer only mixes, is no Mixtral, and comes back as it was.
    make_base("bare", "--norms 0 --last-feed 0 --moe-sigmoid --dropout 0.2");
    make_case("bare", "case", "grep '\"TrainMoeForCausalLM\"' config.json");
    assert_true(loss_from("case") == loss_from("bare"));
    make_case("bare-run/latest", "case", "! grep layernorm model.safetensors && grep '\"dropout\":0.2' config.json");

    // Nor is one with an LSTM: its tensors have the names and shapes of PyTorch's nn.LSTM.
    make_base("lstm", "--recipe shazeer-lstm --cell 24");
    make_case("lstm", "case", "grep '\"TrainMoeForCausalLM\"' config.json && grep '\"mixer\":\"lstm\"' config.json && "
                              "grep -a 'layers.1.lstm.weight_ih_l0.:..dtype.:.F32.,.shape.:.96,32' model.safetensors && "
                              "grep -a 'layers.0.lstm.weight_hr_l0' model.safetensors && ! grep -a self_attn model.safetensors");
    assert_true(loss_from("case") == loss_from("lstm"));
    expect(start_from("case", "--cell 16"), 2, "--cell 16: in ");

    // The optimizer's moments, too.
    make_case("mixtral-run/latest", "case", "rm -f checksums.json");
    const Change moment[] = {{"exp_avg_sq.model.layers.2.input_layernorm.weight", 0, 32, NULL}};
    rewrite("case", "optimizer.safetensors", "optimizer.safetensors", NULL, moment, 1);
    shell(said, sizeof(said), "cd %s && rm -rf moments && mkdir moments && mv case moments/checkpoint-8 && "
          "ln -s checkpoint-8 moments/latest", scratch_folder);
    expect(run_tiny("moments", "--resume --steps 9"), 1, moment[0].name);
}

// Where there are a whole file and an index of shards, the file is read, as transformers does it.
void test_foreign_shards(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    make_base("mixtral", "");
    double wanted = loss_from("mixtral-foreign");
    const char *const index = "echo '{\"weight_map\":{\"a\":\"1.safetensors\",\"b\":\"2.safetensors\"}}' > model.safetensors.index.json";
    make_case("mixtral-foreign", "case", index);
    rewrite("case", "model.safetensors", "1.safetensors", "layers.1.", NULL, 0);
    rewrite("case", "model.safetensors", "2.safetensors", "layers.0.", NULL, 0);
    assert_true(loss_from("case") == wanted); // of the whole file
    expect(0, 0, "the first is read, as transformers does");
    make_case("case", "both", "rm model.safetensors");
    expect(start_from("both", ""), 1, "model.embed_tokens.weight is there twice"); // the shards must not overlap
    rewrite("both", "2.safetensors", "2.safetensors", "model.embed_tokens.weight", NULL, 0);
    rewrite("both", "2.safetensors", "2.safetensors", "model.norm.weight", NULL, 0);
    assert_true(loss_from("both") == wanted);
    assert_null(strstr(said, "the first is read"));

    // One number of the first shard is none: the message names that one, not the shard that was opened last.
    char path[300];
    snprintf(path, sizeof(path), "%s", scratch_file("both/1.safetensors"));
    Safetensors s;
    safetensors_open(&s, path, 0);
    const float none = (float)NAN;
    const Json *range = json_get(json_get(s.header, "model.layers.0.input_layernorm.weight"), "data_offsets");
    long at = (long)(s.size - s.data_size) + (long)range->child->number;
    safetensors_close(&s);
    FILE *file = fopen(path, "r+b");
    assert_true(file && fseek(file, at, SEEK_SET) == 0 && fwrite(&none, 4, 1, file) == 1 && fclose(file) == 0);
    expect(start_from("both", ""), 1, "/1.safetensors: damaged: number [0] of model.layers.0.input_layernorm.weight is nan");
    expect(1, 1, "If it is a checkpoint of a run: remove that checkpoint's folder");
}

// ---------------------------------------------------------------------------------------------------------------------
// Tokenizers, and folders that are something else

#define ADDED "{\"id\": 265, \"content\": \"<|pad|>\", \"lstrip\": false}, "

// A directory with added tokens keeps its tokenizer, where it encodes the data's texts as the data's does.
void test_foreign_tokenizer(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    make_base("mixtral", "");
    const Change embed[] = {{"model.embed_tokens.weight", 266, 32, "model.embed_tokens.weight"}};
    make_case("mixtral-foreign", "case", PUT("vocab_size", "266"));
    rewrite("case", "model.safetensors", "model.safetensors", NULL, embed, 1);
    small_tokenizer("case/tokenizer.json", "\"added_tokens\": [", "\"added_tokens\": [" ADDED);
    expect(start_from("case", ""), 0, "What next");
    assert_same_file(scratch_file("tried/latest/tokenizer.json"), scratch_file("case/tokenizer.json"));
    expect(run_tiny("tried", "--resume --steps 2"), 0, "going on after step 1");
    assert_same_file(scratch_file("tried/latest/tokenizer.json"), scratch_file("case/tokenizer.json"));

    // One that encodes the same words otherwise is refused, and so is one that cuts out a word of the data's.
    static const char *const changes[][2] = {{"\"h e\", \"l l\"", "\"l l\", \"h e\""},
                                             {"\"added_tokens\": [", "\"added_tokens\": [" ADDED
                                              "{\"id\": 260, \"content\": \"hello\", \"lstrip\": false}, "}};
    for (int i = 0; i < 2; i++) {
        small_tokenizer("case/tokenizer.json", changes[i][0], changes[i][1]);
        expect(start_from("case", ""), 1, i ? "token 260 is not that of the data" : "its merges are not those of the data");
        expect(1, 1, "data/tokenize --tokenizer");
    }
}

// transformers pads batches with the token that tokenizer_config.json names.
void test_pad_token(void **state) {
    (void)state;
    need_program();
    make_base("mixtral", "");
    size_t size;
    char *text = read_file(scratch_file("mixtral/tokenizer_config.json"), &size);
    Json *json = json_parse(text, size, "tokenizer_config.json");
    assert_non_null(json_get(json, "pad_token"));
    assert_string_equal(json_get(json, "pad_token")->text, "<|endoftext|>");
    json_free(json);
    free(text);
}

// --init says what it found where it is no model, and takes the newest checkpoint of a run.
void test_init_folders(void **state) {
    (void)state;
    need_program();
    check_leaks(0);
    make_base("mixtral", "");
    assert_true(loss_from("mixtral-run") == loss_from("mixtral"));
    expect(start_from("/nowhere/model", ""), 1, "/nowhere/model: there is no such folder");
    make_case("mixtral-run/latest", "case", ":"); // as it was written
    assert_true(loss_from("case") == loss_from("mixtral"));
    expect(start_from("mixtral/model.safetensors", ""), 1, "a file; give the folder");
    expect(start_from("data", ""), 1, "neither config.json nor latest/config.json");
    make_case("mixtral", "case", "rm model.safetensors && touch pytorch_model.bin");
    expect(start_from("case", ""), 1, "save_pretrained");
    make_case("mixtral", "case", "rm * && echo '{\"peft_type\": \"LORA\"}' > adapter_config.json && touch adapter_model.safetensors");
    expect(start_from("case", ""), 1, "merge_and_unload");
    char line[2100];
    snprintf(line, sizeof(line), "%s", command_line("tried", "--init someone/some-model"));
    expect(shell(said, sizeof(said), "%s", line), 1, "hf download someone/some-model");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_foreign_fields),    cmocka_unit_test(test_foreign_defaults),
        cmocka_unit_test(test_changed_by_others), cmocka_unit_test(test_foreign_tensors),
        cmocka_unit_test(test_foreign_shards),    cmocka_unit_test(test_foreign_tokenizer),
        cmocka_unit_test(test_pad_token),         cmocka_unit_test(test_init_folders),
    };
    begin_tests();
    return cmocka_run_group_tests_name("checkpoint", tests, NULL, scratch_done);
}
