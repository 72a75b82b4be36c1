// What may stand in attention's place, one a file, and which of them the options ask for.
// Gives: all_mixers, mixer_of, mixer_forward, mixer_backward, add_mixer_tensors, init_mixer_tensor, mixer_uses, mixing_flops,
// mixing_scratch, mixer_refuses, add_mixer_options.
// Needs: train_moe.c, which includes it twice: inside Config, for the fields of the mixers' options (CONFIG_FIELDS), and
// behind the table of weights. A new mixer is a file, its #include here, and its name in all_mixers; names of its weights in
// data/checkpoint.h; a word of --mixer in ../options.h, or an option of its own; and for a GPU a file in ../cuda/mixers.
#ifdef CONFIG_FIELDS
    int mixer; // --mixer: MIX_ATTENTION, with experts or without, or MIX_LSTM
#elif !defined(MIXERS_H)
#include "mixer.h"
#endif

#include "attention_experts.h" // what the next two have in common: routers of heads
#include "switchhead.h"        // attention whose heads have experts
#include "moa.h"               // attention whose heads are experts
#include "lstm.h" // an LSTM: each token reads a state that the tokens before it have left

#if !defined(CONFIG_FIELDS) && !defined(MIXERS_H)
#define MIXERS_H

const Mixer *const all_mixers[] = {
    &switchhead_mixer,
    &moa_mixer,
    &lstm_mixer,
    NULL,
};

// The mixer that the options ask for; NULL: the lesson's attention.
const Mixer *mixer_of(const Config *c) {
    for (int i = 0; all_mixers[i]; i++) {
        if (all_mixers[i]->wanted(c)) {
            return all_mixers[i];
        }
    }
    return NULL;
}

// out (N,C) += what the layer's mixer makes of x (N,C). Returns 0, and does nothing, where the model has the lesson's attention.
// All layers have the same mixer.
int mixer_forward(Model *m, int l, real *out, const real *x) {
    const Mixer *mixer = mixer_of(&m->config);
    if (mixer) {
        mixer->forward(m, l, out, x);
    }
    return mixer != NULL;
}

// Given dout (N,C), writes dx (N,C). Returns 0, and does nothing, where the model has the lesson's attention.
int mixer_backward(Model *m, int l, real *dx, const real *dout, const real *x) {
    const Mixer *mixer = mixer_of(&m->config);
    if (mixer) {
        mixer->backward(m, l, dx, dout, x);
    }
    return mixer != NULL;
}

// The weights of layer l's mixer. Returns 0, and adds none, where the model has the lesson's attention.
int add_mixer_tensors(const Config *c, int l, Tensor *list, int *count) {
    const Mixer *mixer = mixer_of(c);
    if (mixer) {
        mixer->tensors(c, l, list, count);
    }
    return mixer != NULL;
}

// First values w of tensor i that the mixer wants otherwise: of its own weights, or, as the LSTM without norms, of the embedding.
void init_mixer_tensor(const Model *m, int i, real *w) {
    const Mixer *mixer = mixer_of(&m->config);
    if (mixer && mixer->init) {
        mixer->init(m, i, w);
    }
}

// How often a token uses a tensor of the mixer.
double mixer_uses(const Config *c, const Tensor *t) {
    const Mixer *mixer = mixer_of(c);
    return mixer && mixer->uses ? mixer->uses(c, t) : 1;
}

// Operations of one token's forward pass in what mixes, but for products with weights. Attention has two products of (T,T)
// with (T,D) for each head, of which causality leaves half.
double mixing_flops(const Config *c) {
    const Mixer *mixer = mixer_of(c);
    if (!mixer) {
        return 2.0 * c->seq * c->heads * head_width(c);
    }
    return mixer->flops ? mixer->flops(c) : 0;
}

// Numbers of scratch memory that the mixer takes for N tokens.
size_t mixing_scratch(const Config *c, int N, int train) {
    const Mixer *mixer = mixer_of(c);
    return mixer ? mixer->scratch(c, N, train) : 0;
}

// Why the mixer cannot do what the options ask for; NULL: it can.
const char *mixer_refuses(const Config *c) {
    const Mixer *mixer = mixer_of(c);
    return mixer && mixer->refuses ? mixer->refuses(c) : NULL;
}

// The mixers' options and recipes join the others.
void add_mixer_options(void) {
    for (int i = 0; all_mixers[i]; i++) {
        add_options(all_mixers[i]->options, all_mixers[i]->option_count);
        add_recipes(all_mixers[i]->recipes, all_mixers[i]->recipe_count);
        add_effects(all_mixers[i]->effects, all_mixers[i]->effect_count);
    }
}

#endif
