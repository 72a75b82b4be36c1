// Experts in attention (--attention-experts E): what its two forms, switchhead.h and moa.h, have in common: the routers, head by
// head; norms, positions, and the experts of the output; generation; the options. doc/attention_experts.md has the pictures.
// Gives: head_width, attention_routes, route_experts, route_name, ExpertHeads, heads_forward, heads_step, choose_heads, ... Needs: the
// layers and the mixture of train_moe.c, which includes it by way of all.h; ../qk_norm.h, ../lookup.h; attend_to_cache of ../generate.h.
#ifdef CONFIG_FIELDS
    int attention_experts; // E; 0: attention has no experts
    int attention_topk;    // K; moa has K = heads
    int attention_form;    // SWITCHHEAD or MOA
    int head_width;        // D, also without experts; 0: C/H
    double attention_aux_weight, attention_z_weight, attention_capacity_factor;
#elif !defined(ATTENTION_EXPERTS_H)
#define ATTENTION_EXPERTS_H
#include "mixer.h"
#include "../lookup.h"
#include "../qk_norm.h"
#include "../rope.h"
#include "../ranks/gather.h"

enum { SWITCHHEAD, MOA };
const char *const attention_forms[] = {"switchhead", "moa", NULL};

// The routers of a layer's attention. moa has only that of OUTPUTS, which chooses the queries, too.
enum { OUTPUTS, VALUES };

// The choices of one router. A head is a mixture of its own with E experts, of which a token has K. The arrays of `all` have
// the heads one after the other: p (heads,N,E), expert and weight (heads,N,K), count and slope (heads,groups,E). Sorted
// rows are those of all heads together: expert e of head h is number h*E + e, and offset is (heads*E + 1).
typedef struct HeadRoute {
    int heads;
    Route all;
    int *att_row;   // (heads*N*K) of OUTPUTS, for each sorted row: the row of att that it reads, as (N*H,D)
    int per_choice; // 1: att has a row for each choice (moa); 0: for each head
} HeadRoute;

// What one layer keeps: LayerActs' mixer.
typedef struct ExpertHeads {
    HeadRoute route[2];      // of OUTPUTS and VALUES
    real *angles;            // (T, D/2, 2)  as Model's, but D may be another one; all layers have the same
    int *of_model, *of_head; // (H*E)  C and D, as grouped products want them

    // What --recompute does not keep.
    real *qkv, *att;         // (N,(H+2KV)*D), (N,H*D)
    real *lse;               // (B,H,T)
    real *raw_qk, *rstd_qk;  // (N,(H+KV)*D), (N,H+KV)  with --qk-norm
    real *rows;              // (rows,D)  switchhead: each chosen expert's values, sorted
} ExpertHeads;

void lay_choices(Route *r, int *integers, size_t choices); // ../activations.h
void attend_to_cache(real *out, real *scores, const real *queries, const real *cache, int seen, int H, int KV, int D);

// Where the two forms differ on the way to attention: x (N,C) -> queries, keys and values in qkv, given the choices.
void switchhead_project(Model *m, int l, const real *x);
void moa_project(Model *m, int l, const real *x);

// ---- sizes

int head_width(const Config *c) { // D, with experts or without
    return c->head_width ? c->head_width : c->dim / c->heads;
}

int key_heads(const Config *c) { // KV
    return c->attention_experts && c->attention_form == MOA ? 1 : c->kv_heads;
}

int route_heads(const Config *c, int which) {
    int heads = which == VALUES ? c->kv_heads : c->heads;
    return c->attention_form == MOA ? 1 : heads;
}

int route_choices(const Config *c) { // K
    return c->attention_form == MOA ? c->heads : c->attention_topk;
}

int attention_score(const Config *c) {
    return c->attention_form == MOA ? SOFTMAX : SIGMOID;
}

int attention_gate(const Config *c) {
    return c->attention_form == MOA ? RENORMALIZED : PROBABILITY;
}

ExpertHeads *heads_of(const Model *m, int l) {
    return (ExpertHeads *)m->acts.layer[l].mixer;
}

int switchhead_wanted(const Config *c) {
    return c->attention_experts > 0 && c->attention_form == SWITCHHEAD;
}

int moa_wanted(const Config *c) {
    return c->attention_experts > 0 && c->attention_form == MOA;
}

const char *attention_refuses(const Config *c) {
    if (c->mixer != MIX_ATTENTION) {
        return "--attention-experts goes with --mixer attention";
    }
    if (c->attention_form == SWITCHHEAD && c->attention_topk > c->attention_experts) {
        return "--attention-topk: a head cannot choose more experts than it has, which is --attention-experts";
    }
    if (c->attention_form == MOA && c->heads > c->attention_experts) {
        return "--heads: with --attention-form moa a token cannot have more heads than there are, which is --attention-experts";
    }
    if (c->attention_form == MOA && c->heads == 1) {
        return "--heads 1: with --attention-form moa the weight of a single head would always be 1, so the router would "
               "never learn; choose more";
    }
    if (head_width(c) % 2) {
        return "--head-width: heads must have an even width for rotary positions";
    }
    return NULL;
}

// Routers of a layer's attention.
int attention_routes(const Config *c) {
    if (!c->attention_experts) {
        return 0;
    }
    return c->attention_form == MOA ? 1 : 2;
}

// Experts of all heads of a router; 0: there is no such router.
int route_experts(const Config *c, int which) {
    return which < attention_routes(c) ? route_heads(c, which) * c->attention_experts : 0;
}

const char *route_name(const Config *c, int which) {
    const char *outputs = c->attention_form == MOA ? "heads" : "outputs";
    return which == VALUES ? "values" : outputs;
}

// ---- weights

// What both forms, and attention without experts, may have besides: a bias, norms of queries and keys, and values of words.
void attention_extras(const Config *c, int l, Tensor *list, int *count) {
    int D = head_width(c), row = c->qk_norm_over == OVER_ROW;
    add_tensor(list, count, l, IN_LAYER(qkv_bias), 1, 1, 1, c->qkv_bias ? (c->heads + 2 * c->kv_heads) * D : 0, INIT_ZERO);
    add_tensor(list, count, l, IN_LAYER(q_norm), 1, 1, 1, c->qk_norm ? D * (row ? c->heads : 1) : 0, INIT_ONE);
    add_tensor(list, count, l, IN_LAYER(k_norm), 1, 1, 1, c->qk_norm ? D * (row ? c->kv_heads : 1) : 0, INIT_ONE);
    add_tensor(list, count, l, IN_LAYER(value_embed), 2, 1, c->value_embedding ? c->vocab : 0, key_heads(c) * D,
               INIT_ZERO)->looked_up = BY_WORD;
}

double attention_uses(const Config *c, const Tensor *t) {
    return strstr(t->kind, "_experts") ? (double)route_choices(c) / c->attention_experts : 1;
}

// Scores and sums: two products of (T,T) with (T,D) for each head, of which causality leaves half.
double attention_flops(const Config *c) {
    return 2.0 * c->seq * c->heads * head_width(c);
}

// Without training the choices' answers count most, with it also what their way back takes.
size_t attention_scratch(const Config *c, int N, int train) {
    size_t n = (size_t)N, H = (size_t)c->heads, KV = (size_t)key_heads(c), D = (size_t)head_width(c);
    size_t scores = n * (size_t)route_experts(c, OUTPUTS), choices = n * (size_t)route_heads(c, OUTPUTS) * (size_t)route_choices(c);
    size_t forward = 4 * scores + n * (H + 2 * KV) * D + choices * ((size_t)c->dim + D);
    size_t backward = 6 * scores + n * (4 * H + 6 * KV) * D + choices * ((size_t)c->dim + 3 * D + 2);
    return train && backward > forward ? backward : forward;
}

// ---- memory

void allocate_head_route(Model *m, HeadRoute *h, int heads, int N) {
    const Config *c = &m->config;
    Route *r = &h->all;
    int E = c->attention_experts, K = route_choices(c);
    size_t choices = (size_t)heads * N * K;
    h->heads = heads;
    h->per_choice = c->attention_form == MOA;
    r->E = E;
    r->K = K;
    r->p = own_reals(m, (size_t)heads * N * E);
    r->lse = own_reals(m, (size_t)heads * N);
    r->weight = own_reals(m, choices);
    lay_choices(r, (int *)own(m, choices * 5 + (size_t)heads * E + 1, sizeof(int)), choices);
    h->att_row = (int *)own(m, choices, sizeof(int));
    r->count = own_by_group(m, N, c->attention_aux_weight > 0 ? heads * E : 0);
    r->slope = own_by_group(m, N, c->attention_aux_weight > 0 ? heads * E : 0);
}

// What a layer keeps with --recompute, too.
void allocate_heads(Model *m, int l, int N) {
    const Config *c = &m->config;
    int H = c->heads, D = head_width(c), E = c->attention_experts;
    ExpertHeads *s = (ExpertHeads *)own(m, 1, sizeof(ExpertHeads));
    m->acts.layer[l].mixer = s;
    for (int which = 0; which < attention_routes(c); which++) {
        allocate_head_route(m, &s->route[which], route_heads(c, which), N);
        allocate_statistics(m, c->layers + 2 * l + which);
    }
    if (l > 0) {
        s->angles = heads_of(m, 0)->angles;
        s->of_model = heads_of(m, 0)->of_model;
        s->of_head = heads_of(m, 0)->of_head;
        return;
    }
    s->angles = own_reals(m, (size_t)c->seq * D);
    head_angles(c, s->angles, 0, c->seq);
    s->of_model = (int *)own(m, (size_t)2 * H * E, sizeof(int));
    s->of_head = s->of_model + (size_t)H * E;
    for (int e = 0; e < H * E; e++) {
        s->of_model[e] = c->dim;
        s->of_head[e] = D;
    }
}

size_t attention_lay(Model *m, int l, int N, real *memory) {
    const Config *c = &m->config;
    if (!m->acts.layer[l].mixer) {
        allocate_heads(m, l, N);
    }
    ExpertHeads *s = heads_of(m, l);
    size_t H = (size_t)c->heads, KV = (size_t)key_heads(c), D = (size_t)head_width(c), used = 0;
    size_t norms = c->qk_norm ? H + KV : 0, valued = c->attention_form == SWITCHHEAD ? KV * (size_t)route_choices(c) : 0;
    const struct {
        real **array;
        size_t each; // numbers of a token
    } list[] = {
        {&s->qkv, (H + 2 * KV) * D}, {&s->att, H * D},     {&s->lse, H},
        {&s->raw_qk, norms * D},     {&s->rstd_qk, norms}, {&s->rows, valued * D},
    };
    for (int i = 0; i < COUNT(list); i++) {
        *list[i].array = memory ? memory + used : NULL;
        used += ((size_t)N * list[i].each + 15) / 16 * 16;
    }
    return used;
}

// to (N rows, to_width apart) = from (N rows, from_width apart), of which `width` numbers
void copy_columns(real *to, int to_width, const real *from, int from_width, int width, int N) {
#pragma omp parallel for if (is_worth_threads(N, width))
    for (int n = 0; n < N; n++) {
        memcpy(to + (size_t)n * to_width, from + (size_t)n * from_width, (size_t)width * sizeof(real));
    }
}

// ---- the routers

// One head of a router: a Route as the lesson's functions want it.
Route route_of_head(const HeadRoute *h, int head) {
    Route one = h->all;
    int groups = one.group ? one.N / one.group : 0;
    size_t rows = (size_t)head * one.N, experts = (size_t)head * groups * one.E;
    one.p += rows * one.E;
    one.expert += rows * one.K;
    one.served += rows * one.K;
    one.count += experts;
    one.slope += experts;
    one.aux = 0;
    one.dropped = 0;
    return one;
}

// Adds a batch's choices of a head to the statistics, whose counts are those of all heads' experts.
void count_head(Statistics *stats, const Route *one, int head, int score) {
    Statistics mine = *stats;
    mine.count += (size_t)head * one->E;
    count_routing(&mine, one, score);
    mine.count = stats->count;
    *stats = mine;
}

// The balance loss of one head, as the lesson's (chapter 3, "balance"): one.slope and one.aux. The loss of a layer is the mean
// of its heads', so that --attention-aux-weight is what it is at balance. counted (E): choices of the step so far.
void balance_head(Model *m, Route *one, const double *counted, int heads) {
    const Config *c = &m->config;
    int E = one->E;
    count_choices(one->count, one->expert, one->N, E, one->K, one->group);
    if (c->group == STEP && m->batch.mode == TRAIN_MODE) {
        memcpy(one->count, counted, (size_t)E * sizeof(double));
    }
    if (c->group != SEQUENCE) {
        sum_over_ranks(one->count, E);
    }
    memset(one->slope, 0, (size_t)(one->N / one->group) * E * sizeof(double));
    for (int i = 0; i < one->N / one->group; i++) {
        add_balance(one->slope + (size_t)i * E, one->count + (size_t)i * E, E, c->attention_aux_weight / heads);
    }
    one->aux = mean_of_slopes(one, attention_score(c));
}

// The capacity of one head's experts, in training: one.served and one.dropped. A group whose tokens are spread over processes
// is served by each of them for all.
void limit_head(const Model *m, Route *one) {
    const Config *c = &m->config;
    int K = one->K, mine = one->N * K, before = 0;
    if (!is_spread(c)) {
        drop_overflow(one, c->attention_capacity_factor, K, 1);
        return;
    }
    Route all = *one;
    const int *rank_tokens = m->crossing->rank_tokens;
    all.served = (int *)gather_rows(one->served, rank_tokens, (size_t)K * sizeof(int));
    all.N = 0;
    for (int rank = 0; rank < ranks.size; rank++) {
        before += rank < ranks.rank ? rank_tokens[rank] * K : 0;
        all.N += rank_tokens[rank];
    }
    all.group = all.N;
    drop_overflow(&all, c->attention_capacity_factor, K, 1);
    for (int i = 0; i < mine; i++) {
        one->dropped += one->served[i] >= 0 && all.served[before + i] < 0;
        one->served[i] = all.served[before + i];
    }
    free(all.served);
}

// Sorts the served choices of all heads by expert; see sort_by_expert().
void sort_heads(HeadRoute *h) {
    Route *r = &h->all;
    int of_head = r->N * r->K, choices = h->heads * of_head;
    int *key = (int *)allocate(choices, sizeof(int));
    for (int i = 0; i < choices; i++) {
        key[i] = r->served[i] < 0 ? -1 : i / of_head * r->E + r->served[i];
    }
    counting_sort(r->choice, r->offset, key, choices, h->heads * r->E);
    free(key);
    memset(r->row, -1, (size_t)choices * sizeof(int));
    for (int row = 0; row < r->offset[h->heads * r->E]; row++) {
        int choice = r->choice[row], head = choice / of_head, token = choice % of_head / r->K;
        r->row[choice] = row;
        r->token[row] = token;
        h->att_row[row] = h->per_choice ? choice : token * h->heads + head;
    }
}

// x (N,C) -> the experts of each head, their weights, and the choices sorted by expert.
void choose_heads(Model *m, int l, int which, const char *router, const real *x) {
    const Config *c = &m->config;
    HeadRoute *h = &heads_of(m, l)->route[which];
    Statistics *stats = &m->stats[c->layers + 2 * l + which];
    Route *r = &h->all;
    int N = m->batch.B * m->batch.T, heads = h->heads, E = r->E, K = r->K, train = m->batch.mode == TRAIN_MODE;
    real *wide = scratch(m, (size_t)N * heads * E), *logits = scratch(m, (size_t)N * heads * E);
    r->N = r->rows = N;
    r->group = c->group == SEQUENCE ? m->batch.T : N;
    r->aux = 0;

    // Scores, choice and weights, as in chapter 3. --precision bf16 does not hold here, either.
    multiply_in(PRODUCTS_FP32);
    matmul(wide, x, layer_tensor(m, l, router, WEIGHTS), N, c->dim, heads * E, SET);
    multiply_in(c->precision);
    for (int i = 0; i < heads; i++) {
        copy_columns(logits + (size_t)i * N * E, E, wide + i * E, heads * E, E, N);
    }
    scores_forward(r->p, r->lse, logits, heads * N, E, attention_score(c));
    select_topk(r->expert, r->p, heads * N, E, K);
    weights_forward(r->weight, r->p, r->expert, heads * N, E, K, attention_gate(c), 1);
    memcpy(r->served, r->expert, (size_t)heads * N * K * sizeof(int));

    // Balance and capacity, head by head.
    for (int i = 0; i < heads; i++) {
        Route one = route_of_head(h, i);
        if (train) {
            count_head(stats, &one, i, attention_score(c));
        }
        if (c->attention_aux_weight > 0 && m->batch.mode != EVAL_MODE) {
            balance_head(m, &one, stats->count + (size_t)i * E, heads);
        }
        if (c->attention_capacity_factor > 0 && train) {
            limit_head(m, &one);
            stats->dropped += one.dropped;
        }
        r->aux += one.aux;
    }

    // moa's z-loss, the mean of lse^2.
    for (int n = 0; n < N && c->attention_z_weight > 0 && m->batch.mode != EVAL_MODE; n++) {
        r->aux += c->attention_z_weight * (double)r->lse[n] * (double)r->lse[n] / N;
    }
    sort_heads(h);
}

// From dweight (heads,N,K) and the losses back to the router's matrix; adds to dx (N,C).
void choose_heads_backward(Model *m, int l, int which, const char *router, real *dx, const real *dweight, const real *x) {
    const Config *c = &m->config;
    HeadRoute *h = &heads_of(m, l)->route[which];
    const Route *r = &h->all;
    int N = r->N, heads = h->heads, E = r->E;
    size_t size = (size_t)heads * N * E;
    real *dp = scratch(m, size), *dlogits = scratch(m, size), *wide = scratch(m, size);
    memset(dp, 0, size * sizeof(real));
    weights_backward(dp, dweight, r->weight, r->p, r->expert, heads * N, E, r->K, attention_gate(c), 1);
    for (int i = 0; i < heads && c->attention_aux_weight > 0; i++) {
        Route one = route_of_head(h, i);
        balance_backward(dp + (size_t)i * N * E, &one, attention_score(c), m->batch.scale);
    }
    scores_backward(dlogits, dp, r->p, r->lse, heads * N, E, attention_score(c),
                    c->attention_z_weight * m->batch.scale / N);
    for (int i = 0; i < heads; i++) {
        copy_columns(wide + i * E, heads * E, dlogits + (size_t)i * N * E, E, E, N);
    }
    multiply_in(PRODUCTS_FP32);
    matmul_backward(dx, layer_tensor(m, l, router, GRADS), wide, x, layer_tensor(m, l, router, WEIGHTS), N, c->dim,
                    heads * E, ADD);
    multiply_in(c->precision);
}

// ---- what both forms have: norms and positions, attention, and the experts of the output

// In qkv (N,(H+2KV)*D): norms of queries and keys, rotary positions, and the values of words.
void prepare_heads(Model *m, int l) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    ExpertHeads *s = heads_of(m, l);
    int N = m->batch.B * m->batch.T, H = c->heads, KV = key_heads(c), D = head_width(c), Q = (H + 2 * KV) * D;
    if (w->q_norm) {
        norm_heads_forward(s->qkv, s->raw_qk, s->rstd_qk, w->q_norm, w->k_norm, N, H, KV, D, D, c->norm_eps);
    }
    rope(s->qkv, Q, N, m->batch.T, H + KV, D, s->angles, 1);
    if (w->value_embed) {
        add_word_values(s->qkv + (H + KV) * D, Q, w->value_embed, m->batch.inputs, N, KV * D);
    }
}

// dqkv (N,(H+2KV)*D) comes in as the gradient by what prepare_heads() made, and becomes that by what it read.
void prepare_heads_backward(Model *m, int l, real *dqkv) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l], *dw = &m->grads.layer[l];
    const ExpertHeads *s = heads_of(m, l);
    int N = m->batch.B * m->batch.T, H = c->heads, KV = key_heads(c), D = head_width(c), Q = (H + 2 * KV) * D;
    if (w->value_embed) {
        add_word_gradients(m, dw->value_embed, dqkv + (H + KV) * D, Q, KV * D);
    }
    rope(dqkv, Q, N, m->batch.T, H + KV, D, s->angles, -1);
    if (w->q_norm) {
        norm_heads_backward(dqkv, dw->q_norm, dw->k_norm, s->raw_qk, s->rstd_qk, w->q_norm, w->k_norm, N, H, KV, D, D);
    }
}

// out (N,C) += sum over a token's heads and their chosen experts of weight * W_O att
void outputs_forward(Model *m, int l, real *out) {
    const Config *c = &m->config;
    ExpertHeads *s = heads_of(m, l);
    const HeadRoute *h = &s->route[OUTPUTS];
    const Route *r = &h->all;
    int experts = h->heads * r->E;
    real *answer = scratch(m, (size_t)r->offset[experts] * c->dim);
    grouped_matmul(answer, s->att, h->att_row, layer_tensor(m, l, "output_experts", WEIGHTS), r->offset, experts,
                   s->of_head, s->of_model);
    for (int i = 0; i < h->heads; i++) {
        size_t choices = (size_t)i * r->N * r->K;
        combine(out, answer, r->weight + choices, r->row + choices, r->N, r->K, c->dim);
    }
}

// Given dout (N,C): datt (N,H*D) and dweight (heads,N,K) are written. As in activation_backward(), the gradient by a weight
// is dout . (W_O att) = (dout W_O) . att, so that no answer has to be kept.
void outputs_backward(Model *m, int l, real *datt, real *dweight, const real *dout) {
    const Config *c = &m->config;
    ExpertHeads *s = heads_of(m, l);
    const HeadRoute *h = &s->route[OUTPUTS];
    const Route *r = &h->all;
    int N = r->N, H = c->heads, D = head_width(c), experts = h->heads * r->E, rows = r->offset[experts];
    real *drows = scratch(m, (size_t)rows * D), *weighted = scratch(m, (size_t)rows * D);
    memset(dweight, 0, (size_t)h->heads * N * r->K * sizeof(real));
    grouped_matmul_dx(drows, dout, r->token, layer_tensor(m, l, "output_experts", WEIGHTS), r->offset, experts,
                      s->of_head, s->of_model);
#pragma omp parallel for if (is_worth_threads(rows, D))
    for (int row = 0; row < rows; row++) {
        const real *att = s->att + (size_t)h->att_row[row] * D;
        real weight = r->weight[r->choice[row]], sum = 0;
        for (int i = 0; i < D; i++) {
            real *d = &drows[(size_t)row * D + i];
            sum += *d * att[i];
            *d *= weight;
            weighted[(size_t)row * D + i] = weight * att[i];
        }
        dweight[r->choice[row]] = sum;
    }
    grouped_matmul_dw(layer_tensor(m, l, "output_experts", GRADS), dout, r->token, weighted, NULL, r->offset, experts,
                      s->of_head, s->of_model);

    // A row of att adds up its choices: with moa it has one, else the K of its head.
    memset(datt, 0, (size_t)N * H * D * sizeof(real));
    if (h->per_choice) {
        combine(datt, drows, NULL, r->row, N * r->K, 1, D);
        return;
    }
    real *of_heads = scratch(m, (size_t)H * N * D);
    memset(of_heads, 0, (size_t)H * N * D * sizeof(real));
    combine(of_heads, drows, NULL, r->row, H * N, r->K, D);
    for (int i = 0; i < H; i++) {
        copy_columns(datt + i * D, H * D, of_heads + (size_t)i * N * D, D, D, N);
    }
}

// ---- forward, from x (N,C) on

// The choices of layer l's routers. --recompute finds those of the first time, which are counted already.
void choose_all_heads(Model *m, int l, const real *x) {
    const Config *c = &m->config;
    if (m->again) {
        return;
    }
    if (c->attention_form == SWITCHHEAD) {
        choose_heads(m, l, VALUES, "value_router", x);
    }
    choose_heads(m, l, OUTPUTS, "output_router", x);
    m->acts.layer[l].mixer_aux = 0;
    for (int which = 0; which < attention_routes(c); which++) {
        m->acts.layer[l].mixer_aux += heads_of(m, l)->route[which].all.aux;
    }
}

// x (N,C) -> choices, and queries, keys and values, ready for attention.
void heads_begin(Model *m, int l, const real *x) {
    scratch_reset(m);
    choose_all_heads(m, l, x);
    if (m->config.attention_form == MOA) {
        moa_project(m, l, x);
    } else {
        switchhead_project(m, l, x);
    }
    prepare_heads(m, l);
}

// out (N,C) += what attention makes of x (N,C)
void heads_forward(Model *m, int l, real *out, const real *x) {
    const Config *c = &m->config;
    ExpertHeads *s = heads_of(m, l);
    heads_begin(m, l, x);
    attention_forward(s->att, s->lse, s->qkv, m->batch.B, m->batch.T, c->heads, key_heads(c), head_width(c));
    outputs_forward(m, l, out);
}

// ---- generation: a cache as that of dense attention with as many key and value heads

size_t attention_cache(const Config *c) {
    return (size_t)c->seq * 2 * key_heads(c) * head_width(c);
}

// The same for one token: x (C), out (C); cache (seq, 2*KV*D), see Generation.
void heads_step(Model *one, int l, real *out, const real *x, real *cache, int position) {
    const Config *c = &one->config;
    ExpertHeads *s = heads_of(one, l);
    int H = c->heads, KV = key_heads(c), D = head_width(c), width = 2 * KV * D, seen = min_int(position + 1, c->seq);

    // The angles of that token's position. All layers have the same, so the first one finds them.
    if (l == 0) {
        head_angles(c, s->angles, position, 1);
    }
    heads_begin(one, l, x);
    memcpy(cache + (size_t)(position % c->seq) * width, s->qkv + H * D, (size_t)width * sizeof(real));
    attend_to_cache(s->att, scratch(one, seen), s->qkv, cache, seen, H, KV, D);
    outputs_forward(one, l, out);
}

// ---- options

int has_attention_experts(const Config *c) {
    return c->attention_experts > 0;
}

int has_attention_balance(const Config *c) {
    return c->attention_experts > 1; // the loss of a single expert is constant
}

int may_have_key_heads(const Config *c) {
    return !moa_wanted(c);
}

#define ATTENTION_EXPERTS "Experts in attention"

const Option attention_options[] = {
    INTEGER("attention-experts", attention_experts, "0", 0, 1024, MODEL, ATTENTION_EXPERTS,
            "experts of each head, or with moa heads to choose from (E); 0: attention has none"),
    INTEGER("attention-topk", attention_topk, "2", 1, 64, MODEL, ATTENTION_EXPERTS,
            "switchhead: experts that a head takes for each token; with moa a token takes --heads heads"),
    WORD("attention-form", attention_form, "switchhead", attention_forms, MODEL, ATTENTION_EXPERTS,
         "switchhead: experts are matrices of values and of outputs; moa: experts are heads"),
    NUMBER("attention-aux-weight", attention_aux_weight, "0.01", 0, 1e6, TRAIN, ATTENTION_EXPERTS,
           "weight of their balance loss, which is 1 at balance for each router"),
    NUMBER("attention-z-weight", attention_z_weight, "0", 0, 1e6, TRAIN, ATTENTION_EXPERTS, "moa: weight of the router's z-loss"),
    NUMBER("attention-capacity-factor", attention_capacity_factor, "0", 0, 1e6, TRAIN, ATTENTION_EXPERTS,
           "in training an expert takes at most this times its fair share; 0: all that comes"),
};

const Effect attention_effects[] = {
    {"attention-topk", switchhead_wanted, "experts in attention that are counted: --attention-experts 4 and switchhead"},
    {"attention-form", has_attention_experts, "experts in attention: --attention-experts 4"},
    {"attention-aux-weight", has_attention_balance, "experts in attention: --attention-experts 4"},
    {"attention-z-weight", moa_wanted, "a router with softmax scores: --attention-form moa"},
    {"attention-capacity-factor", has_attention_balance, "experts in attention: --attention-experts 4"},
    {"kv-heads", may_have_key_heads, "heads of keys and values, of which moa has one: --attention-form switchhead"},
};

#endif
