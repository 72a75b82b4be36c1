// What a layer may have besides, each a room of its own.
// Gives: what they give; parts_refuse, qkv_parts_forward, qkv_parts_backward. Needs: train_moe.c, which includes it twice: inside Config, for the fields of their
// options (CONFIG_FIELDS), and before the layers are put together.
#include "lora.h"          // --lora: low-rank pairs beside frozen matrices
#include "rope.h"          // --rope-scaling: slower rotary positions, for longer texts
#include "qkv.h"           // --qkv-bias: a vector that is added to queries, keys and values
#include "qk_norm.h"       // --qk-norm: queries and keys with a norm of their own
#include "lookup.h"        // --value-embedding: each word has a vector that is added to its values
#include "ngrams.h"        // --ngrams: each pair of words has one, and each triple, before layer 0 and in each layer
#include "residual.h"      // --norms, --dropout, --moe-sigmoid: what stands between a layer's halves and the residual stream
#include "shared_expert.h" // --shared-gate, --shared-ffn, --dense-ffn: shared experts with a gate, and widths of their own
#include "quantized.h"     // --quantize: matrices in blocks of few bits
#include "offload.h"       // --offload: experts that are in a file until they are needed
#include "teacher.h"       // --teacher: a trained model teaches the one in training
#include "ranks/compress.h" // --compress: gradients in fewer bits between processes
#include "../data/model_classes.h" // the class of transformers as which the model is written
#include "../data/granite.h"       // the factors of a Granite that is read
#if !defined(CONFIG_FIELDS) && !defined(PARTS_H)
#define PARTS_H

// Why these parts cannot do what the options ask for; NULL: they can.
const char *parts_refuse(const Config *c) {
    if (c->qkv_bias && mixer_of(c)) {
        return "--qkv-bias goes with attention without experts: --mixer attention and --attention-experts 0";
    }
    if (c->qk_norm && c->qk_norm_over == OVER_ROW && mixer_of(c)) {
        return "--qk-norm-over row goes with attention without experts: --mixer attention and --attention-experts 0";
    }
    if (c->mixer == MIX_ATTENTION && c->head_width % 2) {
        return "--head-width: heads must have an even width for rotary positions";
    }
    if (c->rope_scaling == ROPE_LLAMA3 && c->rope_low >= c->rope_high) {
        return "--rope-low must be less than --rope-high";
    }
    return blocks_refuse(c) ? blocks_refuse(c) : offload_refuses(c);
}

// What layer l may do with queries, keys and values, qkv (N,(H+2KV)*D), before positions turn them; and the way back, for
// their gradient. Most models do nothing here.
void qkv_parts_forward(Model *m, int l, real *qkv) {
    qkv_bias_forward(m, l, qkv);
    qk_norm_forward(m, l, qkv);
    value_embedding_forward(m, l, qkv);
}

void qkv_parts_backward(Model *m, int l, real *dqkv) {
    value_embedding_backward(m, l, dqkv);
    qk_norm_backward(m, l, dqkv);
    qkv_bias_backward(m, l, dqkv);
}

#endif
