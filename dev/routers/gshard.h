// GShard: a second choice with a small weight is often left, by chance, since it would take up an expert's capacity for
// little; and a balance loss that counts first choices only. Lepikhin et al. 2020, GShard (algorithm 1).
// The recipes: gshard; glam (Du et al. 2021), which leaves nothing to chance; st-moe (Zoph et al. 2022, ST-MoE).
// Needs: is_spread of dev/ranks/gather.h.
#ifdef CONFIG_FIELDS
    double second_threshold; // weight from which on a second choice is always kept; 0: it always is
#elif !defined(GSHARD_H)
#define GSHARD_H
#include "../ranks/gather.h"

extern const Router gshard_router, gshard_loss;

int gshard_wanted(const Config *c) {
    return c->second_threshold > 0;
}

const char *gshard_refuses(const Config *c) {
    if (c->topk != 2 || c->gate != RENORMALIZED || c->select != TOP_K) {
        return "--second-threshold needs two experts a token, --gate renormalized and --select topk";
    }
    return NULL;
}

// In training a second choice is kept with probability weight / threshold. The weights of a token's two experts sum to
// --scale.
void gshard_forward(Model *m, int l, const real *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    if (m->batch.mode != TRAIN_MODE) {
        return;
    }
    uint64_t stream = random_stream((uint64_t)c->seed, RANDOM_SECOND, (uint64_t)m->batch.step, (uint64_t)l);
    uint64_t first = (uint64_t)m->batch.first_token * (uint64_t)c->subtokens;
    for (int n = 0; n < r->N; n++) {
        double draw = random_uniform(stream, first + (uint64_t)n);
        if (draw * c->second_threshold * c->scale >= (double)r->weight[2 * n + 1]) {
            r->served[2 * n + 1] = -1;
        }
    }
}

// Several routers have their own form of this loss: see multirouter.h.
int gshard_loss_wanted(const Config *c) {
    return c->balance == GSHARD && c->routers == 1;
}

// The form of Switch Transformers (see add_balance), with f of the first choices only. The counts stay in r->count.
void gshard_loss_forward(Model *m, int l, const real *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int groups = r->N / r->group, E = r->E;
    if (!r->slope) {
        return;
    }
    memset(r->count, 0, (size_t)groups * E * sizeof(double));
    for (int n = 0; n < r->N; n++) {
        int first = r->served[(size_t)n * r->K];
        if (first >= 0) {
            r->count[(size_t)(n / r->group) * E + first] += 1;
        }
    }
    if (is_spread(c)) {
        sum_over_ranks(r->count, E);
    }
    for (int i = 0; i < groups; i++) {
        add_balance(r->slope + (size_t)i * E, r->count + (size_t)i * E, E, c->aux_weight);
    }
}

const Option gshard_options[] = {
    NUMBER("second-threshold", second_threshold, "0", 0, 1, TRAIN, "Router: choice and weight",
           "in training a second choice of weight w is kept with probability w/this; 0: always"),
};

const Recipe gshard_recipes[] = {
    {"gshard", 2020, 2.5, "top-2, the second at random by its weight; full experts pass tokens by; every other layer",
     "--activation relu --group sequence --balance gshard --capacity-factor 1 --second-threshold 0.5 --moe-every 2",
     "Lepikhin et al., GShard"},
    {"glam", 2021, 2.5, "gshard without chance; the dense layers between have a gated GELU",
     "--activation relu --dense-activation geglu --group sequence --balance gshard --capacity-factor 1 --moe-every 2",
     "Du et al., GLaM"},
    {"st-moe", 2022, 2.5,
     "top-2, a weak second at random; z-loss; room for 1.25 N/E tokens (2 N/E at evaluation); every fourth layer",
     "--layers 4 --activation geglu --balance gshard --second-threshold 0.2 --capacity-factor 0.625 "
     "--eval-capacity-factor 1 --z-weight 0.001 --moe-every 4",
     "Zoph et al., ST-MoE"},
};

const Router gshard_router = {
    .place = DECLINE,
    .wanted = gshard_wanted,
    .refuses = gshard_refuses,
    .forward = gshard_forward,
    .options = gshard_options,
    .option_count = COUNT(gshard_options),
    .recipes = gshard_recipes,
    .recipe_count = COUNT(gshard_recipes),
};

const Router gshard_loss = {.place = LOSS, .wanted = gshard_loss_wanted, .forward = gshard_loss_forward};

#endif
