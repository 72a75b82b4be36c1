// Quantile balancing: p + b chooses and p alone weighs, as in DeepSeek-V3, but b does not move by a fixed step. After
// each step it is set to what would have given every expert its fair share of the tokens that the step has seen. The
// recipe: quantile.
//
// From the literature: Su Jianlin 2026, MoE Odyssey 6: Optimal Allocation for Equilibrium (kexue.fm/archives/11619), a
// blog and not a paper; Kimi K3 trains with it. The best choice under which each token has K experts and each expert
// N*K/E tokens is a linear program. Its dual variables are a threshold of each token and a bias of each expert, found
// by turns: a token's threshold is its (K+1)-th largest p + b; then b_e is minus the (N*K/E+1)-th largest p_e -
// threshold, a quantile over tokens. One such sweep a step, from the b of the step before. b is used one step late, so
// that no token's experts depend on later tokens. (Read in translation; K3's report not at all.)
// Ours: several sweeps a step; the middle between the (N*K/E)-th and the next, since the latter itself leaves a tie;
// the moving average of b over steps, since 512 tokens make a noisy quantile; with several batches in a step, or with
// --group sequence, the mean of what each group of tokens asks for; softmax scores in mixtral's shape.
// Needs: topk_forward, topk_backward and the selection bias of train_moe.c, LayerParams' `bias`; dev/ranks/gather.h.
#ifdef CONFIG_FIELDS
    int quantile_sweeps;   // over the tokens of a batch, to find its bias; 0: there is none
    double quantile_decay; // of the moving average of the bias, for each step
#elif !defined(QUANTILE_H)
#define QUANTILE_H
#include "../ranks/gather.h"

extern const Router quantile_router;

int quantile_wanted(const Config *c) {
    return c->quantile_sweeps > 0;
}

const char *quantile_refuses(const Config *c) {
    if (c->select != TOP_K || c->bias_rate > 0 || c->history_decay > 0 || c->group_topk || c->noise || c->routers > 1) {
        return "--quantile-sweeps goes with --select topk, and not with --bias-rate, --history-decay, --group-topk, "
               "--noise or --routers";
    }
    return c->topk == c->experts ? "--quantile-sweeps needs more experts than --topk" : NULL;
}

// The lesson's selection bias, which topk_forward adds to the scores.
void quantile_tensors(const Config *c, int l, Tensor *list, int *count) {
    if (l >= 0) {
        size_t field = offsetof(LayerParams, bias);
        add_tensor(list, count, l, "bias", field, 1, 1, 1, c->experts, INIT_ZERO)->trained = 0;
    }
}

// What the step so far asks the bias to be.
typedef struct Wish {
    double *sum;    // (E) over groups of tokens
    double *passes; // groups in the sum; it stands behind it, so that one message sums both over processes
    double *bias;   // (E) of the group at work
} Wish;

void quantile_allocate(Model *m, int l, int n) {
    (void)n;
    int E = m->config.experts;
    Wish *wish = (Wish *)own(m, 1, sizeof(Wish));
    wish->sum = (double *)own(m, (size_t)2 * E + 1, sizeof(double));
    wish->passes = wish->sum + E;
    wish->bias = wish->passes + 1;
    *router_state(m, l, &quantile_router) = wish;
}

// The number that `rank` numbers of v (n) come before if the largest come first. It changes their order.
real nth_largest(real *v, int n, int rank) {
    for (int low = 0, high = n - 1; low < high;) {
        // What is larger than the pivot goes to the left, what is smaller to the right (Hoare's method).
        real pivot = v[low + (high - low) / 2];
        int i = low, j = high;
        while (i <= j) {
            while (v[i] > pivot) {
                i++;
            }
            while (v[j] < pivot) {
                j--;
            }
            if (i <= j) {
                real other = v[i];
                v[i++] = v[j];
                v[j--] = other;
            }
        }
        if (rank <= j) {
            high = j;
        } else if (rank >= i) {
            low = i;
        } else {
            break; // between the two parts all are the pivot
        }
    }
    return v[rank];
}

// Moves bias (E) to where each expert is among the K < E best, by p + bias, of about N*K/E of the tokens of p (N,E). An
// example with 4 tokens, 2 experts and one choice stands in test_quantile_by_hand.
void balance_by_quantiles(double *bias, const real *p, int N, int E, int K, int sweeps) {
    int share = (int)((double)N * K / E); // less than N
    real *biased = allocate_reals((size_t)2 * N * E), *margin = biased + (size_t)N * E;
    int *best = (int *)allocate((size_t)N * (K + 1), sizeof(int));
    for (int sweep = 0; sweep < sweeps; sweep++) {
        for (size_t i = 0; i < (size_t)N * E; i++) {
            biased[i] = (real)((double)p[i] + bias[i % E]);
        }
        select_topk(best, biased, N, E, K + 1);

        // margin (E,N): how far the expert is above the best expert that the token does not get. Its tokens are those
        // with a positive margin, so 0 has to lie behind the last margin of its share, and before the next one.
#pragma omp parallel for
        for (int e = 0; e < E; e++) {
            for (int n = 0; n < N; n++) {
                int loser = best[(size_t)n * (K + 1) + K];
                margin[(size_t)e * N + n] = biased[(size_t)n * E + e] - biased[(size_t)n * E + loser];
            }
            real next = nth_largest(margin + (size_t)e * N, N, share);
            real last = share > 0 ? nth_largest(margin + (size_t)e * N, N, share - 1) : next;
            bias[e] -= ((double)last + (double)next) / 2;
        }
        ranks_tick();
    }
    free(best);
    free(biased);
}

// The choice is the lesson's, by the bias of the steps before. In training the scores are kept in mind as a wish.
void quantile_forward(Model *m, int l, const real *x) {
    topk_forward(m, l, x);
    if (m->batch.mode != TRAIN_MODE) {
        return;
    }
    const Route *r = &m->acts.layer[l].route;
    Wish *wish = (Wish *)*router_state(m, l, &quantile_router);
    int E = r->E, spread = is_spread(&m->config), group = ranks_group_size(m, r), first = 0;
    if (m->batch.first) {
        memset(wish->sum, 0, ((size_t)E + 1) * sizeof(double));
    }
    real *all = spread ? (real *)gather_tokens(m, r->p, E, sizeof(real), &first) : r->p;
    for (int n = 0; n < (spread ? group : r->N); n += group) {
        for (int e = 0; e < E; e++) {
            wish->bias[e] = (double)m->params.layer[l].bias[e];
        }
        balance_by_quantiles(wish->bias, all + (size_t)n * E, group, E, r->K, m->config.quantile_sweeps);
        for (int e = 0; e < E; e++) {
            wish->sum[e] += wish->bias[e];
        }
        *wish->passes += 1;
    }
    if (spread) {
        free(all);
    }
}

void quantile_update(Model *m, int l) {
    Wish *wish = (Wish *)*router_state(m, l, &quantile_router);
    real *bias = m->params.layer[l].bias;
    sum_over_ranks(wish->sum, m->config.experts + 1);
    for (int e = 0; e<m->config.experts && * wish->passes> 0; e++) {
        bias[e] += (real)((1 - m->config.quantile_decay) * (wish->sum[e] / *wish->passes - (double)bias[e]));
    }
}

const Option quantile_options[] = {
    INTEGER("quantile-sweeps", quantile_sweeps, "0", 0, 1000, MODEL, "Router: choice and weight",
            "choose by p + b; b is found after a step in this many sweeps over its tokens; 0: no b"),
    NUMBER("quantile-decay", quantile_decay, "0", 0, 0.999999, TRAIN, "Router: choice and weight",
           "of the moving average of that b; 0: the last step's alone"),
};

const Effect quantile_effects[] = {
    {"quantile-decay", quantile_wanted, "--quantile-sweeps"},
};

const Recipe quantile_recipes[] = {
    {"quantile", 2026, 2.5, "a bias chooses that would have given each expert its fair share of the tokens just seen",
     "--quantile-sweeps 4 --quantile-decay 0.5 --aux-weight 0", "Su Jianlin, Optimal Allocation for Equilibrium"},
};

const Router quantile_router = {
    .place = CHOICE,
    .wanted = quantile_wanted,
    .refuses = quantile_refuses,
    .tensors = quantile_tensors,
    .allocate = quantile_allocate,
    .forward = quantile_forward,
    .backward = topk_backward, // the choice has no derivative
    .update = quantile_update,
    .options = quantile_options,
    .option_count = COUNT(quantile_options),
    .effects = quantile_effects,
    .effect_count = COUNT(quantile_effects),
    .recipes = quantile_recipes,
    .recipe_count = COUNT(quantile_recipes),
};

#endif
