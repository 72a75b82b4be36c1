// The CUDA twin's own structs of weights and routing, in the form that its kernels know, until it has a new house too.
// Gives: Plan, Gate, Weights, point_weights, router_rows, group_size, whole_group_size, layer_stream.
// Needs: train_moe.c. train_moe.cu includes it at the beginning of its namespace, `gpu`.
//
// What the C twin has instead: Route is Plan and Gate in one, and Params is Weights without those of single routers.

// The names of chapter 2 of train_moe.c are the twin's own here, and in tests they mean the plain functions.
#undef matmul
#undef matmul_dx
#undef matmul_dw
#undef grouped_matmul
#undef grouped_matmul_dx
#undef grouped_matmul_dw
#undef softmax
#undef rmsnorm_forward
#undef rmsnorm_backward
#undef attention_forward
#undef attention_backward
#undef activation_forward
#undef activation_backward
#undef sum_of_squares

#define CHUNK 128                        // rows of which a thread takes the sum
#define APART (MANY && ranks.ep > 1)     // the experts are on several ranks

// The integers of one layer's routing. A "choice" is n*K + k: token n's k-th expert. A "slot" is a row of the sorted
// order.
struct Plan {
    int N, E, K;
    int *expert;  // (N*K) expert of each choice, best first; -1: no choice
    int *key;     // (N*K) the same, or -1 where it is not followed: declined by chance, or the expert was full
    int *slot;    // (N*K) slot of each choice, -1 where it has none
    int *choice;  // (N*K) choice of each slot, sorted by expert and then by token
    int *token;   // (N*K) token of each slot
    int *offset;  // (E+1) first slot of each expert; offset[E] slots in all
};

// A gate: rows of E scores, of which K are chosen. Mostly a token has one row; with several routers it has one for
// each, and where a group is chosen first, one for each group.
struct Gate {
    int per, E, K;   // per: rows of a token
    int column;      // of the logits (N,W): where a token's first row begins, row r's is E further for each
    float *p;        // (N*per, E) scores
    float *lse;      // (N*per) log of the sum of exp of the logits
    float *weight;   // (N*per, K) of the chosen
    int *expert;     // (N*per, K) the chosen, best first
};

struct Room { // memory that grows with what arrives
    void *memory;
    size_t bytes;
};

struct LayerWeights {         // see Tensor::kind
    float *norm1, *qkv, *proj, *norm2, *router, *w_in, *w_out, *dense_in, *dense_out, *split, *merge, *project;
    float *bias, *slow, *level, *table; // not trained
};

struct Weights {
    float *embed, *norm, *head, *gru_x, *gru_h, *gru_bx, *gru_bh; // head is embed where tied
    LayerWeights *layer;                                          // (L)
};

const struct {
    const char *kind;
    float *LayerWeights::*field;
} layer_fields[] = {
    {"norm1", &LayerWeights::norm1},       {"qkv", &LayerWeights::qkv},
    {"proj", &LayerWeights::proj},         {"norm2", &LayerWeights::norm2},
    {"router", &LayerWeights::router},     {"w_in", &LayerWeights::w_in},
    {"w_out", &LayerWeights::w_out},       {"dense_in", &LayerWeights::dense_in},
    {"dense_out", &LayerWeights::dense_out}, {"split", &LayerWeights::split},
    {"merge", &LayerWeights::merge},       {"project", &LayerWeights::project},
    {"bias", &LayerWeights::bias},         {"slow", &LayerWeights::slow},
    {"level", &LayerWeights::level},       {"table", &LayerWeights::table},
};

const struct {
    const char *kind;
    float *Weights::*field;
} model_fields[] = {
    {"embed", &Weights::embed}, {"norm", &Weights::norm},     {"head", &Weights::head},    {"gru_x", &Weights::gru_x},
    {"gru_h", &Weights::gru_h}, {"gru_bx", &Weights::gru_bx}, {"gru_bh", &Weights::gru_bh},
};

// Where the struct has its pointer to this tensor.
float **weight_field(Weights *w, const Tensor *t) {
    for (const auto &f : layer_fields) {
        if (t->layer >= 0 && !strcmp(f.kind, t->kind)) {
            return &(w->layer[t->layer].*f.field);
        }
    }
    for (const auto &f : model_fields) {
        if (t->layer < 0 && !strcmp(f.kind, t->kind)) {
            return &(w->*f.field);
        }
    }
    fail("internal error: the CUDA twin does not know the weights %s", t->name);
}

// Lays the struct of pointers over one allocation. w->layer (L) is there.
void point_weights(const ::Model *m, Weights *w, float *memory) {
    for (int i = 0; i < m->tensor_count; i++) {
        *weight_field(w, &m->tensors[i]) = memory + m->tensors[i].offset;
    }
    if (!w->head) {
        w->head = w->embed;
    }
}

// Rows of a layer's router, without those of the noise: the groups' where groups are chosen first, then the experts'.
int router_rows(const Config *c) {
    return c->select == HASH ? 0 : c->routers * c->experts + (c->select == HIERARCHICAL ? c->groups : 0);
}

int halves_of(const Config *c) { // in which a batch travels
    return c->overlap ? 2 : 1;
}

// The tokens of a group of tokens, of n in sequences of T.
int group_size(const Config *c, int n, int T) {
    return c->group == SEQUENCE ? T : n;
}

// The tokens of a group of tokens, on all ranks together, of n on this one.
int whole_group_size(const ::Model *m, int n, int T) {
    int total = 0;
    if (!is_spread(&m->config)) {
        return group_size(&m->config, n, T);
    }
    for (int r = 0; r < ranks.size; r++) {
        total += m->crossing->rank_tokens[r] * m->config.subtokens;
    }
    return total;
}

uint64_t layer_stream(const ::Model *m, int purpose, int l) {
    return random_stream((uint64_t)m->config.seed, purpose, (uint64_t)m->batch.step, (uint64_t)l);
}
