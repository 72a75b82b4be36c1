// What stands in attention's place and mixes along the sequence: the struct that an LSTM, say, fills in.
// Gives: Mixer, layer_mixer. Needs: Model, Tensor and Option of train_moe.c, which includes it by way of all.h.
//
// The lesson asks for a mixer in three lines, add_mixer_tensors(), mixer_forward() and mixer_backward(), and has attention where
// there is none. Of the functions refuses, init, uses, flops and scratch may be NULL, where a mixer has nothing to say. N is m->batch.B * m->batch.T; x (N,C) is what the layer's first
// norm gave.
#ifndef MIXER_H
#define MIXER_H

typedef struct Mixer {
    int (*wanted)(const Config *c);          // do the options ask for it?
    const char *(*refuses)(const Config *c); // why it cannot do what the options ask for; NULL: it can
    void (*tensors)(const Config *c, int l, Tensor *list, int *count);  // adds its weights of layer l
    void (*init)(const Model *m, int i, real *w); // changes the first values w of tensor i, if they are not random numbers
    // Lays its activations for N tokens of layer l from `memory` on, and returns how many numbers they are; with memory
    // NULL it only counts. With --recompute all layers share that memory. It keeps its pointers in
    // m->acts.layer[l].mixer.
    size_t (*lay)(Model *m, int l, int N, real *memory);
    void (*forward)(Model *m, int l, real *out, const real *x); // out (N,C) += what it makes of x
    // Given dout (N,C): writes dx (N,C), and adds to the gradients of its weights.
    void (*backward)(Model *m, int l, real *dx, const real *dout, const real *x);
    // Generation: one token at `position`, x (C), and out (C) += what it makes of it. The cache is what it keeps of a layer from one token
    // to the next: cache() numbers, which are 0 before the first token.
    size_t (*cache)(const Config *c);
    void (*step)(Model *one, int l, real *out, const real *x, real *cache, int position);
    double (*uses)(const Config *c, const Tensor *t); // how often a token uses a tensor of the mixer; NULL: once
    double (*flops)(const Config *c); // operations of a token's forward pass in one layer, but for products with weights
    size_t (*scratch)(const Config *c, int N, int train); // numbers of scratch memory for N tokens; NULL: hardly any
    const Option *options;
    int option_count;
    const Effect *effects; // what its options need to have an effect
    int effect_count;
    const Recipe *recipes;
    int recipe_count;
} Mixer;

#endif
