// Hugging Face's config.json: what each of its fields means to this program, and what lies beside it.
// Gives: config_fields, config_from_hugging_face, check_weight_files. Needs: data/json.h; json_word of data/tokenizer.h;
// dev/options.h, and Config of train_moe.c; data/checkpoint.h includes it.
//
// One table says it all. A field that changes what the model computes is taken, or refused by its name; the others are
// known to be idle, or named once. A field that a file lacks has the value that its class documents. What this program can
// compute and neither class can, as norms of queries and keys (--qk-norm), only its own checkpoints say, in their object
// train_moe; in another model's files its fields are refused here, and its tensors by check_tensors().
#pragma once
#include "json.h"
#include "tokenizer.h"

// ---- the table

enum { MIXTRAL, LLAMA, CLASSES }; // one more class is one more column

const struct {
    const char *type, *name, *recipe; // model_type; the class of transformers; the recipe that computes the same
} model_classes[CLASSES] = {{"mixtral", "MixtralForCausalLM", "mixtral"}, {"llama", "LlamaForCausalLM", "dense"}};

enum {
    FIELD_TAKEN,    // it is an option
    FIELD_OFF,      // only null, false, 0 or nothing
    FIELD_ONE,      // only 1
    FIELD_TRUE,     // only true
    FIELD_CHECKED,  // by a function of its own, below
    FIELD_TRAINING, // it acts in training only, and here not at all: said if it is not 0
    FIELD_IDLE      // it changes nothing
};

typedef struct Field {
    const char *name;
    int rule;
    const char *what;              // FIELD_TAKEN: the option; else why another value is refused
    const char *if_missing[CLASSES]; // FIELD_TAKEN: its value where a file lacks it; "": as it was; NULL: not of this class
} Field;

const Field config_fields[] = {
    {"hidden_size", FIELD_TAKEN, "dim", {"4096", "4096"}},
    {"num_hidden_layers", FIELD_TAKEN, "layers", {"32", "32"}},
    {"num_attention_heads", FIELD_TAKEN, "heads", {"32", "32"}},
    {"num_key_value_heads", FIELD_TAKEN, "kv-heads", {"8", "0"}}, // 0: as many as heads
    {"num_local_experts", FIELD_TAKEN, "experts", {"8", NULL}},
    {"num_experts", FIELD_TAKEN, "experts", {"", NULL}}, // another name for it, which wins in transformers
    {"num_experts_per_tok", FIELD_TAKEN, "topk", {"2", NULL}},
    {"intermediate_size", FIELD_TAKEN, "ffn", {"14336", "11008"}},
    {"max_position_embeddings", FIELD_TAKEN, "seq", {"131072", "2048"}},
    {"rms_norm_eps", FIELD_TAKEN, "norm-eps", {"1e-5", "1e-6"}},
    {"rope_theta", FIELD_TAKEN, "rope-theta", {"1e6", "10000"}}, // also in the two objects below
    {"tie_word_embeddings", FIELD_TAKEN, "untied", {"1", "1"}},

    {"rope_parameters", FIELD_CHECKED, NULL, {NULL}},
    {"rope_scaling", FIELD_CHECKED, NULL, {NULL}},
    {"hidden_act", FIELD_CHECKED, NULL, {NULL}},
    {"head_dim", FIELD_CHECKED, NULL, {NULL}},
    {"sliding_window", FIELD_CHECKED, NULL, {NULL}},
    {"layer_types", FIELD_CHECKED, NULL, {NULL}},

    {"rope_interleaved", FIELD_OFF, "positions turn the two halves of a head here", {NULL}},
    {"alibi", FIELD_OFF, "positions turn heads here", {NULL}},
    {"partial_rotary_factor", FIELD_ONE, "here positions turn the whole of a head", {NULL}},
    {"attention_bias", FIELD_OFF, "this model has no biases", {NULL}},
    {"qkv_bias", FIELD_OFF, "this model has no biases", {NULL}},
    {"mlp_bias", FIELD_OFF, "this model has no biases", {NULL}},
    {"attn_bias", FIELD_OFF, "this model has no biases", {NULL}},
    {"attention_out_bias", FIELD_OFF, "this model has no biases", {NULL}},
    {"use_bias", FIELD_OFF, "this model has no biases", {NULL}},
    {"clip_qkv", FIELD_OFF, "queries, keys and values are not clipped here", {NULL}},
    {"qk_norm", FIELD_OFF, "queries and keys of a Mixtral or a Llama have no norms", {NULL}},
    {"use_qk_norm", FIELD_OFF, "queries and keys of a Mixtral or a Llama have no norms", {NULL}},
    {"qk_layernorm", FIELD_OFF, "queries and keys of a Mixtral or a Llama have no norms", {NULL}},
    {"attn_logit_softcapping", FIELD_OFF, "scores of attention have no cap here", {NULL}},
    {"final_logit_softcapping", FIELD_OFF, "logits have no cap here", {NULL}},
    {"logits_soft_cap", FIELD_OFF, "logits have no cap here", {NULL}},
    {"query_pre_attn_scalar", FIELD_OFF, "scores of attention are divided by the root of a head's width here", {NULL}},
    {"attention_multiplier", FIELD_OFF, "scores of attention are divided by the root of a head's width here", {NULL}},
    {"embedding_multiplier", FIELD_ONE, "embeddings are not multiplied by a factor here", {NULL}},
    {"residual_multiplier", FIELD_ONE, "what a layer adds is not multiplied by a factor here", {NULL}},
    {"logits_scaling", FIELD_ONE, "logits are not divided by a factor here", {NULL}},
    {"logit_scale", FIELD_ONE, "logits are not multiplied by a factor here", {NULL}},
    {"routed_scaling_factor", FIELD_ONE, "a Mixtral does not multiply its experts' weights by a factor", {NULL}},
    {"norm_topk_prob", FIELD_TRUE, "a Mixtral divides the weights of the chosen experts by their sum", {NULL}},
    {"mlp_only_layers", FIELD_OFF, "all layers of a Mixtral have experts", {NULL}},
    {"first_k_dense_replace", FIELD_OFF, "all layers of a Mixtral have experts", {NULL}},
    {"decoder_sparse_step", FIELD_ONE, "all layers of a Mixtral have experts", {NULL}},
    {"n_shared_experts", FIELD_OFF, "a Mixtral has no shared experts", {NULL}},
    {"num_shared_experts", FIELD_OFF, "a Mixtral has no shared experts", {NULL}},
    {"shared_expert_intermediate_size", FIELD_OFF, "a Mixtral has no shared experts", {NULL}},
    {"per_layer_config", FIELD_OFF, "all layers are alike here", {NULL}},
    {"pruned_heads", FIELD_OFF, "all layers are alike here", {NULL}},
    {"quantization_config", FIELD_OFF, "its numbers are quantized; give the model that it was made of", {NULL}},
    {"transformers_weights", FIELD_OFF, "the weights must be in model.safetensors, or in what its index lists", {NULL}},

    {"attention_dropout", FIELD_TRAINING, NULL, {NULL}},
    {"hidden_dropout", FIELD_TRAINING, NULL, {NULL}},
    {"resid_pdrop", FIELD_TRAINING, NULL, {NULL}},
    {"embd_pdrop", FIELD_TRAINING, NULL, {NULL}},
    {"router_jitter_noise", FIELD_TRAINING, NULL, {NULL}},

    {"train_moe", FIELD_IDLE, NULL, {NULL}}, // read before
    {"comment", FIELD_IDLE, NULL, {NULL}},
    {"vocab_size", FIELD_IDLE, NULL, {NULL}}, // read before
    {"model_type", FIELD_IDLE, NULL, {NULL}}, // read before
    {"architectures", FIELD_IDLE, NULL, {NULL}},
    {"dtype", FIELD_IDLE, NULL, {NULL}}, // each tensor says what numbers it has
    {"torch_dtype", FIELD_IDLE, NULL, {NULL}},
    {"transformers_version", FIELD_IDLE, NULL, {NULL}},
    {"bos_token_id", FIELD_IDLE, NULL, {NULL}},
    {"eos_token_id", FIELD_IDLE, NULL, {NULL}},
    {"pad_token_id", FIELD_IDLE, NULL, {NULL}},
    {"unk_token_id", FIELD_IDLE, NULL, {NULL}},
    {"initializer_range", FIELD_IDLE, NULL, {NULL}},
    {"use_cache", FIELD_IDLE, NULL, {NULL}},
    {"pretraining_tp", FIELD_IDLE, NULL, {NULL}}, // the same products, in pieces
    {"router_aux_loss_coef", FIELD_IDLE, NULL, {NULL}}, // a run has the options of its own training
    {"output_router_logits", FIELD_IDLE, NULL, {NULL}},
    {"output_attentions", FIELD_IDLE, NULL, {NULL}},
    {"output_hidden_states", FIELD_IDLE, NULL, {NULL}},
    {"tie_last_hidden_states", FIELD_IDLE, NULL, {NULL}},
    {"return_dict", FIELD_IDLE, NULL, {NULL}},
    {"chunk_size_feed_forward", FIELD_IDLE, NULL, {NULL}},
    {"is_encoder_decoder", FIELD_IDLE, NULL, {NULL}},
    {"id2label", FIELD_IDLE, NULL, {NULL}},
    {"label2id", FIELD_IDLE, NULL, {NULL}},
    {"num_labels", FIELD_IDLE, NULL, {NULL}},
    {"problem_type", FIELD_IDLE, NULL, {NULL}},
    {"torchscript", FIELD_IDLE, NULL, {NULL}},
    {"auto_map", FIELD_IDLE, NULL, {NULL}},
    {"name_or_path", FIELD_IDLE, NULL, {NULL}},
    {"_name_or_path", FIELD_IDLE, NULL, {NULL}},
    {"_commit_hash", FIELD_IDLE, NULL, {NULL}},
    {"attn_implementation", FIELD_IDLE, NULL, {NULL}},
    {"_attn_implementation", FIELD_IDLE, NULL, {NULL}},
    {"_attn_implementation_autoset", FIELD_IDLE, NULL, {NULL}},
    {"experts_implementation", FIELD_IDLE, NULL, {NULL}},
    {"_experts_implementation", FIELD_IDLE, NULL, {NULL}},
    {"max_length", FIELD_IDLE, NULL, {NULL}}, // of generation, which has options of its own
    {"temperature", FIELD_IDLE, NULL, {NULL}},
    {"top_k", FIELD_IDLE, NULL, {NULL}},
    {"top_p", FIELD_IDLE, NULL, {NULL}},
    {"do_sample", FIELD_IDLE, NULL, {NULL}},
};

// ---- reading it

typedef struct ConfigReader {
    const Json *json;
    const char *path;
    int kind; // which of model_classes; -1: a model of this program, which transformers has no class for
    int own;  // 1: this program wrote the file once, and its object train_moe has been read
    char changed[1024], unknown[1024], training[512]; // lists, for the user
} ConfigReader;

// Appends to a list of words; what does not fit is left out.
__attribute__((format(printf, 3, 4))) void list_word(char *list, size_t size, const char *format, ...) {
    size_t used = strlen(list);
    va_list args;
    va_start(args, format);
    if (used && used + 2 < size) {
        memcpy(list + used, ", ", 3);
        used += 2;
    }
    vsnprintf(list + used, size - used, format, args);
    va_end(args);
}

// A member that is there and is not null.
const Json *find_member(const Json *object, const char *name) {
    const Json *m = json_get(object, name);
    return m && m->type != '0' ? m : NULL;
}

__attribute__((noreturn)) void refuse_field(const ConfigReader *r, const char *name, const Json *m, const char *why) {
    char number[32];
    const char *word = m->type == 'a' ? "a list" : json_word(m, number);
    fail("%s: %s is %s: %s", r->path, name, m->type == 'o' ? "an object" : word, why);
}

// null, false, 0, and what is empty.
int is_off(const Json *m) {
    if (m->type == 'a' || m->type == 'o') {
        return !m->child;
    }
    return m->type == 'f' || m->type == '0' || (m->type == 'n' && m->number == 0) || (m->type == 's' && !m->length);
}

// Rotary positions: version 5 of transformers writes them into rope_parameters, older ones beside the other fields and
// into rope_scaling. Where there are several, version 5 takes rope_scaling alone, then rope_parameters.
const Json *rope_member(const Json *json, const char *name) {
    const Json *scaling = find_member(json, "rope_scaling"), *parameters = find_member(json, "rope_parameters");
    const Json *m = find_member(scaling && scaling->child ? scaling : parameters, name);
    return m ? m : find_member(json, name);
}

// No kind of scaling is computed here, wherever the file says it.
void check_rope_fields(const ConfigReader *r, const char *name) {
    static const char *const idle[] = {"rope_theta", "partial_rotary_factor", "original_max_position_embeddings", NULL};
    const Json *rope = find_member(r->json, name);
    if (rope && rope->type != 'o') {
        refuse_field(r, name, rope, "expected an object");
    }
    for (const Json *m = rope ? rope->child : NULL; m; m = m->next) {
        int is_default = m->type == '0' || (m->type == 's' && !strcmp(m->text, "default"));
        int is_one = m->type == 'n' && m->number == 1;
        int kind = !strcmp(m->key, "rope_type") || !strcmp(m->key, "type");
        if (!strcmp(m->key, "partial_rotary_factor") && !is_one && m->type != '0') {
            refuse_field(r, m->key, m, "here positions turn the whole of a head");
        }
        if (!is_default && (kind || !is_one) && find_word(idle, m->key) < 0) {
            char text[96];
            snprintf(text, sizeof(text), "%s's %.40s", name, m->key);
            refuse_field(r, text, m, "its rotary positions are scaled, which this program does not compute");
        }
    }
}

// The value of a field that is an option, as text; NULL where nothing is said of it.
const char *field_text(const ConfigReader *r, const Config *c, const Field *f, char number[64]) {
    int is_theta = !strcmp(f->name, "rope_theta"), is_tied = !strcmp(f->name, "tie_word_embeddings");
    const Json *raw = json_get(r->json, f->name), *m = is_theta ? rope_member(r->json, f->name) : raw;
    const char *text = r->kind < 0 ? "" : f->if_missing[r->kind];
    int heads = !strcmp(f->name, "num_key_value_heads");
    if (!text) {
        return NULL;
    }
    if (m && m->type != '0') {
        if (is_tied ? m->type != 't' && m->type != 'f' : m->type != 'n') {
            refuse_field(r, f->name, m, is_tied ? "expected true or false" : "expected a number");
        }
        if (is_tied) {
            text = m->type == 't' ? "0" : "1"; // the option --untied says the contrary
        } else {
            int is_seq = !strcmp(f->name, "max_position_embeddings");
            text = number_text(is_seq ? fmin(m->number, 1 << 20) : m->number, number);
        }
    } else if (raw && heads) { // null says that each head has its own, in every class
        text = "0";
    }
    if (heads && !strcmp(text, "0")) {
        text = number_text(c->heads, number);
    }
    return *text ? text : NULL;
}

// Takes a field into its option.
void take_field(ConfigReader *r, Config *c, const Field *f) {
    char number[64], old[64], path[4300];
    const char *text = field_text(r, c, f, number);
    const Option *o = &options[find_option(f->what)];
    int is_width = !strcmp(f->name, "intermediate_size") && r->kind == LLAMA; // of a dense layer, which is (K+S)*F wide
    if (!text) {
        return;
    }
    const char *before = option_text(c, o, old);
    if (is_width) {
        before = number_text(dense_width(c, 0), old);
    }
    double now = strtod(text, NULL), was = strtod(before, NULL);
    if (r->own && now == was) {
        return;
    }
    if (r->own && !strcmp(f->what, "untied")) {
        list_word(r->changed, sizeof(r->changed), "%s is %s now", f->name, now != 0 ? "false" : "true");
    } else if (r->own) {
        list_word(r->changed, sizeof(r->changed), "%s %s from %s to %s", f->name, now < was ? "fell" : "rose", before,
                  text);
    }
    if (is_width) {
        c->topk = 1;
        c->shared = 0;
    }
    snprintf(path, sizeof(path), "%s: %s", r->path, f->name);
    set_option(c, o, text, path);
    if (!strcmp(f->what, "seq")) {
        c->seq = min_int(c->seq, 4096); // the cache of generation
    }
}

// What hidden_act is in transformers.
const char *act_name(const Config *c) {
    if (c->activation == SWIGLU || c->activation == RELU) {
        return c->activation == SWIGLU ? "silu" : "relu";
    }
    return "gelu";
}

int head_width(const Config *c); // dev/mixers/attention_experts.h

// Fields that need more than a row of the table says. An LSTM has no heads, and those with experts may have a --head-width.
void check_fields(const ConfigReader *r, const Config *c) {
    int attends = c->mixer == MIX_ATTENTION, shares = attends && !c->head_width, D = head_width(c);
    const Json *act = find_member(r->json, "hidden_act"), *width = find_member(r->json, "head_dim");
    const Json *types = find_member(r->json, "layer_types");
    check_rope_fields(r, "rope_parameters");
    check_rope_fields(r, "rope_scaling");
    if (act) {
        const char *text = act->type == 's' ? act->text : "", *wanted = r->own ? act_name(c) : "silu";
        if (strcmp(text, wanted) && (strcmp(text, "swish") || strcmp(wanted, "silu"))) {
            fail("%s: hidden_act is %s; expected %s", r->path, text, wanted);
        }
    }
    if (shares && c->dim % c->heads) {
        fail("%s: hidden_size %d is no multiple of num_attention_heads %d", r->path, c->dim, c->heads);
    }
    int is_wrong = attends && width && (width->type != 'n' || width->number != D);
    if (is_wrong && shares) {
        fail("%s: head_dim %g is not hidden_size %d / num_attention_heads %d", r->path, width->number, c->dim,
             c->heads);
    }
    if (is_wrong) {
        fail("%s: head_dim %g is not %d, the model's head-width", r->path, width->number, D);
    }
    if (shares && c->dim / c->heads % 2) {
        fail("%s: hidden_size %d / num_attention_heads %d is odd: rotary positions need an even width", r->path,
             c->dim, c->heads);
    }
    if (attends && c->kv_heads && c->heads % c->kv_heads) {
        fail("%s: num_attention_heads %d is no multiple of num_key_value_heads %d", r->path, c->heads, c->kv_heads);
    }
    for (const Json *m = types ? types->child : NULL; m; m = m->next) {
        if (m->type != 's' || strcmp(m->text, "full_attention")) {
            refuse_field(r, "layer_types", m, "each token attends to all before it here");
        }
    }
    if (r->kind != MIXTRAL) {
        return;
    }
    if (c->topk > c->experts) {
        fail("%s: num_experts_per_tok %d is more than num_local_experts %d", r->path, c->topk, c->experts);
    }
    if (c->topk == 1 && c->experts > 1) {
        fail("%s: num_experts_per_tok is 1: a Mixtral makes the weight of its only expert always 1, so that its router "
             "cannot learn, and it is not trained here; set num_experts_per_tok to 2, which makes it another model, or "
             "give a model with more experts a token",
             r->path);
    }
}

// All fields, by the table. What is in none of its rows is named.
void check_rules(ConfigReader *r) {
    for (const Json *m = r->json->child; m; m = m->next) {
        const Field *f = NULL;
        for (int i = 0; i < COUNT(config_fields) && !f; i++) {
            f = strcmp(config_fields[i].name, m->key) ? NULL : &config_fields[i];
        }
        if (m->type == '0') {
            continue;
        }
        if (!f || (f->rule == FIELD_TAKEN && r->kind >= 0 && !f->if_missing[r->kind])) {
            list_word(r->unknown, sizeof(r->unknown), "%s", m->key);
            continue;
        }
        int refused = (f->rule == FIELD_OFF && !is_off(m)) || (f->rule == FIELD_TRUE && m->type != 't');
        if (refused || (f->rule == FIELD_ONE && !(m->type == 'n' && m->number == 1))) {
            refuse_field(r, f->name, m, f->what);
        }
        if (f->rule == FIELD_TRAINING && !is_off(m)) {
            list_word(r->training, sizeof(r->training), "%s", f->name);
        }
    }
}

// How far attention looks back; 0: to the beginning. Llama's class does not look at the field.
int read_window(const ConfigReader *r, Config *c) {
    const Json *m = r->kind == LLAMA ? NULL : find_member(r->json, "sliding_window");
    if (!m) {
        return 0;
    }
    if (m->type != 'n' || !(m->number >= 1)) {
        refuse_field(r, "sliding_window", m, "expected a number of tokens, or null");
    }
    if (m->number < c->seq && r->own) {
        refuse_field(r, "sliding_window", m, "this run's sequences are longer, and attention has no window here");
    }
    c->seq = (int)fmin(m->number, c->seq);
    return (int)fmin(m->number, INT_MAX);
}

const char *matching_class(const Config *c); // data/checkpoint.h

// What the fields of a Mixtral or a Llama say. own: c has what the object train_moe of the same file says, and where
// the two differ the fields count, which other tools change. Returns the length of attention's sliding window, 0: none.
int config_from_hugging_face(Config *c, const Json *json, const char *type, const char *path, int own) {
    ConfigReader r;
    memset(&r, 0, sizeof(r));
    r.json = json;
    r.path = path;
    r.own = own;
    r.kind = -1;
    for (int i = 0; i < CLASSES; i++) {
        r.kind = strcmp(type, model_classes[i].type) ? r.kind : i;
    }
    if (r.kind < 0 && !(own && !strcmp(type, "train_moe"))) {
        fail("%s: model_type is %s; expected mixtral, llama, or a checkpoint of train_moe", path, type);
    }
    if (!own) {
        config_recipe(c, model_classes[r.kind].recipe);
        c->topk = 1; // a dense layer is K*F wide
        c->shared = 0;
    }
    check_rules(&r);
    for (int i = 0; i < COUNT(config_fields); i++) {
        if (config_fields[i].rule == FIELD_TAKEN) {
            take_field(&r, c, &config_fields[i]);
        }
    }
    check_fields(&r, c);
    if (own && r.kind >= 0 && strcmp(matching_class(c), model_classes[r.kind].name)) {
        fail("%s: model_type is %s, but its object train_moe (--recipe %s) says another model: take that object out of "
             "the file if the other fields are right",
             path, type, c->recipe);
    }
    int window = read_window(&r, c);
    if (r.changed[0]) {
        remark("%s: changed since this program wrote it: %s; the changed values are used", path, r.changed);
    }
    if (r.unknown[0]) {
        remark("%s: these fields are unknown, and ignored: %s", path, r.unknown);
    }
    if (r.training[0]) {
        remark("%s: these fields act in training only, and this program has nothing like them: %s", path, r.training);
    }
    return window;
}

// ---- the files beside it

// Says which file of weights is read where there are two kinds, and ends the program where there is only one of a kind
// that is not read.
void check_weight_files(const char *dir, const char *name) {
    char index[256];
    snprintf(index, sizeof(index), "%s.index.json", name);
    int whole = has_file(dir, name), shards = has_file(dir, index);
    if (whole && shards) {
        remark("%s has both %s and %s: the first is read, as transformers does", dir, name, index);
    }
    if (!whole && !shards && (has_file(dir, "pytorch_model.bin") || has_file(dir, "pytorch_model.bin.index.json"))) {
        fail("%s: its weights are in pytorch_model.bin, which is not read here: open it with transformers and save it "
             "by save_pretrained, which writes %s",
             dir, name);
    }
}
