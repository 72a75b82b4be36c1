// The classes of Hugging Face's transformers that compute what this program can compute, and their tensors' names.
// Gives: model_classes, find_class, class_of, matching_class, part_name. Needs: Config and the table of weights of
// train_moe.c, which includes it twice by way of dev/parts.h: inside Config, for the field below (CONFIG_FIELDS), and
// before the model is put together.
//
// A class is one row of model_classes, one column of the table in class_fields.h, and its names in file_names. A model
// is written as the class that it was read from; one that began here, as the first class that computes the same, if
// there is one.
#ifdef CONFIG_FIELDS
    int read_as; // the weights' files have the names of: 0: no files were read; 1: our own models; 2 + a class
#elif !defined(MODEL_CLASSES_H)
#define MODEL_CLASSES_H

enum { MIXTRAL, LLAMA, MISTRAL, QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE, OLMOE, GRANITE_MOE, GRANITE_MOE_SHARED, CLASSES };

enum { NO_LAYERS, ALL_LAYERS, SOME_LAYERS };     // which layers of a class have experts
enum { ANY_NAMES = -1, OUR_NAMES, QWEN_NAMES, GRANITE_NAMES }; // how its files call what belongs to experts; ours are Mixtral's
enum { NO_WINDOW, HAS_WINDOW, WINDOW_IF_USED };  // does it look at sliding_window? IF_USED: where use_sliding_window is true
enum { NOT_SHARED, SHARED, SHARED_GATED };       // experts that every token passes; with a gate, dev/shared_expert.h

typedef struct ModelClass {
    const char *type, *name;    // model_type in config.json; the class itself
    const char *recipe;         // what computes the same,
    const char *choices;        // with these options, which no field of config.json says
    int experts, names, window; // of the enums above
    int gate;                   // weights of chosen experts: PROBABILITY, RENORMALIZED, or EITHER, as a field says
    int qk_norm;                // norms of queries and keys: 0: none, 1: of each head, 2: of the whole row
    int qkv_bias;               // 0, 1, or EITHER, as a field says
    int shared;
    int vocab;                  // where config.json does not say it
} ModelClass;

enum { EITHER = -1 };

const ModelClass model_classes[CLASSES] = {
    {"mixtral", "MixtralForCausalLM", "mixtral", "",
     ALL_LAYERS, OUR_NAMES, HAS_WINDOW, RENORMALIZED, 0, 0, NOT_SHARED, 32000},
    {"llama", "LlamaForCausalLM", "dense", "",
     NO_LAYERS, OUR_NAMES, NO_WINDOW, EITHER, 0, 0, NOT_SHARED, 32000},
    {"mistral", "MistralForCausalLM", "dense", "",
     NO_LAYERS, OUR_NAMES, HAS_WINDOW, EITHER, 0, 0, NOT_SHARED, 32000},
    {"qwen2", "Qwen2ForCausalLM", "dense", "--qkv-bias",
     NO_LAYERS, OUR_NAMES, WINDOW_IF_USED, EITHER, 0, 1, NOT_SHARED, 151936},
    {"qwen3", "Qwen3ForCausalLM", "dense", "--qk-norm",
     NO_LAYERS, OUR_NAMES, WINDOW_IF_USED, EITHER, 1, 0, NOT_SHARED, 151936},
    {"qwen2_moe", "Qwen2MoeForCausalLM", "mixtral", "--qkv-bias --shared 1 --shared-gate",
     SOME_LAYERS, QWEN_NAMES, WINDOW_IF_USED, EITHER, 0, EITHER, SHARED_GATED, 151936},
    {"qwen3_moe", "Qwen3MoeForCausalLM", "qwen3", "--qk-norm",
     SOME_LAYERS, QWEN_NAMES, WINDOW_IF_USED, EITHER, 1, 0, NOT_SHARED, 151936},
    {"olmoe", "OlmoeForCausalLM", "olmoe", "--qk-norm --qk-norm-over row",
     ALL_LAYERS, QWEN_NAMES, NO_WINDOW, EITHER, 2, 0, NOT_SHARED, 50304},
    {"granitemoe", "GraniteMoeForCausalLM", "mixtral", "",
     ALL_LAYERS, GRANITE_NAMES, NO_WINDOW, RENORMALIZED, 0, 0, NOT_SHARED, 32000},
    {"granitemoeshared", "GraniteMoeSharedForCausalLM", "mixtral", "--shared 1",
     ALL_LAYERS, GRANITE_NAMES, NO_WINDOW, RENORMALIZED, 0, 0, SHARED, 32000},
};

// The class of this model_type, -1: none of ours.
int find_class(const char *type) {
    int k = CLASSES - 1;
    while (k >= 0 && strcmp(type, model_classes[k].type)) {
        k--;
    }
    return k;
}

// All their model_types in a row, for a message.
void list_classes(char *list, size_t size) {
    size_t used = 0;
    for (int k = 0; k < CLASSES && used < size; k++) {
        used += (size_t)snprintf(list + used, size - used, "%s%s", k ? ", " : "", model_classes[k].type);
    }
}

// ---- which class computes this model

// Do the mixtures of class k compute what those of this model do?
int fits_experts(const Config *c, const ModelClass *k) {
    int moe = moe_layers(c), shared = NOT_SHARED;
    if (c->shared) {
        shared = c->shared_gate ? SHARED_GATED : SHARED;
    }
    int plain = c->activation == SWIGLU && !c->mixed && c->subtokens == 1 && !c->recurrent;
    plain &= choosing_router(c) == &topk_router; // of the other routers transformers knows nothing
    plain &= c->score == SOFTMAX && c->scale == 1 && !c->bias_rate && !c->eval_capacity_factor;
    plain &= k->gate == EITHER || k->gate == c->gate;
    plain &= k->shared == shared || (k->shared == SHARED && !c->shared); // that class may have a width of 0
    if (moe < c->layers) {
        plain &= k->experts == SOME_LAYERS && (c->dense_activation == SAME || c->dense_activation == SWIGLU);
    }
    return plain;
}

int fits_class(const Config *c, const ModelClass *k) {
    int moe = moe_layers(c) > 0, normed = c->qk_norm ? 1 + (c->qk_norm_over == OVER_ROW) : 0;
    if (c->blocks || c->ngrams || c->value_embedding || mixer_of(c) || !c->norms || !c->last_feed || c->moe_sigmoid) {
        return 0;
    }
    if (normed != k->qk_norm || (k->qkv_bias != EITHER && c->qkv_bias != k->qkv_bias) || moe != (k->experts != NO_LAYERS)) {
        return 0;
    }
    return moe ? fits_experts(c, k) : dense_activation(c, 0) == SWIGLU;
}

// The class that computes what this model does, preferably the one that it was read from; -1: there is none.
int class_of(const Config *c) {
    int k = c->read_as - 2;
    if (k >= 0 && fits_class(c, &model_classes[k])) {
        return k;
    }
    for (k = 0; k < CLASSES; k++) {
        if (fits_class(c, &model_classes[k])) {
            return k;
        }
    }
    return -1;
}

// Its name; "" where there is none.
const char *matching_class(const Config *c) {
    int k = class_of(c);
    return k < 0 ? "" : model_classes[k].name;
}

// ---- names

// What files call each kind of tensor: more than one name where they store blocks of its rows apart. A kind that is not
// here, of dev/routers, keeps its own name. shared_in and shared_out are dense_in and dense_out beside experts.
const struct {
    int names; // of classes of this kind; ANY_NAMES: of all others
    const char *kind, *blocks[3];
} file_names[] = {
    {QWEN_NAMES, "router", {"mlp.gate.weight"}},
    {QWEN_NAMES, "w_in", {"mlp.experts.%d.gate_proj.weight", "mlp.experts.%d.up_proj.weight"}},
    {QWEN_NAMES, "w_out", {"mlp.experts.%d.down_proj.weight"}},
    {QWEN_NAMES, "shared_in", {"mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"}},
    {QWEN_NAMES, "shared_out", {"mlp.shared_expert.down_proj.weight"}},
    {GRANITE_NAMES, "router", {"block_sparse_moe.router.layer.weight"}},
    {GRANITE_NAMES, "w_in", {"block_sparse_moe.input_linear.weight"}}, // of all experts, gate and up
    {GRANITE_NAMES, "w_out", {"block_sparse_moe.output_linear.weight"}},
    {GRANITE_NAMES, "shared_in", {"shared_mlp.input_linear.weight"}},
    {GRANITE_NAMES, "shared_out", {"shared_mlp.output_linear.weight"}},
    {ANY_NAMES, "embed", {"model.embed_tokens.weight"}},
    {ANY_NAMES, "ngrams", {"model.embed_ngrams.weight"}},
    {ANY_NAMES, "norm1", {"input_layernorm.weight"}},
    {ANY_NAMES, "qkv", {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"}},
    {ANY_NAMES, "qkv_bias", {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"}},
    {ANY_NAMES, "q_norm", {"self_attn.q_norm.weight"}},
    {ANY_NAMES, "k_norm", {"self_attn.k_norm.weight"}},
    {ANY_NAMES, "value_embed", {"self_attn.value_embedding.weight"}},
    {ANY_NAMES, "proj", {"self_attn.o_proj.weight"}},
    {ANY_NAMES, "ngram_key", {"ngram_gate.key.weight"}},
    {ANY_NAMES, "ngram_value", {"ngram_gate.value.weight"}},
    {ANY_NAMES, "query_key", {"self_attn.qk_proj.weight"}},
    {ANY_NAMES, "key_value", {"self_attn.kv_proj.weight"}},
    {ANY_NAMES, "query_experts", {"self_attn.q_experts.weight"}},
    {ANY_NAMES, "value_router", {"self_attn.v_gate.weight"}},
    {ANY_NAMES, "value_experts", {"self_attn.v_experts.weight"}},
    {ANY_NAMES, "output_router", {"self_attn.o_gate.weight"}},
    {ANY_NAMES, "output_experts", {"self_attn.o_experts.weight"}},
    {ANY_NAMES, "lstm_in", {"lstm.weight_ih_l0"}}, // the names and shapes of PyTorch's nn.LSTM, whose bias_hh_l0 is 0 here
    {ANY_NAMES, "lstm_state", {"lstm.weight_hh_l0"}},
    {ANY_NAMES, "lstm_bias", {"lstm.bias_ih_l0"}},
    {ANY_NAMES, "lstm_proj", {"lstm.weight_hr_l0"}},
    {ANY_NAMES, "norm2", {"post_attention_layernorm.weight"}},
    {ANY_NAMES, "router", {"block_sparse_moe.gate.weight"}},
    {ANY_NAMES, "w_in", {"block_sparse_moe.experts.%d.w1.weight", "block_sparse_moe.experts.%d.w3.weight"}},
    {ANY_NAMES, "w_out", {"block_sparse_moe.experts.%d.w2.weight"}},
    {ANY_NAMES, "dense_in", {"mlp.gate_proj.weight", "mlp.up_proj.weight"}},
    {ANY_NAMES, "dense_out", {"mlp.down_proj.weight"}},
    {ANY_NAMES, "shared_in", {"mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"}},
    {ANY_NAMES, "shared_out", {"mlp.shared_experts.down_proj.weight"}},
    {ANY_NAMES, "shared_router", {"mlp.shared_expert_gate.weight"}},
    {ANY_NAMES, "split", {"block_sparse_moe.split.weight"}},
    {ANY_NAMES, "merge", {"block_sparse_moe.merge.weight"}},
    {ANY_NAMES, "project", {"block_sparse_moe.project.weight"}},
    {ANY_NAMES, "bias", {"block_sparse_moe.gate.e_score_correction_bias"}},
    {ANY_NAMES, "slow", {"block_sparse_moe.gate.moving_average"}},
    {ANY_NAMES, "level", {"block_sparse_moe.gate.level"}},
    {ANY_NAMES, "norm", {"model.norm.weight"}},
    {ANY_NAMES, "head", {"lm_head.weight"}},
    {ANY_NAMES, "gru_x", {"model.router_gru.weight_ih"}},
    {ANY_NAMES, "gru_h", {"model.router_gru.weight_hh"}},
    {ANY_NAMES, "gru_bx", {"model.router_gru.bias_ih"}},
    {ANY_NAMES, "gru_bh", {"model.router_gru.bias_hh"}},
};

// The name of a block of rows of a tensor, in files with such names; of its expert e, where it has experts.
void part_name(char name[96], const Config *c, int names, const Tensor *t, int e, int block) {
    const char *format = NULL, *kind = t->kind;
    if (!strncmp(kind, "dense_", 6) && is_moe(c, t->layer)) {
        kind = strcmp(kind, "dense_in") ? "shared_out" : "shared_in";
    }
    for (int i = 0; i < COUNT(file_names) && !format; i++) {
        int is_it = file_names[i].names == names || file_names[i].names == ANY_NAMES;
        format = is_it && !strcmp(file_names[i].kind, kind) ? file_names[i].blocks[block] : NULL;
    }
    size_t used = 0, size = 96;
    if (t->layer >= 0) {
        used = (size_t)snprintf(name, size, "model.layers.%d.", t->layer);
    }
    if (format) {
        snprintf(name + used, size - used, format, e);
    } else {
        snprintf(name + used, size - used, "%s.%s", t->layer < 0 ? "model" : "block_sparse_moe", t->kind);
    }
}

#endif
