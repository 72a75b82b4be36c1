// Experts in attention on a GPU, what both forms have in common: see dev/mixers/attention_experts.h, whose arrays and
// functions have the same names.
// Gives: heads_forward, choose_heads_backward, outputs_backward, rows_of_x, head_stats, ... Needs: dev/cuda/common.cuh, experts.cuh,
// plan.cuh, attention.cuh, qk_norm.cuh, routers/pieces.cuh; mixer.cuh, combine() and the memory of train_moe.cu, which includes it.
//
// The kernels of a router see a token once for each head: `rows` of heads*N, head after head. Sorting is the plan's
// (plan.cuh), with expert e of head h as number h*E + e. The grouped products are those of the feed-forward's experts
// (experts.cuh), with an activation that changes nothing (SAME): HIDDEN makes values or queries, ANSWER outputs, and on
// the way back DHIDDEN makes of dout the gradients by rows of att, by weights, and what the gradient of W_O needs. Their
// inputs and outputs are the columns of qkv, put there by small kernels here, in switchhead.cuh and in moa.cuh. A capacity
// over tokens of several GPUs is not here: it needs --group sequence.
#ifndef CUDA_ATTENTION_EXPERTS_CUH
#define CUDA_ATTENTION_EXPERTS_CUH

struct HeadRoute {      // of one router, on the device
    int heads;
    Route all;          // N is that of tokens; its arrays have heads*N rows
    int *att_row;       // (heads*N*K) of each sorted row: the row of att, as (N*H,D), that it reads
    int *token_row;     // (N,heads*K)  the sorted rows of each token, -1: none
    int2 *tile;
    int tiles;
    PlanScratch plan;
    Experts experts;    // for the products: heads*E experts of C and D
};

struct ExpertHeads { // of a layer
    HeadRoute route[2];
    float *angles;
    // What --recompute does not keep.
    floatX *qkv, *att, *raw_qk;
    float *lse, *rstd_qk;
    floatX *rows;    // (heads*N*K,D)  switchhead: each chosen expert's values, sorted
};

// Where the two forms differ on the way to attention: x (N,C) -> queries, keys and values in qkv, given the choices.
void switchhead_project(Model *m, int l, const floatX *x);
void moa_project(Model *m, int l, const floatX *x);

ExpertHeads *heads_of(const Model *m, int l) {
    return (ExpertHeads *)m->layers[l].mixer;
}

// The statistics of router `which` of layer l, in the report behind those of the layers: counts of heads*E experts, and
// ENTROPY to TOKENS.
const int HEAD_STATS = TOKENS + 1;

size_t head_stats_size(const Config *c) {
    size_t size = 0;
    for (int which = 0; which < attention_routes(c); which++) {
        size += (size_t)route_experts(c, which) + HEAD_STATS;
    }
    return size;
}

double *head_stats(const Model *m, int l, int which) {
    const Config *c = &m->config;
    double *first = layer_stats(m, c->layers) + (size_t)l * head_stats_size(c);
    return which == 0 ? first : first + route_experts(c, 0) + HEAD_STATS;
}

// ---- memory

const char *expert_heads_refuse(const Config *c) {
    int D = head_width(c);
    if (D % 8 || D > 256) {
        return "--head-width, with --attention-experts, must be a multiple of 8 and at most 256 on a GPU";
    }
    if (MANY && c->attention_capacity_factor > 0 && c->group != SEQUENCE) {
        return "--attention-capacity-factor on several GPUs needs --group sequence; ./train_moe_mpi does without it";
    }
    return NULL;
}

// Widths, activations and beginnings of the matrices for the products of one router's experts.
void own_head_experts(Model *m, HeadRoute *h) {
    const Config *c = &m->config;
    int all = h->heads * h->all.E, D = head_width(c);
    int *ints = (int *)allocate((size_t)2 * all, sizeof(int));
    size_t *matrix = (size_t *)allocate((size_t)all, sizeof(size_t));
    for (int e = 0; e < all; e++) {
        ints[e] = D;
        ints[all + e] = SAME;
        matrix[e] = (size_t)e * c->dim * D;
    }
    int *to = own_ints(m, (size_t)2 * all);
    size_t *places = (size_t *)own(m, (size_t)all, sizeof(size_t));
    upload(m, to, ints, (size_t)2 * all * sizeof(int));
    upload(m, places, matrix, (size_t)all * sizeof(size_t));
    free(ints);
    free(matrix);
    const Route *r = &h->all;
    h->experts = {all, c->dim, D, D, to, to + all, places, places, r->offset, r->token, r->choice, h->tile, h->tiles};
}

void own_head_route(Model *m, HeadRoute *h, int heads, int N) {
    const Config *c = &m->config;
    Route *r = &h->all;
    int E = c->attention_experts, K = route_choices(c), all = heads * E;
    size_t rows = (size_t)heads * N, choices = rows * K, chunks = (size_t)div_up((int)rows, BLOCK_ROWS);
    h->heads = heads;
    r->E = E;
    r->K = K;
    r->p = own_floats(m, rows * E);
    r->lse = own_floats(m, rows);
    r->weight = own_floats(m, choices);
    lay_choices(r, own_ints(m, choices * 5 + all + 1), choices);
    h->att_row = own_ints(m, choices);
    h->token_row = own_ints(m, choices);
    r->count = own_by_group(m, N, all);
    r->slope = own_by_group(m, N, all);
    h->tiles = (int)(choices / TM) + all;
    h->tile = (int2 *)own(m, h->tiles, sizeof(int2));
    h->plan.count = own_ints(m, all * chunks);
    h->plan.total = own_ints(m, all);
    h->plan.first_tile = own_ints(m, all + 1);
    h->plan.active = own_ints(m, 1);
    h->plan.done = (unsigned *)own_ints(m, 1);
    if (!m->dry) {
        zero(h->plan.done, sizeof(unsigned));
    }
    own_head_experts(m, h);
}

// What a layer keeps with --recompute, too.
void own_expert_heads(Model *m, int l, int N) {
    const Config *c = &m->config;
    int D = head_width(c);
    ExpertHeads *s = (ExpertHeads *)own_host(m, 1, sizeof(ExpertHeads));
    m->layers[l].mixer = s;
    for (int which = 0; which < attention_routes(c); which++) {
        own_head_route(m, &s->route[which], route_heads(c, which), N);
    }
    if (l > 0) {
        s->angles = heads_of(m, 0)->angles;
        return;
    }
    s->angles = own_floats(m, (size_t)c->seq * D);
    float *angles = (float *)allocate((size_t)c->seq * D, sizeof(float));
    head_angles(c, angles, 0, c->seq);
    upload(m, s->angles, angles, (size_t)c->seq * D * sizeof(float));
    free(angles);
}

size_t expert_heads_lay(Model *m, int l, int N, char *memory) {
    const Config *c = &m->config;
    if (!m->layers[l].mixer) {
        own_expert_heads(m, l, N);
    }
    ExpertHeads *s = heads_of(m, l);
    size_t H = (size_t)c->heads, KV = (size_t)key_heads(c), D = (size_t)head_width(c), n = (size_t)N, low = sizeof(floatX);
    size_t valued = c->attention_form == SWITCHHEAD ? KV * (size_t)route_choices(c) : 0, norms = c->qk_norm ? H + KV : 0;
    return lay_list(memory, {{&s->qkv, n * (H + 2 * KV) * D * low},
                             {&s->att, n * H * D * low},
                             {&s->raw_qk, n * norms * D * low},
                             {&s->lse, n * H * sizeof(float)},
                             {&s->rstd_qk, n * norms * sizeof(float)},
                             {&s->rows, n * valued * D * low}});
}

// Pieces of scratch memory, of which each begins at a multiple of 256 bytes. choices: those of all heads of the larger
// router.
size_t expert_heads_scratch(const Config *c, int N, int train) {
    size_t n = (size_t)N, C = (size_t)c->dim, H = (size_t)c->heads, KV = (size_t)key_heads(c), D = (size_t)head_width(c);
    size_t heads = (size_t)route_heads(c, OUTPUTS), scores = n * heads * (size_t)c->attention_experts;
    size_t choices = n * heads * (size_t)route_choices(c), low = sizeof(floatX);
    size_t router = n * C * sizeof(float) + 3 * scores * sizeof(float) + choices * sizeof(int);
    size_t products = choices * (C + 4 * D) * low + choices * (size_t)(div_up((int)D, TN) + 2) * sizeof(float);
    size_t back = n * (H + 2 * KV + H) * D * low + n * H * sizeof(float) +
                  (c->qk_norm ? (H + KV) * (size_t)div_up(N, QK_TOKENS) * D * sizeof(double) : 0);
    return 2 * router + products + (train ? back : 0) + 32 * 256;
}

size_t expert_heads_cache(const Config *c) {
    return attention_cache(c) * sizeof(floatX);
}

// ---- the routers

// A warp has one head of one token. wide (N,heads*E): the logits.
__global__ void choose_heads_kernel(Route r, const float *wide, int heads, int N, int score, int gate) {
    int row = row_of_warp(), E = r.E, K = r.K;
    if (row >= heads * N) {
        return;
    }
    float *p = r.p + (size_t)row * E;
    scores_of_row(p, r.lse + row, wide + ((size_t)(row % N) * heads + row / N) * E, E, score);
    topk_of_row(r.expert + (size_t)row * K, [=](int e) { return p[e]; }, E, K);
    weights_of_row(r.weight + (size_t)row * K, p, r.expert + (size_t)row * K, K, gate, 1);
}

// A thread has one expert of one group of one head: it refuses what comes beyond the capacity. served begins as expert.
__global__ void limit_heads_kernel(Route r, int size, int capacity) {
    int i = (int)thread_of_grid(), e = i % r.E, count = 0;
    size_t first = (size_t)(i / r.E) * r.group;
    for (int j = 0; i < size && j < r.group * r.K; j++) {
        size_t choice = (first + j % r.group) * r.K + j / r.group; // of all tokens choice 0, then of all choice 1, ...
        if (r.expert[choice] == e && ++count > capacity) {
            r.served[choice] = -1;
        }
    }
}

// key: number h*E + e of each choice that is served, else -1.
__global__ void key_heads_kernel(int *key, Route r, int size) {
    int i = (int)thread_of_grid();
    if (i < size) {
        key[i] = r.served[i] < 0 ? -1 : i / (r.N * r.K) * r.E + r.served[i];
    }
}

// After sorting by key: rows are told by token, and know their rows of att.
__global__ void place_heads_kernel(HeadRoute h, int size, int per_choice) {
    int choice = (int)thread_of_grid(), N = h.all.N, K = h.all.K;
    if (choice < size) {
        int row = h.all.row[choice], head = choice / (N * K), n = choice % (N * K) / K;
        h.token_row[((size_t)n * h.heads + head) * K + choice % K] = row;
        if (row >= 0) {
            h.all.token[row] = n;
            h.att_row[row] = per_choice ? choice : n * h.heads + head;
        }
    }
}

// stats: counts of all heads' experts, from count (heads,groups,E)
__global__ void count_heads_kernel(double *stats, const double *count, int groups, int E, int all) {
    int e = (int)thread_of_grid();
    for (int g = 0; e < all && g < groups; g++) {
        stats[e] += count[((size_t)(e / E) * groups + g) * E + e % E];
    }
}

// Of row i of p. With q = p / sum for sigmoid scores, -sum of q log(q) = log(sum) - (sum of p log(p)) / sum.
struct HeadEntropy {
    const float *p;
    int E, score;
    __device__ double operator()(size_t i) const {
        double sum = 0, dot = 0;
#pragma unroll 1 // several logarithms at a time need more registers than there are
        for (int e = 0; e < E; e++) {
            double share = score == SIGMOID ? (double)at_least_tiny(p[i * E + e]) : (double)p[i * E + e];
            sum += share;
            dot += share > 0 ? share * log(share) : 0;
        }
        return score == SIGMOID ? log(sum) - dot / sum : -dot;
    }
};

struct HeadLoss { // slope . p of row i, by the sum of p where scores are sigmoid: see mean_of_slopes()
    Route r;
    int score;
    __device__ double operator()(size_t i) const {
        const double *slope = r.slope + i / r.group * r.E;
        const float *p = r.p + i * r.E;
        double dot = 0, sum = score == SIGMOID ? 0 : 1;
        for (int e = 0; e < r.E; e++) {
            dot += slope[e] * (double)at_least_tiny(p[e]);
            sum += score == SIGMOID ? (double)at_least_tiny(p[e]) : 0;
        }
        return dot / sum;
    }
};

struct IsRefused {
    const int *served;
    __device__ double operator()(size_t i) const {
        return served[i] < 0;
    }
};

struct One {
    __device__ double operator()(size_t) const {
        return 1;
    }
};

// The choices are counted and balanced, and some are refused: r.expert -> r.served, the statistics, the layer's MIXER_AUX.
void balance_heads(Model *m, int l, int which) {
    const Config *c = &m->config;
    HeadRoute *h = &heads_of(m, l)->route[which];
    const Route *r = &h->all;
    int heads = h->heads, N = r->N, E = r->E, K = r->K, groups = N / r->group, all = heads * E, rows = heads * N;
    int train = m->batch.mode == TRAIN_MODE, score = attention_score(c);
    double *stats = head_stats(m, l, which), *single = stats + all, *aux = layer_stats(m, l) + 4 * c->experts + MIXER_AUX;
    if (m->batch.mode == EVAL_MODE) {
        return;
    }
    count_rows(r->count, r->expert, rows, 1, E, K, K, r->group);
    if (train) {
        count_heads_kernel<<<blocks(all), THREADS, 0, stream>>>(stats, r->count, groups, E, all);
        CHECK(cudaGetLastError());
        add_sum(single + ENTROPY, HeadEntropy{r->p, E, score}, rows, 1);
        add_sum(single + ACTIVE, One{}, 1, (double)rows * K);
        add_sum(single + TOKENS, One{}, 1, rows);
    }
    if (c->attention_aux_weight > 0) {
        if (c->group == STEP && train) {
            CHECK(cudaMemcpyAsync(r->count, stats, (size_t)all * sizeof(double), cudaMemcpyDeviceToDevice, stream));
        }
        if (is_spread(c)) {
            sum_over_ranks(r->count, all);
        }
        zero(r->slope, (size_t)groups * all * sizeof(double));
        add_balance(r->slope, r->count, E, c->attention_aux_weight / heads, heads * groups);
        add_sum(aux, HeadLoss{*r, score}, rows, 1.0 / N);
    }
    if (c->attention_z_weight > 0) {
        add_sum(aux, Squares{r->lse}, N, c->attention_z_weight / N);
    }
    if (c->attention_capacity_factor > 0 && train && !m->decided) {
        int capacity = (int)fmin(ceil(c->attention_capacity_factor * K * r->group / E - 1e-9), (double)r->group * K);
        limit_heads_kernel<<<blocks((size_t)groups * all), THREADS, 0, stream>>>(*r, groups * all, capacity);
        CHECK(cudaGetLastError());
    }
    if (train) {
        add_sum(single + DROPPED, IsRefused{r->served}, (size_t)rows * K, 1);
    }
}

// Sorts the choices that are served by expert: the plan of a layer (plan.cuh) for heads*N tokens.
void sort_heads(Model *m, HeadRoute *h, int per_choice) {
    const Route *r = &h->all;
    int rows = h->heads * r->N, size = rows * r->K;
    int *key = (int *)scratch_bytes(m, (size_t)size * sizeof(int));
    key_heads_kernel<<<blocks(size), THREADS, 0, stream>>>(key, *r, size);
    CHECK(cudaGetLastError());
    Routing q = {};
    q.r = *r;
    q.r.N = q.r.rows = q.group = rows;
    q.r.E = h->heads * r->E;
    q.r.served = key;
    q.balance = -1;
    q.chunks = q.chunks_of_group = div_up(rows, BLOCK_ROWS);
    q.s = h->plan;
    q.tile = h->tile;
    q.tiles = h->tiles;
    q.todo = PLAN;
    launch_count(q);
    launch_place(q);
    place_heads_kernel<<<blocks(size), THREADS, 0, stream>>>(*h, size, per_choice);
    CHECK(cudaGetLastError());
}

// x32 (N,C) -> the experts of each head, their weights, and the choices sorted by expert.
void choose_heads(Model *m, int l, int which, const char *router, const float *x32) {
    const Config *c = &m->config;
    HeadRoute *h = &heads_of(m, l)->route[which];
    Route *r = &h->all;
    int N = m->batch.B * m->batch.T, rows = h->heads * N;
    size_t choices = (size_t)rows * r->K;
    float *wide = scratch(m, (size_t)rows * r->E);
    r->N = r->rows = N;
    r->group = c->group == SEQUENCE ? m->batch.T : N;
    gpu::matmul(wide, x32, layer_tensor(m, l, router, WEIGHTS), N, c->dim, h->heads * r->E, SET);
    choose_heads_kernel<<<row_blocks(rows), THREADS, 0, stream>>>(*r, wide, h->heads, N, attention_score(c), attention_gate(c));
    CHECK(cudaGetLastError());
    const Decided *taken = m->decided ? &m->decided[l] : NULL;
    if (taken && taken->heads_expert[which]) { // tests
        copy_ints(r->expert, taken->heads_expert[which], choices, cudaMemcpyHostToDevice);
        weights_forward(r->weight, r->p, r->expert, rows, r->E, r->K, attention_gate(c), 1);
        copy_ints(r->served, taken->heads_served[which], choices, cudaMemcpyHostToDevice);
    } else {
        copy_ints(r->served, r->expert, choices, cudaMemcpyDeviceToDevice);
    }
    balance_heads(m, l, which);
    sort_heads(m, h, c->attention_form == MOA);
}

// x (N,C), not rounded again: what routers read.
float *router_input(Model *m, const floatX *x) {
    size_t size = (size_t)m->batch.B * m->batch.T * m->config.dim;
    float *x32 = scratch(m, size);
    to_high(x32, x, size);
    return x32;
}

// The choices of layer l's routers. --recompute finds those of the first time, which are counted already.
void choose_all_heads(Model *m, int l, const floatX *x) {
    const Config *c = &m->config;
    if (m->again) {
        return;
    }
    float *x32 = router_input(m, x);
    zero(layer_stats(m, l) + 4 * c->experts + MIXER_AUX, sizeof(double));
    if (c->attention_form == SWITCHHEAD) {
        choose_heads(m, l, VALUES, "value_router", x32);
    }
    choose_heads(m, l, OUTPUTS, "output_router", x32);
}

// dwide (N,heads*E) = dlogits (heads,N,E), in the order of tokens
__global__ void widen_heads_kernel(float *dwide, const float *dlogits, int heads, int N, int E) {
    size_t i = thread_of_grid();
    if (i < (size_t)heads * N * E) {
        size_t row = i / E, head = row / N, n = row % N;
        dwide[(n * heads + head) * E + i % E] = dlogits[i];
    }
}

__global__ void balance_heads_backward_kernel(float *dp, Route r, int rows, int score, double scale) {
    int row = row_of_warp();
    if (row < rows) {
        size_t at = (size_t)row * r.E;
        balance_back_row(dp + at, r.p + at, r.slope + (size_t)(row / r.group) * r.E, r.E, score, scale);
    }
}

// From dweight (heads,N,K) and the losses back to the router's matrix; adds to dx (N,C).
void choose_heads_backward(Model *m, int l, int which, const char *router, float *dx, const float *dweight, const float *x32) {
    const Config *c = &m->config;
    HeadRoute *h = &heads_of(m, l)->route[which];
    const Route *r = &h->all;
    int N = r->N, E = r->E, rows = h->heads * N, score = attention_score(c);
    size_t size = (size_t)rows * E;
    float *dp = scratch(m, size), *dlogits = scratch(m, size), *dwide = dp;
    zero(dp, size * sizeof(float));
    weights_backward(dp, dweight, r->weight, r->p, r->expert, rows, E, r->K, attention_gate(c), 1);
    if (c->attention_aux_weight > 0) {
        balance_heads_backward_kernel<<<row_blocks(rows), THREADS, 0, stream>>>(dp, *r, rows, score, m->batch.scale / N);
        CHECK(cudaGetLastError());
    }
    scores_backward(dlogits, dp, r->p, r->lse, rows, E, score, c->attention_z_weight * m->batch.scale / N);
    widen_heads_kernel<<<blocks(size), THREADS, 0, stream>>>(dwide, dlogits, h->heads, N, E); // dp is not needed any more
    CHECK(cudaGetLastError());
    gpu::matmul_dx(dx, dwide, layer_tensor(m, l, router, WEIGHTS), N, c->dim, h->heads * E, ADD);
    matmul_dw(layer_tensor(m, l, router, GRADS), dwide, x32, N, c->dim, h->heads * E);
}

// ---- rows on their way between att and the experts' order. A thread has eight numbers of a row of D.

// to (.,D) sorted = rows from[row] of att, as (N*H,D)
__global__ void gather_heads_kernel(floatX *to, const floatX *att, const int *att_row, const int *count, int D) {
    size_t i = 8 * thread_of_grid(), row = i / D;
    float v[8];
    if (row < (size_t)*count) {
        load_pack(v, att + (size_t)att_row[row] * D + i % D);
        store_pack(to + i, v);
    }
}

// to (size rows, D): row i = the sum of the sorted rows of choices first .. first+sum of that row's head and token. With
// per_choice the row is that of choice i itself.
__global__ void scatter_heads_kernel(floatX *to, const floatX *rows, const int *row_of, int size, int N, int heads,
                                     int K, int per_choice, int D) {
    size_t i = 8 * thread_of_grid(), at = i / D;
    if (at >= (size_t)size) {
        return;
    }
    float v[8], sum[8] = {};
    size_t choice = per_choice ? at : (at % heads * N + at / heads) * K;
    for (int k = 0; k < (per_choice ? 1 : K); k++) {
        int row = row_of[choice + k];
        if (row >= 0) {
            load_pack(v, rows + (size_t)row * D + i % D);
            for (int j = 0; j < 8; j++) {
                sum[j] += v[j];
            }
        }
    }
    store_pack(to + i, sum);
}

// ---- norms, attention, outputs

QkNorm head_norms(const Model *m, int l) {
    const LayerParams *w = &m->params.layer[l];
    const ExpertHeads *s = heads_of(m, l);
    return {w->q_norm, w->k_norm, s->raw_qk, s->rstd_qk};
}

// s->qkv -> s->att
void look_back(Model *m, int l) {
    const Config *c = &m->config;
    ExpertHeads *s = heads_of(m, l);
    int B = m->batch.B, T = m->batch.T, N = B * T, H = c->heads, KV = key_heads(c), D = head_width(c), lanes = lanes_of_head(D);
    if (c->qk_norm) {
        dim3 grid(blocks(N, THREADS / lanes), H + KV);
        qk_norm_forward_kernel<<<grid, THREADS, 0, stream>>>(s->qkv, head_norms(m, l), NormHeads{H, KV, D, D}, N, lanes,
                                                             (float)c->norm_eps);
        CHECK(cudaGetLastError());
    }
    if (!m->cache) {
        attention_forward(s->att, s->lse, s->qkv, s->angles, B, T, H, KV, D);
        return;
    }
    if (l == 0) {
        float *angles = (float *)allocate(D, sizeof(float));
        head_angles(c, angles, m->position, 1);
        upload(m, s->angles, angles, (size_t)D * sizeof(float));
        free(angles);
    }
    attention_of_one(s->att, (floatX *)layer_cache(m, l), s->qkv, s->angles, m->position, c->seq, H, KV, D);
}

// dqkv (N,(H+2KV)*D) is written, given datt (N,H*D); the gradients of the norms and of the words' values are added to.
void look_back_backward(Model *m, int l, floatX *dqkv, const floatX *datt) {
    const Config *c = &m->config;
    const LayerParams *dw = &m->grads.layer[l];
    ExpertHeads *s = heads_of(m, l);
    int B = m->batch.B, T = m->batch.T, N = B * T, H = c->heads, KV = key_heads(c), D = head_width(c), Q = (H + 2 * KV) * D;
    const int *order = m->tokens + 2 * m->max_tokens;
    float *delta = scratch(m, (size_t)N * H);
    attention_backward(dqkv, datt, s->att, s->lse, s->qkv, s->angles, B, T, H, KV, D, delta);
    if (dw->value_embed) {
        note_read_rows(m, BY_WORD, m->staging + 3 * m->max_tokens, m->word_count);
        embedding_backward(dw->value_embed, dqkv + (H + KV) * D, order, order + m->max_tokens, order + 2 * m->max_tokens,
                           m->word_count, KV * D, Q);
    }
    if (c->qk_norm) {
        int chunks = div_up(N, QK_TOKENS);
        double *part = (double *)scratch_bytes(m, (size_t)(H + KV) * chunks * D * sizeof(double));
        qk_norm_backward_kernel<<<dim3(chunks, H + KV), THREADS, 0, stream>>>(dqkv, part, head_norms(m, l), HeadSizes{0, H, KV, D}, N,
                                                                              lanes_of_head(D));
        CHECK(cudaGetLastError());
        column_totals_kernel<float><<<row_blocks(D), THREADS, 0, stream>>>(dw->q_norm, part, D, H * chunks, D, 1);
        CHECK(cudaGetLastError());
        const double *of_keys = part + (size_t)H * chunks * D;
        column_totals_kernel<float><<<row_blocks(D), THREADS, 0, stream>>>(dw->k_norm, of_keys, D, KV * chunks, D, 1);
        CHECK(cudaGetLastError());
    }
}

const int *served_rows(const HeadRoute *h) { // how many, on the device
    return h->all.offset + h->experts.E;
}

size_t most_head_rows(const HeadRoute *h) {
    return (size_t)h->heads * h->all.N * h->all.K;
}

// out (N,C) = what the experts of the output make of s->att.
void outputs_forward(Model *m, int l, floatX *out) {
    const Config *c = &m->config;
    ExpertHeads *s = heads_of(m, l);
    HeadRoute *h = &s->route[OUTPUTS];
    int D = head_width(c);
    size_t most = most_head_rows(h);
    floatX *act = (floatX *)scratch_bytes(m, most * D * sizeof(floatX));
    floatX *rows = (floatX *)scratch_bytes(m, most * c->dim * sizeof(floatX));
    gather_heads_kernel<<<blocks(most * D, 8 * THREADS), THREADS, 0, stream>>>(act, s->att, h->att_row, served_rows(h), D);
    CHECK(cudaGetLastError());
    RowsJob job = {};
    job.a = act;
    job.b = low_of(m, layer_tensor(m, l, "output_experts", WEIGHTS));
    job.out = rows;
    job.weight = h->all.weight;
    rows_product<ANSWER>(&h->experts, job);
    combine(out, Sum{NULL, NULL, rows, h->token_row, h->heads * h->all.K}, h->all.N, c->dim);
}

// out (N,C) = what attention makes of x (N,C), of a batch or, in generation, of one token
void heads_forward(Model *m, int l, floatX *out, const floatX *x) {
    choose_all_heads(m, l, x);
    if (m->config.attention_form == MOA) {
        moa_project(m, l, x);
    } else {
        switchhead_project(m, l, x);
    }
    look_back(m, l);
    outputs_forward(m, l, out);
}

// The gradient of matrices of experts, dw (heads*E, O, I) += rows of `to` times rows of `from`: of outputs or of what
// reads x.
void add_head_gradients(const HeadRoute *h, WeightsJob job, int of_outputs) {
    const Experts *x = &h->experts;
    job.across_out = of_outputs ? div_up(x->widest, TN) : 0;
    job.tiles_out = of_outputs ? div_up(x->C, TM) * job.across_out : 0;
    job.across_in = of_outputs ? 0 : div_up(x->C, TN);
    if (most_stages()) {
        start_weights<MOST_STAGES>(x, job);
    } else {
        start_weights<3>(x, job);
    }
}

// Given dout (N,C): datt (N,H*D) and dweight (heads,N,K) are written.
void outputs_backward(Model *m, int l, floatX *datt, float *dweight, const floatX *dout) {
    const Config *c = &m->config;
    ExpertHeads *s = heads_of(m, l);
    HeadRoute *h = &s->route[OUTPUTS];
    const Route *r = &h->all;
    int N = r->N, H = c->heads, D = head_width(c), tiles = div_up(D, TN);
    size_t most = most_head_rows(h);
    floatX *sorted = (floatX *)scratch_bytes(m, most * D * sizeof(floatX));
    floatX *drows = (floatX *)scratch_bytes(m, most * D * sizeof(floatX));
    floatX *weighted = (floatX *)scratch_bytes(m, most * D * sizeof(floatX));
    float *part = scratch(m, most * tiles);
    gather_heads_kernel<<<blocks(most * D, 8 * THREADS), THREADS, 0, stream>>>(sorted, s->att, h->att_row, served_rows(h), D);
    CHECK(cudaGetLastError());
    RowsJob job = {};
    job.a = dout;
    job.b = low_of(m, layer_tensor(m, l, "output_experts", WEIGHTS));
    job.hidden = sorted;
    job.out = drows;
    job.act = weighted;
    job.weight = r->weight;
    job.part = part;
    job.slots = most;
    rows_product<DHIDDEN>(&h->experts, job);
    zero(dweight, most * sizeof(float)); // a choice that was refused has no answer
    sum_dweight(dweight, part, r->choice, served_rows(h), most, tiles);
    add_head_gradients(h, {dout, weighted, NULL, NULL, layer_tensor(m, l, "output_experts", GRADS), NULL, 0, 0, 0}, 1);
    int per_choice = c->attention_form == MOA, size = N * H;
    scatter_heads_kernel<<<blocks((size_t)size * D, 8 * THREADS), THREADS, 0, stream>>>(datt, drows, r->row, size, N, H, r->K,
                                                                                        per_choice, D);
    CHECK(cudaGetLastError());
}

// rows (.,D) sorted, of x (N,C) by the matrices w (heads*E,D,C); what HIDDEN writes besides goes to scratch memory.
void rows_of_x(Model *m, const HeadRoute *h, floatX *rows, const floatX *x, const float *w) {
    RowsJob job = {};
    job.a = x;
    job.b = low_of(m, w);
    job.out = rows;
    job.act = (floatX *)scratch_bytes(m, most_head_rows(h) * head_width(&m->config) * sizeof(floatX));
    rows_product<HIDDEN>(&h->experts, job);
}

// Given drows (.,D) sorted: dx (N,C) and dw are added to.
void rows_of_x_backward(Model *m, const HeadRoute *h, float *dx, float *dw, const floatX *drows, const floatX *x, const float *w) {
    int C = m->config.dim;
    floatX *rows = (floatX *)scratch_bytes(m, most_head_rows(h) * C * sizeof(floatX));
    add_head_gradients(h, {NULL, NULL, drows, x, NULL, dw, 0, 0, 0}, 0);
    RowsJob job = {};
    job.a = drows;
    job.b = low_of(m, w);
    job.out = rows;
    rows_product<DROWS>(&h->experts, job);
    combine(dx, Sum{dx, NULL, rows, h->token_row, h->heads * h->all.K}, h->all.N, C);
}

#endif
