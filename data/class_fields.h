// The fields of Hugging Face's config.json, class by class: which are options here, which must have one value, which do
// nothing.
// Gives: taken_fields, other_fields, find_taken. Needs: data/model_classes.h, whose classes are the columns;
// data/hugging_face.h reads by these tables, data/checkpoint.h writes by them.
//
// A field that changes what the model computes is taken, or refused by its name; the others are known to be idle, or
// named once. A field that a file lacks has the value that its class documents (the configuration classes of
// transformers 5.24).
#pragma once
#include "model_classes.h"

// How a field says what its option says.
enum {
    AS_NUMBER,
    AS_FLAG,  // true: 1
    AS_NOT,   // true: 0
    AS_GATE,  // true: renormalized, false: probability
    AS_WIDTH, // of a dense model's layer, which is (K+S)*F wide
    AS_HEADS, // null: as many as heads of queries
    AS_HEAD,  // width of a head; null: C/H
    AS_DENSE, // width of the dense layers between those with experts
    AS_SHARED // width of the shared experts together
};

#define OURS CLASSES // the column of models that no class computes

typedef struct TakenField {
    const char *name, *option;
    int form;
    const char *if_missing[CLASSES + 1]; // its value where a file lacks it; "": as it was; NULL: it is not of this class
} TakenField;

// Columns: mixtral, llama, mistral, qwen2, qwen3, qwen2_moe, qwen3_moe, olmoe, granitemoe, granitemoeshared, ours. A
// class's first row for an option is the one that is written.
const TakenField taken_fields[] = {
    {"hidden_size", "dim", AS_NUMBER, {"4096", "4096", "4096", "4096", "4096", "2048", "2048", "2048", "4096", "4096", ""}},
    {"intermediate_size", "ffn", AS_NUMBER, {"14336", NULL, NULL, NULL, NULL, NULL, NULL, "2048", "11008", "11008", ""}},
    {"intermediate_size", "ffn", AS_WIDTH, {NULL, "11008", "14336", "22016", "22016", NULL, NULL, NULL, NULL, NULL, NULL}},
    {"moe_intermediate_size", "ffn", AS_NUMBER, {NULL, NULL, NULL, NULL, NULL, "1408", "768", NULL, NULL, NULL, NULL}},
    {"num_hidden_layers", "layers", AS_NUMBER, {"32", "32", "32", "32", "32", "24", "24", "16", "32", "32", ""}},
    {"num_attention_heads", "heads", AS_NUMBER, {"32", "32", "32", "32", "32", "16", "32", "16", "32", "32", ""}},
    {"num_key_value_heads", "kv-heads", AS_HEADS, {"8", "0", "8", "32", "32", "16", "4", "0", "0", "0", ""}},
    {"head_dim", "head-width", AS_HEAD, {"0", "0", "0", "0", "128", "0", "0", "0", "0", "0", ""}},
    {"num_local_experts", "experts", AS_NUMBER, {"8", NULL, NULL, NULL, NULL, NULL, NULL, NULL, "8", "8", NULL}},
    {"num_experts", "experts", AS_NUMBER, {"", NULL, NULL, NULL, NULL, "60", "128", "64", NULL, NULL, NULL}},
    {"num_local_experts", "experts", AS_NUMBER, {NULL, NULL, NULL, NULL, NULL, NULL, "", "", NULL, NULL, NULL}},
    {"num_experts_per_tok", "topk", AS_NUMBER, {"2", NULL, NULL, NULL, NULL, "4", "8", "8", "2", "2", NULL}},
    {"norm_topk_prob", "gate", AS_GATE, {NULL, NULL, NULL, NULL, NULL, "probability", "probability", "probability", NULL, NULL, NULL}},
    {"qkv_bias", "qkv-bias", AS_FLAG, {NULL, NULL, NULL, NULL, NULL, "1", NULL, NULL, NULL, NULL, NULL}},
    {"shared_expert_intermediate_size", "shared-ffn", AS_SHARED, {NULL, NULL, NULL, NULL, NULL, "5632", NULL, NULL, NULL, NULL, NULL}},
    {"shared_intermediate_size", "shared-ffn", AS_SHARED, {NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, "0", NULL}},
    {"max_position_embeddings", "seq", AS_NUMBER,
     {"131072", "2048", "131072", "32768", "32768", "32768", "32768", "4096", "2048", "2048", ""}},
    {"rms_norm_eps", "norm-eps", AS_NUMBER, {"1e-5", "1e-6", "1e-6", "1e-6", "1e-6", "1e-6", "1e-6", "1e-5", "1e-6", "1e-6", ""}},
    {"rope_theta", "rope-theta", AS_NUMBER, // also in rope_parameters and rope_scaling
     {"1e6", "10000", "10000", "10000", "10000", "10000", "10000", "10000", "10000", "10000", ""}},
    {"tie_word_embeddings", "untied", AS_NOT, {"1", "1", "1", "1", "1", "1", "1", "1", "1", "1", ""}},

    // Last, when it is known which layers have experts.
    {"intermediate_size", "dense-ffn", AS_DENSE, {NULL, NULL, NULL, NULL, NULL, "5632", "6144", NULL, NULL, NULL, NULL}},
};

// The row of a field for class k, or for our own models where k is OURS; NULL: it is no option of theirs.
const TakenField *find_taken(const char *name, int k) {
    for (int i = 0; i < COUNT(taken_fields); i++) {
        if (!strcmp(taken_fields[i].name, name) && taken_fields[i].if_missing[k]) {
            return &taken_fields[i];
        }
    }
    return NULL;
}

// The row that is written: the class's first one for its option.
int is_written(const TakenField *f, int k) {
    const TakenField *first = taken_fields;
    while (strcmp(first->option, f->option) || !first->if_missing[k]) {
        first++;
    }
    return first == f;
}

// ---- the fields that are no option

enum {
    FIELD_OFF,      // only null, false, 0 or nothing
    FIELD_ONE,      // only 1
    FIELD_TRUE,     // only true
    FIELD_CHECKED,  // by a function of its own, in hugging_face.h
    FIELD_TRAINING, // it acts in training only, and here not at all: said if it is not 0
    FIELD_IDLE      // it changes nothing
};

#define OF_GRANITE (1 << GRANITE_MOE | 1 << GRANITE_MOE_SHARED)
#define OF_LAYERS (1 << QWEN2_MOE | 1 << QWEN3_MOE) // classes whose layers need not all have experts

typedef struct Field {
    const char *name;
    int rule;
    const char *what; // why another value is refused
    int checked;      // classes, as bits, for which a function of its own reads it
} Field;

const Field other_fields[] = {
    {"rope_parameters", FIELD_CHECKED, NULL, 0},
    {"rope_scaling", FIELD_CHECKED, NULL, 0},
    {"hidden_act", FIELD_CHECKED, NULL, 0},
    {"sliding_window", FIELD_CHECKED, NULL, 0},
    {"use_sliding_window", FIELD_CHECKED, NULL, 0},
    {"max_window_layers", FIELD_CHECKED, NULL, 0},
    {"layer_types", FIELD_CHECKED, NULL, 0},

    {"rope_interleaved", FIELD_OFF, "positions turn the two halves of a head here", 0},
    {"use_mrope", FIELD_OFF, "a token has one position here", 0},
    {"alibi", FIELD_OFF, "positions turn heads here", 0},
    {"partial_rotary_factor", FIELD_ONE, "here positions turn the whole of a head", 0},
    {"attention_bias", FIELD_OFF, "attention's output has no bias here (and those of queries, keys and values only Qwen2 says)", 0},
    {"qkv_bias", FIELD_OFF, "only a Qwen2Moe says by this field that it has biases", 0},
    {"mlp_bias", FIELD_OFF, "feed-forward layers have no biases here", 0},
    {"attn_bias", FIELD_OFF, "attention's output has no bias here", 0},
    {"attention_out_bias", FIELD_OFF, "attention's output has no bias here", 0},
    {"use_bias", FIELD_OFF, "this model has no biases", 0},
    {"clip_qkv", FIELD_OFF, "queries, keys and values are not clipped here", 0},
    {"qk_norm", FIELD_OFF, "whether queries and keys have norms, the class says", 0},
    {"use_qk_norm", FIELD_OFF, "whether queries and keys have norms, the class says", 0},
    {"qk_layernorm", FIELD_OFF, "whether queries and keys have norms, the class says", 0},
    {"attn_logit_softcapping", FIELD_OFF, "scores of attention have no cap here", 0},
    {"final_logit_softcapping", FIELD_OFF, "logits have no cap here", 0},
    {"logits_soft_cap", FIELD_OFF, "logits have no cap here", 0},
    {"query_pre_attn_scalar", FIELD_OFF, "scores of attention are divided by the root of a head's width here", 0},
    {"attention_multiplier", FIELD_OFF, "only a Granite has this factor", OF_GRANITE},
    {"embedding_multiplier", FIELD_ONE, "only a Granite has this factor", OF_GRANITE},
    {"residual_multiplier", FIELD_ONE, "only a Granite has this factor", OF_GRANITE},
    {"logits_scaling", FIELD_ONE, "only a Granite has this factor", OF_GRANITE},
    {"logit_scale", FIELD_ONE, "logits are not multiplied by a factor here", 0},
    {"routed_scaling_factor", FIELD_ONE, "this class does not multiply its experts' weights by a factor", 0},
    {"norm_topk_prob", FIELD_TRUE, "this class divides the weights of the chosen experts by their sum", 0},
    {"mlp_only_layers", FIELD_OFF, "all layers of this class are alike", OF_LAYERS},
    {"decoder_sparse_step", FIELD_ONE, "all layers of this class are alike", OF_LAYERS},
    {"first_k_dense_replace", FIELD_OFF, "this class has no field for it", 0},
    {"n_shared_experts", FIELD_OFF, "this class has no such shared experts", 0},
    {"num_shared_experts", FIELD_OFF, "this class has no such shared experts", 0},
    {"shared_expert_intermediate_size", FIELD_OFF, "this class has no such shared experts", 0},
    {"shared_intermediate_size", FIELD_OFF, "this class has no such shared experts", 0},
    {"per_layer_config", FIELD_OFF, "all layers are alike here", 0},
    {"pruned_heads", FIELD_OFF, "all layers are alike here", 0},
    {"quantization_config", FIELD_OFF, "its numbers are quantized; give the model that it was made of", 0},
    {"transformers_weights", FIELD_OFF, "the weights must be in model.safetensors, or in what its index lists", 0},

    {"attention_dropout", FIELD_TRAINING, NULL, 0},
    {"hidden_dropout", FIELD_TRAINING, NULL, 0},
    {"resid_pdrop", FIELD_TRAINING, NULL, 0},
    {"embd_pdrop", FIELD_TRAINING, NULL, 0},
    {"router_jitter_noise", FIELD_TRAINING, NULL, 0},

    {"train_moe", FIELD_IDLE, NULL, 0}, // read before
    {"comment", FIELD_IDLE, NULL, 0},
    {"vocab_size", FIELD_IDLE, NULL, 0}, // read before
    {"model_type", FIELD_IDLE, NULL, 0}, // read before
    {"architectures", FIELD_IDLE, NULL, 0},
    {"dtype", FIELD_IDLE, NULL, 0}, // each tensor says what numbers it has
    {"torch_dtype", FIELD_IDLE, NULL, 0},
    {"transformers_version", FIELD_IDLE, NULL, 0},
    {"bos_token_id", FIELD_IDLE, NULL, 0},
    {"eos_token_id", FIELD_IDLE, NULL, 0},
    {"pad_token_id", FIELD_IDLE, NULL, 0},
    {"unk_token_id", FIELD_IDLE, NULL, 0},
    {"initializer_range", FIELD_IDLE, NULL, 0},
    {"use_cache", FIELD_IDLE, NULL, 0},
    {"pretraining_tp", FIELD_IDLE, NULL, 0}, // the same products, in pieces
    {"router_aux_loss_coef", FIELD_IDLE, NULL, 0}, // a run has the options of its own training
    {"output_router_logits", FIELD_IDLE, NULL, 0},
    {"output_attentions", FIELD_IDLE, NULL, 0},
    {"output_hidden_states", FIELD_IDLE, NULL, 0},
    {"tie_last_hidden_states", FIELD_IDLE, NULL, 0},
    {"return_dict", FIELD_IDLE, NULL, 0},
    {"chunk_size_feed_forward", FIELD_IDLE, NULL, 0},
    {"is_encoder_decoder", FIELD_IDLE, NULL, 0},
    {"id2label", FIELD_IDLE, NULL, 0},
    {"label2id", FIELD_IDLE, NULL, 0},
    {"num_labels", FIELD_IDLE, NULL, 0},
    {"problem_type", FIELD_IDLE, NULL, 0},
    {"torchscript", FIELD_IDLE, NULL, 0},
    {"auto_map", FIELD_IDLE, NULL, 0},
    {"is_llama_config", FIELD_IDLE, NULL, 0},
    {"transformers.js_config", FIELD_IDLE, NULL, 0},
    {"name_or_path", FIELD_IDLE, NULL, 0},
    {"_name_or_path", FIELD_IDLE, NULL, 0},
    {"_commit_hash", FIELD_IDLE, NULL, 0},
    {"attn_implementation", FIELD_IDLE, NULL, 0},
    {"_attn_implementation", FIELD_IDLE, NULL, 0},
    {"_attn_implementation_autoset", FIELD_IDLE, NULL, 0},
    {"experts_implementation", FIELD_IDLE, NULL, 0},
    {"_experts_implementation", FIELD_IDLE, NULL, 0},
    {"max_length", FIELD_IDLE, NULL, 0}, // of generation, which has options of its own
    {"temperature", FIELD_IDLE, NULL, 0},
    {"top_k", FIELD_IDLE, NULL, 0},
    {"top_p", FIELD_IDLE, NULL, 0},
    {"do_sample", FIELD_IDLE, NULL, 0},
};
