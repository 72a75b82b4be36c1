// The arrays of a model on the device: LayerActs, Route, Experts and Model of train_moe.cu, whose comments give their shapes.
// Gives: allocate_all, first_moe_layer. Needs: dev/cuda/memory.cuh; the model and the routers of train_moe.cu, which
// includes it.
#ifndef CUDA_ACTIVATIONS_CUH
#define CUDA_ACTIVATIONS_CUH
#include "compress.cuh"
#include "offload_memory.cuh"

// What --recompute shares of a layer's activations, one after the other from `memory` on; returns their bytes.
size_t lay_activations(Model *m, int l, int N, char *memory) {
    const Config *c = &m->config;
    LayerActs *a = &m->layers[l];
    size_t C = (size_t)c->dim, D = (size_t)head_width(c), H = (size_t)c->heads, KV = (size_t)c->kv_heads, low = sizeof(floatX), used = 0;
    size_t attends = mixer_of(c) ? 0 : N, norms = c->qk_norm ? attends : 0; // tokens
    size_t dense = (size_t)dense_width(c, l) * (1 + is_gated(dense_activation(c, l)));
    size_t choices = is_moe(c, l) && ranks.ep == 1 ? (size_t)N * c->subtokens * most_choices(c) : 0;
    const Piece list[] = {
        {&a->h1, N * C * low},
        {&a->rstd1, N * sizeof(float)},
        {&a->qkv, attends * (H + 2 * KV) * D * low},
        {&a->att, attends * H * D * low},
        {&a->raw_qk, norms * (H + KV) * D * low},
        {&a->rstd_qk, norms * (H + KV) * sizeof(float)},
        {&a->lse, attends * H * sizeof(float)},
        {&a->mid, N * C * sizeof(float)},
        {&a->h2, N * C * low},
        {&a->rstd2, N * sizeof(float)},
        {&a->dense_hidden, N * dense * low},
        {&a->hidden, choices * m->experts.hidden_width * low},
    };
    for (const Piece &p : list) {
        *(void **)p.to = memory + used;
        used += (p.bytes + 255) / 256 * 256;
    }
    return used + lay_mixer(m, l, N, memory ? memory + used : NULL);
}

int first_moe_layer(const Config *c) {
    int l = 0;
    while (!is_moe(c, l)) {
        l++;
    }
    return l;
}

void list_gradients(Model *m); // chapter 5
void own_muon(Model *m);       // dev/cuda/muon.cuh
void model_free(::Model *base);

// The experts' table of widths, activations and where their matrices begin: the same for all layers.
void allocate_experts(Model *m) {
    const Config *c = &m->config;
    int E = c->experts, C = c->dim / c->subtokens;
    Experts *x = &m->experts;
    size_t *matrix = (size_t *)allocate((size_t)E * 2 + 2, sizeof(size_t)), *matrix_in = matrix + E + 1;
    int *width = (int *)allocate((size_t)2 * E, sizeof(int)), *activation = width + E;
    for (int e = 0; e < E; e++) {
        int F = expert_width(c, e), hidden = expert_hidden(c, e);
        width[e] = F;
        activation[e] = expert_activation(c, e);
        matrix[e + 1] = matrix[e] + (size_t)F * C;
        matrix_in[e + 1] = matrix_in[e] + (size_t)hidden * C;
        x->widest = max_int(x->widest, F);
        x->hidden_width = max_int(x->hidden_width, hidden);
    }
    x->E = E;
    x->C = C;
    int *ints = own_ints(m, (size_t)2 * E);
    size_t *places = (size_t *)own(m, (size_t)2 * E + 2, sizeof(size_t));
    upload(m, ints, width, (size_t)2 * E * sizeof(int));
    upload(m, places, matrix, ((size_t)2 * E + 2) * sizeof(size_t));
    free(width);
    free(matrix);
    x->width = ints;
    x->activation = ints + E;
    x->matrix = places;
    x->matrix_in = places + E + 1;
}

// Numbers that a batch sends: tokens, targets, and embedding_backward's three lists; with --ngrams the tokens' rows of that
// table, by pair and by triple, and once more three lists.
size_t batch_ints(const Model *m) {
    size_t N = (size_t)m->max_tokens;
    return N * 5 + 1 + (m->config.ngrams ? N * ngram_orders(&m->config) * 4 + 1 : 0);
}

void allocate_route(Model *m, int l, int n) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    LayerActs *a = &m->layers[l];
    int E = c->experts, K = most_choices(c);
    size_t choices = (size_t)n * K;
    r->N = r->rows = n;
    r->E = E;
    r->K = K;
    r->logits = own_floats(m, has_fused_router(m, l) ? 0 : (size_t)n * router_outputs(c));
    r->p = own_floats(m, (size_t)n * E);
    r->lse = own_floats(m, n);
    r->weight = own_floats(m, choices);
    int *ints = own_ints(m, choices * 5 + E + 1);
    lay_choices(r, ints, choices);
    r->count = own_by_group(m, n, E);
    r->slope = own_by_group(m, n, E);
    a->tiles = (int)(choices / TM) + E;
    a->tile = (int2 *)own(m, a->tiles, sizeof(int2));
    size_t scratch_before = m->scratch_size;
    for (int i = 0; m->parts[i]; i++) {
        const Kernels *k = kernels_of(m->parts[i]);
        if (k->allocate) {
            k->allocate(m, l, n);
        }
    }
    if (l > first_moe_layer(c)) { // scratch memory is the same for all layers
        m->scratch_size = scratch_before;
    }
}

// Scratch for the plan of a layer of n tokens. With several processes it serves for rows by process, too, and for what came
// from all of a group: ep times as many tokens at most, but only 1/ep of the experts and the copies.
void allocate_plan(Model *m, int n) {
    const Config *c = &m->config;
    PlanScratch *s = &m->plan;
    size_t E = (size_t)max_int(c->experts + ranks.ep * c->replicate, 2 * ranks.ep), groups = (size_t)most_groups(m),
           K = (size_t)most_choices(c);
    size_t of_group = (size_t)div_up(c->group == SEQUENCE ? c->seq * c->subtokens : n, BLOCK_ROWS),
           chunks = groups * of_group;
    chunks = chunks > (size_t)div_up(n, BLOCK_ROWS) ? chunks : (size_t)div_up(n, BLOCK_ROWS);
    s->count = own_ints(m, E * chunks);
    s->unbiased_count = own_ints(m, E * chunks);
    s->unbiased = own_ints(m, c->balance == UNBIASED ? (size_t)n * K : 0);
    s->p_sum = own_floats(m, E * chunks);
    s->lse_squares = (double *)own(m, chunks, sizeof(double));
    s->entropy = (double *)own(m, chunks, sizeof(double));
    s->total = own_ints(m, E);
    s->first_tile = own_ints(m, E + 1);
    s->mean_p = (double *)own(m, groups * E, sizeof(double));
    s->group_loss = (double *)own(m, groups, sizeof(double));
    s->active = own_ints(m, 1);
    s->done = (unsigned *)own_ints(m, 1);
    m->decided_expert = own_ints(m, (size_t)n * K);
    if (!m->dry) {
        zero(s->done, sizeof(unsigned));
    }
}

// Memory for a backward pass of N tokens.
void allocate_backward(Model *m, int N) {
    const Config *c = &m->config;
    int L = c->layers, C = c->dim, Q = (c->heads + 2 * c->kv_heads) * head_width(c), n = N * c->subtokens,
        moe = moe_layers(c) > 0;
    size_t NC = (size_t)N * C, choices = (size_t)n * most_choices(c), hidden = 0;
    m->purpose = FOR_BUFFERS;
    m->dx = own_floats(m, NC);
    m->dx_low = own_low(m, NC);
    m->dh = own_floats(m, NC);
    if (!mixer_of(c)) {
        m->datt = own_low(m, (size_t)N * c->heads * head_width(c));
        m->dqkv = own_low(m, (size_t)N * Q);
        m->delta = own_floats(m, (size_t)N * c->heads);
        m->qk_part = (double *)own(m, qk_sums(c, N), sizeof(double));
    }
    for (int l = 0; l < L; l++) {
        LayerActs *a = &m->layers[l];
        size_t dense = (size_t)N * dense_width(c, l) * (1 + is_gated(dense_activation(c, l)));
        hidden = dense > hidden ? dense : hidden;
        a->partial[0] = own_floats(m, (size_t)div_up(N, BLOCK_ROWS) * C);
        a->partial[1] = own_floats(m, (size_t)div_up(N, BLOCK_ROWS) * C);
        a->drouter = own_floats(m, has_fused_router(m, l) ? (size_t)c->experts * C : 0);
    }
    size_t experts = ranks.ep == 1 && moe ? choices * m->experts.hidden_width : 0; // else see own_crossing
    m->dhidden = own_low(m, experts > hidden ? experts : hidden);
    m->word_dlogits = own_low(m, (size_t)m->head_rows * words_with_padding(c->vocab));
    m->router_dlogits = own_floats(m, moe && c->experts <= MOST_ROUTED ? (size_t)n * c->experts : 0);
    m->dweight = own_floats(m, moe * choices);
    m->dweight_part = own_floats(m, ranks.ep == 1 ? moe * choices * div_up(m->experts.widest, TN) : 0);
    m->last_partial = own_floats(m, (size_t)div_up(N, BLOCK_ROWS) * C);
    m->norm_part = (double *)own(m, NORM_PARTS, sizeof(double));
    own_shared_gate(m, N);
    list_gradients(m);
    own_muon(m);
}

// All memory for N tokens, as in the C twin. parent: the model whose weights it shares, or NULL.
void allocate_all(Model *m, int N, int train, const Model *parent) {
    const Config *c = &m->config;
    int L = c->layers, C = c->dim, V = words_with_padding(c->vocab), moe = moe_layers(c) > 0, n = N * c->subtokens;
    size_t NC = (size_t)N * C, choices = (size_t)n * most_choices(c), width = 0;
    choose_routers(m);
    lay_out(m, (Tensor *)own_host(m, tensor_limit(c), sizeof(Tensor)), ALIGNED);
    if (!m->crossing) { // one process
        m->crossing = (::Crossing *)own_host(m, 1, sizeof(::Crossing));
    }
    m->crossing->rank_tokens = (int *)own_host(m, ranks.size, sizeof(int));
    m->acts.layer = (::LayerActs *)own_host(m, L, sizeof(::LayerActs));
    m->layers = (LayerActs *)own_host(m, L, sizeof(LayerActs));
    m->host_route = (Route *)own_host(m, L, sizeof(Route));
    m->stats = (Statistics *)own_host(m, statistics_rows(c), sizeof(Statistics));

    // Weights, their rounded copy, and for training their gradients and the optimizer's two moments.
    m->purpose = FOR_WEIGHTS;
    m->memory[WEIGHTS] = parent ? parent->memory[WEIGHTS] : (float *)own_array(m, WEIGHTS, m->size, sizeof(float));
    int is_copy = sizeof(floatX) != 4 || c->lora; // in float32 products read the weights themselves, but not beside pairs
    m->low = parent ? parent->low : NULL;
    if (!parent) {
        m->low = is_copy ? (floatX *)own_array(m, LOW_WEIGHTS, m->size, sizeof(floatX)) : (floatX *)m->memory[WEIGHTS];
    }
    point_params(m, &m->params, m->memory[WEIGHTS]);
    if (train) {
        m->purpose = FOR_GRADIENTS;
        m->memory[GRADS] = (float *)own_array(m, GRADS, trained_size(m), sizeof(float));
        own_lost(m);
        point_params(m, &m->grads, m->memory[GRADS]);
        m->purpose = FOR_MOMENTS;
        for (int i = MOMENT1; i <= MOMENT2; i++) {
            m->memory[i] = (float *)own_array(m, i, moment_offset(m, trained_size(m)), moment_size(m));
        }
    }
    own_pairs(m, N, train, parent);

    // Activations. With --recompute all layers share one array for most of them.
    m->purpose = FOR_ACTIVATIONS;
    allocate_experts(m);
    size_t largest = 0, sum = 0;
    for (int l = 0; l < L; l++) {
        size_t bytes = lay_activations(m, l, N, NULL);
        sum += bytes;
        largest = bytes > largest ? bytes : largest;
    }
    m->passing = sum / sizeof(real); // the table of memory counts in these
    m->largest = largest / sizeof(real);
    char *shared = c->recompute ? (char *)own(m, largest, 1) : NULL;
    for (int l = 0; l < L; l++) {
        size_t dense = (size_t)N * dense_width(c, l);
        m->layers[l].x = own_floats(m, NC);
        m->layers[l].fed = own_low(m, c->moe_sigmoid && is_moe(c, l) ? NC : 0); // --recompute does not make it again
        lay_activations(m, l, N, shared ? shared : (char *)own(m, lay_activations(m, l, N, NULL), 1));
        if (is_moe(c, l)) {
            allocate_route(m, l, n);
        }
        width = dense > width ? dense : width;
    }
    m->x = own_floats(m, NC);
    m->h = own_low(m, NC);
    m->rstd = own_floats(m, N);

    // What is needed only while something works.
    m->purpose = FOR_BUFFERS;
    allocate_lookup(m, N, train);
    m->tokens = own_ints(m, batch_ints(m));
    m->targets = m->tokens + N;
    m->pairs = m->tokens + (size_t)N * 5 + 1;
    size_t of_experts = ranks.ep == 1 && moe ? choices * m->experts.widest : 0; // else see own_crossing
    m->rows = own_low(m, moe * choices * m->experts.C);
    m->act = own_low(m, of_experts > width ? of_experts : width);
    m->branch = own_low(m, NC);
    m->router_in = own_floats(m, moe && !has_fused_router(m, first_moe_layer(c)) ? NC : 0);
    m->head_rows = max_int(1, min_int(N, (1 << 28) / V / 128 * 128)); // 1 GiB of float logits at most
    m->word_logits = own_floats(m, (size_t)m->head_rows * V);
    m->nll = own_floats(m, N);
    size_t turns = (size_t)c->seq * head_width(c);
    m->angles = own_floats(m, turns);
    float *angles = (float *)allocate(turns, sizeof(float));
    head_angles(c, angles, 0, c->seq);
    upload(m, m->angles, angles, turns * sizeof(float));
    free(angles);
    size_t mixing = mixer_scratch(c, N, train);
    m->scratch_size = m->scratch_size > mixing ? m->scratch_size : mixing;
    m->scratch_memory = (char *)own(m, m->scratch_size, 1);
    if (moe) {
        allocate_plan(m, n);
    }
    if (ranks.ep > 1 && moe) {
        own_crossing(m, n, parent);
    }
    m->report_size = SINGLE_REPORTS + (size_t)L * (stats_size(c) + head_stats_size(c));
    m->report = (double *)own(m, m->report_size, sizeof(double));
    m->host_report = (double *)own_host(m, m->report_size, sizeof(double));
    if (train) {
        allocate_backward(m, N);
    }
    if (parent) { // generation
        m->cache = (char *)own(m, L * mixer_cache(c), 1);
    }
}

#endif
