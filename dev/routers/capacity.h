// Capacity, in all that the lesson's drop_overflow does not do: groups of experts that share a capacity, other orders
// in which choices are served, sequences that lose nothing (DeepSeek-AI 2024, DeepSeek-V2), choices that go to the next
// best expert, and groups of tokens that are spread over processes.
// Needs: group_of of groups.h; dev/ranks/gather.h.
#ifdef CONFIG_FIELDS
    int capacity_unit;  // ONE_EXPERT or EXPERT_GROUP: what has a capacity
    int drop_order;     // BY_CHOICE, BY_SCORE or BY_TOKEN: which choices are served first
    double drop_exempt; // share of sequences that lose nothing
    int overflow;       // SKIP or NEXT: what becomes of a choice that is refused
#elif !defined(CAPACITY_H)
#define CAPACITY_H
#include "../ranks/gather.h"
#include "groups.h"

enum { ONE_EXPERT, EXPERT_GROUP };
enum { BY_CHOICE, BY_SCORE, BY_TOKEN };
enum { SKIP, NEXT };
const char *const unit_names[] = {"expert", "group", NULL};
const char *const order_names[] = {"choice", "score", "token", NULL};
const char *const overflow_names[] = {"skip", "next", NULL};

extern const Router capacity_part;

int capacity_wanted(const Config *c) {
    return c->capacity_unit != ONE_EXPERT || c->drop_order != BY_CHOICE || c->drop_exempt > 0 || c->overflow != SKIP ||
           is_spread(c);
}

const char *capacity_refuses(const Config *c) {
    int next = c->overflow == NEXT, bounded = c->capacity_factor > 0 || c->eval_capacity_factor > 0;
    if (c->capacity_unit == EXPERT_GROUP && c->groups == 1) {
        return "--device-weight, --comm-weight and --capacity-unit group need --groups";
    }
    if (next && (c->select != TOP_K || !bounded || c->capacity_unit == EXPERT_GROUP || c->drop_order == BY_SCORE)) {
        return "--overflow next needs a capacity, --select topk, --capacity-unit expert, and --drop-order choice or "
               "token";
    }
    if (next && (c->balance == CV2 || c->balance == VARIANCE || c->noise)) {
        return "--overflow next changes weights after the losses of --balance cv2, variance and --noise";
    }
    return NULL;
}

// What is served, and by which rule.
typedef struct Service {
    int E, K, group;             // group: tokens of a group, of all processes
    int units, capacity, order;  // units: experts, or groups of experts; capacity: choices that a unit takes of a group
    int *served, *expert;        // (N,K) in and out; see Route
    const real *weight;          // (N,K)
    const real *p;               // (N,E) with --overflow next, else NULL
    const unsigned char *exempt; // (N) 1: the token loses nothing; NULL: none is
} Service;

// The expert with the highest score that token n has not chosen and that is not full; -1: there is none.
int next_best(const Service *s, const int *taken, int n) {
    int best = -1;
    for (int e = 0; e < s->E; e++) {
        int open = taken[e] < s->capacity;
        for (int k = 0; k < s->K; k++) {
            open &= s->expert[(size_t)n * s->K + k] != e;
        }
        if (open && (best < 0 || s->p[(size_t)n * s->E + e] > s->p[(size_t)n * s->E + best])) {
            best = e;
        }
    }
    return best;
}

// Serves the group of tokens that begins with token `first`. taken (units) and list (group*K) are scratch.
void serve_group(const Service *s, int first, int *taken, Ranked *list) {
    int K = s->K, choices = s->group * K;

    // The order. First choices before second ones; or high weights first (DeepSeek-V2); or early tokens with all their
    // choices first, so that no later token can decide what becomes of an earlier one.
    for (int i = 0; i < choices; i++) {
        list[i].index = first * K + (s->order == BY_CHOICE ? i % s->group * K + i / s->group : i);
        list[i].score = s->order == BY_SCORE ? (double)s->weight[list[i].index] : 0;
    }
    if (s->order == BY_SCORE) {
        qsort(list, choices, sizeof(Ranked), compare_ranked);
    }

    memset(taken, 0, (size_t)s->units * sizeof(int));
    for (int i = 0; i < choices; i++) {
        int choice = list[i].index, n = choice / K, e = s->served[choice];
        if (e < 0) {
            continue;
        }
        int unit = group_of(e, s->E, s->units);
        if (taken[unit] < s->capacity || (s->exempt && s->exempt[n])) {
            taken[unit]++;
            continue;
        }

        // The unit is full. The choice is refused, or goes to the next best expert.
        s->served[choice] = s->p ? next_best(s, taken, n) : -1;
        if (s->served[choice] >= 0) {
            s->expert[choice] = s->served[choice];
            taken[s->served[choice]]++;
        }
    }
}

void serve(const Service *s, int N) {
    int *taken = (int *)allocate(s->units, sizeof(int));
    Ranked *list = (Ranked *)allocate((size_t)s->group * s->K, sizeof(Ranked));
    for (int first = 0; first < N; first += s->group) {
        serve_group(s, first, taken, list);
    }
    free(list);
    free(taken);
}

// The same where the group is spread over processes: each serves the tokens of all, and keeps what becomes of its own.
void serve_spread(const Model *m, const Service *mine, int N) {
    Service all = *mine;
    int first, K = mine->K;
    size_t size = (size_t)N * K * sizeof(int);
    all.served = (int *)gather_tokens(m, mine->served, K, sizeof(int), &first);
    all.expert = mine->p ? (int *)gather_tokens(m, mine->expert, K, sizeof(int), &first) : NULL;
    real *weight = mine->order == BY_SCORE ? (real *)gather_tokens(m, mine->weight, K, sizeof(real), &first) : NULL;
    real *p = mine->p ? (real *)gather_tokens(m, mine->p, mine->E, sizeof(real), &first) : NULL;
    unsigned char *exempt = mine->exempt ? (unsigned char *)gather_tokens(m, mine->exempt, 1, 1, &first) : NULL;
    all.weight = weight;
    all.p = p;
    all.exempt = exempt;
    serve(&all, all.group);
    memcpy(mine->served, all.served + (size_t)first * K, size);
    if (mine->p) {
        memcpy(mine->expert, all.expert + (size_t)first * K, size);
    }
    free(all.served);
    free(all.expert);
    free(weight);
    free(p);
    free(exempt);
}

int count_served(const Route *r) {
    int count = 0;
    for (int i = 0; i < r->N * r->K; i++) {
        count += r->served[i] >= 0;
    }
    return count;
}

void capacity_forward(Model *m, int l, const real *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int N = r->N, train = m->batch.mode == TRAIN_MODE, units = c->capacity_unit == EXPERT_GROUP ? c->groups : r->E;
    int group = ranks_group_size(m, r);
    double factor = train ? c->capacity_factor : c->eval_capacity_factor;
    double capacity = ceil(factor * c->topk * group / units - 1e-9);
    const real *p = c->overflow == NEXT ? r->p : NULL;
    Service s = {r->E, r->K, group, units, (int)fmin(capacity, (double)group * r->K), train ? c->drop_order : BY_TOKEN,
                 r->served, r->expert, r->weight, p, NULL};

    // In training chance exempts some sequences, with all their tokens, in all layers.
    if (train && c->drop_exempt > 0) {
        unsigned char *exempt = (unsigned char *)arena_take(&m->scratch, N, 1);
        uint64_t stream = random_stream((uint64_t)c->seed, RANDOM_EXEMPT, (uint64_t)m->batch.step, 0);
        for (int n = 0; n < N; n++) {
            uint64_t sequence = (uint64_t)(m->batch.first_token + n / c->subtokens) / (uint64_t)m->batch.T;
            exempt[n] = random_uniform(stream, sequence) < c->drop_exempt;
        }
        s.exempt = exempt;
    }

    r->dropped = count_served(r);
    if (is_spread(c)) {
        serve_spread(m, &s, N);
    } else {
        serve(&s, N);
    }
    r->dropped -= count_served(r);

    // Other experts have other weights.
    if (c->overflow == NEXT) {
        weights_forward(r->weight, r->p, r->expert, N, r->E, r->K, c->gate, c->scale);
    }
}

const Option capacity_options[] = {
    WORD("capacity-unit", capacity_unit, "expert", unit_names, TRAIN, "Router: balance",
         "what has a capacity: each expert, or each group of experts"),
    WORD("drop-order", drop_order, "choice", order_names, TRAIN, "Router: balance",
         "served first: first choices, high weights, or early tokens"),
    NUMBER("drop-exempt", drop_exempt, "0", 0, 1, TRAIN, "Router: balance", "this share of sequences loses nothing"),
    WORD("overflow", overflow, "skip", overflow_names, TRAIN, "Router: balance",
         "a refused token passes by, or goes to its next best expert with room"),
};

const Effect capacity_effects[] = {
    {"capacity-unit", has_capacity, "a capacity: --capacity-factor 1"},
    {"drop-order", has_training_capacity, "a capacity in training: --capacity-factor 1"},
    {"drop-exempt", has_training_capacity, "a capacity in training: --capacity-factor 1"},
    {"overflow", has_capacity, "a capacity: --capacity-factor 1"},
};

const Router capacity_part = {
    .place = CAPACITY,
    .wanted = capacity_wanted,
    .refuses = capacity_refuses,
    .forward = capacity_forward,
    .options = capacity_options,
    .option_count = COUNT(capacity_options),
    .effects = capacity_effects,
    .effect_count = COUNT(capacity_effects),
};

#endif
