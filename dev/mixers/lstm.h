// An LSTM in attention's place (--mixer lstm): each token reads a state that the tokens before it have left.
// Gives: LstmWeights, LstmActs, lstm_forward, lstm_step, lstm_backward; and lstm_mixer, the mixer of them.
// Needs: chapters 1 and 2 of train_moe.c, which includes it; dev/cpu/lstm.h has the fast form of its two loops over time.
//
// Hochreiter and Schmidhuber 1997, Long Short-Term Memory; the forget gate is that of Gers et al. 2000, Learning to Forget. A
// cell has M units. Each has a number c, its memory, and three gates between 0 and 1: what comes in, what is kept, and what
// goes out.
//
//     z   = x_t W_in^T + r_(t-1) W_state^T + bias         (4M): four blocks of M numbers, one for each of the next line
//     i   = sigmoid(z_0)    f = sigmoid(z_1)    g = tanh(z_2)    o = sigmoid(z_3)
//     c_t = f * c_(t-1) + i * g
//     h_t = o * tanh(c_t)
//     r_t = h_t, or h_t W_proj^T                          (P): what the next step reads, and what the layer gives
//
// Every sequence begins with c and r of 0. The projection W_proj (Sak et al. 2014, Long Short-Term Memory Recurrent Neural
// Network Architectures for Large Scale Acoustic Modeling) is there where the cell's width M is not that of the model. The
// memory passes a step by one multiplication with f, which can stay near 1: so a gradient can live for many steps, where in a
// plain recurrent network it dies out or explodes.
//
// Speed: the product with W_in needs no state, so it is done for all tokens at once. The product with W_state waits for the step
// before, and so does that with W_proj where there is a projection. Backward, both wait likewise; the gradients by x and by
// the matrices are products over all tokens again.
#ifdef CONFIG_FIELDS
    int cell;  // M, the width of the LSTM's cell; 0: as wide as the model
#elif !defined(LSTM_H)
#define LSTM_H

// C numbers come in, M units, P numbers go out. Also for the gradients of the weights.
typedef struct LstmWeights {
    real *in;     // (4M,C)
    real *state;  // (4M,P)
    real *bias;   // (4M)
    real *proj;   // (P,M), or NULL: there is no projection, and P = M
} LstmWeights;

// What the forward pass keeps for the backward pass. Row n = b*T + t is step t of sequence b.
typedef struct LstmActs {
    real *gates;  // (N,4M)  i, f, o, and between them g, which is no gate: i, f, g, o
    real *cell;   // (N,M)   c_t
    real *before; // (N,P)   r_(t-1): what the step read; 0 in the first step of a sequence
    real *hidden; // (N,M)   h_t, where there is a projection
} LstmActs;

// ---- the loops over time, plain

double lstm_sigmoid(double z) {
    return 1 / (1 + exp(-z));
}

// One step of M units. gates (4M) comes in as z and becomes i, f, g and o. Writes cell (M) and hidden (M); old (M): the
// cell of the step before, NULL: zeros.
void lstm_units(real *gates, real *cell, real *hidden, const real *old, int M) {
    for (int j = 0; j < M; j++) {
        double i = lstm_sigmoid((double)gates[j]), f = lstm_sigmoid((double)gates[M + j]);
        double g = tanh((double)gates[2 * M + j]), o = lstm_sigmoid((double)gates[3 * M + j]);
        double c = f * (old ? (double)old[j] : 0) + i * g;
        gates[j] = (real)i;
        gates[M + j] = (real)f;
        gates[2 * M + j] = (real)g;
        gates[3 * M + j] = (real)o;
        cell[j] = (real)c;
        hidden[j] = (real)(o * tanh(c));
    }
}

// All steps, for B sequences of T tokens. a->gates comes in as x W_in^T; the arrays of `a` are filled, and out (N,P) += r.
void lstm_recur(real *out, const LstmActs *a, const LstmWeights *w, int B, int T, int M, int P) {
#pragma omp parallel for
    for (int b = 0; b < B; b++) {
        real *r = allocate_reals((size_t)P + M), *h = r + P;
        for (int t = 0; t < T; t++) {
            size_t n = (size_t)b * T + t;
            real *gates = a->gates + n * 4 * M, *hidden = w->proj ? a->hidden + n * M : h;

            // z: what the step reads besides x
            memcpy(a->before + n * P, r, (size_t)P * sizeof(real));
            for (int j = 0; j < 4 * M; j++) {
                real sum = 0;
                for (int p = 0; p < P; p++) {
                    sum += r[p] * w->state[(size_t)j * P + p];
                }
                gates[j] += sum + w->bias[j];
            }
            lstm_units(gates, a->cell + n * M, hidden, t ? a->cell + (n - 1) * M : NULL, M);

            // r: what the step gives
            for (int p = 0; p < P; p++) {
                real sum = w->proj ? 0 : hidden[p];
                for (int j = 0; w->proj && j < M; j++) {
                    sum += hidden[j] * w->proj[(size_t)p * M + j];
                }
                r[p] = sum;
                out[n * P + p] += sum;
            }
        }
        free(r);
    }
}

// The way back through the units of one step. dz (4M) is written; dhidden (M) is the gradient by h_t; dcell (M) comes in as
// the gradient by c_t from the next step, and goes out as that by c_(t-1).
void lstm_units_backward(real *dz, real *dcell, const real *dhidden, const real *gates, const real *cell, const real *old,
                         int M) {
    for (int j = 0; j < M; j++) {
        real i = gates[j], f = gates[M + j], g = gates[2 * M + j], o = gates[3 * M + j];
        real squashed = (real)tanh((double)cell[j]), before = old ? old[j] : 0;
        real dc = dcell[j] + dhidden[j] * o * (1 - squashed * squashed);
        dz[j] = dc * g * i * (1 - i);
        dz[M + j] = dc * before * f * (1 - f);
        dz[2 * M + j] = dc * i * (1 - g * g);
        dz[3 * M + j] = dhidden[j] * squashed * o * (1 - o);
        dcell[j] = dc * f;
    }
}

// All steps, from the last to the first. Given dout (N,P), writes dz (N,4M), and where there is a projection dr (N,P), the
// whole gradient by r_t: that by the output, and that by what the next step read. dbias (4M) +=.
void lstm_recur_backward(real *dz, real *dr, real *dbias, const real *dout, const LstmActs *a, const LstmWeights *w, int B,
                         int T, int M, int P) {
#pragma omp parallel for
    for (int b = 0; b < B; b++) {
        real *dread = allocate_reals((size_t)P + 2 * M), *dcell = dread + P, *dhidden = dcell + M;
        for (int t = T - 1; t >= 0; t--) {
            size_t n = (size_t)b * T + t;

            // the gradient by r_t, and from there by h_t
            for (int p = 0; p < P; p++) {
                real sum = 0;
                for (int j = 0; t + 1 < T && j < 4 * M; j++) {
                    sum += dz[(n + 1) * 4 * M + j] * w->state[(size_t)j * P + p];
                }
                dread[p] = dout[n * P + p] + sum;
            }
            for (int j = 0; j < M; j++) {
                dhidden[j] = w->proj ? 0 : dread[j];
                for (int p = 0; w->proj && p < P; p++) {
                    dhidden[j] += dread[p] * w->proj[(size_t)p * M + j];
                }
            }
            if (w->proj) {
                memcpy(dr + n * P, dread, (size_t)P * sizeof(real));
            }
            lstm_units_backward(dz + n * 4 * M, dcell, dhidden, a->gates + n * 4 * M, a->cell + n * M,
                                t ? a->cell + (n - 1) * M : NULL, M);
        }
        free(dread);
    }
    for (size_t n = 0; n < (size_t)B * T; n++) {
        for (int j = 0; j < 4 * M; j++) {
            dbias[j] += dz[n * 4 * M + j];
        }
    }
}

#ifndef PLAIN
#include "../cpu/lstm.h" // from here on lstm_recur() and lstm_recur_backward() are fast ones
#endif

// ---- a layer

// out (N,P) += the LSTM of x (N,C), B sequences of T tokens; N = B * T. Fills `a`.
void lstm_forward(real *out, const LstmActs *a, const real *x, const LstmWeights *w, int B, int T, int C, int M, int P) {
    matmul(a->gates, x, w->in, B * T, C, 4 * M, SET);
    lstm_recur(out, a, w, B, T, M, P);
}

// One token, for generation: out (P) += r. x (C); r (P) and cell (M) are the state, which begins at 0 and moves on.
// work (5M) is overwritten.
void lstm_step(real *out, real *r, real *cell, real *work, const real *x, const LstmWeights *w, int C, int M, int P) {
    real *gates = work, *hidden = work + 4 * M;
    matmul(gates, x, w->in, 1, C, 4 * M, SET);
    matmul(gates, r, w->state, 1, P, 4 * M, ADD);
    for (int j = 0; j < 4 * M; j++) {
        gates[j] += w->bias[j];
    }
    lstm_units(gates, cell, hidden, cell, M);
    if (w->proj) {
        matmul(r, hidden, w->proj, 1, M, P, SET);
    } else {
        memcpy(r, hidden, (size_t)M * sizeof(real));
    }
    for (int p = 0; p < P; p++) {
        out[p] += r[p];
    }
}

// Given dout (N,P), writes dx (N,C) and adds to the gradients dw. dz (N,4M) and, where there is a projection, dr (N,P) are
// scratch memory.
void lstm_backward(real *dx, const LstmWeights *dw, real *dz, real *dr, const real *dout, const LstmActs *a, const real *x,
                   const LstmWeights *w, int B, int T, int C, int M, int P) {
    int N = B * T;
    lstm_recur_backward(dz, dr, dw->bias, dout, a, w, B, T, M, P);
    begin_products();
    matmul_backward(dx, dw->in, dz, x, w->in, N, C, 4 * M, SET);
    matmul_dw(dw->state, dz, a->before, N, P, 4 * M);
    if (w->proj) {
        matmul_dw(dw->proj, dr, a->hidden, N, M, P);
    }
    end_products();
}

// ---- the mixer

int lstm_wanted(const Config *c) {
    return c->mixer == MIX_LSTM;
}

int lstm_width(const Config *c) { // M
    return c->cell ? c->cell : c->dim;
}

void lstm_tensors(const Config *c, int l, Tensor *list, int *count) {
    int C = c->dim, M = lstm_width(c);
    add_tensor(list, count, l, "lstm_in", NO_FIELD, 3, 4, M, C, INIT_NORMAL); // a matrix for each gate
    add_tensor(list, count, l, "lstm_state", NO_FIELD, 3, 4, M, C, INIT_NORMAL);
    add_tensor(list, count, l, "lstm_bias", NO_FIELD, 1, 1, 1, 4 * M, INIT_ZERO);
    add_tensor(list, count, l, "lstm_proj", NO_FIELD, 2, 1, M == C ? 0 : C, M, INIT_RESIDUAL);
}

// The forget gate's bias begins at 1, so that at first the memory is mostly kept (Jozefowicz et al. 2015, An Empirical
// Exploration of Recurrent Network Architectures). With --norms 0 a cell reads the embedding as it is; so its numbers begin
// with a standard deviation of 1 instead of 0.02, unless it is the output's matrix, too.
void lstm_init(const Model *m, int i, real *w) {
    const Config *c = &m->config;
    const Tensor *t = &m->tensors[i];
    int M = lstm_width(c);
    for (int j = M; !strcmp(t->kind, "lstm_bias") && j < 2 * M; j++) {
        w[j] = 1;
    }
    for (size_t j = 0; !strcmp(t->kind, "embed") && !c->norms && c->untied && j < t->size; j++) {
        w[j] *= 50;
    }
}

LstmWeights lstm_weights(const Model *m, int l, int what) { // WEIGHTS or GRADS
    LstmWeights w = {
        layer_tensor(m, l, "lstm_in", what),
        layer_tensor(m, l, "lstm_state", what),
        layer_tensor(m, l, "lstm_bias", what),
        layer_tensor(m, l, "lstm_proj", what),
    };
    return w;
}

size_t lstm_lay(Model *m, int l, int N, real *memory) {
    LayerActs *layer = &m->acts.layer[l];
    int C = m->config.dim, M = lstm_width(&m->config);
    size_t size[4] = {(size_t)N * 4 * M, (size_t)N * M, (size_t)N * C, M == C ? 0 : (size_t)N * M}, used = 0;
    if (!layer->mixer) {
        layer->mixer = own(m, 1, sizeof(LstmActs));
    }
    LstmActs *a = (LstmActs *)layer->mixer;
    real **array[4] = {&a->gates, &a->cell, &a->before, &a->hidden};
    for (int i = 0; i < 4; i++) {
        *array[i] = memory ? memory + used : NULL;
        used += (size[i] + 15) / 16 * 16;
    }
    return used;
}

void lstm_mix(Model *m, int l, real *out, const real *x) {
    LstmWeights w = lstm_weights(m, l, WEIGHTS);
    const LstmActs *a = (const LstmActs *)m->acts.layer[l].mixer;
    int C = m->config.dim;
    lstm_forward(out, a, x, &w, m->batch.B, m->batch.T, C, lstm_width(&m->config), C);
}

void lstm_mix_backward(Model *m, int l, real *dx, const real *dout, const real *x) {
    LstmWeights w = lstm_weights(m, l, WEIGHTS), dw = lstm_weights(m, l, GRADS);
    const LstmActs *a = (const LstmActs *)m->acts.layer[l].mixer;
    int C = m->config.dim, M = lstm_width(&m->config), N = m->batch.B * m->batch.T;
    scratch_reset(m);
    real *dz = scratch(m, (size_t)N * 4 * M), *dr = scratch(m, w.proj ? (size_t)N * C : 0);
    lstm_backward(dx, &dw, dz, dr, dout, a, x, &w, m->batch.B, m->batch.T, C, M, C);
}

// In training the way back takes dz and dr.
size_t lstm_scratch_numbers(const Config *c, int N, int train) {
    size_t C = (size_t)c->dim, M = (size_t)lstm_width(c), backward = (size_t)N * (4 * M + (M == C ? 0 : C));
    return train ? backward : 5 * M;
}

// Generation keeps r (C) and c (M), however long the text is.
size_t lstm_cache(const Config *c) {
    return (size_t)c->dim + (size_t)lstm_width(c);
}

void lstm_mix_one(Model *one, int l, real *out, const real *x, real *cache, int position) {
    (void)position;
    LstmWeights w = lstm_weights(one, l, WEIGHTS);
    int C = one->config.dim, M = lstm_width(&one->config);
    scratch_reset(one);
    lstm_step(out, cache, cache + C, scratch(one, 5 * (size_t)M), x, &w, C, M, C);
}

const Option lstm_options[] = {
    INTEGER("cell", cell, "0", 0, 65536, MODEL, "Model",
            "units of an LSTM's cell; other than --dim, it has a projection [as many as --dim]"),
};

int has_attention(const Config *c) {
    return c->mixer == MIX_ATTENTION;
}

const Effect lstm_effects[] = {
    {"cell", lstm_wanted, "an LSTM: --mixer lstm"},
    {"heads", has_attention, "attention: --mixer attention"},
    {"kv-heads", has_attention, "attention: --mixer attention"},
    {"rope-theta", has_attention, "attention: --mixer attention"},
    {"qk-norm", has_attention, "attention: --mixer attention"},
    {"value-embedding", has_attention, "attention: --mixer attention"},
};

const Recipe lstm_recipes[] = {
    {"shazeer-lstm", 2017, 2.5, "the same router as first built: between two LSTM layers, with dropout, without norms",
     "--mixer lstm --layers 2 --last-feed 0 --norms 0 --untied --moe-sigmoid --dropout 0.1 --topk 4 --ffn 128 --activation relu "
     "--noise 1 --balance cv2 --aux-weight 0.1 --load-weight 0.1",
     "Shazeer et al., Outrageously Large Neural Networks, appendix C.1"},
};

const Mixer lstm_mixer = {
    .wanted = lstm_wanted,
    .tensors = lstm_tensors,
    .init = lstm_init,
    .lay = lstm_lay,
    .forward = lstm_mix,
    .backward = lstm_mix_backward,
    .cache = lstm_cache,
    .step = lstm_mix_one,
    .scratch = lstm_scratch_numbers,
    .options = lstm_options,
    .option_count = COUNT(lstm_options),
    .effects = lstm_effects,
    .effect_count = COUNT(lstm_effects),
    .recipes = lstm_recipes,
    .recipe_count = COUNT(lstm_recipes),
};

#endif
