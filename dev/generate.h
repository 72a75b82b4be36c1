// Generation: the next token, by a cache of keys and values, and how it is drawn.
// Gives: model_generate, generation_free, sample. Needs: the model of train_moe.c, which includes it.
//
// The cache makes a new token cost one token's work: attention needs the keys and values of those before it, which
// do not change any more.
#pragma once
#include "cpu/vector.h"

typedef struct Generation {
    Model *one;  // a model for one token, with the weights of the trained one
    int before[2]; // the last two tokens; -1: the text begins
    real *cache; // (L, seq, 2*KV*D)  keys, then values; those of position p are in row p % seq. Of another mixer: its own
} Generation;

void generation_free(Model *m) {
    if (m->generation) {
        model_free(m->generation->one);
    }
}

// out (H*D) = attention of one token's queries (H*D) to the `seen` rows of a layer's cache; scores (seen).
void attend_to_cache(real *out, real *scores, const real *queries, const real *cache, int seen, int H, int KV, int D) {
    int width = 2 * KV * D;
    real scale = (real)(1 / sqrt((double)D));
    memset(out, 0, (size_t)H * D * sizeof(real));
    for (int h = 0; h < H; h++) {
        const real *keys = cache + h / (H / KV) * D, *values = keys + KV * D;
        for (int t = 0; t < seen; t++) {
            scores[t] = dot(queries + h * D, keys + (size_t)t * width, D) * scale;
        }
        softmax(scores, seen);
        for (int t = 0; t < seen; t++) {
            for (int i = 0; i < D; i++) {
                out[h * D + i] += scores[t] * values[(size_t)t * width + i];
            }
        }
    }
}

// x (C) += attention of layer l to itself and the cache, for one token at `position`.
void attend_one(Model *one, int l, real *x, real *cache, int position) {
    const Config *c = &one->config;
    const LayerParams *w = &one->params.layer[l];
    LayerActs *a = &one->acts.layer[l];
    int C = c->dim, H = c->heads, KV = c->kv_heads, D = head_width(c), Q = (H + 2 * KV) * D, width = 2 * KV * D;
    matmul(a->qkv, a->h1, w->qkv, 1, C, Q, SET);
    qkv_parts_forward(one, l, a->qkv);
    rope(a->qkv, Q, 1, 1, H + KV, D, one->angles, 1);
    memcpy(cache + (size_t)(position % c->seq) * width, a->qkv + H * D, (size_t)width * sizeof(real));

    scratch_reset(one);
    int seen = min_int(position + 1, c->seq);
    attend_to_cache(a->att, scratch(one, seen), a->qkv, cache, seen, H, KV, D);
    matmul(x, a->att, w->proj, 1, H * D, C, ADD);
}

// Numbers that generation keeps of a layer, for a text of seq tokens.
size_t kept_numbers(const Config *c) {
    const Mixer *mixer = mixer_of(c);
    return mixer ? mixer->cache(c) : (size_t)c->seq * 2 * c->kv_heads * head_width(c);
}

// One token at `position`: logits (V) of the next one. The cache has the last seq positions, so a longer text
// forgets its beginning.
void model_generate(Model *m, int token, int position, real *logits) {
    const Config *c = &m->config;
    const Mixer *mixer = mixer_of(c);
    int C = c->dim;
    size_t kept = kept_numbers(c);
    if (!m->generation) {
        m->generation = (Generation *)own(m, 1, sizeof(Generation));
        m->generation->one = model_allocate(c, 1, 0, m->memory[WEIGHTS]);
        share_blocks(m->generation->one, m);
        m->generation->cache = own_reals(m, c->layers * kept);
    }
    Model *one = m->generation->one;
    Acts *acts = &one->acts;
    Batch batch = {&token, NULL, 1, 1, EVAL_MODE, 1, 0, 0, 1, 1};
    one->batch = batch;
    multiply_in(c->precision);
    ranks_begin_batch(one);

    // The same layers as in model_forward, but for attention, which looks into the cache.
    head_angles(c, one->angles, position, 1);
    embedding_forward(acts->x, one->params.embed, &token, 1, C);
    ngrams_forward(one, acts->x, position ? m->generation->before : NULL);
    remember_token(m->generation->before, token, position);
    for (int l = 0; l < c->layers; l++) {
        const LayerParams *w = &one->params.layer[l];
        LayerActs *a = &acts->layer[l];
        real *cache = m->generation->cache + l * kept;
        norm_forward(one, a->h1, a->rstd1, acts->x, w->norm1, 1);
        if (mixer) {
            memset(cache, 0, position == 0 ? kept * sizeof(real) : 0);
            mixer->step(one, l, acts->x, a->h1, cache, position);
        } else {
            attend_one(one, l, acts->x, cache, position);
        }
        norm_forward(one, a->h2, a->rstd2, acts->x, w->norm2, 1);
        begin_branch(one, l, FEEDING, a->mid, acts->x);
        feed_forward(one, l, a->mid);
        end_branch(one, l, FEEDING, a->mid, acts->x);
        ngram_gate_forward(one, l, a->mid, acts->x);
        copy_rows(acts->x, a->mid, 1, C);
    }
    norm_forward(one, acts->h, acts->rstd, acts->x, one->params.norm, 1);
    matmul(logits, acts->h, one->params.head, 1, C, c->vocab, SET);
}

// Draws one of n tokens: logits divided by temperature, of these the top_k likeliest, of these as few of the
// likeliest as hold top_p of the probability (Holtzman et al. 2020). u is uniform in [0,1). temperature 0: the
// likeliest.
int sample(const real *logits, int n, double temperature, int top_k, double top_p, double u) {
    Ranked *list = (Ranked *)allocate(n, sizeof(Ranked));
    for (int i = 0; i < n; i++) {
        list[i].score = (double)logits[i];
        list[i].index = i;
    }
    qsort(list, (size_t)n, sizeof(Ranked), compare_ranked);
    int kept = top_k > 0 ? min_int(top_k, n) : n;
    if (temperature == 0) {
        kept = 1;
    }

    // From here on score holds the probability, not yet divided by the sum.
    double total = 0, sum = 0, top = list[0].score;
    for (int i = 0; i < kept; i++) {
        list[i].score = kept == 1 ? 1 : exp((list[i].score - top) / temperature);
        total += list[i].score;
    }
    int nucleus = 0;
    while (nucleus < kept && (nucleus == 0 || sum < top_p * total)) {
        sum += list[nucleus++].score;
    }

    int chosen = 0;
    for (double part = list[0].score; chosen < nucleus - 1 && part <= u * sum; part += list[chosen].score) {
        chosen++;
    }
    int id = list[chosen].index;
    free(list);
    return id;
}
