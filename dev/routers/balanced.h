// Balanced: in training each token gets one expert, each expert as many tokens as any other, and the sum of the logits
// is the largest that is possible under these conditions. At evaluation each token gets its best expert.
// Lewis et al. 2021, BASE Layers: Simplifying Training of Large, Sparse Models. The recipe: base.
// Needs: dev/ranks/gather.h.
#if !defined(CONFIG_FIELDS) && !defined(BALANCED_H)
#define BALANCED_H
#include "../ranks/gather.h"

extern const Router balanced_router;

int balanced_wanted(const Config *c) {
    return c->select == BALANCED;
}

const char *balanced_refuses(const Config *c) {
    int bounded = c->capacity_factor > 0 || c->eval_capacity_factor > 0;
    if (c->topk != 1 || bounded || c->aux_weight > 0) {
        return "--select balanced gives each token one expert and each expert its share: --topk 1, no capacity, no "
               "--aux-weight";
    }
    return NULL;
}

// What moving tokens between experts would cost.
typedef struct Moves {
    int E;
    double *cost; // (E,E) what the sum of scores loses if the best token for it moves from expert a to b
    int *mover;   // (E,E) that token
    int *stale;   // (E) 1: a token came or went, so that this expert's row of cost must be found anew
    int *excess;  // (E) tokens that the expert has too many; negative: too few
    double *far;  // (E) cost of the cheapest chain of moves from any expert with too many tokens to this one
    int *from;    // (E) the expert before this one in that chain; -1: the chain begins here
} Moves;

// Finds the rows of cost and mover that have changed.
void find_costs(Moves *s, const int *expert, const real *score, int group) {
    int E = s->E;
    for (int i = 0; i < E * E; i++) {
        s->cost[i] = s->stale[i / E] ? INFINITY : s->cost[i];
    }
    for (int n = 0; n < group; n++) {
        int a = expert[n];
        for (int b = 0; s->stale[a] && b < E; b++) {
            double loss = (double)score[(size_t)n * E + a] - (double)score[(size_t)n * E + b];
            if (loss < s->cost[a * E + b]) {
                s->cost[a * E + b] = loss;
                s->mover[a * E + b] = n;
            }
        }
    }
    memset(s->stale, 0, (size_t)E * sizeof(int));
}

// Finds far and from, by the algorithm of Bellman and Ford. Returns the expert with too few tokens to which the
// cheapest chain leads; -1: there is none, because a score is not a number.
int find_chain(Moves *s) {
    int E = s->E, end = -1;
    for (int e = 0; e < E; e++) {
        s->far[e] = s->excess[e] > 0 ? 0 : INFINITY;
        s->from[e] = -1;
    }
    for (int again = 1, round = 0; again && round < E; round++) {
        again = 0;
        for (int a = 0; a < E; a++) {
            for (int b = 0; isfinite(s->far[a]) && b < E; b++) {
                double far = s->far[a] + s->cost[a * E + b];
                if (a != b && far < s->far[b] - 1e-12) { // by less, rounding could lead in a circle
                    s->far[b] = far;
                    s->from[b] = a;
                    again = 1;
                }
            }
        }
    }
    for (int e = 0; e < E; e++) {
        if (s->excess[e] < 0 && isfinite(s->far[e]) && (end < 0 || s->far[e] < s->far[end])) {
            end = e;
        }
    }
    return end;
}

// expert (group): the assignment with the largest sum of score (group,E) in which each expert has group/E tokens, and
// the first group % E experts one more. It is exact: each token begins at its best expert; then, while an expert has
// too many tokens, one token moves along each step of the cheapest chain from such an expert to one with too few
// (the method of successive shortest paths).
void select_balanced(int *expert, const real *score, int group, int E, void *more) {
    (void)more;
    size_t squared = (size_t)E * E;
    double *numbers = (double *)allocate(squared + E, sizeof(double));
    int *integers = (int *)allocate(squared + 3 * (size_t)E, sizeof(int));
    Moves s = {E, numbers, integers, integers + squared, integers + squared + E, numbers + squared,
               integers + squared + 2 * E};

    // Each token begins at its best expert.
    select_topk(expert, score, group, E, 1);
    for (int e = 0; e < E; e++) {
        s.excess[e] = -(group / E) - (e < group % E);
        s.stale[e] = 1;
    }
    for (int n = 0; n < group; n++) {
        s.excess[expert[n]]++;
    }

    int left = 0; // tokens that must move
    for (int e = 0; e < E; e++) {
        left += max_int(0, s.excess[e]);
    }
    for (; left > 0; left--) {
        find_costs(&s, expert, score, group);
        int end = find_chain(&s);
        if (end < 0) {
            break;
        }

        // Along the chain, from its end to its beginning.
        s.excess[end]++;
        for (; s.from[end] >= 0; end = s.from[end]) {
            int before = s.from[end];
            expert[s.mover[before * E + end]] = end;
            s.stale[end] = s.stale[before] = 1;
        }
        s.excess[end]--;
        ranks_tick();
    }
    free(integers);
    free(numbers);
}

void balanced_forward(Model *m, int l, const real *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int N = r->N, E = r->E;
    matmul(r->logits, x, m->params.layer[l].router, N, router_width(c), E, SET);
    scores_forward(r->p, r->lse, r->logits, N, E, c->score);
    if (m->batch.mode == TRAIN_MODE) {
        choose_by_groups(m, r, r->logits, select_balanced, NULL);
    } else {
        select_topk(r->expert, r->p, N, E, 1);
    }
    weights_forward(r->weight, r->p, r->expert, N, E, 1, c->gate, c->scale);
}

const Recipe balanced_recipes[] = {
    {"base", 2021, 1.5, "the best assignment that gives each expert as many tokens; greedy at evaluation",
     "--select balanced --topk 1 --ffn 512 --score sigmoid --gate probability --aux-weight 0",
     "Lewis et al., BASE Layers"},
};

const Router balanced_router = {
    .place = CHOICE,
    .wanted = balanced_wanted,
    .refuses = balanced_refuses,
    .forward = balanced_forward,
    .backward = topk_backward,
    .recipes = balanced_recipes,
    .recipe_count = COUNT(balanced_recipes),
};

#endif
