// Importance: balance losses on the sum of the weights that each expert is given, instead of on counts and scores:
// --balance cv2 (Shazeer et al. 2017, equation 6) and variance, the loss of simple introductions. The recipe: variance.
// Gives: cv_squared, which noisy.h takes for the load, too. Needs: dev/ranks/gather.h.
#if !defined(CONFIG_FIELDS) && !defined(IMPORTANCE_H)
#define IMPORTANCE_H
#include "../ranks/gather.h"

extern const Router importance_loss;

int importance_wanted(const Config *c) {
    return c->balance == CV2 || c->balance == VARIANCE;
}

// 1 + variance / mean^2 of v (n): the squared coefficient of variation, and 1 more, so it is 1 where all are equal.
// slope (n) = weight times its derivative; it may be the memory of v. mean > 0: a mean that is known beforehand, and so
// a constant; 0: the mean of v. Where that is 0, as when all scores have underflown, all are equal.
double cv_squared(const double *v, double *slope, int n, double mean, double weight) {
    double average = 0, variance = 0;
    for (int i = 0; i < n; i++) {
        average += v[i] / n;
    }
    for (int i = 0; i < n; i++) {
        variance += (v[i] - average) * (v[i] - average) / n;
    }
    double by = mean > 0 ? mean : fmax(average, 1e-30), moved = mean > 0 ? 0 : variance / by;
    for (int i = 0; i < n; i++) {
        slope[i] = weight * 2 / (n * by * by) * (v[i] - average - moved);
    }
    return 1 + variance / (by * by);
}

// slope (groups,E) of the losses by each weight that is given to the expert.
void importance_allocate(Model *m, int l, int n) {
    *router_state(m, l, &importance_loss) = own_by_group(m, n, m->config.experts);
}

void importance_forward(Model *m, int l, const real *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    double *slope = (double *)*router_state(m, l, &importance_loss);
    int E = r->E, groups = r->N / r->group, choices = r->N * r->K;

    // The sum of the weights that each expert is given in each group of tokens.
    memset(slope, 0, (size_t)groups * E * sizeof(double));
    for (int i = 0; i < choices; i++) {
        if (r->expert[i] >= 0) {
            slope[(size_t)(i / r->K / r->group) * E + r->expert[i]] += (double)r->weight[i];
        }
    }
    if (is_spread(c)) {
        sum_over_ranks(slope, E);
    }

    // The loss, and its derivative by each of these sums. With `variance` the mean is known: each token gives 1 in all.
    double mean = c->balance == VARIANCE ? (double)ranks_group_size(m, r) / E : 0;
    for (int i = 0; i < groups; i++) {
        double *sum = slope + (size_t)i * E;
        r->aux += c->aux_weight / groups * cv_squared(sum, sum, E, mean, c->aux_weight / groups);
    }

    // Gradients are averaged over processes, but this is a derivative of a sum over them.
    for (int e = 0; is_spread(c) && e < E; e++) {
        slope[e] *= ranks.size;
    }
}

void importance_backward(Model *m, int l, real *dx, real *dweight, const real *x) {
    (void)dx, (void)x;
    const Route *r = &m->acts.layer[l].route;
    const double *slope = (const double *)*router_state(m, l, &importance_loss);
    for (int i = 0; i < r->N * r->K; i++) {
        if (r->expert[i] >= 0) {
            size_t at = (size_t)(i / r->K / r->group) * r->E + r->expert[i];
            dweight[i] += (real)(m->batch.scale * slope[at]);
        }
    }
}

const Recipe importance_recipes[] = {
    {"variance", 0, 2.5, "mixtral with the variance of the weights as its balance loss", "--balance variance",
     "the loss of simple introductions"},
};

const Router importance_loss = {
    .place = LOSS,
    .wanted = importance_wanted,
    .allocate = importance_allocate,
    .forward = importance_forward,
    .backward = importance_backward,
    .recipes = importance_recipes,
    .recipe_count = COUNT(importance_recipes),
};

#endif
