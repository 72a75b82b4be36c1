// Generation: the next token, by the cache of keys and values, and its choice.
// Gives: model_generate, sample. Needs: the model of train_moe.c, which includes it.
#pragma once

// One token at `position`; logits (V) of the next. Keys and values of the last seq positions are in m->cache; a longer
// text forgets its beginning.
void model_generate(Model *m, int token, int position, real *logits) {
    const Config *c = &m->config;
    int C = c->dim, H = c->heads, KV = c->kv_heads, D = C / H, Q = (H + 2 * KV) * D, L = c->layers, width = 2 * KV * D;
    if (!m->one) {
        m->one = model_allocate(c, 1, 0, m->memory[WEIGHTS]);
        m->one->placement = m->placement;
        m->cache = own_reals(m, (size_t)L * c->seq * width);
    }
    Model *one = m->one;
    LayerState *s = one->layers;
    int seen = min_int(position + 1, c->seq), slot = position % c->seq;
    real *scores = one->attention, scale = (real)(1 / sqrt((double)D)); // (seen)
    rope_angles(one->angles, position, 1, D, c->rope_theta);
    one->tokens = &token;
    one->mode = EVAL_MODE;
    for (int r = 0; r < ranks.size; r++) // all ranks go on with the same token
        one->rank_tokens[r] = 1;
    embedding_forward(one->x, m->weights.embed, &token, 1, C);
    for (int l = 0; l < L; l++, s++) {
        const LayerWeights *w = &m->weights.layer[l];
        real *keys = m->cache + (size_t)l * c->seq * width, *values = keys + KV * D; // rows of width numbers
        rmsnorm_forward(s->h1, s->rstd1, one->x, w->norm1, 1, C, c->norm_eps);
        product(s->qkv, along_rows(s->h1, C, NULL), along_rows(w->qkv, C, NULL), 1, Q, C, 0);
        rope(s->qkv, Q, 1, 1, H + KV, D, one->angles, 1);
        memcpy(keys + (size_t)slot * width, s->qkv + H * D, (size_t)width * sizeof(real));
        for (int h = 0; h < H; h++) {
            const real *q = s->qkv + h * D;
            real *out = s->att + h * D;
            int kv = h / (H / KV) * D;
            for (int t = 0; t < seen; t++)
                scores[t] = dot(q, keys + (size_t)t * width + kv, D) * scale;
            softmax(scores, seen);
            memset(out, 0, (size_t)D * sizeof(real));
            for (int t = 0; t < seen; t++) {
                for (int i = 0; i < D; i++)
                    out[i] += scores[t] * values[(size_t)t * width + kv + i];
            }
        }
        product(one->x, along_rows(s->att, C, NULL), along_rows(w->proj, C, NULL), 1, C, C, 1);
        rmsnorm_forward(s->h2, s->rstd2, one->x, w->norm2, 1, C, c->norm_eps);
        ffn_forward(one, l, s, one->x, 1, 1);
    }
    rmsnorm_forward(one->h, one->rstd, one->x, m->weights.norm, 1, C, c->norm_eps);
    product(logits, along_rows(one->h, C, NULL), along_rows(m->weights.head, C, NULL), 1, c->vocab, C, 0);
}

// Draws one of n tokens: logits divided by temperature, of these the top_k likeliest, of these as few of the likeliest as
// hold top_p of the probability (Holtzman et al. 2020). u is uniform in [0,1). temperature 0: the likeliest.
int sample(const real *logits, int n, double temperature, int top_k, double top_p, double u) {
    Ranked *list = (Ranked *)allocate((size_t)n, sizeof(Ranked));
    for (int i = 0; i < n; i++) {
        list[i].score = (double)logits[i];
        list[i].index = i;
    }
    qsort(list, (size_t)n, sizeof(Ranked), compare_ranked);
    int kept = temperature == 0 ? 1 : top_k > 0 ? min_int(top_k, n) : n, chosen = 0;
    double total = 0, sum = 0, top = list[0].score;
    for (int i = 0; i < kept; i++) // from here on score holds the probability, not yet divided by the sum
        total += list[i].score = kept == 1 ? 1 : exp((list[i].score - top) / temperature);
    int nucleus = 0;
    while (nucleus < kept && (nucleus == 0 || sum < top_p * total))
        sum += list[nucleus++].score;
    for (double part = list[0].score; chosen < nucleus - 1 && part <= u * sum; part += list[chosen].score)
        chosen++;
    int id = list[chosen].index;
    free(list);
    return id;
}
