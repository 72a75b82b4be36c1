// The routers of single papers, one a file, and which of them the options ask for.
// Gives: all_routers, choose_routers, router_outputs, most_choices, add_router_tensors, router_state, next_router.
// Needs: train_moe.c, which includes it twice: inside Config, for the fields of the routers' options (CONFIG_FIELDS), and
// behind the lesson's router. A new router is a file, its #include here, and its name in all_routers.
//
// A file has three parts: fields of Config; functions; and at its end the Router with its options and recipes.
#if !defined(CONFIG_FIELDS) && !defined(ROUTERS_H)
// The router behind r, to which an INPUT hands on what it made of x.
const Router *next_router(const Model *m, const Router *r) {
    int i = 0;
    while (m->parts[i] != r) {
        i++;
    }
    do {
        i++;
    } while (m->parts[i]->place != INPUT && m->parts[i]->place != CHOICE);
    return m->parts[i];
}

// Where a part keeps a pointer to what it needs of layer l.
void **router_state(Model *m, int l, const Router *r) {
    int i = 0;
    while (m->parts[i] != r) {
        i++;
    }
    return &m->acts.layer[l].route.state[i];
}
#endif

#include "jitter.h"        // Switch Transformers: the router's input is multiplied by noise
#include "recurrent.h"     // RMoE: the router reads a GRU that runs through the layers
#include "subtokens.h"     // Multi-Head MoE: each token is split into several
#include "noisy.h"         // Shazeer et al.: noisy top-k, and the smooth load
#include "hierarchical.h"  // the same on two levels
#include "groups.h"        // DeepSeek-V2 and V3: only the best groups of experts; losses that balance groups
#include "multirouter.h"   // several routers choose
#include "history.h"       // StableMoE: a moving average of the router chooses
#include "quantile.h"      // quantile balancing: a bias that is set to what an even load needs
#include "threshold.h"     // every expert above a threshold
#include "expert_choice.h" // each expert chooses its tokens
#include "balanced.h"      // BASE: the best assignment with equal loads
#include "hash.h"          // Hash Layers: the expert of a word is fixed
#include "gshard.h"        // GShard, ST-MoE: a weak second choice is left to chance
#include "mixed.h"         // experts that differ in width and activation
#include "importance.h"    // losses on the weights that each expert is given
#include "capacity.h"      // capacities of groups, by score, over several processes; the next best expert

#if !defined(CONFIG_FIELDS) && !defined(ROUTERS_H)
#define ROUTERS_H

// In the order in which they work.
const Router *const all_routers[] = {
    &jitter_router, &recurrent_router, &subtokens_router, &noisy_router, &noisy_load,
    &hierarchical_router, &hierarchical_load, &history_matrix, &groups_router, &multirouter_router,
    &multirouter_loss, &history_router, &quantile_router, &threshold_router, &expert_choice_router, &balanced_router,
    &hash_router, &topk_router, &gshard_router, &gshard_loss, &group_loss, &communication_loss,
    &mixed_loss, &sparsity_loss, &importance_loss, &capacity_part,
};
const int all_router_count = COUNT(all_routers);

// The router that chooses: the one that the options ask for, else the lesson's.
const Router *choosing_router(const Config *c) {
    for (int i = 0; i < all_router_count; i++) {
        if (all_routers[i]->place == CHOICE && all_routers[i]->wanted && all_routers[i]->wanted(c)) {
            return all_routers[i];
        }
    }
    return &topk_router;
}

int router_is_used(const Router *r, const Config *c) {
    return r->place == CHOICE ? r == choosing_router(c) : r->wanted && r->wanted(c);
}

// Fills m->parts with the parts at work, and m->router with the one that is called first.
void choose_routers(Model *m) {
    int count = 0;
    for (int i = 0; i < all_router_count; i++) {
        const Router *r = all_routers[i];
        if (router_is_used(r, &m->config)) {
            m->parts[count++] = r;
            if (!m->router && (r->place == INPUT || r->place == CHOICE)) {
                m->router = r;
            }
        }
    }
}

// Rows of the router's matrix, and most experts of a token.
int router_outputs(const Config *c) {
    const Router *r = choosing_router(c);
    return r->outputs ? r->outputs(c) : c->experts;
}

int most_choices(const Config *c) {
    const Router *r = choosing_router(c);
    return r->choices ? r->choices(c) : c->topk;
}

void add_router_tensors(const Config *c, int l, Tensor *list, int *count) {
    for (int i = 0; i < all_router_count; i++) {
        if (router_is_used(all_routers[i], c) && all_routers[i]->tensors && moe_layers(c) > 0) {
            all_routers[i]->tensors(c, l, list, count);
        }
    }
}

// First values that are not random numbers, or not only: see Router's init and Mixer's.
void init_router_tensor(const Model *m, int i, real *w, const double *frequency) {
    for (int r = 0; r < all_router_count; r++) {
        if (router_is_used(all_routers[r], &m->config) && all_routers[r]->init) {
            all_routers[r]->init(m, i, w, frequency);
        }
    }
    init_mixer_tensor(m, i, w);
}

// Why the routers cannot do what the options ask for; NULL: they can.
const char *routers_refuse(const Config *c) {
    for (int i = 0; i < all_router_count; i++) {
        const Router *r = all_routers[i];
        const char *reason = r->refuses && (!r->wanted || r->wanted(c)) ? r->refuses(c) : NULL;
        if (reason) {
            return reason;
        }
    }
    return NULL;
}

// Before main: the routers' options and recipes join those of dev/options.h.
__attribute__((constructor)) void collect_options(void) {
    add_options(base_options, COUNT(base_options));
    add_recipes(base_recipes, COUNT(base_recipes));
    add_effects(base_effects, COUNT(base_effects));
    add_mixer_options();
    for (int i = 0; i < all_router_count; i++) {
        add_options(all_routers[i]->options, all_routers[i]->option_count);
        add_recipes(all_routers[i]->recipes, all_routers[i]->recipe_count);
        add_effects(all_routers[i]->effects, all_routers[i]->effect_count);
    }
}

#endif
