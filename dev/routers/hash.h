// Hash: the expert of a word is fixed by a table, which is made once, before training. There are no scores, and nothing
// of the routing is learned. Roller et al. 2021, Hash Layers for Large Sparse Models. The recipe: hash.
#if !defined(CONFIG_FIELDS) && !defined(HASH_H)
#define HASH_H

extern const Router hash_router;

int hash_wanted(const Config *c) {
    return c->select == HASH;
}

const char *hash_refuses(const Config *c) {
    int trained = c->aux_weight + c->z_weight + c->sparsity_weight + c->device_weight + c->comm_weight + c->jitter > 0;
    if (c->topk != 1 || c->gate == RENORMALIZED || c->recurrent || c->subtokens > 1 || trained) {
        return "--select hash has no router: --topk 1, --gate probability, and nothing that trains or balances one";
    }
    return NULL;
}

int hash_outputs(const Config *c) {
    (void)c;
    return 0;
}

void hash_tensors(const Config *c, int l, Tensor *list, int *count) {
    if (l >= 0) {
        add_tensor(list, count, l, "table", NO_FIELD, 1, 1, 1, c->vocab, INIT_ZERO)->trained = 0;
    }
}

// table (V): the expert of each word, such that the experts' shares of the text are even ("balanced" in the paper).
// The most frequent word comes first, and each goes to the expert with the least so far. frequency (V), NULL: all are
// equal. Chance changes the order a little from layer to layer, so that other words meet there.
void balance_table(real *table, const double *frequency, int V, int E, uint64_t stream) {
    Ranked *list = (Ranked *)allocate(V, sizeof(Ranked));
    double *load = (double *)allocate(E, sizeof(double));
    for (int v = 0; v < V; v++) {
        list[v].score = (frequency ? frequency[v] : 1) * (0.8 + 0.2 * random_uniform(stream, (uint64_t)v));
        list[v].index = v;
    }
    qsort(list, V, sizeof(Ranked), compare_ranked);
    for (int i = 0; i < V; i++) {
        int best = 0, v = list[i].index;
        for (int e = 1; e < E; e++) {
            best = load[e] < load[best] ? e : best;
        }
        table[v] = (real)best;
        load[best] += frequency ? frequency[v] + 1 : 1; // words that were not seen are dealt out evenly, too
    }
    free(load);
    free(list);
}

// The table's random numbers are chosen by its number among the tensors, as those of all first weights are.
void hash_init(const Model *m, int i, real *w, const double *frequency) {
    const Config *c = &m->config;
    if (!strcmp(m->tensors[i].kind, "table")) {
        uint64_t stream = random_stream((uint64_t)c->seed, RANDOM_INIT, (uint64_t)i, 0);
        balance_table(w, frequency, c->vocab, c->experts, stream);
    }
}

// Without scores there is no entropy to show and no loss to take.
void hash_allocate(Model *m, int l, int n) {
    (void)n;
    m->acts.layer[l].route.p = NULL;
    m->acts.layer[l].route.slope = NULL;
}

void hash_forward(Model *m, int l, const real *x) {
    (void)x;
    Route *r = &m->acts.layer[l].route;
    const real *table = layer_tensor(m, l, "table", WEIGHTS);
    for (int n = 0; n < r->N; n++) {
        r->expert[n] = (int)table[m->batch.inputs[n]];
        r->weight[n] = (real)m->config.scale;
    }
}

void hash_backward(Model *m, int l, real *dx, real *dweight, const real *x) {
    (void)m, (void)l, (void)dx, (void)dweight, (void)x;
}

const Recipe hash_recipes[] = {
    {"hash", 2021, 2.5, "no router: the expert of a word is fixed, by a table that evens out their frequencies",
     "--select hash --topk 1 --ffn 512 --gate probability --aux-weight 0", "Roller et al., Hash Layers"},
};

const Router hash_router = {
    .place = CHOICE,
    .wanted = hash_wanted,
    .refuses = hash_refuses,
    .outputs = hash_outputs,
    .tensors = hash_tensors,
    .init = hash_init,
    .allocate = hash_allocate,
    .forward = hash_forward,
    .backward = hash_backward,
    .recipes = hash_recipes,
    .recipe_count = COUNT(hash_recipes),
};

#endif
