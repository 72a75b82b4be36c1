// Groups of experts: each token may choose only within its best groups, as where the experts of a group share a
// device; and losses that balance the groups, and what is sent to them. Dai et al. 2024, DeepSeekMoE; DeepSeek-AI
// 2024, DeepSeek-V2 and DeepSeek-V3. The recipes: deepseekmoe, deepseek-v2.
// Gives: group_of and mask_groups, for other routers, too; the options --groups and --group-topk.
#ifdef CONFIG_FIELDS
    int groups;           // G
    int group_topk;       // M, groups within which a token chooses; 0: all
    int group_score;      // BEST or BEST_TWO: what a group counts as
    double device_weight; // of the loss that balances groups
    double comm_weight;   // of the loss that balances what is sent to groups
#elif !defined(GROUPS_H)
#define GROUPS_H
#include "../ranks/gather.h" // is_spread

enum { BEST, BEST_TWO };
const char *const group_score_names[] = {"best", "top2", NULL};

// The group of an expert: G groups of E experts, of which each has E/G, or one more.
BOTH int group_of(int expert, int E, int G) {
    return expert * G / E;
}

// ---- the choice within the best groups

int groups_wanted(const Config *c) {
    return c->group_topk > 0 && c->select == TOP_K && c->history_decay <= 0;
}

// Experts outside of a token's M best groups get a score of -infinity (0 would be above negative scores). A group
// counts as its best score (DeepSeek-V2), or as the sum of its two best (DeepSeek-V3). score (N,E)
void mask_groups(real *score, int N, int E, int G, int M, int by) {
    real *best = allocate_reals((size_t)2 * G), *second = best + G;
    int *chosen = (int *)allocate(M, sizeof(int));
    for (int n = 0; n < N; n++) {
        real *row = score + (size_t)n * E;
        for (int g = 0; g < G; g++) {
            best[g] = second[g] = (real)-INFINITY;
        }
        for (int e = 0; e < E; e++) {
            int g = group_of(e, E, G);
            if (row[e] > best[g]) {
                second[g] = best[g];
                best[g] = row[e];
            } else if (row[e] > second[g]) {
                second[g] = row[e];
            }
        }
        for (int g = 0; g < G && by == BEST_TWO; g++) {
            best[g] += second[g] > (real)-INFINITY ? second[g] : 0; // a group may have one expert only
        }
        select_topk(chosen, best, 1, G, M);
        for (int e = 0; e < E; e++) {
            int allowed = 0;
            for (int k = 0; k < M; k++) {
                allowed |= chosen[k] == group_of(e, E, G);
            }
            row[e] = allowed ? row[e] : (real)-INFINITY;
        }
    }
    free(chosen);
    free(best);
}

void groups_forward(Model *m, int l, const real *x) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    Route *r = &m->acts.layer[l].route;
    int N = r->N, E = r->E, K = r->K;
    matmul(r->logits, x, w->router, N, router_width(c), E, SET);
    scores_forward(r->p, r->lse, r->logits, N, E, c->score);

    // As in the lesson's router, p + bias decides, where there is a bias.
    real *decides = scratch(m, (size_t)N * E);
    for (size_t i = 0; i < (size_t)N * E; i++) {
        decides[i] = r->p[i] + (w->bias ? w->bias[i % E] : 0);
    }
    mask_groups(decides, N, E, c->groups, c->group_topk, c->group_score);
    select_topk(r->expert, decides, N, E, K);
    weights_forward(r->weight, r->p, r->expert, N, E, K, c->gate, c->scale);
}

// ---- losses

int group_loss_wanted(const Config *c) {
    return c->groups > 1 || c->group_topk > 0 || c->device_weight > 0 || c->comm_weight > 0;
}

const char *groups_refuse(const Config *c) {
    int G = c->groups, M = c->group_topk;
    if (G > c->experts || M > G || (M && c->topk > M * (c->experts / G))) {
        return "--groups and --group-topk must leave at least --topk experts to choose from";
    }
    if (M && c->select != TOP_K && c->select != HIERARCHICAL) {
        return "--group-topk goes with --select topk or hierarchical";
    }
    if (c->device_weight + c->comm_weight > 0 && G == 1) {
        return "--device-weight, --comm-weight and --capacity-unit group need --groups";
    }
    if (c->comm_weight > 0 && !M) {
        return "--comm-weight needs --group-topk";
    }
    if (c->comm_weight > 0 && c->group == STEP) {
        return "--group step goes with one router and with losses of counts: --balance switch or width, "
               "--device-weight";
    }
    return NULL;
}

// The device-level loss of DeepSeekMoE: the sum over groups of experts of f'_g * P'_g. f' is the mean of E * f in
// the group, and P' is the sum of P there; f and P are those of Switch Transformers.
void group_loss_forward(Model *m, int l, const real *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int E = r->E, G = c->groups;
    for (int i = 0; i < r->N / r->group && c->device_weight > 0; i++) {
        const double *count = r->count + (size_t)i * E;
        double *slope = r->slope + (size_t)i * E, total = 0;
        for (int e = 0; e < E; e++) {
            total += count[e];
        }

        // The experts first .. end are a group.
        for (int first = 0, end = 0; first < E && total > 0; first = end) {
            double sum = 0;
            for (; end < E && group_of(end, E, G) == group_of(first, E, G); end++) {
                sum += count[end];
            }
            for (int e = first; e < end; e++) {
                slope[e] += c->device_weight * E * sum / total / (end - first);
            }
        }
    }
}

int communication_wanted(const Config *c) {
    return c->comm_weight > 0;
}

// The communication loss of DeepSeek-V2: the sum over groups of experts of f''_g * P'_g with f''_g = G / (M *
// tokens) times the tokens that are sent to group g. A token is sent to a group once, however many experts it has
// there.
void communication_forward(Model *m, int l, const real *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int E = r->E, K = r->K, G = c->groups, all = ranks_group_size(m, r);
    double *sent = (double *)arena_take(&m->scratch, G, sizeof(double));
    for (int first = 0; first < r->N; first += r->group) {
        double *slope = r->slope + (size_t)(first / r->group) * E;
        memset(sent, 0, (size_t)G * sizeof(double));
        for (int choice = first * K; choice < (first + r->group) * K; choice++) {
            int g = r->served[choice] < 0 ? -1 : group_of(r->served[choice], E, G), fresh = g >= 0;
            for (int other = choice / K * K; other < choice; other++) {
                fresh &= r->served[other] < 0 || group_of(r->served[other], E, G) != g;
            }
            if (fresh) {
                sent[g] += 1;
            }
        }
        if (is_spread(c)) {
            sum_over_ranks(sent, G);
        }
        for (int e = 0; e < E; e++) {
            slope[e] += c->comm_weight * G / ((double)c->group_topk * all) * sent[group_of(e, E, G)];
        }
    }
}

const Option groups_options[] = {
    INTEGER("groups", groups, "1", 1, 1024, MODEL, "Router: choice and weight",
            "experts form this many groups (D)"),
    INTEGER("group-topk", group_topk, "0", 0, 1024, MODEL, "Router: choice and weight",
            "choose only within this many groups (M); 0: within all"),
    WORD("group-score", group_score, "best", group_score_names, MODEL, "Router: choice and weight",
         "a group counts as its best score, or the sum of its two best"),
    NUMBER("device-weight", device_weight, "0", 0, 1e6, TRAIN, "Router: balance",
           "weight of the loss that balances groups of experts"),
    NUMBER("comm-weight", comm_weight, "0", 0, 1e6, TRAIN, "Router: balance",
           "weight of the loss that balances tokens sent to groups"),
};

int has_groups(const Config *c) {
    return c->groups > 1;
}

int groups_matter(const Config *c) {
    return c->group_topk > 0 || c->device_weight + c->comm_weight > 0 || c->capacity_unit != 0 || c->select == HIERARCHICAL;
}

int groups_choose(const Config *c) {
    return c->group_topk > 0 && c->select == TOP_K;
}

const Effect groups_effects[] = {
    {"groups", groups_matter, "--group-topk, --device-weight, --capacity-unit group or --select hierarchical"},
    {"group-topk", has_groups, "more than one group: --groups 4"},
    {"group-score", groups_choose, "--group-topk, and --select topk"},
};

const Recipe groups_recipes[] = {
    {"deepseekmoe", 2024, 3,
     "many narrow experts, one of them shared by all tokens; balance of experts and of their groups",
     "--experts 31 --topk 7 --shared 1 --ffn 64 --gate probability --groups 4 --device-weight 0.05 --dense-first 1",
     "Dai et al., DeepSeekMoE"},
    {"deepseek-v2", 2024, 3,
     "deepseekmoe within the best 2 of 4 groups; three balance losses; a full group drops the lowest weights",
     "--experts 32 --topk 6 --shared 2 --ffn 64 --gate probability --groups 4 --group-topk 2 --group sequence "
     "--aux-weight 0.003 --device-weight 0.05 --comm-weight 0.02 --capacity-factor 1 --capacity-unit group "
     "--drop-order score --drop-exempt 0.1 --dense-first 1",
     "DeepSeek-AI, DeepSeek-V2"},
};

const Router groups_router = {
    .place = CHOICE,
    .wanted = groups_wanted,
    .forward = groups_forward,
    .backward = topk_backward, // the choice has no derivative
    .options = groups_options,
    .option_count = COUNT(groups_options),
    .effects = groups_effects,
    .effect_count = COUNT(groups_effects),
    .recipes = groups_recipes,
    .recipe_count = COUNT(groups_recipes),
};

const Router group_loss = {
    .place = LOSS, .wanted = group_loss_wanted, .refuses = groups_refuse, .forward = group_loss_forward};

const Router communication_loss = {.place = LOSS, .wanted = communication_wanted, .forward = communication_forward};

#endif
