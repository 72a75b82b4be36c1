// Expert choice: in training each expert takes the tokens of a group that suit it best, as many as its fair share. So
// all experts are equally busy, and a token has as many experts as take it. At evaluation a token must not depend on
// others: there an expert takes it if its score is above the lowest score that was taken in training, on average.
// Zhou et al. 2022, Mixture-of-Experts with Expert Choice Routing; the level is ours. The recipe: expert-choice.
// Needs: select_above of threshold.h; dev/ranks/gather.h.
#if !defined(CONFIG_FIELDS) && !defined(EXPERT_CHOICE_H)
#define EXPERT_CHOICE_H
#include "../ranks/gather.h"
#include "threshold.h"

extern const Router expert_choice_router;

int expert_choice_wanted(const Config *c) {
    return c->select == EXPERT_CHOICE;
}

const char *expert_choice_refuses(const Config *c) {
    int bounded = c->capacity_factor > 0 || c->eval_capacity_factor > 0;
    if (bounded || c->aux_weight > 0 || c->score == SIGMOID || c->gate == RENORMALIZED) {
        return "with --select expert-choice experts are full by construction: softmax, --gate probability, no "
               "capacity, no --aux-weight";
    }
    return NULL;
}

// Every expert may want the same token.
int expert_choice_choices(const Config *c) {
    return c->experts;
}

void expert_choice_tensors(const Config *c, int l, Tensor *list, int *count) {
    if (l >= 0) {
        add_tensor(list, count, l, "level", NO_FIELD, 1, 1, 1, c->experts, INIT_ZERO)->trained = 0;
    }
}

void expert_choice_init(const Model *m, int i, real *w, const double *frequency) {
    (void)frequency;
    int E = strcmp(m->tensors[i].kind, "level") ? 0 : m->config.experts;
    for (int e = 0; e < E; e++) {
        w[e] = (real)(1.0 / E);
    }
}

// For the level: of each group of tokens of the step so far, the lowest score that each expert took.
typedef struct Lowest {
    double *sum;    // (E)
    double *passes; // groups that are in the sums; it stands behind them, so that one message sums both over processes
    int take;       // tokens that an expert takes of a group
} Lowest;

void expert_choice_allocate(Model *m, int l, int n) {
    (void)n;
    Lowest *low = (Lowest *)own(m, 1, sizeof(Lowest));
    low->sum = (double *)own(m, (size_t)m->config.experts + 1, sizeof(double));
    low->passes = low->sum + m->config.experts;
    *router_state(m, l, &expert_choice_router) = low;
}

// expert (group,E): the experts that took a token, best first, then -1.
void select_by_experts(int *expert, const real *p, int group, int E, void *more) {
    Lowest *low = (Lowest *)more;
    unsigned char *taken = (unsigned char *)allocate((size_t)group * E, 1);
#pragma omp parallel for
    for (int e = 0; e < E; e++) {
        Ranked *list = (Ranked *)allocate(group, sizeof(Ranked));
        for (int n = 0; n < group; n++) {
            list[n].score = (double)p[(size_t)n * E + e];
            list[n].index = n;
        }
        qsort(list, group, sizeof(Ranked), compare_ranked);
        for (int i = 0; i < low->take; i++) {
            taken[(size_t)list[i].index * E + e] = 1;
        }
        low->sum[e] += list[low->take - 1].score;
        free(list);
        ranks_tick();
    }
    *low->passes += 1;

    // From the experts' lists to the tokens'.
    select_topk(expert, p, group, E, E);
    for (int n = 0; n < group; n++) {
        int *chosen = expert + (size_t)n * E, kept = 0;
        for (int k = 0; k < E; k++) {
            if (taken[(size_t)n * E + chosen[k]]) {
                chosen[kept++] = chosen[k];
            }
        }
        for (; kept < E; kept++) {
            chosen[kept] = -1;
        }
    }
    free(taken);
}

void expert_choice_forward(Model *m, int l, const real *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    Lowest *low = (Lowest *)*router_state(m, l, &expert_choice_router);
    int N = r->N, E = r->E;
    matmul(r->logits, x, m->params.layer[l].router, N, router_width(c), E, SET);
    scores_forward(r->p, r->lse, r->logits, N, E, c->score);

    if (m->batch.mode == TRAIN_MODE) {
        if (m->batch.first) {
            memset(low->sum, 0, ((size_t)E + 1) * sizeof(double));
        }
        low->take = max_int(1, (int)((double)ranks_group_size(m, r) * c->topk / E));
        choose_by_groups(m, r, r->p, select_by_experts, low);
    } else {
        select_topk(r->expert, r->p, N, E, E);
        select_above(r->expert, r->p, N, E, E, layer_tensor(m, l, "level", WEIGHTS), 0, 0);
    }
    weights_forward(r->weight, r->p, r->expert, N, E, E, c->gate, c->scale);
}

// The level is a moving average over steps.
void expert_choice_update(Model *m, int l) {
    Lowest *low = (Lowest *)*router_state(m, l, &expert_choice_router);
    real *level = layer_tensor(m, l, "level", WEIGHTS);
    sum_over_ranks(low->sum, m->config.experts + 1);
    for (int e = 0; e < m->config.experts && *low->passes > 0; e++) {
        level[e] += (real)(0.1 * (low->sum[e] / *low->passes - (double)level[e]));
    }
}

const Recipe expert_choice_recipes[] = {
    {"expert-choice", 2022, 1.5, "each expert chooses its tokens; K is how many experts a token gets on average",
     "--select expert-choice --gate probability --aux-weight 0",
     "Zhou et al., Mixture-of-Experts with Expert Choice Routing"},
};

const Router expert_choice_router = {
    .place = CHOICE,
    .wanted = expert_choice_wanted,
    .refuses = expert_choice_refuses,
    .choices = expert_choice_choices,
    .tensors = expert_choice_tensors,
    .init = expert_choice_init,
    .allocate = expert_choice_allocate,
    .forward = expert_choice_forward,
    .backward = topk_backward,
    .update = expert_choice_update,
    .recipes = expert_choice_recipes,
    .recipe_count = COUNT(expert_choice_recipes),
};

#endif
