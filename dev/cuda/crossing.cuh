// Experts on several GPUs: what travels between them, its memory, and the kernels that pack and unpack it. The all-to-all
// itself is in train_moe.cu.
// Gives: Crossing, LayerExchange, Portion, Travel, Places; destinations_kernel and its kin; exchange_counts, lay_travel,
// lay_portion, experts_here, own_crossing, free_crossing. Needs: dev/cuda/memory.cuh, nccl.cuh, plan.cuh, experts.cuh.
#ifndef CUDA_CROSSING_CUH
#define CUDA_CROSSING_CUH

struct Portion {           // of a layer's tokens: what was sent, and what came; kept from forward to backward
    int rows, came, slots; // rows sent, rows received, and their choices here
    int *sent, *sent_at, *got, *got_at; // (ep), of the host: rows to and from each process, and where they begin
    floatX *x, *hidden;                 // (came,C), and the experts' first products
    Route route;                        // of what came, for the experts here
    int2 *tile;
    int tiles;
    Buffer memory; // for all these
};

struct LayerExchange {
    Route sending; // the "experts" are processes: of each portion, ep
    Portion portion[2];
};

struct Travel {               // of a portion, while it is on its way
    floatX *in, *answers;     // (came,C) gradients by the answers; (came,C)
    float *choices, *dweight; // (came,2K)  weights, then the experts' numbers, -1: not here; (came,K)
    Buffer memory;
    cudaEvent_t arrived;
};

struct Places {                 // the tables of ::Placement on the device: which process has which experts
    int *host, *number;         // (L,E)  a second copy: where it is, and its number there
    int *width, *activation;    // (L,here)  of the experts here, in the order of their numbers
    size_t *matrix, *matrix_in; // (L,here+1)  where their matrices begin
};

struct Crossing {
    LayerExchange *layer; // (L)
    Travel travel[2];
    Places places;
    floatX *out;                       // (rows,C)
    float *choices_out, *dweight_back; // (rows,2K), (rows,K)
    int *counts;                       // (4*ep+1), of the host: of the last dispatch
    floatX *rows, *act, *dhidden;      // the experts' scratch
    float *dweight_part;
    Buffer memory;
};

int portions_of(const Config *c) {
    return c->overlap ? 2 : 1;
}

struct Where { // which process has expert e for token n, and its number there; as expert_rank() on the host
    const int *host, *number;
    int owned, member;
    __device__ int operator()(int e, size_t n, int *found) const {
        return rank_of_expert(host, number, owned, member, e, (int)n, found);
    }
};

Where where_is(const Model *m, int l) {
    const Places *p = &m->transit->places;
    int first = l * m->config.experts;
    return {p->host + first, p->number + first, m->crossing->placement->owned, ranks.member};
}

// all (N*K): where each choice's token goes, portion * ep + process, -1: nowhere; once (N*K): the same, each place once.
__global__ void destinations_kernel(int *all, int *once, const int *served, Where where, int N, int K, int ep,
                                    int portions) {
    size_t i = thread_of_grid(), token = i / K;
    if (i >= (size_t)N * K) {
        return;
    }
    int number, there = served[i] < 0 ? -1 : where(served[i], token, &number), known = there < 0;
    for (size_t j = token * K; j < i && !known; j++) {
        known = served[j] >= 0 && where(served[j], token, &number) == there;
    }
    int second = portions == 2 && token >= (size_t)N / 2;
    all[i] = there < 0 ? -1 : there + (second ? ep : 0);
    once[i] = known ? -1 : all[i];
}

// out (rows,2K): of each row's token, the choices that go the same way.
__global__ void pack_choices_kernel(float *out, Route sending, const int *all, const int *served, const float *weight,
                                    Where where, size_t size, int ep) {
    size_t i = thread_of_grid(), row = i / sending.K, k = i % sending.K;
    if (i >= size) {
        return;
    }
    int choice = sending.choice[row], token = choice / sending.K, number;
    size_t at = (size_t)token * sending.K + k;
    int with = served[at] >= 0 && where(served[at], token, &number) == all[choice] % ep;
    out[row * 2 * sending.K + k] = with ? weight[at] : 0;
    out[row * 2 * sending.K + sending.K + k] = with ? (float)number : -1;
}

__global__ void unpack_choices_kernel(float *weight, int *served, const float *choices, size_t size, int K) {
    size_t i = thread_of_grid(), row = i / K, k = i % K;
    if (i < size) {
        weight[i] = choices[row * 2 * K + k];
        served[i] = (int)choices[row * 2 * K + K + k];
    }
}

// dweight (N,K) = the sum of the rows (K) that came back for each token
__global__ void return_dweight_kernel(float *dweight, const float *back, const int *row, size_t size, int K) {
    size_t i = thread_of_grid();
    float sum = 0;
    if (i >= size) {
        return;
    }
    for (size_t j = i / K * K; j < i / K * K + K; j++) {
        sum += row[j] >= 0 ? back[(size_t)row[j] * K + i % K] : 0;
    }
    dweight[i] = sum;
}

// What the kernels that count and sort are told of a route that has no scores: rows by process, or what came.
Routing sorting_of(const Model *m, const Route &r, int2 *tile, int tiles, int todo) {
    Routing q = {};
    q.r = r;
    q.balance = -1;
    q.group = r.N;
    q.chunks = q.chunks_of_group = div_up(r.N, BLOCK_ROWS);
    q.s = m->plan;
    q.tile = tile;
    q.tiles = tiles;
    q.todo = todo;
    return q;
}

// Memory for what is on its way, and for the experts' scratch.
void lay_travel(Model *m, int l, int C) {
    Crossing *x = m->transit;
    const LayerExchange *ex = &x->layer[l];
    size_t low = sizeof(floatX), K = (size_t)ex->sending.K, slots = 0;
    for (int i = 0; i < portions_of(&m->config); i++) {
        Travel *t = &x->travel[i];
        size_t came = (size_t)ex->portion[i].came, here = (size_t)ex->portion[i].slots;
        lay_pieces(&t->memory, {{&t->in, came * C * low},
                                {&t->answers, came * C * low},
                                {&t->choices, came * 2 * K * sizeof(float)},
                                {&t->dweight, came * K * sizeof(float)}});
        slots = slots > here ? slots : here;
    }
    lay_pieces(&x->memory, {{&x->rows, slots * C * low},
                            {&x->act, slots * m->experts.widest * low},
                            {&x->dhidden, slots * m->experts.hidden_width * low},
                            {&x->dweight_part, slots * div_up(m->experts.widest, TN) * sizeof(float)}});
}

// How many rows and choices there are for each process, and from each: the host asks the device, and then the others.
void exchange_counts(Model *m, int l) {
    int ep = ranks.ep, portions = portions_of(&m->config);
    int *counts = m->transit->counts, *out = (int *)allocate((size_t)ep * 8, sizeof(int)), *in = out + 4 * ep;
    LayerExchange *ex = &m->transit->layer[l];
    await_device();
    for (int i = 0; i < portions * ep; i++) { // first where rows begin, then the choices
        out[i % ep * 4 + i / ep] = counts[i + 1] - counts[i];
        out[i % ep * 4 + 2 + i / ep] = counts[portions * ep + 1 + i];
    }
    all_to_all(out, in, 4);
    m->crossing->came[l] = 0;
    for (int i = 0; i < portions; i++) {
        Portion *p = &ex->portion[i];
        p->rows = p->came = p->slots = 0;
        for (int r = 0; r < ep; r++) {
            p->sent[r] = out[4 * r + i];
            p->sent_at[r] = counts[i * ep + r];
            p->rows += p->sent[r];
            p->got[r] = in[4 * r + i];
            p->got_at[r] = p->came;
            p->came += p->got[r];
            p->slots += in[4 * r + 2 + i];
        }
        m->crossing->came[l] += p->came;
    }
    free(out);
}

// Memory for what comes in a portion, and its route.
void lay_portion(Model *m, Portion *p, int K, int C) {
    size_t came = (size_t)p->came, ints = came * K * sizeof(int), E = (size_t)m->crossing->placement->here->E;
    Route r = {};
    r.N = p->came;
    r.E = (int)E;
    r.K = K;
    p->tiles = p->slots / TM + (int)E;
    lay_pieces(&p->memory, {{&p->x, came * C * sizeof(floatX)},
                            {&p->hidden, (size_t)p->slots * m->experts.hidden_width * sizeof(floatX)},
                            {&r.weight, came * K * sizeof(float)},
                            {&p->tile, p->tiles * sizeof(int2)},
                            {&r.served, ints},
                            {&r.row, ints},
                            {&r.choice, ints},
                            {&r.token, ints},
                            {&r.offset, (E + 1) * sizeof(int)}});
    p->route = r;
}

// The experts that this process has in layer l, for the rows that came.
Experts experts_here(const Model *m, int l, const Portion *p) {
    const Places *places = &m->transit->places;
    Experts x = m->experts;
    int n = p->route.E;
    x.E = n;
    x.width = places->width + l * n;
    x.activation = places->activation + l * n;
    x.matrix = places->matrix + l * (n + 1);
    x.matrix_in = places->matrix_in + l * (n + 1);
    x.offset = p->route.offset;
    x.token = p->route.token;
    x.choice = p->route.choice;
    x.tile = p->tile;
    x.tiles = p->tiles;
    return x;
}

// ---- memory

// ::Placement's tables on the device.
void place_experts(Model *m) {
    const Placement *p = m->crossing->placement;
    const Places *to = &m->transit->places;
    const int *F = p->here->F, *H = p->here->hidden; // of all layers, one after another
    size_t L = (size_t)m->config.layers, n = (size_t)p->here->E, all = L * (n + 1), C = (size_t)m->experts.C;
    size_t *matrix = (size_t *)allocate(2 * all, sizeof(size_t)), *matrix_in = matrix + all;
    for (size_t l = 0, at = 0; l < L; l++, at++) { // in each layer one more than experts
        for (size_t i = l * n; i < (l + 1) * n; i++, at++) {
            matrix[at + 1] = matrix[at] + (size_t)F[i] * C;
            matrix_in[at + 1] = matrix_in[at] + (size_t)H[i] * C;
        }
    }
    upload(m, to->host, p->host, 2 * L * m->config.experts * sizeof(int)); // and number
    upload(m, to->width, F, L * n * sizeof(int));
    upload(m, to->activation, p->here->activation, L * n * sizeof(int));
    upload(m, to->matrix, matrix, 2 * all * sizeof(size_t)); // and matrix_in
    free(matrix);
}

// What a layer sends and receives, for n tokens.
void own_exchange(Model *m, int l, int n) {
    const Config *c = &m->config;
    LayerExchange *ex = &m->transit->layer[l];
    int K = most_choices(c), to = ranks.ep * portions_of(c);
    size_t choices = (size_t)n * K, rows = (size_t)n * min_int(K, ranks.ep);
    Route *r = &ex->sending;
    int *ints = own_ints(m, choices * 5 + to + 1);
    r->E = to;
    r->K = K;
    lay_choices(r, ints, choices);
    for (int i = 0; i < 2; i++) {
        Portion *p = &ex->portion[i];
        p->sent = (int *)own_host(m, (size_t)ranks.ep * 4, sizeof(int));
        p->sent_at = p->sent + ranks.ep;
        p->got = p->sent_at + ranks.ep;
        p->got_at = p->got + ranks.ep;
    }

    // Portion.memory, with an even load: booked here, taken later.
    size_t each = rows * (m->experts.C * sizeof(floatX) + K * 5 * sizeof(int)) +
                  choices * m->experts.hidden_width * sizeof(floatX);
    m->bytes[m->purpose] += each / 4 * 5;
}

// What experts on several processes need, for n tokens.
void own_crossing(Model *m, int n, const Model *parent) {
    const Config *c = &m->config;
    Crossing *x = m->transit = (Crossing *)own_host(m, 1, sizeof(Crossing));
    size_t K = (size_t)most_choices(c), rows = n * (K < (size_t)ranks.ep ? K : (size_t)ranks.ep),
           L = (size_t)c->layers;
    size_t C = (size_t)m->experts.C, slots = n * K / portions_of(c);
    x->layer = (LayerExchange *)own_host(m, L, sizeof(LayerExchange));
    for (int l = 0; l < c->layers; l++) {
        if (is_moe(c, l)) {
            own_exchange(m, l, n);
        }
    }
    x->out = own_low(m, rows * C);
    x->choices_out = own_floats(m, rows * 2 * K);
    x->dweight_back = own_floats(m, rows * K);
    m->bytes[m->purpose] += (rows * (2 * C * sizeof(floatX) + 3 * K * sizeof(float)) +
                             slots * (C + m->experts.widest + m->experts.hidden_width) * sizeof(floatX)) /
                            4 * 5; // Buffers
    for (int i = 0; i < 2 && !m->dry; i++) {
        CHECK(cudaEventCreateWithFlags(&x->travel[i].arrived, cudaEventDisableTiming));
    }
    if (!m->dry) {
        CHECK(cudaMallocHost((void **)&x->counts, ((size_t)ranks.ep * 4 + 1) * sizeof(int)));
    }
    m->crossing->came = (int *)own_host(m, c->layers, sizeof(int));
    if (parent) { // generation's model has the other's experts
        m->crossing->placement = parent->crossing->placement;
        x->places = parent->transit->places;
        return;
    }
    allocate_placement(m);
    size_t here = (size_t)m->crossing->placement->here->E;
    Places *p = &x->places;
    p->host = own_ints(m, 2 * L * c->experts);
    p->number = p->host + L * c->experts;
    p->width = own_ints(m, 2 * L * here);
    p->activation = p->width + L * here;
    p->matrix = (size_t *)own(m, 2 * L * (here + 1), sizeof(size_t));
    p->matrix_in = p->matrix + L * (here + 1);
    place_experts(m);
}

void free_crossing(Model *m) {
    Crossing *x = m->transit;
    if (!x) {
        return;
    }
    for (int i = 0; i < 2; i++) {
        CHECK(cudaFree(x->travel[i].memory.memory));
        CHECK(cudaEventDestroy(x->travel[i].arrived));
        for (int l = 0; l < m->config.layers; l++) {
            CHECK(cudaFree(x->layer[l].portion[i].memory.memory));
        }
    }
    CHECK(cudaFree(x->memory.memory));
    CHECK(cudaFreeHost(x->counts));
}

#endif
