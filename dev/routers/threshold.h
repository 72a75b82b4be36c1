// Threshold: a token gets every expert whose score is above a threshold, and always the best one, so the number of its
// experts varies. The recipe: threshold, which is sparse(p, epsilon) of the source documents.
// Gives: select_above, which expert_choice.h uses too; and a loss for any router, the mean share of experts chosen.
#ifdef CONFIG_FIELDS
    double threshold;       // an expert's score must be above this; 0: above 1/E
    int max_active;         // most experts of a token; 0: E/2
    double sparsity_weight; // of the mean share of experts chosen, in the loss
#elif !defined(THRESHOLD_H)
#define THRESHOLD_H

extern const Router threshold_router, sparsity_loss;

int threshold_wanted(const Config *c) {
    return c->select == THRESHOLD;
}

const char *threshold_refuses(const Config *c) {
    return c->max_active > c->experts ? "a token cannot have more experts than there are" : NULL;
}

int threshold_choices(const Config *c) {
    return c->max_active ? c->max_active : max_int(1, c->experts / 2);
}

// Of each token's experts in expert (N,K), best first, those stay whose score is above the threshold: level (E) of the
// expert, or, with level NULL, `all`. The best one stays in any case if keep_best. The others become -1.
void select_above(int *expert, const real *p, int N, int E, int K, const real *level, double all, int keep_best) {
    for (int n = 0; n < N; n++) {
        int *chosen = expert + (size_t)n * K, kept = 0;
        for (int k = 0; k < K; k++) {
            int e = chosen[k];
            double least = level ? (double)level[e] : all;
            if ((keep_best && k == 0) || (double)p[(size_t)n * E + e] > least) {
                chosen[kept++] = e;
            }
        }
        for (; kept < K; kept++) {
            chosen[kept] = -1;
        }
    }
}

void threshold_forward(Model *m, int l, const real *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int N = r->N, E = r->E, K = r->K;
    matmul(r->logits, x, m->params.layer[l].router, N, router_width(c), E, SET);
    scores_forward(r->p, r->lse, r->logits, N, E, c->score);
    select_topk(r->expert, r->p, N, E, K);
    select_above(r->expert, r->p, N, E, K, NULL, c->threshold > 0 ? c->threshold : 1.0 / E, 1);
    weights_forward(r->weight, r->p, r->expert, N, E, K, c->gate, c->scale);
}

// A count has no derivative, so this loss is reported, but teaches nothing.
int sparsity_wanted(const Config *c) {
    return c->sparsity_weight > 0;
}

void sparsity_forward(Model *m, int l, const real *x) {
    (void)x;
    Route *r = &m->acts.layer[l].route;
    double chosen = 0;
    for (int i = 0; i < r->N * r->K; i++) {
        chosen += r->expert[i] >= 0;
    }
    r->aux += m->config.sparsity_weight * chosen / r->N / r->E;
}

const Option threshold_options[] = {
    NUMBER("threshold", threshold, "0", 0, 1, MODEL, "Router: choice and weight",
           "with --select threshold: every expert with p above this; 0: above 1/E"),
    INTEGER("max-active", max_active, "0", 0, 4096, MODEL, "Router: choice and weight",
            "and at most so many experts a token; 0: half of them"),
    NUMBER("sparsity-weight", sparsity_weight, "0", 0, 1e6, TRAIN, "Router: balance",
           "weight of the mean share of experts chosen; a count, so it has no gradient"),
};

const Effect threshold_effects[] = {
    {"threshold", threshold_wanted, "--select threshold"},
    {"max-active", threshold_wanted, "--select threshold"},
};

const Recipe threshold_recipes[] = {
    {"threshold", 0, 3, "every expert above 1/E, and always the best: a varying number of experts",
     "--select threshold --gate probability --sparsity-weight 0.01", "sparse(p, epsilon) of the source documents"},
};

const Router threshold_router = {
    .place = CHOICE,
    .wanted = threshold_wanted,
    .refuses = threshold_refuses,
    .choices = threshold_choices,
    .forward = threshold_forward,
    .backward = topk_backward,
    .options = threshold_options,
    .option_count = COUNT(threshold_options),
    .effects = threshold_effects,
    .effect_count = COUNT(threshold_effects),
    .recipes = threshold_recipes,
    .recipe_count = COUNT(threshold_recipes),
};

const Router sparsity_loss = {.place = LOSS, .wanted = sparsity_wanted, .forward = sparsity_forward};

#endif
