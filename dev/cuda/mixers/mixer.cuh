// What mixes along the sequence in attention's place, on the device: as struct Mixer of dev/mixers/mixer.h.
// Gives: MixerKernels, mixer_kernels, lay_mixer, mixer_scratch, mixer_cache, layer_cache, mixer_forward, mixer_backward.
// Needs: Model of train_moe.cu, which includes it, and its memory (dev/cuda/memory.cuh); dev/mixers.
//
// A mixer's weights are in the table, so layer_tensor() finds them, and low_of() their rounded copies. What it keeps of a
// layer from forward to backward is in a struct of its own, of the host, to which m->layers[l].mixer points.
#ifndef CUDA_MIXER_CUH
#define CUDA_MIXER_CUH

struct MixerKernels { // what dev/mixers says in C of a mixer: its functions on the device
    const ::Mixer *of;
    const char *(*refuses)(const Config *c); // sizes that the kernels do not have; NULL: they have them
    // Lays what layer l keeps for N tokens from `memory` on, and returns its bytes. With memory NULL it only counts.
    size_t (*lay)(Model *m, int l, int N, char *memory);
    // Bytes of scratch memory that forward, or with train 1 forward or backward, take for N tokens: see scratch_bytes().
    size_t (*scratch)(const Config *c, int N, int train);
    size_t (*cache)(const Config *c); // bytes that generation keeps of one layer
    // out (N,C) = what is added to the residual stream, from x (N,C). In generation (m->cache; one token, at m->position)
    // it goes on from the state in layer_cache(m, l).
    void (*forward)(Model *m, int l, floatX *out, const floatX *x);
    // dx (N,C) = the gradient by x, given dout (N,C). Adds to the gradients of its weights.
    void (*backward)(Model *m, int l, float *dx, const floatX *dout, const floatX *x);
};

const MixerKernels *kernels_of(const ::Mixer *mixer); // NULL: it has none

// The kernels of the mixer that the options ask for; NULL: there is none, or it has no kernels.
const MixerKernels *mixer_kernels(const Config *c) {
    const ::Mixer *mixer = mixer_of(c);
    return mixer ? kernels_of(mixer) : NULL;
}

// ---- memory

size_t lay_mixer(Model *m, int l, int N, char *memory) {
    const MixerKernels *k = mixer_kernels(&m->config);
    return k ? k->lay(m, l, N, memory) : 0;
}

// Lays pieces one after another from `memory` on, for lay(); returns their bytes.
size_t lay_list(char *memory, std::initializer_list<Piece> list) {
    size_t used = 0;
    for (const Piece &p : list) {
        *(void **)p.to = memory + used;
        used += (p.bytes + 255) / 256 * 256;
    }
    return used;
}

size_t mixer_scratch(const Config *c, int N, int train) {
    const MixerKernels *k = mixer_kernels(c);
    return k ? k->scratch(c, N, train) : 0;
}

// Bytes that generation keeps of a layer: a mixer's state, or attention's keys and values of the last seq tokens.
size_t mixer_cache(const Config *c) {
    const MixerKernels *k = mixer_kernels(c);
    size_t keys = (size_t)c->kv_heads * head_width(c), attention = (size_t)c->seq * 2 * keys * sizeof(floatX);
    return ((k ? k->cache(c) : attention) + 255) / 256 * 256;
}

char *layer_cache(const Model *m, int l) {
    return m->cache + (size_t)l * mixer_cache(&m->config);
}

// ---- the layer

// Returns whether there is a mixer: if not, attention has to do it.
int mixer_forward(Model *m, int l, floatX *out, const floatX *x) {
    const MixerKernels *k = mixer_kernels(&m->config);
    if (!k) {
        return 0;
    }
    scratch_reset(m);
    k->forward(m, l, out, x);
    return 1;
}

int mixer_backward(Model *m, int l, float *dx, const floatX *dout, const floatX *x) {
    const MixerKernels *k = mixer_kernels(&m->config);
    if (!k) {
        return 0;
    }
    scratch_reset(m);
    k->backward(m, l, dx, dout, x);
    return 1;
}

#endif
