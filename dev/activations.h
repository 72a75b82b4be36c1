// The arrays of a model's activations: Acts, Route and Experts of train_moe.c, whose comments give their shapes.
// Gives: allocate_activations, model_free. Needs: the model and the routers of train_moe.c, which includes it.
#ifndef ACTIVATIONS_H
#define ACTIVATIONS_H

// The activations of layer l that --recompute can do without are laid one behind the other from `memory` on. Returns
// their number; with memory NULL it only counts.
size_t lay_activations(Model *m, int l, int N, real *memory) {
    const Config *c = &m->config;
    LayerActs *a = &m->acts.layer[l];
    const Mixer *mixer = mixer_of(c);
    int C = c->dim, D = head_width(c), Q = mixer ? 0 : (c->heads + 2 * c->kv_heads) * D, hidden = 0;
    size_t used = 0, att = mixer ? 0 : (size_t)N * c->heads * D, lse = mixer ? 0 : (size_t)N * c->heads;
    size_t dense = (size_t)dense_width(c, l) * (1 + is_gated(dense_activation(c, l)));
    for (int e = 0; is_moe(c, l) && e < c->experts; e++) {
        hidden = max_int(hidden, expert_hidden(c, e));
    }
    size_t norms = c->qk_norm && !mixer ? (size_t)(c->heads + c->kv_heads) : 0; // of a token
    size_t rows = ranks.ep == 1 ? (size_t)N * c->subtokens * most_choices(c) : 0; // several processes: see ranks_allocate
    struct {
        real **array;
        size_t size;
    } list[] = {
        {&a->h1, (size_t)N * C},          {&a->rstd1, (size_t)N},
        {&a->qkv, (size_t)N * Q},         {&a->att, att},
        {&a->raw_qk, N * norms * D},      {&a->rstd_qk, N * norms},
        {&a->lse, lse},                   {&a->mid, (size_t)N * C},
        {&a->h2, (size_t)N * C},          {&a->rstd2, (size_t)N},
        {&a->dense_hidden, N * dense},    {&a->hidden, rows * hidden},
    };
    for (size_t i = 0; i < sizeof(list) / sizeof(list[0]); i++) {
        *list[i].array = memory ? memory + used : NULL;
        used += (list[i].size + 15) / 16 * 16;
    }
    return used + (mixer ? mixer->lay(m, l, N, memory ? memory + used : NULL) : 0);
}

// Points a route to 5 * choices + E + 1 integers.
void lay_choices(Route *r, int *integers, size_t choices) {
    r->expert = integers;
    r->served = r->expert + choices;
    r->row = r->served + choices;
    r->choice = r->row + choices;
    r->token = r->choice + choices;
    r->offset = r->token + choices;
}

void allocate_route(Model *m, int l, int n) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int E = c->experts, K = most_choices(c);
    size_t choices = (size_t)n * K;
    r->E = E;
    r->K = K;
    r->rows = n;
    r->logits = own_reals(m, (size_t)n * router_outputs(c));
    r->p = own_reals(m, (size_t)n * E);
    r->lse = own_reals(m, n);
    r->weight = own_reals(m, choices);
    int *integers = (int *)own(m, choices * 5 + E + 1, sizeof(int));
    lay_choices(r, integers, choices);

    r->count = own_by_group(m, n, E);
    r->slope = own_by_group(m, n, E);

    // What the parts of the router keep, and what the log shows.
    for (int i = 0; m->parts[i]; i++) {
        if (m->parts[i]->allocate) {
            m->parts[i]->allocate(m, l, n);
        }
    }
    allocate_statistics(m, l);
}

void allocate_experts(Model *m) {
    const Config *c = &m->config;
    Experts *x = &m->experts;
    int E = c->experts;
    int *integers = (int *)own(m, (size_t)5 * E, sizeof(int));
    x->E = E;
    x->C = c->dim / c->subtokens;
    x->in = integers;
    x->out = x->in + E;
    x->F = x->out + E;
    x->hidden = x->F + E;
    x->activation = x->hidden + E;
    for (int e = 0; e < E; e++) {
        x->in[e] = x->out[e] = x->C;
        x->F[e] = expert_width(c, e);
        x->hidden[e] = expert_hidden(c, e);
        x->activation[e] = expert_activation(c, e);
    }
}

// The most that a part of a layer takes of the scratch arena, in numbers. Should it take more, the arena grows.
size_t expected_scratch(const Config *c, int N, int train) {
    size_t C = (size_t)c->dim, most = 0;
    size_t choices = (size_t)N * most_choices(c), width = (size_t)c->ffn;
    for (int l = 0; l < c->layers; l++) {
        size_t need = (size_t)N * dense_width(c, l) * (train ? 3 : 1) + (c->shared_gate ? 2 * (size_t)N : 0);
        if (is_moe(c, l)) {
            size_t scores = (size_t)N * c->subtokens * router_outputs(c);
            size_t moe = choices * (C + c->subtokens * width * (train ? 3 : 1)) + scores * (train ? 2 : 1);
            moe += ranks_scratch(c, N); // several processes: rows under way
            need = need > moe ? need : moe;
        }
        most = most > need ? most : need;
    }
    size_t heads = (size_t)(2 * c->heads + 2 * c->kv_heads) * head_width(c); // the gradients by attention and by qkv
    size_t attention = train && !mixer_of(c) ? (size_t)N * heads : mixing_scratch(c, N, train);
    size_t logits = (size_t)logit_rows(N, c->vocab) * c->vocab;
    most = most > attention ? most : attention;
    return (most > logits ? most : logits) + 4096;
}

size_t most_muon_scratch(const Model *m); // dev/muon.h

// Memory for the activations of N tokens, and for what is needed only while something works.
void allocate_activations(Model *m, int N, int train) {
    const Config *c = &m->config;
    int L = c->layers, C = c->dim;
    m->purpose = FOR_ACTIVATIONS;
    m->acts.layer = (LayerActs *)own(m, L, sizeof(LayerActs));
    m->stats = (Statistics *)own(m, statistics_rows(c), sizeof(Statistics));
    allocate_experts(m);

    // With --recompute all layers share one array for most of their activations.
    for (int l = 0; l < L; l++) {
        size_t size = lay_activations(m, l, N, NULL);
        m->passing += size;
        m->largest = size > m->largest ? size : m->largest;
    }
    real *shared = c->recompute ? own_reals(m, m->largest) : NULL;
    for (int l = 0; l < L; l++) {
        m->acts.layer[l].x = own_reals(m, (size_t)N * C);
        m->acts.layer[l].fed = own_reals(m, c->moe_sigmoid && is_moe(c, l) ? (size_t)N * C : 0); // --recompute needs it, too
        lay_activations(m, l, N, shared ? shared : own_reals(m, lay_activations(m, l, N, NULL)));
        if (is_moe(c, l)) {
            allocate_route(m, l, N * c->subtokens);
        }
    }
    ranks_allocate(m, N);
    m->acts.x = own_reals(m, (size_t)N * C);
    m->acts.h = own_reals(m, (size_t)N * C);
    m->acts.rstd = own_reals(m, N);
    m->acts.nll = own_reals(m, N);

    // What is needed only while something works.
    m->purpose = FOR_BUFFERS;
    allocate_lookup(m, N, train);
    m->angles = own_reals(m, (size_t)c->seq * head_width(c));
    head_angles(c, m->angles, 0, c->seq);
    if (train) {
        m->acts.dh = own_reals(m, (size_t)N * C);
        m->dx = own_reals(m, (size_t)N * C);
        m->dbranch = own_reals(m, c->dropout > 0 || c->moe_sigmoid ? (size_t)N * C : 0);
    }
    size_t most = expected_scratch(c, N, train);
    if (train && most < most_muon_scratch(m)) {
        most = most_muon_scratch(m);
    }
    size_t scratch_size = most * sizeof(real);
    arena_reserve(&m->scratch, scratch_size);
    m->bytes[FOR_BUFFERS] += scratch_size;
#ifndef PLAIN
    m->bytes[FOR_BUFFERS] += attention_bytes(c->seq, head_width(c)) + packing_bytes();
#endif
}

void generation_free(Model *m); // dev/generate.h

void model_free(Model *m) {
    generation_free(m);
    forget_pairs(m);
    offload_free(m);
    ranks_free(m);
    arena_free(&m->scratch);
    for (int i = 0; i < m->owned_count; i++) {
        free(m->owned[i]);
    }
    free(m->owned);
    free(m);
}

#endif
